"""The polynomials that stand in for functions of a matrix: how far off a rotation made of them is, at every degree."""

import decimal
import math
from decimal import Decimal
from fractions import Fraction

import pytest
import torch

from manifold_opt.linalg import polynomials
from manifold_opt.linalg.polynomials import INVERSE_SQRT, interpolate
from manifold_opt.stiefel.cayley import INVERSE
from manifold_opt.stiefel.exponential import COS, SINC
from manifold_opt.stiefel.orthographic import SQRT

from ..helpers import DTYPES, UNITARY

TABLES = {"sqrt": (SQRT,), "inverse_sqrt": (INVERSE_SQRT,), "inverse": (INVERSE,), "exp": (COS, SINC)}
QUOTIENTS = {  # what is interpolated, times x: without the cancellation of f(x) - 1
    "sqrt": lambda x: -1 / (1 + (1 - x).sqrt()),
    "inverse_sqrt": lambda x: -1 / ((1 + x).sqrt() * (1 + (1 + x).sqrt())),
    "inverse": lambda x: -1 / (4 + x),
}
# |Q Q^T - I| on an eigenvalue x of B, from the values there of the polynomials.
LEFT = {
    "sqrt": lambda x, c: 2 * c + c * c + x,
    "inverse_sqrt": lambda x, s: (2 * s + s * s) * (1 + x) + x,
    "inverse": lambda x, s: 4 * s + 4 * s * s + (1 + s) ** 2 * x,
    "exp": lambda x, c, s: 2 * c + c * c + (1 + s) ** 2 * x,
}
# In units of eps. The reaches of the table have two or three digits, so that they may be 2 % beyond eps / 2. In float64
# the rounding of the coefficients themselves, and of the equations that they solve, is of that order too.
LIMIT = {torch.float32: 0.52, torch.float64: 2.1}
SEAM = 0.49  # to which the orthographic retraction goes

FITS = [
    pytest.param(name, dtype, k, id=f"{name}-{str(dtype)[6:]}-{len(TABLES[name][0][dtype][k].coefficients)}")
    for name in TABLES
    for dtype in DTYPES
    for k in range(len(TABLES[name][0][dtype]))
]


def ends_at_the_seam(name, dtype, k):
    return name == "sqrt" and k == len(SQRT[dtype]) - 1


def value(coefficients, x):
    """c_1 x + c_2 x^2 + ... to 50 digits: what the coefficients make, without the rounding of evaluating it."""
    total = Decimal(0)
    for c in reversed(coefficients):
        total = (total + Decimal(c)) * x
    return total


def left(name, polynomials, reach):
    """The largest |Q Q^T - I| on 400 eigenvalues up to ``reach``, and on as many that crowd at its ends."""
    ends = [(1 - math.cos(math.pi * k / 400)) / 2 for k in range(1, 401)]
    grid = [Decimal(reach) * Decimal(x) for x in (*ends, *(k / 400 for k in range(1, 401)))]
    with decimal.localcontext(decimal.Context(prec=50)):
        return float(max(abs(LEFT[name](x, *(value(p, x) for p in polynomials))) for x in grid))


@pytest.mark.parametrize(("name", "dtype", "k"), FITS)
def test_every_fit_leaves_rounding_only(name, dtype, k):
    fits = [table[dtype][k] for table in TABLES[name]]
    assert left(name, [fit.coefficients for fit in fits], fits[0].reach) <= LIMIT[dtype] * torch.finfo(dtype).eps


@pytest.mark.parametrize(("name", "dtype", "k"), [fit for fit in FITS if not ends_at_the_seam(*fit.values)])
def test_no_reach_is_needlessly_small(name, dtype, k):
    """Of a polynomial of the same degree that is made to reach further, eps / 2 is exceeded: no product is wasted.

    5 % further; where the next degree is not taken for the last bit of it, a Taylor series, 15 %. The error is of the
    order of reach^(degree + 1).
    """
    fits = [table[dtype][k] for table in TABLES[name]]
    degree = len(fits[0].coefficients)
    if name == "exp":
        further = 1.15 * fits[0].reach
        polynomials = [fit.coefficients for fit in fits]
    else:
        further = 1.05 * fits[0].reach
        polynomials = [interpolate(QUOTIENTS[name], degree, further).coefficients]
    assert left(name, polynomials, further) > 0.5 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_degrees_and_reaches_grow(name, dtype):
    """Degrees are 1, 2 and then even: with B^2 at hand, an odd one costs as many products as the next."""
    for table in TABLES[name]:
        degrees, reaches = zip(*((len(fit.coefficients), fit.reach) for fit in table[dtype]), strict=True)
        assert list(degrees) == [1, *range(2, 2 * len(degrees) - 1, 2)]
        assert list(reaches) == sorted(set(reaches))
        assert reaches == tuple(fit.reach for fit in TABLES[name][0][dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_orthographic_retraction_ends_at_its_seam(dtype):
    """In either precision at the same length of step, so that it does not depend on the dtype where a step ends."""
    assert SQRT[dtype][-1].reach == SEAM


@pytest.mark.parametrize("name", TABLES)
def test_complex_matrices_have_the_polynomials_of_real_ones(name):
    for table in TABLES[name]:
        assert set(table) == {*DTYPES, *UNITARY}
        assert table[torch.complex64] is table[torch.float32]
        assert table[torch.complex128] is table[torch.float64]


FUNCTIONS = {  # written so that nothing cancels in float64
    "sqrt": (SQRT, lambda x: x * QUOTIENTS["sqrt"](x)),
    "inverse_sqrt": (INVERSE_SQRT, lambda x: x * QUOTIENTS["inverse_sqrt"](x)),
    "inverse": (INVERSE, lambda x: x * QUOTIENTS["inverse"](x)),
    "cos": (COS, lambda x: -2 * (x.sqrt() / 2).sin() ** 2),
    "sinc times the root": (SINC, lambda x: x.sqrt().sin() - x.sqrt()),  # as it goes with Omega, of that length
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_polynomials_are_as_good_as_their_functions(name, dtype):
    """To one eps of the dtype, and not only in the length of what they turn: |Q Q^T - I| says nothing of the angle."""
    table, function = FUNCTIONS[name]
    for fit in table[dtype]:
        x = fit.reach * torch.linspace(0, 1, 500, dtype=torch.float64)
        fitted = torch.tensor([float(value(fit.coefficients, Decimal(v))) for v in x.tolist()], dtype=torch.float64)
        if "root" in name:
            fitted *= x.sqrt()
        assert float((fitted - function(x)).abs().max()) < torch.finfo(dtype).eps


@pytest.mark.parametrize("degree", [1, 2, 3, 6, 9])
@pytest.mark.parametrize("reach", [1e-6, 0.3, 2.0])
def test_interpolation_reproduces_a_polynomial(degree, reach):
    """Of its own degree. Errors of c_k are as large as eps over reach^(k-1) allows, times the condition of the fit."""
    coefficients = [(-1.5) ** k + 0.25 * k for k in range(degree)]
    fit = interpolate(lambda x: sum(c * x**k for k, c in enumerate(coefficients)), degree, reach)
    assert fit.reach == reach
    assert len(fit.coefficients) == degree
    for k, (c, expected) in enumerate(zip(fit.coefficients, coefficients, strict=True)):
        largest = max(abs(other) * reach**i for i, other in enumerate(coefficients))
        assert abs(c - expected) * reach**k < 2.0 ** (3 * degree) * 1e-16 * largest


@pytest.mark.parametrize("degree", [1, 2, 5, 8])
def test_interpolation_is_close_to_the_best_there_is(degree):
    """x^(degree+1) is missed by the monic polynomial of the nodes. That of the Chebyshev nodes of [0, 1] is the least,
    2 / 4^(degree+1), and here it is stretched by as much as it takes to have its lowest root at zero.
    """
    fit = interpolate(lambda x: x**degree, degree, 1.0)
    x = torch.linspace(0, 1, 2001, dtype=torch.float64)
    missed = x ** (degree + 1) - sum(c * x ** (k + 1) for k, c in enumerate(fit.coefficients))
    lowest = (1 - math.cos(math.pi / (2 * degree + 2))) / 2
    assert float(missed.abs().max()) == pytest.approx(2 * (4 * (1 - lowest)) ** -(degree + 1), rel=1e-3)


def test_a_polynomial_by_hand():
    """x + x^2 at degree 1. The Chebyshev polynomial of degree 2 has the roots (1 -+ sqrt(1/2)) / 2 on [0, 1], the lower
    one moves to zero, and the other one with it to 2 sqrt(1/2) / (1 + sqrt(1/2)), where c x = x + x^2.
    """
    root = 0.5**0.5
    (c,) = interpolate(lambda x: 1 + x, degree=1, reach=1.0).coefficients
    assert c == pytest.approx(1 + 2 * root / (1 + root), rel=1e-15)


@pytest.mark.parametrize("degree", [1, 4, 18])
def test_coefficients_are_those_of_the_exact_interpolant(degree):
    """Of Lagrange's formula in rational numbers, whatever the processor."""
    nodes = [(k + 1) / (degree + 1) for k in range(degree)]
    values = [math.exp(x) for x in nodes]
    expected = [Fraction(0)] * degree
    for i, value in enumerate(values):
        basis = [Fraction(value)]
        for j, node in enumerate(map(Fraction, nodes)):
            if j != i:
                shifted = [Fraction(0), *basis]
                for k, c in enumerate(basis):
                    shifted[k] -= node * c
                basis = [c / (Fraction(nodes[i]) - node) for c in shifted]
        expected = [a + b for a, b in zip(expected, basis, strict=True)]
    found = polynomials._interpolate_exactly(nodes, values)
    assert [float(c) for c in found] == [float(c) for c in expected]
