"""Rotations in models of transformers: the same logits, the stock class after merging."""

import pytest
import torch

from manifold_opt import Adam, check
from manifold_opt.rotations import RoundToNearest, insert_rotations, merge_rotations, simulate_rounding

from ..helpers import seeded

TOKENS = torch.arange(60).view(3, 20)


def wanted():
    return pytest.importorskip("transformers", reason="transformers is not installed: pip install '.[frameworks]'")


def build(name, dtype=torch.float32, **options):
    """A model with random weights and norms; its default dtype is float32."""
    transformers = wanted()
    sizes = {"vocab_size": 64, "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": None}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(
        getattr(transformers, f"{name}Config")(**{**sizes, **heads, **options})
    )
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p)
    return model.to(dtype).eval()


def logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def change(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("Qwen2", {}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16}),
        ("Mistral", {"num_key_value_heads": 1}),
    ],
)
def test_insertion_and_merge_leave_the_logits(name, options, tmp_path):
    model = build(name, **options)
    before = logits(model)
    bank = insert_rotations(model, generator=seeded())
    assert change(logits(model), before) < 1e-5
    assert len(bank.names) == 3
    merge_rotations(model)
    merged = logits(model)
    assert change(merged, before) < 1e-5
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(loaded), merged)
    assert type(loaded.lm_head) is torch.nn.Linear


def test_learning_follows_float64():
    """The loss of the rounded model, 8 bits, after steps of Adam; and what is merged is what was learned."""
    losses = []
    for dtype in (torch.float32, torch.float64):
        model = build("Llama", dtype)
        bank = insert_rotations(model, residual="haar", heads="haar", generator=seeded())
        simulate_rounding(model, weights=RoundToNearest(8))
        opt = Adam(bank.parameters(), lr=1e-3)
        for _ in range(3):
            opt.zero_grad()
            loss = model(input_ids=TOKENS, labels=TOKENS).loss
            loss.backward()
            opt.step()
        assert check(model, opt) == []
        losses.append(float(loss.detach()))
        simulate_rounding(model)
        exact = logits(model)
        merge_rotations(model)
        assert change(logits(model), exact) < 1e-5
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("Gemma", "input_layernorm (GemmaRMSNorm) is not RMSNorm"),
        ("Phi3", "has no model.layers.0.mlp.gate_proj"),
        ("Olmo2", "has no model.layers.0.input_layernorm"),
    ],
)
def test_other_models_are_refused(name, problem):
    model = build(name)
    before = logits(model)
    with pytest.raises(ValueError, match="is not like a causal Llama model") as error:
        insert_rotations(model)
    assert problem in str(error.value)
    assert torch.equal(logits(model), before)
