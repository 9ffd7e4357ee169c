"""Newton-Schulz steps towards orthogonality, in place, for a parameter's blocks or for plain matrices."""

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

    It applies to every block of a marked parameter (after division by its gain), or to every matrix of a batch
    ``(..., p, n)``, wide or tall. Near the manifold each step multiplies the error by :math:`1 - 2\beta`;
    ``beta = 0.5`` squares it.

    Args:
        tensor: a marked parameter, or a batch ``(..., p, n)`` of a floating-point or complex dtype.
        beta: rate, in (0, 1).
        steps: number of iterations, at least 1.

    Returns:
        The same tensor.

    Raises:
        ValueError: ``beta`` or ``steps`` is out of range, or a singular value is above
            :math:`\sqrt{(1+\beta)/\beta}`, so that the iteration does not converge to the nearest orthogonal
            matrix; use :func:`nearest_orthogonal`. The tensor is unchanged then.

    Reference: Higham (2008), *Functions of Matrices*, section 8.3, for ``beta = 0.5``: the Newton-Schulz iteration.

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
    pairs = blocks_and_gains(tensor, "orthogonalize_")
    for matrices, gain in pairs:
        _check_convergence(matrices.to(dtype) / gain, beta)
    mark = constraint_of(tensor)
    layouts = mark.layouts(tensor.shape) if isinstance(mark, Orthogonal) else ()
    for (matrices, gain), layout in itertools.zip_longest(pairs, layouts):
        with FullPrecision(tensor.device.type):
            new = (gain * newton_schulz(matrices.to(dtype) / gain, beta=beta, steps=steps)).to(tensor.dtype)
        matrices.copy_(new) if layout is None else set_points_(layout, tensor.detach(), ..., new)
    return tensor


def _check_convergence(w: Tensor, beta: float) -> None:
    """Raise a ValueError if a singular value is outside the radius of convergence."""
    with FullPrecision(w.device.type):
        gram = w.mH @ w if w.shape[-2] > w.shape[-1] else w @ w.mH
        # The cheap bound nearly always suffices. The SVD would raise if an entry is not finite.
        if not bool((spectral_bound(gram) < convergence_radius(beta) ** 2).all()) and not (
            bool(w.isfinite().all()) and bool((torch.linalg.matrix_norm(w, 2) < convergence_radius(beta)).all())
        ):
            raise ValueError(
                f"orthogonalize_: a singular value is not below {convergence_radius(beta):.3g}, from where "
                f"beta={beta} does not converge to the nearest orthogonal matrix; use nearest_orthogonal."
            )


def blocks_and_gains(tensor: Tensor, name: str) -> list[tuple[Tensor, float]]:
    """Return batches of the tensor's blocks or matrices, as views if possible, each with its gain."""
    constraint = constraint_of(tensor)
    if isinstance(constraint, Orthogonal):
        return [(get_points(layout, tensor.detach()), constraint.gain) for layout in constraint.layouts(tensor.shape)]
    check_whole(name, tensor)
    if tensor.ndim < 2 or tensor.dtype not in DTYPES:
        raise ValueError(
            f"{name}: needs a marked parameter or matrices (..., p, n) of a floating-point or complex dtype, got shape "
            f"{tuple(tensor.shape)} of {tensor.dtype}."
        )
    return [(tensor.detach(), 1.0)]
