"""Update of points on any manifold except the orthogonal one: gradient -> tangent -> retraction -> transport.

As in update.py, no value is read if that would synchronize with a device. Masks are ``(B, 1, ..)``; None means all.
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
from .bucket import Batch, Bucket
from .context import StepContext, finite_gradient
from .optimizer import Group

Rule = Callable[..., tuple[Tensor, Moments]]

_MIN_DECAY_FACTOR = 1e-6  # decoupled decay keeps at least this fraction of a point


def update_points(
    batch: Batch, gradients: Tensor, bucket: Bucket, group: Group, rule: Rule, context: StepContext
) -> None:
    """Update the points of a batch and their moments, in place."""
    manifold, dims, lr = bucket.constraint, bucket.layout.point_ndim, group["lr"]
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    decoupled = group.get("decoupled_weight_decay", context.algorithm.decoupled)
    decay = (
        group["weight_decay"] if (manifold.allows_decoupled_decay if decoupled else manifold.allows_l2_penalty) else 0
    )
    mean_squares = context.algorithm.mean_squares
    x, values, state = batch.points, batch.values, batch.moments
    g, moments = gradients.to(x.dtype), state
    g, finite = finite_gradient(g if context.grad_scale is None else g / context.grad_scale.to(g), dims, context)
    g = -g if group["maximize"] else g
    start = x
    if decay and decoupled:
        start = x * _decay_factor(lr * decay)
        moments = {key: m if key in mean_squares else manifold.transport(x, start, m) for key, m in state.items()}
    elif decay:
        g = g + decay * x
    v, new = rule(start, g, moments, scale=-lr)
    nonzero = ~_all_of_point(v == 0 if start is x else (v == 0) & (start == x), dims)
    valid = _valid_mask([v, *new.values()], finite, dims, context)
    for key in list(new):
        state[key].copy_(_where(valid, new.pop(key), state[key]))
    end = manifold.retract(start, v if valid is None else torch.where(valid, v, 0))
    del v, g, moments
    updated = _updated_mask(end.to(bucket.dtype), valid, nonzero, dims, context)
    end = _where(updated, end, x)
    transported = {key: manifold.transport(start, end, state[key]) for key in state if key not in mean_squares}
    updated = _transported_mask(list(transported.values()), updated, dims, context)
    for key in list(transported):
        state[key].copy_(_where(updated, transported.pop(key), state[key]))
    x.copy_(_where(updated, end, x))
    if values is not None:
        values.copy_(_where(updated, end.to(values), values))


def _decay_factor(t: Scalar) -> Scalar:
    """Return :math:`1 - t`, the factor of decoupled decay, or a small positive number if that is larger."""
    return (1 - t).clamp_min(_MIN_DECAY_FACTOR) if isinstance(t, Tensor) else max(1 - t, _MIN_DECAY_FACTOR)


def _valid_mask(results: list[Tensor], taken: Tensor | None, dims: int, context: StepContext) -> Tensor | None:
    """Return a mask of points with a finite gradient (``taken``), a finite step and finite moments; count the others.

    The other points and their moments are left unchanged.
    """
    finite = functools.reduce(operator.and_, (_finite(result, dims) for result in results))
    if host_can_branch(finite) and taken is None and bool(finite.all()):
        return None
    context.counters.count("skipped_blocks", ~finite if taken is None else taken & ~finite)
    return finite if taken is None else finite & taken


def _updated_mask(end: Tensor, valid: Tensor | None, nonzero: Tensor, dims: int, context: StepContext) -> Tensor | None:
    """Return a mask of valid points with a nonzero step and a finite result; others keep their bits."""
    finite = _finite(end, dims)
    if host_can_branch(finite) and valid is None and bool((finite & nonzero).all()):
        return None
    context.counters.count("skipped_blocks", ~finite if valid is None else valid & ~finite)
    updated = finite & nonzero
    return updated if valid is None else updated & valid


def _transported_mask(moments: list[Tensor], updated: Tensor | None, dims: int, context: StepContext) -> Tensor | None:
    """Return a mask of updated points whose transported moments are finite; count the other updated points."""
    if not moments:
        return updated
    finite = functools.reduce(operator.and_, (_finite(moment, dims) for moment in moments))
    if host_can_branch(finite) and bool(finite.all()):
        return updated
    context.counters.count("skipped_blocks", ~finite if updated is None else updated & ~finite)
    return finite if updated is None else updated & finite


def _finite(x: Tensor, dims: int) -> Tensor:
    """Return a mask of points whose entries have a finite sum."""
    if not dims:
        return x.isfinite()
    return x.sum(tuple(range(-dims, 0)), keepdim=True, dtype=working_dtype(x.dtype)).isfinite()


def _all_of_point(mask: Tensor, dims: int) -> Tensor:
    return mask.all(tuple(range(-dims, 0)), keepdim=True) if dims else mask


def _where(mask: Tensor | None, new: Tensor, old: Tensor) -> Tensor:
    return new if mask is None else torch.where(mask, new, old)
