"""Distributions of latencies, as Prometheus takes them: classic buckets and native (exponential) ones."""

from __future__ import annotations

import functools
import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from boardbench.v1 import latency_pb2

SCHEMA = 5
"""Each bucket is 2^(1/32) = 2.2 % wider than the one before: a percentile is right to that."""

BOUNDS_SECONDS = (
    *(float(f"{digit}e{exponent}") for exponent in range(-4, 1) for digit in (1, 2, 5)),
    10.0,
)
"""Upper bounds of the classic buckets. The same for every model, so that they can be added up; a series each,
so few. Below 0.1 ms a call costs more than the model, and beyond 10 s nobody looks at a distribution."""

_STEPS = 1 << SCHEMA
_FINEST = 8
"""Prometheus knows no finer schema."""
_MOST_DOUBLINGS = 64
_NANOSECONDS = 1e9


@dataclass(frozen=True)
class Native:
    """Counts by exponential bucket: bucket i holds what is in (2^((i-1)/32), 2^(i/32)] seconds.

    https://prometheus.io/docs/specs/native_histograms/
    """

    spans: tuple[tuple[int, int], ...]
    """(distance from the end of the span before, length); the first distance is from bucket 0."""
    deltas: tuple[int, ...]
    """Count of each bucket in the spans less that of the one before."""


@dataclass(frozen=True)
class Distribution:
    """How often each latency was measured."""

    count: int
    sum_seconds: float
    cumulative: tuple[int, ...]
    """Number of samples up to each of BOUNDS_SECONDS."""
    native: Native


def distribution(samples_nanoseconds: Sequence[int]) -> Distribution | None:
    """Returns the distribution of the samples; None when there are none, or one is no duration."""
    ordered = sorted(samples_nanoseconds)
    if not ordered or ordered[0] <= 0:
        return None
    return Distribution(
        count=len(ordered),
        sum_seconds=sum(ordered) / _NANOSECONDS,
        cumulative=tuple(bisect_right(ordered, bound * _NANOSECONDS) for bound in BOUNDS_SECONDS),
        native=_native(ordered),
    )


def distribution_of(latency: latency_pb2.Latency) -> Distribution | None:
    """Returns the distribution of the counted inferences; None when nothing is kept of them.

    Of single samples that retention has dropped the histogram was kept. Its buckets are finer: native ones
    are made of them exactly, and classic ones but for what lies within 0.3 % of their bounds.
    """
    if latency.samples_nanoseconds:
        return distribution(latency.samples_nanoseconds)
    kept = latency.histogram
    if not SCHEMA <= kept.schema <= _FINEST or not kept.counts or kept.zero_count:
        return None
    if len(kept.index_steps) != len(kept.counts) or max(map(abs, itertools.accumulate(kept.index_steps))) > (
        _MOST_DOUBLINGS << kept.schema
    ):
        # Made by somebody else: no duration is longer than centuries, or shorter than a beat of light.
        return None
    finer = 1 << (kept.schema - SCHEMA)
    counts: dict[int, int] = {}
    cumulative = [0] * len(BOUNDS_SECONDS)
    steps = finer * _STEPS
    index = 0
    for step, count in zip(kept.index_steps, kept.counts, strict=True):
        index += step
        # Rounded up: bucket i holds what is at most 2^(i/steps).
        wider = -(-index // finer)
        counts[wider] = counts.get(wider, 0) + count
        at = bisect_left(BOUNDS_SECONDS, float(2.0 ** ((index - 0.5) / steps)))
        if at < len(cumulative):
            cumulative[at] += count
    total = sum(counts.values())
    return Distribution(
        count=total,
        sum_seconds=latency.mean_seconds * total,
        cumulative=tuple(itertools.accumulate(cumulative)),
        native=_packed(counts.items()),
    )


def _native(ordered: Sequence[int]) -> Native:
    counts: list[tuple[int, int]] = []
    index, at = _bucket(ordered[0]), 0
    while at < len(ordered):
        below = bisect_right(ordered, _bound_nanoseconds(index), at)
        if below > at:
            counts.append((index, below - at))
            at = below
            index += 1
        else:
            # What comes next may be far away: a stall is thousands of buckets behind the median.
            index = max(index + 1, _bucket(ordered[at]))
    return _packed(counts)


def _packed(counts: Iterable[tuple[int, int]]) -> Native:
    """Returns these (bucket, count), in the order of the buckets, as spans and deltas."""
    spans: list[list[int]] = []
    deltas: list[int] = []
    before, end = 0, 0
    for index, count in counts:
        if spans and index == end:
            spans[-1][1] += 1
        else:
            spans.append([index - end, 1])
        deltas.append(count - before)
        before, end = count, index + 1
    return Native(tuple((offset, length) for offset, length in spans), tuple(deltas))


def _bucket(nanoseconds: int) -> int:
    """Returns a bucket that the value is in, or the one before where rounding makes it uncertain."""
    return math.ceil(math.log2(nanoseconds / _NANOSECONDS) * _STEPS - 1e-9)


@functools.lru_cache(maxsize=4096)
def _bound_nanoseconds(index: int) -> float:
    return float(2.0 ** (index / _STEPS)) * _NANOSECONDS
