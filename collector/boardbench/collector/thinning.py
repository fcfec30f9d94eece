"""What stays of a result when it is old: everything but the single samples, whose distribution is kept.

The percentiles in the record stay as they were computed from the samples. The histogram answers what is
asked later: any other percentile is right to 0.27 %, and histograms of many runs are merged by adding up.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from boardbench.collector.store import split
from boardbench.v1 import latency_pb2, result_pb2

SCHEMA = 7
"""128 buckets a doubling, each 0.54 % wide: half of that is the error of a percentile. 100,000 samples over
two decades take about 2 kB, and 8 would take twice that."""

_STEPS = 1 << SCHEMA
_NANOSECONDS = 1e9

DROPPED = (
    "latency.samples_nanoseconds",
    "warm_up.samples_nanoseconds",
    "scenario.service.samples_nanoseconds",
    "interference.alone.samples_nanoseconds",
    "telemetry.series",
)
"""The lists that go. Which op ran where stays: it is what a placement that drifted is compared with."""

Record = tuple[bytes, bytes]
"""A result as ``store.split`` divides it."""


def histogram(samples_nanoseconds: Sequence[int]) -> latency_pb2.LatencyHistogram:
    """Returns how often the samples took how long."""
    counts: Counter[int] = Counter()
    zero = 0
    for nanoseconds, count in Counter(samples_nanoseconds).items():
        if nanoseconds:
            counts[bucket_of(nanoseconds / _NANOSECONDS)] += count
        else:
            zero += count
    return _of_counts(counts, zero)


def bucket_of(seconds: float) -> int:
    """Returns the index of the bucket that a duration above 0 is in."""
    return math.ceil(math.log2(seconds) * _STEPS)


def merged(histograms: Iterable[latency_pb2.LatencyHistogram]) -> latency_pb2.LatencyHistogram:
    """Returns the histogram of all their samples together, exactly; ValueError when a schema is another."""
    counts: Counter[int] = Counter()
    zero = 0
    for each in histograms:
        if each.schema != SCHEMA:
            raise ValueError(f"a histogram of schema {each.schema} can't be added to those of {SCHEMA}")
        counts.update(dict(_buckets(each)))
        zero += each.zero_count
    return _of_counts(counts, zero)


def total(counted: latency_pb2.LatencyHistogram) -> int:
    """Returns the number of samples."""
    return counted.zero_count + sum(counted.counts)


def quantile(counted: latency_pb2.LatencyHistogram, percentile: float) -> float:
    """Returns the duration in seconds that at least that percentage of the samples do not exceed.

    The middle of its bucket, by ratio. ValueError when there are no samples.
    """
    everything = total(counted)
    if not everything:
        raise ValueError("a histogram without samples has no percentiles")
    # Rounded before it is rounded up: 99.9 % of 1,000 are 999, and not 999.0000000000001.
    rank = max(1, math.ceil(round(everything * percentile / 100, 9)))
    below = counted.zero_count
    if rank <= below:
        return 0.0
    for index, count in _buckets(counted):
        below += count
        if rank <= below:
            return float(2.0 ** ((index - 0.5) / 2**counted.schema))
    raise ValueError(f"there is no percentile {percentile:g}")


def _buckets(counted: latency_pb2.LatencyHistogram) -> Iterable[tuple[int, int]]:
    index = 0
    for step, count in zip(counted.index_steps, counted.counts, strict=True):
        index += step
        yield index, count


def _of_counts(counts: Counter[int], zero: int) -> latency_pb2.LatencyHistogram:
    found = latency_pb2.LatencyHistogram(schema=SCHEMA, zero_count=zero)
    before = 0
    for index in sorted(counts):
        found.index_steps.append(index - before)
        found.counts.append(counts[index])
        before = index
    return found


def thinned(result: result_pb2.RunResult) -> tuple[result_pb2.RunResult, int]:
    """Returns the result without single samples, and how many those were; the same one when it has none."""
    dropped = 0
    thin = result_pb2.RunResult()
    thin.CopyFrom(result)
    for has, latency in (
        (thin.HasField("latency"), thin.latency),
        (thin.scenario.HasField("service"), thin.scenario.service),
        (thin.interference.HasField("alone"), thin.interference.alone),
    ):
        if has and latency.samples_nanoseconds:
            dropped += len(latency.samples_nanoseconds)
            if not latency.HasField("histogram"):
                latency.histogram.CopyFrom(histogram(latency.samples_nanoseconds))
            del latency.samples_nanoseconds[:]
    if thin.HasField("warm_up"):
        dropped += len(thin.warm_up.samples_nanoseconds)
        del thin.warm_up.samples_nanoseconds[:]
    if thin.HasField("telemetry"):
        dropped += sum(len(series.values) for series in thin.telemetry.series)
        del thin.telemetry.series[:]
    return (thin, dropped) if dropped else (result, 0)


def thinned_record(record: Record) -> tuple[Record, int]:
    """Returns the stored record without single samples, and how many those were."""
    result, dropped = thinned(result_pb2.RunResult.FromString(record[0] + record[1]))
    return (split(result) if dropped else record), dropped


def is_same(stored: Record, sent: Record) -> bool:
    """Whether the stored record is the one that was sent, also when its samples were dropped since.

    Fields may be written in another order than before: by another version of the agent, or by a restore.
    """
    if stored == sent:
        return True
    there, result = (result_pb2.RunResult.FromString(head + tail) for head, tail in (stored, sent))
    return split(there) in (split(result), split(thinned(result)[0]))
