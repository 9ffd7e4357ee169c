"""Plans: the buckets of an optimizer, rebuilt only if something has changed that they depend on."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...constraints import tag as constraint
from ...constraints.persistence import register_table
from ...constraints.tag import CONSTRAINED, TAG, constraint_of
from ...linalg import products
from ...linalg.products import Pool
from ...manifolds.shards import is_dtensor
from ...stiefel.retractions import OPTIONS as RETRACTION_OPTIONS
from ..options import (
    OPTIONS,
    drop_stale_constraints,
    track_constraints,
    validate_finite_gradients,
    validate_gradients,
    validate_marked,
    validate_options,
    validate_unflattened,
)
from .bucket import Bucket
from .convert import check_shapes, convert_state
from .grouping import FreeRows, active_params, build_buckets, first_equal_groups, steps_so_far
from .optimizer import GRAD_SCALER_ATTRIBUTES, Engine, Group, ManifoldOptimizer
from .state import detach_state, init_state

Stamps = dict[int, tuple[Any, ...]]  # by id of the parameter: version, address and dtype

_members, _version, _attributes = itemgetter("params"), attrgetter("_version"), attrgetter("__dict__")
_flat = itertools.chain.from_iterable
_idle_state = attrgetter(TAG, "grad")  # for marked parameters without a gradient
_tag, _gradient = attrgetter(TAG), attrgetter("grad")
_dtype, _device, _layout = map(attrgetter, ("dtype", "device", "layout"))
_FLAGS = ("capturable", "differentiable")  # options that change the step count, or are rejected


class Plan:
    """Buckets of an optimizer, with the memory for their steps and a cache key that tells when they are out of date.

    A group is stored as its position, and its options are read in every step. Only ids are stored of parameters in
    groups without marked ones, so that they are freed as soon as they leave the optimizer.

    Attributes:
        work: position of the group and bucket. The first of several groups with equal options stands for all of them.
        free_rows: position of the group and rows outside every block, for groups that have such rows.
        unmarked: position of the group and unmarked parameters; None if all of its parameters are unmarked.
        pool: memory of workspaces.
        active: marked parameters that have gradients.
        devices: device types of the active parameters.
        low_precision: whether an active parameter is stored in low precision.
        on_accelerator: whether values of an active parameter must not be read.
        raises: whether a group has ``nonfinite="raise"``.
        needs_checks: whether one of the last three is true.
        has_dtensors: whether a parameter is a DTensor, marked or not.
    """

    def __init__(self, optimizer: ManifoldOptimizer, old: Plan | None, *, merge: bool) -> None:
        groups = optimizer.param_groups
        everything = [p for group in groups for p in group["params"]]
        self.has_dtensors = any(map(is_dtensor, everything))
        self._typed = [p for p in everything if type(p) is not nn.Parameter]  # these may be a geoopt.ManifoldParameter
        self._idle = [p for p in everything if p.grad is None and constraint_of(p) is not None]
        named = [name for name in (*OPTIONS, *_FLAGS) if all(name in group for group in groups)]
        self._checked = itemgetter(*named)
        self._more_options = [name for name in RETRACTION_OPTIONS if name not in OPTIONS]  # of added retractions
        self.merges = merge and len(groups) > 1
        self._first_equal_groups = first_equal_groups(optimizer) if self.merges else list(range(len(groups)))
        self.pool = Pool()
        active = list(map(active_params, groups))
        self.active = list(_flat(active))
        self.unmarked = list(_unmarked(groups))
        self._build_buckets(optimizer, active, old)
        buckets = [bucket for _, bucket in self.work]
        self.devices = {p.device.type for p in self.active}
        self.low_precision = any(bucket.low_precision for bucket in buckets)
        self.on_accelerator = not all(products.host_can_branch(p) for p in self.active)
        self.raises = any(group["nonfinite"] == "raise" for group in groups)
        self.needs_checks = self.low_precision or self.raises or self.on_accelerator
        self._states = list(_states(optimizer, buckets))
        self._entries = [x for bucket in buckets for entries in bucket.state_views.values() for x in entries]
        self._versions: list[Any] = [None] * len(self.active)
        self._dtypes = [p.dtype for p in self.active]
        self._cache_key = self._compute_cache_key(optimizer)

    @torch.no_grad()
    def _build_buckets(self, optimizer: ManifoldOptimizer, active: list[list[Tensor]], old: Plan | None) -> None:
        """Build the buckets, and allocate their state and workspaces."""
        groups = optimizer.param_groups
        waiting = set() if old is None else old.first_momentum_ids()
        waiting |= {id(p) for p in self.active if optimizer.state.get(p, {}).get("momentum_buffer") is None}
        parameters, keys = [], []
        for group, alike, members in zip(groups, self._first_equal_groups, active, strict=True):
            damped = group.get("momentum", 0) != 0 and group.get("dampening", 0) != 0
            parameters += members
            keys += [(alike, damped and id(p) in waiting, steps_so_far(optimizer, p)) for p in members]
        self.work = [(alike, bucket) for (alike, _, _), bucket in build_buckets(parameters, keys)]
        self.free_rows = []
        for position, members in enumerate(active):
            free = [
                FreeRows(p, mark.dim, start, length, id(p) in waiting)
                for p in members
                if (mark := constraint_of(p)) is not None
                for start, length in mark.free_rows(p.shape)
            ]
            if free:
                self.free_rows.append((position, free))
        for _, bucket in () if old is None else old.work:
            detach_state(optimizer, bucket, {id(p) for _, new in self.work if new.gathered for p in new.parameters})
        for position, bucket in self.work:
            group = groups[position]
            optimizer._engine.counters.prepare(bucket.parameters[0].device)
            init_state(optimizer, group, bucket, *optimizer._algorithm.moments(group))
            bucket.allocate_workspaces(self.pool)

    def first_momentum_ids(self) -> set[int]:
        """Return the ids of parameters whose momentum has no gradient yet."""
        buckets = {id(p) for _, bucket in self.work if bucket.first_momentum for p in bucket.parameters}
        return buckets | {id(rows.parameter) for _, free in self.free_rows for rows in free if rows.first_momentum}

    def is_current(self, optimizer: ManifoldOptimizer) -> bool:
        """Return True if nothing that the plan depends on has changed."""
        for _, bucket in self.work:
            version = bucket.counted_version
            if bucket.first_momentum or (version is not None and version != bucket.steps._version):  # type: ignore[union-attr]
                return False
        try:
            if self._compute_cache_key(optimizer) != self._cache_key:
                return False
        except (AttributeError, KeyError, TypeError):  # a mark or a state entry has been deleted
            return False
        return not self.merges or first_equal_groups(optimizer) == self._first_equal_groups

    def is_overwritten(self) -> bool:
        """Return True if an active parameter was modified since :meth:`remember_values`."""
        return list(map(_version, self.active)) != self._versions

    def remember_values(self) -> None:
        """Store the versions of the active parameters after a step."""
        self._versions = list(map(_version, self.active))

    def stamps(self) -> Stamps:
        """Return the :func:`value_stamp` of every active parameter after its last step."""
        stamps = zip(self._versions, self._cache_key[-1], self._dtypes, strict=True)
        return dict(zip(map(id, self.active), stamps, strict=True))

    def _compute_cache_key(self, optimizer: ManifoldOptimizer) -> tuple[Any, ...]:
        """Return everything that the plan depends on.

        There may be ten thousand parameters, so each pass runs in C and creates no tuple per parameter, which the
        garbage collector would have to visit.
        """
        groups, active = optimizer.param_groups, self.active
        gradients = list(map(_gradient, active))
        return (
            constraint.marks_made,
            products.READ_ON_CPU,
            list(map(id, _flat(map(_members, groups)))),
            list(map(len, map(_members, groups))),
            list(map(self._checked, groups)),
            self._more_options and [list(map(group.get, self._more_options)) for group in groups],
            list(map(optimizer._algorithm.moments, groups)),
            list(map(len, map(_attributes, _flat(map(_members, groups))))),  # a mark is an attribute
            self._typed and list(map(constraint_of, self._typed)),
            self._idle and list(map(_idle_state, self._idle)),
            list(map(_tag, active)),
            list(map(Tensor.numel, active)),
            list(map(_dtype, active)),
            list(map(Tensor.numel, gradients)),
            list(map(_dtype, gradients)),
            list(map(_device, gradients)),
            list(map(_layout, gradients)),
            list(map(id, optimizer.state.values())),
            list(map(id, _flat(itertools.starmap(map, self._states)))),
            list(map(Tensor.data_ptr, self._entries)),
            list(map(Tensor.stride, active)),
            list(map(Tensor.data_ptr, active)),
        )


def value_stamp(parameter: Tensor) -> tuple[Any, ...]:
    """Return version, address and dtype of a parameter, which change if it is modified."""
    return parameter._version, parameter.data_ptr(), parameter.dtype


class StateBackup:
    """Snapshot of the optimizer state before a step, so that a failed step can roll back.

    Args:
        optimizer: the optimizer.
        entries: whether to store the entries of each parameter's state, or only the parameters that have a state.
    """

    def __init__(self, optimizer: ManifoldOptimizer, *, entries: bool) -> None:
        self._optimizer = optimizer
        pairs = optimizer.state.items()
        self._state = [(p, copy.copy(state)) for p, state in pairs] if entries else list(pairs)

    def roll_back(self) -> None:
        """Restore the state, and discard the plan."""
        self._optimizer.state.clear()
        self._optimizer.state.update(self._state)
        reset_engine(self._optimizer)


def reset_engine(optimizer: ManifoldOptimizer) -> None:
    """Discard the plan after the state may have been replaced, and mark parameters that have lost their mark again."""
    if not hasattr(optimizer, "_engine"):
        optimizer._engine = Engine()
        register_table(optimizer._engine)
    optimizer._engine.plan, optimizer._engine.stamps = None, {}
    restored = set(track_constraints(optimizer, [p for group in optimizer.param_groups for p in group["params"]]))
    for group in optimizer.param_groups if restored else ():
        for p in restored.intersection(group["params"]):
            validate_options(type(optimizer).__name__, group)
            validate_marked(optimizer, p, group)
    drop_stale_constraints(optimizer)


def make_plan(optimizer: ManifoldOptimizer, *, merge: bool = True) -> Plan:
    """Validate parameters and options, convert the state, and store and return a new plan.

    Groups with equal options share buckets if ``merge``.
    """
    old = optimizer._engine.plan
    if old is not None:
        optimizer._engine.stamps.update(old.stamps())
    check_before_step(optimizer)
    for group in optimizer.param_groups:
        convert_state(optimizer, group)
    plan = optimizer._engine.plan = Plan(optimizer, old, merge=merge)
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer._engine.stamps = {key: stamp for key, stamp in optimizer._engine.stamps.items() if key in known}
    return plan


def check_before_step(optimizer: ManifoldOptimizer) -> None:
    """Raise the errors of a step before anything is written."""
    name, groups = type(optimizer).__name__, optimizer.param_groups
    everything = [p for group in groups for p in group["params"]]
    validate_unflattened(name, everything)
    track_constraints(optimizer, everything)
    drop_stale_constraints(optimizer)
    for group in groups:
        if any(constraint_of(p) is not None for p in group["params"]):
            validate_options(name, group)
            active = active_params(group)
            validate_gradients(name, group, active, [p.grad for p in active])  # type: ignore[misc]
            for p in group["params"]:
                if is_dtensor(p) and constraint_of(p) is not None:
                    validate_marked(optimizer, p, group)
            for p in active:
                validate_marked(optimizer, p, group)
                check_shapes(optimizer, group, p, optimizer.state.get(p, {}), constraint_of(p))
    check_gradients_are_finite(optimizer)


def check_gradients_are_finite(optimizer: ManifoldOptimizer) -> None:
    """Raise a FloatingPointError for a non-finite gradient in a group with ``nonfinite="raise"``."""
    grad_scale, found_inf = (getattr(optimizer, key, None) for key in GRAD_SCALER_ATTRIBUTES)
    if found_inf is not None and float(found_inf) != 0:
        return  # the GradScaler skips this step
    for group in optimizer.param_groups:
        if group["nonfinite"] == "raise":
            active = active_params(group)
            gradients: list[Tensor] = [p.grad for p in active]  # type: ignore[misc]
            validate_finite_gradients(type(optimizer).__name__, group, active, gradients, grad_scale)


def without_constrained(optimizer: ManifoldOptimizer, group: Group) -> Group:
    """Return a group without its marked parameters, for torch's own ``_init_group``, and update the plan for these.

    Groups are not merged here: a traced graph would not depend on the options of the second group.
    """
    plan = optimizer._engine.plan
    if plan is None or plan.merges or not plan.is_current(optimizer):
        make_plan(optimizer, merge=False)
    if any(is_dtensor(p) and constraint_of(p) is not None for p in group["params"]):
        raise RuntimeError(
            f"{type(optimizer).__name__}: a step with marked DTensors cannot be compiled. Compile the model, and call "
            "opt.step() outside."
        )
    return {**group, "params": [p for p in group["params"] if constraint_of(p) is None]}


def probe_memory(optimizer: ManifoldOptimizer, plan: Plan) -> None:
    """Allocate and free the temporaries of a step, so that a CUDA OOM is raised before anything is written."""
    for position, bucket in plan.work:
        bucket.probe_memory(optimizer._algorithm.retraction_of(optimizer.param_groups[position]).temp_blocks)


def _unmarked(groups: list[Group]) -> Iterator[tuple[int, list[Tensor] | None]]:
    """Yield the position of each group with unmarked parameters, and these; None if all are unmarked."""
    for position, group in enumerate(groups):
        free = [p for p in group["params"] if constraint_of(p) is None]
        if free:
            yield position, free if len(free) < len(group["params"]) else None


def _states(optimizer: ManifoldOptimizer, buckets: list[Bucket]) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
    """Yield a getter for each state key, and all states with this key."""
    states_by_key: dict[str, list[dict[str, Any]]] = {}
    for bucket in buckets:
        for key in (*bucket.state_views, CONSTRAINED):
            states_by_key.setdefault(key, []).extend(optimizer.state[p] for p in bucket.parameters)
    for key, states in states_by_key.items():
        yield itemgetter(key), states
