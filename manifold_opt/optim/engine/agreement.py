"""Agreement between ranks: every rank takes the same step of sharded parameters, or every rank raises the same error.

Before a step the ranks reduce one vector of four integers: a checksum of what they are about to do and its negative,
whose maxima are opposite if all are equal; whether a rank has an error; and how much has changed since the last step.
"""

from __future__ import annotations

import builtins
import itertools
import zlib
from typing import Any

import torch
import torch.distributed as dist

from ...manifolds.shards import local

# What may have changed since the last step, from less to more: the plan of the parameters that are not sharded; values
# or states were written, or options changed; the marked parameters are others.
NOTHING, PLAN, VALUES, PARAMETERS = range(4)
Entries = list[tuple[str, str]]
_BUILTIN = ("FloatingPointError", "KeyError", "RuntimeError", "TypeError", "ValueError")


class Description:
    """What a rank is about to do: names of parameters, each with a text. Equal descriptions have equal checksums.

    Args:
        entries: names and texts.
        start: another description, to which they are added.
    """

    def __init__(self, entries: Entries, start: Description | None = None) -> None:
        self.entries: Entries = entries if start is None else [*start.entries, *entries]
        self.checksum: int = zlib.crc32(repr(entries).encode(), 0 if start is None else start.checksum)


class Agreement:
    """Process groups that connect all ranks of the meshes of some DTensors.

    Attributes:
        groups: the groups, in an order that all ranks share. Reducing over one after the other reaches every rank of a
            mesh from every other, because the groups along one dimension come before those along the next.
        device: device of the vector.
    """

    def __init__(self, parameters: list[Any]) -> None:
        self.device = local(parameters[0]).device
        meshes = {id(p.device_mesh): p.device_mesh for p in parameters}.values()
        if any(mesh.size() == dist.get_world_size() for mesh in meshes):
            self.groups = [dist.group.WORLD]
            return
        found = {}
        for mesh in meshes:
            for group in (mesh.get_group(dim) for dim in range(mesh.ndim) if mesh.size(dim) > 1):
                found[tuple(dist.get_process_group_ranks(group))] = group
        self.groups = [found[ranks] for ranks in sorted(found, key=lambda ranks: (ranks[1] - ranks[0], ranks))]

    def agree(self, description: Description, error: Exception | None = None, changes: int = NOTHING) -> int:
        """Return the largest of the changes on all ranks. A collective.

        Args:
            description: what this rank is about to do.
            error: error of this rank, which all ranks then raise.
            changes: what has changed on this rank.

        Raises:
            ValueError: the descriptions differ.
            Exception: the error of the first rank that has one.
        """
        numbers = [description.checksum, -description.checksum, error is not None, changes]
        vector = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        for group in self.groups:
            dist.all_reduce(vector, dist.ReduceOp.MAX, group)
        largest, smallest, failed, most_changes = vector.tolist()
        if failed or largest != -smallest:
            _raise_first(self.groups, description, error)
        return int(most_changes)


def _raise_first(groups: list[Any], description: Description, error: Exception | None) -> None:
    """Raise the first error on all ranks, or name the first parameter on which the ranks disagree."""
    own = None if error is None else (type(error).__name__, str(error))
    known: dict[int, Any] = {dist.get_rank(): (own, description.entries)}
    for group in groups:
        gathered: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(gathered, known, group)
        for one in gathered:
            known.update(one)
    if error is not None:
        raise error
    for rank, (problem, _) in sorted(known.items()):
        if problem is not None:
            kind = getattr(builtins, problem[0]) if problem[0] in _BUILTIN else RuntimeError
            raise kind(f"{problem[1]} (This is the error of rank {rank}; nothing was changed on any rank.)")
    ranks = sorted(known)
    for first, second in itertools.pairwise(ranks):
        _raise_disagreement(first, known[first][1], second, known[second][1])
    raise AssertionError("the ranks disagree, and say the same.")


def _raise_disagreement(first: int, one: Entries, second: int, other: Entries) -> None:
    """Raise a ValueError that names the first parameter on which two ranks disagree, if there is one."""
    left, right = dict(one), dict(other)
    for name in {**left, **right}:
        if left.get(name) != right.get(name):
            raise ValueError(
                f"the ranks disagree about {name}: on rank {first} it is {left.get(name, 'not marked')}; on rank "
                f"{second} it is {right.get(name, 'not marked')}. On every rank, mark the same parameters in the same "
                "way, create and load the optimizer at the same time, give it the same groups and options, and compute "
                "a gradient of the same parameters."
            )
