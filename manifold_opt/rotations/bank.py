"""RotationBank: the rotations that the weights of a model share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Generator, Tensor, nn

from ..constraints.modules import mark_orthogonal
from ..init import orthogonal_
from ..linalg.nearest import determinant
from .hadamard import random_hadamard

STARTS = ("hadamard", "identity", "haar")
TOLERANCE = 1e-3  # of an entry of the Gram matrix: well above what bfloat16 leaves of a rotation


class RotationBank(nn.Module):
    r"""Named rotations, each shared by any number of weights, as orthogonal parameters.

    A rotation consists of one or several blocks on the diagonal. Each is marked as orthogonal and has the determinant
    +1, which the steps of this package's optimizers keep. ``bank(x, name)`` multiplies rows with it. The parameters
    keep their dtype when a model that contains the bank is cast to a narrower one, such as bfloat16, and autocast does
    not apply to the product.

    The bank works under DistributedDataParallel and FSDP2 as a part of the wrapped model. With FSDP2, do not call
    ``fully_shard`` on the bank. It then belongs to the root module, and is gathered once. Do not give the root a
    ``MixedPrecisionPolicy``: the rotations would have its dtype in the forward pass.

    Args:
        dtype: dtype of the parameters, float32 or float64.
        device: device of the parameters, by default the CPU, or that of a start that is a tensor.

    Raises:
        ValueError: another dtype.

    >>> import torch
    >>> from manifold_opt import Adam, orthogonality_error
    >>> from manifold_opt.rotations import RotationBank
    >>> bank = RotationBank()
    >>> _ = bank.add("residual", 16)
    >>> _ = bank.add("heads", 4, blocks=3, start="identity")
    >>> bank(torch.ones(5, 12), "heads").shape
    torch.Size([5, 12])
    >>> opt = Adam(bank.parameters(), lr=1e-2)
    >>> bank(torch.eye(16)[:2], "residual").amax().backward()
    >>> opt.step()
    >>> max(orthogonality_error(bank).values()) < 1e-5
    True
    """

    def __init__(self, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> None:
        super().__init__()
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"RotationBank: dtype must be torch.float32 or torch.float64, got {dtype}.")
        self._dtype, self._device = dtype, device
        self._blocks: dict[str, int] = {}

    def add(
        self,
        name: str,
        size: int,
        *,
        blocks: int = 1,
        start: str | Tensor = "hadamard",
        generator: Generator | None = None,
    ) -> nn.Parameter:
        r"""Add a rotation of ``blocks`` blocks of ``size`` rows each; return its parameter.

        Args:
            name: a new name, without a dot.
            size: rows of a block.
            blocks: number of blocks on the diagonal, such as one for each head.
            start: ``"hadamard"`` for random Hadamard matrices (:func:`random_hadamard`), ``"identity"``, ``"haar"`` for
                uniform rotations, or a tensor ``(blocks * size, size)`` of blocks in SO(size), to rounding.
            generator: source of random numbers.

        Returns:
            The parameter, ``(blocks * size, size)``, marked as orthogonal.

        Raises:
            ValueError: the name is in use or not valid, a number is below 1, the start is unknown, or a block of it is
                no rotation. The bank is unchanged then.
        """
        if not name.isidentifier() or hasattr(self, name):
            raise ValueError(
                f"RotationBank.add: the name {name!r} is in use or not valid. Names are Python identifiers, without a "
                f"dot, and no attribute of the bank; it has {', '.join(self.names) or 'no rotation yet'}."
            )
        if size < 1 or blocks < 1:
            raise ValueError(f"RotationBank.add: size and blocks must be at least 1, got {size} and {blocks}.")
        values = _start(start, size, blocks, generator)
        parameter = nn.Parameter(values.to(self._device, self._dtype, copy=isinstance(start, Tensor)))
        self.register_parameter(name, parameter)
        mark_orthogonal(self, name, blocks=blocks)
        self._blocks[name] = blocks
        return parameter

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the rotations, in the order in which they were added."""
        return tuple(self._blocks)

    def __getitem__(self, name: str) -> nn.Parameter:
        """Return the parameter of a rotation."""
        if name not in self._blocks:
            raise KeyError(f"There is no rotation {name!r}; the bank has {', '.join(self.names) or 'none'}.")
        parameter: nn.Parameter = getattr(self, name)
        return parameter

    def __contains__(self, name: str) -> bool:
        return name in self._blocks

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def repeats(self, name: str, width: int) -> int:
        """Return how many neighbouring pieces of a row of ``width`` entries each block multiplies.

        Raises:
            KeyError: the bank has no rotation of this name.
            ValueError: ``width`` is not a multiple of the rows of the rotation.
        """
        rows = len(self[name])
        if width < 1 or width % rows:
            raise ValueError(
                f"RotationBank: {name!r} has {self._blocks[name]} block(s) of {rows // self._blocks[name]} and cannot "
                f"turn rows of {width} entries. Their number must be a multiple of {rows}."
            )
        return width // rows

    def forward(self, x: Tensor, name: str) -> Tensor:
        r"""Return the rows of x times the rotation, :math:`x R`.

        A row of ``k * blocks * size`` entries has ``k * blocks`` pieces. Block i multiplies the pieces ``i * k`` to
        ``i * k + k - 1``: those of the query heads that share a head of keys and values.

        Args:
            x: ``(..., k * blocks * size)`` for a k of at least 1, of any floating dtype.
            name: name of the rotation.

        Returns:
            Same shape; in the wider one of the dtypes of ``x`` and of the rotation.

        Raises:
            ValueError: the last dimension of ``x`` does not fit.
        """
        repeats = self.repeats(name, x.shape[-1])
        rotation = self[name].unflatten(0, (self._blocks[name], -1))  # type: ignore[no-untyped-call]
        blocks, size, _ = rotation.shape
        dtype = torch.promote_types(x.dtype, rotation.dtype)
        rotation, pieces = rotation.to(dtype), x.to(dtype).reshape(*x.shape[:-1], blocks, repeats, size)
        with torch.autocast(x.device.type, enabled=False):  # the weight that is learned for is the one that is merged
            if blocks == 1:  # one product of all rows, which einsum would split into one for each row
                return (pieces.squeeze(-3) @ rotation[0]).flatten(-2)
            return torch.einsum("...bri,bij->...brj", pieces, rotation).flatten(-3)

    def check_orthogonal(self, caller: str) -> None:
        """Raise a ValueError if a rotation is not orthogonal any more."""
        for name, blocks in self._blocks.items():
            error = _error(self[name].unflatten(0, (blocks, -1)))  # type: ignore[no-untyped-call]
            if not error < TOLERANCE:
                raise ValueError(
                    f"{caller}: the rotation {name!r} is not orthogonal; its Gram matrix is off by {error:.1g}. Train "
                    "it with an optimizer of manifold_opt, since those of torch do not keep it orthogonal."
                )

    def extra_repr(self) -> str:
        """Return the name, the blocks and the rows of each rotation."""
        return "\n".join(f"{name}: {blocks} x SO({self[name].shape[-1]})" for name, blocks in self._blocks.items())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RotationBank:
        """Apply a function as ``to``, ``half`` and ``cuda`` do, but let no floating dtype become narrower."""

        def keep_precision(tensor: Tensor) -> Tensor:
            new: Any = fn(tensor)
            narrower = torch.finfo(new.dtype).bits < torch.finfo(tensor.dtype).bits
            return tensor.to(new.device) if narrower else new

        super()._apply(keep_precision, recurse)  # type: ignore[no-untyped-call]
        return self


def _start(start: str | Tensor, size: int, blocks: int, generator: Generator | None) -> Tensor:
    """Return the first value of a rotation, ``(blocks * size, size)``; raise a ValueError if it is none."""
    if isinstance(start, Tensor):
        return _checked(start, size, blocks)
    if start not in STARTS:
        raise ValueError(f"RotationBank.add: start must be one of {', '.join(STARTS)} or a tensor, got {start!r}.")
    if start == "hadamard":
        return torch.cat([random_hadamard(size, generator=generator, dtype=torch.float64) for _ in range(blocks)])
    empty = torch.empty(blocks * size, size, dtype=torch.float64, device="cpu")
    return orthogonal_(empty, blocks, scheme=start, det=1, generator=generator)


def _checked(start: Tensor, size: int, blocks: int) -> Tensor:
    """Return a given start in float64."""
    if start.shape != (blocks * size, size):
        raise ValueError(
            f"RotationBank.add: the start must have the shape {(blocks * size, size)}, got {tuple(start.shape)}."
        )
    values = start.detach().double()
    matrices = values.view(blocks, size, size)
    if not _error(matrices) < TOLERANCE or bool((determinant(matrices) < 0).any()):
        raise ValueError(
            "RotationBank.add: a block of the start is not orthogonal with determinant +1. Use "
            "nearest_orthogonal(block, det=1), or start='identity'."
        )
    return values


def _error(matrices: Tensor) -> float:
    r"""Return the largest entry of :math:`|R R^\top - I|` of a batch, in float64; NaN if there is one."""
    matrices = matrices.detach().double()
    gram = matrices @ matrices.mT
    return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().amax())
