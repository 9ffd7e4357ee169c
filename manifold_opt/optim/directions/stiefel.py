r"""Directions on the Stiefel manifold: SGD with momentum and Adam.

Points ``w`` are wide batches ``(B, p, n)``. Every function updates the moments in ``state`` in place and returns
``scale`` times a direction, where ``scale`` is minus the learning rate. Hyperparameters and state keys are those of
torch.optim. For complex blocks, transposes are conjugated, and the real and the imaginary part of an entry have
separate second moments.

On square blocks the moments are those of the gradient in the *frame* of W,

.. math:: A = G W^\top, \qquad \text{the gradient of } Z \mapsto f((I + Z) W) \text{ at } Z = 0,

and the direction is :math:`V = \Omega W` with :math:`\Omega` skew. These functions take A and return
:math:`\Omega`, in the memory of A. The frame moves with W, so moments are not transported. On rectangular blocks, a
frame would need n - p more rows. There the moments are those of G, and the functions take W and G and return a tangent
V in ``ws.y`` or ``ws.z``. Costs are given in T, one product of p x n by n x p matrices.

If values cannot be read, ``options.finite`` is the mask of blocks with a finite gradient. The other blocks have a zero
gradient and keep their moments.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...linalg.products import host_can_branch, matmul, matmul_add, norm, real_view
from ...linalg.workspace import Workspace
from ...stiefel.geometry import Metric

Moments = dict[str, Tensor]
SecondMoment = Literal["element", "block"]
SECOND_MOMENTS: tuple[str, ...] = get_args(SecondMoment)
Scalar = float | Tensor

_FLOOR = 0.01  # lower bound of the mean square of an entry, relative to the mean of its row


@dataclass
class AdamCoefficients:
    r"""Coefficients of Adam's averages and bias corrections.

    Attributes:
        beta1, beta2: decay rates of the two moments.
        correction1, correction2: bias corrections :math:`1 - \beta^t`, numbers or ``(B, 1, 1)``.
        eps: term added to the root of the second moment.
    """

    beta1: Scalar
    beta2: Scalar
    correction1: Scalar
    correction2: Scalar
    eps: float


@dataclass
class SgdOptions:
    """Options of a step of SGD.

    Attributes:
        scale: minus the learning rate.
        metric: metric that defines the gradient.
        momentum, dampening, nesterov: as in torch.optim.SGD.
        finite: 1 for blocks with a finite gradient, 0 for others, ``(B, 1, 1)``; None if all are finite.
    """

    scale: Scalar
    metric: Metric
    momentum: float
    dampening: float
    nesterov: bool
    finite: Tensor | None = None


@dataclass
class AdamOptions:
    """Options of a step of Adam: those of :class:`SgdOptions` without momentum, and Adam's coefficients."""

    scale: Scalar
    metric: Metric
    coefficients: AdamCoefficients
    finite: Tensor | None = None


def sgd_square(a: Tensor, state: Moments, ws: Workspace, options: SgdOptions) -> Tensor:
    r"""Return Omega of SGD, without a product.

    The momentum is :math:`B \leftarrow \mu B + (1-\tau) A`. :math:`\Omega` is the skew part of B, or of
    :math:`A + \mu B` for Nesterov.
    """
    step, half = a, (options.scale if options.metric == "canonical" else options.scale / 2)
    if options.momentum:
        buffer = state["momentum_buffer"]
        _momentum_(buffer, a, options.momentum, 1 - options.dampening, options.finite)
        step = a.add_(buffer, alpha=options.momentum) if options.nesterov else buffer
    if step is not a:
        return torch.sub(step, ws.adjoint("m", step), out=a).mul_(half)
    return torch.mul(torch.sub(a, ws.adjoint("omega", a), out=ws.b), half, out=a)


def sgd_wide(w: Tensor, g: Tensor, state: Moments, ws: Workspace, options: SgdOptions) -> Tensor:
    r"""Return a tangent of SGD. Cost: 2 T, 4 T with Nesterov.

    One projection transports the buffer and projects the gradient: :math:`B \leftarrow P_W(\mu B + (1-\tau) G)`. The
    direction is B, or :math:`P_W(G) + \mu B` for Nesterov.
    """
    size = norm(g, keepdim=True)
    if options.momentum:
        buffer = state["momentum_buffer"]
        both = torch.mul(g, 1 - options.dampening, out=ws.x).add_(buffer, alpha=options.momentum)
        size = size + norm(both, keepdim=True)
        v = _project(w, both, ws, out=ws.y)
        _copy_where_(buffer, v, options.finite)
        if options.nesterov:
            v = _project(w, g, ws, out=ws.y).add_(buffer, alpha=options.momentum)
    else:
        v = _project(w, g, ws, out=ws.y)
    return _to_metric(w, _reproject_(w, v.mul_(options.scale), size * _abs(options.scale), ws), options.metric, ws)


def adam_square(a: Tensor, state: Moments, ws: Workspace, options: AdamOptions) -> Tensor:
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
    v, c = _update_moments_(m, a, state, options), options.coefficients
    root = c.correction2**0.5
    # (M / c1) / (sqrt(V / c2) + eps) = (M / (sqrt(V) + eps sqrt(c2))) / limit
    limit = c.correction1 / root
    size = torch.minimum(v, ws.adjoint("v", v), out=_parts_of(ws.b, ws)).sqrt_().add_(c.eps * root)
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
    v, c = _update_moments_(m, g, state, options), options.coefficients
    root = c.correction2**0.5
    limit, offset = c.correction1 / root, c.eps * root
    adjoint = ws.adjoint("w", w)
    along = torch.bmm(m, adjoint, out=ws.a)
    normal = matmul_add(m, along, w, out=ws.x, alpha=-1)
    rows = v.mean(-1, keepdim=True)
    if w.dtype.is_complex:
        rows = rows.mean(0)
    size = torch.maximum(v, rows * _FLOOR, out=_parts_of(ws.y, ws)).sqrt_().add_(offset)
    real_view(normal).div_(size).clamp_(-limit, limit)
    rows = rows.sqrt_().add_(offset)
    omega = torch.sub(along, ws.adjoint("along", along), out=ws.b)
    real_view(omega).div_(torch.minimum(rows, rows.mT)).clamp_(-limit, limit)
    omega.sub_(torch.bmm(normal, adjoint, out=ws.a))
    scale = options.scale / limit
    if isinstance(scale, Tensor) or options.metric == "canonical":
        return _to_metric(w, matmul_add(normal, omega, w, out=ws.y), options.metric, ws).mul_(scale)
    return matmul_add(normal, omega, w, out=ws.y, beta=scale, alpha=scale)


def adam_block_square(a: Tensor, state: Moments, ws: Workspace, options: AdamOptions) -> Tensor:
    """Return Omega of Adam with one second moment per block, as in :func:`adam_block_wide`, without a product."""
    skew = torch.sub(a, a.mH, out=ws.b).mul_(0.5)
    # |Omega W| = |Omega|, so the mean square is that of the Riemannian gradient.
    d, _ = _update_block_moments_(skew, state, options, out=ws.c)
    # M is not skew if it was loaded from a run with a second moment per entry.
    return torch.sub(d, d.mH, out=a).mul_(options.scale if options.metric == "canonical" else options.scale / 2)


def adam_block_wide(w: Tensor, g: Tensor, state: Moments, ws: Workspace, options: AdamOptions) -> Tensor:
    r"""Return a tangent of Adam with one second moment per block. Cost: 4 T.

    The direction is equivariant: rotating the problem rotates the steps. ``exp_avg_sq`` is ``(B, 1, 1)`` and real, the
    mean square of the Riemannian gradient, over real and imaginary parts if complex. A mean, not a sum, gives steps as
    long as those of torch.optim.Adam at the same learning rate. The first moment is transported by projection.

    Reference: Becigneul & Ganea (ICLR 2019), with one block as one manifold.
    """
    _copy_where_(state["exp_avg"], _project(w, state["exp_avg"], ws, out=ws.x), options.finite)
    d, divisor = _update_block_moments_(_project(w, g, ws, out=ws.x), state, options, out=ws.y)
    size = norm(g, keepdim=True) * _abs(options.scale) / (divisor * (w.shape[-2] * w.shape[-1]) ** 0.5)
    return _to_metric(w, _reproject_(w, d.mul_(options.scale), size, ws), options.metric, ws)


def _update_moments_(m: Tensor, new: Tensor, state: Moments, options: AdamOptions) -> Tensor:
    """Update the averages of ``new`` and its squares; return the mean squares, a real view if complex."""
    v, largest = state["exp_avg_sq"], state.get("max_exp_avg_sq")
    if new.dtype.is_complex:
        m, new, v = real_view(m), real_view(new), real_view(v)
        largest = None if largest is None else real_view(largest)
    weight1, weight2 = 1 - options.coefficients.beta1, 1 - options.coefficients.beta2
    if options.finite is None and type(weight2) is float:
        m.lerp_(new, weight1)
        v.mul_(options.coefficients.beta2).addcmul_(new, new, value=weight2)
    else:
        m.lerp_(new, _weight(weight1, options.finite))
        v.lerp_(new * new, _weight(weight2, options.finite))
    return v if largest is None else largest.clamp_min_(v)


def _update_block_moments_(new: Tensor, state: Moments, options: AdamOptions, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """Update the averages of ``new`` and its mean square; return the direction, in ``out``, and its divisor."""
    m, v = state["exp_avg"], state["exp_avg_sq"]
    real_view(m).lerp_(real_view(new), _weight(1 - options.coefficients.beta1, options.finite))
    count = new.shape[-2] * new.shape[-1] * (2 if new.is_complex() else 1)
    mean_square = norm(new, keepdim=True).square_() / count
    v.lerp_(mean_square, _weight(1 - options.coefficients.beta2, options.finite))
    if "max_exp_avg_sq" in state:
        v = state["max_exp_avg_sq"].clamp_min_(v)
    divisor = (v / options.coefficients.correction2).sqrt_().add_(options.coefficients.eps)
    return torch.div(m, divisor * options.coefficients.correction1, out=out), divisor


def _weight(weight: Scalar, finite: Tensor | None) -> Scalar:
    """Return the weight of a new value, zero for blocks with a non-finite gradient."""
    return weight if finite is None else finite * weight


def _momentum_(buffer: Tensor, new: Tensor, momentum: float, weight: float, finite: Tensor | None) -> None:
    if finite is None:
        buffer.mul_(momentum).add_(new, alpha=weight)
    else:
        _copy_where_(buffer, (buffer * momentum).add_(new, alpha=weight), finite)


def _copy_where_(moment: Tensor, new: Tensor, finite: Tensor | None) -> None:
    moment.copy_(new if finite is None else torch.where(finite != 0, new, moment))


def _parts_of(buffer: Tensor, ws: Workspace) -> Tensor | None:
    """Return a real view of a buffer for ``out=``; None for complex ones if sync-free, where torch rejects the view."""
    if not buffer.dtype.is_complex:
        return buffer
    return real_view(buffer) if ws.readable else None


def _abs(x: Scalar) -> Scalar:
    return x.abs() if isinstance(x, Tensor) else abs(x)


def _project(w: Tensor, g: Tensor, ws: Workspace, *, out: Tensor) -> Tensor:
    """Write G - sym(G W^T) W for rectangular blocks to ``out`` and return it. Cost: 2 T."""
    along = matmul(g, w.mH, out=ws.a)
    symmetric = torch.add(along, along.mH, out=ws.b)
    return matmul_add(g, symmetric, w, out=out, alpha=-0.5)


def _reproject_(w: Tensor, v: Tensor, size: Tensor, ws: Workspace) -> Tensor:
    """Re-project ``v``, ``(B, p, n)`` in ``ws.y``, if rounding may have left a normal part. Cost: 2 T, rare.

    The projection of a gradient with norm ``size`` leaves a normal part of eps * ``size``. It matters if the gradient
    is nearly normal and its small tangent part makes a long step. Sync-free, all blocks are re-projected.
    """
    eps = torch.finfo(w.dtype).eps
    if not host_can_branch(w):
        return _project(w, v, ws, out=ws.z)
    far = (~(size * eps <= eps**0.5 / 4))[:, 0, 0]  # the square of a smaller normal part is within rounding
    if bool(far.any()):  # only these, so that a result does not depend on other blocks of the batch
        point, tangent = w[far], v[far]
        v[far] = _project(point, tangent, Workspace(None, point), out=torch.empty_like(tangent))
    return v


def _to_metric(w: Tensor, d: Tensor, metric: Metric, ws: Workspace) -> Tensor:
    r"""Convert a rectangular tangent from the Euclidean metric to ``metric``. Cost: 2 T for the canonical metric.

    .. math:: \Omega W + N \mapsto 2 \Omega W + N \quad \text{for the canonical metric.}
    """
    return d if metric == "euclidean" else matmul_add(d, matmul(d, w.mH, out=ws.a), w, out=d)


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
