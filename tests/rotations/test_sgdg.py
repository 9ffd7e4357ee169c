"""SGDG against Algorithm 1 of its paper in float64, and as an optimizer: groups, checkpoints, faults, precision."""

import copy
import inspect

import pytest
import torch
from torch import nn

from manifold_opt import (
    SGD,
    constraint_of,
    mark_orthogonal,
    mark_unit_norm,
    nearest_orthogonal,
    orthogonality_error,
    unmark,
)
from manifold_opt.rotations import SGDG

from ..helpers import buckets_of, gaussian, never_read, point
from ..reference import loop
from ..reference.cayley_sgd import cayley_sgd

SHAPES = [(6, 6), (1, 1), (5, 12), (12, 5), (1, 9), (3, 300)]  # the last in two slabs of columns
ITERATIONS = 60  # a step that is cut has a spectral norm of 1 at most: an error of 2 (1/2)^62
CLOSE = {"rtol": 0, "atol": 1e-12}  # a few roundings of float64 in each of a few steps


def stepped(x, gradients, **options):
    """The parameter after steps from ``x``, and its optimizer."""
    p = nn.Parameter(x.clone())
    opt = SGDG([p], **{"lr": 1.5, "stiefel": True, **options})
    for g in gradients:
        p.grad = g.to(p.dtype)
        opt.step()
    return p.detach(), opt


def gradients_of(shape, scale, steps=4):
    """Of these sizes every second step is cut at ``lr=1.5``, or none, or all."""
    return [scale * (1e-3 if scale == 1 and k % 2 else 1) * gaussian(*shape, seed=k + 1) for k in range(steps)]


def algorithm_1(p, gradients, lr, momentum=0.0):
    """A parameter after steps of the paper's algorithm on X, its transpose unless it is tall; how many were cut."""
    tall = p.shape[0] > p.shape[1]
    x, cut = (p if tall else p.mT), 0
    m = torch.zeros_like(x)
    for g in gradients:
        x, m, alpha = cayley_sgd(x, g if tall else g.mT, m, lr=lr, momentum=momentum, s=ITERATIONS)
        cut += float(alpha) < lr
    return (x if tall else x.mT), cut


def stored_momentum(x, gradients, lr, momentum, dampening=0.0, nesterov=False):
    """The same with the momentum of the oracle, moved along with the frame of a square block, and solved steps."""
    if x.shape[0] > x.shape[1]:
        return stored_momentum(x.mT, [g.mT for g in gradients], lr, momentum, dampening, nesterov).mT
    rule = loop.Momentum(momentum, dampening, nesterov)
    for g in gradients:
        v = -rule.direction(x, g)
        size = loop.generator(x, v).abs().sum(0).max()
        x = loop.cayley(x, min(lr, 1 / float(size + 1e-8)) * v)
    return x


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scale", "cut"), [(1e-4, 0), (1.0, 2), (100.0, 4)])
def test_its_steps_are_those_of_algorithm_1(shape, scale, cut):
    x, gradients = point(*shape), gradients_of(shape, scale)
    expected, found = algorithm_1(x, gradients, 1.5)
    assert found == (cut if shape != (1, 1) else 0)  # a number has no tangent
    torch.testing.assert_close(stepped(x, gradients)[0], expected, **CLOSE)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"dampening": 0.3}, {"nesterov": True}])
def test_its_momentum_is_stored_and_moved_to_the_next_point(shape, options):
    x, gradients = point(*shape), gradients_of(shape, 1.0)
    options = {"momentum": 0.9, **options}
    result, _ = stepped(x, gradients, **options)
    torch.testing.assert_close(result, stored_momentum(x, gradients, 1.5, **options), **CLOSE)
    if shape[0] != shape[1]:
        assert (result - stepped(x, gradients)[0]).norm() > 1e-2  # of the published class both are the same
        if len(options) == 1:
            torch.testing.assert_close(result, algorithm_1(x, gradients, 1.5, 0.9)[0], **CLOSE)


def test_a_step_worked_by_hand():
    """X = I and G = 2 E_12: W = [[0, -1], [1, 0]], cut from 1.5 to 1, a turn by 2 arctan(1/2): 3/5 and 4/5."""
    x, _ = stepped(torch.eye(2, dtype=torch.float64), [torch.tensor([[0.0, 2.0], [0.0, 0.0]])])
    torch.testing.assert_close(x, torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=torch.float64), rtol=0, atol=1e-7)


def test_below_the_bound_it_is_sgd():
    x, gradients = point(8, 8), gradients_of((8, 8), 1e-4)
    w = mark_orthogonal(nn.Parameter(x.clone()))
    opt = SGD([w], lr=1.5, momentum=0.9, retraction="cayley")
    for g in gradients:
        w.grad = g
        opt.step()
    assert torch.equal(stepped(x, gradients, momentum=0.9)[0], w)


@pytest.mark.parametrize("blocks", [{"blocks": 3}, {"blocks": 3, "which": (0, 2)}, {"flatten": False}])
def test_every_block_is_cut_by_itself(blocks):
    """Stacked or in a batch, and with other parameters in a bucket; rows in no block are torch's."""
    x = torch.cat([point(6, 6, seed=k) for k in range(3)])
    scale = torch.tensor([1e-4, 1.0, 100.0], dtype=torch.float64).repeat_interleave(6)[:, None]
    shape = (3, 6, 6) if "flatten" in blocks else (18, 6)
    params = [mark_orthogonal(nn.Parameter(x.view(shape).clone()), **blocks) for _ in range(2)]
    opt = SGDG(params, 1.5, 0.9, stiefel=True)
    gradients = [scale * gaussian(18, 6, seed=k) for k in range(3)]
    for g in gradients:
        for sign, p in zip((1, -1), params, strict=True):
            p.grad = (sign * g).view(shape)
        opt.step()
    assert len(buckets_of(opt)) == len(blocks.get("which", (0,)))
    for sign, p in zip((1, -1), params, strict=True):
        for k in blocks.get("which", range(3)):
            rows = slice(6 * k, 6 * k + 6)
            expected = stored_momentum(x[rows], [sign * g[rows] for g in gradients], 1.5, 0.9)
            torch.testing.assert_close(p.detach().view(18, 6)[rows], expected, **CLOSE)


def test_at_the_bound_neither_the_rate_nor_the_size_of_the_gradient_matters():
    """But for the epsilon, of which the first gradient has 1e-8 / 100."""
    x, (g,) = point(7, 7), gradients_of((7, 7), 100.0, 1)
    reached, _ = stepped(x, [g])
    for lr, factor in [(1e9, 1), (1.5, 1e6), (torch.tensor(15.0), 10)]:
        torch.testing.assert_close(stepped(x, [factor * g], lr=lr)[0], reached, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 6), (5, 12)])
def test_where_no_value_is_read_its_steps_are_the_same(monkeypatch, shape):
    x, gradients = point(*shape), gradients_of(shape, 1.0)
    expected, _ = stepped(x, gradients, momentum=0.9)
    never_read(monkeypatch)
    torch.testing.assert_close(stepped(x, gradients, momentum=0.9)[0], expected, **CLOSE)


def test_a_unitary_block_is_cut_too():
    x, gradients = point(6, 6, dtype=torch.complex128), [gaussian(6, 6, dtype=torch.complex128, seed=k) for k in (1, 2)]
    result, _ = stepped(x, gradients, momentum=0.9)
    torch.testing.assert_close(result, stored_momentum(x, gradients, 1.5, 0.9), **CLOSE)


def test_bfloat16_steps_are_those_of_float32_behind_it():
    x, gradients = point(16, 16, dtype=torch.float32), [g.bfloat16() for g in gradients_of((16, 16), 1.0)]
    exact, _ = stepped(nearest_orthogonal(x.bfloat16().float()), [g.float() for g in gradients], momentum=0.9)
    low, opt = stepped(x.bfloat16(), gradients, momentum=0.9)
    assert low.dtype == torch.bfloat16
    assert torch.equal(low, exact.bfloat16())
    assert {value.dtype for value in opt.state_dict()["state"][0].values()} == {torch.float32}


def test_a_block_with_a_nan_stays_and_is_counted():
    x = torch.cat([point(4, 4, seed=k) for k in range(2)])
    w = mark_orthogonal(nn.Parameter(x.clone()), blocks=2)
    opt = SGDG([w], 1.5, stiefel=True)
    w.grad = gaussian(8, 4)
    w.grad[0, 0] = torch.nan
    opt.step()
    assert torch.equal(w[:4], x[:4])
    torch.testing.assert_close(w[4:].detach(), stepped(x[4:], [w.grad[4:]])[0], **CLOSE)
    assert opt.metrics()["skipped_blocks"] == 1


def test_its_arguments_are_those_of_the_published_class():
    """In their order, with their defaults, but for that of lr, which is torch's: groups with an lr are enough."""
    arguments = inspect.signature(SGDG).parameters.values()
    published = {x.name: x.default for x in arguments if x.kind is x.POSITIONAL_OR_KEYWORD}
    assert list(published.items()) == [
        *(("params", inspect.Parameter.empty), ("lr", 1e-3), ("momentum", 0), ("dampening", 0), ("weight_decay", 0)),
        *(("nesterov", False), ("stiefel", False), ("omega", 0), ("grad_clip", None)),
    ]


def test_groups_without_stiefel_are_those_of_torch():
    """Bit for bit; a group may set any argument."""
    ours, theirs = (nn.ParameterList([point(3, 4), torch.ones(5).double(), point(6, 6)]) for _ in range(2))
    plain = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True}
    groups = [{"params": list(ours)[:2], **plain}, {"params": [ours[2]], "lr": 1.5, "stiefel": True}]
    opt, reference = SGDG(groups, 0.1), torch.optim.SGD(list(theirs)[:2], 0.1, **plain)
    for seed in range(3):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = q.grad = gaussian(*p.shape, seed=seed)
        opt.step()
        reference.step()
    assert all(map(torch.equal, ours[:2], theirs[:2]))
    assert [constraint_of(p) is not None for p in ours] == [False, False, True]
    expected = stored_momentum(theirs[2].detach(), [gaussian(6, 6, seed=seed) for seed in range(3)], 1.5, 0.0)
    torch.testing.assert_close(ours[2].detach(), expected, **CLOSE)
    assert isinstance(opt, torch.optim.SGD)


def test_parameters_are_marked_and_moved_to_the_nearest_point():
    start = [gaussian(4, 4), gaussian(4, 2, 3), gaussian(6, 2)]
    params = [nn.Parameter(x.clone()) for x in start]
    opt = SGDG(params[:1], lr=1.5, stiefel=True)
    opt.add_param_group({"params": params[1:]})
    for p, x in zip(params, start, strict=True):
        torch.testing.assert_close(p.detach().flatten(1), nearest_orthogonal(x.flatten(1)))
    for p in params:
        p.grad = gaussian(*p.shape)
    opt.step()
    assert max(map(orthogonality_error, params)) < 1e-14
    exact = mark_orthogonal(nn.Parameter(point(5, 5)))
    bits = exact.detach().clone()
    SGDG([exact], lr=1.5, stiefel=True)
    assert torch.equal(exact, bits)


def test_a_group_that_becomes_one_of_stiefel_later_is_marked_by_its_next_step():
    early, late = (nn.Parameter(gaussian(4, 6)) for _ in range(2))
    steps = []
    for weight, stiefel in ((early, True), (late, False)):
        steps.append(SGDG([weight], lr=0.1, momentum=0.9, stiefel=stiefel))
        weight.grad = gaussian(4, 6, seed=1)
    steps[1].param_groups[0]["stiefel"] = True
    for opt in steps:
        opt.step()
    assert constraint_of(late) == constraint_of(early) is not None
    assert torch.equal(late, early)
    late.grad, vector = None, nn.Parameter(torch.ones(3))
    steps[1].add_param_group({"params": [vector], "stiefel": False})
    steps[1].param_groups[1]["stiefel"] = True
    with pytest.raises(ValueError, match="must have at least 2 dimensions"):
        steps[1].step()
    unmark(early)
    steps[0].step()
    assert constraint_of(early) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"omega": 0.1}, "omega must be 0.*Leave it out"),
        ({"grad_clip": 1.0}, "grad_clip must be None.*clip_grad_norm_"),
        ({"lr": float("inf")}, "lr must be finite.*1e9"),
        ({"stiefel": 1}, "stiefel must be True or False"),
        ({"retraction": "qr"}, "sets retraction, which SGDG does not have.*use SGD"),
        ({"orthogonal_lr_scale": -1.0}, "orthogonal_lr_scale must be"),
        ({"nesterov": True}, None),
    ],
)
def test_what_would_have_no_effect_is_refused(options, message):
    """As an argument and in a group, and nothing is marked."""
    p = nn.Parameter(gaussian(3, 3))
    if message is None:
        with pytest.raises(ValueError, match="Nesterov"):
            SGDG([p], 1.5, **options)
        return
    others = [{}] if options.get("retraction") else [{}, {"lr": 1.5, "stiefel": True, **options}]
    for arguments in others:
        group = {"params": [p]} if arguments else {"params": [p], **options}
        with pytest.raises(ValueError, match=message):
            SGDG([{"params": [nn.Parameter(point(2, 2))]}, group], **(arguments or {"lr": 1.5, "stiefel": True}))
    assert constraint_of(p) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.Parameter(torch.ones(3)), r"shape \(3,\).*at least 2 dimensions.*stiefel=False"),
        (nn.Parameter(torch.zeros(2, 2)), "stiefel=True: "),
        (mark_unit_norm(nn.Parameter(torch.ones(2, 2))), "is marked as UnitNorm.*stiefel=False.*unmark"),
    ],
)
def test_a_group_with_a_parameter_that_cannot_be_marked_changes_none(other, message):
    p, late = nn.Parameter(gaussian(3, 3)), nn.Parameter(gaussian(3, 3))
    before = p.detach().clone()
    with pytest.raises(ValueError, match=message):
        SGDG([p, other], lr=1.5, stiefel=True)
    assert constraint_of(p) is None
    assert torch.equal(p, before)
    opt = SGDG([p], lr=1.5, stiefel=True)
    with pytest.raises(ValueError, match=message):
        opt.add_param_group({"params": [late, other]})
    assert constraint_of(late) is None
    assert len(opt.param_groups) == 1


def test_a_run_goes_on_from_its_checkpoint_bit_for_bit():
    x, gradients = point(6, 6), gradients_of((6, 6), 1.0, 6)
    expected, _ = stepped(x, gradients, momentum=0.9)
    middle, opt = stepped(x, gradients[:3], momentum=0.9)
    saved = copy.deepcopy(opt.state_dict())
    for resumed in (nn.Parameter(middle.clone()), copy.deepcopy(opt).param_groups[0]["params"][0]):
        fresh = SGDG([resumed], lr=0.1, stiefel=False)
        if constraint_of(resumed) is None:
            mark_orthogonal(resumed)
        fresh.load_state_dict(copy.deepcopy(saved))
        assert fresh.param_groups[0]["stiefel"] is True
        for g in gradients[3:]:
            resumed.grad = g
            fresh.step()
        assert torch.equal(resumed, expected)


@pytest.mark.parametrize("other", [SGD, torch.optim.SGD])
def test_a_checkpoint_of_another_sgd_keeps_the_options_of_this_class(other):
    theirs, ours = (nn.Parameter(point(4, 4)) for _ in range(2))
    first = other([theirs], lr=0.1, momentum=0.9)
    theirs.grad = ours.grad = gaussian(4, 4)
    first.step()
    opt = SGDG([ours], lr=1.5, stiefel=True)
    opt.load_state_dict(first.state_dict())
    assert (opt.param_groups[0]["stiefel"], opt.param_groups[0]["grad_clip"]) == (True, None)
    opt.step()
    assert orthogonality_error(ours) < 1e-14
