"""Unmarked parameters, stepped by torch's own functional optimizers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.sgd import sgd

from .options import Group

Lists = tuple[Any, ...]


def lists_of_sgd(_: Any, __: Group) -> Lists:
    """What torch.optim.SGD._init_group fills: parameters, gradients, buffers."""
    return [], [], []


def step_unmarked_sgd(optimizer: Any, group: Group, lists: Lists, has_sparse_grad: bool) -> None:
    """torch.optim.SGD.step of one group, without its hooks."""
    params, grads, buffers = lists
    if group["nesterov"] and group["foreach"] is not False:
        grads = [grad.clone() for grad in grads]  # torch's foreach Nesterov adds the momentum to them in place
    keys = ("weight_decay", "momentum", "lr", "dampening", "nesterov", "maximize", "foreach", "fused")
    sgd(
        params,
        grads,
        buffers,
        has_sparse_grad=has_sparse_grad,
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=getattr(optimizer, "found_inf", None),
        **{key: group[key] for key in keys},
    )
    if group["momentum"] != 0:
        for parameter, buffer in zip(params, buffers, strict=True):
            optimizer.state[parameter]["momentum_buffer"] = buffer


def lists_of_adam(optimizer: Any, group: Group) -> Lists:
    """What torch.optim.Adam._init_group fills: parameters, gradients, three moments, step counts."""
    # AdamW of torch 2.6, not yet an Adam, takes amsgrad too.
    amsgrad = () if isinstance(optimizer, torch.optim.Adam) else (group["amsgrad"],)
    return ([], [], *amsgrad, [], [], [], [])


def step_unmarked_adam(optimizer: Any, group: Group, lists: Lists, has_complex: bool) -> None:
    """torch.optim.Adam.step or AdamW.step of one group, without its hooks."""
    keys = ["amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused"]
    functional: Callable[..., None] = adam
    if isinstance(optimizer, torch.optim.AdamW):
        functional = adamw
    elif "decoupled_weight_decay" in group:
        keys.append("decoupled_weight_decay")
    beta1, beta2 = group["betas"]
    functional(
        *(entries for entries in lists if isinstance(entries, list)),
        has_complex=has_complex,
        beta1=beta1,
        beta2=beta2,
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=getattr(optimizer, "found_inf", None),
        **{key: group[key] for key in keys},
    )
