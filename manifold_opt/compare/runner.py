"""Training runs of the compared methods, interleaved so that other load on the machine affects all of them alike.

A run depends only on its task, scheme, seed and learning rate. It has its own copy of torch's random state, so its
results are bitwise the same whichever runs it is interleaved with.
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
from .methods import PEERS, MethodRun, Settings, build
from .results import RunResult, format_error, quartiles
from .tasks import Batch, Task

TIME_SLICE = 0.1  # seconds per slice of a run, at least one step
POINTS = 200  # number of points of a curve
Callback = Callable[[RunResult, int], None]  # called with a run's result and the number of new steps


@dataclass(frozen=True)
class RunSpec:
    """Specification of interleaved runs: one task, seed and learning rate, and the schemes.

    Attributes:
        peers: the schemes of other libraries.
        device: device of the runs.
    """

    task: Task
    seed: int
    settings: Settings
    schemes: tuple[str, ...]
    steps: int
    peers: frozenset[str]
    device: torch.device

    def row(self, scheme: str) -> RunResult:
        """Return an empty result for the run of a scheme."""
        return RunResult(self.task.name, scheme, self.seed, self.settings.lr, self.steps, peer=scheme in self.peers)


def run(spec: RunSpec, schemes: Iterable[str], callback: Callback, notes: dict[str, str]) -> Iterator[RunResult]:
    """Run some schemes of a spec, and yield each result when it is finished; add the methods' notes to ``notes``."""
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(spec.seed)
        model, failure = None, None
        try:
            model = spec.task.make_model().to(spec.device)
        except Exception as error:
            failure = format_error(error)
        state = _random_state(spec.device)
        running = []
        for scheme in schemes:
            current = Run(spec, spec.row(scheme), state)
            current.row.failure = failure
            if model is not None:
                current.catch_errors(current.setup, model)
            if current.method is not None and current.method.note:
                notes[scheme] = current.method.note
            running.append(current)
        while running:
            for current in list(running):
                before = current.steps_done
                if current.row.failure is None:
                    current.catch_errors(current.run_slice)
                done = current.steps_done if current.row.failure is None else current.row.steps
                callback(current.row, done - before)
                if current.row.failure is not None or current.steps_done == current.row.steps:
                    if current.row.failure is None:
                        current.catch_errors(current.finish)
                    running.remove(current)
                    yield current.row


class Run:
    """Training run of one scheme on one task."""

    def __init__(self, spec: RunSpec, row: RunResult, state: list[torch.Tensor]) -> None:
        self.spec, self.row, self.state = spec, row, state
        self.method: MethodRun | None = None
        self.batches: Iterator[Batch] = iter(())
        self.steps_done = 0
        self.losses: list[float] = []
        self.seconds: list[float] = []  # of each step
        self.optimizing: list[float] = []  # of each optimizer.step()
        self.error = 0.0  # largest since the last point of the curve

    def catch_errors(self, work: Callable[..., None], *args: object) -> None:
        """Call ``work`` with the random state of this run; record an exception as the failure of the run."""
        others = _random_state(self.spec.device)
        _set_random_state(self.spec.device, self.state)
        try:
            work(*args)
        except Exception as error:
            self.row.failure = format_error(error)
        finally:
            self.state = _random_state(self.spec.device)
            _set_random_state(self.spec.device, others)

    def setup(self, model: nn.Module) -> None:
        """Set up the method on a copy of the model, after a warm-up step on another copy."""
        scheme, task, settings = self.row.scheme, self.spec.task, self.spec.settings
        with torch.random.fork_rng():  # some libraries draw random numbers at construction
            other = build(scheme, copy.deepcopy(model), settings)
            self.forward_backward(other, next(task.batches()))
            other.step()
        with torch.random.fork_rng():
            self.method = build(scheme, copy.deepcopy(model), settings)
        self.batches = task.batches()

    def run_slice(self) -> None:
        """Train for one time slice."""
        start = time.perf_counter()
        while self.steps_done < self.row.steps and self.row.failure is None:
            self.step(next(self.batches))
            if time.perf_counter() - start >= TIME_SLICE:
                return

    def step(self, batch: Batch) -> None:
        """Make and time one training step, then record its loss and the error after it."""
        method = self.method
        assert method is not None
        start = time.perf_counter()
        value = self.forward_backward(method, batch)
        optimizer_start = time.perf_counter()
        method.step()
        end = time.perf_counter()
        self.steps_done += 1
        if not math.isfinite(value):
            raise FloatingPointError(f"diverged: the loss of step {self.steps_done} is {value}")
        self.losses.append(value)
        self.seconds.append(end - start)
        self.optimizing.append(end - optimizer_start)
        with torch.no_grad():
            errors = [orthogonality_error(blocks) for blocks in method.matrices()]
        self.error = max([self.error, *(math.inf if math.isnan(error) else error for error in errors)])
        if self.error == math.inf:
            raise FloatingPointError(f"diverged: the weights after step {self.steps_done} are not finite")
        self.record()

    def forward_backward(self, method: MethodRun, batch: Batch) -> float:
        """Compute the gradients and return the loss."""
        method.zero_grad()
        with parametrize.cached():  # otherwise nn.GRU computes a weight four times
            loss = self.spec.task.loss(method.model, _to(batch, self.spec.device))
            method.backward(loss)
        return float(loss.detach())  # synchronizes with an accelerator

    def record(self) -> None:
        """Update the result after a step."""
        row, target = self.row, self.spec.task.target
        row.orthogonality_error = max(row.orthogonality_error or 0.0, self.error)
        recent = self.losses[-20:]
        enough = len(recent) == min(20, row.steps)
        if row.steps_to_target is None and target is not None and enough and statistics.fmean(recent) <= target:
            row.steps_to_target, row.seconds_to_target = self.steps_done, sum(self.seconds)
        every = max(1, row.steps // POINTS)
        if self.steps_done % every == 0 or self.steps_done == row.steps:
            curve = row.curve
            since = curve.step[-1] if curve.step else 0
            curve.step.append(self.steps_done)
            curve.loss.append(statistics.fmean(self.losses[since:]))
            curve.seconds.append(sum(self.seconds))
            curve.error.append(self.error)
            self.error = 0.0

    def finish(self) -> None:
        """Set the final values of the result."""
        row, task = self.row, self.spec.task
        assert self.method is not None
        row.final_loss = statistics.fmean(self.losses[-max(1, row.steps // 10) :])
        row.final = row.final_loss if task.evaluate is None else float(task.evaluate(self.method.model))
        row.step_ms = 1e3 * statistics.median(self.seconds)
        row.step_quartiles = [1e3 * seconds for seconds in quartiles(self.seconds)]
        row.optimizer_ms = 1e3 * statistics.median(self.optimizing)
        row.clamped, row.skipped = self.method.counts()


def run_specs(
    tasks: Iterable[Task],
    seeds: Iterable[int],
    rates: Callable[[Task], Iterable[float]],
    settings: Settings,
    schemes: tuple[str, ...],
    steps: int | None,
    device: torch.device,
) -> list[RunSpec]:
    """Return all specifications, seed by seed, so that every task and learning rate has results early."""
    tasks = list(tasks)
    peers = frozenset(schemes) & frozenset(PEERS)
    return [
        RunSpec(
            task, seed, replace(settings, lr=lr, orthogonal_lr_scale=scale), schemes, steps or task.steps, peers, device
        )
        for seed in seeds
        for task in tasks
        for lr in rates(task)
        for scale in (settings.orthogonal_lr_scale * task.orthogonal_lr_scale,)
    ]


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the random state of the CPU and, for CUDA, of the device."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def _set_random_state(device: torch.device, state: list[torch.Tensor]) -> None:
    """Restore what :func:`_random_state` has returned."""
    torch.set_rng_state(state[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[1], device)


def _to(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch, also in tuples, lists and dicts, to a device."""
    if device.type == "cpu":
        return batch
    return tree_map_only(torch.Tensor, lambda x: x.to(device), batch)
