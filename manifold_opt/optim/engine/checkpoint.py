"""Save and load the state of an optimizer.

What is held in float32 stays float32, whatever the parameters are stored in.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from ...constraints.tag import CONSTRAINED, constraint_of
from ...linalg.precision import LOW_PRECISION, MASTER
from ...manifolds.records import record_from_tensor
from ..options import track_constraints
from .optimizer import ManifoldOptimizer
from .state import converted


def state_dict(self: ManifoldOptimizer) -> dict[str, Any]:
    """Return the state of the optimizer, as in torch.optim, held under the constraints that parameters have now.

    So the state of a parameter that has been unmarked is one of torch.optim. The optimizer's own state stays as it is.

    Raises:
        ValueError: the state of a marked parameter has been handed to one that is not marked.
    """
    track_constraints(self, _members(self))  # a conversion of the module may have dropped some since the last step
    own: dict[Tensor, Any] = {}

    def convert(_: Optimizer) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                # A state of torch.optim's waits for the first step, which knows the value that it is for.
                new = converted(self, group, p) if CONSTRAINED in self.state.get(p, ()) else None
                if new is not None:
                    own[p], self.state[p] = self.state[p], new

    hook = self.register_state_dict_pre_hook(convert)  # behind those of others, which may mark
    try:
        return Optimizer.state_dict(self)
    finally:
        hook.remove()
        self.state.update(own)


def load_state_dict(self: ManifoldOptimizer, state_dict: dict[str, Any]) -> None:
    """Load the state of an optimizer, as in torch.optim.

    torch casts every entry to the dtype of its parameter. The moments of a marked parameter in bfloat16 or float16, and
    its master, are float32, whatever they were saved as; the record of its constraint is as it was saved.
    """
    track_constraints(self, _members(self))
    given: dict[str, Any] = {}
    hooks = (
        self.register_load_state_dict_pre_hook(lambda _, seen: given.update(seen)),
        self.register_load_state_dict_post_hook(lambda _: _as_saved(self, given), prepend=True),
    )
    try:
        Optimizer.load_state_dict(self, state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def _members(optimizer: ManifoldOptimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _as_saved(optimizer: ManifoldOptimizer, given: dict[str, Any]) -> None:
    ids, parameters = (
        itertools.chain.from_iterable(group["params"] for group in groups)
        for groups in (given["param_groups"], optimizer.param_groups)
    )
    for key, parameter in zip(ids, parameters, strict=True):
        saved = given["state"].get(key, {})
        if CONSTRAINED in saved and record_from_tensor(saved[CONSTRAINED]) is not None:
            optimizer.state[parameter][CONSTRAINED] = saved[CONSTRAINED].to("cpu", torch.float32, copy=True)
        if constraint_of(parameter) is None or parameter.dtype not in LOW_PRECISION:
            continue
        for name in (*optimizer._algorithm.state_keys, MASTER):
            if isinstance(saved.get(name), Tensor):
                optimizer.state[parameter][name] = saved[name].to(parameter.device, torch.float32, copy=True)
