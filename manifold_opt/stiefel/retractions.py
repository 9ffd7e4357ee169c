r"""Retractions on the Stiefel manifold: from a point and a tangent to the next point.

Each has a file of its own and a row in :data:`RETRACTIONS`, which states its properties; the tests run over the rows
and measure all of them. Every retraction satisfies :math:`R_W(0) = W` and :math:`DR_W(0)[V] = V`, so a learning rate
means the same for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..linalg.matrices import is_tall, skew
from ..linalg.polar_factor import polar_sync_free
from ..linalg.products import Workspace
from . import cayley, exponential, orthogonalizer, orthographic, polar, qr
from .geometry import Metric, check_metric, check_pair
from .step import Retraction, Settings, retract_, retract_wide

_EUCLIDEAN, _CANONICAL = ("square", "euclidean"), ("square", "canonical")

RETRACTIONS: dict[str, Retraction] = {
    "qr": Retraction(qr.qr, exact=True, second_order=(), temp_blocks=7, newton_schulz_after=True, rotation=qr.ROTATION),
    "cayley": Retraction(cayley.cayley, exact=True, second_order=_CANONICAL, temp_blocks=14, rotation=cayley.ROTATION),
    "cayley_iterative": Retraction(
        cayley.cayley_iterative,
        exact=False,
        second_order=_CANONICAL,
        temp_blocks=10,
        newton_schulz_after=True,
        max_step_norm=0.5,
    ),
    "orthographic": Retraction(
        polar.polar,
        exact=True,
        second_order=_EUCLIDEAN,
        temp_blocks=6,
        rotation=orthographic.ROTATION,
        in_place=polar.polar_,
        sync_free=polar_sync_free,
    ),
    "polar": Retraction(
        polar.polar,
        exact=True,
        second_order=_EUCLIDEAN,
        temp_blocks=5,
        rotation=polar.ROTATION,
        in_place=polar.polar_,
        sync_free=polar_sync_free,
    ),
    "exp": Retraction(
        exponential.exp,
        exact=True,
        second_order=(*_EUCLIDEAN, "canonical"),
        temp_blocks=75,
        newton_schulz_after=True,
        rotation=exponential.ROTATION,
    ),
    "orthogonalizer": Retraction(
        orthogonalizer.newton_schulz_step,
        exact=False,
        second_order=_EUCLIDEAN,
        temp_blocks=7,
        max_step_norm=orthogonalizer.max_step_norm,
        check_options=orthogonalizer.check_options,
    ),
}
OPTIONS: tuple[str, ...] = tuple(dict.fromkeys(name for row in RETRACTIONS.values() for name in row.options))


@torch.no_grad()
def retract(
    w: Tensor,
    v: Tensor,
    method: str = "polar",
    *,
    metric: Metric = "euclidean",
    beta: float = 0.5,
    correction_steps: int = 1,
    **options: Any,
) -> Tensor:
    r"""Move from the points ``w`` along the tangents ``v``, and stay on the manifold.

    Args:
        w: points, ``(..., p, n)``, orthonormal rows (``p <= n``) or columns: float32, float64, complex64 or
            complex128.
        v: tangents at ``w``, same shape and dtype. Of any length for the exact retractions; a step with a spectral
            norm above 1e5 is scaled down to 1e5, because the digits of W would be rounded away in W + V.
        method: a name in :data:`RETRACTIONS`.
        metric: whose geodesic ``"exp"`` follows.
        beta: rate of ``"orthogonalizer"``, in (0, 1).
        correction_steps: number of iterations of ``"orthogonalizer"``, at least 1.
        **options: options of retractions added to :data:`RETRACTIONS`.

    Returns:
        Points, same shape and dtype, detached. ``"cayley_iterative"`` and ``"orthogonalizer"`` end near the manifold,
        and scale a longer step down to spectral norm 1/2 and 1 (less for ``beta`` below 1/2).

    Raises:
        ValueError: unknown method or metric, options out of range, shapes or dtypes that differ.
        TypeError: an option that no retraction has.

    References: Absil, Mahony & Sepulchre (2008), *Optimization Algorithms on Matrix Manifolds*, section 4.1; Absil &
    Malick (2012), *Projection-like retractions on matrix manifolds*, for ``"orthographic"``; Wen & Yin (2013), *A
    feasible method for optimization with orthogonality constraints*, for ``"cayley"``; Li, Li & Todorovic (2020),
    *Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform*, for ``"cayley_iterative"``.

    >>> import torch
    >>> from manifold_opt import retract
    >>> w, v = torch.eye(2), torch.tensor([[0.0, 2.0], [-2.0, 0.0]])
    >>> turned = retract(w, v, "cayley")  # a quarter turn: twice the arc tangent of one
    >>> torch.allclose(turned, torch.tensor([[0.0, 1.0], [-1.0, 0.0]]), atol=1e-6)
    True
    """
    options |= {"metric": metric, "beta": beta, "correction_steps": correction_steps}
    check_retraction("retract", method, **options)
    check_pair("retract", w, v)
    if w.numel() == 0:
        return w.clone()
    settings = Settings(RETRACTIONS[method], options)
    return _retract(w.mT, v.mT, settings).mT if is_tall(w) else _retract(w, v, settings)


def _retract(w: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """Return the points that tangents at wide points lead to."""
    if settings.retraction.rotation is None or w.shape[-2] < w.shape[-1]:
        return retract_wide(w, v, settings)
    points = w.reshape(-1, *w.shape[-2:]).clone(memory_format=torch.contiguous_format)
    omega = skew(v.reshape(points.shape) @ points.mH)
    finite = omega.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    retract_(points, omega, Workspace(None, points), settings)
    return torch.where(finite, points, torch.nan).view(w.shape)


def check_retraction(name: str, method: str, **options: Any) -> None:
    """Raise an error that begins with ``name`` unless a retraction exists and can take the options.

    Every option has to be in range, also that of another retraction. An option that only another retraction has must
    have its default value, except for the metric, which is also that of the gradient.
    """
    if method not in RETRACTIONS:
        raise ValueError(f"{name}: retraction must be one of {', '.join(RETRACTIONS)}, got {method!r}.")
    for option in options:
        if option not in OPTIONS:
            raise TypeError(f"{name}: no retraction has an option {option!r}; there are {', '.join(OPTIONS)}.")
    check_metric(name, options["metric"])
    own = RETRACTIONS[method].options
    for other, row in RETRACTIONS.items():
        given = {option: options[option] for option in row.options if option in options}
        if row.check_options is not None:
            row.check_options(name, **given)
        foreign = [option for option in row.options if option not in own and option != "metric"]
        if any(given.get(option, row.options[option]) != row.options[option] for option in foreign):
            verb = "act" if len(foreign) > 1 else "acts"
            raise ValueError(
                f"{name}: {' and '.join(foreign)} {verb} with retraction={other!r} only, not with {method!r}. "
                "Leave them out, or set them in the parameter groups that use it."
            )
