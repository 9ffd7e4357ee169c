"""What holds for every test and doctest."""

import gc
import importlib.util

import pytest
import torch

DOCTESTS = {  # that need a package of the extras
    "peft": ("manifold_opt.constraints.lora.",),
    "transformers": ("manifold_opt.rotations.insertion.insert_rotations",),
}

# The matrices here are small: one thread is faster, and does not wait for another on a busy machine.
torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported and collected stays: nobody has to look at it again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs torch.optim.Muon where torch, before 2.9, has none, and doctests of extras that are missing."""
    if not hasattr(torch.optim, "Muon"):
        for item in items:
            if "Muon" in item.name or "muon.md" in item.name:
                item.add_marker(pytest.mark.skip(reason="torch.optim.Muon came with torch 2.9"))
    for package, doctests in DOCTESTS.items():
        if importlib.util.find_spec(package) is None:
            for item in items:
                if item.name.startswith(doctests):
                    item.add_marker(pytest.mark.skip(reason=f'{package} is not installed: pip install ".[finetune]"'))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Every test and doctest draws the same numbers, whatever ran before it and in whichever process."""
    torch.manual_seed(0)
