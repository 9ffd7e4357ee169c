"""The walk of one bucket on any manifold but the orthogonal one: gradient -> tangent -> retraction -> transport.

As in walk.py, nothing on the way depends on a value where reading one would make the host wait.
"""

from __future__ import annotations

import functools
import operator

import torch
from torch import Tensor

from .buckets import Bucket
from .desk import Desk, sound_gradient
from .direction import Number
from .options import Group
from .precision import working_dtype
from .products import host_can_branch
from .riemannian import TANGENT
from .rules import Rule

_LEFT = 1e-6  # of a point, by decoupled decay that would leave nothing


def move(bucket: Bucket, group: Group, rule: Rule, desk: Desk) -> None:
    """Move every point of a bucket along its tangent, and its moments with it."""
    values = bucket.view(bucket.parameters, "point", desk.room)
    state, master = bucket.take(desk.room)
    bucket.follow(values, master)
    points = values if master is None else master
    gradients = bucket.view([p.grad for p in bucket.parameters], "gradient", desk.room)  # type: ignore[misc]
    manifold, dims, lr = bucket.constraint, bucket.part.dims, group["lr"]
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    decoupled = group.get("decoupled_weight_decay", desk.decoupled)
    decay = group["weight_decay"] if (manifold.decays if decoupled else manifold.penalized) else 0
    for piece in bucket.pieces():
        x, g = points[piece], gradients[piece].to(points.dtype)
        held = moments = {key: moment[piece] for key, moment in state.items()}
        g, sound = sound_gradient(g if desk.grad_scale is None else g / desk.grad_scale.to(g), dims, desk)
        g = -g if group["maximize"] else g
        start = x
        if decay and decoupled:
            start = x * _share(lr * decay)
            moments = {k: manifold.transport(x, start, m) if k in TANGENT else m for k, m in held.items()}
        elif decay:
            g = g + decay * x
        v, new = rule(start, g, moments, length=-lr)
        stepped = ~_all(v == 0 if start is x else (v == 0) & (start == x), dims)
        kept = _kept([v, *new.values()], sound, dims, desk)
        for key in list(new):
            held[key].copy_(_chosen(kept, new.pop(key), held[key]))
        end = manifold.retract(start, v if kept is None else torch.where(kept, v, 0))
        del v, g, moments
        moved = _moved(end.to(values.dtype), kept, stepped, dims, desk)
        end = _chosen(moved, end, x)
        carried = {key: manifold.transport(start, end, held[key]) for key in TANGENT if key in held}
        moved = _carried(list(carried.values()), moved, dims, desk)
        for key in list(carried):
            held[key].copy_(_chosen(moved, carried.pop(key), held[key]))
        x.copy_(_chosen(moved, end, x))
        if points is not values:
            values[piece] = _chosen(moved, end.to(values), values[piece])
    bucket.write_back(values, state, master)


def _share(t: Number) -> Number:
    """What decoupled decay leaves of a point, :math:`1 - t`, and a little where that is nothing or less."""
    return (1 - t).clamp_min(_LEFT) if isinstance(t, Tensor) else max(1 - t, _LEFT)


def _kept(results: list[Tensor], sound: Tensor | None, dims: int, desk: Desk) -> Tensor | None:
    """Which points have moments that count, ``(B, 1, ..)``; None if all.

    A gradient that is not sound, or a step or moments that are not finite, leaves a point and its moments as they are.
    """
    finite = functools.reduce(operator.and_, (_finite(result, dims) for result in results))
    if host_can_branch(finite) and sound is None and bool(finite.all()):
        return None
    desk.tally.add("skipped_blocks", ~finite if sound is None else sound & ~finite)
    return finite if sound is None else finite & sound


def _moved(end: Tensor, kept: Tensor | None, stepped: Tensor, dims: int, desk: Desk) -> Tensor | None:
    """Which points move, ``(B, 1, ..)``; None if all. A step of length zero, or to no point, leaves the bits."""
    finite = _finite(end, dims)
    if host_can_branch(finite) and kept is None and bool((finite & stepped).all()):
        return None
    desk.tally.add("skipped_blocks", ~finite if kept is None else kept & ~finite)
    moved = finite & stepped
    return moved if kept is None else moved & kept


def _carried(moments: list[Tensor], moved: Tensor | None, dims: int, desk: Desk) -> Tensor | None:
    """Which of the points that move can take their moments along; None if all."""
    if not moments:
        return moved
    finite = functools.reduce(operator.and_, (_finite(moment, dims) for moment in moments))
    if host_can_branch(finite) and bool(finite.all()):
        return moved
    desk.tally.add("skipped_blocks", ~finite if moved is None else moved & ~finite)
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
