"""Figures of a comparison, as files on white and as SVG in the text colour of the page."""

from __future__ import annotations

import html
import io
import itertools
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .results import ORTHOGONAL, Cost, Results, RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#010203"  # text, axes and grid; replaced by currentColor in an SVG

# The palette of Okabe and Ito, adjusted for a contrast of at least 3 on white and on black.
COLOURS = (INK, "#0072B2", "#D55E00", "#009E73", "#C2619A", "#A87800", "#2C8FC9", "#8A6FD0")
MARKERS = "osD^vPX<>*hpd"
DASHES: tuple[tuple[float, ...], ...] = ((6, 2), (2, 1.5), (7, 2, 1.5, 2), (10, 3), (4, 1.5, 1, 1.5, 1, 1.5))
FLOAT32 = 2.0**-23
PANEL = (4.4, 3.2)  # inches; its 9 point text is readable on a phone
SETTINGS: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "text.usetex"), False),
    **dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize", "legend.fontsize"), 9),
    "axes.titlesize": 10,
    "axes.linewidth": 0.7,
    "svg.fonttype": "none",
}


@dataclass(frozen=True)
class Style:
    """Line style of a scheme, the same in every figure: peers are dashed, with hollow markers."""

    colour: str
    marker: str
    dash: tuple[float, ...] | None
    width: float

    def line(self, **more: Any) -> dict[str, Any]:
        """Return the keyword arguments of ``Axes.plot``."""
        style: Any = "-" if self.dash is None else (0, self.dash)
        face = self.colour if self.dash is None else "none"
        looks = {"color": self.colour, "linestyle": style, "linewidth": self.width, "marker": self.marker}
        return {**looks, "markersize": 4.5, "markerfacecolor": face, "markeredgewidth": 1.0} | more


@dataclass(frozen=True)
class Panel:
    """A pair of axes: title, schemes, and the function that draws them."""

    title: str
    schemes: list[str]
    draw: Callable[[Axes], None]


def styles(results: Results) -> dict[str, Style]:
    """Return the style of each scheme; later lines are thinner, so that coinciding curves remain visible."""
    peers = {row.scheme for row in results.rows if row.peer} | {cost.scheme for cost in results.costs if cost.peer}
    found: dict[str, Style] = {}
    for i, scheme in enumerate(results.schemes()):
        marker = MARKERS[i % len(MARKERS)]
        k = sum((other in peers) == (scheme in peers) for other in found)
        if scheme in peers:  # the first colour is that of the axes
            found[scheme] = Style(COLOURS[1 + k % (len(COLOURS) - 1)], marker, DASHES[k % len(DASHES)], 1.4)
        else:
            found[scheme] = Style(COLOURS[k % len(COLOURS)], marker, None, max(1.0, 3.2 - 0.4 * k))
    return found


def panels(results: Results) -> dict[str, list[Panel]]:
    """Return the panels of every figure, by its name."""
    drawn = styles(results)
    found: dict[str, list[Panel]] = {}
    for task in results.tasks:
        curves = _best_rows(results, task)
        if curves:
            found[f"{task}-loss"] = [_loss(curves, drawn, "step"), _loss(curves, drawn, "seconds")]
            found[f"{task}-error"] = [_error(curves, drawn)]
        if len(results.rates(task)) > 1:
            swept = [row for row in results.rows if row.task == task]
            found[f"{task}-rates"] = _rates(swept, drawn, results.tasks[task].measure)
    for name, value in (("cost", "milliseconds"), ("cost-error", "orthogonality_error")):
        costs = [_cost(results.costs, drawn, varied, value) for varied in ("n", "count")]
        found[name] = [panel for panel in costs if panel.schemes]
    return {name: some for name, some in found.items() if any(panel.schemes for panel in some)}


def figures(results: Results) -> dict[str, Figure]:
    """Return all figures by name: loss, error and, for a sweep, learning rates of every task; and the cost."""
    return {name: figure(some, styles(results)) for name, some in panels(results).items()}


def figure(some: Sequence[Panel], drawn: dict[str, Style], *, legend: bool = True) -> Figure:
    """Draw panels side by side, with a legend to the right."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with mpl.rc_context(SETTINGS):
        shown = list(dict.fromkeys(scheme for panel in some for scheme in panel.schemes)) if legend else []
        width = PANEL[0] * len(some) + (1.7 if shown else 0)
        made = Figure(figsize=(width, max(PANEL[1], 0.24 * len(shown))), layout="constrained", facecolor="none")
        made.set_label("; ".join(panel.title for panel in some))
        for i, panel in enumerate(some):
            axes = made.add_subplot(1, len(some), i + 1, facecolor="none")
            axes.set_title(panel.title, loc="left")
            axes.grid(color=INK, alpha=0.13, linewidth=0.6)
            panel.draw(axes)
        if shown:
            lines = [Line2D([], [], **drawn[scheme].line()) for scheme in shown]
            beside = made.legend(lines, shown, loc="outside right upper", frameon=False, handlelength=3.2)
            for text in beside.get_texts():
                text.set_parse_math(False)
    return made


def save(results: Results, folder: Path) -> list[Path]:
    """Write every figure as PNG into a folder, and return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, made in figures(results).items():
        paths.append(folder / f"{re.sub(r'[^-.a-zA-Z0-9_]', '_', name)}.png")
        made.savefig(paths[-1], dpi=160, facecolor="white")
    return paths


def svg(figure: Figure, *, prefix: str) -> str:
    """Return the figure as an SVG element of full width, with prefixed ids, in colour and font of the page.

    Its label becomes the ``aria-label``; a figure without a label is hidden from screen readers.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context({**SETTINGS, "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", facecolor="none", metadata={"Date": None})
    text = buffer.getvalue().partition("<svg")[2]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}-", text)
    text = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), text)  # invisible digits
    text = text.replace(INK, "currentColor")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    box = text.partition('viewBox="')[2].partition('"')[0]
    label = html.escape(str(figure.get_label()), quote=True)
    said = f'role="img" aria-label="{label}"' if label else 'aria-hidden="true"'
    head = f'<svg viewBox="{box}" width="100%" {said} style="stroke-linejoin: round; stroke-linecap: butt">'
    return head + text.partition(">")[2].strip()


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


def _loss(curves: dict[str, list[RunResult]], drawn: dict[str, Style], against: str) -> Panel:
    unit = "steps" if against == "step" else "seconds"
    values = {scheme: [_finite(point) for _, point in _along(rows, "loss")] for scheme, rows in curves.items()}
    known = {scheme: [v for point in points for v in point if not math.isnan(v)] for scheme, points in values.items()}
    every = [value for some in known.values() for value in some]
    kept = [some for scheme, some in known.items() if some and all(map(_stayed_orthogonal, curves[scheme]))] or [every]

    def draw(axes: Axes) -> None:
        for scheme, points in values.items():
            x = [statistics.fmean(point) for _, point in _along(curves[scheme], against)]
            line = drawn[scheme].line(markevery=_spaced(scheme, drawn, len(x)))
            axes.plot(x, [statistics.fmean(point) for point in points], **line)
            if len(curves[scheme]) > 1:
                low, high = [min(point) for point in points], [max(point) for point in points]
                axes.fill_between(x, low, high, color=line["color"], alpha=0.1, linewidth=0)
        axes.set(xlabel=unit, ylabel="loss")
        if every:
            _scale(axes, every, [value for some in kept for value in some], min(some[0] for some in kept))

    return Panel(f"Loss against {unit}", list(curves), draw)


def _error(curves: dict[str, list[RunResult]], drawn: dict[str, Style]) -> Panel:
    values = {
        scheme: {step: max(_finite(point, positive=True)) for step, point in _along(rows, "error")}
        for scheme, rows in curves.items()
    }
    shown = [scheme for scheme, points in values.items() if not all(map(math.isnan, points.values()))]

    def draw(axes: Axes) -> None:
        for scheme in shown:
            line = drawn[scheme].line(markevery=_spaced(scheme, drawn, len(values[scheme])))
            axes.plot(list(values[scheme]), list(values[scheme].values()), **line)
        axes.set(xlabel="steps", ylabel="largest ‖I - WWᵀ‖ of a block")
        _feasibility(axes, _known(values))

    return Panel("Distance from orthogonality", shown, draw)


def _rates(rows: list[RunResult], drawn: dict[str, Style], measure: str) -> list[Panel]:
    """Return the panels of error and final measure against the learning rate."""
    shown = [scheme for scheme in drawn if any(row.scheme == scheme and row.curve.step for row in rows)]
    error: dict[str, dict[float, float]] = {scheme: {} for scheme in shown}
    final: dict[str, dict[float, float]] = {scheme: {} for scheme in shown}
    kept: list[float] = []
    broken: dict[float, list[str]] = {}
    for scheme, lr in itertools.product(shown, sorted({row.lr for row in rows})):
        some = [row for row in rows if (row.scheme, row.lr) == (scheme, lr)]
        error[scheme][lr] = max(_finite((row.orthogonality_error for row in some), positive=True))
        final[scheme][lr] = statistics.fmean(_finite(row.final for row in some))
        if some and (any(row.failure for row in some) or math.isnan(final[scheme][lr])):
            broken.setdefault(lr, []).append(scheme)
        elif some and all(map(_stayed_orthogonal, some)):
            kept.append(final[scheme][lr])

    def draw(axes: Axes, values: dict[str, dict[float, float]], label: str) -> None:
        for scheme, points in values.items():
            axes.plot(list(points), list(points.values()), **drawn[scheme].line())
        axes.set(xlabel="learning rate", ylabel=label)
        _log(axes, "x", sorted({row.lr for row in rows}))
        if known := _known(values):
            _feasibility(axes, known) if values is error else _scale(axes, known, kept or known)
        if broken:
            _failed(axes, broken, drawn)

    return [
        Panel("Distance from orthogonality", shown, lambda axes: draw(axes, error, "largest ‖I - WWᵀ‖ of a run")),
        Panel(f"Final {measure}", shown, lambda axes: draw(axes, final, f"final {measure}")),
    ]


def _failed(axes: Axes, broken: dict[float, list[str]], drawn: dict[str, Style]) -> None:
    """Draw the markers of failed schemes above the axes, at the learning rates at which they failed."""
    from matplotlib.transforms import ScaledTranslation

    across = 4
    rows = math.ceil(max(len(some) for some in broken.values()) / across)
    figure: Any = axes.figure
    for lr, some in broken.items():
        for i, scheme in enumerate(some):
            row, column = divmod(i, across)
            x = column - (min(across, len(some) - across * row) - 1) / 2
            shift = ScaledTranslation(x / 9, (0.75 + row) / 9, figure.dpi_scale_trans)
            mark = drawn[scheme].line(linestyle="none", clip_on=False, markersize=4)
            axes.plot([lr], [1], transform=axes.get_xaxis_transform() + shift, **mark)
    axes.plot([0, 1], [1, 1], transform=axes.transAxes, color=INK, linewidth=0.5, alpha=0.5)
    axes.annotate("failed or not finite:", (0, 1), xytext=(0, 3), xycoords="axes fraction", textcoords="offset points")
    axes.set_title(axes.get_title(loc="left"), loc="left", pad=8 + 8 * rows)


def _cost(costs: list[Cost], drawn: dict[str, Style], varied: str, value: str) -> Panel:
    known = [c for c in costs if c.varied == varied and _finite([getattr(c, value)], positive=True)[0] > 0]
    shown = list(dict.fromkeys(cost.scheme for cost in known))
    sizes, counts = {f"{cost.p} x {cost.n}" for cost in known}, {cost.count for cost in known}
    fixed = f", {counts.pop()} matrices" if varied == "n" and len(counts) == 1 else ""
    fixed = f", matrices of {sizes.pop()}" if varied == "count" and len(sizes) == 1 else fixed
    label = "milliseconds a step" if value == "milliseconds" else "largest ‖I - WWᵀ‖ after the steps"

    def draw(axes: Axes) -> None:
        for scheme in shown:
            points = sorted((getattr(c, varied), getattr(c, value)) for c in known if c.scheme == scheme)
            axes.plot(*zip(*points, strict=True), **drawn[scheme].line())
        axes.set(xlabel="columns n" if varied == "n" else "matrices", ylabel=label)
        _log(axes, "x", sorted({getattr(cost, varied) for cost in known}))
        _log(axes, "y")

    title = f"{'Cost' if value == 'milliseconds' else 'Error'} against {'n' if varied == 'n' else 'their number'}"
    return Panel(title + fixed.replace(", 1 matrices", ", one matrix"), shown, draw)


def _finite(values: Iterable[float | None], *, positive: bool = False) -> list[float]:
    """Return the values, or only NaN if one is not finite, because a mean over the others would be biased."""
    found = list(values)
    good = [value for value in found if value is not None and math.isfinite(value) and (value > 0 or not positive)]
    return good if good and len(good) == len(found) else [math.nan] * max(1, len(found))


def _known(values: Mapping[str, Mapping[Any, float]]) -> list[float]:
    return [value for points in values.values() for value in points.values() if not math.isnan(value)]


def _spaced(scheme: str, drawn: dict[str, Style], points: int) -> tuple[int, int]:
    """Return first marker and stride for a curve, shifted per scheme so that coinciding curves remain visible."""
    stride = max(1, points // 4)
    return round(stride * list(drawn).index(scheme) / len(drawn)), stride


def _scale(axes: Axes, values: list[float], kept: list[float], start: float = math.inf) -> None:
    """Set the vertical scale: log over more than a decade, cut far from the runs that stayed orthogonal."""
    low, high = min(kept), max(kept)
    high = min(high, end := start + max(abs(start), start - low))
    log = high > 10 * low > 0
    floor, ceiling = (low / 10, high * 10) if log else (2 * low - high, 2 * high - low)
    shown = [value for value in values if floor <= value <= min(ceiling, end)]
    if log:
        _log(axes, "y")
    if len(shown) < len(values):
        low, high, margin = min(shown), max(shown), 0.05 * (max(shown) - min(shown)) or 0.5
        axes.set_ylim((low / 1.2, high * 1.2) if log else (low - margin, high + margin))


def _feasibility(axes: Axes, values: list[float]) -> None:
    """Set a log scale with a line at the rounding of float32, cut above 1e4."""
    _log(axes, "y")
    if FLOAT32 / 100 < min(values) < 1e-3:
        axes.axhline(FLOAT32, color=INK, linewidth=0.8, alpha=0.5, linestyle=":")
        place: Any = {"xytext": (-2, -3), "textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 8}
        axes.annotate("rounding of float32", (1, FLOAT32), xycoords=("axes fraction", "data"), **place)
        axes.set_ylim(bottom=min(min(values) / 2, FLOAT32 / 20))
    if max(values) > 1e4:
        axes.set_ylim(top=1e4)


def _log(axes: Axes, which: str, ticks: Sequence[float] = ()) -> None:
    """Set a log scale with plain text labels, so that an SVG can use the font of the page."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    getattr(axes, f"set_{which}scale")("log")
    axis = getattr(axes, f"{which}axis")

    def minor(value: float, _: object) -> str:
        low, high = sorted(axis.get_view_interval())
        labelled = "123456789" if high < 5 * low else "25" if high < 40 * low else ""
        return _short(value) if not ticks and f"{value:.0e}"[0] in labelled else ""

    axis.set_major_formatter(FuncFormatter(lambda value, _: _short(value)))
    axis.set_minor_formatter(FuncFormatter(minor))
    if ticks:
        axis.set_major_locator(FixedLocator(list(ticks)))


def _short(value: float) -> str:
    return f"{value:g}" if 1e-2 <= value < 1e5 else f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
