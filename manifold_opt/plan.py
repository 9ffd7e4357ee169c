"""Which parameters of a group move together, found anew only when something about them has changed."""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .buckets import Bucket, fill
from .constraint import CONSTRAINED, constraint_of
from .manifolds import Manifold
from .moments import check_shapes, convert, hold, leave, still_shown
from .options import (
    Group,
    check_finite,
    check_gradients,
    check_marked,
    check_options,
    check_sharded,
    forget_marks,
    remember_marks,
)
from .retractions import RETRACTIONS
from .room import Room
from .survival import remember_optimizer
from .tally import Tally

SCALED = ("grad_scale", "found_inf")  # what a GradScaler sets on a fused optimizer for the time of a step
Keys = tuple[list[str], list[str]]
Facts = tuple[list[Any], ...]


@dataclass
class Rest:
    """Rows or columns of a marked parameter that are in none of its points: unmarked, for torch to step.

    Attributes:
        parameter: whose they are.
        dim, start, length: where.
        fresh: whether they have had no momentum yet.
    """

    parameter: Tensor
    dim: int
    start: int
    length: int
    fresh: bool

    def of(self, tensor: Tensor) -> Tensor:
        """The same rows or columns of a tensor of the parameter's shape, a view."""
        return tensor.detach().narrow(self.dim, self.start, self.length)


@dataclass
class Plan:
    """The buckets of one parameter group, and what they were made for.

    Attributes:
        ids: of all parameters of the group.
        members: these parameters, if one of them is marked. Of others nothing is held, so that one which leaves the
            group is freed at once.
        marks: their constraints.
        parameters: those that are marked and have gradients.
        facts: what of these a bucket depends on.
        keys: the moments that the group's options ask for, and which of them are one number a block.
        buckets: of these parameters.
        rests: what of these is in none of their blocks.
        versions: version and address of the members that are in no bucket, when they last were in one.
    """

    ids: list[int] = field(default_factory=list)
    members: list[Tensor] = field(default_factory=list)
    marks: list[Manifold | None] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    facts: Facts = ()
    keys: Keys = field(default_factory=lambda: ([], []))
    buckets: list[Bucket] = field(default_factory=list)
    rests: list[Rest] = field(default_factory=list)
    versions: dict[int, tuple[int | None, int | None]] = field(default_factory=dict)

    def part_with(self, optimizer: Any, moved: set[int]) -> None:
        """Take the state of parameters that another group has now, by id, out of the storage that it shares here."""
        for bucket in self.buckets:
            if any(id(p) in moved for p in bucket.parameters):
                leave(optimizer, bucket, set())


class Before:
    """The state of an optimizer before a step: taken where a plan is made anew, for when that fails."""

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._known = list(optimizer.state)
        self._taken: dict[Tensor, Any] | None = None

    def take(self) -> None:
        """Keep what there is, once a step."""
        if self._taken is None:
            self._taken = {p: dict(entries) for p, entries in self._optimizer.state.items()}

    def bring_back(self) -> None:
        """State as it was; where none was taken, what torch's own _init_group has added goes."""
        state = self._optimizer.state
        before = {p: state[p] for p in self._known} if self._taken is None else self._taken
        state.clear()
        state.update(before)
        forget_plans(self._optimizer)


def forget_plans(optimizer: Any) -> None:
    """Start without plans and workspaces: the state may be another one now."""
    if not hasattr(optimizer, "_tally"):
        optimizer._tally, optimizer._marks = Tally(), {}
    optimizer._plans, optimizer._room, optimizer._before = [], Room(), None
    optimizer._stale = False
    remember_optimizer(optimizer)
    restored = set(remember_marks(optimizer, [p for group in optimizer.param_groups for p in group["params"]]))
    for group in optimizer.param_groups if restored else ():
        for p in restored.intersection(group["params"]):
            check_options(type(optimizer).__name__, group)
            check_marked(type(optimizer).__name__, p, group)
    forget_marks(optimizer)


def drop_plans(optimizer: Any) -> None:
    """Let go of the plans of groups that are there no more, and of what was in them."""
    if len(optimizer._plans) > len(optimizer.param_groups):
        del optimizer._plans[len(optimizer.param_groups) :]
        forget_marks(optimizer)


def prepare(optimizer: Any, group: Group, keys: list[str], scalars: list[str]) -> Group:
    """Plan the marked parameters of a group, and return the group without them, for torch's own ``_init_group``.

    The plan of the last step stays while nothing has changed: parameters, marks, dtypes, devices, which of them
    have gradients, the options that decide what moments there are, and the state that holds these.
    """
    plans: list[Plan] = optimizer._plans
    groups = optimizer.param_groups
    plans.extend(Plan() for _ in range(len(groups) - len(plans)))
    position = next(i for i, other in enumerate(groups) if other is group)
    name = type(optimizer).__name__
    plan = plans[position]
    members, marks, live, constraints, unchanged = _survey(optimizer, group, plan)
    optimizer._stale |= not unchanged
    if optimizer._stale and group is groups[-1]:
        forget_marks(optimizer)
        optimizer._stale = False
    if unchanged and not any(marks) and not any(CONSTRAINED in optimizer.state.get(p, ()) for p in members):
        return group
    facts: Facts = (
        constraints,
        [p.dtype for p in live],
        [p.device for p in live],
        [p.is_contiguous() for p in live],
        [p.shape for p in live],
        [group.get("capturable")],  # where the steps are counted
    )
    same = unchanged and _are(plan.parameters, live) and plan.facts == facts
    if not (same and plan.keys == (keys, scalars) and _works(optimizer, plan)):
        for parameter, constraint in zip(live, facts[0], strict=True):
            check_marked(name, parameter, group)
            check_shapes(optimizer, group, parameter, optimizer.state.get(parameter, {}), constraint)
        if optimizer._before is not None:
            optimizer._before.take()
        here = set(map(id, live))
        for other in plans:
            if other is not plan:
                other.part_with(optimizer, here)
        convert(optimizer, group)
        held = members if any(marks) else []
        new = Plan(list(map(id, members)), held, marks, live, facts, (keys, scalars))
        plans[position] = _planned(optimizer, group, plan, new)
    for bucket in plans[position].buckets:
        bucket.ask_for(RETRACTIONS[group["retraction"]].temporaries)
    return {**group, "params": [p for p, mark in zip(members, marks, strict=True) if mark is None]}


def refuse(optimizer: Any) -> None:
    """Raise what a step of these groups would, before anything has been written."""
    careful = any(group["on_fault"] == "raise" for group in optimizer.param_groups)
    if len(optimizer.param_groups) == 1 and not careful:
        return  # prepare looks before it leaps
    scale, overflow = (getattr(optimizer, key, None) for key in SCALED)
    if overflow is not None and float(overflow) != 0:
        careful = False  # a GradScaler has seen it, and nothing will move
    plans = itertools.chain(optimizer._plans, itertools.repeat(Plan()))
    for group, plan in zip(optimizer.param_groups, plans, strict=False):
        _, marks, live, _, _ = _survey(optimizer, group, plan)
        if careful and any(marks) and group["on_fault"] == "raise":
            check_finite(type(optimizer).__name__, group, live, [p.grad for p in live], scale)  # type: ignore[misc]


def _survey(
    optimizer: Any, group: Group, plan: Plan
) -> tuple[list[Tensor], list[Manifold | None], list[Tensor], list[Manifold], bool]:
    """The members of a group and their marks; those marked that have gradients, and theirs; whether all is as planned.

    What is new is checked, and marks are remembered. No tuple a parameter: ten thousand of them a step would keep
    Python's garbage collector busy.
    """
    name = type(optimizer).__name__
    members = list(group["params"])
    marks = [constraint_of(p) for p in members]
    unchanged = plan.ids == list(map(id, members)) and plan.marks == marks
    if not unchanged:
        check_sharded(name, members)
        remember_marks(optimizer, members)
        marks = [constraint_of(p) for p in members]
    if not any(marks):
        return members, marks, [], [], unchanged
    check_options(name, group)
    gradients = [p.grad for p in members]
    present = [mark is not None and g is not None for mark, g in zip(marks, gradients, strict=True)]
    live = list(itertools.compress(members, present))
    check_gradients(name, group, live, list(itertools.compress(gradients, present)))
    constraints = [mark for mark in itertools.compress(marks, present) if mark is not None]
    return members, marks, live, constraints, unchanged


def _are(before: list[Tensor], now: list[Tensor]) -> bool:
    """Whether these are the same parameters."""
    return len(before) == len(now) and all(map(operator.is_, before, now))


def _works(optimizer: Any, plan: Plan) -> bool:
    """Whether the buckets of a plan are still good for another step."""
    return not any(bucket.fresh for bucket in plan.buckets) and all(
        still_shown(optimizer, bucket) for bucket in plan.buckets
    )


def _planned(optimizer: Any, group: Group, old: Plan, new: Plan) -> Plan:
    """Give a plan its buckets, and those their moments and versions, of which the old plan has some."""
    damped = "momentum_buffer" in new.keys[0] and group["dampening"] != 0
    parameters = new.parameters
    waiting = {id(p) for bucket in old.buckets if bucket.fresh for p in bucket.parameters}
    waiting.update(id(rest.parameter) for rest in old.rests if rest.fresh)  # a GradScaler has skipped the first step
    first = [id(p) in waiting or optimizer.state.get(p, {}).get("momentum_buffer") is None for p in parameters]
    fresh = [damped and none_yet for none_yet in first]
    marked = itertools.count()
    rank = {key: next(marked) for key, mark in zip(new.ids, new.marks, strict=True) if mark is not None}
    new.buckets = fill(parameters, new.facts[0], fresh, [rank[id(p)] for p in parameters])
    new.rests = [
        Rest(p, constraint.dim, start, length, none_yet)
        for p, constraint, none_yet in zip(parameters, new.facts[0], first, strict=True)
        for start, length in constraint.rest(p.shape)
    ]
    versions = dict(old.versions)
    for bucket in old.buckets:
        if bucket.parameters[0].dtype == bucket.dtype:  # rounded to another one, they are to be looked at
            pairs = zip(bucket.versions, bucket.addresses, strict=True)
            versions.update(zip(map(id, bucket.parameters), pairs, strict=True))
        leave(optimizer, bucket, set(map(id, parameters)))
    with torch.no_grad():
        for bucket in new.buckets:
            seen = [versions.get(id(p), (None, None)) for p in bucket.parameters]
            bucket.versions, bucket.addresses = ([one[k] for one in seen] for k in (0, 1))
            optimizer._tally.prepare(bucket.parameters[0].device)
            hold(optimizer, group, bucket, *new.keys)
            bucket.reserve(optimizer._room)
    known = set(map(id, new.members))
    new.versions = {key: version for key, version in versions.items() if key in known}
    return new
