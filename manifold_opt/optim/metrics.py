"""Metrics of the marked parameters of an optimizer."""

from __future__ import annotations

import math
from collections.abc import Iterable

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
    r"""Compute metrics of the marked parameters. A step computes none of them except the counts.

    Call it between ``loss.backward()`` and ``opt.zero_grad()``, which takes the gradients away. With marked DTensors
    this is a collective: every rank has to call it, and gets the same values.

    A value is NaN if there is nothing to measure: no parameter of that kind is in the optimizer, or none has a
    gradient. So ``opt.metrics()["orthogonality_error"] < 1e-5`` is False if nothing is marked.

    Returns:
        A dictionary of metrics by name, with these keys.

        - ``marked_parameters``: number of marked parameters.
        - ``orthogonality_error``: largest :math:`\|I - W W^\top\|_F` over all orthogonal blocks.
        - ``manifold_error``: largest error of points on other manifolds, as :meth:`~manifold_opt.Manifold.error`
          defines it.
        - ``tangent_norm``: largest :math:`\|P_W(G)\|_F` over all blocks with a gradient; zero at a constrained optimum,
          NaN also if a gradient is not finite.
        - ``skipped_blocks``: number of block updates that were skipped, because the gradient was non-finite or
          overflowed when squared, or the result was not finite.
        - ``clamped_steps``: number of block updates whose step was shortened to the longest one of its retraction. A
          block that is rotated on both sides has two steps.

    >>> import torch
    >>> from manifold_opt import SGD, mark_orthogonal
    >>> weight = mark_orthogonal(torch.nn.Parameter(torch.eye(2).repeat(2, 1)), blocks=2)
    >>> weight.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0], [torch.nan, 0.0], [0.0, 0.0]])
    >>> opt = SGD([weight], lr=0.1)
    >>> opt.step()
    >>> opt.metrics()["skipped_blocks"]
    1.0
    """
    # DTensors are gathered, so the order has to be the same on every rank.
    marked = [p for group in self.param_groups for p in group["params"] if constraint_of(p) is not None]
    sharded = self._engine.sharded
    orthogonal = [p for p in marked if isinstance(constraint_of(p), Orthogonal)]
    others = [p for p in marked if not isinstance(constraint_of(p), Orthogonal)]
    return {
        "marked_parameters": float(len(marked)),
        "orthogonality_error": _largest(map(orthogonality_error, orthogonal)),
        "manifold_error": _largest(map(_manifold_error, others)),
        "tangent_norm": _largest(_tangent_norm(p) for p in marked if p.grad is not None),
        **{name: self._engine.counters.total(name) + (sharded.total(name) if sharded else 0) for name in NAMES},
    }


def _largest(values: Iterable[float]) -> float:
    """Return the largest value, or NaN if there is none or one is NaN."""
    known = list(values)
    return max_or_nan(known) if known else math.nan


def _manifold_error(p: Tensor) -> float:
    constraint = constraint_of(p)
    assert constraint is not None
    return max_or_nan(
        float(constraint.error(get_points(layout, p.detach())).max()) for layout in constraint.layouts(p.shape)
    )


def _tangent_norm(p: Tensor) -> float:
    constraint, norms = constraint_of(p), []
    assert p.grad is not None
    assert constraint is not None
    for layout in constraint.layouts(p.shape):
        x, g = (get_points(layout, t).to(working_dtype(t.dtype)) for t in (p.detach(), p.grad))
        with FullPrecision(x.device.type):
            norms.append(float(point_norm(constraint.riemannian_gradient(x, g), layout.point_ndim).max()))
    return max_or_nan(norms)
