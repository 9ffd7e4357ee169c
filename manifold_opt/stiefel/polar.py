r"""The polar retraction: the orthogonal factor of a point plus a tangent.

As a rotation of square blocks (rotation.py): :math:`c(x) = s(x) = 1/\sqrt{1+x} - 1`.

Reference: Absil, Mahony & Sepulchre (2008), *Optimization Algorithms on Matrix Manifolds*, example 4.1.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.polar_factor import polar_factor, polar_factor_, polar_sync_free
from ..linalg.polynomials import INVERSE_SQRT
from ..linalg.products import Workspace, host_can_branch, largest_norm, norm
from .long_steps import LONG_STEP_NORM, in_double_if_long
from .rotation import OFF_MANIFOLD, Rotation


@in_double_if_long
def polar(w: Tensor, v: Tensor) -> Tensor:
    r"""Return the polar factor of ``w + v``.

    .. math:: R_W(V) = \big((W+V)(W+V)^\top\big)^{-1/2}(W+V)

    As :math:`(W+V)(W+V)^\top = I + V V^\top`, every singular value is at least one, so
    :func:`~manifold_opt.linalg.polar_factor.polar_factor` needs no factorization.
    """
    if host_can_branch(w):
        return polar_factor(w + v)
    points, tangents = (x.reshape(-1, *x.shape[-2:]) for x in (w, v))
    return polar_sync_free(points, tangents, Workspace(None, points))[0].view(w.shape)


def polar_(w: Tensor, v: Tensor, ws: Workspace) -> bool:
    """Move the points ``w`` in place if every step is short and not zero; else write nothing and return False."""
    ends = norm(v).aminmax() if v.shape[0] > 1 else None
    longest = largest_norm(v) if ends is None else float(ends.max)
    shortest = longest if ends is None else float(ends.min)
    if not (shortest > 0 and longest <= LONG_STEP_NORM):
        return False
    # X X^T - I contains the error of W too, which is rounding if W is on the manifold.
    expected = 1.01 * longest**2 + 2 * (1 + longest) * OFF_MANIFOLD[w.dtype]
    return polar_factor_(torch.add(w, v, out=ws.x), out=w, ws=ws, expected=expected)


ROTATION = Rotation(INVERSE_SQRT, c_over_s=1.0)
