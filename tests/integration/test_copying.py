"""The task orthogonal recurrence is for, with the defaults: benchmarks/copying.py at a delay of 100."""

import pytest

from ..helpers import benchmark


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copying_memory_is_learned_in_750_steps(seed):
    copying = benchmark("copying")
    run = copying.learn(copying.RUNS["manifold_opt.Adam"], delay=100, seed=seed, limit=750)
    assert run.learned is not None
    assert run.error < 1e-6 * 128**0.5
