"""examples/char_language_model.py: all four methods train the same net from the same start."""

import json
import math

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from ..helpers import gaussian

for needed in ("matplotlib", "rich"):
    pytest.importorskip(needed)


@pytest.fixture
def example(monkeypatch, pytestconfig):
    monkeypatch.syspath_prepend(str(pytestconfig.rootpath / "examples"))
    import char_language_model

    return char_language_model


def net_of(example, method, cell, lr=0.01):
    torch.manual_seed(0)
    net = example.CharacterModel(cell, 8)
    return net, example.METHODS[method][0](net, lr)


@pytest.mark.parametrize("cell", ["LSTM", "GRU"])
def test_all_orthogonal_starts_are_the_same(example, cell):
    """The nearest orthogonal matrix of each gate: the factor U V' of its singular value decomposition."""
    free, _ = net_of(example, "AdamW", cell)
    u, _, vh = torch.linalg.svd(torch.stack(free.gates()).double())
    text = torch.arange(12).view(2, 6)
    values = []
    for method in ("AdamW + orthogonal start", "AdamW + parametrization", "manifold_opt.AdamW"):
        net, _ = net_of(example, method, cell)
        assert torch.allclose(torch.stack(net.gates()).double(), u @ vh, atol=1e-5)
        values.append(net(text)[0])
    assert torch.equal(values[0], values[2])
    assert torch.allclose(values[0], values[1], atol=1e-5)


@pytest.mark.parametrize("method", ["AdamW + parametrization", "manifold_opt.AdamW"])
def test_every_gate_trains_and_stays_orthogonal(example, method):
    net, opt = net_of(example, method, "LSTM")
    before = torch.stack(net.gates())
    for k in range(3):
        opt.zero_grad()
        with parametrize.cached():
            example.loss_of(net, torch.arange(20).view(2, 10) + k).backward()
        opt.step()
    after = torch.stack(net.gates())
    assert ((after - before).flatten(2).norm(dim=2) > 1e-3).all()
    assert torch.allclose(after @ after.mT, torch.eye(8).expand(2, 4, 8, 8), atol=1e-5)


def test_stack_takes_a_weight_apart_and_puts_it_together(example):
    weight = gaussian(12, 3)
    gates = example.Stack().right_inverse(weight)
    assert gates.shape == (4, 3, 3)
    assert torch.equal(gates[1], weight[3:6])
    assert torch.equal(example.Stack()(gates), weight)


def test_the_schedule_by_hand(example):
    """40 steps: two of warm-up, then the half cosine."""
    assert example.warmup_cosine(0, 40) == 0.5
    assert example.warmup_cosine(20, 40) == pytest.approx(0.5)
    assert example.warmup_cosine(40, 40) == pytest.approx(0)
    assert max(example.warmup_cosine(step, 40) for step in range(40)) == pytest.approx((1 + math.cos(math.pi / 40)) / 2)


def test_the_loss_predicts_each_next_character(example):
    """A net whose logits are the text itself, one to the left, is right with certainty."""

    class Oracle(nn.Module):
        def forward(self, text):
            return 1e3 * nn.functional.one_hot(text + 1, 128).float(), None

    assert example.loss_of(Oracle(), torch.arange(20).view(2, 10)).item() == 0


def test_kept_runs_are_not_repeated(example, tmp_path, capsys, monkeypatch):
    results = tmp_path / "results.json"
    options = ["--toy", "--methods", "AdamW", "--results", str(results)]
    example.main([*options, "--lr", "0.01"])
    trained = []
    monkeypatch.setattr(example, "train", lambda *args, train=example.train: trained.append(args[:3]) or train(*args))
    example.main([*options, "--lr", "0.01,0.02"])
    assert trained == [("AdamW", 0.02, 0)]
    assert [run["lr"] for run in json.loads(results.read_text())] == [0.01, 0.02]
    assert "AdamW writes" in capsys.readouterr().out
