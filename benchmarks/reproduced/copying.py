"""Copying memory at the settings of expRNN: an RNN with modReLU, its recurrent matrix orthogonal.

    python benchmarks/reproduced/copying.py

The net, its start, the batches, the optimizer and the learning rates of "expRNN" are those of the code beside *Cheap
Orthogonal Constraints in Neural Networks* (Lezcano-Casado & Martinez-Rubio 2019, arXiv 1901.08428), at the delay, width
and rates of the nnRNN paper (Kerg et al. 2019, arXiv 1905.12080). The others change the recurrent matrix only.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from entry import Parser, spread, thin, write
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.nn.utils import parametrize

from manifold_opt import Adam, init, mark_orthogonal, orthogonality_error

from common import BLACK, BLUE, ORANGE, RED, one_of, panels, positive_float, positive_int, save, show  # isort: skip
from recurrent import SYMBOLS, copying, memoryless  # isort: skip

WINDOW = 20  # batches whose mean loss tells whether a run has learned


class ModReLURecurrence(torch.autograd.Function):
    """States of ``h = sign(z) relu(|z| + b)``, ``z = x + W h``, with the derivative written out.

    The same loop under autograd takes three to four times as long: it keeps every intermediate of every time step, and
    makes a product of its own for each step's part of the gradient of W.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """States ``(time, batch, hidden)`` of inputs of the same shape; the first state is zero."""
        states = x.new_empty(len(x) + 1, *x.shape[1:])
        states[0] = 0
        for t in range(len(x)):
            z = torch.addmm(x[t], states[t], weight.mT)
            torch.mul(z.sign(), z.abs().add_(bias).relu_(), out=states[t + 1])
        ctx.save_for_backward(states, weight)
        return states[1:]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients with respect to x, weight and bias."""
        states, weight = ctx.saved_tensors
        sign = states[1:].sign()  # zero where the modReLU is; elsewhere dh/dz = 1 and dh/db = sign(z)
        grad_z = torch.empty_like(grad)
        grad_h = grad[-1]
        for t in reversed(range(len(grad))):
            torch.mul(grad_h, sign[t].abs(), out=grad_z[t])
            if t:
                grad_h = torch.addmm(grad[t - 1], grad_z[t], weight)
        grad_weight = grad_z.flatten(0, 1).mT @ states[:-1].flatten(0, 1)
        return grad_z, grad_weight, (grad_z * sign).sum((0, 1))


class Recurrence(nn.Module):
    """The recurrent matrix W and the bias of the modReLU."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(init.orthogonal_(torch.empty(hidden, hidden), scheme="henaff"))
        self.bias = nn.Parameter(torch.empty(hidden).uniform_(-0.01, 0.01))

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states ``(time, batch, hidden)`` of inputs of the same shape; the first state is zero."""
        states: Tensor = ModReLURecurrence.apply(x, self.weight, self.bias)  # type: ignore[no-untyped-call]
        return states


class Copier(nn.Module):
    """Symbols to states to logits, with expRNN's starts of the two linear maps."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(SYMBOLS + 2, hidden, bias=False)
        self.rnn = Recurrence(hidden)
        self.head = nn.Linear(hidden, SYMBOLS + 1)
        nn.init.kaiming_normal_(self.input.weight, nonlinearity="relu")
        nn.init.kaiming_normal_(self.head.weight, nonlinearity="relu")
        nn.init.zeros_(self.head.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(time, batch, 9)`` of symbols ``(time, batch)``."""
        return self.head(self.rnn(F.embedding(x, self.input.weight.mT)))


class Exponential(nn.Module):
    """expRNN: W is the exponential of a skew matrix, of which the upper triangle is trained."""

    def forward(self, upper: Tensor) -> Tensor:
        """``exp(A)``."""
        upper = upper.triu(1)
        return torch.linalg.matrix_exp(upper - upper.mT)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The skew matrix of a block diagonal of 2 x 2 rotations."""
        angles = torch.atan2(weight.diagonal(1), weight.diagonal()[:-1])
        angles[1::2] = 0
        return torch.diag(angles, 1)


Build = Callable[[Copier, float, float], list[torch.optim.Optimizer]]


def free(net: Copier, lr: float, lr_orth: float) -> list[torch.optim.Optimizer]:
    """No constraint after the orthogonal start."""
    weight = net.rnn.weight
    rest = [parameter for parameter in net.parameters() if parameter is not weight]
    return [torch.optim.Adam([{"params": rest}, {"params": [weight], "lr": lr_orth}], lr)]


def exprnn(net: Copier, lr: float, lr_orth: float) -> list[torch.optim.Optimizer]:
    """The paper's."""
    parametrize.register_parametrization(net.rnn, "weight", Exponential())
    upper = net.rnn.parametrizations.weight.original
    rest = [parameter for parameter in net.parameters() if parameter is not upper]
    return [torch.optim.RMSprop(rest, lr), torch.optim.RMSprop([upper], lr_orth)]


def ours(net: Copier, lr: float, lr_orth: float) -> list[torch.optim.Optimizer]:
    """This package's Adam at the same rates for all parameters; there is no RMSprop."""
    mark_orthogonal(net.rnn, "weight")
    return [Adam(net.parameters(), lr, orthogonal_lr_scale=lr_orth / lr)]


CONTENDERS: dict[str, tuple[Build, str]] = {
    "expRNN (RMSprop)": (exprnn, BLUE),
    "manifold_opt.Adam": (ours, RED),
    "free (Adam)": (free, BLACK),
}


def learn(name: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Train one net; a run ends early when its loss has fallen to ``args.stop`` times the memoryless one."""
    torch.manual_seed(seed)
    net = Copier(args.hidden)
    optimizers = CONTENDERS[name][0](net, args.lr, args.lr_orth)
    generator = torch.Generator().manual_seed(1000 + seed)
    losses: list[float] = []
    reached: dict[str, int | None] = {"half": None, "tenth": None}
    error, start = 0.0, time.process_time()
    base = memoryless(args.delay)
    for step in range(1, args.limit + 1):
        x, y = copying(args.delay, args.batch_size, generator)
        net.zero_grad()
        with parametrize.cached():
            loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        for opt in optimizers:
            opt.step()
        losses.append(loss.item())
        mean = statistics.fmean(losses[-WINDOW:])
        for key, part in (("half", 0.5), ("tenth", 0.1)):
            if reached[key] is None and step >= WINDOW and mean < part * base:
                reached[key] = step
        if step % 50 == 0:
            error = max(error, orthogonality_error(net.rnn.weight.detach()))
            print(f"{name}, seed {seed}, step {step}: {mean / base:.3f} of the memoryless loss", flush=True)
        if step >= WINDOW and mean < args.stop * base:
            break
    return {
        "run": name,
        "seed": seed,
        "delay": args.delay,
        "steps": len(losses),
        **reached,
        "last": mean / base,
        "error": max(error, orthogonality_error(net.rnn.weight.detach())),
        "cpu_ms": 1000 * (time.process_time() - start) / len(losses),
        "curve": thin(losses),
    }


def draw(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Loss over the memoryless loss against the step: a line a seed."""
    figure, (plot,) = panels(1, width=7, height=4.2)
    for row in rows:
        curve = [value / memoryless(args.delay) for value in row["curve"]]
        steps = [(k + 1) * row["steps"] / len(curve) for k in range(len(curve))]
        label = row["run"] if row["seed"] == args.seeds[0] else None
        plot.plot(steps, curve, color=CONTENDERS[row["run"]][1], label=label, linewidth=1.3)
    plot.axhline(1, color=ORANGE, linestyle="--", label="without memory")
    plot.set(title=f"Copying memory, delay {args.delay}, one line a seed", xlabel="step", ylim=(0, 1.6))
    plot.set_ylabel("cross-entropy, 1: without memory")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    save(figure, args.plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Train all contenders with all seeds; print the table, save figures and picture."""
    parser = Parser(__file__, "Copying memory at expRNN's settings.")
    add = parser.add_argument
    add("--delay", type=positive_int, default=200, help="steps to wait (%(default)s)")
    add("--hidden", type=positive_int, default=128, help="size of the hidden state, even (%(default)s)")
    add("--batch-size", type=positive_int, default=128, help="sequences a step (%(default)s)")
    add("--limit", type=positive_int, default=1000, help="steps after which a run is given up (%(default)s)")
    add("--lr", type=positive_float, default=1e-3, help="learning rate (%(default)s)")
    add("--lr-orth", type=positive_float, default=1e-4, help="that of the recurrent matrix (%(default)s)")
    add("--stop", type=positive_float, default=0.1, help="part of the memoryless loss at which to end (%(default)s)")
    add("--runs", type=one_of(CONTENDERS, "run"), default=",".join(CONTENDERS), help="comma list (%(default)s)")
    args = parser.parse(argv, toy={"delay": 5, "hidden": 16, "batch_size": 8, "limit": 30})
    print(f"delay {args.delay}, {args.hidden} units, batches of {args.batch_size}, lr {args.lr:g} and {args.lr_orth:g}")
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in args.runs:
            rows.append(learn(name, seed, args))
            write(args, rows)
    table = []
    for name in args.runs:
        mine = [row for row in rows if row["run"] == name]
        steps = (", ".join(str(row[key] or f"not in {row['steps']}") for row in mine) for key in ("half", "tenth"))
        last, ms = spread([row["last"] for row in mine]), spread([row["cpu_ms"] for row in mine])
        table.append((name, *steps, last, f"{max(row['error'] for row in mine):.1e}", ms))
    show(
        ("recurrent matrix", "steps to half", "to a tenth", "last", "largest error", "CPU ms a step"),
        table,
        caption=f"of the loss without memory; a figure a seed: {', '.join(map(str, args.seeds))}",
    )
    draw(rows, args)


if __name__ == "__main__":
    main()
