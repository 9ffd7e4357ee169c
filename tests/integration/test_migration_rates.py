r"""What a learning rate means in other libraries: every number of the tables in docs/migration/index.md.

One step of 1e-7 in float64, from the same point along the same gradient. The displacement is split into its rotation
:math:`\Omega W` and what is normal to the row space, N, and each part is compared with the same part of one step of our
SGD with the metric that is the default, whose parts are those of the Riemannian gradient.
"""

import math
import statistics
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from manifold_opt import SGD, mark_unit_norm

from ..helpers import gaussian, point
from ..reference.peers import start

LR = 1e-7
SHAPES = SQUARE, TALL, WIDE = (12, 12), (12, 5), (5, 12)
PAGE = Path(__file__).parents[2] / "docs" / "migration" / "index.md"
SETTINGS = {
    '`metric="euclidean"`, the default': ("ours", {}),
    '`metric="canonical"`': ("ours", {"metric": "canonical"}),
    "torch `matrix_exp`": ("torch", {"orthogonal_map": "matrix_exp"}),
    "torch `cayley`": ("torch", {"orthogonal_map": "cayley"}),
    "torch `householder`": ("torch", {"orthogonal_map": "householder"}),
    "geotorch": ("geotorch", {}),
    "geotorch `cayley`": ("geotorch", {"triv": "cayley"}),
    "geoopt `EuclideanStiefel`": ("geoopt", {"canonical": False}),
    "geoopt `Stiefel`": ("geoopt", {"canonical": True}),
    "POGO": ("pogo", {}),
    "Landing": ("landing", {}),
}


def parts(w, v):
    """Rotation and normal part of a tangent at ``w``, as wide matrices."""
    w, v = (w.mT, v.mT) if w.shape[0] > w.shape[1] else (w, v)
    along = v @ w.mT
    rotation = (along - along.mT) / 2 @ w
    return rotation, v - rotation


def moved(library, shape, rule="SGD", seed=1, **options):
    """Where a step leads from a point, divided by its learning rate."""
    w, g = point(*shape), gaussian(*shape, seed=seed)
    if library == "landing":
        return parts(w, -landing_field(w, g, attraction=1.0))
    run = start(library, w, rule=rule, lr=LR, **options)
    before = run.weights()[0].detach().clone()
    run.step(g)
    return parts(w, (run.weights()[0].detach() - before) / LR)


def landing_field(w, g, attraction):
    r"""Ablin & Peyre (2022), equation 2; of rectangular ones Ablin et al. (2024), section 3: X' = X - lr * field.

    :math:`\operatorname{skew}(G X^\top) X + \lambda (X X^\top - I) X` of tall X, with the halved commutator as skew.
    """
    x, g = (w, g) if w.shape[0] >= w.shape[1] else (w.mT, g.mT)
    a = g @ x.mT
    field = (a - a.mT) / 2 @ x + attraction * x @ (x.mT @ x - torch.eye(x.shape[1], dtype=x.dtype))
    return field if w.shape[0] >= w.shape[1] else field.mT


def ratio(part, ours):
    """By what ``part`` is longer than ours, which points the same way."""
    factor = float((part * ours).sum() / ours.square().sum())
    torch.testing.assert_close(part, factor * ours, rtol=0, atol=1e-4 * factor * float(ours.norm()))
    return factor


def table(rule):
    """Rows of the page's table of learning rates for SGD or Adam."""
    text = PAGE.read_text().partition(f"## Learning rates for {rule}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", SETTINGS)
def test_a_step_of_sgd(row, shape):
    library, options = SETTINGS[row]
    if library == "geoopt" and shape == WIDE:
        pytest.skip("geoopt has no wide ones")
    cells = table("SGD")[row]
    ours, theirs = moved("ours", shape), moved(library, shape, **options)
    assert ratio(theirs[0], ours[0]) == pytest.approx(float(Fraction(cells[0])), rel=1e-4)
    if shape == SQUARE:
        assert float(theirs[1].norm()) < 1e-3  # there is no other part
    else:
        assert ratio(theirs[1], ours[1]) == pytest.approx(float(Fraction(cells[1])), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("row", SETTINGS)
def test_the_rate_that_gives_the_same_step(row, shape):
    """With the metric and the rate that the last two columns name: all of a square step, all of others but two."""
    library, options = SETTINGS[row]
    if library == "geoopt" and shape == WIDE:
        pytest.skip("geoopt has no wide ones")
    metric, rate = table("SGD")[row][2:]
    theirs = sum(moved(library, shape, **options))
    same = float(Fraction(rate)) * sum(moved("ours", shape, metric=metric.strip('`"')))
    if row == "geoopt `Stiefel`" and shape != SQUARE:
        assert float((theirs - same).norm()) > 0.1 * float(same.norm())
    else:
        torch.testing.assert_close(same, theirs, rtol=0, atol=1e-4 * float(theirs.norm()))


ADAM = {
    '`second_moment="block"`': ("ours", {"second_moment": "block"}),
    **{row: SETTINGS[row] for row in SETTINGS if SETTINGS[row][0] not in ("ours", "landing")},
}
SIZES = [(64, 64), (64, 24)]


def length_expected(row, n, p):
    """The formula of the page, for n >= p."""
    rotation, normal = (float(part.norm()) for part in moved("ours", (n, p)))
    if row == "geoopt `Stiefel`":
        return math.sqrt((16 * rotation**2 + normal**2) / (2 * rotation**2 + normal**2) / (n * p))
    if row == "POGO":
        return math.sqrt((rotation**2 + normal**2 / 4) / (n * p)) / float(gaussian(n, p).norm())
    if row == "geoopt `EuclideanStiefel`":
        return 1 / math.sqrt(n * p)
    if row == "torch `householder`":
        return 2 * math.sqrt(1 - 1 / n)
    return 1.0 if row.startswith("`second") else math.sqrt(1 - 1 / n)


def length_of_a_step_of_adam(library, options, shape, seed=1):
    """Root mean square of an entry of the first step, over its learning rate."""
    return float(sum(moved(library, shape, "Adam", seed, **options)).square().mean().sqrt())


def usual_length(library, options, shape, draws=8):
    """The same, over several gradients of independent normal entries."""
    return statistics.mean(length_of_a_step_of_adam(library, options, shape, seed) for seed in range(1, 1 + draws))


@pytest.mark.parametrize("shape", SIZES, ids=str)
@pytest.mark.parametrize("row", ADAM)
def test_the_first_step_of_adam(row, shape):
    """As long as the formula says, and as the column of the page for a gradient of independent normal entries."""
    assert length_of_a_step_of_adam(*ADAM[row], shape) == pytest.approx(length_expected(row, *shape), rel=1e-4)
    assert usual_length(*ADAM[row], shape) == pytest.approx(float(table("Adam")[row][1 + SIZES.index(shape)]), rel=0.01)


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_the_first_step_of_adam_by_elements(shape):
    length = usual_length("ours", {}, shape)
    assert length == pytest.approx(float(table("Adam")['`second_moment="element"`'][1 + SIZES.index(shape)]), rel=0.01)


def test_everything_on_the_page_is_measured():
    """But Cayley SGD, in test_cayley_sgd.py."""
    assert set(table("SGD")) - {"[Cayley SGD](cayley_sgd.md), below its bound"} == set(SETTINGS)
    assert set(table("Adam")) == {*ADAM, '`second_moment="element"`'}


def test_a_step_of_weight_norm():
    """A direction v/|v| turns by 1/|v|^2 of what it turns as a point of the sphere (docs/migration/torch.md)."""
    v, g, gain = gaussian(6, 8), gaussian(6, 8, seed=2), gaussian(6, 1, seed=3)
    length = v.norm(dim=1, keepdim=True)
    layer = nn.Linear(8, 6, bias=False, dtype=v.dtype)
    layer.weight.data = v.clone()
    magnitudes, directions = (
        weight_norm(layer).parametrizations.weight.original0,
        layer.parametrizations.weight.original1,
    )
    magnitudes.data = gain.clone()
    (layer.weight * g).sum().backward()
    torch.optim.SGD([directions], lr=LR).step()
    theirs = (directions.detach() / directions.detach().norm(dim=1, keepdim=True) - v / length) / LR
    unit = mark_unit_norm(nn.Parameter(v / length), dim=0)
    (gain * unit * g).sum().backward()
    SGD([unit], lr=LR).step()
    torch.testing.assert_close(theirs, (unit.detach() - v / length) / LR / length**2, rtol=0, atol=1e-5)
