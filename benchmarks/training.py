"""Whole training steps of an nn.GRU: forward, backward and optimizer, with its gates free or kept orthogonal."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from rounds import Plan, Result, side_by_side
from rows import Contender
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrize

from manifold_opt import Adam, mark_orthogonal

HIDDEN, LENGTH, BATCH, INPUT = (256, 512), 100, 64, 32
TOY_HIDDEN, TOY_LENGTH, TOY_BATCH = (8,), 5, 4
UNCONSTRAINED, OURS, CAYLEY = "torch Adam, unconstrained", "Adam, orthographic", "torch Adam, a Cayley map a gate"


class CayleyGates(nn.Module):
    """Three gates one below the other, each (I + A)^-1 (I - A) of the skew part of its own square."""

    def forward(self, x: Tensor) -> Tensor:
        """Gates ``(3 n, n)`` of any numbers ``(3 n, n)``. One by one: see Problem.pieces in rows.py."""
        identity = torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        skews = [gate - gate.mT for gate in x.chunk(3)]
        return torch.cat([torch.linalg.solve(identity + a, identity - a) for a in skews])


def contender(name: str, hidden: int, length: int, batch: int, dtype: torch.dtype, device: torch.device) -> Contender:
    """A GRU that is trained on noise, the same for every name."""
    torch.manual_seed(0)
    gru = nn.GRU(INPUT, hidden).to(device, dtype)
    x = torch.randn(length, batch, INPUT, dtype=dtype).to(device)
    y = torch.randn(length, batch, hidden, dtype=dtype).to(device)
    computed_once: Callable[[], AbstractContextManager[None]] = nullcontext
    optimizer: torch.optim.Optimizer
    if name == OURS:
        mark_orthogonal(gru.weight_hh_l0, blocks=3)
        optimizer = Adam(gru.parameters(), lr=1e-3)
    else:
        if name == CAYLEY:
            parametrize.register_parametrization(gru, "weight_hh_l0", CayleyGates())
            computed_once = parametrize.cached  # nn.GRU reads the weight several times a forward
        optimizer = torch.optim.Adam(gru.parameters(), lr=1e-3)

    def step() -> None:
        with computed_once():
            F.mse_loss(gru(x)[0], y).backward()
        optimizer.step()

    def weights() -> list[Tensor]:
        return [gru.weight_hh_l0.detach().unflatten(0, (3, hidden))]

    return Contender(lambda _: optimizer.zero_grad(), step, None if name == UNCONSTRAINED else weights)


def measure(plan: Plan, dtype: torch.dtype, toy: bool) -> dict[int, dict[str, Result]]:
    """What was seen of every contender, for every hidden size."""
    sizes, length, batch = (TOY_HIDDEN, TOY_LENGTH, TOY_BATCH) if toy else (HIDDEN, LENGTH, BATCH)
    return {
        hidden: side_by_side(
            {
                name: partial(contender, name, hidden, length, batch, dtype, plan.device)
                for name in (UNCONSTRAINED, OURS, CAYLEY)
            },
            plan,
        )
        for hidden in sizes
    }


def report(sizes: dict[int, dict[str, Result]]) -> list[dict[str, object]]:
    """Print a table, and return its rows."""
    print("\nTraining steps of an nn.GRU: forward, backward and optimizer.", flush=True)
    print(f"{'hidden':>6}  {'row':32} {'ms':>9} {'spread':>8} {'overhead':>9} {'error':>9}")
    rows: list[dict[str, object]] = []
    for hidden, results in sizes.items():
        base = results[UNCONSTRAINED].median
        for name, result in results.items():
            ms, spread = result.median, result.spread
            if ms is None or spread is None:
                print(f"{hidden:6}  {name:32} {result.failure}"[:120], flush=True)
                rows.append({"hidden": hidden, "row": name, "failure": result.failure})
                continue
            overhead = None if base is None else 100 * (ms / base - 1)
            percent = "-" if overhead is None else f"{overhead:.1f} %"
            error = "-" if result.error is None else f"{result.error:.1e}"
            print(f"{hidden:6}  {name:32} {1e3 * ms:9.2f} {1e3 * spread:8.2f} {percent:>9} {error:>9}", flush=True)
            rows.append(
                {
                    "hidden": hidden,
                    "row": name,
                    "ms": 1e3 * ms,
                    "spread_ms": 1e3 * spread,
                    "overhead_percent": overhead,
                    "error": result.error,
                    "failure": None,
                }
            )
    return rows
