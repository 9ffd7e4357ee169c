"""Owners: which rank steps which blocks of sharded parameters.

A block that lies whole in a rank's shard is owned by that rank. The others are given to the rank with the least work so
far, the most expensive ones first. Every rank computes the same assignment.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ...manifolds import Manifold
from ...manifolds.layout import Unit, units
from ...manifolds.shards import Box, Interval


@dataclass
class Ownership:
    """Blocks of a sharded parameter, and their owners.

    Attributes:
        constraint: constraint of the parameter.
        shape: shape of the whole parameter.
        dim: dimension along which it is cut.
        units: parts that are not cut any further.
        owners: the owner of each unit, as a position in the group of ranks.
        boxes: the box of each rank's shard.
    """

    constraint: Manifold
    shape: tuple[int, ...]
    dim: int
    units: list[Unit]
    owners: list[int]
    boxes: list[Box]

    def owned(self, rank: int) -> list[Interval]:
        """Return start and length along ``dim`` of what a rank owns; adjacent units are merged."""
        found: list[Interval] = []
        for unit, owner in zip(self.units, self.owners, strict=True):
            if owner == rank:
                if found and sum(found[-1]) == unit.start:
                    found[-1] = (found[-1][0], found[-1][1] + unit.length)
                else:
                    found.append((unit.start, unit.length))
        return found

    def owned_points(self, rank: int) -> Iterator[Interval]:
        """Yield start and length, among the points of the parameter, of those that a rank owns."""
        start = 0
        for unit, owner in zip(self.units, self.owners, strict=True):
            if owner == rank:
                yield start, unit.points
            start += unit.points

    def part_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of the tensor with everything that a rank owns."""
        length = sum(length for _, length in self.owned(rank))
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def part_constraint(self, rank: int) -> Manifold:
        """Return the constraint of that tensor."""
        return self.constraint.part(self.shape, self.owned(rank))


def assign_owners(parameters: list[tuple[Any, Manifold, list[Box]]], loads: list[float]) -> list[Ownership]:
    """Assign the blocks of parameters, given with their constraints and the boxes of all ranks, to owners.

    Args:
        parameters: the parameters.
        loads: estimated operations of each rank. They are increased.
    """
    found, cut = [], []
    for parameter, constraint, boxes in parameters:
        shape = tuple(parameter.shape)
        dim, parts = units(constraint.layouts(shape), shape)
        owners = [_holder(unit, dim, shape, boxes) for unit in parts]
        for unit, owner in zip(parts, owners, strict=True):
            if owner is not None:
                loads[owner] += unit.cost
        ownership = Ownership(constraint, shape, dim, parts, owners, boxes)  # type: ignore[arg-type]
        found.append(ownership)
        cut += [(ownership, run) for run in _runs_without_owner(ownership, len(loads))]
    costs = [sum(ownership.units[k].cost for k in run) for ownership, run in cut]
    for index in sorted(range(len(cut)), key=lambda index: -costs[index]):
        ownership, run = cut[index]
        owner = min(range(len(loads)), key=lambda rank: (loads[rank], -_held(ownership, run, rank), rank))
        loads[owner] += costs[index]
        for k in run:
            ownership.owners[k] = owner
    return found


def _holder(unit: Unit, dim: int, shape: tuple[int, ...], boxes: list[Box]) -> int | None:
    """Return the first rank whose shard contains a unit; None if no shard does."""
    for rank, box in enumerate(boxes):
        start, length = box[dim]
        inside = start <= unit.start and unit.start + unit.length <= start + length
        if inside and all(box[d] == (0, n) for d, n in enumerate(shape) if d != dim):
            return rank
    return None


def _runs_without_owner(ownership: Ownership, ranks: int) -> Iterator[list[int]]:
    """Yield lists of adjacent units that go to one owner: single ones, or an equal share for each rank."""
    for missing, group in itertools.groupby(range(len(ownership.units)), lambda k: ownership.owners[k] is None):
        run = list(group)
        if missing:
            shares = min(ranks, len(run))
            bounds = [len(run) * share // shares for share in range(shares + 1)]
            yield from (run[a:b] for a, b in itertools.pairwise(bounds))


def _held(ownership: Ownership, run: list[int], rank: int) -> int:
    """Return how many entries of a run of units lie in a rank's shard, which need not be sent if it is the owner."""
    box, numel = ownership.boxes[rank], 1
    for d, (start, length) in enumerate(box):
        if d == ownership.dim:
            first, last = ownership.units[run[0]], ownership.units[run[-1]]
            length = min(start + length, last.start + last.length) - max(start, first.start)
        numel *= max(length, 0)
    return numel
