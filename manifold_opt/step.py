"""One step: the closure, the unmarked parameters as torch steps them, the marked ones on their manifold.

The blocks of marked parameters walk, a bucket at a time,

    view or gather -> gradient -> direction -> step -> retraction -> back in place

and are written through their views only. Nothing on the way depends on a value where reading one would make the
host wait: on an accelerator, or in a graph that torch.compile traces or CUDA captures.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .buckets import Bucket
from .constraint import off_blocks
from .options import Group, largest_gradient
from .orthographic import INTERVAL, LONGEST_FIXED, SEAM, Bend, bend_of, rotate
from .plan import SCALED, Before, Plan, refuse
from .precision import FullPrecision, warn_unless_full, without_autocast
from .products import matmul, may_read, norm
from .retractions import RETRACTIONS, advance
from .room import Room
from .rules import Rule
from .schemes import LONG, polar_
from .tally import Tally
from .unmarked import Lists


class Desk(NamedTuple):
    """What a step works with: workspaces, counts, and what a GradScaler has left for a fused step to do."""

    room: Room
    tally: Tally
    grad_scale: Tensor | None
    found_inf: Tensor | None


Closure = Callable[[], Any]
Prepared = list[tuple[Group, Lists, bool]]

_FAR = 0.1  # distance from the manifold above which a value is no matter of rounding, and worth a warning


def step(
    optimizer: Any,
    closure: Closure | None,
    lists_of: Callable[[Any, Group], Lists],
    step_unmarked: Callable[[Any, Group, Lists, bool], None],
    rule_of: Callable[[Group, Bucket], Rule],
) -> Any:
    """One step of every group: the closure, then the unmarked parameters, then the marked ones.

    ``lists_of`` makes the empty lists that torch's ``_init_group`` fills, ``step_unmarked`` is torch's own step of
    what they have been filled with, and ``rule_of`` gives the direction of a bucket,
    ``(w, g, moments, room, length=..., sound=...) -> v``.
    """
    loss = None
    if closure is not None:
        with torch.enable_grad():
            loss = closure()
    compiling = torch.compiler.is_compiling()
    if compiling:
        warn_unless_full()
    prepared = (_ready if compiling else _ready_or_as_before)(optimizer, lists_of)
    precision = without_autocast if compiling else FullPrecision
    plans: list[Plan] = optimizer._plans
    with torch.set_grad_enabled(optimizer.defaults["differentiable"]):
        for group, lists, flag in prepared:
            if lists[0]:
                step_unmarked(optimizer, group, lists, flag)
    desk = Desk(optimizer._room, optimizer._tally, *(getattr(optimizer, key, None) for key in SCALED))
    if desk.found_inf is not None and may_read(desk.found_inf) and float(desk.found_inf) != 0:
        return loss
    for group, plan in zip(optimizer.param_groups, plans, strict=True):
        for bucket in plan.buckets:
            with torch.no_grad(), precision(bucket.parameters[0].device.type):
                assert bucket.steps is not None
                bucket.count(1 if desk.found_inf is None else 1 - desk.found_inf.to(bucket.steps))
                _move(bucket, group, rule_of(group, bucket), desk)
    return loss


def _ready(optimizer: Any, lists_of: Callable[[Any, Group], Lists]) -> Prepared:
    """Of every group what its unmarked parameters need, and its plan made.

    torch.compile knows _init_group by its name, and runs it outside of the graph.
    """
    prepared = []
    for group in optimizer.param_groups:
        lists = lists_of(optimizer, group)
        prepared.append((group, lists, optimizer._init_group(group, *lists)))
    return prepared


def _ready_or_as_before(optimizer: Any, lists_of: Callable[[Any, Group], Lists]) -> Prepared:
    """The same, with everything that can be refused or fail before a step; where it does, nothing has changed."""
    refuse(optimizer)
    before = optimizer._before = Before(optimizer)
    try:
        prepared = _ready(optimizer, lists_of)
        _restore(optimizer._plans, optimizer.param_groups)
    except BaseException:
        before.bring_back()
        raise
    finally:
        optimizer._before = None
    return prepared


@torch.no_grad()
def _restore(plans: list[Plan], groups: list[Group]) -> None:
    """Put parameters that were written to since the last step, by load_state_dict say, back on their manifold.

    An inexact scheme leaves its parameters near the manifold, not on it: what it may have left itself stays.
    """
    found = []
    for plan, group in zip(plans, groups, strict=True):
        for bucket in plan.buckets:
            slack = 0.0 if RETRACTIONS[group["retraction"]].exact else 1.0
            constraint = bucket.constraint
            versions = [p._version for p in bucket.parameters]
            if versions == bucket.versions:
                continue
            pairs = zip(bucket.parameters, bucket.versions, versions, strict=True)
            views = [constraint.view(p.detach()) for p, before, now in pairs if before != now]
            blocks = torch.cat(views) if len(views) > 1 else views[0]
            off, values = off_blocks(blocks, constraint.gain, slack)
            if bool(off.any()):
                found.append((views, blocks, off, values))
    for _, blocks, off, values in found:
        distance = float(torch.linalg.matrix_norm(blocks[off] - values).max())
        if distance > _FAR:
            shape = tuple(blocks.shape[1:])
            warnings.warn(
                f"A block of shape {shape} of a marked parameter was {distance:.2g} away from its manifold, changed "
                "outside the optimizer since it was marked or last stepped (load_state_dict?). It was put back to "
                "the nearest orthogonal value.",
                stacklevel=7,  # the caller of opt.step(), past its hooks and decorators
            )
    for views, blocks, off, values in found:
        blocks[off] = values
        if len(views) > 1:
            for k, view in enumerate(views):
                rows = slice(k * len(view), (k + 1) * len(view))
                view[off[rows]] = blocks[rows][off[rows]]


def _move(bucket: Bucket, group: Group, rule: Rule, desk: Desk) -> None:
    """View or gather, gradient, direction, retraction, and back in place: the walk of one bucket."""
    room, gain = desk.room, bucket.constraint.gain
    points = bucket.view(bucket.parameters, "point", room)
    gradients = bucket.view([p.grad for p in bucket.parameters], "gradient", room)  # type: ignore[misc]
    lr = group["lr"] * (group["orthogonal_lr_scale"] / gain)
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    # Other retractions have no products for matrices that lie across.
    across = bucket.tiny and may_read(points) and group["retraction"] in ("orthographic", "polar")
    for piece in bucket.pieces(across):
        point, g = points[piece], gradients[piece]
        moments = held = {key: moment[piece] for key, moment in bucket.moments.items()}
        w = point
        if across:
            w, g = room.across("w", point), room.across("g", g)
            moments = {key: room.across(key, moment) for key, moment in held.items()}
        if gain != 1:
            w = torch.div(point, gain, out=w if across else room("unscaled", point.shape, like=point))
        g, sound = _sound(g if desk.grad_scale is None else g / desk.grad_scale.to(g), desk)
        g = -g if group["maximize"] else g
        v = rule(w, g, moments, room, length=-lr, sound=sound)
        due = bucket.due(INTERVAL[w.dtype], piece)
        moved = _retract_(w, v if sound is None else torch.where(sound, v, 0), group, desk, due)
        if w is not point:
            scaled = w if gain == 1 else w * gain
            point.copy_(scaled if moved is None else torch.where(moved, scaled, point))
        for key, moment in moments.items():
            if moment is not held[key]:
                held[key].copy_(moment)
    if bucket.gathered:
        bucket.write_back(points)
    if not torch.compiler.is_compiling():
        bucket.versions = [p._version for p in bucket.parameters]


def _sound(g: Tensor, desk: Desk) -> tuple[Tensor, Tensor | None]:
    """The gradient, and which blocks of it, ``(B, 1, 1)``, are finite and have squares that are; others set to zero.

    None where the host can see that all are.
    """
    limit = largest_gradient(g.dtype)
    if may_read(g) and float(torch.linalg.vector_norm(g)) <= limit:
        return g, None
    sound = norm(g, keepdim=True) <= limit  # a NaN is not
    desk.tally.add("skipped_blocks", ~sound)
    if desk.found_inf is not None:  # seen above where it can be read: then there is nothing to do here
        sound = sound & (desk.found_inf.to(g.device) == 0)
    return torch.where(sound, g, 0), sound


def _retract_(w: Tensor, v: Tensor, group: Group, desk: Desk, due: slice | Tensor) -> Tensor | None:
    """Move ``w`` in place along its direction: V, or on square blocks the skew Omega of V = Omega W.

    A block without a step keeps its bits, and so does one whose result cannot be right. The orthographic retraction
    looks at the orthogonality of the blocks that are ``due``, the others at that of all.

    Returns which blocks have moved, ``(B, 1, 1)``; None if all have.
    """
    method, room, tally = group["retraction"], desk.room, desk.tally
    if w.shape[-2] == w.shape[-1]:
        if method == "orthographic":
            bent = bend_of(v, room)
            if not may_read(w) or bool((bent.size <= SEAM).any()):
                return _rotate_(w, v, bent, desk, due)
        v = matmul(v, w, out=room("second", w.shape, like=w))
    if method == "orthographic":
        method = "polar"
    length = norm(v, keepdim=True)
    if may_read(w) and method == "polar":
        shortest, longest = (float(x) for x in length.aminmax())
        if shortest > 0 and longest <= LONG:
            polar_(w, v, out=w, room=room)
            return None
    if method == "polar" and not may_read(w):
        new = polar_(w, v, out=room("result", w.shape, like=w), room=room, tally=tally)
    else:
        options = {key: group[key] for key in ("metric", "beta", "correction_steps")}
        new = advance(w, v, method, tally=tally, **options)
    return _write_back_(w, new, length != 0, tally)


def _rotate_(w: Tensor, omega: Tensor, bent: Bend, desk: Desk, due: slice | Tensor) -> Tensor | None:
    """The orthographic retraction on square blocks, some of which at least are short enough; polar for the others."""
    room, tally = desk.room, desk.tally
    stepped = bent.size[:, None, None] != 0  # of a NaN nobody knows
    if not may_read(w):
        tally.add("clamped_steps", bent.size > LONGEST_FIXED)
        return _write_back_(w, rotate(w, omega, bent, room=room, due=due), stepped, tally)
    short = (bent.size <= SEAM)[:, None, None]
    if bool(short.all()):
        new = rotate(w, omega, bent, room=room, due=due)
        if bool(stepped.all()):
            w.copy_(new)
            return None
        return _write_back_(w, new, stepped, tally)
    v = matmul(omega, w, out=torch.empty_like(w)).masked_fill_(short, 0)
    far = advance(w, v, "polar", tally=tally, beta=0.5)
    near = rotate(w, omega, bent, room=room, due=due)
    return _write_back_(w, torch.where(short, near, far), stepped, tally)


def _write_back_(w: Tensor, new: Tensor, stepped: Tensor, tally: Tally) -> Tensor:
    """Write the blocks that have made a step, and whose result can be right: no orthogonal entry exceeds one."""
    within = (new.abs() <= 2).all(-1, keepdim=True).all(-2, keepdim=True)
    moved = within & stepped
    tally.add("skipped_blocks", stepped & ~within)
    w.copy_(torch.where(moved, new, w))
    return moved


def check_capture(optimizer: Any) -> None:
    """Torch's own warning where a step that is not capturable is about to be captured."""
    newer = getattr(optimizer, "_accelerator_graph_capture_health_check", None)
    (newer or optimizer._cuda_graph_capture_health_check)()
