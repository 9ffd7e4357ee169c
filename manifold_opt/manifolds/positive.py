"""Positive entries, by the exponential retraction of the positive reals."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.matrices import float64
from .base import Manifold


@dataclass(frozen=True)
class Positive(Manifold):
    r"""The constraint of a parameter whose entries are positive.

    In the metric :math:`\langle u, v\rangle_x = uv/x^2`, where :math:`\log x` is a straight coordinate: the Riemannian
    gradient is :math:`x^2 g`, and the exponential map :math:`x e^{v/x}`. A step multiplies, by at most e with Adam at
    a learning rate of one, whatever the scale of x.
    """

    allows_decoupled_decay = allows_l2_penalty = True

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """:math:`x^2 g`."""
        return x * (x * g)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """:math:`x e^{v/x}`, kept within what the dtype can hold and still square."""
        return (x * (v / x).exp()).clamp(*_limits(x.dtype))

    def project_tangent(self, x: Tensor, d: Tensor) -> Tensor:  # noqa: ARG002
        """All numbers are."""
        return d

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """:math:`(v/x) y`: parallel along the step."""
        return (v / x) * y

    def component_squares(self, x: Tensor, u: Tensor) -> Tensor:
        """:math:`u^2/x^2`, its square in the metric."""
        return (u / x) ** 2

    def project_point(self, x: Tensor) -> Tensor:
        """Positive entries themselves; of others there is none, as the positive reals have no smallest."""
        least, most = _limits(x.dtype)
        off = x[~((x > 0.98 * least) & (x < 1.02 * most))]  # those are rounded themselves
        if len(off):
            raise ValueError(
                f"entries that are not positive and finite, or whose squares are not, such as {float(off[0]):.3g}: "
                f"they must lie between {least:.3g} and {most:.3g}. Make them so first, with clamp_ or "
                "torch.nn.functional.softplus."
            )
        return x

    def find_off_manifold(self, x: Tensor, slack: float = 0.0) -> tuple[Tensor, Tensor]:  # noqa: ARG002
        """Which are not positive: none, or a ValueError."""
        return ~(self.project_point(x) > 0), x.new_empty(0)

    def error(self, x: Tensor) -> Tensor:
        """How far below the smallest of the dtype; NaN of what is not finite."""
        exact = float64(x)
        below = torch.where(exact > 0, 0, torch.finfo(x.dtype).tiny - exact)
        return torch.where(exact.isfinite(), below, torch.nan)

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """A dtype in which small numbers are zero."""
        if tensor.dtype is torch.float16:
            return "has dtype torch.float16, where all below 3e-8 is zero; keep it in bfloat16 or float32."
        return None


def _limits(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the most whose squares a dtype can hold."""
    limits = torch.finfo(dtype)
    return limits.tiny**0.5, limits.max**0.5
