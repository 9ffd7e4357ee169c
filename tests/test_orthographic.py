"""The orthographic retraction: its polynomials, its price, its seam, and what it does about errors of the point."""

import math

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt import SGD, Adam, mark_orthogonal, orthogonality_error, retract, stiefel
from manifold_opt.orthographic import _FIRST, _FIXED, _OCTAVE, INTERVAL, LONGEST_FIXED, SEAM, TABLES

from . import reference
from .helpers import DTYPES, UNITARY, gaussian, never_read, point, rounding, tangent


def rotation(*shape, t, dtype=torch.float64, rank=None, seed=1):
    """Skew matrices of spectral norm t, of full rank or of a given even one."""
    double = stiefel.in_double(dtype)
    a = gaussian(*shape, seed=seed, dtype=double)
    if rank is not None:
        a = gaussian(*shape[:-1], rank // 2, seed=seed, dtype=double)
        a = a @ gaussian(*shape[:-2], rank // 2, shape[-1], seed=seed + 1, dtype=double)
    a = a - a.mH
    return (t * a / torch.linalg.matrix_norm(a, 2, keepdim=True)).to(dtype)


def left_by(coefficients, largest):
    """How far |Q|^2 is from one at most, for bends from zero to the largest: (1 + S)^2 + x - 1 = 2 S + S^2 + x."""
    x = torch.linspace(0, largest, 500, dtype=torch.float64)
    s = sum(float(c) * x**k for k, c in enumerate(coefficients))
    return float((2 * s + s * s + x).abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_row_of_the_table_leaves_rounding_only(dtype):
    eps = torch.finfo(dtype).eps
    for row, coefficients in enumerate(TABLES[dtype]):
        largest = 2.0 ** ((_FIRST + row) / _OCTAVE)
        assert left_by(coefficients, largest) < 0.7 * eps
    assert largest == SEAM


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_polynomial_of_a_fixed_degree_leaves_rounding_only(dtype):
    assert left_by(_FIXED[dtype], LONGEST_FIXED) < torch.finfo(dtype).eps


def test_rotation_by_hand():
    """At W = I in two dimensions a step t turns by arc sine t: what projects onto the tangent line at t."""
    t = 0.1
    w, v = torch.eye(2, dtype=torch.float64), torch.tensor([[0.0, t], [-t, 0.0]], dtype=torch.float64)
    c = math.cos(math.asin(t))
    torch.testing.assert_close(retract(w, v, "orthographic"), torch.tensor([[c, t], [-t, c]], dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES + UNITARY)
@pytest.mark.parametrize(("p", "rank"), [(2, None), (3, None), (8, 2), (40, None), (150, None), (150, 2), (150, 4)])
@pytest.mark.parametrize("t", [1e-6, 1e-3, 0.01, 0.03, 0.06, 0.08])
def test_short_steps(p, rank, t, dtype):
    """The reference by its eigenvalues; on the manifold; and what is left of the step is the step."""
    w = point(2, p, p, dtype=dtype)
    omega, start = rotation(2, p, p, t=t, rank=rank, dtype=stiefel.in_double(dtype)), stiefel.float64(w)
    moved = retract(w, (omega @ start).to(dtype), "orthographic")
    assert float(stiefel.error(moved).max()) < 2 * rounding(moved)
    if p < 100:
        expected = torch.stack([reference.orthographic(a, b @ a) for a, b in zip(start, omega, strict=True)])
        torch.testing.assert_close(stiefel.float64(moved), expected, rtol=0, atol=8 * torch.finfo(dtype).eps)
    turn = stiefel.float64(moved) @ start.mH
    torch.testing.assert_close(stiefel.skew(turn), omega, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("shape", [(12, 12), (5, 9)])
def test_what_is_too_long_or_rectangular_moves_by_the_polar_retraction(shape):
    w = point(2, *shape)
    v = stiefel.project(w, gaussian(2, *shape))
    torch.testing.assert_close(retract(w, v, "orthographic"), retract(w, v, "polar"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("t", "dtype", "products"),
    [
        *((0.01, DTYPES[0], 3), (0.08, DTYPES[0], 4), (0.003, DTYPES[1], 4), (0.08, DTYPES[1], 6)),
        *((0.01, UNITARY[0], 3), (0.08, UNITARY[0], 4), (0.003, UNITARY[1], 4), (0.08, UNITARY[1], 6)),
    ],
)
def test_products(t, dtype, products):
    """As many as the length of the step calls for; here with the error of every block, and without the direction."""
    w = point(2, 16, 16, dtype=dtype)
    v = rotation(2, 16, 16, t=t, dtype=dtype) @ w
    with FlopCounterMode(display=False) as counter:
        retract(w, v, "orthographic")
    assert counter.get_total_flops() == (1 + products) * 2 * 2 * 16**3  # one for Omega = V W^T


def test_each_matrix_of_a_batch_moves_by_its_own_length():
    w = point(3, 6, 6)
    v = rotation(3, 6, 6, t=torch.tensor([0.01, 0.1, 1.0], dtype=torch.float64)[:, None, None]) @ w
    moved = retract(w, v, "orthographic")
    for k in range(3):
        torch.testing.assert_close(moved[k], retract(w[k], v[k], "orthographic"))
    assert not torch.allclose(moved[1], retract(w[1], v[1], "polar"), rtol=0, atol=1e-5)
    torch.testing.assert_close(moved[2], retract(w[2], v[2], "polar"))


@pytest.mark.parametrize("dtype", UNITARY)
@pytest.mark.parametrize("p", [1, 4, 40, 150])
@pytest.mark.parametrize("t", [0.02, 0.15, 0.2])
def test_a_lone_eigenvalue_of_a_unitary_step(p, t, dtype):
    """They do not come in pairs: of rank one, the bend is as large as its Frobenius norm, and no less."""
    w = point(2, p, p, dtype=dtype)
    u = point(2, 1, p, seed=4, dtype=dtype)
    moved = retract(w, 1j * t * u.mH @ u @ w, "orthographic")
    assert float(stiefel.error(moved).max()) < 2 * rounding(moved)
    angle = math.asin(t) if t * t < SEAM else math.atan(t)
    expected = w + (complex(math.cos(angle), math.sin(angle)) - 1) * u.mH @ u @ w
    torch.testing.assert_close(moved, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", UNITARY)
@pytest.mark.parametrize("length", [1e-6, 0.01, 0.2, 0.9, 40.0])
def test_where_nothing_can_be_read_unitary_steps_are_exact_too(length, dtype, monkeypatch):
    never_read(monkeypatch)
    w = point(3, 6, 6, dtype=dtype)
    v = tangent(w, length)
    moved = retract(w, v, "orthographic")
    assert float(stiefel.error(moved).max()) < 2 * rounding(moved)
    skew = stiefel.skew(moved @ w.mH)
    share = (skew.mH @ (v @ w.mH)).diagonal(dim1=-2, dim2=-1).sum(-1).real / torch.linalg.matrix_norm(v) ** 2
    torch.testing.assert_close(skew, share[:, None, None] * (v @ w.mH), rtol=0, atol=16 * torch.finfo(dtype).eps)
    assert (share > 0.99).all() if length < 0.4 else (share < 0.99).all()


# In an optimizer.


@pytest.mark.parametrize("optimizer", [SGD, Adam])
@pytest.mark.parametrize(("shape", "blocks"), [((6, 6), 1), ((15, 5), 3), ((900, 3), 300), ((160, 160), 1)])
@pytest.mark.parametrize("distance", [1e-6, 1e-3, 0.1, 0.9])
def test_a_point_off_the_manifold_is_back_within_ten_steps(optimizer, shape, blocks, distance):
    """Even where nobody has been told: a write through ``.data`` is not counted."""
    p = shape[1]
    weight = mark_orthogonal(nn.Parameter(point(blocks, p, p, dtype=torch.float32).reshape(shape)), blocks=blocks)
    opt = optimizer([weight], lr=1e-5)
    for step in range(11):
        if step == 1:
            off = gaussian(blocks, p, p, dtype=torch.float32)
            off = distance * off / torch.linalg.matrix_norm(off, 2, keepdim=True)
            weight.data += off.reshape(shape)
            assert orthogonality_error(weight) > 0.1 * distance
        weight.grad = gaussian(*shape, dtype=torch.float32, seed=step)
        opt.step()
    error = stiefel.error(weight.detach().view(blocks, p, p))
    assert float(error.max()) < stiefel.error_at_rounding(p, p, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_block_is_looked_at_once_in_an_interval(dtype, monkeypatch):
    from manifold_opt import orthographic

    looked = []
    weight = mark_orthogonal(nn.Parameter(point(10, 4, 4, dtype=dtype).reshape(40, 4)), blocks=10)
    whole = weight.detach().view(10, 4, 4).data_ptr()
    size = 16 * weight.element_size()

    def brought_back(w, _, points, __):
        looked.extend((points[k].data_ptr() - whole) // size for k in range(len(points)))
        return w

    monkeypatch.setattr(orthographic, "_brought_back", brought_back)
    opt = Adam([weight])
    for step in range(INTERVAL[dtype]):
        weight.grad = gaussian(40, 4, seed=step, dtype=dtype)
        opt.step()
    assert sorted(looked) == list(range(10))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("p", "blocks"), [(8, 5), (40, 5), (150, 3), (3, 300)])
@pytest.mark.parametrize("gain", [1.0, 1.7])
def test_a_long_step_of_one_block_leaves_the_bits_of_the_others(p, blocks, dtype, gain):
    """Whatever degrees the others need; one of them does not move at all."""

    def run(scale):
        start = gain * point(blocks, p, p, dtype=dtype).reshape(-1, p)
        weight = mark_orthogonal(nn.Parameter(start.clone()), blocks=blocks, gain=gain)
        opt = SGD([weight], lr=0.04 / p)
        for step in range(6):
            weight.grad = gaussian(blocks * p, p, dtype=dtype, seed=step)
            weight.grad[2 * p : 3 * p] *= scale
            weight.grad[p : 2 * p] = 0
            opt.step()
        return weight.detach().view(blocks, p, p), start.view(blocks, p, p)

    quiet, start = run(0.01)
    assert torch.equal(quiet[1], start[1])
    others = [k for k in range(blocks) if k != 2]
    for scale in (1.0, 10.0, 1e3, 1e9):
        loud, _ = run(scale)
        assert float(stiefel.error(loud / gain).max()) < 2 * rounding(loud)
        assert torch.equal(loud[others], quiet[others])
        assert not torch.equal(loud[2], quiet[2])


@pytest.mark.parametrize("optimizer", [SGD, Adam])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("every", [2, 3, 4])
def test_every_block_is_looked_at_whenever_its_gradients_come(optimizer, dtype, every):
    """Two parameters of one group, gradients now for the one and now for the other: the turns are each one's own."""
    weights = [
        mark_orthogonal(nn.Parameter(point(3, 4, 4, dtype=dtype, seed=k).reshape(12, 4)), blocks=3) for k in (1, 2)
    ]
    weights += [mark_orthogonal(nn.Parameter(point(160, 160, dtype=dtype)))]
    opt = optimizer(weights, lr=1e-4)
    for step in range(14 * every):
        if step == 2 * every:
            for weight in weights:
                weight.data *= 1.01
        for k, weight in enumerate(weights):
            weight.grad = gaussian(*weight.shape, dtype=dtype, seed=step) if (step + k) % every == 0 else None
        opt.step()
    for weight, p in zip(weights, (4, 4, 160), strict=True):
        assert orthogonality_error(weight) <= stiefel.error_at_rounding(p, p, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [2, 4, 24])
@pytest.mark.parametrize("part", [0.999, 0.5, 0.1])
def test_many_steps_as_long_as_they_may_be_stay_at_rounding(p, dtype, part):
    """A constant rotation, so that what its polynomial leaves has always the same sign."""
    weight = mark_orthogonal(nn.Parameter(point(p, p, dtype=dtype)))
    omega = rotation(p, p, t=part * SEAM**0.5, dtype=dtype, rank=2)
    opt = SGD([weight], lr=1.0)
    for _ in range(200):
        weight.grad = omega @ weight.detach()
        opt.step()
        assert orthogonality_error(weight) <= stiefel.error_at_rounding(p, p, dtype)


@pytest.mark.parametrize("gain", [1.0, 1.7])
@pytest.mark.parametrize("gradient", [0.0, float("nan")])
def test_a_block_without_a_step_is_not_brought_back(gain, gradient):
    weight = mark_orthogonal(nn.Parameter(gain * torch.eye(2)), gain=gain)
    opt = SGD([weight], lr=0.1)
    for step in range(6):
        weight.grad = torch.full((2, 2), gradient)
        if step == 1:
            weight.data *= 1.01
            before = weight.detach().clone()
        opt.step()
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_nothing_can_be_read_every_block_is_corrected_in_every_step(dtype, monkeypatch):
    never_read(monkeypatch)
    weight = mark_orthogonal(nn.Parameter(point(5, 4, 4, dtype=dtype).reshape(20, 4)), blocks=5)
    opt = SGD([weight], lr=1e-5)
    for step in range(8):
        weight.grad = gaussian(20, 4, dtype=dtype, seed=step)
        opt.step()
        if step == 0:
            weight.data *= 1.05
    assert float(stiefel.error(weight.detach().view(5, 4, 4)).max()) <= stiefel.error_at_rounding(4, 4, dtype)
