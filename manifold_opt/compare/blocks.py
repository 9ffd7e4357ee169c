"""Marked parameters of a model, and their blocks as tensors of other libraries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import Orthogonal, constraint_of

SPLIT_MIN_ROWS = 128  # on a CPU, other libraries get one tensor per matrix from this size on


@dataclass
class MarkedParameter:
    """A marked parameter with its constraint and its owners: module and name, several if it is tied."""

    owners: list[tuple[nn.Module, str]]
    parameter: nn.Parameter
    constraint: Orthogonal

    def blocks(self) -> Tensor:
        """Return the wide blocks ``(B, p, n)``, divided by their gain."""
        count, dim = self.constraint.blocks, self.constraint.dim
        matrix = self.parameter.flatten(1) if self.parameter.ndim > 2 else self.parameter
        blocks = torch.stack(matrix.chunk(count, dim)) / self.constraint.gain  # type: ignore[arg-type]
        return blocks if blocks.shape[-2] <= blocks.shape[-1] else blocks.mT

    def is_square(self) -> bool:
        """Return True if the blocks are square."""
        _, p, n = self.blocks().shape
        return p == n


def marked_parameters(model: nn.Module) -> list[MarkedParameter]:
    """Return the marked parameters of a model, each once; raise a ValueError if a constraint is not supported."""
    found: dict[int, MarkedParameter] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            constraint = constraint_of(parameter)
            if constraint is not None:
                if (
                    not isinstance(constraint, Orthogonal)
                    or constraint != Orthogonal(constraint.blocks, constraint.dim, constraint.gain)
                    or isinstance(constraint.blocks, tuple)
                ):
                    raise ValueError(
                        f"compare: {leaf} of {type(module).__name__} is marked as {constraint}; only parameters that "
                        "are orthogonal all over, in equal blocks, can be handed to every scheme and peer."
                    )
                found.setdefault(id(parameter), MarkedParameter([], parameter, constraint)).owners.append(
                    (module, leaf)
                )
    return list(found.values())


class _Block(nn.Module):
    """Module with some blocks of a parameter as one tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight


class ExternalBlocks(nn.Module):
    """Parametrization of a marked parameter by tensors ``(B, p, n)`` of another library.

    The blocks form one tensor, except for large matrices on a CPU. There torch's batched LU, which some maps use,
    returns wrong results after torch.set_num_threads (pytorch#142815), and one tensor per matrix is as fast.
    """

    def __init__(
        self, param: MarkedParameter, *, tall: bool = False, wrap: Callable[[Tensor], Tensor] = nn.Parameter
    ) -> None:
        super().__init__()
        self.param, self.tall = [param], tall  # in a list, so that the parameter is not registered
        blocks = param.blocks().detach()
        blocks = (blocks.mT if tall else blocks).clone(memory_format=torch.contiguous_format)
        split = blocks.device.type == "cpu" and min(blocks.shape[-2:]) >= SPLIT_MIN_ROWS
        parts = torch.split(blocks, 1 if split else len(blocks))
        self.chunks = nn.ModuleList(_Block(wrap(part.clone())) for part in parts)

    def blocks(self) -> Tensor:
        """Return the current blocks, wide."""
        weights: list[Tensor] = [chunk.weight for chunk in self.chunks]  # type: ignore[misc]
        blocks = weights[0] if len(weights) == 1 else torch.cat(weights)
        return blocks.mT if self.tall else blocks

    def forward(self, original: Tensor) -> Tensor:
        """Return the weight for the model, in the shape of the parameter."""
        constraint, blocks = self.param[0].constraint, self.blocks()
        blocks = blocks if constraint.gain == 1 else constraint.gain * blocks
        rows = original.shape[0] // (len(blocks) if constraint.dim == 0 else 1)
        oriented = blocks if blocks.shape[-2] == rows else blocks.mT
        return (oriented if constraint.dim == 0 else oriented.movedim(0, 1)).reshape(original.shape)
