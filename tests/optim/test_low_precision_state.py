"""Parameters in bfloat16 and float16: checkpoints, values written from outside, conversions, settings around a step."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import manifold_opt
from manifold_opt import (
    RETRACTIONS,
    SGD,
    Adam,
    check,
    init,
    mark_orthogonal,
    mark_unit_norm,
    nearest_orthogonal,
    orthogonality_error,
    unmark,
)

from ..helpers import UNMOVED, each, gaussian, pairs, point

LOW = [torch.bfloat16, torch.float16]
RULES = {
    "SGD": lambda p, **o: SGD(p, lr=0.05, momentum=0.9, dampening=0.5, **o),
    "Adam": lambda p, **o: Adam(p, lr=0.01, **o),
    "Adam block": lambda p, **o: Adam(p, lr=0.01, second_moment="block", amsgrad=True, **o),
    "AdamW": lambda p, **o: manifold_opt.AdamW(p, lr=0.01, **o),
}


def net(dtype=torch.bfloat16, seed=0):
    """Three gates, uneven blocks with a gain, filters, rows of norm one; no bias: torch's Adam divides 0 by 0 there.

    In float16, where an eps of 1e-8 is none.
    """
    torch.manual_seed(seed)
    shapes = {"gates": (8, 24), "uneven": (5, 14), "unit": (6, 4)}
    layers = {name: nn.Linear(*shape, bias=False) for name, shape in shapes.items()}
    model = nn.ModuleDict({**layers, "conv": nn.Conv1d(2, 4, 3, bias=False)}).to(dtype)
    mark_orthogonal(model["gates"], "weight", 3)
    mark_orthogonal(model["uneven"], "weight", (2, 5, 7), gain=1.3)
    mark_orthogonal(model["conv"], "weight")
    mark_unit_norm(model["unit"], "weight")
    return model


def give(model, seed):
    """Gradients; the last gate's is zero at first, so that it has not moved when the others have."""
    for k, p in enumerate(model.parameters()):
        p.grad = gaussian(*p.shape, seed=1000 + 100 * seed + k).to(p.dtype)
    if seed < 6:
        model["gates"].weight.grad[16:] = 0


def run(model, opt, steps, first=0):
    for step in range(first, first + steps):
        give(model, step)
        opt.step()
    return model


def same(a, b):
    return all(map(torch.equal, a.parameters(), b.parameters()))


def same_state(a, b):
    states = [[opt.state[p] for group in opt.param_groups for p in group["params"]] for opt in (a, b)]
    return all(
        mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in theirs)
        for mine, theirs in zip(*states, strict=True)
    )


# Checkpoints.


@each(retraction=RETRACTIONS, rule=RULES, dtype=LOW, steps=[1, 5])
def test_a_resumed_run_is_the_uninterrupted_one(retraction, rule, dtype, steps, tmp_path):
    model = net(dtype)
    opt = RULES[rule](model.parameters(), retraction=retraction)
    run(model, opt, steps)
    torch.save([model.state_dict(), opt.state_dict()], tmp_path / "checkpoint.pt")
    values, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["state"][0]["master"].dtype == torch.float32
    assert state["state"][0]["master"].shape == (24, 8)
    other = net(dtype, seed=1)
    resumed = RULES[rule](other.parameters(), retraction=retraction)
    for load in (lambda: other.load_state_dict(values), lambda: resumed.load_state_dict(state))[
        :: 1 if steps == 1 else -1
    ]:
        load()
    assert check(other, resumed) == []
    assert same(run(other, resumed, 4, steps), run(model, opt, 4, steps))
    assert same_state(resumed, opt)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", LOW)
def test_distributed_checkpoints(rule, dtype):
    model = net(dtype)
    opt = RULES[rule](model.parameters())
    run(model, opt, 3)
    values, state = get_model_state_dict(model), get_optimizer_state_dict(model, opt)
    other = net(dtype, seed=1)
    resumed = RULES[rule](other.parameters())
    set_model_state_dict(other, copy.deepcopy(values))
    set_optimizer_state_dict(other, resumed, copy.deepcopy(state))
    assert check(other, resumed) == []
    assert same(run(other, resumed, 4, 3), run(model, opt, 4, 3))
    assert same_state(resumed, opt)


@pytest.mark.parametrize("rule", RULES)
def test_model_and_optimizer_copied_together_go_on(rule):
    model = net()
    opt = RULES[rule](model.parameters())
    run(model, opt, 3)
    copied, other = copy.deepcopy((model, opt))
    assert same(run(copied, other, 3, 3), run(model, opt, 3, 3))
    assert same_state(other, opt)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", LOW)
def test_a_checkpoint_of_float32_loads_and_goes_back(rule, dtype):
    """Moments to the bit; a float32 model has no master, and starts at what the weights have been rounded to."""
    model = net(torch.float32)
    opt = RULES[rule](model.parameters())
    run(model, opt, 3)
    low = net(dtype, seed=1)
    resumed = RULES[rule](low.parameters())
    low.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    weight, full = low["gates"].weight, model["gates"].weight
    for key, value in opt.state[full].items():
        assert torch.equal(resumed.state[weight][key], value), key
    run(low, resumed, 3, 3)
    assert max(orthogonality_error(low).values()) < 8 * torch.finfo(dtype).eps * 24**0.5
    assert check(low, resumed) == []
    back = net(torch.float32, seed=2)
    again = RULES[rule](back.parameters())
    back.load_state_dict(low.state_dict())
    again.load_state_dict(copy.deepcopy(resumed.state_dict()))
    key = "momentum_buffer" if rule == "SGD" else "exp_avg"
    assert torch.equal(again.state[back["gates"].weight][key], resumed.state[weight][key])
    run(back, again, 1, 6)
    assert "master" not in again.state[back["gates"].weight]
    assert max(orthogonality_error(back).values()) < 1e-5
    assert check(back, again) == []
    # From the same moments and nearly the same weights, and gradients that are rounded: nearly the same steps.
    torch.testing.assert_close(run(low, resumed, 1, 6)["gates"].weight.float(), back["gates"].weight, rtol=0, atol=0.03)


def test_moments_in_float64_become_float32_and_no_less():
    model = net(torch.bfloat16)
    opt = Adam(model.parameters())
    run(model, opt, 2)
    state = copy.deepcopy(opt.state_dict())
    for entries in state["state"].values():
        entries.update({key: value.double() for key, value in entries.items() if key != "step"})
    other = net(torch.bfloat16)
    resumed = Adam(other.parameters())
    resumed.load_state_dict(state)
    assert torch.equal(resumed.state[other["gates"].weight]["exp_avg"], opt.state[model["gates"].weight]["exp_avg"])


def test_hooks_of_loading_fire_once_in_order_and_see_what_they_would():
    model = net()
    opt = Adam(model.parameters())
    run(model, opt, 2)
    other = net(seed=1)
    resumed, seen = Adam(other.parameters()), []
    weight = other["gates"].weight

    def halve(_, state):
        seen.append("before")
        state = copy.deepcopy(state)
        state["state"][0]["exp_avg"] *= 0.5
        return state

    resumed.register_load_state_dict_pre_hook(halve)
    resumed.register_load_state_dict_pre_hook(lambda *_: seen.append("before too"))
    resumed.register_load_state_dict_post_hook(lambda o: seen.append(o.state[weight]["exp_avg"].dtype))
    resumed.register_load_state_dict_post_hook(lambda _: seen.append("after"), prepend=True)
    for _ in range(2):
        seen.clear()
        resumed.load_state_dict(opt.state_dict())
        assert seen == ["before", "before too", "after", torch.float32]
    assert torch.equal(resumed.state[weight]["exp_avg"], opt.state[model["gates"].weight]["exp_avg"] * 0.5)
    bad = copy.deepcopy(opt.state_dict())
    bad["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="doesn't match the size"):
        resumed.load_state_dict(bad)
    assert len(resumed._optimizer_load_state_dict_pre_hooks) == 2  # nothing of the package's own is left behind
    assert len(resumed._optimizer_load_state_dict_post_hooks) == 2


# Values written from outside.

WRITE = {
    "copy_": lambda weight, value: weight.copy_(value),
    "load_state_dict": None,
    "init": lambda weight, _: init.orthogonal_(weight, generator=torch.Generator().manual_seed(7)),
}


@pairs(way=WRITE, rule=RULES, dtype=LOW)
def test_what_is_held_follows_a_weight_that_is_overwritten(way, rule, dtype):
    """On its manifold to its own rounding, it keeps its bits; what is held is the nearest value in float32."""
    model = net(dtype)
    opt = RULES[rule](model.parameters())
    run(model, opt, 3)
    weight = model["gates"].weight
    value = torch.cat([point(8, 8, seed=40 + k) for k in range(3)]).to(dtype)
    with torch.no_grad():
        if way == "load_state_dict":
            model.load_state_dict({**copy.deepcopy(model.state_dict()), "gates.weight": value})
        else:
            WRITE[way](weight, value)
    written = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for key in {"momentum_buffer", "exp_avg"} & opt.state[weight].keys():
        opt.state[weight][key].zero_()
    opt.step()
    assert torch.equal(weight, written)
    held = opt.state[weight]["master"].view(3, 8, 8)
    torch.testing.assert_close(held, nearest_orthogonal(written.float().view(3, 8, 8)), rtol=0, atol=1e-6)
    assert not torch.equal(before["uneven.weight"], model["uneven"].weight)
    assert check(model, opt) == []


@pairs(rule=RULES, dtype=LOW, which=["gates", "uneven", "unit"])
def test_another_blocks_new_value_leaves_a_block_alone(rule, dtype, which):
    """Moved or not moved yet, near its manifold or far: what is written to one block is no other's concern."""
    runs = []
    for written in (False, True):
        model = net(dtype)
        opt = RULES[rule](model.parameters())
        run(model, opt, 2)
        if written:
            with torch.no_grad():
                model[which].weight[:2] = 2 * gaussian(2, model[which].weight.shape[1], seed=60).to(dtype)
        give(model, 2)
        if written:
            with pytest.warns(UserWarning, match="away from its manifold"):
                opt.step()
        else:
            opt.step()
        runs.append((model, opt))
    (model, opt), (other, changed) = runs
    rows = {"gates": 8, "uneven": 2, "unit": 2}[which]
    assert not torch.equal(model[which].weight[:rows], other[which].weight[:rows])
    assert torch.equal(model[which].weight[rows:], other[which].weight[rows:])
    masters = [o.state[m[which].weight]["master"] for m, o in ((model, opt), (other, changed))]
    assert torch.equal(masters[0][rows:], masters[1][rows:])
    assert check(other, changed) == []
    assert torch.equal(other["gates"].weight[16:], net(dtype)["gates"].weight[16:])  # which has not moved


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("zero", [True, False])
def test_weights_loaded_far_off_before_the_first_step_are_put_back_with_a_warning(rule, zero):
    weight = mark_orthogonal(nn.Parameter(torch.eye(6).bfloat16()))
    with torch.no_grad():
        weight.copy_(3 * point(6, 6))
    expected = nearest_orthogonal(weight.detach().float())
    opt = RULES[rule]([weight])
    weight.grad = torch.zeros_like(weight) if zero else gaussian(6, 6).bfloat16()
    with pytest.warns(UserWarning, match="away from its manifold"):
        opt.step()
    assert orthogonality_error(weight) < 0.03
    if zero:
        assert torch.equal(weight, expected.bfloat16())


def test_a_weight_of_another_shape_is_held_anew():
    weight = mark_orthogonal(nn.Parameter(torch.eye(4).bfloat16()))
    opt = SGD([weight], lr=0.1)  # without moments there is nothing of the old shape, but for the master
    for size in (4, 6):
        weight.grad = None
        weight.data = torch.eye(size).bfloat16()
        weight.grad = gaussian(size, size).bfloat16()
        opt.step()
    assert torch.equal(opt.state[weight]["master"].bfloat16(), weight)
    assert orthogonality_error(opt.state[weight]["master"]) < 1e-5


def test_weights_that_are_not_finite_are_an_error_that_changes_nothing():
    model = net()
    opt = Adam(model.parameters())
    run(model, opt, 2)
    with torch.no_grad():
        model["uneven"].weight[3, 3] = torch.nan
    before = copy.deepcopy((model.state_dict(), opt.state_dict()["state"]))
    give(model, 2)
    with pytest.raises(ValueError, match="not finite"):
        opt.step()
    for value, now in zip(before[0].values(), model.state_dict().values(), strict=True):
        torch.testing.assert_close(now, value, rtol=0, atol=0, equal_nan=True)
    for key, entries in opt.state_dict()["state"].items():
        assert all(torch.equal(entries[name], before[1][key][name]) for name in entries)


# Conversions.


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dtype", LOW)
def test_unmarked_halfway_torch_takes_over(rule, dtype):
    model = net(dtype)
    opt = RULES[rule](model.parameters())
    run(model, opt, 2)
    for p in model.parameters():
        unmark(p)
    if dtype == torch.float16 and rule != "SGD":
        return  # there torch's own Adam needs a larger eps
    run(model, opt, 2, 2)
    for p in model.parameters():
        assert "master" not in opt.state[p]
        assert all(value.dtype == dtype for key, value in opt.state[p].items() if key not in UNMOVED)
    mark_orthogonal(model["gates"], "weight", 3)
    run(model, opt, 2, 4)
    assert opt.state[model["gates"].weight]["master"].dtype == torch.float32
    assert orthogonality_error(model["gates"].weight) < torch.finfo(dtype).eps * 8**0.5
    assert check(model, opt) == []


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("retraction", ["orthographic", "cayley"])
def test_a_model_may_change_its_dtype_and_back(rule, retraction):
    """Where it can be held more exactly it is, step or no step."""
    model = net(torch.float32)
    opt = RULES[rule](model.parameters(), retraction=retraction)
    for k, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.bfloat16)):
        model.to(dtype)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for step in range(2):
            opt.step()
            assert orthogonality_error(model["gates"].weight) < 4 * torch.finfo(dtype).eps * 8**0.5
            assert check(model, opt) == []
            give(model, 2 * k + step)
        state = opt.state[model["gates"].weight]
        assert ("master" in state) == (dtype in LOW)
        assert orthogonality_error(model["gates"].weight) < 4 * torch.finfo(dtype).eps * 8**0.5
        assert check(model, opt) == []


@pytest.mark.parametrize(
    ("through", "compiled"), [("copy_", False), ("data", False), ("vector_to_parameters", False), ("data", True)]
)
def test_a_weight_written_to_unnoticed_is_followed_too(through, compiled):
    """Through .data no version tells, and in a compiled step nobody looks: what is held shows it."""
    weight = mark_orthogonal(nn.Parameter(torch.eye(8).bfloat16()))
    opt = Adam([weight], lr=1e-3)
    step = torch.compile(opt.step, backend="eager") if compiled else opt.step
    weight.grad = gaussian(8, 8).bfloat16()
    step()
    value = -torch.eye(8).bfloat16()
    if through == "copy_":
        with torch.no_grad():
            weight.copy_(value)
    elif through == "data":
        weight.data = value.clone()
    else:
        nn.utils.vector_to_parameters(value.flatten(), [weight])
    step()
    assert float((weight.detach() - value).abs().max()) < 0.01


def test_what_is_off_by_more_than_the_rounding_of_its_storage_is_put_back():
    """A matrix 3 % too long is orthogonal to no rounding of bfloat16, once for every entry."""
    for size in (16, 256):
        value = (1.03 * point(size, size, dtype=torch.float32)).bfloat16()
        weight = mark_orthogonal(nn.Parameter(value))
        assert orthogonality_error(weight) < 0.45 * torch.finfo(torch.bfloat16).eps * size**0.5
    rows = mark_unit_norm(nn.Parameter(1.03 * point(16, 64, dtype=torch.float32).bfloat16()))
    assert float((rows.detach().double().norm(dim=1) - 1).abs().max()) < 0.6 * torch.finfo(torch.bfloat16).eps
