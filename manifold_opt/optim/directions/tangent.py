r"""From a gradient to a tangent on any manifold: momentum and Adam in its tangent spaces.

Every rule returns ``length`` times a tangent at ``x`` (``-lr`` is the length of a step), and the moments that it would
leave there, to be transported to where the step leads; it writes to nothing. Hyperparameters and the keys of the state
are those of torch.optim.

References: Bonnabel (2013); Becigneul & Ganea (ICLR 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...manifolds import Manifold
from .stiefel import AdamCoefficients, Moments, Scalar

TANGENT = ("momentum_buffer", "exp_avg")  # the moments that are tangents, and move along


def sgd(
    manifold: Manifold,
    x: Tensor,
    g: Tensor,
    state: Moments,
    *,
    length: Scalar,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> tuple[Tensor, Moments]:
    r"""Riemannian gradient u, with momentum if asked: :math:`B \leftarrow \mu B + (1-\tau) u`."""
    u = manifold.riemannian_gradient(x, g)
    if not momentum:
        return length * u, {}
    buffer = state["momentum_buffer"] * momentum + (1 - dampening) * u
    direction = u + momentum * buffer if nesterov else buffer
    return length * direction, {"momentum_buffer": buffer}


def adam(
    manifold: Manifold,
    x: Tensor,
    g: Tensor,
    state: Moments,
    *,
    length: Scalar,
    coefficients: AdamCoefficients,
    dims: int,
) -> tuple[Tensor, Moments]:
    r"""Adam of the Riemannian gradient u, made tangent again where the division has bent it.

    .. math:: M \leftarrow \beta_1 M + (1-\beta_1) u, \qquad V \leftarrow \beta_2 V + (1-\beta_2) u^2, \qquad
        D = \frac{\hat M}{\sqrt{\hat V} + \epsilon}

    with the squares of :meth:`Manifold.component_squares`, or where V is one number per point, their mean over the last
    ``dims`` dimensions. Of complex entries the two parts have a V each.
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
    m = _apart(torch.lerp, state["exp_avg"], u, 1 - coefficients.beta1)
    new = {"exp_avg": m, "exp_avg_sq": v}
    if "max_exp_avg_sq" in state:
        v = new["max_exp_avg_sq"] = _apart(torch.maximum, state["max_exp_avg_sq"], v)
    scale = _apart(_root, v / coefficients.correction2, coefficients.eps)
    direction = m * (length / coefficients.correction1)
    direction = _apart(torch.div, direction, scale) if scale.is_complex() else direction.div_(scale)
    return manifold.project_tangent(x, direction), new


def _apart(function: Callable[..., Tensor], x: Tensor, *others: Any) -> Tensor:
    """An element-wise function, of complex tensors for the real and the imaginary parts apart."""
    if not x.is_complex():
        return function(x, *others)
    parts = (torch.view_as_real(y) if isinstance(y, Tensor) and y.is_complex() else y for y in (x, *others))
    return torch.view_as_complex(function(*parts))


def _root(square: Tensor, eps: float) -> Tensor:
    return square.sqrt_().add_(eps)
