"""Manifolds of geoopt: the same steps as its own optimizers, its parameters taken as they are."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from manifold_opt import (
    SGD,
    Adam,
    Orthogonal,
    check,
    constraint_of,
    mark_manifold,
    mark_orthogonal,
    orthogonality_error,
)
from manifold_opt import project_to_manifold_ as project_model

from ..helpers import each, gaussian

geoopt = pytest.importorskip("geoopt")
pytestmark = pytest.mark.filterwarnings("ignore:.*not fully implemented")


@pytest.fixture(autouse=True)
def _in_double():
    """Curvatures are created in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def product():
    return geoopt.ProductManifold((geoopt.Sphere(), 3), (geoopt.PoincareBall(c=0.5), 2), (geoopt.Euclidean(), 2))


MANIFOLDS = {
    "sphere": (geoopt.Sphere, (5, 4)),
    "sphere, one point": (geoopt.Sphere, (4,)),
    "sphere, a batch of batches": (geoopt.Sphere, (2, 3, 4)),
    "sphere exact": (geoopt.SphereExact, (5, 4)),
    "ball": (geoopt.PoincareBall, (6, 3)),
    "ball 0.1, one point": (lambda: geoopt.PoincareBall(c=0.1), (3,)),
    "ball 4": (lambda: geoopt.PoincareBall(c=4.0), (2, 2, 3)),
    "ball exact": (geoopt.PoincareBallExact, (6, 3)),
    "lorentz": (geoopt.Lorentz, (5, 4)),
    "lorentz 2, one point": (lambda: geoopt.Lorentz(k=2.0), (4,)),
    "spd": (geoopt.SymmetricPositiveDefinite, (3, 4, 4)),
    "spd, one point": (geoopt.SymmetricPositiveDefinite, (4, 4)),
    "product": (product, (6, 7)),
    "scaled ball": (lambda: geoopt.Scaled(geoopt.PoincareBall(), 2.0), (5, 3)),
    "euclidean": (geoopt.Euclidean, (4, 2)),
    "birkhoff": (geoopt.BirkhoffPolytope, (4, 4)),
    "upper half": (geoopt.UpperHalf, (2, 2)),
}
PAIRS = {
    "sgd": (lambda p: SGD(p, lr=0.02), lambda p: geoopt.optim.RiemannianSGD(p, lr=0.02)),
    "adam": (lambda p: Adam(p, lr=0.02), lambda p: geoopt.optim.RiemannianAdam(p, lr=0.02)),
    "amsgrad": (
        lambda p: Adam(p, lr=0.02, amsgrad=True, betas=(0.8, 0.9)),
        lambda p: geoopt.optim.RiemannianAdam(p, lr=0.02, amsgrad=True, betas=(0.8, 0.9)),
    ),
}


def a_point(manifold, shape, seed=0):
    x = gaussian(*shape, seed=seed)
    if isinstance(manifold, geoopt.UpperHalf):
        return torch.complex(x + x.mT, torch.linalg.matrix_exp(0.3 * (x + x.mT)))
    if manifold.ndim == 2:
        x = (
            (x.mT @ x if len(shape) == 2 else x @ x.mT) / 9 + 0.1 * torch.eye(shape[-1])
            if manifold.name.startswith("Sym")
            else x.exp()
        )
    return manifold.projx(x if manifold.ndim == 2 else 0.3 * x).detach()


def loss_of(target):
    return lambda x: (x - target).abs().square().sum()


def train(p, opt, loss, steps=1):
    for _ in range(steps):
        opt.zero_grad()
        loss(p).backward()
        opt.step()


@each(form=["marked", "as it is"], pair=PAIRS, name=MANIFOLDS)
def test_steps_are_geoopts(name, pair, form):
    """For 30 steps, to rounding that they pass on; it is nowhere more than 1e-9."""
    if (name, pair) == ("upper half", "amsgrad"):
        pytest.skip("geoopt has no amsgrad of complex points")
    make, shape = MANIFOLDS[name]
    manifold = make()
    start, target = a_point(manifold, shape), a_point(manifold, shape, seed=1)
    theirs = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    ours = copy.deepcopy(theirs) if form == "as it is" else mark_manifold(nn.Parameter(start.clone()), manifold)
    a, b = PAIRS[pair][0]([ours]), PAIRS[pair][1]([theirs])
    loss = loss_of(target)
    before = float(loss(start))
    for _ in range(30):
        train(ours, a, loss)
        gradient = ours.grad.clone()
        a.metrics()
        assert torch.equal(ours.grad, gradient)
        train(theirs, b, loss)
        torch.testing.assert_close(ours.detach(), theirs.detach().as_subclass(torch.Tensor), rtol=1e-9, atol=1e-9)
    assert float(loss(ours).detach()) < before
    assert a.metrics()["skipped_blocks"] == 0
    assert type(ours) is (geoopt.ManifoldParameter if form == "as it is" else nn.Parameter)


def test_a_poincare_embedding_of_a_tree():
    """A binary tree of depth three in the disc: as geoopt's own optimizer embeds it."""
    ball = geoopt.PoincareBall()
    edges = torch.tensor([[child, (child - 1) // 2] for child in range(1, 15)])
    start = 0.01 * gaussian(15, 2)

    def loss(x):
        x = x.as_subclass(torch.Tensor)
        distances = ball.dist(x[edges[:, :1]], x[None, :].expand(14, -1, -1))
        near = distances.gather(1, edges[:, 1:])
        return (near + torch.logsumexp(-distances.scatter(1, edges[:, :1], 1e3), 1, keepdim=True)).mean()

    theirs = geoopt.ManifoldParameter(start.clone(), manifold=ball)
    ours = mark_manifold(nn.Parameter(start.clone()), ball)
    a, b = Adam([ours], lr=0.05), geoopt.optim.RiemannianAdam([theirs], lr=0.05)
    before = float(loss(ours).detach())
    for _ in range(100):
        train(ours, a, loss)
        train(theirs, b, loss)
    torch.testing.assert_close(ours.detach(), theirs.detach().as_subclass(torch.Tensor), rtol=1e-6, atol=1e-6)
    assert float(loss(ours).detach()) < before - 1
    assert float(ours.detach().norm(dim=1).max()) < 1


def test_the_karcher_mean_of_two_matrices():
    """Of A and B it is known: A^(1/2) (A^(-1/2) B A^(-1/2))^(1/2) A^(1/2)."""
    manifold = geoopt.SymmetricPositiveDefinite()
    a, b = a_point(manifold, (3, 3)), a_point(manifold, (3, 3), seed=1)
    mean = mark_manifold(nn.Parameter(a_point(manifold, (3, 3), seed=2)), manifold)
    opt = SGD([mean], lr=0.2, momentum=0.3)
    train(mean, opt, lambda x: (manifold.dist(x, a) ** 2 + manifold.dist(x, b) ** 2) / 2, 150)

    def power(x, exponent):
        values, vectors = torch.linalg.eigh(x)
        return vectors @ torch.diag(values**exponent) @ vectors.mT

    root, inverse = power(a, 0.5), power(a, -0.5)
    expected = root @ power(inverse @ b @ inverse, 0.5) @ root
    torch.testing.assert_close(mean.detach(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("make", [geoopt.Stiefel, geoopt.EuclideanStiefel, geoopt.CanonicalStiefel])
@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (2, 6, 4)])
def test_stiefel_goes_the_way_of_orthogonal_blocks(make, shape):
    """Tall here and there; geoopt's gradient is that of metric="canonical" where its manifold is canonical."""
    manifold = make()
    start = manifold.random(*shape).detach().contiguous()
    taken = geoopt.ManifoldParameter(start.clone(), manifold=manifold)
    given = mark_manifold(nn.Parameter(start.clone()), manifold)
    batch = mark_orthogonal(nn.Parameter(start.clone()), flatten=False)
    assert constraint_of(taken) == constraint_of(given) == constraint_of(batch) == Orthogonal(flatten=False)
    metric = "canonical" if isinstance(manifold, geoopt.CanonicalStiefel) else "euclidean"
    g = gaussian(*shape, seed=3)
    for p in (taken, given, batch):
        assert torch.equal(p.detach(), start)
        p.grad = g.clone()
        SGD([p], lr=1e-6, metric=metric).step()
        moved = (p.detach().as_subclass(torch.Tensor) - start) / -1e-6
        torch.testing.assert_close(moved, manifold.egrad2rgrad(start, g), rtol=1e-3, atol=1e-4)
        assert orthogonality_error(p) < 1e-13
    assert torch.equal(taken, given)
    assert torch.equal(taken, batch)


def test_importing_the_package_does_not_import_geoopt():
    """Nor what the comparison needs, which is not imported either."""
    others = ("geoopt", "rich", "matplotlib", "jinja2", "sklearn", "manifold_opt.compare")
    code = "import sys, torch, manifold_opt as m; p = m.mark_unit_norm(torch.nn.Parameter(torch.ones(2, 2)))\n"
    code += f"p.grad = torch.ones(2, 2); m.Adam([p]).step(); sys.exit(any(x in sys.modules for x in {others}))"
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=False).returncode == 0


# What cannot be, and what goes wrong.


@pytest.mark.parametrize(
    ("manifold", "value", "message"),
    [
        (geoopt.SymmetricPositiveDefinite, torch.zeros(3, 3), "singular matrix. Initialize it first, with random"),
        (geoopt.SymmetricPositiveDefinite, torch.full((3, 3), torch.nan), "not finite"),
        (geoopt.SymmetricPositiveDefinite, torch.ones(3), "refuses: .*requires more than 2 dim"),
        (geoopt.Sphere, torch.zeros(3), "Initialize it first"),
        (geoopt.Lorentz, torch.full((3,), torch.inf), "not finite"),
    ],
)
def test_what_is_no_point_is_refused_before_anything_is_written(manifold, value, message):
    p = nn.Parameter(value.clone())
    with pytest.raises(ValueError, match=f"^mark_manifold: the parameter.*{message}"):
        mark_manifold(p, manifold())
    assert torch.equal(p.nan_to_num(), value.nan_to_num())
    assert constraint_of(p) is None


@pytest.mark.parametrize("name", ["retr", "transp"])
def test_matrices_that_do_not_factorize_stay_and_are_counted(name):
    """One of three, so ill-conditioned that LAPACK gives up: as NaN in it would be."""
    manifold = geoopt.SymmetricPositiveDefinite()
    stack = mark_manifold(nn.Parameter(torch.eye(3).repeat(3, 1, 1)), manifold)
    opt = Adam([stack], lr=0.1)
    works = getattr(manifold, name)

    def fails(*batches):
        if bool((batches[-1][..., 0, 0].abs() > 0.05).any()):
            raise torch.linalg.LinAlgError("linalg.eigh: failed to converge")
        return works(*batches)

    setattr(manifold, name, fails)
    stack.grad = torch.zeros_like(stack)
    stack.grad[1] = torch.eye(3)
    stack.grad[2, 0, 1] = 1.0
    opt.step()
    assert torch.equal(stack[:2], torch.eye(3).repeat(2, 1, 1))
    assert not torch.equal(stack[2], torch.eye(3))
    assert opt.metrics()["skipped_blocks"] == 1
    assert all(bool(value.isfinite().all()) for value in opt.state[stack].values())


def test_a_point_that_has_left_is_put_back():
    net = nn.Module()
    net.points = geoopt.ManifoldParameter(0.1 * gaussian(6, 3), manifold=geoopt.PoincareBall())
    with torch.no_grad():
        net.points[2] = 5.0
    assert any("points is not on Geoopt(PoincareBall" in problem for problem in check(net, Adam(net.parameters())))
    before = net.points.detach().clone()
    project_model(net)
    assert float(net.points.detach()[2].norm()) < 1
    keep = [0, 1, 3, 4, 5]
    assert torch.equal(net.points[keep], before[keep])
