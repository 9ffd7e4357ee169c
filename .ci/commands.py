"""Runs every command that README and docs/ show, small: a CI step, in a copy of the checkout with README's .venv.

What names a script of examples/ or benchmarks/ gets --toy, a comparison small sizes. Left out are what .ci/run runs
itself, what installs into the reader's environment, and slow tests. A script that no page shows is run all the same.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.pages import PAGES, about_the_checkout, blocks  # noqa: E402

LEFT_OUT = re.compile(r"\.ci/run|^pip install|-m pytest|bin/(mypy|codespell|sphinx-build .*)$")
SMALL = (  # what a command is about, and what it gets
    (re.compile(r"benchmarks/step\.py"), "--toy --threads 1 --budget 0.2"),
    (re.compile(r"benchmarks/(manifolds|copying)\.py"), "--toy --threads 1"),
    (re.compile(r"(examples|benchmarks)/[\w/]+\.py"), "--toy"),
    (re.compile(r"manifold_opt compare"), "--size 8 --steps 5 --seeds 1 --threads 1"),
)


def shown() -> Iterator[str]:
    """The commands of all pages that are about the checkout, as they stand."""
    for page in PAGES:
        for block in blocks(page):
            if block.kind == "bash":
                yield from filter(about_the_checkout, block.commands())


def small(command: str) -> str:
    """The same, in seconds; empty if there is nothing to run."""
    parts = []
    for part in command.split(" && "):
        if LEFT_OUT.search(part):
            return ""
        options = next((options for about, options in SMALL if about.search(part)), "")
        python = re.sub(r"^python3? (?!-m venv)", ".venv/bin/python ", part)
        parts.append(f"{python} {options}".strip())
    return " && ".join(parts)


def scripts() -> Iterator[str]:
    """Every script of examples/ and benchmarks/, the modules that they share left out."""
    for path in sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/**/*.py")]):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            yield str(path.relative_to(ROOT))


def words(command: str) -> frozenset[str]:
    """Return the words of a command without numbers, which make no difference at toy size."""
    return frozenset(word for word in command.split() if not re.fullmatch(r"[\d.e+-]+", word))


def to_run() -> list[str]:
    """Return each command once. One whose words, but for numbers, are all in another is left to that."""
    commands = {command: words(command) for command in filter(None, map(small, shown()))}
    for one in list(commands):
        if any(commands[one] <= found for other, found in commands.items() if other != one):
            del commands[one]
    forgotten = [name for name in scripts() if not any(f"{name} " in command for command in commands)]
    return [*commands, *(f".venv/bin/python {name} --toy" for name in forgotten)]


def run(command: str) -> None:
    """One of them; one that fails ends all, with what it said."""
    path = f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:  # of its own to write to: two run at a time
        done = subprocess.run(
            ["bash", "-c", command.replace("--out report", f"--out {folder}")],
            cwd=ROOT,
            env={**os.environ, "PATH": path},
            capture_output=True,
            text=True,
            check=False,
        )
    print(f"{time.perf_counter() - start:5.1f} s  {command}", flush=True)
    if done.returncode:
        sys.exit(f"{done.stdout[-5000:]}{done.stderr[-5000:]}\nexit status {done.returncode}: {command}")


def main() -> None:
    """Those that install something first, one by one; then the others, as many at a time as there are cores."""
    if (ROOT / ".git").exists() or not (ROOT / ".venv").exists():
        sys.exit("commands.py: needs a copy of the checkout that it may write to, with README's .venv; .ci/run has it.")
    commands, began = to_run(), time.perf_counter()
    installing = [command for command in commands if "pip install" in command]
    for command in installing:
        run(command)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(run, [command for command in commands if command not in installing]))
    print(f"{len(commands)} commands in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
