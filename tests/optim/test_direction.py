"""Directions against the float64 loop of reference.py, one matrix at a time."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt import retract
from manifold_opt.linalg import matrices
from manifold_opt.linalg.products import Workspace
from manifold_opt.manifolds import Orthogonal
from manifold_opt.optim.directions import adam as adam_directions
from manifold_opt.optim.directions import sgd as sgd_directions
from manifold_opt.optim.engine.counters import Counters
from manifold_opt.stiefel import geometry
from manifold_opt.stiefel.retractions import RETRACTIONS
from manifold_opt.stiefel.step import Settings, retract_

from ..helpers import FIELDS, SQUARE, WIDE, gaussian, never_read, pairs, point
from ..reference import loop as reference

SHAPES = SQUARE + WIDE
METRICS = ["euclidean", "canonical"]
RULES = {  # on square blocks, and on others
    "sgd": (sgd_directions.sgd_square, sgd_directions.sgd_wide),
    "element": (adam_directions.adam_square, adam_directions.adam_wide),
    "block": (adam_directions.adam_block_square, adam_directions.adam_block_wide),
}


def is_square(w):
    return w.shape[-2] == w.shape[-1]


def returned(rule, w, g, state, ws, *, scale=1.0, metric="euclidean", finite=None, **options):
    """What a rule returns, called as a step does it: Omega from A = G W^H in a buffer, or a tangent from W and G."""
    options = {"manifold": Orthogonal(), "scale": scale, "metric": metric, "finite": finite} | options
    if rule == "sgd":
        options = sgd_directions.SgdOptions(**options)
    else:
        options = adam_directions.AdamOptions(point_ndim=2, **options)
    if is_square(w):
        return RULES[rule][0](w, torch.matmul(g, w.mH, out=ws.a), state, ws, options)
    return RULES[rule][1](w, g, state, ws, options)


def direction_of(rule, w, g, state, **options):
    """The tangent that a rule returns: on square blocks V = Omega W."""
    d = returned(rule, w, g, state, Workspace(None, w), **options)
    return d @ w if is_square(w) else d.clone()


def walk(shape, rule, references, metric, dtype, steps=6):
    """Follow a rule over several points, and the reference one matrix at a time; both step the same points."""
    w = point(3, *shape, dtype=dtype)
    for k in range(steps):
        g = gaussian(3, *shape, seed=10 + k, dtype=dtype) * (1 + k)
        d = rule(w, g, k + 1)
        expected = torch.stack([r.direction(a, b) for r, a, b in zip(references, w, g, strict=True)])
        expected = torch.stack([reference.in_metric(a, b, metric) for a, b in zip(w, expected, strict=True)])
        torch.testing.assert_close(d, expected, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(geometry.transport(w, d), d, rtol=0, atol=1e-12)  # tangent where it is used
        w = retract(w, -0.1 * d / max(1.0, float(d.abs().max())), "polar")


def adam(step, beta1=0.9, beta2=0.999, eps=1e-8):
    return {
        "beta1": beta1,
        "beta2": beta2,
        "correction1": 1 - beta1**step,
        "correction2": 1 - beta2**step,
        "eps": eps,
    }


def sgd(momentum=0.9, dampening=0.0, nesterov=False):
    return {"momentum": momentum, "dampening": dampening, "nesterov": nesterov}


def options_of(rule, step=1, **sgd_options):
    return sgd(**sgd_options) if rule == "sgd" else adam(step)


def adam_state(w, second_moment, amsgrad=False):
    square = torch.zeros(len(w), 1, 1, dtype=w.real.dtype) if second_moment == "block" else torch.zeros_like(w)
    state = {"exp_avg": torch.zeros_like(w), "exp_avg_sq": square}
    return state | ({"max_exp_avg_sq": square.clone()} if amsgrad else {})


def state_of(rule, w):
    return {"momentum_buffer": torch.zeros_like(w)} if rule == "sgd" else adam_state(w, rule)


@pairs(
    {"momentum, dampening, nesterov": [(0, 0, False), (0.9, 0, False), (0.9, 0.5, False), (0.8, 0, True)]},
    shape=SHAPES,
    metric=METRICS,
    dtype=FIELDS,
)
def test_sgd_directions_follow_the_reference(shape, metric, momentum, dampening, nesterov, dtype):
    state = {}

    def rule(w, g, step):
        if momentum and step == 1:
            state["momentum_buffer"] = torch.zeros_like(w)
        options = sgd(momentum, dampening if step > 1 else 0.0, nesterov)
        return direction_of("sgd", w, g, state, metric=metric, **options)

    walk(shape, rule, [reference.Momentum(momentum, dampening, nesterov) for _ in range(3)], metric, dtype)


@pairs(shape=SHAPES, metric=METRICS, second_moment=["element", "block"], amsgrad=[False, True], dtype=FIELDS)
def test_adam_directions_follow_the_reference(shape, metric, second_moment, amsgrad, dtype):
    state = adam_state(torch.zeros(3, *shape, dtype=dtype), second_moment, amsgrad)

    def rule(w, g, step):
        return direction_of(second_moment, w, g, state, metric=metric, **adam(step, 0.9, 0.99))

    walk(shape, rule, [reference.Adam(0.9, 0.99, 1e-8, second_moment, amsgrad) for _ in range(3)], metric, dtype)


@pairs(shape=[(5, 5), (3, 5)], rule=RULES, scale=[-0.3, torch.tensor(-0.3)], dtype=FIELDS)
def test_the_scale_is_a_factor(shape, rule, scale, dtype):
    """A number or a tensor, and the same moments."""
    w, g = point(2, *shape, dtype=dtype), gaussian(2, *shape, dtype=dtype)
    states = [state_of(rule, w) for _ in range(2)]
    for step in (1, 2):
        one, other = (
            direction_of(rule, w, g, state, scale=s, metric="canonical", **options_of(rule, step))
            for state, s in zip(states, (1.0, scale), strict=True)
        )
        torch.testing.assert_close(other, -0.3 * one, rtol=1e-6, atol=1e-9)  # 0.3 in float32
    for key, moment in states[0].items():
        assert torch.equal(moment, states[1][key])


VARIANTS = [  # of the rules, with the options of SGD
    ("sgd", {"momentum": 0.0}),
    ("sgd", {"momentum": 0.9}),
    ("sgd", {"momentum": 0.9, "nesterov": True}),
    ("element", {}),
    ("block", {}),
]


@pairs(
    {"rule, variant": VARIANTS},
    shape=[(5, 5), (3, 5)],
    metric=METRICS,
    reading=[True, False],
    retraction=["orthographic", "polar", "exp", "orthogonalizer"],
)
def test_a_retraction_can_take_what_a_rule_returns(retraction, reading, metric, rule, variant, shape, monkeypatch):
    """Where it lies, in the workspace that both use: nothing of it may be overwritten too early."""
    w, g = point(2, *shape), gaussian(2, *shape)
    options = {"scale": -0.03, "metric": metric, **options_of(rule, **variant)}
    expected = retract(w, direction_of(rule, w, g, state_of(rule, w), **options), retraction, metric=metric)
    if not reading:
        never_read(monkeypatch)
    ws, moved, tally = Workspace(None, w), w.clone(), Counters()
    tally.prepare(w.device)
    v = returned(rule, moved, g, state_of(rule, w), ws, **options)
    if is_square(w):
        assert v.data_ptr() == ws.a.data_ptr()
    group = {"metric": metric, "beta": 0.5, "correction_steps": 1}
    retract_(moved, v, ws, Settings(RETRACTIONS[retraction], group, tally.count))
    torch.testing.assert_close(moved, expected, rtol=0, atol=1e-14)


@pairs({"variant, wide": list(zip(VARIANTS, (2, 2, 4, 4, 4), strict=True))}, metric=METRICS, dtype=FIELDS)
def test_products_of_a_direction(variant, wide, metric, dtype):
    """In T, as the docstrings state them: none of square blocks, but for A = G W^H, which they are given."""
    rule, options = variant
    for shape, expected in (((6, 6), 1), ((4, 12), wide + 2 * (metric == "canonical"))):
        w, g = point(2, *shape, dtype=dtype), gaussian(2, *shape, dtype=dtype)
        with FlopCounterMode(display=False) as counter:
            returned(rule, w, g, state_of(rule, w), Workspace(None, w), metric=metric, **options_of(rule, **options))
        assert counter.get_total_flops() == expected * 2 * 2 * shape[0] ** 2 * shape[1]


def first_step(second_moment, w, g):
    return direction_of(second_moment, w, g, adam_state(w, second_moment), **adam(1))


@pairs(shape=[(6, 6), (4, 9)], second_moment=["element", "block"], dtype=FIELDS)
def test_step_counts_and_lengths_may_be_tensors(second_moment, shape, dtype):
    """As in a captured graph, or where the members of a bucket have taken unlike numbers of steps."""
    w, g = point(3, *shape, dtype=dtype), gaussian(3, *shape, dtype=dtype)
    steps = torch.tensor([1.0, 1.0, 4.0], dtype=torch.float64)[:, None, None]
    betas = torch.tensor(0.9, dtype=torch.float64), torch.tensor(0.999, dtype=torch.float64)
    tensors = adam(1) | {"beta1": betas[0], "beta2": betas[1]}
    tensors |= {"correction1": 1 - 0.9**steps, "correction2": 1 - 0.999**steps}
    together = direction_of(
        second_moment,
        w,
        g,
        adam_state(w, second_moment),
        scale=torch.tensor(-0.1),
        metric="canonical",
        **tensors,
    )
    for k, step in enumerate((1, 1, 4)):
        one, gradient = w[k : k + 1], g[k : k + 1]
        state = adam_state(one, second_moment)
        alone = direction_of(second_moment, one, gradient, state, scale=-0.1, metric="canonical", **adam(step))
        torch.testing.assert_close(together[k], alone[0], rtol=1e-6, atol=1e-9)


@pairs(second_moment=["element", "block"], shape=[(6, 6), (4, 9)], dtype=FIELDS)
def test_adam_stands_still_where_the_gradient_is_normal(second_moment, shape, dtype):
    """At a constrained optimum G = S W with S symmetric. Projecting torch's own direction would move on."""
    w = point(1, *shape, dtype=dtype)
    s = gaussian(shape[0], shape[0], dtype=dtype)
    g = (s + s.mH) @ w
    d = first_step(second_moment, w, g)
    assert d.abs().max() < 1e-6
    naive = geometry.riemannian_gradient(w, torch_direction(g))
    assert naive.abs().max() > 0.1


def torch_direction(g):
    """The first step of torch.optim.Adam at lr 1: signs, of complex entries one a part."""
    leaf = torch.zeros_like(g, requires_grad=True)
    leaf.grad = g.clone()
    torch.optim.Adam([leaf], lr=1.0).step()
    return -leaf.detach()


@pairs(second_moment=["element", "block"], shape=[(6, 6), (4, 9), (1, 3), (2, 2)], dtype=FIELDS)
def test_adam_descends(second_moment, shape, dtype):
    for seed in range(20):
        w, g = point(1, *shape, seed=seed, dtype=dtype), gaussian(1, *shape, seed=100 + seed, dtype=dtype)
        d = first_step(second_moment, w, g)
        assert (g.conj() * d).real.sum() > 0


@pairs(second_moment=["element", "block"], shape=[(64, 64), (16, 64)], dtype=FIELDS)
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
        d = direction_of("block", w, g, state, **adam(k + 1))
        e = direction_of("block", turned, left @ g @ right, turned_state, **adam(k + 1))
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
@pytest.mark.parametrize("rule", RULES)
def test_real_values_of_complex_dtype_have_the_real_direction(shape, rule):
    """But that mean squares over both parts are half as large: of a block, and of the rows of a rectangular one."""

    def run(dtype):
        w = point(2, *shape).to(dtype)
        state = state_of(rule, w)
        for k in range(3):
            g = gaussian(2, *shape, seed=k).to(dtype)
            options = sgd() if rule == "sgd" else adam(k + 1, eps=1e-12)
            d = direction_of(rule, w, g, state, **options)
        return d

    real, double = run(torch.float64), run(torch.complex128)
    assert not double.imag.any()
    if rule == "block":
        torch.testing.assert_close(double.real, 2**0.5 * real)
    elif rule == "sgd" or shape != (4, 9):
        torch.testing.assert_close(double.real, real)


@pairs(reading=[True, False], rule=["sgd", "block"], metric=METRICS, dtype=[torch.float32, torch.complex64])
def test_a_gradient_nearly_normal_leaves_a_tangent(rule, metric, dtype, reading, monkeypatch):
    """The rounding of a projection is in proportion to the gradient, and 1e4 times as large as what is left of it."""
    if not reading:
        never_read(monkeypatch)
    w = point(3, 4, 9, dtype=dtype)
    s = gaussian(4, 4, dtype=dtype)
    g = 1e6 * (s + s.mH) @ w + geometry.riemannian_gradient(w, gaussian(3, 4, 9, seed=2, dtype=dtype))
    # Of sgd a step of length one; of Adam, whatever the gradient.
    d = direction_of(rule, w, g, state_of(rule, w), metric=metric, **options_of(rule))
    normal = matrices.sym(d @ w.mH)
    length = torch.linalg.matrix_norm(d)
    assert float(length.min()) > 0.1
    assert float((torch.linalg.matrix_norm(normal) / length).max()) < 8 * torch.finfo(dtype).eps


@pairs(shape=[(5, 5), (3, 5)], rule=RULES, nesterov=[False, True], dtype=FIELDS)
def test_where_nothing_can_be_read_directions_are_the_same(shape, rule, nesterov, dtype, monkeypatch):
    w = point(2, *shape, dtype=dtype)

    def run(finite):
        state = state_of(rule, w)
        for k in range(3):
            options = {"metric": "canonical", "finite": finite, **options_of(rule, k + 1, nesterov=nesterov)}
            d = direction_of(rule, w, gaussian(2, *shape, seed=k, dtype=dtype), state, **options)
        return d, state

    read, moments = run(None)
    never_read(monkeypatch)
    d, others = run(torch.ones(2, 1, 1, dtype=w.real.dtype))
    torch.testing.assert_close(d, read, rtol=1e-12, atol=1e-13)
    for key, moment in moments.items():
        torch.testing.assert_close(others[key], moment, rtol=1e-12, atol=1e-13)


@pairs(shape=[(4, 4), (4, 6)], masked=[False, True], rule=RULES, amsgrad=[False, True], dtype=FIELDS)
def test_only_the_moments_of_blocks_with_a_finite_gradient_are_written(rule, shape, masked, amsgrad, dtype):
    """To the bit. Of the others the gradient is zero, and the mask, of ones and zeros. Nor is the point written."""
    w, g = point(2, *shape, dtype=dtype), gaussian(2, *shape, dtype=dtype)
    finite = None
    if masked:
        finite = torch.tensor([1.0, 0.0], dtype=w.real.dtype)[:, None, None]
        g[1] = 0
    state = state_of(rule, w) if rule == "sgd" else adam_state(w, rule, amsgrad)
    direction_of(rule, w, gaussian(2, *shape, seed=3, dtype=dtype), state, **options_of(rule, nesterov=amsgrad))
    before = [x.clone() for x in (w, g, *state.values())]
    direction_of(rule, w, 3 * g, state, finite=finite, **options_of(rule, 2, nesterov=amsgrad))
    assert torch.equal(w, before[0])
    assert torch.equal(g, before[1])
    for now, then in zip(state.values(), before[2:], strict=True):
        assert not torch.equal(now[0], then[0])
        assert torch.equal(now[1], then[1]) == masked


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("dtype", FIELDS)
def test_moments_go_into_the_frame_and_back(key, dtype):
    """A mean exactly; mean squares of a constant, of which every frame sees the same."""
    w = point(2, 5, 5, dtype=dtype)
    constant = 0.3 + 0.3j if dtype.is_complex else 0.3
    moment = gaussian(2, 5, 5, dtype=dtype) if key == "exp_avg" else torch.full((2, 5, 5), constant, dtype=dtype)
    framed = geometry.to_frame(w, moment, key == "exp_avg_sq")
    torch.testing.assert_close(framed, moment @ w.mH if key == "exp_avg" else moment)
    torch.testing.assert_close(geometry.from_frame(w, framed, key == "exp_avg_sq"), moment)


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
    for change, turned in ((geometry.to_frame, g @ w.mH), (geometry.from_frame, g @ w)):
        expected = change(w, square[None], True)[0]
        measured = turned.real.square().mean(0)
        torch.testing.assert_close(measured, expected.real, rtol=0.15, atol=0)  # 5 deviations, sqrt(2 / 4000) each
        if dtype.is_complex:
            torch.testing.assert_close(turned.imag.square().mean(0), expected.imag, rtol=0.15, atol=0)
