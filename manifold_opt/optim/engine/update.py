"""Update of a bucket: orthogonal blocks here, points of other manifolds in points.py.

If every block of a batch has a finite gradient, all are updated in place. Otherwise the blocks with a finite gradient
are copied out by index, updated, and written back. One comparison decides, before any weight or moment is changed.
Where values cannot be read, all blocks are updated with masks.

A batch (bucket.py) has points, moments and a workspace ``ws``, whose buffers a, b, c and so on are overwritten in
every step. A rule (sgd.py, adam.py) computes a direction from the gradient and updates the moments. ``retract_``
(stiefel/step.py) updates the points along the direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...linalg.products import host_can_branch, largest_norm, norm
from ...linalg.workspace import Workspace
from ...stiefel.retractions import RETRACTIONS
from ...stiefel.rotation import CORRECTION_INTERVAL
from ...stiefel.step import Settings, retract_
from ..options import MAX_GRAD_NORM
from .bucket import Batch, Bucket
from .context import StepContext, finite_points
from .optimizer import Group
from .points import update_points

# Direction for square blocks from the gradient in the frame, for others from point and gradient, and their options.
Rule = tuple[Callable[..., Tensor], Callable[..., Tensor], Any]


@dataclass
class Step:
    """Settings of one step for all blocks of a bucket.

    Attributes:
        rule: direction for square blocks, direction for others, and their options.
        retraction: settings of the retraction.
        maximize: whether the objective is maximized.
        context: counters, and the attributes that a GradScaler sets.
    """

    rule: Rule
    retraction: Settings
    maximize: bool
    context: StepContext


def update_bucket(bucket: Bucket, group: Group, rule: Any, context: StepContext) -> None:
    """Update all points of a bucket."""
    views = bucket.gather(context.pool)
    gradients = bucket.gradients(context.pool)
    if bucket.stiefel:
        count = bucket.shared_step
        correct = count is None or count % CORRECTION_INTERVAL[bucket.working_dtype] == 0
        retraction = Settings(RETRACTIONS[group["retraction"]], group, context.counters.count, correct)
        step = Step(rule, retraction, group["maximize"], context)
    for batch in views.batches:
        g = gradients if len(views.batches) == 1 else gradients[batch.rows]
        if not bucket.stiefel:
            update_points(batch, g, bucket, group, rule, context)
        elif bucket.plain and context.grad_scale is None and not step.maximize:
            update(batch.points, g, batch.moments, batch.ws, step)
        else:
            _update_scaled(batch, g, bucket.gain, step)
    if bucket.gathered:
        bucket.scatter_(views)


def update(w: Tensor, g: Tensor, moments: dict[str, Tensor], ws: Workspace, step: Step) -> None:
    """Update blocks ``(B, p, n)`` and their moments in place."""
    if not ws.readable:
        return _update_sync_free(w, g, moments, ws, step)
    # The gradient in the frame of W, for square blocks.
    a = torch.bmm(g, ws.adjoint("w", w), out=ws.a) if w.shape[-2] == w.shape[-1] else g
    if largest_norm(a) <= MAX_GRAD_NORM[w.dtype]:
        return _update_finite(w, g, a, moments, ws, step)
    index = finite_points(norm(a), MAX_GRAD_NORM[w.dtype], step.context).nonzero()[:, 0]
    if len(index) == 0:
        return None
    point, gradient, state = w[index], g[index], {key: moment[index] for key, moment in moments.items()}
    _update_finite(point, gradient, gradient if a is g else a[index], state, Workspace(None, point), step)
    w[index] = point
    for key, moment in state.items():
        moments[key][index] = moment
    return None


def _update_finite(w: Tensor, g: Tensor, a: Tensor, moments: dict[str, Tensor], ws: Workspace, step: Step) -> None:
    """Update blocks whose gradient ``g``, and ``a`` in the frame if square, is finite: direction and retraction."""
    square, wide, options = step.rule
    v = wide(w, g, moments, ws, options) if a is g else square(a, moments, ws, options)
    retract_(w, v, ws, step.retraction)


def _update_sync_free(w: Tensor, g: Tensor, moments: dict[str, Tensor], ws: Workspace, step: Step) -> None:
    """Update blocks without reading a value: blocks that must not change get a zero gradient, and a zero step."""
    (square, wide, options), is_square = step.rule, w.shape[-2] == w.shape[-1]
    a = torch.bmm(g, w.mH, out=ws.a) if is_square else g
    finite = norm(a, keepdim=True).le_(MAX_GRAD_NORM[w.dtype])  # 1, or 0 for a non-finite gradient
    overflow = step.context.found_inf
    active = None if overflow is None else overflow.to(w.device) == 0
    a = a.masked_fill_(finite == 0, 0) if is_square else a.masked_fill(finite == 0, 0)  # never overwrite gradients
    options.finite, step.retraction.finite = finite if active is None else finite * active, finite
    v = square(a, moments, ws, options) if is_square else wide(w, a, moments, ws, options)
    if active is not None:
        v.mul_(active)
    retract_(w, v, ws, step.retraction)


def _gradient(g: Tensor, points: Tensor, step: Step) -> Tensor:
    """Return the gradients of a function to minimize, unscaled and in the dtype of the points."""
    g = g.to(points.dtype).resolve_conj()
    if step.context.grad_scale is not None:
        g = g / step.context.grad_scale.to(g)
    return -g if step.maximize else g


def _update_scaled(batch: Batch, g: Tensor, gain: float, step: Step) -> None:
    """Update blocks with a gain or in low precision. Blocks whose value does not change keep their bits."""
    points, values = batch.points, batch.values
    if gain == 1 and values is not None and host_can_branch(points) and torch.equal(points.to(values.dtype), values):
        update(points, _gradient(g, points, step), batch.moments, batch.ws, step)
        values.copy_(points)
        return
    w = torch.div(points, gain, out=batch.ws.u) if gain != 1 else points
    old = w.clone()
    update(w, _gradient(g, points, step), batch.moments, batch.ws, step)
    changed = (w != old).any(-1, keepdim=True).any(-2, keepdim=True)
    if gain != 1:
        points.copy_(torch.where(changed, w * gain, points))
    if values is not None:
        values.copy_(torch.where(changed, points.to(values.dtype), values))
