r"""The polar factor of any matrix by products alone, in a number of products known beforehand.

For a skew matrix it is :math:`i` times the matrix sign of :math:`K/i`, and skew. With :math:`Y = U S V^\top`, a step

.. math:: Y \leftarrow Y q(Y^\top Y) = q(Y Y^\top)\, Y = U\, S q(S^2)\, V^\top

moves every singular value by the odd polynomial :math:`s\,q(s^2)`. The polynomials of a schedule follow one another.
Each is the one of its degree that is nearest to 1, in the maximum norm, on the interval to which its predecessors have
brought the singular values; that is the best composition (Amsel et al. 2025, *The Polar Express*, arXiv 2505.16932).
Degree 9 takes four products, and four products of it reach further than those of degree 5 or 3.

With :math:`X = Y Y^\top - mI`, and m such that one coefficient vanishes,

.. math:: q(Y Y^\top) = c_0 I + c_2 X^2 \quad\text{or}\quad c_0 I + c_1 X + c_2 X^2 + c_4 (X^2)^2.

In powers of :math:`Y Y^\top` itself, coefficients of a thousand would cancel, which loses two digits.

Singular values below ``smallest`` times a bound on the largest one end between 0 and 1. Those at rounding, of a
matrix without full rank, are multiplied by at most the product of the :math:`q(0)`.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from .matrices import wide
from .products import Workspace, gram, matmul_add, norm, symmetric_matmul_add


class Schedule(NamedTuple):
    """Polynomials that bring singular values to one.

    Attributes:
        smallest: smallest singular value that they bring there, of a matrix with norm at most one.
        error: distance from one of those that are larger.
        steps: m and the coefficients of every polynomial: ``(m, c0, c2)`` for degree 5, ``(m, c0, c1, c2, c4)`` for 9.
    """

    smallest: float
    error: float
    steps: tuple[tuple[float, ...], ...]

    def products(self) -> int:
        """Return the number of products."""
        return sum(4 if len(step) == 5 else 3 for step in self.steps)


# By Remez exchange in 40 digits. tests/linalg/test_matrix_sign.py does it again and compares.
COARSE = Schedule(
    1e-2,
    0.0031,
    (
        (0.5758482710750807, 2.433460467649572, -0.19663601478690673, -46.582249523247306, 243.8180289406081),
        (2.0374786350839984, 0.948694381941728, -0.13391069841024839, -0.8601331542763354, 0.4162163006063626),
        (1.4160550005086612, 0.842243730348736, -0.31009816346941665, 0.10630589940242983, 0.2876825823909336),
    ),
)
SINGLE = Schedule(
    1e-3,
    3.2e-7,
    (
        (0.6738875747764071, 0.010319018159459556, 18.62927559911801),
        (2.2803869327116324, 1.2725182377676216, -0.011189614883450882, -1.6197717867541563, 0.5352057992010281),
        (2.176375969839317, 1.0974275130658944, -0.07116272406979145, -1.2422207805819765, 0.4751742470562215),
        (1.6868417916816287, 0.8144643874234193, -0.2460647367110492, -0.22621743694627766, 0.32709471936739526),
        (1.2891188558468099, 0.8810533637482175, -0.33606837758487723, 0.23770779093827923, 0.27378117031427235),
    ),
)
DOUBLE = Schedule(
    1e-6,
    1e-16,
    (
        (0.5743184685791277, 2.6158806557826, -2.167234612737975e-05, -54.11707074726288, 279.89455399989777),
        (2.2972428253963946, 1.3078843428381126, -2.0611167915700207e-05, -1.6910524627134542, 0.5466555644977255),
        (2.2970415691541457, 1.3074486641752123, -0.00015676542452047295, -1.6901820056772026, 0.54651558097473),
        (2.2955117446009887, 1.3041477236948116, -0.001189467049974802, -1.6835809601395157, 0.5454541516557936),
        (2.2839558835093907, 1.2798199836596713, -0.008863636923271622, -1.6345949196654899, 0.5375845230833868),
        (2.2007026041871676, 1.1325108346848078, -0.058345550173765096, -1.322061362101659, 0.4877608624304366),
        (1.7703020881661709, 0.8248439421615978, -0.22323758874330918, -0.34949104098481526, 0.34317634409792697),
        (1.2953994914749762, 0.8788002609953014, -0.33483517516570555, 0.2314822667452474, 0.27441882542279306),
        (1.6666666666864969, 0.8333333333224267, 0.3750000000022309),
    ),
)
EXACT = {torch.float32: SINGLE, torch.complex64: SINGLE, torch.float64: DOUBLE, torch.complex128: DOUBLE}


@wide
def matrix_sign(x: Tensor) -> Tensor:
    r"""Return the polar factor :math:`U V^\top` of :math:`X = U S V^\top` for every matrix of a batch.

    Args:
        x: ``(..., p, n)``, wide or tall, of any size and rank. A zero matrix stays zero.

    >>> import torch
    >>> from manifold_opt.linalg.matrix_sign import matrix_sign
    >>> torch.allclose(matrix_sign(torch.tensor([[0.0, 3.0], [-3.0, 0.0]])), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    True
    """
    y = x.reshape(-1, *x.shape[-2:]).clone()
    return matrix_sign_(y, torch.empty_like(y), Workspace(None, y), EXACT[x.dtype]).view(x.shape)


def matrix_sign_(y: Tensor, spare: Tensor, ws: Workspace, schedule: Schedule, *, is_skew: bool = False) -> Tensor:
    """Return the polar factors of wide matrices, in ``y`` or in ``spare``. Both are overwritten.

    Args:
        y: ``(B, p, n)``; neither it nor ``spare`` is ``ws.b``, ``ws.c`` or ``ws.d``.
        spare: tensor like ``y``.
        ws: buffers ``(B, p, p)``.
        schedule: the polynomials.
        is_skew: whether the matrices are skew. If they are also real, singular values are double, and the bound on them
            is smaller.
    """
    tiny, share = torch.finfo(y.dtype).tiny, 0.5**0.5 if is_skew and not y.dtype.is_complex else 1.0
    # First so that squares are in range, then by a bound: share |Y Y^T| is at least the square of the spectral norm.
    y.div_(torch.linalg.vector_norm(y, torch.inf, dim=(-2, -1), keepdim=True).clamp_min_(tiny))
    x = gram(y, out=ws.b)
    squared = norm(x, keepdim=True).mul_(share).clamp_min_(tiny)
    y.div_(squared.sqrt())
    x.div_(squared)
    multiply = functools.partial(symmetric_matmul_add, sign=-1) if is_skew else matmul_add
    for k, (middle, first, *others) in enumerate(schedule.steps):
        if k == 0:  # with the identity, since a view of the diagonal and a scalar are slower for small matrices
            x.add_(ws.identity, alpha=-middle)
        else:
            symmetric_matmul_add(ws.identity, y, y.mH, out=x, beta=-middle)
        s, scale = gram(x, out=ws.c, adjoint=x), others[-1]
        if len(others) == 3:
            x.add_(s, alpha=others[1] / others[0])
            s, scale = symmetric_matmul_add(x, s, s, out=ws.d, beta=others[0], alpha=scale), 1.0
        y, spare = multiply(y, s, y, out=spare, beta=first, alpha=scale), y
    return y
