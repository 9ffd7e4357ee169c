"""Step of unmarked parameters, and of rows outside every block, by torch's own functional optimizers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

try:
    from torch.optim._muon import muon
except ImportError:  # before torch 2.9, where Muon cannot be built
    muon = None  # type: ignore[assignment]

from ..linalg.precision import MASTER, working_dtype
from .engine.grouping import FreeRows
from .engine.optimizer import GRAD_SCALER_ATTRIBUTES, Group, Lists

_ADAM_CAN_DECOUPLE = "decoupled_weight_decay" in inspect.signature(adam).parameters  # not in torch 2.6


def empty_lists_sgd(_: Any, __: Group) -> Lists:
    """Return empty lists for torch.optim.SGD._init_group: parameters, gradients, buffers."""
    return [], [], []


def step_unconstrained_sgd(optimizer: Any, group: Group, lists: Lists, has_sparse_grad: bool) -> None:
    """Perform torch.optim.SGD.step for one group, without hooks."""
    params, _, buffers = lists
    _sgd(group, lists, has_sparse_grad, *_grad_scaler_state(optimizer))
    if group["momentum"] != 0:
        for parameter, buffer in zip(params, buffers, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = buffer


def step_free_rows_sgd(optimizer: Any, group: Group, free: list[FreeRows]) -> None:
    """Perform torch.optim.SGD.step for the rows outside every block."""
    states = [optimizer.state[rows.parameter] for rows in free] if group["momentum"] != 0 else []
    stored = [rows.view(state["momentum_buffer"]) for rows, state in zip(free, states, strict=False)]
    buffers: list[Any] = [None if rows.first_momentum else buffer for rows, buffer in zip(free, stored, strict=False)]
    buffers = buffers or [None] * len(free)
    values, gradients = rows_and_gradients(optimizer, free)
    backups = _backups(optimizer, values, stored)
    _sgd({**group, "fused": False}, (values, gradients, buffers), False)
    for rows, buffer, new in zip(free, stored, buffers, strict=False):
        if rows.first_momentum:
            buffer.copy_(new)
            rows.first_momentum = False
    _undo_on_overflow(optimizer, backups)
    round_to_storage(free, values)


def _sgd(
    group: Group, lists: Lists, has_sparse_grad: bool, grad_scale: Tensor | None = None, found_inf: Tensor | None = None
) -> None:
    params, grads, buffers = lists
    if group["nesterov"] and group["foreach"] is not False:
        grads = [grad.clone() for grad in grads]  # torch's foreach Nesterov modifies them in place
    keys = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")
    sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=has_sparse_grad,
        grad_scale=grad_scale,
        found_inf=found_inf,
        **{key: group[key] for key in keys},
    )


def rows_and_gradients(optimizer: Any, free: list[FreeRows]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the rows and their gradients, unscaled if a GradScaler left that to the step."""
    grad_scale, _ = _grad_scaler_state(optimizer)
    gradients = [rows.view(rows.parameter.grad) for rows in free]  # type: ignore[arg-type]
    gradients = [gradient.to(working_dtype(gradient.dtype)) for gradient in gradients]
    gradients = gradients if grad_scale is None else [gradient / grad_scale.to(gradient) for gradient in gradients]
    return [_rows_of(optimizer, rows) for rows in free], gradients


def _rows_of(optimizer: Any, free: FreeRows) -> Tensor:
    """Return the rows, or for low precision those of the master copy, updated where the parameter was modified."""
    rows, master = free.view(free.parameter), optimizer.state[free.parameter].get(MASTER)
    if master is None:
        return rows
    copy = free.view(master)
    return copy.copy_(torch.where(copy.to(rows.dtype) == rows, copy, rows.to(copy.dtype)))


def round_to_storage(free: list[FreeRows], values: list[Tensor]) -> None:
    """Round the master copy to parameters in low precision."""
    for rows, value in zip(free, values, strict=True):
        if value.dtype != rows.parameter.dtype:
            rows.view(rows.parameter).copy_(value)


def _grad_scaler_state(optimizer: Any) -> tuple[Tensor | None, ...]:
    """Return ``grad_scale`` and ``found_inf``, which a GradScaler sets on a fused optimizer; else None."""
    return getattr(optimizer, GRAD_SCALER_ATTRIBUTES[0], None), getattr(optimizer, GRAD_SCALER_ATTRIBUTES[1], None)


def _backups(optimizer: Any, *written: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors that a step modifies, with copies, if it must be undone after an overflow."""
    _, found_inf = _grad_scaler_state(optimizer)
    return [] if found_inf is None else [(tensor, tensor.clone()) for tensors in written for tensor in tensors]


def _undo_on_overflow(optimizer: Any, backups: list[tuple[Tensor, Tensor]]) -> None:
    """Restore the copies if a gradient has overflowed, without synchronization."""
    _, found_inf = _grad_scaler_state(optimizer)
    for tensor, value in backups:
        assert found_inf is not None
        tensor.copy_(torch.where(found_inf.to(tensor.device) == 0, tensor, value))


def empty_lists_adam(optimizer: Any, group: Group) -> Lists:
    """Return empty lists for torch.optim.Adam._init_group: parameters, gradients, three moments, step counts."""
    # In torch 2.6, AdamW is no subclass of Adam, and its _init_group takes amsgrad too.
    amsgrad = () if isinstance(optimizer, torch.optim.Adam) else (group["amsgrad"],)
    return ([], [], *amsgrad, [], [], [], [])


def step_unconstrained_adam(optimizer: Any, group: Group, lists: Lists, has_complex: bool) -> None:
    """Perform torch.optim.Adam.step or AdamW.step for one group, without hooks."""
    _adam(optimizer, group, lists, has_complex, *_grad_scaler_state(optimizer))


def _adam(
    optimizer: Any,
    group: Group,
    lists: Lists,
    has_complex: bool,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    keys = ["amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused"]
    functional: Callable[..., None] = adam
    if _ADAM_CAN_DECOUPLE and "decoupled_weight_decay" in group:
        keys.append("decoupled_weight_decay")
    elif isinstance(optimizer, torch.optim.AdamW):
        functional = adamw
    beta1, beta2 = group["betas"]
    functional(
        *(lists if type(lists[2]) is list else (*lists[:2], *lists[3:])),  # without amsgrad of torch 2.6
        has_complex=has_complex,
        beta1=beta1,
        beta2=beta2,
        grad_scale=grad_scale,
        found_inf=found_inf,
        **{key: group[key] for key in keys},
    )


def step_free_rows_adam(optimizer: Any, group: Group, free: list[FreeRows]) -> None:
    """Perform Adam.step or AdamW.step for the rows outside every block. The engine increments their step counts."""
    states = [optimizer.state[rows.parameter] for rows in free]
    keys = ["exp_avg", "exp_avg_sq", *["max_exp_avg_sq"] * group["amsgrad"]]
    moments = [[rows.view(state[key]) for rows, state in zip(free, states, strict=True)] for key in keys]
    largest: list[list[Tensor]] = [] if group["amsgrad"] else [[]]
    steps = [state["step"].clone() for state in states]
    has_complex = any(rows.parameter.is_complex() for rows in free)
    values, gradients = rows_and_gradients(optimizer, free)
    backups = _backups(optimizer, values, *moments)
    # The gradients are unscaled, and torch's fused functions want step counts on the device.
    _adam(optimizer, {**group, "fused": False}, (values, gradients, *moments, *largest, steps), has_complex)
    _undo_on_overflow(optimizer, backups)
    round_to_storage(free, values)


def empty_lists_muon(_: Any, __: Group) -> Lists:
    """Return empty lists for torch.optim.Muon._init_group: parameters, gradients, buffers."""
    return [], [], []


def step_unconstrained_muon(_: Any, group: Group, lists: Lists, has_complex: bool) -> None:
    """Perform torch.optim.Muon.step for one group, without hooks."""
    keys = ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn")
    muon(*lists, has_complex=has_complex, **{key: group[key] for key in keys})


def step_free_rows_muon(optimizer: Any, group: Group, free: list[FreeRows]) -> None:
    """Perform torch.optim.Muon.step for the rows outside every block, each run of them as one matrix."""
    buffers = [rows.view(optimizer.state[rows.parameter]["momentum_buffer"]) for rows in free]
    values, gradients = rows_and_gradients(optimizer, free)
    step_unconstrained_muon(optimizer, group, (values, gradients, buffers), False)
    round_to_storage(free, values)
