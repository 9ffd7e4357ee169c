"""What step.py and growth.py share: works, one row per method, and steps that are timed in turns.

The methods are those of manifold_opt.compare, so that peers move as far per step as this package. An optimizer is timed
for its step alone; a parametrization also for its forward and backward, where it does its work.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from manifold_opt import RETRACTIONS, SGD, init, orthogonality_error
from manifold_opt.compare.cost import attempt, take_turns
from manifold_opt.compare.methods import MethodRun, Settings, build, parametrized
from manifold_opt.compare.tasks import Matrix

POOL = 16  # gradient sets, taken in turn
FEW = 16  # matrices up to which the floor is also taken one by one
WARM = 200  # steps before any is timed, if half the budget allows: the first ones of Adam are long


class Work(NamedTuple):
    """So many parameters, each of so many blocks p x n, one below the other."""

    parameters: int
    blocks: int
    p: int
    n: int

    def __str__(self) -> str:
        many = f"{self.parameters} parameter{'s' * (self.parameters != 1)}"
        return f"{many} of {self.blocks} block{'s' * (self.blocks != 1)} {self.p} x {self.n}"


WORKS = {
    "gru256": Work(1, 3, 256, 256),
    "lstm512": Work(1, 4, 512, 512),
    "one1024": Work(1, 1, 1024, 1024),
    "params1000": Work(1000, 1, 32, 64),
    "blocks4096": Work(1, 4096, 16, 16),
    "blocks20000": Work(1, 20000, 3, 3),
    "wide64x4096": Work(1, 1, 64, 4096),
    "one12": Work(1, 1, 12, 12),
    "one48": Work(1, 1, 48, 48),
    "one100": Work(1, 1, 100, 100),
    "gru64": Work(1, 3, 64, 64),
    "wide16x64": Work(1, 1, 16, 64),
    "wide32x512": Work(1, 1, 32, 512),
}
TOYS = {"gru8": Work(1, 3, 8, 8), "params20": Work(20, 1, 3, 6), "blocks50": Work(1, 50, 3, 3)}


@dataclass
class Plan:
    """How rows are timed.

    Attributes:
        rounds: in every round every row has one turn.
        turn: seconds that a turn takes about; it is one step at least.
        budget: seconds for the timed steps of one row; past it, it has no more turns.
        device: where they run.
        dtype: of the weights.
        lr: learning rate of all rows.
        sets: how many sets of gradients there are.
    """

    rounds: int
    turn: float
    budget: float
    device: torch.device
    dtype: torch.dtype = torch.float32
    lr: float = 1e-3
    sets: int = POOL


@dataclass
class Result:
    """What was measured of one row.

    Attributes:
        times: seconds per step, one value per round.
        steps: how many steps the times stand for.
        error: distance from orthogonality at the end; None for the floor.
        failure: the error that ended it, on one line; None if all went well.
    """

    times: list[float] = field(default_factory=list)
    steps: int = 0
    error: float | None = None
    failure: str | None = None

    @property
    def median(self) -> float | None:
        """Seconds per step; None if it failed."""
        return self._quantile(0.5)

    @property
    def spread(self) -> float | None:
        """Interquartile range of the rounds, in seconds per step; None if it failed."""
        low, high = self._quantile(0.25), self._quantile(0.75)
        return None if low is None or high is None else high - low

    def _quantile(self, q: float) -> float | None:
        if self.failure is not None or not self.times:
            return None
        return float(torch.tensor(self.times, dtype=torch.float64).quantile(q))


class Problem:
    """A work with its start and gradients, the same for every row."""

    def __init__(self, work: Work, plan: Plan) -> None:
        self.work, self.lr = work, plan.lr
        count, blocks, p, n = work
        generator = torch.Generator().manual_seed(0)
        start = torch.empty(count * blocks * p, n, dtype=plan.dtype)
        init.orthogonal_(start, count * blocks, generator=generator)
        self.start = start.view(count, blocks * p, n).to(plan.device)
        shape = (plan.sets, count, blocks * p, n)
        self.gradients = torch.randn(shape, dtype=plan.dtype, generator=generator).to(plan.device)

    def model(self) -> nn.ModuleList:
        """One module with a marked weight per parameter."""
        return nn.ModuleList(Matrix(start.clone(), self.work.blocks) for start in self.start)


@dataclass
class Steps:
    """One row at work.

    Attributes:
        prepare: called before every step, not timed.
        step: what is timed.
        matrices: the blocks as they are now; None for the floor.
    """

    prepare: Callable[[], object]
    step: Callable[[], object]
    matrices: Callable[[], list[Tensor]] | None = None


Method = Callable[[nn.Module, Settings], MethodRun]
Row = Callable[[Problem], Steps | None]


def row(method: Method, *, computed: bool = False, **settings: str) -> Row:
    """Return a row for a method of the comparison; of a parametrization the weight is ``computed`` in every step."""

    def make(problem: Problem) -> Steps:
        model = problem.model()
        run = method(model, replace(Settings(lr=problem.lr), **settings))
        sets = itertools.cycle(problem.gradients.unbind())
        given: list[Tensor] = []

        def backward() -> None:
            torch.autograd.backward([module.weight for module in model], given)

        def prepare() -> None:
            run.zero_grad()
            given[:] = next(sets).unbind()
            if not computed:
                backward()

        def step() -> None:
            if computed:
                backward()
            for optimizer in run.optimizers:
                optimizer.step()

        return Steps(prepare, step, run.matrices)

    return make


def sgd_with_momentum(model: nn.Module, settings: Settings) -> MethodRun:
    """This package's SGD; that of the comparison has no momentum."""
    run = build("orthographic", model, settings)
    run.optimizers = [SGD(model.parameters(), lr=settings.lr, momentum=0.9)]
    return run


def torch_orthogonal(orthogonal_map: str) -> Method:
    """torch.nn.utils.parametrizations.orthogonal by one of its maps."""
    return partial(parametrized, lambda module: parametrizations.orthogonal(module, "weight", orthogonal_map))


def floor(problem: Problem, *, one_by_one: bool) -> Steps | None:
    """The bare products of one step, four of p x n by n x p: one torch.bmm each, or a torch.mm per matrix."""
    count, blocks, p, n = problem.work
    batch = count * blocks
    if one_by_one and batch > FEW:
        return None
    x = problem.start.view(batch, p, n)
    out = x.new_empty(batch, p, p)
    sets = itertools.cycle(problem.gradients.view(-1, batch, p, n).mT.unbind())
    given: list[Tensor] = []

    def prepare() -> None:
        given[:] = [next(sets)]

    def step() -> None:
        for _ in range(4):
            if one_by_one:
                for x_i, given_i, out_i in zip(x, given[0], out, strict=True):
                    torch.mm(x_i, given_i, out=out_i)
            else:
                torch.bmm(x, given[0], out=out)

    return Steps(prepare, step)


FLOOR, DEFAULT = "floor", "Adam, orthographic"
ROWS: dict[str, Row] = {
    **{f"Adam, {name}": row(partial(build, name)) for name in RETRACTIONS},
    "Adam block": row(partial(build, "orthographic"), second_moment="block"),
    "SGD momentum": row(sgd_with_momentum),
    "torch Adam, unconstrained": row(partial(build, "unconstrained")),
    "geoopt, euclidean": row(partial(build, "geoopt")),
    "geoopt, canonical": row(partial(build, "geoopt"), metric="canonical"),
    "pogo": row(partial(build, "pogo")),
    "torch, cayley": row(torch_orthogonal("cayley"), computed=True),
    "torch, matrix_exp": row(torch_orthogonal("matrix_exp"), computed=True),
    "torch, householder": row(torch_orthogonal("householder"), computed=True),
    "geotorch": row(partial(build, "geotorch"), computed=True),
    FLOOR: partial(floor, one_by_one=False),
    "floor, one by one": partial(floor, one_by_one=True),
}


class Timer:
    """Times the steps of one row. The first steps are not timed."""

    def __init__(self, steps: Steps, plan: Plan) -> None:
        self.steps, self.plan = steps, plan
        self.made, self.spent = 0, 0.0
        self.run(1)  # cold
        second = self.run(1)
        self.count = max(1, round(plan.turn / second))
        self.run(min(WARM, int(plan.budget / 2 / second)))

    def turn(self) -> float | None:
        """Make as many steps as fill a turn and return the seconds per step; None if the budget is spent."""
        if self.spent >= self.plan.budget:
            return None
        seconds = self.run(self.count)
        self.made += self.count
        self.spent += self.count * seconds
        return seconds

    def run(self, count: int) -> float:
        """Make some steps and return the seconds per step; on CUDA between events, so that the host may run ahead."""
        marks = []
        for _ in range(count):
            self.steps.prepare()
            began = self.now()
            self.steps.step()
            marks.append((began, self.now()))
        if self.plan.device.type == "cuda":
            torch.cuda.synchronize(self.plan.device)
            return sum(began.elapsed_time(ended) for began, ended in marks) / 1000 / max(count, 1)
        return sum(ended - began for began, ended in marks) / max(count, 1)

    def error(self) -> float | None:
        """Distance from orthogonality of the worst block now; None for the floor."""
        matrices = self.steps.matrices
        return None if matrices is None else max(map(orthogonality_error, matrices()))

    def now(self) -> Any:
        """A moment: on the clock, or in the queue of the GPU."""
        if self.plan.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def side_by_side(names: Iterable[str], problem: Problem, plan: Plan) -> dict[str, Result]:
    """Time rows in turns. One that raises has a failure; one that does not fit the problem is left out."""
    failures: dict[str, str] = {}
    results: dict[str, Result] = {}
    timers: dict[str, Timer] = {}
    for name in names:
        steps = attempt(failures, name, ROWS[name], problem)
        if steps is not None:
            timer = attempt(failures, name, Timer, steps, plan)
            if timer is not None:
                timers[name] = timer
        if name in failures or name in timers:
            results[name] = Result()
    times = take_turns({name: timer.turn for name, timer in timers.items()}, plan.rounds, failures)
    for name, result in results.items():
        result.failure = failures.get(name)
        if result.failure is None:
            result.times, result.steps, result.error = times[name], timers[name].made, timers[name].error()
    return results
