r"""A retraction as an optimizer applies it: to a batch of wide blocks, in place.

A step takes one of two paths. On the common path every block moves, is on the manifold, and its step is short: then
square blocks are rotated (rotation.py), and others are moved by the ``in_place`` function of the retraction. On the
careful path the blocks with a long step are picked by index and written back. They are moved by the fallback Rotation,
or by ``in_place`` or, if neither takes them, by the function of the retraction, which takes a step of any length.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..linalg.newton_schulz import newton_schulz
from ..linalg.products import Workspace, gram_minus_identity, host_can_branch, matmul, norm
from .geometry import transport
from .long_steps import LONG_STEP_NORM, RetractionFn, clip_step
from .rotation import CORRECTION_INTERVAL, Rotation, bounds, restore_, rotate_, rotate_sync_free

_MAX_OMEGA_NORM = 1e9  # its fourth power, in the norm of B^2, is finite in float32
_MAX_GRAM_ERROR = 0.1  # Frobenius norm of W W^H - I above which W is first replaced by the nearest point


@dataclass(frozen=True)
class Retraction:
    """A retraction and its properties; the tests measure every one of them.

    Attributes:
        function: ``(w, v, **options) -> w'`` on wide matrices, for a step of any length.
        exact: whether the result is on the manifold, to rounding, for a step of any length.
        second_order: the geodesics that it follows to second order: those of ``"square"`` matrices (the same for both
            metrics), and of the ``"euclidean"`` and ``"canonical"`` metric on rectangular ones. Every retraction
            follows all geodesics to first order.
        temp_blocks: temporary memory of a step beyond its workspaces, as a multiple of the memory of the blocks that
            move. On a CPU, a step of unusual length can take more.
        newton_schulz_after: whether one Newton-Schulz step follows ``function``, without which the error of
            ``w @ w.mH = I`` would never shrink.
        max_step_norm: largest spectral norm of a step, to which a longer step is scaled down; or a function of the
            options that returns it. By default 1e5: beyond that the digits of W are rounded away in W + V.
        rotation: how square blocks move if their steps are short; None if ``function`` moves them.
        in_place: ``(w, v, ws) -> bool``: writes the new points into ``w`` and returns True if all steps are short.
            Otherwise it writes nothing and returns False. None if there is no such function.
        sync_free: ``(w, v, ws) -> (w', clipped, near)``: replaces ``in_place`` on accelerators and in compiled steps,
            where no value may be read. It returns the new points, a mask of the steps that were shortened, and a mask
            of the points that were near the manifold. None if ``function`` is used there too.
        move: ``(w, step, ws, settings)``: if given, it is used instead of all functions above, on every device, and
            writes the new points into ``w``. None for a retraction of tangents.
        check_options: ``(name, **options)``: raises a ValueError, which begins with ``name``, if an option is out of
            range. None if there is nothing to check.
        options: keyword options of ``function``, and their default values.

    >>> from manifold_opt import RETRACTIONS
    >>> [name for name, retraction in RETRACTIONS.items() if retraction.exact and retraction.second_order]
    ['cayley', 'orthographic', 'polar', 'exp']
    """

    function: RetractionFn
    exact: bool
    second_order: tuple[str, ...]
    temp_blocks: int
    newton_schulz_after: bool = False
    max_step_norm: float | Callable[..., float] = 1e5
    rotation: Rotation | None = None
    in_place: Callable[[Tensor, Tensor, Workspace], bool] | None = None
    sync_free: Callable[[Tensor, Tensor, Workspace], tuple[Tensor, Tensor, Tensor]] | None = None
    move: Callable[[Tensor, Tensor, Workspace, Settings], None] | None = None
    check_options: Callable[..., None] | None = None
    options: dict[str, Any] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        parameters = inspect.signature(self.function).parameters.values()
        options = {x.name: x.default for x in parameters if x.kind is inspect.Parameter.KEYWORD_ONLY}
        object.__setattr__(self, "options", options)

    def step_limit(self, **options: Any) -> float:
        """Return ``max_step_norm`` for these options of ``function``."""
        return self.max_step_norm(**options) if callable(self.max_step_norm) else self.max_step_norm


def count_nothing(**masks: Tensor) -> None:
    """Ignore what is to be counted."""


@dataclass
class Settings:
    """How blocks are retracted in a step.

    Attributes:
        retraction: the retraction.
        options: values of its keyword options; others are ignored.
        count: called with ``skipped=`` or ``clamped=``, masks of blocks.
        steps: number of the step. The error of square blocks is measured, and half of it removed, in every few steps;
            in every step if it is None.
        finite: mask of blocks with a finite gradient, ``(B, 1, 1)``; the others stay. None if all are finite.
    """

    retraction: Retraction
    options: Mapping[str, Any]
    count: Callable[..., None] = count_nothing
    steps: int | None = None
    finite: Tensor | None = None


def retract_(w: Tensor, step: Tensor, ws: Workspace, settings: Settings) -> None:
    r"""Move wide blocks in place.

    A block with a zero step keeps its bits. So does a block whose result is not finite, which is counted.

    Args:
        w: points, ``(B, p, n)``.
        step: tangents V; for square blocks the skew :math:`\Omega` of :math:`V = \Omega W`. Overwritten.
        ws: buffers; ``step`` may be ``ws.a`` if square, ``ws.y`` if not.
        settings: the retraction, its options and counters.
    """
    rotation, is_square = settings.retraction.rotation, w.shape[-2] == w.shape[-1]
    correct = settings.steps is None or settings.steps % CORRECTION_INTERVAL[w.dtype] == 0
    if settings.retraction.move is not None:
        settings.retraction.move(w, step, ws, settings)
    elif not ws.readable:
        _retract_sync_free_(w, step, ws, settings, correct=correct)
    elif is_square and rotation is not None:
        if not rotate_(w, step, rotation, ws, correct=correct):
            _rotate_by_length_(w, step, rotation, ws, settings, correct=correct)
    else:
        _move_along_(w, matmul(step, w, out=ws.y) if is_square else step, ws, settings)


def _move_along_(w: Tensor, v: Tensor, ws: Workspace, settings: Settings) -> None:
    """Move blocks along tangents: in place if the retraction can do that for them, else by its function."""
    in_place = settings.retraction.in_place
    if in_place is None or not in_place(w, v, ws):
        _retract_any_length_(w, v, settings)


def _rotate_by_length_(
    w: Tensor, omega: Tensor, rotation: Rotation, ws: Workspace, settings: Settings, *, correct: bool
) -> None:
    """Rotate the blocks whose step is short enough for the rotation, and move the others by its fallback."""
    largest = omega.abs().amax((-2, -1), keepdim=True)
    finite = (largest < torch.inf)[:, 0, 0]
    settings.count(skipped=~finite)
    omega.mul_((_MAX_OMEGA_NORM / largest / omega.shape[-1]).clamp_max_(1))
    size = bounds(omega, ws)
    short = size <= rotation.fits[w.dtype][-1].reach
    for is_short, mask in ((True, short), (False, finite & ~short)):
        index = mask.nonzero()[:, 0]
        if len(index) == 0:
            continue
        whole = len(index) == len(w)  # then no block has to be copied
        point, turn = (w, omega) if whole else (w[index], omega[index])
        space = ws if whole else Workspace(None, point)
        if is_short and rotate_(point, turn, rotation, space, correct=correct):
            pass
        elif rotation.fallback is None:
            _move_along_(point, matmul(turn, point, out=space.y), space, settings)
        elif not rotate_(point, turn, rotation.fallback, space, correct=correct):
            _rotate_by_length_(point, turn, rotation.fallback, space, settings, correct=correct)
        if not whole:
            w[index] = point


def _retract_any_length_(w: Tensor, v: Tensor, settings: Settings) -> None:
    """Move blocks by the function of their retraction; first restore those that are far off the manifold."""
    if settings.retraction.exact:
        far = _restore_far_(w)
        v = torch.where(far, transport(w, v), v) if bool(far.any()) else v
    new = retract_wide(w, v, settings)
    possible = (new.abs() <= 2).all(-1, keepdim=True).all(-2, keepdim=True)  # no entry of a point exceeds one
    moving = norm(v, keepdim=True) != 0
    settings.count(skipped=moving & ~possible)
    w.copy_(torch.where(moving & possible, new, w))


def _restore_far_(w: Tensor) -> Tensor:
    """Replace the blocks that are far off the manifold by the nearest points, and return which, ``(B, 1, 1)``."""
    error = gram_minus_identity(w, out=w.new_empty(*w.shape[:-1], w.shape[-2]))
    size = norm(error, keepdim=True)
    far = (size > _MAX_GRAM_ERROR) & (size < torch.inf)
    if bool(far.any()):
        restore_(w, torch.where(far, error, 0))
    return far


def _retract_sync_free_(w: Tensor, step: Tensor, ws: Workspace, settings: Settings, *, correct: bool) -> None:
    """Move wide blocks in place as :func:`retract_` does, where no value may be read."""
    retraction, clipped = settings.retraction, None
    is_square = w.shape[-2] == w.shape[-1]
    rotation = retraction.rotation if is_square else None
    v = matmul(step, w, out=ws.y) if is_square and rotation is None else step
    length = norm(v, keepdim=True)
    possible = length < torch.inf  # false if it is NaN
    if rotation is not None or retraction.sync_free is not None:
        v.div_((length / LONG_STEP_NORM).clamp_min_(1))  # so that its powers cannot overflow
        if rotation is not None:
            new, clipped, near = rotate_sync_free(w, v, rotation, ws, correct=correct)
        else:
            assert retraction.sync_free is not None
            new, clipped, near = retraction.sync_free(w, v, ws)
        possible = possible if near is None else possible & near
    else:
        new = retract_wide(w, v, settings)
        possible = possible & (new.abs() <= 2).all(-1, keepdim=True).all(-2, keepdim=True)
    possible = possible if settings.finite is None else possible.logical_and_(settings.finite)
    settings.count(skipped=~possible, clamped=clipped)
    # A rotation without correction leaves a block with a zero step as it is.
    moving = possible if rotation is not None and not correct else possible & (length > 0)
    if torch.compiler.is_compiling():
        w.copy_(torch.where(moving, new, w))
    else:
        torch.where(moving, new, w, out=w)


def retract_wide(w: Tensor, v: Tensor, settings: Settings) -> Tensor:
    """Return the points that steps of any length lead to; count the steps that are clipped."""
    retraction, given = settings.retraction, settings.options
    options = {name: given[name] for name in retraction.options if name in given}  # a missing one has its default
    if host_can_branch(w) or not retraction.exact:
        shorter = clip_step(v, retraction.step_limit(**options))
        clipped = None if shorter is v else (shorter != v).any(-1).any(-1)
        v = shorter
    else:  # the function clips it, to a length that needs no double precision
        clipped = norm(v) > LONG_STEP_NORM
    if clipped is not None:
        settings.count(clamped=clipped)
    new = retraction.function(w, v, **options)
    return newton_schulz(new) if retraction.newton_schulz_after else new
