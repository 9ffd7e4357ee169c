"""The processes that the tests of this folder run on."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from . import workers
from .workers import RankError, run


def rank_and_sum(x):
    total = x * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return dist.get_rank(), total, os.getpid()


@pytest.mark.parametrize("world", [1, 2, 4])
def test_every_rank_returns_its_result_and_is_kept(world):
    first = run(world, rank_and_sum, torch.ones(2))
    assert [rank for rank, _, _ in first] == list(range(world))
    assert all(torch.equal(total, torch.full((2,), world * (world + 1) / 2)) for _, total, _ in first)
    assert [pid for _, _, pid in run(world, rank_and_sum, torch.ones(2))] == [pid for _, _, pid in first]


def one_rank(does):
    if dist.get_rank() == 1:
        if does == "raises":
            raise ValueError("of rank 1")
        if does == "sleeps":
            time.sleep(60)
        os._exit(1)
    dist.barrier()


@pytest.mark.parametrize(
    ("does", "says"), [("raises", "ValueError: of rank 1"), ("sleeps", "no answer in time"), ("dies", "has ended")]
)
def test_a_rank_that_fails_fails_the_test_and_no_other(does, says, monkeypatch):
    monkeypatch.setattr(workers, "GRACE", 0.1)
    start = time.monotonic()
    with pytest.raises(RankError, match=says):
        run(2, one_rank, does, timeout=1.0 if does == "sleeps" else 20.0)
    assert time.monotonic() - start < 10
    assert [rank for rank, _, _ in run(2, rank_and_sum, torch.ones(1))] == [0, 1]
