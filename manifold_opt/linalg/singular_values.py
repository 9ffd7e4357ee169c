r"""The spectral-norm ball :math:`\{W : \sigma_{\max}(W) \le b\}`, as pure functions on batches ``(..., p, n)``.

The nearest point of the ball in the Frobenius norm keeps the singular vectors of :math:`X` and takes
:math:`\min(s, b)` for every singular value s. With :math:`X X^\top = U S^2 U^\top` it is

.. math:: X + U_+ (b S_+^{-1} - I) U_+^\top X,

the sum over the singular values above b alone: the others need not be known well, nor does their rank matter.

A Frobenius norm within the bound proves a block inside for free, and a Cholesky factorization of
:math:`b^2 I - X X^\top` decides every other; only a block that is outside costs an eigendecomposition. Nothing is
carried from step to step. Starting from the last step's singular vectors pays while a few of them are at the bound,
and training brings many there, where it costs more than it saves and finds the spectrum less well.

Reference: Higham (2008), *Functions of Matrices*, chapters 5 and 8; Parikh & Boyd (2014), *Proximal algorithms*,
section 6.7.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .matrices import float64, is_tall, sym
from .products import gram, host_can_branch, norm

SMALLEST, LARGEST = 1e-12, 1e12  # bounds whose squares float32 holds with room to spare
_FAR = 2.0  # times the bound: up to there a Gram matrix shows singular values at the bound to a few roundings
_CHUNK = 2**16  # entries of Gram matrices at a time: they stay in the cache
_CHUNK_ELSEWHERE = 2**22  # or fill a device

_REACH = 8.0  # times the bound: as far as the iterations go that look at no value
_RESOLUTION = {torch.float32: 1e-6, torch.float64: 1e-8}  # of what they find, relative to the norm
_CUSHION = 1.02


def clip_singular_values(x: Tensor, bound: float) -> Tensor:
    r"""Nearest matrix with singular values of at most ``bound``, for each matrix of a batch.

    :math:`U \min(S, b) V^\top` for :math:`X = U S V^\top`. A matrix inside to rounding is returned bit for bit, and
    so is one with entries that are not finite.

    Args:
        x: ``(..., p, n)``, wide or tall, float32 or float64.
        bound: b, from 1e-12 to 1e12.

    Returns:
        Same shape, a new tensor without a gradient.

    Raises:
        ValueError: not such matrices, or not such a bound.

    >>> import torch
    >>> from manifold_opt.linalg.singular_values import clip_singular_values
    >>> clip_singular_values(torch.tensor([[3.0, 0.0], [0.0, -0.5]]), 1.0)
    tensor([[ 1.0000,  0.0000],
            [ 0.0000, -0.5000]])
    """
    _check("clip_singular_values", x, bound)
    clipped = x.detach().clone(memory_format=torch.contiguous_format)
    clip_singular_values_(_blocks(clipped), bound)
    return clipped


def within(x: Tensor, bound: float) -> Tensor:
    r"""Whether the largest singular value is at most ``bound``, to rounding, for each matrix of a batch.

    Args:
        x: ``(..., p, n)``, wide or tall, float32 or float64. An entry that is not finite is not within.
        bound: from 1e-12 to 1e12.

    Returns:
        ``(...)`` of bool.

    Raises:
        ValueError: not such matrices, or not such a bound.

    >>> import torch
    >>> from manifold_opt.linalg.singular_values import within
    >>> within(torch.eye(3).repeat(2, 1, 1) * torch.tensor([0.5, 1.1]).view(2, 1, 1), 1.0)
    tensor([ True, False])
    """
    _check("within", x, bound)
    blocks, inside = _blocks(x.detach()), []
    for part in _chunks(blocks):
        small, plain = _sizes(part, bound)
        inside.append(small | (plain & _definite(_gap(part, bound, plain))))
    return torch.cat([*inside, blocks.new_empty(0, dtype=torch.bool)]).view(x.shape[:-2])


def clip_singular_values_(x: Tensor, bound: float) -> Tensor:
    """:func:`clip_singular_values` in place, of wide blocks ``(B, p, n)``; those inside are not written to.

    A block is computed where it lies in the batch, and what becomes of it depends on its own entries alone. Where the
    host may not look at them (products.py), every block is computed and nothing is waited for.
    """
    for part in _chunks(x):
        if host_can_branch(x):
            _clip_read(part, bound)
        else:
            _clip_blind(part, bound)
    return x


def _check(name: str, x: Tensor, bound: float) -> None:
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: needs real matrices (..., p, n) of float32 or float64, got {tuple(x.shape)} of {x.dtype}. "
            "Convert half precision with .float() first."
        )
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not SMALLEST <= bound <= LARGEST:
        raise ValueError(
            f"{name}: bound must be a number from {SMALLEST:g} to {LARGEST:g}, got {bound!r}. It is the largest "
            "singular value allowed; 1.0 makes a layer 1-Lipschitz."
        )


def _blocks(x: Tensor) -> Tensor:
    """Matrices ``(..., p, n)`` as wide ones ``(B, p, n)``."""
    return (x.mT if is_tall(x) else x).unsqueeze(0).flatten(0, -3)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """A few blocks at a time, always the same ones: their places decide how they are rounded, not their values."""
    entries = _CHUNK if x.device.type == "cpu" else _CHUNK_ELSEWHERE
    return x.split(max(1, entries // x.shape[-2] ** 2)) if x.numel() else ()  # type: ignore[no-untyped-call]


def slack(x: Tensor) -> float:
    """How far above the bound, relatively, counts as at it: what may be left of matrices that have been clipped.

    Twice the rounding that was measured for p up to 512, n up to 20000, 1 to 30 machine epsilons; and what iterations
    resolve, where they are what is used.
    """
    p, n = x.shape[-2:]
    rounding = (16 + 4 * p**0.5 + n**0.5 / 4) * torch.finfo(x.dtype).eps
    return rounding if host_can_branch(x) else rounding + 4 * _RESOLUTION[x.dtype]


def _sizes(x: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Which blocks are inside by their Frobenius norm; which others a Gram matrix can decide, ``(B,)`` each.

    Neither: blocks that are far outside, or not finite.
    """
    size = norm(x)
    small = size <= bound
    # Above that, the largest singular value is more than twice the bound.
    return small, ~small & (size <= _FAR * bound * x.shape[-2] ** 0.5)


def _gap(x: Tensor, bound: float, plain: Tensor) -> Tensor:
    r""":math:`(1+\epsilon)^2 I - X X^\top / b^2`, the identity where not ``plain``: definite where X is inside."""
    gap = gram(x).mul_(-1 / bound**2)
    gap.diagonal(dim1=-2, dim2=-1).add_((1 + slack(x)) ** 2)
    if not (host_can_branch(x) and bool(plain.all())):
        gap.masked_fill_(~plain[:, None, None], 0)
        gap.diagonal(dim1=-2, dim2=-1).masked_fill_(~plain[:, None], 1)
    return gap


def _definite(gap: Tensor) -> Tensor:
    """Whether a symmetric matrix is positive definite, ``(B,)``: its Cholesky factorization says so."""
    return torch.linalg.cholesky_ex(gap).info == 0


def _clip_read(x: Tensor, bound: float) -> None:
    """Clip the blocks that need it, which the host finds out."""
    small, plain = _sizes(x, bound)
    if bool(small.all()):
        return
    gap = _gap(x, bound, plain)
    outside, far = plain & ~_definite(gap), ~small & ~plain
    if bool(outside.any()):
        values, vectors = torch.linalg.eigh(gap)
        del gap
        squares = (1 + slack(x)) ** 2 - values  # (s / b)^2, the largest first
        far |= outside & (squares[:, 0] > _FAR**2)
        factors = torch.where(squares > 1, squares.rsqrt() - 1, 0)
        _correct(x, factors, vectors, outside & ~far)
    for i in far.nonzero()[:, 0].tolist():
        if bool(x[i].isfinite().all()):
            x[i] = _clip_exactly(x[i], bound)


def _correct(x: Tensor, factors: Tensor, vectors: Tensor, outside: Tensor) -> None:
    r"""Add :math:`U F U^\top X` to the blocks that are outside, some columns at a time."""
    p = x.shape[-2]
    count = int((factors[0] < 0).sum()) if len(x) == 1 else p
    thin = 2 * count < p
    right = vectors[..., :count].mT
    left = vectors[..., :count] * factors[:, None, :count]
    left = left if thin else left @ right
    for columns in x.split(max(-(-p // 4), _CHUNK // (p * len(x))), -1):  # type: ignore[no-untyped-call]
        added = torch.baddbmm(columns, left, right @ columns if thin else columns)
        columns.copy_(torch.where(outside[:, None, None], added, columns))


def _clip_exactly(x: Tensor, bound: float) -> Tensor:
    """One finite matrix from however far, by its singular value decomposition."""
    exact = float64(x)
    scale = exact.abs().amax()
    u, s, vh = torch.linalg.svd(exact / scale, full_matrices=False)
    return ((u * (s * scale).clamp_max(bound)) @ vh).to(x)


def _clip_blind(x: Tensor, bound: float) -> None:
    r"""Clip without looking at a value: by products and a Cholesky factorization, of all blocks.

    With :math:`D = X X^\top / b^2 - I`, its positive part is :math:`D_+ = (D + D \operatorname{sign} D)/2`, and
    the clipped block :math:`(I + D_+)^{-1/2} X`. A block with a singular value above 8 times the bound is first
    scaled down to that, all of it, so that the number of iterations is known.
    """
    small, plain = _sizes(x, bound)
    inside = small | (plain & _definite(_gap(x, bound, plain)))
    largest = x.abs().amax((-2, -1))
    outside = (~inside & largest.isfinite())[:, None, None]
    share = _REACH / largest.clamp_min(_REACH * bound)
    square = gram(_scaled(x, share, outside))
    reach = norm(square @ square).sqrt()  # at least the norm of the Gram matrix, at most p^(1/4) times it
    shrink = (_REACH**2 / reach).clamp_max(1)
    square.mul_(shrink[:, None, None])
    reach = reach.clamp(1, _REACH**2)
    root = _inverse_root(_raised(square, reach), reach)
    clipped = root @ _scaled(x, share * shrink.sqrt() * bound, outside)
    x.copy_(torch.where(outside, clipped, x))


def _scaled(x: Tensor, factors: Tensor, where: Tensor) -> Tensor:
    return torch.where(where, x * factors[:, None, None], 0)


def _raised(square: Tensor, reach: Tensor) -> Tensor:
    r""":math:`I + D_+ = \max(G, I)` for :math:`G = I + D` positive semidefinite, eigenvalues up to ``reach``.

    The sign of D by scaled Newton-Schulz steps. They resolve eigenvalues of D down to a small fraction of its norm;
    of smaller ones it is the factor that is off, not the size. G is overwritten.
    """
    square.diagonal(dim1=-2, dim2=-1).sub_(1)
    sign = square / (_CUSHION * (reach - 1).clamp_min(1))[:, None, None]
    for a, b in _SIGN_STEPS[square.dtype]:
        sign = torch.baddbmm(sign, sign @ sign, sign, beta=a, alpha=-b)
    raised = torch.baddbmm(square, square, sign, beta=0.5, alpha=0.5)
    raised.diagonal(dim1=-2, dim2=-1).add_(1)
    return sym(raised)


def _inverse_root(y: Tensor, reach: Tensor) -> Tensor:
    r""":math:`Y^{-1/2}` for symmetric Y with eigenvalues from 1 to ``reach``, ``(B,)``, at most 64.

    Coupled Newton-Schulz steps, scaled as in polar_factor.py. Reference: Higham (2008), equation 6.35.
    """
    z = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand_as(y)
    lower, upper = torch.ones_like(reach), _CUSHION * reach.sqrt()
    for _ in range(_ROOT_STEPS):
        scale = (3 / (lower**2 + lower * upper + upper**2)).sqrt()
        low = scale * lower
        lower, upper = low * (3 - low**2) / 2, torch.ones_like(reach)
        half = (z @ y).mul_(-0.5 * scale[:, None, None] ** 3)
        half.diagonal(dim1=-2, dim2=-1).add_(1.5 * scale[:, None])
        y = y @ half
        z = half @ z
    return z


def _sign_steps(dtype: torch.dtype) -> list[tuple[float, float]]:
    """Coefficients a, b of steps S <- a S - b S^3 that take eigenvalues in [resolution, 1] to 1 within rounding.

    Each is the one of polar_factor.py for an interval a little longer than the eigenvalues', while they are far from
    1: there, rounding at the upper end would turn a sign.
    """
    steps, low = [], _RESOLUTION[dtype]
    while 1 - low > torch.finfo(dtype).eps:
        upper = _CUSHION if low < 0.5 else 1.0
        scale = math.sqrt(3 / (low**2 + low * upper + upper**2))
        steps.append((1.5 * scale, scale**3 / 2))
        low = scale * low * (3 - (scale * low) ** 2) / 2
    return steps


_SIGN_STEPS = {dtype: _sign_steps(dtype) for dtype in _RESOLUTION}
_ROOT_STEPS = 6  # from singular values 8 times apart: 1e-9 is left
