"""Distribution of the counted inferences: percentiles that the sample supports, with exact bounds.

Percentiles of latency are order statistics, never interpolations: the value for p is the smallest
sample that at least p % of the samples do not exceed (nearest rank). Its bounds are the order
statistics X(l) and X(u) for which the binomial distribution puts at most half of what the confidence
leaves on either side (2.5 % at 95 %), so that they enclose the true percentile with at least that
confidence whatever the distribution of the latency (David & Nagaraja, Order Statistics, 3rd edition,
section 7.1). A percentile for which no such pair exists at this number of samples is not told at all.

That holds for independent samples. Where :mod:`boardbench.agent.bench.dependence` finds that neighbours
resemble each other the bounds are those of the effective number of samples; where it finds nothing they
are the exact ones, no wider.

Beside each percentile stands what MLPerf LoadGen would report for it, by its early stopping rule.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import List, Mapping, Optional, Sequence, Tuple

from boardbench.agent.bench import dependence
from boardbench.agent.domain import Latency, Percentile

PERCENTILES = ("50", "90", "95", "99", "99.9")
"""As decimal text, so that 99.9 % of 1000 is 999 exactly."""

CONFIDENCE = 0.95
"""Of all bounds, two-sided, unless another is asked for."""

LOADGEN_CONFIDENCE = 0.99
"""Fixed in LoadGen (mlcommons/inference, loadgen/results.cc: ``confidence = 0.99``, ``tolerance = 0``)."""


def text(percentile: float) -> str:
    """The percentile as decimal text, as the functions here take it: 99.9 is "99.9"."""
    return format(percentile, ".10g")


def rank(percentile: str, count: int) -> int:
    """Position from 1 of the smallest of ``count`` samples that at least ``percentile`` % do not exceed."""
    return max(1, math.ceil(Fraction(percentile) / 100 * count))


def bounds(
    percentile: str,
    count: int,
    confidence: float = CONFIDENCE,
    *,
    effective_count: Optional[float] = None,
) -> Optional[Tuple[int, int]]:
    """Positions from 1 of the two order statistics that enclose the percentile; None where none do.

    With an ``effective_count`` below the count they are those of so many independent samples.
    """
    independent = count if effective_count is None else min(count, int(effective_count))
    if independent < 1:
        return None
    tail = float((1 - Fraction(repr(confidence))) / 2)
    probability = float(Fraction(percentile) / 100)
    first, weights = _binomial(independent, probability)
    # With K the number of samples below the true percentile, X(l) lies above it when K < l and
    # X(u) lies below it when K >= u. Summing from the tails inwards keeps the small terms exact.
    low: Optional[int] = None
    below = 0.0
    for offset, weight in enumerate(weights):
        below += weight
        if below > tail:
            break
        low = first + offset + 1
    high: Optional[int] = None
    above = 0.0
    for offset in range(len(weights) - 1, -1, -1):
        above += weights[offset]
        if above > tail:
            break
        high = first + offset
    if low is None or high is None:
        return None
    # The same quantiles of the sample: outwards, so that rounding never narrows.
    return (low - 1) * count // independent + 1, -(-high * count // independent)


def least_count(percentile: str, confidence: float = CONFIDENCE) -> int:
    """The smallest number of independent samples that supports the percentile."""
    # Both extremes must leave out at most the tail: p^n and (1 - p)^n, of which the greater decides.
    probability = float(Fraction(percentile) / 100)
    tail = float((1 - Fraction(repr(confidence))) / 2)
    count = max(1, math.ceil(math.log(tail) / math.log(max(probability, 1.0 - probability))) - 1)
    while bounds(percentile, count, confidence) is None:
        count += 1
    return count


def loadgen_rank(percentile: str, count: int) -> Optional[int]:
    """Position from 1 of the sample that LoadGen's early stopping reports; None where it needs more.

    The largest t is sought for which t or fewer of the samples lie above the percentile with a probability
    below 1 %; the t-th greatest sample is the estimate, and t must be 1 at least (mlcommons/inference,
    loadgen/early_stopping.cc and results.cc, SingleStream). It is an upper bound at 99 % confidence, and
    so never below the percentile itself.
    """
    if count < 1:
        return None
    first, weights = _binomial(count, 1.0 - float(Fraction(percentile) / 100))
    at_most = 0.0
    discarded = first - 1
    for offset, weight in enumerate(weights):
        at_most += weight
        if at_most >= 1.0 - LOADGEN_CONFIDENCE:
            break
        discarded = first + offset
    return count - discarded + 1 if discarded >= 1 else None


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


def student(confidence: float, freedom: Optional[int] = None) -> float:
    """The quantile of Student's t that bounds the confidence on both sides; of the normal without freedom."""
    low, high = 0.0, 2.0
    while _within(high, freedom) < confidence:
        high *= 2.0
    while high - low > 1e-9 * high:
        middle = (low + high) / 2.0
        if _within(middle, freedom) < confidence:
            low = middle
        else:
            high = middle
    return high


def _within(t: float, freedom: Optional[int]) -> float:
    """Probability between -t and t (Abramowitz & Stegun, 26.7.3 and 26.7.4)."""
    if freedom is None:
        return math.erf(t / math.sqrt(2.0))
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2 == 1
    cosine, total = math.cos(angle), 0.0
    term = cosine if odd else 1.0
    for k in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= (k + 1) / (k + 2) * cosine * cosine
    share = math.sin(angle) * total
    return 2.0 / math.pi * (angle + share) if odd else share


def depends(
    samples: Sequence[int],
    ordered: Sequence[int],
    percentiles: Sequence[str] = PERCENTILES,
    *,
    doubt: float = 1.0,
) -> dependence.Dependence:
    """The dependence among samples in the order they ran, ``ordered`` being the same ones sorted."""
    thresholds = {each: ordered[rank(each, len(ordered)) - 1] for each in percentiles}
    return dependence.look(samples, thresholds, dependence.cuts(ordered), doubt=doubt)


def latency(
    samples_nanoseconds: Sequence[int],
    *,
    confidence: float = CONFIDENCE,
    percentiles: Sequence[str] = PERCENTILES,
    effective_counts: Optional[Mapping[str, float]] = None,
) -> Latency:
    """The distribution of the samples, which are in the order they ran; at least one.

    ``effective_counts``, by percentile and the 50th among them, takes the place of what their order says.
    """
    count = len(samples_nanoseconds)
    if count == 0:
        raise ValueError("a latency needs at least one sample")
    ordered = sorted(samples_nanoseconds)
    total = sum(ordered)
    told = sorted({*percentiles}, key=Fraction)
    supported = [each for each in told if bounds(each, count, confidence) is not None]
    if effective_counts is None:
        # The middle is needed for the effective number, supported or not.
        found = depends(samples_nanoseconds, ordered, sorted({"50", *supported}, key=Fraction))
        effective_counts = {each: found.effective_count(each) for each in found.factors}
    figures = []
    for percentile in supported:
        positions = bounds(percentile, count, confidence, effective_count=effective_counts[percentile])
        if positions is None:
            continue
        low, high = positions
        estimate = loadgen_rank(percentile, count)
        figures.append(
            Percentile(
                percentile=float(percentile),
                seconds=ordered[rank(percentile, count) - 1] / 1e9,
                low_seconds=ordered[low - 1] / 1e9,
                high_seconds=ordered[high - 1] / 1e9,
                loadgen_estimate_seconds=None if estimate is None else ordered[estimate - 1] / 1e9,
            )
        )
    return Latency(
        count=count,
        mean_seconds=total / count / 1e9,
        min_seconds=ordered[0] / 1e9,
        max_seconds=ordered[-1] / 1e9,
        stdev_seconds=_stdev_nanoseconds(ordered, total) / 1e9 if count > 1 else None,
        percentiles=tuple(figures),
        samples_nanoseconds=tuple(samples_nanoseconds),
        confidence=confidence,
        effective_count=effective_counts["50"] if count >= dependence.LEAST_SAMPLES else None,
    )


def _stdev_nanoseconds(samples: Sequence[int], total: int) -> float:
    # In integers: the textbook formula without its cancellation.
    count = len(samples)
    squares = sum(sample * sample for sample in samples)
    return math.sqrt(Fraction(count * squares - total * total, count * (count - 1)))


def median(samples: Sequence[int]) -> int:
    """The 50th percentile by the definition above; at least one sample."""
    return sorted(samples)[rank("50", len(samples)) - 1]


def median_bounds(samples: Sequence[int], confidence: float = CONFIDENCE) -> Optional[Tuple[int, int]]:
    """Values that enclose the true median if the samples are independent; None below six at 95 %."""
    found = bounds("50", len(samples), confidence)
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
