"""At the door: everything is refused that cannot be kept later, with the remedy, before anything is written."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..manifolds import Manifold
from ..manifolds.layout import overlap_problem
from .persistence import forget, forget_module_constraints, record, update_records
from .tag import DTYPES, constraint_of, find_off_manifold, is_sharded, set_constraint, was_unmarked, write_points_

T = TypeVar("T", bound=Tensor)


def param_label(target: Any, name: Any) -> str:
    """What a parameter is called in a message."""
    return f"{type(target).__name__}.{name}" if isinstance(target, nn.Module) else "the parameter"


def mark(function: str, target: Any, name: Any, parameter: T, constraint: Manifold) -> T:
    """Mark one parameter, given as ``(module, name)`` or by itself, that has been checked."""
    _project_and_tag(function, [(parameter, constraint, param_label(target, name))])
    if isinstance(target, nn.Module):
        _remember(target, [(parameter, constraint, name)])
    return parameter


def constrain_all(function: str, module: nn.Module, found: Sequence[tuple[nn.Parameter, Manifold, str]]) -> list[str]:
    """Mark parameters that have been found inside a module and checked; their names."""
    _project_and_tag(function, found)
    _remember(module, found)
    return [label for _, _, label in found]


M = TypeVar("M", Tensor, nn.Module)


def unmark(target: M, name: str | None = None) -> M:
    """Take the constraint off a parameter, or off all parameters of a module; values stay.

    A geoopt.ManifoldParameter gets the Euclidean manifold. The moments that an optimizer has are converted to those of
    torch.optim by its next step, or when its state is saved.

    Args:
        target: any tensor, or a module.
        name: name of one parameter of the module, dots allowed. Without it all are unmarked.

    Returns:
        The same object, which trains as torch would train it.

    Raises:
        TypeError: neither a tensor nor a module.
        ValueError: a module has no parameter of that name, or a tensor is given a name.

    >>> import torch
    >>> from manifold_opt import constraint_of, mark_recurrent, unmark
    >>> rnn = torch.nn.RNN(3, 4)
    >>> _ = mark_recurrent(rnn)
    >>> constraint_of(unmark(rnn))
    {}
    """
    if not isinstance(target, (nn.Module, Tensor)):
        raise TypeError(f"unmark: needs a parameter or a module, got {type(target).__name__}.")
    if isinstance(target, nn.Module) and name is not None:
        forget([get_parameter("unmark", target, name)])
    elif name is not None:
        raise ValueError("unmark: a tensor takes no name; give unmark(param).")
    elif isinstance(target, nn.Module):
        forget_module_constraints(target)
    else:
        forget([target])
    return target


def marked(function: str, target: Any, name: Any, constraint: Manifold) -> Any:
    """Check and mark a parameter that is given as ``(param)`` or ``(module, name)``."""
    if not isinstance(target, nn.Module) and name is not None:
        raise ValueError(f"{function}: a tensor takes no name; give {function}(param).")
    parameter = get_parameter(function, target, name) if isinstance(target, nn.Module) else target
    validate_parameter(function, parameter, constraint, param_label(target, name))
    return mark(function, target, name, parameter, constraint)


def _remember(module: nn.Module, found: Sequence[tuple[Tensor, Manifold, str]]) -> None:
    """Let the modules inside a module remember marks under all names of each parameter: it may be tied."""
    names: dict[int, set[str]] = {id(parameter): {name} for parameter, _, name in found}
    for key, p in module.named_parameters(remove_duplicate=False):
        if id(p) in names:
            names[id(p)].add(key)
    for parameter, constraint, _ in found:
        for key in names[id(parameter)]:
            path, _, leaf = key.rpartition(".")
            label = key if path else f"{type(module).__name__}.{leaf}"
            owner = module.get_submodule(path)
            if owner._parameters.get(leaf) is parameter:  # not one that the module forwards from another
                record(owner, leaf, constraint, label)


def get_parameter(function: str, module: nn.Module, name: Any) -> nn.Parameter:
    """The parameter of a module by its name; a ValueError that says what there is, unless it is one."""
    if not isinstance(name, str):
        raise ValueError(
            f'{function}: a module needs the name of its parameter, as in {function}(gru, "weight_hh_l0").'
        )
    path, _, leaf = name.rpartition(".")
    kind = type(module).__name__
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    if owner is not None and (isinstance(owner, ParametrizationList) or is_parametrized(owner, leaf)):
        raise ValueError(
            f"{function}: {name} of {kind} is parametrized, so the weight is computed anew at every use and not "
            "trained itself. First call torch.nn.utils.parametrize.remove_parametrizations(module, name), which "
            "keeps its value, then mark it."
        )
    if owner is not None and f"{leaf}_mask" in owner._buffers and f"{leaf}_orig" in owner._parameters:
        raise ValueError(
            f"{function}: {name} of {kind} is pruned, so it is computed at every use from {leaf}_orig and its mask. "
            f"First call torch.nn.utils.prune.remove(module, {leaf!r}). Marking fills the zeros again."
        )
    value = getattr(owner, leaf, None)
    if not isinstance(value, nn.Parameter):
        known = ", ".join(key for key, _ in module.named_parameters()) or "none"
        raise ValueError(
            f"{function}: {kind} has no parameter {name!r}; it has {known}. (A weight that hooks compute is not "
            "one: first undo them with torch.nn.utils.remove_weight_norm or remove_spectral_norm.)"
        )
    return value


def validate_parameter(function: str, parameter: Tensor, constraint: Manifold, label: str) -> None:
    """Raise a ValueError that names the rule and the remedy, unless ``parameter`` can be so marked."""
    problem = _problem(parameter, constraint)
    if problem:
        raise ValueError(f"{function}: {label} {problem}")


def _problem(parameter: Tensor, constraint: Manifold) -> str | None:
    if not isinstance(parameter, Tensor):
        return f"must be a tensor or a module, got {type(parameter).__name__}."
    if is_lazy(parameter):
        return "is lazy and has no shape yet; run one batch through the module first."
    if is_sharded(parameter):
        return (
            "is sharded (a DTensor, or flat under FSDP1), so that no process has its matrices whole. Mark it before "
            "it is sharded, and leave it out, as with fully_shard(module, ignored_params={parameter})."
        )
    shape = tuple(parameter.shape)
    if not parameter.is_leaf:
        return (
            "is not a leaf: it is computed from other tensors, like the weight of a parametrized module, and an "
            "optimizer cannot move it. Remove the parametrization first (torch.nn.utils.parametrize."
            "remove_parametrizations keeps the value; torch.nn.utils.remove_weight_norm for old hooks, and "
            "torch.nn.utils.prune.remove for a pruned weight)."
        )
    if not isinstance(parameter, nn.Parameter) and not parameter.requires_grad:
        return (
            "is neither an nn.Parameter nor a tensor that requires a gradient, like a buffer or param.data; mark the "
            "parameter itself."
        )
    if parameter.layout is not torch.strided:
        return f"is sparse ({parameter.layout}); only dense parameters can be marked. Use .to_dense()."
    if parameter.dtype not in DTYPES:
        return (
            f"has dtype {parameter.dtype}; only these can be marked: float32, float64, bfloat16, float16, complex64, "
            "complex128. Replace it: module.weight = nn.Parameter(module.weight.float())."
        )
    if parameter.is_complex() and not constraint.allows_complex:
        return f"has dtype {parameter.dtype}; {type(constraint).__name__} is for real parameters."
    if parameter.numel() == 0:
        return f"is empty, shape {shape}."
    problem = overlap_problem(parameter) or constraint.invalid_reason(parameter)
    if problem:
        return problem
    present = constraint_of(parameter)
    if present is not None and present != constraint:
        return f"is already marked as {present}, not {constraint}; call unmark on it first."
    return None


@torch.no_grad()
def _project_and_tag(function: str, marks: Iterable[tuple[Tensor, Manifold, str]]) -> None:
    """Project and mark all, or none."""
    marks = list(marks)
    projected = []
    for parameter, constraint, label in marks:
        try:
            projected.append(find_off_manifold(parameter, constraint))
        except ValueError as refusal:
            raise ValueError(f"{function}: {label}: {refusal}") from None
    for (parameter, constraint, _), found in zip(marks, projected, strict=True):
        write_points_(parameter, found)
        again = was_unmarked(parameter)
        set_constraint(parameter, constraint)
        if again:
            update_records(parameter)
