"""Times and memory of many contenders side by side: they take turns, so that a busy minute falls on all of them."""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType

import torch
from rows import Contender
from torch.profiler import ProfilerActivity, profile

from manifold_opt import orthogonality_error

WARM = 200  # steps before any is timed, where they take half the budget at most: past the long first ones of Adam


@dataclass
class Plan:
    """How contenders are measured.

    Attributes:
        rounds: in every round every contender has one turn.
        turn: seconds that a turn takes about; it is one step at least.
        budget: seconds for the steps of one contender; past it, it has no more turns.
        device: where they run.
        memory: whether to look at it; the profiler takes its time where operators are many.
    """

    rounds: int
    turn: float
    budget: float
    device: torch.device
    memory: bool = True


@dataclass
class Result:
    """What was seen of one contender.

    Attributes:
        times: seconds a step, one figure a round.
        steps: how many steps the times stand for.
        held: bytes that stay between steps: weights, moments, workspaces; no gradients.
        peak: bytes beyond these at the worst moment of a step.
        error: distance from orthogonality at the end; None where nothing is kept orthogonal.
        failure: why there is no more, one line; None if all went well.
    """

    times: list[float] = field(default_factory=list)
    steps: int = 0
    held: int | None = None
    peak: int | None = None
    error: float | None = None
    failure: str | None = None

    @property
    def median(self) -> float | None:
        """Seconds a step; None if it failed."""
        return self._quantile(0.5)

    @property
    def spread(self) -> float | None:
        """Interquartile range of the rounds, in seconds a step; None if it failed."""
        low, high = self._quantile(0.25), self._quantile(0.75)
        return None if low is None or high is None else high - low

    def _quantile(self, q: float) -> float | None:
        if self.failure is not None or not self.times:
            return None
        return float(torch.tensor(self.times, dtype=torch.float64).quantile(q))


class Memory:
    """Bytes allocated while it is open: ``net``, what stayed, and ``peak``, the most at any moment.

    On a CPU every allocation and release that torch's profiler sees, those inside of an operator as well, but not
    what a library like LAPACK takes for itself. On CUDA the caching allocator's own counters.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.net, self.peak = device, 0, 0

    @classmethod
    def of(cls, plan: Plan) -> AbstractContextManager[Memory | None]:
        """One to open, or None where the plan does not want it."""
        return cls(plan.device) if plan.memory else nullcontext()

    def __enter__(self) -> Memory:
        gc.disable()  # garbage of others is not to be counted here
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        else:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or two lines on stderr a profile
            self.profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self.profile.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        gc.enable()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            self.net = torch.cuda.memory_allocated(self.device) - self.before
            self.peak = torch.cuda.max_memory_allocated(self.device) - self.before
            return
        self.profile.__exit__(kind, value, trace)
        recorded = self.profile.profiler.kineto_results.events()  # type: ignore[union-attr]
        for event in sorted((e for e in recorded if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            self.net += event.nbytes()
            self.peak = max(self.peak, self.net)


def side_by_side(builds: Mapping[str, Callable[[], Contender | None]], plan: Plan) -> dict[str, Result]:
    """Build the contenders, warm them up, and time them in turns.

    One that raises is reported as a failure, and the others go on; a build that returns None is left out.
    """
    gc.collect()
    results: dict[str, Result] = {}
    runners: dict[str, Runner] = {}
    for name, build in builds.items():
        result = Result()
        runner = Runner(result, plan)
        guarded(result, runner.prepare, build)
        if runner.contender is not None or result.failure is not None:
            results[name], runners[name] = result, runner
    if plan.memory:
        gc.collect()  # what the profiler has left
    for _ in range(plan.rounds):
        for name, runner in runners.items():
            if runner.goes_on():
                guarded(results[name], runner.take_turn)
    for name, runner in runners.items():
        if results[name].failure is None:
            guarded(results[name], runner.finish)
    return results


def guarded(result: Result, function: Callable[..., None], *args: object) -> None:
    """Call a function, and turn what it raises into the first line of a failure."""
    try:
        function(*args)
    except Exception as exception:
        message = (str(exception).strip().splitlines() or [""])[0]
        result.failure = f"{type(exception).__name__}: {message}"


class Runner:
    """One contender under way."""

    def __init__(self, result: Result, plan: Plan) -> None:
        self.result, self.plan = result, plan
        self.contender: Contender | None = None
        self.count, self.fed, self.spent = 1, 0, 0.0

    def prepare(self, build: Callable[[], Contender | None]) -> None:
        """Build it, see what memory it takes, and how many steps make a turn.

        The first step is cold. It stands for all only if it takes twice the budget; the second does if it passes it.
        """
        with Memory.of(self.plan) as building:
            self.contender = build()
        if self.contender is None:
            return
        self.feed()
        with Memory.of(self.plan) as starting:
            first = self.run(1, feed=False)
            self.feed()
        if building is not None and starting is not None:
            self.result.held = building.net + starting.net
        if first > 2 * self.plan.budget:
            self.result.times, self.result.steps = [first], 1
            return
        with Memory.of(self.plan) as stepping:
            second = self.run(1, feed=False)
        self.result.peak = None if stepping is None else stepping.peak
        if self.spent > self.plan.budget:
            self.result.times, self.result.steps = [second], 1
            return
        self.count = max(1, round(self.plan.turn / min(second, self.run(1))))
        spent = self.spent
        self.run(max(self.count, min(WARM, int(self.plan.budget / 2 / second))))
        self.spent = spent

    def goes_on(self) -> bool:
        """Whether it has another turn."""
        if self.result.failure is not None:
            return False
        times = self.result.times
        return not times or self.spent + times[-1] * self.count <= self.plan.budget

    def take_turn(self) -> None:
        """As many steps as make a turn, in a row."""
        self.result.times.append(self.run(self.count))
        self.result.steps += self.count

    def finish(self) -> None:
        """Look how far from orthogonal it has got."""
        if self.contender is not None and self.contender.weights is not None:
            errors = [orthogonality_error(w) for w in self.contender.weights()]
            if not all(map(math.isfinite, errors)):
                raise ArithmeticError("the weights are not finite at the end")
            self.result.error = max(errors)

    def feed(self) -> None:
        """Hand over the next gradients."""
        assert self.contender is not None
        self.contender.feed(self.fed)
        self.fed += 1

    def run(self, count: int, *, feed: bool = True) -> float:
        """Make some steps, and return the seconds a step.

        On CUDA they are taken between events, so that the host may run ahead as it does in training.
        """
        assert self.contender is not None
        marks = []
        for _ in range(count):
            if feed:
                self.feed()
            began = self.now()
            self.contender.step()
            marks.append((began, self.now()))
        if self.plan.device.type == "cuda":
            torch.cuda.synchronize(self.plan.device)
            seconds = sum(began.elapsed_time(ended) for began, ended in marks) / 1000
        else:
            seconds = sum(ended - began for began, ended in marks)
        self.spent += seconds
        return seconds / count

    def now(self) -> float | torch.cuda.Event:
        """A moment: on the clock, or in the queue of the GPU."""
        if self.plan.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
