"""The table of docs/migration/index.md that compares libraries: a class per row, a test per cell, on the packages.

The other rows are in test_peers_values.py. Those of geotorch and POGO run where the extra ``compare`` is installed.
"""

import math

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import manifold_opt
from manifold_opt import mark_orthogonal, mark_recurrent

from ..helpers import gaussian
from ..reference.peers import OF_THE_TABLE, noise, off, parametrized, peer, start

pytestmark = OF_THE_TABLE

geoopt = pytest.importorskip("geoopt")
EYE = torch.eye(8)


def gates_of(gru):
    return gru.weight_hh_l0.detach().unflatten(0, (3, 8))


class TestGates:
    """orthogonal gates in one `weight_hh`."""

    def stacked(self, library):
        """Of the 3H x H stack the whole has orthonormal columns; its gates are a long way off."""
        gru = parametrized(library, nn.GRU(4, 8), "weight_hh_l0")
        assert off(gru.weight_hh_l0) < 1e-5
        assert off(gates_of(gru)) > 1

    def test_torch(self):
        self.stacked("torch")

    def test_geotorch(self):
        self.stacked("geotorch")

    def test_geoopt(self):
        manifold = geoopt.Stiefel()
        stack = geoopt.ManifoldParameter(manifold.projx(gaussian(24, 8)), manifold=manifold)
        assert off(stack) < 1e-5
        assert off(stack.detach().unflatten(0, (3, 8))) > 1

    def test_pogo(self):
        stack = nn.Parameter(gaussian(24, 8))
        opt = peer("pogo").POGO([stack], peer("pogo.base").SGD(), 0.01)
        stack.grad = noise(0, stack)
        with pytest.raises(AssertionError, match="shaped"):
            opt.step()

    def test_ours(self):
        gru, some = nn.GRU(4, 8), nn.GRU(4, 8)
        mark_recurrent(gru)
        assert off(gates_of(gru)) < 1e-5
        mark_orthogonal(some, "weight_hh_l0", which=(2,))
        assert off(gates_of(some)[2]) < 1e-5
        assert off(gates_of(some)[:2]) > 1


class TestName:
    """the weight stays the parameter, under its own name."""

    def computed(self, library):
        layer = parametrized(library, nn.Linear(8, 8))
        assert "weight" not in layer.state_dict()
        assert "weight" not in dict(layer.named_parameters())

    def kept(self, layer, opt):
        """After a step the keys are those of a plain layer, and the weight is a parameter, orthogonal and moved."""
        assert list(layer.state_dict()) == list(nn.Linear(8, 8).state_dict())
        before = layer.weight.detach().clone()
        layer.weight.grad = noise(0, before)
        opt.step()
        assert isinstance(layer.weight, nn.Parameter)
        assert off(layer.weight) < 1e-4
        assert not torch.equal(layer.weight, before)

    def test_torch(self):
        self.computed("torch")

    def test_geotorch(self):
        self.computed("geotorch")

    def test_geoopt(self):
        layer = nn.Linear(8, 8)
        layer.weight = geoopt.ManifoldParameter(EYE.clone(), manifold=geoopt.Stiefel())
        self.kept(layer, geoopt.optim.RiemannianAdam(layer.parameters(), lr=0.01))

    def test_pogo(self):
        layer = nn.Linear(8, 8)
        layer.weight.data = EYE.clone()
        made = peer("pogo").POGO([layer.weight], peer("pogo.base").VectorAdam(), 0.01, flatten_fn=lambda w: w[None])
        self.kept(layer, made)

    def test_ours(self):
        layer = nn.Linear(8, 8)
        weight = layer.weight
        mark_orthogonal(layer, "weight")
        self.kept(layer, manifold_opt.Adam(layer.parameters(), lr=0.01))
        assert layer.weight is weight


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


class TestTogether:
    """small matrices of many parameters are updated together."""

    def growth(self, library):
        """How many times the operations of one parameter ten take."""
        counts = []
        for count in (1, 10):
            run = start(library, *[EYE] * count)
            run.train(1)
            for p in run.parameters:
                p.grad = noise(1, p)
            with Operations() as operations:
                run.weights()
                run.opt.step()
            counts.append(operations.count)
        return counts[1] / counts[0]

    def test_torch(self):
        assert self.growth("torch") > 8

    def test_geotorch(self):
        assert self.growth("geotorch") > 8

    def test_geoopt(self):
        assert self.growth("geoopt") > 8

    def test_pogo(self):
        assert self.growth("pogo") > 8

    def test_ours(self):
        assert self.growth("ours") < 2


class TestOptimizers:
    """optimizers."""

    def any_of_torchs(self, library):
        for rule in ("SGD", "Adam", "RMSprop", "Adagrad", "NAdam"):
            assert off(start(library, EYE, rule=rule).train()) < 1e-4

    def test_torch(self):
        self.any_of_torchs("torch")

    def test_geotorch(self):
        self.any_of_torchs("geotorch")

    def test_geoopt(self):
        names = {name for name in dir(geoopt.optim) if "Riemannian" in name}
        assert {name.partition("Riemannian")[2] for name in names} == {"SGD", "Adam", "LineSearch"}
        for rule in ("SGD", "Adam"):
            assert off(start("geoopt", EYE, rule=rule, canonical=False).train()) < 1e-5
        (w,) = start("geoopt", EYE).parameters
        opt = geoopt.optim.RiemannianLineSearch([w])

        def closure():
            opt.zero_grad()
            loss = (w - w.manifold.projx(gaussian(8, 8, dtype=torch.float32))).square().sum()
            loss.backward()
            return loss

        losses = [opt.step(closure).detach() for _ in range(2)]
        assert losses[1] < losses[0]
        assert off(w) < 1e-5
        w.grad = noise(0, w)
        torch.optim.Adam([w], lr=0.1).step()
        assert off(w) > 0.1

    def test_pogo(self):
        run, called = start("pogo", EYE), []
        assert not isinstance(run.opt, torch.optim.Adam | torch.optim.SGD)
        run.opt.step(lambda: called.append("pogo"))
        assert not called

    def test_ours(self):
        for rule in ("SGD", "Adam", "AdamW"):
            run, called = start("ours", EYE, rule=rule), []
            assert isinstance(run.opt, getattr(torch.optim, rule))
            assert off(run.train()) < 1e-5
            run.opt.step(lambda called=called: called.append("ours"))
            assert called


class TestLearningRate:
    """orthogonality error after steps at a learning rate of 10,000."""

    def error(self, library, **options):
        return off(start(library, EYE, lr=1e4, **options).train())

    def test_torch(self):
        assert self.error("torch", orthogonal_map="cayley") < 1e-5
        assert self.error("torch", orthogonal_map="householder") < 1e-5
        assert 0.01 < self.error("torch", orthogonal_map="matrix_exp") < 0.3

    def test_geotorch(self):
        assert 0.01 < self.error("geotorch") < 0.3

    def test_geoopt(self):
        assert self.error("geoopt", canonical=False) < 1e-5
        assert 1e-5 < self.error("geoopt", canonical=True) < 1e-3

    def test_pogo(self):
        assert math.isnan(off(start("pogo", EYE, lr=10.0).train()))

    def test_ours(self):
        assert self.error("ours") < 1e-5


class TestStart:
    """starts from any value."""

    def layer(self, value):
        layer = nn.Linear(8, 8)
        layer.weight.data = value.clone()
        return layer

    def test_torch(self):
        """At the Q of its QR decomposition; at the value itself where it is orthogonal."""
        value = gaussian(8, 8, dtype=torch.float32)
        q, r = torch.linalg.qr(value)
        torch.testing.assert_close(parametrized("torch", self.layer(value)).weight.detach(), q * r.diagonal().sign())
        torch.testing.assert_close(parametrized("torch", self.layer(EYE)).weight.detach(), EYE)

    def test_geotorch(self):
        """What was there is gone, even if it was orthogonal; what is assigned has to be."""
        layer = parametrized("geotorch", self.layer(EYE))
        assert off(layer.weight) < 1e-5
        assert float((layer.weight - EYE).detach().norm()) > 0.1
        with pytest.raises(peer("geotorch.exceptions").InManifoldError):
            layer.weight = gaussian(8, 8, dtype=torch.float32)

    def test_geoopt(self):
        assert off(start("geoopt", gaussian(8, 8)).parameters[0]) > 1

    def test_pogo(self):
        assert off(start("pogo", gaussian(8, 8)).parameters[0]) > 1

    def test_ours(self):
        value = gaussian(8, 8)
        u, _, vh = torch.linalg.svd(value)
        torch.testing.assert_close(start("ours", value).parameters[0].detach(), u @ vh)


class TestWide:
    """wide matrices."""

    def trained(self, library):
        weight = start(library, torch.eye(3, 6)).train()
        assert weight.shape == (3, 6)
        assert off(weight) < 1e-4

    def test_torch(self):
        self.trained("torch")

    def test_geotorch(self):
        self.trained("geotorch")

    def test_geoopt(self):
        with pytest.raises(ValueError, match="shape"):
            start("geoopt", torch.eye(3, 6))

    def test_pogo(self):
        self.trained("pogo")

    def test_ours(self):
        self.trained("ours")
