r"""Directions of Muon: the steepest rotation in the spectral norm, for square and rectangular orthogonal blocks.

Functions, frames and masks are as in sgd.py, but what is returned is not a tangent: it is the way to the new point,
:math:`W' - W`, or :math:`Q - I` for square blocks (stiefel/spectral.py). For the momentum M of a wide block,

.. math:: W' = W e^{\eta Y}, \qquad Y = -\operatorname{sign}(W^\top M - M^\top W).

Reference: arXiv 2608.06218 (*Skewon*).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...linalg.products import Workspace, gram, matmul, matmul_add, norm, real_view
from ...manifolds import Manifold
from ...stiefel.spectral import Scalar, angle_of, finish, rotation_by_angle
from ..engine.optimizer import Group, Rule
from .projection import each_part

if TYPE_CHECKING:
    from ..engine.bucket import Bucket

Moments = dict[str, Tensor]
_SHIFT = 16  # in units of roundoff: lower bound of the eigenvalues of Z Z^T, relative to the largest


def moments(group: Group) -> tuple[list[str], list[str]]:  # noqa: ARG001
    """Return the keys of the moments that the options of a group need, and of those with one number per block."""
    return ["momentum_buffer"], []


def refusal(constraint: Manifold, parameter: Tensor) -> str | None:
    """Return why Muon cannot train a marked parameter, to follow its name in an error message, or None if it can."""
    if not constraint.uses_retraction:
        return (
            f"is marked as {constraint}: Muon moves orthogonal blocks, and rotates those with fixed singular values. "
            "Train it with SGD, Adam or AdamW."
        )
    if constraint.free_rows(parameter.shape) and (parameter.ndim != 2 or parameter.is_complex()):
        return (
            "has rows outside its orthogonal blocks, which torch.optim.Muon updates only if the parameter is a real "
            "matrix. Mark all of its blocks, or train it with SGD, Adam or AdamW."
        )
    return None


def rule(group: Group, bucket: Bucket) -> Rule:
    """Return the direction for the options of a group."""
    options = MuonOptions(angle_of(group)[0], group["momentum"], group["nesterov"])
    if bucket.has_parts:
        return each_part(muon_square, bucket.constraint), options
    if bucket.is_skew:
        return muon_square, options
    return muon_wide if bucket.n <= 2 * bucket.p else muon_long, options


@dataclass
class MuonOptions:
    """Options of a step of Muon.

    Attributes:
        angle: the angle of the rotation in radians.
        momentum, nesterov: as in torch.optim.Muon.
        finite: 1 for blocks with a finite gradient, 0 for others, ``(B, 1, 1)``; None if all are finite.
    """

    angle: Scalar
    momentum: float
    nesterov: bool
    finite: Tensor | None = None


def muon_square(w: Tensor, a: Tensor, state: Moments, ws: Workspace, options: MuonOptions) -> Tensor:  # noqa: ARG001
    r"""Return :math:`Q - I` for square blocks: :math:`Q = e^{-\eta\operatorname{sign}(M - M^\top)}`, M in the frame."""
    m = _momentum_(a, state["momentum_buffer"], options, out=a)
    return rotation_by_angle(torch.sub(m, m.mH, out=ws.e), options.angle, ws)


def muon_wide(w: Tensor, g: Tensor, state: Moments, ws: Workspace, options: MuonOptions) -> Tensor:
    r"""Return :math:`W' - W` for blocks with :math:`n \le 2p`, by the n x n matrix Y."""
    m = _momentum_(g, state["momentum_buffer"], options, out=ws.x)
    square = ws.of_size(w.shape[-1])
    product = matmul(w.mH, m, out=square.a)
    k = torch.sub(product, product.mH, out=square.e)
    return matmul(w, rotation_by_angle(k, options.angle, square), out=ws.y)


def muon_long(w: Tensor, g: Tensor, state: Moments, ws: Workspace, options: MuonOptions) -> Tensor:
    r"""Return :math:`W' - W` for blocks with :math:`n > 2p`. Cost: 5 T, and the sign of 2p x 2p matrices.

    With :math:`A = M W^\top`, :math:`Z = M - A W` and :math:`Z Z^\top = L L^\top`, the rows of W and :math:`L^{-1} Z`
    are orthonormal, and in this basis

    .. math:: W^\top M - M^\top W = \begin{pmatrix} A - A^\top & L \\ -L^\top & 0 \end{pmatrix}.

    Z is formed first: :math:`M M^\top - A A^\top` is the same on paper, and cancels near an optimum, where Z is small.
    """
    p = w.shape[-2]
    m = _momentum_(g, state["momentum_buffer"], options, out=ws.x)
    size = norm(m, keepdim=True)
    if not ws.readable or not float(size.min()) > torch.finfo(size.dtype).tiny ** 0.25:  # whose square may be zero
        m = torch.div(m, size.clamp_min(torch.finfo(size.dtype).tiny), out=ws.x)
        size = norm(m, keepdim=True)
    a = matmul(m, w.mH, out=ws.a)
    z = matmul_add(m, a, w, out=ws.x, alpha=-1)
    c = gram(z, out=ws.b)
    cholesky = _shifted_cholesky(c, size)
    square = ws.of_size(2 * p)
    k = square.e.zero_()
    k[:, :p, :p] = a - a.mH
    # L is that of a shifted Z Z^T: in directions where rounding is all of Z, Z Z^T L^-T is nearly 0, and L is not.
    k[:, :p, p:] = torch.linalg.solve_triangular(cholesky.mH, c, upper=True, left=False)
    k[:, p:, :p] = -k[:, :p, p:].mH
    change = rotation_by_angle(k, options.angle, square)[:, :p]
    along = torch.linalg.solve_triangular(cholesky, change[:, :, p:], upper=False, left=False)
    v = matmul_add(matmul(change[:, :, :p], w, out=ws.y), along, z, out=ws.y)
    return finish(w, v, options.angle, ws) if not ws.readable or _rounding_is_visible(along, size) else v


def _shifted_cholesky(c: Tensor, size: Tensor) -> Tensor:
    """Return the Cholesky factor of ``c = Z Z^T``, plus a shift by the rounding of C and of Z.

    ``size`` is the norm of M, ``(B, 1, 1)``, whose rounding is that of Z.
    """
    eps, tiny, shifted = torch.finfo(c.dtype).eps, torch.finfo(c.dtype).tiny, c.clone()
    diagonal = shifted.diagonal(dim1=-2, dim2=-1)
    trace = diagonal.real.sum(-1, keepdim=True)
    diagonal.add_(_SHIFT * (eps * trace + (eps * size[..., 0]) ** 2) + tiny)
    return torch.linalg.cholesky_ex(shifted)[0]


def _rounding_is_visible(along: Tensor, size: Tensor) -> bool:
    """Return True if Z is so short in a direction of a step ``along @ z`` that its rounding leaves the manifold."""
    root = along.shape[-1] ** 0.5
    share = norm(along, keepdim=True) * size / root
    return not bool((share + share * share <= root / 8).all())


def _momentum_(new: Tensor, buffer: Tensor, options: MuonOptions, *, out: Tensor) -> Tensor:
    """Update the momentum and return that of the step: the buffer or, for Nesterov, a mean with ``new`` in ``out``."""
    weight = 1 - options.momentum
    real_view(buffer).lerp_(real_view(new), weight if options.finite is None else options.finite * weight)
    return torch.lerp(new, buffer, options.momentum, out=out) if options.nesterov else buffer
