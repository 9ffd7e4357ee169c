"""What a step of sharded parameters moves, computes and takes on 8 to 4096 ranks, by a model, and where each mode wins.

    python benchmarks/sharding_plan.py --plot docs/explanation/sharding.png
    python benchmarks/sharding_plan.py --check

The model takes the owners of blocks from the package itself. A message costs the latency alpha and its bytes over the
bandwidth beta; a step costs its products over gamma and its reads and writes over the memory bandwidth. ``--check``
takes steps on 4 gloo ranks of this machine and compares the collective calls and bytes with those of the model.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import multiprocessing
import socket
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from manifold_opt import Adam, init, mark_orthogonal
from manifold_opt.manifolds import Orthogonal
from manifold_opt.optim.engine.exchange import Exchange
from manifold_opt.optim.engine.owners import Ownership, assign_owners

FLOAT = 4  # bytes
ADAM_PASSES, STEP_PASSES = 7, 50  # reads and writes of every entry: by a fused Adam, and by a step on blocks
GRAM_ROUNDS = 3  # all-reduced p x p matrices of a step: two of the direction, one of the retraction


class Machine(NamedTuple):
    """Round assumptions about hardware.

    Attributes:
        alpha: seconds per message.
        node: ranks per node.
        inside, between: bytes per second and rank, in each direction, inside a node and between nodes.
        gamma: float32 operations per second of matrix products.
        memory: bytes per second.
    """

    alpha: float
    node: int
    inside: float
    between: float
    gamma: float
    memory: float

    def beta(self, ranks: int) -> float:
        """Return the bandwidth of a group of adjacent ranks."""
        return self.inside if ranks <= self.node else self.between


MACHINES = {
    "NVLink node": Machine(10e-6, 8, 200e9, 200e9, 40e12, 2e12),
    "400 Gbit/s cluster": Machine(10e-6, 8, 200e9, 6.25e9, 40e12, 2e12),
    "10 Gbit/s Ethernet": Machine(50e-6, 1, 1.25e9, 1.25e9, 20e12, 1e12),
}


class Weights(NamedTuple):
    """Equal marked parameters; ``tensor_parallel`` is the dimension that a second mesh dimension cuts."""

    count: int
    shape: tuple[int, int]
    blocks: int
    dim: int = 0
    tensor_parallel: int = 0

    @property
    def block(self) -> tuple[int, int]:
        """Rows and columns of a block, the shorter first."""
        shape = list(self.shape)
        shape[self.dim] //= self.blocks
        return min(shape), max(shape)

    @property
    def entries(self) -> int:
        """Number of entries of all of them."""
        return self.count * math.prod(self.shape)


WORKS = {
    "attention heads": (Weights(96, (4096, 4096), 32), Weights(32, (4096, 4096), 32, dim=1, tensor_parallel=1)),
    "224 square 4096 x 4096": (Weights(224, (4096, 4096), 1),),
    "2 layers of an LSTM of 1024": (Weights(2, (4096, 1024), 4),),
    "an RNN of 256": (Weights(1, (256, 256), 1),),
}
Mesh = tuple[tuple[int, int], ...]  # ranks of each mesh dimension, and the tensor dimension that it cuts


class Cost(NamedTuple):
    """What a step costs the busiest rank: collectives, messages, bytes sent or received, and seconds of computing."""

    collectives: int = 0
    messages: float = 0
    nbytes: float = 0
    compute: float = 0

    def seconds(self, machine: Machine, ranks: int) -> float:
        """Return the time."""
        return self.messages * machine.alpha + self.nbytes / machine.beta(ranks) + self.compute


def boxes(shape: tuple[int, int], mesh: Mesh) -> list[tuple[tuple[int, int], ...]]:
    """Return start and length along every dimension of the shard of every rank, as torch.chunk cuts."""
    found = []
    for coordinate in itertools.product(*(range(size) for size, _ in mesh)):
        box = [(0, n) for n in shape]
        for (size, dim), k in zip(mesh, coordinate, strict=True):
            start, length = box[dim]
            chunk = -(-length // size)
            offset = min(chunk * k, length)
            box[dim] = (start + offset, min(chunk, length - offset))
        found.append(tuple(box))
    return found


@functools.cache
def assign(work: tuple[Weights, ...], ranks: int, parallel: int = 1, dim: int = 0) -> list[Ownership]:
    """Return the owners of all blocks if FSDP2 cuts ``dim``, and tensor parallelism over some ranks its dimension."""
    parameters = []
    for weights in work:
        mesh = ((parallel, weights.tensor_parallel), (ranks // parallel, dim)) if parallel > 1 else ((ranks, dim),)
        shared, constraint = boxes(weights.shape, mesh), Orthogonal(weights.blocks, weights.dim)
        parameters += [(SimpleNamespace(shape=weights.shape), constraint, shared)] * weights.count
    return assign_owners(parameters, [0.0] * ranks)


def products(p: int, n: int, optimizer: str) -> float:
    """Return what a step of one block takes, in products of p x n by n x p matrices (docs/optimizers.md)."""
    if optimizer == "Adam":
        return 3.25 if p == n else 6.0
    if p == n:
        return 15.5
    return 2 * n / p + 0.5 + 13 * (n / p) ** 2 if n <= 2 * p else 5.5 + 13 * 8 * p / n


def compute(machine: Machine, p: int, n: int, optimizer: str) -> float:
    """Return the seconds of a step of one block."""
    return products(p, n, optimizer) * 2 * p * p * n / machine.gamma + STEP_PASSES * p * n * FLOAT / machine.memory


def blocks_of(work: tuple[Weights, ...], ownerships: list[Ownership]) -> Iterator[tuple[tuple[int, int], Ownership]]:
    """Yield every parameter's block and owners."""
    yield from zip((w.block for w in work for _ in range(w.count)), ownerships, strict=True)


def owners(work: tuple[Weights, ...], machine: Machine, ownerships: list[Ownership], optimizer: str = "Adam") -> Cost:
    """Return the cost of blocks that are stepped by their owners; aligned blocks are not moved."""
    ranks = len(ownerships[0].boxes)
    busy, owned = [0.0] * ranks, [0] * ranks
    for (p, n), ownership in blocks_of(work, ownerships):
        for owner in ownership.owners:
            busy[owner] += compute(machine, p, n, optimizer)
            owned[owner] += p * n
    peers, moved = 0, 0
    for rank in {0, owned.index(max(owned)), ranks - 1}:
        exchange = Exchange(ownerships, None, ranks, rank)
        sizes = [
            [sum(math.prod(p.shape) for p in some) for some in side] for side in (exchange.sent, exchange.received)
        ]
        peers = max(peers, *(sum(map(bool, side)) for side in sizes))
        moved = max(moved, *map(sum, sizes))
    return Cost(2 * (moved > 0), 2 * peers, 2 * moved * FLOAT, max(busy))


def gathered(work: tuple[Weights, ...], machine: Machine, ranks: int, optimizer: str = "Adam") -> Cost:
    """Return the cost if gradients are all-gathered, and every rank has all moments and steps all blocks."""
    steps = sum(w.count * w.blocks * compute(machine, *w.block, optimizer) for w in work)
    entries = sum(w.entries for w in work)
    return Cost(1, math.log2(ranks), (ranks - 1) / ranks * entries * FLOAT, steps)


def gram(work: tuple[Weights, ...], machine: Machine, ranks: int) -> Cost:
    """Return the cost if every rank has a part of the long side of every block, and p x p matrices are all-reduced."""
    entries = sum(w.count * w.blocks * w.block[0] ** 2 for w in work)
    steps = sum(w.count * w.blocks * compute(machine, *w.block, "Adam") for w in work) / ranks
    messages = GRAM_ROUNDS * 2 * math.log2(ranks)
    return Cost(GRAM_ROUNDS, messages, GRAM_ROUNDS * 2 * (ranks - 1) / ranks * entries * FLOAT, steps)


def fsdp(work: tuple[Weights, ...], ranks: int) -> Cost:
    """Return what FSDP2 moves for these weights: two all-gathers, and the gradients' reduce-scatter."""
    entries, count = sum(w.entries for w in work), sum(w.count for w in work)
    return Cost(3 * count, 3 * count * math.log2(ranks), 3 * (ranks - 1) / ranks * entries * FLOAT)


def unconstrained(work: tuple[Weights, ...], machine: Machine, ranks: int) -> Cost:
    """Return the cost of torch.optim.Adam, fused, on shards."""
    return Cost(compute=ADAM_PASSES * sum(w.entries for w in work) * FLOAT / ranks / machine.memory)


def table(works: list[str], machines: list[str], counts: list[int]) -> None:
    """Print the costs, as tables of Markdown."""
    for name, machine_name in itertools.product(works, machines):
        work, machine = WORKS[name], MACHINES[machine_name]
        blocks = sum(w.count * w.blocks for w in work)
        print(f"\n{name} ({blocks} blocks), {machine_name}: megabytes per rank, else ms per step\n")
        titles = ("owners, MB", "messages", "compute", "owners", "Muon", "gathered, MB", "gathered", "FSDP2", "Adam")
        print(f"| ranks | idle | {' | '.join(titles)} |")
        print("|---:|" + "---:|" * 10)
        for ranks in counts:
            if machine_name == "NVLink node" and ranks > machine.node:
                continue
            ownerships = assign(work, ranks)
            costs = [owners(work, machine, ownerships), owners(work, machine, ownerships, "Muon")]
            costs += [gathered(work, machine, ranks), fsdp(work, ranks), unconstrained(work, machine, ranks)]
            own, muon, all_ranks, moved, adam = (1e3 * cost.seconds(machine, ranks) for cost in costs)
            idle = ranks - len({owner for ownership in ownerships for owner in ownership.owners})
            cells = [costs[0].nbytes / 1e6, costs[0].messages, 1e3 * costs[0].compute, own, muon]
            cells += [costs[2].nbytes / 1e6, all_ranks, moved, adam]
            print(f"| {ranks} | {idle} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |", flush=True)


def compare_gram(machine_name: str, counts: list[int]) -> None:
    """Print what all-reduced Gram matrices would move for heads of output projections, which are cut lengthwise."""
    work, machine = WORKS["attention heads"][1:], MACHINES[machine_name]
    print(f"\n32 output projections of 32 heads, {machine_name}: megabytes and milliseconds per rank and step\n")
    print(
        "| ranks | owners, MB | Gram, MB | FSDP2, MB | owners, ms | Gram, ms | shards along heads, ms |\n|---:|"
        + "---:|" * 6
    )
    for ranks in counts:
        own = owners(work, machine, assign(work, ranks))
        along = owners(work, machine, assign(work, ranks, dim=1))
        costs = [own, gram(work, machine, ranks), fsdp(work, ranks)]
        cells = [cost.nbytes / 1e6 for cost in costs]
        cells += [1e3 * cost.seconds(machine, ranks) for cost in (*costs[:2], along)]
        print(f"| {ranks} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |", flush=True)


def compare_layouts(machine_name: str, ranks: int) -> None:
    """Print what owners cost in other layouts of the attention heads."""
    work, machine = WORKS["attention heads"], MACHINES[machine_name]
    rows = {
        "FSDP2, Shard(0)": (assign(work, ranks), ranks),
        "FSDP2, Shard along the heads": (assign(work[:1], ranks) + assign(work[1:], ranks, dim=1), ranks),
        f"HSDP in groups of {machine.node}": (assign(work, machine.node), machine.node),
        f"tensor parallel {machine.node}, FSDP2": (assign(work, ranks, parallel=machine.node), ranks),
    }
    print(f"\nAttention heads on {ranks} ranks, {machine_name}\n")
    print("| layout | MB per rank | messages | compute, ms | in all, ms |\n|---|" + "---:|" * 4)
    for name, (ownerships, group) in rows.items():
        cost = owners(work, machine, ownerships)
        cells = [cost.nbytes / 1e6, cost.messages, 1e3 * cost.compute, 1e3 * cost.seconds(machine, group)]
        print(f"| {name} | " + " | ".join(f"{cell:.3g}" for cell in cells) + " |", flush=True)


def _seconds(costs: list[Cost], machine: Machine, counts: list[int]) -> list[float]:
    return [cost.seconds(machine, ranks) for cost, ranks in zip(costs, counts, strict=True)]


def plot(path: str, counts: list[int]) -> None:
    """Draw the time of a step against the number of ranks."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams["font.size"] = 11
    name = "400 Gbit/s cluster"
    machine = MACHINES[name]
    figure, axes = plt.subplots(2, 1, figsize=(6.4, 7.6), layout="constrained", sharex=True)
    for ax, (title, work) in zip(axes, list(WORKS.items())[:2], strict=True):
        assigned = [assign(work, ranks) for ranks in counts]
        built = [owners(work, machine, ownerships) for ownerships in assigned]
        hybrid = owners(work, machine, assign(work, machine.node)).seconds(machine, machine.node)
        lines: dict[str, tuple[list[float], dict[str, Any]]] = {
            "owners": (_seconds(built, machine, counts), {"color": "#0072B2", "marker": "o"}),
            "owners, computing alone": ([cost.compute for cost in built], {"color": "#0072B2", "linestyle": ":"}),
            "owners, HSDP in nodes of 8": ([hybrid] * len(counts), {"color": "#009E73", "linestyle": "-."}),
            "gathered": (
                _seconds([gathered(work, machine, n) for n in counts], machine, counts),
                {"color": "#D55E00", "marker": "^"},
            ),
            "FSDP2 itself": (
                _seconds([fsdp(work, n) for n in counts], machine, counts),
                {"color": "black", "linestyle": "--"},
            ),
        }
        for label, (seconds, style) in lines.items():
            ax.loglog(counts, [1e3 * s for s in seconds], label=label, linewidth=2, markersize=6, **style)
        blocks = sum(w.count * w.blocks for w in work)
        if blocks < max(counts):
            ax.axvline(blocks, color="#999999", linewidth=1)
            ax.text(blocks * 1.08, 1.3, "more ranks\nthan blocks", fontsize=10, color="#555555")
        ax.set_title(f"{title}, {blocks} blocks", fontsize=11)
        ax.set_ylabel("milliseconds per step")
        ax.minorticks_off()
        ax.set_ylim(0.05, 2e4)
        ax.grid(visible=True, alpha=0.3)
    axes[-1].set_xticks(counts, [str(n) for n in counts], rotation=45)
    axes[-1].set_xlabel("ranks")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


CHECKS = {  # weights, and the mesh: its sizes and placements
    "aligned, 4 heads on 4 ranks": (Weights(2, (16, 8), 4), (4,), (Shard(0),)),
    "cut evenly, 4 matrices on 4 ranks": (Weights(4, (16, 16), 1), (4,), (Shard(0),)),
    "3 gates on 4 ranks": (Weights(2, (48, 16), 3), (4,), (Shard(0),)),
    "Shard(1), 4 heads on 4 ranks": (Weights(2, (16, 16), 4), (4,), (Shard(1),)),
    "uneven, 3 matrices of 10 rows": (Weights(3, (10, 12), 1), (4,), (Shard(0),)),
    "HSDP, 2 x 2": (Weights(4, (16, 16), 1), (2, 2), (Replicate(), Shard(0))),
    "two dimensions, 2 x 2": (Weights(4, (16, 16), 2), (2, 2), (Shard(1), Shard(0))),
}


def predict(weights: Weights, sizes: tuple[int, ...], placements: tuple[Any, ...]) -> list[tuple[int, int]]:
    """Return the number of all-to-alls of a step, and the bytes that each rank of a group sends in them."""
    mesh = tuple(
        (size, placement.dim) for size, placement in zip(sizes, placements, strict=True) if placement.is_shard()
    )
    ranks = math.prod(size for size, _ in mesh)
    parameter = SimpleNamespace(shape=weights.shape)
    constraint, shared = Orthogonal(weights.blocks, weights.dim), boxes(weights.shape, mesh)
    ownerships = assign_owners([(parameter, constraint, shared)] * weights.count, [0.0] * ranks)
    found = []
    for rank in range(ranks):
        exchange = Exchange(ownerships, None, ranks, rank)
        pieces = [piece for side in (exchange.sent, exchange.received) for some in side for piece in some]
        found.append((2 * exchange.moves, FLOAT * sum(math.prod(piece.shape) for piece in pieces)))
    return found


def count(rank: int, port: int, results: Any, *, timed: bool) -> None:
    """Take steps as one of 4 ranks, and put what was counted in the last one of every layout in a queue."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=4)
    found: dict[str, Any] = {}
    for name, (weights, sizes, placements) in CHECKS.items():
        mesh = init_device_mesh("cpu", sizes)
        torch.manual_seed(0)
        marked = []
        for _ in range(weights.count):
            weight = init.orthogonal_(torch.empty(weights.shape), blocks=weights.blocks)
            weight = nn.Parameter(distribute_tensor(weight, mesh, placements))
            marked.append(mark_orthogonal(weight, blocks=weights.blocks))
        opt, sent, real = Adam(marked, lr=1e-2), [], dist.all_to_all_single
        for _ in range(2):
            for weight in marked:
                weight.grad = distribute_tensor(torch.randn(weights.shape), mesh, placements)
            with CommDebugMode() as mode, mock.patch.object(dist, "all_to_all_single", _counting(real, sent)):
                sent.clear()
                opt.step()
        calls = Counter({str(op): number for op, number in mode.get_comm_counts().items() if number})
        found[name] = len(sent), sum(sent), sum(calls.values())
    if timed:
        found["seconds"] = _time_gram()
    results.put((rank, found))
    dist.barrier()
    dist.destroy_process_group()


def _counting(real: Any, sent: list[int]) -> Any:
    def all_to_all_single(output: Any, source: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(source.numel() * source.element_size())
        return real(output, source, *args, **kwargs)

    return all_to_all_single


def _time_gram(rounds: int = 5) -> tuple[float, float]:
    """Return the seconds of what moves for one output projection of 32 heads: all-to-all pairs, and Gram matrices."""
    shard, matrices = torch.randn(4096 * 4096 // 4), torch.randn(32 * 128 * 128)
    received = torch.empty_like(shard)
    spent: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        for _ in range(2):
            dist.all_to_all_single(received, shard)
        middle = time.perf_counter()
        for _ in range(GRAM_ROUNDS):
            dist.all_reduce(matrices)
        spent[0].append(middle - start)
        spent[1].append(time.perf_counter() - middle)
    return statistics.median(spent[0]), statistics.median(spent[1])


def counted(*, timed: bool = False) -> list[dict[str, Any]]:
    """Return what each of 4 gloo ranks has counted, and with ``timed`` the seconds of :func:`_time_gram`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.distributed.tensor.debug", "torch._dynamo", "manifold_opt"])
    results = context.Queue()
    arguments = {"kwargs": {"timed": timed}, "daemon": True}
    processes = [context.Process(target=count, args=(rank, port, results), **arguments) for rank in range(4)]
    for process in processes:
        process.start()
    try:
        found = dict(results.get(timeout=120) for _ in processes)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()
    return [found[rank] for rank in range(4)]


def check() -> None:
    """Print what the model says beside what was counted."""
    ranks = counted(timed=True)
    print(
        "| layout | all-to-alls, model | counted | bytes per rank, model | counted | collectives in all |\n|---|"
        + "---:|" * 5
    )
    for name, layout in CHECKS.items():
        predicted = predict(*layout)
        calls, nbytes = zip(*predicted, strict=True)
        seen = [rank[name] for rank in ranks][: len(predicted)]
        print(
            f"| {name} | {max(calls)} | {max(s[0] for s in seen)} | {_range(nbytes)} | {_range(s[1] for s in seen)} | "
            f"{max(s[2] for s in seen)} |"
        )
    pair, matrices = (1e3 * statistics.median(column) for column in zip(*(r["seconds"] for r in ranks), strict=True))
    print(f"\nOne 4096 x 4096 weight of 32 heads: an all-to-all pair {pair:.0f} ms, Gram matrices {matrices:.0f} ms")


def _range(values: Any) -> str:
    values = sorted(values)
    return f"{values[0]:,}" if values[0] == values[-1] else f"{values[0]:,} to {values[-1]:,}"


def main() -> None:
    """Print the tables, and draw the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096])
    parser.add_argument("--machines", nargs="+", choices=MACHINES, default=list(MACHINES))
    parser.add_argument("--plot", metavar="PNG", help="draw the time against the number of ranks")
    parser.add_argument(
        "--check", action="store_true", help="compare the model with steps on 4 ranks, and nothing else"
    )
    parser.add_argument("--toy", action="store_true", help="8 and 16 ranks only, no picture: does it run?")
    args = parser.parse_args()
    if args.check:
        check()
        return
    counts = [8, 16] if args.toy else args.ranks
    table(list(WORKS), args.machines, counts)
    compare_layouts("400 Gbit/s cluster", 16 if args.toy else 64)
    compare_gram("NVLink node", [2, 4, 8])
    compare_gram("400 Gbit/s cluster", [n for n in counts if n <= 64])
    if args.plot and not args.toy:
        plot(args.plot, counts)


if __name__ == "__main__":
    main()
