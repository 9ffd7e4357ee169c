"""Tables of the results for the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .html_report import cost_table
from .narrative import cost_problems, problems
from .overview import Overview
from .results import Results


def tables(results: Results) -> Iterator[Any]:
    """Yield the advice, the table of all methods with its explanation, and the table of costs."""
    overview = Overview(results)
    yield _text(*overview.advice(), *overview.warnings(), "")
    if overview.lines:
        columns = overview.columns()
        heads = [f"{column.head}\n{column.second}" for column in columns]
        groups = {
            group: [[line.scheme, *line.cells(), line.verdict] for line in lines]
            for group, lines in overview.table().items()
        }
        yield _table(["method", *heads, "verdict"], groups)
        yield _text(
            *(
                f"{column.head} {column.second}: {column.meaning}{column.better and f'; {column.better}'}."
                for column in columns
            ),
            f"verdict: {overview.verdicts()}.",
            *(line for task in results.tasks for line in problems(results, task)),
            "",
        )
    costs = cost_table(results, overview)
    if costs is not None:
        yield _text("Milliseconds per step, with the forward and backward pass of an inner product")
        yield _table(costs.head, costs.groups)
        yield _text(*cost_problems(results))


def _table(heads: list[str], groups: dict[str, list[list[str]]]) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for head in heads:
        left = head in (heads[0], "verdict")
        table.add_column(head, justify="left" if left else "right", no_wrap=left)
    for group, rows in groups.items():
        table.add_row(_text(group), style="bold")
        for name, *cells in rows:
            table.add_row(_text(f"  {name}"), *(_text(cell or "-") for cell in cells))
    return table


def _text(*lines: str) -> Any:
    """Return lines as text without markup, so that brackets are printed."""
    from rich.text import Text

    return Text("\n".join(lines))
