"""The task orthogonal recurrence is for, with the defaults: benchmarks/copying.py at a delay of 100."""

import importlib.util
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_copying_memory_is_learned_in_750_steps(seed):
    path = Path(__file__).parents[1] / "benchmarks" / "copying.py"
    spec = importlib.util.spec_from_file_location("copying_memory", path)
    copying = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copying)
    steps, error, _ = copying.steps_to_learn("Adam (default)", delay=100, seed=seed, limit=750)
    assert steps is not None
    assert error < 1e-6 * 128**0.5
