"""Results of a comparison: one result per run, and summaries per scheme."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ORTHOGONAL = 1e-3  # largest error of orthogonal weights; rounding is below 1e-5, divergence above 0.1


@dataclass
class Curve:
    """Training curve of a run at up to a few hundred steps.

    Attributes:
        step: number of steps so far.
        loss: mean loss since the previous point.
        seconds: training time of this run so far.
        error: largest distance of a block from orthogonality since the previous point.
    """

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


@dataclass
class RunResult:
    """Result of one run: one scheme on one task, with one seed and learning rate.

    Attributes:
        task: name of the task.
        scheme: name of the scheme.
        seed: seed of model and batches.
        lr: learning rate.
        steps: number of training steps.
        peer: True for a scheme of another library.
        final_loss: mean loss of the last tenth of the steps; None if the run failed.
        final: final measure of the task; None if the run failed.
        orthogonality_error: the largest ||I - W W^T||_F of a block at any step; None if the run failed.
        step_ms: median time of a training step, forward and backward pass included.
        step_quartiles: first and third quartile of these times.
        optimizer_ms: median time of ``optimizer.step()``.
        steps_to_target: steps until the loss reached the target of the task; None if never.
        seconds_to_target: training time of these steps.
        clamped: how often the step of a block was shortened.
        skipped: how often the step of a block was skipped.
        failure: error message in one line; None if the run succeeded.
        curve: training curve.
    """

    task: str
    scheme: str
    seed: int
    lr: float
    steps: int
    peer: bool = False
    final_loss: float | None = None
    final: float | None = None
    orthogonality_error: float | None = None
    step_ms: float | None = None
    step_quartiles: list[float] | None = None
    optimizer_ms: float | None = None
    steps_to_target: int | None = None
    seconds_to_target: float | None = None
    clamped: float = 0.0
    skipped: float = 0.0
    failure: str | None = None
    curve: Curve = field(default_factory=Curve)

    @property
    def key(self) -> tuple[str, str, int, float]:
        """Return task, scheme, seed and learning rate, which identify the run."""
        return self.task, self.scheme, self.seed, self.lr


@dataclass
class Cost:
    """Cost of a step of one scheme, with forward and backward pass of an inner product.

    Attributes:
        scheme: name of the scheme.
        count: number of matrices.
        p: rows of each matrix.
        n: columns of each matrix.
        milliseconds: median time of a step; None if it failed.
        quartiles: first and third quartile of the times.
        orthogonality_error: largest error of a matrix after the first ten steps.
        failure: error message in one line; None if there is none.
        peer: True for a scheme of another library.
    """

    scheme: str
    count: int
    p: int
    n: int
    milliseconds: float | None = None
    quartiles: list[float] | None = None
    orthogonality_error: float | None = None
    failure: str | None = None
    peer: bool = False


@dataclass
class TaskInfo:
    """Description of a task.

    Attributes:
        name: identifier.
        title: description in one line.
        measure: kind of ``RunResult.final``: ``"gap"``, ``"accuracy"`` or ``"loss"``.
        target: loss at which a run counts as having learned; None if there is none.
        notes: corrections of each scheme, such as factors of the learning rate.
        optimum: smallest possible loss; None if it is not known.
        resolution: differences of the measure below this value are rounding, or within the standard error of the
            test set.
    """

    name: str
    title: str
    measure: str = "loss"
    target: float | None = None
    notes: dict[str, str] = field(default_factory=dict)
    optimum: float | None = None
    resolution: float = 0.0

    @property
    def higher_is_better(self) -> bool:
        """Return True if a larger measure is better."""
        return self.measure == "accuracy"


@dataclass
class Summary:
    """Summary of one scheme on one task, over its seeds, at the learning rate with the best final measure.

    Attributes:
        mean: mean of ``RunResult.final`` over the seeds.
        std: standard deviation over the seeds, zero for one seed.
        seconds_to_target: median over the seeds that reached the target.
        reached: number of seeds that reached the target.
        step_ms: median over the seeds.
        step_quartiles: first and third quartile, each the median over the seeds.
        optimizer_ms: median over the seeds.
        orthogonality_error: the largest over the seeds.
        distinct: number of runs with different final measures or losses; 1 means that the seeds vary nothing.
        clamped: sum over the seeds.
        skipped: sum over the seeds.
        failure: error of the first run that failed.
    """

    task: str
    scheme: str
    peer: bool
    lr: float
    seeds: int
    mean: float | None
    std: float | None
    seconds_to_target: float | None
    reached: int
    step_ms: float | None
    step_quartiles: list[float] | None
    optimizer_ms: float | None
    orthogonality_error: float | None
    clamped: float
    skipped: float
    failure: str | None
    distinct: int = 0

    @property
    def finished(self) -> bool:
        """Return True if no seed failed and the final measure is finite."""
        return self.failure is None and self.mean is not None and math.isfinite(self.mean)

    @property
    def stayed_orthogonal(self) -> bool:
        """Return True if the weights were orthogonal after every step."""
        return self.orthogonality_error is not None and self.orthogonality_error <= ORTHOGONAL


@dataclass
class Results:
    """All results of a comparison.

    Attributes:
        environment: versions, machine and number of threads.
        arguments: arguments of the comparison.
        tasks: descriptions of the tasks, by name.
        rows: one result per run.
        costs: one per scheme and point of the cost curves.
        interrupted: True if requested runs are missing.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, TaskInfo] = field(default_factory=dict)
    rows: list[RunResult] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    interrupted: bool = False

    def save(self, path: Path) -> None:
        """Write the results as JSON, atomically."""
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=True))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read results written by :meth:`save`."""
        data = json.loads(path.read_text())
        data["tasks"] = {name: TaskInfo(**info) for name, info in data["tasks"].items()}
        data["rows"] = [RunResult(**{**row, "curve": Curve(**row["curve"])}) for row in data["rows"]]
        data["costs"] = [Cost(**cost) for cost in data["costs"]]
        return cls(**data)

    def rates(self, task: str) -> list[float]:
        """Return the learning rates of a task, sorted."""
        return sorted({row.lr for row in self.rows if row.task == task})

    def schemes(self, task: str | None = None) -> list[str]:
        """Return the schemes of one task, or of all, in the requested order."""
        rows = [row.scheme for row in self.rows if task in (None, row.task)]
        return list(dict.fromkeys(rows + ([cost.scheme for cost in self.costs] if task is None else [])))

    def summaries(self, task: str) -> list[Summary]:
        """Return one summary per scheme, in the requested order."""
        return [self._summary(task, scheme) for scheme in self.schemes(task)]

    def _summary(self, task: str, scheme: str) -> Summary:
        rows = [row for row in self.rows if (row.task, row.scheme) == (task, scheme)]
        lr = min(sorted({row.lr for row in rows}), key=lambda lr: self._sort_key(task, [r for r in rows if r.lr == lr]))
        rows = [row for row in rows if row.lr == lr]
        finals = [row.final for row in rows if row.final is not None]
        quartiles = [row.step_quartiles for row in rows if row.step_quartiles is not None]
        reached = [row.seconds_to_target for row in rows if row.seconds_to_target is not None]
        return Summary(
            task=task,
            scheme=scheme,
            peer=rows[0].peer,
            lr=lr,
            seeds=len(rows),
            distinct=len({(row.final, row.final_loss) for row in rows}),
            mean=statistics.fmean(finals) if finals else None,
            std=_std(finals),
            seconds_to_target=statistics.median(reached) if reached else None,
            reached=len(reached),
            step_ms=_median(row.step_ms for row in rows),
            step_quartiles=[_median(one) or 0.0 for one in zip(*quartiles, strict=True)] if quartiles else None,
            optimizer_ms=_median(row.optimizer_ms for row in rows),
            orthogonality_error=max((e for row in rows if (e := row.orthogonality_error) is not None), default=None),
            clamped=sum(row.clamped for row in rows),
            skipped=sum(row.skipped for row in rows),
            failure=next((row.failure for row in rows if row.failure), None),
        )

    def _sort_key(self, task: str, rows: list[RunResult]) -> float:
        """Return the mean final measure, negated if larger is better, as a sort key; infinity for failed runs."""
        finals = [row.final for row in rows]
        if any(final is None or not math.isfinite(final) for final in finals):
            return math.inf
        mean = statistics.fmean(final for final in finals if final is not None)
        return -mean if self.tasks[task].higher_is_better else mean


def compare_finals(one: Summary, other: Summary, info: TaskInfo) -> int:
    """Return 1 if the final measure of ``one`` is better than that of ``other``, -1 if it is worse, otherwise 0.

    The intervals mean ± std have to be disjoint, by more than rounding. The result is 0 if a scheme has a single seed.
    """
    if min(one.distinct, other.distinct) < 2 or one.mean is None or other.mean is None:
        return 0
    if abs(one.mean - other.mean) <= max((one.std or 0.0) + (other.std or 0.0), info.resolution):
        return 0
    return 1 if (one.mean > other.mean) == info.higher_is_better else -1


def quartiles(values: list[float]) -> list[float]:
    """Return the first and the third quartile."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return [first, third]


def format_error(error: Exception) -> str:
    """Return type and message of an error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _std(values: list[float]) -> float | None:
    """Return the standard deviation, NaN if a value is not finite."""
    if not all(map(math.isfinite, values)):
        return math.nan
    if len(values) < 2:
        return 0.0 if values else None
    return statistics.stdev(values)


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None
