"""Rows of a marked parameter that are in none of its blocks: torch's to train, bit for bit."""

import copy

import pytest
import torch
from torch import nn

import manifold_opt
from manifold_opt import SGD, Adam, check, mark_orthogonal, orthogonality_error, unmark

from ..helpers import UNMOVED, gaussian, pairs

LAYOUTS = {  # shape, mark, and the free rows (columns)
    "candidate": ((9, 3), {"blocks": 3, "which": (2,)}, slice(0, 6)),
    "in the middle": ((33, 7), {"blocks": (9, 11, 13), "which": (0, 2)}, slice(9, 20)),
    "columns": ((5, 24), {"blocks": 3, "which": (0,), "dim": 1}, slice(8, 24)),
    "filters": ((6, 2, 3, 3), {"blocks": (2, 4), "which": (0,)}, slice(2, 6)),
}

OPTIONS = [
    ("SGD", {}),
    ("SGD", {"momentum": 0.9}),
    ("SGD", {"momentum": 0.9, "dampening": 0.3, "weight_decay": 0.1, "maximize": True}),
    ("SGD", {"momentum": 0.9, "nesterov": True}),
    ("Adam", {}),
    ("Adam", {"amsgrad": True, "weight_decay": 0.1}),
    ("Adam", {"betas": (0.5, 0.6), "eps": 1e-3, "maximize": True}),
    ("AdamW", {"weight_decay": 0.1, "amsgrad": True}),
]
FIRST = [options for options in OPTIONS if options[1].get("momentum") or options[0] != "SGD"]  # those with a state


def free(tensor, layout):
    _, options, rows = LAYOUTS[layout]
    return tensor.detach()[:, rows] if options.get("dim") else tensor.detach()[rows]


def pair(layout, dtype=torch.float32, seed=0):
    """A marked parameter, and one of torch's with its values."""
    shape, options, _ = LAYOUTS[layout]
    weight = mark_orthogonal(nn.Parameter(gaussian(*shape, dtype=dtype, seed=seed)), **options)
    return weight, nn.Parameter(weight.detach().clone())


def build(name, parameters, torch_own=False, **options):
    return getattr(torch.optim if torch_own else manifold_opt, name)(parameters, **{"lr": 0.01, **options})


def give(parameters, seed):
    for k, p in enumerate(parameters):
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=100 * seed + k % 100)


def assert_same(opt, weight, own, stock, layout):
    """Values and state, to the bit."""
    assert torch.equal(free(weight, layout), free(stock, layout))
    for key, value in own.state[stock].items():
        if value is None:
            continue
        held = opt.state[weight][key]
        assert torch.equal(held, value) if key in UNMOVED else torch.equal(free(held, layout), free(value, layout)), key


@pairs(
    {"name, options": OPTIONS},
    layout=LAYOUTS,
    foreach=[None, False, True],
    dtype=[torch.float32, torch.float64, torch.complex64],
)
def test_free_rows_train_as_with_torch(layout, name, options, foreach, dtype):
    """0 ulp over 12 steps, beside blocks that move, and another such parameter whose first gradient comes late."""
    (weight, stock), (late, late_stock) = pair(layout, dtype), pair(layout, dtype, seed=1)
    opt = build(name, [weight, late], foreach=foreach, **options)
    own = build(name, [stock, late_stock], torch_own=True, foreach=foreach, **options)
    for step in range(12):
        for some in ([weight, late], [stock, late_stock]):
            give(some, step)
            some[1].grad = None if step < 3 else some[1].grad
        given = weight.grad.clone()
        opt.step()
        own.step()
        assert torch.equal(weight.grad, given)
    for mine, theirs in ((weight, stock), (late, late_stock)):
        assert_same(opt, mine, own, theirs, layout)
    assert orthogonality_error(weight) < 1e-5
    assert not torch.equal(free(weight, layout), weight.detach().new_zeros(()).expand_as(free(weight, layout)))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_with_tensor_rates_closures_and_groups(name, options):
    results = []
    for torch_own in (False, True):
        values = [pair("candidate", seed=k)[torch_own] for k in range(2)]
        groups = [{"params": values[:1]}, {"params": values[1:], "lr": 0.1, "weight_decay": 0.2}]
        opt = build(name, groups, torch_own, **{"lr": torch.tensor(0.03) if name != "SGD" else 0.03, **options})

        def closure(values=values, opt=opt):
            opt.zero_grad()
            loss = sum((p * gaussian(*p.shape, dtype=p.dtype)).square().sum() for p in values)
            loss.backward()
            return loss

        schedule = torch.optim.lr_scheduler.StepLR(opt, 2, 0.5)
        for _ in range(6):
            opt.step(closure)
            schedule.step()
        results.append([free(p, "candidate") for p in values])
    # A closure's gradients of free rows depend on free rows alone.
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_by_hand():
    """lr 0.5, gradient ones, momentum 0.5: -0.5, then -0.5 (1 + 0.5); the row (3, 4) / 5 is orthogonal."""
    weight = mark_orthogonal(nn.Parameter(torch.tensor([[3.0, 4.0], [10.0, 20.0]])), blocks=2, which=(0,))
    opt = SGD([weight], lr=0.5, momentum=0.5)
    for expected in ([9.5, 19.5], [8.75, 18.75]):
        weight.grad = torch.ones(2, 2)
        opt.step()
        assert torch.equal(weight.detach()[1], torch.tensor(expected))
        assert torch.linalg.vector_norm(weight.detach()[0]) == pytest.approx(1.0, abs=1e-6)


# Checkpoints.


@pairs({"name, options": OPTIONS}, layout=["candidate", "columns"], cut=[1, 4])
def test_a_resumed_run_is_the_uninterrupted_one(layout, name, options, cut, tmp_path):
    weight, _ = pair(layout)
    opt = build(name, [weight], **options)
    for step in range(cut):
        give([weight], step)
        opt.step()
    torch.save({"weight": weight, "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    other = mark_orthogonal(nn.Parameter(loaded["weight"].detach()), **LAYOUTS[layout][1])
    resumed = build(name, [other], **options)
    resumed.load_state_dict(loaded["opt"])
    for step in range(cut, 8):
        give([weight], step)
        give([other], step)
        opt.step()
        resumed.step()
    assert torch.equal(weight, other)
    assert all(torch.equal(value, resumed.state[other][key]) for key, value in opt.state[weight].items())


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("old", [False, True])
def test_a_checkpoint_of_torch_goes_on_as_with_torch(name, options, old):
    """Or one so old that it has a momentum buffer of None."""
    weight, stock = pair("in the middle")
    own = build(name, [stock], torch_own=True, **options)
    for step in range(0 if old else 3):
        give([stock], step)
        own.step()
    with torch.no_grad():
        free(weight, "in the middle").copy_(free(stock, "in the middle"))
    state = copy.deepcopy(own.state_dict())
    if old and name == "SGD":
        state["state"] = {0: {"momentum_buffer": None}}
        own.load_state_dict(copy.deepcopy(state))
    opt = build(name, [weight], **options)
    opt.load_state_dict(state)
    for step in range(3, 8):
        give([weight], step)
        give([stock], step)
        opt.step()
        own.step()
    assert_same(opt, weight, own, stock, "in the middle")


@pytest.mark.parametrize(("name", "options"), FIRST)
def test_unmarked_halfway_and_marked_otherwise_they_go_on(name, options):
    """A block that is freed hands its moments over out of its frame: where there is no step, they come back whole."""
    weight, stock = pair("in the middle", torch.float64)
    opt, own = build(name, [weight], **options), build(name, [stock], torch_own=True, **options)
    for step in range(12):
        give([weight], step)
        give([stock], step)
        opt.step()
        own.step()
        if step == 4:
            unmark(weight)
        if step == 8:
            mark_orthogonal(weight, (9, 11, 13), which=(0,))
    assert_same(opt, weight, own, stock, "in the middle")
    assert orthogonality_error(weight) < 1e-13
    net = nn.ParameterList([weight])
    assert check(net, opt) == []


def test_a_square_block_that_is_freed_gives_its_momentum_back():
    weight = mark_orthogonal(nn.Parameter(gaussian(8, 4)), 2, which=(1,))
    opt = SGD([weight], lr=0.0, momentum=0.9)
    weight.grad = gaussian(8, 4, seed=2)
    opt.step()
    torch.testing.assert_close(opt.state[weight]["momentum_buffer"][4:], weight.grad[4:] @ weight.detach()[4:].mT)
    unmark(weight)
    weight.grad = torch.zeros_like(weight)
    opt.step()
    # In and out of the frame: two products with an orthogonal matrix, of rounding 2e-16 times a root of 4 each.
    torch.testing.assert_close(opt.state[weight]["momentum_buffer"], 0.9 * gaussian(8, 4, seed=2), rtol=0, atol=1e-14)


def test_amsgrad_switched_off_for_some_and_on_again():
    first, second = (pair("candidate", seed=k)[0] for k in range(2))
    opt = Adam([first, second], amsgrad=True, foreach=True)
    give([first], 0)
    opt.step()
    for amsgrad in (False, True, False):
        opt.param_groups[0]["amsgrad"] = amsgrad
        give([first, second], 1)
        before = opt.state[first]["max_exp_avg_sq"].clone()
        opt.step()
        assert torch.equal(opt.state[first]["max_exp_avg_sq"], before) != amsgrad
    assert bool(opt.state[second]["max_exp_avg_sq"].any())


# What is refused.


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_number_a_block_is_refused(name):
    weight, _ = pair("candidate")
    with pytest.raises(ValueError, match=rf"{name}: second_moment='block' holds none.*Mark all of them"):
        build(name, [weight], second_moment="block")
    opt = build(name, [weight])
    give([weight], 0)
    opt.step()
    before, state = weight.detach().clone(), copy.deepcopy(opt.state_dict()["state"])
    opt.param_groups[0]["second_moment"] = "block"
    with pytest.raises(ValueError, match="second_moment='block'"):
        opt.step()
    assert torch.equal(weight, before)
    assert all(torch.equal(value, state[0][key]) for key, value in opt.state[weight].items())


@pairs({"name, options": OPTIONS}, dtype=[torch.bfloat16, torch.float16], layout=LAYOUTS)
def test_in_low_precision_they_are_the_rounding_of_torchs_own_in_float32(layout, name, options, dtype):
    shape, marks, _ = LAYOUTS[layout]
    low = mark_orthogonal(nn.Parameter(gaussian(*shape, dtype=torch.float32).to(dtype)), **marks)
    stock = nn.Parameter(low.detach().float())
    opt, own = build(name, [low], **options), build(name, [stock], torch_own=True, **options)
    for seed in range(4):
        low.grad = gaussian(*shape, dtype=torch.float32, seed=seed).to(dtype)
        stock.grad = low.grad.float()
        opt.step()
        own.step()
        if seed == 1:  # written to from outside
            with torch.no_grad():
                free(low, layout).mul_(2)
                free(stock, layout).copy_(free(low, layout))
        assert torch.equal(free(opt.state[low]["master"], layout), free(stock, layout)) or seed == 1
        assert torch.equal(free(low, layout), free(stock, layout).to(dtype))
    assert orthogonality_error(low) < 3 * torch.finfo(dtype).eps
