r"""Polar factor of a point plus a tangent, with fewer products for shorter tangents.

With :math:`X = W + V` and :math:`D = X X^\top - I`, which is :math:`V V^\top` up to rounding, the factor is
:math:`(I + D)^{-1/2} X`. D is positive semidefinite, so its eigenvalues lie between 0 and its norm, and a polynomial
in D that is accurate there is used (polynomials.py). For larger norms, scaled Newton-Schulz steps come first.

Reference: Higham (2008), *Functions of Matrices*, chapter 8.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .matrices import wide
from .polynomials import INVERSE_SQRT, fit_for, polynomial
from .products import Workspace, gram, gram_minus_identity, largest_norm, matmul, matmul_add, norm


@wide
def polar_factor(x: Tensor) -> Tensor:
    r"""Return the orthogonal factor :math:`(X X^\top)^{-1/2} X` of matrices whose singular values are at least one.

    Args:
        x: ``(..., p, n)``, wide or tall: a point plus a tangent, up to rounding.

    Returns:
        Points; NaN for a matrix whose Gram matrix is not finite.
    """
    batch = x.reshape(-1, *x.shape[-2:]).clone()
    out = torch.empty_like(batch)
    if not polar_factor_(batch, out=out, ws=Workspace(None, batch)):
        finite = norm(gram(batch)).isfinite()
        out.fill_(math.nan)
        if bool(finite.any()):
            out[finite] = polar_factor(batch[finite])
    return out.view(x.shape)


def polar_factor_(x: Tensor, *, out: Tensor, ws: Workspace, expected: float = math.inf) -> bool:
    r"""Write the orthogonal factor :math:`(X X^\top)^{-1/2} X` to ``out``, where :math:`X X^\top \succeq I`.

    Cost in float32: 2 T if the norm of D is below 7e-4; up to 0.9, one more product of p x p matrices for every two
    degrees of the polynomial; above 0.9, 2 T more for every Newton-Schulz step, which divides the norm by up to 7.

    Args:
        x: ``(B, p, n)``, wide: a point plus a tangent, up to rounding. Overwritten.
        out: tensor for the result; neither ``x`` nor a buffer of ``ws``.
        ws: buffers.
        expected: largest possible norm of D for a point on the manifold plus the tangent.

    Returns:
        False, with ``x`` and ``out`` unchanged, if the norm of D is larger than ``expected`` or not finite.
    """
    d = gram_minus_identity(x, out=ws.a)
    size = largest_norm(d)
    if not size <= expected or size == math.inf:
        return False
    fits = INVERSE_SQRT[x.dtype]
    upper = (1 + size) ** 0.5
    while upper**2 - 1 > fits[-1].reach:
        upper = _newton_schulz_step_(x, d, upper, spare=out)
        size = upper**2 - 1
        gram_minus_identity(x, out=d)
    if size <= fits[0].reach:
        matmul_add(x, d, x, out=out, alpha=fits[0].coefficients[0])
        return True
    c = matmul(d, d, out=ws.b)
    fit = fit_for(fits, min(size, largest_norm(c) ** 0.5))
    matmul_add(x, polynomial(fit.coefficients, d, c, ws, out=ws.d), x, out=out)
    return True


def _newton_schulz_step_(x: Tensor, d: Tensor, upper: float, *, spare: Tensor) -> float:
    r"""Map the singular values of ``x`` from [1, ``upper``] to [1, u], in place, and return u.

    The step is :math:`X \leftarrow (\tfrac32 m X - \tfrac12 m^3 X X^\top X)/l`. The scale
    :math:`m^2 = 3/(1 + u + u^2)` maps both ends of the interval to the same value l, the minimum.

    Reference: Chen & Chow (2014), *A stable scaling of Newton-Schulz for improving the sign function computation of a
    Hermitian matrix*.
    """
    scale = (3 / (1 + upper + upper**2)) ** 0.5
    cubic = 0.5 * scale**3
    lowest = 1.5 * scale - cubic
    x.copy_(matmul_add(x, d, x, out=spare, alpha=-cubic / lowest))
    return 1 / lowest


def polar_sync_free(w: Tensor, v: Tensor, ws: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the polar factors of ``w + v``, and masks ``(B, 1, 1)``: which steps were clipped, which ``w`` were near.

    Sync-free version of :func:`polar_factor_`: the polynomial of the highest degree is used for all blocks, and longer
    steps are clipped to its reach. For points that are not near the manifold the result is wrong. The eighth power of
    the norm of a step must not overflow.
    """
    fit = INVERSE_SQRT[w.dtype][-1]
    b = gram(v, out=ws.a)
    c = matmul(b, b, out=ws.b)
    excess = norm(c, keepdim=True).mul_(1 / fit.reach**2)  # (bound on the eigenvalues of V V^T / reach)^2
    x = torch.addcdiv(w, v, excess.clamp_min(1).pow_(0.25).to(w.dtype), out=ws.x)
    # Not V V^T of the clipped step: it leaves out the error of W, which clipped steps would amplify.
    d = gram_minus_identity(x, out=ws.a)
    c = matmul(d, d, out=ws.b)
    near = norm(c, keepdim=True) < (1.1 * fit.reach) ** 2
    s = polynomial(fit.coefficients, d, c, ws, out=ws.d)
    return matmul_add(x, s, x, out=ws.z), excess > 1, near
