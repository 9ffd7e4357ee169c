"""A language model in 4 bits: as it is, after random rotations, and after learned ones.

It needs no download: the model is a Llama of transformers' own class, 4.6 million parameters, which is trained first on
the source files of Python's standard library, byte by byte.

    pip install ".[examples,frameworks]"
    python examples/rotate_language_model.py --save llama      # trains the model first, some 15 minutes
    python examples/rotate_language_model.py --model llama     # with the model of an earlier run

What it shows: rotations of the residual stream and of the values of each head change nothing that the model computes,
and can be merged into its weights. Rounding to 4 bits does change it, and costs less after rotations that were learned
with manifold_opt.Adam on the loss of the rounded model.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from common import BLACK, BLUE, ORANGE, Parser, Runs, figure_of, panels, positive_float, positive_int, save, show
from source_text import draw, passages, source_text
from torch import Generator, Tensor, nn

from manifold_opt import Adam, orthogonality_error
from manifold_opt.rotations import (
    RoundToNearest,
    insert_rotations,
    merge_rotations,
    round_linears_,
    simulate_rounding,
)

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing is looked up
try:
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging
except ModuleNotFoundError as missing:
    raise SystemExit(f'{missing.name} is not installed: pip install ".[examples,frameworks]"') from None

LENGTH = 256  # bytes of a passage
TRAIN_LR, WARM_UP, WEIGHT_DECAY = 2e-3, 0.1, 0.1  # of the language model
LAST_LR = 0.01  # of the rotations in the last step, as a fraction of the first
COLOURS = {"no rotation": BLACK, "random": ORANGE, "learned": BLUE}

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


def new_model(layers: int, width: int) -> LlamaForCausalLM:
    """Return a Llama for bytes, with random weights."""
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=width * 11 // 4,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of the next byte, in nats."""
    loss: Tensor = model(input_ids=tokens, labels=tokens).loss
    return loss


def train(model: nn.Module, text: Tensor, *, steps: int, batch: int, seed: int) -> Iterator[float]:
    """Train the language model with torch's AdamW; yield the loss of each step."""
    opt = torch.optim.AdamW(model.parameters(), lr=TRAIN_LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, TRAIN_LR, total_steps=steps, pct_start=WARM_UP)
    generator = Generator().manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        loss = loss_of(model, draw(text, batch, LENGTH, generator))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        opt.step()
        schedule.step()
        yield loss.item()


def learn(
    model: nn.Module, text: Tensor, opt: torch.optim.Optimizer, *, steps: int, batch: int, seed: int
) -> Iterator[float]:
    """Train what the optimizer has on the loss of the model as it is; yield the loss of each step."""
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, LAST_LR, steps)
    generator = Generator().manual_seed(seed)
    for _ in range(steps):
        opt.zero_grad()
        loss = loss_of(model, draw(text, batch, LENGTH, generator))
        loss.backward()
        opt.step()
        schedule.step()
        yield loss.item()


@torch.no_grad()
def bits_per_byte(model: nn.Module, tokens: Tensor) -> float:
    """Return the cross entropy of the passages in bits per byte."""
    losses = [loss_of(model, part).item() * len(part) for part in tokens.split(16)]
    return sum(losses) / len(tokens) / torch.log(torch.tensor(2.0)).item()


def rounded_scores(model: nn.Module, tokens: Tensor, rounding: RoundToNearest) -> dict[str, float]:
    """Return the cross entropy of a plain model that is not rounded, with rounded weights, and with rounded inputs too.

    The model stays as it is.
    """
    model = copy.deepcopy(model)
    scores = {"not rounded": bits_per_byte(model, tokens)}
    round_linears_(model, rounding)
    scores["weights"] = bits_per_byte(model, tokens)
    round_linears_(model, rounding, inputs=rounding)  # weights on the grid stay where they are
    scores["weights and inputs"] = bits_per_byte(model, tokens)
    return scores


def rotated(model: nn.Module, seed: int, make: Make | None, text: Tensor, args: argparse.Namespace) -> Iterator[float]:
    """Rotate a model at random, learn from there on if there is an optimizer, and merge; yield the losses."""
    bank = insert_rotations(model, generator=Generator().manual_seed(seed))
    if make is not None:
        rounding = RoundToNearest(args.bits)
        simulate_rounding(model, weights=rounding, inputs=rounding)
        yield from learn(model, text, make(bank.parameters()), steps=args.steps, batch=args.batch, seed=seed)
    model.off_orthogonal = max(orthogonality_error(bank).values())
    merge_rotations(model)


def run(
    model: nn.Module, text: dict[str, Tensor], makers: dict[str, Make | None], args: argparse.Namespace, runs: Runs
) -> dict[str, list[dict[str, float]]]:
    """Return the scores of the model as it is, and for each seed after each way to rotate it."""
    rounding, tokens = RoundToNearest(args.bits), passages(text["test"], args.passages, LENGTH)
    scores = {"no rotation": [rounded_scores(model, tokens, rounding)]}
    for label, make in makers.items():
        scores[label] = []
        for seed in range(args.seed, args.seed + args.seeds):
            advance = runs.begin(f"{label}, seed {seed}", total=(args.steps if make else 0) + 1)
            copied = copy.deepcopy(model)
            for loss in rotated(copied, seed, make, text["train"], args):
                advance(f"loss {loss:.3f}")
            found = rounded_scores(copied, tokens, rounding)
            advance(f"{found['weights and inputs']:.3f} bits a byte; off orthogonal by {copied.off_orthogonal:.0e}")
            scores[label].append(found | {"off": copied.off_orthogonal})
    return scores


def show_scores(scores: dict[str, list[dict[str, float]]]) -> None:
    """Print the table."""
    columns = list(scores["no rotation"][0])
    rows = []
    for label, found in scores.items():
        off = max(score.get("off", 0.0) for score in found)
        rows.append((label, *(figure_of([score[c] for score in found]) for c in columns), f"{off:.0e}" if off else "-"))
    show(("rotation", *columns, "off"), rows, caption="bits per byte; off: distance from orthogonality")


def save_plot(scores: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw what rounding adds to the cross entropy, a bar for each way to rotate."""
    figure, plots = panels(2, width=4.5, height=3.6)
    for plot, column in zip(plots, ("weights", "weights and inputs"), strict=True):
        for place, (label, found) in enumerate(scores.items()):
            added = [score[column] - score["not rounded"] for score in found]
            plot.bar(place, statistics.fmean(added), color=COLOURS.get(label, BLUE), width=0.6)
            plot.plot([place] * len(added), added, "o", color="white", markeredgecolor="black", markersize=4)
        plot.set(title=f"4-bit {column}", xticks=range(len(scores)), xticklabels=scores)
    plots[0].set(ylabel="added by rounding, bits per byte")
    save(figure, path)


def get_model(args: argparse.Namespace, text: dict[str, Tensor], runs: Runs) -> nn.Module:
    """Return the language model of an earlier run, or a new one after training."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if args.model is not None:
        return LlamaForCausalLM.from_pretrained(args.model).eval()
    torch.manual_seed(args.seed)
    model = new_model(args.layers, args.width)
    advance = runs.begin("language model", total=args.train_steps)
    for loss in train(model, text["train"], steps=args.train_steps, batch=args.train_batch, seed=args.seed):
        advance(f"loss {loss:.3f}")
    if args.save is not None:
        model.save_pretrained(args.save)
    return model.eval()


def parser() -> Parser:
    """Return the options."""
    parser = Parser(__file__, "Round a language model to 4 bits, after no, random and learned rotations.")
    add = parser.add_argument
    add("--model", type=Path, help="folder with a model of an earlier run (trains one)")
    add("--save", type=Path, help="folder for the trained model")
    add("--layers", type=positive_int, default=6, help="decoder layers of a new model (%(default)s)")
    add("--width", type=positive_int, default=256, help="its width, a multiple of 32 (%(default)s)")
    add("--train-steps", type=positive_int, default=800, help="of its training (%(default)s)")
    add("--train-batch", type=positive_int, default=8, help=f"passages of {LENGTH} bytes a step of it (%(default)s)")
    add("--bits", type=positive_int, default=4, choices=range(2, 9), help="of a rounded number (%(default)s)")
    add("--steps", type=positive_int, default=60, help="of learning rotations (%(default)s)")
    add("--batch", type=positive_int, default=4, help="passages a step of it (%(default)s)")
    add("--lr", type=positive_float, default=2e-3, help="learning rate of the first step (%(default)s)")
    add("--seeds", type=positive_int, default=3, help="random rotations to start from (%(default)s)")
    add("--passages", type=positive_int, default=64, help="of the test files, to be measured on (%(default)s)")
    return parser


TOY = {"layers": 1, "width": 32, "train_steps": 3, "train_batch": 2, "steps": 2, "batch": 2, "seeds": 1, "passages": 4}


def main(argv: Sequence[str] | None = None) -> None:
    """Round the model as it is, after random rotations and after learned ones; print the table, save the plot."""
    args = parser().parse(argv, toy=TOY, full={"steps": 400, "train_steps": 4000})
    text = source_text()
    makers: dict[str, Make | None] = {"random": None, "learned": lambda parameters: Adam(parameters, lr=args.lr)}
    with Runs() as runs:
        scores = run(get_model(args, text, runs), text, makers, args, runs)
    show_scores(scores)
    save_plot(scores, args.plot)


if __name__ == "__main__":
    main()
