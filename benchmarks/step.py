"""What one step costs: this package's optimizers, their peers, and the bare matrix products, side by side.

    python benchmarks/step.py --works gru256 params1000 --rows orthographic geoopt floor

In every round every row has a turn of about 50 ms, one step at least, with new gradients for every step; a figure is
the median over the rounds. A parametrization is timed for its forward, its backward and the Adam step underneath. The
learning rates of peers are those of the comparison, at which their steps are as long as this package's. Peers that are
not installed, or that raise, say so in their row: pip install ".[compare]" installs them.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import growth
import torch
import training
from timing import DEFAULT, FLOOR, POOL, ROWS, TOYS, WORKS, Plan, Problem, Result, side_by_side

PEERS = ("geoopt", "geotorch", "pogo-torch")
LR, TURN, TOY_TURN = 1e-3, 0.05, 0.001
WIDTH = 120
LEGEND = """\
ms, spread     median and interquartile range of the rounds, a step
x floor        multiple of the floor: the four p x n by n x p products that a step needs at least, with torch.bmm
default / this part of this row's time that "Adam, orthographic" takes: below 1 it is the faster one
error          largest ||I - W W^T|| over all blocks at the end, Frobenius
steps          how many were timed; fewer where the budget ran out"""


class Parser(argparse.ArgumentParser):
    """Refuses in one line."""

    def error(self, message: str) -> NoReturn:
        """Exit status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    """The options."""
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = p.add_argument_group("what is measured")
    what.add_argument(
        "--works",
        nargs="*",
        metavar="WORK",
        help=f"tables for these, of {', '.join(WORKS)} (default all); without a name none, for --training or --growth "
        "alone",
    )
    what.add_argument(
        "--rows",
        nargs="+",
        metavar="PART",
        help=f"only rows of the tables whose name has one of these parts (default all), of {'; '.join(ROWS)}",
    )
    what.add_argument("--training", action="store_true", help="also whole training steps of some nets")
    what.add_argument(
        "--growth", action="store_true", help="also how the cost grows with n and with the number of parameters"
    )
    what.add_argument("--toy", action="store_true", help=f"tiny works ({', '.join(TOYS)}) and 2 rounds: does it run?")
    add_conditions(p.add_argument_group("how"))
    out = p.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="write environment, arguments and all figures there")
    out.add_argument("--plot", metavar="FILE", help="draw --growth there, a PNG")
    return p


def add_conditions(how: argparse._ArgumentGroup) -> None:
    """Options that hold for all that is measured."""
    how.add_argument("--rounds", type=positive, default=15, help="turns of every row (default 15)")
    how.add_argument(
        "--budget",
        type=float,
        default=20.0,
        metavar="SECONDS",
        help="for the steps of one row of one table; a slower row has fewer turns (default 20)",
    )
    how.add_argument("--lr", type=float, default=LR, help=f"learning rate of every row (default {LR:g})")
    how.add_argument("--threads", type=positive, help="of torch (default: as many as torch takes)")
    how.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default cpu)")
    how.add_argument("--dtype", choices=["float32", "float64"], default="float32", help="of weights (default float32)")
    how.add_argument(
        "--gradient",
        choices=["pool", "constant"],
        default="pool",
        help=f"{POOL} random sets of gradients in turn, or one for all steps (default pool)",
    )


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1, got {text!r}")
    return int(text)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Arguments, with works and rows as lists of names that exist."""
    p = parser()
    args = p.parse_args(argv)
    known = list(TOYS if args.toy else WORKS)
    args.works = known if args.works is None else args.works
    for work in args.works:
        if work not in known:
            p.error(f"no work {work!r}; there are {', '.join(known)}")
    for part in args.rows or []:
        if not any(part in name for name in ROWS):
            p.error(f"no row has {part!r} in its name; there are {'; '.join(ROWS)}")
    args.rows = [name for name in ROWS if args.rows is None or any(part in name for part in args.rows)]
    if args.plot and not args.growth:
        p.error("--plot draws --growth; give both")
    if args.plot and importlib.util.find_spec("matplotlib") is None:
        p.error("--plot needs matplotlib, which is not installed")
    if args.device == "cuda" and not torch.cuda.is_available():
        p.error("--device cuda: torch finds none; there is cpu")
    args.rounds = 2 if args.toy else args.rounds
    return args


def environment(device: torch.device) -> dict[str, Any]:
    """What the figures depend on."""
    return {
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: version(name) for name in PEERS},
        },
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "machine": processor(),
    }


def commit() -> str:
    """Of the checkout this script lies in, "-dirty" if there are changes; or "unknown"."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def version(name: str) -> str | None:
    """Of an installed distribution."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def processor() -> str:
    """The processor in words."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else []
    name = names[0] if names else platform.processor() or "unknown processor"
    return f"{name}, {len(names) or 'unknown'} cores, {platform.machine()}, {platform.system()}"


def caption(env: dict[str, Any], dtype: str) -> str:
    """What stands above a plot."""
    device = "" if env["device"] == "cpu" else f"{env['device']}, "
    return f"{device}{env['machine']}, {threads(env)}, {dtype}, torch {env['versions']['torch']}"


def threads(env: dict[str, Any]) -> str:
    """Their number in words."""
    return f"{env['threads']} thread{'s' * (env['threads'] != 1)}"


def print_environment(env: dict[str, Any]) -> None:
    """The head of every log."""
    versions = ", ".join(f"{name} {found or 'not installed'}" for name, found in env["versions"].items())
    print(f"manifold_opt at {env['commit']}\n{versions}")
    print(f"{threads(env)} on {env['machine']}; device {env['device']}", flush=True)


def figures(work: str, results: dict[str, Result]) -> list[dict[str, Any]]:
    """One dict a row; None where there is no figure."""
    floor = results[FLOOR].median if FLOOR in results else None
    default = results[DEFAULT].median if DEFAULT in results else None

    def over(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a / b

    return [
        {
            "work": work,
            "row": name,
            "ms": over(result.median, 1e-3),
            "spread_ms": over(result.spread, 1e-3),
            "times_floor": over(result.median, floor),
            "default_over_this": over(default, result.median),
            "error": result.error,
            "steps": result.steps,
            "rounds": len(result.times),
            "failure": result.failure,
        }
        for name, result in results.items()
    ]


COLUMNS = (  # title, width, format, key
    ("ms", 11, ".4f", "ms"),
    ("spread", 9, ".4f", "spread_ms"),
    ("x floor", 11, ".2f", "times_floor"),
    ("default / this", 15, ".3g", "default_over_this"),
    ("error", 9, ".1e", "error"),
    ("steps", 7, "d", "steps"),
)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned plain text; a row that failed says why."""
    print(f"{'row':26}" + "".join(f"{title:>{width}}" for title, width, _, _ in COLUMNS))
    for row in rows:
        if row["failure"] is not None:
            print(f"{row['row']:26}  failed: {row['failure']}"[:WIDTH])
            continue
        cells = [f"{'-' if row[key] is None else format(row[key], style):>{width}}" for _, width, style, key in COLUMNS]
        print(f"{row['row']:26}" + "".join(cells))
    sys.stdout.flush()


def warm_up(args: argparse.Namespace, plan: Plan) -> None:
    """Run every row on a toy first, for what is set up once: imports, handles, tables, workspaces of libraries."""
    toy = replace(plan, rounds=1, turn=0.0, sets=1, lr=LR)
    side_by_side(args.rows, Problem(TOYS["gru8"], toy), toy)


def compare(args: argparse.Namespace, plan: Plan, report: dict[str, Any], save: Callable[[], None]) -> None:
    """A table a work."""
    works = TOYS if args.toy else WORKS
    if args.works:
        print(f"\n{LEGEND}", flush=True)
        warm_up(args, plan)
    for work in args.works:
        print(f"\n{work}: {works[work]}, {args.dtype}, {args.gradient} gradient", flush=True)
        rows = figures(work, side_by_side(args.rows, Problem(works[work], plan), plan))
        print_table(rows)
        report["rows"] += rows
        save()


def main(argv: Sequence[str] | None = None) -> None:
    """Print tables, and write what was asked for."""
    args = parsed(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    sets, turn = POOL if args.gradient == "pool" else 1, TOY_TURN if args.toy else TURN
    plan = Plan(args.rounds, turn, args.budget, device, dtype, args.lr, sets)
    report: dict[str, Any] = {"environment": environment(device), "arguments": vars(args), "rows": []}
    print_environment(report["environment"])

    def save() -> None:
        if args.json:
            Path(args.json).write_text(json.dumps(report, indent=1) + "\n")

    save()
    compare(args, plan, report, save)
    if args.training:
        report["training"] = training.measure(plan, toy=args.toy)
        save()
    if args.growth:
        report["growth"] = growth.measure(plan, toy=args.toy)
        save()
        if args.plot:
            env = report["environment"]
            growth.plot(report["growth"], args.plot, caption(env, args.dtype))


if __name__ == "__main__":
    main()
