"""Base class of the optimizers, with the interface of torch.optim. The step is in engine/."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim.optimizer import ParamsT

from .engine.checkpoint import check_checkpoint, load_state_dict, state_dict, upgrade
from .engine.optimizer import Group, ManifoldOptimizer
from .engine.plan import reset_engine, without_constrained
from .engine.step import Closure, step
from .metrics import metrics
from .options import add_param_group, fill_options, merge_into_groups


class BaseOptimizer(ManifoldOptimizer):
    """Base class of optimizers that also inherit from a class of torch.optim.

    A subclass sets ``_algorithm`` and calls this constructor from its own, which has torch's signature.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Stored now, because torch.compile later replaces _init_group by a slower wrapper that disables compilation.
        cls._collect_unconstrained = super()._init_group  # type: ignore[method-assign]

    def __init__(self, params: ParamsT, options: Group, *args: Any, **kwargs: Any) -> None:
        """Call torch's constructor with ``args`` and ``kwargs``, and add ``options`` to every group."""
        super().__init__(merge_into_groups(params, options), *args, **kwargs)
        self.defaults.update(options)
        reset_engine(self)

    add_param_group = add_param_group
    load_state_dict = load_state_dict
    state_dict = state_dict

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_checkpoint(self, state)
        fill_options(self, state)
        super().__setstate__(state)
        upgrade(self)
        reset_engine(self)

    def _init_group(self, group: Group, *lists: Any) -> bool:
        """Collect the unmarked parameters of a group. torch.compile finds this method by name."""
        return self._collect_unconstrained(without_constrained(self, group), *lists)

    def step(self, closure: Closure | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss. Optional.

        Returns:
            The loss, or None without a closure.
        """
        if "capturable" in self.defaults:
            _warn_if_captured(self)
        return step(self, closure)

    metrics = metrics


def _warn_if_captured(optimizer: torch.optim.Optimizer) -> None:
    """Emit torch's own warning if a step that is not capturable is being captured."""
    newer = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (newer or optimizer._cuda_graph_capture_health_check)()
