"""What the entries of docs/reproduced.md share: options, seeds, raw figures as JSON, and who is installed."""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / "examples"), str(ROOT / "benchmarks")]

from common import picture_path, positive_int  # noqa: E402

FIGURES = ROOT / "docs" / "reproduced"


class Parser(argparse.ArgumentParser):
    """The options of an entry. The defaults are those of its figures on the page.

    Args:
        script: ``__file__`` of the entry; its picture and figures are named after it.
        description: one sentence.
    """

    def __init__(self, script: str, description: str) -> None:
        super().__init__(prog=Path(script).name, description=description)
        self._name = Path(script).stem
        self.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each (%(default)s)")
        self.add_argument("--threads", type=positive_int, default=1, help="threads of torch (%(default)s)")
        self.add_argument("--plot", type=picture_path, help=f"picture (docs/reproduced/{self._name}.png)")
        self.add_argument("--json", type=Path, help=f"raw figures (docs/reproduced/{self._name}.json)")
        self.add_argument("--toy", action="store_true", help="seconds, to see that it runs; writes to a new folder")

    def parse(self, argv: Sequence[str] | None, *, toy: dict[str, Any]) -> argparse.Namespace:
        """Return the options; ``--toy`` changes defaults only, so that an option given beside it holds."""
        if self.parse_args(argv).toy:
            self.set_defaults(**{"seeds": [0], **toy})
        args = self.parse_args(argv)
        folder = Path(tempfile.mkdtemp()) if args.toy else FIGURES
        folder.mkdir(exist_ok=True)
        args.plot = args.plot or folder / f"{self._name}.png"
        args.json = args.json or folder / f"{self._name}.json"
        torch.set_num_threads(args.threads)
        return args


def installed(contenders: Iterable[str], packages: dict[str, tuple[str, str]]) -> list[str]:
    """Return the contenders whose package is there, and say of the others how to get it.

    Args:
        contenders: names, in order.
        packages: for those that need one, the module to import and the name to install.
    """
    found = []
    for name in contenders:
        module, package = packages.get(name, ("torch", "torch"))
        if importlib.util.find_spec(module) is None:
            print(f"{name} is left out: pip install {package}")
        else:
            found.append(name)
    return found


def write(args: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Write the settings and the figures of every run; called after each run, so that none is lost."""
    settings = {key: value for key, value in vars(args).items() if key not in ("plot", "json", "data")}
    report = {"torch": torch.__version__, "settings": settings, "runs": rows}
    text = json.dumps(report, default=str, allow_nan=True)
    args.json.write_text(text.replace('{"', '\n{"') + "\n", encoding="utf-8")


def thin(values: Sequence[float], count: int = 200) -> list[float]:
    """Return about ``count`` means of neighbouring values, with 4 digits: a curve for the JSON and the picture."""
    width = max(1, len(values) // count)
    means = (statistics.fmean(values[k : k + width]) for k in range(0, len(values), width))
    return [float(f"{mean:.4g}") for mean in means]


def spread(values: Sequence[float], digits: str = ".3g") -> str:
    """Return the mean of some seeds with their range, for a table."""
    if len(values) == 1:
        return f"{values[0]:{digits}}"
    return f"{statistics.fmean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"
