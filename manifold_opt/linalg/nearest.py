r"""The nearest orthogonal matrix, from the eigenvalues of the Gram matrix or by SVD."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .matrices import check_whole, error_at_rounding, float64, is_tall
from .newton_schulz import newton_schulz
from .precision import working_dtype
from .products import gram, gram_minus_identity, norm

_REMEDY = "Initialize it first, for example with manifold_opt.init.orthogonal_."


@torch.no_grad()
def nearest_orthogonal(x: Tensor, *, det: int | None = None) -> Tensor:
    r"""Return the nearest matrix with orthonormal rows or columns in Frobenius norm, for each matrix of a batch.

    This is the polar factor: with :math:`X = U S V^\mathsf{H}` it is :math:`U V^\mathsf{H}`. It is computed in float64
    from the eigenvalues of the Gram matrix or, for a condition above about :math:`10^5` (float32: :math:`10^6`), by
    SVD. Marking uses it, and a step only for a weight that other code has written to. The nearest matrix of a given
    determinant is :math:`U D V^\top`. Here D is the identity or, if that gives the other determinant, has -1 in the
    direction of the smallest singular value.

    A matrix has full rank if its smallest singular value is above ``max(p, n) * eps`` times its largest, with the eps
    of float64 for every dtype of ``x``. A square weight of 2048 rows has a condition of :math:`10^4` and more, so
    float32 or bfloat16 could not tell it from a singular one.

    Args:
        x: ``(..., p, n)``, wide or tall, real or complex, of full rank; with ``det`` real and square.
        det: 1 for the nearest rotation, in SO(n), and -1 for the nearest in the other component of O(n).

    Returns:
        Same shape and dtype. No gradient flows through it.

    Raises:
        ValueError: a matrix has non-finite values or no full rank. With ``det``, the nearest matrix is not unique: the
            determinant of ``x`` has the other sign, and its smallest singular value occurs more than once, as in an
            orthogonal matrix. ``det`` is other than 1 or -1, or is given for matrices that are complex or not square.
            For a batch the message gives the index.

    Reference: Higham (2008), *Functions of Matrices*, theorem 8.4; Kabsch (1976) and Umeyama (1991) for ``det``.

    >>> import torch
    >>> from manifold_opt import nearest_orthogonal
    >>> nearest_orthogonal(torch.tensor([[3.0, 0.0], [0.0, -0.1]]))
    tensor([[ 1.,  0.],
            [ 0., -1.]])
    >>> nearest_orthogonal(torch.tensor([[3.0, 0.0], [0.0, -0.1]]), det=1)
    tensor([[1., 0.],
            [0., 1.]])
    >>> nearest_orthogonal(torch.tensor([[3.0j]]))
    tensor([[0.+1.j]])
    """
    _check_matrices(x, det)
    if x.numel() == 0:
        return x.clone()
    matrices = float64(x)
    if det is None:
        w = _polar_factor(x, matrices)
    else:
        u, s, vh = torch.linalg.svd(matrices, full_matrices=False)
        w = _with_determinant(det, x, u, s, vh) @ vh
    # In float64 a product of two rounded factors is 2 to 6 times as far off as one Newton-Schulz step leaves it.
    return (newton_schulz(w) if w.dtype == x.dtype else w).to(x)


def _polar_factor(x: Tensor, matrices: Tensor) -> Tensor:
    """Return the polar factors of ``x``, which is ``matrices`` in double precision."""
    eps = torch.finfo(working_dtype(x.dtype)).eps
    w, certain = _polar_factor_of_gram(matrices.mT if is_tall(x) else matrices, eps)
    w = w.mT if is_tall(x) else w
    if not bool(certain.all()):
        u, s, vh = torch.linalg.svd(matrices[~certain], full_matrices=False)
        _check_full_rank(x, s, ~certain)
        w[~certain] = u @ vh
    return w


def _polar_factor_of_gram(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    r"""Return the polar factors of wide ``x`` from its Gram matrix, and a mask of those that are as exact as by SVD.

    Let :math:`X X^\top + E = V \Sigma^2 V^\top`, where E is rounding. The rows of :math:`Y = \Sigma^{-1} V^\top X` are
    orthonormal except for :math:`F = Y Y^\top - I`, which grows with the square of the condition. The rounding of Y
    grows with the condition only, as that of an SVD does, and F is computed from Y. To first order in F, the polar
    factor is

    .. math:: V (I - C) Y, \qquad C_{ij} = \frac{\sigma_j}{\sigma_i + \sigma_j} F_{ij}.

    This is a Newton-Schulz step with weights, which also separates the directions that E has mixed. An error of order
    :math:`\|F\|^2` remains. A factor is accepted if that is below ``eps``, or below the rounding of float64 times the
    condition. If the condition shows that F is below ``eps``, F is not computed.

    Reference: Higham (2008), *Functions of Matrices*, section 6.1, for the derivative of the square root.
    """
    squares, v = torch.linalg.eigh(gram(x).nan_to_num(0, 0, 0))  # overflow: a zero on the diagonal, so no full rank
    rounding = max(x.shape[-2:]) * torch.finfo(x.dtype).eps
    smallest, largest = squares[..., 0], squares[..., -1]
    if bool((rounding * largest < eps * smallest).all()):
        return (v * squares.rsqrt().unsqueeze(-2)) @ v.mH @ x, smallest > 0
    sigma = squares.sqrt().unsqueeze(-1)
    y = v.mH @ x / sigma
    f = gram_minus_identity(y)
    c = f * (sigma.mT / (sigma + sigma.mT))
    allowed = eps + torch.finfo(x.dtype).eps * (largest / smallest).sqrt()
    return (v - v @ c) @ y, (smallest > rounding * largest) & (norm(f).square() <= allowed)


def _check_matrices(x: Tensor, det: int | None) -> None:
    """Raise a ValueError unless ``x`` is finite matrices of a dtype and shape that :func:`nearest_orthogonal` takes."""
    check_whole("nearest_orthogonal", x)
    if x.ndim < 2 or not (x.is_floating_point() or x.is_complex()):
        raise ValueError(
            "nearest_orthogonal: needs floating-point matrices (..., p, n), real or complex, got "
            f"{tuple(x.shape)} of {x.dtype}."
        )
    if det is not None:
        check_determinant("nearest_orthogonal", det, x)
    if bool(x.sum().isfinite()):  # one pass shows that all entries are
        return
    bad = _first(~x.isfinite().flatten(-2).all(-1))
    if bad is not None:
        raise ValueError(f"nearest_orthogonal: {_matrix(x, bad)} has entries that are not finite. {_REMEDY}")


def _check_full_rank(x: Tensor, s: Tensor, mask: Tensor) -> None:
    """Raise a ValueError if a matrix of ``x[mask]``, with singular values ``s``, has no full rank."""
    deficient = s[..., -1] <= _rank_tolerance(s, x)
    if bool(deficient.any()):
        bad = tuple(mask.nonzero()[deficient][0].tolist())
        largest, smallest = float(s[deficient][0, 0]), abs(float(s[deficient][0, -1]))
        raise ValueError(
            f"nearest_orthogonal: {_matrix(x, bad)} is rank-deficient (smallest singular value {smallest:.1e}, "
            f"condition {largest / smallest if smallest else math.inf:.1e}), so the nearest orthogonal matrix is "
            f"not unique. {_REMEDY}"
        )


def _rank_tolerance(s: Tensor, x: Tensor) -> Tensor:
    """Return the largest singular value of ``x`` that an SVD in float64 cannot tell from zero, ``(...)``."""
    return max(x.shape[-2:]) * torch.finfo(s.dtype).eps * s[..., 0]


def _first(bad: Tensor) -> tuple[int, ...] | None:
    """Return the index of the first True of ``bad``, or None if there is none."""
    return tuple(bad.nonzero()[0].tolist()) if bool(bad.any()) else None


def _matrix(x: Tensor, index: tuple[int, ...]) -> str:
    """Return what a message calls a matrix of ``x``: its index in the batch, if there is a batch, and its shape."""
    shape, alone = f"of shape {tuple(x.shape[-2:])}", not any(length > 1 for length in x.shape[:-2])
    return f"the matrix {shape}" if alone else f"matrix {', '.join(map(str, index))} of the batch, {shape},"


def _with_determinant(det: int, x: Tensor, u: Tensor, s: Tensor, vh: Tensor) -> Tensor:
    """Return ``u`` with its last column negated if needed, so that ``u @ vh`` has determinant ``det``.

    The result is unique unless the two smallest singular values, the last one with that sign, add up to zero (Umeyama
    1991). The singular values of an orthogonal matrix differ by rounding only, which must not decide: that raises too.
    """
    sign = det * determinant(u @ vh)
    if u.shape[-1] > 1:
        spread = torch.linalg.vector_norm((s / s.mean(-1, keepdim=True)).square() - 1, dim=-1)
        orthogonal = spread <= error_at_rounding(x.shape[-2], x.shape[-1], x.dtype)
        double = s[..., -2] + sign * s[..., -1] <= _rank_tolerance(s, x)
        bad = _first(double | (orthogonal & (sign < 0)))
        if bad is not None:
            raise ValueError(
                f"nearest_orthogonal: the nearest matrix of determinant {det} is not unique: {_matrix(x, bad)} has the "
                "other determinant and a smallest singular value that is double, like an orthogonal matrix, or lacks "
                "two of full rank. Negate a row first, or initialize it with "
                f"manifold_opt.init.orthogonal_(..., det={det})."
            )
    return torch.cat([u[..., :-1], u[..., -1:] * sign[..., None, None]], -1)


def determinant(w: Tensor) -> Tensor:
    """Return the determinant of orthogonal matrices, 1 or -1: ``(...)``."""
    # One matrix at a time: batched LU is wrong on some CPUs. Not det: the product of the pivots can underflow, to 0 in
    # float32 from some 500 rows on.
    signs = [torch.linalg.slogdet(matrix).sign for matrix in w.reshape(-1, *w.shape[-2:])]
    return torch.stack(signs).view(w.shape[:-2]) if signs else w.new_ones(w.shape[:-2])


def check_determinant(name: str, det: int, x: Tensor) -> None:
    """Raise a ValueError unless matrices like those of ``x`` can have the determinant ``det``, 1 or -1."""
    if isinstance(det, bool) or det not in (1, -1):
        raise ValueError(f"{name}: det must be 1, for rotations, -1 or None, got {det!r}.")
    if x.is_complex() or x.shape[-2] != x.shape[-1]:
        raise ValueError(
            f"{name}: det={det} needs real square matrices, got {tuple(x.shape[-2:])} of {x.dtype}: those of other "
            "shapes have no determinant, and unitary ones any on the unit circle. Leave det out."
        )
