"""What the figures of a comparison show: a line per method, from the results."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .results import ORTHOGONAL, Results, RunResult

FLOAT32 = 2.0**-23
LARGEST_ERROR = 1e4  # where lines of errors are cut


@dataclass(frozen=True)
class Points:
    """Line of a method: horizontal and vertical values, NaN where there is none, and the range over the seeds."""

    x: list[float]
    y: list[float]
    low: list[float] | None = None
    high: list[float] | None = None


@dataclass(frozen=True)
class Chart:
    """A quantity against another one, for several methods.

    Attributes:
        note: remark for the reader of the figure.
        kept: vertical values that have to be in view; others may be cut off.
        ticks: values of a logarithmic horizontal axis; empty for a linear one.
        rounding: vertical value of a line for the rounding error; None for no line.
        log: True for a logarithmic vertical axis, None for one if the values span a decade.
    """

    title: str
    xlabel: str
    ylabel: str
    lines: dict[str, Points]
    kept: list[float]
    ticks: Sequence[float] = ()
    rounding: float | None = None
    log: bool | None = None
    note: str = ""


def charts(results: Results) -> dict[str, Chart]:
    """Return every chart by its name: loss, error and, for a sweep, learning rates of every task; and the cost."""
    found: dict[str, Chart] = {}
    for task in results.tasks:
        curves = _best_rows(results, task)
        if curves:
            found[f"{task}-loss"] = _loss(results, task, curves, "step")
            found[f"{task}-seconds"] = _loss(results, task, curves, "seconds")
            found[f"{task}-error"] = _error(curves)
        if len(results.rates(task)) > 1:
            found[f"{task}-rates"] = _rates(results, task, "final")
            found[f"{task}-rates-error"] = _rates(results, task, "orthogonality_error")
    sizes = {(c.count, c.n) for c in results.costs}
    small = min((n for _, n in sizes), default=0)
    for name, axis, fixed in (("cost", "n", "one matrix"), ("cost-count", "count", f"matrices of {small} x {small}")):
        some = [c for c in results.costs if (c.count == 1 if axis == "n" else c.n == small)]
        if len({getattr(c, axis) for c in some}) > 1:
            points = {s: [(getattr(c, axis), c.milliseconds) for c in some if c.scheme == s] for s in results.schemes()}
            lines = {s: _points(sorted(one)) for s, one in points.items() if one}
            xlabel = "rows and columns of the matrix" if axis == "n" else f"number of {fixed}"
            ticks = sorted({float(getattr(c, axis)) for c in some})
            title = f"Milliseconds per step against {'size' if axis == 'n' else 'number'}"
            found[name] = Chart(title, xlabel, "milliseconds", lines, [], ticks, log=True)
    return {name: chart for name, chart in found.items() if any(map(known, chart.lines.values()))}


def _best_rows(results: Results, task: str) -> dict[str, list[RunResult]]:
    """Return the runs of each scheme at its best learning rate that have a curve."""
    best = {line.scheme: line.lr for line in results.summaries(task)}
    rows = [row for row in results.rows if row.task == task and row.lr == best[row.scheme] and row.curve.step]
    return {scheme: [row for row in rows if row.scheme == scheme] for scheme in dict.fromkeys(r.scheme for r in rows)}


def _stayed_orthogonal(row: RunResult) -> bool:
    return row.orthogonality_error is not None and row.orthogonality_error <= ORTHOGONAL


def _along(rows: list[RunResult], what: str) -> list[tuple[int, list[float]]]:
    """Return the values of all seeds at the steps that every seed reached."""
    seen = [dict(zip(row.curve.step, getattr(row.curve, what), strict=False)) for row in rows]
    return [(step, [one[step] for one in seen]) for step in sorted(set.intersection(*(set(one) for one in seen)))]


def _loss(results: Results, task: str, curves: dict[str, list[RunResult]], against: str) -> Chart:
    """Return the loss, or where the smallest one is known the distance from it, no lower than its rounding."""
    info = results.tasks[task]
    gap = info.optimum is not None

    def height(loss: float) -> float:
        above = loss - (info.optimum or 0.0)
        return max(above, info.resolution) if gap and above > -info.resolution else math.nan if gap else loss

    lines, kept = {}, []
    for scheme, rows in curves.items():
        values = [_finite(map(height, point)) for _, point in _along(rows, "loss")]
        x = [statistics.fmean(point) for _, point in _along(rows, against)]
        bounds = ([min(one) for one in values], [max(one) for one in values]) if len(rows) > 1 else (None, None)
        lines[scheme] = Points(x, [statistics.fmean(one) for one in values], *bounds)
        if all(map(_stayed_orthogonal, rows)):
            kept += [y for _, y in known(lines[scheme])]
    unit, title = ("steps", "steps") if against == "step" else ("seconds of training", "time")
    title = f"{'Loss above the optimum' if gap else 'Training loss'} against {title}"
    cut = any(len(known(points)) < len(points.x) for points in lines.values())
    note = "A line ends where the loss falls below the smallest one that orthogonal weights can have." * (gap and cut)
    label, rounding = ("loss - optimum", info.resolution or None) if gap else ("loss", None)
    return Chart(title, unit, label, lines, kept, rounding=rounding, log=gap or None, note=note)


def _error(curves: dict[str, list[RunResult]]) -> Chart:
    lines = {
        scheme: _points([(step, min(max(_finite(point, positive=True)), LARGEST_ERROR)) for step, point in along])
        for scheme, rows in curves.items()
        for along in (_along(rows, "error"),)
    }
    title, label = "Distance from orthogonality", "largest ‖I - WWᵀ‖"
    return Chart(title, "steps", label, lines, [], rounding=FLOAT32, log=True)


def _rates(results: Results, task: str, what: str) -> Chart:
    """Return the error or the final measure against the learning rate; rates at which a run failed have no point."""
    rows = [row for row in results.rows if row.task == task]
    rates = results.rates(task)
    info, lines, kept = results.tasks[task], {}, []
    floor = info.resolution if what == "final" and info.measure == "gap" else -math.inf
    for scheme in results.schemes(task):
        points = []
        for lr in rates:
            some = [row for row in rows if (row.scheme, row.lr) == (scheme, lr)]
            good = bool(some) and not any(row.failure for row in some)
            values = _finite((getattr(row, what) for row in some), positive=what != "final") if good else [math.nan]
            points.append(
                (lr, max(floor, statistics.fmean(values)) if what == "final" else min(max(values), LARGEST_ERROR))
            )
            if good and all(map(_stayed_orthogonal, some)):
                kept.append(points[-1][1])
        lines[scheme] = _points(points)
    kept = [value for value in kept if not math.isnan(value)]
    if what != "final":
        title, label = "Largest distance from orthogonality", "largest ‖I - WWᵀ‖"
        return Chart(title, "learning rate", label, lines, [], rates, rounding=FLOAT32, log=True)
    rounding = info.resolution or None if info.measure == "gap" else None
    return Chart(f"Final {info.measure}", "learning rate", f"final {info.measure}", lines, kept, rates, rounding)


def _points(points: Sequence[tuple[float, float | None]]) -> Points:
    return Points([x for x, _ in points], [math.nan if y is None or not math.isfinite(y) else y for _, y in points])


def known(points: Points) -> list[tuple[float, float]]:
    """Return the points that have a vertical value."""
    return [(x, y) for x, y in zip(points.x, points.y, strict=True) if not math.isnan(y)]


def _finite(values: Iterable[float | None], *, positive: bool = False) -> list[float]:
    """Return the values, or only NaN if one is not finite, because a mean over the others would be biased."""
    found = list(values)
    good = [value for value in found if value is not None and math.isfinite(value) and (value > 0 or not positive)]
    return good if good and len(good) == len(found) else [math.nan] * max(1, len(found))
