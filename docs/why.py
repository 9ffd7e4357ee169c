"""Draw README's picture, docs/why.png, from the figures of three examples.

python docs/why.py
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

DOCS = Path(__file__).parent
sys.path.append(str(DOCS.parent / "examples"))

from common import BLACK, GREY, RED, panels, save  # noqa: E402

ERRORS = {
    "no rotation": 1.599,
    "random": 1.365,
    "learned,\nmanifold_opt": 0.419,
}  # docs/examples/rotation_quantization.md
RADII = (0, 0.1, 0.25, 0.5, 1)
CERTIFIED = {  # docs/examples/lipschitz_classifier.md
    "unconstrained": (0.892, 0.291, 0.001, 0.000, 0.000),
    "manifold_opt": (0.883, 0.811, 0.667, 0.389, 0.045),
}


def main() -> None:
    """Draw one panel per reason."""
    figure, (language, rounding, certified) = panels(3, width=4.7, height=3.6)
    runs = [
        run
        for run in json.loads((DOCS / "examples/char_language_model.json").read_text())
        if run["steps"] == 600
    ]
    for method, colour in (("AdamW", BLACK), ("manifold_opt.AdamW", RED)):
        label = method if "." in method else f"torch {method}"
        mine = [
            run for run in runs if run["method"] == method and run["cell"] == "LSTM"
        ]
        rates = sorted({run["lr"] for run in mine})
        ends = [
            [run["curve"][-1][1] for run in mine if run["lr"] == rate] for rate in rates
        ]
        low, high = ([pick(values) for values in ends] for pick in (min, max))
        language.plot(
            rates,
            [statistics.fmean(values) for values in ends],
            "o-",
            color=colour,
            label=label,
            linewidth=2,
        )
        language.fill_between(rates, low, high, color=colour, alpha=0.15, linewidth=0)
    language.set(
        title="LSTM language model, 600 steps (lower is better)",
        xlabel="learning rate",
        ylabel="validation loss (range of 3 seeds)",
    )
    language.set_xscale("log")
    language.set_xticks(rates, [f"{rate:g}" for rate in rates], minor=False)
    language.minorticks_off()
    language.legend(frameon=False)

    bars = rounding.bar(
        list(ERRORS), list(ERRORS.values()), color=[BLACK, GREY, RED], width=0.6
    )
    rounding.bar_label(bars, labels=["1.60 %", "1.37 %", "0.42 %"], padding=2)
    rounding.set(
        title="4-bit weights, by rotation (lower is better)",
        ylabel="error of the outputs, %",
        ylim=(0, 1.85),
    )
    rounding.grid(visible=False)

    for (label, values), colour in zip(CERTIFIED.items(), (BLACK, RED), strict=True):
        certified.plot(
            RADII,
            [100 * value for value in values],
            "o-",
            color=colour,
            label=label,
            linewidth=2,
        )
    certified.set(
        title="Certified images (higher is better)",
        xlabel="radius",
        ylabel="% of the test images",
        ylim=(0, 100),
    )
    certified.legend(frameon=False)
    save(figure, DOCS / "why.png")


if __name__ == "__main__":
    main()
