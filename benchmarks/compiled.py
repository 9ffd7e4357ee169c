"""A compiled step beside an eager one, on the CPU: torch.compile(opt.step) with Inductor.

    python benchmarks/compiled.py --threads 2

Milliseconds, medians over rounds in which all three take turns, and the seconds that compiling took. The learning rate
of the compiled step is a tensor, so that a schedule does not compile it anew.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

import manifold_opt
from manifold_opt import Adam, mark_orthogonal, mark_positive, mark_recurrent, mark_unit_norm

Model = Callable[[], list[nn.Parameter]]


def orthogonal(parameters: int, blocks: int, p: int, n: int) -> Model:
    """Parameters of equal orthogonal blocks."""

    def make() -> list[nn.Parameter]:
        start = nn.init.orthogonal_(torch.empty(p, n)).repeat(blocks, 1)
        return [mark_orthogonal(nn.Parameter(start.clone()), blocks=blocks) for _ in range(parameters)]

    return make


def gru(hidden: int) -> Model:
    """All parameters of a GRU, of which the recurrent gates are marked."""

    def make() -> list[nn.Parameter]:
        net = nn.GRU(28, hidden)
        mark_recurrent(net)
        return list(net.parameters())

    return make


WORKS: dict[str, Model] = {
    "12 x 12": orthogonal(1, 1, 12, 12),
    "16 x 64": orthogonal(1, 1, 16, 64),
    "GRU 64": gru(64),
    "GRU 256": gru(256),
    "20,000 blocks of 3 x 3": orthogonal(1, 20_000, 3, 3),
    "100 parameters of 32 x 64": orthogonal(100, 1, 32, 64),
    "unit norm, 1000 x 64": lambda: [mark_unit_norm(nn.Parameter(torch.randn(1000, 64)))],
    "positive, 512 x 512": lambda: [mark_positive(nn.Parameter(torch.rand(512, 512) + 0.5))],
}
TOYS: dict[str, Model] = {"12 x 12": WORKS["12 x 12"], "GRU 4": gru(4)}


def measure(make: Model, rounds: int, backend: str) -> tuple[dict[str, float], float]:
    """Return milliseconds of a step by name, and the seconds of the first compiled step."""
    torch._dynamo.reset()
    ours, compiled, free = make(), make(), [nn.Parameter(p.detach().clone()) for p in make()]
    opt = Adam(compiled, lr=torch.tensor(1e-3))
    steps = {
        "eager": Adam(ours, lr=1e-3).step,
        "compiled": torch.compile(opt.step, backend=backend),
        "torch.optim.Adam": torch.optim.Adam(free, lr=1e-3).step,
    }
    spent: dict[str, list[float]] = {name: [] for name in steps}
    first = 0.0
    for k in range(rounds + 2):
        for members in zip(ours, compiled, free, strict=True):
            gradient = torch.randn_like(members[0]) / members[0].shape[-1] ** 0.5
            for p in members:
                p.grad = gradient.clone()
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            spent[name].append(time.perf_counter() - began)
        first = first if k else spent["compiled"][0]
    return {name: 1000 * statistics.median(times[2:]) for name, times in spent.items()}, first


def main() -> None:
    """Print one row per model, as a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="small models, 2 rounds, no compiler: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"manifold_opt {manifold_opt.__version__}, torch {torch.__version__}, {args.threads} threads\n")
    print("| ms | eager | compiled | compiled / eager | torch.optim.Adam | compiling, s |")
    print("|---|---:|---:|---:|---:|---:|")
    for name, make in (TOYS if args.toy else WORKS).items():
        ms, seconds = measure(make, 2 if args.toy else args.rounds, "eager" if args.toy else "inductor")
        ratio = ms["compiled"] / ms["eager"]
        cells = (f"{ms['eager']:.3f}", f"{ms['compiled']:.3f}", f"{ratio:.2f}", f"{ms['torch.optim.Adam']:.3f}")
        print(f"| {name} | " + " | ".join(cells) + f" | {seconds:.0f} |", flush=True)


if __name__ == "__main__":
    main()
