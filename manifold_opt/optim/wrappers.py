"""Find the model and the optimizers in wrappers and Trainers of other packages, by their attributes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .engine.optimizer import ManifoldOptimizer

_MAX_ENTRIES = 1000  # longer lists in a wrapper are not searched for optimizers
_WRAPPED = ("_orig_mod", "module")  # the only child of a wrapper: of torch.compile, of DistributedDataParallel


def model_and_optimizers(model: Any, opt: Any) -> tuple[nn.Module, list[Any]]:
    """Return the model without its wrappers, and the optimizers, of the arguments of :func:`~manifold_opt.check`."""
    if opt is None and not isinstance(model, nn.Module) and hasattr(model, "model"):  # a Trainer
        name, opt = type(model).__name__, getattr(model, "optimizer", None) or getattr(model, "optimizers", None)
        model = model.model
        if model is None or not opt:
            raise ValueError(
                f"check: the {name} has no {'model' if model is None else 'optimizer'} yet. Call check in a callback, "
                "when training has begun, or after trainer.create_optimizer() of transformers."
            )
    opts = optimizers_in(opt)
    if not isinstance(model, nn.Module) or not opts:
        later = " A Trainer creates its optimizer when training begins." if isinstance(model, nn.Module) else ""
        raise TypeError(
            "check: needs a model and its optimizer, in this order, or a Trainer alone, got "
            f"{type(model).__name__} and {f'no optimizer.{later}' if opt is None else f'{type(opt).__name__}.'}"
        )
    return unwrap_model(model), opts


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers of torch, so that messages have the names of the model."""
    while _is_wrapper(type(model).__module__) and len(model._modules) == 1:
        ((name, child),) = model._modules.items()
        if name not in _WRAPPED or child is None:
            break
        model = child
    return model


def _is_wrapper(module: str) -> bool:
    """Return True if a class of this Python module may be a wrapper; containers may have a child of the same name."""
    return module.startswith("torch.") and module != "torch.nn.modules.container"


def optimizers_in(opt: Any) -> list[Any]:
    """Return the optimizers in ``opt``: an optimizer, a wrapper of optimizers, or a collection of these.

    Any object with parameter groups that is not from this package or torch.optim may be a wrapper with optimizers in
    its attributes, such as SAM or ZeroRedundancyOptimizer. Without optimizers in its attributes, it is one itself.
    """
    found: dict[int, Any] = {}
    seen: dict[int, Any] = {}

    def visit(x: Any) -> bool:
        """Collect the optimizers in ``x``, and return True if there are any."""
        if isinstance(x, (nn.Module, Tensor, str, bytes)):
            return False
        if id(x) in seen:
            return hasattr(x, "param_groups")
        seen[id(x)] = x
        if not hasattr(x, "param_groups"):
            # Other iterables are not searched: iteration would consume them, and may not terminate.
            some = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
            visited = [visit(y) for y in some] if len(some) < _MAX_ENTRIES else []
            return any(visited)
        known = isinstance(x, ManifoldOptimizer) or type(x).__module__.startswith("torch.optim.")
        # These are properties in the wrappers of Accelerate and Lightning, and in ZeroRedundancyOptimizer.
        inner = [getattr(x, "optimizer", None), getattr(x, "optim", None)]
        own = [y for key, y in getattr(x, "__dict__", {}).items() if key not in ("param_groups", "state")]
        visited = [] if known else [visit(y) for y in (*inner, *own)]
        if not any(visited):
            found[id(x)] = x
        return True

    if isinstance(opt, Mapping):
        opt = list(opt.values())
    elif isinstance(opt, Iterable) and not isinstance(opt, (nn.Module, Tensor)) and not hasattr(opt, "param_groups"):
        opt = list(opt)
    visit(opt)
    return list(found.values())
