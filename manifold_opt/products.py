"""Matrix products of a batch: nearly all of a step's time is spent here, and nowhere else is a product chosen.

On a CPU a few large matrices are multiplied one by one, each with every thread, instead of as a batch with a
thread a matrix; of a Gram matrix only one triangle is computed, the other mirrored; and where tiny matrices lie
*across*, entry (i, j) of all of them side by side, a product is a few element-wise ones of vectors as long as the
batch.

Matrices are real or complex; the Gram matrix is with the conjugate transpose, norms are real.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_LONE = 128  # rows from which on a matrix is large enough for all threads
_FEW = 16  # matrices of a batch up to which that pays
_SPLIT = 384  # rows from which on half of a Gram matrix is worth a second pass over it
_SLABS = 4  # row slabs it is cut into: (1 + 1/4) / 2 of the work is left


READ_ON_CPU = True  # tests set it to False, and every step then runs as it does on an accelerator


def host_can_branch(x: Tensor) -> bool:
    """Return True if Python may read values of ``x`` and branch on them.

    That is free on the CPU. It stalls an accelerator, and breaks a graph that is being traced.
    """
    return READ_ON_CPU and x.is_cpu and not torch.compiler.is_compiling()


def across(x: Tensor) -> bool:
    """Whether the matrices of a batch lie across one another, ``(B, p, n)`` with strides (1, n B, B)."""
    return x.stride(0) == 1 and x.shape[0] > 1 and x.numel() > x.shape[0]


def components(x: Tensor) -> Tensor:
    """A real tensor as it is, of a complex one the real and the imaginary parts, a view ``(2, ...)``."""
    return torch.view_as_real(x).movedim(-1, 0) if x.is_complex() else x


def norm(x: Tensor, *, keepdim: bool = False) -> Tensor:
    """Frobenius norm of every matrix, ``(B,)`` or ``(B, 1, 1)``."""
    if x.ndim == 3 and across(x):
        return (x * x.conj()).real.sum((-2, -1), keepdim=keepdim).sqrt_()
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=keepdim)


def matmul(a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0) -> Tensor:
    """``alpha * a @ b`` for batches ``(B, ., .)``, written to ``out``: 1 product."""
    if across(out):
        torch.mul(a[..., :1], b[:, :1], out=out)
        for k in range(1, a.shape[-1]):
            out.addcmul_(a[..., k : k + 1], b[:, k : k + 1])
        return out if alpha == 1 else out.mul_(alpha)
    if _one_by_one(a):
        for a_i, b_i, out_i in zip(a.unbind(), b.unbind(), out.unbind(), strict=True):
            torch.addmm(out_i, a_i, b_i, beta=0, alpha=alpha, out=out_i)
        return out
    return torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)


def matmul_add(x: Tensor, a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """``beta * x + alpha * a @ b``, written to ``out``, which may be ``x``: 1 product."""
    if across(out):
        torch.mul(x, beta, out=out)
        for k in range(a.shape[-1]):
            out.addcmul_(a[..., k : k + 1], b[:, k : k + 1], value=alpha)
        return out
    if _one_by_one(a):
        for x_i, a_i, b_i, out_i in zip(x.unbind(), a.unbind(), b.unbind(), out.unbind(), strict=True):
            torch.addmm(x_i, a_i, b_i, beta=beta, alpha=alpha, out=out_i)
        return out
    return torch.baddbmm(x, a, b, beta=beta, alpha=alpha, out=out)


def gram(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """``x @ x.mH`` for wide ``x``, ``(..., p, n)``, written to ``out`` if given: 1 product, 5/8 where split."""
    p = x.shape[-2]
    if out is None:
        batch = x.reshape(-1, *x.shape[-2:])
        return gram(batch, out=batch.new_empty(len(batch), p, p)).view(*x.shape[:-2], p, p)
    if not host_can_branch(x) or p < _SPLIT:
        return matmul(x, x.mH, out=out)
    for rows, before, upto in _slabs(p):
        torch.bmm(x[:, rows], x[:, upto].mH, out=out[:, rows, upto])
        out[:, before, rows] = out[:, rows, before].mH
    return out


def add_gram_(out: Tensor, x: Tensor, *, alpha: float) -> Tensor:
    """``out + alpha * x @ x.mH`` in place, for batches ``(B, p, n)``: 1 product, 5/8 where split."""
    if not host_can_branch(x) or x.shape[-2] < _SPLIT:
        return matmul_add(out, x, x.mH, out=out, alpha=alpha)
    for rows, before, upto in _slabs(x.shape[-2]):
        slab = torch.bmm(x[:, rows], x[:, upto].mH)
        out[:, rows, upto].add_(slab, alpha=alpha)
        out[:, before, rows].add_(slab[..., before].mH, alpha=alpha)
    return out


def _slabs(p: int) -> Iterator[tuple[slice, slice, slice]]:
    """Rows of a slab, those before it, and those up to its end."""
    for i in range(_SLABS):
        start, stop = p * i // _SLABS, p * (i + 1) // _SLABS
        yield slice(start, stop), slice(0, start), slice(0, stop)


def transpose(a: Tensor, *, out: Tensor) -> Tensor:
    """``a.mT`` for square ``a``, written to ``out``: torch walks a lone matrix in tiles, a batch across the grain."""
    if _one_by_one(a):
        for a_i, out_i in zip(a.unbind(), out.unbind(), strict=True):
            out_i.copy_(a_i.mT)
        return out
    return out.copy_(a.mT)


def adjoint(a: Tensor, *, out: Tensor) -> Tensor:
    """``a.mH`` for square ``a``, written to ``out``."""
    return transpose(a.conj(), out=out)


def _one_by_one(a: Tensor) -> bool:
    return len(a) == 1 or (host_can_branch(a) and len(a) <= _FEW and a.shape[-2] >= _LONE)
