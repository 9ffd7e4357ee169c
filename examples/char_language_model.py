"""A character-level language model with two LSTM layers, whose recurrent gates are orthogonal or free.

    pip install ".[examples]"
    python examples/char_language_model.py

The text is the source code of Python's standard library, which every machine has. The same net is trained four ways,
over the same passages, with clipping, a warm-up and a cosine schedule:

- AdamW, as torch starts the net;
- AdamW from an orthogonal start: the gates begin orthogonal and may go anywhere;
- AdamW on torch's own orthogonal parametrization of each gate;
- manifold_opt.AdamW: the gates are marked, and stay orthogonal.

Each run takes the learning rate that was best for it in a sweep. To run the sweep again, with three seeds:

    python examples/char_language_model.py --lr sweep --seeds 0 1 2 --results sweep.json
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import (
    BLACK,
    BLUE,
    ORANGE,
    RED,
    Parser,
    Runs,
    figure_of,
    largest,
    one_of,
    panels,
    positive_float,
    positive_int,
    save,
    show,
)
from source_text import draw, passages, source_text
from torch import Generator, Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.nn.utils import clip_grad_norm_, parametrizations, parametrize

from manifold_opt import AdamW, mark_recurrent, orthogonality_error, unmark

SYMBOLS = 128  # ASCII; every other byte is one symbol
EMBEDDING = 64
LOOKS = 15  # at the validation text, per run
SWEEP = (5e-3, 1e-2, 2e-2, 4e-2)


class CharacterModel(nn.Module):
    """Embedding, two recurrent layers, and logits of the next character."""

    def __init__(self, cell: str, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, EMBEDDING)
        self.rnn: nn.RNNBase = getattr(nn, cell)(EMBEDDING, hidden, num_layers=2, batch_first=True)
        self.head = nn.Linear(hidden, SYMBOLS)

    def forward(self, text: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """Logits ``(batch, time, 128)`` of text ``(batch, time)``, and the state after it."""
        hidden, state = self.rnn(self.embedding(text), state)
        return self.head(hidden), state

    def gates(self) -> list[Tensor]:
        """The recurrent weights as batches of gates, ``(gates, hidden, hidden)``."""
        weights = (self.rnn.weight_hh_l0, self.rnn.weight_hh_l1)
        return [weight.detach().unflatten(0, (-1, self.rnn.hidden_size)) for weight in weights]


class Stack(nn.Module):
    """A parametrization: gates ``(gates, hidden, hidden)`` to the one weight that torch's LSTM and GRU have."""

    def forward(self, gates: Tensor) -> Tensor:
        """The gates, one above the other."""
        return gates.flatten(0, 1)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """The gates of a weight."""
        return weight.unflatten(0, (-1, weight.shape[1]))


def free(net: CharacterModel, lr: float) -> torch.optim.Optimizer:
    """No constraint."""
    return torch.optim.AdamW(net.parameters(), lr)


def orthogonal_start(net: CharacterModel, lr: float) -> torch.optim.Optimizer:
    """Orthogonal gates, and no constraint after that."""
    mark_recurrent(net)  # moves each gate to the nearest orthogonal matrix
    unmark(net.rnn)
    return torch.optim.AdamW(net.parameters(), lr)


def parametrized(net: CharacterModel, lr: float) -> torch.optim.Optimizer:
    """Apply the orthogonal parametrization of torch to each gate: the matrix exponential."""
    mark_recurrent(net)
    unmark(net.rnn)
    for name in ("weight_hh_l0", "weight_hh_l1"):
        parametrize.register_parametrization(net.rnn, name, Stack(), unsafe=True)
        parametrizations.orthogonal(net.rnn.parametrizations[name], "original")
    return torch.optim.AdamW(net.parameters(), lr)


def ours(net: CharacterModel, lr: float) -> torch.optim.Optimizer:
    """Marked gates and this package's AdamW."""
    mark_recurrent(net)
    return AdamW(net.parameters(), lr)


Build = Callable[[CharacterModel, float], torch.optim.Optimizer]

# How to build it, its colour, and the best learning rate of the sweep: for LSTM, GRU.
METHODS: dict[str, tuple[Build, str, float, float]] = {
    "AdamW": (free, BLACK, 2e-2, 2e-2),
    "AdamW + orthogonal start": (orthogonal_start, ORANGE, 2e-2, 2e-2),
    "AdamW + parametrization": (parametrized, BLUE, 2e-2, 2e-2),
    "manifold_opt.AdamW": (ours, RED, 2e-2, 2e-2),
}


def loss_of(net: CharacterModel, text: Tensor) -> Tensor:
    """Cross-entropy of every character but the first, in nats."""
    logits, _ = net(text[:, :-1])
    return F.cross_entropy(logits.flatten(0, 1), text[:, 1:].flatten())


@torch.no_grad()
def evaluate(net: CharacterModel, text: Tensor, count: int) -> float:
    """Loss on passages of 257 characters, the same in every call."""
    with parametrize.cached():
        return loss_of(net, passages(text, count, 257)).item()


def warmup_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: up in the first twentieth, then down to zero as a cosine."""
    warmup = max(1, steps // 20)
    return min((step + 1) / warmup, (1 + math.cos(math.pi * step / steps)) / 2)


def train(name: str, lr: float, seed: int, args: argparse.Namespace, text: dict[str, Tensor], runs: Runs) -> Any:
    """Train one net; return the net, and what is kept of the run."""
    advance = runs.begin(f"{name} {lr:g}", total=LOOKS)
    torch.manual_seed(seed)
    net = CharacterModel(args.cell, args.hidden)
    opt = METHODS[name][0](net, lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: warmup_cosine(step, args.steps))
    generator = Generator().manual_seed(1000 + seed)
    looks = {round(args.steps * (k + 1) / LOOKS) for k in range(LOOKS)}
    curve: list[tuple[int, float, float]] = []
    seconds: list[float] = []
    for step in range(1, args.steps + 1):
        batch = draw(text["train"], args.batch_size, args.length + 1, generator)
        start = time.process_time()
        opt.zero_grad()
        with parametrize.cached():  # the weight is computed once per step, not once per access
            loss = loss_of(net, batch)
        loss.backward()
        clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        schedule.step()
        seconds.append(time.process_time() - start)
        if step in looks:
            value = evaluate(net, text["validation"], args.passages)
            curve.append((step, value, largest([orthogonality_error(gates) for gates in net.gates()])))
            advance(f"{value:.3f} nats")
    kept = {"cell": args.cell, "method": name, "lr": lr, "seed": seed, "steps": args.steps, "curve": curve}
    return net, {**kept, "ms": 1000 * statistics.median(seconds)}


@torch.no_grad()
def sample(net: CharacterModel, length: int, prompt: str = "\ndef ", temperature: float = 0.5) -> str:
    """Return the prompt and what the net writes after it, character by character."""
    generator = Generator().manual_seed(0)
    written, state = prompt, None
    characters = torch.tensor([list(prompt.encode())])
    with parametrize.cached():
        for _ in range(length):
            logits, state = net(characters, state)
            characters = torch.multinomial((logits[:, -1] / temperature).softmax(-1), 1, generator=generator)
            written += chr(characters.item())
    return written


def rates_of(name: str, args: argparse.Namespace) -> tuple[float, ...]:
    """The learning rates to train with: those asked for, or the best of the sweep."""
    return args.lr or (METHODS[name][2 if args.cell == "LSTM" else 3],)


def train_all(args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Train every method with every learning rate and seed; return the runs, and a sample of text per method."""
    text = {part: characters.clamp(max=SYMBOLS - 1) for part, characters in source_text().items()}
    print(
        f"{len(text['train']):,} characters to train on, {args.steps * args.batch_size * args.length:,} drawn per run"
    )
    kept = json.loads(args.results.read_text()) if args.results and args.results.exists() else []
    done = {(run["cell"], run["method"], run["lr"], run["seed"], run["steps"]): run for run in kept}
    results, samples = [], {}
    with Runs() as runs:
        for seed in args.seeds:
            for name in args.methods:
                for lr in rates_of(name, args):
                    run = done.get((args.cell, name, lr, seed, args.steps))
                    if run is None:
                        net, run = train(name, lr, seed, args, text, runs)
                        samples[name] = sample(net, args.sample)
                        kept.append(run)
                        if args.results:
                            args.results.write_text("[\n" + ",\n".join(map(json.dumps, kept)) + "\n]\n")
                    results.append(run)
    return results, samples


def last_losses(results: list[dict[str, Any]], name: str, lr: float) -> list[float]:
    """Validation loss at the end of the runs, one per seed."""
    return [run["curve"][-1][1] for run in results if run["method"] == name and run["lr"] == lr]


def best_rate(results: list[dict[str, Any]], name: str) -> float:
    """The learning rate with the lowest mean loss; NaN counts as infinite."""
    rates = {run["lr"] for run in results if run["method"] == name}
    means = {lr: statistics.fmean(last_losses(results, name, lr)) for lr in rates}
    return min(means, key=lambda lr: math.inf if math.isnan(means[lr]) else means[lr])


def print_tables(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Print a row per method at its best learning rate, and the whole sweep if there was one."""
    rows = []
    for name in args.methods:
        lr = best_rate(results, name)
        runs = [run for run in results if run["method"] == name and run["lr"] == lr]
        error = largest([error for run in runs for _, _, error in run["curve"]])
        ms = statistics.median(run["ms"] for run in runs)
        rows.append((name, f"{lr:g}", figure_of(last_losses(results, name, lr)), f"{error:.0e}", f"{ms:.0f}"))
    head = ("optimizer", "learning rate", "validation loss", "largest error", "CPU ms per step")
    show(head, rows, caption="loss in nats per character; error: Frobenius norm of I - W W', the largest of the gates")
    rates = sorted({run["lr"] for run in results})
    if len(rates) > 1 and all(len(rates_of(name, args)) > 1 for name in args.methods):
        table = [(name, *(figure_of(last_losses(results, name, lr)) for lr in rates)) for name in args.methods]
        show(("validation loss at", *(f"{lr:g}" for lr in rates)), table)


def save_plot(results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Validation loss against the step, and the loss at the end against the learning rate."""
    figure, (left, right) = panels(2)
    for name in args.methods:
        colour, lr = METHODS[name][1], best_rate(results, name)
        curves = [run["curve"] for run in results if run["method"] == name and run["lr"] == lr]
        steps = [step for step, _, _ in curves[0]]
        means = [statistics.fmean(values) for values in zip(*([v for _, v, _ in c] for c in curves), strict=True)]
        left.plot(steps, means, color=colour, label=name, linewidth=2)
        rates = sorted({run["lr"] for run in results if run["method"] == name})
        ends = [last_losses(results, name, rate) for rate in rates]
        right.plot(rates, [statistics.fmean(values) for values in ends], color=colour, linewidth=2)
        for rate, values in zip(rates, ends, strict=True):
            right.plot([rate] * len(values), values, "o", color=colour, markersize=5)
    lowest = min(run["curve"][-1][1] for run in results)
    left.set(title="Each at its best learning rate", xlabel="step", ylabel="validation loss, nats per character")
    left.set_ylim(lowest - 0.1, lowest + 1.3)
    right.set(title="At every learning rate, after the last step", xlabel="learning rate", xscale="log")
    right.minorticks_off()
    every = sorted({run["lr"] for run in results})
    right.set_xticks(every, [f"{rate:g}" for rate in every])
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    save(figure, args.plot)


def learning_rates(text: str) -> tuple[float, ...]:
    """Learning rates from a comma list, or those of the sweep."""
    return SWEEP if text == "sweep" else tuple(map(positive_float, text.split(",")))


def main(argv: Sequence[str] | None = None) -> None:
    """Train the same net with all methods; print tables and a sample of text, save the picture."""
    parser = Parser(__file__, "Train a character-level language model with orthogonal and with free recurrent gates.")
    add = parser.add_argument
    add("--cell", choices=("LSTM", "GRU"), default="LSTM", help="recurrent layer (%(default)s)")
    add("--methods", type=one_of(METHODS, "method"), default=",".join(METHODS), help="comma list (%(default)s)")
    add("--lr", type=learning_rates, help="comma list, or 'sweep' (the best of the sweep, for each method)")
    add("--seeds", type=int, nargs="+", help="one run each (that of --seed)")
    add("--steps", type=positive_int, default=600, help="training steps (%(default)s)")
    add("--hidden", type=positive_int, default=128, help="units per layer (%(default)s)")
    add("--batch-size", type=positive_int, default=16, help="passages per step (%(default)s)")
    add("--length", type=positive_int, default=128, help="characters per passage (%(default)s)")
    add("--passages", type=positive_int, default=100, help="validation passages (%(default)s)")
    add("--sample", type=positive_int, default=300, help="characters of text to write at the end (%(default)s)")
    add("--results", type=Path, help="JSON file that keeps the runs; those that it has are not repeated")
    args = parser.parse(
        argv,
        toy={"steps": 20, "hidden": 16, "batch_size": 4, "length": 16, "passages": 4, "sample": 20},
        full={"steps": 4000, "seeds": [0, 1, 2]},
    )
    args.seeds = args.seeds or [args.seed]
    results, samples = train_all(args)
    print_tables(results, args)
    for name, written in samples.items():
        print(f"\n{name} writes:\n{written}")
    save_plot(results, args)


if __name__ == "__main__":
    main()
