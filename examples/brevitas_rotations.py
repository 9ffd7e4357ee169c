"""Brevitas trains the rotations of a quantized Llama, with its own optimizer and with those of this package.

Run it with no argument; it needs no network:

    pip install ".[brevitas]"
    python examples/brevitas_rotations.py

What it shows: what to give to ``apply_fine_tuning`` of brevitas so that its rotation training uses another optimizer
(look for "the change"). A Llama of two layers learns the letters of sentences.txt for some seconds. Brevitas then puts
a rotation on its residual stream and one on the values of each layer, and quantizes weights to 3 bits and inputs to 4.
Training moves the rotations, and nothing else, through the Trainer of brevitas. All runs of a seed start from the same
model and see the same batches. The steps of docs/how-to/brevitas.md are those of brevitas' own script for language
models with ``--rotation fused_no_fx --fine-tune``, which needs a model and a data set from a hub.

Columns: cross-entropy of the quantized model on the text after training, mean and standard deviation over the seeds;
distance of the rotations from orthogonality, the largest of all seeds; by how much the logits of the model with
quantization turned off differ from those before any rotation, largest of all seeds; CPU time of a step of the
optimizer, and of a whole training step, mean.

What to expect, in about two minutes on one core: after five steps the rotations of the drop-in SGDG are 1e-6 from those
of brevitas' own CaileySGD. After 30 their losses differ by as much as those of CaileySGD from two starts that are 1e-6
apart: rounding to few bits is not continuous. At a learning rate of 15, CaileySGD is off orthogonal by 1e-3, and the
logits of the model with quantization turned off have changed by 1e-2; with SGDG by rounding.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.data import default_collate

from manifold_opt import Adam, mark_orthogonal, orthogonality_error, unmark
from manifold_opt.rotations import SGDG

warnings.filterwarnings("ignore")  # of brevitas and of what it traces the model with
try:
    import transformers
    from brevitas.graph.calibrate import quantization_status_manager
    from brevitas.graph.equalize import GraphRotationEqualization, apply_rewriters, fuse_parametrizations
    from brevitas.graph.quantize import layerwise_quantize
    from brevitas.utils.parametrization_utils import extract_trainable_rotation_matrices
    from brevitas_examples.common.dynamo_utils import dynamo_export_ctx
    from brevitas_examples.common.generative.quantize import generate_quant_maps, generate_quantizers
    from brevitas_examples.llm.llm_quant.ln_affine_merge import (
        apply_layernorm_affine_merge,
        apply_layernorm_to_rmsnorm,
        rmsnorm_patch,
    )
    from brevitas_examples.llm.llm_quant.prepare_for_quantize import make_dynamo_compatible
    from brevitas_examples.llm.llm_quant.rotation_optimization import RotationTrainer, apply_fine_tuning
    from brevitas_examples.llm.llm_quant.run_utils import fix_rewriter
    from brevitas_examples.llm.llm_quant.trainer_utils import TrainingArguments
    from letters import BATCH, HEADS, HIDDEN, batches, logits_of, loss_of, pretrained
    from transformers import LlamaForCausalLM
except ModuleNotFoundError as missing:
    raise SystemExit(f'{missing.name} is not installed: pip install ".[brevitas]"') from None

Group = dict[str, Any]


def trainer_with(optimizer: type[torch.optim.Optimizer], groups: Sequence[Group]) -> type[RotationTrainer]:
    """The change: brevitas' trainer of rotations with another optimizer, and groups of parameters as it wants them."""

    @dataclass
    class Arguments(TrainingArguments):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.optimizer_scheduler_args = [{"optimizer_cls": optimizer, "param_setup": list(groups)}]

    class Chosen(RotationTrainer):
        training_args_cls = Arguments

    return Chosen


def cayley(lr: float) -> type[RotationTrainer]:
    """SGDG in place of CaileySGD; it marks the rotations by itself."""

    def rotations(model: nn.Module, _: object) -> list[nn.Parameter]:
        return extract_trainable_rotation_matrices(model)

    return trainer_with(SGDG, [{"get_param_fn": rotations, "optimizer_kwargs": {"lr": lr, "stiefel": True}}])


def adam(scale: float) -> type[RotationTrainer]:
    """Adam, with a learning rate of ``scale / n`` for a rotation of n dimensions."""

    def of_size(n: int) -> Callable[..., list[nn.Parameter]]:
        def rotations(model: nn.Module, _: object) -> list[nn.Parameter]:
            return [mark_orthogonal(r) for r in extract_trainable_rotation_matrices(model) if len(r) == n]

        return rotations

    sizes = (HIDDEN, HIDDEN // HEADS)
    return trainer_with(Adam, [{"get_param_fn": of_size(n), "optimizer_kwargs": {"lr": scale / n}} for n in sizes])


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        lr: learning rate that brevitas is told.
        trainer: None is its own, with CaileySGD.
        shift: by how much an entry of the start is moved, in the mean.
    """

    lr: float
    trainer: type[RotationTrainer] | None = None
    shift: float = 0.0


RUNS = {
    "CaileySGD, lr 1.5": Run(1.5),
    "the same, start moved": Run(1.5, shift=1e-6),
    "SGDG, lr 1.5": Run(1.5, cayley(1.5)),
    "CaileySGD, lr 15": Run(15.0),
    "SGDG, lr 15": Run(15.0, cayley(15.0)),
    "Adam, lr 1/n": Run(1.0, adam(1.0)),
}


def quantized(model: LlamaForCausalLM, example: dict[str, Tensor]) -> LlamaForCausalLM:
    """The model with rotations to be trained and quantized layers, as brevitas' own script makes it."""
    with torch.no_grad(), rmsnorm_patch(model, model.config, enabled=True) as patcher:
        norms = patcher.rmsnorm_classes
        with make_dynamo_compatible(model) as traceable, dynamo_export_ctx():
            graph, _ = torch._dynamo.export(traceable.model)(**example)
    apply_layernorm_affine_merge(graph, norms)
    graph, rewriters = apply_layernorm_to_rmsnorm(graph, return_rewriters=True)
    for rewriter in fix_rewriter(rewriters, model, "weight"):
        rewriter.apply(model)
    rotation = GraphRotationEqualization(
        orphan_sink=False,
        full_rotation_method="had",
        return_rewriters=True,
        sdpa_regions=True,
        use_parametrized_rotations=True,
        delay_rewriters=True,
        extra_state_kwargs={"scale_invariant_layers": norms},
    )
    _, rewriters = rotation.apply(graph)
    model = apply_rewriters(model, fix_rewriter(rewriters, model, "weight"), delay_rewriters=False)
    quantizers = generate_quantizers(
        weight_bit_width=3,
        weight_param_method="stats",
        weight_scale_precision="float_scale",
        weight_quant_type="sym",
        weight_quant_granularity="per_channel",
        weight_group_size=HIDDEN,
        quantize_weight_zero_point=False,
        input_bit_width=4,
        input_quant_format="int",
        input_scale_precision="float_scale",
        input_scale_type="dynamic",
        input_param_method="stats",
        input_quant_type="sym",
        input_quant_granularity="per_row",
        input_group_size=HIDDEN,
    )
    layers = generate_quant_maps(**quantizers, dtype=torch.float32, device="cpu", quantize_embedding=False)
    model = layerwise_quantize(model=model, compute_layer_map=layers, name_blacklist=["lm_head"]).eval()
    with torch.no_grad():
        model(**example)  # the first pass sets the scales of the weights
    return model


@contextmanager
def timed_steps() -> Iterator[list[float]]:
    """CPU seconds of every step of an optimizer inside the block."""
    seconds, began = [], [0.0]
    before = register_optimizer_step_pre_hook(lambda *_: began.__setitem__(0, time.process_time()))
    after = register_optimizer_step_post_hook(lambda *_: seconds.append(time.process_time() - began[0]))
    try:
        yield seconds
    finally:
        before.remove()
        after.remove()


@dataclass
class Result:
    """What one run leaves behind; seconds of CPU time."""

    loss: float
    off: float
    moved: float
    optimizer_seconds: float
    seconds: float


def train(model: nn.Module, letters: Tensor, run: Run) -> float:
    """Train the rotations by brevitas, and return the CPU seconds of a step."""
    data = [{"input_ids": piece, "labels": piece} for piece in letters]
    steps = len(letters) // BATCH
    with tempfile.TemporaryDirectory() as folder:
        options = {"max_steps": steps, "per_device_train_batch_size": BATCH, "output_dir": folder}
        fixed = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "logging_strategy": "no"}
        named = {"learning_rate": run.lr, **options, **fixed}
        flags = [str(word) for name, value in named.items() for word in (f"--{name}", value)]
        start = time.process_time()
        with redirect_stdout(io.StringIO()):  # the Trainer prints its log
            apply_fine_tuning(model, None, data, default_collate, run.trainer, flags)
        return (time.process_time() - start) / steps


@torch.no_grad()
def reset(model: nn.Module, start: dict[str, Tensor], shift: float) -> list[nn.Parameter]:
    """Take the model back to its start, or near it; return the rotations."""
    model.load_state_dict(start)
    unmark(model)  # what the run before has marked
    rotations = extract_trainable_rotation_matrices(model)
    generator = torch.Generator().manual_seed(0)
    for rotation in rotations:
        rotation.add_(shift * torch.randn(rotation.shape, generator=generator))
    return rotations


def run_seed(args: argparse.Namespace, seed: int) -> dict[str, Result]:
    """Every optimizer on one model."""
    text = batches(args.pieces, torch.Generator().manual_seed(100 + seed))
    model = pretrained(args.pretraining, seed)
    exact = logits_of(model, text)
    model = quantized(model, {"input_ids": text[:2]})
    before = loss_of(logits_of(model, text), text)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    letters = batches(BATCH * args.steps, torch.Generator().manual_seed(seed))
    early = []
    for label in ("CaileySGD, lr 1.5", "SGDG, lr 1.5"):
        rotations = reset(model, start, 0.0)
        train(model, letters[: 5 * BATCH], RUNS[label])
        early.append(torch.cat([r.detach().flatten() for r in rotations]))
    apart = float((early[0] - early[1]).norm())
    print(f"seed {seed}: loss {loss_of(exact, text):.4f}, quantized {before:.4f}; CaileySGD and SGDG, lr 1.5, are")
    print(f"        {apart:.0e} apart after {min(5, args.steps)} steps", flush=True)
    results = {}
    for label, run in RUNS.items():
        rotations = reset(model, start, run.shift)
        with timed_steps() as seconds:
            whole = train(model, letters, run)
        off = max(orthogonality_error(r.detach()) for r in rotations)
        loss = loss_of(logits_of(model, text), text)
        with quantization_status_manager(
            model, disable_act_quant=True, disable_weight_quant=True, disable_bias_quant=True
        ):
            moved = float((logits_of(model, text) - exact).abs().max())
        results[label] = Result(loss, off, moved, statistics.fmean(seconds), whole)
    fused = fuse_parametrizations(model)  # the last step of brevitas: the rotations go into the weights
    assert abs(loss_of(logits_of(fused, text), text) - loss) < 1e-3
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Rotations of a quantized Llama, trained inside brevitas.")
    parser.add_argument("--steps", type=int, default=30, help="of rotation training (%(default)s)")
    parser.add_argument("--pretraining", type=int, default=150, help="steps that the model is trained (%(default)s)")
    parser.add_argument("--pieces", type=int, default=64, help="of the text, to measure on (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="models (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="seconds: two steps, one seed")
    if parser.parse_args(argv).toy:
        parser.set_defaults(steps=2, pretraining=5, pieces=4, seeds=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    runs = [run_seed(args, seed) for seed in range(args.seeds)]
    print(f"\n{'':27}{'loss':>16}{'off':>9}{'moved':>9}{'optimizer, ms':>15}{'step, ms':>10}")
    for label in RUNS:
        found = [run[label] for run in runs]
        spread = f" ± {statistics.stdev(r.loss for r in found):.4f}" if len(found) > 1 else ""
        loss = f"{statistics.fmean(r.loss for r in found):.4f}{spread}"
        off, moved = (f"{max(getattr(r, name) for r in found):.0e}" for name in ("off", "moved"))
        optimizer, step = (
            1e3 * statistics.fmean(x) for x in ([r.optimizer_seconds for r in found], [r.seconds for r in found])
        )
        print(f"{label:27}{loss:>16}{off:>9}{moved:>9}{optimizer:>15.1f}{step:>10.0f}")


if __name__ == "__main__":
    main()
