"""One model against another, by processes of both that took turns.

The unit is the process: of the ratios of two medians in each turn the middle is told, with bounds that ask
nothing of their distribution but that a ratio is as likely to be above the middle as below it by as much
(Wilcoxon's signed ranks; the bounds of Tukey and Walsh, in Hollander, Wolfe & Chicken, Nonparametric
Statistical Methods, 3rd edition, sections 3.2 and 3.3). A turn that something disturbed moves them little,
and they are exact for any number of turns from six on, at 95 %.

Fewer turns say nothing that holds for the next process. Then there are the bounds of the two medians, each of
its own samples, put together, and what they leave out has to be said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import List, Optional, Sequence, Tuple

SAMPLES_ONLY = "the bounds are those of these very processes, and others may differ by more"
"""What is to be said with bounds that come from samples."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians with its bounds; ``unit`` is "process" or "sample"."""

    ratio: float
    low: float
    high: float
    unit: str

    @property
    def differs(self) -> bool:
        """Whether the difference is beyond noise."""
        return not self.low <= 1.0 <= self.high


def by_turns(ours: Sequence[float], theirs: Sequence[float], confidence: float) -> Optional[Ratio]:
    """Our medians over theirs, turn by turn; None when the turns are too few for bounds.

    Each turn has one process of both, one right after the other, so that what changes on the board from turn
    to turn is in both. Turns beyond the shorter of the two and such with a median of zero do not count.
    """
    logarithms = [math.log(one / other) for one, other in zip(ours, theirs) if one > 0.0 and other > 0.0]
    count = len(logarithms)
    place = _place(count, confidence)
    if place is None:
        return None
    averages = sorted(
        (logarithms[first] + logarithms[second]) / 2.0
        for first in range(count)
        for second in range(first, count)
    )
    half = len(averages) // 2
    middle = averages[half] if len(averages) % 2 else (averages[half - 1] + averages[half]) / 2.0
    low, high = averages[place - 1], averages[len(averages) - place]
    return Ratio(math.exp(middle), math.exp(low), math.exp(high), "process")


def least_turns(confidence: float) -> int:
    """The fewest turns that have bounds: six at 95 %."""
    count = 1
    while _place(count, confidence) is None:
        count += 1
    return count


def _place(count: int, confidence: float) -> Optional[int]:
    """Position from 1, from either end, of the average of two ratios that is a bound; None without one."""
    if count < 1:
        return None
    # How many of the 2^n ways to give the ranks 1 … n signs have a given sum of the positive ones.
    ways: List[int] = [1]
    for rank in range(1, count + 1):
        longer = [0] * (len(ways) + rank)
        for total, number in enumerate(ways):
            longer[total] += number
            longer[total + rank] += number
        ways = longer
    tail = (1.0 - confidence) / 2.0 * 2**count
    below, place = 0, 0
    for number in ways:
        below += number
        if below > tail:
            break
        place += 1
    return place or None


Bounds = Tuple[float, float, float]
"""Low, value, high."""


def by_samples(ours: Bounds, theirs: Bounds) -> Optional[Ratio]:
    """Our median over theirs from the bounds of both, at the confidence of these; None for medians of zero.

    On the logarithms the distances of the bounds add as standard errors do (MOVER: Zou & Donner, Statistics
    in Medicine 27, 1693, 2008). It holds for these very processes only: :data:`SAMPLES_ONLY`.
    """
    if min(*ours, *theirs) <= 0.0:
        return None
    our_low, our_value, our_high = map(math.log, ours)
    their_low, their_value, their_high = map(math.log, theirs)
    middle = our_value - their_value
    low = middle - math.hypot(our_value - our_low, their_high - their_value)
    high = middle + math.hypot(our_high - our_value, their_value - their_low)
    return Ratio(math.exp(middle), math.exp(low), math.exp(high), "sample")
