"""SGD: torch.optim.SGD that keeps marked parameters on their manifold."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..stiefel.geometry import Metric
from .base import BaseOptimizer
from .directions import stiefel, tangent
from .engine.bucket import Bucket
from .engine.optimizer import Algorithm, Group
from .options import Nonfinite
from .unconstrained import lists_of_sgd, step_free_rows_sgd, step_unconstrained_sgd


def _moments(group: Group) -> tuple[list[str], list[str]]:
    """Return the keys of the moments that the options of a group ask for, and of those with one number per block."""
    return ["momentum_buffer"] if group["momentum"] != 0 else [], []


def _rule(group: Group, bucket: Bucket) -> Any:
    """Return the direction of torch.optim.SGD's options; the first gradient enters the buffer whole."""
    momentum, nesterov = group["momentum"], group["nesterov"]
    dampening = 0.0 if bucket.fresh else group["dampening"]
    bucket.fresh = False
    if not bucket.stiefel:
        return functools.partial(
            tangent.sgd, bucket.constraint, momentum=momentum, dampening=dampening, nesterov=nesterov
        )
    options = stiefel.SgdOptions(bucket.scale(group), group["metric"], momentum, dampening, nesterov)
    return stiefel.sgd_square, stiefel.sgd_wide, options


ALGORITHM = Algorithm(("momentum_buffer",), _moments, _rule, lists_of_sgd, step_unconstrained_sgd, step_free_rows_sgd)


class SGD(BaseOptimizer, torch.optim.SGD):
    r"""torch.optim.SGD that keeps marked parameters on their manifold: orthogonal ones orthogonal.

    Unmarked parameters train bit for bit as with torch.optim.SGD. A marked one follows its Riemannian
    gradient, with a momentum that moves along with it, and is retracted onto the manifold in every step.
    Weight decay does not act on orthogonal ones and those of unit norm: their length is fixed.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused:
            as in torch.optim.SGD. The last two must be off in a group with marked parameters.
        retraction: a name in :data:`~manifold_opt.RETRACTIONS`: how a marked block moves along its direction.
        metric: ``"euclidean"`` or ``"canonical"``: whose gradient is followed. On square blocks the
            canonical one is twice as long.
        orthogonal_lr_scale: learning rate of orthogonal blocks as a multiple of their group's, at least 0.
        beta: rate of ``retraction="orthogonalizer"``, in (0, 1).
        correction_steps: number of iterations of ``retraction="orthogonalizer"``, at least 1.
        nonfinite: what to do about a block whose gradient is not finite, or too large to be squared. ``"skip"`` leaves
            the block and its moments as they are, and counts it (:meth:`metrics`); ``"raise"`` raises a
            FloatingPointError, and nothing at all has been changed. (That looks at every gradient first: on an
            accelerator it waits, and in a compiled step it is ``"skip"``.)

    All keyword-only options can also be set in a parameter group.

    Raises:
        ValueError: an option out of range, or one that a marked parameter cannot honour.

    >>> import torch
    >>> from manifold_opt import SGD, mark_orthogonal, orthogonality_error
    >>> layer = torch.nn.Linear(16, 16)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> opt = SGD(layer.parameters(), lr=0.1, momentum=0.9)
    >>> layer(torch.ones(1, 16)).square().sum().backward()
    >>> opt.step()
    >>> orthogonality_error(layer.weight) < 1e-5
    True
    """

    _algorithm = ALGORITHM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        retraction: str = "orthographic",
        metric: Metric = "euclidean",
        orthogonal_lr_scale: float = 1.0,
        beta: float = 0.5,
        correction_steps: int = 1,
        nonfinite: Nonfinite = "skip",
    ) -> None:
        options = {
            "retraction": retraction,
            "metric": metric,
            "orthogonal_lr_scale": orthogonal_lr_scale,
            "beta": beta,
            "correction_steps": correction_steps,
            "nonfinite": nonfinite,
        }
        super().__init__(
            params,
            options,
            lr,
            momentum,
            dampening,
            weight_decay,
            nesterov,
            maximize=maximize,
            foreach=foreach,
            differentiable=differentiable,
            fused=fused,
        )
