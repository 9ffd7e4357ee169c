"""Warning about a marked parameter that an optimizer of torch or geoopt updates, which does not keep its constraint."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from ..constraints import tag
from ..manifolds.geoopt import is_handled_by
from .engine.optimizer import ManifoldOptimizer
from .options import describe_param
from .wrappers import optimizers_in

# Attribute of an optimizer: ``tag.marks_made`` when its parameters were last searched. It is compared in every step.
_SEARCHED = "_manifold_opt_searched"


def warn_of_other_optimizers() -> None:
    """Let the first step of an optimizer that does not keep the constraints of its marked parameters warn.

    Every optimizer calls the hook after its step. Those of other packages do not warn, because they may keep their
    parameters on the manifolds in another way; :func:`~manifold_opt.check` reports them.
    """
    register_optimizer_step_post_hook(_warn_once)


def _warn_once(optimizer: Optimizer, *_: Any) -> None:
    if isinstance(optimizer, ManifoldOptimizer) or torch.compiler.is_compiling():
        return
    if getattr(optimizer, _SEARCHED, None) == tag.marks_made or not _is_of_torch_or_geoopt(optimizer):
        return
    marked = [
        (group, p)
        for group in optimizer.param_groups
        for p in group["params"]
        if tag.constraint_of(p) is not None and not is_handled_by(optimizer, p)
    ]
    moved = [(group, p) for group, p in marked if p.grad is not None]
    if marked and not moved:
        return  # they may get gradients later
    setattr(optimizer, _SEARCHED, tag.marks_made)
    if moved and optimizers_in(optimizer)[0] is optimizer:  # a wrapper leaves it to the optimizer inside
        others = f" and {len(moved) - 1} others" if len(moved) > 1 else ""
        warnings.warn(
            f"{type(optimizer).__module__}.{type(optimizer).__name__} updates a marked parameter of shape "
            f"{describe_param(*moved[0])}{others}, and ignores its constraint {tag.constraint_of(moved[0][1])}. Use an "
            "optimizer of manifold_opt, or call unmark if the constraint is not wanted.",
            stacklevel=3,  # the caller of opt.step()
        )


def _is_of_torch_or_geoopt(optimizer: Optimizer) -> bool:
    return type(optimizer).__module__.startswith(("torch.", "geoopt."))
