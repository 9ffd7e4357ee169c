"""What every manifold has to be, as functions of one and a batch of its points ``(B, ..., *point)`` in float64.

Nothing is known of it but its methods. Its metric is read off :meth:`Manifold.component_squares` by polarization, and a
tangent w at x is recognized by what defines a Riemannian gradient: <riemannian_gradient(x, g), w>_x = <g, w> for
every g.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from manifold_opt import Manifold

from ..helpers import gaussian

EPS = torch.finfo(torch.float64).eps


def dims_of(manifold: Manifold, x: Tensor) -> tuple[int, ...]:
    """Dimensions of one point in a batch."""
    (part,) = {part.point_ndim for part in manifold.layouts(x.shape if x.ndim > 1 else (1, *x.shape))}
    return tuple(range(-part, 0))


def total(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    return x.sum(dims) if dims else x


def inner(manifold: Manifold, x: Tensor, u: Tensor, v: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The metric: <u, v> = (|u + v|^2 - |u - v|^2) / 4."""

    def squared(w: Tensor) -> Tensor:
        square = manifold.component_squares(x, w)
        return total(square, dims) if square.shape == w.shape else square.reshape(w.shape[: w.ndim - len(dims)])

    return (squared(u + v) - squared(u - v)) / 4


def sizes(v: Tensor, dims: tuple[int, ...]) -> Tensor:
    return total(v * v, dims).sqrt()


def close(a: Tensor, b: Tensor, scale: float) -> None:
    """To rounding of a few hundred operations on numbers of a size."""
    torch.testing.assert_close(a, b, rtol=0, atol=1024 * EPS * scale)


def assert_tangent(manifold: Manifold, x: Tensor, w: Tensor, dims: tuple[int, ...]) -> None:
    for seed in (11, 12, 13):
        g = gaussian(*x.shape, seed=seed)
        close(inner(manifold, x, manifold.riemannian_gradient(x, g), w, dims), total(g * w, dims), 100.0)


def a_zero_step_stays(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:  # noqa: ARG001
    close(manifold.retract(x, torch.zeros_like(x)), x, float(x.abs().max()))


def a_short_step_is_along_the_tangent(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:
    """R(x, t v) - x - t v is of second order: a tenth of the length, a hundredth of the error."""
    v = manifold.riemannian_gradient(x, gaussian(*x.shape))
    v = v / sizes(v, dims).max() * sizes(x, dims).min()
    gaps = [float(sizes(manifold.retract(x, t * v) - x - t * v, dims).max()) for t in (1e-2, 1e-3, 1e-4)]
    floor = 1e3 * EPS * float(x.abs().max())
    assert gaps[0] < 1e-2 * float(sizes(v, dims).max())
    assert gaps[1] < gaps[0] / 50 + floor
    assert gaps[2] < gaps[1] / 50 + floor


def the_gradient_is_that_of_the_metric(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:
    assert_tangent(manifold, x, manifold.riemannian_gradient(x, gaussian(*x.shape)), dims)


def a_derivative_along_the_retraction(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:
    """Of f = <g, y> + |y|^2 / 2 it is what the gradient says, by central differences."""
    g, v = gaussian(*x.shape, seed=5), manifold.riemannian_gradient(x, gaussian(*x.shape))
    v = v / sizes(v, dims).max() * sizes(x, dims).min()

    def f(y: Tensor) -> Tensor:
        return total(g * y + y * y / 2, dims)

    t = 1e-5
    slope = (f(manifold.retract(x, t * v)) - f(manifold.retract(x, -t * v))) / (2 * t)
    said = inner(manifold, x, manifold.riemannian_gradient(x, g + x), v, dims)
    torch.testing.assert_close(said, slope, rtol=1e-6, atol=1e-6)


def transport_makes_tangents(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:
    u, v = (manifold.riemannian_gradient(x, gaussian(*x.shape, seed=seed)) for seed in (1, 2))
    y = manifold.retract(x, 0.3 * v / sizes(v, dims).max() * sizes(x, dims).min())
    assert_tangent(manifold, y, manifold.transport(x, y, u), dims)
    both = manifold.transport(x, y, 2 * u - 3 * v)
    close(both, 2 * manifold.transport(x, y, u) - 3 * manifold.transport(x, y, v), 100.0)
    close(manifold.transport(x, x, u), u, 100.0)


def a_rescaled_tangent_is_made_one(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:
    """By :meth:`Manifold.project_tangent`, as Adam needs it, unless the second moment is one number per point."""
    u = manifold.riemannian_gradient(x, gaussian(*x.shape))
    square = manifold.component_squares(x, u)
    assert_tangent(manifold, x, manifold.project_tangent(x, u / (square.sqrt() + 0.1)), dims)


def any_step_ends_on_it(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:
    for dtype in (torch.float64, torch.float32):
        y = x.to(dtype)
        v = manifold.riemannian_gradient(y, gaussian(*y.shape, dtype=dtype))
        v = v / sizes(v, dims).max()
        for exponent in range(-12, 7):
            end = manifold.retract(y, 10.0**exponent * v)
            assert end.dtype == dtype
            assert bool(end.isfinite().all())
            assert float(manifold.error(end).max()) <= manifold.tolerance(end), exponent


def points_have_no_error(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:  # noqa: ARG001
    error = manifold.error(x)
    assert error.dtype == torch.float64
    assert float(error.max()) <= manifold.tolerance(x)
    off, values = manifold.find_off_manifold(x)
    assert not bool(off.any())
    assert len(values) == 0


def nearest_points_are_points(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:
    """And no random point is nearer; where there is no nearest point it is a ValueError."""
    z = x + 0.5 * gaussian(*x.shape, seed=7)
    try:
        y = manifold.project_point(z)
    except ValueError:
        return
    points_have_no_error(manifold, y, dims)
    torch.testing.assert_close(manifold.project_point(y), y, rtol=0, atol=max(manifold.tolerance(y), 1024 * EPS))
    for seed in range(5):
        other = manifold.retract(x, 0.3 * manifold.riemannian_gradient(x, gaussian(*x.shape, seed=20 + seed)))
        assert bool((sizes(z - y, dims) <= sizes(z - other, dims) + 1e-9).all())
    with pytest.raises(ValueError, match="finite"):
        manifold.project_point(torch.full_like(x, torch.nan))


def each_point_is_by_itself(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:  # noqa: ARG001
    """What the others are changes nothing but roundings, not even where they are no numbers."""
    v = manifold.riemannian_gradient(x, gaussian(*x.shape))
    for spoilt in range(len(x)):
        others = [i for i in range(len(x)) if i != spoilt]
        bad = v.clone()
        bad[spoilt] = torch.nan
        for move in (manifold.retract, manifold.riemannian_gradient, lambda y, u: manifold.transport(y, y, u)):
            torch.testing.assert_close(move(x, bad)[others], move(x, v)[others], rtol=0, atol=16 * EPS)


def arguments_are_not_written_to(manifold: Manifold, x: Tensor, dims: tuple[int, ...]) -> None:  # noqa: ARG001
    g = gaussian(*x.shape)
    v = manifold.riemannian_gradient(x, g)
    kept = [t.clone() for t in (x, g, v)]
    manifold.riemannian_gradient(x, g)
    manifold.transport(x, manifold.retract(x, v), v)
    manifold.project_tangent(x, v)
    manifold.component_squares(x, v)
    manifold.error(x)
    assert all(torch.equal(a, b) for a, b in zip((x, g, v), kept, strict=True))


AXIOMS = [
    a_zero_step_stays,
    a_short_step_is_along_the_tangent,
    the_gradient_is_that_of_the_metric,
    a_derivative_along_the_retraction,
    transport_makes_tangents,
    a_rescaled_tangent_is_made_one,
    any_step_ends_on_it,
    points_have_no_error,
    nearest_points_are_points,
    each_point_is_by_itself,
    arguments_are_not_written_to,
]
