"""One step: the closure, the unmarked parameters as torch steps them, the marked ones on their manifold.

The blocks of marked parameters are stepped, one bucket at a time,

    view or gather -> gradient -> direction -> step -> retraction -> back in place

and are written through their views only. Nothing on the way depends on a value where reading one would make the
host wait: on an accelerator, or in a graph that torch.compile traces or CUDA captures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...constraints import tag as constraint
from ...constraints.tag import off_manifold
from ...linalg.precision import MASTER, full_precision, is_full_precision, warn_unless_full, without_autocast
from ...linalg.products import host_can_branch
from ...linalg.workspace import Pool
from ...manifolds.layout import point_norm, points_of, put_
from ...stiefel.retractions import RETRACTIONS
from ..options import Group, shape_in
from ..unconstrained import Lists
from . import general
from .bucket import Bucket
from .context import StepContext
from .plan import SCALED, Plan, Rest, StateBackup, Values, ask_for_memory, check_gradients_finite, make_plan, value_of
from .update import update_bucket

Closure = Callable[[], Any]
Found = tuple[Bucket, list[Tensor], Tensor, Tensor]  # tensors, which of their points, and the values
Prepared = list[tuple[Group, Lists, bool]]

_FAR = 0.1  # distance from the manifold above which a value is no matter of rounding, and worth a warning


class Algorithm(NamedTuple):
    """What distinguishes one optimizer from another in a step.

    Attributes:
        init_group: torch's method that collects the unmarked parameters of a group.
        moments: gives the keys of the moments that options ask for, and of those with one number per block.
        lists: makes the empty lists that torch's method fills.
        step_unmarked: torch's own step of what they have been filled with.
        step_rests: that of rows outside every block.
        rule: gives the direction of a bucket.
        decoupled: whether weight decay is decoupled, unless a group says otherwise.
    """

    init_group: Callable[..., bool]
    moments: Callable[[Group], tuple[list[str], list[str]]]
    lists: Callable[[Any, Group], Lists]
    step_unmarked: Callable[[Any, Group, Lists, bool], None]
    step_rests: Callable[[Any, Group, list[Rest]], None]
    rule: Callable[[Group, Bucket], Any]
    decoupled: bool


def step(optimizer: Any, closure: Closure | None) -> Any:
    """Take one step of every group: the closure, then the unmarked parameters, then the marked ones."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    if torch.compiler.is_compiling():
        _step_traced(optimizer)
        return loss
    plan = optimizer._plan
    if plan is None or not plan.is_current(optimizer):
        prepared = _plan_anew(optimizer)
        plan = optimizer._plan
    else:
        prepared = _collect(optimizer, plan)
    _step_unmarked(optimizer, prepared)
    if plan.active:
        grad_enabled = torch.is_grad_enabled()
        torch.set_grad_enabled(False)
        try:
            if is_full_precision(plan.devices):
                _step_marked(optimizer, plan, plan.pool)
            else:
                with full_precision(plan.devices):
                    _step_marked(optimizer, plan, plan.pool)
        finally:
            torch.set_grad_enabled(grad_enabled)
        plan.remember_values()
    return loss


def _step_traced(optimizer: Any) -> None:
    """Take a step in a graph that torch.compile traces. It knows _init_group by name, and runs it outside the graph."""
    warn_unless_full()
    assert constraint.marks_made  # a graph that depends on it is compiled anew where a mark is made later
    prepared = []
    for group in optimizer.param_groups:
        lists = optimizer._algorithm.lists(optimizer, group)
        prepared.append((group, lists, optimizer._init_group(group, *lists)))
    _step_unmarked(optimizer, prepared)
    plan = optimizer._plan
    if plan.active:
        with torch.no_grad(), without_autocast(plan.active[0].device.type):
            _step_marked(optimizer, plan, None)


def _step_unmarked(optimizer: Any, prepared: Prepared) -> None:
    for group, lists, flag in prepared:
        if lists[0]:
            with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
                optimizer._algorithm.step_unmarked(optimizer, group, lists, flag)


def _step_marked(optimizer: Any, plan: Plan, pool: Pool | None) -> None:
    algorithm = optimizer._algorithm
    scale, overflow = getattr(optimizer, SCALED[0], None), getattr(optimizer, SCALED[1], None)
    if overflow is not None and host_can_branch(overflow) and float(overflow) != 0:
        return
    context = StepContext(pool, optimizer._tally, algorithm.decoupled, scale, overflow)
    groups = optimizer.param_groups
    for position, rests in plan.free_rows:
        algorithm.step_rests(optimizer, groups[position], rests)
    for position, bucket in plan.work:
        group = groups[position]
        bucket.increment_step(1 if overflow is None else 1 - overflow.to(bucket.steps))
        rule = algorithm.rule(group, bucket)
        if bucket.stiefel:
            update_bucket(bucket, group, rule, context)
        else:
            general.move(bucket, group, rule, context)


def _collect(optimizer: Any, plan: Plan) -> Prepared:
    """Return what the unmarked parameters need, where the plan of the marked ones still holds.

    All that can be refused or fail before a step is done here and in :func:`_plan_anew`, so that nothing has changed.
    """
    overwritten = plan.is_overwritten()
    if not (overwritten or plan.needs_care or plan.unmarked):
        return []
    backup = StateBackup(optimizer, entries=False)
    try:
        if plan.raises:
            check_gradients_finite(optimizer)
        if overwritten or plan.low:
            _restore(optimizer, plan, plan.values())
        if plan.on_accelerator:
            ask_for_memory(optimizer, plan)
        return _init_groups(optimizer, plan)
    except BaseException:
        backup.restore()
        raise


def _plan_anew(optimizer: Any) -> Prepared:
    """Return what the unmarked parameters need, and plan the marked ones anew."""
    backup = StateBackup(optimizer, entries=True)
    try:
        plan = make_plan(optimizer)
        ask_for_memory(optimizer, plan)
        prepared = _init_groups(optimizer, plan)
        _restore(optimizer, plan, optimizer._values)
    except BaseException:
        backup.restore()
        raise
    return prepared


def _init_groups(optimizer: Any, plan: Plan) -> Prepared:
    """Let torch collect the unmarked parameters of every group."""
    prepared = []
    for position, unmarked in plan.unmarked:
        group = optimizer.param_groups[position]
        lists = optimizer._algorithm.lists(optimizer, group)
        members = group if unmarked is None else {**group, "params": unmarked}
        prepared.append((group, lists, optimizer._algorithm.init_group(optimizer, members, *lists)))
    return prepared


@torch.no_grad()
def _restore(optimizer: Any, plan: Plan, seen: Values) -> None:
    """Put parameters that were written to since the last step, by load_state_dict say, back on their manifold.

    Inexact retractions end near the manifold. An error of the size that they leave is not repaired.
    """
    found: list[Found] = []
    warned: list[str] = []
    for position, bucket in plan.work:
        group = optimizer.param_groups[position]
        written = [p for p in bucket.parameters if value_of(p) != seen.get(id(p))]
        if bucket.low:  # what is held in float32 shows even what has been written through .data
            others = set(map(id, written))
            written = [p for p in bucket.parameters if id(p) in others or _shows(optimizer, p)]
        if not written:
            continue
        slack = 1.0 if bucket.stiefel and not RETRACTIONS[group["retraction"]].exact else 0.0
        try:
            off, far = _looked_at(optimizer, bucket, written, slack)
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
                put_(bucket.part, tensor, some, nearest.to(tensor.dtype))


def _label(optimizer: Any, parameter: Tensor) -> str:
    """Return the shape of a parameter, and its name in its own group if it has one, for a message."""
    group = next(group for group in optimizer.param_groups if any(p is parameter for p in group["params"]))
    return shape_in(group, parameter)


def _check_written(optimizer: Any, bucket: Bucket, parameter: Tensor, slack: float) -> None:
    """Raise a ValueError that names the parameter and its block, if its value has no nearest point."""
    try:
        off_manifold(parameter, bucket.constraint, slack)
    except ValueError as refusal:
        raise ValueError(
            f"{type(optimizer).__name__}: a marked parameter of shape {_label(optimizer, parameter)} has been "
            f"written to: {refusal}"
        ) from None


def _shows(optimizer: Any, parameter: Tensor) -> bool:
    """Whether what is held in float32 shows that a parameter has been written to, or that it has not moved yet."""
    master = optimizer.state[parameter].get(MASTER)
    return master is not None and host_can_branch(master) and not torch.equal(parameter, master.to(parameter.dtype))


def _looked_at(optimizer: Any, bucket: Bucket, written: list[Tensor], slack: float) -> tuple[list[Found], list[str]]:
    """Return what to write to members that were written to, and to their float32 masters, and what to warn of."""
    members = [p.detach() for p in written]
    points = torch.cat([points_of(bucket.part, p) for p in members])
    if not bucket.low:
        off, values = bucket.constraint.off(points, slack)
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


def _far_warnings(optimizer: Any, bucket: Bucket, written: list[Tensor], off: Tensor, gap: Tensor) -> list[str]:
    """Return a warning of the point that is farthest off, if it is far; ``gap`` is how far those ``off`` are."""
    distances = point_norm(gap, bucket.part.dims).flatten()
    if not len(gap) or float(distances.max()) <= _FAR:
        return []
    parameter = written[int(off.nonzero()[distances.argmax(), 0]) // bucket.each]
    return [
        f"A block of shape {tuple(bucket.point)} of a marked parameter of shape {_label(optimizer, parameter)} was "
        f"{float(distances.max()):.2g} away from its manifold, {bucket.constraint}, changed outside the optimizer "
        "since it was marked or last stepped (load_state_dict?). It was put back to the nearest value, as "
        "project_(model) does without a warning."
    ]


def check_capture(optimizer: Any) -> None:
    """Torch's own warning where a step that is not capturable is about to be captured."""
    newer = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (newer or optimizer._cuda_graph_capture_health_check)()
