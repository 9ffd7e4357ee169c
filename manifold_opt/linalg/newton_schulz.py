r"""The iteration :math:`X \leftarrow (1+\beta) X - \beta X X^\top X` and what is built on it.

Singular vectors stay; every singular value moves by :math:`s \mapsto (1+\beta)s - \beta s^3`. With
:math:`e = s^2 - 1`,

.. math:: e' = (1 - 2\beta)\,e + (\beta^2 - 2\beta)\,e^2 + \beta^2 e^3,

so small :math:`\beta` approaches orthogonality linearly, and :math:`\beta = 1/2`, the Newton-Schulz step,
quadratically. Three methods use this iteration:

- a tangent step, then one step at :math:`\beta = 1/2`: POGO (Javaloy & Vergari, PMLR 306, 2026);
- the Riemannian field plus a small multiple of :math:`(I - X X^\top) X`: Landing (Ablin & Peyre, 2022);
- steps at :math:`\beta = 1/2` on a matrix whose singular values are known to lie in an interval: the
  polar factor without a factorization (Higham 2008, *Functions of Matrices*, chapter 8).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .matrices import check_whole, error_at_rounding, float64, wide
from .products import gram, norm

_ROW_SUM_MIN_ROWS = 32  # for fewer rows, row sums cost more than they save
_REMEDY = "Initialize it first, for example with manifold_opt.init.orthogonal_."


@wide
def newton_schulz(x: Tensor, *, beta: float = 0.5, steps: int = 1) -> Tensor:
    r"""Return ``x`` after ``steps`` iterations of :math:`X \leftarrow (1+\beta) X - \beta X X^\top X`.

    It is computed as :math:`X + \beta (I - X X^\top) X`: rounding in the second product is scaled by the remaining
    error, so only the Gram matrix has to be precise.

    Args:
        x: ``(..., p, n)``, wide or tall, singular values below :func:`convergence_radius`.
        beta: rate, in (0, 1).
        steps: number of iterations.
    """
    for _ in range(steps):
        x = x + beta * (_identity(x) - gram(x)) @ x
    return x


def convergence_radius(beta: float) -> float:
    r"""Return :math:`\sqrt{(1+\beta)/\beta}`: smaller singular values stay positive under :func:`newton_schulz`."""
    return ((1 + beta) / beta) ** 0.5


@torch.no_grad()
def nearest_orthogonal(x: Tensor, *, det: int | None = None) -> Tensor:
    r"""Return the nearest matrix with orthonormal rows or columns in Frobenius norm, for each matrix of a batch.

    This is the polar factor: with :math:`X = U S V^\mathsf{H}` it is :math:`U V^\mathsf{H}`, by SVD in float64. Marking
    uses it; a step of an optimizer does not. The nearest matrix of a given determinant is :math:`U D V^\top`. Here D is
    the identity or, if that gives the other determinant, has -1 in the direction of the smallest singular value.

    A matrix has full rank if its smallest singular value is above ``max(p, n) * eps`` times its largest, with the eps
    of float64 for every dtype of ``x``. A square weight of 2048 rows has a condition of :math:`10^4` and more, so
    float32 or bfloat16 could not tell it from a singular one.

    Args:
        x: ``(..., p, n)``, wide or tall, real or complex, of full rank; with ``det`` real and square.
        det: 1 for the nearest rotation, in SO(n), and -1 for the nearest in the other component of O(n).

    Returns:
        Same shape and dtype. No gradient flows through it.

    Raises:
        ValueError: values that are not finite, or rank-deficient; with ``det``, a matrix of the other determinant
            whose smallest singular value is double, or that is orthogonal already, so that the nearest is not unique;
            ``det`` other than 1 or -1, or where it has no meaning. For a batch the message gives the index.

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
    u, s, vh = torch.linalg.svd(float64(x), full_matrices=False)
    if det is None:
        _check_full_rank(x, s)
    else:
        u = _with_determinant(det, x, u, s, vh)
    # The product of two rounded factors is 2 to 6 times as far off as one Newton-Schulz step leaves it.
    return newton_schulz(u @ vh).to(x)


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
    bad = _first(~x.isfinite().flatten(-2).all(-1))
    if bad is not None:
        raise ValueError(f"nearest_orthogonal: {_matrix(x, bad)} has entries that are not finite. {_REMEDY}")


def _check_full_rank(x: Tensor, s: Tensor) -> None:
    """Raise a ValueError if a matrix of ``x``, with singular values ``s``, has no full rank."""
    bad = _first(s[..., -1] <= _rank_tolerance(s, x))
    if bad is not None:
        largest, smallest = float(s[bad][0]), abs(float(s[bad][-1]))
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
    # One matrix at a time: batched LU is wrong on some CPUs.
    signs = [torch.linalg.det(matrix).sign() for matrix in w.reshape(-1, *w.shape[-2:])]
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


def spectral_bound(a: Tensor, out: Tensor | None = None) -> Tensor:
    """Return an upper bound on the spectral norm of symmetric or Hermitian ``a``, ``(...)``.

    It is the Frobenius norm or, if that is smaller, the largest row sum of magnitudes (for 32 rows or more). The
    magnitudes are written to ``out`` if given; without it they are computed for a few rows at a time.
    """
    frobenius = norm(a)
    if a.shape[-1] < _ROW_SUM_MIN_ROWS:
        return frobenius
    if out is not None:
        sums = torch.abs(a, out=out.real).sum(-1)
    else:
        sums = torch.cat([rows.abs().sum(-1) for rows in a.split(a.shape[-1] // 4, -2)], -1)  # type: ignore[no-untyped-call]
    return torch.minimum(frobenius, sums.amax(-1))


def _identity(x: Tensor) -> Tensor:
    return torch.eye(x.shape[-2], dtype=x.dtype, device=x.device)
