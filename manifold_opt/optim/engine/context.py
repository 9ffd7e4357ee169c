"""Context of a step: what all of its buckets share."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...linalg.workspace import Pool
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
