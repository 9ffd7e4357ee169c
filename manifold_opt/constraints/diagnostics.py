"""How far a tensor, a marked parameter or a model is from orthogonality, or a weight from its singular values."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import overload

import torch
from torch import Tensor, nn

from ..linalg.matrices import float64
from ..manifolds import FixedSpectrum, Orthogonal
from ..manifolds.layout import get_points
from ..stiefel.geometry import error
from .orthogonalize import blocks_and_gains
from .persistence import restore_model
from .tag import constraint_of

BlockSizes = int | Sequence[int]


@overload
def orthogonality_error(x: Tensor, blocks: BlockSizes | None = None) -> float: ...
@overload
def orthogonality_error(x: nn.Module) -> dict[str, float]: ...
@overload
def orthogonality_error(x: Tensor | nn.Module, blocks: BlockSizes | None = None) -> float | dict[str, float]: ...
def orthogonality_error(x: Tensor | nn.Module, blocks: BlockSizes | None = None) -> float | dict[str, float]:
    r"""Return the distance from orthogonality, the largest :math:`\|I - W W^\top\|_F` over the matrices of ``x``.

    It is computed in float64, as :math:`\|I - W^\top W\|_F` for tall matrices. NaN if an entry is NaN.

    Args:
        x: a marked parameter, whose blocks are divided by their gain first; any other tensor
            ``(..., p, n)``, a batch of matrices; or a module.
        blocks: number of blocks along dim 0 to split an unmarked tensor into, or the rows of each, as in
            mark_orthogonal.

    Returns:
        The largest error as a float. For a module, ``{name: error}`` for its parameters marked as orthogonal, empty if
        there are none; ``max(orthogonality_error(net).values(), default=math.nan)`` is the largest, and NaN then.

    Raises:
        ValueError: the tensor has fewer than two dimensions, or no floating-point or complex dtype; ``blocks``
            does not divide dim 0, contradicts the mark, or is given for a module.

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
        restore_model(x)
        return {
            name: float(orthogonality_error(parameter))
            for name, parameter in x.named_parameters()
            if isinstance(constraint_of(parameter), Orthogonal)
        }
    mark = constraint_of(x)
    matrices = blocks_and_gains(x, "orthogonality_error")
    if blocks is not None:
        cut = Orthogonal(blocks if isinstance(blocks, int) else tuple(blocks))
        if cut.invalid_reason(x) or (isinstance(mark, Orthogonal) and mark.blocks != cut.blocks):
            raise ValueError(
                f"orthogonality_error: blocks={blocks} must divide dim 0 of shape {tuple(x.shape)}, and be those of "
                f"its mark if it has one, here {mark}."
            )
        if mark is None:
            matrices = [(get_points(layout, x.detach()), 1.0) for layout in cut.layouts(x.shape)]
    return max_or_nan(float(error(float64(w) / gain).max()) for w, gain in matrices if w.numel())


@torch.no_grad()
def spectrum_error(x: Tensor, reference: Tensor) -> float:
    r"""Return the largest change of a singular value, relative to the largest one of its matrix.

    It is computed in float64: :math:`\max_i |\sigma_i(W) - \sigma_i(W_0)| / \sigma_1(W_0)`, the largest over the blocks
    of a parameter with fixed singular values, or over the matrices of another tensor ``(..., p, n)``.

    Args:
        x: a parameter or tensor of at least two dimensions.
        reference: the value that it is compared with, of the same shape, as saved before training.

    Returns:
        The error as a float; NaN if an entry is not finite.

    Raises:
        ValueError: the shapes differ, or the tensors have fewer than two dimensions.

    >>> import torch
    >>> from manifold_opt import spectrum_error
    >>> round(spectrum_error(torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([4.0, 2.0]))), 6)
    0.25
    """
    if x.shape != reference.shape or x.ndim < 2:
        raise ValueError(
            f"spectrum_error: needs two tensors of one shape, of at least 2 dimensions, got {tuple(x.shape)} and "
            f"{tuple(reference.shape)}."
        )
    mark = constraint_of(x)
    cut = mark.layouts(x.shape) if isinstance(mark, FixedSpectrum) else ()
    errors = []
    for layout in cut or (None,):
        w, w0 = (float64(t.detach() if layout is None else get_points(layout, t.detach())) for t in (x, reference))
        if not bool(w.isfinite().all() & w0.isfinite().all()):
            return math.nan
        values, known = torch.linalg.svdvals(w), torch.linalg.svdvals(w0)
        largest = known.amax(-1).clamp_min(torch.finfo(known.dtype).tiny)
        errors.append(float(((values - known).abs().amax(-1) / largest).max()))
    return max_or_nan(errors)


def max_or_nan(values: Iterable[float]) -> float:
    """Return the largest value, 0 if there is none, or NaN if a value is NaN, which ``max`` might ignore."""
    return max(values, key=lambda value: math.inf if math.isnan(value) else value, default=0.0)
