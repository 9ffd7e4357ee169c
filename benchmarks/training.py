"""Whole training steps of an nn.GRU: forward, backward and optimizer, with its gates free or kept orthogonal."""

from __future__ import annotations

import itertools

import torch
from timing import Plan, Result
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from manifold_opt import mark_orthogonal
from manifold_opt.compare import compare

HIDDEN, LENGTH, BATCH, INPUT = (256, 512), 100, 64, 32
TOY_HIDDEN, TOY_LENGTH, TOY_BATCH = (8,), 5, 4
NAMES = {
    "unconstrained": "torch Adam, unconstrained",
    "orthographic": "Adam, orthographic",
    "torch": "torch Adam, a Cayley map a gate",
}
STEPS = 10  # per round; the first half is not counted: the first steps of Adam are long


def measure(plan: Plan, *, toy: bool = False) -> list[dict[str, object]]:
    """Train on noise with every method, in turns; print a table, and return its rows."""
    print("\nTraining steps of an nn.GRU: forward, backward and optimizer.", flush=True)
    print(f"{'hidden':>6}  {'row':32} {'ms':>9} {'spread':>8} {'overhead':>9} {'error':>9}")
    sizes, length, batch = (TOY_HIDDEN, TOY_LENGTH, TOY_BATCH) if toy else (HIDDEN, LENGTH, BATCH)
    return [row for hidden in sizes for row in rows(plan, hidden, length, batch)]


def rows(plan: Plan, hidden: int, length: int, batch: int) -> list[dict[str, object]]:
    """The rows of one hidden size."""
    x, y = (torch.randn(length, batch, size, dtype=plan.dtype).to(plan.device) for size in (INPUT, hidden))

    def make_model() -> nn.Module:
        gru = nn.GRU(INPUT, hidden, dtype=plan.dtype)
        mark_orthogonal(gru, "weight_hh_l0")
        return gru

    def loss(gru: nn.Module, _: object) -> Tensor:
        return F.mse_loss(gru(x)[0], y)

    steps = STEPS * plan.rounds
    made = compare(make_model, loss, [None], schemes=tuple(NAMES), steps=steps, seeds=1, device=plan.device)
    found: list[dict[str, object]] = []
    base = None
    for run in made.rows:
        curve = run.curve
        points = itertools.pairwise(zip(curve.step, curve.seconds, strict=True))
        times = [(after - before) / (k - j) for (j, before), (k, after) in points]
        result = Result(times[len(times) // 2 :], failure=run.failure)
        ms, spread, name = result.median, result.spread, NAMES[run.scheme]
        if ms is None or spread is None:
            print(f"{hidden:6}  {name:32} {run.failure}"[:120], flush=True)
            found.append({"hidden": hidden, "row": name, "failure": run.failure})
            continue
        base = ms if run.scheme == "unconstrained" else base
        overhead = None if base is None else 100 * (ms / base - 1)
        percent = "-" if overhead is None else f"{overhead:.1f} %"
        error = f"{run.orthogonality_error:.1e}"
        print(f"{hidden:6}  {name:32} {1e3 * ms:9.2f} {1e3 * spread:8.2f} {percent:>9} {error:>9}", flush=True)
        found.append(
            {
                "hidden": hidden,
                "row": name,
                "ms": 1e3 * ms,
                "spread_ms": 1e3 * spread,
                "overhead_percent": overhead,
                "error": run.orthogonality_error,
                "failure": None,
            }
        )
    return found
