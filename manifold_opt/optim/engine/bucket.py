"""Buckets: batches of points that are updated together, with views of their values, gradients and moments.

A large parameter has a bucket of its own, and its blocks are views of it. Small parameters with the same shape, dtype,
device and constraint share a bucket. Their values and gradients are gathered into workspaces, and the new values are
written back. Each moment of a shared bucket is one tensor ``(B, p, n)``; the optimizer state has a view of it for every
parameter, under torch's keys. If a bucket has only some rows of its parameters, their moments are gathered and written
back in every step too.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ...linalg.precision import LOW_PRECISION, MASTER, working_dtype
from ...linalg.products import Pool, Workspace, host_can_branch
from ...manifolds import Manifold, Orthogonal
from ...manifolds.base import Scalar
from ...manifolds.layout import Layout, PointMap, point_norm
from .optimizer import Group

_MAX_CHUNKS = 16  # per bucket, if each chunk has at least BATCH_BYTES
BATCH_BYTES = 2**21  # size of the blocks that are processed at a time; at least one block


class Batch(NamedTuple):
    """Points of a bucket that are processed at a time.

    Attributes:
        rows: position of these points in the bucket.
        points: views of the values, in the dtype of the computation. Updated in place.
        values: views of the values in the storage dtype; None if it is the dtype of the computation.
        moments: views of the moments, by key.
        ws: buffers.
    """

    rows: slice
    points: Tensor
    values: Tensor | None
    moments: dict[str, Tensor]
    ws: Workspace


class Views(NamedTuple):
    """Values and state of a bucket as points ``(B, *point)``: views, or gathered copies.

    Attributes:
        values: points, in the storage dtype.
        moments: moments, by key.
        master: float32 master copy of the points, for parameters in low precision.
        batches: slices of all of these.
        member_values: gathered values, one tensor per parameter in its shape.
    """

    values: Tensor
    moments: dict[str, Tensor]
    master: Tensor | None
    batches: list[Batch]
    member_values: list[Tensor]


@dataclass
class Bucket:
    """Parameters, or one region of them, that are updated as one batch.

    Attributes:
        parameters: parameters with the same shape, dtype, device and constraint.
        constraint: constraint of each parameter.
        layout: position of the points in each parameter.
        point_offset: number of points in earlier layouts. Only the bucket with offset 0 owns the step counts.
        first_momentum: whether the first gradient enters the momentum undamped.
        moments: moments ``(B, *point)``, or ``(B, 1, ..)`` if per block, which share memory with the optimizer state;
            empty if they are gathered in every step.
        master: float32 master copy of the points, in the same way.
        steps: step counts ``(members,)``.
        shared_step: step count of all members; None if it must not be read.
        counted_version: version of ``steps`` for which ``shared_step`` is valid; None if unknown.
        state_views: entries of the optimizer state, by key, one per member.
    """

    parameters: list[Tensor]
    constraint: Manifold
    layout: Layout
    point_offset: int
    first_momentum: bool
    moments: dict[str, Tensor] = field(default_factory=dict)
    master: Tensor | None = None
    steps: Tensor | None = None
    shared_step: int | None = None
    counted_version: int | None = None
    state_views: dict[str, list[Tensor]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        first = self.parameters[0]
        self.dtype = first.dtype
        self.working_dtype = working_dtype(first.dtype)
        self.real_dtype = self.working_dtype.to_real()  # here, because torch.compile cannot trace to_real
        self.low_precision = first.dtype in LOW_PRECISION
        self.map = PointMap(self.layout, first.detach(), len(self.parameters))
        self.gathered = not self.map.is_view
        self.gathers_state = self.gathered and not self.map.covers
        self.points_per_param, self.point_shape = self.map.points_per_tensor, self.map.point_shape
        self.blocks = self.points_per_param * len(self.parameters)
        self.stiefel = self.constraint.uses_retraction
        self.has_own_frame = self.constraint.frame_shape(self.point_shape) != self.point_shape
        self.has_parts = type(self.constraint).parts is not Manifold.parts
        self.is_skew = self.constraint.is_skew(self.point_shape)
        # The gradient in the frame may overflow though the gradient does not. That of orthogonal blocks has its norm.
        self.tests_frame = not self.stiefel and not self.constraint.frame_is_bounded
        self.p, self.n = self.point_shape if self.stiefel else (1, self.point_shape.numel())
        self.gain = self.constraint.gain if isinstance(self.constraint, Orthogonal) else 1.0
        # Values and gradients need no conversion before an update.
        self.plain = self.gain == 1 and not self.low_precision and not first.is_complex()
        self._views: Views | None = None
        self._buffers: dict[str, Tensor] = {}

    def _points(self, tensors: list[Tensor], name: str, pool: Pool | None) -> Tensor:
        """Return the points of the members' ``tensors``: a view of a single one, a copy of several in a buffer."""
        # Detached, because torch.utils.swap_tensors refuses parameters that a view refers to.
        if not self.gathered:
            return self.map.points([tensors[0].detach()])
        return self.map.points(tensors, self._buffer(name, self.map.buffer_shape, tensors[0], pool))

    def _buffer(self, name: str, shape: tuple[int, ...], like: Tensor, pool: Pool | None) -> Tensor:
        """Return a buffer, the same one in every step."""
        if pool is None:
            return torch.empty(shape, dtype=like.dtype, device=like.device)
        if name not in self._buffers:
            self._buffers[name] = pool.take(name, shape, like)
        return self._buffers[name]

    def _gather_state(self, pool: Pool | None) -> tuple[dict[str, Tensor], Tensor | None]:
        """Return the moments and the master copy of all points, gathered from the members if necessary."""
        if not self.gathers_state:
            return self.moments, self.master
        gathered = {
            key: self._points(entries, f"held {key}", pool)
            if self._has_param_shape(entries)
            else self._gather_block_scalars(key, pool)
            for key, entries in self.state_views.items()
            if key != "step"
        }
        return gathered, gathered.pop(MASTER, None)

    def _gather_block_scalars(self, key: str, pool: Pool | None) -> Tensor:
        """Return a state entry with one number per point, concatenated over the members."""
        own = self._block_scalars(self.state_views[key])
        return torch.cat(own, out=self._buffer(f"own {key}", (self.blocks, *own[0].shape[1:]), own[0], pool))

    def _has_param_shape(self, entries: list[Tensor]) -> bool:
        """Return True if state entries have the shape of the parameters, not one number per point."""
        return entries[0].shape == self.parameters[0].shape

    def _block_scalars(self, entries: list[Tensor]) -> list[Tensor]:
        """Return the numbers for the points of this bucket, from entries with one number per point."""
        return [numbers.narrow(0, self.point_offset, self.points_per_param) for numbers in entries]

    def sync_master_(self, values: Tensor, master: Tensor | None) -> None:
        """Overwrite the master copy of points that have been modified, if values cannot be read.

        Entries that differ from the master copy by rounding are kept: before the first update, the master copy is the
        nearest point to the parameter, and the parameter is not its rounding.
        """
        if master is None or host_can_branch(values):
            return
        now, eps, dims = values.to(master.dtype), torch.finfo(values.dtype).eps, self.layout.point_ndim
        gap, size = now - master, point_norm(now, dims, keepdim=True)
        scale = size / max(1, now.shape[now.ndim - dims :].numel()) ** 0.5  # root mean square of the entries
        modified = (gap.abs() > 4 * eps * (now.abs() + scale)) | (point_norm(gap, dims, keepdim=True) > eps * size)
        master.copy_(torch.where(modified, now, master))

    def scatter_(self, views: Views) -> None:
        """Write gathered values and state back to the parameters and the optimizer state."""
        if not self.gathers_state:
            torch._foreach_copy_(self.parameters, views.member_values)
            return
        self._scatter_state_(self.parameters, views.values)
        for key, moment in views.moments.items():
            self._scatter_state_(self.state_views[key], moment)
        if views.master is not None:
            self._scatter_state_(self.state_views[MASTER], views.master)

    def _scatter_state_(self, tensors: list[Tensor], values: Tensor) -> None:
        """Write points to the rows of the members' tensors, or numbers to their entries with one number per point."""
        if not self._has_param_shape(tensors):
            numbers = list(values.split(self.points_per_param))  # type: ignore[no-untyped-call]
            torch._foreach_copy_(self._block_scalars(tensors), numbers)
            return
        self.map.write_([tensor.detach() for tensor in tensors], values)

    def gather(self, pool: Pool | None) -> Views:
        """Return the points and their state, gathered if necessary.

        The views are reused in later steps, except in a traced graph (``pool`` is None).
        """
        if pool is None:
            return self._make_views(pool)
        if self._views is None:
            self._views = self._make_views(pool)
        elif self.gathered:
            self._points(self.parameters, "point", pool)
            if self.gathers_state:
                self._gather_state(pool)
        if self.low_precision:
            self.sync_master_(self._views.values, self._views.master)
        return self._views

    def _make_views(self, pool: Pool | None) -> Views:
        values = self._points(self.parameters, "point", pool)
        moments, master = self._gather_state(pool)
        if self.low_precision and pool is None:
            self.sync_master_(values, master)
        points = values if master is None else master
        batches = [
            Batch(
                index,
                points[index],
                None if points is values else values[index],
                {key: moment[index] for key, moment in moments.items()},
                Workspace(pool, points[index]),
            )
            for index in self.chunks()
        ]
        member_values = self.map.split(values) if self.gathered and not self.gathers_state else []
        return Views(values, moments, master, batches, member_values)

    def forget_slack(self) -> None:
        """Discard what a manifold remembers of the points, which have been written to."""
        for batch in self._views.batches if self._views is not None else ():
            batch.ws.slack = 0.0

    def gradients(self, pool: Pool | None) -> Tensor:
        """Return the gradients of all points: a view of a single gradient, a copy of several."""
        gradient, strides = self.parameters[0].grad, self.map.strides
        if strides is not None and gradient is not None and gradient.stride() == strides[0]:
            return gradient.as_strided(strides[1], strides[2])  # quicker than the layout's views
        return self._points([p.grad for p in self.parameters], "gradient", pool)  # type: ignore[misc]

    def set_steps(self, steps: Tensor) -> None:
        """Set the step counts of the members. If they can be read, all are equal."""
        self.steps = steps
        self.shared_step = int(steps[0]) if host_can_branch(steps) else None
        self.counted_version = None if self.shared_step is None or steps.is_inference() else steps._version

    def increment_step(self, steps: Scalar) -> None:
        """Add ``steps`` to the step counts: 1, or 0 if a GradScaler skips the step."""
        self.steps.add_(steps)  # type: ignore[union-attr]
        if self.shared_step is not None:
            # A step that a GradScaler skips adds a tensor, zero, to a count on the host.
            self.shared_step = int(self.steps[0]) if isinstance(steps, Tensor) else self.shared_step + 1  # type: ignore[index]
        if self.counted_version is not None:
            self.counted_version = self.steps._version  # type: ignore[union-attr]

    def allocate_workspaces(self, pool: Pool) -> None:
        """Allocate the buffers of a step, so that an out-of-memory error is raised before anything is written."""
        first = self.parameters[0]
        for name in ("point", "gradient") if self.gathered else ():
            pool.take(name, self.map.buffer_shape, first)
        for key, entries in self.state_views.items() if self.gathers_state else ():
            if key != "step" and self._has_param_shape(entries):
                pool.take(f"held {key}", self.map.buffer_shape, entries[0])
        count = next(self.chunks()).stop  # the first chunk is the largest
        like = first.new_empty(0, dtype=working_dtype(self.dtype))
        names = "xy" if not self.stiefel else "ab" if self.p == self.n else "abxy"
        if self.stiefel and not host_can_branch(first):
            names += "cdefx" if self.p == self.n else "defz"
        Workspace(pool, like, (count, *self.point_shape)).make(names)

    def probe_memory(self, temporaries: int) -> None:
        """Allocate and free the step's temporaries, so that a CUDA OOM is raised before anything is written.

        The caching allocator keeps the memory for the step. No-op on the CPU.
        """
        first = self.parameters[0]
        if not host_can_branch(first):
            count = temporaries * next(self.chunks()).stop * self.p * self.n
            first.new_empty(count, dtype=working_dtype(self.dtype))

    def chunks(self) -> Iterator[slice]:
        """Yield slices of blocks that are processed at a time. Temporaries have the size of one chunk."""
        block = self.p * self.n * self.parameters[0].element_size()
        size = max(1, (BATCH_BYTES if self.stiefel else self._chunk_bytes()) // block)
        for start in range(0, self.blocks, size):
            yield slice(start, min(start + size, self.blocks))

    def _chunk_bytes(self) -> int:
        """Return the bytes of a chunk of points: small on the CPU, few chunks on an accelerator."""
        first = self.parameters[0]
        if host_can_branch(first):
            return 4 * BATCH_BYTES
        return max(BATCH_BYTES, first.nbytes * len(self.parameters) // _MAX_CHUNKS)

    def scale(self, group: Group) -> Scalar:
        """Return minus the learning rate; for orthogonal blocks times its scale, and divided by their gain."""
        lr = group["lr"]
        if type(lr) is not float and isinstance(lr, Tensor):
            lr = lr.reshape(())
        return -group["orthogonal_lr_scale"] / self.gain * lr if self.stiefel else -lr

    def steps_per_block(self) -> Tensor:
        """Return step counts ``(B, 1, ..)`` on the device of the parameters, ``(1, 1, ..)`` for one parameter."""
        assert self.steps is not None
        steps = self.steps.to(self.parameters[0].device, self.real_dtype, non_blocking=True)
        per_block = steps.repeat_interleave(self.points_per_param) if self.gathered else steps
        return per_block.view(-1, *[1] * len(self.point_shape))
