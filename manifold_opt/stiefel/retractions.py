r"""Retractions on the Stiefel manifold: from a point and a tangent to the next point.

Each is one line in :data:`RETRACTIONS`, which states what it claims; the tests run over that dict and measure every
claim. All satisfy :math:`R_W(0) = W` and :math:`DR_W(0)[V] = V`, so a learning rate means the same in each.

A step takes one of two paths. Common: every block moves, is on the manifold, and its step is short. Then square blocks
are rotated (rotation.py) and others get their polar factor (polar_factor.py), in place. All other blocks are picked by
index, moved by the function of their retraction (schemes.py), which takes a step of any length, and written back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..linalg.matrices import is_tall, skew
from ..linalg.newton_schulz import newton_schulz
from ..linalg.polar_factor import polar_factor_, polar_sync_free
from ..linalg.products import gram_minus_identity, host_can_branch, largest_norm, matmul, norm
from ..linalg.workspace import Workspace
from .geometry import Metric, check_metric, check_pair, transport
from .rotation import OFF_MANIFOLD, ROTATIONS, Rotation, bounds, restore_, rotate_, rotate_sync_free
from .schemes import LONG, Scheme, cayley, cayley_iterative, exp, orthogonalized, polar, qr

_LONGEST = 1e9  # Frobenius norm of a step whose squares can be squared
_FAR = 0.1  # distance from the manifold that a retraction should not have to mend


@dataclass(frozen=True)
class Retraction:
    """A retraction and what it claims, with its default options; the tests measure every claim.

    Attributes:
        function: ``(w, v, **options) -> w'`` on wide matrices, for a step of any length.
        exact: ends on the manifold, to rounding, for a step of any size.
        second_order: the geodesics it follows to second order: those of ``"square"`` matrices (the same
            for both metrics), and of the ``"euclidean"`` and ``"canonical"`` metric on rectangular ones.
            First order everywhere.
        temporaries: memory of a step beyond its workspaces, as a multiple of that of the blocks that move; where
            values are read, a step of unusual length can take more.
        polished: whether one Newton-Schulz step follows ``function``, which alone would carry an error in
            ``w @ w.mH = I`` along for ever.
        options: names of the keyword options it honours.
        longest: spectral norm of the longest step; a longer one is shortened to it.
        rotation: how a square block moves if its step is short.
        polar: whether it is the polar retraction on rectangular blocks.

    >>> from manifold_opt import RETRACTIONS
    >>> [name for name, scheme in RETRACTIONS.items() if scheme.exact and scheme.second_order]
    ['cayley', 'orthographic', 'polar', 'exp']
    """

    function: Scheme
    exact: bool
    second_order: tuple[str, ...]
    temporaries: int
    polished: bool = False
    options: tuple[str, ...] = ()
    longest: float = 1e5  # beyond it W is lost in the rounding of W + V
    rotation: Rotation | None = None
    polar: bool = False


_EUCLIDEAN, _CANONICAL = ("square", "euclidean"), ("square", "canonical")
RETRACTIONS: dict[str, Retraction] = {
    "qr": Retraction(qr, True, (), 7, polished=True, rotation=ROTATIONS["qr"]),
    "cayley": Retraction(cayley, True, _CANONICAL, 14, rotation=ROTATIONS["cayley"]),
    "cayley_iterative": Retraction(cayley_iterative, False, _CANONICAL, 10, polished=True, longest=0.5),
    "orthographic": Retraction(polar, True, _EUCLIDEAN, 6, rotation=ROTATIONS["orthographic"], polar=True),
    "polar": Retraction(polar, True, _EUCLIDEAN, 5, rotation=ROTATIONS["polar"], polar=True),
    "exp": Retraction(
        exp, True, (*_EUCLIDEAN, "canonical"), 75, polished=True, options=("metric",), rotation=ROTATIONS["exp"]
    ),
    "orthogonalizer": Retraction(
        orthogonalized, False, _EUCLIDEAN, 7, options=("beta", "correction_steps"), longest=1.0
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
    settings = Settings(method, {"metric": metric, "beta": beta, "correction_steps": correction_steps})
    if RETRACTIONS[method].rotation is None or w.shape[-2] < w.shape[-1]:
        return retract_wide(w, v, settings)
    points = w.reshape(-1, *w.shape[-2:]).clone(memory_format=torch.contiguous_format)
    omega = skew(v.reshape(points.shape) @ points.mH)
    finite = omega.isfinite().all(-1, keepdim=True).all(-2, keepdim=True)
    retract_(points, omega, Workspace(None, points), settings)
    return torch.where(finite, points, torch.nan).view(w.shape)


def _do_not_count(name: str, mask: Tensor) -> None:
    """Count nothing."""


@dataclass
class Settings:
    """How blocks are retracted in a step.

    Attributes:
        method: a name in :data:`RETRACTIONS`.
        options: values for :func:`retract`'s keyword arguments.
        count: called with ``"skipped_blocks"`` or ``"clamped_steps"``, and a mask of these blocks.
        correct: whether the error of square blocks is to be measured, and taken off.
        finite: one for a block with a finite gradient, zero for others, which stay; None if all have one.
    """

    method: str
    options: dict[str, Any]
    count: Callable[[str, Tensor], None] = _do_not_count
    correct: bool = True
    finite: Tensor | None = None


def retract_(w: Tensor, step: Tensor, ws: Workspace, settings: Settings) -> None:
    r"""Move wide blocks in place.

    A block without a step keeps its bits, and so does one whose result is not finite, which is counted.

    Args:
        w: points, ``(B, p, n)``.
        step: tangents V; on square blocks the skew :math:`\Omega` of :math:`V = \Omega W`. Overwritten.
        ws: buffers; ``step`` may be ``ws.a`` if square, ``ws.y`` if not.
        settings: how.
    """
    scheme, is_square = RETRACTIONS[settings.method], w.shape[-2] == w.shape[-1]
    if not ws.readable:
        _retract_sync_free_(w, step, ws, settings)
    elif is_square and scheme.rotation is not None:
        if not rotate_(w, step, scheme.rotation, ws, correct=settings.correct):
            _rotate_by_length_(w, step, scheme.rotation, ws, settings)
    else:
        _retract_with_care_(w, matmul(step, w, out=ws.y) if is_square else step, ws, settings)


def _retract_with_care_(w: Tensor, v: Tensor, ws: Workspace, settings: Settings) -> None:
    """Move blocks along tangents, in place by the polar retraction if that is what is asked for and it can be."""
    if not (RETRACTIONS[settings.method].polar and _polar_(w, v, ws)):
        _retract_any_length_(w, v, settings)


def _polar_(w: Tensor, v: Tensor, ws: Workspace) -> bool:
    """Take the polar retraction; return False, with nothing written, if a block needs care."""
    ends = norm(v).aminmax() if v.shape[0] > 1 else None
    longest = largest_norm(v) if ends is None else float(ends.max)
    shortest = longest if ends is None else float(ends.min)
    if not (shortest > 0 and longest <= LONG):
        return False
    # D has the error of W in it too, which is of rounding if W is on the manifold.
    expected = 1.01 * longest**2 + 2 * OFF_MANIFOLD * (1 + longest) * torch.finfo(w.dtype).eps ** 0.5
    return polar_factor_(torch.add(w, v, out=ws.x), out=w, ws=ws, expected=expected)


def _rotate_by_length_(w: Tensor, omega: Tensor, rotation: Rotation, ws: Workspace, settings: Settings) -> None:
    """Rotate the blocks whose step is short enough, and move the others as their retraction does beyond that."""
    largest = omega.abs().amax((-2, -1), keepdim=True)
    finite = (largest < torch.inf)[:, 0, 0]
    settings.count("skipped_blocks", ~finite)
    omega.mul_((_LONGEST / largest / omega.shape[-1]).clamp_max_(1))
    size = bounds(omega, ws)
    short = size <= rotation.fits[w.dtype][-1].reach
    for near, which in ((True, short), (False, finite & ~short)):
        index = which.nonzero()[:, 0]
        if len(index) == 0:
            continue
        whole = len(index) == len(w)  # then nothing has to be copied
        point, turn = (w, omega) if whole else (w[index], omega[index])
        space = ws if whole else Workspace(None, point)
        if near and rotate_(point, turn, rotation, space, correct=settings.correct):
            pass
        elif rotation.beyond != settings.method:
            beyond = Settings(rotation.beyond, settings.options, settings.count, settings.correct)
            retract_(point, turn, space, beyond)
        else:
            _retract_with_care_(point, matmul(turn, point, out=space.y), space, settings)
        if not whole:
            w[index] = point


def _retract_any_length_(w: Tensor, v: Tensor, settings: Settings) -> None:
    """Move blocks by the function of their retraction; restore those that something has moved off the manifold."""
    if RETRACTIONS[settings.method].exact:
        far = _restore_far_(w)
        v = torch.where(far, transport(w, v), v) if bool(far.any()) else v
    new = retract_wide(w, v, settings)
    possible = (new.abs() <= 2).all(-1, keepdim=True).all(-2, keepdim=True)  # no entry of a point exceeds one
    moving = norm(v, keepdim=True) != 0
    settings.count("skipped_blocks", moving & ~possible)
    w.copy_(torch.where(moving & possible, new, w))


def _restore_far_(w: Tensor) -> Tensor:
    """Write the nearest point to the blocks that are far off the manifold, and return which, ``(B, 1, 1)``."""
    error = gram_minus_identity(w, out=w.new_empty(*w.shape[:-1], w.shape[-2]))
    size = norm(error, keepdim=True)
    far = (size > _FAR) & (size < torch.inf)
    if bool(far.any()):
        restore_(w, torch.where(far, error, 0))
    return far


def _retract_sync_free_(w: Tensor, step: Tensor, ws: Workspace, settings: Settings) -> None:
    """As :func:`retract_`, where no value may be read."""
    scheme, is_square, count = RETRACTIONS[settings.method], w.shape[-2] == w.shape[-1], settings.count
    v = matmul(step, w, out=ws.y) if is_square and scheme.rotation is None else step
    length = norm(v, keepdim=True)
    possible = length < torch.inf  # a NaN is not
    if scheme.polar or (v is step and is_square):
        v.div_((length / LONG).clamp_min_(1))  # lest powers of it overflow
        if is_square and scheme.rotation is not None:
            new, shortened, near = rotate_sync_free(w, v, scheme.rotation, ws)
            possible = possible & near
        else:
            new, shortened = polar_sync_free(w, v, ws)
        count("clamped_steps", shortened)
    else:
        new = retract_wide(w, v, settings)
        possible = possible & (new.abs() <= 2).all(-1, keepdim=True).all(-2, keepdim=True)
    possible = possible if settings.finite is None else possible.logical_and_(settings.finite)
    count("skipped_blocks", ~possible)
    moving = possible & (length > 0)
    if torch.compiler.is_compiling():
        w.copy_(torch.where(moving, new, w))
    else:
        torch.where(moving, new, w, out=w)


def retract_wide(w: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """Return the points that steps of any length lead to; those that are shortened are counted."""
    scheme, options = RETRACTIONS[settings.method], settings.options
    if host_can_branch(w) or not scheme.exact:
        shorter = _shorten(v, longest_step(settings.method, options["beta"]))
        shortened = None if shorter is v else (shorter != v).any(-1).any(-1)
        v = shorter
    else:  # the function shortens it, to a length that needs no care
        shortened = norm(v) > LONG
    if shortened is not None:
        settings.count("clamped_steps", shortened)
    moved = scheme.function(w, v, **{name: options[name] for name in scheme.options})
    return newton_schulz(moved) if scheme.polished else moved


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
