"""Rotations of square blocks: exact at every length, the price, the seam, and what becomes of errors of the point."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt import SGD, Adam, mark_orthogonal, orthogonality_error, retract
from manifold_opt.linalg import matrices
from manifold_opt.linalg.polynomials import polynomial
from manifold_opt.linalg.products import Workspace
from manifold_opt.optim.engine.counters import Counters
from manifold_opt.stiefel import geometry
from manifold_opt.stiefel.retractions import RETRACTIONS
from manifold_opt.stiefel.rotation import (
    _SMALL,
    CORRECTION_INTERVAL,
    OFF_MANIFOLD,
    bounds,
    restore_,
    rotate_,
    rotate_sync_free,
    rotation_minus_identity,
)
from manifold_opt.stiefel.step import Settings, retract_

from ..helpers import DTYPES, FIELDS, UNITARY, each, gaussian, never_read, pairs, point, rounding, tangent
from ..reference import loop as reference

ALL = DTYPES + UNITARY
ROTATIONS = {name: row.rotation for name, row in RETRACTIONS.items() if row.rotation is not None}
POLYNOMIAL = [name for name in ROTATIONS if name != "qr"]
SEAM = 0.49  # of the bound on B = Omega Omega^H, from which on the orthographic retraction is the polar one


def reaches(name, dtype):
    """The bounds on B up to which each polynomial of a retraction goes."""
    return [fit.reach for fit in ROTATIONS[name].fits[dtype]]


def share(dtype):
    """Of the square of a Frobenius norm that the largest eigenvalue has at most, its root: real ones are double."""
    return 1.0 if dtype.is_complex else 0.5**0.5


def of_bound(omega, bound):
    """Skew matrices, scaled so that the bound on the eigenvalues of B is that one, computed from its eigenvalues."""
    double = matrices.float64(omega)
    x = torch.linalg.eigvalsh(double @ double.mH)
    one, two = (x.pow(k).norm(dim=-1) * share(omega.dtype) for k in (1, 2))
    size = torch.minimum(one, two.sqrt())[:, None, None]
    return torch.where(size > 1e-9, double * (bound / size).sqrt(), 0).to(omega.dtype)


def skew(*shape, dtype=torch.float64, bound=1.0, rank=None, seed=1):
    """Random skew matrices ``(B, p, p)`` with such a bound, of full rank or of a given one, even if they are real."""
    double = matrices.in_double(dtype)
    if rank is None:
        return of_bound(matrices.skew(gaussian(*shape, seed=seed, dtype=double)), bound).to(dtype)
    basis = point(shape[0], rank, shape[-1], dtype=double, seed=seed)
    inner = matrices.skew(gaussian(shape[0], rank, rank, dtype=double, seed=seed + 1))
    return of_bound(basis.mH @ inner @ basis, bound).to(dtype)


def alone(dtype):
    """The least rank of a skew matrix. Its bound is the eigenvalue itself."""
    return 1 if dtype.is_complex else 2


def rotated(w, omega, name, *, correct=True):
    """What rotate_ makes of a copy, called as a step does it, with Omega in a buffer; None if it refuses."""
    w, ws = w.clone(), Workspace(None, w)
    return w if rotate_(w, ws.a.copy_(omega), ROTATIONS[name], ws, correct=correct) else None


def shortened(w, omega, name):
    """What rotate_sync_free returns, with Omega in a buffer."""
    ws = Workspace(None, w)
    return rotate_sync_free(w, ws.a.copy_(omega), ROTATIONS[name], ws, correct=True)


def stepped(w, omega, name):
    """What a step of an optimizer makes of a copy, and what it has counted."""
    new, tally = w.clone(), Counters()
    tally.prepare(w.device)
    options = {"metric": "euclidean", "beta": 0.5, "correction_steps": 1}
    retract_(new, omega.clone(), Workspace(None, w), Settings(RETRACTIONS[name], options, tally.count))
    return new, {kind: tally.total(kind) for kind in ("skipped_blocks", "clamped_steps")}


def oracle(w, omega, name):
    return torch.stack([reference.retract(a, b @ a, name) for a, b in zip(w, omega, strict=True)])


ANGLES = {  # by which an eigenvector of Omega with the eigenvalue i t is turned
    "orthographic": torch.asin,
    "polar": torch.atan,
    "cayley": lambda t: 2 * (t / 2).atan(),
    "exp": lambda t: t,
    "qr": torch.atan,  # in two dimensions
}


def turn_of(omega, name):
    """T = Q - I in complex128, from the eigenvalues of Omega: exp(i a) - 1 without the cancellation of short steps."""
    t, u = torch.linalg.eigh(-1j * omega.to(torch.complex128))
    half = ANGLES[name](t) / 2
    return (u * (2j * half.sin() * torch.polar(torch.ones_like(half), half))[..., None, :]) @ u.mH


def close_to(moved, w, omega, name):
    """To the oracle in float64.

    An entry of Q W is at most one, and is rounded once; what is added to W has a few roundings of its own. In double
    precision the oracle, an SVD, an eigenvalue decomposition or a matrix exponential, is off by more than that itself.
    """
    units = 4 if moved.dtype in (torch.float32, torch.complex64) else 24
    expected = oracle(matrices.float64(w), matrices.float64(omega), name)
    torch.testing.assert_close(matrices.float64(moved), expected, rtol=0, atol=units * torch.finfo(w.dtype).eps)


@pytest.mark.parametrize("name", ANGLES)
def test_rotation_by_hand(name):
    """At W = I in two dimensions a step of length t turns by an angle that is known; qr by that of polar."""
    t = 0.6
    angle = ANGLES[name](torch.tensor(t, dtype=torch.float64))
    w, omega = torch.eye(2, dtype=torch.float64)[None], torch.tensor([[[0.0, t], [-t, 0.0]]], dtype=torch.float64)
    expected = torch.tensor([[[angle.cos(), angle.sin()], [-angle.sin(), angle.cos()]]], dtype=torch.float64)
    torch.testing.assert_close(rotated(w, omega, name), expected, rtol=0, atol=1e-15)


@pairs({"p, rank": [(1, None), (2, None), (3, None), (8, "least"), (24, None), (24, 4)]}, name=ROTATIONS, dtype=ALL)
def test_every_length_is_exact(p, rank, dtype, name):
    """From steps too short to be felt up to where each polynomial ends, with and without a correction."""
    w = point(2, p, p, dtype=dtype)
    unit = skew(2, p, p, dtype=matrices.in_double(dtype), rank=alone(dtype) if rank == "least" else rank)
    ends = reaches(name, dtype) if name in POLYNOMIAL else [1e-6, 1e-3, 0.1, 0.5, 1.0]
    for bound in (1e-18, 1e-12, 1e-6, *(0.999 * end for end in ends)):
        omega = (unit * bound**0.5).to(dtype)
        for correct in (False, True):
            moved = rotated(w, omega, name, correct=correct)
            close_to(moved, w, omega, name)
            assert float(geometry.error(moved).max()) < 2 * rounding(moved)


@pairs(name=ROTATIONS, dtype=ALL, rank=[None, 4])
def test_the_longest_steps_of_many_rows_are_exact(rank, dtype, name):
    w = point(1, 150, 150, dtype=dtype)
    omega = skew(1, 150, 150, dtype=dtype, rank=rank, bound=0.999 * reaches(name, dtype)[-1])
    moved = rotated(w, omega, name)
    close_to(moved, w, omega, name)
    assert float(geometry.error(moved).max()) < 2 * rounding(moved)


@pairs(name=POLYNOMIAL, dtype=ALL, length=[1e-9, 1e-6, 1e-3, 0.1])
def test_what_is_added_is_rounded_relative_to_the_step(length, dtype, name):
    """T = Q - I as it is multiplied with W, not what is left of it beside W: a few roundings of its own length.

    What a polynomial is off by comes on top: of degree 1 in proportion to B, of any other up to eps / 2 everywhere.
    """
    omega = skew(2, 8, 8, dtype=dtype, bound=length**2)
    k = next(k for k, reach in enumerate(reaches(name, dtype)) if length**2 <= reach)
    ws, b = Workspace(None, omega), omega @ omega.mH
    turn = rotation_minus_identity(ROTATIONS[name], ws.a.copy_(omega), ws.b.copy_(b), ws.c.copy_(b @ b), k, ws)
    off = 0.5 if k else length**2 / reaches(name, dtype)[0]
    allowed = torch.finfo(dtype).eps * (4 * length + off)
    torch.testing.assert_close(turn.to(torch.complex128), turn_of(omega, name), rtol=0, atol=allowed)


# The price.


def products(function, p, blocks=2):
    """In T, one p x p by p x p product for every block."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / (2 * blocks * p**3)


EXTRA = {"orthographic": 0, "polar": 1, "cayley": 1, "exp": 1}  # s(B) Omega, where s is not zero


@pairs(name=POLYNOMIAL, dtype=ALL, correct=[False, True])
def test_products_of_every_degree(name, dtype, correct):
    """B and T W; B^2 from degree 2 on; one for every two degrees above that, of the exponential in either series."""
    w, before = point(2, 16, 16, dtype=dtype), 0.0
    for fit in ROTATIONS[name].fits[dtype]:
        degree = len(fit.coefficients)
        horner = (degree - 2) // 2 if degree > 2 else 0
        expected = 2 + (degree > 1) + horner * (2 if name == "exp" else 1) + EXTRA[name] + correct
        for bound in (before + 0.01 * (fit.reach - before), 0.99 * fit.reach):
            omega = skew(2, 16, 16, dtype=dtype, rank=alone(dtype), bound=bound)
            far = correct and bound > _SMALL  # then what Q does to the error counts too
            assert products(lambda: rotated(w, omega, name, correct=correct), 16) == expected + far  # noqa: B023
        before = fit.reach


@pytest.mark.parametrize("dtype", ALL)
def test_products_of_qr(dtype):
    """B and T W; the factorization and the triangular solve are not counted."""
    w, omega = point(2, 16, 16, dtype=dtype), skew(2, 16, 16, dtype=dtype, bound=0.1)
    assert products(lambda: rotated(w, omega, "qr", correct=False), 16) == 2
    assert products(lambda: rotated(w, omega, "qr"), 16) == 4
    assert products(lambda: rotated(w, 0.1 * omega, "qr"), 16) == 3


def test_the_longest_step_of_a_batch_says_how_many_products():
    w, omega = point(2, 16, 16), skew(2, 16, 16, rank=2)
    first, second = reaches("orthographic", torch.float64)[:2]
    lengths = torch.tensor([0.9 * first, 0.9 * second], dtype=torch.float64)[:, None, None].sqrt()
    assert products(lambda: rotated(w, omega * lengths, "orthographic", correct=False), 16) == 3
    assert products(lambda: rotated(w, omega * lengths[0], "orthographic", correct=False), 16) == 2


# How long a step is, and where a retraction ends.


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(
    ("p", "rank"), [(1, None), (2, None), (5, None), (40, None), (150, None), (40, "least"), (40, 6)]
)
def test_bounds_are_bounds(p, rank, dtype):
    """On the largest eigenvalue of B, to rounding; that of the least rank itself, and (p / 2)^(1/4) of it at most."""
    omega = skew(4, p, p, dtype=dtype, rank=alone(dtype) if rank == "least" else rank, bound=0.7)
    omega = omega * torch.tensor([1e-3, 0.3, 1.0, 50.0]).to(omega.real.dtype)[:, None, None]
    size = bounds(omega, Workspace(None, omega))
    exact = torch.linalg.matrix_norm(matrices.float64(omega), 2) ** 2
    slack = 1 + 2 * p**0.5 * torch.finfo(dtype).eps
    assert bool((size * slack >= exact).all())
    most = 1.0 if rank == "least" else max(1.0, (p * share(dtype) ** 2) ** 0.25)
    assert bool((size <= exact * most * slack).all())


@pairs(name=ROTATIONS, dtype=ALL, rank=[None, 4])
def test_a_retraction_ends_where_its_bound_says(name, dtype, rank):
    """One that is too long is left to another path, and nothing has been written; one without a length too."""
    w = point(2, 12, 12, dtype=dtype)
    end = reaches(name, dtype)[-1]
    near, far = (skew(2, 12, 12, dtype=dtype, rank=rank, bound=share * end) for share in (0.9999, 1.0001))
    assert rotated(w, near, name) is not None
    without = near.clone()
    without[1, 0, 0] = float("nan")
    longest = near.clone()
    longest[1] = far[1]
    for omega in (far, longest, 1e3 * far, without, torch.full_like(far, float("inf"))):
        ws, start = Workspace(None, w), w.clone()
        held = ws.a.copy_(omega)
        assert not rotate_(start, held, ROTATIONS[name], ws, correct=True)
        assert torch.equal(start, w)
        torch.testing.assert_close(held, omega, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(ws.b, omega @ omega.mH, equal_nan=True)


def test_the_seam_of_the_orthographic_retraction():
    """The bound, not the norm: of many eigenvalues of like size it is up to 1.3 times the largest, for 12 rows."""
    assert reaches("orthographic", torch.float32)[-1] == reaches("orthographic", torch.complex128)[-1] == SEAM
    assert ROTATIONS["orthographic"].fallback is ROTATIONS["polar"]
    w = point(2, 12, 12)
    for rank in (None, 2):
        for bound, name, other in ((0.4899, "orthographic", "polar"), (0.4901, "polar", "orthographic")):
            omega = skew(2, 12, 12, rank=rank, bound=bound)
            moved = retract(w, omega @ w, "orthographic")
            close_to(moved, w, omega, "orthographic")
            apart = torch.linalg.matrix_norm(moved - rotated(w, 0.999 * omega, other))
            assert float(apart.min()) > 0.01
            if name == "polar":
                torch.testing.assert_close(moved, retract(w, omega @ w, "polar"), rtol=0, atol=1e-14)


@pytest.mark.parametrize("shape", [(12, 12), (5, 9), (9, 5)])
def test_what_is_too_long_or_rectangular_moves_by_the_polar_retraction(shape):
    w = point(2, *shape)
    v = geometry.riemannian_gradient(w, gaussian(2, *shape))
    torch.testing.assert_close(retract(w, v, "orthographic"), retract(w, v, "polar"), rtol=0, atol=0)


@pairs(name=ROTATIONS, dtype=ALL, side=[0.99, 1.01, 60.0], rank=[None, 4])
def test_a_retraction_is_the_same_function_beyond_its_polynomials(side, rank, name, dtype):
    """From there on the retraction goes on by other means, in steps of length up to eight: the same function."""
    w = point(2, 12, 12, dtype=dtype)
    omega = skew(2, 12, 12, dtype=dtype, rank=rank, bound=side * reaches(name, dtype)[-1])
    moved = retract(w, omega @ w, name)
    assert float(geometry.error(moved).max()) < 2 * rounding(moved)
    # The rounding of V, of which Omega is made again, is in proportion to its length.
    units = (8 if dtype in (torch.float32, torch.complex64) else 24) * (1 + (side * reaches(name, dtype)[-1]) ** 0.5)
    expected = oracle(matrices.float64(w), matrices.float64(omega), name)
    torch.testing.assert_close(matrices.float64(moved), expected, rtol=0, atol=units * torch.finfo(dtype).eps)


@pairs(
    reading=[True, False],
    name=ROTATIONS,
    dtype=[torch.float32, torch.complex64, torch.float64],
    length=[1e-15, 1e-6, 1e4, 1e7, 1e18],
)
def test_no_length_is_too_short_or_too_long(length, dtype, name, reading, monkeypatch):
    """At W = I, where even the shortest shows. The eighth power of a length, which the norm of B^2 is made of, is more
    than float32 can hold from 6e4 on, and zero up to 3e-6; its fourth, of the norm of B, from 4e9 on.
    """
    w = torch.eye(4, dtype=dtype).repeat(2, 1, 1)
    omega = skew(2, 4, 4, dtype=matrices.in_double(dtype))
    v = (length * omega).to(dtype)
    if not reading:
        never_read(monkeypatch)
    moved, counts = stepped(w, v, name)
    longest = 1e5 if reading else 1.0
    assert counts == {"skipped_blocks": 0, "clamped_steps": 2 if length > longest else 0}
    assert float(geometry.error(moved).max()) < 2 * rounding(moved)
    if length < 1:
        torch.testing.assert_close(matrices.skew(moved), v, rtol=4 * torch.finfo(dtype).eps, atol=length**2)
    else:
        assert float(torch.linalg.matrix_norm(moved - w).min()) > 0.5


@pytest.mark.parametrize("name", ROTATIONS)
def test_each_matrix_of_a_batch_moves_by_its_own_length(name):
    """Some by a polynomial, some beyond it, one not at all, and one without a length, which stays and is counted."""
    end = reaches(name, torch.float64)[-1]
    w = point(6, 6, 6)
    lengths = torch.tensor([1e-4, 0.5 * end, 2 * end, 50.0, 0.0, 1.0], dtype=torch.float64)
    omega = skew(6, 6, 6) * lengths[:, None, None].sqrt()
    omega[5, 0, 0] = float("nan")
    moved, counts = stepped(w, omega, name)
    for k in range(4):
        torch.testing.assert_close(moved[k], retract(w[k], omega[k] @ w[k], name), rtol=0, atol=1e-13)
        assert float(torch.linalg.matrix_norm(moved[k] - w[k])) > 1e-3
    assert torch.equal(moved[4:], w[4:])
    assert counts == {"skipped_blocks": 1, "clamped_steps": 0}


@pairs(dtype=UNITARY, p=[1, 4, 40], t=[0.02, 0.3, 0.699, 0.701, 0.9])
def test_a_lone_eigenvalue_of_a_unitary_step(p, t, dtype):
    """They do not come in pairs: of rank one, that of B is as large as its Frobenius norm, and no less."""
    w = point(2, p, p, dtype=dtype)
    u = point(2, 1, p, seed=4, dtype=dtype)
    moved = retract(w, 1j * t * u.mH @ u @ w, "orthographic")
    assert float(geometry.error(moved).max()) < 2 * rounding(moved)
    angle = math.asin(t) if t * t < SEAM else math.atan(t)
    expected = w + (complex(math.cos(angle), math.sin(angle)) - 1) * u.mH @ u @ w
    torch.testing.assert_close(moved, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", FIELDS)
@pytest.mark.parametrize("degree", [1, 2, 4, 6, 8])
def test_polynomials_of_matrices(degree, dtype):
    """Against the powers, one by one; onto another matrix, in its own memory too. With a spare buffer, B stays."""
    a = gaussian(3, 5, 5, dtype=dtype)
    b = a @ a.mH / 20
    coefficients = [(-0.7) ** k * (k + 1) for k in range(1, degree + 1)]
    expected = sum(c * torch.linalg.matrix_power(b, k) for k, c in enumerate(coefficients, 1))
    ws, before = Workspace(None, b), b.clone()
    for c in (b @ b, *([None] if degree == 1 else [])):
        torch.testing.assert_close(polynomial(coefficients, b, c, ws, out=ws.d, spare=ws.x), expected)
        assert torch.equal(b, before)
        onto = a.clone()
        assert polynomial(coefficients, b.clone(), c, ws, out=onto, onto=onto) is onto
        torch.testing.assert_close(onto, a + expected)


# Errors of the point.


@pytest.mark.parametrize("name", ROTATIONS)
@pytest.mark.parametrize("dtype", ALL)
def test_a_correction_takes_the_error_off(name, dtype):
    """All but its square, 3/4 |E|^2, and what does not commute with a step of length t, t |E|. Without, nothing."""
    length, distance = 1e-3, 0.3 * OFF_MANIFOLD[dtype]
    w = point(3, 8, 8, dtype=torch.complex128 if dtype.is_complex else torch.float64)
    off = matrices.sym(gaussian(3, 8, 8, dtype=w.dtype, seed=4))
    w = ((torch.eye(8) + distance / 2 * off / torch.linalg.matrix_norm(off, keepdim=True)) @ w).to(dtype)
    omega = skew(3, 8, 8, dtype=dtype, bound=length**2)
    before = float(geometry.error(w).min())
    assert before > 0.9 * distance
    assert float(geometry.error(rotated(w, omega, name, correct=False)).min()) > 0.9 * distance
    left = 0.75 * distance**2 + length * distance + 2 * rounding(w)
    assert left < 0.02 * before
    assert float(geometry.error(rotated(w, omega, name)).max()) < left


@pairs(name=ROTATIONS, dtype=ALL, distance=[0.01, 0.5, 3.0, 1e6])
def test_a_point_far_off_is_restored_first(distance, name, dtype):
    """And then moves as the nearest point does."""
    w = point(3, 6, 6, dtype=dtype)
    omega = skew(3, 6, 6, dtype=dtype, bound=0.01)
    moved = w.clone()
    moved[1] += distance * gaussian(6, 6, dtype=dtype, seed=5) / 6
    u, _, vh = torch.linalg.svd(matrices.float64(moved[1]))
    nearest = w.clone()
    nearest[1] = (u @ vh).to(dtype)
    after = rotated(moved, omega, name)
    torch.testing.assert_close(after, rotated(nearest, omega, name), rtol=0, atol=8 * torch.finfo(dtype).eps)
    assert float(geometry.error(after).max()) < 2 * rounding(after)


@pytest.mark.parametrize("dtype", ALL)
def test_only_what_is_off_is_restored(dtype):
    w = point(4, 5, 5, dtype=dtype)
    w[1] *= 1.5
    w[2] *= 1 + 0.1 * torch.finfo(dtype).eps ** 0.5  # as much as a correction takes off
    before = w.clone()
    restore_(w, matrices.float64(w @ w.mH - torch.eye(5)).to(dtype))
    assert torch.equal(w[[0, 2, 3]], before[[0, 2, 3]])
    torch.testing.assert_close(w[1], before[1] / 1.5, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pairs(name=ROTATIONS, dtype=ALL, off=[1.0, 1.01], others=[0.0, 0.01])
def test_a_block_without_a_step_keeps_its_bits(others, off, name, dtype):
    """Whatever its error, whatever the others do, also in a step that corrects."""
    w = off * point(3, 7, 7, dtype=dtype)
    omega = skew(3, 7, 7, dtype=dtype)
    omega = omega * torch.tensor([others**0.5, 0.0, others**0.5]).to(omega.real.dtype)[:, None, None]
    for correct in (False, True):
        moved = rotated(w, omega, name, correct=correct)
        assert torch.equal(moved[1], w[1])
        assert torch.equal(moved, w) == (others == 0)


# In an optimizer.


def square(blocks, p, *, dtype=torch.float32, gain=1.0, seed=0):
    value = gain * point(blocks, p, p, dtype=dtype, seed=seed).reshape(-1, p)
    return mark_orthogonal(nn.Parameter(value), blocks=blocks, gain=gain)


def give(weight, seed, scale=1.0):
    weight.grad = scale * gaussian(*weight.shape, dtype=weight.dtype, seed=seed)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("name", ROTATIONS)
def test_errors_are_corrected_every_few_steps(name, dtype):
    """By a product more; of a parameter's own steps, which its state counts, also where a checkpoint is loaded."""
    interval = CORRECTION_INTERVAL[dtype]
    assert interval == (4 if dtype in (torch.float32, torch.complex64) else 2)
    weight = square(2, 16, dtype=dtype)
    opt = Adam([weight], lr=1e-7, retraction=name)
    costs = {}
    for step in range(1, 3 * interval + 1):
        if step == 2 * interval - 1:
            weight = mark_orthogonal(nn.Parameter(weight.detach().clone()), blocks=2)
            saved = copy.deepcopy(opt.state_dict())
            opt = Adam([weight], lr=1e-7, retraction=name)
            opt.load_state_dict(saved)
        give(weight, step)
        costs[step] = products(opt.step, 16)
    costs.pop(1)  # the first step of an optimizer looks at its weights, whether they are on their manifold
    costs.pop(2 * interval - 1)
    least = min(costs.values())
    assert costs == {step: least + (step % interval == 0) for step in costs}


@pairs(
    {
        "optimizer, name": [*((SGD, name) for name in ROTATIONS), (Adam, "orthographic")],
        "shape, blocks": [((6, 6), 1), ((15, 5), 3), ((900, 3), 300), ((160, 160), 1)],
    },
    distance=[1e-4, 1e-3, 0.9],
)
def test_a_point_off_the_manifold_is_back_within_an_interval(optimizer, name, shape, blocks, distance):
    """Even where nobody has been told: a write through ``.data`` is not counted."""
    p = shape[1]
    weight = square(blocks, p)
    opt = optimizer([weight], lr=1e-5, retraction=name)
    for step in range(1 + CORRECTION_INTERVAL[torch.float32]):
        if step == 1:
            off = gaussian(blocks, p, p, dtype=torch.float32)
            off = distance * off / torch.linalg.matrix_norm(off, 2, keepdim=True)
            weight.data += off.reshape(shape)
            assert orthogonality_error(weight) > 0.1 * distance
        give(weight, step)
        opt.step()
    error = geometry.error(weight.detach().view(blocks, p, p))
    # A correction leaves 3/4 |E|^2 of an error up to 2 sqrt(eps), 3 eps.
    assert float(error.max()) < matrices.error_at_rounding(p, p, torch.float32) + 3 * torch.finfo(torch.float32).eps


@pairs(optimizer=[SGD, Adam], dtype=DTYPES, every=[2, 3, 4])
def test_blocks_are_corrected_whenever_their_gradients_come(optimizer, dtype, every):
    """Parameters of one group, gradients now for the one and now for the other: each counts its own steps."""
    weights = [square(3, 4, dtype=dtype, seed=1), square(3, 4, dtype=dtype, seed=2), square(1, 40, dtype=dtype)]
    opt = optimizer(weights, lr=1e-4)
    for step in range((2 + CORRECTION_INTERVAL[dtype]) * every):
        if step == 2 * every:
            for weight in weights:
                weight.data *= 1.01
        for k, weight in enumerate(weights):
            weight.grad = gaussian(*weight.shape, dtype=dtype, seed=step) if (step + k) % every == 0 else None
        opt.step()
    for weight, p in zip(weights, (4, 4, 40), strict=True):
        assert orthogonality_error(weight) <= matrices.error_at_rounding(p, p, dtype)


@pairs(gain=[1.0, 1.7], gradient=[0.0, float("nan")], blocks=[1, 3])
def test_a_block_without_a_step_is_not_brought_back(blocks, gain, gradient):
    """Not by itself, and not where the others of its parameter move."""
    weight = square(blocks, 2, gain=gain)
    opt = SGD([weight], lr=0.1)
    for step in range(6):
        give(weight, step)
        weight.grad[:2] = gradient
        if step == 1:
            weight.data *= 1.01
            before = weight.detach().clone()
        opt.step()
    assert torch.equal(weight[:2], before[:2])
    assert blocks == 1 or not torch.equal(weight, before)


@each(
    {
        "name, p, blocks, gain": [
            ("orthographic", 150, 3, 1.0),
            *((name, *case) for name in ROTATIONS for case in ((8, 5, 1.7), (40, 5, 1.0), (3, 300, 1.0))),
        ]
    },
    dtype=DTYPES,
)
def test_a_long_step_of_one_block_is_not_felt_by_the_others(name, p, blocks, dtype, gain):
    """To rounding, for it may ask for a polynomial of another degree, or for another path; one does not move at all."""

    def run(scale):
        weight = square(blocks, p, dtype=dtype, gain=gain)
        start = weight.detach().clone().view(blocks, p, p)
        opt = SGD([weight], lr=0.04 / p, retraction=name)
        for step in range(4):
            give(weight, step)
            weight.grad[2 * p : 3 * p] *= scale
            weight.grad[p : 2 * p] = 0
            opt.step()
        return weight.detach().view(blocks, p, p), start

    quiet, start = run(0.01)
    assert torch.equal(quiet[1], start[1])
    others = [k for k in range(blocks) if k != 2]
    for scale in (1.0, 10.0, 1e3, 1e9):
        loud, _ = run(scale)
        assert float(geometry.error(loud / gain).max()) < 2 * rounding(loud)
        assert torch.equal(loud[1], start[1])
        torch.testing.assert_close(loud[others], quiet[others], rtol=0, atol=16 * gain * torch.finfo(dtype).eps)
        assert not torch.equal(loud[2], quiet[2])


# Trajectories.


@pairs({"p, part": [(2, 0.999), (24, 0.999), (24, 0.25)]}, reading=[True, False], name=ROTATIONS, dtype=ALL)
def test_many_steps_as_long_as_they_may_be_stay_at_rounding(p, dtype, name, part, reading):
    """A constant rotation, so that what its polynomial leaves has always the same sign.

    Others than the default have longer steps, which leave more from one correction to the next, and where a correction
    takes off less: of an error between eigenvectors that are turned by a and -a all but 2 sin(a / 2).
    """
    w = point(2, p, p, dtype=dtype)
    limit = matrices.error_at_rounding(p, p, dtype) * (1 if name == "orthographic" else 2)
    omega = skew(2, p, p, dtype=dtype, rank=alone(dtype), bound=part * reaches(name, dtype)[-1])
    for step in range(1, 61):
        if reading:
            w = rotated(w, omega, name, correct=step % CORRECTION_INTERVAL[dtype] == 0)
        else:
            w = shortened(w, omega, name)[0]
        if step % 7 == 0:  # between corrections, and right after one
            assert float(geometry.error(w).max()) <= limit


@pairs(reading=[True, False], name=ROTATIONS, optimizer=[SGD, Adam], dtype=DTYPES)
def test_a_whole_run_stays_at_rounding(dtype, optimizer, name, reading, monkeypatch):
    """Steps of all lengths, of three blocks of unlike ones."""
    if not reading:
        never_read(monkeypatch)
    weight = square(3, 5, dtype=dtype)
    opt = optimizer([weight], lr=0.1, retraction=name)
    for step in range(80):
        opt.param_groups[0]["lr"] = 0.5 ** (step % 16)
        give(weight, step)
        weight.grad[:5] *= 1e-3
        opt.step()
        assert orthogonality_error(weight) <= matrices.error_at_rounding(5, 5, dtype)


# Where nothing can be read.


@pairs(name=ROTATIONS, dtype=ALL, rank=[None, 4])
def test_where_nothing_can_be_read_short_steps_are_the_same(name, dtype, rank):
    """By one polynomial for all lengths, up to where it ends, and with every error corrected."""
    w = point(5, 8, 8, dtype=dtype)
    end = reaches(name, dtype)[-1]
    lengths = torch.tensor([1e-12, 1e-4, 0.5 * end, 0.999 * end, 0.0]).to(w.real.dtype).sqrt()
    omega = skew(5, 8, 8, dtype=dtype, rank=rank) * lengths[:, None, None]
    new, short, near = shortened(w, omega, name)
    assert near.all()
    close_to(new[:4], w[:4], omega[:4], name)
    assert float(geometry.error(new).max()) < 2 * rounding(new)
    assert not short.any()


@pairs(name=ROTATIONS, dtype=ALL, rank=[None, 4], length=[1.01, 1e3])
def test_where_nothing_can_be_read_long_steps_are_shortened_and_counted(length, rank, name, dtype):
    """To the bound on B that the polynomial is for, each block by itself."""
    w = point(3, 8, 8, dtype=dtype)
    end = reaches(name, dtype)[-1]
    unit = skew(3, 8, 8, dtype=matrices.in_double(dtype), rank=rank, bound=end)
    lengths = torch.tensor([0.5, length, length], dtype=torch.float64)[:, None, None]
    new, short, _ = shortened(w, (unit * lengths).to(dtype), name)
    assert short[:, 0, 0].tolist() == [False, True, True]
    assert float(geometry.error(new).max()) < 2 * rounding(new)
    start, omega = matrices.float64(w), unit * lengths.clamp_max(1)
    expected = (
        oracle(start, omega, name) if name == "qr" else (turn_of(omega, name) @ start.to(torch.complex128)) + start
    )
    torch.testing.assert_close(
        new.to(torch.complex128),
        expected.to(torch.complex128),
        rtol=0,
        atol=16 * torch.finfo(dtype).eps * (1 + end**0.5),  # Omega is rounded, and the length that it is given too
    )


@pairs(dtype=ALL, name=ROTATIONS, bad=[float("nan"), float("inf")])
def test_where_nothing_can_be_read_a_block_without_a_length_stays(bad, name, dtype, monkeypatch):
    """And is counted among those that are skipped, not those that are shortened."""
    w = point(3, 6, 6, dtype=dtype)
    omega = skew(3, 6, 6, dtype=dtype, bound=0.04)
    omega[1, 2, 2] = bad
    read, counts = stepped(w, omega, name)
    never_read(monkeypatch)
    moved, unread = stepped(w, omega, name)
    assert torch.equal(moved[1], w[1])
    torch.testing.assert_close(moved, read, rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert unread == counts == {"skipped_blocks": 1, "clamped_steps": 0}


@pairs(dtype=ALL, name=ROTATIONS, length=[1e-6, 0.4, 1e4])
def test_where_nothing_can_be_read_retractions_are_exact_too(length, name, dtype, monkeypatch):
    """On the manifold, and as where it can be read while a step is short; what is too long goes the same way."""
    w = point(3, 6, 6, dtype=dtype)
    v = tangent(w, length)
    read = retract(w, v, name)
    never_read(monkeypatch)
    moved = retract(w, v, name)
    assert float(geometry.error(moved).max()) < 2 * rounding(moved)
    if length < 0.5:
        torch.testing.assert_close(moved, read, rtol=0, atol=16 * torch.finfo(dtype).eps)
    elif name == "orthographic":
        turn = matrices.skew(moved @ w.mH)
        part = (turn.mH @ (v @ w.mH)).diagonal(dim1=-2, dim2=-1).sum(-1).real / torch.linalg.matrix_norm(v) ** 2
        torch.testing.assert_close(turn, part[:, None, None] * (v @ w.mH), rtol=0, atol=16 * torch.finfo(dtype).eps)
        assert bool((part < 1).all())


@pytest.mark.parametrize("dtype", ALL)
def test_where_nothing_can_be_read_every_block_is_corrected_in_every_step(dtype, monkeypatch):
    never_read(monkeypatch)
    weight = square(5, 4, dtype=dtype)
    opt = SGD([weight], lr=1e-5)
    for step in range(8):
        give(weight, step)
        opt.step()
        if step == 0:
            weight.data *= 1.05
    assert float(geometry.error(weight.detach().view(5, 4, 4)).max()) <= matrices.error_at_rounding(4, 4, dtype)
    assert opt._engine.counters.total("clamped_steps") == 0
    opt.param_groups[0]["lr"] = 10.0
    give(weight, 8)
    weight.grad[:4] *= 1e-6
    opt.step()
    assert opt._engine.counters.total("clamped_steps") == 4
