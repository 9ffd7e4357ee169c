"""What several test files need: shapes, points, tangents, and tolerances with their reason."""

from __future__ import annotations

import importlib.util
import math
import weakref
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import manifold_opt
from manifold_opt import RETRACTIONS
from manifold_opt.constraints.tag import CONSTRAINED
from manifold_opt.linalg import matrices, products
from manifold_opt.manifolds.records import record_from_tensor
from manifold_opt.stiefel import geometry

EXACT = [name for name, scheme in RETRACTIONS.items() if scheme.exact]
SQUARE = [(1, 1), (2, 2), (5, 5), (16, 16)]
WIDE = [(1, 4), (3, 8), (10, 12), (8, 32)]
TALL = [(4, 1), (8, 3), (12, 10)]
DTYPES = [torch.float32, torch.float64]
UNITARY = [torch.complex64, torch.complex128]
FIELDS = [torch.float64, torch.complex128]
UNMOVED = ("step", CONSTRAINED)  # entries of a state that are no moments


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def point(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return geometry.random(*shape, dtype=dtype, generator=seeded(seed))


def gaussian(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=matrices.in_double(dtype), generator=seeded(seed)).to(dtype)


def tangent(w: Tensor, length: float, seed: int = 1) -> Tensor:
    """A random tangent of spectral norm ``length`` for every matrix of ``w``; zero where there is none."""
    v = geometry.riemannian_gradient(w, gaussian(*w.shape, dtype=w.dtype, seed=seed))
    size = torch.linalg.matrix_norm(v, 2, keepdim=True)
    return torch.where(size > 1e-3, length * v / size, 0)


def rounding(w: Tensor) -> float:
    """Frobenius error of a Gram matrix that is orthogonal to rounding.

    Each of its p^2 entries is a sum of n products of entries of size n^-1/2, and so carries a few units of roundoff
    at most; the diagonal, p of them, carries most.
    """
    return 4 * torch.finfo(w.dtype).eps * max(w.shape[-2:]) ** 0.5


def held_under(opt: torch.optim.Optimizer, parameter: Tensor) -> tuple | None:
    """The record of the constraint that the state of a parameter is held under; None if that is torch's own."""
    tag = opt.state.get(parameter, {}).get(CONSTRAINED)
    return None if tag is None else record_from_tensor(tag)


class Memory(TorchDispatchMode):
    """An allocator that has so many bytes and no more: whoever asks for them is refused.

    Attributes:
        peak: the most that was held at a time, of what has been allocated since it was entered.
    """

    def __init__(self, limit: float = math.inf) -> None:
        super().__init__()
        self.limit, self.live, self.peak = limit, 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for given in tree_leaves((args, kwargs)):
            if isinstance(given, Tensor):
                self._known.add(given.untyped_storage()._cdata)
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            storage = made.untyped_storage() if isinstance(made, Tensor) else None
            if storage is not None and storage._cdata not in self._known:
                self._known.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        if self.live > self.limit:
            raise torch.OutOfMemoryError("not that much")
        return out

    def _free(self, key: int, nbytes: int) -> None:
        self._known.discard(key)
        self.live -= nbytes


def never_read(monkeypatch) -> None:
    """Run as on an accelerator: Python reads no value and branches on none."""
    monkeypatch.setattr(products, "READ_ON_CPU", False)


def buckets_of(opt: torch.optim.Optimizer) -> list:
    """The buckets of an optimizer that has made a step."""
    return [bucket for _, bucket in opt._engine.plan.work]


def blocks_of(parameter: Tensor) -> Tensor:
    """The wide blocks of a marked parameter whose blocks are all alike."""
    (part,) = manifold_opt.constraint_of(parameter).layouts(parameter.shape)
    return part.view(parameter.detach())


def benchmark(name: str) -> ModuleType:
    """A script of benchmarks/, as a module."""
    path = Path(__file__).parents[1] / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
