r"""Matrices whose singular values stay fixed: :math:`\{Q W_0\}`, Q orthogonal.

The point that moves is Q. On the left, the gradient with respect to :math:`\Omega` in :math:`(I + \Omega) W` is
:math:`A = G W^\top`, as for square orthogonal blocks, so directions and retractions are theirs, with the metric of the
orthogonal group: the length of a step is :math:`\|\Omega\|`. The optimizer state keeps Q (``rotation``) and
:math:`W_0` (``base``). Every step computes :math:`W = Q W_0` anew, so rounding does not add up: the error of W is that
of Q, which is corrected as for any square block, and of one product. If a weight is not :math:`Q W_0` when a step
begins, other code has written to it, and the step starts from the written value: :math:`W_0` is that value then.

A rotation on the right is one of the transposed block. With ``side="both"``, :math:`W = Q_l W_0 Q_r^\top`, and both
rotations move in the same step. Their coordinates are then stored one after the other, as ``(B, 1, p*p + n*n)``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linalg.matrices import float64
from ..linalg.products import Workspace, norm
from ..stiefel.geometry import to_frame
from ..stiefel.step import Settings, retract_
from .base import Manifold
from .layout import BlockLayout, Shape, is_writable, point_any, point_norm
from .orthogonal import Orthogonal
from .shards import Interval

SIDES = ("left", "right", "both")


@dataclass(frozen=True)
class FixedSpectrum(Manifold):
    """Constraint of a parameter whose blocks keep the singular values of the value that was last written to it.

    It has no ``retract``: what is retracted is the rotation in the optimizer state.

    Attributes:
        blocks: number of equal blocks stacked along ``dim``.
        dim: dimension along which they are stacked.
        side: where blocks are multiplied by a rotation: ``"left"``, ``"right"`` or ``"both"``.
        flatten: True flattens dimensions beyond the second to (first, rest). False treats the parameter as a batch of
            matrices, its last two dimensions.
    """

    allows_complex = uses_retraction = True
    point_name = "block"
    state_keys = ("rotation", "base")
    blocks: int = 1
    dim: int = 0
    side: str = "left"
    flatten: bool = True

    def layouts(self, shape: Shape) -> tuple[BlockLayout, ...]:
        """Return one layout ``(B, p, n)`` of all blocks, whose first dimension is rotated."""
        size = shape[self.dim if self.flatten else -2] // self.blocks
        return (BlockLayout(size, self.dim, flatten=self.flatten, transpose=self.side == "right"),)

    def part(self, shape: Shape, kept: list[Interval]) -> FixedSpectrum:
        """Return the constraint of the blocks in ``kept``."""
        if not self.flatten and len(shape) > 2:
            return self
        return replace(self, blocks=self.blocks * sum(length for _, length in kept) // shape[self.dim])

    def has_frame(self, shape: Shape) -> bool:  # noqa: ARG002
        """Return True."""
        return True

    def is_skew(self, shape: Shape) -> bool:  # noqa: ARG002
        r"""Return True: the coordinates of a tangent are those of :math:`\Omega`."""
        return True

    def frame_shape(self, shape: Shape) -> Shape:
        """Return ``(p, p)``, the shape of A, or that of both one after the other."""
        p, n = shape
        return (1, p * p + n * n) if self.side == "both" else (p, p)

    def parts(self, x: Tensor, coordinates: Tensor) -> list[Tensor]:
        """Return views ``(B, k, k)`` of coordinates, one for each rotation."""
        if self.side != "both":
            return [coordinates]
        p, n = x.shape[-2:]
        return [coordinates[:, 0, : p * p].unflatten(1, (p, p)), coordinates[:, 0, p * p :].unflatten(1, (n, n))]  # type: ignore[no-untyped-call]

    def workspaces(self, x: Tensor, ws: Workspace) -> list[Workspace]:
        """Return buffers for each rotation."""
        sides = x.shape[-2:] if self.side == "both" else x.shape[-2:-1]
        return [ws.of_size(k) for k in sides]

    def frame_gradient(self, x: Tensor, g: Tensor, ws: Workspace) -> Tensor:
        r"""Return :math:`A = G W^\top`, and that of the transposed block if both sides are rotated."""
        if self.side == "both":
            return torch.cat([(g @ x.mH).flatten(1), (g.mT @ x.conj()).flatten(1)], 1).unsqueeze(1)
        (space,) = self.workspaces(x, ws)
        return torch.bmm(g, x.mH, out=space.a)

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        r"""Return :math:`\Omega W` for the skew part :math:`\Omega` of :math:`G W^\top`; for both sides, their sum."""
        along = g @ x.mH
        tangent = 0.5 * (along - along.mH) @ x
        if self.side == "both":
            along = x.mH @ g
            tangent = tangent + x @ (0.5 * (along - along.mH))
        return tangent

    def start_state(self, x: Tensor) -> dict[str, Tensor]:
        """Return the state of points that have not moved: the rotation is the identity."""
        identity = [torch.eye(k, dtype=x.dtype, device=x.device) for k in x.shape[-2:]]
        if self.side == "both":
            rotation = torch.cat([part.flatten() for part in identity]).expand(len(x), 1, -1)
        else:
            rotation = identity[0].expand(len(x), -1, -1)
        return {"rotation": rotation.clone(), "base": x.clone()}

    def rotated(self, rotation: Tensor, base: Tensor) -> Tensor:
        """Return the points :math:`Q W_0`."""
        left, *right = self.parts(base, rotation)
        w = torch.bmm(left, base)
        return torch.bmm(w, right[0].mT) if right else w

    def _follow_writes_(self, x: Tensor, rotation: Tensor, base: Tensor, ws: Workspace) -> None:
        r"""Start anew from points that are not :math:`Q W_0`: something else has written to them, or to their state."""
        y = self.rotated(rotation, base)
        limit = _ROUNDING * torch.finfo(x.dtype).eps
        written = ~(norm(x - y, keepdim=True) <= limit * norm(y, keepdim=True))  # True for NaN
        if ws.readable and not bool(written.any()):
            return
        start = self.start_state(x)
        rotation.copy_(torch.where(written, start["rotation"], rotation))
        base.copy_(torch.where(written, x, base))

    step_options = Orthogonal.step_options

    def step_(self, x: Tensor, v: Tensor, moments: dict[str, Tensor], ws: Workspace, options: Settings) -> None:
        """Move the rotations and compute the points anew. A point with a zero step keeps its bits."""
        rotation, base = moments["rotation"], moments["base"]
        self._follow_writes_(x, rotation, base, ws)
        moving = point_any(v != 0, 2)
        if options.finite is not None:
            moving = moving & options.finite
        spaces, count = self.workspaces(x, ws), options.count

        def count_clamped(*, clamped: Tensor | None = None, **others: Tensor) -> None:  # noqa: ARG001
            if clamped is not None:
                options.count(clamped=clamped)

        for q, omega, space in zip(self.parts(x, rotation), self.parts(x, v), spaces, strict=True):
            retract_(q, omega, space, replace(options, count=count))
            count = count_clamped  # a block that is skipped is counted with its first rotation
        y = self.rotated(rotation, base)
        x.copy_(y if ws.readable and bool(moving.all()) else torch.where(moving, y, x))

    def change_frame(self, x: Tensor, moment: Tensor, *, mean_square: bool, back: bool) -> Tensor:
        """Convert a moment of the Euclidean gradient to these coordinates; the way back does not exist."""
        if back:
            raise ValueError("the moments of a rotation do not determine those of the gradient.")
        left = to_frame(x, moment, mean_square)
        if self.side != "both":
            return left
        right = to_frame(x.mT, moment.mT, mean_square)
        return torch.cat([left.flatten(1), right.flatten(1)], 1).unsqueeze(1)

    def project_point(self, x: Tensor) -> Tensor:
        """Return x: any matrix has the singular values that it has. Raise a ValueError if it is not finite."""
        if not bool(x.isfinite().all()):
            raise ValueError("the value has entries that are not finite. Initialize or load it first.")
        return x

    def error(self, x: Tensor) -> Tensor:
        """Return zero, or NaN if a point is not finite: without its state, any matrix is a point."""
        return 0 * point_norm(float64(x), 2)

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """Return a reason if blocks do not fit the shape, or strides allow no matrix view."""
        shape = tuple(tensor.shape)
        if tensor.ndim < 2:
            return f"must have at least 2 dimensions, got shape {shape}; a vector has no singular values."
        if self.side not in SIDES:
            return f"needs side to be one of {', '.join(SIDES)}, got {self.side!r}."
        if self.dim not in (0, 1) or (self.dim == 1 and tensor.ndim != 2) or (self.dim == 1 and not self.flatten):
            return f"has shape {shape}; its blocks are stacked along dim 0, or dim 1 of a matrix, got dim={self.dim!r}."
        length = shape[self.dim if self.flatten else -2]
        whole = isinstance(self.blocks, int) and not isinstance(self.blocks, bool) and self.blocks >= 1
        if not whole or length % self.blocks:
            return f"has shape {shape}: blocks={self.blocks!r} must be a whole number that divides {length}."
        if not is_writable(self.layouts(shape), tensor.detach()):
            return f"has strides {tensor.stride()} in which its blocks cannot be seen as matrices; keep it contiguous."
        return None


_ROUNDING = 8.0  # in eps: the product Q W_0 in another batch, relative to its norm
