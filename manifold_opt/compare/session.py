"""A whole comparison, carried out: what is there already is kept, what is finished is saved, Ctrl-C loses little."""

from __future__ import annotations

import contextlib
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from .. import __version__
from . import cost
from .contenders import Settings
from .results import About, Results, Row
from .runner import Unit, run
from .tasks import Task


class Progress(Protocol):
    """Who is told how it goes."""

    def begin(self, total: int) -> None:
        """There are so many steps to make."""

    def now(self, text: str) -> None:
        """What is running."""

    def made(self, steps: int) -> None:
        """So many more steps have been made."""


class Silent:
    """Nobody is."""

    def begin(self, total: int) -> None:
        """Nothing."""

    def now(self, text: str) -> None:
        """Nothing."""

    def made(self, steps: int) -> None:
        """Nothing."""


@dataclass
class Session:
    """What is to be compared.

    Attributes:
        units: the runs.
        points: of the cost curves.
        schemes: of these curves.
        settings: of these curves.
        device: where it runs.
        dtype: of all tensors.
        save: called whenever there is something new to keep.
    """

    units: list[Unit]
    points: list[tuple[str, int, int]] = field(default_factory=list)
    schemes: tuple[str, ...] = ()
    settings: Settings = field(default_factory=Settings)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    dtype: torch.dtype = torch.float32
    save: Callable[[Results], None] = lambda _: None

    def carry_out(self, results: Results, progress: Progress) -> None:
        """Add what is missing in the results. An interrupt ends it early, and ``results.interrupted`` says so."""
        results.interrupted = True  # until all is there
        done = {row.key for row in results.rows}
        order = {unit.row(scheme).key: k for k, (unit, scheme) in enumerate(_all(self.units))}
        for unit in self.units:
            task = unit.task
            results.tasks.setdefault(
                task.name,
                About(task.name, task.title, task.measure, task.target, resolution=_resolution(task, self.dtype)),
            )
        known = {(c.scheme, c.varied, c.count, c.n) for c in results.costs}
        points = [(point, tuple(s for s in self.schemes if (s, *point) not in known)) for point in self.points]
        points = [(point, missing) for point, missing in points if missing]
        todo = [(unit, tuple(s for s in unit.schemes if unit.row(s).key not in done)) for unit in self.units]
        todo = [(unit, missing) for unit, missing in todo if missing]
        share = max(1, sum(u.steps * len(missing) for u, missing in todo) // (4 * len(points)) if points else 0)
        progress.begin(sum(u.steps * len(missing) for u, missing in todo) + share * len(points))
        try:
            with _default_dtype(self.dtype):
                for unit, missing in todo:
                    self._unit(unit, missing, results, order, progress)
                for point, schemes in points:
                    self._point(point, schemes, results, progress)
                    progress.made(share)
            results.interrupted = False
        except KeyboardInterrupt:
            pass
        self.save(results)

    def _unit(
        self, unit: Unit, missing: tuple[str, ...], results: Results, order: dict[Any, int], progress: Progress
    ) -> None:
        def tell(row: Row, steps: int) -> None:
            progress.now(f"{row.task}, seed {row.seed}, lr {row.lr:g}: {row.scheme}")
            progress.made(steps)

        for row in run(unit, missing, tell, results.tasks[unit.task.name].notes):
            results.rows.append(row)
            results.rows.sort(key=lambda row: order.get(row.key, -1))
            self.save(results)

    def _point(
        self, point: tuple[str, int, int], schemes: tuple[str, ...], results: Results, progress: Progress
    ) -> None:
        _, count, n = point

        def tell(scheme: str) -> None:
            progress.now(f"cost of {count} x {n} x {n}: {scheme}")

        results.costs.extend(cost.measure(point, schemes, self.settings, self.device, tell))
        self.save(results)


def _resolution(task: Task, dtype: torch.dtype) -> float:
    """A gap is taken of losses near one, of weights with errors of a few units of rounding."""
    return 8 * torch.finfo(dtype).eps if task.measure == "gap" else 0.0


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine, threads."""
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "manifold_opt": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": " ".join(filter(None, (platform.system(), platform.machine(), gpu))),
        "threads": torch.get_num_threads(),
    }


def _all(units: Sequence[Unit]) -> Iterator[tuple[Unit, str]]:
    """Every run that was asked for, task by task, in the order of a table."""
    by_task = sorted(units, key=lambda unit: [u.task.name for u in units].index(unit.task.name))
    yield from ((unit, scheme) for unit in by_task for scheme in unit.schemes)


def _default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    @contextlib.contextmanager
    def within() -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return within()
