"""Warning about marked parameters that another optimizer moves off their manifolds."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..constraints import tag
from ..manifolds.layout import get_points
from ..manifolds.shards import is_dtensor
from .engine.optimizer import ManifoldOptimizer
from .options import describe_param
from .wrappers import optimizers_in

_SEEN = "_manifold_opt_seen"  # attribute of an optimizer: ``tag.marks_made``, and its steps since then; -1: has warned
_TOLERANCE = 1e-3  # errors that an optimizer of another package may leave


def warn_of_other_optimizers() -> None:
    """Let optimizers that move marked parameters off their manifolds warn, once each.

    Not noticed are parameters with a fixed spectrum, DTensors and compiled steps; :func:`~manifold_opt.check` reports
    all optimizers that ignore a constraint.

    torch calls the hook after the step of every optimizer, and after the hooks of that optimizer, which may project its
    parameters. The hook looks at the values after the steps 1, 2, 4, 8 and so on: a warm-up may begin with steps of
    size zero.
    """
    register_optimizer_step_post_hook(warn_once)


def warn_once(optimizer: Optimizer, *_: Any) -> None:
    """Warn if the step of an optimizer of another package has moved a marked parameter off; the hook after a step."""
    if isinstance(optimizer, ManifoldOptimizer) or torch.compiler.is_compiling():
        return
    marks, steps = getattr(optimizer, _SEEN, ("", 0))
    if steps < 0:
        return
    steps = steps + 1 if marks == tag.marks_made else 1
    setattr(optimizer, _SEEN, (tag.marks_made, steps))
    if steps & (steps - 1) or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
        return
    marked = [(group, p) for group in optimizer.param_groups for p in group["params"] if getattr(p, tag.TAG, None)]
    with torch.no_grad():
        moved = [(group, p) for group, p in marked if p.grad is not None and _is_off(p)]
    if moved and not _wraps_another(optimizer):  # a wrapper leaves it to the optimizer inside
        setattr(optimizer, _SEEN, (tag.marks_made, -1))
        others = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        warnings.warn(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} has moved a marked parameter of shape "
            f"{describe_param(*moved[0])}{others} off its manifold, {tag.constraint_of(moved[0][1])}. Use an optimizer "
            "of manifold_opt, or call unmark if the constraint is not wanted.",
            stacklevel=3,  # the caller of opt.step(), or torch's wrapper of it: a scheduler, a GradScaler
        )


def _wraps_another(optimizer: Optimizer) -> bool:
    try:
        return optimizers_in(optimizer)[0] is not optimizer
    except Exception:  # of an attribute of the optimizer; a warning must not end the training
        return False


def _is_off(parameter: Tensor) -> bool:
    constraint = tag.constraint_of(parameter)
    # Looking at a DTensor would be a collective, and FSDP1 holds a flat part of the values.
    if constraint is None or is_dtensor(parameter) or tag.is_flattened(parameter) or parameter.is_meta:
        return False
    try:
        batches = [get_points(layout, parameter) for layout in constraint.layouts(parameter.shape)]
    except ValueError:  # other code has changed the shape
        return False
    # A comparison with NaN is False, so that NaN is off.
    return not all(bool((constraint.error(x) <= constraint.tolerance(x) + _TOLERANCE).all()) for x in batches)
