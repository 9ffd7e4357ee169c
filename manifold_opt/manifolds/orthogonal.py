"""Manifold of parameters with orthogonal blocks: each block is ``gain`` times a point of the Stiefel manifold."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..linalg.matrices import error_at_rounding
from ..linalg.nearest import nearest_orthogonal
from ..linalg.precision import working_dtype
from ..linalg.products import Workspace, norm
from ..stiefel.geometry import error, from_frame, riemannian_gradient, to_frame
from ..stiefel.polar import polar
from ..stiefel.step import Settings, retract_
from .base import Manifold
from .layout import BlockLayout, Shape, is_writable
from .shards import Interval

_FAR = 0.1  # error per row, over sqrt(p), far above rounding in every dtype


@dataclass(frozen=True, repr=False)
class Orthogonal(Manifold):
    """Constraint of a parameter marked as orthogonal: every block is ``gain`` times an orthogonal matrix.

    Attributes:
        blocks: number of equal blocks stacked along ``dim``, or the rows (columns) of each.
        dim: dimension along which they are stacked.
        gain: the singular values of every block.
        which: indices of the orthogonal blocks; None is all of them. The other blocks are unconstrained.
        flatten: True flattens dimensions beyond the second to (first, rest). False treats the parameter as a batch of
            matrices, its last two dimensions; ``blocks`` then applies to each matrix.

    >>> import torch
    >>> from manifold_opt import constraint_of, mark_orthogonal
    >>> gate = constraint_of(mark_orthogonal(torch.nn.GRU(4, 8), "weight_hh_l0", which=(2,)))
    >>> gate, gate.block_sizes((24, 8)), gate.free_rows((24, 8))
    (Orthogonal(blocks=3, dim=0, gain=1.0, which=(2,)), (8, 8, 8), [(0, 16)])
    """

    allows_complex = uses_retraction = frame_is_bounded = True
    point_name = "block"
    blocks: int | tuple[int, ...] = 1
    dim: int = 0
    gain: float = 1.0
    which: tuple[int, ...] | None = None
    flatten: bool = True

    def __repr__(self) -> str:
        shown = f"blocks={self.blocks}, dim={self.dim}, gain={self.gain}"
        shown += f", which={self.which}" * (self.which is not None) + ", flatten=False" * (not self.flatten)
        return f"Orthogonal({shown})"

    def block_sizes(self, shape: Shape) -> tuple[int, ...]:
        """Return the rows (columns) of every block; for a batch, of one matrix."""
        length = shape[self.dim] if self.flatten else shape[-2]
        return self.blocks if isinstance(self.blocks, tuple) else (length // self.blocks,) * self.blocks

    def layouts(self, shape: Shape) -> tuple[BlockLayout, ...]:
        """Return one layout ``(B, p, n)`` per run of consecutive marked blocks of equal size."""
        if not self.flatten:
            return (BlockLayout(self.block_sizes(shape)[0], flatten=False),)
        if self.which is None and isinstance(self.blocks, int):
            return (BlockLayout(shape[self.dim] // self.blocks, self.dim),)
        runs = [
            (size, [interval for _, _, interval in run])
            for (size, marked), run in itertools.groupby(self._intervals(shape), key=lambda block: block[:2])
            if marked
        ]
        whole = shape[self.dim]
        return tuple(
            BlockLayout(size, self.dim, *(_span(run) if _span(run)[1] < whole else (0, None))) for size, run in runs
        )

    def free_rows(self, shape: Shape) -> list[Interval]:
        """Return start and length along ``dim`` of the rows (columns) outside the orthogonal blocks."""
        if self.which is None:
            return []
        runs = itertools.groupby(self._intervals(shape), key=lambda block: block[1])
        return [_span([interval for _, _, interval in run]) for marked, run in runs if not marked]

    def part(self, shape: Shape, kept: list[Interval]) -> Orthogonal:
        """Return the constraint of the blocks in ``kept``, which are stacked in their order."""
        if not self.flatten and len(shape) > 2:
            return self
        inside = [
            (size, marked)
            for size, marked, (start, _) in self._intervals(shape)
            if any(first <= start < first + length for first, length in kept)
        ]
        sizes, which = tuple(size for size, _ in inside), tuple(k for k, (_, marked) in enumerate(inside) if marked)
        return replace(
            self,
            blocks=len(sizes) if len(set(sizes)) == 1 else sizes,
            which=None if len(which) == len(sizes) else which,
        )

    def _intervals(self, shape: Shape) -> list[tuple[int, bool, Interval]]:
        """Return the size of every block, whether it is marked, and its start and length."""
        sizes = self.block_sizes(shape)
        starts = itertools.accumulate((0, *sizes[:-1]))
        marked = range(len(sizes)) if self.which is None else self.which
        return [(size, k in marked, (start, size)) for k, (size, start) in enumerate(zip(sizes, starts, strict=True))]

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the Riemannian gradient in the Euclidean metric."""
        return riemannian_gradient(x / self.gain, g)

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Apply the polar retraction; the optimizers use their own ``retraction`` option instead."""
        return self.gain * polar(x / self.gain, v / self.gain)

    def frame_gradient(self, x: Tensor, g: Tensor, ws: Workspace) -> Tensor:
        r"""Return :math:`G W^\top` in ``ws.a`` for square blocks, the gradient itself for others."""
        return torch.bmm(g, ws.adjoint("w", x), out=ws.a) if x.shape[-2] == x.shape[-1] else g

    def is_skew(self, shape: Shape) -> bool:
        """Return True for square blocks."""
        return shape[-2] == shape[-1]

    has_frame = is_skew

    def change_frame(self, x: Tensor, moment: Tensor, *, mean_square: bool, back: bool) -> Tensor:
        """Convert a moment to that of the gradient in the frame of square blocks, or ``back``."""
        return (from_frame if back else to_frame)(x / self.gain, moment, mean_square)

    def step_options(
        self,
        group: Mapping[str, Any],
        count: Callable[..., None],
        steps: int | None,
        *,
        retraction: Any = None,
        **shared: Any,  # noqa: ARG002
    ) -> Settings:
        """Return the retraction and its settings."""
        return Settings(retraction, group, count, steps)

    def step_(self, x: Tensor, v: Tensor, moments: dict[str, Tensor], ws: Workspace, options: Settings) -> None:  # noqa: ARG002
        """Move wide blocks in place. They are points divided by their gain."""
        retract_(x, v, ws, options)

    def project_point(self, x: Tensor) -> Tensor:
        """Return the polar factors, computed in float64."""
        return self.gain * nearest_orthogonal(x / self.gain)

    def error(self, x: Tensor) -> Tensor:
        r"""Return :math:`\|I - W W^\top\|_F` of each block W, after division by the gain."""
        return error(x / self.gain)

    def tolerance(self, x: Tensor) -> float:
        """Return an error of a few units of roundoff per row."""
        return error_at_rounding(x.shape[-2], x.shape[-1], x.dtype)

    def find_off_manifold(self, x: Tensor, slack: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return a mask and the nearest points, as for any manifold; ``slack`` is an error per row."""
        values, p = x.to(working_dtype(x.dtype)), x.shape[-2]
        # The error is at least sqrt(p) times this; most values that are marked are so far off, without a Gram matrix.
        excess = norm(values / self.gain).square() / p - 1
        if bool((excess.abs() > slack + _FAR).all()):
            return torch.ones_like(excess, dtype=torch.bool), self.project_point(values).to(x)
        return super().find_off_manifold(x, slack * p**0.5)

    def index_of(self, point: int) -> int:
        """Return the index of a block among all blocks, marked or not."""
        return point if self.which is None else self.which[point]

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """Return a reason if blocks do not fit the shape, the gain is out of range, or strides allow no matrix view."""
        return _invalid_reason(self, tensor)


def _span(run: list[Interval]) -> Interval:
    return run[0][0], sum(length for _, length in run)


def _invalid_reason(c: Orthogonal, tensor: Tensor) -> str | None:
    shape = tuple(tensor.shape)
    if tensor.ndim < 2:
        return f"must have at least 2 dimensions, got shape {shape}; a vector has no orthogonal blocks."
    if not isinstance(c.flatten, bool):
        return f"needs flatten=True or False, got {c.flatten!r}."
    is_int = isinstance(c.dim, int) and not isinstance(c.dim, bool)
    if not is_int or c.dim not in (0, 1) or (c.dim == 1 and tensor.ndim != 2):
        return f"has shape {shape}; its blocks are stacked along dim 0, or dim 1 of a matrix, got dim={c.dim!r}."
    problem = _invalid_blocks_reason(c, shape) or _invalid_which_reason(c)
    if problem:
        return problem
    if not (isinstance(c.gain, (int, float)) and 0 < c.gain < math.inf):
        return f"needs a finite gain above 0, got gain={c.gain!r}."
    if (tensor.is_floating_point() or tensor.is_complex()) and not c.gain <= torch.finfo(tensor.dtype).max:
        return f"has dtype {tensor.dtype}, in which gain={c.gain!r} is infinite."
    if not is_writable(c.layouts(shape), tensor.detach()):
        return (
            f"has strides {tensor.stride()} in which its blocks cannot be seen as matrices; keep it contiguous, with "
            "module.to(memory_format=torch.contiguous_format)."
        )
    return None


def _invalid_blocks_reason(c: Orthogonal, shape: Shape) -> str | None:
    blocks, dim = c.blocks, c.dim if c.flatten else len(shape) - 2
    length = shape[dim]
    if not c.flatten and (isinstance(blocks, tuple) or c.which is not None or c.dim != 0):
        return (
            "is a batch of matrices with flatten=False: leave out which and dim, and give one number of blocks, if any."
        )
    if isinstance(blocks, tuple):
        if not blocks or any(isinstance(size, bool) or not isinstance(size, int) or size < 1 for size in blocks):
            return f"needs whole numbers of rows >= 1 for its blocks, got blocks={blocks!r}."
        if sum(blocks) != length:
            return f"has shape {shape}: blocks={blocks} must add up to the {length} of dim {c.dim}, not {sum(blocks)}."
    elif isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        return f"needs a whole number of blocks >= 1, got blocks={blocks!r}."
    elif length % blocks:
        return (
            f"has shape {shape}: blocks={blocks} must divide dim {dim}. nn.RNN has 1 block, nn.GRU 3 gate blocks, "
            "nn.LSTM 4. For blocks of unequal size give the rows of each, as in blocks=(64, 64, 128)."
        )
    return None


def _invalid_which_reason(c: Orthogonal) -> str | None:
    if c.which is None:
        return None
    count = len(c.blocks) if isinstance(c.blocks, tuple) else c.blocks
    numbers = isinstance(c.which, tuple) and all(isinstance(k, int) and not isinstance(k, bool) for k in c.which)
    if not numbers or not c.which or not all(0 <= k < count for k in c.which):
        return f"has {count} blocks: which={c.which!r} must name some of 0 to {count - 1}."
    return None
