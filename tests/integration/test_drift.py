"""Rounding errors do not accumulate: the largest LAPACK ratio over many noisy steps, by benchmarks/drift.py."""

import pytest

from ..helpers import DTYPES, EXACT, benchmark, pairs


@pairs({"n, bound, steps": [(8, 4, 500), (32, 2, 300)]}, scheme=EXACT, optimizer=["sgd", "adam"], dtype=DTYPES)
def test_the_largest_lapack_ratio_stays_at_rounding(scheme, optimizer, dtype, n, bound, steps):
    ratio, _ = benchmark("drift").largest_ratio(optimizer, scheme, n, dtype, steps, 1e-2)
    assert ratio <= bound


@pytest.mark.slow
@pytest.mark.parametrize("scheme", EXACT)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "bound"), [(8, 4), (32, 2)])
def test_the_largest_lapack_ratio_stays_at_rounding_for_ten_thousand_steps(scheme, optimizer, dtype, n, bound):
    ratio, _ = benchmark("drift").largest_ratio(optimizer, scheme, n, dtype, 10_000, 1e-2)
    assert ratio <= bound


def test_the_measure_sees_geoopt_drift():
    """The same loop around a retraction without correction: the ratio grows with the steps."""
    drift = benchmark("drift")
    ratios = [drift.largest_ratio("adam", "geoopt cayley", 8, DTYPES[0], steps, 1e-2)[0] for steps in (50, 1000)]
    assert ratios[1] > max(4, 2 * ratios[0])
