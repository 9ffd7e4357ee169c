"""A decoder with the structure and the names of transformers' Llama, for tests without transformers."""

from types import SimpleNamespace

import torch
from torch import nn


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()


class Attention(nn.Module):
    def __init__(self, width, heads, value_heads, bias):
        super().__init__()
        self.head_dim = width // heads
        self.q_proj = nn.Linear(width, width, bias)
        self.k_proj = nn.Linear(width, self.head_dim * value_heads, bias)
        self.v_proj = nn.Linear(width, self.head_dim * value_heads, bias)
        self.o_proj = nn.Linear(width, width, bias)

    def forward(self, x):
        q, k, v = (proj(x).unflatten(-1, (-1, self.head_dim)).mT for proj in (self.q_proj, self.k_proj, self.v_proj))
        repeat = q.shape[-1] // k.shape[-1]  # (batch, time, head_dim, heads)
        k, v = k.repeat_interleave(repeat, -1), v.repeat_interleave(repeat, -1)
        scores = torch.einsum("bsdh,btdh->bhst", q, k) / self.head_dim**0.5
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        weights = scores.masked_fill(future, -torch.inf).softmax(-1)
        return self.o_proj(torch.einsum("bhst,btdh->bshd", weights, v).flatten(-2))


class MLP(nn.Module):
    def __init__(self, width, inner, bias):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, width, inner, heads, value_heads, bias):
        super().__init__()
        self.self_attn, self.mlp = Attention(width, heads, value_heads, bias), MLP(width, inner, bias)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(width), RMSNorm(width)

    def forward(self, x):
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Body(nn.Module):
    def __init__(self, vocabulary, width, layers, **sizes):
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList(Layer(width, **sizes) for _ in range(layers))
        self.norm = RMSNorm(width)

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Llama(nn.Module):
    """Logits of tokens, with random weights and norms from a seed."""

    def __init__(self, *, tied=False, bias=False, layers=2, seed=0):
        super().__init__()
        sizes = {"inner": 32, "heads": 4, "value_heads": 2, "bias": bias}
        self.model = Body(40, 16, layers, **sizes)
        self.lm_head = nn.Linear(16, 40, bias=False)
        self.config = SimpleNamespace(tie_word_embeddings=tied)
        generator = torch.Generator().manual_seed(seed)
        for name, p in self.named_parameters():
            value = torch.randn(p.shape, generator=generator)
            p.data = 1 + 0.3 * value if "norm" in name else value / p.shape[-1] ** 0.5
        if tied:
            self.lm_head.weight = self.model.embed_tokens.weight

    def forward(self, tokens):
        return self.lm_head(self.model(tokens))


TOKENS = torch.arange(36).view(3, 12)
