"""Tag of a marked parameter, which stores its constraint.

The tag is an attribute. The parameter remains an ordinary ``nn.Parameter`` with its name and storage.
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..linalg.precision import LOW_PRECISION
from ..manifolds import Manifold
from ..manifolds.geoopt import constraint_of_geoopt, make_euclidean
from ..manifolds.layout import BlockLayout, Layout, get_points, set_points_
from ..manifolds.records import constraint_from_tag, constraint_to_tag

DTYPES = (torch.float32, torch.float64, torch.complex64, torch.complex128, *LOW_PRECISION)  # that can be marked

CONSTRAINED = "constrained"  # key in optimizer state: the constraint that the moments belong to
TAG = "_manifold_opt_constraint"  # attribute of a marked parameter
marks_made = "0"  # changes with every mark; compiled steps are guarded by it, which needs a string
T = TypeVar("T", bound=Tensor)
Corrections = list[tuple[Layout, Tensor, Tensor]]  # layouts, masks of the points to correct, and their nearest points


@torch.no_grad()
def find_off_manifold(
    parameter: Tensor, constraint: Manifold, slack: float = 0.0
) -> list[tuple[Layout, Tensor, Tensor]]:
    """Find the points of a parameter whose error exceeds both rounding and ``slack``.

    Returns:
        One entry per layout with such points: the layout, a mask, and the nearest points of the masked ones.

    Raises:
        ValueError: a point has no nearest point, for example a block that is not finite or is rank-deficient. The
            message gives the index of the point.
    """
    if parameter.is_meta:
        return []  # it has no values yet; the first step projects it
    layouts = constraint.layouts(parameter.shape)
    batches = [get_points(layout, parameter.detach()) for layout in layouts]
    offset, found = 0, []
    for layout, points in zip(layouts, batches, strict=True):
        try:
            off, values = constraint.find_off_manifold(points, slack)
        except ValueError as error:
            if isinstance(layout, BlockLayout) and layout.is_transposed(layout.to_rows(parameter.detach(), copy=True)):
                points = points.mT  # so that the message has the shape of the blocks in the parameter
            index, reason = _first_invalid(constraint, points, slack) or (0, error)
            single = sum(map(len, batches)) == 1
            prefix = "" if single else f"{constraint.point_name} {constraint.index_of(offset + index)}: "
            raise ValueError(prefix + str(reason).removeprefix("nearest_orthogonal: ")) from None
        if bool(off.any()):
            found.append((layout, off, values))
        offset += len(points)
    return found


def _first_invalid(constraint: Manifold, points: Tensor, slack: float) -> tuple[int, ValueError] | None:
    """Find the first point without a nearest point by bisection; return its index and its error."""
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
    except ValueError as error:
        return first, error
    return None  # a user's manifold may raise only for the whole batch


@torch.no_grad()
def write_points_(parameter: Tensor, corrections: Corrections) -> None:
    """Write the nearest points found by :func:`find_off_manifold` to the parameter."""
    for layout, off, values in corrections:
        set_points_(layout, parameter.detach(), off, values)


def is_flattened(parameter: Tensor) -> bool:
    """Return True if the parameter is a flat parameter of FSDP1, or a part of one."""
    return bool(getattr(parameter, "_fsdp_flattened", False))


def set_constraint(parameter: Tensor, constraint: Manifold) -> None:
    """Tag a parameter, which has to be on the manifold already."""
    _set_tag(parameter, constraint_to_tag(constraint))


def _set_tag(parameter: Tensor, tag: Any) -> None:
    global marks_made
    setattr(parameter, TAG, tag)
    marks_made = str(int(marks_made) + 1)


def free(parameter: Tensor) -> None:
    """Set the tag of a parameter to None, for unmarked; a geoopt.ManifoldParameter becomes Euclidean."""
    if constraint_of(parameter) is not None:
        make_euclidean(parameter)
    _set_tag(parameter, None)


def tag_geoopt_parameter(parameter: Tensor) -> None:
    """Tag a geoopt.ManifoldParameter, because a graph traced by torch.compile reads only the tag."""
    constraint = constraint_of(parameter)
    if constraint is not None and not hasattr(parameter, TAG):
        set_constraint(parameter, constraint)


def was_unmarked(parameter: Tensor) -> bool:
    """Return True if the parameter was unmarked, so that its constraint must not be restored."""
    return hasattr(parameter, TAG) and constraint_of(parameter) is None


def constraint_of(x: Any) -> Any:
    """Return the constraint of a parameter by its tag, or those of all parameters of a module by name."""
    found = getattr(x, TAG, None)
    if type(found) is tuple:
        found = constraint_from_tag(found)
    if type(x) is nn.Parameter or (found is None and hasattr(x, TAG)):
        return found
    if isinstance(x, nn.Module):
        return {name: known for name, p in x.named_parameters() if (known := constraint_of(p)) is not None}
    if not isinstance(x, Tensor):
        raise TypeError(f"constraint_of: needs a parameter or a module, got {type(x).__name__}.")
    return constraint_of_geoopt(x) or found  # the parameter's manifold may have changed since it was tagged
