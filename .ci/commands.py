"""Runs every command that README and docs/ show, small: a CI step, in a copy of the checkout with README's .venv.

What names a script of examples/ or benchmarks/ gets --toy, a comparison small sizes, the slow tests are only collected.
Left out is what .ci/run has run itself. A script that no page shows is run all the same.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from tests.pages import PAGES, about_the_checkout, blocks  # noqa: E402

SMALL = "--size 8 --steps 5 --seeds 1 --threads 1"
LEFT_OUT = re.compile(r"\.ci/run|-m pytest$|bin/mypy$")


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
        if re.search(r"(examples|benchmarks)/\w+\.py", part):
            part += " --toy"
        elif "manifold_opt compare" in part:
            part += f" {SMALL}"
        elif "pytest" in part:
            part += " --collect-only -q -n 0"
        parts.append(re.sub(r"^python3? (?!-m venv)", ".venv/bin/python ", part))
    return " && ".join(parts)


def scripts() -> Iterator[str]:
    """Every script of examples/ and benchmarks/, the modules that they share left out."""
    for path in sorted([*ROOT.glob("examples/*.py"), *ROOT.glob("benchmarks/*.py")]):
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8"):
            yield str(path.relative_to(ROOT))


def main() -> None:
    """Run them one by one; stop at the first that fails, with what it said."""
    if (ROOT / ".git").exists() or not (ROOT / ".venv").exists():
        sys.exit("commands.py: needs a copy of the checkout that it may write to, with README's .venv; .ci/run has it.")
    commands = list(dict.fromkeys(filter(None, map(small, shown()))))
    commands += [
        f".venv/bin/python {name} --toy" for name in scripts() if not any(f"{name} " in command for command in commands)
    ]
    environment = {**os.environ, "PATH": f"{ROOT / '.venv' / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    began = time.perf_counter()
    for command in commands:
        start = time.perf_counter()
        done = subprocess.run(
            ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
        )
        print(f"{time.perf_counter() - start:5.1f} s  {command}", flush=True)
        if done.returncode:
            sys.exit(f"{done.stdout[-5000:]}{done.stderr[-5000:]}\nexit status {done.returncode}: {command}")
    print(f"{len(commands)} commands in {time.perf_counter() - began:.0f} s")


if __name__ == "__main__":
    main()
