"""Helpers for batches of matrices: wide and tall ones, symmetric and skew parts, double precision, tolerances."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128)  # of points


def is_tall(x: Tensor) -> bool:
    """Return True if the matrices of ``x`` have more rows than columns."""
    return x.shape[-2] > x.shape[-1]


def wide(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Extend a function for wide matrices to tall ones, which are transposed before and after.

    The transpose is not conjugated, since a matrix has orthonormal columns if its transpose has orthonormal rows.
    """

    @functools.wraps(function)
    def on_wide(*matrices: Tensor, **options: object) -> Tensor:
        if not is_tall(matrices[0]):
            return function(*matrices, **options)
        return function(*(m.mT for m in matrices), **options).mT

    return on_wide


def sym(a: Tensor) -> Tensor:
    r"""Return the symmetric part :math:`(A + A^\top)/2`, Hermitian if complex."""
    return 0.5 * (a + a.mH)


def skew(a: Tensor) -> Tensor:
    r"""Return the skew-symmetric part :math:`(A - A^\top)/2`, skew-Hermitian if complex."""
    return (a - a.mH) / 2


def float64(x: Tensor) -> Tensor:
    """Return ``x`` in float64 or complex128, on the CPU if its device has no double precision."""
    return (x.cpu() if x.device.type == "mps" else x).to(in_double(x.dtype))


def in_double(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for a real dtype, complex128 for a complex one."""
    return torch.promote_types(dtype, torch.float64)


def check_whole(name: str, x: Tensor) -> None:
    """Raise a ValueError if ``x`` is a DTensor, whose ``float`` and ``bool`` read the local shard only."""
    if hasattr(x, "placements"):
        raise ValueError(f"{name}: got a DTensor, of which every process has a part; give it x.full_tensor().")


def error_at_rounding(p: int, n: int, dtype: torch.dtype) -> float:
    """Return the largest :func:`error` of a matrix that counts as orthogonal to rounding in ``dtype``.

    Backward stable algorithms leave a few units of roundoff per row, which add up with the square root of the number of
    rows. Measuring the error in float64 adds the rounding of sums of n products. In bfloat16 and float16 each entry is
    rounded once, and these errors are independent.
    """
    if dtype in (torch.bfloat16, torch.float16):
        return torch.finfo(dtype).eps * (1 + 0.4 * min(p, n) ** 0.5)
    measured = torch.finfo(torch.float64).eps * max(p, n) ** 0.5
    return (8 * torch.finfo(dtype).eps + measured) * min(p, n) ** 0.5
