"""A sharded weight takes the same steps as the whole one does on one rank, whatever its shards are."""

import functools
import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from manifold_opt import orthogonality_error

from ..helpers import each, pairs, rounding
from .layouts import LAYOUTS, OPTIMIZERS, OPTIONS, PLACES, build, optimizer, train, whole
from .workers import run

DTYPES = [torch.float32, torch.bfloat16]
RETRACTIONS = ["orthographic", "polar", "qr", "cayley"]


def trained(layout, world, rule, first, dtype):
    """Weights after 20 steps, their masters and their errors. Each weight has a retraction of its own."""
    net = build(layout, dtype)
    if world:
        LAYOUTS[layout].shard(net, world)
        assert all(isinstance(p, DTensor) for p in net.parameters())
    groups = [{"params": [p]} for p in net.parameters()]
    for k, group in enumerate(groups if rule != "Muon" else ()):
        group["retraction"] = RETRACTIONS[(first + k) % 4]
    opt = optimizer(rule, groups)
    train(net.parameters(), opt, 20)
    masters = []
    if dtype == torch.bfloat16:
        masters = [whole(state["master"]) for state in opt.state_dict()["state"].values()]
    return [whole(p) for p in net.parameters()], masters, list(orthogonality_error(net).values())


single = functools.cache(functools.partial(trained, world=0))


def compare(layout, world, rule, first, dtype):
    weights, masters, _ = single(layout, rule=rule, first=first, dtype=dtype)
    ranks = run(world, trained, layout, world, rule, first, dtype)
    for found, found_masters, errors in ranks:
        for one, other in zip(masters or weights, found_masters or found, strict=True):
            # Rounding of products of matrices, which a block meets in batches of other sizes.
            atol = 8 * torch.finfo(one.dtype).eps * math.sqrt(max(one.shape))
            torch.testing.assert_close(other, one, rtol=0, atol=atol)
        for w, master in zip(found, found_masters, strict=False):
            assert torch.equal(w, master.to(dtype))
        for w, error in zip(found, errors, strict=True):
            assert error < rounding(w)
        assert all(map(torch.equal, found, ranks[0][0]))


@pytest.mark.parametrize("second", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_weights_are_those_of_one_rank(layout, second):
    """Every layout with two optimizers; these, numbers of ranks, dtypes and retractions of weights take turns."""
    turn = list(LAYOUTS).index(layout)
    worlds = LAYOUTS[layout].worlds
    rule = list(OPTIMIZERS)[(turn + 2 * second) % 4]
    compare(layout, worlds[-1 - second * (len(worlds) > 1)], rule, turn % 4, DTYPES[(turn // 4 + second) % 2])


@pytest.mark.slow
@pairs(place=PLACES, rule=OPTIMIZERS, first=range(4), dtype=DTYPES)
def test_the_weights_are_those_of_one_rank_on_any_number_of_ranks(place, rule, first, dtype):
    compare(*PLACES[place], rule, first, dtype)


def unmarked(layout, rule):
    """Unmarked weights after 5 steps beside marked ones, and those of torch.optim."""
    found = []
    for kind in (OPTIMIZERS[rule], getattr(torch.optim, rule)):
        net = build(layout)
        net.append(nn.Linear(8, 8, bias=rule != "Muon"))
        with torch.no_grad():
            [nn.init.normal_(p, generator=torch.Generator().manual_seed(0)) for p in net[-1].parameters()]
        world = LAYOUTS[layout].worlds[-1]
        LAYOUTS[layout].shard(net, world)
        parameters = net.parameters() if kind is OPTIMIZERS[rule] else net[-1].parameters()
        opt = kind(parameters, **OPTIONS[rule])
        train(net.parameters(), opt, 5)
        found.append([whole(p) for p in net[-1].parameters()])
    return found


@each(layout=LAYOUTS, rule=OPTIMIZERS)
def test_unmarked_weights_are_those_of_torch(layout, rule):
    for ours, others in run(LAYOUTS[layout].worlds[-1], unmarked, layout, rule):
        assert all(map(torch.equal, ours, others))
