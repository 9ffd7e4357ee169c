"""Every claim of RETRACTIONS, measured."""

import itertools
import math

import geoopt
import pytest
import torch
from torch import Tensor

from manifold_opt import RETRACTIONS, retract
from manifold_opt.linalg import matrices
from manifold_opt.linalg.newton_schulz import newton_schulz
from manifold_opt.stiefel import geometry

from ..helpers import (
    DTYPES,
    EXACT,
    FIELDS,
    SQUARE,
    TALL,
    UNITARY,
    WIDE,
    each,
    gaussian,
    pairs,
    point,
    rounding,
    tangent,
)
from ..reference import loop as reference

METRICS = ["euclidean", "canonical"]


def slope(error_at, sizes=(2**-4, 2**-5, 2**-6, 2**-7)) -> float:
    """The order of error(t) as t goes to zero: the steepest line through neighbours on a log-log plot."""
    errors = [max(float(error_at(t)), 1e-300) for t in sizes]
    return max(math.log2(a / b) for a, b in itertools.pairwise(errors))


def geodesic(w: Tensor, v: Tensor, metric: str) -> Tensor:
    return torch.stack([reference.exp(a, b, metric) for a, b in zip(w, v, strict=True)])


@pairs(method=RETRACTIONS, shape=SQUARE + WIDE, metric=METRICS, dtype=FIELDS)
def test_equals_the_reference(method, shape, metric, dtype):
    w = point(3, *shape, dtype=dtype)
    v = tangent(w, 0.45)  # short enough for the inexact ones
    expected = torch.stack([reference.retract(a, b, method, metric) for a, b in zip(w, v, strict=True)])
    torch.testing.assert_close(retract(w, v, method, metric=metric), expected, rtol=0, atol=1e-11)


@pairs(method=EXACT, shape=SQUARE + WIDE, length=[1e-7, 3e-2, 3.0, 1e2, 1e4, 1e12], dtype=DTYPES + UNITARY)
def test_exact_schemes_are_right_for_a_step_of_any_size(method, shape, length, dtype):
    double = matrices.in_double(dtype)
    w = point(3, *shape, dtype=double)
    v = tangent(w, length)
    moved = retract(w.to(dtype), v.to(dtype), method)
    assert moved.dtype == dtype
    assert geometry.error(moved).max() < rounding(moved)
    if length > 1e4 or (method == "exp" and length > 3):
        return  # beyond 1e5 only the direction counts; the reference for exp integrates, and is for short steps
    expected = torch.stack([reference.retract(a, b, method) for a, b in zip(w, v, strict=True)])
    # A float32 result is within a few units of the exact one whatever the length: long steps are computed in float64.
    # A float64 one differs from the reference by what both round, magnified by the length.
    units = 16 if dtype != double else 64 + 2 * length
    torch.testing.assert_close(moved.to(double), expected, rtol=0, atol=units * torch.finfo(dtype).eps)


@pairs(shape=SQUARE + WIDE, metric=METRICS, length=[0.1, 1.0, 3.0], dtype=FIELDS)
def test_exp_is_the_geodesic(shape, metric, length, dtype):
    w = point(2, *shape, dtype=dtype)
    v = tangent(w, length)
    torch.testing.assert_close(retract(w, v, "exp", metric=metric), geodesic(w, v, metric), rtol=0, atol=1e-11)


@pytest.mark.parametrize("length", [0.1, 1.0, 30.0])
def test_exp_agrees_with_geoopt_on_the_euclidean_metric(length):
    w = point(2, 8, 3)
    v = tangent(w, length)
    expected = geoopt.EuclideanStiefelExact().expmap(w, v)
    torch.testing.assert_close(retract(w, v, "exp"), expected, rtol=0, atol=1e-11 * max(1, length))


@pairs(shape=SQUARE + WIDE, metric=METRICS, dtype=FIELDS)
def test_geodesics_have_constant_speed_and_can_be_walked_in_two_halves(shape, metric, dtype):
    w = point(2, *shape, dtype=dtype)
    v = tangent(w, 1.0)
    h = 1e-5
    middle = retract(w, 0.5 * v, "exp", metric=metric)
    ahead, behind = (retract(w, (0.5 + s) * v, "exp", metric=metric) for s in (h, -h))
    velocity = geometry.riemannian_gradient(middle, (ahead - behind) / (2 * h))
    torch.testing.assert_close(
        retract(middle, 0.5 * velocity, "exp", metric=metric), retract(w, v, "exp", metric=metric), rtol=0, atol=1e-8
    )


@pairs(method=RETRACTIONS, shape=SQUARE[1:] + WIDE, dtype=FIELDS)
def test_first_order(method, shape, dtype):
    """||R(W, tV) - W - tV|| = O(t^2): the same learning rate means the same in every scheme."""
    w = point(3, *shape, dtype=dtype)
    v = tangent(w, 1.0)
    assert slope(lambda t: (retract(w, t * v, method) - w - t * v).norm()) > 1.9


@pairs(method=RETRACTIONS, geodesic_of=["square", "euclidean", "canonical"], dtype=FIELDS)
def test_second_order_where_claimed_and_only_there(method, geodesic_of, dtype):
    w = point(3, 6, 6, dtype=dtype) if geodesic_of == "square" else point(3, 4, 9, dtype=dtype)
    v = tangent(w, 1.0)
    metric = "euclidean" if geodesic_of == "square" else geodesic_of
    order = slope(lambda t: (retract(w, t * v, method, metric=metric) - geodesic(w, t * v, metric)).norm())
    if method == "exp":
        assert (retract(w, v, method, metric=metric) - geodesic(w, v, metric)).norm() < 1e-11
    elif geodesic_of in RETRACTIONS[method].second_order:
        assert order > 2.9
    else:
        assert 1.9 < order < 2.5


@pairs(method=RETRACTIONS, shape=TALL, dtype=FIELDS)
def test_tall_is_the_transpose_of_wide(method, shape, dtype):
    w = point(2, *shape, dtype=dtype)
    v = tangent(w, 0.5)
    torch.testing.assert_close(retract(w, v, method), retract(w.mT, v.mT, method).mT, rtol=0, atol=0)


@pytest.mark.parametrize("method", RETRACTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_no_block_feels_its_neighbours(method, dtype):
    """A long step, or a NaN, in one matrix of a batch leaves the bits of the others."""
    w = point(3, 8, 8, dtype=dtype)
    v = tangent(w, 0.01)
    quiet = retract(w, v, method)
    for disturbance in (1e5, float("nan")):
        loud = v.clone()
        loud[1] *= disturbance
        moved = retract(w, loud, method)
        assert torch.equal(moved[0], quiet[0])
        assert torch.equal(moved[2], quiet[2])


@pytest.mark.parametrize("method", RETRACTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_zero_step_stays_to_rounding(method, dtype):
    w = point(2, 5, 7, dtype=dtype)
    torch.testing.assert_close(retract(w, torch.zeros_like(w), method), w, rtol=0, atol=4e-7)


@pairs(method=EXACT, shape=[(8, 8), (4, 9)], dtype=FIELDS)
def test_an_error_of_the_point_does_not_outlive_the_step(method, shape, dtype):
    """Off by 1e-3 before, by its square after: nothing accumulates."""
    on = point(*shape, dtype=dtype)
    w = on * (1 + 1e-3)
    v = geometry.riemannian_gradient(on, tangent(on, 1e-4))
    assert geometry.error(retract(w, v, method)) < 2e-5


@pairs(method=["cayley_iterative", "orthogonalizer"], shape=SQUARE + WIDE, dtype=FIELDS)
def test_inexact_schemes_shorten_a_step_that_is_too_long(method, shape, dtype):
    w = point(*shape, dtype=dtype)
    long, longest = tangent(w, 1e4), RETRACTIONS[method].step_limit()
    moved = retract(w, long, method)
    assert moved.isfinite().all()
    assert geometry.error(moved) < 1.0 * shape[0] ** 0.5  # inside the basin, where singular values stay in (0, sqrt 2)
    # Never longer than the bound, and hardly shorter. (The orthogonalizer takes a step of 1 to 3/2 - 2/2 = 1/2.)
    along = (long.conj() * moved).real.sum() / long.norm().clamp_min(1e-9) ** 2 * 1e4
    assert along <= longest + 1e-12
    assert along >= (0.45 * longest if long.any() else 0)


@pairs(method=["cayley_iterative", "orthogonalizer"], n=[64, 256], dtype=FIELDS)
def test_inexact_schemes_leave_shorter_steps_alone(method, n, dtype):
    w = point(n, n, dtype=dtype)
    v = tangent(w, 0.95 * RETRACTIONS[method].step_limit() / n ** (1 / 32))
    assert torch.linalg.matrix_norm(v) > RETRACTIONS[method].step_limit()  # so that the cheap bound does not decide
    assert torch.equal(retract(w, v, method), retract_unguarded(w, v, method))


def retract_unguarded(w: Tensor, v: Tensor, method: str) -> Tensor:
    scheme = RETRACTIONS[method]
    moved = scheme.function(w, v)
    return newton_schulz(moved) if scheme.newton_schulz_after else moved


def test_longest_step_of_a_small_beta():
    """Steps of length t and a rate beta settle at a defect of t^2 / 2 beta, one at the longest step."""
    assert RETRACTIONS["orthogonalizer"].step_limit(beta=0.02) == pytest.approx(0.2)
    weight = point(4, 4)
    for k in range(400):
        weight = retract(weight, tangent(point(4, 4, seed=k), 1e3, seed=k), "orthogonalizer", beta=0.02)
        assert torch.linalg.matrix_norm(weight, 2) < 2


@pairs(
    {"method, metric": [*((method, "euclidean") for method in EXACT), ("exp", "canonical")]},
    shape=[(4, 5), (31, 32), (3, 8), (6, 6), (1, 2)],
    dtype=DTYPES + UNITARY,
)
def test_hundreds_of_points_and_lengths_end_on_the_manifold(method, shape, metric, dtype):
    """p = n - 1 is the hardest: rounding makes what should be a normal part of rank one indefinite."""
    count = min(100, 800 // shape[-1])
    w = point(count, *shape, seed=1, dtype=matrices.in_double(dtype)).to(dtype)
    v = geometry.riemannian_gradient(w, gaussian(count, *shape, seed=2, dtype=dtype))
    v = v / torch.linalg.matrix_norm(v, keepdim=True).clamp_min(1e-3)
    for length in [1.0, 10.0, 31.0, 33.0, 100.0, 1e3, 1e4, 1e5, 1e8, 1e25 if torch.finfo(dtype).bits == 32 else 1e200]:
        assert geometry.error(retract(w, length * v, method, metric=metric)).max() < rounding(w)


@pytest.mark.parametrize("dtype", DTYPES + UNITARY)
def test_a_lone_matrix_is_as_exact_as_one_of_a_batch(dtype):
    """torch 2.13's exponential of a lone matrix is off by 1e5 units of roundoff at norms around 0.03."""
    for shape, length in itertools.product([(6, 6), (3, 7)], (0.01, 0.03, 0.05, 0.3)):
        w = point(*shape, dtype=dtype)
        v = tangent(w, length)
        lone, batch = retract(w, v, "exp"), retract(torch.stack([w, w]), torch.stack([v, v]), "exp")[0]
        torch.testing.assert_close(lone, batch, rtol=0, atol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("beta", [0.01, 0.25, 0.5, 0.9])
def test_orthogonalizer_by_hand(beta):
    """diag(2/3, 1) with no step: (1+b)s - b s^3."""
    w = torch.diag(torch.tensor([2 / 3, 1.0], dtype=torch.float64))
    moved = retract(w, torch.zeros_like(w), "orthogonalizer", beta=beta)
    expected = (1 + beta) * 2 / 3 - beta * 8 / 27
    torch.testing.assert_close(moved, torch.diag(torch.tensor([expected, 1.0], dtype=torch.float64)))


def test_orthogonalizer_steps_compose():
    w = 0.9 * point(4, 6)
    v = tangent(point(4, 6), 0.1)
    once = retract(w, v, "orthogonalizer", beta=0.3)
    twice = retract(once, torch.zeros_like(v), "orthogonalizer", beta=0.3)
    torch.testing.assert_close(retract(w, v, "orthogonalizer", beta=0.3, correction_steps=2), twice)


def test_quarter_turn_by_hand():
    """At W = I, V = [[0, t], [-t, 0]]: exp turns by t, cayley by 2 atan(t/2), polar and qr by atan t."""
    t = 0.8
    w, v = torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, t], [-t, 0.0]], dtype=torch.float64)
    for method, angle in {
        "exp": t,
        "cayley": 2 * math.atan(t / 2),
        "polar": math.atan(t),
        "qr": math.atan(t),
    }.items():
        expected = [[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]]
        torch.testing.assert_close(retract(w, v, method), torch.tensor(expected, dtype=torch.float64))


def test_circle_by_hand():
    """On St(1, 2), a circle: exp turns by t, cayley too by 2 atan(t/2), polar and qr by atan t."""
    t = 0.8
    w, v = torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.tensor([[0.0, t]], dtype=torch.float64)
    for method, angle in {"exp": t, "cayley": 2 * math.atan(t / 2), "polar": math.atan(t), "qr": math.atan(t)}.items():
        expected = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
        torch.testing.assert_close(retract(w, v, method), expected)


UNIT_CIRCLE = {
    "exp": lambda t: t,
    "cayley": lambda t: 2 * math.atan(t / 2),
    "polar": math.atan,
    "qr": math.atan,
    "orthographic": math.asin,
}


@pytest.mark.parametrize("method", UNIT_CIRCLE)
def test_phases_by_hand(method):
    """On U(1), the unit circle, from e^{is} along i t e^{is}: on to e^{i(s + angle)}; on diagonal W entry by entry."""
    angle = UNIT_CIRCLE[method]
    start, steps = torch.tensor([[0.3, -2.0], [0.1, -0.12]], dtype=torch.float64)
    phases = torch.polar(torch.ones_like(start), start)
    w = torch.diag(phases)
    moved = retract(w, torch.diag(1j * steps) @ w, method)
    ends = start + torch.tensor([angle(float(t)) for t in steps], dtype=torch.float64)
    torch.testing.assert_close(moved, torch.diag(torch.polar(torch.ones_like(ends), ends)))
    for k in range(2):
        one = retract(phases[k].view(1, 1), (1j * steps[k] * phases[k]).view(1, 1), method)
        torch.testing.assert_close(one, moved[k, k].view(1, 1))


@pytest.mark.parametrize("method", ["exp", "cayley", "polar"])
@pytest.mark.parametrize("t", [1.0, 7.0, 500.0])
def test_long_steps_on_the_unit_circle(method, t):
    angle = UNIT_CIRCLE[method](t)
    one = torch.ones(1, 1, dtype=torch.complex128)
    torch.testing.assert_close(retract(one, 1j * t * one, method), complex(math.cos(angle), math.sin(angle)) * one)


@pairs(method=RETRACTIONS, shape=SQUARE + WIDE + TALL, length=[0.01, 0.1, 0.4, 40.0])
def test_real_values_of_complex_dtype_have_the_real_retraction(method, shape, length):
    w = point(2, *shape)
    v = tangent(w, length)
    real, double = retract(w, v, method), retract(w.to(torch.complex128), v.to(torch.complex128), method)
    assert not double.imag.any() or double.imag.abs().max() < 1e-14 * (1 + length)
    # A step as long as that is polar where the orthographic retraction sees a bend above 2^-5.375, and of a real bend
    # it knows that eigenvalues are double.
    if method != "orthographic" or shape[-1] != shape[-2] or length != 0.1:
        torch.testing.assert_close(double.real, real, rtol=0, atol=1e-14 * (1 + length))


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", [(4, 4), (3, 7), (7, 3)])
def test_conjugate_views_are_as_good_as_copies(method, shape):
    w = point(2, *shape, dtype=torch.complex128)
    v = tangent(w, 0.3)
    lazy = retract(w.conj(), v.conj(), method)
    torch.testing.assert_close(lazy, retract(w, v, method).conj(), rtol=0, atol=1e-13)
    swapped = retract(w.mH, v.mH, method)
    assert geometry.error(swapped).max() < rounding(swapped)


@each(method=EXACT, n=[1, 2, 5, 8], dtype=DTYPES)
def test_the_component_of_the_orthogonal_group_is_kept(method, n, dtype):
    """Over 40 steps of whatever length: each can be shrunk to none, continuously, and never leaves O(n)."""
    w = point(16, n, n, dtype=dtype)
    before = torch.linalg.det(w).sign()
    assert before.unique().numel() == 2
    for k in range(40):
        length = 10.0 ** (k % 8 - 3)
        w = retract(w, tangent(w, length, seed=k), method)
        # A determinant of 1 or -1 to rounding.
        torch.testing.assert_close(torch.linalg.det(w), before, rtol=0, atol=n * rounding(w))


@pairs(method=RETRACTIONS, shape=[(16, 16), (8, 64)], dtype=[torch.float32, torch.complex64])
def test_no_lu_and_no_large_matrix_on_the_way(method, shape, dtype):
    """Batched LU on the CPU crashes or lies once threads are set, and nothing n x n is needed when p < n/2."""
    seen: list[tuple[int, ...]] = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert not any(word in str(func) for word in ("solve_ex", "lu_", "inv", "svd", "eigh")), func
            result = func(*args, **(kwargs or {}))
            results = result if isinstance(result, tuple) else (result,)
            seen.extend(tuple(r.shape) for r in results if isinstance(r, Tensor))
            return result

    w = point(2, *shape, dtype=dtype)
    v = tangent(w, 0.3)
    with Watch():
        retract(w, v, method)
    assert seen
    if shape[0] < shape[1]:
        assert not any(len(s) >= 2 and min(s[-2:]) > 2 * shape[0] for s in seen)


@pytest.mark.parametrize(
    ("method", "square", "wide"),
    [
        ("qr", 4, 3),
        ("orthographic", 4, 2),
        ("polar", 5, 2),
        ("orthogonalizer", 2, 2),
        ("cayley", 5, 6.125),
        ("cayley_iterative", 5, 12),
        ("exp", 5, 9),
    ],
)
def test_products_of_a_small_step(method, square, wide):
    """The costs README states, in products of p x n by n x p; factorizations and exponentials are not counted."""
    from torch.utils.flop_counter import FlopCounterMode

    for shape, products in (((64, 64), square), ((16, 128), wide)):
        w = point(*shape, dtype=torch.float32)
        v = tangent(w, 1e-3)
        with FlopCounterMode(display=False) as counter:
            retract(w, v, method)
        assert counter.get_total_flops() == products * 2 * shape[0] ** 2 * shape[1]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "caley"}, "qr, cayley, cayley_iterative, orthographic, polar, exp, orthogonalizer"),
        ({"metric": "flat"}, "euclidean, canonical"),
        ({"beta": 1.0}, r"beta must lie in \(0, 1\)"),
        ({"beta": float("nan")}, "beta"),
        ({"correction_steps": 0}, "correction_steps"),
        ({"correction_steps": 1.5}, "correction_steps"),
        ({"correction_steps": 2.0, "method": "orthogonalizer"}, "correction_steps"),
        ({"beta": 0.1, "method": "polar"}, "orthogonalizer"),
    ],
)
def test_refuses_with_the_valid_choices(options, match):
    with pytest.raises(ValueError, match=match):
        retract(torch.eye(2), torch.zeros(2, 2), **options)


def test_an_option_that_no_retraction_has_is_refused():
    with pytest.raises(TypeError, match="no retraction has an option 'rate'; there are metric, beta, correction_steps"):
        retract(torch.eye(2), torch.zeros(2, 2), rate=0.1)


@pytest.mark.parametrize("method", RETRACTIONS)
def test_points_may_want_gradients_or_not_be_there(method):
    w = point(2, 3, 5).requires_grad_()
    v = tangent(w.detach(), 0.1)
    moved = retract(w, v, method)
    assert not moved.requires_grad
    assert torch.equal(moved, retract(w.detach(), v, method))
    assert retract(w[:0], v[:0], method).shape == (0, 3, 5)
