import pytest
import torch

from manifold_opt.linalg import spectral_norm
from manifold_opt.linalg.singular_values import clip_and_measure_, clip_singular_values, tolerance
from manifold_opt.linalg.spectral_norm import step_length

from ..helpers import DTYPES, each, gaussian, point

SHAPES = [(1, 5), (20, 33), (64, 64), (70, 90), (130, 200)]


def steps(p: int, n: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    noise, row = gaussian(p, n, dtype=dtype), gaussian(1, n, dtype=dtype)
    return {
        "noise": noise,
        "one row": torch.cat([row, 0 * noise[1:]]),
        "all rows alike": row.expand(p, n),
        "rank one": gaussian(p, 1, dtype=dtype, seed=2) @ row,
        "orthogonal": point(p, n, dtype=dtype),
        "last rows": torch.cat([0 * noise[: p // 2], noise[p // 2 :]]),
        "decaying": noise * torch.logspace(0, -4, p, dtype=dtype)[:, None],
    }


@each(dtype=DTYPES, shape=SHAPES)
def test_the_length_of_a_step_is_between_its_spectral_and_its_frobenius_norm(shape, dtype):
    for name, v in steps(*shape, dtype).items():
        rounding = 1 + 10 * torch.finfo(dtype).eps * max(shape) ** 0.5  # of sums of n products, and of their roots
        for turned in (v, -3 * v, v.flip(0), v.mT.contiguous().mT):
            least, most = float(torch.linalg.matrix_norm(turned.double(), 2)), float(turned.double().norm())
            for slack in (0.0, 1e30):
                assert least / rounding <= step_length(turned[None], slack) <= most * rounding, name


def test_the_length_of_noise_is_a_third_of_its_frobenius_norm():
    """Of 512 x 512 the spectral norm is an eleventh."""
    v = gaussian(512, 512)
    assert step_length(v[None], 0.0) < float(v.norm()) / 3
    assert step_length(v[None], 9 * float(v.norm())) == pytest.approx(float(v.norm()))  # short, and so not computed


def test_lengths_of_a_batch():
    v = torch.stack([gaussian(70, 80, seed=k) / k for k in (1, 2, 3)])
    assert step_length(v, 0.0) == pytest.approx(step_length(v[:1], 0.0))
    assert step_length(v.flip(0), 0.0) == pytest.approx(step_length(v[:1], 0.0))
    v[1, 3, 4] = torch.nan
    assert not step_length(v, 1.0) <= 1e30


def test_the_length_by_hand(monkeypatch):
    """Blocks (3, 0), (0, 1) and (2, 0): Gram matrices diag(9, 1) and (4), for k = 2 the bound is exact."""
    monkeypatch.setattr(spectral_norm, "_ROWS", 2)
    v = torch.tensor([[3.0, 0.0, 0.0], [0.0, 1.0, 0.0], [2.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]])
    assert step_length(v[None], 0.0) == pytest.approx((9 + 4 + 4) ** 0.5)


@each(dtype=DTYPES, shape=SHAPES, norm=[0.2, 0.7, 0.9, 0.99, 1.0, 1.01, 1.5, 5.0])
def test_the_slack_is_at_most_the_distance_to_the_boundary(shape, dtype, norm):
    for bound in (1.0, 1e-3):
        for spectrum in (torch.ones(shape[0]), torch.linspace(0.1, 1, shape[0]).square()):
            x = (norm * bound * spectrum[:, None] * point(*shape)).to(dtype)
            batch = torch.stack([x, 0 * x, 3 * x, x / 2])
            slack = clip_and_measure_(batch.clone(), bound)
            clipped = clip_singular_values(batch, bound)
            distance = bound - torch.linalg.matrix_norm(clipped.double(), 2)
            assert bool((slack >= 0)[distance > bound * tolerance(x)].all())
            assert bool((slack <= distance + bound * tolerance(x)).all())
            # Within the bound, the Frobenius norm is all that is looked at. The estimate is off by some percent.
            worth = (torch.linalg.matrix_norm(clipped) > bound) & (distance > 0.15 * bound)
            assert bool((slack[worth] > distance[worth] / 2).all())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_there_is_no_slack_of_what_is_not_finite(value):
    x = 0.01 * gaussian(2, 4, 6)
    x[1, 2, 3] = value
    slack = clip_and_measure_(x, 1.0)
    assert slack[0] > 0.5
    assert not slack[1] >= 0


@pytest.mark.parametrize("estimate", [0.0, 0.5, float("nan")])
def test_an_estimate_that_is_too_small_proves_nothing(estimate, monkeypatch):
    monkeypatch.setattr(spectral_norm, "_estimate_norm", lambda gap, _: gap.new_full((len(gap),), estimate))
    x = torch.stack([0.7 * point(40, 50), 0.999 * point(40, 50), 1.2 * point(40, 50)])
    before = x.clone()
    assert bool((clip_and_measure_(x, 1.0) <= torch.tensor([0.3, 0.001, 0.0]) + 1e-12).all())
    assert torch.equal(x[:2], before[:2])
    torch.testing.assert_close(x[2], point(40, 50))
