"""What rotation_quantization.py learns: rotations of a transformer's weights under which rounding costs less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from manifold_opt.rotations import RotationBank, RoundToNearest, random_hadamard

POWERS = 8, 100  # of the norm that stands for the largest entry: smooth at first, close to it at the end
LAST_LR = 0.01  # the learning rate of the last step, as a fraction of the first's
BLOCKS = 12  # of the rotation inside the feed-forward network, which is four times as wide as the others

Inputs = dict[str, Tensor]  # what a weight is multiplied with, (tokens, features), under its name
Rotate = Callable[[Tensor, str], Tensor]  # rows and the name of a rotation to rotated rows


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


class LayerRotations(nn.Module):
    """The four rotations of an encoder layer, random Hadamard matrices at the start.

    The one inside the feed-forward network, ``narrow``, is a fixed Hadamard matrix of the full width, then small blocks
    that are learned.

    Args:
        layer: the encoder layer.
        heads: number of its attention heads.
        generator: source of random numbers.
    """

    mix: Tensor

    def __init__(self, layer: nn.Module, heads: int, generator: Generator) -> None:
        super().__init__()
        wide, n = layer.get_submodule("intermediate.dense").weight.shape
        self.bank = RotationBank()
        self.bank.add("attention", n, generator=generator)
        self.bank.add("heads", n // heads, blocks=heads, generator=generator)
        self.bank.add("widen", n, generator=generator)
        self.bank.add("narrow", wide // BLOCKS, blocks=BLOCKS, start="identity")
        self.register_buffer("mix", random_hadamard(wide, generator=generator))

    def fixed(self, rows: Tensor, name: str) -> Tensor:
        """Return the rows after the part of a rotation that is not learned."""
        return rows @ self.mix if name == "narrow" else rows

    def forward(self, rows: Tensor, name: str) -> Tensor:
        """Return the rotated rows."""
        rotated: Tensor = self.bank(self.fixed(rows, name), name)
        return rotated


def rotated(weight: Tensor, matrix: Matrix, rotate: Rotate) -> Tensor:
    """The weight in the rotated coordinates of its input, and of its output if that is rotated; rows are outputs."""
    weight = rotate(weight, matrix.into)
    return weight if matrix.out_of is None else rotate(weight.mT, matrix.out_of).mT


def learn(
    layer: nn.Module,
    rotations: LayerRotations,
    opt: torch.optim.Optimizer,
    *,
    steps: int,
    rounding: RoundToNearest,
    inputs: Inputs | None = None,
) -> Iterator[float]:
    """Make the expected error of the rounded weights small, and that of the inputs too if given; a loss a step."""
    weights = [rotated(layer.get_submodule(m.name).weight.detach(), m, rotations.fixed) for m in MATRICES]
    tokens = {m.into: rotations.fixed(inputs[m.name], m.into) for m in MATRICES} if inputs else {}
    schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, LAST_LR, steps)
    first, last = POWERS
    for step in range(steps):
        power = first * (last / first) ** (step / steps)
        loss = torch.zeros(())
        for matrix, weight in zip(MATRICES, weights, strict=True):
            loss = loss + rounding.expected_error(rotated(weight, matrix, rotations.bank), power)
        for name, x in tokens.items():
            loss = loss + RoundToNearest(rounding.bits).expected_error(rotations.bank(x, name), power)
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
        yield loss.item()
