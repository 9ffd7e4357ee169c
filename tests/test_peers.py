"""What README's table says of the others, and of this package beside them: a test a row.

Those of geotorch and POGO run where the extra ``compare`` is installed.
"""

import importlib
import io
import math
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal
from torch.utils._python_dispatch import TorchDispatchMode

from manifold_opt import Adam, mark_orthogonal, mark_recurrent, orthogonality_error

from .helpers import gaussian

geoopt = pytest.importorskip("geoopt")
STEPS = 20


def peer(name):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError:
        pytest.skip(f"{name} is not installed: pip install manifold-opt[compare]")


def pogo(parameters, lr):
    return peer("pogo").POGO(parameters, peer("pogo.base").VectorAdam(), lr)


def off(w):
    """The largest distance from unitary of some matrices."""
    w = w.detach().to(torch.complex128)
    return float(torch.linalg.matrix_norm(w @ w.mH - torch.eye(w.shape[-2])).max())


def noise(step, like):
    real, imaginary = (gaussian(*like.shape, seed=2 * step + part) for part in (0, 1))
    return (torch.complex(real, imaginary) if like.is_complex() else real).to(like.dtype)


def started(library, dtype=torch.float32, n=8, count=1, lr=0.01):
    """Square parameters and an optimizer of one that keeps the parameter itself on the manifold."""
    values = [torch.eye(n, dtype=dtype) for _ in range(count)]
    if library == "geoopt canonical":
        parameters = [geoopt.ManifoldParameter(value, manifold=geoopt.Stiefel()) for value in values]
        return parameters, geoopt.optim.RiemannianAdam(parameters, lr=lr)
    if library == "geoopt euclidean":
        parameters = [geoopt.ManifoldParameter(value, manifold=geoopt.EuclideanStiefel()) for value in values]
        return parameters, geoopt.optim.RiemannianAdam(parameters, lr=lr)
    if library == "pogo":
        parameters = [nn.Parameter(value[None]) for value in values]
        return parameters, pogo(parameters, lr)
    parameters = [mark_orthogonal(nn.Parameter(value)) for value in values]
    return parameters, Adam(parameters, lr=lr)


def trained(library, dtype=torch.float32, steps=STEPS, **options):
    (w, *_), opt = started(library, dtype, **options)
    for step in range(steps):
        w.grad = noise(step, w)
        opt.step()
    return w.detach()


def parametrized(library, module, name="weight", **options):
    return orthogonal(module, name, **options) if library == "torch" else peer("geotorch").orthogonal(module, name)


def trained_parametrized(library, lr, **options):
    layer = nn.Linear(8, 8)
    parametrized(library, layer, **options)
    opt = torch.optim.Adam(layer.parameters(), lr=lr)
    for step in range(STEPS):
        opt.zero_grad()
        (layer.weight * noise(step, layer.weight)).sum().backward()
        opt.step()
    return layer.weight.detach()


@pytest.mark.parametrize("library", ["torch", "geotorch"])
def test_gates(library):
    """Of the (3H, H) stack the whole has orthonormal columns; its gates are a long way off."""
    gru = nn.GRU(4, 8)
    parametrized(library, gru, "weight_hh_l0")
    assert off(gru.weight_hh_l0.mT) < 1e-5
    assert off(gru.weight_hh_l0.unflatten(0, (3, 8))) > 1
    ours = nn.GRU(4, 8)
    mark_recurrent(ours)
    assert off(ours.weight_hh_l0.unflatten(0, (3, 8))) < 1e-5


def test_gates_of_those_that_move_the_parameter():
    stack = gaussian(24, 8, dtype=torch.float32)
    manifold = geoopt.Stiefel()
    weight = geoopt.ManifoldParameter(manifold.projx(stack), manifold=manifold)
    assert off(weight.mT) < 1e-5
    assert off(weight.detach().unflatten(0, (3, 8))) > 1
    parameter = nn.Parameter(stack)
    opt = pogo([parameter], 0.01)
    parameter.grad = noise(0, stack)
    with pytest.raises(AssertionError, match="shaped"):
        opt.step()


@pytest.mark.parametrize("library", ["torch", "geotorch"])
def test_the_weight_is_the_parameter(library):
    layer, plain = nn.Linear(8, 8), nn.Linear(8, 8)
    keys = list(plain.state_dict())
    parametrized(library, layer)
    assert "weight" not in layer.state_dict()
    mark_orthogonal(plain, "weight")
    assert list(plain.state_dict()) == keys


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("library", "together"), [("geoopt euclidean", False), ("pogo", False), ("ours", True)])
def test_small_matrices_of_many_parameters_move_together(library, together):
    """Ten parameters take nine times the operations of one, or not twice."""
    counts = []
    for count in (1, 10):
        parameters, opt = started(library, count=count)
        for step in range(2):
            for p in parameters:
                p.grad = noise(step, p)
            with Operations() as operations:
                opt.step()
        counts.append(operations.count)
    assert (counts[1] < 2 * counts[0]) if together else (counts[1] > 9 * counts[0])


@pytest.mark.parametrize(("library", "kind"), [("geoopt euclidean", True), ("pogo", False), ("ours", True)])
def test_an_instance_of_torchs_adam(library, kind):
    assert isinstance(started(library)[1], torch.optim.Adam) == kind


def test_a_closure_is_called():
    """POGO's step takes one and leaves it."""
    called = []
    for library in ("pogo", "ours"):
        (w,), opt = started(library)
        w.grad = noise(0, w)
        opt.step(lambda: called.append(library))  # noqa: B023
    assert called == ["ours"]


@pytest.mark.parametrize(("library", "bound"), [("geoopt canonical", 1e-3), ("geoopt euclidean", 1e-5), ("ours", 1e-5)])
def test_a_large_learning_rate(library, bound):
    assert off(trained(library, lr=1e4)) < bound


def test_a_large_learning_rate_of_pogo():
    assert math.isnan(off(trained("pogo", lr=10.0)))


@pytest.mark.parametrize(
    ("library", "options", "good"),
    [
        ("torch", {"orthogonal_map": "matrix_exp"}, False),
        ("torch", {"orthogonal_map": "cayley"}, True),
        ("torch", {"orthogonal_map": "householder"}, True),
        ("geotorch", {}, False),
    ],
)
def test_a_large_learning_rate_of_parametrizations(library, options, good):
    torch.manual_seed(0)
    error = off(trained_parametrized(library, 1e4, **options))
    assert error < 1e-5 if good else 0.003 < error < 0.3


def test_any_value_is_a_start():
    """geoopt takes it as it is given; POGO too."""
    value = gaussian(8, 8, dtype=torch.float32)
    assert off(geoopt.ManifoldParameter(value.clone(), manifold=geoopt.Stiefel())) > 1
    parameter = nn.Parameter(value.clone()[None])
    pogo([parameter], 0.01)
    assert off(parameter) > 1
    assert off(mark_orthogonal(nn.Parameter(value.clone()))) < 1e-5


def test_wide_matrices():
    wide = torch.eye(3, 6)
    with pytest.raises(ValueError, match="shape"):
        geoopt.ManifoldParameter(wide.clone(), manifold=geoopt.Stiefel())
    assert orthogonality_error(mark_orthogonal(nn.Parameter(wide.clone()))) < 1e-6


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_unitary_matrices_of_others():
    with pytest.raises(ValueError, match="complex"):
        orthogonal(nn.Linear(4, 4, dtype=torch.complex64), orthogonal_map="householder")
    for name in ("matrix_exp", "cayley"):
        assert off(orthogonal(nn.Linear(4, 4, dtype=torch.complex64), orthogonal_map=name).weight) < 1e-5
    assert off(trained("geoopt canonical", torch.complex64, lr=0.1)) > 0.1  # and says nothing
    with pytest.raises(NotImplementedError):
        trained("geoopt euclidean", torch.complex64)
    assert off(trained("ours", torch.complex64, lr=0.1)) < 1e-5


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_unitary_matrices_of_geotorch_and_pogo():
    with pytest.raises(NotImplementedError):
        parametrized("geotorch", nn.Linear(4, 4, dtype=torch.complex64))
    assert off(trained("pogo", torch.complex64)) < 1e-4


@pytest.mark.parametrize("library", ["torch", "geotorch"])
def test_bfloat16_of_parametrizations(library):
    layer = nn.Linear(8, 8, dtype=torch.bfloat16)
    with pytest.raises((NotImplementedError, TypeError)):
        off(parametrized(library, layer).weight)


def test_bfloat16():
    """POGO holds everything in bfloat16; here values and moments are held in float32 behind it."""
    for manifold in ("geoopt canonical", "geoopt euclidean"):
        with pytest.raises(NotImplementedError):
            trained(manifold, torch.bfloat16)
    (w,), opt = started("ours", torch.bfloat16, lr=1e-4)
    for step in range(STEPS):
        w.grad = noise(step, w)
        opt.step()
    assert {value.dtype for value in opt.state[w].values()} == {torch.float32}
    assert torch.equal(opt.state[w]["master"].bfloat16(), w)


def test_bfloat16_of_pogo():
    (w,), opt = started("pogo", torch.bfloat16)
    w.grad = noise(0, w)
    opt.step()
    moments = [x for x in opt.state[w].values() if isinstance(x, torch.Tensor) and x.numel() > 1]
    assert {x.dtype for x in moments} <= {torch.bfloat16}
    assert off(w) < 0.05


@pytest.mark.parametrize(
    ("library", "finite"),
    [("geoopt canonical", False), ("geoopt euclidean", False), ("pogo", False), ("ours", True)],
)
def test_a_gradient_that_is_not_finite(library, finite):
    (w,), opt = started(library)
    w.grad = torch.full_like(w, torch.nan)
    opt.step()
    assert bool(w.isfinite().all()) == finite


@pytest.mark.parametrize("library", ["torch", "geotorch"])
def test_a_gradient_that_is_not_finite_of_parametrizations(library):
    layer = nn.Linear(4, 4)
    parametrized(library, layer)
    original = layer.parametrizations.weight.original
    original.grad = torch.full_like(original, torch.nan)
    torch.optim.Adam(layer.parameters()).step()
    assert not bool(layer.weight.isfinite().any())


@pytest.mark.parametrize(("library", "good"), [("geoopt canonical", True), ("pogo", False), ("ours", True)])
def test_a_checkpoint(library, good):
    (w,), opt = started(library)
    w.grad = noise(0, w)
    opt.step()
    file = io.BytesIO()
    if not good:
        with pytest.raises(Exception, match=r"pickle|Pickl"):
            torch.save(opt.state_dict(), file)
        return
    torch.save(opt.state_dict(), file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["param_groups"]


def test_other_constraints():
    from torch.nn.utils import parametrizations

    assert {"weight_norm", "spectral_norm"} <= set(dir(parametrizations))
    assert {"Sphere", "PoincareBall", "Lorentz", "SymmetricPositiveDefinite"} <= set(dir(geoopt))
    assert {"low_rank", "positive_definite", "sphere"} <= set(dir(peer("geotorch")))
