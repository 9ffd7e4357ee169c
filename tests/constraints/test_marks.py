"""mark_unit_norm, mark_spectral, mark_positive, mark_manifold: what they refuse, with a remedy, before they write."""

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from manifold_opt import (
    Adam,
    Manifold,
    Orthogonal,
    check,
    constraint_of,
    mark_manifold,
    mark_orthogonal,
    mark_positive,
    mark_spectral,
    mark_unit_norm,
    unmark,
)
from manifold_opt.manifolds import Positive, Spectral, UnitNorm
from manifold_opt.manifolds.layout import SliceLayout

from ..helpers import each, gaussian, held_under


def weight(*shape, dtype=torch.float32):
    return nn.Parameter(gaussian(*shape, dtype=dtype))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.up = nn.ConvTranspose1d(2, 3, 2)


ANY = {
    "mark_unit_norm": mark_unit_norm,
    "mark_spectral": mark_spectral,
    "mark_positive": mark_positive,
    "mark_manifold": lambda target, *name: mark_manifold(target, *name, UnitNorm()),
}


@each(
    {
        "arguments, message": [
            (lambda: (Net(),), "a module needs the name of its parameter"),
            (lambda: (Net(), "nosuch"), r"Net has no parameter 'nosuch'; it has linear.weight, linear.bias, up.weight"),
            (lambda: (Net(), "nosuch.weight"), r"Net has no parameter 'nosuch.weight'; it has linear.weight"),
            (lambda: (Net(), "linear"), "Net has no parameter 'linear'; it has"),
            (lambda: ("weight",), r"must be a tensor or a module, got str"),
            (lambda: (weight(3, 4) * 2,), "is not a leaf"),
            (lambda: (torch.ones(3, 4),), r"neither an nn.Parameter nor a tensor that requires a gradient"),
            (
                lambda: (nn.Parameter(torch.ones(3, 4, dtype=torch.int32), requires_grad=False),),
                "has dtype torch.int32",
            ),
            (lambda: (nn.Parameter(torch.eye(3).to_sparse()),), r"is sparse .*only dense parameters can be marked"),
            (lambda: (nn.Parameter(torch.empty(0, 4)),), "is empty"),
            (lambda: (nn.Parameter(torch.ones(1, 4).expand(3, 4)),), r"share memory, or could; use .clone\(\) first"),
            (lambda: (nn.UninitializedParameter(),), "is lazy and has no shape yet; run one batch"),
            (lambda: (mark_orthogonal(weight(3, 4)),), r"is already marked as Orthogonal\(.*\), not .*; call unmark"),
            (lambda: (nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)), "weight"), "is parametrized"),
            (lambda: (nn.Parameter(torch.full((3, 4), torch.nan)),), "finite"),
        ]
    },
    function=ANY,
)
def test_what_every_mark_function_refuses(function, arguments, message):
    given = arguments()
    before = copy.deepcopy(given[0]) if isinstance(given[0], nn.Module) else None
    with pytest.raises(ValueError, match=f"^{function}: .*{message}"):
        ANY[function](*given)
    if isinstance(given[0], nn.Module):
        assert all(torch.equal(a, b) for a, b in zip(given[0].parameters(), before.parameters(), strict=True))
        assert all(constraint_of(p) is None for p in given[0].parameters())


def spoilt(value):
    p = weight(3, 4)
    with torch.no_grad():
        p.abs_()[1] = value
    return p


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda p: mark_unit_norm(p, "weight"),
            r"mark_unit_norm: a tensor takes no name; give mark_unit_norm\(param\)",
        ),
        (lambda p: mark_unit_norm(p, dim=2), r"has shape \(3, 4\), and no slices along dim=2; give one of 0 to 1"),
        (lambda p: mark_unit_norm(p, dim=-1), r"no slices along dim=-1; give one of 0 to 1"),
        (lambda p: mark_unit_norm(p, dim=True), r"no slices along dim=True"),
        (
            lambda _: mark_unit_norm(weight(5)),
            r"single entries, never but 1 or -1. Give one vector a dimension .*Sphere",
        ),
        (
            lambda _: mark_unit_norm(spoilt(0)),
            r"a slice is zero .*Initialize it first, for example with torch.nn.init.normal_",
        ),
        (
            lambda p: mark_spectral(p, 0.0),
            r"needs a bound from 1e-12 to 1e\+12, got 0.0. 1.0 makes a layer 1-Lipschitz",
        ),
        (lambda p: mark_spectral(p, torch.nan), "needs a bound"),
        (lambda p: mark_spectral(p, bound=True), "needs a bound .*got True"),
        (lambda p: mark_spectral(p, "weight"), "needs a bound .*got 'weight'"),
        (lambda p: mark_spectral(p, "weight", 1.0), "a tensor takes no name"),
        (lambda _: mark_spectral(Net(), 0.5), "a module needs the name of its parameter"),
        (lambda p: mark_spectral(p, dim=2), r"rows cannot lie along dim=2; give one of 0 to 1"),
        (lambda _: mark_spectral(weight(5)), "must have at least 2 dimensions"),
        (lambda _: mark_spectral(weight(3, 4, dtype=torch.complex64)), "Spectral is for real parameters"),
        (lambda _: mark_positive(spoilt(0.0)), r"not positive and finite.* such as 0: .*clamp_"),
        (lambda _: mark_positive(spoilt(-2.5)), r"such as -2.5"),
        (lambda _: mark_positive(spoilt(torch.inf)), r"such as inf"),
        (lambda _: mark_positive(weight(3, dtype=torch.complex64)), "Positive is for real parameters"),
        (lambda p: mark_manifold(p), "needs a manifold.*got NoneType"),
        (lambda _: mark_manifold(Net(), "linear.weight"), "needs a manifold.*got NoneType"),
        (lambda p: mark_manifold(p, "weight", UnitNorm()), "a tensor takes no name"),
        (lambda p: mark_manifold(p, "sphere"), r"needs a manifold, as geoopt.Sphere\(\) is.*got str"),
        (lambda p: mark_manifold(p, UnitNorm), "got the class UnitNorm"),
        (lambda p: mark_manifold(p, Spectral(torch.tensor(1.0))), "Spectral is made of a Tensor; a checkpoint records"),
        (lambda p: mark_manifold(p, Orthogonal(blocks=2)), r"mark_manifold: .*blocks=2 must divide dim 0"),
    ],
)
def test_what_single_mark_functions_refuse(call, message):
    p = weight(3, 4)
    before = p.detach().clone()
    with pytest.raises(ValueError, match=message):
        call(p)
    assert torch.equal(p, before)
    assert constraint_of(p) is None


@dataclass(frozen=True)
class Cube(Manifold):
    """Entries in [-side, side]."""

    side: float = 1.0

    def riemannian_gradient(self, x, g):  # noqa: ARG002
        return g

    def retract(self, x, v):
        return (x + v).clamp(-self.side, self.side)

    def project_point(self, x):
        return self.retract(x, 0 * x)

    def error(self, x):
        return (x.double().abs() - self.side).clamp_min(0)


class Loose(Cube):
    """One that may change."""


@dataclass(frozen=True)
class Heavy(Cube):
    matrix: Any = None


def test_manifolds_of_ones_own():
    """Known by their class and what they are made of; those that a checkpoint cannot record are refused."""
    net = Net()
    p = mark_manifold(net, "linear.weight", Cube(0.125))
    opt = Adam(net.parameters(), lr=0.1)
    assert constraint_of(copy.deepcopy(net).linear.weight) == Cube(0.125) != Cube(0.25)
    p.grad = torch.ones(3, 4)
    opt.step()
    assert float(p.detach().abs().max()) <= 0.125
    assert held_under(opt, p) == ("Cube", 0.125)
    other = Net()
    mark_manifold(other.linear, "weight", Cube(0.25))
    with pytest.raises(ValueError, match=r"marked as Cube\(0.125\); here it is Cube\(side=0.25\)"):
        Adam(other.parameters()).load_state_dict(opt.state_dict())
    assert check(net, opt) == []
    for manifold, reason in ((Loose(), r"put @dataclass\(frozen=True\)"), (Heavy(1.0, torch.eye(2)), "of a Tensor")):
        with pytest.raises(ValueError, match=f"mark_manifold: {type(manifold).__name__} .*{reason}"):
            mark_manifold(weight(2, 2), manifold)


@dataclass(frozen=True)
class Pairs(Cube):
    point_ndim = 2


def test_what_a_manifold_says_of_its_points():
    assert Pairs().layouts((3, 4, 5)) == (SliceLayout(2),)
    with pytest.raises(ValueError, match=r"has shape \(3,\); a point of Pairs\(side=1.0\) has 2 dimensions"):
        mark_manifold(weight(3), Pairs())


def test_marked_again_is_as_it_was():
    p = mark_spectral(weight(3, 4), 0.5)
    before = p.detach().clone()
    assert mark_spectral(p, 0.5) is p
    assert torch.equal(p, before)
    with pytest.raises(ValueError, match=r"already marked as Spectral\(bound=0.5, dim=0\), not Spectral\(bound=0.6"):
        mark_spectral(p, 0.6)
    assert constraint_of(mark_spectral(unmark(p), 0.6)) == Spectral(0.6)


def test_values_on_it_keep_their_bits():
    unit = mark_unit_norm(weight(3, 4)).detach()
    ball = mark_spectral(weight(4, 6)).detach()
    numbers = gaussian(5).exp()
    for mark, value in ((mark_unit_norm, unit), (mark_spectral, ball), (mark_positive, numbers)):
        assert torch.equal(mark(nn.Parameter(value.clone())), value)


def test_what_is_returned_and_remembered():
    net = Net()
    assert mark_unit_norm(net, "linear.weight") is net.linear.weight
    assert constraint_of(net.linear.weight) == UnitNorm()
    assert constraint_of(mark_spectral(net, "up.weight", 0.5)) == Spectral(0.5, 1)
    assert (
        constraint_of(mark_spectral(weight(2, 3), 0.5))
        == Spectral(0.5)
        == constraint_of(mark_spectral(weight(2, 3), bound=0.5))
    )
    assert constraint_of(mark_positive(nn.Parameter(torch.tensor(2.0)))) == Positive()
    net.linear.weight = nn.Parameter(torch.ones(3, 4))
    lost = check(net, torch.optim.Adam(net.parameters()))
    assert any("linear.weight has lost its constraint UnitNorm(dim=0)" in p for p in lost)
    assert any("does not keep it on Spectral" in p for p in check(net, torch.optim.Adam(net.parameters())))
