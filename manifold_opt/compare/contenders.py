"""Who is compared: this package's retractions, and through thin adapters what else a user might take.

All get a copy of one model and move its marked parameters at the same effective step: where a library's learning rate
means another length than ours, the adapter corrects it, and ``Contender.note`` says how. Found by measuring the first
steps, along random gradients, of each.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.optimizer import Optimizer

from .. import RETRACTIONS, SGD, Adam, Orthogonal, constraint_of

LONE = 128  # rows from which on other libraries get one tensor a matrix on a CPU


@dataclass(frozen=True)
class Settings:
    """What is the same for all contenders.

    Attributes:
        optimizer: ``"adam"`` or ``"sgd"``, which is without momentum: every library carries that along differently.
        lr: of all parameters.
        orthogonal_lr_scale: that of marked ones as a multiple of it.
        metric: ``"euclidean"`` or ``"canonical"``: whose gradient is followed.
        second_moment: of our Adam, ``"element"`` or ``"block"``.
        penalty: weight of ||I - W W^T||_F^2, summed over blocks, in the scheme of that name.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    orthogonal_lr_scale: float = 1.0
    metric: str = "euclidean"
    second_moment: str = "element"
    penalty: float = 0.1

    @property
    def orthogonal_lr(self) -> float:
        """Learning rate of marked parameters."""
        return self.lr * self.orthogonal_lr_scale


@dataclass
class Contender:
    """One scheme at work on its own copy of a model.

    Attributes:
        model: that copy.
        optimizers: what steps its parameters.
        matrices: the blocks that are to be orthogonal as they are now, ``(B, p, n)`` each, wide, gain divided out.
        penalty: what is added to the loss.
        note: what was corrected.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    matrices: Callable[[], list[Tensor]]
    penalty: Callable[[], Tensor] | None = None
    note: str = ""

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for opt in self.optimizers:
            opt.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, and of what is added to it."""
        (loss if self.penalty is None else loss + self.penalty()).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Move along them, and wait until that is done."""
        for opt in self.optimizers:
            opt.step()
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def counts(self) -> tuple[float, float]:
        """How often the step of a block was shortened, and how often not made."""
        metrics = [opt.metrics() for opt in self.optimizers if isinstance(opt, (SGD, Adam))]
        return sum(m["clamped_steps"] for m in metrics), sum(m["skipped_blocks"] for m in metrics)


@dataclass
class Place:
    """Where a marked parameter hangs, several places if it is tied, and what it was marked with."""

    owners: list[tuple[nn.Module, str]]
    parameter: nn.Parameter
    constraint: Orthogonal

    def blocks(self) -> Tensor:
        """Return its blocks divided by their gain, ``(B, p, n)``, wide."""
        count, dim = self.constraint.blocks, self.constraint.dim
        matrix = self.parameter.flatten(1) if self.parameter.ndim > 2 else self.parameter
        blocks = torch.stack(matrix.chunk(count, dim)) / self.constraint.gain  # type: ignore[arg-type]
        return blocks if blocks.shape[-2] <= blocks.shape[-1] else blocks.mT

    def is_square(self) -> bool:
        """Whether they are."""
        _, p, n = self.blocks().shape
        return p == n


def places(model: nn.Module) -> list[Place]:
    """The marked parameters of a model, each once."""
    found: dict[int, Place] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            constraint = constraint_of(parameter)
            if constraint is not None:
                if (
                    not isinstance(constraint, Orthogonal)
                    or constraint != Orthogonal(constraint.blocks, constraint.dim, constraint.gain)
                    or isinstance(constraint.blocks, tuple)
                ):
                    raise ValueError(
                        f"compare: {leaf} of {type(module).__name__} is marked as {constraint}; only parameters that "
                        "are orthogonal all over, in equal blocks, can be handed to every scheme and peer."
                    )
                found.setdefault(id(parameter), Place([], parameter, constraint)).owners.append((module, leaf))
    return list(found.values())


def retraction(name: str, model: nn.Module, settings: Settings) -> Contender:
    """An optimizer of this package."""
    rule = Adam if settings.optimizer == "adam" else SGD
    options: dict[str, object] = {
        "orthogonal_lr_scale": settings.orthogonal_lr_scale,
        "retraction": name,
        "metric": settings.metric,
    }
    if settings.optimizer == "adam":
        options["second_moment"] = settings.second_moment
    opt = rule(model.parameters(), lr=settings.lr, **options)  # type: ignore[arg-type]
    return Contender(model, [opt], functools.partial(_as_they_are, places(model)))


def unconstrained(model: nn.Module, settings: Settings) -> Contender:
    """torch.optim's own, and nothing that keeps the blocks orthogonal."""
    marked = places(model)
    groups = [{"params": [place.parameter for place in marked], "lr": settings.orthogonal_lr}]
    return Contender(model, _plain(model, marked, settings, groups), functools.partial(_as_they_are, marked))


def penalty(model: nn.Module, settings: Settings) -> Contender:
    """The same with a soft penalty on the distance from orthogonality."""
    contender = unconstrained(model, settings)
    marked = places(model)

    def distance() -> Tensor:
        return settings.penalty * sum((_defect(place.blocks()).square().sum() for place in marked), torch.zeros(()))

    contender.penalty = distance
    contender.note = f"adds {settings.penalty:g} ||I - W W^T||^2 a block to its loss; the loss shown is without it"
    return contender


def geoopt(model: nn.Module, settings: Settings) -> Contender:
    """RiemannianAdam or RiemannianSGD of geoopt, on the transposes: it wants orthonormal columns."""
    geoopt = importlib.import_module("geoopt")
    canonical = settings.metric == "canonical"
    manifold = geoopt.Stiefel(canonical=canonical)
    marked = places(model)
    held = [
        Held(place, tall=True, wrap=functools.partial(geoopt.ManifoldParameter, manifold=manifold)) for place in marked
    ]
    adam = settings.optimizer == "adam"

    def factor(place: Place) -> float:
        if not adam:
            return 0.5 if canonical else 1.0
        return math.sqrt(place.blocks()[0].numel() / (2 if canonical else 1))

    made = (geoopt.optim.RiemannianAdam if adam else geoopt.optim.RiemannianSGD)(
        _groups(held, settings, factor), lr=settings.lr
    )
    reason = (
        "its Adam makes a step one long, torch's an entry of it" if adam else "its canonical gradient turns further"
    )
    note = _note(marked, factor, reason)
    return _computed(model, marked, held, [made, *_plain(model, marked, settings, [])], note)


def pogo(model: nn.Module, settings: Settings) -> Contender:
    """POGO, with its vector Adam or its SGD."""
    base = importlib.import_module("pogo.base")
    marked = places(model)
    held = [Held(place) for place in marked]
    adam, canonical = settings.optimizer == "adam", settings.metric == "canonical"

    def factor(place: Place) -> float:
        doubled = canonical or not (adam or place.is_square())
        return (math.sqrt(2 * place.blocks()[0].numel()) if adam else 1.0) * (2.0 if doubled else 1.0)

    rule = base.VectorAdam() if adam else base.SGD()
    made = importlib.import_module("pogo").POGO(_groups(held, settings, factor), rule, settings.lr)
    reason = (
        "its Adam makes a gradient one long, of which the tangent is a part" if adam else "its field is half as long"
    )
    note = _note(marked, factor, reason)
    return _computed(model, marked, held, [made, *_plain(model, marked, settings, [])], note)


def parametrized(constrain: Callable[[nn.Module], object], model: nn.Module, settings: Settings) -> Contender:
    """A parametrization: the blocks are computed from what torch.optim moves."""
    marked = places(model)
    held = [Held(place) for place in marked]
    for piece in (piece for one in held for piece in one.pieces):
        start = piece.get_parameter("weight").detach().clone()
        constrain(piece)
        piece.weight = start
    adam, canonical = settings.optimizer == "adam", settings.metric == "canonical"

    def factor(place: Place) -> float:
        """The skew matrix underneath moves both of its triangles at once."""
        if not place.is_square() or canonical is not adam:
            return 1.0
        return 2.0 if adam else 0.5

    note = _note(marked, factor, "the skew matrix underneath moves both of its triangles at once")
    cached = "computed once a step, under torch.nn.utils.parametrize.cached()"
    made = _plain(model, marked, settings, _groups(held, settings, factor))
    return _computed(model, marked, held, made, "; ".join(filter(None, (note, cached))))


def geotorch(model: nn.Module, settings: Settings) -> Contender:
    """geotorch.orthogonal with its defaults."""
    orthogonal = importlib.import_module("geotorch").orthogonal
    return parametrized(lambda module: orthogonal(module, "weight"), model, settings)


def torch_orthogonal(model: nn.Module, settings: Settings) -> Contender:
    """torch.nn.utils.parametrizations.orthogonal by the Cayley map, a gate at a time as its users write it."""
    return parametrized(lambda module: parametrizations.orthogonal(module, "weight", "cayley"), model, settings)


Build = Callable[[nn.Module, Settings], Contender]
PEERS: dict[str, Build] = {
    "geoopt": geoopt,
    "pogo": pogo,
    "torch": torch_orthogonal,
    "geotorch": geotorch,
    "penalty": penalty,
    "unconstrained": unconstrained,
}


def build(scheme: str, model: nn.Module, settings: Settings) -> Contender:
    """A scheme by its name: one of RETRACTIONS or of PEERS."""
    if scheme in RETRACTIONS:
        return retraction(scheme, model, settings)
    return PEERS[scheme](model, settings)


class Piece(nn.Module):
    """Some of the blocks of a parameter, as one tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight


class Held(nn.Module):
    """The blocks of a marked parameter as tensors of another library, ``(B, p, n)``, and the way back.

    One tensor, but for large matrices on a CPU: there torch's batched LU, which some maps use, is wrong once a number
    of threads has been set (pytorch#142815), and a matrix at a time is as fast.
    """

    def __init__(self, place: Place, *, tall: bool = False, wrap: Callable[[Tensor], Tensor] = nn.Parameter) -> None:
        super().__init__()
        self.place, self.tall = [place], tall  # in a list: it is no submodule
        blocks = place.blocks().detach()
        blocks = (blocks.mT if tall else blocks).clone(memory_format=torch.contiguous_format)
        lone = blocks.device.type == "cpu" and min(blocks.shape[-2:]) >= LONE
        parts = torch.split(blocks, 1 if lone else len(blocks))
        self.pieces = nn.ModuleList(Piece(wrap(part.clone())) for part in parts)

    def blocks(self) -> Tensor:
        """The blocks as they are now, wide."""
        weights: list[Tensor] = [piece.weight for piece in self.pieces]  # type: ignore[misc]
        blocks = weights[0] if len(weights) == 1 else torch.cat(weights)
        return blocks.mT if self.tall else blocks

    def forward(self, original: Tensor) -> Tensor:
        """The weight that the model computes with, shaped as it was."""
        constraint, blocks = self.place[0].constraint, self.blocks()
        blocks = blocks if constraint.gain == 1 else constraint.gain * blocks
        rows = original.shape[0] // (len(blocks) if constraint.dim == 0 else 1)
        lying = blocks if blocks.shape[-2] == rows else blocks.mT
        return (lying if constraint.dim == 0 else lying.movedim(0, 1)).reshape(original.shape)


def _computed(
    model: nn.Module, marked: list[Place], held: list[Held], optimizers: list[Optimizer], note: str
) -> Contender:
    """A model whose marked parameters are computed from what others hold."""
    for place, source in zip(marked, held, strict=True):
        place.parameter.requires_grad_(False)
        for module, leaf in place.owners:
            parametrize.register_parametrization(module, leaf, source, unsafe=True)
    return Contender(model, optimizers, lambda: [source.blocks().detach() for source in held], note=note)


def _groups(held: list[Held], settings: Settings, factor: Callable[[Place], float]) -> list[dict[str, object]]:
    """A parameter group each, at its own learning rate.

    What is held is the weight without its gain, its gradient so much longer; ours moves by lr / gain.
    """
    power = 1 if settings.optimizer == "adam" else 2
    rates = [settings.orthogonal_lr * factor(one.place[0]) / one.place[0].constraint.gain ** power for one in held]
    return [{"params": list(one.parameters()), "lr": lr} for one, lr in zip(held, rates, strict=True)]


def _note(marked: list[Place], factor: Callable[[Place], float], reason: str) -> str:
    """By what learning rates were multiplied, and why; nothing if by one."""
    factors = {f"{p} x {n}": factor(place) for place in marked for _, p, n in (place.blocks().shape,)}
    said = ", ".join(f"{value:.3g} ({shape})" for shape, value in factors.items() if value != 1)
    return f"lr times {said}, for its steps to be as long as ours: {reason}" if said else ""


def _plain(
    model: nn.Module, marked: list[Place], settings: Settings, groups: list[dict[str, object]]
) -> list[Optimizer]:
    """torch.optim's own for groups and all parameters that are not marked; none if there are none."""
    taken = {id(place.parameter) for place in marked}
    rest = [p for p in model.parameters() if id(p) not in taken]
    groups = groups + [{"params": rest}] * bool(rest)
    rule = torch.optim.Adam if settings.optimizer == "adam" else torch.optim.SGD
    return [rule(groups, lr=settings.lr)] if groups else []


def _as_they_are(marked: list[Place]) -> list[Tensor]:
    return [place.blocks().detach() for place in marked]


def _defect(blocks: Tensor) -> Tensor:
    return torch.eye(blocks.shape[-2], dtype=blocks.dtype, device=blocks.device) - blocks @ blocks.mT
