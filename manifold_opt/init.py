"""Orthogonal starts, block by block, with a gain.

The name ends where torch.nn.init's would: ``init.orthogonal_``.

>>> import torch
>>> from manifold_opt import init
>>> init.orthogonal_(torch.empty(4, 2), blocks=2, scheme="identity")
tensor([[1., 0.],
        [0., 1.],
        [1., 0.],
        [0., 1.]])
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Generator, Tensor

from .constraints.tag import constraint_of
from .linalg.matrices import check_whole, in_double
from .linalg.newton_schulz import check_determinant, determinant
from .manifolds import Orthogonal
from .manifolds.layout import get_points, overlap_problem, set_points_
from .stiefel.geometry import random

T = TypeVar("T", bound=Tensor)


@torch.no_grad()
def orthogonal_(
    tensor: T,
    blocks: int | Sequence[int] | None = None,
    gain: float | None = None,
    scheme: str = "haar",
    *,
    det: int | None = None,
    generator: Generator | None = None,
) -> T:
    r"""Fill a tensor in place with orthogonal blocks, ``gain`` times a point of the Stiefel manifold each.

    Args:
        tensor: ``(blocks * p, n)``, or more dimensions, flattened to (first, rest). It need not be marked. A complex
            one gets unitary blocks.
        blocks: number of equal blocks stacked along dim 0, or the rows of each. Default: those of its mark, else 1.
        gain: singular values of every block. Default: that of its mark, else 1.
        scheme: how each block is drawn.

            - ``"haar"``: uniformly from all orthogonal matrices (as ``torch.nn.init.orthogonal_``), or unitary ones.
            - ``"henaff"``: 2 x 2 rotations along the diagonal, by angles uniform in :math:`[-\pi, \pi)`
              (Henaff, Szlam & LeCun 2016). What makes orthogonal RNNs learn long delays.
            - ``"cayley"``: the same with angles uniform in :math:`[0, \pi/2)`, the Cayley transform of
              skew blocks :math:`\sqrt{(1-\cos t)/(1+\cos t)}` (Helfrich, Willmott & Ye 2018).
            - ``"identity"``: ones on the diagonal (Le, Jaitly & Hinton 2015).

            An odd last row has a one on the diagonal; of a rectangular block these are the leading rows
            or columns. All but the first are real.
        det: 1 for rotations, of determinant +1 but for the gain, -1 for the other component; real square blocks only.
            ``"haar"`` is uniform over the component. The other schemes give rotations by themselves.
        generator: source of random numbers, as in torch.nn.init.

    Returns:
        The same tensor.

    Raises:
        ValueError: unknown scheme, blocks that do not divide dim 0, a gain that is not above 0, a determinant that
            the blocks cannot have, or arguments that contradict the tensor's mark. Nothing has been written then.

    >>> import torch
    >>> from manifold_opt import init, orthogonality_error
    >>> gru = torch.nn.GRU(4, 8)
    >>> weight = init.orthogonal_(gru.weight_hh_l0, blocks=3, scheme="henaff")
    >>> orthogonality_error(weight.unflatten(0, (3, 8))) < 1e-6
    True
    >>> rotation = init.orthogonal_(torch.empty(3, 3, dtype=torch.float64), det=1)
    >>> round(float(torch.linalg.det(rotation)), 12)
    1.0
    """
    constraint = _checked(tensor, blocks, gain, scheme)
    parts = constraint.layouts(tensor.shape)
    views = [get_points(part, tensor.detach()) for part in parts]
    for view in views:
        if det is not None:
            check_determinant("init.orthogonal_", det, view)
    for part, view in zip(parts, views, strict=True):
        count, p, n = view.shape
        drawn = _SCHEMES[scheme](count, p, n, in_double(view.dtype), generator)
        if det is not None:
            drawn[:, -1] *= det * determinant(drawn)[:, None]
        set_points_(part, tensor.detach(), ..., constraint.gain * drawn.to(view))
    return tensor


def _checked(tensor: Tensor, blocks: int | Sequence[int] | None, gain: float | None, scheme: str) -> Orthogonal:
    """What the blocks are to be, as the arguments and the mark say, or a ValueError."""
    check_whole("init.orthogonal_", tensor)
    mark = constraint_of(tensor)
    if scheme not in _SCHEMES:
        raise ValueError(f"init.orthogonal_: scheme must be one of {', '.join(_SCHEMES)}, got {scheme!r}.")
    present = mark if isinstance(mark, Orthogonal) else Orthogonal()
    if mark not in (None, present) or (
        mark is not None and (blocks not in (None, present.blocks) or gain not in (None, present.gain))
    ):
        raise ValueError(
            f"init.orthogonal_: blocks={blocks}, gain={gain} contradict the mark {mark}; leave them out to follow "
            "it, or unmark the parameter first."
        )
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"init.orthogonal_: needs a floating-point or complex tensor, got {tensor.dtype}.")
    given: dict[str, Any] = {name: value for name, value in (("blocks", blocks), ("gain", gain)) if value is not None}
    given["blocks"] = _as_tuple(given.get("blocks", present.blocks))
    constraint = replace(present, **given)
    problem = overlap_problem(tensor) or constraint.invalid_reason(tensor)
    if problem:
        raise ValueError(f"init.orthogonal_: the tensor {problem}")
    return constraint


def _as_tuple(blocks: Any) -> Any:
    return tuple(blocks) if isinstance(blocks, Iterable) else blocks


def _haar(count: int, p: int, n: int, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    return random(count, p, n, dtype=dtype, device=_device(generator), generator=generator)


def _henaff(count: int, p: int, n: int, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    return _rotations((2 * _uniform(count, n // 2, generator) - 1) * math.pi, p, n).to(dtype)


def _cayley(count: int, p: int, n: int, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    return _rotations(_uniform(count, n // 2, generator) * math.pi / 2, p, n).to(dtype)


def _identity(count: int, p: int, n: int, dtype: torch.dtype, generator: Generator | None) -> Tensor:
    return torch.eye(p, n, dtype=dtype, device=_device(generator)).repeat(count, 1, 1)


_SCHEMES: dict[str, Callable[[int, int, int, torch.dtype, Generator | None], Tensor]] = {
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
