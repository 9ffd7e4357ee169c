"""Directions against the float64 loop of reference.py, one matrix at a time."""

import pytest
import torch

from manifold_opt import direction, retract, stiefel
from manifold_opt.room import Room

from . import reference
from .helpers import FIELDS, SQUARE, WIDE, gaussian, point

SHAPES = SQUARE + WIDE
METRICS = ["euclidean", "canonical"]


def tangent(w, d):
    """What a rule returns, as a tangent: on square blocks it is the skew Omega of V = Omega W."""
    return d @ w if w.shape[-2] == w.shape[-1] else d


def walk(shape, rule, references, metric, dtype, steps=6):
    """Follow a rule over several points, and the reference one matrix at a time; both step the same points."""
    w = point(3, *shape, dtype=dtype)
    for k in range(steps):
        g = gaussian(3, *shape, seed=10 + k, dtype=dtype) * (1 + k)
        d = tangent(w, rule(w, g, k + 1).clone())
        expected = torch.stack([r.direction(a, b) for r, a, b in zip(references, w, g, strict=True)])
        expected = torch.stack([reference.in_metric(a, b, metric) for a, b in zip(w, expected, strict=True)])
        torch.testing.assert_close(d, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(stiefel.transport(w, d), d, rtol=0, atol=1e-12)  # tangent where it is used
        w = retract(w, -0.1 * d / max(1.0, float(d.abs().max())), "polar")


def decay(step, beta1=0.9, beta2=0.999):
    return direction.Decay(beta1, beta2, 1 - beta1**step, 1 - beta2**step)


def adam_state(w, second_moment, amsgrad=False):
    square = torch.zeros(len(w), 1, 1, dtype=w.real.dtype) if second_moment == "block" else torch.zeros_like(w)
    state = {"exp_avg": torch.zeros_like(w), "exp_avg_sq": square}
    return state | ({"max_exp_avg_sq": square.clone()} if amsgrad else {})


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("momentum", "dampening", "nesterov"), [(0, 0, False), (0.9, 0, False), (0.9, 0.5, False), (0.8, 0, True)]
)
@pytest.mark.parametrize("dtype", FIELDS)
def test_sgd(shape, metric, momentum, dampening, nesterov, dtype):
    state, room = {}, Room()

    def rule(w, g, step):
        if momentum and step == 1:
            state["momentum_buffer"] = torch.zeros_like(w)
        return direction.sgd(
            w,
            g,
            state,
            room,
            length=1.0,
            metric=metric,
            momentum=momentum,
            dampening=dampening if step > 1 else 0,
            nesterov=nesterov,
        )

    walk(shape, rule, [reference.Momentum(momentum, dampening, nesterov) for _ in range(3)], metric, dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("second_moment", ["element", "block"])
@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("dtype", FIELDS)
def test_adam(shape, metric, second_moment, amsgrad, dtype):
    state, room = adam_state(torch.zeros(3, *shape, dtype=dtype), second_moment, amsgrad), Room()

    def rule(w, g, step):
        return direction.ADAM[second_moment](
            w, g, state, room, length=1.0, metric=metric, decay=decay(step, 0.9, 0.99), eps=1e-8
        )

    walk(shape, rule, [reference.Adam(0.9, 0.99, 1e-8, second_moment, amsgrad) for _ in range(3)], metric, dtype)


def first_step(second_moment, w, g):
    options = {"length": 1.0, "metric": "euclidean", "decay": decay(1), "eps": 1e-8}
    return tangent(w, direction.ADAM[second_moment](w, g, adam_state(w, second_moment), Room(), **options))


@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
@pytest.mark.parametrize("second_moment", ["element", "block"])
@pytest.mark.parametrize("dtype", FIELDS)
def test_step_counts_and_lengths_may_be_tensors(second_moment, shape, dtype):
    """As in a captured graph, or where the members of a bucket have taken unlike numbers of steps."""
    w, g = point(3, *shape, dtype=dtype), gaussian(3, *shape, dtype=dtype)
    steps = torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)[:, None, None]
    betas = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.999, dtype=torch.float64)
    tensors = direction.Decay(*betas, 1 - 0.9**steps, 1 - 0.999**steps)
    options = {"metric": "canonical", "eps": 1e-8}
    together = direction.ADAM[second_moment](
        w, g, adam_state(w, second_moment), Room(), length=torch.tensor(-0.1), decay=tensors, **options
    )
    for k, step in enumerate((1, 1, 4)):
        state = adam_state(w[k : k + 1], second_moment)
        alone = direction.ADAM[second_moment](
            w[k : k + 1], g[k : k + 1], state, Room(), length=-0.1, decay=decay(step), **options
        )
        torch.testing.assert_close(together[k], alone[0], rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("second_moment", ["element", "block"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9)])
@pytest.mark.parametrize("dtype", FIELDS)
def test_adam_stands_still_where_the_gradient_is_normal(second_moment, shape, dtype):
    """At a constrained optimum G = S W with S symmetric. Projecting torch's own direction would move on."""
    w = point(1, *shape, dtype=dtype)
    s = gaussian(shape[0], shape[0], dtype=dtype)
    g = (s + s.mH) @ w
    d = first_step(second_moment, w, g)
    assert d.abs().max() < 1e-6
    naive = stiefel.project(w, torch_direction(g))
    assert naive.abs().max() > 0.1


def torch_direction(g):
    """The first step of torch.optim.Adam at lr 1: signs, of complex entries one a part."""
    leaf = torch.zeros_like(g, requires_grad=True)
    leaf.grad = g.clone()
    torch.optim.Adam([leaf], lr=1.0).step()
    return -leaf.detach()


@pytest.mark.parametrize("second_moment", ["element", "block"])
@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (1, 3), (2, 2)])
@pytest.mark.parametrize("dtype", FIELDS)
def test_adam_descends(second_moment, shape, dtype):
    for seed in range(20):
        w, g = point(1, *shape, seed=seed, dtype=dtype), gaussian(1, *shape, seed=100 + seed, dtype=dtype)
        d = first_step(second_moment, w, g)
        assert (g.conj() * d).real.sum() > 0


@pytest.mark.parametrize("second_moment", ["element", "block"])
@pytest.mark.parametrize("shape", [(64, 64), (16, 64)])
@pytest.mark.parametrize("dtype", FIELDS)
def test_adam_steps_about_as_far_as_torch(second_moment, shape, dtype):
    """So that a learning rate tuned for torch.optim.Adam carries over: its first step has entries of one."""
    w, g = point(1, *shape, dtype=dtype), gaussian(1, *shape, dtype=dtype)
    d = first_step(second_moment, w, g)
    assert 0.5 < float(d.norm() / torch_direction(g).norm()) < 2


@pytest.mark.parametrize("dtype", FIELDS)
def test_block_moments_are_equivariant(dtype):
    """Rotate the problem from both sides, and the steps rotate with it; an element-wise moment has no such thing."""
    left, right = point(5, 5, seed=8, dtype=dtype), point(5, 5, seed=9, dtype=dtype)
    w = point(1, 5, 5, dtype=dtype)
    turned = left @ w @ right
    state, turned_state = adam_state(w, "block"), adam_state(w, "block")
    for k in range(5):
        g = gaussian(1, 5, 5, seed=k, dtype=dtype)
        options = {"length": 1.0, "metric": "euclidean", "decay": decay(k + 1), "eps": 1e-8}
        d = tangent(w, direction.adam_block(w, g, state, Room(), **options))
        e = tangent(turned, direction.adam_block(turned, left @ g @ right, turned_state, Room(), **options))
        torch.testing.assert_close(e, left @ d @ right)
        w, turned = retract(w, -0.1 * d), retract(turned, -0.1 * e)


def test_first_adam_step_by_hand():
    """At W = I in two dimensions, G = [[0, 0.5], [0.4, 0]]: (0.5 - 0.4)/0.4 = 1/4, where sign(G) has no skew part."""
    w = torch.eye(2, dtype=torch.float64)[None]
    g = torch.tensor([[[0.0, 0.5], [0.4, 0.0]]], dtype=torch.float64)
    d = first_step("element", w, g)
    torch.testing.assert_close(d[0], torch.tensor([[0.0, 0.25], [-0.25, 0.0]], dtype=torch.float64))


def test_first_unitary_adam_step_by_hand():
    """At W = I: real parts (0.5 - 0.4)/0.4 = 1/4; imaginary ones (0.2 + 0.1)/0.1, clipped; so is the diagonal."""
    w = torch.eye(2, dtype=torch.complex128)[None]
    g = torch.tensor([[[3.0, 0.5 + 0.2j], [0.4 + 0.1j, -0.7j]]], dtype=torch.complex128)
    expected = torch.tensor([[0.0, 0.25 + 1j], [-0.25 + 1j, -1j]], dtype=torch.complex128)
    torch.testing.assert_close(first_step("element", w, g)[0], expected)
    # The skew part has squares 2 (0.05^2 + 0.15^2) + 0.7^2 = 0.54 over 8 numbers.
    skew = torch.tensor([[0.0, 0.05 + 0.15j], [-0.05 + 0.15j, -0.7j]], dtype=torch.complex128)
    torch.testing.assert_close(first_step("block", w, g)[0], skew / (0.54 / 8) ** 0.5)


@pytest.mark.parametrize("shape", [(1, 1), (6, 6), (4, 9)])
@pytest.mark.parametrize("rule", ["sgd", "element", "block"])
def test_without_imaginary_parts_it_is_the_real_one(shape, rule):
    """But that mean squares over both parts are half as large: of a block, and of the rows of a rectangular one."""

    def run(dtype):
        w = point(2, *shape)
        state = {"momentum_buffer": torch.zeros_like(w.to(dtype))} if rule == "sgd" else adam_state(w.to(dtype), rule)
        for k in range(3):
            options = {"length": 1.0, "metric": "euclidean"}
            g = gaussian(2, *shape, seed=k).to(dtype)
            if rule == "sgd":
                d = direction.sgd(w.to(dtype), g, state, Room(), momentum=0.9, dampening=0.0, nesterov=False, **options)
            else:
                d = direction.ADAM[rule](w.to(dtype), g, state, Room(), decay=decay(k + 1), eps=1e-12, **options)
        return d

    real, double = run(torch.float64), run(torch.complex128)
    assert not double.imag.any()
    if rule == "block":
        torch.testing.assert_close(double.real, 2**0.5 * real)
    elif rule == "sgd" or shape != (4, 9):
        torch.testing.assert_close(double.real, real)


@pytest.mark.parametrize("shape", [(5, 5), (3, 5)])
@pytest.mark.parametrize("rule", ["sgd", "element", "block"])
@pytest.mark.parametrize("dtype", FIELDS)
def test_it_does_not_matter_how_matrices_lie(shape, rule, dtype):
    """Across one another, and with a gradient that is conjugated lazily."""

    def run(across):
        room = Room()

        def lie(x):
            return Room().across("x", x) if across else x.clone()

        w = point(30, *shape, dtype=dtype)
        state = {"momentum_buffer": torch.zeros_like(w)} if rule == "sgd" else adam_state(w, rule, amsgrad=True)
        state = {key: lie(x) for key, x in state.items()}
        options = {"length": 0.5, "metric": "canonical"}
        for k in range(3):
            g = gaussian(30, *shape, seed=k, dtype=dtype)
            g = lie(g) if across else g.conj().resolve_conj().conj()
            if rule == "sgd":
                d = direction.sgd(lie(w), g, state, room, momentum=0.9, dampening=0.0, nesterov=True, **options)
            else:
                d = direction.ADAM[rule](lie(w), g, state, room, decay=decay(k + 1), eps=1e-8, **options)
        return d.clone(), state

    (across, moments), (along, others) = run(True), run(False)
    torch.testing.assert_close(across, along)
    for key, moment in moments.items():
        torch.testing.assert_close(moment, others[key])


@pytest.mark.parametrize("shape", [(4, 4), (4, 6)])
@pytest.mark.parametrize("sound", [None, torch.tensor([True, False])[:, None, None]])
@pytest.mark.parametrize("dtype", FIELDS)
def test_only_the_moments_of_sound_blocks_are_written(shape, sound, dtype):
    w, g = point(2, *shape, dtype=dtype), gaussian(2, *shape, dtype=dtype)
    sgd = {"momentum": 0.9, "dampening": 0.0, "nesterov": True}
    adam = {"decay": decay(1), "eps": 1e-8}
    for rule, options, state in (
        (direction.sgd, sgd, {"momentum_buffer": gaussian(2, *shape, seed=3, dtype=dtype)}),
        (direction.adam_element, adam, adam_state(w, "element")),
        (direction.adam_block, adam, adam_state(w, "block")),
    ):
        before = [x.clone() for x in (w, g, *state.values())]
        rule(w, g, state, Room(), length=1.0, metric="euclidean", sound=sound, **options)
        assert torch.equal(w, before[0])
        assert torch.equal(g, before[1])
        for now, then in zip(state.values(), before[2:], strict=True):
            assert not torch.equal(now[0], then[0])
            assert torch.equal(now[1], then[1]) == (sound is not None)


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", FIELDS)
def test_moments_go_into_the_frame_and_back(key, dtype):
    """A mean exactly; mean squares of a constant, of which every frame sees the same."""
    w = point(2, 5, 5, dtype=dtype)
    constant = 0.3 + 0.3j if dtype.is_complex else 0.3
    moment = gaussian(2, 5, 5, dtype=dtype) if key == "exp_avg" else torch.full((2, 5, 5), constant, dtype=dtype)
    framed = direction.to_frame(w, key, moment)
    torch.testing.assert_close(framed, moment @ w.mH if key == "exp_avg" else moment)
    torch.testing.assert_close(direction.from_frame(w, key, framed), moment)


@pytest.mark.parametrize("dtype", FIELDS)
def test_mean_squares_in_the_frame_are_those_of_independent_entries(dtype):
    """Of 4000 gradients whose entries, and the parts of complex ones, have unlike scales."""
    w = point(1, 3, 3, dtype=dtype)
    scale = gaussian(3, 3, dtype=dtype, seed=3)
    g = gaussian(4000, 3, 3, dtype=dtype, seed=4)
    square = scale.real**2
    if dtype.is_complex:
        g = torch.complex(g.real * scale.real, g.imag * scale.imag) * 2**0.5
        square = torch.complex(square, scale.imag**2)
    else:
        g = g * scale
    for change, turned in ((direction.to_frame, g @ w.mH), (direction.from_frame, g @ w)):
        expected = change(w, "exp_avg_sq", square[None])[0]
        measured = turned.real.square().mean(0)
        torch.testing.assert_close(measured, expected.real, rtol=0.15, atol=0)  # 5 deviations, sqrt(2 / 4000) each
        if dtype.is_complex:
            torch.testing.assert_close(turned.imag.square().mean(0), expected.imag, rtol=0.15, atol=0)
