"""Other manifolds than Stiefel's: gradients that are none, rates of any size, values written from outside."""

import copy
import itertools
import math
from dataclasses import dataclass

import geoopt
import pytest
import torch
from torch import nn

from manifold_opt import (
    SGD,
    Adam,
    Manifold,
    check,
    constraint_of,
    mark_manifold,
    mark_orthogonal,
    mark_positive,
    mark_spectral,
    mark_unit_norm,
    unmark,
)
from manifold_opt import project_to_manifold_ as project_model
from manifold_opt.manifolds import Positive, Spectral, UnitNorm
from manifold_opt.manifolds.layout import get_points

from ..helpers import UNMOVED, each, gaussian, never_read
from ..optim.test_faults import assert_unchanged, everything
from ..reference.cases import CASES, parameter
from .test_manifold_steps import OTHERS, OWN, build, give, run

FAULTS = [float("nan"), float("inf"), -float("inf"), 1e30]
POISONED = ["sgd", "momentum", "nesterov", "amsgrad", "block", "adamw"]


def points_in(p, tensor):
    (part,) = constraint_of(p).layouts(p.shape)
    return get_points(part, tensor)


def picture(opt, parameters):
    """Every point of every parameter with its moments, along one dimension."""
    (part,) = constraint_of(parameters[0]).layouts(parameters[0].shape)
    rows = [points_in(p, p.detach()).flatten(0, -1 - part.point_ndim).clone() for p in parameters]
    seen = [torch.cat(rows)]
    for key in opt.state[parameters[0]]:
        moments = [opt.state[p][key] for p in parameters]
        if key not in UNMOVED and moments[0] is not None:
            same = moments[0].shape == parameters[0].shape
            pieces = [points_in(p, m) if same else m for p, m in zip(parameters, moments, strict=True)]
            seen.append(torch.cat([m.flatten(0, -1 - part.point_ndim).clone() for m in pieces]))
    return seen


@each({"rule, fault": itertools.product(POISONED, FAULTS)}, name=OTHERS)
def test_a_poisoned_point_stays_and_its_neighbours_do_not_notice(name, rule, fault):
    """The first entry of the first point of three parameters, from the third step on; and it is counted."""
    assert_poison_is_contained(name, rule, fault)


@each(rule=POISONED, name=OWN)
def test_a_poisoned_point_is_contained_without_reading_values(name, rule, monkeypatch):
    never_read(monkeypatch)
    assert_poison_is_contained(name, rule, torch.nan)


def assert_poison_is_contained(name, rule, fault):
    def trained(poisoned):
        ps = [parameter(OTHERS[name], torch.float32, seed=k) for k in range(3)]
        opt = build(rule, ps)
        held = None
        for step in range(4):
            give(ps, step)
            if poisoned and step >= 2:
                held = held or picture(opt, ps)
                ps[0].grad.view(-1)[0] = fault
            opt.step()
        return picture(opt, ps), held, opt.metrics()["skipped_blocks"]

    clean, _, none = trained(False)
    dirty, before, counted = trained(True)
    assert (none, counted) == (0, 2)
    for now, then, expected in zip(dirty, before, clean, strict=True):
        assert torch.equal(now[0], then[0])
        assert torch.equal(now[1:], expected[1:])


@each(name=OTHERS, rule=["momentum", "adamw"])
def test_a_fault_can_be_made_an_error_that_changes_nothing(name, rule):
    marked = parameter(OTHERS[name], torch.float32)
    params = [nn.Parameter(torch.ones(3)), marked]
    opt = run(rule, params, 2, nonfinite="raise")
    give(params, 5)
    marked.grad.view(-1)[0] = torch.nan
    before = everything(opt)
    with pytest.raises(
        FloatingPointError, match=r"(point|slice) 0 of a marked parameter of shape .*Nothing was changed"
    ):
        opt.step()
    assert_unchanged(opt, before)
    run(rule, params, 1, opt=opt)


@each(
    {"rule, exponent": itertools.product(["sgd", "momentum", "amsgrad", "adamw"], [-12, -6, -2, 0, 3, 6])}, name=OTHERS
)
def test_any_learning_rate_is_survived(name, rule, exponent):
    """Values and moments stay finite, and on the manifold where it is one of the package's own."""
    p = parameter(OTHERS[name], torch.float32)
    opt = run(rule, [p], 8, lr=10.0**exponent)
    assert bool(p.isfinite().all())
    assert all(bool(value.isfinite().all()) for value in opt.state[p].values())
    if name in OWN:
        assert check(nn.ParameterList([p]), opt) == []
    if exponent <= 0 and rule != "adamw" and name in OWN:
        assert opt.metrics()["skipped_blocks"] == 0


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e-8, 1e15])
@pytest.mark.parametrize("name", ["unit rows", "spectral wide", "positive vector"])
def test_gradients_of_any_size(name, scale):
    p = parameter(OWN[name], torch.float32)
    opt = build("adam", [p])
    for step in range(4):
        give([p], step, scale)
        opt.step()
    assert bool(p.isfinite().all())
    assert check(nn.ParameterList([p]), opt) == []


def test_decay_beyond_all_there_is_keeps_a_number_positive():
    """Decoupled, at lr * weight_decay of 1 and 50; the momentum in log x is carried along, not blown up."""
    for rate in (1.0, 50.0):
        p = mark_positive(nn.Parameter(torch.tensor([3.0, 0.1])))
        opt = build("adamw", [p], lr=rate, weight_decay=1.0, maximize=False)
        for step in range(5):
            give([p], step)
            opt.step()
        assert bool((p > 0).all())
        assert bool(p.isfinite().all())
        assert opt.metrics()["skipped_blocks"] == 0


def test_half_a_decay_a_step_does_not_feed_the_momentum():
    """In log x the momentum of a zero gradient dies out by beta1 a step, whatever the decay."""
    p = mark_positive(nn.Parameter(torch.tensor([1.0], dtype=torch.float64)))
    opt = build("adamw", [p], lr=1e-3, weight_decay=500.0, maximize=False)
    p.grad = torch.ones_like(p)
    opt.step()
    first = float(opt.state[p]["exp_avg"])
    for _ in range(3):
        p.grad = torch.zeros_like(p)
        opt.step()
    assert float(opt.state[p]["exp_avg"]) == pytest.approx(first * 0.9**3, rel=1e-12)


@dataclass(frozen=True)
class Wary(Manifold):
    """The plane, with a gradient that squares, and a retraction that takes no NaN."""

    point_ndim = 1

    def riemannian_gradient(self, x, g):  # noqa: ARG002
        return g * g * 1e8

    def project_tangent(self, x, d):  # noqa: ARG002
        return d

    def retract(self, x, v):
        if not bool(v.isfinite().all()):
            raise AssertionError("was given what is no tangent")
        return x + v

    def project_point(self, x):
        return x

    def error(self, x):
        return 0 * x.double().sum(-1)


def test_a_gradient_that_overflows_in_the_metric_goes_no_further():
    p = mark_manifold(nn.Parameter(torch.zeros(2, 3)), Wary())
    opt = build("adam", [p])
    p.grad = torch.tensor([[1.0, 1.0, 1.0], [1e17, 1.0, 1.0]])
    opt.step()
    assert bool((p[0] != 0).all())
    assert torch.equal(p[1], torch.zeros(3))
    assert torch.equal(opt.state[p]["exp_avg"][1], torch.zeros(3))
    assert opt.metrics()["skipped_blocks"] == 1
    opt.param_groups[0]["nonfinite"] = "raise"
    with pytest.raises(FloatingPointError, match=r"point 1 .*\(2, 3\) overflows in the coordinates of its moments"):
        opt.step()


def test_a_gradient_that_overflows_beside_a_large_number_can_be_made_an_error():
    p = mark_manifold(nn.Parameter(torch.tensor([1.0, 1e15])), Positive())
    opt = build("adam", [p])
    opt.param_groups[0]["nonfinite"] = "raise"
    p.grad = torch.tensor([1e15, 1.0])
    opt.step()
    before = everything(opt)
    p.grad = torch.tensor([1.0, 1e15])
    with pytest.raises(FloatingPointError, match=r"point 1 .*\(2,\) overflows in the coordinates of its moments"):
        opt.step()
    assert_unchanged(opt, before)


# Low precision.


@pytest.mark.parametrize("name", [name for name in OTHERS if name != "geoopt spd"])
def test_bfloat16_is_the_rounding_of_a_run_in_float32(name):
    case = OTHERS[name]
    low = parameter(case, torch.float32).detach().bfloat16()
    low = mark_manifold(nn.Parameter(low), case.manifold)
    opt = build("adam", [low], lr=1e-3)
    give([low], 0, 0.0)
    opt.step()
    twin = mark_manifold(nn.Parameter(opt.state[low]["master"].clone()), case.manifold)
    other = build("adam", [twin], lr=1e-3)
    give([twin], 0, 0.0)
    other.step()
    for step in range(1, 30):
        give([low], step)
        twin.grad = low.grad.float()
        opt.step()
        other.step()
    torch.testing.assert_close(opt.state[low]["master"], twin.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(low, opt.state[low]["master"].bfloat16())
    assert check(nn.ParameterList([low]), opt) == []


def test_positive_numbers_are_refused_in_float16():
    """Where they would be zero."""
    with pytest.raises(ValueError, match=r"mark_positive: the parameter has dtype torch.float16.*bfloat16 or float32"):
        mark_positive(nn.Parameter(torch.ones(3, dtype=torch.float16)))
    layer = nn.Module()
    layer.scale = mark_positive(nn.Parameter(torch.ones(3)))
    opt = Adam(layer.parameters())
    layer.half()
    layer.scale.grad = torch.ones(3, dtype=torch.float16)
    assert any("cannot be kept on Positive()" in problem for problem in check(layer, opt))
    with pytest.raises(ValueError, match=r"Adam: a marked parameter of shape \(3,\) has dtype torch.float16"):
        opt.step()
    assert torch.equal(layer.scale, torch.ones(3, dtype=torch.float16))


# Values written from outside.


@pytest.mark.filterwarnings("ignore:A block of shape")
@each(retraction=["polar", "orthogonalizer"], name=[name for name in OTHERS if "positive" not in name])
def test_a_value_from_outside_is_put_back(name, retraction):
    """Whatever the retraction of orthogonal blocks in the same group, one that is inexact too."""
    case = OTHERS[name]
    p = parameter(case)
    opt = build("momentum", [p], retraction=retraction)
    run("momentum", [p], 2, opt=opt)
    with torch.no_grad():
        p.copy_(case.leave(p))
    opt.param_groups[0]["lr"] = 0.0
    give([p], 3)
    opt.step()
    points = points_in(p, p.detach())
    assert float(case.manifold.error(points).max()) <= case.manifold.tolerance(points)


@pytest.mark.parametrize("name", OTHERS)
def test_a_value_that_cannot_be_put_back_is_an_error_that_changes_nothing(name):
    p = parameter(OTHERS[name], torch.float32)
    opt = run("momentum", [p], 2)
    with torch.no_grad():
        p.view(-1)[0] = torch.nan
    before = everything(opt)
    give([p], 3)
    with pytest.raises(ValueError, match=r"SGD: a marked parameter of shape .* has been written to: .*finite"):
        opt.step()
    with torch.no_grad():
        p.view(-1)[0] = before[0][0].view(-1)[0] = 1.0  # a NaN equals nothing
    assert_unchanged(opt, before)


def test_negative_numbers_have_no_nearest_point():
    scale = nn.Module()
    scale.rate = mark_positive(nn.Parameter(torch.tensor([1.0, 2.0])))
    opt = SGD(scale.parameters(), lr=0.1)
    with torch.no_grad():
        scale.rate[1] = -3.0
    assert [p.split(":")[0] for p in check(scale, opt)] == ["rate cannot be kept on Positive()"]
    with pytest.raises(ValueError, match=r"not positive and finite.* such as -3.*clamp_ or .*softplus"):
        project_model(scale)
    assert scale.rate.tolist() == [1.0, -3.0]


@pytest.mark.parametrize(
    ("make", "leave"),
    [
        (lambda p: mark_unit_norm(p), lambda p: p.mul_(1.5)),
        (lambda p: mark_spectral(p, 0.5), lambda p: p.mul_(3)),
    ],
)
def test_project_puts_back_and_check_says_so(make, leave):
    net = nn.Module()
    net.weight = make(nn.Parameter(gaussian(4, 6)))
    opt = Adam(net.parameters())
    with torch.no_grad():
        leave(net.weight)
    assert check(net, opt) == [
        f"weight is not on {constraint_of(net.weight)} to rounding: project_to_manifold_(model) puts it back, and "
        "so does the next step."
    ]
    project_model(net)
    assert check(net, opt) == []


def test_metrics_of_points():
    """By hand: a norm of 1.5, an entry of -1; the tangent of (3, 4) at (1, 0) is 4 long; an x^2 g of 8."""
    unit, positive = mark_unit_norm(nn.Parameter(torch.eye(2))), mark_positive(nn.Parameter(torch.full((1,), 2.0)))
    ball = mark_spectral(nn.Parameter(torch.eye(2)), 2.0)
    opt = SGD([unit, positive, ball])
    assert opt.metrics()["manifold_error"] == 0
    unit.grad = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    assert opt.metrics()["tangent_norm"] == pytest.approx(4)
    positive.grad = torch.full((1,), 2.0)
    assert opt.metrics()["tangent_norm"] == pytest.approx(8)
    with torch.no_grad():
        unit[0].mul_(1.5)
        assert opt.metrics()["manifold_error"] == pytest.approx(0.5)
        positive.fill_(-1)
        assert opt.metrics()["manifold_error"] == pytest.approx(1)
        ball.mul_(6)  # three times its bound: off by two of it
        assert opt.metrics()["manifold_error"] == pytest.approx(2)
    assert math.isnan(opt.metrics()["orthogonality_error"])  # of no parameter


def test_the_cases_are_of_every_kind():
    kinds = {type(case.manifold) for case in CASES.values()}
    assert {UnitNorm, Spectral, Positive} <= kinds
    assert copy.deepcopy(CASES["unit rows"].manifold) == CASES["unit rows"].manifold


# What a review of the common step path found.


def test_a_step_that_is_not_a_number_is_skipped_and_counted():
    """Adam with eps=0 and a zero gradient: zero over zero. The other entry moves as it would alone."""
    p, alone = (mark_positive(nn.Parameter(torch.tensor(x))) for x in ([1.0, 2.0], [2.0]))
    opt, other = Adam([p], lr=0.1, eps=0.0), Adam([alone], lr=0.1, eps=0.0)
    p.grad, alone.grad = torch.tensor([0.0, 1.0]), torch.tensor([1.0])
    opt.step()
    other.step()
    assert torch.equal(p, torch.stack([torch.tensor(1.0), alone.detach()[0]]))
    assert opt.metrics()["skipped_blocks"] == 1


@pytest.mark.parametrize("reads", [True, False])
def test_a_point_that_float16_cannot_hold_is_left(reads, monkeypatch):
    if not reads:
        never_read(monkeypatch)
    start = torch.tensor([[6e4, 0.0], [0.0, 6e4]], dtype=torch.float16)
    p = mark_spectral(nn.Parameter(start.clone()), bound=1e5)
    opt = SGD([p], lr=3e4)
    p.grad = -torch.ones(2, 2, dtype=torch.float16)
    opt.step()
    assert torch.equal(p, start)
    assert torch.equal(opt.state[p]["master"], start.float())
    assert opt.metrics()["skipped_blocks"] == 1


@pytest.mark.parametrize("reads", [True, False])
def test_a_normal_gradient_beyond_the_limit_is_a_fault(reads, monkeypatch):
    """Its tangent part is the rounding of a projection, and passes the limit."""
    if not reads:
        never_read(monkeypatch)
    p = mark_unit_norm(nn.Parameter(gaussian(2, 50, dtype=torch.float32)))
    start, opt = p.detach().clone(), Adam([p], lr=0.1)
    p.grad = start * torch.tensor([[1e20], [1.0]])
    opt.step()
    assert torch.equal(p[0], start[0])
    assert not opt.state[p]["exp_avg"][0].any()
    assert opt.metrics()["skipped_blocks"] == 1


def test_rows_with_one_large_entry_stay_on_the_manifold():
    """torch's norm sums them with an error that grows with their length."""
    for n in (512, 513, 4090):
        x = torch.rand(60, n, generator=torch.Generator().manual_seed(0))
        x[:, 0] = 50 * (1 + x[:, 0])
        p = mark_unit_norm(nn.Parameter(x))
        opt = SGD([p], lr=1.0)
        for step in range(4):
            p.grad = 1e-3 * gaussian(60, n, dtype=torch.float32, seed=step)
            opt.step()
        assert float(UnitNorm().error(p.detach()).max()) <= UnitNorm().tolerance(p.detach())
        before, p.grad = p.detach().clone(), torch.zeros_like(p)
        opt.step()
        assert torch.equal(p, before)


@pytest.mark.parametrize("make", [mark_unit_norm, mark_spectral], ids=["unit norm", "spectral"])
def test_a_step_that_a_scaler_skips_counts_nothing(make, monkeypatch):
    """In the first one Adam's bias correction is zero."""
    never_read(monkeypatch)
    p = make(nn.Parameter(gaussian(4, 5, dtype=torch.float32)))
    start, opt = p.detach().clone(), Adam([p], lr=0.1)
    opt.grad_scale, opt.found_inf = torch.tensor(2.0), torch.tensor(1.0)
    for _ in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
    assert torch.equal(p, start)
    assert opt.metrics()["skipped_blocks"] == 0


def test_a_step_below_the_root_of_the_smallest_number_is_taken():
    p = mark_spectral(nn.Parameter(torch.zeros(3, 4)))
    p.grad = torch.full((3, 4), 1e-30)
    SGD([p], lr=1.0).step()
    assert torch.equal(p, -p.grad)


@dataclass(frozen=True)
class Level(Manifold):
    """Vectors of equal entries, whose tangents are views with stride zero."""

    point_ndim = 1

    def riemannian_gradient(self, x, g):  # noqa: ARG002
        return g.mean(-1, keepdim=True).expand_as(g)

    def retract(self, x, v):
        return x + v

    def project_point(self, x):
        return x.mean(-1, keepdim=True).expand_as(x).clone()

    def error(self, x):
        return (x.double() - x.double().mean(-1, keepdim=True)).abs().amax(-1)


@pytest.mark.parametrize("rule", ["momentum", "adam"])
def test_tangents_may_be_expanded(rule, monkeypatch):
    never_read(monkeypatch)
    p = mark_manifold(nn.Parameter(torch.ones(2, 3)), Level())
    opt = build(rule, [p], lr=0.1)
    opt.grad_scale, opt.found_inf = torch.tensor(1.0), torch.tensor(0.0)
    p.grad = gaussian(2, 3, dtype=torch.float32)
    opt.step()
    assert float(Level().error(p.detach()).max()) < 1e-6
    assert not torch.equal(p, torch.ones(2, 3))


def test_a_subclass_that_changes_the_geometry_is_followed():
    @dataclass(frozen=True)
    class Below(Positive):
        def retract(self, x, v):
            return super().retract(x, v).clamp_max(2.0)

    @dataclass(frozen=True)
    class Still(UnitNorm):
        def riemannian_gradient(self, x, g):  # noqa: ARG002
            return 0 * g

    below, still = (
        mark_manifold(nn.Parameter(x), manifold) for x, manifold in ((torch.ones(3), Below()), (torch.eye(3), Still()))
    )
    opt = SGD([below, still], lr=5.0)
    below.grad, still.grad = -torch.ones(3), torch.ones(3, 3)
    opt.step()
    assert torch.equal(below, torch.full((3,), 2.0))
    assert torch.equal(still, torch.eye(3))


def test_moments_that_need_no_conversion_survive_a_value_without_a_nearest_point():
    p = mark_orthogonal(nn.Parameter(gaussian(2, 4, dtype=torch.float32)))
    opt = Adam([p], lr=0.01)
    p.grad = gaussian(2, 4, dtype=torch.float32, seed=1)
    opt.step()
    unmark(p)
    p.data.zero_()
    opt.step()
    assert float(opt.state[p]["step"]) == 2


def test_a_number_per_point_is_known_with_several_batch_dimensions():
    p = mark_manifold(nn.Parameter(nn.functional.normalize(gaussian(2, 3, 5), dim=-1)), geoopt.Sphere())
    opt = Adam([p], lr=0.1, second_moment="block")
    for _ in range(2):
        p.grad = torch.ones_like(p)
        opt.step()
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
    assert float(opt.state[p]["step"]) == 2
