"""Whole weights in every process: DistributedDataParallel and ZeroRedundancyOptimizer."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from manifold_opt import Adam, Muon, mark_recurrent, orthogonality_error

from ..helpers import gaussian
from .workers import run


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


def trained(kind, world):
    """Weights after 6 steps on a batch of which every rank has its share."""
    torch.manual_seed(0)
    net = Net()
    mark_recurrent(net)
    model = DistributedDataParallel(net) if world else net
    if kind == "zero":
        opt = ZeroRedundancyOptimizer(model.parameters(), optimizer_class=Adam, lr=0.02)
    elif kind == "Muon":
        opt = Muon([p for p in model.parameters() if p.ndim == 2], lr=0.02)
    else:
        opt = Adam(model.parameters(), lr=0.02)
    for step in range(6):
        opt.zero_grad()
        batch = gaussian(5, 8, 6, dtype=torch.float32, seed=step)
        if world:
            batch = batch.chunk(world, 1)[dist.get_rank()]
        model(batch).square().mean().backward()
        opt.step()
    return [p.detach().clone() for p in net.parameters()], orthogonality_error(net)


@pytest.mark.parametrize("kind", ["Adam", "zero", "Muon"])
@pytest.mark.parametrize("world", [2, 4])
def test_ranks_keep_the_same_bits(kind, world):
    weights, _ = trained("Adam" if kind == "zero" else kind, 0)
    ranks = run(world, trained, kind, world)
    for found, errors in ranks:
        assert all(map(torch.equal, found, ranks[0][0]))
        assert max(errors.values()) < 1e-5
        for one, other in zip(weights, found, strict=True):
            assert math.isfinite(float(one.sum()))
            # The mean over ranks is rounded; Adam divides that by the size of the gradient.
            torch.testing.assert_close(other, one, rtol=0, atol=1e-3 if kind == "Muon" else 1e-5)
