"""Float32 products that are float32's, whatever runs around them.

Orthogonality to rounding is that of the products it is computed with. Three things make torch multiply float32 in
less: autocast, :func:`torch.set_float32_matmul_precision` (with ``torch.backends.cuda.matmul.allow_tf32``, the same
setting), and since torch 2.9 a ``fp32_precision`` of each backend.
"""

from __future__ import annotations

import warnings
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch

LOW = (torch.bfloat16, torch.float16)  # what a parameter may be stored in, but not moved in
MASTER = "master"  # key of the values in float32 of such a parameter in an optimizer's state
_BACKENDS: tuple[Any, ...] = tuple(
    backend.matmul
    for backend in (torch.backends.cuda, torch.backends.mkldnn)
    if hasattr(torch.backends, "fp32_precision") and hasattr(backend, "matmul")
)


class FullPrecision:
    """A context in which float32 products on a type of device are exact to float32's rounding.

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
        self._overall: str | None = None
        self._each: list[str] = []

    def __enter__(self) -> None:
        self._autocast.__enter__()
        if _overall() != "highest":
            self._each = [backend.fp32_precision for backend in _BACKENDS]
            self._overall = _overall()
            if self._overall is not None:
                torch.set_float32_matmul_precision("highest")
            for backend in _BACKENDS:
                backend.fp32_precision = "ieee"

    def __exit__(self, *error: Any) -> None:
        if self._overall is not None:
            torch.set_float32_matmul_precision(self._overall)
        for backend, value in zip(_BACKENDS, self._each, strict=False):
            inherited = value == torch.backends.fp32_precision  # type: ignore[attr-defined]
            backend.fp32_precision = "none" if inherited else value
        self._autocast.__exit__(*error)


def is_full_precision(device_types: set[str]) -> bool:
    """Return True if float32 products are full ones on some devices, whatever runs around."""
    for device_type in device_types:
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            return False
    return _overall() == "highest"


def full_precision(device_types: set[str]) -> AbstractContextManager[Any]:
    """Return a context in which float32 products are full ones on some devices."""
    stack = ExitStack()
    for device_type in device_types:
        stack.enter_context(FullPrecision(device_type))
    return stack


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a parameter of this dtype is moved in: float32 for those of low precision."""
    return torch.float32 if dtype in LOW else dtype


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context without autocast, for what torch.compile traces too. The meta device knows none."""
    return nullcontext() if device_type == "meta" else torch.autocast(device_type, enabled=False)


def _overall() -> str | None:
    """The setting of all backends together; None where they have been set apart, and torch refuses to name one."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def warn_unless_full() -> None:
    """In a compiled step the settings in force while it runs are not ours to change: say so."""
    if _overall() != "highest":
        warnings.warn(
            "A compiled step of manifold_opt multiplies in the precision of "
            "torch.set_float32_matmul_precision, which is not 'highest': the weights are orthogonal to that precision "
            "only. Set it to 'highest' around opt.step(), or leave the step uncompiled, where it has no effect.",
            stacklevel=2,
        )


# As torch.compiler.assume_constant_result does, which would import the compiler: called while a graph is traced.
warn_unless_full._dynamo_marked_constant = True  # type: ignore[attr-defined]
