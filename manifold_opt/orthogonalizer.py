r"""The iteration :math:`X \leftarrow (1+\beta) X - \beta X X^\top X` and what is built on it.

Singular vectors stay; every singular value moves by :math:`s \mapsto (1+\beta)s - \beta s^3`. With
:math:`e = s^2 - 1`,

.. math:: e' = (1 - 2\beta)\,e + (\beta^2 - 2\beta)\,e^2 + \beta^2 e^3,

so small :math:`\beta` approaches orthogonality linearly, and :math:`\beta = 1/2`, the Newton-Schulz step,
quadratically. One kernel, three methods of the field:

- a tangent step, then one step at :math:`\beta = 1/2`: POGO (2026);
- the Riemannian field plus a small multiple of :math:`(I - X X^\top) X`: Landing (Ablin & Peyre, 2022);
- steps at :math:`\beta = 1/2` on a matrix whose singular values are known to lie in an interval: the
  polar factor without a factorization (Higham 2008, *Functions of Matrices*, chapter 8).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .products import gram, matmul_add, may_read
from .room import Room
from .stiefel import float64, wide

_REMEDY = "Initialize it first, with manifold_opt.init.orthogonal_ for one."


@wide
def orthogonalizer(x: Tensor, *, beta: float = 0.5, steps: int = 1) -> Tensor:
    r"""``steps`` iterations of :math:`X \leftarrow (1+\beta) X - \beta X X^\top X`.

    Computed as :math:`X + \beta (I - X X^\top) X`, where rounding in the second product is scaled by the
    error that is left: only the Gram matrix has to be precise.

    Args:
        x: ``(..., p, n)``, wide or tall, singular values below :func:`basin`.
        beta: rate, in (0, 1).
        steps: number of iterations.
    """
    for _ in range(steps):
        x = x + beta * (_identity(x) - x @ x.mT) @ x
    return x


def basin(beta: float) -> float:
    r"""Singular values below :math:`\sqrt{(1+\beta)/\beta}` stay positive under :func:`orthogonalizer`."""
    return ((1 + beta) / beta) ** 0.5


@wide
def polar_factor(x: Tensor) -> Tensor:
    r"""Orthogonal factor :math:`(X X^\top)^{-1/2} X` of matrices whose singular values are at least one.

    Args:
        x: ``(..., p, n)``, wide or tall: a point plus a tangent, up to rounding.
    """
    batch = x.reshape(-1, *x.shape[-2:]).clone()
    return polar_factor_(batch, out=torch.empty_like(batch), room=Room()).view(x.shape)


def polar_factor_(x: Tensor, *, out: Tensor, room: Room, start: Tensor | None = None) -> Tensor:
    r"""Orthogonal factor :math:`(X X^\top)^{-1/2} X` where :math:`X X^\top = I + D` with D positive semidefinite.

    D bounds the singular values from above, one bounds them from below, and between known ends it is known which
    polynomial to take and how many: in float32 one of degree 1 in D (2 T) while the bound on the spectral norm of
    the step is below 0.028, one of degree 2 (3 T) below 0.12, then with a Newton-Schulz step behind it (5 T) below
    0.49; Newton-Schulz steps alone (2 T each) reach 0.9 in three and 10^4 in 13. A matrix that has converged is
    left alone while others of its batch go on. Where the host may not look at D, always three Newton-Schulz steps
    (four in float64), their coefficients following D on the device.

    Args:
        x: ``(B, p, n)``, wide: a point plus a tangent, up to rounding. Overwritten.
        out: where the result goes; scratch until then.
        room: workspaces.
        start: the point. Where the count is fixed, a step too long for it is shortened towards the point, which
            ``out`` may alias.

    Returns:
        ``out``.
    """
    spare = out if x.shape[-2] == x.shape[-1] else room("third", (*x.shape[:-1], x.shape[-2]), like=x)
    defect = _defect(x, room)
    if may_read(x):
        size = _spectral_bound(defect, torch.abs(defect, out=spare))
        polynomials = _tabulated(size)
    else:
        size = _spectral_bound(defect, defect.abs())
        if start is not None:
            longest = _LONGEST_FIXED[x.dtype] ** 2
            share = (longest / size).clamp_max(1)[..., None, None]
            x, defect, size = torch.lerp(start, x, share.sqrt()), defect.mul_(share), size.clamp_max(longest)
        polynomials = _newton_schulz(size, _FIXED_COUNT[x.dtype])[0]
    for step, polynomial in enumerate(polynomials):
        if step > 0:
            defect = _defect(x, room)
        target = out if x is not out else room("second", x.shape, like=x)
        x = _apply(x, defect, polynomial, spare=spare if x is not spare else target, out=target)
    return out if x is out else out.copy_(x)


def nearest_orthogonal(x: Tensor) -> Tensor:
    r"""Nearest matrix with orthonormal rows or columns in Frobenius norm, for each matrix of a batch.

    The polar factor: with :math:`X = U S V^\top` it is :math:`U V^\top`, by SVD in float64. It is for
    the door; the optimizers do without.

    Args:
        x: ``(..., p, n)``, wide or tall, of full rank.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: values that are not finite, or rank-deficient, where the nearest is not unique.

    Reference: Higham (2008), *Functions of Matrices*, theorem 8.4.

    >>> import torch
    >>> from manifold_opt import nearest_orthogonal
    >>> nearest_orthogonal(torch.tensor([[3.0, 0.0], [0.0, -0.1]]))
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"nearest_orthogonal: needs real floating-point matrices (..., p, n), got {tuple(x.shape)} of {x.dtype}."
        )
    if not bool(x.isfinite().all()):
        raise ValueError(f"nearest_orthogonal: the value has entries that are not finite. {_REMEDY}")
    u, s, vh = torch.linalg.svd(float64(x), full_matrices=False)
    smallest, largest = s[..., -1], s[..., 0]
    if bool((smallest <= max(x.shape[-2:]) * torch.finfo(x.dtype).eps * largest).any()):
        raise ValueError(
            "nearest_orthogonal: the value is rank-deficient (smallest singular value "
            f"{float(smallest.min()):.1e}), so the nearest orthogonal matrix is not unique. {_REMEDY}"
        )
    # The product of two rounded factors is 2 to 6 times as far off as one Newton-Schulz step leaves it.
    return orthogonalizer(u @ vh).to(x)


def spectral_bound(a: Tensor) -> Tensor:
    """Upper bound on the spectral norm of symmetric ``a``: the smaller of two cheap norms, ``(...)``."""
    return _spectral_bound(a, a.abs())


def _spectral_bound(a: Tensor, magnitude: Tensor) -> Tensor:
    return torch.minimum(torch.linalg.vector_norm(a, dim=(-2, -1)), magnitude.sum(-1).amax(-1))


def _defect(x: Tensor, room: Room) -> Tensor:
    """D = X X^T - I."""
    defect = gram(x, out=room("first", (*x.shape[:-1], x.shape[-2]), like=x))
    defect.diagonal(dim1=-2, dim2=-1).sub_(1)
    return defect


class Polynomial(NamedTuple):
    """share + a + b D + c D^2, coefficients ``(B,)`` each; share is one unless given, c zero."""

    a: Tensor
    b: Tensor
    c: Tensor | None = None
    share: Tensor | None = None


def _apply(x: Tensor, defect: Tensor, polynomial: Polynomial, *, spare: Tensor, out: Tensor) -> Tensor:
    r"""share X + (a I + b D + c D^2) X, D overwritten.

    For short steps the share is one: what D multiplies is small then, and only D itself needs full precision. For
    long ones it is zero, for a is close to -1 there.
    """
    a, b, c, share = (x if x is None else x[..., None, None] for x in polynomial)
    if c is not None:
        square = gram(defect, out=spare)
        defect.mul_(b).add_(square.mul_(c))
    else:
        defect.mul_(b)
    defect.diagonal(dim1=-2, dim2=-1).add_(a[..., 0])
    return matmul_add(x if share is None else x * share, defect, x, out=out)


def _newton_schulz(size: Tensor, count: int) -> tuple[list[Polynomial], list[Tensor]]:
    r"""Coefficients a, b of ``count`` steps for eigenvalues of D in [0, size], and the gap that each leaves.

    :math:`f(x) = (3x - x^3)/2` takes equal values at both ends of :math:`\mu [l, u]` when
    :math:`\mu^2 = 3/(l^2 + l u + u^2)`; then all singular values lie in :math:`[1 - g, 1]` with
    :math:`g = (1-\mu l)^2 (2+\mu l)/2`. (Scaling: Chen & Chow 2014, *A stable scaling of Newton-Schulz*.)
    """
    return _scaled_steps(torch.ones_like(size), (1 + size).sqrt(), count)


def _scaled_steps(lower: Tensor, upper: Tensor, count: int) -> tuple[list[Polynomial], list[Tensor]]:
    steps, gaps = [], []
    for _ in range(count):
        scale = (3 / (lower**2 + lower * upper + upper**2)).sqrt()
        cube = scale**3 / 2
        steps.append(Polynomial(1.5 * scale - cube - 1, -cube))
        low = scale * lower
        gaps.append((1 - low) ** 2 * (2 + low) / 2)  # 1 - f(low), without the cancellation
        lower, upper = low * (3 - low**2) / 2, torch.ones_like(upper)
    return steps, gaps


def _quadratic(size: Tensor) -> tuple[Polynomial, Tensor]:
    r"""The polynomial of degree 2 that interpolates :math:`(1+s)^{-1/2}` at the Chebyshev nodes of [0, size].

    Divided differences in closed form, for they would cancel: with :math:`r_i = \sqrt{1+s_i}`,
    :math:`f_{01} = -1/(r_0 r_1 (r_0 + r_1))` and
    :math:`f_{012} = (r_0 + r_1 + r_2)/(r_0 r_1 r_2 (r_0+r_1)(r_1+r_2)(r_2+r_0))`.

    Returns:
        a, b, c, and a bound on the eigenvalues of the defect that is left: the interpolation error is at most
        :math:`\tfrac{15}{8} \text{size}^3/192`, and the Gram matrix feels it twice.
    """
    s0, s1, s2 = (size * (1 - math.cos(math.pi * k / 6)) / 2 for k in (1, 3, 5))
    r0, r1, r2 = ((1 + s).sqrt() for s in (s0, s1, s2))
    first = -1 / (r0 * r1 * (r0 + r1))
    second = (r0 + r1 + r2) / (r0 * r1 * r2 * (r0 + r1) * (r1 + r2) * (r2 + r0))
    a = -s0 / (r0 * (1 + r0)) - first * s0 + second * s0 * s1
    error = 15 / 8 * size**3 / 192
    root = (1 + size).sqrt()
    return Polynomial(a, first - second * (s0 + s1), second), error * root * (2 + error * root)


_FIXED_COUNT = {torch.float32: 3, torch.float64: 4}
_LONGEST_FIXED = {torch.float32: 0.9, torch.float64: 0.81}  # spectral norm of a step that so many steps cover
_EDGES = 2.0 ** (torch.arange(-480, 321, dtype=torch.float64) / 8)  # bounds on D, up to steps of 10^6
_MOST = 24  # more than any of them needs


@functools.cache
def _table(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every size of ``_EDGES`` the cheapest polynomials that leave no more than rounding.

    Returns:
        Edges, ``(E,)``; how many polynomials, ``(E,)``; whether the first is quadratic, ``(E,)``; coefficients of
        each, ``(E, _MOST, 4)``: a, b, c, share.
    """
    eps = torch.finfo(dtype).eps
    linear, gaps = _newton_schulz(_EDGES, _MOST)
    quadratic, left = _quadratic(_EDGES)
    inside = left.clamp_max(0.5)
    behind, gaps_behind = _scaled_steps((1 - inside).sqrt(), (1 + inside).sqrt(), _MOST)
    count = 1 + (torch.stack(gaps) > eps / 2).sum(0)
    count_behind = torch.where(left <= eps, 0, 1 + (torch.stack(gaps_behind) > eps / 2).sum(0))
    # In products: a Newton-Schulz step takes 2, the quadratic 3.
    better = (left < 0.5) & (3 + 2 * count_behind < 2 * count)
    count = torch.where(better, 1 + count_behind, count)
    coefficients = torch.zeros(len(_EDGES), _MOST, 4, dtype=torch.float64)
    none = torch.zeros_like(_EDGES)
    for step, (plain, after) in enumerate(zip(linear, [quadratic, *behind], strict=False)):
        columns = (torch.where(better, y, x) for x, y in zip(_columns(plain, none), _columns(after, none), strict=True))
        a, b, c = (torch.where(step < count, column, 0) for column in columns)
        long = a < -0.5
        coefficients[:, step] = torch.stack([torch.where(long, a + 1, a), b, c, torch.where(long, 0.0, 1.0)], -1)
    return _EDGES.to(dtype), count, better, coefficients.to(dtype)


def _columns(polynomial: Polynomial, none: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return polynomial.a, polynomial.b, none if polynomial.c is None else polynomial.c


def _tabulated(size: Tensor) -> Iterator[Polynomial]:
    """Polynomials for defects up to ``size``, ``(B,)``, as many as the largest needs; a NaN asks for the most."""
    edges, counts, quadratic, coefficients = _table(size.dtype)
    row = torch.bucketize(size, edges).clamp_max(len(edges) - 1)
    most, squared, long = int(counts[row].max()), bool(quadratic[row].any()), not bool((size <= 1).all())
    for step in range(most):
        a, b, c, share = coefficients[row, step].unbind(-1)
        yield Polynomial(a, b, c if squared and step == 0 else None, share if long else None)


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
