"""Copying memory: how many steps until an RNN remembers across a delay, for several ways to keep it orthogonal.

    python benchmarks/copying.py --delay 100 --seeds 0 1 2

The net, the task and the contenders are those of examples/copying_memory.py, over several seeds, with two settings more
of this package's Adam. A run has learned when the mean loss of 20 batches is under half of the 10 ln 8 / (delay + 20)
that answering without memory costs. Everything but the way the recurrent matrix is trained is the same: Henaff's start,
batches of 64, Adam at lr 1e-3, a tenth of it for the recurrent matrix. (The run called unconstrained takes 1e-3 for
all; it and "unconstrained slow", which does not, clip their gradients to norm 1.) Runs called "Adam, 3e-4" or "Muon,
3e-3" have this learning rate for the recurrent matrix, with Adam for everything else.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).parents[1] / "examples"))

from copying_memory import CONTENDERS, Build, Contender, Copier, learn, ours

from manifold_opt import Adam, Muon, mark_orthogonal


def at_rate(rule: type[Adam] | type[Muon], rate: float) -> Build:
    """Train the recurrent matrix with ``rule`` at this learning rate, everything else with Adam."""

    def build(net: Copier, lr: float) -> list[torch.optim.Optimizer]:
        weight = mark_orthogonal(net.rnn, "weight_hh_l0")
        rest = [parameter for parameter in net.parameters() if parameter is not weight]
        return [rule([weight], lr=rate), torch.optim.Adam(rest, lr=lr)]

    return build


RUNS = {
    **CONTENDERS,
    "Adam, polar": Contender(ours(retraction="polar")),
    "Adam, block": Contender(ours(second_moment="block")),
    **{f"Adam, {rate:.0e}": Contender(at_rate(Adam, rate)) for rate in (1e-4, 3e-4, 1e-3)},
    **{f"Muon, {rate:.0e}": Contender(at_rate(Muon, rate)) for rate in (1e-3, 3e-3, 1e-2)},
}


def main() -> None:
    """Print one line a run and seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--delay", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--limit", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--toy", action="store_true", help="one seed, a few steps: does it run?")
    args = parser.parse_args()
    if args.toy:
        args.delay, args.seeds, args.limit = 5, args.seeds[:1], 3
    torch.set_num_threads(args.threads)
    print(f"delay {args.delay}, torch {torch.__version__}, {args.threads} threads")
    print(
        f"{'run':18} {'seed':>4} {'steps to half the baseline':>27} {'largest error':>14} {'ms a step':>10}", flush=True
    )
    for seed in args.seeds:
        for name in args.runs:
            run = learn(RUNS[name], delay=args.delay, seed=seed, limit=args.limit, batch_size=args.batch_size)
            learned = str(run.learned) if run.learned else f"not in {args.limit}"
            ms = 1000 * statistics.median(run.seconds)
            print(f"{name:18} {seed:4} {learned:>27} {run.error:14.1e} {ms:10.1f}", flush=True)


if __name__ == "__main__":
    main()
