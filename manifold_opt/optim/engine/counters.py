"""Counters of skipped blocks and shortened steps, which are read only on request."""

from __future__ import annotations

import torch
from torch import Tensor

from ...linalg.products import host_can_branch

NAMES = ("skipped_blocks", "clamped_steps")


class Counters:
    """Running counts: Python numbers if values can be read, otherwise a tensor on each device.

    >>> import torch
    >>> from manifold_opt.optim.engine.counters import Counters
    >>> counters = Counters()
    >>> counters.count(skipped=torch.tensor([True, False, True]))
    >>> counters.total("skipped_blocks")
    2.0
    """

    def __init__(self) -> None:
        self._host = [0, 0]
        self._device: dict[torch.device, Tensor] = {}

    def prepare(self, device: torch.device) -> None:
        """Allocate the counts of a device before a graph is traced or captured."""
        if device not in self._device:
            self._device[device] = torch.zeros(2, dtype=torch.int64, device=device)

    def count(self, *, skipped: Tensor | None = None, clamped: Tensor | None = None) -> None:
        """Add the number of true entries of each mask: of skipped blocks, and of steps that were shortened."""
        masks = [(k, mask) for k, mask in enumerate((skipped, clamped)) if mask is not None]
        first = masks[0][1]
        if host_can_branch(first):
            for k, mask in masks:
                self._host[k] += int(mask.sum())
            return
        self.prepare(first.device)
        counts = self._device[first.device]
        if len(masks) == 2:
            counts.add_(torch.stack([mask for _, mask in masks]).flatten(1).sum(1))
        else:
            counts[masks[0][0]].add_(first.sum())

    def add(self, counts: dict[str, float]) -> None:
        """Add counts by name."""
        self._host = [own + int(counts[name]) for own, name in zip(self._host, NAMES, strict=True)]

    def total(self, name: str) -> float:
        """Return the current count. Synchronizes with the devices."""
        k = NAMES.index(name)
        return float(self._host[k]) + sum(float(counts[k]) for counts in self._device.values())
