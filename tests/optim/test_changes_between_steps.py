"""What happens between two steps, behind the back of the optimizer: the next one works on what is there now."""

import copy
import weakref

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, mark_orthogonal, mark_spectral, mark_unit_norm, orthogonality_error, unmark
from manifold_opt.linalg import matrices
from manifold_opt.stiefel import geometry

from ..helpers import each, gaussian, never_read, pairs, point

RULES = {
    "momentum": lambda p, **o: SGD(p, **{"lr": 0.05, "momentum": 0.9, **o}),
    "adam": lambda p, **o: Adam(p, **{"lr": 0.05, **o}),
    "adam block": lambda p, **o: Adam(p, **{"lr": 0.05, "second_moment": "block", **o}),
}


def marked():
    """A large weight, which is viewed; small ones, which are gathered; parts of some; and another manifold."""
    large = nn.Parameter(torch.cat([point(160, 160, dtype=torch.float32, seed=k) for k in range(2)]))
    small = [nn.Parameter(point(6, 6, dtype=torch.float32, seed=k)) for k in range(3)]
    parts = [nn.Parameter(gaussian(9, 4, dtype=torch.float32, seed=k)) for k in range(2)]
    mark_orthogonal(large, blocks=2)
    for p in small:
        mark_orthogonal(p)
    for p in parts:
        mark_orthogonal(p, blocks=(2, 7))
    return [large, *small, *parts, mark_unit_norm(nn.Parameter(gaussian(5, 4, dtype=torch.float32)))]


def give(parameters, step):
    for k, p in enumerate(parameters):
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=100 * step + k)


# State that is moved or replaced by hand, as loops do that offload it.


def by_data(opt):
    for state in opt.state.values():
        for value in state.values():
            value.data = value.data.clone()


def by_entry(opt):
    for state in opt.state.values():
        for key, value in state.items():
            state[key] = value.clone()


def by_set(opt):
    for state in opt.state.values():
        for value in state.values():
            value.set_(value.clone())


def by_dictionary(opt):
    for p, state in list(opt.state.items()):
        opt.state[p] = {key: value.clone() for key, value in state.items()}


def to_float64_and_back(opt):
    for state in opt.state.values():
        for value in state.values():
            value.data = value.data.double()
    for state in opt.state.values():
        for value in state.values():
            value.data = value.data.float()


def one_entry_only(opt):
    for state in opt.state.values():
        for key in ("exp_avg_sq", "momentum_buffer"):
            if key in state:
                state[key].data = state[key].data.clone()


@each(rule=RULES, move=[by_data, by_entry, by_set, by_dictionary, to_float64_and_back, one_entry_only])
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_state_that_is_moved_by_hand_is_what_goes_on(rule, move):
    parameters, others = marked(), marked()
    opt, untouched = RULES[rule](parameters), RULES[rule](others)
    for step in range(6):
        if step == 3:
            with torch.no_grad():
                move(opt)
        give(parameters, step)
        give(others, step)
        opt.step()
        untouched.step()
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
    saved, expected = (one.state_dict()["state"] for one in (opt, untouched))
    for k, state in expected.items():
        for key, value in state.items():
            assert torch.equal(saved[k][key], value), key
    assert all(float(state["step"]) == 6 for state in saved.values() if "step" in state)


def test_a_step_count_that_is_written_to_is_what_goes_on():
    """As code does that resets the bias correction after a warm restart."""
    parameters, others = marked(), marked()
    opt, again = Adam(parameters, lr=0.05), Adam(others, lr=0.05)
    for one, some in ((opt, parameters), (again, others)):
        for step in range(3):
            give(some, step)
            one.step()
    for p in parameters:
        opt.state[p]["step"].zero_()
    state = copy.deepcopy(again.state_dict())
    for entries in state["state"].values():
        entries["step"].zero_()
    again.load_state_dict(state)
    for one, some in ((opt, parameters), (again, others)):
        give(some, 3)
        one.step()
    for p, q in zip(parameters, others, strict=True):
        assert torch.equal(p, q)
        assert float(opt.state[p]["step"]) == 1


def test_members_whose_counts_differ_take_the_steps_that_each_would_take_alone():
    together, alone = ([mark_orthogonal(nn.Parameter(point(6, 6, seed=k))) for k in range(4)] for _ in range(2))
    opt, singles = Adam(together, lr=0.05), [Adam([p], lr=0.05) for p in alone]
    for step in range(9):
        give(together, step)
        give(alone, step)
        for k in range(step % 4):
            together[k].grad = alone[k].grad = None
        for one in (opt, *singles):
            one.step()
    assert len({float(opt.state[p]["step"]) for p in together}) > 1
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-13)


# Marks that are made after the step has been compiled.


def trained(compiled, change, rule):
    torch._dynamo.reset()
    weights = [mark_orthogonal(nn.Parameter(point(6, 6, dtype=torch.float32))), nn.Parameter(0.3 * torch.eye(6))]
    weights.append(mark_spectral(nn.Parameter(0.5 * torch.eye(6)), 1.0))
    opt = RULES[rule](weights)
    step_of = torch.compile(opt.step, backend="eager") if compiled else opt.step
    for step in range(6):
        if step == 3:
            change(weights)
        give(weights, step)
        step_of()
    return weights


def mark_another(weights):
    mark_orthogonal(weights[1])


def unmark_one(weights):
    unmark(weights[0])


def set_another_bound(weights):
    mark_spectral(unmark(weights[2]), 0.25)


@pytest.mark.compiled
@each(rule=RULES, change=[mark_another, unmark_one, set_another_bound])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_follows_marks_that_are_changed_later(rule, change):
    """It is compiled anew."""
    expected, now = trained(False, change, rule), trained(True, change, rule)
    for p, q in zip(now, expected, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=0, atol=1e-5)
    assert (orthogonality_error(now[1]) < 1e-5) == (change is mark_another)
    assert (float(geometry.error(now[0].detach())) < 1e-5) == (change is not unmark_one)
    assert (float(torch.linalg.matrix_norm(now[2], 2)) < 0.2501) == (change is set_another_bound)


# Values that are written through ``.data``, of which nobody is told.


@pairs(
    rule=RULES,
    shape=[(6, 6), (4, 9), (9, 4)],
    factor=[40.0, 1e4, 0.01],
    retraction=["orthographic", "polar", "qr", "cayley", "exp"],
)
def test_a_value_that_is_scaled_through_data_is_back_within_ten_steps(rule, shape, factor, retraction):
    weight = mark_orthogonal(nn.Parameter(point(*shape, dtype=torch.float32)))
    opt = RULES[rule]([weight], lr=1e-4, retraction=retraction)
    for step in range(12):
        if step == 2:
            weight.data *= factor
        give([weight], step)
        opt.step()
    assert orthogonality_error(weight) <= matrices.error_at_rounding(*shape, torch.float32)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("retraction", "columns"),
    [*((name, 6) for name in ("orthographic", "polar", "qr", "cayley", "exp")), ("orthographic", 9), ("polar", 9)],
)
def test_where_nothing_can_be_read_such_a_value_stays_finite(rule, retraction, columns, monkeypatch):
    """It is not put back, but counted, and the blocks beside it go on."""
    never_read(monkeypatch)
    blocks = [point(6, columns, dtype=torch.float32, seed=k) for k in range(2)]
    weight = mark_orthogonal(nn.Parameter(torch.cat(blocks)), blocks=2)
    opt = RULES[rule]([weight], lr=1e-4, retraction=retraction)
    for step in range(12):
        if step == 2:
            weight.data[:6] *= 40
            before = weight.detach().clone()
        give([weight], step)
        opt.step()
    assert torch.equal(weight[:6], before[:6])
    assert not torch.equal(weight[6:], before[6:])
    assert float(geometry.error(weight.detach()[6:])) <= matrices.error_at_rounding(6, columns, torch.float32)
    assert opt.metrics()["skipped_blocks"] == 10


# Long blocks with few columns.


@pairs({"n, p": [(30_000, 2), (300_000, 1), (100_000, 4), (20_000, 64)]}, tall=[True, False], lr=[1e-3, 1e-2])
def test_long_blocks_stay_at_rounding(n, p, tall, lr):
    """Sums of so many terms in float32 would leave thirty times that."""
    weight = gaussian(n, p, dtype=torch.float32)
    weight = mark_orthogonal(nn.Parameter(weight if tall else weight.mT.contiguous()))
    opt = Adam([weight], lr=lr)
    for step in range(4):
        give([weight], step)
        opt.step()
        assert orthogonality_error(weight) <= 4 * torch.finfo(torch.float32).eps * p**0.5


# Groups and options, changed by hand or by a schedule.


def eye(*, step=0):
    weight = mark_orthogonal(nn.Parameter(torch.eye(4)))
    give([weight], step)
    return weight


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_follows_the_rate_of_every_group():
    """Groups with equal options share a batch, but not in a graph that depends on the options of the first only."""
    torch._dynamo.reset()
    weights = [eye() for _ in range(3)]
    opt = SGD([{"params": weights[:1]}, {"params": weights[1:]}], lr=0.01)
    step = torch.compile(opt.step, backend="eager")
    lengths = []
    for rate, all_of_them in ((0.01, True), (0.03, True), (0.01, False), (0.03, False)):
        opt.param_groups[1]["lr"] = rate
        for weight in weights:
            weight.grad = gaussian(4, 4, dtype=torch.float32)
        if not all_of_them:
            weights[2].grad = None
        before = weights[1].detach().clone()
        step()
        lengths.append(float((weights[1] - before).norm()))
    assert 2.9 < lengths[1] / lengths[0] < 3.1
    assert 2.9 < lengths[3] / lengths[2] < 3.1


@pytest.mark.parametrize("marks", [0, 1])
def test_a_group_that_is_replaced_by_a_copy_is_what_counts(marks):
    free = nn.Parameter(torch.ones(3))
    parameters = [free, *(eye() for _ in range(marks))]
    free.grad = torch.ones(3)
    opt = SGD(parameters, lr=0.1)
    opt.step()
    opt.param_groups[0] = {**opt.param_groups[0], "lr": 0.0}
    before = [p.detach().clone() for p in parameters]
    opt.step()
    assert all(map(torch.equal, parameters, before))


def test_options_that_become_different_part_the_groups():
    """A list that is written to, and a tensor that is replaced and then written to."""
    first, second = eye(), eye()
    opt = Adam([{"params": [first], "betas": [0.9, 0.999]}, {"params": [second], "betas": [0.9, 0.999]}], lr=0.1)
    opt.step()
    opt.param_groups[1]["betas"][0] = 0.0
    give([first, second], 1)
    before = second.detach().clone()
    opt.step()
    fresh = second.grad @ before.mT  # beta1 is zero: the first moment is the last gradient, in the frame
    torch.testing.assert_close(opt.state[second]["exp_avg"], fresh)
    first, second, rate = eye(), eye(), torch.tensor(0.1)
    opt = SGD([{"params": [first], "lr": rate}, {"params": [second], "lr": rate}])
    opt.step()
    opt.param_groups[1]["lr"] = rate.clone()
    opt.step()
    opt.param_groups[1]["lr"].fill_(0.0)
    before = second.detach().clone()
    opt.step()
    assert torch.equal(second, before)


def test_an_option_that_a_group_lacks_or_that_has_no_hash_is_no_matter():
    weight = eye()
    opt = SGD([weight], lr=0.1)
    opt.defaults["of another library"] = []
    opt.step()
    opt.add_param_group({"params": [eye(step=1)], "of another library": [1]})
    opt.step()
    assert orthogonality_error(weight) < 1e-6


def test_a_message_names_the_parameter_of_a_later_group():
    first, second = eye(), eye()
    opt = SGD([{"params": [("first", first)]}, {"params": [("second", second)]}], lr=0.1)
    if "param_names" not in opt.param_groups[0]:
        pytest.skip("torch has no names yet")
    opt.step()
    with torch.no_grad():
        second.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"\(second\) has been written to"):
        opt.step()


def test_a_mark_that_is_swapped_in_is_seen():
    free, weight = nn.Parameter(torch.eye(4)), eye()
    give([free], 1)
    opt = SGD([free], lr=0.1)
    opt.step()
    free.grad = None
    torch.utils.swap_tensors(free, weight)
    for step in range(2):
        give([free], step)
        opt.step()
    assert orthogonality_error(free) < 1e-6


def test_a_group_without_marks_that_is_removed_is_freed_at_once():
    weight, free = eye(), nn.Parameter(torch.ones(3))
    free.grad = torch.ones(3)
    opt = SGD([{"params": [weight]}, {"params": [free]}], lr=0.1)
    opt.step()
    opt.step()
    alive = weakref.ref(free)
    opt.param_groups.pop(1)
    opt.state.pop(free, None)
    del free
    assert alive() is None


def test_a_step_in_inference_mode():
    weight = eye()
    opt = SGD([weight], lr=0.1)
    with torch.inference_mode():
        opt.step()
        opt.step()
    assert orthogonality_error(weight) < 1e-6


@pytest.mark.parametrize("retraction", ["orthographic", "polar", "qr", "cayley", "exp"])
def test_a_step_whose_squares_overflow_is_shortened(retraction):
    weight = mark_orthogonal(nn.Parameter(point(4, 4, dtype=torch.float32)))
    opt = SGD([weight], lr=1e4, retraction=retraction)
    weight.grad = 1e16 * gaussian(4, 4, dtype=torch.float32)
    before = weight.detach().clone()
    opt.step()
    assert not torch.equal(weight, before)
    assert orthogonality_error(weight) < 1e-6
    assert opt.metrics()["clamped_steps"] == 1
    assert opt.metrics()["skipped_blocks"] == 0
