import math

import pytest
import torch
from torch import nn

from manifold_opt import constraint_of, init, mark_orthogonal, orthogonality_error
from manifold_opt.stiefel.geometry import error

from ..helpers import DTYPES, SQUARE, TALL, UNITARY, WIDE, pairs, rounding, seeded

SCHEMES = ["haar", "henaff", "cayley", "identity"]


@pairs(scheme=SCHEMES, shape=SQUARE + WIDE + TALL, dtype=DTYPES + UNITARY)
def test_every_block_is_orthogonal_times_the_gain(scheme, shape, dtype):
    x = torch.empty(3 * shape[0], shape[1], dtype=dtype)
    assert init.orthogonal_(x, blocks=3, gain=1.5, scheme=scheme, generator=seeded()) is x
    for block in x.chunk(3):
        assert error(block / 1.5) < rounding(block)
    if dtype in UNITARY and scheme == "haar":
        assert x.imag.abs().max() > 0.1
    elif dtype in UNITARY:
        real = init.orthogonal_(x.real.clone(), blocks=3, gain=1.5, scheme=scheme, generator=seeded())
        assert torch.equal(x, real.to(dtype))


@pytest.mark.parametrize("det", [1, -1])
def test_a_determinant_of_many_rows_does_not_underflow(det):
    """In float32 the product of the pivots of 700 orthogonal rows is 0; its sign is not."""
    x = init.orthogonal_(torch.empty(700, 700), det=det, generator=seeded())
    assert orthogonality_error(x) < 1e-4
    assert float(torch.linalg.slogdet(x).sign) == det


@pairs(scheme=SCHEMES, n=[1, 2, 3, 8], det=[1, -1], dtype=DTYPES)
def test_every_block_has_the_determinant(scheme, n, det, dtype):
    x = init.orthogonal_(torch.empty(12 * n, n, dtype=dtype), 12, 2.0, scheme, det=det, generator=seeded())
    blocks = x.view(12, n, n) / 2
    assert error(blocks).max() < rounding(blocks)
    torch.testing.assert_close(torch.linalg.det(blocks), torch.full((12,), float(det), dtype=dtype))
    free = init.orthogonal_(torch.empty(12 * n, n, dtype=dtype), 12, 2.0, scheme, generator=seeded()).view(12, n, n)
    kept = torch.linalg.det(free).sign() == det
    assert torch.equal(2 * blocks[kept], free[kept])


def test_haar_rotations_are_uniform():
    """On SO(3): entries of mean 0 and mean square 1/3, and a trace of mean 0 and mean square 1."""
    w = init.orthogonal_(torch.empty(12000, 3, dtype=torch.float64), 4000, det=1, generator=seeded()).view(4000, 3, 3)
    tolerance = 5 / 4000**0.5
    assert w.mean(0).abs().max() < 0.58 * tolerance
    assert (w.square().mean(0) - 1 / 3).abs().max() < 0.3 * tolerance
    trace = w.diagonal(dim1=-2, dim2=-1).sum(-1)
    assert abs(float(trace.mean())) < tolerance
    assert abs(float(trace.square().mean()) - 1) < 2 * tolerance  # E trace^4 = 3
    # Uniform means that no direction is special: that of the axis is not, either.
    axis = torch.stack([w[:, 2, 1] - w[:, 1, 2], w[:, 0, 2] - w[:, 2, 0], w[:, 1, 0] - w[:, 0, 1]])
    assert (axis / axis.norm(dim=0)).mean(1).abs().max() < 0.58 * tolerance


def test_blocks_differ():
    x = init.orthogonal_(torch.empty(8, 4), blocks=2, generator=seeded())
    assert not torch.equal(x[:4], x[4:])


def test_same_seed_same_start():
    a, b = (init.orthogonal_(torch.empty(6, 6), generator=seeded(7)) for _ in range(2))
    assert torch.equal(a, b)
    torch.manual_seed(0)
    c = init.orthogonal_(torch.empty(6, 6))
    torch.manual_seed(0)
    assert torch.equal(c, init.orthogonal_(torch.empty(6, 6)))


@pytest.mark.parametrize(("scheme", "low", "high"), [("henaff", -math.pi, math.pi), ("cayley", 0.0, math.pi / 2)])
def test_rotation_angles(scheme, low, high):
    """2 x 2 rotations along the diagonal, nothing else, angles uniform over their range."""
    n = 2000
    w = init.orthogonal_(torch.empty(n, n), scheme=scheme, generator=seeded())
    even = torch.arange(0, n, 2)
    c, s = w[even, even], w[even + 1, even]
    assert torch.equal(w[even + 1, even + 1], c)
    assert torch.equal(w[even, even + 1], -s)
    assert int((w != 0).sum()) == 2 * n
    angles = torch.atan2(s, c)
    assert low <= float(angles.min())
    assert float(angles.max()) <= high
    # Five standard deviations of the mean of n / 2 uniform draws.
    assert abs(float(angles.mean()) - (low + high) / 2) < 5 * (high - low) / math.sqrt(12 * n / 2)


def test_cayley_is_the_cayley_transform_of_its_paper():
    """(I + A)^-1 (I - A) with A = [[0, s], [-s, 0]], s = sqrt((1 - cos t) / (1 + cos t)) rotates by t."""
    t = torch.tensor(0.9, dtype=torch.float64)
    s = ((1 - t.cos()) / (1 + t.cos())).sqrt()
    a = torch.tensor([[0.0, s], [-s, 0.0]], dtype=torch.float64)
    identity = torch.eye(2, dtype=torch.float64)
    rotation = torch.linalg.solve(identity + a, identity - a)
    torch.testing.assert_close(rotation, torch.tensor([[t.cos(), -t.sin()], [t.sin(), t.cos()]], dtype=torch.float64))


def test_odd_sizes_and_rectangles_by_hand():
    w = init.orthogonal_(torch.empty(3, 3), scheme="henaff", generator=seeded())
    assert w[2].tolist() == [0.0, 0.0, 1.0]
    assert init.orthogonal_(torch.empty(2, 3), gain=2.0, scheme="identity").tolist() == [[2, 0, 0], [0, 2, 0]]
    assert init.orthogonal_(torch.empty(3, 1), scheme="identity").tolist() == [[1], [0], [0]]


def test_haar_has_the_moments_of_torch():
    w = init.orthogonal_(torch.empty(300, 300), generator=seeded())
    assert abs(float(w.mean())) < 5 / 300**1.5
    assert float(w.square().mean()) == pytest.approx(1 / 300, rel=1e-4)


def test_convolutions_are_flattened():
    x = init.orthogonal_(torch.empty(8, 3, 3, 3))
    assert orthogonality_error(x.flatten(1)) < 1e-5


def test_a_mark_gives_the_defaults():
    weight = mark_orthogonal(nn.Parameter(torch.randn(12, 4)), blocks=3, gain=2.0)
    init.orthogonal_(weight, scheme="identity")
    assert torch.equal(weight.detach(), 2 * torch.eye(4).repeat(3, 1))
    assert constraint_of(weight).blocks == 3
    columns = mark_orthogonal(nn.Parameter(torch.randn(4, 12)), blocks=3, dim=1)
    assert torch.equal(init.orthogonal_(columns, scheme="identity").detach(), torch.eye(4).repeat(1, 3))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"scheme": "xavier"}, "haar, henaff, cayley, identity"),
        ({"blocks": 5}, "blocks=5 must divide"),
        ({"blocks": 0}, "blocks=0"),
        ({"gain": 0.0}, "gain"),
        ({"gain": float("nan")}, "gain"),
        ({"det": 1}, "real square"),
        ({"blocks": 3, "det": 0}, "det must be 1"),
    ],
)
def test_refuses_and_writes_nothing(options, match):
    x = torch.zeros(12, 4)
    with pytest.raises(ValueError, match=match):
        init.orthogonal_(x, **options)
    assert not x.any()


def test_refuses_what_contradicts_the_mark():
    weight = mark_orthogonal(nn.Parameter(torch.randn(12, 4)), blocks=3)
    for options in ({"blocks": 1}, {"gain": 2.0}):
        with pytest.raises(ValueError, match="contradict the mark"):
            init.orthogonal_(weight, **options)
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        init.orthogonal_(torch.zeros(3))
    with pytest.raises(ValueError, match="real square"):
        init.orthogonal_(torch.zeros(3, 3, dtype=torch.complex64), det=1)
    with pytest.raises(ValueError, match="floating-point or complex"):
        init.orthogonal_(torch.zeros(3, 3, dtype=torch.int64))
