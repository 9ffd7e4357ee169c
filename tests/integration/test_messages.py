"""docs/how-to/messages.md explains every warning of the package, and no message that the package lacks."""

import ast
import re
from pathlib import Path

import manifold_opt

PACKAGE = Path(manifold_opt.__file__).parent
PAGE = PACKAGE.parent / "docs" / "how-to" / "messages.md"
TREES = [ast.parse(file.read_text()) for file in PACKAGE.rglob("*.py")]


def text_of(node: ast.AST) -> str | None:
    """A string of the source, with ``...`` for every value; None for other nodes."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
    return None


def rows() -> list[str]:
    """The messages in the first columns of the page's tables, one per code span."""
    tables = PAGE.read_text().partition("## Warnings")[2].splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1] for line in tables if line.startswith("| `")]
    return [span.replace("\\|", "|") for cell in cells for span in re.findall(r"`([^`]+)`", cell)]


def is_of(row: str, message: str) -> bool:
    pattern = ".*".join(re.escape(piece) for piece in row.rstrip(". ").split("..."))
    return re.search(pattern, message, re.S) is not None


def test_every_row_is_a_message():
    strings = [text for tree in TREES for node in ast.walk(tree) if (text := text_of(node))]
    texts = [text for text in strings if "\n" not in text]  # no docstrings
    assert len(rows()) > 80
    assert [row for row in rows() if not any(is_of(row, text) for text in texts)] == []


def test_every_warning_is_on_the_page():
    calls = [node for tree in TREES for node in ast.walk(tree) if isinstance(node, ast.Call)]
    warned = [text_of(call.args[0]) for call in calls if ast.unparse(call.func) == "warnings.warn"]
    assert [text for text in warned if text and not any(is_of(row, text) for row in rows())] == []


def test_nothing_is_said_to_come_from_an_index_that_does_not_have_it():
    root = PACKAGE.parent
    places = (PACKAGE, *(root / name for name in ("benchmarks", "docs", "examples", "tests", ".ci")))
    files = [*root.glob("*.md"), *(f for place in places for end in ("py", "md") for f in place.rglob(f"*.{end}"))]
    assert len(files) > 200
    for file in files:
        assert not re.search(
            r"""pip install (-\S+ )*["']?manifold[-_]opt(\[\w+\])?(["'` ]|$)(?!@)""", file.read_text("utf-8"), re.M
        ), file
