r"""Projections of rectangular blocks ``(B, p, n)`` to the tangent space, in the buffers of a step, and small helpers.

Costs are given in T, one product of p x n by n x p matrices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...linalg.products import Workspace, host_can_branch, matmul, matmul_add
from ...manifolds.base import Manifold, Scalar
from ...stiefel.geometry import Metric


def project_tangent(w: Tensor, g: Tensor, ws: Workspace, *, out: Tensor) -> Tensor:
    """Write G - sym(G W^T) W for rectangular blocks to ``out`` and return it. Cost: 2 T."""
    along = matmul(g, w.mH, out=ws.a)
    symmetric = torch.add(along, along.mH, out=ws.b)
    return matmul_add(g, symmetric, w, out=out, alpha=-0.5)


def reproject_tangent_(w: Tensor, v: Tensor, size: Tensor, ws: Workspace) -> Tensor:
    """Re-project ``v``, ``(B, p, n)`` in ``ws.y``, if rounding may have left a normal part. Cost: 2 T, rare.

    The projection of a gradient with norm ``size`` leaves a normal part of eps * ``size``. It matters if the gradient
    is nearly normal and its small tangent part makes a long step. Sync-free, all blocks are re-projected.
    """
    eps = torch.finfo(w.dtype).eps
    if not host_can_branch(w):
        return project_tangent(w, v, ws, out=ws.z)
    far = (~(size * eps <= eps**0.5 / 4))[:, 0, 0]  # the square of a smaller normal part is within rounding
    if bool(far.any()):  # only these, so that a result does not depend on other blocks of the batch
        point, tangent = w[far], v[far]
        v[far] = project_tangent(point, tangent, Workspace(None, point), out=torch.empty_like(tangent))
    return v


def to_metric(w: Tensor, d: Tensor, metric: Metric, ws: Workspace) -> Tensor:
    r"""Convert a rectangular tangent from the Euclidean metric to ``metric``. Cost: 2 T for the canonical metric.

    .. math:: \Omega W + N \mapsto 2 \Omega W + N \quad \text{for the canonical metric.}
    """
    return d if metric == "euclidean" else matmul_add(d, matmul(d, w.mH, out=ws.a), w, out=d)


def copy_where_(moment: Tensor, new: Tensor, finite: Tensor | None) -> None:
    """Overwrite a moment, except for blocks with a non-finite gradient."""
    moment.copy_(new if finite is None else torch.where(finite != 0, new, moment))


def absolute(x: Scalar) -> Scalar:
    """Return the absolute value of a number or a tensor."""
    return x.abs() if isinstance(x, Tensor) else abs(x)


def each_part(direction: Callable[..., Tensor], manifold: Manifold) -> Callable[..., Tensor]:
    """Return a direction of skew matrices that is applied to each part of the coordinates (:meth:`Manifold.parts`)."""

    def apply(x: Tensor, a: Tensor, moments: dict[str, Tensor], ws: Workspace, options: Any) -> Tensor:
        own = {key: manifold.parts(x, moment) for key, moment in moments.items() if key not in manifold.state_keys}
        for k, (part, space) in enumerate(zip(manifold.parts(x, a), manifold.workspaces(x, ws), strict=True)):
            omega = direction(x, part, {key: parts[k] for key, parts in own.items()}, space, options)
            if omega is not part:
                part.copy_(omega)
        return a

    return apply
