"""Where the matrices of a parameter lie: from a tensor to its wide blocks ``(B, p, n)``, without a copy."""

from __future__ import annotations

from torch import Tensor


def block_view(tensor: Tensor, blocks: int, dim: int = 0) -> Tensor:
    """The blocks of a tensor as wide matrices ``(blocks, p, n)``, a view: writing to it writes to the tensor.

    ``dim`` 0 cuts the rows, 1 the columns. More than two dimensions are flattened to (first, rest) as
    torch.nn.init.orthogonal_ does. Tall blocks come transposed, so that ``p <= n`` always.

    Args:
        tensor: ``(rows, columns)`` or ``(rows, ...)``.
        blocks: number of blocks, a divisor of ``tensor.shape[dim]``.
        dim: dimension along which the blocks are stacked, 0 or 1.

    Raises:
        RuntimeError: more than two dimensions, in a memory format that cannot be flattened in place.

    >>> import torch
    >>> from manifold_opt.blocks import block_view
    >>> block_view(torch.arange(6.0).view(6, 1), 3)
    tensor([[[0., 1.]],
    <BLANKLINE>
            [[2., 3.]],
    <BLANKLINE>
            [[4., 5.]]])
    """
    matrix = tensor.view(tensor.shape[0], -1) if tensor.ndim > 2 else tensor
    stacked: Tensor = matrix.unflatten(dim, (blocks, -1)).movedim(dim, 0)  # type: ignore[no-untyped-call]
    return stacked.mT if stacked.shape[-2] > stacked.shape[-1] else stacked
