"""The MLP of *Modular Manifolds* on Fashion-MNIST: manifold Muon in closed form beside AdamW and torch's Muon.

    python benchmarks/reproduced/muon_mlp.py

The code beside the post (Bernstein, Thinking Machines 2025; github.com/thinking-machines-lab/manifolds) trains layers
of 128, 64 and 10 without biases on CIFAR-10, batches of 1024, 5 epochs, with a learning rate that falls linearly to
zero, 0.1 at first for manifold Muon, without momentum. Here the images are Fashion-MNIST, 784 pixels, standardized;
every optimizer is run at several learning rates. All three weights have orthonormal rows or columns under manifold
Muon.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from entry import Parser, spread, write
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from manifold_opt import Muon, mark_orthogonal
from manifold_opt.compare.data import Images

from common import BLACK, BLUE, ORANGE, RED, images, panels, positive_int, save, show  # isort: skip


def network(inputs: int) -> nn.Sequential:
    """Three linear layers, no biases."""
    sizes = (inputs, 128, 64, 10)
    first, second, third = (nn.Linear(n, p, bias=False) for n, p in itertools.pairwise(sizes))
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)


def manifold_muon(momentum: float) -> Callable[[nn.Module, float], torch.optim.Optimizer]:
    """This package's Muon; the post's step of size eta turns by the angle atan(eta)."""

    def build(net: nn.Module, eta: float) -> torch.optim.Optimizer:
        for parameter in net.parameters():
            mark_orthogonal(parameter)
        return Muon(net.parameters(), math.atan(eta), momentum=momentum, nesterov=momentum > 0)

    return build


CONTENDERS = {
    "manifold Muon": (manifold_muon(0.0), (0.03, 0.1, 0.3), RED),
    "with momentum 0.95": (manifold_muon(0.95), (0.03, 0.1), ORANGE),
    "AdamW": (
        lambda net, lr: torch.optim.AdamW(net.parameters(), lr, weight_decay=0.0),
        (1e-3, 3e-3, 1e-2, 3e-2),
        BLACK,
    ),
    "torch.optim.Muon": (
        lambda net, lr: torch.optim.Muon(net.parameters(), lr, weight_decay=0.0),
        (0.03, 0.1),
        BLUE,
    ),
}


@torch.no_grad()
def accuracy(net: nn.Module, split: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The part of the images named right."""
    return float((net(split[0]).argmax(1) == split[1]).double().mean())


def train(name: str, lr: float, seed: int, args: Any, data: Images) -> dict[str, Any]:
    """One run."""
    x, y = data.train
    torch.manual_seed(seed)
    net = network(x.shape[1])
    opt = CONTENDERS[name][0](net, lr)
    steps = args.epochs * math.ceil(len(x) / args.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 1 - step / steps)
    losses, began = [], time.process_time()
    for _ in range(args.epochs):
        for batch in torch.randperm(len(x)).split(args.batch_size):
            opt.zero_grad()
            loss = F.cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            opt.step()
            schedule.step()
            losses.append(loss.item())
    ms = 1000 * (time.process_time() - began) / steps
    values = [torch.linalg.svdvals(parameter.detach().double()) for parameter in net.parameters()]
    return {
        "run": name,
        "lr": lr,
        "seed": seed,
        "train": accuracy(net, data.train),
        "test": accuracy(net, data.test),
        "loss": statistics.fmean(losses[-20:]),
        "smallest": min(float(value[-1]) for value in values),
        "largest": max(float(value[0]) for value in values),
        "cpu_ms": ms,
    }


def draw(rows: list[dict[str, Any]], args: Any) -> None:
    """Test accuracy against the learning rate, and the extreme singular values: a dot a seed."""
    figure, (left, right) = panels(2, width=4.6, height=3.5)
    for name, (_, rates, color) in CONTENDERS.items():
        mine = [row for row in rows if row["run"] == name]
        means = [statistics.fmean(row["test"] for row in mine if row["lr"] == lr) for lr in rates]
        left.semilogx(rates, means, color=color, label=name)
        left.semilogx([row["lr"] for row in mine], [row["test"] for row in mine], ".", color=color)
        for key in ("smallest", "largest"):
            right.loglog([row["lr"] for row in mine], [row[key] for row in mine], ".", color=color)
    left.set(title=f"Test accuracy, {args.epochs} epochs", xlabel="learning rate at the start")
    right.set(title="smallest and largest singular value at the end", xlabel="learning rate at the start")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(figure, args.plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Train all contenders at all rates with all seeds; print the table, save figures and picture."""
    parser = Parser(__file__, "The MLP of Modular Manifolds on Fashion-MNIST.")
    add = parser.add_argument
    add("--data", type=Path, help="folder of the four files of Fashion-MNIST, if it is not Debian's")
    add("--epochs", type=positive_int, default=5, help="(%(default)s)")
    add("--batch-size", type=positive_int, default=1024, help="images a step (%(default)s)")
    args = parser.parse(argv, toy={"epochs": 1, "batch_size": 256})
    if not hasattr(torch.optim, "Muon"):
        raise SystemExit("torch has no Muon before 2.9")
    raw = images(args.data, toy=args.toy)
    mean, deviation = raw.train[0].mean(), raw.train[0].std()
    splits = [((x.flatten(1) - mean) / deviation, y) for x, y in (raw.train, raw.test)]
    if args.toy:
        splits = [(x[:1000], y[:1000]) for x, y in splits]
    data = Images(raw.name, raw.title, *splits)
    print(f"{data.title}; {args.epochs} epochs, batches of {args.batch_size}")
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name, (_, rates, _) in CONTENDERS.items():
            rows += [train(name, lr, seed, args, data) for lr in rates]
            write(args, rows)
    table = []
    for name, (_, rates, _) in CONTENDERS.items():
        for lr in rates:
            mine = [row for row in rows if row["run"] == name and row["lr"] == lr]
            percent = (spread([100 * row[key] for row in mine], ".2f") for key in ("train", "test"))
            extremes = (f"{min(row['smallest'] for row in mine):.4f}", f"{max(row['largest'] for row in mine):.4f}")
            ms = f"{statistics.fmean(row['cpu_ms'] for row in mine):.1f}"
            table.append((name, f"{lr:g}", *percent, " to ".join(extremes), ms))
    show(("optimizer", "lr", "train %", "test %", "singular values", "CPU ms"), table)
    draw(rows, args)


if __name__ == "__main__":
    main()
