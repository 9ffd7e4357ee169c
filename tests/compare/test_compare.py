"""The comparison: one start, the same batches, the same effective step for all; interrupted or not, the same rows."""

import gzip
import importlib.util
import itertools
import json
import math
import subprocess
import sys
from dataclasses import asdict

import pytest
import torch
from torch import nn

import manifold_opt
from manifold_opt import RETRACTIONS, mark_orthogonal, orthogonality_error
from manifold_opt.__main__ import main as command_line
from manifold_opt.compare import Comparison, cli, compare, cost, data, estimate, methods, runner, tasks
from manifold_opt.compare.blocks import ExternalBlocks, marked_parameters
from manifold_opt.compare.experiment import Experiment, NoProgress
from manifold_opt.compare.methods import PEERS, Settings, build
from manifold_opt.compare.results import Cost, Results, compare_finals, quartiles
from manifold_opt.stiefel import geometry

from ..helpers import gaussian

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what peers import is theirs

LIBRARIES = {"geoopt": "geoopt", "pogo": "pogo", "geotorch": "geotorch"}


def installed(scheme):
    if scheme in LIBRARIES and importlib.util.find_spec(LIBRARIES[scheme]) is None:
        pytest.skip(f"{scheme} is not installed")
    return scheme


class One(nn.Module):
    """A marked matrix and a free vector."""

    def __init__(self, start, **mark):
        super().__init__()
        self.weight = nn.Parameter(start)
        self.bias = nn.Parameter(torch.zeros(3, dtype=start.dtype))
        mark_orthogonal(self, "weight", **mark)


def moved(scheme, shape, settings, gain=1.0):
    """How far the first step goes, per learning rate."""
    start = geometry.random(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    model = One(gain * start, gain=gain)
    method = build(scheme, model, settings)
    (before,) = (blocks.clone() for blocks in method.matrices())
    g = gaussian(*shape)
    ((model.weight * g).sum() + model.bias.sum()).backward()
    for opt in method.optimizers:
        opt.step()
    (after,) = method.matrices()
    assert not torch.equal(model.bias, torch.zeros(3))
    return float((after - before).norm()) / settings.lr


# Adapters.


@pytest.mark.parametrize("scheme", ["geoopt", "pogo", "torch", "geotorch"])
@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
@pytest.mark.parametrize("shape", [(24, 24), (12, 36)])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_peer_takes_as_long_a_step_as_ours(scheme, metric, shape, optimizer):
    settings = Settings(optimizer, 1e-6, metric=metric)
    ratio = moved(installed(scheme), shape, settings) / moved("polar", shape, settings)
    if optimizer == "adam":  # which entries are how long differs: only the whole can be alike
        assert 0.85 <= ratio <= 1.5
    elif shape[0] == shape[1] or (metric == "canonical") == (scheme != "geoopt"):
        assert ratio == pytest.approx(1, rel=1e-3)
    else:  # rotations and the rest count differently
        assert 0.75 <= ratio <= 1.3


def test_the_second_moment_is_that_of_our_adam():
    lengths = [moved("polar", (6, 9), Settings("adam", 1e-6, second_moment=kind)) for kind in ("element", "block")]
    assert lengths[1] == pytest.approx((6 * 9) ** 0.5, rel=1e-3)
    assert lengths[0] != pytest.approx(lengths[1], rel=1e-3)


@pytest.mark.parametrize(("shape", "mark"), [
    ((12, 4), {"blocks": 3}), ((9, 4), {}), ((4, 12), {"blocks": 3, "dim": 1}), ((4, 3, 5), {}),
    ((6, 2, 2), {"blocks": 2}), ((300, 150), {"blocks": 2}),
    ((10, 8), {"blocks": 2, "gain": 2.0}), ((8, 8), {"blocks": 2}),
])  # fmt: skip
@pytest.mark.parametrize("tall", [False, True])
def test_what_a_peer_holds_is_the_parameter(shape, mark, tall):
    model = One(gaussian(*shape), **mark)
    (place,) = marked_parameters(model)
    held = ExternalBlocks(place, tall=tall)
    torch.testing.assert_close(held(model.weight), model.weight, rtol=0, atol=1e-14)
    torch.testing.assert_close(held.blocks(), place.blocks(), rtol=0, atol=1e-14)


@pytest.mark.parametrize("scheme", [*RETRACTIONS, *PEERS])
def test_every_scheme_learns_through_an_nn_gru(scheme):
    """Marked gates, whoever holds them: the net computes with what is stepped, and everything else is stepped too."""
    torch.manual_seed(0)
    task = tasks.copying("gru", 6)
    model = task.make_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    method = build(installed(scheme), model, Settings(lr=1e-2))
    batch = next(task.batches())
    first = task.loss(model, batch)
    for _ in range(5):
        for opt in method.optimizers:
            opt.zero_grad()
        loss = task.loss(model, batch) + (method.penalty() if method.penalty else 0)
        loss.backward()
        for opt in method.optimizers:
            opt.step()
    assert task.loss(model, batch) < first
    for name, p in model.named_parameters():
        if name in before and "weight_hh" not in name:
            assert not torch.equal(p, before[name])
    if scheme not in ("unconstrained", "penalty"):
        assert all(float(geometry.error(blocks).max()) < 1e-3 for blocks in method.matrices())


@pytest.mark.parametrize("scheme", ["geoopt", "pogo", "torch", "geotorch"])
@pytest.mark.parametrize("gain", [0.5, 2.0])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_gain_makes_no_difference_to_that(scheme, gain, optimizer):
    settings = Settings(optimizer, 1e-7)
    ratios = [moved(installed(scheme), (8, 8), settings, g) / moved("polar", (8, 8), settings, g) for g in (1.0, gain)]
    assert ratios[1] == pytest.approx(ratios[0], rel=0.02)


@pytest.mark.parametrize("scheme", [*PEERS, "polar"])
def test_tied_weights_stay_tied(scheme):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    mark_orthogonal(model, "0.weight")
    method = build(installed(scheme), model, Settings(lr=0.1))
    for _ in range(2):
        for opt in method.optimizers:
            opt.zero_grad()
        model(torch.ones(2, 5)).square().sum().backward()
        for opt in method.optimizers:
            opt.step()
    assert torch.equal(model[0].weight, model[2].weight)
    assert len(method.matrices()) == 1


@pytest.mark.parametrize("scheme", ["polar", "unconstrained", "geoopt", "torch"])
def test_rates_of_orthogonal_weights_are_scaled(scheme):
    method = build(installed(scheme), One(torch.eye(4)), Settings("sgd", 1e-2, 0.1))
    rates = {
        group["lr"] * group.get("orthogonal_lr_scale", 1) for opt in method.optimizers for group in opt.param_groups
    }
    expected = {1e-3} if scheme == "polar" else {1e-2, {"torch": 0.5e-3}.get(scheme, 1e-3)}
    assert sorted(rates) == pytest.approx(sorted(expected))


def test_what_a_peer_does_not_move_has_no_gradient():
    model = One(torch.eye(4))
    build("torch", model, Settings())
    (model.weight.sum() + model.bias.sum()).backward()
    assert model.parametrizations.weight.original.grad is None


def test_notes_say_by_what_rates_were_multiplied():
    for scheme, settings, said in (
        ("pogo", Settings("adam"), "lr times 5.66 (4 x 4)"),
        ("pogo", Settings("adam", metric="canonical"), "lr times 11.3 (4 x 4)"),
        ("geoopt", Settings("adam"), "lr times 4 (4 x 4)"),
        ("torch", Settings("sgd"), "lr times 0.5 (4 x 4)"),
    ):
        if scheme not in LIBRARIES or importlib.util.find_spec(LIBRARIES[scheme]):
            assert said in build(scheme, One(torch.eye(4)), settings).note
    assert "lr times" not in build("torch", One(torch.eye(4)), Settings("sgd", metric="canonical")).note


def test_the_penalty_by_hand():
    """W = 2 I: ||I - 4 I||_F^2 = 9 n."""
    model = One(torch.eye(4))
    method = build("penalty", model, Settings(penalty=0.5))
    with torch.no_grad():
        model.weight.mul_(2)
    assert method.penalty().item() == pytest.approx(0.5 * 9 * 4)


# Runs.


def fingerprint(rows):
    """All of the rows that does not depend on the clock."""
    found = []
    for row in rows:
        entry = asdict(row)
        for timing in ("step_ms", "step_quartiles", "optimizer_ms", "seconds_to_target"):
            assert (entry.pop(timing) is None) == (row.failure is not None) or timing == "seconds_to_target"
        entry["curve"].pop("seconds")
        found.append(entry)
    return found


def linear():
    layer = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5))
    mark_orthogonal(layer, "0.weight")
    return layer


def reversal(model, x):
    return (model(x) - x.flip(-1)).square().mean()


BATCHES = list(gaussian(10, 8, 6, dtype=torch.float32))
OPTIONS = {"lr": 0.05, "steps": 30, "seeds": 2}


def test_a_run_is_the_same_whoever_runs_beside_it():
    """Dropout included: to the last digit."""
    together = compare(linear, reversal, BATCHES, schemes=("polar", "qr", "unconstrained"), **OPTIONS)
    alone = [compare(linear, reversal, BATCHES, schemes=(s,), **OPTIONS) for s in ("polar", "qr", "unconstrained")]
    rows = [row for seed in range(2) for one in alone for row in one.rows if row.seed == seed]
    assert fingerprint(together.rows) == fingerprint(rows)
    again = compare(linear, reversal, BATCHES, schemes=("polar", "qr", "unconstrained"), **OPTIONS)
    assert fingerprint(together.rows) == fingerprint(again.rows)
    assert together.rows[0].final_loss != together.rows[3].final_loss  # another seed


@pytest.mark.parametrize("scheme", ["geotorch", "torch", "geoopt", "pogo"])
def test_every_scheme_sees_the_same_batches(scheme):
    """Some libraries draw a start of their own."""
    seen = {}

    def batches():
        while True:
            yield torch.randn(4, 6)

    def loss(model, x):
        seen.setdefault(type(model[0]).__name__, []).append(float(x.sum()))
        return reversal(model, x)

    compare(linear, loss, batches, schemes=("polar", installed(scheme)), steps=3, seeds=1)
    ours, theirs = seen.values()
    assert len(ours) == 4  # the first of a step that is not timed, nor counted
    assert ours[1:] == theirs[1:]


def test_the_penalty_is_in_the_loss():
    ends = [
        compare(linear, reversal, BATCHES, schemes=("penalty",), penalty=p, lr=0.1, steps=60, seeds=1).rows[0]
        for p in (0.0, 10.0)
    ]
    assert ends[1].curve.error[-1] < 0.5 * ends[0].curve.error[-1]


def test_the_target_is_for_the_mean_of_twenty_losses():
    """A loss of 0 every twentieth step and 10 else has a mean of 9.5."""
    counter = itertools.count(1)

    def loss(model, _):
        return model[0].weight.sum() * 0 + (0.0 if next(counter) % 20 == 0 else 10.0)

    (row,) = compare(linear, loss, [None], schemes=("qr",), steps=100, seeds=1, target=9.4).rows
    assert row.steps_to_target is None
    (row,) = compare(linear, loss, [None], schemes=("qr",), steps=100, seeds=1, target=9.6).rows
    assert row.steps_to_target == 20
    assert row.seconds_to_target == row.curve.seconds[19]


def test_weights_that_are_lost_are_a_failure(monkeypatch):
    def spoil(*args):
        method = methods.unconstrained(*args)
        method.matrices = lambda: [torch.full((1, 2, 2), torch.nan)]
        return method

    monkeypatch.setitem(methods.PEERS, "pogo", spoil)
    (row,) = compare(linear, reversal, BATCHES, schemes=("pogo",), steps=5, seeds=1).rows
    assert "the weights after step 1 are not finite" in row.failure


def test_counts_come_from_the_optimizer():
    (row,) = compare(
        linear, reversal, BATCHES, schemes=("cayley_iterative",), optimizer="sgd", lr=1e3, steps=4, seeds=1
    ).rows
    assert row.clamped > 0 == row.skipped


def test_seeds_that_are_no_repetitions_count_as_one():
    def make_model():
        layer = nn.Linear(6, 6)
        nn.init.eye_(layer.weight)
        nn.init.zeros_(layer.bias)
        mark_orthogonal(layer, "weight")
        return layer

    found = compare(make_model, reversal, BATCHES, schemes=("polar", "qr"), optimizer="sgd", lr=1.0, steps=5, seeds=3)
    assert [(line.seeds, line.distinct) for line in found.summaries] == [(3, 1)] * 2
    assert compare_finals(*found.summaries, found.results.tasks["model"]) == 0


def test_more_accuracy_is_better():
    values = iter([0.5, 0.9])
    found = compare(
        linear, reversal, BATCHES, schemes=("qr",), lr=[0.1, 0.2], steps=2, seeds=1, measure="accuracy",
        evaluate=lambda _: torch.tensor(next(values)),
    )  # fmt: skip
    assert found.summaries[0].lr == 0.2
    json.dumps(asdict(found.results), allow_nan=False)


def test_a_model_that_cannot_be_made_is_a_row_each():
    calls = itertools.count()

    def make_model():
        if next(calls) == 2:
            raise RuntimeError("no more")
        return linear()

    found = compare(make_model, reversal, BATCHES, schemes=("qr", "polar"), steps=2, seeds=2)
    assert [row.failure for row in found.rows] == [None, None, "RuntimeError: no more", "RuntimeError: no more"]


def test_brackets_in_a_failure_are_brackets(monkeypatch, capsys):
    def fails(*_):
        raise RuntimeError("[enforce fail] in [/tmp/x]")

    monkeypatch.setitem(methods.PEERS, "pogo", fails)
    found = compare(linear, reversal, BATCHES, schemes=("pogo", "qr"), steps=2, seeds=1)
    found.table()
    assert "[enforce fail] in [/tmp/x]" in capsys.readouterr().out
    with pytest.raises(ValueError, match="nothing to draw"):
        compare(linear, reversal, BATCHES, schemes=("pogo",), steps=2, seeds=1).plot("never.png")


def test_the_random_state_of_the_caller_stays():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    compare(linear, reversal, BATCHES, schemes=("polar",), **OPTIONS)
    assert torch.equal(torch.get_rng_state(), before)


def test_shuffled_loaders_iterators_and_functions_are_all_batches():
    dataset = torch.utils.data.TensorDataset(torch.cat(BATCHES))
    loader = torch.utils.data.DataLoader(dataset, batch_size=8, shuffle=True)
    losses = []
    for batches in (loader, loader, BATCHES, iter(BATCHES * 3), lambda: iter(BATCHES)):
        loss = reversal if batches is not loader else lambda model, batch: reversal(model, batch[0])
        losses.append([row.final_loss for row in compare(linear, loss, batches, schemes=("polar",), **OPTIONS).rows])
    assert losses[0] == losses[1] != losses[2]
    assert losses[2] == losses[3] == losses[4]


class Interrupting(NoProgress):
    """Presses Ctrl-C after so many turns."""

    def __init__(self, turns):
        self.turns = turns

    def advance(self, _):
        self.turns -= 1
        if self.turns == 0:
            raise KeyboardInterrupt


def settings_of(folder, *more):
    return cli.parser().parse_args(
        ["--task", "procrustes", "step", "--size", "6", "--steps", "40", "--retractions", "polar,qr", "--peers",
         "unconstrained", "--lr", "0.01", "0.1", "--seeds", "2", "--out", str(folder), *more]
    )  # fmt: skip


@pytest.mark.parametrize("turns", [4, 13])
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, turns, monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 2)
    monkeypatch.setattr(cost, "TIME_SLICE", 0.0)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    experiment, results = cli.build_experiment(settings_of(whole), ["compare"])
    experiment.run(results, NoProgress())
    experiment, results = cli.build_experiment(settings_of(parts), ["compare"])
    experiment.run(results, Interrupting(turns))
    assert results.interrupted
    saved = Results.load(parts / "results.json")
    assert fingerprint(saved.rows) == fingerprint(results.rows)
    experiment, results = cli.build_experiment(settings_of(parts, "--resume"), ["compare"])
    kept = [row.curve.seconds for row in results.rows]
    experiment.run(results, NoProgress())
    assert not results.interrupted
    once, twice = (Results.load(folder / "results.json") for folder in (whole, parts))
    assert fingerprint(once.rows) == fingerprint(twice.rows)
    assert all(seconds in [row.curve.seconds for row in twice.rows] for seconds in kept)  # not run again
    assert [(c.scheme, c.count, c.n) for c in once.costs] == [(c.scheme, c.count, c.n) for c in twice.costs]


def test_what_fails_is_a_row_that_says_so_and_others_go_on(monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named\n'nobody'")

    monkeypatch.setitem(methods.PEERS, "pogo", missing)
    found = compare(linear, reversal, BATCHES, schemes=("pogo", "polar"), lr=0.1, steps=5, seeds=1)
    assert [row.failure for row in found.rows] == ["ModuleNotFoundError: No module named 'nobody'", None]
    assert found.rows[0].final_loss is None


def test_a_run_that_diverges_says_at_which_step():
    found = compare(
        linear, reversal, BATCHES, schemes=("unconstrained", "polar"), optimizer="sgd", lr=1e20, steps=9, seeds=1
    )
    by_scheme = {row.scheme: row for row in found.rows}
    assert "diverged: the loss of step" in by_scheme["unconstrained"].failure
    json.dumps([asdict(row) for row in found.rows], allow_nan=False)


def test_a_row_by_hand():
    """A loss that does not depend on the weights: 1, 2, 3, ...; nothing moves, and the curve is its means."""
    counter = itertools.count(0)  # of the step that is not counted
    constant = lambda model, _: model[0].weight.sum() * 0 + float(next(counter))  # noqa: E731
    (row,) = compare(linear, constant, [None], schemes=("polar",), steps=400, seeds=1, target=10.5).rows
    assert row.final_loss == pytest.approx(sum(range(361, 401)) / 40)
    assert row.curve.step == list(range(2, 401, 2))
    assert row.curve.loss == pytest.approx([k - 0.5 for k in range(2, 401, 2)])
    assert row.steps_to_target == 20  # 1 to 20: a mean of 10.5
    assert row.curve.seconds == sorted(row.curve.seconds)
    assert 0 < row.optimizer_ms < row.step_ms
    assert row.orthogonality_error < 1e-5


def test_the_largest_error_of_all_steps_counts():
    """An orthogonalizer that is off at once and back at the end."""
    found = compare(linear, reversal, BATCHES, schemes=("orthogonalizer",), optimizer="sgd", lr=1.0, steps=50, seeds=1)
    (row,) = found.rows
    assert row.orthogonality_error == max(row.curve.error) > row.curve.error[-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"schemes": ("polr",)}, "scheme must be one of qr, cayley"),
        ({"schemes": ()}, "at least one scheme"),
        ({"schemes": ("qr", "qr")}, "none twice"),
        ({"optimizer": "lion"}, "optimizer must be one of adam, sgd"),
        ({"second_moment": "row"}, "second_moment must be one of element, block"),
        ({"metric": "flat"}, "metric must be one of euclidean, canonical"),
        ({"second_moment": "block", "optimizer": "sgd"}, "second_moment='block' has no effect .* sgd; .* or use adam"),
        ({"measure": "f1"}, "measure must be one of loss, gap, accuracy"),
        ({"lr": -1.0}, "learning rates"),
        ({"lr": []}, "learning rates"),
        ({"penalty": -1.0}, "penalty must be finite and at least 0"),
        ({"orthogonal_lr_scale": math.nan}, "orthogonal_lr_scale must be finite and at least 0"),
        ({"steps": 0}, "at least 1"),
        ({"seeds": 0}, "at least 1"),
        ({"steps": 2.5}, "whole numbers"),
        ({"lr": [0.1, 0.1]}, "every learning rate once"),
        ({"seeds": [1, 1]}, "every seed once"),
        ({"device": "abacus"}, "device abacus cannot be used"),
    ],
)
def test_bad_arguments_name_the_remedy(change, said):
    with pytest.raises(ValueError, match=said):
        compare(linear, reversal, BATCHES, **change)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
def test_muon_is_compared_with_that_of_torch():
    found = compare(
        linear, reversal, BATCHES, schemes=("spectral", "unconstrained", "penalty"), optimizer="muon", lr=0.1, steps=40,
        seeds=1,
    )  # fmt: skip
    exact, free, _ = found.rows
    assert exact.failure is None is free.failure
    assert exact.orthogonality_error < 1e-5 < free.orthogonality_error
    assert exact.final_loss < exact.curve.loss[0] / 2
    with pytest.raises(ValueError, match="scheme must be one of spectral, penalty, unconstrained"):
        compare(linear, reversal, BATCHES, schemes=("qr",), optimizer="muon")


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["--metric", "canonical"],
            "metric='canonical' has no effect with the optimizer muon; leave it out, or use",
        ),
        (["--second-moment", "block"], "second_moment='block' has no effect with the optimizer muon; leave it out"),
        (["--retractions", "qr"], "--retractions knows spectral, not 'qr'"),
        (["--peers", "geoopt"], "--peers knows penalty, unconstrained, not 'geoopt'"),
    ],
)
def test_options_without_effect_on_muon_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        cli.main(["--optimizer", "muon", *words])
    assert said in capsys.readouterr().err


def test_a_loader_with_a_generator_of_its_own_is_refused():
    dataset = torch.utils.data.TensorDataset(torch.cat(BATCHES))
    loader = torch.utils.data.DataLoader(dataset, shuffle=True, generator=torch.Generator())
    with pytest.raises(ValueError, match="random generator of its own"):
        compare(linear, reversal, loader)


def test_a_model_without_marks_is_refused():
    with pytest.raises(ValueError, match="without marked parameters"):
        compare(lambda: nn.Linear(6, 6), reversal, BATCHES)


def test_no_batches_are_a_failure_that_says_so():
    (row,) = compare(linear, reversal, [], schemes=("qr",), seeds=1).rows
    assert "batches is empty" in row.failure


def test_what_is_handed_back(tmp_path, capsys):
    found = compare(linear, reversal, BATCHES, schemes=("polar", "qr"), lr=[0.01, 0.1], steps=20, seeds=2)
    assert isinstance(found, Comparison)
    assert repr(found) == "Comparison(8 runs of polar, qr; 0 failed)"
    found.table()
    assert "polar" in capsys.readouterr().out
    assert "polar" in found._repr_html_()
    assert [line.scheme for line in found.summaries] == ["polar", "qr"]
    found.plot(tmp_path / "out.png")
    found.to_html(tmp_path / "report.html")
    found.save(tmp_path / "results.json")
    assert (tmp_path / "out.png").read_bytes()[:4] == b"\x89PNG"
    assert len(found.plots(tmp_path)) >= 2
    assert asdict(Results.load(tmp_path / "results.json")) == asdict(found.results)


# Tasks.


@pytest.mark.parametrize("make", [tasks.procrustes, tasks.pca])
def test_the_optimum_is_the_optimum(make):
    """The gap closes, and no start is below it."""
    task = make(6)
    spec = runner.RunSpec(task, 0, Settings(lr=0.02), ("polar",), 400, frozenset(), torch.device("cpu"))
    torch.manual_seed(0)
    starts = [task.evaluate(task.make_model()) for _ in range(5)]
    (row,) = runner.run(spec, ("polar",), lambda *_: None, {})
    assert min(starts) > 0.01
    assert -1e-6 < row.final < 1e-3


def test_copying_by_hand():
    task = tasks.copying("rnn", 4)
    torch.manual_seed(0)
    x, y = next(task.batches())
    assert x.shape == (50, 32, 10)
    symbols = x.argmax(-1)
    assert torch.equal(symbols[:10], y[-10:])
    assert bool((symbols[:10] >= 1).all() and (symbols[:10] <= 8).all())
    assert bool((symbols[39] == 9).all() and (symbols[10:39] == 0).all() and (y[:-10] == 0).all())
    model = task.make_model()
    assert max(orthogonality_error(model).values()) < 1e-5


def test_a_task_scales_the_rate_of_its_orthogonal_weights():
    task = tasks.copying("rnn", 4)
    device = torch.device("cpu")
    settings = Settings(orthogonal_lr_scale=0.5)
    (spec,) = runner.run_specs([task], [3], lambda task: [task.lr], settings, ("qr", "torch"), None, device)
    assert (spec.seed, spec.steps, spec.peers) == (3, task.steps, {"torch"})
    assert spec.settings.orthogonal_lr == pytest.approx(0.5 * 0.1 * 1e-3)


def test_images_are_read_row_by_row():
    x = torch.arange(2 * 3 * 4.0).view(2, 3, 4).repeat(64, 1, 1)
    found = data.Images("toy", "toy", (x, torch.tensor([0, 1] * 64)), (x, torch.tensor([0, 1] * 64)))
    task = tasks.images(found, 5, None)
    torch.manual_seed(0)
    batch, labels = next(task.batches())
    assert batch.shape == (3, 64, 4)
    assert torch.equal(batch[:, 0], x[int(labels[0])])
    assert 0 <= task.evaluate(task.make_model()) <= 1


def idx(values):
    return (
        bytes([0, 0, 8, values.ndim])
        + b"".join(n.to_bytes(4, "big") for n in values.shape)
        + bytes(values.flatten().tolist())
    )


@pytest.mark.parametrize("zipped", [True, False])
def test_fashion_from_a_folder(tmp_path, zipped):
    for prefix, count in (("train", 5), ("t10k", 3)):
        for name, values in (
            (f"{prefix}-images-idx3-ubyte", torch.arange(count * 6).view(count, 2, 3)),
            (f"{prefix}-labels-idx1-ubyte", torch.arange(count)),
        ):
            raw = idx(values)
            (tmp_path / (name + ".gz" * zipped)).write_bytes(gzip.compress(raw) if zipped else raw)
    found = data.fashion(str(tmp_path))
    torch.testing.assert_close(found.train[0], torch.arange(30.0).view(5, 2, 3) / 255)
    assert torch.equal(found.test[1], torch.arange(3))
    (tmp_path / ("t10k-labels-idx1-ubyte" + ".gz" * zipped)).unlink()
    (tmp_path / "t10k-labels-idx1-ubyte").write_bytes(idx(torch.arange(3))[:-1])
    with pytest.raises(data.MissingDataError, match="get it anew"):
        data.fashion(str(tmp_path))
    for spoilt in (b"", b"\x1f\x8bno"):
        (tmp_path / ("t10k-labels-idx1-ubyte" + ".gz" * zipped)).write_bytes(spoilt)
        with pytest.raises(data.MissingDataError, match="get it anew"):
            data.fashion(str(tmp_path))


def test_the_cost_of_a_step(monkeypatch):
    monkeypatch.setattr(cost, "ROUNDS", 2)
    monkeypatch.setattr(cost, "TIME_SLICE", 0.0)
    assert cost.problem_sizes(40) == [(1, 16), (1, 32), (1, 40), (10, 16)]
    assert cost.problem_sizes(8) == [(1, 8)]  # of little, little is timed
    assert cost.problem_sizes(None) == [*((1, n) for n in cost.SIZES), (10, 16), (100, 16)]
    monkeypatch.setitem(methods.PEERS, "pogo", lambda *_: 1 / 0)
    turns = []
    made = list(cost.measure((3, 5), ("polar", "pogo", "torch"), Settings(), torch.device("cpu"), turns.append))
    assert turns == ["polar", "torch"] * 2
    assert [(c.scheme, c.peer, c.count, c.n) for c in made] == [
        ("polar", False, 3, 5), ("pogo", True, 3, 5), ("torch", True, 3, 5)]  # fmt: skip
    assert made[0].milliseconds > 0 < made[2].milliseconds
    assert made[0].orthogonality_error < 1e-5
    assert made[1].failure == "ZeroDivisionError: division by zero"


def test_milliseconds_are_those_of_a_step_not_of_a_turn(monkeypatch):
    """A clock that goes on by a second whenever it is looked at: a turn of 5 s is five steps of one."""
    clock = itertools.count()
    monkeypatch.setattr(cost.time, "perf_counter", lambda: float(next(clock)))
    monkeypatch.setattr(cost, "TIME_SLICE", 5.0)
    (made,) = cost.measure((1, 3), ("polar",), Settings(), torch.device("cpu"), lambda _: None)
    assert made.milliseconds == 1000
    assert made.quartiles == [1000, 1000]


def test_quartiles_by_hand():
    assert quartiles([5.0, 1.0, 2.0, 3.0, 4.0]) == [2, 4]
    assert quartiles([7.0]) == [7, 7]


def test_a_scheme_that_fails_in_a_turn_has_no_more(monkeypatch):
    def fails_late(*args):
        method = methods.unconstrained(*args)
        steps, step = itertools.count(), method.step

        def once_more():
            if next(steps) > cost.WARM:
                raise RuntimeError("tired")
            step()

        method.step = once_more
        return method

    monkeypatch.setattr(cost, "TIME_SLICE", 0.0)
    monkeypatch.setitem(methods.PEERS, "pogo", fails_late)
    turns = []
    tired, fit = cost.measure((1, 3), ("pogo", "qr"), Settings(), torch.device("cpu"), turns.append)
    assert (tired.failure, tired.milliseconds) == ("RuntimeError: tired", None)
    assert fit.milliseconds > 0
    assert (turns.count("pogo"), turns.count("qr")) == (2, cost.ROUNDS)


# The command.


def command(*words, **options):
    return subprocess.run(
        [sys.executable, "-m", "manifold_opt", *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        **options,
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--task", ","], "--task knows procrustes"),
        (["--task", "cifar"], "--task knows procrustes, pca, copying, digits, fashion, step, not 'cifar'"),
        (["--retractions", "cayly"], "--retractions knows qr, cayley"),
        (["--peers", "keras"], "--peers knows geoopt, pogo, torch, geotorch, penalty, unconstrained, not 'keras'"),
        (["--optimizer", "lion"], "optimizer must be one of adam, sgd"),
        (["--dtype", "bfloat16"], "--dtype knows float32, float64"),
        (["--second-moment", "row"], "second_moment must be one of element, block"),
        (["--metric", "flat"], "metric must be one of euclidean, canonical"),
        (["--lr", "0"], "learning rates must be finite and above 0"),
        (["--lr", "fast"], "invalid float value: 'fast'"),
        (["--lr", "1", "--sweep-lr"], "not allowed with"),
        (["--steps", "0"], "at least 1"),
        (["--seeds", "0"], "at least 1"),
        (["--size", "0"], "--size must be at least 1"),
        (["--threads", "-1"], "--threads must be at least 1"),
        (["--penalty", "nan"], "--penalty must be finite"),
        (["--device", "abacus"], "device abacus cannot be used"),
        (["--resume"], "--resume needs the --out"),
        (["--out", "/proc/nowhere"], "--out /proc/nowhere cannot be written to"),
        (["--task", "fashion", "--data", "/nowhere"], "apt install dataset-fashion-mnist"),
        (["--speed", "9"], "unrecognized arguments"),
    ],
)
def test_bad_input_is_one_line_and_status_two(words, said, capsys):
    with pytest.raises(SystemExit) as left:
        cli.main(words)
    assert left.value.code == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


def test_resuming_something_else_is_refused(tmp_path, capsys):
    base = ["--task", "pca", "--size", "2", "--steps", "3", "--retractions", "qr", "--peers", "none", "--seeds", "1"]
    assert cli.main([*base, "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "results.json").read_text())
    report["environment"].update(load=99.0, date="long ago")  # these may differ
    (tmp_path / "results.json").write_text(json.dumps(report))
    for words, said in (
        ([*base, "--lr", "0.5"], "was made with lr=None, not [0.5]"),
        (base, None),
    ):
        if said is None:
            assert cli.main([*words, "--out", str(tmp_path), "--resume"]) == 0
            continue
        with pytest.raises(SystemExit):
            cli.main([*words, "--out", str(tmp_path), "--resume"])
        assert said in capsys.readouterr().err
    report = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**report, "interrupted": True}))
    with pytest.raises(SystemExit):
        cli.main([*base, "--out", str(tmp_path)])
    assert "--resume goes on" in capsys.readouterr().err
    report["environment"]["torch"] = "1.0"
    (tmp_path / "results.json").write_text(json.dumps(report))
    with pytest.raises(SystemExit):
        cli.main([*base, "--out", str(tmp_path), "--resume"])
    assert "was made with torch=1.0" in capsys.readouterr().err
    (tmp_path / "results.json").write_text('{"tasks": []}')
    with pytest.raises(SystemExit):
        cli.main([*base, "--out", str(tmp_path), "--resume"])
    assert "cannot read" in capsys.readouterr().err


@pytest.mark.slow
def test_the_command_ends_in_table_plots_and_page(tmp_path):
    out = tmp_path / "report"
    words = ["--task", "procrustes", "pca", "--size", "4", "--steps", "10", "--retractions", "polar,qr", "--peers",
             "unconstrained", "--seeds", "1", "--out", str(out), "--threads", "1"]  # fmt: skip
    made = command("compare", *words)
    assert made.returncode == 0, made.stderr
    assert made.stderr == ""
    assert made.stdout.splitlines()[1].startswith("The comparison takes about ")
    assert "\x1b" not in made.stdout  # plain where it is no terminal
    assert "Procrustes" in made.stdout
    assert "PCA" in made.stdout
    report = json.loads((out / "results.json").read_text())
    assert {"environment", "arguments", "rows"} <= set(report)
    assert [(row["task"], row["scheme"]) for row in report["rows"]] == [
        (task, scheme) for task in ("procrustes", "pca") for scheme in ("polar", "qr", "unconstrained")
    ]
    for row in report["rows"]:
        assert {"scheme", "seed", "final_loss", "orthogonality_error", "step_ms", "curve"} <= set(row)
    assert "<html" in (out / "report.html").read_text()
    assert list(out.glob("*.png"))


def test_a_sweep_is_ten_rates_around_the_tasks_own():
    args = cli.parser().parse_args(["--task", "pca", "--size", "2", "--sweep-lr", "--dtype", "float64"])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        experiment, _ = cli.build_experiment(args, ["compare"])
        with experiment.torch_settings():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)
    rates = list(dict.fromkeys(spec.settings.lr for spec in experiment.specs))
    assert len(rates) == 10
    assert (rates[0], rates[-1]) == (1e-4, 3.2)
    assert experiment.dtype == torch.float64


def test_fast_sets_what_is_not_given():
    args = cli.parser().parse_args(["--fast", "--task", "pca", "--steps", "7"])
    experiment, results = cli.build_experiment(args, ["compare"])
    assert {(spec.steps, spec.task.title) for spec in experiment.specs} == {(7, tasks.pca(16).title)}
    assert {spec.seed for spec in experiment.specs} == {0, 1}
    assert results.environment["threads"] == 1


def test_the_estimate_is_steps_times_the_time_of_a_step(monkeypatch):
    """A step of 2 s by a clock that only the loss moves on, and costs that are not timed twice."""
    now = 0.0

    def loss(model, _):
        nonlocal now
        now += 2.0
        return model[0].weight.sum()

    monkeypatch.setattr(estimate.time, "perf_counter", lambda: now)
    task = tasks.Task("t", "T", linear, lambda: iter([None] * 9), loss)
    device = torch.device("cpu")
    specs = runner.run_specs([task], range(3), lambda _: [0.1], Settings(), ("qr", "polar"), 50, device)
    experiment = Experiment(specs, [(1, 3)], ("qr",), Settings())
    monkeypatch.setitem(methods.PEERS, "pogo", lambda *_: 1 / 0)
    runs = 3 * 2 * 50 * 2.0
    assert estimate.seconds(experiment, Results()) == pytest.approx(runs + cost.ROUNDS * cost.TIME_SLICE)
    done = Results(costs=[Cost("qr", 1, 3, 3)], rows=[specs[0].row("qr")])
    assert estimate.seconds(experiment, done) == pytest.approx(runs - 100)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.1, "5 seconds"), (24, "25 seconds"), (95, "1.6 minutes"), (1700, "28 minutes"), (7300, "2 hours")],
)
def test_durations(seconds, said):
    assert estimate.in_words(seconds) == said


def test_float64_is_float64(tmp_path):
    words = ["--task", "procrustes", "--size", "4", "--steps", "5", "--retractions", "polar", "--peers", "none"]
    assert cli.main([*words, "--seeds", "1", "--dtype", "float64", "--out", str(tmp_path)]) == 0
    assert Results.load(tmp_path / "results.json").rows[0].orthogonality_error < 1e-12
    assert torch.get_default_dtype() == torch.float32


def test_rows_are_sorted_by_task(tmp_path):
    words = [
        "--task",
        "procrustes",
        "pca",
        "--size",
        "2",
        "--steps",
        "2",
        "--retractions",
        "qr,polar",
        "--peers",
        "none",
    ]
    assert cli.main([*words, "--seeds", "2", "--out", str(tmp_path)]) == 0
    rows = Results.load(tmp_path / "results.json").rows
    assert [(row.task, row.seed, row.scheme) for row in rows] == [
        (task, seed, scheme) for task in ("procrustes", "pca") for seed in (0, 1) for scheme in ("qr", "polar")
    ]


def test_an_interrupted_command_says_so_and_exits_as_such(monkeypatch, capsys):
    from manifold_opt.compare import progress

    class Impatient(progress.Lines):
        def advance(self, _):
            raise KeyboardInterrupt

    monkeypatch.setattr(progress, "Lines", Impatient)
    assert cli.main(["--task", "pca", "--size", "2", "--steps", "2", "--retractions", "qr", "--peers", "none"]) == 130
    assert "Interrupted" in capsys.readouterr().out


def test_when_all_has_failed_the_command_has(monkeypatch):
    monkeypatch.setitem(methods.PEERS, "pogo", lambda *_: 1 / 0)
    assert cli.main(["--task", "pca", "--size", "2", "--steps", "2", "--retractions", "", "--peers", "pogo"]) == 1


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        ([], 0, "compare     train with every retraction"),
        (["--help"], 0, "Documentation: "),
        (["--version"], 0, f"manifold_opt {manifold_opt.__version__}\n"),
        (["contrast"], 2, "unknown command 'contrast'"),
    ],
)
def test_the_command_line_says_what_there_is(words, status, said, capsys):
    assert command_line(words) == status
    shown = capsys.readouterr()
    assert said in (shown.err if status else shown.out)
    assert not (shown.out if status else shown.err)


def test_the_command_line_passes_arguments_to_compare(capsys):
    with pytest.raises(SystemExit) as left:
        command_line(["compare", "--help"])
    assert left.value.code == 0
    assert "--sweep-lr" in capsys.readouterr().out


@pytest.mark.slow  # test_geoopt.py asks for all of these in one process
def test_the_package_itself_needs_none_of_it():
    code = (
        "import sys, manifold_opt; "
        "print([m for m in ('rich', 'matplotlib', 'jinja2', 'sklearn', 'manifold_opt.compare') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
