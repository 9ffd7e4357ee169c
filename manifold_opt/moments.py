"""The moments of marked parameters: created, taken over from what the optimizer's state holds, shown under its keys.

Those of square blocks are held in the frame of W (direction.py); all others as torch holds them. The optimizer knows
under which constraint each parameter's state is held, and records it in ``group["constraints"]``, as
``(position, blocks, dim, gain)`` each, so that a checkpoint of torch's own, or of a parameter that has been marked or
unmarked since, is converted when it is met.
"""

from __future__ import annotations

from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .buckets import Bucket
from .constraint import Orthogonal, constraint_of, off_blocks
from .direction import from_frame, to_frame
from .precision import FullPrecision

Group = dict[str, Any]


def hold(optimizer: Optimizer, group: Group, bucket: Bucket, keys: list[str], scalars: list[str]) -> None:
    """Give a bucket its moments: those its members have, zeros for those they lack.

    ``keys`` are those of all moments, ``scalars`` of those that hold one number a block, ``(blocks, 1, 1)`` a member.
    """
    first = bucket.parameters[0]
    for key in keys:
        present = [
            _shaped(optimizer.state[p].get(key), key in scalars, p, bucket.constraint) for p in bucket.parameters
        ]
        if not bucket.gathered:
            shown = [present[0]]
            bucket.moments[key] = present[0] if key in scalars else bucket.constraint.view(present[0])
        elif key in scalars:
            storage = torch.cat(present)
            shown = list(storage.split(bucket.constraint.blocks))  # type: ignore[no-untyped-call]
            bucket.moments[key] = storage
        else:
            storage = torch.cat([moment.reshape(len(moment), -1) for moment in present])
            shown = bucket.split(storage)
            bucket.moments[key] = bucket.wide(storage)
        bucket.shown[key] = shown
        for parameter, moment in zip(bucket.parameters, shown, strict=True):
            optimizer.state[parameter][key] = moment
    # torch's Adam counts on the host unless it is capturable; its SGD does not count.
    device = first.device if group.get("capturable", True) else torch.device("cpu")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=device)
    counts = [torch.as_tensor(optimizer.state[p].get("step", zero)).to(zero) for p in bucket.parameters]
    bucket.steps = torch.stack(counts)
    bucket.shown["step"] = list(bucket.steps.unbind())
    for parameter, count in zip(bucket.parameters, bucket.shown["step"], strict=True):
        optimizer.state[parameter]["step"] = count


def still_shown(optimizer: Optimizer, bucket: Bucket) -> bool:
    """Whether the members' state is what the bucket works on: load_state_dict and users may have replaced it."""
    states = [optimizer.state[p] for p in bucket.parameters]
    try:
        return all(all(map(is_, map(itemgetter(key), states), shown)) for key, shown in bucket.shown.items())
    except KeyError:
        return False


@torch.no_grad()
def convert(optimizer: Any, group: Group) -> None:
    """Bring the state of a group from the constraints that it is held under to those of today, and record them."""
    held: dict[Tensor, Orthogonal] = optimizer._held
    for parameter in group["params"]:
        old, new = held.get(parameter), constraint_of(parameter)
        if old == new:
            continue
        state = optimizer.state.get(parameter)
        if state and old is not None:
            _change(state, parameter, old, from_frame)
        if state and new is not None:
            _change(state, parameter, new, to_frame)
        if new is None:
            del held[parameter]
        else:
            held[parameter] = new
    marked = ((i, constraint) for i, p in enumerate(group["params"]) if (constraint := held.get(p)) is not None)
    group["constraints"] = tuple((i, c.blocks, c.dim, c.gain) for i, c in marked)


def check_recorded(optimizer: Optimizer, groups: list[Group]) -> None:
    """Raise a ValueError unless the parameters are marked as those were whose state is recorded in the groups.

    In a checkpoint, that is: a copy of an optimizer knows what its state is, whatever has been marked since.
    """
    if not hasattr(optimizer, "param_groups"):
        return
    name = type(optimizer).__name__
    for index, group in enumerate(groups):
        for position, blocks, dim, gain in group.get("constraints", ()):
            parameter, then = group["params"][position], Orthogonal(blocks, dim, gain)
            now = constraint_of(parameter)
            if now != then:
                label = f" ({group['param_names'][position]})" if "param_names" in group else ""
                raise ValueError(
                    f"{name}: the checkpoint was written with parameter {position} of group {index}{label}, shape "
                    f"{tuple(parameter.shape)}, marked as {then}; here it is {'not marked' if now is None else now}. "
                    "Mark it as it was before loading; it can be unmarked, or marked otherwise, afterwards."
                )


def recorded(groups: list[Group]) -> dict[Tensor, Orthogonal]:
    """The constraints that state is held under, as the groups of a checkpoint record them."""
    return {
        group["params"][position]: Orthogonal(blocks, dim, gain)
        for group in groups
        for position, blocks, dim, gain in group.get("constraints", ())
    }


def leave(optimizer: Optimizer, bucket: Bucket, staying: set[int]) -> None:
    """Take the state of members that a bucket loses out of the storage it shares."""
    for index, parameter in enumerate(bucket.parameters):
        state = optimizer.state.get(parameter, {})
        for key, shown in bucket.shown.items():
            if bucket.gathered and id(parameter) not in staying and state.get(key) is shown[index]:
                state[key] = shown[index].clone()


def _change(state: dict[str, Any], parameter: Tensor, constraint: Orthogonal, change: Any) -> None:
    """Every moment of one parameter into the frame of its square blocks, or out of it, as tensors of its shape.

    The frame is that of the point that the next step starts from, where a value just loaded is still to be put back.
    """
    w = constraint.view(parameter.detach()).clone()
    off, values = off_blocks(w, constraint.gain)
    w[off] = values
    w = w / constraint.gain
    for key, moment in state.items():
        if key != "step" and isinstance(moment, Tensor):
            held = _shaped(moment, False, parameter, constraint)
            state[key] = held if held is not moment else moment.clone(memory_format=torch.preserve_format)
            if w.shape[-2] == w.shape[-1] and moment.shape == parameter.shape:
                blocks = constraint.view(state[key])
                with FullPrecision(w.device.type):
                    blocks.copy_(change(w, key, blocks.to(w)))


def _shaped(moment: Tensor | None, scalar: bool, parameter: Tensor, constraint: Orthogonal) -> Tensor:
    """A moment as its rule holds it, ``(blocks, 1, 1)`` or like the parameter: new, as it is, or from the other rule's.

    The other shape is what a checkpoint brings that was written with another ``second_moment``, or by torch itself.
    """
    blocks = constraint.view(parameter.detach())
    one = blocks[:, :1, :1]
    shape = one.shape if scalar else parameter.shape
    if moment is not None and moment.shape == shape:
        return moment.to(parameter)
    if moment is not None and scalar and moment.shape == parameter.shape:
        return constraint.view(moment).mean((-2, -1), keepdim=True)
    value = torch.zeros_like(one if scalar else parameter, memory_format=torch.preserve_format)
    if moment is not None:
        if moment.numel() > 1 and moment.shape[1:] != one.shape[1:]:
            raise RuntimeError(
                f"a marked parameter has shape {tuple(parameter.shape)}, what the optimizer holds for it "
                f"{tuple(moment.shape)}. After changing the shape of a parameter, del opt.state[param]."
            )
        per_block = moment if moment.shape == one.shape else moment.mean()
        (value if scalar else constraint.view(value)).copy_(per_block)
    return value
