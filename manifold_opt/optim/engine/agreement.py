"""Agreement between ranks: every rank takes the same step of sharded parameters, or every rank raises the same error.

Before a step the ranks reduce one vector of four integers: a checksum of what they are about to do and its negative,
whose maxima are opposite if all are equal; whether a rank has an error; and whether a rank has to look closer, because
a weight was written to or a plan is new.
"""

from __future__ import annotations

import builtins
import itertools
import zlib
from typing import Any

import torch
import torch.distributed as dist

from ...manifolds.shards import local

Entries = list[tuple[str, str]]


class Description:
    """What a rank is about to do: names of parameters, each with a text. Equal descriptions have equal checksums."""

    def __init__(self, entries: Entries) -> None:
        self.entries = entries
        self.checksum = zlib.crc32(repr(entries).encode())


def agreement_groups(parameters: list[Any]) -> list[Any]:
    """Return process groups that connect all ranks of the meshes of some DTensors, in an order that all ranks share."""
    meshes = {tuple(p.device_mesh.mesh.flatten().tolist()): p.device_mesh for p in parameters}
    if any(len(ranks) == dist.get_world_size() for ranks in meshes):
        return [dist.group.WORLD]
    groups = {}
    for mesh in meshes.values():
        for dim in range(mesh.ndim):
            if mesh.size(dim) > 1:
                group = mesh.get_group(dim)
                groups[tuple(dist.get_process_group_ranks(group))] = group
    return [groups[ranks] for ranks in sorted(groups)]


def agree(
    parameters: list[Any], description: Description, error: BaseException | None = None, *, closer: bool = False
) -> bool:
    """Return whether any rank has to look closer. A collective.

    Args:
        parameters: DTensors, whose meshes determine the ranks.
        description: what this rank is about to do.
        error: error of this rank, which all ranks then raise.
        closer: whether this rank has to look closer.

    Raises:
        ValueError: the descriptions differ.
        BaseException: the error of the first rank that has one.
    """
    groups = agreement_groups(parameters)
    device = local(parameters[0]).device
    checksum = description.checksum
    vector = torch.tensor([checksum, -checksum, error is not None, closer], dtype=torch.int64, device=device)
    for group in groups:
        dist.all_reduce(vector, dist.ReduceOp.MAX, group)
    largest, smallest, failed, any_closer = vector.tolist()
    if failed or largest != -smallest:
        _raise_first(groups, description, error)
    return bool(any_closer)


def _raise_first(groups: list[Any], description: Description, error: BaseException | None) -> None:
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
            kind = getattr(builtins, problem[0], RuntimeError)
            raise kind(f"{problem[1]} (This is the error of rank {rank}; nothing was changed on any rank.)")
    ranks = sorted(known)
    for first, second in itertools.pairwise(ranks):
        _raise_disagreement(first, known[first][1], second, known[second][1])
    raise AssertionError("the ranks disagree, and say the same.")


def _raise_disagreement(first: int, one: Entries, second: int, other: Entries) -> None:
    """Raise a ValueError that names the first parameter on which two ranks disagree, if there is one."""
    for left, right in itertools.zip_longest(one, other, fillvalue=("", "")):
        if left != right:
            name = left[0] or right[0]
            raise ValueError(
                f"the ranks disagree about {name}: on rank {first} it is {left[1] or 'absent'}, on rank {second} "
                f"{right[1] or 'absent'}. Mark the same parameters in the same way on every rank, give every optimizer "
                "the same groups, and compute a gradient of the same parameters."
            )
