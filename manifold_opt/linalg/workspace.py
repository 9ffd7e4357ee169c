"""Workspaces: buffers that are reused from step to step."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .products import host_can_branch

SQUARE, WIDE = "abcdef", "uwxyz"  # names of buffers (B, p, p) and (B, p, n)


class Pool:
    """Memory of the workspaces of one optimizer: one flat buffer per name, dtype and device, shared by all of them.

    >>> import torch
    >>> from manifold_opt.linalg.workspace import Pool, Workspace
    >>> pool = Pool()
    >>> first, second = (Workspace(pool, torch.zeros(count, 2, 3)) for count in (4, 2))
    >>> first.x.shape, second.x.shape, second.a.shape
    (torch.Size([4, 2, 3]), torch.Size([2, 2, 3]), torch.Size([2, 2, 2]))
    >>> first.x.data_ptr() == second.x.data_ptr()  # the same memory
    True
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._size: dict[tuple[bool, torch.dtype, torch.device], int] = {}

    def reserve(self, like: Tensor, square: int, wide: int) -> None:
        """Set a minimum size, in entries, for buffers that are allocated later: square ones and wide ones."""
        for is_square, size in ((True, square), (False, wide)):
            key = (is_square, like.dtype, like.device)
            self._size[key] = max(size, self._size.get(key, 0))

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the buffer ``name`` as a tensor of this shape, with the dtype and device of ``like``."""
        size, key = 1, (name, like.dtype, like.device)
        for length in shape:
            size *= length
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            reserved = self._size.get((name in SQUARE, like.dtype, like.device), 0)
            flat = self._flat[key] = torch.empty(max(size, reserved), dtype=like.dtype, device=like.device)
        return flat[:size].view(shape)

    def nbytes(self) -> int:
        """Return the number of allocated bytes."""
        return sum(flat.nbytes for flat in self._flat.values())


class Workspace:
    """Buffers for a batch of wide matrices ``(B, p, n)`` or of other points, each allocated on first use.

    Attributes:
        a, b, c, d, e, f: ``(B, p, p)``, for matrices.
        u, w, x, y, z: ``(B, p, n)``, or the shape of the batch.
        readable: whether Python may read values of the batch.
    """

    def __init__(self, pool: Pool | None, like: Tensor, shape: tuple[int, ...] | None = None) -> None:
        shape = tuple(like.shape) if shape is None else shape
        self.readable = host_can_branch(like)
        self._pool, self._like = pool, like.new_empty(0)
        self._adjoints: dict[str, Tensor] = {}
        self._zero: Tensor | None = None
        self._square, self._wide = (*shape[:2], shape[1]) if len(shape) == 3 else (), shape
        if pool is not None:
            pool.reserve(like, math.prod(self._square), math.prod(shape))

    def __getattr__(self, name: str) -> Tensor:
        if len(name) != 1 or name not in SQUARE + WIDE:
            raise AttributeError(name)
        shape = self._square if name in SQUARE else self._wide
        pool = self._pool
        buffer = self._like.new_empty(shape) if pool is None else pool.take(name, shape, self._like)
        setattr(self, name, buffer)
        return buffer

    @property
    def zero(self) -> Tensor:
        """The number zero, with the dtype and device of the batch."""
        if self._zero is None:
            self._zero = self._like.new_zeros(())
        return self._zero

    def adjoint(self, name: str, x: Tensor) -> Tensor:
        """Return the view ``x.mH``, cached under ``name``. A name must always be used for the same tensor."""
        try:
            return self._adjoints[name]
        except KeyError:
            return self._adjoints.setdefault(name, x.mH)

    def make(self, names: str) -> None:
        """Allocate these buffers now, so that an out-of-memory error is raised before a step writes anything."""
        for name in names:
            getattr(self, name)
