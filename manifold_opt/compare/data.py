"""Image data sets that need no download: scikit-learn's digits, and Debian's package of Fashion-MNIST."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

FASHION = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True)
class Images:
    """Images ``(count, rows, columns)`` from 0 to 1 with their classes, for training and test."""

    name: str
    title: str
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


INSTALL = 'pip install ".[compare]" in a clone of manifold_opt'  # the package is on no index


class MissingDataError(Exception):
    """Error for missing data; the message describes how to install them."""


def digits() -> Images:
    """Load the 1,797 handwritten digits of scikit-learn, 8 x 8; a quarter of them are test images."""
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped]
    except ModuleNotFoundError:
        raise MissingDataError(f"the digits need scikit-learn: {INSTALL}") from None
    found = load_digits()
    x = torch.tensor(found.images / 16, dtype=torch.float32)
    y = torch.tensor(found.target, dtype=torch.long)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    return Images("digits", "1,797 real handwritten digits, 8 x 8", (x[train], y[train]), (x[test], y[test]))


def fashion(folder: str | None = None) -> Images:
    """Load Fashion-MNIST, 28 x 28: 60,000 training and 10,000 test images."""
    directory = Path(folder) if folder else FASHION
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        x = _idx(directory, f"{prefix}-images-idx3-ubyte").float() / 255
        splits[split] = (x, _idx(directory, f"{prefix}-labels-idx1-ubyte").long())
    return Images("fashion", "Fashion-MNIST, 28 x 28", splits["train"], splits["test"])


def _idx(folder: Path, name: str) -> Tensor:
    """Read a byte array in IDX format: two zero bytes, type, number of dimensions, and each size in four bytes."""
    for path, read in ((folder / f"{name}.gz", gzip.open), (folder / name, open)):
        if path.is_file():
            try:
                with read(path, "rb") as file:
                    raw = bytearray(file.read())
            except (OSError, EOFError) as error:
                raise MissingDataError(f"Fashion-MNIST: cannot read {path} ({error}); get it anew") from None
            break
    else:
        raise MissingDataError(
            f"Fashion-MNIST: there is no {name}[.gz] in {folder}: apt install dataset-fashion-mnist, or give the "
            "folder that has its four files with --data"
        )
    dimensions = raw[3] if len(raw) > 3 else 0
    shape = [int.from_bytes(raw[4 + 4 * k : 8 + 4 * k], "big") for k in range(dimensions)]
    start = 4 + 4 * dimensions
    values = torch.frombuffer(raw, dtype=torch.uint8, offset=start) if len(raw) > start else torch.empty(0)
    if raw[:3] != b"\0\0\x08" or values.numel() != torch.Size(shape).numel():
        raise MissingDataError(f"Fashion-MNIST: {path} is no IDX file of bytes, or not whole; get it anew")
    return values.view(shape)
