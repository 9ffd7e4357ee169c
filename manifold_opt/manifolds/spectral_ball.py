"""Ball of matrices with bounded spectral norm, for Lipschitz layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.matrices import float64
from ..linalg.precision import working_dtype
from ..linalg.products import Workspace, norm
from ..linalg.singular_values import (
    MAX_BOUND,
    MIN_BOUND,
    clip_and_measure_,
    clip_singular_values_,
    is_inside_ball,
    tolerance,
)
from ..linalg.spectral_norm import step_length
from .base import Manifold, StepOptions, decay_factor
from .layout import BlockLayout, Shape


@dataclass(frozen=True)
class Spectral(Manifold):
    r"""Constraint of a parameter, flattened to (first, rest), whose largest singular value is at most ``bound``.

    Inside the ball a step equals that of torch.optim. A step that leaves the ball ends at the nearest point,
    :math:`U \min(S, b) V^\top`.

    Attributes:
        bound: the largest singular value allowed.
        dim: the dimension that becomes the rows when flattened: 1 for a transposed convolution.
    """

    allows_decoupled_decay = allows_l2_penalty = True
    bound: float = 1.0
    dim: int = 0

    def layouts(self, shape: Shape) -> tuple[BlockLayout, ...]:
        """Return one layout, a single matrix ``(1, p, n)``."""
        return (BlockLayout(shape[self.dim], row_dim=self.dim),)

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``g``: the space is flat."""
        return g

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the point nearest to x + v."""
        return clip_singular_values_(x + v, self.bound)

    def step_(self, x: Tensor, v: Tensor, moments: dict[str, Tensor], ws: Workspace, options: StepOptions) -> None:
        """Move points along tangents in place.

        A step shorter than the slack, what is left of the distance to the boundary since the spectrum was checked, ends
        inside: it is ``x + v`` as it would be after another check, so that no checkpoint needs the slack. The slack is
        negative after a step that clipped every point, none of them from far outside. The next step then probably
        leaves the ball again.
        """
        if not ws.readable:
            return super().step_(x, v, moments, ws, options)
        slack, ws.slack = ws.slack, 0.0
        start = x * decay_factor(options.decay) if options.decay else x
        if slack > 0 and (left := slack - step_length(v, slack) - _SPENT_PER_STEP * self.bound) > 0:  # False for NaN
            torch.add(start, v, out=x)
            ws.slack = left
            return None
        if bool((norm(v) > 0).all()):
            y = torch.add(start, v, out=ws.y)
            slacks = clip_and_measure_(y, self.bound, expect_outside=slack < 0)
            least, largest = map(float, slacks.aminmax())
            if not math.isnan(least):
                x.copy_(y)
                ws.slack = largest if largest < 0 else max(least, 0.0)
                return None
        return super().step_(x, v, moments, ws, options)  # with masks: a point stays where it is

    def project_point(self, x: Tensor) -> Tensor:
        """Clip the singular values to the bound."""
        if not bool(x.isfinite().all()):
            raise ValueError("the value has entries that are not finite. Initialize it first.")
        # The CPU path reads values, so it also handles matrices far outside the ball.
        return clip_singular_values_(x.cpu(), self.bound).to(x) if x.device.type != "cpu" else self.retract(x, 0 * x)

    def find_off_manifold(self, x: Tensor, allowed: float = 0.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return a mask of the matrices outside the ball by more than rounding, and their nearest points."""
        values = x.to(working_dtype(x.dtype))
        off = self.error(x) > self.tolerance(x) if values is not x else ~is_inside_ball(values, self.bound)
        return off, self.project_point(values[off]).to(x) if bool(off.any()) else x[off]

    def error(self, x: Tensor) -> Tensor:
        """Return the excess of the largest singular value over the bound, relative to it."""
        finite = x.isfinite().all(-1).all(-1)
        largest = torch.linalg.matrix_norm(float64(torch.where(finite[:, None, None], x, 0)), 2)
        return torch.where(finite.to(largest.device), (largest / self.bound - 1).clamp_min(0), torch.nan)

    def tolerance(self, x: Tensor) -> float:
        """Return the rounding error of clipping, plus that of a dtype below float32."""
        stored = torch.finfo(x.dtype).eps if working_dtype(x.dtype) != x.dtype else 0.0
        return tolerance(x.to(working_dtype(x.dtype))) + stored

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """Return a reason if the bound is out of range, or the tensor does not have the dimension."""
        shape = tuple(tensor.shape)
        if tensor.ndim < 2:
            return f"must have at least 2 dimensions, got shape {shape}; a vector has no singular values."
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or not 0 <= self.dim < len(shape):
            return f"has shape {shape}: its rows cannot lie along dim={self.dim!r}; give one of 0 to {len(shape) - 1}."
        number = isinstance(self.bound, (int, float)) and not isinstance(self.bound, bool)
        if not number or not MIN_BOUND <= self.bound <= MAX_BOUND:
            return (
                f"needs a bound from {MIN_BOUND:g} to {MAX_BOUND:g}, got {self.bound!r}. 1.0 makes a layer 1-Lipschitz."
            )
        return None


_SPENT_PER_STEP = (
    2e-3  # of the bound, besides the length: for rounding, and to find writes through .data within 500 steps
)
