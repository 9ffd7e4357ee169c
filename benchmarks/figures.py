"""The bits of 60 training runs, written before a change of the code and compared after it.

    python benchmarks/figures.py write FOLDER
    python benchmarks/figures.py check FOLDER

Every row of RUNS is 50 steps along drawn gradients. Its figure is a SHA-256 of all weights, of the optimizer's state
and of its counts. ``check`` makes all runs again, and the second half of each also from the checkpoint that was written
after 25 steps, so that checkpoints of an earlier version are seen to load. It prints a line for each that differs.

The figures are those of one machine and one version of torch: the bits of a product depend on both. Elsewhere, write
them anew from the version that is to be compared with.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import inspect
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import geoopt
import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

import manifold_opt as mo
from manifold_opt import SGD, Adam, AdamW
from tests.helpers import never_read

STEPS, HALF = 50, 25
ON_FAULT = next(name for name in ("nonfinite", "nonfinite") if name in inspect.signature(Adam).parameters)

OPTIMIZERS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.03}),
    "momentum": (SGD, {"lr": 0.03, "momentum": 0.9, "weight_decay": 0.01, "orthogonal_lr_scale": 0.5}),
    "nesterov": (SGD, {"lr": 0.03, "momentum": 0.9, "nesterov": True}),
    "damped": (SGD, {"lr": 0.03, "momentum": 0.9, "dampening": 0.5, "foreach": False}),
    "adam": (Adam, {"lr": 0.01}),
    "amsgrad": (Adam, {"lr": 0.01, "amsgrad": True, "weight_decay": 0.01, "foreach": False}),
    "adamw": (AdamW, {"lr": 0.01, "weight_decay": 0.1, "orthogonal_lr_scale": 0.5}),
    "block": (Adam, {"lr": 0.01, "second_moment": "block"}),
    "block-amsgrad": (AdamW, {"lr": 0.01, "second_moment": "block", "amsgrad": True}),
}
RETRACTIONS = {  # those whose name is not all there is
    "iterative": {"retraction": "cayley_iterative"},
    "slow": {"retraction": "orthogonalizer", "beta": 0.3, "correction_steps": 3},
}


class Weight(NamedTuple):
    """A parameter to be: its shape, and what makes it of a Gaussian."""

    shape: tuple[int, ...]
    make: Callable[[Tensor], Tensor]


def _weight(mark: Any, *shape: int, start: Callable[[Tensor], Tensor] = lambda x: x, **options: Any) -> Weight:
    return Weight(shape, lambda x: mark(nn.Parameter(start(x)), **options))


free = partial(_weight, lambda p: p)
orthogonal, unit, positive = (partial(_weight, f) for f in (mo.mark_orthogonal, mo.mark_unit_norm, mo.mark_positive))
spectral, on_manifold = (partial(_weight, f) for f in (mo.mark_spectral, mo.mark_manifold))
gate, row = orthogonal(24, 8, blocks=3, which=(2,)), orthogonal(8, 24, blocks=3, which=(0, 2), dim=1)
channels_last = partial(torch.clone, memory_format=torch.channels_last)
in_ball = Weight((4, 3), lambda x: geoopt.ManifoldParameter(0.1 * x, manifold=geoopt.PoincareBall()))
sphere, stiefel = on_manifold(4, 3, manifold=geoopt.Sphere()), on_manifold(9, 4, manifold=geoopt.Stiefel())
balls = [spectral(3, 7, bound=0.7), spectral(8, 3), spectral(4, 2, 3, 3, bound=2.0, dim=1)]

WEIGHTS: dict[str, list[Weight]] = {
    "gates": [orthogonal(36, 12, blocks=3), free(36)],
    "oblong": [orthogonal(8, 24), orthogonal(24, 8), orthogonal(20, 8), free(8)],
    "unequal": [*[orthogonal(20, 8, blocks=(8, 8, 4))] * 3, orthogonal(30, 12, blocks=(12, 18))],
    "which": [gate, gate, row, free(8)],
    "columns": [orthogonal(8, 24, blocks=3, dim=1), orthogonal(8, 12, blocks=3, dim=1)],
    "gain": [orthogonal(16, 8, blocks=2, gain=2.0), orthogonal(6, 9, gain=0.5), free(16)],
    "tiny": [orthogonal(6000, 3, blocks=2000), free(5)],
    "batch": [orthogonal(5, 24, 8, blocks=3, flatten=False), orthogonal(2, 3, 4, 7, flatten=False)],
    "filters": [orthogonal(8, 4, 3, 3), orthogonal(8, 4, 3, 3, start=channels_last), orthogonal(16, 1, 3, 3), free(8)],
    "many": [*[orthogonal(5, 5)] * 100, *[orthogonal(4, 6)] * 100, free(7)],
    "beside": [free(7, 7), orthogonal(7, 7), free(7), orthogonal(7, 3), free(3, 7, 2), orthogonal(7, 7), free()],
    "large": [orthogonal(400, 400), free(400)],
    "long": [orthogonal(4, 9000), free(4)],
    "unit": [unit(6, 8), unit(5, 4, dim=1), orthogonal(6, 6), unit(4, 3, 2, 2), unit(9, 4, padding_idx=3)],
    "spectral": [*balls, spectral(6, 6, start=lambda x: 0.01 * x), orthogonal(5, 5)],
    "positive": [positive(5, start=torch.exp), orthogonal(4, 4), positive(2, 3, start=torch.exp)],
    "geoopt": [sphere, stiefel, in_ball, orthogonal(5, 5)],
}

LENGTHS = {"long": 1.0, "far": 100.0}
# Optimizer, retraction, metric, weights, dtype, and what happens:
#   long, far      a learning rate of 1, which takes the careful path; of 100
#   faults         some gradients have a NaN or Inf; "raises" makes an error of them, and the step is none
#   late           some parameters have no gradient at first, and others none now and then
#   unread         no value is read, as on an accelerator
#   alike, unlike  two groups, of equal options or of others
#   decay          the learning rate falls
#   follow         gradients depend on the weights
#   maximize       the objective is maximized
#   written        other code writes to the weights, once through .data
#   switched       another retraction and second moment from one step on
#   foreign        the state is loaded as if torch.optim had written it
#   freed          a parameter is unmarked
#   scaled         a GradScaler hands over its scale, and finds an overflow twice
RUNS = """
sgd            orthographic    euclidean  tiny      float16     long,unread
sgd            polar           euclidean  spectral  float32     late,unread
sgd            qr              canonical  many      complex128  far
sgd            cayley          euclidean  filters   bfloat16    faults
sgd            exp             euclidean  columns   float32     written,switched
sgd            iterative       canonical  geoopt    float64     scaled
sgd            orthogonalizer  canonical  unequal   complex64   decay
sgd            slow            canonical  gain      float32     follow
momentum       orthographic    canonical  oblong    float32     late,foreign
momentum       polar           canonical  columns   float32     faults,unread,scaled
momentum       qr              canonical  unit      float16     written
momentum       cayley          euclidean  geoopt    float32     long,unread
momentum       exp             euclidean  many      float32     long,faults
momentum       iterative       euclidean  gain      float64     alike,freed
momentum       orthogonalizer  euclidean  which     complex128  written,unread
momentum       slow            euclidean  gates     complex64   unread,foreign
nesterov       orthographic    euclidean  spectral  bfloat16    long,raises
nesterov       polar           euclidean  oblong    float64     follow
nesterov       qr              canonical  beside    bfloat16    unread,freed
nesterov       cayley          canonical  tiny      complex64   late
nesterov       exp             canonical  filters   complex128  alike
nesterov       iterative       canonical  which     float32     faults,late,alike
nesterov       orthogonalizer  euclidean  gates     float32     unlike
nesterov       slow            canonical  positive  float64     decay,maximize
damped         orthographic    canonical  gates     float64     faults,unread
damped         qr              euclidean  positive  float32     unlike,late
adam           orthographic    euclidean  batch     complex128  decay,maximize
adam           polar           canonical  gates     float32     alike,foreign
adam           qr              euclidean  columns   complex64   foreign,freed
adam           cayley          canonical  spectral  float64     late,unlike,far
adam           exp             euclidean  beside    float32     written,unread
adam           iterative       euclidean  geoopt    float32     long
adam           orthogonalizer  euclidean  filters   float32     faults,unread
adam           slow            canonical  oblong    bfloat16    long,unread
amsgrad        orthographic    euclidean  unit      complex64   unread
amsgrad        polar           canonical  gain      complex128  long,unread
amsgrad        qr              euclidean  unequal   float64     faults,late,alike
amsgrad        cayley          euclidean  gates     bfloat16    far
amsgrad        exp             canonical  long      complex64   unlike,far
amsgrad        iterative       euclidean  tiny      bfloat16    follow
amsgrad        orthogonalizer  canonical  beside    bfloat16    faults
amsgrad        slow            canonical  batch     float64     raises
adamw          orthographic    canonical  gain      complex64   faults,freed
adamw          polar           euclidean  which     float32     raises
adamw          qr              euclidean  filters   float64     late
adamw          cayley          euclidean  many      float16     faults,late,alike
adamw          exp             canonical  unit      float64     long
adamw          iterative       euclidean  beside    complex128  late,unlike
adamw          orthogonalizer  canonical  positive  bfloat16    long,faults
adamw          slow            euclidean  unequal   float32     plain
block          orthographic    canonical  columns   float64     written,unread
block          polar           canonical  large     float32     faults
block          qr              euclidean  long      float32     long,faults
block          cayley          canonical  oblong    float32     switched
block          exp             euclidean  batch     float32     late,unlike,scaled
block          iterative       canonical  filters   complex64   written
block          orthogonalizer  canonical  spectral  float64     unread
block          slow            euclidean  tiny      complex128  faults,unread
block-amsgrad  polar           canonical  tiny      float64     unlike,foreign
block-amsgrad  cayley          euclidean  unequal   complex128  written,switched
"""


class Run:
    """One row of RUNS: a model, its optimizer and what happens to them."""

    def __init__(self, row: str) -> None:
        optimizer, retraction, metric, weights, dtype, happens = row.split()
        self.name, self.happens = "-".join(row.replace(",", " ").split()), set(happens.split(","))
        self.dtype, self.weights = getattr(torch, dtype), WEIGHTS[weights]
        self.model = nn.ParameterList(w.make(x) for w, x in zip(self.weights, self.draw(1000), strict=True))
        kind, options = OPTIMIZERS[optimizer]
        options = options | {"metric": metric} | RETRACTIONS.get(retraction, {"retraction": retraction})
        options |= {"maximize": "maximize" in self.happens, ON_FAULT: "raise" if "raises" in self.happens else "skip"}
        options["lr"] = next((lr for name, lr in LENGTHS.items() if name in self.happens), options["lr"])
        groups: list[dict[str, Any]] = [{"params": list(self.model)}]
        if {"alike", "unlike"} & self.happens:
            groups = [{"params": list(self.model)[k::2]} for k in (0, 1)]
        if "unlike" in self.happens:
            groups[1] |= {"lr": options["lr"] / 2, "orthogonal_lr_scale": 0.3, "retraction": "polar"}
        self.optimizer = kind(groups, **options)

    def draw(self, seed: int) -> list[Tensor]:
        """Draw a Gaussian for every weight."""
        generator = torch.Generator().manual_seed(seed)
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        return [torch.randn(w.shape, generator=generator, dtype=wide).to(self.dtype) for w in self.weights]

    def gradients(self, number: int) -> list[Tensor | None]:
        """Return the gradients of one step."""
        drawn: list[Tensor | None] = []
        for k, (p, g) in enumerate(zip(self.model, self.draw(number), strict=True)):
            if "follow" in self.happens:
                g *= p.detach()
            if {"faults", "raises"} & self.happens and number in (3, 10, 30) and mo.constraint_of(p) is not None:
                g.view(-1)[-1] = torch.inf if (number + k) % 3 else torch.nan
            missing = (k % 2 and number < 4) or (k % 3 == 0 and number in (20, 27))
            drawn.append(None if "late" in self.happens and missing else g * 4 if "scaled" in self.happens else g)
        return drawn

    def interfere(self, number: int) -> None:
        """Do what happens before a step, beside its gradients."""
        for p in self.model if "written" in self.happens and number in (12, 33) else ():
            (p.detach() if number == 12 else p.data).mul_(1.05)
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.95 if "decay" in self.happens else 1
            if "switched" in self.happens and number == 20:
                group |= {"retraction": "polar"} | ({"second_moment": "element"} if "betas" in group else {})
        if "foreign" in self.happens and number == 15:
            state = self.optimizer.state_dict()
            for entries in state["state"].values():
                entries.pop("constrained", None)
            self.optimizer.load_state_dict(state)
        if "freed" in self.happens and number == 40:
            mo.unmark(next(p for p in self.model if mo.constraint_of(p) is not None))
        if "scaled" in self.happens:
            self.optimizer.grad_scale = torch.tensor(4.0)
            self.optimizer.found_inf = torch.tensor(float(number in (7, 31)))

    def step(self, number: int) -> None:
        """Take one step."""
        for p, g in zip(self.model, self.gradients(number), strict=True):
            p.grad = g
        self.interfere(number)
        with suppress(FloatingPointError):
            self.optimizer.step()

    def finish(self, checkpoint: dict[str, Any] | None = None) -> dict[str, Any]:
        """Take all steps, or those that a checkpoint has left, and return a checkpoint from the middle."""
        if checkpoint is not None:
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        middle = {}
        for number in range(HALF if checkpoint else 0, STEPS):
            if number == HALF:
                parts = {"model": self.model, "optimizer": self.optimizer}
                middle = {name: copy.deepcopy(part.state_dict()) for name, part in parts.items()}
            self.step(number)
        return middle

    def figure(self, *, counts: bool) -> str:
        """Return the digest of weights and state; with what has been counted, which no checkpoint holds."""
        digest, metrics = hashlib.sha256(), self.optimizer.metrics()
        feed(digest, [list(self.model), self.optimizer.state_dict()["state"]])
        feed(digest, [metrics[name] for name in ("skipped_blocks", "clamped_steps") if counts])
        return digest.hexdigest()

    def far_from(self, weights: list[Tensor]) -> float:
        """Return the largest difference of a weight from what it was."""
        pairs = zip(self.model, weights, strict=True)
        return max(float((p.detach() - w).abs().max()) for p, w in pairs)


def feed(digest: Any, x: Any) -> None:
    """Feed a digest the bytes of tensors, of other values what they print as, and dictionaries by their sorted keys."""
    if isinstance(x, dict):
        x = [(key, x[key]) for key in sorted(x, key=str)]
    if isinstance(x, Tensor):
        digest.update(f"{x.dtype} {tuple(x.shape)}".encode())
        digest.update(x.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(x, (list, tuple)):
        for part in x:
            feed(digest, part)
    else:
        digest.update(repr(x).encode())


def finished(row: str, checkpoint: dict[str, Any] | None = None) -> tuple[Run, dict[str, Any]]:
    """Make a run, and the checkpoint from its middle."""
    with pytest.MonkeyPatch.context() as patch:
        if "unread" in row:
            never_read(patch)
        run = Run(row)
        return run, run.finish(checkpoint)


def write(folder: Path, rows: Iterable[str]) -> None:
    """Write the figure and the checkpoint of every run."""
    folder.mkdir(parents=True, exist_ok=True)
    figures = {}
    for row in rows:
        run, middle = finished(row)
        figures[run.name] = run.figure(counts=True)
        end = {"weights": [p.detach() for p in run.model], "sha": run.figure(counts=False)}
        torch.save(middle | end, folder / f"{run.name}.pt")
    (folder / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def check(folder: Path, rows: Iterable[str]) -> bool:
    """Print what differs from the figures that were written, and return whether nothing does."""
    figures, same = json.loads((folder / "figures.json").read_text(encoding="utf-8")), True
    for row in rows:
        run, _ = finished(row)
        checkpoint = torch.load(folder / f"{run.name}.pt")
        resumed, _ = finished(row, checkpoint)
        for kind, one, sound in (
            ("from the start", run, run.figure(counts=True) == figures.get(run.name)),
            ("from its checkpoint", resumed, resumed.figure(counts=False) == checkpoint["sha"]),
        ):
            if not sound:
                print(f"{run.name}, {kind}: differs, weights by {one.far_from(checkpoint['weights']):.1e}", flush=True)
                same = False
    return same


def main() -> None:
    """Write or check the figures of all runs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=["write", "check"], nargs="?")
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--toy", action="store_true", help="three runs, written and checked elsewhere: does it work?")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    warnings.simplefilter("ignore")  # of weights that are written to, and of stacked gates
    rows, began, same = RUNS.strip().splitlines(), time.perf_counter(), True
    if args.toy:
        rows = rows[::20]
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), rows)
            same = check(Path(folder), rows)
    elif args.folder is None:
        parser.error("give a command and a folder")
    elif args.command == "write":
        write(args.folder, rows)
    else:
        same = check(args.folder, rows)
    print(f"{len(rows)} runs in {time.perf_counter() - began:.0f} s: {'all well' if same else 'some differ'}")
    sys.exit(not same)


if __name__ == "__main__":
    main()
