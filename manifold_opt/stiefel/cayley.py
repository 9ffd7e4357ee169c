r"""The Cayley retraction, exact and by two iterations.

As a rotation of square blocks (rotation.py): :math:`c(x) = 2/(1+x/4) - 2` and :math:`s(x) = 1/(1+x/4) - 1`.

References: Wen & Yin (2013), *A feasible method for optimization with orthogonality constraints*; Li, Li & Todorovic
(ICLR 2020), *Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linalg.matrices import skew
from ..linalg.newton_schulz import newton_schulz
from ..linalg.polynomials import fits_by_dtype, interpolate
from .geometry import coordinates
from .long_steps import in_double_if_long
from .polar import polar
from .rotation import Rotation

INVERSE = fits_by_dtype(  # (1 + x/4)^(-1) - 1
    lambda degree, reach: interpolate(lambda x: -1 / (4 + x), degree, reach),
    {1: 1.18e-3, 2: 2.9e-2, 4: 0.38, 6: 1.25},
    {1: 5e-8, 2: 3.58e-5, 4: 6.6e-3, 6: 6.2e-2, 8: 0.218, 10: 0.49, 12: 0.89},
)


@in_double_if_long
def cayley(w: Tensor, v: Tensor) -> Tensor:
    r"""Return :math:`W' = W (I - A/2)^{-1}(I + A/2)`, where A is the n x n skew matrix with W A = V.

    A, :math:`W^\top \Omega W + W^\top N - N^\top W`, is never formed. On square matrices the transform
    moves to the left, to :math:`\Omega`. Since :math:`I + \Omega/2` is normal, its polar factor U
    satisfies :math:`U^2 = (I - \Omega/2)^{-1}(I + \Omega/2)`, and U W is the polar retraction of half
    the step:

    .. math:: R_W(V) = H W^\top H, \qquad H = U W = R^{\text{polar}}_W(V/2).

    On rectangular matrices, Woodbury's identity and elimination leave one p x p system, whose symmetric part has no
    eigenvalue below one:

    .. math:: R_W(V) = \big(I + \tfrac14 N N^\top - \tfrac12 \Omega\big)^{-1}(2W + N) - W.

    Reference: Wen & Yin (2013), lemma 4, A with the half-projector that makes :math:`DR_W(0)[V] = V`.
    """
    if w.shape[-2] != w.shape[-1]:
        omega, normal = coordinates(w, v)
        return newton_schulz(_solve_shifted_skew(normal @ normal.mH / 4, omega / 2, 2 * w + normal) - w)
    half = polar(w, v / 2)
    return newton_schulz(half @ w.mH @ half)


def cayley_iterative(w: Tensor, v: Tensor) -> Tensor:
    r"""Return :math:`W + V` after two fixed-point iterations :math:`Y \leftarrow W + \tfrac12 (W + Y) A`.

    Each iteration adds one correct term of the series of :func:`cayley`. The error after two, and so the distance from
    the manifold, is :math:`\|V\|^4/8`. The series converges for :math:`\|A\|_2 < 2`.

    Reference: Li, Li & Todorovic (ICLR 2020), algorithm 1.
    """
    omega, *normal = coordinates(w, v)
    y = w + v
    for _ in range(2):
        mean = (w + y) / 2
        y = w + ((mean @ w.mH) @ v - (mean @ normal[0].mH) @ w if normal else omega @ mean)
    return y


def _solve_shifted_skew(s: Tensor, k: Tensor, b: Tensor) -> Tensor:
    r"""Solve :math:`(I + S - K) X = B` for positive semidefinite S and skew K, without an LU factorization.

    With :math:`I + S = L L^\top` and :math:`\tilde K = L^{-1} K L^{-\top}`, skew again,
    :math:`(I - \tilde K)^{-1} = (I + \tilde K^\top \tilde K)^{-1}(I + \tilde K)`: two Cholesky
    factorizations, both of matrices with no eigenvalue below one.
    """
    identity = torch.eye(s.shape[-1], dtype=s.dtype, device=s.device)
    lower, _ = torch.linalg.cholesky_ex(identity + s)
    half = torch.linalg.solve_triangular(lower, k, upper=False)
    k = skew(torch.linalg.solve_triangular(lower, half.mH, upper=False).mH)
    y = torch.linalg.solve_triangular(lower, b, upper=False)
    normal_equations, _ = torch.linalg.cholesky_ex(identity + k.mH @ k)
    y = torch.cholesky_solve(y + k @ y, normal_equations)
    return torch.linalg.solve_triangular(lower.mH, y, upper=True)


ROTATION = Rotation(INVERSE, c_over_s=2.0)
