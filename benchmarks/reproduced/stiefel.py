"""Gradient descent on orthogonal matrices by this package and its peers: what procrustes.py and online_pca.py share."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from entry import installed
from torch import Tensor, nn

from manifold_opt import SGD, mark_orthogonal

from common import BLUE, GREEN, PINK, RED  # isort: skip


class Landing(torch.optim.Optimizer):
    r"""The landing algorithm, from its formulas; its code is not on the package index.

    It adds :math:`-\eta` times

    .. math:: \mathrm{skew}(G X^\top) X + \lambda (X X^\top - I) X, \quad \mathrm{or} \quad
              X\, \mathrm{skew}(X^\top G) + \lambda (X X^\top - I) X

    to square, or wide matrices. The attraction is 1, or 1 / (2 lr) for an lr above 1/2, which would else overshoot.
    The step is shortened where the distance d from orthogonality could grow beyond 1/2: with a the norm of the first
    term over the smallest singular value of X, d is at most
    :math:`d + 2 \eta (a d + \lambda d^2 - \lambda d) + \eta^2 (a + \lambda d)^2 (1 + d)` after a step.

    Reference: Ablin & Peyre (2022), arXiv 2102.07432; Ablin, Vary, Gao & Absil (2024), arXiv 2303.16510.
    """

    def __init__(self, params: list[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "attraction": min(1.0, 0.5 / lr)})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Move every parameter ``(..., p, n)``, p <= n."""
        for group in self.param_groups:
            attraction = group["attraction"]
            for x in group["params"]:
                gram, field = x @ x.mT, x.grad @ x.mT
                square = x.shape[-2] == x.shape[-1]
                direction = ((field - field.mT) @ x if square else gram @ x.grad - field.mT @ x) / 2
                d = torch.linalg.matrix_norm(gram - torch.eye(x.shape[-2]), keepdim=True)
                a = torch.linalg.matrix_norm(direction, keepdim=True) / (1 - d).clamp_min(0.5).sqrt()
                b = attraction * d
                linear, quadratic = a * d + b * d - b, (a + b).square() * (1 + d)
                safe = ((linear.square() + quadratic * (0.5 - d)).clamp_min(0).sqrt() - linear) / quadratic
                x.sub_(safe.clamp_max(group["lr"]) * (direction + attraction * (gram @ x - x)))


@dataclass
class Descent:
    """A matrix or several with their optimizer.

    Attributes:
        opt: the optimizer.
        points: returns the matrices as they are, ``(B, p, n)``, with their gradient graph.
    """

    opt: torch.optim.Optimizer
    points: Callable[[], Tensor]


def ours(start: Tensor, lr: float) -> Descent:
    """This package's SGD as it comes."""
    weight = mark_orthogonal(nn.Parameter(start.clone()), flatten=False)
    return Descent(SGD([weight], lr), lambda: weight)


def geoopt(start: Tensor, lr: float) -> Descent:
    """RiemannianSGD, which retracts by QR; it wants orthonormal columns."""
    geoopt = importlib.import_module("geoopt")
    weight = geoopt.ManifoldParameter(start.mT.clone(), manifold=geoopt.Stiefel(canonical=False))
    return Descent(geoopt.optim.RiemannianSGD([weight], lr), lambda: weight.mT)


def _factor(start: Tensor) -> float:
    """Landing and POGO follow half the canonical gradient, on wide matrices half as fast as the euclidean one."""
    return 1.0 if start.shape[-2] == start.shape[-1] else 2.0


def pogo(start: Tensor, lr: float) -> Descent:
    """POGO with its SGD."""
    weight = nn.Parameter(start.clone())
    rule = importlib.import_module("pogo.base").SGD()
    return Descent(importlib.import_module("pogo").POGO([weight], rule, _factor(start) * lr), lambda: weight)


def landing(start: Tensor, lr: float) -> Descent:
    """The landing field."""
    weight = nn.Parameter(start.clone())
    return Descent(Landing([weight], _factor(start) * lr), lambda: weight)


CONTENDERS = {
    "manifold_opt.SGD": (ours, RED),
    "geoopt, QR": (geoopt, BLUE),
    "POGO": (pogo, PINK),
    "Landing": (landing, GREEN),
}


def contenders() -> list[str]:
    """Return those whose package is installed."""
    return installed(CONTENDERS, {"geoopt, QR": ("geoopt", "geoopt"), "POGO": ("pogo", "pogo-torch")})


Loss = Callable[[Tensor], Tensor]


def descend(
    descent: Descent, draw: Callable[[], Loss], gap: Callable[[Tensor], float], steps: int, every: int
) -> dict[str, Any]:
    """Make steps; the gap and the distance from orthogonality every few of them, and the CPU time of the steps.

    Args:
        descent: matrices and optimizer.
        draw: returns the loss of a step; drawing a batch is not timed, its gradient is.
        gap: how far matrices are from the optimum.
        steps: how many.
        every: steps between two looks.
    """
    found: dict[str, Any] = {"step": [], "seconds": [], "gap": [], "defect": []}
    spent = 0.0
    for step in range(steps + 1):
        if step % every == 0:
            x = descent.points().detach()
            found["step"].append(step)
            found["seconds"].append(round(spent, 4))
            found["gap"].append(gap(x))
            eye = torch.eye(x.shape[-2], dtype=torch.float64)
            defect = torch.linalg.matrix_norm(x.double() @ x.double().mT - eye).max()
            found["defect"].append(float(f"{float(defect):.3g}"))
        if step < steps:
            loss = draw()
            began = time.process_time()
            descent.opt.zero_grad()
            loss(descent.points()).backward()
            descent.opt.step()
            spent += time.process_time() - began
    return found
