import pytest
import torch

from manifold_opt.linalg import few_eigenpairs
from manifold_opt.linalg import singular_values as spectral
from manifold_opt.linalg.few_eigenpairs import smallest_eigenpairs
from manifold_opt.linalg.singular_values import clip_singular_values, tolerance

from ..helpers import each, gaussian, point

EPS = torch.finfo(torch.float32).eps
P, N = 256, 300
LEFT, RIGHT = point(P, P), point(P, N, seed=1)


def spectrum(outside: int, largest: float = 1.05, rest: float = 0.9) -> torch.Tensor:
    """Some values outside, the others from ``rest`` to zero."""
    top = torch.linspace(largest, 1.005, outside, dtype=torch.float64)
    return torch.cat([top, torch.linspace(rest, 0, P - outside, dtype=torch.float64)])


SPECTRA = {
    "one": spectrum(1),
    "some": spectrum(12),
    "one far": spectrum(1, 1.1),
    "close to the others": spectrum(2, rest=0.99),
    "smooth": torch.linspace(1.002, 0, P, dtype=torch.float64),
    "repeated": torch.cat([torch.full((8,), 1.01, dtype=torch.float64), spectrum(0, rest=0.9)[8:]]),
}
MANY = {
    "many": spectrum(60),
    "all": torch.full((P,), 1.01, dtype=torch.float64),
    "too far": spectrum(1, 1.6),
    "far too far": spectrum(1, 20.0),
}


def matrix(s: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (LEFT * s @ RIGHT).to(dtype)


def gap_of(x: torch.Tensor) -> torch.Tensor:
    return spectral._bound_minus_gram(x[None], 1.0, torch.tensor([True]))


def oracle(x: torch.Tensor, bound: float) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(x.double(), full_matrices=False)
    return u * s.clamp_max(bound) @ vh


def refuse_whole_decompositions(monkeypatch):
    eigh = torch.linalg.eigh

    def checked(x):
        assert x.shape[-1] < P
        return eigh(x)

    monkeypatch.setattr(torch.linalg, "eigh", checked)


@each(name=SPECTRA, bound=[1.0, 1e-12, 1e12, 0.3])
def test_few_values_are_clipped_without_a_whole_decomposition(name, bound, monkeypatch):
    """As exactly as with one: see test_singular_values.py."""
    refuse_whole_decompositions(monkeypatch)
    x = (bound * matrix(SPECTRA[name], torch.float64)).float()
    clipped = clip_singular_values(x, bound)
    assert float(torch.linalg.matrix_norm(clipped.double() / bound, 2)) <= 1 + tolerance(x)
    torch.testing.assert_close(clipped.double(), oracle(x, bound), rtol=0, atol=20 * EPS * bound)
    assert torch.equal(clip_singular_values(clipped, bound), clipped)


@pytest.mark.parametrize("name", MANY)
def test_many_values_are_found_out_early(name, monkeypatch):
    x = matrix(MANY[name])
    torch.testing.assert_close(clip_singular_values(x, 1.0).double(), oracle(x, 1.0), rtol=0, atol=100 * EPS)
    monkeypatch.setattr(few_eigenpairs, "_DEGREE", 2)  # no more products than this
    assert few_eigenpairs._filtered_columns(gap_of(x), tolerance(x)) is None


@pytest.mark.parametrize("name", SPECTRA)
def test_the_pairs_are_those_of_the_whole_decomposition(name):
    x = matrix(SPECTRA[name])
    gap, outside = gap_of(x), SPECTRA[name] > 1
    values, vectors = smallest_eigenpairs(gap, tolerance(x))
    expected, _ = torch.linalg.eigh(gap.double())
    count = int(outside.sum())
    torch.testing.assert_close(values[:, :count].double(), expected[:, :count], rtol=0, atol=50 * EPS)
    torch.testing.assert_close(vectors[0].mT @ vectors[0], torch.eye(vectors.shape[-1]), rtol=0, atol=50 * EPS)
    residual = gap @ vectors - vectors * values
    assert float(residual[..., :count].norm(dim=1).max()) < 1e-3


def test_what_has_not_converged_is_not_used(monkeypatch):
    x = matrix(SPECTRA["some"])
    monkeypatch.setattr(few_eigenpairs, "_DEGREE", 4)
    assert smallest_eigenpairs(gap_of(x), tolerance(x)) is None
    torch.testing.assert_close(clip_singular_values(x, 1.0).double(), oracle(x, 1.0), rtol=0, atol=20 * EPS)


def test_vectors_that_are_off_are_not_used(monkeypatch):
    """By so little that the factorization succeeds: the clipped matrix would be inside, but not the nearest."""
    x = matrix(SPECTRA["one"])
    filtered = few_eigenpairs._filtered_columns

    def inexact(gap, rounding):
        columns = torch.linalg.qr(filtered(gap, rounding))[0]
        return columns + 1e-4 * gaussian(*columns.shape, dtype=torch.float32)

    monkeypatch.setattr(few_eigenpairs, "_filtered_columns", inexact)
    assert smallest_eigenpairs(gap_of(x), tolerance(x)) is None
    torch.testing.assert_close(clip_singular_values(x, 1.0).double(), oracle(x, 1.0), rtol=0, atol=20 * EPS)


def test_a_value_that_the_columns_do_not_see_is_noticed(monkeypatch):
    x = matrix(SPECTRA["some"])
    filtered = few_eigenpairs._filtered_columns

    def blind(gap, rounding):
        columns, unseen = filtered(gap, rounding), LEFT[:, 3:4].float()
        return columns - unseen @ (unseen.mT @ columns)

    monkeypatch.setattr(few_eigenpairs, "_filtered_columns", blind)
    assert smallest_eigenpairs(gap_of(x), tolerance(x)) is None
    torch.testing.assert_close(clip_singular_values(x, 1.0).double(), oracle(x, 1.0), rtol=0, atol=20 * EPS)


def test_a_value_between_the_bound_and_rounding_is_left_to_the_tolerance():
    s = torch.cat([torch.tensor([1.01, 1 + 0.3 * tolerance(matrix(SPECTRA["one"]))]).double(), spectrum(0)[2:]])
    x = matrix(s)
    clipped = clip_singular_values(x, 1.0)
    assert float(torch.linalg.matrix_norm(clipped.double(), 2)) <= 1 + tolerance(x)


def test_small_ones_batches_and_float64_are_decomposed():
    small, whole = torch.diag(spectrum(1, rest=0.8)[:96].float()), matrix(SPECTRA["one"])
    assert smallest_eigenpairs(gap_of(small), 1e-5) is None
    assert smallest_eigenpairs(gap_of(whole.double()), 1e-5) is None
    assert smallest_eigenpairs(gap_of(whole).expand(2, P, P), 1e-5) is None


def test_the_random_state_is_left_alone():
    before = torch.get_rng_state()
    x = matrix(SPECTRA["one"])
    first = clip_singular_values(x, 1.0)
    gaussian(3)
    assert torch.equal(clip_singular_values(x, 1.0), first)
    assert torch.equal(torch.get_rng_state(), before)
