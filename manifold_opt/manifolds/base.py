"""What the optimizers need to know of a constraint."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linalg.precision import working_dtype
from .layout import Layout, Shape, SliceLayout


class Manifold:
    r"""A constraint by retraction: the points that a marked parameter may be.

    Every function takes a batch of points ``x``, ``(B, ..., *point)``, decides about each point by itself, and is
    pure. A subclass is a frozen dataclass of what it is made of, numbers, strings and tuples of such, which a
    checkpoint records, and has at least :meth:`riemannian_gradient`, :meth:`retract`, :meth:`project_point`
    and :meth:`error`. With one line in :data:`~manifold_opt.MANIFOLDS` it is known by its name.

    Attributes:
        dims: how many dimensions of a parameter, the last ones, are one point; those before count points.
        dim: the dimension along which :meth:`free_rows` counts.
        decays: whether decoupled weight decay acts: :math:`(1 - t) x` of a point is one, :math:`0 \le t < 1`.
        penalized: whether an L2 penalty does: by its gradient.
        complex: whether complex parameters can be points.

    >>> from dataclasses import dataclass
    >>> import torch
    >>> from manifold_opt import Adam, Manifold, mark_manifold
    >>> @dataclass(frozen=True)
    ... class Centred(Manifold):  # vectors whose entries add up to zero
    ...     dims = 1
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

    dims = 0
    dim = 0
    allows_decoupled_decay = False
    allows_l2_penalty = False
    allows_complex = False
    point_name = "point"  # in messages

    def layouts(self, shape: Shape) -> tuple[Layout, ...]:  # noqa: ARG002
        """Where the points of a parameter of this shape lie, if not in its last dimensions.

        :class:`~manifold_opt.manifolds.layout.SliceLayout` along another dimension, or
        :class:`~manifold_opt.manifolds.layout.BlockLayout`.
        """
        return (SliceLayout(self.dims),)

    def free_rows(self, shape: Shape) -> list[tuple[int, int]]:  # noqa: ARG002
        """Start and length along ``dim`` of what is in no part of it, and is trained as torch trains it."""
        return []

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        """The Riemannian gradient at ``x`` of a function with Euclidean gradient ``g``."""
        raise NotImplementedError

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        """The next point, ``x`` for a zero tangent ``v``, and to first order ``x + v``."""
        raise NotImplementedError

    def project_tangent(self, x: Tensor, d: Tensor) -> Tensor:
        """The tangent at ``x`` that is nearest to ``d``: an element-wise rescaled one, or one from elsewhere.

        The gradient of the surrounding space is projected so too, where the metric is that of the surrounding space.
        """
        return self.riemannian_gradient(x, d)

    def transport(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:  # noqa: ARG002
        """The tangent ``v`` at ``x`` as one at ``y``, where a step has led to; linear in ``v``."""
        return self.project_tangent(y, v)

    def project_point(self, x: Tensor) -> Tensor:
        """The nearest point, from anywhere. A ValueError where there is none."""
        raise NotImplementedError

    def error(self, x: Tensor) -> Tensor:
        """How far from the manifold, ``(B, ...)``, in float64."""
        raise NotImplementedError

    def tolerance(self, x: Tensor) -> float:
        """Largest error that is of rounding."""
        return 16 * torch.finfo(x.dtype).eps * max(1, x[0].numel()) ** 0.5

    def component_squares(self, x: Tensor, u: Tensor) -> Tensor:  # noqa: ARG002
        """What Adam's second moment averages of a Riemannian gradient ``u``.

        The square of every entry in the metric, which add up to that of its length; or the square of its length, one
        number a point, which broadcasts. Of complex entries the real and the imaginary part squared, each by itself.
        """
        return torch.complex(u.real.square(), u.imag.square()) if u.is_complex() else u * u

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """Why a parameter cannot be marked so, as the end of a sentence that begins with its name."""
        if tensor.ndim < self.dims:
            return f"has shape {tuple(tensor.shape)}; a point of {self} has {self.dims} dimensions."
        return None

    def find_off_manifold(self, x: Tensor, slack: float = 0.0) -> tuple[Tensor, Tensor]:
        """Which points are off by more than rounding and ``slack``, and the nearest values of those."""
        off = ~(self.error(x) <= max(self.tolerance(x), slack))  # a NaN is off
        return off, self.project_point(x[off].to(working_dtype(x.dtype))).to(x) if bool(off.any()) else x[off]

    def index_of(self, point: int) -> int:
        """The index by which a message names a point, counted over all parts."""
        return point

    def unserializable_reason(self) -> str | None:
        """Why a checkpoint cannot record it, as the end of a sentence that begins with its name."""
        parameters = getattr(self, "__dataclass_params__", None)
        if parameters is None or not parameters.frozen or "__dataclass_fields__" not in vars(type(self)):
            return "must be a dataclass that does not change: put @dataclass(frozen=True) above it."
        odd = next((value for value in self.config() if not _is_primitive(value)), None)
        if odd is not None:
            return f"is made of a {type(odd).__name__}; a checkpoint records numbers, strings and tuples of such."
        return None

    def config(self) -> tuple[Any, ...]:
        """What it is made of, as a checkpoint records it."""
        return tuple(getattr(self, field) for field in getattr(self, "__dataclass_fields__", ()))


def _is_primitive(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_primitive, value))
    return value is None or type(value) in (bool, int, float, str)
