"""What stays of old results: how far off its percentiles are, and that histograms add up."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.collector.store import split
from boardbench.collector.thinning import bucket_of, histogram, is_same, merged, quantile, thinned, total
from boardbench.v1 import latency_pb2, result_pb2

SHAPES: dict[str, Callable[[random.Random], float]] = {
    "steady": lambda chance: chance.gauss(12.5e6, 0.1e6),
    "two modes": lambda chance: chance.gauss(3e6 if chance.random() < 0.9 else 41e6, 0.2e6),
    "long tail": lambda chance: 2e6 * chance.paretovariate(1.5),
    "log-normal": lambda chance: chance.lognormvariate(math.log(250e3), 0.6),
    "stalls": lambda chance: 1e6 if chance.random() < 0.995 else chance.uniform(1e8, 9e9),
}


def exact(samples: list[int], percentile: float) -> float:
    """The smallest sample that at least that share does not exceed, in seconds."""
    ordered = sorted(samples)
    return ordered[max(1, math.ceil(round(len(ordered) * percentile / 100, 9))) - 1] / 1e9


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("count", [1000, 100_000])
def test_a_percentile_of_the_histogram_is_right_to_0_3_percent(shape: str, count: int) -> None:
    chance = random.Random(7)
    samples = [max(1, int(SHAPES[shape](chance))) for _ in range(count)]
    kept = histogram(samples)
    for percentile in (0.1, 1, 50, 90, 99, 99.9, 100):
        error = abs(quantile(kept, percentile) / exact(samples, percentile) - 1)
        assert error <= 0.003, f"p{percentile:g}: {error:.3%}"
    assert total(kept) == count
    assert kept.ByteSize() <= 3300


@given(st.lists(st.integers(1, 2**62), min_size=1, max_size=300), st.floats(0.1, 100))
def test_it_is_for_any_samples_and_any_percentile(samples: list[int], percentile: float) -> None:
    # Half a bucket, and the rounding of 2^x at the edge of one.
    assert abs(quantile(histogram(samples), percentile) / exact(samples, percentile) - 1) <= 0.0028


@given(st.lists(st.lists(st.integers(0, 10**10), max_size=100), max_size=6))
def test_merging_is_as_if_the_samples_had_been_together(parts: list[list[int]]) -> None:
    together = histogram([sample for part in parts for sample in part])
    assert merged(map(histogram, parts)) == together


def test_other_schemas_are_not_added_up() -> None:
    with pytest.raises(ValueError, match="schema 5"):
        merged([histogram([1]), latency_pb2.LatencyHistogram(schema=5)])


def test_a_bucket_has_its_upper_bound_in_it() -> None:
    assert [bucket_of(seconds) for seconds in (1.0, 1.0001, 2.0, 0.5)] == [0, 1, 128, -128]


def test_no_time_and_no_samples() -> None:
    kept = histogram([0, 0, 0, 1000])
    assert (kept.zero_count, quantile(kept, 50), quantile(kept, 99)) == (
        3,
        0.0,
        pytest.approx(1e-6, rel=0.003),
    )
    with pytest.raises(ValueError, match="without samples"):
        quantile(histogram([]), 50)


def test_what_has_no_samples_stays_as_it_is(make_result: Callable[..., result_pb2.RunResult]) -> None:
    failed = make_result(status=result_pb2.RUN_STATUS_FAILED)
    assert thinned(failed) == (failed, 0)
    assert thinned(failed)[0] is failed
    once, dropped = thinned(make_result())
    assert dropped == 100
    assert thinned(once) == (once, 0)


def test_the_same_record_is_known_whole_and_thin(make_result: Callable[..., result_pb2.RunResult]) -> None:
    whole, other = split(make_result()), split(make_result(p50=0.5))
    thin = split(thinned(make_result())[0])
    assert is_same(whole, whole) and is_same(thin, whole)
    assert not is_same(other, whole) and not is_same(whole, other)
