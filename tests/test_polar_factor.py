import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt import retract, stiefel
from manifold_opt.orthogonalizer import spectral_bound
from manifold_opt.polar_factor import _EDGES, TABLES, polar_factor

from .helpers import DTYPES, FIELDS, SQUARE, TALL, UNITARY, WIDE, gaussian, never_read, point, rounding, tangent


@pytest.mark.parametrize("shape", SQUARE + WIDE + TALL)
@pytest.mark.parametrize("dtype", DTYPES + UNITARY)
@pytest.mark.parametrize("largest", [1.0, 1.0001, 1.3, 10.0, 1e4])
def test_polar_factor_converges_in_the_steps_it_announces(shape, dtype, largest):
    """Singular values spread from one to ``largest``, no factorization."""
    p, n = min(shape), max(shape)
    s = torch.logspace(0, 1, p, base=largest, dtype=torch.float64)
    double = stiefel.in_double(dtype)
    u, vt = point(p, p, dtype=double), point(p, n, seed=4, dtype=double)
    x = (u * s) @ vt
    expected = u @ vt
    x, expected = (x, expected) if shape[0] <= shape[1] else (x.mT, expected.mT)
    q = polar_factor(x.to(dtype))
    assert stiefel.error(q) < rounding(q)
    torch.testing.assert_close(q.to(double), expected, rtol=0, atol=20 * torch.finfo(dtype).eps * largest)


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
    counts, _, coefficients = TABLES[dtype]
    for row, largest in enumerate(_EDGES[_EDGES < 1e11].tolist()):
        s = (1 + largest * torch.linspace(0, 1, 500, dtype=torch.float64)).sqrt()
        for a, b, c, share in coefficients[row, : counts[row]].double().tolist():
            defect = s * s - 1
            s = s * (share + a + b * defect + c * defect**2)
        assert float((s * s - 1).abs().max()) < (4 if dtype == torch.float32 else 8) * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES + UNITARY)
@pytest.mark.parametrize("length", [1e-3, 0.1, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("shape", [(64, 128), (150, 150)])
def test_steps_of_low_rank_are_exact(shape, rank, length, dtype):
    """A few singular values far above the others, wherever they point: no estimate may miss them."""
    p, n = shape
    w = point(8, p, n, dtype=dtype)
    left, right = gaussian(8, p, rank, dtype=dtype, seed=2), gaussian(8, rank, n, dtype=dtype, seed=3)
    v = stiefel.project(w, left @ right)
    v = length * v / torch.linalg.matrix_norm(v, 2, keepdim=True)
    moved = retract(w, v, "polar")
    assert float(stiefel.error(moved).max()) < 2 * rounding(moved)
    u, _, vh = torch.linalg.svd(stiefel.float64(w + v), full_matrices=False)
    torch.testing.assert_close(stiefel.float64(moved), u @ vh, rtol=0, atol=40 * torch.finfo(dtype).eps * (1 + length))


@pytest.mark.parametrize("dtype", UNITARY)
@pytest.mark.parametrize("length", [1e-6, 0.01, 0.3, 0.8, 40.0])
@pytest.mark.parametrize("shape", [(6, 6), (5, 9)])
def test_where_nothing_can_be_read_unitary_steps_are_exact_too(shape, length, dtype, monkeypatch):
    """By a fixed number of polynomials; what is too long for them is shortened."""
    w = point(3, *shape, dtype=dtype)
    v = tangent(w, length)
    read = retract(w, v, "polar")
    never_read(monkeypatch)
    moved = retract(w, v, "polar")
    assert float(stiefel.error(moved).max()) < rounding(moved)
    if length < 0.8:
        torch.testing.assert_close(moved, read, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("p", [5, 40, 300])
@pytest.mark.parametrize("dtype", FIELDS)
def test_the_spectral_bound_is_one(p, dtype):
    """Of the semicircle's many eigenvalues and of one lone pair."""
    a = gaussian(8, p, p, dtype=dtype)
    u = point(8, 2, p, dtype=dtype)
    for matrix in ((a - a.mH) @ (a - a.mH).mH, u.mH @ u):
        ratio = spectral_bound(matrix, torch.empty_like(matrix)) / torch.linalg.matrix_norm(matrix, 2)
        assert float(ratio.min()) >= 1 - 1e-12
        assert float(ratio.max()) < 1 + 0.25 * p**0.5
