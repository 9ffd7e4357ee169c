r"""The orthographic retraction of square blocks: all but the symmetric part of the rotation is there already.

.. math:: R_W(\Omega W) = Q W, \qquad Q = \Omega + (I + \Omega^2)^{1/2},

is the point straight above W + V, as normals run at W: the skew part of Q is the step itself. With
:math:`B = -\Omega^2 = \Omega\Omega^\top`, the *bend* of the rotation, what is missing is
:math:`(I - B)^{1/2} - I`, a polynomial in B while B is small, and its norm says which.

A rotation keeps :math:`E = W W^\top - I` as large as it is (it becomes :math:`Q E Q^\top`), and rounding adds a
little in every step, less than measuring E does. So in turn one block in four (float64: two) has E measured, and half
of it taken off in the same product with W.

Reference: Absil & Malick (2012), *Projection-like retractions on matrix manifolds*, SIAM J. Optim. 22.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .orthogonalizer import orthogonalizer, spectral_bound
from .polar_factor import LARGE, probed
from .products import add_gram_, gram, host_can_branch, matmul, matmul_add, norm
from .room import Room
from .schemes import polar
from .stiefel import skew

# Steps from one look at the orthogonality of a block to the next.
INTERVAL = {torch.float32: 4, torch.float64: 2, torch.complex64: 4, torch.complex128: 2}
SEAM = 2.0**-5.375  # norm of the bend up to which this retraction is for: steps of spectral norm 0.155


def orthographic(w: Tensor, v: Tensor) -> Tensor:
    r"""Orthographic retraction for short steps on square matrices, up to a spectral norm of 0.155; polar elsewhere.

    .. math:: R_W(V) = \big(\Omega + (I + \Omega^2)^{1/2}\big) W

    The result differs from W + V by a normal vector, and exists for steps up to 1. How long a step is is known by an
    upper bound, up to 1.4 times the norm for a step of full rank and a few hundred rows.

    Reference: Absil & Malick (2012), section 4.3.
    """
    if w.shape[-2] != w.shape[-1]:
        return polar(w, v)
    room, points = Room(), w.reshape(-1, *w.shape[-2:]).clone()
    omega = skew(v.reshape(points.shape) @ points.mH)
    bent = bend_of(omega, room)
    short = bent.size <= SEAM
    if host_can_branch(w) and not bool(short.any()):
        return polar(w, v)
    rotated = rotate(points, omega, bent, room=room, due=slice(None)).view(w.shape)
    if not host_can_branch(w) or bool(short.all()):
        return rotated
    return torch.where(short.view(*w.shape[:-2], 1, 1), rotated, polar(w, v))


class Bend(NamedTuple):
    """How far a rotation bends: B, ``(batch, p, p)``, and an upper bound ``(batch,)`` on its spectral norm."""

    bend: Tensor
    size: Tensor


def bend_of(omega: Tensor, room: Room) -> Bend:
    r""":math:`B = \Omega\Omega^\top` of skew ``(batch, p, p)``, and how large it is: 1 T."""
    bend = gram(omega, out=room("second", omega.shape, like=omega))
    size = norm(bend)
    if not bend.is_complex():
        # The eigenvalues of a real Omega come in pairs, +-i t: those of B, t^2, are double.
        size.mul_(0.5**0.5)
    # With many eigenvalues of like size that is far more than the largest. Closer looks while they can matter.
    if not host_can_branch(omega) or not bool((size <= _TAYLOR[size.dtype]).all()):
        size = torch.minimum(size, spectral_bound(bend))
    easy = _EASY[size.dtype]
    if host_can_branch(omega) and omega.shape[-1] >= LARGE and bool((size > easy).any()):
        size = probed(bend, size, easy)
    return Bend(bend, size)


def rotate(w: Tensor, omega: Tensor, bend: Bend, *, room: Room, due: slice | Tensor) -> Tensor:
    r"""Q W for square ``w``, ``(batch, p, p)``: 1 T, and of the blocks that are ``due`` the Gram matrix.

    ``omega`` and ``bend`` are overwritten. What comes back is in ``room``, and not right for blocks whose bend is
    larger than :data:`SEAM`. (Where the host may not look, all blocks are due, and longer steps are shortened.)
    """
    if not host_can_branch(w):
        due = slice(None)
    turn = _turn_(omega, bend) if host_can_branch(w) else _fixed_turn_(omega, bend)
    points = w[due]
    if len(points):
        # The workspace "second" has held B, holds E now, and then the result.
        error = gram(points, out=room("second", points.shape, like=w))
        error.diagonal(dim1=-2, dim2=-1).sub_(1)
        if host_can_branch(w):
            w = _brought_back(w, due, points, error)
        if isinstance(due, slice):
            turn[due].add_(error, alpha=-0.5)
        else:
            turn.index_add_(0, due, error, alpha=-0.5)
    return matmul_add(w, turn, w, out=room("second", w.shape, like=w))


def _turn_(omega: Tensor, bent: Bend) -> Tensor:
    """Q - I, written to ``omega``."""
    bend, size = bent
    if bool((size <= _TAYLOR[size.dtype]).all()):
        return omega.add_(bend, alpha=-0.5)
    coefficients = TABLES[size.dtype]
    row = ((size.log2() * _OCTAVE).ceil() - _FIRST).nan_to_num_(nan=0.0).clamp_(0, len(coefficients) - 1).long()
    chosen = coefficients[row]
    degree = int((chosen != 0).any(0).nonzero().max())
    degree += degree > 1 and degree % 2  # the last coefficient of an even degree may have been rounded to zero
    return _add_polynomial_(omega, bend, [c[:, None, None] for c in chosen.unbind(-1)], degree)


def _add_polynomial_(omega: Tensor, bend: Tensor, c: list[Tensor], degree: int) -> Tensor:
    """Add c_0 I + c_1 B + c_2 B^2 + ... to ``omega``: 0 T up to degree 1, 1 T for degree 2, one more for two more.

    Where there are higher ones, for float64, by Horner's rule in B^2, whose bits do not depend on the degree.
    Elsewhere without memory, for B is overwritten.
    """
    horner = _MOST[c[0].dtype] > 2 or degree > 2
    if horner and degree > 1:
        square = matmul(bend, bend, out=torch.empty_like(bend))
        total = square * c[degree]
        for k in range(degree - 2, 1, -2):
            total.add_(bend * c[k + 1]).diagonal(dim1=-2, dim2=-1).add_(c[k][..., 0])
            total = matmul(square, total, out=torch.empty_like(bend))
        omega.add_(total)
    omega.addcmul_(bend, c[1])
    omega.diagonal(dim1=-2, dim2=-1).add_(c[0][..., 0])
    if degree == 2 and not horner:
        add_gram_(omega, bend.mul_((-c[2]).sqrt()), alpha=-1)  # c_2 is negative, and B symmetric, or Hermitian
    return omega


def _brought_back(w: Tensor, due: slice | Tensor, points: Tensor, error: Tensor) -> Tensor:
    """``w``, but for blocks whose error is not of rounding, because something has written to them: back where it is.

    A block has to be off by more than twice the root of eps for that; half of less, taken off, leaves 4 eps at most.
    """
    size = norm(error, keepdim=True)
    far = size > 2 * torch.finfo(error.dtype).eps ** 0.5  # a NaN is not
    if not bool(far.any()):
        return w
    shrunk = torch.where(size > 1, points / (1 + size).sqrt(), points)  # singular values of at most sqrt 2
    error.masked_fill_(far, 0)
    w = w.clone()
    w[due] = torch.where(far, orthogonalizer(shrunk, steps=8), points)
    return w


def _fixed_turn_(omega: Tensor, bent: Bend) -> Tensor:
    """Q - I, written to ``omega``, by one polynomial for all steps up to the longest, to which it shortens."""
    bend, size = bent
    share = (LONGEST_FIXED / size).clamp_max(1)[:, None, None]
    c = [size.new_full((1, 1, 1), x) for x in _FIXED[size.dtype]]
    return _add_polynomial_(omega.mul_(share.sqrt()), bend.mul_(share), c, len(c) - 1)


def _fit(size: Tensor, degree: int) -> Tensor:
    r"""Coefficients ``(rows, degree + 1)`` that interpolate :math:`\sqrt{1-x} - 1` at the Chebyshev nodes of [0, size].

    In y = x / size, where the equations are the same for all sizes.
    """
    angles = (torch.arange(degree + 1, dtype=torch.float64, device="cpu") + 0.5) * (math.pi / (degree + 1))
    y = (1 - angles.cos()) / 2
    powers = torch.arange(degree + 1, dtype=torch.float64, device="cpu")
    x = size[:, None] * y
    values = -x / (1 + (1 - x).sqrt())  # without the cancellation
    return torch.linalg.solve(y[:, None] ** powers, values.mT).mT / size[:, None] ** powers


def _left(size: Tensor, degree: int) -> Tensor:
    r"""What the interpolant of a degree leaves of :math:`Q Q^\top - I`: twice the remainder of the interpolation."""
    binomial = 1.0
    for k in range(degree + 1):
        binomial *= (0.5 - k) / (k + 1)
    return 4 * abs(binomial) * (size / 4) ** (degree + 1) * (1 - size) ** -(degree + 0.5)


_TOLERANCE = 0.5  # machine epsilons that Q Q^T may be away from I: errors add up from one look to the next
_TAYLOR = {dtype: 2 * (_TOLERANCE * torch.finfo(dtype).eps) ** 0.5 for dtype in (torch.float32, torch.float64)}
_EASY = {dtype: (32 * _TOLERANCE * torch.finfo(dtype).eps) ** 0.5 for dtype in (torch.float32, torch.float64)}
_OCTAVE, _FIRST = 8, -240  # rows of the table an octave of sizes, and the exponent of its first
_MOST = {torch.float32: 2, torch.float64: 6}  # degrees, of which float64 has the higher
LONGEST_FIXED = 0.2  # the bend that the polynomials of _FIXED are for: steps of spectral norm 0.44
_FIXED = {
    dtype: _fit(torch.tensor([LONGEST_FIXED], dtype=torch.float64, device="cpu"), degree)[0].tolist()
    for dtype, degree in ((torch.float32, 4), (torch.float64, 12))
}


def _table(dtype: torch.dtype) -> Tensor:
    """For every size the coefficients of the polynomial of least degree that leaves no more than rounding."""
    exponents = torch.arange(_FIRST, int(math.log2(SEAM) * _OCTAVE) + 1, dtype=torch.float64, device="cpu")
    sizes = 2.0 ** (exponents / _OCTAVE)
    table = sizes.new_zeros(len(sizes), 7)
    table[:, 1] = -0.5  # Taylor's, where that is enough: what it leaves is size^2 / 4
    done = sizes <= _TAYLOR[dtype]
    for degree in (d for d in (1, 2, 4, 6) if d <= _MOST[dtype]):
        fitting = ~done & ((_left(sizes, degree) <= _TOLERANCE * torch.finfo(dtype).eps) | (degree == _MOST[dtype]))
        table[fitting] = 0
        table[fitting, : degree + 1] = _fit(sizes[fitting], degree)
        done |= fitting
    return table.to(dtype)


TABLES = {dtype: _table(dtype) for dtype in (torch.float32, torch.float64)}
