"""The product in the place of LoRA's second factor. How peft uses it: tests/integration/test_lora.py."""

import copy
import sys

import pytest
import torch
from torch import nn

from manifold_opt import mark_lora, unmark_lora
from manifold_opt.constraints.lora import FactoredLinear, _split

from ..helpers import gaussian, point, rounding

EPS = torch.finfo(torch.float64).eps


@pytest.mark.parametrize("shape", [(7, 3), (3, 3), (2, 5), (1, 1)])
@pytest.mark.parametrize("rank", [None, 1, 0])
def test_a_matrix_of_any_shape_and_rank_is_split(shape, rank):
    """Into an orthonormal and a square factor, whose product it is: the polar factor, if it has full rank."""
    x = gaussian(*shape)
    if rank is not None:
        x = gaussian(shape[0], rank) @ gaussian(rank, shape[1])
    w, h = _split(x)
    m, r = shape
    assert w.shape == shape
    assert h.shape == (r, r)
    assert torch.linalg.norm(torch.eye(min(m, r)) - (w.mT @ w if m >= r else w @ w.mT)) <= rounding(w)
    assert torch.linalg.norm(w @ h - x) <= 8 * EPS * max(m, r) * torch.linalg.norm(x)
    if rank is None and m >= r:  # Higham (2008), theorem 8.1: h is symmetric, positive semidefinite
        torch.testing.assert_close(h, h.mT)
        assert torch.linalg.eigvalsh(h).min() > 0


def test_what_is_orthonormal_keeps_its_bits():
    x = point(7, 3).float()
    w, h = _split(x)
    assert w is x
    assert torch.equal(h, torch.eye(3, dtype=torch.float64))


def test_a_zero_matrix_gets_another_factor_for_every_seed():
    torch.manual_seed(0)
    first, h = _split(torch.zeros(6, 2))
    again, _ = _split(torch.zeros(6, 2))
    assert not h.any()
    assert not torch.equal(first, again)


def factored(bias=True, seed=0):
    basis, core, offset = (
        x.float() for x in (point(7, 3, seed=seed), gaussian(3, 3, seed=seed), gaussian(7, seed=seed))
    )
    return FactoredLinear(nn.Parameter(basis), nn.Parameter(core), nn.Parameter(offset) if bias else None)


@pytest.mark.parametrize("bias", [True, False])
def test_it_computes_what_a_linear_layer_of_its_weight_does(bias):
    layer, linear, x = factored(bias), nn.Linear(3, 7, bias=bias), gaussian(5, 3).float()
    state = {key: value for key, value in layer.state_dict().items() if key in ("weight", "bias")}
    linear.load_state_dict(state)
    assert torch.equal(layer(x), linear(x))
    assert repr(layer) == repr(linear).replace("Linear", "FactoredLinear")
    assert [name for name, _ in layer.named_parameters()] == ["basis", "core"] + ["bias"] * bias
    layer(x).square().sum().backward()
    linear(x).square().sum().backward()
    torch.testing.assert_close(layer.core.grad, layer.basis.detach().mT @ linear.weight.grad)
    torch.testing.assert_close(layer.basis.grad, linear.weight.grad @ layer.core.detach().mT)


def test_its_state_is_loaded_bit_for_bit():
    layer, other = factored(), factored(seed=5)
    other.load_state_dict(layer.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), copy.deepcopy(layer).parameters(), strict=True))


def test_the_weight_of_an_ordinary_layer_is_factored():
    layer, linear = factored(), nn.Linear(3, 7)
    layer.load_state_dict(linear.state_dict())
    torch.testing.assert_close(layer.weight, linear.weight)
    assert torch.linalg.norm(torch.eye(3) - layer.basis.mT @ layer.basis) <= rounding(layer.basis.detach())
    before = layer.basis.detach().clone()
    layer.load_state_dict({"weight": torch.zeros(7, 3), "bias": torch.zeros(7)})
    assert not layer.core.any()
    assert torch.equal(layer.basis, before)


def test_a_state_of_another_shape_or_with_other_keys_is_an_error():
    layer, before = factored(), copy.deepcopy(factored().state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for basis"):
        layer.load_state_dict({"weight": torch.zeros(8, 3), "bias": torch.zeros(7)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\).*more"):
        layer.load_state_dict(before | {"more": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key\(s\).*core"):
        layer.load_state_dict({key: value for key, value in before.items() if key != "core"})
    assert all(torch.equal(before[key], value) for key, value in layer.state_dict().items())


@pytest.mark.parametrize("function", [mark_lora, unmark_lora])
def test_without_peft_the_error_says_what_to_install(function, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft.tuners.lora", None)  # so that it cannot be imported
    with pytest.raises(ImportError, match=rf'{function.__name__}: peft.* is not installed: pip install "peft'):
        function(nn.Linear(2, 2))
