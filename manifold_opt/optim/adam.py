"""Adam and AdamW with marked parameters constrained to a manifold."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..stiefel.geometry import Metric
from .base import BaseOptimizer
from .directions.adam import SecondMoment, moments, rule
from .engine.optimizer import Algorithm
from .options import Nonfinite
from .unconstrained import empty_lists_adam, step_free_rows_adam, step_unconstrained_adam

ALGORITHM = Algorithm(
    ("exp_avg",),
    moments,
    rule,
    empty_lists_adam,
    step_unconstrained_adam,
    step_free_rows_adam,
    mean_squares=("exp_avg_sq", "max_exp_avg_sq"),
)


class Adam(BaseOptimizer, torch.optim.Adam):
    r"""Adam with Riemannian updates for marked parameters; a subclass of torch.optim.Adam.

    Unmarked parameters are updated bit for bit as by torch.optim.Adam. A marked parameter is updated along a tangent
    direction, and retracted to its manifold in every step. Weight decay has no effect on
    orthogonal and unit-norm parameters, whose norm is fixed.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay: as in torch.optim.Adam.
        foreach, maximize, capturable, differentiable, fused: as in torch.optim.Adam. ``foreach``
            and ``fused`` select torch's implementation for unmarked parameters; ``differentiable`` must be off in a
            group with marked ones.
        retraction: retraction for orthogonal blocks, a name in :data:`~manifold_opt.RETRACTIONS`.
        metric: metric that defines the gradient of orthogonal blocks, ``"euclidean"`` or ``"canonical"``. On square
            blocks, the canonical gradient is twice the Euclidean one.
        orthogonal_lr_scale: factor for the learning rate of orthogonal blocks, at least 0.
        second_moment: ``"element"`` stores one mean square per entry, as torch does, and learns fastest. ``"block"``
            stores one mean square per block, and is equivariant under rotations (Becigneul & Ganea 2019).
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
    >>> from manifold_opt import Adam, mark_orthogonal, orthogonality_error
    >>> gru = torch.nn.GRU(4, 16)
    >>> weight = mark_orthogonal(gru.weight_hh_l0, blocks=3)
    >>> opt = Adam(gru.parameters(), lr=1e-3)
    >>> gru(torch.ones(5, 1, 4))[0].sum().backward()
    >>> opt.step()
    >>> orthogonality_error(weight) < 1e-5
    True
    """

    _algorithm = ALGORITHM

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        retraction: str = "orthographic",
        metric: Metric = "euclidean",
        orthogonal_lr_scale: float = 1.0,
        second_moment: SecondMoment = "element",
        beta: float = 0.5,
        correction_steps: int = 1,
        nonfinite: Nonfinite = "skip",
    ) -> None:
        options = {
            "retraction": retraction,
            "metric": metric,
            "orthogonal_lr_scale": orthogonal_lr_scale,
            "second_moment": second_moment,
            "beta": beta,
            "correction_steps": correction_steps,
            "nonfinite": nonfinite,
        }
        # Only if set: torch 2.6 does not have this option.
        newer = {"decoupled_weight_decay": True} if decoupled_weight_decay else {}
        super().__init__(
            params,
            options,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            foreach=foreach,
            maximize=maximize,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
            **newer,
        )


class AdamW(BaseOptimizer, torch.optim.AdamW):
    r"""AdamW with Riemannian updates for marked parameters; a subclass of torch.optim.AdamW.

    Like :class:`Adam`, but with decoupled weight decay, 0.01 by default. Weight decay acts on unmarked parameters, and
    on marked ones that it keeps on their manifold: those of bounded spectral norm, and positive ones.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused:
            as in torch.optim.AdamW.
        retraction, metric, orthogonal_lr_scale, second_moment, beta, correction_steps, nonfinite: as in :class:`Adam`.

    Raises:
        ValueError: an option is out of range, or not supported for marked parameters.

    >>> import torch
    >>> from manifold_opt import AdamW, mark_orthogonal
    >>> layer = torch.nn.Linear(16, 16)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> isinstance(AdamW(layer.parameters()), torch.optim.AdamW)
    True
    """

    _algorithm = ALGORITHM._replace(decoupled=True)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        retraction: str = "orthographic",
        metric: Metric = "euclidean",
        orthogonal_lr_scale: float = 1.0,
        second_moment: SecondMoment = "element",
        beta: float = 0.5,
        correction_steps: int = 1,
        nonfinite: Nonfinite = "skip",
    ) -> None:
        options = {
            "retraction": retraction,
            "metric": metric,
            "orthogonal_lr_scale": orthogonal_lr_scale,
            "second_moment": second_moment,
            "beta": beta,
            "correction_steps": correction_steps,
            "nonfinite": nonfinite,
        }
        super().__init__(
            params,
            options,
            lr,
            betas,
            eps,
            weight_decay,
            amsgrad,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
            differentiable=differentiable,
            fused=fused,
        )
