"""The largest models of one machine: time to mark, time and memory of a step, beside torch.optim.Adam.

    python benchmarks/scale.py --threads 2

Medians over rounds in which both optimizers take turns, with new gradients in every step. Memory is given in units of
the weights. State is what the optimizer keeps for every parameter, workspaces are kept from step to step, and the peak
is what a step allocates and frees again.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import manifold_opt
from manifold_opt import Adam, mark_attention, mark_orthogonal, orthogonality_error
from tests.helpers import Memory

Model = Callable[[], tuple[list[nn.Parameter], Callable[[], object]]]  # its parameters, and what marks them


def blocks(parameters: int, count: int, p: int, n: int) -> Model:
    """Parameters of equal blocks."""

    def make() -> tuple[list[nn.Parameter], Callable[[], object]]:
        start = torch.linalg.qr(torch.randn(n, p))[0].mT.contiguous()
        weights = [nn.Parameter(start.repeat(count, 1)) for _ in range(parameters)]
        return weights, lambda: [mark_orthogonal(w, blocks=count) for w in weights]

    return make


def heads(layers: int, size: int, count: int) -> Model:
    """Attention layers whose query and key heads are orthogonal."""

    def make() -> tuple[list[nn.Parameter], Callable[[], object]]:
        model = nn.ModuleList(nn.MultiheadAttention(size, count) for _ in range(layers))
        return list(model.parameters()), lambda: mark_attention(model, which="qk")

    return make


WORKS: dict[str, Model] = {
    "100,000 blocks of 3 x 3, one parameter": blocks(1, 100_000, 3, 3),
    "100,000 blocks of 3 x 3, 1000 parameters": blocks(1000, 100, 3, 3),
    "1,000,000 blocks of 3 x 3, one parameter": blocks(1, 1_000_000, 3, 3),
    "24 layers of attention, d = 1024, 16 heads": heads(24, 1024, 16),
    "4096 x 4096": blocks(1, 1, 4096, 4096),
}
TOYS: dict[str, Model] = {"20 blocks": blocks(2, 10, 3, 3), "2 layers of attention": heads(2, 16, 2)}


def measure(make: Model, rounds: int) -> dict[str, float]:
    """Return the figures of one model."""
    torch.manual_seed(0)
    ours, mark = make()
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    began = time.perf_counter()
    mark()
    figures = {"mark, s": time.perf_counter() - began}
    optimizers = {"ours": Adam(ours, lr=1e-3), "torch": torch.optim.Adam(theirs, lr=1e-3)}
    spent: dict[str, list[float]] = {name: [] for name in optimizers}
    for k in range(rounds + 2):
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine) / mine.shape[-1] ** 0.5
            other.grad = mine.grad.clone()
        for name, opt in optimizers.items():
            if k == rounds + 1:
                with Memory() as memory:
                    opt.step()
                figures[f"peak, {name}"] = memory.peak
            else:
                began = time.perf_counter()
                opt.step()
                spent[name].append(1000 * (time.perf_counter() - began))
    weights = sum(p.nbytes for p in ours)
    for name, opt in optimizers.items():
        figures[f"step, {name}, ms"] = statistics.median(spent[name][1:])  # without the first, which makes the plan
        figures[f"state, {name}"] = _state_bytes(opt) / weights
        figures[f"peak, {name}"] /= weights
    figures["workspaces"] = optimizers["ours"]._engine.plan.pool.nbytes() / weights  # type: ignore[attr-defined]
    figures["error"] = max(orthogonality_error(p) for p in ours if manifold_opt.constraint_of(p) is not None)
    return figures


def _state_bytes(opt: torch.optim.Optimizer) -> int:
    tensors = [x for state in opt.state.values() for x in state.values() if isinstance(x, Tensor)]
    return sum(x.nbytes for x in tensors)


def _overwrite(weight: nn.Parameter) -> None:
    with torch.no_grad():
        weight.mul_(1.01)


def _spoil(weight: nn.Parameter) -> None:
    weight.grad[0, 0] = torch.nan  # type: ignore[index]


CAREFUL: dict[str, tuple[float, Callable[[nn.Parameter], None]]] = {  # learning rate, and what happens before a step
    "every step is short": (1e-3, lambda _: None),
    "one gradient is not finite": (1e-3, _spoil),
    "every step is long": (1.0, lambda _: None),
    "the value was overwritten": (1e-3, _overwrite),
}


def careful_peaks(count: int, p: int, n: int) -> list[float]:
    """Return the peak of a step in each of these cases, in units of the weight."""
    peaks = []
    for lr, happen in CAREFUL.values():
        (weight,), mark = blocks(1, count, p, n)()
        mark()
        opt = Adam([weight], lr=lr)
        for _ in range(3):
            weight.grad = torch.randn_like(weight) / n**0.5
            opt.step()
        weight.grad = torch.randn_like(weight) / n**0.5
        happen(weight)
        with Memory() as memory, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a value far from the manifold
            opt.step()
        peaks.append(memory.peak / weight.nbytes)
    return peaks


COLUMNS = {
    "mark, s": "{:.2f}",
    "step, ours, ms": "{:.2f}",
    "step, torch, ms": "{:.2f}",
    "state, ours": "{:.2f}",
    "workspaces": "{:.2f}",
    "peak, ours": "{:.2f}",
    "state, torch": "{:.2f}",
    "peak, torch": "{:.2f}",
    "error": "{:.1e}",
}


def main() -> None:
    """Print one row per model, as a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="small models, 2 rounds: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"manifold_opt {manifold_opt.__version__}, torch {torch.__version__}, {args.threads} threads\n")
    print("| | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "---:|" * len(COLUMNS))
    for name, make in (TOYS if args.toy else WORKS).items():
        figures = measure(make, 2 if args.toy else args.rounds)
        print(
            f"| {name} | " + " | ".join(form.format(figures[key]) for key, form in COLUMNS.items()) + " |", flush=True
        )
    print("\n| peak of a step | " + " | ".join(CAREFUL) + " |")
    print("|---|" + "---:|" * len(CAREFUL))
    for count, p, n in ((2, 8, 8),) if args.toy else ((4, 1024, 1024), (1, 1024, 4096), (1000, 32, 64)):
        peaks = " | ".join(f"{peak:.2f}" for peak in careful_peaks(count, p, n))
        print(f"| {count} of {p} x {n} | {peaks} |", flush=True)


if __name__ == "__main__":
    main()
