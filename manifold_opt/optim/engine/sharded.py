"""Steps of sharded parameters.

    agree -> gradients to the owners -> step of the inner optimizers (owned.py) -> parts back to the shards

``state_dict`` gathers moments and master copies to DTensors with the placements of their parameters. What a checkpoint
has put into the state is moved to the owners by the next step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...constraints.tag import TAG, constraint_of
from ...linalg.precision import working_dtype
from ...manifolds.shards import is_dtensor, local, ranks_of, sharded_mesh_dims
from ..options import MAX_GRAD_NORM, describe_param, validate_gradients
from .agreement import NOTHING, PARAMETERS, PLAN, VALUES, Agreement, Description
from .counters import NAMES
from .member import is_held, loaded_keys
from .optimizer import GRAD_SCALER_ATTRIBUTES, ManifoldOptimizer
from .owned import OwnedBlocks, State

Inputs = Any  # of torch's step of the unmarked parameters
Prepare = Callable[[ManifoldOptimizer], Inputs]


class Sharded:
    """All sharded parameters of an optimizer.

    Attributes:
        parameters: position of the group, and parameter.
        key: what the assignment to owners depends on.
        agreement: that of all DTensors of the optimizer.
        groups: process groups by ranks; those of ``old`` are used again.
        owned: their blocks, one entry per group of ranks.
    """

    def __init__(self, optimizer: ManifoldOptimizer, agreement: Agreement, old: Sharded | None) -> None:
        self.parameters, self.key, self.agreement = sharded_parameters(optimizer), _key(optimizer), agreement
        self._description: tuple[Any, Description] | None = None
        by_ranks: dict[tuple[int, ...], list[tuple[int, Any]]] = {}
        for position, p in self.parameters:
            by_ranks.setdefault(ranks_of(p), []).append((position, p))
        self.groups: dict[tuple[int, ...], Any] = {} if old is None else old.groups
        self.owned = []
        for ranks, some in sorted(by_ranks.items()):
            if ranks not in self.groups:
                self.groups[ranks] = _process_group(some[0][1])
            self.owned.append(OwnedBlocks(optimizer, some, self.groups[ranks]))

    def changes(self, optimizer: ManifoldOptimizer) -> int:
        """Return VALUES if a shard was written to, a state was loaded or an inner plan must be made; else NOTHING."""
        for owned in self.owned:
            owned.update_options(optimizer)
            plan = owned.inner._engine.plan
            owned.find_active()
            if owned.is_written() or plan is None or not plan.is_current(owned.inner):
                return VALUES
        return NOTHING if all(is_held(optimizer.state.get(p, {})) for _, p in self.parameters) else VALUES

    def describe(self, optimizer: ManifoldOptimizer) -> Description:
        """Describe a step with the groups and marks of the last one."""
        states = [optimizer.state.get(p, {}) for _, p in self.parameters]
        facts = [(p.grad is None, is_held(s), len(s)) for (_, p), s in zip(self.parameters, states, strict=True)]
        if self._description is None or self._description[0] != facts:
            self._description = facts, _describe(optimizer, self.parameters)
        return Description(_options(optimizer), self._description[1])

    def states(self, optimizer: ManifoldOptimizer) -> dict[Tensor, State]:
        """Return the states of all parameters in the form of a checkpoint. A collective."""
        return {m.parameter: state for owned in self.owned for m, state in owned.states(optimizer).items()}

    def total(self, name: str) -> float:
        """Return a count of the inner optimizers of all ranks. A collective."""
        return sum(owned.total(name) for owned in self.owned)

    @torch.no_grad()
    def step(self, optimizer: ManifoldOptimizer, step_constrained: Prepare) -> None:
        """Step the parts, and write them to the shards. A collective."""
        found_inf, error = getattr(optimizer, GRAD_SCALER_ATTRIBUTES[1], None), None
        for owned in self.owned:
            try:
                step_constrained(owned.inner)
            except Exception as problem:
                error = problem  # raised at the end: the other ranks wait for the parts
            owned.spread_values()
            for member in owned.active:
                state = optimizer.state[member.parameter]
                state.moments = owned.moments(optimizer, member)
                state["step"] += 1 if found_inf is None else 1 - found_inf.to(state["step"])
        if error is not None:
            raise error


def sharded_parameters(optimizer: ManifoldOptimizer) -> list[tuple[int, Any]]:
    """Return the marked parameters that are sharded, each with the position of its group."""
    return [
        (position, p)
        for position, group in enumerate(optimizer.param_groups)
        for p in group["params"]
        if is_dtensor(p) and constraint_of(p) is not None
    ]


def has_dtensors(optimizer: ManifoldOptimizer) -> bool:
    """Return True if any parameter is a DTensor, marked or not."""
    return bool(_dtensors(optimizer))


def _dtensors(optimizer: ManifoldOptimizer) -> list[Any]:
    """Return the parameters that are DTensors on a mesh to which this rank belongs."""
    everything = (p for group in optimizer.param_groups for p in group["params"] if is_dtensor(p))
    return [p for p in everything if p.device_mesh.get_coordinate() is not None]


@torch.no_grad()
def begin_step(
    optimizer: ManifoldOptimizer,
    check: Callable[[], None],
    prepare_others: Callable[[], Inputs],
    prepare: Prepare,
    *,
    is_current: bool,
) -> tuple[Sharded | None, Inputs]:
    """Agree with the other ranks, and send the gradients of marked DTensors to their owners. A collective.

    Args:
        optimizer: the optimizer, with DTensors.
        check: raises the errors of the step on this rank, before anything is written.
        prepare_others: prepares the step of the parameters that are not sharded, and returns its inputs. It may send
            something unless ``is_current``.
        prepare: prepares the step of an inner optimizer.
        is_current: whether groups and marks are those of the last step.

    Returns:
        The sharded parameters, None if none is marked; and the inputs of the step of the others.
    """
    engine, error, inputs = optimizer._engine, None, None
    known, changes = None, PARAMETERS
    try:  # an error is raised on all ranks: the others wait in the agreement
        check()  # marks parameters again that have replaced marked ones
        known, changes = _find_changes(optimizer, is_current)
        inputs = prepare_others() if is_current else None
    except Exception as problem:
        error, known = problem, None
    agreement, description = _agreement(optimizer, known)
    if agreement is None:
        if error is not None:
            raise error
        return None, prepare_others() if inputs is None else inputs
    engine.has_agreed = True
    changes = agreement.agree(description, error, changes)
    if changes == PARAMETERS:
        _assign_again(optimizer, agreement)
    sharded: Sharded | None = engine.sharded
    if sharded is None:
        return None, prepare_others() if inputs is None else inputs
    for owned in sharded.owned:
        owned.find_active()
        owned.update_options(optimizer)
    if not changes:
        for owned in sharded.owned:
            owned.collect_gradients()
            prepare(owned.inner)
        return sharded, inputs
    error = _take_changes(optimizer, sharded, prepare, is_written=changes >= VALUES)
    try:
        inputs = prepare_others() if inputs is None else inputs
    except Exception as problem:
        error = problem
    agreement.agree(Description([]), error)
    return sharded, inputs


def _find_changes(optimizer: ManifoldOptimizer, is_current: bool) -> tuple[Sharded | None, int]:
    """Return the sharded parameters if they are those of the last step, and what has changed since."""
    known: Sharded | None = optimizer._engine.sharded
    if known is not None and not is_current and known.key != _key(optimizer):
        known = None
    _check_gradients(optimizer, sharded_parameters(optimizer) if known is None else known.parameters)
    if known is None:
        return None, PARAMETERS
    return known, max(known.changes(optimizer), NOTHING if is_current else PLAN)


def _agreement(optimizer: ManifoldOptimizer, known: Sharded | None) -> tuple[Agreement | None, Description]:
    """Return the agreement of the ranks, None if nothing is to be agreed on, and what this rank is about to do."""
    engine = optimizer._engine
    if known is not None:
        return known.agreement, known.describe(optimizer)
    parameters, dtensors, old = sharded_parameters(optimizer), _dtensors(optimizer), engine.sharded
    description = Description(_options(optimizer), _describe(optimizer, parameters))
    if old is None and (not dtensors or (engine.has_agreed and not parameters)):
        return None, description
    return Agreement(dtensors) if old is None or dtensors else old.agreement, description


def _assign_again(optimizer: ManifoldOptimizer, agreement: Agreement) -> None:
    """Assign the blocks to owners anew. A collective."""
    old: Sharded | None = optimizer._engine.sharded
    if old is not None:
        release(optimizer, old)
    optimizer._engine.sharded = Sharded(optimizer, agreement, old) if sharded_parameters(optimizer) else None


def _take_changes(
    optimizer: ManifoldOptimizer, sharded: Sharded, prepare: Prepare, *, is_written: bool
) -> Exception | None:
    """Take up values and states that were written, and prepare the step; return the error of this rank."""
    error = None
    for owned in sharded.owned:
        if is_written:
            owned.collect_values(owned.active)
            owned.take_state(optimizer)
        owned.collect_gradients()
        try:
            prepare(owned.inner)
        except Exception as problem:
            error = problem
    return error


def release(optimizer: ManifoldOptimizer, sharded: Sharded) -> None:
    """Give the states back to the outer optimizer. A collective."""
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for p, state in sharded.states(optimizer).items():
        if id(p) in present:
            optimizer.state[p] = state
    optimizer._engine.counters.add({name: sharded.total(name) for name in NAMES})
    optimizer._engine.sharded = None


def _key(optimizer: ManifoldOptimizer) -> list[Any]:
    """Return what the assignment to owners depends on."""
    known = sharded_parameters(optimizer)
    facts = [(position, id(p), getattr(p, TAG, None), p.placements, p.shape, p.dtype) for position, p in known]
    return [len(optimizer.param_groups), *facts]


def _process_group(parameter: Any) -> Any:
    """Return the process group of the ranks that have shards of a parameter; None if this rank has the whole."""
    mesh, ranks = parameter.device_mesh, ranks_of(parameter)
    dims = [dim for dim in sharded_mesh_dims(parameter) if mesh.size(dim) > 1]
    if not dims:
        return None
    if len(dims) == 1:
        return mesh.get_group(dims[0])
    if len(ranks) == dist.get_world_size():
        return dist.group.WORLD
    return dist.new_group(list(ranks), use_local_synchronization=True)


def _describe(optimizer: ManifoldOptimizer, parameters: list[tuple[int, Any]]) -> Description:
    """Describe what this rank is about to do with each parameter."""
    entries = [("the optimizer", "new" if optimizer._engine.sharded is None else "one that has stepped")]
    for position, p in parameters:
        group = optimizer.param_groups[position]
        index = next(k for k, member in enumerate(group["params"]) if member is p)
        name = group["param_names"][index] if "param_names" in group else f"parameter {index} of group {position}"
        facts = [f"marked as {constraint_of(p)}", f"shape {tuple(p.shape)}", str(p.dtype), str(p.placements)]
        facts += ["without a gradient"] if p.grad is None else [f"with a gradient in {p.grad.dtype}"]
        state = optimizer.state.get(p, {})
        if not is_held(state):
            facts += [f"with loaded {', '.join(loaded_keys(state))}" if state else "without a state"]
        entries.append((name, ", ".join(facts)))
    return Description(entries)


def _options(optimizer: ManifoldOptimizer) -> list[tuple[str, str]]:
    """Return the options of every group that are numbers, strings or tuples of numbers."""
    plain = [{key: x for key, x in group.items() if _is_plain(x)} for group in optimizer.param_groups]
    return [(f"the options of group {k}", repr(options)) for k, options in enumerate(plain)]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def _check_gradients(optimizer: ManifoldOptimizer, parameters: list[tuple[int, Any]]) -> None:
    """Raise the errors of gradients on this rank."""
    name = type(optimizer).__name__
    scale, found_inf = (getattr(optimizer, key, None) for key in GRAD_SCALER_ATTRIBUTES)
    skips = found_inf is not None and float(found_inf) != 0  # the GradScaler skips this step
    for position, p in parameters:
        if p.grad is None:
            continue
        group = optimizer.param_groups[position]
        validate_gradients(name, group, [p], [p.grad])
        if group["nonfinite"] == "raise" and not skips:
            g = local(p.grad).to(working_dtype(p.dtype))
            g = g if scale is None else g / scale.to(g)
            if not float(torch.linalg.vector_norm(g)) <= MAX_GRAD_NORM[g.dtype]:
                raise FloatingPointError(
                    f"{name}: the gradient of a marked parameter of shape {describe_param(group, p)} is not finite or "
                    "overflows when squared (nonfinite='raise'). Nothing was changed."
                )
