"""Certified accuracy with several seeds: examples/lipschitz_classifier.py, once a seed.

    python benchmarks/reproduced/certified.py

The net, its four ways to keep layers from stretching and the certificates are those of the example: GroupSort between
layers of norm one (Anil, Lucas & Grosse 2019, arXiv 1811.05381), certified by the margin (Tsuzuku, Sato & Sugiyama
2018, arXiv 1802.04034). The attack is left out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from entry import Parser, spread, write

from common import Runs, images, panels, positive_int, save, show  # isort: skip
from lipschitz_classifier import CONTENDERS, RADII, certified_radii, spectral_norms, train  # isort: skip


def run(name: str, seed: int, args: Any, data: Any) -> dict[str, Any]:
    """Train and certify one net."""
    options = argparse.Namespace(**vars(args), seed=seed)
    with Runs() as runs:
        net, norms, _ = train(name, options, data, runs)
    net.eval().double()
    lipschitz = math.prod(spectral_norms(net))
    with torch.no_grad():
        logits = net(data.test[0].unsqueeze(1).double())
    radii = certified_radii(logits, data.test[1], lipschitz)
    curve = [float(((radii > 0) & (radii >= radius)).double().mean()) for radius in torch.linspace(0, 1.5, 31)]
    return {
        "run": name,
        "seed": seed,
        "accuracy": float((logits.argmax(1) == data.test[1]).double().mean()),
        "certified": {radius: float((radii >= radius).double().mean()) for radius in RADII},
        "lipschitz": lipschitz,
        "largest": max(norms),
        "curve": curve,
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Train and certify all nets with all seeds; print the table, save figures and picture."""
    parser = Parser(__file__, "Certified accuracy of Lipschitz nets, with several seeds.")
    add = parser.add_argument
    add("--data", type=Path, help="folder of the four files of Fashion-MNIST, if it is not Debian's")
    add("--steps", type=positive_int, default=1000, help="of training (%(default)s)")
    add("--width", type=positive_int, default=128, help="of the hidden layers, even (%(default)s)")
    args = parser.parse(argv, toy={"steps": 20, "width": 16})
    for name, value in {"batch_size": 128, "lr": 3e-3, "scale": 8.0, "every": 10}.items():
        setattr(args, name, value)  # the example's
    data = images(args.data, toy=args.toy)
    print(f"{data.title}; {args.steps} steps, width {args.width}")
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in CONTENDERS:
            rows.append(run(name, seed, args, data))
            write(args, rows)
    table = []
    figure, (plot,) = panels(1, width=7, height=4)
    for name, contender in CONTENDERS.items():
        mine = [row for row in rows if row["run"] == name]
        columns = [[100 * row["accuracy"] for row in mine]]
        columns += [[100 * row["certified"][radius] for row in mine] for radius in RADII[:3]]
        bounds = f"{max(row['largest'] for row in mine):.4f}"
        table.append((name, *(spread(column, ".1f") for column in columns), bounds))
        for row in mine:
            label = name if row["seed"] == args.seeds[0] else None
            plot.plot(torch.linspace(0, 1.5, 31), row["curve"], color=contender.color, label=label, linewidth=1.2)
    plot.set(title="Certified accuracy, one line a seed", xlabel="how far an image may be moved", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    show(("layers", "accuracy %", *(f"at {radius:g}" for radius in RADII[:3]), "largest norm"), table)
    save(figure, args.plot)


if __name__ == "__main__":
    main()
