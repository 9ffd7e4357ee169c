"""Copying memory: how many steps until an RNN remembers across a delay, for several ways to keep it orthogonal.

    python benchmarks/copying.py --delay 100 --seeds 0 1 2

An nn.RNN (relu, 128 units) reads 10 symbols of 8, waits, and has to repeat them. Predicting without memory costs
10 ln 8 / (delay + 20); a run has learned when the mean loss of 20 batches is under half of that. Everything but the
way the recurrent matrix is trained is the same: Henaff's start, batches of 64, Adam at lr 1e-3, a tenth of it for the
orthogonal matrix. (The unconstrained run takes 1e-3 for all, and clips its gradients to norm 1.)
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations

from manifold_opt import Adam, init, mark_orthogonal, orthogonality_error

SYMBOLS, LENGTH, BATCH, HIDDEN, LR, WINDOW = 8, 10, 64, 128, 1e-3, 20


class Copier(nn.Module):
    """A plain RNN and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.RNN(SYMBOLS + 2, HIDDEN, nonlinearity="relu")
        self.head = nn.Linear(HIDDEN, SYMBOLS + 1)
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            elif name == "rnn.weight_hh_l0":
                init.orthogonal_(parameter, scheme="henaff")
            else:
                nn.init.xavier_uniform_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``(time, batch, 9)`` of symbols ``(time, batch)``."""
        return self.head(self.rnn(F.one_hot(x, SYMBOLS + 2).float())[0])


def batch(delay: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Symbols, blanks, a mark that says go; and what to answer."""
    symbols = torch.randint(1, SYMBOLS + 1, (LENGTH, BATCH), generator=generator)
    x = torch.zeros(delay + 2 * LENGTH, BATCH, dtype=torch.long)
    y = x.clone()
    x[:LENGTH] = y[-LENGTH:] = symbols
    x[delay + LENGTH - 1] = SYMBOLS + 1
    return x, y


def apart(net: Copier, weight: Tensor, scale: float) -> list[dict[str, object]]:
    """Two groups, for optimizers that know no scale."""
    rest = [p for p in net.parameters() if p is not weight]
    return [{"params": rest}, {"params": [weight], "lr": scale * LR}]


def ours(**options: object) -> Callable[[Copier], torch.optim.Optimizer]:
    """This package's Adam with its defaults, but for the scale."""

    def build(net: Copier) -> torch.optim.Optimizer:
        mark_orthogonal(net.rnn, "weight_hh_l0")
        return Adam(net.parameters(), lr=LR, orthogonal_lr_scale=0.1, **options)

    return build


def parametrized(net: Copier) -> torch.optim.Optimizer:
    """Cayley parametrization of torch itself, which computes the matrix anew at every use."""
    start = net.rnn.weight_hh_l0.detach().clone()
    parametrizations.orthogonal(net.rnn, "weight_hh_l0", orthogonal_map="cayley")
    net.rnn.weight_hh_l0 = start
    return torch.optim.Adam(apart(net, net.rnn.parametrizations.weight_hh_l0.original, 0.1), lr=LR)


def unconstrained(net: Copier) -> torch.optim.Optimizer:
    """No constraint after the orthogonal start."""
    return torch.optim.Adam(net.parameters(), lr=LR)


RUNS: dict[str, Callable[[Copier], torch.optim.Optimizer]] = {
    "Adam (default)": ours(),
    "Adam, block": ours(second_moment="block"),
    "torch cayley": parametrized,
    "unconstrained": unconstrained,
}


def steps_to_learn(name: str, delay: int, seed: int, limit: int) -> tuple[int | None, float, float]:
    """Steps until learned (None: not within the limit), the largest orthogonality error seen, ms a step."""
    torch.manual_seed(seed)
    net = Copier()
    opt = RUNS[name](net)
    generator = torch.Generator().manual_seed(1000 + seed)
    target = LENGTH * math.log(SYMBOLS) / (delay + 2 * LENGTH) / 2
    losses: list[float] = []
    worst, began = 0.0, time.perf_counter()
    for step in range(1, limit + 1):
        x, y = batch(delay, generator)
        opt.zero_grad()
        loss = F.cross_entropy(net(x).flatten(0, 1), y.flatten())
        loss.backward()
        if name == "unconstrained":
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        opt.step()
        losses.append(loss.item())
        worst = max(worst, orthogonality_error(net.rnn.weight_hh_l0))
        if step >= WINDOW and sum(losses[-WINDOW:]) / WINDOW < target:
            return step, worst, 1000 * (time.perf_counter() - began) / step
    return None, worst, 1000 * (time.perf_counter() - began) / limit


def main() -> None:
    """Print one line a run and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delay", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="one seed, a few steps: does it run?")
    args = parser.parse_args()
    if args.toy:
        args.delay, args.seeds, args.limit = 5, args.seeds[:1], 3
    torch.set_num_threads(args.threads)
    print(f"delay {args.delay}, torch {torch.__version__}, {args.threads} threads")
    print(
        f"{'run':16} {'seed':>4} {'steps to half the baseline':>27} {'largest error':>14} {'ms a step':>10}", flush=True
    )
    for seed in args.seeds:
        for name in args.runs:
            steps, worst, ms = steps_to_learn(name, args.delay, seed, args.limit)
            learned = str(steps) if steps is not None else f"not in {args.limit}"
            print(f"{name:16} {seed:4} {learned:>27} {worst:14.1e} {ms:10.1f}", flush=True)


if __name__ == "__main__":
    main()
