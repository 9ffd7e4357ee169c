"""Exchange of sharded parameters between the ranks that hold their shards and the owners of their blocks.

One collective call moves the pieces of all parameters: ``collect`` from shards to owners, ``spread`` back.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ...manifolds.shards import slices
from .owners import Ownership

Index = tuple[slice, ...]


class Piece(NamedTuple):
    """Part of a parameter that one rank holds and one rank owns.

    Attributes:
        member: position of the parameter.
        shard: index of the piece in the holder's shard.
        part: index of the piece in the owner's part.
        shape: its shape.
    """

    member: int
    shard: Index
    part: Index
    shape: tuple[int, ...]


class Buffer:
    """Memory for the pieces to or from every other rank, with a view of each piece.

    Attributes:
        memory: bytes; the pieces of a rank are adjacent.
        sizes: number of bytes for each rank.
        views: one view per piece, in the order of the ranks.
        pieces: the pieces.
    """

    def __init__(self, pieces: list[list[Piece]], dtypes: list[torch.dtype], device: torch.device) -> None:
        align = max((dtype.itemsize for dtype in dtypes), default=1)
        self.pieces, self.sizes, places, end = [], [], [], 0
        for some in pieces:
            start = end
            for piece in some:
                dtype = dtypes[piece.member]
                nbytes = torch.Size(piece.shape).numel() * dtype.itemsize
                self.pieces.append(piece)
                places.append((end, nbytes, dtype))
                end += -(-nbytes // align) * align
            self.sizes.append(end - start)
        self.memory = torch.empty(end, dtype=torch.uint8, device=device)
        self.views = [
            self.memory[start : start + nbytes].view(dtype).view(piece.shape)
            for piece, (start, nbytes, dtype) in zip(self.pieces, places, strict=True)
        ]


class Exchange:
    """Exchange of parameters with the same group of ranks.

    Attributes:
        group: process group.
        ranks: number of ranks in it.
        rank: position of this process.
        moves: whether any rank sends a piece to another.
        sent, received: pieces to the owner, and from the holder, at each position in the group.
        own: pieces that this process holds and owns.
    """

    def __init__(self, members: list[Ownership], group: Any, ranks: int, rank: int) -> None:
        self.group, self.ranks, self.rank = group, ranks, rank
        self.moves = any(_is_cut(member) for member in members)
        self.sent: list[list[Piece]] = [[] for _ in range(ranks)]
        self.received: list[list[Piece]] = [[] for _ in range(ranks)]
        for k, member in enumerate(members):
            shares = member.shares()
            for owner, intervals in shares.items():
                self.sent[owner] += _pieces(k, member, intervals, rank)
            for holder in range(ranks) if rank in shares else ():
                self.received[holder] += _pieces(k, member, shares[rank], holder)
        self.own, self.sent[rank], self.received[rank] = self.sent[rank], [], []
        self._buffers: tuple[list[torch.dtype], Buffer, Buffer] | None = None

    def collect(self, shards: list[Tensor], parts: list[Tensor]) -> None:
        """Write the pieces of all shards to the parts of their owners. A collective."""
        sent, received = self._get_buffers(shards)
        _copy(sent.views, (shards[piece.member][piece.shard] for piece in sent.pieces))
        self._all_to_all(received, sent)
        _copy([parts[piece.member][piece.part] for piece in received.pieces], received.views)
        _copy([parts[p.member][p.part] for p in self.own], (shards[p.member][p.shard] for p in self.own))

    def spread(self, parts: list[Tensor], shards: list[Tensor]) -> None:
        """Write the parts of all owners to the shards. A collective."""
        received, sent = self._get_buffers(shards)
        _copy(sent.views, (parts[piece.member][piece.part] for piece in sent.pieces))
        self._all_to_all(received, sent)
        _copy([shards[piece.member][piece.shard] for piece in received.pieces], received.views)
        _copy([shards[p.member][p.shard] for p in self.own], (parts[p.member][p.part] for p in self.own))

    def _all_to_all(self, received: Buffer, sent: Buffer) -> None:
        if self.moves:
            dist.all_to_all_single(received.memory, sent.memory, received.sizes, sent.sizes, self.group)

    def _get_buffers(self, shards: list[Tensor]) -> tuple[Buffer, Buffer]:
        """Return the buffers of a holder and of an owner for shards of these dtypes; the last ones are kept."""
        dtypes = [shard.dtype for shard in shards]
        if self._buffers is None or self._buffers[0] != dtypes:
            device = shards[0].device
            self._buffers = (dtypes, Buffer(self.sent, dtypes, device), Buffer(self.received, dtypes, device))
        return self._buffers[1:]


def _copy(destinations: list[Tensor], sources: Iterable[Tensor]) -> None:
    if destinations:
        torch._foreach_copy_(destinations, list(sources))


def _is_cut(member: Ownership) -> bool:
    """Return True if a unit does not lie whole in its owner's shard."""
    return any(
        sum(torch.Size(p.shape).numel() for p in _pieces(0, member, [(unit.start, unit.length)], owner))
        < unit.length * torch.Size(member.shape).numel() // member.shape[member.dim]
        for unit, owner in zip(member.units, member.owners, strict=True)
    )


def _pieces(position: int, member: Ownership, owned: list[tuple[int, int]], holder: int) -> list[Piece]:
    """Return the pieces of the intervals that an owner has, in the shard of a holder."""
    found, box, offset = [], member.boxes[holder], 0
    held_from, held = box[member.dim]
    for start, length in owned:
        first, last = max(start, held_from), min(start + length, held_from + held)
        lengths = [n for _, n in box]
        lengths[member.dim] = last - first
        if all(n > 0 for n in lengths):
            shard, part = [(0, n) for n in lengths], list(box)
            shard[member.dim] = (first - held_from, last - first)
            part[member.dim] = (offset + first - start, last - first)
            found.append(Piece(position, slices(tuple(shard)), slices(tuple(part)), tuple(lengths)))
        offset += length
    return found
