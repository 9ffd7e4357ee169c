r"""The geometry of the Stiefel manifold, as pure functions on batches ``(..., p, n)``, real or complex.

A point is a *wide* matrix (``p <= n``) with orthonormal rows, :math:`W W^\mathsf{H} = I_p`. A tall matrix
(``p > n``, orthonormal columns) is the transpose of a point, and functions take its transpose. The tangent
space at :math:`W` is

.. math:: T_W = \{V : V W^\mathsf{H} + W V^\mathsf{H} = 0\}
              = \{\Omega W + N : \Omega^\mathsf{H} = -\Omega,\; N W^\mathsf{H} = 0\},

with a rotational part :math:`\Omega = V W^\mathsf{H}` and a normal part :math:`N`, absent when ``p == n``.

:math:`A^\mathsf{H}` is the conjugate transpose, for real matrices the transpose :math:`A^\top`. Other modules write
:math:`\top` for both. For complex matrices the diagonal of :math:`\Omega` is imaginary, not zero. The inner product is
:math:`\operatorname{Re} \operatorname{tr}(A^\mathsf{H} B)`, and gradients are as torch defines them,
:math:`\partial f/\partial \operatorname{Re} W + i\,\partial f/\partial \operatorname{Im} W`.

Reference: Edelman, Arias & Smith (1998), *The geometry of algorithms with orthogonality constraints*.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from ..linalg.matrices import DTYPES, check_whole, float64, in_double, is_tall, skew, sym, wide
from ..linalg.precision import working_dtype
from ..linalg.products import gram_minus_identity, norm

Metric = Literal["euclidean", "canonical"]
METRICS: tuple[str, ...] = get_args(Metric)


def riemannian_gradient(w: Tensor, g: Tensor, metric: Metric = "euclidean") -> Tensor:
    r"""Return the Riemannian gradient at ``w`` of a function with Euclidean gradient ``g``.

    .. math::
        \text{euclidean: } G - \operatorname{sym}(G W^\mathsf{H}) W \qquad
        \text{canonical: } G - W G^\mathsf{H} W

    The first is also the orthogonal projection onto the tangent space, so it does not change a tangent.
    The second is not a projection; on a square matrix it is twice the first.

    Args:
        w: points, ``(..., p, n)``, orthonormal rows (``p <= n``) or columns: float32, float64, complex64 or
            complex128.
        g: Euclidean gradients, same shape and dtype.
        metric: ``"euclidean"`` or ``"canonical"``.

    Returns:
        Tangents at ``w``, same shape.

    Raises:
        ValueError: unknown metric, or shapes or dtypes of ``w`` and ``g`` that differ.

    Reference: Edelman, Arias & Smith (1998), equation 2.53 and section 2.2.1.

    >>> import torch
    >>> from manifold_opt import riemannian_gradient
    >>> w = torch.eye(2)
    >>> riemannian_gradient(w, torch.tensor([[5.0, 1.0], [3.0, 7.0]]))
    tensor([[ 0., -1.],
            [ 1.,  0.]])
    >>> riemannian_gradient(torch.tensor([[1.0j]]), torch.tensor([[3.0 + 4.0j]]))  # the unit circle, at its top
    tensor([[3.+0.j]])
    """
    check_metric("riemannian_gradient", metric)
    check_pair("riemannian_gradient", w, g)
    return _project(w, g, metric=metric)


@wide
def _project(w: Tensor, g: Tensor, *, metric: Metric) -> Tensor:
    if metric == "canonical":
        return g - w @ g.mH @ w
    if w.shape[-2] == w.shape[-1]:
        return skew(g @ w.mH) @ w
    return g - sym(g @ w.mH) @ w


def transport(w: Tensor, v: Tensor) -> Tensor:
    r"""Bring ``v``, tangent at a nearby point, into the tangent space at ``w`` by orthogonal projection.

    Reference: Absil, Mahony & Sepulchre (2008), section 8.1.3, vector transport by projection.
    """
    return _project(w, v, metric="euclidean")


def coordinates(w: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    r"""Return the parts :math:`(\Omega, N)` of the projection of wide ``g``, or only :math:`(\Omega)` if square."""
    along = g @ w.mH
    return (skew(along),) if w.shape[-2] == w.shape[-1] else (skew(along), g - along @ w)


def random(
    *shape: int,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Return points ``(..., p, n)`` from the uniform (Haar) distribution; for a complex dtype they are unitary.

    A QR factorization by reflections maps the k-th column, from row k on, to a multiple of the first unit vector. If
    the matrix is Gaussian, then these parts of the columns are Gaussian too, and independent. So they are drawn, and no
    matrix is factorized. For float32 and below they are drawn in float32.

    Reference: Stewart (1980), *The efficient generation of random orthogonal matrices*.
    """
    *batch, p, n = shape
    dtype = dtype or torch.get_default_dtype()
    drawn = torch.randn(*batch, min(p, n), max(p, n), dtype=working_dtype(dtype), device=device, generator=generator)
    x = drawn.to(in_double(dtype)).triu_()  # the columns as rows, which LAPACK wants to be contiguous
    first = x.diagonal(dim1=-2, dim2=-1)
    first.masked_fill_(first == 0, 1e-30)  # one of some 2^24 draws in float32 is zero, which has no direction
    size, phase = torch.linalg.vecdot(x, x).real.sqrt(), first.sgn()
    # I - tau v v^H with v = x / (x_1 + phase |x|) maps x to -phase |x| times the unit vector.
    tau = (1 + first.abs() / size).to(x.dtype)
    x /= (first + phase * size).unsqueeze(-1)
    q = torch.linalg.householder_product(x.mT, tau).mul_(-phase.unsqueeze(-2))
    return (q if p >= n else q.mT).to(dtype)


@torch.no_grad()
def error(x: Tensor) -> Tensor:
    r"""Return the distance from orthogonality, :math:`\|I - W W^\mathsf{H}\|_F` per matrix, in float64: ``(...)``."""
    x = float64(x)
    return norm(gram_minus_identity(x.mH if is_tall(x) else x))


def check_metric(name: str, metric: str) -> None:
    """Raise a ValueError that lists the metrics, unless ``metric`` is one."""
    if metric not in METRICS:
        raise ValueError(f"{name}: metric must be one of {', '.join(METRICS)}, got {metric!r}.")


def check_pair(name: str, w: Tensor, v: Tensor) -> None:
    """Raise a ValueError unless ``w`` and ``v`` are matrices of one shape and one dtype of :data:`DTYPES`."""
    check_whole(name, w)
    check_whole(name, v)
    if w.ndim < 2 or w.shape != v.shape or w.dtype != v.dtype or w.dtype not in DTYPES:
        raise ValueError(
            f"{name}: needs two floating-point tensors (..., p, n) of the same shape and dtype, float32, float64, "
            "complex64 or complex128, got "
            f"{tuple(w.shape)} {w.dtype} and {tuple(v.shape)} {v.dtype}."
        )


def to_frame(w: Tensor, moment: Tensor, is_mean_square: bool) -> Tensor:
    r"""Convert a moment of G at square ``w`` to the moment of :math:`A = G W^\top`.

    The result is exact for a mean. For a mean square, entries of G and their real and imaginary parts are assumed to be
    independent.
    """
    return _square_mixed(moment, w.mH) if is_mean_square else moment @ w.mH


def from_frame(w: Tensor, moment: Tensor, is_mean_square: bool) -> Tensor:
    """Convert a moment back from the frame. For a mean square, entries of A are assumed to be independent."""
    return _square_mixed(moment, w) if is_mean_square else moment @ w


def _square_mixed(v: Tensor, w: Tensor) -> Tensor:
    r"""Return mean squares of the entries of M W from those of M; complex: of real and imaginary parts."""
    if not w.is_complex():
        return v @ (w * w)
    real, imaginary = w.real.square(), w.imag.square()
    return torch.complex(v.real @ real + v.imag @ imaginary, v.imag @ real + v.real @ imaginary)
