"""Move the blocks of a parameter, or plain matrices, towards orthogonality in place."""

from __future__ import annotations

import itertools
from typing import TypeVar

import torch
from torch import Tensor

from ..linalg.matrices import check_whole
from ..linalg.newton_schulz import convergence_radius, newton_schulz, spectral_bound
from ..linalg.precision import FullPrecision, working_dtype
from ..manifolds import Orthogonal
from ..manifolds.layout import get_points, overlap_problem, set_points_
from .tag import DTYPES, constraint_of

T = TypeVar("T", bound=Tensor)


@torch.no_grad()
def orthogonalize_(tensor: T, beta: float = 0.5, steps: int = 1) -> T:
    r"""Move towards orthogonality in place, :math:`W \leftarrow (1+\beta) W - \beta W W^\top W`.

    Every block of a marked parameter (after division by its gain), or every matrix of a batch
    ``(..., p, n)``, wide or tall. The error shrinks by :math:`1 - 2\beta` a step near the manifold, and is
    squared at ``beta = 0.5``.

    Args:
        tensor: marked parameter or ``(..., p, n)`` of a floating-point or complex dtype.
        beta: rate, in (0, 1).
        steps: number of iterations, at least 1.

    Returns:
        The same tensor.

    Raises:
        ValueError: ``beta`` or ``steps`` out of range, or a singular value above
            :math:`\sqrt{(1+\beta)/\beta}`, from where the iteration does not find the nearest orthogonal
            matrix; :func:`nearest_orthogonal` does from anywhere. Nothing has been written then.

    Reference: Higham (2008), *Functions of Matrices*, section 8.3, for ``beta = 0.5``, the Newton-Schulz iteration.

    >>> import torch
    >>> from manifold_opt import orthogonalize_
    >>> orthogonalize_(torch.tensor([[1.1]]))  # 1.5 * 1.1 - 0.5 * 1.1**3
    tensor([[0.9845]])
    """
    if not 0 < beta < 1:
        raise ValueError(f"orthogonalize_: beta must lie in (0, 1), got {beta}; 0.5 converges fastest.")
    if steps < 1:
        raise ValueError(f"orthogonalize_: steps must be at least 1, got {steps}.")
    problem = overlap_problem(tensor)
    if problem:
        raise ValueError(f"orthogonalize_: the tensor {problem}")
    dtype = working_dtype(tensor.dtype)
    found = matrices_of(tensor, "orthogonalize_")
    for matrices, gain in found:
        _check_basin(matrices.to(dtype) / gain, beta)
    mark = constraint_of(tensor)
    parts = mark.layouts(tensor.shape) if isinstance(mark, Orthogonal) else ()
    for (matrices, gain), part in itertools.zip_longest(found, parts):
        with FullPrecision(tensor.device.type):
            new = (gain * newton_schulz(matrices.to(dtype) / gain, beta=beta, steps=steps)).to(tensor.dtype)
        matrices.copy_(new) if part is None else set_points_(part, tensor.detach(), ..., new)
    return tensor


def _check_basin(w: Tensor, beta: float) -> None:
    with FullPrecision(w.device.type):
        gram = w.mH @ w if w.shape[-2] > w.shape[-1] else w @ w.mH
        # The cheap bound decides nearly always; the SVD cannot be asked where an entry is not finite.
        if not bool((spectral_bound(gram) < convergence_radius(beta) ** 2).all()) and not (
            bool(w.isfinite().all()) and bool((torch.linalg.matrix_norm(w, 2) < convergence_radius(beta)).all())
        ):
            raise ValueError(
                f"orthogonalize_: a singular value is not below {convergence_radius(beta):.3g}, from where "
                f"beta={beta} does not converge to the nearest orthogonal matrix; use nearest_orthogonal."
            )


def matrices_of(tensor: Tensor, name: str) -> list[tuple[Tensor, float]]:
    """The matrices that ``tensor`` stands for, views where they can be, and the gain they are to be divided by."""
    check_whole(name, tensor)
    constraint = constraint_of(tensor)
    if isinstance(constraint, Orthogonal):
        return [(get_points(part, tensor.detach()), constraint.gain) for part in constraint.layouts(tensor.shape)]
    if tensor.ndim < 2 or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name}: needs a marked parameter or matrices (..., p, n) of a floating-point or complex dtype, got shape "
            f"{tuple(tensor.shape)} of {tensor.dtype}."
        )
    return [(tensor.detach(), 1.0)]
