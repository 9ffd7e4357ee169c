"""Wide and tall matrices, their symmetric and skew parts, and double precision."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)  # of points


def is_tall(x: Tensor) -> bool:
    """Whether the matrices of ``x`` have more rows than columns."""
    return x.shape[-2] > x.shape[-1]


def wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Let a function written for wide matrices take tall ones too, as transposes of wide ones.

    Without a conjugate, also where they are complex: orthonormal columns are the rows of the transpose.
    """

    @functools.wraps(function)
    def on_wide(*matrices: Tensor, **options: object) -> Tensor:
        if not is_tall(matrices[0]):
            return function(*matrices, **options)
        return function(*(m.mT for m in matrices), **options).mT

    return on_wide


def sym(a: Tensor) -> Tensor:
    r"""Symmetric part :math:`(A + A^\top)/2`, Hermitian if complex."""
    return 0.5 * (a + a.mH)


def skew(a: Tensor) -> Tensor:
    r"""Skew-symmetric part :math:`(A - A^\top)/2`, skew-Hermitian if complex."""
    return (a - a.mH) / 2


def float64(x: Tensor) -> Tensor:
    """``x`` in float64, or complex128, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).to(in_double(x.dtype))


def in_double(dtype: torch.dtype) -> torch.dtype:
    """The dtype of double precision, real or complex as ``dtype`` is."""
    return torch.promote_types(dtype, torch.float64)


def check_whole(name: str, x: Tensor) -> None:
    """Raise a ValueError if ``x`` is a DTensor: ``float`` and ``bool`` of one see the part of this process only."""
    if hasattr(x, "placements"):
        raise ValueError(f"{name}: got a DTensor, of which every process has a part; give it x.full_tensor().")


def error_at_rounding(p: int, n: int, dtype: torch.dtype) -> float:
    """Largest :func:`error` that still counts as orthogonal to rounding in ``dtype``.

    Backward stable algorithms leave a few units of roundoff a row, and rows add up as their root. Measuring it in
    float64 adds the rounding of sums of n products. In bfloat16 and float16 nothing is computed: their entries are
    rounded once, and such errors add up as a random walk does.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return torch.finfo(dtype).eps * (1 + 0.4 * min(p, n) ** 0.5)
    measured = torch.finfo(torch.float64).eps * max(p, n) ** 0.5
    return (8 * torch.finfo(dtype).eps + measured) * min(p, n) ** 0.5
