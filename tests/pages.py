"""What the pages of the documentation show: code to run, files to write, commands to type.

A page is Markdown. Of its fenced blocks

- ``python`` is executed, ``pycon`` is a doctest, in order and in one namespace a page;
- ``python`` that begins with ``# name.py`` is written to that file of the working folder;
- ``bash`` is executed, and so are indented lines that call python or something of the checkout;
- ``text`` right below ``python`` or ``bash`` is what that prints, but for its numbers;
- ``text`` elsewhere, and whatever else, is to be read.

A comment ``<!-- requires: a, b -->`` names modules without which the page is skipped, ``<!-- setup: ... -->`` holds
Python to execute before what follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]

_PARTS = re.compile(
    r"^(?P<fence>```+)(?P<language>\{?\w*\}?)[^\n]*\n(?P<code>.*?)^(?P=fence)\s*$"
    r"|^<!-- setup:\s*?\n?(?P<setup>.*?)-->"
    r"|^    (?P<command>(?:python3? |\.venv/bin/|\.ci/)[^\n]*)$",
    re.M | re.S,
)
_FILE = re.compile(r"# ([\w/.]+\.py)\n")
_REQUIRES = re.compile(r"<!-- requires: ([^>]*?)\s*-->")
# Commands about the checkout: .ci/commands has them. Others are about the page, and run beside its files.
_CHECKOUT = re.compile(r"examples/|benchmarks/|manifold_opt compare|\.venv\b|\.ci/|pytest|pip install|docs/")


@dataclass(frozen=True)
class Block:
    """One of them.

    Attributes:
        kind: "python", "pycon", "file", "bash" or another language.
        text: the code, without its fences.
        line: of the page, where the code begins, from 1.
        file: the name, of a file.
    """

    kind: str
    text: str
    line: int
    file: str = ""

    def commands(self) -> list[str]:
        """Of a bash block: each on one line, without comments."""
        lines = self.text.replace("\\\n", " ").splitlines()
        bare = (re.sub(r"(^|\s+)#.*", "", line).strip() for line in lines)
        return [line for line in bare if line]


def blocks(page: Path) -> Iterator[Block]:
    """Every one, in order."""
    text = page.read_text(encoding="utf-8")
    for part in _PARTS.finditer(text):
        name = next(key for key in ("code", "setup", "command") if part[key] is not None)
        code, line = part[name], text.count("\n", 0, part.start(name)) + 1
        kind = {"code": part["language"], "setup": "python", "command": "bash"}[name]
        file = _FILE.match(code) if kind == "python" else None
        yield Block("file" if file else kind, code, line, file[1] if file else "")


def requires(page: Path) -> list[str]:
    """The modules it wants beside those of the tests."""
    found = _REQUIRES.search(page.read_text(encoding="utf-8"))
    return re.split(r"[,\s]+", found[1]) if found else []


def about_the_checkout(command: str) -> bool:
    """Whether it is typed in the root of the checkout, not beside the files of a page."""
    return bool(_CHECKOUT.search(command))
