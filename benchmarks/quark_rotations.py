"""AMD Quark trains the rotations of a quantized Llama, with its own SGDG and with optimizers of this package.

    python benchmarks/quark_rotations.py

It needs amd-quark and transformers, and says so where they are not installed. The model is that of
examples/brevitas_rotations.py: two layers of width 64 that have learned the letters of examples/sentences.txt. Quark
puts a rotation on its residual stream and one on the values of each layer, in float64, and rounds the weights to 4
bits. All runs of a seed start from the same model and see the same batches; the learning rate falls linearly.

Columns: cross-entropy of the quantized model on pieces of the text, mean and standard deviation over the seeds;
distance of the rotations from orthogonality, the largest of all seeds; CPU time of a step of the optimizer.
"""

from __future__ import annotations

import argparse
import copy
import io
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from manifold_opt import Adam, mark_orthogonal, orthogonality_error
from manifold_opt.rotations import SGDG

warnings.filterwarnings("ignore")  # of Quark
try:
    from letters import BATCH, batches, logits_of, loss_of, pretrained
    from quark.torch import ModelQuantizer
    from quark.torch.algorithm.rotation import cayley
    from quark.torch.algorithm.rotation.rotation import RotationProcessor
    from quark.torch.quantization.config.config import Int4PerChannelSpec, QConfig, QLayerConfig, RotationConfig
except ModuleNotFoundError as missing:
    print(f"nothing is measured: {missing.name} is not installed; pip install amd-quark transformers")
    sys.exit(0)

LAYER = "model.layers.layer_id."
Make = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
CONTENDERS: dict[str, Make] = {
    "Quark's SGDG, lr 1.5": lambda rotations: cayley.SGDG(rotations, lr=1.5, stiefel=True),
    "SGDG, lr 1.5": lambda rotations: SGDG(rotations, lr=1.5, stiefel=True),
    "Quark's SGDG, lr 15": lambda rotations: cayley.SGDG(rotations, lr=15.0, stiefel=True),
    "SGDG, lr 15": lambda rotations: SGDG(rotations, lr=15.0, stiefel=True),
    "Adam, lr 1/n": lambda rotations: Adam([{"params": [mark_orthogonal(r)], "lr": 1 / len(r)} for r in rotations]),
}


def normalized(before: str) -> list[dict[str, object]]:
    """Where the residual stream is read in one layer, for RotationConfig."""
    attention = {
        "prev_modules": [before],
        "norm_module": LAYER + "input_layernorm",
        "next_modules": [LAYER + f"self_attn.{name}_proj" for name in "qkv"],
    }
    mlp = {
        "prev_modules": [LAYER + "self_attn.o_proj"],
        "norm_module": LAYER + "post_attention_layernorm",
        "next_modules": [LAYER + "mlp.up_proj", LAYER + "mlp.gate_proj"],
    }
    return [attention, mlp]


def quantized(model: nn.Module) -> tuple[nn.Module, list[nn.Parameter]]:
    """The model with rotated 4-bit weights, and its rotations."""
    last = {"prev_modules": [LAYER + "mlp.down_proj"], "norm_module": "model.norm", "next_modules": ["lm_head"]}
    rotation = RotationConfig(
        backbone="model",
        model_decoder_layers="model.layers",
        self_attn="self_attn",
        v_proj="self_attn.v_proj",
        o_proj="self_attn.o_proj",
        mlp="mlp",
        scaling_layers={
            "first_layer": normalized("model.embed_tokens"),
            "middle_layers": normalized("model.layers.pre_layer_id.mlp.down_proj"),
            "last_layer": [last],
        },
        r1=True,
        r2=True,
        r3=False,
        r4=False,
        trainable=True,
    )
    weights = QLayerConfig(weight=Int4PerChannelSpec(ch_axis=0, is_dynamic=True).to_quantization_spec())
    config = QConfig(global_quant_config=weights, exclude=["lm_head"], algo_config=[rotation])
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):  # its tables and progress bars
        model = ModelQuantizer(config).quantize_model(model, [torch.zeros(1, 8, dtype=torch.long)])
    return model, RotationProcessor.get_trainable_parameters(model, rotation)[0]


def run_seed(args: argparse.Namespace, seed: int) -> dict[str, tuple[float, float, float]]:
    """Loss, distance from orthogonality, and milliseconds of a step, of every optimizer on one model."""
    text = batches(args.pieces, torch.Generator().manual_seed(100 + seed))
    base, results = pretrained(args.pretraining, seed), {}
    before = loss_of(logits_of(quantized(copy.deepcopy(base))[0], text), text)
    print(f"seed {seed}: loss {loss_of(logits_of(base, text), text):.4f}, quantized {before:.4f}", flush=True)
    for label, make in CONTENDERS.items():
        model, rotations = quantized(copy.deepcopy(base))
        opt, generator, seconds = make(rotations), torch.Generator().manual_seed(seed), 0.0
        schedule = torch.optim.lr_scheduler.LinearLR(opt, 1.0, 0.01, args.steps)
        for _ in range(args.steps):
            letters = batches(BATCH, generator)
            opt.zero_grad()
            model(input_ids=letters, labels=letters, use_cache=False).loss.backward()
            start = time.process_time()
            opt.step()
            seconds += time.process_time() - start
            schedule.step()
        off = max(orthogonality_error(r.detach()) for r in rotations)
        results[label] = loss_of(logits_of(model, text), text), off, 1e3 * seconds / args.steps
    return results


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description="Rotations of a quantized Llama, trained inside AMD Quark.")
    parser.add_argument("--steps", type=int, default=30, help="of rotation training (%(default)s)")
    parser.add_argument("--pretraining", type=int, default=150, help="steps that the model is trained (%(default)s)")
    parser.add_argument("--pieces", type=int, default=64, help="of the text, to measure on (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="models (%(default)s)")
    parser.add_argument("--toy", action="store_true", help="two steps, one seed")
    if parser.parse_args(argv).toy:
        parser.set_defaults(steps=2, pretraining=5, pieces=4, seeds=1)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    logging.disable(logging.INFO)  # of Quark
    runs = [run_seed(args, seed) for seed in range(args.seeds)]
    print(f"\n{'':22}{'loss':>16}{'off':>9}{'optimizer, ms':>15}")
    for label in CONTENDERS:
        losses, offs, times = zip(*(run[label] for run in runs), strict=True)
        spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
        print(
            f"{label:22}{f'{statistics.fmean(losses):.4f}{spread}':>16}{max(offs):>9.0e}{statistics.fmean(times):>15.1f}"
        )


if __name__ == "__main__":
    main()
