"""What is saved says how it is held; what is held in float32 is loaded so, whatever the parameters are stored in."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .constraint import constraint_of
from .moments import note
from .precision import LOW


def state_dict(self: Optimizer) -> dict[str, Any]:
    """The state of an optimizer, as in torch.optim; its groups say under which constraints it is held."""
    note(self, self.param_groups)
    return Optimizer.state_dict(self)


def getstate(self: Optimizer) -> dict[str, Any]:
    """What is copied and pickled of an optimizer, which says so too."""
    note(self, self.param_groups)
    return Optimizer.__getstate__(self)


def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load the state of an optimizer, as in torch.optim.

    torch casts every moment to the dtype of its parameter. Those of a marked parameter in bfloat16 or float16, and its
    master, are float32, whatever they were saved as.
    """
    given: dict[str, Any] = {}
    hooks = (
        self.register_load_state_dict_pre_hook(lambda _, seen: given.update(seen)),
        self.register_load_state_dict_post_hook(lambda opt: _as_saved(opt, given), prepend=True),
    )
    try:
        Optimizer.load_state_dict(self, state_dict)
    finally:
        for hook in hooks:
            hook.remove()


def _as_saved(optimizer: Optimizer, given: dict[str, Any]) -> None:
    ids, parameters = (
        itertools.chain.from_iterable(group["params"] for group in groups)
        for groups in (given["param_groups"], optimizer.param_groups)
    )
    for key, parameter in zip(ids, parameters, strict=True):
        if constraint_of(parameter) is None or parameter.dtype not in LOW:
            continue
        for name, value in given["state"].get(key, {}).items():
            if isinstance(value, Tensor) and value.is_floating_point() and name != "step":
                optimizer.state[parameter][name] = value.to(parameter.device, torch.float32, copy=True)
