"""The warm-up: inferences that are not counted, until those that follow would resemble them.

It lasts as long as was asked for and then until the latency is steady: the last half of it, in three windows
of as many inferences, has three medians that agree (the last three windows are what Triton's perf_analyzer
looks at, too). Two medians agree when they differ by at most 1 %, since nobody would tell them apart; or when
their 95 % bounds overlap, so that chance explains the difference, and they differ by at most 10 %, since
bounds from few inferences overlap whatever is between them. As the warm-up gets longer, its slow beginning
leaves the last half and the windows grow.
"""

from __future__ import annotations

import time
from array import array
from typing import Callable, Optional, Sequence, Tuple

from boardbench.agent.bench import measure, stats
from boardbench.agent.domain import Stage, WarmUp

LONGER = 10
"""At most this many times as long as was asked for: perf_analyzer gives up after ten trials."""

MOST_EXTRA_SECONDS = 30.0
"""Nor longer than this: what is not steady by then gets so by minutes of heat, if at all."""

WINDOWS = 3
LEAST_WINDOW = 6
"""Inferences in a window; below six a median has no bounds at 95 %."""

LEAST_RUNS = WINDOWS * LEAST_WINDOW

EQUAL_RATIO = 0.01
AGREE_RATIO = 0.10

MOST_SAMPLES = 1000
"""Of the warm-up's inferences so many are kept: its beginning is what is of interest."""

_STRETCHES = 4  # checks in the time that was asked for


def steady(samples: Sequence[int]) -> Optional[bool]:
    """Whether the last half of the samples is steady; None when they are too few to tell."""
    count = len(samples)
    if count < LEAST_RUNS:
        return None
    size = max(LEAST_RUNS, count // 2) // WINDOWS
    windows = [samples[count - (place + 1) * size : count - place * size] for place in range(WINDOWS)]
    found = [(stats.median(window), stats.median_bounds(window)) for window in windows]
    return all(_agree(one, other) for place, one in enumerate(found) for other in found[place + 1 :])


_Middle = Tuple[int, Optional[Tuple[int, int]]]


def _agree(one: _Middle, other: _Middle) -> bool:
    difference, least = abs(one[0] - other[0]), min(one[0], other[0])
    if difference <= EQUAL_RATIO * least:
        return True
    if one[1] is None or other[1] is None:
        return False
    overlap = one[1][0] <= other[1][1] and other[1][0] <= one[1][1]
    return overlap and difference <= AGREE_RATIO * least


class Warming:
    """Ends a warm-up: after what was asked for and once it is steady, or at the limit."""

    def __init__(self, seconds: float, runs: int) -> None:
        """With no seconds exactly ``runs`` inferences: whoever counts them has a reason."""
        self._asked = int(seconds * 1e9)
        self._runs = runs
        self._limit = min(LONGER * self._asked, self._asked + int(MOST_EXTRA_SECONDS * 1e9))
        self._stretch = max(1, self._asked // _STRETCHES)
        self._next = self._asked
        self.steady: Optional[bool] = None
        """What the last check said; None when there were too few to tell."""

    def batch(self, runs: int, elapsed: int) -> Tuple[int, int]:  # noqa: ARG002 - the contract's
        """Until the next check."""
        if runs < self._runs:
            return self._runs - runs, measure.FOREVER
        if self._next == self._limit and runs < LEAST_RUNS:
            return LEAST_RUNS - runs, self._limit
        return measure.FOREVER, self._next

    def over(self, samples: array[int], elapsed: int) -> bool:
        """Checks, when it is time to."""
        runs = len(samples)
        enough = elapsed >= self._next or (self._next == self._limit and runs == LEAST_RUNS)
        if runs < self._runs or not enough:
            return False
        self.steady = steady(samples)
        if self.steady or elapsed >= self._limit:
            return True
        if self.steady is None:
            # Where there would be too few at the limit as well, there is no use in going on.
            self._next = self._limit
            return elapsed * LEAST_RUNS // runs > self._limit
        self._next = min(elapsed + self._stretch, self._limit)
        return False

    def fraction(self, runs: int, elapsed_seconds: float) -> Optional[float]:
        """Of what was asked for; None once it is beyond that."""
        if runs >= self._runs and elapsed_seconds * 1e9 >= self._asked:
            return None
        return min(
            elapsed_seconds * 1e9 / self._asked if self._asked > 0 else 1.0,
            runs / self._runs if self._runs > 0 else 1.0,
        )


def warm_up(
    call: Callable[[], object],
    seconds: float,
    runs: int,
    report: measure.Report,
    *,
    progress_seconds: float,
    clock: measure.Clock = time.perf_counter_ns,
) -> WarmUp:
    """Runs ``call`` at least this long and often, and until it is steady; not at all when both are zero."""
    if seconds <= 0 and runs <= 0:
        return WarmUp(runs=0, seconds=0.0)
    ending = Warming(seconds, runs)
    began = clock()
    samples = measure.loop(
        Stage.WARM_UP, call, ending, report, progress_seconds=progress_seconds, clock=clock, began=began
    )
    return WarmUp(
        runs=len(samples),
        seconds=(clock() - began) / 1e9,
        steady=ending.steady,
        samples_nanoseconds=tuple(samples[:MOST_SAMPLES]),
    )
