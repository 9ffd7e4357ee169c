"""Muon: the exact spectral step on orthogonal blocks, torch.optim.Muon on everything else."""

import copy
import itertools
import math
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt import (
    Adam,
    Muon,
    check,
    mark_attention,
    mark_orthogonal,
    mark_positive,
    mark_spectral,
    mark_unit_norm,
    orthogonality_error,
    unmark,
)
from manifold_opt.linalg.matrices import error_at_rounding
from manifold_opt.optim.muon import IS_AVAILABLE
from manifold_opt.stiefel.rotation import CORRECTION_INTERVAL
from manifold_opt.stiefel.spectral import COARSE_ANGLE, MAX_ANGLE

from ..helpers import DTYPES, FIELDS, UNMOVED, each, never_read, pairs, point
from ..helpers import gaussian as drawn
from ..reference import loop as reference
from .test_step_counts import calls, more_calls_of_torch, operations, warm

pytestmark = pytest.mark.skipif(not IS_AVAILABLE, reason="torch.optim.Muon came with torch 2.9")

SHAPES = [(10, 4), (7, 7), (9, 5), (16, 16), (20, 3)]
EVERY = [*SHAPES, (3, 20), (5, 9), (1, 1), (1, 6), (2, 3), (4, 8), (8, 8)]


def gaussian(*shape, dtype=torch.float64, seed=1):
    """Seeds apart from those of the points: a point is the polar factor of the Gaussian of its seed."""
    return drawn(*shape, dtype=dtype, seed=seed + 100)


def marked(shape, dtype=torch.float64, seed=0, blocks=1, **options):
    rows = shape[0] // blocks
    value = torch.cat([point(rows, shape[1], dtype=dtype, seed=seed + k) for k in range(blocks)])
    return mark_orthogonal(nn.Parameter(value), blocks=blocks, **options)


def step_along(weight, m, lr=0.1, steps=1, **options):
    """Where steps along one gradient lead."""
    moved = mark_orthogonal(nn.Parameter(weight.detach().clone()))
    opt = Muon([moved], lr=lr, **options)
    for _ in range(steps):
        moved.grad = m.clone()
        opt.step()
    return moved.detach()


# The step.


def hermitian_basis(p, dtype):
    """Matrices of which every Hermitian matrix is a real combination."""
    for i, j in itertools.product(range(p), range(p)):
        e = torch.zeros(p, p, dtype=dtype)
        e[i, j] = 1 if i <= j else 1j if dtype.is_complex else 0
        if i <= j or dtype.is_complex:
            yield (e + e.mH) / 2


def certificate(x, m, d):
    """Hermitian S with a small nuclear norm of M - X S: by duality M - X S = -D H, with H Hermitian too."""
    if x.shape[0] == x.shape[1]:  # many solutions, of which this has a positive semidefinite H
        return (x.mH @ m + m.mH @ x) / 2
    basis = list(hermitian_basis(x.shape[1], x.dtype))
    columns = [x @ s for s in basis] + [-d @ h for h in basis]

    def flat(a):
        return (torch.view_as_real(a) if a.is_complex() else a).flatten()

    system = torch.stack([flat(c) for c in columns], 1)
    found = torch.linalg.lstsq(system, flat(m)[:, None], driver="gelsd").solution[:, 0]
    return sum(c * s for c, s in zip(found[: len(basis)], basis, strict=True))


@pytest.mark.parametrize("dtype", FIELDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_step_is_the_steepest_of_its_spectral_norm(shape, dtype):
    """-<M, D> is the nuclear norm of M - X S for a symmetric S, which bounds it from above for every tangent."""
    x, m, lr = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype), 0.1
    d = (step_along(x, m, lr) - step_along(x, -m, lr)) / (2 * math.sin(lr))
    torch.testing.assert_close(x.mH @ d, -d.mH @ x, rtol=0, atol=1e-13)
    assert float(torch.linalg.matrix_norm(d, 2)) <= 1 + 1e-12
    decrease = -float((m.conj() * d).sum().real)
    bound = float(torch.linalg.matrix_norm(m - x @ certificate(x, m, d), "nuc"))
    assert decrease <= bound * (1 + 1e-12)
    assert decrease >= bound * (1 - 1e-5)


@pairs(shape=EVERY, dtype=FIELDS, lr=[0.02, 0.3, 0.9, 1.5], nesterov=[True, False])
def test_a_step_is_the_matrix_exponential(shape, dtype, lr, nesterov):
    weight = marked(shape, dtype)
    start = weight.detach().clone()
    opt = Muon([weight], lr=lr, momentum=0.8, nesterov=nesterov)
    gradients = [gaussian(*shape, dtype=dtype, seed=k) for k in range(3)]
    for gradient in gradients:
        weight.grad = gradient
        opt.step()
    expected = reference.train(start, gradients, "Muon", {"lr": lr, "momentum": 0.8, "nesterov": nesterov}, "")
    # A singular value of the momentum that is small next to the others magnifies rounding.
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-10)
    assert orthogonality_error(weight) <= error_at_rounding(*shape, torch.float64)


@pytest.mark.parametrize("lr", [COARSE_ANGLE / 4, 2 * COARSE_ANGLE])
@pytest.mark.parametrize("shape", [(16, 16), (9, 5), (20, 3)])
def test_in_single_precision(shape, lr):
    """At a small angle the iteration for the sign stops early: the decrease is the best to less than a percent."""
    x, m = point(*shape, dtype=torch.float32), gaussian(*shape, dtype=torch.float32)
    moved = step_along(x, m, lr)
    best = reference.train(x.double(), [m.double()], "Muon", {"lr": lr}, "")
    decrease, largest = (float((m * (x - end)).sum()) for end in (moved, best))
    assert decrease == pytest.approx(largest, rel=0.005 if lr <= COARSE_ANGLE else 1e-4)
    assert orthogonality_error(moved) <= error_at_rounding(*shape, torch.float32)


def test_by_hand():
    """W = I, M = [[0, 1], [0, 0]]: a rotation by the learning rate."""
    weight = mark_orthogonal(nn.Parameter(torch.eye(2, dtype=torch.float64)))
    weight.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    Muon([weight], lr=0.3).step()
    c, s = math.cos(0.3), math.sin(0.3)
    expected = torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("gain", [1.0, 0.3, 2.0350263118743896])
def test_the_angle_does_not_depend_on_the_gain(gain):
    weight = marked((6, 6))
    scaled = mark_orthogonal(nn.Parameter(gain * weight.detach()), gain=gain)
    for p in (weight, scaled):
        p.grad = gaussian(6, 6)
        Muon([p], lr=0.1).step()
    torch.testing.assert_close(scaled.detach() / gain, weight.detach())


@pytest.mark.parametrize("lr", [0.02, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(9, 9), (8, 8), (9, 5), (12, 9), (20, 3), (100, 16)])
def test_momentum_of_low_rank_ends_on_the_manifold(shape, dtype, lr, monkeypatch):
    """Whatever rounding makes of singular values that are zero. So where no value may be read."""
    u, v = gaussian(shape[0], 1, dtype=dtype), gaussian(1, shape[1], dtype=dtype, seed=3)
    x = point(*shape, dtype=dtype)
    bound = error_at_rounding(*shape, dtype)
    for _ in range(2):
        weight = mark_orthogonal(nn.Parameter(x.clone()))
        opt = Muon([weight], lr=lr)
        for _ in range(12):
            weight.grad = u @ v
            opt.step()
            assert orthogonality_error(weight) <= bound
        never_read(monkeypatch)


@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("shape", [(16, 6), (6, 40), (100, 16)])
def test_momentum_of_low_rank_turns_by_the_angle(shape, rank, monkeypatch):
    """In float32: where rounding is all of M, nothing is turned. What Z Z^T does not see is of size sqrt(eps)."""
    x, bound = point(*shape), 8 * torch.finfo(torch.float32).eps ** 0.5
    m = gaussian(shape[0], rank) @ gaussian(rank, shape[1], seed=3)
    for lr in (1.2, 0.7):
        expected = reference.train(x, [m], "Muon", {"lr": lr}, "")
        moved = step_along(x.float(), m.float(), lr).double()
        assert float(torch.linalg.matrix_norm(moved - expected, 2)) < bound
        never_read(monkeypatch)  # where 0.75 is the longest


@pytest.mark.parametrize("shape", [(7, 7), (9, 5), (40, 6)])
def test_near_an_optimum(shape, monkeypatch):
    """M = X S and a little more, of which the step is made: 1e-4 of M, so that float32 has three digits of it."""
    x, noise = point(*shape), gaussian(*shape, seed=2)
    s = gaussian(shape[1], shape[1], seed=3)
    m = x @ (s + s.mT) + 1e-4 * noise
    x, m = x.float(), m.float()
    expected = reference.train(x.double(), [m.double()], "Muon", {"lr": 0.2}, "")
    for _ in range(2):
        moved = step_along(x, m, 0.2).double()
        assert float(torch.linalg.matrix_norm(moved - expected)) < 0.1 * 0.2
        assert orthogonality_error(moved.float()) <= error_at_rounding(*shape, torch.float32)
        never_read(monkeypatch)


# Every layout of orthogonal blocks.

LAYOUTS = {
    "gates": ((12, 4), {"blocks": 3}),
    "wide": ((5, 12), {}),
    "tall gates": ((24, 3), {"blocks": 2}),
    "uneven": ((14, 5), {"blocks": (2, 5, 7), "gain": 1.3}),
    "columns": ((4, 12), {"blocks": 3, "dim": 1, "gain": 0.3}),
    "filters": ((6, 2, 3, 3), {}),
    "batch": ((2, 3, 8), {"flatten": False}),
}


def layout(name, dtype=torch.float32, seed=0):
    shape, options = LAYOUTS[name]
    return mark_orthogonal(nn.Parameter(drawn(*shape, dtype=dtype, seed=seed)), **options)


@each(name=LAYOUTS, dtype=[torch.float32, torch.float64, torch.complex64, torch.bfloat16, torch.float16])
def test_every_layout_and_dtype(name, dtype):
    shape, options = LAYOUTS[name]
    value = gaussian(*shape, dtype=torch.float64 if dtype in (torch.bfloat16, torch.float16) else dtype)
    weight = mark_orthogonal(nn.Parameter(value.to(dtype)), **options)
    start = weight.detach().clone()
    opt = Muon([weight], lr=0.05, weight_decay=0.3)
    for k in range(6):
        weight.grad = gaussian(*shape, seed=k).to(dtype)
        opt.step()
    assert not torch.equal(weight, start)
    p = min(max(weight.shape[:1]), weight[0].numel())
    assert orthogonality_error(weight) <= error_at_rounding(p, weight[0].numel(), dtype) * 2


@pairs(dtype=DTYPES, shape=[(4, 4), (3, 7), (7, 3), (5, 8), (3, 3)])
def test_three_blocks_step_as_three_parameters(dtype, shape):
    p, n = shape
    stacked = marked((3 * p, n), dtype, blocks=3)
    single = [mark_orthogonal(nn.Parameter(block.clone())) for block in stacked.detach().chunk(3)]
    together, apart = Muon([stacked], lr=0.15), Muon(single, lr=0.15)
    for k in range(6):
        stacked.grad = gaussian(3 * p, n, dtype=dtype, seed=k)
        for block, gradient in zip(single, stacked.grad.chunk(3), strict=True):
            block.grad = gradient.clone()
        together.step()
        apart.step()
    # The iteration magnifies what products of another batch size sum in another order.
    atol = 1e4 * torch.finfo(dtype).eps
    torch.testing.assert_close(stacked.detach(), torch.cat(single).detach(), rtol=0, atol=atol)


def test_heads_of_attention():
    attention = nn.MultiheadAttention(12, 3)
    mark_attention(attention)
    opt = Muon([p for p in attention.parameters() if p.ndim == 2], lr=0.05)
    for k in range(5):
        for p in attention.parameters():
            p.grad = gaussian(*p.shape, dtype=torch.float32, seed=k)
        opt.step()
    assert opt.metrics()["orthogonality_error"] < 1e-5


@pytest.mark.parametrize("nesterov", [True, False])
def test_rows_outside_every_block_train_as_a_matrix_of_their_own(nesterov):
    weight = mark_orthogonal(nn.Parameter(gaussian(9, 3, dtype=torch.float32)), blocks=3, which=(1,))
    runs = [nn.Parameter(weight.detach()[rows].clone()) for rows in (slice(0, 3), slice(6, 9))]
    ours, theirs = Muon([weight], lr=0.1, nesterov=nesterov), torch.optim.Muon(runs, lr=0.1, nesterov=nesterov)
    for k in range(5):
        weight.grad = gaussian(9, 3, dtype=torch.float32, seed=k)
        for p, rows in zip(runs, (slice(0, 3), slice(6, 9)), strict=True):
            p.grad = weight.grad[rows].clone()
        ours.step()
        theirs.step()
    assert torch.equal(weight[:3], runs[0])
    assert torch.equal(weight[6:], runs[1])
    assert orthogonality_error(weight) < 1e-5


# Zero, rounding and faults.


@pytest.mark.parametrize("shape", [(12, 4), (12, 3), (9, 24), (6, 7)])
def test_zero_updates_keep_the_bits(shape, monkeypatch):
    for _ in range(2):
        weight = marked(shape, torch.float32, blocks=3)
        start = weight.detach().clone()
        opt, still = Muon([weight], lr=0.1), Muon([weight], lr=0.0)
        for k in range(CORRECTION_INTERVAL[torch.float32]):
            weight.grad = torch.zeros_like(weight)
            opt.step()
            weight.grad = gaussian(*shape, dtype=torch.float32, seed=k)
            still.step()
        assert torch.equal(weight, start)
        for k in range(CORRECTION_INTERVAL[torch.float32]):  # of one block only, beside others that move
            weight.grad = gaussian(*shape, dtype=torch.float32, seed=k)
            weight.grad[: shape[0] // 3] = 0
            opt.step()
        assert torch.equal(weight[: shape[0] // 3], start[: shape[0] // 3])
        assert not torch.equal(weight, start)
        never_read(monkeypatch)


def lapack_ratio(weight):
    w = weight.detach().double()
    w = w.mT if w.shape[0] > w.shape[1] else w
    error = torch.linalg.matrix_norm(w @ w.mT - torch.eye(len(w), dtype=w.dtype))
    return float(error) / (len(w) * torch.finfo(weight.dtype).eps)


def largest_ratio(shape, steps, lr=0.02):
    weight = marked(shape, torch.float32)
    opt, largest = Muon([weight], lr=lr), 0.0
    generator = torch.Generator().manual_seed(0)
    for k in range(steps):
        weight.grad = torch.randn(shape, generator=generator)
        opt.step()
        if k % 20 in (0, 1, 2, 3) or k > steps - 10:
            largest = max(largest, lapack_ratio(weight))
    return largest


@pytest.mark.parametrize(("shape", "bound"), [((8, 8), 4), ((7, 7), 4), ((32, 32), 2), ((40, 32), 2), ((8, 40), 4)])
def test_rounding_does_not_accumulate(shape, bound):
    assert largest_ratio(shape, 400) <= bound


@pytest.mark.parametrize("shape", [(8, 8), (5, 7), (8, 40)])
def test_rounding_does_not_accumulate_where_no_value_may_be_read(shape, monkeypatch):
    never_read(monkeypatch)
    assert largest_ratio(shape, 300, lr=0.3) <= 4  # 30 without the correction


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "bound"), [((8, 8), 4), ((32, 32), 2), ((64, 64), 2), ((8, 40), 4), ((40, 32), 2)])
def test_rounding_does_not_accumulate_in_ten_thousand_steps(shape, bound):
    assert largest_ratio(shape, 10_000) <= bound


@pytest.mark.parametrize("fault", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("shape", [(12, 4), (6, 5), (24, 3)])
def test_faults_are_skipped_and_counted(shape, fault, monkeypatch):
    rows = shape[0] // 2
    for _ in range(2):
        weight = marked(shape, torch.float32, blocks=2)
        opt = Muon([weight], lr=0.05)
        for k in range(4):
            weight.grad = gaussian(*shape, dtype=torch.float32, seed=k)
            before, momentum = weight.detach().clone(), copy.deepcopy(opt.state[weight].get("momentum_buffer"))
            if k == 2:
                weight.grad[0, 0] = fault
            opt.step()
            if k == 2:
                assert torch.equal(weight[:rows], before[:rows])
                assert torch.equal(opt.state[weight]["momentum_buffer"][:rows], momentum[:rows])
                assert not torch.equal(weight[rows:], before[rows:])
        metrics = opt.metrics()
        assert metrics["skipped_blocks"] == 1
        assert metrics["orthogonality_error"] < 1e-5
        never_read(monkeypatch)


def test_faults_are_raised_where_asked_for():
    weight = marked((6, 6), torch.float32)
    opt = Muon([weight], lr=0.05, nonfinite="raise")
    start = weight.detach().clone()
    weight.grad = torch.full_like(weight, math.nan)
    with pytest.raises(FloatingPointError, match="Nothing was changed"):
        opt.step()
    assert torch.equal(weight, start)
    assert not opt.state


@pytest.mark.parametrize("shape", [(12, 4), (6, 5), (24, 3)])
def test_momentum_that_is_not_finite_stops_its_block_only(shape):
    weight = marked(shape, torch.float32, blocks=2)
    opt = Muon([weight], lr=0.05)
    weight.grad = gaussian(*shape, dtype=torch.float32)
    opt.step()
    opt.state[weight]["momentum_buffer"][0, 0] = math.nan
    before = weight.detach().clone()
    opt.step()
    assert torch.equal(weight[: shape[0] // 2], before[: shape[0] // 2])
    assert not torch.equal(weight[shape[0] // 2 :], before[shape[0] // 2 :])
    assert opt.metrics()["skipped_blocks"] == 1


@pytest.mark.parametrize("change", [lambda w: 1e4 * w, lambda w: 0.01 * w, lambda w: w + 0.1 * drawn(*w.shape).to(w)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(6, 6), (9, 6), (4, 20)])
def test_a_value_written_through_data_is_back_within_ten_steps(shape, dtype, change):
    weight = marked(shape, dtype)
    opt = Muon([weight], lr=0.01)
    for step in range(11):
        if step == 1:
            weight.data.copy_(change(weight.data))
            assert orthogonality_error(weight) > 0.1
        weight.grad = gaussian(*shape, dtype=dtype, seed=step)
        opt.step()
    assert orthogonality_error(weight) <= error_at_rounding(*shape, dtype)


@pytest.mark.parametrize("columns", [6, 9, 15])
def test_where_nothing_can_be_read_such_a_value_stays_finite(columns, monkeypatch):
    """It is not put back, but counted, and the block beside it goes on."""
    never_read(monkeypatch)
    weight = marked((12, columns), torch.float32, blocks=2)
    opt = Muon([weight], lr=0.01)
    for step in range(12):
        if step == 2:
            weight.data[:6] *= 40
            before = weight.detach().clone()
        weight.grad = gaussian(12, columns, dtype=torch.float32, seed=step)
        opt.step()
    assert torch.equal(weight[:6], before[:6])
    assert not torch.equal(weight[6:], before[6:])
    assert orthogonality_error(weight[6:].detach()) <= error_at_rounding(6, columns, torch.float32)
    assert opt.metrics()["skipped_blocks"] == 10


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1e15])
@pytest.mark.parametrize("shape", [(5, 5), (6, 5), (16, 3)])
def test_any_scale_of_the_gradient_is_the_same_step(shape, scale):
    x, m = point(*shape, dtype=torch.float32), gaussian(*shape, dtype=torch.float32)
    small = step_along(x, scale * m, momentum=0.0)
    torch.testing.assert_close(small, step_along(x, m, momentum=0.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(6, 6), (4, 6), (16, 3)])
def test_longer_angles_are_clamped_and_counted(shape, monkeypatch):
    for _ in range(2):
        weight = marked(shape, torch.float32)
        start = weight.detach().clone()
        opt = Muon([weight], lr=100.0)
        weight.grad = gaussian(*shape, dtype=torch.float32)
        opt.step()
        torch.testing.assert_close(weight.detach(), step_along(start, weight.grad, MAX_ANGLE), rtol=0, atol=1e-4)
        assert opt.metrics()["clamped_steps"] == 1
        assert math.pi / 2 > MAX_ANGLE
        never_read(monkeypatch)


# The learning rate.


def test_schedules_and_scales_of_the_learning_rate():
    weights = [marked((5, 5)) for _ in range(3)]
    scaled = Muon(weights[:1], lr=0.1, orthogonal_lr_scale=0.5)
    scheduled = Muon(weights[1:2], lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(scheduled, lambda _: 0.5)
    tensor = Muon(weights[2:], lr=torch.tensor(0.05))
    for opt, weight in zip((scaled, scheduled, tensor), weights, strict=True):
        weight.grad = gaussian(5, 5)
        opt.step()
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2], rtol=0, atol=1e-8)  # 0.05 in float32


def test_the_adjustment_of_the_rate_acts_on_unmarked_parameters_only():
    results = []
    for adjust in (None, "match_rms_adamw"):
        weight, free = marked((12, 3)), nn.Parameter(gaussian(12, 3))
        weight.grad, free.grad = gaussian(12, 3), gaussian(12, 3)
        Muon([weight, free], lr=0.1, adjust_lr_fn=adjust).step()
        results.append((weight.detach(), free.detach()))
    assert torch.equal(results[0][0], results[1][0])
    assert not torch.equal(results[0][1], results[1][1])


# torch.optim's contract.

OPTIONS = [
    {},
    {"momentum": 0.8, "nesterov": False},
    {"weight_decay": 0.0, "adjust_lr_fn": "match_rms_adamw"},
    {"ns_steps": 3, "ns_coefficients": (2.0, -1.5, 0.5), "eps": 1e-5},
    {"lr": torch.tensor(0.02)},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_unmarked_parameters_train_as_with_torch(options, dtype):
    shapes = [(7, 3), (4, 4), (3, 8)]
    mine, other = ([nn.Parameter(gaussian(*s, seed=k).to(dtype)) for k, s in enumerate(shapes)] for _ in range(2))
    neighbour = layout("gates")
    ours = Muon([mine[0], neighbour, *mine[1:]], **{"lr": 0.02, **copy.deepcopy(options)})
    theirs = torch.optim.Muon(other, **{"lr": 0.02, **copy.deepcopy(options)})
    for step in range(20):
        neighbour.grad = gaussian(12, 4, dtype=torch.float32, seed=step)
        for params in (mine, other):
            for k, p in enumerate(params):
                p.grad = gaussian(*p.shape, seed=100 * step + k).to(dtype)
        gradients = [p.grad.clone() for p in mine]
        ours.step()
        theirs.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(mine, gradients, strict=True)) or dtype == torch.bfloat16
    for p, q in zip(mine, other, strict=True):
        assert torch.equal(p, q)
        assert ours.state[p].keys() == theirs.state[q].keys()
        assert all(torch.equal(ours.state[p][key], value) for key, value in theirs.state[q].items())
    assert orthogonality_error(neighbour) < 1e-5


def test_it_is_torchs_own_class_with_torchs_defaults_and_signature():
    ours, theirs = Muon([torch.zeros(1, 1)]), torch.optim.Muon([torch.zeros(1, 1)])
    assert isinstance(ours, torch.optim.Muon)
    assert {key: ours.defaults[key] for key in theirs.defaults} == theirs.defaults
    given = (0.2, 0.3, 0.8, False, (1.0, 2.0, 3.0), 1e-3, 4, "original")
    ours, theirs = Muon([torch.zeros(1, 1)], *given), torch.optim.Muon([torch.zeros(1, 1)], *given)
    assert {key: ours.defaults[key] for key in theirs.defaults} == theirs.defaults


@pytest.mark.parametrize(
    "arguments", [{"lr": -1.0}, {"momentum": -0.1}, {"weight_decay": -1}, {"adjust_lr_fn": "x"}, {"lr": torch.ones(2)}]
)
def test_refuses_what_torch_refuses(arguments):
    messages = []
    for build in (Muon, torch.optim.Muon):
        with pytest.raises(ValueError, match=r".") as error:
            build([marked((3, 3))], **arguments)
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_what_is_not_a_matrix_is_refused_unless_it_is_marked():
    with pytest.raises(ValueError, match="only supports 2D parameters"):
        Muon([layout("filters"), nn.Parameter(torch.zeros(3))])
    Muon([layout("filters")])
    free = nn.Parameter(torch.zeros(2, 2, dtype=torch.complex64))
    free.grad = torch.ones_like(free)
    with pytest.raises(RuntimeError, match="complex"):
        Muon([free, marked((3, 3))]).step()


OTHERS = {
    "unit norm": lambda: mark_unit_norm(nn.Parameter(gaussian(4, 5, dtype=torch.float32))),
    "spectral": lambda: mark_spectral(nn.Parameter(gaussian(4, 5, dtype=torch.float32))),
    "positive": lambda: mark_positive(nn.Parameter(torch.ones(3, 3))),
    "free rows of filters": lambda: mark_orthogonal(nn.Parameter(torch.randn(4, 2, 2)), blocks=2, which=(0,)),
    "complex free rows": lambda: mark_orthogonal(
        nn.Parameter(torch.randn(4, 2, dtype=torch.complex64)), blocks=2, which=(0,)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_it_cannot_train_is_refused_with_the_remedy(name):
    with pytest.raises(ValueError, match="SGD, Adam"):
        Muon([OTHERS[name]()])


def test_a_mark_made_later_is_refused_before_anything_is_written():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    mark_orthogonal(model[0], "weight")
    opt = Muon(model.parameters(), lr=0.1)
    mark_unit_norm(model[1], "weight")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ValueError, match="SGD, Adam"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not opt.state
    assert "SGD, Adam" in check(model, opt)[0]


@pytest.mark.parametrize("option", ["retraction", "metric", "second_moment"])
def test_options_of_other_optimizers_are_refused(option):
    with pytest.raises(ValueError, match=option):
        Muon([{"params": [marked((3, 3))], option: "polar"}])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("steps", [1, 3, 6])
def test_a_resumed_run_is_the_same_bit_for_bit(dtype, steps, tmp_path):
    def build():
        names = ("gates", "wide", "uneven", "filters")
        parameters = [mark_orthogonal(nn.Parameter(gaussian(*LAYOUTS[k][0]).to(dtype)), **LAYOUTS[k][1]) for k in names]
        parameters.append(nn.Parameter(gaussian(3, 3).to(dtype)))
        return parameters, Muon(parameters, lr=0.05)

    def train(parameters, opt, first, count):
        for k in range(first, first + count):
            for p in parameters:
                p.grad = gaussian(*p.shape, seed=k).to(dtype)
            opt.step()

    parameters, opt = build()
    train(parameters, opt, 0, steps)
    torch.save({"values": [p.detach() for p in parameters], "opt": opt.state_dict()}, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    others, resumed = build()
    with torch.no_grad():
        for p, value in zip(others, loaded["values"], strict=True):
            p.copy_(value)
    resumed.load_state_dict(loaded["opt"])
    train(parameters, opt, steps, 5)
    train(others, resumed, steps, 5)
    assert all(torch.equal(p, q) for p, q in zip(parameters, others, strict=True))
    expected = {"momentum_buffer", *UNMOVED} | ({"master"} if dtype == torch.bfloat16 else set())
    assert set(opt.state[parameters[0]]) == expected


@pytest.mark.parametrize("shape", [(4, 4), (6, 3)])
def test_a_checkpoint_of_torch_enters_the_frame_and_leaves_it(shape):
    stock = nn.Parameter(point(*shape))
    theirs = torch.optim.Muon([stock], lr=0.0)
    stock.grad = gaussian(*shape)
    theirs.step()
    momentum = theirs.state[stock]["momentum_buffer"]
    weight = mark_orthogonal(nn.Parameter(stock.detach().clone()))
    ours = Muon([weight], lr=0.0)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    weight.grad = torch.zeros_like(weight)
    ours.step()
    square = shape[0] == shape[1]
    expected = 0.95 * (momentum @ weight.detach().mT if square else momentum)
    torch.testing.assert_close(ours.state[weight]["momentum_buffer"], expected)
    unmark(weight)
    ours.step()
    torch.testing.assert_close(ours.state[weight]["momentum_buffer"], 0.95**2 * momentum)


def test_hooks_closures_and_metrics():
    layer = nn.Linear(4, 4, bias=False)
    mark_orthogonal(layer, "weight")
    opt = Muon(layer.parameters(), lr=0.1)
    fired = []
    opt.register_step_pre_hook(lambda *_: fired.append("before"))
    opt.register_step_post_hook(lambda *_: fired.append("after"))

    def closure():
        opt.zero_grad()
        loss = layer(torch.ones(2, 4)).square().sum()
        loss.backward()
        return loss

    assert opt.step(closure).item() > 0
    assert fired == ["before", "after"]
    assert set(opt.metrics()) == set(Adam(layer.parameters()).metrics())
    assert check(layer, opt) == []


def test_without_torchs_muon_the_rest_works():
    """As with torch before 2.9."""
    program = (
        "import torch; del torch.optim.Muon\n"
        "import manifold_opt\n"
        "w = manifold_opt.mark_orthogonal(torch.nn.Parameter(torch.eye(3)))\n"
        "w.grad = torch.ones(3, 3); manifold_opt.Adam([w]).step()\n"
        "try: manifold_opt.Muon([w])\n"
        "except RuntimeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "torch 2.9" in done.stdout


# Where no value may be read, and compiled.


@pairs(name=LAYOUTS, dtype=DTYPES, lr=[0.02, 0.3, 1.2])
def test_where_nothing_can_be_read_the_steps_are_the_same(name, dtype, lr, monkeypatch):
    results = []
    for _ in range(2):
        weight = layout(name, dtype)
        opt = Muon([weight], lr=lr)
        for k in range(5):
            weight.grad = gaussian(*weight.shape, dtype=dtype, seed=k)
            opt.step()
        results.append(weight.detach().clone())
        never_read(monkeypatch)
    torch.testing.assert_close(*results, rtol=0, atol=2e-4 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("shape", [(5, 5), (16, 3)])
def test_a_learning_rate_that_cannot_be_read(shape, monkeypatch):
    weight, twin = marked(shape), marked(shape)
    opt = Muon([twin], lr=0.3)
    twin.grad = gaussian(*shape)
    opt.step()
    never_read(monkeypatch)
    opt = Muon([weight], lr=torch.tensor(0.3, dtype=torch.float64))
    weight.grad = gaussian(*shape)
    opt.step()
    torch.testing.assert_close(weight, twin, rtol=0, atol=1e-10)
    opt.param_groups[0]["lr"].fill_(9.0)
    opt.step()
    assert opt.metrics()["clamped_steps"] == 1
    assert orthogonality_error(weight) < 1e-13


@pytest.mark.compiled
def test_a_compiled_step():
    """In one graph."""
    torch._dynamo.reset()
    counters.clear()
    parameters = {compiled: [layout("gates"), layout("wide")] for compiled in (True, False)}
    for compiled, weights in parameters.items():
        opt = Muon(weights, lr=0.02)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            step = torch.compile(opt.step, backend="eager") if compiled else opt.step
            for k in range(5):
                for w in weights:
                    w.grad = gaussian(*w.shape, dtype=torch.float32, seed=k)
                step()
    for a, b in zip(*parameters.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-4)
    assert not counters["graph_break"]


# The cost of a step.


def products(opt, weight, shape):
    """Of a step, in products of p x n by n x p, on average over those from one correction to the next."""
    weight.grad = gaussian(*weight.shape, dtype=weight.dtype)
    opt.step()
    interval = CORRECTION_INTERVAL[torch.float32]
    with FlopCounterMode(display=False) as counter:
        for _ in range(interval):
            opt.step()
    p, n = min(shape), max(shape)
    return counter.get_total_flops() / (interval * 2 * p * p * n)


def test_products_of_a_step():
    """The frame, the sign, B and the product with W, and half a product for the error of W; rectangular 5.5 thin ones.

    A step of 2p x 2p matrices is 8 p / n of a thin product; up to n = 2p an n x n matrix is rotated.
    """
    sign = 12  # of COARSE
    assert products(Muon([w := marked((72, 24), torch.float32, blocks=3)], lr=0.02), w, (24, 24)) == 3 * (sign + 3.5)
    assert products(Muon([w := marked((24, 24), torch.float32)], lr=0.2), w, (24, 24)) == 19 + 3.5 + 2
    assert (
        products(Muon([w := marked((8, 128), torch.float32)], lr=0.02), w, (8, 128)) == 5.5 + (sign + 1) * 8 * 8 / 128
    )
    n, p = 24, 16
    expected = 2 * n / p + 0.5 + (sign + 1) * (n / p) ** 2
    assert products(Muon([w := marked((p, n), torch.float32)], lr=0.02), w, (p, n)) == pytest.approx(expected)


COUNTS = {"square": (((16, 16),), 52, 170), "three gates": (((192, 64), 3), 53, 171), "wide": (((16, 64),), 100, 210)}


@pytest.mark.parametrize("case", COUNTS)
def test_a_step_takes_few_operations_and_calls(case):
    arguments, most_operations, most_calls = COUNTS[case]
    opt, give = warm(*arguments, optimizer=Muon, lr=0.02)
    assert operations(opt).count <= most_operations
    give(101)
    assert calls(opt) <= most_calls + more_calls_of_torch()


def test_as_many_operations_for_a_thousand_blocks():
    counts = [operations(warm((16 * blocks, 16), blocks, optimizer=Muon, lr=0.02)[0]).count for blocks in (2, 500)]
    assert counts[0] == counts[1]


def test_many_small_blocks_share_a_batch():
    weights = [marked((8, 8), torch.float32, seed=k) for k in range(20)]
    opt = Muon(weights, lr=0.02)
    for k in range(3):
        for i, w in enumerate(weights):
            w.grad = gaussian(8, 8, dtype=torch.float32, seed=20 * k + i)
        opt.step()
    assert len(opt._engine.plan.work) < 5
    assert float(max(map(orthogonality_error, weights))) < 1e-5


def test_check_finds_nothing_after_loading():
    """torch adds a key to the defaults of the optimizer then, which its groups do not have."""
    layer = nn.Linear(4, 4, bias=False)
    mark_orthogonal(layer, "weight")
    opt = Muon(layer.parameters())
    layer(torch.ones(1, 4)).sum().backward()
    opt.step()
    opt.load_state_dict(opt.state_dict())
    assert check(layer, opt) == []
