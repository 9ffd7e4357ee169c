"""Steps inside the spectral ball that do not look at the spectrum: the same steps, and the bound holds."""

import copy

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, AdamW, mark_spectral, unmark
from manifold_opt.linalg import singular_values
from manifold_opt.linalg.few_eigenpairs import smallest_eigenpairs
from manifold_opt.linalg.singular_values import tolerance

from ..helpers import DTYPES, buckets_of, each, gaussian, point

RULES = {
    "adam": lambda params: Adam(params, lr=1e-3),
    "adamw": lambda params: AdamW(params, lr=1e-3, weight_decay=0.5),
    "momentum": lambda params: SGD(params, lr=1e-3, momentum=0.9),
}


def inside(*shape, count=1, dtype=torch.float32, norm=0.6, bound=1.0):
    """Marked parameters of some spectral norm, with a Frobenius norm that shows nothing."""
    made = []
    for seed in range(count):
        x = gaussian(*shape, dtype=dtype, seed=50 + seed)
        made.append(mark_spectral(nn.Parameter(norm * bound * x / torch.linalg.matrix_norm(x, 2)), bound))
    return made


def give(parameters, step, scale=1.0):
    for index, p in enumerate(parameters):
        p.grad = scale * gaussian(*p.shape, dtype=p.dtype, seed=1000 + 100 * step + index)


def train(parameters, opt, steps, first=0):
    for step in range(first, first + steps):
        give(parameters, step)
        opt.step()


def slacks(opt):
    return [batch.ws.slack for bucket in buckets_of(opt) for batch in bucket._views.batches]


def excess(p, bound=1.0):
    return float(torch.linalg.matrix_norm(p.detach().double(), 2)) / bound - 1


class Looks:
    """How often a spectrum was looked at."""

    def __init__(self, monkeypatch):
        self.count = 0
        gram = singular_values.gram

        def counted(x):
            self.count += 1
            return gram(x)

        monkeypatch.setattr(singular_values, "gram", counted)


@each(rule=RULES, shape=[(6, 9), (70, 80), (80, 64)], count=[1, 3], dtype=DTYPES)
def test_steps_have_the_bits_of_steps_that_look(rule, shape, count, dtype, monkeypatch):
    given, expected = (inside(*shape, count=count, dtype=dtype) for _ in range(2))
    ours, looking = RULES[rule](given), RULES[rule](expected)
    looks = Looks(monkeypatch)
    for step in range(60):
        for bucket in buckets_of(looking) if step else ():
            bucket.forget_slack()
        give(expected, step)
        looking.step()
        looks.count = 0
        give(given, step)
        ours.step()
        for p, q in zip(given, expected, strict=True):
            assert torch.equal(p, q)


def test_few_steps_look(monkeypatch):
    for count in (1, 3):
        weights = inside(70, 80, count=count)
        opt, looks = Adam(weights, lr=1e-4), Looks(monkeypatch)
        train(weights, opt, 60)
        assert 1 <= looks.count <= 6 * len(slacks(opt))
        monkeypatch.undo()


@each(rule=RULES, dtype=DTYPES, shape=[(12, 17), (80, 64)], count=[1, 2])
def test_the_bound_holds_over_a_thousand_noisy_steps(rule, dtype, shape, count, monkeypatch):
    """From well inside to the boundary, pushed outwards, and back: the slack is used up many times."""
    weights = inside(*shape, count=count, dtype=dtype, norm=0.3)
    opt, looks = RULES[rule](weights), Looks(monkeypatch)
    at_bound = 0
    for step in range(1000):
        for index, p in enumerate(weights):
            push = 0.3 if step % 500 < 350 else -0.3
            p.grad = gaussian(*p.shape, dtype=dtype, seed=7 * step + index) - push * p.detach().sign()
        opt.step()
        worst = max(excess(p) for p in weights)
        assert worst <= tolerance(weights[0])
        at_bound += worst > -1e-6
    assert at_bound > 20
    assert looks.count < 900 * len(slacks(opt))


@pytest.mark.parametrize("count", [1, 3])
def test_steps_along_the_largest_singular_vector_end_at_the_bound(count):
    """Of rank one, so that the slack is used up by no more than the norm grows."""
    weights = inside(70, 80, count=count, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(weights[-1].detach())
    opt = SGD(weights, lr=1.0)
    for step in range(60):
        for p in weights:
            p.grad = -0.01 * u[:, :1] @ vh[:1]
        opt.step()
        assert excess(weights[-1]) == pytest.approx(min(0.0, 0.61 + 0.01 * step - 1), abs=1e-12)


@pytest.mark.parametrize("count", [1, 3])
def test_a_resumed_run_is_the_uninterrupted_one(count):
    whole, part = (inside(70, 80, count=count) for _ in range(2))
    train(whole, Adam(whole, lr=3e-4), 40)
    opt = Adam(part, lr=3e-4)
    train(part, opt, 13)
    assert min(slacks(opt)) > 0
    state = copy.deepcopy(opt.state_dict())
    resumed = [mark_spectral(nn.Parameter(p.detach().clone())) for p in part]
    opt = Adam(resumed, lr=3e-4)
    opt.load_state_dict(state)
    train(resumed, opt, 27, first=13)
    for p, q in zip(whole, resumed, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize(("outside", "few"), [(8, True), (200, False)])
def test_a_run_with_values_at_the_bound_resumes_bit_for_bit(outside, few, monkeypatch):
    """By the decomposition of a few pairs, and by that of the whole matrix."""
    found = []

    def recorded(*arguments):
        found.append(smallest_eigenpairs(*arguments))
        return found[-1]

    monkeypatch.setattr(singular_values, "smallest_eigenpairs", recorded)
    s = torch.cat([torch.ones(outside), torch.linspace(0.9, 0, 256 - outside)])
    start = point(256, 256, dtype=torch.float32) * s @ point(256, 260, dtype=torch.float32, seed=1)
    whole, part = (mark_spectral(nn.Parameter(start.clone())) for _ in range(2))
    opt = Adam([whole], lr=1e-4)
    for step in range(14):
        train([whole], opt, 1, first=step)
        assert excess(whole) <= tolerance(whole)
    assert all((pairs is not None) == few for pairs in found)
    assert len(found) == 14
    opt = Adam([part], lr=1e-4)
    train([part], opt, 7)
    resumed = mark_spectral(nn.Parameter(part.detach().clone()))
    continued = Adam([resumed], lr=1e-4)
    continued.load_state_dict(copy.deepcopy(opt.state_dict()))
    train([resumed], continued, 7, first=7)
    assert torch.equal(whole, resumed)


@pytest.mark.parametrize("count", [1, 3])
def test_a_write_from_outside_makes_it_look_again(count):
    """To a value inside, which is not put back, from where the next step leads out."""
    weights = inside(70, 80, count=count)
    opt = SGD(weights, lr=1.0)
    train_with = [1e-3 * p.detach() for p in weights]
    for _ in range(3):
        for p, g in zip(weights, train_with, strict=True):
            p.grad = g.clone()
        opt.step()
    assert min(slacks(opt)) > 0.2
    with torch.no_grad():
        weights[-1].mul_(0.999 / (1 + excess(weights[-1])))
    for p in weights:
        p.grad = -0.1 * p.detach()
    opt.step()
    assert excess(weights[-1]) <= tolerance(weights[-1])
    assert excess(weights[-1]) > -1e-5


def test_another_bound_makes_it_look_again():
    (p,) = inside(70, 80)
    opt = SGD([p], lr=1e-3)
    train([p], opt, 3)
    mark_spectral(unmark(p), 0.5)
    train([p], opt, 1, first=3)
    assert excess(p, 0.5) <= tolerance(p)


def test_a_write_that_nothing_shows_is_corrected_in_time():
    (p,) = inside(6, 9)
    opt = SGD([p], lr=1e-6)
    train([p], opt, 2)
    p.data.mul_(3)
    version = p._version
    assert excess(p) > 0.5
    train([p], opt, 500, first=2)
    assert p._version > version
    assert excess(p) <= tolerance(p)


def test_a_learning_rate_of_zero_keeps_the_bits():
    for count in (1, 3):
        weights = inside(70, 80, count=count)
        opt = Adam(weights, lr=1e-3)
        train(weights, opt, 3)
        opt.param_groups[0]["lr"] = 0.0
        before = [p.detach().clone() for p in weights]
        train(weights, opt, 5, first=3)
        assert all(torch.equal(p, q) for p, q in zip(weights, before, strict=True))
        assert opt.metrics()["skipped_blocks"] == 0
        opt.param_groups[0]["lr"] = 1.0
        train(weights, opt, 1, first=8)
        assert max(map(excess, weights)) <= tolerance(weights[0])


def test_a_point_without_a_step_keeps_its_bits_and_leaves_no_slack_to_the_others():
    """Also one outside of the ball, to where it was moved unseen."""
    weights = inside(20, 30, count=2)
    opt = SGD(weights, lr=1.0)
    give(weights, 0, 1e-4)
    opt.step()
    assert 0.2 < min(slacks(opt)) < 0.4
    weights[0].data.mul_(3)
    before = weights[0].detach().clone()
    for scale in (0.5, 0.02, 0.02, 0.02, 0.02, 0.02, 0.02):  # first by more than the slack
        weights[0].grad, weights[1].grad = torch.zeros_like(before), -scale * weights[1].detach()
        opt.step()
        assert torch.equal(weights[0], before)
        assert excess(weights[1]) <= tolerance(weights[1])
    assert excess(weights[1]) > -1e-3


@pytest.mark.parametrize("count", [1, 3])
def test_a_gradient_that_is_not_finite_is_skipped_and_its_neighbours_stay_bounded(count):
    weights = inside(20, 30, count=count)
    opt = SGD(weights, lr=1.0)
    train_scale = 1e-4
    give(weights, 0, train_scale)
    opt.step()
    give(weights, 1, train_scale)
    opt.step()
    assert min(slacks(opt)) > 0.2
    before = weights[0].detach().clone()
    for _ in range(28):  # the others grow by a twentieth each step, where the first does not move
        for p in weights:
            p.grad = -0.05 * p.detach()
        weights[0].grad[3, 4] = torch.nan
        opt.step()
        assert torch.equal(weights[0], before)
        assert max(map(excess, weights)) <= tolerance(weights[0])
        for p in weights:  # and no slack of before is left for this step
            p.grad = -1e-4 * p.detach()
        weights[0].grad.zero_()
        opt.step()
        assert torch.equal(weights[0], before)
        assert max(map(excess, weights)) <= tolerance(weights[0])
    assert opt.metrics()["skipped_blocks"] == 28
    if count > 1:
        assert excess(weights[1]) > -1e-3


def test_a_step_to_what_is_not_finite_is_skipped():
    (p,) = inside(6, 9)
    before, opt = p.detach().clone(), SGD([p], lr=1e30)
    p.grad = torch.ones_like(p).index_fill_(0, torch.tensor(2), 1e10)
    opt.step()
    assert torch.equal(p, before)
    assert opt.metrics()["skipped_blocks"] == 1


def test_what_float16_cannot_hold_leaves_no_slack():
    """The end of a step that is lost is not where the point stays."""
    p = mark_spectral(nn.Parameter(torch.tensor([[6e4, 0.0], [0.0, 10.0]], dtype=torch.float16)), bound=1e5)
    opt = SGD([p], lr=1.0)
    p.grad = torch.tensor([[-3e4, 0.0], [0.0, -1.0]], dtype=torch.float16)
    opt.step()
    assert p[1, 1] == 10
    assert slacks(opt) == [0.0]


@each(shape=[(6, 9), (300, 280)], count=[1, 3], dtype=DTYPES, at_bound=["all", "few"])
def test_steps_that_expect_to_be_clipped_have_the_bits_of_others(shape, count, dtype, at_bound):
    """Also where a step is so short that it is rounding, or turns back inside: then the expectation is wrong."""
    given, expected = (inside(*shape, count=count, dtype=dtype) for _ in range(2))
    for p in (*given, *expected):
        u, s, vh = torch.linalg.svd(p.detach(), full_matrices=False)
        p.data = ((torch.ones_like(s) if at_bound == "all" else s / s[3]).clamp_max(1) * u) @ vh
    ours, fresh = SGD(given, lr=1.0), SGD(expected, lr=1.0)
    expecting = 0
    for step, length in enumerate([*(10.0**-k for k in range(2, 9)), 1e-3, -1e-3, 1e-3, 0.1, -0.5, 1e-2, 1e-2]):
        for bucket in buckets_of(fresh) if step else ():
            bucket.forget_slack()
        for params, opt in ((given, ours), (expected, fresh)):
            for p in params:
                p.grad = -length * (p.detach() + gaussian(*p.shape, dtype=dtype, seed=step) / sum(shape) ** 0.5)
            opt.step()
        expecting += max(slacks(ours)) < 0
        assert all(torch.equal(p, q) for p, q in zip(given, expected, strict=True)), length
    assert expecting > 4
