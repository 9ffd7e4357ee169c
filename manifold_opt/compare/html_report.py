"""HTML report of a comparison in one file without external resources."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from importlib import resources
from typing import TYPE_CHECKING, Any

from . import plots
from .narrative import cost_problems, final, number, problems, verdict
from .results import Results, Summary, TaskInfo, winners

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Cell:
    """Cell of a table.

    Attributes:
        text: displayed text.
        value: sort key; None sorts last in both directions.
        badge: hidden remark such as ``"best"``; cells with a badge are bold.
    """

    text: str
    value: float | str | None = None
    badge: str = ""


@dataclass(frozen=True)
class Column:
    """Column of a table: its name in :class:`Summary`, its heading, and whether it is numeric."""

    name: str
    head: str
    numeric: bool = True


def html(results: Results) -> str:
    """Return the page: the results in words, and for each task its table, figures and notes."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    figures = _figures(results)
    return environment.from_string(source).render(
        title="Retraction schemes compared",
        interrupted=results.interrupted,
        tasks=[_task(results, name, figures) for name in results.tasks],
        cost=_unbroken(cost_problems(results)),
        cost_figures=[figures[name] for name in ("cost", "cost-error") if name in figures],
        command=_text(results.arguments.get("command", "")),
        arguments=_pairs({key: value for key, value in results.arguments.items() if key != "command"}),
        environment=_pairs(results.environment),
    )


def _task(results: Results, name: str, figures: dict[str, Any]) -> dict[str, Any]:
    info, lines = results.tasks[name], results.summaries(name)
    columns = _columns(info, swept=len(results.rates(name)) > 1)
    first = winners(lines, info)
    tied = {line.scheme: "best" if line is first[0] else "not told apart from the best" for line in first}
    return {
        "name": name,
        "id": re.sub(r"[^-a-zA-Z0-9_]", "_", f"task-{name}"),
        "title": info.title or name,
        "verdict": _unbroken(verdict(results, name)),
        "problems": _unbroken(problems(results, name)),
        "columns": columns,
        "rows": [(line, [_cell(line, column.name, tied) for column in columns]) for line in lines],
        "explained": _explained(info, max((line.seeds for line in lines), default=0)),
        "figures": [figures[key] for kind in ("loss", "error", "rates") if (key := f"{name}-{kind}") in figures],
        "notes": info.notes,
    }


def _columns(info: TaskInfo, *, swept: bool) -> list[Column]:
    return [
        Column("scheme", "Scheme", numeric=False),
        Column("mean", f"Final {info.measure}"),
        *([Column("lr", "Best lr")] if swept else []),
        *([Column("seconds_to_target", "Time to target")] if info.target is not None else []),
        Column("step_ms", "Step, ms"),
        Column("optimizer_ms", "Optimizer, ms"),
        Column("ratio", "Ratio to fastest"),
        Column("orthogonality_error", "Largest error"),
        Column("clamped", "Clamped"),
        Column("skipped", "Skipped"),
        Column("note", "Note", numeric=False),
    ]


def _cell(line: Summary, column: str, tied: dict[str, str]) -> Cell:
    if column == "scheme":
        return Cell(line.scheme, line.scheme.lower())
    if column == "note":
        note = _note(line)
        return Cell(note, note.lower() or None)
    value: float | None = getattr(line, column)
    if column == "lr" and not line.finished:
        value = None  # failed runs have no best learning rate
    if value is None or not math.isfinite(value):
        missing = "not reached" if column == "seconds_to_target" and not line.failure else "—"
        return Cell(missing if value is None else number(value))
    text = number(value)
    if column == "mean":
        return Cell(final(line), value, tied.get(line.scheme, ""))
    if column == "seconds_to_target":
        text = f"{text} s" + (f" ({line.reached} of {line.seeds})" if line.reached < line.seeds else "")
    elif column == "ratio":
        text = f"{value:.2f}"
    return Cell(text, value, "best" if column in line.best else "")


def _note(line: Summary) -> str:
    if line.failure:
        return line.failure
    if not line.finished:
        return "did not end with a finite measure"
    if line.orthogonality_error is not None and not line.stayed_orthogonal:
        return "left the manifold"
    return ""


def _explained(info: TaskInfo, seeds: int) -> str:
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "of one seed"
    better = "higher is better" if info.higher_is_better else "lower is better"
    bold = "of those with orthogonal weights bold if best, or if mean ± spread overlaps with that of the best."
    bold = bold if seeds > 1 else "which is best takes more seeds to say."
    target = f" Target: a loss of {number(info.target)}." if info.target is not None else ""
    return (
        f"Final {info.measure}: {over}, {better}; {bold} Step: median of a whole training step. Optimizer: what "
        "optimizer.step() takes of it; parametrizations pay for the constraint elsewhere. Error: the largest ‖I - WWᵀ‖ "
        "of a block at any step. Clamped, skipped: how often the step of a block was shortened, or left out."
        f"{target}"
    )


def _figures(results: Results) -> dict[str, dict[str, Any]]:
    """Return the panels of every figure as separate SVGs, so that narrow screens can stack them."""
    from markupsafe import Markup

    drawn = plots.styles(results)
    swatches = {
        scheme: plots.svg(_swatch(style), prefix=f"swatch{i}") for i, (scheme, style) in enumerate(drawn.items())
    }
    found = {}
    for i, (name, panels) in enumerate(plots.panels(results).items()):
        made = [plots.figure([panel], drawn, legend=False) for panel in panels]
        for panel, one in zip(panels, made, strict=True):
            one.set_label(f"{name.rpartition('-')[0] or 'step'}: {panel.title}")
        schemes = dict.fromkeys(scheme for panel in panels for scheme in panel.schemes)
        found[name] = {
            "panels": [Markup(plots.svg(one, prefix=f"figure{i}-{j}")) for j, one in enumerate(made)],
            # The swatch is repeated in every legend, so its ids have to be unique.
            "legend": [(scheme, Markup(swatches[scheme].replace("swatch", f"figure{i}-swatch"))) for scheme in schemes],
        }
    return found


def _swatch(style: plots.Style) -> Figure:
    """Draw a piece of a scheme's line for the legend."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    made = Figure(figsize=(0.46, 0.14), facecolor="none")
    made.add_artist(Line2D([0.03, 0.5, 0.97], [0.5] * 3, **style.line(markevery=[1])))
    return made


def _pairs(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(key).replace("_", " "), _text(value)) for key, value in values.items()]


def _unbroken(lines: list[str]) -> list[str]:
    """Replace the spaces between numbers and units by non-breaking spaces."""
    return [re.sub(r"(?<=\d) (?=(ms|s)\b|±)|(?<=±) ", "\u00a0", line) for line in lines]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return json.dumps(value, default=str) if isinstance(value, dict) else "none" if value is None else str(value)
