"""Unitary parameters through the optimizers: against the loop, a closed form, the real run, and a case by hand."""

import cmath
import itertools

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

import manifold_opt
from manifold_opt import RETRACTIONS, SGD, Adam, AdamW, mark_orthogonal, mark_unit_norm, orthogonality_error
from manifold_opt.linalg.matrices import error_at_rounding
from manifold_opt.optim.engine import grouping

from ..helpers import EXACT, UNITARY, buckets_of, each, gaussian, never_read, pairs, point
from ..reference import loop as reference

RULES = {
    "SGD": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.2}),
    "nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "Adam": ("Adam", {"lr": 0.05}),
    "amsgrad": ("Adam", {"lr": 0.05, "amsgrad": True}),
    "block": ("Adam", {"lr": 0.05, "second_moment": "block"}),
    "AdamW": ("AdamW", {"lr": 0.05, "second_moment": "block", "amsgrad": True, "weight_decay": 0.1}),
}
SHAPES = {"gates": ((12, 4), 3), "wide": ((4, 7), 1), "tall": ((12, 3), 2), "one": ((1, 1), 1), "row": ((1, 5), 1)}


def build(rule, parameters, **options):
    name, own = RULES[rule]
    return getattr(manifold_opt, name)(parameters, **{**own, **options})


def parameter(shape, blocks=1, *, gain=1.0, dtype=torch.complex128, seed=0):
    value = torch.cat([gain * point(shape[0] // blocks, shape[1], dtype=dtype, seed=seed + k) for k in range(blocks)])
    return mark_orthogonal(nn.Parameter(value), blocks, gain=gain)


def give(parameters, seed):
    for k, p in enumerate(parameters):
        p.grad = gaussian(*p.shape, dtype=p.dtype, seed=1000 + 100 * seed + k % 100)


def run(parameters, opt, steps=4, first=0):
    for step in range(first, first + steps):
        give(parameters, step)
        opt.step()
    return [p.detach().clone() for p in parameters]


def assert_steps_as_the_reference(retraction, rule, shape, metric, scale=1.0):
    name, options = RULES[rule]
    options = {**options, "lr": options["lr"] * scale}
    weight = parameter(*SHAPES[shape])
    start = weight.detach().clone()
    opt = build(rule, [weight], retraction=retraction, metric=metric, lr=options["lr"])
    gradients = [gaussian(*weight.shape, dtype=weight.dtype, seed=k + 50) for k in range(4)]
    for gradient in gradients:
        weight.grad = gradient.clone()
        opt.step()
    blocks = SHAPES[shape][1]
    parts = [gradient.chunk(blocks) for gradient in gradients]
    expected = [
        reference.train(block, [part[k] for part in parts], name, options, retraction, metric)
        for k, block in enumerate(start.chunk(blocks))
    ]
    # As for real ones: rounding of 2e-16 in a hundred products, under the root of a second moment of 1e-9 at worst.
    torch.testing.assert_close(weight.detach(), torch.cat(expected), rtol=0, atol=1e-9)


@each({"rule, shape": itertools.product(RULES, SHAPES)}, retraction=RETRACTIONS, metric=["euclidean", "canonical"])
def test_unitary_steps_follow_the_reference(retraction, rule, shape, metric):
    # Off the manifold, where the inexact schemes end, formulas that agree on it part: by the fourth power of the step.
    assert_steps_as_the_reference(retraction, rule, shape, metric, 1 if RETRACTIONS[retraction].exact else 1e-2)


@each(rule=RULES, shape=SHAPES)
def test_unitary_steps_without_reading_values_follow_the_reference(rule, shape, monkeypatch):
    """But for long steps, which are shortened there."""
    never_read(monkeypatch)
    for retraction in ("orthographic", "polar", "qr"):
        assert_steps_as_the_reference(retraction, rule, shape, "euclidean", 0.03)


def test_by_hand():
    """A number on the unit circle: only the imaginary part of conj(w) g turns it, by lr times that, and not below."""
    start, gradient = cmath.exp(0.7j), 0.3 - 0.4j
    weight = mark_orthogonal(nn.Parameter(torch.tensor([[start]], dtype=torch.complex128)))
    opt = SGD([weight], lr=0.5, retraction="exp")
    weight.grad = torch.tensor([[gradient]], dtype=torch.complex128)
    opt.step()
    turned = start * cmath.exp(-0.5j * (gradient * start.conjugate()).imag)
    assert complex(weight.detach()[0, 0]) == pytest.approx(turned, abs=1e-15)


def test_the_first_step_of_adam_by_hand():
    """G W^H = [[., 3 + i], [-2, i / 2]]: 3 + i + 2 over 3 and 1, or 2 and 0, is cut off at 1 + i; i over 1 / 2 at i."""
    weight = mark_orthogonal(nn.Parameter(torch.eye(2, dtype=torch.complex128)))
    opt = Adam([weight], lr=1e-3, retraction="exp", eps=1e-12)
    weight.grad = torch.tensor([[0.0, 3 + 1j], [-2.0, 0.5j]], dtype=torch.complex128)
    opt.step()
    omega = -1e-3 * torch.tensor([[0.0, 1 + 1j], [-1 + 1j, 1j]], dtype=torch.complex128)
    torch.testing.assert_close(weight.detach(), torch.linalg.matrix_exp(omega), rtol=0, atol=1e-14)


@each(
    {"rule, rate, decay": [("momentum", 0.02, 1.0), ("Adam", 0.1, 0.96), ("block", 0.1, 0.96)]},
    retraction=["orthographic", "qr", "cayley"],
    rows=[4, 7],
)
def test_procrustes_reaches_its_closed_form(retraction, rule, rate, decay, rows):
    """min |W A - B|^2 = |A|^2 + |B|^2 - 2 sum of the singular values of B A^H, for W^H W = I."""
    a = point(4, 6, dtype=torch.complex128, seed=2) + 0.1 * gaussian(4, 6, dtype=torch.complex128, seed=3)
    b = point(rows, 4, dtype=torch.complex128, seed=4) @ a + 0.3 * gaussian(rows, 6, dtype=torch.complex128, seed=5)
    best = float(a.abs().square().sum() + b.abs().square().sum() - 2 * torch.linalg.svdvals(b @ a.mH).sum())
    weight = parameter((rows, 4), seed=6)
    opt = build(
        rule,
        [weight],
        retraction=retraction,
        lr=rate,
        **({"dampening": 0.0} if rule == "momentum" else {"betas": (0.5, 0.8)}),
    )
    schedule = torch.optim.lr_scheduler.ExponentialLR(opt, decay)
    for _ in range(400):
        opt.zero_grad()
        loss = (weight @ a - b).abs().square().sum()
        loss.backward()
        opt.step()
        schedule.step()
    # The loss is flat there: an error of 3e-5 in W is one of 1e-9 in the loss. Adam's rate has come to 1e-8.
    assert float(loss.detach()) == pytest.approx(best, rel=1e-9)
    assert orthogonality_error(weight) < 1e-13
    u, _, vh = torch.linalg.svd(b @ a.mH, full_matrices=False)
    torch.testing.assert_close(weight.detach(), u @ vh, rtol=0, atol=1e-4)


# What real numbers do.


@each({"rule, shape": itertools.product(RULES, ["gates", "wide", "tall"])}, retraction=RETRACTIONS)
def test_real_values_of_complex_dtype_follow_the_real_run(retraction, rule, shape):
    """One number a block is the mean of both parts, half as much: steps as of a rate and an eps the root of 2 larger.

    So are the rows' of rectangular blocks in the other second moment, in one of two parts of the step: not compared.
    """
    rows, blocks = SHAPES[shape]
    if rule in ("Adam", "amsgrad") and shape != "gates":
        pytest.skip("a row's mean square is of both parts")
    value = torch.cat([point(rows[0] // blocks, rows[1], seed=k) for k in range(blocks)])
    real = mark_orthogonal(nn.Parameter(value), blocks)
    double = mark_orthogonal(nn.Parameter(value.to(torch.complex128)), blocks)
    scale = 2**0.5 if RULES[rule][1].get("second_moment") == "block" else 1.0
    rate = RULES[rule][1]["lr"] * 0.1
    opt = build(rule, [real], retraction=retraction, lr=scale * rate, **({"eps": scale * 1e-8} if scale != 1 else {}))
    other = build(rule, [double], retraction=retraction, lr=rate)
    for step in range(5):
        real.grad = gaussian(*rows, seed=step + 70)
        double.grad = real.grad.to(torch.complex128)
        opt.step()
        other.step()
    assert not bool(double.detach().imag.any())
    torch.testing.assert_close(double.detach().real, real.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["SGD", "momentum", "nesterov", "block"])
@pytest.mark.parametrize("shape", ["gates", "wide", "tall"])
def test_a_rotated_problem_takes_rotated_steps(rule, shape):
    """f(W) as f(U^H W V^H): W and G become U W V and U G V, step for step."""
    rows, blocks = SHAPES[shape]
    weight = parameter(rows, blocks)
    left, right = (point(n, n, dtype=torch.complex128, seed=90 + n) for n in (rows[0] // blocks, rows[1]))

    def rotated(x):
        return torch.cat([left @ block @ right for block in x.chunk(blocks)])

    other = mark_orthogonal(nn.Parameter(rotated(weight.detach())), blocks)
    opt, turned = build(rule, [weight]), build(rule, [other])
    for step in range(5):
        give([weight], step)
        other.grad = rotated(weight.grad)
        opt.step()
        turned.step()
    torch.testing.assert_close(other.detach(), rotated(weight.detach()), rtol=0, atol=1e-12)


@pytest.mark.parametrize("rule", ["SGD", "momentum", "Adam", "amsgrad"])
def test_rows_of_unit_norm_are_real_ones_of_twice_the_length(rule):
    value = gaussian(5, 3, dtype=torch.complex128)
    weight, real = nn.Parameter(value.clone()), nn.Parameter(torch.view_as_real(value).flatten(1).clone())
    opt, other = build(rule, [mark_unit_norm(weight)]), build(rule, [mark_unit_norm(real)])
    for step in range(6):
        give([weight], step)
        real.grad = torch.view_as_real(weight.grad).flatten(1)
        opt.step()
        other.step()
    torch.testing.assert_close(torch.view_as_real(weight.detach()).flatten(1), real.detach(), rtol=0, atol=1e-13)
    for key in ("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
        if key in opt.state[weight]:
            held = torch.view_as_real(opt.state[weight][key]).flatten(1)
            torch.testing.assert_close(held, other.state[real][key], rtol=0, atol=1e-13)


def test_one_number_a_point_of_unit_norm_is_real_and_that_of_real_ones():
    value = gaussian(5, 3, dtype=torch.complex128)
    weight, real = nn.Parameter(value.clone()), nn.Parameter(torch.view_as_real(value).flatten(1).clone())
    opt, other = build("block", [mark_unit_norm(weight)]), build("block", [mark_unit_norm(real)])
    for step in range(6):
        give([weight], step)
        real.grad = torch.view_as_real(weight.grad).flatten(1)
        opt.step()
        other.step()
    torch.testing.assert_close(torch.view_as_real(weight.detach()).flatten(1), real.detach(), rtol=0, atol=1e-13)
    assert opt.state[weight]["exp_avg_sq"].dtype == torch.float64


# Buckets, sizes, graphs.


@pairs(retraction=EXACT, rule=RULES, dtype=UNITARY)
def test_weights_stay_unitary_to_rounding(retraction, rule, dtype):
    weights = [parameter(*SHAPES[shape], dtype=dtype, gain=1.5 if shape == "wide" else 1.0) for shape in SHAPES]
    opt = build(rule, weights, retraction=retraction)
    for step in range(12):
        run(weights, opt, 1, step)
        for p, (shape, blocks) in zip(weights, SHAPES.values(), strict=True):
            assert orthogonality_error(p) <= error_at_rounding(shape[0] // blocks, shape[1], dtype)


@each(rule=RULES, shape=["gates", "wide", "tall"])
def test_gathered_or_alone_it_moves_the_same(rule, shape, monkeypatch):
    together, alone = ([parameter(*SHAPES[shape], seed=10 * k) for k in range(4)] for _ in range(2))
    opt = build(rule, together)
    run(together, opt)
    assert buckets_of(opt)[0].gathered
    monkeypatch.setattr(grouping, "SMALL_BYTES", 0)
    single = build(rule, alone)
    run(alone, single)
    assert not any(bucket.gathered for bucket in buckets_of(single))
    for p, other in zip(together, alone, strict=True):
        torch.testing.assert_close(p.detach(), other.detach(), rtol=0, atol=1e-12)
        for key, value in single.state[other].items():
            torch.testing.assert_close(opt.state[p][key], value, rtol=1e-10, atol=1e-12)


@each(rule=RULES, retraction=["orthographic", "polar"], shape=[(3, 3), (2, 5)])
def test_many_tiny_unitary_blocks_step_as_few_do(rule, retraction, shape):
    many, few = (parameter((blocks * shape[0], shape[1]), blocks, seed=3) for blocks in (300, 3))
    opt, other = (build(rule, [p], retraction=retraction) for p in (many, few))
    for step in range(4):
        give([many], step)
        few.grad = many.grad[: len(few)].clone()
        opt.step()
        other.step()
    torch.testing.assert_close(many.detach()[: len(few)], few.detach(), rtol=0, atol=1e-12)
    assert orthogonality_error(many) < 1e-14


@pytest.mark.compiled
@pytest.mark.parametrize("rule", ["momentum", "amsgrad"])
@pytest.mark.filterwarnings("ignore")  # of the compiler's own
def test_a_compiled_step_is_one_graph(rule):
    torch._dynamo.reset()
    counters.clear()
    weights, again = ([parameter(*SHAPES[shape]) for shape in ("gates", "wide", "tall")] for _ in range(2))
    opt, eager = build(rule, weights, lr=1e-3), build(rule, again, lr=1e-3)
    compiled = torch.compile(opt.step, backend="eager")
    for step in range(3):
        give(weights, step)
        give(again, step)
        compiled()
        eager.step()
    assert not counters["graph_break"]
    for p, other in zip(weights, again, strict=True):
        torch.testing.assert_close(p.detach(), other.detach(), rtol=0, atol=1e-9)


def test_weight_decay_does_not_act_on_it():
    results = [run([w := parameter((4, 4))], AdamW([w], lr=0.01, weight_decay=decay))[0] for decay in (0.0, 0.5)]
    assert torch.equal(*results)
