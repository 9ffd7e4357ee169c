"""Matrix products of a batch ``(B, p, n)``, and the question whether Python may read a value.

Matrices are real or complex; a Gram matrix is with the conjugate transpose, norms are real.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .matrices import in_double

READ_ON_CPU = True  # tests set it to False, and every step then runs as it does on an accelerator
_SPLIT_ROWS = 384  # from which on half of a Gram matrix is worth a second pass over it: 0.62 to 0.80 of the time
_LONG_COLUMNS, _FEW_ROWS = 8192, 128  # of matrices whose Gram matrix is a sum of so many terms that its rounding shows
_PIECE = 1024  # columns that are summed in the dtype of the matrix
_SLABS = 4  # that it is cut into: (1 + 1/4) / 2 of the work is left


def host_can_branch(x: Tensor) -> bool:
    """Return True if Python may read values of ``x`` and branch on them.

    That is free on the CPU. It stalls an accelerator, and breaks a graph that is being traced.
    """
    return READ_ON_CPU and x.is_cpu and not torch.compiler.is_compiling()


def real_view(x: Tensor) -> Tensor:
    """Return a real tensor as it is, of a complex one a view ``(2, ...)`` of the real and the imaginary parts."""
    return torch.view_as_real(x).movedim(-1, 0) if x.dtype.is_complex else x


def norm(x: Tensor, *, keepdim: bool = False) -> Tensor:
    """Return the Frobenius norm of every matrix, ``(B,)`` or ``(B, 1, 1)``."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=keepdim)


def largest_norm(x: Tensor) -> float:
    """Return the largest Frobenius norm of a batch, NaN if one is: the host reads it."""
    if x.shape[0] == 1:
        return float(torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x, dim=(-2, -1)).max())


def matmul(a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0) -> Tensor:
    """Write ``alpha * a @ b`` to ``out`` and return it: 1 product."""
    return torch.bmm(a, b, out=out) if alpha == 1 else torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)


def matmul_add(x: Tensor, a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Write ``beta * x + alpha * a @ b`` to ``out``, which may be ``x``, and return it: 1 product."""
    return torch.baddbmm(x, a, b, beta=beta, alpha=alpha, out=out)


def gram(x: Tensor, *, out: Tensor | None = None, adjoint: Tensor | None = None) -> Tensor:
    """Return ``x @ x.mH`` of wide ``x``, ``(..., p, n)``, in ``out`` if given: 1 product, 5/8 from 384 rows on.

    ``adjoint`` is ``x.mH``, if there is such a view already.
    """
    if out is None:
        p = x.shape[-2]
        batch = x.reshape(-1, *x.shape[-2:])
        return gram(batch, out=batch.new_empty(len(batch), p, p)).view(*x.shape[:-2], p, p)
    if x.shape[-1] >= _LONG_COLUMNS and x.shape[-2] <= _FEW_ROWS:
        return _gram_of_long(x, out)
    if x.shape[-2] < _SPLIT_ROWS or not host_can_branch(x):
        return torch.bmm(x, x.mH if adjoint is None else adjoint, out=out)
    for rows, before, upto in _slabs(x.shape[-2]):
        torch.bmm(x[:, rows], x[:, upto].mH, out=out[:, rows, upto])
        out[:, before, rows] = out[:, rows, before].mH
    return out


def _gram_of_long(x: Tensor, out: Tensor) -> Tensor:
    """Write :func:`gram` to ``out``, by pieces of the columns whose Gram matrices are added up in float64."""
    dtype = x.dtype if x.device.type == "mps" else in_double(x.dtype)
    count = x.shape[-1] // _PIECE
    pieces, rest = x[..., : count * _PIECE].unflatten(-1, (count, _PIECE)), x[..., count * _PIECE :]  # type: ignore[no-untyped-call]
    for k in range(len(x)):  # of one matrix the pieces are a batch, a view
        some = pieces[k].movedim(1, 0)
        total = torch.bmm(some, some.mH).sum(0, dtype=dtype)
        out[k] = total.add_(rest[k] @ rest[k].mH)
    return out


def gram_minus_identity(x: Tensor, *, out: Tensor) -> Tensor:
    """Write ``x @ x.mH - I`` to ``out`` and return it: 1 product, 5/8 from 384 rows on."""
    gram(x, out=out).diagonal(dim1=-2, dim2=-1).sub_(1)
    return out


def _slabs(p: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield the rows of every slab, those before it, and those up to its end."""
    for i in range(_SLABS):
        start, stop = p * i // _SLABS, p * (i + 1) // _SLABS
        yield slice(start, stop), slice(0, start), slice(0, stop)
