"""docs/how-to/when_it_goes_wrong.md lists every message of the package, and none that is not there."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import manifold_opt

PACKAGE = Path(manifold_opt.__file__).parent
PAGE = PACKAGE.parent / "docs" / "how-to" / "when_it_goes_wrong.md"


# Functions that return or yield what is wrong, beside those with "problem" in their names.
REPORTING = (
    "_lost",
    "_what_became_of",
    "_unwell",
    "_unwell_state",
    "_not_kept",
    "_sharing",
    "_pruned",
    "_far_warnings",
    "unfit",
)


def text_of(node: ast.AST) -> str:
    """A string of the source, with ``...`` in the place of what is put in; empty of anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
    if isinstance(node, ast.IfExp):
        return text_of(node.body)
    if isinstance(node, ast.List) and node.elts:
        return text_of(node.elts[0])
    return ""


def said_by(node: ast.AST, problems: bool) -> ast.AST | None:
    """The string that a statement raises, warns of or reports; what is returned too, in functions of problems."""
    if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and node.exc.args:
        return node.exc.args[0]
    if isinstance(node, ast.Call) and ast.unparse(node.func) in ("warnings.warn", "problems.append"):
        return node.args[0]
    if problems and isinstance(node, ast.Return | ast.Yield):
        return node.value
    return None


def messages() -> Iterator[str]:
    for file in sorted(PACKAGE.rglob("*.py")):
        if "compare" in file.relative_to(PACKAGE).parts:
            continue
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                problems = "problem" in function.name or function.name in REPORTING
                for node in ast.walk(function):
                    said = said_by(node, problems)
                    if said is not None and len(re.findall(r"[a-z]{2,}", text_of(said))) > 2:
                        yield text_of(said)


def rows() -> list[str]:
    """The messages of the tables, one a code span of a first column."""
    tables = PAGE.read_text().partition("## Warnings")[2].splitlines()
    cells = [re.split(r"(?<!\\)\|", line)[1] for line in tables if line.startswith("| `")]
    return [span.replace("\\|", "|") for cell in cells for span in re.findall(r"`([^`]+)`", cell)]


def is_of(row: str, message: str) -> bool:
    pattern = ".*".join(re.escape(piece) for piece in row.rstrip(". ").split("..."))
    return re.search(pattern, message, re.S) is not None


def test_every_message_is_on_the_page():
    known = rows()
    lacking = [message for message in messages() if not any(is_of(row, message) for row in known)]
    assert lacking == []


def test_every_row_is_a_message():
    said = list(messages())
    assert [row for row in rows() if not any(is_of(row, message) for message in said)] == []
    assert len(said) > 80
