"""LoRA with orthonormal factors, in the LoRA layers of peft: mark_lora and unmark_lora."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from ..linalg.matrices import error_at_rounding, float64
from ..manifolds import Orthogonal
from ..stiefel.geometry import error
from .validation import constrain_all, unmark

# Variants of LoRA that use the factors through their product only. Others put something between them.
_VARIANTS = ("DoraLinearVariant", "ALoraLinearVariant")
_PRODUCT = Orthogonal()

Found = list[tuple[str, Any, str]]  # names of layers, layers of peft, names of adapters


class FactoredLinear(nn.Module):
    r"""The second factor of LoRA, ``weight = basis @ core``, in the place of an nn.Linear in ``lora_B``.

    Its ``state_dict`` has the two factors, and their product under the name ``weight``, which is what peft reads if it
    loads the file into ordinary LoRA. Loading takes the factors; a file that has ``weight`` only is factored.

    Args:
        basis: ``(m, r)`` with orthonormal columns, or rows if ``m < r``.
        core: ``(r, r)``.
        bias: ``(m,)``, or None.
    """

    bias: nn.Parameter | None

    def __init__(self, basis: nn.Parameter, core: nn.Parameter, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        self.basis, self.core, self.bias = basis, core, bias
        self.out_features, self.in_features = basis.shape

    @property
    def weight(self) -> Tensor:
        """The product, ``(m, r)``, which peft reads. A value that is written to it is lost."""
        return self.basis @ self.core

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x @ weight.mT + bias``, bit for bit what an nn.Linear of this weight returns."""
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        """Return the sizes, as nn.Linear does."""
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        with torch.set_grad_enabled(keep_vars and torch.is_grad_enabled()):
            destination[prefix + "weight"] = self.weight

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        entries = dict(state_dict)
        weight = entries.pop(prefix + "weight", None)
        if weight is not None and not {prefix + "basis", prefix + "core"} & entries.keys():
            basis, core = weight, self.core.detach()  # of another shape: the error about the basis says so
            if weight.shape == self.basis.shape and weight.any():
                basis, core = _split(weight)
            elif weight.shape == self.basis.shape:
                basis, core = self.basis.detach(), torch.zeros_like(core)
            entries |= {prefix + "basis": basis, prefix + "core": core.to(weight)}
        super()._load_from_state_dict(entries, prefix, *args)


def mark_lora(model: nn.Module, adapter: str | None = None) -> list[str]:
    r"""Give the LoRA layers of peft three factors, two of them orthonormal, without changing what they compute.

    LoRA adds :math:`\frac{\alpha}{r} B A` to a weight. In a marked layer B is a product of two parameters,
    :math:`B = U S`, so that the layer adds

    .. math:: \tfrac{\alpha}{r}\, U S V^\top, \qquad U^\top U = I, \quad V^\top V = I,

    with ``lora_A.weight`` :math:`= V^\top`, ``(r, in)``, ``lora_B.basis`` :math:`= U`, ``(out, r)``, and
    ``lora_B.core`` :math:`= S`, ``(r, r)``. The optimizers of this package keep U and V orthonormal; S is not
    constrained. ``lora_B.weight`` is the product of both. V is the polar factor of A, U that of B, and S is chosen
    such that the layer computes the same as before, so a trained adapter can be marked too. If B is zero, as in a new
    adapter, U is drawn at random with torch's generator and S is zero: the marked adapter starts at zero, too.

    All functions of peft work as before: ``save_pretrained``, ``load_adapter``, ``merge_adapter``,
    ``merge_and_unload``, ``disable_adapter``, several adapters, DoRA. A saved adapter is an ordinary LoRA file, which
    peft reads without this package.

    Mark before you create the optimizer, because ``lora_B.weight`` is no longer a parameter.

    Args:
        model: the model that ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` returns, or any module with LoRA
            layers of nn.Linear or of the Conv1D of transformers.
        adapter: name of the adapter. Defaults to the active ones.

    Returns:
        The names of the marked parameters, as in ``model.named_parameters()``. Layers that are marked already stay as
        they are.

    Raises:
        ImportError: peft is not installed.
        ValueError: there is no such layer or adapter, or one cannot be marked: a convolution, an embedding, a variant
            of LoRA other than DoRA and aLoRA, a merged layer, values that are not finite. Nothing has changed then.

    Reference: Li et al. (2025), *StelLA: Subspace Learning in Low-rank Adaptation using Stiefel Manifold*,
    arXiv:2510.01938. Their core does not start at zero.

    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from manifold_opt import AdamW, mark_lora, orthogonality_error
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    >>> mark_lora(model)
    ['base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.basis']
    >>> opt = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    >>> for _ in range(3):
    ...     opt.zero_grad()
    ...     model(torch.ones(1, 8)).square().sum().backward()
    ...     opt.step()
    >>> max(orthogonality_error(model).values()) < 1e-6
    True
    """
    layers = _find("mark_lora", model, adapter)
    for name, layer, key in layers:
        _check(name, layer, key)
    factors = [_factors(layer, key) for _, layer, key in layers]
    marks = []
    for (name, layer, key), values in zip(layers, factors, strict=True):
        first, second = _set_factors(layer, key, *values)
        label = f"{name}." if name else ""
        marks.append((first, _PRODUCT, f"{label}lora_A.{key}.weight"))
        marks.append((second, _PRODUCT, f"{label}lora_B.{key}.basis"))
        if _refactor not in layer._load_state_dict_post_hooks.values():
            layer.register_load_state_dict_post_hook(_refactor)
    return constrain_all("mark_lora", model, marks)


def unmark_lora(model: nn.Module, adapter: str | None = None) -> list[str]:
    """Turn layers marked by :func:`mark_lora` into ordinary LoRA with the same values and one parameter in ``lora_B``.

    Use it for programs that refuse files with more than two factors, and for functions that need ``lora_B.weight`` to
    be a parameter, such as ``peft.utils.hotswap``. Create a new optimizer afterwards.

    Args:
        model: a model with marked LoRA layers.
        adapter: name of the adapter. Defaults to the active ones.

    Returns:
        The names of the parameters that are ordinary again.

    Raises:
        ImportError: peft is not installed.
        ValueError: there is no such adapter.

    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from manifold_opt import constraint_of, mark_lora, unmark_lora
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    >>> model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))
    >>> _ = mark_lora(model)
    >>> unmark_lora(model)
    ['base_model.model.0.lora_A.default.weight', 'base_model.model.0.lora_B.default.weight']
    >>> constraint_of(model), model.base_model.model[0].lora_B["default"]
    ({}, Linear(in_features=2, out_features=6, bias=False))
    """
    names = []
    for name, layer, key in _find("unmark_lora", model, adapter):
        old = layer.lora_B[key]
        if isinstance(old, FactoredLinear):
            unmark(layer.lora_A[key])
            new = nn.Linear(old.in_features, old.out_features, bias=False, device="meta")
            new.weight = nn.Parameter(old.weight.detach(), requires_grad=old.core.requires_grad)
            new.register_parameter("bias", old.bias)
            layer.lora_B[key] = new.train(old.training)
            names += [f"{name}.{part}.{key}.weight".lstrip(".") for part in ("lora_A", "lora_B")]
    return names


def _find(caller: str, model: nn.Module, adapter: str | None) -> Found:
    """Return the LoRA layers of an adapter, or of the active ones."""
    try:
        kind = importlib.import_module("peft.tuners.lora").LoraLayer
    except ModuleNotFoundError as missing:
        raise ImportError(f'{caller}: {missing.name} is not installed: pip install "peft>=0.17".') from None
    layers = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, kind)]
    if not layers:
        raise ValueError(
            f"{caller}: found no LoRA layer of peft in {type(model).__name__}; wrap the model first, as in "
            "model = peft.get_peft_model(model, peft.LoraConfig(target_modules=[...]))."
        )
    keys = {name: [*layer.lora_A, *layer.lora_embedding_A] for name, layer in layers}
    known = dict.fromkeys(key for some in keys.values() for key in some)
    found = [
        (name, layer, key)
        for name, layer in layers
        for key in ([adapter] if adapter is not None else layer.active_adapters)
        if key in keys[name]
    ]
    if not found:
        wanted = "that is active" if adapter is None else f"{adapter!r}"
        raise ValueError(f"{caller}: no LoRA layer has an adapter {wanted}; there are {', '.join(known) or 'none'}.")
    return found


def _check(name: str, layer: Any, key: str) -> None:
    """Raise a ValueError if a layer cannot be marked."""
    variant = type(layer.lora_variant.get(key)).__name__
    reason = ""
    if key not in layer.lora_A or type(layer.lora_A[key]) is not nn.Linear or hasattr(layer, "parameter_name"):
        reason = (
            f"is a {type(layer).__module__.partition('.')[0]} {type(layer).__name__} whose factors are not two "
            "nn.Linear; only the LoRA of linear layers can be marked. Leave it out of target_modules."
        )
    elif not isinstance(layer.lora_B[key], FactoredLinear) and type(layer.lora_B[key]) is not nn.Linear:
        reason = f"has a {type(layer.lora_B[key]).__name__} in lora_B, where an nn.Linear is expected."
    elif variant not in ("NoneType", *_VARIANTS):
        reason = f"uses {variant}, which puts something between its two factors or trains only one of them."
    elif layer.merged:
        reason = "is merged into its base weight; call model.unmerge_adapter() first."
    else:
        for part, parameter in _parameters(layer, key):
            if parameter.is_meta:
                reason = f"has no values yet in {part}; load the adapter first."
            elif hasattr(parameter, "placements"):
                reason = f"is sharded; mark before the model is sharded ({part} is a DTensor)."
            elif not bool(parameter.isfinite().all()):
                reason = f"has values in {part} that are not finite."
    if reason:
        raise ValueError(f"mark_lora: {name or 'the layer'} {reason}")


def _parameters(layer: Any, key: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices of a layer, and what they are called."""
    first, second = layer.lora_A[key], layer.lora_B[key]
    yield "lora_A", first.weight
    if isinstance(second, FactoredLinear):
        yield "lora_B.basis", second.basis
        yield "lora_B.core", second.core
    else:
        yield "lora_B", second.weight


@torch.no_grad()
def _factors(layer: Any, key: str) -> tuple[Tensor, Tensor, Tensor]:
    r"""Return :math:`V^\top`, U and S of the product that a layer has. What is orthonormal already keeps its bits."""
    (_, a), (_, b), *core = _parameters(layer, key)
    v, right = _split(a.mT)
    u, left = _split(b)
    for _, s in core:
        left = left @ float64(s)
    return v.mT, u, (left @ right.mT).to(b)


@torch.no_grad()
def _split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return w, ``(m, r)`` with orthonormal columns or rows, and h, ``(r, r)`` in float64, with ``x = w @ h``.

    w is the polar factor, of any rank; random if x is zero, and x itself if that is orthonormal to rounding.
    """
    matrix = float64(x)
    m, r = x.shape
    if float(error(matrix)) <= error_at_rounding(m, r, x.dtype):
        return x, torch.eye(r, dtype=matrix.dtype, device=matrix.device)
    if matrix.any():
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        w = u @ vh
    else:
        w = nn.init.orthogonal_(torch.empty_like(matrix))
    w = w.to(x)
    return w, float64(w).mT @ matrix


@torch.no_grad()
def _set_factors(layer: Any, key: str, v: Tensor, u: Tensor, s: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Write the factors to a layer, which gets a FactoredLinear if it has none; return the orthonormal parameters."""
    first, old = layer.lora_A[key], layer.lora_B[key]
    if isinstance(old, FactoredLinear):
        for parameter, value in ((old.basis, u), (old.core, s)):
            if not torch.equal(parameter, value):
                parameter.copy_(value)
    else:
        basis, core = (nn.Parameter(x, requires_grad=old.weight.requires_grad) for x in (u.clone(), s))
        new = FactoredLinear(basis, core, old.bias)
        layer.lora_B[key] = new.train(old.training)
    if not torch.equal(first.weight, v):
        first.weight.copy_(v)
    return first.weight, layer.lora_B[key].basis


def _refactor(layer: Any, _: Any) -> None:
    """Make the factors of a layer orthonormal again after other values were loaded, without changing their product."""
    for key, second in layer.lora_B.items():
        if isinstance(second, FactoredLinear):
            values = [parameter for _, parameter in _parameters(layer, key)]
            if all(not p.is_meta and not hasattr(p, "placements") and bool(p.isfinite().all()) for p in values):
                _set_factors(layer, key, *_factors(layer, key))
