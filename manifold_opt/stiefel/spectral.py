r"""Steps of a given spectral norm, which end on the manifold by themselves: rotations by one angle.

The steepest tangent of spectral norm one is :math:`D = W Y` with the skew n x n matrix
:math:`Y = -\operatorname{sign}(W^\top M - M^\top W)`, where sign is the polar factor. Every eigenvalue of Y is 0 or
:math:`\pm i`, so that :math:`Y^3 = -Y`, and the geodesic along D needs no matrix exponential:

.. math:: W e^{\eta Y} = W + \sin\eta\, W Y + (1 - \cos\eta)\, W Y^2.

If singular values of Y lie between 0 and 1, since M has low rank or the iteration for the sign stops early, this
leaves the manifold. :math:`Q = \Omega + (I - \Omega\Omega^\top)^{1/2}` with :math:`\Omega = \sin\eta\, Y` does not, and
is the same rotation where they do not.

Reference: arXiv 2608.06218 (*Skewon*).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..linalg.matrices import error_at_rounding
from ..linalg.matrix_sign import COARSE, EXACT, matrix_sign_
from ..linalg.polynomials import fit_for, polynomial
from ..linalg.products import (
    Workspace,
    gram,
    gram_minus_identity,
    host_can_branch,
    largest_norm,
    matmul,
    matmul_add,
    norm,
)
from .orthographic import SQRT
from .rotation import CORRECTION_INTERVAL, OFF_MANIFOLD, restore_
from .step import Retraction, Settings

MAX_ANGLE = 1.5  # a longer step is shortened to it
_MAX_SINGLE_ANGLE = 0.75  # a rotation by more is made of two by half of it: its sine, 0.682, is below the reach of SQRT
_FAR = 0.5  # Frobenius norm of W W^T - I above which W is replaced by the nearest point, not brought back by products
COARSE_ANGLE = 0.1  # up to here, in single precision, singular values of Y need not be closer to one than 1 %

Scalar = float | Tensor


def angle_of(group: Mapping[str, Any]) -> tuple[Scalar, bool | Tensor]:
    """Return the angle of a step in radians, and whether the learning rate asked for a longer one.

    A learning rate that may not be read gives a tensor, at most ``_MAX_SINGLE_ANGLE``.
    """
    lr = group["lr"]
    if isinstance(lr, Tensor) and not host_can_branch(lr):
        asked = lr.reshape(()) * group["orthogonal_lr_scale"]
        return asked.clamp_max(_MAX_SINGLE_ANGLE), asked > _MAX_SINGLE_ANGLE
    wanted = float(lr) * group["orthogonal_lr_scale"]
    return min(wanted, MAX_ANGLE), wanted > MAX_ANGLE


def rotation_by_angle(k: Tensor, angle: Scalar, ws: Workspace) -> Tensor:
    r"""Return :math:`Q - I`, where :math:`Q = e^{-\eta \operatorname{sign} K}` for skew K, as a tensor of ``ws``.

    Args:
        k: ``(B, p, p)`` in ``ws.e``, overwritten.
        angle: :math:`\eta`, at most ``MAX_ANGLE``.
        ws: buffers ``(B, p, p)``, overwritten.
    """
    is_double = k.dtype in (torch.float64, torch.complex128)
    is_exact = is_double or isinstance(angle, Tensor) or angle > COARSE_ANGLE
    y = matrix_sign_(k, ws.a, ws, EXACT[k.dtype] if is_exact else COARSE, is_skew=True)
    fits, halves = SQRT[k.dtype], not isinstance(angle, Tensor) and angle > _MAX_SINGLE_ANGLE
    if isinstance(angle, Tensor):
        sine: Scalar = angle.sin().to(k.device, k.real.dtype)
        coefficients = fits[-1].coefficients
    else:
        sine = math.sin(angle / 2 if halves else angle)
        size = 1.02 * sine**2  # of Omega Omega^T, if Y is longer by 1 %
        coefficients = fit_for(fits, size).coefficients
    omega = torch.sub(y.mH, y, out=ws.d).mul_(sine / 2)  # skew, whatever rounding has made of Y
    b = gram(omega, out=ws.b)
    b_squared = gram(b, out=ws.c) if len(coefficients) > 1 else None
    change = polynomial(coefficients, b, b_squared, ws, out=omega, onto=omega)
    return matmul_add(change, change, change, out=ws.a, beta=2) if halves else change


def displaced(w: Tensor, v: Tensor) -> Tensor:
    """Return ``w + v``, where ``v`` is the way from one point to another."""
    return w + v


def displace_(w: Tensor, step: Tensor, ws: Workspace, settings: Settings) -> None:
    r"""Move blocks in place by a displacement: :math:`W' - W`, or :math:`Q - I` for square blocks.

    A block with a zero step keeps its bits. So does a block whose step is not finite, which is counted. In every few
    steps (:data:`CORRECTION_INTERVAL`) the error of W is removed.
    """
    length = norm(step, keepdim=True)
    v = matmul(step, w, out=ws.y) if w.shape[-2] == w.shape[-1] else step
    correct = settings.steps is None or settings.steps % CORRECTION_INTERVAL[w.dtype] == 0
    clamped = angle_of(settings.options)[1]
    if ws.readable and clamped is False and 0 < float(length.sum()) < torch.inf:
        w.add_(v)
        if correct:
            _correct_(w, length > 0 if len(w) > 1 else None, ws)
        return
    possible = length < torch.inf  # False if it is NaN
    possible = possible if settings.finite is None else possible & settings.finite
    new = w + v
    if correct and not ws.readable:
        e = gram_minus_identity(new, out=ws.a)
        possible = possible & (norm(e, keepdim=True) < 1)  # for a larger error the correction may increase it
        new = matmul_add(new, e, new, out=ws.y, alpha=-0.5)
    moving = possible & (length > 0)
    settings.count(skipped=~possible, clamped=moving & clamped)
    w.copy_(torch.where(moving, new, w))
    if correct and ws.readable:
        _correct_(w, moving, ws)


def _correct_(w: Tensor, moving: Tensor | None, ws: Workspace) -> None:
    r"""Remove the rounding error :math:`E = W W^\top - I` of the blocks that move: subtract :math:`\tfrac12 E W`.

    A larger error is not from rounding, and such blocks are replaced by the nearest points. None: all blocks move.
    """
    e = gram_minus_identity(w, out=ws.a)
    e = e if moving is None else torch.where(moving, e, 0)
    if not largest_norm(e) <= OFF_MANIFOLD[w.dtype]:
        return restore_(w, e)
    matmul_add(w, e, w, out=ws.y, alpha=-0.5)
    w.copy_(ws.y if moving is None else torch.where(moving, ws.y, w))
    return None


def finish(w: Tensor, v: Tensor, angle: Scalar, ws: Workspace) -> Tensor:
    """Return the displacement that ends on the manifold if ``v`` ends near it. Cost: 2 T for every iteration.

    A block with a zero displacement keeps it. Where rounding is all of a direction, the row of W that is turned towards
    it by ``angle`` is shortened, to its cosine; as many iterations are made as that needs.
    """
    new, eps = w + v, torch.finfo(w.dtype).eps
    error = math.sin(_MAX_SINGLE_ANGLE if isinstance(angle, Tensor) else angle)
    while error > eps / 4:
        e = gram_minus_identity(new, out=ws.a)
        size = largest_norm(e) if ws.readable else _FAR
        if size <= error_at_rounding(w.shape[-2], w.shape[-1], w.dtype) / 4:
            break
        if not size <= _FAR:  # the point itself was not on the manifold, or the angle is long
            restore_(new, torch.where(norm(new, keepdim=True) < torch.inf, e, 0))
            break
        new = new - 0.5 * (e @ new)
        error = 0.75 * error**2 + 0.25 * error**3
    return torch.where(norm(v, keepdim=True) == 0, 0, new - w)  # NaN stays NaN


DISPLACEMENT = Retraction(displaced, exact=True, second_order=(), temp_blocks=20, move=displace_)
