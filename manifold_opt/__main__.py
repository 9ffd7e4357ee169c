"""Command line of the package: python -m manifold_opt."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from . import __version__

OVERVIEW = f"""\
manifold_opt {__version__}: optimizers for PyTorch that keep weights orthogonal

usage: python -m manifold_opt COMMAND [options]

commands:
  compare     train with every retraction, and with other libraries, and report which is best on this machine
              (python -m manifold_opt compare --help)

options:
  -h, --help  show this overview
  --version   show the version

In Python: import manifold_opt; help(manifold_opt)
Documentation: https://manifold-opt.readthedocs.io, or the folder docs/ of the repository"""


def main(words: Sequence[str]) -> int:
    """Run the command that the first word names, and return the exit status."""
    if not words or words[0] in ("-h", "--help"):
        print(OVERVIEW)
        return 0
    if words[0] == "--version":
        print(f"manifold_opt {__version__}")
        return 0
    if words[0] != "compare":
        print(f"manifold_opt: unknown command {words[0]!r}\n\n{OVERVIEW}", file=sys.stderr)
        return 2
    from .compare.cli import main as compare  # it needs packages of the extra "compare"

    try:
        return compare(words[1:])
    except KeyboardInterrupt:  # between the runs and the report
        print("Interrupted.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
