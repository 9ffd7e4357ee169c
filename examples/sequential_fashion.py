"""Fashion-MNIST read row by row and pixel by pixel, with and without orthogonal recurrent gates.

    pip install ".[examples]"
    apt install dataset-fashion-mnist
    python examples/sequential_fashion.py

(Where there is no such package: the four files of github.com/zalandoresearch/fashion-mnist, and --data FOLDER.)

What it shows: why orthogonality matters to a recurrent net, and where it does not. A net sees an image as 28 rows, or
as a long sequence of pixels (at default averaged over 2 x 2 first, so that 196 steps remain; all 784 with --full), and
names it at the end. How large is the gradient of the loss with respect to the hidden state at each step, before and
after training? Where it vanishes on its way back the net cannot learn from the first pixels. Three ways to train:

- own start: torch.optim.Adam from where torch's module starts;
- orthogonal start: torch.optim.Adam, recurrent gates orthogonal at the start and free from then on;
- constrained: manifold_opt.Adam from that same start, with the recurrent gates marked.

Batches and learning rates are the same in all three, and all clip gradients to norm one. The orthogonal start of nn.RNN
(relu) is Henaff's, rotations by random angles; the gates of nn.GRU and nn.LSTM start as random orthogonal matrices.

What to expect, in about two minutes on one core:

- nn.RNN by pixels: from its own start no gradient reaches the first pixels, in float32 it is zero; from the orthogonal
  start a thirtieth does. After 400 steps the three name 45, 59 and 63 % of the test images; with seed 1 it is 41, 56
  and 64 %, with seed 2 44, 62 and 59 %: the start is worth much, and what the constraint adds to it is uncertain.
- By rows, 28 steps, the orthogonal start helps nn.RNN (63 to 76 %), and the constraint does not (70 %).
- nn.LSTM has gates of its own against vanishing gradients. By rows the three end within two percent. By pixels its
  gradients vanish from either start, for they are multiplied by the sigmoids too; 34, 44 and 46 %.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    GREY,
    RED,
    SKY,
    Images,
    Parser,
    Runs,
    images,
    moving_average,
    one_of,
    panels,
    positive_float,
    positive_int,
    save,
    show,
)
from recurrent import orthogonal_start_
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from manifold_opt import Adam, mark_recurrent, orthogonality_error

WINDOW = 20  # batches whose mean loss is shown
PROBE = 64  # images whose gradients are looked at
FLOOR = 1e-12  # where the picture of the gradients ends
STYLES: dict[str, dict[str, Any]] = {  # the last two start as one: the upper is thinner, so that both are seen
    "own start": {"color": GREY, "linewidth": 1.5},
    "orthogonal start": {"color": SKY, "linewidth": 4.0},
    "constrained": {"color": RED, "linewidth": 1.5},
}


@dataclass(frozen=True)
class Cell:
    """A recurrent net of torch: how many gates it has, and the scheme they start by."""

    make: Callable[..., nn.RNNBase]
    gates: int
    scheme: str


CELLS = {
    "rnn": Cell(functools.partial(nn.RNN, nonlinearity="relu"), 1, "henaff"),
    "gru": Cell(nn.GRU, 3, "haar"),
    "lstm": Cell(nn.LSTM, 4, "haar"),
}


class Reader(nn.Module):
    """A recurrent net that reads a sequence, and a linear layer that names it at the end."""

    def __init__(self, cell: Cell, inputs: int, hidden: int) -> None:
        super().__init__()
        self.net = cell.make(inputs, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` of sequences ``(batch, time, inputs)``."""
        return self.head(self.net(x)[0][:, -1])

    def gradients(self, x: Tensor, classes: Tensor) -> list[float]:
        """Norm of the gradient of an image's loss with respect to its hidden state at each step; mean of the images."""
        state, seen = None, []
        for now in x.split(1, dim=1):  # step by step: in one call the states between are not to be had
            state = self.net(now, state)[1]
            hidden = state[0] if isinstance(state, tuple) else state
            hidden.retain_grad()
            seen.append(hidden)
        F.cross_entropy(self.head(seen[-1][0]), classes, reduction="sum").backward()
        self.zero_grad()
        return [hidden.grad.norm(dim=-1).mean().item() for hidden in seen]


@dataclass
class Sequences:
    """Images as sequences ``(count, time, inputs)``, and their classes."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass
class Run:
    """What one run leaves behind: a loss a step, gradients through time before and after, figures at the end."""

    losses: list[float]
    before: list[float]
    after: list[float]
    accuracy: float
    error: float


def as_sequences(found: Images, reading: str, pool: int, count: int) -> Sequences:
    """The first so many training images and all test images, row by row or pixel by pixel."""
    mean, deviation = found.train[0][:count].mean(), found.train[0][:count].std()

    def sequences(x: Tensor) -> Tensor:
        x = (x - mean) / deviation
        return x if reading == "rows" else F.avg_pool2d(x[:, None], pool).flatten(1)[..., None]

    x, y = (part[:count] for part in found.train)
    test_x, test_y = found.test
    return Sequences((sequences(x), y), (sequences(test_x), test_y))


def build(who: str, cell: Cell, inputs: int, args: argparse.Namespace) -> tuple[Reader, torch.optim.Optimizer]:
    """The net at its start and its optimizer."""
    torch.manual_seed(args.seed)
    reader = Reader(cell, inputs, args.hidden)
    if who != "own start":
        orthogonal_start_(reader, gates=cell.gates, scheme=cell.scheme)
    if who != "constrained":
        return reader, torch.optim.Adam(reader.parameters(), lr=args.lr)
    mark_recurrent(reader)
    return reader, Adam(reader.parameters(), lr=args.lr, orthogonal_lr_scale=args.scale)


def train(who: str, cell: Cell, data: Sequences, args: argparse.Namespace, advance: Callable[..., None]) -> Run:
    """One training from start to end."""
    (x, y), (test_x, test_y) = data.train, data.test
    reader, opt = build(who, cell, x.shape[-1], args)
    before = reader.gradients(x[:PROBE], y[:PROBE])
    batches = torch.Generator().manual_seed(args.seed)  # its own: the same batches for all
    losses: list[float] = []
    for _ in range(args.steps):
        some = torch.randint(len(x), (args.batch_size,), generator=batches)
        opt.zero_grad()
        loss = F.cross_entropy(reader(x[some]), y[some])
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
        advance(f"loss {statistics.fmean(losses[-WINDOW:]):.3f}")
    after = reader.gradients(x[:PROBE], y[:PROBE])
    with torch.no_grad():
        answers = torch.cat([reader(part).argmax(-1) for part in test_x.split(1000)])
    accuracy = (answers == test_y).double().mean().item()
    return Run(losses, before, after, accuracy, orthogonality_error(reader.net.weight_hh_l0, blocks=cell.gates))


def row_of(of: tuple[str, str, str], run: Run) -> tuple[str, ...]:
    """What the table says of a run."""
    cell, reading, who = of
    loss = statistics.fmean(run.losses[-WINDOW:])
    gradients = f"{run.before[0]:.0e}", f"{run.after[0]:.0e}"
    return f"{cell}, {reading}, {who}", f"{run.accuracy:.1%}", f"{loss:.2f}", *gradients, f"{run.error:.0e}"


def save_plot(runs: dict[tuple[str, str, str], Run], path: Path) -> None:
    """Loss against step, and gradients through time before and after; a row of panels a net and reading."""
    settings = list(dict.fromkeys((cell, reading) for cell, reading, _ in runs))
    figure, axes = panels(3, rows=len(settings), width=4.8, height=3.3)
    for at, (cell, reading) in enumerate(settings):
        curves, before, after = axes[3 * at : 3 * at + 3]
        for who, style in STYLES.items():
            run = runs[cell, reading, who]
            curves.plot(*moving_average(run.losses, WINDOW), label=who, **style)
            for plot, norms in ((before, run.before), (after, run.after)):
                times = range(1, len(norms) + 1)
                plot.plot(times, [max(norm, FLOOR) for norm in norms], **style)
        curves.set(title=f"{cell}, {reading}: training loss", xlabel="training step", ylabel="cross-entropy")
        for plot, when in ((before, "before"), (after, "after")):
            plot.set(title=f"{cell}, {reading}: gradients {when} training", xlabel=f"time, {len(run.before)} {reading}")
            plot.set(ylabel=r"$\Vert\partial\,$loss$/\partial h_t\Vert$", yscale="log", ylim=(FLOOR, 1e2))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(__file__, "Train recurrent nets on Fashion-MNIST, with and without orthogonal gates.")
    add = parser.add_argument
    add("--cell", type=one_of(CELLS, "cell"), default="rnn,lstm", help="comma list of rnn, gru, lstm (%(default)s)")
    readings = one_of(("rows", "pixels"), "reading")
    add("--read", type=readings, default="rows,pixels", help="how an image becomes a sequence (%(default)s)")
    add("--pool", type=int, choices=(1, 2, 4), default=2, help="pixels averaged, this by this (%(default)s)")
    add("--steps", type=positive_int, default=400, help="training steps (%(default)s)")
    add("--images", type=positive_int, default=20_000, help="training images (%(default)s)")
    add("--hidden", type=positive_int, default=64, help="size of the hidden state (%(default)s)")
    add("--batch-size", type=positive_int, default=64, help="images a step (%(default)s)")
    add("--lr", type=positive_float, default=1e-3, help="learning rate (%(default)s)")
    add("--scale", type=positive_float, default=1.0, help="orthogonal_lr_scale of the constrained run (%(default)s)")
    add("--data", type=Path, help="folder of the four files of Fashion-MNIST (that of Debian's package)")
    return parser.parse(
        argv,
        toy={"steps": 3, "images": 200, "hidden": 16, "pool": 4},
        full={"cell": "rnn,gru,lstm", "pool": 1, "steps": 20_000, "images": 60_000, "hidden": 128},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train every net on every reading in three ways; print the table, save the plot."""
    args = parse(argv)
    found = images(args.data, toy=args.toy)
    print(
        f"{found.title}: {min(args.images, len(found.train[0]))} training and {len(found.test[0])} test images; "
        f"{args.steps} steps of {args.batch_size}, {args.hidden} units, lr {args.lr:g}, seed {args.seed}"
    )
    runs: dict[tuple[str, str, str], Run] = {}
    with Runs() as bars:
        for reading in args.read:
            data = as_sequences(found, reading, args.pool, args.images)
            for cell in args.cell:
                for who in STYLES:
                    advance = bars.begin(f"{cell}, {reading}, {who}", total=args.steps)
                    runs[cell, reading, who] = train(who, CELLS[cell], data, args, advance)
    show(
        ("net, reading, run", "test\nacc.", "loss", "gradient\nbefore", "gradient\nafter", "error"),
        (row_of(of, run) for of, run in runs.items()),
        caption="loss: mean of the last 20 batches; gradient: its norm at the first hidden state, before and after "
        "training; error: Frobenius norm of I - W W' at the end, the largest of the gates",
    )
    save_plot(runs, args.plot)


if __name__ == "__main__":
    main()
