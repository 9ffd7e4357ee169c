"""Runs, side by side: every scheme of a task takes its turn, so that a busy minute of the machine falls on all of them.

A run depends on its task, scheme, seed and learning rate only. It has torch's random state for itself, put in place
for its turn, so what it learns is the same whoever runs beside it, to the last digit.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map_only

from .. import orthogonality_error
from .contenders import PEERS, Contender, Settings, build
from .results import Row, in_one_line
from .tasks import Batch, Task

TURN = 0.1  # seconds that a run has before the next one goes on; one step at least
POINTS = 200  # of a curve
Tell = Callable[[Row, int], None]  # of a run, and how many steps it has just made


@dataclass(frozen=True)
class Unit:
    """Runs that take turns: one task from one seed at one learning rate, and the schemes.

    Attributes:
        peers: which of the schemes are somebody else's.
        device: where they run.
    """

    task: Task
    seed: int
    settings: Settings
    schemes: tuple[str, ...]
    steps: int
    peers: frozenset[str]
    device: torch.device

    def row(self, scheme: str) -> Row:
        """Where the run of a scheme is written down."""
        return Row(self.task.name, scheme, self.seed, self.settings.lr, self.steps, peer=scheme in self.peers)


def run(unit: Unit, schemes: Iterable[str], tell: Tell, notes: dict[str, str]) -> Iterator[Row]:
    """Run some schemes of a unit, and yield each row as it is finished; what was corrected goes to ``notes``."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(unit.seed)
        start, refusal = None, None
        try:
            start = unit.task.make_model().to(unit.device)
        except Exception as error:
            refusal = in_one_line(error)
        state = _random_state(unit.device)
        running = []
        for scheme in schemes:
            one = Run(unit, unit.row(scheme), state)
            one.row.failure = refusal
            if start is not None:
                one.guarded(one.prepare, start)
            if one.contender is not None and one.contender.note:
                notes[scheme] = one.contender.note
            running.append(one)
        while running:
            for one in list(running):
                before = one.made
                if one.row.failure is None:
                    one.guarded(one.turn)
                tell(one.row, one.made - before if one.row.failure is None else one.row.steps - before)
                if one.row.failure is not None or one.made == one.row.steps:
                    if one.row.failure is None:
                        one.guarded(one.finish)
                    running.remove(one)
                    yield one.row


class Run:
    """One scheme learning one task."""

    def __init__(self, unit: Unit, row: Row, state: list[torch.Tensor]) -> None:
        self.unit, self.row, self.state = unit, row, state
        self.contender: Contender | None = None
        self.batches: Iterator[Batch] = iter(())
        self.made = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []  # of each step
        self.optimizing: list[float] = []  # of these, what the optimizer took
        self.error = 0.0  # the largest since the last point of the curve

    def guarded(self, work: Callable[..., None], *args: object) -> None:
        """Do something with the random state of this run; what goes wrong is written down, and others go on."""
        others = _random_state(self.unit.device)
        _set_random_state(self.unit.device, self.state)
        try:
            work(*args)
        except Exception as error:
            self.row.failure = in_one_line(error)
        finally:
            self.state = _random_state(self.unit.device)
            _set_random_state(self.unit.device, others)

    def prepare(self, start: nn.Module) -> None:
        """A copy of the model, and what steps it. Another copy has made a step: the first of all sets up a library."""
        scheme, task, settings = self.row.scheme, self.unit.task, self.unit.settings
        with torch.random.fork_rng():  # some libraries draw a start of their own
            other = build(scheme, copy.deepcopy(start), settings)
            self.learn(other, next(task.batches()))
            other.step()
        with torch.random.fork_rng():
            self.contender = build(scheme, copy.deepcopy(start), settings)
        self.batches = task.batches()

    def turn(self) -> None:
        """Steps for as long as a turn is."""
        began = time.perf_counter()
        while self.made < self.row.steps and self.row.failure is None:
            self.step(next(self.batches))
            if time.perf_counter() - began >= TURN:
                return

    def step(self, batch: Batch) -> None:
        """One training step, timed; its loss and the distance from orthogonality after it, not timed."""
        contender = self.contender
        assert contender is not None
        began = time.perf_counter()
        value = self.learn(contender, batch)
        between = time.perf_counter()
        contender.step()
        ended = time.perf_counter()
        self.made += 1
        if not math.isfinite(value):
            raise FloatingPointError(f"diverged: the loss of step {self.made} is {value}")
        self.losses.append(value)
        self.seconds.append(ended - began)
        self.optimizing.append(ended - between)
        with torch.no_grad():
            errors = [orthogonality_error(blocks) for blocks in contender.matrices()]
        self.error = max([self.error, *(math.inf if math.isnan(error) else error for error in errors)])
        if self.error == math.inf:
            raise FloatingPointError(f"diverged: the weights after step {self.made} are not finite")
        self.note_down()

    def learn(self, contender: Contender, batch: Batch) -> float:
        """Forward and backward; the loss."""
        contender.zero_grad()
        with parametrize.cached():  # or nn.GRU computes a weight four times
            loss = self.unit.task.loss(contender.model, _to(batch, self.unit.device))
            contender.backward(loss)
        return float(loss.detach())  # waits for an accelerator

    def note_down(self) -> None:
        """Add to the row what is known after a step."""
        row, target = self.row, self.unit.task.target
        row.orthogonality_error = max(row.orthogonality_error or 0.0, self.error)
        recent = self.losses[-20:]
        enough = len(recent) == min(20, row.steps)
        if row.steps_to_target is None and target is not None and enough and statistics.fmean(recent) <= target:
            row.steps_to_target, row.seconds_to_target = self.made, sum(self.seconds)
        every = max(1, row.steps // POINTS)
        if self.made % every == 0 or self.made == row.steps:
            curve = row.curve
            since = curve.step[-1] if curve.step else 0
            curve.step.append(self.made)
            curve.loss.append(statistics.fmean(self.losses[since:]))
            curve.seconds.append(sum(self.seconds))
            curve.error.append(self.error)
            self.error = 0.0

    def finish(self) -> None:
        """What only the end tells."""
        row, task = self.row, self.unit.task
        assert self.contender is not None
        row.final_loss = statistics.fmean(self.losses[-max(1, row.steps // 10) :])
        row.final = row.final_loss if task.evaluate is None else float(task.evaluate(self.contender.model))
        row.step_ms = 1e3 * statistics.median(self.seconds)
        row.optimizer_ms = 1e3 * statistics.median(self.optimizing)
        row.clamped, row.skipped = self.contender.counts()


def units(
    tasks: Iterable[Task],
    seeds: Iterable[int],
    rates: Callable[[Task], Iterable[float]],
    settings: Settings,
    schemes: tuple[str, ...],
    steps: int | None,
    device: torch.device,
) -> list[Unit]:
    """All that is to be run, seed by seed, so that every task and rate has something to show early."""
    tasks = list(tasks)
    peers = frozenset(schemes) & frozenset(PEERS)
    return [
        Unit(
            task, seed, replace(settings, lr=lr, orthogonal_lr_scale=scale), schemes, steps or task.steps, peers, device
        )
        for seed in seeds
        for task in tasks
        for lr in rates(task)
        for scale in (settings.orthogonal_lr_scale * task.orthogonal_lr_scale,)
    ]


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Of the host and, where runs draw from it, of the device."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(device: torch.device, state: list[torch.Tensor]) -> None:
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _to(batch: Batch, device: torch.device) -> Batch:
    """A batch, its tensors on a device: on their own, or in tuples, lists and dicts."""
    if device.type == "cpu":
        return batch
    return tree_map_only(torch.Tensor, lambda x: x.to(device), batch)
