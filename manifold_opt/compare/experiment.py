"""Experiment: run a whole comparison, skip finished runs, and save after each one."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .. import __version__
from . import cost
from .methods import Settings
from .results import Results, RunResult, TaskInfo
from .runner import RunSpec, run
from .tasks import Task


class Progress(Protocol):
    """Progress callbacks of a comparison."""

    def start(self, total: int) -> None:
        """Start, with the total number of steps."""

    def describe(self, text: str) -> None:
        """Describe the current run."""

    def advance(self, steps: int) -> None:
        """Add a number of finished steps."""


class NoProgress:
    """Progress callbacks that do nothing."""

    def start(self, total: int) -> None:
        """Do nothing."""

    def describe(self, text: str) -> None:
        """Do nothing."""

    def advance(self, steps: int) -> None:
        """Do nothing."""


@dataclass
class Experiment:
    """All runs and cost measurements of a comparison.

    Attributes:
        specs: specifications of the runs.
        points: points of the cost curves.
        schemes: schemes of the cost curves.
        settings: settings of the cost curves.
        device: device of runs and measurements.
        dtype: default dtype of tensors.
        save: called with the results after every run or measurement.
    """

    specs: list[RunSpec]
    points: list[tuple[str, int, int]] = field(default_factory=list)
    schemes: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    save: Callable[[Results], None] = lambda _: None

    def run(self, results: Results, progress: Progress) -> None:
        """Add the missing runs and costs to the results; Ctrl-C stops early and sets ``results.interrupted``."""
        results.interrupted = True  # until all runs are finished
        done = {row.key for row in results.rows}
        order = {spec.row(scheme).key: k for k, (spec, scheme) in enumerate(_runs(self.specs))}
        for spec in self.specs:
            task = spec.task
            results.tasks.setdefault(
                task.name,
                TaskInfo(task.name, task.title, task.measure, task.target, resolution=_resolution(task, self.dtype)),
            )
        known = {(c.scheme, c.varied, c.count, c.n) for c in results.costs}
        points = [(point, tuple(s for s in self.schemes if (s, *point) not in known)) for point in self.points]
        points = [(point, missing) for point, missing in points if missing]
        todo = [(spec, tuple(s for s in spec.schemes if spec.row(s).key not in done)) for spec in self.specs]
        todo = [(spec, missing) for spec, missing in todo if missing]
        point_steps = max(
            1, sum(spec.steps * len(missing) for spec, missing in todo) // (4 * len(points)) if points else 0
        )
        progress.start(sum(spec.steps * len(missing) for spec, missing in todo) + point_steps * len(points))
        try:
            with _default_dtype(self.dtype):
                for spec, missing in todo:
                    self._run_spec(spec, missing, results, order, progress)
                for point, schemes in points:
                    self._measure_cost(point, schemes, results, progress)
                    progress.advance(point_steps)
            results.interrupted = False
        except KeyboardInterrupt:
            pass
        self.save(results)

    def _run_spec(
        self, spec: RunSpec, missing: tuple[str, ...], results: Results, order: dict[Any, int], progress: Progress
    ) -> None:
        def callback(row: RunResult, steps: int) -> None:
            progress.describe(f"{row.task}, seed {row.seed}, lr {row.lr:g}: {row.scheme}")
            progress.advance(steps)

        for row in run(spec, missing, callback, results.tasks[spec.task.name].notes):
            results.rows.append(row)
            results.rows.sort(key=lambda row: order.get(row.key, -1))
            self.save(results)

    def _measure_cost(
        self, point: tuple[str, int, int], schemes: tuple[str, ...], results: Results, progress: Progress
    ) -> None:
        _, count, n = point

        def callback(scheme: str) -> None:
            progress.describe(f"cost of {count} x {n} x {n}: {scheme}")

        results.costs.extend(cost.measure(point, schemes, self.settings, self.device, callback))
        self.save(results)


def _resolution(task: Task, dtype: torch.dtype) -> float:
    """Return the rounding error of a gap, the difference of losses near one; 0 for other measures."""
    return 8 * torch.finfo(dtype).eps if task.measure == "gap" else 0.0


def environment(device: torch.device) -> dict[str, Any]:
    """Return versions, machine and number of threads."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "manifold_opt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": " ".join(filter(None, (platform.system(), platform.machine(), gpu))),
        "threads": torch.get_num_threads(),
    }


def _runs(specs: Sequence[RunSpec]) -> Iterator[tuple[RunSpec, str]]:
    """Yield every requested run, task by task, in the order of the tables."""
    by_task = sorted(specs, key=lambda spec: [spec.task.name for spec in specs].index(spec.task.name))
    yield from ((spec, scheme) for spec in by_task for scheme in spec.schemes)


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
