"""Whole training steps: forward, backward and optimizer, with the marked weights free or kept orthogonal."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from timing import Plan, Result
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from manifold_opt import mark_attention, mark_orthogonal, mark_recurrent
from manifold_opt.compare import compare

NAMES = {
    "unconstrained": "torch Adam, unconstrained",
    "orthographic": "Adam, orthographic",
    "torch": "torch Adam, a Cayley map a gate",
}
STEPS = 10  # per round; the first half is not counted: the first steps of Adam are long


@dataclass(frozen=True)
class Work:
    """A model and the shape of a batch.

    Args:
        build: returns the model, its weights marked; its output has the shape of its input, or is a tuple that begins
            so.
        shape: of the input.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def recurrent(layer: type[nn.RNNBase], hidden: int) -> nn.Module:
    """One layer, every gate of its recurrent weight marked."""
    rnn = layer(hidden, hidden)
    mark_recurrent(rnn)
    return rnn


def many(count: int, size: int) -> nn.Module:
    """A net of many small linear layers, all marked."""
    layers = [nn.Linear(size, size) for _ in range(count)]
    for layer in layers:
        mark_orthogonal(layer, "weight")
    return nn.Sequential(*itertools.chain.from_iterable((layer, nn.Tanh()) for layer in layers))


def transformer(layers: int, size: int, heads: int) -> nn.Module:
    """The encoder of a vision transformer; queries, keys and values of every head are marked."""
    layer = nn.TransformerEncoderLayer(size, heads, 4 * size, dropout=0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    mark_attention(encoder, which="qkv")
    return encoder


WORKS = {
    "GRU of 256 units": Work(lambda: recurrent(nn.GRU, 256), (100, 64, 256)),
    "GRU of 512 units": Work(lambda: recurrent(nn.GRU, 512), (100, 64, 512)),
    "LSTM of 512 units": Work(lambda: recurrent(nn.LSTM, 512), (100, 64, 512)),
    "100 layers of 32 x 32": Work(lambda: many(100, 32), (256, 32)),
    "ViT-Tiny encoder": Work(lambda: transformer(12, 192, 3), (4, 197, 192)),
}
TOY = {"GRU of 8 units": Work(lambda: recurrent(nn.GRU, 8), (5, 4, 8))}


def measure(plan: Plan, *, toy: bool = False) -> list[dict[str, object]]:
    """Train on noise with every method, in turns; print a table, and return its rows."""
    print("\nTraining steps: forward, backward and optimizer.", flush=True)
    print(f"{'work':30}  {'row':32} {'ms':>9} {'spread':>8} {'overhead':>9} {'error':>9}")
    return [row for name, work in (TOY if toy else WORKS).items() for row in rows(plan, name, work)]


def rows(plan: Plan, work: str, what: Work) -> list[dict[str, object]]:
    """The rows of one work."""
    x, y = (torch.randn(what.shape, dtype=plan.dtype).to(plan.device) for _ in range(2))

    def make_model() -> nn.Module:
        return what.build().to(plan.dtype)

    def loss(model: nn.Module, _: object) -> Tensor:
        out = model(x)
        return F.mse_loss(out[0] if isinstance(out, tuple) else out, y)

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
            print(f"{work:30}  {name:32} {run.failure}"[:120], flush=True)
            found.append({"work": work, "row": name, "failure": run.failure})
            continue
        base = ms if run.scheme == "unconstrained" else base
        overhead = None if base is None else 100 * (ms / base - 1)
        percent = "-" if overhead is None else f"{overhead:.1f} %"
        error = f"{run.orthogonality_error:.1e}"
        print(f"{work:30}  {name:32} {1e3 * ms:9.2f} {1e3 * spread:8.2f} {percent:>9} {error:>9}", flush=True)
        found.append(
            {
                "work": work,
                "row": name,
                "ms": 1e3 * ms,
                "spread_ms": 1e3 * spread,
                "overhead_percent": overhead,
                "error": run.orthogonality_error,
                "failure": None,
            }
        )
    return found
