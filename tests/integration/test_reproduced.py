"""The mathematics of benchmarks/reproduced/: optima in closed form, and cases by hand."""

import argparse
import importlib
import math
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812  (its usual name)

from manifold_opt import init, riemannian_gradient

from ..helpers import gaussian, point, seeded

for needed in ("matplotlib", "rich"):
    pytest.importorskip(needed)


@pytest.fixture
def entry(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks" / "reproduced"))
    monkeypatch.setattr(sys, "path", [*sys.path])  # entry.py appends to it
    return importlib.import_module


def test_an_answer_without_memory_costs_10_ln_8_over_the_length(entry):
    copying = entry("copying")
    for delay in (5, 30):
        _, y = copying.copying(delay, 4, seeded())
        logits = torch.full((*y.shape, 9), -math.inf, dtype=torch.float64)
        logits[:-10, :, 0] = 0
        logits[-10:, :, 1:] = 0
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        assert float(loss) == pytest.approx(10 * math.log(8) / (delay + 20))
        assert float(loss) == pytest.approx(copying.memoryless(delay))


def test_modrelu_without_bias_is_a_linear_recurrence(entry):
    """h_3 = x_3 + W x_2 + W^2 x_1; with a bias of -1 entries below 1 are zero, and others one nearer to it."""
    rnn = entry("copying").Recurrence(4).double()
    rnn.bias.data.zero_()
    x, w = gaussian(3, 2, 4), rnn.weight.detach().mT
    assert torch.allclose(rnn(x)[-1], x[2] + x[1] @ w + x[0] @ w @ w)
    rnn.bias.data.fill_(-1)
    x = torch.tensor([[[0.5, -0.5, 3.0, -3.0]]], dtype=torch.float64)
    assert rnn(x).flatten().tolist() == [0, 0, 2, -2]


def test_the_exponential_begins_at_the_given_rotations(entry):
    exponential = entry("copying").Exponential()
    weight = init.orthogonal_(torch.empty(6, 6, dtype=torch.float64), scheme="henaff", generator=seeded())
    assert torch.allclose(exponential(exponential.right_inverse(weight)), weight)


@pytest.mark.parametrize("reflected", [False, True])
def test_the_procrustes_optimum_of_either_component_by_hand(entry, reflected):
    """The largest <M, X> is hypot(m11 + m22, m12 - m21) over rotations, with both signs changed over reflections."""
    a, b = gaussian(7, 2, 2, seed=1), gaussian(7, 2, 2, seed=2)
    (m11, m12), (m21, m22) = (b @ a.mT).permute(1, 2, 0)
    values = [torch.hypot(m11 + m22, m12 - m21), torch.hypot(m11 - m22, m12 + m21)]
    start = torch.diag(torch.tensor([1.0, -1.0 if reflected else 1.0])).expand(7, 2, 2)
    best, both = entry("procrustes").optimum(a, b, start)
    constant = a.square().sum((1, 2)) + b.square().sum((1, 2))
    assert torch.allclose(best, constant - 2 * values[reflected])
    assert torch.allclose(both, constant - 2 * torch.maximum(*values))


def test_the_gap_of_pca_is_zero_at_the_leading_subspace_only(entry):
    gap = entry("online_pca").gap
    values, basis = entry("online_pca").spectrum(3), point(3, 3)
    assert gap(basis[:, 2:].mT[None], basis, values) == pytest.approx(2 / 3)  # 1 - (1/3) / 1
    leading = torch.tensor([[2.0, 1.0], [1.0, -1.0]], dtype=torch.float64) @ basis[:, :2].mT
    assert gap(leading[None], basis, values) == pytest.approx(0, abs=1e-12)


def test_landing_follows_the_riemannian_gradient_and_stays_near(entry):
    stiefel = entry("stiefel")
    torch.set_default_dtype(torch.float64)
    try:
        for shape, length in (((5, 5), 1.0), ((2, 5), 0.5)):
            x, g = nn.Parameter(point(*shape)), gaussian(*shape)
            before, x.grad = x.detach().clone(), g
            stiefel.Landing([x], 1e-6).step()
            metric = "euclidean" if length == 1 else "canonical"
            field = length * riemannian_gradient(before, g, metric)
            assert torch.allclose((before - x) / 1e-6, field, atol=1e-6)
            for lr in (1e3, 0.3, 0.7) * 10:
                stiefel.Landing([x], lr).step()
                assert torch.linalg.matrix_norm(x @ x.mT - torch.eye(len(x))) <= 0.5 + 1e-12
    finally:
        torch.set_default_dtype(torch.float32)


def tree(entry, sites, bond, classes=3):
    """One with random cores, in float64."""
    made = entry("tree_tensor_network").Tree(sites, bond, classes).double()
    for level in made.levels:
        level.data = gaussian(*level.shape, seed=level.numel())
    return made


def dense(cores):
    """The tensor of a tree of four sites, ``(classes, 2, 2, 2, 2)``."""
    (left, right), (root,) = (core.unflatten(-1, (math.isqrt(core.shape[-1]),) * 2) for core in cores)
    return torch.einsum("cxy,xij,ykl->cijkl", root, left, right)


def test_the_tree_is_its_explicit_tensor(entry):
    network = entry("tree_tensor_network")
    model, x = tree(entry, 4, 3), torch.rand(5, 2, 2, dtype=torch.float64)
    phi = network.features(x)
    assert torch.allclose(phi.norm(dim=-1), torch.ones(4, 5, dtype=torch.float64))
    expected = torch.einsum("cijkl,bi,bj,bk,bl->bc", dense(model.cores()), *phi)
    assert torch.allclose(model(x), expected)


def test_isometric_cores_and_their_cut(entry):
    """The factor is the norm of the tensor; the error of a cut is at most the Schmidt weights that it drops."""
    network = entry("tree_tensor_network")
    cores = [core.detach() for core in tree(entry, 4, 3).cores()]
    full = dense(cores)
    found, log = network.isometric(cores)
    assert log == pytest.approx(math.log10(full.norm()))
    assert torch.allclose(found[0] @ found[0].mT, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert torch.allclose(dense(found) * full.norm(), full)
    assert torch.allclose(dense(network.cut(found, 3)), dense(found))
    unit = dense(found)
    for bond in (1, 2):
        orders = ((1, 2, 0, 3, 4), (3, 4, 0, 1, 2))
        schmidt = [torch.linalg.svdvals(unit.permute(order).reshape(4, -1)) for order in orders]
        dropped = sum(float(values[bond:].square().sum()) for values in schmidt)
        error = float((dense(network.cut(found, bond)) - unit).square().sum())
        assert dropped / 2 - 1e-12 <= error <= dropped + 1e-12  # each of the two edges alone costs its own part


def test_the_start_has_the_leading_vectors_of_the_reduced_covariances(entry):
    """Against partial traces of the mean of all coarse features, where cores have made these shorter than one."""
    network = entry("tree_tensor_network")
    model = network.Tree(8, 2, 3).double()
    x = torch.rand(30, 2, 4, dtype=torch.float64, generator=seeded())
    network.start_(model, x, torch.arange(30) % 3)
    cores = model.cores()
    h = network.pairs(network.features(x)) @ cores[0].mT
    assert (h.norm(dim=-1) < 0.999).any()
    whole = torch.einsum("bi,bj,bk,bl->bijkl", *h).flatten(1)
    covariance = (whole.mT @ whole).reshape(4, 4, 4, 4)
    traced = (covariance.diagonal(0, 1, 3).sum(-1), covariance.diagonal(0, 0, 2).sum(-1))
    for core, reduced in zip(cores[1], traced, strict=True):
        leading = torch.linalg.eigh(reduced)[1][:, -2:]
        assert torch.allclose(core.mT @ core, leading @ leading.mT, atol=1e-8)


def test_a_block_step_of_the_tree_is_as_long_as_the_papers(entry):
    network = entry("tree_tensor_network")
    model = tree(entry, 8, 2).float()
    for core in model.levels[:-1]:
        core.data = init.orthogonal_(core.data, blocks=4 if len(core) == 8 else 2, generator=seeded())
    opt = network.riemannian(model, argparse.Namespace(lr_riemannian=0.03))
    before = [core.detach().clone() for core in model.cores()]
    model(torch.rand(5, 2, 4)).square().sum().backward()
    opt.step()
    for old, new in zip(before[:-1], model.cores()[:-1], strict=True):
        assert torch.linalg.matrix_norm(new.detach() - old).tolist() == pytest.approx([0.03] * len(old), rel=1e-2)


def test_unit_rows_and_a_gain_are_the_same_layer(entry):
    layer = nn.Linear(5, 3)
    x = torch.randn(4, 5)
    expected = layer(x).detach()
    scaled = entry("weight_norm").Scaled(layer)
    assert torch.allclose(scaled(x), expected, atol=1e-6)
    assert torch.allclose(scaled.weight.norm(dim=1), torch.ones(3))
