"""Checkpoints of parametrized modules load into migrated ones."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from manifold_opt import Orthogonal, constraint_of
from manifold_opt.constraints.from_parametrized import from_parametrized

from ..helpers import each
from .test_from_parametrized import MAPS, SHAPES, Model, linear, parametrized


@each({"orthogonal_map, trivial": MAPS}, shape=SHAPES, assign=[False, True])
def test_checkpoints_of_before_load(shape, orthogonal_map, trivial, assign):
    """Of another run of the same module, so that none of its tensors is this one's."""
    saved = linear(shape, orthogonal_map, trivial, seed=1)
    layer = linear(shape, orthogonal_map, trivial, seed=2)
    weight = from_parametrized(layer)
    checkpoint = saved.state_dict()
    keys = list(checkpoint)
    layer.load_state_dict(checkpoint, assign=assign)
    assert list(checkpoint) == keys
    assert assign or weight is layer.weight
    assert torch.equal(layer.weight, saved.weight)
    assert constraint_of(layer.weight) == Orthogonal(1)
    assert layer.weight.requires_grad


NAMES = ["encoder.out.weight", "rnn.weight_hh_l0", "rnn.weight_ih_l0", "odd"]


def migrated(seed: int) -> Model:
    model = parametrized(seed)
    for name in NAMES:
        from_parametrized(model, name)
    return model


def values(model: nn.Module) -> list[torch.Tensor]:
    found = []
    for name in NAMES:
        path, _, leaf = name.rpartition(".")
        found.append(getattr(model.get_submodule(path), leaf).detach())
    return found


def same(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(values(a), values(b), strict=True))


def test_nested_modules_and_several_weights_of_one():
    saved, model = parametrized(1), migrated(2)
    assert not parametrize.is_parametrized(model.rnn)
    assert not same(saved, model)
    model.load_state_dict(saved.state_dict(), strict=True)
    assert same(saved, model)
    outer = nn.Sequential(nn.Identity(), migrated(3))
    outer.load_state_dict({f"1.{key}": value for key, value in saved.state_dict().items()})
    assert same(saved, outer[1])


def test_plain_checkpoints_load_as_ever():
    source, target = migrated(1), migrated(2)
    target.load_state_dict(source.state_dict())
    assert same(source, target)
    Model().load_state_dict(source.state_dict())


def through_bytes(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": through_bytes,
    "all in turn": lambda model: copy.deepcopy(through_bytes(pickle.loads(pickle.dumps(copy.deepcopy(model))))),
}


@pytest.mark.parametrize("how", COPIES)
def test_copies_load_too(how):
    saved, model = parametrized(1), migrated(2)
    copied = COPIES[how](model)
    before = copy.deepcopy(model.state_dict())
    copied.load_state_dict(saved.state_dict())
    assert same(saved, copied)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(constraint_of(w) is not None for w in (copied.odd, copied.rnn.weight_hh_l0))


def test_what_the_module_keeps_has_no_values():
    layer = parametrizations.orthogonal(nn.Linear(200, 3))
    from_parametrized(layer)
    assert len(pickle.dumps(layer)) < 20_000  # the 200 x 200 base alone is 160,000


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_checkpoints_of_another_precision(dtype):
    saved, layer = linear(seed=1), linear(seed=2)
    expected = saved.weight.detach()
    from_parametrized(layer)
    layer.load_state_dict({key: value.to(dtype) for key, value in saved.state_dict().items()})
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=0, atol=1e-6 if dtype == torch.float64 else 0.05)


def test_what_lacks_is_named_as_torch_names_it():
    saved, layer = linear(seed=1), linear(seed=2)
    weight = from_parametrized(layer)
    before = weight.detach().clone()
    partial = saved.state_dict()
    del partial["parametrizations.weight.0.base"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "parametrizations.weight.0.base"\. $'):
        layer.load_state_dict(partial)
    assert layer.load_state_dict(partial, strict=False).missing_keys == ["parametrizations.weight.0.base"]
    assert torch.equal(weight, before)
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "weight"'):
        layer.load_state_dict({"bias": saved.bias})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\) in state_dict: .*weight.1.base"):
        layer.load_state_dict({**saved.state_dict(), "parametrizations.weight.1.base": before})
    with pytest.raises(RuntimeError, match=r"(?s)parametrizations.weight.*size mismatch for original"):
        layer.load_state_dict({**saved.state_dict(), "parametrizations.weight.original": torch.ones(2, 2)})
    with pytest.raises(RuntimeError, match=r"Unexpected key\(s\)"):
        layer.load_state_dict({**saved.state_dict(), "weight": before})


def test_parametrized_anew_the_module_is_as_torch_has_it():
    saved, layer = linear(seed=1), linear(seed=2)
    from_parametrized(layer)
    parametrizations.orthogonal(layer)
    layer.load_state_dict(saved.state_dict())
    assert torch.equal(layer.weight, saved.weight)
    from_parametrized(layer)
    layer.load_state_dict(saved.state_dict())
    assert torch.equal(layer.weight, saved.weight)
    assert len(layer._load_state_dict_pre_hooks) == 1
