r"""Direction of Cayley SGD: that of SGD with momentum, each step cut to the bound of its paper.

Algorithm 1 moves a point X, tall with orthonormal columns, along :math:`W X`, where W is skew and n x n, by

.. math:: \alpha = \min\Big\{l, \frac{2q}{\lVert W \rVert_1 + \epsilon}\Big\}, \qquad q = \tfrac12,

with the largest column sum of absolute values as the norm. Points are wide here: :math:`X = W^H`, and W is the point.

Reference: Li, Li & Todorovic (ICLR 2020), *Efficient Riemannian optimization on the Stiefel manifold via the Cayley
transform*.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...linalg.products import Workspace, matmul
from ...manifolds import Orthogonal
from ..engine.optimizer import Group, Rule
from .projection import absolute
from .sgd import SgdOptions
from .sgd import rule as sgd_rule

if TYPE_CHECKING:
    from ..engine.bucket import Bucket

_Q, _EPS = 0.5, 1e-8
_SLAB_COLUMNS = 256


def rule(group: Group, bucket: Bucket) -> Rule:
    """Return the direction of SGD; cut for the orthogonal blocks of a group with ``stiefel=True``."""
    direction, options = sgd_rule({**group, "metric": "euclidean"}, bucket)
    return (_cut(direction) if group["stiefel"] and isinstance(bucket.constraint, Orthogonal) else direction), options


def _cut(direction: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a direction whose steps are cut to the bound of algorithm 1, each block by itself.

    With a step ``lr W`` the factor is ``alpha / lr``.
    """

    def apply(w: Tensor, a: Tensor, moments: dict[str, Tensor], ws: Workspace, options: SgdOptions) -> Tensor:
        step = direction(w, a, moments, ws, options)
        size = _generator_norm(w, step, ws) + _EPS * absolute(options.scale)
        return step.mul_((2 * _Q / size).clamp(max=1))

    return apply


def _generator_norm(w: Tensor, step: Tensor, ws: Workspace) -> Tensor:
    r"""Return the largest column sum of the skew n x n matrix A with :math:`W A = V`, ``(B, 1, 1)``.

    A is :math:`U^H W - W^H U` up to its sign, where :math:`U = V - \tfrac12 (V W^H) W`; for square blocks it is
    :math:`W^H \Omega W`. Of wide blocks it is never formed as a whole.

    Args:
        w: points, ``(B, p, n)``.
        step: tangents V; for square blocks the skew :math:`\Omega` of :math:`V = \Omega W`.
        ws: buffers.
    """
    if w.shape[-2] == w.shape[-1]:
        a = matmul(w.mH, matmul(step, w, out=ws.c), out=ws.d)
        return torch.linalg.matrix_norm(a, 1, keepdim=True)
    u = torch.baddbmm(step, step @ w.mH, w, alpha=-0.5)
    sums = []
    for start in range(0, w.shape[-1], _SLAB_COLUMNS):
        columns = slice(start, start + _SLAB_COLUMNS)
        a = torch.baddbmm(u.mH @ w[..., columns], w.mH, u[..., columns], alpha=-1)
        sums.append(torch.linalg.matrix_norm(a, 1, keepdim=True))
    return torch.stack(sums).amax(0)
