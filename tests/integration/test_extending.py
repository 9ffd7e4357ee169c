"""docs/extending.md, followed to the letter in a copy of the package."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```python\n# (?P<file>[\w/.]+)(?:, below: (?P<line>[^\n]*))?\n(?P<code>.*?)^```$", re.M | re.S)


@pytest.fixture(scope="module")
def extended(tmp_path_factory):
    """A copy of package and tests with every block of the page where it says."""
    root = tmp_path_factory.mktemp("extended")
    leave_out = shutil.ignore_patterns("__pycache__", "compare")
    for name in ("manifold_opt", "tests"):
        shutil.copytree(ROOT / name, root / name, ignore=leave_out)
    shutil.copy(ROOT / "pyproject.toml", root)
    text = (ROOT / "docs" / "extending.md").read_text()
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("```python")
    for block in blocks:
        file = root / block["file"]
        if block["line"] is None:
            assert not file.exists()
            file.parent.mkdir(exist_ok=True)
            file.write_text(block["code"])
            continue
        lines = file.read_text().splitlines(keepends=True)
        (place,) = (i for i, line in enumerate(lines) if line.strip().startswith(block["line"].strip()))
        while lines[place].count("(") > lines[place].count(")"):  # a call goes on
            place += 1
        file.write_text("".join([*lines[: place + 1], block["code"], *lines[place + 1 :]]))
    return root


def run(root, *arguments):
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow  # .ci/run runs it
def test_the_manifold_passes_the_tests_of_a_manifold(extended):
    files = [f"tests/manifolds/test_manifold{name}.py" for name in ("s", "_steps", "_faults", "_lifecycle")]
    chosen = "simplex or (resumed and amsgrad) or (compiled and amsgrad) or every_manifold"
    out = run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", chosen)
    assert int(re.search(r"(\d+) passed", out)[1]) > 20


@pytest.mark.slow  # .ci/run runs it
@pytest.mark.parametrize(("name", "begins"), [("sphere", "length 2.0000, 0.0855"), ("transitions", "tensor([[0.80")])
def test_an_example_runs(name, begins, extended):
    assert run(extended, f"examples/{name}.py").startswith(begins)


@pytest.mark.slow  # .ci/run runs it
def test_the_retraction_keeps_what_it_claims(extended):
    files = ["tests/stiefel/test_retractions.py", "tests/optim/test_faults.py"]
    out = run(extended, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", "taylor")
    assert int(re.search(r"(\d+) passed", out)[1]) > 40


def test_the_new_files_pass_ruff(extended):
    files = ("manifold_opt/manifolds/simplex.py", "manifold_opt/stiefel/taylor.py")
    run(extended, "-m", "ruff", "check", *files)
    run(extended, "-m", "ruff", "format", "--check", *files, "manifold_opt/stiefel/retractions.py", "examples")
