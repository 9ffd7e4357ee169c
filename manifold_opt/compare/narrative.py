"""Problems of a comparison in sentences, and the formatting of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .methods import FREE, group_of
from .results import ORTHOGONAL, Results, RunResult, Summary


def problems(results: Results, task: str) -> list[str]:
    """Return sentences on schemes that failed, ended without a finite measure, or unexpectedly left the manifold."""
    found = []
    for scheme in results.schemes(task):
        rows = [row for row in results.rows if (row.task, row.scheme) == (task, scheme)]
        failed = [row for row in rows if row.failure]
        lost = [row for row in rows if not row.failure and (row.final is None or not math.isfinite(row.final))]
        if failed:
            found.append(f"{scheme} failed in {_count(failed, rows)}: {failed[0].failure}")
        if lost:
            found.append(f"{scheme} ended without a finite {results.tasks[task].measure} in {_count(lost, rows)}.")
    lines = [line for line in results.summaries(task) if group_of(line.scheme) != FREE]
    errors = {line.scheme: line.orthogonality_error for line in lines if not line.stayed_orthogonal}
    left = [f"{scheme} ({number(error)})" for scheme, error in errors.items() if error is not None]
    if left:
        found.append(f"Left the manifold, with an error above {number(ORTHOGONAL)} at some step: {join_words(left)}.")
    return found


def _count(some: list[RunResult], rows: list[RunResult]) -> str:
    """Write how many of the runs these are, and at which learning rates if not at all."""
    rates = sorted({row.lr for row in some})
    at = f" (lr {', '.join(f'{lr:g}' for lr in rates)})" if len(rates) < len({row.lr for row in rows}) else ""
    return f"{len(some)} of {len(rows)} runs{at}"


def cost_problems(results: Results) -> list[str]:
    """Return a sentence for every size and number of matrices that was not timed, with the reason."""
    return [
        f"{cost.scheme} was not timed for {cost.count} x {cost.p} x {cost.n}: {cost.failure}"
        for cost in results.costs
        if cost.failure
    ]


def final(line: Summary) -> str:
    """Write the final measure of a scheme: mean ± standard deviation if it has several seeds."""
    if line.mean is None or line.std is None or line.seeds < 2:
        return number(line.mean)
    return plus_minus(line.mean, line.std)


def plus_minus(mean: float, spread: float) -> str:
    """Write mean ± spread, both to the first digit of the spread."""
    if not (math.isfinite(mean) and math.isfinite(spread)) or spread <= 1e-5 * abs(mean):
        return f"{number(mean)} ± {number(spread)}"
    large = max(abs(mean), spread)
    if 1e-3 <= large < 1e5:
        places = min(6, max(0, -math.floor(math.log10(spread))))
        return f"{mean:.{places}f} ± {spread:.{places}f}"
    power = math.floor(math.log10(large))
    return f"({mean / 10.0**power:.1f} ± {spread / 10.0**power:.1f})e{power}"


def number(value: float | None) -> str:
    """Write a number to three significant digits."""
    if value is None:
        return ""
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(3, len(str(int(abs(value)))))
        return f"{value:.{digits}g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def milliseconds(value: float | None) -> str:
    """Write a time with three digits, so that a column of them is aligned."""
    return "" if value is None else f"{value:#.3g}".rstrip(".") if value < 1000 else f"{value:.0f}"


def join_words(names: Iterable[str]) -> str:
    """Join to ``a, b and c``."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
