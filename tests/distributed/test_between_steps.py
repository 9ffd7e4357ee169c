"""What happens between steps: values written from outside, options, groups and marks that change, scaled gradients."""

import copy
import functools
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler
from torch.distributed.tensor import DTensor, Replicate

from manifold_opt import Adam, check, constraint_of, mark_orthogonal, mark_unit_norm, orthogonality_error, unmark

from ..helpers import gaussian
from .layouts import LAYOUTS, Gradients, build, like, optimizer, train, whole
from .workers import mesh, run

EVENTS = {}


def event(function):
    """Something that happens to a model and its optimizer between steps."""
    EVENTS[function.__name__.replace("_", " ")] = function
    return function


def values(net):
    return [whole(p) for p in net.parameters()]


@event
def averages_are_swapped_in(net, opt):
    averages = [p.detach().clone() for p in net.parameters()]
    train(net.parameters(), opt, 2, first=20)
    with torch.no_grad():
        for p, average in zip(net.parameters(), averages, strict=True):
            average.lerp_(p, 0.5)
            p.copy_(average)


@event
def a_model_is_loaded(net, opt):
    state = {key: value.clone() * 1.1 for key, value in net.state_dict().items()}
    train(net.parameters(), opt, 2, first=20)
    net.load_state_dict(state)


@event
def weights_are_written_to(net, _):
    with torch.no_grad():
        for k, p in enumerate(net.parameters()):
            p.add_(like(gaussian(*p.shape, dtype=torch.float32, seed=k), p), alpha=0.1)


@event
def shards_are_written_to(net, _):
    with torch.no_grad():
        for p in net.parameters():
            (p.to_local() if isinstance(p, DTensor) else p).mul_(1.1)


@event
def one_rank_writes_to_its_shard(net, _):
    """The last entry of the whole, which the last rank has."""
    with torch.no_grad():
        p = net[0].weight
        if not isinstance(p, DTensor):
            p[-1, -1] += 0.1
        elif dist.get_rank() == dist.get_world_size() - 1:
            p.to_local()[-1, -1] += 0.1


@event
def the_learning_rate_changes(_, opt):
    for group in opt.param_groups:
        group["lr"] *= 0.5


@event
def the_retraction_changes(_, opt):
    for group in opt.param_groups:
        group["retraction"] = "qr"


@event
def a_group_is_added(net, opt):
    (group,) = opt.param_groups
    last = group["params"].pop()
    opt.add_param_group({"params": [last], "lr": 0.001})
    assert last is list(net.parameters())[-1]


@event
def a_weight_is_marked(net, _):
    mark_orthogonal(net, "3.weight")


@event
def a_weight_is_unmarked(net, _):
    unmark(net, "0.weight")


@event
def a_weight_is_marked_otherwise(net, _):
    unmark(net, "0.weight")
    mark_unit_norm(net, "0.weight")


@event
def some_have_no_gradient(net, opt):
    gradients = Gradients(list(net.parameters()))
    for step in range(20, 23):
        gradients.give(step)
        net[step % 2].weight.grad = None
        opt.step()


@event
def gradients_are_replicated(net, opt):
    for step in range(20, 22):
        for k, p in enumerate(net.parameters()):
            grad = gaussian(*p.shape, dtype=torch.float32, seed=50 * step + k)
            everywhere = [Replicate()] * p.device_mesh.ndim if isinstance(p, DTensor) else None
            p.grad = (
                grad if everywhere is None else DTensor.from_local(grad, p.device_mesh, everywhere, run_check=False)
            )
        opt.step()


@event
def a_closure_is_given(net, opt):
    gradients = Gradients(list(net.parameters()))

    def closure():
        gradients.give(30)
        return 3.0

    assert opt.step(closure) == 3.0


@event
def the_state_is_cleared(_, opt):
    opt.state.clear()


@event
def the_state_is_cleared_and_looked_at(_, opt):
    opt.state.clear()
    assert not any(len(opt.state[p]) for group in opt.param_groups for p in group["params"])


def happened(layout, world, name):
    net = build("Shard(1)")
    unmark(net, "3.weight")
    if layout is not None:
        LAYOUTS[layout].shard(net, world)
    opt = Adam(net.parameters(), lr=0.02)
    train(net.parameters(), opt, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        EVENTS[name](net, opt)
        train(net.parameters(), opt, 3, first=3)
    assert check(net, opt) == [], check(net, opt)
    far = sum("away from its manifold" in str(warning.message) for warning in caught)
    return values(net), constraint_of(net), max(orthogonality_error(net).values()), far


single = functools.cache(functools.partial(happened, None, 1))
PLACES = [("aligned", 4), ("Shard(1)", 2), ("hybrid", 4), ("rows, colwise", 4), ("rowwise", 2)]


@pytest.mark.parametrize("name", EVENTS)
def test_it_is_as_on_one_rank(name):
    place = PLACES[list(EVENTS).index(name) % len(PLACES)]
    if "shard" in name:
        place = ("aligned", 4)
    weights, marks, _, far = single(name)
    ranks = run(place[1], happened, *place, name)
    assert any(found_far for *_, found_far in ranks) == (far > 0)
    for found, found_marks, error, _ in ranks:
        assert found_marks == marks
        assert error < 1e-5
        for one, other in zip(weights, found, strict=True):
            # Rounding in other batches and of the nearest point, over a few steps.
            torch.testing.assert_close(other, one, rtol=0, atol=16 * 2**-23 * math.sqrt(max(one.shape)))


def scaled(world, kind):
    """Weights, counts of steps and the scale at the end, and whether a step with an infinite gradient did nothing."""
    net = build("Shard(1)")
    net.append(nn.Linear(8, 8, bias=False))
    nn.init.normal_(net[-1].weight, generator=torch.Generator().manual_seed(9))
    if world:
        LAYOUTS["aligned"].shard(net, world)
    options = {"fused": True, "nonfinite": "raise"} if kind == "fused" else {}
    opt = Adam(net.parameters(), lr=0.02, **options)
    scaler = ShardedGradScaler if kind == "sharded" else torch.amp.GradScaler
    scaler = scaler(device="cpu", init_scale=4.0, growth_interval=1000)
    gradients, still = Gradients(list(net.parameters())), []
    for step in range(6):
        scaler.scale(torch.zeros(()))
        gradients.give(step)
        for p in net.parameters():
            p.grad.mul_(scaler.get_scale())
        before = values(net)
        if step in (1, 3):
            grad = net[0].weight.grad
            if not world:
                grad[-1, -1] = torch.inf
            elif dist.get_rank() == world - 1:
                grad.to_local()[-1, -1] = torch.inf
        if step > 2:
            scaler.unscale_(opt)
        scaler.step(opt)
        scaler.update()
        still.append(all(map(torch.equal, before, values(net))))
    return values(net), still, scaler.get_scale(), [float(opt.state[p]["step"]) for p in net.parameters()]


@pytest.mark.parametrize("kind", ["plain", "sharded", "fused"])
def test_a_gradient_scaler(kind):
    """All ranks skip a step if the gradient of one of them is infinite."""
    weights, still, scale, steps = scaled(0, "plain")
    assert still == [False, True, False, True, False, False]
    for found, found_still, found_scale, found_steps in run(4, scaled, 4, kind):
        assert (found_still, found_scale, found_steps) == (still, scale, steps)
        for one, other in zip(weights, found, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=16 * 2**-23 * math.sqrt(max(one.shape)))


def made_on_meta(world):
    """A model that is constructed without memory, sharded, and then gets values from a checkpoint of rank 0."""
    torch.manual_seed(0)
    checkpoint = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12))
    mark_orthogonal(checkpoint, "0.weight")
    mark_orthogonal(checkpoint, "1.weight", blocks=3)
    state = {key: value.clone() for key, value in checkpoint.state_dict().items()}
    if not world:
        return [state], None
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12))
    fully_shard(net, mesh=mesh(world))
    net.to_empty(device="cpu")
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(net, state if dist.get_rank() == 0 else {}, options=options)
    mark_orthogonal(net, "0.weight")
    mark_orthogonal(net, "1.weight", blocks=3)
    opt = Adam(net.parameters(), lr=0.02)
    found = [{key: whole(value) for key, value in net.state_dict().items()}]
    train(net.parameters(), opt, 3)
    assert check(net, opt) == []
    return found, max(orthogonality_error(net).values())


def test_a_model_that_is_made_on_meta():
    ((state,), _) = made_on_meta(0)
    for (found,), error in run(4, made_on_meta, 4):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[key], state[key]) for key in state)
        assert error < 1e-5


def marked_on_meta():
    """Marks made on the model without memory, before it is sharded and gets values."""
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 12))
    mark_orthogonal(net, "0.weight")
    mark_orthogonal(net, "1.weight", blocks=3)
    fully_shard(net, mesh=mesh(dist.get_world_size()))
    net.to_empty(device="cpu")
    for p in net.parameters():
        with torch.no_grad():
            p.copy_(like(gaussian(*p.shape, dtype=torch.float32), p))
    opt = Adam(net.parameters(), lr=0.02)
    train(net.parameters(), opt, 3)
    assert check(net, opt) == []
    return list(constraint_of(net)), max(orthogonality_error(net).values())


def test_a_model_that_is_marked_on_meta():
    """As a whole one: its values are projected when they are there."""
    for names, error in run(4, marked_on_meta):
        assert names == ["0.weight", "1.weight"]
        assert error < 1e-5


def failed(world):
    """Momentum after a step that fails once it has been agreed on."""
    net, other = build("aligned"), mark_orthogonal(nn.Parameter(torch.eye(4)))
    if world:
        LAYOUTS["aligned"].shard(net, world)
    opt = Adam([*net.parameters(), other], lr=0.02)
    other.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(1))
    train(net.parameters(), opt, 2)
    value = other.detach().clone()
    with torch.no_grad():
        other.fill_(torch.nan)
    opt.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="not finite"):
        train(net.parameters(), opt, 1, first=2)
    with torch.no_grad():
        other.copy_(value)
    train(net.parameters(), opt, 2, first=2)
    return values(net)


def test_moments_survive_a_step_that_fails():
    for found in run(2, failed, 2):
        for one, other in zip(failed(0), found, strict=True):
            torch.testing.assert_close(other, one, rtol=0, atol=16 * 2**-23 * math.sqrt(max(one.shape)))


def copied():
    """An optimizer of shards is not copied without the other ranks."""
    net = build("aligned")
    LAYOUTS["aligned"].shard(net, 2)
    opt = Adam(net.parameters())
    train(net.parameters(), opt, 1)
    with pytest.raises(RuntimeError, match="cannot be copied or pickled"):
        copy.deepcopy(opt)


def test_an_optimizer_of_shards_is_not_copied():
    run(2, copied)


def reordered(world):
    """Write the rows in another order through ``.data``: every sum of the entries stays what it was."""
    net = build("cut")
    LAYOUTS["cut"].shard(net, world)
    opt = optimizer("SGD", net.parameters())
    train(net.parameters(), opt, 2)
    p = next(iter(net.parameters()))
    expected = whole(p).flip(0)
    p.to_local().data.copy_(like(expected, p).to_local())
    for q in net.parameters():
        q.grad = torch.zeros_like(q)
    opt.param_groups[0]["lr"] = 0.0
    opt.step()
    return expected, whole(p)


def test_rows_that_are_reordered_are_taken_up():
    for expected, found in run(2, reordered, 2):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
