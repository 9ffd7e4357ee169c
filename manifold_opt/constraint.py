"""What a parameter promises: each of its blocks is ``gain`` times a point of the Stiefel manifold.

The promise is an attribute of the parameter. The parameter stays the plain ``nn.Parameter`` it was, under
its own name, with its own storage.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .blocks import block_view
from .orthogonalizer import basin, nearest_orthogonal, orthogonalizer, spectral_bound
from .precision import FullPrecision
from .stiefel import error, error_at_rounding

DTYPES = (torch.float32, torch.float64)  # of parameters that can be marked

_ATTRIBUTE = "_manifold_opt_constraint"
T = TypeVar("T", bound=Tensor)


@dataclass(frozen=True)
class Orthogonal:
    """The constraint of a marked parameter: every block is ``gain`` times an orthogonal matrix.

    Attributes:
        blocks: number of equal blocks stacked along ``dim``.
        dim: dimension along which they are stacked.
        gain: the singular values of every block.
    """

    blocks: int = 1
    dim: int = 0
    gain: float = 1.0

    def view(self, tensor: Tensor) -> Tensor:
        """The wide blocks ``(blocks, p, n)`` of the parameter, or of a tensor shaped like it."""
        return block_view(tensor, self.blocks, self.dim)


@torch.no_grad()
def off_manifold(parameter: Tensor, constraint: Orthogonal, slack: float = 0.0) -> tuple[Tensor, Tensor]:
    """Which blocks are not orthogonal, ``(blocks,)``, and the nearest values of those that are not.

    Not orthogonal to rounding, or where ``slack`` allows for more, to an error of ``slack`` a row.

    Raises:
        ValueError: one of them is not finite or rank-deficient.
    """
    return off_blocks(constraint.view(parameter.detach()), constraint.gain, slack)


def off_blocks(blocks: Tensor, gain: float, slack: float = 0.0) -> tuple[Tensor, Tensor]:
    """:func:`off_manifold` of wide blocks ``(B, p, n)``."""
    w = blocks / gain
    p, n = w.shape[-2:]
    off = ~(error(w) <= max(error_at_rounding(p, n, w.dtype), slack * p**0.5))  # a NaN is off
    return off, gain * nearest_orthogonal(w[off])


def attach(parameter: Tensor, constraint: Orthogonal) -> None:
    """Tag a parameter. What it promises has to be true already: marking.py sees to that."""
    setattr(parameter, _ATTRIBUTE, constraint)


def unmark(parameter: T) -> T:
    """Take the constraint off a parameter; its value stays. One that has none is returned as it is.

    >>> import torch
    >>> from manifold_opt import constraint_of, mark_orthogonal, unmark
    >>> weight = mark_orthogonal(torch.nn.Parameter(torch.eye(3)))
    >>> constraint_of(unmark(weight)) is None
    True
    """
    if constraint_of(parameter) is not None:
        setattr(parameter, _ATTRIBUTE, None)
    return parameter


def was_unmarked(parameter: Tensor) -> bool:
    """Whether unmark has taken a constraint off it, so that it is not missed."""
    return hasattr(parameter, _ATTRIBUTE) and constraint_of(parameter) is None


def constraint_of(parameter: Tensor) -> Orthogonal | None:
    """The constraint a parameter was marked with, or None.

    >>> import torch
    >>> from manifold_opt import constraint_of, mark_orthogonal
    >>> constraint_of(mark_orthogonal(torch.nn.Parameter(torch.eye(4).repeat(3, 1)), blocks=3))
    Orthogonal(blocks=3, dim=0, gain=1.0)
    """
    return getattr(parameter, _ATTRIBUTE, None)


@torch.no_grad()
def orthogonalize_(tensor: T, beta: float = 0.5, steps: int = 1) -> T:
    r"""Move towards orthogonality in place, :math:`W \leftarrow (1+\beta) W - \beta W W^\top W`.

    Every block of a marked parameter (after division by its gain), or every matrix of a batch
    ``(..., p, n)``, wide or tall. The error shrinks by :math:`1 - 2\beta` a step near the manifold, and is
    squared at ``beta = 0.5``.

    Args:
        tensor: marked parameter or ``(..., p, n)`` of float32 or float64.
        beta: rate, in (0, 1).
        steps: number of iterations, at least 1.

    Returns:
        The same tensor.

    Raises:
        ValueError: ``beta`` or ``steps`` out of range, or a singular value above
            :math:`\sqrt{(1+\beta)/\beta}`, from where the iteration does not find the nearest orthogonal
            matrix; :func:`nearest_orthogonal` does from anywhere. Nothing has been written then.

    >>> import torch
    >>> from manifold_opt import orthogonalize_
    >>> orthogonalize_(torch.tensor([[1.1]]))  # 1.5 * 1.1 - 0.5 * 1.1**3
    tensor([[0.9845]])
    """
    if not 0 < beta < 1:
        raise ValueError(f"orthogonalize_: beta must lie in (0, 1), got {beta}; 0.5 converges fastest.")
    if steps < 1:
        raise ValueError(f"orthogonalize_: steps must be at least 1, got {steps}.")
    matrices, gain = matrices_of(tensor, "orthogonalize_")
    w = matrices / gain
    with FullPrecision(w.device.type):
        gram = w.mT @ w if w.shape[-2] > w.shape[-1] else w @ w.mT
        # The cheap bound decides nearly always; the SVD cannot be asked where an entry is not finite.
        if not bool((spectral_bound(gram) < basin(beta) ** 2).all()) and not (
            bool(w.isfinite().all()) and bool((torch.linalg.matrix_norm(w, 2) < basin(beta)).all())
        ):
            raise ValueError(
                f"orthogonalize_: a singular value is not below {basin(beta):.3g}, from where beta={beta} does not "
                "converge to the nearest orthogonal matrix; use nearest_orthogonal."
            )
        matrices.copy_(gain * orthogonalizer(w, beta=beta, steps=steps))
    return tensor


def matrices_of(tensor: Tensor, name: str) -> tuple[Tensor, float]:
    """The matrices that ``tensor`` stands for, as a view, and the gain they are to be divided by."""
    constraint = constraint_of(tensor)
    if constraint is not None:
        return constraint.view(tensor.detach()), constraint.gain
    if tensor.ndim < 2 or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name}: needs a marked parameter or matrices (..., p, n) of float32 or float64, got shape "
            f"{tuple(tensor.shape)} of {tensor.dtype}."
        )
    return tensor.detach(), 1.0
