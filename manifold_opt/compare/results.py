"""What a comparison has found: rows as they are measured, and one summary a scheme, which table and page show."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ORTHOGONAL = 1e-3  # up to here weights count as kept: rounding is 1e-5 and less, what leaves is 0.1 and more


@dataclass
class Curve:
    """What a run looked like on its way, at a few hundred of its steps.

    Attributes:
        step: how many steps had been made.
        loss: mean of the losses since the point before.
        seconds: that the run itself had taken by then, others' turns left out.
        error: distance from orthogonality, the largest of a block since the point before.
    """

    step: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)


@dataclass
class Row:
    """One run: one scheme on one task, from one seed, at one learning rate.

    Attributes:
        task: what has been run, with the four below.
        scheme: by name.
        seed: of the start, and of the batches.
        lr: learning rate.
        steps: of training.
        peer: whether the scheme is somebody else's.
        final_loss: mean loss of the last tenth of the steps; None if it failed.
        final: the task's own measure at the end; None if it failed.
        orthogonality_error: the largest ||I - W W^T||_F of a block at any step; None if it failed.
        step_ms: median of a whole training step, forward and backward included.
        optimizer_ms: median of what the optimizer alone takes of it.
        steps_to_target: steps until the loss was at the task's target; None if never, or if there is none.
        seconds_to_target: what they took.
        clamped: how often the step of a block was shortened.
        skipped: how often it was not made.
        failure: why there is no more, one line; None if all went well.
        curve: of the run.
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
    optimizer_ms: float | None = None
    steps_to_target: int | None = None
    seconds_to_target: float | None = None
    clamped: float = 0.0
    skipped: float = 0.0
    failure: str | None = None
    curve: Curve = field(default_factory=Curve)

    @property
    def key(self) -> tuple[str, str, int, float]:
        """What tells it from other rows."""
        return self.task, self.scheme, self.seed, self.lr


@dataclass
class Cost:
    """What a step of one scheme costs, forward and backward of an inner product included, for so many matrices.

    Attributes:
        scheme: as in :class:`Row`.
        count: so many matrices.
        p: rows of each.
        n: columns of each.
        varied: ``"n"`` or ``"count"``: which of them the curve is drawn against.
        milliseconds: median of a step; None if it failed.
        orthogonality_error: the largest of a matrix after the first ten steps.
        peer: as in :class:`Row`.
    """

    scheme: str
    varied: str
    count: int
    p: int
    n: int
    milliseconds: float | None = None
    orthogonality_error: float | None = None
    failure: str | None = None
    peer: bool = False


@dataclass
class About:
    """What a task is.

    Attributes:
        name: in a word.
        title: in a line.
        measure: what ``Row.final`` is: ``"gap"``, ``"accuracy"`` or ``"loss"``.
        target: loss at which a run counts as having learned; None if there is no such level.
        notes: of each scheme what was corrected so that its steps are as long as those of the others, and the like.
        resolution: difference of the measure below which there is nothing but rounding.
    """

    name: str
    title: str
    measure: str = "loss"
    target: float | None = None
    notes: dict[str, str] = field(default_factory=dict)
    resolution: float = 0.0

    @property
    def higher_is_better(self) -> bool:
        """Whether more of the measure is better."""
        return self.measure == "accuracy"


@dataclass
class Summary:
    """One scheme on one task: over its seeds, at the learning rate that ended best.

    Attributes:
        mean: of ``Row.final`` over the seeds.
        spread: their standard deviation, zero for one seed.
        seconds_to_target: median over the seeds that reached the target.
        reached: how many did.
        step_ms: median over the seeds.
        optimizer_ms: median over the seeds.
        ratio: ``step_ms`` over that of the fastest scheme of the task.
        orthogonality_error: the largest of all seeds.
        different: how many different ends the seeds had; one says that they were no repetitions.
        clamped: sum over the seeds.
        skipped: sum over the seeds.
        failure: of the first run that failed.
        best: names of the columns of times and errors in which it is the best of those that finished and stayed
            orthogonal. (Which final measure is best may be undecided.)
    """

    task: str
    scheme: str
    peer: bool
    lr: float
    seeds: int
    mean: float | None
    spread: float | None
    seconds_to_target: float | None
    reached: int
    step_ms: float | None
    optimizer_ms: float | None
    ratio: float | None
    orthogonality_error: float | None
    clamped: float
    skipped: float
    failure: str | None
    different: int = 0
    best: set[str] = field(default_factory=set)

    @property
    def finished(self) -> bool:
        """Whether no seed failed, and the final measure is finite."""
        return self.failure is None and self.mean is not None and math.isfinite(self.mean)

    @property
    def stayed_orthogonal(self) -> bool:
        """Whether the weights were orthogonal after every step."""
        return self.orthogonality_error is not None and self.orthogonality_error <= ORTHOGONAL


@dataclass
class Results:
    """All that a comparison has found.

    Attributes:
        environment: versions, machine, threads.
        arguments: what was asked for.
        tasks: what the tasks are, by name.
        rows: one a run.
        costs: one a point of the cost curves.
        interrupted: whether something that was asked for is missing.
    """

    environment: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    tasks: dict[str, About] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    costs: list[Cost] = field(default_factory=list)
    interrupted: bool = False

    def save(self, path: Path) -> None:
        """Write all of it as JSON, whole or not at all."""
        partial = path.with_suffix(".part")
        partial.write_text(json.dumps(asdict(self), indent=1, allow_nan=True))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path) -> Results:
        """What :meth:`save` has written."""
        data = json.loads(path.read_text())
        data["tasks"] = {name: About(**about) for name, about in data["tasks"].items()}
        data["rows"] = [Row(**{**row, "curve": Curve(**row["curve"])}) for row in data["rows"]]
        data["costs"] = [Cost(**cost) for cost in data["costs"]]
        return cls(**data)

    def rates(self, task: str) -> list[float]:
        """The learning rates that a task was run at."""
        return sorted({row.lr for row in self.rows if row.task == task})

    def schemes(self, task: str | None = None) -> list[str]:
        """The schemes, of one task or of all, in the order in which they were asked for."""
        rows = [row.scheme for row in self.rows if task in (None, row.task)]
        return list(dict.fromkeys(rows + ([cost.scheme for cost in self.costs] if task is None else [])))

    def summaries(self, task: str) -> list[Summary]:
        """One line a scheme, in the order in which they were asked for; the best of every column named."""
        lines = [self._summary(task, scheme) for scheme in self.schemes(task)]
        fastest = min((line.step_ms for line in lines if line.step_ms is not None), default=None)
        for line in lines:
            if line.step_ms is not None and fastest is not None:
                line.ratio = line.step_ms / fastest
        for column in ("seconds_to_target", "step_ms", "optimizer_ms", "orthogonality_error"):
            _mark_best(lines, column, lambda line, column=column: getattr(line, column))
        return lines

    def _summary(self, task: str, scheme: str) -> Summary:
        rows = [row for row in self.rows if (row.task, row.scheme) == (task, scheme)]
        lr = min(sorted({row.lr for row in rows}), key=lambda lr: self._badness(task, [r for r in rows if r.lr == lr]))
        rows = [row for row in rows if row.lr == lr]
        finals = [row.final for row in rows if row.final is not None]
        reached = [row.seconds_to_target for row in rows if row.seconds_to_target is not None]
        return Summary(
            task=task,
            scheme=scheme,
            peer=rows[0].peer,
            lr=lr,
            seeds=len(rows),
            different=len(set(finals)),
            mean=statistics.fmean(finals) if finals else None,
            spread=_spread(finals),
            seconds_to_target=statistics.median(reached) if reached else None,
            reached=len(reached),
            step_ms=_median(row.step_ms for row in rows),
            optimizer_ms=_median(row.optimizer_ms for row in rows),
            ratio=None,
            orthogonality_error=max((e for row in rows if (e := row.orthogonality_error) is not None), default=None),
            clamped=sum(row.clamped for row in rows),
            skipped=sum(row.skipped for row in rows),
            failure=next((row.failure for row in rows if row.failure), None),
        )

    def _badness(self, task: str, rows: list[Row]) -> float:
        """What the best learning rate has least of: the mean of the final measure; a failure is worst."""
        finals = [row.final for row in rows]
        if any(final is None or not math.isfinite(final) for final in finals):
            return math.inf
        mean = statistics.fmean(final for final in finals if final is not None)
        return -mean if self.tasks[task].higher_is_better else mean


def leaders(lines: Iterable[Summary], about: About) -> list[Summary]:
    """Return the scheme with the best final measure, then those that do not differ from it; best first."""
    sign = -1 if about.higher_is_better else 1
    ranked = sorted((line for line in lines if line.finished), key=lambda line: sign * (line.mean or 0.0))
    return ranked[:1] + [line for line in ranked[1:] if not _differ(ranked[0], line, about)]


def winners(lines: Iterable[Summary], about: About) -> list[Summary]:
    """Return the leaders of the schemes that stayed orthogonal; none if there are too few seeds to rank them."""
    first = leaders((line for line in lines if line.stayed_orthogonal), about)
    return first if enough_seeds(first) else []


def enough_seeds(first: list[Summary]) -> bool:
    """Whether leaders are ranked: there is one, or each has a spread, of seeds with different results."""
    return len(first) == 1 or (bool(first) and min(line.different for line in first) > 1)


def _differ(one: Summary, other: Summary, about: About) -> bool:
    """Whether mean ± spread do not overlap, by more than rounding. One seed has no spread to judge by."""
    if min(one.different, other.different) < 2 or one.mean is None or other.mean is None:
        return False
    return abs(one.mean - other.mean) > max((one.spread or 0.0) + (other.spread or 0.0), about.resolution)


def in_one_line(error: Exception) -> str:
    """What a row says of what went wrong."""
    return " ".join(f"{type(error).__name__}: {error}".split())


def _spread(values: list[float]) -> float | None:
    """Standard deviation, which those that are not finite have none of."""
    if not all(map(math.isfinite, values)):
        return math.nan
    return statistics.pstdev(values) if values else None


def _median(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.median(known) if known else None


def _mark_best(lines: list[Summary], column: str, value: Any) -> None:
    """Name the best of a column, of the schemes that finished and stayed orthogonal."""
    kept = [line for line in lines if line.finished and line.stayed_orthogonal]
    known = [v for line in kept if (v := value(line)) is not None and math.isfinite(v)]
    for line in kept:
        if known and value(line) == min(known):
            line.best.add(column)
