"""Weight normalization by unit rows: mark_unit_norm beside torch's parametrization, and beside neither.

    python benchmarks/reproduced/weight_norm.py

w = g v / |v| decouples the length of a weight vector from its direction (Salimans & Kingma 2016, arXiv 1602.07868).
With rows of norm one and a gain g behind them it is the same function without the division: what differs is how the
direction is trained. An MLP on Fashion-MNIST, from the same functions, over the same batches, at several rates.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from entry import Parser, spread, thin, write
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.nn.utils import parametrizations

from manifold_opt import Adam, mark_unit_norm
from manifold_opt.compare.data import Images

from common import BLACK, BLUE, RED, images, panels, positive_float, positive_int, save, show  # isort: skip


class Scaled(nn.Module):
    """A linear layer as ``g * (W x) + b`` with unit rows of W; the same function as the given one."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.gain = nn.Parameter(self.weight.detach().norm(dim=1))
        mark_unit_norm(self, "weight")

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, out)`` of ``(batch, in)``."""
        return torch.addcmul(self.bias, self.gain, F.linear(x, self.weight))


CONTENDERS = {
    "plain": (lambda layer: layer, BLACK),
    "torch weight_norm": (parametrizations.weight_norm, BLUE),
    "mark_unit_norm": (Scaled, RED),
}


def network(name: str, inputs: int, width: int) -> nn.Sequential:
    """Three linear layers; weights of Kaiming's size, biases zero."""
    layers: list[nn.Module] = []
    for n, p in ((inputs, width), (width, width), (width, 10)):
        layer = nn.Linear(n, p)
        nn.init.kaiming_normal_(layer.weight)
        nn.init.zeros_(layer.bias)
        layers += [CONTENDERS[name][0](layer), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def train(name: str, lr: float, seed: int, args: Any, data: Images) -> dict[str, Any]:
    """One run of Adam; what is not marked is torch's, bit for bit."""
    x, y = data.train
    torch.manual_seed(seed)
    net = network(name, x.shape[1], args.width)
    opt = Adam(net.parameters(), lr)
    losses, began = [], time.process_time()
    for _ in range(args.epochs):
        for batch in torch.randperm(len(x)).split(args.batch_size):
            opt.zero_grad()
            loss = F.cross_entropy(net(x[batch]), y[batch])
            loss.backward()
            opt.step()
            losses.append(loss.item())
    ms = 1000 * (time.process_time() - began) / len(losses)
    with torch.no_grad():
        test = float((net(data.test[0]).argmax(1) == data.test[1]).double().mean())
        norms = [m.weight.norm(dim=1).sub(1).abs().max() for m in net if isinstance(m, Scaled)]
    last = statistics.fmean(losses[-100:])
    row = {"run": name, "lr": lr, "seed": seed, "loss": last if math.isfinite(last) else math.inf, "test": test}
    return {**row, "error": float(max(norms, default=torch.tensor(0))), "cpu_ms": ms, "curve": thin(losses, 60)}


def draw(rows: list[dict[str, Any]], args: Any) -> None:
    """Training loss at the end against the learning rate, and on the way at the middle one."""
    figure, (left, right) = panels(2, width=4.6, height=3.5)
    middle = args.lrs[len(args.lrs) // 2]
    for name, (_, color) in CONTENDERS.items():
        mine = [row for row in rows if row["run"] == name]
        means = [statistics.fmean(row["loss"] for row in mine if row["lr"] == lr) for lr in args.lrs]
        left.loglog(args.lrs, means, color=color, label=name)
        left.loglog([row["lr"] for row in mine], [row["loss"] for row in mine], ".", color=color)
        for row in mine:
            if row["lr"] == middle:
                steps = [args.epochs * (k + 1) / len(row["curve"]) for k in range(len(row["curve"]))]
                right.semilogy(steps, row["curve"], color=color, linewidth=1)
    left.set(title="Training loss at the end", xlabel="learning rate", ylabel="mean of the last 100 batches")
    right.set(title=f"Training loss at lr {middle:g}", xlabel="epoch")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save(figure, args.plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Train all contenders at all rates with all seeds; print the table, save figures and picture."""
    parser = Parser(__file__, "Weight normalization by unit rows.")
    add = parser.add_argument
    add("--data", type=Path, help="folder of the four files of Fashion-MNIST, if it is not Debian's")
    add("--epochs", type=positive_int, default=1, help="(%(default)s)")
    add("--batch-size", type=positive_int, default=128, help="images a step (%(default)s)")
    add("--width", type=positive_int, default=256, help="of the hidden layers (%(default)s)")
    add("--lrs", type=positive_float, nargs="+", default=[3e-4, 1e-3, 3e-3, 1e-2], help="learning rates (%(default)s)")
    args = parser.parse(argv, toy={"epochs": 1, "width": 16, "lrs": [1e-2]})
    raw = images(args.data, toy=args.toy)
    splits = [(x.flatten(1), y) for x, y in (raw.train, raw.test)]
    if args.toy:
        splits = [(x[:2000], y[:2000]) for x, y in splits]
    data = Images(raw.name, raw.title, *splits)
    print(f"{data.title}; width {args.width}, {args.epochs} epochs, batches of {args.batch_size}")
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in CONTENDERS:
            rows += [train(name, lr, seed, args, data) for lr in args.lrs]
            write(args, rows)
    table = []
    for name in CONTENDERS:
        for lr in args.lrs:
            mine = [row for row in rows if row["run"] == name and row["lr"] == lr]
            loss = spread([row["loss"] for row in mine])
            test = spread([100 * row["test"] for row in mine], ".2f")
            ms = f"{statistics.fmean(row['cpu_ms'] for row in mine):.1f}"
            table.append((name, f"{lr:g}", loss, test, f"{max(row['error'] for row in mine):.0e}", ms))
    show(("layers", "lr", "training loss", "test %", "largest | |w| - 1 |", "CPU ms"), table)
    draw(rows, args)


if __name__ == "__main__":
    main()
