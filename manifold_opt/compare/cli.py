"""Command line: python -m manifold_opt compare."""

from __future__ import annotations

import argparse
import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from .. import RETRACTIONS
from . import cost, estimate
from .api import Comparison, resolve_device, validate
from .data import INSTALL, MissingDataError
from .experiment import Experiment, environment
from .methods import PEERS, Settings, schemes_of
from .results import Results
from .runner import run_specs
from .tasks import TASKS, Task

STEP = "step"  # the task that only times steps
DEFAULT_TASKS = ("procrustes", "digits", STEP)
REPORT_SECONDS = 3.0  # about what tables, plots and page take
DTYPES = {"float32": torch.float32, "float64": torch.float64}
FAST = {"size": 16, "steps": 120, "seeds": 2}  # values of --fast
VARYING = ("command", "date", "load")  # may differ where a comparison is resumed
SWEEP = [10 ** (k / 2) for k in range(-4, 6)]  # multiples of a task's own learning rate


class Parser(argparse.ArgumentParser):
    """Argument parser with error messages of one line."""

    def error(self, message: str) -> NoReturn:
        """Print the message and exit with status 2."""
        self.exit(2, f"{self.prog}: {message}\n")


def parser() -> Parser:
    """Return the parser of the arguments after ``compare``."""
    result = Parser(prog="manifold_opt compare", description="Compare retractions and other packages side by side.")
    add = result.add_argument
    tasks = ", ".join((*TASKS, STEP))
    add("--task", nargs="+", type=_names, default=[DEFAULT_TASKS], metavar="T", help=f"tasks to run, any of {tasks} "
        f"(default: {', '.join(DEFAULT_TASKS)}); step only measures times")  # fmt: skip
    add("--retractions", type=_names, metavar="A,B", help="retractions of this package to compare (default: all of "
        f"{', '.join(RETRACTIONS)}; with --optimizer muon: spectral)")  # fmt: skip
    add("--peers", type=_names, metavar="A,B", help="other packages and methods to compare, or 'none' (default: all of "
        f"{', '.join(PEERS)}; with --optimizer muon: penalty, unconstrained)")  # fmt: skip
    add("--optimizer", default="adam", help="adam (default); sgd, without momentum; or muon, which trains marked "
        "parameters with Muon and the others with Adam")  # fmt: skip
    add("--metric", default="euclidean", help="metric of the Riemannian gradient: euclidean (default) or canonical; "
        "muon has only euclidean")  # fmt: skip
    add("--second-moment", default="element", help="second moment of this package's Adam: element (default), one per "
        "entry; or block, one per matrix, as in geoopt and POGO")  # fmt: skip
    rates = result.add_mutually_exclusive_group()
    rates.add_argument("--lr", type=float, nargs="+", help="learning rates to run (default: one for each task)")
    rates.add_argument("--sweep-lr", action="store_true", help="run ten learning rates, from a hundredth of the "
                       "default of the task to 300 times the default")  # fmt: skip
    add("--penalty", type=float, default=0.1, help="weight of ||I - W W^T||^2 in the loss of the peer "
        "penalty (default: 0.1)")  # fmt: skip
    add("--fast", action="store_true", help="a first impression in half a minute: the same as "
        f"{' '.join(f'--{name} {value}' for name, value in FAST.items())}; each can still be set")  # fmt: skip
    add("--size", type=int, help="size of the problem: n for procrustes, p for pca, hidden units for the nets; for "
        "step, the largest n and the largest number of matrices (default: one for each task)")  # fmt: skip
    add("--steps", type=int, help="number of training steps (default: one for each task)")
    add("--seeds", type=int, help="number of seeds (default: 3)")
    add("--dtype", default="float32", help="float32 (default) or float64")
    add("--device", default="cpu", help="device to run on: cpu (default), cuda, ...")
    add("--threads", type=int, default=1, help="number of CPU threads of torch (default: 1)")
    add("--data", metavar="DIR", help="folder with the files of Fashion-MNIST, for the task fashion")
    add("--out", type=Path, metavar="DIR", help="folder for results.json, the plots and report.html")
    add("--resume", action="store_true", help="continue an interrupted run from its results.json in --out")
    return result


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit status."""
    reader = parser()
    args = reader.parse_args(arguments)
    try:
        import jinja2  # noqa: F401  # so that a missing package is reported before the runs
        import matplotlib as mpl  # noqa: F401
        from rich.console import Console
    except ModuleNotFoundError as missing:
        reader.error(f"{missing.name} is not installed: {INSTALL}")
    try:
        experiment, results = build_experiment(args, ["python", "-m", "manifold_opt", "compare", *arguments])
    except (ValueError, MissingDataError) as refusal:
        reader.error(" ".join(str(refusal).removeprefix("compare: ").split()))
    console = Console() if sys.stdout.isatty() else Console(width=110)
    from .progress import Bar, Lines

    console.print("Timing a few steps of every method to estimate the time ...", highlight=False)
    seconds = estimate.seconds(experiment, results)
    console.print(f"The comparison takes about {estimate.in_words(seconds + REPORT_SECONDS)}.", highlight=False)
    with (Bar if console.is_terminal else Lines)(console) as progress:
        experiment.run(results, progress)
    comparison = Comparison(results)
    console.print(comparison)
    if args.out:
        written = comparison.plots(args.out)
        comparison.to_html(args.out / "report.html")
        said = f"{args.out}/report.html, results.json, {len(written)} plots"
        console.print(said, highlight=False, markup=False, soft_wrap=True)
    if results.interrupted:
        again = " --resume continues it." if args.out else " With --out the results would have been kept."
        console.print(f"Interrupted; what was finished is above.{again}", highlight=False)
        return 130
    failures = [row.failure for row in results.rows] + [point.failure for point in results.costs]
    return 1 if all(failures) else 0


def build_experiment(args: argparse.Namespace, command: Sequence[str]) -> tuple[Experiment, Results]:
    """Return the requested experiment and the existing results; raise a ValueError if an argument is invalid."""
    for option, value in (FAST if args.fast else {"seeds": 3}).items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    names = tuple(dict.fromkeys(name for some in args.task for name in some))
    _check_choices("--task", names or ("",), (*TASKS, STEP))
    known = schemes_of(args.optimizer)  # validate() refuses an unknown optimizer
    own, others = [name for name in known if name not in PEERS], [name for name in known if name in PEERS]
    retractions = tuple(own) if args.retractions is None else args.retractions
    _check_choices("--retractions", retractions, own)
    peers = tuple(others) if args.peers is None else () if args.peers == ("none",) else args.peers
    _check_choices("--peers", peers, others)
    _check_choices("--dtype", [args.dtype], DTYPES)
    schemes = (*retractions, *peers)
    validate(schemes, args.optimizer, args.metric, args.second_moment, args.lr or [1.0], args.steps, range(args.seeds))
    for option in ("size", "threads"):
        if getattr(args, option) is not None and getattr(args, option) < 1:
            raise ValueError(f"--{option} must be at least 1, got {getattr(args, option)}")
    if not 0 <= args.penalty < math.inf:
        raise ValueError(f"--penalty must be finite and at least 0, got {args.penalty}")
    device = resolve_device(args.device)
    if args.resume and not args.out:
        raise ValueError("--resume needs the --out that the results were written to")
    if args.out:
        _check_writable(args.out)
    dtype = DTYPES[args.dtype]
    tasks: list[Task] = [make(args.size, args.data) for name in names if name != STEP for make in TASKS[name]]
    settings = Settings(args.optimizer, metric=args.metric, second_moment=args.second_moment, penalty=args.penalty)
    experiment = Experiment(
        run_specs(tasks, range(args.seeds), lambda task: _rates(args, task), settings, schemes, args.steps, device),
        cost.problem_sizes(args.size) if STEP in names else [],
        schemes,
        settings,
        device,
        dtype,
        args.threads,
    )
    asked = {key: value for key, value in vars(args).items() if key not in ("out", "resume")}
    asked.update(task=list(names), retractions=list(retractions), peers=list(peers))
    results = Results(environment(device, args.threads), {**asked, "command": shlex.join(command)})
    if args.out:
        results = _resumed(args, results)
        experiment.save = lambda found: found.save(args.out / "results.json")
    return experiment, results


def _resumed(args: argparse.Namespace, fresh: Results) -> Results:
    path = args.out / "results.json"
    if not path.is_file():
        if args.resume:
            raise ValueError(f"--resume finds no results.json in {args.out}")
        return fresh
    try:
        found = Results.load(path)
    except (ValueError, KeyError, TypeError, AttributeError):
        if not args.resume:
            return fresh
        raise ValueError(f"--resume cannot read {path}; start anew without it") from None
    if not args.resume:
        if found.interrupted:
            raise ValueError(f"--out {args.out} has an interrupted comparison: --resume goes on, rm {path} starts anew")
        return fresh
    for new, old in ((fresh.arguments, found.arguments), (fresh.environment, found.environment)):
        for key, value in new.items():
            if key not in VARYING and old.get(key) != value:
                raise ValueError(
                    f"--resume: {path} was made with {key}={old.get(key)}, not {value}; ask for the same, or give "
                    "another --out"
                )
    # Packages that were missing may have been installed since.
    found.rows = [row for row in found.rows if not (row.failure or "").startswith("ModuleNotFoundError")]
    found.costs = [c for c in found.costs if not (c.failure or "").startswith("ModuleNotFoundError")]
    return found


def _rates(args: argparse.Namespace, task: Task) -> list[float]:
    if args.sweep_lr:
        return [float(f"{task.lr * factor:.2g}") for factor in SWEEP]
    return args.lr or [task.lr]


def _names(text: str) -> tuple[str, ...]:
    return tuple(filter(None, text.replace(" ", ",").split(",")))


def _check_choices(option: str, names: Sequence[str], choices: Any) -> None:
    for name in names:
        if name not in choices:
            raise ValueError(f"{option} knows {', '.join(choices)}, not {name!r}")


def _check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--out {folder} cannot be written to: {error.strerror}") from None
