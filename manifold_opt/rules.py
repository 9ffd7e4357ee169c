"""From a group's options to the rule of its buckets: which moments they hold, and which direction they take."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from . import direction, riemannian
from .buckets import Bucket
from .direction import ADAM, Decay, Number
from .options import Group
from .products import host_can_branch

Rule = Callable[..., Any]


def sgd_moments(group: Group) -> tuple[list[str], list[str]]:
    """Keys of the moments that the group's options ask for, and of those that hold one number a block."""
    return ["momentum_buffer"] if group["momentum"] != 0 else [], []


def adam_moments(group: Group) -> tuple[list[str], list[str]]:
    """As :func:`sgd_moments`."""
    squares = ["exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    return ["exp_avg", *squares], squares if group["second_moment"] == "block" else []


def rule_of_sgd(group: Group, bucket: Bucket) -> Rule:
    """Direction of torch.optim.SGD's options; the first gradient enters the buffer whole."""
    options = {key: group[key] for key in ("momentum", "nesterov")}
    options["dampening"] = 0.0 if bucket.fresh else group["dampening"]
    bucket.fresh = False
    if not bucket.stiefel:
        return functools.partial(riemannian.sgd, bucket.constraint, **options)
    return functools.partial(direction.sgd, metric=group["metric"], **options)


def rule_of_adam(group: Group, bucket: Bucket) -> Rule:
    """Direction of torch.optim.Adam's options."""
    assert bucket.steps is not None
    beta1, beta2 = (_number(beta) for beta in group["betas"])
    readable = host_can_branch(bucket.steps) and bucket.lockstep is not None
    # None yet is possible: a GradScaler has skipped the first.
    steps: Number = float(max(bucket.lockstep or 1, 1)) if readable else _per_block(bucket)
    decay = Decay(beta1, beta2, 1 - beta1**steps, 1 - beta2**steps)
    options = {"decay": decay, "eps": group["eps"]}
    if not bucket.stiefel:
        return functools.partial(riemannian.adam, bucket.constraint, dims=bucket.part.dims, **options)
    return functools.partial(ADAM[group["second_moment"]], metric=group["metric"], **options)


def _number(beta: Number) -> Number:
    return float(beta) if not isinstance(beta, Tensor) or host_can_branch(beta) else beta


def _per_block(bucket: Bucket) -> Tensor:
    """Step counts ``(B, 1, 1)`` in the dtype and on the device of the parameters, or ``(1, 1, 1)`` for a lone one."""
    assert bucket.steps is not None
    first = bucket.parameters[0]
    steps = bucket.steps.to(first.device, bucket.real, non_blocking=True)
    return bucket.a_point(steps)
