"""How a mark comes along when a parameter becomes another one: copied, sent to a process, loaded in its place.

torch rebuilds a parameter in many places, and attributes of the old one are not always handed on. What this package
adds to that, once, when it is imported: ``copy.deepcopy`` of a parameter, and its way to another process, keep the
mark. And a module that was marked by name remembers that, so that the parameter which
``load_state_dict(assign=True)`` puts there is marked too, and :func:`~manifold_opt.check` can tell where one has come
unnoticed.
"""

from __future__ import annotations

import copy
import functools
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import reduce_tensor

from .constraint import attach, constraint_of
from .manifolds import Manifold

_RECORDS = "_manifold_opt_records"
Record = tuple[Tensor, Manifold]


def record(module: nn.Module, name: str, parameter: Tensor, constraint: Manifold) -> None:
    """Remember in a module that its own parameter ``name`` has been marked; copied and pickled along with it."""
    if _RECORDS not in module.__dict__:
        module.__dict__[_RECORDS] = {}
        module.register_load_state_dict_post_hook(restore)  # type: ignore[no-untyped-call]
    module.__dict__[_RECORDS][name] = (parameter, constraint)


def records_of(module: nn.Module) -> dict[str, Record]:
    """What a module remembers, by the names of its own parameters."""
    records: dict[str, Record] = module.__dict__.get(_RECORDS, {})
    return records


def restore(module: nn.Module, *_: Any) -> None:
    """Mark the parameters that have taken the place of marked ones; one that unmark has freed stays free."""
    for name, (marked, _then) in list(records_of(module).items()):
        now, present = getattr(module, name, None), constraint_of(marked)
        if now is not marked and present is not None and isinstance(now, nn.Parameter):
            attach(now, present)
            record(module, name, now, present)


_deepcopy = nn.Parameter.__deepcopy__


@functools.wraps(_deepcopy)
def _deepcopy_with_mark(self: nn.Parameter, memo: dict[int, Any]) -> nn.Parameter:
    copied: nn.Parameter = _deepcopy(self, memo)  # type: ignore[no-untyped-call]
    constraint = constraint_of(self)
    if constraint is not None:
        attach(copied, copy.deepcopy(constraint, memo))  # what is learnt of it is the copy's own
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
