"""A Llama of two layers that has read the letters of sentences.txt, for rotation training of quantizers."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TEXT = (Path(__file__).parent / "sentences.txt").read_text(encoding="utf-8")
LETTERS = sorted(set(TEXT))
LENGTH, BATCH, HIDDEN, HEADS = 64, 8, 64, 4


def batches(count: int, generator: torch.Generator) -> Tensor:
    """Random pieces of the text, as numbers of letters, ``(count, LENGTH)``."""
    text = torch.tensor([LETTERS.index(letter) for letter in TEXT])
    starts = torch.randint(len(text) - LENGTH, (count, 1), generator=generator)
    return text[starts + torch.arange(LENGTH)]


def pretrained(steps: int, seed: int) -> LlamaForCausalLM:
    """The model after some steps of AdamW."""
    transformers.set_seed(seed)
    config = LlamaConfig(
        vocab_size=len(LETTERS),
        hidden_size=HIDDEN,
        intermediate_size=2 * HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS // 2,
        max_position_embeddings=2 * LENGTH,
    )
    model, generator = LlamaForCausalLM(config), torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        letters = batches(2 * BATCH, generator)
        opt.zero_grad()
        model(input_ids=letters, labels=letters, use_cache=False).loss.backward()
        opt.step()
    return model.eval()


@torch.no_grad()
def logits_of(model: nn.Module, letters: Tensor) -> Tensor:
    """What the model says, quantized or not, ``(pieces, LENGTH, letters)``."""
    return model(input_ids=letters, use_cache=False).logits


def loss_of(logits: Tensor, letters: Tensor) -> float:
    """Mean cross-entropy of the next letter."""
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), letters[:, 1:].flatten()))
