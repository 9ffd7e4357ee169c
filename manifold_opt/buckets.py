"""Which blocks move as one batch, and where their values, gradients and moments lie.

A marked parameter that is large is a bucket of its own: its blocks are viewed, nothing is copied. Small ones alike in
shape, dtype, device and constraint share buckets: their values and gradients are gathered into workspaces and the
values written back, and each moment is one tensor ``(B, p, n)``, which the optimizer's state shows in pieces, a view
a parameter, under torch's keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .blocks import block_view
from .constraint import Orthogonal
from .products import may_read
from .room import Room

Number = float | Tensor
SMALL = 2**16  # bytes of a block up to which parameters are gathered
TINY, MANY = 6, 256  # rows and columns up to which, and blocks from which on, matrices are better copied to lie across
COPIED = 3 * 2**18  # bytes of tiny blocks that are copied at a time
BATCH = 2**21  # bytes of blocks that a step works on at a time, one large block at least


@dataclass
class Bucket:
    """Parameters that move as one batch.

    Attributes:
        parameters: its members, alike in shape, dtype, device and constraint.
        constraint: of each.
        fresh: whether their first gradient is to enter the momentum whole, without dampening.
        versions: of each member when it was last stepped: another one says that it has been written to since.
        moments: what the rule holds, ``(B, p, n)`` or ``(B, 1, 1)`` each: views of the members' state, or the
            storage that their state is a view of.
        ranks: place of each member among all marked parameters of its group.
        steps: ``(members,)`` step counts, as the moments.
        lockstep: the step count of all members where the host knows that it is the same.
        shown: what the members' state shows, by key.
    """

    parameters: list[Tensor]
    constraint: Orthogonal
    fresh: bool
    versions: list[int | None]
    ranks: list[int]
    moments: dict[str, Tensor] = field(default_factory=dict)
    steps: Tensor | None = None
    lockstep: int | None = None
    shown: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.parameters[0]
        self.dtype = first.dtype
        self.gathered = len(self.parameters) > 1
        self.blocks = self.constraint.blocks * len(self.parameters)
        self.p, self.n = self.constraint.view(first.detach()).shape[-2:]
        blocks = torch.arange(self.constraint.blocks, device="cpu")
        self._turns = (torch.tensor(self.ranks, device="cpu")[:, None] * len(blocks) + blocks).flatten()
        self._in_turn = int(self._turns[-1] - self._turns[0]) == len(self._turns) - 1
        self.tiny = self.p <= TINY and self.n <= TINY and self.blocks >= MANY
        self.tall = first.shape[0] // self.constraint.blocks > first.numel() // first.shape[0]
        self._written: list[Tensor] = []  # pieces of the workspace that values are written back from
        self.stacked = (first.shape[0] * len(self.parameters), first.numel() // first.shape[0])

    def wide(self, stacked: Tensor) -> Tensor:
        """Wide blocks ``(B, p, n)`` of a tensor that has all members' rows one below the other."""
        return block_view(stacked, self.blocks)

    def view(self, tensors: list[Tensor], role: str, room: Room) -> Tensor:
        """The members' ``tensors`` as wide blocks ``(B, p, n)``: a view of a lone one, a copy of many."""
        if not self.gathered:
            lone = tensors[0]
            # A gradient may come in a memory format that cannot be flattened; a parameter is written to as it lies.
            copied = lone.ndim > 2 and lone is not self.parameters[0]
            return self.constraint.view(lone.contiguous() if copied else lone)
        rows = [t.reshape(t.shape[0], -1) for t in tensors] if tensors[0].ndim > 2 else tensors
        return self.wide(torch.cat(rows, out=room(role, self.stacked, like=tensors[0])))

    def write_back(self, values: Tensor) -> None:
        """Write wide blocks ``(B, p, n)`` to the members that they were gathered from."""
        stacked = (values.mT if self.tall else values).reshape(self.stacked)
        if torch.compiler.is_compiling():
            torch._foreach_copy_(self.parameters, self.split(stacked))
            return
        if not self._written or self._written[0].data_ptr() != stacked.data_ptr():
            self._written = self.split(stacked)
        torch._foreach_copy_(self.parameters, self._written)

    def split(self, stacked: Tensor) -> list[Tensor]:
        """Rows one below the other, as one tensor a member, of its shape."""
        parts = stacked.split(self.parameters[0].shape[0])  # type: ignore[no-untyped-call]
        return [part.view(p.shape) for part, p in zip(parts, self.parameters, strict=True)]

    def count(self, steps: Number) -> None:
        """Count a step, or as much of one as a GradScaler lets happen."""
        assert self.steps is not None
        self.steps += steps
        if may_read(self.steps):
            first, last = (int(x) for x in self.steps.aminmax())
            self.lockstep = first if first == last else None

    def due(self, interval: int, piece: slice) -> slice | Tensor:
        """Which blocks of a piece have their turn: each once in ``interval`` steps that its own parameter makes.

        Whatever other parameters do, and wherever it stands among them: a parameter keeps its rank.
        """
        assert self.steps is not None
        if not may_read(self.steps):
            return slice(None)
        if self.lockstep is not None and self._in_turn:
            return slice(-(self.lockstep + int(self._turns[piece.start])) % interval, None, interval)
        counts = self.steps.long().repeat_interleave(self.constraint.blocks)
        return ((counts + self._turns)[piece] % interval == 0).nonzero()[:, 0]

    def reserve(self, room: Room) -> None:
        """Take the workspaces of a step now: if there is no memory for them, nothing has been written yet."""
        first = self.parameters[0]
        count = next(self.pieces(self.tiny)).stop  # the first piece is as large as any
        for role, columns in (("first", self.p), ("second", self.n)):
            room(role, (count, self.p, columns), like=first)
        for role in ("point", "gradient") if self.gathered else ():
            room(role, self.stacked, like=first)

    def ask_for(self, temporaries: int) -> None:
        """Take as many times the memory of a piece, and give it back: an accelerator's allocator keeps it for the step.

        A host's has no end that could be seen before it is there.
        """
        first = self.parameters[0]
        if not may_read(first):
            first.new_empty(temporaries * next(self.pieces(self.tiny)).stop * self.p * self.n)

    def pieces(self, copied: bool = False) -> Iterator[slice]:
        """Blocks that are worked on at a time: memory is needed for these only, for more of it if they are copied."""
        block = self.p * self.n * self.parameters[0].element_size()
        size = max(1, BATCH // block)
        if copied:
            size = min(size, max(COPIED // block, self.blocks // 3))
        for start in range(0, self.blocks, size):
            yield slice(start, min(start + size, self.blocks))


def fill(parameters: list[Tensor], constraints: list[Orthogonal], fresh: list[bool], ranks: list[int]) -> list[Bucket]:
    """Buckets of the marked parameters of one group, of each its constraint, whether it is fresh, and its rank."""
    shared: dict[object, list[int]] = {}
    for index, (parameter, constraint) in enumerate(zip(parameters, constraints, strict=True)):
        block = parameter.numel() // constraint.blocks * parameter.element_size()
        key = (parameter.shape, parameter.dtype, parameter.device, constraint, fresh[index])
        alone = block > SMALL or constraint.dim != 0 or (parameter.ndim > 2 and not parameter.is_contiguous())
        shared.setdefault(index if alone else key, []).append(index)
    return [
        Bucket(
            [parameters[i] for i in some],
            constraints[some[0]],
            fresh[some[0]],
            [None] * len(some),
            [ranks[i] for i in some],
        )
        for members in shared.values()
        for some in _portions(parameters, members)
    ]


def _portions(parameters: list[Tensor], members: list[int]) -> Iterator[list[int]]:
    """Members in portions of at most ``BATCH`` bytes and, but for small change, at most a third of all."""
    size = parameters[members[0]].nbytes
    tiny = parameters[members[0]].numel() // parameters[members[0]].shape[0] <= TINY
    limit = min(COPIED if tiny else BATCH, max(size * len(members) // 3, SMALL))
    count = max(1, limit // size)
    for start in range(0, len(members), count):
        yield members[start : start + count]
