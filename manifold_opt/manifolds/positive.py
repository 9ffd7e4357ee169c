"""Manifold of parameters with positive entries, with the exponential map of the positive reals as retraction."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.matrices import float64
from ..linalg.products import Workspace
from .base import Manifold, StepOptions, decay_factor
from .layout import Shape


@dataclass(frozen=True)
class Positive(Manifold):
    r"""Constraint of a parameter whose entries are positive.

    In the metric :math:`\langle u, v\rangle_x = uv/x^2`, which is flat in the coordinate :math:`\log x`, the Riemannian
    gradient is :math:`x^2 g` and the exponential map :math:`x e^{v/x}`. A step multiplies x by a factor that does not
    depend on the scale of x: at most e with Adam at a learning rate of one.
    """

    allows_decoupled_decay = allows_l2_penalty = True

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Return :math:`x^2 g`."""
        return x * (x * g)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Return :math:`x e^{v/x}`, clamped to the range whose squares are normal numbers of the dtype."""
        return (x * (v / x).exp()).clamp(*_limits(x.dtype))

    def project_tangent(self, x: Tensor, d: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``d``: every real number is a tangent."""
        return d

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return :math:`(v/x) y`, the parallel transport along the step."""
        return (v / x) * y

    def component_squares(self, x: Tensor, u: Tensor) -> Tensor:
        """Return :math:`u^2/x^2`, the square of the tangent in the metric."""
        return (u / x) ** 2

    def frame_gradient(self, x: Tensor, g: Tensor, ws: Workspace) -> Tensor:
        r"""Return the gradient with respect to :math:`\log x`, in which moments need no transport."""
        return torch.mul(x, g, out=ws.x)

    def frame_squares(self, x: Tensor, a: Tensor) -> None:
        """Return None: in this coordinate the metric is the Euclidean one."""

    def has_frame(self, shape: Shape) -> bool:  # noqa: ARG002
        """Return True."""
        return True

    def change_frame(self, x: Tensor, moment: Tensor, *, mean_square: bool, back: bool) -> Tensor:
        r"""Multiply a mean by x, the derivative of x by :math:`\log x`, and a mean square by its square, or divide."""
        scale = x * x if mean_square else x
        return moment / scale if back else moment * scale

    def step_(self, x: Tensor, v: Tensor, moments: dict[str, Tensor], ws: Workspace, options: StepOptions) -> None:  # noqa: ARG002
        """Add ``v`` to the logarithms in place. A point with a zero step keeps its bits."""
        factor = torch.exp(v, out=ws.y)
        if isinstance(options.decay, Tensor) or options.decay:
            factor.mul_(decay_factor(options.decay))
        if not (ws.readable and math.isfinite(float(v.sum()))):
            factor.masked_fill_(~options.accept(v * 0 == 0), 1)  # v * 0 is NaN for NaN and Inf
        x.mul_(factor).clamp_(*_limits(x.dtype))

    def project_point(self, x: Tensor) -> Tensor:
        """Return ``x``; raise a ValueError unless it is positive: other values have no nearest point."""
        least, most = _limits(x.dtype)
        off = x[~((x > 0.98 * least) & (x < 1.02 * most))]  # tolerates the rounding of clamped values
        if len(off):
            raise ValueError(
                f"entries that are not positive and finite, or whose squares are not, such as {float(off[0]):.3g}: "
                f"they must lie between {least:.3g} and {most:.3g}. Make them so first, with clamp_ or "
                "torch.nn.functional.softplus."
            )
        return x

    def find_off_manifold(self, x: Tensor, slack: float = 0.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Return an empty mask and no corrections; raise a ValueError unless all entries are positive."""
        return ~(self.project_point(x) > 0), x.new_empty(0)

    def error(self, x: Tensor) -> Tensor:
        """Return how far an entry is below the smallest normal number of the dtype; NaN if it is not finite."""
        exact = float64(x)
        below = torch.where(exact > 0, 0, torch.finfo(x.dtype).tiny - exact)
        return torch.where(exact.isfinite(), below, torch.nan)

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """Return a reason for float16, in which small numbers underflow to zero."""
        if tensor.dtype is torch.float16:
            return "has dtype torch.float16, where all below 3e-8 is zero; keep it in bfloat16 or float32."
        return None


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    """Return the smallest and the largest number whose squares a dtype can represent."""
    limits = torch.finfo(dtype)
    return limits.tiny**0.5, limits.max**0.5
