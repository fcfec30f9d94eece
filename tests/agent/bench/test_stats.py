from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boardbench.agent.bench import stats

percentiles = st.sampled_from(stats.PERCENTILES)


def brute_bounds(percentile: str, count: int) -> tuple[int, int] | None:
    """The definition itself, in rational numbers: at most 2.5 % on either side."""
    p = Fraction(percentile) / 100
    tail = Fraction(25, 1000)
    mass = [math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(count + 1)]
    low = [position for position in range(1, count + 1) if sum(mass[:position]) <= tail]
    high = [position for position in range(1, count + 1) if sum(mass[position:]) <= tail]
    return (max(low), min(high)) if low and high else None


@pytest.mark.parametrize("percentile", stats.PERCENTILES)
def test_bounds_are_those_of_the_exact_binomial(percentile: str) -> None:
    for count in [*range(1, 41), 71, 72, 73, 100, 119, 150]:
        assert stats.bounds(percentile, count) == brute_bounds(percentile, count), count


@pytest.mark.parametrize(
    ("percentile", "least"), [("50", 6), ("90", 36), ("95", 72), ("99", 368), ("99.9", 3688)]
)
def test_a_percentile_is_told_from_the_first_count_that_supports_it(percentile: str, least: int) -> None:
    # Both extremes must leave out at most 2.5 %: p^n <= 0.025 is the condition on the upper one.
    p = float(percentile) / 100
    assert p**least <= 0.025 < p ** (least - 1)
    assert stats.bounds(percentile, least - 1) is None
    assert stats.bounds(percentile, least) is not None


def test_bounds_of_a_million_are_those_of_the_normal_approximation() -> None:
    count = 1_000_000
    for percentile in stats.PERCENTILES:
        p = float(percentile) / 100
        found = stats.bounds(percentile, count)
        assert found is not None
        width = 1.959964 * math.sqrt(count * p * (1 - p))
        assert found[0] == pytest.approx(count * p - width, abs=4)
        assert found[1] == pytest.approx(count * p + width, abs=4)


@given(percentiles, st.integers(1, 20_000))
@settings(max_examples=200, deadline=None)
def test_bounds_enclose_the_percentile_and_leave_out_no_more_than_said(percentile: str, count: int) -> None:
    found = stats.bounds(percentile, count)
    if found is None:
        return
    low, high = found
    assert 1 <= low <= stats.rank(percentile, count) <= high <= count
    p = float(percentile) / 100
    logs = [
        math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        + k * math.log(p) + (count - k) * math.log1p(-p)
        for k in range(low, high)
    ]  # fmt: skip
    assert math.fsum(map(math.exp, logs)) >= 0.95 - 1e-6


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=200), percentiles)
@settings(deadline=None)
def test_the_value_is_the_smallest_that_enough_samples_do_not_exceed(
    samples: list[int], percentile: str
) -> None:
    value = sorted(samples)[stats.rank(percentile, len(samples)) - 1]
    share = Fraction(percentile) / 100
    assert sum(sample <= value for sample in samples) >= share * len(samples)
    assert all(sum(other <= smaller for other in samples) < share * len(samples)
               for smaller in samples if smaller < value)  # fmt: skip


def test_a_rank_has_no_rounding_error() -> None:
    assert stats.rank("99.9", 1000) == 999
    assert stats.rank("90", 10) == 9
    assert stats.rank("50", 1) == 1


@given(st.lists(st.integers(1, 10**12), min_size=1, max_size=500))
@settings(deadline=None)
def test_a_latency_is_consistent(samples: list[int]) -> None:
    latency = stats.latency(samples)
    assert latency.count == len(samples)
    assert latency.samples_nanoseconds == tuple(samples)
    assert latency.min_seconds == min(samples) / 1e9
    assert latency.max_seconds == max(samples) / 1e9
    assert latency.mean_seconds == pytest.approx(sum(samples) / len(samples) / 1e9)
    told = [percentile.percentile for percentile in latency.percentiles]
    assert told == sorted(told)
    for percentile in latency.percentiles:
        assert (
            latency.min_seconds
            <= percentile.low_seconds
            <= percentile.seconds
            <= percentile.high_seconds
            <= latency.max_seconds
        )
    assert (latency.stdev_seconds is None) == (len(samples) == 1)


def test_the_deviation_is_exact_where_the_textbook_formula_cancels() -> None:
    latency = stats.latency([10**15, 10**15 + 2, 10**15 + 4])
    assert latency.stdev_seconds == 2e-9


def test_five_samples_have_no_percentile_and_six_have_the_median_alone() -> None:
    assert stats.latency([1, 2, 3, 4, 5]).percentiles == ()
    (median,) = stats.latency([6, 5, 4, 3, 2, 1]).percentiles
    assert (median.percentile, median.seconds) == (50.0, 3e-9)
    assert (median.low_seconds, median.high_seconds) == (1e-9, 6e-9)


def test_nothing_has_no_latency() -> None:
    with pytest.raises(ValueError, match="at least one sample"):
        stats.latency([])


def test_the_mean_of_the_middle_half_does_not_see_outliers() -> None:
    assert stats.midmean([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 1000.0]) == 4.5
    assert stats.midmean([3.0]) == 3.0
    assert stats.midmean([1.0, 2.0, 6.0]) == 3.0
    # A clock that ticks in whole steps: finer than a median.
    assert stats.midmean([1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0, 2.0]) == 1.75
