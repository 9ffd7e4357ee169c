"""A tree tensor network on Fashion-MNIST: Adam without a constraint beside Riemannian Adam on isometric cores.

    python benchmarks/reproduced/tree_tensor_network.py

The task of *Stochastic Optimization of Tree Tensor Networks* (Willner et al. 2026, arXiv 2609.00870): images of 16 x
16, the features (1, x) / sqrt(1 + x^2) of every pixel, a balanced binary tree of bond 16 with a free root of ten
classes, squared error, batches of 256, Adam at 1e-3 and Riemannian Adam at 0.03. The norm of the whole tensor is
measured after every epoch; at the end, what is left of the accuracy when all bonds are cut to fewer dimensions.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from entry import Parser, spread, write
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from manifold_opt import Adam, mark_orthogonal, orthogonality_error
from manifold_opt.compare.data import Images

from common import BLACK, BLUE, ORANGE, RED, images, one_of, panels, positive_float, positive_int, save, show  # isort: skip

BONDS = (16, 12, 8, 6, 4)  # to which a trained tree is cut


def features(x: Tensor) -> Tensor:
    """Unit vectors ``(sites, batch, 2)`` of pixels ``(batch, rows, columns)``, row by row."""
    x = x.flatten(1).mT
    return torch.stack((torch.ones_like(x), x), -1) / (1 + x.square()).sqrt().unsqueeze(-1)


def pairs(h: Tensor) -> Tensor:
    """Products of neighbours, ``(sites / 2, batch, d^2)`` of ``(sites, batch, d)``."""
    return (h[0::2].unsqueeze(-1) * h[1::2].unsqueeze(-2)).flatten(-2)


def contract(x: Tensor, cores: Sequence[Tensor]) -> Tensor:
    """Class scores ``(batch, classes)`` of features, level by level; cores are ``(nodes, k, d^2)``."""
    for core in cores:
        x = pairs(x) @ core.mT
    return x[0]


class Tree(nn.Module):
    """One parameter a level, of its cores one below the other, ``(nodes * k, d^2)``; the last one is the root."""

    def __init__(self, sites: int, bond: int, classes: int) -> None:
        super().__init__()
        self.levels, d = nn.ParameterList(), 2
        self.nodes = [sites >> level for level in range(1, sites.bit_length())]
        for nodes in self.nodes:
            k = classes if nodes == 1 else min(bond, d * d)
            self.levels.append(nn.Parameter(torch.empty(nodes * k, d * d)))
            d = k

    def cores(self) -> list[Tensor]:
        """Views ``(nodes, k, d^2)``."""
        return [level.unflatten(0, (nodes, -1)) for level, nodes in zip(self.levels, self.nodes, strict=True)]

    def forward(self, x: Tensor) -> Tensor:
        """Scores ``(batch, classes)`` of images."""
        return contract(features(x), self.cores())


@torch.no_grad()
def start_(tree: Tree, x: Tensor, y: Tensor, ridge: float = 1e-6) -> None:
    """Cores from the data, without their classes, and a root by least squares (Stoudenmire 2018, arXiv 1801.00315).

    A core has the leading eigenvectors of the covariance of its pair of branches, in the mean over the images of the
    product of all features; so each image counts by the squared norms of all other branches.
    """
    h = features(x.double())
    cores = tree.cores()
    for core in cores[:-1]:
        logs = h.square().sum(-1).clamp_min(1e-300).log()
        others = logs.sum(0) - logs[0::2] - logs[1::2]
        weights = (others - others.amax(1, keepdim=True)).exp()
        z = pairs(h)
        covariance = torch.stack([z_i.mT @ (z_i * w_i.unsqueeze(-1)) for z_i, w_i in zip(z, weights, strict=True)])
        basis = torch.linalg.eigh(covariance)[1][..., -core.shape[1] :]
        core.copy_(basis.mT)
        h = z @ basis
    z = pairs(h)[0]
    gram = z.mT @ z
    gram.diagonal().add_(ridge * gram.trace() / len(gram))
    cores[-1].copy_(torch.linalg.solve(gram, z.mT @ F.one_hot(y, cores[-1].shape[1]).double()).mT)


@torch.no_grad()
def isometric(cores: Sequence[Tensor]) -> tuple[list[Tensor], float]:
    """The same function, up to a factor, by cores with orthonormal rows and a root of norm one; log10 of the factor.

    The factor is the norm of the whole tensor. A QR factor of every core is moved into the core above it.
    """
    found, factors, log = [], None, 0.0
    for core in cores:
        core = core.double()
        if factors is not None:
            d = factors.shape[-1]
            halves = core.unflatten(-1, (d, d))
            core = torch.einsum("nkab,nac,nbd->nkcd", halves, factors[0::2], factors[1::2]).flatten(-2)
        if len(core) > 1:
            q, r = torch.linalg.qr(core.mT)
            size = torch.linalg.matrix_norm(r, keepdim=True)
            log += float(size.log10().sum())
            found.append(q.mT)
            factors = (r / size).mT
        else:
            size = torch.linalg.vector_norm(core)
            found.append(core / size)
            log += float(size.log10())
    return found, log


@torch.no_grad()
def cut(cores: Sequence[Tensor], bond: int) -> list[Tensor]:
    """Isometric cores with every bond cut to the ``bond`` largest Schmidt vectors, all at once."""
    bases: list[Tensor | None] = [None] * len(cores)
    outside = torch.eye(cores[-1].shape[1], dtype=torch.float64).unsqueeze(0)
    for level in range(len(cores) - 1, 0, -1):
        d = cores[level - 1].shape[1]
        core = cores[level].unflatten(-1, (d, d))
        left = torch.einsum("nkl,nkab,nlcb->nac", outside, core, core)
        right = torch.einsum("nkl,nkab,nlac->nbc", outside, core, core)
        outside = torch.stack((left, right), 1).flatten(0, 1)
        bases[level - 1] = torch.linalg.eigh(outside)[1][..., -bond:]
    found = []
    for level, core in enumerate(cores):
        below, above = bases[level - 1] if level else None, bases[level]
        if below is not None:
            core = core.unflatten(-1, (below.shape[1],) * 2)
            core = torch.einsum("nkab,nac,nbd->nkcd", core, below[0::2], below[1::2]).flatten(-2)
        found.append(core if above is None else above.mT @ core)
    return found


@torch.no_grad()
def accuracy(cores: Sequence[Tensor], x: Tensor, y: Tensor) -> float:
    """The part of the images named right."""
    parts = zip(x.split(1000), y.split(1000), strict=True)
    right = sum(int((contract(features(some.to(cores[0].dtype)), cores).argmax(1) == of).sum()) for some, of in parts)
    return right / len(x)


def unconstrained(tree: Tree, args: Any) -> torch.optim.Optimizer:
    """The paper's Adam."""
    return torch.optim.Adam(tree.parameters(), args.lr)


def riemannian(tree: Tree, args: Any) -> torch.optim.Optimizer:
    """The paper's Riemannian Adam: one second moment a core, steps of Frobenius length ``lr``.

    This package's steps have the length torch's would have, lr times the root of the number of entries.
    """
    for level, nodes in zip(tree.levels[:-1], tree.nodes[:-1], strict=True):
        mark_orthogonal(level, blocks=nodes)
    rates = [args.lr_riemannian / math.sqrt(core[0].numel()) for core in tree.cores()]
    groups = [{"params": [level], "lr": lr} for level, lr in zip(tree.levels, rates, strict=True)]
    return Adam(groups, second_moment="block")


def default(tree: Tree, args: Any) -> torch.optim.Optimizer:
    """This package's Adam as it comes, at the learning rate of the unconstrained one."""
    for level, nodes in zip(tree.levels[:-1], tree.nodes[:-1], strict=True):
        mark_orthogonal(level, blocks=nodes)
    return Adam(tree.parameters(), args.lr)


def fast_root(tree: Tree, args: Any) -> torch.optim.Optimizer:
    """The same, with a rate of its own for the free root, whose entries are about 10 at the start."""
    opt = default(tree, args)
    (group,) = opt.param_groups
    root = group["params"].pop()
    opt.add_param_group({"params": [root], "lr": args.lr_root})
    return opt


CONTENDERS = {
    "torch Adam": (unconstrained, BLACK),
    "ours: block": (riemannian, BLUE),
    "ours: element": (default, RED),
    "ours: fast root": (fast_root, ORANGE),
}


def train(name: str, seed: int, args: Any, data: Images) -> dict[str, Any]:
    """One run, measured after every epoch."""
    (x, y), test = data.train, data.test
    torch.manual_seed(seed)
    tree = Tree(x.shape[-1] ** 2, args.bond, 10)
    some = torch.randperm(len(x))[: args.start_images]
    start_(tree, x[some], y[some])
    opt = CONTENDERS[name][0](tree, args)
    row: dict[str, Any] = {"run": name, "seed": seed, "loss": [], "accuracy": [], "log_norm": [], "error": 0.0}
    row["accuracy"].append(accuracy(tree.cores(), *test))
    row["log_norm"].append(isometric(tree.cores())[1])
    spent = 0.0
    for epoch in range(args.epochs):
        began, losses = time.process_time(), []
        for batch in torch.randperm(len(x)).split(args.batch_size):
            opt.zero_grad()
            loss = (tree(x[batch]) - F.one_hot(y[batch], 10)).square().sum(1).mean()
            loss.backward()
            opt.step()
            losses.append(loss.item())
        spent += time.process_time() - began
        cores, log_norm = isometric(tree.cores())
        row["loss"].append(statistics.fmean(losses))
        row["accuracy"].append(accuracy(tree.cores(), *test))
        row["log_norm"].append(log_norm)
        marked = [core.detach() for core in tree.cores()[:-1]]
        row["error"] = max(row["error"], *map(orthogonality_error, marked))
        print(
            f"{name}, seed {seed}, epoch {epoch + 1}: {row['accuracy'][-1]:.4f}, log10 norm {log_norm:.2f}", flush=True
        )
    row["cut"] = {bond: accuracy([core.float() for core in cut(cores, bond)], *test) for bond in args.bonds}
    row["cpu_ms"] = 1000 * spent / (args.epochs * math.ceil(len(x) / args.batch_size))
    return row


def draw(rows: list[dict[str, Any]], args: Any) -> None:
    """Accuracy and norm against the epoch, and accuracy against the bond to which the tree is cut."""
    figure, (left, middle, right) = panels(3, width=3.5, height=3.3)
    for row in rows:
        color = CONTENDERS[row["run"]][1]
        label = row["run"] if row["seed"] == args.seeds[0] else None
        left.plot(row["accuracy"], color=color, label=label, linewidth=1.2)
        middle.plot(row["log_norm"], color=color, linewidth=1.2)
        right.plot(list(row["cut"]), list(row["cut"].values()), ".-", color=color, linewidth=1.2)
    left.set(title="Test accuracy", xlabel="epoch")
    middle.set(title="log10 norm of the tensor", xlabel="epoch")
    right.set(title="Test accuracy, bonds cut", xlabel="bond")
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    save(figure, args.plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Train all contenders with all seeds; print the table, save figures and picture."""
    parser = Parser(__file__, "A tree tensor network on Fashion-MNIST, with and without isometric cores.")
    add = parser.add_argument
    add("--data", type=Path, help="folder of the four files of Fashion-MNIST, if it is not Debian's")
    add("--epochs", type=positive_int, default=6, help="passes over the training images (%(default)s)")
    add("--batch-size", type=positive_int, default=256, help="images a step (%(default)s)")
    add("--bond", type=positive_int, default=16, help="largest dimension of a bond (%(default)s)")
    add("--side", type=positive_int, default=16, help="pixels of a side, a power of two (%(default)s)")
    add("--start-images", type=positive_int, default=10_000, help="that the start is made from (%(default)s)")
    add("--lr", type=positive_float, default=1e-3, help="of Adam (%(default)s)")
    add("--lr-riemannian", type=positive_float, default=0.03, help="length of a block step (%(default)s)")
    add("--lr-root", type=positive_float, default=0.03, help="of the root in the run of that name (%(default)s)")
    add("--runs", type=one_of(CONTENDERS, "run"), default=",".join(CONTENDERS), help="comma list (%(default)s)")
    args = parser.parse(argv, toy={"epochs": 1, "bond": 4, "side": 8, "start_images": 500, "batch_size": 128})
    args.bonds = [bond for bond in BONDS if bond <= args.bond]
    raw = images(args.data, toy=args.toy)
    splits = []
    for x, y in (raw.train, raw.test):
        x, y = (x[:2000], y[:2000]) if args.toy else (x, y)
        size = (args.side, args.side)
        splits.append((F.interpolate(x.unsqueeze(1), size, mode="bilinear", antialias=True).squeeze(1), y))
    data = Images(raw.name, raw.title, *splits)
    print(f"{data.title}, at {args.side} x {args.side}; bond {args.bond}, {args.epochs} epochs")
    rows: list[dict[str, Any]] = []
    for seed in args.seeds:
        for name in args.runs:
            rows.append(train(name, seed, args, data))
            write(args, rows)
    table = []
    for name in args.runs:
        mine = [row for row in rows if row["run"] == name]
        columns = [[100 * row["accuracy"][-1] for row in mine], [row["log_norm"][-1] for row in mine]]
        columns += [[100 * row["cut"][bond] for row in mine] for bond in args.bonds[1:4]]
        columns.append([row["cpu_ms"] for row in mine])
        table.append((name, *map(spread, columns), f"{max(row['error'] for row in mine):.1e}"))
    cuts = [f"cut to {bond}" for bond in args.bonds[1:4]]
    show(("optimizer", "test %", "log10 norm", *cuts, "CPU ms", "largest error"), table)
    draw(rows, args)


if __name__ == "__main__":
    main()
