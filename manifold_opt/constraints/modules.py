"""Marking functions for orthogonality: mark_orthogonal, mark_recurrent and mark_attention."""

from __future__ import annotations

import operator
import re
import warnings
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, SupportsIndex, TypeVar, overload

from torch import Tensor, nn

from ..manifolds import Orthogonal
from .validation import constrain, constrain_all, get_parameter, param_label, validate_parameter

_NUM_GATES: dict[type[nn.Module], int] = {
    nn.RNN: 1,
    nn.GRU: 3,
    nn.LSTM: 4,
    nn.RNNCell: 1,
    nn.GRUCell: 3,
    nn.LSTMCell: 4,
}

# Matches weight_hh_l0_v and other parts of an old weight_norm too, so that get_parameter raises an error for them.
_RECURRENT = re.compile(r"(weight_hh(?:_l\d+(?:_reverse)?)?)(?:_g|_v|_orig|_raw)?$")

T = TypeVar("T", bound=Tensor)

BlockSizes = int | Sequence[int]


@overload
def mark_orthogonal(
    target: nn.Module,
    name: str,
    blocks: BlockSizes | None = None,
    *,
    which: Sequence[int] | None = None,
    dim: int = 0,
    gain: float = 1.0,
    flatten: bool = True,
) -> nn.Parameter: ...
@overload
def mark_orthogonal(
    target: T,
    name: BlockSizes | None = None,
    blocks: BlockSizes | None = None,
    *,
    which: Sequence[int] | None = None,
    dim: int = 0,
    gain: float = 1.0,
    flatten: bool = True,
) -> T: ...
@overload
def mark_orthogonal(  # the type of a module's attribute, as in mark_orthogonal(net.weight_hh_l0)
    target: Tensor | nn.Module,
    name: str | BlockSizes | None = None,
    blocks: BlockSizes | None = None,
    *,
    which: Sequence[int] | None = None,
    dim: int = 0,
    gain: float = 1.0,
    flatten: bool = True,
) -> Tensor: ...
def mark_orthogonal(
    target: nn.Module | T,
    name: str | BlockSizes | None = None,
    blocks: BlockSizes | None = None,
    *,
    which: Sequence[int] | None = None,
    dim: int = 0,
    gain: float = 1.0,
    flatten: bool = True,
) -> T | nn.Parameter:
    r"""Mark the blocks of a parameter as orthogonal and project them.

    Call ``mark_orthogonal(param, blocks=3)`` or ``mark_orthogonal(module, "weight_hh_l0")``. Every block becomes
    ``gain`` times its polar factor, the nearest matrix with orthonormal rows (``p <= n``) or columns
    (``p > n``); a block that is orthogonal to rounding is not changed. The optimizers of this package keep the
    blocks orthogonal.

    Args:
        target: a leaf tensor with at least two dimensions, or a module that has one. The dtype is float32, float64,
            bfloat16 or float16, or complex64 or complex128 for unitary blocks.
        name: name of the module's parameter, dots allowed. Left out for a tensor.
        blocks: number of equal blocks stacked along ``dim``, or the rows of each, as in ``(64, 64, 128)``. Defaults to
            the number of gates for nn.RNN, nn.GRU, nn.LSTM and their cells, and to 1 otherwise.
        which: indices of the blocks to mark. Defaults to all. The rows of the other blocks train bit for bit as with
            torch.optim: ``which=(2,)`` marks only the candidate gate of a GRU.
        dim: dimension along which the blocks are stacked, 0, or 1 for a matrix.
        gain: singular values of every block, above 0.
        flatten: True flattens dimensions beyond the second to (first, rest), as ``torch.nn.init.orthogonal_`` does for
            the filters of a convolution. False treats the parameter as a batch of matrices, as
            torch.nn.utils.parametrizations.orthogonal does, and ``blocks`` applies to each matrix: for the gates of a
            stacked ensemble, ``(members, 3 * hidden, hidden)``, pass ``blocks=3, flatten=False``.

    Returns:
        The parameter, the same object.

    Raises:
        ValueError: the parameter cannot be marked with these arguments; the message names the remedy. The parameter
            is unchanged then.

    Warns:
        UserWarning: ``blocks`` is omitted for a (3H, H) or (4H, H) tensor, which may be the stacked gates of a GRU or
            LSTM, or for an nn.Linear(H, 3H), which may be the projections of queries, keys and values. It is marked as
            one tall matrix. Pass ``blocks=1`` to do so without the warning.

    Reference: Higham (2008), *Functions of Matrices*, theorem 8.4: the polar factor is nearest.

    >>> import torch
    >>> from manifold_opt import mark_orthogonal, orthogonality_error
    >>> gru = torch.nn.GRU(4, 8)
    >>> weight = mark_orthogonal(gru.weight_hh_l0, blocks=3)
    >>> weight is gru.weight_hh_l0, orthogonality_error(weight) < 1e-5
    (True, True)
    """
    if isinstance(target, nn.Module):
        parameter: T | nn.Parameter = get_parameter("mark_orthogonal", target, name)
        blocks = blocks if blocks is not None or not flatten else _num_gates(target, str(name))
    else:
        if isinstance(name, str) or (name is not None and blocks is not None):
            raise ValueError("mark_orthogonal: a tensor takes no name; give mark_orthogonal(param, blocks=...).")
        parameter = target
        blocks = name if blocks is None else blocks
    label = param_label(target, name)
    gain = float(gain) if isinstance(gain, Real) else gain
    sizes = 1 if blocks is None else _as_ints(blocks)
    constraint = Orthogonal(sizes, _as_int(dim), gain, _normalize_indices(which, sizes), flatten)
    validate_parameter("mark_orthogonal", parameter, constraint, label)
    stack = _guess_stacked_layout(target, parameter) if blocks is None and flatten else None
    if stack:
        warnings.warn(
            f"mark_orthogonal: {label} has shape {tuple(parameter.shape)}, like {stack}, and is marked as one tall "
            f"matrix. To make each of the stacked matrices orthogonal, pass "
            f"blocks={parameter.shape[0] // parameter.shape[1]}. To keep one tall matrix, pass blocks=1.",
            stacklevel=2,
        )
    return constrain("mark_orthogonal", target, name, parameter, constraint)


def _guess_stacked_layout(target: Tensor | nn.Module, parameter: Tensor) -> str | None:
    """Return a description of the stacked blocks that the shape of a tall matrix suggests, or None."""
    rows, columns = parameter.shape if parameter.ndim == 2 else (0, 0)
    if columns < 2 or rows not in (3 * columns, 4 * columns):
        return None
    triple = rows == 3 * columns
    if isinstance(target, nn.Linear):
        return "fused projections of queries, keys and values" if triple else None
    return f"the {3 if triple else 4} stacked gates of {'nn.GRU' if triple else 'nn.LSTM'}"


def mark_recurrent(module: nn.Module, *, which: Sequence[int] | None = None, gain: float = 1.0) -> list[str]:
    """Mark every recurrent weight inside a module, with one orthogonal matrix per gate.

    It marks ``weight_hh`` of every nn.RNN, nn.GRU and nn.LSTM, for all layers and directions, and of their cells. A
    gate's matrix is ``(hidden_size, hidden_size)``, or ``(hidden_size, proj_size)`` for an LSTM with ``proj_size``.

    Args:
        module: a recurrent module, or any module that contains some.
        which: indices of the gates to mark (nn.GRU: r, z, n; nn.LSTM: i, f, g, o). Defaults to all.
        gain: singular values of every matrix, above 0.

    Returns:
        The names of the marked parameters, as in ``module.named_parameters()``.

    Raises:
        ValueError: no recurrent weight is found, or one cannot be marked; the module is unchanged then.

    >>> import torch
    >>> from manifold_opt import mark_recurrent
    >>> mark_recurrent(torch.nn.LSTM(4, 8, num_layers=2))
    ['weight_hh_l0', 'weight_hh_l1']
    """
    found: list[tuple[nn.Parameter, Orthogonal, str]] = []
    for path, child in module.named_modules():
        gates = next((g for kind, g in _NUM_GATES.items() if isinstance(child, kind)), None)
        if gates is None:
            continue
        names = {key.removeprefix("parametrizations.").split(".")[0] for key, _ in child.named_parameters()}
        for name in sorted({hit[1] for n in names if (hit := _RECURRENT.match(n))}):
            label = f"{path}.{name}" if path else name
            constraint = Orthogonal(gates, gain=float(gain), which=_normalize_indices(which, gates))
            parameter = get_parameter("mark_recurrent", module, label)
            validate_parameter("mark_recurrent", parameter, constraint, label)
            found.append((parameter, constraint, label))
    if not found:
        raise ValueError(
            "mark_recurrent: found no parameter weight_hh of an nn.RNN, nn.GRU, nn.LSTM or cell in "
            f"{type(module).__name__}; mark other weights one by one with mark_orthogonal(module, name, blocks), also "
            "one that weight_hh is computed from, like the weight_hh_l0_raw of a weight drop."
        )
    return constrain_all("mark_recurrent", module, found)


def mark_attention(module: nn.Module, which: str = "qk", *, per_head: bool = True, gain: float = 1.0) -> list[str]:
    """Mark the projections of every nn.MultiheadAttention inside a module, with one orthogonal matrix per head.

    A head's matrix is ``(head_dim, embed_dim)`` with orthonormal rows; the matrix of a whole projection is square.

    Args:
        module: an nn.MultiheadAttention, or any module that contains some, like nn.TransformerEncoder.
        which: the projections to mark (queries, keys, values), as letters of ``"qkv"``.
        per_head: True marks one matrix per head, False one per projection.
        gain: singular values of every matrix, above 0.

    Returns:
        The names of the marked parameters, as in ``module.named_parameters()``.

    Raises:
        ValueError: no nn.MultiheadAttention is found, or one cannot be marked; the module is unchanged then.

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
        stacked = Orthogonal(3 * heads, gain=gain, which=_normalize_indices(chosen, 3 * heads))
        weights = {"in_proj_weight": stacked}
        if child.in_proj_weight is None:
            weights = {f"{letter}_proj_weight": Orthogonal(heads, gain=gain) for letter in "qkv" if letter in which}
        for name, constraint in weights.items():
            label = f"{path}.{name}" if path else name
            parameter = get_parameter("mark_attention", module, label)
            validate_parameter("mark_attention", parameter, constraint, label)
            found.append((parameter, constraint, label))
    if not found:
        raise ValueError(
            f"mark_attention: found no nn.MultiheadAttention in {type(module).__name__}; mark the weight of other "
            "attentions with mark_orthogonal(module, name, blocks=3 * heads, which=...)."
        )
    return constrain_all("mark_attention", module, found)


def _as_int(number: SupportsIndex) -> int:
    """Convert an integer, also one of numpy, to int; return any other value unchanged, for the validation to reject."""
    is_int = hasattr(number, "__index__") and not isinstance(number, bool)
    return operator.index(number) if is_int else number  # type: ignore[return-value]


def _as_ints(blocks: Any) -> Any:
    """Convert ``blocks`` to an int or a tuple of ints."""
    is_sequence = isinstance(blocks, Iterable) and not isinstance(blocks, str)
    return tuple(_as_int(size) for size in blocks) if is_sequence else _as_int(blocks)


def _normalize_indices(which: Any, sizes: Any) -> Any:
    """Return block indices sorted and without negative ones; None for all blocks, invalid values unchanged."""
    if which is None or not isinstance(which, Iterable) or isinstance(which, str):
        return which
    indices, count = tuple(_as_int(k) for k in which), len(sizes) if isinstance(sizes, tuple) else sizes
    if not all(isinstance(k, int) and not isinstance(k, bool) for k in (*indices, count)):
        return indices
    if not all(-count <= k < count for k in indices):
        return indices
    indices = tuple(sorted({k % count for k in indices}))
    return None if indices == tuple(range(count)) else indices


def _num_gates(module: nn.Module, name: str) -> int | None:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf.startswith(("weight_hh", "weight_ih")):
        return next((gates for kind, gates in _NUM_GATES.items() if isinstance(owner, kind)), None)
    return 1 if leaf.startswith("weight_hr") and isinstance(owner, nn.LSTM) else None
