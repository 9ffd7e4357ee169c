r"""The spectral-norm ball :math:`\{W : \sigma_{\max}(W) \le b\}`, as pure functions on batches ``(..., p, n)``.

The nearest point of the ball in the Frobenius norm keeps the singular vectors of :math:`X` and replaces every singular
value s by :math:`\min(s, b)`. With :math:`X X^\top = U S^2 U^\top` it is

.. math:: X + U_+ (b S_+^{-1} - I) U_+^\top X,

where the sum is over singular values above b only. The others need not be accurate, and X may be rank-deficient.

A block whose Frobenius norm is within the bound is inside. For every other block, a Cholesky factorization of
:math:`b^2 I - X X^\top` decides, or an estimate of the norm that is above the bound. Only blocks that are outside need
eigenvectors: a large one with few singular values near the bound by subspace iteration, the others by a whole
decomposition. If the largest value is more than twice the bound, a first pass clips values above 1.5 times the bound,
and a second one the rest, because the first Gram matrix holds them less accurately. Above eight times the bound, an
SVD in float64 clips all of them. The subspace iteration starts from fixed vectors, not from the last ones: these would
have to be in the state of the optimizer, or a resumed run would differ.

Reference: Higham (2008), *Functions of Matrices*, chapters 5 and 8; Parikh & Boyd (2014), *Proximal algorithms*,
section 6.7.3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .few_eigenpairs import smallest_eigenpairs
from .matrices import float64, is_tall, sym
from .products import gram, host_can_branch, norm
from .spectral_norm import is_positive_definite, margin_inside

MIN_BOUND, MAX_BOUND = 1e-12, 1e12  # the squares are far from underflow and overflow in float32
_FIRST_PASS_RATIO = 1.5  # of two passes: the first clips values above this multiple of the bound
_MAX_EIGH_RATIO = 2.0  # up to this multiple of the bound, eigenvalues of the Gram matrix are accurate to a few eps
_CHUNK = 2**16  # entries of Gram matrices at a time on the CPU, to fit the cache
_CHUNK_ELSEWHERE = 2**22  # on an accelerator, to fill it

_MAX_RATIO = 8.0  # largest singular value, as a multiple of the bound, for two passes and the sync-free iterations
_RESOLUTION = {torch.float32: 1e-6, torch.float64: 1e-8}  # of these iterations, relative to the norm
_SAFETY = 1.02


def clip_singular_values(x: Tensor, bound: float) -> Tensor:
    r"""Return the nearest matrix with singular values of at most ``bound``, for each matrix of a batch.

    It is :math:`U \min(S, b) V^\top` for :math:`X = U S V^\top`. Matrices that are inside up to rounding, or have
    non-finite entries, are returned bit for bit.

    Args:
        x: ``(..., p, n)``, wide or tall, float32 or float64.
        bound: b, from 1e-12 to 1e12.

    Returns:
        Same shape, a new tensor without a gradient.

    Raises:
        ValueError: ``x`` or ``bound`` is not as above.

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


def is_inside_ball(x: Tensor, bound: float) -> Tensor:
    r"""Return True if the largest singular value is at most ``bound``, up to rounding, for each matrix of a batch.

    Args:
        x: ``(..., p, n)``, wide or tall, float32 or float64. The result is False for non-finite entries.
        bound: from 1e-12 to 1e12.

    Returns:
        ``(...)`` of bool.

    Raises:
        ValueError: ``x`` or ``bound`` is not as above.

    >>> import torch
    >>> from manifold_opt.linalg.singular_values import is_inside_ball
    >>> is_inside_ball(torch.eye(3).repeat(2, 1, 1) * torch.tensor([0.5, 1.1]).view(2, 1, 1), 1.0)
    tensor([ True, False])
    """
    _check("is_inside_ball", x, bound)
    blocks, inside = _blocks(x.detach()), []
    for chunk in _chunks(blocks):
        _, small, plain = _classify(chunk, bound)
        inside.append(small | (plain & is_positive_definite(_bound_minus_gram(chunk, bound, plain))))
    return torch.cat([*inside, blocks.new_empty(0, dtype=torch.bool)]).view(x.shape[:-2])


def clip_singular_values_(x: Tensor, bound: float) -> Tensor:
    """Apply :func:`clip_singular_values` in place to wide blocks ``(B, p, n)``; blocks inside are not written to.

    The result for a block does not depend on the values of other blocks. Where values cannot be read (products.py), all
    blocks are computed without synchronization.
    """
    for chunk in _chunks(x):
        if host_can_branch(x):
            _clip_eager(chunk, bound)
        else:
            _clip_sync_free(chunk, bound)
    return x


def clip_and_measure_(x: Tensor, bound: float, *, expect_outside: bool = False) -> Tensor:
    r"""Apply :func:`clip_singular_values_`; return a lower bound of :math:`b - \sigma_{\max}` of each result, ``(B,)``.

    It is negative for clipped blocks, or 0 if one was so far outside that its Frobenius norm showed it. It is NaN for
    blocks with entries that are not finite. With ``expect_outside`` the result is the same, computed faster for blocks
    that are outside. Values must be readable.
    """
    chunks = [_clip_eager(chunk, bound, expect_outside=expect_outside) for chunk in _chunks(x)]
    return torch.cat(chunks or [x.new_zeros(len(x))])


def _check(name: str, x: Tensor, bound: float) -> None:
    if x.ndim < 2 or x.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name}: needs real matrices (..., p, n) of float32 or float64, got {tuple(x.shape)} of {x.dtype}. "
            "Convert half precision with .float() first."
        )
    if isinstance(bound, bool) or not isinstance(bound, (int, float)) or not MIN_BOUND <= bound <= MAX_BOUND:
        raise ValueError(
            f"{name}: bound must be a number from {MIN_BOUND:g} to {MAX_BOUND:g}, got {bound!r}. It is the largest "
            "singular value allowed; 1.0 makes a layer 1-Lipschitz."
        )


def _blocks(x: Tensor) -> Tensor:
    """Return matrices ``(..., p, n)`` as wide blocks ``(B, p, n)``."""
    return (x.mT if is_tall(x) else x).unsqueeze(0).flatten(0, -3)


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """Return chunks of the batch. They do not depend on values, so that rounding does not either."""
    entries = _CHUNK if x.device.type == "cpu" else _CHUNK_ELSEWHERE
    return x.split(max(1, entries // x.shape[-2] ** 2)) if x.numel() else ()  # type: ignore[no-untyped-call]


def tolerance(x: Tensor) -> float:
    """Return the relative excess over the bound that counts as rounding, also that of clipped matrices.

    It is twice the rounding error that was measured for p up to 512 and n up to 20000 (1 to 30 machine epsilons), plus
    the resolution of the sync-free iterations where they are used.
    """
    p, n = x.shape[-2:]
    rounding = (16 + 4 * p**0.5 + n**0.5 / 4) * torch.finfo(x.dtype).eps
    return rounding if host_can_branch(x) else rounding + 4 * _RESOLUTION[x.dtype]


def _classify(x: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return Frobenius norms, a mask of blocks where they are within the bound, and of those that need more.

    All are ``(B,)``. Blocks in neither mask are far outside or not finite.
    """
    size = norm(x)
    small = size <= bound
    # Beyond this, the largest singular value is more than _MAX_EIGH_RATIO times the bound.
    return size, small, ~small & (size <= _MAX_EIGH_RATIO * bound * x.shape[-2] ** 0.5)


def _bound_minus_gram(x: Tensor, bound: float, plain: Tensor) -> Tensor:
    r"""Return :math:`(1+\epsilon)^2 I - X X^\top / b^2`, which is positive definite if X is inside.

    The result is the identity for blocks outside the mask ``plain``.
    """
    gap = gram(x).mul_(-1 / bound**2)
    gap.diagonal(dim1=-2, dim2=-1).add_((1 + tolerance(x)) ** 2)
    if not (host_can_branch(x) and bool(plain.all())):
        gap.masked_fill_(~plain[:, None, None], 0)
        gap.diagonal(dim1=-2, dim2=-1).masked_fill_(~plain[:, None], 1)
    return gap


def _clip_eager(x: Tensor, bound: float, *, expect_outside: bool = False) -> Tensor:
    """Clip the blocks that are outside, in place, and return what :func:`clip_and_measure_` returns."""
    size, small, plain = _classify(x, bound)
    slack = (bound - size).clamp_min_(0).masked_fill_(~size.isfinite(), torch.nan)
    if bool(small.all()):
        return slack
    gap = _bound_minus_gram(x, bound, plain)
    pairs = _eigenpairs(gap, tolerance(x)) if expect_outside and bool(plain.all()) else None
    # If every gap has an eigenvalue well below zero, margin_inside would find that all blocks are outside.
    if pairs is not None and bool((pairs[0][:, 0] < -tolerance(x)).all()):
        margin = torch.full_like(size, -1)
    else:
        margin = margin_inside(gap, tolerance(x))
    outside, far, twice = plain & (margin < 0), ~small & ~plain, torch.zeros_like(small)
    if bool(outside.any()):
        values, vectors = pairs or _eigenpairs(gap, tolerance(x))
        del gap
        squares = (1 + tolerance(x)) ** 2 - values  # (s / b)^2, in descending order
        far |= outside & (squares[:, 0] > _MAX_RATIO**2)
        twice = outside & ~far & (squares[:, 0] > _MAX_EIGH_RATIO**2)
        # In the Gram matrix of such a block, values near the bound are inaccurate. Only those well above it are clipped
        # now, so that the next pass has no value near _MAX_EIGH_RATIO.
        clipped = squares > torch.where(twice, _FIRST_PASS_RATIO**2, 1.0)[:, None]
        if bool((outside & ~far).any()):
            _shrink_(x, torch.where(clipped, squares.rsqrt() - 1, 0), vectors, outside & ~far)
    for i in far.nonzero()[:, 0].tolist():
        if bool(x[i].isfinite().all()):
            x[i] = _clip_exactly(x[i], bound)
    if bool(twice.any()):
        _clip_eager(x, bound, expect_outside=True)  # the other blocks are inside, and keep their bits
    return torch.where(plain, bound * margin, slack)


def _eigenpairs(gap: Tensor, rounding: float) -> tuple[Tensor, Tensor]:
    """Return eigenvalues of ``gap`` in ascending order, at least those to be clipped, and their vectors."""
    return smallest_eigenpairs(gap, rounding) or torch.linalg.eigh(gap)


def _shrink_(x: Tensor, factors: Tensor, vectors: Tensor, outside: Tensor) -> None:
    r"""Add :math:`U F U^\top X` to the blocks in the mask ``outside``, some columns at a time to save memory."""
    p = x.shape[-2]
    count = int((factors[0] < 0).sum()) if len(x) == 1 else p
    thin = 2 * count < p
    right = vectors[..., :count].mT
    left = vectors[..., :count] * factors[:, None, :count]
    left = left if thin else left @ right
    if thin and len(x) == 1:
        x.baddbmm_(left, right @ x)
        return
    for columns in x.split(max(-(-p // 4), _CHUNK // (p * len(x))), -1):  # type: ignore[no-untyped-call]
        added = torch.baddbmm(columns, left, right @ columns if thin else columns)
        columns.copy_(torch.where(outside[:, None, None], added, columns))


def _clip_exactly(x: Tensor, bound: float) -> Tensor:
    """Clip one finite matrix at any distance by a singular value decomposition in float64."""
    exact = float64(x)
    scale = exact.abs().amax()
    u, s, vh = torch.linalg.svd(exact / scale, full_matrices=False)
    return ((u * (s * scale).clamp_max(bound)) @ vh).to(x)


def _clip_sync_free(x: Tensor, bound: float) -> None:
    r"""Clip all blocks in place without reading a value, by products and a Cholesky factorization.

    With :math:`D = X X^\top / b^2 - I`, its positive part is :math:`D_+ = (D + D \operatorname{sign} D)/2`, and
    the clipped block :math:`(I + D_+)^{-1/2} X`. A block with a singular value above 8 times the bound is first
    scaled down as a whole, so that the number of iterations is fixed.
    """
    _, small, plain = _classify(x, bound)
    inside = small | (plain & is_positive_definite(_bound_minus_gram(x, bound, plain)))
    largest = x.abs().amax((-2, -1))
    outside = (~inside & largest.isfinite())[:, None, None]
    scale = _MAX_RATIO / largest.clamp_min(_MAX_RATIO * bound)
    square = gram(_scaled(x, scale, outside))
    upper = norm(square @ square).sqrt()  # between the spectral norm of the Gram matrix and p^(1/4) times it
    shrink = (_MAX_RATIO**2 / upper).clamp_max(1)
    square.mul_(shrink[:, None, None])
    upper = upper.clamp(1, _MAX_RATIO**2)
    root = _inverse_root(_max_with_identity(square, upper), upper)
    clipped = root @ _scaled(x, scale * shrink.sqrt() * bound, outside)
    x.copy_(torch.where(outside, clipped, x))


def _scaled(x: Tensor, factors: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x * factors[:, None, None], 0)


def _max_with_identity(square: Tensor, upper: Tensor) -> Tensor:
    r"""Return :math:`I + D_+ = \max(G, I)` for positive semidefinite :math:`G = I + D` with eigenvalues <= ``upper``.

    The sign of D is computed by scaled Newton-Schulz steps. They resolve eigenvalues of D down to a small fraction of
    its norm; the sign of smaller ones is wrong, but these hardly change the result. G is overwritten.
    """
    square.diagonal(dim1=-2, dim2=-1).sub_(1)
    sign = square / (_SAFETY * (upper - 1).clamp_min(1))[:, None, None]
    for a, b in _SIGN_STEPS[square.dtype]:
        sign = torch.baddbmm(sign, sign @ sign, sign, beta=a, alpha=-b)
    result = torch.baddbmm(square, square, sign, beta=0.5, alpha=0.5)
    result.diagonal(dim1=-2, dim2=-1).add_(1)
    return sym(result)


def _inverse_root(y: Tensor, upper: Tensor) -> Tensor:
    r"""Return :math:`Y^{-1/2}` for symmetric Y with eigenvalues from 1 to ``upper``, ``(B,)``, at most 64.

    Coupled Newton-Schulz steps are scaled as in polar_factor.py. Reference: Higham (2008), equation 6.35.
    """
    z = torch.eye(y.shape[-1], dtype=y.dtype, device=y.device).expand_as(y)
    low, high = torch.ones_like(upper), _SAFETY * upper.sqrt()
    for _ in range(_ROOT_STEPS):
        scale = (3 / (low**2 + low * high + high**2)).sqrt()
        scaled = scale * low
        low, high = scaled * (3 - scaled**2) / 2, torch.ones_like(upper)
        half = (z @ y).mul_(-0.5 * scale[:, None, None] ** 3)
        half.diagonal(dim1=-2, dim2=-1).add_(1.5 * scale[:, None])
        y = y @ half
        z = half @ z
    return z


def _sign_steps(dtype: torch.dtype) -> list[tuple[float, float]]:
    """Return coefficients a, b of steps S <- a S - b S^3 that take eigenvalues in [resolution, 1] to 1 up to rounding.

    Each step has the scale of polar_factor.py. While eigenvalues are far from 1, the scale is for a slightly longer
    interval, because rounding errors at the upper end could change a sign.
    """
    steps, low = [], _RESOLUTION[dtype]
    while 1 - low > torch.finfo(dtype).eps:
        upper = _SAFETY if low < 0.5 else 1.0
        scale = math.sqrt(3 / (low**2 + low * upper + upper**2))
        steps.append((1.5 * scale, scale**3 / 2))
        low = scale * low * (3 - (scale * low) ** 2) / 2
    return steps


_SIGN_STEPS = {dtype: _sign_steps(dtype) for dtype in _RESOLUTION}
_ROOT_STEPS = 6  # an error of 1e-9 remains for singular values up to 8 times the bound
