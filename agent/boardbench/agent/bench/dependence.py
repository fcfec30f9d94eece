"""How far neighbouring inferences resemble each other, and what that leaves of the sample's size.

Bounds of a percentile are exact for independent samples. Those of a real board are not: a clock that
wanders, a neighbour that wakes up, or a cache that was evicted makes runs of slow and of fast inferences,
and the same number of samples then says less. What matters for the percentile q is how the number of
samples above q varies from one stretch of the run to the next: for independent samples the variance of that
count over stretches of b inferences is b r (1 - r), r being the share above q. The quotient of the two is the
factor by which the variance of the percentile's rank is larger (the "integrated autocorrelation time" of the
indicator), and the count divided by it the effective number of samples. It is estimated with batch means
(Flyvbjerg & Petersen, J. Chem. Phys. 91, 461, 1989; Alexopoulos & Seila, Handbook of Simulation, 1998,
section 7.2): stretches of every length that is a power of two and of which there are at least 16, the
largest quotient counting, so that short and long memory both show. Nothing but order is used of the
latencies, so heavy tails do no harm.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from operator import mul
from typing import Dict, List, Mapping, Sequence, Tuple

LEAST_SAMPLES = 32
"""Below it there are not two stretches of two in each of eight places: nothing can be told."""

LEAST_STRETCHES = 16
"""A variance from 16 stretches is right to 35 %; fewer would let chance widen the bounds at will."""

NEIGHBOURS = 2.9
"""Standard errors of the neighbours' rank correlation taken for real: 0.2 % of independent runs."""

STRETCHES = 3.9
"""The same for the variance over stretches, of which some ten lengths are tried for each percentile."""

GROWING = 1.5
"""Standard errors by which the factor must grow over the last two doublings to be taken for too small."""

UNSETTLED = 2.5
"""The same for saying that there is no end to it in sight."""

ENOUGH = 30
"""Samples beyond a percentile from which on its own factor counts alone."""

_COARSE = 8  # beyond _MANY samples the shortest stretch: the shorter ones add cost and no certainty
_MANY = 8192
_SCORES = 64  # quantile classes that stand for ranks: 99.9 % of the ranks' efficiency without a second sort


@dataclass(frozen=True)
class Dependence:
    """What the order of the samples says about their number.

    ``factors`` has one entry a percentile: the variance of its rank over that of independent samples,
    never below 1, and 1 for all unless ``found``. ``settled`` is False when it still grew with the longest
    stretches, so that the run is too short for what wanders in it.
    """

    count: int
    found: bool
    settled: bool
    neighbours: float
    factors: Mapping[str, float]
    sentence: str = ""

    def effective_count(self, percentile: str) -> float:
        """Number of independent samples that would say as much about the percentile."""
        return self.count / self.factors.get(percentile, 1.0)


def look(
    samples: Sequence[int],
    thresholds: Mapping[str, int],
    cuts: Sequence[int],
    *,
    doubt: float = 1.0,
) -> Dependence:
    """The dependence of samples in the order they ran.

    ``thresholds`` are the values of the percentiles in question, ``cuts`` quantiles of the same samples in
    rising order (:func:`cuts`). ``doubt`` below 1 lowers what is taken for real in proportion: for a
    decision that had better err on the side of more samples.
    """
    count = len(samples)
    if count < LEAST_SAMPLES:
        return Dependence(count, False, True, 0.0, dict.fromkeys(thresholds, 1.0))
    correlation = _neighbours(samples, cuts)
    found = (correlation + 1.0 / count) * math.sqrt(count) > NEIGHBOURS * doubt
    settled = True
    factors: Dict[str, float] = {}
    inner = 1.0
    for percentile in sorted(thresholds, key=lambda each: abs(float(each) - 50.0)):
        quotients, rarer = _quotients(samples, thresholds[percentile])
        found = found or any(each.deviates > STRETCHES * doubt for each in quotients)
        own = max([1.0, *(each.cautious for each in quotients)])
        # Of a tail with a handful of samples nothing is known; it is taken to be as the percentile before it.
        known = min(1.0, rarer / ENOUGH)
        inner = factors[percentile] = known * own + (1.0 - known) * max(own, inner)
        if quotients and _grows(quotients, GROWING):
            settled = settled and not _grows(quotients, UNSETTLED)
            # The stretches are too short for what they measure. What neighbours alone say, if their
            # likeness faded away at a constant rate (a first-order autoregression), is the least there is.
            factors[percentile] = max(factors[percentile], (1.0 + correlation) / (1.0 - correlation))
    if not found:
        return Dependence(count, False, True, correlation, dict.fromkeys(factors, 1.0))
    return Dependence(count, True, settled, correlation, factors, _words(count, settled, factors))


def _words(count: int, settled: bool, factors: Mapping[str, float]) -> str:
    percentile = "50" if factors.get("50", 0.0) > 1.0 else max(factors, key=lambda each: factors[each])
    factor = factors[percentile]
    which = "the median" if percentile == "50" else f"p{percentile}"
    words = (
        f"neighbouring inferences resemble each other: {count} say as much about {which} as "
        f"{count / factor:.0f} independent ones, which makes its bounds {math.sqrt(factor):.1f} times as wide"
    )
    if not settled:
        words += "; it wandered over the whole run, so other runs may differ by more than the bounds say"
    return words


def _grows(quotients: Sequence[_Quotient], errors: float) -> bool:
    """Whether the factor still grew with the longest stretches, by so many errors and a third at least."""
    last = quotients[-1]
    before = max(1.0, quotients[-3].quotient) if len(quotients) > 2 else 1.0
    # Of a variance from m stretches, 2 / m; those before are four times as many.
    error = math.sqrt(2.5 / last.stretches)
    return last.quotient > before * max(4.0 / 3.0, 1.0 + errors * error)


def cuts(ordered: Sequence[int]) -> Tuple[int, ...]:
    """Quantiles that divide sorted samples into classes of equal size."""
    count = len(ordered)
    classes = min(_SCORES, count)
    return tuple(ordered[count * place // classes] for place in range(1, classes))


def _neighbours(samples: Sequence[int], cuts: Sequence[int]) -> float:
    """Rank correlation of each sample with the next."""
    scores = [bisect_left(cuts, sample) for sample in samples]
    count = len(scores)
    mean = sum(scores) / count
    spread = sum(map(mul, scores, scores)) - count * mean * mean
    if spread <= 0:
        return 0.0
    products = sum(map(mul, scores, scores[1:]))
    both = 2 * sum(scores) - scores[0] - scores[-1]
    return float((products - mean * both + (count - 1) * mean * mean) / spread)


@dataclass(frozen=True)
class _Quotient:
    quotient: float
    deviates: float
    stretches: int

    @property
    def cautious(self) -> float:
        # The variance is itself an estimate: Student's t instead of the normal, squared, at 95 %.
        return self.quotient * (1.0 + 2.42 / (self.stretches - 1))


def _quotients(samples: Sequence[int], threshold: int) -> Tuple[List[_Quotient], int]:
    """Variance of the counts above the threshold over that of independent samples, by length of stretch.

    And the number of samples on the rarer side.
    """
    above = bytes(map(threshold.__lt__, samples))
    total = sum(above)
    count = len(above)
    if total == 0:
        # Ties with the greatest: the samples below it tell as much.
        above = bytes(map(threshold.__le__, samples))
        total = sum(above)
    share = total / count
    if share in (0.0, 1.0):
        return [], 0
    rarer = min(total, count - total)
    one = share * (1.0 - share)
    if count > _MANY:
        length = _COARSE
        counts = [above.count(1, begin, begin + length) for begin in range(0, count - length + 1, length)]
    else:
        length, counts = 1, list(above)
    found = []
    while True:
        if length > 1:
            found.append(_quotient(counts, length, one))
        if len(counts) < 2 * LEAST_STRETCHES:
            return found, rarer
        counts = [first + second for first, second in zip(counts[::2], counts[1::2])]
        length *= 2


def _quotient(counts: Sequence[int], length: int, one: float) -> _Quotient:
    stretches = len(counts)
    whole = sum(counts)
    expected = length * one
    variance = (sum(map(mul, counts, counts)) - whole * whole / stretches) / (stretches - 1)
    quotient = variance / expected
    # For independent samples the counts are binomial; the variance of their variance has the fourth
    # moment in it, which is large where few samples are above. A chi-square of the same mean and variance
    # stands for its distribution, and Wilson & Hilferty's cube root makes that normal.
    freedom = 2.0 * stretches / (2.0 + (1.0 - 6.0 * one) / expected)
    spread = 2.0 / (9.0 * freedom)
    deviates = (quotient ** (1.0 / 3.0) - (1.0 - spread)) / math.sqrt(spread)
    return _Quotient(quotient, deviates, stretches)
