"""How many samples are computed a second, with bounds.

The measured time is cut into stretches of equal length; an inference counts in each with the share of its
own time that lies there, so that none is counted twice or lost at a cut. The rates of the stretches are close
to independent even where neighbouring inferences are not (batch means: Alexopoulos & Seila, Handbook of
Simulation, 1998, section 7.2), and Student's t gives the bounds of their mean.
"""

from __future__ import annotations

import math
from array import array
from dataclasses import dataclass
from itertools import accumulate
from typing import List, Optional, Sequence, Tuple

from boardbench.agent.bench.stats import student

MOST_STRETCHES = 30
"""More add nothing: t is then 4 % above the normal's, and longer stretches are more independent."""

LEAST_STRETCHES = 10
"""Below it the variance of the rates is hardly known."""

LEAST_IN_STRETCH = 4
"""Inferences of each stream in a stretch: with fewer, the shares of one that is cut make neighbours alike."""


@dataclass(frozen=True)
class Throughput:
    """Samples a second; without bounds where there are too few inferences for any."""

    hertz: float
    low_hertz: Optional[float] = None
    high_hertz: Optional[float] = None


Calls = Tuple[Sequence[int], Sequence[int]]
"""Begins and ends of one stream's calls in nanoseconds, in order."""


def of_streams(streams: Sequence[Calls], samples_in_call: int, confidence: float) -> Optional[Throughput]:
    """Of streams that worked side by side, while all of them did; None where no such time is."""
    begin, end = max(begins[0] for begins, _ in streams), min(ends[-1] for _, ends in streams)
    if end <= begin:
        return None
    stretches = min(MOST_STRETCHES, min(len(ends) for _, ends in streams) // LEAST_IN_STRETCH)
    if stretches < LEAST_STRETCHES:
        return Throughput(_rates(streams, begin, end, 1)[0] * samples_in_call)
    rates = [rate * samples_in_call for rate in _rates(streams, begin, end, stretches)]
    mean = math.fsum(rates) / stretches
    variance = math.fsum((rate - mean) ** 2 for rate in rates) / (stretches - 1)
    half = student(confidence, stretches - 1) * math.sqrt(variance / stretches)
    return Throughput(mean, max(0.0, mean - half), mean + half)


def one_after_the_other(durations: Sequence[int], samples_in_call: int, confidence: float) -> Throughput:
    """Of calls that follow each other at once; time between them, which is the loop's own, does not count."""
    ends = array("Q", accumulate(max(duration, 1) for duration in durations))
    begins = array("Q", (0, *ends[:-1]))
    found = of_streams([(begins, ends)], samples_in_call, confidence)
    assert found is not None  # every call takes time
    return found


def _rates(streams: Sequence[Calls], begin: int, end: int, stretches: int) -> List[float]:
    """Calls a second in each stretch."""
    length = (end - begin) / stretches
    work = [0.0] * stretches
    for begins, ends in streams:
        for first, last in zip(begins, ends):
            done, last_in = float(max(first, begin)), min(last, end)
            if last_in <= done:
                continue
            place = min(int((done - begin) / length), stretches - 1)
            while True:
                border = begin + (place + 1) * length if place < stretches - 1 else float(end)
                work[place] += (min(last_in, border) - done) / (last - first)
                if last_in <= border:
                    break
                done = border
                place += 1
    return [each / (length / 1e9) for each in work]
