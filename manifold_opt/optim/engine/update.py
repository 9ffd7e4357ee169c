"""Update of a bucket, in the same way for every manifold: gradient -> direction -> step, in place.

If every point of a batch has a finite gradient, all are updated in place. Otherwise the points with a finite gradient
are copied out by a mask, updated, and written back. One comparison decides, before any weight or moment is changed.
Where values cannot be read, all points are updated with masks.

A batch (bucket.py) has points, moments and a workspace ``ws``, whose buffers are overwritten in every step. The
manifold turns the gradient into the coordinates in which moments are averaged (``frame_gradient``). A direction
(directions/sgd.py, adam.py) updates the moments and returns a tangent. The manifold moves the points along it
(``step_``; for orthogonal blocks, stiefel/step.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...linalg.products import Pool, Workspace, host_can_branch, largest_norm
from ...manifolds import Manifold
from ...manifolds.layout import point_any, point_max, point_norm
from ...stiefel.retractions import RETRACTIONS
from ..options import MAX_GRAD_NORM
from .bucket import Batch, Bucket
from .counters import Counters
from .optimizer import Algorithm, Group, Rule


@dataclass
class StepContext:
    """Objects that all buckets of a step share.

    Attributes:
        pool: memory of workspaces; None in a traced graph.
        counters: counts of skipped blocks and shortened steps.
        algorithm: that of the optimizer.
        grad_scale, found_inf: attributes that a GradScaler sets on a fused optimizer.
    """

    pool: Pool | None
    counters: Counters
    algorithm: Algorithm
    grad_scale: Tensor | None
    found_inf: Tensor | None


@dataclass
class Step:
    """Settings of one step for all points of a bucket.

    Attributes:
        bucket: the bucket.
        rule: direction and its options.
        options: options of :meth:`Manifold.step_`.
        maximize: whether the objective is maximized.
        penalty: factor of the L2 penalty.
        context: what all buckets of the step share.
    """

    bucket: Bucket
    rule: Rule
    options: Any
    maximize: bool
    penalty: float
    context: StepContext


def update_bucket(bucket: Bucket, group: Group, rule: Rule, context: StepContext) -> None:
    """Update all points of a bucket."""
    views = bucket.gather(context.pool)
    gradients = bucket.gradients(context.pool)
    penalty, decay = _weight_decay(bucket.constraint, group, context) if group["weight_decay"] else (0.0, 0.0)
    options = bucket.constraint.step_options(
        group,
        context.counters.count,
        bucket.shared_step,
        point_ndim=bucket.layout.point_ndim,
        transported=context.algorithm.means,
        decay=decay,
        retraction=context.algorithm.retraction or RETRACTIONS[group["retraction"]],
    )
    step = Step(bucket, rule, options, "maximize" in group and group["maximize"], penalty, context)
    for batch in views.batches:
        g = gradients if len(views.batches) == 1 else gradients[batch.rows]
        if bucket.plain and not step.maximize and not penalty and context.grad_scale is None:
            update(batch.points, g, batch.moments, batch.ws, step)
        else:
            _update_scaled(batch, g, step)
    if bucket.gathered:
        bucket.scatter_(views)


def _weight_decay(manifold: Manifold, group: Group, context: StepContext) -> tuple[Any, Any]:
    """Return the factor of the L2 penalty, and learning rate times decoupled weight decay; one of them is zero."""
    if group.get("decoupled_weight_decay", context.algorithm.decoupled):
        lr = group["lr"].reshape(()) if isinstance(group["lr"], Tensor) else group["lr"]
        return 0.0, lr * group["weight_decay"] if manifold.allows_decoupled_decay else 0.0
    return group["weight_decay"] if manifold.allows_l2_penalty else 0.0, 0.0


def update(x: Tensor, g: Tensor, moments: dict[str, Tensor], ws: Workspace, step: Step) -> None:
    """Update points ``(B, *point)`` and their moments in place."""
    if not ws.readable:
        return _update_sync_free(x, g, moments, ws, step)
    manifold, (direction, options) = step.bucket.constraint, step.rule
    a = manifold.frame_gradient(x, g, ws)
    size = largest_norm(a if step.bucket.stiefel else g)
    if step.bucket.tests_frame and a is not g:
        size += largest_norm(a)
    if size <= MAX_GRAD_NORM[x.dtype]:
        manifold.step_(x, direction(x, a, moments, ws, options), moments, ws, step.options)
        return None
    finite = _finite(g, a, step.bucket, keepdim=False)
    step.context.counters.count(skipped=~finite)
    if not bool(finite.any()):
        return None
    point, state = x[finite], {key: moment[finite] for key, moment in moments.items()}
    own, ws.slack = Workspace(None, point), 0.0
    manifold.step_(point, direction(point, a[finite], state, own, options), state, own, step.options)
    x[finite] = point
    for key, moment in state.items():
        moments[key][finite] = moment
    return None


def _finite(g: Tensor, a: Tensor, bucket: Bucket, *, keepdim: bool) -> Tensor:
    """Return a mask of the points whose gradient is short enough to be squared.

    It is tested in the frame for orthogonal blocks, and also there for manifolds whose frame may make it longer.
    """
    size = point_norm(a if bucket.stiefel else g, bucket.layout.point_ndim, keepdim=keepdim)
    if bucket.tests_frame and a is not g:
        size = torch.maximum(size, point_norm(a, bucket.layout.point_ndim, keepdim=keepdim))
    return size <= MAX_GRAD_NORM[bucket.working_dtype]  # False for NaN


def _update_sync_free(x: Tensor, g: Tensor, moments: dict[str, Tensor], ws: Workspace, step: Step) -> None:
    """Update points without reading a value: points that must not change get a zero gradient, and a zero step."""
    bucket, (direction, options), found_inf = step.bucket, step.rule, step.context.found_inf
    a = bucket.constraint.frame_gradient(x, g, ws)
    finite = _finite(g, a, bucket, keepdim=True)
    # Never overwrite a gradient.
    out = a if bucket.stiefel and a is not g else None
    a = torch.where(finite, a, ws.zero, out=out)
    active = None if found_inf is None else found_inf.to(x.device) == 0
    taken = finite if active is None else finite & active
    step.options.finite = finite if bucket.stiefel else taken
    options.finite = taken.to(bucket.real_dtype)  # a factor
    if not bucket.stiefel:
        step.context.counters.count(skipped=~finite)
    v = direction(x, a, moments, ws, options)
    if active is not None:
        v = torch.where(active, v, 0)
    bucket.constraint.step_(x, v, moments, ws, step.options)


def _gradient(g: Tensor, points: Tensor, step: Step) -> Tensor:
    """Return the gradients of a function to minimize, unscaled and in the dtype of the points."""
    g = g.to(points.dtype).resolve_conj()
    if step.context.grad_scale is not None:
        g = g / step.context.grad_scale.to(g)
    g = -g if step.maximize else g
    return g + step.penalty * points if step.penalty else g


def _update_scaled(batch: Batch, g: Tensor, step: Step) -> None:
    """Update points with a gain, in low precision or from scaled gradients. Unchanged points keep their bits."""
    points, values, gain, dims = batch.points, batch.values, step.bucket.gain, step.bucket.layout.point_ndim
    in_range = step.bucket.stiefel or step.bucket.dtype != torch.float16  # else a point may be too large to be stored
    is_rounding = values is None or (host_can_branch(points) and torch.equal(points.to(values.dtype), values))
    if gain == 1 and in_range and is_rounding:
        update(points, _gradient(g, points, step), batch.moments, batch.ws, step)
        if values is not None:
            values.copy_(points)
        return
    w = torch.div(points, gain, out=batch.ws.u) if gain != 1 else points
    old = w.clone()
    update(w, _gradient(g, points, step), batch.moments, batch.ws, step)
    changed = point_any(w != old, dims)
    if not in_range:
        assert values is not None
        lost = point_max(points.to(values.dtype), dims) == torch.inf
        step.context.counters.count(skipped=lost)
        points.copy_(torch.where(lost, old, points))
        batch.ws.slack = 0.0
        changed = changed & ~lost
    if gain != 1:
        points.copy_(torch.where(changed, w * gain, points))
    if values is not None:
        values.copy_(torch.where(changed, points.to(values.dtype), values))
