"""What an optimizer says of its marked parameters when asked."""

from __future__ import annotations

import torch
from torch.optim.optimizer import Optimizer

from .constraint import constraint_of
from .diagnostics import orthogonality_error
from .precision import FullPrecision
from .stiefel import project
from .tally import NAMES


@torch.no_grad()
def metrics(self: Optimizer) -> dict[str, float]:
    r"""How the marked parameters are doing. Nothing of it is computed unless this is called.

    Returns:
        ``orthogonality_error``: the largest :math:`\|I - W W^\top\|_F` of a block.

        ``tangent_norm``: the largest :math:`\|P_W(G)\|_F` of a block, for the gradients that are there now; zero at a
        constrained optimum.

        ``skipped_blocks``: how often a block has not been moved because its gradient was not finite, or too large to be
        squared, or its result could not be right.

        ``clamped_steps``: how often the step of a block was shortened to what its retraction can take.

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
    norms = [0.0]
    for p in marked:
        constraint = constraint_of(p)
        if p.grad is not None and constraint is not None:
            w = constraint.view(p.detach()) / constraint.gain
            g = constraint.view(p.grad.contiguous())
            with FullPrecision(w.device.type):
                norms.append(float(torch.linalg.matrix_norm(project(w, g)).max()))
    return {
        "orthogonality_error": max((orthogonality_error(p) for p in marked), default=0.0),
        "tangent_norm": max(norms),
        **{name: self._tally.total(name) for name in NAMES},  # type: ignore[attr-defined]
    }
