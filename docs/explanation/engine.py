"""Draws engine.png, the picture of docs/explanation/engine.md: the parts of one step.

python docs/explanation/engine.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

BLUE, ORANGE, GREEN, GREY, INK = "#0072B2", "#E69F00", "#009E73", "#999999", "#222222"


def box(
    axes: Axes,
    x: float,
    y: float,
    title: str,
    text: str,
    color: str,
    width: float = 2.6,
) -> None:
    """A part of a step: its name, and what it does."""
    axes.add_patch(
        FancyBboxPatch(
            (x, y),
            width,
            1.1,
            boxstyle="round,pad=0.02,rounding_size=0.12",
            fc=color + "22",
            ec=color,
        )
    )
    axes.text(
        x + width / 2,
        y + 0.8,
        title,
        ha="center",
        va="center",
        color=INK,
        weight="bold",
        fontsize=10,
    )
    axes.text(
        x + width / 2,
        y + 0.38,
        text,
        ha="center",
        va="center",
        color=INK,
        fontsize=8.6,
        linespacing=1.25,
    )


def arrow(
    axes: Axes, start: tuple[float, float], end: tuple[float, float], bend: float = 0.0
) -> None:
    """From one part to the next."""
    style = f"arc3,rad={bend}"
    axes.add_patch(
        FancyArrowPatch(
            start,
            end,
            arrowstyle="-|>",
            mutation_scale=12,
            color=INK,
            connectionstyle=style,
        )
    )


def stack(axes: Axes, x: float, y: float, names: tuple[str, ...], color: str) -> None:
    """A parameter with its blocks, one below the other."""
    for k, name in enumerate(reversed(names)):
        axes.add_patch(
            Rectangle((x, y + 0.42 * k), 0.72, 0.42, fc=color + "44", ec=color)
        )
        axes.text(
            x + 0.36,
            y + 0.42 * k + 0.21,
            name,
            ha="center",
            va="center",
            fontsize=8.5,
            color=INK,
        )


def draw() -> plt.Figure:
    """All parts, in order."""
    figure, axes = plt.subplots(figsize=(11, 5.2), layout="constrained")
    axes.set(xlim=(-0.3, 14.1), ylim=(-0.1, 6.3))
    axes.axis("off")

    axes.text(0.56, 5.95, "marked", ha="center", fontsize=9, color=INK, weight="bold")
    stack(axes, 0.2, 4.3, ("$W_r$", "$W_z$", "$W_n$"), BLUE)
    axes.text(0.56, 5.63, "a GRU's", ha="center", fontsize=8.6, color=INK)
    stack(axes, 0.2, 3.1, ("$W_1$",), BLUE)
    stack(axes, 0.2, 2.5, ("$W_2$",), BLUE)
    axes.text(0.56, 3.65, "small ones, alike", ha="center", fontsize=8.6, color=INK)
    group = FancyBboxPatch(
        (-0.15, 2.35),
        1.42,
        3.5,
        boxstyle="round,pad=0.02",
        fc="none",
        ec=BLUE,
        ls=(0, (4, 3)),
    )
    axes.add_patch(group)
    stack(axes, 0.2, 0.45, ("bias",), GREY)
    axes.text(0.56, 1.05, "unmarked", ha="center", fontsize=9, color=INK, weight="bold")

    box(
        axes,
        1.9,
        4.3,
        "view or gather",
        "large: a view, no copy\nsmall: one batch (B, p, n)",
        BLUE,
    )
    box(
        axes,
        5.2,
        4.3,
        "gradient",
        r"$A = GW^{\mathsf{T}}$; not finite?" + "\nthat block stays",
        ORANGE,
    )
    box(
        axes,
        8.5,
        4.3,
        "direction",
        "torch's moments of $A$\n" + r"$\Omega$ skew, or a tangent $V$",
        ORANGE,
    )
    box(
        axes,
        8.5,
        2.3,
        "retraction",
        r"$QW$, or $R_W(V)$" + "\nrounding taken back",
        GREEN,
    )
    box(
        axes, 5.2, 2.3, "back in place", "zero step: same bits\nfault: as it was", GREEN
    )
    box(
        axes, 1.9, 0.1, "torch.optim's functions", "sgd, adam, adamw: bit for bit", GREY
    )
    box(
        axes,
        11.35,
        3.3,
        "state",
        "exp_avg, exp_avg_sq,\nstep: torch's keys",
        GREY,
        width=2.5,
    )

    arrow(axes, (1.35, 4.85), (1.85, 4.85))
    arrow(axes, (4.55, 4.85), (5.15, 4.85))
    arrow(axes, (7.85, 4.85), (8.45, 4.85))
    arrow(axes, (9.8, 4.25), (9.8, 3.45))
    arrow(axes, (8.45, 2.85), (7.85, 2.85))
    arrow(axes, (5.15, 2.85), (1.35, 2.85))
    arrow(axes, (11.15, 4.75), (11.9, 4.45), bend=-0.2)
    arrow(axes, (11.3, 3.75), (10.6, 4.25), bend=-0.2)
    arrow(axes, (1.0, 0.66), (1.85, 0.66))
    arrow(axes, (4.55, 0.66), (5.15, 0.66))
    axes.text(5.3, 0.66, "in place too", va="center", fontsize=8.6, color=INK)
    return figure


if __name__ == "__main__":
    draw().savefig(Path(__file__).with_suffix(".png"), dpi=130)
