"""Copying memory: an RNN reads ten symbols, waits, and has to repeat them.

Run it with no argument; it needs no network and no data:

    pip install ".[examples]"
    python examples/copying_memory.py

What it shows: how many steps a plain nn.RNN needs until it remembers across the delay, by the way its recurrent matrix
is trained. Answering without memory costs 10 ln 8 / (delay + 20), the line in the picture. A run has learned, and
stops, when the mean loss of 20 batches is under half of that. Net, start (Henaff's rotations by random angles), batches
and Adam's learning rate are the same in all runs. The contenders:

- torch.optim.Adam, unconstrained, with its gradients clipped to norm one;
- the same with a tenth of the learning rate for the recurrent matrix, which is what all below have;
- manifold_opt.Adam, the recurrent matrix marked;
- torch.optim.Adam on torch's own orthogonal parametrization, by the Cayley map;
- POGO, with the rule its authors offer (pip install pogo-torch; left out where it is missing). Its Adam makes a step as
  long as the learning rate, where torch's makes an entry of it so long: it gets the learning rate that makes both steps
  equally long.

What to expect, in two to three minutes on one core: across 200 steps manifold_opt.Adam has learned after 698, and
torch's parametrization nearly so at the end of its 1,000. The unconstrained run at the whole learning rate and POGO are
still near the line then. At a tenth of the rate for the recurrent matrix the unconstrained run learns too, after 879
steps; with seed 1 after 550, where manifold_opt.Adam takes 785. The start and that small rate do most of the work here.
Across 500 steps manifold_opt.Adam takes 1,096, 1,097 and 1,196 with three seeds, the free matrix more than 2,000, 1,176
and 1,733 (docs/examples/copying_memory.md has more).
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from common import (
    BLACK,
    BLUE,
    GREY,
    ORANGE,
    PINK,
    RED,
    Parser,
    Runs,
    moving_average,
    one_of,
    panels,
    positive_float,
    positive_int,
    save,
    show,
)
from recurrent import SYMBOLS, copying, memoryless, orthogonal_start_
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.nn.utils import parametrizations

from manifold_opt import Adam, mark_orthogonal, orthogonality_error

WINDOW = 20  # batches whose mean loss tells whether a run has learned


class Copier(nn.Module):
    """A plain RNN and a linear layer."""

    def __init__(self, hidden: int = 128) -> None:
        super().__init__()
        self.rnn = nn.RNN(SYMBOLS + 2, hidden, nonlinearity="relu")
        self.head = nn.Linear(hidden, SYMBOLS + 1)
        orthogonal_start_(self, scheme="henaff")

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(time, batch, 9)`` of symbols ``(time, batch)``."""
        return self.head(self.rnn(F.one_hot(x, SYMBOLS + 2).float())[0])


Build = Callable[[Copier, float], list[torch.optim.Optimizer]]


@dataclass(frozen=True)
class Contender:
    """A way to train the recurrent matrix: the optimizers of a net at a learning rate, and how it is drawn."""

    build: Build
    color: str = BLACK
    clips: bool = False


def apart(net: Copier, weight: Tensor, lr: float, lr_of_weight: float) -> list[dict[str, object]]:
    """Two groups, for optimizers that know no scale: everything else, and this weight."""
    rest = [parameter for parameter in net.parameters() if parameter is not weight]
    return [{"params": rest, "lr": lr}, {"params": [weight], "lr": lr_of_weight}]


def unconstrained(scale: float) -> Build:
    """No constraint after the orthogonal start."""
    return lambda net, lr: [torch.optim.Adam(apart(net, net.rnn.weight_hh_l0, lr, scale * lr))]


def ours(**options: str) -> Build:
    """This package's Adam."""

    def build(net: Copier, lr: float) -> list[torch.optim.Optimizer]:
        mark_orthogonal(net.rnn, "weight_hh_l0")
        return [Adam(net.parameters(), lr=lr, orthogonal_lr_scale=0.1, **options)]

    return build


def parametrized(net: Copier, lr: float) -> list[torch.optim.Optimizer]:
    """Cayley parametrization of torch itself, which computes the matrix anew at every use."""
    start = net.rnn.weight_hh_l0.detach().clone()
    parametrizations.orthogonal(net.rnn, "weight_hh_l0", orthogonal_map="cayley")
    net.rnn.weight_hh_l0 = start
    return [torch.optim.Adam(apart(net, net.rnn.parametrizations.weight_hh_l0.original, lr, 0.1 * lr))]


def pogo(net: Copier, lr: float) -> list[torch.optim.Optimizer]:
    """POGO with its Adam, at the learning rate at which its steps are as long as torch's."""
    weight = net.rnn.weight_hh_l0
    rest, matrix = apart(net, weight, lr, 0.1 * lr * math.sqrt(2 * weight.numel()))
    rule = importlib.import_module("pogo.base").VectorAdam()
    made = importlib.import_module("pogo").POGO(matrix["params"], rule, matrix["lr"], flatten_fn=lambda w: w[None])
    return [torch.optim.Adam([rest]), made]


CONTENDERS = {
    "unconstrained": Contender(unconstrained(1.0), GREY, clips=True),
    "unconstrained slow": Contender(unconstrained(0.1), BLACK, clips=True),
    "manifold_opt.Adam": Contender(ours(), RED),
    "torch cayley": Contender(parametrized, BLUE),
    "POGO": Contender(pogo, PINK),
}


@dataclass
class Run:
    """What one run leaves behind; ``learned`` is the number of steps that took, if it did."""

    losses: list[float]
    learned: int | None
    error: float
    seconds: list[float]


def learn(
    contender: Contender,
    *,
    delay: int,
    seed: int,
    limit: int,
    hidden: int = 128,
    batch_size: int = 64,
    lr: float = 1e-3,
    after_step: Callable[..., None] = lambda *_, **__: None,
) -> Run:
    """Train until the net remembers, or for so many steps; the error is the largest after any step."""
    torch.manual_seed(seed)
    net = Copier(hidden)
    optimizers = contender.build(net, lr)
    generator = torch.Generator().manual_seed(1000 + seed)
    run = Run([], None, 0.0, [])
    while run.learned is None and len(run.losses) < limit:
        x, y = copying(delay, batch_size, generator)
        start = time.perf_counter()
        net.zero_grad()
        loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        if contender.clips:
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for opt in optimizers:
            opt.step()
        run.seconds.append(time.perf_counter() - start)
        run.losses.append(loss.item())
        run.error = max(run.error, orthogonality_error(net.rnn.weight_hh_l0))
        mean = statistics.fmean(run.losses[-WINDOW:])
        if len(run.losses) >= WINDOW and mean < memoryless(delay) / 2:
            run.learned = len(run.losses)
        after_step(f"loss {mean:.4f}", last=run.learned is not None)
    return run


def row_of(name: str, delay: int, run: Run) -> tuple[str, ...]:
    """What the table says of a run."""
    steps = str(run.learned) if run.learned else f"not in {len(run.losses)}"
    last = statistics.fmean(run.losses[-WINDOW:]) / memoryless(delay)
    return name, str(delay), steps, f"{last:.2f}", f"{run.error:.1e}", f"{1e3 * statistics.median(run.seconds):.0f}"


def save_plot(runs: dict[tuple[str, int], Run], delays: Sequence[int], path: Path) -> None:
    """Loss against step, a panel a delay; a dot where a run has learned."""
    figure, axes = panels(len(delays), width=7.5 if len(delays) == 1 else 5.5)
    for delay, plot in zip(delays, axes, strict=True):
        plot.axhline(memoryless(delay), color=ORANGE, linestyle="--", label="without memory: 10 ln 8 / (delay + 20)")
        for (name, of), run in runs.items():
            if of != delay:
                continue
            color = CONTENDERS[name].color
            steps, means = moving_average(run.losses, WINDOW)
            plot.plot(steps, means, color=color, label=name, linewidth=1.6)
            if run.learned:
                plot.plot(steps[-1:], means[-1:], "o", color=color)
        plot.set(title=f"Delay {delay}", xlabel="step", ylabel=f"cross-entropy (mean of {WINDOW} batches)")
        plot.set_ylim(0, 1.6 * memoryless(delay))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    save(figure, path)


def whole_numbers(text: str) -> list[int]:
    """A comma list of whole numbers above zero."""
    return [positive_int(part) for part in text.split(",")]


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(__file__, "Train RNNs to remember ten symbols across a delay, with and without a constraint.")
    add = parser.add_argument
    add("--delays", type=whole_numbers, default="200", help="comma list of steps to wait (%(default)s)")
    add("--limit", type=positive_int, default=1000, help="steps after which a run is given up (%(default)s)")
    add("--hidden", type=positive_int, default=128, help="size of the hidden state (%(default)s)")
    add("--batch-size", type=positive_int, default=32, help="sequences a step (%(default)s)")
    add("--lr", type=positive_float, default=1e-3, help="learning rate of every run (%(default)s)")
    known = one_of(CONTENDERS, "contender")
    add("--contenders", type=known, default=",".join(CONTENDERS), help="comma list (%(default)s)")
    return parser.parse(
        argv,
        toy={"delays": "10", "limit": 60, "hidden": 32},
        full={"delays": "200,500,1000", "limit": 5000, "batch_size": 64},
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Train every contender at every delay; print the table, save the plot."""
    args = parse(argv)
    if "POGO" in args.contenders and importlib.util.find_spec("pogo") is None:
        print("POGO is left out: pip install pogo-torch (Python 3.11 or newer)")
        args.contenders.remove("POGO")
    print(
        f"delays {', '.join(map(str, args.delays))}; nn.RNN (relu, {args.hidden} units), batches of {args.batch_size}, "
        f"lr {args.lr:g}, seed {args.seed}, at most {args.limit} steps"
    )
    runs: dict[tuple[str, int], Run] = {}
    with Runs() as bars:
        for delay in args.delays:
            for name in args.contenders:
                runs[name, delay] = learn(
                    CONTENDERS[name],
                    delay=delay,
                    seed=args.seed,
                    limit=args.limit,
                    hidden=args.hidden,
                    batch_size=args.batch_size,
                    lr=args.lr,
                    after_step=bars.begin(f"{name}, {delay}", total=args.limit),
                )
    show(
        ("recurrent matrix", "delay", "steps until\nit has learned", "last loss over\nmemoryless", "largest\nerror",
         "ms a step\n(median)"),
        (row_of(name, delay, run) for (name, delay), run in runs.items()),
        caption="learned: mean loss of 20 batches under half of that without memory; error: Frobenius norm of I - W W'",
    )  # fmt: skip
    save_plot(runs, args.delays, args.plot)


if __name__ == "__main__":
    main()
