"""What several test files need: shapes, points, tangents, and tolerances with their reason."""

from __future__ import annotations

import importlib.util
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import pytest
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
SQUARE = [(1, 1), (2, 2), (5, 5)]
WIDE = [(1, 4), (3, 8), (10, 12)]
TALL = [(4, 1), (8, 3), (12, 10)]
DTYPES = [torch.float32, torch.float64]
UNITARY = [torch.complex64, torch.complex128]
FIELDS = [torch.float64, torch.complex128]
UNMOVED = ("step", CONSTRAINED)  # entries of a state that are no moments


def pairs(together: dict[str, Iterable] | None = None, /, **factors: Iterable) -> pytest.MarkDecorator:
    """Parametrize a test over cases in which any value of one factor meets any value of another.

    Few faults need three values at once, and all combinations would be many times as many cases.

    Args:
        together: factors of several arguments each, under the names of these: ``{"shape, blocks": [((9, 3), 3)]}``.
        factors: the values of one argument each.
    """
    return _covering((together or {}) | factors, 2)


def each(together: dict[str, Iterable] | None = None, /, **factors: Iterable) -> pytest.MarkDecorator:
    """Parametrize a test over as many cases as the longest factor has values: any value of any factor is in some.

    As :func:`pairs`, for factors that have little to do with one another.
    """
    return _covering((together or {}) | factors, 1)


def _covering(factors: dict[str, Iterable], strength: int) -> pytest.MarkDecorator:
    """Cases that cover every value (strength 1) or every pair of values (2), found greedily, the same every time."""
    values = [list(factor) for factor in factors.values()]
    levels = [[(k, v) for v in range(len(factor))] for k, factor in enumerate(values)]
    unmet = {frozenset(pair) for two in itertools.combinations(levels, 2) for pair in itertools.product(*two)}
    wanted = [c for some in itertools.combinations(levels, strength) for c in itertools.product(*some)]
    used: Counter = Counter()
    cases = []
    for start in wanted:
        if used[start[0]] if strength == 1 else frozenset(start) not in unmet:
            continue
        case = dict(start)
        for k, some in enumerate(levels):
            if k not in case:
                met = [sum(frozenset((level, other)) in unmet for other in case.items()) for level in some]
                rare = [-used[level] for level in some]
                best = zip(met, rare, strict=True) if strength == 2 else zip(rare, met, strict=True)
                case[k] = max(enumerate(best), key=lambda ranked: (ranked[1], -ranked[0]))[0]
        used.update(case.items())
        unmet -= set(map(frozenset, itertools.combinations(case.items(), 2)))
        cases.append([values[k][case[k]] for k in range(len(values))])
    names = [name.split(", ") for name in factors]
    flat = [[v for some, x in zip(names, case, strict=True) for v in (x if len(some) > 1 else [x])] for case in cases]
    return pytest.mark.parametrize([name for some in names for name in some], flat, ids=_shown)


def _shown(value):
    """In the name of a case: dtypes and shapes in short, the rest as pytest shows it."""
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    shape = isinstance(value, tuple) and value and all(isinstance(size, int) for size in value)
    return "x".join(map(str, value)) if shape else None


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
