"""Options of parameter groups, and validation of marked parameters and their gradients."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ..constraints.persistence import flattened_constraints, remembered_constraints
from ..constraints.tag import (
    DTYPES,
    constraint_of,
    free,
    is_flattened,
    set_constraint,
    tag_geoopt_parameter,
    was_unmarked,
)
from ..linalg.precision import full_precision, working_dtype
from ..linalg.products import Workspace
from ..manifolds import FixedSpectrum, Manifold
from ..manifolds.layout import get_points, overlap_problem, point_norm
from ..manifolds.shards import is_dtensor, placement_problem, unsharded_like, whole
from ..stiefel.retractions import OPTIONS as RETRACTION_OPTIONS
from ..stiefel.retractions import check_retraction
from .directions.adam import SECOND_MOMENTS
from .engine.optimizer import Group, ManifoldOptimizer

# Options of this package that torch.optim does not have.
OPTIONS = ("retraction", "metric", "orthogonal_lr_scale", "second_moment", "beta", "correction_steps", "nonfinite")
Nonfinite = Literal["skip", "raise"]
NONFINITE: tuple[str, ...] = get_args(Nonfinite)


def merge_into_groups(params: ParamsT, options: Group) -> ParamsT:
    """Add the options of this package to every group, where torch's constructors accept them."""
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return params  # torch raises the error
    groups: list[Any] = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    for group in groups:
        if isinstance(group, dict):  # torch raises an error for others
            for name, value in options.items():
                group.setdefault(name, value)
    return groups


def add_param_group(self: ManifoldOptimizer, param_group: Group) -> None:
    """Add a parameter group, as in torch.optim. The group may set any option of the constructor."""
    if isinstance(param_group, dict):
        if not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        param_group.pop("constraints", None)  # from a group of an earlier version; belongs to its state
        if hasattr(self, "_engine"):  # otherwise the constructor does it, once for all groups
            retag_parameters(self, _tensors_in(param_group["params"]))
        validate_group(self, {**self.defaults, **param_group})
    Optimizer.add_param_group(self, param_group)
    if hasattr(self, "_engine"):
        _store_constraints(self, self.param_groups[-1]["params"])


def retag_parameters(optimizer: ManifoldOptimizer, parameters: list[Tensor]) -> list[Tensor]:
    """Mark parameters again that have lost their mark, unless they were unmarked, and return them.

    A parameter was marked if the optimizer has stored its constraint: torch.utils.swap_tensors, which modules use for
    conversion and loading, drops attributes such as the mark. It was also marked if its module has stored a constraint
    for it.
    """
    bare = [p for p in parameters if constraint_of(p) is None and not was_unmarked(p) and not is_flattened(p)]
    places = remembered_constraints(bare) if bare else {}
    restored = []
    for p in bare:
        if p in optimizer._engine.constraints:
            constraint = optimizer._engine.constraints[p]
        elif id(p) in places and p.requires_grad:
            label, constraint = places[id(p)]
            if constraint is not None:
                validate_restored(type(optimizer).__name__, label, p, constraint)
        else:
            continue
        if constraint is None:
            free(p)
        else:
            set_constraint(p, constraint)
            restored.append(p)
    return restored


def validate_restored(name: str, label: str, parameter: Tensor, constraint: Manifold) -> None:
    """Raise a ValueError if a parameter cannot have the constraint that its module has stored."""
    problem = constraint.invalid_reason(unsharded_like(parameter))
    if parameter.dtype not in DTYPES:
        problem = f"has dtype {parameter.dtype}, which cannot be marked."
    if problem:
        raise ValueError(
            f"{name}: {label} was marked as {constraint}, and the parameter that has taken its place {problem} "
            "unmark(module, name) trains it unconstrained; mark it anew if it is to be constrained."
        )


def track_constraints(optimizer: ManifoldOptimizer, parameters: list[Tensor]) -> list[Tensor]:
    """Mark parameters again that have lost their mark and return them; store the constraints of all."""
    restored = retag_parameters(optimizer, parameters)
    _store_constraints(optimizer, parameters)
    return restored


def _store_constraints(optimizer: ManifoldOptimizer, parameters: list[Tensor]) -> None:
    for p in parameters:
        constraint = constraint_of(p)
        if constraint is not None:
            optimizer._engine.constraints[p] = constraint
            tag_geoopt_parameter(p)
        elif was_unmarked(p):
            optimizer._engine.constraints[p] = None
        else:
            optimizer._engine.constraints.pop(p, None)


def drop_stale_constraints(optimizer: ManifoldOptimizer) -> None:
    """Delete stored constraints of parameters that have left the optimizer, so that they are freed."""
    present = {id(p) for group in optimizer.param_groups for p in group["params"]}
    optimizer._engine.constraints = {
        p: constraint for p, constraint in optimizer._engine.constraints.items() if id(p) in present
    }


def validate_group(optimizer: ManifoldOptimizer, group: Group) -> None:
    """Raise a ValueError unless the options of a group are in range and supported for its parameters."""
    name = type(optimizer).__name__
    parameters = _tensors_in(group["params"])
    marked = [p for p in parameters if constraint_of(p) is not None]
    validate_options(name, group, marked=bool(marked))
    validate_unflattened(name, parameters)
    for parameter in marked:
        validate_marked(optimizer, parameter, group)


def validate_unflattened(name: str, parameters: list[Tensor]) -> None:
    """Raise a ValueError if a marked parameter has become a part of a flat parameter of FSDP1."""
    for _, label, constraint in flattened_constraints(parameters):
        raise ValueError(f"{name}: {label} {flattened_problem(constraint)}")


def flattened_problem(constraint: Manifold) -> str:
    """Return the problem with a flat parameter of FSDP1, as the end of a sentence that begins with its name."""
    return (
        f"was marked as {constraint} and is a part of a flat parameter of FSDP1 since, which does not keep its "
        "matrices. Shard the model with torch.distributed.fsdp.fully_shard (FSDP2) instead; or leave the layer out "
        "with FullyShardedDataParallel(model, ignored_modules=[module]) and average its gradient; or call unmark on it."
    )


def _tensors_in(members: Any) -> list[Tensor]:
    """Return the tensors in ``params`` of a new group, named or not. torch raises an error for anything else."""
    listed = [members] if isinstance(members, Tensor) else members
    tensors = (member[1] if isinstance(member, tuple) else member for member in listed)
    return [p for p in tensors if isinstance(p, Tensor)]


def validate_options(name: str, group: Group, *, marked: bool = True) -> None:
    """Raise a ValueError unless the options are in range, and supported for marked parameters if ``marked``."""
    if "retraction" in group:  # not in those of an optimizer with a retraction of its own
        options = {key: group[key] for key in RETRACTION_OPTIONS if key in group}
        check_retraction(name, group["retraction"], **options)
    if not 0 <= group["orthogonal_lr_scale"] < math.inf:
        raise ValueError(
            f"{name}: orthogonal_lr_scale must be finite and at least 0, got {group['orthogonal_lr_scale']}."
        )
    if group.get("second_moment", "element") not in SECOND_MOMENTS:
        raise ValueError(
            f"{name}: second_moment must be one of {', '.join(SECOND_MOMENTS)}, got {group['second_moment']!r}."
        )
    if group["nonfinite"] not in NONFINITE:
        raise ValueError(f"{name}: nonfinite must be one of {', '.join(NONFINITE)}, got {group['nonfinite']!r}.")
    if marked and group.get("differentiable"):
        raise ValueError(
            f"{name}: differentiable=True cannot be honoured for a marked parameter. "
            "Give the marked parameters a group of their own with differentiable=False."
        )


# Largest norm of the gradient of a point, also in the coordinates of its moments, for which no square overflows.
MAX_GRAD_NORM = {dtype: math.sqrt(torch.finfo(dtype).max) / 16 for dtype in DTYPES}


def describe_param(group: Group, parameter: Tensor) -> str:
    """Return the shape of a parameter and its name for a message.

    The name is that in the group, if the group has named parameters, or else that under which it was marked, if it was
    marked through its module.
    """
    named = zip(group.get("param_names", ()), group["params"], strict=False)
    name = next((name for name, p in named if p is parameter), None)
    if name is None:
        name, _ = remembered_constraints([parameter]).get(id(parameter), (None, None))
    return f"{tuple(parameter.shape)}" + (f" ({name})" if name else "")


def validate_marked(optimizer: ManifoldOptimizer, parameter: Tensor, group: Group) -> None:
    """Raise a ValueError unless dtype, shape, strides and options allow a step of a marked parameter."""
    name = type(optimizer).__name__
    if parameter.dtype not in DTYPES:
        raise ValueError(
            f"{name}: a marked parameter of shape {describe_param(group, parameter)} has dtype {parameter.dtype}; only "
            "float32, float64, bfloat16, float16, complex64 and complex128 can be kept on a manifold."
        )
    constraint = constraint_of(parameter)
    if constraint is not None and is_flattened(parameter):
        raise ValueError(
            f"{name}: a parameter of shape {describe_param(group, parameter)} {flattened_problem(constraint)}"
        )
    problem = placement_problem(parameter) if constraint is not None and is_dtensor(parameter) else None
    if constraint is not None and not problem:
        problem = overlap_problem(parameter) or constraint.invalid_reason(unsharded_like(parameter))
    if constraint is not None and not problem:
        problem = optimizer._algorithm.refusal(constraint, parameter)
    if problem:
        problem = f" {problem}".replace(f" has shape {tuple(parameter.shape)}", "", 1)  # the message names it already
        raise ValueError(f"{name}: a marked parameter of shape {describe_param(group, parameter)}{problem}")
    if constraint is not None and constraint.free_rows(parameter.shape):
        _validate_free_rows(name, parameter, group)
    if isinstance(constraint, FixedSpectrum) and constraint.side == "both" and group.get("second_moment") == "block":
        raise ValueError(
            f"{name}: second_moment='block' is not supported for a parameter of shape "
            f"{describe_param(group, parameter)} that is rotated on both sides. Mark it with side='left' or 'right', "
            "or use second_moment='element'."
        )


def _validate_free_rows(name: str, parameter: Tensor, group: Group) -> None:
    """Raise a ValueError for ``second_moment="block"`` with rows outside every block, which torch's step updates."""
    if group.get("second_moment") == "block":
        raise ValueError(
            f"{name}: second_moment='block' holds none for the rows of a parameter of shape "
            f"{describe_param(group, parameter)} that are not marked. Mark all of them, or make two parameters of it."
        )


def validate_gradients(name: str, group: Group, parameters: list[Tensor], gradients: list[Tensor]) -> None:
    """Raise a RuntimeError unless gradients are dense, with the size, dtype and device of their parameters."""
    if not all(g.layout is torch.strided for g in gradients):
        p = next(p for p, g in zip(parameters, gradients, strict=True) if g.layout is not torch.strided)
        raise RuntimeError(
            f"{name}: a marked parameter of shape {describe_param(group, p)} has a sparse gradient; it must be dense."
        )
    if list(map(Tensor.numel, parameters)) != list(map(Tensor.numel, gradients)):
        p, g = next((p, g) for p, g in zip(parameters, gradients, strict=True) if p.numel() != g.numel())
        raise RuntimeError(
            f"{name}: a marked parameter has shape {describe_param(group, p)}, its gradient {tuple(g.shape)}. Call "
            "zero_grad() after changing the shape of a parameter."
        )
    if not all(g.dtype == p.dtype and g.device == p.device for p, g in zip(parameters, gradients, strict=True)):
        p, g = next(
            (p, g) for p, g in zip(parameters, gradients, strict=True) if (g.dtype, g.device) != (p.dtype, p.device)
        )
        raise RuntimeError(
            f"{name}: a marked parameter of shape {describe_param(group, p)} is {p.dtype} on {p.device}, its gradient "
            f"{g.dtype} on {g.device}. Call zero_grad() after converting a model."
        )


@torch.no_grad()
def validate_finite_gradients(
    name: str, group: Group, parameters: list[Tensor], gradients: list[Tensor], scale: Tensor | None
) -> None:
    """Raise a FloatingPointError for the first point with a gradient that is not finite or overflows when squared.

    The gradient is tested as it is and, for manifolds whose coordinates may make it longer, also in the coordinates of
    its moments. Synchronizes with the device. Gradients are first divided by ``scale`` if a GradScaler left that to
    the step.
    """
    for p, scaled in zip(parameters, gradients, strict=True):
        g = whole(scaled).to(working_dtype(scaled.dtype))
        g = g if scale is None else g / scale.to(g)
        limit, constraint = MAX_GRAD_NORM[g.dtype], constraint_of(p)
        assert constraint is not None
        if constraint.frame_is_bounded and float(torch.linalg.vector_norm(g)) <= limit:
            continue
        offset = 0
        for layout in constraint.layouts(p.shape):
            points = get_points(layout, g)
            in_range = point_norm(points, layout.point_ndim) <= limit
            problem = "is not finite or overflows when squared"
            if bool(in_range.all()) and not constraint.frame_is_bounded:
                values = get_points(layout, p.detach()).to(g.dtype)
                in_range = _is_in_range_in_frame(constraint, values, points, layout.point_ndim)
                problem = "overflows in the coordinates of its moments"
            if not bool(in_range.all()):
                index = constraint.index_of(offset + int((~in_range).nonzero()[0, 0]))
                raise FloatingPointError(
                    f"{name}: the gradient of {constraint.point_name} {index} of a marked parameter of shape "
                    f"{describe_param(group, p)} {problem} (nonfinite='raise'). Nothing was changed."
                )
            offset += len(points)


def _is_in_range_in_frame(constraint: Manifold, x: Tensor, g: Tensor, point_ndim: int) -> Tensor:
    """Return a mask of the points whose gradient can be squared in the coordinates of its moments.

    Points that are not finite are not judged: they have an error of their own.
    """
    with full_precision({x.device.type}):
        a = constraint.frame_gradient(x, g, Workspace(None, x))
    in_range = point_norm(a, point_ndim) <= MAX_GRAD_NORM[x.dtype]
    return in_range | ~(point_norm(x, point_ndim) < math.inf)


def fill_options(optimizer: ManifoldOptimizer, loaded: dict[str, Any]) -> None:
    """Add missing options to loaded groups, from the groups that they replace.

    A checkpoint of torch.optim lacks the options of this package. A group that is loaded by name may lack all options,
    with which torch's next step would fail.
    """
    for k, group in enumerate(loaded.get("param_groups", ())):
        if "on_fault" in group:  # name of the option in earlier versions
            group["nonfinite"] = group.pop("on_fault")
        own = optimizer.param_groups[k] if hasattr(optimizer, "param_groups") else loaded["defaults"]
        for key in OPTIONS if "lr" in group else own:
            if key in own:
                group.setdefault(key, own[key])
