"""The polar factor by products: the polynomials, what they do to singular values, and how many products that takes."""

from math import comb

import mpmath
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt.linalg.matrices import float64
from manifold_opt.linalg.matrix_sign import COARSE, DOUBLE, EXACT, SINGLE, matrix_sign, matrix_sign_
from manifold_opt.linalg.products import Workspace, symmetric_matmul_add

from ..helpers import DTYPES, FIELDS, UNITARY, gaussian, never_read

SCHEDULES = {"coarse": COARSE, "single": SINGLE, "double": DOUBLE}


def remez(low, high, degree):
    """The odd polynomial nearest to 1 on [low, high]: its coefficients, and how far off it is. In 40 digits."""
    k = (degree + 1) // 2
    if high > 50 * low:  # where the Chebyshev polynomial, which is odd, is largest; else those of the interval
        x = [low, *(high * mpmath.sin(mpmath.pi * (2 * i - 1) / (4 * k - 2)) for i in range(1, k + 1))]
    else:
        x = [(low + high) / 2 - (high - low) / 2 * mpmath.cos(mpmath.pi * i / k) for i in range(k + 1)]
    while True:
        rows = [[point ** (2 * j + 1) for j in range(k)] + [(-1) ** i] for i, point in enumerate(x)]
        *coefficients, error = mpmath.lu_solve(mpmath.matrix(rows), mpmath.matrix([1] * (k + 1)))
        slopes = [(2 * j + 1) * c for j, c in enumerate(coefficients)]
        squares = mpmath.polyroots(slopes[::-1], maxsteps=500, extraprec=200)
        inside = sorted(mpmath.re(s) for s in squares if abs(mpmath.im(s)) < 1e-15 and low**2 < mpmath.re(s) < high**2)
        last, x = x, [low, *map(mpmath.sqrt, inside), high]
        if max(abs(a - b) for a, b in zip(x, last, strict=True)) < mpmath.mpf(10) ** -25:
            return coefficients, abs(error)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_polynomials_are_the_nearest_to_one(name):
    """And m is where one coefficient vanishes."""
    schedule = SCHEDULES[name]
    with mpmath.workdps(40):
        low, high = mpmath.mpf(schedule.smallest), mpmath.mpf(1)
        for m, *given in schedule.steps:
            c, error = remez(low, high, 9 if len(given) == 4 else 5)
            k = len(c) - 1
            assert abs(m + c[k - 1] / (k * c[k])) < 1e-14
            shifted = [sum(c[j] * comb(j, i) * mpmath.mpf(m) ** (j - i) for j in range(i, k + 1)) for i in range(k + 1)]
            assert abs(shifted.pop(k - 1)) < 1e-12
            assert all(abs(a - b) <= 1e-14 * max(1, abs(a)) for a, b in zip(shifted, given, strict=True))
            low, high = 1 - error, 1 + error
        assert 0.9 * schedule.error < error <= schedule.error or schedule is DOUBLE


@pytest.mark.parametrize("name", SCHEDULES)
def test_singular_values(name):
    """Large ones end at one; small ones, and those at rounding, below."""
    schedule = SCHEDULES[name]
    values = torch.cat([torch.zeros(1), torch.logspace(-16, 0, 2000, dtype=torch.float64)])
    s = values.clone()
    for m, c0, *others in schedule.steps:
        x = s * s - m
        q = others[0] * x**2 if len(others) == 1 else others[0] * x + others[1] * x**2 + others[2] * x**4
        s = s * (c0 + q)
    large = values >= schedule.smallest
    assert float((s[large] - 1).abs().max()) <= schedule.error * 1.001 + 1e-14
    assert float(s.max()) <= 1 + schedule.error * 1.001 + 1e-14
    assert float(s.min()) >= 0


def polar_factor(x):
    u, s, vh = torch.linalg.svd(float64(x), full_matrices=False)
    return (u * (s > 1e-3 * s[..., :1]).to(u.dtype)[..., None, :]) @ vh


@pytest.mark.parametrize("dtype", DTYPES + UNITARY)
@pytest.mark.parametrize("shape", [(3, 5, 5), (2, 3, 4, 9), (2, 7, 4), (1, 1)])
def test_against_the_singular_value_decomposition(shape, dtype):
    x = gaussian(*shape, dtype=dtype)
    # Rounding of the first products is magnified by as much as the smallest singular value is.
    small = float(torch.linalg.svdvals(float64(x)).amin(-1).min() / torch.linalg.svdvals(float64(x)).amax())
    old = tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13)  # whose products round otherwise
    torch.testing.assert_close(
        float64(matrix_sign(x)), polar_factor(x), rtol=0, atol=512 * (1 + old) * torch.finfo(dtype).eps / small
    )


@pytest.mark.parametrize("dtype", FIELDS)
@pytest.mark.parametrize("n", [1, 2, 6, 7])
def test_skew_stays_skew(n, dtype):
    k = gaussian(4, n, n, dtype=dtype)
    k = k - k.mH
    y = matrix_sign(k)
    torch.testing.assert_close(y, -y.mH, rtol=0, atol=1e-10)
    torch.testing.assert_close(y, polar_factor(k), rtol=0, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1.0, 1e18, 1e30])
def test_any_scale(scale):
    x = gaussian(6, 6).double()
    torch.testing.assert_close(
        matrix_sign((scale * x).float()).double(), polar_factor(x), rtol=0, atol=1e-3 if scale < 1e-30 else 1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_without_full_rank(rank, dtype):
    x = gaussian(3, 8, rank, dtype=dtype) @ gaussian(3, rank, 9, dtype=dtype, seed=5)
    y = matrix_sign(x)
    s = torch.linalg.svdvals(y)
    torch.testing.assert_close(s[:, :rank], torch.ones_like(s[:, :rank]), rtol=0, atol=1e-4)
    assert float(s.max()) <= 1 + 1e-4
    assert rank or bool((y == 0).all())


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("n", [24, 400])
def test_products(name, n):
    """As many as the schedule says and the first Gram matrix is one of them; from 384 rows on, half of each."""
    k = gaussian(1, n, n, dtype=torch.float32)
    y = k - k.mT
    with FlopCounterMode(display=False) as counter:
        matrix_sign_(y, torch.empty_like(y), Workspace(None, y), SCHEDULES[name], is_skew=True)
    share = 5 / 8 if n >= 384 else 1
    assert counter.get_total_flops() == 2 * n**3 * share * SCHEDULES[name].products()


def test_products_of_the_schedules():
    assert [SCHEDULES[name].products() for name in SCHEDULES] == [12, 19, 35]
    assert set(EXACT) == set(DTYPES + UNITARY)


@pytest.mark.parametrize("n", [5, 400])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_symmetric_product_is_that_of_all_entries(n, sign, monkeypatch):
    s = gaussian(2, n, n)
    s = s + s.mT
    y = s.matrix_exp() if n < 10 else s @ s
    x = gaussian(2, n, n, seed=3)
    x = x + sign * x.mT
    a, b = (s, y) if sign == 1 else (torch.eye(n).double().expand(2, n, n), x)
    out = torch.empty_like(x)
    symmetric_matmul_add(x, a, b, out=out, alpha=0.3, beta=2.0, sign=sign)
    torch.testing.assert_close(out, 2 * x + 0.3 * a @ b, rtol=1e-9, atol=1e-6)
    never_read(monkeypatch)
    torch.testing.assert_close(
        symmetric_matmul_add(x, a, b, out=torch.empty_like(x), alpha=0.3, beta=2.0, sign=sign),
        out,
        rtol=1e-9,
        atol=1e-6,
    )
