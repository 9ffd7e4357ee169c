"""The oracle for other manifolds than Stiefel's: one point at a time, in float64, nothing shared with the package.

A geometry says the Riemannian gradient at a point, where a step ends, and what becomes of a tangent on the way.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Unit:
    """A vector of norm one, or a tensor that is one flattened. Absil, Mahony & Sepulchre (2008), 3.6.1, 4.1.1."""

    allows_decoupled_decay = False

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        return g - float((x * g).sum()) * x

    project_tangent = gradient

    def step(self, x: Tensor, v: Tensor) -> Tensor:
        return (x + v) / math.sqrt(float(((x + v) ** 2).sum()))

    def carry(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        return v  # what becomes normal of it is projected away when it is used

    def component_squares(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: ARG002
        return u**2


class Ball:
    """A matrix with singular values of at most ``bound``; its gradients and tangents are all matrices."""

    allows_decoupled_decay = True

    def __init__(self, bound: float) -> None:
        self.bound = bound

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:  # noqa: ARG002
        return g

    project_tangent = gradient

    def step(self, x: Tensor, v: Tensor) -> Tensor:
        y = x + v
        u, s, vh = torch.linalg.svd(y, full_matrices=False)
        return u @ torch.diag(torch.tensor([min(float(x), self.bound) for x in s], dtype=y.dtype)) @ vh

    def carry(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        return v

    def component_squares(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: ARG002
        return u**2


class Logarithm:
    """A positive number: everything is what it is for its logarithm, times x."""

    allows_decoupled_decay = True

    def gradient(self, x: Tensor, g: Tensor) -> Tensor:
        return x * x * g

    def project_tangent(self, x: Tensor, d: Tensor) -> Tensor:  # noqa: ARG002
        return d

    def step(self, x: Tensor, v: Tensor) -> Tensor:
        return torch.tensor(math.exp(math.log(float(x)) + float(v) / float(x)), dtype=x.dtype)

    def carry(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        return v / x * y

    def component_squares(self, x: Tensor, u: Tensor) -> Tensor:
        return (u / x) ** 2


def descend(
    geometry: Unit | Ball | Logarithm,
    x: Tensor,
    gradients: list[Tensor],
    *,
    lr: float,
    rule: str,
    weight_decay: float = 0.0,
    decoupled: bool = False,
    maximize: bool = False,
    momentum: float = 0.0,
    dampening: float = 0.0,
    nesterov: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    amsgrad: bool = False,
    second_moment: str = "element",
) -> Tensor:
    """Where a point ends: torch's formulas with the geometry's words for gradient, step and what is carried along."""
    m = None
    v: Tensor | float = 0.0
    largest: Tensor | None = None
    for t, g in enumerate(gradients, 1):
        g = -g if maximize else g
        start = x
        if weight_decay and geometry.allows_decoupled_decay and decoupled:
            start = (1 - lr * weight_decay) * x
            m = None if m is None else geometry.carry(x, start, m)
        elif weight_decay and geometry.allows_decoupled_decay:
            g = g + weight_decay * x
        u = geometry.gradient(start, g)
        if rule == "sgd":
            m = u if m is None else momentum * m + (1 - dampening) * u
            direction = geometry.project_tangent(start, u + momentum * m if nesterov else m)
        else:
            m = (1 - betas[0]) * u + (0.0 if m is None else betas[0] * m)
            square = geometry.component_squares(start, u)
            square = square.mean() if second_moment == "block" else square
            v = betas[1] * v + (1 - betas[1]) * square
            largest = v if largest is None else torch.maximum(largest, v)
            root = ((largest if amsgrad else v) / (1 - betas[1] ** t)).sqrt()
            direction = geometry.project_tangent(start, m / (1 - betas[0] ** t) / (root + eps))
        y = geometry.step(start, -lr * direction)
        m, x = geometry.carry(start, y, m), y
    return x
