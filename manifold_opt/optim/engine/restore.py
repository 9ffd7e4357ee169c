"""Projection of parameters that were modified outside the optimizer back to their manifold, before a step."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...constraints.tag import find_off_manifold
from ...linalg.precision import MASTER
from ...linalg.products import host_can_branch
from ...manifolds.layout import get_points, point_norm, set_points_
from ..options import describe_param
from .bucket import Bucket
from .optimizer import ManifoldOptimizer
from .plan import Plan, Stamps, value_stamp

PendingWrite = tuple[Bucket, list[Tensor], Tensor, Tensor]  # bucket, tensors, mask of their points, new values
_WARN_DISTANCE = 0.1  # larger distances from the manifold are no rounding errors and give a warning


@torch.no_grad()
def restore_overwritten(optimizer: ManifoldOptimizer, plan: Plan, seen: Stamps) -> None:
    """Project parameters that were modified since the last step, by load_state_dict for example, to their manifold.

    Errors that an inexact retraction leaves are not corrected.
    """
    pending: list[PendingWrite] = []
    messages: list[str] = []
    for position, bucket in plan.work:
        group = optimizer.param_groups[position]
        written = [p for p in bucket.parameters if value_stamp(p) != seen.get(id(p))]
        if bucket.low_precision:  # the master copy shows also what was written through .data
            ids = set(map(id, written))
            written = [p for p in bucket.parameters if id(p) in ids or _differs_from_master(optimizer, p)]
        if not written:
            continue
        bucket.forget_slack()
        extra_tolerance = 1.0 if bucket.stiefel and not optimizer._algorithm.retraction_of(group).exact else 0.0
        try:
            off, far = _points_to_rewrite(optimizer, bucket, written, extra_tolerance)
        except ValueError:
            for parameter in written:
                _check_written(optimizer, bucket, parameter, extra_tolerance)
            raise
        pending += off
        messages += far
    for message in messages:  # after the loop: a step that raises must not warn
        warnings.warn(message, stacklevel=6)  # the caller of opt.step(), above its hooks and decorators
    for bucket, tensors, mask, values in pending:
        masks = mask.split(bucket.points_per_param)  # type: ignore[no-untyped-call]
        new = values.split([int(m.sum()) for m in masks])  # type: ignore[no-untyped-call]
        for tensor, tensor_mask, nearest in zip(tensors, masks, new, strict=True):
            if bool(tensor_mask.any()):
                set_points_(bucket.layout, tensor, tensor_mask, nearest.to(tensor.dtype))


def _label(optimizer: ManifoldOptimizer, parameter: Tensor) -> str:
    """Return the shape of a parameter, and its name if its group has names, for a message."""
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return describe_param(group, parameter)


def _check_written(optimizer: ManifoldOptimizer, bucket: Bucket, parameter: Tensor, extra_tolerance: float) -> None:
    """Raise a ValueError that names the parameter and its block if its value has no nearest point."""
    try:
        find_off_manifold(parameter, bucket.constraint, extra_tolerance)
    except ValueError as refusal:
        raise ValueError(
            f"{type(optimizer).__name__}: a marked parameter of shape {_label(optimizer, parameter)} has been "
            f"written to: {refusal}"
        ) from None


def _differs_from_master(optimizer: ManifoldOptimizer, parameter: Tensor) -> bool:
    """Return True if the parameter is not its float32 master copy rounded: it was modified, or is not updated yet."""
    master = optimizer.state[parameter].get(MASTER)
    return master is not None and host_can_branch(master) and not torch.equal(parameter, master.to(parameter.dtype))


def _points_to_rewrite(
    optimizer: ManifoldOptimizer, bucket: Bucket, written: list[Tensor], extra_tolerance: float
) -> tuple[list[PendingWrite], list[str]]:
    """Find the points of modified parameters that must be rewritten, in the parameter and its float32 master.

    Returns:
        The values to write, and the warnings to give.
    """
    members = [p.detach() for p in written]
    points = torch.cat([get_points(bucket.layout, p) for p in members])
    if not bucket.low_precision:
        off, values = bucket.constraint.find_off_manifold(points, extra_tolerance)
        return [(bucket, members, off, values)], _far_warnings(optimizer, bucket, written, off, points[off] - values)
    masters = [optimizer.state[p][MASTER] for p in written]
    modified, off, values = _modified_points(bucket, points, masters)
    if not bool(modified.any() | off.any()):
        return [], []
    pending = [(bucket, masters, modified, values[modified]), (bucket, members, off, values[off])]
    return pending, _far_warnings(optimizer, bucket, written, off, points[off] - values[off])


def _modified_points(bucket: Bucket, points: Tensor, masters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a mask of points that differ from their master copy, a mask of those off the manifold, and new masters.

    The new master copy of a modified point is its nearest point, and so is that of a point before its first update.
    """
    values = torch.cat([get_points(bucket.layout, master) for master in masters])
    dims = bucket.layout.point_ndim
    modified = values.to(points.dtype) != points
    modified = modified.flatten(modified.ndim - dims).any(-1) if dims else modified
    off = modified.clone()
    if bool(modified.any()):
        now = points[modified].float()
        out, nearest = bucket.constraint.find_off_manifold(now)
        now[out] = nearest
        values[modified] = now
        off[modified] = ~(bucket.constraint.error(points[modified]) <= bucket.constraint.tolerance(points))
    return modified, off, values


def _far_warnings(
    optimizer: ManifoldOptimizer, bucket: Bucket, written: list[Tensor], off: Tensor, gap: Tensor
) -> list[str]:
    """Return a warning for the point of ``off`` farthest from the manifold, if it is far; ``gap``: the differences."""
    distances = point_norm(gap, bucket.layout.point_ndim).flatten()
    if not len(gap) or float(distances.max()) <= _WARN_DISTANCE:
        return []
    parameter = written[int(off.nonzero()[distances.argmax(), 0]) // bucket.points_per_param]
    return [
        f"A block of shape {tuple(bucket.point_shape)} of a marked parameter of shape {_label(optimizer, parameter)} "
        f"was {float(distances.max()):.2g} away from its manifold, {bucket.constraint}, changed outside the optimizer "
        "since it was marked or last stepped (load_state_dict?). It was put back to the nearest value, as "
        "project_to_manifold_(model) does without a warning."
    ]
