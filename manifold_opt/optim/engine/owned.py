"""Blocks of sharded parameters that this rank owns: one ordinary parameter each, in an optimizer of their own.

A rank holds a shard of a marked DTensor, and owns some of its blocks (owners.py). Those are one ordinary parameter, the
*part*, marked like the whole one, in an inner optimizer of the same class. So every option, manifold and retraction
works as it does for a parameter that is not sharded. The inner optimizer has the moments and master copies. The state
of the outer optimizer has the step count and the record of the constraint only.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...constraints.tag import CONSTRAINED, constraint_of, set_constraint
from ...linalg.precision import LOW_PRECISION, MASTER
from ...manifolds import Manifold
from ...manifolds.records import is_record_of, record_from_tensor, record_to_tensor, serialize
from ...manifolds.shards import boxes_of, from_local, local, placed_like, whole
from .convert import converted_state
from .exchange import Exchange
from .member import OUTER_KEYS, Member, ShardedState, is_held
from .optimizer import GRAD_SCALER_ATTRIBUTES, Group, ManifoldOptimizer
from .owners import Ownership, assign_owners

State = dict[str, Any]
Form = tuple[str | None, Any, Any, Any]  # kind, shape for a point, dtype, plain value


class OwnedBlocks:
    """Blocks of the parameters with one group of ranks, and the inner optimizer of those that this rank owns.

    Attributes:
        members: the parameters.
        active: those that have gradients in this step.
        inner: the optimizer of the parts.
        group, ranks, rank: process group (None for a single rank), their number, and the position of this one.
    """

    def __init__(self, optimizer: ManifoldOptimizer, parameters: list[tuple[int, Any]], group: Any) -> None:
        self.group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        order = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
        layouts = {_layout(p): p for _, p in parameters}
        boxes = {layout: boxes_of(p, order) for layout, p in layouts.items()}  # shared: on many ranks they are large
        owned = [(p, _constraint(p), boxes[_layout(p)]) for _, p in parameters]
        ownerships = assign_owners(owned, [0.0] * self.ranks)
        self.members = [
            self._member(p, position, ownership)
            for (position, p), ownership in zip(parameters, ownerships, strict=True)
        ]
        self.active: list[Member] = []
        self._exchanges: dict[tuple[int, ...], Exchange] = {}
        self._spread_by: Exchange | None = None  # its buffers have the values that the last step has written
        self.collect_values(self.members)
        self.inner = _inner_optimizer(optimizer, self.members)

    def _member(self, parameter: Any, position: int, ownership: Ownership) -> Member:
        value = local(parameter)
        empty, part = value.new_empty(0), None
        if ownership.owned(self.rank):
            part = nn.Parameter(value.new_empty(ownership.part_shape(self.rank)))
            set_constraint(part, ownership.part_constraint(self.rank))
        return Member(parameter, position, ownership, part, empty, value)

    def exchange(self, members: list[Member]) -> Exchange:
        """Return the exchange of some of the parameters; that of all active ones is used in every step."""
        key = tuple(map(id, members))
        if key not in self._exchanges:
            if len(self._exchanges) > 1:  # that of all, and that of the active ones
                self._exchanges.clear()
            self._exchanges[key] = Exchange([m.ownership for m in members], self.group, self.ranks, self.rank)
        return self._exchanges[key]

    def collect(self, members: list[Member], shards: list[Tensor], parts: list[Tensor]) -> None:
        """Write shards to the parts of their owners. A collective."""
        self._spread_by = None
        if members:
            self.exchange(members).collect(shards, parts)

    def spread(self, members: list[Member], parts: list[Tensor], shards: list[Tensor]) -> None:
        """Write parts to the shards. A collective."""
        self._spread_by = None
        if members:
            self.exchange(members).spread(parts, shards)

    def find_active(self) -> None:
        """Store the members that have gradients, and their shards."""
        self.active = [member for member in self.members if member.parameter.grad is not None]
        for member in self.active:
            member.shard = local(member.parameter)

    def is_written(self) -> bool:
        """Return True if an active shard has not the value that the last step has written to it."""
        if not self.active:
            return False
        exchange, shards = self.exchange(self.active), [member.shard for member in self.active]
        parts = [member.part_or_empty() for member in self.active]
        return exchange is not self._spread_by or not exchange.is_as_spread(parts, shards)

    def collect_values(self, members: list[Member]) -> None:
        """Write the values of the shards to the parts. A collective."""
        self.collect(members, [m.shard for m in members], [m.part_or_empty() for m in members])

    def collect_gradients(self) -> None:
        """Write the gradients of the shards to those of the parts. A collective."""
        active = self.active
        for member in self.members:
            if member.part is not None and member.parameter.grad is None:
                member.part.grad = None
            elif member.part is not None and member.part.grad is None:
                member.part.grad = torch.empty_like(member.part)
        gradients = [m.empty if m.part is None or m.part.grad is None else m.part.grad for m in active]
        self.collect(active, [_gradient(m.parameter) for m in active], gradients)

    def spread_values(self) -> None:
        """Write the parts to the shards. A collective."""
        self.spread(self.active, [m.part_or_empty() for m in self.active], [m.shard for m in self.active])
        self._spread_by = self.exchange(self.active) if self.active else None

    def update_options(self, optimizer: ManifoldOptimizer) -> None:
        """Copy the options of the outer groups to the inner ones."""
        for inner, group in zip(self.inner.param_groups, optimizer.param_groups, strict=True):
            options = {key: value for key, value in group.items() if key not in ("params", "param_names")}
            inner.update(options, nonfinite="skip")  # "raise" was checked before anything was sent
        for key in GRAD_SCALER_ATTRIBUTES:
            if hasattr(optimizer, key):
                setattr(self.inner, key, getattr(optimizer, key))
            elif hasattr(self.inner, key):
                delattr(self.inner, key)

    def moments(self, optimizer: ManifoldOptimizer, member: Member) -> tuple[str, ...]:
        """Return the keys of what the owners keep for a member."""
        keys, _ = optimizer._algorithm.moments(optimizer.param_groups[member.position])
        master = (MASTER,) if member.parameter.dtype in LOW_PRECISION else ()
        return *keys, *master, *member.ownership.constraint.state_keys

    def total(self, name: str) -> float:
        """Return the sum of a count of the inner optimizers over the ranks. A collective."""
        count = torch.tensor(
            self.inner._engine.counters.total(name), dtype=torch.float64, device=self.members[0].empty.device
        )
        if self.group is not None:
            dist.all_reduce(count, group=self.group)
        return float(count)

    @torch.no_grad()
    def take_state(self, optimizer: ManifoldOptimizer) -> None:
        """Move moments and master copies from the outer optimizer, where a checkpoint has put them, to the owners."""
        loaded: dict[Member, State] = {}
        for member in self.members:
            state = optimizer.state.get(member.parameter, {})
            if not is_held(state):
                loaded[member] = self._converted(optimizer, member, dict(state))
        parts = self._collect_state(loaded)
        for member, known in loaded.items():
            group = optimizer.param_groups[member.position]
            step = torch.as_tensor(known.get("step", _zero_step(group, member.parameter))).clone()
            record = record_to_tensor(_record(member.ownership.constraint))
            optimizer.state[member.parameter] = ShardedState(step=step, constrained=record)
            if member.part is not None and known:
                own = self.inner.state[member.part] = {"step": step.clone(), **parts[member]}
                if CONSTRAINED in known:  # otherwise it is a state of torch.optim, which the inner optimizer converts
                    own[CONSTRAINED] = record_to_tensor(_record(constraint_of(member.part)))
            elif member.part is not None:
                self.inner.state.pop(member.part, None)

    def _converted(self, optimizer: ManifoldOptimizer, member: Member, state: State) -> State:
        """Return a state held under another constraint converted to the current one."""
        record = record_from_tensor(state.get(CONSTRAINED))
        if record is None or is_record_of(record, member.ownership.constraint):
            return state
        return converted_state(optimizer, optimizer.param_groups[member.position], member.parameter) or state

    def _collect_state(self, states: dict[Member, State]) -> dict[Member, State]:
        """Return the part of every entry that this rank owns. A collective."""
        found: dict[Member, State] = {member: {} for member in states}
        for key in sorted({key for state in states.values() for key in state if key not in OUTER_KEYS}):
            sharded = []
            for member, state in states.items():
                value = state.get(key)
                if isinstance(value, Tensor) and value.shape == member.parameter.shape:
                    sharded.append(member)
                    found[member][key] = torch.empty_like(member.part_or_empty(), dtype=value.dtype)
                elif isinstance(value, Tensor):
                    found[member][key] = self._owned_points(member, whole(value))
                elif key in state:
                    found[member][key] = value
            shards = [local(placed_like(states[member][key], member.parameter)) for member in sharded]
            self.collect(sharded, shards, [found[member][key] for member in sharded])
        return found

    def _owned_points(self, member: Member, value: Tensor) -> Tensor:
        """Return the entries of the points that this rank owns, if there is one for every point."""
        if not value.ndim or len(value) != sum(unit.points for unit in member.ownership.units):
            return value
        runs = [value[start : start + length] for start, length in member.ownership.owned_points(self.rank)]
        return torch.cat(runs) if runs else value[:0]

    @torch.no_grad()
    def states(self, optimizer: ManifoldOptimizer) -> dict[Member, State]:
        """Return the states in the form of a checkpoint: DTensors, or whole tensors. A collective."""
        found = {member: dict(optimizer.state.get(member.parameter, {})) for member in self.members}
        held = [member for member in self.members if is_held(optimizer.state.get(member.parameter, {}))]
        own: dict[Member, State] = {m: {} if m.part is None else self.inner.state.get(m.part, {}) for m in held}
        forms: dict[tuple[int, str], Form] = {}
        entries = [(k, m, key) for k, m in enumerate(held) for key in own[m] if key not in OUTER_KEYS]
        for some in self._gather_objects({(k, key): _form(own[m][key], m.part) for k, m, key in entries}):
            forms.update(some)
        for key in sorted({key for _, key in forms}):
            sharded = []
            for k, member in enumerate(held):
                kind, shape, dtype, value = forms.get((k, key), (None, None, None, None))
                if kind == "value":
                    found[member][key] = value
                elif kind == "points":
                    found[member][key] = self._whole_points(member, own[member].get(key), shape, dtype)
                elif kind == "shard":
                    sharded.append(member)
                    found[member][key] = torch.empty_like(local(member.parameter), dtype=dtype)
            parts = [own[m][key] if key in own[m] else m.empty.to(found[m][key].dtype) for m in sharded]
            self.spread(sharded, parts, [found[member][key] for member in sharded])
            for member in sharded:
                found[member][key] = from_local(found[member][key], member.parameter)
        return found

    def _gather_objects(self, own: Any) -> list[Any]:
        if self.group is None:
            return [own]
        gathered: list[Any] = [None] * self.ranks
        dist.all_gather_object(gathered, own, self.group)
        return gathered

    def _whole_points(self, member: Member, own: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Return an entry with one tensor for every point, whole on every rank. A collective."""
        count = sum(unit.points for unit in member.ownership.units)
        found, position = member.empty.new_zeros((count, *shape), dtype=dtype), 0
        for start, length in member.ownership.owned_points(self.rank) if own is not None else ():
            found[start : start + length] = own[position : position + length]  # type: ignore[index]
            position += length
        if self.group is not None:
            dist.all_reduce(found, group=self.group)
        return found


def _constraint(parameter: Tensor) -> Manifold:
    constraint = constraint_of(parameter)
    assert constraint is not None
    return constraint


def _layout(parameter: Any) -> tuple[Any, ...]:
    """Return what the boxes of a parameter depend on."""
    return parameter.device_mesh, parameter.placements, tuple(parameter.shape)


def _record(constraint: Manifold | None) -> Any:
    record = serialize(constraint)
    assert record is not None
    return record


def _gradient(parameter: Any) -> Tensor:
    """Return the local part of a gradient, with the placements of its parameter."""
    return local(placed_like(parameter.grad, parameter))


def _zero_step(group: Group, parameter: Any) -> Tensor:
    """Return a step count of zero, where the optimizer keeps it."""
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.zeros((), dtype=dtype, device=parameter.device if group.get("capturable", True) else "cpu")


def _form(value: Any, part: Tensor | None) -> Form:
    """Return how an entry of the state is gathered: its kind, the shape for a point, its dtype, and a plain value."""
    if not isinstance(value, Tensor) or not value.ndim:
        return "value", None, None, value
    if part is not None and value.shape == part.shape:
        return "shard", None, value.dtype, None
    return "points", value.shape[1:], value.dtype, None


def _inner_optimizer(optimizer: ManifoldOptimizer, members: list[Member]) -> ManifoldOptimizer:
    """Return an optimizer of the same class for the parts, with groups in the same order."""
    groups = []
    for position, group in enumerate(optimizer.param_groups):
        inside = [member for member in members if member.position == position and member.part is not None]
        new = {**group, "params": [member.part for member in inside]}
        if "param_names" in group:
            names = dict(zip(map(id, group["params"]), group["param_names"], strict=True))
            new["param_names"] = [names[id(member.parameter)] for member in inside]
        groups.append(new)
    inner = type(optimizer).__new__(type(optimizer))
    inner.__setstate__({"defaults": dict(optimizer.defaults), "state": defaultdict(dict), "param_groups": groups})
    return inner
