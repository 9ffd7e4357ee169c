r"""Bounds of the spectral norm :math:`\sigma_{\max}` of matrices ``(B, p, n)`` that cost less than a decomposition."""

from __future__ import annotations

import torch
from torch import Tensor

from .products import largest_norm, norm

_ROWS = 32  # per block of a step: more rows cost more than the checks that a tighter bound saves
_SHORT = 1 / 8  # of the slack: of steps this short, the Frobenius norm is near enough
_POWER_STEPS = 20  # the estimate is within 3 percent, for flat spectra too
_LEAST_MARGIN = 0.01  # not worth a factorization below


def step_length(v: Tensor, slack: float) -> float:
    """Return an upper bound of the largest spectral norm of a batch of matrices, NaN if any is NaN.

    It is the Frobenius norm if that is short, in comparison with ``slack``, or if there are few rows.
    """
    length = largest_norm(v)
    if length > _SHORT * slack and v.shape[1] >= 2 * _ROWS:
        return float(_norm_from_row_blocks(v).max())
    return length


def _norm_from_row_blocks(v: Tensor) -> Tensor:
    r"""Return an upper bound of the spectral norm of each matrix, ``(B,)``. Cost: a product of p x n and n x 32.

    For blocks :math:`V_i` of k rows, with :math:`G_i = V_i V_i^\top` and :math:`m_i = \operatorname{tr} G_i / k`,

    .. math:: \sigma_{\max}(V)^2 \le \sum_i \lambda_{\max}(G_i), \qquad
        \lambda_{\max}(G_i) \le m_i + \sqrt{(k-1)/k}\, \|G_i - m_i I\|_F.

    Reference: Wolkowicz & Styan (1980), *Bounds for eigenvalues using traces*, theorem 2.1.
    """
    whole = v.shape[1] // _ROWS * _ROWS
    blocks = v[:, :whole].reshape(-1, _ROWS, v.shape[2])
    grams = torch.bmm(blocks, blocks.mT)
    diagonal = grams.diagonal(dim1=1, dim2=2)
    means = diagonal.mean(1, keepdim=True)
    diagonal.sub_(means)
    largest = means[:, 0].add(norm(grams), alpha=(1 - 1 / _ROWS) ** 0.5)
    squares = largest.view(len(v), -1).sum(1)
    if whole < v.shape[1]:
        squares = squares + norm(v[:, whole:]).square()
    return squares.sqrt()


def margin_inside(gap: Tensor, rounding: float) -> Tensor:
    r"""Return a lower bound of :math:`1 - \sigma_{\max}(X)/b`, ``(B,)``; -1 if the norm is larger than b.

    A Cholesky factorization proves a margin that an estimate of the norm suggests, or else that it is at least 0.

    Args:
        gap: :math:`(1+\epsilon)^2 I - X X^\top / b^2`.
        rounding: the relative excess :math:`\epsilon` that counts as rounding.
    """
    norms = _estimate_norm(gap, rounding)
    margin = (0.9 * (1 - norms) - 0.02).nan_to_num_(0)
    margin.masked_fill_(margin < _LEAST_MARGIN, 0)
    outside = norms > 1 + 2 * rounding
    if bool(outside.all()):
        return margin - 1
    if bool(margin.any()):
        smaller = gap.clone()  # for the bound (1 - margin) b
        smaller.diagonal(dim1=-2, dim2=-1).sub_((margin * (2 + 2 * rounding - margin))[:, None])
        proven = is_positive_definite(smaller)
        if bool(proven.all()):
            return margin
        margin.masked_fill_(~proven, 0)
    return margin.masked_fill_(~is_positive_definite(gap), -1)


def _estimate_norm(gap: Tensor, rounding: float) -> Tensor:
    r"""Return a lower bound of :math:`\sigma_{\max}/b` of each block, ``(B,)``.

    A power iteration finds it, which starts from a fixed vector so that the result depends on the block only.
    """
    u = torch.randn(gap.shape[-1], 1, generator=torch.Generator().manual_seed(0), dtype=gap.dtype)
    u = before = u.expand(len(gap), -1, -1)
    for step in range(_POWER_STEPS):
        before = u / norm(u, keepdim=True) if step % 10 == 0 else u
        u = torch.baddbmm(before, gap, before, beta=(1 + rounding) ** 2, alpha=-1)
    return (norm(u) / norm(before)).sqrt_()


def is_positive_definite(gap: Tensor) -> Tensor:
    """Return True for each symmetric matrix that has a Cholesky factorization, ``(B,)``."""
    return torch.linalg.cholesky_ex(gap).info == 0
