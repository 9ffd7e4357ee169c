"""What moves between ranks in a step: how many collectives, and how many bytes."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_opt import Adam, mark_orthogonal, mark_unit_norm, unmark

from .layouts import Gradients, columns, rows, sharded
from .workers import run


class Traffic(TorchDispatchMode):
    """Records every collective with the bytes that this rank sends to others in it.

    Attributes:
        calls: name, and bytes; of an all-reduce, those of its vector.
    """

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name()
        if name.startswith(("c10d::", "_c10d_functional::")) and "wait" not in name:
            self.calls.append((name.partition("::")[2], self.sent(name, args)))
        return func(*args, **(kwargs or {}))

    def sent(self, name, args):
        if "alltoall" in name:
            _, given, _, _, splits = args[:5]
            return given.nbytes - given.itemsize * splits[dist.get_rank()]
        vector = args[0][0] if isinstance(args[0], list) else args[0]
        return vector.nbytes


def stepped(shapes, way, world, mark="orthogonal"):
    """Collectives of the third step, and the numbers of entries of all weights."""
    net = nn.Sequential(*(nn.Linear(n, m, bias=False) for m, n, _ in shapes))
    for k, (_, _, blocks) in enumerate(shapes):
        if mark == "orthogonal":
            mark_orthogonal(net, f"{k}.weight", blocks=blocks)
        elif mark == "unit norm":
            mark_unit_norm(net, f"{k}.weight")
    way(net, world)
    opt = Adam(net.parameters())
    gradients = Gradients(list(net.parameters()))
    for step in range(3):
        gradients.give(step)
        with Traffic() as traffic:
            opt.step()
    return traffic.calls, sum(p.numel() for p in net.parameters())


AGREEMENT = ("allreduce_", 4 * 8)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize(
    ("shapes", "mark"),
    [([(24, 6, 4)], "orthogonal"), ([(24, 6, 4), (24, 7, 8), (8, 2, 4)], "orthogonal"), ([(7, 5, 1)], "unit norm")],
)
def test_blocks_that_lie_in_a_shard_are_not_moved(shapes, mark, world):
    for calls, _ in run(world, stepped, shapes, rows, world, mark):
        assert calls == [AGREEMENT]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("way", [rows, columns])
@pytest.mark.parametrize("weights", [1, 9])
def test_blocks_that_are_cut_move_once_each_way(weights, way, world):
    """Each way by one collective, whatever the number of weights."""
    shapes = [(8, 8, 1), (8, 16, 1), (24, 8, 3)] * (weights // 3) or [(8, 8, 1)]
    for calls, _ in run(world, stepped, shapes, way, world):
        assert [name for name, _ in calls] == ["allreduce_", "alltoall_base_", "alltoall_base_"]
        assert calls[0] == AGREEMENT


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("way", [rows, columns])
def test_as_many_bytes_as_owners_have_to_get(way, world):
    """An owner gets the other ranks' shares of its blocks' gradients, and sends as much back: 2 (N-1)/N^2 of all.

    Eight blocks, each cut into as many pieces as there are ranks; the owners have as many blocks each.
    """
    shapes = [(16, 16, 1)] * 8
    for calls, numel in run(world, stepped, shapes, way, world):
        moved = sum(sent for name, sent in calls if name == "alltoall_base_")
        assert moved == pytest.approx(4 * numel * 2 * (world - 1) / world**2, rel=0.1)


def groups_of_processes():
    """Calls of new_group while a weight, split over both dimensions of a mesh of four ranks, is marked and unmarked."""
    where, calls, new_group = DeviceMesh("cpu", [[0, 1], [2, 3]]), [], dist.new_group
    if dist.get_rank() == 4:
        return calls
    weights = [nn.Parameter(sharded(torch.eye(8), where, [Shard(0), Shard(1)])) for _ in range(2)]
    opt = Adam([mark_orthogonal(weights[0]), weights[1]])
    dist.new_group = lambda *args, **kwargs: calls.append(args) or new_group(*args, **kwargs)
    try:
        for step in range(4):
            (unmark if step % 2 else mark_orthogonal)(weights[1])
            Gradients(weights).give(step)
            opt.step()
    finally:
        dist.new_group = new_group
    return calls


def test_a_group_of_processes_is_created_once():
    assert run(5, groups_of_processes) == [[([0, 1, 2, 3],)]] * 4 + [[]]


def test_unmarked_weights_send_nothing():
    """No agreement either, once all ranks have agreed that nothing is marked."""
    for calls, _ in run(4, stepped, [(8, 8, 1)], rows, 4, "none"):
        assert calls == []
