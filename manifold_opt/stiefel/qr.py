r"""The QR retraction: the rows of a point plus a tangent, orthonormalized from the first to the last.

As a rotation of square blocks (rotation.py) it is :math:`Q = L^{-1}(I + \Omega)`, with the Cholesky factor L of
:math:`I + B`: no polynomial, but for short steps only.

Reference: Absil, Mahony & Sepulchre (2008), *Optimization Algorithms on Matrix Manifolds*, example 4.1.3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.polynomials import Fit, Fits
from ..linalg.products import Workspace, gram
from .long_steps import in_double_if_long
from .rotation import CORRECTION_INTERVAL, Rotation


@in_double_if_long
def qr(w: Tensor, v: Tensor) -> Tensor:
    r"""Return :math:`Q^\top` of :math:`(W+V)^\top = Q R`, where the diagonal of R is positive.

    This orthonormalizes the rows of :math:`W+V`, also of square matrices, whose columns most other implementations
    take (``torch.linalg.qr(w + v)``). Tall matrices are transposed before, so their columns are orthonormalized.

    It is computed as :math:`Q^\top = L^{-1}(W+V)` with :math:`L L^\top = (W+V)(W+V)^\top` (CholeskyQR). The Gram matrix
    of a point plus a tangent is :math:`I + V V^\top`, so its Cholesky factor exists for every step. CholeskyQR squares
    the rounding error; a Newton-Schulz step removes it, which is cheaper than a second factorization.
    """
    x = w + v
    # cholesky_ex neither raises nor waits for the device if an entry is not finite.
    lower, _ = torch.linalg.cholesky_ex(gram(x))
    return torch.linalg.solve_triangular(lower, x, upper=False)


def _rotation_minus_identity(omega: Tensor, b: Tensor, ws: Workspace) -> Tensor:  # noqa: ARG001
    b.diagonal(dim1=-2, dim2=-1).add_(1)
    omega.diagonal(dim1=-2, dim2=-1).add_(1)
    rotation = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(b)[0], omega, upper=False)
    rotation.diagonal(dim1=-2, dim2=-1).sub_(1)
    return rotation


_UP_TO_ONE: Fits = {dtype: (Fit(reach=1.0, coefficients=()),) for dtype in CORRECTION_INTERVAL}
ROTATION = Rotation(_UP_TO_ONE, function=_rotation_minus_identity)
