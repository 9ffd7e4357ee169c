"""What the examples on recurrent nets share: how they start, and the task of copying memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from manifold_opt import init

SYMBOLS, LENGTH = 8, 10  # 1 to 8 to choose from, 0 is nothing, 9 asks for the answer; and how many to remember


def orthogonal_start_(net: nn.Module, *, gates: int = 1, scheme: str = "henaff") -> None:
    """Recurrent weights orthogonal, gate by gate; other matrices as Xavier has them; biases zero."""
    for name, parameter in net.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
        elif "weight_hh" in name:
            init.orthogonal_(parameter, blocks=gates, scheme=scheme)
        else:
            nn.init.xavier_uniform_(parameter)


def copying(delay: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols, blanks, a mark that says go; and what to answer. Both ``(delay + 20, size)``."""
    symbols = torch.randint(1, SYMBOLS + 1, (LENGTH, size), generator=generator)
    x = torch.zeros(delay + 2 * LENGTH, size, dtype=torch.long)
    y = x.clone()
    x[:LENGTH] = y[-LENGTH:] = symbols
    x[delay + LENGTH - 1] = SYMBOLS + 1
    return x, y


def memoryless(delay: int) -> float:
    """Mean cross-entropy of copying by an answer that knows when to repeat, not what."""
    return LENGTH * math.log(SYMBOLS) / (delay + 2 * LENGTH)
