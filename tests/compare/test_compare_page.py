"""What a comparison says, draws and shows, on results made by hand."""

import html.parser
import itertools
import math
import random
import re
import shutil

import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from manifold_opt.compare import html_report, methods, narrative, plots
from manifold_opt.compare.charts import charts
from manifold_opt.compare.overview import Overview
from manifold_opt.compare.results import Cost, Curve, Results, RunResult, TaskInfo

OWN = ("orthographic", "polar", "qr", "cayley", "exp", "cayley_iterative", "orthogonalizer")
PEERS = ("geoopt", "pogo", "torch", "geotorch", "penalty", "unconstrained")
ERRORS = {"cayley_iterative": 3e-5, "orthogonalizer": 2e-4, "penalty": 0.31, "unconstrained": 41.0}
SPEEDS = dict(zip(OWN + PEERS, (2.7, 2.9, 4.1, 3.6, 7.9, 4.4, 3.1, 5.2, 3.3, 9.4, 21.0, 2.2, 1.6), strict=True))
RATES = (1e-3, 1e-2, 1e-1, 1.0)


def run(task, scheme, seed, lr, final, *, floor=0.05, steps=400):
    """A run that learns, from a loss near 2, with some noise; what cannot be at its rate ends early."""
    noise = random.Random(f"{task} {scheme if scheme in ('penalty', 'unconstrained') else ''} {seed} {lr}")
    error = ERRORS.get(scheme, (2 + 0.3 * len(scheme)) * 1e-7)
    diverges = lr == 1.0 and scheme in ("unconstrained", "penalty", "geotorch", "cayley")
    curve = Curve()
    for step in range(2, steps // 4 if diverges else steps + 1, 2):
        loss = floor + 2 * math.exp(-step * min(lr, 0.1) ** 0.5 / 12) * noise.uniform(0.85, 1.15)
        curve.step.append(step)
        curve.loss.append(loss * (1.08**step if diverges else 1))
        curve.seconds.append(step * SPEEDS[scheme] / 1e3)
        curve.error.append(min(error * noise.uniform(0.6, 1.0) * min(1, step / 100 + 0.3), 1e30))
    row = RunResult(task, scheme, seed, lr, steps, peer=scheme in PEERS, curve=curve, orthogonality_error=error)
    if diverges:
        row.orthogonality_error = math.inf
        row.failure = f"FloatingPointError: diverged: the loss of step {steps // 4} is nan"
        return row
    row.final_loss, row.final = curve.loss[-1], final + noise.gauss(0, 0.004)
    row.step_ms = SPEEDS[scheme] * noise.uniform(0.97, 1.03) + 4
    row.step_quartiles = [0.97 * row.step_ms, 1.04 * row.step_ms]
    row.optimizer_ms = SPEEDS[scheme]
    row.steps_to_target, row.seconds_to_target = 120, curve.seconds[59] * noise.uniform(0.9, 1.1)
    row.clamped = 37.0 if scheme == "cayley_iterative" else 0.0
    return row


def example():
    """Two tasks, one of them swept; thirteen schemes, one of them not installed; three seeds; costs."""
    results = Results(
        environment={"python": "3.11.7", "torch": "2.13.0", "threads": 1, "machine": "x86_64", "commit": None},
        arguments={"command": "python -m manifold_opt compare --seeds 3", "seeds": [0, 1, 2], "rates": list(RATES)},
        tasks={
            "digits": TaskInfo(
                "digits", "Digits read row by row, a GRU with three orthogonal gates", "accuracy", 0.3,
                {"geoopt": "learning rate times sqrt(n): its second moment is one a matrix.",
                 "torch": "parametrized, so that the forward pass pays for the constraint."},
            ),
            "pca": TaskInfo("pca", "PCA: the 16 directions of most variance among 64", "gap", optimum=0.0,
                            resolution=1e-6),
        },
    )  # fmt: skip
    for seed in range(3):
        for scheme in OWN + PEERS:
            for lr in RATES:
                final = 0.9 - 0.02 * abs(math.log10(lr) + 2) - (0.05 if scheme in ("penalty", "orthogonalizer") else 0)
                results.rows.append(run("digits", scheme, seed, lr, final))
            results.rows.append(run("pca", scheme, seed, 1e-2, 0.03 + SPEEDS[scheme] / 500, floor=0.001, steps=300))
    for row in results.rows:
        if row.scheme == "pogo":
            row.failure, row.curve = "ModuleNotFoundError: No module named 'pogo'", Curve()
            row.final = row.final_loss = row.step_ms = row.optimizer_ms = row.orthogonality_error = None
            row.steps_to_target = row.seconds_to_target = None
        if row.scheme == "torch" and row.lr == 1.0:
            row.final = row.final_loss = math.nan
    for scheme in OWN + PEERS:
        for n in (32, 64, 128, 256, 512):
            results.costs.append(Cost(scheme, 1, n, n, SPEEDS[scheme] * (n / 128) ** 2.4 + 0.2))
        for count in (10, 100, 1000):
            results.costs.append(Cost(scheme, count, 32, 32, SPEEDS[scheme] * count**0.8 / 10))
    return results


def small(*runs, measure="loss", target=None, costs=()):
    """Results of one task, a run being (scheme, seed, final, and what else there is)."""
    rows = []
    for scheme, seed, final, more in runs:
        known = {"lr": 0.1, "final": final, "orthogonality_error": 1e-6, "peer": scheme in PEERS, **more}
        rows.append(RunResult("t", scheme, seed, steps=10, **known))
    return Results(tasks={"t": TaskInfo("t", "T", measure, target)}, rows=rows, costs=list(costs))


def seeds(scheme, finals, **more):
    return [(scheme, seed, final, more) for seed, final in enumerate(finals)]


# --- advice and verdicts


def advice(*runs, **more):
    return Overview(small(*runs, **more)).advice()


def verdicts(results):
    return {line.scheme: line.verdict for lines in Overview(results).table().values() for line in lines}


def timed(ms):
    return {"step_ms": ms, "step_quartiles": [0.98 * ms, 1.02 * ms]}


def test_the_default_is_kept_unless_an_exact_retraction_beats_it():
    default = seeds("orthographic", [0.5, 0.52], **timed(2.0))
    keep = "Keep the default, orthographic: no other exact retraction is better, or as good and faster."
    assert advice(*default, *seeds("qr", [0.51, 0.53], **timed(2.1))) == [keep]
    assert advice(*default, *seeds("qr", [0.9, 0.91], **timed(1.0))) == [keep]
    assert advice(*default, *seeds("orthogonalizer", [0.1, 0.11], **timed(1.0)), *seeds("qr", [0.9, 0.92])) == [keep]
    assert advice(*default, *seeds("qr", [0.1, 0.12], **timed(9.0))) == [
        "Try qr: the result is better than with the default, orthographic."
    ]
    assert advice(*default, *seeds("polar", [0.5, 0.52], **timed(1.5)), *seeds("qr", [0.5, 0.52], **timed(1.6))) == [
        "Try polar: as good as the default, orthographic, and 25 % less time per step."
    ]


def test_a_peer_that_is_better_is_named_and_not_recommended():
    runs = [*seeds("orthographic", [0.5, 0.52]), *seeds("qr", [0.5, 0.52]), *seeds("geoopt", [0.1, 0.12])]
    first, second = advice(*runs)
    assert first.startswith("Keep the default")
    assert second == "geoopt ended better on t. Compare several learning rates before you switch."
    swept = [(scheme, seed, 0.9, {"lr": 0.2}) for scheme, seed, _, _ in runs]
    assert advice(*runs, *swept)[1] == "geoopt ended better on t."


def test_the_price_of_the_constraint_is_told_where_it_can_be_told_apart():
    runs = [*seeds("orthographic", [0.5, 0.52], **timed(2.5)), *seeds("qr", [0.5, 0.52], **timed(2.5))]
    free = seeds("unconstrained", [0.1, 0.12], orthogonality_error=3.0, **timed(2.0))
    assert advice(*runs, *free)[1:] == [
        "A training step with orthographic takes 25 % more time than without a constraint."
    ]
    wide = [(scheme, seed, final, {**more, "step_quartiles": [1.0, 3.0]}) for scheme, seed, final, more in free]
    assert advice(*runs, *wide)[1:] == []


def test_verdicts_compare_result_and_time_with_the_default():
    results = small(
        *seeds("qr", [0.5, 0.52], **timed(2.05)),
        *seeds("orthographic", [0.5, 0.52], **timed(2.0)),
        *seeds("exp", [0.4, 0.42], **timed(3.0)),
        *seeds("polar", [0.6, 0.62], **timed(1.0)),
        *seeds("orthogonalizer", [0.5, 0.52], orthogonality_error=0.1),
        ("pogo", 0, None, {"failure": "ModuleNotFoundError: No module named 'pogo'", "orthogonality_error": None}),
        ("geoopt", 0, None, {"failure": "RuntimeError: no", "orthogonality_error": None}),
        *seeds("torch", [math.nan, 0.5]),
    )
    assert verdicts(results) == {
        "orthographic": "our default", "qr": "as good, as fast", "exp": "better, slower", "polar": "worse, faster",
        "orthogonalizer": "not orthogonal", "geoopt": "failed", "pogo": "not installed", "torch": "no finite result",
    }  # fmt: skip
    assert list(Overview(results).table()) == list(methods.GROUPS[:3])


def test_a_method_that_is_better_on_one_task_and_worse_on_another_is_mixed():
    results = small(*seeds("orthographic", [0.5, 0.52]), *seeds("qr", [0.1, 0.12]))
    results.tasks["u"] = TaskInfo("u", "U", "accuracy")
    results.rows += [RunResult("u", s, k, 0.1, 10, final=f + k / 100, orthogonality_error=1e-6)
                     for s, f in (("orthographic", 0.9), ("qr", 0.5)) for k in (0, 1)]  # fmt: skip
    assert verdicts(results)["qr"] == "mixed"


def test_differences_of_rounding_decide_nothing():
    results = small(*seeds("orthographic", [5e-8, 5.001e-8]), *seeds("qr", [1e-9, 1.001e-9]), measure="gap")
    assert verdicts(results)["qr"].startswith("better")
    results.tasks["t"].resolution = 1e-6
    assert verdicts(results)["qr"].startswith("as good")
    assert {line.results[0] for line in Overview(results).table()["Ours, exact"]} == {"below 1.0e-6"}


@pytest.mark.parametrize("count", [1, 3])
def test_seeds_without_a_spread_rank_nothing(count):
    results = small(*seeds("orthographic", [0.9] * count, **timed(2.0)), *seeds("qr", [0.1] * count, **timed(1.0)))
    assert Overview(results).advice() == [
        "Not ranked: that takes two or more seeds with different results.",
        "By time alone, qr is faster than orthographic.",
    ]
    assert verdicts(results)["qr"] == "faster"


def test_seeds_that_end_alike_by_chance_are_seeds():
    """An accuracy is one of few numbers; the losses tell that these were different runs."""
    results = small(*seeds("orthographic", [0.5, 0.5]), *seeds("qr", [0.7, 0.7]), measure="accuracy")
    for row in results.rows:
        row.final_loss = row.seed + 1.0
    assert verdicts(results)["qr"].startswith("better")


def test_without_the_default_the_first_that_ended_well_is_the_reference():
    results = small(*seeds("qr", [math.inf, 0.5]), *seeds("exp", [0.5, 0.6]), *seeds("geoopt", [0.1, 0.11]))
    assert verdicts(results) == {"qr": "no finite result", "exp": "reference", "geoopt": "better"}
    assert Overview(results).advice()[0] == "Keep exp: no other exact retraction was compared to the end."
    assert advice(*seeds("geoopt", [0.1, 0.2])) == ["No exact retraction of manifold_opt was compared."]
    (lost,) = advice(("qr", 0, 0.5, {"orthogonality_error": 1.0}))
    assert lost.startswith("No method ended with orthogonal weights")


def test_costs_alone_name_the_fastest_exact_retraction():
    costs = [Cost("orthographic", 1, 8, 8, 0.5), Cost("qr", 1, 8, 8, 0.25), Cost("geoopt", 1, 8, 8, 0.1)]
    assert Overview(Results(costs=costs)).advice() == [
        "The fastest exact retraction on a matrix of 8 x 8: qr, 0.250 ms; the default, orthographic, 0.500 ms."
    ]
    assert Overview(Results()).advice() == ["Nothing was measured."]


def test_wide_timings_are_a_warning():
    narrow = small(*seeds("orthographic", [0.5, 0.6], **timed(2.0)))
    assert Overview(narrow).warnings() == []
    wide = small(*seeds("orthographic", [0.5, 0.6], step_ms=2.0, step_quartiles=[1.5, 2.5]))
    wide.environment["load"] = 7.5
    (warning,) = Overview(wide).warnings()
    assert "50 % of the median apart; load of the machine 7.5" in warning
    narrow.costs = [Cost("qr", 1, 8, 8, 1.0, [0.5, 1.5])]
    assert len(Overview(narrow).warnings()) == 1


# --- words


def test_failures_are_named():
    results = small(
        ("pogo", 0, None, {"failure": "ModuleNotFoundError: No module named 'pogo'", "orthogonality_error": None}),
        ("qr", 0, None, {"orthogonality_error": math.nan}),
        ("polar", 0, None, {"failure": "FloatingPointError: diverged", "orthogonality_error": 1e-6}),
        ("polar", 0, 0.5, {"lr": 0.2}),
        ("unconstrained", 0, 0.5, {"orthogonality_error": 3.0}),
    )
    assert narrative.problems(results, "t") == [
        "pogo failed in 1 of 1 runs: ModuleNotFoundError: No module named 'pogo'",
        "qr ended without a finite loss in 1 of 1 runs.",
        "polar failed in 1 of 2 runs (lr 0.1): FloatingPointError: diverged",
        "Left the manifold, with an error above 0.001 at some step: qr (not a number).",
    ]


def test_costs_that_failed_are_named():
    costs = [Cost("qr", 10, 8, 8, 0.5), Cost("exp", 10, 8, 8, failure="RuntimeError: no memory")]
    assert narrative.cost_problems(Results(costs=costs)) == [
        "exp was not timed for 10 x 8 x 8: RuntimeError: no memory"
    ]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"), (1.0, "1"), (0.12345, "0.123"), (12345.6, "12346"), (1.234e-7, "1.2e-7"), (-2e8, "-2.0e8"),
        (1e-10, "1.0e-10"), (math.inf, "infinite"), (-math.inf, "minus infinite"), (math.nan, "not a number"),
        (None, ""),
    ],
)  # fmt: skip
def test_numbers(value, said):
    assert narrative.number(value) == said


@pytest.mark.parametrize(
    ("mean", "spread", "said"),
    [
        (0.91234, 0.0123, "0.91 ± 0.01"), (3.5e-7, 2e-8, "(3.5 ± 0.2)e-7"), (12.3, 0.0, "12.3 ± 0"),
        (-0.065, 1e-9, "-0.065 ± 1.0e-9"), (math.inf, math.nan, "infinite ± not a number"), (250.4, 31.0, "250 ± 31"),
    ],
)  # fmt: skip
def test_mean_and_spread(mean, spread, said):
    assert narrative.plus_minus(mean, spread) == said


# --- plots


def test_figures_have_their_names_and_methods_their_looks(tmp_path):
    results = example()
    names = ["digits-loss", "digits-seconds", "digits-error", "digits-rates", "digits-rates-error", "pca-loss",
             "pca-seconds", "pca-error", "cost", "cost-count"]  # fmt: skip
    assert list(charts(results)) == names
    assert [path.name for path in plots.save(results, tmp_path / "new")] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "new").iterdir())
    looks = {scheme: plots.look(scheme, OWN + PEERS) for scheme in OWN + PEERS}
    for group in methods.GROUPS:
        some = [str(look) for scheme, look in looks.items() if methods.group_of(scheme) == group]
        assert len(set(some)) == len(some)
    assert all((look["color"] in plots.BLUES) == (scheme in OWN) for scheme, look in looks.items())


def test_a_panel_names_its_methods_at_the_line_ends_and_no_two_names_overlap():
    chart = charts(example())["pca-loss"]
    assert list(plots.panels(chart)) == ["manifold_opt", "Other packages", "Not kept orthogonal"]
    made = plots.figure(chart, list(plots.panels(chart)))
    for axes, schemes in zip(made.axes, plots.panels(chart).values(), strict=True):
        heights = {text.get_text(): text.get_position()[1] for text in axes.texts if text.get_text() in schemes}
        assert set(heights) == set(schemes)
        ordered = sorted(heights.values())
        assert all(b - a > 0.99 * plots.LABEL_GAP for a, b in itertools.pairwise(ordered))
        assert axes.get_yscale() == "log"
    assert len({axes.get_ylim() for axes in made.axes}) == 1


def test_a_gap_is_drawn_above_the_optimum_and_ends_below_it():
    results = small(
        *seeds("qr", [0.0, 0.0]), *seeds("unconstrained", [-1.0, -1.0], orthogonality_error=9.0), measure="gap"
    )
    results.tasks["t"].optimum, results.tasks["t"].resolution = 2.0, 1e-6
    for row in results.rows:
        row.curve = Curve([1, 2, 3], [3.0, 2.5, 2.0 if row.scheme == "qr" else 1.0], [0.1, 0.2, 0.3], [1e-7] * 3)
    chart = charts(results)["t-loss"]
    assert chart.lines["qr"].y == [1.0, 0.5, 1e-6]
    assert chart.lines["unconstrained"].y[:2] == [1.0, 0.5]
    assert math.isnan(chart.lines["unconstrained"].y[2])
    assert "A line ends where" in chart.note


def test_an_error_that_is_not_finite_has_no_point_and_a_huge_one_is_cut():
    results = small(("qr", 0, 0.5, {}), ("polar", 0, 0.5, {"orthogonality_error": math.inf}),
                    ("qr", 0, 0.5, {"lr": 0.2}),
                    ("polar", 0, 0.5, {"lr": 0.2, "orthogonality_error": 1e9}))  # fmt: skip
    results.rows[0].curve = Curve([1, 2, 3], [1.0] * 3, [0.1] * 3, [1e-7, math.nan, 1e9])
    first, second, third = charts(results)["t-error"].lines["qr"].y
    assert (first, third) == (1e-7, 1e4)
    assert math.isnan(second)
    first, second = charts(results)["t-rates-error"].lines["polar"].y
    assert math.isnan(first)
    assert second == 1e4


def test_what_runs_away_beside_the_manifold_leaves_the_picture():
    results = small(
        *seeds("unconstrained", [-1e6, -2e6], orthogonality_error=1e5),
        *seeds("qr", [0.1, 0.2]),
        *seeds("unconstrained", [-1e3, -2e3], orthogonality_error=1e5, lr=0.2),
        *seeds("qr", [0.1, 0.3], lr=0.2),
    )
    for row in results.rows:
        row.curve = Curve([1, 2], [1.0, row.final], [0.1, 0.2], [1e-7, row.orthogonality_error])
    for name in ("t-loss", "t-rates"):
        low, high = plots.figures(results)[name].axes[-1].get_ylim()
        assert -1 <= low < high <= 2


def test_every_colour_is_seen_on_light_and_dark():
    def luminance(colour):
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for pair in (plots.BLUES | plots.GREYS).items():
        for colour, ground in zip(pair, ("#ffffff", "#15181c"), strict=True):
            dark, light = sorted((luminance(colour), luminance(ground)))
            assert (light + 0.05) / (dark + 0.05) >= 3, (colour, ground)


@pytest.mark.parametrize(
    "loss", [[2.0, 1.5, math.nan], [math.inf] * 3, [-1.0, -2.0, -3.0], [2.0, 1e20, 1e30], [0.0] * 3]
)
def test_any_curve_can_be_drawn(loss):
    results = small(*seeds("qr", [0.5, 0.6]), ("exp", 0, None, {"failure": "no"}), ("exp", 0, 0.5, {"lr": 1.0}))
    for row in results.rows:
        row.curve = Curve(
            [1, 2, 3], loss, [0.1, 0.2, 0.3], [0.0, math.inf, math.nan] if row.seed else [1e-7, 1e9, 1e-3]
        )
    drawn = plots.figures(results)
    assert "t-rates" in drawn
    assert ("t-loss" in drawn) == any(map(math.isfinite, loss))
    html_report.html(results)


def test_an_svg_is_of_the_page():
    made = plots.figure(charts(example())["pca-loss"], ["manifold_opt"])
    made.set_label('a "loss"')
    text = plots.svg(made, prefix="one")
    assert text.startswith("<svg viewBox=")
    assert 'role="img" aria-label="a &quot;loss&quot;"' in text
    assert "currentColor" in text
    assert f"var({plots.css_name(next(iter(plots.BLUES)))})" in text
    assert not any(colour in text for colour in (plots.INK, *plots.BLUES, *plots.GREYS))
    assert all(name.startswith("one-") for name in re.findall(r'\bid="([^"]*)"', text))
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', text)) <= set(re.findall(r'\bid="([^"]*)"', text))
    assert not re.search(r"<\?xml|<!DOCTYPE|<metadata|<style|font:", text)


# --- page


class Read(html.parser.HTMLParser):
    """The ids of a page, what it would load, and how many scripts it has."""

    def __init__(self, text):
        super().__init__()
        self.ids, self.loads, self.scripts = [], [], 0
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.scripts += tag == "script"
        self.ids += [attrs["id"]] if "id" in attrs else []
        self.loads += [value for name, value in attrs.items() if name in ("src", "href", "xlink:href")]


def test_the_page_is_whole():
    results = example()
    text = html_report.html(results)
    read = Read(text)
    assert len(read.ids) == len(set(read.ids))
    assert all(value.startswith("#") or value == "data:," for value in read.loads)
    assert read.scripts == 0
    for said in ("python -m manifold_opt compare --seeds 3", "2.13.0", "sqrt(n)", "No module named"):
        assert said in text
    unbroken = text.replace("\u00a0", " ")
    assert all(line in unbroken for line in Overview(results).advice())


def test_columns_that_say_nothing_are_left_out():
    results = small(*seeds("qr", [0.1, 0.2], **timed(2.0)), *seeds("polar", [0.1, 0.2], **timed(2.0)))
    (task,) = results.tasks
    overview = Overview(results)
    assert html_report._details(results, task, overview).head == ["Method", "Step, ms"]
    results.rows[0].clamped = 3
    assert html_report._details(results, task, Overview(results)).head == ["Method", "Step, ms", "Steps shortened"]
    assert "none" not in re.sub(
        r"<style.*?</style>|<meta[^>]*>|style=\"[^\"]*\"", "", html_report.html(results), flags=re.S
    )


def test_pages_of_little():
    for results in (
        Results(),
        Results(tasks={"t": TaskInfo("t", "T")}, interrupted=True),
        small(("pogo", 0, None, {"failure": "gone", "orthogonality_error": None})),
        small(("qr", 0, None, {"orthogonality_error": math.inf}), target=0.1),
        Results(costs=[Cost("qr", 1, 8, 8, 0.5)], environment={"commit": None, "nested": {"a": [1]}}),
    ):
        assert "</html>" in html_report.html(results)


def test_nothing_is_injected():
    bad = "<script>alert(1)</script>\"'>&$x_1$"
    results = small((bad, 0, 0.5, {"failure": bad}), ("qr", 0, 0.5, {}), ("_low$", 0, 0.4, {"step_ms": 1.0}))
    for row in results.rows:
        row.curve = Curve([1, 2], [1.0, 0.5], [0.1, 0.2], [1e-6, 1e-6])
    results.tasks["t"].title = results.tasks["t"].notes[bad] = bad
    results.arguments = {"command": bad, bad: bad}
    results.environment = {bad: [bad]}
    results.costs = [Cost(bad, 1, n, n, 1.0) for n in (8, 16)]
    text = html_report.html(results)
    assert "<script>alert" not in text
    assert Read(text).scripts == 0
    for made in plots.figures(results).values():
        made.draw_without_rendering()


# --- browser


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium on the path")
    off = ("background-networking", "component-update", "sync", "quic", "gpu")
    options = ["--no-sandbox", "--no-first-run", *(f"--disable-{name}" for name in off)]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    path.write_text(html_report.html(example()), encoding="utf-8")
    return path.as_uri()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_opens_alone_and_fits(chromium, address, scheme, width):
    tab = chromium.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    said, asked = [], []
    tab.on("console", lambda message: said.append(message.text))
    tab.on("pageerror", lambda error: said.append(str(error)))
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address)
    tab.wait_for_load_state("networkidle")
    assert said == []
    assert [url for url in asked if url != "data:,"] == [address]
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.querySelectorAll('.panel svg')].every(s => s.clientWidth > 250)")
    inside = "[...document.querySelectorAll('svg text')].every(t => t.getBoundingClientRect().right <= innerWidth)"
    assert tab.evaluate(inside)
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    tab.close()


def test_the_advice_and_the_default_come_first(chromium, address):
    tab = chromium.new_page(viewport={"width": 1280, "height": 900})
    tab.goto(address)
    assert tab.inner_text(".advice").startswith("Keep the default, orthographic")
    first = tab.query_selector("#overview tbody tr:not(.group)")
    assert first.query_selector("th").inner_text() == "orthographicdefault"
    assert tab.evaluate("document.querySelector('#overview').getBoundingClientRect().bottom") < 900  # without scrolling
    groups = [one.inner_text() for one in tab.query_selector_all("#overview .group th")]
    assert groups == list(methods.GROUPS)
    tab.close()


def test_on_a_phone_the_table_scrolls_and_its_first_column_stays(chromium, address):
    tab = chromium.new_page(viewport={"width": 390, "height": 844})
    tab.goto(address)
    left = "document.querySelector('#overview tbody th[scope=row]').getBoundingClientRect().left"
    last = "document.querySelector('#overview thead th:last-child').getBoundingClientRect().right"
    before = tab.evaluate(left)
    assert tab.evaluate(last) > 390
    tab.evaluate("document.querySelector('#overview').parentElement.scrollLeft = 1e4")
    assert tab.evaluate(left) == before
    assert tab.evaluate(last) <= 390
    tab.close()
