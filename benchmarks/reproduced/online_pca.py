"""Online PCA on the Stiefel manifold, beside peers: the leading subspace from a stream of batches.

    python benchmarks/reproduced/online_pca.py

min -E ||X a||^2 / 2 over X with orthonormal rows, 20 x 500, for Gaussian a with eigenvalues 1, 1/2, 1/3, ... in a
random basis, a new batch of 128 in every step: the task of the landing and POGO papers (arXiv 2303.16510, 2602.14656)
at the size of a laptop. Every optimizer is run at several learning rates, constant over the run; the best one is that
with the smallest gap at the end, in the mean over the seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from entry import Parser, spread, write
from procrustes import draw
from stiefel import CONTENDERS, Loss, contenders, descend
from torch import Tensor

from manifold_opt import init

from common import positive_float, positive_int, show  # isort: skip


def spectrum(n: int) -> Tensor:
    """Eigenvalues 1, 1/2, ..., 1/n."""
    return 1 / torch.arange(1, n + 1, dtype=torch.float64)


def gap(x: Tensor, basis: Tensor, values: Tensor) -> float:
    """The variance that the rows of ``x`` (1, p, n) miss, as a part of the largest that p of them can have.

    The covariance is ``basis @ diag(values) @ basis.mT``. Rows are made orthonormal first: length gains nothing.
    """
    rows = torch.linalg.qr(x[0].double().mT)[0].mT @ basis
    best = values.sort(descending=True).values[: len(rows)].sum()
    return float(1 - (rows.square() @ values).sum() / best)


def run(name: str, lr: float, seed: int, args: Any) -> dict[str, Any]:
    """One contender with one learning rate and seed."""
    generator = torch.Generator().manual_seed(seed)
    values = spectrum(args.n)
    basis = init.orthogonal_(torch.empty(args.n, args.n, dtype=torch.float64), generator=generator)
    start = init.orthogonal_(torch.empty(args.p, args.n), generator=generator).unsqueeze(0)
    root = (basis * values.sqrt()).mT.float()

    def draw_batch() -> Loss:
        batch = torch.randn(args.batch_size, args.n, generator=generator) @ root
        return lambda x: -(batch @ x[0].mT).square().sum() / (2 * args.batch_size)

    found = descend(CONTENDERS[name][0](start, lr), draw_batch, lambda x: gap(x, basis, values), args.steps, args.every)
    return {"run": name, "lr": lr, "seed": seed, **found}


def best_rate(rows: list[dict[str, Any]], name: str) -> float:
    """The learning rate with the smallest mean gap at the end."""
    rates = {row["lr"] for row in rows if row["run"] == name}
    last = {lr: [row["gap"][-1] for row in rows if row["run"] == name and row["lr"] == lr] for lr in rates}
    return min(rates, key=lambda lr: statistics.fmean(last[lr]))


def main(argv: Sequence[str] | None = None) -> None:
    """Run all contenders with all rates and seeds; print the table, save figures and picture."""
    parser = Parser(__file__, "Online PCA, beside peers.")
    add = parser.add_argument
    add("--n", type=positive_int, default=500, help="dimension of the data (%(default)s)")
    add("--p", type=positive_int, default=20, help="of the subspace (%(default)s)")
    add("--batch-size", type=positive_int, default=128, help="samples a step (%(default)s)")
    add("--steps", type=positive_int, default=500, help="(%(default)s)")
    add("--every", type=positive_int, default=20, help="steps between two looks (%(default)s)")
    add("--lrs", type=positive_float, nargs="+", default=[0.3, 1.0, 3.0], help="learning rates (%(default)s)")
    args = parser.parse(argv, toy={"n": 20, "p": 3, "batch_size": 16, "steps": 20, "every": 5, "lrs": [0.1, 0.3]})
    print(f"{args.p} x {args.n}, batches of {args.batch_size}, {args.steps} steps")
    rows: list[dict[str, Any]] = []
    names = contenders()
    for seed in args.seeds:
        for name in names:
            rows += [run(name, lr, seed, args) for lr in args.lrs]
            write(args, rows)
    best = {name: best_rate(rows, name) for name in names}
    table = []
    for name in names:
        gaps = [
            spread([row["gap"][-1] for row in rows if row["run"] == name and row["lr"] == lr], ".2g") for lr in args.lrs
        ]
        mine = [row for row in rows if row["run"] == name and row["lr"] == best[name]]
        ms = spread([1000 * row["seconds"][-1] / args.steps for row in mine], ".2f")
        table.append((name, *gaps, ms, f"{max(row['defect'][-1] for row in mine):.1e}"))
    show(("optimizer", *(f"lr {lr:g}" for lr in args.lrs), "CPU ms", "|XX' - I|"), table)
    shown = [row for row in rows if row["lr"] == best[row["run"]]]
    draw(shown, args, "missed variance, best lr")


if __name__ == "__main__":
    main()
