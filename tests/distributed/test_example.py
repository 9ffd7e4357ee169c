"""The example on several GPUs, at toy size: the same run on any number of ranks."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from manifold_opt import check, orthogonality_error

from .workers import run

pytestmark = pytest.mark.slow  # .ci/run runs them

EXAMPLES = Path(__file__).parents[2] / "examples"


def load():
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module("several_gpus")


def trained(folder="", first=0, sharded=True):
    """Losses of the steps from ``first`` on; a checkpoint half way, or the one in the folder to begin with."""
    example = load()
    args = example.parse(["--toy"])
    characters, data = example.batches(args, torch.device("cpu"))
    one = example.Run(args, characters, torch.device("cpu"), sharded=sharded, seed=first)
    if first:
        one.load(folder)
    losses = []
    for k in range(first, args.steps):
        losses.append(one.step(*data[k]))
        if folder and not first and k + 1 == args.steps // 2:
            example.dcp.save(one.state(), checkpoint_id=folder)
    assert check(one.model, one.opt) == []
    assert max(orthogonality_error(one.model).values()) < 1e-5
    return losses


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_losses_are_those_of_one_process(world):
    alone = trained(sharded=False)
    for losses in run(world, trained):
        assert losses == pytest.approx(alone, rel=2e-6)  # some rounding errors of float32


@pytest.mark.parametrize(("saved", "loaded"), [(4, 2), (1, 4)])
def test_a_run_goes_on_from_the_checkpoint_of_another_number_of_ranks(saved, loaded, tmp_path):
    losses = run(saved, trained, str(tmp_path))[0]
    for rest in run(loaded, trained, str(tmp_path), len(losses) // 2):
        assert rest == pytest.approx(losses[len(losses) // 2 :], rel=2e-6)
