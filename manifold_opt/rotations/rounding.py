"""Rounding to nearest on a grid of few bits, as in quantized models, simulated in floating point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FRACTIONS = (0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5)  # of the largest entry, tried with ``clip``


@dataclass(frozen=True)
class RoundToNearest:
    r"""Symmetric rounding to nearest, with one scale for each row or for each group of entries of a row.

    An entry x becomes :math:`s \cdot \mathrm{round}(x / s)`, where s is the largest magnitude of its row or group over
    :math:`2^{b-1} - 1`. For a weight a row is an output; for the inputs of a layer it is a token. It is computed in
    float32 at least. The gradient is that of the identity (straight-through), for clipped entries too.

    Args:
        bits: b, from 2 to 16.
        group: number of neighbouring entries of a row that share a scale, a divisor of the length of rows; None for
            the whole row.
        clip: True also tries smaller scales, s times 0.5, 0.55, ..., 0.95, and takes the one with the least square
            error. Entries that are too large for a scale are clipped.

    Raises:
        ValueError: ``bits`` or ``group`` is out of range.

    >>> import torch
    >>> from manifold_opt.rotations import RoundToNearest
    >>> RoundToNearest(4)(torch.tensor([[7.0, 3.4, -0.6, 0.2]]))
    tensor([[ 7.,  3., -1.,  0.]])
    """

    bits: int
    group: int | None = None
    clip: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise ValueError(f"RoundToNearest: bits must be from 2 to 16, got {self.bits}.")
        if self.group is not None and self.group < 1:
            raise ValueError(f"RoundToNearest: group must be at least 1 or None, got {self.group}.")

    @property
    def levels(self) -> int:
        """The largest integer of the grid."""
        return 2 ** (self.bits - 1) - 1

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the rows rounded, ``(..., n)``, same dtype."""
        rounded: Tensor = _StraightThrough.apply(rows, self)  # type: ignore[no-untyped-call]
        return rounded

    def expected_error(self, rows: Tensor, power: float = 100.0) -> Tensor:
        r"""Return the relative square error that rounding is expected to have, as a smooth function of the rows.

        An error that is uniform over a step s has mean square :math:`s^2 / 12`, so rows :math:`Z_i` of length d have

        .. math:: \frac{\sum_i s_i^2\, d / 12}{\Vert Z \Vert_F^2}, \qquad
                  s_i = \Vert Z_i \Vert_k / (2^{b-1} - 1),

        where the norm of power k stands for the largest entry. As a loss it needs no data, and has no rounding in it.
        The denominator is taken as a constant: rotations do not change it.

        Args:
            rows: ``(..., n)``.
            power: k, at least 2. Small values are smoother, large ones closer to the largest entry.
        """
        groups = self._groups(rows)
        size = groups.detach().square().sum()
        log_squares = (groups.square() + 1e-30).log()
        log_peaks = torch.logsumexp(power / 2 * log_squares, -1) * 2 / power
        return log_peaks.exp().sum() * groups.shape[-1] / (12 * self.levels**2) / size

    def round(self, rows: Tensor) -> Tensor:
        """Return the rows rounded, without a gradient of their own."""
        groups = self._groups(rows)
        peak = groups.abs().amax(-1, keepdim=True)
        best = self._on_grid(groups, peak)
        for fraction in _FRACTIONS if self.clip else ():
            other = self._on_grid(groups, fraction * peak)
            better = (other - groups).square().sum(-1, keepdim=True) < (best - groups).square().sum(-1, keepdim=True)
            best = torch.where(better, other, best)
        return best.flatten(-2).to(rows.dtype)

    def _groups(self, rows: Tensor) -> Tensor:
        size = self.group or rows.shape[-1]
        if rows.shape[-1] % size:
            raise ValueError(f"RoundToNearest: group={size} must divide the length of the rows, {rows.shape[-1]}.")
        wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return wide.reshape(*rows.shape[:-1], -1, size)

    def _on_grid(self, groups: Tensor, peak: Tensor) -> Tensor:
        step = (peak / self.levels).clamp(min=torch.finfo(peak.dtype).tiny)  # a row of zeros stays one
        return (groups / step).round().clamp(-self.levels, self.levels) * step


class _StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, rounding: RoundToNearest) -> Tensor:  # noqa: ARG004
        return rounding.round(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return gradient, None
