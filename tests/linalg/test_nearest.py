"""The nearest orthogonal matrix is as exact as by SVD, whatever the condition, the scale and the batch."""

import mpmath
import pytest
import torch

from manifold_opt import nearest_orthogonal
from manifold_opt.linalg.matrices import float64, in_double
from manifold_opt.stiefel.geometry import error

from ..helpers import UNITARY, gaussian, pairs, point, rounding

CONDITIONS = [1e0, 1e3, 1e5, 1e7, 1e11]


def of_condition(condition, p, n, dtype=torch.float64):
    """Singular values from 1 down to 1 / ``condition``, in equal ratios."""
    double = in_double(dtype)
    s = torch.tensor([condition ** (-k / (p - 1)) for k in range(p)], dtype=double)
    return (point(p, p, dtype=double) @ torch.diag(s) @ point(p, n, dtype=double, seed=1)).to(dtype)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_float64_matrix_of_any_condition_by_mpmath(condition):
    """The polar factor changes by the condition times a relative change of X, rounding for example; by no more."""
    x = of_condition(condition, 6, 6)
    with mpmath.workdps(50):
        u, _, vh = mpmath.svd_r(mpmath.matrix(x.tolist()))
        exact = torch.tensor([[float(value) for value in row] for row in (u * vh).tolist()], dtype=torch.float64)
    w = nearest_orthogonal(x)
    assert error(w) < rounding(w)
    assert torch.linalg.matrix_norm(w - exact) <= 8 * torch.finfo(torch.float64).eps * condition


@pairs(condition=[1e0, 1e3, 1e6, 1e9], shape=[(40, 40), (16, 64), (64, 16)], dtype=[torch.float32, *UNITARY])
def test_the_polar_factor_by_svd(condition, shape, dtype):
    """Entries differ by one rounding to the dtype, and by the condition times that of float64 in both algorithms."""
    x = of_condition(condition, min(shape), max(shape), dtype)
    x = x if shape[0] <= shape[1] else x.mT
    u, s, vh = torch.linalg.svd(float64(x), full_matrices=False)
    allowed = torch.finfo(dtype).eps + 8 * torch.finfo(torch.float64).eps * s[0] / s[-1]
    w = nearest_orthogonal(x)
    assert (w - u @ vh).abs().max() <= allowed
    assert error(w) < rounding(w)


def test_a_batch_has_the_values_of_its_matrices():
    """Two of six are ill-conditioned, and have another algorithm."""
    x = gaussian(2, 3, 12, 8)
    x[0, 1] = of_condition(1e9, 8, 12).mT
    x[1, 2] = of_condition(1e12, 8, 12).mT
    alone = torch.stack([torch.stack([nearest_orthogonal(matrix) for matrix in row]) for row in x])
    torch.testing.assert_close(nearest_orthogonal(x), alone, rtol=0, atol=1e-14)
    x[1, 0, :, 3] = 0
    with pytest.raises(ValueError, match=r"matrix 1, 0 of the batch, of shape \(12, 8\), is rank-deficient"):
        nearest_orthogonal(x)


@pytest.mark.parametrize("scale", [1e-300, 1e-160, 1e160, 1e300])
def test_a_gram_matrix_may_overflow_or_underflow(scale):
    x = gaussian(4, 6)
    torch.testing.assert_close(nearest_orthogonal(scale * x), nearest_orthogonal(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("smallest", [0.0, 1e-16, 1e-20, 1e-100])
def test_no_rank_is_refused_even_where_the_gram_matrix_is_exact(smallest):
    x = torch.diag(torch.tensor([1.0, smallest], dtype=torch.float64))
    with pytest.raises(ValueError, match="rank-deficient"):
        nearest_orthogonal(x)
