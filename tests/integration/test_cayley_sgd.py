"""What docs/migration/cayley_sgd.md says of Cayley SGD, against its paper's Algorithm 1 in float64."""

import itertools
import math

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, mark_orthogonal, orthogonality_error, riemannian_gradient

from ..helpers import gaussian, point
from ..reference.cayley_sgd import CayleySGD, cayley_sgd

SHAPES = [(6, 6), (16, 16), (12, 5), (9, 1)]


def stepped(x, g, *, lr, **options):
    """One step of Algorithm 1 from rest: the point, W X, alpha."""
    options = {"momentum": 0.0, **options}
    return cayley_sgd(x, g, torch.zeros_like(x), lr=lr, **options)


def ours(x, g, lr, optimizer=SGD, **options):
    w = mark_orthogonal(nn.Parameter(x.clone()))
    w.grad = g
    optimizer([w], lr=lr, **options).step()
    return w.detach()


def bound_of(x, g):
    """2 q / ||W||_1 for q = 1/2, from the gradient."""
    _, _, alpha = stepped(x, g, lr=math.inf)
    return float(alpha)


@pytest.mark.parametrize("shape", SHAPES)
def test_cayley_sgd_follows_the_gradient_of_the_euclidean_metric(shape):
    x, g = point(*shape), gaussian(*shape)
    _, direction, _ = stepped(x, g, lr=1.0)
    torch.testing.assert_close(-direction, riemannian_gradient(x, g, "euclidean"))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_cayley_sgd_below_its_bound_takes_the_same_steps(shape, momentum):
    """With enough iterations it is SGD with retraction="cayley", at the same learning rate.

    Its momentum is projected onto the next tangent space, as ours is of rectangular matrices. Of square ones ours moves
    along with the frame: the difference is of second order in the step.
    """
    x = point(*shape)
    w = mark_orthogonal(nn.Parameter(x.clone()))
    lr = 0.01 * bound_of(x, gaussian(*shape))
    opt = SGD([w], lr=lr, momentum=momentum, retraction="cayley")
    m = torch.zeros_like(x)
    for step in range(5):
        g = gaussian(*shape, seed=step)
        x, m, alpha = cayley_sgd(x, g, m, lr=lr, momentum=momentum, s=20)
        assert float(alpha) == lr
        w.grad = g
        opt.step()
    moved = momentum and shape[0] == shape[1]
    torch.testing.assert_close(w.detach(), x, rtol=0, atol=1e-5 if moved else 1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_cayley_sgd_at_its_bound_has_no_learning_rate(shape):
    """Nor does the size of the gradient matter: the step is W / ||W||_1."""
    x, g = point(*shape), 100 * gaussian(*shape)
    assert bound_of(x, g) < 1.5
    reached, direction, alpha = stepped(x, g, lr=1.5, s=40)
    for lr, factor in [(15.0, 1), (1.5, 10), (1e9, 1)]:
        torch.testing.assert_close(stepped(x, factor * g, lr=lr, s=40)[0], reached)
    torch.testing.assert_close(ours(x, g, float(alpha), retraction="cayley"), reached)
    assert float(alpha) * float(torch.linalg.matrix_norm(direction, 2)) <= 1 + 1e-12


@pytest.mark.parametrize("n", [8, 64, 256])
def test_adam_at_one_over_n_is_no_longer_than_the_bound(n):
    """Every entry of its step is at most lr, so a column sums to lr n: the length in the norm of the bound."""
    x, g = point(n, n), gaussian(n, n)
    lr = 1e-3 / n
    omega = (ours(x, g, lr, Adam) - x) @ x.mT / lr
    length = float(torch.linalg.matrix_norm(omega, 1)) / n
    assert 0.6 < length <= 1


def test_iterations_leave_an_error_of_the_fourth_power_of_the_step():
    """A = alpha W / 2: the second iterate is off by 2 A^4, its Gram matrix by 4 A^4."""
    x, g = point(16, 16), gaussian(16, 16)
    bound = bound_of(x, g)
    errors = [orthogonality_error(stepped(x, g, lr=bound * 2.0**-k)[0]) for k in range(2, 5)]
    for error, half in itertools.pairwise(errors):
        assert error / half == pytest.approx(16, rel=0.05)
    _, direction, alpha = stepped(x, g, lr=bound / 16)
    a = float(alpha) / 2 * direction @ x.mT
    fourth = float(torch.linalg.matrix_norm(a @ a @ a @ a))
    assert errors[-1] == pytest.approx(4 * fourth, rel=0.05)


def test_errors_of_the_iterations_add_up():
    """In float64, where rounding has no part in it; ours has none to add up."""
    x, m = point(32, 32), torch.zeros(32, 32, dtype=torch.float64)
    w = mark_orthogonal(nn.Parameter(x.clone()))
    opt = SGD([w], lr=1.0)
    errors = []
    for step in range(200):
        g = gaussian(32, 32, seed=step)
        x, m, alpha = cayley_sgd(x, g, m, lr=1.5, momentum=0.0)
        opt.param_groups[0]["lr"] = float(alpha)
        w.grad = g
        opt.step()
        errors.append(orthogonality_error(x))
    assert errors[0] < 0.01
    assert errors[-1] > 0.1
    assert orthogonality_error(w) < 1e-13


def trained(x, steps=4, **options):
    p = nn.Parameter(x.clone())
    opt = CayleySGD.shipped([p], 0.01, 0.9)
    for name, value in options.items():
        setattr(opt, name, value)
    for seed in range(1, steps + 1):
        p.grad = gaussian(*x.shape, seed=seed).to(x.dtype)
        opt.step()
    return p.detach(), opt


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (12, 6)])
def test_the_class_is_the_paper_without_a_momentum_and_with_other_iterations(shape):
    """Twelve rows of six are two square blocks. Both end at the same point with enough iterations."""
    x = torch.cat([point(min(shape), shape[1], seed=k) for k in range(-(-shape[0] // shape[1]))])
    result, opt = trained(x, iterations=60, qr_chance=0)
    p = nn.Parameter(x.clone())
    paper = CayleySGD.published([p], 0.01)
    paper.iterations = 60
    for seed in range(1, 5):
        p.grad = gaussian(*shape, seed=seed)
        paper.step()
    torch.testing.assert_close(result, p.detach(), rtol=0, atol=1e-7)  # the 1e-8 that is added to norms of rows
    assert opt.taken == paper.taken == 4 * max(1, shape[0] // shape[1])
    assert not any(opt.state.values())
    p.grad = torch.zeros_like(p)
    moved, before = CayleySGD.published([p], 0.01, 0.9), p.detach().clone()
    moved.state[p]["momentum_buffer"] = paper.state[p]["momentum_buffer"]
    moved.step()
    assert (p - before).norm() > 1e-3  # a zero gradient, and yet it goes on


def test_the_class_replaces_a_block_by_its_qr_factor_at_random():
    """With a gradient of zero nothing else happens: rows of length one, or the factor with a positive diagonal."""
    x = gaussian(3, 5)
    p = nn.Parameter(x.clone())
    p.grad = torch.zeros_like(p)
    CayleySGD.shipped([p], 1.5, seed=0).step()  # the first draw of this seed is 0.5
    torch.testing.assert_close(p.detach(), x / x.norm(dim=1, keepdim=True))
    opt = CayleySGD.shipped([p], 1.5)
    opt.qr_chance = 1.0
    opt.step()
    lower = x @ p.detach().mT  # X^T = Q R: rows of x are a lower triangle times the factor
    torch.testing.assert_close(lower, lower.tril())
    assert lower.diagonal().min() > 0
    assert orthogonality_error(p.detach()) < 1e-14
    drawn = torch.rand(10100, generator=torch.Generator().manual_seed(0)) < CayleySGD.shipped([p], 1.5).qr_chance
    assert abs(int(drawn.sum()) - 100) < 40  # four standard deviations


def test_five_iterations_leave_the_manifold_by_the_power_of_their_number():
    """The error of an unprojected start shrinks by A in each iteration, A = alpha W / 2."""
    x = point(16, 16)
    errors = [orthogonality_error(trained(x, 1, iterations=s, qr_chance=0)[0]) for s in (1, 2, 3, 5)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1e3 * errors[-1]
