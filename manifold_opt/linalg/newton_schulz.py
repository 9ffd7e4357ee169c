r"""The iteration :math:`X \leftarrow (1+\beta) X - \beta X X^\top X` and what is built on it.

Singular vectors stay; every singular value moves by :math:`s \mapsto (1+\beta)s - \beta s^3`. With
:math:`e = s^2 - 1`,

.. math:: e' = (1 - 2\beta)\,e + (\beta^2 - 2\beta)\,e^2 + \beta^2 e^3,

so small :math:`\beta` approaches orthogonality linearly, and :math:`\beta = 1/2`, the Newton-Schulz step,
quadratically. Three methods use this iteration:

- a tangent step, then one step at :math:`\beta = 1/2`: POGO (Javaloy & Vergari, PMLR 306, 2026);
- the Riemannian field plus a small multiple of :math:`(I - X X^\top) X`: Landing (Ablin & Peyre, 2022);
- steps at :math:`\beta = 1/2` on a matrix whose singular values are known to lie in an interval: the
  polar factor without a factorization (Higham 2008, *Functions of Matrices*, chapter 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .matrices import wide
from .products import gram, norm

_ROW_SUM_MIN_ROWS = 32  # for fewer rows, row sums cost more than they save


@wide
def newton_schulz(x: Tensor, *, beta: float = 0.5, steps: int = 1) -> Tensor:
    r"""Return ``x`` after ``steps`` iterations of :math:`X \leftarrow (1+\beta) X - \beta X X^\top X`.

    It is computed as :math:`X + \beta (I - X X^\top) X`: rounding in the second product is scaled by the remaining
    error, so only the Gram matrix has to be precise.

    Args:
        x: ``(..., p, n)``, wide or tall, singular values below :func:`convergence_radius`.
        beta: rate, in (0, 1).
        steps: number of iterations.
    """
    for _ in range(steps):
        x = x + beta * (_identity(x) - gram(x)) @ x
    return x


def convergence_radius(beta: float) -> float:
    r"""Return :math:`\sqrt{(1+\beta)/\beta}`: smaller singular values stay positive under :func:`newton_schulz`."""
    return ((1 + beta) / beta) ** 0.5


def spectral_bound(a: Tensor, out: Tensor | None = None) -> Tensor:
    """Return an upper bound on the spectral norm of symmetric or Hermitian ``a``, ``(...)``.

    It is the Frobenius norm or, if that is smaller, the largest row sum of magnitudes (for 32 rows or more). The
    magnitudes are written to ``out`` if given; without it they are computed for a few rows at a time.
    """
    frobenius = norm(a)
    if a.shape[-1] < _ROW_SUM_MIN_ROWS:
        return frobenius
    if out is not None:
        sums = torch.abs(a, out=out.real).sum(-1)
    else:
        sums = torch.cat([rows.abs().sum(-1) for rows in a.split(a.shape[-1] // 4, -2)], -1)  # type: ignore[no-untyped-call]
    return torch.minimum(frobenius, sums.amax(-1))


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
