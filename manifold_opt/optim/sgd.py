"""SGD with marked parameters constrained to a manifold."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..stiefel.geometry import Metric
from .base import BaseOptimizer
from .directions.sgd import moments, rule
from .engine.optimizer import Algorithm
from .options import Nonfinite
from .unconstrained import empty_lists_sgd, step_free_rows_sgd, step_unconstrained_sgd

ALGORITHM = Algorithm(("momentum_buffer",), moments, rule, empty_lists_sgd, step_unconstrained_sgd, step_free_rows_sgd)


class SGD(BaseOptimizer, torch.optim.SGD):
    r"""SGD with Riemannian updates for marked parameters; a subclass of torch.optim.SGD.

    Unmarked parameters are updated bit for bit as by torch.optim.SGD. A marked parameter is updated along its
    Riemannian gradient, with momentum, and retracted to its manifold in every step. Weight decay has no
    effect on orthogonal and unit-norm parameters, whose norm is fixed.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize, foreach, differentiable, fused:
            as in torch.optim.SGD. ``foreach`` and ``fused`` select torch's implementation for unmarked parameters;
            ``differentiable`` must be off in a group with marked ones.
        retraction: retraction for orthogonal blocks, a name in :data:`~manifold_opt.RETRACTIONS`.
        metric: metric that defines the gradient of orthogonal blocks, ``"euclidean"`` or ``"canonical"``. On square
            blocks, the canonical gradient is twice the Euclidean one.
        orthogonal_lr_scale: factor for the learning rate of orthogonal blocks, at least 0.
        beta: rate of ``retraction="orthogonalizer"``, in (0, 1).
        correction_steps: number of iterations of ``retraction="orthogonalizer"``, at least 1.
        nonfinite: what to do with a block whose gradient G has NaN or infinity, or is so large that its square
            overflows. (With fixed singular values, :math:`G W^\top` is checked too.) ``"skip"`` leaves the block and
            its moments unchanged, and counts it (:meth:`metrics`). ``"raise"`` raises a FloatingPointError before
            anything is modified. It synchronizes with an accelerator. A compiled step always skips.

    All keyword-only options can also be set per parameter group.

    Raises:
        ValueError: an option is out of range, or not supported for marked parameters.

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
