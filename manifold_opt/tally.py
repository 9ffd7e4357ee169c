"""Counts of what a step has skipped or shortened: kept where they arise, read only when somebody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from .products import host_can_branch

NAMES = ("skipped_blocks", "clamped_steps")


class Tally:
    """Running counts by name: numbers where the host may look, tensors on the device where it may not.

    >>> import torch
    >>> from manifold_opt.tally import Tally
    >>> tally = Tally()
    >>> tally.add("skipped_blocks", torch.tensor([True, False, True]))
    >>> tally.total("skipped_blocks")
    2.0
    """

    def __init__(self) -> None:
        self._seen = dict.fromkeys(NAMES, 0)
        self._unseen: dict[tuple[str, torch.device], Tensor] = {}

    def prepare(self, device: torch.device) -> None:
        """Make room for the counts of a device, before a graph of it is traced or captured."""
        for name in NAMES:
            if (name, device) not in self._unseen:
                self._unseen[name, device] = torch.zeros((), dtype=torch.int64, device=device)

    def add(self, name: str, which: Tensor) -> None:
        """Count what is true in ``which``."""
        if host_can_branch(which):
            self._seen[name] += int(which.sum())
        else:
            self.prepare(which.device)
            self._unseen[name, which.device].add_(which.sum())

    def total(self, name: str) -> float:
        """The count so far; waits for the devices."""
        return float(self._seen[name]) + sum(float(x) for (kind, _), x in self._unseen.items() if kind == name)
