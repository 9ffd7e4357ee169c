"""Cayley SGD as its paper has it and as its class is shipped, for tests and benchmarks; one matrix as any batch.

Paper: Li, Li & Todorovic, *Efficient Riemannian Optimization on the Stiefel Manifold via the Cayley Transform*, ICLR
2020, arXiv:2002.01113, Algorithm 1. The class is ``SGDG`` of SpinQuant (Liu et al., arXiv:2405.16406),
``train_utils/optimizer.py``, read at commit b963793. Written from the formulas and from what that file computes.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def cayley_sgd(
    x: Tensor,
    g: Tensor,
    m: Tensor,
    *,
    lr: float,
    momentum: float,
    q: float = 0.5,
    s: int = 2,
    eps: float = 1e-8,
    projected: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One step of Algorithm 1, on tall matrices.

    .. math::
        M \leftarrow \beta M - G, \quad \hat W = M X^\top - \tfrac12 X (X^\top M X^\top), \quad
        W = \hat W - \hat W^\top, \quad M \leftarrow W X

        \alpha = \min\{l, 2q / (\Vert W \Vert_1 + \epsilon)\}, \quad Y_0 = X + \alpha M, \quad
        Y_{i+1} = X + \tfrac{\alpha}{2} W (X + Y_i), \quad X \leftarrow Y_s

    Args:
        x: points, ``(..., n, p)``, orthonormal columns.
        g: gradients, same shape.
        m: momenta, same shape.
        lr: l, the longest step.
        momentum: :math:`\beta`.
        q: bound on the contraction of the iteration.
        s: iterations.
        eps: keeps the quotient finite.
        projected: whether the iteration starts from :math:`X + \alpha W X`, as in the paper; else from
            :math:`X + \alpha (\beta M - G)`, as in the class.

    Returns:
        The new points, the new momenta, and the step :math:`\alpha` that was taken, ``(..., 1, 1)``.
    """
    m = momentum * m - g
    half = m @ x.mT - x @ (x.mT @ m @ x.mT) / 2
    w = half - half.mT
    along = w @ x
    alpha = (2 * q / (torch.linalg.matrix_norm(w, 1, keepdim=True) + eps)).clamp(max=lr)
    y = x + alpha * (along if projected else m)
    for _ in range(s):
        y = x + alpha / 2 * w @ (x + y)
    return y, along, alpha


class CayleySGD(torch.optim.Optimizer):
    """Cayley SGD of parameters ``(p, ...)``, flattened to (first, rest), whose rows are orthonormal.

    One with more rows than columns is a stack of square blocks. A point X is the transpose of a block.
    :meth:`published` is the paper's rule and :meth:`shipped` that of the class.

    Args:
        params: parameters or groups.
        lr: the longest step.
        momentum: of a stored momentum.
        iterations: of the Cayley transform.
        stores_momentum: whether a momentum is kept from one step to the next; otherwise its buffer stays zero.
        projected: as in :func:`cayley_sgd`.
        unit_rows: whether every step first divides rows by their norms.
        qr_chance: probability that a step then replaces a block by its QR factor.
        seed: of these draws.

    Attributes:
        cut: number of steps of blocks that were shorter than ``lr``.
        taken: number of steps of blocks.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        momentum: float = 0.0,
        *,
        iterations: int = 2,
        stores_momentum: bool = True,
        projected: bool = True,
        unit_rows: bool = False,
        qr_chance: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.iterations, self.stores_momentum, self.projected = iterations, stores_momentum, projected
        self.unit_rows, self.qr_chance = unit_rows, qr_chance
        self.cut = self.taken = 0
        self._generator = torch.Generator().manual_seed(seed)

    @classmethod
    def published(cls, params: Iterable[Tensor], lr: float, momentum: float = 0.0) -> CayleySGD:
        """Algorithm 1: two iterations, and a stored momentum."""
        return cls(params, lr, momentum)

    @classmethod
    def shipped(cls, params: Iterable[Tensor], lr: float, momentum: float = 0.0, seed: int = 0) -> CayleySGD:
        """The class: five iterations from an unprojected start, no momentum, and a QR factor in one step of 101."""
        return cls(
            params,
            lr,
            momentum,
            iterations=5,
            stores_momentum=False,
            projected=False,
            unit_rows=True,
            qr_chance=1 / 101,
            seed=seed,
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of every block."""
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self._step(p, group)

    def _step(self, p: Tensor, group: dict) -> None:
        n = p[0].numel()
        shape = (-1, min(len(p), n), n)
        x = self._start(p.view(shape))
        m = self.state[p].get("momentum_buffer", torch.zeros_like(x.mT))
        x, m, alpha = cayley_sgd(
            x.mT,
            p.grad.view(shape).mT,
            m,
            lr=group["lr"],
            momentum=group["momentum"],
            s=self.iterations,
            projected=self.projected,
        )
        p.copy_(x.mT.reshape(p.shape))
        if self.stores_momentum:
            self.state[p]["momentum_buffer"] = m
        self.cut += int((alpha < group["lr"]).sum())
        self.taken += alpha.numel()

    def _start(self, x: Tensor) -> Tensor:
        """The blocks from which a step starts: those of the parameter, or their QR factors."""
        if self.unit_rows:
            x = x / (x.norm(dim=-1, keepdim=True) + 1e-8)
        drawn = torch.rand(len(x), generator=self._generator) < self.qr_chance
        if drawn.any():
            x = x.clone()
            q, r = torch.linalg.qr(x[drawn].mT)
            x[drawn] = (q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)).mT
        return x
