r"""Retractions on the Stiefel manifold: from a point and a tangent to the next point.

Each is one function of schemes.py and one line in :data:`RETRACTIONS`, which states
what it claims; the tests run over that dict and measure every claim. All satisfy
:math:`R_W(0) = W` and :math:`DR_W(0)[V] = V`, so a learning rate means the same in each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .orthogonalizer import orthogonalizer
from .orthographic import orthographic
from .products import host_can_branch
from .schemes import LONG, Scheme, cayley, cayley_iterative, exp, orthogonalized, polar, qr
from .stiefel import Metric, check_metric, check_pair, is_tall
from .tally import Tally


@dataclass(frozen=True)
class Retraction:
    """A scheme and what it claims, with its default options; the tests measure every claim.

    Attributes:
        function: ``(w, v, **options) -> w'`` on wide matrices.
        exact: ends on the manifold, to rounding, for a step of any size.
        second_order: the geodesics it follows to second order: those of ``"square"`` matrices (the same
            for both metrics), and of the ``"euclidean"`` and ``"canonical"`` metric on rectangular ones.
            First order everywhere.
        polished: followed by one Newton-Schulz step, because alone it would carry an error in
            ``w @ w.mH = I`` along for ever.
        options: names of the keyword options it honours.
        temporaries: memory of a step beyond its workspaces, as a multiple of that of the blocks that move; where the
            host reads values, a step of unusual length can take more.
        longest: spectral norm of the longest step; a longer one is shortened to it.

    >>> from manifold_opt import RETRACTIONS
    >>> [name for name, scheme in RETRACTIONS.items() if scheme.exact and scheme.second_order]
    ['cayley', 'orthographic', 'polar', 'exp']
    """

    function: Scheme
    exact: bool
    second_order: tuple[str, ...]
    polished: bool
    temporaries: int
    options: tuple[str, ...] = ()
    longest: float = 1e5  # beyond it W is lost in the rounding of W + V


RETRACTIONS: dict[str, Retraction] = {
    "qr": Retraction(qr, exact=True, second_order=(), polished=True, temporaries=7),
    "cayley": Retraction(cayley, exact=True, second_order=("square", "canonical"), polished=False, temporaries=14),
    "cayley_iterative": Retraction(
        cayley_iterative,
        exact=False,
        second_order=("square", "canonical"),
        polished=True,
        temporaries=10,
        longest=0.5,
    ),
    "orthographic": Retraction(
        orthographic, exact=True, second_order=("square", "euclidean"), polished=False, temporaries=6
    ),
    "polar": Retraction(polar, exact=True, second_order=("square", "euclidean"), polished=False, temporaries=5),
    "exp": Retraction(
        exp,
        exact=True,
        second_order=("square", "euclidean", "canonical"),
        polished=True,
        temporaries=75,
        options=("metric",),
    ),
    "orthogonalizer": Retraction(
        orthogonalized,
        exact=False,
        second_order=("square", "euclidean"),
        polished=False,
        temporaries=7,
        options=("beta", "correction_steps"),
        longest=1.0,
    ),
}


@torch.no_grad()
def retract(
    w: Tensor,
    v: Tensor,
    method: str = "polar",
    *,
    metric: Metric = "euclidean",
    beta: float = 0.5,
    correction_steps: int = 1,
) -> Tensor:
    r"""Move from the points ``w`` along the tangents ``v``, and stay on the manifold.

    Args:
        w: points, ``(..., p, n)``, orthonormal rows (``p <= n``) or columns: float32, float64, complex64 or
            complex128.
        v: tangents at ``w``, same shape and dtype. Of any size for the exact schemes; one beyond a spectral
            norm of 1e5, where W is lost in the rounding of W + V, is shortened to it.
        method: a name in :data:`RETRACTIONS`.
        metric: whose geodesic ``"exp"`` follows.
        beta: rate of ``"orthogonalizer"``, in (0, 1).
        correction_steps: number of iterations of ``"orthogonalizer"``, at least 1.

    Returns:
        Points, same shape and dtype; no gradient flows through them. ``"cayley_iterative"`` and ``"orthogonalizer"``
        end near the manifold and bound the step: a longer one is shortened to spectral norm 1/2 and 1 (less for
        ``beta`` below 1/2).

    Raises:
        ValueError: unknown method or metric, options out of range, shapes or dtypes that differ.

    Reference: Absil, Mahony & Sepulchre (2008), *Optimization Algorithms on Matrix Manifolds*, section 4.1; Absil &
    Malick (2012), *Projection-like retractions on matrix manifolds*, for ``"orthographic"``; Wen & Yin (2013), *A
    feasible method for optimization with orthogonality constraints*, for ``"cayley"``; Li, Li & Todorovic (2020),
    *Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform*, for ``"cayley_iterative"``.

    >>> import torch
    >>> from manifold_opt import retract
    >>> w, v = torch.eye(2), torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    >>> turned = retract(w, v, "cayley")  # a quarter turn: twice the arc tangent of one
    >>> torch.allclose(turned, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), atol=1e-6)
    True
    >>> w, v = torch.tensor([[1.0 + 0.0j]]), torch.tensor([[2.0j]])
    >>> torch.allclose(retract(w, v, "cayley"), torch.tensor([[1.0j]]), atol=1e-6)  # the same, on the unit circle
    True
    """
    check_retraction("retract", method, metric=metric, beta=beta, correction_steps=correction_steps)
    check_pair("retract", w, v)
    if w.numel() == 0:
        return w.clone()
    if is_tall(w):
        return retract(w.mT, v.mT, method, metric=metric, beta=beta, correction_steps=correction_steps).mT
    return advance(w, v, method, metric=metric, beta=beta, correction_steps=correction_steps)


def advance(w: Tensor, v: Tensor, method: str, *, tally: Tally | None = None, **given: Any) -> Tensor:
    """:func:`retract` of wide matrices, unchecked; steps that are shortened are counted in ``tally``."""
    scheme = RETRACTIONS[method]
    options = {name: given[name] for name in scheme.options}
    if host_can_branch(w) or not scheme.exact:
        shorter = _shorten(v, longest_step(method, given["beta"]))
        shortened = None if shorter is v else (shorter != v).any(-1).any(-1)
        v = shorter
    else:  # by themselves, to a length that needs no care
        shortened = torch.linalg.vector_norm(v, dim=(-2, -1)) > LONG
    if tally is not None and shortened is not None:
        tally.add("clamped_steps", shortened)
    moved = scheme.function(w, v, **options)
    return orthogonalizer(moved) if scheme.polished else moved


def longest_step(method: str, beta: float = 0.5) -> float:
    r"""Spectral norm of the longest step a scheme takes; :func:`retract` shortens a longer one to it.

    For the orthogonalizer 1, where :math:`\|W + V\|_2 \le \sqrt2` is inside the basin
    :math:`\sqrt{(1+\beta)/\beta}`, and :math:`\sqrt{2\beta}` for beta below 1/2, where steps of length t
    accumulate to a defect of :math:`t^2/2\beta`.
    """
    scheme = RETRACTIONS[method]
    return min(scheme.longest, (2 * beta) ** 0.5) if "beta" in scheme.options else scheme.longest


def _shorten(v: Tensor, longest: float) -> Tensor:
    """Scale the blocks of ``v`` whose spectral norm exceeds ``longest`` back to it, within a few percent."""
    # The Frobenius norm is free, and decides nearly always.
    if host_can_branch(v) and not bool((torch.linalg.matrix_norm(v) > longest).any()):
        return v
    largest = v.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(v.dtype).tiny)
    scaled = v / largest  # entries of at most one: squares cannot overflow
    length = torch.minimum(torch.linalg.matrix_norm(scaled), _spectral_norm_bound(scaled))
    # NaN compares false, and stays in its block.
    return torch.where(
        (largest[..., 0, 0] > longest / length)[..., None, None], scaled * (longest / length)[..., None, None], v
    )


def _spectral_norm_bound(v: Tensor, squarings: int = 3) -> Tensor:
    r"""Upper bound :math:`(\sum_i \sigma_i^{32})^{1/32}` on the spectral norm, at most :math:`p^{1/32}` times it."""
    power = v @ v.mH
    exponent, log_scale = 2.0, torch.zeros_like(v[..., 0, 0].real)
    for _ in range(squarings):
        size = torch.linalg.matrix_norm(power).clamp_min(torch.finfo(v.dtype).tiny)
        power = power / size[..., None, None]
        power, log_scale, exponent = power @ power, 2 * (log_scale + size.log()), 2 * exponent
    return ((torch.linalg.matrix_norm(power).clamp_min(torch.finfo(v.dtype).tiny).log() + log_scale) / exponent).exp()


def check_retraction(name: str, method: str, *, metric: str, beta: float, correction_steps: int) -> None:
    """Raise a ValueError that says what is allowed, unless all four are."""
    if method not in RETRACTIONS:
        raise ValueError(f"{name}: retraction must be one of {', '.join(RETRACTIONS)}, got {method!r}.")
    check_metric(name, metric)
    if not (isinstance(beta, (int, float)) and 0 < beta < 1):
        raise ValueError(f"{name}: beta must lie in (0, 1), got {beta}; 0.5 converges fastest.")
    if isinstance(correction_steps, bool) or not isinstance(correction_steps, int) or correction_steps < 1:
        raise ValueError(f"{name}: correction_steps must be a whole number >= 1, got {correction_steps!r}.")
    if (beta, correction_steps) != (0.5, 1) and "beta" not in RETRACTIONS[method].options:
        raise ValueError(
            f"{name}: beta and correction_steps act with retraction='orthogonalizer' only, not with {method!r}. "
            "Leave them out, or set them in the parameter groups that use it."
        )
