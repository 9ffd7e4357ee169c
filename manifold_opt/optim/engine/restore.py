"""Put parameters that something else has written to back on their manifold, before a step."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ...constraints.tag import find_off_manifold
from ...linalg.precision import MASTER
from ...linalg.products import host_can_branch
from ...manifolds.layout import get_points, point_norm, set_points_
from ...stiefel.retractions import RETRACTIONS
from ..options import describe_param
from .bucket import Bucket
from .optimizer import ManifoldOptimizer
from .plan import Plan, Values, value_stamp

Found = tuple[Bucket, list[Tensor], Tensor, Tensor]  # tensors, which of their points, and the values
_FAR = 0.1  # distance from the manifold above which a value is no matter of rounding, and worth a warning


@torch.no_grad()
def restore_overwritten(optimizer: ManifoldOptimizer, plan: Plan, seen: Values) -> None:
    """Put parameters that were written to since the last step, by load_state_dict say, back on their manifold.

    Inexact retractions end near the manifold. An error of the size that they leave is not repaired.
    """
    found: list[Found] = []
    warned: list[str] = []
    for position, bucket in plan.work:
        group = optimizer.param_groups[position]
        written = [p for p in bucket.parameters if value_stamp(p) != seen.get(id(p))]
        if bucket.low:  # what is held in float32 shows even what has been written through .data
            others = set(map(id, written))
            written = [p for p in bucket.parameters if id(p) in others or _differs_from_master(optimizer, p)]
        if not written:
            continue
        slack = 1.0 if bucket.stiefel and not RETRACTIONS[group["retraction"]].exact else 0.0
        try:
            off, far = _points_to_rewrite(optimizer, bucket, written, slack)
        except ValueError:
            for parameter in written:
                _check_written(optimizer, bucket, parameter, slack)
            raise
        found += off
        warned += far
    for message in warned:  # only now: nothing is put back where a step is refused
        warnings.warn(message, stacklevel=7)  # the caller of opt.step(), past its hooks and decorators
    for bucket, tensors, which, values in found:
        counts = [int(some.sum()) for some in which.split(bucket.each)]  # type: ignore[no-untyped-call]
        for tensor, some, nearest in zip(tensors, which.split(bucket.each), values.split(counts), strict=True):  # type: ignore[no-untyped-call]
            if bool(some.any()):
                set_points_(bucket.part, tensor, some, nearest.to(tensor.dtype))


def _label(optimizer: ManifoldOptimizer, parameter: Tensor) -> str:
    """Return the shape of a parameter, and its name in its own group if it has one, for a message."""
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return describe_param(group, parameter)


def _check_written(optimizer: ManifoldOptimizer, bucket: Bucket, parameter: Tensor, slack: float) -> None:
    """Raise a ValueError that names the parameter and its block, if its value has no nearest point."""
    try:
        find_off_manifold(parameter, bucket.constraint, slack)
    except ValueError as refusal:
        raise ValueError(
            f"{type(optimizer).__name__}: a marked parameter of shape {_label(optimizer, parameter)} has been "
            f"written to: {refusal}"
        ) from None


def _differs_from_master(optimizer: ManifoldOptimizer, parameter: Tensor) -> bool:
    """Whether what is held in float32 shows that a parameter has been written to, or that it has not moved yet."""
    master = optimizer.state[parameter].get(MASTER)
    return master is not None and host_can_branch(master) and not torch.equal(parameter, master.to(parameter.dtype))


def _points_to_rewrite(
    optimizer: ManifoldOptimizer, bucket: Bucket, written: list[Tensor], slack: float
) -> tuple[list[Found], list[str]]:
    """Return what to write to members that were written to, and to their float32 masters, and what to warn of."""
    members = [p.detach() for p in written]
    points = torch.cat([get_points(bucket.part, p) for p in members])
    if not bucket.low:
        off, values = bucket.constraint.find_off_manifold(points, slack)
        return [(bucket, members, off, values)], _far_warnings(optimizer, bucket, written, off, points[off] - values)
    masters = [optimizer.state[p][MASTER] for p in written]
    overwritten, off, values = _overwritten(bucket, points, masters)
    if not bool(overwritten.any() | off.any()):
        return [], []
    found = [(bucket, masters, overwritten, values[overwritten]), (bucket, members, off, values[off])]
    return found, _far_warnings(optimizer, bucket, written, off, points[off] - values[off])


def _overwritten(bucket: Bucket, points: Tensor, masters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Which points are not the rounding of what is held in float32, which are off, and what to hold.

    That is the nearest value, as it has been from the beginning for those that have not moved yet.
    """
    values = torch.cat([get_points(bucket.part, master) for master in masters])
    dims = bucket.part.point_ndim
    other = values.to(points.dtype) != points
    other = other.flatten(other.ndim - dims).any(-1) if dims else other
    off = other.clone()
    if bool(other.any()):
        now = points[other].float()
        out, nearest = bucket.constraint.find_off_manifold(now)
        now[out] = nearest
        values[other] = now
        off[other] = ~(bucket.constraint.error(points[other]) <= bucket.constraint.tolerance(points))
    return other, off, values


def _far_warnings(
    optimizer: ManifoldOptimizer, bucket: Bucket, written: list[Tensor], off: Tensor, gap: Tensor
) -> list[str]:
    """Return a warning of the point that is farthest off, if it is far; ``gap`` is how far those ``off`` are."""
    distances = point_norm(gap, bucket.part.point_ndim).flatten()
    if not len(gap) or float(distances.max()) <= _FAR:
        return []
    parameter = written[int(off.nonzero()[distances.argmax(), 0]) // bucket.each]
    return [
        f"A block of shape {tuple(bucket.point)} of a marked parameter of shape {_label(optimizer, parameter)} was "
        f"{float(distances.max()):.2g} away from its manifold, {bucket.constraint}, changed outside the optimizer "
        "since it was marked or last stepped (load_state_dict?). It was put back to the nearest value, as "
        "project_to_manifold_(model) does without a warning."
    ]
