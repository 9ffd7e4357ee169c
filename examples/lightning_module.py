"""A LightningModule with an LSTM whose gates are orthogonal, through everything that Lightning's Trainer does to it.

Run it with no argument; it needs no network:

    pip install ".[examples,frameworks]"
    python examples/lightning_module.py

What it shows: the two lines that constrain a LightningModule (look for "change 1 of 2"), and that the constraint
outlives what a Trainer adds to a training loop: a schedule a step, clipped gradients, bf16-mixed, a checkpoint from
which another Trainer goes on with another module, and averaged weights. A callback of ten lines logs the error of the
gates after every step, and once an epoch that of the weights that are validated. The data are the 1,797 real 8 x 8
images that come with scikit-learn, read row by row.

What to expect, in about a minute on one core:

- The gates are orthogonal to the rounding of float32 after every step, near 2e-6, with bf16-mixed too: the products of
  the forward pass are rounded to bfloat16, the weights and the step are not.
- The run that was resumed from the checkpoint of the middle ends with the same bits as the one that went through.
- An average of orthogonal matrices is not orthogonal: with Lightning's own EMA the weights that are validated are off
  by up to 2, and those left when training ends by 0.008. With ``orthogonal_average`` as ``avg_fn`` they are orthogonal,
  to 7e-6 or better: an average that is as near as ``check`` asks for is left as it is.
- With torch.optim.Adam the error of the gates ends near 200. The weight is marked in that run too, for the measuring;
  ``check`` says that the optimizer does not keep it.
- All read 98.7 to 99.3 % of the test images, 0.2 % being one image: nothing is to be read into that. Free of the
  constraint the training loss falls faster.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
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
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from manifold_opt import Adam, check, mark_recurrent, orthogonal_average, orthogonality_error
from manifold_opt.compare.data import MissingDataError, digits

try:
    import lightning
    from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, WeightAveraging
except ModuleNotFoundError as missing:
    raise SystemExit(f'{missing.name} is not installed: pip install ".[frameworks]"') from None

PLAIN, WHOLE, RESUMED = "unconstrained", "Adam", "resumed at half"
MIXED, EMA, ORTHOGONAL_EMA = "bf16-mixed", "Lightning's EMA", "orthogonal EMA"
STYLES: dict[str, dict[str, Any]] = {
    PLAIN: {"color": common.BLACK, "linewidth": 1.2},
    WHOLE: {"color": common.GREEN, "linewidth": 6.0},
    RESUMED: {"color": common.ORANGE, "linewidth": 2.0},
    MIXED: {"color": common.BLUE, "linewidth": 1.0},
    EMA: {"color": common.RED, "linewidth": 1.5},
    ORTHOGONAL_EMA: {"color": common.BLUE, "linewidth": 1.5, "linestyle": (0, (4, 3))},
}


class RowReader(lightning.LightningModule):
    """An LSTM that reads an image row by row, and a linear layer that names the digit at the end."""

    def __init__(self, hidden: int, lr: float, constrained: bool = True) -> None:
        super().__init__()
        self.lr, self.constrained = lr, constrained
        self.lstm = nn.LSTM(input_size=8, hidden_size=hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)
        mark_recurrent(self)  # change 1 of 2; the unconstrained run gets the same start, and is measured by the mark

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, rows, columns)``."""
        _, (last, _) = self.lstm(images)
        return self.head(last[-1])

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        images, classes = batch
        return F.cross_entropy(self(images), classes)

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        """Logs the fraction of images that are named correctly."""
        images, classes = batch
        self.log("accuracy", (self(images).argmax(1) == classes).double().mean())

    def configure_optimizers(self) -> dict[str, Any]:
        """The optimizer, and a learning rate that rises and falls with every step."""
        kind = Adam if self.constrained else torch.optim.Adam
        opt = kind(self.parameters(), lr=self.lr)  # change 2 of 2: was torch.optim.Adam
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=self.lr, total_steps=steps)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Watch(lightning.Callback):
    """Logs how far from orthogonal the gates are: after every step, and where they are validated."""

    def __init__(self, advance: Callable[[str], None]) -> None:
        self.advance = advance
        self.losses: list[float] = []
        self.errors: list[float] = []
        self.validated: list[float] = []

    def on_train_batch_end(
        self, _: lightning.Trainer, module: lightning.LightningModule, outputs: Any, *__: object
    ) -> None:
        """One step is done."""
        error = max(orthogonality_error(module).values())
        module.log("orthogonality_error", error)
        self.errors.append(error)
        self.losses.append(outputs["loss"].item())

    def on_validation_batch_end(self, _: lightning.Trainer, module: lightning.LightningModule, *__: object) -> None:
        """All test images are one batch; where weights are averaged, it has seen the averages."""
        self.validated.append(max(orthogonality_error(module).values()))

    def on_train_epoch_end(self, trainer: lightning.Trainer, _: lightning.LightningModule) -> None:
        """One epoch is done, validation included."""
        accuracy = float(trainer.callback_metrics["accuracy"])
        self.advance(f"accuracy {accuracy:.1%} error {self.errors[-1]:.0e}")


@dataclass
class Result:
    """What one run leaves behind."""

    module: RowReader
    watch: Watch
    problems: list[str]
    accuracy: float
    first_step: int


def loaders(args: argparse.Namespace) -> tuple[DataLoader, DataLoader]:
    """Training images by the batch and test images all at once."""
    images = digits()
    train, test = TensorDataset(*images.train), TensorDataset(*images.test)
    # Lightning tells this sampler the epoch, from which its order follows: a resumed run gets the batches it missed.
    order = DistributedSampler(train, num_replicas=1, rank=0, shuffle=True, seed=args.seed)
    return DataLoader(train, batch_size=args.batch_size, sampler=order), DataLoader(test, batch_size=len(test))


def averaging(label: str, module: RowReader, decay: float) -> list[lightning.Callback]:
    """The callback that keeps an exponential moving average of the weights, for those runs that have one."""
    if label == EMA:
        return [EMAWeightAveraging(decay=decay)]
    if label == ORTHOGONAL_EMA:
        return [WeightAveraging(avg_fn=orthogonal_average(module, decay=decay))]
    return []


def mixed_precision() -> str:
    """Return "bf16-mixed", or "32-true" if torch has no bfloat16 LSTM for this CPU."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            torch.nn.LSTM(4, 4)(torch.zeros(1, 1, 4))
    except RuntimeError:
        print("This CPU cannot run an LSTM in bfloat16: the run with mixed precision is one in float32.")
        return "32-true"
    return "bf16-mixed"


def run_once(label: str, args: argparse.Namespace, folder: Path, runs: Runs) -> Result:
    """One training from start to end; the resumed one from the checkpoint that the whole one left in the middle."""
    middle = args.epochs // 2
    resume = folder / f"epoch={middle - 1}.ckpt" if label == RESUMED else None
    watch = Watch(runs.begin(label, total=args.epochs - middle if resume else args.epochs))
    lightning.seed_everything(args.seed if not resume else args.seed + 1, verbose=False)
    module = RowReader(args.hidden, args.lr, constrained=label != PLAIN)
    kept = (
        [ModelCheckpoint(folder, "{epoch}", every_n_epochs=middle, save_top_k=-1)] if label in (WHOLE, RESUMED) else []
    )
    train, test = loaders(args)
    trainer = lightning.Trainer(
        max_epochs=args.epochs,
        accelerator="cpu",
        precision=mixed_precision() if label == MIXED else "32-true",
        gradient_clip_val=1.0,
        callbacks=[*averaging(label, module, args.decay), watch, *kept],
        logger=False,
        enable_checkpointing=bool(kept),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, train, test, ckpt_path=resume)
    first_step = 1 + (middle * len(train) if resume else 0)
    problems = check(module, trainer.optimizers[0])
    return Result(module, watch, problems, float(trainer.callback_metrics["accuracy"]), first_step)


def row_of(label: str, result: Result, whole: Result) -> tuple[str, ...]:
    """What the table says of a run."""
    left = max(orthogonality_error(result.module).values())
    return (
        label,
        f"{result.accuracy:.1%}",
        f"{largest(result.watch.errors):.1e}",
        f"{left:.1e}",
        "itself" if result is whole else "yes" if same_bits(result.module, whole.module) else "no",
        str(len(result.problems)),
    )


def save_plot(results: dict[str, Result], batches: int, path: Path) -> None:
    """Training loss, the error after every step, and the error of the weights that are validated."""
    figure, (left, middle, right) = panels(3, width=4.6)
    for label, result in results.items():
        watch, style = result.watch, {"solid_capstyle": "butt", **STYLES[label]}
        if label not in (EMA, ORTHOGONAL_EMA):  # trained as the whole run is, step by step; what they keep differs
            steps, losses = moving_average(watch.losses, batches)
            left.plot([step + result.first_step - 1 for step in steps], losses, **style)
            numbers = range(result.first_step, result.first_step + len(watch.errors))
            middle.plot(numbers, watch.errors, label=label, **style)
        if label in (WHOLE, EMA, ORTHOGONAL_EMA):
            known = {} if label == WHOLE else {"label": label}
            right.plot(range(1, len(watch.validated) + 1), watch.validated, **known, **style)
    left.set(title="Training loss (mean over one epoch)", xlabel="step", ylabel="cross-entropy", yscale="log")
    error = r"$\Vert I - WW^{\mathsf{T}}\Vert_F$, the largest of the gates"
    middle.set(title="Error of the gates after every step", xlabel="step", ylabel=error, yscale="log")
    right.set(title="Error of the weights that are validated", xlabel="epoch", ylabel=error, yscale="log")
    figure.legend(loc="outside lower center", ncols=3, frameon=False, handlelength=3.5)
    save(figure, path)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(__file__, "Train a LightningModule with orthogonal gates through all that a Trainer does.")
    add = parser.add_argument
    add("--epochs", type=positive_int, default=40, help="passes over the training images, at least 2 (%(default)s)")
    add("--hidden", type=positive_int, default=64, help="size of the hidden state (%(default)s)")
    add("--batch-size", type=positive_int, default=32, help="images a step (%(default)s)")
    add("--lr", type=positive_float, default=1e-2, help="learning rate at its highest (%(default)s)")
    add("--decay", type=positive_float, default=0.99, help="of the moving averages (%(default)s)")
    args = parser.parse(argv, toy={"epochs": 2, "hidden": 8, "batch_size": 128}, full={"epochs": 200, "hidden": 256})
    if args.epochs < 2 or args.decay >= 1:
        parser.error("--epochs must be at least 2, to have a middle, and --decay below 1")
    return args


def quiet() -> None:
    """Keep Lightning from telling what this script is about to tell, and its hints apart from it."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for hint in (".*does not have many workers", ".*LeafSpec.* is deprecated", ".*exists and is not empty"):
        warnings.filterwarnings("ignore", message=hint)


def main(argv: Sequence[str] | None = None) -> None:
    """Train in every way; print the table and what check says, save the plot."""
    args = parse(argv)
    quiet()
    try:
        batches = len(loaders(args)[0])
    except MissingDataError as error:
        raise SystemExit(str(error)) from None
    print(f"{args.epochs} epochs of {batches} steps, hidden size {args.hidden}, lr {args.lr:g}, seed {args.seed}")
    with Runs() as runs, tempfile.TemporaryDirectory() as folder:
        results = {label: run_once(label, args, Path(folder), runs) for label in STYLES}
    show(
        ("run", "test\naccuracy", "error after\nany step", "error\nat the end", "bits of\nAdam", "problems\nfound"),
        (row_of(label, result, results[WHOLE]) for label, result in results.items()),
        caption="error: Frobenius norm of I - W W', the largest of the gates",
    )
    for label, result in results.items():
        for problem in result.problems:
            print(f"{label}: {problem}")
    save_plot(results, batches, args.plot)


if __name__ == "__main__":
    main()
