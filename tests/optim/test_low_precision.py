"""Parameters in bfloat16 and float16: moved in float32, stored as the rounding of that."""

import pytest
import torch
from torch import nn

import manifold_opt
from manifold_opt import (
    RETRACTIONS,
    SGD,
    Adam,
    AdamW,
    Muon,
    check,
    constraint_of,
    mark_orthogonal,
    mark_unit_norm,
    nearest_orthogonal,
    orthogonality_error,
)
from manifold_opt.optim.engine.grouping import SMALL_BYTES

from ..helpers import EXACT, buckets_of, each, gaussian, never_read, pairs

LOW = [torch.bfloat16, torch.float16]
RULES = {
    "SGD": lambda p, **o: SGD(p, **{"lr": 0.05, **o}),
    "momentum": lambda p, **o: SGD(p, momentum=0.9, dampening=0.1, **{"lr": 0.05, **o}),
    "nesterov": lambda p, **o: SGD(p, momentum=0.9, nesterov=True, **{"lr": 0.05, **o}),
    "Adam": lambda p, **o: Adam(p, **{"lr": 0.01, **o}),
    "Adam block": lambda p, **o: Adam(p, second_moment="block", amsgrad=True, **{"lr": 0.01, **o}),
    "AdamW": lambda p, **o: AdamW(p, maximize=True, **{"lr": 0.01, **o}),
    "Muon": lambda p, retraction="", **o: Muon(p, **{"lr": 0.01, **o}),  # noqa: ARG005
}
MARKS = {  # shape and mark; uneven blocks are buckets of their own, the others may be gathered
    "gates": ((12, 4), {"blocks": 3}),
    "wide": ((5, 12), {"gain": 1.7}),
    "tall": ((18, 4), {"blocks": 2}),
    "uneven": ((14, 5), {"blocks": (2, 5, 7)}),
    "columns": ((4, 12), {"blocks": 3, "dim": 1, "gain": 0.3}),
    "filters": ((6, 2, 3, 3), {}),
    "batch": ((2, 3, 6), {"flatten": False}),
}


def parameter(mark, dtype, seed=0):
    shape, options = MARKS[mark]
    return mark_orthogonal(nn.Parameter(gaussian(*shape, seed=seed).to(dtype)), **{"blocks": 1, **options})


def nearest(weight):
    """The nearest value in float32 of what a marked parameter holds, part by part."""
    value, constraint = weight.detach().float(), constraint_of(weight)
    for part in constraint.layouts(weight.shape):
        blocks = part.view(value)
        blocks.copy_(constraint.gain * nearest_orthogonal(blocks / constraint.gain))
    return value


def twin_of(weight):
    """A float32 parameter that begins where a new one of low precision does."""
    twin = nn.Parameter(nearest(weight))
    constraint = constraint_of(weight)
    start = twin.detach().clone()
    mark_orthogonal(twin, constraint.blocks, dim=constraint.dim, gain=constraint.gain, flatten=constraint.flatten)
    assert torch.equal(twin, start)
    return twin


def give(parameters, seed, scale=1.0):
    for k, p in enumerate(parameters):
        p.grad = (scale * gaussian(*p.shape, seed=1000 + 100 * seed + k)).to(p.dtype)


def run(weights, opt, steps=4, first=0, scale=1.0):
    for step in range(first, first + steps):
        give(weights, step, scale)
        opt.step()


def assert_within(actual, expected, atol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@each(retraction=RETRACTIONS, rule=RULES, dtype=LOW)
def test_a_run_is_the_rounding_of_one_in_float32(retraction, rule, dtype):
    """Bit for bit, weights and moments: three of a kind, which are gathered, and each kind of blocks."""
    weights = [parameter(mark, dtype, seed) for mark in MARKS for seed in range(3 if mark == "gates" else 1)]
    twins = [twin_of(weight) for weight in weights]
    opt, other = RULES[rule](weights, retraction=retraction), RULES[rule](twins, retraction=retraction)
    for step in range(5):
        give(weights, step)
        for p, twin in zip(weights, twins, strict=True):
            twin.grad = p.grad.float()
        opt.step()
        other.step()
        for p, twin in zip(weights, twins, strict=True):
            assert p.dtype == dtype
            # A block that begins within a line of memory is multiplied in another order than a copy of it.
            rounding = 4e-6 if isinstance(constraint_of(p).blocks, tuple) else 0.0
            assert_within(opt.state[p]["master"], twin.detach(), rounding)
            assert torch.equal(p.detach(), opt.state[p]["master"].to(dtype))
    for p, twin in zip(weights, twins, strict=True):
        for key, value in other.state[twin].items():
            if key == "constrained":
                continue
            assert opt.state[p][key].dtype == torch.float32
            rounding = 1e-5 if isinstance(constraint_of(p).blocks, tuple) else 0.0
            assert_within(opt.state[p][key], value, rounding)


@each(rule=RULES, retraction=RETRACTIONS)
def test_without_reading_values_a_run_is_the_rounding_of_one_in_float32(rule, retraction, monkeypatch):
    never_read(monkeypatch)
    test_a_run_is_the_rounding_of_one_in_float32(retraction, rule, torch.bfloat16)


def bound(dtype, n):
    """Error of an n x n orthogonal matrix that is rounded to ``dtype``, and scatters the less the larger n is.

    Each of the n^2 entries of W W^T - I is a sum of 2 n products of an entry, of size n^-1/2, and a rounding error, for
    values spread evenly over their binades about 0.2 eps n^-1/2: 0.3 eps a root of n in all. Of 20000 random matrices
    the largest is 0.42 at n = 16, of 500 it is 0.35 at n = 32.
    """
    return (0.3 + 2.5 / n) * torch.finfo(dtype).eps * n**0.5


@each({"rule, steps": [("SGD", 20), ("Adam", 20)]}, dtype=LOW, retraction=EXACT, n=[16, 24, 48])
def test_orthogonal_to_the_rounding_of_its_storage(dtype, retraction, rule, steps, n):
    weight = mark_orthogonal(nn.Parameter(gaussian(2 * n, n).to(dtype)), 2)
    opt = RULES[rule]([weight], retraction=retraction)
    for step in range(steps):
        give([weight], step)
        opt.step()
        assert orthogonality_error(weight) <= bound(dtype, n)
    assert orthogonality_error(opt.state[weight]["master"].view(2, n, n)) < 8e-7 * n**0.5


@pytest.mark.slow
@pairs(dtype=LOW, retraction=EXACT, rule=RULES)
def test_orthogonal_to_the_rounding_of_its_storage_after_thousands_of_steps(dtype, retraction, rule):
    for n in (16, 64):
        test_orthogonal_to_the_rounding_of_its_storage(dtype, retraction, rule, 3000, n)


@each(dtype=LOW, rule=["SGD", "Adam"])
def test_small_updates_add_up(dtype, rule):
    """No step is long enough to change an entry of the storage, a thousand are; and torch's own stay where they are."""
    weight = parameter("gates", dtype)
    twin, stock = twin_of(weight), nn.Parameter(weight.detach().clone())
    direction = gaussian(12, 4)
    rate = 5e-4 * torch.finfo(dtype).eps
    opt, other, own = RULES[rule]([weight], lr=rate), RULES[rule]([twin], lr=rate), torch.optim.SGD([stock], lr=rate)
    start, changed = weight.detach().clone(), []
    for _ in range(1000):
        before = weight.detach().clone()
        weight.grad, twin.grad, stock.grad = (direction.to(p.dtype) for p in (weight, twin, stock))
        twin.grad = weight.grad.float()
        opt.step()
        other.step()
        own.step()
        changed.append(int((weight.detach() != before).sum()))
    assert torch.equal(weight.detach(), twin.detach().to(dtype))
    assert max(changed) <= 12  # a few entries of 48 at a time
    assert sum(count == 0 for count in changed) > 500
    assert int((weight.detach() != start).sum()) > 24
    large = start.abs() > 0.1
    assert torch.equal(stock.detach()[large], start[large])


def test_by_hand():
    """A quarter of a turn in 512 steps: each turns by 0.003, no more than the spacing of bfloat16 below one, 0.004."""
    weight = mark_orthogonal(nn.Parameter(torch.eye(2).bfloat16()))
    opt = SGD([weight], lr=1.0, retraction="exp")
    angle = torch.pi / 2 / 512
    for _ in range(512):
        held = opt.state[weight].get("master", torch.eye(2))
        weight.grad = torch.zeros(2, 2, dtype=torch.bfloat16)
        turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        weight.grad = (-angle * turn @ held).bfloat16()
        opt.step()
    # Gradients rounded to 2^-9 each, evenly up and down.
    torch.testing.assert_close(weight.detach().float(), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), rtol=0, atol=0.01)


@each(rule=RULES, dtype=LOW)
def test_gathered_or_alone_it_moves_the_same(rule, dtype, monkeypatch):
    together, alone = ([parameter("wide", dtype, seed=k) for k in range(4)] for _ in range(2))
    opt = RULES[rule](together)
    run(together, opt)
    singles = [RULES[rule]([weight]) for weight in alone]
    monkeypatch.setattr(manifold_opt.optim.engine.grouping, "SMALL_BYTES", 0)
    for step in range(4):
        give(alone, step)
        for single in singles:
            single.step()
    assert buckets_of(opt)[0].gathered
    assert not buckets_of(singles[0])[0].gathered
    assert SMALL_BYTES > 0
    for k, (p, other) in enumerate(zip(together, alone, strict=True)):
        master = singles[k].state[other]["master"]
        # Products of another batch size may be summed in another order; what is on the edge may round either way.
        torch.testing.assert_close(opt.state[p]["master"], master, rtol=0, atol=1e-5)
        torch.testing.assert_close(p.detach(), other.detach(), rtol=0, atol=2 * torch.finfo(dtype).eps)


@each(rule=RULES, mark=MARKS, dtype=LOW)
def test_a_zero_gradient_keeps_every_bit(rule, mark, dtype):
    """In the first step of all, and later that of a block whose moments are zero."""
    weight = parameter(mark, dtype)
    start = weight.detach().clone()
    opt = RULES[rule]([weight])
    for _ in range(3):
        give([weight], 0, scale=0.0)
        opt.step()
        assert torch.equal(weight, start)
    parts = constraint_of(weight).layouts(weight.shape)
    give([weight], 1)
    parts[-1].view(weight.grad)[-1] = 0
    opt.step()
    assert torch.equal(parts[-1].view(weight.detach())[-1], parts[-1].view(start)[-1])
    assert torch.equal(weight, start) == (len(parts[0].view(start)) == 1 == len(parts))  # there is no other


@each(rule=RULES, mark=["gates", "uneven"], fault=[float("nan"), float("inf")])
def test_a_fault_keeps_to_its_block(rule, mark, fault):
    runs = []
    for spoilt in (False, True):
        weight = parameter(mark, torch.bfloat16)
        opt = RULES[rule]([weight])
        run([weight], opt, 2)
        give([weight], 2)
        if spoilt:
            weight.grad[-1, 1] = fault
            before = weight.detach().clone()
        opt.step()
        runs.append((weight.detach(), opt.state[weight]["master"], weight.shape[0] - (4 if mark == "gates" else 7)))
    (sound, held, rows), (spoilt, other, _) = runs
    assert torch.equal(sound[:rows], spoilt[:rows])
    assert torch.equal(held[:rows], other[:rows])
    assert torch.equal(spoilt[rows:], before[rows:])
    assert opt.metrics()["skipped_blocks"] == 1
    assert check(nn.ParameterList([weight]), opt) == []


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("nonfinite", ["skip", "raise"])
def test_a_long_gradient_in_float16_is_no_fault(rule, nonfinite):
    """Its squares are beyond float16, whose largest number is 65504, not beyond float32."""
    weight = parameter("gates", torch.float16)
    start = weight.detach().clone()
    opt = RULES[rule]([weight], nonfinite=nonfinite)
    give([weight], 0)
    weight.grad *= 1e4 / float(weight.grad.float().norm())
    assert not bool(weight.grad.square().isfinite().all())
    opt.step()
    metrics = opt.metrics()
    assert metrics["skipped_blocks"] == 0
    assert metrics["tangent_norm"] > 100
    assert not torch.equal(weight, start)
    assert orthogonality_error(weight) < 4 * bound(torch.float16, 4)


@each(rule=["SGD", "momentum", "Adam", "Adam block"], dtype=LOW)
def test_rows_of_unit_norm(rule, dtype):
    """The rounding of a run in float32 there too, small updates and all; a zero gradient keeps the bits."""
    value = gaussian(6, 9)
    longer = 1 + 2 * torch.finfo(dtype).eps  # still of rounding, and so left as it is
    weight = mark_unit_norm(
        nn.Parameter((longer * value / torch.linalg.vector_norm(value, dim=1, keepdim=True)).to(dtype))
    )
    start = weight.detach().clone()
    twin = mark_unit_norm(nn.Parameter(start.float()))
    opt, other = RULES[rule]([weight], lr=1e-5), RULES[rule]([twin], lr=1e-5)
    give([weight], 0, scale=0.0)
    opt.step()
    assert torch.equal(weight, start)
    opt = RULES[rule]([weight], lr=1e-5)
    for step in range(300):
        give([weight], step % 3)
        twin.grad = weight.grad.float()
        opt.step()
        other.step()
    assert torch.equal(opt.state[weight]["master"], twin.detach())
    assert torch.equal(weight.detach(), twin.detach().to(dtype))
    assert not torch.equal(weight, start)
    assert check(nn.ParameterList([weight]), opt) == []
