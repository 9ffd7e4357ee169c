r"""Short steps of square blocks as rotations: W moves to Q W, with Q computed from the skew step :math:`\Omega`.

With :math:`B = \Omega\Omega^\top = -\Omega^2`, which commutes with :math:`\Omega`, a retraction is

.. math:: R_W(\Omega W) = Q W, \qquad Q = I + c(B) + (I + s(B))\,\Omega, \qquad c(0) = s(0) = 0.

A :class:`Rotation` evaluates the functions c and s as polynomials of B (polynomials.py), of the lowest degree that a
bound on the largest eigenvalue of B allows. The file of each retraction has its Rotation. What is added to W is
:math:`(Q - I) W`, so that the rounding of :math:`Q - I` is relative to the length of the step.

A rotation does not change :math:`E = W W^\top - I` except for rounding, and measuring E costs more than one step adds
to it. So E is measured every few steps, and half of it is removed in the same product with W, which
becomes :math:`Q (I - E/2) W`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.matrices import float64
from ..linalg.polynomials import Fits, polynomial
from ..linalg.products import Workspace, gram, gram_minus_identity, largest_norm, matmul_add, norm

# Number of steps from one measurement of the error of W to the next.
CORRECTION_INTERVAL = {torch.float32: 4, torch.complex64: 4, torch.float64: 2, torch.complex128: 2}
# Norm of the error of W above which it is not rounding, and one correction would not remove it.
OFF_MANIFOLD = {dtype: 2 * torch.finfo(dtype).eps ** 0.5 for dtype in CORRECTION_INTERVAL}
_SMALL = 0.02  # eigenvalues of B up to which (Q - E/2) W removes six sevenths of what Q (I - E/2) W removes


class Rotation(NamedTuple):
    """How a retraction moves square blocks if their steps are short.

    Attributes:
        fits: polynomials that approximate c by dtype, each with the largest eigenvalue of B for which it is accurate.
            With ``c_over_s`` they approximate s.
        c_over_s: the constant ratio c / s, if there is one.
        sine_fits: polynomials that approximate s. None if s is zero, or given by ``c_over_s``.
        function: ``(omega, b, ws) -> Q - I``, in place of polynomials. ``b`` is B. It may overwrite both.
        fallback: the Rotation that moves blocks with a longer step; None if the function of the retraction does.
    """

    fits: Fits
    c_over_s: float | None = None
    sine_fits: Fits | None = None
    function: Callable[[Tensor, Tensor, Workspace], Tensor] | None = None
    fallback: Rotation | None = None


def rotate_(w: Tensor, omega: Tensor, rotation: Rotation, ws: Workspace, *, correct: bool) -> bool:
    r"""Move square blocks in place, ``(B, p, p)``; return False, with nothing written, if a step is too long.

    It takes two products, B and :math:`(Q - I) W`; one more for :math:`B^2` if the degree is above one; one more for
    every two degrees above two; one or two more if :math:`s \ne 0`; and one or two if E is removed.

    Args:
        w: points. If one is not on the manifold, apart from rounding, it is restored first.
        omega: skew steps in ``ws.a``, overwritten.
        rotation: the rotation of a retraction.
        ws: buffers.
        correct: whether to remove half of the error of W. A block with a zero step keeps its bits.
    """
    # The eigenvalues of a real skew matrix are pairs +-i t, so the eigenvalues t^2 of B, and those of B^2, are double.
    eigenvalue_share = 1.0 if w.dtype.is_complex else 0.5**0.5  # of the Frobenius norm
    fits = rotation.fits[w.dtype]
    b, b_squared = gram(omega, out=ws.b, adjoint=ws.adjoint("omega", omega)), None
    size = eigenvalue_share * largest_norm(b)
    if size > fits[0].reach:
        b_squared = gram(b, out=ws.c)
        refined = (eigenvalue_share * largest_norm(b_squared)) ** 0.5
        size = refined if refined < size else size
    if not size <= fits[-1].reach:  # also if it is NaN
        return False
    k = 0
    while size > fits[k].reach:
        k += 1
    moving = norm(b, keepdim=True) != 0 if correct and len(b) > 1 else None
    change = rotation_minus_identity(rotation, omega, b, b_squared, k, ws)
    unused = ws.b if change is omega else omega
    if correct and size > 0:
        error = _error_of(w, moving, out=unused)
        if not largest_norm(error) <= OFF_MANIFOLD[w.dtype]:
            restore_(w, error)
            error = _error_of(w, moving, out=unused)
        if size > _SMALL:
            change = matmul_add(change, change, error, out=ws.c, alpha=-0.5)
        change.add_(error, alpha=-0.5)
    w.add_(torch.bmm(change, w, out=unused))
    return True


def rotation_minus_identity(
    rotation: Rotation, omega: Tensor, b: Tensor, b_squared: Tensor | None, k: int, ws: Workspace
) -> Tensor:
    r"""Return :math:`Q - I = c(B) + (I + s(B))\,\Omega`, computed with the k-th polynomials.

    ``b_squared`` is None for polynomials of degree 1. ``omega`` and ``b`` are overwritten.
    """
    if rotation.function is not None:
        return rotation.function(omega, b, ws)
    coefficients = rotation.fits[b.dtype][k].coefficients
    if rotation.c_over_s is not None:
        s = polynomial(coefficients, b, b_squared, ws, out=ws.d)
        return matmul_add(omega, s, omega, out=b).add_(s, alpha=rotation.c_over_s)
    if rotation.sine_fits is None:
        return polynomial(coefficients, b, b_squared, ws, out=omega, onto=omega)
    s = polynomial(rotation.sine_fits[b.dtype][k].coefficients, b, b_squared, ws, out=ws.d, spare=ws.x)
    turned = matmul_add(omega, s, omega, out=ws.x)
    return polynomial(coefficients, b, b_squared, ws, out=turned, onto=turned)


def _error_of(w: Tensor, moving: Tensor | None, *, out: Tensor) -> Tensor:
    r"""Write :math:`W W^\top - I` to ``out``, zero for blocks that do not move, and return it."""
    error = gram_minus_identity(w, out=out)
    return error if moving is None else error.mul_(moving)


def rotate_sync_free(
    w: Tensor, omega: Tensor, rotation: Rotation, ws: Workspace, *, correct: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the new points, which steps were clipped, and which points were near the manifold (None if not measured).

    This is :func:`rotate_` for the case that no value may be read. All blocks get the polynomial of the highest degree,
    and longer steps are clipped to its reach. The eighth power of the norm of a step must not overflow.
    """
    eigenvalue_share = 1.0 if w.dtype.is_complex else 0.5**0.5
    reach = rotation.fits[w.dtype][-1].reach
    b = gram(omega, out=ws.b)
    b_squared = gram(b, out=ws.c)
    # The square of the bound on the eigenvalues of B, over that of the reach.
    excess = norm(b_squared, keepdim=True).mul_(eigenvalue_share / reach**2)
    square = excess.clamp_min(1)
    factor = square.sqrt()
    omega, b, b_squared = omega.div_(factor.sqrt()), b.div_(factor), b_squared.div_(square)
    change = rotation_minus_identity(rotation, omega, b, b_squared, -1, ws)
    unused = ws.b if change is omega else omega
    if not correct:
        return matmul_add(w, change, w, out=unused), excess > 1, None
    error = gram_minus_identity(w, out=unused)
    near = norm(error, keepdim=True) < w.shape[-1] ** 0.5  # for a larger error the correction would increase it
    change = matmul_add(change, change, error, out=ws.c, alpha=-0.5).add_(error, alpha=-0.5)
    return matmul_add(w, change, w, out=unused), excess > 1, near


def restore_(w: Tensor, error: Tensor) -> None:
    """Replace the blocks that are not on the manifold by the nearest points, by SVD.

    Args:
        w: ``(B, p, n)``.
        error: ``W W^T - I``, ``(B, p, p)``.
    """
    far = (norm(error) > OFF_MANIFOLD[w.dtype]).nonzero()[:, 0]
    u, _, vh = torch.linalg.svd(float64(w[far]), full_matrices=False)
    w[far] = (u @ vh).to(w)


def bounds(omega: Tensor, ws: Workspace) -> Tensor:
    """Return an upper bound on the eigenvalues of B for every block, ``(B,)``."""
    eigenvalue_share = 1.0 if omega.dtype.is_complex else 0.5**0.5
    b = gram(omega, out=ws.b)
    return torch.minimum(norm(b) * eigenvalue_share, (norm(gram(b, out=ws.c)) * eigenvalue_share).sqrt())
