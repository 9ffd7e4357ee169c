"""From the options of a group to the direction of its buckets, and to the moments that they hold."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..linalg.products import host_can_branch
from .directions import stiefel as direction
from .directions import tangent as riemannian
from .directions.stiefel import AdamCoefficients, AdamOptions, Scalar, SgdOptions
from .engine.bucket import Bucket
from .options import Group

# A function of the gradient in the frame for square blocks, one of point and gradient for others, and their options.
Rule = tuple[Callable[..., Tensor], Callable[..., Tensor], Any]


def sgd_moments(group: Group) -> tuple[list[str], list[str]]:
    """Return the keys of the moments that the options of a group ask for, and of those with one number per block."""
    return ["momentum_buffer"] if group["momentum"] != 0 else [], []


def adam_moments(group: Group) -> tuple[list[str], list[str]]:
    """As :func:`sgd_moments`."""
    squares = ["exp_avg_sq"] + ["max_exp_avg_sq"] * group["amsgrad"]
    return ["exp_avg", *squares], squares if group["second_moment"] == "block" else []


def rule_of_sgd(group: Group, bucket: Bucket) -> Any:
    """Return the direction of torch.optim.SGD's options; the first gradient enters the buffer whole."""
    momentum, nesterov = group["momentum"], group["nesterov"]
    dampening = 0.0 if bucket.fresh else group["dampening"]
    bucket.fresh = False
    if not bucket.stiefel:
        options = {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}
        return functools.partial(riemannian.sgd, bucket.constraint, **options)
    scale = _scale(group, bucket)
    return direction.sgd_square, direction.sgd_wide, SgdOptions(scale, group["metric"], momentum, dampening, nesterov)


def rule_of_adam(group: Group, bucket: Bucket) -> Any:
    """Return the direction of torch.optim.Adam's options."""
    beta1, beta2 = group["betas"]
    if not type(beta1) is type(beta2) is float:
        beta1, beta2 = _number(beta1), _number(beta2)
    # None yet is possible: a GradScaler has skipped the first.
    steps: Scalar = _per_block(bucket) if bucket.shared_step is None else bucket.shared_step or 1
    coefficients = AdamCoefficients(beta1, beta2, 1 - beta1**steps, 1 - beta2**steps, group["eps"])
    if not bucket.stiefel:
        return functools.partial(riemannian.adam, bucket.constraint, dims=bucket.part.dims, coefficients=coefficients)
    options = AdamOptions(_scale(group, bucket), group["metric"], coefficients)
    if group["second_moment"] == "block":
        return direction.adam_block_square, direction.adam_block_wide, options
    return direction.adam_square, direction.adam_wide, options


def _scale(group: Group, bucket: Bucket) -> Scalar:
    """Return minus the learning rate of points, of which the blocks are a multiple."""
    lr = group["lr"]
    if type(lr) is not float and isinstance(lr, Tensor):
        lr = lr.reshape(())
    return -group["orthogonal_lr_scale"] / bucket.gain * lr


def _number(beta: Scalar) -> Scalar:
    return float(beta) if not isinstance(beta, Tensor) or host_can_branch(beta) else beta


def _per_block(bucket: Bucket) -> Tensor:
    """Return step counts ``(B, 1, 1)`` on the device of the parameters, or ``(1, 1, 1)`` for a lone one."""
    assert bucket.steps is not None
    first = bucket.parameters[0]
    steps = bucket.steps.to(first.device, bucket.real, non_blocking=True)
    return bucket.a_point(steps)
