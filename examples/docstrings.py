"""A small classification task without a download: which module of the standard library is this docstring from?

The texts are read from the source files; nothing is imported. Another Python version has slightly different ones.
"""

from __future__ import annotations

import ast
import random
import re
import sysconfig
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# Modules with many docstrings that every Python from 3.10 on has, and where their source is.
MODULES = {name: name for name in ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest")}
MODULES |= {"decimal": "_pydecimal.py", "mailbox": "mailbox.py", "xml": "xml"}
PARTS = ("train",) * 5 + ("validation",) * 2 + ("test",) * 3


@dataclass
class Texts:
    """Tokens of docstrings, and the number of the module that each is from."""

    tokens: Mapping[str, Tensor]
    labels: Tensor

    def batch(self, index: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Return some of them, padded to the longest."""
        length = int(self.tokens["attention_mask"][index].sum(1).max())
        return {name: value[index, :length] for name, value in self.tokens.items()}, self.labels[index]


def docstrings() -> dict[str, tuple[str, int]]:
    """Return each text with the name of its function or class, and the number of its module.

    The names of the ten modules are removed from all texts. Texts that occur in two modules, and texts of fewer than
    four words, are left out.
    """
    library, names = Path(sysconfig.get_path("stdlib")), re.compile("|".join(MODULES), re.IGNORECASE)
    found: dict[str, tuple[str, int]] = {}
    ambiguous = {""}
    for label, source in enumerate(MODULES.values()):
        for path in sorted((library / source).rglob("*.py")) or [library / source]:
            if "test" in path.relative_to(library).parts:  # which not every Python has there
                continue
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                    text = " ".join(names.sub("", ast.get_docstring(node) or "").split())
                    if found.setdefault(text, (node.name, label))[1] != label:
                        ambiguous.add(text)
    return {text: found[text] for text in found if text not in ambiguous and len(text.split()) > 3}


def split(tokenizer: Callable[..., Mapping[str, Tensor]], length: int, most: int | None) -> dict[str, Texts]:
    """Return texts for training, validation and test, at most ``most`` each, cut off after ``length`` tokens.

    The part is chosen by the name of the function, so that all functions named ``close`` are in the same part.
    """
    texts: dict[str, list[tuple[str, int]]] = {part: [] for part in PARTS}
    for text, (name, label) in docstrings().items():
        texts[PARTS[zlib.crc32(name.encode()) % len(PARTS)]].append((text, label))
    parts = {}
    for part, found in texts.items():
        words, labels = zip(*random.Random(0).sample(found, min(most or len(found), len(found))), strict=True)
        tokens = tokenizer(list(words), padding=True, truncation=True, max_length=length, return_tensors="pt")
        parts[part] = Texts(dict(tokens), torch.tensor(labels))
    return parts
