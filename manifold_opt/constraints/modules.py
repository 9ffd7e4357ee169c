"""How a parameter comes to be orthogonal: mark_orthogonal, and what finds the weights of known layers."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, SupportsIndex, TypeVar, overload

from torch import Tensor, nn

from ..manifolds import Orthogonal
from .validation import constrain_all, get_parameter, mark, param_label, validate_parameter

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


Sizes = int | Sequence[int]


@overload
def mark_orthogonal(
    target: nn.Module,
    name: str,
    blocks: Sizes | None = None,
    *,
    which: Sequence[int] | None = None,
    dim: int = 0,
    gain: float = 1.0,
    flatten: bool = True,
) -> nn.Parameter: ...
@overload
def mark_orthogonal(
    target: T,
    name: Sizes | None = None,
    blocks: Sizes | None = None,
    *,
    which: Sequence[int] | None = None,
    dim: int = 0,
    gain: float = 1.0,
    flatten: bool = True,
) -> T: ...
@overload
def mark_orthogonal(  # what an attribute of a module is to a type checker, as in mark_orthogonal(net.weight_hh_l0)
    target: Tensor | nn.Module,
    name: str | Sizes | None = None,
    blocks: Sizes | None = None,
    *,
    which: Sequence[int] | None = None,
    dim: int = 0,
    gain: float = 1.0,
    flatten: bool = True,
) -> Tensor: ...
def mark_orthogonal(
    target: nn.Module | T,
    name: str | Sizes | None = None,
    blocks: Sizes | None = None,
    *,
    which: Sequence[int] | None = None,
    dim: int = 0,
    gain: float = 1.0,
    flatten: bool = True,
) -> T | nn.Parameter:
    r"""Mark a parameter as orthogonal, block by block, and put it there.

    ``mark_orthogonal(param, blocks=3)`` or ``mark_orthogonal(module, "weight_hh_l0")``. Every block becomes
    ``gain`` times its polar factor, the nearest matrix with orthonormal rows (``p <= n``) or columns
    (``p > n``); a block that is already there to rounding keeps its bits. The optimizers of this package
    keep it there.

    Args:
        target: a leaf tensor with at least two dimensions, or a module that has one: float32, float64, bfloat16,
            float16, or complex64 and complex128, which become unitary.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        blocks: number of equal blocks stacked along ``dim``, or the rows of each, as in ``(64, 64, 128)``. 1 unless
            said; on nn.RNN, nn.GRU, nn.LSTM and their cells the number of gates.
        which: the blocks to mark, by number; all unless given. The rows of the others train as torch trains them, bit
            for bit: ``which=(2,)`` is the candidate gate of a GRU alone.
        dim: dimension along which the blocks are stacked, 0, or 1 of a matrix.
        gain: singular values of every block, above 0.
        flatten: dimensions beyond the second are flattened to (first, rest), as ``torch.nn.init.orthogonal_`` does: the
            filters of a convolution. With False the last two are one of a batch of matrices, as
            torch.nn.utils.parametrizations.orthogonal takes them, and ``blocks`` are those of each: the gates of a
            stacked ensemble, ``(members, 3 * hidden, hidden)``, are ``blocks=3, flatten=False``.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: a parameter that cannot be marked, or not so; the message names the remedy. Nothing
            has been written then.

    Warns:
        UserWarning: a (3H, H) or (4H, H) tensor without ``blocks``, which may be the stacked gates of a GRU or LSTM, or
            an nn.Linear(H, 3H), which may be the projections of queries, keys and values, is marked as the one tall
            matrix that was asked for. ``blocks=1`` says that it is meant.

    Reference: Higham (2008), *Functions of Matrices*, theorem 8.4: the polar factor is the nearest.

    >>> import torch
    >>> from manifold_opt import mark_orthogonal, orthogonality_error
    >>> gru = torch.nn.GRU(4, 8)
    >>> weight = mark_orthogonal(gru.weight_hh_l0, blocks=3)
    >>> weight is gru.weight_hh_l0, orthogonality_error(weight) < 1e-5
    (True, True)
    """
    if isinstance(target, nn.Module):
        parameter: T | nn.Parameter = get_parameter("mark_orthogonal", target, name)
        blocks = blocks if blocks is not None or not flatten else _gates_of(target, str(name))
    else:
        if isinstance(name, str) or (name is not None and blocks is not None):
            raise ValueError("mark_orthogonal: a tensor takes no name; give mark_orthogonal(param, blocks=...).")
        parameter = target
        blocks = name if blocks is None else blocks
    label = param_label(target, name)
    gain = float(gain) if isinstance(gain, Real) else gain
    sizes = 1 if blocks is None else _whole_numbers(blocks)
    constraint = Orthogonal(sizes, _whole(dim), gain, _numbered(which, sizes), flatten)
    validate_parameter("mark_orthogonal", parameter, constraint, label)
    stack = _looks_like(target, parameter) if blocks is None and flatten else None
    if stack:
        warnings.warn(
            f"mark_orthogonal: {label} has shape {tuple(parameter.shape)}, like {stack}, and is marked as one tall "
            f"matrix. For one orthogonal matrix each give blocks={parameter.shape[0] // parameter.shape[1]}; blocks=1 "
            "says that one tall matrix is meant.",
            stacklevel=2,
        )
    return mark("mark_orthogonal", target, name, parameter, constraint)


def _looks_like(target: Tensor | nn.Module, parameter: Tensor) -> str | None:
    """What a tall matrix may well be a stack of; of an nn.Linear only what is usual there. A column is no stack."""
    rows, columns = parameter.shape if parameter.ndim == 2 else (0, 0)
    if columns < 2 or rows not in (3 * columns, 4 * columns):
        return None
    triple = rows == 3 * columns
    if isinstance(target, nn.Linear):
        return "fused projections of queries, keys and values" if triple else None
    return f"the {3 if triple else 4} stacked gates of {'nn.GRU' if triple else 'nn.LSTM'}"


def mark_recurrent(module: nn.Module, *, which: Sequence[int] | None = None, gain: float = 1.0) -> list[str]:
    """Mark every recurrent weight inside a module, one orthogonal matrix a gate.

    Takes ``weight_hh`` of every nn.RNN, nn.GRU, nn.LSTM, of all layers and directions, and of their cells: a matrix is
    ``(hidden_size, hidden_size)``, or ``(hidden_size, proj_size)`` of an LSTM that has one.

    Args:
        module: the module, or any module that contains such.
        which: the gates to mark, by number (nn.GRU: r, z, n; nn.LSTM: i, f, g, o); all unless given.
        gain: singular values of every matrix, above 0.

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
            constraint = Orthogonal(gates, gain=float(gain), which=_numbered(which, gates))
            parameter = get_parameter("mark_orthogonal", child, name)
            validate_parameter("mark_orthogonal", parameter, constraint, label)
            found.append((parameter, constraint, label))
    if not found:
        raise ValueError(
            "mark_recurrent: found no parameter weight_hh of an nn.RNN, nn.GRU, nn.LSTM or cell in "
            f"{type(module).__name__}; mark other weights one by one with mark_orthogonal(module, name, blocks), also "
            "one that weight_hh is computed from, like the weight_hh_l0_raw of a weight drop."
        )
    return constrain_all("mark_recurrent", module, found)


def mark_attention(module: nn.Module, which: str = "qk", *, per_head: bool = True, gain: float = 1.0) -> list[str]:
    """Mark the projections of every nn.MultiheadAttention inside a module, one orthogonal matrix a head.

    A head's matrix is ``(head_dim, embed_dim)``, its rows orthonormal, that of a whole projection square.

    Args:
        module: the module, or any module that contains such, like nn.TransformerEncoder.
        which: of the projections of queries, keys and values those to mark: letters of ``"qkv"``.
        per_head: one matrix a head; False makes it one a projection.
        gain: singular values of every matrix, above 0.

    Returns:
        The names of the marked parameters, as in ``module.named_parameters()``.

    Raises:
        ValueError: no nn.MultiheadAttention found, or one that cannot be marked; nothing has been written then.

    >>> import torch
    >>> from manifold_opt import constraint_of, mark_attention
    >>> attention = torch.nn.MultiheadAttention(8, num_heads=2)
    >>> mark_attention(attention)
    ['in_proj_weight']
    >>> constraint_of(attention.in_proj_weight)
    Orthogonal(blocks=6, dim=0, gain=1.0, which=(0, 1, 2, 3))
    """
    gain = float(gain) if isinstance(gain, Real) else gain
    if not isinstance(which, str) or not which or not set(which) <= set("qkv"):
        raise ValueError(f'mark_attention: which names projections by letters of "qkv", got {which!r}.')
    found: list[tuple[nn.Parameter, Orthogonal, str]] = []
    for path, child in module.named_modules():
        if not isinstance(child, nn.MultiheadAttention):
            continue
        heads = child.num_heads if per_head else 1
        chosen = [k * heads + head for k, letter in enumerate("qkv") if letter in which for head in range(heads)]
        together = Orthogonal(3 * heads, gain=gain, which=_numbered(chosen, 3 * heads))
        own = {"in_proj_weight": together}
        if child.in_proj_weight is None:
            own = {f"{letter}_proj_weight": Orthogonal(heads, gain=gain) for letter in "qkv" if letter in which}
        for name, constraint in own.items():
            label = f"{path}.{name}" if path else name
            parameter = get_parameter("mark_attention", child, name)
            validate_parameter("mark_attention", parameter, constraint, label)
            found.append((parameter, constraint, label))
    if not found:
        raise ValueError(
            f"mark_attention: found no nn.MultiheadAttention in {type(module).__name__}; mark the weight of other "
            "attentions with mark_orthogonal(module, name, blocks=3 * heads, which=...)."
        )
    return constrain_all("mark_attention", module, found)


def _whole(number: SupportsIndex) -> int:
    """An int, also from numpy; anything else as it is, for the door to refuse."""
    whole = hasattr(number, "__index__") and not isinstance(number, bool)
    return operator.index(number) if whole else number  # type: ignore[return-value]


def _whole_numbers(blocks: Any) -> Any:
    """One whole number, or a tuple of them."""
    some = isinstance(blocks, Iterable) and not isinstance(blocks, str)
    return tuple(_whole(size) for size in blocks) if some else _whole(blocks)


def _numbered(which: Any, sizes: Any) -> Any:
    """Numbers of blocks, sorted, counted from the front; None for all of them."""
    if which is None or not isinstance(which, Iterable) or isinstance(which, str):
        return which
    numbers, count = tuple(_whole(k) for k in which), len(sizes) if isinstance(sizes, tuple) else sizes
    if not all(isinstance(k, int) and not isinstance(k, bool) for k in (*numbers, count)):
        return numbers
    if not all(-count <= k < count for k in numbers):
        return numbers
    numbers = tuple(sorted({k % count for k in numbers}))
    return None if numbers == tuple(range(count)) else numbers


def _gates_of(module: nn.Module, name: str) -> int | None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf.startswith(("weight_hh", "weight_ih")):
        return next((gates for kind, gates in _GATES.items() if isinstance(owner, kind)), None)
    return 1 if leaf.startswith("weight_hr") and isinstance(owner, nn.LSTM) else None
