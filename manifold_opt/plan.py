"""Which parameters of a group move together, found anew only when something about them has changed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .buckets import Bucket, fill
from .constraint import Orthogonal, constraint_of
from .moments import convert, hold, leave, recorded, still_shown
from .options import Group, check_gradients, check_marked, check_options
from .room import Room

Live = list[tuple[Tensor, Orthogonal]]
Keys = tuple[list[str], list[str]]


@dataclass
class Plan:
    """The buckets of one parameter group, and what they were made for.

    Attributes:
        members: all parameters of the group, and their constraints.
        parameters: those that are marked and have gradients.
        facts: what of each a bucket depends on.
        keys: the moments that the group's options ask for, and which of them are one number a block.
        buckets: of these parameters.
        versions: of the members that are in none, when they last were.
    """

    members: list[tuple[Tensor, Orthogonal | None]] = field(default_factory=list)
    parameters: list[Tensor] = field(default_factory=list)
    facts: list[tuple[Any, ...]] = field(default_factory=list)
    keys: Keys = field(default_factory=lambda: ([], []))
    buckets: list[Bucket] = field(default_factory=list)
    versions: dict[int, int | None] = field(default_factory=dict)


def forget_plans(optimizer: Any) -> None:
    """Start without plans and workspaces: the state may be another one now."""
    optimizer._plans = []
    optimizer._held = recorded(optimizer.param_groups)
    optimizer._room = Room()


def prepare(optimizer: Any, group: Group, keys: list[str], scalars: list[str]) -> Group:
    """Plan the marked parameters of a group, and return the group without them, for torch's own ``_init_group``.

    The plan of the last step stays while nothing has changed: parameters, marks, dtypes, devices, which of them
    have gradients, the options that decide what moments there are, and the state that holds these.
    """
    plans: list[Plan] = optimizer._plans
    plans.extend(Plan() for _ in range(len(optimizer.param_groups) - len(plans)))
    del plans[len(optimizer.param_groups) :]
    position = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
    name = type(optimizer).__name__

    members = group["params"]
    constraints = [constraint_of(p) for p in members]
    plan = plans[position]
    if not plan.buckets and not group["constraints"] and not any(constraints):
        return group
    if any(constraints):
        check_options(name, group)
    everyone = list(zip(members, constraints, strict=True))
    live = [(p, c) for p, c in zip(members, constraints, strict=True) if c is not None and p.grad is not None]
    check_gradients(name, [p for p, _ in live])
    facts = [(c, p.dtype, p.device, p.is_contiguous()) for p, c in live]
    if not (_same(plan.members, everyone) and _holds(optimizer, plan, live, facts, (keys, scalars))):
        for p, c in live:
            check_marked(name, p, c)
        convert(optimizer, group)
        plans[position] = _planned(optimizer, group, plan, live, facts, (keys, scalars))
        plans[position].members = everyone
    return {**group, "params": [p for p, c in zip(members, constraints, strict=True) if c is None]}


def _same(before: list[tuple[Tensor, Any]], now: list[tuple[Tensor, Any]]) -> bool:
    """Whether these are the same parameters with the same constraints."""
    return len(before) == len(now) and all(a is b and c == d for (a, c), (b, d) in zip(before, now, strict=True))


def _holds(optimizer: Any, plan: Plan, live: Live, facts: list[tuple[Any, ...]], keys: Keys) -> bool:
    """Whether a plan is still what these parameters would get."""
    return (
        plan.keys == keys
        and plan.facts == facts
        and all(p is q for p, (q, _) in zip(plan.parameters, live, strict=True))
        and not any(bucket.fresh for bucket in plan.buckets)
        and all(still_shown(optimizer, bucket) for bucket in plan.buckets)
    )


def _planned(optimizer: Any, group: Group, old: Plan, live: Live, facts: list[tuple[Any, ...]], keys: Keys) -> Plan:
    parameters, constraints = [p for p, _ in live], [c for _, c in live]
    damped = "momentum_buffer" in keys[0] and group["dampening"] != 0
    buckets = fill(
        parameters, constraints, [damped and "momentum_buffer" not in optimizer.state.get(p, {}) for p in parameters]
    )
    versions = dict(old.versions)
    for bucket in old.buckets:
        versions.update(zip(map(id, bucket.parameters), bucket.versions, strict=True))
        leave(optimizer, bucket, set(map(id, parameters)))
    with torch.no_grad():
        for bucket in buckets:
            bucket.versions = [versions.get(id(p)) for p in bucket.parameters]
            hold(optimizer, group, bucket, *keys)
    known = {id(p) for p in group["params"]}
    return Plan([], parameters, facts, keys, buckets, {key: value for key, value in versions.items() if key in known})
