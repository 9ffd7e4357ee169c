"""Hadamard matrices, by the constructions of Sylvester and Paley."""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from ..linalg.nearest import determinant

_PAIR = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64, device="cpu")


def random_hadamard(
    n: int,
    *,
    generator: Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    r"""Return a random rotation whose entries all have the magnitude :math:`1/\sqrt n`.

    It is a Hadamard matrix divided by :math:`\sqrt n`. Each row is multiplied by a random sign. The signs are
    chosen such that the determinant is +1.

    Args:
        n: number of rows: a power of 2, times 1, 12, 20, 28 or another order of Paley's constructions. The widths
            of most transformers are such numbers.
        generator: source of random numbers, of the CPU.
        dtype: dtype of the result.
        device: device of the result.

    Returns:
        An orthogonal matrix, ``(n, n)``.

    Raises:
        ValueError: none of the constructions has this order.

    Reference: Paley (1933), *On orthogonal matrices*; for quantization, arXiv 2307.13304 (QuIP).

    >>> from manifold_opt.rotations import random_hadamard
    >>> rotation = random_hadamard(12)
    >>> bool((rotation @ rotation.T - torch.eye(12)).norm() < 1e-6)
    True
    >>> rotation.abs().unique().tolist() == [rotation.abs().max().item()]
    True
    """
    matrix = _hadamard(n)
    if matrix is None:
        raise ValueError(
            f"random_hadamard: there is no construction of order {n} here. Orders are 1, 2, and powers of 2 times 12, "
            '20, 28 and others of the form q + 1 or 2 (q + 1) with a prime q. Start from "haar" or "identity" instead, '
            "or use several blocks of a smaller size."
        )
    signs = 2.0 * torch.randint(2, (n,), generator=generator, device="cpu").double() - 1
    matrix = matrix * signs[:, None] / math.sqrt(n)
    matrix[-1] *= determinant(matrix[None])[0]
    return matrix.to(device=device, dtype=dtype)


def _hadamard(n: int) -> Tensor | None:
    """Return a Hadamard matrix of order n in float64, None if there is no construction of it here."""
    if n in (1, 2):
        return _PAIR[:n, :n].clone()
    if n < 1 or n % 4:
        return None
    half = _hadamard(n // 2)
    if half is not None:
        return torch.kron(_PAIR, half)
    if _is_prime(n - 1):
        return _paley(n - 1)
    return _paley_twice(n // 2 - 1) if _is_prime(n // 2 - 1) and n % 8 == 4 else None


def _paley(q: int) -> Tensor:
    r"""Return :math:`I + S` of order q + 1 for a prime :math:`q \equiv 3 \pmod 4`, S skew, of Jacobsthal's matrix."""
    matrix = torch.eye(q + 1, dtype=torch.float64, device="cpu")
    matrix[0, 1:], matrix[1:, 0] = 1, -1
    matrix[1:, 1:] += _jacobsthal(q)
    return matrix


def _paley_twice(q: int) -> Tensor:
    r"""Return :math:`C \otimes A + I \otimes B` of order 2 (q + 1) for a prime :math:`q \equiv 1 \pmod 4`.

    C is Paley's symmetric conference matrix of order q + 1, A = [[1, 1], [1, -1]] and B = [[1, -1], [-1, -1]].
    """
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64, device="cpu")
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = _jacobsthal(q)
    other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64, device="cpu")
    identity = torch.eye(q + 1, dtype=torch.float64, device="cpu")
    return torch.kron(conference, _PAIR) + torch.kron(identity, other)


def _jacobsthal(q: int) -> Tensor:
    """Return the matrix with entry (i, j) the Legendre symbol of i - j modulo the prime q."""
    number = torch.arange(q, device="cpu")
    symbol = torch.full((q,), -1.0, dtype=torch.float64, device="cpu")
    symbol[number**2 % q] = 1
    symbol[0] = 0
    return symbol[(number[:, None] - number) % q]


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % divisor for divisor in range(2, math.isqrt(n) + 1))
