"""What benchmarks/step.py compares: works, and one row a way to keep their matrices orthogonal.

Every row gets the same start and the same gradients, and is timed for what a training step pays for the constraint: an
optimizer for its step; a parametrization for its forward, its backward and the Adam step on what lies underneath.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from manifold_opt import RETRACTIONS, SGD, Adam, init, mark_orthogonal

POOL = 16  # gradient sets, taken in turn
FEW = 16  # matrices up to which the floor is also taken one by one
LONE = 128  # rows from which on geoopt and the parametrizations get one tensor a matrix on a CPU


class Work(NamedTuple):
    """So many parameters, each of so many blocks p x n, one below the other."""

    parameters: int
    blocks: int
    p: int
    n: int

    def __str__(self) -> str:
        many = f"{self.parameters} parameter{'s' * (self.parameters != 1)}"
        return f"{many} of {self.blocks} block{'s' * (self.blocks != 1)} {self.p} x {self.n}"


WORKS = {
    "gru256": Work(1, 3, 256, 256),
    "lstm512": Work(1, 4, 512, 512),
    "one1024": Work(1, 1, 1024, 1024),
    "params1000": Work(1000, 1, 32, 64),
    "blocks4096": Work(1, 4096, 16, 16),
    "blocks20000": Work(1, 20000, 3, 3),
    "wide64x4096": Work(1, 1, 64, 4096),
    "one12": Work(1, 1, 12, 12),
    "one48": Work(1, 1, 48, 48),
    "one100": Work(1, 1, 100, 100),
    "gru64": Work(1, 3, 64, 64),
    "wide16x64": Work(1, 1, 16, 64),
    "wide32x512": Work(1, 1, 32, 512),
}
TOYS = {"gru8": Work(1, 3, 8, 8), "params20": Work(20, 1, 3, 6), "blocks50": Work(1, 50, 3, 3)}


class Problem:
    """A work with its start ``(parameters, blocks, p, n)``, and gradients ``(sets, parameters, blocks, p, n)``."""

    def __init__(self, work: Work, lr: float, dtype: torch.dtype, device: torch.device, sets: int = POOL) -> None:
        self.work, self.lr = work, lr
        generator = torch.Generator().manual_seed(0)
        count, blocks, p, n = work
        start = init.orthogonal_(torch.empty(count * blocks * p, n, dtype=dtype), count * blocks, generator=generator)
        self.start = start.view(work).to(device)
        self.gradients = torch.randn(sets, *work, dtype=dtype, generator=generator).to(device)

    @cached_property
    def transposed(self) -> Tensor:
        """The gradients of tall matrices: ``(sets, parameters, blocks, n, p)``."""
        return self.gradients.mT.contiguous()

    @property
    def pieces(self) -> int:
        """How many tensors geoopt and the parametrizations get of a parameter.

        A batch, unless its matrices are large and on a CPU: there torch's batched LU is wrong once a number of
        threads has been set (pytorch#142815), and a matrix at a time is as fast.
        """
        lone = self.start.device.type == "cpu" and min(self.work.p, self.work.n) >= LONE
        return self.work.blocks if lone else 1


@dataclass
class Contender:
    """One row at work.

    Attributes:
        feed: hands over a gradient set, by number; not timed.
        step: what is timed.
        weights: the matrices as they are now, ``(..., p, n)``; None where nothing keeps them orthogonal.
    """

    feed: Callable[[int], None]
    step: Callable[[], object]
    weights: Callable[[], Iterable[Tensor]] | None = None


Build = Callable[[Problem], Contender | None]


def optimized(
    parameters: list[Any], optimizer: torch.optim.Optimizer, gradients: Callable[[], Tensor], shape: tuple[int, ...]
) -> Contender:
    """An optimizer's step on parameters, given their gradients in a shape that is one tensor a parameter."""

    def feed(index: int) -> None:
        sets = gradients()
        for parameter, gradient in zip(parameters, sets[index % len(sets)].view(shape).unbind(), strict=True):
            parameter.grad = gradient

    return Contender(feed, optimizer.step)


def ours(optimizer: type[torch.optim.Optimizer], **options: Any) -> Build:
    """An optimizer of this package."""

    def build(problem: Problem) -> Contender:
        count, blocks, p, n = problem.work
        shape = (count, blocks * p, n)
        parameters = [nn.Parameter(w.clone()) for w in problem.start.view(shape)]
        for parameter in parameters:
            mark_orthogonal(parameter, blocks=blocks)
        made = optimizer(parameters, lr=problem.lr, **options)  # type: ignore[call-arg]
        contender = optimized(parameters, made, lambda: problem.gradients, shape)
        contender.weights = lambda: (w.detach().unflatten(0, (blocks, p)) for w in parameters)
        return contender

    return build


def unconstrained(problem: Problem) -> Contender:
    """torch.optim.Adam, and nothing that keeps the matrices orthogonal."""
    count, blocks, p, n = problem.work
    shape = (count, blocks * p, n)
    parameters = [nn.Parameter(w.clone()) for w in problem.start.view(shape)]
    return optimized(parameters, torch.optim.Adam(parameters, lr=problem.lr), lambda: problem.gradients, shape)


def geoopt_adam(canonical: bool) -> Build:
    """RiemannianAdam of geoopt, on the transposes: it wants orthonormal columns."""

    def build(problem: Problem) -> Contender:
        import geoopt

        count, blocks, p, n = problem.work
        shape = (count * problem.pieces, blocks // problem.pieces, n, p)
        manifold = geoopt.Stiefel(canonical=canonical)
        start = problem.start.mT.reshape(shape)
        parameters = [geoopt.ManifoldParameter(w.clone(), manifold=manifold) for w in start]
        made = geoopt.optim.RiemannianAdam(parameters, lr=problem.lr)
        contender = optimized(parameters, made, lambda: problem.transposed, shape)
        contender.weights = lambda: (w.detach().mT for w in parameters)
        return contender

    return build


def pogo(problem: Problem) -> Contender:
    """POGO with its vector Adam."""
    from pogo import POGO
    from pogo.base import VectorAdam

    parameters = [nn.Parameter(w.clone()) for w in problem.start]
    made = POGO(parameters, lr=problem.lr, base_optimizer=VectorAdam())
    contender = optimized(parameters, made, lambda: problem.gradients, problem.work)
    contender.weights = lambda: (w.detach() for w in parameters)
    return contender


def parametrized(constrain: Callable[[nn.Module], object]) -> Build:
    """A parametrization: the weight is computed, the gradient taken through it, and Adam moves what is underneath."""

    def build(problem: Problem) -> Contender:
        count, blocks, p, n = problem.work
        shape = (count * problem.pieces, blocks // problem.pieces, p, n)
        modules = [nn.Module() for _ in range(shape[0])]
        for module, w in zip(modules, problem.start.view(shape), strict=True):
            module.weight = nn.Parameter(w.clone())
            constrain(module)
        optimizer = torch.optim.Adam([q for module in modules for q in module.parameters()], lr=problem.lr)
        given: list[Tensor] = []

        def feed(index: int) -> None:
            optimizer.zero_grad()
            given[:] = problem.gradients[index % len(problem.gradients)].view(shape).unbind()

        def step() -> None:
            torch.autograd.backward([module.weight for module in modules], given)
            optimizer.step()

        @torch.no_grad()
        def weights() -> list[Tensor]:
            return [module.weight for module in modules]

        return Contender(feed, step, weights)

    return build


def torch_orthogonal(orthogonal_map: str) -> Build:
    """torch.nn.utils.parametrizations.orthogonal."""
    return parametrized(lambda module: parametrizations.orthogonal(module, "weight", orthogonal_map))


def geotorch_orthogonal(problem: Problem) -> Contender | None:
    """geotorch.orthogonal with its defaults. It chooses its own start."""
    import geotorch

    return parametrized(lambda module: geotorch.orthogonal(module, "weight"))(problem)


def floor(one_by_one: bool) -> Build:
    """The bare products of one step, four of p x n by n x p: one torch.bmm each, or a torch.mm a matrix."""

    def build(problem: Problem) -> Contender | None:
        count, blocks, p, n = problem.work
        batch = count * blocks
        if one_by_one and batch > FEW:
            return None
        x = problem.start.view(batch, p, n)
        out = x.new_empty(batch, p, p)
        single, single_out = x.unbind(), out.unbind()
        given: list[Tensor] = []

        def feed(index: int) -> None:
            gradients = problem.gradients[index % len(problem.gradients)].view(batch, p, n).mT
            given[:] = gradients.unbind() if one_by_one else [gradients]

        def step() -> None:
            for _ in range(4):
                if one_by_one:
                    for x_i, given_i, out_i in zip(single, given, single_out, strict=True):
                        torch.mm(x_i, given_i, out=out_i)
                else:
                    torch.bmm(x, given[0], out=out)

        return Contender(feed, step)

    return build


FLOOR, DEFAULT = "floor", "Adam, orthographic"
ROWS: dict[str, Build] = {
    **{f"Adam, {name}": ours(Adam, retraction=name) for name in RETRACTIONS},
    "Adam block": ours(Adam, second_moment="block"),
    "SGD momentum": ours(SGD, momentum=0.9),
    "torch Adam, unconstrained": unconstrained,
    "geoopt, euclidean": geoopt_adam(canonical=False),
    "geoopt, canonical": geoopt_adam(canonical=True),
    "pogo": pogo,
    "torch, cayley": torch_orthogonal("cayley"),
    "torch, matrix_exp": torch_orthogonal("matrix_exp"),
    "torch, householder": torch_orthogonal("householder"),
    "geotorch": geotorch_orthogonal,
    FLOOR: floor(one_by_one=False),
    "floor, one by one": floor(one_by_one=True),
}


def builds(problem: Problem, names: Iterable[str]) -> dict[str, Callable[[], Contender | None]]:
    """The rows of these names, ready to be built for a problem."""
    return {name: partial(ROWS[name], problem) for name in names}
