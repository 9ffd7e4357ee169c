"""The other rows of the comparison in docs/migration/index.md: numbers, faults, checkpoints, other constraints."""

import copy
import io
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import manifold_opt
from manifold_opt import constraint_of, mark_manifold, mark_orthogonal

from ..reference.peers import OF_THE_TABLE, noise, off, peer, start
from . import test_peers

pytestmark = OF_THE_TABLE

geoopt = pytest.importorskip("geoopt")
COLUMNS = ["torch", "geotorch", "geoopt", "pogo", "ours"]
EYE = torch.eye(8)
UNITARY = torch.eye(8, dtype=torch.complex64)


@pytest.mark.filterwarnings("ignore:Complex modules")
class TestUnitary:
    """unitary matrices."""

    def test_torch(self):
        for orthogonal_map in ("matrix_exp", "cayley"):
            assert off(start("torch", UNITARY, orthogonal_map=orthogonal_map).train()) < 1e-4
        with pytest.raises(ValueError, match="complex"):
            start("torch", UNITARY, orthogonal_map="householder")

    def test_geotorch(self):
        with pytest.raises(NotImplementedError):
            start("geotorch", UNITARY)

    def test_geoopt(self):
        with pytest.raises(NotImplementedError):
            start("geoopt", UNITARY, canonical=False).train()
        assert off(start("geoopt", UNITARY, canonical=True, lr=0.1).train()) > 0.1  # and says nothing

    def test_pogo(self):
        assert off(start("pogo", UNITARY).train()) < 1e-4

    def test_ours(self):
        assert off(start("ours", UNITARY, lr=0.1).train()) < 1e-5


class TestBfloat16:
    """bfloat16."""

    def test_torch(self):
        assert start("torch", EYE.bfloat16(), orthogonal_map="matrix_exp").train().isnan().any()  # and says nothing
        for orthogonal_map in ("cayley", "householder"):
            with pytest.raises(NotImplementedError):
                start("torch", EYE.bfloat16(), orthogonal_map=orthogonal_map).train()

    def test_geotorch(self):
        with pytest.raises(NotImplementedError):
            start("geotorch", EYE.bfloat16())

    def test_geoopt(self):
        for canonical in (True, False):
            with pytest.raises(NotImplementedError):
                start("geoopt", EYE.bfloat16(), canonical=canonical).train()

    def test_pogo(self):
        run = start("pogo", EYE.bfloat16())
        assert off(run.train(1)) < 0.05
        held = [x for x in run.opt.state[run.parameters[0]].values() if isinstance(x, torch.Tensor) and x.numel() > 1]
        assert {x.dtype for x in held} <= {torch.bfloat16}

    def test_ours(self):
        run = start("ours", EYE.bfloat16(), lr=1e-4)
        weight = run.train()
        state = run.opt.state[run.parameters[0]]
        assert {value.dtype for key, value in state.items() if key != "constrained"} == {torch.float32}
        assert torch.equal(state["master"].bfloat16(), weight)
        assert off(state["master"]) < 1e-5


class TestNan:
    """a NaN in the gradient."""

    def poisoned(self, library, **options):
        """The weight after a step along a gradient with one NaN in it."""
        run = start(library, EYE, **options)
        gradient = noise(0, EYE)
        gradient[1, 2] = torch.nan
        run.step(gradient)
        return run, run.weights()[0].detach()

    def test_torch(self):
        for orthogonal_map in ("matrix_exp", "cayley", "householder"):
            assert self.poisoned("torch", orthogonal_map=orthogonal_map)[1].isnan().any()

    def test_geotorch(self):
        assert self.poisoned("geotorch")[1].isnan().any()

    def test_geoopt(self):
        for canonical in (True, False):
            assert self.poisoned("geoopt", canonical=canonical)[1].isnan().any()

    def test_pogo(self):
        assert self.poisoned("pogo")[1].isnan().any()

    def test_ours(self):
        run, weight = self.poisoned("ours")
        assert torch.equal(weight, EYE)
        assert run.opt.metrics()["skipped_blocks"] == 1


class TestCheckpoint:
    """optimizer checkpoints."""

    def resumed(self, library):
        """A saved run that is gone on with elsewhere is the one that went on."""
        run, other = start(library, EYE), start(library, EYE)
        run.train(3)
        file = io.BytesIO()
        torch.save((run.opt.state_dict(), [p.detach() for p in run.parameters]), file)
        file.seek(0)
        state, values = torch.load(file, weights_only=False)
        with torch.no_grad():
            for p, value in zip(other.parameters, values, strict=True):
                p.copy_(value)
        other.opt.load_state_dict(state)
        torch.testing.assert_close(run.train(), other.train())
        return run, other

    def test_torch(self):
        self.resumed("torch")

    def test_geotorch(self):
        self.resumed("geotorch")

    def test_geoopt(self):
        self.resumed("geoopt")

    def test_pogo(self):
        run = start("pogo", EYE)
        run.train(1)
        with pytest.raises(Exception, match=r"pickle|Pickl"):
            torch.save(run.opt.state_dict(), io.BytesIO())

    def test_ours(self):
        run, other = self.resumed("ours")
        assert torch.equal(run.weights()[0], other.weights()[0])
        halves = mark_orthogonal(nn.Parameter(EYE.clone()), blocks=2)
        with pytest.raises(ValueError, match=r"blocks=1.*blocks=2"):
            manifold_opt.Adam([halves]).load_state_dict(copy.deepcopy(run.opt.state_dict()))


class TestOthers:
    """other constraints."""

    def test_torch(self):
        known = {name for name in vars(parametrizations) if not name.startswith("_") and name.islower()}
        assert {"weight_norm", "spectral_norm", "orthogonal"} <= known
        layer = parametrizations.weight_norm(nn.Linear(8, 8))
        torch.testing.assert_close(layer.weight.norm(dim=1), layer.parametrizations.weight.original0[:, 0])
        layer = parametrizations.spectral_norm(nn.Linear(8, 8))
        assert float(torch.linalg.matrix_norm(layer.weight.detach(), 2)) == pytest.approx(1, rel=0.1)  # an estimate

    def test_geotorch(self):
        geotorch = peer("geotorch")
        layer = nn.Linear(8, 8)
        geotorch.low_rank(layer, "weight", 2)
        assert int(torch.linalg.matrix_rank(layer.weight, rtol=1e-4)) == 2
        layer = nn.Linear(8, 8)
        geotorch.positive_definite(layer, "weight")
        assert float(torch.linalg.eigvalsh(layer.weight.detach()).min()) > 0
        layer = nn.Linear(8, 8)
        geotorch.sphere(layer, "weight")
        torch.testing.assert_close(layer.weight.norm(dim=1), torch.ones(8))

    def test_geoopt(self):
        for manifold in (
            geoopt.PoincareBall(),
            geoopt.Lorentz(),
            geoopt.SymmetricPositiveDefinite(),
            geoopt.Sphere(),
            geoopt.ProductManifold((geoopt.Sphere(), 4), (geoopt.PoincareBall(), 4)),
        ):
            value = torch.eye(8).add(0.01)
            w = geoopt.ManifoldParameter(manifold.projx(value), manifold=manifold)
            w.grad = noise(0, w)
            geoopt.optim.RiemannianAdam([w], lr=0.01).step()
            assert manifold.check_point_on_manifold(w.detach(), atol=1e-4), manifold
            assert not torch.equal(w, manifold.projx(value))

    def test_pogo(self):
        pogo = peer("pogo")
        assert pogo.__all__ == ["POGO"]
        assert set(peer("pogo.base").__all__) == {"BaseOptimizer", "SGD", "VectorAdam", "Muon"}

    def test_ours(self):
        """Each kept by steps in test_manifold_steps.py, those of geoopt in test_geoopt.py."""
        marks = {name for name in manifold_opt.__all__ if name.startswith("mark_")}
        assert {"mark_unit_norm", "mark_spectral", "mark_positive", "mark_manifold"} <= marks
        point = mark_manifold(nn.Parameter(0.1 * torch.ones(4, 2)), geoopt.PoincareBall())
        assert constraint_of(point) is not None


def test_every_cell_has_its_test():
    """Rows and columns in the order of the table: the title of a row is the docstring of its class."""
    page = (Path(__file__).parents[2] / "docs" / "migration" / "index.md").read_text()
    section = page.partition("## Comparison with other libraries")[2].partition("\n## ")[0]
    table = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("|")]
    rows = [cells[0].strip() for cells in table[2:]]
    here = [value for module in (test_peers, sys.modules[__name__]) for value in vars(module).items()]
    classes = [value for name, value in here if name.startswith("Test")]
    assert [value.__doc__.splitlines()[0].rstrip(".") for value in classes] == rows
    for row, cells in zip(classes, table[2:], strict=True):
        assert len(cells) == 1 + len(COLUMNS)
        assert [name for name in vars(row) if name.startswith("test_")] == [f"test_{name}" for name in COLUMNS]
