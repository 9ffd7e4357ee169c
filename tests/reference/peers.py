"""This package and others behind one face: a matrix, or some, that a library keeps orthogonal while it trains."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal

import manifold_opt
from manifold_opt import mark_orthogonal

from ..helpers import gaussian

OF_THE_TABLE = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 13),
    reason="docs/migration/index.md compares with torch 2.13",
)


def peer(name: str) -> ModuleType:
    """A package that the extra ``compare`` installs; the test is skipped without."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed: pip install '.[compare]'")


def off(w: Tensor) -> float:
    """The largest Frobenius distance from orthonormal rows, or columns where it is tall, of some matrices."""
    w = w.detach().to(torch.complex128 if w.is_complex() else torch.float64)
    w = w.mT if w.shape[-2] > w.shape[-1] else w
    return float(torch.linalg.matrix_norm(w @ w.mH - torch.eye(w.shape[-2], dtype=w.dtype)).max())


def noise(step: int, like: Tensor) -> Tensor:
    """A gradient for the step of that number."""
    real, imaginary = (gaussian(*like.shape, seed=2 * step + part) for part in (0, 1))
    return (torch.complex(real, imaginary) if like.is_complex() else real).to(like.dtype)


@dataclass
class Run:
    """Matrices in training.

    Attributes:
        parameters: what the optimizer moves, one a matrix.
        opt: it.
        weights: the matrices as they are now.
    """

    parameters: list[nn.Parameter]
    opt: torch.optim.Optimizer
    weights: Callable[[], list[Tensor]]

    def step(self, *gradients: Tensor) -> None:
        """One step along the gradients of the matrices."""
        self.opt.zero_grad()
        for weight, gradient in zip(self.weights(), gradients, strict=True):
            product = weight * gradient.conj()
            (product.real if product.is_complex() else product).sum().backward()
        self.opt.step()

    def train(self, steps: int = 20) -> Tensor:
        """Steps along noise; the first matrix then."""
        for step in range(steps):
            self.step(*(noise(step, weight) for weight in self.weights()))
        return self.weights()[0].detach()


def parametrized(library: str, module: nn.Module, name: str = "weight", **options: Any) -> nn.Module:
    """A module whose matrix torch's parametrization, or geotorch's, computes."""
    return (orthogonal if library == "torch" else peer("geotorch").orthogonal)(module, name, **options)


def start(library: str, *values: Tensor, rule: str = "Adam", lr: float = 0.01, **options: Any) -> Run:
    """Orthogonal matrices in the hands of ``library`` and of its SGD or Adam.

    Args:
        library: ``"torch"``, ``"geotorch"``, ``"geoopt"``, ``"pogo"`` or ``"ours"``.
        values: matrices. geoopt wants them tall.
        rule: ``"SGD"`` or ``"Adam"``.
        lr: learning rate.
        options: of the parametrization, of geoopt.Stiefel, or of POGO and our optimizers.
    """
    if library in ("torch", "geotorch"):
        layers = [nn.Module() for _ in values]
        for layer, value in zip(layers, values, strict=True):
            layer.weight = nn.Parameter(value.clone())
            parametrized(library, layer, **options)
            layer.weight = value.clone()  # geotorch has drawn another start
        held = [layer.parametrizations.weight.original for layer in layers]
        return Run(held, getattr(torch.optim, rule)(held, lr=lr), lambda: [layer.weight for layer in layers])
    if library == "geoopt":
        geoopt = peer("geoopt")
        held = [geoopt.ManifoldParameter(value.clone(), manifold=geoopt.Stiefel(**options)) for value in values]
        return Run(held, getattr(geoopt.optim, f"Riemannian{rule}")(held, lr=lr), lambda: held)
    if library == "pogo":
        tall = values[0].shape[0] > values[0].shape[1]
        held = [nn.Parameter(value.clone()[None]) for value in values]
        base = getattr(peer("pogo.base"), {"Adam": "VectorAdam"}.get(rule, rule))()
        return Run(held, peer("pogo").POGO(held, base, lr, rows=not tall, **options), lambda: [p[0] for p in held])
    held = [mark_orthogonal(nn.Parameter(value.clone())) for value in values]
    return Run(held, getattr(manifold_opt, rule)(held, lr=lr, **options), lambda: held)
