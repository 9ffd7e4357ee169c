r"""Directions of Adam: for square and rectangular orthogonal blocks, and for any manifold.

Functions, frames and masks are as in sgd.py. The real and the imaginary part of a complex entry have separate second
moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from ...linalg.products import Workspace, host_can_branch, matmul_add, norm, real_view
from ...manifolds import Manifold
from ...manifolds.base import Scalar
from ...manifolds.layout import point_norm
from ...stiefel.geometry import Metric
from ..engine.optimizer import Group, Rule
from .projection import absolute, copy_where_, each_part, project_tangent, reproject_tangent_, to_metric

if TYPE_CHECKING:
    from ..engine.bucket import Bucket

Moments = dict[str, Tensor]
SecondMoment = Literal["element", "block"]
SECOND_MOMENTS: tuple[str, ...] = get_args(SecondMoment)

_FLOOR = 0.01  # lower bound of the mean square of an entry, relative to the mean of its row


def moments(group: Group) -> tuple[list[str], list[str]]:
    """Return the keys of the moments that the options of a group need, and of those with one number per block."""
    squares = ["exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    return ["exp_avg", *squares], squares if group["second_moment"] == "block" else []


def rule(group: Group, bucket: Bucket) -> Rule:
    """Return the direction for the options of a group."""
    beta1, beta2 = group["betas"]
    if not type(beta1) is type(beta2) is float:
        beta1, beta2 = _to_float(beta1), _to_float(beta2)
    # The count is 0 if a GradScaler has skipped the first step.
    steps: Scalar = bucket.steps_per_block() if bucket.shared_step is None else bucket.shared_step or 1
    options = AdamOptions(
        bucket.constraint,
        bucket.layout.point_ndim,
        bucket.scale(group),
        group["metric"],
        beta1,
        beta2,
        1 - beta1**steps,
        1 - beta2**steps,
        group["eps"],
    )
    if not bucket.stiefel:
        return adam_tangent, options
    by_block = group["second_moment"] == "block"
    if bucket.is_skew:
        direction = adam_block_square if by_block else adam_square
        return each_part(direction, bucket.constraint) if bucket.has_parts else direction, options
    return adam_block_wide if by_block else adam_wide, options


def _to_float(beta: Scalar) -> Scalar:
    return float(beta) if not isinstance(beta, Tensor) or host_can_branch(beta) else beta


@dataclass
class AdamOptions:
    r"""Options of a step of Adam.

    Attributes:
        manifold: manifold of the points.
        point_ndim: number of trailing dimensions that form a point.
        scale: minus the learning rate (:meth:`Bucket.scale`).
        metric: metric that defines the gradient of orthogonal blocks.
        beta1, beta2: decay rates of the two moments.
        correction1, correction2: bias corrections :math:`1 - \beta^t`, numbers or ``(B, 1, ..)``.
        eps: term added to the root of the second moment.
        finite: 1 for points with a finite gradient, 0 for others, ``(B, 1, ..)``; None if all are finite.
    """

    manifold: Manifold
    point_ndim: int
    scale: Scalar
    metric: Metric
    beta1: Scalar
    beta2: Scalar
    correction1: Scalar
    correction2: Scalar
    eps: float
    finite: Tensor | None = None


def adam_square(w: Tensor, a: Tensor, state: Moments, ws: Workspace, options: AdamOptions) -> Tensor:  # noqa: ARG001
    r"""Return Omega of Adam with a second moment per entry, without a product.

    M and V are torch's moments of A. The derivative with respect to :math:`\Omega_{ij} = -\Omega_{ji}` is
    :math:`A_{ij} - A_{ji}`:

    .. math:: \Omega_{ij} = \operatorname{clip}\left(
        \frac{\hat M_{ij} - \hat M_{ji}}{\min(\sqrt{\hat V_{ij}}, \sqrt{\hat V_{ji}}) + \epsilon}, -1, 1\right)

    The larger scale would drown out the entry with the smaller one, so the smaller scale is used. Every entry is a
    positive multiple of the derivative. Therefore the direction descends, and it vanishes at a constrained optimum,
    where A is symmetric. (The projection of torch's direction does not vanish there: G is normal, not zero, and the
    element-wise division gives it a tangent part.)

    Complex: the numerator is :math:`\hat M_{ij} - \overline{\hat M_{ji}}`, also on the diagonal. Its real and its
    imaginary part are divided and clipped separately.
    """
    m = state["exp_avg"]
    v, root = _update_moments_(m, a, state, options), options.correction2**0.5
    # (M / c1) / (sqrt(V / c2) + eps) = (M / (sqrt(V) + eps sqrt(c2))) / limit
    limit = options.correction1 / root
    size = torch.minimum(v, ws.adjoint("v", v), out=_parts_of(ws.b, ws)).sqrt_().add_(options.eps * root)
    omega = torch.sub(m, ws.adjoint("m", m), out=a)
    (real_view(omega) if a.dtype.is_complex else omega).div_(size).clamp_(-limit, limit)
    return omega.mul_((2 * options.scale if options.metric == "canonical" else options.scale) / limit)


def adam_wide(w: Tensor, g: Tensor, state: Moments, ws: Workspace, options: AdamOptions) -> Tensor:
    r"""Return a tangent of Adam with a second moment per entry. Cost: 4 T.

    M and V are torch's moments of G, and r the row means of V, which are the mean squares of the entries of
    :math:`G W^\top`. :math:`\Omega` is that of :func:`adam_square` for :math:`M W^\top` and r, and the direction is

    .. math:: N = \operatorname{clip}\left(
        \frac{\hat M - \hat M W^\top W}{\sqrt{\max(\hat V, r/100)} + \epsilon}, -1, 1\right), \qquad
        D = N - N W^\top W + \Omega W.

    (Without r, entries with a small V would not converge at the optimum.) Complex: r includes the mean squares of both
    parts, because W mixes them.
    """
    m = state["exp_avg"]
    v, root = _update_moments_(m, g, state, options), options.correction2**0.5
    limit, offset = options.correction1 / root, options.eps * root
    adjoint = ws.adjoint("w", w)
    along = torch.bmm(m, adjoint, out=ws.a)
    normal = matmul_add(m, along, w, out=ws.x, alpha=-1)
    rows = v.mean(-1, keepdim=True)
    if w.dtype.is_complex:
        rows = rows.mean(0)
    size = torch.maximum(v, rows * _FLOOR, out=_parts_of(ws.y, ws)).sqrt_().add_(offset)
    (real_view(normal) if w.dtype.is_complex else normal).div_(size).clamp_(-limit, limit)
    rows = rows.sqrt_().add_(offset)
    omega = torch.sub(along, ws.adjoint("along", along), out=ws.b)
    (real_view(omega) if w.dtype.is_complex else omega).div_(torch.minimum(rows, rows.mT)).clamp_(-limit, limit)
    omega.sub_(torch.bmm(normal, adjoint, out=ws.a))
    scale = options.scale / limit
    if isinstance(scale, Tensor) or options.metric == "canonical":
        return to_metric(w, matmul_add(normal, omega, w, out=ws.y), options.metric, ws).mul_(scale)
    return matmul_add(normal, omega, w, out=ws.y, beta=scale, alpha=scale)


def adam_block_square(w: Tensor, a: Tensor, state: Moments, ws: Workspace, options: AdamOptions) -> Tensor:  # noqa: ARG001
    """Return Omega of Adam with one second moment per block, as in :func:`adam_block_wide`, without a product."""
    skew = torch.sub(a, a.mH, out=ws.b).mul_(0.5)
    # |Omega W| = |Omega|, so the mean square is that of the Riemannian gradient.
    d, _ = _block_direction(state, _update_block_moments_(skew, state, options), options, out=ws.c)
    # M is not skew if it was loaded from a run with a second moment per entry.
    return torch.sub(d, d.mH, out=a).mul_(options.scale if options.metric == "canonical" else options.scale / 2)


def adam_block_wide(w: Tensor, g: Tensor, state: Moments, ws: Workspace, options: AdamOptions) -> Tensor:
    r"""Return a tangent of Adam with one second moment per block. Cost: 4 T.

    The direction is equivariant: rotating the problem rotates the steps. ``exp_avg_sq`` is ``(B, 1, 1)`` and real, the
    mean square of the Riemannian gradient, over real and imaginary parts if complex. A mean, not a sum, gives steps as
    long as those of torch.optim.Adam at the same learning rate. The first moment is transported by projection.

    Reference: Becigneul & Ganea (ICLR 2019), with one block as one manifold.
    """
    copy_where_(state["exp_avg"], project_tangent(w, state["exp_avg"], ws, out=ws.x), options.finite)
    v = _update_block_moments_(project_tangent(w, g, ws, out=ws.x), state, options)
    d, divisor = _block_direction(state, v, options, out=ws.y)
    size = norm(g, keepdim=True) * absolute(options.scale) / (divisor * (w.shape[-2] * w.shape[-1]) ** 0.5)
    return to_metric(w, reproject_tangent_(w, d.mul_(options.scale), size, ws), options.metric, ws)


def adam_tangent(x: Tensor, a: Tensor, state: Moments, ws: Workspace, options: AdamOptions) -> Tensor:
    r"""Return a step of Adam on any manifold, in its coordinates.

    .. math:: M \leftarrow \beta_1 M + (1-\beta_1) A, \qquad V \leftarrow \beta_2 V + (1-\beta_2) A^2, \qquad
        D = \frac{\hat M}{\sqrt{\hat V} + \epsilon}, \text{ projected.}

    The squares are those of :meth:`Manifold.frame_squares`, averaged over a point if V has one number per point.

    Reference: Becigneul & Ganea (ICLR 2019).
    """
    manifold, dims = options.manifold, options.point_ndim
    square, per_point = manifold.frame_squares(x, a), state["exp_avg_sq"].shape != a.shape
    if square is not None:
        v = _update_metric_moments_(a, square, state, options)
    elif per_point:
        v = _update_block_moments_(a, state, options, dims)
    else:
        v = _update_moments_(state["exp_avg"], a, state, options)
    m, root = state["exp_avg"], options.correction2**0.5
    scale = options.scale * (root / options.correction1)
    if per_point:
        d = torch.mul(m, scale / v.sqrt().add_(options.eps * root), out=ws.x)
    elif isinstance(scale, Tensor) or a.dtype.is_complex:
        d = m * scale
        real_view(d).div_(v.sqrt().add_(options.eps * root))
    else:  # one operation: 0 + scale * M / size
        d = torch.addcdiv(ws.zero, m, torch.sqrt(v, out=ws.y).add_(options.eps * root), value=scale, out=ws.x)
    return manifold.project_direction_(x, d, ws)


def _update_moments_(m: Tensor, new: Tensor, state: Moments, options: AdamOptions) -> Tensor:
    """Update the averages of ``new`` and its squares; return the mean squares, a real view if complex."""
    v, largest = state["exp_avg_sq"], state.get("max_exp_avg_sq")
    if new.dtype.is_complex:
        m, new, v = real_view(m), real_view(new), real_view(v)
        largest = None if largest is None else real_view(largest)
    weight1, weight2 = 1 - options.beta1, 1 - options.beta2
    if options.finite is None and type(weight2) is float:
        m.lerp_(new, weight1)
        v.mul_(options.beta2).addcmul_(new, new, value=weight2)
    else:
        m.lerp_(new, _weight(weight1, options.finite))
        v.lerp_(new * new, _weight(weight2, options.finite))
    return v if largest is None else largest.clamp_min_(v)


def _update_block_moments_(new: Tensor, state: Moments, options: AdamOptions, point_ndim: int = 2) -> Tensor:
    """Update the averages of ``new`` and its mean square per point; return the latter, ``(B, 1, ..)``."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    real_view(m).lerp_(real_view(new), _weight(1 - options.beta1, options.finite))
    count = new.shape[new.ndim - point_ndim :].numel() * (2 if new.is_complex() else 1)
    mean_square = point_norm(new, point_ndim, keepdim=True).square_() / count
    v.lerp_(mean_square, _weight(1 - options.beta2, options.finite))
    return state["max_exp_avg_sq"].clamp_min_(v) if "max_exp_avg_sq" in state else v


def _block_direction(state: Moments, v: Tensor, options: AdamOptions, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean divided by the root of the mean square of its block, in ``out``, and that divisor."""
    divisor = (v / options.correction2).sqrt_().add_(options.eps)
    return torch.div(state["exp_avg"], divisor * options.correction1, out=out), divisor


def _update_metric_moments_(a: Tensor, square: Tensor, state: Moments, options: AdamOptions) -> Tensor:
    """Update the averages of ``a`` and of its squares in a metric; return the latter, a real view if complex."""
    m, v, largest = state["exp_avg"], state["exp_avg_sq"], state.get("max_exp_avg_sq")
    if v.shape != a.shape:
        square = torch.view_as_real(square).mean(-1) if square.is_complex() else square
        square = square.expand(a.shape).mean(tuple(range(-options.point_ndim, 0)), keepdim=True)
    elif v.is_complex() and not square.is_complex():
        square = torch.complex(square, square)
    most = torch.finfo(v.dtype).max / 4
    square = real_view(square).nan_to_num(most, most)  # where the metric overflows, the step is short
    v, largest = real_view(v), None if largest is None else real_view(largest)
    real_view(m).lerp_(real_view(a), _weight(1 - options.beta1, options.finite))
    v.lerp_(square, _weight(1 - options.beta2, options.finite))
    return v if largest is None else largest.clamp_min_(v)


def _weight(weight: Scalar, finite: Tensor | None) -> Scalar:
    """Return the weight of a new value, zero for points with a non-finite gradient."""
    return weight if finite is None else finite * weight


def _parts_of(buffer: Tensor, ws: Workspace) -> Tensor | None:
    """Return a real view of a buffer for ``out=``; None for complex ones if sync-free, where torch rejects the view."""
    if not buffer.dtype.is_complex:
        return buffer
    return real_view(buffer) if ws.readable else None
