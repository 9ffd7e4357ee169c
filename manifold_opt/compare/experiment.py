"""Experiment: run a whole comparison, skip finished runs, and save after each one."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
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
        points: number and size of the matrices of each cost measurement.
        schemes: schemes of the cost measurements.
        settings: settings of the cost measurements.
        device: device of runs and measurements.
        dtype: default dtype of tensors.
        threads: number of threads of torch on the CPU; None leaves it as it is.
        save: called with the results after every run or measurement.
    """

    specs: list[RunSpec]
    points: list[cost.Point] = field(default_factory=list)
    schemes: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    threads: int | None = None
    save: Callable[[Results], None] = lambda _: None

    def missing(self, results: Results) -> tuple[list[RunSpec], list[tuple[cost.Point, tuple[str, ...]]]]:
        """Return the specifications and the points that are not in the results yet, with their missing schemes."""
        done = {row.key for row in results.rows}
        specs = [
            replace(spec, schemes=tuple(scheme for scheme in spec.schemes if spec.row(scheme).key not in done))
            for spec in self.specs
        ]
        known = {(found.scheme, found.count, found.n) for found in results.costs}
        points = [(point, tuple(s for s in self.schemes if (s, *point) not in known)) for point in self.points]
        return [spec for spec in specs if spec.schemes], [(point, schemes) for point, schemes in points if schemes]

    def run(self, results: Results, progress: Progress) -> None:
        """Add the missing runs and costs to the results; Ctrl-C stops early and sets ``results.interrupted``."""
        results.interrupted = True  # until all runs are finished
        order = {spec.row(scheme).key: k for k, (spec, scheme) in enumerate(_runs(self.specs))}
        for spec in self.specs:
            task = spec.task
            info = TaskInfo(task.name, task.title, task.measure, task.target, optimum=task.optimum)
            info.resolution = _resolution(task, self.dtype)
            results.tasks.setdefault(task.name, info)
        specs, points = self.missing(results)
        steps = sum(spec.steps * len(spec.schemes) for spec in specs)
        point_steps = max(1, steps // (4 * len(points)) if points else 0)
        progress.start(steps + point_steps * len(points))
        try:
            with self.torch_settings():
                for spec in specs:
                    self._run_spec(spec, results, order, progress)
                for point, schemes in points:
                    self._measure_cost(point, schemes, results, progress)
                    progress.advance(point_steps)
            results.interrupted = False
        except KeyboardInterrupt:
            pass
        results.environment["load"] = load()
        self.save(results)

    @contextlib.contextmanager
    def torch_settings(self) -> Iterator[None]:
        """Set the default dtype and the number of threads for as long as the context lasts."""
        dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
        torch.set_default_dtype(self.dtype)
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            if self.threads is not None:
                torch.set_num_threads(threads)

    def _run_spec(self, spec: RunSpec, results: Results, order: dict[Any, int], progress: Progress) -> None:
        def callback(row: RunResult, steps: int) -> None:
            progress.describe(f"{row.task}, seed {row.seed}, lr {row.lr:g}: {row.scheme}")
            progress.advance(steps)

        for row in run(spec, spec.schemes, callback, results.tasks[spec.task.name].notes):
            results.rows.append(row)
            results.rows.sort(key=lambda row: order.get(row.key, -1))
            self.save(results)

    def _measure_cost(self, point: cost.Point, schemes: tuple[str, ...], results: Results, progress: Progress) -> None:
        count, n = point

        def callback(scheme: str) -> None:
            progress.describe(f"cost of {count} x {n} x {n}: {scheme}")

        results.costs.extend(cost.measure(point, schemes, self.settings, self.device, callback))
        self.save(results)


def _resolution(task: Task, dtype: torch.dtype) -> float:
    """Return the rounding error of a gap, the difference of losses near one; for other measures that of the task."""
    return 8 * torch.finfo(dtype).eps if task.measure == "gap" else task.resolution


def environment(device: torch.device, threads: int | None = None) -> dict[str, Any]:
    """Return versions, processor, number of threads, load and date."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "manifold_opt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        **({"gpu": gpu} if gpu else {}),
        "threads": threads or torch.get_num_threads(),
        "load": load(),
        "date": datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    }


def load() -> float | None:
    """Return the mean number of running processes over the last minute; None where the system does not say."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _processor() -> str:
    """Return the name of the processor as Linux gives it, else what Python knows of it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _runs(specs: Sequence[RunSpec]) -> Iterator[tuple[RunSpec, str]]:
    """Yield every requested run, task by task, in the order of the tables."""
    by_task = sorted(specs, key=lambda spec: [spec.task.name for spec in specs].index(spec.task.name))
    yield from ((spec, scheme) for spec in by_task for scheme in spec.schemes)
