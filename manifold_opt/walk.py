"""The walk of one bucket of orthogonal blocks: view or gather -> gradient -> direction -> retraction -> back in place.

Nothing on the way depends on a value where reading one would make the host wait: on an accelerator, or in a graph that
torch.compile traces or CUDA captures.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .buckets import Bucket
from .desk import Desk, sound_gradient
from .manifolds import Orthogonal
from .options import Group
from .orthographic import INTERVAL, LONGEST_FIXED, SEAM, Bend, bend_of, rotate
from .products import host_can_branch, matmul, norm
from .retractions import advance
from .rules import Rule
from .schemes import LONG, polar_
from .tally import Tally


def move(bucket: Bucket, group: Group, rule: Rule, desk: Desk) -> None:
    """View or gather, gradient, direction, retraction, and back in place: the walk of one bucket."""
    assert isinstance(bucket.constraint, Orthogonal)
    room, gain = desk.room, bucket.constraint.gain
    values = bucket.view(bucket.parameters, "point", room)
    state, master = bucket.take(room)
    bucket.follow(values, master)
    points = values if master is None else master
    gradients = bucket.view([p.grad for p in bucket.parameters], "gradient", room)  # type: ignore[misc]
    lr = group["lr"] * (group["orthogonal_lr_scale"] / gain)
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    # Other retractions have no products for matrices that lie across.
    across = bucket.tiny and host_can_branch(points) and group["retraction"] in ("orthographic", "polar")
    for piece in bucket.pieces(across):
        point, g = points[piece], gradients[piece].to(points.dtype)
        moments = held = {key: moment[piece] for key, moment in state.items()}
        w = point
        if across:
            w, g = room.across("w", point), room.across("g", g)
            moments = {key: room.across(key, moment) for key, moment in held.items()}
        if gain != 1:
            w = torch.div(point, gain, out=w if across else room("unscaled", point.shape, like=point))
        g, sound = sound_gradient(g if desk.grad_scale is None else g / desk.grad_scale.to(g), 2, desk)
        g = -g if group["maximize"] else g
        v = rule(w, g, moments, room, length=-lr, sound=sound)
        due = bucket.due(INTERVAL[w.dtype], piece)
        moved = _retract_(w, v if sound is None else torch.where(sound, v, 0), group, desk, due)
        if w is not point:
            scaled = w if gain == 1 else w * gain
            point.copy_(scaled if moved is None else torch.where(moved, scaled, point))
        if points is not values:
            values[piece] = point if moved is None else torch.where(moved, point.to(values), values[piece])
        for key, moment in moments.items():
            if moment is not held[key]:
                held[key].copy_(moment)
    bucket.write_back(values, state, master)


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
            if not host_can_branch(w) or bool((bent.size <= SEAM).any()):
                return _rotate_(w, v, bent, desk, due)
        v = matmul(v, w, out=room("second", w.shape, like=w))
    if method == "orthographic":
        method = "polar"
    length = norm(v, keepdim=True)
    if host_can_branch(w) and method == "polar":
        shortest, longest = (float(x) for x in length.aminmax())
        if shortest > 0 and longest <= LONG:
            polar_(w, v, out=w, room=room)
            return None
    if method == "polar" and not host_can_branch(w):
        new = polar_(w, v, out=room("result", w.shape, like=w), room=room, tally=tally)
    else:
        options = {key: group[key] for key in ("metric", "beta", "correction_steps")}
        new = advance(w, v, method, tally=tally, **options)
    return _write_back_(w, new, length != 0, tally)


def _rotate_(w: Tensor, omega: Tensor, bent: Bend, desk: Desk, due: slice | Tensor) -> Tensor | None:
    """The orthographic retraction on square blocks, some of which at least are short enough; polar for the others."""
    room, tally = desk.room, desk.tally
    stepped = bent.size[:, None, None] != 0  # of a NaN nobody knows
    if not host_can_branch(w):
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
