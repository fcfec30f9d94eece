"""The timed loop, and what belongs around it. Standard library only.

Between two readings of the clock there is the engine's own call and nothing else: no allocation, no
branch, no progress. Everything is kept in integer nanoseconds.
"""

from __future__ import annotations

import gc
import os
import sys
import time
from array import array
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from typing import Callable, Iterator, Optional, Protocol, Sequence, Tuple, TypeVar

from boardbench.agent.bench import stats
from boardbench.agent.domain import Progress, Stage, StopReason

Clock = Callable[[], int]
Report = Callable[[Progress], None]

_Found = TypeVar("_Found")

CALIBRATION_READS = 2001
"""Some 0.1 ms on a laptop and 1 ms on the slowest board; odd, so that the median is one of them."""

INTERIM_SAMPLES = 512
"""Samples that an interim median looks at: sorting them takes some 50 µs, whatever the run's length."""

FOREVER = sys.maxsize
"""Of inferences or nanoseconds: no bound."""


class Looks(Protocol):
    """Looks at the samples while they come, to see whether they are precise enough."""

    @property
    def next_look(self) -> int:
        """Number of samples from which on the next look is due; it rises with every look."""
        ...

    def look(self, samples: array[int]) -> bool:
        """Whether they are, by all of the samples so far."""
        ...

    def fraction(self, runs: int) -> Optional[float]:
        """How far so many samples are on the way, by what the last look saw; None before there was one."""
        ...


@dataclass(frozen=True)
class Bounds:
    """How long a stage lasts: both the runs and the seconds must be reached, ``most_runs`` ends it anyhow.

    With looks for a precision it goes on from there until one of them is content, to ``most_seconds``.
    """

    seconds: float
    least_runs: int
    most_runs: Optional[int] = None
    most_seconds: Optional[float] = None


class Ending(Protocol):
    """When a loop ends. It is asked between inferences, where nothing is timed."""

    def batch(self, runs: int, elapsed: int) -> Tuple[int, int]:
        """How many inferences, and until how many nanoseconds since the begin, before it is asked again."""
        ...

    def over(self, samples: array[int], elapsed: int) -> bool:
        """Whether the loop ends here."""
        ...

    def fraction(self, runs: int, elapsed_seconds: float) -> Optional[float]:
        """Share that is done; None where the end is not known."""
        ...


class Counting:
    """Ends when the bounds are reached, or with ``looks`` when one of them is content after that."""

    def __init__(self, bounds: Bounds, looks: Optional[Looks] = None) -> None:
        """Nothing is counted yet."""
        self._bounds = bounds
        self._looks = looks
        self._most = sys.maxsize if bounds.most_runs is None else bounds.most_runs
        self._end = int(bounds.seconds * 1e9)
        most_seconds = bounds.seconds if bounds.most_seconds is None else bounds.most_seconds
        self._latest = max(self._end, int(most_seconds * 1e9)) if looks is not None else self._end
        self.reason = StopReason.DURATION
        """What ended it."""

    def batch(self, runs: int, elapsed: int) -> Tuple[int, int]:
        """Until a bound is reached or a look is due."""
        least = self._bounds.least_runs
        left = self._most - runs
        if runs < least:
            return min(left, least - runs), FOREVER
        if self._looks is None or elapsed < self._end:
            return left, self._end
        if runs < self._looks.next_look:
            left = min(left, self._looks.next_look - runs)
        return left, self._latest

    def over(self, samples: array[int], elapsed: int) -> bool:
        """Looks, where one is due."""
        runs, least = len(samples), self._bounds.least_runs
        looks = self._looks
        enough = runs >= least and elapsed >= self._end
        if enough and looks is not None and runs >= looks.next_look and looks.look(samples):
            self.reason = StopReason.PRECISION
            return True
        if runs >= self._most:
            self.reason = StopReason.RUNS
            return True
        if runs >= least and elapsed >= self._latest:
            # When the time was over before the last inference began, their number was what it waited for.
            waited = runs == least and elapsed - samples[-1] >= self._latest
            self.reason = StopReason.RUNS if waited else StopReason.DURATION
            return True
        return False

    def fraction(self, runs: int, elapsed_seconds: float) -> Optional[float]:
        """That of whatever is furthest away and has to be reached."""
        bounds = self._bounds
        fraction = min(
            elapsed_seconds / bounds.seconds if bounds.seconds > 0 else 1.0,
            runs / bounds.least_runs if bounds.least_runs > 0 else 1.0,
        )
        if self._looks is not None:
            latest = self._latest / 1e9
            precise = self._looks.fraction(runs) or 0.0
            fraction = min(fraction, max(precise, elapsed_seconds / latest if latest > 0 else 1.0))
        if bounds.most_runs is not None:
            fraction = max(fraction, runs / bounds.most_runs)
        return fraction


class UntilTold:
    """Ends when it is told to; asked after every inference, so that it hears it at once."""

    def __init__(self, told: Callable[[], bool]) -> None:
        """``told`` says whether to end."""
        self._told = told

    def batch(self, runs: int, elapsed: int) -> Tuple[int, int]:  # noqa: ARG002 - the contract's
        """One."""
        return 1, FOREVER

    def over(self, samples: array[int], elapsed: int) -> bool:  # noqa: ARG002 - the contract's
        """What it was told. Keeps no samples: it may last."""
        del samples[:]
        return self._told()

    def fraction(self, runs: int, elapsed_seconds: float) -> Optional[float]:  # noqa: ARG002
        """Not known."""
        return None


@dataclass(frozen=True)
class Usage:
    """What the process used while it measured."""

    wall_seconds: float
    cpu_seconds: float
    involuntary_context_switches: Optional[int]
    voluntary_context_switches: Optional[int] = None
    queued_seconds: Optional[float] = None
    """Time in which the measuring thread was ready to run and had no processor."""


@dataclass(frozen=True)
class Counted:
    """The counted inferences in nanoseconds, in order; what the process used; what ended them."""

    samples: array[int]
    usage: Usage
    reason: StopReason


@dataclass(frozen=True)
class ClockCost:
    """Seconds that one reading of the clock takes: in the median, and the worst of many."""

    median_seconds: float
    worst_seconds: float


def clock_cost(clock: Clock = time.perf_counter_ns) -> ClockCost:
    """What one reading of the clock costs; the median is never below its resolution."""
    steps = []
    before = clock()
    for _ in repeat(None, CALIBRATION_READS):
        after = clock()
        steps.append(after - before)
        before = after
    # A clock with coarse ticks mostly steps by nothing.
    resolution = time.get_clock_info("perf_counter").resolution
    return ClockCost(max(stats.median(steps) / 1e9, resolution), max(max(steps) / 1e9, resolution))


def measure(
    call: Callable[[], object],
    bounds: Bounds,
    report: Report,
    *,
    progress_seconds: float,
    clock: Clock = time.perf_counter_ns,
    looks: Optional[Looks] = None,
) -> Counted:
    """Counts inferences one after the other until the bounds are reached; see :class:`Bounds`."""
    ending = Counting(bounds, looks)
    samples, usage = observed(
        lambda: loop(Stage.MEASURE, call, ending, report, progress_seconds=progress_seconds, clock=clock),
        clock,
    )
    return Counted(samples, usage, ending.reason)


def observed(work: Callable[[], _Found], clock: Clock = time.perf_counter_ns) -> Tuple[_Found, Usage]:
    """What ``work`` returns, and what the process used for it."""
    switches = context_switches()
    cpu, wall = time.process_time_ns(), clock()
    queued = queued_seconds()  # within the window, so that it can't be more than the window
    found = work()
    if queued is not None:
        queued = (queued_seconds() or queued) - queued
    wall, cpu = clock() - wall, time.process_time_ns() - cpu
    after = context_switches()
    return found, Usage(
        wall_seconds=wall / 1e9,
        cpu_seconds=cpu / 1e9,
        involuntary_context_switches=after[0] - switches[0] if after and switches else None,
        voluntary_context_switches=after[1] - switches[1] if after and switches else None,
        queued_seconds=queued,
    )


def loop(
    stage: Stage,
    call: Callable[[], object],
    ending: Ending,
    report: Report,
    *,
    progress_seconds: float,
    clock: Clock = time.perf_counter_ns,
    began: Optional[int] = None,
) -> array[int]:
    """Every inference until ``ending`` ends it, in nanoseconds and in order.

    ``began`` is the reading of the clock from which on its time counts; None: now.
    """
    samples = array("Q")
    append = samples.append
    step = int(progress_seconds * 1e9)
    now = told = clock()
    if began is None:
        began = now
    while True:
        # One batch: until progress is due or the ending wants to be asked. Its end is checked with the
        # reading that closed the inference, so that it costs no reading of its own.
        left, until = ending.batch(len(samples), now - began)
        due = min(told + step, began + until)
        for _ in repeat(None, left):
            start = clock()
            call()
            now = clock()
            append(now - start)
            if now >= due:
                break
        elapsed = now - began
        over = ending.over(samples, elapsed)
        if over or now >= told + step:
            fraction = 1.0 if over else ending.fraction(len(samples), elapsed / 1e9)
            report(progress(stage, samples, elapsed / 1e9, fraction))
            told = clock()
        if over:
            return samples
        now = clock()


def progress(
    stage: Stage, samples: Sequence[int], elapsed_seconds: float, fraction: Optional[float]
) -> Progress:
    """How far a loop is; the median is that of a part of the samples."""
    runs = len(samples)
    thinned = samples[:: max(1, runs // INTERIM_SAMPLES)]
    return Progress(
        stage=stage,
        runs=runs,
        elapsed_seconds=elapsed_seconds,
        fraction=None if fraction is None else min(fraction, 1.0),
        median_seconds=stats.median(thinned) / 1e9 if thinned else None,
    )


@contextmanager
def collector_at_rest() -> Iterator[None]:
    """No garbage collection inside: a pass over everything imported takes milliseconds on a board."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def context_switches() -> Optional[Tuple[int, int]]:
    """Times the kernel took the processor away from a thread of this process, and times one gave it up.

    None where the system can't say.
    """
    try:
        import resource
    except ImportError:  # Windows
        return None
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_nivcsw, usage.ru_nvcsw


def queued_seconds(schedstat: Path = Path("/proc/thread-self/schedstat")) -> Optional[float]:
    """Time that this thread has been ready to run without a processor; None where the kernel does not tell.

    The second of the three numbers (Documentation/scheduler/sched-stats.rst), in nanoseconds.
    """
    try:
        numbers = schedstat.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return None
    return int(numbers[1]) / 1e9 if len(numbers) == 3 and numbers[1].isdigit() else None


def processors() -> Tuple[int, ...]:
    """Processors that this process may use; empty where the system has no such notion."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()
