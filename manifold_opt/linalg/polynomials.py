r"""Polynomials that replace functions of a small symmetric matrix B, each up to a largest eigenvalue of B.

A retraction of square blocks needs functions of :math:`B = \Omega\Omega^\top` that vanish at zero:
:math:`\sqrt{1-x}-1`, :math:`(1+x)^{-1/2}-1` and others. While B is small, a polynomial is as exact as the function. A
:class:`Fit` is such a polynomial, with the largest eigenvalue of B for which it is accurate. The fits of a function are
sorted by degree, and a step takes the first one that is accurate for its B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from decimal import Decimal, localcontext
from typing import NamedTuple

import torch
from torch import Tensor

from .products import Workspace, matmul_add


class Fit(NamedTuple):
    """A polynomial without a constant term.

    Attributes:
        reach: largest eigenvalue of the matrix for which the polynomial is accurate to rounding.
        coefficients: coefficients of x, x^2, and so on; one, or an even number.
    """

    reach: float
    coefficients: tuple[float, ...]


Fits = dict[torch.dtype, tuple[Fit, ...]]


def fit_for(fits: Sequence[Fit], eigenvalue: float) -> Fit:
    """Return the fit of the lowest degree that is accurate up to an eigenvalue; the last one if none is."""
    for fit in fits:
        if eigenvalue <= fit.reach:
            return fit
    return fits[-1]


def interpolate(quotient: Callable[[Tensor], Tensor], degree: int, reach: float) -> Fit:
    r"""Return the polynomial of ``degree`` that equals :math:`x \cdot` ``quotient(x)`` at Chebyshev nodes.

    The nodes are the roots of the Chebyshev polynomial of degree ``degree`` + 1, mapped to [0, reach] such that the
    lowest root is zero. The interpolant is close to the best polynomial that vanishes at zero.

    >>> from manifold_opt.linalg.polynomials import interpolate
    >>> [round(c, 6) for c in interpolate(lambda x: 3 + 2 * x, degree=2, reach=0.5).coefficients]  # 3 x + 2 x^2
    [3.0, 2.0]
    """
    roots = (1 - ((torch.arange(degree + 1, dtype=torch.float64, device="cpu") + 0.5) * _step(degree)).cos()) / 2
    nodes = (roots[1:] - roots[0]) / (1 - roots[0])
    scaled = _interpolate_exactly(nodes.tolist(), quotient(reach * nodes).tolist())
    return Fit(reach, tuple(float(c) / reach**k for k, c in enumerate(scaled)))


def _interpolate_exactly(nodes: list[float], values: list[float]) -> list[Decimal]:
    """Return the coefficients of the polynomial through these points, by divided differences in 60 digits.

    A linear solve in float64 would leave a rounding error that depends on the processor.
    """
    with localcontext() as context:
        context.prec = 60
        x, differences = list(map(Decimal, nodes)), list(map(Decimal, values))
        for order in range(1, len(x)):
            for i in range(len(x) - 1, order - 1, -1):
                differences[i] = (differences[i] - differences[i - 1]) / (x[i] - x[i - order])
        coefficients = [differences[-1]]
        for i in range(len(x) - 2, -1, -1):  # multiply by (x - x_i), and add the difference
            shifted = [Decimal(0), *coefficients]
            for k, c in enumerate(coefficients):
                shifted[k] -= x[i] * c
            shifted[0] += differences[i]
            coefficients = shifted
        return coefficients


def _step(degree: int) -> float:
    return math.pi / (degree + 1)


def fits_by_dtype(fit: Callable[[int, float], Fit], single: dict[int, float], double: dict[int, float]) -> Fits:
    """Return the fits for every dtype.

    Args:
        fit: ``(degree, reach) -> Fit``.
        single: the reach of every degree in single precision. Degrees are one or even.
        double: the same in double precision.
    """
    narrow, wide = (tuple(fit(degree, reach) for degree, reach in table.items()) for table in (single, double))
    return {torch.float32: narrow, torch.complex64: narrow, torch.float64: wide, torch.complex128: wide}


# The reaches, here and in the files of stiefel/, were found by bisection: up to there, the rotation made of the
# polynomial satisfies |Q Q^T - I| <= eps/2 on every eigenvalue, and in float64, where the coefficients are rounded
# too, 3 eps/2 (test_polynomials.py).
INVERSE_SQRT = fits_by_dtype(  # (1 + x)^(-1/2) - 1
    lambda degree, reach: interpolate(lambda x: -1 / ((1 + x).sqrt() * (1 + (1 + x).sqrt())), degree, reach),
    {1: 6.8e-4, 2: 1.35e-2, 4: 0.149, 6: 0.45, 8: 0.89},
    {
        1: 2.9e-8,
        2: 1.66e-5,
        4: 2.52e-3,
        6: 2.14e-2,
        8: 7.1e-2,
        10: 0.156,
        12: 0.276,
        14: 0.427,
        16: 0.6,
        18: 0.8,
    },
)


def polynomial(
    coefficients: Sequence[float],
    b: Tensor,
    b_squared: Tensor | None,
    ws: Workspace,
    *,
    out: Tensor,
    onto: Tensor | None = None,
    spare: Tensor | None = None,
) -> Tensor:
    r"""Write ``onto`` :math:`+ c_1 B + c_2 B^2 + \dots` to ``out`` and return it.

    Horner's rule in C = B^2 needs one product for every two degrees above the second: every level is :math:`c_k (B +
    (c_{k+1} / c_k)\, C)` plus C times the level above it. The factor of the uppermost level is applied in the product
    that follows. ``coefficients[k]`` is :math:`c_{k+1}`. ``spare`` is overwritten, or B if it is None.
    """
    degree = len(coefficients)
    if onto is None:
        torch.mul(b, coefficients[0], out=out)
    else:
        torch.add(onto, b, alpha=coefficients[0], out=out)
    if degree == 1 or b_squared is None:
        return out
    out.add_(b_squared, alpha=coefficients[1])
    above, scale = None, 1.0
    for k in range(degree - 2, 1, -2):
        level = (b if spare is None else spare) if k == 2 else ws.e if k % 4 == 0 else ws.f
        torch.add(b, b_squared, alpha=coefficients[k + 1] / coefficients[k], out=level)
        if above is not None:
            matmul_add(level, above, b_squared, out=level, beta=coefficients[k], alpha=scale)
        scale, above = (coefficients[k] if above is None else 1.0), level
    return out if above is None else matmul_add(out, above, b_squared, out=out, alpha=scale)
