"""Cost of a step against the size of one matrix, and against the number of small matrices."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import init, orthogonality_error
from .methods import PEERS, MethodRun, Settings, build
from .results import Cost, format_error, quartiles
from .tasks import Matrix

SIZES, COUNTS, SMALL = (16, 32, 64, 128, 256), (10, 100), 16
ROUNDS, TIME_SLICE = 7, 0.02  # slices per scheme, and seconds per slice, at least one step
WARM = 10  # warm-up steps, after which the error is measured
SETS = 4  # number of gradient sets, used cyclically

Callback = Callable[[str], None]
Point = tuple[int, int]  # number and size of square matrices
T = TypeVar("T")


def problem_sizes(largest: int | None) -> list[Point]:
    """Return the measured points: one matrix of every size, then several of the smallest size.

    Sizes and numbers of matrices are at most ``largest``, so a comparison of small matrices is quick.
    """
    sizes = [n for n in SIZES if largest is None or n <= largest] or [largest or SMALL]
    if largest is not None and largest > sizes[-1]:
        sizes.append(largest)
    counts = [count for count in COUNTS if largest is None or count <= largest]
    return [(1, n) for n in sizes] + [(count, sizes[0]) for count in counts]


def measure(
    point: Point, schemes: tuple[str, ...], settings: Settings, device: torch.device, callback: Callback
) -> Iterator[Cost]:
    """Time a step of every scheme, interleaved, for one number and size of matrices; record failures in the costs."""
    count, n = point
    costs = {scheme: Cost(scheme, count, n, n, peer=scheme in PEERS) for scheme in schemes}
    turns: dict[str, Callable[[], float]] = {}
    failures: dict[str, str] = {}
    with torch.random.fork_rng(), torch.enable_grad():
        for scheme in schemes:
            made = attempt(failures, scheme, _time_slice_timer, scheme, point, settings, device)
            if made is not None:
                turns[scheme], costs[scheme].orthogonality_error = made
        times = take_turns(turns, ROUNDS, failures, callback)
    for scheme, cost in costs.items():
        cost.failure = failures.get(scheme)
        if cost.failure is None:
            milliseconds = [1e3 * seconds for seconds in times[scheme]]
            cost.milliseconds, cost.quartiles = statistics.median(milliseconds), quartiles(milliseconds)
    yield from costs.values()


def take_turns(
    turns: Mapping[str, Callable[[], float | None]],
    rounds: int,
    failures: dict[str, str],
    callback: Callback = lambda _: None,
) -> dict[str, list[float]]:
    """Call every turn once per round, so that other load on the machine affects all of them alike.

    Args:
        turns: functions by name. Each makes some steps and returns the seconds per step, or None if it has finished.
        rounds: number of calls of each function.
        failures: gets the error of a function that raises; it is not called again.
        callback: called with the name before every turn.

    Returns:
        The seconds per step by name, one value per round.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            if name not in failures:
                callback(name)
                seconds = attempt(failures, name, turn)
                times[name] += [] if seconds is None else [seconds]
    return times


def attempt(failures: dict[str, str], name: str, work: Callable[..., T], *args: object) -> T | None:
    """Return the result of ``work``; if it raises, record the error under ``name`` and return None."""
    try:
        return work(*args)
    except Exception as error:
        failures[name] = format_error(error)
        return None


def _time_slice_timer(
    scheme: str, point: Point, settings: Settings, device: torch.device
) -> tuple[Callable[[], float], float]:
    """Return a function that times steps for one slice, and the error after the warm-up steps."""
    method, step = make_step(scheme, point, settings, device)
    for _ in range(WARM):
        step()
    with torch.no_grad():
        error = max(map(orthogonality_error, method.matrices()))

    def turn() -> float:
        count, start = 0, time.perf_counter()
        while True:
            step()
            count += 1
            elapsed = time.perf_counter() - start
            if elapsed >= TIME_SLICE:
                return elapsed / count

    return turn, error


def make_step(
    scheme: str, point: Point, settings: Settings, device: torch.device
) -> tuple[MethodRun, Callable[[], None]]:
    """Set up a scheme on random matrices, and return it with a function that makes one step.

    The loss is the inner product with a gradient, the cheapest forward and backward pass. It is timed too, because a
    parametrization computes the weight there.
    """
    count, n = point
    torch.manual_seed(0)
    matrices = nn.ModuleList(Matrix(init.orthogonal_(torch.empty(n, n))) for _ in range(count)).to(device)
    sets = itertools.cycle(torch.randn(SETS, count, n, n, device=device).unbind())
    method = build(scheme, matrices, settings)

    def step() -> None:
        method.zero_grad()
        weights = [module.weight for module in matrices]
        loss = sum((w * g).sum() for w, g in zip(weights, next(sets), strict=True))
        assert isinstance(loss, Tensor)
        method.backward(loss)
        method.step()

    return method, step
