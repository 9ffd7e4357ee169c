"""Sharded weights on one rank, whose shard is the whole, and what is refused. tests/distributed has several ranks."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from manifold_opt import (
    SGD,
    Adam,
    check,
    constraint_of,
    init,
    mark_orthogonal,
    mark_recurrent,
    mark_unit_norm,
    nearest_orthogonal,
    orthogonality_error,
    orthogonalize_,
    project_to_manifold_,
    retract,
    riemannian_gradient,
    unmark,
)
from manifold_opt.constraints.tag import TAG

try:
    from torch.distributed._composable.replicate_with_fsdp import replicate
except ImportError:  # of torch before 2.9
    replicate = None
if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13):  # torch 2.9 has other arguments
    replicate = None


# torch 2.6 warns of DTensors on a CPU, and trains none there under fully_shard.
pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators")
TRAINS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 7)


@pytest.fixture(scope="module", autouse=True)
def mesh():
    """One process is enough: its shard is the whole, and a DTensor all the same."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


WAYS = {
    "fully_shard": lambda net, mesh: fully_shard(net, mesh=mesh),
    "fully_shard, one layer": lambda net, mesh: fully_shard(net[0], mesh=mesh),
    "columns": lambda net, mesh: parallelize_module(net, mesh, {"0": ColwiseParallel()}),
    "rows": lambda net, mesh: parallelize_module(net, mesh, {"0": RowwiseParallel()}),
}
if replicate is not None:
    WAYS["replicate"] = lambda net, mesh: replicate(net, mesh=mesh)


def trains(way):
    if way.startswith("fully_shard") and not TRAINS:
        pytest.skip("FSDP2 trains on a CPU from torch 2.7 on")


def build(mark=mark_orthogonal):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 3))
    mark(net, "0.weight")
    return net


def train(net, steps=3, kind=Adam):
    opt = kind(net.parameters(), lr=0.1)
    for k in range(steps):
        opt.zero_grad()
        torch.manual_seed(k)
        net(torch.randn(2, 6)).sum().backward()
        opt.step()
    return opt


def whole(p):
    return p.full_tensor() if isinstance(p, DTensor) else p


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_model_trains_as_it_does_whole(way, kind, mesh):
    """On one rank to the bit; tests/distributed has more."""
    trains(way)
    net, sharded = build(), build()
    WAYS[way](sharded, mesh)
    assert isinstance(sharded[0].weight, DTensor)
    train(net, kind=kind)
    opt = train(sharded, kind=kind)
    assert constraint_of(sharded) == constraint_of(net) != {}
    assert check(sharded, opt) == []
    for p, q in zip(net.parameters(), sharded.parameters(), strict=True):
        assert torch.equal(p, whole(q))


@pytest.mark.parametrize("way", WAYS)
def test_weights_that_are_sharded_later_are_taken_up(way, mesh):
    """The groups of an optimizer may be given other parameters; the module remembers which of them are marked."""
    trains(way)
    net = build(mark_unit_norm)
    opt = train(net)
    opt.zero_grad()
    WAYS[way](net, mesh)
    opt.param_groups[0]["params"][:] = net.parameters()
    net(torch.ones(2, 6)).sum().backward()
    opt.step()
    assert check(net, opt) == []
    torch.testing.assert_close(whole(net[0].weight).detach().norm(dim=1), torch.ones(6))


@pytest.mark.parametrize("way", WAYS)
def test_check_says_what_another_optimizer_does(way, mesh):
    net = build()
    before = Adam(net.parameters())
    WAYS[way](net, mesh)
    assert any("has lost its constraint" in problem or "no longer has" in problem for problem in check(net, before))
    net.load_state_dict(net.state_dict())
    assert "0.weight is marked, but moved by torch.optim.adam.Adam" in check(net, torch.optim.Adam(net.parameters()))[0]


@pytest.mark.parametrize("way", WAYS)
def test_loading_marks_a_sharded_weight(way, mesh):
    net = build()
    marks = constraint_of(net)
    WAYS[way](net, mesh)
    net.load_state_dict(net.state_dict())
    assert getattr(net[0].weight, TAG, None) is not None
    assert constraint_of(net) == marks


@pytest.mark.parametrize("way", WAYS)
def test_a_sharded_weight_knows_its_mark_at_once(way, mesh):
    """Groups of parameters are often chosen by their marks, before there is an optimizer."""
    net = build()
    (constraint,) = constraint_of(net).values()
    WAYS[way](net, mesh)
    assert [constraint_of(p) for p in net.parameters()] == [constraint, None, None, None]
    unmark(net)
    assert constraint_of(net) == {}


def test_an_evaluation_hides_no_mark(mesh):
    """The outermost module keeps its gathered weights after a forward pass without a backward pass."""
    if not TRAINS:
        pytest.skip("FSDP2 runs on a CPU from torch 2.7 on")
    rnn = nn.GRU(4, 4)
    mark_recurrent(rnn)
    fully_shard(rnn, mesh=mesh)
    opt = Adam(rnn.parameters())
    with torch.no_grad():
        rnn(torch.ones(3, 2, 4))
    assert list(constraint_of(rnn)) == ["weight_hh_l0"]
    with torch.no_grad():
        rnn(torch.ones(3, 2, 4))
    assert check(rnn, opt) == []
    with torch.no_grad():
        rnn(torch.ones(3, 2, 4))
        for p in rnn.parameters():
            p.mul_(2)
    project_to_manifold_(rnn)
    assert orthogonality_error(rnn)["weight_hh_l0"] < 1e-6


def test_a_mark_on_a_bare_parameter_is_not_carried_over(mesh):
    net = nn.Sequential(nn.Linear(6, 6))
    mark_orthogonal(net[0].weight)
    fully_shard(net, mesh=mesh)
    Adam(net.parameters())
    assert constraint_of(net) == {}


def test_partial_placements_are_refused(mesh):
    p = nn.Parameter(DTensor.from_local(torch.eye(4), mesh, [Partial()]))
    with pytest.raises(ValueError, match=r"has the placement .*only Shard and Replicate are supported"):
        mark_orthogonal(p)


def test_a_compiled_step_is_refused(mesh):
    net = build()
    fully_shard(net, mesh=mesh)
    opt = Adam(net.parameters())
    with pytest.raises(RuntimeError, match="a step with marked DTensors cannot be compiled"):
        opt._init_group(opt.param_groups[0], *opt._algorithm.lists(opt, opt.param_groups[0]))


@pytest.mark.parametrize("way", WAYS)
def test_one_that_is_unmarked_trains_unconstrained(way, mesh):
    trains(way)
    net = build()
    WAYS[way](net, mesh)
    unmark(net[0])
    opt = Adam(net.parameters(), lr=0.1)
    net(torch.ones(2, 6)).sum().backward()
    opt.step()
    assert check(net, opt) == []


@pytest.mark.parametrize("way", ["fully_shard", "fully_shard, one layer"])
def test_left_out_of_the_sharding_it_is_kept(way, mesh):
    trains(way)
    net = build()
    fully_shard(net if way == "fully_shard" else net[0], mesh=mesh, ignored_params={net[0].weight})
    opt = Adam(net.parameters(), lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        net(torch.ones(2, 6)).sum().backward()
        opt.step()
    assert check(net, opt) == []
    assert orthogonality_error(net[0].weight) < 1e-6


@pytest.mark.parametrize("form", ["by name", "by itself"])
@pytest.mark.parametrize("original", [False, True])
@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*FSDP", "ignore:`_get_pg_default_device`")
def test_fsdp1_is_refused(original, form):
    """By default its parameters are in one flat parameter; with use_orig_params they are flat pieces of it."""
    if form == "by itself" and not original:
        pytest.skip("the mark is gone with the parameter, and nothing can tell: docs/how-to/several_gpus.md says so")
    net = build(mark_orthogonal if form == "by name" else lambda net, _: mark_orthogonal(net[0].weight))
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"), use_orig_params=original)
    with pytest.raises(ValueError, match="a part of a flat parameter of FSDP1") as refusal:
        Adam(wrapped.parameters())
    assert "FullyShardedDataParallel(model, ignored_modules=[module])" in str(refusal.value)
    if form == "by name":
        (problem,) = check(wrapped, torch.optim.Adam(wrapped.parameters()))
        assert problem.startswith("_fsdp_wrapped_module.0.weight was marked as")


@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*FSDP", "ignore:`_get_pg_default_device`")
def test_a_tied_weight_under_fsdp1_is_refused():
    """Marked under its second name, which the flat parameter has as a shared one."""
    net = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    net[1].weight = net[0].weight
    mark_orthogonal(net[1], "weight")
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"Linear.weight was marked .* a part of a flat parameter of FSDP1"):
        Adam(wrapped.parameters())


@pytest.mark.filterwarnings("ignore:FSDP is switching", "ignore:.*FSDP", "ignore:`_get_pg_default_device`")
def test_left_out_of_fsdp1_it_is_kept():
    net = build()
    wrapped = FullyShardedDataParallel(net, device_id=torch.device("cpu"), ignored_modules=[net[0]])
    opt = Adam(wrapped.parameters(), lr=0.1)
    for _ in range(3):
        opt.zero_grad()
        wrapped(torch.ones(2, 6)).sum().backward()
        opt.step()
    assert check(wrapped, opt) == []
    assert orthogonality_error(net[0].weight) < 1e-6


@pytest.mark.parametrize(
    "function",
    [
        nearest_orthogonal,
        orthogonality_error,
        orthogonalize_,
        init.orthogonal_,
        lambda x: riemannian_gradient(x, x),
        lambda x: retract(x, x, "qr"),
    ],
)
def test_functions_refuse_a_dtensor(function, mesh):
    """float(x) and bool(x) of one are of the part of this process, and nothing says so."""
    x = distribute_tensor(torch.eye(4), mesh, [Shard(0)])
    with pytest.raises(ValueError, match="DTensor"):
        function(x)


def test_a_model_with_shards_beside_marked_weights_is_projected(mesh):
    net = build()
    fully_shard(net[2], mesh=mesh)
    with torch.no_grad():
        net[0].weight.mul_(2)
    project_to_manifold_(net)
    assert orthogonality_error(net)["0.weight"] < 1e-6
