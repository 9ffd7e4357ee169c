"""What the examples share: their options, a progress bar, a table, a picture. Nothing in it is about constraints."""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import torch
from torch import nn

from manifold_opt.compare.data import FASHION, Images, MissingDataError, digits, fashion

try:
    import matplotlib

    matplotlib.use("Agg")  # writes files only, so that no display is needed
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table
except ModuleNotFoundError as missing:
    raise SystemExit(f'{missing.name} is not installed: pip install ".[examples]"') from None

# Colours of Okabe and Ito, which colour-blind readers can tell apart.
BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
YELLOW, BLUE, RED, PINK, GREY = "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999"


class Parser(argparse.ArgumentParser):
    """The options of an example; those that all have are there already.

    Args:
        script: the example's ``__file__``; its picture has the same name, and goes to the working folder.
        description: one sentence.
    """

    def __init__(self, script: str, description: str) -> None:
        super().__init__(prog=Path(script).name, description=description)
        self._picture = Path(script).stem + ".png"

    def parse(self, argv: Sequence[str] | None, *, toy: dict[str, Any], full: dict[str, Any]) -> argparse.Namespace:
        """What the user asked for; ``--toy`` and ``--full`` change defaults only: an option given beside them holds."""
        add = self.add_argument
        add("--seed", type=int, default=0, help="of the start and the batches (%(default)s)")
        # Products this small are slower on several threads, by far so where other programs use the cores too.
        add("--threads", type=positive_int, default=1, help="threads of torch (%(default)s)")
        add("--plot", type=picture_path, help=f"where the picture goes ({self._picture}, in the working folder)")
        size = self.add_mutually_exclusive_group()
        size.add_argument(
            "--toy", action="store_true", help="seconds, to see that it runs; the picture goes to a new folder"
        )
        size.add_argument("--full", action="store_true", help="the size of the literature, for a patient machine")
        asked = self.parse_args(argv)
        self.set_defaults(**(toy if asked.toy else full if asked.full else {}))
        args = self.parse_args(argv)
        if args.plot is None:  # a toy run must not overwrite the picture of a real one
            args.plot = (Path(tempfile.mkdtemp()) if args.toy else Path()) / self._picture
        torch.set_num_threads(args.threads)
        return args

    def error(self, message: str) -> NoReturn:
        """A wrong argument is answered in one line, without the usage; exit status 2."""
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


def one_of(names: Iterable[str], what: str) -> Callable[[str], list[str]]:
    """The type of an option that is a comma list of these names, each once."""
    known = tuple(names)

    def several(text: str) -> list[str]:
        asked = [name.strip() for name in text.split(",")]
        for name in asked:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown {what} {name!r}; choose from {', '.join(known)}")
        return list(dict.fromkeys(asked))

    return several


def picture_path(text: str) -> Path:
    """A file that the plot can be written to; better refused now than after all the training."""
    path = Path(text)
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise argparse.ArgumentTypeError(f"must end in .png, .pdf or .svg, got {text!r}")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {str(path.parent)!r}")
    return path


class Runs:
    """A progress bar a run; in a log file, where a bar is no use, one line when a run is done.

    >>> with Runs() as runs:
    ...     advance = runs.begin("Adam", total=2)
    ...     advance("loss 0.5")
    ...     advance("loss 0.4")
    Adam: loss 0.4
    """

    def __init__(self) -> None:
        self.console = Console()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=9),
            MofNCompleteColumn(),
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_interactive,
        )

    def __enter__(self) -> Runs:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, label: str, total: int) -> Callable[..., None]:
        """A new run of so many parts; the function returned is told when one is done, and how things stand.

        A run that ends before its time says so with its last part: ``advance(state, last=True)``.
        """
        task = self._bars.add_task(f"{label:<25}", total=total, state="")
        done = 0

        def advance(state: str = "", *, last: bool = False) -> None:
            nonlocal done
            done += 1
            self._bars.update(task, advance=1, state=state)
            if last:
                self._bars.stop_task(task)
            if (last or done == total) and not self.console.is_interactive:
                print(f"{label}: {state}", flush=True)

        return advance


def images(folder: Path | None, *, toy: bool) -> Images:
    """Fashion-MNIST, from this folder (the option ``--data``) or from where Debian's package puts it.

    A toy run that does not find that takes scikit-learn's digits, 8 x 8, and says so; any other ends in one line that
    tells where to get the images.
    """
    try:
        if folder is None and toy and not FASHION.is_dir():
            print("Fashion-MNIST is not here: this toy run takes the 8 x 8 digits of scikit-learn instead")
            return digits()
        return fashion(None if folder is None else str(folder))
    except MissingDataError as missing:
        raise SystemExit(f"{missing} (Fashion-MNIST is from github.com/zalandoresearch/fashion-mnist)") from None


def show(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str | None = None) -> None:
    """Print a table: names on the left, figures on the right."""
    table = Table(caption=caption)
    for column, title in enumerate(head):
        table.add_column(title, no_wrap=column == 0, justify="right" if column else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def panels(count: int, *, rows: int = 1, width: float = 5.5, height: float = 4.8) -> tuple[Figure, list[Axes]]:
    """A figure with so many plots side by side, in so many rows; the plots are listed row by row."""
    size = (width * count, height * rows)
    figure, axes = plt.subplots(rows, count, figsize=size, layout="constrained", squeeze=False)
    for plot in axes.flat:
        plot.grid(color="0.9")
        plot.set_axisbelow(True)
        plot.spines[["top", "right"]].set_visible(False)
    return figure, list(axes.flat)


def save(figure: Figure, path: Path) -> None:
    """Write the figure, and say where it is."""
    figure.savefig(path, dpi=130)
    plt.close(figure)
    print(f"plot: {path}")


def figure_of(values: Sequence[float], digits: int = 3) -> str:
    """The mean over the seeds, and the standard deviation among them where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def largest(values: Sequence[float]) -> float:
    """Of some values; unlike max(), NaN if one is."""
    return torch.tensor(values).max().item()


def same_bits(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same parameters, to the last bit."""
    return all(map(torch.equal, one.parameters(), other.parameters()))


def moving_average(values: Sequence[float], width: int) -> tuple[list[float], list[float]]:
    """Steps and means of ``width`` neighbouring values, each at the middle of its window."""
    width = min(width, len(values))
    means = torch.tensor(values, dtype=torch.float64).unfold(0, width, 1).mean(-1)
    steps = torch.arange(len(means)) + (width + 1) / 2
    return steps.tolist(), means.tolist()
