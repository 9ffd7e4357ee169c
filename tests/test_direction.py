"""Directions against the float64 loop of reference.py, one matrix at a time."""

import pytest
import torch

from manifold_opt import direction, retract, stiefel

from . import reference
from .helpers import SQUARE, WIDE, gaussian, point

SHAPES = SQUARE + WIDE
METRICS = ["euclidean", "canonical"]


def walk(shape, rule, references, metric, steps=6):
    """Follow a rule over several points, and the reference one matrix at a time; both step the same points."""
    w = point(3, *shape)
    state = {}
    for k in range(steps):
        g = gaussian(3, *shape, seed=10 + k) * (1 + k)
        d, state = rule(w, g, state, k + 1)
        expected = torch.stack([r.direction(a, b) for r, a, b in zip(references, w, g, strict=True)])
        expected = torch.stack([reference.in_metric(a, b, metric) for a, b in zip(w, expected, strict=True)])
        torch.testing.assert_close(d, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(stiefel.transport(w, d), d, rtol=0, atol=1e-12)  # tangent where it is used
        w = retract(w, -0.1 * d / max(1.0, float(d.abs().max())), "polar")


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0, 0, False), (0.9, 0, False), (0.9, 0.5, False), (0.8, 0, True)]
)
def test_sgd(shape, metric, momentum, dampening, nesterov):
    def rule(w, g, state, _):
        return direction.sgd(w, g, state, metric=metric, momentum=momentum, dampening=dampening, nesterov=nesterov)

    walk(shape, rule, [reference.Momentum(momentum, dampening, nesterov) for _ in range(3)], metric)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("second_moment", ["element", "block"])
@pytest.mark.parametrize("amsgrad", [False, True])
def test_adam(shape, metric, second_moment, amsgrad):
    def rule(w, g, state, step):
        if not state:
            square = torch.zeros(3, 1, 1, dtype=g.dtype) if second_moment == "block" else torch.zeros_like(g)
            state = {"exp_avg": torch.zeros_like(g), "exp_avg_sq": square}
            state |= {"max_exp_avg_sq": square.clone()} if amsgrad else {}
        return direction.ADAM[second_moment](w, g, state, metric=metric, beta1=0.9, beta2=0.99, eps=1e-8, step=step)

    walk(shape, rule, [reference.Adam(0.9, 0.99, 1e-8, second_moment, amsgrad) for _ in range(3)], metric)


def adam_state(w, second_moment):
    square = torch.zeros(len(w), 1, 1, dtype=w.dtype) if second_moment == "block" else torch.zeros_like(w)
    return {"exp_avg": torch.zeros_like(w), "exp_avg_sq": square}


OPTIONS = {"metric": "euclidean", "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "step": 1.0}


@pytest.mark.parametrize("second_moment", ["element", "block"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
def test_adam_stands_still_where_the_gradient_is_normal(second_moment, shape):
    """At a constrained optimum G = S W with S symmetric. Projecting torch's own direction would move on."""
    w = point(1, *shape)
    s = gaussian(shape[0], shape[0])
    g = (s + s.mT) @ w
    d, _ = direction.ADAM[second_moment](w, g, adam_state(w, second_moment), **OPTIONS)
    assert d.abs().max() < 1e-6
    naive = stiefel.project(w, g / (g.abs() + 1e-8))
    assert naive.abs().max() > 0.1


@pytest.mark.parametrize("second_moment", ["element", "block"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (1, 3), (2, 2)])
def test_adam_descends(second_moment, shape):
    for seed in range(20):
        w, g = point(1, *shape, seed=seed), gaussian(1, *shape, seed=100 + seed)
        d, _ = direction.ADAM[second_moment](w, g, adam_state(w, second_moment), **OPTIONS)
        assert (g * d).sum() > 0


@pytest.mark.parametrize("second_moment", ["element", "block"])
def test_adam_steps_about_as_far_as_torch(second_moment):
    """So that a learning rate tuned for torch.optim.Adam carries over: its first step has entries of one."""
    w, g = point(1, 64, 64), gaussian(1, 64, 64)
    d, _ = direction.ADAM[second_moment](w, g, adam_state(w, second_moment), **OPTIONS)
    assert 0.5 < float(d.square().mean().sqrt()) < 2


def test_block_moments_are_equivariant():
    """Rotate the problem from both sides, and the steps rotate with it; an element-wise moment has no such thing."""
    left, right = point(5, 5, seed=8), point(5, 5, seed=9)
    w, state, turned_state = point(1, 5, 5), None, None
    turned = left @ w @ right
    for k in range(5):
        g = gaussian(1, 5, 5, seed=k)
        state = state or adam_state(w, "block")
        turned_state = turned_state or adam_state(w, "block")
        options = {**OPTIONS, "step": k + 1.0}
        d, state = direction.adam_block(w, g, state, **options)
        e, turned_state = direction.adam_block(turned, left @ g @ right, turned_state, **options)
        torch.testing.assert_close(e, left @ d @ right)
        w, turned = retract(w, -0.1 * d), retract(turned, -0.1 * e)


def test_first_adam_step_by_hand():
    """At W = I in two dimensions, G = [[0, 3], [1, 0]]: Omega of m is 1, of sign(G) it is 0, rows have mean squares
    9/2 and 1/2, so Omega_12 = (3 - 1)/2 / sqrt((9/2 + 1/2)/4)."""
    w = torch.eye(2, dtype=torch.float64)[None]
    g = torch.tensor([[[0.0, 3.0], [1.0, 0.0]]], dtype=torch.float64)
    d, _ = direction.adam_element(w, g, adam_state(w, "element"), **OPTIONS)
    expected = 1 / (5 / 4) ** 0.5
    torch.testing.assert_close(d[0], torch.tensor([[0.0, expected], [-expected, 0.0]], dtype=torch.float64))


def test_functions_write_nothing():
    w, g = point(2, 4, 6), gaussian(2, 4, 6)
    for rule, options in (
        (direction.sgd, {"metric": "euclidean", "momentum": 0.9, "dampening": 0.0, "nesterov": True}),
        (direction.adam_element, OPTIONS),
        (direction.adam_block, OPTIONS),
    ):
        state = adam_state(w, "block" if rule is direction.adam_block else "element")
        state = {"momentum_buffer": gaussian(2, 4, 6, seed=3)} if rule is direction.sgd else state
        inputs = [w, g, *state.values()]
        before = [x.clone() for x in inputs]
        rule(w, g, state, **options)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))
