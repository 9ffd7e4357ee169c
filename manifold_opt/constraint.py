"""What a parameter promises: its points lie on a manifold.

The promise is an attribute of the parameter. The parameter stays the plain ``nn.Parameter`` it was, under
its own name, with its own storage. The attribute of a constraint of this package is a tuple of primitives, so that a
parameter saved by itself loads with ``weights_only=True``, and where this package is not installed.
"""

from __future__ import annotations

import functools
import itertools
import json
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from .blocks import Part, overlap_problem, points_of, put_
from .manifolds import MANIFOLDS, Manifold, Orthogonal
from .manifolds.geoopt import constraint_of_geoopt, release
from .orthogonalizer import basin, orthogonalizer, spectral_bound
from .precision import LOW, FullPrecision, working_dtype
from .stiefel import check_whole

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128, *LOW)  # of parameters that can be marked

CONSTRAINED = "constrained"  # key in an optimizer's state of a parameter: under which constraint the moments are held
_ATTRIBUTE = "_manifold_opt_constraint"
_OWN = frozenset(MANIFOLDS.values()) - {MANIFOLDS["geoopt"]}  # those that their record says in full
Record = tuple[Any, ...]
T = TypeVar("T", bound=Tensor)


@torch.no_grad()
def off_manifold(parameter: Tensor, constraint: Manifold, slack: float = 0.0) -> list[tuple[Part, Tensor, Tensor]]:
    """Of every part of a parameter which points are off their manifold, and the nearest values of those.

    Off by more than rounding, or where ``slack`` allows for more, than that. Empty if none is.

    Raises:
        ValueError: a point has no nearest value, such as a block that is not finite or is rank-deficient. The message
            gives the index of the point.
    """
    if parameter.is_meta:
        return []  # it has no value yet; the first step puts it back
    parts = constraint.parts(parameter.shape)
    batches = [points_of(part, parameter.detach()) for part in parts]
    before, found = 0, []
    for part, points in zip(parts, batches, strict=True):
        try:
            off, values = constraint.off(points, slack)
        except ValueError as refusal:
            place, reason = _first_refused(constraint, points, slack) or (0, refusal)
            alone = sum(map(len, batches)) == 1
            where = "" if alone else f"{constraint.point_name} {constraint.index_of(before + place)}: "
            raise ValueError(where + str(reason).removeprefix("nearest_orthogonal: ")) from None
        if bool(off.any()):
            found.append((part, off, values))
        before += len(points)
    return found


def _first_refused(constraint: Manifold, points: Tensor, slack: float) -> tuple[int, ValueError] | None:
    """Place of the first point without a nearest value, found by bisection, and what is said of that point alone."""
    first = 0
    while len(points) > 1:
        half = points[: len(points) // 2]
        try:
            constraint.off(half, slack)
        except ValueError:
            points = half
        else:
            first, points = first + len(half), points[len(half) :]
    try:
        constraint.off(points, slack)
    except ValueError as refusal:
        return first, refusal
    return None  # only together, whatever that means to a manifold of somebody else


@torch.no_grad()
def put_back_(parameter: Tensor, found: list[tuple[Part, Tensor, Tensor]]) -> None:
    """Write what :func:`off_manifold` has found."""
    for part, off, values in found:
        put_(part, parameter.detach(), off, values)


def is_sharded(parameter: Tensor) -> bool:
    """Whether a process has a part of it only: a DTensor, or a flat piece of FSDP1. To import those takes long."""
    return hasattr(parameter, "placements") or getattr(parameter, "_fsdp_flattened", False)


def record_of(constraint: Manifold | None) -> Record | None:
    """A constraint as primitives, which a checkpoint can hold: its name, and what it is made of."""
    if constraint is None:
        return None
    kind = type(constraint)
    name = next((name for name, known in MANIFOLDS.items() if known is kind), kind.__qualname__)
    return (name, *constraint.options())


def recalled(record: Record) -> Manifold | None:
    """The constraint that a record says, where it is of this package; None of another."""
    name, *options = record
    return MANIFOLDS[name](*options) if name in MANIFOLDS and name != "geoopt" else None


def is_record_of(record: Record, constraint: Manifold | None) -> bool:
    """Whether a record, perhaps of an earlier version with fewer options, says this constraint."""
    known = recalled(record)
    return record == record_of(constraint) if known is None else known == constraint


def record_as_tensor(record: Record) -> Tensor:
    """A record as a tensor, which an optimizer's state can hold: the bytes of JSON, uint8 on the CPU.

    >>> from manifold_opt.constraint import record_as_tensor
    >>> bytes(record_as_tensor(("unit_norm", 0))).decode()
    '["unit_norm", 0]'
    """
    return torch.frombuffer(bytearray(json.dumps(record).encode()), dtype=torch.uint8)


def record_in(tensor: Tensor) -> Record | None:
    """The record that an optimizer's state holds, whatever dtype it was loaded as.

    None if it does not say which: a checkpoint of an earlier version has a single one there.
    """
    if tensor.ndim == 0 or tensor.is_meta:
        return None
    try:
        record: Record = as_tuples(json.loads(bytes(tensor.to("cpu", torch.uint8).tolist())))
    except ValueError:
        raise ValueError(
            "the entry 'constrained' in the state of a parameter is no record of a constraint: something has written "
            "to it, as code does that indexes every entry by row. del opt.state[param] drops the state."
        ) from None
    return record


def as_tuples(record: Any) -> Any:
    """A record whose tuples have become lists on a way that knows none, like JSON's."""
    return tuple(map(as_tuples, record)) if isinstance(record, (list, tuple)) else record


@functools.lru_cache(maxsize=1024)
def _constraint_in(tag: Record) -> Manifold:
    """The constraint that the attribute of a parameter says: the same object every time, for every step asks."""
    constraint = recalled(tag)
    if constraint is None:
        raise ValueError(
            f"constraint_of: a parameter was saved with the mark {tag[0]!r}, which this version of manifold_opt does "
            "not have. Install the version that saved it, or delete its attribute _manifold_opt_constraint."
        )
    return constraint


def described(record: Record) -> str:
    """A record in words."""
    known = recalled(record)
    return repr(known) if known is not None else f"{record[0]}{record[1:]}"


def attach(parameter: Tensor, constraint: Manifold) -> None:
    """Tag a parameter. What it promises has to be true already: marking.py sees to that."""
    setattr(parameter, _ATTRIBUTE, record_of(constraint) if type(constraint) in _OWN else constraint)


def free(parameter: Tensor) -> None:
    """Take the tag off a parameter and let it say so. A geoopt.ManifoldParameter gets the Euclidean manifold."""
    if constraint_of(parameter) is not None:
        release(parameter)
    setattr(parameter, _ATTRIBUTE, None)


def adopt(parameter: Tensor) -> None:
    """Tag a parameter that says by itself what it is: a graph that torch.compile traces sees the tag, not the rest."""
    constraint = constraint_of(parameter)
    if constraint is not None and not hasattr(parameter, _ATTRIBUTE):
        attach(parameter, constraint)


def was_unmarked(parameter: Tensor) -> bool:
    """Whether unmark has taken a constraint off it, so that it is not missed."""
    return hasattr(parameter, _ATTRIBUTE) and constraint_of(parameter) is None


@overload
def constraint_of(x: Tensor) -> Manifold | None: ...
@overload
def constraint_of(x: nn.Module) -> dict[str, Manifold]: ...
def constraint_of(x: Any) -> Any:
    """The constraint that a parameter was marked with, or those of all marked parameters of a module.

    Args:
        x: any tensor, or a module.

    Returns:
        An :class:`~manifold_opt.Orthogonal`, another of :data:`~manifold_opt.MANIFOLDS`, or one of your own; None of a
        parameter that is free. For a module, ``{name: constraint}`` of its marked parameters.

    Raises:
        TypeError: neither a tensor nor a module.

    >>> import torch
    >>> from manifold_opt import constraint_of, mark_orthogonal
    >>> gru = torch.nn.GRU(4, 4)
    >>> constraint_of(mark_orthogonal(gru, "weight_hh_l0"))
    Orthogonal(blocks=3, dim=0, gain=1.0)
    >>> constraint_of(gru)
    {'weight_hh_l0': Orthogonal(blocks=3, dim=0, gain=1.0)}
    """
    found = getattr(x, _ATTRIBUTE, None)
    if type(found) is tuple:
        found = _constraint_in(found)
    if type(x) is nn.Parameter or (found is None and hasattr(x, _ATTRIBUTE)):
        return found
    if isinstance(x, nn.Module):
        return {name: known for name, p in x.named_parameters() if (known := constraint_of(p)) is not None}
    if not isinstance(x, Tensor):
        raise TypeError(f"constraint_of: needs a parameter or a module, got {type(x).__name__}.")
    return constraint_of_geoopt(x) or found  # its manifold may be another one by now


@torch.no_grad()
def orthogonalize_(tensor: T, beta: float = 0.5, steps: int = 1) -> T:
    r"""Move towards orthogonality in place, :math:`W \leftarrow (1+\beta) W - \beta W W^\top W`.

    Every block of a marked parameter (after division by its gain), or every matrix of a batch
    ``(..., p, n)``, wide or tall. The error shrinks by :math:`1 - 2\beta` a step near the manifold, and is
    squared at ``beta = 0.5``.

    Args:
        tensor: marked parameter or ``(..., p, n)`` of a floating-point or complex dtype.
        beta: rate, in (0, 1).
        steps: number of iterations, at least 1.

    Returns:
        The same tensor.

    Raises:
        ValueError: ``beta`` or ``steps`` out of range, or a singular value above
            :math:`\sqrt{(1+\beta)/\beta}`, from where the iteration does not find the nearest orthogonal
            matrix; :func:`nearest_orthogonal` does from anywhere. Nothing has been written then.

    Reference: Higham (2008), *Functions of Matrices*, section 8.3, for ``beta = 0.5``, the Newton-Schulz iteration.

    >>> import torch
    >>> from manifold_opt import orthogonalize_
    >>> orthogonalize_(torch.tensor([[1.1]]))  # 1.5 * 1.1 - 0.5 * 1.1**3
    tensor([[0.9845]])
    """
    if not 0 < beta < 1:
        raise ValueError(f"orthogonalize_: beta must lie in (0, 1), got {beta}; 0.5 converges fastest.")
    if steps < 1:
        raise ValueError(f"orthogonalize_: steps must be at least 1, got {steps}.")
    problem = overlap_problem(tensor)
    if problem:
        raise ValueError(f"orthogonalize_: the tensor {problem}")
    dtype = working_dtype(tensor.dtype)
    found = matrices_of(tensor, "orthogonalize_")
    for matrices, gain in found:
        _check_basin(matrices.to(dtype) / gain, beta)
    mark = constraint_of(tensor)
    parts = mark.parts(tensor.shape) if isinstance(mark, Orthogonal) else ()
    for (matrices, gain), part in itertools.zip_longest(found, parts):
        with FullPrecision(tensor.device.type):
            new = (gain * orthogonalizer(matrices.to(dtype) / gain, beta=beta, steps=steps)).to(tensor.dtype)
        matrices.copy_(new) if part is None else put_(part, tensor.detach(), ..., new)
    return tensor


def _check_basin(w: Tensor, beta: float) -> None:
    with FullPrecision(w.device.type):
        gram = w.mH @ w if w.shape[-2] > w.shape[-1] else w @ w.mH
        # The cheap bound decides nearly always; the SVD cannot be asked where an entry is not finite.
        if not bool((spectral_bound(gram) < basin(beta) ** 2).all()) and not (
            bool(w.isfinite().all()) and bool((torch.linalg.matrix_norm(w, 2) < basin(beta)).all())
        ):
            raise ValueError(
                f"orthogonalize_: a singular value is not below {basin(beta):.3g}, from where beta={beta} does not "
                "converge to the nearest orthogonal matrix; use nearest_orthogonal."
            )


def matrices_of(tensor: Tensor, name: str) -> list[tuple[Tensor, float]]:
    """The matrices that ``tensor`` stands for, views where they can be, and the gain they are to be divided by."""
    check_whole(name, tensor)
    constraint = constraint_of(tensor)
    if isinstance(constraint, Orthogonal):
        return [(points_of(part, tensor.detach()), constraint.gain) for part in constraint.parts(tensor.shape)]
    if tensor.ndim < 2 or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name}: needs a marked parameter or matrices (..., p, n) of a floating-point or complex dtype, got shape "
            f"{tuple(tensor.shape)} of {tensor.dtype}."
        )
    return [(tensor.detach(), 1.0)]
