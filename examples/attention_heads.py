"""A vision transformer whose attention logits cannot grow, because the queries and keys of every head are orthogonal.

    pip install ".[examples]"
    python examples/attention_heads.py

What it shows: one line, mark_attention(model, which="qk"), in a model of nn.TransformerEncoderLayers. The logits of a
head are

    x_i' Q' K x_j / sqrt(d_head)

and if the rows of its Q and K are orthonormal, |Q x| <= |x|: no logit is larger than |x_i| |x_j| / sqrt(d_head). Here x
comes out of a layer norm without gain and offset, so that |x|^2 <= d, and there are no biases: the bound is a number,
d / sqrt(d_head), before any training and after any step of it. Without the constraint nothing bounds the logits, and
where they grow attention falls on single tokens, its entropy towards 0; that is known to make transformers diverge
(Zhai et al. 2023).

The same model is trained on Fashion-MNIST with and without the constraint, from the same start, over the same batches,
at a usual learning rate and at ten times that.

What to expect, in one and a half minutes of one core:

- With the constraint no logit passes the bound of 16: the largest is 8 at the learning rate 0.001 and 13 at 0.01. The
  heads are orthogonal to 1e-6.
- Without it they reach 12 and 57, and at 0.01 the entropy of a head falls to 0.9 nats, half of what it is with it.
- Accuracy is the same within chance, 80 to 81 %: the constraint is here for the bound.

More in docs/examples/attention_heads.md.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import (
    BLACK,
    BLUE,
    RED,
    Parser,
    Runs,
    images,
    moving_average,
    panels,
    positive_float,
    positive_int,
    save,
    show,
)
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from manifold_opt import Adam, mark_attention, orthogonality_error, unmark
from manifold_opt.compare.data import Images

FASTER = 10  # the second learning rate, as a multiple of the first
PROBE = 64  # test images on which attention is looked at
WARM_UP = 50  # steps in which the learning rate rises; it falls to 0 at the end


@dataclass(frozen=True)
class Contender:
    """With the constraint or without, and the learning rate."""

    orthogonal: bool
    lr: float

    def __str__(self) -> str:
        """Its name in the progress bar, the table and the picture."""
        return f"{'orthogonal' if self.orthogonal else 'unconstrained'}, {self.lr:g}"


@dataclass
class Result:
    """What one run leaves behind; the losses and seconds of every step, the rest of every few."""

    accuracy: float = math.nan
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    logits: list[float] = field(default_factory=list)  # the largest of any head, in absolute value
    entropies: list[float] = field(default_factory=list)  # of the head with the least, the mean over its tokens
    errors: list[float] = field(default_factory=list)  # of the head that is farthest from orthogonal


class VisionTransformer(nn.Module):
    """Patches, transformer layers with the norm first, and the mean of the tokens."""

    def __init__(self, side: int, patch: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.patch, self.heads = patch, heads
        self.embedding = nn.Linear(patch**2, width)
        self.positions = nn.Parameter(0.02 * torch.randn((side // patch) ** 2, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True, bias=False
            )
            for _ in range(depth)
        )
        for layer in self.layers:  # so that what attention sees has a length of at most sqrt(width)
            layer.norm1 = nn.LayerNorm(width, elementwise_affine=False)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def tokens(self, x: Tensor) -> Tensor:
        """Images ``(batch, side, side)`` to ``(batch, tokens, width)``."""
        patches = x.unfold(1, self.patch, self.patch).unfold(2, self.patch, self.patch)
        return self.embedding(patches.flatten(3).flatten(1, 2)) + self.positions

    def forward(self, x: Tensor) -> Tensor:
        """Ten logits an image."""
        tokens = self.tokens(x)
        for layer in self.layers:
            tokens = layer(tokens)
        return self.head(self.norm(tokens.mean(1)))

    @property
    def bound(self) -> float:
        """No logit of attention is larger, if queries and keys are orthogonal."""
        width = self.positions.shape[1]
        return width / math.sqrt(width / self.heads)


def attention_logits(x: Tensor, weight: Tensor, heads: int) -> Tensor:
    """What softmax is taken of, ``(batch, heads, tokens, tokens)``.

    Args:
        x: what attention sees, ``(batch, tokens, width)``.
        weight: the ``in_proj_weight`` of an nn.MultiheadAttention, ``(3 * width, width)``.
        heads: how many of them.
    """
    queries, keys, _ = (x @ weight.mT).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return queries @ keys.mT / math.sqrt(queries.shape[-1])


def entropy(logits: Tensor) -> Tensor:
    """Of the softmax over the last dimension, in nats."""
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)


@torch.no_grad()
def look(net: VisionTransformer, x: Tensor, result: Result) -> None:
    """Note the logits, entropies and orthogonality errors as they are now."""
    tokens, largest, least, errors = net.tokens(x), [], [], []
    for layer in net.layers:
        weight = layer.self_attn.in_proj_weight
        logits = attention_logits(layer.norm1(tokens), weight, net.heads)
        largest.append(float(logits.abs().max()))
        least.append(float(entropy(logits).mean((0, 2)).min()))
        heads = weight.unflatten(0, (3 * net.heads, -1))[: 2 * net.heads]  # the queries', then the keys'
        errors.append(orthogonality_error(heads))
        tokens = layer(tokens)
    result.logits.append(max(largest))
    result.entropies.append(min(least))
    result.errors.append(max(errors))


def build(contender: Contender, args: argparse.Namespace, side: int) -> tuple[VisionTransformer, torch.optim.Optimizer]:
    """The model at its start and its optimizer."""
    torch.manual_seed(args.seed)
    net = VisionTransformer(side, args.patch, args.width, args.heads, args.depth)
    names = mark_attention(net, which="qk")  # moves every head's Q and K to the nearest orthogonal one
    if not contender.orthogonal:
        for name in names:
            unmark(net.get_parameter(name))  # which stays where it is: both start alike
    return net, Adam(net.parameters(), lr=contender.lr)  # of what is not marked, it is torch's, bit for bit


def batches(data: Images, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images and classes drawn at random, without end; the same for every contender."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data.train
    while True:
        some = torch.randint(len(x), (size,), generator=generator)
        yield x[some], y[some]


def train(contender: Contender, args: argparse.Namespace, data: Images, runs: Runs) -> Result:
    """One training from start to end."""
    net, opt = build(contender, args, data.train[0].shape[-1])
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda n: min(1.0, (n + 1) / WARM_UP) * (1 - n / args.steps))
    advance = runs.begin(str(contender), args.steps // args.every)
    result = Result()
    drawn = itertools.islice(batches(data, args.batch_size, args.seed), args.steps)
    for step, (x, y) in enumerate(drawn, 1):
        start = time.process_time()
        opt.zero_grad()
        loss = F.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        result.seconds.append(time.process_time() - start)
        schedule.step()
        result.losses.append(loss.item())
        if step % args.every == 0:
            look(net, data.test[0][:PROBE], result)
            advance(f"loss {result.losses[-1]:.2f} logit {result.logits[-1]:.0f} error {result.errors[-1]:.0e}")
    with torch.no_grad():
        answers = torch.cat([net(some).argmax(1) for some in data.test[0].split(500)])
    result.accuracy = float((answers == data.test[1]).double().mean())
    return result


def save_plot(results: dict[Contender, Result], args: argparse.Namespace, bound: float, path: Path) -> None:
    """Loss, largest logit and least entropy against the step."""
    figure, (left, middle, right) = panels(3)
    for contender, result in results.items():
        style: dict[str, Any] = {
            "color": BLUE if contender.orthogonal else RED,
            "linestyle": "-" if contender.lr == args.lr else ":",
            "linewidth": 1.6 if contender.lr == args.lr else 2.2,
        }
        steps = [args.every * (k + 1) for k in range(len(result.logits))]
        left.plot(*moving_average(result.losses, 25), label=str(contender), **style)
        middle.plot(steps, result.logits, **style)
        right.plot(steps, result.entropies, **style)
    tokens = (args.side // args.patch) ** 2
    middle.axhline(bound, color=BLACK, linewidth=1, linestyle="--", label=f"bound of orthogonal heads, {bound:g}")
    right.axhline(math.log(tokens), color=BLACK, linewidth=1, linestyle="--")
    right.annotate(f"all {tokens} tokens alike", (args.steps, math.log(tokens)), ha="right", va="bottom")
    left.set(title="Training loss (mean of 25 steps)", xlabel="step", ylabel="cross-entropy", yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    middle.set(title="The largest attention logit", xlabel="step", ylabel="absolute value", yscale="log")
    middle.yaxis.set_major_formatter("{x:g}")
    middle.yaxis.set_minor_formatter("{x:g}")
    right.set(title="Entropy of attention, the least of the heads", xlabel="step", ylabel="nats", ylim=(0, None))
    figure.legend(loc="outside lower center", ncols=5, frameon=False)
    save(figure, path)


def row_of(contender: Contender, result: Result) -> tuple[str, ...]:
    """What the table says of a run."""
    return (
        str(contender),
        f"{result.accuracy:.3f}",
        f"{statistics.fmean(result.losses[-25:]):.3f}",
        f"{max(result.logits):.1f}",
        f"{result.entropies[-1]:.2f}",
        f"{max(result.errors):.1e}",
        f"{1e3 * statistics.median(result.seconds):.1f}",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(__file__, "Train a vision transformer with orthogonal queries and keys, and without.")
    add = parser.add_argument
    add("--data", type=Path, help="folder of the four files of Fashion-MNIST, if it is not Debian's")
    add("--steps", type=positive_int, default=500, help="of training (%(default)s)")
    add("--batch-size", type=positive_int, default=64, help="images a step (%(default)s)")
    add("--lr", type=positive_float, default=1e-3, help=f"the lower rate; {FASTER} times it is the other (%(default)s)")
    add("--patch", type=positive_int, default=4, help="side of a patch (%(default)s)")
    add("--width", type=positive_int, default=64, help="of a token (%(default)s)")
    add("--heads", type=positive_int, default=4, help="of a layer (%(default)s)")
    add("--depth", type=positive_int, default=2, help="layers (%(default)s)")
    add("--every", type=positive_int, default=10, help="steps from one look at attention to the next (%(default)s)")
    toy = {"steps": 20, "width": 16, "heads": 2, "batch_size": 16}
    full = {"steps": 20_000, "width": 192, "heads": 6, "depth": 6, "batch_size": 128, "every": 50}
    args = parser.parse(argv, toy=toy, full=full)
    if args.width % args.heads:
        parser.error(f"argument --heads: must divide the width {args.width}, got {args.heads}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    """Train every contender; print the table, save the plot."""
    args = parse(argv)
    data = images(args.data, toy=args.toy)
    args.side = data.train[0].shape[-1]
    bound = VisionTransformer(args.side, args.patch, args.width, args.heads, args.depth).bound
    print(
        f"{data.title}; {args.depth} layers, width {args.width}, {args.heads} heads, {args.steps} steps, "
        f"seed {args.seed}; bound of the logits {bound:g}"
    )
    contenders = [Contender(orthogonal, lr) for lr in (args.lr, FASTER * args.lr) for orthogonal in (False, True)]
    with Runs() as runs:
        results = {contender: train(contender, args, data, runs) for contender in contenders}
    show(
        ("queries and keys,\nlearning rate", "accuracy", "final\nloss", "largest\nlogit", "least\nentropy",
         "largest\nerror", "ms a\nstep"),
        (row_of(contender, result) for contender, result in results.items()),
        caption="logit, error: the largest of any head, of any step looked at; entropy: at the end; step: CPU time",
    )  # fmt: skip
    save_plot(results, args, bound, args.plot)


if __name__ == "__main__":
    main()
