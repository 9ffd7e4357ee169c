"""What rotation_quantization.py learns: rotations of a transformer's weights under which rounding costs less."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from manifold_opt import mark_orthogonal

POWERS = 8, 100  # of the norm that stands for the largest entry: smooth at first, close to it at the end
LAST_LR = 0.01  # the learning rate of the last step, as a fraction of the first's
BLOCKS = 12  # of the rotation inside the feed-forward network, which is four times as wide as the others

CLIPS = [0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5]  # fractions of the largest entry that are tried

Inputs = dict[str, Tensor]  # what a weight is multiplied with, (tokens, features), under its name
Map = Callable[[Tensor], Tensor]


class Matrix(NamedTuple):
    """A weight of an encoder layer, the rotation of its input, and that of its output if it has one."""

    name: str
    into: str
    out_of: str | None = None


MATRICES = (
    Matrix("attention.self.query", "attention"),
    Matrix("attention.self.key", "attention"),
    Matrix("attention.self.value", "attention", "heads"),
    Matrix("attention.output.dense", "heads"),  # its input comes rotated: nothing is left to do at run time
    Matrix("intermediate.dense", "widen"),
    Matrix("output.dense", "narrow"),
)


@dataclass(frozen=True)
class Rounding:
    """Round to nearest, symmetric, with one step for each row.

    Attributes:
        bits: of a rounded number.
        group: entries of a row that have a step of their own; all of them unless given.
        clip: try smaller steps, which cut off the largest entries, and take the one of least square error. Otherwise
            the largest entry sets the step.
    """

    bits: int
    group: int | None = None
    clip: bool = False

    @property
    def levels(self) -> int:
        """The largest whole number."""
        return 2 ** (self.bits - 1) - 1

    def parts(self, rows: Tensor) -> Tensor:
        """What has a step in common, along the last dimension."""
        return rows.unflatten(-1, (-1, self.group or rows.shape[-1]))

    def __call__(self, rows: Tensor) -> Tensor:
        """The rows, rounded."""
        parts = self.parts(rows)
        peak = parts.abs().amax(-1, keepdim=True)
        best = self._with_step(parts, peak / self.levels)
        for fraction in CLIPS if self.clip else ():
            other = self._with_step(parts, fraction * peak / self.levels)
            better = (other - parts).square().sum(-1, keepdim=True) < (best - parts).square().sum(-1, keepdim=True)
            best = torch.where(better, other, best)
        return best.flatten(-2)

    def _with_step(self, parts: Tensor, step: Tensor) -> Tensor:
        return (parts / step).round().clamp(-self.levels, self.levels) * step

    def noise(self, rows: Tensor, power: float) -> Tensor:
        r"""Relative square error to expect, :math:`\sum_i s_i^2 d / 12` over :math:`\Vert Z \Vert^2`, made smooth.

        An error uniform in a step s has mean square s^2 / 12, and s is the largest of d entries over ``levels``;
        their ``power``-norm stands for it.
        """
        parts = self.parts(rows)
        log_squares = (parts.square() + 1e-30).log()
        log_peaks = torch.logsumexp(power / 2 * log_squares, -1) * 2 / power
        return log_peaks.exp().sum() * parts.shape[-1] / (12 * self.levels**2) / rows.detach().square().sum()


class Rotation(nn.Module):
    """x to x H R: a random Hadamard matrix H, then an orthogonal R, block by block, which is learned from I on.

    Args:
        fixed: H, ``(n, n)``.
        blocks: of how many blocks R consists.
    """

    fixed: Tensor

    def __init__(self, fixed: Tensor, blocks: int) -> None:
        super().__init__()
        self.blocks = blocks
        self.register_buffer("fixed", fixed)
        self.learned = nn.Parameter(torch.eye(len(fixed) // blocks).repeat(blocks, 1))
        mark_orthogonal(self.learned, blocks=blocks)

    def start(self, rows: Tensor) -> Tensor:
        """By H alone."""
        return rows @ self.fixed

    def turn(self, rows: Tensor) -> Tensor:
        """By R alone."""
        blocks = self.learned.unflatten(0, (self.blocks, -1))
        return torch.einsum("...bi,bij->...bj", rows.unflatten(-1, (self.blocks, -1)), blocks).flatten(-2)

    def forward(self, rows: Tensor) -> Tensor:
        """By both."""
        return self.turn(self.start(rows))


def hadamard(n: int, generator: Generator) -> Tensor:
    """An orthogonal n x n matrix of equal magnitudes, its rows of random sign; n is a power of 2, or 12 of them.

    Sylvester's construction, and for the factor 12 Paley's, from the squares modulo 11.
    """
    h = torch.ones(1, 1)
    if n % 12 == 0:
        squares = {i * i % 11 for i in range(1, 11)}
        sign = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, 11)])
        h = torch.eye(12)
        h[0, 1:], h[1:, 0] = 1, -1
        h[1:, 1:] += sign[(torch.arange(11)[:, None] - torch.arange(11)) % 11]
    while len(h) < n:
        h = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), h)
    return h * (2.0 * torch.randint(2, (n, 1), generator=generator) - 1) / math.sqrt(n)


def rotations_of(layer: nn.Module, heads: int, generator: Generator) -> nn.ModuleDict:
    """The four rotations of an encoder layer, random so far."""
    wide, n = layer.get_submodule("intermediate.dense").weight.shape
    each = [hadamard(n // heads, generator) for _ in range(heads)]
    return nn.ModuleDict(
        {
            "attention": Rotation(hadamard(n, generator), blocks=1),
            "heads": Rotation(torch.block_diag(*each), blocks=heads),
            "widen": Rotation(hadamard(n, generator), blocks=1),
            "narrow": Rotation(hadamard(wide, generator), blocks=BLOCKS),
        }
    )


def rotated(weight: Tensor, matrix: Matrix, maps: Mapping[str, Map]) -> Tensor:
    """The weight in the rotated coordinates of its input, and of its output if that is rotated; rows are outputs."""
    weight = maps[matrix.into](weight)
    return weight if matrix.out_of is None else maps[matrix.out_of](weight.mT).mT


def learn(
    layer: nn.Module,
    rotations: nn.ModuleDict,
    opt: torch.optim.Optimizer,
    *,
    steps: int,
    rounding: Rounding,
    inputs: Inputs | None = None,
) -> Iterator[float]:
    """Make the expected error of the rounded weights small, and that of the inputs too if given; a loss a step."""
    starts, turns = ({name: getattr(r, part) for name, r in rotations.items()} for part in ("start", "turn"))
    weights = [rotated(layer.get_submodule(m.name).weight.detach(), m, starts) for m in MATRICES]
    tokens = {m.into: starts[m.into](inputs[m.name]) for m in MATRICES} if inputs else {}
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, LAST_LR, steps)
    first, last = POWERS
    for step in range(steps):
        power = first * (last / first) ** (step / steps)
        loss = torch.zeros(())
        for matrix, weight in zip(MATRICES, weights, strict=True):
            loss = loss + rounding.noise(rotated(weight, matrix, turns), power)
        for name, x in tokens.items():
            loss = loss + Rounding(rounding.bits).noise(turns[name](x), power)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        yield loss.item()
