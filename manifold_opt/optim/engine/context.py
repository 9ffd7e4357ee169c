"""What a step works with, and which gradients it takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...linalg.products import host_can_branch
from ...linalg.workspace import Pool
from ...manifolds.layout import point_norm
from ..options import MAX_GRAD_NORM
from .counters import Counters


@dataclass
class StepContext:
    """What a step works with.

    Attributes:
        pool: memory of workspaces; None in a graph that is traced.
        counters: counts of blocks that are skipped, and of steps that are shortened.
        decoupled: whether weight decay is decoupled, unless a group says otherwise.
        grad_scale, found_inf: what a GradScaler leaves to a fused step.
    """

    pool: Pool | None
    counters: Counters
    decoupled: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None


def finite_gradient(g: Tensor, dims: int, context: StepContext) -> tuple[Tensor, Tensor | None]:
    """Return the gradient, zero where it is not finite or its squares are not, and where it is, ``(B, 1, ..)``.

    None in place of the mask if it may be read, and all is finite.
    """
    limit = MAX_GRAD_NORM[g.dtype]
    if host_can_branch(g) and float(torch.linalg.vector_norm(g)) <= limit:
        return g, None
    finite = finite_points(point_norm(g, dims, keepdim=True), limit, context)
    return torch.where(finite, g, 0), finite


def finite_points(size: Tensor, limit: float, context: StepContext) -> Tensor:
    """Return which points have a gradient of a size up to the limit, and count the others."""
    finite = size <= limit  # a NaN is not
    context.counters.count("skipped_blocks", ~finite)
    if context.found_inf is not None:  # where it can be read, a step has ended before it came here
        finite = finite & (context.found_inf.to(size.device) == 0)
    return finite
