"""The latency of several processes taken together, with bounds that hold for processes not yet started.

Latency differs from process to process by the luck of addresses and allocations. The percentile of the pooled
samples is that of an inference in a process drawn at random, and what is uncertain about it is how many of
the processes are slow more than how many of the inferences: a process is a stretch of inferences that
resemble each other. So the variance of the pooled percentile's rank is taken from the counts above it in
each process, as it is from stretches in :mod:`boardbench.agent.bench.dependence` (in sampling theory the
ratio estimator for clusters: Cochran, Sampling Techniques, 3rd edition, section 6.3), with Student's t for
being few. The bounds are the order statistics of as many independent samples as that leaves, and of as many
as there are processes at least: nothing varies more than if all inferences of a process were one.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from fractions import Fraction
from typing import Dict, List, Sequence

from boardbench.agent.bench import stats
from boardbench.agent.domain import Latency


def latency(
    processes: Sequence[Sequence[int]],
    *,
    confidence: float = stats.CONFIDENCE,
    percentiles: Sequence[str] = stats.PERCENTILES,
) -> Latency:
    """The distribution of all samples, process after process in the order they ran; at least one sample.

    Of a single process it is that process's own.
    """
    filled = [samples for samples in processes if len(samples)]
    if len(filled) < 2:
        own: Sequence[int] = filled[0] if filled else ()
        return stats.latency(own, confidence=confidence, percentiles=percentiles)
    pooled: List[int] = [sample for samples in filled for sample in samples]
    told = sorted({"50", *percentiles}, key=Fraction)
    return stats.latency(
        pooled,
        confidence=confidence,
        percentiles=percentiles,
        effective_counts=effective_counts(filled, told, confidence),
    )


def effective_counts(
    processes: Sequence[Sequence[int]], percentiles: Sequence[str], confidence: float = stats.CONFIDENCE
) -> Dict[str, float]:
    """Number of independent samples that say as much about each percentile of the pool.

    Of two processes at least, each with one sample at least.
    """
    sorted_each = [sorted(samples) for samples in processes]
    pooled = sorted(sample for samples in sorted_each for sample in samples)
    count = len(pooled)
    # The order of samples tells within a process, and nothing between two.
    within = [
        stats.depends(samples, ordered, percentiles) for samples, ordered in zip(processes, sorted_each)
    ]
    few = (stats.student(confidence, len(processes) - 1) / stats.student(confidence)) ** 2
    found = {}
    for percentile in percentiles:
        threshold = pooled[stats.rank(percentile, count) - 1]
        own = math.fsum(each.factors[percentile] * each.count for each in within) / count
        factor = max(own, few * _between(sorted_each, threshold))
        found[percentile] = max(float(len(processes)), count / factor)
    return found


def _between(sorted_each: Sequence[Sequence[int]], threshold: int) -> float:
    """Variance of the share above the threshold, by the processes, over that of independent samples."""
    counts = [len(ordered) for ordered in sorted_each]
    above = [len(ordered) - bisect_right(ordered, threshold) for ordered in sorted_each]
    if not any(above):
        # Ties with the greatest: the samples below it tell as much.
        above = [len(ordered) - bisect_left(ordered, threshold) for ordered in sorted_each]
    share = sum(above) / sum(counts)
    if share == 1.0:
        return 0.0
    squares = math.fsum((each - share * count) ** 2 for each, count in zip(above, counts))
    variance = squares * len(counts) / (len(counts) - 1)
    return variance / (sum(counts) * share * (1.0 - share))
