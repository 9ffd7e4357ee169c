"""Oblique manifold, a product of spheres: slices (rows, columns or filters) of unit norm."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..linalg.matrices import float64
from ..linalg.precision import working_dtype
from ..linalg.products import Workspace
from .base import Manifold, StepOptions
from .layout import Shape, SliceLayout, all_points_move, point_norm
from .shards import Interval


@dataclass(frozen=True, repr=False)
class UnitNorm(Manifold):
    r"""Constraint of a parameter whose slices along ``dim`` have norm one.

    torch's weight_norm calls such slices directions. The tangents at x are :math:`\{v : \langle x, v\rangle = 0\}`,
    and the retraction is :math:`(x + v)/\|x + v\|`.

    Attributes:
        dim: the dimension that indexes the slices: 0 for the rows of a Linear or the filters of a convolution.
        padding_idx: index of a slice without the constraint, as the zero row of an embedding; None if there is none.

    Reference: Absil & Gallivan (2006), *Joint diagonalization on the oblique manifold*.
    """

    allows_complex = frame_is_bounded = True
    point_name = "slice"
    dim: int = 0
    padding_idx: int | None = None

    def __repr__(self) -> str:
        return f"UnitNorm(dim={self.dim}{'' if self.padding_idx is None else f', padding_idx={self.padding_idx}'})"

    def layouts(self, shape: Shape) -> tuple[SliceLayout, ...]:
        """Return one layout of all slices, or two that leave out the slice ``padding_idx``."""
        dims, count, k = len(shape) - 1, shape[self.dim], self.padding_idx
        if k is None:
            return (SliceLayout(dims, self.dim),)
        runs = ((0, k), (k + 1, count - k - 1))
        return tuple(SliceLayout(dims, self.dim, start, length) for start, length in runs if length)

    def free_rows(self, shape: Shape) -> list[tuple[int, int]]:  # noqa: ARG002
        """Return the slice ``padding_idx``."""
        return [] if self.padding_idx is None else [(self.padding_idx, 1)]

    def part(self, shape: Shape, kept: list[Interval]) -> UnitNorm:  # noqa: ARG002
        """Return the constraint of the slices in ``kept``: the position of ``padding_idx`` changes."""
        position, k = 0, -1 if self.padding_idx is None else self.padding_idx
        for start, length in kept:
            if start <= k < start + length:
                return replace(self, padding_idx=position + k - start)
            position += length
        return replace(self, padding_idx=None)

    def index_of(self, point: int) -> int:
        """Return the index of a point among all slices."""
        return point if self.padding_idx is None or point < self.padding_idx else point + 1

    def riemannian_gradient(self, x: Tensor, g: Tensor) -> Tensor:
        r"""Return :math:`g - \langle x, g\rangle x`."""
        return g - _dot(x, g) * x

    def retract(self, x: Tensor, v: Tensor) -> Tensor:
        r"""Return :math:`(x + v)/\|x + v\|`; v is cut to norm :math:`10^5`, beyond which x is lost in rounding."""
        norm = point_norm(v, v.ndim - 1, keepdim=True)
        y = x + v * (_MAX_STEP_NORM / norm).clamp_max(1)
        return y / _norm(y)

    def frame_gradient(self, x: Tensor, g: Tensor, ws: Workspace) -> Tensor:
        """Write the Riemannian gradient to ``ws.x`` and return it."""
        return torch.addcmul(g, x, _dot(x, g, out=ws.x), value=-1, out=ws.x)

    def project_direction_(self, x: Tensor, d: Tensor, ws: Workspace) -> Tensor:
        """Project a direction in place. Moments are not transported: what they lose here is normal."""
        return d.addcmul_(x, _dot(x, d, out=ws.y), value=-1)

    def step_(self, x: Tensor, v: Tensor, moments: dict[str, Tensor], ws: Workspace, options: StepOptions) -> None:  # noqa: ARG002
        """Move points along tangents in place. A point with a zero step keeps its bits."""
        y = torch.add(x, v, out=ws.y)
        size = _norm(y, ws)
        if ws.readable and all_points_move(v, v.ndim - 1):
            divisor = size
        else:
            divisor = size.masked_fill(point_norm(v, v.ndim - 1, keepdim=True) == 0, 1)
        if torch.compiler.is_compiling():
            # A sum over one number, which Inductor does not fuse with what is around it: that of torch 2.13 fails with
            # a KeyError where it fuses several sums over a row with a write to the row.
            divisor = divisor.cumsum(-1)
        if ws.readable and float(size.max()) < torch.inf:
            torch.div(y, divisor, out=x)
            return
        x.copy_(torch.where(options.accept(size < torch.inf), y / divisor, x))

    def project_point(self, x: Tensor) -> Tensor:
        """Divide the slices by their norms, in float64; raise a ValueError if a slice is zero or not finite."""
        norm = point_norm(float64(x), x.ndim - 1, keepdim=True)
        if not bool((norm.isfinite() & (norm > 0)).all()):
            raise ValueError(
                "a slice is zero or has entries that are not finite, so that none of norm one is nearest. Initialize "
                "it first, for example with torch.nn.init.normal_, or leave it out with padding_idx."
            )
        return (float64(x) / norm).to(x)

    def error(self, x: Tensor) -> Tensor:
        r"""Return :math:`|\|x\| - 1|`."""
        return (point_norm(float64(x), x.ndim - 1) - 1).abs()

    def tolerance(self, x: Tensor) -> float:
        """Return the rounding error of the entries and of their norm."""
        return (4 if working_dtype(x.dtype) == x.dtype else 0.6) * torch.finfo(x.dtype).eps

    def invalid_reason(self, tensor: Tensor) -> str | None:
        """Return a reason if the tensor does not have the dimension, or slices have one entry."""
        shape = tuple(tensor.shape)
        if isinstance(self.dim, bool) or not isinstance(self.dim, int) or not 0 <= self.dim < len(shape):
            return f"has shape {shape}, and no slices along dim={self.dim!r}; give one of 0 to {len(shape) - 1}."
        if tensor.numel() == shape[self.dim]:
            return (
                f"has shape {shape}: its slices along dim {self.dim} are single entries, never but 1 or -1. "
                "Give one vector a dimension of length 1 in front, or mark it with mark_manifold and geoopt.Sphere()."
            )
        k, count = self.padding_idx, shape[self.dim]
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or not 0 <= k < count or count == 1):
            return f"has shape {shape}: padding_idx={k!r} must be one of several slices, 0 to {count - 1}."
        return None


_MAX_STEP_NORM = 1e5


def _norm(y: Tensor, ws: Workspace | None = None) -> Tensor:
    """Return the norms ``(B, 1, ..)`` to rounding. With ``ws``, ``y`` is contiguous.

    torch's norm of a slice that is long, or not contiguous, is off by up to hundreds of eps.
    """
    components = torch.view_as_real(y) if y.is_complex() else y
    flat = components.flatten(1)
    if ws is not None and flat.shape[1] <= _LONG:
        norm = torch.linalg.vector_norm(flat, dim=1, keepdim=True)
    else:
        out = None if ws is None or y.is_complex() else ws.z.flatten(1)
        norm = torch.mul(flat, flat, out=out).sum(1, keepdim=True).sqrt()
    return norm if y.ndim == 2 else norm.view(-1, *[1] * (y.ndim - 1))


_LONG = 512  # entries, of which torch's norm is off by 2 eps at most, whatever their sizes


def _dot(x: Tensor, g: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return the inner products ``(B, 1, ..)``; ``out`` is overwritten."""
    if x.is_complex():
        x, g = torch.view_as_real(x), torch.view_as_real(g.resolve_conj())
        return (x * g).sum((*range(1, x.ndim - 1), -1), keepdim=True)[..., 0]
    return torch.mul(x, g, out=out).sum(tuple(range(1, x.ndim)), keepdim=True)
