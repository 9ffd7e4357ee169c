"""One step: the closure, the unmarked parameters as torch steps them, the marked ones on their manifold.

The blocks of marked parameters walk, a bucket at a time,

    view or gather -> gradient -> direction -> step -> retraction -> back in place

and are written through their views only. Nothing on the way depends on a value where reading one would make the
host wait: on an accelerator, or in a graph that torch.compile traces or CUDA captures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import general, walk
from .blocks import point_norm, points_of, put_
from .buckets import Bucket
from .constraint import off_manifold
from .desk import Desk
from .options import Group, shape_in
from .plan import SCALED, Before, Plan, Rest, drop_plans, refuse
from .precision import MASTER, FullPrecision, warn_unless_full, without_autocast
from .products import host_can_branch
from .retractions import RETRACTIONS
from .rules import Rule
from .unmarked import Lists

Closure = Callable[[], Any]
Found = tuple[Bucket, list[Tensor], Tensor, Tensor]  # tensors, which of their points, and the values
Prepared = list[tuple[Group, Lists, bool]]

_FAR = 0.1  # distance from the manifold above which a value is no matter of rounding, and worth a warning


def step(
    optimizer: Any,
    closure: Closure | None,
    lists_of: Callable[[Any, Group], Lists],
    step_unmarked: Callable[[Any, Group, Lists, bool], None],
    step_rests: Callable[[Any, Group, list[Rest]], None],
    rule_of: Callable[[Group, Bucket], Rule],
) -> Any:
    """One step of every group: the closure, then the unmarked parameters, then the marked ones.

    ``lists_of`` makes the empty lists that torch's ``_init_group`` fills, ``step_unmarked`` is torch's own step of
    what they have been filled with, ``step_rests`` of rows in no block, and ``rule_of`` gives a bucket's direction,
    ``(w, g, moments, room, length=..., sound=...) -> v``.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    compiling = torch.compiler.is_compiling()
    if compiling:
        warn_unless_full()
    prepared = (_ready if compiling else _ready_or_as_before)(optimizer, lists_of)
    precision = without_autocast if compiling else FullPrecision
    plans: list[Plan] = optimizer._plans
    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        for group, lists, flag in prepared:
            if lists[0]:
                step_unmarked(optimizer, group, lists, flag)
    decoupled = isinstance(optimizer, torch.optim.AdamW)
    desk = Desk(optimizer._room, optimizer._tally, decoupled, *(getattr(optimizer, key, None) for key in SCALED))
    if desk.found_inf is not None and host_can_branch(desk.found_inf) and float(desk.found_inf) != 0:
        return loss
    for group, plan in zip(optimizer.param_groups, plans, strict=True):
        if plan.rests:
            with torch.no_grad():
                step_rests(optimizer, group, plan.rests)
    for group, plan in zip(optimizer.param_groups, plans, strict=True):
        for bucket in plan.buckets:
            with torch.no_grad(), precision(bucket.parameters[0].device.type):
                assert bucket.steps is not None
                bucket.count(1 if desk.found_inf is None else 1 - desk.found_inf.to(bucket.steps))
                (walk.move if bucket.stiefel else general.move)(bucket, group, rule_of(group, bucket), desk)
    if not compiling:
        for plan in plans:
            for bucket in plan.buckets:
                bucket.remember_values()
    return loss


def _ready(optimizer: Any, lists_of: Callable[[Any, Group], Lists]) -> Prepared:
    """Of every group what its unmarked parameters need, and its plan made.

    torch.compile knows _init_group by its name, and runs it outside of the graph.
    """
    prepared = []
    for group in optimizer.param_groups:
        lists = lists_of(optimizer, group)
        prepared.append((group, lists, optimizer._init_group(group, *lists)))
    return prepared


def _ready_or_as_before(optimizer: Any, lists_of: Callable[[Any, Group], Lists]) -> Prepared:
    """The same, with everything that can be refused or fail before a step; where it does, nothing has changed."""
    drop_plans(optimizer)
    refuse(optimizer)
    before = optimizer._before = Before(optimizer)
    try:
        prepared = _ready(optimizer, lists_of)
        _restore(optimizer)
    except BaseException:
        before.bring_back()
        raise
    finally:
        optimizer._before = None
    return prepared


@torch.no_grad()
def _restore(optimizer: Any) -> None:
    """Put parameters that were written to since the last step, by load_state_dict say, back on their manifold.

    An inexact scheme leaves its parameters near the manifold, not on it: what it may have left itself stays.
    """
    found: list[Found] = []
    warned: list[str] = []
    for plan, group in zip(optimizer._plans, optimizer.param_groups, strict=True):
        inexact = not RETRACTIONS[group["retraction"]].exact
        for bucket in plan.buckets:
            written = bucket.overwritten()
            if bucket.low:  # what is held in float32 shows even what has been written through .data
                others = set(map(id, written))
                written = [p for p in bucket.parameters if id(p) in others or _shows(optimizer, p)]
            if not written:
                continue
            slack = 1.0 if inexact and bucket.stiefel else 0.0
            try:
                seen, far = _looked_at(optimizer, group, bucket, written, slack)
            except ValueError:
                for parameter in written:
                    _check_written(optimizer, group, bucket, parameter, slack)
                raise
            found += seen
            warned += far
    for message in warned:  # only now: nothing is put back where a step is refused
        warnings.warn(message, stacklevel=7)  # the caller of opt.step(), past its hooks and decorators
    for bucket, tensors, which, values in found:
        counts = [int(some.sum()) for some in which.split(bucket.each)]  # type: ignore[no-untyped-call]
        for tensor, some, nearest in zip(tensors, which.split(bucket.each), values.split(counts), strict=True):  # type: ignore[no-untyped-call]
            if bool(some.any()):
                put_(bucket.part, tensor, some, nearest.to(tensor.dtype))


def _check_written(optimizer: Any, group: Group, bucket: Bucket, parameter: Tensor, slack: float) -> None:
    """Raise a ValueError that names the parameter and its block, if its value has no nearest point."""
    try:
        off_manifold(parameter, bucket.constraint, slack)
    except ValueError as refusal:
        raise ValueError(
            f"{type(optimizer).__name__}: a marked parameter of shape {shape_in(group, parameter)} has been written "
            f"to: {refusal}"
        ) from None


def _shows(optimizer: Any, parameter: Tensor) -> bool:
    """Whether what is held in float32 shows that a parameter has been written to, or that it has not moved yet."""
    master = optimizer.state[parameter].get(MASTER)
    return master is not None and host_can_branch(master) and not torch.equal(parameter, master.to(parameter.dtype))


def _looked_at(
    optimizer: Any, group: Group, bucket: Bucket, written: list[Tensor], slack: float
) -> tuple[list[Found], list[str]]:
    """Return what to write to members that were written to, and to their float32 masters, and what to warn of."""
    members = [p.detach() for p in written]
    points = torch.cat([points_of(bucket.part, p) for p in members])
    if not bucket.low:
        off, values = bucket.constraint.off(points, slack)
        return [(bucket, members, off, values)], _far_warnings(group, bucket, written, off, points[off] - values)
    masters = [optimizer.state[p][MASTER] for p in written]
    overwritten, off, values = _overwritten(bucket, points, masters)
    if not bool(overwritten.any() | off.any()):
        return [], []
    found = [(bucket, masters, overwritten, values[overwritten]), (bucket, members, off, values[off])]
    return found, _far_warnings(group, bucket, written, off, points[off] - values[off])


def _overwritten(bucket: Bucket, points: Tensor, masters: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Which points are not the rounding of what is held in float32, which are off, and what to hold.

    That is the nearest value, as it has been from the beginning for those that have not moved yet.
    """
    values = torch.cat([points_of(bucket.part, master) for master in masters])
    dims = bucket.part.dims
    other = values.to(points.dtype) != points
    other = other.flatten(other.ndim - dims).any(-1) if dims else other
    off = other.clone()
    if bool(other.any()):
        now = points[other].float()
        out, nearest = bucket.constraint.off(now)
        now[out] = nearest
        values[other] = now
        off[other] = ~(bucket.constraint.error(points[other]) <= bucket.constraint.rounding(points))
    return other, off, values


def _far_warnings(group: Group, bucket: Bucket, written: list[Tensor], off: Tensor, gap: Tensor) -> list[str]:
    """Return a warning of the point that is farthest off, if it is far; ``gap`` is how far those ``off`` are."""
    distances = point_norm(gap, bucket.part.dims).flatten()
    if not len(gap) or float(distances.max()) <= _FAR:
        return []
    parameter = written[int(off.nonzero()[distances.argmax(), 0]) // bucket.each]
    return [
        f"A block of shape {tuple(bucket.point)} of a marked parameter of shape {shape_in(group, parameter)} was "
        f"{float(distances.max()):.2g} away from its manifold, {bucket.constraint}, changed outside the optimizer "
        "since it was marked or last stepped (load_state_dict?). It was put back to the nearest value, as "
        "project_(model) does without a warning."
    ]


def check_capture(optimizer: Any) -> None:
    """Torch's own warning where a step that is not capturable is about to be captured."""
    newer = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (newer or optimizer._cuda_graph_capture_health_check)()
