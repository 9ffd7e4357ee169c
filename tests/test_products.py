"""Products of batches, however their matrices lie."""

import pytest
import torch
from torch import nn

from manifold_opt import SGD, Adam, mark_orthogonal, stiefel
from manifold_opt.products import across, add_gram_, gram, matmul, matmul_add, norm, transpose
from manifold_opt.room import Room

from .helpers import gaussian, point, rounding


def lying(x, how):
    return Room().across("x", x) if how == "across" else x.clone()


@pytest.mark.parametrize("how", ["across", "along"])
@pytest.mark.parametrize(("p", "k", "n"), [(3, 3, 3), (2, 5, 4), (1, 3, 1)])
def test_products_of_matrices_that_lie_across(p, k, n, how):
    a, b, x = gaussian(30, p, k), gaussian(30, k, n, seed=2), gaussian(30, p, n, seed=3)
    one, two, three = lying(a, how), lying(b, how), lying(x, how)
    out = torch.empty_like(three)
    assert across(one) == (how == "across")
    torch.testing.assert_close(matmul(one, two, out=out, alpha=0.3), 0.3 * a @ b)
    torch.testing.assert_close(matmul_add(three, one, two, out=out, alpha=0.3, beta=2.0), 2 * x + 0.3 * a @ b)
    torch.testing.assert_close(matmul_add(three, one, two, out=three), x + a @ b)
    torch.testing.assert_close(gram(one, out=lying(gaussian(30, p, p), how)), a @ a.mT)
    torch.testing.assert_close(
        add_gram_(lying(gaussian(30, p, p), how), one, alpha=-0.3), gaussian(30, p, p) - 0.3 * a @ a.mT
    )
    torch.testing.assert_close(norm(one), torch.linalg.matrix_norm(a))
    square = lying(gaussian(30, p, p), how)
    assert torch.equal(transpose(square, out=torch.empty_like(square)), square.mT)


def test_symmetric_products_of_many_rows():
    """Of which one triangle is computed, and mirrored."""
    x, start = gaussian(2, 390, 7), gaussian(2, 390, 390, seed=2)
    torch.testing.assert_close(gram(x), x @ x.mT)
    torch.testing.assert_close(add_gram_(start.clone(), x, alpha=0.7), start + 0.7 * x @ x.mT)


def test_room_lays_matrices_as_those_they_are_like():
    room = Room()
    tiny = room.across("tiny", gaussian(5, 2, 3))
    assert across(room("other", (5, 2, 2), like=tiny))
    assert not across(room("other", (5, 2, 2), like=gaussian(5, 2, 3)))


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
@pytest.mark.parametrize(("p", "n", "gain"), [(3, 3, 1.0), (2, 5, 1.7), (6, 6, 0.4)])
@pytest.mark.parametrize("count", [1, 300])
def test_many_tiny_blocks_move_as_few(optimizer, options, retraction, p, n, gain, count):
    """300 blocks, of one parameter or of as many, are copied to lie across; three at a time they are not."""

    def run(members):
        start = gain * point(300, p, n, seed=5)
        weights = [nn.Parameter(part.reshape(-1, n).clone()) for part in start.split(300 // members)]
        for weight in weights:
            mark_orthogonal(weight, blocks=300 // members, gain=gain)
        if members == 100:
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
        moments = [opt.state[w][key] for opt in opts for w in opt.state for key in opt.state[w] if key != "step"]
        return torch.cat([weight.detach() for weight in weights]).view(300, p, n), moments

    (together, moments), (apart, _) = run(count), run(100)
    torch.testing.assert_close(together, apart, rtol=0, atol=1e-12)
    assert float(stiefel.error(together / gain).max()) < 2 * rounding(together)
    assert all(moment.is_contiguous() and bool(moment.isfinite().all()) for moment in moments)
