"""Float32 matmuls in full float32, regardless of the autocast and TF32 settings.

The orthogonality error of a weight depends on the precision of the matmuls. Three settings reduce it: autocast,
:func:`torch.set_float32_matmul_precision` (equivalent to ``torch.backends.cuda.matmul.allow_tf32``), and since torch
2.9 ``fp32_precision`` of each backend.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

from .products import global_precision

LOW_PRECISION = (torch.bfloat16, torch.float16)  # dtypes of parameters that have a float32 master copy
MASTER = "master"  # state key of the master copy
_BACKENDS: tuple[Any, ...] = tuple(
    backend.matmul
    for backend in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(torch.backends, "fp32_precision") and hasattr(backend, "matmul")
)


class FullPrecision:
    """Context manager that runs float32 matmuls on a device type in full float32.

    >>> import torch
    >>> from manifold_opt.linalg.precision import FullPrecision
    >>> torch.set_float32_matmul_precision("medium")
    >>> with FullPrecision("cpu"):
    ...     torch.get_float32_matmul_precision()
    'highest'
    >>> torch.get_float32_matmul_precision()
    'medium'
    >>> torch.set_float32_matmul_precision("highest")
    """

    def __init__(self, device_type: str) -> None:
        self._autocast = without_autocast(device_type)
        self._global: str | None = None
        self._per_backend: list[str] = []

    def __enter__(self) -> None:
        self._autocast.__enter__()
        if global_precision() != "highest":
            self._per_backend = [backend.fp32_precision for backend in _BACKENDS]
            self._global = global_precision()
            if self._global is not None:
                torch.set_float32_matmul_precision("highest")
            for backend in _BACKENDS:
                backend.fp32_precision = "ieee"

    def __exit__(self, *error: Any) -> None:
        if self._global is not None:
            torch.set_float32_matmul_precision(self._global)
        for backend, value in zip(_BACKENDS, self._per_backend, strict=False):
            inherited = value == torch.backends.fp32_precision  # type: ignore[attr-defined]
            backend.fp32_precision = "none" if inherited else value
        self._autocast.__exit__(*error)


def full_precision(device_types: set[str]) -> AbstractContextManager[Any]:
    """Return a context manager that runs float32 matmuls in full float32 on all these device types."""
    stack = ExitStack()
    for device_type in device_types:
        stack.enter_context(FullPrecision(device_type))
    return stack


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a parameter is updated: float32 for bfloat16 and float16."""
    return torch.float32 if dtype in LOW_PRECISION else dtype


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Return a context manager without autocast that torch.compile can trace. No-op on the meta device."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def warn_if_reduced_precision() -> None:
    """Warn if the matmul precision is reduced in a compiled step, which cannot change the setting."""
    if global_precision() != "highest":
        warnings.warn(
            "A compiled step of manifold_opt multiplies in the precision of "
            "torch.set_float32_matmul_precision, which is not 'highest': the weights are orthogonal to that precision "
            "only. Set it to 'highest' around opt.step(), or leave the step uncompiled, where it has no effect.",
            stacklevel=2,
        )


# Equivalent to torch.compiler.assume_constant_result, which would import the compiler.
warn_if_reduced_precision._dynamo_marked_constant = True  # type: ignore[attr-defined]
