"""Figures of a comparison, as files on white and as SVG in the colours of the page.

A figure is one chart in small multiples: a panel for this package, one for other packages, and one for what is not kept
orthogonal. All panels have the same axes. Each shows its own methods with their names at the line ends, and the others
as faint lines.
"""

from __future__ import annotations

import html
import io
import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .charts import Chart, charts, known
from .methods import DEFAULTS, EXACT, FREE, INEXACT, PEER, group_of
from .results import Results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = {"manifold_opt": (EXACT, INEXACT), "Other packages": (PEER,), "Not kept orthogonal": (FREE,)}
INK = "#010203"  # text, axes and grid; replaced by currentColor in an SVG
# One hue from dark to light for this package, greys for the others; contrast of at least 3 with the ground. The second
# colour is that of a dark page.
BLUES = {"#08306b": "#deebf7", "#08519c": "#c6dbef", "#2171b5": "#9ecae1", "#3c87c4": "#6baed6", "#5a96c8": "#4292c6"}
GREYS = {"#3d4248": "#d9dce1", "#5c636b": "#b4bac2", "#7b838c": "#949ca5", "#8d949c": "#7f8790"}
DASHES: tuple[tuple[float, ...], ...] = ((6, 2), (2, 1.5), (7, 2, 1.5, 2), (10, 3))
PANEL = (3.7, 2.9)  # inches; its 9 point text is readable on a phone
AXES = (0.15, 0.16, 0.55, 0.74)  # left, bottom, width and height in a panel; names are to the right
LABEL_GAP = 0.075  # between names at the line ends, of the height of the axes
SETTINGS: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("axes.spines.top", "axes.spines.right", "text.usetex"), False),
    **dict.fromkeys(("font.size", "axes.labelsize", "xtick.labelsize", "ytick.labelsize"), 9),
    "axes.titlesize": 10,
    "axes.linewidth": 0.7,
    "svg.fonttype": "none",
}


def figures(results: Results) -> dict[str, Figure]:
    """Return all figures by name."""
    return {name: figure(chart, list(panels(chart))) for name, chart in charts(results).items()}


def panels(chart: Chart) -> dict[str, list[str]]:
    """Return the methods of every panel of a chart, by its title, without panels that would be empty."""
    drawn = [scheme for scheme, points in chart.lines.items() if known(points)]
    found = {title: [s for s in drawn if group_of(s) in groups] for title, groups in PANELS.items()}
    return {title: schemes for title, schemes in found.items() if schemes}


def figure(chart: Chart, titles: Sequence[str]) -> Figure:
    """Draw some panels of a chart side by side."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    heading = 0.3 if len(titles) > 1 else 0.0  # inches
    scale = PANEL[1] / (PANEL[1] + heading)
    with mpl.rc_context(SETTINGS):
        made = Figure(figsize=(PANEL[0] * len(titles), PANEL[1] + heading), facecolor="none")
        made.set_label("; ".join(f"{chart.title}, {title}" for title in titles))
        if len(titles) > 1:
            made.suptitle(chart.title, x=AXES[0] / len(titles), y=0.98, ha="left", fontsize=11)
        for i, title in enumerate(titles):
            left, bottom, width, height = AXES
            place = ((i + left) / len(titles), bottom * scale, width / len(titles), height * scale)
            axes = made.add_axes(place, facecolor="none")
            axes.set_title(title, loc="left")
            _draw(axes, chart, panels(chart)[title])
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
    """Return the figure as an SVG element of full width, with prefixed ids, in the colours and the font of the page.

    Its label becomes the ``aria-label``.
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
    for colour in (*BLUES, *GREYS):
        text = text.replace(colour, f"var({css_name(colour)})")
    text = text.replace(INK, "currentColor")
    text = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", text)
    box = text.partition('viewBox="')[2].partition('"')[0]
    label = html.escape(str(figure.get_label()), quote=True)
    head = f'<svg viewBox="{box}" width="100%" role="img" aria-label="{label}" style="stroke-linejoin: round">'
    return head + text.partition(">")[2].strip()


def css_name(colour: str) -> str:
    """Return the name of the CSS variable for a colour of a line."""
    return f"--line-{colour[1:]}"


def look(scheme: str, schemes: Iterable[str]) -> dict[str, Any]:
    """Return the keyword arguments of ``Axes.plot`` for a method among those of its group."""
    group = group_of(scheme)
    k = [other for other in schemes if group_of(other) == group].index(scheme)
    if scheme in DEFAULTS:
        return {"color": next(iter(BLUES)), "linewidth": 3.0, "linestyle": "-"}
    if group == EXACT:
        return {"color": list(BLUES)[1 + k % (len(BLUES) - 1)], "linewidth": 1.3, "linestyle": "-"}
    palette = list(BLUES)[1:] if group == INEXACT else list(GREYS)
    return {"color": palette[k % len(palette)], "linewidth": 1.5, "linestyle": (0, DASHES[k % len(DASHES)])}


def _draw(axes: Axes, chart: Chart, schemes: list[str]) -> None:
    """Draw a panel: other methods faint, then its own ones with their names at the line ends."""
    axes.grid(color=INK, alpha=0.1, linewidth=0.6)
    axes.set(xlabel=chart.xlabel, ylabel=chart.ylabel)
    for scheme, points in chart.lines.items():
        if scheme not in schemes:
            axes.plot(points.x, points.y, color=INK, alpha=0.18, linewidth=0.8)
    for scheme in sorted(schemes, key=lambda scheme: scheme not in DEFAULTS):  # thick lines below thin ones
        points, style = chart.lines[scheme], look(scheme, chart.lines)
        marker: dict[str, Any] = {"marker": "o", "markersize": 3} if len(points.x) < 20 else {}
        axes.plot(points.x, points.y, **style, **marker)
        alone = scheme in DEFAULTS or group_of(scheme) not in (EXACT, INEXACT)  # ours often coincide
        if alone and points.low is not None and points.high is not None:
            axes.fill_between(points.x, points.low, points.high, color=style["color"], alpha=0.12, linewidth=0)
    if chart.ticks:
        _log(axes, "x", chart.ticks)
    _scale(axes, chart)
    _label_ends(axes, chart, schemes)


def _label_ends(axes: Axes, chart: Chart, schemes: list[str]) -> None:
    """Write the name of every method at the end of its line, apart from each other."""
    axes.set_xlim(axes.get_xlim())  # names must not change the limits
    to_axes = axes.transData + axes.transAxes.inverted()
    ends = []
    for scheme in schemes:
        x, y = known(chart.lines[scheme])[-1]
        ends.append((float(min(1.0, max(0.0, to_axes.transform((x, y))[1]))), scheme, x, y))
    ends.sort()
    heights = _spread([end[0] for end in ends])
    for height, (_, scheme, x, y) in zip(heights, ends, strict=True):
        colour = look(scheme, chart.lines)["color"]
        across = to_axes.transform((x, y))
        axes.plot([across[0], 1.02], [min(1.0, max(0.0, across[1])), height], transform=axes.transAxes, color=colour,
                  linewidth=0.5, alpha=0.6, clip_on=False)  # fmt: skip
        weight = "bold" if scheme in DEFAULTS else "normal"
        axes.text(1.03, height, scheme, transform=axes.transAxes, color=colour, va="center", fontsize=9,
                  fontweight=weight, parse_math=False)  # fmt: skip


def _spread(wanted: list[float]) -> list[float]:
    """Return sorted heights that are apart from each other, and near the wanted ones."""
    found = list(wanted)
    for _ in range(200):
        for i, j in itertools.pairwise(range(len(found))):
            overlap = LABEL_GAP - (found[j] - found[i])
            if overlap > 0:
                found[i], found[j] = found[i] - overlap / 2, found[j] + overlap / 2
        if found:
            shift = max(0.0, -found[0]) - max(0.0, found[-1] - 1)
            found = [height + shift for height in found] if found[-1] - found[0] <= 1 else found
    return found


def _scale(axes: Axes, chart: Chart) -> None:
    """Set the vertical scale of a chart, cut far from the values that have to be in view."""
    every = [y for points in chart.lines.values() for _, y in known(points)]
    kept = chart.kept or every
    low, high = min(kept), max(kept)
    log = high > 10 * low > 0 if chart.log is None else chart.log and min(every) > 0
    floor, ceiling = (low / 10, high * 1e4) if log else (2 * low - high, 2 * high - low)
    shown = [value for value in every if floor <= value <= ceiling]
    low, high, margin = min(shown), max(shown), 0.05 * (max(shown) - min(shown)) or 0.5
    if chart.rounding is not None and log and low < 100 * chart.rounding:
        axes.axhline(chart.rounding, color=INK, linewidth=0.8, alpha=0.5, linestyle=":")
        place: Any = {"xytext": (-2, -3), "textcoords": "offset points", "ha": "right", "va": "top", "fontsize": 8}
        axes.annotate("rounding", (1, chart.rounding), xycoords=("axes fraction", "data"), **place)
        low = min(low, chart.rounding / 6)
    if log:
        _log(axes, "y")
    axes.set_ylim((low / 1.3, high * 1.3) if log else (low - margin, high + margin))


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
