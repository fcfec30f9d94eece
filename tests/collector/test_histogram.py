"""Distributions: every sample in its bucket, classic and exponential."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.collector.histogram import BOUNDS_SECONDS, Distribution, distribution, distribution_of
from boardbench.collector.thinning import thinned
from boardbench.v1 import latency_pb2, result_pb2


def buckets(found: Distribution) -> dict[int, int]:
    """Counts by exponential bucket, as a reader of spans and deltas finds them."""
    counts: dict[int, int] = {}
    index, count = 0, 0
    deltas = iter(found.native.deltas)
    for offset, length in found.native.spans:
        index += offset
        for _ in range(length):
            count += next(deltas)
            counts[index] = count
            index += 1
    assert next(deltas, None) is None
    return counts


def test_nothing_and_nonsense_have_no_distribution() -> None:
    assert distribution([]) is None
    assert distribution([5, 0]) is None


def test_bounds_are_the_same_for_everything() -> None:
    assert BOUNDS_SECONDS[0] == 0.0001 and BOUNDS_SECONDS[-1] == 10
    assert list(BOUNDS_SECONDS) == sorted(set(BOUNDS_SECONDS))
    assert 0.002 in BOUNDS_SECONDS and 5.0 in BOUNDS_SECONDS


@given(st.lists(st.integers(1, 10**13), min_size=1, max_size=200))
def test_every_sample_is_in_its_bucket(samples: list[int]) -> None:
    found = distribution(samples)
    assert found is not None
    assert (found.count, found.sum_seconds) == (len(samples), sum(samples) / 1e9)
    expected = tuple(sum(sample / 1e9 <= bound for sample in samples) for bound in BOUNDS_SECONDS)
    assert found.cumulative == expected
    counts = buckets(found)
    assert sum(counts.values()) == len(samples)
    assert all(count > 0 for count in counts.values())
    for index, count in counts.items():
        # A sample on a bound may be on either side of it, as floating point rounds.
        low, high = 2 ** ((index - 1) / 32) * 1e9, 2 ** (index / 32) * 1e9
        inside = sum(low < sample <= high for sample in samples)
        near = sum(min(abs(sample - low), abs(sample - high)) <= 1e-9 * high for sample in samples)
        assert abs(count - inside) <= near


@given(st.lists(st.integers(2 * 10**4, 10**11), min_size=1, max_size=300))
def test_what_retention_keeps_has_the_same_native_histogram(samples: list[int]) -> None:
    whole = result_pb2.RunResult()
    whole.latency.samples_nanoseconds.extend(samples)
    whole.latency.mean_seconds = sum(samples) / len(samples) / 1e9
    kept, _ = thinned(whole)
    assert not kept.latency.samples_nanoseconds
    mine, exact = distribution_of(kept.latency), distribution_of(whole.latency)
    assert mine is not None and exact is not None
    assert mine.count == exact.count
    assert mine.sum_seconds == pytest.approx(exact.sum_seconds)
    assert buckets(mine) == buckets(exact)
    for bound, count in zip(BOUNDS_SECONDS, mine.cumulative, strict=True):
        assert sum(sample / 1e9 <= bound * 0.997 for sample in samples) <= count
        assert count <= sum(sample / 1e9 <= bound * 1.003 for sample in samples)


def test_without_samples_and_histogram_nothing_is_known() -> None:
    assert distribution_of(latency_pb2.Latency(count=10, mean_seconds=1)) is None


@pytest.mark.parametrize(
    ("schema", "steps", "counts", "zero"),
    [
        (7, [1, 2], [3], 0),
        (7, [2**31 - 1], [3], 0),
        (7, [-(2**31)], [3], 0),
        (7, [2**30, 2**30, 2**30, 2**30], [1, 1, 1, 1], 0),
        (2**31 - 1, [1], [3], 0),
        (-4, [1], [3], 0),
        (7, [1], [3], 5),
        (7, [], [], 0),
    ],
)
def test_a_histogram_that_somebody_made_up_is_none(
    schema: int, steps: list[int], counts: list[int], zero: int
) -> None:
    made_up = latency_pb2.Latency(count=3)
    made_up.histogram.schema, made_up.histogram.zero_count = schema, zero
    made_up.histogram.index_steps.extend(steps)
    made_up.histogram.counts.extend(counts)
    assert distribution_of(made_up) is None


def test_a_stall_far_from_the_rest_costs_two_buckets() -> None:
    found = distribution([1_000_000] * 99 + [10**13])
    assert found is not None
    assert len(found.native.deltas) == 2
    assert sorted(buckets(found).values()) == [1, 99]
    assert math.isclose(found.sum_seconds, 10_000.099)
