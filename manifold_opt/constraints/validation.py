"""Validation of parameters before marking: reject those that cannot stay on a manifold, before changing any."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized

from ..manifolds import Manifold
from ..manifolds.layout import overlap_problem
from ..manifolds.shards import is_dtensor, placement_problem, unsharded_like
from .persistence import forget_constraints, forget_module_constraints, record_on_module, update_records
from .tag import DTYPES, constraint_of, find_off_manifold, is_flattened, set_constraint, was_unmarked, write_points_

T = TypeVar("T", bound=Tensor)


def param_label(target: Any, name: Any) -> str:
    """Return the name of a parameter for a message."""
    return f"{type(target).__name__}.{name}" if isinstance(target, nn.Module) else "the parameter"


def constrain(caller: str, target: Any, name: Any, parameter: T, constraint: Manifold) -> T:
    """Mark one validated parameter, given as ``(module, name)`` or by itself."""
    project_and_tag(caller, [(parameter, constraint, param_label(target, name))])
    if isinstance(target, nn.Module):
        _record_on_modules(target, [(parameter, constraint, name)])
    return parameter


def constrain_all(caller: str, module: nn.Module, found: Sequence[tuple[nn.Parameter, Manifold, str]]) -> list[str]:
    """Mark validated parameters of a module and return their names."""
    project_and_tag(caller, found)
    _record_on_modules(module, found)
    return [label for _, _, label in found]


M = TypeVar("M", Tensor, nn.Module)


def unmark(target: M, name: str | None = None) -> M:
    """Remove the constraint of a parameter, or of all parameters of a module; values do not change.

    A geoopt.ManifoldParameter gets the Euclidean manifold. An optimizer converts its moments to those of torch.optim in
    its next step, or when its state is saved.

    Args:
        target: any tensor, or a module.
        name: name of one parameter of the module, dots allowed. Defaults to all parameters.

    Returns:
        The same object, which trains as with torch.optim.

    Raises:
        TypeError: ``target`` is neither a tensor nor a module.
        ValueError: the module has no parameter of that name, or a name is given with a tensor.

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
        forget_constraints([get_parameter("unmark", target, name)])
    elif name is not None:
        raise ValueError("unmark: a tensor takes no name; give unmark(param).")
    elif isinstance(target, nn.Module):
        forget_module_constraints(target)
    else:
        forget_constraints([target])
    return target


def validate_and_constrain(caller: str, target: Any, name: Any, constraint: Manifold) -> Any:
    """Validate and mark a parameter, given as ``(param)`` or ``(module, name)``."""
    if not isinstance(target, nn.Module) and name is not None:
        raise ValueError(f"{caller}: a tensor takes no name; give {caller}(param).")
    parameter = get_parameter(caller, target, name) if isinstance(target, nn.Module) else target
    validate_parameter(caller, parameter, constraint, param_label(target, name))
    return constrain(caller, target, name, parameter, constraint)


def _record_on_modules(module: nn.Module, found: Sequence[tuple[Tensor, Manifold, str]]) -> None:
    """Record marks in the modules that own the parameters, under all names of a tied parameter."""
    names: dict[int, set[str]] = {id(parameter): {name} for parameter, _, name in found}
    for key, p in module.named_parameters(remove_duplicate=False):
        if id(p) in names:
            names[id(p)].add(key)
    for parameter, constraint, _ in found:
        for key in names[id(parameter)]:
            path, _, leaf = key.rpartition(".")
            label = key if path else f"{type(module).__name__}.{leaf}"
            owner = module.get_submodule(path)
            if owner._parameters.get(leaf) is parameter:  # not an attribute that forwards to another module
                record_on_module(owner, leaf, constraint, label)


def get_parameter(caller: str, module: nn.Module, name: Any) -> nn.Parameter:
    """Return the parameter of a module by name; raise a ValueError that lists its parameters if there is none."""
    if not isinstance(name, str):
        raise ValueError(f'{caller}: a module needs the name of its parameter, as in {caller}(gru, "weight_hh_l0").')
    path, _, leaf = name.rpartition(".")
    kind = type(module).__name__
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    if owner is not None and (isinstance(owner, ParametrizationList) or is_parametrized(owner, leaf)):
        raise ValueError(
            f"{caller}: {name} of {kind} is parametrized, so the weight is computed anew at every use and not "
            "trained itself. First call torch.nn.utils.parametrize.remove_parametrizations(module, name), which "
            "keeps its value, then mark it."
        )
    if owner is not None and f"{leaf}_mask" in owner._buffers and f"{leaf}_orig" in owner._parameters:
        raise ValueError(
            f"{caller}: {name} of {kind} is pruned, so it is computed at every use from {leaf}_orig and its mask. "
            f"First call torch.nn.utils.prune.remove(module, {leaf!r}). Marking fills the zeros again."
        )
    value = getattr(owner, leaf, None)
    if not isinstance(value, nn.Parameter):
        known = ", ".join(key for key, _ in module.named_parameters()) or "none"
        raise ValueError(
            f"{caller}: {kind} has no parameter {name!r}; it has {known}. (A weight that hooks compute is not "
            "one: first undo them with torch.nn.utils.remove_weight_norm or remove_spectral_norm.)"
        )
    return value


def validate_parameter(caller: str, parameter: Tensor, constraint: Manifold, label: str) -> None:
    """Raise a ValueError that names the rule and the remedy if ``parameter`` cannot be marked."""
    reason = _invalid_reason(parameter, constraint)
    if reason:
        raise ValueError(f"{caller}: {label} {reason}")


def _invalid_reason(parameter: Tensor, constraint: Manifold) -> str | None:
    """Return why a parameter cannot be marked, to follow its name in an error message, or None."""
    if not isinstance(parameter, Tensor):
        return f"must be a tensor or a module, got {type(parameter).__name__}."
    if is_lazy(parameter):
        return "is lazy and has no shape yet; run one batch through the module first."
    if is_flattened(parameter):
        return (
            "is a part of a flat parameter of FSDP1, which does not keep its matrices. Shard the model with "
            "torch.distributed.fsdp.fully_shard (FSDP2) instead, or mark it before it is wrapped, and leave it out "
            "with FullyShardedDataParallel(model, ignored_modules=[module])."
        )
    if is_dtensor(parameter) and (problem := placement_problem(parameter)):
        return problem
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
    reason = overlap_problem(parameter) or constraint.invalid_reason(unsharded_like(parameter))
    if reason:
        return reason
    present = constraint_of(parameter)
    if present is not None and present != constraint:
        return f"is already marked as {present}, not {constraint}; call unmark on it first."
    return None


@torch.no_grad()
def project_and_tag(caller: str, marks: Iterable[tuple[Tensor, Manifold, str]]) -> None:
    """Project and mark all parameters, or none if one has no nearest point."""
    marks = list(marks)
    projected = []
    for parameter, constraint, label in marks:
        try:
            projected.append(find_off_manifold(parameter, constraint))
        except ValueError as error:
            raise ValueError(f"{caller}: {label}: {error}") from None
    for (parameter, constraint, _), found in zip(marks, projected, strict=True):
        write_points_(parameter, found)
        unmarked_before = was_unmarked(parameter)
        set_constraint(parameter, constraint)
        if unmarked_before:
            update_records(parameter)
