"""Initialization with orthogonal blocks, in the style of torch.nn.init.

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
from .linalg.matrices import check_whole
from .linalg.nearest import check_determinant, determinant
from .linalg.precision import working_dtype
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
    r"""Fill a tensor in place with orthogonal blocks, each ``gain`` times a point of the Stiefel manifold.

    Args:
        tensor: ``(blocks * p, n)``; more dimensions are flattened to (first, rest). It need not be marked. Complex
            tensors get unitary blocks.
        blocks: number of equal blocks stacked along dim 0, or the rows of each. Defaults to those of the mark, else 1.
        gain: singular values of every block. Defaults to that of the mark, else 1.
        scheme: distribution of each block.

            - ``"haar"``: uniform over the orthogonal (as ``torch.nn.init.orthogonal_``) or unitary matrices.
            - ``"henaff"``: 2 x 2 rotations along the diagonal, by angles uniform in :math:`[-\pi, \pi)`
              (Henaff, Szlam & LeCun 2016); lets orthogonal RNNs learn long delays.
            - ``"cayley"``: as ``"henaff"``, with angles uniform in :math:`[0, \pi/2)`, the Cayley transform of
              skew blocks :math:`\sqrt{(1-\cos t)/(1+\cos t)}` (Helfrich, Willmott & Ye 2018).
            - ``"identity"``: ones on the diagonal (Le, Jaitly & Hinton 2015).

            An odd last row has a one on the diagonal. A rectangular block gets the leading rows or columns of a
            square one. Only ``"haar"`` has complex entries.
        det: sign of the determinant, for real square blocks: 1 for rotations, -1 for the other component. ``"haar"``
            is uniform over the component. The other schemes draw rotations by default.
        generator: source of random numbers, as in torch.nn.init.

    Returns:
        The same tensor.

    Raises:
        ValueError: the scheme is unknown, ``blocks`` does not divide dim 0, the gain is not above 0, the blocks cannot
            have the determinant, or an argument contradicts the tensor's mark. The tensor is unchanged then.

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
    constraint = _resolve_constraint(tensor, blocks, gain, scheme)
    layouts = constraint.layouts(tensor.shape)
    views = [get_points(layout, tensor.detach()) for layout in layouts]
    for view in views:
        if det is not None:
            check_determinant("init.orthogonal_", det, view)
    for layout, view in zip(layouts, views, strict=True):
        count, p, n = view.shape
        drawn = _SCHEMES[scheme](count, p, n, working_dtype(view.dtype), generator)
        if det is not None:
            drawn[:, -1] *= det * determinant(drawn)[:, None]
        set_points_(layout, tensor.detach(), ..., drawn.mul_(constraint.gain).to(view))
    return tensor


def _resolve_constraint(
    tensor: Tensor, blocks: int | Sequence[int] | None, gain: float | None, scheme: str
) -> Orthogonal:
    """Return the constraint given by the arguments and the mark; raise a ValueError if they contradict each other."""
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
    """Return the leading ``p`` rows of block diagonals of 2 x 2 rotations by ``angles``, ``(count, n // 2)``."""
    rotations = torch.eye(n, dtype=angles.dtype, device=angles.device).repeat(len(angles), 1, 1)
    even = torch.arange(0, n - 1, 2, device=angles.device)
    rotations[:, even, even] = rotations[:, even + 1, even + 1] = angles.cos()
    rotations[:, even + 1, even] = angles.sin()
    rotations[:, even, even + 1] = -angles.sin()
    return rotations[:, :p]


def _uniform(count: int, size: int, generator: Generator | None) -> Tensor:
    return torch.rand(count, size, dtype=torch.float64, device=_device(generator), generator=generator)


def _device(generator: Generator | None) -> torch.device:
    """Return the generator's device; by default the CPU, so that values are the same on every machine."""
    return torch.device("cpu") if generator is None else generator.device
