import geoopt
import pytest
import torch

from manifold_opt import nearest_orthogonal, project, retract, stiefel

from . import reference
from .helpers import DTYPES, SQUARE, TALL, WIDE, gaussian, point, rounding, tangent

METRICS = ["euclidean", "canonical"]


@pytest.mark.parametrize("shape", SQUARE + WIDE)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_project_is_the_textbook_formula(shape, metric, dtype):
    w, g = point(3, *shape), gaussian(3, *shape)
    expected = torch.stack([reference.gradient(a, b, metric) for a, b in zip(w, g, strict=True)])
    # Three products of length n of entries of size one.
    torch.testing.assert_close(
        project(w.to(dtype), g.to(dtype), metric).double(), expected, rtol=0, atol=16 * torch.finfo(dtype).eps * 6
    )


@pytest.mark.parametrize("shape", SQUARE + WIDE + TALL)
@pytest.mark.parametrize("metric", METRICS)
def test_project_lands_in_the_tangent_space(shape, metric):
    w = point(*shape)
    v = project(w, gaussian(*shape), metric)
    along = v.mT @ w if shape[0] > shape[1] else v @ w.mT
    assert (along + along.mT).abs().max() < 1e-13


@pytest.mark.parametrize("shape", SQUARE + WIDE + TALL)
def test_euclidean_projection_is_orthogonal(shape):
    w, g, h = point(*shape), gaussian(*shape), gaussian(*shape, seed=2)
    v = project(w, g)
    torch.testing.assert_close(project(w, v), v)  # idempotent
    assert abs(((g - v) * project(w, h)).sum()) < 1e-12  # what is taken away is normal


@pytest.mark.parametrize("shape", SQUARE + WIDE)
@pytest.mark.parametrize("metric", METRICS)
def test_gradient_represents_the_differential(shape, metric):
    """<grad, X>_W = <G, X> for every tangent X, in the inner product that defines the metric."""
    w, g = point(*shape), gaussian(*shape)
    x = project(w, gaussian(*shape, seed=2))
    xi = project(w, g, metric)
    weight = torch.eye(shape[1], dtype=w.dtype) - (0.5 if metric == "canonical" else 0) * w.mT @ w
    torch.testing.assert_close(((xi @ weight) * x).sum(), (g * x).sum(), rtol=0, atol=1e-12)


def test_project_agrees_with_geoopt():
    w, g = point(8, 5), gaussian(8, 5)
    torch.testing.assert_close(project(w, g), geoopt.EuclideanStiefel().egrad2rgrad(w, g))
    torch.testing.assert_close(project(w, g, "canonical"), geoopt.CanonicalStiefel().egrad2rgrad(w, g))


@pytest.mark.parametrize("shape", TALL)
@pytest.mark.parametrize("metric", METRICS)
def test_tall_is_the_transpose_of_wide(shape, metric):
    w, g = point(*shape), gaussian(*shape)
    torch.testing.assert_close(project(w, g, metric), project(w.mT, g.mT, metric).mT, rtol=0, atol=0)


def test_canonical_is_twice_euclidean_on_squares():
    w, g = point(6, 6), gaussian(6, 6)
    torch.testing.assert_close(project(w, g, "canonical"), 2 * project(w, g))


@pytest.mark.parametrize("shape", SQUARE + WIDE)
def test_coordinates_rebuild_the_projection(shape):
    w, g = point(2, *shape), gaussian(2, *shape)
    torch.testing.assert_close(stiefel.from_coordinates(w, *stiefel.coordinates(w, g)), project(w, g))


@pytest.mark.parametrize("shape", SQUARE + WIDE + TALL)
@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_orthogonal_is_the_polar_factor(shape, dtype):
    x = gaussian(2, *shape, dtype=dtype)
    q = nearest_orthogonal(x)
    assert q.dtype == dtype
    assert stiefel.error(q).max() < rounding(q)
    # X Q^T symmetric positive semidefinite characterizes the nearest (Higham 2008, theorem 8.4).
    h = (x.mT @ q if shape[0] > shape[1] else x @ q.mT).double()
    torch.testing.assert_close(h, h.mT, rtol=0, atol=100 * torch.finfo(dtype).eps)
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


def test_random_is_orthogonal_and_uniform():
    w = stiefel.random(4000, 2, 2, dtype=torch.float64, generator=seeded_once())
    assert stiefel.error(w).max() < 1e-14
    # Uniform on O(2): both components equally likely, every entry of mean 0 and variance 1/2.
    # Five standard deviations of a mean of 4000.
    assert abs(torch.linalg.det(w).mean()) < 5 / 4000**0.5
    assert w.mean(0).abs().max() < 5 * 0.71 / 4000**0.5


def seeded_once() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_error_by_hand():
    # I - diag(4, 1) has Frobenius norm 3.
    assert float(stiefel.error(torch.diag(torch.tensor([2.0, 1.0])))) == 3.0


@pytest.mark.parametrize(
    ("w", "g", "match"),
    [
        (torch.eye(2), torch.eye(3), "same shape"),
        (torch.eye(2), torch.eye(2, dtype=torch.float64), "same shape and dtype"),
        (torch.ones(3), torch.ones(3), "p, n"),
        (torch.eye(2, dtype=torch.int64), torch.eye(2, dtype=torch.int64), "real floating-point"),
    ],
)
def test_project_refuses(w, g, match):
    with pytest.raises(ValueError, match=match):
        project(w, g)


def test_project_lists_the_metrics():
    with pytest.raises(ValueError, match="euclidean, canonical"):
        project(torch.eye(2), torch.eye(2), "riemannian")  # type: ignore[arg-type]


def test_large_float64_points_count_as_orthogonal():
    """Or they would be projected anew, and lose their bits, whenever an optimizer looks."""
    w = point(1, 600, 600)
    w = retract(w, tangent(w, 1e-3))
    assert float(stiefel.error(w)) < stiefel.error_at_rounding(600, 600, torch.float64)
