"""Comparison from Python, on the user's model."""

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

from .blocks import marked_parameters
from .experiment import Experiment, NoProgress, Progress, environment
from .methods import Settings, schemes_of
from .results import Results, RunResult, Summary
from .runner import run_specs
from .tasks import Task

Batch = Any


class Comparison:
    """Result of a comparison, as rows, tables, figures or an HTML page.

    Attributes:
        results: the results of all runs.
    """

    def __init__(self, results: Results) -> None:
        self.results = results

    @property
    def rows(self) -> list[RunResult]:
        """Return one result per run, with its scheme, seed, losses, errors, times and curve."""
        return self.results.rows

    @property
    def summaries(self) -> list[Summary]:
        """Return one summary per scheme, over its seeds, at the learning rate with the best final measure."""
        return [line for task in self.results.tasks for line in self.results.summaries(task)]

    def table(self) -> None:
        """Print advice and a table with one line per scheme, the default first."""
        from rich.console import Console

        Console().print(self)

    def plot(self, path: str | Path) -> None:
        """Draw the loss of the first task against steps; the suffix selects PNG, SVG or PDF."""
        from .plots import figures

        drawn = figures(self.results)
        if not drawn:
            raise ValueError("plot: there is nothing to draw; every run has failed.")
        drawn[next(iter(drawn))].savefig(path, dpi=150, facecolor="white")

    def plots(self, folder: str | Path) -> list[Path]:
        """Write every figure as PNG into a folder, and return the paths."""
        from .plots import save

        return save(self.results, Path(folder))

    def to_html(self, path: str | Path) -> None:
        """Write everything as one HTML page that works offline."""
        from .html_report import html

        Path(path).write_text(html(self.results), encoding="utf-8")

    def save(self, path: str | Path) -> None:
        """Write the results as JSON."""
        self.results.save(Path(path))

    def __rich__(self) -> Any:
        from rich.console import Group

        from .console import tables

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


OPTIMIZERS = ("adam", "sgd", *["muon"] * hasattr(torch.optim, "Muon"))  # Muon since torch 2.9


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
    r"""Train a model with several schemes, all from the same start and on the same batches.

    Every run has its own copy of torch's random state: dropout and shuffling are the same for all schemes of a seed,
    and in every call. The runs alternate in slices of a tenth of a second. Before a run, a copy of the model makes
    a warm-up step that is neither timed nor counted. For steady times call ``torch.set_num_threads(1)`` first.

    Args:
        make_model: returns a model with marked parameters. Called after ``torch.manual_seed(seed)`` for every seed and
            learning rate, and once before.
        loss_fn: ``loss_fn(model, batch)`` returns a scalar to call ``backward()`` on.
        batches: a list, a DataLoader, or a function that returns either; repeated as often as needed. An iterator is
            read once, up to ``steps`` batches. A loader has to shuffle with torch's global random state, not with its
            own generator. (The random states of numpy and random are shared by all runs.)
        schemes: names in :data:`~manifold_opt.RETRACTIONS` and of peers: geoopt, pogo, torch, geotorch (which have to
            be installed), penalty and unconstrained. At least one, without duplicates. For Muon: spectral, penalty and
            unconstrained, which is torch.optim.Muon.
        optimizer: ``"adam"``, ``"sgd"`` without momentum, or ``"muon"``, with Adam for parameters that are not marked.
        lr: learning rate, above 0. If several are given, the summary of a scheme uses its best one.
        orthogonal_lr_scale: learning rate of marked parameters as a multiple of ``lr``, at least 0.
        metric: ``"euclidean"`` or, not for Muon, ``"canonical"``.
        second_moment: of this package's Adam, ``"element"`` or ``"block"``.
        penalty: weight of :math:`\|I - W W^\top\|_F^2` for the scheme ``"penalty"``, at least 0.
        steps: training steps per run, at least 1.
        seeds: number of seeds, or a list of them.
        evaluate: returns the final measure of a model. Defaults to the mean loss over the last tenth of the steps.
        measure: kind of the final measure: ``"loss"``, ``"gap"``, or ``"accuracy"``, which is maximized.
        target: a run counts as having learned when the mean loss of its last 20 steps reaches this value.
        device: device for training; batches are moved to it.
        progress: progress callbacks.

    Returns:
        The comparison. A run that fails has its error in ``failure``. Ctrl-C stops early; finished runs are included
        and ``results.interrupted`` is set.

    Raises:
        ValueError: a name is unknown, a value is out of range or has no effect with the optimizer, or the model has no
            marked parameters.

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
    validate(schemes, optimizer, metric, second_moment, rates, steps, numbers, measure)
    for name, value in (("penalty", penalty), ("orthogonal_lr_scale", orthogonal_lr_scale)):
        if not 0 <= value < math.inf:
            raise ValueError(f"compare: {name} must be finite and at least 0, got {value}.")
    with torch.random.fork_rng():
        marked = marked_parameters(make_model())
    if not marked:
        raise ValueError(
            "compare: make_model() returned a model without marked parameters; mark them with mark_orthogonal or "
            "mark_recurrent before it is returned."
        )
    task = Task(
        "model", "your model", make_model, _cycle(batches, steps), loss_fn,
        evaluate=evaluate, measure=measure, target=target, steps=steps,
    )  # fmt: skip
    settings = Settings(optimizer, rates[0], orthogonal_lr_scale, metric, second_moment, penalty)
    device = resolve_device(device)
    experiment = Experiment(
        run_specs([task], numbers, lambda _: rates, settings, schemes, steps, device), device=device
    )
    arguments = {**vars(replace(settings)), "lr": rates, "steps": steps, "seeds": numbers, "schemes": list(schemes)}
    results = Results(environment(device), arguments)
    experiment.dtype = torch.get_default_dtype()
    experiment.run(results, progress or NoProgress())
    return Comparison(results)


def validate(
    schemes: Sequence[str],
    optimizer: str,
    metric: str,
    second_moment: str,
    rates: Sequence[float],
    steps: int | None,
    seeds: Sequence[int],
    measure: str = "loss",
) -> None:
    """Raise a ValueError that names the valid choices if an argument is out of range or has no effect."""
    for name, value, choices in (
        ("optimizer", optimizer, OPTIMIZERS),
        *(("scheme", scheme, schemes_of(optimizer)) for scheme in schemes),
        ("metric", metric, ("euclidean", "canonical")),
        ("second_moment", second_moment, ("element", "block")),
        ("measure", measure, ("loss", "gap", "accuracy")),
    ):
        if value not in choices:
            raise ValueError(f"compare: {name} must be one of {', '.join(choices)}, got {value!r}.")
    for name, value, default, users in (
        ("metric", metric, "euclidean", ("adam", "sgd")),
        ("second_moment", second_moment, "element", ("adam",)),
    ):
        if value != default and optimizer not in users:
            raise ValueError(
                f"compare: {name}={value!r} has no effect with the optimizer {optimizer}; leave it out, or use "
                f"{' or '.join(users)}."
            )
    for name, values in (("learning rate", rates), ("seed", seeds)):
        if len(set(values)) < len(values):
            raise ValueError(f"compare: every {name} once, got {list(values)}.")
    if not isinstance(steps, (int, type(None))) or not all(isinstance(seed, int) for seed in seeds):
        raise ValueError(f"compare: steps and seeds must be whole numbers, got {steps} and {list(seeds)}.")
    if not schemes or len(set(schemes)) < len(schemes):
        raise ValueError(f"compare: needs at least one scheme, and none twice, got {', '.join(schemes) or 'none'}.")
    if not rates or not all(0 < rate < math.inf for rate in rates):
        raise ValueError(f"compare: learning rates must be finite and above 0, got {list(rates)}.")
    if not seeds or (steps is not None and steps < 1):
        raise ValueError(f"compare: steps and seeds must be at least 1, got {steps} and {len(seeds)}.")


def resolve_device(device: str | torch.device) -> torch.device:
    """Return the device; raise a ValueError if it cannot be used."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"compare: device {device} cannot be used: {reason}; cpu always can.") from None
    return found


def _cycle(batches: Iterable[Batch] | Callable[[], Iterable[Batch]], steps: int) -> Callable[[], Iterator[Batch]]:
    """Return a function that returns a new, endless iterator over the batches."""
    given = batches
    for source in (
        given,
        getattr(given, "sampler", None),
        getattr(getattr(given, "batch_sampler", None), "sampler", None),
    ):
        if getattr(source, "generator", None) is not None:
            raise ValueError(
                "compare: the loader has a random generator of its own, from which the schemes would draw in turns. "
                "Leave it out: every seed shuffles by torch's own random state, alike for all schemes."
            )
    if not callable(given) and iter(given) is given:
        given = list(itertools.islice(given, steps))  # an iterator can be read only once

    def cycle() -> Iterator[Batch]:
        while True:
            empty = True
            for batch in given() if callable(given) else given:
                empty = False
                yield batch
            if empty:
                raise ValueError("batches is empty; give a list, a DataLoader, or a function that returns one.")

    return cycle
