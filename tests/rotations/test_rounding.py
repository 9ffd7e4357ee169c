"""Rounding to nearest, its gradient, and the error that it is expected to have."""

import pytest
import torch

from manifold_opt.rotations import RoundToNearest, round_linears_

from ..helpers import gaussian


def test_by_hand():
    rows = torch.tensor([[7.0, 3.4, -0.6, 0.2], [-14.0, 2.9, 3.1, 0.0]])
    assert RoundToNearest(4)(rows).tolist() == [[7, 3, -1, 0], [-14, 2, 4, 0]]
    assert RoundToNearest(4, group=2)(torch.tensor([[7.0, 3.4, -0.7, 0.2]])).tolist() == [
        [7, 3, pytest.approx(-0.7), pytest.approx(0.2)]
    ]


def test_a_row_of_zeros_stays():
    rows = torch.zeros(2, 4, requires_grad=True)
    RoundToNearest(3, clip=True)(rows).sum().backward()
    assert torch.equal(RoundToNearest(3)(rows), torch.zeros(2, 4))
    assert torch.equal(rows.grad, torch.ones(2, 4))


def test_the_gradient_is_that_of_the_identity():
    rows = gaussian(3, 8, dtype=torch.float32).requires_grad_()
    weight = gaussian(3, 8, dtype=torch.float32, seed=1)
    (RoundToNearest(4)(rows) * weight).sum().backward()
    assert torch.equal(rows.grad, weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_values_lie_on_the_grid(bits, dtype):
    """At most half a step from where they were, up to the rounding of the dtype."""
    rows = gaussian(20, 64, dtype=torch.float64).to(dtype)
    rounding = RoundToNearest(bits)
    rounded = rounding(rows)
    assert rounded.dtype == dtype
    assert max(len(row.unique()) for row in rounded) <= 2 * rounding.levels + 1
    step = rows.double().abs().amax(-1, keepdim=True) / rounding.levels
    slack = 4 * torch.finfo(dtype).eps * rounding.levels
    assert bool(((rounded.double() - rows.double()).abs() <= step * (0.5 + slack)).all())


@pytest.mark.parametrize("group", [None, 32])
def test_clipping_never_costs(group):
    rows = gaussian(50, 384, dtype=torch.float32)
    plain, clipped = ((RoundToNearest(4, group, clip)(rows) - rows).square().sum().item() for clip in (False, True))
    assert clipped < plain


@pytest.mark.parametrize("group", [None, 32])
def test_the_expected_error_is_the_error(group):
    """The norm of power 1000 of 384 entries is at most 0.6 % above the largest; the rest is chance."""
    rows = gaussian(200, 384, dtype=torch.float32)
    rounding = RoundToNearest(4, group)
    error = (rounding(rows) - rows).square().sum() / rows.square().sum()
    assert float(rounding.expected_error(rows, 1000.0)) == pytest.approx(float(error), rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"), [({"bits": 1}, "bits must be"), ({"bits": 4, "group": 0}, "group must")]
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        RoundToNearest(**options)


def test_a_group_that_does_not_fit():
    with pytest.raises(ValueError, match="group=3 must divide the length of the rows, 8"):
        RoundToNearest(4, group=3)(torch.ones(2, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "scale"), [(4, 1e-4), (8, 1e-2), (12, 1.0)])
def test_low_precision_rounds_as_float32_does(dtype, bits, scale):
    """The scale of a row of 1e-4 would be subnormal in float16; the result is rounded once, to eps / 2."""
    rows = (scale * gaussian(20, 64, dtype=torch.float32)).to(dtype)
    for rounding in (RoundToNearest(bits), RoundToNearest(bits, clip=True)):
        assert torch.equal(rounding(rows), rounding(rows.float()).to(dtype))
    with_zeros = torch.cat([rows, torch.zeros_like(rows[:1])]).requires_grad_()
    RoundToNearest(bits).expected_error(with_zeros).backward()
    assert bool(with_zeros.grad.isfinite().all())


def test_rounding_is_refused_before_a_layer_is_changed():
    net = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 6))
    before = [p.clone() for p in net.parameters()]
    tied = torch.nn.Sequential(torch.nn.Embedding(6, 8), torch.nn.Linear(8, 6))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match="group=4 must divide the inputs of 1, 6"):
        round_linears_(net, RoundToNearest(4, group=4))
    with pytest.raises(ValueError, match=r"skip has down, but the linear layers are named 0, 1\."):
        round_linears_(net, RoundToNearest(4), skip=("down",))
    with pytest.raises(ValueError, match=r"the model has no nn\.Linear"):
        round_linears_(torch.nn.Conv1d(2, 2, 1), RoundToNearest(4))
    with pytest.raises(ValueError, match="the weight of 1 is also that of an embedding"):
        round_linears_(tied, RoundToNearest(4))
    assert all(map(torch.equal, net.parameters(), before))


def test_inputs_are_rounded_once():
    net = torch.nn.Sequential(torch.nn.Linear(16, 4))
    for bits in (8, 2):
        round_linears_(net, RoundToNearest(8), inputs=RoundToNearest(bits))
    x = gaussian(5, 16, dtype=torch.float32)
    rounded = RoundToNearest(2)(x)
    assert torch.equal(net(x), torch.nn.functional.linear(rounded, net[0].weight, net[0].bias))


def test_inputs_are_rounded_until_the_hooks_are_removed():
    net = torch.nn.Sequential(torch.nn.Linear(16, 4), torch.nn.Linear(4, 4))
    x = gaussian(5, 16, dtype=torch.float32)
    handles = round_linears_(net, RoundToNearest(8), inputs=RoundToNearest(2), skip=("1",))
    assert len(handles) == 1
    assert torch.equal(net(x), net[1](torch.nn.functional.linear(RoundToNearest(2)(x), net[0].weight, net[0].bias)))
    handles[0].remove()
    assert torch.equal(net(x), net[1](torch.nn.functional.linear(x, net[0].weight, net[0].bias)))
