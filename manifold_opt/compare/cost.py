"""What a step costs: against the size of one matrix, and against the number of small ones. Nothing is learned."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import init, orthogonality_error
from .contenders import PEERS, Contender, Settings, build
from .results import Cost, in_one_line
from .tasks import Matrix

SIZES, COUNTS, SMALL = (16, 32, 64, 128, 256), (1, 10, 100), 16
ROUNDS, TURN = 7, 0.02  # turns of every scheme, and seconds of one; one step at least
WARM = 10  # steps before, after which the error is taken
SETS = 4  # of gradients, taken in turn

Tell = Callable[[str], None]
T = TypeVar("T")


def points(largest: int | None) -> list[tuple[str, int, int]]:
    """What is measured: which of both is varied, how many matrices, and their size; up to a size if one is given."""
    sizes = [n for n in SIZES if largest is None or n <= largest] or [largest or SMALL]
    if largest is not None and largest > sizes[-1]:
        sizes.append(largest)
    small = min(SMALL, sizes[-1])
    return [("n", 1, n) for n in sizes] + [("count", count, small) for count in COUNTS]


def measure(
    point: tuple[str, int, int], schemes: tuple[str, ...], settings: Settings, device: torch.device, tell: Tell
) -> Iterator[Cost]:
    """Time a step of every scheme, in turns, for one number and size of matrices. One that fails has a failure."""
    varied, count, n = point
    costs = {scheme: Cost(scheme, varied, count, n, n, peer=scheme in PEERS) for scheme in schemes}
    turns: dict[str, Callable[[], float]] = {}
    failures: dict[str, str] = {}
    with torch.random.fork_rng(), torch.enable_grad():
        for scheme in schemes:
            torch.manual_seed(0)
            matrices = nn.ModuleList(Matrix(init.orthogonal_(torch.empty(n, n))) for _ in range(count)).to(device)
            gradients = torch.randn(SETS, count, n, n, device=device)
            made = attempt(failures, scheme, _ready, scheme, matrices, gradients, settings)
            if made is not None:
                turns[scheme], costs[scheme].orthogonality_error = made
        times = take_turns(turns, ROUNDS, failures, tell)
    for scheme, cost in costs.items():
        cost.failure = failures.get(scheme)
        cost.milliseconds = None if cost.failure else 1e3 * statistics.median(times[scheme])
    yield from costs.values()


def take_turns(
    turns: Mapping[str, Callable[[], float | None]], rounds: int, failures: dict[str, str], tell: Tell = lambda _: None
) -> dict[str, list[float]]:
    """Call every turn once per round, so that a busy minute of the machine falls on all of them.

    Args:
        turns: functions by name. Each makes some steps and returns the seconds per step, or None if it is done.
        rounds: how often each is called.
        failures: gets the error of a turn that raises, which is then not called again.
        tell: called with the name before every turn.

    Returns:
        The seconds per step by name, one value per round.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            if name not in failures:
                tell(name)
                seconds = attempt(failures, name, turn)
                times[name] += [] if seconds is None else [seconds]
    return times


def attempt(failures: dict[str, str], name: str, work: Callable[..., T], *args: object) -> T | None:
    """Return the result of some work; if it raises, None, and note the error under a name."""
    try:
        return work(*args)
    except Exception as error:
        failures[name] = in_one_line(error)
        return None


def _ready(
    scheme: str, matrices: nn.ModuleList, gradients: Tensor, settings: Settings
) -> tuple[Callable[[], float], float]:
    """A function that makes steps for a turn, and returns seconds a step; and the error after the first steps."""
    contender = build(scheme, matrices, settings)
    step = _stepper(contender, matrices, gradients)
    for _ in range(WARM):
        step()
    with torch.no_grad():
        error = max(map(orthogonality_error, contender.matrices()))

    def turn() -> float:
        count, began = 0, time.perf_counter()
        while True:
            step()
            count += 1
            spent = time.perf_counter() - began
            if spent >= TURN:
                return spent / count

    return turn, error


def _stepper(contender: Contender, matrices: nn.ModuleList, gradients: Tensor) -> Callable[[], None]:
    """A function that makes one step.

    The loss is the inner product with a gradient: as little as a forward and a backward can cost. It is part of what is
    timed, for there a parametrization does its work.
    """
    sets = itertools.cycle(gradients.unbind())

    def step() -> None:
        contender.zero_grad()
        weights = [module.weight for module in matrices]
        loss = sum((w * g).sum() for w, g in zip(weights, next(sets), strict=True))
        assert isinstance(loss, Tensor)
        contender.backward(loss)
        contender.step()

    return step
