"""What a comparison sums up, prints while it runs and at its end, and the images that it learns from."""

import io
import math

import pytest
import torch

from manifold_opt.compare import data, progress
from manifold_opt.compare.charts import charts
from manifold_opt.compare.console import tables
from manifold_opt.compare.results import Curve

from .test_compare_page import example, small

rich = pytest.importorskip("rich.console")


def test_a_summary_has_the_largest_error_of_its_runs():
    results = small(("qr", 0, 0.5, {}), ("qr", 1, 0.6, {"orthogonality_error": 0.2}))
    assert results.summaries("t")[0].orthogonality_error == 0.2


def printed(results):
    said = io.StringIO()
    rich.Console(file=said, width=110).print(*tables(results))
    return said.getvalue()


def test_the_table_begins_with_advice_and_the_default():
    lines = [line.strip() for line in printed(example()).splitlines() if line.strip()]
    assert lines[0].startswith("Keep the default, orthographic")
    first = next(k for k, line in enumerate(lines) if line == "Ours, exact")
    assert lines[first + 1].startswith("orthographic ")
    assert lines[first + 1].endswith("our default")
    assert all(len(line) <= 110 for line in lines)
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed(example())  # nothing is cut


def test_lines_of_progress_come_every_twenty_seconds(monkeypatch):
    now, said = 0.0, io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    lines = progress.Lines(rich.Console(file=said))
    lines.start(100)
    for step in range(1, 51):
        now = float(step)
        lines.describe(f"step {step}")
        lines.advance(1)
    assert said.getvalue().splitlines() == ["20 %  step 20", "40 %  step 40"]


def test_no_digit_is_learned_from_and_tested_on():
    pytest.importorskip("sklearn")
    found = data.digits()
    images = torch.cat([found.train[0], found.test[0]])
    assert len(images) == len(found.train[1]) + len(found.test[1]) == 1797
    assert len(found.test[0]) == math.floor(1797 / 4)


def test_where_a_run_has_failed_no_mean_of_the_others_is_drawn():
    results = small(
        ("qr", 0, 0.5, {}),
        ("qr", 1, None, {"failure": "no"}),
        ("qr", 0, 0.4, {"lr": 1.0}),
        ("qr", 1, 0.6, {"lr": 1.0}),
    )
    for row in results.rows:
        row.curve = Curve([1], [1.0], [0.1], [1e-7])
    low, high = charts(results)["t-rates"].lines["qr"].y
    assert math.isnan(low)
    assert high == pytest.approx(0.5)
