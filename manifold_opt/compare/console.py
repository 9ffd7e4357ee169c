"""Tables of the results for the terminal."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from .results import Results, Summary, TaskInfo, winners


def tables(results: Results) -> Iterator[Any]:
    """Yield a rich table for every task, with a star at the best of every column, and one for the cost of steps."""
    for name, info in results.tasks.items():
        lines = results.summaries(name)
        first = winners(lines, info)
        columns = _columns(info, {line.scheme for line in first}, swept=len(results.rates(name)) > 1, lines=lines)
        table = _table(info.title, list(columns))
        for line in lines:
            cells = ["failed"] if line.mean is None else [cell(line) for cell in columns.values()]
            table.add_row(line.scheme, *cells)
        failures = [f"{line.scheme} failed: {line.failure}" for line in lines if line.failure]
        tied = ", or within its spread" if first else "; finals need more seeds"
        table.caption = _text(
            [
                *failures,
                f"* best of those that stayed orthogonal{tied}",
                "step, optimizer: medians; ratio: of the step to the shortest",
                "",
            ]
        )
        yield table
    if results.costs:
        yield _costs(results)


def _table(title: str, columns: list[str]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    justified = {"title_justify": "left", "caption_justify": "left"}
    table = Table(title=_text([title]), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, **justified)  # type: ignore[arg-type]
    table.add_column("scheme", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _text(lines: list[str]) -> Any:
    """Return lines as text without markup, so that brackets are printed."""
    from rich.text import Text

    return Text("\n".join(lines))


def _columns(
    info: TaskInfo, first: set[str], *, swept: bool, lines: list[Summary]
) -> dict[str, Callable[[Summary], str]]:
    """Return the function of each column, by its title, without columns that would be empty."""
    columns: dict[str, Callable[[Summary], str]] = {
        f"final {info.measure}": functools.partial(_final, first),
    }
    if swept:
        columns["lr"] = lambda line: f"{line.lr:.2g}"
    if info.target is not None:
        columns["to target"] = _to_target
    columns["step ms"] = lambda line: number(line.step_ms) + _star(line, "step_ms")
    columns["optim. ms"] = lambda line: number(line.optimizer_ms) + _star(line, "optimizer_ms")
    columns["ratio"] = lambda line: "-" if line.ratio is None else f"{line.ratio:.2f}"
    columns["error"] = lambda line: (
        ("-" if line.orthogonality_error is None else f"{line.orthogonality_error:.1e}")
        + _star(line, "orthogonality_error")
    )
    if any(line.clamped for line in lines):
        columns["clamped"] = lambda line: f"{line.clamped:.0f}"
    if any(line.skipped for line in lines):
        columns["skipped"] = lambda line: f"{line.skipped:.0f}"
    return columns


def _final(first: set[str], line: Summary) -> str:
    spread = f" ± {line.std:.1g}" if line.std is not None and line.seeds > 1 else ""
    return number(line.mean) + spread + ("*" if line.scheme in first else " ")


def _to_target(line: Summary) -> str:
    if not line.reached:
        return "-"
    some = f" ({line.reached}/{line.seeds})" if line.reached < line.seeds else ""
    return f"{line.seconds_to_target:#.2g} s{some}" + _star(line, "seconds_to_target")


def _star(line: Summary, column: str) -> str:
    return "*" if column in line.best else " "


def _costs(results: Results) -> Any:
    points = list(dict.fromkeys((c.count, c.n) for c in results.costs))
    titles = [f"{count} x {n} x {n}" if count > 1 else f"{n} x {n}" for count, n in points]
    table = _table("milliseconds a step, forward and backward of an inner product included", titles)
    known = {(c.scheme, c.count, c.n): c.milliseconds for c in results.costs}
    for scheme in dict.fromkeys(c.scheme for c in results.costs):
        table.add_row(scheme, *(number(known.get((scheme, *point))) for point in points))
    failures = {c.scheme: c.failure for c in results.costs if c.failure}
    table.caption = _text([f"{scheme} failed: {failure}" for scheme, failure in failures.items()])
    return table


def number(x: float | None) -> str:
    """Return a number with three digits, or a dash."""
    return "-" if x is None else f"{x:#.3g}".rstrip(".")
