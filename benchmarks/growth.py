"""How the cost of a step grows: with the size of one matrix, with the number of parameters, and of tiny blocks."""

from __future__ import annotations

import math
from typing import Any

from timing import DEFAULT, FLOOR, Plan, Problem, Work, side_by_side

NAMES = (DEFAULT, FLOOR, "pogo", "geoopt, euclidean")
SIZES, COUNTS, SMALL = (32, 64, 128, 256, 512, 1024, 2048), (1, 10, 100, 1000, 10_000), 16
BLOCKS, TINY = (10, 100, 1000, 10_000, 100_000, 1_000_000), 3
TOY_BLOCKS = (2, 4, 8)
TOY_SIZES, TOY_COUNTS, TOY_SMALL = (2, 4, 8), (1, 2, 4), 3
MARKS = ("o", "s", "^", "D")


def measure(plan: Plan, *, toy: bool = False) -> dict[str, Any]:
    """Print the panels as they come, and return ``{panel: {"x": ..., "rows": {name: {"ms", "exponent"}}}}``."""
    small = TOY_SMALL if toy else SMALL
    by_size = {n: Work(1, 1, n, n) for n in (TOY_SIZES if toy else SIZES)}
    by_count = {count: Work(count, 1, small, small) for count in (TOY_COUNTS if toy else COUNTS)}
    by_block = {count: Work(1, count, TINY, TINY) for count in (TOY_BLOCKS if toy else BLOCKS)}
    panels = {
        "one matrix n x n": by_size,
        f"parameters {small} x {small}": by_count,
        f"blocks {TINY} x {TINY} of one parameter": by_block,
    }
    return {title: panel(title, works, plan) for title, works in panels.items()}


def panel(title: str, works: dict[int, Work], plan: Plan) -> dict[str, object]:
    """Milliseconds a step of every row, for every work; and how they grow."""
    print(f"\nGrowth, {title}: ms a step.")
    print(f"{'':>7}" + "".join(f"{name:>20}" for name in NAMES), flush=True)
    ms: dict[str, list[float | None]] = {name: [] for name in NAMES}
    failures: dict[str, str | None] = {}
    for x, work in works.items():
        results = side_by_side(NAMES, Problem(work, plan), plan)
        for name in NAMES:
            median = results[name].median
            ms[name].append(None if median is None else 1e3 * median)
            failures[name] = failures.get(name) or results[name].failure
        cells = [f"{'failed' if ms[name][-1] is None else f'{ms[name][-1]:.4f}':>20}" for name in NAMES]
        print(f"{x:7}" + "".join(cells), flush=True)
    exponents = {name: exponent(list(works), ms[name]) for name in NAMES}
    shown = [f"{'-' if e is None else f'{e:.2f}':>20}" for e in exponents.values()]
    print(f"{'grows ^':>7}" + "".join(shown), flush=True)
    for name, failure in failures.items():
        if failure:
            print(f"{name} failed: {failure}"[:120])
    rows = {name: {"ms": ms[name], "exponent": exponents[name], "failure": failures[name]} for name in NAMES}
    return {"x": list(works), "rows": rows}


def exponent(x: list[int], y: list[float | None]) -> float | None:
    """Slope of log y over log x, by least squares over the upper half of the figures there are; None for one."""
    known = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True) if b is not None]
    upper = known[len(known) // 2 :]
    if len(upper) < 2:
        return None
    mean_a, mean_b = (sum(column) / len(upper) for column in zip(*upper, strict=True))
    return sum((a - mean_a) * (b - mean_b) for a, b in upper) / sum((a - mean_a) ** 2 for a, _ in upper)


def plot(panels: dict[str, Any], path: str, caption: str) -> None:
    """All panels as a PNG, log-log."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.8), layout="constrained")
    for ax, (title, data) in zip(axes, panels.items(), strict=True):
        for mark, (name, row) in zip(MARKS, data["rows"].items(), strict=True):
            slope = "" if row["exponent"] is None else f"  (grows ^{row['exponent']:.2f})"
            y = [math.nan if ms is None else ms for ms in row["ms"]]
            style = {"color": "black", "linestyle": "--"} if name == FLOOR else {}
            ax.loglog(data["x"], y, marker=mark, markersize=5, label=name + slope, **style)
        matrix = title.startswith("one")
        ax.set_title("one square matrix" if matrix else f"many {title}")
        ax.set_xlabel("n" if matrix else f"number of {title.split()[0]}")
        ax.set_xticks(data["x"], [f"{x:,}" for x in data["x"]])
        ax.minorticks_off()
        ax.set_ylabel("ms a step")
        ax.grid(visible=True, alpha=0.3)
        ax.legend(fontsize=9)
    figure.suptitle(caption, fontsize=9)
    figure.savefig(path, dpi=150)
    plt.close(figure)
