"""State of marked parameters: moments, float32 master copies and step counts, under the keys of torch.optim.

The moments are those of the gradient in the coordinates of the manifold (:meth:`Manifold.frame_gradient`): for square
blocks in the frame of W, for rectangular ones those of torch.optim. One more entry, ``constrained``, is a tensor with
the bytes of the constraint's record. It distinguishes the state from one of torch.optim, also in a checkpoint, and
convert.py converts between the two. Other entries are left alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...constraints.tag import CONSTRAINED, find_off_manifold, write_points_
from ...linalg.precision import MASTER
from ...manifolds.layout import get_points, with_view
from ...manifolds.records import record_to_tensor, serialize
from .bucket import Bucket
from .convert import reshape_moment
from .optimizer import Group, ManifoldOptimizer


def init_state(
    optimizer: ManifoldOptimizer, group: Group, bucket: Bucket, keys: list[str], per_block_keys: list[str]
) -> None:
    """Initialize the state of a bucket's members, and the bucket's views of it. Existing entries are kept.

    Args:
        optimizer: the optimizer, whose ``state`` is filled.
        group: parameter group of the members.
        bucket: the bucket.
        keys: keys of all moments.
        per_block_keys: keys of moments with one number per block, ``(blocks, 1, 1)`` for each member.
    """
    for key in keys:
        present = [
            reshape_moment(optimizer.state[p].get(key), key in per_block_keys, p, bucket.constraint)
            for p in bucket.parameters
        ]
        per_point = key in per_block_keys or bucket.has_own_frame
        entries, moment = _allocate_moment(bucket, present, per_point)
        if moment is not None:
            bucket.moments[key] = moment
        bucket.state_views[key] = entries
        for parameter, entry in zip(bucket.parameters, entries, strict=True):
            optimizer.state[parameter][key] = entry
    _init_master(optimizer, bucket)
    _init_own_state(optimizer, bucket)
    _init_steps(optimizer, group, bucket)
    record = serialize(bucket.constraint)
    assert record is not None
    for parameter in bucket.parameters:
        if CONSTRAINED not in optimizer.state[parameter]:
            optimizer.state[parameter][CONSTRAINED] = record_to_tensor(record)


def _init_master(optimizer: ManifoldOptimizer, bucket: Bucket) -> None:
    """Initialize the float32 master copies of members in low precision: the nearest points to the parameters."""
    bucket.master = None
    if not bucket.low_precision:
        for parameter in bucket.parameters:
            optimizer.state[parameter].pop(MASTER, None)
        return
    masters = []
    for parameter in bucket.parameters:
        master = optimizer.state[parameter].get(MASTER)
        if master is None or master.shape != parameter.shape:
            master = parameter.detach().float()
            write_points_(master, find_off_manifold(master, bucket.constraint))
        masters.append(master.to(parameter.device, torch.float32))
    masters, bucket.master = _allocate_moment(bucket, masters, False)
    bucket.state_views[MASTER] = masters
    for parameter, master in zip(bucket.parameters, masters, strict=True):
        optimizer.state[parameter][MASTER] = master


def _init_own_state(optimizer: ManifoldOptimizer, bucket: Bucket) -> None:
    """Initialize the tensors that the manifold keeps for every point, from the current points."""
    if not bucket.constraint.state_keys:
        return
    present: dict[str, list[Tensor]] = {key: [] for key in bucket.constraint.state_keys}
    for parameter in bucket.parameters:
        state = optimizer.state[parameter]
        points = get_points(bucket.layout, state.get(MASTER, parameter.detach()))
        start = bucket.constraint.start_state(points.contiguous())
        known = all(isinstance(state.get(k), Tensor) and state[k].shape == v.shape for k, v in start.items())
        for key, value in start.items():
            present[key].append(state[key].to(value) if known else value)
    for key, values in present.items():
        entries, bucket.moments[key] = _allocate_per_point(bucket, values)
        bucket.state_views[key] = entries
        for parameter, entry in zip(bucket.parameters, entries, strict=True):
            optimizer.state[parameter][key] = entry


def _allocate_per_point(bucket: Bucket, present: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return state entries with one tensor per point, and the bucket's tensor of all points."""
    if bucket.gathered:
        storage = torch.cat(present)
        return list(storage.split(bucket.points_per_param)), storage  # type: ignore[no-untyped-call]
    return present, present[0].narrow(0, bucket.point_offset, bucket.points_per_param)


def _allocate_moment(bucket: Bucket, present: list[Tensor], per_point: bool) -> tuple[list[Tensor], Tensor | None]:
    """Return the state entries of a moment, one per member, and the bucket's tensor (None if gathered every step)."""
    if per_point and not bucket.gathers_state:
        return _allocate_per_point(bucket, present)
    if bucket.gathered and not bucket.gathers_state:
        moment = bucket.map.copy(present)
        return bucket.map.split(moment), moment
    if not per_point:
        # A loaded moment has the strides of the saved one.
        present = [with_view(bucket.layout, moment, p) for moment, p in zip(present, bucket.parameters, strict=True)]
    return present, None if bucket.gathers_state else bucket.map.points(present)


def _init_steps(optimizer: ManifoldOptimizer, group: Group, bucket: Bucket) -> None:
    """Initialize the step counts: on the CPU for Adam unless capturable, as in torch; else on the device."""
    device = bucket.parameters[0].device if group.get("capturable", True) else torch.device("cpu")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=device)
    counts = [torch.as_tensor(optimizer.state[p].get("step", zero)).to(zero) for p in bucket.parameters]
    bucket.set_steps(torch.stack(counts))
    if bucket.point_offset:
        return
    bucket.state_views["step"] = list(bucket.steps.unbind())  # type: ignore[union-attr]
    for parameter, count in zip(bucket.parameters, bucket.state_views["step"], strict=True):
        optimizer.state[parameter]["step"] = count


def detach_state(optimizer: ManifoldOptimizer, bucket: Bucket, kept: set[int]) -> None:
    """Copy the state of members that leave a shared bucket out of its storage, except those with ids in ``kept``."""
    for index, parameter in enumerate(bucket.parameters):
        state = optimizer.state.get(parameter, {})
        for key, entries in bucket.state_views.items():
            if bucket.gathered and id(parameter) not in kept and state.get(key) is entries[index]:
                state[key] = entries[index].clone()
