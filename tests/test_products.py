"""Products of batches, however their matrices lie."""

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, mark_orthogonal, stiefel
from manifold_opt.products import across, add_gram_, adjoint, components, gram, matmul, matmul_add, norm, transpose
from manifold_opt.room import Room

from .helpers import FIELDS, UNMOVED, gaussian, point, rounding


def lying(x, how):
    return Room().across("x", x) if how == "across" else x.clone()


@pytest.mark.parametrize("how", ["across", "along"])
@pytest.mark.parametrize(("p", "k", "n"), [(3, 3, 3), (2, 5, 4), (1, 3, 1)])
@pytest.mark.parametrize("dtype", FIELDS)
def test_products_of_matrices_that_lie_across(p, k, n, how, dtype):
    a, b, x = (gaussian(30, *shape, seed=s, dtype=dtype) for s, shape in ((1, (p, k)), (2, (k, n)), (3, (p, n))))
    start = gaussian(30, p, p, dtype=dtype)
    one, two, three = lying(a, how), lying(b, how), lying(x, how)
    out = torch.empty_like(three)
    assert across(one) == (how == "across")
    torch.testing.assert_close(matmul(one, two, out=out, alpha=0.3), 0.3 * a @ b)
    torch.testing.assert_close(matmul_add(three, one, two, out=out, alpha=0.3, beta=2.0), 2 * x + 0.3 * a @ b)
    torch.testing.assert_close(matmul_add(three, one, two, out=three), x + a @ b)
    # Factors that are conjugated lazily, as those of a Gram matrix are, and a point that is the view of one.
    torch.testing.assert_close(matmul(two.mH, one.mH, out=torch.empty_like(three.mT)), (a @ b).mH.resolve_conj())
    torch.testing.assert_close(gram(one, out=torch.empty_like(lying(start, how))), a @ a.mH)
    torch.testing.assert_close(add_gram_(lying(start, how), one, alpha=-0.3), start - 0.3 * a @ a.mH)
    for keepdim in (False, True):
        torch.testing.assert_close(norm(one, keepdim=keepdim), torch.linalg.matrix_norm(a, keepdim=keepdim))
    square = lying(start, how)
    assert torch.equal(transpose(square, out=torch.empty_like(square)), square.mT)
    assert torch.equal(adjoint(square, out=torch.empty_like(square)), square.mH)


@pytest.mark.parametrize("dtype", FIELDS)
def test_symmetric_products_of_many_rows(dtype):
    """Of which one triangle is computed, and mirrored."""
    x, start = gaussian(2, 390, 7, dtype=dtype), gaussian(2, 390, 390, seed=2, dtype=dtype)
    torch.testing.assert_close(gram(x), x @ x.mH)
    torch.testing.assert_close(add_gram_(start.clone(), x, alpha=0.7), start + 0.7 * x @ x.mH)


@pytest.mark.parametrize("dtype", FIELDS)
@pytest.mark.parametrize("count", [1, 3, 20])
def test_transposes_of_large_matrices(count, dtype):
    """Of a few, one by one."""
    x = gaussian(count, 130, 130, dtype=dtype)
    assert torch.equal(transpose(x, out=torch.empty_like(x)), x.mT)
    assert torch.equal(adjoint(x, out=torch.empty_like(x)), x.mH)
    torch.testing.assert_close(matmul(x, x.mH, out=torch.empty_like(x), alpha=0.5), 0.5 * x @ x.mH)
    torch.testing.assert_close(matmul_add(x, x, x.mH, out=x.clone(), alpha=0.5, beta=2.0), 2 * x + 0.5 * x @ x.mH)


def test_components_are_views_of_the_real_and_the_imaginary_parts():
    x = gaussian(2, 3, 4, dtype=torch.complex128)
    assert torch.equal(components(x), torch.stack([x.real, x.imag]))
    components(x).mul_(torch.tensor([1.0, 2.0]).view(2, 1, 1))  # one number a block
    torch.testing.assert_close(x[1], 2 * gaussian(2, 3, 4, dtype=torch.complex128)[1])
    real = gaussian(2, 3, 4)
    assert components(real) is real


def test_room_lays_matrices_as_those_they_are_like():
    room = Room()
    tiny = room.across("tiny", gaussian(5, 2, 3))
    assert across(room("other", (5, 2, 2), like=tiny))
    assert not across(room("other", (5, 2, 2), like=gaussian(5, 2, 3)))
    both = room.across("tiny", gaussian(5, 2, 3, dtype=torch.complex128))
    assert across(both)
    assert torch.equal(both, gaussian(5, 2, 3, dtype=torch.complex128))
    assert torch.equal(tiny, gaussian(5, 2, 3))  # a workspace a dtype


@pytest.mark.parametrize("retraction", ["orthographic", "polar", "cayley"])
@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (Adam, {}),
        (Adam, {"second_moment": "block", "amsgrad": True}),
        (SGD, {"momentum": 0.9, "nesterov": True}),
        (Adam, {"amsgrad": True, "metric": "canonical"}),
    ],
)
@pytest.mark.parametrize(
    ("p", "n", "gain", "count"), [(3, 3, 1.0, 1), (3, 3, 1.0, 300), (2, 5, 1.7, 300), (6, 6, 0.4, 300)]
)
def test_many_tiny_blocks_move_as_few(optimizer, options, retraction, p, n, gain, count):
    """300 blocks, of one parameter or of as many, are copied to lie across; a hundred at a time they are not."""

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
    assert float(stiefel.error(together / gain).max()) < 2 * rounding(together)
    assert all(moment.is_contiguous() and bool(moment.isfinite().all()) for moment in moments)
