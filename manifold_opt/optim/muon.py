"""Muon with marked parameters constrained to the Stiefel manifold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from ..constraints.tag import constraint_of
from ..stiefel.spectral import DISPLACEMENT
from .base import BaseOptimizer
from .directions.muon import moments, refusal, rule
from .engine.optimizer import Algorithm, Group
from .engine.plan import reset_engine
from .options import OPTIONS, Nonfinite, merge_into_groups
from .unconstrained import empty_lists_muon, step_free_rows_muon, step_unconstrained_muon

ALGORITHM = Algorithm(
    ("momentum_buffer",),
    moments,
    rule,
    empty_lists_muon,
    step_unconstrained_muon,
    step_free_rows_muon,
    decoupled=True,
    retraction=DISPLACEMENT,
    refusal=refusal,
)
IS_AVAILABLE = hasattr(torch.optim, "Muon")  # since torch 2.9


class _Missing(Optimizer):
    """Base class of Muon where torch has none, so that it can be imported."""

    def _init_group(self, group: Group, *lists: Any) -> bool:
        raise NotImplementedError


class Muon(BaseOptimizer, torch.optim.Muon if IS_AVAILABLE else _Missing):  # type: ignore[misc]
    r"""Muon with the spectral step on the manifold for marked parameters; a subclass of torch.optim.Muon.

    It needs torch 2.9. Unmarked parameters are updated bit for bit as by torch.optim.Muon; they must be real matrices.
    An orthogonal block takes the steepest step in the spectral norm: it turns by the angle ``lr`` in every plane in
    which the momentum turns it. In float32 it turns less in planes in which the momentum is weak: below about
    1 % of an upper bound on its norm for angles up to 0.1, and below 0.1 % of this bound for larger angles. A parameter
    with fixed singular values is rotated in the same way. Parameters with other constraints are refused.

    Args:
        params, momentum, nesterov: as in torch.optim.Muon.
        lr: learning rate. For orthogonal blocks it is the angle of a step in radians, whatever the shape; larger angles
            than 1.5 (0.75 for a tensor on an accelerator) are clamped and counted (:meth:`metrics`).
        weight_decay, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in torch.optim.Muon, for unmarked parameters.
            They have no effect on orthogonal blocks.
        orthogonal_lr_scale: factor for the learning rate of orthogonal blocks, at least 0.
        nonfinite: what to do with a block whose gradient G has NaN or infinity, or is so large that its square
            overflows. (With fixed singular values, :math:`G W^\top` is checked too.) ``"skip"`` leaves the block and
            its momentum unchanged, and counts it (:meth:`metrics`). ``"raise"`` raises a FloatingPointError before
            anything is modified. It synchronizes with an accelerator. A compiled step always skips.

    All options can also be set per parameter group.

    Raises:
        ValueError: an option is out of range, a parameter that is not marked is not a matrix, or one that is marked has
            another constraint than orthogonal blocks or fixed singular values.
        RuntimeError: torch has no Muon.

    Reference: arXiv 2608.06218 (*Skewon*) for the step, and https://kellerjordan.github.io/posts/muon/.

    >>> import torch
    >>> from manifold_opt import Muon, mark_orthogonal, orthogonality_error
    >>> layer = torch.nn.Linear(16, 16, bias=False)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> opt = Muon(layer.parameters(), lr=0.02)
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
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        orthogonal_lr_scale: float = 1.0,
        nonfinite: Nonfinite = "skip",
    ) -> None:
        if not IS_AVAILABLE:
            raise RuntimeError(
                f"Muon: needs torch 2.9 or later, which has torch.optim.Muon; this is torch {torch.__version__}. SGD, "
                "Adam and AdamW work with it."
            )
        # torch's constructor refuses every parameter that is not a matrix, marked ones too: it sees another one here.
        own = torch.optim.Muon(
            [torch.zeros(1, 1)],
            lr,  # type: ignore[arg-type]
            weight_decay,
            momentum,
            nesterov,
            ns_coefficients,
            eps,
            ns_steps,
            adjust_lr_fn,
        ).defaults
        options = {"orthogonal_lr_scale": orthogonal_lr_scale, "nonfinite": nonfinite}
        Optimizer.__init__(self, merge_into_groups(params, options), {**own, **options})
        reset_engine(self)
        for p in (p for group in self.param_groups for p in group["params"]):
            if p.ndim != 2 and constraint_of(p) is None:
                raise ValueError(f"Muon only supports 2D parameters whereas we found a parameter with size: {p.size()}")

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as in torch.optim. The group may set any option of the constructor."""
        others = [key for key in OPTIONS if key in param_group and key not in ("orthogonal_lr_scale", "nonfinite")]
        if others:
            raise ValueError(
                f"Muon: a parameter group sets {', '.join(others)}, which Muon does not have: its step is the exact "
                "rotation by lr. Leave it out, or use SGD, Adam or AdamW."
            )
        super().add_param_group(param_group)
