"""Base class of the manifolds: the interface between a constraint and the optimizers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linalg.precision import working_dtype
from .layout import Layout, Shape, SliceLayout


class Manifold:
    r"""Constraint of a parameter to a manifold, kept by a retraction.

    Every method takes a batch of points ``x``, ``(B, ..., *point)``, treats each point independently and has no side
    effects. A subclass is a frozen dataclass whose fields are numbers, strings or tuples of them, so that a checkpoint
    can record it. It implements at least :meth:`riemannian_gradient`, :meth:`retract`, :meth:`project_point`
    and :meth:`error`. An entry in :data:`~manifold_opt.MANIFOLDS` registers it by name.

    Attributes:
        point_ndim: number of trailing dimensions of a parameter that form one point; the others are batch dimensions.
        dim: the dimension that :meth:`free_rows` refers to.
        allows_decoupled_decay: True if decoupled weight decay applies: for a point x and :math:`0 \le t < 1`,
            :math:`(1 - t) x` is a point too.
        allows_l2_penalty: True if an L2 penalty applies, through its gradient.
        allows_complex: True if complex parameters are supported.
        point_name: name of a point in error messages.

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from manifold_opt import Adam, Manifold, mark_manifold
    >>> @dataclass(frozen=True)
    ... class Centred(Manifold):  # vectors whose entries add up to zero
    ...     point_ndim = 1
    ...     def riemannian_gradient(self, x, g):
    ...         return g - g.mean(-1, keepdim=True)
    ...     def retract(self, x, v):
    ...         return self.project_point(x + v)
    ...     def project_point(self, x):
    ...         return x - x.mean(-1, keepdim=True)
    ...     def error(self, x):
    ...         return x.double().sum(-1).abs()
    >>> logits = mark_manifold(torch.nn.Parameter(torch.tensor([1.0, 2.0, 6.0])), Centred())
    >>> logits.grad = torch.tensor([1.0, 0.0, 0.0])
    >>> Adam([logits], lr=0.5).step()
    >>> logits.detach(), Centred().error(logits.detach()) < 1e-6
    (tensor([-2.6667, -0.6667,  3.3333]), tensor(True))
    """

    point_ndim = 0
    dim = 0
    allows_decoupled_decay = False
    allows_l2_penalty = False
    allows_complex = False
    point_name = "point"

    def layouts(self, shape: Shape) -> tuple[Layout, ...]:  # noqa: ARG002
        """Return the layouts of the points in a parameter of this shape; by default its last dimensions are a point.

        Override it with a :class:`~manifold_opt.manifolds.layout.SliceLayout` along another dimension, or with
        :class:`~manifold_opt.manifolds.layout.BlockLayout`.
        """
        return (SliceLayout(self.point_ndim),)

    def free_rows(self, shape: Shape) -> list[tuple[int, int]]:  # noqa: ARG002
        """Return start and length along ``dim`` of the rows outside every layout; they train as with torch.optim."""
        return []

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """Return the Riemannian gradient at ``x`` of a function with Euclidean gradient ``g``."""
        raise NotImplementedError

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """Retract the tangent ``v`` at ``x``: return ``x`` for ``v = 0``, and ``x + v`` to first order."""
        raise NotImplementedError

    def project_tangent(self, x: Tensor, d: Tensor) -> Tensor:
        """Return the tangent at ``x`` that is nearest to ``d``.

        ``d`` is a tangent that was rescaled element by element, or a tangent at another point. In the metric of the
        surrounding space this is the map of :meth:`riemannian_gradient`, the default.
        """
        return self.riemannian_gradient(x, d)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        """Transport the tangent ``v`` from ``x`` to ``y``, the end of a step; linear in ``v``."""
        return self.project_tangent(y, v)

    def project_point(self, x: Tensor) -> Tensor:
        """Return the nearest points of the manifold; raise a ValueError if there is none."""
        raise NotImplementedError

    def error(self, x: Tensor) -> Tensor:
        """Return the distances from the manifold, ``(B, ...)``, in float64."""
        raise NotImplementedError

    def tolerance(self, x: Tensor) -> float:
        """Return the largest :meth:`error` that rounding explains."""
        return 16 * torch.finfo(x.dtype).eps * max(1, x[0].numel()) ** 0.5

    def component_squares(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: ARG002
        """Return the squares of a Riemannian gradient ``u`` that Adam's second moment averages.

        They are either one per entry, adding up to the squared norm in the metric, or the squared norm, one value per
        point that broadcasts. For complex entries the real and the imaginary part are squared separately.
        """
        return torch.complex(u.real.square(), u.imag.square()) if u.is_complex() else u * u

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """Return why the parameter cannot be marked, to follow its name in an error message, or None if it can."""
        if tensor.ndim < self.point_ndim:
            return f"has shape {tuple(tensor.shape)}; a point of {self} has {self.point_ndim} dimensions."
        return None

    def find_off_manifold(self, x: Tensor, slack: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return a mask of the points whose error exceeds both rounding and ``slack``, and their nearest points."""
        off = ~(self.error(x) <= max(self.tolerance(x), slack))  # True for NaN
        return off, self.project_point(x[off].to(working_dtype(x.dtype))).to(x) if bool(off.any()) else x[off]

    def index_of(self, point: int) -> int:
        """Return the index of a point for error messages, given its position over all layouts."""
        return point

    def unserializable_reason(self) -> str | None:
        """Return why a checkpoint cannot record it, to follow its name in an error message, or None if it can."""
        parameters = getattr(self, "__dataclass_params__", None)
        if parameters is None or not parameters.frozen or "__dataclass_fields__" not in vars(type(self)):
            return "must be a dataclass that does not change: put @dataclass(frozen=True) above it."
        odd = next((value for value in self.config() if not _is_primitive(value)), None)
        if odd is not None:
            return f"is made of a {type(odd).__name__}; a checkpoint records numbers, strings and tuples of such."
        return None

    def config(self) -> tuple[Any, ...]:
        """Return the values of the fields, as a checkpoint records them."""
        return tuple(getattr(self, field) for field in getattr(self, "__dataclass_fields__", ()))


def _is_primitive(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_primitive, value))
    return value is None or type(value) in (bool, int, float, str)
