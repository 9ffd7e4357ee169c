"""What a step works with, and which gradients it takes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import point_norm
from .options import largest_gradient
from .products import host_can_branch
from .room import Room
from .tally import Tally


class Desk(NamedTuple):
    """What a step works with: workspaces, counts, which weight decay, what a GradScaler left to a fused step."""

    room: Room
    tally: Tally
    decoupled: bool
    grad_scale: Tensor | None
    found_inf: Tensor | None


def sound_gradient(g: Tensor, dims: int, desk: Desk) -> tuple[Tensor, Tensor | None]:
    """The gradient, and which points of it, ``(B, 1, ..)``, are finite and have squares that are; others set to zero.

    None where the host can see that all are.
    """
    limit = largest_gradient(g.dtype)
    if host_can_branch(g) and float(torch.linalg.vector_norm(g)) <= limit:
        return g, None
    sound = point_norm(g, dims, keepdim=True) <= limit  # a NaN is not
    desk.tally.add("skipped_blocks", ~sound)
    if desk.found_inf is not None:  # seen above where it can be read: then there is nothing to do here
        sound = sound & (desk.found_inf.to(g.device) == 0)
    return torch.where(sound, g, 0), sound
