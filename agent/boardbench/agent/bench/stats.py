"""Distribution of the counted inferences: percentiles that the sample supports, with exact bounds.

Percentiles of latency are order statistics, never interpolations: the value for p is the smallest
sample that at least p % of the samples do not exceed (nearest rank). Its bounds are the order
statistics X(l) and X(u) for which the binomial distribution puts at most 2.5 % of the probability
on either side, so that they enclose the true percentile with at least 95 % confidence whatever
the distribution of the latency (David & Nagaraja, Order Statistics, 3rd edition, section 7.1).
A percentile for which no such pair exists at this number of samples is not told at all.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import List, Optional, Sequence, Tuple

from boardbench.agent.domain import Latency, Percentile

PERCENTILES = ("50", "90", "95", "99", "99.9")
"""As decimal text, so that 99.9 % of 1000 is 999 exactly."""

TAIL = 0.025
"""Probability left out on either side of the bounds: 95 % two-sided."""


def rank(percentile: str, count: int) -> int:
    """Position from 1 of the smallest of ``count`` samples that at least ``percentile`` % do not exceed."""
    return max(1, math.ceil(Fraction(percentile) / 100 * count))


def bounds(percentile: str, count: int) -> Optional[Tuple[int, int]]:
    """Positions from 1 of the two order statistics that enclose the percentile; None where none do."""
    if count < 1:
        return None
    probability = float(Fraction(percentile) / 100)
    first, weights = _binomial(count, probability)
    # With K the number of samples below the true percentile, X(l) lies above it when K < l and
    # X(u) lies below it when K >= u. Summing from the tails inwards keeps the small terms exact.
    low: Optional[int] = None
    below = 0.0
    for offset, weight in enumerate(weights):
        below += weight
        if below > TAIL:
            break
        low = first + offset + 1
    high: Optional[int] = None
    above = 0.0
    for offset in range(len(weights) - 1, -1, -1):
        above += weights[offset]
        if above > TAIL:
            break
        high = first + offset
    return None if low is None or high is None else (low, high)


def _binomial(count: int, probability: float) -> Tuple[int, List[float]]:
    """The binomial distribution as (smallest K, probabilities of K, K+1, ...), negligible ends left out.

    Ratios of neighbours are taken outwards from the mode and the sum is scaled to 1: no factorial,
    no logarithm, hence no cancellation at a million samples.
    """
    odds = probability / (1.0 - probability)
    mode = min(count, int((count + 1) * probability))
    negligible = 1e-25  # of the mode's weight; all that is cut stays below 1e-18 of the whole
    upward = [1.0]
    k = mode
    while k < count and upward[-1] > negligible:
        upward.append(upward[-1] * (count - k) / (k + 1) * odds)
        k += 1
    downward: List[float] = []
    weight = 1.0
    k = mode
    while k > 0 and weight > negligible:
        weight = weight * k / (count - k + 1) / odds
        downward.append(weight)
        k -= 1
    downward.reverse()
    weights = downward + upward
    whole = math.fsum(weights)
    return mode - len(downward), [weight / whole for weight in weights]


def latency(samples_nanoseconds: Sequence[int]) -> Latency:
    """The distribution of the samples, which are in the order they ran; at least one."""
    count = len(samples_nanoseconds)
    if count == 0:
        raise ValueError("a latency needs at least one sample")
    ordered = sorted(samples_nanoseconds)
    total = sum(ordered)
    percentiles = []
    for percentile in PERCENTILES:
        found = bounds(percentile, count)
        if found is None:
            continue
        low, high = found
        percentiles.append(
            Percentile(
                percentile=float(percentile),
                seconds=ordered[rank(percentile, count) - 1] / 1e9,
                low_seconds=ordered[low - 1] / 1e9,
                high_seconds=ordered[high - 1] / 1e9,
            )
        )
    return Latency(
        count=count,
        mean_seconds=total / count / 1e9,
        min_seconds=ordered[0] / 1e9,
        max_seconds=ordered[-1] / 1e9,
        stdev_seconds=_stdev_nanoseconds(ordered, total) / 1e9 if count > 1 else None,
        percentiles=tuple(percentiles),
        samples_nanoseconds=tuple(samples_nanoseconds),
    )


def _stdev_nanoseconds(samples: Sequence[int], total: int) -> float:
    # In integers: the textbook formula without its cancellation.
    count = len(samples)
    squares = sum(sample * sample for sample in samples)
    return math.sqrt(Fraction(count * squares - total * total, count * (count - 1)))


def median(samples: Sequence[int]) -> int:
    """The 50th percentile by the definition above; at least one sample."""
    return sorted(samples)[rank("50", len(samples)) - 1]


def median_bounds(samples: Sequence[int]) -> Optional[Tuple[int, int]]:
    """Values that enclose the true median with 95 % confidence; None below six samples."""
    found = bounds("50", len(samples))
    if found is None:
        return None
    ordered = sorted(samples)
    return ordered[found[0] - 1], ordered[found[1] - 1]


def midmean(values: Sequence[float]) -> float:
    """Mean of the middle half (the interquartile mean): neither outliers nor coarse clocks show in it."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    middle = ordered[quarter : len(ordered) - quarter]
    return math.fsum(middle) / len(middle)
