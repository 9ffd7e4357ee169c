"""LoRA with orthonormal factors, by peft and the Trainer of transformers. Skipped where one of these is missing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from manifold_opt import (
    SGD,
    AdamW,
    check,
    constraint_of,
    mark_lora,
    nearest_orthogonal,
    orthogonality_error,
    riemannian_gradient,
    unmark_lora,
)
from manifold_opt.constraints.lora import FactoredLinear

from ..helpers import gaussian, rounding

peft = pytest.importorskip("peft", reason='peft is not installed: pip install ".[finetune]"')
transformers = pytest.importorskip("transformers", reason='transformers is not installed: pip install ".[finetune]"')

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),  # between peft and transformers
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
EPS = torch.finfo(torch.float32).eps


class Net(nn.Module):
    """Linear layers of several shapes: 5 is less than the rank of some tests."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 10), nn.Linear(10, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def net():
    torch.manual_seed(0)
    return Net()


def lora(base=None, seed=1, adapter="default", **options):
    """A model with LoRA; with ``init_lora_weights=False`` its second factor is not zero."""
    torch.manual_seed(seed)
    return peft.get_peft_model(base or net(), config(**options), adapter_name=adapter)


def config(**options):
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["first", "second"]} | options)


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=11, num_labels=3, **sizes))


def gpt2():
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 8}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=11, bos_token_id=0, eos_token_id=0, **sizes))


def layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def inputs(count=6):
    return gaussian(count, 12, dtype=torch.float32)


def train(model, steps=3, lr=0.05, opt=None, x=None):
    opt = opt or AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    x = inputs() if x is None else x
    for _ in range(steps):
        opt.zero_grad()
        cross_entropy(model(x), torch.arange(len(x)) % 3).backward()
        opt.step()
    return opt


def off(model):
    """The largest error of a marked parameter, in units of what rounding may leave."""
    marked = [p for p in model.parameters() if constraint_of(p) is not None]
    assert marked
    return max(orthogonality_error(p) / rounding(p) for p in marked)


def deltas(model, adapter="default"):
    return [layer.get_delta_weight(adapter) for layer in layers(model) if adapter in layer.lora_A]


def close(a, b, factor=50):
    """Equal to rounding: a few sums of at most 16 products, one after another."""
    scale = max(float(b.detach().abs().max()), 1)
    torch.testing.assert_close(a, b, rtol=0, atol=factor * torch.finfo(b.dtype).eps * scale)


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# What is marked.


def test_a_new_adapter_adds_nothing():
    model, x = lora(), inputs()
    names = mark_lora(model)
    assert names == [
        f"base_model.model.{layer}.{name}"
        for layer in ("first", "second")
        for name in ("lora_A.default.weight", "lora_B.default.basis")
    ]
    assert list(constraint_of(model)) == names
    assert torch.equal(model(x), net()(x))
    assert off(model) < 1
    for layer in layers(model):
        second = layer.lora_B["default"]
        assert not second.core.any()
        assert second.basis.shape == (layer.out_features, 4)
        assert {p.requires_grad for p in (second.basis, second.core, layer.lora_A["default"].weight)} == {True}


def test_the_first_factor_is_the_polar_factor_of_what_it_was():
    model = lora()
    before = [layer.lora_A["default"].weight.detach().clone() for layer in layers(model)]
    mark_lora(model)
    for layer, a in zip(layers(model), before, strict=True):
        torch.testing.assert_close(layer.lora_A["default"].weight.detach(), nearest_orthogonal(a))


@pytest.mark.parametrize(
    ("r", "init"),  # 7 and 14 are more than the sides of some weights
    [(1, False), (4, False), (7, False), (14, False), (4, "pissa"), (4, "olora"), (4, "orthogonal")],
)
def test_an_adapter_that_is_not_zero_computes_what_it_did(r, init):
    model, x = lora(r=r, init_lora_weights=init), inputs()
    before, result = deltas(model), model(x)
    mark_lora(model)
    for delta, old in zip(deltas(model), before, strict=True):
        close(delta, old)
    close(model(x), result)
    assert off(model) < 1


def test_it_computes_the_formula():
    model, x = lora(target_modules=["first"], init_lora_weights=False), inputs()
    mark_lora(model)
    layer = model.base_model.model.first
    u, s, vt = (t.detach().double() for t in (*layer.lora_B["default"].parameters(), layer.lora_A["default"].weight))
    w, b = (t.detach().double() for t in (layer.base_layer.weight, layer.base_layer.bias))
    close(layer(x), (x.double() @ (w + 6 / 4 * u @ s @ vt).mT + b).float())


def test_a_step_is_that_of_its_three_factors():
    """One step of SGD, with the gradients of the formula, on each factor by itself."""
    model, x = lora(target_modules=["first"], init_lora_weights=False), inputs()
    mark_lora(model)
    layer, lr = model.base_model.model.first, 0.01
    factors = (*layer.lora_B["default"].parameters(), layer.lora_A["default"].weight)
    u, s, vt = (t.detach().double().requires_grad_() for t in factors)
    weight = layer.base_layer.weight.double() + 6 / 4 * u @ s @ vt
    rest = copy.deepcopy(model.base_model.model).double()
    hidden = torch.tanh(x.double() @ weight.mT + layer.base_layer.bias.double())
    cross_entropy(rest.last(torch.tanh(rest.second(hidden))), torch.arange(6) % 3).backward()
    train(model, 1, opt=SGD([p for p in model.parameters() if p.requires_grad], lr=lr, retraction="polar"))
    torch.testing.assert_close(factors[1].detach().double(), s.detach() - lr * s.grad, rtol=0, atol=20 * EPS)
    for factor, start in ((factors[0], u), (factors[2], vt)):
        moved = nearest_orthogonal(start.detach() - lr * riemannian_gradient(start.detach(), start.grad))
        torch.testing.assert_close(factor.detach().double(), moved, rtol=0, atol=20 * EPS)


@pytest.mark.parametrize("init", [True, False])
def test_training_keeps_the_factors_orthonormal_and_the_base_as_it_was(init):
    model = lora(init_lora_weights=init)
    mark_lora(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    opt = train(model, 20)
    assert check(model, opt) == []
    assert off(model) < 1
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name
        assert p.requires_grad == ("lora_" in name)


def test_weight_decay_acts_on_the_core_only():
    """Without a gradient, decay alone multiplies it by 1 - lr * decay."""
    model = lora(init_lora_weights=False)
    mark_lora(model)
    before = copy.deepcopy(model)
    opt = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.5)
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    opt.step()
    for (name, p), old in zip(model.named_parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, old * (0.95 if name.endswith("core") else 1))


def test_marking_again_changes_no_bit():
    model = lora(init_lora_weights=False)
    mark_lora(model)
    opt = train(model)
    before = copy.deepcopy(model)
    names = mark_lora(model)
    assert len(names) == 4
    assert same(model, before)
    train(model, opt=opt)
    assert check(model, opt) == []


def test_an_optimizer_that_was_built_before_is_reported():
    model = lora()
    opt = AdamW([p for p in model.parameters() if p.requires_grad])
    mark_lora(model)
    assert len(check(model, opt)) >= 2


def test_a_copy_is_marked():
    model = lora(init_lora_weights=False)
    mark_lora(model)
    twin = copy.deepcopy(model)
    opt, other = train(model), train(twin)
    assert same(model, twin)
    assert check(model, opt) == check(twin, other) == []


# What peft does with it.


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}])
@pytest.mark.parametrize("safe", [True, False])
def test_merging_and_taking_it_out_again(options, safe):
    model, x = lora(init_lora_weights=False, **options), inputs()
    before = model(x)
    mark_lora(model)
    close(model(x), before)
    train(model)
    base, expected = net(), model(x)
    model.merge_adapter(safe_merge=safe)
    close(model(x), expected)
    model.unmerge_adapter()
    close(model(x), expected)
    with model.disable_adapter():
        close(model(x), base(x))
    merged = model.merge_and_unload(safe_merge=safe)
    close(merged(x), expected)
    assert [name for name, _ in merged.named_parameters()] == [name for name, _ in base.named_parameters()]


def test_several_adapters():
    """One with three factors beside one with two; each as if it were alone, both at once as their sum."""
    model, x = lora(init_lora_weights=False), inputs()
    torch.manual_seed(5)
    model.add_adapter("other", config(r=2, init_lora_weights=False))
    plain = deltas(model, "other")
    assert len(mark_lora(model)) == 4  # the active one
    train(model)
    assert all(isinstance(layer.lora_B["other"], nn.Linear) for layer in layers(model))
    assert all(torch.equal(a, b) for a, b in zip(deltas(model, "other"), plain, strict=True))
    model.set_adapter("other")
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == {"other"}
    before = model(x)
    assert len(mark_lora(model, "other")) == 4
    close(model(x), before)
    model.base_model.set_adapter(["default", "other"])
    both = model(x)
    first = model.base_model.model.first
    one, two = (first.get_delta_weight(name) for name in ("default", "other"))
    close(first(x), first.base_layer(x) + x @ (one + two).mT)
    mixed = model.eval()(x, adapter_names=["default"] * 3 + ["other"] * 3)
    model.set_adapter("default")
    close(model(x)[:3], mixed[:3])
    model.set_adapter("other")
    close(model(x)[3:], mixed[3:])
    model.base_model.set_adapter(["default", "other"])
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    close(model(x), both)
    model.delete_adapter("default")
    assert set(constraint_of(model)) == {
        f"base_model.model.{layer}.{name}"
        for layer in ("first", "second")
        for name in ("lora_A.other.weight", "lora_B.other.basis")
    }


@pytest.mark.parametrize("kind", ["bert", "gpt2", "activated"])
def test_models_of_transformers(kind):
    """GPT-2 has the Conv1D of transformers, whose weight is transposed. aLoRA acts after certain tokens only."""
    base, names = (bert, ["query", "value"]) if kind == "bert" else (gpt2, ["c_attn"])
    options = {"fan_in_fan_out": base is gpt2, "r": 3, "init_lora_weights": False, "target_modules": names}
    if kind == "activated":
        options |= {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [3, 4]}
    x = torch.arange(6)[None] % 11
    torch.manual_seed(1)
    model = peft.get_peft_model(base(), peft.LoraConfig(**options)).eval()
    before = model(input_ids=x).logits
    mark_lora(model)
    close(model(input_ids=x).logits, before)
    opt = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(input_ids=x).logits.square().sum().backward()
    opt.step()
    assert check(model, opt) == []
    assert off(model) < 1
    expected = model(input_ids=x).logits
    assert (expected - before).abs().max() > 1e-3
    if kind != "activated":  # which peft does not merge
        close(model.merge_and_unload()(x).logits, expected)


def test_multihead_attention():
    """Its in_proj_weight has an adapter of its own, of three projections side by side."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            return self.attention(x, x, x)[0]

    torch.manual_seed(0)
    model, x = lora(Attention(), target_modules=["attention"], r=2, init_lora_weights=False), gaussian(2, 3, 8).float()
    before = model(x)
    assert len(mark_lora(model)) == 4
    close(model(x), before)
    opt = AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model(x).square().sum().backward()
    opt.step()
    assert check(model, opt) == []
    assert off(model) < 1
    expected = model(x).detach()
    assert (expected - before).abs().max() > 1e-3
    close(model.merge_and_unload()(x), expected)


# Files.


def test_peft_reads_the_file_as_ordinary_lora(tmp_path):
    """Bit for bit, without this package; with it, the three factors bit for bit."""
    safe = pytest.importorskip("safetensors.torch")
    model, x = lora(), inputs()
    mark_lora(model)
    train(model)
    expected = model(x)
    model.save_pretrained(tmp_path)
    keys = {key.partition("first.")[2] for key in safe.load_file(tmp_path / "adapter_model.safetensors")} - {""}
    assert keys == {"lora_A.weight", "lora_B.weight", "lora_B.basis", "lora_B.core"}

    plain = peft.PeftModel.from_pretrained(net(), tmp_path)
    assert not [m for m in plain.modules() if isinstance(m, FactoredLinear)]
    assert torch.equal(plain(x), expected)

    trainable = peft.PeftModel.from_pretrained(net(), tmp_path, is_trainable=True)
    mark_lora(trainable)
    close(trainable(x), expected)
    trainable.load_adapter(tmp_path, "default", is_trainable=True)
    assert same(trainable, model)

    fresh = peft.get_peft_model(net(), peft.LoraConfig.from_pretrained(tmp_path))
    mark_lora(fresh)
    fresh.load_adapter(tmp_path, "default", is_trainable=True)
    assert same(fresh, model)
    assert torch.equal(fresh(x), expected)


def test_a_file_of_ordinary_lora_is_read_into_three_factors(tmp_path):
    """Its first factor is not orthonormal; the core takes what it lacks."""
    plain, x = lora(init_lora_weights=False, seed=7), inputs()
    plain.save_pretrained(tmp_path)
    model = lora()
    mark_lora(model)
    opt = train(model)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    close(model(x), plain(x))
    assert off(model) < 1
    train(model, opt=opt)
    assert check(model, opt) == []


def test_a_state_dict_resumes_bit_for_bit(tmp_path):
    model = lora()
    mark_lora(model)
    opt = train(model)
    torch.save({"model": model.state_dict(), "opt": opt.state_dict()}, tmp_path / "whole.pt")
    train(model, opt=opt)
    other = lora(seed=9)
    mark_lora(other)
    resumed = AdamW([p for p in other.parameters() if p.requires_grad], lr=0.05)
    saved = torch.load(tmp_path / "whole.pt", weights_only=True)
    other.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["opt"])
    train(other, opt=resumed)
    assert same(model, other)


def test_unmarking_leaves_ordinary_lora(tmp_path):
    safe = pytest.importorskip("safetensors.torch")
    model, x = lora(), inputs()
    mark_lora(model)
    train(model)
    expected = model(x)
    names = unmark_lora(model)
    assert names == [f"base_model.model.{a}.lora_{b}.default.weight" for a in ("first", "second") for b in "AB"]
    assert constraint_of(model) == {}
    assert torch.equal(model(x), expected)
    ordinary = lora()
    assert {k: v.shape for k, v in model.state_dict().items()} == {k: v.shape for k, v in ordinary.state_dict().items()}
    assert str(model) == str(ordinary)
    model.save_pretrained(tmp_path)
    keys = {key.rpartition("lora_")[2] for key in safe.load_file(tmp_path / "adapter_model.safetensors")}
    assert keys == {"A.weight", "B.weight"}
    train(model)
    assert unmark_lora(model) == []


# Precision.


def test_adapters_in_bfloat16():
    """Its factors are the rounding of what an optimizer holds in float32; peft keeps them in float32 unless asked."""
    base, x = net().bfloat16(), inputs().bfloat16()
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config(init_lora_weights=False), autocast_adapter_dtype=False)
    before = deltas(model)
    mark_lora(model)
    for delta, old in zip(deltas(model), before, strict=True):  # three factors and two products, each rounded
        assert (delta - old).norm() <= 8 * torch.finfo(torch.bfloat16).eps * old.norm()
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    opt = train(model, 20, lr=1e-3, x=x)
    assert check(model, opt) == []
    expected = model(x).detach()
    model.merge_adapter()
    close(model(x), expected, factor=8)

    upcast = peft.get_peft_model(net().bfloat16(), config(init_lora_weights=False))
    mark_lora(upcast)
    assert {p.dtype for name, p in upcast.named_parameters() if "lora_" in name} == {torch.float32}
    train(upcast, x=x)
    assert off(upcast) < 1


# The Trainer.


def trainer_of(model, folder, **options):
    data = [{"input_ids": torch.arange(6) * (k + 1) % 11, "labels": torch.tensor(k % 3)} for k in range(24)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=2,
        per_device_train_batch_size=8,
        lr_scheduler_type="cosine",
        weight_decay=0.1,
        save_strategy="epoch",
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return transformers.Trainer(
        model, arguments, train_dataset=data, optimizer_cls_and_kwargs=(AdamW, {"lr": 0.02, "orthogonal_lr_scale": 0.5})
    )


def classifier(seed=1):
    torch.manual_seed(seed)
    options = peft.LoraConfig(task_type="SEQ_CLS", r=3, target_modules=["query", "value"], lora_dropout=0.1)
    model = peft.get_peft_model(bert(), options)
    mark_lora(model)
    return model


@pytest.fixture
def _left_as_it_was(monkeypatch):
    """Accelerate, which transformers builds on, keeps its settings in class attributes and environment variables."""
    state = pytest.importorskip("accelerate.state").AcceleratorState
    state._reset_state(reset_partial_state=True)
    monkeypatch.setattr("os.environ", copy.copy(__import__("os").environ))
    yield
    state._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("_left_as_it_was")
@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"bf16": True}], ids=str)
def test_the_trainer_trains_saves_and_resumes(options, tmp_path):
    model = classifier()
    base = copy.deepcopy(model.get_base_model().bert.embeddings)
    trainer = trainer_of(model, tmp_path / "out", **options)
    trainer.train()
    opt = trainer.optimizer.optimizer
    assert isinstance(opt, AdamW)
    assert check(model, opt) == []
    assert off(model) < 1
    assert same(model.get_base_model().bert.embeddings, base)
    assert any(layer.lora_B["default"].core.any() for layer in layers(model))

    other = classifier(seed=2)
    trainer_of(other, tmp_path / "out", **options).train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert same(model, other)

    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    x = torch.arange(6)[None] % 11
    plain = peft.PeftModel.from_pretrained(bert(), tmp_path / "adapter").eval()
    unwrapped = classifier().eval()  # by Accelerate, which has replaced the forward of the model for bf16
    unwrapped.load_state_dict(model.state_dict())
    assert torch.equal(plain(x).logits, unwrapped(x).logits)
    merged = unwrapped.merge_and_unload()
    close(merged(x).logits, plain(x).logits)


# What is refused.


def broken(kind):
    """A model that cannot be marked, and what the message says."""
    if kind == "plain":
        return net(), "found no LoRA layer of peft in Net; wrap the model first"
    if kind == "convolution":
        base = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 2))
        return lora(base, target_modules=["0", "2"]), "model.0 is a peft Conv2d .* Leave it out of target_modules"
    if kind == "embedding":
        return lora(nn.Sequential(nn.Embedding(5, 8)), target_modules=["0"]), "model.0 is a peft Embedding"
    if kind == "variant":
        options = {"velora_config": peft.tuners.lora.config.VeloraConfig()}
        return lora(**options), "model.first uses VeloraLinearVariant"
    if kind == "merged":
        model = lora(init_lora_weights=False)
        model.merge_adapter()
        return model, r"model.first is merged.*call model.unmerge_adapter\(\)"
    model = lora(init_lora_weights=False)
    with torch.no_grad():
        layers(model)[1].lora_B["default"].weight[0, 0] = float("nan")
    return model, "model.second has values in lora_B that are not finite"


@pytest.mark.parametrize("kind", ["plain", "convolution", "embedding", "variant", "merged", "nan"])
def test_what_cannot_be_marked_is_an_error_that_changes_nothing(kind):
    model, message = broken(kind)
    before, description = copy.deepcopy(model.state_dict()), str(model)
    with pytest.raises(ValueError, match=f"(?s)mark_lora: .*{message}"):
        mark_lora(model)
    assert str(model) == description
    assert constraint_of(model) == {}
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("function", [mark_lora, unmark_lora])
def test_an_adapter_that_is_not_there(function):
    with pytest.raises(
        ValueError, match=f"{function.__name__}: no LoRA layer has an adapter 'mine'; there are default"
    ):
        function(lora(), "mine")
