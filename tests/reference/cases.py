"""Instances of every manifold, each with a shape, and parameters marked so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from manifold_opt import Manifold, Orthogonal, mark_manifold
from manifold_opt.manifolds import Geoopt, Positive, Spectral, UnitNorm
from manifold_opt.manifolds.layout import get_points

from ..helpers import gaussian


@dataclass(frozen=True)
class Case:
    """A manifold, a parameter's shape, and a way to leave it.

    Attributes:
        start: what a Gaussian of that shape becomes, for a value near the manifold.
        leave: where from a point it is no longer one.
        inside: what a point is multiplied by to be inside, where there is an inside.
        breaks: names of the axioms that it does not keep, and geoopt does not promise.
    """

    manifold: Manifold
    shape: tuple[int, ...]
    start: Callable[[Tensor], Tensor] = lambda x: x
    leave: Callable[[Tensor], Tensor] = lambda x: 2 * x
    inside: float = 1.0
    breaks: tuple[str, ...] = ()


CASES = {
    "orthogonal wide": Case(Orthogonal(), (3, 5)),
    "orthogonal gates": Case(Orthogonal(blocks=3, gain=2.0), (12, 4)),
    "orthogonal batch": Case(Orthogonal(flatten=False), (3, 5, 4)),
    "unit rows": Case(UnitNorm(), (4, 5)),
    "unit columns": Case(UnitNorm(1), (5, 4)),
    "unit filters": Case(UnitNorm(), (4, 3, 2, 2)),
    "unit filters, transposed": Case(UnitNorm(1), (3, 4, 2, 2)),
    "spectral wide": Case(Spectral(0.7), (3, 7), inside=0.5),
    "spectral tall": Case(Spectral(), (8, 3), inside=0.5),
    "spectral square": Case(Spectral(2.0), (5, 5), inside=0.5),
    "spectral filters": Case(Spectral(), (4, 2, 3, 3), inside=0.5),
    "spectral filters, transposed": Case(Spectral(1.0, 1), (3, 5, 2, 2), inside=0.5),
    "positive number": Case(Positive(), (), torch.exp, torch.neg),
    "positive vector": Case(Positive(), (5,), torch.exp, torch.neg),
    "positive matrix": Case(Positive(), (2, 3), torch.exp, torch.neg),
}
if importlib.util.find_spec("geoopt") is not None:
    import geoopt

    CASES |= {
        "geoopt sphere": Case(Geoopt(geoopt.Sphere()), (4, 3)),
        "geoopt ball": Case(
            Geoopt(geoopt.PoincareBall()), (4, 3), lambda x: 0.3 * x, lambda x: 2 * x / x.norm(dim=-1, keepdim=True)
        ),
        "geoopt spd": Case(
            Geoopt(geoopt.SymmetricPositiveDefinite()),
            (2, 3, 3),
            lambda x: x.mT @ x,
            torch.neg,
            # projx takes eigenvalues for their absolute value; no rounding is left of a step of 1e6.
            breaks=("any_step_ends_on_it", "nearest_points_are_points"),
        ),
    }


def parameter(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Parameter:
    return mark_manifold(nn.Parameter(case.start(gaussian(*case.shape, dtype=dtype, seed=seed))), case.manifold)


def points(case: Case, seed: int = 0) -> Tensor:
    """All points of a parameter; those of a ball inside it."""
    x = parameter(case, seed=seed).detach()
    (part,) = case.manifold.layouts(x.shape)
    return case.inside * get_points(part, x).clone()
