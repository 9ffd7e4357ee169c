"""Text that every machine has: the source files of Python's standard library, as bytes, split by file.

Another Python version has slightly different files. Tests and installed packages are left out.
"""

from __future__ import annotations

import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Generator, Tensor

PARTS = ("train",) * 8 + ("validation", "test")
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib2to3"}


def source_text() -> dict[str, Tensor]:
    """Return the bytes of the files for training, validation and test, as three tensors of uint8.

    The path of a file decides on its part, so that no file is in two of them.
    """
    library = Path(sysconfig.get_path("stdlib"))
    parts: dict[str, list[bytes]] = {part: [] for part in PARTS}
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library)
        if not LEFT_OUT & set(name.parts):
            parts[PARTS[zlib.crc32(name.as_posix().encode()) % len(PARTS)]].append(path.read_bytes())
    return {part: torch.frombuffer(bytearray(b"\n".join(found)), dtype=torch.uint8) for part, found in parts.items()}


def draw(text: Tensor, count: int, length: int, generator: Generator) -> Tensor:
    """Return random passages, ``(count, length)`` of int64."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length)].long()


def passages(text: Tensor, count: int, length: int) -> Tensor:
    """Return passages at equal distances, ``(count, length)`` of int64, the same in every call."""
    starts = torch.linspace(0, len(text) - length, count).long()[:, None]
    return text[starts + torch.arange(length)].long()
