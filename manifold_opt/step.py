"""One step: the closure, the unmarked parameters as torch steps them, the marked ones on their manifold.

A marked parameter walks

    view of its blocks -> gradient -> direction -> step -> retraction -> back in place

and is written through its view only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam
from torch.optim.adamw import adamw
from torch.optim.optimizer import Optimizer
from torch.optim.sgd import sgd

from . import direction
from .constraint import Orthogonal, constraint_of, off_manifold
from .direction import ADAM, Moments
from .options import Group, check_group
from .retractions import RETRACTIONS, retract

Closure = Callable[[], Any]
Direct = Callable[[Moments, Group, Tensor, Orthogonal, Tensor, Tensor], tuple[Tensor, Moments]]

_FAR = 0.1  # distance from the manifold above which a value is no matter of rounding, and worth a warning


def step(
    optimizer: Optimizer,
    closure: Closure | None,
    step_unmarked: Callable[[Any, Group], None],
    direct: Direct,
) -> Any:
    """One step of every group: the closure, then the unmarked parameters, then the marked ones."""
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    marked = [
        (group, parameter, constraint)
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None and (constraint := constraint_of(parameter)) is not None
    ]
    # Whatever may be refused is refused before anything is written.
    for group in {id(group): group for group, *_ in marked}.values():
        check_group(type(optimizer).__name__, group)
    versions: dict[Tensor, int] = optimizer.__dict__.setdefault("_versions", {})
    _restore([(group, parameter, c) for group, parameter, c in marked if versions.get(parameter) != parameter._version])

    for group in optimizer.param_groups:
        unmarked = [parameter for parameter in group["params"] if constraint_of(parameter) is None]
        if group.get("second_moment") == "block":
            _expand_block_moments(optimizer, unmarked)
        step_unmarked(optimizer, {**group, "params": unmarked})
    for group, parameter, constraint in marked:
        # Under autocast every product below would come back in bfloat16.
        with torch.no_grad(), torch.autocast(parameter.device.type, enabled=False):
            _step_marked(optimizer.state[parameter], group, parameter, constraint, direct)
        versions[parameter] = parameter._version
    return loss


@torch.no_grad()
def _restore(written: list[tuple[Group, Tensor, Orthogonal]]) -> None:
    """Put parameters that were written to since the last step, by load_state_dict say, back on their manifold.

    An inexact scheme leaves its parameters near the manifold, not on it: what it may have left itself stays.
    """
    found = []
    for group, parameter, constraint in written:
        slack = 0.0 if RETRACTIONS[group["retraction"]].exact else 1.0
        found.append((parameter, constraint, *off_manifold(parameter, constraint, slack)))
    for parameter, constraint, off, values in found:
        if bool(off.any()):
            blocks = constraint.view(parameter)
            distance = float(torch.linalg.matrix_norm(blocks[off] - values).max())
            blocks[off] = values
            if distance > _FAR:
                warnings.warn(
                    f"A marked parameter of shape {tuple(parameter.shape)} was {distance:.2g} away from its manifold, "
                    "changed outside the optimizer since it was marked or last stepped (load_state_dict?). Its blocks "
                    "were put back to the nearest orthogonal values.",
                    stacklevel=7,  # the caller of opt.step(), past its hooks and decorators
                )


def _step_marked(
    state: Moments,
    group: Group,
    parameter: Tensor,
    constraint: Orthogonal,
    direct: Direct,
) -> None:
    """View, gradient, direction, retraction, and back in place: the walk of one marked parameter."""
    point = constraint.view(parameter)
    w = point / constraint.gain
    g = constraint.view(_gradient(group, parameter))
    d, moments = direct(state, group, parameter, constraint, w, g)

    lr = group["lr"] * group["orthogonal_lr_scale"]
    v = d * -(lr.reshape(()) if isinstance(lr, Tensor) else lr)
    options = {key: group[key] for key in ("metric", "beta", "correction_steps")}
    new = constraint.gain * retract(w, v / constraint.gain, group["retraction"], **options)

    # A block with a value that is not finite, or cannot be right (no entry of an orthogonal matrix exceeds one), stays
    # as it was, and one without a step keeps its bits.
    within = (new.abs() <= 2 * constraint.gain).all(-1, keepdim=True).all(-2, keepdim=True)
    sound = torch.stack([within, *(_finite(x) for x in moments.values())]).all(0)
    moved = (v != 0).any(-1, keepdim=True).any(-2, keepdim=True)
    point.copy_(torch.where(sound & moved, new, point))
    for key, moment in moments.items():
        held = _block_view(state[key], parameter, constraint)
        held.copy_(torch.where(sound, moment, held))
    if "step" in state:
        state["step"] += 1


def _gradient(group: Group, parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    g = parameter.grad.contiguous() if parameter.ndim > 2 else parameter.grad
    return -g if group["maximize"] else g


def _finite(x: Tensor) -> Tensor:
    return x.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)


def _block_view(moment: Tensor, parameter: Tensor, constraint: Orthogonal) -> Tensor:
    """A moment as wide blocks; one that holds a scalar a block is ``(B, 1, 1)`` already."""
    return constraint.view(moment) if moment.shape == parameter.shape else moment


def direct_sgd(
    state: Moments, group: Group, parameter: Tensor, constraint: Orthogonal, w: Tensor, g: Tensor
) -> tuple[Tensor, Moments]:
    """Direction of torch.optim.SGD's options; the buffer appears with its first gradient."""
    held = {key: constraint.view(moment) for key, moment in state.items() if moment is not None}
    options = {key: group[key] for key in ("metric", "momentum", "dampening", "nesterov")}
    d, moments = direction.sgd(w, g, held, **options)
    for key in moments:
        if key not in held:
            state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return d, moments


def direct_adam(
    state: Moments, group: Group, parameter: Tensor, constraint: Orthogonal, w: Tensor, g: Tensor
) -> tuple[Tensor, Moments]:
    """Direction of torch.optim.Adam's options, the moments under its keys."""
    state.setdefault("step", torch.tensor(0.0))
    keys = ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    for key in keys:
        scalar = group["second_moment"] == "block" and key != "exp_avg"
        state[key] = _shaped(state.get(key), scalar, parameter, constraint)
    beta1, beta2 = (float(beta) for beta in group["betas"])
    return ADAM[group["second_moment"]](
        w,
        g,
        {key: _block_view(state[key], parameter, constraint) for key in keys},
        metric=group["metric"],
        beta1=beta1,
        beta2=beta2,
        eps=group["eps"],
        step=float(state["step"]) + 1,
    )


def _shaped(moment: Tensor | None, scalar: bool, parameter: Tensor, constraint: Orthogonal) -> Tensor:
    """A moment as its rule holds it, ``(B, 1, 1)`` or like the parameter: new, as it is, or from the other rule's.

    The other shape is what a checkpoint brings that was written with another ``second_moment``, or by torch itself.
    """
    blocks = constraint.view(parameter)
    shape = blocks[:, :1, :1].shape if scalar else parameter.shape
    if moment is not None and moment.shape == shape:
        return moment
    if moment is not None and scalar and moment.shape == parameter.shape:
        return constraint.view(moment).mean((-2, -1), keepdim=True)
    value = torch.zeros_like(blocks[:, :1, :1] if scalar else parameter, memory_format=torch.preserve_format)
    if moment is not None:
        per_block = moment if moment.shape == blocks[:, :1, :1].shape else moment.mean()
        (value if scalar else constraint.view(value)).copy_(per_block)
    return value


def _expand_block_moments(optimizer: Optimizer, unmarked: list[Tensor]) -> None:
    """Give a parameter that is not marked any more, after second_moment="block", moments that torch can use."""
    for parameter in unmarked:
        for key, moment in optimizer.state.get(parameter, {}).items():
            if key.endswith("exp_avg_sq") and moment.shape != parameter.shape:
                blocks = len(moment) if parameter.shape[0] % len(moment) == 0 else 1
                optimizer.state[parameter][key] = _shaped(moment, False, parameter, Orthogonal(blocks))


def step_unmarked_sgd(optimizer: Any, group: Group) -> None:
    """torch.optim.SGD.step of one group, without its hooks."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    buffers: list[Tensor | None] = []
    has_sparse_grad = optimizer._init_group(group, params, grads, buffers)
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


def step_unmarked_adam(optimizer: Any, group: Group) -> None:
    """torch.optim.Adam.step or AdamW.step of one group, without its hooks."""
    lists: list[list[Tensor]] = [[] for _ in range(6)]  # params, grads, three moments, step counts
    keys = ["amsgrad", "lr", "weight_decay", "eps", "maximize", "foreach", "capturable", "differentiable", "fused"]
    functional: Callable[..., None] = adam
    if isinstance(optimizer, torch.optim.AdamW):
        functional = adamw
    elif "decoupled_weight_decay" in group:
        keys.append("decoupled_weight_decay")
    # AdamW of torch 2.6, not yet an Adam, takes amsgrad too.
    amsgrad = [] if issubclass(type(optimizer), torch.optim.Adam) else [group["amsgrad"]]
    has_complex = optimizer._init_group(group, *lists[:2], *amsgrad, *lists[2:])
    beta1, beta2 = group["betas"]
    functional(
        *lists,
        has_complex=has_complex,
        beta1=beta1,
        beta2=beta2,
        grad_scale=getattr(optimizer, "grad_scale", None),
        found_inf=getattr(optimizer, "found_inf", None),
        **{key: group[key] for key in keys},
    )
