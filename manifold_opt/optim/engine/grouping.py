"""Grouping of parameters into buckets, and the rows of a parameter that are outside every block."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...constraints.tag import constraint_of
from ...linalg.products import host_can_branch
from ...manifolds import Manifold
from ...manifolds.layout import Layout, SliceLayout, get_points
from ...manifolds.shards import is_dtensor
from ...stiefel.retractions import OPTIONS as RETRACTION_OPTIONS
from .bucket import BATCH_BYTES, Bucket
from .optimizer import Group, ManifoldOptimizer

Key = tuple[int, bool, float | None]  # group, first_momentum, step count
SMALL_BYTES = 2**16  # largest block (slices: parameter) that is gathered with others


@dataclass
class FreeRows:
    """Rows or columns of a marked parameter outside every block, which torch's own step updates.

    Attributes:
        parameter: the parameter.
        dim, start, length: position of the rows (``dim`` 0) or columns (1).
        first_momentum: whether they have had no momentum yet.
    """

    parameter: Tensor
    dim: int
    start: int
    length: int
    first_momentum: bool

    def view(self, tensor: Tensor) -> Tensor:
        """Return a view of the same rows or columns of a tensor that has the parameter's shape."""
        return tensor.detach().narrow(self.dim, self.start, self.length)


def active_params(group: Group) -> list[Tensor]:
    """Return the marked parameters of a group that have gradients, without DTensors, which sharded.py steps."""
    return [p for p in group["params"] if p.grad is not None and constraint_of(p) is not None and not is_dtensor(p)]


def first_equal_groups(optimizer: ManifoldOptimizer) -> list[int]:
    """Return for every group the position of the first one with the same options. Tensors are compared by identity."""
    first: dict[Any, int] = {}
    names = (*optimizer.defaults, *(name for name in RETRACTION_OPTIONS if name not in optimizer.defaults))
    return [
        first.setdefault(tuple(x if type(x) in _PLAIN else _hashable(x) for x in map(group.get, names)), position)
        for position, group in enumerate(optimizer.param_groups)
    ]


_PLAIN = {float, int, bool, str, type(None)}


def _hashable(option: Any) -> Any:
    if isinstance(option, (list, tuple)):
        return tuple(map(_hashable, option))
    return option if type(option) in _PLAIN else id(option)


def steps_so_far(optimizer: ManifoldOptimizer, parameter: Tensor) -> float | None:
    """Return the step count of a parameter; None if it must not be read.

    SGD uses the count only to correct rounding errors in every fourth step, so its count is taken modulo 4.
    """
    count = torch.as_tensor(optimizer.state.get(parameter, {}).get("step", 0.0))
    if not host_can_branch(count):
        return None
    return float(count) % 4 if isinstance(optimizer, torch.optim.SGD) else float(count)


def build_buckets(parameters: list[Tensor], keys: list[Key]) -> Iterator[tuple[Key, Bucket]]:
    """Yield buckets of marked parameters, each with the key of its members.

    Args:
        parameters: marked parameters.
        keys: position of the group, whether the first gradient enters the momentum undamped, and step count (None if
            unknown). Only parameters with equal keys share a bucket.
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
            for layout, offset in _layouts_with_offsets(parameters[some[0]], constraint):
                yield key, Bucket([parameters[i] for i in some], constraint, layout, offset, key[1])


def _layouts_with_offsets(parameter: Tensor, constraint: Manifold) -> Iterator[tuple[Layout, int]]:
    """Yield the layouts of a parameter, each with the number of points in earlier ones."""
    offset = 0
    for layout in constraint.layouts(parameter.shape):
        yield layout, offset
        offset += len(get_points(layout, parameter.detach()))


def _should_gather(parameter: Tensor, constraint: Manifold) -> bool:
    """Return True if a parameter is small enough to share a bucket."""
    return all(
        parameter.nbytes <= SMALL_BYTES
        if isinstance(layout, SliceLayout)
        else layout.block_numel(parameter.shape) * parameter.element_size() <= SMALL_BYTES
        for layout in constraint.layouts(parameter.shape)
    )


def _split_members(parameters: list[Tensor], members: list[int]) -> Iterator[list[int]]:
    """Split members into lists of at most ``BATCH_BYTES`` bytes and, unless they are very small, a third of all."""
    first = parameters[members[0]]
    size = first.nbytes
    limit = min(BATCH_BYTES, max(size * len(members) // 3, SMALL_BYTES))
    count = max(1, limit // size)
    for start in range(0, len(members), count):
        yield members[start : start + count]
