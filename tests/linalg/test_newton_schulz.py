import pytest
import torch

from manifold_opt import mark_orthogonal, orthogonality_error, orthogonalize_
from manifold_opt.linalg.newton_schulz import convergence_radius, newton_schulz
from manifold_opt.stiefel import geometry

from ..helpers import FIELDS, SQUARE, TALL, WIDE, gaussian, pairs, point
from ..reference import loop as reference


@pairs(shape=SQUARE + WIDE + TALL, beta=[0.001, 0.3, 0.5], dtype=FIELDS)
def test_orthogonalizer_is_its_formula(shape, beta, dtype):
    x = 0.8 * point(*shape, dtype=dtype) + 0.01 * gaussian(*shape, dtype=dtype)
    torch.testing.assert_close(newton_schulz(x, beta=beta), reference.orthogonalizer(x, beta))


@pytest.mark.parametrize("beta", [0.001, 0.1, 0.5])
@pytest.mark.parametrize("dtype", FIELDS)
def test_singular_values_follow_the_cubic(beta, dtype):
    """e' = (1 - 2b) e + (b^2 - 2b) e^2 + b^2 e^3 for e = s^2 - 1."""
    s = torch.tensor([0.7, 0.9, 1.0, 1.2], dtype=torch.float64)
    e = s**2 - 1
    x = point(4, 4, dtype=dtype) @ torch.diag(s).to(dtype) @ point(4, 4, seed=5, dtype=dtype)
    new = torch.linalg.svdvals(newton_schulz(x, beta=beta)).sort()[0]
    expected = (1 - 2 * beta) * e + (beta**2 - 2 * beta) * e**2 + beta**2 * e**3
    torch.testing.assert_close(new**2 - 1, expected.sort()[0], rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", FIELDS)
def test_convergence_is_quadratic_at_one_half_and_linear_below(dtype):
    x = point(6, 6, dtype=dtype) * 1.01
    half = [float(geometry.error(newton_schulz(x, steps=k))) for k in (1, 2)]
    assert half[1] < half[0] ** 2
    small = [float(geometry.error(newton_schulz(x, beta=0.001, steps=k))) for k in (100, 200)]
    assert small[1] / small[0] == pytest.approx((1 - 0.002) ** 100, rel=0.02)


def test_orthogonalize_in_place_by_hand():
    x = torch.tensor([[2.0 / 3.0]], dtype=torch.float64)
    assert orthogonalize_(x, beta=0.5) is x
    torch.testing.assert_close(x, torch.tensor([[1.0 - 4.0 / 27.0]], dtype=torch.float64))


def test_orthogonalize_acts_block_by_block_and_keeps_the_gain():
    weight = mark_orthogonal(torch.nn.Parameter(torch.randn(12, 4)), blocks=3, gain=2.0)
    with torch.no_grad():
        weight.mul_(1.01)
    before = weight.data_ptr()
    orthogonalize_(weight, steps=3)
    assert orthogonality_error(weight) < 1e-5
    assert weight.data_ptr() == before
    torch.testing.assert_close(torch.linalg.svdvals(weight[:4]), torch.full((4,), 2.0))


@pytest.mark.parametrize("value", [2.0, float("nan"), float("inf")])
def test_orthogonalize_refuses_what_would_diverge_and_writes_nothing(value):
    x = torch.eye(3)
    x[0, 0] = value
    before = x.clone()
    with pytest.raises(ValueError, match=r"1\.73.*nearest_orthogonal"):
        orthogonalize_(x)
    assert torch.equal(x.nan_to_num(), before.nan_to_num())


def test_orthogonalize_accepts_all_of_its_basin():
    """The cheap bound fails here, 40 values of 1.7, and the exact one decides."""
    x = 1.7 * point(40, 40)
    orthogonalize_(x, steps=30)
    assert orthogonality_error(x) < 1e-12
    assert convergence_radius(0.5) == 3**0.5


@pytest.mark.parametrize(("options", "match"), [({"beta": 0}, "beta"), ({"beta": 1}, "beta"), ({"steps": 0}, "steps")])
def test_orthogonalize_refuses_options_out_of_range(options, match):
    with pytest.raises(ValueError, match=match):
        orthogonalize_(torch.eye(2), **options)


@pytest.mark.parametrize("x", [torch.ones(3), torch.ones(2, 2, dtype=torch.int64)])
def test_orthogonalize_needs_matrices(x):
    with pytest.raises(ValueError, match="matrices"):
        orthogonalize_(x)
