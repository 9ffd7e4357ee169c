"""Insert rotations into a Llama-shaped model of transformers, and merge them into its weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from .bank import RotationBank
from .decoder import EMBEDDING, check_structure, linear_places
from .linear import RotatedEmbedding, RotatedLinear

BANK, RESIDUAL = "rotations", "residual"  # the attribute of the model that holds the bank, and a name in it
TRAINED = "_trained_before_rotations"  # the attribute with the names of the parameters that were trainable before


@torch.no_grad()
def insert_rotations(
    model: nn.Module,
    *,
    residual: str | Tensor | None = "hadamard",
    heads: str | Tensor | None = "hadamard",
    generator: Generator | None = None,
) -> RotationBank:
    r"""Rotate the coordinates inside a Llama-shaped model without changing the function that it computes.

    The embedding and all linear layers are replaced by :class:`RotatedEmbedding` and :class:`RotatedLinear`. They share
    the rotations of a bank, which becomes ``model.rotations``:

    - ``"residual"``, called R1 in SpinQuant: the residual stream x becomes :math:`x R_1`. The factors of each RMSNorm
      move into the layers that read its outputs.
    - ``"heads_0"``, ``"heads_1"``, ... for each decoder layer, R2 in SpinQuant: the values of each head of keys and
      values are rotated, with one block for each head, and the output projection is multiplied by the inverse.

    The parameters of the model are frozen until :func:`merge_rotations`, and their gradients are dropped, so that only
    the bank is trained. Create the optimizer afterwards, from ``bank.parameters()``. Use an optimizer of this package,
    because others do not keep the rotations orthogonal. Merge before ``save_pretrained``. Hooks of the linear layers
    are not kept.

    Args:
        model: a causal language model of transformers with the structure of Llama, as Mistral, Qwen2 and Qwen3, on one
            device. Insert before FSDP2 or DistributedDataParallel.
        residual: start of ``"residual"``, as in :meth:`RotationBank.add`; None for no such rotation.
        heads: start of the rotations of heads; None for no such rotations.
        generator: source of random numbers for the starts.

    Returns:
        The bank.

    Raises:
        ValueError: the model has another structure, such as LayerNorm instead of RMSNorm or fused projections; it has
            rotations already; its parameters are sharded, offloaded, quantized, marked or computed from others; or both
            starts are None. The model is unchanged then.

    Reference: arXiv 2405.16406 (*SpinQuant*), section 3.

    >>> import torch
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> from manifold_opt.rotations import insert_rotations
    >>> sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    >>> model, tokens = LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)), torch.arange(12)[None]
    >>> before = model(tokens).logits
    >>> insert_rotations(model)
    RotationBank(
      residual: 1 x SO(32)
      heads_0: 4 x SO(8)
    )
    >>> torch.allclose(model(tokens).logits, before, atol=1e-5)
    True
    """
    if hasattr(model, BANK):
        raise ValueError(f"insert_rotations: the model has an attribute {BANK!r} already. Call merge_rotations first.")
    if residual is None and heads is None:
        raise ValueError("insert_rotations: residual and heads are both None, so there is nothing to insert.")
    sizes = check_structure(model, residual=residual is not None)
    weight: Any = model.get_submodule(EMBEDDING).weight
    bank = RotationBank(dtype=torch.promote_types(weight.dtype, torch.float32), device=weight.device)
    if residual is not None:
        bank.add(RESIDUAL, sizes.width, start=residual, generator=generator)
    if heads is not None:
        for i in range(sizes.layers):
            bank.add(f"heads_{i}", sizes.head_width, blocks=sizes.value_heads, start=heads, generator=generator)
    trained = [name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
    new = dict(_rotated_layers(model, bank, sizes.layers))
    if residual is not None:
        for place in linear_places(sizes.layers):
            if place.norm is not None:
                model.get_submodule(place.norm).weight.fill_(1)  # type: ignore[operator]
    for p in model.parameters():
        p.requires_grad_(False)
        p.grad = None
    for path, layer in new.items():
        model.set_submodule(path, layer)
    model.add_module(BANK, bank)
    setattr(model, TRAINED, trained)
    return bank


def _rotated_layers(model: nn.Module, bank: RotationBank, layers: int) -> Iterator[tuple[str, nn.Module]]:
    """Return the layers that take the places of the embedding and of the linear layers, by path."""
    stream = RESIDUAL if RESIDUAL in bank else None
    if stream is not None:
        embedding: Any = model.get_submodule(EMBEDDING)
        yield EMBEDDING, RotatedEmbedding(embedding, bank, outputs=stream)
    for place in linear_places(layers):
        linear: Any = model.get_submodule(place.path)
        heads = f"heads_{place.heads}" if f"heads_{place.heads}" in bank else None
        inputs, outputs = (stream, heads) if place.norm is not None else (heads, stream if place.writes else None)
        scale = None
        if stream is not None and place.norm is not None:
            scale = model.get_submodule(place.norm).weight.detach().clone()  # type: ignore[operator]
        yield place.path, RotatedLinear(linear, bank, inputs=inputs, outputs=outputs, scale=scale)


@torch.no_grad()
def merge_rotations(model: nn.Module) -> nn.Module:
    r"""Replace all rotated layers by plain ones with the rotated weights; return the model.

    The weights are computed in float64 and rounded once to their dtype. The bank is removed, and the parameters are
    trainable again as they were before. The model then has its own class again, and ``save_pretrained`` and
    ``from_pretrained`` work as for any other; an output layer that was tied to the embedding is separate from now on.

    Args:
        model: a model after :func:`insert_rotations`, or a wrapper of it, or one with layers of type
            :class:`RotatedLinear`, whose bank is kept.

    Returns:
        The same model.

    Raises:
        ValueError: no layer is rotated, a rotation is not orthogonal, or parameters are sharded. The model is unchanged
            then.

    >>> import torch
    >>> from manifold_opt.rotations import RotatedLinear, RotationBank, merge_rotations
    >>> bank = RotationBank()
    >>> rotation = bank.add("hidden", 8)
    >>> first, second, x = torch.nn.Linear(3, 8), torch.nn.Linear(8, 2), torch.randn(5, 3)
    >>> net = torch.nn.Sequential(
    ...     RotatedLinear(first, bank, outputs="hidden"), RotatedLinear(second, bank, inputs="hidden")
    ... )
    >>> merge_rotations(net)
    Sequential(
      (0): Linear(in_features=3, out_features=8, bias=True)
      (1): Linear(in_features=8, out_features=2, bias=True)
    )
    >>> torch.allclose(net(x), second(first(x)), atol=1e-5)
    True
    """
    rotated = {
        path: layer for path, layer in model.named_modules() if isinstance(layer, (RotatedLinear, RotatedEmbedding))
    }
    if not rotated:
        raise ValueError("merge_rotations: the model has no rotated layer.")
    if any(hasattr(p, "placements") for p in model.parameters()):
        raise ValueError(
            "merge_rotations: parameters are sharded. Insert rotations of the same sizes into a model that is not "
            "sharded, load the full state of the bank into it, and merge there."
        )
    for bank in {layer.bank: None for layer in rotated.values()}:
        bank.check_orthogonal("merge_rotations")
    merged = {path: layer.merged() for path, layer in rotated.items()}
    for path, layer in merged.items():
        model.set_submodule(path, layer)
    for owner in list(model.modules()):
        if TRAINED in vars(owner):  # hasattr would follow __getattr__ of a wrapper to the model inside
            _remove_bank(owner)
    return model


def _remove_bank(model: nn.Module) -> None:
    """Remove the bank of a merged model, and make the parameters trainable that were so before the insertion."""
    bank: RotationBank = getattr(model, BANK)
    delattr(model, BANK)
    trained = set(getattr(model, TRAINED))
    delattr(model, TRAINED)
    for name, p in model.named_parameters(remove_duplicate=False):
        p.requires_grad_(name in trained)
    if RESIDUAL in bank:
        _untie(model)


def _untie(model: nn.Module) -> None:
    """Record in the config that the output layer has its own weight."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}  # type: ignore[assignment]
