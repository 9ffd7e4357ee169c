"""A net whose layers have bounded spectral norms, trained on real digits."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from manifold_opt import Adam, AdamW, mark_spectral

sklearn_datasets = pytest.importorskip("sklearn.datasets")

BOUNDS = {"0.weight": 0.9, "2.weight": 1.5, "4.weight": 1.0, "8.weight": 2.0}
TRANSPOSED = "4.weight"


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 12, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.ConvTranspose2d(12, 6, 2, stride=2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)),
    )


@pytest.fixture(scope="module")
def digits():
    images, labels = sklearn_datasets.load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


def sigma(model, name):
    weight = model.get_parameter(name).detach().double()
    matrix = weight.movedim(1, 0) if name == TRANSPOSED else weight
    return float(torch.linalg.svdvals(matrix.flatten(1))[0])


@pytest.mark.parametrize(
    ("make", "dtype", "slack"),
    [
        pytest.param(lambda p: Adam(p, lr=1e-2), torch.float32, 1e-3, marks=pytest.mark.slow),
        (lambda p: AdamW(p, lr=1e-2, weight_decay=0.1, amsgrad=True), torch.float32, 1e-3),
        # The bound holds before rounding; that moves no singular value by more than eps / 2 times the Frobenius norm.
        (lambda p: Adam(p, lr=1e-2), torch.bfloat16, 2**-8 * 10**0.5),
    ],
    ids=["adam", "adamw", "bfloat16"],
)
def test_every_layer_keeps_its_bound_after_every_step(make, dtype, slack, digits):
    images, labels = digits
    model = net()
    for name, bound in BOUNDS.items():
        mark_spectral(model, name, bound)
    model.to(dtype)
    opt = make(model.parameters())
    order = torch.Generator().manual_seed(0)
    losses, reached = [], dict.fromkeys(BOUNDS, 0.0)
    for _ in range(200):
        batch = torch.randint(len(images), (64,), generator=order)
        opt.zero_grad()
        loss = functional.cross_entropy(model(images[batch].to(dtype)).float(), labels[batch])
        loss.backward()
        opt.step()
        losses.append(float(loss.detach()))
        for name, bound in BOUNDS.items():
            now = sigma(model, name) / bound
            reached[name] = max(reached[name], now)
            assert now <= 1 + slack
    assert all(value > 0.98 for value in reached.values())  # the bounds are what holds them back
    assert sum(losses[-20:]) < 0.6 * sum(losses[:20])
    assert opt.metrics()["skipped_blocks"] == 0


def test_a_linear_net_is_as_lipschitz_as_the_product_of_its_bounds():
    """Of linear layers and ReLUs, whatever two inputs are."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).double()
    for index in (0, 2, 4):
        mark_spectral(model[index], "weight", 0.8)
    opt = Adam(model.parameters(), lr=1e-2)
    x, y = torch.randn(64, 16).double(), torch.randn(64, 4).double()
    for _ in range(60):
        opt.zero_grad()
        functional.mse_loss(model(x), 10 * y).backward()
        opt.step()
    with torch.no_grad():
        apart, inputs = model(x[1:]) - model(x[:-1]), x[1:] - x[:-1]
        assert bool((apart.norm(dim=1) <= 0.8**3 * (1 + 1e-9) * inputs.norm(dim=1)).all())
        steepest = torch.autograd.functional.jacobian(model, x[0])
    assert float(torch.linalg.matrix_norm(steepest, 2)) <= 0.8**3 * (1 + 1e-9)
