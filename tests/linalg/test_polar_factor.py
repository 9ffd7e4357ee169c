"""The polar factor of a point plus a tangent: exact, by as few products as its length allows, and what it refuses."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt import retract
from manifold_opt.linalg import matrices
from manifold_opt.linalg.newton_schulz import spectral_bound
from manifold_opt.linalg.polar_factor import polar_factor, polar_factor_, polar_sync_free
from manifold_opt.linalg.polynomials import INVERSE_SQRT
from manifold_opt.linalg.products import Workspace
from manifold_opt.optim.engine.counters import Counters
from manifold_opt.stiefel import geometry
from manifold_opt.stiefel.retractions import RETRACTIONS
from manifold_opt.stiefel.step import Settings, retract_

from ..helpers import DTYPES, FIELDS, SQUARE, TALL, UNITARY, WIDE, gaussian, never_read, pairs, point, rounding, tangent

ALL = DTYPES + UNITARY


def svd_factor(x):
    """The oracle."""
    u, _, vh = torch.linalg.svd(matrices.float64(x), full_matrices=False)
    return u @ vh


def rounded(dtype):
    """How far from the oracle an entry may be: that is rounded once in single precision, and 20 times in double."""
    return (4 if dtype in (torch.float32, torch.complex64) else 24) * torch.finfo(dtype).eps


def written(x, **options):
    """What polar_factor_ returns, and what it writes to memory that held something else."""
    given, out = x.clone(), torch.full_like(x, 7.0)
    return polar_factor_(given, out=out, ws=Workspace(None, x), **options), out


def with_norm_of_d(size, p, n, dtype, *, rank=None, count=2):
    """Matrices X with a Frobenius norm of D = X X^H - I of ``size``, spread evenly over some singular values."""
    double = matrices.in_double(dtype)
    rank = rank or p
    s = torch.ones(p, dtype=torch.float64)
    s[:rank] = (1 + size / rank**0.5) ** 0.5
    left, right = point(count, p, p, dtype=double), point(count, p, n, dtype=double, seed=4)
    return ((left * s) @ right).to(dtype)


@pairs(shape=SQUARE + WIDE + TALL, dtype=ALL, largest=[1.0, 1.0001, 1.3, 10.0, 1e4])
def test_polar_factor_converges(shape, dtype, largest):
    """Singular values spread from one to ``largest``, no factorization."""
    p, n = min(shape), max(shape)
    s = torch.logspace(0, 1, p, base=largest, dtype=torch.float64)
    double = matrices.in_double(dtype)
    u, vt = point(p, p, dtype=double), point(p, n, seed=4, dtype=double)
    x = (u * s) @ vt
    expected = u @ vt
    x, expected = (x, expected) if shape[0] <= shape[1] else (x.mT, expected.mT)
    q = polar_factor(x.to(dtype))
    assert geometry.error(q) < rounding(q)
    # X is rounded, in proportion to its largest singular value.
    torch.testing.assert_close(q.to(double), expected, rtol=0, atol=20 * torch.finfo(dtype).eps * largest)


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize(("p", "n"), [(6, 6), (4, 9)])
def test_each_matrix_of_a_batch_gets_its_own_factor(p, n, dtype):
    """However long the steps of the others are: what the longest one needs does the others no harm."""
    lengths = torch.tensor([0.0, 1e-4, 0.3, 5.0, 100.0]).to(matrices.in_double(dtype))[:, None, None]
    w = point(5, p, n, dtype=matrices.in_double(dtype))
    x = (w + lengths * tangent(w, 1.0)).to(dtype)
    q = polar_factor(x)
    assert float(geometry.error(q).max()) < rounding(q)
    for k, factor in enumerate((1, 1, 1, 5, 100)):  # rounding in D is in proportion to the length of X
        torch.testing.assert_close(matrices.float64(q[k]), svd_factor(x[k]), rtol=0, atol=factor * rounded(dtype))


# The price, in T: one p x n by n x p product. Of a p x p product it is a share of p / n.


def products(x, p, n):
    with FlopCounterMode(display=False) as counter:
        ok, _ = written(x)
    assert ok
    return counter.get_total_flops() / (2 * len(x) * p * p * n)


@pytest.mark.parametrize(("p", "n"), [(16, 16), (16, 64)])
@pytest.mark.parametrize("dtype", ALL)
def test_products_of_every_degree(p, n, dtype):
    """D and the result; D^2 from degree 2 on, and one for every two degrees above that: square ones, p / n of a T."""
    before = 0.0
    for fit in INVERSE_SQRT[dtype]:
        degree = len(fit.coefficients)
        small = (degree > 1) + ((degree - 2) // 2 if degree > 2 else 0)
        for size in (before + 0.02 * (fit.reach - before), 0.99 * fit.reach):
            if size > 30 * torch.finfo(dtype).eps:  # or it is rounding that D is made of
                assert products(with_norm_of_d(size, p, n, dtype, rank=1), p, n) == 2 + small * p / n
        before = fit.reach


@pytest.mark.parametrize(
    ("length", "dtype", "expected"),
    [
        (1e-9, torch.float32, 2),
        (0.005, torch.float32, 2),
        (0.05, torch.float32, 3),
        (0.2, torch.float32, 4),
        (0.4, torch.float32, 5),
        (0.6, torch.float32, 6),
        (1e-5, torch.float64, 2),
        (1e-3, torch.float64, 3),
        (0.02, torch.float64, 4),
        (0.2, torch.float64, 6),
        (0.6, torch.float64, 10),
    ],
)
def test_products_by_the_length_of_a_step(length, dtype, expected):
    """Of full rank on square blocks of 16 rows; its spectral norm counts, of which the 4th root of |D^2| is a bound."""
    w = point(2, 16, 16, dtype=dtype)
    assert products(w + tangent(w, length), 16, 16) == expected


def newton_schulz_steps(size, reach):
    """How many take a norm of D into the reach of a polynomial, each of them the best there is.

    The cubic 3/2 m s - 1/2 m^3 s^3 is largest, one, at s = 1/m, and least at the ends of [1, u], where it is the same.
    """
    u, steps = (1 + size) ** 0.5, 0
    while u * u - 1 > reach:
        low, high = 1 / u, 1.0  # of m: the ends are alike where 3/2 (u - 1) = 1/2 m^2 (u^3 - 1)
        for _ in range(60):
            m = (low + high) / 2
            low, high = (m, high) if 3 * (u - 1) > m * m * (u**3 - 1) else (low, m)
        u, steps = 1 / (1.5 * m - 0.5 * m**3), steps + 1
    return steps


@pairs(dtype=ALL, rank=[1, 8], size=[1.0, 2.0, 10.0, 1e3, 1e6, 1e9])
def test_long_steps_take_two_products_more_for_a_factor_of_seven(size, rank, dtype):
    """Of the norm of D, which is a bound: of a full rank there is no more to do than of a single long one."""
    reach = INVERSE_SQRT[dtype][-1].reach
    steps = newton_schulz_steps(size, reach)
    assert math.log(size / reach, 7) < steps < math.log(size / reach, 5) + 1
    # Besides D and the result, only square products, of which 16 make a T.
    assert int(products(with_norm_of_d(size, 8, 128, dtype, rank=rank), 8, 128)) == 2 + 2 * steps


# Steps of low rank, and steps that nobody may look at.


@pairs(dtype=ALL, length=[1e-3, 0.1, 0.3, 1.0, 10.0], rank=[1, 3], shape=[(64, 128), (100, 100)])
def test_steps_of_low_rank_are_exact(shape, rank, length, dtype):
    """A few singular values far above the others, wherever they point: no estimate may miss them."""
    p, n = shape
    w = point(3, p, n, dtype=dtype)
    left, right = gaussian(3, p, rank, dtype=dtype, seed=2), gaussian(3, rank, n, dtype=dtype, seed=3)
    v = geometry.riemannian_gradient(w, left @ right)
    v = length * v / torch.linalg.matrix_norm(v, 2, keepdim=True)
    moved = retract(w, v, "polar")
    assert float(geometry.error(moved).max()) < 2 * rounding(moved)
    atol = 40 * torch.finfo(dtype).eps * (1 + length)
    torch.testing.assert_close(matrices.float64(moved), svd_factor(w + v), rtol=0, atol=atol)


@pairs(dtype=ALL, shape=[(6, 6), (5, 9)], length=[0.0, 1e-6, 0.01, 0.3, 0.999])
def test_where_nothing_can_be_read_short_steps_are_the_same(length, shape, dtype):
    """By the polynomial of the highest degree for all of them, up to the norm of D that it is for."""
    w = point(3, *shape, dtype=matrices.in_double(dtype))
    v = tangent(w, 1.0)
    v *= (
        length
        * INVERSE_SQRT[dtype][-1].reach ** 0.5
        / (torch.linalg.matrix_norm(v @ v.mH @ v @ v.mH, keepdim=True) ** 0.25)
    )
    w, v = w.to(dtype), v.to(dtype)
    before = w.clone(), v.clone()
    moved, short, near = polar_sync_free(w, v, Workspace(None, w))
    assert near.all()
    assert torch.equal(w, before[0])
    assert torch.equal(v, before[1])
    assert short.shape == (3, 1, 1)
    assert not short.any()
    assert float(geometry.error(moved).max()) < 2 * rounding(moved)
    torch.testing.assert_close(matrices.float64(moved), svd_factor(w + v), rtol=0, atol=rounded(dtype))
    torch.testing.assert_close(moved, polar_factor(w + v), rtol=0, atol=4 * torch.finfo(dtype).eps)


@pairs(dtype=ALL, shape=[(6, 6), (5, 9)], length=[1.001, 3.0, 30.0])
def test_where_nothing_can_be_read_long_steps_are_shortened_and_counted(length, shape, dtype):
    """Each to the norm that the polynomial is for, and the short ones beside them not at all."""
    w = point(3, *shape, dtype=matrices.in_double(dtype))
    unit = tangent(w, 1.0)
    unit *= INVERSE_SQRT[dtype][-1].reach ** 0.5 / (
        torch.linalg.matrix_norm(unit @ unit.mH @ unit @ unit.mH, keepdim=True) ** 0.25
    )
    lengths = torch.tensor([0.5, length, length], dtype=torch.float64)[:, None, None]
    w, v = w.to(dtype), (unit * lengths).to(dtype)
    moved, short, near = polar_sync_free(w, v, Workspace(None, w))
    assert near.all()
    assert short[:, 0, 0].tolist() == [False, True, True]
    assert float(geometry.error(moved).max()) < 2 * rounding(moved)
    expected = svd_factor(matrices.float64(w) + unit * lengths.clamp_max(1))
    torch.testing.assert_close(matrices.float64(moved), expected, rtol=0, atol=rounded(dtype))


@pairs(dtype=ALL, length=[1e-6, 0.01, 0.3, 0.7, 40.0], shape=[(6, 6), (5, 9), (9, 5)])
def test_where_nothing_can_be_read_retractions_are_exact_too(shape, length, dtype, monkeypatch):
    """By a fixed number of products; what is too long for them is shortened."""
    w = point(3, *shape, dtype=dtype)
    v = tangent(w, length)
    read = retract(w, v, "polar")
    never_read(monkeypatch)
    moved = retract(w, v, "polar")
    assert float(geometry.error(moved).max()) < 2 * rounding(moved)
    if length < 0.7:
        torch.testing.assert_close(moved, read, rtol=0, atol=16 * torch.finfo(dtype).eps)


# What is refused.


@pytest.mark.parametrize("dtype", ALL)
@pytest.mark.parametrize("shape", [(5, 5), (3, 7)])
def test_more_than_expected_is_refused(shape, dtype):
    """With everything as it was, so that another way can be taken."""
    w = point(3, *shape, dtype=dtype)
    x = w + tangent(w, 0.3)
    size = float(torch.linalg.matrix_norm(x @ x.mH - torch.eye(shape[0], dtype=dtype)).max())
    given, out = x.clone(), torch.full_like(x, 7.0)
    assert not polar_factor_(given, out=out, ws=Workspace(None, x), expected=0.99 * size)
    assert torch.equal(given, x)
    assert bool((out == 7).all())
    ok, q = written(x, expected=1.01 * size)
    assert ok
    assert float(geometry.error(q).max()) < rounding(q)


@pairs(dtype=ALL, bad=[float("nan"), float("inf"), -float("inf"), "large"], expected=[math.inf, 1.0])
def test_what_is_no_number_is_refused(bad, expected, dtype):
    """Also what is one, but has no norm of D that is."""
    w = point(3, 3, 5, dtype=dtype)
    x = w + tangent(w, 0.3)
    x[1, 2, 0] = torch.finfo(dtype).max ** 0.5 if bad == "large" else bad
    given, out = x.clone(), torch.full_like(x, 7.0)
    assert not polar_factor_(given, out=out, ws=Workspace(None, x), expected=expected)
    torch.testing.assert_close(given, x, rtol=0, atol=0, equal_nan=True)
    assert bool((out == 7).all())


@pairs(dtype=ALL, shape=[(3, 5), (4, 4), (5, 3)], bad=[float("nan"), float("inf")])
def test_what_is_no_number_stays_in_its_matrix(bad, shape, dtype):
    w = point(3, *shape, dtype=dtype)
    x = w + tangent(w, 0.3)
    x[1, 2, 0] = bad
    q = polar_factor(x)
    assert bool(q[1].isnan().all())
    torch.testing.assert_close(matrices.float64(q[[0, 2]]), svd_factor(x[[0, 2]]), rtol=0, atol=rounded(dtype))
    assert bool(polar_factor(x[1]).isnan().all())


@pairs(method=["polar", "orthographic"], length=[0.3, 5.0, 60.0], reading=[True, False])
def test_a_step_that_is_no_number_stays_in_its_block(reading, length, method, monkeypatch):
    """In an optimizer, where it is counted, and the block keeps its bits; retract returns what it is given there."""
    if not reading:
        never_read(monkeypatch)
    w = point(4, 3, 8)
    v = tangent(w, length)
    right = retract(w, v, method)
    v[1, 0, 0], v[2, 0, 0] = float("nan"), float("inf")
    torch.testing.assert_close(retract(w, v, method)[[0, 3]], right[[0, 3]], rtol=0, atol=1e-14)
    assert not retract(w, v, method)[1].isfinite().all()
    tally, moved = Counters(), w.clone()
    tally.prepare(w.device)
    options = {"metric": "euclidean", "beta": 0.5, "correction_steps": 1}
    retract_(moved, v, Workspace(None, w), Settings(RETRACTIONS[method], options, tally.count))
    torch.testing.assert_close(moved[[0, 3]], right[[0, 3]], rtol=0, atol=1e-14)
    assert torch.equal(moved[1:3], w[1:3])
    assert tally.total("skipped_blocks") == 2


@pytest.mark.parametrize("p", [5, 40, 150])
@pytest.mark.parametrize("dtype", FIELDS)
def test_the_spectral_bound_is_one(p, dtype):
    """Of the semicircle's many eigenvalues and of one lone pair."""
    a = gaussian(8, p, p, dtype=dtype)
    u = point(8, 2, p, dtype=dtype)
    for matrix in ((a - a.mH) @ (a - a.mH).mH, u.mH @ u):
        ratio = spectral_bound(matrix, torch.empty_like(matrix)) / torch.linalg.matrix_norm(matrix, 2)
        assert float(ratio.min()) >= 1 - 1e-12
        assert float(ratio.max()) < 1 + 0.25 * p**0.5
