"""Owners: which rank steps which blocks of sharded parameters.

A block that lies whole in a rank's shard is owned by that rank. The others are given to the rank with the least work so
far, the most expensive ones first. Every rank computes the same assignment.
"""

from __future__ import annotations

import heapq
import itertools
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
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
        is_cut: whether a unit does not lie whole in a shard.
    """

    constraint: Manifold
    shape: tuple[int, ...]
    dim: int
    units: list[Unit]
    owners: list[int]
    boxes: list[Box]
    is_cut: bool

    def shares(self) -> dict[int, list[Interval]]:
        """Return start and length along ``dim`` of what each owner has; adjacent units are merged."""
        found: dict[int, list[Interval]] = defaultdict(list)
        for unit, owner in zip(self.units, self.owners, strict=True):
            _append(found[owner], unit.start, unit.length)
        return dict(found)

    def owned(self, rank: int) -> list[Interval]:
        """Return start and length along ``dim`` of what a rank owns; adjacent units are merged."""
        return self.shares().get(rank, [])

    def owned_points(self, rank: int) -> list[Interval]:
        """Return start and length, among the points of the parameter, of those that a rank owns."""
        found: list[Interval] = []
        start = 0
        for unit, owner in zip(self.units, self.owners, strict=True):
            if owner == rank:
                _append(found, start, unit.points)
            start += unit.points
        return found

    def part_shape(self, rank: int) -> tuple[int, ...]:
        """Return the shape of the tensor with everything that a rank owns."""
        length = sum(length for _, length in self.owned(rank))
        return (*self.shape[: self.dim], length, *self.shape[self.dim + 1 :])

    def part_constraint(self, rank: int) -> Manifold:
        """Return the constraint of that tensor."""
        return self.constraint.part(self.shape, self.owned(rank))


def _append(intervals: list[Interval], start: int, length: int) -> None:
    """Append an interval, or extend the last one if it ends where this one starts."""
    if intervals and sum(intervals[-1]) == start:
        intervals[-1] = (intervals[-1][0], intervals[-1][1] + length)
    else:
        intervals.append((start, length))


def assign_owners(parameters: list[tuple[Any, Manifold, list[Box]]], loads: list[float]) -> list[Ownership]:
    """Assign the blocks of parameters, given with their constraints and the boxes of all ranks, to owners.

    Args:
        parameters: the parameters.
        loads: estimated operations of each rank. They are increased.
    """
    found, cut = [], []
    known: dict[tuple[int, int], _Holders] = {}
    for parameter, constraint, boxes in parameters:
        shape = tuple(parameter.shape)
        dim, parts = units(constraint.layouts(shape), shape)
        if (id(boxes), dim) not in known:
            known[id(boxes), dim] = _Holders(boxes, dim)
        holders = known[id(boxes), dim]
        owners = [holders.of_whole(unit, shape) for unit in parts]
        for unit, owner in zip(parts, owners, strict=True):
            if owner is not None:
                loads[owner] += unit.cost
        ownership = Ownership(constraint, shape, dim, parts, owners, boxes, None in owners)  # type: ignore[arg-type]
        found.append(ownership)
        cut += [(ownership, holders, run) for run in _runs_without_owner(ownership, len(loads))]
    costs = [sum(ownership.units[k].cost for k in run) for ownership, _, run in cut]
    least = [(load, rank) for rank, load in enumerate(loads)]
    heapq.heapify(least)
    for index in sorted(range(len(cut)), key=lambda index: -costs[index]):
        ownership, holders, run = cut[index]
        while least[0][0] != loads[least[0][1]]:
            heapq.heappop(least)  # the rank's load has increased since
        load, first = least[0]
        held = {rank: entries for rank, entries in holders.of_run(ownership, run) if loads[rank] == load}
        owner = max(held, key=lambda rank: (held[rank], -rank), default=first)
        loads[owner] += costs[index]
        heapq.heappush(least, (loads[owner], owner))
        for k in run:
            ownership.owners[k] = owner
    return found


class _Holders:
    """The ranks whose shards of a parameter are not empty, in the order of their starts along a dimension."""

    def __init__(self, boxes: list[Box], dim: int) -> None:
        self.boxes, self.dim = boxes, dim
        filled = (rank for rank, box in enumerate(boxes) if all(length for _, length in box))
        self.ranks = sorted(filled, key=lambda rank: (boxes[rank][dim], rank))
        self.starts = [boxes[rank][dim][0] for rank in self.ranks]
        self.ends = [sum(boxes[rank][dim]) for rank in self.ranks]  # sorted too: intervals are equal or disjoint

    def between(self, start: int, end: int) -> list[int]:
        """Return the ranks that hold something between two positions along the dimension."""
        return self.ranks[bisect_right(self.ends, start) : bisect_left(self.starts, end)]

    def of_whole(self, unit: Unit, shape: tuple[int, ...]) -> int | None:
        """Return the rank whose shard contains a unit; None if no shard does."""
        ranks = self.between(unit.start, unit.start + unit.length)
        if len(ranks) == 1 and all(self.boxes[ranks[0]][d] == (0, n) for d, n in enumerate(shape) if d != self.dim):
            return ranks[0]
        return None

    def of_run(self, ownership: Ownership, run: list[int]) -> Iterator[tuple[int, int]]:
        """Yield ranks, and how many entries of a run of units each holds and need not send if it is the owner."""
        first, last = ownership.units[run[0]], ownership.units[run[-1]]
        end = last.start + last.length
        for rank in self.between(first.start, end):
            box = self.boxes[rank]
            start, length = box[self.dim]
            inside = min(start + length, end) - max(start, first.start)
            yield rank, math.prod(n for _, n in box) // length * inside


def _runs_without_owner(ownership: Ownership, ranks: int) -> Iterator[list[int]]:
    """Yield lists of adjacent units that go to one owner: single ones, or an equal share for each rank."""
    for missing, group in itertools.groupby(range(len(ownership.units)), lambda k: ownership.owners[k] is None):
        run = list(group)
        if missing:
            shares = min(ranks, len(run))
            bounds = [len(run) * share // shares for share in range(shares + 1)]
            yield from (run[a:b] for a, b in itertools.pairwise(bounds))
