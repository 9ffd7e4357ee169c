"""How a mark comes along when a parameter becomes another one: copied, sent to a process, loaded in its place.

torch rebuilds a parameter in many places, and attributes of the old one are not always handed on. What this package
adds to that, once, when it is imported: ``copy.deepcopy`` of a parameter, and its way to another process, keep the
mark. And a module that was marked by name remembers that, so that the parameter which ``load_state_dict`` leaves there
is marked too, and :func:`~manifold_opt.check` and the optimizers can tell where a mark has been lost.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor

from .constraint import attach, constraint_of, free, is_sharded, was_unmarked
from .manifolds import Manifold

_RECORD = "_manifold_opt_record"


class ModuleRecord:
    """Which parameters of a module have been marked by name.

    It holds no tensor, so that a parameter which has been replaced is freed, and is not saved with the module. It is
    copied and pickled along with the module.

    Attributes:
        constraints: by the names of the module's own parameters; None for one that unmark has freed.
        module: a weak reference to the module.
    """

    def __init__(self, module: nn.Module | None, constraints: dict[str, Manifold | None] | None = None) -> None:
        self.constraints = {} if constraints is None else constraints
        self.module = None if module is None else weakref.ref(module)
        _records.add(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModuleRecord:
        module = None if self.module is None else self.module()
        return ModuleRecord(memo.get(id(module)), copy.deepcopy(self.constraints, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # The module itself, which is being pickled and so is a reference only.
        return ModuleRecord, (None if self.module is None else self.module(), self.constraints)

    def parameter(self, name: str) -> Tensor | None:
        """The parameter that the module has under a name now, None if there is none."""
        module = None if self.module is None else self.module()
        return None if module is None else module._parameters.get(name)


_records: weakref.WeakSet[ModuleRecord] = weakref.WeakSet()  # of all modules that are alive


def record(module: nn.Module, name: str, constraint: Manifold) -> None:
    """Remember in a module that its own parameter ``name`` has been marked."""
    if _RECORD not in module.__dict__:
        module.__dict__[_RECORD] = ModuleRecord(module)
        module.register_load_state_dict_post_hook(restore)  # type: ignore[no-untyped-call]
    module.__dict__[_RECORD].constraints[name] = constraint


def records_of(module: nn.Module) -> dict[str, Manifold]:
    """What a module remembers, by the names of its own parameters."""
    if _RECORD not in module.__dict__:
        return {}
    return {name: known for name, known in module.__dict__[_RECORD].constraints.items() if known is not None}


def restore(module: nn.Module, *_: Any) -> None:
    """Mark parameters that have been marked and have lost it, or that have taken the place of marked ones.

    One that unmark has freed stays free. A shard cannot be marked.
    """
    for name, constraint in records_of(module).items():
        now = module._parameters.get(name)
        if now is not None and constraint_of(now) is None and not was_unmarked(now) and not is_sharded(now):
            attach(now, constraint)


def marked_otherwise(parameters: Iterable[Tensor]) -> None:
    """Let the modules that remember these parameters remember them as they are marked now; None where they are free."""
    changed = {id(p): constraint_of(p) for p in parameters}
    for known in list(_records):
        for name in known.constraints:
            now = known.parameter(name)
            if now is not None and id(now) in changed:
                known.constraints[name] = changed[id(now)]


def unmark_module(module: nn.Module) -> None:
    """Free every parameter of a module, and let it and its submodules miss none."""
    for parameter in module.parameters():
        free(parameter)
    for child in module.modules():
        known = child.__dict__.get(_RECORD)
        if known is not None:
            known.constraints = dict.fromkeys(known.constraints)
    marked_otherwise(module.parameters())


def sharded_marks(parameters: Iterable[Tensor]) -> Iterator[tuple[Tensor, str, Manifold]]:
    """Shards that stand where a module remembers a marked parameter: each with its name there, and the constraint.

    FSDP2, tensor parallel and replicate put a DTensor there; FSDP1 has one flat parameter, which says of what.
    """
    shards = {id(p): p for p in parameters if is_sharded(p)}
    if not shards:
        return
    for known in list(_records):
        for name, constraint in known.constraints.items():
            now = known.parameter(name)
            if constraint is not None and now is not None and id(now) in shards:
                assert known.module is not None
                yield now, f"{type(known.module()).__name__}.{name}", constraint
    for p in shards.values():
        for info in getattr(p, "_param_infos", ()):
            constraint = records_of(info.module).get(info.param_name)
            if constraint is not None:
                yield p, f"{type(info.module).__name__}.{info.param_name}", constraint


_deepcopy = nn.Parameter.__deepcopy__


@functools.wraps(_deepcopy)
def _deepcopy_with_mark(self: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    copied: nn.Parameter = _deepcopy(self, memo)  # type: ignore[no-untyped-call]
    constraint = constraint_of(self)
    if constraint is not None:
        attach(copied, copy.deepcopy(constraint, memo))  # what is learnt of it is the copy's own
    elif was_unmarked(self):
        free(copied)
    return copied


def _reduce_with_mark(parameter: nn.Parameter) -> Any:
    constraint = constraint_of(parameter)
    if constraint is None:
        return reduce_tensor(parameter)  # type: ignore[no-untyped-call]
    return _rebuild_with_mark, (constraint, *reduce_tensor(parameter))  # type: ignore[no-untyped-call]


def _rebuild_with_mark(constraint: Manifold, rebuild: Any, arguments: Any) -> Tensor:
    parameter: Tensor = rebuild(*arguments)
    attach(parameter, constraint)
    return parameter


nn.Parameter.__deepcopy__ = _deepcopy_with_mark  # type: ignore[method-assign, assignment]
ForkingPickler.register(nn.Parameter, _reduce_with_mark)
