"""What a step of Muon costs on orthogonal blocks, beside Adam, torch.optim.Muon and manifold Muon by dual ascent.

    python benchmarks/muon.py --threads 2

Medians over rounds in which the optimizers take turns, with new gradients in every step. torch.optim.Muon has no
constraint and takes one matrix at a time. The dual ascent is written from its formulas (*Modular Manifolds*, 2025): up
to 100 times a matrix sign, here by eight quintics of 3 products, for all blocks in one batch. The error is
|W W^T - I| / sqrt(p), the largest after a step.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import manifold_opt
from manifold_opt import Adam, Muon, mark_orthogonal, orthogonality_error

Step = Callable[[Tensor], None]  # of a gradient (B, p, n)
WORKS = {  # blocks, p, n
    "3 of 256 x 256": (3, 256, 256),
    "4 of 512 x 512": (4, 512, 512),
    "64 x 4096": (1, 64, 4096),
    "256 x 1024": (1, 256, 1024),
    "1000 of 32 x 64": (1000, 32, 64),
    "4096 of 16 x 16": (4096, 16, 16),
}
TOYS = {"2 of 4 x 6": (2, 4, 6)}
QUINTIC = (2.0, -1.5, 0.5)  # converges, unlike the coefficients of torch.optim.Muon


def msign(x: Tensor) -> Tensor:
    """Return an approximate polar factor of tall matrices."""
    x = x / torch.linalg.matrix_norm(x, keepdim=True)
    a, b, c = QUINTIC
    for _ in range(8):
        gram = x.mT @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x


def dual_ascent(w: Tensor, g: Tensor, eta: float, steps: int = 100, alpha: float = 0.01) -> Tensor:
    """Return the next points of manifold Muon, for tall matrices."""
    multiplier = -(w.mT @ g + g.mT @ w) / 4
    direction = g
    for step in range(steps):
        direction = msign(g + 2 * w @ multiplier)
        deviation = w.mT @ direction + direction.mT @ w
        if float(deviation.square().mean().sqrt()) < 1e-6:
            break
        multiplier = multiplier - alpha * (1 - step / steps) * deviation
    return msign(w - eta * direction)


def contenders(start: Tensor) -> dict[str, tuple[Step, Callable[[], Tensor]]]:
    """Return a step and the current blocks of every contender."""
    blocks, p, n = start.shape
    found: dict[str, tuple[Step, Callable[[], Tensor]]] = {}
    for name, make in (("Adam", lambda w: Adam([w], lr=1e-3)), ("Muon", lambda w: Muon([w], lr=0.02))):
        weight = mark_orthogonal(nn.Parameter(start.reshape(-1, n).clone()), blocks=blocks)
        found[name] = (
            _stepper(make(weight), [weight], lambda g: [g.reshape(-1, n)]),
            lambda weight=weight: weight.detach().view(-1, p, n),
        )
    free = [nn.Parameter(block.clone()) for block in start]
    found["torch Muon"] = _stepper(torch.optim.Muon(free, lr=0.02), free, list), lambda: torch.stack(list(free))
    current = [start.mT.clone()]

    def ascend(g: Tensor) -> None:
        current[0] = dual_ascent(current[0], g.mT, 0.02)

    found["dual ascent"] = ascend, lambda: current[0].mT
    return found


def _stepper(opt: torch.optim.Optimizer, params: list[nn.Parameter], split: Callable[[Tensor], list[Tensor]]) -> Step:
    def step(g: Tensor) -> None:
        for p, part in zip(params, split(g), strict=True):
            p.grad = part.clone()
        opt.step()

    return step


def measure(blocks: int, p: int, n: int, rounds: int) -> dict[str, tuple[float, float]]:
    """Return milliseconds of a step and the largest error of every contender."""
    torch.manual_seed(0)
    start = torch.linalg.qr(torch.randn(blocks, n, p))[0].mT.contiguous()
    found = contenders(start)
    spent: dict[str, list[float]] = {name: [] for name in found}
    for k in range(rounds + 2):
        g = torch.randn(blocks, p, n) / n**0.5
        for name, (step, _) in found.items():
            if name == "dual ascent" and k > 3:
                continue  # seconds each
            began = time.perf_counter()
            step(g)
            spent[name].append(1000 * (time.perf_counter() - began))
    return {
        name: (statistics.median(spent[name][1:]), orthogonality_error(current()) / p**0.5)
        for name, (_, current) in found.items()
    }


def main() -> None:
    """Print one row per work, as a table of Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="one small work, 2 rounds: does it run?")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(f"manifold_opt {manifold_opt.__version__}, torch {torch.__version__}, {args.threads} threads\n")
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit("torch has no Muon before 2.9")
    names = ("Adam", "Muon", "torch Muon", "dual ascent")
    print(f"| | {', ms | '.join(names)}, ms | error, Muon | error, dual ascent |\n|---|" + "---:|" * (len(names) + 2))
    for name, work in (TOYS if args.toy else WORKS).items():
        figures = measure(*work, 2 if args.toy else args.rounds)
        times = " | ".join(f"{figures[key][0]:.3g}" for key in names)
        print(f"| {name} | {times} | {figures['Muon'][1]:.1e} | {figures['dual ascent'][1]:.1e} |", flush=True)


if __name__ == "__main__":
    main()
