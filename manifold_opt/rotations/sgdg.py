r"""SGDG: Cayley SGD, with the step cut as in its paper, by the exact transform and with a stored momentum.

Reference: Li, Li & Todorovic (ICLR 2020), *Efficient Riemannian optimization on the Stiefel manifold via the Cayley
transform*, algorithm 1.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..constraints.tag import constraint_of, was_unmarked
from ..constraints.validation import project_and_tag, validate_parameter
from ..manifolds import Orthogonal
from ..optim.base import BaseOptimizer, Closure
from ..optim.directions.cayley_sgd import rule
from ..optim.engine.optimizer import Group
from ..optim.options import OPTIONS, Nonfinite, describe_param, track_constraints
from ..optim.sgd import ALGORITHM as SGD_ALGORITHM
from ..stiefel.retractions import RETRACTIONS

ALGORITHM = SGD_ALGORITHM._replace(rule=rule, retraction=RETRACTIONS["cayley"])
_OWN_OPTIONS = ("stiefel", "omega", "grad_clip")
_TAKEN_OPTIONS = ("orthogonal_lr_scale", "nonfinite")  # those of this package that SGDG has


class SGDG(BaseOptimizer, torch.optim.SGD):
    r"""Cayley SGD under the name and with the arguments of its published class; a subclass of torch.optim.SGD.

    In a group with ``stiefel=True`` every parameter is orthogonal. One that is not marked yet is marked, as by
    :func:`~manifold_opt.mark_orthogonal`, which moves it to the nearest orthogonal matrix: orthonormal rows, or columns
    if it is taller than wide, filters flattened to (first, rest). A step of a block X, ``(n, p)`` with orthonormal
    columns (the transpose of the parameter, or of a block of it), is the exact Cayley transform

    .. math:: X \leftarrow (I - \tfrac{\alpha}{2} W)^{-1} (I + \tfrac{\alpha}{2} W) X, \qquad
        \alpha = \min\Big\{\text{lr}, \frac{2q}{\lVert W \rVert_1 + \epsilon}\Big\}, \quad q = \tfrac12,
        \quad \epsilon = 10^{-8},

    where :math:`W X` is minus the momentum projected onto the tangent space at X, W is skew, and :math:`\lVert W
    \rVert_1` is its largest column sum of absolute values. In a group with ``stiefel=False`` unmarked parameters are
    updated bit for bit as by torch.optim.SGD, and marked ones as by :class:`~manifold_opt.SGD` with
    ``retraction="cayley"``, with no bound on the step.

    The published class has no momentum in effect: it writes the new momentum to a temporary variable, and its buffer
    stays zero. To take the same steps as that class, with any of its values of ``momentum``, use ``momentum=0`` here.

    Args:
        params: as in torch.optim.SGD.
        lr: learning rate, finite; with ``stiefel=True`` the longest step :math:`\alpha`. The published class has no
            default; this one has that of torch.optim.SGD, so that groups with an ``lr`` of their own are enough.
        momentum: as in torch.optim.SGD. The momentum of an orthogonal block is stored, and moved to the tangent space
            at every new point.
        dampening, nesterov: as in torch.optim.SGD, for orthogonal blocks too; the published class ignores them there.
        weight_decay: as in torch.optim.SGD. It has no effect on orthogonal blocks.
        stiefel: whether the parameters of the group are orthogonal, and the step is bounded.
        omega, grad_clip: only the defaults, 0 and None. The published class does not use other values.
        orthogonal_lr_scale: factor for the learning rate of orthogonal blocks, at least 0.
        nonfinite: behavior for a block whose gradient is not finite, as in :class:`~manifold_opt.SGD`.

    All options can also be set per parameter group. The bound costs two more products for a square block, and
    :math:`2 + 2 n / p` of them, p x n by n x p, for a wide one: W is n x n.

    Raises:
        ValueError: an option is out of range; ``omega`` or ``grad_clip`` has a value other than its default; or a
            parameter of a group with ``stiefel=True`` cannot be marked, or is marked with another constraint. No
            parameter is changed then.

    Reference: Li, Li & Todorovic (ICLR 2020), *Efficient Riemannian optimization on the Stiefel manifold via the Cayley
    transform*, algorithm 1; the class is in SpinQuant (Liu et al., arXiv 2405.16406), ``train_utils/optimizer.py``.

    >>> import torch
    >>> from manifold_opt import orthogonality_error
    >>> from manifold_opt.rotations import SGDG
    >>> rotation = torch.nn.Parameter(torch.eye(16))
    >>> opt = SGDG([rotation], lr=1.5, stiefel=True)
    >>> (torch.randn(64, 16) @ rotation).norm(4).backward()
    >>> opt.step()
    >>> orthogonality_error(rotation) < 1e-5
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
        stiefel: bool = False,
        omega: float = 0,
        grad_clip: float | None = None,
        *,
        orthogonal_lr_scale: float = 1.0,
        nonfinite: Nonfinite = "skip",
    ) -> None:
        options = {
            "stiefel": stiefel,
            "omega": omega,
            "grad_clip": grad_clip,
            "orthogonal_lr_scale": orthogonal_lr_scale,
            "nonfinite": nonfinite,
        }
        super().__init__(params, options, lr, momentum, dampening, weight_decay, nesterov)
        _mark(self, self.param_groups)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group, as in torch.optim. The group may set any option of the constructor."""
        _validate_options({**self.defaults, **param_group} if isinstance(param_group, dict) else {})
        super().add_param_group(param_group)
        if hasattr(self, "_engine"):  # otherwise the constructor does it, once for all groups
            try:
                _mark(self, self.param_groups[-1:])
            except ValueError:
                self.param_groups.pop()
                raise

    def step(self, closure: Closure | None = None) -> Any:
        """Perform a single optimization step, as torch.optim.SGD does.

        Parameters of a group whose ``stiefel`` was set to True after the group was added are marked first.
        """
        if not torch.compiler.is_compiling():
            stiefel = [group for group in self.param_groups if group["stiefel"]]
            late = [g for g in stiefel if any(constraint_of(p) is None and not was_unmarked(p) for p in g["params"])]
            if late:
                _mark(self, late)
        return super().step(closure)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A checkpoint of another SGD has no options of this class: its groups get those of the groups they replace.
        own = self.param_groups if hasattr(self, "param_groups") else ()
        for group, new in zip(own, state.get("param_groups", ()), strict=False):
            for name in _OWN_OPTIONS:
                new.setdefault(name, group[name])
        super().__setstate__(state)


def _validate_options(group: Group) -> None:
    """Raise a ValueError for an option of a group that SGDG does not have, or that would have no effect."""
    others = [name for name in OPTIONS if name in group and name not in _TAKEN_OPTIONS]
    if others:
        raise ValueError(
            f"SGDG: a parameter group sets {', '.join(others)}, which SGDG does not have: its step is the Cayley "
            "transform. Leave it out, or use SGD, Adam or AdamW."
        )
    if not isinstance(group.get("stiefel", False), bool):
        raise ValueError(f"SGDG: stiefel must be True or False, got {group['stiefel']!r}.")
    if not math.isfinite(float(group.get("lr", 0.0))):
        raise ValueError(
            f"SGDG: lr must be finite, got {group['lr']}. It is the longest step of a group with stiefel=True; a large "
            "number, such as 1e9, always takes the bound."
        )
    if group.get("omega", 0) != 0:
        raise ValueError(
            f"SGDG: omega must be 0, got {group['omega']}. The published class does not use it, and here the "
            "parameters are orthogonal to rounding, so that no regularization is needed. Leave it out."
        )
    if group.get("grad_clip") is not None:
        raise ValueError(
            f"SGDG: grad_clip must be None, got {group['grad_clip']}. The published class does not use it: leave it "
            "out for its steps, or call torch.nn.utils.clip_grad_norm_ before the step."
        )


def _mark(optimizer: SGDG, groups: list[Group]) -> None:
    """Mark the parameters of groups with ``stiefel=True`` as orthogonal: all of them, or none after an error."""
    marks = []
    for group in groups:
        for p in group["params"] if group["stiefel"] else ():
            label = f"a parameter of shape {describe_param(group, p)} in a group with stiefel=True"
            constraint = constraint_of(p)
            if constraint is None:
                try:
                    validate_parameter("SGDG", p, Orthogonal(), label)
                except ValueError as error:
                    raise ValueError(f"{error} In a group with stiefel=False it trains as with SGD.") from None
                marks.append((p, Orthogonal(), label))
            elif not isinstance(constraint, Orthogonal):
                raise ValueError(
                    f"SGDG: {label} is marked as {constraint}. Give it a group with stiefel=False, or call "
                    "unmark on it."
                )
    project_and_tag("SGDG", marks)
    track_constraints(optimizer, [p for group in groups for p in group["params"]])
