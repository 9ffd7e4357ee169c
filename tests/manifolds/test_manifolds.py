"""The manifolds by themselves: axioms, and cases worked by hand."""

import math

import pytest
import torch
from torch import nn

from manifold_opt import MANIFOLDS, SGD, Adam, Manifold, Orthogonal, mark_positive, mark_spectral, mark_unit_norm
from manifold_opt.manifolds import Positive, Spectral, UnitNorm

from ..helpers import gaussian
from ..reference.axioms import AXIOMS
from ..reference.cases import CASES, points


def test_every_manifold_is_tested():
    # test_fixed_spectrum.py: without its state, any matrix is a point of it.
    missing = {name for name, kind in MANIFOLDS.items() if not any(type(c.manifold) is kind for c in CASES.values())}
    assert missing - {"fixed_spectrum"} <= ({"geoopt"} if "geoopt sphere" not in CASES else set())
    assert all(issubclass(kind, Manifold) for kind in MANIFOLDS.values())


@pytest.mark.parametrize("axiom", AXIOMS, ids=lambda axiom: axiom.__name__)
@pytest.mark.parametrize("name", CASES)
def test_axioms(name, axiom):
    case = CASES[name]
    if axiom.__name__ in case.breaks:
        pytest.skip("geoopt does not promise it")
    (part,) = case.manifold.layouts(case.shape)
    axiom(case.manifold, points(case), tuple(range(-part.point_ndim, 0)))


@pytest.mark.parametrize("name", CASES)
def test_what_is_off_has_an_error(name):
    case = CASES[name]
    x = points(case) / case.inside
    x = case.leave(x)
    assert bool((case.manifold.error(x) > case.manifold.tolerance(x)).all())
    if not isinstance(case.manifold, Positive):
        off, values = case.manifold.find_off_manifold(x)
        assert bool(off.all())
        assert float(case.manifold.error(values).max()) <= case.manifold.tolerance(values)
    spoilt = x.clone()
    spoilt[0] = torch.nan
    assert bool(case.manifold.error(spoilt)[0].isnan().all())


@pytest.mark.parametrize("name", [name for name in CASES if name.split()[0] in ("orthogonal", "unit", "spectral")])
def test_projections_are_idempotent(name):
    case = CASES[name]
    x = points(case)
    once = case.manifold.riemannian_gradient(x, gaussian(*x.shape))
    torch.testing.assert_close(case.manifold.riemannian_gradient(x, once), once, rtol=0, atol=1e-13)


def test_a_manifold_is_what_it_is_made_of():
    """Equal, hashed, told apart and shown by its options."""
    for kind, other in ((UnitNorm(1), UnitNorm()), (Spectral(2.0), Spectral()), (Orthogonal(2), Orthogonal())):
        again = type(kind)(*kind.config())
        assert again == kind != other
        assert hash(again) == hash(kind)
        assert repr(kind) != repr(other)
        assert kind.unserializable_reason() is None


# By hand.


def stepped(p, g, optimizer=SGD, **options):
    p.grad = torch.as_tensor(g, dtype=p.dtype)
    optimizer([p], **options).step()
    return p.detach()


def double(*values):
    return nn.Parameter(torch.tensor(values, dtype=torch.float64))


def test_positive_by_hand():
    """x e^(-lr x g): a gradient of 0.5 at 2 is one of 1 with respect to log x."""
    p = stepped(mark_positive(double(2.0, 1.0)), [0.5, -3.0], lr=0.1)
    assert p.tolist() == pytest.approx([2 * math.exp(-0.1), math.exp(0.3)], rel=1e-14)
    number = stepped(mark_positive(nn.Parameter(torch.tensor(4.0, dtype=torch.float64))), 0.25, lr=1.0)
    assert number.item() == pytest.approx(4 / math.e, rel=1e-14)


def test_adam_on_positive_by_hand():
    """The first step of Adam has length one, here in log x: whatever the gradient, x e^(-lr)."""
    p = stepped(mark_positive(double(2e-6, 1.0, 3e4)), [7.0, 1e-3, -2.0], Adam, lr=0.1, eps=0.0)
    assert p.tolist() == pytest.approx([2e-6 * math.exp(-0.1), math.exp(-0.1), 3e4 * math.exp(0.1)], rel=1e-12)


def test_unit_norm_by_hand():
    """At (1, 0) only the second entry of (3, 4) is tangent: (1, -2) / sqrt 5 for a rate of a half."""
    p = stepped(mark_unit_norm(double([1.0, 0.0])), [[3.0, 4.0]], lr=0.5)
    assert p[0].tolist() == pytest.approx([1 / 5**0.5, -2 / 5**0.5], rel=1e-14)


def test_unit_norm_divides_when_marked():
    p = mark_unit_norm(double([3.0, 0.6], [4.0, 0.8]), dim=1)
    torch.testing.assert_close(p.detach(), torch.tensor([[0.6, 0.6], [0.8, 0.8]], dtype=torch.float64))


def test_spectral_by_hand():
    """diag(0.9, 0.2) + diag(0.5, 0.1): the first singular value is cut off, the second is not touched."""
    p = stepped(mark_spectral(double([0.9, 0.0], [0.0, 0.2])), [[-1.0, 0.0], [0.0, -0.2]], lr=0.5)
    torch.testing.assert_close(p, torch.tensor([[1.0, 0.0], [0.0, 0.3]], dtype=torch.float64), rtol=0, atol=1e-14)


def test_spectral_cuts_off_when_marked():
    p = mark_spectral(double([0.0, -5.0], [0.5, 0.0]), 2.0)
    torch.testing.assert_close(p.detach(), torch.tensor([[0.0, -2.0], [0.5, 0.0]], dtype=torch.float64))


def test_a_transposed_convolution_has_its_rows_along_dim_1():
    for layer, dim in ((nn.Conv2d(3, 5, 2), 0), (nn.ConvTranspose2d(3, 5, 2), 1)):
        weight = mark_spectral(nn.Sequential(layer), "0.weight", 0.3)
        sigma = torch.linalg.matrix_norm(weight.detach().movedim(dim, 0).flatten(1), 2)
        assert sigma == pytest.approx(0.3, rel=1e-5)


def test_zero_is_not_positive():
    error = Positive().error(torch.tensor([1e-30, 0.0, -0.5, torch.inf, torch.nan]))
    assert float(error[0]) == 0 < float(error[1])
    assert float(error[2]) == pytest.approx(0.5)
    assert bool(error[3:].isnan().all())


@pytest.mark.parametrize("length", [1e12, 1e20, 1e30])
def test_a_step_too_long_to_be_squared_leaves_the_norm_at_one(length):
    x = points(CASES["unit rows"]).float()
    end = UnitNorm().retract(x, length * gaussian(*x.shape, dtype=torch.float32))
    assert float(UnitNorm().error(end).max()) <= UnitNorm().tolerance(end)


@pytest.mark.parametrize("shape", [(2, 100_000), (100_000, 2)])
def test_long_slices_keep_their_norm(shape):
    """The norm of n numbers is known to rounding, not to the square root of n roundings, however they lie."""
    p = mark_unit_norm(nn.Parameter(gaussian(*shape, dtype=torch.float32)), dim=shape.index(2))
    opt = Adam([p], lr=0.1)
    for seed in range(3):
        p.grad = gaussian(*shape, dtype=torch.float32, seed=seed)
        opt.step()
        assert opt.metrics()["manifold_error"] < 4 * torch.finfo(torch.float32).eps
