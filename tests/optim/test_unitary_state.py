"""Unitary parameters: their state, faults, checkpoints, and what else is done to them."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.swa_utils import AveragedModel

import manifold_opt
from manifold_opt import (
    RETRACTIONS,
    SGD,
    Adam,
    Orthogonal,
    check,
    constraint_of,
    init,
    mark_orthogonal,
    nearest_orthogonal,
    orthogonal_average,
    orthogonality_error,
    orthogonalize_,
    project_to_manifold_,
    unmark,
)

from ..helpers import UNITARY, UNMOVED, each, gaussian, point
from .test_unitary import RULES, build, give, parameter, run


def net(dtype=torch.complex64, seed=0):
    torch.manual_seed(seed)
    shapes = {"gates": (4, 12), "wide": (7, 3), "part": (3, 9)}
    model = nn.ModuleDict({name: nn.Linear(*shape, bias=False, dtype=dtype) for name, shape in shapes.items()})
    mark_orthogonal(model["gates"], "weight", 3)
    mark_orthogonal(model["wide"], "weight", 1, gain=1.5)
    return model


def train(model, opt, steps, first=0):
    run(list(model.parameters()), opt, steps, first)
    return model


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# Checkpoints.


@each(retraction=RETRACTIONS, rule=RULES, dtype=UNITARY, way=["torch.save", "distributed"])
def test_a_resumed_run_is_the_uninterrupted_one(retraction, rule, dtype, way, tmp_path):
    if way == "distributed" and rule == "SGD":
        pytest.skip("torch misses the state of the free parameter, which has none")
    model, other = net(dtype), net(dtype, seed=1)
    opt, resumed = (build(rule, m.parameters(), retraction=retraction) for m in (model, other))
    train(model, opt, 3)
    if way == "torch.save":
        torch.save([model.state_dict(), opt.state_dict()], tmp_path / "checkpoint.pt")
        values, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        other.load_state_dict(values)
        resumed.load_state_dict(state)
    else:
        set_model_state_dict(other, copy.deepcopy(get_model_state_dict(model)))
        set_optimizer_state_dict(other, resumed, copy.deepcopy(get_optimizer_state_dict(model, opt)))
    assert check(other, resumed) == []
    assert same(train(other, resumed, 4, 3), train(model, opt, 4, 3))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert all(torch.equal(value, resumed.state[q][key]) for key, value in opt.state[p].items())


@pytest.mark.parametrize("shape", ["square", "wide"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_a_checkpoint_changes_its_second_moment(shape, amsgrad):
    """The mean of both parts one way, either part of every entry the other; what is not there is not made up."""
    rows = (8, 4) if shape == "square" else (3, 7)
    blocks = 2 if shape == "square" else 1
    weights = [parameter(rows, blocks) for _ in range(3)]
    element, block, back = (
        Adam([p], lr=0.0, second_moment=kind, amsgrad=amsgrad)
        for p, kind in zip(weights, ("element", "block", "element"), strict=True)
    )
    run(weights[:1], element, 3)
    held = element.state[weights[0]]["exp_avg_sq"]
    zero = torch.zeros_like(weights[0])
    block.load_state_dict(copy.deepcopy(element.state_dict()))
    block.param_groups[0]["second_moment"] = "block"  # the checkpoint's own was loaded too
    weights[1].grad = zero
    block.step()
    mean = 0.999 * (held.real + held.imag).unflatten(0, (blocks, -1)).mean((1, 2), keepdim=True) / 2
    torch.testing.assert_close(block.state[weights[1]]["exp_avg_sq"], mean)
    assert mean.dtype == torch.float64
    back.load_state_dict(copy.deepcopy(block.state_dict()))
    back.param_groups[0]["second_moment"] = "element"
    weights[2].grad = zero
    back.step()
    both = 0.999 * mean.expand(blocks, rows[0] // blocks, rows[1]).flatten(0, 1)
    torch.testing.assert_close(back.state[weights[2]]["exp_avg_sq"], torch.complex(both, both))
    for opt, p in ((block, weights[1]), (back, weights[2])):
        opt.param_groups[0]["lr"] = 0.01
        run([p], opt, 2, 5)
        assert orthogonality_error(p) < 1e-13
        assert bool(p.isfinite().all())


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("second_moment", ["element", "block"])
def test_a_checkpoint_of_torch_enters_the_frame_and_leaves_it(name, second_moment):
    options = {"momentum": 0.9} if name == "SGD" else {}
    key = "momentum_buffer" if name == "SGD" else "exp_avg"
    stock = nn.Parameter(point(4, 4, dtype=torch.complex128))
    theirs = getattr(torch.optim, name)([stock], lr=0.0, **options)
    give([stock], 0)
    theirs.step()
    weight = mark_orthogonal(nn.Parameter(stock.detach().clone()))
    own = {} if name == "SGD" else {"second_moment": second_moment}
    ours = getattr(manifold_opt, name)([weight], lr=0.0, **options, **own)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    weight.grad = torch.zeros_like(weight)
    ours.step()
    moment = theirs.state[stock][key]
    torch.testing.assert_close(ours.state[weight][key], 0.9 * moment @ weight.detach().mH)
    unmark(weight)
    ours.step()
    torch.testing.assert_close(ours.state[weight][key], 0.81 * moment)
    for k in range(3):
        ours.param_groups[0]["lr"] = 0.01
        give([weight], k)
        ours.step()
    assert bool(weight.isfinite().all())


@pytest.mark.parametrize("rule", RULES)
def test_into_another_dtype_and_back(rule):
    model, other = net(torch.complex64), net(torch.complex128, seed=1)
    del model["part"], other["part"]  # torch itself leaves moments of complex parameters in the dtype they come in
    opt, resumed = build(rule, model.parameters()), build(rule, other.parameters())
    train(model, opt, 3)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(other, resumed, 2, 3)
    assert max(orthogonality_error(other).values()) < 1e-13
    assert check(other, resumed) == []
    for p, q in zip(train(model, opt, 2, 3).parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(q.detach().to(torch.complex64), p.detach(), rtol=0, atol=1e-4)


# Faults.

FAULTS = [complex("nan"), complex(0, float("nan")), complex(0, float("inf")), 1e200 + 1e200j]


@each({"shape, fault": itertools.product([(15, 5), (9, 4)], FAULTS)}, rule=RULES)
def test_a_poisoned_block_stays_and_its_neighbours_do_not_notice(rule, shape, fault):
    runs = []
    for spoilt in (False, True):
        weight = parameter(shape, 3)
        opt = build(rule, [weight])
        run([weight], opt, 2)
        give([weight], 2)
        if spoilt:
            weight.grad[shape[0] // 3, 1] = fault
            before = weight.detach().clone()
            held = {key: value.clone() for key, value in opt.state[weight].items()}
        opt.step()
        runs.append((weight.detach(), opt))
    (sound, _), (spoilt, opt) = runs
    rows = shape[0] // 3
    middle = slice(rows, 2 * rows)
    assert torch.equal(sound[:rows], spoilt[:rows])
    assert torch.equal(sound[2 * rows :], spoilt[2 * rows :])
    assert torch.equal(spoilt[middle], before[middle])
    assert opt.metrics()["skipped_blocks"] == 1
    for key, value in opt.state[weight].items():
        if key not in UNMOVED:
            kept = middle if len(value) == len(weight) else 1
            assert torch.equal(value[kept], held[key][kept])


@pytest.mark.parametrize("rule", RULES)
def test_a_fault_can_be_made_an_error_that_changes_nothing(rule):
    weight = parameter((9, 3), 3)
    opt = build(rule, [weight], nonfinite="raise")
    run([weight], opt, 2)
    before, state = weight.detach().clone(), copy.deepcopy(opt.state_dict()["state"])
    give([weight], 2)
    weight.grad[4, 1] = complex(0, float("nan"))
    with pytest.raises(FloatingPointError, match="block 1 "):
        opt.step()
    assert torch.equal(weight, before)
    assert all(torch.equal(value, state[0][key]) for key, value in opt.state[weight].items())


@each(retraction=RETRACTIONS, rule=RULES, dtype=UNITARY)
def test_a_zero_update_keeps_every_bit(retraction, rule, dtype):
    weights = [
        parameter((12, 4), 3, dtype=dtype, gain=1.3),
        parameter((3, 7), dtype=dtype),
        parameter((7, 3), dtype=dtype),
    ]
    before = [p.detach().clone() for p in weights]
    for options, zero in (({}, True), ({"lr": 0.0}, False)):
        opt = build(rule, weights, retraction=retraction, **options)
        for step in range(2):
            give(weights, step)
            for p in weights:
                p.grad = p.grad * 0 if zero else p.grad
            opt.step()
        assert all(torch.equal(p, b) for p, b in zip(weights, before, strict=True))


@pytest.mark.parametrize("rule", ["momentum", "Adam", "AdamW"])
def test_a_gradient_scaler(rule):
    """Its scale is divided out, and after an overflow all is as it was."""
    weight, other = parameter((6, 3), 2), parameter((6, 3), 2)
    opt, plain = build(rule, [weight]), build(rule, [other])
    for step in range(4):
        give([other], step)
        opt.grad_scale, opt.found_inf = torch.tensor(8.0), torch.tensor(float(step == 2))
        weight.grad = 8 * other.grad
        opt.step()
        if step != 2:
            plain.step()
    assert torch.equal(weight, other)


# What else is done to them.


def test_diagnostics_by_hand():
    x = torch.tensor([[1, 1j], [1j, 1]], dtype=torch.complex64) / 2**0.5
    assert orthogonality_error(x) < 1e-7
    assert orthogonality_error(torch.tensor([[2j]])) == 3
    torch.testing.assert_close(nearest_orthogonal(torch.tensor([[3 + 4j]])), torch.tensor([[0.6 + 0.8j]]))
    weight = mark_orthogonal(nn.Parameter(3j * x), gain=2.0)
    torch.testing.assert_close(weight.detach(), 2j * x)
    near = mark_orthogonal(nn.Parameter(x.clone()))
    with torch.no_grad():
        near.mul_(1.01)
    assert orthogonality_error(orthogonalize_(near, steps=3)) < 1e-6


@pytest.mark.parametrize("dtype", UNITARY)
def test_a_model_is_initialized_checked_projected_averaged_and_copied(dtype):
    model = net(dtype)
    opt = Adam(model.parameters(), lr=0.01, second_moment="block")
    train(model, opt, 2)
    assert check(model, opt) == []
    copied, other = copy.deepcopy((model, opt))
    assert constraint_of(copied["wide"].weight) == Orthogonal(1, gain=1.5)
    assert same(train(copied, other, 3, 2), train(model, opt, 3, 2))
    averaged = AveragedModel(model, avg_fn=orthogonal_average(model, 0.5))
    for k in range(2):
        averaged.update_parameters(train(model, opt, 2, 5 + 2 * k))
    assert max(orthogonality_error(averaged).values()) < 1e-5
    free = model["part"].weight.detach().clone()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1 + 0.2j)
    assert len(check(model, opt)) == 2
    project_to_manifold_(model)
    assert check(model, opt) == []
    assert torch.equal(model["part"].weight, free * (1.1 + 0.2j))
    init.orthogonal_(model["gates"].weight, generator=torch.Generator().manual_seed(0))
    assert check(model, opt) == []
    assert model["gates"].weight.detach().imag.abs().max() > 0.1
    with torch.no_grad():
        model["wide"].weight[0, 0] = complex(0, float("nan"))
    assert any("not finite" in problem for problem in check(model, opt))


@pytest.mark.filterwarnings("ignore:A block of shape")
@pytest.mark.parametrize("rule", RULES)
def test_a_value_from_outside_is_put_back(rule):
    weight = parameter((8, 4), 2)
    opt = build(rule, [weight])
    run([weight], opt, 2)
    with torch.no_grad():
        weight[:4] = 3 * gaussian(4, 4, dtype=torch.complex128, seed=9)
    expected, other = nearest_orthogonal(weight.detach()[:4]), weight.detach()[4:].clone()
    for key in ("momentum_buffer", "exp_avg"):
        if key in opt.state[weight]:
            opt.state[weight][key].zero_()
    weight.grad = torch.zeros_like(weight)
    opt.step()
    torch.testing.assert_close(weight.detach()[:4], expected, rtol=0, atol=1e-13)
    assert torch.equal(weight.detach()[4:], other)


def test_spheres_refuse_and_rows_of_unit_norm_take_complex_numbers():
    with pytest.raises(ValueError, match=r"complex64; Positive is for real parameters"):
        manifold_opt.mark_positive(nn.Parameter(torch.ones(3, dtype=torch.complex64)))
    weight = manifold_opt.mark_unit_norm(nn.Parameter(gaussian(3, 4, dtype=torch.complex64)))
    opt = SGD([weight], lr=0.1, momentum=0.9)
    run([weight], opt, 3)
    torch.testing.assert_close(torch.linalg.vector_norm(weight.detach(), dim=1), torch.ones(3))
