import math

import geoopt
import pytest
import torch

from manifold_opt import nearest_orthogonal, retract, riemannian_gradient
from manifold_opt.linalg import matrices
from manifold_opt.stiefel import geometry

from ..helpers import DTYPES, FIELDS, SQUARE, TALL, UNITARY, WIDE, gaussian, pairs, point, rounding, seeded, tangent
from ..reference import loop as reference

METRICS = ["euclidean", "canonical"]


@pairs(shape=SQUARE + WIDE, metric=METRICS, dtype=DTYPES + UNITARY)
def test_project_is_the_textbook_formula(shape, metric, dtype):
    double = matrices.in_double(dtype)
    w, g = point(3, *shape, dtype=double), gaussian(3, *shape, dtype=double)
    expected = torch.stack([reference.gradient(a, b, metric) for a, b in zip(w, g, strict=True)])
    # Three products of length n of entries of size one.
    torch.testing.assert_close(
        riemannian_gradient(w.to(dtype), g.to(dtype), metric).to(double),
        expected,
        rtol=0,
        atol=16 * torch.finfo(dtype).eps * 6,
    )


@pairs(shape=SQUARE + WIDE + TALL, metric=METRICS, dtype=FIELDS)
def test_project_lands_in_the_tangent_space(shape, metric, dtype):
    w = point(*shape, dtype=dtype)
    v = riemannian_gradient(w, gaussian(*shape, dtype=dtype), metric)
    along = v.mH @ w if shape[0] > shape[1] else v @ w.mH
    assert (along + along.mH).abs().max() < 1e-13


@pytest.mark.parametrize("shape", SQUARE + WIDE + TALL)
@pytest.mark.parametrize("dtype", FIELDS)
def test_euclidean_projection_is_orthogonal(shape, dtype):
    w, g, h = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=2)
    v = riemannian_gradient(w, g)
    torch.testing.assert_close(riemannian_gradient(w, v), v)  # idempotent
    assert abs(inner(g - v, riemannian_gradient(w, h))) < 1e-12  # what is taken away is normal


def inner(a, b):
    """Re tr(A^H B), the sum of the products of all real and of all imaginary parts."""
    return (a.conj() * b).real.sum()


@pairs(shape=SQUARE + WIDE, metric=METRICS, dtype=FIELDS)
def test_gradient_represents_the_differential(shape, metric, dtype):
    """<grad, X>_W = <G, X> for every tangent X, in the inner product that defines the metric."""
    w, g = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype)
    x = riemannian_gradient(w, gaussian(*shape, seed=2, dtype=dtype))
    xi = riemannian_gradient(w, g, metric)
    weight = torch.eye(shape[1], dtype=w.dtype) - (0.5 if metric == "canonical" else 0) * w.mH @ w
    torch.testing.assert_close(inner(xi @ weight, x), inner(g, x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (3, 8), (8, 3)])
@pytest.mark.parametrize("dtype", FIELDS)
def test_the_gradient_is_that_of_torch(shape, dtype):
    """Along a curve through W the loss changes as the gradient of autograd, made Riemannian, says."""
    w, a, b = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype, seed=5), gaussian(*shape, dtype=dtype, seed=6)

    def loss(x):
        return ((x - a).abs() ** 3).sum() + (x * b).sum().abs()

    leaf = w.clone().requires_grad_()
    loss(leaf).backward()
    v, h = tangent(w, 1.0), 1e-6
    ahead, behind = (loss(retract(w, t * v, "exp")) for t in (h, -h))
    torch.testing.assert_close(
        (ahead - behind) / (2 * h), inner(riemannian_gradient(w, leaf.grad), v), rtol=1e-7, atol=1e-7
    )


def test_a_tangent_of_unitary_matrices_has_an_imaginary_diagonal():
    """At W = I in two dimensions: the diagonal keeps its imaginary, the rest its skew-Hermitian part."""
    g = torch.tensor([[[5 + 2j, 1 + 1j], [3 + 5j, 7 - 4j]]], dtype=torch.complex128)
    expected = torch.tensor([[[2j, -1 + 3j], [1 + 3j, -4j]]], dtype=torch.complex128)
    assert torch.equal(riemannian_gradient(torch.eye(2, dtype=torch.complex128)[None], g), expected)


def test_project_agrees_with_geoopt():
    w, g = point(8, 5), gaussian(8, 5)
    torch.testing.assert_close(riemannian_gradient(w, g), geoopt.EuclideanStiefel().egrad2rgrad(w, g))
    torch.testing.assert_close(riemannian_gradient(w, g, "canonical"), geoopt.CanonicalStiefel().egrad2rgrad(w, g))


@pairs(shape=TALL, metric=METRICS, dtype=FIELDS)
def test_tall_is_the_transpose_of_wide(shape, metric, dtype):
    w, g = point(*shape, dtype=dtype), gaussian(*shape, dtype=dtype)
    assert geometry.error(w) < rounding(w)
    torch.testing.assert_close(
        riemannian_gradient(w, g, metric), riemannian_gradient(w.mT, g.mT, metric).mT, rtol=0, atol=0
    )


def test_canonical_is_twice_euclidean_on_squares():
    w, g = point(6, 6), gaussian(6, 6)
    torch.testing.assert_close(riemannian_gradient(w, g, "canonical"), 2 * riemannian_gradient(w, g))


@pytest.mark.parametrize("shape", SQUARE + WIDE)
@pytest.mark.parametrize("dtype", FIELDS)
def test_coordinates_rebuild_the_projection(shape, dtype):
    w, g = point(2, *shape, dtype=dtype), gaussian(2, *shape, dtype=dtype)
    omega, *normal = geometry.coordinates(w, g)
    torch.testing.assert_close(omega @ w + sum(normal), riemannian_gradient(w, g))


@pytest.mark.parametrize("shape", SQUARE + WIDE + TALL)
@pytest.mark.parametrize("dtype", DTYPES + UNITARY)
def test_nearest_orthogonal_is_the_polar_factor(shape, dtype):
    x = gaussian(2, *shape, dtype=dtype)
    q = nearest_orthogonal(x)
    assert q.dtype == dtype
    assert geometry.error(q).max() < rounding(q)
    # X Q^H Hermitian positive semidefinite characterizes the nearest (Higham 2008, theorem 8.4).
    h = matrices.float64(x.mH @ q if shape[0] > shape[1] else x @ q.mH)
    torch.testing.assert_close(h, h.mH, rtol=0, atol=100 * torch.finfo(dtype).eps)
    assert torch.linalg.eigvalsh(h).min() > -100 * torch.finfo(dtype).eps


def test_nearest_orthogonal_by_hand():
    x = torch.tensor([[0.0, 2.0], [-3.0, 0.0]])
    torch.testing.assert_close(nearest_orthogonal(x), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nearest_orthogonal_refuses_values_that_are_not_finite(bad):
    x = torch.eye(3)
    x[1, 1] = bad
    with pytest.raises(ValueError, match=r"not finite.*init\.orthogonal_"):
        nearest_orthogonal(x)


def test_nearest_orthogonal_refuses_rank_deficient_values():
    with pytest.raises(ValueError, match=r"rank-deficient.*init\.orthogonal_"):
        nearest_orthogonal(torch.ones(3, 3))


@pairs(n=[1, 2, 3, 6], det=[1, -1], dtype=DTYPES)
def test_the_nearest_of_a_determinant(n, det, dtype):
    """Of that determinant, and nearer than any other matrix of it that is tried."""
    x = gaussian(40, n, n, dtype=dtype)
    q = nearest_orthogonal(x, det=det)
    assert q.dtype == dtype
    assert geometry.error(q).max() < rounding(q)
    assert torch.equal(torch.linalg.det(q).round(), torch.full((40,), float(det), dtype=dtype))
    free = nearest_orthogonal(x)
    kept = torch.linalg.det(free).sign() == det
    # Two algorithms, each as exact as the condition of the smallest singular value allows.
    allowed = 8 * (torch.finfo(dtype).eps + torch.finfo(torch.float64).eps * torch.linalg.cond(x.double()))
    assert ((q - free).abs().amax((-2, -1)) <= allowed)[kept].all()
    others = [torch.linalg.matrix_norm(x - retract(q, tangent(q, t, seed=s))) for t in (0.1, 1.0, 3.0) for s in (2, 3)]
    for other in others:
        assert (other >= torch.linalg.matrix_norm(x - q) * (1 - 1e-6)).all()


def test_the_nearest_rotation_by_hand():
    """diag(3, 0.1) turned over: the small direction gives way; Kabsch's formula, and a rank of one less will do."""
    over = torch.diag(torch.tensor([3.0, -0.1], dtype=torch.float64))
    assert torch.equal(nearest_orthogonal(over, det=1), torch.eye(2, dtype=torch.float64))
    assert torch.equal(nearest_orthogonal(over, det=-1), torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64)))
    flat = torch.diag(torch.tensor([2.0, 1.0, 0.0]))
    assert torch.equal(nearest_orthogonal(flat, det=1), torch.eye(3))
    assert torch.equal(nearest_orthogonal(torch.tensor([[-2.0]]), det=1), torch.ones(1, 1))
    assert nearest_orthogonal(torch.empty(0, 3, 3), det=1).shape == (0, 3, 3)


@pytest.mark.parametrize(
    ("x", "det", "match"),
    [
        (torch.eye(2), 0, "det must be 1"),
        (torch.eye(2), True, "det must be 1"),
        (torch.eye(2)[:1], 1, "square"),
        (torch.eye(2, dtype=torch.complex64), 1, "real square"),
        (torch.diag(torch.tensor([1.0, 1.0, -1.0])), 1, "not unique"),
        (torch.diag(torch.tensor([1.0, 0.0, 0.0])), 1, "not unique"),
        (torch.full((2, 2), float("nan")), 1, "not finite"),
    ],
)
def test_nearest_orthogonal_refuses_a_determinant(x, det, match):
    with pytest.raises(ValueError, match=match):
        nearest_orthogonal(x, det=det)


def test_random_is_orthogonal_and_uniform():
    w = geometry.random(4000, 2, 2, dtype=torch.float64, generator=seeded_once())
    assert geometry.error(w).max() < 1e-14
    # Uniform on O(2): both components equally likely, every entry of mean 0 and variance 1/2.
    # Five standard deviations of a mean of 4000.
    assert abs(torch.linalg.det(w).mean()) < 5 / 4000**0.5
    assert w.mean(0).abs().max() < 5 * 0.71 / 4000**0.5


def test_random_unitary_matrices_are_uniform():
    """Haar on U(2): det uniform on the circle, entries of mean 0 and E|.|^2 = 1/2, |trace|^2 and |trace|^4 1 and 2."""
    w = geometry.random(4000, 2, 2, dtype=torch.complex128, generator=seeded(3))
    assert geometry.error(w).max() < 1e-14
    tolerance = 5 / 4000**0.5
    for power in (1, 2):
        assert (torch.linalg.det(w) ** power).mean().abs() < tolerance
    assert w.mean(0).abs().max() < 0.71 * tolerance
    assert (w.abs() ** 2 - 0.5).mean(0).abs().max() < 0.29 * tolerance  # |w_ij|^2 is uniform on [0, 1]
    trace = w.diagonal(dim1=-2, dim2=-1).sum(-1).abs() ** 2
    assert abs(float(trace.mean()) - 1) < tolerance
    assert abs(float((trace**2).mean()) - 2) < math.sqrt(14 - 4) * tolerance  # E|trace|^8 = 14 (Catalan)


def seeded_once() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_error_by_hand():
    # I - diag(4, 1) has Frobenius norm 3.
    assert float(geometry.error(torch.diag(torch.tensor([2.0, 1.0])))) == 3.0
    assert float(geometry.error(torch.diag(torch.tensor([2.0j, 1.0])))) == 3.0
    assert float(geometry.error(torch.tensor([[1.0, 1.0j]]) / 2**0.5)) < 1e-7  # of A A^T it would be 1
    assert geometry.error(torch.tensor([[1.0j]])).dtype == torch.float64


@pytest.mark.parametrize(
    ("w", "g", "match"),
    [
        (torch.eye(2), torch.eye(3), "same shape"),
        (torch.eye(2), torch.eye(2, dtype=torch.float64), "same shape and dtype"),
        (torch.ones(3), torch.ones(3), "p, n"),
        (torch.eye(2, dtype=torch.int64), torch.eye(2, dtype=torch.int64), "two floating-point"),
    ],
)
def test_project_refuses(w, g, match):
    with pytest.raises(ValueError, match=match):
        riemannian_gradient(w, g)


def test_project_lists_the_metrics():
    with pytest.raises(ValueError, match="euclidean, canonical"):
        riemannian_gradient(torch.eye(2), torch.eye(2), "riemannian")  # type: ignore[arg-type]


def test_large_float64_points_count_as_orthogonal():
    """Or they would be projected anew, and lose their bits, whenever an optimizer looks."""
    w = point(1, 600, 600)
    w = retract(w, tangent(w, 1e-3))
    assert float(geometry.error(w)) < matrices.error_at_rounding(600, 600, torch.float64)


@pytest.mark.parametrize("shape", [(5, 5), (3, 7), (7, 3), (1, 4), (1, 1)])
@pytest.mark.parametrize("dtype", FIELDS)
def test_random_is_the_product_of_its_reflections(shape, dtype):
    """Multiplied out: the reflection of each drawn vector to a multiple of the first unit vector, and its phase."""
    p, n = min(shape), max(shape)
    drawn = torch.randn(p, n, dtype=dtype, generator=seeded_once())
    expected = torch.eye(n, dtype=dtype)
    for k, row in enumerate(drawn):
        x = row[k:]
        end = -x[0].sgn() * torch.linalg.vector_norm(x)
        u = x.clone()
        u[0] -= end
        reflection = torch.eye(n, dtype=dtype)
        reflection[k:, k:] -= 2 * torch.outer(u, u.conj()) / torch.linalg.vecdot(u, u)
        torch.testing.assert_close(reflection[k:, k:] @ x, end * torch.eye(n - k, dtype=dtype)[0])
        expected @= reflection
        expected[:, k] *= end.sgn()  # later reflections do not reach this column
    w = geometry.random(*shape, dtype=dtype, generator=seeded_once())
    torch.testing.assert_close(w if shape[0] == n else w.mT, expected[:, :p], rtol=0, atol=1e-14)


def test_random_of_zeros_is_a_point(monkeypatch):
    """They have no direction, and are drawn now and then."""
    monkeypatch.setattr(torch, "randn", lambda *shape, dtype, **_: torch.zeros(shape, dtype=dtype))
    assert torch.equal(geometry.random(2, 3, 3), torch.eye(3).repeat(2, 1, 1))
