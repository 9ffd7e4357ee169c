"""Blocks that keep the singular values they were marked with: W = Q W0, against a loop that knows Q only."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from manifold_opt import (
    SGD,
    Adam,
    AdamW,
    Muon,
    check,
    constraint_of,
    mark_fixed_spectrum,
    mark_orthogonal,
    orthogonality_error,
    spectrum_error,
    unmark,
)
from manifold_opt.manifolds import FixedSpectrum
from manifold_opt.manifolds.layout import get_points

from ..helpers import FIELDS, each, gaussian, never_read, pairs
from ..optim.test_faults import assert_unchanged, everything

SHAPES = [(4, 7), (7, 4), (5, 5), (1, 3)]
SIDES = ["left", "right", "both"]
MAKE = {
    "sgd": lambda params, **o: SGD(params, lr=0.05, **o),
    "momentum": lambda params, **o: SGD(params, lr=0.05, momentum=0.9, **o),
    "nesterov": lambda params, **o: SGD(params, lr=0.05, momentum=0.9, nesterov=True, **o),
    "adam": lambda params, **o: Adam(params, lr=0.05, **o),
    "amsgrad": lambda params, **o: AdamW(params, lr=0.05, amsgrad=True, **o),
}
if hasattr(torch.optim, "Muon"):
    MAKE["muon"] = lambda params, retraction=None: Muon(params, lr=0.05)  # noqa: ARG005  (it has its own)


def marked(*shape, dtype=torch.float64, seed=0, **options):
    return mark_fixed_spectrum(nn.Parameter(gaussian(*shape, dtype=dtype, seed=seed)), **options)


def points_of(p):
    (layout,) = constraint_of(p).layouts(p.shape)
    return get_points(layout, p.detach())


def train(params, opt, steps, first=0, scale=1.0):
    for k in range(first, first + steps):
        for index, p in enumerate(params):
            p.grad = scale * gaussian(*p.shape, dtype=p.dtype, seed=1000 * k + index)
        opt.step()


class Rotation:
    """One rotation of one matrix x, in float64: moments of A = G X^H, and Q <- expm(Omega) Q."""

    def __init__(self, k, name, like):
        self.q, self.m = torch.eye(k, dtype=like.dtype), torch.zeros(k, k, dtype=like.dtype)
        self.v, self.largest, self.name, self.count = torch.zeros_like(self.m), torch.zeros_like(self.m), name, 0

    def step(self, a):
        self.count += 1
        omega = self.direction(a)
        self.q = torch.linalg.matrix_exp(omega) @ self.q

    def direction(self, a):
        if self.name in ("sgd", "momentum", "nesterov"):
            mu = 0.0 if self.name == "sgd" else 0.9
            self.m = mu * self.m + a
            d = a + mu * self.m if self.name == "nesterov" else self.m
            return -0.05 * (d - d.mH) / 2
        if self.name == "muon":
            self.m = 0.95 * self.m + 0.05 * a
            m = 0.05 * a + 0.95 * self.m
            u, s, vh = torch.linalg.svd(m - m.mH)
            return -0.05 * (u[:, s > 1e-12] @ vh[s > 1e-12])
        self.m = 0.9 * self.m + 0.1 * a
        square = torch.complex(a.real**2, a.imag**2) if a.is_complex() else a**2
        self.v = 0.999 * self.v + 0.001 * square
        parts = [(self.m.real, self.v.real, 1), (self.m.imag, self.v.imag, -1)] if a.is_complex() else None
        if parts is None:
            return -0.05 * self.quotient(self.m - self.m.mT, self.v, "largest")
        real, imag = (
            self.quotient(m - sign * m.mT, v, f"largest{sign}") for m, v, sign in parts
        )  # of M - M^H: the real part is skew, the imaginary one symmetric
        return -0.05 * torch.complex(real, imag)

    def quotient(self, numerator, v, key):
        if self.name == "amsgrad":
            v = torch.maximum(v, vars(self).get(key, torch.zeros_like(v)))
            setattr(self, key, v)
        hat = (v / (1 - 0.999**self.count)).sqrt() + 1e-8
        return (numerator / (1 - 0.9**self.count) / torch.minimum(hat, hat.mT)).clamp(-1, 1)


def oracle(w0, gradients, name, side):
    """The end of a run of one matrix."""
    left = Rotation(w0.shape[0], name, w0) if side != "right" else None
    right = Rotation(w0.shape[1], name, w0) if side != "left" else None
    w = w0
    for g in gradients:
        a, b = g @ w.mH, g.mT @ w.conj()
        if left:
            left.step(a)
        if right:
            right.step(b)
        w = (left.q if left else torch.eye(w0.shape[0], dtype=w0.dtype)) @ w0
        w = w @ right.q.mT if right else w
    return w


@pairs(name=MAKE, shape=SHAPES, side=SIDES, dtype=FIELDS)
def test_against_a_loop_over_rotations(name, shape, side, dtype):
    weight = marked(*shape, dtype=dtype, side=side)
    w0, gradients = weight.detach().clone(), [gaussian(*shape, dtype=dtype, seed=50 + k) for k in range(12)]
    opt = MAKE[name]([weight], retraction="exp")
    for g in gradients:
        weight.grad = g.clone()
        opt.step()
    expected = oracle(w0, gradients, name, side)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-11 * float(w0.abs().max()))


@pairs(name=MAKE, side=SIDES, dtype=[torch.float32, torch.float64, torch.complex64])
def test_singular_values_stay_to_rounding(name, side, dtype):
    """After 200 steps the error is that of Q and of one product, some eps; it does not grow with the steps."""
    weight = marked(24, 16, dtype=dtype, side=side)
    before = torch.linalg.svdvals(weight.detach())
    train([weight], MAKE[name]([weight]), 200)
    after = torch.linalg.svdvals(weight.detach())
    assert float((after - before).abs().max() / before.max()) < 24 * torch.finfo(dtype).eps


@pytest.mark.parametrize("side", SIDES)
def test_the_tangent_norm_is_that_of_the_steepest_change(side):
    """By hand: of W = diag(3, 1) and G = e1 e2^T, the skew part of G W^T is 1/2 there, that of W^T G 3/2."""
    weight = mark_fixed_spectrum(nn.Parameter(torch.diag(torch.tensor([3.0, 1.0]))), side=side)
    weight.grad = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
    left, right = torch.tensor([[0.0, 0.5], [-1.5, 0.0]]), torch.tensor([[0.0, 4.5], [-1.5, 0.0]])
    expected = {"left": left, "right": right, "both": left + right}[side]
    assert Adam([weight]).metrics()["tangent_norm"] == pytest.approx(float(expected.norm()))


@pytest.mark.parametrize("rows", [64, 16])
def test_marking_changes_nothing_and_takes_the_shorter_side(rows):
    weight = nn.Parameter(gaussian(rows, 24, seed=3))
    before = weight.detach().clone()
    assert mark_fixed_spectrum(weight) is weight
    assert torch.equal(weight.detach(), before)
    assert constraint_of(weight) == FixedSpectrum(side="right" if rows == 64 else "left")
    Adam([weight])
    opt = Adam([weight])
    train([weight], opt, 1)
    assert opt.state[weight]["rotation"].shape == (1, min(rows, 24), min(rows, 24))


@each(
    {"shape, options": [
        ((12, 7), {"blocks": 3}), ((7, 12), {"blocks": 3, "dim": 1}), ((3, 4, 7), {"flatten": False}),
        ((8, 3, 2, 2), {}), ((12, 4), {"blocks": 3}),
    ]},
    side=SIDES,
    name=MAKE,
)  # fmt: skip
def test_blocks_are_separate_parameters(shape, options, side, name):
    together = marked(*shape, side=side, **options)
    single = [nn.Parameter(block.clone()) for block in points_of(together)]
    for p in single:
        mark_fixed_spectrum(p, side="left" if side == "right" else side)
    one, many = MAKE[name]([together]), MAKE[name](single)
    for k in range(8):
        together.grad = gaussian(*shape, seed=k)
        (layout,) = constraint_of(together).layouts(shape)
        for p, g in zip(single, get_points(layout, together.grad), strict=True):
            p.grad = g.clone()
        one.step()
        many.step()
    torch.testing.assert_close(points_of(together), torch.stack([p.detach() for p in single]), rtol=0, atol=1e-13)


@pairs(side=SIDES, dtype=[torch.float32, torch.bfloat16, torch.complex64], name=["momentum", *list(MAKE)[3:]])
def test_a_resumed_run_is_the_uninterrupted_one(side, dtype, name):
    weights = [marked(6, 4, dtype=dtype, seed=k, side=side) for k in range(3)]
    opt = MAKE[name](weights)
    train(weights, opt, 5)
    saved = copy.deepcopy((opt.state_dict(), [w.detach() for w in weights]))
    train(weights, opt, 5, first=5)
    again = [marked(6, 4, dtype=dtype, seed=9, side=side) for _ in range(3)]
    resumed = MAKE[name](again)
    with torch.no_grad():
        for w, value in zip(again, saved[1], strict=True):
            w.copy_(value)
    resumed.load_state_dict(saved[0])
    train(again, resumed, 5, first=5)
    for w, v in zip(weights, again, strict=True):
        assert torch.equal(w, v)
        assert all(torch.equal(value, resumed.state[v][key]) for key, value in opt.state[w].items())


@pytest.mark.parametrize("reads", [True, False])
@pairs(side=SIDES, name=MAKE)
def test_a_block_with_a_gradient_that_is_not_finite_stays(side, name, reads, monkeypatch):
    if not reads:
        never_read(monkeypatch)
    weight, twin = (marked(12, 5, blocks=3, side=side) for _ in range(2))
    opt, whole = MAKE[name]([weight]), MAKE[name]([twin])
    train([weight], opt, 2)
    train([twin], whole, 2)
    before = points_of(weight)[1].clone()
    state = {key: value.clone() for key, value in opt.state[weight].items()}
    for w, o in ((weight, opt), (twin, whole)):
        w.grad = gaussian(12, 5, seed=77)
        if w is weight:
            w.grad[5, 2] = math.nan
        o.step()
    assert torch.equal(points_of(weight)[1], before)
    assert torch.equal(opt.state[weight]["rotation"][1], state["rotation"][1])
    torch.testing.assert_close(points_of(weight)[[0, 2]], points_of(twin)[[0, 2]], rtol=0, atol=1e-13)
    assert opt.metrics()["skipped_blocks"] == 1
    assert all(bool(x.isfinite().all()) for x in opt.state[weight].values())


@pytest.mark.parametrize("reads", [True, False])
@pairs(side=SIDES, name=MAKE)
def test_a_gradient_that_overflows_in_the_frame_is_skipped(side, name, reads, monkeypatch):
    """G and W are in range, G W^T is not."""
    if not reads:
        never_read(monkeypatch)
    weight = marked(12, 5, blocks=3, side=side, dtype=torch.float32)
    with torch.no_grad():
        weight[4:8] *= 1e10
    before = points_of(weight).clone()
    opt = MAKE[name]([weight])
    weight.grad = gaussian(12, 5, dtype=torch.float32)
    weight.grad[4:8] *= 1e10
    opt.step()
    assert opt.metrics()["skipped_blocks"] == 1
    assert (points_of(weight) == before).all(-1).all(-1).tolist() == [False, True, False]


@pairs(side=SIDES, name=MAKE, dtype=[torch.float32, torch.bfloat16])
def test_a_gradient_that_overflows_in_the_frame_can_be_made_an_error(side, name, dtype):
    weight = marked(12, 5, blocks=3, side=side, dtype=dtype)
    with torch.no_grad():
        weight[4:8] *= 1e10
    opt = MAKE[name]([weight])
    opt.param_groups[0]["nonfinite"] = "raise"
    train([weight], opt, 2)
    before = everything(opt)
    weight.grad = gaussian(12, 5, dtype=dtype)
    weight.grad[4:8] *= 1e10
    message = r"the gradient of block 1 .*\(12, 5\) overflows in the coordinates of its moments.*Nothing was changed"
    with pytest.raises(FloatingPointError, match=message):
        opt.step()
    assert_unchanged(opt, before)
    module = nn.Module()
    module.weight = weight
    assert any("overflows in the coordinates" in problem for problem in check(module, opt))
    with torch.no_grad():
        weight[4:8] = math.nan
    with pytest.raises(ValueError, match="has been written to"):  # a value that is not finite is named itself
        opt.step()


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_each_rotation_that_is_shortened_is_counted(transposed, reads, monkeypatch):
    """For W = diag(s, 1) and G = e1 e2^T by lr / 2 on the left and lr s / 2 on the right; for e2 e1^T vice versa."""
    if not reads:
        never_read(monkeypatch)
    for s, lr, count in ((1.0, 0.1, 0), (100.0, 0.1, 1), (100.0, 10.0, 2)):
        value = torch.block_diag(torch.diag(torch.tensor([s, 1.0])), torch.eye(2))
        weight = mark_fixed_spectrum(nn.Parameter(value), side="both")
        weight.grad = torch.zeros(4, 4)
        weight.grad[(1, 0) if transposed else (0, 1)] = 1.0
        opt = SGD([weight], lr=lr, retraction="cayley_iterative")  # steps of at most 0.5, read or not
        opt.step()
        assert opt.metrics()["clamped_steps"] == count
        assert opt.metrics()["skipped_blocks"] == 0


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("side", SIDES)
def test_a_zero_gradient_keeps_the_bits(side, reads, monkeypatch):
    if not reads:
        never_read(monkeypatch)
    weight = marked(12, 5, blocks=3, side=side, dtype=torch.float32)
    opt = SGD([weight], lr=0.1)
    train([weight], opt, 3)
    before = points_of(weight).clone()
    weight.grad = gaussian(12, 5, dtype=torch.float32, seed=8)
    weight.grad[4:8] = 0
    opt.step()
    assert torch.equal(points_of(weight)[1], before[1])
    assert not torch.equal(points_of(weight)[0], before[0])


@pytest.mark.parametrize("rate", [1e6, 1e30])
@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_any_learning_rate_is_survived(name, rate):
    weight = marked(6, 4, dtype=torch.float32)
    before = torch.linalg.svdvals(weight.detach())
    opt = MAKE[name]([weight])
    opt.param_groups[0]["lr"] = rate
    train([weight], opt, 5)
    after = torch.linalg.svdvals(weight.detach())
    assert float((after - before).abs().max() / before.max()) < 1e-5


@pytest.mark.parametrize("reads", [True, False])
@pairs(side=SIDES, name=MAKE, way=["copy", "data", "bits"], dtype=[torch.float32, torch.bfloat16])
def test_a_value_from_outside_is_where_the_next_step_starts(side, name, way, dtype, reads, monkeypatch):
    """Its singular values are kept from then on, and of its neighbour those that it has."""
    if not reads:
        never_read(monkeypatch)
    weight, eps = marked(10, 4, blocks=2, side=side, dtype=dtype), torch.finfo(dtype).eps
    opt = MAKE[name]([weight])
    train([weight], opt, 3)
    new, kept = 3 * gaussian(5, 4, dtype=dtype, seed=40), torch.linalg.svdvals(points_of(weight)[1].float())
    if way == "copy":
        with torch.no_grad():
            weight[:5].copy_(new)
    elif way == "data":
        weight.data[:5].copy_(new)
    else:
        for state in opt.state.values():  # code that resets all tensors of a state
            state["rotation"].zero_()
            state["base"].fill_(math.nan)
        new = weight.detach()[:5].clone()
    opt.param_groups[0]["lr"] = 1e-4
    train([weight], opt, 1)
    distance = (weight.detach()[:5].float() - new.float()).norm() / new.float().norm()
    assert distance < 0.02
    opt.param_groups[0]["lr"] = 0.05
    train([weight], opt, 10)
    blocks = torch.linalg.svdvals(points_of(weight).float())
    tolerance = 16 * eps * float(new.float().norm())
    torch.testing.assert_close(blocks[0], torch.linalg.svdvals(new.float()), rtol=0, atol=tolerance)
    torch.testing.assert_close(blocks[1], kept, rtol=0, atol=tolerance)


@pytest.mark.compiled
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_starts_from_a_loaded_value():
    torch._dynamo.reset()
    weight = marked(6, 8, dtype=torch.float32)
    opt = Adam([weight], lr=torch.tensor(0.05))
    step = torch.compile(opt.step, backend="eager")
    weight.grad = gaussian(6, 8, dtype=torch.float32, seed=1)
    step()
    best = weight.detach().clone()
    for _ in range(8):
        step()
    with torch.no_grad():
        weight.copy_(best)
    opt.param_groups[0]["lr"].fill_(1e-6)
    step()
    assert float((weight.detach() - best).norm() / best.norm()) < 1e-4


def test_a_new_mark_keeps_the_singular_values_of_the_moment():
    weight = marked(6, 8)
    opt = Adam([weight], lr=0.01)
    train([weight], opt, 2)
    unmark(weight)
    with torch.no_grad():
        weight.mul_(1.05)
    mark_fixed_spectrum(weight)
    before = weight.detach().clone()
    train([weight], opt, 3)
    assert spectrum_error(weight, before) < 1e-14


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("fill", [0.0, math.nan])
def test_a_write_at_rounding_keeps_its_bits(fill, reads, monkeypatch):
    """Where the block does not move: no gradient without momentum, or one that is not finite with it."""
    if not reads:
        never_read(monkeypatch)
    weight = marked(5, 4, dtype=torch.float32)
    opt = SGD([weight], lr=0.1, momentum=0.0 if fill == 0 else 0.9)
    train([weight], opt, 2)
    with torch.no_grad():
        weight.mul_(1 + 2**-23)
    before = weight.detach().clone()
    weight.grad = torch.full_like(weight, fill)
    opt.step()
    assert torch.equal(weight.detach(), before)


def test_the_error_of_a_spectrum_by_hand():
    """Of the worse of two blocks, relative to the largest singular value of each."""
    weight = mark_fixed_spectrum(
        nn.Parameter(torch.cat([torch.diag(torch.tensor([4.0, 1.0])), torch.eye(2)])), blocks=2
    )
    start = torch.cat([torch.diag(torch.tensor([4.0, 2.0])), 2 * torch.eye(2)])
    assert spectrum_error(weight, start) == pytest.approx(0.5)
    assert spectrum_error(weight.detach().view(2, 2, 2), start.view(2, 2, 2)) == pytest.approx(0.5)
    assert math.isnan(spectrum_error(weight, start.log()))
    with pytest.raises(ValueError, match="two tensors of one shape"):
        spectrum_error(weight, start[:2])


def test_another_constraint_starts_with_new_moments_and_its_own_state():
    weight = marked(5, 4)
    opt = Adam([weight])
    train([weight], opt, 2)
    mark_orthogonal(unmark(weight))
    with pytest.warns(UserWarning, match="do not determine those of the gradient"):
        train([weight], opt, 1)
    assert not {"rotation", "base"} & set(opt.state[weight])
    assert orthogonality_error(weight) < 1e-12


def test_unmarking_hands_it_back_to_torch_with_new_moments():
    weight = marked(5, 4)
    opt = Adam([weight], lr=0.05)
    train([weight], opt, 3)
    unmark(weight)
    with pytest.warns(UserWarning, match="start anew"):
        train([weight], opt, 1)
    assert set(opt.state[weight]) == {"step", "exp_avg", "exp_avg_sq"}
    assert opt.state[weight]["exp_avg"].shape == (5, 4)


@pytest.mark.parametrize("side", SIDES)
def test_moments_of_torch_are_taken_over(side):
    """The mean of G becomes that of G W^T."""
    weight = nn.Parameter(gaussian(5, 4))
    opt = Adam([weight], lr=0.0)
    train([weight], opt, 3)
    m, w = opt.state[weight]["exp_avg"].clone(), weight.detach().clone()
    mark_fixed_spectrum(weight, side=side)
    g = gaussian(5, 4, seed=60)
    weight.grad = g.clone()
    opt.step()
    left, right = 0.9 * m @ w.mT + 0.1 * g @ w.mT, 0.9 * m.mT @ w + 0.1 * g.mT @ w
    expected = {"left": left, "right": right, "both": torch.cat([left.flatten(), right.flatten()])}[side]
    torch.testing.assert_close(opt.state[weight]["exp_avg"].squeeze(), expected)


def test_second_moment_of_a_block():
    weight = marked(12, 5, blocks=3)
    opt = Adam([weight], lr=0.05, second_moment="block")
    before = torch.linalg.svdvals(points_of(weight))
    train([weight], opt, 3)
    assert opt.state[weight]["exp_avg_sq"].shape == (3, 1, 1)
    torch.testing.assert_close(torch.linalg.svdvals(points_of(weight)), before)
    with pytest.raises(ValueError, match="use second_moment='element'"):
        train([marked(4, 3, side="both")], Adam([marked(4, 3, side="both")], second_moment="block"), 1)


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((5,), {}, "at least 2 dimensions"),
        ((5, 4), {"side": "up"}, "needs side to be one of left, right, both"),
        ((5, 4), {"blocks": 3}, "blocks=3 must be a whole number that divides 5"),
        ((5, 4, 3), {"dim": 1}, "stacked along dim 0, or dim 1 of a matrix"),
    ],
)
def test_what_cannot_be_marked_is_refused(shape, options, message):
    with pytest.raises(ValueError, match=message):
        marked(*shape, **options)


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        mark_fixed_spectrum(nn.Parameter(torch.full((3, 3), math.nan)))


@pytest.mark.compiled
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_is_one_graph(side):
    torch._dynamo.reset()
    counters.clear()
    weight, twin = (marked(6, 4, dtype=torch.float32, side=side) for _ in range(2))
    opt, eager = Adam([weight], lr=0.01), Adam([twin], lr=0.01)
    compiled = torch.compile(opt.step, backend="eager")
    for k in range(3):
        for p in (weight, twin):
            p.grad = gaussian(6, 4, dtype=torch.float32, seed=k)
        compiled()
        eager.step()
    assert not counters["graph_break"]
    torch.testing.assert_close(weight.detach(), twin.detach(), rtol=1e-5, atol=1e-5)
