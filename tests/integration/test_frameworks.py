"""In training loops of frameworks: Lightning, Accelerate, transformers, timm, brevitas; tried where installed."""

import copy
import os
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from manifold_opt import (
    Adam,
    AdamW,
    check,
    constraint_of,
    mark_attention,
    mark_orthogonal,
    mark_recurrent,
    orthogonal_average,
    orthogonality_error,
    project_to_manifold_,
)

from ..distributed.workers import run
from ..helpers import gaussian, point, rounding
from ..reference.cayley_sgd import CayleySGD

STEPS = 4  # an epoch


def wanted(name):
    return pytest.importorskip(name, reason=f"{name} cannot be imported; see docs/how-to for how to install it")


def off(model):
    """The largest error of a marked parameter, in units of what rounding may leave."""
    marked = [p for p in model.parameters() if constraint_of(p) is not None]
    assert marked
    return max(orthogonality_error(p) / rounding(p) for p in marked)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def sequences():
    return TensorDataset(gaussian(8 * STEPS, 5, 4, dtype=torch.float32), torch.arange(8 * STEPS) % 3)


@pytest.fixture
def _left_as_it_was():
    """Accelerate, which transformers builds on, keeps its settings in class attributes and environment variables."""
    state = wanted("accelerate.state").AcceleratorState
    before = dict(os.environ)
    state._reset_state(reset_partial_state=True)
    yield
    state._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(before)


def on_rank(environment):
    """The variables that torchrun sets, in a worker that has joined a group already."""
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    values = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "NODE_RANK": 0}
    os.environ.update({key: str(value) for key, value in values.items()} | environment)


def whole(model):
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach().clone() for p in model.parameters()]


# Lightning.

in_lightning = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning"),  # torch's, of how Lightning asks
    pytest.mark.filterwarnings("ignore:The '.*' does not have many workers"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
]


def lightning_module(seed=0):
    lightning = wanted("lightning")

    class Reader(lightning.LightningModule):
        interval = "step"

        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(4, 8, num_layers=2, batch_first=True)
            self.head = nn.Linear(8, 3)
            mark_recurrent(self)

        def training_step(self, batch, _):
            return cross_entropy(self.head(self.lstm(batch[0])[0][:, -1]), batch[1])

        def validation_step(self, *_):
            self.validated = max(orthogonality_error(self).values())

        def configure_optimizers(self):
            opt = Adam(self.parameters(), lr=0.02)
            schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
            return {"optimizer": opt, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}

        def on_train_start(self):
            self.problems = check(self, self.optimizers())  # in what Lightning wraps it

    torch.manual_seed(seed)
    return Reader()


def fit(module, folder, resume=None, precision="32-true", callbacks=()):
    lightning = wanted("lightning")
    data = sequences()
    order = DistributedSampler(data, num_replicas=1, rank=0)  # shuffles by the epoch, which Lightning tells it
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        precision=precision,
        gradient_clip_val=1.0,
        default_root_dir=folder,
        callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1), *callbacks],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(module, DataLoader(data, 8, sampler=order), DataLoader(data, 8), ckpt_path=resume)
    return trainer.optimizers[0]


def recurrent_layers_run_in_bfloat16():
    """Return True if this CPU has the instructions that torch's LSTM needs under autocast."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(4, 4)(torch.zeros(3, 1, 4))
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.filterwarnings(*(mark.args[0] for mark in in_lightning))
def test_lightning_trains_and_resumes(precision, tmp_path):
    if precision == "bf16-mixed" and not recurrent_layers_run_in_bfloat16():
        pytest.skip("torch has no bfloat16 LSTM for this CPU")
    # Lightning loads a checkpoint before it makes a module float64, which would cost the last digits.
    dtype = torch.float64 if precision == "64-true" else torch.float32
    module = lightning_module().to(dtype)
    opt = fit(module, tmp_path, precision=precision)
    assert check(module, opt) == []
    assert off(module) < 1
    other = lightning_module(seed=1).to(dtype)
    resumed = fit(other, tmp_path, resume=tmp_path / "epoch=0.ckpt", precision=precision)
    assert same(module, other)
    assert check(other, resumed) == []


@pytest.mark.filterwarnings(*(mark.args[0] for mark in in_lightning))
def test_lightning_wraps_the_optimizer_and_check_sees_through_it(tmp_path):
    module = lightning_module()
    fit(module, tmp_path)
    assert module.problems == []


@pytest.mark.filterwarnings(*(mark.args[0] for mark in in_lightning))
@pytest.mark.parametrize("kind", ["WeightAveraging", "StochasticWeightAveraging"])
@pytest.mark.parametrize("ours", [False, True])
def test_lightnings_averages(kind, ours, tmp_path):
    """They are on the manifold with our avg_fn, while they are validated too, and not without."""
    callbacks = wanted("lightning.pytorch.callbacks")
    module = lightning_module()
    options = {"avg_fn": orthogonal_average(module)} if ours else {}
    if kind == "StochasticWeightAveraging":
        options |= {"swa_lrs": 0.02, "swa_epoch_start": 1}
        module.interval = "epoch"  # the only one it takes
    opt = fit(module, tmp_path, callbacks=[getattr(callbacks, kind)(**options)])
    assert (off(module) < 1) == ours
    assert (check(module, opt) == []) == ours
    if kind == "WeightAveraging":
        assert (module.validated < 1e-5) == ours
    assert off(project_to_manifold_(module)) < 1


def sharded_in_lightning(folder, parallel):
    """Train with ModelParallelStrategy, and once more from the checkpoint of the first epoch."""
    lightning = wanted("lightning")
    warnings.simplefilter("ignore")  # Lightning's, and torch's of a mesh of one rank
    before = dict(os.environ)
    on_rank({})
    data = 1 if parallel else 2

    class Sharded(type(lightning_module())):
        def __init__(self):
            super().__init__()
            self.tail = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3))
            mark_orthogonal(self.tail[0], "weight", blocks=2)

        def configure_model(self):
            if isinstance(self.head.weight, DTensor):
                return
            if parallel:
                plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
                parallelize_module(self.tail, self.device_mesh["tensor_parallel"], plan)
            for module in (self.lstm, self.head, self.tail):  # Lightning calls no forward of the whole
                fully_shard(module, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, _):
            return cross_entropy(self.tail(self.head(self.lstm(batch[0])[0][:, -1])), batch[1])

    def fit(seed, resume=None):
        torch.manual_seed(seed)
        module = Sharded()
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            devices=2,
            strategy=lightning.pytorch.strategies.ModelParallelStrategy(data, 2 // data),
            callbacks=[lightning.pytorch.callbacks.ModelCheckpoint(folder, "{epoch}", save_top_k=-1)],
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(sequences(), 8), ckpt_path=resume)
        return module, trainer.optimizers[0]

    try:
        module, opt = fit(0)
        assert all(isinstance(p, DTensor) for p in module.parameters())
        assert module.problems == check(module, opt) == []
        other, resumed = fit(1, folder / "epoch=0.ckpt")
        assert check(other, resumed) == []
    finally:
        os.environ.clear()
        os.environ.update(before)
    assert max(orthogonality_error(module).values()) < 1e-5
    return [whole(one) for one in (module, other)]


@pytest.mark.parametrize("parallel", [False, True])
def test_lightning_shards_and_resumes(parallel, tmp_path):
    """By FSDP2, and by tensor parallelism. The resumed run ends with the same bits, on both ranks."""
    wanted("lightning")
    results = [weights for rank in run(2, sharded_in_lightning, tmp_path, parallel) for weights in rank]
    for weights in results:
        assert all(map(torch.equal, weights, results[0]))


# Accelerate.


class Accelerated:
    """A model with everything that Accelerate prepares for it."""

    def __init__(self, precision, seed):
        accelerate = wanted("accelerate")
        torch.manual_seed(seed)
        self.plain = nn.Sequential(nn.Flatten(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
        mark_orthogonal(self.plain[1], "weight", blocks=2)
        self.inner = Adam(self.plain.parameters(), lr=0.02)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.inner, 0.9)
        self.accelerator = accelerate.Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=2)
        self.model, self.opt, self.schedule, self.batches = self.accelerator.prepare(
            self.plain, self.inner, schedule, DataLoader(sequences(), 8)
        )

    def train(self):
        for x, y in self.batches:
            with self.accelerator.accumulate(self.model):
                self.accelerator.backward(cross_entropy(self.model(x), y))
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
                self.opt.step()
                self.schedule.step()
                self.opt.zero_grad()


@pytest.mark.usefixtures("_left_as_it_was")
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate_trains_and_resumes(precision, tmp_path):
    run, other = Accelerated(precision, seed=0), Accelerated(precision, seed=1)
    run.train()
    run.accelerator.save_state(tmp_path)
    run.train()
    other.accelerator.load_state(tmp_path)
    other.train()
    assert same(run.plain, other.plain)
    assert off(run.plain) < 1
    assert run.opt.optimizer is run.inner
    assert check(run.model, run.opt) == check(run.model, run.inner) == []


def sharded_by_accelerate(folder, meta):
    """Train with FSDP2. Accelerate shards after the optimizer is made, and gives it the new parameters."""
    accelerate, states = wanted("accelerate"), wanted("accelerate.state")
    before = dict(os.environ)
    on_rank({"ACCELERATE_USE_CPU": "1"})
    states.AcceleratorState._reset_state(reset_partial_state=True)
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 3))
    mark_orthogonal(plain[1], "weight", blocks=2)
    alone = copy.deepcopy(plain)
    try:
        plugin = accelerate.FullyShardedDataParallelPlugin(
            fsdp_version=2, cpu_ram_efficient_loading=meta, state_dict_type="SHARDED_STATE_DICT"
        )
        accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
        # It shards on accelerators only, and chooses DDP on a CPU. The code that shards runs on a CPU too.
        kind = accelerate.DistributedType.FSDP
        accelerator.state.distributed_type = states.PartialState._shared_state["distributed_type"] = kind
        accelerator.state.fsdp_plugin = plugin
        model, opt = accelerator.prepare(plain, Adam(plain.parameters(), lr=0.02))
        accelerator.clip_grad_norm_(model.parameters(), 1.0)

        def train(model, opt, backward, rank, ranks):
            for x, y in DataLoader(sequences(), 8):
                opt.zero_grad()
                backward(cross_entropy(model(x.chunk(ranks)[rank]), y.chunk(ranks)[rank]))
                opt.step()

        train(model, opt, accelerator.backward, accelerator.process_index, 2)
        assert all(isinstance(p, DTensor) for p in model.parameters())
        assert check(model, opt.optimizer) == []
        assert max(orthogonality_error(model).values()) < 1e-5
        train(alone, Adam(alone.parameters(), lr=0.02), torch.Tensor.backward, 0, 1)
        for one, other in zip(whole(model), whole(alone), strict=True):
            torch.testing.assert_close(
                one, other, rtol=0, atol=1e-5
            )  # gradients of a few 1e-3 are divided by their size
        accelerator.save_state(folder)
        train(model, opt, accelerator.backward, accelerator.process_index, 2)
        through = whole(model)
        accelerator.load_state(folder)
        train(model, opt, accelerator.backward, accelerator.process_index, 2)
    finally:
        states.AcceleratorState._reset_state(reset_partial_state=True)
        os.environ.clear()
        os.environ.update(before)
    return all(map(torch.equal, through, whole(model)))


@pytest.mark.parametrize("meta", [False, True])
def test_accelerate_shards_and_resumes(meta, tmp_path):
    """With the weights on each rank, and with those of the first rank only."""
    wanted("accelerate")
    assert run(2, sharded_by_accelerate, str(tmp_path), meta) == [True, True]


# transformers.


def gpt2(seed=0):
    transformers = wanted("transformers")
    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        vocab_size=6,
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=2,
        num_labels=3,
        pad_token_id=5,
        bos_token_id=None,
        eos_token_id=None,
    )
    return transformers.GPT2ForSequenceClassification(config)


def mark_heads(model):
    for block in model.transformer.h:
        mark_orthogonal(block.attn.c_attn, "weight", blocks=6, dim=1, which=range(4))
    return model


def trainer_of(model, folder):
    transformers = wanted("transformers")
    tokens = torch.arange(8 * STEPS * 6).view(-1, 6) % 5
    data = [{"input_ids": row, "labels": torch.tensor(k % 3)} for k, row in enumerate(tokens)]
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=3,
        per_device_train_batch_size=8,
        learning_rate=0.02,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        save_strategy="epoch",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    return transformers.Trainer(
        model, options, train_dataset=data, optimizer_cls_and_kwargs=(AdamW, {"lr": 0.02, "retraction": "polar"})
    )


@pytest.mark.usefixtures("_left_as_it_was")
def test_transformers_trains_and_resumes(tmp_path):
    model = mark_heads(gpt2())
    trainer = trainer_of(model, tmp_path)
    with pytest.raises(ValueError, match="the Trainer has no optimizer yet"):
        check(trainer)
    trainer.train()
    opt = trainer.optimizer.optimizer
    assert isinstance(opt, AdamW)
    assert check(trainer) == check(model, opt) == []
    assert off(model) < 1
    assert [(g["weight_decay"], g["retraction"]) for g in opt.param_groups] == [(0.1, "polar"), (0.0, "polar")]
    other = mark_heads(gpt2(seed=1))
    trainer_of(other, tmp_path).train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS}"))
    assert same(model, other)


@pytest.mark.usefixtures("_left_as_it_was")
def test_from_pretrained_brings_other_parameters_which_an_optimizer_marks(tmp_path):
    mark_heads(gpt2()).save_pretrained(tmp_path)
    GPT2 = wanted("transformers").GPT2ForSequenceClassification  # noqa: N806

    class Marked(GPT2):
        def __init__(self, config):
            super().__init__(config)
            mark_heads(self)

    model = Marked.from_pretrained(tmp_path)
    problems = check(model, torch.optim.AdamW(model.parameters()))
    assert len(problems) == 2
    assert all("has lost its constraint" in problem for problem in problems)
    before = copy.deepcopy(model)
    assert check(model, AdamW(model.parameters())) == []  # the values were on the manifold when they were saved
    assert len(constraint_of(model)) == 2
    mark_heads(model)
    assert same(before, model)


# timm.


def vision_transformer(seed=0):
    timm = wanted("timm")
    torch.manual_seed(seed)
    model = timm.models.VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    for block in model.blocks:
        mark_orthogonal(block.attn.qkv, "weight", blocks=6, which=range(4))
    return model


def optimizer_of(model):
    return AdamW(wanted("timm.optim").param_groups_weight_decay(model, weight_decay=0.05), lr=0.01)


def look(model, opt, steps, first=0):
    for step in range(first, first + steps):
        opt.zero_grad()
        cross_entropy(model(gaussian(4, 3, 8, 8, dtype=torch.float32, seed=step)), torch.arange(4) % 3).backward()
        opt.step()
        yield step


def test_timm_trains_and_resumes(tmp_path):
    utils, models = wanted("timm.utils"), wanted("timm.models")
    model = vision_transformer()
    opt = optimizer_of(model)
    assert sorted(g["weight_decay"] for g in opt.param_groups) == [0.0, 0.05]
    averaged = utils.ModelEmaV3(model, decay=0.5)
    for step in look(model, opt, 4):
        averaged.update(model, step)
    assert check(model, opt) == []
    assert off(model) < 1
    assert off(averaged.module) > 1
    assert off(project_to_manifold_(averaged.module)) < 1
    utils.CheckpointSaver(model, opt, checkpoint_dir=str(tmp_path)).save_checkpoint(0)
    other = vision_transformer(seed=1)
    resumed = optimizer_of(other)
    models.resume_checkpoint(other, str(tmp_path / "last.pth.tar"), resumed, log_info=False)
    for _ in zip(look(model, opt, 3, 4), look(other, resumed, 3, 4), strict=True):
        pass
    assert same(model, other)
    assert check(other, resumed) == []


def test_mark_attention_finds_none_of_timms():
    with pytest.raises(ValueError, match=r"blocks=3 \* heads"):
        mark_attention(vision_transformer())


def test_safetensors_saves_the_state_of_an_optimizer(tmp_path):
    """It refuses tensors that share memory. What it loads resumes bit for bit."""
    safe = wanted("safetensors.torch")

    def start():
        torch.manual_seed(0)
        model = nn.Sequential(nn.GRU(4, 6), nn.GRU(6, 6))
        mark_recurrent(model)
        return model, Adam(model.parameters(), lr=1e-2)

    def train(model, opt, seed):
        for k, p in enumerate(model.parameters()):
            p.grad = gaussian(*p.shape, dtype=torch.float32, seed=seed + k)
        opt.step()

    (model, opt), (other, resumed) = start(), start()
    train(model, opt, 0)
    whole = opt.state_dict()
    entries = {f"{i} {key}": value for i, state in whole["state"].items() for key, value in state.items()}
    safe.save_file(entries, tmp_path / "opt.safetensors")
    state = {}
    for name, value in safe.load_file(tmp_path / "opt.safetensors").items():
        state.setdefault(int(name.split()[0]), {})[name.split()[1]] = value
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict({"state": state, "param_groups": whole["param_groups"]})
    train(model, opt, 50)
    train(other, resumed, 50)
    assert same(model, other)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("draw", [1, 2])
def test_the_class_of_brevitas_takes_the_steps_of_the_reference(momentum, draw, monkeypatch):
    """It is the published one; the reference in tests/reference/ was written without it. A draw of 1 is a QR step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its imports
        cailey_sgd = wanted("brevitas.optim.cailey_sgd")
    monkeypatch.setattr(cailey_sgd.random, "randint", lambda *_: draw)
    theirs, ours = (nn.Parameter(point(6, 6)) for _ in range(2))
    optimizers = [cailey_sgd.CaileySGD([theirs], 1.5, momentum, stiefel=True), CayleySGD.shipped([ours], 1.5, momentum)]
    optimizers[1].qr_chance = float(draw == 1)
    for seed in range(1, 6):
        theirs.grad = gaussian(6, 6, seed=seed)
        ours.grad = theirs.grad.clone()
        for opt in optimizers:
            opt.step()
    atol = 1e-12 if draw > 1 else 1e-5  # its QR decompositions are in float32
    torch.testing.assert_close(theirs.detach(), ours.detach(), rtol=0, atol=atol)
    assert optimizers[1].cut == 5
