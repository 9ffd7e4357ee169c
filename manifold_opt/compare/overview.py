"""What a comparison says first: advice, and one table with a line per method, for the page and the terminal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass

from .methods import DEFAULTS, EXACT, GROUPS, PEER, group_of
from .narrative import final, join_words, milliseconds, number
from .results import Results, Summary, TaskInfo, compare_finals

SMALLEST_DIFFERENCE = 0.05  # of two median times that count as different
WIDE = 0.3  # interquartile range over median from which on timings are called wide

MEASURES = {
    "loss": ("loss", "What evaluate returned at the end, or without it the mean loss of the last tenth of the steps"),
    "gap": ("gap to optimum", "Final loss minus the smallest loss that is possible with orthogonal weights"),
    "accuracy": ("accuracy", "Share of the test images that are classified correctly"),
}


@dataclass(frozen=True)
class Line:
    """A line of the table: a method, its result on every task, and its verdict beside the reference."""

    scheme: str
    default: bool
    results: list[str]
    distance: str
    time: str
    verdict: str

    def cells(self) -> list[str]:
        """Return the texts between the name of the method and its verdict."""
        return [*self.results, self.distance, self.time]


@dataclass(frozen=True)
class Column:
    """A heading in two lines, the direction in which the values get better, and what the number is."""

    head: str
    second: str
    better: str
    meaning: str


class Overview:
    """Judgement of all methods over all tasks, beside a reference: the default if it was compared and ended well.

    Attributes:
        default: name of the default method; None if it was not compared.
        reference: method that the others are judged against; None if no method ended well.
        timed: task with the longest training step, on which times are compared; None if there are no times.
    """

    def __init__(self, results: Results) -> None:
        self.results = results
        self.lines: dict[str, dict[str, Summary]] = {}
        for task in results.tasks:
            for line in results.summaries(task):
                self.lines.setdefault(line.scheme, {})[task] = line
        self.default = next((scheme for scheme in self.lines if scheme in DEFAULTS), None)
        self.groups = _grouped(self.lines)
        self.cost_groups = _grouped(dict.fromkeys(cost.scheme for cost in results.costs))
        ordered = [scheme for schemes in self.groups.values() for scheme in schemes]
        self.reference = next((scheme for scheme in ordered if not self._lack(scheme)), None)
        times = {task: _longest(self.lines, task) for task in results.tasks}
        self.timed = max(times, key=lambda task: times[task]) if any(times.values()) else None

    def columns(self) -> list[Column]:
        """Return the columns between the name of a method and its verdict."""
        columns = [self._result_column(info) for info in self.results.tasks.values()]
        distance = "Largest ‖I - WWᵀ‖ of a block after any step; rounding in float32 gives about 1e-6"
        time = (
            f"Median of a training step{self._on_timed()}: forward pass, backward pass and optimizer. In brackets the "
            "quartiles: half of the steps took a time between them"
        )
        return [
            *columns,
            Column("off", "orthogonal", "lower is better", distance),
            Column("ms per step", self._on_timed().strip(), "", time),
        ]

    def table(self) -> dict[str, list[Line]]:
        """Return the lines of every group that has some, the default first."""
        return {group: [self._line(scheme) for scheme in schemes] for group, schemes in self.groups.items()}

    def verdicts(self) -> str:
        """Explain the words of the verdict."""
        if self.reference is None:
            return "No method ended with orthogonal weights and a finite result on every task"
        return (
            f"Result and time compared with {self.reference}. Better, worse: mean ± standard deviation do not overlap. "
            f"Faster, slower: the quartiles do not overlap, and the medians are more than "
            f"{100 * SMALLEST_DIFFERENCE:.0f} % apart"
        )

    def advice(self) -> list[str]:
        """Return the advice, and sentences that belong to it."""
        if not self.results.tasks:
            return _cost_advice(self.results)
        if self.reference is None:
            return ["No method ended with orthogonal weights and a finite result. The problems are listed below."]
        reference = self.reference
        if EXACT not in self.groups:
            return ["No exact retraction of manifold_opt was compared."]
        others = [s for s in self.groups.get(EXACT, []) if s != reference and not self._lack(s)]
        if not self._ranked():
            faster = [s for s in others if self._speed(s) == "faster"]
            best = min(faster, key=lambda s: self._time_ratio(s, reference), default="no other exact retraction")
            time = f"By time alone, {best} is faster than {reference}{self._on_timed()}."
            return ["Not ranked: that takes two or more seeds with different results.", time]
        better = [s for s in others if self._result(s) == "better"]
        faster = [s for s in others if self._result(s) == "as good" and self._speed(s) == "faster"]
        name = f"the default, {reference}" if reference == self.default else reference
        if better:
            found = f"Try {join_words(better)}: the result is better than with {name}."
        elif faster:
            best = min(faster, key=lambda s: self._time_ratio(s, reference))
            percent = 100 * (1 - self._time_ratio(best, reference))
            found = f"Try {best}: as good as {name}, and {percent:.0f} % less time per step."
        elif others:
            found = f"Keep {name}: no other exact retraction is better, or as good and faster."
        else:
            found = f"Keep {name}: no other exact retraction was compared to the end."
        return [found, *self._peers_better(reference), *self._price(reference)]

    def warnings(self) -> list[str]:
        """Return a warning if timings are wide."""
        typical = max(map(self._spread, [*self.results.tasks, None]))
        if typical <= WIDE:
            return []
        load = self.results.environment.get("load")
        busy = f"; load of the machine {load}" if load else ""
        return [
            f"Timings are wide (quartiles of a step {100 * typical:.0f} % of the median apart{busy}). Run again on an "
            "idle machine before you compare times."
        ]

    def _spread(self, task: str | None) -> float:
        """Return the median over the methods of interquartile range over median, on a task or for the costs."""
        if task is None:
            found = [(cost.quartiles, cost.milliseconds) for cost in self.results.costs]
        else:
            found = [(some[task].step_quartiles, some[task].step_ms) for some in self.lines.values() if task in some]
        spreads = [(quartiles[1] - quartiles[0]) / median for quartiles, median in found if quartiles and median]
        return statistics.median(spreads) if spreads else 0.0

    def _line(self, scheme: str) -> Line:
        lines = self.lines[scheme]
        errors = [line.orthogonality_error for line in lines.values() if line.orthogonality_error is not None]
        timed = lines.get(self.timed) if self.timed else None
        return Line(
            scheme,
            scheme == self.default,
            [self._final(lines.get(task)) for task in self.results.tasks],
            number(max(errors)) if errors else "",
            "" if timed is None else time_of(timed),
            self._verdict(scheme),
        )

    def _final(self, line: Summary | None) -> str:
        if line is None or line.mean is None:
            return ""
        info = self.results.tasks[line.task]
        if info.measure == "gap" and abs(line.mean) + (line.std or 0.0) <= info.resolution:
            return f"below {number(info.resolution)}"
        return final(line) + (f" (lr {line.lr:g})" if len(self.results.rates(line.task)) > 1 else "")

    def _result_column(self, info: TaskInfo) -> Column:
        word, meaning = MEASURES[info.measure]
        seeds = max((lines[info.name].seeds for lines in self.lines.values() if info.name in lines), default=0)
        spread = f"; ± is the standard deviation over {seeds} seeds" if seeds > 1 else "; one seed"
        swept = "; at the best learning rate" if len(self.results.rates(info.name)) > 1 else ""
        heads = ("final", word) if info.name == "model" else (info.name, word)
        better = "higher is better" if info.higher_is_better else "lower is better"
        return Column(*heads, better, f"{info.title}. {meaning}{spread}{swept}")

    def _lack(self, scheme: str) -> str:
        """Return why a method has no result to be compared; empty if it has one on every task."""
        lines = [self.lines[scheme].get(task) for task in self.results.tasks]
        failures = [line.failure for line in lines if line is not None and line.failure]
        if failures:
            return "not installed" if failures[0].startswith("ModuleNotFoundError") else "failed"
        if None in lines:
            return "not finished"
        if not all(line is not None and line.finished for line in lines):
            return "no finite result"
        return "" if all(line is not None and line.stayed_orthogonal for line in lines) else "not orthogonal"

    def _verdict(self, scheme: str) -> str:
        lack = self._lack(scheme)
        if lack or scheme == self.reference:
            return lack or ("our default" if scheme == self.default else "reference")
        words = [self._result(scheme) if self._ranked() else "", self._speed(scheme)]
        return ", ".join(filter(None, words))

    def _ranked(self) -> bool:
        """Return True if the reference has seeds with different results on every task."""
        return self.reference is not None and all(line.distinct > 1 for line in self.lines[self.reference].values())

    def _result(self, scheme: str) -> str:
        assert self.reference is not None
        pairs = [(self.lines[scheme][task], self.lines[self.reference][task], info)
                 for task, info in self.results.tasks.items()]  # fmt: skip
        signs = {compare_finals(*pair) for pair in pairs} - {0}
        return {(): "as good", (1,): "better", (-1,): "worse"}.get(tuple(signs), "mixed")

    def _speed(self, scheme: str) -> str:
        if self.reference is None or self.timed is None:
            return ""
        one, other = (self.lines[name][self.timed].step_quartiles for name in (scheme, self.reference))
        if not one or not other or abs(self._time_ratio(scheme, self.reference) - 1) < SMALLEST_DIFFERENCE:
            return "as fast"
        return "faster" if one[1] < other[0] else "slower" if one[0] > other[1] else "as fast"

    def _time_ratio(self, scheme: str, reference: str) -> float:
        """Return the time of a step over that of the reference; NaN if one is not known."""
        one, other = (self.lines.get(name, {}).get(self.timed or "") for name in (scheme, reference))
        return one.step_ms / other.step_ms if one and other and one.step_ms and other.step_ms else math.nan

    def _peers_better(self, reference: str) -> list[str]:
        better: dict[str, list[str]] = {}
        for scheme in self.groups.get(PEER, []):
            for task, info in self.results.tasks.items():
                pair = self.lines[scheme].get(task), self.lines[reference][task]
                if not self._lack(scheme) and pair[0] is not None and compare_finals(pair[0], pair[1], info) > 0:
                    better.setdefault(scheme, []).append(task)
        if not better:
            return []
        tasks = [task for task in self.results.tasks if any(task in some for some in better.values())]
        swept = any(len(self.results.rates(task)) > 1 for task in tasks)
        advice = "" if swept else " Compare several learning rates before you switch."
        return [f"{join_words(better)} ended better on {join_words(tasks)}.{advice}"]

    def _price(self, reference: str) -> list[str]:
        """Compare the reference with training without a constraint."""
        percent = 100 * (self._time_ratio(reference, "unconstrained") - 1)
        if math.isnan(percent) or self._speed("unconstrained") == "as fast":
            return []
        change = f"{abs(percent):.0f} % {'more' if percent >= 0 else 'less'} time"
        return [f"A training step with {reference} takes {change} than without a constraint{self._on_timed()}."]

    def _on_timed(self) -> str:
        return f" on {self.timed}" if self.timed and len(self.results.tasks) > 1 else ""


def _grouped(schemes: Iterable[str]) -> dict[str, list[str]]:
    """Return the schemes of every group that has some, the default first."""
    found = {group: [s for s in schemes if group_of(s) == group] for group in GROUPS}
    return {group: sorted(some, key=lambda s: s not in DEFAULTS) for group, some in found.items() if some}


def time_of(line: Summary) -> str:
    """Write the median time of a step with its quartiles."""
    between = " to ".join(map(milliseconds, line.step_quartiles)) if line.step_quartiles else ""
    return milliseconds(line.step_ms) + (f" ({between})" if between else "")


def _longest(lines: dict[str, dict[str, Summary]], task: str) -> float:
    return max((some[task].step_ms or 0.0 for some in lines.values() if task in some), default=0.0)


def _cost_advice(results: Results) -> list[str]:
    """Name the fastest exact retraction on the largest matrix."""
    exact = [c for c in results.costs if c.milliseconds is not None and group_of(c.scheme) == EXACT]
    if not exact:
        return ["Nothing was measured."] if not results.costs else ["No exact retraction was timed."]
    n = max(c.n for c in exact)
    largest = [c for c in exact if c.n == n]
    best = min(largest, key=lambda c: c.milliseconds or 0.0)
    found = f"fastest exact retraction on a matrix of {n} x {n}: {best.scheme}, {milliseconds(best.milliseconds)} ms"
    if best.scheme in DEFAULTS:
        return [f"Keep the default, the {found}."]
    default = [f"; the default, {c.scheme}, {milliseconds(c.milliseconds)} ms" for c in largest if c.scheme in DEFAULTS]
    return [f"The {found}{''.join(default)}."]
