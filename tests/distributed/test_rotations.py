"""Rotations of a Llama-shaped model under DistributedDataParallel and FSDP2."""

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from manifold_opt import Adam, check, orthogonality_error
from manifold_opt.rotations import RoundToNearest, insert_rotations, merge_rotations, simulate_rounding

from ..helpers import seeded
from ..reference.llama import TOKENS, Llama
from .layouts import whole
from .workers import mesh, run


def sharded(model, world):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh(world))
    return fully_shard(model, mesh=mesh(world))


WRAP = {None: lambda model, _: model, "DDP": lambda model, _: DistributedDataParallel(model), "FSDP2": sharded}


def trained(way, world, steps=4):
    model = Llama()
    bank = insert_rotations(model, residual="haar", heads="haar", generator=seeded())
    simulate_rounding(model, weights=RoundToNearest(8))
    net = WRAP[way](model, world)
    opt = Adam(bank.parameters(), lr=0.01)
    for _ in range(steps):
        opt.zero_grad()
        (net(TOKENS) ** 2).mean().backward()
        opt.step()
    assert check(net, opt) == []
    assert all(isinstance(p, DTensor) is (way == "FSDP2") for p in bank.parameters())
    if way == "FSDP2":
        with pytest.raises(ValueError, match="parameters are sharded"):
            merge_rotations(model)
    return {name: whole(bank[name]) for name in bank}, orthogonality_error(bank)


@pytest.mark.parametrize("way", ["DDP", "FSDP2"])
def test_every_rank_has_the_rotations_of_one_process(way):
    """Every rank has the same batch. Gradients differ by the order of sums, which Adam divides by their size."""
    alone, _ = trained(None, 1)
    for rotations, errors in run(2, trained, way, 2):
        assert max(errors.values()) < 1e-5
        for name, rotation in rotations.items():
            torch.testing.assert_close(rotation, alone[name], atol=1e-4, rtol=0)


def test_a_sharded_bank_is_merged_in_a_model_that_is_whole():
    rotations, _ = run(2, trained, "FSDP2", 2)[0]
    model = Llama()
    before = model(TOKENS)
    insert_rotations(model).load_state_dict(rotations)
    merge_rotations(model)
    assert isinstance(model.lm_head, nn.Linear)
    torch.testing.assert_close(model(TOKENS), before, atol=1e-4, rtol=0)
