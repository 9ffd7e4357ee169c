"""SGD, Adam and AdamW that keep marked parameters on their manifold: thin shells over the mathematics.

isinstance of torch's own classes, with their signatures, defaults and state; the step is this package's.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..stiefel.geometry import Metric
from .directions.stiefel import SecondMoment
from .engine.checkpoint import load_state_dict, state_dict
from .engine.plan import reset_plan, without_marked
from .engine.state import check_recorded, upgrade
from .engine.step import Algorithm, Closure, check_capture, step
from .metrics import metrics
from .options import OnFault, add_param_group, fill_options, with_options
from .rules import adam_moments, rule_of_adam, rule_of_sgd, sgd_moments
from .unconstrained import (
    lists_of_adam,
    lists_of_sgd,
    step_rests_adam,
    step_rests_sgd,
    step_unmarked_adam,
    step_unmarked_sgd,
)

_SGD = Algorithm(
    torch.optim.SGD._init_group,
    sgd_moments,
    lists_of_sgd,
    step_unmarked_sgd,
    step_rests_sgd,
    rule_of_sgd,
    decoupled=False,
)
_ADAM = Algorithm(
    torch.optim.Adam._init_group,
    adam_moments,
    lists_of_adam,
    step_unmarked_adam,
    step_rests_adam,
    rule_of_adam,
    decoupled=False,
)
_ADAMW = _ADAM._replace(init_group=torch.optim.AdamW._init_group, decoupled=True)


class SGD(torch.optim.SGD):
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
        on_fault: what to do about a block whose gradient is not finite, or too large to be squared. ``"skip"`` leaves
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

    _algorithm = _SGD
    _state_keys = ("momentum_buffer",)  # entries of the state that this package reads and writes

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
        on_fault: OnFault = "skip",
    ) -> None:
        options = {
            "retraction": retraction,
            "metric": metric,
            "orthogonal_lr_scale": orthogonal_lr_scale,
            "beta": beta,
            "correction_steps": correction_steps,
            "on_fault": on_fault,
        }
        super().__init__(
            with_options(params, options),
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
        self.defaults.update(options)
        reset_plan(self)

    add_param_group = add_param_group
    load_state_dict = load_state_dict
    state_dict = state_dict

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_recorded(self, state)
        fill_options(self, state)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        upgrade(self)
        reset_plan(self)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        return super()._init_group(without_marked(self, group), *lists)  # type: ignore[no-untyped-call]

    def step(self, closure: Closure | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is handed back.
        """
        return step(self, closure)

    metrics = metrics


class Adam(torch.optim.Adam):
    r"""torch.optim.Adam that keeps marked parameters on their manifold: orthogonal ones orthogonal.

    Unmarked parameters train bit for bit as with torch.optim.Adam. The direction of a marked one is made
    tangent, and it is retracted onto the manifold in every step. Weight decay does not act on orthogonal ones
    and those of unit norm: their length is fixed.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, decoupled_weight_decay: as in torch.optim.Adam.
        foreach, maximize, capturable, differentiable, fused: as in torch.optim.Adam. The last two must be off in a
            group with marked parameters.
        retraction: a name in :data:`~manifold_opt.RETRACTIONS`: how a marked block moves along its direction.
        metric: ``"euclidean"`` or ``"canonical"``: whose gradient is followed. On square blocks the
            canonical one is twice as long.
        orthogonal_lr_scale: learning rate of orthogonal blocks as a multiple of their group's, at least 0.
        second_moment: ``"element"`` holds one mean square an entry, as torch does, and learns fastest.
            ``"block"`` holds one mean square a block, equivariant under rotations (Becigneul & Ganea 2019).
        beta: rate of ``retraction="orthogonalizer"``, in (0, 1).
        correction_steps: number of iterations of ``retraction="orthogonalizer"``, at least 1.
        on_fault: what to do about a block whose gradient is not finite, or too large to be squared. ``"skip"`` leaves
            the block and its moments as they are, and counts it (:meth:`metrics`); ``"raise"`` raises a
            FloatingPointError, and nothing at all has been changed. (That looks at every gradient first: on an
            accelerator it waits, and in a compiled step it is ``"skip"``.)

    All keyword-only options can also be set in a parameter group.

    Raises:
        ValueError: an option out of range, or one that a marked parameter cannot honour.

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

    _algorithm = _ADAM
    _state_keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

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
        on_fault: OnFault = "skip",
    ) -> None:
        options = {
            "retraction": retraction,
            "metric": metric,
            "orthogonal_lr_scale": orthogonal_lr_scale,
            "second_moment": second_moment,
            "beta": beta,
            "correction_steps": correction_steps,
            "on_fault": on_fault,
        }
        # torch 2.6 does not have it yet.
        newer = {"decoupled_weight_decay": True} if decoupled_weight_decay else {}
        super().__init__(
            with_options(params, options),
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
        self.defaults.update(options)
        reset_plan(self)

    add_param_group = add_param_group
    load_state_dict = load_state_dict
    state_dict = state_dict

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_recorded(self, state)
        fill_options(self, state)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        upgrade(self)
        reset_plan(self)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        return super()._init_group(without_marked(self, group), *lists)  # type: ignore[no-untyped-call]

    def step(self, closure: Closure | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is handed back.
        """
        check_capture(self)
        return step(self, closure)

    metrics = metrics


class AdamW(torch.optim.AdamW):
    r"""torch.optim.AdamW that keeps marked parameters on their manifold: orthogonal ones orthogonal.

    Everything as in :class:`Adam`, but that weight decay is decoupled, on by default (0.01). It acts on unmarked
    parameters, and on those whose manifold it does not lead away from: of bounded spectral norm, and positive ones.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, foreach, capturable, differentiable, fused:
            as in torch.optim.AdamW.
        retraction, metric, orthogonal_lr_scale, second_moment, beta, correction_steps, on_fault: as in :class:`Adam`.

    Raises:
        ValueError: an option out of range, or one that a marked parameter cannot honour.

    >>> import torch
    >>> from manifold_opt import AdamW, mark_orthogonal
    >>> layer = torch.nn.Linear(16, 16)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> isinstance(AdamW(layer.parameters()), torch.optim.AdamW)
    True
    """

    _algorithm = _ADAMW
    _state_keys = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")

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
        on_fault: OnFault = "skip",
    ) -> None:
        options = {
            "retraction": retraction,
            "metric": metric,
            "orthogonal_lr_scale": orthogonal_lr_scale,
            "second_moment": second_moment,
            "beta": beta,
            "correction_steps": correction_steps,
            "on_fault": on_fault,
        }
        super().__init__(
            with_options(params, options),
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
        self.defaults.update(options)
        reset_plan(self)

    add_param_group = add_param_group
    load_state_dict = load_state_dict
    state_dict = state_dict

    def __setstate__(self, state: dict[str, Any]) -> None:
        check_recorded(self, state)
        fill_options(self, state)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        upgrade(self)
        reset_plan(self)

    def _init_group(self, group: dict[str, Any], *lists: Any) -> bool:
        return super()._init_group(without_marked(self, group), *lists)  # type: ignore[no-untyped-call]

    def step(self, closure: Closure | None = None) -> Any:
        """Perform a single optimization step.

        Args:
            closure: reevaluates the model and returns the loss, which is handed back.
        """
        check_capture(self)
        return step(self, closure)

    metrics = metrics
