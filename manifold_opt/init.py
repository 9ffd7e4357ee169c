"""Orthogonal starts, block by block, with a gain.

The name ends where torch.nn.init's would: ``init.orthogonal_``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Generator, Tensor

from .blocks import block_view
from .constraint import constraint_of
from .stiefel import random

T = TypeVar("T", bound=Tensor)


@torch.no_grad()
def orthogonal_(
    tensor: T,
    blocks: int | None = None,
    gain: float | None = None,
    scheme: str = "haar",
    *,
    generator: Generator | None = None,
) -> T:
    r"""Fill a tensor in place with orthogonal blocks, ``gain`` times a point of the Stiefel manifold each.

    Args:
        tensor: ``(blocks * p, n)``, or more dimensions, flattened to (first, rest). It need not be marked.
        blocks: number of equal blocks stacked along dim 0. Default: those of its mark, else 1.
        gain: singular values of every block. Default: that of its mark, else 1.
        scheme: how each block is drawn.

            - ``"haar"``: uniformly from all orthogonal matrices (as torch.nn.init.orthogonal_).
            - ``"henaff"``: 2 x 2 rotations along the diagonal, by angles uniform in :math:`[-\pi, \pi)`
              (Henaff, Szlam & LeCun 2016). What makes orthogonal RNNs learn long delays.
            - ``"cayley"``: the same with angles uniform in :math:`[0, \pi/2)`, the Cayley transform of
              skew blocks :math:`\sqrt{(1-\cos t)/(1+\cos t)}` (Helfrich, Willmott & Ye 2018).
            - ``"identity"``: ones on the diagonal (Le, Jaitly & Hinton 2015).

            An odd last row has a one on the diagonal; of a rectangular block these are the leading rows
            or columns.
        generator: source of random numbers, as in torch.nn.init.

    Returns:
        The same tensor.

    Raises:
        ValueError: unknown scheme, blocks that do not divide dim 0, a gain that is not above 0, or
            arguments that contradict the tensor's mark. Nothing has been written then.

    >>> import torch
    >>> from manifold_opt import init, orthogonality_error
    >>> gru = torch.nn.GRU(4, 8)
    >>> weight = init.orthogonal_(gru.weight_hh_l0, blocks=3, scheme="henaff")
    >>> orthogonality_error(weight.unflatten(0, (3, 8))) < 1e-6
    True
    """
    mark = constraint_of(tensor)
    if scheme not in _SCHEMES:
        raise ValueError(f"init.orthogonal_: scheme must be one of {', '.join(_SCHEMES)}, got {scheme!r}.")
    if mark is not None and (blocks not in (None, mark.blocks) or gain not in (None, mark.gain)):
        raise ValueError(
            f"init.orthogonal_: blocks={blocks}, gain={gain} contradict the mark {mark}; leave them out to follow "
            "it, or unmark the parameter first."
        )
    blocks = blocks if blocks is not None else mark.blocks if mark else 1
    gain = gain if gain is not None else mark.gain if mark else 1.0
    dim = mark.dim if mark else 0
    if tensor.ndim < 2 or not tensor.is_floating_point():
        raise ValueError(
            "init.orthogonal_: needs a real floating-point tensor of at least 2 dimensions, got "
            f"{tuple(tensor.shape)} of {tensor.dtype}."
        )
    if blocks < 1 or tensor.shape[dim] % blocks:
        raise ValueError(
            f"init.orthogonal_: blocks={blocks} must divide dim {dim} of shape {tuple(tensor.shape)}. nn.GRU has 3 "
            "gate blocks, nn.LSTM 4."
        )
    if not 0 < gain < math.inf:
        raise ValueError(f"init.orthogonal_: gain must be finite and above 0, got {gain}.")
    view = block_view(tensor.detach(), blocks, dim)
    count, p, n = view.shape
    view.copy_(gain * _SCHEMES[scheme](count, p, n, generator).to(view))
    return tensor


def _haar(count: int, p: int, n: int, generator: Generator | None) -> Tensor:
    return random(count, p, n, dtype=torch.float64, device=_device(generator), generator=generator)


def _henaff(count: int, p: int, n: int, generator: Generator | None) -> Tensor:
    return _rotations((2 * _uniform(count, n // 2, generator) - 1) * math.pi, p, n)


def _cayley(count: int, p: int, n: int, generator: Generator | None) -> Tensor:
    return _rotations(_uniform(count, n // 2, generator) * math.pi / 2, p, n)


def _identity(count: int, p: int, n: int, generator: Generator | None) -> Tensor:
    return torch.eye(p, n, dtype=torch.float64, device=_device(generator)).repeat(count, 1, 1)


_SCHEMES: dict[str, Callable[[int, int, int, Generator | None], Tensor]] = {
    "haar": _haar,
    "henaff": _henaff,
    "cayley": _cayley,
    "identity": _identity,
}


def _rotations(angles: Tensor, p: int, n: int) -> Tensor:
    """The leading ``p`` rows of n x n block diagonals of 2 x 2 rotations by ``angles``, ``(count, n // 2)``."""
    turned = torch.eye(n, dtype=angles.dtype, device=angles.device).repeat(len(angles), 1, 1)
    even = torch.arange(0, n - 1, 2, device=angles.device)
    turned[:, even, even] = turned[:, even + 1, even + 1] = angles.cos()
    turned[:, even + 1, even] = angles.sin()
    turned[:, even, even + 1] = -angles.sin()
    return turned[:, :p]


def _uniform(count: int, size: int, generator: Generator | None) -> Tensor:
    return torch.rand(count, size, dtype=torch.float64, device=_device(generator), generator=generator)


def _device(generator: Generator | None) -> torch.device:
    """Where to draw: on the generator's device; float64 on the CPU otherwise, the same on every machine."""
    return torch.device("cpu") if generator is None else generator.device
