"""Documentation runs as it stands."""

import doctest
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", [page.name for page in sorted(DOCS.glob("*.md")) if ">>> " in page.read_text()])
def test_examples_run_in_order(page):
    if page == "constraints.md":
        pytest.importorskip("geoopt")
    failed, tried = doctest.testfile(str(DOCS / page), module_relative=False, verbose=False)
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("page", sorted(page.name for page in DOCS.glob("*.md")))
def test_tests_that_are_named_are_there(page):
    """Every ``test_file.py::test_name``, and every name after it in the same row."""
    tests = {path.name: path.read_text() for path in Path(__file__).parent.glob("test_*.py")}
    for file in re.findall(r"test_\w+\.py", (DOCS / page).read_text()):
        assert file in tests, file
    for name in re.findall(r"`(?:test_\w+\.py::)?(test_[a-z]\w+)`", (DOCS / page).read_text()):
        assert any(f"def {name}(" in text for text in tests.values()), name
