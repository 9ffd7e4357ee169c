"""Shards: which part of a sharded tensor (a DTensor) a rank has, and the whole tensor from its shards.

A sharded tensor is split along its dimensions over the dimensions of a mesh of ranks, as ``torch.chunk`` splits it. The
part of a rank is a box: an offset and a length along every dimension.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

Interval = tuple[int, int]  # start and length
Box = tuple[Interval, ...]  # of every dimension


def is_dtensor(tensor: Any) -> bool:
    """Return True if a tensor is sharded or replicated over a mesh. It avoids the slow import of the class."""
    return hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Any) -> Any:
    """Return the local part of a DTensor, in the same memory and without its graph. Only detach other tensors."""
    if not is_dtensor(tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local().detach()


def whole(tensor: Any) -> Tensor:
    """Gather a DTensor, a collective, and return it without its graph. Only detach other tensors."""
    with torch.no_grad():
        gathered: Tensor = tensor.full_tensor() if is_dtensor(tensor) else tensor
    return gathered.detach()


def write_whole_(tensor: Any, value: Tensor) -> None:
    """Write the part of ``value`` that this rank has to a DTensor."""
    part = local(tensor)
    part.copy_(value[slices(local_box(tensor))])


def shard_like(value: Tensor, like: Any) -> Any:
    """Return a DTensor with the mesh and the placements of ``like``, given its whole value on every rank."""
    part = value[slices(local_box(like))].clone(memory_format=torch.contiguous_format)
    return from_local(part, like)


def placed_like(tensor: Any, like: Any) -> Any:
    """Return a tensor of the shape of the DTensor ``like`` with its mesh and placements. A collective."""
    if not is_dtensor(tensor) or tensor.device_mesh != like.device_mesh:
        return shard_like(whole(tensor).to(like.device), like)
    return tensor if tensor.placements == like.placements else tensor.redistribute(placements=like.placements)


def from_local(part: Tensor, like: Any) -> Any:
    """Return a DTensor with this local part, and with mesh, placements and shape of ``like``."""
    return type(like).from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def slices(box: Box) -> tuple[slice, ...]:
    """Return a box as an index."""
    return tuple(slice(start, start + length) for start, length in box)


def sharded_mesh_dims(tensor: Any) -> list[int]:
    """Return the mesh dimensions over which a DTensor is split; over the others it is replicated."""
    return [i for i, placement in enumerate(tensor.placements) if not placement.is_replicate()]


def ranks_of(tensor: Any) -> tuple[int, ...]:
    """Return the ranks that have the other shards of the copy of which this rank has one, in the order of the mesh."""
    coordinate, split = tensor.device_mesh.get_coordinate(), sharded_mesh_dims(tensor)
    index = tuple(slice(None) if dim in split else k for dim, k in enumerate(coordinate))
    return tuple(tensor.device_mesh.mesh[index].flatten().tolist())


def unsharded_like(tensor: Tensor) -> Tensor:
    """Return a tensor without values, with the shape and dtype of a DTensor. Return other tensors themselves."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") if is_dtensor(tensor) else tensor


def local_box(tensor: Any) -> Box:
    """Return the box of this rank."""
    return box_at(tensor, tensor.device_mesh.get_coordinate())


def boxes_of(tensor: Any, ranks: Sequence[int]) -> list[Box]:
    """Return the boxes of some ranks of the mesh of a DTensor."""
    mesh = tensor.device_mesh.mesh  # reading it takes longer than a box
    coordinates = dict(zip(mesh.flatten().tolist(), itertools.product(*map(range, mesh.shape)), strict=True))
    return [box_at(tensor, coordinates[rank]) for rank in ranks]


def box_at(tensor: Any, coordinate: Sequence[int]) -> Box:
    """Return the box of the rank at these coordinates of the mesh.

    FSDP2 splits the shards of tensor parallelism once more: its ``_StridedShard`` precedes in the list of placements,
    but is applied after the ``Shard`` of the same dimension.
    """
    box = [(0, length) for length in tensor.shape]
    mesh, placements = tensor.device_mesh, tensor.placements
    for i in sorted(sharded_mesh_dims(tensor), key=lambda i: _is_strided(placements[i])):
        dim = placements[i].dim
        start, length = box[dim]
        chunk = -(-length // mesh.size(i))
        offset = min(chunk * coordinate[i], length)
        box[dim] = (start + offset, min(chunk, length - offset))
    return tuple(box)


def _is_strided(placement: Any) -> bool:
    return hasattr(placement, "split_factor")


def placement_problem(tensor: Any) -> str | None:
    """Return why the points of a DTensor cannot be found, to follow its name in an error message, or None."""
    for i, placement in enumerate(tensor.placements):
        strided = _is_strided(placement)
        if not (placement.is_replicate() or placement.is_shard() or strided):
            return f"has the placement {placement}: only Shard and Replicate are supported. Call redistribute() first."
        if strided:
            others = [j for j in sharded_mesh_dims(tensor) if j != i and tensor.placements[j].dim == placement.dim]
            split = [j for j in others if not _is_strided(tensor.placements[j])]
            if len(others) != 1 or split != others or tensor.device_mesh.size(others[0]) != placement.split_factor:
                return (
                    f"has the placements {tensor.placements}, whose order of splitting is not known. Shard it over "
                    "one mesh dimension for tensor parallelism and one for fully_shard."
                )
    if tensor.ndim == 0:
        return "has no dimension that could be sharded."
    if tensor.device_mesh.get_coordinate() is None:
        return f"is on {tensor.device_mesh}, of which this process is no rank."
    if tuple(local(tensor).shape) != tuple(length for _, length in local_box(tensor)):
        return f"has a local part of shape {tuple(local(tensor).shape)}, which is not that of its placements."
    return None
