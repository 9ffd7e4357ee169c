"""Products of batches, what they cost, and the memory that they are written to."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from manifold_opt import SGD, Adam, mark_orthogonal
from manifold_opt.linalg import matrices
from manifold_opt.linalg.products import (
    SQUARE,
    WIDE,
    Pool,
    Workspace,
    gram,
    gram_minus_identity,
    host_can_branch,
    largest_norm,
    matmul,
    matmul_add,
    norm,
    real_view,
)
from manifold_opt.stiefel import geometry

from ..helpers import DTYPES, FIELDS, UNITARY, UNMOVED, each, gaussian, never_read, pairs, point, rounding


def tolerance(n, dtype):
    """Of an entry, a sum of n products of about one: each rounding is one of a sum of at most n."""
    return 4 * torch.finfo(dtype).eps * n


@pytest.mark.parametrize(("p", "k", "n"), [(3, 3, 3), (2, 5, 4), (1, 3, 1), (130, 20, 130)])
@pytest.mark.parametrize("dtype", DTYPES + UNITARY)
def test_products(p, k, n, dtype):
    a, b, x = (gaussian(5, *shape, seed=s, dtype=dtype) for s, shape in ((1, (p, k)), (2, (k, n)), (3, (p, n))))
    exact, start = matrices.float64(a) @ matrices.float64(b), matrices.float64(x)
    out = torch.empty_like(x)

    def check(result, expected):
        assert result is out
        torch.testing.assert_close(matrices.float64(result), expected, rtol=0, atol=tolerance(k, dtype))

    check(matmul(a, b, out=out), exact)
    check(matmul(a, b, out=out, alpha=0.3), 0.3 * exact)
    check(matmul_add(x, a, b, out=out), start + exact)
    check(matmul_add(x, a, b, out=out, alpha=0.3, beta=2.0), 2 * start + 0.3 * exact)
    check(matmul_add(out.copy_(x), a, b, out=out), start + exact)
    # Factors that are conjugated lazily, as those of a Gram matrix are.
    turned = matmul(b.mH, a.mH, out=torch.empty_like(x.mT))
    torch.testing.assert_close(matrices.float64(turned), exact.mH.resolve_conj(), rtol=0, atol=tolerance(k, dtype))


@pytest.mark.parametrize("dtype", FIELDS)
def test_what_was_in_the_memory_does_not_matter(dtype):
    """Memory that a step reuses may hold anything, also what is not a number."""
    a, b = gaussian(2, 3, 4, dtype=dtype), gaussian(2, 4, 5, dtype=dtype)
    for alpha in (1.0, 0.5):
        stale = torch.full((2, 3, 5), float("nan"), dtype=dtype)
        torch.testing.assert_close(matmul(a, b, out=stale, alpha=alpha), alpha * a @ b)
    stale = torch.full((2, 3, 3), float("nan"), dtype=dtype)
    torch.testing.assert_close(gram(a, out=stale), a @ a.mH)


@pairs(reading=[True, False], p=[1, 5, 383, 384, 391], dtype=DTYPES + UNITARY)
def test_gram(p, dtype, reading, monkeypatch):
    """On both sides of the 384 rows from which on the one triangle is that of the other, mirrored."""
    if not reading:
        never_read(monkeypatch)
    x = gaussian(2, p, 7, dtype=dtype)
    expected = matrices.float64(x) @ matrices.float64(x).mH
    out = torch.full((2, p, p), float("nan"), dtype=dtype)
    assert gram(x, out=out) is out
    torch.testing.assert_close(matrices.float64(out), expected, rtol=0, atol=tolerance(7, dtype))
    assert torch.equal(gram(x), out)
    identity = torch.eye(p, dtype=expected.dtype)
    assert gram_minus_identity(x, out=out) is out
    torch.testing.assert_close(matrices.float64(out), expected - identity, rtol=0, atol=tolerance(7, dtype))


@pytest.mark.parametrize("p", [3, 390])
@pytest.mark.parametrize("dtype", FIELDS)
def test_gram_of_any_batch(p, dtype):
    """None at all, several dimensions, and matrices that do not lie row by row."""
    x = gaussian(2, 3, p, 5, dtype=dtype)
    torch.testing.assert_close(gram(x), x @ x.mH)
    torch.testing.assert_close(gram(x[0, 0]), x[0, 0] @ x[0, 0].mH)
    torch.testing.assert_close(gram(x.mT.contiguous().mT[:, 0]), x[:, 0] @ x[:, 0].mH)


@pairs(
    {"p, share": [(380, 1), (384, 5 / 8), (400, 5 / 8)]}, reading=[True, False], function=[gram, gram_minus_identity]
)
def test_a_gram_matrix_of_many_rows_is_five_eighths_of_a_product(function, p, share, reading, monkeypatch):
    """Four slabs up to the diagonal: (1 + 2 + 3 + 4) / 16. An accelerator takes the whole product in one kernel."""
    if not reading:
        never_read(monkeypatch)
    x, out = gaussian(1, p, 4), torch.empty(1, p, p, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        function(x, out=out)
    assert counter.get_total_flops() == (share if reading else 1) * 2 * p * p * 4


@pytest.mark.parametrize("dtype", DTYPES + UNITARY)
def test_norms(dtype):
    x = gaussian(4, 3, 5, dtype=dtype)
    expected = torch.linalg.matrix_norm(x)
    torch.testing.assert_close(norm(x), expected)
    torch.testing.assert_close(norm(x, keepdim=True), expected[:, None, None])
    assert not norm(x).is_complex()
    assert largest_norm(x) == float(norm(x).max())
    for bad in (float("nan"), float("inf")):
        x[2, 1, 1] = bad
        torch.testing.assert_close(largest_norm(x), bad, equal_nan=True)
        x[1, 0, 0] = 1e30  # nor is a NaN lost beside larger ones
        torch.testing.assert_close(largest_norm(x), bad, equal_nan=True)


def test_real_view_is_one_of_the_real_and_the_imaginary_parts():
    x = gaussian(2, 3, 4, dtype=torch.complex128)
    assert torch.equal(real_view(x), torch.stack([x.real, x.imag]))
    real_view(x).mul_(torch.tensor([1.0, 2.0]).view(2, 1, 1))  # one number a block
    torch.testing.assert_close(x[1], 2 * gaussian(2, 3, 4, dtype=torch.complex128)[1])
    real = gaussian(2, 3, 4)
    assert real_view(real) is real


def test_where_python_may_read(monkeypatch):
    assert host_can_branch(torch.zeros(1))
    assert not host_can_branch(torch.zeros(1, device="meta"))
    never_read(monkeypatch)
    assert not host_can_branch(torch.zeros(1))


# Workspaces.


@pytest.mark.parametrize("pool", [None, Pool()])
@pytest.mark.parametrize("dtype", DTYPES + UNITARY)
def test_buffers_of_a_workspace(pool, dtype):
    """Two names never share memory, and a name stands for the same buffer for as long as the workspace lives."""
    ws = Workspace(pool, torch.empty(4, 2, 3, dtype=dtype))
    buffers = {name: getattr(ws, name) for name in SQUARE + WIDE}
    for k, (name, buffer) in enumerate(buffers.items()):
        assert buffer.shape == ((4, 2, 2) if name in SQUARE else (4, 2, 3))
        assert buffer.dtype == dtype
        assert buffer.is_contiguous()
        buffer.fill_(k)
    for k, (name, buffer) in enumerate(buffers.items()):
        assert getattr(ws, name) is buffer
        assert bool((buffer == k).all())


def test_a_workspace_of_another_shape_than_what_it_is_like():
    ws = Workspace(Pool(), torch.empty(0, dtype=torch.complex64), (5, 2, 7))
    assert ws.c.shape == (5, 2, 2)
    assert ws.u.shape == (5, 2, 7)
    assert ws.u.dtype == torch.complex64


@pytest.mark.parametrize("name", ["g", "v", "A", "ab", "weight", "__wrapped__"])
def test_a_workspace_has_no_other_names(name):
    with pytest.raises(AttributeError, match=name):
        getattr(Workspace(Pool(), torch.empty(4, 2, 3)), name)


@pytest.mark.parametrize("shapes", [((2, 2, 3), (4, 5, 6)), ((4, 5, 6), (2, 2, 3))])
@pytest.mark.parametrize("used", [0, 1])
def test_workspaces_of_a_pool_share_memory(shapes, used):
    """That of the largest, whichever is made first, and used first: all are reserved before one is used."""
    pool = Pool()
    first, second = spaces = [Workspace(pool, torch.empty(*shape)) for shape in shapes]
    spaces[used].make("ax")
    assert first.x.data_ptr() == second.x.data_ptr()
    assert first.a.data_ptr() == second.a.data_ptr()
    assert pool.nbytes() == 4 * (4 * 5 * 6 + 4 * 5 * 5)
    assert Workspace(None, first.x).x.data_ptr() != first.x.data_ptr()
    assert Workspace(Pool(), first.x).x.data_ptr() != first.x.data_ptr()
    double = Workspace(pool, torch.empty(2, 2, 3, dtype=torch.float64))  # memory of its own for a dtype
    double.x.fill_(1)
    first.x.fill_(2)
    assert bool((double.x == 1).all())


def test_the_memory_of_a_pool_grows():
    """What was handed out before stays whole; what is asked for from then on is from the larger buffer."""
    pool = Pool()
    before = Workspace(pool, torch.empty(2, 2, 3))
    before.x.fill_(7)
    late = Workspace(pool, torch.empty(50, 2, 3))
    late.x.fill_(1)
    assert bool((before.x == 7).all())
    after = Workspace(pool, torch.empty(2, 2, 3))
    assert after.x.data_ptr() == late.x.data_ptr()
    assert pool.nbytes() == 4 * 50 * 2 * 3
    pool.reserve(torch.empty(0), square=1000, wide=10)
    assert late.b.untyped_storage().nbytes() == 4000
    assert late.z.untyped_storage().nbytes() == 4 * 50 * 2 * 3  # reserved before, and more


def test_buffers_that_are_made_at_once():
    pool = Pool()
    ws = Workspace(pool, torch.empty(4, 2, 3))
    assert pool.nbytes() == 0
    ws.make("abx")
    made = pool.nbytes()
    assert made == 4 * (4 * 2 * 2 * 2 + 4 * 2 * 3)
    assert len({ws.a.data_ptr(), ws.b.data_ptr(), ws.x.data_ptr()}) == 3
    assert pool.nbytes() == made


@each(
    {
        "optimizer, options": [
            (Adam, {}),
            (Adam, {"second_moment": "block", "amsgrad": True}),
            (SGD, {"momentum": 0.9, "nesterov": True}),
            (Adam, {"amsgrad": True, "metric": "canonical"}),
        ],
        "p, n, gain, count": [(3, 3, 1.0, 1), (3, 3, 1.0, 300), (2, 5, 1.7, 300), (6, 6, 0.4, 300)],
    },
    retraction=["orthographic", "polar", "cayley"],
)
def test_many_tiny_blocks_move_as_few(optimizer, options, retraction, p, n, gain, count):
    """300 blocks, of one parameter or of as many, move as they do a hundred to a parameter, each with its optimizer.

    To rounding: how many products a step takes, the longest of its batch says.
    """

    def run(members):
        start = gain * point(300, p, n, seed=5)
        weights = [nn.Parameter(part.reshape(-1, n).clone()) for part in start.split(300 // members)]
        for weight in weights:
            mark_orthogonal(weight, blocks=300 // members, gain=gain)
        if members == 3:
            opts = [optimizer([weight], lr=0.02, retraction=retraction, **options) for weight in weights]
        else:
            opts = [optimizer(weights, lr=0.02, retraction=retraction, **options)]
        for step in range(5):
            gradient = gaussian(300, p, n, seed=step)
            if step > 1:
                gradient[7] = 0 if step == 2 else float("nan")
            for weight, part in zip(weights, gradient.split(300 // members), strict=True):
                weight.grad = part.reshape(-1, n).clone()
            for opt in opts:
                opt.step()
        moments = [opt.state[w][key] for opt in opts for w in opt.state for key in opt.state[w] if key not in UNMOVED]
        return torch.cat([weight.detach() for weight in weights]).view(300, p, n), moments

    (together, moments), (apart, _) = run(count), run(3)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    assert float(geometry.error(together / gain).max()) < 2 * rounding(together)
    assert all(moment.is_contiguous() and bool(moment.isfinite().all()) for moment in moments)


def test_an_adjoint_is_kept_for_its_tensor_only():
    """A direction may return another tensor than the buffer that was given to it."""
    ws = Workspace(Pool(), torch.empty(2, 3, 3, dtype=torch.complex64))
    first, second = (gaussian(2, 3, 3, dtype=torch.complex64, seed=k) for k in (1, 2))
    assert ws.adjoint("x", first) is ws.adjoint("x", first)
    assert torch.equal(ws.adjoint("x", second), second.mH)
    assert torch.equal(ws.adjoint("x", first), first.mH)
