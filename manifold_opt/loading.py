"""Save and load the state of an optimizer.

What is held in float32 stays float32, whatever the parameters are stored in.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from .constraint import CONSTRAINED, constraint_of, record_in
from .moments import convert
from .precision import LOW, MASTER


def state_dict(self: Optimizer) -> dict[str, Any]:
    """Return the state of the optimizer, as in torch.optim, held under the constraints that parameters have now.

    So the state of a parameter that has been unmarked is one of torch.optim.

    Raises:
        ValueError: the state of a marked parameter has been handed to one that is not marked.
    """
    for group in self.param_groups:
        convert(self, group)
    return Optimizer.state_dict(self)


def load_state_dict(self: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load the state of an optimizer, as in torch.optim.

    torch casts every entry to the dtype of its parameter. The moments of a marked parameter in bfloat16 or float16, and
    its master, are float32, whatever they were saved as; the record of its constraint is as it was saved.
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


def _as_saved(optimizer: Any, given: dict[str, Any]) -> None:
    ids, parameters = (
        itertools.chain.from_iterable(group["params"] for group in groups)
        for groups in (given["param_groups"], optimizer.param_groups)
    )
    for key, parameter in zip(ids, parameters, strict=True):
        saved = given["state"].get(key, {})
        if CONSTRAINED in saved and record_in(saved[CONSTRAINED]) is not None:
            optimizer.state[parameter][CONSTRAINED] = saved[CONSTRAINED].to("cpu", torch.uint8, copy=True)
        if constraint_of(parameter) is None or parameter.dtype not in LOW:
            continue
        for name in (*optimizer._state_keys, MASTER):
            if isinstance(saved.get(name), Tensor):
                optimizer.state[parameter][name] = saved[name].to(parameter.device, torch.float32, copy=True)
