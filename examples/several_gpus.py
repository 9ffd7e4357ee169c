"""A sharded transformer and GRU with orthogonal weights, on any number of GPUs, or of processes on a CPU.

Run it on the CPU as it stands; it needs nothing but torch and this package:

    python examples/several_gpus.py
    torchrun --standalone --nproc_per_node=4 examples/several_gpus.py

What it shows: a model with two transformer layers, whose queries and keys are orthogonal in every head, and a GRU with
one orthogonal matrix per gate. The model is marked, then sharded by fully_shard (FSDP2), and trained by Adam: three
changed lines, as on one GPU (look for "change 1 of 3"). The task is to predict the next character of 96 sentences.
Every rank gets its share of the same batches, so that the run is the same on any number of ranks, to rounding.

It prints the loss; how far that is from the loss of the same model, unsharded in one process; the largest orthogonality
error; and the bytes that a rank sends. Half way it writes a checkpoint with torch.distributed.checkpoint. At the end
another model loads the checkpoint and trains the second half again. ``--load`` continues from a checkpoint that was
written on another number of ranks.

What to expect, in half a minute on two cores:

- The losses differ from those of one process by less than 1e-5.
- Heads and gates are orthogonal to 1e-6 after every step.
- On 4 ranks the heads lie whole inside the shards, and a step sends nothing for them. The gates are cut: their
  gradients are sent to their owners, and their values back.
- The second half after the checkpoint ends with the same bits.

More in docs/examples/several_gpus.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F  # noqa: N812  (its usual name)
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_opt import Adam, check, constraint_of, mark_attention, mark_recurrent, orthogonality_error

TEXT = Path(__file__).with_name("sentences.txt")


class Reader(nn.Module):
    """Predicts the next character: transformer layers, then a GRU.

    Attention has no biases. The gradient of the bias of the keys is zero but for rounding. Adam scales that up to steps
    as long as the learning rate, and runs on different numbers of ranks would differ.
    """

    def __init__(self, characters: int, length: int, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.positions = nn.Parameter(0.02 * torch.randn(length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True, bias=False
            )
            for _ in range(depth)
        )
        self.rnn = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, characters)
        self.register_buffer("mask", torch.full((length, length), -torch.inf).triu(1))  # hides later characters

    def forward(self, x: Tensor) -> Tensor:
        """Characters ``(batch, length)`` to logits ``(batch, length, characters)``."""
        tokens = self.embedding(x) + self.positions
        for layer in self.layers:
            tokens = layer(tokens, src_mask=self.mask)
        return self.head(self.rnn(tokens)[0])


class Traffic(TorchDispatchMode):
    """Counts the collectives in a block of code, and the bytes that this rank sends to others.

    All-gather, reduce-scatter and all-reduce are counted as rings send them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.sent = 0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            ranks = dist.get_world_size()
            self.calls += 1
            if "alltoall" in name:
                _, given, _, _, splits = args[:5]
                self.sent += given.nbytes - given.itemsize * splits[dist.get_rank()]
            elif "allgather" in name:
                self.sent += (ranks - 1) * args[1].nbytes
            elif "reduce_scatter" in name:
                self.sent += (ranks - 1) * args[0].nbytes
            elif "allreduce" in name:
                self.sent += 2 * (ranks - 1) / ranks * args[0][0].nbytes
        return func(*args, **(kwargs or {}))


class Run:
    """A model, its optimizer, and what this rank does with a batch.

    Attributes:
        model: a whole model, or one that is sharded over all ranks.
        opt: its optimizer.
        rank, ranks: which share of a batch this rank has. The whole batch, if the model is whole.
        passes, steps: what was sent in the forward and backward passes, and in the steps of the optimizer.
    """

    def __init__(
        self, args: argparse.Namespace, characters: int, device: torch.device, *, sharded: bool, seed: int
    ) -> None:
        torch.manual_seed(seed)
        self.model = Reader(characters, args.length, args.width, args.heads, args.depth).to(device)
        mark_attention(self.model, which="qk")  # change 1 of 3
        mark_recurrent(self.model)  # change 2 of 3
        self.rank, self.ranks = 0, 1
        if sharded:
            self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
            mesh = init_device_mesh(device.type, (self.ranks,))
            for layer in [*self.model.layers, self.model.rnn, self.model]:
                fully_shard(layer, mesh=mesh)
        self.opt = Adam(self.model.parameters(), lr=args.lr)  # change 3 of 3: was torch.optim.Adam
        self.passes, self.steps = Traffic(), Traffic()

    def step(self, x: Tensor, y: Tensor) -> float:
        """Train on this rank's share of a batch. Return the mean loss of the whole batch."""
        x, y = x.chunk(self.ranks)[self.rank], y.chunk(self.ranks)[self.rank]
        self.opt.zero_grad()
        with self.passes:
            loss = F.cross_entropy(self.model(x).flatten(0, 1), y.flatten())
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        with self.steps:
            self.opt.step()
        total = loss.detach()
        if self.ranks > 1:
            dist.all_reduce(total)
        return float(total) / self.ranks

    def state(self) -> dict[str, Any]:
        """Return the state of model and optimizer, to be saved or loaded into. Every rank has to call it."""
        model, optimizer = get_state_dict(self.model, self.opt)
        return {"model": model, "optimizer": optimizer}

    def load(self, folder: Path) -> None:
        """Load a checkpoint that was written on any number of ranks. Every rank has to call it."""
        state = self.state()
        dcp.load(state, checkpoint_id=folder)
        set_state_dict(self.model, self.opt, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def batches(args: argparse.Namespace, device: torch.device) -> tuple[int, list[tuple[Tensor, Tensor]]]:
    """Return the number of characters, and a batch per step: texts, and the same one character later."""
    text = TEXT.read_text(encoding="utf-8")
    numbers = {character: k for k, character in enumerate(sorted(set(text)))}
    data = torch.tensor([numbers[character] for character in text])
    generator = torch.Generator().manual_seed(args.seed)
    starts = torch.randint(len(data) - args.length, (args.steps, args.batch_size, 1), generator=generator)
    drawn = data[starts + torch.arange(args.length + 1)].to(device)
    return len(numbers), [(some[:, :-1], some[:, 1:]) for some in drawn]


def say(text: str) -> None:
    """Print on one rank."""
    if dist.get_rank() == 0:
        print(text, flush=True)


def train(run: Run, args: argparse.Namespace, data: list[tuple[Tensor, Tensor]], alone: list[float]) -> None:
    """Train the sharded model, print what happens, and write a checkpoint half way.

    Args:
        run: the sharded model.
        args: the options.
        data: the batches.
        alone: the losses of one process; on rank 0.
    """
    entries = sum(p.numel() for p in run.model.parameters())
    marked = sum(p.numel() for p in run.model.parameters() if constraint_of(p) is not None)
    say(
        f"ranks: {run.ranks}; parameters: {entries:,}, {marked:,} of them in marked weights\n"
        "\n                   difference from  orthogonality       kB sent by a rank\n"
        "step       loss        one process          error   opt.step()  forward, backward"
    )
    for k in range(args.steps // 2 if args.load else 0, args.steps):
        run.passes, run.steps = Traffic(), Traffic()
        loss = run.step(*data[k])
        if k + 1 == args.steps // 2:
            dcp.save(run.state(), checkpoint_id=args.checkpoint)
        if (k + 1) % args.every == 0:
            error = max(orthogonality_error(run.model).values())  # a collective: every rank calls it
            apart = f"{abs(loss - alone[k]):.0e}" if alone else ""
            sent = f"{run.steps.sent / 1e3:12.1f} {run.passes.sent / 1e3:18.1f}"
            say(f"{k + 1:4} {loss:10.6f} {apart:>18} {error:14.0e} {sent}")
    say(f"\ncollectives in opt.step(): {run.steps.calls}")


def resumes_with_same_bits(run: Run, other: Run, args: argparse.Namespace, data: list[tuple[Tensor, Tensor]]) -> bool:
    """Load the checkpoint into the other model, train the second half again, and compare on all ranks."""
    other.load(args.checkpoint)
    for k in range(args.steps // 2, args.steps):
        other.step(*data[k])
    pairs = zip(run.model.parameters(), other.model.parameters(), strict=True)
    same = all(torch.equal(p.to_local(), q.to_local()) for p, q in pairs)
    count = torch.tensor(int(same), device=data[0][0].device)
    dist.all_reduce(count)
    return int(count) == dist.get_world_size()


def start() -> torch.device:
    """Join the other processes. Return the device of this one."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
    backend = "nccl" if device.type == "cuda" else "gloo"
    if "RANK" in os.environ:  # set by torchrun
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Train a sharded model with orthogonal heads and gates.")
    add = parser.add_argument
    add("--steps", type=int, default=40, help="of training (%(default)s)")
    add("--batch-size", type=int, default=16, help="texts per step, of all ranks together (%(default)s)")
    add("--length", type=int, default=24, help="characters of a text (%(default)s)")
    add("--lr", type=float, default=2e-3, help="learning rate (%(default)s)")
    add("--width", type=int, default=64, help="of a token (%(default)s)")
    add("--heads", type=int, default=4, help="of a layer (%(default)s)")
    add("--depth", type=int, default=2, help="transformer layers (%(default)s)")
    add("--every", type=int, default=10, help="steps from one line to the next (%(default)s)")
    add("--seed", type=int, default=0, help="of the start and the batches (%(default)s)")
    add("--checkpoint", type=Path, help="folder for the checkpoint (a temporary one)")
    add("--load", type=Path, help="folder of a checkpoint, with the same other options, to train the second half from")
    add("--toy", action="store_true", help="seconds, to see that it runs")
    asked = parser.parse_args(argv)
    if asked.toy:
        parser.set_defaults(steps=6, width=16, length=8, every=3)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Train the model alone, then sharded, then once more from the checkpoint."""
    args = parse(argv)
    torch.set_num_threads(1)  # products this small are slower on several threads
    device = start()
    if args.batch_size % dist.get_world_size():
        raise SystemExit(f"--batch-size must be a multiple of the number of ranks, {dist.get_world_size()}")
    folder = tempfile.TemporaryDirectory()
    shared = [str(args.checkpoint or folder.name)]
    dist.broadcast_object_list(shared)  # every rank writes to the folder of rank 0
    args.checkpoint = Path(shared[0])
    characters, data = batches(args, device)
    alone = []
    if dist.get_rank() == 0:
        reference = Run(args, characters, device, sharded=False, seed=args.seed)
        alone = [reference.step(*batch) for batch in data]
    run = Run(args, characters, device, sharded=True, seed=args.seed)
    if args.load:
        run.load(args.load)
    train(run, args, data, alone)
    problems = check(run.model, run.opt)  # a collective too
    say(f"check: {problems or 'no problems'}")
    if not args.load:
        other = Run(args, characters, device, sharded=True, seed=args.seed + 1)
        same = resumes_with_same_bits(run, other, args, data)
        say(f"resumed from the checkpoint: {'the same bits' if same else 'other bits'}")
    dist.barrier()
    dist.destroy_process_group()
    folder.cleanup()


if __name__ == "__main__":
    main()
