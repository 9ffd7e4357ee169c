"""The moments of marked parameters: created, taken over from what the optimizer's state holds, shown under its keys.

Those of square blocks are held in the frame of W (direction.py); all others as torch holds them. A state that is held
under a constraint says under which, by one more entry, ``constrained``: the bytes of the constraint's record. So a
state of torch's own is known wherever it comes from, and converted when it is met; and the record goes wherever the
state of its parameter goes, also where a checkpoint is loaded by name. Entries that other code keeps in the state are
left alone.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from ...constraints.tag import CONSTRAINED, constraint_of, find_off_manifold, was_unmarked, write_points_
from ...linalg.precision import LOW_PRECISION, MASTER, FullPrecision, working_dtype
from ...manifolds import Manifold, Orthogonal
from ...manifolds.layout import Layout, get_points, is_viewable, set_points_
from ...manifolds.records import (
    Record,
    deserialize,
    format_constraint,
    is_record_of,
    record_from_tensor,
    record_to_tensor,
    serialize,
    to_tuples,
)
from ..directions.stiefel import from_frame, to_frame
from ..options import describe_param
from .bucket import Bucket
from .optimizer import Group, ManifoldOptimizer


def hold(optimizer: ManifoldOptimizer, group: Group, bucket: Bucket, keys: list[str], scalars: list[str]) -> None:
    """Give a bucket its moments: those its members have, zeros for those they lack.

    ``keys`` are those of all moments, ``scalars`` of those that hold one number a block, ``(blocks, 1, 1)`` a member.
    """
    for key in keys:
        present = [
            _reshape_moment(optimizer.state[p].get(key), key in scalars, p, bucket.constraint)
            for p in bucket.parameters
        ]
        shown, held = _allocate_moment(bucket, present, key in scalars)
        if held is not None:
            bucket.moments[key] = held
        bucket.state_views[key] = shown
        for parameter, moment in zip(bucket.parameters, shown, strict=True):
            optimizer.state[parameter][key] = moment
    _init_master(optimizer, bucket)
    _init_steps(optimizer, group, bucket)
    record = serialize(bucket.constraint)
    assert record is not None
    for parameter in bucket.parameters:
        if CONSTRAINED not in optimizer.state[parameter]:
            optimizer.state[parameter][CONSTRAINED] = record_to_tensor(record)


def _init_master(optimizer: ManifoldOptimizer, bucket: Bucket) -> None:
    """Give members of low precision their values in float32: those they have, new ones from the nearest points."""
    bucket.master = None
    if not bucket.low:
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


def _allocate_moment(bucket: Bucket, present: list[Tensor], scalar: bool) -> tuple[list[Tensor], Tensor | None]:
    """What the members' state shows of a moment, and what the rule works on: None where each step gathers that."""
    if bucket.gathered and not bucket.gathers_state:
        storage = torch.cat(present) if scalar else bucket.storage(present)
        if scalar:
            return list(storage.split(bucket.each)), storage  # type: ignore[no-untyped-call]
        return bucket.split(storage), bucket.part.to_points(storage)
    if not scalar:
        present = [
            _with_layout_of(bucket.part, moment, p) for moment, p in zip(present, bucket.parameters, strict=True)
        ]
    if bucket.gathers_state:
        return present, None
    own = (
        present[0][bucket.point_offset : bucket.point_offset + bucket.each] if scalar else bucket.part.view(present[0])
    )
    return present, own


def _with_layout_of(part: Layout, moment: Tensor, parameter: Tensor) -> Tensor:
    """A moment that can be viewed as points, as its parameter can: a loaded one lies as where it came from."""
    if is_viewable(part, moment):
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _init_steps(optimizer: ManifoldOptimizer, group: Group, bucket: Bucket) -> None:
    # torch's Adam counts on the host unless it is capturable; its SGD does not count.
    device = bucket.parameters[0].device if group.get("capturable", True) else torch.device("cpu")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=device)
    counts = [torch.as_tensor(optimizer.state[p].get("step", zero)).to(zero) for p in bucket.parameters]
    bucket.show_steps(torch.stack(counts))
    if bucket.point_offset:
        return
    bucket.state_views["step"] = list(bucket.steps.unbind())  # type: ignore[union-attr]
    for parameter, count in zip(bucket.parameters, bucket.state_views["step"], strict=True):
        optimizer.state[parameter]["step"] = count


def convert(optimizer: ManifoldOptimizer, group: Group) -> None:
    """Bring the state of a group from the constraints that it is held under to those of today."""
    for parameter in group["params"]:
        new = converted(optimizer, group, parameter)
        if new is not None:
            state = optimizer.state[parameter]
            state.clear()
            state.update(new)


@torch.no_grad()
def converted(optimizer: ManifoldOptimizer, group: Group, parameter: Tensor) -> dict[str, Any] | None:
    """The state of a parameter as its mark of today asks, in a new dictionary; None if it is so already.

    An entry of an earlier version does not say under which constraint the state is held, and code that resets or
    averages all tensors of a state may have written to it. Of a marked parameter it is then taken for that of today.
    """
    state, constraint = optimizer.state.get(parameter), constraint_of(parameter)
    if not state:
        return None
    check_owner(type(optimizer).__name__, group, parameter, state)
    new = serialize(constraint)
    said = record_from_tensor(state[CONSTRAINED]) if CONSTRAINED in state else None
    if CONSTRAINED in state and new is not None and (said is None or is_record_of(said, constraint)):
        return None if said == new else {**state, CONSTRAINED: record_to_tensor(new)}
    if CONSTRAINED not in state and new is None:
        return None
    state = dict(state)
    if new is None:
        _to_torch_state(optimizer, group, parameter, state, said)
        return state
    check_shapes(optimizer, group, parameter, state, constraint if said is None else deserialize(said))
    if said is not None:
        _change(state, optimizer._algorithm.state_keys, parameter, said, from_frame)
    _change(state, optimizer._algorithm.state_keys, parameter, new, to_frame)
    state[CONSTRAINED] = record_to_tensor(new)
    return state


def _to_torch_state(
    optimizer: ManifoldOptimizer, group: Group, parameter: Tensor, state: dict[str, Any], said: Record | None
) -> None:
    """Moments of a parameter that is marked no more as torch holds them, in its own dtype.

    They are in the frame of the point that it was. Where it is none any more, nor near one, they start anew.
    """
    try:
        if said is None:
            raise ValueError("the state does not say under which constraint it was held.")
        check_shapes(optimizer, group, parameter, state, deserialize(said))
        _change(state, optimizer._algorithm.state_keys, parameter, said, from_frame)
    except (ValueError, RuntimeError) as reason:
        warnings.warn(
            f"{type(optimizer).__name__}: the moments of an unmarked parameter of shape "
            f"{describe_param(group, parameter)} cannot be converted to those of torch.optim, and start anew: {reason}",
            stacklevel=2,
        )
        for key in optimizer._algorithm.state_keys:
            if isinstance(state.pop(key, None), Tensor) and key != "momentum_buffer":
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if "step" in state:
            state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
    state.pop(MASTER, None)
    del state[CONSTRAINED]
    for key in optimizer._algorithm.state_keys:
        if isinstance(state.get(key), Tensor) and parameter.dtype in LOW_PRECISION:
            state[key] = state[key].to(parameter.dtype)


def check_owner(name: str, group: Group, parameter: Tensor, state: dict[str, Any]) -> None:
    """Raise a ValueError if a state was held under a constraint that its parameter has never had.

    So it is where code that replaces parameters hands the state of a marked one to its successor.
    """
    if CONSTRAINED in state and constraint_of(parameter) is None and not was_unmarked(parameter):
        record = record_from_tensor(state[CONSTRAINED])
        raise ValueError(
            f"{name}: a parameter of shape {describe_param(group, parameter)} is not marked, but its state is that of "
            f"a marked one{'' if record is None else f', {format_constraint(record)}'}, handed over to it. Mark it so "
            "too, or del opt.state[param]."
        )


def check_shapes(
    optimizer: ManifoldOptimizer, group: Group, parameter: Tensor, state: dict[str, Any], constraint: Manifold | None
) -> None:
    """Raise a RuntimeError unless every moment has one entry for each of the parameter, or one for each point."""
    if constraint is None:
        return
    points = sum(len(get_points(part, parameter.detach())) for part in constraint.layouts(parameter.shape))
    for key in optimizer._algorithm.state_keys:
        moment = state.get(key)
        if isinstance(moment, Tensor) and moment.shape != parameter.shape and moment.numel() not in (1, points):
            raise RuntimeError(
                f"{type(optimizer).__name__}: a marked parameter has shape {describe_param(group, parameter)}, what "
                f"the optimizer holds for it {tuple(moment.shape)}. After changing the shape of a parameter, "
                "del opt.state[param]."
            )
    count = state.get("step")
    if isinstance(count, Tensor) and count.numel() != 1:
        raise RuntimeError(
            f"{type(optimizer).__name__}: the step count of a marked parameter of shape "
            f"{describe_param(group, parameter)} has shape {tuple(count.shape)}; it must be one number. "
            "del opt.state[param] resets it."
        )


def check_checkpoint(optimizer: ManifoldOptimizer, loaded: dict[str, Any]) -> None:
    """Raise a ValueError unless the parameters are marked as those were whose state is to be loaded.

    In a checkpoint, that is: a copy of an optimizer knows what its state is, whatever has been marked since.
    """
    if not hasattr(optimizer, "param_groups"):
        return
    name = type(optimizer).__name__
    groups, states = loaded.get("param_groups", optimizer.param_groups), loaded.get("state", optimizer.state)
    older = _records_of_groups(groups)
    for index, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            state, now = states.get(parameter, {}), constraint_of(parameter)
            if CONSTRAINED not in state:
                continue
            then = record_from_tensor(state[CONSTRAINED]) or older.get(parameter)
            if then is None and now is None:
                raise ValueError(
                    f"{name}: the state of a parameter of shape {tuple(parameter.shape)} is held under a constraint, "
                    "which the groups beside it do not name; here it is not marked. Mark it as it was before loading."
                )
            if then is not None and not is_record_of(then, now):
                label = f" ({group['param_names'][position]})" if "param_names" in group else ""
                raise ValueError(
                    f"{name}: the checkpoint was written with parameter {position} of group {index}{label}, shape "
                    f"{tuple(parameter.shape)}, marked as {format_constraint(then)}; here it is "
                    f"{'not marked' if now is None else now}. "
                    "Mark it as it was before loading; it can be unmarked, or marked otherwise, afterwards."
                )


def upgrade(optimizer: ManifoldOptimizer) -> None:
    """Let every state that has come say under which constraint it is held, as this version writes it.

    Earlier ones have a single one there, and the constraints in ``group["constraints"]``, ``(position, name, ...)``
    each, which were those of today's marks or have been refused.
    """
    older = _records_of_groups(optimizer.param_groups)
    for group in optimizer.param_groups:
        group.pop("constraints", None)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if CONSTRAINED in state and record_from_tensor(state[CONSTRAINED]) is None:
                record = older.get(parameter) or serialize(constraint_of(parameter))
                if record is not None:
                    state[CONSTRAINED] = record_to_tensor(record)


def _records_of_groups(groups: list[Group]) -> dict[Tensor, Record]:
    return {
        group["params"][position]: to_tuples(record)
        for group in groups
        for position, *record in group.get("constraints", ())
    }


def leave(optimizer: ManifoldOptimizer, bucket: Bucket, staying: set[int]) -> None:
    """Take the state of members that a bucket loses out of the storage it shares."""
    for index, parameter in enumerate(bucket.parameters):
        state = optimizer.state.get(parameter, {})
        for key, shown in bucket.state_views.items():
            if bucket.gathered and id(parameter) not in staying and state.get(key) is shown[index]:
                state[key] = shown[index].clone()


def _change(state: dict[str, Any], keys: tuple[str, ...], parameter: Tensor, record: Record, change: Any) -> None:
    """Every moment of one parameter into the frame of its square blocks, or out of it, as tensors of its shape.

    The frame is that of the point that the next step starts from, where a value just loaded is still to be put back.
    """
    constraint = deserialize(record)
    if constraint is None:
        return
    framed = {}
    for key in keys:
        moment = state.get(key)
        if isinstance(moment, Tensor):
            held = _reshape_moment(moment, False, parameter, constraint)
            state[key] = held if held is not moment else moment.clone(memory_format=torch.preserve_format)
            if moment.shape == parameter.shape:
                framed[key] = state[key]
    if not isinstance(constraint, Orthogonal):
        return
    for part in constraint.layouts(parameter.shape):
        value = state.get(MASTER, parameter.detach()) if parameter.dtype in LOW_PRECISION else parameter.detach()
        w = get_points(part, value).to(working_dtype(value.dtype), copy=True)
        if w.shape[-2] != w.shape[-1]:
            continue
        off, values = constraint.find_off_manifold(w)
        w[off] = values
        w = w / constraint.gain
        for key, moment in framed.items():
            with FullPrecision(w.device.type):
                set_points_(part, moment, ..., change(w, key, get_points(part, moment).to(w)))


def _reshape_moment(moment: Tensor | None, scalar: bool, parameter: Tensor, constraint: Manifold) -> Tensor:
    """A moment as its rule holds it, one number a point or like the parameter: new, as it is, or from the other rule's.

    The other shape is what a checkpoint brings that was written with another ``second_moment``, or by torch itself.
    """
    parts = constraint.layouts(parameter.shape)
    ones = [_one(part, parameter.detach()) for part in parts]
    count = sum(map(len, ones))
    shape = torch.Size((count, *ones[0].shape[1:])) if scalar else parameter.shape
    dtype = working_dtype(parameter.dtype)
    dtype = dtype.to_real() if scalar else dtype
    if moment is not None and moment.shape == shape:
        return moment.to(parameter.device, dtype)
    if moment is not None and scalar and moment.shape == parameter.shape:
        return torch.cat([_mean(part, moment) for part in parts]).to(parameter.device, dtype)
    like = ones[0].new_empty(shape) if scalar else parameter
    value = torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)
    if moment is None:
        return value
    a_point = moment if moment.numel() == count else moment.mean().expand(count, *ones[0].shape[1:])
    if scalar:
        return value.copy_(a_point)
    if value.is_complex():
        a_point = torch.complex(a_point, a_point)  # of either part of an entry
    value.fill_(a_point.mean().item())
    start = 0
    for part, one in zip(parts, ones, strict=True):
        set_points_(part, value, ..., a_point[start : start + len(one)].to(value))
        start += len(one)
    return value


def _one(part: Layout, tensor: Tensor) -> Tensor:
    """One number of each point of a part, ``(B, 1, ..)``."""
    points = get_points(part, tensor)
    for dim in range(points.ndim - part.point_ndim, points.ndim):
        points = points.narrow(dim, 0, 1)
    return points


def _mean(part: Layout, tensor: Tensor) -> Tensor:
    """The mean of each point of a part, ``(B, 1, ..)``, over the real and imaginary parts of complex ones."""
    if tensor.is_complex():
        tensor = (tensor.real + tensor.imag) / 2
    points = get_points(part, tensor)
    dims = tuple(range(points.ndim - part.point_ndim, points.ndim))
    return points.mean(dims, keepdim=True) if dims else points
