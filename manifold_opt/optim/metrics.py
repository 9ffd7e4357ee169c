"""What an optimizer says of its marked parameters when asked."""

from __future__ import annotations

import torch
from torch import Tensor

from ..constraints.diagnostics import max_or_nan, orthogonality_error
from ..constraints.tag import constraint_of
from ..linalg.precision import FullPrecision, working_dtype
from ..manifolds import Orthogonal
from ..manifolds.layout import get_points, point_norm
from .engine.counters import NAMES
from .engine.optimizer import ManifoldOptimizer


@torch.no_grad()
def metrics(self: ManifoldOptimizer) -> dict[str, float]:
    r"""How the marked parameters are doing. Nothing of it is computed unless this is called.

    Returns:
        Numbers by name.

        - ``orthogonality_error``: the largest :math:`\|I - W W^\top\|_F` of a block.
        - ``manifold_error``: the largest distance from its manifold of any other point, as that manifold measures it.
        - ``tangent_norm``: the largest :math:`\|P_W(G)\|_F` of a block, for the gradients that are there now; zero at a
          constrained optimum, NaN where a gradient is not finite.
        - ``skipped_blocks``: how often a block has not been moved because its gradient was not finite, or too large to
          be squared, or its result could not be right.
        - ``clamped_steps``: how often the step of a block was shortened to what its retraction can take.

    >>> import torch
    >>> from manifold_opt import SGD, mark_orthogonal
    >>> weight = mark_orthogonal(torch.nn.Parameter(torch.eye(2).repeat(2, 1)), blocks=2)
    >>> weight.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0], [torch.nan, 0.0], [0.0, 0.0]])
    >>> opt = SGD([weight], lr=0.1)
    >>> opt.step()
    >>> opt.metrics()["skipped_blocks"]
    1.0
    """
    marked = [p for group in self.param_groups for p in group["params"] if constraint_of(p) is not None]
    orthogonal = [p for p in marked if isinstance(constraint_of(p), Orthogonal)]
    return {
        "orthogonality_error": max_or_nan(map(orthogonality_error, orthogonal)),
        "manifold_error": max_or_nan(map(_error, set(marked) - set(orthogonal))),
        "tangent_norm": max_or_nan(map(_tangent_norm, marked)),
        **{name: self._engine.counters.total(name) for name in NAMES},
    }


def _error(p: Tensor) -> float:
    constraint = constraint_of(p)
    assert constraint is not None
    return max_or_nan(
        float(constraint.error(get_points(part, p.detach())).max()) for part in constraint.layouts(p.shape)
    )


def _tangent_norm(p: Tensor) -> float:
    constraint, norms = constraint_of(p), []
    if p.grad is not None and constraint is not None:
        for part in constraint.layouts(p.shape):
            x, g = (get_points(part, t).to(working_dtype(t.dtype)) for t in (p.detach(), p.grad))
            with FullPrecision(x.device.type):
                norms.append(float(point_norm(constraint.riemannian_gradient(x, g), part.point_ndim).max()))
    return max_or_nan(norms)
