"""What a step costs: against the size of one matrix, and against the number of small ones. Nothing is learned."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from .. import init, mark_orthogonal, orthogonality_error
from .contenders import PEERS, Contender, Settings, build
from .results import Cost, in_one_line

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
    """One point of the curve of every scheme, which take turns. One that fails says so, and the others go on."""
    varied, count, n = point
    costs = {scheme: Cost(scheme, varied, count, n, n, peer=scheme in PEERS) for scheme in schemes}
    turns: dict[str, Callable[[], float]] = {}
    with torch.random.fork_rng(), torch.enable_grad():
        for scheme in schemes:
            torch.manual_seed(0)
            matrices = nn.ModuleList(_Matrix(init.orthogonal_(torch.empty(n, n))) for _ in range(count)).to(device)
            gradients = torch.randn(SETS, count, n, n, device=device)
            made = _guarded(costs[scheme], functools.partial(_ready, scheme, matrices, gradients, settings))
            if made is not None:
                turns[scheme], costs[scheme].orthogonality_error = made
        times: dict[str, list[float]] = {scheme: [] for scheme in turns}
        for _ in range(ROUNDS):
            for scheme, turn in list(turns.items()):
                tell(scheme)
                seconds = _guarded(costs[scheme], turn)
                if seconds is None:
                    del turns[scheme]
                else:
                    times[scheme].append(seconds)
        for scheme in turns:
            costs[scheme].milliseconds = 1e3 * statistics.median(times[scheme])
    yield from costs.values()


class _Matrix(nn.Module):
    """One orthogonal matrix."""

    def __init__(self, start: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)
        mark_orthogonal(self, "weight")


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


def _guarded(cost: Cost, work: Callable[[], T]) -> T | None:
    """The result of some work; None where it fails, and then it is written down why."""
    try:
        return work()
    except Exception as error:
        cost.failure = in_one_line(error)
        return None
