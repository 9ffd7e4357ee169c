"""Orthogonality over many noisy steps: the largest LAPACK ratio of every exact retraction, and geoopt's Cayley.

    python benchmarks/drift.py --steps 10000 --sizes 8 32 64 128 256

Gradients are standard normal, so that nothing ever settles. The ratio ||I - W W^T||_1 / (n u) is LAPACK's measure of
orthogonality, u the unit roundoff; LAPACK's own tests accept 30. It is taken after every step, and the largest counts.
"""

from __future__ import annotations

import argparse
import time

import geoopt
import torch
from torch import Tensor, nn

import manifold_opt
from manifold_opt import RETRACTIONS, SGD, Adam, init, mark_orthogonal


def defect_ratio(w: Tensor) -> float:
    """The largest ||I - W W^T||_1 / (n u) of wide matrices ``(..., p, n)``, the Gram matrices computed in float64."""
    wide = w.detach().double()
    defect = torch.eye(w.shape[-2], dtype=torch.float64) - wide @ wide.mT
    return float(torch.linalg.matrix_norm(defect, 1).max()) / (w.shape[-1] * torch.finfo(w.dtype).eps / 2)


def largest_ratio(
    optimizer: str, scheme: str, n: int, dtype: torch.dtype, steps: int, lr: float
) -> tuple[float, float]:
    """The largest ratio over all steps, and milliseconds a step."""
    generator = torch.Generator().manual_seed(n)
    start = init.orthogonal_(torch.empty(n, n, dtype=dtype), generator=generator)
    opt: torch.optim.Optimizer
    if scheme == "geoopt cayley":
        weight = geoopt.ManifoldParameter(start, manifold=geoopt.Stiefel(canonical=True))
        opt = (geoopt.optim.RiemannianAdam if optimizer == "adam" else geoopt.optim.RiemannianSGD)([weight], lr=lr)
    else:
        weight = mark_orthogonal(nn.Parameter(start))
        opt = (Adam if optimizer == "adam" else SGD)([weight], lr=lr, retraction=scheme)
    largest, spent = 0.0, 0.0
    weight.grad = torch.empty_like(start)
    for _ in range(steps):
        weight.grad.normal_(generator=generator)
        began = time.perf_counter()
        opt.step()
        spent += time.perf_counter() - began
        largest = max(largest, defect_ratio(weight))
    return largest, 1000 * spent / steps


def main() -> None:
    """Print one row a scheme, dtype and size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--sizes", type=int, nargs="+", default=[8, 32, 64, 128, 256])
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adam"], choices=["sgd", "adam"])
    parser.add_argument("--toy", action="store_true", help="one size, a few steps: does it run?")
    args = parser.parse_args()
    if args.toy:
        args.steps, args.sizes = 10, args.sizes[:1]
    print(f"manifold_opt {manifold_opt.__version__}, torch {torch.__version__}, geoopt {geoopt.__version__},", end=" ")
    print(f"{torch.get_num_threads()} threads, {args.steps} steps at lr {args.lr}")
    print(f"{'optimizer':10} {'scheme':16} {'dtype':8} {'n':>5} {'largest ratio':>14} {'ms a step':>10}", flush=True)
    schemes = [name for name, scheme in RETRACTIONS.items() if scheme.exact] + ["geoopt cayley"]
    for n in args.sizes:
        for dtype in (torch.float32, torch.float64):
            for optimizer in args.optimizers:
                for scheme in schemes:
                    ratio, ms = largest_ratio(optimizer, scheme, n, dtype, args.steps, args.lr)
                    name = str(dtype).removeprefix("torch.")
                    print(f"{optimizer:10} {scheme:16} {name:8} {n:5} {ratio:14.2f} {ms:10.2f}", flush=True)


if __name__ == "__main__":
    main()
