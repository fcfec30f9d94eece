"""What fallback costs: the time of an inference that passes in operations that are not where they belong.

The profiled inferences are others than the counted ones, and the board may have been busier in one pass than
in the other. What other work takes away can be told: the kernel says for how long the thread was ready to run
and had no processor. What is left of a duration, its *own* time, is the same on a busy board and on an idle
one. There are these ways to carry over what was seen:

- by *rest*: the accelerator needs as long of its own in a counted inference as in a profiled one, and
  fallback is what is left. Right where the accelerator is hardware of its own, which other work on the
  processor does not disturb;
- by *share*: the share of a profiled inference is the share of a counted one. Right where whatever slowed
  the board down slowed everything;
- as *seen*: fallback took as long in the counted inferences as in the profiled ones; its own time was longer
  as the processor time of all of an inference was.

The first is told for an accelerator of its own whose parts were timed by themselves, else the second.

On a busy board the accelerator's result waits for a processor, too, and that is no cost of fallback. How
long can't be seen in a counted inference. Where those took as long as the profiled ones, it is taken to be
the same as there, and at most what they took longer than they would have by themselves; where they did not,
it is left out.

The bounds are the hull of those of several ways: of share and seen; or of rest, with and without that wait,
and fallback's own time, as it took no less than that. So they are narrow where other work had no part in the
counted inferences, and wide where it had. Those of each way are order statistics of the profiled inferences,
between which the median of as many inferences as were counted lies with at least 95 % probability, whatever
the distribution: of n further values the j-th has a number of the profiled ones below it that is distributed
as a negative hypergeometric variable (David & Nagaraja, Order Statistics, 3rd edition, section 7.3, on
prediction intervals). Where there are too few for that, they are the smallest and the largest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Callable, List, Optional, Sequence, Tuple

from boardbench.agent.bench import stats
from boardbench.agent.domain import FallbackCost

LEAST_INFERENCES = 6
"""Below it the median of a sample has no bounds at 95 %, however many inferences were counted."""

UNCERTAIN = 0.10
"""Of the cost, or of the latency without it: with bounds further away than this it is called uncertain."""

NEGLIGIBLE = 0.01
"""Of the latency: bounds this near to the figure are never called uncertain, as nothing depends on it."""

_TAIL = 0.025


@dataclass(frozen=True)
class Counted:
    """What the counted inferences took: nanoseconds of each, and on average seconds on processors."""

    nanoseconds: Sequence[int]
    cpu_seconds: Optional[float] = None

    @property
    def median_seconds(self) -> float:
        """As the latency's median is told."""
        return stats.median(self.nanoseconds) / 1e9

    def own_fallen(self, profiled: Inference) -> float:
        """Fallback's own time as in a profiled inference, were the processor as fast as in the counted ones.

        It may not have been, by its clock or by what else uses its caches.
        """
        if not self.cpu_seconds or not profiled.cpu:
            return profiled.own_fallen
        return profiled.own_fallen * self.cpu_seconds / profiled.cpu


@dataclass(frozen=True)
class Inference:
    """A profiled inference, in seconds: the whole, and what of it went by in fallen-back operations.

    Of either the part in which the thread had no processor because of other work, and of the whole the
    processor time of all threads; 0 where that is not known.
    """

    fallen: float
    whole: float
    fallen_queued: float = 0.0
    whole_queued: float = 0.0
    cpu: float = 0.0

    @property
    def own_fallen(self) -> float:
        """What fallback would have taken with a processor to itself."""
        return max(self.fallen - self.fallen_queued, 0.0)

    @property
    def own_whole(self) -> float:
        """What all of it would have taken with a processor to itself."""
        return max(self.whole - self.whole_queued, 0.0)

    @property
    def own_accelerator(self) -> float:
        """What was not fallback, with a processor to itself."""
        return self.own_whole - self.own_fallen

    @property
    def accelerator_queued(self) -> float:
        """How long the result of the accelerator waited for a processor."""
        return max(self.whole_queued - self.fallen_queued, 0.0)


@dataclass(frozen=True)
class _Estimate:
    """A median with its bounds."""

    middle: float
    low: float
    high: float


def of_fallback(
    inferences: Sequence[Inference], counted: Counted, method: str, *, by_rest: bool
) -> Optional[FallbackCost]:
    """The cost by the profiled inferences; None when there are too few for bounds."""
    timed = [each for each in inferences if each.whole > 0]
    if len(timed) < LEAST_INFERENCES or not counted.nanoseconds:
        return None
    latency = counted.median_seconds

    def way(seconds: Callable[[Inference], float]) -> _Estimate:
        return _estimate([seconds(each) for each in timed], len(counted.nanoseconds))

    if by_rest:
        rest = told = way(lambda each: latency - each.own_accelerator)
        if _equally_long(counted.nanoseconds, [each.whole for each in timed]):
            undisturbed = way(lambda each: each.own_accelerator + counted.own_fallen(each))
            longer = max(latency - undisturbed.middle, 0.0)
            told = way(lambda each: latency - each.own_accelerator - min(each.accelerator_queued, longer))
        beside = [rest, way(lambda each: counted.own_fallen(each))]
    else:
        told = way(lambda each: each.fallen / each.whole * latency)
        beside = [way(lambda each: each.fallen)]
    seconds, low, high = (
        min(max(each, 0.0), latency)
        for each in (
            told.middle,
            min(each.low for each in (told, *beside)),
            max(each.high for each in (told, *beside)),
        )
    )
    return FallbackCost(
        share=seconds / latency,
        share_low=low / latency,
        share_high=high / latency,
        seconds=seconds,
        seconds_low=low,
        seconds_high=high,
        latency_without_seconds=latency - seconds,
        method=f"{method}, {'counted median less the accelerator' if by_rest else 'median share'}",
    )


def is_uncertain(cost: FallbackCost) -> bool:
    """Whether the bounds are so far away that the figure, or what would be left without it, says little."""
    distance = max(cost.seconds_high - cost.seconds, cost.seconds - cost.seconds_low)
    latency = cost.latency_without_seconds + cost.seconds
    return distance > max(UNCERTAIN * min(cost.seconds, cost.latency_without_seconds), NEGLIGIBLE * latency)


def _estimate(values: Sequence[float], counted: int) -> _Estimate:
    low, high = ranks(len(values), counted)
    ordered = sorted(values)
    return _Estimate(ordered[stats.rank("50", len(values)) - 1], ordered[low - 1], ordered[high - 1])


def ranks(count: int, others: int) -> Tuple[int, int]:
    """Positions from 1 in a sample between which the median of ``others`` further values lies at 95 %.

    The first and the last where that can't be had.
    """
    middle = stats.rank("50", others)
    above = others - middle
    # In proportion, the probability of k values of the sample below the middle one of the others, from the
    # ratios of neighbours, outwards from a term near the mode: no factorial, hence no overflow.
    begin = count // 2
    upwards, downwards = [1.0], [1.0]
    for k in range(begin, count):
        upwards.append(upwards[-1] * (k + middle) * (count - k) / ((k + 1) * (count - k + above)))
    for k in range(begin, 0, -1):
        downwards.append(downwards[-1] * k * (count - k + 1 + above) / ((k - 1 + middle) * (count - k + 1)))
    weights = [*reversed(downwards[1:]), *upwards]
    left_out = _TAIL * math.fsum(weights)
    return max(_most(weights, left_out), 1), min(count + 1 - _most(weights[::-1], left_out), count)


def _most(weights: Sequence[float], limit: float) -> int:
    """How many of the weights, from the first on, amount to no more than the limit."""
    total = 0.0
    for at, weight in enumerate(weights):
        total += weight
        if total > limit:
            return at
    return len(weights)


def _equally_long(counted_nanoseconds: Sequence[int], seconds: List[float]) -> bool:
    """Whether the medians could be the same: their 95 % bounds overlap."""
    low, high = _bounds([each / 1e9 for each in counted_nanoseconds])
    other_low, other_high = _bounds(seconds)
    return low <= other_high and other_low <= high


def _bounds(values: Sequence[float]) -> Tuple[float, float]:
    """Of the true median; the smallest and the largest where there are too few."""
    ordered = sorted(values)
    found = stats.bounds("50", len(ordered))
    return (ordered[0], ordered[-1]) if found is None else (ordered[found[0] - 1], ordered[found[1] - 1])
