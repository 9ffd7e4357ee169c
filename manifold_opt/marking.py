"""How a parameter comes to its constraint: found, checked, put on the manifold, tagged.

Everything is refused here that cannot be kept later, with the remedy, before anything is written.
"""

from __future__ import annotations

import math
import operator
import re
import warnings
from collections.abc import Iterable
from numbers import Real
from typing import SupportsIndex, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from .constraint import DTYPES, Orthogonal, attach, constraint_of, off_manifold
from .survival import record

_GATES: dict[type[nn.Module], int] = {
    nn.RNN: 1,
    nn.GRU: 3,
    nn.LSTM: 4,
    nn.RNNCell: 1,
    nn.GRUCell: 3,
    nn.LSTMCell: 4,
}

# Of weight_hh_l0_v and the like, the parts of an old weight_norm, it takes the whole, which is then refused.
_RECURRENT = re.compile(r"(weight_hh(?:_l\d+(?:_reverse)?)?)(?:_g|_v|_orig|_raw)?$")

T = TypeVar("T", bound=Tensor)


@overload
def mark_orthogonal(
    target: nn.Module, name: str, blocks: int | None = None, *, dim: int = 0, gain: float = 1.0
) -> nn.Parameter: ...
@overload
def mark_orthogonal(
    target: T, name: int | None = None, blocks: int | None = None, *, dim: int = 0, gain: float = 1.0
) -> T: ...
@overload
def mark_orthogonal(  # what an attribute of a module is to a type checker, as in mark_orthogonal(net.weight_hh_l0)
    target: Tensor | nn.Module,
    name: str | int | None = None,
    blocks: int | None = None,
    *,
    dim: int = 0,
    gain: float = 1.0,
) -> Tensor: ...
def mark_orthogonal(
    target: nn.Module | T,
    name: str | int | None = None,
    blocks: int | None = None,
    *,
    dim: int = 0,
    gain: float = 1.0,
) -> T | nn.Parameter:
    r"""Mark a parameter as orthogonal, block by block, and put it there.

    ``mark_orthogonal(param, blocks=3)`` or ``mark_orthogonal(module, "weight_hh_l0")``. Every block becomes
    ``gain`` times its polar factor, the nearest matrix with orthonormal rows (``p <= n``) or columns
    (``p > n``); a block that is already there to rounding keeps its bits. The optimizers of this package
    keep it there.

    Args:
        target: a leaf tensor of float32 or float64 with at least two dimensions, those beyond the second
            flattened; or a module that has one.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        blocks: number of equal blocks stacked along ``dim``, 1 unless said. On nn.RNN, nn.GRU, nn.LSTM
            and their cells it is the number of gates unless said.
        dim: dimension along which the blocks are stacked, 0 or 1.
        gain: singular values of every block, above 0.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: a parameter that cannot be marked, or not so; the message names the remedy. Nothing
            has been written then.

    Warns:
        UserWarning: a (3H, H) or (4H, H) tensor without ``blocks``, the stacked gates of a GRU or LSTM,
            is marked as the one tall matrix that was asked for. ``blocks=1`` says that it is meant.

    >>> import torch
    >>> from manifold_opt import mark_orthogonal, orthogonality_error
    >>> gru = torch.nn.GRU(4, 8)
    >>> weight = mark_orthogonal(gru.weight_hh_l0, blocks=3)
    >>> weight is gru.weight_hh_l0, orthogonality_error(weight) < 1e-5
    (True, True)
    """
    if isinstance(target, nn.Module):
        if not isinstance(name, str):
            raise ValueError(
                'mark_orthogonal: a module needs the name of its parameter, as in mark_orthogonal(gru, "weight_hh_l0").'
            )
        parameter: T | nn.Parameter = _parameter_of(target, name)
        blocks = blocks if blocks is not None else _gates_of(target, name)
        label = f"{type(target).__name__}.{name}"
    else:
        if isinstance(name, str) or (name is not None and blocks is not None):
            raise ValueError("mark_orthogonal: a tensor takes no name; give mark_orthogonal(param, blocks=...).")
        parameter = target
        blocks = name if blocks is None else blocks
        label = "the parameter"
    gain = float(gain) if isinstance(gain, Real) else gain
    constraint = Orthogonal(1 if blocks is None else _whole(blocks), _whole(dim), gain)
    _check(parameter, constraint, label)
    if (
        blocks is None
        and parameter.ndim == 2
        and parameter.shape[0] in (3 * parameter.shape[1], 4 * parameter.shape[1])
    ):
        gates = parameter.shape[0] // parameter.shape[1]
        warnings.warn(
            f"mark_orthogonal: {label} has shape {tuple(parameter.shape)}, like the {gates} stacked gates of "
            f"{'nn.GRU' if gates == 3 else 'nn.LSTM'}, and is marked as one tall matrix. For one orthogonal "
            f"matrix a gate give blocks={gates}; blocks=1 says that one tall matrix is meant.",
            stacklevel=2,
        )
    _mark([(parameter, constraint, label)])
    if isinstance(target, nn.Module) and isinstance(name, str):
        _remember(target, name, parameter, constraint)
    return parameter


def mark_recurrent(module: nn.Module) -> list[str]:
    """Mark every recurrent weight inside a module, one orthogonal matrix a gate.

    Takes ``weight_hh`` of every nn.RNN, nn.GRU, nn.LSTM, of all layers and directions, and of their cells.

    Args:
        module: the module, or any module that contains such.

    Returns:
        The names of the marked parameters, as in ``module.named_parameters()``.

    Raises:
        ValueError: no recurrent weight found, or one that cannot be marked; nothing has been written then.

    >>> import torch
    >>> from manifold_opt import mark_recurrent
    >>> mark_recurrent(torch.nn.LSTM(4, 8, num_layers=2))
    ['weight_hh_l0', 'weight_hh_l1']
    """
    found: list[tuple[nn.Parameter, Orthogonal, str]] = []
    for path, child in module.named_modules():
        gates = next((g for kind, g in _GATES.items() if isinstance(child, kind)), None)
        if gates is None:
            continue
        names = {key.removeprefix("parametrizations.").split(".")[0] for key, _ in child.named_parameters()}
        for name in sorted({hit[1] for n in names if (hit := _RECURRENT.match(n))}):
            label = f"{path}.{name}" if path else name
            constraint = Orthogonal(gates)
            parameter = _parameter_of(child, name)
            _check(parameter, constraint, label)
            found.append((parameter, constraint, label))
    if not found:
        raise ValueError(
            f"mark_recurrent: found no nn.RNN, nn.GRU, nn.LSTM or cell in {type(module).__name__}; mark other "
            "weights one by one with mark_orthogonal(module, name, blocks)."
        )
    _mark(found)
    for parameter, constraint, label in found:
        _remember(module, label, parameter, constraint)
    return [label for _, _, label in found]


def _remember(module: nn.Module, name: str, parameter: Tensor, constraint: Orthogonal) -> None:
    tied = [key for key, p in module.named_parameters(remove_duplicate=False) if p is parameter]
    for key in {name, *tied}:
        path, _, leaf = key.rpartition(".")
        record(module.get_submodule(path), leaf, parameter, constraint)


def _parameter_of(module: nn.Module, name: str) -> nn.Parameter:
    path, _, leaf = name.rpartition(".")
    kind = type(module).__name__
    try:
        owner = module.get_submodule(path)
    except AttributeError:
        owner = None
    if owner is not None and ("parametrizations" in path.split(".") or is_parametrized(owner, leaf)):
        raise ValueError(
            f"mark_orthogonal: {name} of {kind} is parametrized, so the weight is computed anew at every use and not "
            "trained itself. First call torch.nn.utils.parametrize.remove_parametrizations(module, name), which "
            "keeps its value, then mark it."
        )
    value = getattr(owner, leaf, None)
    if not isinstance(value, nn.Parameter):
        known = ", ".join(key for key, _ in module.named_parameters()) or "none"
        raise ValueError(
            f"mark_orthogonal: {kind} has no parameter {name!r}; it has {known}. (A weight that hooks compute is not "
            "one: first undo them with torch.nn.utils.remove_weight_norm or remove_spectral_norm.)"
        )
    return value


def _whole(number: SupportsIndex) -> int:
    """An int, also from numpy; anything else as it is, for _check to refuse."""
    whole = hasattr(number, "__index__") and not isinstance(number, bool)
    return operator.index(number) if whole else number  # type: ignore[return-value]


def _gates_of(module: nn.Module, name: str) -> int | None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf.startswith(("weight_hh", "weight_ih")):
        return next((gates for kind, gates in _GATES.items() if isinstance(owner, kind)), None)
    return 1 if leaf.startswith("weight_hr") and isinstance(owner, nn.LSTM) else None


def _check(parameter: Tensor, constraint: Orthogonal, label: str) -> None:
    """Raise a ValueError that names the rule and the remedy, unless ``parameter`` can be so marked."""
    problem = _problem(parameter, constraint)
    if problem:
        raise ValueError(f"mark_orthogonal: {label} {problem}")


def _problem(parameter: Tensor, constraint: Orthogonal) -> str | None:
    if not isinstance(parameter, Tensor):
        return f"must be a tensor or a module, got {type(parameter).__name__}."
    if is_lazy(parameter):
        return "is lazy and has no shape yet; run one batch through the module first."
    shape = tuple(parameter.shape)
    if not parameter.is_leaf:
        return (
            "is not a leaf: it is computed from other tensors, like the weight of a parametrized module, and an "
            "optimizer cannot move it. Remove the parametrization first (torch.nn.utils.parametrize."
            "remove_parametrizations keeps the value; torch.nn.utils.remove_weight_norm for old hooks)."
        )
    if not isinstance(parameter, nn.Parameter) and not parameter.requires_grad:
        return (
            "is neither an nn.Parameter nor a tensor that requires a gradient, like a buffer or param.data; mark the "
            "parameter itself."
        )
    if parameter.layout is not torch.strided:
        return f"is sparse ({parameter.layout}); only dense parameters can be orthogonal. Use .to_dense()."
    if parameter.dtype not in DTYPES:
        return (
            f"has dtype {parameter.dtype}; only float32 and float64 can be marked. Keep the weight in float32; "
            "torch.autocast computes with it in lower precision."
        )
    if parameter.ndim < 2:
        return f"must have at least 2 dimensions, got shape {shape}; a vector has no orthogonal blocks."
    if parameter.numel() == 0:
        return f"is empty, shape {shape}."
    blocks, dim, gain = constraint.blocks, constraint.dim, constraint.gain
    if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
        return f"needs a whole number of blocks >= 1, got blocks={blocks!r}."
    if isinstance(dim, bool) or not isinstance(dim, int) or dim not in (0, 1) or (dim == 1 and parameter.ndim != 2):
        return f"has shape {shape}; its blocks are stacked along dim 0, or dim 1 of a matrix, got dim={dim!r}."
    if shape[dim] % blocks:
        return (
            f"has shape {shape}: blocks={blocks} must divide dim {dim}. nn.RNN has 1 block, nn.GRU 3 gate blocks, "
            "nn.LSTM 4."
        )
    if not (isinstance(gain, (int, float)) and 0 < gain < math.inf):
        return f"needs a finite gain above 0, got gain={gain!r}."
    if any(stride == 0 < length - 1 for stride, length in zip(parameter.stride(), shape, strict=True)):
        return f"has strides {parameter.stride()}: some of its entries are one and the same; use .clone() first."
    try:
        constraint.view(parameter.detach())
    except RuntimeError:
        return f"has strides {parameter.stride()} that cannot be seen as a matrix; use .contiguous() first."
    present = constraint_of(parameter)
    if present is not None and present != constraint:
        return f"is already marked as {present}, not {constraint}; call unmark on it first."
    return None


@torch.no_grad()
def _mark(marks: Iterable[tuple[Tensor, Orthogonal, str]]) -> None:
    """Project and mark all, or none."""
    marks = list(marks)
    projected = []
    for parameter, constraint, label in marks:
        try:
            projected.append(off_manifold(parameter, constraint))
        except ValueError as refusal:
            reason = str(refusal).removeprefix("nearest_orthogonal: ")
            raise ValueError(f"mark_orthogonal: {label}: {reason}") from None
    for (parameter, constraint, _), (off, values) in zip(marks, projected, strict=True):
        if bool(off.any()):
            constraint.view(parameter.detach())[off] = values
        attach(parameter, constraint)
