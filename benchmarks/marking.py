"""The time of marking: beside one SVD in float64, and beside torch.nn.init.orthogonal_ for what is orthogonal already.

    python benchmarks/marking.py --threads 2

Milliseconds, medians over rounds in which all columns take turns. The blocks start as the layers of torch do, uniform.

svd          torch.linalg.svd(blocks.double(), full_matrices=False)
mark         mark_orthogonal of a parameter of these blocks
again        the same, when they are orthogonal already
torch init   torch.nn.init.orthogonal_ for each block
our init     manifold_opt.init.orthogonal_
error        largest ||I - W W^T|| of a block after marking, Frobenius
condition    largest of a block before
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import manifold_opt
from manifold_opt import init, mark_orthogonal, orthogonality_error
from manifold_opt.linalg.matrices import float64

Shape = tuple[int, int, int]  # blocks, rows, columns
WORKS: list[Shape] = [
    (4, 1024, 1024),
    (1, 1024, 1024),
    (1, 2048, 2048),
    (3, 256, 256),
    (1, 256, 1024),
    (1, 1024, 256),
    (1, 256, 4096),
    (1, 4096, 256),
    (1000, 32, 64),
    (100_000, 3, 3),
]
TOYS: list[Shape] = [(2, 8, 8), (1, 4, 16), (20, 3, 3)]
COLUMNS = ("svd", "mark", "again", "torch init", "our init")
MANY = 100  # blocks; initializing so many one by one, as torch has to, says nothing


def columns(start: Tensor) -> dict[str, Callable[[], object]]:
    """What is timed for blocks ``(count, p, n)``; each call has an ``nn.Parameter`` of its own."""
    count = len(start)
    flat = start.flatten(0, 1)
    orthogonal = mark_orthogonal(nn.Parameter(flat.clone()), blocks=count).detach()
    fresh = torch.empty_like(flat)

    def init_of_torch() -> None:
        for block in fresh.view_as(start):
            nn.init.orthogonal_(block)

    timed: dict[str, Callable[[], object]] = {
        "svd": lambda: torch.linalg.svd(float64(start), full_matrices=False),
        "mark": lambda: mark_orthogonal(nn.Parameter(flat.clone()), blocks=count),
        "again": lambda: mark_orthogonal(nn.Parameter(orthogonal.clone()), blocks=count),
        "torch init": init_of_torch,
        "our init": lambda: init.orthogonal_(fresh, count),
    }
    if count > MANY:
        del timed["torch init"]
    return timed


def measure(start: Tensor, rounds: int) -> dict[str, float]:
    """Return the median of the milliseconds of every column."""
    timed = columns(start)
    spent: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds + 1):
        for name, call in timed.items():
            began = time.perf_counter()
            call()
            spent[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(times[1:]) for name, times in spent.items()}  # without the first, cold


def main() -> None:
    """Print one row per work."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "float64", "bfloat16", "complex64"], default="float32")
    parser.add_argument("--toy", action="store_true", help="small blocks, 2 rounds: does it run?")
    args = parser.parse_args()
    if args.toy:
        args.rounds = 2
    torch.set_num_threads(args.threads)
    print(f"manifold_opt {manifold_opt.__version__}, torch {torch.__version__}, {args.threads} threads, {args.dtype}")
    print(
        f"{'blocks':>18}"
        + "".join(f"{name:>12}" for name in COLUMNS)
        + f"{'mark / svd':>12}{'again / torch':>15}{'our / torch':>13}{'error':>9}{'condition':>11}"
    )
    for count, p, n in TOYS if args.toy else WORKS:
        torch.manual_seed(0)
        dtype = getattr(torch, args.dtype)
        start = torch.view_as_complex(torch.rand(count, p, n, 2)) if dtype.is_complex else torch.rand(count, p, n)
        start = ((2 * start - 1) / n**0.5).to(dtype)
        ms = measure(start, args.rounds)
        marked = mark_orthogonal(nn.Parameter(start.flatten(0, 1).clone()), blocks=count)

        print(
            f"{f'{count} of {p} x {n}':>18}"
            + "".join(f"{ms[name]:12.2f}" if name in ms else f"{'':12}" for name in COLUMNS)
            + f"{ms['mark'] / ms['svd']:12.2f}"
            + (
                f"{ms['again'] / ms['torch init']:15.2f}{ms['our init'] / ms['torch init']:13.2f}"
                if "torch init" in ms
                else f"{'':28}"
            )
            + f"{orthogonality_error(marked):9.1e}{float(torch.linalg.cond(float64(start)).max()):11.0e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
