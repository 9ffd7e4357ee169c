r"""From a gradient to a direction: momentum and Adam on the Stiefel manifold.

Points ``w`` are wide batches ``(B, p, n)``. Every rule updates the moments in ``state`` in place, returns
``length`` times a tangent direction V at ``w`` (``-lr`` is the length of a step), on square blocks its skew
:math:`\Omega`, and writes to nothing else but ``room``. Hyperparameters and the keys of the state are those of
torch.optim. Of complex blocks every transpose is the conjugate one, and the real and the imaginary part of an entry
are as two entries are, each with its own second moment.

On square blocks the moments are those of the gradient in the *frame* of W,

.. math:: A = G W^\top, \qquad \text{the gradient of } Z \mapsto f((I + Z) W) \text{ at } Z = 0,

and the direction is :math:`V = \Omega W` with :math:`\Omega` skew. The frame moves with W, so nothing has to be
transported: 1 T in all, T one p x n by n x p product. On rectangular blocks, where a frame would need the other
n - p rows, moments are held as the gradient comes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .products import adjoint, components, host_can_branch, matmul, matmul_add, norm, transpose
from .room import Room
from .stiefel import Metric

Moments = dict[str, Tensor]
SecondMoment = Literal["element", "block"]
Number = float | Tensor

_FLOOR = 0.01  # of its row's mean square, what an entry's counts for at least


@dataclass(frozen=True)
class Decay:
    r"""What Adam's averages are weighted with: betas, and what its bias corrections divide by.

    Attributes:
        beta1, beta2: decay of the two moments.
        correction1, correction2: :math:`1 - \beta^t`, a number, or ``(B, 1, 1)`` where step counts differ.
    """

    beta1: Number
    beta2: Number
    correction1: Number
    correction2: Number


def sgd(
    w: Tensor,
    g: Tensor,
    state: Moments,
    room: Room,
    *,
    length: Number,
    metric: Metric,
    momentum: float,
    dampening: float,
    nesterov: bool,
    sound: Tensor | None = None,
) -> Tensor:
    r"""Riemannian gradient, with momentum if asked: 1 T square; 2 T rectangular, 4 T with Nesterov.

    Square, with the buffer in the frame:
    :math:`B \leftarrow \mu B + (1-\tau) A`, :math:`\Omega = \operatorname{skew} B`, or of :math:`A + \mu B` for
    Nesterov. Rectangular, with a tangent buffer, whose transport and the projection of the gradient are one:
    :math:`B \leftarrow P_W(\mu B + (1-\tau) G)`, and the direction B, or :math:`P_W(G) + \mu B`.

    Blocks that are not ``sound``, ``(B, 1, 1)``, keep their buffer; all are unless given.
    """
    square = w.shape[-2] == w.shape[-1]
    new = _along(w, g, room) if square else g
    buffer = state.get("momentum_buffer") if momentum else None
    if square:
        if buffer is not None:
            _accumulate(buffer, new, momentum, 1 - dampening, sound)
            new = new.add_(buffer, alpha=momentum) if nesterov else new.copy_(buffer)
        return _skew_(new, room).mul_(_in_frame(length, metric))
    if buffer is None:
        size = norm(g, keepdim=True) * _size(length)
        v = _tangent_(w, _project(w, g, room, "second").mul_(length), size, room)
        return _in_metric(w, v, metric, room)
    both = torch.mul(g, 1 - dampening, out=room("third", w.shape, like=w)).add_(buffer, alpha=momentum)
    moved = _project(w, both, room, "second")
    buffer.copy_(moved) if sound is None else _keep(buffer, moved, sound)
    if nesterov:
        moved = _project(w, g, room, "second").add_(buffer, alpha=momentum)
    size = (norm(g, keepdim=True) + norm(both, keepdim=True)) * _size(length)
    return _in_metric(w, _tangent_(w, moved.mul_(length), size, room), metric, room)


def adam_element(
    w: Tensor,
    g: Tensor,
    state: Moments,
    room: Room,
    *,
    length: Number,
    metric: Metric,
    decay: Decay,
    eps: float,
    sound: Tensor | None = None,
) -> Tensor:
    r"""Adam with a second moment for every entry: 1 T square, 4 T rectangular.

    Square: torch's moments M and V of A in the frame, and what they say of :math:`\Omega_{ij} = -\Omega_{ji}`, whose
    derivative is :math:`A_{ij} - A_{ji}`:

    .. math:: \Omega_{ij} = \operatorname{clip}\left(
        \frac{\hat M_{ij} - \hat M_{ji}}{\min(\sqrt{\hat V_{ij}}, \sqrt{\hat V_{ji}}) + \epsilon}, -1, 1\right)

    The smaller scale, because of two entries of unlike scale the larger would drown what the smaller has to say.
    Every entry is a positive multiple of the derivative's, so the direction descends, and vanishes at a constrained
    optimum, where A is symmetric. (Torch's own direction, projected, does not: G is normal there, not zero, and an
    element-wise division turns it back into the tangent space.)

    Rectangular: torch's moments of G, with r the row means of V, the mean square of an entry of :math:`G W^\top`;
    :math:`\Omega` as above from :math:`M W^\top` and r, and the normal part entry by entry,

    .. math:: N = \operatorname{clip}\left(
        \frac{\hat M - \hat M W^\top W}{\sqrt{\max(\hat V, r/100)} + \epsilon}, -1, 1\right), \qquad
        D = N - N W^\top W + \Omega W.

    (Entries of M that happen to be small at the optimum would else step without end.)

    Complex: the numerator is :math:`\hat M_{ij} - \overline{\hat M_{ji}}`, on the diagonal too, and its real and its
    imaginary part are divided and clipped each by itself. Into r go the mean squares of both, for W mixes them.
    """
    square = w.shape[-2] == w.shape[-1]
    new = _along(w, g, room) if square else g.resolve_conj()
    m, v = state["exp_avg"], components(state["exp_avg_sq"])
    _average(components(m), components(new), decay.beta1, sound)
    _average_square(v, components(new), decay.beta2, sound)
    if "max_exp_avg_sq" in state:
        largest = components(state["max_exp_avg_sq"])
        v = largest.clamp_min_(v)  # maximum(out=...) of transposed ones is none that torch.compile knows
    # (M / c1) / (sqrt(V / c2) + eps) = (M / (sqrt(V) + eps sqrt(c2))) sqrt(c2) / c1
    root = decay.correction2**0.5
    offset, scale = eps * root, root / decay.correction1
    if square:
        other = transpose(v, out=components(room("second", w.shape, like=w)))
        size = other.clamp_max_(v).sqrt_().add_(offset)
        omega = torch.sub(m, adjoint(m, out=new), out=new)
        components(omega).div_(size).clamp_(-1 / scale, 1 / scale)
        return omega.mul_(_in_frame(length, metric) * scale)

    # Numbers are taken into the products, tensors cannot be.
    number = scale if isinstance(scale, float) else 1.0
    along = matmul(m, w.mH, out=room("first", (*w.shape[:-1], w.shape[-2]), like=w), alpha=number)
    normal = matmul_add(m, along, w, out=room("second", w.shape, like=w), beta=number, alpha=-1)
    if isinstance(scale, Tensor):
        along, normal = along.mul_(scale), normal.mul_(scale)
    rows = v.mean(-1, keepdim=True)
    if w.is_complex():
        rows = rows.mean(0)
    third = components(room("third", w.shape, like=w))
    components(normal).div_(torch.maximum(v, _FLOOR * rows, out=_memory(third)).sqrt_().add_(offset)).clamp_(-1, 1)
    other = adjoint(along, out=room("third", along.shape, like=w))
    omega = along.sub_(other)
    rows = rows.sqrt().add_(offset)
    components(omega.div_(torch.minimum(rows, rows.mT, out=_memory(other.real)))).clamp_(-1, 1)
    omega -= matmul(normal, w.mH, out=other)
    if isinstance(length, Tensor) or metric == "canonical":
        return _in_metric(w, matmul_add(normal, omega, w, out=normal), metric, room).mul_(length)
    return matmul_add(normal, omega, w, out=normal, beta=length, alpha=length)


def adam_block(
    w: Tensor,
    g: Tensor,
    state: Moments,
    room: Room,
    *,
    length: Number,
    metric: Metric,
    decay: Decay,
    eps: float,
    sound: Tensor | None = None,
) -> Tensor:
    r"""Adam with one second moment a block, the mean square of its Riemannian gradient: 1 T square, 4 T rectangular.

    Equivariant: rotating the problem rotates the steps. ``exp_avg_sq`` is ``(B, 1, 1)`` and real. A mean, not a sum,
    over the real and imaginary parts if complex, so that the step has the length of torch.optim.Adam's at the same
    learning rate. On rectangular blocks the first moment is a tangent, transported by projection.

    Reference: Becigneul & Ganea (ICLR 2019), with one block as one manifold.
    """
    square = w.shape[-2] == w.shape[-1]
    if square:
        new = _skew_(_along(w, g, room), room)
    else:
        new = _project(w, g, room, "second")
        transported = _project(w, state["exp_avg"], room, "third")
        state["exp_avg"].copy_(transported) if sound is None else _keep(state["exp_avg"], transported, sound)
    m, v = state["exp_avg"], state["exp_avg_sq"]
    _average(components(m), components(new), decay.beta1, sound)
    # |Omega W| = |Omega|: an orthogonal factor keeps every mean square.
    square_norm = norm(new, keepdim=True).square_()
    count = w.shape[-2] * w.shape[-1] * (2 if w.is_complex() else 1)
    _average(v, square_norm / count, decay.beta2, sound)
    if "max_exp_avg_sq" in state:
        v = state["max_exp_avg_sq"].clamp_min_(v)
    d = torch.div(m, ((v / decay.correction2).sqrt() + eps) * decay.correction1, out=new)
    if square:
        return _skew_(d, room).mul_(_in_frame(length, metric))  # again: m may come from an element-wise run
    scale = ((v / decay.correction2).sqrt() + eps) * count**0.5
    d = _tangent_(w, d.mul_(length), norm(g, keepdim=True) * _size(length) / scale, room)
    return _in_metric(w, d, metric, room)


ADAM = {"element": adam_element, "block": adam_block}


def to_frame(w: Tensor, key: str, moment: Tensor) -> Tensor:
    r"""A moment of G at square ``w`` as the one of :math:`A = G W^\top`.

    Exact for a mean, and for a mean square as if the entries of G were independent, and the parts of complex ones.
    """
    return _square_mixed(moment, w.mH) if key.endswith("_sq") else moment @ w.mH


def from_frame(w: Tensor, key: str, moment: Tensor) -> Tensor:
    """The inverse of :func:`to_frame`, for a mean square as if the entries of A were independent."""
    return _square_mixed(moment, w) if key.endswith("_sq") else moment @ w


def _square_mixed(v: Tensor, w: Tensor) -> Tensor:
    r"""Mean squares of the entries of M W, of the real and the imaginary parts if complex, from those v of M."""
    if not w.is_complex():
        return v @ (w * w)
    real, imaginary = w.real.square(), w.imag.square()
    return torch.complex(v.real @ real + v.imag @ imaginary, v.imag @ real + v.real @ imaginary)


def _along(w: Tensor, g: Tensor, room: Room) -> Tensor:
    """A = G W^T, ``(B, p, p)``."""
    return matmul(g, w.mH, out=room("first", (*w.shape[:-1], w.shape[-2]), like=w))


def _skew_(a: Tensor, room: Room) -> Tensor:
    """(A - A^T)/2 in place."""
    other = adjoint(a, out=room("second", a.shape, like=a))
    return a.sub_(other).mul_(0.5)


def _memory(x: Tensor) -> Tensor | None:
    """Where to write to: torch.compile refuses parts of complex numbers, and finds a place by itself."""
    return None if torch.compiler.is_compiling() else x


def _in_frame(length: Number, metric: Metric) -> Number:
    """The length of Omega for one of a step: the gradient in the canonical metric is twice as long."""
    return 2 * length if metric == "canonical" else length


def _project(w: Tensor, g: Tensor, room: Room, role: str) -> Tensor:
    """G - sym(G W^T) W on rectangular blocks: 2 T."""
    along = _along(w, g, room)
    symmetric = (along + along.mH).mul_(0.5)
    return matmul_add(g, symmetric, w, out=room(role, w.shape, like=w), alpha=-1)


def _size(length: Number) -> Number:
    return length.abs() if isinstance(length, Tensor) else abs(length)


def _tangent_(w: Tensor, v: Tensor, size: Tensor, room: Room) -> Tensor:
    """Project rectangular ``v``, in the workspace "second", once more where rounding may have left it no tangent.

    The projection of a gradient of size s leaves a part of eps s that is none. Where the gradient is normal to the
    manifold but for a little, and that little is taken for a long step, it would be felt: 2 T more, seldom. (Always
    where the host may not look.)
    """
    eps = torch.finfo(w.dtype).eps
    near = size * eps <= eps**0.5 / 4  # the square of that is rounding
    if not host_can_branch(w):
        return _project(w, v, room, "second")
    if bool(near.all()):
        return v
    # What a block gets does not depend on who is beside it.
    return torch.where(near, v.clone(), _project(w, v, room, "second"))


def _in_metric(w: Tensor, d: Tensor, metric: Metric, room: Room) -> Tensor:
    r"""The gradient in ``metric`` of a rectangular tangent in the Euclidean one, 2 T more for the canonical.

    .. math:: \Omega W + N \mapsto 2 \Omega W + N \quad \text{for the canonical metric.}
    """
    return d if metric == "euclidean" else matmul_add(d, _along(w, d, room), w, out=d)


def _average(moment: Tensor, new: Tensor, beta: Number, sound: Tensor | None) -> None:
    """Exponential average; blocks that are not sound keep what they have, the others the bits they would get."""
    held = moment if sound is None else moment.clone()
    held.lerp_(new, 1 - beta)
    _keep(moment, held, sound)


def _average_square(moment: Tensor, new: Tensor, beta: Number, sound: Tensor | None) -> None:
    if isinstance(beta, Tensor):
        _average(moment, new * new, beta, sound)
        return
    held = moment if sound is None else moment.clone()
    held.mul_(beta).addcmul_(new, new, value=1 - beta)
    _keep(moment, held, sound)


def _accumulate(buffer: Tensor, new: Tensor, momentum: float, share: float, sound: Tensor | None) -> None:
    held = buffer if sound is None else buffer.clone()
    held.mul_(momentum).add_(new, alpha=share)
    _keep(buffer, held, sound)


def _keep(moment: Tensor, held: Tensor, sound: Tensor | None) -> None:
    if sound is not None:
        moment.copy_(torch.where(sound, held, moment))
