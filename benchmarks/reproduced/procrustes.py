"""Two hundred Procrustes problems at once, as in the example of the landing algorithm, beside peers.

    python benchmarks/reproduced/procrustes.py

min ||X A - B||^2 over 200 orthogonal matrices X of 100 x 100, with Gaussian A and B, the loss divided by 200, and
gradient descent at lr 0.3: examples/plot_procrustes.py of github.com/pierreablin/landing (Ablin & Peyre 2022, arXiv
2102.07432). All start at the polar factors of the Gaussian start, and take turns in one process.

The optimum is that of the component of the start. The orthogonal matrices have two components, of determinant 1 and -1,
and no small step leads from one to the other, so half of the problems cannot reach the optimum over both.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from entry import Parser, spread, write
from stiefel import CONTENDERS, contenders, descend
from torch import Tensor

from manifold_opt import nearest_orthogonal

from common import panels, positive_float, positive_int, save, show  # isort: skip


def optimum(a: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """The smallest ``||X a - b||^2`` of every problem, over the component of ``start`` and over both; in float64.

    By the singular value decomposition of ``b a^T``; where the determinant of its polar factor has the other sign, the
    direction of the smallest singular value is reversed.
    """
    a, b = a.double(), b.double()
    u, s, vh = torch.linalg.svd(b @ a.mT)
    sign = torch.linalg.slogdet(u @ vh).sign * torch.linalg.slogdet(start.double()).sign
    constant = a.square().sum((-2, -1)) + b.square().sum((-2, -1))
    other = (constant - 2 * s.sum(-1)).clone()
    s[..., -1] *= sign.sign()
    return constant - 2 * s.sum(-1), other


def run(name: str, seed: int, args: Any) -> dict[str, Any]:
    """All problems of a seed by one contender."""
    generator = torch.Generator().manual_seed(seed)
    shape = (args.problems, args.size, args.size)
    a, b, start = (torch.randn(shape, generator=generator) for _ in range(3))
    start = nearest_orthogonal(start)
    best, both = optimum(a, b, start)

    def loss(x: Tensor) -> Tensor:
        return (x @ a - b).square().sum() / len(a)

    def gap(x: Tensor) -> float:
        values = (x.double() @ a.double() - b.double()).square().sum((-2, -1))
        return float((values - best).mean() / best.mean())

    found = descend(CONTENDERS[name][0](start, args.lr), lambda: loss, gap, args.steps, args.every)
    return {"run": name, "seed": seed, **found, "components": float((best - both).mean() / best.mean())}


def draw(rows: list[dict[str, Any]], args: Any, title: str) -> None:
    """The gap against steps and CPU time, and the distance from orthogonality against steps."""
    figure, plots = panels(3, width=3.5, height=3.3)
    keys = (("step", "gap"), ("seconds", "gap"), ("step", "defect"))
    for row in rows:
        for plot, (x, y) in zip(plots, keys, strict=True):
            label = row["run"] if row["seed"] == args.seeds[0] and plot is plots[0] else None
            plot.semilogy(row[x], row[y], color=CONTENDERS[row["run"]][1], label=label, linewidth=1.2)
    plots[0].set(title=title, xlabel="step")
    plots[1].set(title="the same", xlabel="CPU seconds")
    plots[2].set(title="largest |X X' - I|", xlabel="step")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(figure, args.plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Run all contenders with all seeds; print the table, save figures and picture."""
    parser = Parser(__file__, "Procrustes problems, beside peers.")
    add = parser.add_argument
    add("--problems", type=positive_int, default=200, help="(%(default)s)")
    add("--size", type=positive_int, default=100, help="rows and columns (%(default)s)")
    add("--steps", type=positive_int, default=100, help="of gradient descent (%(default)s)")
    add("--every", type=positive_int, default=5, help="steps between two looks (%(default)s)")
    add("--lr", type=positive_float, default=0.3, help="of all (%(default)s)")
    args = parser.parse(argv, toy={"problems": 5, "size": 8, "steps": 20, "every": 5, "lr": 0.1})
    print(f"{args.problems} problems of {args.size} x {args.size}, {args.steps} steps at lr {args.lr:g}")
    rows: list[dict[str, Any]] = []
    names = contenders()
    for seed in args.seeds:
        for name in names:
            rows.append(run(name, seed, args))
            write(args, rows)
    table = []
    for name in names:
        mine = [row for row in rows if row["run"] == name]
        columns = [[row["gap"][-1] for row in mine], [1000 * row["seconds"][-1] / args.steps for row in mine]]
        defects = (max(row["defect"][-1] for row in mine), max(max(row["defect"]) for row in mine))
        table.append((name, *map(spread, columns), *(f"{defect:.1e}" for defect in defects)))
    both = spread([row["components"] for row in rows if row["run"] == names[0]])
    head = ("optimizer", "(f - f*) / f*", "CPU ms a step", "last |XX' - I|", "largest")
    show(head, table, caption=f"the optimum over both components is lower by {both} of f*")
    draw(rows, args, "(f - f*) / f*")


if __name__ == "__main__":
    main()
