"""Matrix products of batches ``(B, p, n)``, real or complex, and the buffers that they are written to.

Gram matrices use the conjugate transpose. Two functions tell how the products of a step may be computed: whether Python
may read values, and whether float32 is multiplied in full float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .matrices import in_double

READ_ON_CPU = True  # tests set it to False to run steps on the CPU as on an accelerator
_SPLIT_MIN_ROWS = 384  # above, computing half of a Gram matrix and copying the rest takes 0.62 to 0.80 of the time
_LONG_MIN_COLUMNS, _LONG_MAX_ROWS = 8192, 128  # Gram matrices of such sizes are summed in float64 to limit rounding
_CHUNK_COLUMNS = 1024  # columns that are summed in the dtype of the matrix
SQUARE, WIDE = "abcdef", "uxyz"  # names of buffers (B, p, p) and (B, p, n)
_SLABS = 4  # row slabs of a Gram matrix: (1 + 1/4) / 2 of the work remains


def host_can_branch(x: Tensor) -> bool:
    """Return True if Python may read values of ``x`` and branch on them.

    Reading is free on the CPU. It synchronizes with an accelerator, and breaks a graph that is being traced.
    """
    return READ_ON_CPU and x.is_cpu and not torch.compiler.is_compiling()


def is_full_precision(device_types: set[str]) -> bool:
    """Return True if the current settings run float32 matmuls in full float32 on all these device types."""
    for device_type in device_types:
        if device_type != "meta" and torch.is_autocast_enabled(device_type):
            return False
    return global_precision() == "highest"


def global_precision() -> str | None:
    """Return the global matmul precision; None if torch raises because backends have different settings."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def real_view(x: Tensor) -> Tensor:
    """Return a real tensor unchanged, and for a complex one a view ``(2, ...)`` of its real and imaginary parts."""
    return torch.view_as_real(x).movedim(-1, 0) if x.dtype.is_complex else x


def norm(x: Tensor, *, keepdim: bool = False) -> Tensor:
    """Return the Frobenius norm of every matrix, ``(B,)`` or ``(B, 1, 1)``."""
    return torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=keepdim)


def largest_norm(x: Tensor) -> float:
    """Return the largest Frobenius norm of a batch of matrices, NaN if any is NaN. Synchronizes with the device.

    For points of other shapes, this is the norm of the whole batch, which is larger.
    """
    if x.shape[0] == 1 or x.ndim != 3:
        return float(torch.linalg.vector_norm(x))
    return float(torch.linalg.vector_norm(x, dim=(-2, -1)).max())


def matmul(a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0) -> Tensor:
    """Write ``alpha * a @ b`` to ``out`` and return it. Cost: 1 product."""
    return torch.bmm(a, b, out=out) if alpha == 1 else torch.baddbmm(out, a, b, beta=0, alpha=alpha, out=out)


def matmul_add(x: Tensor, a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """Write ``beta * x + alpha * a @ b`` to ``out``, which may be ``x``, and return it. Cost: 1 product."""
    return torch.baddbmm(x, a, b, beta=beta, alpha=alpha, out=out)


def symmetric_matmul_add(
    x: Tensor, a: Tensor, b: Tensor, *, out: Tensor, alpha: float = 1.0, beta: float = 1.0, sign: int = 1
) -> Tensor:
    """Return :func:`matmul_add` where the result is known to be symmetric, or skew if ``sign`` is -1.

    Cost: 1 product, 5/8 from 384 rows on. ``out`` is none of the others.
    """
    if x.shape[-2] < _SPLIT_MIN_ROWS or not host_can_branch(x):
        return torch.baddbmm(x, a, b, beta=beta, alpha=alpha, out=out)
    for rows, before, upto in _slabs(x.shape[-2]):
        torch.baddbmm(x[:, rows, upto], a[:, rows], b[:, :, upto], beta=beta, alpha=alpha, out=out[:, rows, upto])
        out[:, before, rows] = out[:, rows, before].mH if sign > 0 else -out[:, rows, before].mH
    return out


def gram(x: Tensor, *, out: Tensor | None = None, adjoint: Tensor | None = None) -> Tensor:
    """Return ``x @ x.mH`` for wide ``x``, ``(..., p, n)``. Cost: 1 product, 5/8 from 384 rows on.

    The result is written to ``out`` if given. ``adjoint`` is an existing view ``x.mH``.
    """
    if out is None:
        p = x.shape[-2]
        batch = x.reshape(-1, *x.shape[-2:])
        return gram(batch, out=batch.new_empty(len(batch), p, p)).view(*x.shape[:-2], p, p)
    if x.shape[-1] >= _LONG_MIN_COLUMNS and x.shape[-2] <= _LONG_MAX_ROWS:
        return _gram_of_long(x, out)
    if x.shape[-2] < _SPLIT_MIN_ROWS or not host_can_branch(x):
        return torch.bmm(x, x.mH if adjoint is None else adjoint, out=out)
    for rows, before, upto in _slabs(x.shape[-2]):
        torch.bmm(x[:, rows], x[:, upto].mH, out=out[:, rows, upto])
        out[:, before, rows] = out[:, rows, before].mH
    return out


def _gram_of_long(x: Tensor, out: Tensor) -> Tensor:
    """Write :func:`gram` to ``out``, summing the Gram matrices of chunks of columns in float64."""
    dtype = x.dtype if x.device.type == "mps" else in_double(x.dtype)
    count = x.shape[-1] // _CHUNK_COLUMNS
    whole, rest = x[..., : count * _CHUNK_COLUMNS], x[..., count * _CHUNK_COLUMNS :]
    chunks = whole.unflatten(-1, (count, _CHUNK_COLUMNS))  # type: ignore[no-untyped-call]
    for k in range(len(x)):  # the chunks of one matrix are a batch, without a copy
        batch = chunks[k].movedim(1, 0)
        total = torch.bmm(batch, batch.mH).sum(0, dtype=dtype)
        out[k] = total.add_(rest[k] @ rest[k].mH)
    return out


def gram_minus_identity(x: Tensor, *, out: Tensor | None = None) -> Tensor:
    """Return ``x @ x.mH - I``, written to ``out`` if given. Cost: 1 product, 5/8 from 384 rows on."""
    result = gram(x, out=out)
    result.diagonal(dim1=-2, dim2=-1).sub_(1)
    return result


def _slabs(p: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield for every slab the slices of its rows, of the rows before it, and of both."""
    for i in range(_SLABS):
        start, stop = p * i // _SLABS, p * (i + 1) // _SLABS
        yield slice(start, stop), slice(0, start), slice(0, stop)


class Pool:
    """Memory of the workspaces of one optimizer: one flat buffer per name, dtype and device, shared by all of them.

    >>> import torch
    >>> from manifold_opt.linalg.products import Pool, Workspace
    >>> pool = Pool()
    >>> first, second = (Workspace(pool, torch.zeros(count, 2, 3)) for count in (4, 2))
    >>> first.x.shape, second.x.shape, second.a.shape
    (torch.Size([4, 2, 3]), torch.Size([2, 2, 3]), torch.Size([2, 2, 2]))
    >>> first.x.data_ptr() == second.x.data_ptr()  # the same memory
    True
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        self._size: dict[tuple[bool, torch.dtype, torch.device], int] = {}

    def reserve(self, like: Tensor, square: int, wide: int) -> None:
        """Set a minimum size, in entries, for buffers that are allocated later: square ones and wide ones."""
        for is_square, size in ((True, square), (False, wide)):
            key = (is_square, like.dtype, like.device)
            self._size[key] = max(size, self._size.get(key, 0))

    def take(self, name: str, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """Return the buffer ``name`` as a tensor of this shape, with the dtype and device of ``like``."""
        size, key = 1, (name, like.dtype, like.device)
        for length in shape:
            size *= length
        flat = self._flat.get(key)
        if flat is None or flat.numel() < size:
            reserved = self._size.get((name in SQUARE, like.dtype, like.device), 0)
            flat = self._flat[key] = torch.empty(max(size, reserved), dtype=like.dtype, device=like.device)
        return flat[:size].view(shape)

    def nbytes(self) -> int:
        """Return the number of allocated bytes."""
        return sum(flat.nbytes for flat in self._flat.values())


class Workspace:
    """Buffers for a batch of wide matrices ``(B, p, n)`` or of other points, each allocated on first use.

    Attributes:
        a, b, c, d, e, f: ``(B, p, p)``, for matrices.
        u, x, y, z: ``(B, p, n)``, or the shape of the batch.
        readable: whether Python may read values of the batch.
        slack: how far each point may move before its manifold checks its value again; kept from one step to the
            next, and 0 after anything else has written to the points. Negative if the last step clipped all points
            (spectral_ball.py).
    """

    def __init__(self, pool: Pool | None, like: Tensor, shape: tuple[int, ...] | None = None) -> None:
        shape = tuple(like.shape) if shape is None else shape
        self.readable = host_can_branch(like)
        self.slack = 0.0
        self._pool, self._like = pool, like.new_empty(0)
        self._adjoints: dict[str, tuple[Tensor, Tensor]] = {}
        self._others: dict[int, Workspace] = {}
        self._zero: Tensor | None = None
        self._identity: Tensor | None = None
        self._square, self._wide = (*shape[:2], shape[1]) if len(shape) == 3 else (), shape
        if pool is not None:
            pool.reserve(like, math.prod(self._square), math.prod(shape))

    def __getattr__(self, name: str) -> Tensor:
        if len(name) != 1 or name not in SQUARE + WIDE:
            raise AttributeError(name)
        shape = self._square if name in SQUARE else self._wide
        pool = self._pool
        buffer = self._like.new_empty(shape) if pool is None else pool.take(name, shape, self._like)
        setattr(self, name, buffer)
        return buffer

    @property
    def zero(self) -> Tensor:
        """Return the number zero, with the dtype and device of the batch."""
        if self._zero is None:
            self._zero = self._like.new_zeros(())
        return self._zero

    @property
    def identity(self) -> Tensor:
        """Return the identity as a view ``(B, p, p)`` of one matrix."""
        if self._identity is None:
            one = torch.eye(self._wide[1], dtype=self._like.dtype, device=self._like.device)
            self._identity = one.expand(self._square)
        return self._identity

    def adjoint(self, name: str, x: Tensor) -> Tensor:
        """Return the view ``x.mH``, cached under ``name`` for as long as it is asked for the same tensor."""
        if name not in self._adjoints or self._adjoints[name][0] is not x:
            self._adjoints[name] = (x, x.mH)
        return self._adjoints[name][1]

    def of_size(self, n: int) -> Workspace:
        """Return a workspace for a batch ``(B, n, n)`` of as many matrices, in the same memory."""
        if n not in self._others:
            self._others[n] = Workspace(self._pool, self._like, (self._wide[0], n, n))
        return self._others[n]

    def make(self, names: str) -> None:
        """Allocate these buffers now, so that an out-of-memory error is raised before a step writes anything."""
        for name in names:
            getattr(self, name)
