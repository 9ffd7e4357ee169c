"""Unmarked parameters, stepped by torch's own functional optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from ..linalg.precision import MASTER, working_dtype
from .engine.optimizer import GRAD_SCALER_ATTRIBUTES, Group, Lists
from .engine.plan import FreeRows

_ADAM_CAN_DECOUPLE = "decoupled_weight_decay" in inspect.signature(adam).parameters  # not that of torch 2.6


def lists_of_sgd(_: Any, __: Group) -> Lists:
    """What torch.optim.SGD._init_group fills: parameters, gradients, buffers."""
    return [], [], []


def step_unconstrained_sgd(optimizer: Any, group: Group, lists: Lists, has_sparse_grad: bool) -> None:
    """torch.optim.SGD.step of one group, without its hooks."""
    params, _, buffers = lists
    _sgd(group, lists, has_sparse_grad, *_scaling(optimizer))
    if group["momentum"] != 0:
        for parameter, buffer in zip(params, buffers, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = buffer


def step_free_rows_sgd(optimizer: Any, group: Group, free: list[FreeRows]) -> None:
    """The same of rows that are in no block of their marked parameters."""
    states = [optimizer.state[rows.parameter] for rows in free] if group["momentum"] != 0 else []
    held = [rows.view(state["momentum_buffer"]) for rows, state in zip(free, states, strict=False)]
    buffers: list[Any] = [None if rows.fresh else buffer for rows, buffer in zip(free, held, strict=False)]
    buffers = buffers or [None] * len(free)
    values, gradients = _views(optimizer, free)
    before = _copies(optimizer, values, held)
    _sgd(group, (values, gradients, buffers), False)
    for rows, buffer, new in zip(free, held, buffers, strict=False):
        if rows.fresh:
            buffer.copy_(new)
            rows.fresh = False
    _put_back(optimizer, before)
    _round(free, values)


def _sgd(
    group: Group, lists: Lists, has_sparse_grad: bool, scale: Tensor | None = None, overflow: Tensor | None = None
) -> None:
    params, grads, buffers = lists
    if group["nesterov"] and group["foreach"] is not False:
        grads = [grad.clone() for grad in grads]  # torch's foreach Nesterov adds the momentum to them in place
    keys = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")
    sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=has_sparse_grad,
        grad_scale=scale,
        found_inf=overflow,
        **{key: group[key] for key in keys},
    )


def _views(optimizer: Any, free: list[FreeRows]) -> tuple[list[Tensor], list[Tensor]]:
    """The rows, and their gradients, without the scale that a GradScaler leaves to a fused step: this is none."""
    scale, _ = _scaling(optimizer)
    gradients = [rows.view(rows.parameter.grad) for rows in free]  # type: ignore[arg-type]
    gradients = [gradient.to(working_dtype(gradient.dtype)) for gradient in gradients]
    gradients = gradients if scale is None else [gradient / scale.to(gradient) for gradient in gradients]
    return [_rows_of(optimizer, rows) for rows in free], gradients


def _rows_of(optimizer: Any, free: FreeRows) -> Tensor:
    """The rows, or of a parameter of low precision their values in float32, which follow what is written to it."""
    rows, master = free.view(free.parameter), optimizer.state[free.parameter].get(MASTER)
    if master is None:
        return rows
    held = free.view(master)
    return held.copy_(torch.where(held.to(rows.dtype) == rows, held, rows.to(held.dtype)))


def _round(free: list[FreeRows], values: list[Tensor]) -> None:
    """Parameters of low precision as the rounding of what is held."""
    for rows, value in zip(free, values, strict=True):
        if value.dtype != rows.parameter.dtype:
            rows.view(rows.parameter).copy_(value)


def _scaling(optimizer: Any) -> tuple[Tensor | None, ...]:
    """What a GradScaler leaves to a fused step: the scale of the gradients, and whether one has overflown."""
    return getattr(optimizer, GRAD_SCALER_ATTRIBUTES[0], None), getattr(optimizer, GRAD_SCALER_ATTRIBUTES[1], None)


def _copies(optimizer: Any, *written: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """What a step will write to, and copies, where it may turn out that an overflow forbids it."""
    _, overflow = _scaling(optimizer)
    return [] if overflow is None else [(tensor, tensor.clone()) for tensors in written for tensor in tensors]


def _put_back(optimizer: Any, before: list[tuple[Tensor, Tensor]]) -> None:
    """Where a gradient has overflown, all as it was. Nobody waits to be told."""
    _, overflow = _scaling(optimizer)
    for tensor, value in before:
        assert overflow is not None
        tensor.copy_(torch.where(overflow.to(tensor.device) == 0, tensor, value))


def lists_of_adam(optimizer: Any, group: Group) -> Lists:
    """What torch.optim.Adam._init_group fills: parameters, gradients, three moments, step counts."""
    # AdamW of torch 2.6, not yet an Adam, takes amsgrad too.
    amsgrad = () if isinstance(optimizer, torch.optim.Adam) else (group["amsgrad"],)
    return ([], [], *amsgrad, [], [], [], [])


def step_unconstrained_adam(optimizer: Any, group: Group, lists: Lists, has_complex: bool) -> None:
    """torch.optim.Adam.step or AdamW.step of one group, without its hooks."""
    _adam(optimizer, group, lists, has_complex, *_scaling(optimizer))


def _adam(
    optimizer: Any,
    group: Group,
    lists: Lists,
    has_complex: bool,
    scale: Tensor | None = None,
    overflow: Tensor | None = None,
) -> None:
    keys = ["amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused"]
    functional: Callable[..., None] = adam
    if _ADAM_CAN_DECOUPLE and "decoupled_weight_decay" in group:
        keys.append("decoupled_weight_decay")
    elif isinstance(optimizer, torch.optim.AdamW):
        functional = adamw
    beta1, beta2 = group["betas"]
    functional(
        *(lists if type(lists[2]) is list else (*lists[:2], *lists[3:])),  # torch 2.6 has amsgrad among them
        has_complex=has_complex,
        beta1=beta1,
        beta2=beta2,
        grad_scale=scale,
        found_inf=overflow,
        **{key: group[key] for key in keys},
    )


def step_free_rows_adam(optimizer: Any, group: Group, free: list[FreeRows]) -> None:
    """The same of rows that are in no block of their marked parameters, whose steps are counted elsewhere."""
    states = [optimizer.state[rows.parameter] for rows in free]
    keys = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]
    moments = [[rows.view(state[key]) for rows, state in zip(free, states, strict=True)] for key in keys]
    largest: list[list[Tensor]] = [] if group["amsgrad"] else [[]]
    steps = [state["step"].clone() for state in states]
    has_complex = any(rows.parameter.is_complex() for rows in free)
    values, gradients = _views(optimizer, free)
    before = _copies(optimizer, values, *moments)
    _adam(optimizer, group, (values, gradients, *moments, *largest, steps), has_complex)
    _put_back(optimizer, before)
    _round(free, values)
