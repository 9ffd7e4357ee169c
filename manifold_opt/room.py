"""Workspaces: memory that a step needs and the next one needs again."""

from __future__ import annotations

import torch
from torch import Tensor

from .products import across

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
        """An uninitialized tensor of a shape; what was in the last one of this role is lost.

        A batch of matrices lies as those of ``like`` do, one after the other or across.
        """
        if torch.compiler.is_compiling():
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        key = (role, like.dtype, like.device)
        size = 1
        for length in shape:
            size *= length
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            flat = self._flat[key] = torch.empty(size, dtype=like.dtype, device=like.device)
        if like.ndim == 3 and across(like):
            return _lying_across(flat[:size], shape)
        return flat[:size].view(shape)

    def across(self, role: str, x: Tensor) -> Tensor:
        """A copy of a batch whose matrices lie across one another."""
        return _lying_across(self(role, (x.numel(),), like=x.new_empty(0)), x.shape).copy_(x)

    def nbytes(self) -> int:
        """Bytes held."""
        return sum(flat.nbytes for flat in self._flat.values())


def _lying_across(flat: Tensor, shape: Shape) -> Tensor:
    """Memory as matrices ``(B, p, n)`` that lie across one another."""
    return flat.view(*shape[1:], shape[0]).permute(2, 0, 1)
