"""Known optima, reached: orthogonal Procrustes and PCA with every retraction."""

import pytest
import torch
from torch import nn

from manifold_opt import RETRACTIONS, SGD, Adam, mark_orthogonal, orthogonality_error

from ..helpers import each, gaussian, point

OPTIMIZERS = {
    "sgd": lambda p, **o: SGD(p, lr=0.05, momentum=0.9, **o),
    "nesterov": lambda p, **o: SGD(p, lr=0.05, momentum=0.9, nesterov=True, **o),
    "adam": lambda p, **o: Adam(p, lr=0.01, **o),
    "adam block": lambda p, **o: Adam(p, lr=0.01, second_moment="block", **o),
}


def relative_gap(weight, loss, best, opt, steps=3000):
    """Distance from the optimum after minimizing, relative; ends early where it is reached."""
    for step in range(steps):
        opt.zero_grad()
        value = loss(weight)
        if step % 50 == 0 and abs(float(value.detach()) - best) < 1e-9 * abs(best):
            break
        value.backward()
        opt.step()
    assert orthogonality_error(weight) < 1e-12
    return abs(float(loss(weight).detach()) - best) / abs(best)


@each(retraction=RETRACTIONS, optimizer=OPTIMIZERS, shape=[(6, 6), (4, 10), (10, 4)])
def test_procrustes(retraction, optimizer, shape):
    """min -<M, W>: the optimum is minus the sum of the singular values of M, at its polar factor."""
    m = gaussian(*shape)
    weight = nn.Parameter(point(*shape, seed=3))
    if shape[0] == shape[1] and torch.linalg.det(weight.detach()) * torch.linalg.det(m) < 0:
        weight.data[0] *= -1  # the optimum lies in one component of O(n), and no step leaves its own
    opt = OPTIMIZERS[optimizer]([mark_orthogonal(weight)], retraction=retraction)
    best = -float(torch.linalg.svdvals(m).sum())
    assert relative_gap(weight, lambda w: -(m * w).sum(), best, opt) <= 1e-8


@pytest.mark.parametrize(
    "retraction",
    [name if name == "orthographic" else pytest.param(name, marks=pytest.mark.slow) for name in RETRACTIONS],
)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_pca(retraction, optimizer):
    """max tr(W C W^T) over 3 x 12 points: the sum of the three largest eigenvalues of C."""
    basis = point(12, 12, seed=4)
    eigenvalues = torch.linspace(0, 3, 12, dtype=torch.float64)
    c = (basis * eigenvalues) @ basis.mT
    weight = mark_orthogonal(nn.Parameter(point(3, 12, seed=5)))
    opt = OPTIMIZERS[optimizer]([weight], retraction=retraction)
    best = -float(eigenvalues[-3:].sum())
    assert relative_gap(weight, lambda w: -((w @ c) * w).sum(), best, opt) <= 1e-8


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("metric", ["euclidean", "canonical"])
def test_both_metrics_have_the_same_optimum(optimizer, metric):
    m = gaussian(4, 10)
    weight = mark_orthogonal(nn.Parameter(point(4, 10, seed=3)))
    opt = OPTIMIZERS[optimizer]([weight], metric=metric)
    best = -float(torch.linalg.svdvals(m).sum())
    assert relative_gap(weight, lambda w: -(m * w).sum(), best, opt) <= 1e-8
