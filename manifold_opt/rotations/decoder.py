"""The structure of a Llama-shaped model of transformers, and a check of a model against it.

Compared are the names of the parameters, the sizes of the attention, and what each norm computes for random inputs.
"""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

EMBEDDING, FINAL_NORM, OUTPUT = "model.embed_tokens", "model.norm", "lm_head"

# Parts of a decoder layer with parameters. Norms of queries and keys act on what no rotation here changes.
_PARTS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
    "input_layernorm",
    "post_attention_layernorm",
)
_OPTIONAL = ("self_attn.q_norm", "self_attn.k_norm")
_NAME = re.compile(r"model\.layers\.\d+\.(.+)\.(weight|bias)")


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model: decoder layers, width of the residual stream, heads of keys and values, width of a head."""

    layers: int
    width: int
    value_heads: int
    head_width: int


@dataclass(frozen=True)
class Place:
    """A linear layer of a model.

    Attributes:
        path: its name in the model.
        norm: name of the norm through which it reads the residual stream; None if it reads something else.
        writes: True if its outputs are added to the residual stream.
        heads: index of the decoder layer if the inputs (o_proj) or the outputs (v_proj) are values of heads, or None.
    """

    path: str
    norm: str | None = None
    writes: bool = False
    heads: int | None = None


def linear_places(layers: int) -> list[Place]:
    """Return the linear layers of a model with so many decoder layers, in the order of the forward pass."""
    places = []
    for i in range(layers):
        layer = f"model.layers.{i}"
        first, second = f"{layer}.input_layernorm", f"{layer}.post_attention_layernorm"
        places += [
            Place(f"{layer}.self_attn.q_proj", first),
            Place(f"{layer}.self_attn.k_proj", first),
            Place(f"{layer}.self_attn.v_proj", first, heads=i),
            Place(f"{layer}.self_attn.o_proj", writes=True, heads=i),
            Place(f"{layer}.mlp.gate_proj", second),
            Place(f"{layer}.mlp.up_proj", second),
            Place(f"{layer}.mlp.down_proj", writes=True),
        ]
    return [*places, Place(OUTPUT, FINAL_NORM)]


def check_structure(model: nn.Module, *, residual: bool) -> Sizes:
    """Return the sizes of a Llama-shaped model.

    Args:
        model: a causal language model of transformers.
        residual: also check that all norms are RMSNorm, without which the residual stream cannot be rotated.

    Raises:
        ValueError: the model has another structure, or its parameters are not all there, on one device.
    """
    problem = _parameter_problem(model)
    if problem is None:
        _check_placement(model)
        problem = _attention_problem(model) or (_norm_problem(model) if residual else None)
    if problem is not None:
        raise ValueError(
            f"insert_rotations: {type(model).__name__} is not like a causal Llama model of transformers: {problem} "
            "Pass the language model itself, not a part of it or a wrapper; rotate the layers of another model one by "
            "one, with RotatedLinear."
        )
    width, head_width = _module(model, EMBEDDING).embedding_dim, _module(model, "model.layers.0.self_attn").head_dim
    values = _module(model, "model.layers.0.self_attn.v_proj").out_features // head_width
    return Sizes(len(_module(model, "model.layers")), width, values, head_width)


def _parameter_problem(model: nn.Module) -> str | None:
    """Return a sentence about a parameter that is missing or unknown, or None."""
    found = {name.rpartition(".")[0] for name, _ in model.named_parameters(remove_duplicate=False)}
    layers = {int(name.split(".")[2]) for name in found if re.match(r"model\.layers\.\d+\.", name)}
    expected = {EMBEDDING, FINAL_NORM, OUTPUT, *(f"model.layers.{i}.{part}" for i in layers for part in _PARTS)}
    allowed = expected | {f"model.layers.{i}.{part}" for i in layers for part in _OPTIONAL}
    if not layers or expected - found:
        return f"it has no {min(expected - found) if layers else 'model.layers.0'} with parameters."
    if found - allowed:
        return f"it has {min(found - allowed)}, which is not known."
    return None


def _check_placement(model: nn.Module) -> None:
    """Raise a ValueError if parameters are sharded, offloaded or on several devices."""
    parameters = list(model.parameters())
    if any(hasattr(p, "placements") for p in parameters):
        raise ValueError("insert_rotations: parameters are sharded. Insert the rotations before the model is sharded.")
    if any(p.is_meta for p in parameters) or len({p.device for p in parameters}) > 1:
        raise ValueError(
            "insert_rotations: parameters are offloaded, without values or on several devices. Load the model onto one "
            "device first."
        )


def _attention_problem(model: nn.Module) -> str | None:
    """Return a sentence about an attention whose values are not plain heads of one width, or None."""
    width = getattr(_module(model, "model.layers.0.self_attn"), "head_dim", None)
    for i in range(len(_module(model, "model.layers"))):
        path = f"model.layers.{i}.self_attn"
        q, k, v, o = (_module(model, f"{path}.{name}_proj") for name in "qkvo")
        if width is None or _module(model, path).head_dim != width or v.out_features % width:
            return f"the heads of {path} have no width head_dim that is the same in all layers."
        if (q.out_features, k.out_features) != (o.in_features, v.out_features) or o.in_features % v.out_features:
            return f"the sizes of the projections in {path} are not those of heads of one width."
    return None


def _norm_problem(model: nn.Module) -> str | None:
    r"""Return a sentence about a norm that is not :math:`g\, x / \mathrm{rms}(x)`, or None."""
    generator = torch.Generator().manual_seed(0)
    for path in {place.norm: None for place in linear_places(len(_module(model, "model.layers"))) if place.norm}:
        norm = copy.deepcopy(_module(model, path))
        weight = norm.weight  # near 1, since small ones would hide what is added to them; x is off its mean
        weight.copy_(1 + torch.rand(len(weight), generator=generator, device="cpu"))
        x = 2 + torch.randn(2, len(weight), generator=generator, device="cpu").to(weight)
        exact = weight * x / x.square().mean(-1, keepdim=True).sqrt()
        if hasattr(norm, "bias") or not torch.allclose(norm(x).float(), exact.float(), rtol=0.05, atol=0.01):
            return f"{path} ({type(norm).__name__}) is not RMSNorm with a factor for each entry."
    return None


def _module(model: nn.Module, path: str) -> Any:
    return model.get_submodule(path)
