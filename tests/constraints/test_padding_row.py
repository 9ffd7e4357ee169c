"""A table of rows of norm one may have a padding row, which stays zero, or whatever torch makes of it."""

import copy
import re

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, AdamW, check, constraint_of, mark_unit_norm, project_to_manifold_, unmark
from manifold_opt.manifolds import UnitNorm

from ..helpers import gaussian, held_under

RULES = {
    "SGD": lambda kind, params: kind(params, lr=0.1, momentum=0.9, dampening=0.2, weight_decay=0.1),
    "Adam": lambda kind, params: kind(params, lr=0.1, amsgrad=True),
    "AdamW": lambda kind, params: kind(params, lr=0.1, weight_decay=0.3),
}
KINDS = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW}


def table(padding_idx, dtype=torch.float64, seed=0):
    net = nn.Embedding(9, 4, padding_idx=padding_idx, dtype=dtype)
    with torch.no_grad():
        net.weight.copy_(gaussian(9, 4, seed=seed))
        net.weight[padding_idx] = 0
    mark_unit_norm(net, "weight")
    return net


def others(padding_idx):
    return [i for i in range(9) if i != padding_idx]


def norms(net):
    return torch.linalg.vector_norm(net.weight.detach().double(), dim=1)


@pytest.mark.parametrize("padding_idx", [0, 4, 8, -2])
@pytest.mark.parametrize("rule", RULES)
def test_the_padding_row_stays_zero_and_the_others_step_as_without_it(rule, padding_idx):
    net = table(padding_idx)
    rows = others(net.padding_idx)
    alone = mark_unit_norm(nn.Parameter(net.weight.detach()[rows].clone()))
    opt, other = RULES[rule](KINDS[rule], net.parameters()), RULES[rule](KINDS[rule], [alone])
    for step in range(5):
        opt.zero_grad()
        picks = torch.randint(9, (20,), generator=torch.Generator().manual_seed(step))
        (net(picks) * gaussian(20, 4, seed=step)).sum().backward()
        alone.grad = net.weight.grad[rows].clone()
        opt.step()
        other.step()
        assert torch.equal(net.weight[net.padding_idx], torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(net.weight.detach()[rows], alone.detach(), rtol=0, atol=1e-14)
    assert check(net, opt) == []
    assert constraint_of(net.weight) == UnitNorm(0, padding_idx=net.padding_idx)


@pytest.mark.parametrize("rule", RULES)
def test_a_row_that_is_left_out_trains_as_with_torch(rule):
    """It may have a gradient: where the table is tied to an output layer."""
    weight = nn.Parameter(gaussian(9, 4))
    stock = nn.Parameter(weight.detach().clone())
    mark_unit_norm(weight, padding_idx=3)
    assert torch.equal(weight[3], stock[3])
    opt, theirs = RULES[rule](KINDS[rule], [weight]), RULES[rule](getattr(torch.optim, rule), [stock])
    for step in range(5):
        for p, one in ((weight, opt), (stock, theirs)):
            p.grad = gaussian(9, 4, seed=step)
            one.step()
        assert torch.equal(weight[3], stock[3])
    kept = torch.linalg.vector_norm(weight.detach()[others(3)], dim=1)
    torch.testing.assert_close(kept, torch.ones(8, dtype=torch.float64), rtol=0, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_many_tables_move_together_and_resume_bit_for_bit(rule, dtype):
    def build():
        return nn.ModuleList([table(4, dtype, seed=k) for k in range(5)])

    def run(nets, opt, first):
        for step in range(first, first + 3):
            for k, net in enumerate(nets):
                net.weight.grad = gaussian(9, 4, seed=100 * step + k).to(dtype)
                net.weight.grad[4] = 0
            opt.step()

    nets = build()
    opt = RULES[rule](KINDS[rule], nets.parameters())
    run(nets, opt, 0)
    again = build()
    again.load_state_dict(nets.state_dict())
    resumed = RULES[rule](KINDS[rule], again.parameters())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    run(nets, opt, 3)
    run(again, resumed, 3)
    for net, other in zip(nets, again, strict=True):
        assert torch.equal(net.weight, other.weight)
        assert torch.equal(net.weight[4], torch.zeros(4, dtype=dtype))
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(norms(net)[others(4)], torch.ones(8, dtype=torch.float64), rtol=0, atol=2 * eps)


@pytest.mark.parametrize("make", [nn.Embedding, nn.EmbeddingBag])
def test_the_layers_own_padding_row_is_left_out(make):
    net = nn.Sequential(make(6, 3, padding_idx=0), nn.Linear(3, 3))
    mark_unit_norm(net, "0.weight")
    assert constraint_of(net[0].weight) == UnitNorm(0, padding_idx=0)
    assert constraint_of(mark_unit_norm(make(6, 3), "weight")) == UnitNorm(0)
    columns = make(6, 3, padding_idx=0)
    mark_unit_norm(columns, "weight", dim=1)
    assert constraint_of(columns.weight) == UnitNorm(1)


def test_columns_may_be_left_out_too():
    weight = mark_unit_norm(nn.Parameter(gaussian(4, 6)), dim=1, padding_idx=5)
    lengths = torch.linalg.vector_norm(weight.detach(), dim=0)
    torch.testing.assert_close(lengths[:5], torch.ones(5, dtype=torch.float64))
    assert abs(lengths[5] - 1) > 0.1


@pytest.mark.parametrize("padding_idx", [9, -1, 1.0, True])
def test_an_index_that_is_none_is_refused(padding_idx):
    said = f"padding_idx={padding_idx!r} must be one of several slices, 0 to 8"
    with pytest.raises(ValueError, match=re.escape(said)):
        mark_unit_norm(nn.Parameter(gaussian(9, 4)), padding_idx=padding_idx)


def test_a_row_of_zeros_that_is_not_left_out_is_named():
    x = gaussian(9, 4)
    x[2] = x[7] = 0
    with pytest.raises(ValueError, match=r"slice 7: a slice is zero .*or leave it out with padding_idx"):
        mark_unit_norm(nn.Parameter(x), padding_idx=2)


def test_one_moment_per_row_has_none_for_the_row_left_out():
    with pytest.raises(ValueError, match="second_moment='block' holds none for the rows"):
        Adam(table(0).parameters(), second_moment="block")


def test_what_is_saved_knows_the_row_and_what_was_saved_before_loads():
    net = table(4)
    opt = Adam(net.parameters(), lr=0.1)
    net.weight.grad = gaussian(9, 4)
    opt.step()
    assert held_under(opt, net.weight) == ("unit_norm", 0, 4)
    whole = nn.Embedding(9, 4, dtype=torch.float64)
    mark_unit_norm(whole, "weight")
    with pytest.raises(ValueError, match=r"marked as UnitNorm\(dim=0, padding_idx=4\); here it is UnitNorm\(dim=0\)"):
        Adam(whole.parameters()).load_state_dict(opt.state_dict())
    new = Adam(whole.parameters(), lr=0.1)
    whole.weight.grad = gaussian(9, 4)
    new.step()
    older = copy.deepcopy(new.state_dict())  # of a version that knew no row to leave out
    older["state"][0]["constrained"] = torch.tensor(list(b'["unit_norm", 0]'), dtype=torch.uint8)
    new.load_state_dict(older)
    new.step()
    assert held_under(new, whole.weight) == ("unit_norm", 0, None)


def test_projecting_and_unmarking_leave_the_row_alone():
    net = table(4)
    with torch.no_grad():
        net.weight.mul_(3)
    project_to_manifold_(net)
    torch.testing.assert_close(norms(net)[others(4)], torch.ones(8, dtype=torch.float64))
    assert torch.equal(net.weight[4], torch.zeros(4, dtype=torch.float64))
    assert constraint_of(unmark(copy.deepcopy(net)).weight) is None
