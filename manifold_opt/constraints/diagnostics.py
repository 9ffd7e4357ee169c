"""How far from orthogonal: of a tensor, a marked parameter, a whole model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import overload

from torch import Tensor, nn

from ..linalg.matrices import float64
from ..manifolds import Orthogonal
from ..manifolds.layout import get_points
from ..stiefel.geometry import error
from .orthogonalize import matrices_of
from .persistence import restore_all
from .tag import constraint_of

Sizes = int | Sequence[int]


@overload
def orthogonality_error(x: Tensor, blocks: Sizes | None = None) -> float: ...
@overload
def orthogonality_error(x: nn.Module) -> dict[str, float]: ...
@overload
def orthogonality_error(x: Tensor | nn.Module, blocks: Sizes | None = None) -> float | dict[str, float]: ...
def orthogonality_error(x: Tensor | nn.Module, blocks: Sizes | None = None) -> float | dict[str, float]:
    r"""Distance from orthogonality, the largest :math:`\|I - W W^\top\|_F` over the matrices of ``x``.

    Computed in float64; :math:`\|I - W^\top W\|_F` for tall matrices. NaN if an entry is.

    Args:
        x: a marked parameter, whose blocks are divided by their gain first; any other tensor
            ``(..., p, n)`` as a batch of matrices; or a module.
        blocks: cut an unmarked tensor into so many blocks along dim 0 first, or blocks of so many rows, as
            mark_orthogonal would.

    Returns:
        The largest error as a float. For a module, ``{name: error}`` of its parameters marked as orthogonal.

    Raises:
        ValueError: a tensor with fewer than two dimensions, or not of a floating-point or complex dtype; ``blocks``
            that do not divide dim 0, that contradict the mark, or of a module.

    >>> import torch
    >>> from manifold_opt import mark_orthogonal, orthogonality_error
    >>> orthogonality_error(2 * torch.eye(4))
    6.0
    >>> layer = torch.nn.Linear(4, 4)
    >>> _ = torch.nn.init.eye_(layer.weight)
    >>> _ = mark_orthogonal(layer, "weight")
    >>> orthogonality_error(layer)
    {'weight': 0.0}
    """
    if isinstance(x, nn.Module):
        if blocks is not None:
            raise ValueError("orthogonality_error: blocks goes with a tensor; a module's parameters have their marks.")
        restore_all(x)
        return {
            name: float(orthogonality_error(parameter))
            for name, parameter in x.named_parameters()
            if isinstance(constraint_of(parameter), Orthogonal)
        }
    mark = constraint_of(x)
    matrices = matrices_of(x, "orthogonality_error")
    if blocks is not None:
        cut = Orthogonal(blocks if isinstance(blocks, int) else tuple(blocks))
        if cut.invalid_reason(x) or (isinstance(mark, Orthogonal) and mark.blocks != cut.blocks):
            raise ValueError(
                f"orthogonality_error: blocks={blocks} must divide dim 0 of shape {tuple(x.shape)}, and be those of "
                f"its mark if it has one, here {mark}."
            )
        matrices = (
            matrices if mark is not None else [(get_points(part, x.detach()), 1.0) for part in cut.layouts(x.shape)]
        )
    return largest(float(error(float64(w) / gain).max()) for w, gain in matrices if w.numel())


def largest(values: Iterable[float]) -> float:
    """The largest of some numbers, 0 of none; NaN if one is, where ``max`` may pass over it."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value, default=0.0)
