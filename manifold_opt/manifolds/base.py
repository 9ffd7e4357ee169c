"""Base class of the manifolds: the interface between a constraint and the optimizers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..linalg.precision import working_dtype
from ..linalg.products import Workspace
from .layout import (
    Layout,
    Shape,
    SliceLayout,
    all_points_move,
    point_any,
    point_max,
    point_sum,
    sum_is_finite,
)
from .shards import Interval

Scalar = float | Tensor


@dataclass
class StepOptions:
    """Options of :meth:`Manifold.step_` that are the same for all points of a batch.

    Attributes:
        count: called with ``skipped=`` or ``clamped=``, masks of points.
        point_ndim: number of trailing dimensions that form a point.
        transported: keys of the moments that are means of gradients; the default ``step_`` transports them.
        decay: learning rate times decoupled weight decay.
        finite: mask of the points with a finite gradient, ``(B, 1, ..)``; the others stay. None if all are finite.
    """

    count: Callable[..., None]
    point_ndim: int = 0
    transported: tuple[str, ...] = ()
    decay: Scalar = 0.0
    finite: Tensor | None = None

    def accept(self, possible: Tensor) -> Tensor:
        """Return a mask of the points to update: ``possible`` with a finite gradient. Count the others of these."""
        if self.finite is None:
            self.count(skipped=~possible)
            return possible
        self.count(skipped=~possible & self.finite)
        return possible & self.finite


class Manifold:
    r"""Constraint of a parameter to a manifold, kept by a retraction.

    Every method takes a batch of points ``x``, ``(B, ..., *point)``, treats each point independently and has no side
    effects, except for those whose names end in an underscore. A subclass is a frozen dataclass whose fields are
    numbers, strings or tuples of them, so that a checkpoint can record it. It implements at least
    :meth:`riemannian_gradient`, :meth:`retract`, :meth:`project_point` and :meth:`error`. An entry in
    :data:`~manifold_opt.MANIFOLDS` registers it by name.

    Attributes:
        point_ndim: number of trailing dimensions of a parameter that form one point; the others are batch dimensions.
        dim: the dimension that :meth:`free_rows` refers to.
        allows_decoupled_decay: True if decoupled weight decay applies: for a point x and :math:`0 \le t < 1`,
            :math:`(1 - t) x` is a point too.
        allows_l2_penalty: True if an L2 penalty applies, through its gradient.
        allows_complex: True if complex parameters are supported.
        uses_retraction: True if the options ``retraction`` and ``orthogonal_lr_scale`` of the optimizers apply.
        state_keys: keys of tensors beside the moments that the optimizer keeps for it, see :meth:`start_state`.
        frame_is_bounded: True if :meth:`frame_gradient` is never longer than the gradient.
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
    uses_retraction = False
    state_keys: ClassVar[tuple[str, ...]] = ()
    frame_is_bounded = False
    point_name = "point"

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Take the defaults of the in-place functions where a subclass has changed the functions they stand for."""
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if any(name in own for name in _GEOMETRY) and cls.__base__ is not Manifold:
            for name in _IN_PLACE:
                if name not in own:
                    setattr(cls, name, getattr(Manifold, name))

    def layouts(self, shape: Shape) -> tuple[Layout, ...]:  # noqa: ARG002
        """Return the layouts of the points in a parameter of this shape; by default its last dimensions are a point.

        Override it with a :class:`~manifold_opt.manifolds.layout.SliceLayout` along another dimension, or with
        :class:`~manifold_opt.manifolds.layout.BlockLayout`.
        """
        return (SliceLayout(self.point_ndim),)

    def free_rows(self, shape: Shape) -> list[tuple[int, int]]:  # noqa: ARG002
        """Return start and length along ``dim`` of the rows outside every layout; they train as with torch.optim."""
        return []

    def part(self, shape: Shape, kept: list[Interval]) -> Manifold:  # noqa: ARG002
        """Return the constraint of a part of a parameter of this shape: the rows ``kept`` along the cut dimension.

        The dimension is that of ``manifold_opt.manifolds.layout.units``, which also tells where cuts are possible.
        Override it if a field depends on the length of that dimension.
        """
        return self

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

    def frame_gradient(self, x: Tensor, g: Tensor, ws: Workspace) -> Tensor:  # noqa: ARG002
        """Return the gradient in the coordinates whose moments the optimizers average: those of a tangent by default.

        ``g`` is not modified. The result may be in ``ws.x``.
        """
        return self.riemannian_gradient(x, g)

    def frame_squares(self, x: Tensor, a: Tensor) -> Tensor | None:
        """Return :meth:`component_squares` of a gradient in these coordinates; None for those of entries."""
        return None if type(self).component_squares is Manifold.component_squares else self.component_squares(x, a)

    def project_direction_(self, x: Tensor, d: Tensor, ws: Workspace) -> Tensor:  # noqa: ARG002
        """Return :meth:`project_tangent` of a direction in these coordinates. ``d`` may be overwritten."""
        return self.project_tangent(x, d)

    def is_skew(self, shape: Shape) -> bool:  # noqa: ARG002
        """Return True if the coordinates of a tangent at points of this shape are a skew matrix."""
        return False

    def frame_shape(self, shape: Shape) -> Shape:
        """Return the shape of the coordinates of a tangent at a point of this shape. Moments have it too."""
        return shape

    def parts(self, x: Tensor, coordinates: Tensor) -> list[Tensor]:  # noqa: ARG002
        """Return views of coordinates at ``x`` that are matrices; the optimizers update each by itself."""
        return [coordinates]

    def workspaces(self, x: Tensor, ws: Workspace) -> list[Workspace]:  # noqa: ARG002
        """Return the buffers for each part."""
        return [ws]

    def start_state(self, x: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Return the tensors ``(B, ...)`` of ``state_keys`` for points that have not moved yet."""
        return {}

    def has_frame(self, shape: Shape) -> bool:  # noqa: ARG002
        """Return True if :meth:`change_frame` converts moments of points of this shape."""
        return False

    def change_frame(self, x: Tensor, moment: Tensor, *, mean_square: bool, back: bool) -> Tensor:  # noqa: ARG002
        """Convert a moment of the Euclidean gradient to these coordinates, or ``back``."""
        return moment

    def step_options(
        self,
        group: Mapping[str, Any],  # noqa: ARG002
        count: Callable[..., None],
        steps: int | None,  # noqa: ARG002
        *,
        retraction: Any = None,  # noqa: ARG002
        **shared: Any,
    ) -> Any:
        """Return the options of :meth:`step_`: for parameters of ``group``, at their step number ``steps``.

        ``retraction`` is that of orthogonal blocks.
        """
        return StepOptions(count, **shared)

    def step_(self, x: Tensor, v: Tensor, moments: dict[str, Tensor], ws: Workspace, options: Any) -> None:
        """Move points along tangents ``v`` in place, and transport their moments.

        A point with a zero step keeps its bits. So does a point whose result is not finite, which is counted; its
        moments have been updated already, and are not transported.
        """
        dims, start = options.point_ndim, x
        step = v
        if isinstance(options.decay, Tensor) or options.decay:
            start = x * decay_factor(options.decay)
            step = self.transport(x, start, v)
        y = self.retract(start, step)
        transported = {}
        for key in filter(moments.__contains__, options.transported):
            new = self.transport(x, y, moments[key])
            if new is not moments[key]:
                transported[key] = new
        results = (y, *transported.values())
        if not (ws.readable and all_points_move(v, dims) and all(map(sum_is_finite, (v, *results)))):
            possible = sum(point_sum(new, dims) for new in results) * 0 == 0  # False for NaN and Inf
            moving = point_max(v, dims) > 0
            moving = moving if start is x else moving | point_any(start != x, dims)
            updated = moving & options.accept(possible)
            y = torch.where(updated, y, x)
            transported = {key: torch.where(updated, new, moments[key]) for key, new in transported.items()}
        x.copy_(y)
        for key, new in transported.items():
            moments[key].copy_(new)

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


_GEOMETRY = ("riemannian_gradient", "retract", "project_tangent", "transport", "component_squares")
_IN_PLACE = ("frame_gradient", "frame_squares", "project_direction_", "step_", "has_frame", "change_frame")


def decay_factor(t: Scalar) -> Scalar:
    """Return :math:`1 - t`, the factor of decoupled decay, or a small positive number if that is larger."""
    return (1 - t).clamp_min(_MIN_DECAY_FACTOR) if isinstance(t, Tensor) else max(1 - t, _MIN_DECAY_FACTOR)


_MIN_DECAY_FACTOR = 1e-6


def _is_primitive(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_primitive, value))
    return value is None or type(value) in (bool, int, float, str)
