"""Which blocks move as one batch, and where their values, gradients and moments lie.

A marked parameter that is large is a bucket of its own: its blocks are viewed, nothing is copied. Small ones alike in
shape, dtype, device and constraint share buckets: their values and gradients are gathered into workspaces and the
values written back, and each moment is one tensor ``(B, p, n)``, which the optimizer's state shows in pieces, a view
a parameter, under torch's keys. Where such blocks are not all of their parameter, each parameter has its moments to
itself, and they are gathered and written back too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .blocks import Blocks, Part, Slices, can_be_viewed, point_norm, points_of
from .manifolds import Manifold, Orthogonal
from .precision import LOW, MASTER, working_dtype
from .products import host_can_branch
from .room import Room

Number = float | Tensor
SMALL = 2**16  # bytes of a block up to which parameters are gathered
TINY, MANY = 6, 256  # rows and columns up to which, and blocks from which on, matrices are better copied to lie across
COPIED = 3 * 2**18  # bytes of tiny blocks that are copied at a time
_PIECES = 16  # that a bucket is cut into at most, where pieces are larger than that anyway
BATCH = 2**21  # bytes of blocks that a step works on at a time, one large block at least


@dataclass
class Bucket:
    """Parameters that move as one batch, or one part of one.

    Attributes:
        parameters: its members, alike in shape, dtype, device and constraint.
        constraint: of each.
        part: where the points lie in each.
        before: number of points in earlier parts; the first part shows the step count.
        fresh: whether their first gradient is to enter the momentum whole, without dampening.
        versions: of each member when it was last stepped: another one says that it has been written to since.
        addresses: of each member's memory then: another one says that its ``data`` has been replaced since.
        moments: what the rule holds, ``(B, *point)`` or ``(B, 1, ..)`` each: views of the members' state, or the
            storage that their state is a view of; nothing where moments are ``carried``.
        master: points in float32 of members that are stored in less, of which theirs are the rounding; likewise.
        ranks: place of each member among all marked parameters of its group.
        steps: ``(members,)`` step counts, as the moments.
        lockstep: the step count of all members where the host knows that it is the same.
        shown: what the members' state shows, by key.
        addresses_shown: where that lies, of one key.
    """

    parameters: list[Tensor]
    constraint: Manifold
    part: Part
    before: int
    fresh: bool
    versions: list[int | None]
    addresses: list[int | None]
    ranks: list[int]
    moments: dict[str, Tensor] = field(default_factory=dict)
    master: Tensor | None = None
    steps: Tensor | None = None
    lockstep: int | None = None
    shown: dict[str, list[Tensor]] = field(default_factory=dict)
    addresses_shown: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        first = self.parameters[0]
        self.dtype = first.dtype
        self.real = working_dtype(first.dtype).to_real()  # which torch.compile cannot ask for
        self.gathered = len(self.parameters) > 1 or not can_be_viewed(self.part, first.detach())
        self.low = first.dtype in LOW
        rows = self.part.rows(first.detach(), copy=True)
        points = self.part.points(rows)
        self.each = len(points)
        self.blocks = self.each * len(self.parameters)
        self.point = points.shape[1:]
        self.stiefel = isinstance(self.constraint, Orthogonal)
        self.p, self.n = self.point if self.stiefel else (1, self.point.numel())
        blocks = torch.arange(self.each if self.stiefel else 1, device="cpu")
        self._turns = (torch.tensor(self.ranks, device="cpu")[:, None] * len(blocks) + blocks).flatten()
        self._in_turn = int(self._turns[-1] - self._turns[0]) == len(self._turns) - 1
        self.tiny = self.stiefel and self.p <= TINY and self.n <= TINY and self.blocks >= MANY
        self._along = self.part.dim if isinstance(self.part, Blocks) else 0  # where rows are stacked
        self.carried = self.gathered and self.part.length is not None
        self._rows = rows.shape[self._along]
        self.stacked = tuple(
            length * (len(self.parameters) if dim == self._along else 1) for dim, length in enumerate(rows.shape)
        )
        self.tall = isinstance(self.part, Blocks) and self.part.tall(rows)
        self._written: list[Tensor] = []  # pieces of the workspace that values are written back from
        self._as_they_lie = rows.shape == first.shape and rows.stride() == first.stride()

    def remember_values(self) -> None:
        """Take note of the members as they are now, on their manifold."""
        self.versions = [p._version for p in self.parameters]
        self.addresses = list(map(Tensor.data_ptr, self.parameters))

    def overwritten(self) -> list[Tensor]:
        """Members that have been written to, or whose ``data`` has been replaced, since :meth:`remember_values`."""
        versions, addresses = [p._version for p in self.parameters], list(map(Tensor.data_ptr, self.parameters))
        if versions == self.versions and addresses == self.addresses:
            return []
        before = zip(self.parameters, self.versions, self.addresses, strict=True)
        return [p for p, version, address in before if p._version != version or p.data_ptr() != address]

    def view(self, tensors: list[Tensor], role: str, room: Room) -> Tensor:
        """The members' ``tensors`` as points ``(B, *point)``: a view of a lone one, a copy of many."""
        if not self.gathered:
            # A gradient may come in a memory format that cannot be viewed so; a parameter, here, can.
            return points_of(self.part, tensors[0])
        rows = tensors if self._as_they_lie else [self.part.rows(t, copy=True) for t in tensors]
        return self.part.points(torch.cat(rows, self._along, out=room(role, self.stacked, like=tensors[0])))

    def storage(self, tensors: list[Tensor]) -> Tensor:
        """The members' ``tensors`` as rows, a copy that they can be views of."""
        return torch.cat([self.part.rows(tensor, copy=True) for tensor in tensors], self._along)

    def take(self, room: Room) -> tuple[dict[str, Tensor], Tensor | None]:
        """The moments, and what is held in float32, of all points: where they lie, or gathered from the members'."""
        if not self.carried:
            return self.moments, self.master
        held = {
            key: self.view(shown, f"held {key}", room) if self._like_rows(shown) else torch.cat(self._own(shown))
            for key, shown in self.shown.items()
            if key != "step"
        }
        return held, held.pop(MASTER, None)

    def _like_rows(self, shown: list[Tensor]) -> bool:
        """Whether there is an entry for every one of a member, not a number a point."""
        return shown[0].shape == self.parameters[0].shape

    def _own(self, shown: list[Tensor]) -> list[Tensor]:
        """Of numbers a point, of all parts, those of this one."""
        return [numbers.narrow(0, self.before, self.each) for numbers in shown]

    def follow(self, values: Tensor, master: Tensor | None) -> None:
        """Let what is held in float32 follow points that have been written to, where the host may not look.

        A point that has not moved yet is not the rounding of what is held, which is the nearest to it: entries that
        differ by roundings stay.
        """
        if master is None or host_can_branch(values):
            return
        now, eps, dims = values.to(master.dtype), torch.finfo(values.dtype).eps, self.part.dims
        gap, size = now - master, point_norm(now, dims, keepdim=True)
        scale = size / max(1, now.shape[now.ndim - dims :].numel()) ** 0.5  # of an entry
        other = (gap.abs() > 4 * eps * (now.abs() + scale)) | (point_norm(gap, dims, keepdim=True) > eps * size)
        master.copy_(torch.where(other, now, master))

    def write_back(self, values: Tensor, moments: dict[str, Tensor], master: Tensor | None) -> None:
        """Write points ``(B, *point)``, and what else was gathered of them, to the members that they came from."""
        if not self.gathered:
            return
        if self.carried:
            self._put(self.parameters, values)
            for key, held in (moments if master is None else {**moments, MASTER: master}).items():
                self._put(self.shown[key], held)
            return
        stacked = self._stack(values)
        if torch.compiler.is_compiling():
            torch._foreach_copy_(self.parameters, self.split(stacked))
            return
        if not self._written or self._written[0].data_ptr() != stacked.data_ptr():
            self._written = self.split(stacked)
        torch._foreach_copy_(self.parameters, self._written)

    def _put(self, tensors: list[Tensor], values: Tensor) -> None:
        """Write points to the rows of the members' tensors, or numbers a point to where they have them."""
        if not self._like_rows(tensors):
            torch._foreach_copy_(self._own(tensors), list(values.split(self.each)))  # type: ignore[no-untyped-call]
            return
        rows = [self.part.rows(tensor.detach()) for tensor in tensors]
        torch._foreach_copy_(rows, list(self._stack(values).split(self._rows, self._along)))  # type: ignore[no-untyped-call]

    def _stack(self, values: Tensor) -> Tensor:
        """Points as the rows that they are a view of."""
        lying = values.mT if self.tall else values
        return (lying.movedim(0, self._along) if self._along else lying).reshape(self.stacked)

    def split(self, stacked: Tensor) -> list[Tensor]:
        """Rows one below the other, as one tensor a member, of its shape."""
        pieces = stacked.split(self._rows, self._along)  # type: ignore[no-untyped-call]
        return [self.part.unlike(piece, p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def count(self, steps: Number) -> None:
        """Count a step, or as much of one as a GradScaler lets happen."""
        assert self.steps is not None
        self.steps += steps
        if host_can_branch(self.steps):
            first, last = (int(x) for x in self.steps.aminmax())
            self.lockstep = first if first == last else None

    def due(self, interval: int, piece: slice) -> slice | Tensor:
        """Which blocks of a piece have their turn: each once in ``interval`` steps that its own parameter makes.

        Whatever other parameters do, and wherever it stands among them: a parameter keeps its rank.
        """
        assert self.steps is not None
        if not host_can_branch(self.steps):
            return slice(None)
        if self.lockstep is not None and self._in_turn:
            return slice(-(self.lockstep + int(self._turns[piece.start])) % interval, None, interval)
        counts = self.steps.long().repeat_interleave(self.each)
        return ((counts + self._turns)[piece] % interval == 0).nonzero()[:, 0]

    def reserve(self, room: Room) -> None:
        """Take the workspaces of a step now: if there is no memory for them, nothing has been written yet."""
        first = self.parameters[0].new_empty(0, dtype=working_dtype(self.dtype))
        count = next(self.pieces(self.tiny)).stop  # the first piece is as large as any
        for role, columns in (("first", self.p), ("second", self.n)) if self.stiefel else ():
            room(role, (count, self.p, columns), like=first)
        for role in ("point", "gradient") if self.gathered else ():
            room(role, self.stacked, like=self.parameters[0])
        for key, shown in self.shown.items() if self.carried else ():
            if key != "step" and self._like_rows(shown):
                room(f"held {key}", self.stacked, like=shown[0])

    def ask_for(self, temporaries: int) -> None:
        """Take as many times the memory of a piece, and give it back: an accelerator's allocator keeps it for the step.

        A host's has no end that could be seen before it is there.
        """
        first = self.parameters[0]
        if not host_can_branch(first):
            count = temporaries * next(self.pieces(self.tiny)).stop * self.p * self.n
            first.new_empty(count, dtype=working_dtype(self.dtype))

    def pieces(self, copied: bool = False) -> Iterator[slice]:
        """Blocks that are worked on at a time: memory is needed for these only, for more of it if they are copied."""
        block = self.p * self.n * self.parameters[0].element_size()
        size = max(1, (BATCH if self.stiefel else self._batch()) // block)
        if copied:
            size = min(size, max(COPIED // block, self.blocks // 3))
        for start in range(0, self.blocks, size):
            yield slice(start, min(start + size, self.blocks))

    def _batch(self) -> int:
        """Bytes of points at a time, of which a step makes a dozen tensors: on an accelerator, in few pieces."""
        first = self.parameters[0]
        return BATCH // 4 if host_can_branch(first) else max(BATCH, first.nbytes * len(self.parameters) // _PIECES)

    def a_point(self, values: Tensor) -> Tensor:
        """One value a member, as one a point that broadcasts: ``(B, 1, ..)``, or ``(1, 1, ..)`` of a lone member."""
        spread = values.repeat_interleave(self.each) if self.gathered else values
        return spread.view(-1, *[1] * len(self.point))


def fill(parameters: list[Tensor], constraints: list[Manifold], fresh: list[bool], ranks: list[int]) -> list[Bucket]:
    """Buckets of the marked parameters of one group, of each its constraint, whether it is fresh, and its rank."""
    shared: dict[object, list[int]] = {}
    for index, (parameter, constraint) in enumerate(zip(parameters, constraints, strict=True)):
        key = (parameter.shape, parameter.dtype, parameter.device, constraint, fresh[index])
        shared.setdefault(key if _small(parameter, constraint) else index, []).append(index)
    return [
        Bucket(
            [parameters[i] for i in some],
            constraints[some[0]],
            part,
            before,
            fresh[some[0]],
            [None] * len(some),
            [None] * len(some),
            [ranks[i] for i in some],
        )
        for members in shared.values()
        for some in _portions(parameters, members)
        for part, before in _parts(parameters[some[0]], constraints[some[0]])
    ]


def _parts(parameter: Tensor, constraint: Manifold) -> Iterator[tuple[Part, int]]:
    """The parts of a parameter, and how many points come before each."""
    before = 0
    for part in constraint.parts(parameter.shape):
        yield part, before
        before += len(points_of(part, parameter.detach()))


def _small(parameter: Tensor, constraint: Manifold) -> bool:
    """Whether a parameter is to be gathered with others like it."""
    return all(
        parameter.nbytes <= SMALL
        if isinstance(part, Slices)
        else part.entries(parameter.shape) * parameter.element_size() <= SMALL
        for part in constraint.parts(parameter.shape)
    )


def _portions(parameters: list[Tensor], members: list[int]) -> Iterator[list[int]]:
    """Members in portions of at most ``BATCH`` bytes and, but for small change, at most a third of all."""
    first = parameters[members[0]]
    size = first.nbytes
    tiny = first.shape[-1:].numel() <= TINY
    limit = min(COPIED if tiny else BATCH, max(size * len(members) // 3, SMALL))
    count = max(1, limit // size)
    for start in range(0, len(members), count):
        yield members[start : start + count]
