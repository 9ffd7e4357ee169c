"""A soak: a million noisy steps of every length, with every exact retraction; the largest LAPACK ratio of all steps.

    python benchmarks/soak.py --json soak.json --plot docs/soak.png

Gradients are standard normal, so that nothing ever settles, and the learning rate of every step is drawn anew,
log-uniformly from 1e-4 to 1: steps too short to see and steps several times around the manifold, in any order. The
weight is three square gates, 8 x 8 each, or with `--shape wide` two blocks of 8 x 12. The ratio
||I - W W^T||_1 / (n u) is LAPACK's measure of orthogonality, u the unit roundoff; LAPACK's own tests accept 30. No step
is left out.

A run takes about eight minutes of one core, and there are twenty. `--json` is written as each ends; what it holds
already is not run again.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import torch
from drift import defect_ratio
from torch import Tensor, nn

import manifold_opt
from manifold_opt import RETRACTIONS, SGD, Adam, constraint_of, init, mark_orthogonal

RULES = {"sgd": functools.partial(SGD, momentum=0.9), "adam": Adam}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
SCHEMES = [name for name, scheme in RETRACTIONS.items() if scheme.exact]
SHAPES = {"gates": ((24, 8), 3), "wide": ((16, 12), 2)}  # of a weight, and its blocks
SHORTEST, LONGEST = 1e-4, 1.0  # learning rates
TOGETHER = 250  # steps whose weights are kept to be judged at once
POINTS = 500  # of a curve: each the largest ratio of as many steps


def run(optimizer: str, scheme: str, dtype: str, shape: str, steps: int) -> dict[str, Any]:
    """One run: the largest ratio of all steps, that of every stretch of them, and what the optimizer has counted."""
    torch.set_num_threads(1)
    began = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    size, blocks = SHAPES[shape]
    value = init.orthogonal_(torch.empty(size, dtype=DTYPES[dtype]), blocks=blocks, generator=generator)
    weight = mark_orthogonal(nn.Parameter(value), blocks=blocks)
    opt = RULES[optimizer]([weight], lr=SHORTEST, retraction=scheme)
    curve: list[float] = []
    stretch = max(steps // POINTS, 1)
    for start in range(0, steps, stretch):
        largest = 0.0
        for first in range(start, min(start + stretch, steps), TOGETHER):
            count = min(TOGETHER, start + stretch - first, steps - first)
            largest = max(largest, several(opt, weight, count, generator))
        curve.append(largest)
    return {
        "optimizer": optimizer,
        "scheme": scheme,
        "dtype": dtype,
        "shape": shape,
        "steps": steps,
        "largest_ratio": max(curve),
        "curve": curve,
        "seconds": time.perf_counter() - began,
        "metrics": opt.metrics(),
    }


def several(opt: torch.optim.Optimizer, weight: Tensor, count: int, generator: torch.Generator) -> float:
    """Make ``count`` steps, and return the largest ratio of a block after any of them; infinite for a NaN."""
    noise = torch.randn(count, *weight.shape, dtype=weight.dtype, generator=generator).unbind()
    rates = torch.empty(count).uniform_(math.log(SHORTEST), math.log(LONGEST), generator=generator).exp()
    seen = torch.empty(count, *weight.shape, dtype=weight.dtype)
    for g, lr, kept in zip(noise, rates.tolist(), seen.unbind(), strict=True):
        weight.grad, opt.param_groups[0]["lr"] = g, lr
        opt.step()
        kept.copy_(weight.detach())
    ratios = [defect_ratio(blocks) for blocks in seen.chunk(constraint_of(weight).blocks, dim=1)]
    return max(math.inf if math.isnan(ratio) else ratio for ratio in ratios)


def plot(rows: list[dict[str, Any]], path: str) -> None:
    """Largest ratio of every stretch against steps: a panel for each optimizer and dtype, a curve for each scheme."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True, sharey=True)
    for ax, (optimizer, dtype) in zip(axes.flat, itertools.product(RULES, DTYPES), strict=True):
        for row in rows:
            if (row["optimizer"], row["dtype"]) == (optimizer, dtype):
                steps = [row["steps"] * (k + 1) / len(row["curve"]) for k in range(len(row["curve"]))]
                ax.plot(steps, row["curve"], linewidth=0.8, label=f"{row['scheme']}: {row['largest_ratio']:.2f}")
        ax.set_title(f"{optimizer}, {dtype}")
        ax.grid(alpha=0.3)
        ax.set_ylim(0, 1.6 * max(row["largest_ratio"] for row in rows))  # room for the legend
        ax.legend(title="largest of all", fontsize=8, title_fontsize=8, loc="upper right", ncols=2)
    figure.supxlabel("steps")
    figure.supylabel("largest ratio $\\|I - WW^T\\|_1 / (n u)$ of a stretch; LAPACK accepts 30")
    figure.savefig(path, dpi=130)


def table(rows: list[dict[str, Any]]) -> str:
    """One line a scheme, one column an optimizer and dtype."""
    cells = {(row["scheme"], row["optimizer"], row["dtype"]): f"{row['largest_ratio']:.2f}" for row in rows}
    columns = list(itertools.product(RULES, DTYPES))
    lines = ["| largest ratio | " + " | ".join(" ".join(column) for column in columns) + " |"]
    lines.append("|---|" + "---|" * len(columns))
    for scheme in SCHEMES:
        lines.append(f"| {scheme} | " + " | ".join(cells.get((scheme, *column), "-") for column in columns) + " |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run what is not known yet, print the table, and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--schemes", nargs="+", default=SCHEMES, choices=SCHEMES)
    parser.add_argument("--shape", default="gates", choices=SHAPES)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the runs here as they end, and take up those it has")
    parser.add_argument("--plot", help="draw the curves here, as PNG")
    parser.add_argument("--toy", action="store_true", help="a hundred steps: does it run?")
    args = parser.parse_args(arguments)
    if args.toy:
        args.steps = 100
    rows = json.loads(args.json.read_text())["rows"] if args.json and args.json.exists() else []
    known = {(row["optimizer"], row["scheme"], row["dtype"], row["shape"], row["steps"]) for row in rows}
    wanted = [
        (rule, scheme, dtype, args.shape, args.steps) for scheme in args.schemes for rule in RULES for dtype in DTYPES
    ]
    print(f"manifold_opt {manifold_opt.__version__}, torch {torch.__version__}, {args.steps} steps", flush=True)
    with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
        for row in pool.imap(_run, [settings for settings in wanted if settings not in known]):
            rows.append(row)
            name = f"{row['optimizer']} {row['scheme']} {row['dtype']}"
            print(f"{name:32} largest ratio {row['largest_ratio']:6.2f}, {row['seconds']:6.0f} s", flush=True)
            if args.json:
                args.json.write_text(json.dumps({"torch": torch.__version__, "rows": rows}))
    rows = [
        row for row in rows if (row["optimizer"], row["scheme"], row["dtype"], row["shape"], row["steps"]) in wanted
    ]
    print(table(rows))
    if args.plot:
        plot(rows, args.plot)


def _run(settings: tuple[str, str, str, str, int]) -> dict[str, Any]:
    return run(*settings)


if __name__ == "__main__":
    main()
