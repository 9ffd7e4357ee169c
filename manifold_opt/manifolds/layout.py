"""Where the points of a parameter lie: from a tensor to a batch of points and back, without a copy where one can be.

A *part* of a parameter is a region whose points are alike. It is seen in two steps: its ``rows``, a tensor that other
tensors' rows can be stacked on, and the ``points`` of such a stack, whatever its height.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...] | torch.Size


@dataclass(frozen=True)
class BlockLayout:
    """Equal blocks, one after the other, as wide matrices ``(B, p, n)``: tall ones come transposed.

    Attributes:
        size: rows of one block, columns where ``dim`` is 1.
        dim: dimension along which the blocks follow one another, 0 (rows) or 1 (columns).
        start: the first of the rows (columns) that they take up.
        length: how many those are; all of them where it is None.
        flatten: whether dimensions beyond the second are flattened, to (first, rest); else all but the last two
            count matrices.
        first: the dimension that the rows are, when flattened.
    """

    size: int
    dim: int = 0
    start: int = 0
    length: int | None = None
    flatten: bool = True
    first: int = 0
    dims = 2  # of a point

    def rows(self, tensor: Tensor, *, copy: bool = False) -> Tensor:
        """The tensor as one matrix, or the rows (columns) of it that are these blocks'.

        Raises:
            RuntimeError: it lies so that it cannot be seen as a matrix, and may not be copied.
        """
        matrix = tensor
        if tensor.ndim > 2 or self.first:
            moved = tensor.movedim(self.first, 0) if self.first else tensor
            shape = (moved.shape[0], -1) if self.flatten else (-1, moved.shape[-1])
            matrix = moved.reshape(shape) if copy else moved.view(shape)
        return matrix if self.length is None else matrix.narrow(self.dim, self.start, self.length)

    def points(self, rows: Tensor) -> Tensor:
        """Wide blocks ``(B, p, n)`` of rows, a view."""
        stacked: Tensor = rows.unflatten(self.dim, (-1, self.size)).movedim(self.dim, 0)  # type: ignore[no-untyped-call]
        return stacked.mT if stacked.shape[-2] > stacked.shape[-1] else stacked

    def is_tall(self, rows: Tensor) -> bool:
        """Whether the blocks of some rows have more rows than columns."""
        other = rows.shape[1 - self.dim]
        return self.size < other if self.dim else self.size > other

    def block_numel(self, shape: Shape) -> int:
        """Of one block, in a tensor of a shape."""
        if not self.flatten:
            return self.size * shape[-1]
        along = shape[self.first] if self.first else shape[self.dim]
        return self.size * (math.prod(shape) // along)

    def view(self, tensor: Tensor) -> Tensor:
        """Wide blocks ``(B, p, n)`` of a tensor, a view: writing to it writes to the tensor."""
        return self.points(self.rows(tensor))

    def from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """The inverse of :meth:`rows` where the blocks are all there is: rows as a view of a tensor's shape."""
        if not self.first:
            return rows.view(shape)
        moved = (shape[self.first], *shape[: self.first], *shape[self.first + 1 :])
        return rows.view(moved).movedim(0, self.first)


def block_view(tensor: Tensor, blocks: int, dim: int = 0) -> Tensor:
    """The blocks of a tensor as wide matrices ``(blocks, p, n)``, a view: writing to it writes to the tensor.

    ``dim`` 0 cuts the rows, 1 the columns. More than two dimensions are flattened to (first, rest) as
    ``torch.nn.init.orthogonal_`` does. Tall blocks come transposed, so that ``p <= n`` always.

    Args:
        tensor: ``(rows, columns)`` or ``(rows, ...)``.
        blocks: number of blocks, a divisor of ``tensor.shape[dim]``.
        dim: dimension along which the blocks are stacked, 0 or 1.

    Raises:
        RuntimeError: more than two dimensions, in a memory format that cannot be flattened in place.

    >>> import torch
    >>> from manifold_opt.manifolds.layout import block_view
    >>> block_view(torch.arange(6.0).view(6, 1), 3)
    tensor([[[0., 1.]],
    <BLANKLINE>
            [[2., 3.]],
    <BLANKLINE>
            [[4., 5.]]])
    """
    return BlockLayout(tensor.shape[dim] // blocks, dim).view(tensor)


@dataclass(frozen=True)
class SliceLayout:
    """The slices of a tensor along one dimension, or the tensor as it is, as points ``(B, ..., *point)``.

    Attributes:
        dims: number of dimensions of a point, the last ones.
        dim: dimension that is moved to the front; None leaves the tensor as it is.
        start: the first of the slices.
        length: how many they are; all of them where it is None.
    """

    dims: int
    dim: int | None = None
    start: int = 0
    length: int | None = None

    def rows(self, tensor: Tensor, *, copy: bool = False) -> Tensor:  # noqa: ARG002 - a view, always
        """The slices, ``(B, ...)``; a tensor that is one point becomes a batch of one."""
        moved = tensor.movedim(self.dim, 0) if self.dim else tensor
        moved = moved if moved.ndim > self.dims else moved.unsqueeze(0)
        return moved if self.length is None else moved.narrow(0, self.start, self.length)

    def points(self, rows: Tensor) -> Tensor:
        """The rows as they are."""
        return rows

    def view(self, tensor: Tensor) -> Tensor:
        """Points of a tensor, a view: writing to it writes to the tensor."""
        return self.rows(tensor)

    def from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """The inverse of :meth:`rows` where the slices are all there is."""
        if not self.dim:
            return rows.view(shape)
        return rows.view(shape[self.dim], *shape[: self.dim], *shape[self.dim + 1 :]).movedim(0, self.dim)


Layout = BlockLayout | SliceLayout


def overlap_problem(tensor: Tensor) -> str | None:
    """What is wrong with a tensor two of whose entries may lie in one place, as the end of a sentence; None if none do.

    None do if every stride is longer than the entries along the shorter strides reach. (There are layouts without an
    overlap that are not so. They are refused too.)
    """
    reach = 0
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride <= reach:
                return f"has strides {tensor.stride()}: entries share memory, or could; use .clone() first."
            reach += stride * (length - 1)
    return None


def get_points(part: Layout, tensor: Tensor) -> Tensor:
    """The points of a tensor: a view where that can be, else a copy."""
    return part.points(part.rows(tensor, copy=True))


def is_viewable(part: Layout, tensor: Tensor) -> bool:
    """Whether the points of a tensor can be written to where they are."""
    try:
        part.view(tensor)
    except RuntimeError:
        return False
    return True


def is_writable(parts: tuple[Layout, ...], tensor: Tensor) -> bool:
    """Whether the points of a tensor can be written to, where they are or, if they are all there is, by a copy."""
    if all(is_viewable(part, tensor) for part in parts):
        return True
    part = parts[0]
    if len(parts) > 1 or (isinstance(part, BlockLayout) and part.length is not None):
        return False
    try:
        get_points(part, tensor)
    except RuntimeError:
        return False
    return True


def set_points_(part: Layout, tensor: Tensor, which: Any, values: Tensor) -> None:
    """Write ``values`` to the points of a tensor that ``which``, a mask or an index, says."""
    lying = tensor if is_viewable(part, tensor) else tensor.contiguous()
    rows = part.rows(lying, copy=True)
    points = part.points(rows)
    points[which] = values
    if not is_viewable(part, lying):
        lying = part.from_rows(rows, tensor.shape)
    if lying is not tensor:
        tensor.copy_(lying)


def point_norm(points: Tensor, dims: int, *, keepdim: bool = False) -> Tensor:
    """Euclidean norm of every point ``(B, ..., *point)``, the last ``dims`` dimensions."""
    if not dims:
        return points.abs()
    return torch.linalg.vector_norm(points, dim=tuple(range(-dims, 0)), keepdim=keepdim)
