"""Workspaces: memory that a step needs and the next one needs again."""

from __future__ import annotations

import torch
from torch import Tensor

Shape = tuple[int, ...] | torch.Size


class Room:
    """Buffers kept from step to step, one a role, each as large as the largest tensor that asked for it.

    >>> import torch
    >>> from manifold_opt.room import Room
    >>> room = Room()
    >>> first = room("gradient", (3, 4, 4), like=torch.zeros(1))
    >>> room("gradient", (2, 4, 4), like=torch.zeros(1)).data_ptr() == first.data_ptr()
    True
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def __call__(self, role: str, shape: Shape, *, like: Tensor) -> Tensor:
        """An uninitialized tensor of a shape; what was in the last one of this role is lost."""
        if torch.compiler.is_compiling():
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        key = (role, like.dtype, like.device)
        size = 1
        for length in shape:
            size *= length
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            flat = self._flat[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        return flat[:size].view(shape)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(flat.nbytes for flat in self._flat.values())
