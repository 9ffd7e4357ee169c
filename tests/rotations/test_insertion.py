"""Insertion changes no function, merging neither, and learning is that of float64."""

import copy
import pickle

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, mark_spectral, orthogonality_error
from manifold_opt.rotations import (
    RotatedLinear,
    RotationBank,
    RoundToNearest,
    insert_rotations,
    merge_rotations,
    round_linears_,
    simulate_rounding,
)

from ..helpers import gaussian, seeded
from ..reference.llama import TOKENS, Llama, RMSNorm

# Relative change of the logits in float32: some 10 roundings of eps in each of two layers, times a factor.
ROUNDING = 1e-5


def change(a, b):
    return float(((a - b).norm() / b.norm()).detach())


@pytest.mark.parametrize(
    "options", [{}, {"residual": None}, {"heads": None}, {"residual": "haar", "heads": "identity"}]
)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_the_function_stays_the_same(bias, tied, options):
    model = Llama(bias=bias, tied=tied)
    before, names = model(TOKENS), [name for name, _ in model.named_parameters(remove_duplicate=False)]
    bank = insert_rotations(model, generator=seeded(), **options)
    assert list(bank.parameters()) == [p for p in model.parameters() if p.requires_grad]
    assert change(model(TOKENS), before) < ROUNDING
    assert merge_rotations(model) is model
    assert change(model(TOKENS), before) < ROUNDING
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
    assert all(p.requires_grad for p in model.parameters())
    rotated = "residual" in bank
    assert model.config.tie_word_embeddings is (tied and not rotated)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is (tied and not rotated)


def test_merged_weights_by_hand():
    """Norms are folded into the readers; R1 is on both sides; R2 of each head is in v_proj and, repeated, in o_proj."""
    model = Llama()
    plain = copy.deepcopy(model).double().model.layers[1]
    bank = insert_rotations(model)
    r = bank["residual"].detach().double()
    heads = bank["heads_1"].detach().double().unflatten(0, (2, 4))
    merge_rotations(model)
    layer = model.double().model.layers[1]
    g = plain.input_layernorm.weight
    values = torch.block_diag(*heads).mT @ (plain.self_attn.v_proj.weight * g @ r)
    out = r.mT @ plain.self_attn.o_proj.weight @ torch.block_diag(heads[0], heads[0], heads[1], heads[1])
    torch.testing.assert_close(layer.self_attn.v_proj.weight, values, atol=1e-6, rtol=0)
    torch.testing.assert_close(layer.self_attn.o_proj.weight, out, atol=1e-6, rtol=0)
    torch.testing.assert_close(
        layer.mlp.up_proj.weight,
        plain.mlp.up_proj.weight * plain.post_attention_layernorm.weight @ r,
        atol=1e-6,
        rtol=0,
    )
    torch.testing.assert_close(layer.mlp.down_proj.weight, r.mT @ plain.mlp.down_proj.weight, atol=1e-6, rtol=0)
    assert torch.equal(layer.input_layernorm.weight, torch.ones(16).double())


def spread(bank):
    """A loss of the rotations themselves, which has an optimum: no rotation changes the function of the model."""
    return sum(bank[name].pow(4).sum() for name in bank)


def loss_of(model):
    return nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.roll(-1, 1).flatten())


@pytest.mark.parametrize("rounding", [None, RoundToNearest(8)])
def test_the_steps_are_those_of_float64(rounding):
    """Steps of SGD, along the fourth powers of the entries, and through the rounded weights."""
    banks, losses = [], []
    for dtype in (torch.float32, torch.float64):
        model = Llama(bias=True).to(dtype)
        bank = insert_rotations(model, residual="haar", heads="haar", generator=seeded())
        simulate_rounding(model, weights=rounding)
        opt = SGD(bank.parameters(), lr=0.01, momentum=0.9)
        for _ in range(5):
            opt.zero_grad()
            loss = loss_of(model) + spread(bank)
            loss.backward()
            opt.step()
        banks.append(bank)
        losses.append(float(loss.detach()))
    single, double = banks
    assert double["residual"].dtype == torch.float64
    # Through rounding an entry half way between two numbers of the grid may go either way: one of 127 levels.
    off = 1e-5 if rounding is None else 1e-3
    assert losses[0] == pytest.approx(losses[1], rel=off)
    for name in single:
        torch.testing.assert_close(single[name].double(), double[name], atol=off, rtol=0)


def test_learning_for_a_rounded_model():
    rounding = RoundToNearest(4)
    model = Llama()
    bank = insert_rotations(model, generator=seeded())
    exact = model(TOKENS).detach()
    simulate_rounding(model, weights=rounding, inputs=rounding)
    opt = Adam(bank.parameters(), lr=0.01)
    losses = []
    for _ in range(40):
        opt.zero_grad()
        loss = (model(TOKENS) - exact).square().mean()
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
    assert min(losses[-5:]) < losses[0]
    assert max(orthogonality_error(bank).values()) < 1e-5
    rounded = model(TOKENS)
    simulate_rounding(model)
    exact = model(TOKENS)
    merge_rotations(model)
    assert change(model(TOKENS), exact) < ROUNDING
    round_linears_(model, rounding, inputs=rounding)
    # An entry half way between two numbers may be rounded to either.
    assert change(model(TOKENS), rounded) < 0.05
    assert change(exact, rounded) > 0.1


def test_the_output_layer_is_rounded_if_asked():
    model = Llama()
    insert_rotations(model)
    simulate_rounding(model, weights=RoundToNearest(4))
    assert model.lm_head.round_weight is None
    assert model.model.layers[0].mlp.up_proj.round_weight == RoundToNearest(4)
    simulate_rounding(model, weights=RoundToNearest(4), skip=())
    assert model.lm_head.round_weight == RoundToNearest(4)


def test_parameters_that_were_frozen_stay_frozen():
    model = Llama()
    model.model.embed_tokens.requires_grad_(False)
    insert_rotations(model)
    merge_rotations(model)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["model.embed_tokens.weight"]


def test_bfloat16():
    """The rotations are in float32; the rotated weights are rounded to bfloat16 once, eps 2^-7."""
    model = Llama().bfloat16()
    before = model(TOKENS)
    bank = insert_rotations(model)
    assert bank["residual"].dtype == torch.float32
    assert model(TOKENS).dtype == torch.bfloat16
    assert change(model(TOKENS).float(), before.float()) < 4 * 2**-7
    merge_rotations(model)
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert change(model(TOKENS).float(), before.float()) < 4 * 2**-7


@pytest.mark.filterwarnings("ignore:torch.optim.sgd.SGD has moved a marked parameter")
def test_a_rotation_that_is_not_orthogonal_is_not_merged():
    model = Llama()
    bank = insert_rotations(model)
    opt = torch.optim.SGD(bank.parameters(), lr=1.0)
    spread(bank).backward()
    opt.step()
    before = model(TOKENS)
    with pytest.raises(ValueError, match=r"'residual' is not orthogonal.*Train it with an optimizer of manifold_opt"):
        merge_rotations(model)
    assert torch.equal(model(TOKENS), before)


def test_a_merge_that_fails_changes_nothing(monkeypatch):
    model = Llama()
    insert_rotations(model)
    before = model(TOKENS)

    def fail(_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(RotatedLinear, "merged", fail)
        with pytest.raises(torch.OutOfMemoryError):
            merge_rotations(model)
    assert torch.equal(model(TOKENS), before)
    merge_rotations(model)
    assert change(model(TOKENS), before) < ROUNDING


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.module = model


class Delegating(Wrapper):
    """A wrapper that has the attributes of the model inside, as that of peft."""

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(next(iter(self._modules.values())), name)


@pytest.mark.parametrize("wrap", [Wrapper, Delegating])
def test_a_wrapped_model_is_merged_whole(wrap):
    model = Llama(tied=True)
    before = model(TOKENS)
    insert_rotations(model)
    merge_rotations(wrap(model))
    assert not hasattr(model, "rotations")
    assert all(p.requires_grad for p in model.parameters())
    assert model.config.tie_word_embeddings is False
    assert change(model(TOKENS), before) < ROUNDING
    insert_rotations(model)


def test_an_optimizer_made_before_moves_nothing():
    model = Llama()
    opt = torch.optim.SGD(model.parameters(), lr=0.1)
    loss_of(model).backward()
    insert_rotations(model)
    before = model(TOKENS)
    opt.step()
    assert torch.equal(model(TOKENS), before)


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_is_kept(training):
    model = Llama().train(training)
    insert_rotations(model)
    assert all(layer.training is training for layer in model.modules() if not isinstance(layer, RotationBank))
    merge_rotations(model)
    assert all(layer.training is training for layer in model.modules())


class LayerNormed(Llama):
    def __init__(self):
        super().__init__()
        self.model.layers[1].post_attention_layernorm = nn.LayerNorm(16)


def fused():
    model = Llama()
    attention = model.model.layers[0].self_attn
    attention.qkv_proj = nn.Linear(16, 32)
    del attention.q_proj
    return model


def further():
    model = Llama()
    model.model.layers[0].mlp.router = nn.Linear(16, 2)
    return model


class Shifted(RMSNorm):
    def forward(self, x):
        return (1 + self.weight) * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Centered(RMSNorm):
    def forward(self, x):
        return super().forward(x - x.mean(-1, keepdim=True))


def with_norm(kind, weight):
    model = Llama()
    model.model.norm = kind(16)
    model.model.norm.weight.data.fill_(weight)
    return model


def gated():
    """An attention whose queries have a gate of the values beside them."""
    model = Llama()
    model.model.layers[1].self_attn.q_proj = nn.Linear(16, 32, bias=False)
    return model


def without_width():
    model = Llama()
    del model.model.layers[0].self_attn.head_dim
    return model


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (LayerNormed, r"post_attention_layernorm \(LayerNorm\) is not RMSNorm"),
        (fused, "no model.layers.0.self_attn.q_proj with parameters"),
        (further, "it has model.layers.0.mlp.router, which is not known"),
        (lambda: with_norm(Shifted, 60.0), r"model.norm \(Shifted\) is not RMSNorm with a factor"),
        (lambda: with_norm(Centered, 0.02), r"model.norm \(Centered\) is not RMSNorm with a factor"),
        (gated, "the sizes of the projections in model.layers.1.self_attn"),
        (without_width, "the heads of model.layers.0.self_attn have no width head_dim"),
        (lambda: Llama().model, "no model.layers.0 with parameters. Pass the language model itself"),
    ],
)
def test_other_structures_are_refused(build, message):
    model = build()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        insert_rotations(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(map(torch.equal, after.values(), before.values()))


def quantized(layer):
    layer.weight = nn.Parameter(torch.ones(layer.weight.shape, dtype=torch.uint8), requires_grad=False)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (quantized, "Rotate before a model is quantized"),
        (lambda layer: mark_spectral(layer, "weight"), "Call unmark on it first"),
        (nn.utils.parametrizations.weight_norm, "is not like a causal Llama model"),
        (lambda layer: layer.to("meta"), "Load the model onto one device first"),
    ],
)
def test_weights_that_cannot_be_rotated_are_refused(prepare, message):
    model = Llama()
    prepare(model.model.layers[1].mlp.up_proj)
    with pytest.raises(ValueError, match=message):
        insert_rotations(model)
    assert isinstance(model.model.layers[0].mlp.up_proj, nn.Linear)
    assert not torch.equal(model.model.norm.weight, torch.ones(16))


def test_layer_norm_takes_rotations_of_heads():
    model = LayerNormed()
    before = model(TOKENS)
    insert_rotations(model, residual=None)
    assert change(model(TOKENS), before) < ROUNDING


def test_calls_in_the_wrong_order():
    model = Llama()
    for function in (merge_rotations, simulate_rounding):
        with pytest.raises(ValueError, match="rotated"):
            function(model)
    insert_rotations(model)
    with pytest.raises(ValueError, match="Call merge_rotations"):
        insert_rotations(model)
    with pytest.raises(ValueError, match="both None"):
        insert_rotations(Llama(), residual=None, heads=None)
    with pytest.raises(ValueError, match="Call merge_rotations"):
        round_linears_(model, RoundToNearest(4))


def test_layers_of_other_models_one_by_one():
    """The values of an attention layer of another architecture, whose heads cancel in its output projection."""
    values, out, x = nn.Linear(12, 12), nn.Linear(12, 5), gaussian(7, 12, dtype=torch.float32)
    bank = RotationBank()
    bank.add("heads", 4, blocks=3)
    net = nn.Sequential(RotatedLinear(values, bank, outputs="heads"), RotatedLinear(out, bank, inputs="heads"))
    torch.testing.assert_close(net(x), out(values(x)), atol=1e-5, rtol=0)
    torch.testing.assert_close(net[0](x), bank(values(x), "heads"), atol=1e-5, rtol=0)
    merge_rotations(net)
    assert [type(layer) for layer in net] == [nn.Linear, nn.Linear]
    torch.testing.assert_close(net(x), out(values(x)), atol=1e-5, rtol=0)


def test_a_bank_that_was_not_inserted_is_kept():
    model, bank = nn.Module(), RotationBank()
    bank.add("hidden", 4)
    model.rotations, model.layer = bank, RotatedLinear(nn.Linear(4, 4), bank, inputs="hidden")
    merge_rotations(model)
    assert model.rotations is bank
    assert all(p.requires_grad for p in model.layer.parameters())


def test_a_rounded_model_can_be_pickled():
    model = Llama(layers=1)
    round_linears_(model, RoundToNearest(4), inputs=RoundToNearest(8))
    assert torch.equal(pickle.loads(pickle.dumps(model))(TOKENS), model(TOKENS))
