r"""Retractions of square blocks as rotations: W moves to Q W, with Q made of the skew step :math:`\Omega`.

With :math:`B = \Omega\Omega^\top = -\Omega^2`, which commutes with :math:`\Omega`, every retraction is

.. math:: R_W(\Omega W) = Q W, \qquad Q = I + c(B) + (I + s(B))\,\Omega, \qquad c(0) = s(0) = 0,

============  =============================  ==============================
retraction    c(x)                           s(x)
============  =============================  ==============================
orthographic  :math:`\sqrt{1-x} - 1`         0
polar         :math:`1/\sqrt{1+x} - 1`       :math:`1/\sqrt{1+x} - 1`
cayley        :math:`2/(1+x/4) - 2`          :math:`1/(1+x/4) - 1`
exp           :math:`\cos\sqrt x - 1`        :math:`\sin(\sqrt x)/\sqrt x - 1`
============  =============================  ==============================

and ``qr`` is :math:`Q = L^{-1}(I + \Omega)` with the Cholesky factor L of :math:`I + B`. The functions are
polynomials of B (polynomials.py), of the lowest degree that a bound on the largest eigenvalue of B allows. What is
added to W is :math:`T W` with :math:`T = Q - I`, so that rounding in T is relative to the length of the step.

A rotation keeps :math:`E = W W^\top - I` as large as it is, and rounding adds a little in every step, less than
measuring E does. So E is measured every few steps, and half of it is taken off in the same product with W, which
becomes :math:`Q (I - E/2) W`.

References: Absil & Malick (2012), *Projection-like retractions on matrix manifolds*; Wen & Yin (2013) for ``cayley``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..linalg.matrices import float64
from ..linalg.polynomials import COS, INVERSE, INVERSE_SQRT, SINC, SQRT, Fit, Fits, polynomial
from ..linalg.products import gram, gram_minus_identity, largest_norm, matmul_add, norm
from ..linalg.workspace import Workspace

# Steps from one measurement of the error of W to the next.
CORRECTION_INTERVAL = {torch.float32: 4, torch.complex64: 4, torch.float64: 2, torch.complex128: 2}
OFF_MANIFOLD = 2.0  # roots of eps: an error above it is no rounding, and one correction would not do
_SMALL = 0.02  # eigenvalues of B up to which (Q - E/2) W removes six sevenths of what Q (I - E/2) W removes


class Rotation(NamedTuple):
    """A retraction of square blocks.

    Attributes:
        turn: ``(omega, b, c, k, ws) -> T``, with the k-th polynomials; c is B^2, None for polynomials of degree 1.
        fits: how far each of its polynomials reaches, by dtype.
        beyond: the retraction that takes blocks with longer steps.
    """

    turn: Callable[[Tensor, Tensor, Tensor | None, int, Workspace], Tensor]
    fits: Fits
    beyond: str


def rotate_(w: Tensor, omega: Tensor, rotation: Rotation, ws: Workspace, *, correct: bool) -> bool:
    r"""Move square blocks in place, ``(B, p, p)``; return False, with nothing written, if a step is too long.

    2 T for B and T W, one more for B^2 where the degree is above one, and one more for every two degrees above two; for
    another retraction than ``orthographic`` one or two more.

    Args:
        w: points. Where one is not on the manifold, an error of rounding aside, it is restored first.
        omega: skew steps in ``ws.a``, overwritten.
        rotation: a value of :data:`ROTATIONS`.
        ws: buffers. Afterwards ``ws.b`` is B if False is returned.
        correct: whether to take off half of the error of W, 1 T. A block without a step keeps its bits.
    """
    # The eigenvalues of a real skew matrix come in pairs, +-i t: those of B, t^2, are double, and those of B^2.
    share = 1.0 if w.dtype.is_complex else 0.5**0.5
    fits = rotation.fits[w.dtype]
    b, c = gram(omega, out=ws.b, adjoint=ws.adjoint("omega", omega)), None
    size = share * largest_norm(b)
    if size > fits[0].reach:
        c = gram(b, out=ws.c)
        refined = (share * largest_norm(c)) ** 0.5
        size = refined if refined < size else size
    if not size <= fits[-1].reach:  # a NaN is not
        return False
    k = 0
    while size > fits[k].reach:
        k += 1
    moving = norm(b, keepdim=True) != 0 if correct and len(b) > 1 else None
    turn = rotation.turn(omega, b, c, k, ws)
    spare = ws.b if turn is omega else omega
    if correct and size > 0:
        error = _error_of(w, moving, out=spare)
        if not largest_norm(error) <= OFF_MANIFOLD * torch.finfo(w.dtype).eps ** 0.5:
            restore_(w, error)
            error = _error_of(w, moving, out=spare)
        if size > _SMALL:
            turn = matmul_add(turn, turn, error, out=ws.c, alpha=-0.5)
        turn.add_(error, alpha=-0.5)
    w.add_(torch.bmm(turn, w, out=spare))
    return True


def _error_of(w: Tensor, moving: Tensor | None, *, out: Tensor) -> Tensor:
    """Write the error of the blocks that make a step to ``out``, zero for others, and return it."""
    error = gram_minus_identity(w, out=out)
    return error if moving is None else error.mul_(moving)


def rotate_sync_free(w: Tensor, omega: Tensor, rotation: Rotation, ws: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the points that steps lead to, which steps were shortened, and which points were near the manifold.

    As :func:`rotate_`, where no value may be read: by the polynomial of the highest degree for all blocks, to whose
    reach a longer step is shortened, and with a correction in every step. The eighth power of a step must not overflow.
    """
    share = 1.0 if w.dtype.is_complex else 0.5**0.5
    reach = rotation.fits[w.dtype][-1].reach
    b = gram(omega, out=ws.b)
    c = gram(b, out=ws.c)
    excess = norm(c, keepdim=True).mul_(share / reach**2)  # of the size of B over the reach, squared
    square = excess.clamp_min(1)
    factor = square.sqrt()
    turn = rotation.turn(omega.div_(factor.sqrt()), b.div_(factor), c.div_(square), -1, ws)
    spare = ws.b if turn is omega else omega
    error = gram_minus_identity(w, out=spare)
    near = norm(error, keepdim=True) < w.shape[-1] ** 0.5  # beyond, the correction would lead farther away
    turn = matmul_add(turn, turn, error, out=ws.c, alpha=-0.5).add_(error, alpha=-0.5)
    return matmul_add(w, turn, w, out=spare), excess > 1, near


def restore_(w: Tensor, error: Tensor) -> None:
    """Write the nearest point to the blocks that are off the manifold by ``error``, ``(B, p, p)``: by SVD."""
    far = (norm(error) > OFF_MANIFOLD * torch.finfo(w.dtype).eps ** 0.5).nonzero()[:, 0]
    u, _, vh = torch.linalg.svd(float64(w[far]), full_matrices=False)
    w[far] = (u @ vh).to(w)


def bounds(omega: Tensor, ws: Workspace) -> Tensor:
    """Return an upper bound on the eigenvalues of B for every block, ``(B,)``."""
    share = 1.0 if omega.dtype.is_complex else 0.5**0.5
    b = gram(omega, out=ws.b)
    return torch.minimum(norm(b) * share, (norm(gram(b, out=ws.c)) * share).sqrt())


def _orthographic(omega: Tensor, b: Tensor, c: Tensor | None, k: int, ws: Workspace) -> Tensor:
    return polynomial(SQRT[b.dtype][k].coefficients, b, c, ws, out=omega, onto=omega)


def _polar(omega: Tensor, b: Tensor, c: Tensor | None, k: int, ws: Workspace) -> Tensor:
    s = polynomial(INVERSE_SQRT[b.dtype][k].coefficients, b, c, ws, out=ws.d)
    return matmul_add(omega, s, omega, out=b).add_(s)


def _cayley(omega: Tensor, b: Tensor, c: Tensor | None, k: int, ws: Workspace) -> Tensor:
    s = polynomial(INVERSE[b.dtype][k].coefficients, b, c, ws, out=ws.d)
    return matmul_add(omega, s, omega, out=b).add_(s, alpha=2)


def _exp(omega: Tensor, b: Tensor, c: Tensor | None, k: int, ws: Workspace) -> Tensor:
    s = polynomial(SINC[b.dtype][k].coefficients, b, c, ws, out=ws.d, spare=ws.x)
    turn = matmul_add(omega, s, omega, out=ws.x)
    return polynomial(COS[b.dtype][k].coefficients, b, c, ws, out=turn, onto=turn)


def _qr(omega: Tensor, b: Tensor, c: Tensor | None, k: int, ws: Workspace) -> Tensor:  # noqa: ARG001
    b.diagonal(dim1=-2, dim2=-1).add_(1)
    omega.diagonal(dim1=-2, dim2=-1).add_(1)
    # cholesky_ex neither raises nor waits for the device where an entry is not finite.
    turn = torch.linalg.solve_triangular(torch.linalg.cholesky_ex(b)[0], omega, upper=False)
    turn.diagonal(dim1=-2, dim2=-1).sub_(1)
    return turn


_ANY: Fits = {dtype: (Fit(1.0, ()),) for dtype in CORRECTION_INTERVAL}  # without a polynomial, but not for long steps

ROTATIONS = {
    "orthographic": Rotation(_orthographic, SQRT, beyond="polar"),
    "polar": Rotation(_polar, INVERSE_SQRT, beyond="polar"),
    "cayley": Rotation(_cayley, INVERSE, beyond="cayley"),
    "exp": Rotation(_exp, COS, beyond="exp"),
    "qr": Rotation(_qr, _ANY, beyond="qr"),
}
