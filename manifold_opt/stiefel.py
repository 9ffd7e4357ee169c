r"""The geometry of the Stiefel manifold, as pure functions on batches ``(..., p, n)``.

A point is a *wide* matrix (``p <= n``) with orthonormal rows, :math:`W W^\top = I_p`. A tall matrix
(``p > n``, orthonormal columns) is the transpose of such a point and is treated as one. The tangent
space at :math:`W` is

.. math:: T_W = \{V : V W^\top + W V^\top = 0\}
              = \{\Omega W + N : \Omega^\top = -\Omega,\; N W^\top = 0\},

with a rotational part :math:`\Omega = V W^\top` and a normal part :math:`N`, absent when ``p == n``.

Reference: Edelman, Arias & Smith (1998), *The geometry of algorithms with orthogonality constraints*.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Metric = Literal["euclidean", "canonical"]
METRICS: tuple[str, ...] = get_args(Metric)


def is_tall(x: Tensor) -> bool:
    """Whether the matrices of ``x`` have more rows than columns."""
    return x.shape[-2] > x.shape[-1]


def wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function written for wide matrices take tall ones too, as transposes of wide ones."""

    @functools.wraps(function)
    def on_wide(*matrices: Tensor, **options: object) -> Tensor:
        if not is_tall(matrices[0]):
            return function(*matrices, **options)
        return function(*(m.mT for m in matrices), **options).mT

    return on_wide


def sym(a: Tensor) -> Tensor:
    r"""Symmetric part :math:`(A + A^\top)/2`."""
    return 0.5 * (a + a.mT)


def skew(a: Tensor) -> Tensor:
    r"""Skew-symmetric part :math:`(A - A^\top)/2`."""
    return (a - a.mT) / 2


def project(w: Tensor, g: Tensor, metric: Metric = "euclidean") -> Tensor:
    r"""Riemannian gradient at ``w`` of a function with Euclidean gradient ``g``.

    .. math::
        \text{euclidean: } G - \operatorname{sym}(G W^\top) W \qquad
        \text{canonical: } G - W G^\top W

    The first is also the orthogonal projection onto the tangent space: it leaves tangents as they are.
    The second is not; on a square matrix it is twice the first.

    Args:
        w: points, ``(..., p, n)``, orthonormal rows (``p <= n``) or columns.
        g: Euclidean gradients, same shape and dtype.
        metric: ``"euclidean"`` or ``"canonical"``.

    Returns:
        Tangents at ``w``, same shape.

    Raises:
        ValueError: unknown metric, or shapes or dtypes of ``w`` and ``g`` that differ.

    Reference: Edelman, Arias & Smith (1998), equation 2.53 and section 2.2.1.

    >>> import torch
    >>> from manifold_opt import project
    >>> w = torch.eye(2)
    >>> project(w, torch.tensor([[5.0, 1.0], [3.0, 7.0]]))
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    """
    check_metric("project", metric)
    check_pair("project", w, g)
    return _project(w, g, metric=metric)


@wide
def _project(w: Tensor, g: Tensor, *, metric: Metric) -> Tensor:
    if metric == "canonical":
        return g - w @ g.mT @ w
    if w.shape[-2] == w.shape[-1]:
        return skew(g @ w.mT) @ w
    return g - sym(g @ w.mT) @ w


def transport(w: Tensor, v: Tensor) -> Tensor:
    r"""Bring ``v``, tangent at a nearby point, into the tangent space at ``w`` by orthogonal projection.

    Reference: Absil, Mahony & Sepulchre (2008), section 8.1.3, vector transport by projection.
    """
    return _project(w, v, metric="euclidean")


def coordinates(w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    r"""Coordinates :math:`(\Omega, N)` of the projection of ``g``, wide; :math:`(\Omega)` alone if square."""
    along = g @ w.mT
    return (skew(along),) if w.shape[-2] == w.shape[-1] else (skew(along), g - along @ w)


def from_coordinates(w: Tensor, omega: Tensor, normal: Tensor | None = None) -> Tensor:
    r"""The tangent :math:`\Omega W + N`, wide; what of ``normal`` is not normal to ``w`` is dropped."""
    return omega @ w if normal is None else normal + (omega - normal @ w.mT) @ w


def random(
    *shape: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Points of shape ``(..., p, n)`` drawn from the uniform (Haar) distribution."""
    *batch, p, n = shape
    gaussian = torch.randn(*batch, max(p, n), min(p, n), dtype=torch.float64, device=device, generator=generator)
    q, r = torch.linalg.qr(gaussian)
    # QR alone is not uniform: the signs of its diagonal depend on the algorithm (Mezzadri 2007).
    q = q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)
    return (q if p >= n else q.mT).to(dtype or torch.get_default_dtype())


def error(x: Tensor) -> Tensor:
    r"""Distance from orthogonality, :math:`\|I - W W^\top\|_F` of each matrix, in float64: ``(...)``."""
    x = float64(x)
    gram = x.mT @ x if is_tall(x) else x @ x.mT
    identity = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return torch.linalg.matrix_norm(identity - gram)


def error_at_rounding(p: int, n: int, dtype: torch.dtype) -> float:
    """Largest :func:`error` that still counts as orthogonal to rounding in ``dtype``.

    Backward stable algorithms leave a few units of roundoff a row, and rows add up as their root. Measuring it in
    float64 adds the rounding of sums of n products.
    """
    measured = torch.finfo(torch.float64).eps * max(p, n) ** 0.5
    return (8 * torch.finfo(dtype).eps + measured) * min(p, n) ** 0.5


def float64(x: Tensor) -> Tensor:
    """``x`` in float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()


def check_metric(name: str, metric: str) -> None:
    """Raise a ValueError that lists the metrics, unless ``metric`` is one."""
    if metric not in METRICS:
        raise ValueError(f"{name}: metric must be one of {', '.join(METRICS)}, got {metric!r}.")


def check_pair(name: str, w: Tensor, v: Tensor) -> None:
    """Raise a ValueError unless ``w`` and ``v`` are matrices of one shape and one floating dtype."""
    if w.ndim < 2 or w.shape != v.shape or w.dtype != v.dtype or w.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: needs two real floating-point tensors (..., p, n) of the same shape and dtype, "
            f"float32 or float64, got "
            f"{tuple(w.shape)} {w.dtype} and {tuple(v.shape)} {v.dtype}."
        )
