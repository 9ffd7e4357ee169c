"""Which blocks move as one batch, and where their values, gradients and moments lie.

A marked parameter that is large is a bucket of its own: its blocks are viewed, nothing is copied. Small ones alike in
shape, dtype, device and constraint share buckets: their values and gradients are gathered into workspaces and the
values written back, and each moment is one tensor ``(B, p, n)``, of which the optimizer's state has one view for each
parameter, under torch's keys. If only part of a parameter is in a bucket, its moments stay with the parameter, and are
gathered and written back in every step too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...constraints.tag import constraint_of
from ...linalg.precision import LOW_PRECISION, MASTER, working_dtype
from ...linalg.products import host_can_branch
from ...linalg.workspace import Pool, Workspace
from ...manifolds import Manifold, Orthogonal
from ...manifolds.layout import BlockLayout, Layout, SliceLayout, get_points, is_viewable, point_norm
from .optimizer import Group

Scalar = float | Tensor
Key = tuple[int, bool, float | None]
SMALL = 2**16  # bytes of a block up to which parameters are gathered
_MAX_CHUNKS = 16  # that a bucket is cut into at most, where pieces are larger than that anyway
BATCH = 2**21  # bytes of blocks that a step works on at a time, one large block at least


class Batch(NamedTuple):
    """Blocks of a bucket that a step works on at a time.

    Attributes:
        rows: which of the bucket's.
        points: their values, in the dtype that they are moved in: views, written in place.
        values: their values in the dtype that they are stored in, if that is another one.
        moments: likewise, by key.
        ws: buffers for orthogonal blocks.
    """

    rows: slice
    points: Tensor
    values: Tensor | None
    moments: dict[str, Tensor]
    ws: Workspace | Any


class Views(NamedTuple):
    """The points of a bucket and what goes with them, ``(B, *point)``: views, or what has been gathered.

    Attributes:
        values: points, in the dtype that they are stored in.
        moments: by key.
        master: points in float32, of which the values are the rounding.
        batches: parts of all of these.
        member_values: the values, as one tensor of its shape for every member, where they are gathered.
    """

    values: Tensor
    moments: dict[str, Tensor]
    master: Tensor | None
    batches: list[Batch]
    member_values: list[Tensor]


@dataclass
class Bucket:
    """Parameters that move as one batch, or one part of one.

    Attributes:
        parameters: its members, alike in shape, dtype, device and constraint.
        constraint: of each.
        part: where the points lie in each.
        point_offset: number of points in earlier parts; the first part shows the step count.
        fresh: whether their first gradient is to enter the momentum whole, without dampening.
        moments: what the rule holds, ``(B, *point)`` or ``(B, 1, ..)`` each: views of the members' state, or the
            storage that their state is a view of; nothing where moments are gathered in every step.
        master: points in float32 of members that are stored in less, of which theirs are the rounding; likewise.
        steps: ``(members,)`` step counts, as the moments.
        shared_step: the step count of all members, where it may be read.
        counted: the version of ``steps`` that it is for; None where nothing can be said of that.
        state_views: what the members' state shows, by key.
    """

    parameters: list[Tensor]
    constraint: Manifold
    part: Layout
    point_offset: int
    fresh: bool
    moments: dict[str, Tensor] = field(default_factory=dict)
    master: Tensor | None = None
    steps: Tensor | None = None
    shared_step: int | None = None
    counted: int | None = None
    state_views: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.parameters[0]
        self.dtype = first.dtype
        self.real = working_dtype(first.dtype).to_real()  # which torch.compile cannot ask for
        self.working = working_dtype(first.dtype)
        self.gathered = len(self.parameters) > 1 or not is_viewable(self.part, first.detach())
        self.low = first.dtype in LOW_PRECISION
        rows = self.part.to_rows(first.detach(), copy=True)
        points = self.part.to_points(rows)
        self.each = len(points)
        self.blocks = self.each * len(self.parameters)
        self.point = points.shape[1:]
        self.stiefel = isinstance(self.constraint, Orthogonal)
        self.p, self.n = self.point if self.stiefel else (1, self.point.numel())
        # Whether a step works on the values and gradients as they are.
        self.gain = self.constraint.gain if isinstance(self.constraint, Orthogonal) else 1.0
        self.plain = self.gain == 1 and not self.low and not first.is_complex()
        self._along = self.part.dim if isinstance(self.part, BlockLayout) else 0  # where rows are stacked
        self.gathers_state = self.gathered and self.part.length is not None
        self._rows = rows.shape[self._along]
        self.stacked = tuple(
            length * (len(self.parameters) if dim == self._along else 1) for dim, length in enumerate(rows.shape)
        )
        self.tall = isinstance(self.part, BlockLayout) and self.part.is_tall(rows)
        self._views: Views | None = None
        self._buffers: dict[str, Tensor] = {}
        self._strides = _strides(self.part, first.detach()) if not self.gathered else None
        self._as_they_lie = rows.shape == first.shape and rows.stride() == first.stride()

    def view(self, tensors: list[Tensor], name: str, pool: Pool | None) -> Tensor:
        """Return the members' ``tensors`` as points ``(B, *point)``: a view of a lone one, a copy of many."""
        if not self.gathered:
            # A gradient may have a memory format that cannot be viewed so; a parameter, here, has not. Detached, for
            # torch refuses to swap a parameter that a view refers to.
            return get_points(self.part, tensors[0].detach())
        rows = tensors if self._as_they_lie else [self.part.to_rows(t, copy=True) for t in tensors]
        buffer = self._buffer(name, self.stacked, tensors[0], pool)
        return self.part.to_points(torch.cat(rows, self._along, out=buffer))

    def _buffer(self, name: str, shape: tuple[int, ...], like: Tensor, pool: Pool | None) -> Tensor:
        """Return a buffer, the same one in every step."""
        if pool is None:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        if name not in self._buffers:
            self._buffers[name] = pool.take(name, shape, like)
        return self._buffers[name]

    def storage(self, tensors: list[Tensor]) -> Tensor:
        """The members' ``tensors`` as rows, a copy that they can be views of."""
        return torch.cat([self.part.to_rows(tensor, copy=True) for tensor in tensors], self._along)

    def _gather_state(self, pool: Pool | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the moments and the masters of all points: where they lie, or gathered from the members'."""
        if not self.gathers_state:
            return self.moments, self.master
        held = {
            key: self.view(shown, f"held {key}", pool) if self._has_param_shape(shown) else self._cat_own(key, pool)
            for key, shown in self.state_views.items()
            if key != "step"
        }
        return held, held.pop(MASTER, None)

    def _cat_own(self, key: str, pool: Pool | None) -> Tensor:
        """Return numbers per point, of the members one after the other."""
        own = self._own(self.state_views[key])
        return torch.cat(own, out=self._buffer(f"own {key}", (self.blocks, *own[0].shape[1:]), own[0], pool))

    def _has_param_shape(self, shown: list[Tensor]) -> bool:
        """Whether there is an entry for every one of a member, not a number a point."""
        return shown[0].shape == self.parameters[0].shape

    def _own(self, shown: list[Tensor]) -> list[Tensor]:
        """Of numbers a point, of all parts, those of this one."""
        return [numbers.narrow(0, self.point_offset, self.each) for numbers in shown]

    def sync_master_(self, values: Tensor, master: Tensor | None) -> None:
        """Let what is held in float32 follow points that have been written to, where the host may not look.

        A point that has not moved yet is not the rounding of what is held, which is the nearest to it: entries that
        differ by roundings stay.
        """
        if master is None or host_can_branch(values):
            return
        now, eps, dims = values.to(master.dtype), torch.finfo(values.dtype).eps, self.part.point_ndim
        gap, size = now - master, point_norm(now, dims, keepdim=True)
        scale = size / max(1, now.shape[now.ndim - dims :].numel()) ** 0.5  # of an entry
        other = (gap.abs() > 4 * eps * (now.abs() + scale)) | (point_norm(gap, dims, keepdim=True) > eps * size)
        master.copy_(torch.where(other, now, master))

    def scatter_(self, views: Views) -> None:
        """Write what was gathered to the members that it came from."""
        if not self.gathers_state:
            torch._foreach_copy_(self.parameters, views.member_values)
            return
        self._put(self.parameters, views.values)
        for key, held in views.moments.items():
            self._put(self.state_views[key], held)
        if views.master is not None:
            self._put(self.state_views[MASTER], views.master)

    def _put(self, tensors: list[Tensor], values: Tensor) -> None:
        """Write points to the rows of the members' tensors, or numbers a point to where they have them."""
        if not self._has_param_shape(tensors):
            torch._foreach_copy_(self._own(tensors), list(values.split(self.each)))  # type: ignore[no-untyped-call]
            return
        rows = [self.part.to_rows(tensor.detach()) for tensor in tensors]
        torch._foreach_copy_(rows, list(self._stack(values).split(self._rows, self._along)))  # type: ignore[no-untyped-call]

    def _stack(self, values: Tensor) -> Tensor:
        """Points as the rows that they are a view of."""
        lying = values.mT if self.tall else values
        return (lying.movedim(0, self._along) if self._along else lying).reshape(self.stacked)

    def split(self, stacked: Tensor) -> list[Tensor]:
        """Rows one below the other, as one tensor a member, of its shape."""
        pieces = stacked.split(self._rows, self._along)  # type: ignore[no-untyped-call]
        return [self.part.from_rows(piece, p.shape) for piece, p in zip(pieces, self.parameters, strict=True)]

    def gather(self, pool: Pool | None) -> Views:
        """Return the points and their moments, gathered where they are.

        The views stay from step to step, but for a graph that is traced, without a pool.
        """
        if pool is None:
            return self._make_views(pool)
        if self._views is None:
            self._views = self._make_views(pool)
        elif self.gathered:
            self.view(self.parameters, "point", pool)
            if self.gathers_state:
                self._gather_state(pool)
        if self.low:
            self.sync_master_(self._views.values, self._views.master)
        return self._views

    def _make_views(self, pool: Pool | None) -> Views:
        values = self.view(self.parameters, "point", pool)
        moments, master = self._gather_state(pool)
        if self.low and pool is None:
            self.sync_master_(values, master)
        points = values if master is None else master
        batches = [
            Batch(
                index,
                points[index],
                None if points is values else values[index],
                {key: moment[index] for key, moment in moments.items()},
                Workspace(pool, points[index]) if self.stiefel else None,
            )
            for index in self.chunks()
        ]
        member_values = self.split(self._stack(values)) if self.gathered and not self.gathers_state else []
        return Views(values, moments, master, batches, member_values)

    def gradients(self, pool: Pool | None) -> Tensor:
        """Return the gradients of all points: a view of a lone one, a copy of many."""
        gradient = self.parameters[0].grad
        if self._strides is not None and gradient is not None and gradient.stride() == self._strides[0]:
            return gradient.as_strided(self._strides[1], self._strides[2])
        return self.view([p.grad for p in self.parameters], "gradient", pool)  # type: ignore[misc]

    def show_steps(self, steps: Tensor) -> None:
        """Take the step counts of the members, which are equal where they may be read."""
        self.steps = steps
        self.shared_step = int(steps[0]) if host_can_branch(steps) else None
        self.counted = None if self.shared_step is None or steps.is_inference() else steps._version

    def increment_step(self, steps: Scalar) -> None:
        """Add a step to the counts, or none where a GradScaler skips it."""
        self.steps.add_(steps)  # type: ignore[union-attr]
        if self.shared_step is not None:
            self.shared_step += 1
        if self.counted is not None:
            self.counted = self.steps._version  # type: ignore[union-attr]

    def allocate_workspaces(self, pool: Pool) -> None:
        """Take the buffers of a step now: if there is no memory for them, nothing has been written yet."""
        first = self.parameters[0]
        for name in ("point", "gradient") if self.gathered else ():
            pool.take(name, self.stacked, first)
        for key, shown in self.state_views.items() if self.gathers_state else ():
            if key != "step" and self._has_param_shape(shown):
                pool.take(f"held {key}", self.stacked, shown[0])
        if not self.stiefel:
            return
        count = next(self.chunks()).stop  # the first piece is as large as any
        like = first.new_empty(0, dtype=working_dtype(self.dtype))
        names = "ab" if self.p == self.n else "abxy"
        if not host_can_branch(first):
            names += "cdefx" if self.p == self.n else "defz"
        Workspace(pool, like, (count, self.p, self.n)).make(names)

    def probe_memory(self, temporaries: int) -> None:
        """Take as many times the memory of a piece, and give it back: an accelerator's allocator keeps it for the step.

        A host's has no end that could be seen before it is there.
        """
        first = self.parameters[0]
        if not host_can_branch(first):
            count = temporaries * next(self.chunks()).stop * self.p * self.n
            first.new_empty(count, dtype=working_dtype(self.dtype))

    def chunks(self) -> Iterator[slice]:
        """Yield the blocks that are worked on at a time: memory is needed for these only."""
        block = self.p * self.n * self.parameters[0].element_size()
        size = max(1, (BATCH if self.stiefel else self._batch()) // block)
        for start in range(0, self.blocks, size):
            yield slice(start, min(start + size, self.blocks))

    def _batch(self) -> int:
        """Bytes of points at a time, of which a step makes a dozen tensors: on an accelerator, in few pieces."""
        first = self.parameters[0]
        return BATCH // 4 if host_can_branch(first) else max(BATCH, first.nbytes * len(self.parameters) // _MAX_CHUNKS)

    def scale(self, group: Group) -> Scalar:
        """Return minus the learning rate of points, of which the blocks are a multiple."""
        lr = group["lr"]
        if type(lr) is not float and isinstance(lr, Tensor):
            lr = lr.reshape(())
        return -group["orthogonal_lr_scale"] / self.gain * lr

    def steps_per_block(self) -> Tensor:
        """Return step counts ``(B, 1, ..)`` on the device of the parameters, or ``(1, 1, ..)`` for a lone one."""
        assert self.steps is not None
        steps = self.steps.to(self.parameters[0].device, self.real, non_blocking=True)
        spread = steps.repeat_interleave(self.each) if self.gathered else steps
        return spread.view(-1, *[1] * len(self.point))


def build_buckets(parameters: list[Tensor], keys: list[Key]) -> Iterator[tuple[Key, Bucket]]:
    """Yield the buckets of marked parameters, each with its members' key: only those that have the same are together.

    A key is a number of options, whether the first gradient is to enter the momentum whole, and the number of steps so
    far, where that is known.
    """
    shared: dict[object, list[int]] = {}
    for index, (parameter, key) in enumerate(zip(parameters, keys, strict=True)):
        constraint = constraint_of(parameter)
        assert constraint is not None
        alike = (parameter.shape, parameter.dtype, parameter.device, constraint, key)
        shared.setdefault(alike if _should_gather(parameter, constraint) else index, []).append(index)
    for members in shared.values():
        constraint, key = constraint_of(parameters[members[0]]), keys[members[0]]
        assert constraint is not None
        for some in _split_members(parameters, members):
            for part, before in _parts(parameters[some[0]], constraint):
                yield key, Bucket([parameters[i] for i in some], constraint, part, before, key[1])


def _strides(part: Layout, tensor: Tensor) -> tuple[tuple[int, ...], ...] | None:
    """Return the strides of a tensor, and the shape and strides of its points, if these begin where it does."""
    points = get_points(part, tensor)
    if points.storage_offset() != tensor.storage_offset():
        return None
    return tensor.stride(), tuple(points.shape), points.stride()


def _parts(parameter: Tensor, constraint: Manifold) -> Iterator[tuple[Layout, int]]:
    """The parts of a parameter, and how many points come before each."""
    before = 0
    for part in constraint.layouts(parameter.shape):
        yield part, before
        before += len(get_points(part, parameter.detach()))


def _should_gather(parameter: Tensor, constraint: Manifold) -> bool:
    """Whether a parameter is to be gathered with others like it."""
    return all(
        parameter.nbytes <= SMALL
        if isinstance(part, SliceLayout)
        else part.block_numel(parameter.shape) * parameter.element_size() <= SMALL
        for part in constraint.layouts(parameter.shape)
    )


def _split_members(parameters: list[Tensor], members: list[int]) -> Iterator[list[int]]:
    """Split members into portions of at most ``BATCH`` bytes and, unless they are very small, a third of all."""
    first = parameters[members[0]]
    size = first.nbytes
    limit = min(BATCH, max(size * len(members) // 3, SMALL))
    count = max(1, limit // size)
    for start in range(0, len(members), count):
        yield members[start : start + count]
