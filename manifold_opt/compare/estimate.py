"""Estimate of the time that a comparison takes, from a few steps of every method."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from . import cost
from .experiment import Experiment
from .results import Results
from .runner import Run, RunSpec

STEPS = 2  # timed steps per method and task


def seconds(experiment: Experiment, results: Results) -> float:
    """Return about how many seconds the missing runs and cost measurements will take."""
    specs, points = experiment.missing(results)
    found: dict[tuple[str, str], float] = {}
    total = 0.0
    with experiment.torch_settings(), torch.random.fork_rng(), torch.enable_grad():
        for spec in specs:
            for scheme in spec.schemes:
                key = spec.task.name, scheme
                if key not in found:
                    found[key] = _run_step(spec, scheme)
                total += spec.steps * found[key]
        for point, schemes in points:
            for scheme in schemes:
                step = _cost_step(experiment, point, scheme)
                total += cost.WARM * step + cost.ROUNDS * max(cost.TIME_SLICE, step)
    return total


def in_words(seconds: float) -> str:
    """Write a duration with one or two digits: seconds up to 90, then minutes or hours."""
    for size, unit in ((3600, "hours"), (60, "minutes")):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 9.5 * size else f"{seconds / size:.0f} {unit}"
    return f"{5 * max(1, round(seconds / 5))} seconds"


def _run_step(spec: RunSpec, scheme: str) -> float:
    """Return the seconds of a training step with everything that is recorded; 0 if the method fails."""
    torch.manual_seed(spec.seed)
    short = replace(spec, steps=STEPS + 1)
    try:
        run = Run(short, short.row(scheme), [])
        run.setup(spec.task.make_model().to(spec.device))
        return _time(lambda: run.step(next(run.batches)))
    except Exception:
        return 0.0


def _cost_step(experiment: Experiment, point: cost.Point, scheme: str) -> float:
    """Return the seconds of a step of the cost measurement; 0 if the method fails."""
    try:
        return _time(cost.make_step(scheme, point, experiment.settings, experiment.device)[1])
    except Exception:
        return 0.0


def _time(step: Callable[[], None]) -> float:
    step()
    start = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - start) / STEPS
