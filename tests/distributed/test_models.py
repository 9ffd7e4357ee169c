"""Models through the forward and backward pass of FSDP2 and tensor parallelism."""

import math

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from manifold_opt import (
    Adam,
    check,
    constraint_of,
    mark_attention,
    mark_orthogonal,
    mark_recurrent,
    orthogonality_error,
)

from ..helpers import gaussian
from .layouts import hybrid, rows, whole
from .workers import mesh, run


class Recurrent(nn.Module):
    def __init__(self, kind=nn.GRU):
        super().__init__()
        self.rnn, self.head = kind(6, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][-1])


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 4), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0][-1])


def stack():
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 3))


def mark_stack(net):
    mark_orthogonal(net, "0.weight")
    mark_orthogonal(net, "2.weight", blocks=3)


MODELS = {
    "linear": (stack, mark_stack, (7, 6)),
    "GRU": (Recurrent, mark_recurrent, (5, 7, 6)),
    "LSTM": (lambda: Recurrent(nn.LSTM), mark_recurrent, (5, 7, 6)),
    "attention": (Attention, mark_attention, (5, 7, 8)),
}


def each_layer(net, world, **options):
    for child in net.children():
        if any(True for _ in child.parameters()):
            fully_shard(child, mesh=mesh(world), **options)
    fully_shard(net, mesh=mesh(world), **options)


def parallel(net, world):
    parallelize_module(net, mesh(world), {"0": ColwiseParallel(), "2": RowwiseParallel()})


def parallel_rows(net, world):
    both = mesh(2, world // 2)
    parallelize_module(net, both["shard"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    fully_shard(net, mesh=both["replicate"])


WAYS = {
    "whole": rows,
    "layers": each_layer,
    "kept": lambda net, world: each_layer(net, world, reshard_after_forward=False),
    "offloaded": lambda net, world: each_layer(net, world, offload_policy=CPUOffloadPolicy(pin_memory=False)),
    "hybrid": hybrid,
    "parallel": parallel,
    "parallel and rows": parallel_rows,
}


def trained(model, way, world, when, steps=6):
    build, mark, shape = MODELS[model]
    torch.manual_seed(0)
    net = build()
    if when == "before":
        mark(net)
    if world:
        WAYS[way](net, world)
        assert any(isinstance(p, DTensor) for p in net.parameters())
    if when == "after":
        mark(net)
    opt = Adam(net.parameters(), lr=0.02)
    losses = []
    for step in range(steps):
        opt.zero_grad()
        loss = net(gaussian(*shape, dtype=torch.float32, seed=step)).square().mean()
        loss.backward()
        losses.append(float(loss.detach()))
        if "parallel" not in way:  # torch does not clip gradients on several meshes together
            losses.append(float(whole(nn.utils.clip_grad_norm_(net.parameters(), 0.05))))
        opt.step()
    assert check(net, opt) == []
    return [whole(p) for p in net.parameters()], losses, constraint_of(net), orthogonality_error(net)


@pytest.mark.parametrize(
    ("model", "way", "world", "when"),
    [
        ("linear", "whole", 4, "before"),
        ("linear", "kept", 2, "after"),
        ("linear", "offloaded", 2, "before"),
        ("linear", "hybrid", 4, "after"),
        ("linear", "parallel", 2, "before"),
        ("linear", "parallel", 4, "after"),
        ("linear", "parallel and rows", 4, "before"),
        ("GRU", "whole", 2, "before"),
        ("GRU", "layers", 4, "after"),
        ("LSTM", "layers", 4, "before"),
        ("attention", "whole", 2, "after"),
        ("attention", "layers", 4, "before"),
    ],
)
def test_a_model_trains_as_on_one_rank(model, way, world, when):
    """Every rank has the same batch; the gradients, reduced in another order, differ by rounding."""
    weights, losses, marks, _ = trained(model, way, 0, when)
    assert marks
    for found, found_losses, found_marks, errors in run(world, trained, model, way, world, when):
        assert {name: found_marks[name] for name in marks} == marks
        torch.testing.assert_close(torch.tensor(found_losses), torch.tensor(losses), rtol=1e-4, atol=1e-6)
        for one, other in zip(weights, found, strict=True):
            # Adam divides the rounding of gradients by their size.
            torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
        assert max(errors.values()) < 1e-5


def trained_in_low_precision(world):
    torch.manual_seed(0)
    net = stack()
    mark_stack(net)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    each_layer(net, world, mp_policy=policy)
    opt = Adam(net.parameters(), lr=0.02)
    losses = []
    for step in range(6):
        opt.zero_grad()
        out = net(gaussian(7, 6, dtype=torch.float32, seed=step))
        assert out.dtype == torch.bfloat16
        loss = out.float().square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in net.parameters())
    return losses, max(orthogonality_error(net).values()), check(net, opt)


def test_a_mixed_precision_policy():
    """Weights stay float32 and orthogonal in float32; gradients are those of bfloat16."""
    _, exact, _, _ = trained("linear", "parallel", 0, "before")
    for losses, error, problems in run(4, trained_in_low_precision, 4):
        assert problems == []
        assert error < 1e-5
        assert losses[0] == pytest.approx(exact[0], rel=0.05)
        assert all(math.isfinite(loss) for loss in losses)
