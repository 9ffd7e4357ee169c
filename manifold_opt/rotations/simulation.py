"""Simulate the rounding of weights and inputs, in a model with rotations and in any other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .linear import RotatedLinear
from .rounding import RoundToNearest

OUTPUT_LAYER = ("lm_head",)


def simulate_rounding(
    model: nn.Module,
    *,
    weights: RoundToNearest | None = None,
    inputs: RoundToNearest | None = None,
    skip: Sequence[str] = OUTPUT_LAYER,
) -> nn.Module:
    """Round the rotated weights, and the inputs, of all rotated linear layers in every forward pass from now on.

    Gradients pass as if nothing was rounded (straight-through), so that rotations can be trained for a rounded model.

    Args:
        model: a model with layers of type :class:`RotatedLinear`.
        weights: rounding of the rotated weights, or None for none.
        inputs: rounding of the inputs of the layers, or None for none.
        skip: names of layers, the last part of their path, that are not rounded. The embedding never is.

    Returns:
        The same model.

    Raises:
        ValueError: no layer is rotated, a name in ``skip`` is that of no layer, or a group does not divide the inputs
            of a layer.

    >>> import torch
    >>> from manifold_opt.rotations import RotatedLinear, RotationBank, RoundToNearest, simulate_rounding
    >>> bank = RotationBank()
    >>> rotation = bank.add("inputs", 8)
    >>> net = torch.nn.Sequential(RotatedLinear(torch.nn.Linear(8, 3), bank, inputs="inputs"))
    >>> _ = simulate_rounding(net, weights=RoundToNearest(4))
    >>> net(torch.ones(1, 8)).sum().backward()
    >>> bool(rotation.grad.any())
    True
    """
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, RotatedLinear)}
    if not layers:
        raise ValueError(
            "simulate_rounding: no layer is rotated. Call insert_rotations first; for a model without rotations use "
            "round_linears_."
        )
    rounded = _layers_to_round("simulate_rounding", layers, (weights, inputs), skip)
    for path, layer in layers.items():
        layer.round_weight, layer.round_inputs = (weights, inputs) if path in rounded else (None, None)
    return model


@torch.no_grad()
def round_linears_(
    model: nn.Module,
    weights: RoundToNearest,
    *,
    inputs: RoundToNearest | None = None,
    skip: Sequence[str] = OUTPUT_LAYER,
) -> list[RemovableHandle]:
    """Round the weights of all linear layers in place, and from now on the inputs of these layers if asked.

    Args:
        model: any model, such as one after :func:`merge_rotations`.
        weights: rounding of the weights.
        inputs: rounding of the inputs, by a hook of each layer; None for none.
        skip: names of layers, the last part of their path, that are left as they are.

    Returns:
        The handles of the hooks; ``handle.remove()`` ends the rounding of inputs.

    Raises:
        ValueError: a layer is still rotated, there is no linear layer, a name in ``skip`` is that of no layer, a group
            does not divide the inputs of a layer, or a weight is also that of an embedding. The model is unchanged
            then.

    >>> import torch
    >>> from manifold_opt.rotations import RoundToNearest, round_linears_
    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 8))
    >>> round_linears_(net, RoundToNearest(2))
    []
    >>> [len(row.unique()) for row in net[0].weight]
    [3, 3, 3, 3, 3, 3, 3, 3]
    """
    if any(isinstance(layer, RotatedLinear) for layer in model.modules()):
        raise ValueError(
            "round_linears_: a layer is still rotated. Call merge_rotations first, or round the rotated layers with "
            "simulate_rounding."
        )
    layers = {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    rounded = _layers_to_round("round_linears_", layers, (weights, inputs), skip)
    embeddings = [layer.weight for layer in model.modules() if isinstance(layer, nn.Embedding)]
    for path, layer in rounded.items():
        if any(layer.weight is weight for weight in embeddings):
            raise ValueError(
                f"round_linears_: the weight of {path} is also that of an embedding, which is not rounded. Add "
                f"{path.rpartition('.')[2]!r} to skip, or give the layer its own weight."
            )
    handles = []
    for layer in rounded.values():
        layer.weight.copy_(weights(layer.weight))
        for key, hook in list(layer._forward_pre_hooks.items()):
            if isinstance(hook, _RoundInputs):
                del layer._forward_pre_hooks[key]
        if inputs is not None:
            handles.append(layer.register_forward_pre_hook(_RoundInputs(inputs)))
    return handles


def _layers_to_round(
    caller: str, layers: dict[str, Any], roundings: Sequence[RoundToNearest | None], skip: Sequence[str]
) -> dict[str, Any]:
    """Return the layers that are not skipped; raise a ValueError if a name or a group fits none of them."""
    names = {path.rpartition(".")[2] for path in layers}
    unknown = set(skip) - names if tuple(skip) != OUTPUT_LAYER else set()
    if not layers:
        raise ValueError(f"{caller}: the model has no nn.Linear.")
    if unknown:
        raise ValueError(
            f"{caller}: skip has {', '.join(sorted(unknown))}, but the linear layers are named "
            f"{', '.join(sorted(names))}."
        )
    chosen = {path: layer for path, layer in layers.items() if path.rpartition(".")[2] not in skip}
    for path, layer in chosen.items():
        for rounding in roundings:
            if rounding is not None and layer.in_features % (rounding.group or 1):
                raise ValueError(
                    f"{caller}: group={rounding.group} must divide the inputs of {path}, {layer.in_features}. Add its "
                    "name to skip, or take another group."
                )
    return chosen


class _RoundInputs:
    """A forward pre-hook that rounds the input of a layer; a class, so that a model with it can be pickled."""

    def __init__(self, rounding: RoundToNearest) -> None:
        self.rounding = rounding

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:  # noqa: ARG002
        return (self.rounding(args[0]), *args[1:])
