"""Counters of skipped blocks and shortened steps, which are read only on request."""

from __future__ import annotations

import torch
from torch import Tensor

from ...linalg.products import host_can_branch

NAMES = ("skipped_blocks", "clamped_steps")


class Counters:
    """Running counts by name: Python numbers if values can be read, otherwise tensors on the device.

    >>> import torch
    >>> from manifold_opt.optim.engine.counters import Counters
    >>> counters = Counters()
    >>> counters.count("skipped_blocks", torch.tensor([True, False, True]))
    >>> counters.total("skipped_blocks")
    2.0
    """

    def __init__(self) -> None:
        self._host = dict.fromkeys(NAMES, 0)
        self._device: dict[tuple[str, torch.device], Tensor] = {}

    def prepare(self, device: torch.device) -> None:
        """Allocate the counters of a device before a graph is traced or captured."""
        for name in NAMES:
            if (name, device) not in self._device:
                self._device[name, device] = torch.zeros((), dtype=torch.int64, device=device)

    def count(self, name: str, mask: Tensor) -> None:
        """Add the number of true entries of ``mask``."""
        if host_can_branch(mask):
            self._host[name] += int(mask.sum())
        else:
            self.prepare(mask.device)
            self._device[name, mask.device].add_(mask.sum())

    def total(self, name: str) -> float:
        """Return the current count. Synchronizes with the devices."""
        return float(self._host[name]) + sum(float(x) for (kind, _), x in self._device.items() if kind == name)
