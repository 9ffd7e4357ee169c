"""What can be marked: every value of full rank, however ill-conditioned, at the sizes that layers have."""

import re

import pytest
import torch
from torch import nn

from manifold_opt import (
    Adam,
    Orthogonal,
    check,
    mark_orthogonal,
    mark_recurrent,
    mark_unit_norm,
    nearest_orthogonal,
    orthogonality_error,
    project_to_manifold_,
)
from manifold_opt.linalg.matrices import error_at_rounding
from manifold_opt.stiefel.geometry import error, random

from ..helpers import each, gaussian, point

INITIALIZERS = {
    "uniform_": nn.init.uniform_,
    "normal_": nn.init.normal_,
    "trunc_normal_": nn.init.trunc_normal_,
    "xavier_uniform_": nn.init.xavier_uniform_,
    "xavier_normal_": nn.init.xavier_normal_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "orthogonal_": nn.init.orthogonal_,
    "eye_": nn.init.eye_,
    "sparse_": lambda w: nn.init.sparse_(w, sparsity=0.5),
    "dirac_": nn.init.dirac_,
}
WITHOUT_RANK = {
    "zeros_": nn.init.zeros_,
    "ones_": nn.init.ones_,
    "constant_": lambda w: nn.init.constant_(w, 0.1),
    "sparse_": lambda w: nn.init.sparse_(w, sparsity=0.99),
}
DTYPES = [torch.float32, torch.float64]


def assert_nearest(w, x):
    """Orthogonal to rounding, and the polar factor: W X^T (or W^T X) is symmetric, with eigenvalues above zero.

    An ill-conditioned X leaves W itself uncertain, but not these: they show W as the nearest to a matrix that differs
    from X by rounding.
    """
    assert (error(w) <= error_at_rounding(*w.shape[-2:], w.dtype)).all()
    rounding = 32 * torch.finfo(w.dtype).eps * w.shape[-1] ** 0.5
    w, x = w.detach().double(), x.detach().double()
    size = torch.linalg.matrix_norm(x, 2)
    factor = w @ x.mT if w.shape[-2] <= w.shape[-1] else w.mT @ x
    assert torch.linalg.matrix_norm(factor - factor.mT) <= rounding * size
    assert torch.linalg.eigvalsh((factor + factor.mT) / 2).min() >= -rounding * size


def ill_conditioned(w):
    """The same with a smallest singular value that one draw in a hundred has: below 128 eps of float32."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    s[-1] = 1e-6 * s[0]
    return ((u * s) @ vh).to(w)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("name", INITIALIZERS)
def test_what_an_initializer_of_torch_draws_can_be_marked(name, dtype):
    shape = (128, 128, 3) if name == "dirac_" else (128, 128)
    weight = nn.Parameter(torch.empty(shape, dtype=torch.float32))
    INITIALIZERS[name](weight)
    if name not in ("orthogonal_", "eye_", "dirac_"):
        weight.data = ill_conditioned(weight.data)
        assert torch.linalg.cond(weight.detach().double()) > 1 / (128 * torch.finfo(torch.float32).eps)
    weight.data = weight.data.to(dtype)
    before = weight.detach().clone()
    mark_orthogonal(weight)
    if dtype in DTYPES:
        assert_nearest(weight.flatten(1), before.flatten(1))
    assert orthogonality_error(weight) <= error_at_rounding(128, weight[0].numel(), dtype)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16])
@pytest.mark.parametrize("name", WITHOUT_RANK)
def test_what_has_no_rank_is_not_completed_by_chance(name, dtype):
    weight = nn.Parameter(torch.empty(128, 128, dtype=torch.float32))
    WITHOUT_RANK[name](weight)
    weight.data = weight.data.to(dtype)
    before = weight.detach().clone()
    with pytest.raises(ValueError, match=r"shape \(128, 128\) is rank-deficient.*condition.*init\.orthogonal_"):
        mark_orthogonal(weight)
    assert torch.equal(weight, before)


@each({"n, seed": [(256, 0), (256, 34), (256, 88), (768, 2), (768, 38)]}, layer=["recurrent", "linear", "attention"])
def test_what_layers_start_with_can_be_marked(layer, n, seed):
    """Uniform of nn.LSTM, Kaiming's of nn.Linear, Xavier's of nn.MultiheadAttention; ill-conditioned but for seed 0."""
    torch.manual_seed(seed)
    w = torch.empty(3 * n if layer == "attention" else n, n)
    if layer == "attention":
        nn.init.xavier_uniform_(w)  # of the stack of queries, keys and values
    elif layer == "linear":
        nn.init.kaiming_uniform_(w, a=5**0.5)
    else:
        nn.init.uniform_(w, -(n**-0.5), n**-0.5)
    assert_nearest(nearest_orthogonal(w[:n]), w[:n])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_large_layers_as_torch_starts_them(seed):
    """An nn.LSTM of 1024 units and an nn.Linear of 2048: with float32's resolution of rank all were refused."""
    torch.manual_seed(seed)
    for model, mark in ((nn.LSTM(8, 1024), mark_recurrent), (nn.Linear(2048, 2048), None)):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        names = mark(model) if mark else ["weight"]
        weight = model.get_parameter(names[0]) if mark else mark_orthogonal(model, "weight")
        n = weight.shape[1]
        for w, x in zip(weight.split(n), before[names[0]].split(n), strict=True):
            assert_nearest(w, x)
        assert check(model, Adam(model.parameters())) == []


def test_a_hundred_thousand_blocks_one_of_them_without_rank():
    """It is named; the others alone are marked."""
    x = gaussian(100_000, 3, 3, dtype=torch.float32)
    x[71_077, 1] = x[71_077, 0]
    weight = nn.Parameter(x.reshape(300_000, 3))
    with pytest.raises(ValueError, match=r"the parameter: block 71077: the matrix of shape \(3, 3\) is rank-deficient"):
        mark_orthogonal(weight, blocks=100_000)
    with pytest.raises(ValueError, match=r"matrix 71077 of the batch, of shape \(3, 3\), is rank-deficient"):
        nearest_orthogonal(x)
    with torch.no_grad():
        weight[71_077 * 3 + 1] = torch.tensor([0.0, 0.0, 1.0])
    mark_orthogonal(weight, blocks=100_000)
    assert orthogonality_error(weight) <= error_at_rounding(3, 3, torch.float32)


@pytest.mark.parametrize(
    ("mark", "shape", "row", "said"),
    [
        (lambda p: mark_orthogonal(p, blocks=3), (12, 4), 5, "block 1: the matrix of shape"),
        (lambda p: mark_orthogonal(p, blocks=3, which=(0, 2)), (12, 4), 8, "block 2: the matrix of shape"),
        (lambda p: mark_orthogonal(p, blocks=(2, 4, 2)), (8, 4), 7, "block 2: the matrix of shape"),
        (lambda p: mark_orthogonal(p, flatten=False), (5, 3, 3), 4, "block 4: the matrix of shape"),
        (mark_orthogonal, (4, 4), 2, "the parameter: the matrix of shape"),
        (mark_unit_norm, (4, 4), 2, "slice 2: "),
    ],
)
def test_a_message_names_the_block(mark, shape, row, said):
    x = gaussian(*shape)
    x[row] = 0
    with pytest.raises(ValueError, match=re.escape(said)):
        mark(nn.Parameter(x))


def test_a_step_names_the_parameter_and_the_block_that_has_been_written_to():
    """Of several that move as one batch; and so does project_to_manifold_."""
    params = [mark_orthogonal(nn.Parameter(gaussian(8, 4, seed=k)), blocks=2) for k in range(3)]
    opt = Adam([(f"layer{k}", p) for k, p in enumerate(params)], lr=0.1)
    for p in params:
        p.grad = gaussian(8, 4, seed=5)
    opt.step()
    with torch.no_grad():
        params[0].mul_(1.1)
        params[2][4:] = 1.0
    with pytest.raises(ValueError, match=r"\(8, 4\) \(layer2\) has been written to: block 1: the matrix of shape \(4"):
        opt.step()
    with pytest.raises(ValueError, match=r"block 1: the matrix of shape \(4, 4\) is rank-deficient"):
        project_to_manifold_(nn.ParameterList(params))


def test_a_gradient_that_is_not_finite_is_named_by_its_block_among_all():
    weight = mark_orthogonal(nn.Parameter(gaussian(12, 4)), blocks=3, which=(0, 2))
    weight.grad = gaussian(12, 4)
    weight.grad[9] = torch.inf
    with pytest.raises(FloatingPointError, match="gradient of block 2 of"):
        Adam([weight], nonfinite="raise").step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [16, 256])
def test_ordinary_matrices_have_a_nearest_of_either_determinant(n, dtype):
    """Singular values that float32 or bfloat16 could not tell apart are no reason to refuse."""
    for seed in range(4):
        x = gaussian(n, n, seed=seed).to(dtype)
        for det in (1, -1):
            w = nearest_orthogonal(x, det=det)
            assert error(w) <= error_at_rounding(n, n, dtype)
            assert torch.linalg.slogdet(w.double()).sign == det


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 64, 256])
def test_rounding_does_not_choose_the_direction_that_turns(n, dtype):
    """Of an orthogonal matrix every rotation in some plane is as near: none is taken by chance."""
    w = random(n, n, dtype=torch.float64)
    w = (3 * w).to(dtype)
    det = -int(torch.linalg.slogdet(w.double()).sign)
    with pytest.raises(ValueError, match="not unique"):
        nearest_orthogonal(w, det=det)
    nearest_orthogonal(w, det=-det)


def test_values_far_off_are_found_as_by_their_error():
    """Their norm tells without a Gram matrix, but no more than the error: a slack, a gain and the dtype count."""
    x = 3 * (1.2 * point(2, 4, 6)).bfloat16()
    manifold = Orthogonal(gain=3.0)
    off, nearest = manifold.find_off_manifold(x)
    assert off.all()
    assert torch.equal(nearest, (3 * nearest_orthogonal(x.float() / 3)).bfloat16())
    off, nearest = manifold.find_off_manifold(x, slack=0.5)  # 1.2^2 - 1 is less
    assert not off.any()
    assert nearest.shape == (0, 4, 6)
