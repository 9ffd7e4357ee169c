import pytest
import torch

from manifold_opt.linalg import singular_values as spectral
from manifold_opt.linalg.singular_values import clip_singular_values, clip_singular_values_, is_inside_ball, tolerance

from ..helpers import DTYPES, Memory, each, gaussian, never_read, point

SHAPES = [(1, 1), (1, 7), (2, 3), (16, 16), (20, 33), (64, 80), (200, 220)]
EPS = {dtype: torch.finfo(dtype).eps for dtype in DTYPES}


@pytest.fixture(params=["read", "blind"])
def blind(request, monkeypatch):
    """As on a CPU; and as on an accelerator, where the host looks at no value."""
    if request.param == "blind":
        never_read(monkeypatch)
    return request.param == "blind"


def matrices(s, p: int, n: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """One with singular values s."""
    left, right = point(p, p, seed=seed), point(p, n, seed=seed + 1)
    return (left * torch.as_tensor(s, dtype=torch.float64) @ right).to(dtype)


def oracle(x: torch.Tensor, bound: float) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u * s.clamp_max(bound)[..., None, :] @ vh


def largest(x: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(x.double())[..., 0]


def spectra(p: int) -> dict[str, torch.Tensor]:
    one = torch.ones(p, dtype=torch.float64)
    near = 1 + 0.05 * gaussian(p, seed=3)
    return {
        "around the bound": near,
        "all at the bound": one,
        "one value, repeated": 1.7 * one,
        "spread": torch.linspace(0, 1.9, p, dtype=torch.float64),
        "rank one": torch.cat([1.5 * one[:1], 0 * one[1:]]),
        "a hair above": one + 1e-3,
        "a step of rank one": torch.cat([2.9 * one[:1], one[1:]]),
        "a long one": torch.cat([7.5 * one[:1], one[1:]]),
        "inside": 0.999 * torch.linspace(0, 1, p, dtype=torch.float64),
        "nothing": 0 * one,
    }


@each(bound=[1.0, 0.03, 40.0, 1e-12, 1e12], dtype=DTYPES, shape=SHAPES)
def test_clipping_is_that_of_the_svd(shape, dtype, bound, blind):
    """Rounding in a Gram matrix counts up to 4 times, the square of how far from the bound it is taken; the iterations
    find an eigenvalue near the bound to 1e-6 or 1e-8 of the norm, here up to 8 times the bound squared."""
    tolerance = 100 * EPS[dtype] + (blind * 1e-5 if dtype == torch.float32 else blind * 1e-7)
    for name, s in spectra(shape[0]).items():
        x = bound * matrices(s, *shape, dtype)
        clipped = clip_singular_values(x, bound)
        assert largest(clipped) <= bound * (1 + 100 * EPS[dtype] + blind * 1e-6), name
        torch.testing.assert_close(
            clipped.double(), oracle(x, bound), rtol=0, atol=bound * tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


@each(dtype=DTYPES, shape=[(1, 3), (6, 6), (40, 50)], decades=[(-3, 1), (-3, 3), (-9, 9), (10, 16), (20, 30)])
def test_the_bound_holds_whatever_comes_in(shape, dtype, decades, blind):
    """Singular values over so many decades: single ones too large to be squared in float32 among them."""
    x = matrices(torch.logspace(*reversed(decades), shape[0]), *shape, dtype)
    clipped = clip_singular_values(x, 1.0)
    assert largest(clipped) <= 1 + 100 * EPS[dtype] + blind * 1e-5
    assert largest(clipped) > 0.5
    if not blind:  # what is far outside is decomposed in float64; entries are rounded in proportion to the largest
        atol = 1e-5 if dtype == torch.float32 else 1e-12
        rounding = EPS[torch.float64] * float(largest(x))
        torch.testing.assert_close(clipped.double(), oracle(x, 1.0), rtol=0, atol=atol + 10 * rounding)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_far_outside_costs_the_others_no_precision(dtype):
    """In a Gram matrix its square, 510 times the bound, would round them away by as much."""
    s = torch.ones(200, dtype=torch.float64)
    s[0], s[1:100] = 1.6 * 200**0.5, 1.01
    x = matrices(s, 200, 220, dtype)
    rounding = EPS[dtype] if dtype == torch.float32 else 100 * EPS[dtype]
    torch.testing.assert_close(clip_singular_values(x, 1.0).double(), oracle(x, 1.0), rtol=0, atol=rounding)


@each(dtype=DTYPES, ratio=[3.0, 7.9, 8.1, 30.0, 1e4], shape=[(6, 9), (280, 300)])
def test_few_values_far_outside_cost_the_others_no_precision(shape, ratio, dtype):
    """Up to 8 times the bound the Gram matrix is decomposed twice. Beyond, float64 holds the others."""
    s = torch.linspace(1.3, 0.1, shape[0], dtype=torch.float64)
    s[:3] = ratio * torch.tensor([1.0, 0.7, 0.4])
    x = matrices(s, *shape, dtype)
    units = 2 if dtype == torch.float32 and ratio > 8 else 30 + 4 * ratio
    clipped = clip_singular_values(x, 1.0)
    assert float(torch.linalg.matrix_norm(clipped.double() - oracle(x, 1.0), 2)) < units * EPS[dtype]
    assert largest(clipped) <= 1 + tolerance(x)


def test_values_at_twice_the_bound_are_clipped_in_two_passes(monkeypatch):
    """Rounding puts some of them above what decides on a second pass, and others below."""
    passes, bound_minus_gram = [], spectral._bound_minus_gram
    monkeypatch.setattr(spectral, "_bound_minus_gram", lambda *given: passes.append(1) or bound_minus_gram(*given))
    s = 2 * (1 + 4 * EPS[torch.float32] * gaussian(300, seed=5))
    x = matrices(s, 300, 300, torch.float32)
    torch.testing.assert_close(clip_singular_values(x, 1.0).double(), oracle(x, 1.0), rtol=0, atol=1e-5)
    assert len(passes) <= 2


def test_by_hand():
    x = torch.tensor([[3.0, 0.0, 0.0], [0.0, -0.5, 0.0]])
    torch.testing.assert_close(clip_singular_values(x, 2.0), torch.tensor([[2.0, 0.0, 0.0], [0.0, -0.5, 0.0]]))
    ones = torch.ones(2, 2, dtype=torch.float64)  # singular values 2 and 0, the first of (1, 1)/sqrt 2 on both sides
    torch.testing.assert_close(clip_singular_values(ones, 1.0), ones / 2)
    torch.testing.assert_close(clip_singular_values(torch.tensor([[3.0, 4.0]]), 1.0), torch.tensor([[0.6, 0.8]]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("blind")
def test_what_is_inside_keeps_its_bits(shape, dtype):
    at_the_bound = matrices(torch.ones(shape[0]), *shape, dtype)
    well_inside = 0.4 * gaussian(*shape, dtype=dtype) / sum(side**0.5 for side in shape)
    for x in (at_the_bound, well_inside):
        before = x.clone()
        assert torch.equal(clip_singular_values_(x[None], 1.0)[0], before)
        assert bool(is_inside_ball(x, 1.0))


@each(dtype=DTYPES, shape=SHAPES, seed=range(5))
@pytest.mark.usefixtures("blind")
def test_clipped_twice_is_clipped_once(shape, dtype, seed):
    for s in (1.9 * torch.rand(shape[0]) + 0.1, 1 + 0.01 * torch.rand(shape[0]), 5 * torch.rand(shape[0]) + 1):
        once = clip_singular_values(matrices(s, *shape, dtype, seed), 1.0)
        assert torch.equal(clip_singular_values(once, 1.0), once)
        assert bool(is_inside_ball(once, 1.0))


@pytest.mark.parametrize("shape", SHAPES)
def test_it_brings_no_two_matrices_further_apart(shape, blind):
    """A projection onto a convex set."""
    x, y = (0.3 * gaussian(*shape, seed=seed) for seed in (1, 2))
    y = torch.stack([y, x + 1e-3 * y])
    apart = torch.linalg.matrix_norm(clip_singular_values(x, 1.0) - clip_singular_values(y, 1.0))
    assert bool((apart <= torch.linalg.matrix_norm(x - y) * (1 + 1e-12) + 1e-7 * blind).all())


@pytest.mark.parametrize("shape", [(12, 5), (3, 2, 9, 4), (2, 4, 9)])
def test_tall_ones_and_batches_of_any_shape(shape):
    x = gaussian(*shape)
    torch.testing.assert_close(clip_singular_values(x, 1.0), oracle(x, 1.0))
    for turned in (x.mT, x.transpose(0, -2), x.transpose(0, -1)):
        torch.testing.assert_close(clip_singular_values(turned, 1.0), oracle(turned, 1.0))
    assert bool(is_inside_ball(oracle(x, 0.999), 1.0).all())
    assert is_inside_ball(x, 1.0).shape == x.shape[:-2]
    assert clip_singular_values(x[..., :0], 1.0).shape == (*x.shape[:-1], 0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("blind")
def test_what_is_not_finite_stays_in_its_block(value, dtype):
    x = gaussian(4, 6, 8, dtype=dtype)
    clean = clip_singular_values(x, 1.0)
    broken = x.clone()
    broken[2, 1, 3] = value
    out = clip_singular_values(broken, 1.0)
    others = [0, 1, 3]
    assert torch.equal(out[others], clean[others])
    assert torch.equal(out[2].nan_to_num(7.0), broken[2].nan_to_num(7.0))
    assert is_inside_ball(out, 1.0).tolist() == [True, True, False, True]


@each(dtype=DTYPES, shape=[(5, 7), (16, 16), (17, 33), (190, 200)])
@pytest.mark.usefixtures("blind")
def test_a_block_does_not_depend_on_its_neighbours(shape, dtype):
    block = matrices(1 + 0.1 * gaussian(shape[0]), *shape, dtype)
    batch = [block] * 5
    alone = clip_singular_values(torch.stack(batch), 1.0)[3]
    for neighbour in (0 * block, 100 * block, block / 10, 1e30 * block, block * float("nan")):
        batch = [neighbour, block, neighbour, block, neighbour]
        assert torch.equal(clip_singular_values(torch.stack(batch), 1.0)[3], alone)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 60), (1, 192, 192)])
@pytest.mark.usefixtures("blind")
def test_step_after_step_the_bound_holds(shape, dtype):
    """As training does to a Lipschitz layer: most singular values come to lie at the bound, and are pushed out."""
    w = 0.9 * point(*shape, dtype=dtype)
    bits = []
    for step in range(20):
        w = w + 0.1 * w.sign() * torch.rand(shape, dtype=dtype).square() / shape[-1] ** 0.5
        before = w.clone()
        clip_singular_values_(w, 1.0)
        assert float(largest(w).max()) <= 1 + tolerance(w), step
        bits.append(torch.equal(before, w))
    assert not all(bits)


def test_views_are_written_through_and_only_where_needed():
    parameter = torch.nn.Parameter(3 * torch.eye(6)[:, :2].repeat(2, 1))
    blocks = parameter.detach().view(2, 6, 2).mT
    clip_singular_values_(blocks, 1.0)
    torch.testing.assert_close(parameter.detach(), torch.eye(6)[:, :2].repeat(2, 1))
    version = parameter._version
    clip_singular_values_(blocks, 1.0)
    assert parameter._version == version


def test_a_small_block_takes_no_decomposition(monkeypatch):
    def refuse(*_args, **_options):
        raise AssertionError("not needed")

    monkeypatch.setattr(torch.linalg, "eigh", refuse)
    monkeypatch.setattr(torch.linalg, "svd", refuse)
    clip_singular_values(0.9 * point(3, 8, 8), 1.0)
    monkeypatch.setattr(torch.linalg, "cholesky_ex", refuse)
    monkeypatch.setattr(spectral, "gram", refuse)
    clip_singular_values(0.3 * point(3, 8, 8), 1.0)


@pytest.mark.parametrize(("shape", "times"), [((1, 512, 512), 2.6), ((8, 256, 256), 0.6), ((1, 512, 1024), 1.4)])
def test_memory(shape, times):
    x = point(*shape, dtype=torch.float32)
    x += 1e-3 * gaussian(*shape, dtype=torch.float32)
    with Memory() as memory:
        clip_singular_values_(x, 1.0)
    assert memory.peak < times * x.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_it_is_one_graph(dtype):
    x = torch.stack([matrices(s, 12, 20, dtype) for s in spectra(12).values()])
    clipped = torch.compile(clip_singular_values_, fullgraph=True, backend="eager")(x.clone(), 1.0)
    torch.testing.assert_close(clipped.double(), oracle(x, 1.0), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-7)


@pytest.mark.parametrize("function", [clip_singular_values, is_inside_ball])
def test_it_refuses_what_it_cannot_do(function):
    for x in (torch.ones(3), torch.ones(2, 2, dtype=torch.bfloat16), torch.ones(2, 2, dtype=torch.complex64)):
        with pytest.raises(ValueError, match=r"matrices \(\.\.\., p, n\) of float32 or float64"):
            function(x, 1.0)
    for bound in (0, -1.0, float("nan"), float("inf"), 1e-13, True, "1", torch.ones(())):
        with pytest.raises(ValueError, match="bound must be a number from 1e-12 to 1e"):
            function(torch.eye(2), bound)
