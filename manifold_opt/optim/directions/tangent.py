r"""Directions on any manifold: SGD with momentum and Adam in the tangent spaces.

Every rule returns ``scale`` times a tangent at ``x``, where ``scale`` is minus the learning rate, and the new moments
at ``x``, which the caller transports to the new point. Inputs are not modified. Hyperparameters and state keys are
those of torch.optim.

References: Bonnabel (2013); Becigneul & Ganea (ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...manifolds import Manifold
from .stiefel import AdamCoefficients, Moments, Scalar


def sgd(
    manifold: Manifold,
    x: Tensor,
    g: Tensor,
    state: Moments,
    *,
    scale: Scalar,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> tuple[Tensor, Moments]:
    r"""Compute the direction of SGD from the Riemannian gradient u, with :math:`B \leftarrow \mu B + (1-\tau) u`."""
    u = manifold.riemannian_gradient(x, g)
    if not momentum:
        return scale * u, {}
    buffer = state["momentum_buffer"] * momentum + (1 - dampening) * u
    direction = u + momentum * buffer if nesterov else buffer
    return scale * direction, {"momentum_buffer": buffer}


def adam(
    manifold: Manifold,
    x: Tensor,
    g: Tensor,
    state: Moments,
    *,
    scale: Scalar,
    coefficients: AdamCoefficients,
    dims: int,
) -> tuple[Tensor, Moments]:
    r"""Compute the direction of Adam from the Riemannian gradient u. D is projected to the tangent space.

    .. math:: M \leftarrow \beta_1 M + (1-\beta_1) u, \qquad V \leftarrow \beta_2 V + (1-\beta_2) u^2, \qquad
        D = \frac{\hat M}{\sqrt{\hat V} + \epsilon}

    The squares are those of :meth:`Manifold.component_squares`. If V has one number per point, they are averaged over
    the last ``dims`` dimensions. The real and the imaginary part of a complex entry have separate V.
    """
    u = manifold.riemannian_gradient(x, g)
    square, v = manifold.component_squares(x, u), state["exp_avg_sq"]
    if v.shape != u.shape:
        square = torch.view_as_real(square).mean(-1) if square.is_complex() else square
        square = square.expand(u.shape).mean(tuple(range(-dims, 0)), keepdim=True)
    elif v.is_complex() and not square.is_complex():
        square = torch.complex(square, square)
    v = (v * coefficients.beta2).add_((1 - coefficients.beta2) * square)
    del square
    m = _map_components(torch.lerp, state["exp_avg"], u, 1 - coefficients.beta1)
    new = {"exp_avg": m, "exp_avg_sq": v}
    if "max_exp_avg_sq" in state:
        v = new["max_exp_avg_sq"] = _map_components(torch.maximum, state["max_exp_avg_sq"], v)
    divisor = _map_components(_sqrt_plus_eps, v / coefficients.correction2, coefficients.eps)
    direction = m * (scale / coefficients.correction1)
    direction = _map_components(torch.div, direction, divisor) if divisor.is_complex() else direction.div_(divisor)
    return manifold.project_tangent(x, direction), new


def _map_components(function: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """Apply an element-wise function, separately to the real and imaginary parts of complex tensors."""
    if not x.is_complex():
        return function(x, *others)
    parts = (torch.view_as_real(y) if isinstance(y, Tensor) and y.is_complex() else y for y in (x, *others))
    return torch.view_as_complex(function(*parts))


def _sqrt_plus_eps(square: Tensor, eps: float) -> Tensor:
    return square.sqrt_().add_(eps)
