"""Every rank takes the same step, or every rank raises an error: none waits for another, and none goes its own way."""

import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Shard

from manifold_opt import SGD, Adam, constraint_of, mark_orthogonal, orthogonality_error, unmark
from manifold_opt.optim import base

from .layouts import LAYOUTS, Gradients, build, rows, sharded, train, whole
from .workers import Pool, run

BLOCKS = {"aligned": (0, 4), "cut": (1, 3), "Shard(1)": (1, 3)}  # a weight with several blocks, and their number


def values(net):
    return [whole(p) for p in net.parameters()]


def with_a_nan(layout, world, nonfinite):
    """A step in which one entry of a gradient on the last rank is NaN, and the next one."""
    net = build(layout)
    net.append(nn.Linear(8, 8))
    LAYOUTS[layout].shard(net, world)
    opt = Adam(net.parameters(), nonfinite=nonfinite)
    gradients = Gradients(list(net.parameters()))
    gradients.give(0)
    opt.step()
    found, before = [values(net)], opt.state_dict()["state"]
    before = [{key: whole(value) for key, value in entry.items()} for entry in before.values()]
    gradients.give(1)
    if dist.get_rank() == world - 1:
        net[BLOCKS[layout][0]].weight.grad.to_local()[-1, -1] = torch.nan
    if nonfinite == "raise":
        with pytest.raises(FloatingPointError, match="is not finite"):
            opt.step()
        after = [{key: whole(value) for key, value in entry.items()} for entry in opt.state_dict()["state"].values()]
        assert all(
            a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a) for a, b in zip(before, after, strict=True)
        )
    else:
        opt.step()
    found.append(values(net))
    counts = opt.metrics()["skipped_blocks"]
    gradients.give(2)
    opt.step()
    return [*found, values(net)], counts, max(orthogonality_error(net).values())


@pytest.mark.parametrize(("layout", "world"), [("aligned", 4), ("cut", 4), ("Shard(1)", 2)])
def test_a_block_whose_gradient_is_not_finite_on_one_rank_is_skipped_on_all(layout, world):
    index, blocks = BLOCKS[layout]
    ranks = run(world, with_a_nan, layout, world, "skip")
    for (first, second, third), skipped, error in ranks:
        for k, (a, b, c) in enumerate(zip(first, second, third, strict=True)):
            pieces = zip(a.chunk(blocks), b.chunk(blocks), strict=True) if k == index else [(a, b)]
            still = [torch.equal(x, y) for x, y in pieces]
            assert still == ([False] * (blocks - 1) + [True] if k == index else [False])
            assert not torch.equal(b[-1], c[-1])
        assert skipped == 1
        assert error < 1e-5
        assert all(map(torch.equal, third, ranks[0][0][2]))


@pytest.mark.parametrize(("layout", "world"), [("aligned", 4), ("cut", 2)])
def test_or_raises_on_all_ranks_before_anything_is_written(layout, world):
    for (first, second, third), _, _ in run(world, with_a_nan, layout, world, "raise"):
        assert all(map(torch.equal, first, second))
        assert not any(map(torch.equal, second, third))


def net_of_two():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 24), nn.Linear(24, 24))
    mark_orthogonal(net, "1.weight")
    return net


def disagreeing(how):
    """What goes wrong on one rank, the error of a step, and how it goes on once that has been put right."""
    net, odd = net_of_two(), dist.get_rank() == 1
    if how in ("not marked", "blocks", "gain"):
        mark_orthogonal(
            net, "0.weight", blocks=1 if how == "blocks" and odd else 3, gain=2.0 if how == "gain" and odd else 1.0
        )
        if how == "not marked" and odd:
            unmark(net, "0.weight")
    else:
        mark_orthogonal(net, "0.weight", blocks=3)
    rows(net, dist.get_world_size())
    names = [(name, p) for name, p in net.named_parameters() if not (how == "left out" and odd and name == "0.weight")]
    opt = SGD(names, lr=0.1)
    gradients = Gradients(list(net.parameters()))
    gradients.give(0)
    if how == "no gradient" and odd:
        net[0].weight.grad = None
    if how == "later":
        opt.step()
        gradients.give(1)
        if odd:
            unmark(net, "0.weight")
    before = values(net)
    with pytest.raises(ValueError, match="ranks disagree") as error:
        opt.step()
    assert all(map(torch.equal, before, values(net)))
    unmark(net, "0.weight")
    if how == "left out" and odd:
        opt.add_param_group({"params": [("0.weight", net[0].weight)]})
    if how != "left out":
        mark_orthogonal(net, "0.weight", blocks=3)
        gradients.give(2)
        opt.step()
        assert max(orthogonality_error(net).values()) < 1e-5
        assert list(constraint_of(net)) == ["0.weight", "1.weight"]
    return str(error.value)


@pytest.mark.parametrize("how", ["not marked", "blocks", "gain", "left out", "no gradient", "later"])
def test_a_rank_that_disagrees_raises_on_all_with_the_name(how):
    messages = run(4, disagreeing, how)
    assert len(set(messages)) == 1
    assert "0.weight" in messages[0]


def only_one_is_marked(how):
    """Nothing is marked on the other ranks, or they have no gradient at all."""
    net = nn.Sequential(nn.Linear(8, 24))
    if how != "marked" or dist.get_rank() == 1:
        mark_orthogonal(net, "0.weight", blocks=3)
    rows(net, dist.get_world_size())
    opt = Adam(net.named_parameters())
    if how != "gradients" or dist.get_rank() == 1:
        Gradients(list(net.parameters())).give(0)
    with pytest.raises(ValueError, match="ranks disagree") as error:
        opt.step()
    return str(error.value)


@pytest.mark.parametrize("how", ["marked", "gradients"])
def test_one_rank_alone_does_something(how):
    messages = run(4, only_one_is_marked, how)
    assert len(set(messages)) == 1
    assert "0.weight" in messages[0]


def an_error_of_one_rank():
    """An option that is out of range on one rank only."""
    net = net_of_two()
    rows(net, dist.get_world_size())
    opt = SGD(net.named_parameters(), lr=0.1)
    train(net.parameters(), opt, 1)
    before = values(net)
    if dist.get_rank() == 1:
        opt.param_groups[0]["retraction"] = "none such"
    Gradients(list(net.parameters())).give(1)
    with pytest.raises(ValueError, match="none such"):
        opt.step()
    return all(map(torch.equal, before, values(net)))


def test_an_error_of_one_rank_is_raised_on_all():
    assert all(run(4, an_error_of_one_rank))


def an_error_in_a_whole_weight(is_new):
    """A weight beside the shards cannot be projected on one rank; it is put right, and the step is taken again."""
    net, other = net_of_two(), mark_orthogonal(nn.Parameter(torch.eye(4)))
    rows(net, dist.get_world_size())
    opt = SGD([*net.parameters(), other], lr=0.1)
    other.grad = torch.ones(4, 4).tril()
    if not is_new:
        train(net.parameters(), opt, 2)
    before = [*values(net), other.detach().clone()]
    if dist.get_rank() == 1:
        with torch.no_grad():
            other[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        train(net.parameters(), opt, 1, first=2)
    with torch.no_grad():
        other.copy_(before[-1])
    assert all(map(torch.equal, before, [*values(net), other]))
    train(net.parameters(), opt, 1, first=2)
    assert not any(map(torch.equal, before, [*values(net), other]))
    return max(orthogonality_error(net).values())


@pytest.mark.parametrize("is_new", [False, True])
def test_an_error_in_a_weight_beside_the_shards_is_raised_on_all(is_new):
    assert max(run(2, an_error_in_a_whole_weight, is_new)) < 1e-5


def an_error_within_the_step():
    """The rank that owns the block fails while it steps it."""
    net = net_of_two()
    rows(net, dist.get_world_size())
    opt = SGD(net.parameters(), lr=0.1)
    train(net.parameters(), opt, 1)
    step, before, raised = base._step_constrained, values(net), False
    if dist.get_rank() == 0:
        base._step_constrained = lambda *_: 1 / 0
    try:
        train(net.parameters(), opt, 1, first=1)
    except ZeroDivisionError:
        raised = True
    base._step_constrained = step
    train(net.parameters(), opt, 1, first=2)
    return raised, not torch.equal(values(net)[2], before[2]), max(orthogonality_error(net).values()) < 1e-5


def test_an_error_within_the_step_does_not_keep_the_others_waiting():
    assert run(2, an_error_within_the_step) == [(True, True, True), (False, True, True)]


def with_another_history(how):
    """Two steps on every rank, but one rank then has a new optimizer, or no state."""
    net = net_of_two()
    rows(net, dist.get_world_size())
    opt = Adam(net.named_parameters())
    train(net.parameters(), opt, 2)
    if dist.get_rank() == 1:
        if how == "a new optimizer":
            opt = Adam(net.named_parameters())
        else:
            opt.state.clear()
    before = values(net)
    with pytest.raises(ValueError, match="ranks disagree") as error:
        train(net.parameters(), opt, 1)
    assert all(map(torch.equal, before, values(net)))
    return str(error.value)


@pytest.mark.parametrize(("how", "says"), [("a new optimizer", "the optimizer"), ("no state", "1.weight")])
def test_a_rank_with_another_history_raises_on_all(how, says):
    messages = run(2, with_another_history, how)
    assert len(set(messages)) == 1
    assert says in messages[0]


def on_parts_of_a_mesh(together):
    """Weights on one dimension of a mesh each, as in a stage of a pipeline; the gradient of the last rank is NaN."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    meshes = [both["columns"], both["rows"]] if together else [both["columns"]]
    weights = [mark_orthogonal(nn.Parameter(sharded(torch.eye(8), mesh, [Shard(0)]))) for mesh in meshes]
    opt = SGD(weights, lr=0.1, nonfinite="raise")
    train(weights, opt, 1)
    Gradients(weights).give(1)
    if dist.get_rank() == 3:
        weights[0].grad.to_local()[0, 0] = torch.nan
    try:
        opt.step()
    except FloatingPointError:
        return True
    return False


@pytest.mark.parametrize("together", [True, False])
def test_an_error_reaches_all_ranks_that_are_connected(together):
    assert run(4, on_parts_of_a_mesh, together) == ([True] * 4 if together else [False, False, True, True])


def beside_a_mesh():
    """The weight is on the first two ranks, a replicated one on all; then only the replicated one is left."""
    torch.manual_seed(0)
    weight = nn.Parameter(sharded(torch.eye(8), DeviceMesh("cpu", [0, 1]), [Shard(0)]))
    other = mark_orthogonal(nn.Parameter(torch.eye(4)))
    inside = dist.get_rank() < 2
    if inside:
        mark_orthogonal(weight)
    opt = SGD([weight, other], lr=0.1)
    for step in range(4):
        if step == 3:
            opt.param_groups[0]["params"].remove(weight)
        elif inside:
            Gradients([weight]).give(step)
        other.grad = torch.randn(4, 4)
        opt.step()
    return other.detach(), opt._engine.sharded is None


def test_a_rank_outside_the_mesh_steps_the_other_weights():
    found = run(3, beside_a_mesh)
    assert all(torch.equal(other, found[0][0]) for other, _ in found)
    assert all(is_released for _, is_released in found)


def killed(when):
    """One rank ends in the middle of training; the others say how long they wait for an error."""
    net = net_of_two()
    rows(net, dist.get_world_size())
    opt = SGD(net.parameters(), lr=0.1)
    train(net.parameters(), opt, 2)
    if dist.get_rank() == 2:
        if when == "between":
            os._exit(1)
        dist.all_to_all_single = lambda *_: os._exit(1)
    start = time.monotonic()
    try:
        train(net.parameters(), opt, 3, first=2)
    except RuntimeError:
        return time.monotonic() - start
    raise AssertionError("nothing has gone wrong")


@pytest.mark.parametrize("when", ["between", "within"])
def test_when_a_rank_dies_the_others_end_with_an_error(when):
    """At once, because its connections are closed, or after the time that the process group allows."""
    pool = Pool(4, patience=timedelta(seconds=5))
    try:
        found = pool.outcomes(killed, when, timeout=40)
    finally:
        pool.stop()
    assert found.pop(2)[0] is False
    assert sorted(found) == [0, 1, 3]
    assert all(well and waited < 30 for well, waited in found.values()), found


def another_learning_rate():
    """A scheduler that follows the loss of its own rank would do this."""
    net = net_of_two()
    rows(net, dist.get_world_size())
    opt = SGD(net.named_parameters(), lr=0.1)
    train(net.parameters(), opt, 2)
    opt.param_groups[0]["lr"] = 0.1 if dist.get_rank() else 0.2
    Gradients(list(net.parameters())).give(2)
    with pytest.raises(ValueError, match="the ranks disagree about the options of group 0"):
        opt.step()
    return True


def test_options_that_differ_are_refused():
    assert all(run(2, another_learning_rate))


def an_error_of_torchs_step():
    """It comes after the ranks have agreed, so the others cannot raise it; but they do not wait either."""
    net = net_of_two()
    rows(net, dist.get_world_size())
    opt = SGD(net.parameters(), lr=0.1)
    train(net.parameters(), opt, 2)
    Gradients(list(net.parameters())).give(2)
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            patch.setattr(base, "_step_unconstrained", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                opt.step()
        else:
            opt.step()
    train(net.parameters(), opt, 1, first=3)
    return [whole(p) for p in net.parameters() if constraint_of(p) is not None]


def test_an_error_of_torchs_step_leaves_no_rank_waiting():
    first, *others = run(2, an_error_of_torchs_step)
    assert first
    for other in others:
        assert all(map(torch.equal, first, other))
