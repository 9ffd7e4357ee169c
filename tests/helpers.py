"""What several test files need: shapes, points, tangents, and tolerances with their reason."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from manifold_opt import RETRACTIONS, stiefel

EXACT = [name for name, scheme in RETRACTIONS.items() if scheme.exact]
SQUARE = [(1, 1), (2, 2), (5, 5), (16, 16)]
WIDE = [(1, 4), (3, 8), (10, 12), (8, 32)]
TALL = [(4, 1), (8, 3), (12, 10)]
DTYPES = [torch.float32, torch.float64]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def point(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return stiefel.random(*shape, dtype=dtype, generator=seeded(seed))


def gaussian(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=seeded(seed)).to(dtype)


def tangent(w: Tensor, length: float, seed: int = 1) -> Tensor:
    """A random tangent of spectral norm ``length`` for every matrix of ``w``; zero where there is none."""
    v = stiefel.project(w, gaussian(*w.shape, dtype=w.dtype, seed=seed))
    size = torch.linalg.matrix_norm(v, 2, keepdim=True)
    return torch.where(size > 1e-3, length * v / size, 0)


def rounding(w: Tensor) -> float:
    """Frobenius error of a Gram matrix that is orthogonal to rounding.

    Each of its p^2 entries is a sum of n products of entries of size n^-1/2, and so carries a few units of roundoff
    at most; the diagonal, p of them, carries most.
    """
    return 4 * torch.finfo(w.dtype).eps * max(w.shape[-2:]) ** 0.5


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/, as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
