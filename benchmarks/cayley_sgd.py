"""Cayley SGD beside SGD and Adam of this package, learning the rotations of one encoder layer for 4-bit weights.

    python benchmarks/cayley_sgd.py

The task is that of examples/rotation_quantization.py, whose model it needs: pip install ".[rotations]".
Cayley SGD is that of tests/reference/cayley_sgd.py: as the paper has it, with two iterations and a stored momentum, and
as its class is shipped, with five iterations, without a momentum whatever is asked for, and with a QR factor in one
step of 101. Every run has the same start and the same linear decay of the learning rate from the one given; 1.5 is that
of SpinQuant, Liu et al., arXiv:2405.16406.

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
from manifold_opt.rotations import SGDG, RoundToNearest

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from rotations import MATRICES, LayerRotations, learn, rotated

from tests.reference.cayley_sgd import CayleySGD

Make = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]
RATES = [1.5, 15.0, 150.0, 1500.0]
CONTENDERS: dict[str, tuple[Make, list[float]]] = {
    "Cayley SGD": (CayleySGD.published, RATES),
    "Cayley SGD, momentum 0.9": (lambda params, lr: CayleySGD.published(params, lr, 0.9), RATES),
    "the class, momentum 0.9": (lambda params, lr: CayleySGD.shipped(params, lr, 0.9), RATES),
    "SGDG": (lambda params, lr: SGDG(params, lr, stiefel=True), RATES),
    "SGDG, momentum 0.9": (lambda params, lr: SGDG(params, lr, 0.9, stiefel=True), RATES),
    "SGD": (SGD, RATES),
    "SGD, momentum 0.9": (lambda params, lr: SGD(params, lr, 0.9), RATES),
    "Adam": (Adam, [0.003, 0.008, 0.02]),
}


@torch.no_grad()
def error_of(layer: nn.Module, rotations: LayerRotations) -> str:
    """Relative square error of the rounded weights in percent, the mean over them."""
    weights = [rotated(layer.get_submodule(m.name).weight, m, rotations) for m in MATRICES]
    errors = [(RoundToNearest(4)(w) - w).square().sum() / w.square().sum() for w in weights]
    return f"{100 * float(torch.stack(errors).mean()):.3f}"


def measure(layer: nn.Module, heads: int, make: Make, lr: float, steps: int) -> tuple[str, ...]:
    """Learn, and say how far the rounded weights are off, and the rotations off orthogonal."""
    rotations = LayerRotations(layer, heads, Generator().manual_seed(0))
    opt = make(rotations.parameters(), lr)
    start = time.process_time()
    for _ in learn(layer, rotations, opt, steps=steps, rounding=RoundToNearest(4)):
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
    start = error_of(layer, LayerRotations(layer, heads, Generator().manual_seed(0)))
    print(f"{'random, the start of all':26}{start:>18}")
    for name, (make, rates) in CONTENDERS.items():
        for lr in rates[:1] if args.toy else rates:
            error, off, cut, ms = measure(layer, heads, make, lr, 3 if args.toy else args.steps)
            print(f"{name:26}{lr:>8g}{error:>10}{off:>8}{cut:>6}{ms:>11}", flush=True)


if __name__ == "__main__":
    main()
