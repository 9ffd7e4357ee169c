"""benchmarks/step.py at toy size: its tables and JSON are well formed, and a row that raises says so."""

import importlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from ..helpers import benchmark

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what peers import is theirs

PEERS = {"geoopt": "geoopt", "pogo": "pogo", "geotorch": "geotorch"}  # how their rows' names start: what they import


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return benchmark("step")


@pytest.fixture
def failing(monkeypatch, step):
    """A row more, which raises at its second step."""

    def build(problem):
        steps = step.ROWS["torch Adam, unconstrained"](problem)
        left = iter([steps.step])

        def once():
            for first in left:
                return first()
            raise RuntimeError("no more\nthan one")

        steps.step = once
        return steps

    monkeypatch.setitem(step.ROWS, "failing", build)


def missing(name):
    """The module that a row wants and does not find, if so."""
    module = next((module for start, module in PEERS.items() if name.startswith(start)), None)
    return module if module is not None and importlib.util.find_spec(module) is None else None


@pytest.mark.slow
@pytest.mark.usefixtures("failing")
def test_every_row_has_its_figures_or_says_why_not(step, tmp_path, capsys):
    work = "gru8"
    step.main(["--toy", "--works", work, "--json", str(tmp_path / "step.json")])
    report = json.loads((tmp_path / "step.json").read_text())
    assert set(report) == {"environment", "arguments", "rows"}
    rows = {row["row"]: row for row in report["rows"]}
    assert list(rows) == list(step.ROWS)
    lines = capsys.readouterr().out.splitlines()
    lines = lines[lines.index(f"{work}: {step.TOYS[work]}, float32, pool gradient") + 1 :]
    assert all(len(line) <= 120 for line in lines)
    table = {line[:26].strip(): line[26:] for line in lines}
    titles = [title for title, *_ in step.COLUMNS]
    assert table.pop("row").split() == " ".join(titles).split()
    assert list(table) == list(rows)
    for name, row in rows.items():
        if name == "failing" or missing(name):
            reason = "no more than one" if name == "failing" else f"No module named '{missing(name)}'"
            assert row["failure"].endswith(reason)
            assert row["ms"] is None
            assert table[name].strip() == f"failed: {row['failure']}"
            continue
        assert row["failure"] is None
        assert row["ms"] > 0
        assert row["steps"] >= row["rounds"] == 2
        assert len(table[name].split()) == len(titles)
        assert row["default_over_this"] == pytest.approx(rows["Adam, orthographic"]["ms"] / row["ms"])
        assert (row["error"] is None) == (name in ("floor", "floor, one by one"))
        assert row["error"] is None or row["error"] < 1e-3 or name == "torch Adam, unconstrained"


@pytest.mark.slow
def test_training_and_growth(step, tmp_path, capsys):
    step.main(["--toy", "--works", "--training", "--growth", "--json", str(tmp_path / "step.json")])
    report = json.loads((tmp_path / "step.json").read_text())
    assert report["rows"] == []
    assert [row["failure"] for row in report["training"]] == [None] * 3
    assert report["training"][0]["overhead_percent"] == 0
    for panel in report["growth"].values():
        for name, row in panel["rows"].items():
            assert [ms is None for ms in row["ms"]] == [bool(missing(name))] * len(panel["x"])
    assert "nan" not in capsys.readouterr().out


def test_the_exponent_is_that_of_the_upper_half(step):
    x = [1, 2, 4, 8, 16]
    assert step.growth.exponent(x, [7.0, 5.0, *(3.0 * n**2.5 for n in x[2:])]) == pytest.approx(2.5)
    assert step.growth.exponent(x, [None] * 5) is None


@pytest.mark.slow
def test_rows_leave_the_gradients_to_the_next(step):
    plan = step.Plan(1, 0.0, 1.0, torch.device("cpu"))
    problem = step.Problem(step.TOYS["params20"], plan)
    before = problem.gradients.clone()
    step.side_by_side(step.ROWS, problem, plan)
    assert torch.equal(problem.gradients, before)


@pytest.mark.parametrize(
    ("options", "valid"),
    [
        (["--works", "gru257"], "gru256"),
        (["--rows", "pollar"], "Adam, polar"),
        (["--gradient", "none"], "pool"),
        (["--rounds", "0"], "from 1"),
        (["--plot", "growth.png"], "--growth"),
    ],
)
def test_a_bad_option_is_refused_in_one_line(step, options, valid, capsys):
    with pytest.raises(SystemExit, match="2"):
        step.main(options)
    error = capsys.readouterr().err
    assert valid in error
    assert error.count("\n") == 1


@pytest.mark.slow
def test_the_model_of_sharded_steps_moves_what_is_counted(monkeypatch):
    """benchmarks/sharding_plan.py on 4 gloo ranks: collective calls and bytes of every rank, exactly."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))  # its processes import it by name
    plan = importlib.import_module("sharding_plan")
    ranks = plan.counted()
    for name, layout in plan.CHECKS.items():
        predicted = plan.predict(*layout)
        assert [rank[name][:2] for rank in ranks[: len(predicted)]] == predicted, name
        assert all(rank[name][2] == rank[name][0] + 1 for rank in ranks), name  # and the agreement of all ranks
    weights, (size,), _ = plan.CHECKS["cut evenly, 4 matrices on 4 ranks"]
    cost = plan.owners((weights,), plan.MACHINES["NVLink node"], plan.assign((weights,), size))
    assert cost.nbytes == 2 * (size - 1) / size**2 * weights.entries * plan.FLOAT
    assert plan.owners(*_aligned(plan)).nbytes == 0


def _aligned(plan):
    work = plan.WORKS["attention heads"][:1]
    return work, plan.MACHINES["NVLink node"], plan.assign(work, 32)
