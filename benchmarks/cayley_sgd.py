"""Cayley SGD beside SGD and Adam of this package, learning the rotations of one encoder layer for 4-bit weights.

    python benchmarks/cayley_sgd.py

The task is that of examples/rotation_quantization.py, whose model it needs: pip install "manifold-opt[rotations]".
Cayley SGD is written here from its paper's Algorithm 1: Li, Li & Todorovic, *Efficient Riemannian Optimization on the
Stiefel Manifold via the Cayley Transform*, ICLR 2020, arXiv:2002.01113. Every run has the same start and the same
linear decay of the learning rate from the one given; 1.5 is that of SpinQuant, Liu et al., arXiv:2405.16406.

Columns: relative square error of the rounded weights, mean of six matrices; largest distance of a rotation from
orthogonality; how many of the steps of blocks the bound of Cayley SGD has cut; CPU time of a step, the loss included.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from manifold_opt import SGD, Adam, orthogonality_error

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from rotations import MATRICES, Rounding, learn, rotated, rotations_of


def cayley_sgd(
    x: Tensor, g: Tensor, m: Tensor, *, lr: float, momentum: float, q: float = 0.5, s: int = 2, eps: float = 1e-8
) -> tuple[Tensor, Tensor, Tensor]:
    r"""One step of Algorithm 1, on tall matrices.

    .. math::
        M \leftarrow \beta M - G, \quad \hat W = M X^\top - \tfrac12 X (X^\top M X^\top), \quad
        W = \hat W - \hat W^\top, \quad M \leftarrow W X

        \alpha = \min\{l,\; 2q / (\Vert W \Vert_1 + \epsilon)\}, \quad Y_0 = X + \alpha M, \quad
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

    Returns:
        The new points, the new momenta, and the step :math:`\alpha` that was taken, ``(..., 1, 1)``.
    """
    m = momentum * m - g
    half = m @ x.mT - x @ (x.mT @ m @ x.mT) / 2
    w = half - half.mT
    m = w @ x
    alpha = (2 * q / (torch.linalg.matrix_norm(w, 1, keepdim=True) + eps)).clamp(max=lr)
    y = x + alpha * m
    for _ in range(s):
        y = x + alpha / 2 * w @ (x + y)
    return y, m, alpha


class CayleySGD(torch.optim.Optimizer):
    """Algorithm 1 for parameters that are stacks of square blocks; counts the steps that its bound has cut."""

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})
        self.cut = self.taken = 0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One step of every block."""
        for group in self.param_groups:
            for p in group["params"]:
                size = (-1, p.shape[-1], p.shape[-1])
                state = self.state[p]
                m = state.setdefault("momentum_buffer", torch.zeros_like(p).view(size))
                x, m, alpha = cayley_sgd(p.view(size), p.grad.view(size), m, lr=group["lr"], momentum=group["momentum"])
                p.copy_(x.view(p.shape))
                state["momentum_buffer"] = m
                self.cut += int((alpha < group["lr"]).sum())
                self.taken += alpha.numel()


Make = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
RATES = [1.5, 15.0, 150.0, 1500.0]
CONTENDERS: dict[str, tuple[Make, list[float]]] = {
    "Cayley SGD": (CayleySGD, RATES),
    "Cayley SGD, momentum 0.9": (lambda params, lr: CayleySGD(params, lr, 0.9), RATES),
    "SGD": (SGD, RATES),
    "SGD, momentum 0.9": (lambda params, lr: SGD(params, lr, 0.9), RATES),
    "Adam": (Adam, [0.003, 0.008, 0.02]),
}


@torch.no_grad()
def error_of(layer: nn.Module, rotations: nn.ModuleDict) -> str:
    """Relative square error of the rounded weights in percent, the mean over them."""
    weights = [rotated(layer.get_submodule(m.name).weight, m, rotations) for m in MATRICES]
    errors = [(Rounding(4)(w) - w).square().sum() / w.square().sum() for w in weights]
    return f"{100 * float(torch.stack(errors).mean()):.3f}"


def measure(layer: nn.Module, heads: int, make: Make, lr: float, steps: int) -> tuple[str, ...]:
    """Learn, and say how far the rounded weights are off, and the rotations off orthogonal."""
    rotations = rotations_of(layer, heads, Generator().manual_seed(0))
    opt = make(rotations.parameters(), lr)
    start = time.process_time()
    for _ in learn(layer, rotations, opt, steps=steps, rounding=Rounding(4)):
        pass
    seconds = time.process_time() - start
    off = max(orthogonality_error(rotations).values())
    cut = f"{opt.cut / opt.taken:.0%}" if isinstance(opt, CayleySGD) else "-"
    return error_of(layer, rotations), f"{off:.0e}", cut, f"{1e3 * seconds / steps:.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Cayley SGD beside SGD and Adam, on rotations for 4-bit weights.")
    parser.add_argument("--steps", type=int, default=60, help="of learning (%(default)s)")
    parser.add_argument("--layer", type=int, default=3, help="of the encoder (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="three steps, the first learning rate of each")
    args = parser.parse_args(argv)
    from rotation_quantization import load  # needs transformers, which the algorithm alone does not

    torch.set_num_threads(1)
    _, model = load()
    layer, heads = model.encoder.layer[args.layer], model.config.num_attention_heads
    print(f"{'':26}{'lr':>8}{'error, %':>10}{'off':>8}{'cut':>6}{'ms a step':>11}")
    start = error_of(layer, rotations_of(layer, heads, Generator().manual_seed(0)))
    print(f"{'random, the start of all':26}{start:>18}")
    for name, (make, rates) in CONTENDERS.items():
        for lr in rates[:1] if args.toy else rates:
            error, off, cut, ms = measure(layer, heads, make, lr, 3 if args.toy else args.steps)
            print(f"{name:26}{lr:>8g}{error:>10}{off:>8}{cut:>6}{ms:>11}", flush=True)


if __name__ == "__main__":
    main()
