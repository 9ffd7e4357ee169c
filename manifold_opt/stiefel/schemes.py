r"""The functions of :mod:`~manifold_opt.stiefel.retractions`: of a point and a tangent, ``(..., p, n)``, wide.

In the wide convention :math:`V = \Omega W + N` with :math:`\Omega = V W^\top` skew (p x p) and
:math:`N W^\top = 0`; on square matrices N is zero. Of complex matrices every transpose is the conjugate one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..linalg.matrices import in_double, skew
from ..linalg.newton_schulz import newton_schulz, spectral_bound
from ..linalg.polar_factor import polar_factor, polar_sync_free
from ..linalg.products import gram, host_can_branch
from ..linalg.workspace import Workspace
from .geometry import Metric, coordinates, transport

Scheme = Callable[..., Tensor]

LONG = 32.0  # Frobenius norm of a step beyond which rounding in W and V is felt in I + V V^T


def _with_care_where_long(scheme: Scheme) -> Scheme:
    """Redo the blocks with a step beyond ``LONG`` in double precision, from a point and a tangent that are so in it.

    Rounding in the input is magnified by the length of the step: what makes W W^T differ from I, and V from a
    tangent, has to go first, and what is left in the result is taken back by the polar factor. Where the host may
    not look, a step that long is shortened instead.
    """

    @functools.wraps(scheme)
    def careful(w: Tensor, v: Tensor, **options: object) -> Tensor:
        length = torch.linalg.matrix_norm(v, keepdim=True)
        if not host_can_branch(w):
            return scheme(w, v * (LONG / length).clamp_max(1), **options)
        result = scheme(w, v, **options)
        long = length[..., 0, 0] > LONG
        if not bool(long.any()):
            return result
        double = in_double(w.dtype)
        point = newton_schulz(w[long].to(double))
        tangent = transport(point, transport(point, v[long].to(double)))
        # In place, so that the memory layout, and with it the bits of the other blocks' products, stay.
        result[long] = polar_factor(scheme(point, tangent, **options)).to(w.dtype)
        return result

    return careful


@_with_care_where_long
def qr(w: Tensor, v: Tensor) -> Tensor:
    r"""QR retraction: :math:`(W+V)^\top = Q R` with positive diagonal of R; the result is :math:`Q^\top`.

    It orthonormalizes the rows of :math:`W+V`, from the first to the last, also of square matrices, whose columns most
    other implementations take (``torch.linalg.qr(w + v)``). Tall matrices come transposed: there it is the columns.

    Computed as :math:`Q^\top = L^{-1}(W+V)` with :math:`L L^\top = (W+V)(W+V)^\top` (CholeskyQR). The Gram matrix
    of a point plus a tangent is :math:`I + V V^\top`, so its Cholesky factor exists for every step; the rounding
    error that it squares is left to a Newton-Schulz step, which is cheaper than a second factorization.

    Reference: Absil, Mahony & Sepulchre (2008), example 4.1.3.
    """
    x = w + v
    # cholesky_ex neither raises nor waits for the device where an entry is not finite.
    lower, _ = torch.linalg.cholesky_ex(gram(x))
    return torch.linalg.solve_triangular(lower, x, upper=False)


@_with_care_where_long
def polar(w: Tensor, v: Tensor) -> Tensor:
    r"""Polar retraction: the orthogonal factor of ``w + v``.

    .. math:: R_W(V) = \big((W+V)(W+V)^\top\big)^{-1/2}(W+V)

    As :math:`(W+V)(W+V)^\top = I + V V^\top`, every singular value is at least one, which is what
    :func:`~manifold_opt.linalg.polar_factor.polar_factor` needs to do without a factorization.

    Reference: Absil, Mahony & Sepulchre (2008), example 4.1.3.
    """
    if host_can_branch(w):
        return polar_factor(w + v)
    points, tangents = (x.reshape(-1, *x.shape[-2:]) for x in (w, v))
    return polar_sync_free(points, tangents, Workspace(None, points))[0].view(w.shape)


@_with_care_where_long
def cayley(w: Tensor, v: Tensor) -> Tensor:
    r"""Cayley retraction: :math:`W' = W (I - A/2)^{-1}(I + A/2)`, A the n x n skew matrix with W A = V.

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
    r"""Cayley retraction by two fixed-point iterations :math:`Y \leftarrow W + \tfrac12 (W + Y) A`.

    From :math:`Y = W + V`, each iteration adds one correct term of the series of :func:`cayley`: what is
    missing after two, and so the distance from the manifold, is :math:`\|V\|^4/8`. The series converges
    for :math:`\|A\|_2 < 2`.

    Reference: Li, Li & Todorovic (ICLR 2020), algorithm 1.
    """
    omega, *normal = coordinates(w, v)
    y = w + v
    for _ in range(2):
        mean = (w + y) / 2
        y = w + ((mean @ w.mH) @ v - (mean @ normal[0].mH) @ w if normal else omega @ mean)
    return y


@_with_care_where_long
def exp(w: Tensor, v: Tensor, *, metric: Metric = "euclidean") -> Tensor:
    r"""Exponential map: the geodesic of the metric in use, followed for unit time.

    .. math::
        \text{square:} \quad & e^{\Omega} W \\
        \text{canonical:} \quad & [I \; 0] \exp\begin{pmatrix} \Omega & I \\ -N N^\top & 0 \end{pmatrix}
            \begin{pmatrix} W \\ N \end{pmatrix} \\
        \text{euclidean:} \quad & e^{-\Omega} [I \; 0]
            \exp\begin{pmatrix} \Omega & I \\ -V V^\top & \Omega \end{pmatrix}
            \begin{pmatrix} W \\ V \end{pmatrix}

    with the second block row scaled so that both off-diagonal blocks have the size of the step.

    Reference: Edelman, Arias & Smith (1998), sections 2.2.2 and 2.3.1, transposed; the canonical one in
    the basis (W, N), which needs no QR of N.
    """
    omega, *normal = coordinates(w, v)
    if not normal:
        return _matrix_exp(omega) @ w
    # Not v itself: what rounding has left in it that is no tangent would be followed for the whole length.
    across = omega @ w + normal[0] if metric == "euclidean" else normal[0]
    gram = across @ across.mH
    size = spectral_bound(gram).sqrt().clamp_min(torch.finfo(w.dtype).tiny)[..., None, None]
    identity = torch.eye(w.shape[-2], dtype=w.dtype, device=w.device)
    corner = omega if metric == "euclidean" else torch.zeros_like(omega)
    generator = torch.cat([torch.cat([omega, size * identity], -1), torch.cat([-gram / size, corner], -1)], -2)
    top = _matrix_exp(generator)[..., : w.shape[-2], :]
    moved = top @ torch.cat([w, across / size], -2)
    return _matrix_exp(-omega) @ moved if metric == "euclidean" else moved


def _matrix_exp(a: Tensor) -> Tensor:
    """Matrix exponential; torch 2.13 ends the series of a lone matrix too soon: off by 1e-11 at norm 0.03, float64."""
    if a[..., 0, 0].numel() > 1:
        return torch.linalg.matrix_exp(a)
    lone = a.reshape(1, *a.shape[-2:])
    return torch.linalg.matrix_exp(torch.cat([lone, lone]))[0].reshape(a.shape)


def orthogonalized(w: Tensor, v: Tensor, *, beta: float = 0.5, correction_steps: int = 1) -> Tensor:
    r"""Tangent step, then ``correction_steps`` of :math:`X \leftarrow (1+\beta) X - \beta X X^\top X`.

    At :math:`\beta = 1/2` it follows :func:`polar` up to :math:`\tfrac38 \|V\|^4`; a small beta comes
    back to the manifold over many steps, not in one.

    References: POGO (Javaloy & Vergari, PMLR 306, 2026) for beta = 1/2; Ablin & Peyre (AISTATS 2022) for small beta.
    """
    return newton_schulz(w + v, beta=beta, steps=correction_steps)


def _solve_shifted_skew(s: Tensor, k: Tensor, b: Tensor) -> Tensor:
    r"""Solve :math:`(I + S - K) X = B` for positive semidefinite S and skew K, without an LU.

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
