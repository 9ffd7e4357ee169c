"""Steps on other manifolds than Stiefel's: the oracle, torch's own, one by one or together, whatever the layout."""

import copy
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from manifold_opt import (
    SGD,
    Adam,
    AdamW,
    constraint_of,
    mark_manifold,
    mark_positive,
    mark_spectral,
    mark_unit_norm,
)
from manifold_opt.manifolds import Manifold, Orthogonal, Positive, Spectral, UnitNorm
from manifold_opt.manifolds.layout import get_points
from manifold_opt.optim.engine import bucket as buckets_module
from manifold_opt.optim.engine import grouping

from ..helpers import Memory, buckets_of, each, gaussian, never_read, pairs
from ..reference.cases import CASES, parameter
from ..reference.manifolds import Ball, Logarithm, Unit, descend

OTHERS = {name: case for name, case in CASES.items() if not isinstance(case.manifold, Orthogonal)}
OWN = {name: case for name, case in OTHERS.items() if not name.startswith("geoopt")}
CLASSES = {"sgd": SGD, "adam": Adam, "adamw": AdamW}

RATE = 0.03
RULES = {
    "sgd": ("sgd", {}),
    "momentum": ("sgd", {"momentum": 0.9}),
    "nesterov": ("sgd", {"momentum": 0.9, "nesterov": True}),
    "dampening": ("sgd", {"momentum": 0.8, "dampening": 0.5}),
    "maximize": ("sgd", {"momentum": 0.8, "maximize": True}),
    "L2": ("sgd", {"momentum": 0.5, "weight_decay": 0.3}),
    "adam": ("adam", {}),
    "adam L2": ("adam", {"weight_decay": 0.3}),
    "amsgrad": ("adam", {"amsgrad": True, "betas": (0.5, 0.7)}),
    "block": ("adam", {"second_moment": "block"}),
    "block amsgrad": ("adam", {"second_moment": "block", "amsgrad": True, "betas": (0.5, 0.7)}),
    "adamw": ("adamw", {"weight_decay": 0.3, "maximize": True}),
}


def build(rule, params, **options):
    name, given = RULES[rule]
    return CLASSES[name](params, **{"lr": RATE, **given, **options})


def give(parameters, step, scale=1.0):
    for index, p in enumerate(parameters):
        p.grad = scale * gaussian(*p.shape, dtype=p.dtype, seed=1000 + 100 * step + index)


def run(rule, parameters, steps=5, first=0, opt=None, **options):
    opt = opt or build(rule, parameters, **options)
    for step in range(first, first + steps):
        give(parameters, step)
        opt.step()
    return opt


GEOMETRIES = {
    UnitNorm: lambda _: Unit(),
    Spectral: lambda manifold: Ball(manifold.bound),
    Positive: lambda _: Logarithm(),
}


# Every rule on one shape of each geometry, every other shape with one rule.
SHAPES = ["unit rows", "spectral wide", "positive vector"]
ORACLE = [(name, rule) for name in SHAPES for rule in RULES]
ORACLE += [(name, "amsgrad") for name, case in OWN.items() if name not in SHAPES and type(case.manifold) in GEOMETRIES]


@pytest.mark.parametrize(("name", "rule"), ORACLE)
def test_steps_are_those_of_the_oracle(name, rule):
    case = OWN[name]
    p = parameter(case)
    (part,) = case.manifold.layouts(p.shape)
    begin = get_points(part, p.detach()).clone()
    run(rule, [p], 8)
    kind, options = RULES[rule]
    gradients = [get_points(part, gaussian(*p.shape, seed=1000 + 100 * step)) for step in range(8)]
    if isinstance(case.manifold, Positive):
        begin, gradients = begin.flatten(), [g.flatten() for g in gradients]
    end = get_points(part, p.detach()).reshape(begin.shape)
    for i, x in enumerate(begin):
        expected = descend(
            GEOMETRIES[type(case.manifold)](case.manifold),
            x,
            [g[i] for g in gradients],
            lr=RATE,
            rule="sgd" if kind == "sgd" else "adam",
            decoupled=kind == "adamw",
            **options,
        )
        # Eight steps of some ten operations each; clipping resolves singular values at the bound to fewer digits.
        torch.testing.assert_close(end[i], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rule", RULES)
def test_a_complex_point_steps_as_its_parts_do(rule):
    """A complex vector of norm one is a real one of twice the length, and every part has a second moment of its own."""
    p = mark_unit_norm(nn.Parameter(gaussian(3, 4, dtype=torch.complex128)))
    q = mark_unit_norm(nn.Parameter(torch.view_as_real(p.detach()).clone()))
    ours, theirs = build(rule, [p]), build(rule, [q])
    for step in range(5):
        give([q], step)
        p.grad = torch.view_as_complex(q.grad.clone())
        ours.step()
        theirs.step()
    torch.testing.assert_close(torch.view_as_real(p.detach()), q.detach(), rtol=1e-12, atol=1e-12)


TORCH = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


@pytest.mark.parametrize("rule", [rule for rule in RULES if "block" not in rule])
def test_inside_the_ball_a_step_is_torchs(rule):
    """With weight decay, L2 or decoupled, and everything else: the same to rounding."""
    p = mark_spectral(nn.Parameter(0.1 * gaussian(4, 6)), 1e3)
    q = nn.Parameter(p.detach().clone())
    name, options = RULES[rule]
    ours, theirs = CLASSES[name]([p], lr=0.05, **options), TORCH[name]([q], lr=0.05, **options)
    for step in range(20):
        give([p], step)
        q.grad = p.grad.clone()
        ours.step()
        theirs.step()
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-13)


@each(rule=RULES, name=OTHERS)
def test_neighbours_gradients_and_memory_are_left_alone(name, rule):
    """Unmarked parameters train with torch's bits; p.grad is not written to; a parameter stays where it is."""
    marked, plain = parameter(OTHERS[name], torch.float32), nn.Parameter(gaussian(3, 4, dtype=torch.float32))
    twin = nn.Parameter(plain.detach().clone())
    kind, options = RULES[rule]
    torchs = TORCH[kind]([twin], lr=RATE, **{k: v for k, v in options.items() if k != "second_moment"})
    opt = build(rule, [marked, plain])
    before = (marked.data_ptr(), marked.stride(), id(marked), constraint_of(marked))
    for step in range(4):
        give([marked, plain], step)
        twin.grad = plain.grad.clone()
        kept = [marked.grad.clone(), plain.grad.clone()]
        opt.step()
        torchs.step()
        assert torch.equal(plain, twin)
        assert torch.equal(marked.grad, kept[0])
        assert torch.equal(plain.grad, kept[1])
    assert before == (marked.data_ptr(), marked.stride(), id(marked), constraint_of(marked))
    assert opt.metrics()["manifold_error"] <= constraint_of(marked).tolerance(marked.detach()[None])


@each(rule=["momentum", "adam", "block"], name=OTHERS)
def test_a_zero_gradient_keeps_the_bits(name, rule):
    p = parameter(OTHERS[name], torch.float32)
    before = p.detach().clone()
    opt = build(rule, [p])
    for lr, scale in ((0.1, 0.0), (0.0, 1.0)):
        opt.param_groups[0]["lr"] = lr
        give([p], 1, scale)
        opt.step()
        assert torch.equal(p, before)


@each(rule=["momentum", "adam", "block", "adamw"], name=OTHERS)
def test_many_together_step_as_each_alone(name, rule):
    """To a few roundings of sums that torch orders by how many there are of them."""
    alone = [parameter(OTHERS[name], seed=k) for k in range(5)]
    together = [parameter(OTHERS[name], seed=k) for k in range(5)]
    opt = build(rule, together)
    for step in range(4):
        give(together, step)
        give(alone, step)
        opt.step()
        for index, p in enumerate(alone):
            run_one = p.__dict__.setdefault("_opt", build(rule, [p])) if step == 0 else p.__dict__["_opt"]
            assert run_one.param_groups[0]["params"][0] is alone[index]
            run_one.step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)
    assert len(buckets_of(opt)) == 1


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "transposed": lambda x: x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    "every other": lambda x: x.repeat_interleave(2, 1)[:, ::2],
}


@pairs(
    layout=LAYOUTS,
    count=[1, 3],
    name=["unit filters", "unit filters, transposed", "spectral filters, transposed", "spectral filters"],
)
def test_memory_formats(name, count, layout):
    """A parameter steps as a contiguous one does, and stays as it lies; so does one with such a gradient."""
    case = OWN[name]
    plain = [parameter(case, seed=k) for k in range(count)]
    laid = [parameter(case, seed=k) for k in range(count)]
    for p in laid:
        p.data = LAYOUTS[layout](p.data)
    strides = [p.stride() for p in laid]
    ours, theirs = build("adam", laid), build("adam", plain)
    for step in range(3):
        give(plain, step)
        for p, q in zip(laid, plain, strict=True):
            p.grad = LAYOUTS[layout](q.grad) if step else q.grad.clone()
        ours.step()
        theirs.step()
    assert strides == [p.stride() for p in laid]
    for p, q in zip(laid, plain, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in OWN if "filters" in name])
def test_moments_from_another_memory_format(name):
    """A checkpoint of contiguous parameters goes on in others."""
    plain, laid = parameter(OWN[name]), parameter(OWN[name])
    laid.data = LAYOUTS["channels last"](laid.data)
    opt, other = run("adam", [plain]), build("adam", [laid])
    state = copy.deepcopy(opt.state_dict())
    for entries in state["state"].values():
        entries.update({key: m.contiguous() for key, m in entries.items()})
    other.load_state_dict(state)
    with torch.no_grad():
        laid.copy_(plain)
    run("adam", [plain], first=5, opt=opt)
    run("adam", [laid], first=5, opt=other)
    torch.testing.assert_close(laid.detach(), plain.detach(), rtol=1e-12, atol=1e-12)


@each(name=OWN, rule=["momentum", "adam"])
def test_steps_without_reading_values_are_the_same(name, rule, monkeypatch):
    """Where the host looks at no value the steps are the same, to what an iteration resolves."""
    case = OWN[name]
    eager, blind = parameter(case), parameter(case)
    run(rule, [eager], 5)
    never_read(monkeypatch)
    run(rule, [blind], 5)
    torch.testing.assert_close(blind.detach(), eager.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rate", [torch.tensor(RATE), torch.tensor([RATE], dtype=torch.float64)], ids=["0-d", "1-d"])
@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_tensor_learning_rates(rule, rate):
    expected, given = ([parameter(case) for case in OWN.values()] for _ in range(2))
    run(rule, expected)
    run(rule, given, lr=rate, **({"capturable": True} if rule == "adamw" else {}))
    for p, q in zip(given, expected, strict=True):
        # float32 holds a rate to a roundoff of 6e-8, which five steps add up
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rule", ["momentum", "adamw"])
def test_the_scale_of_the_rate_of_orthogonal_blocks_does_not_act_on_other_manifolds(rule):
    plain, scaled = ([parameter(case) for case in OWN.values()] for _ in range(2))
    run(rule, plain)
    run(rule, scaled, orthogonal_lr_scale=0.3)
    for p, q in zip(plain, scaled, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("last", [0.0, 1.0])
def test_slices_whose_step_underflows_keep_their_bits_beside_any_other(last):
    """The square of 1e-30 is zero in float32, and so is the norm of the step."""
    p = mark_unit_norm(nn.Parameter(gaussian(64, 5, dtype=torch.float32)))
    before = p.detach().clone()
    p.grad = torch.full_like(p, 1e-30)
    p.grad[-1] = last * torch.arange(1.0, 6)
    SGD([p], lr=1.0).step()
    assert torch.equal(p[:-1], before[:-1])
    assert torch.equal(p[-1], before[-1]) == (last == 0)


@dataclass(frozen=True)
class Clamped(Manifold):
    """A cube whose retraction turns NaN into a corner."""

    point_ndim = 1

    def riemannian_gradient(self, x, g):  # noqa: ARG002
        return g

    def retract(self, x, v):
        return torch.where((x + v).abs() < 3, x + v, 3 * x.sign())

    def error(self, x):
        return (x.double().abs().amax(-1) - 3).clamp_min(0)

    def project_point(self, x):
        return x.clamp(-3, 3)


def test_a_step_that_is_not_a_number_moves_nothing_whatever_the_retraction_makes_of_it():
    p = mark_manifold(nn.Parameter(torch.tensor([[1.0, -2.0], [0.5, 1.0]])), Clamped())
    before = p.detach().clone()
    opt = SGD([p], lr=0.1)
    opt.param_groups[0]["lr"] = float("nan")
    p.grad = torch.ones_like(p)
    opt.step()
    assert torch.equal(p, before)
    opt.param_groups[0]["lr"] = 0.5
    opt.step()
    torch.testing.assert_close(p.detach(), before - 0.5)


def test_large_parameters_are_worked_on_in_pieces(monkeypatch):
    """And come out the same, but for the order of sums."""
    whole = [mark_unit_norm(nn.Parameter(gaussian(50, 20))), mark_positive(nn.Parameter(gaussian(50, 20).exp()))]
    parts = copy.deepcopy(whole)
    run("adam", whole)
    monkeypatch.setattr(buckets_module, "BATCH_BYTES", 2**9)
    monkeypatch.setattr(grouping, "SMALL_BYTES", 0)
    opt = run("adam", parts)
    assert all(len(list(bucket.chunks())) > 3 for bucket in buckets_of(opt))
    never_read(monkeypatch)  # as on an accelerator, where every piece costs the host a dozen kernels
    assert all(len(list(bucket.chunks())) <= 17 for bucket in buckets_of(opt))
    monkeypatch.undo()
    never_read(monkeypatch)
    assert all(len(list(bucket.chunks())) == 1 for bucket in buckets_of(opt))
    for p, q in zip(parts, whole, strict=True):
        torch.testing.assert_close(p.detach(), q.detach(), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("rule", "make", "limit"),
    [
        ("amsgrad", lambda: mark_unit_norm(nn.Parameter(gaussian(4096, 1024, dtype=torch.float32))), 1.0),
        ("adamw", lambda: mark_positive(nn.Parameter(gaussian(4096, 1024, dtype=torch.float32).exp())), 1.0),
        # One point: moments, step, end, and what clipping needs are tensors of its size, or of its square.
        ("amsgrad", lambda: mark_spectral(nn.Parameter(gaussian(64, 1024, dtype=torch.float32))), 6.5),
        ("momentum", lambda: mark_spectral(nn.Parameter(gaussian(256, 256, dtype=torch.float32))), 6.5),
    ],
    ids=["unit norm", "positive", "spectral", "spectral square"],
)
def test_transient_memory(rule, make, limit):
    p = make()
    opt = build(rule, [p], lr=1e-3)
    for step in range(3):
        give([p], step, 0.1)
        opt.step() if step < 2 else None
    with Memory() as memory:
        opt.step()
    assert memory.peak < limit * p.nbytes
