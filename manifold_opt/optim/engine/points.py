"""One step of points of any manifold but the orthogonal one: gradient -> tangent -> retraction -> transport.

As in update.py, no value is read where that would make the host wait.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable

import torch
from torch import Tensor

from ...linalg.precision import working_dtype
from ...linalg.products import host_can_branch
from ..directions.stiefel import Moments, Scalar
from ..directions.tangent import TANGENT
from .bucket import Batch, Bucket
from .context import StepContext, finite_gradient
from .optimizer import Group

Rule = Callable[..., tuple[Tensor, Moments]]

_MIN_DECAY_FACTOR = 1e-6  # of a point, by decoupled decay that would leave nothing


def update_points(
    batch: Batch, gradients: Tensor, bucket: Bucket, group: Group, rule: Rule, context: StepContext
) -> None:
    """Move the points of a batch along their tangents, and their moments with them."""
    manifold, dims, lr = bucket.constraint, bucket.part.point_ndim, group["lr"]
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    decoupled = group.get("decoupled_weight_decay", context.decoupled)
    decay = (
        group["weight_decay"] if (manifold.allows_decoupled_decay if decoupled else manifold.allows_l2_penalty) else 0
    )
    x, values, held = batch.points, batch.values, batch.moments
    g, moments = gradients.to(x.dtype), held
    g, finite = finite_gradient(g if context.grad_scale is None else g / context.grad_scale.to(g), dims, context)
    g = -g if group["maximize"] else g
    start = x
    if decay and decoupled:
        start = x * _decay_factor(lr * decay)
        moments = {k: manifold.transport(x, start, m) if k in TANGENT else m for k, m in held.items()}
    elif decay:
        g = g + decay * x
    v, new = rule(start, g, moments, length=-lr)
    stepped = ~_all(v == 0 if start is x else (v == 0) & (start == x), dims)
    kept = _kept([v, *new.values()], finite, dims, context)
    for key in list(new):
        held[key].copy_(_chosen(kept, new.pop(key), held[key]))
    end = manifold.retract(start, v if kept is None else torch.where(kept, v, 0))
    del v, g, moments
    moved = _moved(end.to(bucket.dtype), kept, stepped, dims, context)
    end = _chosen(moved, end, x)
    carried = {key: manifold.transport(start, end, held[key]) for key in TANGENT if key in held}
    moved = _carried(list(carried.values()), moved, dims, context)
    for key in list(carried):
        held[key].copy_(_chosen(moved, carried.pop(key), held[key]))
    x.copy_(_chosen(moved, end, x))
    if values is not None:
        values.copy_(_chosen(moved, end.to(values), values))


def _decay_factor(t: Scalar) -> Scalar:
    """What decoupled decay leaves of a point, :math:`1 - t`, and a little where that is nothing or less."""
    return (1 - t).clamp_min(_MIN_DECAY_FACTOR) if isinstance(t, Tensor) else max(1 - t, _MIN_DECAY_FACTOR)


def _kept(results: list[Tensor], taken: Tensor | None, dims: int, context: StepContext) -> Tensor | None:
    """Which points have moments that count, ``(B, 1, ..)``; None if all.

    A gradient that is not finite, or a step or moments that are not finite, leaves a point and its moments as they are.
    """
    finite = functools.reduce(operator.and_, (_finite(result, dims) for result in results))
    if host_can_branch(finite) and taken is None and bool(finite.all()):
        return None
    context.counters.count("skipped_blocks", ~finite if taken is None else taken & ~finite)
    return finite if taken is None else finite & taken


def _moved(end: Tensor, kept: Tensor | None, stepped: Tensor, dims: int, context: StepContext) -> Tensor | None:
    """Which points move, ``(B, 1, ..)``; None if all. A step of length zero, or to no point, leaves the bits."""
    finite = _finite(end, dims)
    if host_can_branch(finite) and kept is None and bool((finite & stepped).all()):
        return None
    context.counters.count("skipped_blocks", ~finite if kept is None else kept & ~finite)
    moved = finite & stepped
    return moved if kept is None else moved & kept


def _carried(moments: list[Tensor], moved: Tensor | None, dims: int, context: StepContext) -> Tensor | None:
    """Which of the points that move can take their moments along; None if all."""
    if not moments:
        return moved
    finite = functools.reduce(operator.and_, (_finite(moment, dims) for moment in moments))
    if host_can_branch(finite) and bool(finite.all()):
        return moved
    context.counters.count("skipped_blocks", ~finite if moved is None else moved & ~finite)
    return finite if moved is None else moved & finite


def _finite(x: Tensor, dims: int) -> Tensor:
    """Which points are finite, and not so long that their sum is not."""
    return (
        x.sum(tuple(range(-dims, 0)), keepdim=True, dtype=working_dtype(x.dtype)).isfinite() if dims else x.isfinite()
    )


def _all(which: Tensor, dims: int) -> Tensor:
    return which.all(tuple(range(-dims, 0)), keepdim=True) if dims else which


def _chosen(which: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if which is None else torch.where(which, new, old)
