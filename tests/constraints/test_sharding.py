"""A sharded weight is refused, wherever it comes from: no process has its matrices whole."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from manifold_opt import (
    SGD,
    Adam,
    check,
    constraint_of,
    init,
    mark_orthogonal,
    mark_unit_norm,
    nearest_orthogonal,
    orthogonality_error,
    orthogonalize_,
    project_to_manifold_,
    retract,
    riemannian_gradient,
    unmark,
)

try:
    from torch.distributed._composable.replicate_with_fsdp import replicate
except ImportError:  # of torch before 2.9
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


MATCH = r"0.weight was marked as Orthogonal\(blocks=1, dim=0, gain=1.0\) and has been sharded since: it is a DTensor"


@pytest.mark.parametrize("kind", [SGD, Adam])
@pytest.mark.parametrize("way", WAYS)
def test_an_optimizer_of_a_sharded_model_is_refused(way, kind, mesh):
    net = build()
    WAYS[way](net, mesh)
    with pytest.raises(ValueError, match=MATCH) as refusal:
        kind(net.parameters(), lr=0.1)
    assert "fully_shard(module, ignored_params={parameter})" in str(refusal.value)
    opt = kind([p for name, p in net.named_parameters() if name != "0.weight"], lr=0.1)
    with pytest.raises(ValueError, match=MATCH):
        opt.add_param_group({"params": [net[0].weight]})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_step_with_a_sharded_weight_is_refused(way, copied, mesh):
    """Where it has come into the groups since; of a copied model too."""
    trains(way)
    net = build(mark_unit_norm)
    net = copy.deepcopy(net) if copied else net
    opt = Adam(net.parameters(), lr=0.1)
    net(torch.ones(2, 6)).sum().backward()
    opt.step()
    opt.zero_grad()
    WAYS[way](net, mesh)
    opt.param_groups[0]["params"][:] = net.parameters()
    net(torch.ones(2, 6)).sum().backward()
    before = [p.detach().clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"was marked as UnitNorm\(dim=0\) and has been sharded since"):
        opt.step()
    assert all(torch.equal(p.to_local() if hasattr(p, "to_local") else p,
                           q.to_local() if hasattr(q, "to_local") else q)
               for p, q in zip(net.parameters(), before, strict=True))  # fmt: skip
    assert any("has been sharded since" in problem for problem in check(net, opt))


@pytest.mark.parametrize("way", WAYS)
def test_check_says_so_whatever_optimizer_there_is(way, mesh):
    net = build()
    before = Adam(net.parameters())
    WAYS[way](net, mesh)
    for opt in (torch.optim.Adam(net.parameters()), before):
        assert check(net, opt)[0].startswith(
            "0.weight was marked as Orthogonal(blocks=1, dim=0, gain=1.0) and has been"
        )


@pytest.mark.parametrize("way", WAYS)
def test_loading_does_not_mark_a_shard(way, mesh):
    """The module remembers its weight, and would mark what has come."""
    net = build()
    WAYS[way](net, mesh)
    net.load_state_dict(net.state_dict())
    assert constraint_of(net) == {}
    assert check(net, torch.optim.Adam(net.parameters()))[0].startswith("0.weight was marked as")
    with pytest.raises(ValueError, match=MATCH):
        Adam(net.parameters())


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
        lambda x: mark_orthogonal(nn.Parameter(x)),
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
