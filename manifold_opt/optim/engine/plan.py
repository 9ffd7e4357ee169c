"""Which parameters move together, planned anew only when something has changed that the plan depends on."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...constraints import tag as constraint
from ...constraints.persistence import register_table
from ...constraints.tag import CONSTRAINED, TAG, constraint_of
from ...linalg import products
from ...linalg.workspace import Pool
from ...stiefel.retractions import RETRACTIONS
from ..options import (
    OPTIONS,
    drop_stale_constraints,
    track_constraints,
    validate_finite_gradients,
    validate_gradients,
    validate_marked,
    validate_options,
    validate_unsharded,
)
from .bucket import Bucket, build_buckets
from .optimizer import GRAD_SCALER_ATTRIBUTES, Engine, Group, ManifoldOptimizer
from .state import check_shapes, convert, hold, leave

Values = dict[int, tuple[Any, ...]]  # of parameters by id: version, address and dtype

_members, _version, _attributes = itemgetter("params"), attrgetter("_version"), attrgetter("__dict__")
_flat = itertools.chain.from_iterable
_IDLE = attrgetter(TAG, "grad")  # of a marked parameter without a gradient
_tag, _gradient = attrgetter(TAG), attrgetter("grad")
_dtype, _device, _layout = map(attrgetter, ("dtype", "device", "layout"))
_FLAGS = ("amsgrad", "capturable", "differentiable", "fused")  # they decide about moments, or are refused


@dataclass
class FreeRows:
    """Rows or columns of a marked parameter that are outside every block: unmarked, for torch to step.

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

    def view(self, tensor: Tensor) -> Tensor:
        """Return the same rows or columns of a tensor of the parameter's shape, a view."""
        return tensor.detach().narrow(self.dim, self.start, self.length)


class Plan:
    """The buckets of an optimizer, the memory for their steps, and what they were made for.

    A group is named by its position, and its options are read in every step. Of a group without marked parameters only
    ids are stored, so that one which leaves it is freed at once.

    Attributes:
        work: position and bucket: the first group with equal options stands for all such groups.
        free_rows: position and rows outside every block, of groups that have some.
        unmarked: position and unmarked parameters, of groups that have some; None where all are.
        pool: memory of workspaces.
        active: marked parameters that have gradients.
        devices: types of the devices of these.
        low: whether one of these is stored in low precision.
        on_accelerator: whether one is where no value may be read.
        raises: whether a gradient that is not finite is an error in one of the groups.
        needs_care: whether one of the last three is so.
    """

    def __init__(self, optimizer: ManifoldOptimizer, old: Plan | None, *, merge: bool) -> None:
        groups = optimizer.param_groups
        everything = [p for group in groups for p in group["params"]]
        self._typed = [p for p in everything if type(p) is not nn.Parameter]  # they may have a manifold of geoopt's
        self._idle = [p for p in everything if p.grad is None and constraint_of(p) is not None]
        named = [name for name in (*OPTIONS, *_FLAGS) if all(name in group for group in groups)]
        self._checked = itemgetter(*named)
        self._momentum = itemgetter("momentum" if all("momentum" in group for group in groups) else "nonfinite")
        self.merges = merge and len(groups) > 1
        self._first_equal_groups = _first_equal_groups(optimizer) if self.merges else list(range(len(groups)))
        self.pool = Pool()
        live = list(map(_active_params, groups))
        self.active = list(_flat(live))
        self.unmarked = list(_unmarked(groups))
        self._fill(optimizer, live, old)
        buckets = [bucket for _, bucket in self.work]
        self.devices = {p.device.type for p in self.active}
        self.low = any(bucket.low for bucket in buckets)
        self.on_accelerator = not all(products.host_can_branch(p) for p in self.active)
        self.raises = any(group["nonfinite"] == "raise" for group in groups)
        self.needs_care = self.low or self.raises or self.on_accelerator
        self._states = list(_states(optimizer, buckets))
        self._shown = [entry for bucket in buckets for shown in bucket.state_views.values() for entry in shown]
        self._versions: list[Any] = [None] * len(self.active)
        self._dtypes = [p.dtype for p in self.active]
        self._facts = self._look(optimizer)

    @torch.no_grad()
    def _fill(self, optimizer: ManifoldOptimizer, live: list[list[Tensor]], old: Plan | None) -> None:
        """Make buckets, and give them their moments and buffers."""
        groups = optimizer.param_groups
        waiting = set() if old is None else old.waiting()
        first = {
            id(p) for p in self.active if id(p) in waiting or optimizer.state.get(p, {}).get("momentum_buffer") is None
        }
        parameters, keys = [], []
        for group, alike, members in zip(groups, self._first_equal_groups, live, strict=True):
            damped = group.get("momentum", 0) != 0 and group["dampening"] != 0
            parameters += members
            keys += [(alike, damped and id(p) in first, _steps_so_far(optimizer, p)) for p in members]
        self.work = [(alike, bucket) for (alike, _, _), bucket in build_buckets(parameters, keys)]
        self.free_rows = []
        for position, members in enumerate(live):
            free = [
                FreeRows(p, mark.dim, start, length, id(p) in first)
                for p in members
                if (mark := constraint_of(p)) is not None
                for start, length in mark.free_rows(p.shape)
            ]
            if free:
                self.free_rows.append((position, free))
        for _, bucket in () if old is None else old.work:
            leave(optimizer, bucket, {id(p) for _, new in self.work if new.gathered for p in new.parameters})
        for position, bucket in self.work:
            group = groups[position]
            optimizer._engine.counters.prepare(bucket.parameters[0].device)
            hold(optimizer, group, bucket, *optimizer._algorithm.moments(group))
            bucket.allocate_workspaces(self.pool)

    def waiting(self) -> set[int]:
        """Return the ids of parameters whose first gradient is still to enter the momentum."""
        buckets = {id(p) for _, bucket in self.work if bucket.fresh for p in bucket.parameters}
        return buckets | {id(rows.parameter) for _, free in self.free_rows for rows in free if rows.fresh}

    def is_current(self, optimizer: ManifoldOptimizer) -> bool:
        """Return True if nothing has changed that the plan depends on."""
        for _, bucket in self.work:
            if bucket.fresh or (bucket.counted is not None and bucket.counted != bucket.steps._version):  # type: ignore[union-attr]
                return False
        try:
            if self._look(optimizer) != self._facts:
                return False
        except (AttributeError, KeyError, TypeError):  # a mark, or an entry of the state, is not there any more
            return False
        return not self.merges or _first_equal_groups(optimizer) == self._first_equal_groups

    def is_overwritten(self) -> bool:
        """Return True if a parameter has been written to since :meth:`remember_values`."""
        return list(map(_version, self.active)) != self._versions

    def remember_values(self) -> None:
        """Take note of the parameters as they are now, on their manifold."""
        self._versions = list(map(_version, self.active))

    def values(self) -> Values:
        """Return what :func:`value_stamp` gave for every parameter when it was last stepped."""
        values = zip(self._versions, self._facts[-1], self._dtypes, strict=True)
        return dict(zip(map(id, self.active), values, strict=True))

    def _look(self, optimizer: ManifoldOptimizer) -> tuple[Any, ...]:
        """Return what decides whether the plan holds.

        By passes in C that make few tuples, which Python's garbage collector would have to visit: there may be ten
        thousand parameters.
        """
        groups, active = optimizer.param_groups, self.active
        gradients = list(map(_gradient, active))
        return (
            constraint.marks_made,
            products.READ_ON_CPU,
            list(map(id, _flat(map(_members, groups)))),
            list(map(len, map(_members, groups))),
            list(map(self._checked, groups)),
            list(map(bool, map(self._momentum, groups))),
            list(map(len, map(_attributes, _flat(map(_members, groups))))),  # a mark is one of them
            self._typed and list(map(constraint_of, self._typed)),
            self._idle and list(map(_IDLE, self._idle)),
            list(map(_tag, active)),
            list(map(Tensor.numel, active)),
            list(map(_dtype, active)),
            list(map(Tensor.numel, gradients)),
            list(map(_dtype, gradients)),
            list(map(_device, gradients)),
            list(map(_layout, gradients)),
            list(map(id, optimizer.state.values())),
            list(map(id, _flat(itertools.starmap(map, self._states)))),
            list(map(Tensor.data_ptr, self._shown)),
            list(map(Tensor.stride, active)),
            list(map(Tensor.data_ptr, active)),
        )


def value_stamp(parameter: Tensor) -> tuple[Any, ...]:
    """Return what says whether a parameter has been written to: its version, its address, and its dtype."""
    return parameter._version, parameter.data_ptr(), parameter.dtype


class StateBackup:
    """The state of an optimizer before a step, for when getting ready for it fails."""

    def __init__(self, optimizer: ManifoldOptimizer, *, entries: bool) -> None:
        self._optimizer = optimizer
        pairs = optimizer.state.items()
        self._state = [(p, dict(state)) for p, state in pairs] if entries else list(pairs)

    def restore(self) -> None:
        """Put the state back: all entries, or if these were not to change, which parameters have one."""
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        reset_engine(self._optimizer)


def reset_engine(optimizer: ManifoldOptimizer) -> None:
    """Start without a plan: the state may be another one now."""
    if not hasattr(optimizer, "_engine"):
        optimizer._engine = Engine()
        register_table(optimizer._engine)
    optimizer._engine.plan, optimizer._engine.values = None, {}
    restored = set(track_constraints(optimizer, [p for group in optimizer.param_groups for p in group["params"]]))
    for group in optimizer.param_groups if restored else ():
        for p in restored.intersection(group["params"]):
            validate_options(type(optimizer).__name__, group)
            validate_marked(type(optimizer).__name__, p, group)
    drop_stale_constraints(optimizer)


def make_plan(optimizer: ManifoldOptimizer, *, merge: bool = True) -> Plan:
    """Check everything that a step can refuse, and plan anew. State is brought into the form that the plan needs.

    Groups with equal options share buckets if ``merge``.
    """
    old = optimizer._engine.plan
    if old is not None:
        optimizer._engine.values.update(old.values())
    check_before_step(optimizer)
    for group in optimizer.param_groups:
        convert(optimizer, group)
    plan = optimizer._engine.plan = Plan(optimizer, old, merge=merge)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer._engine.values = {key: value for key, value in optimizer._engine.values.items() if key in known}
    return plan


def check_before_step(optimizer: ManifoldOptimizer) -> None:
    """Raise what a step would, before anything has been written."""
    name, groups = type(optimizer).__name__, optimizer.param_groups
    everything = [p for group in groups for p in group["params"]]
    validate_unsharded(name, everything)
    track_constraints(optimizer, everything)
    drop_stale_constraints(optimizer)
    for group in groups:
        if any(constraint_of(p) is not None for p in group["params"]):
            validate_options(name, group)
            live = _active_params(group)
            validate_gradients(name, group, live, [p.grad for p in live])  # type: ignore[misc]
            for p in live:
                validate_marked(name, p, group)
                check_shapes(optimizer, group, p, optimizer.state.get(p, {}), constraint_of(p))
    check_gradients_are_finite(optimizer)


def check_gradients_are_finite(optimizer: ManifoldOptimizer) -> None:
    """Raise a FloatingPointError for a gradient that a step cannot take, in the groups that ask for that."""
    scale, overflow = (getattr(optimizer, key, None) for key in GRAD_SCALER_ATTRIBUTES)
    if overflow is not None and float(overflow) != 0:
        return  # a GradScaler has seen it, and nothing will move
    for group in optimizer.param_groups:
        if group["nonfinite"] == "raise":
            live = _active_params(group)
            validate_finite_gradients(type(optimizer).__name__, group, live, [p.grad for p in live], scale)  # type: ignore[misc]


def without_constrained(optimizer: ManifoldOptimizer, group: Group) -> Group:
    """Return a group without its marked parameters, for torch's own ``_init_group``, with a plan made for these.

    A graph that is traced does not merge groups: nothing in it would depend on the options of the second.
    """
    plan = optimizer._engine.plan
    if plan is None or plan.merges or not plan.is_current(optimizer):
        make_plan(optimizer, merge=False)
    return {**group, "params": [p for p in group["params"] if constraint_of(p) is None]}


def probe_memory(optimizer: ManifoldOptimizer, plan: Plan) -> None:
    """Let the allocators of accelerators find the memory of a step before anything is written."""
    for position, bucket in plan.work:
        bucket.probe_memory(RETRACTIONS[optimizer.param_groups[position]["retraction"]].temp_blocks)


def _first_equal_groups(optimizer: ManifoldOptimizer) -> list[int]:
    """Return for every group the position of the first one with the same options. Tensors are compared by identity."""
    first: dict[Any, int] = {}
    return [
        first.setdefault(
            tuple(x if type(x) in _PLAIN else _hashable(x) for x in map(group.get, optimizer.defaults)), position
        )
        for position, group in enumerate(optimizer.param_groups)
    ]


_PLAIN = {float, int, bool, str, type(None)}


def _hashable(option: Any) -> Any:
    if isinstance(option, (list, tuple)):
        return tuple(map(_hashable, option))
    return option if type(option) in _PLAIN else id(option)


def _active_params(group: Group) -> list[Tensor]:
    """Return the marked parameters of a group that have gradients."""
    return [p for p in group["params"] if p.grad is not None and constraint_of(p) is not None]


def _unmarked(groups: list[Group]) -> Iterator[tuple[int, list[Tensor] | None]]:
    for position, group in enumerate(groups):
        free = [p for p in group["params"] if constraint_of(p) is None]
        if free:
            yield position, free if len(free) < len(group["params"]) else None


def _states(optimizer: ManifoldOptimizer, buckets: list[Bucket]) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Yield what takes an entry that a plan shows out of a state, and all states that have this entry."""
    having: dict[str, list[dict[str, Any]]] = {}
    for bucket in buckets:
        for key in (*bucket.state_views, CONSTRAINED):
            having.setdefault(key, []).extend(optimizer.state[p] for p in bucket.parameters)
    for key, states in having.items():
        yield itemgetter(key), states


def _steps_so_far(optimizer: ManifoldOptimizer, parameter: Tensor) -> float | None:
    """Return the step count of a parameter, None where it may not be read.

    SGD needs it only to know when the error is to be measured, in every fourth step.
    """
    count = torch.as_tensor(optimizer.state.get(parameter, {}).get("step", 0.0))
    if not products.host_can_branch(count):
        return None
    return float(count) % 4 if isinstance(optimizer, torch.optim.SGD) else float(count)
