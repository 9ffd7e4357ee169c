"""Whether a model and its optimizer still agree on what is constrained, and what to do after averaging weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from .constraint import constraint_of, is_sharded, off_manifold, put_back_, was_unmarked
from .manifolds import Manifold, Orthogonal
from .manifolds.geoopt import kept_by
from .options import check_marked
from .precision import MASTER, working_dtype
from .retractions import RETRACTIONS
from .survival import records_of

AverageFn = Callable[[Tensor, Tensor, Tensor | int], Tensor]


def check(model: nn.Module, opt: Optimizer) -> list[str]:
    """What is wrong with the constraints of a model that an optimizer is to train; an empty list if all is well.

    Says if nothing is marked; which parameters have lost their mark, are marked but not in the optimizer or not in one of
    this package, are off their manifold by more than rounding, or have state that is not finite or of another dtype or
    device; and which marked parameters the optimizer still moves though they are no longer the model's.

    Args:
        model: the module that is trained, or a wrapper of it.
        opt: its optimizer, of this package or not.

    Returns:
        One sentence a problem, which names the parameter and the remedy.

    Raises:
        TypeError: not a module and an optimizer.

    >>> import torch
    >>> from manifold_opt import Adam, check, mark_orthogonal
    >>> layer = torch.nn.Linear(4, 4)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> opt = Adam(layer.parameters())
    >>> check(layer, opt)
    []
    >>> layer.weight = torch.nn.Parameter(torch.zeros(4, 4))
    >>> for problem in check(layer, opt):
    ...     print(problem)
    weight has lost its constraint Orthogonal(blocks=1, dim=0, gain=1.0): another parameter has taken its place. Mark it again and build the optimizer anew.
    the optimizer moves a marked parameter of shape (4, 4) that is no longer the model's. Mark what has taken its place, and build the optimizer anew.
    """  # noqa: E501
    opt = _unwrapped(opt)
    if not isinstance(model, nn.Module) or not hasattr(opt, "param_groups"):
        raise TypeError(
            f"check: needs a model and its optimizer, in this order, got {type(model).__name__} and "
            f"{type(opt).__name__}."
        )
    ours = hasattr(opt, "_plans")
    marks: dict[Tensor, Manifold | None] = getattr(opt, "_marks", {})
    moved = {id(p): group for group in opt.param_groups for p in group["params"]}
    named = dict(model.named_parameters(remove_duplicate=False))
    problems = list(_lost(model))
    lost = {problem.split(" ")[0] for problem in problems}
    for name, p in named.items():
        constraint = constraint_of(p)
        if constraint is None:
            if marks.get(p) is not None and not was_unmarked(p) and name not in lost:
                problems.append(f"{name} has lost its constraint {marks[p]}. Mark it again.")
            continue
        if id(p) not in moved:
            if p.requires_grad:
                problems.append(f"{name} is marked, but not in the optimizer: nothing moves it.")
        elif not ours and not kept_by(opt, p):
            problems.append(
                f"{name} is marked, but moved by {type(opt).__module__}.{type(opt).__name__}, which does not keep it "
                f"{_adjective(constraint)}: use the one of manifold_opt."
            )
        elif ours:
            problems.extend(_unwell(name, p, opt))
    present = {id(p) for p in named.values()}
    for group in opt.param_groups:
        for p in group["params"]:
            if id(p) not in present and (constraint_of(p) or marks.get(p)) is not None:
                problems.append(
                    f"the optimizer moves a marked parameter of shape {tuple(p.shape)} that is no longer the model's. "
                    "Mark what has taken its place, and build the optimizer anew."
                )
    if ours and not problems and not any(constraint_of(p) is not None or was_unmarked(p) for p in named.values()):
        problems.append("nothing in the model is marked: mark_recurrent(model), or mark_orthogonal(module, name).")
    return problems


def _unwrapped(opt: Any) -> Any:
    """What torch's ZeroRedundancyOptimizer (optim) and Accelerate (optimizer) wrap."""
    for name in ("optim", "optimizer"):
        inner = getattr(opt, name, None)
        if not hasattr(opt, "_plans") and hasattr(inner, "param_groups"):
            return _unwrapped(inner)
    return opt


def _lost(model: nn.Module) -> Iterator[str]:
    """Parameters that have taken the place of marked ones and are not marked."""
    for path, module in model.named_modules():
        for leaf, (marked, constraint) in records_of(module).items():
            now = getattr(module, leaf, None)
            present = constraint_of(now) if isinstance(now, Tensor) else None
            if was_unmarked(marked) or present == constraint or (now is marked and present is not None):
                continue
            yield (
                f"{f'{path}.{leaf}' if path else leaf} has lost its constraint {constraint}: "
                f"{_what_became_of(marked, now)}"
            )


def _what_became_of(marked: Tensor, now: object) -> str:
    if isinstance(now, Tensor) and is_sharded(now):
        return "it has been sharded. Leave it out, as with fully_shard(module, ignored_params={parameter})."
    if now is marked:
        became = "it was converted"
    else:
        became = "another parameter has taken its place" if isinstance(now, Tensor) else "it is there no more"
    return f"{became}. Mark it again and build the optimizer anew."


def _unwell(name: str, p: Tensor, opt: Optimizer) -> Iterator[str]:
    """What is wrong with a marked parameter of an optimizer of this package."""
    constraint = constraint_of(p)
    group = next(group for group in opt.param_groups if any(p is member for member in group["params"]))
    assert constraint is not None
    if p.is_meta:
        return
    try:
        check_marked(name, p, group)
        if not bool(p.isfinite().all()):
            yield f"{name} has entries that are not finite."
        elif _is_exact(constraint, group) and off_manifold(p, constraint):
            yield (
                f"{name} is not {_adjective(constraint)} to rounding: project_(model) puts it back, and so does the "
                "next step."
            )
    except ValueError as refusal:  # what the next step would raise
        reason = str(refusal).removeprefix(f"{name}: ")
        yield f"{name} cannot be kept {_adjective(constraint)}: {reason}"
    dtypes = {working_dtype(p.dtype), working_dtype(p.dtype).to_real()}  # a number a block is real
    for key, value in opt.state.get(p, {}).items():
        if key not in (*opt._state_keys, MASTER):  # type: ignore[attr-defined]
            continue
        if isinstance(value, Tensor) and not value.is_meta and not bool(value.isfinite().all()):
            yield f"the {key} of {name} is not finite, and its block no longer moves: del opt.state[{name}] resets it."
        if isinstance(value, Tensor) and (value.dtype not in dtypes or value.device != p.device):
            yield (
                f"{name} is {p.dtype} on {p.device}, its {key} {value.dtype} on {value.device}: the next step converts "
                "it."
            )


def _is_exact(constraint: Manifold, group: dict[str, Any]) -> bool:
    return not isinstance(constraint, Orthogonal) or RETRACTIONS[group["retraction"]].exact


def _adjective(constraint: Manifold) -> str:
    return "orthogonal" if isinstance(constraint, Orthogonal) else f"on {constraint}"


@torch.no_grad()
def project_(model: nn.Module) -> nn.Module:
    """Put every marked parameter of a module back on its manifold, to the nearest point, in place.

    The thing to do after weights have been averaged, pruned or merged. Blocks that are orthogonal to rounding keep
    their bits.

    Args:
        model: any module; one without marked parameters stays as it is.

    Returns:
        The same module.

    Raises:
        ValueError: one is not finite or rank-deficient; nothing has been written then.

    >>> import torch
    >>> from manifold_opt import mark_orthogonal, orthogonality_error, project_
    >>> layer = torch.nn.Linear(4, 4)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> with torch.no_grad():
    ...     _ = layer.weight.mul_(1.1)
    >>> orthogonality_error(project_(layer))["weight"] < 1e-5
    True
    """
    found = []
    for p in model.parameters():
        constraint = constraint_of(p)
        if constraint is not None:
            found.append((p, off_manifold(p, constraint)))
    for p, off in found:
        put_back_(p, off)
    return model


def orthogonal_average(model: nn.Module, decay: float | None = None) -> AverageFn:
    """An ``avg_fn`` for torch.optim.swa_utils.AveragedModel whose averages of marked parameters stay orthogonal.

    The average in the surrounding space, then the nearest point: the induced arithmetic mean of two.

    Args:
        model: the module whose parameters are averaged.
        decay: of an exponential moving average, in [0, 1); the mean of all, unless given.

    Returns:
        A function of the average so far, the current parameter and their count.

    Raises:
        ValueError: ``decay`` out of range; when called, a parameter that is not the model's.

    Reference: Moakher (2002), *Means and averaging in the group of rotations*.

    >>> import torch
    >>> from torch.optim.swa_utils import AveragedModel
    >>> from manifold_opt import mark_orthogonal, orthogonal_average, orthogonality_error
    >>> layer = torch.nn.Linear(4, 4)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> averaged = AveragedModel(layer, avg_fn=orthogonal_average(layer, decay=0.9))
    >>> averaged.update_parameters(layer)
    >>> orthogonality_error(averaged)["module.weight"] < 1e-5
    True
    """
    if decay is not None and not 0 <= decay < 1:
        raise ValueError(f"orthogonal_average: decay must lie in [0, 1), got {decay}.")

    def average(averaged: Tensor, current: Tensor, count: Tensor | int) -> Tensor:
        share = 1 - decay if decay is not None else 1 / (int(count) + 1)
        if not (averaged.is_floating_point() or averaged.is_complex()):  # a count, of a BatchNorm
            return averaged + (current - averaged) * share
        mean = averaged.lerp(current, share)
        # AveragedModel hands over detached tensors, on which no mark is to be seen: by the memory they share.
        marks = {p.data_ptr(): constraint_of(p) for p in (*model.parameters(), *model.buffers())}
        if current.data_ptr() not in marks:
            raise ValueError(
                "orthogonal_average: what is averaged is not the model that it was made for, or a copy of it on "
                "another device. Give it the model that update_parameters gets; for averages on another device, "
                "average as torch does and call project_(averaged_model) afterwards."
            )
        constraint = marks[current.data_ptr()]
        if constraint is not None:
            put_back_(mean, off_manifold(mean, constraint))
        return mean

    return average
