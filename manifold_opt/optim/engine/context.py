"""Context of a step, and the test for finite gradients."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...linalg.products import host_can_branch
from ...linalg.workspace import Pool
from ...manifolds.layout import point_norm
from ..options import MAX_GRAD_NORM
from .counters import Counters
from .optimizer import Algorithm


@dataclass
class StepContext:
    """Objects that all buckets of a step share.

    Attributes:
        pool: memory of workspaces; None in a traced graph.
        counters: counts of skipped blocks and shortened steps.
        algorithm: that of the optimizer.
        grad_scale, found_inf: attributes that a GradScaler sets on a fused optimizer.
    """

    pool: Pool | None
    counters: Counters
    algorithm: Algorithm
    grad_scale: Tensor | None
    found_inf: Tensor | None


def finite_gradient(g: Tensor, dims: int, context: StepContext) -> tuple[Tensor, Tensor | None]:
    """Return the gradient, zeroed where it or its square is non-finite, and a mask of the other points ``(B, 1, ..)``.

    The mask is None if values can be read and all are finite.
    """
    limit = MAX_GRAD_NORM[g.dtype]
    if host_can_branch(g) and float(torch.linalg.vector_norm(g)) <= limit:
        return g, None
    finite = finite_points(point_norm(g, dims, keepdim=True), limit, context)
    return torch.where(finite, g, 0), finite


def finite_points(size: Tensor, limit: float, context: StepContext) -> Tensor:
    """Return a mask of points with a gradient norm up to the limit, and count the others."""
    finite = size <= limit  # False for NaN
    context.counters.count("skipped_blocks", ~finite)
    if context.found_inf is not None:  # not readable, or the step would have returned before
        finite = finite & (context.found_inf.to(size.device) == 0)
    return finite
