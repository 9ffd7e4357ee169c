"""Adapter to the manifolds of geoopt."""

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
    """Constraint of a parameter to a manifold of geoopt; every method delegates to that manifold.

    Attributes:
        manifold: a :class:`geoopt.manifolds.Manifold`; the last ``ndim`` dimensions are a point.
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
        """Return its class, settings and submodules as a string; learnable parameters appear without their values."""
        return (_config_string(self.manifold),)

    def layouts(self, shape: Shape) -> tuple[SliceLayout, ...]:  # noqa: ARG002
        """Return a single layout: the last ``ndim`` dimensions are a point, the others a batch."""
        return (SliceLayout(self.manifold.ndim),)

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Call ``egrad2rgrad``."""
        return _batched_or_nan(self.manifold.egrad2rgrad, x, g.clone())  # Lorentz writes to its argument

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Call ``retr``."""
        return _batched_or_nan(self.manifold.retr, x, v)

    def project_tangent(self, x: Tensor, d: Tensor) -> Tensor:  # noqa: ARG002
        """Return ``d``: a tangent scaled by one factor per point, or per factor of a product, is still tangent."""
        return d

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Call ``transp``."""
        return _batched_or_nan(self.manifold.transp, x, y, v)

    def component_squares(self, x: Tensor, u: Tensor) -> Tensor:
        """Call ``component_inner``: one value per point, or per factor of a product manifold."""
        square = _batched_or_nan(self.manifold.component_inner, x, u)
        square = square.real if square.is_complex() else square
        return square.view(*square.shape, *[1] * (u.ndim - square.ndim))  # Siegel manifolds drop a dimension

    def project_point(self, x: Tensor) -> Tensor:
        """Call ``projx``; raise a ValueError if the result or its gradient is not finite."""
        if not bool(x.isfinite().all()):
            raise ValueError("the value has entries that are not finite. Initialize it first.")
        y = self.manifold.projx(x)
        if not bool(self._has_finite_gradient(y).all()):
            raise ValueError(
                f"{self} has no point near it, or one where its gradient is not finite, like a singular matrix. "
                "Initialize it first, with random or origin of the manifold."
            )
        return y

    def error(self, x: Tensor) -> Tensor:
        """Return the distance to ``projx`` in the surrounding space; NaN where the gradient is not finite."""
        x = x.to(working_dtype(x.dtype))
        dims = self.manifold.ndim
        finite = point_norm(x, dims).isfinite() if dims else x.isfinite()
        found = x[finite]
        y = self.manifold.projx(found)
        distance = point_norm(float64(found) - float64(y), dims)
        error = torch.full(finite.shape, torch.nan, dtype=torch.float64, device=distance.device)
        error[finite.to(distance.device)] = torch.where(
            self._has_finite_gradient(found).to(distance.device), distance, torch.nan
        )
        return error

    def _has_finite_gradient(self, x: Tensor) -> Tensor:
        """Return a mask of the points at which a zero step is finite."""
        y = self.retract(x, torch.zeros_like(x))
        return point_norm(y, self.manifold.ndim).isfinite()

    def tolerance(self, x: Tensor) -> float:
        """Return geoopt's own tolerance, 1e-5 relative, plus the rounding of a dtype below float32."""
        stored = torch.finfo(x.dtype).eps if working_dtype(x.dtype) != x.dtype else 0.0
        return (1e-5 + 2 * stored) * max(1.0, float(x.abs().max()) if len(x) else 1.0)

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """Return geoopt's objection to the shape, or None."""
        ok, reason = self.manifold._check_shape(tensor.shape, "it")
        return (
            None if ok else f"has shape {tuple(tensor.shape)}, which {_config_string(self.manifold)} refuses: {reason}"
        )


def wrap(manifold: Any) -> Manifold:
    """Return the constraint for a manifold of geoopt or of the user; geoopt's Stiefel becomes :class:`Orthogonal`."""
    if isinstance(manifold, Manifold):
        problem = manifold.unserializable_reason()
        if problem:
            raise ValueError(f"mark_manifold: {type(manifold).__name__} {problem}")
        return manifold
    geoopt = sys.modules.get("geoopt")
    if geoopt is None or not isinstance(manifold, geoopt.manifolds.base.Manifold):
        found = f"the class {manifold.__name__}" if isinstance(manifold, type) else type(manifold).__name__
        raise ValueError(
            "mark_manifold: needs a manifold, as geoopt.Sphere() is, or one of your own that is a "
            f"manifold_opt.Manifold, got {found}."
        )
    return Orthogonal(flatten=False) if isinstance(manifold, geoopt.Stiefel) else Geoopt(manifold)


def constraint_of_geoopt(parameter: Tensor) -> Manifold | None:
    """Return the constraint of a geoopt.ManifoldParameter; None for any other tensor."""
    if not _is_of_geoopt(parameter):
        return None
    manifold = parameter.manifold  # type: ignore[attr-defined]
    known = getattr(parameter, _WRAPPED_ATTR, None)  # cached: every step needs it
    if known is None or known[0] is not manifold:
        free = isinstance(manifold, sys.modules["geoopt"].Euclidean)
        known = (manifold, None if free else wrap(manifold))
        setattr(parameter, _WRAPPED_ATTR, known)
    return known[1]


def make_euclidean(parameter: Tensor) -> None:
    """Set the manifold of a geoopt.ManifoldParameter to Euclidean; do nothing for any other tensor."""
    if _is_of_geoopt(parameter):
        parameter.manifold = sys.modules["geoopt"].Euclidean()  # type: ignore[attr-defined]


def is_handled_by(optimizer: Any, parameter: Tensor) -> bool:
    """Return True if the optimizer is one of geoopt and the parameter is on one of its manifolds."""
    return type(optimizer).__module__.split(".")[0] == "geoopt" and constraint_of_geoopt(parameter) is not None


def _batched_or_nan(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """Apply a function of geoopt to a batch; return NaN for points at which a factorization fails."""
    try:
        return function(*batches)
    except RuntimeError as failure:
        if "linalg" not in str(failure):
            raise
    if len(batches[0]) == 1:
        return torch.full_like(batches[0], torch.nan)
    return torch.cat([_batched_or_nan(function, *point) for point in zip(*(b.split(1) for b in batches), strict=True)])  # type: ignore[no-untyped-call]


_WRAPPED_ATTR = "_manifold_opt_adopted"


def _is_of_geoopt(parameter: Tensor) -> bool:
    geoopt = sys.modules.get("geoopt")
    return geoopt is not None and isinstance(parameter, geoopt.ManifoldParameter)


def _config_string(manifold: Any) -> str:
    """Return the class name of the manifold and of each submodule, with their settings."""
    return " ".join(
        f"{type(module).__name__}({', '.join(_config_items(module))})"
        for module in manifold.modules()
        if not isinstance(module, torch.nn.ModuleList)
    )


def _config_items(module: Any) -> Iterator[str]:
    for key, value in vars(module).items():
        if not key.startswith("_") and key not in ("training", "name") and not callable(value):
            # The default repr contains the address of the object, which differs in every process.
            has_repr = type(value).__repr__ is not object.__repr__  # type: ignore[comparison-overlap]
            yield f"{key}={value if has_repr else type(value).__name__}"
    for key, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        entries = value.detach().flatten().tolist()
        yield f"{key}={'learnt' if value.requires_grad else ' '.join(f'{entry:.9g}' for entry in entries)}"
