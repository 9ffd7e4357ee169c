r"""The polar factor of a point plus a tangent, by as few products as its length allows.

With :math:`X = W + V` and :math:`D = X X^\top - I`, which is :math:`V V^\top` up to rounding, the factor is
:math:`(I + D)^{-1/2} X`. The norm of D says what polynomials in D come close enough: D is known to lie between zero
and that, so the ends of the interval are known, and nothing has to be tried.

Reference: Higham (2008), *Functions of Matrices*, chapter 8.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .orthogonalizer import spectral_bound
from .products import gram, host_can_branch, matmul_add, norm
from .room import Room
from .stiefel import wide
from .tally import Tally


@wide
def polar_factor(x: Tensor) -> Tensor:
    r"""Orthogonal factor :math:`(X X^\top)^{-1/2} X` of matrices whose singular values are at least one.

    Args:
        x: ``(..., p, n)``, wide or tall: a point plus a tangent, up to rounding.
    """
    batch = x.reshape(-1, *x.shape[-2:]).clone()
    return polar_factor_(batch, out=torch.empty_like(batch), room=Room()).view(x.shape)


def polar_factor_(
    x: Tensor, *, out: Tensor, room: Room, start: Tensor | None = None, tally: Tally | None = None
) -> Tensor:
    r"""Orthogonal factor :math:`(X X^\top)^{-1/2} X` where :math:`X X^\top = I + D` with D positive semidefinite.

    D bounds the singular values from above, one bounds them from below, and between known ends it is known which
    polynomial to take and how many: in float32 one of degree 1 in D (2 T) while the bound on the spectral norm of
    the step is below 0.039, one of degree 2 (3 T) below 0.148, two (5 T at most) below 0.57, and 13 at 10^4. A
    matrix that has converged is left alone while others of its batch go on. Where the host may not look at D,
    always three Newton-Schulz steps (four in float64), their coefficients following D on the device.

    The bound is more than the norm itself: for a step of full rank and a few hundred rows twice it where it comes from
    D, 1.4 times where from D^2, and hardly more than it for a step of low rank.

    Args:
        x: ``(B, p, n)``, wide: a point plus a tangent, up to rounding. Overwritten.
        out: where the result goes; scratch until then.
        room: workspaces.
        start: the point. Where the count is fixed, a step too long for it is shortened towards the point, which
            ``out`` may alias.
        tally: where that is counted.

    Returns:
        ``out``.
    """
    spare = out if x.shape[-2] == x.shape[-1] else room("third", (*x.shape[:-1], x.shape[-2]), like=x)
    defect = _defect(x, room)
    size = spectral_bound(defect, spare)
    polynomials: Iterable[Polynomial]
    square: Tensor | None = None
    if host_can_branch(x):
        easy = _EASY[size.dtype]
        if x.shape[-2] >= LARGE and bool(((size > easy) & (size <= 4 * easy)).any()):
            size = probed(defect, size, easy)
        if not bool((size <= easy).all()):
            # The norm of D^2 is a tighter bound, and a polynomial of degree 2 needs D^2 anyway.
            square = gram(defect, out=spare)
            refined = norm(square).sqrt()
            size = torch.where(size <= easy, size, torch.minimum(size, refined))
        polynomials = _tabulated(size)
    else:
        if start is not None:
            longest = _LONGEST_FIXED[size.dtype] ** 2
            share = (longest / size).clamp_max(1)[..., None, None]
            if tally is not None:
                tally.add("clamped_steps", share < 1)
            x = torch.lerp(start, x, share.sqrt().to(x.dtype))
            defect, size = defect.mul_(share), size.clamp_max(longest)
        polynomials = _newton_schulz(size, _FIXED_COUNT[size.dtype])[0]
    for step, polynomial in enumerate(polynomials):
        if step > 0:
            defect = _defect(x, room)
        # Where D^2 lies in out, it is used up before anything else is written there.
        result = out if x is not out else room("second", x.shape, like=x)
        x = _apply(x, defect, polynomial, square=square if step == 0 else None, out=result)
    return out if x is out else out.copy_(x)


def probed(defect: Tensor, bound: Tensor, easy: float) -> Tensor:
    r"""A tighter size where the bound is just above ``easy``, too large for degree 1, and that can do no harm.

    :math:`\|D\|_2 \le (\operatorname{tr} D^6)^{1/6}`, the trace estimated with random rows z as
    :math:`p \|z D^3\|^2 / \|z\|^2` (Hutchinson): 1.4 times the norm where many eigenvalues are of like size, as the
    rank :math:`(\operatorname{tr} D)^2 / \|D\|_F^2` says they are. An estimate: should one eigenvalue far above the
    others hide from it, a polar factor leaves at most 3/4 bound^2, below 3e-5 in float32, and the next step squares
    that; a rotation (orthographic.py) at most bound^2/4, below 8e-6, until the next look.
    """
    z = _probes(defect.shape[-1]).to(defect).expand(len(defect), -1, -1)
    scale = norm(defect)
    rank = (defect.diagonal(dim1=-2, dim2=-1).sum(-1).real / scale).square()
    for _ in range(3):
        z = (z @ defect) / scale[:, None, None]
    estimate = 1.2 * norm(z) ** (1 / 3) * scale
    harmless = (bound > easy) & (bound <= 4 * easy) & (rank >= 16)
    return torch.where(harmless, torch.minimum(bound, estimate), bound)


@functools.cache
def _probes(p: int) -> Tensor:
    """Two rows ``(2, p)`` of signs without pattern, the same in every run, scaled to a sum of squares of p."""
    root = torch.tensor([[2.0], [3.0]], dtype=torch.float64, device="cpu").sqrt()
    phase = torch.arange(1, p + 1, dtype=torch.float64, device="cpu").square() * root
    return torch.where(phase.frac() < 0.5, 0.5**0.5, -(0.5**0.5))


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


def _apply(x: Tensor, defect: Tensor, polynomial: Polynomial, *, square: Tensor | None, out: Tensor) -> Tensor:
    r"""Apply a polynomial: share X + (a I + b D + c D^2) X, D and D^2 overwritten.

    For short steps the share is one: what D multiplies is small then, and only D itself needs full precision. For
    long ones it is zero, for a is close to -1 there.
    """
    a, b, c, share = polynomial
    defect.mul_(b[:, None, None])
    if c is not None and square is not None:
        defect.add_(square.mul_(c[:, None, None]))
    defect.diagonal(dim1=-2, dim2=-1).add_(a[:, None])
    return matmul_add(x if share is None else x * share[:, None, None], defect, x, out=out)


def _newton_schulz(size: Tensor, count: int) -> tuple[list[Polynomial], list[Tensor]]:
    r"""Coefficients a, b of ``count`` steps for eigenvalues of D in [0, size], and the gap that each leaves.

    :math:`f(x) = (3x - x^3)/2` takes equal values at both ends of :math:`\mu [l, u]` when
    :math:`\mu^2 = 3/(l^2 + l u + u^2)`; then all singular values lie in :math:`[1 - g, 1]` with
    :math:`g = (1-\mu l)^2 (2+\mu l)/2`, and are centred at one. (Scaling: Chen &
    Chow 2014, *A stable scaling of Newton-Schulz*.)
    """
    return _scaled_steps(torch.ones_like(size), (1 + size).sqrt(), count)


def _scaled_steps(lower: Tensor, upper: Tensor, count: int) -> tuple[list[Polynomial], list[Tensor]]:
    steps, gaps = [], []
    for _ in range(count):
        scale = (3 / (lower**2 + lower * upper + upper**2)).sqrt()
        cube = scale**3 / 2
        low = scale * lower
        gap = (1 - low) ** 2 * (2 + low) / 2  # 1 - f(low), without the cancellation
        middle = 1 + gap / 2
        steps.append(Polynomial((1.5 * scale - cube - 1) * middle + gap / 2, -cube * middle))
        gaps.append(gap / 2)
        lower, upper = low * (3 - low**2) / 2 * middle, middle
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
_EASY = {torch.float32: 1.5e-3, torch.float64: 6e-8}  # norms of D that a polynomial of degree 1 is enough for
_TOLERANCE = 2  # machine epsilons that a defect may be left with: rounding leaves as much
LARGE = 128  # rows from which on probes are worth their price
_OCTAVE, _OFFSET = 8, 480  # how the table divides bounds on D: rows an octave, the row of one
_EDGES = 2.0 ** ((torch.arange(801, dtype=torch.float64, device="cpu") - _OFFSET) / _OCTAVE)  # up to steps of 10^6
_MOST = 24  # more than any of them needs


def _table(dtype: torch.dtype) -> tuple[list[int], list[bool], Tensor]:
    """For every size of ``_EDGES`` the cheapest polynomials that leave no more than rounding.

    Returns:
        How many polynomials are needed up to a row; whether any up to it begins with a quadratic; coefficients of
        each, ``(rows, _MOST, 4)``: a, b, c, share.
    """
    eps = _TOLERANCE * torch.finfo(dtype).eps
    linear, gaps = _newton_schulz(_EDGES, _MOST)
    quadratic, left = _quadratic(_EDGES)
    inside = left.clamp_max(0.5)
    behind, gaps_behind = _scaled_steps((1 - inside).sqrt(), (1 + inside).sqrt(), _MOST)
    count = 1 + (torch.stack(gaps) > eps / 2).sum(0)
    count_behind = torch.where(left <= eps, 0, 1 + (torch.stack(gaps_behind) > eps / 2).sum(0))
    # In products: a Newton-Schulz step takes 2, the quadratic 3.
    better = (left < 0.5) & (3 + 2 * count_behind < 2 * count)
    count = torch.where(better, 1 + count_behind, count)
    coefficients = _EDGES.new_zeros(len(_EDGES), _MOST, 4)
    none = torch.zeros_like(_EDGES)
    for step, (plain, after) in enumerate(zip(linear, [quadratic, *behind], strict=False)):
        columns = (torch.where(better, y, x) for x, y in zip(_columns(plain, none), _columns(after, none), strict=True))
        a, b, c = (torch.where(step < count, column, 0) for column in columns)
        long = a < -0.5
        coefficients[:, step] = torch.stack([torch.where(long, a + 1, a), b, c, torch.where(long, 0.0, 1.0)], -1)
    return count.cummax(0).values.tolist(), better.cummax(0).values.tolist(), coefficients.to(dtype)


def _columns(polynomial: Polynomial, none: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return polynomial.a, polynomial.b, none if polynomial.c is None else polynomial.c


TABLES = {dtype: _table(dtype) for dtype in (torch.float32, torch.float64)}


def _tabulated(size: Tensor) -> Iterator[Polynomial]:
    """Polynomials for defects up to ``size``, ``(B,)``, as many as the largest needs; a NaN asks for the most."""
    counts, quadratic, coefficients = TABLES[size.dtype]
    row = (size.log2() * _OCTAVE).ceil().add_(_OFFSET).nan_to_num_(nan=math.inf).clamp_(0, len(counts) - 1).long()
    last = int(row.max())
    most, squared, long = counts[last], quadratic[last], last > _OFFSET
    for step in range(most):
        a, b, c, share = coefficients[row, step].unbind(-1)
        yield Polynomial(a, b, c if squared and step == 0 else None, share if long else None)
