"""Models sharded in every way, and gradients for them.

The parameters are given a gradient that every rank knows whole, so that a model on one rank and a sharded one have the
same gradients to the bit.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from manifold_opt import SGD, Adam, AdamW, Muon, mark_orthogonal

from ..helpers import gaussian
from .workers import mesh

OPTIMIZERS = {"SGD": SGD, "Adam": Adam, "AdamW": AdamW, "Muon": Muon}
OPTIONS = {"SGD": {"lr": 0.05, "momentum": 0.9}, "Adam": {"lr": 0.01}, "AdamW": {"lr": 0.01}, "Muon": {"lr": 0.02}}


def optimizer(rule: str, parameters: Any, **options: Any) -> torch.optim.Optimizer:
    return OPTIMIZERS[rule](parameters, **{**OPTIONS[rule], **options})


# Ways to shard a model on all ranks of the default group.


def rows(net: nn.Module, world: int) -> None:
    fully_shard(net, mesh=mesh(world))


def columns(net: nn.Module, world: int) -> None:
    fully_shard(net, mesh=mesh(world), shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 else None)


def hybrid(net: nn.Module, world: int) -> None:
    fully_shard(net, mesh=mesh(2, world // 2))


def _parallel(net: nn.Module, where: Any, plan: type) -> None:
    parallelize_module(net, where, {name: plan() for name, m in net.named_children() if isinstance(m, nn.Linear)})


def colwise(net: nn.Module, world: int) -> None:
    _parallel(net, mesh(world), ColwiseParallel)


def rowwise(net: nn.Module, world: int) -> None:
    _parallel(net, mesh(world), RowwiseParallel)


def _with_rows(plan: type) -> Callable[[nn.Module, int], None]:
    def way(net: nn.Module, world: int) -> None:
        both = mesh(2, world // 2)
        _parallel(net, both["shard"], plan)
        fully_shard(net, mesh=both["replicate"])

    return way


class Layout(NamedTuple):
    """Weights, and how they are sharded.

    Attributes:
        shard: shards a model.
        marked: shape and number of blocks of each marked weight: square, gates, wide, tall.
        worlds: numbers of ranks that it is for.
    """

    shard: Callable[[nn.Module, int], None]
    marked: list[tuple[tuple[int, int], int]]
    worlds: tuple[int, ...] = (1, 2, 4)


LAYOUTS = {
    "aligned": Layout(rows, [((24, 6), 4), ((40, 5), 8), ((24, 7), 8), ((20, 3), 4)]),
    "cut": Layout(rows, [((8, 8), 1), ((24, 8), 3), ((4, 12), 1), ((20, 4), 1)], (2, 4)),
    "uneven": Layout(rows, [((9, 9), 1), ((21, 7), 3), ((7, 11), 1), ((22, 4), 2)], (2, 4)),
    "empty": Layout(rows, [((5, 5), 1), ((3, 1), 3), ((2, 6), 1), ((9, 2), 3)], (4,)),
    "Shard(1)": Layout(columns, [((8, 8), 1), ((24, 8), 3), ((4, 12), 1), ((20, 4), 1)], (2, 4)),
    "colwise": Layout(colwise, [((8, 8), 1), ((18, 6), 3), ((5, 9), 1), ((22, 4), 2)], (2, 4)),
    "rowwise": Layout(rowwise, [((8, 8), 1), ((18, 6), 3), ((5, 9), 1), ((22, 4), 2)], (2, 4)),
    "hybrid": Layout(hybrid, [((8, 8), 1), ((18, 6), 3), ((5, 9), 1), ((22, 4), 2)], (4,)),
    "rows, colwise": Layout(_with_rows(ColwiseParallel), [((8, 8), 1), ((24, 8), 3), ((4, 12), 1), ((20, 4), 1)], (4,)),
    "rows, rowwise": Layout(_with_rows(RowwiseParallel), [((8, 8), 1), ((18, 6), 3), ((5, 9), 1), ((22, 4), 2)], (4,)),
}
PLACES = {f"{name}, {world} ranks": (name, world) for name, layout in LAYOUTS.items() for world in layout.worlds}


def build(layout: str, dtype: torch.dtype = torch.float32, *, mark: bool = True) -> nn.Module:
    """Return a model on one rank: one linear map without a bias for each marked weight."""
    weights = LAYOUTS[layout].marked
    net = nn.Sequential(*(nn.Linear(n, m, bias=False, dtype=dtype) for (m, n), _ in weights))
    for k, (_, blocks) in enumerate(weights):
        nn.init.normal_(net[k].weight, generator=torch.Generator().manual_seed(k))
        if mark:
            mark_orthogonal(net, f"{k}.weight", blocks=blocks)
    return net


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a DTensor on every rank, or a tensor itself."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def like(value: Tensor, p: Tensor) -> Tensor:
    """Return a tensor that every rank has whole, sharded as a parameter is."""
    return sharded(value, p.device_mesh, p.placements) if isinstance(p, DTensor) else value


# Not in torch 2.6, which sends the value of the first rank.
_SEND_NOTHING = {"src_data_rank": None} if "src_data_rank" in inspect.signature(distribute_tensor).parameters else {}


def sharded(value: Tensor, where: Any, placements: Any) -> Tensor:
    """Return a tensor that every rank has whole, sharded without sending anything."""
    return distribute_tensor(value, where, placements, **_SEND_NOTHING)


class Gradients:
    """Gives parameters their gradients of a step, random and the same on every rank.

    Attributes:
        places: for each parameter, where the entries of its shard are in the whole.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self.parameters = parameters
        whole = [torch.arange(p.numel()).view(p.shape) for p in parameters]
        shards = [like(index, p) for index, p in zip(whole, parameters, strict=True)]
        self.places = [index.to_local() if isinstance(index, DTensor) else index for index in shards]

    def give(self, step: int) -> None:
        for k, (p, places) in enumerate(zip(self.parameters, self.places, strict=True)):
            value = gaussian(p.numel(), dtype=torch.float32, seed=100 * step + k).to(p.dtype)[places]
            if isinstance(p, DTensor):
                value = DTensor.from_local(
                    value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
                )
            p.grad = value


def train(parameters: Any, opt: torch.optim.Optimizer, steps: int, first: int = 0) -> None:
    gradients = Gradients(list(parameters))
    for step in range(first, first + steps):
        gradients.give(step)
        opt.step()
