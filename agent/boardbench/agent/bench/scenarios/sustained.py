"""Sustained: single stream for a long time, window by window, and the steady end after whatever came up.

Every inference is in its window's figures. Of the samples as many are kept as the run may count; where there
are more, every second one is left out, as often as it takes.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, replace
from typing import Iterator, List, Optional, Sequence, Tuple

from boardbench.agent.bench import doubts, measure, stats
from boardbench.agent.bench.doubts import Thresholds
from boardbench.agent.bench.scenarios.streams import fill
from boardbench.agent.bench.scenarios.terms import Call, Run, Terms, Told
from boardbench.agent.domain import (
    Progress,
    ScenarioKind,
    ScenarioResult,
    Stage,
    StopReason,
    Warning,
    Window,
)

LEAST_STEADY = 3
"""Windows of a steady end: with two, any step would be one."""

STEADY_SHARE = 0.2
"""And of all windows: three of thirty minutes are no end."""


class Sustained:
    """One inference after the other, for the whole duration whatever their number."""

    def __init__(self, call: Call, terms: Terms, window_seconds: float) -> None:
        """``call`` is the timed one, as it is."""
        self._call = call
        self._terms = terms
        self._window_seconds = window_seconds

    def measure(self) -> Run:
        """Counts inferences, window by window."""
        terms = self._terms
        windows = _Windows(terms, self._window_seconds)
        _, usage = measure.observed(lambda: self._count(windows), terms.clock)
        parts = windows.parts
        medians = [part.window.median_seconds for part in parts if part.window.median_seconds is not None]
        steady = steady_end(parts, terms.thresholds)
        result = ScenarioResult(
            kind=ScenarioKind.SUSTAINED,
            throughput_hertz=windows.total / parts[-1].window.end_seconds,
            windows=tuple(part.window for part in parts),
            steady_median_seconds=None if steady is None else steady.median_seconds,
            slowdown_ratio=(medians[-1] if steady is None else steady.median_seconds) / medians[0],
        )
        samples = array("Q")
        for part in parts:
            samples.extend(part.kept)
        return Run(
            samples=samples,
            usage=usage,
            reason=StopReason.DURATION,
            inferences=windows.total,
            inference_nanoseconds=stats.median(samples),
            engine_wall_seconds=usage.wall_seconds,
            engine_cpu_seconds=usage.cpu_seconds,
            result=result,
            warnings=tuple(self._doubts(windows, steady, result)),
        )

    def fill(self, told: Told) -> None:
        """Infers until told."""
        fill(self._call, told, self._terms)

    def _count(self, windows: _Windows) -> None:
        began = self._terms.clock()
        while not windows.ended:
            windows.take(
                measure.loop(
                    Stage.MEASURE,
                    self._call,
                    windows,
                    windows.report,
                    progress_seconds=self._terms.progress_seconds,
                    clock=self._terms.clock,
                    began=began,
                )
            )

    def _doubts(
        self, windows: _Windows, steady: Optional[Steady], result: ScenarioResult
    ) -> Iterator[Warning]:
        thresholds = self._terms.thresholds
        if windows.stride > 1:
            yield doubts.warn(
                "samples_thinned",
                f"one of {windows.stride} of the {windows.total} samples is kept",
                evidence={"inferences": windows.total, "stride": windows.stride},
            )
        if steady is None:
            yield doubts.warn(
                "still_changing",
                f"the last of {len(windows.parts)} windows differ, or are too few to tell",
                evidence={"windows": len(windows.parts), "limit_ratio": thresholds.steady_ratio},
            )
        elif result.slowdown_ratio is not None and result.slowdown_ratio > 1 + thresholds.slowdown_ratio:
            since = windows.parts[steady.first].window.begin_seconds
            yield doubts.warn(
                "slowed_down",
                f"from {_moment(since)} on the median is {result.slowdown_ratio:.2f} times that of the first "
                "window",
                evidence={
                    "slowdown_ratio": result.slowdown_ratio,
                    "limit_ratio": 1 + thresholds.slowdown_ratio,
                    "steady_from_seconds": since,
                },
            )


def _moment(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds < 120 else f"minute {seconds / 60:.0f}"


@dataclass(frozen=True)
class Part:
    """A window, and what is kept of its samples; ``first`` is the place of its first one in the run."""

    window: Window
    first: int
    kept: array[int]


class _Windows:
    """Ends the loop at the end of each window, and keeps what it counted."""

    def __init__(self, terms: Terms, window_seconds: float) -> None:
        self._terms = terms
        seconds = terms.bounds.seconds
        self._length = max(1, int(window_seconds * 1e9))
        self._end = int(seconds * 1e9)
        # What would be less than half a window at the end belongs to the last one.
        self._count = max(1, (self._end + self._length // 2) // self._length)
        self._most = measure.FOREVER if terms.bounds.most_runs is None else terms.bounds.most_runs
        self._current: array[int] = array("Q")
        self._elapsed = 0
        self.parts: List[Part] = []
        self.total = 0
        """Inferences that are in a window, or waiting to be."""

        self.stride = 1
        """One of so many samples is kept."""

        self.ended = False

    def batch(self, runs: int, elapsed: int) -> Tuple[int, int]:
        """Until the window ends; the last one goes on to the least number of inferences."""
        border = self._border()
        missing = self._terms.bounds.least_runs - self.total - runs
        if self._last() and missing > 0:
            return missing, measure.FOREVER
        return measure.FOREVER, max(border, elapsed)

    def over(self, samples: array[int], elapsed: int) -> bool:
        """Whether the window is."""
        self._elapsed = elapsed
        enough = not self._last() or self.total + len(samples) >= self._terms.bounds.least_runs
        return elapsed >= self._border() and enough

    def fraction(self, runs: int, elapsed_seconds: float) -> Optional[float]:
        """Of the duration, or of the least number of inferences if that is further away."""
        least = self._terms.bounds.least_runs
        return min(
            elapsed_seconds * 1e9 / self._end if self._end > 0 else 1.0,
            (self.total + runs) / least if least > 0 else 1.0,
        )

    def report(self, progress: Progress) -> None:
        """Tells the progress of a window as that of the run."""
        fraction = self.fraction(progress.runs, progress.elapsed_seconds)
        runs = self.total + progress.runs
        self._terms.report(
            replace(progress, runs=runs, fraction=None if fraction is None else min(fraction, 1.0))
        )

    def take(self, samples: array[int]) -> None:
        """Takes what the loop counted up to the end of a window."""
        self.total += len(samples)
        if self._last():
            self._current.extend(samples)
        else:
            # An inference belongs to the window in which it ended: that of the last one is a later one.
            late = samples.pop()
            self._current.extend(samples)
            place = min(self._elapsed // self._length, self._count - 1)
            while len(self.parts) < place:
                self._close((len(self.parts) + 1) * self._length)
            self._current.append(late)
        if self._last() and self._elapsed >= self._end and self.total >= self._terms.bounds.least_runs:
            self._close(self._elapsed)
            self.ended = True

    def _last(self) -> bool:
        return len(self.parts) == self._count - 1

    def _border(self) -> int:
        return self._end if self._last() else (len(self.parts) + 1) * self._length

    def _close(self, end: int) -> None:
        samples, self._current = self._current, array("Q")
        first = self.parts[-1].first + self.parts[-1].window.count if self.parts else 0
        ordered = sorted(samples)
        bounds = stats.median_bounds(ordered, self._terms.confidence) if ordered else None
        window = Window(
            begin_seconds=len(self.parts) * self._length / 1e9,
            end_seconds=end / 1e9,
            count=len(ordered),
            median_seconds=stats.median(ordered) / 1e9 if ordered else None,
            median_low_seconds=None if bounds is None else bounds[0] / 1e9,
            median_high_seconds=None if bounds is None else bounds[1] / 1e9,
        )
        self.parts.append(Part(window, first, samples[-first % self.stride :: self.stride]))
        while sum(len(part.kept) for part in self.parts) > self._most:
            self._thin()

    def _thin(self) -> None:
        """Leaves out every second sample that is kept, counted through all windows."""
        for place, part in enumerate(self.parts):
            begins_odd = -(-part.first // self.stride) % 2
            self.parts[place] = replace(part, kept=part.kept[begins_odd::2])
        self.stride *= 2


@dataclass(frozen=True)
class Steady:
    """The steady end: the window that it begins with, and its median."""

    first: int
    median_seconds: float


def steady_end(parts: Sequence[Part], thresholds: Thresholds) -> Optional[Steady]:
    """The windows at the end that agree; None where the last three do not, or too few do.

    They agree with the middle one of the last three medians: their own is within the threshold of it, or it
    is within their bounds.
    """
    places = [place for place, part in enumerate(parts) if part.window.median_seconds is not None]
    if len(places) < LEAST_STEADY:
        return None
    middle = sorted(_median(parts[place]) for place in places[-LEAST_STEADY:])[LEAST_STEADY // 2]

    def agrees(part: Part) -> bool:
        if abs(_median(part) - middle) <= thresholds.steady_ratio * middle:
            return True
        low, high = part.window.median_low_seconds, part.window.median_high_seconds
        return low is not None and high is not None and low <= middle <= high

    steady: List[int] = []
    for place in reversed(places):
        if not agrees(parts[place]):
            break
        steady.append(place)
    if len(steady) < max(LEAST_STEADY, STEADY_SHARE * len(places)):
        return None
    kept = [sample for place in steady for sample in parts[place].kept]
    return Steady(steady[-1], stats.median(kept) / 1e9 if kept else middle)


def _median(part: Part) -> float:
    assert part.window.median_seconds is not None
    return part.window.median_seconds
