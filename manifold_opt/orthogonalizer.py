r"""The iteration :math:`X \leftarrow (1+\beta) X - \beta X X^\top X` and what is built on it.

Singular vectors stay; every singular value moves by :math:`s \mapsto (1+\beta)s - \beta s^3`. With
:math:`e = s^2 - 1`,

.. math:: e' = (1 - 2\beta)\,e + (\beta^2 - 2\beta)\,e^2 + \beta^2 e^3,

so small :math:`\beta` approaches orthogonality linearly, and :math:`\beta = 1/2`, the Newton-Schulz step,
quadratically. One kernel, three methods of the field:

- a tangent step, then one step at :math:`\beta = 1/2`: POGO (2026);
- the Riemannian field plus a small multiple of :math:`(I - X X^\top) X`: Landing (Ablin & Peyre, 2022);
- steps at :math:`\beta = 1/2` on a matrix whose singular values are known to lie in an interval: the
  polar factor without a factorization (Higham 2008, *Functions of Matrices*, chapter 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .products import gram, norm
from .stiefel import float64, wide

_MANY = 32  # rows from which on row sums are worth their price
_REMEDY = "Initialize it first, with manifold_opt.init.orthogonal_ for one."


@wide
def orthogonalizer(x: Tensor, *, beta: float = 0.5, steps: int = 1) -> Tensor:
    r"""``steps`` iterations of :math:`X \leftarrow (1+\beta) X - \beta X X^\top X`.

    Computed as :math:`X + \beta (I - X X^\top) X`, where rounding in the second product is scaled by the
    error that is left: only the Gram matrix has to be precise.

    Args:
        x: ``(..., p, n)``, wide or tall, singular values below :func:`basin`.
        beta: rate, in (0, 1).
        steps: number of iterations.
    """
    for _ in range(steps):
        x = x + beta * (_identity(x) - gram(x)) @ x
    return x


def basin(beta: float) -> float:
    r"""Singular values below :math:`\sqrt{(1+\beta)/\beta}` stay positive under :func:`orthogonalizer`."""
    return ((1 + beta) / beta) ** 0.5


def nearest_orthogonal(x: Tensor) -> Tensor:
    r"""Nearest matrix with orthonormal rows or columns in Frobenius norm, for each matrix of a batch.

    The polar factor: with :math:`X = U S V^\top` it is :math:`U V^\top`, by SVD in float64. It is for
    the door; the optimizers do without.

    Args:
        x: ``(..., p, n)``, wide or tall, of full rank.

    Returns:
        Same shape and dtype.

    Raises:
        ValueError: values that are not finite, or rank-deficient, where the nearest is not unique.

    Reference: Higham (2008), *Functions of Matrices*, theorem 8.4.

    >>> import torch
    >>> from manifold_opt import nearest_orthogonal
    >>> nearest_orthogonal(torch.tensor([[3.0, 0.0], [0.0, -0.1]]))
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    """
    if x.ndim < 2 or not x.is_floating_point():
        raise ValueError(
            f"nearest_orthogonal: needs real floating-point matrices (..., p, n), got {tuple(x.shape)} of {x.dtype}."
        )
    if not bool(x.isfinite().all()):
        raise ValueError(f"nearest_orthogonal: the value has entries that are not finite. {_REMEDY}")
    u, s, vh = torch.linalg.svd(float64(x), full_matrices=False)
    smallest, largest = s[..., -1], s[..., 0]
    if bool((smallest <= max(x.shape[-2:]) * torch.finfo(x.dtype).eps * largest).any()):
        raise ValueError(
            "nearest_orthogonal: the value is rank-deficient (smallest singular value "
            f"{float(smallest.min()):.1e}), so the nearest orthogonal matrix is not unique. {_REMEDY}"
        )
    # The product of two rounded factors is 2 to 6 times as far off as one Newton-Schulz step leaves it.
    return orthogonalizer(u @ vh).to(x)


def spectral_bound(a: Tensor, spare: Tensor | None = None) -> Tensor:
    """Upper bound on the spectral norm of symmetric ``a``, ``(...)``: the smaller of two cheap norms.

    The Frobenius norm and, from some rows on, the largest row sum of magnitudes, which go to ``spare`` if given, and
    are taken a few rows at a time if not.
    """
    frobenius = norm(a)
    if a.shape[-1] < _MANY:
        return frobenius
    if spare is not None:
        sums = torch.abs(a, out=spare).sum(-1)
    else:
        sums = torch.cat([rows.abs().sum(-1) for rows in a.split(a.shape[-1] // 4, -2)], -1)  # type: ignore[no-untyped-call]
    return torch.minimum(frobenius, sums.amax(-1))


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
