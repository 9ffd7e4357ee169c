"""Exchange of sharded parameters between the ranks that hold their shards and the owners of their blocks.

One collective call moves the pieces of all parameters: ``collect`` from shards to owners, ``spread`` back.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
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
        self.moves = any(member.is_cut for member in members)
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
        self._move((shards, _in_shard, sent), (parts, _in_part, received))

    def spread(self, parts: list[Tensor], shards: list[Tensor]) -> None:
        """Write the parts of all owners to the shards. A collective."""
        received, sent = self._get_buffers(shards)
        self._move((parts, _in_part, sent), (shards, _in_shard, received))

    def is_as_spread(self, parts: list[Tensor], shards: list[Tensor]) -> bool:
        """Return True if the shards have the values that the last call, :meth:`spread`, has written."""
        written, _ = self._get_buffers(shards)
        known = [*written.views, *_pick(parts, _in_part, self.own)]
        return all(map(torch.equal, known, _pick(shards, _in_shard, written.pieces + self.own)))

    def _move(self, source: Side, destination: Side) -> None:
        """Write the pieces of the tensors of one side to those of the other."""
        (tensors, index, sent), (targets, target_index, received) = source, destination
        _copy(sent.views, _pick(tensors, index, sent.pieces))
        if self.moves:
            dist.all_to_all_single(received.memory, sent.memory, received.sizes, sent.sizes, self.group)
        _copy(_pick(targets, target_index, received.pieces), received.views)
        _copy(_pick(targets, target_index, self.own), _pick(tensors, index, self.own))

    def _get_buffers(self, shards: list[Tensor]) -> tuple[Buffer, Buffer]:
        """Return the buffers of a holder and of an owner for shards of these dtypes; the last ones are kept."""
        dtypes = [shard.dtype for shard in shards]
        if self._buffers is None or self._buffers[0] != dtypes:
            device = shards[0].device
            self._buffers = (dtypes, Buffer(self.sent, dtypes, device), Buffer(self.received, dtypes, device))
        return self._buffers[1:]


_in_shard, _in_part = attrgetter("shard"), attrgetter("part")
Side = tuple[list[Tensor], Callable[[Piece], Index], Buffer]  # tensors, index of a piece in them, and its buffer


def _pick(tensors: list[Tensor], index: Callable[[Piece], Index], pieces: list[Piece]) -> list[Tensor]:
    """Return views of some pieces."""
    return [tensors[piece.member][index(piece)] for piece in pieces]


def _copy(destinations: list[Tensor], sources: list[Tensor]) -> None:
    if destinations:
        torch._foreach_copy_(destinations, sources)


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
