from __future__ import annotations

import math
import random
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


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.9, 0.99, 0.999])
def test_bounds_leave_out_what_the_confidence_says(confidence: float) -> None:
    tail = (1 - Fraction(repr(confidence))) / 2
    for percentile in ("50", "90", "97.5"):
        p = Fraction(percentile) / 100
        for count in (5, 20, 44, 90):
            mass = [math.comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(count + 1)]
            low = [place for place in range(1, count + 1) if sum(mass[:place]) <= tail]
            high = [place for place in range(1, count + 1) if sum(mass[place:]) <= tail]
            expected = (max(low), min(high)) if low and high else None
            assert stats.bounds(percentile, count, confidence) == expected


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("percentile", ["10", "50", "90", "99", "99.9"])
def test_the_least_count_is_the_first_that_supports_the_percentile(
    percentile: str, confidence: float
) -> None:
    least = stats.least_count(percentile, confidence)
    assert stats.bounds(percentile, least, confidence) is not None
    assert stats.bounds(percentile, least - 1, confidence) is None


@given(percentiles, st.integers(1, 20_000), st.floats(1, 500))
@settings(max_examples=200, deadline=None)
def test_bounds_of_fewer_independent_samples_are_never_narrower(
    percentile: str, count: int, factor: float
) -> None:
    exact = stats.bounds(percentile, count)
    wider = stats.bounds(percentile, count, effective_count=count / factor)
    if wider is None:
        return
    assert exact is not None
    assert 1 <= wider[0] <= exact[0] <= exact[1] <= wider[1] <= count
    # The same quantiles as those of so few samples, but for less than one place of these.
    few = int(count / factor)
    scaled = stats.bounds(percentile, few)
    assert scaled is not None
    assert wider[0] - 1 <= (scaled[0] - 1) * count / few
    assert wider[1] >= scaled[1] * count / few


# Number of highest latencies that LoadGen "would discard", and None where it asks for more queries: read from
# the summaries of mlcommons-loadgen 6.0.17 (PyPI), SingleStream, with min_query_count = max_query_count.
LOADGEN_DISCARDS = {
    "50": {10: None, 11: 0, 20: 3, 64: 21, 100: 36, 500: 222, 1000: 461, 5000: 2416, 20011: 9839},
    "90": {63: None, 64: 0, 99: 2, 100: 2, 129: 4, 200: 9, 500: 33, 1000: 77, 5000: 449, 20011: 1901},
    "95": {129: None, 130: 0, 200: 2, 300: 5, 500: 12, 1000: 33, 2345: 91, 5000: 213, 20011: 927},
    "97": {218: None, 219: 0, 300: 1, 500: 5, 1000: 16, 2345: 50, 5000: 121, 20011: 543},
    "99": {661: None, 662: 0, 1000: 1, 1500: 5, 2345: 11, 5000: 32, 10000: 76, 20011: 166},
    "99.9": {6635: None, 6636: 0, 10000: 1, 20011: 8},
}


@pytest.mark.parametrize("percentile", LOADGEN_DISCARDS)
def test_loadgens_estimate_is_loadgens(percentile: str) -> None:
    for count, discarded in LOADGEN_DISCARDS[percentile].items():
        expected = None if discarded is None else count - discarded
        assert stats.loadgen_rank(percentile, count) == expected, count


def shuffled(count: int) -> list[int]:
    """1 … count in an order that says nothing."""
    return random.Random(count).sample(range(1, count + 1), count)


def test_loadgens_estimate_stands_beside_the_percentile() -> None:
    latency = stats.latency(shuffled(100), percentiles=("90",))
    (ninetieth,) = latency.percentiles
    assert (ninetieth.seconds, ninetieth.loadgen_estimate_seconds) == (90e-9, 98e-9)
    # Too few for LoadGen, and not for exact bounds.
    (told,) = stats.latency(shuffled(50), percentiles=("90",)).percentiles
    assert told.loadgen_estimate_seconds is None


@given(percentiles, st.integers(1, 30_000))
@settings(max_examples=100, deadline=None)
def test_loadgens_estimate_is_never_below_the_percentile(percentile: str, count: int) -> None:
    found = stats.loadgen_rank(percentile, count)
    assert found is None or stats.rank(percentile, count) <= found <= count


def test_percentiles_that_were_asked_for_are_told_once_and_in_order() -> None:
    latency = stats.latency(shuffled(2000), percentiles=("97", "50", "99.5", "50", "99.99"), confidence=0.9)
    assert [each.percentile for each in latency.percentiles] == [50.0, 97.0, 99.5]
    assert latency.confidence == 0.9


# NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2: two-sided 95 % and 99 %.
STUDENT = {1: (12.706, 63.657), 2: (4.303, 9.925), 5: (2.571, 4.032), 10: (2.228, 3.169), 30: (2.042, 2.750)}


@pytest.mark.parametrize("freedom", STUDENT)
def test_student_is_the_tables(freedom: int) -> None:
    for confidence, expected in zip((0.95, 0.99), STUDENT[freedom], strict=True):
        assert stats.student(confidence, freedom) == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("confidence", "freedom", "expected"),
    [(0.95, 9, 2.262157), (0.95, 29, 2.045230), (0.99, 19, 2.860935), (0.999, 29, 3.659405),
     (0.5, 9, 0.702722)],
)  # fmt: skip
def test_student_between_the_columns(confidence: float, freedom: int, expected: float) -> None:
    assert stats.student(confidence, freedom) == pytest.approx(expected, rel=1e-6)


def test_student_without_end_is_the_normal() -> None:
    assert stats.student(0.95) == pytest.approx(1.959964, abs=1e-6)
    assert stats.student(0.99) == pytest.approx(2.575829, abs=1e-6)


def test_samples_that_wander_have_wider_bounds_and_count_for_less() -> None:
    level, samples = 0.0, []
    draw = random.Random(3)
    for _ in range(2000):
        level = 0.9 * level + draw.gauss(0.0, 1.0)
        samples.append(round(1e6 * math.exp(0.02 * level)))
    wandering = stats.latency(samples)
    draw.shuffle(samples)
    calm = stats.latency(samples)
    assert calm.effective_count == calm.count == 2000
    assert wandering.effective_count is not None
    assert 2000 / 40 < wandering.effective_count < 2000 / 8, "its own is 2000 / 13"
    for wide, exact in zip(wandering.percentiles[:2], calm.percentiles, strict=False):
        assert wide.seconds == exact.seconds
        assert wide.low_seconds < exact.low_seconds < exact.high_seconds < wide.high_seconds


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
