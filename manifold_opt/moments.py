"""The moments of marked parameters: created, taken over from what the optimizer's state holds, shown under its keys.

Those of square blocks are held in the frame of W (direction.py); all others as torch holds them. A state that is held
under a constraint says so itself, by one more entry, so that one of torch's own is known wherever it comes from, and
converted when it is met. Under which constraint is what the optimizer knows, and records in ``group["constraints"]``,
``(position, name, ...)`` each.
"""

from __future__ import annotations

from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .blocks import Part, can_be_viewed, points_of, put_
from .buckets import Bucket
from .constraint import CONSTRAINED, Record, constraint_of, described, off_manifold, put_back_, recalled, record_of
from .direction import from_frame, to_frame
from .manifolds import Manifold, Orthogonal
from .precision import LOW, MASTER, FullPrecision, working_dtype

Group = dict[str, Any]
NO_MOMENTS = ("step", MASTER, CONSTRAINED)


def hold(optimizer: Optimizer, group: Group, bucket: Bucket, keys: list[str], scalars: list[str]) -> None:
    """Give a bucket its moments: those its members have, zeros for those they lack.

    ``keys`` are those of all moments, ``scalars`` of those that hold one number a block, ``(blocks, 1, 1)`` a member.
    """
    for key in keys:
        present = [
            _shaped(optimizer.state[p].get(key), key in scalars, p, bucket.constraint) for p in bucket.parameters
        ]
        shown, held = _laid_out(bucket, present, key in scalars)
        if held is not None:
            bucket.moments[key] = held
        bucket.shown[key] = shown
        for parameter, moment in zip(bucket.parameters, shown, strict=True):
            optimizer.state[parameter][key] = moment
    _hold_master(optimizer, bucket)
    _hold_count(optimizer, group, bucket)
    one = torch.ones((), device=bucket.parameters[0].device)
    for parameter in bucket.parameters:
        optimizer.state[parameter].setdefault(CONSTRAINED, one)


def _hold_master(optimizer: Optimizer, bucket: Bucket) -> None:
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
            put_back_(master, off_manifold(master, bucket.constraint))
        masters.append(master.to(parameter.device, torch.float32))
    masters, bucket.master = _laid_out(bucket, masters, False)
    bucket.shown[MASTER] = masters
    for parameter, master in zip(bucket.parameters, masters, strict=True):
        optimizer.state[parameter][MASTER] = master


def _laid_out(bucket: Bucket, present: list[Tensor], scalar: bool) -> tuple[list[Tensor], Tensor | None]:
    """What the members' state shows of a moment, and what the rule works on: None where each step gathers that."""
    if bucket.gathered and not bucket.carried:
        storage = torch.cat(present) if scalar else bucket.storage(present)
        if scalar:
            return list(storage.split(bucket.each)), storage  # type: ignore[no-untyped-call]
        return bucket.split(storage), bucket.part.points(storage)
    if not scalar:
        present = [_lying(bucket.part, moment, p) for moment, p in zip(present, bucket.parameters, strict=True)]
    if bucket.carried:
        return present, None
    own = present[0][bucket.before : bucket.before + bucket.each] if scalar else bucket.part.view(present[0])
    return present, own


def _lying(part: Part, moment: Tensor, parameter: Tensor) -> Tensor:
    """A moment that can be viewed as points, as its parameter can: a loaded one lies as where it came from."""
    if can_be_viewed(part, moment):
        return moment
    return torch.empty_like(parameter, dtype=moment.dtype).copy_(moment)


def _hold_count(optimizer: Optimizer, group: Group, bucket: Bucket) -> None:
    # torch's Adam counts on the host unless it is capturable; its SGD does not count.
    device = bucket.parameters[0].device if group.get("capturable", True) else torch.device("cpu")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    zero = torch.zeros((), dtype=dtype, device=device)
    counts = [torch.as_tensor(optimizer.state[p].get("step", zero)).to(zero) for p in bucket.parameters]
    bucket.steps = torch.stack(counts)
    if bucket.before:
        return
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
    held: dict[Tensor, Record] = optimizer._held
    for parameter in group["params"]:
        state, new = optimizer.state.get(parameter), record_of(constraint_of(parameter))
        # Of a state that says nothing of under which one it is as if it were the one of today.
        old = held.get(parameter, new) if state and CONSTRAINED in state else None
        if new is not None:
            held[parameter] = new
        if old == new:
            continue
        if state and old is not None:
            _change(state, parameter, old, from_frame)
        if state and new is not None:
            _change(state, parameter, new, to_frame)
            state[CONSTRAINED] = torch.ones((), device=parameter.device)  # whether it is to move in this step or not
        if new is None:
            _as_torch_holds_it(state or {}, parameter)
            held.pop(parameter, None)
    note(optimizer, [group])


def note(optimizer: Any, groups: list[Group]) -> None:
    """Record in groups under which constraint the state of every member is held."""
    held = optimizer._held
    for group in groups:
        group["constraints"] = tuple((i, *held[p]) for i, p in enumerate(group["params"]) if p in held)


def check_recorded(optimizer: Optimizer, loaded: dict[str, Any]) -> None:
    """Raise a ValueError unless the parameters are marked as those were whose state is recorded in the groups.

    In a checkpoint, that is: a copy of an optimizer knows what its state is, whatever has been marked since.
    """
    if not hasattr(optimizer, "param_groups"):
        return
    name = type(optimizer).__name__
    for index, group in enumerate(loaded["param_groups"]):
        for position, *record in group.get("constraints", ()):
            parameter, then = group["params"][position], _tuples(record)
            now = constraint_of(parameter)
            if then != record_of(now):
                label = f" ({group['param_names'][position]})" if "param_names" in group else ""
                raise ValueError(
                    f"{name}: the checkpoint was written with parameter {position} of group {index}{label}, shape "
                    f"{tuple(parameter.shape)}, marked as {described(then)}; here it is "
                    f"{'not marked' if now is None else now}. "
                    "Mark it as it was before loading; it can be unmarked, or marked otherwise, afterwards."
                )
    for parameter, state in loaded["state"].items():
        if CONSTRAINED in state and constraint_of(parameter) is None:
            raise ValueError(
                f"{name}: the state of a parameter of shape {tuple(parameter.shape)} is held under a constraint, which "
                "the groups beside it do not name; here it is not marked. Mark it as it was before loading."
            )


def recorded(groups: list[Group]) -> dict[Tensor, Record]:
    """The constraints that state is held under, as the groups of a checkpoint record them."""
    return {
        group["params"][position]: _tuples(record)
        for group in groups
        for position, *record in group.get("constraints", ())
    }


def _tuples(record: Any) -> Any:
    """A record whose tuples have become lists on a way that knows none, like JSON's."""
    return tuple(map(_tuples, record)) if isinstance(record, (list, tuple)) else record


def leave(optimizer: Optimizer, bucket: Bucket, staying: set[int]) -> None:
    """Take the state of members that a bucket loses out of the storage it shares."""
    for index, parameter in enumerate(bucket.parameters):
        state = optimizer.state.get(parameter, {})
        for key, shown in bucket.shown.items():
            if bucket.gathered and id(parameter) not in staying and state.get(key) is shown[index]:
                state[key] = shown[index].clone()


def _change(state: dict[str, Any], parameter: Tensor, record: Record, change: Any) -> None:
    """Every moment of one parameter into the frame of its square blocks, or out of it, as tensors of its shape.

    The frame is that of the point that the next step starts from, where a value just loaded is still to be put back.
    """
    constraint = recalled(record)
    if constraint is None:
        return
    framed = {}
    for key, moment in state.items():
        if key not in NO_MOMENTS and isinstance(moment, Tensor):
            held = _shaped(moment, False, parameter, constraint)
            state[key] = held if held is not moment else moment.clone(memory_format=torch.preserve_format)
            if moment.shape == parameter.shape:
                framed[key] = state[key]
    if not isinstance(constraint, Orthogonal):
        return
    for part in constraint.parts(parameter.shape):
        value = state.get(MASTER, parameter.detach())
        w = points_of(part, value).to(working_dtype(value.dtype), copy=True)
        if w.shape[-2] != w.shape[-1]:
            continue
        off, values = constraint.off(w)
        w[off] = values
        w = w / constraint.gain
        for key, moment in framed.items():
            with FullPrecision(w.device.type):
                put_(part, moment, ..., change(w, key, points_of(part, moment).to(w)))


def _as_torch_holds_it(state: dict[str, Any], parameter: Tensor) -> None:
    """Moments of a parameter that is marked no more in its own dtype, and nothing in float32 beside it."""
    state.pop(MASTER, None)
    state.pop(CONSTRAINED, None)
    for key, value in state.items():
        if key != "step" and isinstance(value, Tensor) and parameter.dtype in LOW:
            state[key] = value.to(parameter.dtype)


def _shaped(moment: Tensor | None, scalar: bool, parameter: Tensor, constraint: Manifold) -> Tensor:
    """A moment as its rule holds it, one number a point or like the parameter: new, as it is, or from the other rule's.

    The other shape is what a checkpoint brings that was written with another ``second_moment``, or by torch itself.
    """
    parts = constraint.parts(parameter.shape)
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
    if moment.numel() > 1 and moment.shape[1:] != ones[0].shape[1:]:
        raise RuntimeError(
            f"a marked parameter has shape {tuple(parameter.shape)}, what the optimizer holds for it "
            f"{tuple(moment.shape)}. After changing the shape of a parameter, del opt.state[param]."
        )
    a_point = moment if moment.numel() == count else moment.mean().expand(count, *ones[0].shape[1:])
    if scalar:
        return value.copy_(a_point)
    if value.is_complex():
        a_point = torch.complex(a_point, a_point)  # of either part of an entry
    value.fill_(a_point.mean().item())
    start = 0
    for part, one in zip(parts, ones, strict=True):
        put_(part, value, ..., a_point[start : start + len(one)].to(value))
        start += len(one)
    return value


def _one(part: Part, tensor: Tensor) -> Tensor:
    """One number of each point of a part, ``(B, 1, ..)``."""
    points = points_of(part, tensor)
    for dim in range(points.ndim - part.dims, points.ndim):
        points = points.narrow(dim, 0, 1)
    return points


def _mean(part: Part, tensor: Tensor) -> Tensor:
    """The mean of each point of a part, ``(B, 1, ..)``, over the real and imaginary parts of complex ones."""
    if tensor.is_complex():
        tensor = (tensor.real + tensor.imag) / 2
    points = points_of(part, tensor)
    dims = tuple(range(points.ndim - part.dims, points.ndim))
    return points.mean(dims, keepdim=True) if dims else points
