"""The results as a terminal shows them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from .results import About, Results, Summary, winners


def tables(results: Results) -> Iterator[Any]:
    """A rich table for every task, the best of every column marked with a star, and one for the cost of steps."""
    for name, about in results.tasks.items():
        lines = results.summaries(name)
        first = winners(lines, about)
        columns = _columns(about, {line.scheme for line in first}, swept=len(results.rates(name)) > 1, lines=lines)
        table = _table(about.title, list(columns))
        for line in lines:
            cells = ["failed"] if line.mean is None else [cell(line) for cell in columns.values()]
            table.add_row(line.scheme, *cells)
        failures = [f"{line.scheme} failed: {line.failure}" for line in lines if line.failure]
        tied = ", or within its spread" if first else "; finals need more seeds"
        table.caption = _plain(
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
    table = Table(title=_plain([title]), box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, **justified)  # type: ignore[arg-type]
    table.add_column("scheme", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _plain(lines: list[str]) -> Any:
    """Lines in which brackets are brackets."""
    from rich.text import Text

    return Text("\n".join(lines))


def _columns(
    about: About, first: set[str], *, swept: bool, lines: list[Summary]
) -> dict[str, Callable[[Summary], str]]:
    """What stands in a column, by its title; columns that would say nothing are left out."""
    columns: dict[str, Callable[[Summary], str]] = {
        f"final {about.measure}": functools.partial(_final, first),
    }
    if swept:
        columns["lr"] = lambda line: f"{line.lr:.2g}"
    if about.target is not None:
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
    spread = f" ± {line.spread:.1g}" if line.spread is not None and line.seeds > 1 else ""
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
    table.caption = _plain([f"{scheme} failed: {failure}" for scheme, failure in failures.items()])
    return table


def number(x: float | None) -> str:
    """Three digits, or a dash."""
    return "-" if x is None else f"{x:#.3g}".rstrip(".")
