"""Conversion of the state of a parameter between constraints, and between torch.optim and this package."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...constraints.tag import CONSTRAINED, constraint_of, free, set_constraint, was_unmarked
from ...linalg.precision import LOW_PRECISION, MASTER, FullPrecision, working_dtype
from ...manifolds import Manifold
from ...manifolds.layout import Layout, Shape, get_points, set_points_
from ...manifolds.records import (
    Record,
    deserialize,
    format_constraint,
    is_record_of,
    record_from_tensor,
    record_to_tensor,
    serialize,
)
from ...manifolds.shards import is_dtensor, shard_like, unsharded_like, whole
from ..options import describe_param
from .optimizer import Algorithm, Group, ManifoldOptimizer


def convert_state(optimizer: ManifoldOptimizer, group: Group) -> None:
    """Convert the state of a parameter group, in place, to the current constraints of its parameters."""
    for parameter in group["params"]:
        new = converted_state(optimizer, group, parameter)
        if new is not None:
            state = optimizer.state[parameter]
            state.clear()
            state.update(new)


@torch.no_grad()
def converted_state(optimizer: ManifoldOptimizer, group: Group, parameter: Tensor) -> dict[str, Any] | None:
    """Return the state of a parameter converted to its current constraint, as a new dictionary; None if unchanged.

    The ``constrained`` entry may have no record: earlier versions did not write one, and code that resets or averages
    all tensors of a state may overwrite it. The state of a marked parameter then belongs to its current constraint.
    """
    state, constraint = optimizer.state.get(parameter), constraint_of(parameter)
    if not state:
        return None
    check_owner(type(optimizer).__name__, group, parameter, state)
    new = serialize(constraint)
    old = record_from_tensor(state[CONSTRAINED]) if CONSTRAINED in state else None
    if CONSTRAINED in state and new is not None and (old is None or is_record_of(old, constraint)):
        return None if old == new else {**state, CONSTRAINED: record_to_tensor(new)}
    if CONSTRAINED not in state and new is None:
        return None
    if is_dtensor(parameter):
        return _converted_whole(optimizer, group, parameter, state)
    state = dict(state)
    if new is None:
        _to_torch_state(optimizer, group, parameter, state, old)
        return state
    check_shapes(optimizer, group, parameter, state, constraint if old is None else deserialize(old))
    if old is not None:
        _leave_frame(optimizer, group, parameter, state, old)
    _change_frame(state, optimizer._algorithm, parameter, new, back=False)
    state[CONSTRAINED] = record_to_tensor(new)
    return state


def _converted_whole(
    optimizer: ManifoldOptimizer, group: Group, parameter: Tensor, state: dict[str, Any]
) -> dict[str, Any] | None:
    """Return the converted state of a DTensor: gather parameter and state, convert, and shard again. A collective."""
    gathered, constraint = nn.Parameter(whole(parameter)), constraint_of(parameter)
    if constraint is not None:
        set_constraint(gathered, constraint)
    elif was_unmarked(parameter):
        free(gathered)
    optimizer.state[gathered] = {key: whole(x) if isinstance(x, Tensor) else x for key, x in state.items()}
    try:
        new = converted_state(optimizer, {**group, "params": [gathered]}, gathered)
    finally:
        del optimizer.state[gathered]
    if new is None:
        return None
    same = {key for key, x in new.items() if isinstance(x, Tensor) and x.shape == parameter.shape}
    return {key: shard_like(x, parameter) if key in same else x for key, x in new.items()}


def _leave_frame(
    optimizer: ManifoldOptimizer, group: Group, parameter: Tensor, state: dict[str, Any], old: Record
) -> None:
    """Convert moments to those of the Euclidean gradient; reset them with a warning where that is not possible."""
    constraint = deserialize(old)
    try:
        _change_frame(state, optimizer._algorithm, parameter, old, back=True)
    except ValueError as reason:
        _warn_of_reset(optimizer, group, parameter, reason)
        for key in optimizer._algorithm.state_keys:
            state.pop(key, None)
    for key in () if constraint is None else constraint.state_keys:
        state.pop(key, None)


def _warn_of_reset(optimizer: ManifoldOptimizer, group: Group, parameter: Tensor, reason: Exception) -> None:
    warnings.warn(
        f"{type(optimizer).__name__}: the moments of a parameter of shape {describe_param(group, parameter)}, whose "
        f"constraint has changed, cannot be converted, and start anew: {reason}",
        stacklevel=2,
    )


def _to_torch_state(
    optimizer: ManifoldOptimizer, group: Group, parameter: Tensor, state: dict[str, Any], old: Record | None
) -> None:
    """Convert the state of an unmarked parameter, in place, to the form and dtype of torch.optim.

    The moments are in the frame of the point that the parameter was. If it has no nearest point, they are reset.
    """
    try:
        if old is None:
            raise ValueError("the state does not say under which constraint it was held.")
        check_shapes(optimizer, group, parameter, state, deserialize(old))
        _change_frame(state, optimizer._algorithm, parameter, old, back=True)
    except (ValueError, RuntimeError) as reason:
        warnings.warn(
            f"{type(optimizer).__name__}: the moments of an unmarked parameter of shape "
            f"{describe_param(group, parameter)} cannot be converted to those of torch.optim, and start anew: {reason}",
            stacklevel=2,
        )
        for key in optimizer._algorithm.state_keys:
            if isinstance(state.pop(key, None), Tensor) and not isinstance(optimizer, torch.optim.SGD):
                state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        if "step" in state:
            state["step"] = torch.zeros_like(torch.as_tensor(state["step"]))
    known = None if old is None else deserialize(old)
    for key in (MASTER, *(() if known is None else known.state_keys)):
        state.pop(key, None)
    del state[CONSTRAINED]
    for key in optimizer._algorithm.state_keys:
        if isinstance(state.get(key), Tensor) and parameter.dtype in LOW_PRECISION:
            state[key] = state[key].to(parameter.dtype)


def check_owner(name: str, group: Group, parameter: Tensor, state: dict[str, Any]) -> None:
    """Raise a ValueError if a parameter that was never marked has the state of a marked one.

    This happens if code replaces a marked parameter and passes its state on to the new one.
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
    """Raise a RuntimeError unless the shapes of the state are those of ``constraint``, or of that of its record."""
    record = record_from_tensor(state.get(CONSTRAINED))
    constraint = (None if record is None else deserialize(record)) or constraint
    if constraint is None:
        return
    layouts, like = constraint.layouts(parameter.shape), unsharded_like(parameter)
    points = sum(_point_count(layout, like.detach()) for layout in layouts)
    frame = _own_frame(layouts[0], like, constraint)
    numbers = (1, points, points if frame is None else points * math.prod(frame))
    for key in optimizer._algorithm.state_keys:
        moment = state.get(key)
        if isinstance(moment, Tensor) and moment.shape != parameter.shape and moment.numel() not in numbers:
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


def _point_count(layout: Layout, parameter: Tensor) -> int:
    points = get_points(layout, parameter)
    return points.shape[: points.ndim - layout.point_ndim].numel()


def _change_frame(
    state: dict[str, Any], algorithm: Algorithm, parameter: Tensor, record: Record, *, back: bool
) -> None:
    """Replace moments by new tensors of the parameter's shape, converted by :meth:`Manifold.change_frame`.

    The frame is that of the point that the next step starts from: a value off the manifold is first replaced by its
    nearest point.
    """
    constraint = deserialize(record)
    if constraint is None:
        return
    if _own_frame(constraint.layouts(parameter.shape)[0], parameter, constraint) is not None:
        _change_to_own_frame(state, algorithm, parameter, constraint, back=back)
        return
    framed = {}
    for key in algorithm.state_keys:
        moment = state.get(key)
        if isinstance(moment, Tensor):
            reshaped = reshape_moment(moment, False, parameter, constraint)
            state[key] = reshaped if reshaped is not moment else moment.clone(memory_format=torch.preserve_format)
            if moment.shape == parameter.shape:
                framed[key] = state[key]
    for layout in constraint.layouts(parameter.shape):
        value = state.get(MASTER, parameter.detach()) if parameter.dtype in LOW_PRECISION else parameter.detach()
        if not constraint.has_frame(get_points(layout, value).shape):
            continue
        x = get_points(layout, value).to(working_dtype(value.dtype), copy=True)
        off, values = constraint.find_off_manifold(x)
        x[off] = values
        for key, moment in framed.items():
            points, is_mean_square = get_points(layout, moment).to(x), key in algorithm.mean_squares
            with FullPrecision(x.device.type):
                new = constraint.change_frame(x, points, mean_square=is_mean_square, back=back)
            set_points_(layout, moment, ..., new)


def _change_to_own_frame(
    state: dict[str, Any], algorithm: Algorithm, parameter: Tensor, constraint: Manifold, *, back: bool
) -> None:
    """Replace moments by those in coordinates that have a shape of their own, one matrix per point."""
    if back:
        raise ValueError(f"the moments of {constraint} do not determine those of the gradient.")
    (layout,) = constraint.layouts(parameter.shape)
    x = get_points(layout, parameter.detach()).to(working_dtype(parameter.dtype))
    for key in algorithm.state_keys:
        moment, is_mean_square = state.get(key), key in algorithm.mean_squares
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            with FullPrecision(x.device.type):
                new = constraint.change_frame(
                    x, get_points(layout, moment).to(x), mean_square=is_mean_square, back=False
                )
            state[key] = new.contiguous()


def reshape_moment(moment: Tensor | None, per_block: bool, parameter: Tensor, constraint: Manifold) -> Tensor:
    """Return a moment with one number per point, or with the shape of the parameter; zeros if it is None.

    A checkpoint has the other shape if it was saved with another ``second_moment`` or by torch.optim. The moment is
    then averaged over each point, or expanded.
    """
    layouts = constraint.layouts(parameter.shape)
    ones = [_first_entry(layout, parameter.detach()) for layout in layouts]
    count = sum(map(len, ones))
    frame = None if per_block else _own_frame(layouts[0], parameter, constraint)
    shape = torch.Size((count, *(ones[0].shape[1:] if frame is None else frame)))
    shape = parameter.shape if frame is None and not per_block else shape
    dtype = working_dtype(parameter.dtype)
    dtype = dtype.to_real() if per_block else dtype
    if moment is not None and moment.shape == shape:
        return moment.to(parameter.device, dtype)
    if moment is not None and per_block and moment.shape == parameter.shape:
        return torch.cat([_mean_per_point(layout, moment) for layout in layouts]).to(parameter.device, dtype)
    like = parameter if shape == parameter.shape else ones[0].new_empty(shape)
    value = torch.zeros_like(like, dtype=dtype, memory_format=torch.preserve_format)
    if moment is None:
        return value
    numbers = moment if moment.numel() == count else moment.mean().expand(count, *ones[0].shape[1:])
    if per_block:
        return value.copy_(numbers)
    if value.is_complex():
        numbers = torch.complex(numbers, numbers)  # the same for the real and the imaginary part
    if frame is not None:
        return value.copy_(numbers)
    value.fill_(numbers.mean().item())
    start = 0
    for layout, one in zip(layouts, ones, strict=True):
        set_points_(layout, value, ..., numbers[start : start + len(one)].to(value))
        start += len(one)
    return value


def _own_frame(layout: Layout, parameter: Tensor, constraint: Manifold) -> Shape | None:
    """Return the shape of the coordinates of a point; None if it is that of the point."""
    points = get_points(layout, parameter.detach())
    shape = points.shape[points.ndim - layout.point_ndim :]
    frame = constraint.frame_shape(shape)
    return None if frame == shape else frame


def _first_entry(layout: Layout, tensor: Tensor) -> Tensor:
    """Return the first entry of every point, ``(B, 1, ..)``."""
    points = get_points(layout, tensor)
    for dim in range(points.ndim - layout.point_ndim, points.ndim):
        points = points.narrow(dim, 0, 1)
    return points


def _mean_per_point(layout: Layout, tensor: Tensor) -> Tensor:
    """Return the mean of every point, ``(B, 1, ..)``; for complex points over real and imaginary parts."""
    if tensor.is_complex():
        tensor = (tensor.real + tensor.imag) / 2
    points = get_points(layout, tensor)
    dims = tuple(range(points.ndim - layout.point_ndim, points.ndim))
    return points.mean(dims, keepdim=True) if dims else points
