"""Tasks of the comparison: two problems with known optimum, copying memory, and image classification.

A task creates models and batches from torch's random state only, so that all schemes have the same start and batches.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from .. import init, mark_orthogonal, mark_recurrent
from .data import Images, digits, fashion

Batch = Any
SYMBOLS, LENGTH = 8, 10  # of the copying task: alphabet size and sequence length


@dataclass(frozen=True)
class Task:
    """A training problem.

    Attributes:
        name, title: identifier, and description in one line.
        make_model: returns a model with marked parameters, drawn from torch's random state.
        batches: returns an endless iterator of batches, drawn from torch's random state.
        loss: loss of a model on a batch.
        evaluate: final measure of a model; None takes the mean of the last losses.
        measure: kind of the final measure: ``"gap"``, ``"accuracy"`` or ``"loss"``.
        target: loss at which a run counts as having learned; None if there is none.
        optimum: smallest possible loss; None if it is not known.
        resolution: standard error of the final measure; smaller differences do not count.
        lr, orthogonal_lr_scale, steps: default settings.
    """

    name: str
    title: str
    make_model: Callable[[], nn.Module]
    batches: Callable[[], Iterator[Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    evaluate: Callable[[nn.Module], float] | None = None
    measure: str = "loss"
    target: float | None = None
    optimum: float | None = None
    resolution: float = 0.0
    lr: float = 1e-2
    orthogonal_lr_scale: float = 1.0
    steps: int = 300


class Matrix(nn.Module):
    """Module with one weight of stacked orthogonal blocks."""

    def __init__(self, start: Tensor, blocks: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(start)
        mark_orthogonal(self, "weight", blocks=blocks)


def repeat(batch: Batch) -> Iterator[Batch]:
    """Yield the same batch without end."""
    while True:
        yield batch


def procrustes(size: int | None) -> Task:
    """Return the Procrustes problem: the orthogonal matrix that maps A closest to B. An SVD gives the optimum."""
    n = size or 32
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(n, 2 * n, dtype=torch.float64, generator=generator)
    truth = init.orthogonal_(torch.empty(n, n, dtype=torch.float64), generator=generator)
    b = truth @ a + 0.5 * torch.randn(n, 2 * n, dtype=torch.float64, generator=generator)
    u, _, vh = torch.linalg.svd(b @ a.mT)
    best, det = float((u @ vh @ a - b).square().mean()), int(torch.linalg.slogdet(u @ vh).sign)

    def loss(model: nn.Module, _: Batch) -> Tensor:
        w = _weight(model)
        return (w @ a.to(w) - b.to(w)).square().mean()

    def start() -> nn.Module:
        return Matrix(init.orthogonal_(torch.empty(n, n), det=det))  # in the component of the optimum

    title = f"Procrustes: the {n} x {n} orthogonal W nearest to taking A to B"
    return Task(
        "procrustes", title, start, functools.partial(repeat, None), loss,
        evaluate=functools.partial(_gap, a, b, best), measure="gap", target=best + 1e-3,
        optimum=best, steps=400,
    )  # fmt: skip


def pca(size: int | None) -> Task:
    """Return PCA: the p of 4 p directions with the largest variance. An eigendecomposition gives the optimum."""
    p = size or 16
    n = 4 * p
    generator = torch.Generator().manual_seed(0)
    basis = init.orthogonal_(torch.empty(n, n, dtype=torch.float64), generator=generator)
    spectrum = torch.linspace(1, 0, n, dtype=torch.float64).square()
    covariance = basis * spectrum @ basis.mT
    best = float(spectrum[:p].sum())

    def loss(model: nn.Module, _: Batch) -> Tensor:
        w = _weight(model)
        return 1 - (w @ covariance.to(w) * w).sum() / best

    def gap(model: nn.Module) -> float:
        with torch.no_grad():
            w = _weight(model).cpu().double()
            return float(1 - (w @ covariance.to(w) * w).sum() / best)

    def start() -> nn.Module:
        return Matrix(init.orthogonal_(torch.empty(p, n)))

    title = f"PCA: the {p} directions of most variance among {n}"
    return Task(
        "pca", title, start, functools.partial(repeat, None), loss,
        evaluate=gap, measure="gap", target=1e-2, optimum=0.0, lr=1e-2, steps=400,
    )  # fmt: skip


class Recurrent(nn.Module):
    """Recurrent net with orthogonal gates, and a linear layer on the last state or on each state."""

    def __init__(self, net: nn.RNNBase, outputs: int, *, each: bool, scheme: str) -> None:
        super().__init__()
        self.net, self.head, self.each = net, nn.Linear(net.hidden_size, outputs), each
        gates = {"RNN_RELU": 1, "RNN_TANH": 1, "GRU": 3, "LSTM": 4}[net.mode]
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            elif "weight_hh" in name:
                init.orthogonal_(parameter, gates, scheme=scheme)
            else:
                nn.init.xavier_uniform_(parameter)
        mark_recurrent(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs for sequences ``(time, batch, features)``."""
        states = self.net(x)[0]
        return self.head(states if self.each else states[-1])


def copying(kind: str, size: int | None) -> Task:
    """Return the copying memory task: repeat ten symbols after a delay."""
    hidden, delay = size or 64, 30
    memoryless = LENGTH * math.log(SYMBOLS) / (delay + 2 * LENGTH)

    def batches() -> Iterator[Batch]:
        while True:
            symbols = torch.randint(1, SYMBOLS + 1, (LENGTH, 32))
            x = torch.zeros(delay + 2 * LENGTH, 32, dtype=torch.long)
            y = x.clone()
            x[:LENGTH] = y[-LENGTH:] = symbols
            x[delay + LENGTH - 1] = SYMBOLS + 1
            yield F.one_hot(x, SYMBOLS + 2).to(torch.get_default_dtype()), y

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x).flatten(0, 1), y.flatten())

    def start() -> nn.Module:
        net = nn.RNN(SYMBOLS + 2, hidden, nonlinearity="relu") if kind == "rnn" else nn.GRU(SYMBOLS + 2, hidden)
        return Recurrent(net, SYMBOLS + 1, each=True, scheme="henaff")

    return Task(
        "copying" if kind == "rnn" else "copying-gru",
        f"copying memory across {delay} steps, nn.{kind.upper()} of {hidden} units; without memory {memoryless:.3f}"
        + "; orthogonal weights at a tenth of the lr" * (kind == "rnn"),
        start,
        batches, loss, target=memoryless / 2, lr=1e-3, orthogonal_lr_scale=0.1 if kind == "rnn" else 1.0, steps=800,
    )  # fmt: skip


def images(found: Images, hidden: int, size: int | None) -> Task:
    """Return the classification of images that are read row by row."""
    hidden = size or hidden
    rows, classes = found.train[0].shape[-1], int(found.train[1].max()) + 1

    def batches() -> Iterator[Batch]:
        x, y = found.train
        while True:
            for some in torch.split(torch.randperm(len(x)), 64)[:-1]:
                yield x[some].transpose(0, 1).to(torch.get_default_dtype()), y[some]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return F.cross_entropy(model(x), y)

    def accuracy(model: nn.Module) -> float:
        device = next(model.parameters()).device
        x, y = (tensor.to(device) for tensor in found.test)
        with torch.no_grad():
            answers = [
                model(some.transpose(0, 1).to(torch.get_default_dtype())).argmax(-1) for some in torch.split(x, 1000)
            ]
        return float((torch.cat(answers) == y).double().mean())

    return Task(
        found.name,
        f"{found.title}, read row by row by an nn.GRU of {hidden} units",
        lambda: Recurrent(nn.GRU(rows, hidden), classes, each=False, scheme="haar"),
        batches, loss, evaluate=accuracy, measure="accuracy", target=0.5, lr=3e-3, steps=400,
        resolution=0.5 / math.sqrt(len(found.test[1])),
    )  # fmt: skip


Make = Callable[[int | None, str | None], Task]  # from a size and a data folder, or None for the defaults
TASKS: dict[str, tuple[Make, ...]] = {
    "procrustes": (lambda size, _: procrustes(size),),
    "pca": (lambda size, _: pca(size),),
    "copying": (lambda size, _: copying("rnn", size), lambda size, _: copying("gru", size)),
    "digits": (lambda size, _: images(digits(), 64, size),),
    "fashion": (lambda size, folder: images(fashion(folder), 128, size),),
}


def _weight(model: nn.Module) -> Tensor:
    return model.weight  # type: ignore[return-value]


def _gap(a: Tensor, b: Tensor, best: float, model: nn.Module) -> float:
    with torch.no_grad():
        return float((_weight(model).cpu().double() @ a - b).square().mean()) - best
