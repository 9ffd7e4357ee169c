"""Saving and loading of optimizer state. Float32 master copies and moments stay float32 on load."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ...constraints.tag import CONSTRAINED, constraint_of
from ...linalg.precision import LOW_PRECISION, MASTER
from ...manifolds.records import (
    Record,
    format_constraint,
    is_record_of,
    record_from_tensor,
    record_to_tensor,
    serialize,
    to_tuples,
)
from ..options import describe_param, track_constraints
from .convert import converted_state
from .optimizer import Group, ManifoldOptimizer


def state_dict(self: ManifoldOptimizer) -> dict[str, Any]:
    """Return the state of the optimizer, as in torch.optim, converted to the current constraints.

    The state of a parameter that has been unmarked has the form of torch.optim. The optimizer's own state is unchanged.

    With marked DTensors this is a collective: every rank has to call it. It then returns their moments and master
    copies as DTensors with the placements of the parameters.

    Raises:
        ValueError: a parameter that is not marked has the state of a marked one.
    """
    track_constraints(self, _params_of(self))  # a conversion of the module may have dropped marks since the last step
    replaced: dict[Tensor, Any] = {}

    sharded: dict[Tensor, Any] = {} if self._engine.sharded is None else self._engine.sharded.states(self)

    def convert(_: Optimizer) -> None:
        for p, state in sharded.items():
            if p in self.state:
                replaced[p], self.state[p] = self.state[p], state
        for group in self.param_groups:
            for p in group["params"]:
                # State of torch.optim is converted by the next step: only then is the value final.
                new = converted_state(self, group, p) if CONSTRAINED in self.state.get(p, ()) else None
                if new is not None:
                    replaced.setdefault(p, self.state[p])
                    self.state[p] = new

    hook = self.register_state_dict_pre_hook(convert)  # runs after the user's hooks, which may mark parameters
    try:
        return Optimizer.state_dict(self)
    finally:
        hook.remove()
        self.state.update(replaced)


def load_state_dict(self: ManifoldOptimizer, state_dict: dict[str, Any]) -> None:
    """Load the state of an optimizer, as in torch.optim.

    torch casts every entry to the dtype of its parameter. For marked parameters in bfloat16 or float16, moments and
    master copies are loaded in float32. The record of the constraint is loaded unchanged.
    """
    track_constraints(self, _params_of(self))
    loaded: dict[str, Any] = {}
    hooks = (
        self.register_load_state_dict_pre_hook(lambda _, given: loaded.update(given)),
        self.register_load_state_dict_post_hook(lambda _: _restore_dtypes(self, loaded), prepend=True),
    )
    try:
        Optimizer.load_state_dict(self, state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def _params_of(optimizer: ManifoldOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _restore_dtypes(optimizer: ManifoldOptimizer, loaded: dict[str, Any]) -> None:
    """Copy records and float32 state from a loaded dictionary again, which torch has cast."""
    ids, parameters = (
        itertools.chain.from_iterable(group["params"] for group in groups)
        for groups in (loaded["param_groups"], optimizer.param_groups)
    )
    for key, parameter in zip(ids, parameters, strict=True):
        saved = loaded["state"].get(key, {})
        if CONSTRAINED in saved and record_from_tensor(saved[CONSTRAINED]) is not None:
            optimizer.state[parameter][CONSTRAINED] = saved[CONSTRAINED].to("cpu", torch.float32, copy=True)
        constraint = constraint_of(parameter)
        if constraint is None or parameter.dtype not in LOW_PRECISION:
            continue
        for name in (*optimizer._algorithm.state_keys, MASTER, *constraint.state_keys):
            if isinstance(saved.get(name), Tensor):
                optimizer.state[parameter][name] = saved[name].to(parameter.device, torch.float32, copy=True)


def check_checkpoint(optimizer: ManifoldOptimizer, loaded: dict[str, Any]) -> None:
    """Raise a ValueError unless the parameters are marked as they were when the checkpoint was saved.

    An optimizer that is being copied or unpickled has no ``param_groups`` yet, and is not checked.
    """
    if not hasattr(optimizer, "param_groups"):
        return
    name = type(optimizer).__name__
    groups, states = loaded.get("param_groups", optimizer.param_groups), loaded.get("state", optimizer.state)
    older = _records_of_groups(groups)
    for index, group in enumerate(groups):
        for position, parameter in enumerate(group["params"]):
            state, now = states.get(parameter, {}), constraint_of(parameter)
            if CONSTRAINED not in state:
                continue
            saved = record_from_tensor(state[CONSTRAINED]) or older.get(parameter)
            if saved is None and now is None:
                raise ValueError(
                    f"{name}: the state of a parameter of shape {describe_param(group, parameter)} is held under a "
                    "constraint, which the groups beside it do not name; here it is not marked. Mark it as it was "
                    "before loading."
                )
            if saved is not None and not is_record_of(saved, now):
                label = f" ({group['param_names'][position]})" if "param_names" in group else ""
                raise ValueError(
                    f"{name}: the checkpoint was written with parameter {position} of group {index}{label}, shape "
                    f"{tuple(parameter.shape)}, marked as {format_constraint(saved)}; here it is "
                    f"{'not marked' if now is None else now}. "
                    "Mark it as it was before loading; it can be unmarked, or marked otherwise, afterwards."
                )


def upgrade(optimizer: ManifoldOptimizer) -> None:
    """Write the record of the constraint into state that was saved by an earlier version.

    Earlier versions saved a single number in its place, and ``(position, name, ...)`` in ``group["constraints"]``.
    State without either belongs to the current constraint.
    """
    older = _records_of_groups(optimizer.param_groups)
    for group in optimizer.param_groups:
        group.pop("constraints", None)
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            if CONSTRAINED in state and record_from_tensor(state[CONSTRAINED]) is None:
                record = older.get(parameter) or serialize(constraint_of(parameter))
                if record is not None:
                    state[CONSTRAINED] = record_to_tensor(record)


def _records_of_groups(groups: list[Group]) -> dict[Tensor, Record]:
    return {
        group["params"][position]: to_tuples(record)
        for group in groups
        for position, *record in group.get("constraints", ())
    }
