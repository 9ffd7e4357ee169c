"""Rotations for 4-bit models, learned with this package and with Cayley SGD as published and as shipped.

    python benchmarks/rotations.py --model llama       # of: examples/rotate_language_model.py --save llama
    python benchmarks/rotations.py --task heads

The task ``language`` learns rotations of the residual stream and of the heads of a Llama on the loss of the rounded
model, as examples/rotate_language_model.py does. The task ``heads`` learns the rotations of the heads of the sentence
encoder all-MiniLM-L6-v2 alone, without data: the expected rounding error of values and output projections.

Every method has the same random starts, as many steps, and a linear decay of its learning rate. The rate is the best of
``--rates``, multiples of the one that a method is listed with, with the first seed on the validation files (for the
heads, by the expected error itself). Cayley SGD is tests/reference/cayley_sgd.py: as the paper has it, and as its class
is shipped, whose momentum stays zero.

Columns: what rounding costs (bits per byte, or the square error of the weights), the distance from orthogonality, the
rate, and the CPU time of a step, the loss included.
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from manifold_opt import Adam, orthogonality_error
from manifold_opt.rotations import (
    SGDG,
    RotatedLinear,
    RotationBank,
    RoundToNearest,
    insert_rotations,
    merge_rotations,
    simulate_rounding,
)

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
from common import Parser, Runs, figure_of, positive_int, show  # noqa: E402
from rotate_language_model import bits_per_byte, get_model, learn, parser, rounded_scores  # noqa: E402
from source_text import passages, source_text  # noqa: E402

from tests.reference.cayley_sgd import CayleySGD  # noqa: E402

Make = Callable[..., torch.optim.Optimizer]
MOMENTUM = 0.9


class Method(NamedTuple):
    """An optimizer and the learning rates of the two tasks around which the best is looked for."""

    make: Make
    language: float
    heads: float


METHODS = {
    "Adam": Method(Adam, 2e-3, 0.12),
    "SGDG, momentum": Method(partial(SGDG, momentum=MOMENTUM, stiefel=True), 1.0, 600.0),
    "published, momentum": Method(partial(CayleySGD.published, momentum=MOMENTUM), 1.0, 600.0),
    "shipped": Method(partial(CayleySGD.shipped, momentum=MOMENTUM), 1.0, 600.0),
}
ROUNDING = RoundToNearest(4)


class Result(NamedTuple):
    """What a rotated model is worth: what was used to choose the rate, the figures of the table, and the cost."""

    validation: float
    figures: tuple[float, ...]
    off: float
    seconds: float


Learn = Callable[[Method | None, float, int], Result]


class Language:
    """Rotations of a language model."""

    columns = ("weights", "weights and inputs")
    caption = "bits per byte"

    def __init__(self, model: nn.Module, text: dict[str, Tensor], steps: int, batch: int, count: int) -> None:
        self.model, self.text, self.steps, self.batch = model, text, steps, batch
        self.test, self.validation = (passages(text[part], count, 256) for part in ("test", "validation"))

    def plain(self) -> tuple[float, ...]:
        """Return the figures without rotations."""
        scores = rounded_scores(self.model, self.test, ROUNDING)
        return tuple(scores[column] for column in self.columns)

    def result(self, method: Method | None, rate: float, seed: int, advance: Callable[[str], None]) -> Result:
        """Learn from a random start, or take the start itself without a method."""
        model, spent = copy.deepcopy(self.model), 0.0
        bank = insert_rotations(model, generator=Generator().manual_seed(seed))
        simulate_rounding(model, weights=ROUNDING, inputs=ROUNDING)
        if method is not None:
            opt, start = method.make(bank.parameters(), lr=rate), time.process_time()
            for loss in learn(model, self.text["train"], opt, steps=self.steps, batch=self.batch, seed=seed):
                advance(f"loss {loss:.3f}")
            spent = time.process_time() - start
        off, validation = max(orthogonality_error(bank).values()), bits_per_byte(model, self.validation)
        merge_rotations(model)
        scores = rounded_scores(model, self.test, ROUNDING)
        return Result(validation, tuple(scores[column] for column in self.columns), off, spent / self.steps)


class Heads:
    """Rotations of the heads of an encoder, each layer by itself."""

    columns = ("values, %", "output projections, %")
    caption = "square error of rounded weights"

    def __init__(self, model: nn.Module, steps: int, layers: int) -> None:
        self.layers, self.heads = list(model.encoder.layer)[:layers], model.config.num_attention_heads
        self.steps = steps

    def plain(self) -> tuple[float, ...]:
        """Return the figures without rotations."""
        return self._figures([[self._linear(layer, k).weight for k in range(2)] for layer in self.layers])

    def result(self, method: Method | None, rate: float, seed: int, advance: Callable[[str], None]) -> Result:
        """Learn from a random start, or take the start itself without a method."""
        generator, weights, off, spent, last = Generator().manual_seed(seed), [], 0.0, 0.0, 0.0
        for layer in self.layers:
            bank = RotationBank()
            bank.add("heads", self._linear(layer, 0).out_features // self.heads, blocks=self.heads, generator=generator)
            both = [
                RotatedLinear(self._linear(layer, 0), bank, outputs="heads"),
                RotatedLinear(self._linear(layer, 1), bank, inputs="heads"),
            ]
            start = time.process_time()
            if method is not None:
                for loss in self._learn(both, method.make(bank.parameters(), lr=rate)):
                    advance(f"loss {loss:.4f}")
            spent += time.process_time() - start
            weights.append([linear.rotated_weight().detach() for linear in both])
            last += sum(float(ROUNDING.expected_error(w, 100.0)) for w in weights[-1])
            off = max(off, *orthogonality_error(bank).values())
        return Result(last, self._figures(weights), off, spent / self.steps / len(self.layers))

    def _learn(self, linears: Sequence[RotatedLinear], opt: torch.optim.Optimizer) -> Iterator[float]:
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.01, self.steps)
        for step in range(self.steps):
            power = 8.0 * 12.5 ** (step / self.steps)
            opt.zero_grad()
            loss = torch.stack([ROUNDING.expected_error(x.rotated_weight(), power) for x in linears]).sum()
            loss.backward()
            opt.step()
            schedule.step()
            yield loss.item()

    @staticmethod
    def _linear(layer: nn.Module, which: int) -> nn.Linear:
        linear: nn.Linear = layer.get_submodule(("attention.self.value", "attention.output.dense")[which])  # type: ignore[assignment]
        return linear

    @staticmethod
    @torch.no_grad()
    def _figures(weights: Iterable[Sequence[Tensor]]) -> tuple[float, ...]:
        errors = [[float((ROUNDING(w) - w).square().sum() / w.square().sum()) for w in both] for both in weights]
        return tuple(100 * statistics.fmean(column) for column in zip(*errors, strict=True))


def measure(task: Language | Heads, rates: Sequence[float], seeds: int, runs: Runs) -> list[tuple[str, ...]]:
    """Return the rows of the table."""
    rows = [("no rotation", *(f"{figure:.3f}" for figure in task.plain()), "", "", "")]
    for label, method in {"random": None, **METHODS}.items():
        listed = 0.0 if method is None else method.language if isinstance(task, Language) else method.heads
        each = 0 if method is None else task.steps * (1 if isinstance(task, Language) else len(task.layers))
        advance = runs.begin(label, total=max(1, each * (len(rates) + seeds - 1)))
        tried = {listed * k: task.result(method, listed * k, 0, advance) for k in (rates if method else (1.0,))}
        best = min(tried, key=lambda rate: tried[rate].validation)
        if method is not None:
            runs.console.print(f"{label}: " + ", ".join(f"{rate:g} {r.validation:.4f}" for rate, r in tried.items()))
        found = [tried[best], *(task.result(method, best, seed, advance) for seed in range(1, seeds))]
        figures = (figure_of(column) for column in zip(*(r.figures for r in found), strict=True))
        cost = f"{1e3 * statistics.median(r.seconds for r in found):.0f}" if method else ""
        rows.append((label, *figures, f"{max(r.off for r in found):.0e}", f"{best:g}" if method else "", cost))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    options: Parser = parser()
    options.add_argument("--task", choices=("language", "heads"), default="language", help="(%(default)s)")
    options.add_argument(
        "--rates", type=float, nargs="+", default=[0.25, 1.0, 4.0], help="tried, times the listed rate"
    )
    options.add_argument("--encoder-layers", type=positive_int, default=6, help="of the task heads (%(default)s)")
    toy = {"layers": 1, "width": 32, "train_steps": 2, "train_batch": 2, "steps": 2, "batch": 2, "seeds": 1}
    args = options.parse(argv, toy={**toy, "passages": 4, "rates": [1.0], "encoder_layers": 1}, full={})
    with Runs() as runs:
        if args.task == "language":
            text = source_text()
            task: Language | Heads = Language(get_model(args, text, runs), text, args.steps, args.batch, args.passages)
        else:
            from rotation_quantization import load

            task = Heads(load()[1], args.steps, args.encoder_layers)
        rows = measure(task, args.rates, args.seeds, runs)
    show(("rotation", *task.columns, "off", "rate", "CPU ms"), rows, caption=f"{task.caption}; {args.steps} steps")


if __name__ == "__main__":
    main()
