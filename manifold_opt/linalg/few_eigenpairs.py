r"""The smallest eigenpairs of a symmetric matrix, if few are near them, by Chebyshev-filtered subspace iteration.

Reference: Zhou, Saad, Tiago & Chelikowsky (2006), *Self-consistent-field calculations using Chebyshev-filtered subspace
iteration*; Parlett (1998), *The symmetric eigenvalue problem*, chapter 11.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import norm
from .spectral_norm import is_positive_definite

_MIN_ROWS = 256  # smaller ones come in batches, and gain less
_CUT = 0.81  # eigenvalues of the Gram matrix up to this one, relative to the squared bound, are filtered out
_DEGREE = 14  # of the filter, for float32: it multiplies what is at the bound by 2e5
_SECOND = 2 * (2 / _CUT - 1) ** 2 - 1  # T_2 of an eigenvalue at the bound


def smallest_eigenpairs(gap: Tensor, rounding: float) -> tuple[Tensor, Tensor] | None:
    r"""Return all eigenvalues that are small enough to be clipped, some more, and their vectors; None if they are many.

    The result depends on values of ``gap`` only: the iteration starts from fixed columns. That of the clipped matrix
    is proven to be positive definite: by residuals, and by a Cholesky factorization where these pairs are clipped.

    Args:
        gap: :math:`(1+\epsilon)^2 I - X X^\top / b^2`, of one float32 matrix, ``(1, p, p)``.
        rounding: the relative excess :math:`\epsilon` that counts as rounding.

    Returns:
        Eigenvalues in ascending order, ``(1, m)``, and orthonormal vectors, ``(1, p, m)``.
    """
    if len(gap) > 1 or gap.shape[-1] < _MIN_ROWS or gap.dtype != torch.float32:
        return None
    basis = _filtered_columns(gap, rounding)
    if basis is None:
        return None
    basis = torch.linalg.qr(basis)[0]
    image = gap @ basis
    values, turn = torch.linalg.eigh(basis.mT @ image)
    vectors = basis @ turn
    excess = ((1 + rounding) ** 2 - 1 - values).clamp_min_(0)[:, None]  # of the squares that are clipped
    residuals = (image @ turn).addcmul_(vectors, values[:, None], value=-1)
    if float(norm(residuals * excess)) > rounding / 4:
        return None
    clipped = torch.baddbmm(gap, vectors * excess, vectors.mT)
    clipped.diagonal(dim1=-2, dim2=-1).sub_(rounding)  # half of the tolerance is for the residuals
    return (values, vectors) if bool(is_positive_definite(clipped)) else None


def _filtered_columns(gap: Tensor, rounding: float) -> Tensor | None:
    r"""Return :math:`T_d(2 G / c - I)` times fixed columns, for the Gram matrix G; None if they show many eigenvalues.

    The Chebyshev polynomial :math:`T_d` is at most 1 for eigenvalues up to c, and grows fast beyond.
    """
    p = gap.shape[-1]
    count = 3 * p // 32
    doubled = gap * (-4 / _CUT)
    doubled.diagonal(dim1=-2, dim2=-1).add_(4 / _CUT * (1 + rounding) ** 2 - 2)
    before = torch.randn(1, p, count, generator=torch.Generator().manual_seed(0), dtype=gap.dtype)
    columns = (doubled @ before).mul_(0.5)
    for degree in range(2, _DEGREE + 1):
        before, columns = columns, torch.baddbmm(before, doubled, columns, beta=-1)
        # Each eigenvalue adds its factor squared to the mean square of a column: up to c, 1/2 on average.
        if degree == 2 and float(norm(columns).square()) > count * (count * _SECOND**2 + p / 2):
            return None
    return columns
