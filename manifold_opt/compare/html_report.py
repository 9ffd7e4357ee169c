"""HTML report of a comparison in one file without scripts and external resources."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from . import plots
from .charts import charts
from .narrative import cost_problems, milliseconds, number, problems
from .overview import Overview
from .results import Results, Summary


@dataclass(frozen=True)
class Table:
    """Table with a first column of names: headings, and rows of texts by the title of their group."""

    head: list[str]
    groups: dict[str, list[list[str]]]


def html(results: Results) -> str:
    """Return the page: advice and the table of all methods, then the details of each task, and the values used."""
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters["unbroken"] = unbroken
    source = resources.files(__package__).joinpath("report.html.j2").read_text(encoding="utf-8")
    overview = Overview(results)
    figures = _figures(results)
    return environment.from_string(source).render(
        title="Ways to keep weights orthogonal, compared" if results.tasks else "What a step costs",
        interrupted=results.interrupted,
        overview=overview,
        tasks=[_task(results, name, overview, figures) for name in results.tasks],
        cost=cost_table(results, overview),
        cost_problems=cost_problems(results),
        cost_figures=[figures[name] for name in ("cost", "cost-count") if name in figures],
        command=_text(results.arguments.get("command", "")),
        used=_values_used(results),
        environment=[(key, _text(value)) for key, value in results.environment.items() if value is not None],
        light={plots.css_name(colour): colour for colour in (*plots.BLUES, *plots.GREYS)},
        dark={plots.css_name(light): dark for light, dark in (plots.BLUES | plots.GREYS).items()},
    )


def unbroken(text: str) -> str:
    """Replace the spaces between numbers and units by non-breaking spaces."""
    return re.sub(r"(?<=\d) (?=(ms|s|%)\b|±)|(?<=±) ", "\u00a0", text)


def _task(results: Results, name: str, overview: Overview, figures: dict[str, Any]) -> dict[str, Any]:
    info = results.tasks[name]
    kinds = ("loss", "seconds", "error", "rates", "rates-error")
    return {
        "id": re.sub(r"[^-a-zA-Z0-9_]", "_", f"task-{name}"),
        "title": info.title or name,
        "problems": problems(results, name),
        "table": _details(results, name, overview),
        "target": number(info.target),
        "figures": [figures[key] for kind in kinds if (key := f"{name}-{kind}") in figures],
        "notes": info.notes,
    }


def _details(results: Results, task: str, overview: Overview) -> Table:
    """Return the table of what the first one leaves out, without columns that say nothing."""
    lines = {scheme: some[task] for scheme, some in overview.lines.items() if task in some}
    columns: dict[str, Any] = {
        "Best lr": lambda line: f"{line.lr:g}" if line.finished and len(results.rates(task)) > 1 else "",
        "Time to target": _to_target,
        "Step, ms": lambda line: milliseconds(line.step_ms),
        "of it the optimizer, ms": lambda line: milliseconds(line.optimizer_ms),
        "Steps shortened": lambda line: f"{line.clamped:.0f}" if line.clamped else "",
        "Steps skipped": lambda line: f"{line.skipped:.0f}" if line.skipped else "",
    }
    columns = {head: cell for head, cell in columns.items() if any(map(cell, lines.values()))}
    groups = {
        group: [[scheme, *(cell(lines[scheme]) for cell in columns.values())] for scheme in schemes]
        for group, all_schemes in overview.groups.items()
        if (schemes := [scheme for scheme in all_schemes if scheme in lines])
    }
    return Table(["Method", *columns], groups)


def _to_target(line: Summary) -> str:
    some = f" ({line.reached} of {line.seeds} seeds)" if line.reached < line.seeds else ""
    return f"{number(line.seconds_to_target)} s{some}" if line.reached else ""


def cost_table(results: Results, overview: Overview) -> Table | None:
    """Return milliseconds by method and point; None if nothing was timed."""
    points = list(dict.fromkeys((c.count, c.n) for c in results.costs))
    known = {(c.scheme, c.count, c.n): milliseconds(c.milliseconds) for c in results.costs}
    groups = {
        group: [[scheme, *(known.get((scheme, *point), "") for point in points)] for scheme in schemes]
        for group, schemes in overview.cost_groups.items()
    }
    heads = [f"{n} x {n}" if count == 1 else f"{count} of {n} x {n}" for count, n in points]
    return Table(["Method", *heads], groups) if points else None


def _values_used(results: Results) -> list[tuple[str, str]]:
    """Return the values of every task as they were used, and the options that differ from none."""
    found = []
    for task in results.tasks:
        rows = [row for row in results.rows if row.task == task]
        seeds = sorted({row.seed for row in rows})
        values = {"lr": results.rates(task), "steps": sorted({row.steps for row in rows}), "seeds": seeds}
        found.append((task, "; ".join(f"{key} {_text(value)}" for key, value in values.items() if value)))
    left_out = ("command", "task", "lr", "steps", "seeds", "retractions", "peers", "schemes", "sweep_lr", "fast")
    options = {key: value for key, value in results.arguments.items() if key not in left_out}
    return found + _pairs({key: value for key, value in options.items() if value not in (None, "", [], {})})


def _figures(results: Results) -> dict[str, dict[str, Any]]:
    """Return the panels of every figure as separate SVGs, so that narrow screens can stack them."""
    from markupsafe import Markup

    return {
        name: {
            "title": chart.title,
            "note": chart.note,
            "panels": [
                Markup(plots.svg(plots.figure(chart, [title]), prefix=f"figure{i}-{j}"))
                for j, title in enumerate(plots.panels(chart))
            ],
        }
        for i, (name, chart) in enumerate(charts(results).items())
    }


def _pairs(values: dict[str, Any]) -> list[tuple[str, str]]:
    return [(str(key).replace("_", " "), _text(value)) for key, value in values.items() if value is not None]


def _text(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(f"{one:g}" if isinstance(one, float) else str(one) for one in value)
    return json.dumps(value, default=str) if isinstance(value, dict) else "" if value is None else str(value)
