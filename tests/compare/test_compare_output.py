"""What a comparison sums up, prints while it runs and at its end, and the images that it learns from."""

import io
import math

import pytest
import torch

from manifold_opt.compare import data, plots, progress
from manifold_opt.compare.console import tables
from manifold_opt.compare.results import Curve

from .test_compare_page import seeds, small

rich = pytest.importorskip("rich.console")


def test_a_summary_has_the_largest_error_of_its_runs():
    results = small(("qr", 0, 0.5, {}), ("qr", 1, 0.6, {"orthogonality_error": 0.2}))
    assert results.summaries("t")[0].orthogonality_error == 0.2


def test_the_table_stars_the_best_that_stayed_orthogonal_and_no_other():
    lost = {"orthogonality_error": 1.0}
    results = small(*seeds("qr", [0.50, 0.51]), *seeds("exp", [0.90, 0.91]), *seeds("polar", [0.1, 0.11], **lost))
    (table,) = tables(results)
    finals = next(column for column in table.columns if column.header == "final loss")
    assert [cell[-1] for cell in finals.cells] == ["*", " ", " "]


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
    _, final = plots.figures(results)["t-rates"].axes
    low, high = final.lines[0].get_ydata()
    assert math.isnan(low)
    assert high == pytest.approx(0.5)
