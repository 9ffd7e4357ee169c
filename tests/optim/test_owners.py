"""Owners of blocks, and the pieces that are exchanged, for many ranks in one process."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from manifold_opt.manifolds import Orthogonal, UnitNorm
from manifold_opt.manifolds.layout import units
from manifold_opt.optim.engine.exchange import Exchange
from manifold_opt.optim.engine.owners import _runs_without_owner, assign_owners


def chunks(length, ranks):
    """Start and length of every rank's chunk, as torch.chunk cuts."""
    size = -(-length // ranks)
    return [(min(size * rank, length), max(min(size, length - size * rank), 0)) for rank in range(ranks)]


def boxes(shape, *mesh):
    """The boxes of all ranks; ``mesh`` has the size of each dimension, and the dimension of the tensor that it cuts."""
    found = []
    for coordinate in itertools.product(*(range(size) for size, _ in mesh)):
        box = [(0, n) for n in shape]
        for (size, dim), k in zip(mesh, coordinate, strict=True):
            start, length = box[dim]
            offset, part = chunks(length, size)[k]
            box[dim] = (start + offset, part)
        found.append(tuple(box))
    return found


WORKS = {  # shape, constraint, mesh
    "aligned": [((24, 8), Orthogonal(blocks=3), (3, 0))] * 2,
    "cut evenly": [((12, 12), Orthogonal(), (4, 0))] * 3,
    "3 gates on 4 ranks": [((24, 8), Orthogonal(blocks=3), (4, 0))] * 2,
    "columns": [((24, 8), Orthogonal(blocks=3), (4, 1)), ((8, 24), Orthogonal(blocks=3, dim=1), (4, 1))],
    "uneven and empty": [((10, 12), Orthogonal(blocks=5), (7, 0)), ((3, 3), Orthogonal(), (7, 0))],
    "some blocks": [((24, 8), Orthogonal(blocks=3, which=(0, 2)), (5, 0)), ((10, 4), UnitNorm(), (5, 0))],
    "two mesh dimensions": [
        ((24, 8), Orthogonal(blocks=3), (3, 0), (2, 1)),
        ((24, 8), Orthogonal(blocks=6), (3, 0), (2, 0)),
    ],
    "a batch of matrices": [
        ((6, 4, 5), Orthogonal(flatten=False), (4, 0)),
        ((6, 4, 5), Orthogonal(flatten=False), (4, 1)),
    ],
}


@pytest.fixture(params=WORKS)
def work(request):
    return [(SimpleNamespace(shape=shape), how, boxes(shape, *mesh)) for shape, how, *mesh in WORKS[request.param]]


def overlap(a, b):
    return math.prod(max(min(sum(x), sum(y)) - max(x[0], y[0]), 0) for x, y in zip(a, b, strict=True))


def expected(work):
    """The definition, rank by rank: a whole block stays, others go to the least loaded rank, the largest first."""
    ranks = len(work[0][2])
    loads, cut, found = [0.0] * ranks, [], []
    for parameter, constraint, all_boxes in work:
        dim, parts = units(constraint.layouts(parameter.shape), parameter.shape)
        full = [
            tuple((u.start, u.length) if d == dim else (0, n) for d, n in enumerate(parameter.shape)) for u in parts
        ]
        owners = [
            next((rank for rank, box in enumerate(all_boxes) if overlap(box, block) == overlap(block, block)), None)
            for block in full
        ]
        for unit, owner in zip(parts, owners, strict=True):
            if owner is not None:
                loads[owner] += unit.cost
        found.append(owners)
        runs = _runs_without_owner(SimpleNamespace(units=parts, owners=owners), ranks)
        cut += [(sum(parts[k].cost for k in run), run, owners, all_boxes, full) for run in list(runs)]
    for cost, run, owners, all_boxes, full in sorted(cut, key=lambda entry: -entry[0]):
        held = [sum(overlap(box, full[k]) for k in run) for box in all_boxes]
        owner = min(range(ranks), key=lambda rank: (loads[rank], -held[rank], rank))
        loads[owner] += cost
        for k in run:
            owners[k] = owner
    return found, loads


def test_owners_are_those_of_the_definition(work):
    loads = [0.0] * len(work[0][2])
    owners = [ownership.owners for ownership in assign_owners(work, loads)]
    assert (owners, loads) == expected(work)


def test_every_entry_of_a_block_reaches_its_owner(work):
    """Pieces are placed as the collective calls would place them; what one rank sends is what the other receives."""
    ranks = len(work[0][2])
    ownerships = assign_owners(work, [0.0] * ranks)
    exchanges = [Exchange(ownerships, None, ranks, rank) for rank in range(ranks)]
    for k, ownership in enumerate(ownerships):
        value = torch.arange(math.prod(ownership.shape)).view(ownership.shape)
        shards = [value[tuple(slice(a, a + n) for a, n in box)] for box in ownership.boxes]
        for owner, exchange in enumerate(exchanges):
            part = torch.full(ownership.part_shape(owner), -1)
            for holder, other in enumerate(exchanges):
                own = exchange.own if holder == owner else exchange.received[holder]
                sent = exchange.own if holder == owner else other.sent[owner]
                assert own == sent
                for piece in own:
                    if piece.member == k:
                        part[piece.part] = shards[holder][piece.shard]
            runs = [value.narrow(ownership.dim, *interval) for interval in ownership.owned(owner)]
            assert torch.equal(part, torch.cat(runs, ownership.dim) if runs else part)
