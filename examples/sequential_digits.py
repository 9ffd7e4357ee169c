"""A GRU that reads handwritten digits row by row, with and without orthogonal recurrent gates.

Run it with no argument; it needs no network:

    pip install "manifold-opt[examples]"
    python examples/sequential_digits.py

What it shows: the three lines that turn an ordinary training script into a constrained one (look for
"change 1 of 3"), what the constraint costs a step, and how far from orthogonal the gates get. The same GRU is
trained with torch.optim.Adam and with manifold_opt.Adam under several retractions, all from the same orthogonal
start, over the same batches, for the same number of steps, with the same learning rate and no other tuning. The
data are the 1,797 real 8 x 8 images that come with scikit-learn, each a sequence of 8 rows.

What to expect, in about a minute on one core:

- Under torch.optim.Adam, which is free to do that, the gates leave the orthogonal matrices; their error ends near 100.
- Under manifold_opt.Adam it stays at the rounding of float32, near 2e-6, in every step of the exact retractions.
  The orthogonalizer is approximate: a few 1e-4 in the first steps, which are the longest, and again where the loss
  jumps; at rounding in between.
- All runs end at 97 to 99 % of the test images. Read little into the differences: one image is 0.2 %, and with other
  seeds and splits of the images the constrained runs ended between 1 % behind and 2 % ahead. Eight rows are too short a
  sequence to need an orthogonal recurrence, and the unconstrained training loss falls faster, having more freedom. The
  constraint is here for what it guarantees, not for accuracy.
- The retractions differ in cost and error, hardly in the path: their loss curves lie on each other until, with some
  seeds, a jump of the loss tells them apart.
- A constrained step of a net this small takes about one and a half to two times as long.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.utils.data import DataLoader, TensorDataset

from manifold_opt import RETRACTIONS, Adam, init, mark_orthogonal, orthogonality_error  # change 1 of 3

try:
    import matplotlib

    matplotlib.use("Agg")  # writes files only, so that no display is needed
    import matplotlib.pyplot as plt
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
except ModuleNotFoundError as missing:
    raise SystemExit(f'{missing.name} is not installed: pip install "manifold-opt[examples]"') from None

DEFAULT_RETRACTIONS = "orthographic,cayley,qr,polar,orthogonalizer"
DEFAULT_PLOT = Path(__file__).with_suffix(".png")
SPLIT_SEED = 0  # not --seed: every run of this script is judged on the same images
TEST_FRACTION = 0.25

# Colours of Okabe and Ito, which colour-blind readers can tell apart. The constrained curves lie on each other: each is
# thinner than the one below it, or broken, so that all stay visible.
STYLES: dict[str | None, dict[str, Any]] = {
    None: {"color": "#000000", "linestyle": "-", "linewidth": 1.2},
    "cayley": {"color": "#56B4E9", "linestyle": "-", "linewidth": 7.5},
    "qr": {"color": "#F0E442", "linestyle": "-", "linewidth": 4.8},
    "orthographic": {"color": "#009E73", "linestyle": "-", "linewidth": 10.0},
    "polar": {"color": "#0072B2", "linestyle": (0, (3, 3)), "linewidth": 2.8},
    "orthogonalizer": {"color": "#D55E00", "linestyle": "-", "linewidth": 1.0},
    "exp": {"color": "#999999", "linestyle": (0, (3, 12)), "linewidth": 2.0},
    "cayley_iterative": {"color": "#CC79A7", "linestyle": (10, (3, 17)), "linewidth": 2.0},
}


@dataclass
class Digits:
    """The images, ``(count, 8, 8)`` in [0, 1], and their classes."""

    train: TensorDataset
    test: TensorDataset


@dataclass
class Result:
    """What one run leaves behind; the lists have one entry a training step."""

    losses: list[float]
    errors: list[float]
    seconds: list[float]
    accuracy: float


class RowReader(nn.Module):
    """A GRU that reads an image row by row, and a linear layer that names the digit at the end."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(input_size=8, hidden_size=hidden, batch_first=True)
        self.head = nn.Linear(hidden, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``(batch, 10)`` of images ``(batch, rows, columns)``."""
        _, last = self.gru(images)
        return self.head(last[-1])


def load_data() -> Digits:
    """The digits of scikit-learn, split into stratified training and test images."""
    digits = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        digits.images / 16,  # pixels are whole numbers up to 16
        digits.target,
        test_size=TEST_FRACTION,
        stratify=digits.target,
        random_state=SPLIT_SEED,
    )
    return Digits(
        train=TensorDataset(torch.tensor(train_x, dtype=torch.float32), torch.tensor(train_y)),
        test=TensorDataset(torch.tensor(test_x, dtype=torch.float32), torch.tensor(test_y)),
    )


def build(retraction: str | None, hidden: int, lr: float, seed: int) -> tuple[RowReader, torch.optim.Optimizer]:
    """The net at its start and its optimizer; ``None`` is the unconstrained run."""
    torch.manual_seed(seed)
    net = RowReader(hidden)
    # Marking would make the gates orthogonal; the unconstrained run gets the same start.
    init.orthogonal_(net.gru.weight_hh_l0, blocks=3)
    if retraction is None:
        return net, torch.optim.Adam(net.parameters(), lr=lr)

    mark_orthogonal(net.gru.weight_hh_l0, blocks=3)  # change 2 of 3
    return net, Adam(net.parameters(), lr=lr, retraction=retraction)  # change 3 of 3


def train(
    net: RowReader,
    opt: torch.optim.Optimizer,
    digits: Digits,
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    after_epoch: Callable[[float, float], None],
) -> Result:
    """Train as one would anyway, and note loss, time and orthogonality error of every step."""
    # A generator of its own: the batches do not depend on what else draws random numbers.
    order = torch.Generator().manual_seed(seed)
    batches = DataLoader(digits.train, batch_size=batch_size, shuffle=True, generator=order)
    losses: list[float] = []
    errors: list[float] = []
    seconds: list[float] = []
    for _ in range(epochs):
        for images, classes in batches:
            start = time.perf_counter()
            opt.zero_grad()
            loss = F.cross_entropy(net(images), classes)
            loss.backward()
            opt.step()
            seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
            errors.append(gate_error(net))
        after_epoch(statistics.fmean(losses[-len(batches) :]), errors[-1])
    return Result(losses, errors, seconds, accuracy_of(net, digits))


def gate_error(net: RowReader) -> float:
    """Largest error of the three gates, marked or not."""
    return orthogonality_error(net.gru.weight_hh_l0, blocks=3)


@torch.no_grad()
def accuracy_of(net: RowReader, digits: Digits) -> float:
    """Fraction of the test images that the net names correctly."""
    images, classes = digits.test.tensors
    return (net(images).argmax(1) == classes).double().mean().item()


def label_of(retraction: str | None) -> str:
    """The name of a run in the progress bar, the table and the plot."""
    return "torch Adam, unconstrained" if retraction is None else f"Adam, {retraction}"


def run_once(retraction: str | None, args: argparse.Namespace, digits: Digits, progress: Progress) -> Result:
    """One training from start to end, with a progress bar of its own."""
    task = progress.add_task(label_of(retraction), total=args.epochs, state="")

    def after_epoch(loss: float, error: float) -> None:
        progress.update(task, advance=1, state=f"loss {loss:.1e} error {error:.0e}")

    net, opt = build(retraction, args.hidden, args.lr, args.seed)
    return train(
        net,
        opt,
        digits,
        epochs=args.epochs,
        batch_size=args.batch_size,
        seed=args.seed,
        after_epoch=after_epoch,
    )


def compare(args: argparse.Namespace, digits: Digits, console: Console) -> dict[str | None, Result]:
    """Train once without constraint and once with every retraction."""
    progress = Progress(
        TextColumn("{task.description:<25}"),
        BarColumn(bar_width=9),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_interactive,  # in a log file one plain line a run is enough
    )
    results: dict[str | None, Result] = {}
    with progress:
        for retraction in (None, *args.retractions):
            results[retraction] = run_once(retraction, args, digits, progress)
            if not console.is_interactive:
                print(f"{label_of(retraction)}: {len(results[retraction].losses)} steps done", flush=True)
    return results


def table_of(results: dict[str | None, Result]) -> Table:
    """One line a run."""
    table = Table(caption="error: Frobenius norm of I - W W', the largest of the gates")
    table.add_column("optimizer", no_wrap=True)
    table.add_column("test\naccuracy", justify="right")
    table.add_column("largest error\nafter any step", justify="right")
    table.add_column("ms a step\n(median)", justify="right")
    for retraction, result in results.items():
        largest = torch.tensor(result.errors).max().item()  # unlike max(), NaN if an entry is
        table.add_row(
            label_of(retraction),
            f"{result.accuracy:.1%}",
            f"{largest:.1e}",
            f"{1e3 * statistics.median(result.seconds):.2f}",
        )
    return table


def save_plot(results: dict[str | None, Result], batches_an_epoch: int, path: Path) -> None:
    """Training loss and orthogonality error against the step, side by side."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    for retraction, result in results.items():
        style = {"solid_capstyle": "butt", **STYLES.get(retraction, {})}
        left.plot(*moving_average(result.losses, batches_an_epoch), **style)
        right.plot(range(1, len(result.errors) + 1), result.errors, label=label_of(retraction), **style)
    left.set(title="Training loss (mean over one epoch)", xlabel="step", ylabel="cross-entropy", yscale="log")
    right.set(
        title="Distance of the gates from orthogonality",
        xlabel="step",
        ylabel=r"$\Vert I - WW^{\mathsf{T}}\Vert_F$, the largest of the gates",
        yscale="log",
    )
    for axes in (left, right):
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(len(results), 5), frameon=False, handlelength=3.5)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def moving_average(values: list[float], width: int) -> tuple[list[float], list[float]]:
    """Steps and means of ``width`` neighbouring values, each at the middle of its window."""
    width = min(width, len(values))
    means = torch.tensor(values, dtype=torch.float64).unfold(0, width, 1).mean(-1)
    steps = torch.arange(len(means)) + (width + 1) / 2
    return steps.tolist(), means.tolist()


class Parser(argparse.ArgumentParser):
    """An argument parser that answers a wrong argument in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Print the message and leave with exit status 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")


def positive_int(text: str) -> int:
    """A whole number above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def positive_float(text: str) -> float:
    """A finite number above zero."""
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be finite and above 0, got {text}")
    return value


def known_retractions(text: str) -> list[str]:
    """Names from a comma list, each once; an unknown one is an error."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in RETRACTIONS:
            raise argparse.ArgumentTypeError(f"unknown retraction {name!r}; choose from {', '.join(RETRACTIONS)}")
    return list(dict.fromkeys(names))


def picture_path(text: str) -> Path:
    """A file that the plot can be written to; better refused now than after all the training."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options; ``--toy`` changes defaults only, so that an option given beside it holds."""
    parser = Parser(description="Train a GRU on handwritten digits, row by row, with and without orthogonal gates.")
    add = parser.add_argument
    add("--epochs", type=positive_int, default=100, help="passes over the training images (%(default)s)")
    add("--hidden", type=positive_int, default=64, help="size of the hidden state (%(default)s)")
    add("--batch-size", type=positive_int, default=32, help="images a step (%(default)s)")
    add("--lr", type=positive_float, default=3e-3, help="learning rate of every run (%(default)s)")
    add("--seed", type=int, default=0, help="of the start and the batches, not of the split (%(default)s)")
    add("--retractions", type=known_retractions, default=DEFAULT_RETRACTIONS, help="comma list (%(default)s)")
    # Products this small are slower on several threads, by far so where other programs use the cores too.
    add("--threads", type=positive_int, default=1, help="threads of torch (%(default)s)")
    add("--plot", type=picture_path, help=f"where the picture goes ({DEFAULT_PLOT.name}, beside this script)")
    add("--toy", action="store_true", help="seconds, only to see that it runs; the picture goes to a temporary folder")
    if parser.parse_args(argv).toy:
        parser.set_defaults(epochs=2, hidden=16)
    return parser.parse_args(argv)


def default_plot(toy: bool) -> Path:
    """Beside this script; a toy run must not overwrite the picture of a full one."""
    return Path(tempfile.mkdtemp()) / DEFAULT_PLOT.name if toy else DEFAULT_PLOT


def main(argv: Sequence[str] | None = None) -> None:
    """Train, print the table, save the plot."""
    args = parse(argv)
    torch.set_num_threads(args.threads)
    digits = load_data()
    print(
        f"{len(digits.train)} training and {len(digits.test)} test images (split seed {SPLIT_SEED}); "
        f"{args.epochs} epochs, hidden size {args.hidden}, lr {args.lr:g}, seed {args.seed}"
    )
    console = Console()
    results = compare(args, digits, console)
    console.print(table_of(results))
    plot = args.plot or default_plot(args.toy)
    save_plot(results, math.ceil(len(digits.train) / args.batch_size), plot)
    print(f"plot: {plot}")


if __name__ == "__main__":
    main()
