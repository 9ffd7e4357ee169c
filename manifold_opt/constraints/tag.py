"""What a parameter promises: its points lie on a manifold.

The promise is an attribute of the parameter. The parameter stays the plain ``nn.Parameter`` it was, under
its own name, with its own storage.
"""

from __future__ import annotations

from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from ..linalg.precision import LOW
from ..manifolds import Manifold
from ..manifolds.geoopt import constraint_of_geoopt, make_euclidean
from ..manifolds.layout import BlockLayout, Layout, get_points, set_points_
from ..manifolds.records import constraint_from_tag, constraint_to_tag

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128, *LOW)  # of parameters that can be marked

CONSTRAINED = "constrained"  # key in an optimizer's state of a parameter: under which constraint the moments are held
TAG = "_manifold_opt_constraint"  # attribute of a marked parameter
marks_made = "0"  # changes with every mark; a string, for a compiled step is compiled anew when it changes
T = TypeVar("T", bound=Tensor)
Corrections = list[tuple[Layout, Tensor, Tensor]]  # where points lie, which of them are off, and the nearest values


@torch.no_grad()
def find_off_manifold(
    parameter: Tensor, constraint: Manifold, slack: float = 0.0
) -> list[tuple[Layout, Tensor, Tensor]]:
    """Of every part of a parameter which points are off their manifold, and the nearest values of those.

    Off by more than rounding, or where ``slack`` allows for more, than that. Empty if none is.

    Raises:
        ValueError: a point has no nearest value, such as a block that is not finite or is rank-deficient. The message
            gives the index of the point.
    """
    if parameter.is_meta:
        return []  # it has no value yet; the first step puts it back
    parts = constraint.layouts(parameter.shape)
    batches = [get_points(part, parameter.detach()) for part in parts]
    before, found = 0, []
    for part, points in zip(parts, batches, strict=True):
        try:
            off, values = constraint.find_off_manifold(points, slack)
        except ValueError as refusal:
            if isinstance(part, BlockLayout) and part.is_tall(part.to_rows(parameter.detach(), copy=True)):
                points = points.mT  # as they lie in the parameter, for their shape to be said
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
            constraint.find_off_manifold(half, slack)
        except ValueError:
            points = half
        else:
            first, points = first + len(half), points[len(half) :]
    try:
        constraint.find_off_manifold(points, slack)
    except ValueError as refusal:
        return first, refusal
    return None  # only together, whatever that means to a manifold of somebody else


@torch.no_grad()
def write_points_(parameter: Tensor, found: Corrections) -> None:
    """Write what :func:`find_off_manifold` has found."""
    for part, off, values in found:
        set_points_(part, parameter.detach(), off, values)


def is_sharded(parameter: Tensor) -> bool:
    """Whether a process has a part of it only: a DTensor, or a flat piece of FSDP1. To import those takes long."""
    return hasattr(parameter, "placements") or getattr(parameter, "_fsdp_flattened", False)


def set_constraint(parameter: Tensor, constraint: Manifold) -> None:
    """Tag a parameter. What it promises has to be true already: marking.py sees to that."""
    _set_tag(parameter, constraint_to_tag(constraint))


def _set_tag(parameter: Tensor, tag: Any) -> None:
    global marks_made
    setattr(parameter, TAG, tag)
    marks_made = str(int(marks_made) + 1)


def free(parameter: Tensor) -> None:
    """Take the tag off a parameter and let it say so. A geoopt.ManifoldParameter gets the Euclidean manifold."""
    if constraint_of(parameter) is not None:
        make_euclidean(parameter)
    _set_tag(parameter, None)


def tag_geoopt_parameter(parameter: Tensor) -> None:
    """Tag a parameter that says by itself what it is: a graph that torch.compile traces sees the tag, not the rest."""
    constraint = constraint_of(parameter)
    if constraint is not None and not hasattr(parameter, TAG):
        set_constraint(parameter, constraint)


def was_unmarked(parameter: Tensor) -> bool:
    """Whether unmark has taken a constraint off it, so that it is not missed."""
    return hasattr(parameter, TAG) and constraint_of(parameter) is None


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
    found = getattr(x, TAG, None)
    if type(found) is tuple:
        found = constraint_from_tag(found)
    if type(x) is nn.Parameter or (found is None and hasattr(x, TAG)):
        return found
    if isinstance(x, nn.Module):
        return {name: known for name, p in x.named_parameters() if (known := constraint_of(p)) is not None}
    if not isinstance(x, Tensor):
        raise TypeError(f"constraint_of: needs a parameter or a module, got {type(x).__name__}.")
    return constraint_of_geoopt(x) or found  # its manifold may be another one by now
