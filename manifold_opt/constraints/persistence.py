"""Persistence of marks when a parameter is copied, sent to another process or replaced by a load.

torch creates new parameters in many places and does not always copy their attributes. Importing this package therefore
patches ``copy.deepcopy`` of a parameter and its transfer to another process to keep the mark. A module also records
which of its parameters were marked by name. A parameter that replaces one of them is marked after ``load_state_dict``
or when an optimizer is created, and :func:`~manifold_opt.check` reports lost marks.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol, overload

from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor
from torch.serialization import add_safe_globals

from ..manifolds import MANIFOLDS, Manifold
from ..manifolds.shards import is_dtensor
from . import tag
from .tag import TAG, free, is_flattened, set_constraint, was_unmarked

_RECORD = "_manifold_opt_record"
_lock = threading.RLock()  # guards _records and _tables: threads may copy and mark modules concurrently


class ConstraintTable(Protocol):
    """An optimizer's table of constraints: that of each parameter, None for one that was unmarked."""

    constraints: dict[Tensor, Manifold | None]


class ModuleRecord:
    """Record of the parameters of a module that have been marked by name.

    It refers to the module's dictionary of parameters and not to the parameters, so that a replaced parameter is freed
    and is not saved with the module. A copy or a pickle of the module includes a record of the copied dictionary.

    Attributes:
        parameters: the module's dictionary of parameters.
        constraints: constraint by name; None for a parameter that was unmarked.
        labels: name in messages, by name.
    """

    def __init__(self, parameters: dict[str, nn.Parameter | None]) -> None:
        self.parameters = parameters
        self.constraints: dict[str, Manifold | None] = {}
        self.labels: dict[str, str] = {}
        _register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register(self)


_records: weakref.WeakSet[ModuleRecord] = weakref.WeakSet()  # of all live modules
_tables: weakref.WeakSet[ConstraintTable] = weakref.WeakSet()  # of all live optimizers


def _register(record: ModuleRecord) -> None:
    with _lock:
        _records.add(record)


def register_table(table: ConstraintTable) -> None:
    """Register a table, whose entry of a parameter becomes None when the parameter is unmarked."""
    with _lock:
        _tables.add(table)


def record_on_module(module: nn.Module, name: str, constraint: Manifold, label: str) -> None:
    """Record in a module that its parameter ``name`` has been marked."""
    with _lock:
        if _RECORD not in module.__dict__:
            module.__dict__[_RECORD] = ModuleRecord(module._parameters)
            module.register_load_state_dict_post_hook(restore_constraints)  # type: ignore[no-untyped-call]
        known: ModuleRecord = module.__dict__[_RECORD]
        known.constraints[name], known.labels[name] = constraint, label


def _record_of(module: nn.Module) -> ModuleRecord | None:
    """Return the record of a module, or None."""
    known: ModuleRecord | None = module.__dict__.get(_RECORD)
    if known is not None and known.parameters is not module._parameters:  # copied from another module
        copied = ModuleRecord(module._parameters)
        copied.constraints, copied.labels = dict(known.constraints), dict(known.labels)
        known = module.__dict__[_RECORD] = copied
    return known


def module_records(module: nn.Module) -> dict[str, Manifold]:
    """Return the recorded constraints of a module, by parameter name."""
    known = _record_of(module)
    if known is None:
        return {}
    return {name: constraint for name, constraint in known.constraints.items() if constraint is not None}


def has_records(model: nn.Module) -> bool:
    """Return True if a parameter of the model was ever marked by name, even if it was unmarked or replaced later."""
    return any(_RECORD in module.__dict__ for module in model.modules())


def restore_constraints(module: nn.Module, *_: Any) -> None:
    """Mark the recorded parameters of a module again if they were replaced or a load has dropped their mark.

    Unmarked parameters stay unmarked. Flat parameters of FSDP1 cannot be marked.
    """
    known = _record_of(module)
    if known is None:
        return
    for name, constraint in known.constraints.items():
        current = module._parameters.get(name)
        if current is None or tag.constraint_of(current) is not None or was_unmarked(current) or is_flattened(current):
            continue
        if constraint is None:
            free(current)
        else:
            set_constraint(current, constraint)


def restore_model(model: nn.Module) -> None:
    """Apply :func:`restore_constraints` to every module of a model, after :func:`reshard`."""
    reshard(model)
    for module in model.modules():
        restore_constraints(module)


def reshard(model: nn.Module) -> None:
    """Free parameters that FSDP2 has gathered, so that the modules have their sharded ones again.

    After a forward pass without a backward pass, the outermost module keeps temporary, unmarked copies in their place.
    """
    for module in model.modules():
        if hasattr(module, "reshard") and hasattr(module, "unshard"):  # of torch.distributed.fsdp.FSDPModule
            free_gathered: Callable[[], None] = module.reshard  # type: ignore[assignment]
            free_gathered()


def remembered_constraints(parameters: Iterable[Tensor]) -> dict[int, tuple[str, Manifold | None]]:
    """Return label and constraint, by id, of the parameters whose name is recorded in a module.

    The constraint is None if the parameter was unmarked.
    """
    return {
        id(known.parameters[name]): (known.labels[name], known.constraints[name])
        for known, name in _find_records(parameters)
    }


def _find_records(parameters: Iterable[Tensor]) -> list[tuple[ModuleRecord, str]]:
    """Return the records of these parameters, each with the parameter's name in it.

    All records are searched every time, because torch does not report that a parameter has been replaced.
    """
    ids = set(map(id, parameters))
    with _lock:
        return [
            (known, name) for known in _records for name in known.constraints if id(known.parameters.get(name)) in ids
        ]


@overload
def constraint_of(x: Tensor) -> Manifold | None: ...
@overload
def constraint_of(x: nn.Module) -> dict[str, Manifold]: ...
def constraint_of(x: Any) -> Any:
    """Return the constraint of a parameter, or those of all marked parameters of a module.

    ``fully_shard`` replaces parameters by DTensors. If the replaced one was marked by module and name, this function
    first marks the DTensor.

    Args:
        x: any tensor, or a module.

    Returns:
        An :class:`~manifold_opt.Orthogonal` or another :class:`~manifold_opt.Manifold`; None for an unmarked parameter.
        For a module, ``{name: constraint}`` for its marked parameters.

    Raises:
        TypeError: ``x`` is neither a tensor nor a module.

    >>> import torch
    >>> from manifold_opt import constraint_of, mark_orthogonal
    >>> gru = torch.nn.GRU(4, 4)
    >>> constraint_of(mark_orthogonal(gru, "weight_hh_l0"))
    Orthogonal(blocks=3, dim=0, gain=1.0)
    >>> constraint_of(gru)
    {'weight_hh_l0': Orthogonal(blocks=3, dim=0, gain=1.0)}
    """
    if isinstance(x, nn.Module):
        reshard(x)
    for p in x.parameters() if isinstance(x, nn.Module) else (x,):
        if is_dtensor(p) and not hasattr(p, TAG):
            for known, name in _find_records([p]):
                constraint = known.constraints[name]
                if constraint is not None:
                    set_constraint(p, constraint)
    return tag.constraint_of(x)


def forget_constraints(parameters: Iterable[Tensor]) -> None:
    """Unmark parameters, and set their entries in module records and optimizer tables to None."""
    parameters = list(parameters)
    known = {id(known.parameters[name]) for known, name in _set_in_records(parameters, None)}
    with _lock:
        for table in _tables:
            for p in table.constraints.keys() & set(parameters):
                table.constraints[p] = None
                known.add(id(p))
    for p in parameters:
        if tag.constraint_of(p) is not None or id(p) in known:
            free(p)


def update_records(parameter: Tensor) -> None:
    """Store the current constraint of a parameter in the module records that contain it."""
    _set_in_records([parameter], tag.constraint_of(parameter))


def _set_in_records(parameters: list[Tensor], constraint: Manifold | None) -> list[tuple[ModuleRecord, str]]:
    records = _find_records(parameters)
    for known, name in records:
        known.constraints[name] = constraint
    return records


def forget_module_constraints(module: nn.Module) -> None:
    """Unmark every parameter of a module, and clear its records, also those of parameters that no longer exist."""
    forget_constraints(module.parameters())
    for child in module.modules():
        known = _record_of(child)
        if known is not None:
            known.constraints = dict.fromkeys(known.constraints)


def flattened_constraints(parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, str, Manifold]]:
    """Yield the flat parameters of FSDP1 that replace a marked one, each with the recorded label and constraint."""
    shards = [p for p in parameters if is_flattened(p)]
    if not shards:
        return
    found = remembered_constraints(shards)
    for p in shards:
        label, recorded = found.get(id(p), ("", None))
        if recorded is not None:
            yield p, label, recorded
        for info in (*getattr(p, "_param_infos", ()), *getattr(p, "_shared_param_infos", ())):
            constraint = module_records(info.module).get(info.param_name)
            if constraint is not None:
                yield p, info.module.__dict__[_RECORD].labels[info.param_name], constraint


_deepcopy = nn.Parameter.__deepcopy__


@functools.wraps(_deepcopy)
def _deepcopy_with_mark(self: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    copied: nn.Parameter = _deepcopy(self, memo)  # type: ignore[no-untyped-call]
    constraint = tag.constraint_of(self)
    if constraint is not None:
        set_constraint(copied, copy.deepcopy(constraint, memo))  # learnable tensors of a manifold are copied too
    elif was_unmarked(self):
        free(copied)
    return copied


def _reduce_with_mark(parameter: nn.Parameter) -> Any:
    constraint, unmarked = tag.constraint_of(parameter), was_unmarked(parameter)
    if constraint is None and not unmarked:
        return reduce_tensor(parameter)  # type: ignore[no-untyped-call]
    return _rebuild_with_mark, (constraint, *reduce_tensor(parameter))  # type: ignore[no-untyped-call]


def _rebuild_with_mark(constraint: Manifold | None, rebuild: Any, arguments: Any) -> Tensor:
    parameter: Tensor = rebuild(*arguments)
    if constraint is None:
        free(parameter)
    else:
        set_constraint(parameter, constraint)
    return parameter


nn.Parameter.__deepcopy__ = _deepcopy_with_mark  # type: ignore[method-assign, assignment]
ForkingPickler.register(nn.Parameter, _reduce_with_mark)
add_safe_globals(list(MANIFOLDS.values()))  # older files have the constraint itself as the tag
