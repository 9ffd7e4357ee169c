"""What a parameter group may say about its marked parameters, and what is refused at the door."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from .constraint import DTYPES, constraint_of
from .direction import ADAM
from .retractions import check_retraction

Group = dict[str, Any]


def with_options(params: ParamsT, options: Group) -> ParamsT:
    """Put the package's options into every group: torch's constructors let them through there."""
    if isinstance(params, Tensor):
        return params  # torch says what is wrong with that
    groups: list[Any] = list(params)
    if groups and not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    for group in groups:
        for name, value in options.items():
            group.setdefault(name, value)
    return groups


def add_param_group(self: Optimizer, param_group: Group) -> None:
    """Add a parameter group, as in torch.optim; it may set any option of the constructor."""
    if isinstance(param_group, dict):
        if not isinstance(param_group["params"], (Tensor, set)):
            param_group["params"] = list(param_group["params"])
        check_group(type(self).__name__, {**self.defaults, **param_group})
    Optimizer.add_param_group(self, param_group)


def check_group(name: str, group: Group) -> None:
    """Raise a ValueError that names the remedy, unless the options are in range and its members can honour them."""
    members = group["params"]
    parameters = [member[1] if isinstance(member, tuple) else member for member in _listed(members)]
    marked = [p for p in parameters if isinstance(p, Tensor) and constraint_of(p) is not None]
    check_options(name, group, marked=bool(marked))
    for parameter in marked:
        check_marked(name, parameter)


def _listed(members: Any) -> Any:
    return [members] if isinstance(members, Tensor) else members


def check_options(name: str, group: Group, *, marked: bool = True) -> None:
    """Raise a ValueError that names the remedy, unless the options are in range and fit marked parameters."""
    options = {key: group[key] for key in ("metric", "beta", "correction_steps")}
    check_retraction(name, group["retraction"], **options)
    if not 0 <= group["orthogonal_lr_scale"] < math.inf:
        raise ValueError(
            f"{name}: orthogonal_lr_scale must be finite and at least 0, got {group['orthogonal_lr_scale']}."
        )
    if group.get("second_moment", "element") not in ADAM:
        raise ValueError(f"{name}: second_moment must be one of {', '.join(ADAM)}, got {group['second_moment']!r}.")
    for option in ("differentiable", "fused"):
        if marked and group.get(option):
            raise ValueError(
                f"{name}: {option}=True cannot be honoured for a marked parameter. "
                f"Give the marked parameters a group of their own with {option}=False."
            )


def check_marked(name: str, parameter: Tensor) -> None:
    """Raise a ValueError unless the dtype and the memory format let a marked parameter step."""
    shape = tuple(parameter.shape)
    if parameter.dtype not in DTYPES:
        raise ValueError(
            f"{name}: a marked parameter of shape {shape} has dtype {parameter.dtype}; only float32 and float64 "
            "can be kept orthogonal. Keep it in float32 and compute under torch.autocast."
        )
    constraint = constraint_of(parameter)
    try:
        _ = constraint is None or constraint.view(parameter.detach())
    except RuntimeError:
        raise ValueError(
            f"{name}: the blocks of a marked parameter of shape {shape} and strides {parameter.stride()} cannot be "
            "seen as matrices any more; keep it contiguous (memory_format=torch.contiguous_format)."
        ) from None


def check_gradients(name: str, parameters: list[Tensor]) -> None:
    """Raise a RuntimeError unless the gradients of all these marked parameters are dense."""
    if all(p.grad.layout is torch.strided for p in parameters):  # type: ignore[union-attr]
        return
    shape = next(tuple(p.shape) for p in parameters if p.grad.layout is not torch.strided)  # type: ignore[union-attr]
    raise RuntimeError(f"{name}: a marked parameter of shape {shape} has a sparse gradient; it must be dense.")


def fill_options(optimizer: Optimizer) -> None:
    """Give groups that came from a stock torch.optim checkpoint the options of this optimizer."""
    for group in optimizer.param_groups:
        for key, value in optimizer.defaults.items():
            group.setdefault(key, value)
