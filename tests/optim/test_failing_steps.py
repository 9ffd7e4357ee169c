"""Steps that raise, and what is left of them: nothing. And faults that are told from what is none."""

import copy

import pytest
import torch
from torch import nn

import manifold_opt
from manifold_opt import RETRACTIONS, SGD, Adam, mark_orthogonal, unmark
from manifold_opt.optim.engine import counters as tally
from manifold_opt.optim.engine import plan
from manifold_opt.optim.options import MAX_GRAD_NORM

from ..helpers import each, gaussian, never_read, point
from .test_faults import RULES, assert_unchanged, everything, give, net


@pytest.mark.parametrize("rule", RULES)
def test_an_error_of_a_lone_group_changes_nothing(rule):
    (group, _) = net()
    opt = RULES[rule](group, nonfinite="raise")
    give([group], 5)
    group[0].grad[7, 1] = float("nan")
    before = everything(opt)
    with pytest.raises(FloatingPointError, match="block 1 "):
        opt.step()
    assert_unchanged(opt, before)


def test_faults_are_errors_in_the_groups_that_ask_for_it_only():
    groups = net()
    opt = Adam([{"params": groups[0], "nonfinite": "raise"}, {"params": groups[1]}])
    give(groups, 5)
    groups[1][0].grad[0, 0] = float("nan")
    opt.step()
    assert opt.metrics()["skipped_blocks"] == 1


def test_blocks_that_are_too_long_only_together_are_no_fault():
    (group, _) = net()
    opt = Adam(group, nonfinite="raise")
    give([group], 5)
    g = group[0].grad.view(3, 5, 5)
    g.mul_(0.9 * MAX_GRAD_NORM[g.dtype] / torch.linalg.matrix_norm(g)[:, None, None])
    opt.step()
    assert opt.metrics()["skipped_blocks"] == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("rule", RULES)
def test_an_interrupt_while_getting_ready_changes_nothing(rule, error, monkeypatch):
    groups = net()
    opt = RULES[rule]([{"params": group} for group in groups])
    give(groups, 0)
    before = everything(opt)

    def interrupted(_, group, *__):
        if group is opt.param_groups[1]:
            raise error

    monkeypatch.setattr(plan, "convert_state", interrupted)
    with pytest.raises(error):
        opt.step()
    assert_unchanged(opt, before)


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.filterwarnings("ignore:Sparse invariant")
def test_a_checkpoint_of_torchs_own_is_as_loaded_after_a_step_that_raised(name, monkeypatch):
    """Not left in the frame of the first group's weights, under a record that says otherwise."""
    options = {"lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    groups, others = net(), net()
    for p in (others[0][0], others[1][0]):
        unmark(p)
    stock = getattr(torch.optim, name)([{"params": group} for group in others], **options)
    give(others, 0)
    stock.step()
    opt = getattr(manifold_opt, name)([{"params": group} for group in groups], **options)
    opt.load_state_dict(copy.deepcopy(stock.state_dict()))
    give(groups, 1)
    before = everything(opt)

    def fails(optimizer, group, bucket, *rest):
        if any(p is groups[1][0] for p in bucket.parameters):
            raise RuntimeError("out of memory")
        return held(optimizer, group, bucket, *rest)

    held = plan.init_state
    monkeypatch.setattr(plan, "init_state", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        opt.step()
    monkeypatch.undo()
    assert_unchanged(opt, before)
    fresh_groups = copy.deepcopy(groups)
    fresh = getattr(manifold_opt, name)([{"params": group} for group in fresh_groups], **options)
    fresh.load_state_dict(copy.deepcopy(stock.state_dict()))
    give(fresh_groups, 1)
    opt.step()
    fresh.step()
    for mine, other in zip(groups[0] + groups[1], fresh_groups[0] + fresh_groups[1], strict=True):
        assert torch.equal(mine, other)


def test_every_marked_parameter_of_a_checkpoint_is_compared():
    def made(blocks):
        last = nn.Parameter(torch.cat([point(4, 4, seed=k) for k in range(3)]))
        return [[mark_orthogonal(nn.Parameter(point(4, 4))), last2 := mark_orthogonal(last, blocks=blocks)]], last2

    for apart in (False, True):
        (first,), _ = made(3)
        (second,), _ = made(1)
        split = (lambda ps: [{"params": [p]} for p in ps]) if apart else (lambda ps: ps)
        opt, other = Adam(split(first)), Adam(split(second))
        for p in first:
            p.grad = torch.ones_like(p)
        opt.step()
        with pytest.raises(ValueError, match=r"blocks=3.*blocks=1"):
            other.load_state_dict(opt.state_dict())


def test_state_replaced_by_hand_is_kept_where_the_gradient_has_gone():
    weights = [mark_orthogonal(nn.Parameter(point(4, 4, seed=k))) for k in range(3)]
    opt = Adam(weights, lr=0.01)
    for p in weights:
        p.grad = gaussian(4, 4)
    opt.step()
    opt.state[weights[1]] = {}
    weights[1].grad = None
    opt.step()
    assert opt.state[weights[1]] == {}


@pytest.mark.parametrize("rule", RULES)
def test_a_fused_scaler_skips_where_nothing_can_be_read(rule, monkeypatch):
    never_read(monkeypatch)
    (group, _) = net()
    weight = group[0]
    opt = RULES[rule]([weight])
    for overflow in (0.0, 1.0):
        weight.grad = gaussian(15, 5, dtype=torch.float32, seed=int(overflow))
        before = everything(opt)
        opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(overflow)
        opt.step()
    assert_unchanged(opt, before)


def test_a_result_that_cannot_be_right_is_counted():
    weight = mark_orthogonal(nn.Parameter(point(4, 4)))
    opt = SGD([weight], lr=0.01, momentum=0.9)
    for step in range(2):
        weight.grad = gaussian(4, 4, seed=step)
        before = weight.detach().clone()
        opt.step()
        opt.state[weight]["momentum_buffer"].fill_(float("nan"))
    assert torch.equal(weight, before)
    assert opt.metrics()["skipped_blocks"] == 1


def test_counts_outlive_checkpoints_and_errors():
    (group, _) = net()
    opt = SGD(group, lr=0.01)
    give([group], 0)
    group[0].grad[0, 0] = float("nan")
    opt.step()
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert opt.metrics()["skipped_blocks"] == 1


def test_counts_of_a_device_are_kept_apart_and_kept(monkeypatch):
    never_read(monkeypatch)
    counts = tally.Counters()
    device = torch.device("cpu")
    counts.prepare(device)
    counts.count(skipped=torch.tensor([True, False, True]))
    counts.prepare(device)  # another plan
    counts.count(clamped=torch.tensor([True]))
    assert (counts.total("skipped_blocks"), counts.total("clamped_steps")) == (2, 1)


@pytest.mark.filterwarnings("ignore:A block of shape")
def test_parameters_of_one_bucket_are_each_put_back_to_their_own_nearest_point():
    weights = [mark_orthogonal(nn.Parameter(point(8, 4, seed=k)), blocks=2) for k in range(3)]
    opt = SGD(weights, lr=0.0)
    expected = []
    for k, p in enumerate(weights):
        p.grad = gaussian(8, 4, seed=k)
        with torch.no_grad():
            p.copy_(gaussian(8, 4, seed=10 + k))
            p[4 * (k % 2) : 4 * (k % 2) + 4] = point(4, 4, seed=k)
        expected.append(torch.cat([manifold_opt.nearest_orthogonal(block) for block in p.detach().chunk(2)]))
    opt.step()
    for p, value in zip(weights, expected, strict=True):
        torch.testing.assert_close(p.detach(), value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("fault", [float("inf"), 1e30, 2.0])
def test_what_a_step_would_skip_is_what_is_raised(fault):
    """2.0: twice the largest gradient that a step takes, all of whose squares are finite still."""
    (group, _) = net()
    opt = Adam(group, nonfinite="raise")
    give([group], 5)
    group[0].grad[12, 1] = fault if fault != 2.0 else 2 * MAX_GRAD_NORM[torch.float32]
    before = everything(opt)
    with pytest.raises(FloatingPointError, match="block 2 "):
        opt.step()
    assert_unchanged(opt, before)


def test_a_fault_in_a_gradient_of_another_memory_format_is_raised_as_one():
    weight = mark_orthogonal(nn.Parameter(point(8, 36, dtype=torch.float32).view(8, 4, 3, 3)))
    opt = Adam([weight], nonfinite="raise")
    weight.grad = torch.full_like(weight, float("nan")).contiguous(memory_format=torch.channels_last)
    with pytest.raises(FloatingPointError, match="block 0 "):
        opt.step()


def test_a_refused_checkpoint_names_the_parameter():
    def named(blocks):
        weight = mark_orthogonal(nn.Parameter(torch.cat([point(4, 4, seed=k) for k in range(3)])), blocks=blocks)
        weight.grad = torch.ones_like(weight)
        return Adam([("rnn.weight_hh_l0", weight)])

    opt, other = named(3), named(1)
    if "param_names" not in opt.param_groups[0]:
        pytest.skip("torch has no names yet")
    opt.step()
    with pytest.raises(ValueError, match=r"group 0 \(rnn.weight_hh_l0\), shape"):
        other.load_state_dict(opt.state_dict())


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.filterwarnings("ignore:A block of shape")
def test_moments_enter_the_frame_of_the_point_that_a_weight_is_put_back_to(name):
    """A model loaded after it was marked, five times too long, and with it torch's own optimizer state."""
    options = {"lr": 0.01, **({"momentum": 0.9} if name == "SGD" else {})}
    stock = nn.Parameter(5 * point(4, 4))
    theirs = getattr(torch.optim, name)([stock], **options)
    stock.grad = gaussian(4, 4)
    theirs.step()
    lengths = []
    for loaded_first in (True, False):
        weight = nn.Parameter(torch.eye(4, dtype=torch.float64))
        if loaded_first:
            weight.data.copy_(stock.data)
        mark_orthogonal(weight)
        with torch.no_grad():
            _ = weight if loaded_first else weight.copy_(stock)
        opt = getattr(manifold_opt, name)([weight], **options)
        opt.load_state_dict(copy.deepcopy(theirs.state_dict()))
        weight.grad = gaussian(4, 4, seed=2)
        opt.step()
        lengths.append(opt.state[weight]["exp_avg" if name == "Adam" else "momentum_buffer"].norm())
    torch.testing.assert_close(*lengths)


@each(retraction=RETRACTIONS, shape=[(3, 7), (6, 6)], rule=RULES)
def test_a_long_gradient_beside_it_changes_roundings_only(retraction, shape, rule):
    """Long enough for its direction to be projected once more, at rates on both sides of where that begins.

    The polynomial of a batch has the degree that its longest short step needs, so bits may differ.
    """
    for exponent in range(-6, 1):
        ends = []
        for scale in (1.0, 1e4):
            weights = [mark_orthogonal(nn.Parameter(point(*shape, dtype=torch.float32, seed=k))) for k in range(2)]
            opt = RULES[rule](weights, lr=10.0**exponent, retraction=retraction)
            for step in range(2):
                for k, p in enumerate(weights):
                    p.grad = gaussian(*shape, dtype=torch.float32, seed=10 * step + k) * (scale if k else 1)
                opt.step()
            ends.append(weights[0].detach())
        torch.testing.assert_close(*ends, rtol=0, atol=16 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("rule", RULES)
def test_a_scaler_that_skips_the_first_step_of_all(rule, monkeypatch):
    """Where the host may not look, steps are counted nevertheless, and none is none to divide by."""
    never_read(monkeypatch)
    weight = net()[0][0]
    opt = RULES[rule]([weight])
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, float("inf"))
    opt.grad_scale, opt.found_inf = torch.tensor(2.0**16), torch.tensor(1.0)
    opt.step()
    assert torch.equal(weight, before)
    weight.grad, opt.found_inf = gaussian(15, 5, dtype=torch.float32), torch.tensor(0.0)
    opt.step()
    assert bool(weight.isfinite().all())
    assert not torch.equal(weight, before)


def test_what_a_scaler_has_seen_is_no_fault():
    """An overflow is its to skip, and gradients are to be judged without their scale."""
    weight = net()[0][0]
    opt = Adam([weight], nonfinite="raise")
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, float("inf"))
    opt.grad_scale, opt.found_inf = torch.tensor(2.0**16), torch.tensor(1.0)
    opt.step()
    assert torch.equal(weight, before)
    opt.grad_scale, opt.found_inf = torch.tensor(1e15), torch.tensor(0.0)
    weight.grad = 1e18 * gaussian(15, 5, dtype=torch.float32)
    opt.step()
    assert opt.metrics()["skipped_blocks"] == 0


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy])
def test_an_optimizer_is_copied_whatever_has_been_marked_since(rule, copied):
    groups = net()
    opt = RULES[rule]([{"params": group} for group in groups])
    give(groups, 0)
    opt.step()
    unmark(groups[0][0])
    other = copied(opt)
    give([group["params"] for group in other.param_groups], 1)
    other.step()


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("what", ["weight", "gradient", "both"])
def test_another_shape_changes_nothing(rule, what):
    groups = net()
    opt = RULES[rule]([{"params": group} for group in groups])
    for step in range(2):
        give(groups, step)
        opt.step()
    give(groups, 2)
    stack = groups[0][0]
    if what != "gradient":
        stack.data = torch.eye(6)
    if what != "weight":
        stack.grad.data = torch.ones(6, 6)
    before = everything(opt)
    if what == "both" and rule == "SGD":  # without moments there is nothing of the old shape
        opt.step()
        assert not torch.equal(stack, torch.eye(6))
        return
    with pytest.raises((RuntimeError, ValueError), match="shape"):
        opt.step()
    assert_unchanged(opt, before)


def test_a_warning_made_an_error_comes_before_anything_is_written():
    weights = [mark_orthogonal(nn.Parameter(point(40, 40, seed=k))) for k in range(2)]
    opt = SGD(weights, lr=0.1)
    with torch.no_grad():
        for p in weights:
            p.mul_(2)
            p.grad = torch.zeros_like(p)
    before = everything(opt)
    with pytest.raises(UserWarning, match="away from its manifold"):
        opt.step()
    assert_unchanged(opt, before)
