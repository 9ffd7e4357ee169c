"""Conversion of a parametrized weight to a marked parameter with the same value and name; old checkpoints still load.

torch.nn.utils.parametrizations.orthogonal and geotorch compute the weight from other tensors at every use. A marked
weight is the parameter itself.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, remove_parametrizations

from ..stiefel.geometry import error
from .modules import mark_orthogonal
from .tag import DTYPES

_TOLERANCE = 1e-3  # per row; larger errors are not the rounding of a parametrization
_REMEDY = (
    "torch.nn.utils.parametrize.remove_parametrizations(module, name) keeps its value; then mark_orthogonal takes it "
    "to the nearest orthogonal one."
)


@torch.no_grad()
def from_parametrized(module: nn.Module, name: str = "weight") -> nn.Parameter:
    r"""Replace a weight under an orthogonal parametrization by a marked parameter of the same value.

    It supports torch.nn.utils.parametrizations.orthogonal with any of its maps and the orthogonal parametrizations of
    geotorch, for one matrix or a batch ``(..., p, n)``. A value that is orthogonal to rounding is not changed. Create
    the optimizer afterwards: an existing optimizer still refers to the replaced parameters.

    ``load_state_dict`` of the module, and of any module that contains it, still accepts older checkpoints with keys
    like ``parametrizations.weight.original``. The module keeps a copy of the parametrization without its values, which
    computes the weight from them. Copies and pickles of the module include it.

    Args:
        module: the module that has the weight, or one that contains it.
        name: name of the weight, dots allowed.

    Returns:
        The new parameter of the module.

    Raises:
        ValueError: the weight is not parametrized or not orthogonal; the module is unchanged then.

    >>> import torch
    >>> from manifold_opt.constraints.from_parametrized import from_parametrized
    >>> layer = torch.nn.utils.parametrizations.orthogonal(torch.nn.Linear(8, 4))
    >>> before, checkpoint = layer.weight, layer.state_dict()
    >>> weight = from_parametrized(layer)
    >>> weight is layer.weight, torch.equal(weight, before)
    (True, True)
    >>> layer.load_state_dict(checkpoint)
    <All keys matched successfully>
    """
    owner, leaf = _owner(module, name)
    parametrizations: ParametrizationList = owner.parametrizations[leaf]  # type: ignore[index, assignment]
    value = copy.deepcopy(parametrizations)().detach()  # a copy, because evaluation may change its buffers
    _check(module, name, parametrizations, value)
    options: dict[str, Any] = {"blocks": 1} if value.ndim == 2 else {"flatten": False}
    # Marks a copy first, to raise its errors before the module is modified.
    value = mark_orthogonal(nn.Parameter(value.clone(memory_format=torch.contiguous_format)), **options).detach()
    hook = ParametrizationStateDictHook(leaf, parametrizations)
    remove_parametrizations(owner, leaf)
    parameter: nn.Parameter = getattr(owner, leaf)
    parameter.set_(value)
    setattr(owner, leaf, parameter)  # an RNN also has its weights in a list
    if isinstance(owner, nn.RNNBase) and not is_parametrized(owner):
        owner.flatten_parameters()
    hook.register_on(owner)
    mark_orthogonal(module, name, **options)
    return parameter


def _owner(module: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    kind = type(module).__name__
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        raise ValueError(f"from_parametrized: {kind} has no module {path!r}, so no weight {name!r}.") from None
    if not is_parametrized(owner, leaf):
        found = [key for key, child in module.named_modules() if isinstance(child, ParametrizationList)]
        known = ", ".join(key.replace("parametrizations.", "") for key in found) or "none"
        raise ValueError(
            f"from_parametrized: {kind} has no parametrized {name!r}; parametrized there: {known}. Mark a plain "
            "parameter with mark_orthogonal(module, name)."
        )
    return owner, leaf


def _check(module: nn.Module, name: str, parametrizations: ParametrizationList, value: Tensor) -> None:
    """Raise a ValueError unless the weight can become a parameter and is orthogonal."""
    kinds = ", ".join(type(child).__name__ for child in parametrizations)
    label = f"from_parametrized: {name} of {type(module).__name__}, computed by {kinds},"
    if value.ndim < 2 or value.numel() == 0 or value.dtype not in DTYPES:
        raise ValueError(f"{label} is {tuple(value.shape)} of {value.dtype}; only matrices can be marked.")
    originals = list(parametrizations.parameters(recurse=False))
    if not originals:
        raise ValueError(f"{label} is computed from a buffer and is not trained; leave it as it is.")
    shared = [p for child in module.modules() for p in child.parameters(recurse=False) if p is originals[0]]
    if len(shared) > 1:
        raise ValueError(
            f"{label} shares {name}.original with another module, which would be given the value of this one. Give "
            "it a parameter of its own first."
        )
    p, worst = min(value.shape[-2:]), float(error(value).max())
    if not worst <= max(_TOLERANCE, torch.finfo(value.dtype).eps) * p**0.5:  # raises for NaN too
        raise ValueError(
            f"{label} is not orthogonal: the largest ||I - W W^T||_F of a matrix is {worst:.2g}, above "
            f"{_TOLERANCE:g} sqrt({p}). This is for orthogonal parametrizations. Of others, such as spectral_norm or "
            f"weight_norm, {_REMEDY}"
        )


class ParametrizationStateDictHook:
    """Pre-hook of load_state_dict that loads the keys of a parametrized weight into a plain one.

    Attributes:
        name: name of the weight.
        template: the parametrization, with tensors on the meta device.
    """

    def __init__(self, name: str, parametrizations: ParametrizationList) -> None:
        self.name = name
        self.template = copy.deepcopy(parametrizations).requires_grad_(False)
        empty = {k: v.to("meta") for k, v in self.template.state_dict().items() if isinstance(v, Tensor)}
        self.template.load_state_dict(empty, strict=False, assign=True)

    def register_on(self, module: nn.Module) -> None:
        """Register as a pre-hook of ``module``, replacing an earlier one for the same weight."""
        hooks = module._load_state_dict_pre_hooks
        for key, hook in list(hooks.items()):
            known = getattr(hook, "hook", hook)
            if isinstance(known, ParametrizationStateDictHook) and known.name == self.name:
                del hooks[key]
        module.register_load_state_dict_pre_hook(self)  # type: ignore[no-untyped-call]

    def __call__(
        self,
        module: nn.Module,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],  # noqa: ARG002
        strict: bool,  # noqa: ARG002
        missing_keys: list[str],
        unexpected_keys: list[str],  # noqa: ARG002
        error_msgs: list[str],
    ) -> None:
        """Replace the tensors of the parametrization by the weight; report missing keys as torch does."""
        weight, old = prefix + self.name, f"{prefix}parametrizations.{self.name}."
        loaded = {key.removeprefix(old): key for key in state_dict if key.startswith(old)}
        template = {key: t for key, t in self.template.state_dict().items() if isinstance(t, Tensor)}
        if weight in state_dict or is_parametrized(module, self.name) or not loaded.keys() & template.keys():
            return
        tensors = {key: state_dict.pop(loaded[key]) for key in template if key in loaded}
        missing = [old + key for key in template if key not in loaded]
        try:
            state_dict[weight] = getattr(module, self.name).detach() if missing else self._compute(tensors, template)
        except RuntimeError as problem:
            error_msgs.append(f"{old}*: {problem}")
            state_dict[weight] = getattr(module, self.name).detach()
        missing_keys.extend(missing)

    @torch.no_grad()
    def _compute(self, tensors: dict[str, Tensor], template: dict[str, Tensor]) -> Tensor:
        # Half precision has no factorizations; the higher precision of both is used.
        cast = {key: t.detach().to(torch.promote_types(t.dtype, template[key].dtype)) for key, t in tensors.items()}
        parametrizations = copy.deepcopy(self.template)
        parametrizations.load_state_dict(cast, assign=True)
        value: Tensor = parametrizations()
        return value.detach()
