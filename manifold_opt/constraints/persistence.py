"""How a mark comes along when a parameter becomes another one: copied, sent to a process, loaded in its place.

torch rebuilds a parameter in many places, and attributes of the old one are not always handed on. What this package
adds to that, once, when it is imported: ``copy.deepcopy`` of a parameter, and its way to another process, keep the
mark. And a module that was marked by name remembers that. The parameter that stands there after ``load_state_dict``, or
when an optimizer is built, is marked too; :func:`~manifold_opt.check` can tell where a mark has been lost.
"""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, Protocol

from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor
from torch.serialization import add_safe_globals

from ..manifolds import MANIFOLDS, Manifold
from .tag import constraint_of, free, is_sharded, set_constraint, was_unmarked

_RECORD = "_manifold_opt_record"
_lock = threading.RLock()  # of what follows: modules are copied and marked in several threads


class ConstraintTable(Protocol):
    """What an optimizer remembers of its parameters: the constraint of each, None for one that was unmarked."""

    constraints: dict[Tensor, Manifold | None]


class ModuleRecord:
    """Which parameters of a module have been marked by name.

    It holds the module's own dictionary of parameters, and none beside it, so that a parameter which has been replaced
    is freed, and is not saved with the module. A copy or a pickle of a module brings the record of that dictionary's
    copy.

    Attributes:
        parameters: the module's own, by name.
        constraints: by name; None of a parameter that unmark has freed.
        labels: what a message calls each.
    """

    def __init__(self, parameters: dict[str, nn.Parameter | None]) -> None:
        self.parameters = parameters
        self.constraints: dict[str, Manifold | None] = {}
        self.labels: dict[str, str] = {}
        _register(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register(self)


_records: weakref.WeakSet[ModuleRecord] = weakref.WeakSet()  # of all modules that are alive
_tables: weakref.WeakSet[ConstraintTable] = weakref.WeakSet()  # of all optimizers that are alive


def _register(record: ModuleRecord) -> None:
    with _lock:
        _records.add(record)


def register_table(table: ConstraintTable) -> None:
    """Let ``table.constraints`` be changed where a parameter in it is unmarked."""
    with _lock:
        _tables.add(table)


def record(module: nn.Module, name: str, constraint: Manifold, label: str) -> None:
    """Remember in a module that its own parameter ``name`` has been marked."""
    with _lock:
        if _RECORD not in module.__dict__:
            module.__dict__[_RECORD] = ModuleRecord(module._parameters)
            module.register_load_state_dict_post_hook(restore)  # type: ignore[no-untyped-call]
        known: ModuleRecord = module.__dict__[_RECORD]
        known.constraints[name], known.labels[name] = constraint, label


def _record_of(module: nn.Module) -> ModuleRecord | None:
    known: ModuleRecord | None = module.__dict__.get(_RECORD)
    if known is not None and known.parameters is not module._parameters:  # handed on by a module made of another
        own = ModuleRecord(module._parameters)
        own.constraints, own.labels = dict(known.constraints), dict(known.labels)
        known = module.__dict__[_RECORD] = own
    return known


def module_records(module: nn.Module) -> dict[str, Manifold]:
    """What a module remembers, by the names of its own parameters."""
    known = _record_of(module)
    if known is None:
        return {}
    return {name: constraint for name, constraint in known.constraints.items() if constraint is not None}


def has_records(model: nn.Module) -> bool:
    """Whether a parameter of a model has been marked by name once, whatever has become of it."""
    return any(_RECORD in module.__dict__ for module in model.modules())


def restore(module: nn.Module, *_: Any) -> None:
    """Mark the parameters that a module remembers, where others have taken their place or a load has dropped the mark.

    One that unmark has freed stays free. A shard cannot be marked.
    """
    known = _record_of(module)
    if known is None:
        return
    for name, constraint in known.constraints.items():
        now = module._parameters.get(name)
        if now is None or constraint_of(now) is not None or was_unmarked(now) or is_sharded(now):
            continue
        if constraint is None:
            free(now)
        else:
            set_constraint(now, constraint)


def restore_all(model: nn.Module) -> None:
    """Mark what the modules inside a model remember and have lost, as :func:`restore` does for one of them."""
    for module in model.modules():
        restore(module)


def remembered(parameters: Iterable[Tensor]) -> dict[int, tuple[str, Manifold | None]]:
    """Return by id which of the parameters stand where a module remembers a mark: a name and the constraint.

    The constraint is None where :func:`~manifold_opt.unmark` has freed the parameter.
    """
    return {
        id(known.parameters[name]): (known.labels[name], known.constraints[name]) for known, name in _places(parameters)
    }


def _places(parameters: Iterable[Tensor]) -> list[tuple[ModuleRecord, str]]:
    """Records that remember one of these parameters, and under which name.

    All records are searched every time, because torch does not report that a parameter has been replaced.
    """
    ids = set(map(id, parameters))
    with _lock:
        return [
            (known, name) for known in _records for name in known.constraints if id(known.parameters.get(name)) in ids
        ]


def forget(parameters: Iterable[Tensor]) -> None:
    """Let no module and no optimizer miss the mark of parameters, and tag each that has or had one as freed."""
    parameters = list(parameters)
    known = {id(known.parameters[name]) for known, name in _set_in_records(parameters, None)}
    with _lock:
        for table in _tables:
            for p in table.constraints.keys() & set(parameters):
                table.constraints[p] = None
                known.add(id(p))
    for p in parameters:
        if constraint_of(p) is not None or id(p) in known:
            free(p)


def update_records(parameter: Tensor) -> None:
    """Let the modules that remember a parameter remember it as it is marked now."""
    _set_in_records([parameter], constraint_of(parameter))


def _set_in_records(parameters: list[Tensor], constraint: Manifold | None) -> list[tuple[ModuleRecord, str]]:
    places = _places(parameters)
    for known, name in places:
        known.constraints[name] = constraint
    return places


def forget_module_constraints(module: nn.Module) -> None:
    """The same of every parameter of a module, and of what it and its submodules remember and have no more."""
    forget(module.parameters())
    for child in module.modules():
        known = _record_of(child)
        if known is not None:
            known.constraints = dict.fromkeys(known.constraints)


def sharded_constraints(parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, str, Manifold]]:
    """Shards that stand where a module remembers a marked parameter: each with its name there, and the constraint.

    FSDP2, tensor parallel and replicate put a DTensor there; FSDP1 has one flat parameter, which says of what.
    """
    shards = [p for p in parameters if is_sharded(p)]
    if not shards:
        return
    places = remembered(shards)
    for p in shards:
        label, kept = places.get(id(p), ("", None))
        if kept is not None:
            yield p, label, kept
        for info in (*getattr(p, "_param_infos", ()), *getattr(p, "_shared_param_infos", ())):
            constraint = module_records(info.module).get(info.param_name)
            if constraint is not None:
                yield p, info.module.__dict__[_RECORD].labels[info.param_name], constraint


_deepcopy = nn.Parameter.__deepcopy__


@functools.wraps(_deepcopy)
def _deepcopy_with_mark(self: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    copied: nn.Parameter = _deepcopy(self, memo)  # type: ignore[no-untyped-call]
    constraint = constraint_of(self)
    if constraint is not None:
        set_constraint(copied, copy.deepcopy(constraint, memo))  # what is learnt of it is the copy's own
    elif was_unmarked(self):
        free(copied)
    return copied


def _reduce_with_mark(parameter: nn.Parameter) -> Any:
    constraint, unmarked = constraint_of(parameter), was_unmarked(parameter)
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
add_safe_globals(list(MANIFOLDS.values()))  # of parameters that were saved with the constraint itself as their mark
