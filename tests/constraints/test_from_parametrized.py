"""From torch's and geotorch's orthogonal parametrizations to a marked parameter."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from manifold_opt import Adam, Orthogonal, check, constraint_of, orthogonality_error
from manifold_opt.constraints.from_parametrized import from_parametrized
from manifold_opt.linalg import matrices
from manifold_opt.stiefel import geometry

from ..helpers import each, pairs

MAPS = [(name, trivial) for name in ("matrix_exp", "cayley", "householder") for trivial in (True, False)]
SHAPES = [(6, 4), (4, 6), (5, 5), (1, 3)]


def trained(module: nn.Module, seed: int = 0) -> nn.Module:
    """Its tensors moved away from where they start, so that none is its default."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, p in module.named_parameters():
            noise = 0.1 * torch.randn(p.shape, generator=generator)
            if key.endswith(".original"):  # the diagonal of a Householder one holds signs
                noise *= 1 - torch.eye(*p.shape[-2:])
            p.add_(noise)
    return module


def linear(shape=(6, 4), orthogonal_map=None, trivial=True, seed=0) -> nn.Module:
    torch.manual_seed(seed)
    layer = parametrizations.orthogonal(nn.Linear(*shape), "weight", orthogonal_map, use_trivialization=trivial)
    return trained(layer, seed)


def orthogonal_to_rounding(value: torch.Tensor) -> bool:
    p, n = sorted(value.shape[-2:])
    return float(geometry.error(value).max()) <= matrices.error_at_rounding(p, n, value.dtype)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.ModuleDict({"layer": nn.Bilinear(3, 4, 5), "out": nn.Linear(5, 2)})
        self.rnn = nn.GRU(3, 4)
        self.odd = nn.Parameter(torch.randn(4, 4))


def parametrized(seed: int) -> Model:
    torch.manual_seed(seed)
    model = Model()
    for owner, name in ((model.encoder["out"], "weight"), (model.rnn, "weight_hh_l0"), (model.rnn, "weight_ih_l0")):
        parametrizations.orthogonal(owner, name)
    parametrizations.orthogonal(model, "odd", "cayley")
    return trained(model, seed)


@each({"orthogonal_map, trivial": MAPS}, shape=SHAPES)
def test_it_becomes_a_marked_parameter_of_the_same_value(shape, orthogonal_map, trivial):
    layer = linear(shape, orthogonal_map, trivial)
    x, before = torch.randn(7, shape[0]), layer.weight.detach().clone(memory_format=torch.contiguous_format)
    assert orthogonal_to_rounding(before)
    weight = from_parametrized(layer)
    assert type(layer) is nn.Linear
    assert weight is layer.weight
    assert list(dict(layer.named_parameters())) == ["bias", "weight"]
    assert weight.is_leaf
    assert weight.requires_grad
    assert weight.is_contiguous()
    assert constraint_of(weight) == Orthogonal(1)
    assert torch.equal(weight, before)
    assert torch.equal(layer(x), nn.functional.linear(x, before, layer.bias))


def test_a_value_off_by_more_than_rounding_goes_to_the_nearest():
    class Rough(nn.Module):
        def forward(self, x):
            return torch.linalg.qr(x).Q * 1.0001

    layer = nn.Linear(4, 6)
    parametrize.register_parametrization(layer, "weight", Rough())
    before = layer.weight.detach()
    weight = from_parametrized(layer)
    torch.testing.assert_close(weight.detach(), before / 1.0001)
    assert orthogonality_error(weight) < 1e-6


@pairs(shape=[(6, 4), (4, 6), (5, 5)], triv=["expm", "cayley"], manifold=["orthogonal", "grassmannian"])
def test_geotorch(shape, triv, manifold):
    geotorch = pytest.importorskip("geotorch")
    layer = nn.Linear(*shape)
    if manifold == "orthogonal":
        geotorch.orthogonal(layer, "weight", triv)
    else:
        geotorch.grassmannian(layer, "weight", triv)
    trained(layer)
    checkpoint, before = copy.deepcopy(layer.state_dict()), layer.weight.detach().clone()
    weight = from_parametrized(layer)
    torch.testing.assert_close(weight.detach(), before, rtol=0, atol=1e-6)
    if orthogonal_to_rounding(before):
        assert torch.equal(weight, before)
    assert constraint_of(weight) == Orthogonal(1)
    with torch.no_grad():
        weight.zero_()
    layer.load_state_dict(checkpoint)
    assert torch.equal(weight, before)
    assert torch.equal(pickle.loads(pickle.dumps(layer)).weight, weight)


@pytest.mark.parametrize("orthogonal_map", ["matrix_exp", "cayley", "householder"])
def test_more_than_two_dimensions_are_a_batch_of_matrices(orthogonal_map):
    layer = nn.Conv2d(3, 5, (4, 2))
    parametrizations.orthogonal(layer, "weight", orthogonal_map)
    checkpoint, before = copy.deepcopy(layer.state_dict()), layer.weight.detach().clone()
    weight = from_parametrized(layer)
    assert torch.equal(weight, before)
    assert weight.is_contiguous()
    assert orthogonality_error(weight) < 1e-5
    with torch.no_grad():
        weight.zero_()
    layer.load_state_dict(checkpoint)
    assert torch.equal(weight, before)
    opt = Adam([weight], lr=0.1)
    layer(torch.randn(2, 3, 8, 8)).square().sum().backward()
    opt.step()
    assert not torch.equal(weight, before)
    assert float(geometry.error(weight.detach()).max()) < 1e-5


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("run_before", [False, True])
def test_the_weight_of_an_rnn(kind, run_before):
    """One tall matrix, as torch has it; the module computes with the parameter and trains it."""
    rnn = kind(3, 4, num_layers=2)
    parametrizations.orthogonal(rnn, "weight_hh_l0")
    parametrizations.orthogonal(rnn, "weight_hh_l1")
    trained(rnn)
    x = torch.randn(5, 2, 3)
    expected = rnn(x)[0].detach() if run_before else None
    before = rnn.weight_hh_l0.detach().clone()
    weights = [from_parametrized(rnn, "weight_hh_l0"), from_parametrized(rnn, "weight_hh_l1")]
    assert type(rnn) is kind
    assert constraint_of(weights[0]) == Orthogonal(1)
    assert torch.equal(weights[0], before)
    for name, kept in zip(rnn._flat_weights_names, rnn._flat_weights, strict=True):
        assert kept is getattr(rnn, name), name
    if run_before:
        torch.testing.assert_close(rnn(x)[0], expected)
    plain = kind(3, 4, num_layers=2)
    plain.load_state_dict(rnn.state_dict())
    assert torch.equal(plain(x)[0], rnn(x)[0])
    opt = Adam(rnn.parameters(), lr=0.1)
    for _ in range(2):  # the second time, nothing of the first graph is left in the module
        opt.zero_grad()
        rnn(x)[0].square().sum().backward()
        opt.step()
        plain.load_state_dict(rnn.state_dict())
        assert torch.equal(plain(x)[0], rnn(x)[0])
    assert all(not torch.equal(w, before) and orthogonality_error(w) < 1e-5 for w in weights)
    assert check(rnn, opt) == []
    assert torch.equal(copy.deepcopy(rnn)(x)[0], rnn(x)[0])


def test_frozen_stays_frozen_and_training_moves_it():
    layer = linear()
    layer.parametrizations.weight.original.requires_grad_(False)
    assert not from_parametrized(layer).requires_grad
    layer = linear((8, 3))
    weight = from_parametrized(layer)
    before, opt = weight.detach().clone(), Adam(layer.parameters(), lr=0.1)
    layer(torch.randn(5, 8)).square().sum().backward()
    opt.step()
    assert not torch.equal(weight, before)
    assert orthogonality_error(weight) < 1e-5


class Halves(nn.Module):
    def forward(self, x):
        return x / 2


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (nn.Linear, r"no parametrized 'weight'; parametrized there: none\. Mark a plain .* mark_orthogonal"),
        (
            lambda *shape: nn.utils.parametrizations.spectral_norm(nn.Linear(*shape)),
            r"_SpectralNorm, is not orthogonal: .* is [\d.]+, above 0.001 sqrt\(4\)\. .*remove_parametrizations",
        ),
        (lambda *shape: nn.utils.parametrizations.weight_norm(nn.Linear(*shape)), "_WeightNorm, is not orthogonal"),
    ],
)
def test_what_is_refused(make, match):
    layer = make(6, 4)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match=match):
        from_parametrized(layer)
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())


def test_the_refusal_names_what_there_is():
    model = parametrized(0)
    with pytest.raises(ValueError, match=r"no parametrized 'encoder.layer.weight'.*encoder.out.weight, rnn.weight_hh"):
        from_parametrized(model, "encoder.layer.weight")
    with pytest.raises(ValueError, match="no module 'decoder'"):
        from_parametrized(model, "decoder.weight")


def test_more_that_is_refused():
    layer = linear()
    parametrize.register_parametrization(layer, "weight", Halves())
    with pytest.raises(ValueError, match="_Orthogonal, Halves, is not orthogonal"):
        from_parametrized(layer)
    buffers = nn.Module()
    buffers.register_buffer("weight", torch.eye(3))
    parametrizations.orthogonal(buffers)
    with pytest.raises(ValueError, match="a buffer and is not trained"):
        from_parametrized(buffers)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight
    for child in tied:
        parametrizations.orthogonal(child, use_trivialization=False, orthogonal_map="householder")
    with pytest.raises(ValueError, match=r"shares 0\.weight\.original with another"):
        from_parametrized(tied, "0.weight")
    broken = linear()
    with torch.no_grad():
        broken.parametrizations.weight.original.fill_(float("nan"))
    with pytest.raises(ValueError, match="is nan, above"):
        from_parametrized(broken)
    assert parametrize.is_parametrized(broken, "weight")


def test_geotorch_is_not_needed():
    import manifold_opt.constraints.from_parametrized as module

    assert "geotorch" not in {line.split()[1] for line in inspect.getsource(module).splitlines() if "import " in line}


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_a_unitary_weight():
    layer = nn.utils.parametrizations.orthogonal(nn.Linear(6, 4, dtype=torch.complex64), orthogonal_map="matrix_exp")
    before, saved = layer.weight.detach().clone(), layer.state_dict()
    weight = from_parametrized(layer)
    assert torch.equal(weight, before)
    assert layer.load_state_dict(saved)
