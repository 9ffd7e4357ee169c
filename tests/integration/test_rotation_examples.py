"""examples/rotations.py: rotations change no function of an encoder layer, and learning lowers the rounding error."""

import importlib
from pathlib import Path

import pytest
import torch
from torch import nn

from manifold_opt import Adam, orthogonality_error
from manifold_opt.rotations import RoundToNearest

from ..helpers import gaussian, seeded

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def rotations(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("rotations")


class Layer(nn.Module):
    """An encoder layer's six weights, width 24, three heads of 8, hidden layer 96."""

    def __init__(self, rotations):
        super().__init__()
        self.weights = nn.ModuleDict()
        for i, m in enumerate(rotations.MATRICES):
            shape = {"intermediate.dense": (24, 96), "output.dense": (96, 24)}.get(m.name, (24, 24))
            linear = nn.Linear(*shape, bias=False)
            linear.weight.data = gaussian(*shape[::-1], dtype=torch.float32, seed=i)
            self.weights[m.name.replace(".", "/")] = linear

    def get_submodule(self, target):
        return self.weights[target.replace(".", "/")]


def test_rotations_leave_functions_as_they_are(rotations):
    """x W' = x R (W R)', and heads cancel between the values and the output projection."""
    layer = Layer(rotations)
    maps = rotations.LayerRotations(layer, 3, seeded())
    list(rotations.learn(layer, maps, Adam(maps.parameters(), lr=0.1), steps=3, rounding=RoundToNearest(4)))
    x = gaussian(5, 24, dtype=torch.float32)
    weights = {m.name: layer.get_submodule(m.name).weight for m in rotations.MATRICES}
    turned = {m.name: rotations.rotated(weights[m.name], m, maps) for m in rotations.MATRICES}
    for name, rotation in (("attention.self.query", "attention"), ("intermediate.dense", "widen")):
        torch.testing.assert_close(maps(x, rotation) @ turned[name].mT, x @ weights[name].mT, atol=1e-4, rtol=0)
    hidden = gaussian(5, 96, dtype=torch.float32)
    torch.testing.assert_close(
        maps(hidden, "narrow") @ turned["output.dense"].mT, hidden @ weights["output.dense"].mT, atol=1e-3, rtol=0
    )
    values, out = "attention.self.value", "attention.output.dense"
    torch.testing.assert_close(
        maps(x, "attention") @ turned[values].mT @ turned[out].mT,
        x @ weights[values].mT @ weights[out].mT,
        atol=1e-3,
        rtol=0,
    )


@pytest.mark.parametrize("tokens", [False, True])
def test_learning_lowers_the_error_and_stays_orthogonal(rotations, tokens):
    layer = Layer(rotations)
    maps = rotations.LayerRotations(layer, 3, seeded())
    widths = {m.name: layer.get_submodule(m.name).weight.shape[1] for m in rotations.MATRICES}
    inputs = {name: gaussian(40, width, dtype=torch.float32) for name, width in widths.items()}
    rounding = RoundToNearest(4)

    def error():
        with torch.no_grad():
            weights = [rotations.rotated(layer.get_submodule(m.name).weight, m, maps) for m in rotations.MATRICES]
        return sum(float((rounding(w) - w).square().sum()) for w in weights)

    before = error()
    opt = Adam(maps.parameters(), lr=0.02)
    losses = list(rotations.learn(layer, maps, opt, steps=60, rounding=rounding, inputs=inputs if tokens else None))
    assert len(losses) == 60
    assert error() < 0.8 * before
    assert max(orthogonality_error(maps).values()) < 1e-5
