r"""From a gradient to a direction: momentum and Adam on the Stiefel manifold, as pure functions.

Points ``w`` are wide batches ``(B, p, n)``; gradients and moments have their shape. Every function returns
a tangent direction at ``w`` (the step is ``-lr`` times it) and the new state, and writes nothing. State
keys, hyperparameters and their meaning are torch.optim's own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .stiefel import Metric, coordinates, from_coordinates, transport

Moments = dict[str, Tensor]
SecondMoment = Literal["element", "block"]

_LARGEST_FACTOR = 100.0  # by which an entry of the element-wise direction may exceed the plain one


def sgd(
    w: Tensor,
    g: Tensor,
    state: Moments,
    *,
    metric: Metric,
    momentum: float,
    dampening: float,
    nesterov: bool,
) -> tuple[Tensor, Moments]:
    r"""Riemannian gradient, with momentum if asked.

    The buffer is a tangent. It is transported by projection, which is linear, so that the transport of the
    old buffer and the projection of the new gradient are one:

    .. math:: b \leftarrow P_W(\mu b + (1-\tau) G), \qquad
              d = b \;\text{ or, for Nesterov, }\; P_W(G) + \mu b.
    """
    if momentum == 0:
        return in_metric(w, transport(w, g), metric), {}
    old = state.get("momentum_buffer")
    buffer = transport(w, g if old is None else momentum * old + (1 - dampening) * g)
    direction = transport(w, g) + momentum * buffer if nesterov else buffer
    return in_metric(w, direction, metric), {"momentum_buffer": buffer}


def adam_element(
    w: Tensor,
    g: Tensor,
    state: Moments,
    *,
    metric: Metric,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    step: float,
) -> tuple[Tensor, Moments]:
    r"""Adam with torch's element-wise moments of the Euclidean gradient, made a tangent that descends.

    The moments m and v are torch's, so entries of different scale are evened out where the gradient has
    them: :math:`d = \hat m/(\sqrt{\hat v} + \epsilon)`. To project d is not enough. At a constrained
    optimum m is normal to the manifold, not zero, and the division turns it back into the tangent space
    (minimizing -<M, W> would end at the polar factor of sign(M), not of M). What vanishes there is the
    projection of m itself. So in tangent coordinates :math:`(\Omega, N)`, with :math:`f` the coordinates
    of m over their root mean square and :math:`a` those of d, the step is

    .. math:: f \cdot \operatorname{clip}(a / f,\, 1,\, 100):

    a where it descends and is the larger, f elsewhere; always a positive multiple of f, entry by entry (of
    which the normal part is then projected once more). The mean squares are those of independent entries of
    G, with r the row means of v: :math:`(r_i + r_j)/4` for :math:`\Omega_{ij}` and, on average over its row,
    :math:`r_i (1 - p/n)` for :math:`N_{ij}`.
    """
    exp_avg = torch.lerp(state["exp_avg"], g, 1 - beta1)
    new, second = _second_moment(state, g * g, beta2)
    m, v = exp_avg / (1 - beta1**step), second / (1 - beta2**step)
    d = m / (v.sqrt() + eps)

    rows = v.mean(-1, keepdim=True)
    mean_squares = ((rows + rows.mT) / 4, rows * (1 - w.shape[-2] / w.shape[-1]))
    tangent = []
    for t, a, square in zip(coordinates(w, m), coordinates(w, d), mean_squares, strict=False):
        f = t / (square.sqrt() + eps)
        tangent.append(f * (a / torch.where(f == 0, 1, f)).clamp(1, _LARGEST_FACTOR))
    return in_metric(w, from_coordinates(w, *tangent), metric), {"exp_avg": exp_avg, **new}


def adam_block(
    w: Tensor,
    g: Tensor,
    state: Moments,
    *,
    metric: Metric,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float,
    step: float,
) -> tuple[Tensor, Moments]:
    r"""Adam with one second moment a block, the mean square of its Riemannian gradient.

    Equivariant: rotating the problem rotates the steps. The first moment is a tangent, transported by
    projection; ``exp_avg_sq`` is ``(B, 1, 1)``. A mean, not a sum, so that the step has the length of
    torch.optim.Adam's at the same learning rate.

    Reference: Becigneul & Ganea (ICLR 2019), with one block as one manifold.
    """
    xi = transport(w, g)
    exp_avg = torch.lerp(transport(w, state["exp_avg"]), xi, 1 - beta1)
    new, second = _second_moment(state, (xi * xi).mean((-2, -1), keepdim=True), beta2)
    d = exp_avg / (1 - beta1**step) / ((second / (1 - beta2**step)).sqrt() + eps)
    return in_metric(w, d, metric), {"exp_avg": exp_avg, **new}


ADAM = {"element": adam_element, "block": adam_block}


def in_metric(w: Tensor, v: Tensor, metric: Metric) -> Tensor:
    r"""Turn a gradient in the Euclidean metric into the one in ``metric``, both tangents at ``w``.

    .. math:: \Omega W + N \mapsto 2 \Omega W + N \quad \text{for the canonical metric.}
    """
    if metric == "euclidean":
        return v
    return 2 * v if w.shape[-2] == w.shape[-1] else v + (v @ w.mT) @ w


def _second_moment(state: Moments, square: Tensor, beta2: float | Tensor) -> tuple[Moments, Tensor]:
    """The new state of the second moment, and what of it the step divides by (its maximum in AMSGrad)."""
    exp_avg_sq = torch.lerp(state["exp_avg_sq"], square, 1 - beta2)
    if "max_exp_avg_sq" not in state:
        return {"exp_avg_sq": exp_avg_sq}, exp_avg_sq
    largest = torch.maximum(state["max_exp_avg_sq"], exp_avg_sq)
    return {"exp_avg_sq": exp_avg_sq, "max_exp_avg_sq": largest}, largest
