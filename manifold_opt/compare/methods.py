"""The compared methods: this package's retractions, and adapters for other libraries.

All methods get a copy of one model and update its marked parameters with the same effective step. If a learning rate
means another step length in a library, the adapter rescales it and ``MethodRun.note`` reports the factor. The factors
were found by measuring the first steps along random gradients.
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

from .. import RETRACTIONS, SGD, Adam, Muon, unmark
from .blocks import ExternalBlocks, MarkedParameter, marked_parameters


@dataclass(frozen=True)
class Settings:
    """Settings that all methods share.

    Attributes:
        optimizer: ``"adam"``, ``"sgd"`` without momentum, which every library transports differently, or ``"muon"``
            for marked parameters and Adam for the others.
        lr: learning rate.
        orthogonal_lr_scale: learning rate of marked parameters, as a multiple of ``lr``.
        metric: metric of the gradient, ``"euclidean"`` or ``"canonical"``.
        second_moment: of this package's Adam, ``"element"`` or ``"block"``.
        penalty: weight of ||I - W W^T||_F^2, summed over blocks, for the scheme ``"penalty"``.
    """

    optimizer: str = "adam"
    lr: float = 1e-3
    orthogonal_lr_scale: float = 1.0
    metric: str = "euclidean"
    second_moment: str = "element"
    penalty: float = 0.1

    @property
    def orthogonal_lr(self) -> float:
        """Return the learning rate of marked parameters."""
        return self.lr * self.orthogonal_lr_scale


@dataclass
class MethodRun:
    """A scheme with its own copy of the model and its optimizers.

    Attributes:
        model: the copy.
        optimizers: optimizers of its parameters.
        matrices: returns the current blocks of the marked parameters, wide ``(B, p, n)``, divided by their gain.
        penalty: returns a term that is added to the loss.
        note: corrections made by the adapter.
    """

    model: nn.Module
    optimizers: list[Optimizer]
    matrices: Callable[[], list[Tensor]]
    penalty: Callable[[], Tensor] | None = None
    note: str = ""

    def zero_grad(self) -> None:
        """Reset all gradients."""
        for opt in self.optimizers:
            opt.zero_grad()

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the loss plus the penalty."""
        (loss if self.penalty is None else loss + self.penalty()).backward()  # type: ignore[no-untyped-call]

    def step(self) -> None:
        """Step all optimizers, and wait for the GPU."""
        for opt in self.optimizers:
            opt.step()
        device = next(self.model.parameters()).device
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def counts(self) -> tuple[float, float]:
        """Return how often the step of a block was shortened, and how often it was skipped."""
        metrics = [opt.metrics() for opt in self.optimizers if isinstance(opt, (SGD, Adam, Muon))]
        return sum(m["clamped_steps"] for m in metrics), sum(m["skipped_blocks"] for m in metrics)


def retraction(name: str, model: nn.Module, settings: Settings) -> MethodRun:
    """Set up an optimizer of this package with the retraction ``name``."""
    rule = Adam if settings.optimizer == "adam" else SGD
    options: dict[str, object] = {
        "orthogonal_lr_scale": settings.orthogonal_lr_scale,
        "retraction": name,
        "metric": settings.metric,
    }
    if settings.optimizer == "adam":
        options["second_moment"] = settings.second_moment
    opt = rule(model.parameters(), lr=settings.lr, **options)  # type: ignore[arg-type]
    return MethodRun(model, [opt], functools.partial(_current_blocks, marked_parameters(model)))


def spectral(model: nn.Module, settings: Settings) -> MethodRun:
    """Set up Muon of this package for the marked parameters, which has its own retraction."""
    marked = marked_parameters(model)
    opt = Muon([param.parameter for param in marked], lr=settings.orthogonal_lr)
    others = _torch_optimizers(model, marked, settings, [])
    return MethodRun(model, [opt, *others], functools.partial(_current_blocks, marked), note=_MUON_NOTE)


def unconstrained(model: nn.Module, settings: Settings) -> MethodRun:
    """Set up an optimizer of torch.optim without any constraint."""
    marked = marked_parameters(model)
    unmark(model)  # or its step would warn that the optimizer ignores a constraint
    parameters = [param.parameter for param in marked]
    matrices = functools.partial(_current_blocks, marked)
    if settings.optimizer == "muon":
        opt = torch.optim.Muon(parameters, lr=settings.orthogonal_lr, weight_decay=0.0)
        return MethodRun(model, [opt, *_torch_optimizers(model, marked, settings, [])], matrices, note=_MUON_NOTE)
    groups: list[dict[str, object]] = [{"params": parameters, "lr": settings.orthogonal_lr}]
    return MethodRun(model, _torch_optimizers(model, marked, settings, groups), matrices)


def penalty(model: nn.Module, settings: Settings) -> MethodRun:
    """Set up an optimizer of torch.optim with a soft penalty on the distance from orthogonality."""
    marked = marked_parameters(model)
    method = unconstrained(model, settings)

    def distance() -> Tensor:
        return settings.penalty * sum(
            (_identity_minus_gram(param.blocks()).square().sum() for param in marked), torch.zeros(())
        )

    method.penalty = distance
    method.note = f"adds {settings.penalty:g} ||I - W W^T||^2 a block to its loss; the loss shown is without it"
    return method


def geoopt(model: nn.Module, settings: Settings) -> MethodRun:
    """Set up RiemannianAdam or RiemannianSGD of geoopt on the transposes, since it requires orthonormal columns."""
    geoopt = importlib.import_module("geoopt")
    canonical = settings.metric == "canonical"
    manifold = geoopt.Stiefel(canonical=canonical)
    marked = marked_parameters(model)
    external = [
        ExternalBlocks(param, tall=True, wrap=functools.partial(geoopt.ManifoldParameter, manifold=manifold))
        for param in marked
    ]
    adam = settings.optimizer == "adam"

    def factor(param: MarkedParameter) -> float:
        if not adam:
            return 0.5 if canonical else 1.0
        return math.sqrt(param.blocks()[0].numel() / (2 if canonical else 1))

    optimizer = (geoopt.optim.RiemannianAdam if adam else geoopt.optim.RiemannianSGD)(
        _groups(external, settings, factor), lr=settings.lr
    )
    reason = (
        "its Adam makes a step one long, torch's an entry of it" if adam else "its canonical gradient turns further"
    )
    note = _note(marked, factor, reason)
    return _parametrize(model, marked, external, [optimizer, *_torch_optimizers(model, marked, settings, [])], note)


def pogo(model: nn.Module, settings: Settings) -> MethodRun:
    """Set up POGO, with its vector Adam or its SGD."""
    base = importlib.import_module("pogo.base")
    marked = marked_parameters(model)
    external = [ExternalBlocks(param) for param in marked]
    adam, canonical = settings.optimizer == "adam", settings.metric == "canonical"

    def factor(param: MarkedParameter) -> float:
        doubled = canonical or not (adam or param.is_square())
        return (math.sqrt(2 * param.blocks()[0].numel()) if adam else 1.0) * (2.0 if doubled else 1.0)

    rule = base.VectorAdam() if adam else base.SGD()
    optimizer = importlib.import_module("pogo").POGO(_groups(external, settings, factor), rule, settings.lr)
    reason = (
        "its Adam makes a gradient one long, of which the tangent is a part" if adam else "its field is half as long"
    )
    note = _note(marked, factor, reason)
    return _parametrize(model, marked, external, [optimizer, *_torch_optimizers(model, marked, settings, [])], note)


def parametrized(constrain: Callable[[nn.Module], object], model: nn.Module, settings: Settings) -> MethodRun:
    """Set up a parametrization, registered by ``constrain``, whose tensors are trained with torch.optim."""
    marked = marked_parameters(model)
    external = [ExternalBlocks(param) for param in marked]
    for chunk in (chunk for one in external for chunk in one.chunks):
        start = chunk.get_parameter("weight").detach().clone()
        constrain(chunk)
        chunk.weight = start
    adam, canonical = settings.optimizer == "adam", settings.metric == "canonical"

    def factor(param: MarkedParameter) -> float:
        """Return the factor of the learning rate; every trained entry appears twice in the skew matrix."""
        if not param.is_square() or canonical is not adam:
            return 1.0
        return 2.0 if adam else 0.5

    note = _note(marked, factor, "the skew matrix underneath moves both of its triangles at once")
    cached = "computed once a step, under torch.nn.utils.parametrize.cached()"
    optimizers = _torch_optimizers(model, marked, settings, _groups(external, settings, factor))
    return _parametrize(model, marked, external, optimizers, "; ".join(filter(None, (note, cached))))


def geotorch(model: nn.Module, settings: Settings) -> MethodRun:
    """Set up geotorch.orthogonal with its defaults."""
    orthogonal = importlib.import_module("geotorch").orthogonal
    return parametrized(lambda module: orthogonal(module, "weight"), model, settings)


def torch_orthogonal(model: nn.Module, settings: Settings) -> MethodRun:
    """Set up torch.nn.utils.parametrizations.orthogonal with the Cayley map."""
    return parametrized(lambda module: parametrizations.orthogonal(module, "weight", "cayley"), model, settings)


_MUON_NOTE = "parameters that are not marked are trained with Adam"

Build = Callable[[nn.Module, Settings], MethodRun]
PEERS: dict[str, Build] = {
    "geoopt": geoopt,
    "pogo": pogo,
    "torch": torch_orthogonal,
    "geotorch": geotorch,
    "penalty": penalty,
    "unconstrained": unconstrained,
}


def schemes_of(optimizer: str) -> tuple[str, ...]:
    """Return the names of all schemes for an optimizer. Muon has its own retraction, and peers have no Muon."""
    return ("spectral", "penalty", "unconstrained") if optimizer == "muon" else (*RETRACTIONS, *PEERS)


EXACT, INEXACT, PEER, FREE = "Ours, exact", "Ours, inexact", "Other packages", "Not kept orthogonal"
GROUPS = (EXACT, INEXACT, PEER, FREE)
DEFAULTS = ("orthographic", "spectral")  # of Adam, AdamW and SGD, and of Muon


def group_of(scheme: str) -> str:
    """Return the group of a scheme, one of ``GROUPS``."""
    if scheme in PEERS:
        return FREE if scheme in ("penalty", "unconstrained") else PEER
    exact = scheme == "spectral" or (scheme in RETRACTIONS and RETRACTIONS[scheme].exact)
    return EXACT if exact else INEXACT


def build(scheme: str, model: nn.Module, settings: Settings) -> MethodRun:
    """Set up a scheme by its name, one of :func:`schemes_of`."""
    if scheme == "spectral":
        return spectral(model, settings)
    if scheme in RETRACTIONS:
        return retraction(scheme, model, settings)
    return PEERS[scheme](model, settings)


def _parametrize(
    model: nn.Module,
    marked: list[MarkedParameter],
    external: list[ExternalBlocks],
    optimizers: list[Optimizer],
    note: str,
) -> MethodRun:
    """Set up a model whose marked parameters are computed from external blocks."""
    for param, source in zip(marked, external, strict=True):
        param.parameter.requires_grad_(False)
        for module, leaf in param.owners:
            parametrize.register_parametrization(module, leaf, source, unsafe=True)
    return MethodRun(model, optimizers, lambda: [source.blocks().detach() for source in external], note=note)


def _groups(
    external: list[ExternalBlocks], settings: Settings, factor: Callable[[MarkedParameter], float]
) -> list[dict[str, object]]:
    """Return one parameter group per marked parameter, with its own learning rate.

    The external blocks are the weight divided by its gain, so their gradient is larger by that factor. This package
    moves such blocks by lr / gain.
    """
    power = 1 if settings.optimizer == "adam" else 2
    rates = [settings.orthogonal_lr * factor(one.param[0]) / one.param[0].constraint.gain ** power for one in external]
    return [{"params": list(one.parameters()), "lr": lr} for one, lr in zip(external, rates, strict=True)]


def _note(marked: list[MarkedParameter], factor: Callable[[MarkedParameter], float], reason: str) -> str:
    """Return the factors of the learning rates and the reason as text; empty if all factors are one."""
    factors = {f"{p} x {n}": factor(param) for param in marked for _, p, n in (param.blocks().shape,)}
    text = ", ".join(f"{value:.3g} ({shape})" for shape, value in factors.items() if value != 1)
    return f"lr times {text}, for its steps to be as long as ours: {reason}" if text else ""


def _torch_optimizers(
    model: nn.Module, marked: list[MarkedParameter], settings: Settings, groups: list[dict[str, object]]
) -> list[Optimizer]:
    """Return an optimizer of torch.optim for the groups and all unmarked parameters; none if there are none."""
    marked_ids = {id(param.parameter) for param in marked}
    unmarked = [p for p in model.parameters() if id(p) not in marked_ids]
    groups = groups + [{"params": unmarked}] * bool(unmarked)
    rule = torch.optim.SGD if settings.optimizer == "sgd" else torch.optim.Adam
    return [rule(groups, lr=settings.lr)] if groups else []


def _current_blocks(marked: list[MarkedParameter]) -> list[Tensor]:
    return [param.blocks().detach() for param in marked]


def _identity_minus_gram(blocks: Tensor) -> Tensor:
    return torch.eye(blocks.shape[-2], dtype=blocks.dtype, device=blocks.device) - blocks @ blocks.mT
