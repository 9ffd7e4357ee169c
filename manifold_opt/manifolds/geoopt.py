"""Any manifold of geoopt, by its own functions."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg.matrices import float64
from ..linalg.precision import working_dtype
from .base import Manifold
from .layout import Shape, SliceLayout, point_norm
from .orthogonal import Orthogonal


@dataclass(frozen=True, eq=False)
class Geoopt(Manifold):
    """The constraint of a parameter on a manifold of geoopt, which does the work.

    Attributes:
        manifold: a :class:`geoopt.manifolds.Manifold`, whose last ``ndim`` dimensions are a point.
    """

    allows_complex = allows_l2_penalty = True
    manifold: Any

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Geoopt) or self.manifold is other.manifold:
            return isinstance(other, Geoopt)
        learnable = any(p.requires_grad for p in (*self.manifold.parameters(), *other.manifold.parameters()))
        return not learnable and self.config() == other.config()

    def __hash__(self) -> int:
        return hash(self.config())

    def __repr__(self) -> str:
        return f"Geoopt({self.config()[0]})"

    def config(self) -> tuple[Any, ...]:
        """What it is made of, in words: its class, its numbers, its parts; of what is learnt, that it is."""
        return (_described(self.manifold),)

    def layouts(self, shape: Shape) -> tuple[SliceLayout, ...]:  # noqa: ARG002
        """The last dimensions are a point, the others a batch."""
        return (SliceLayout(dims=self.manifold.ndim),)

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """``egrad2rgrad``."""
        return _point_by_point(self.manifold.egrad2rgrad, x, g.clone())  # Lorentz writes to what it is given

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """``retr``."""
        return _point_by_point(self.manifold.retr, x, v)

    def project_tangent(self, x: Tensor, d: Tensor) -> Tensor:  # noqa: ARG002
        """Rescaled by one number a point, or a part of one, it is one still."""
        return d

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """``transp``."""
        return _point_by_point(self.manifold.transp, x, y, v)

    def component_squares(self, x: Tensor, u: Tensor) -> Tensor:
        """``component_inner``: one number a point, or a part of one."""
        square = _point_by_point(self.manifold.component_inner, x, u)
        square = square.real if square.is_complex() else square
        return square.view(*square.shape, *[1] * (u.ndim - square.ndim))  # those of Siegel lack a dimension

    def project_point(self, x: Tensor) -> Tensor:
        """``projx``."""
        if not bool(x.isfinite().all()):
            raise ValueError("the value has entries that are not finite. Initialize it first.")
        y = self.manifold.projx(x)
        if not bool(self._regular(y).all()):
            raise ValueError(
                f"{self} has no point near it, or one where its gradient is not finite, like a singular matrix. "
                "Initialize it first, with random or origin of the manifold."
            )
        return y

    def error(self, x: Tensor) -> Tensor:
        """Distance to ``projx`` in the surrounding space; NaN where there is no gradient."""
        x = x.to(working_dtype(x.dtype))
        dims = self.manifold.ndim
        finite = point_norm(x, dims).isfinite() if dims else x.isfinite()
        found = x[finite]
        y = self.manifold.projx(found)
        distance = point_norm(float64(found) - float64(y), dims)
        error = torch.full(finite.shape, torch.nan, dtype=torch.float64, device=distance.device)
        error[finite.to(distance.device)] = torch.where(self._regular(found).to(distance.device), distance, torch.nan)
        return error

    def _regular(self, x: Tensor) -> Tensor:
        """Where a step of no length is finite."""
        y = self.retract(x, torch.zeros_like(x))
        return point_norm(y, self.manifold.ndim).isfinite()

    def tolerance(self, x: Tensor) -> float:
        """What geoopt itself lets pass, 1e-5 of a value, and what storing it in less than float32 adds."""
        stored = torch.finfo(x.dtype).eps if working_dtype(x.dtype) != x.dtype else 0.0
        return (1e-5 + 2 * stored) * max(1.0, float(x.abs().max()) if len(x) else 1.0)

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """What geoopt says of the shape."""
        ok, reason = self.manifold._check_shape(tensor.shape, "it")
        return None if ok else f"has shape {tuple(tensor.shape)}, which {_described(self.manifold)} refuses: {reason}"


def constraint_from(manifold: Any) -> Manifold:
    """The constraint that a manifold of geoopt is: of a Stiefel one orthogonal blocks, on this package's own path."""
    if isinstance(manifold, Manifold):
        problem = manifold.unserializable_reason()
        if problem:
            raise ValueError(f"mark_manifold: {type(manifold).__name__} {problem}")
        return manifold
    geoopt = sys.modules.get("geoopt")
    if geoopt is None or not isinstance(manifold, geoopt.manifolds.base.Manifold):
        what = f"the class {manifold.__name__}" if isinstance(manifold, type) else type(manifold).__name__
        raise ValueError(
            "mark_manifold: needs a manifold, as geoopt.Sphere() is, or one of your own that is a "
            f"manifold_opt.Manifold, got {what}."
        )
    return Orthogonal(flatten=False) if isinstance(manifold, geoopt.Stiefel) else Geoopt(manifold)


def constraint_of_geoopt(parameter: Tensor) -> Manifold | None:
    """The constraint that a geoopt.ManifoldParameter says by itself; None of any other."""
    if not _is_of_geoopt(parameter):
        return None
    manifold = parameter.manifold  # type: ignore[attr-defined]
    known = getattr(parameter, _ADOPTED, None)  # asked for in every step
    if known is None or known[0] is not manifold:
        free = isinstance(manifold, sys.modules["geoopt"].Euclidean)
        known = (manifold, None if free else constraint_from(manifold))
        setattr(parameter, _ADOPTED, known)
    return known[1]


def make_euclidean(parameter: Tensor) -> None:
    """Let a geoopt.ManifoldParameter be anywhere; nothing to do for any other."""
    if _is_of_geoopt(parameter):
        parameter.manifold = sys.modules["geoopt"].Euclidean()  # type: ignore[attr-defined]


def kept_by(optimizer: Any, parameter: Tensor) -> bool:
    """Whether this is an optimizer of geoopt, and the parameter one that it keeps on its manifold."""
    return type(optimizer).__module__.split(".")[0] == "geoopt" and constraint_of_geoopt(parameter) is not None


def _point_by_point(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """What a function of geoopt says of a batch; where a factorization fails, NaN of the points it fails of."""
    try:
        return function(*batches)
    except RuntimeError as failure:
        if "linalg" not in str(failure):
            raise
    if len(batches[0]) == 1:
        return torch.full_like(batches[0], torch.nan)
    return torch.cat([_point_by_point(function, *point) for point in zip(*(b.split(1) for b in batches), strict=True)])  # type: ignore[no-untyped-call]


_ADOPTED = "_manifold_opt_adopted"


def _is_of_geoopt(parameter: Tensor) -> bool:
    geoopt = sys.modules.get("geoopt")
    return geoopt is not None and isinstance(parameter, geoopt.ManifoldParameter)


def _described(manifold: Any) -> str:
    """Its name and those of its parts, each with what it is made of."""
    return " ".join(
        f"{type(part).__name__}({', '.join(_made_of(part))})"
        for part in manifold.modules()
        if not isinstance(part, torch.nn.ModuleList)
    )


def _made_of(part: Any) -> Iterator[str]:
    for key, value in vars(part).items():
        if not key.startswith("_") and key not in ("training", "name") and not callable(value):
            named = type(value).__repr__ is not object.__repr__  # type: ignore[comparison-overlap]
            yield f"{key}={value if named else type(value).__name__}"  # where it lies is nothing to remember
    for key, value in (*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)):
        entries = value.detach().flatten().tolist()
        yield f"{key}={'learnt' if value.requires_grad else ' '.join(f'{entry:.9g}' for entry in entries)}"
