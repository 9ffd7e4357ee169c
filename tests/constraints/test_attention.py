"""Projections of attention, one orthogonal matrix a head."""

import pytest
import torch
from torch import nn

import manifold_opt
from manifold_opt import constraint_of, mark_attention, orthogonality_error
from manifold_opt.stiefel.geometry import error

from ..helpers import gaussian, pairs


def attention(**options):
    torch.manual_seed(0)
    return nn.MultiheadAttention(12, num_heads=3, **options)


@pairs(which=["q", "k", "v", "qk", "qv", "kv", "qkv", "vkq"], per_head=[True, False], separate=[False, True])
def test_attention(which, per_head, separate):
    module = attention(**({"kdim": 10, "vdim": 7} if separate else {}))
    before = {key: value.clone() for key, value in module.state_dict().items()}
    names = mark_attention(module, which, per_head=per_head, gain=1.5)
    assert names == ([f"{x}_proj_weight" for x in "qkv" if x in which] if separate else ["in_proj_weight"])
    now = {name: getattr(module, f"{name}_proj_weight") for name in "qkv"} if separate else None
    now = now or dict(zip("qkv", module.in_proj_weight.chunk(3), strict=True))
    old = {name: before[f"{name}_proj_weight"] for name in "qkv"} if separate else None
    old = old or dict(zip("qkv", before["in_proj_weight"].chunk(3), strict=True))
    for letter in "qkv":
        if letter not in which:
            assert torch.equal(now[letter], old[letter])
        else:
            heads = now[letter].detach().chunk(3 if per_head else 1)
            assert max(float(error(head / 1.5)) for head in heads) < 1e-5
            assert not torch.equal(now[letter], old[letter])
    assert torch.equal(module.out_proj.weight, before["out_proj.weight"])


def test_attention_inside_a_transformer_trains():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(8, 2, dim_feedforward=6, dropout=0.0, batch_first=True)
    net = nn.TransformerDecoder(layer, num_layers=2)
    names = mark_attention(net)
    assert names == [f"layers.{k}.{kind}.in_proj_weight" for k in range(2) for kind in ("self_attn", "multihead_attn")]
    opt = manifold_opt.AdamW(net.parameters(), lr=0.01)
    losses = []
    for _ in range(4):
        opt.zero_grad()
        losses.append(
            net(gaussian(2, 3, 8, dtype=torch.float32), gaussian(2, 5, 8, dtype=torch.float32)).square().mean()
        )
        losses[-1].backward()
        opt.step()
    assert losses[-1].item() < losses[0].item()
    assert max(orthogonality_error(net).values()) < 1e-5
    assert manifold_opt.check(net, opt) == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"which": ""}, "letters of \"qkv\", got ''"),
        ({"which": "qx"}, "got 'qx'"),
        ({"which": None}, "got None"),
        ({"which": 3}, "got 3"),
        ({"gain": 0.0}, "finite gain above 0"),
        ({"gain": "big"}, "finite gain above 0, got gain='big'"),
    ],
)
def test_attention_refuses_and_writes_nothing(options, match):
    module = attention()
    before = module.in_proj_weight.detach().clone()
    with pytest.raises(ValueError, match=match):
        mark_attention(module, **options)
    assert torch.equal(module.in_proj_weight, before)


def test_attention_marks_all_or_nothing():
    net = nn.ModuleList([attention(), attention()])
    with torch.no_grad():
        net[1].in_proj_weight[:4] = 0
    before = net[0].in_proj_weight.detach().clone()
    with pytest.raises(ValueError, match=r"1\.in_proj_weight.*rank-deficient"):
        mark_attention(net)
    assert torch.equal(net[0].in_proj_weight, before)
    assert constraint_of(net[0].in_proj_weight) is None
    with pytest.raises(ValueError, match=r"no nn\.MultiheadAttention in Linear"):
        mark_attention(nn.Linear(3, 3))
