"""What a comparison has found, in sentences; none says more than the numbers do."""

from __future__ import annotations

import math
from collections.abc import Iterable

from .results import ORTHOGONAL, About, Cost, Results, Row, Summary


def words(results: Results) -> list[str]:
    """All there is to say, each sentence after the name of its task."""
    found = ["This comparison was interrupted; some of what was asked for is missing."] if results.interrupted else []
    for task in results.tasks:
        found += [f"{task}: {line}" for line in (*verdict(results, task), *details(results, task))]
    return found + [f"cost: {line}" for line in cost_words(results)]


def verdict(results: Results, task: str) -> list[str]:
    """Which scheme to take on a task, if the numbers say so, and what it costs."""
    lines = results.summaries(task)
    about = results.tasks[task]
    good = [line for line in lines if ended_well(line) and kept(line)]
    if not lines:
        return ["Nothing was measured."]
    if not good:
        return ["No scheme ended with a finite measure and orthogonal weights."]
    if len(lines) == 1:
        return [f"Only {lines[0].scheme} was run: {_final(lines[0], about)}.", _price(good[0], lines)]
    said, pick = _choice(results, about, good)
    return [*said, _price(pick, lines), *_unfaithful(lines, good, about)]


def details(results: Results, task: str) -> list[str]:
    """Who left the manifold, failed, was shortened or skipped; which learning rates were best; who learned first."""
    lines = results.summaries(task)
    rows = [row for row in results.rows if row.task == task]
    found = [*_manifold(lines), *_failures(rows, results.tasks[task].measure)]
    for what, happened in (("clamped", "shortened"), ("skipped", "left out")):
        some = [f"{line.scheme} {getattr(line, what):g} times" for line in lines if getattr(line, what)]
        if some:
            found.append(f"Steps of a block were {happened}: {listed(some)}.")
    return found + _rates(lines, results.rates(task)) + _target(lines, results.tasks[task].target)


def cost_words(results: Results) -> list[str]:
    """How the cost of a step grows with the size of the matrices, and with their number."""
    found = []
    for varied in ("n", "count"):
        costs = [cost for cost in results.costs if cost.varied == varied]
        at: dict[str, dict[int, float]] = {}
        for cost in costs:
            if cost.milliseconds is not None and math.isfinite(cost.milliseconds) and cost.milliseconds > 0:
                at.setdefault(cost.scheme, {})[getattr(cost, varied)] = cost.milliseconds
        found += _growth(at, varied) + _costs_failed(costs, varied)
    return found


def ended_well(line: Summary) -> bool:
    """Whether every seed ended, at the best learning rate, with a finite measure."""
    return line.failure is None and line.mean is not None and math.isfinite(line.mean)


def kept(line: Summary) -> bool:
    """Whether the weights were orthogonal all the time."""
    return line.orthogonality_error is not None and line.orthogonality_error <= ORTHOGONAL


def told_apart(one: Summary, other: Summary, about: About) -> bool:
    """Whether mean ± spread of the two do not overlap; one seed has no spread to judge by. Rounding tells nothing."""
    if min(one.different, other.different) < 2 or one.mean is None or other.mean is None:
        return False
    return abs(one.mean - other.mean) > max((one.spread or 0.0) + (other.spread or 0.0), about.resolution)


def leaders(lines: Iterable[Summary], about: About) -> list[Summary]:
    """The best by the final measure, and after it those that it cannot be told apart from; best first."""
    sign = -1 if about.higher_is_better else 1
    ranked = sorted((line for line in lines if ended_well(line)), key=lambda line: sign * (line.mean or 0.0))
    return ranked[:1] + [line for line in ranked[1:] if not told_apart(ranked[0], line, about)]


def winners(lines: Iterable[Summary], about: About) -> list[Summary]:
    """The leaders of those that stayed orthogonal; none where too few seeds tell them apart from others."""
    first = leaders(filter(kept, lines), about)
    return first if judged(first) else []


def judged(first: list[Summary]) -> bool:
    """Whether the leaders have been told apart from others: one alone, or of seeds enough for a spread."""
    return len(first) == 1 or (bool(first) and min(line.different for line in first) > 1)


def number(value: float | None, digits: int = 3) -> str:
    """A number to so many significant digits, as it would be written by hand."""
    if value is None:
        return "none"
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "infinite" if value > 0 else "minus infinite"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        digits = max(digits, len(str(int(abs(value)))))
        return f"{value:.{digits}g}"
    return f"{value:.{min(digits, 2) - 1}e}".replace("e-0", "e-").replace("e+0", "e")


def plus_minus(mean: float, spread: float) -> str:
    """Mean and spread, the mean to the second digit of the spread."""
    if not (math.isfinite(mean) and math.isfinite(spread)) or spread <= 1e-5 * abs(mean):
        return f"{number(mean)} ± {number(spread)}"
    large = max(abs(mean), spread)
    if 1e-3 <= large < 1e5:
        places = min(6, max(0, 1 - math.floor(math.log10(spread))))
        return f"{mean:.{places}f} ± {spread:.{places}f}"
    power = math.floor(math.log10(large))
    return f"({mean / 10.0**power:.2f} ± {spread / 10.0**power:.2f})e{power}"


def listed(names: Iterable[str]) -> str:
    """``a, b and c``."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def final(line: Summary) -> str:
    """The final measure of a scheme: mean ± spread if there are seeds enough for one."""
    if line.mean is None or line.spread is None or line.seeds < 2:
        return number(line.mean)
    return plus_minus(line.mean, line.spread)


def _final(line: Summary, about: About) -> str:
    return f"final {about.measure} {final(line)}"


def _named(line: Summary) -> str:
    """Peers are called so; those that let the weights go are no alternative, and called by their name only."""
    return f"{line.scheme} (a peer)" if line.peer and kept(line) else line.scheme


def _choice(results: Results, about: About, good: list[Summary]) -> tuple[list[str], Summary]:
    """What to say of the final measure, and which scheme it leads to."""
    first = leaders(good, about)
    best, value = first[0], _final(first[0], about)
    if len(good) == 1:
        return [f"{_named(best)} alone ended well with orthogonal weights: {value}."], best
    if len(first) == 1:
        said = f"Take {_named(best)}: its {value} is the best of those with orthogonal weights, beyond the spread."
        return [said, *_best_of_own(best, good, about)], best
    quickest = min(first, key=lambda line: math.inf if line.step_ms is None else line.step_ms)
    if not judged(first):
        ends = f"{number(best.mean)} ({best.scheme}) to {number(first[-1].mean)} ({first[-1].scheme})"
        one = "With one seed" if first[0].seeds < 2 else "Where seeds make no difference"
        return [f"{one} there is no spread to judge a final {about.measure} by: {ends}, undecided."], quickest
    others = listed(line.scheme for line in first[1:])
    undecided = f"The final {about.measure} does not decide between {best.scheme}, at {final(best)}, "
    rounding = ", or differ by rounding alone" if about.resolution else ""
    undecided += f"and {others}: mean ± spread overlap{rounding}."
    if quickest.step_ms is None:
        return [undecided], quickest
    same = [line.scheme for line in first if line is not quickest and _as_fast(results, quickest, line)]
    also = f"; {listed(same)} cannot be told from it in speed" if same else ""
    said = f"Take {_named(quickest)}, which has the shortest step of them{also}."
    return [undecided, said, *_quickest_of_own(quickest, first)], quickest


def _quickest_of_own(quickest: Summary, first: list[Summary]) -> list[str]:
    """Where a peer is the quickest: what the quickest of our own costs, and how far each is from orthogonal."""
    own = [line for line in first if not line.peer and line.step_ms is not None]
    if not quickest.peer or not own:
        return []
    line = min(own, key=lambda line: line.step_ms or math.inf)
    errors = f"errors {number(line.orthogonality_error, 2)} and, of {quickest.scheme}, "
    errors += number(quickest.orthogonality_error, 2)
    return [f"Of our own {line.scheme} has: {number(line.step_ms)} ms; {errors}."]


def _best_of_own(best: Summary, good: list[Summary], about: About) -> list[str]:
    own = leaders([line for line in good if not line.peer], about)
    return [f"The best of our own is {own[0].scheme}: {_final(own[0], about)}."] if best.peer and own else []


def _as_fast(results: Results, one: Summary, other: Summary) -> bool:
    """Whether the seeds' times of a step overlap; a single time decides nothing, and is left alone."""
    times = [
        [r.step_ms for r in results.rows if _is(r, line) and r.step_ms is not None and math.isfinite(r.step_ms)]
        for line in (one, other)
    ]
    return all(len(some) > 1 for some in times) and min(times[1]) <= max(times[0])


def _is(row: Row, line: Summary) -> bool:
    return (row.task, row.scheme, row.lr) == (line.task, line.scheme, line.lr)


def _price(pick: Summary, lines: list[Summary]) -> str:
    if pick.step_ms is None:
        return f"What a step of {pick.scheme} takes was not measured."
    timed = [line for line in lines if line.step_ms is not None]
    fastest = min(timed, key=lambda line: line.step_ms or 0.0)
    part = "" if pick.optimizer_ms is None else f", of which the optimizer takes {number(pick.optimizer_ms)}"
    said = f"A training step of {pick.scheme} takes {number(pick.step_ms)} ms{part}"
    if len(timed) == 1:
        return f"{said}."
    if fastest.step_ms == pick.step_ms:
        return f"{said}; no other takes less."
    left = "" if kept(fastest) else ", which did not stay orthogonal"
    ratio = pick.step_ms / fastest.step_ms if fastest.step_ms else math.inf
    return f"{said}: {ratio:.2f} times as long as {_named(fastest)}, the fastest{left} ({number(fastest.step_ms)} ms)."


def _unfaithful(lines: list[Summary], good: list[Summary], about: About) -> list[str]:
    """Schemes that ended better, but not on the manifold; a gap is to the optimum on it, and means nothing off it."""
    if about.measure == "gap":
        return []
    best = leaders(good, about)[0]
    sign = -1 if about.higher_is_better else 1
    better = [
        f"{line.scheme} ({_final(line, about)})"
        for line in lines
        if ended_well(line) and not kept(line) and told_apart(line, best, about)
        if sign * (line.mean or 0.0) < sign * (best.mean or 0.0)
    ]
    return [f"Better still, but without orthogonal weights: {listed(better)}."] if better else []


def _manifold(lines: list[Summary]) -> list[str]:
    known = [(line.orthogonality_error, line.scheme) for line in lines if line.orthogonality_error is not None]
    inside = sorted((error, scheme) for error, scheme in known if error <= ORTHOGONAL)
    # Not a number comes last, as the worst.
    outside = sorted(
        ((error, scheme) for error, scheme in known if not error <= ORTHOGONAL),
        key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0],
    )
    found = []
    if len(inside) == 1:
        found.append(f"{inside[0][1]} stayed orthogonal, to within {number(inside[0][0])}.")
    elif inside:
        (low, first), (high, last) = inside[0], inside[-1]
        who = "All schemes" if not outside else f"{len(inside)} of {len(known)} schemes"
        span = f"{number(low)} ({first}) to {number(high)} ({last})" if number(low) != number(high) else number(low)
        found.append(f"{who} stayed orthogonal, to within {span}.")
    if outside:
        some = listed(f"{scheme} (error {number(error)})" for error, scheme in outside)
        found.append(f"Further from orthogonal than {number(ORTHOGONAL)}, at some step: {some}.")
    return found


def _failures(rows: list[Row], measure: str) -> list[str]:
    """What went wrong, the schemes that it went wrong with in the same way together."""
    found: dict[str, list[str]] = {}
    for scheme in dict.fromkeys(row.scheme for row in rows):
        some = [row for row in rows if row.scheme == scheme]
        failed = [row for row in some if row.failure]
        lost = [row for row in some if not row.failure and (row.final is None or not math.isfinite(row.final))]
        if failed:
            how = f"failed in {_share(failed, some)}: {str(failed[0].failure).rstrip('.')}."
            found.setdefault(how, []).append(scheme)
        if lost:
            found.setdefault(f"ended with no finite {measure} in {_share(lost, some)}.", []).append(scheme)
    return [f"{listed(schemes)} {'each ' if len(schemes) > 1 else ''}{how}" for how, schemes in found.items()]


def _share(some: list[Row], of: list[Row]) -> str:
    rates, tried = ({row.lr for row in rows} for rows in (some, of))
    where = f" (learning rate {listed(number(lr) for lr in sorted(rates))})" if rates != tried else ""
    return f"{len(some)} of {len(of)} runs{where}"


def _rates(lines: list[Summary], rates: list[float]) -> list[str]:
    good = [line for line in lines if ended_well(line) and kept(line)]
    if len(rates) < 2 or not good:
        return []
    by_rate = [(lr, [line.scheme for line in good if line.lr == lr]) for lr in rates]
    some = [f"{number(lr)} for {listed(schemes)}" for lr, schemes in by_rate if schemes]
    if len(some) == 1 and len(good) > 2:
        some = [f"{number(good[0].lr)} for all that ended well with orthogonal weights"]
    found = [f"Best learning rate: {'; '.join(some)}."]
    edge = [line.scheme for line in good if line.lr in (rates[0], rates[-1])]
    if edge:
        found.append(f"At the edge of the sweep, so that a better one may lie outside: {listed(edge)}.")
    return found


def _target(lines: list[Summary], target: float | None) -> list[str]:
    if target is None:
        return []
    there = [line for line in lines if line.seconds_to_target is not None and kept(line)]
    never = [line.scheme for line in lines if not line.reached and line.failure is None]
    last = [f"Never there: {listed(never)}."] if never and len(never) < len(lines) else []
    if not there:
        return [f"No scheme with orthogonal weights reached a loss of {number(target)}.", *last]
    # A median over some of the seeds does not compare with one over all of them.
    whole = [line for line in there if line.reached == line.seeds] or there
    first = min(whole, key=lambda line: line.seconds_to_target or 0.0)
    seeds = f"median; {first.reached} of {first.seeds} seeds" if first.seeds > 1 else "one seed"
    found = [
        f"Shortest time to a loss of {number(target)}, with orthogonal weights: {_named(first)}, "
        f"{number(first.seconds_to_target)} s ({seeds})."
    ]
    return [*found, *last]


def _growth(at: dict[str, dict[int, float]], varied: str) -> list[str]:
    """Between the smallest and the largest value that all schemes were measured at."""
    common = sorted(set.intersection(*(set(points) for points in at.values()))) if at else []
    if len(common) < 2:
        return []
    low, high = common[0], common[-1]
    times = sorted((points[high] / points[low], scheme) for scheme, points in at.items())
    more = f"{number(high / low)} times as {'large' if varied == 'n' else 'many'}"
    where = f"From {_at(low, varied)} to {_at(high, varied)}, {more},"
    if len(times) == 1:
        return [f"{where} a step of {times[0][1]} comes to take {number(times[0][0])} times as long."]
    (least, slow), (most, fast) = times[0], times[-1]
    cheap, dear = (pick(at, key=lambda scheme: at[scheme][high]) for pick in (min, max))
    span = f"{number(least)} ({slow}) to {number(most)} ({fast})" if number(least) != number(most) else number(least)
    return [
        f"{where} a step comes to take {span} times as long.",
        f"At {_at(high, varied)} a step takes {number(at[cheap][high])} ms ({cheap}) "
        f"to {number(at[dear][high])} ms ({dear}).",
    ]


def _at(value: int, varied: str) -> str:
    if varied == "n":
        return f"n = {value}"
    return f"{value} matrices" if value != 1 else "1 matrix"


def _costs_failed(costs: list[Cost], varied: str) -> list[str]:
    failed = [cost for cost in costs if cost.failure]
    found = []
    for scheme in dict.fromkeys(cost.scheme for cost in failed):
        some = [cost for cost in failed if cost.scheme == scheme]
        places = listed(_at(getattr(cost, varied), varied) for cost in some)
        found.append(f"{scheme} failed at {places}: {str(some[0].failure).rstrip('.')}.")
    return found
