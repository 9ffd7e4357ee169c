"""What a comparison says, draws and shows, on results made by hand."""

import html.parser
import math
import random
import re
import shutil

import pytest

pytest.importorskip("jinja2", reason="jinja2 is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from manifold_opt.compare import html_report, narrative, plots
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
            "pca": TaskInfo("pca", "PCA: the 16 directions of most variance among 64", "gap"),
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
            results.costs.append(Cost(scheme, "n", 4, n, n, SPEEDS[scheme] * (n / 128) ** 2.4 + 0.2, 1e-6))
        for count in (1, 10, 100, 1000):
            results.costs.append(Cost(scheme, "count", count, 32, 32, SPEEDS[scheme] * count**0.8 / 10, 1e-6))
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


# --- words


def test_the_best_beyond_the_spread_is_named_and_the_best_retraction_beside_a_peer():
    results = small(*seeds("qr", [0.52, 0.50, 0.54]), *seeds("geoopt", [0.11, 0.10, 0.12]))
    assert narrative.verdict(results, "t") == [
        "Best final loss with orthogonal weights: geoopt, 0.1100 ± 0.0082.",
        "The best retraction of manifold_opt is qr, 0.520 ± 0.016.",
    ]


def test_within_the_spread_nothing_is_ranked():
    results = small(
        *seeds("qr", [0.90, 0.92], step_ms=4.0),
        *seeds("polar", [0.89, 0.92], step_ms=2.0),
        *seeds("exp", [0.50, 0.52], step_ms=1.0),
        measure="accuracy",
    )
    assert narrative.verdict(results, "t") == [
        "The final accuracy does not separate qr and polar: the differences are within the spread.",
        "Of these, polar has the shortest training step, 2 ms.",
    ]


def test_differences_of_rounding_decide_nothing():
    results = small(*seeds("qr", [1e-9, 1.001e-9]), *seeds("polar", [5e-8, 5.001e-8]))
    assert narrative.verdict(results, "t")[0].startswith("Best final loss with orthogonal weights: qr")
    results.tasks["t"].resolution = 1e-6
    assert narrative.verdict(results, "t")[0].startswith("The final loss does not separate qr and polar")


def test_a_scheme_that_failed_once_is_the_best_of_nothing():
    fast = ("qr", 0, 0.5, {"step_ms": 1.0}), ("qr", 1, None, {"failure": "diverged"})
    lines = small(*fast, *seeds("polar", [0.5, 0.6], step_ms=2.0)).summaries("t")
    assert ["step_ms" in line.best for line in lines] == [False, True]


@pytest.mark.parametrize("count", [1, 3])
def test_seeds_without_a_spread_rank_nothing(count):
    results = small(*seeds("qr", [0.1] * count), *seeds("polar", [0.9] * count))
    assert narrative.verdict(results, "t") == [
        "Ranking the schemes by final loss takes at least two seeds with different results.",
    ]


def test_what_left_the_manifold_is_no_best():
    results = small(*seeds("unconstrained", [0.01, 0.02], orthogonality_error=12.0), *seeds("qr", [0.5, 0.6]))
    assert narrative.verdict(results, "t") == ["Best final loss with orthogonal weights: qr, 0.550 ± 0.050."]
    assert narrative.problems(results, "t") == [
        "Left the manifold, with an error above 0.001 at some step: unconstrained (12).",
    ]


def test_what_runs_away_beside_the_manifold_leaves_the_picture():
    results = small(
        *seeds("unconstrained", [-1e6, -2e6], orthogonality_error=1e5),
        *seeds("qr", [0.1, 0.2]),
        *seeds("unconstrained", [-1e3, -2e3], orthogonality_error=1e5, lr=0.2),
        *seeds("qr", [0.1, 0.3], lr=0.2),
        measure="gap",
    )
    for row in results.rows:
        row.curve = Curve([1, 2], [1.0, row.final], [0.1, 0.2], [1e-7, row.orthogonality_error])
    for name in ("t-loss", "t-rates"):
        low, high = plots.figures(results)[name].axes[-1].get_ylim()
        assert -1 <= low < high <= 2


def test_failures_are_named():
    results = small(
        ("pogo", 0, None, {"failure": "ModuleNotFoundError: No module named 'pogo'", "orthogonality_error": None}),
        ("qr", 0, None, {"orthogonality_error": math.nan}),
    )
    assert narrative.verdict(results, "t") == ["No scheme ended with orthogonal weights and a finite loss."]
    assert narrative.problems(results, "t") == [
        "pogo failed in 1 of 1 runs: ModuleNotFoundError: No module named 'pogo'",
        "qr ended without a finite loss in 1 of 1 runs.",
        "Left the manifold, with an error above 0.001 at some step: qr (not a number).",
    ]


@pytest.mark.parametrize("final", [math.nan, math.inf, -math.inf])
def test_a_final_measure_that_is_not_finite_is_no_result(final):
    results = small(*seeds("qr", [final, 0.5]), *seeds("exp", [0.5, 0.6]))
    assert narrative.verdict(results, "t") == ["Best final loss with orthogonal weights: exp, 0.550 ± 0.050."]
    assert narrative.problems(results, "t") == ["qr ended without a finite loss in 1 of 2 runs."]
    assert "did not end with a finite measure" in html_report.html(results)


def test_costs_that_failed_are_named():
    costs = [Cost("qr", "count", 10, 8, 8, 0.5), Cost("exp", "count", 10, 8, 8, failure="RuntimeError: no memory")]
    assert narrative.cost_problems(Results(costs=costs)) == [
        "exp was not timed for 10 x 8 x 8: RuntimeError: no memory"
    ]


def test_nothing_to_say():
    assert narrative.cost_problems(Results()) == []
    assert narrative.verdict(Results(tasks={"t": TaskInfo("t", "T")}), "t") == ["Nothing was measured."]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0, "0"), (1.0, "1"), (0.12345, "0.123"), (12345.6, "12346"), (1.234e-7, "1.2e-7"), (-2e8, "-2.0e8"),
        (1e-10, "1.0e-10"), (math.inf, "infinite"), (-math.inf, "minus infinite"), (math.nan, "not a number"),
        (None, "none"),
    ],
)  # fmt: skip
def test_numbers(value, said):
    assert narrative.number(value) == said


@pytest.mark.parametrize(
    ("mean", "spread", "said"),
    [
        (0.91234, 0.0123, "0.912 ± 0.012"), (3.5e-7, 2e-8, "(3.50 ± 0.20)e-7"), (12.3, 0.0, "12.3 ± 0"),
        (-0.065, 1e-9, "-0.065 ± 1.0e-9"), (math.inf, math.nan, "infinite ± not a number"), (250.4, 31.0, "250 ± 31"),
    ],
)  # fmt: skip
def test_mean_and_spread(mean, spread, said):
    assert narrative.plus_minus(mean, spread) == said


# --- plots


def test_figures_have_their_names_and_schemes_their_looks(tmp_path):
    results = example()
    names = ["digits-loss", "digits-error", "digits-rates", "pca-loss", "pca-error", "cost", "cost-error"]
    assert list(plots.figures(results)) == names
    assert [path.name for path in plots.save(results, tmp_path / "new")] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "new").iterdir())
    drawn = plots.styles(results)
    assert len({(style.colour, style.marker, style.dash) for style in drawn.values()}) == len(drawn)
    assert all((drawn[scheme].dash is None) == (scheme in OWN) for scheme in drawn)


def test_every_colour_is_seen_on_light_and_dark():
    def luminance(colour):
        parts = (int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5))
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for colour in plots.COLOURS[1:]:  # the first is that of the text
        for ground in ("#ffffff", "#15181c"):
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
    assert {"t-loss", "t-rates"} <= set(plots.figures(results))
    html_report.html(results)


def test_an_svg_is_of_the_page():
    panel = next(iter(plots.panels(example()).values()))[0]
    made = plots.figure([panel], plots.styles(example()))
    made.set_label('a "loss"')
    text = plots.svg(made, prefix="one")
    assert text.startswith("<svg viewBox=")
    assert 'role="img" aria-label="a &quot;loss&quot;"' in text
    assert "currentColor" in text
    assert plots.INK not in text
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
    assert read.scripts == 1
    for said in ("python -m manifold_opt compare --seeds 3", "2.13.0", "sqrt(n)", "No module named"):
        assert said in text
    unbroken = text.replace("\u00a0", " ")
    for line in narrative.verdict(results, "pca"):
        assert line in unbroken


def test_the_best_are_marked_for_eyes_and_ears():
    results = small(
        *seeds("qr", [0.90, 0.92], step_ms=4.0),
        *seeds("polar", [0.89, 0.92], step_ms=2.0),
        *seeds("exp", [0.5, 0.6], step_ms=3.0),
        measure="accuracy",
    )
    text = html_report.html(results)
    assert '<strong>0.910 ± 0.010</strong><span class="hidden"> (best)</span>' in text
    assert '<strong>0.905 ± 0.015</strong><span class="hidden"> (not told apart from the best)</span>' in text
    assert "<strong>2</strong>" in text
    assert "<strong>0.550" not in text
    assert 'data-column="lr"' not in text
    assert 'data-column="seconds_to_target"' not in text


def test_pages_of_little():
    for results in (
        Results(),
        Results(tasks={"t": TaskInfo("t", "T")}, interrupted=True),
        small(("pogo", 0, None, {"failure": "gone", "orthogonality_error": None})),
        small(("qr", 0, None, {"orthogonality_error": math.inf}), target=0.1),
        Results(costs=[Cost("qr", "n", 1, 8, 8, 0.5)], environment={"commit": None, "nested": {"a": [1]}}),
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
    results.costs = [Cost(bad, "n", 1, n, n, 1.0) for n in (8, 16)]
    text = html_report.html(results)
    assert "<script>alert" not in text
    assert Read(text).scripts == 1
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


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 390)])
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
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    assert tab.evaluate("[...document.querySelectorAll('.panel svg')].every(s => s.clientWidth > 250)")
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    tab.close()


def column(table, index):
    """What the cells of a column have to sort by, from top to bottom."""
    return table.evaluate("(t, i) => [...t.tBodies[0].rows].map(r => r.cells[i].dataset.value ?? null)", index)


def test_tables_sort(chromium, address):
    tab = chromium.new_page()
    tab.goto(address)
    for table in tab.query_selector_all("table"):
        for i, head in enumerate(table.query_selector_all("thead th")):
            numeric = "number" in (head.get_attribute("class") or "")
            button = head.query_selector("button")
            for how, descending in (("ascending", False), ("descending", True)):
                button.click()
                assert head.get_attribute("aria-sort") == how
                values = column(table, i)
                known = [float(v) if numeric else v for v in values if v is not None]
                assert known == sorted(known, reverse=descending)
                assert values[len(known) :] == [None] * (len(values) - len(known))
        assert len(table.query_selector_all("[aria-sort]")) == 1
    tab.close()


@pytest.mark.parametrize("key", ["Enter", "Space"])
def test_the_keyboard_sorts_too(chromium, address, key):
    tab = chromium.new_page()
    tab.goto(address)
    head = tab.query_selector("th[data-column=step_ms]")
    head.query_selector("button").focus()
    tab.keyboard.press(key)
    assert head.get_attribute("aria-sort") == "ascending"
    tab.keyboard.press(key)
    assert head.get_attribute("aria-sort") == "descending"
    index = head.evaluate("h => h.cellIndex")
    known = [float(value) for value in column(tab.query_selector("table"), index) if value is not None]
    assert known == sorted(known, reverse=True)
    assert len(known) == len(OWN) + len(PEERS) - 1  # one failed
    tab.close()
