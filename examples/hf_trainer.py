"""A small GPT-2 whose queries and keys have orthogonal heads, trained by transformers' Trainer.

Run it with no argument; it needs no network:

    pip install ".[examples,frameworks]"
    python examples/hf_trainer.py

What it shows: the mark and the one argument that constrain a model of transformers (look for "change 1 of 2"), and that
the constraint outlives what the Trainer adds to a training loop: the parameter groups that it builds itself, weight
decay, a schedule, clipped gradients, and a checkpoint from which another Trainer goes on with another model. GPT-2
keeps the projections of queries, keys and values side by side in one weight, ``c_attn``: the heads of queries and keys
are blocks along its columns, ``dim=1``, and ``which`` leaves those of the values free. The model starts from random
weights. The data are the 1,797 real 8 x 8 images that come with scikit-learn, read as 64 tokens, one a pixel, each of
17 shades.

What to expect, in about two minutes on one core:

- The 16 marked heads have orthonormal columns to the rounding of float32, 4e-7, after every step; with the Trainer's
  own AdamW their error goes to 1.
- The run that was resumed from the checkpoint of the middle ends with the same bits as the one that went through.
- Weight decay, ten times as much in the last run, does not shrink the marked heads.
- All name 90 to 93 % of the test images; with 449 of those nothing is to be read into that.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import torch
from common import (
    Parser,
    Runs,
    largest,
    moving_average,
    panels,
    positive_float,
    positive_int,
    same_bits,
    save,
    show,
)
from torch import Tensor
from torch.utils.data import Dataset

from manifold_opt import AdamW, check, mark_orthogonal, orthogonality_error
from manifold_opt.compare.data import MissingDataError, digits

try:
    import accelerate  # noqa: F401  (without it there is no Trainer)
    import transformers
    from transformers import GPT2Config, GPT2ForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
except ModuleNotFoundError as missing:
    raise SystemExit(f'{missing.name} is not installed: pip install ".[frameworks]"') from None

PLAIN, WHOLE, RESUMED = "the Trainer's AdamW", "AdamW", "resumed at half"
DECAY = "AdamW, decay 1"
STYLES: dict[str, dict[str, Any]] = {
    PLAIN: {"color": common.BLACK, "linewidth": 1.2},
    WHOLE: {"color": common.GREEN, "linewidth": 6.0},
    RESUMED: {"color": common.ORANGE, "linewidth": 2.0},
    DECAY: {"color": common.BLUE, "linewidth": 1.0},
}
SHADES = 17  # of a pixel; one more token, which never comes, is the padding that GPT-2 wants to be told


class Pixels(Dataset[dict[str, Tensor]]):
    """Images as sentences of 64 words, in the form that the Trainer hands to a model."""

    def __init__(self, images: Tensor, classes: Tensor) -> None:
        self.tokens = (images * (SHADES - 1)).long().flatten(1)
        self.classes = classes

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.classes[index]}


class Watch(TrainerCallback):
    """Notes how far from orthogonal the marked heads are after every step."""

    def __init__(self, advance: Callable[[str], None], steps: int) -> None:
        self.advance, self.steps = advance, steps
        self.errors: list[float] = []

    def on_step_end(self, *_: object, model: torch.nn.Module, **__: object) -> None:
        """One step is done."""
        self.errors.append(max(orthogonality_error(model).values()))
        if len(self.errors) % self.steps == 0:
            self.advance(f"error {self.errors[-1]:.0e}")


@dataclass
class Result:
    """What one run leaves behind."""

    model: GPT2ForSequenceClassification
    errors: list[float]
    losses: list[float]
    accuracy: float
    problems: list[str]
    first_step: int


def build(hidden: int, heads: int, layers: int, seed: int) -> GPT2ForSequenceClassification:
    """The model at its start, with the heads of queries and keys marked."""
    transformers.set_seed(seed)
    config = GPT2Config(
        vocab_size=SHADES + 1,
        n_positions=64,
        n_embd=hidden,
        n_layer=layers,
        n_head=heads,
        num_labels=10,
        pad_token_id=SHADES,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = GPT2ForSequenceClassification(config)
    for block in model.transformer.h:  # change 1 of 2; after from_pretrained, where weights come from there
        mark_orthogonal(block.attn.c_attn, "weight", blocks=3 * heads, dim=1, which=range(2 * heads))
    return model


def options_of(label: str, args: argparse.Namespace, folder: Path) -> TrainingArguments:
    """What the Trainer is asked for."""
    return TrainingArguments(
        output_dir=str(folder / label),
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=512,
        learning_rate=args.lr,
        lr_scheduler_type="cosine",
        warmup_steps=50 if not args.toy else 2,
        weight_decay=1.0 if label == DECAY else 0.1,
        save_strategy="epoch",
        logging_steps=1,
        eval_strategy="no",
        seed=args.seed,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )


def accuracy_of(outputs: transformers.EvalPrediction) -> dict[str, float]:
    """Fraction of the images that are named correctly."""
    return {"accuracy": float((outputs.predictions.argmax(-1) == outputs.label_ids).mean())}


def run_once(label: str, args: argparse.Namespace, folder: Path, runs: Runs) -> Result:
    """One training from start to end; the resumed one from the checkpoint that the whole one left in the middle."""
    images = digits()
    train, test = Pixels(*images.train), Pixels(*images.test)
    epoch = -(-len(train) // args.batch_size)
    done = args.epochs // 2 if label == RESUMED else 0
    watch = Watch(runs.begin(label, total=args.epochs - done), epoch)
    model = build(args.hidden, args.heads, args.layers, args.seed if not done else args.seed + 1)
    trainer = Trainer(
        model,
        options_of(label, args, folder),
        train_dataset=train,
        eval_dataset=test,
        compute_metrics=accuracy_of,
        callbacks=[watch],
        optimizer_cls_and_kwargs=None if label == PLAIN else (AdamW, {"lr": args.lr}),  # change 2 of 2
    )
    trainer.remove_callback(transformers.PrinterCallback)
    trainer.train(resume_from_checkpoint=str(folder / WHOLE / f"checkpoint-{done * epoch}") if done else None)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][done * epoch :]
    accuracy = trainer.evaluate()["eval_accuracy"]
    problems = check(model, trainer.optimizer.optimizer)  # the Trainer wraps it in one of accelerate's
    return Result(model, watch.errors, losses, accuracy, problems, 1 + done * epoch)


def row_of(label: str, result: Result, whole: Result, epochs: int) -> tuple[str, ...]:
    """What the table says of a run."""
    return (
        label,
        f"{result.accuracy:.1%}",
        f"{statistics.fmean(result.losses[-len(whole.losses) // epochs :]):.2f}",
        f"{largest(result.errors):.1e}",
        "itself" if result is whole else "yes" if same_bits(result.model, whole.model) else "no",
        str(len(result.problems)),
    )


def save_plot(results: dict[str, Result], width: int, path: Path) -> None:
    """Training loss and orthogonality error against the step, side by side."""
    figure, (left, right) = panels(2)
    for label, result in results.items():
        style = {"solid_capstyle": "butt", **STYLES[label]}
        steps, losses = moving_average(result.losses, width)
        left.plot([step + result.first_step - 1 for step in steps], losses, **style)
        numbers = range(result.first_step, result.first_step + len(result.errors))
        right.plot(numbers, result.errors, label=label, **style)
    left.set(title="Training loss (mean over one epoch)", xlabel="step", ylabel="cross-entropy", ylim=(0, None))
    right.set(
        title="Distance of the heads from orthogonality",
        xlabel="step",
        ylabel=r"$\Vert I - W^{\mathsf{T}}W\Vert_F$, the largest of the heads",
        yscale="log",
    )
    figure.legend(loc="outside lower center", ncols=4, frameon=False, handlelength=3.5)
    save(figure, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(__file__, "Train a small GPT-2 with orthogonal heads, with transformers' Trainer.")
    add = parser.add_argument
    add("--epochs", type=positive_int, default=16, help="passes over the training images, at least 2 (%(default)s)")
    add("--hidden", type=positive_int, default=32, help="size of the hidden state (%(default)s)")
    add("--heads", type=positive_int, default=4, help="of each attention; a divisor of --hidden (%(default)s)")
    add("--layers", type=positive_int, default=2, help="blocks of attention (%(default)s)")
    add("--batch-size", type=positive_int, default=32, help="images a step (%(default)s)")
    add("--lr", type=positive_float, default=3e-3, help="learning rate at its highest (%(default)s)")
    toy = {"epochs": 2, "hidden": 8, "heads": 2, "layers": 1, "batch_size": 128}
    args = parser.parse(argv, toy=toy, full={"epochs": 100, "hidden": 128, "layers": 6})
    if args.epochs < 2 or args.hidden % args.heads:
        parser.error("--epochs must be at least 2, to have a middle, and --heads divide --hidden")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train in every way; print the table and what check says, save the plot."""
    args = parse(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        batches = -(-len(digits().train[1]) // args.batch_size)
    except MissingDataError as error:
        raise SystemExit(str(error)) from None
    print(f"{args.epochs} epochs of {batches} steps, hidden size {args.hidden}, lr {args.lr:g}, seed {args.seed}")
    with Runs() as runs, tempfile.TemporaryDirectory() as folder:
        results = {label: run_once(label, args, Path(folder), runs) for label in STYLES}
    show(
        (
            "run",
            "test\naccuracy",
            "last\nloss",
            "error after\nany step",
            "bits of\nAdamW",
            "problems\nfound",
        ),
        (row_of(label, result, results[WHOLE], args.epochs) for label, result in results.items()),
        caption="last loss: mean of the last epoch; error: Frobenius norm of I - W'W, the largest of the heads",
    )
    for label, result in results.items():
        for problem in result.problems:
            print(f"{label}: {problem}")
    save_plot(results, batches, args.plot)


if __name__ == "__main__":
    main()
