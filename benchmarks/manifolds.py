"""Constraints other than orthogonality: a training step beside torch's parametrizations, and what holds after it.

    python benchmarks/manifolds.py --threads 2

Forward, backward and optimizer of some layers alike, milliseconds a step, medians over rounds in which all take turns.
The bound on the spectral norm is one that the weights would leave: many of their singular values come to lie at it.
What is left of a constraint is the largest of all steps, in float64: sigma_max / bound - 1, or | ||row|| - 1 |.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import manifold_opt
from manifold_opt import Adam, mark_spectral, mark_unit_norm

BOUND = 0.5
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear 64": (lambda: nn.Linear(64, 64), (32, 64)),
    "Linear 512": (lambda: nn.Linear(512, 512), (32, 512)),
    "Conv 64 x 64 x 3 x 3": (lambda: nn.Conv2d(64, 64, 3, padding=1), (4, 64, 8, 8)),
}


def unit_norm_of_torch(layer: nn.Module) -> None:
    """weight_norm with its magnitudes held at one."""
    parametrizations.weight_norm(layer)
    magnitude = layer.parametrizations.weight.original0
    magnitude.data.fill_(1)
    magnitude.requires_grad_(False)


def marked(layer: nn.Module, constraint: str) -> None:
    """The constraint, kept by the optimizer."""
    mark_unit_norm(layer, "weight") if constraint == "unit norm" else mark_spectral(layer, "weight", BOUND)


def bounded_of_torch(layer: nn.Module) -> None:
    """spectral_norm, by one power iteration a step."""
    parametrizations.spectral_norm(layer)


CONSTRAINTS = {"unit norm": unit_norm_of_torch, "spectral norm": bounded_of_torch}


def left_over(layer: nn.Module, constraint: str, contender: str) -> float:
    """How far a layer is from what it is to be."""
    with torch.no_grad(), torch.random.fork_rng():
        layer.eval()  # looking is no power iteration
        weight = layer.weight.double().flatten(1)
        layer.train()
    if constraint == "unit norm":
        return float((torch.linalg.vector_norm(weight, dim=1) - 1).abs().max())
    bound = 1.0 if contender == "torch" else BOUND  # torch divides by an estimate of the norm
    return max(0.0, float(torch.linalg.matrix_norm(weight, 2)) / bound - 1)


def steps_of(
    make: Callable[[], nn.Module], shape: tuple[int, ...], count: int, constraint: str, contender: str
) -> Iterator[tuple[float, float]]:
    """Milliseconds and what is left of the constraint, step by step."""
    torch.manual_seed(0)
    net = nn.Sequential(*(make() for _ in range(count)))
    for layer in net:
        if contender == "ours":
            marked(layer, constraint)
        elif contender == "torch":
            CONSTRAINTS[constraint](layer)
    parameters = [p for p in net.parameters() if p.requires_grad]
    opt = (Adam if contender == "ours" else torch.optim.Adam)(parameters, lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    data: Tensor = torch.randn(shape, generator=generator)
    target = torch.randn(shape, generator=generator)
    while True:
        began = time.perf_counter()
        opt.zero_grad()
        (net(data) * target).mean().backward()
        opt.step()
        spent = 1000 * (time.perf_counter() - began)
        yield spent, 0.0 if contender == "plain" else max(left_over(x, constraint, contender) for x in net)


def main() -> None:
    """Print one row a constraint, layer and count."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 20])
    parser.add_argument("--toy", action="store_true", help="one layer of each, a few steps: does it run?")
    args = parser.parse_args()
    if args.toy:
        args.steps, args.counts = 8, [1]
    torch.set_num_threads(args.threads)
    print(f"manifold_opt {manifold_opt.__version__}, torch {torch.__version__}, {args.threads} threads, Adam")
    print(f"{'constraint':14} {'layers':26} {'plain':>8} {'torch':>8} {'ours':>8}   {'left: torch':>11} {'ours':>8}")
    for constraint, (name, (make, shape)), count in itertools.product(CONSTRAINTS, LAYERS.items(), args.counts):
        runs = {c: steps_of(make, shape, count, constraint, c) for c in ("plain", "torch", "ours")}
        seen: dict[str, list[tuple[float, float]]] = {c: [] for c in runs}
        for _ in range(args.steps if count == 1 else args.steps // 4):
            for contender, run in runs.items():
                seen[contender].append(next(run))
        ms = {c: statistics.median(spent for spent, _ in rows[5:]) for c, rows in seen.items()}
        left = {c: max(error for _, error in rows) for c, rows in seen.items()}
        print(
            f"{constraint:14} {f'{count} x {name}':26} {ms['plain']:8.2f} {ms['torch']:8.2f} {ms['ours']:8.2f}"
            f"   {left['torch']:11.1e} {left['ours']:8.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
