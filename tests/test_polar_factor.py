import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt import stiefel
from manifold_opt.polar_factor import _EDGES, _probed_norm, _table, polar_factor

from .helpers import DTYPES, SQUARE, TALL, WIDE, gaussian, point, rounding


@pytest.mark.parametrize("shape", SQUARE + WIDE + TALL)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("largest", [1.0, 1.0001, 1.3, 10.0, 1e4])
def test_polar_factor_converges_in_the_steps_it_announces(shape, dtype, largest):
    """Singular values spread from one to ``largest``, no factorization."""
    p, n = min(shape), max(shape)
    s = torch.logspace(0, 1, p, base=largest, dtype=torch.float64)
    u, vt = point(p, p), point(p, n, seed=4)
    x = (u * s) @ vt
    expected = u @ vt
    x, expected = (x, expected) if shape[0] <= shape[1] else (x.mT, expected.mT)
    q = polar_factor(x.to(dtype))
    assert stiefel.error(q) < rounding(q)
    torch.testing.assert_close(q.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps * largest)


@pytest.mark.parametrize(
    ("length", "dtype", "products"),
    [
        (1e-9, torch.float32, 2),
        (0.01, torch.float32, 2),
        (0.05, torch.float32, 3),
        (0.3, torch.float32, 5),
        (0.003, torch.float64, 3),
        (0.05, torch.float64, 5),
    ],
)
def test_polar_factor_counts_its_products(length, dtype, products):
    """No more products than the size of the step calls for: the table of polar_factor_'s docstring."""
    w = point(2, 16, 16, dtype=dtype)
    omega = gaussian(2, 16, 16, dtype=dtype)
    omega = omega - omega.mT
    x = w + length * (omega / torch.linalg.matrix_norm(omega, 2, keepdim=True)) @ w
    counter = FlopCounterMode(display=False)
    with counter:
        polar_factor(x)
    assert counter.get_total_flops() == products * (2 * 2 * 16**3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_of_the_table_leaves_rounding_only(dtype):
    """All singular values that a row is for, from one to the root of one plus its bound, end on one to rounding."""
    counts, _, coefficients = _table(dtype)
    for row, largest in enumerate(_EDGES[_EDGES < 1e11].tolist()):
        s = (1 + largest * torch.linspace(0, 1, 500, dtype=torch.float64)).sqrt()
        for a, b, c, share in coefficients[row, : counts[row]].double().tolist():
            defect = s * s - 1
            s = s * (share + a + b * defect + c * defect**2)
        assert float((s * s - 1).abs().max()) < (4 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps


@pytest.mark.parametrize("p", [32, 100, 300])
def test_the_probed_norm_is_from_above_and_tight(p):
    """Of the semicircle's many eigenvalues and of one lone pair, where two probes may fall a little short."""
    a = gaussian(8, p, p)
    full = (a - a.mT) @ (a - a.mT).mT
    u = point(8, 2, p)
    for matrix, low in ((full, 0.85), (u.mT @ u, 0.7)):
        ratio = _probed_norm(matrix) / torch.linalg.matrix_norm(matrix, 2)
        assert low <= float(ratio.min())
        assert float(ratio.max()) < 2.5
