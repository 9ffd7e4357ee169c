"""The comparison from Python, on one's own model."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import RETRACTIONS
from .contenders import PEERS, Settings, places
from .results import Results, Row, Summary
from .runner import units
from .session import Progress, Session, Silent, environment
from .tasks import Task

Batch = Any


class Comparison:
    """What has been found: as rows, as a table, as pictures, as a page.

    Attributes:
        results: all of it.
    """

    def __init__(self, results: Results) -> None:
        self.results = results

    @property
    def rows(self) -> list[Row]:
        """One row a run, with its scheme, seed, losses, errors, times and curve."""
        return self.results.rows

    @property
    def summaries(self) -> list[Summary]:
        """One line a scheme, over its seeds, at the learning rate that ended best."""
        return [line for task in self.results.tasks for line in self.results.summaries(task)]

    def table(self) -> None:
        """Print one line a scheme."""
        from rich.console import Console

        Console().print(self)

    def plot(self, path: str | Path) -> None:
        """Draw losses against steps and against seconds, as PNG, SVG or PDF by the name's ending."""
        from .plots import figures

        drawn = figures(self.results)
        if not drawn:
            raise ValueError("plot: there is nothing to draw; every run has failed.")
        drawn[next(iter(drawn))].savefig(path, dpi=150, facecolor="white")

    def plots(self, folder: str | Path) -> list[Path]:
        """Write every figure into a folder, as PNG."""
        from .plots import save

        return save(self.results, Path(folder))

    def to_html(self, path: str | Path) -> None:
        """Write everything as one page that opens offline."""
        from .page import html

        Path(path).write_text(html(self.results), encoding="utf-8")

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        self.results.save(Path(path))

    def __rich__(self) -> Any:
        from rich.console import Group

        from .table import tables

        return Group(*tables(self.results))

    def _repr_html_(self) -> str:
        from rich.console import Console

        console = Console(record=True, width=120, file=io.StringIO(), force_jupyter=False)
        console.print(self)
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def __repr__(self) -> str:
        failed = sum(row.failure is not None for row in self.rows)
        interrupted = ", interrupted" * self.results.interrupted
        return f"Comparison({len(self.rows)} runs of {', '.join(self.results.schemes())}; {failed} failed{interrupted})"


def compare(
    make_model: Callable[[], nn.Module],
    loss_fn: Callable[[nn.Module, Batch], Tensor],
    batches: Iterable[Batch] | Callable[[], Iterable[Batch]],
    *,
    schemes: Sequence[str] = ("orthographic", "polar", "cayley", "qr"),
    optimizer: str = "adam",
    lr: float | Sequence[float] = 1e-3,
    orthogonal_lr_scale: float = 1.0,
    metric: str = "euclidean",
    second_moment: str = "element",
    penalty: float = 0.1,
    steps: int = 500,
    seeds: int | Sequence[int] = 3,
    evaluate: Callable[[nn.Module], float] | None = None,
    measure: str = "loss",
    target: float | None = None,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
) -> Comparison:
    r"""Train one model with several schemes, each from the same start on the same batches, side by side.

    Every run has torch's random state for itself: dropout and shuffling are the same for all schemes of a seed, and the
    same again in another call. The schemes take turns, a tenth of a second each.

    Args:
        make_model: returns a model with marked parameters. Called after ``torch.manual_seed(seed)``, for every seed and
            learning rate, and once before.
        loss_fn: ``loss_fn(model, batch)``, a scalar to call ``backward()`` on.
        batches: a list, a DataLoader, or a function that returns either; gone through as often as is needed. An
            iterator is read once, as far as ``steps``. A loader that shuffles must do so by torch's random state, not
            by a generator of its own. (States of numpy and random are not kept apart.) Before a run, a copy of the
            model makes one step, which sets up what later ones use, and is neither timed nor counted.
        schemes: names in :data:`~manifold_opt.RETRACTIONS`, and of peers: geoopt, pogo, torch, geotorch (which have to
            be installed), penalty and unconstrained. At least one, none twice.
        optimizer: ``"adam"``, or ``"sgd"`` without momentum.
        lr: learning rate, above 0; several are all tried, and a scheme is judged by the one that ends best.
        orthogonal_lr_scale: learning rate of marked parameters as a multiple of it, at least 0.
        metric: ``"euclidean"`` or ``"canonical"``.
        second_moment: of this package's Adam, ``"element"`` or ``"block"``.
        penalty: weight of :math:`\|I - W W^\top\|_F^2` in the scheme of that name, at least 0.
        steps: training steps of every run, at least 1.
        seeds: how many, or which.
        evaluate: the final measure of a trained model; its mean loss over the last tenth of the steps unless given.
        measure: what that is: ``"loss"``, ``"gap"``, or ``"accuracy"``, of which more is better.
        target: loss at which a run counts as having learned: the mean of its last 20 steps.
        device: where to train; batches are moved there.
        progress: who is told how it goes.

    Returns:
        What has been found. A scheme that fails is a row that says so; Ctrl-C ends it early, with what was finished and
        ``results.interrupted`` set.

    Raises:
        ValueError: an unknown name, a value out of range, or a model without marked parameters.

    >>> import torch
    >>> from manifold_opt import mark_orthogonal
    >>> from manifold_opt.compare import compare
    >>> def make_model():
    ...     layer = torch.nn.Linear(4, 4)
    ...     mark_orthogonal(layer, "weight")
    ...     return layer
    >>> def loss(model, x):
    ...     return (model(x) - x.roll(1, dims=-1)).square().mean()
    >>> batches = list(torch.randn(10, 8, 4))
    >>> result = compare(make_model, loss, batches, schemes=("polar", "qr"), lr=0.1, steps=50, seeds=1)
    >>> [(row.scheme, row.final_loss < 0.1, row.orthogonality_error < 1e-5) for row in result.rows]
    [('polar', True, True), ('qr', True, True)]
    """
    schemes = (schemes,) if isinstance(schemes, str) else tuple(schemes)
    rates = [float(lr)] if isinstance(lr, (int, float)) else [float(rate) for rate in lr]
    numbers = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    check(schemes, optimizer, metric, second_moment, rates, steps, numbers, measure)
    for name, value in (("penalty", penalty), ("orthogonal_lr_scale", orthogonal_lr_scale)):
        if not 0 <= value < math.inf:
            raise ValueError(f"compare: {name} must be finite and at least 0, got {value}.")
    with torch.random.fork_rng():
        marked = places(make_model())
    if not marked:
        raise ValueError(
            "compare: make_model() returned a model without marked parameters; mark them with mark_orthogonal or "
            "mark_recurrent before it is returned."
        )
    task = Task(
        "model", "your model", make_model, _endless(batches, steps), loss_fn,
        evaluate=evaluate, measure=measure, target=target, steps=steps,
    )  # fmt: skip
    settings = Settings(optimizer, rates[0], orthogonal_lr_scale, metric, second_moment, penalty)
    where = usable(device)
    session = Session(units([task], numbers, lambda _: rates, settings, schemes, steps, where), device=where)
    arguments = {**vars(replace(settings)), "lr": rates, "steps": steps, "seeds": numbers, "schemes": list(schemes)}
    results = Results(environment(where), arguments)
    session.dtype = torch.get_default_dtype()
    session.carry_out(results, progress or Silent())
    return Comparison(results)


def check(
    schemes: Sequence[str],
    optimizer: str,
    metric: str,
    second_moment: str,
    rates: Sequence[float],
    steps: int | None,
    seeds: Sequence[int],
    measure: str = "loss",
) -> None:
    """Raise a ValueError that names the valid choices, unless all is in range."""
    for what, value, choices in (
        *(("scheme", scheme, (*RETRACTIONS, *PEERS)) for scheme in schemes),
        ("optimizer", optimizer, ("adam", "sgd")),
        ("metric", metric, ("euclidean", "canonical")),
        ("second_moment", second_moment, ("element", "block")),
        ("measure", measure, ("loss", "gap", "accuracy")),
    ):
        if value not in choices:
            raise ValueError(f"compare: {what} must be one of {', '.join(choices)}, got {value!r}.")
    for what, values in (("learning rate", rates), ("seed", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"compare: every {what} once, got {list(values)}.")
    if not isinstance(steps, (int, type(None))) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"compare: steps and seeds must be whole numbers, got {steps} and {list(seeds)}.")
    if not schemes or len(set(schemes)) < len(schemes):
        raise ValueError(f"compare: needs at least one scheme, and none twice, got {', '.join(schemes) or 'none'}.")
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"compare: learning rates must be finite and above 0, got {list(rates)}.")
    if not seeds or (steps is not None and steps < 1):
        raise ValueError(f"compare: steps and seeds must be at least 1, got {steps} and {len(seeds)}.")


def usable(device: str | torch.device) -> torch.device:
    """The device, if it can be used; a ValueError if not."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"compare: device {device} cannot be used: {reason}; cpu always can.") from None
    return found


def _endless(batches: Iterable[Batch] | Callable[[], Iterable[Batch]], steps: int) -> Callable[[], Iterator[Batch]]:
    """A function that starts the batches anew and goes through them without end."""
    given = batches
    for part in (
        given,
        getattr(given, "sampler", None),
        getattr(getattr(given, "batch_sampler", None), "sampler", None),
    ):
        if getattr(part, "generator", None) is not None:
            raise ValueError(
                "compare: the loader has a random generator of its own, from which the schemes would draw in turns. "
                "Leave it out: every seed shuffles by torch's own random state, alike for all schemes."
            )
    if not callable(given) and iter(given) is given:
        given = list(itertools.islice(given, steps))  # it can be read once only

    def endless() -> Iterator[Batch]:
        while True:
            empty = True
            for batch in given() if callable(given) else given:
                empty = False
                yield batch
            if empty:
                raise ValueError("batches is empty; give a list, a DataLoader, or a function that returns one.")

    return endless
