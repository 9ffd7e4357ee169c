"""Layouts: map tensors to a batch of points and back, as a view if possible.

A layout describes a region of a parameter whose points have the same shape. The map has two steps: ``to_rows`` returns
a tensor that can be concatenated with the rows of other parameters, and ``to_points`` the points of such a tensor.

Only this module knows how points lie in a tensor. Other modules read and write them by :func:`get_points` and
:func:`set_points_`, and a step, which moves the points of several parameters as one batch, by :class:`PointMap`.
"""

from __future__ import annotations

import cmath
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .shards import is_dtensor, whole, write_whole_

Shape = tuple[int, ...] | torch.Size


class Unit(NamedTuple):
    """Part of a parameter that a cut along a dimension must not divide.

    Attributes:
        start, length: position along that dimension.
        points: number of points in it.
        cost: estimated operations of its step.
    """

    start: int
    length: int
    points: int
    cost: int


@dataclass(frozen=True)
class BlockLayout:
    """Layout of equal, consecutive blocks as matrices ``(B, p, n)``, by default wide ones: tall blocks are transposed.

    Attributes:
        size: rows per block, or columns if ``dim`` is 1.
        dim: dimension along which the blocks are stacked, 0 (rows) or 1 (columns).
        start: first row (column) of the blocks.
        length: number of rows (columns) of all blocks; None is all of the tensor.
        flatten: True flattens dimensions beyond the second to (first, rest); False treats all but the last two
            as batch dimensions.
        row_dim: dimension that becomes the rows when the tensor is flattened.
        transpose: True transposes all blocks, False none, None the tall ones.
    """

    size: int
    dim: int = 0
    start: int = 0
    length: int | None = None
    flatten: bool = True
    row_dim: int = 0
    transpose: bool | None = None
    point_ndim = 2

    def to_rows(self, tensor: Tensor, *, copy: bool = False) -> Tensor:
        """Return the rows (columns) of the blocks, with the tensor flattened to a matrix.

        Raises:
            RuntimeError: ``copy`` is False and the strides do not allow a view.
        """
        matrix = tensor
        if tensor.ndim > 2 or self.row_dim:
            moved = tensor.movedim(self.row_dim, 0) if self.row_dim else tensor
            shape = (moved.shape[0], -1) if self.flatten else (-1, moved.shape[-1])
            matrix = moved.reshape(shape) if copy else moved.view(shape)
        return matrix if self.length is None else matrix.narrow(self.dim, self.start, self.length)

    def to_points(self, rows: Tensor) -> Tensor:
        """Return the blocks ``(B, p, n)`` of some rows, a view."""
        stacked: Tensor = rows.unflatten(self.dim, (-1, self.size)).movedim(self.dim, 0)  # type: ignore[no-untyped-call]
        is_tall = stacked.shape[-2] > stacked.shape[-1]
        return stacked.mT if (is_tall if self.transpose is None else self.transpose) else stacked

    def is_transposed(self, rows: Tensor) -> bool:
        """Return True if the points are the transposed blocks."""
        other = rows.shape[1 - self.dim]
        is_tall = self.size < other if self.dim else self.size > other
        return is_tall if self.transpose is None else self.transpose

    def block_numel(self, shape: Shape) -> int:
        """Return the number of entries of one block in a tensor of this shape."""
        if not self.flatten:
            return self.size * shape[-1]
        along = shape[self.row_dim] if self.row_dim else shape[self.dim]
        return self.size * (math.prod(shape) // along)

    def view(self, tensor: Tensor) -> Tensor:
        """Return the blocks ``(B, p, n)`` of a tensor, a view: writing to it writes to the tensor."""
        return self.to_points(self.to_rows(tensor))

    def units(self, shape: Shape) -> tuple[int, list[Unit]]:
        """Return a dimension between whose blocks a tensor of this shape can be cut, and these blocks."""
        dim, size, points = self.row_dim or self.dim, self.size, 1
        if not self.flatten and len(shape) > 2:
            size, points = 1, math.prod(shape[1:-1]) // self.size
        numel = math.prod(shape) // shape[dim] * size
        cost = numel * min(self.size, self.block_numel(shape) // self.size)
        length = shape[dim] if self.length is None else self.length
        return dim, [Unit(start, size, points, cost) for start in range(self.start, self.start + length, size)]

    def from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """Invert :meth:`to_rows` if the blocks cover the whole tensor: return a view of its shape."""
        if not self.row_dim:
            return rows.view(shape)
        moved = (shape[self.row_dim], *shape[: self.row_dim], *shape[self.row_dim + 1 :])
        return rows.view(moved).movedim(0, self.row_dim)


@dataclass(frozen=True)
class SliceLayout:
    """Layout of slices along one dimension, or of trailing dimensions, as points ``(B, ..., *point)``.

    Attributes:
        point_ndim: number of trailing dimensions that form a point.
        dim: dimension that is moved to the front; None moves none.
        start: first slice.
        length: number of slices; None is all of them.
    """

    point_ndim: int
    dim: int | None = None
    start: int = 0
    length: int | None = None

    def to_rows(self, tensor: Tensor, *, copy: bool = False) -> Tensor:  # noqa: ARG002
        """Return the slices ``(B, ...)``, always a view; a tensor that is one point becomes a batch of one."""
        moved = tensor.movedim(self.dim, 0) if self.dim else tensor
        moved = moved if moved.ndim > self.point_ndim else moved.unsqueeze(0)
        return moved if self.length is None else moved.narrow(0, self.start, self.length)

    def to_points(self, rows: Tensor) -> Tensor:
        """Return the rows unchanged."""
        return rows

    def view(self, tensor: Tensor) -> Tensor:
        """Return the points of a tensor, a view: writing to it writes to the tensor."""
        return self.to_rows(tensor)

    def units(self, shape: Shape) -> tuple[int, list[Unit]]:
        """Return a dimension between whose slices a tensor of this shape can be cut, and these slices."""
        if len(shape) <= self.point_ndim:
            return 0, [Unit(0, shape[0], 1, math.prod(shape))]
        dim = self.dim or 0
        numel, length = math.prod(shape) // shape[dim], shape[dim] if self.length is None else self.length
        return dim, [Unit(start, 1, 1, numel) for start in range(self.start, self.start + length)]

    def from_rows(self, rows: Tensor, shape: Shape) -> Tensor:
        """Invert :meth:`to_rows` if the slices cover the whole tensor."""
        if not self.dim:
            return rows.view(shape)
        return rows.view(shape[self.dim], *shape[: self.dim], *shape[self.dim + 1 :]).movedim(0, self.dim)


Layout = BlockLayout | SliceLayout


def overlap_problem(tensor: Tensor) -> str | None:
    """Return a message, to follow the tensor's name, if two of its entries may share memory; else None.

    Entries are known to be distinct if every stride exceeds the extent of all shorter strides. A few layouts without
    overlap fail this test; they are rejected too.
    """
    reach = 0
    for stride, length in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if length > 1:
            if stride <= reach:
                return f"has strides {tensor.stride()}: entries share memory, or could; use .clone() first."
            reach += stride * (length - 1)
    return None


def units(layouts: Sequence[Layout], shape: Shape) -> tuple[int, list[Unit]]:
    """Return the dimension along which a parameter of this shape is cut, and its units in order. They cover it.

    Rows outside every layout belong to the unit that follows them, at the end to the last one.
    """
    dims, parts = zip(*(layout.units(shape) for layout in layouts), strict=True)
    found, end = [], 0
    for unit in sorted(unit for part in parts for unit in part):
        found.append(unit._replace(start=end, length=unit.start + unit.length - end))
        end = unit.start + unit.length
    found[-1] = found[-1]._replace(length=shape[dims[0]] - found[-1].start)
    return dims[0], found


def get_points(layout: Layout, tensor: Tensor) -> Tensor:
    """Return the points of a tensor: a view if its strides allow one, else a copy. Gathers a DTensor."""
    return layout.to_points(layout.to_rows(whole(tensor) if is_dtensor(tensor) else tensor, copy=True))


def is_viewable(layout: Layout, tensor: Tensor) -> bool:
    """Return True if the points of a tensor can be viewed, and so be written to in place."""
    if is_dtensor(tensor):
        return False
    try:
        layout.view(tensor)
    except RuntimeError:
        return False
    return True


def with_view(layout: Layout, tensor: Tensor, like: Tensor) -> Tensor:
    """Return ``tensor`` if its points can be viewed, else a copy with the strides of ``like``."""
    return tensor if is_viewable(layout, tensor) else torch.empty_like(like, dtype=tensor.dtype).copy_(tensor)


def is_writable(layouts: tuple[Layout, ...], tensor: Tensor) -> bool:
    """Return True if the points of a tensor can be written to: through a view, or by a copy of the whole tensor."""
    if all(is_viewable(layout, tensor) for layout in layouts):
        return True
    layout = layouts[0]
    if len(layouts) > 1 or (isinstance(layout, BlockLayout) and layout.length is not None):
        return False
    try:
        get_points(layout, tensor)
    except RuntimeError:
        return False
    return True


def set_points_(layout: Layout, tensor: Tensor, mask: Any, values: Tensor) -> None:
    """Write ``values`` to the points of a tensor selected by ``mask``, a mask or an index. Gathers a DTensor."""
    if is_dtensor(tensor):
        value = whole(tensor).clone()
        set_points_(layout, value, mask, values)
        write_whole_(tensor, value)
        return
    viewable = tensor if is_viewable(layout, tensor) else tensor.contiguous()
    rows = layout.to_rows(viewable, copy=True)
    points = layout.to_points(rows)
    points[mask] = values
    if not is_viewable(layout, viewable):
        viewable = layout.from_rows(rows, tensor.shape)
    if viewable is not tensor:
        tensor.copy_(viewable)


class PointMap:
    """Map from equal tensors to one batch of their points ``(B, *point)``, and back.

    Attributes:
        layout: position of the points in each tensor.
        count: number of tensors.
        is_view: True if the points are views: those of a single tensor whose strides allow it.
        covers: True if every entry of a tensor belongs to a point.
        points_per_tensor: number of points in each tensor.
        point_shape: shape of a point.
        buffer_shape: shape of a buffer for copies of the points of all tensors.
        strides: strides of a tensor, with shape and strides of the view of its points; None if it has none.
    """

    def __init__(self, layout: Layout, tensor: Tensor, count: int) -> None:
        self.layout, self.count = layout, count
        self.is_view = count == 1 and is_viewable(layout, tensor)
        self.covers = layout.length is None
        rows = layout.to_rows(tensor, copy=True)
        points = layout.to_points(rows)
        self.points_per_tensor, self.point_shape = len(points), points.shape[1:]
        self._shape, self._row_dim = tensor.shape, layout.dim if isinstance(layout, BlockLayout) else 0
        self._rows = rows.shape[self._row_dim]
        self._is_transposed = isinstance(layout, BlockLayout) and layout.is_transposed(rows)
        self._is_identity = rows.shape == tensor.shape and rows.stride() == tensor.stride()
        self.buffer_shape = tuple(n * (count if dim == self._row_dim else 1) for dim, n in enumerate(rows.shape))
        has_view = self.is_view and points.storage_offset() == tensor.storage_offset()
        self.strides = (tensor.stride(), tuple(points.shape), points.stride()) if has_view else None

    def points(self, tensors: list[Tensor], out: Tensor | None = None) -> Tensor:
        """Return the points of ``tensors``: a view of a single one if possible, else a copy, in ``out`` if given."""
        return get_points(self.layout, tensors[0]) if self.is_view else self.copy(tensors, out)

    def copy(self, tensors: list[Tensor], out: Tensor | None = None) -> Tensor:
        """Return a copy of the points of ``tensors``, in ``out`` if given."""
        rows = tensors if self._is_identity else [self.layout.to_rows(tensor, copy=True) for tensor in tensors]
        return self.layout.to_points(torch.cat(rows, self._row_dim, out=out))

    def split(self, points: Tensor) -> list[Tensor]:
        """Return views of copied points, one per tensor, in its shape. The points must cover the tensors."""
        return [self.layout.from_rows(rows, self._shape) for rows in self._split_rows(points)]

    def write_(self, tensors: list[Tensor], points: Tensor) -> None:
        """Write points to ``tensors``, whose strides must allow a view."""
        torch._foreach_copy_([self.layout.to_rows(tensor) for tensor in tensors], self._split_rows(points))

    def _split_rows(self, points: Tensor) -> list[Tensor]:
        """Return the rows of every tensor, the inverse of ``layout.to_points``."""
        blocks = points.mT if self._is_transposed else points
        rows = (blocks.movedim(0, self._row_dim) if self._row_dim else blocks).reshape(self.buffer_shape)
        return list(rows.split(self._rows, self._row_dim))  # type: ignore[no-untyped-call]


def point_norm(points: Tensor, point_ndim: int, *, keepdim: bool = False) -> Tensor:
    """Return the Euclidean norm of every point ``(B, ..., *point)`` over its last ``point_ndim`` dimensions.

    For points that are numbers these are their absolute values, with or without ``keepdim``.
    """
    if not point_ndim:
        return points.abs()
    return torch.linalg.vector_norm(points, dim=tuple(range(-point_ndim, 0)), keepdim=keepdim)


def point_sum(points: Tensor, point_ndim: int) -> Tensor:
    """Return the sum of the entries of every point, ``(B, ..., 1, ..)``, which is finite only if they are."""
    return points.sum(tuple(range(-point_ndim, 0)), keepdim=True) if point_ndim else points


def point_max(points: Tensor, point_ndim: int) -> Tensor:
    """Return the largest absolute value of the entries of every point, ``(B, ..., 1, ..)``."""
    size = points.abs()
    return size.amax(tuple(range(-point_ndim, 0)), keepdim=True) if point_ndim else size


def all_points_move(v: Tensor, point_ndim: int) -> bool:
    """Return True if one entry of each step shows that its norm is not zero. False proves nothing. Reads a value."""
    first = v.flatten(-point_ndim).select(-1, 0) if point_ndim else v
    return int(torch.count_nonzero(first * first)) == first.numel()  # the square, which the norm of a point contains


def sum_is_finite(x: Tensor) -> bool:
    """Return True if the sum of the entries is finite, so that all of them are. Reads a value."""
    return cmath.isfinite(x.sum().item())


def point_any(mask: Tensor, point_ndim: int) -> Tensor:
    """Return a mask ``(B, ..., 1, ..)`` of points for which any entry of ``mask`` is true."""
    return mask.any(tuple(range(-point_ndim, 0)), keepdim=True) if point_ndim else mask
