r"""Directions of SGD with momentum: for square and rectangular orthogonal blocks, and for any manifold.

A direction is a function of a batch of points, its gradients in the coordinates of the manifold
(:meth:`Manifold.frame_gradient`), its moments, which are updated in place, and buffers. It returns ``scale`` times a
tangent in these coordinates, where ``scale`` is minus the learning rate. Hyperparameters and state keys are those of
torch.optim.

On square orthogonal blocks W the gradient is that in the *frame* of W,

.. math:: A = G W^\top, \qquad \text{the gradient of } Z \mapsto f((I + Z) W) \text{ at } Z = 0,

and the direction is :math:`V = \Omega W` with :math:`\Omega` skew, returned as :math:`\Omega` in the memory of A. The
frame moves with W, so moments are not transported. On rectangular blocks, a frame would need n - p more rows. There the
moments are those of G, and the result is a tangent V in ``ws.y`` or ``ws.z``. Transposes of complex blocks are
conjugated.

If values cannot be read, ``options.finite`` is the mask of points with a finite gradient. The other points have a zero
gradient and keep their moments.

Reference: Bonnabel (2013), *Stochastic gradient descent on Riemannian manifolds*.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...linalg.products import Workspace, norm
from ...manifolds import Manifold
from ...manifolds.base import Scalar
from ...stiefel.geometry import Metric
from ..engine.optimizer import Group, Rule
from .projection import absolute, copy_where_, each_part, project_tangent, reproject_tangent_, to_metric

if TYPE_CHECKING:
    from ..engine.bucket import Bucket

Moments = dict[str, Tensor]


def moments(group: Group) -> tuple[list[str], list[str]]:
    """Return the keys of the moments that the options of a group need, and of those with one number per block."""
    return ["momentum_buffer"] if group["momentum"] != 0 else [], []


def rule(group: Group, bucket: Bucket) -> Rule:
    """Return the direction for the options of a group. The first gradient enters the momentum undamped, as in torch."""
    dampening = 0.0 if bucket.first_momentum else group["dampening"]
    bucket.first_momentum = False
    options = SgdOptions(
        bucket.constraint, bucket.scale(group), group["metric"], group["momentum"], dampening, group["nesterov"]
    )
    if not bucket.stiefel:
        return sgd_tangent, options
    if bucket.has_parts:
        return each_part(sgd_square, bucket.constraint), options
    return sgd_square if bucket.is_skew else sgd_wide, options


@dataclass
class SgdOptions:
    """Options of a step of SGD.

    Attributes:
        manifold: manifold of the points.
        scale: minus the learning rate (:meth:`Bucket.scale`).
        metric: metric that defines the gradient of orthogonal blocks.
        momentum, dampening, nesterov: as in torch.optim.SGD.
        finite: 1 for blocks with a finite gradient, 0 for others, ``(B, 1, 1)``; None if all are finite.
    """

    manifold: Manifold
    scale: Scalar
    metric: Metric
    momentum: float
    dampening: float
    nesterov: bool
    finite: Tensor | None = None


def sgd_square(w: Tensor, a: Tensor, state: Moments, ws: Workspace, options: SgdOptions) -> Tensor:  # noqa: ARG001
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
        v = project_tangent(w, both, ws, out=ws.y)
        copy_where_(buffer, v, options.finite)
        if options.nesterov:
            v = project_tangent(w, g, ws, out=ws.y).add_(buffer, alpha=options.momentum)
    else:
        v = project_tangent(w, g, ws, out=ws.y)
    return to_metric(
        w, reproject_tangent_(w, v.mul_(options.scale), size * absolute(options.scale), ws), options.metric, ws
    )


def sgd_tangent(x: Tensor, a: Tensor, state: Moments, ws: Workspace, options: SgdOptions) -> Tensor:
    r"""Return a step of SGD on any manifold, in its coordinates: :math:`B \leftarrow \mu B + (1-\tau) A`, projected."""
    step = a
    if options.momentum:
        buffer = state["momentum_buffer"]
        _momentum_(buffer, a, options.momentum, 1 - options.dampening, options.finite)
        step = torch.add(a, buffer, alpha=options.momentum, out=ws.x) if options.nesterov else buffer
    return options.manifold.project_direction_(x, torch.mul(step, options.scale, out=ws.x), ws)


def _momentum_(buffer: Tensor, new: Tensor, momentum: float, weight: float, finite: Tensor | None) -> None:
    if finite is None:
        buffer.mul_(momentum).add_(new, alpha=weight)
    else:
        copy_where_(buffer, (buffer * momentum).add_(new, alpha=weight), finite)
