"""Results of a comparison in a few sentences, and the formatting of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .results import ORTHOGONAL, Results, Summary, enough_seeds, leaders


def verdict(results: Results, task: str) -> list[str]:
    """Return sentences on the best scheme of a task, and on whether the seeds separate it from the others."""
    info, lines = results.tasks[task], results.summaries(task)
    measure = f"final {info.measure}"
    good = [line for line in lines if line.finished and line.stayed_orthogonal]
    if not lines:
        return ["Nothing was measured."]
    if not good:
        return [f"No scheme ended with orthogonal weights and a finite {info.measure}."]
    first = leaders(good, info)
    if not enough_seeds(first):
        return [f"Ranking the schemes by {measure} takes at least two seeds with different results."]
    if len(first) == 1:
        found = [f"Best {measure} with orthogonal weights: {first[0].scheme}, {final(first[0])}."]
    else:
        names = join_words(line.scheme for line in first)
        found = [f"The {measure} does not separate {names}: the differences are within the spread."]
        timed = [(line.step_ms, line.scheme) for line in first if line.step_ms is not None]
        if timed:
            found.append(f"Of these, {min(timed)[1]} has the shortest training step, {number(min(timed)[0])} ms.")
    own = leaders((line for line in good if not line.peer), info)
    if own and all(line.peer for line in first):
        found.append(f"The best retraction of manifold_opt is {own[0].scheme}, {final(own[0])}.")
    return found


def problems(results: Results, task: str) -> list[str]:
    """Return sentences on schemes that failed, ended without a finite measure, or left the manifold."""
    found = []
    for scheme in results.schemes(task):
        rows = [row for row in results.rows if (row.task, row.scheme) == (task, scheme)]
        failed = [row for row in rows if row.failure]
        lost = [row for row in rows if not row.failure and (row.final is None or not math.isfinite(row.final))]
        if failed:
            found.append(f"{scheme} failed in {len(failed)} of {len(rows)} runs: {failed[0].failure}")
        if lost:
            found.append(
                f"{scheme} ended without a finite {results.tasks[task].measure} in {len(lost)} of {len(rows)} runs."
            )
    errors = {line.scheme: line.orthogonality_error for line in results.summaries(task) if not line.stayed_orthogonal}
    left = [f"{scheme} ({number(error)})" for scheme, error in errors.items() if error is not None]
    if left:
        found.append(f"Left the manifold, with an error above {number(ORTHOGONAL)} at some step: {join_words(left)}.")
    return found


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
    """Write mean ± spread, the mean to the second digit of the spread."""
    if not (math.isfinite(mean) and math.isfinite(spread)) or spread <= 1e-5 * abs(mean):
        return f"{number(mean)} ± {number(spread)}"
    large = max(abs(mean), spread)
    if 1e-3 <= large < 1e5:
        places = min(6, max(0, 1 - math.floor(math.log10(spread))))
        return f"{mean:.{places}f} ± {spread:.{places}f}"
    power = math.floor(math.log10(large))
    return f"({mean / 10.0**power:.2f} ± {spread / 10.0**power:.2f})e{power}"


def number(value: float | None) -> str:
    """Write a number to three significant digits."""
    if value is None:
        return "none"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(3, len(str(int(abs(value)))))
        return f"{value:.{digits}g}"
    return f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e")


def join_words(names: Iterable[str]) -> str:
    """Join to ``a, b and c``."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
