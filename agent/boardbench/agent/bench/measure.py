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
from typing import Callable, Iterator, Optional, Tuple

from boardbench.agent.bench import stats
from boardbench.agent.domain import Progress, Stage

Clock = Callable[[], int]

CALIBRATION_READS = 2001
"""Some 0.1 ms on a laptop and 1 ms on the slowest board; odd, so that the median is one of them."""

INTERIM_SAMPLES = 512
"""Samples that an interim median looks at: sorting them takes some 50 µs, whatever the run's length."""


@dataclass(frozen=True)
class Bounds:
    """How long a stage lasts: both the runs and the seconds must be reached, ``most_runs`` ends it anyhow."""

    seconds: float
    least_runs: int
    most_runs: Optional[int] = None


@dataclass(frozen=True)
class Window:
    """What the process used while it measured."""

    wall_seconds: float
    cpu_seconds: float
    involuntary_context_switches: Optional[int]
    queued_seconds: Optional[float] = None
    """Time in which the measuring thread was ready to run and had no processor."""


def clock_read_seconds(clock: Clock = time.perf_counter_ns) -> float:
    """Median cost of one reading of the clock; never below its resolution."""
    steps = []
    before = clock()
    for _ in repeat(None, CALIBRATION_READS):
        after = clock()
        steps.append(after - before)
        before = after
    cost = stats.median(steps) / 1e9
    # A clock with coarse ticks mostly steps by nothing.
    return max(cost, time.get_clock_info("perf_counter").resolution)


def warm_up(
    call: Callable[[], object],
    bounds: Bounds,
    report: Callable[[Progress], None],
    *,
    progress_seconds: float,
    clock: Clock = time.perf_counter_ns,
) -> None:
    """Runs ``call`` until the bounds are reached; none at all when both are zero."""
    if bounds.seconds > 0 or bounds.least_runs > 0:
        _loop(Stage.WARM_UP, call, bounds, report, progress_seconds, clock)


def measure(
    call: Callable[[], object],
    bounds: Bounds,
    report: Callable[[Progress], None],
    *,
    progress_seconds: float,
    clock: Clock = time.perf_counter_ns,
) -> Tuple[array[int], Window]:
    """Every counted inference in nanoseconds, in order, and what the process used meanwhile."""
    with _collector_at_rest():
        switches = involuntary_context_switches()
        cpu, wall = time.process_time_ns(), clock()
        queued = queued_seconds()  # within the window, so that it can't be more than the window
        samples = _loop(Stage.MEASURE, call, bounds, report, progress_seconds, clock)
        if queued is not None:
            queued = (queued_seconds() or queued) - queued
        wall, cpu = clock() - wall, time.process_time_ns() - cpu
        if switches is not None:
            switches = (involuntary_context_switches() or switches) - switches
    return samples, Window(
        wall_seconds=wall / 1e9,
        cpu_seconds=cpu / 1e9,
        involuntary_context_switches=switches,
        queued_seconds=queued,
    )


def _loop(
    stage: Stage,
    call: Callable[[], object],
    bounds: Bounds,
    report: Callable[[Progress], None],
    progress_seconds: float,
    clock: Clock,
) -> array[int]:
    samples = array("Q")
    append = samples.append
    most = sys.maxsize if bounds.most_runs is None else bounds.most_runs
    step = int(progress_seconds * 1e9)
    began = clock()
    end = began + int(bounds.seconds * 1e9)
    now = began
    while True:
        # One batch: until progress is due or a bound is reached. Its end is checked with the
        # reading that closed the inference, so that it costs no reading of its own.
        due = now + step
        left = most - len(samples)
        if len(samples) < bounds.least_runs:
            left = min(left, bounds.least_runs - len(samples))
        else:
            due = min(due, end)
        for _ in repeat(None, left):
            start = clock()
            call()
            now = clock()
            append(now - start)
            if now >= due:
                break
        runs = len(samples)
        over = runs >= most or (now >= end and runs >= bounds.least_runs)
        report(_progress(stage, samples, (now - began) / 1e9, bounds, over))
        if over:
            return samples
        now = clock()


def _progress(stage: Stage, samples: array[int], elapsed: float, bounds: Bounds, over: bool) -> Progress:
    runs = len(samples)
    fraction = min(
        elapsed / bounds.seconds if bounds.seconds > 0 else 1.0,
        runs / bounds.least_runs if bounds.least_runs > 0 else 1.0,
    )
    if bounds.most_runs is not None:
        fraction = max(fraction, runs / bounds.most_runs)
    thinned = samples[:: max(1, runs // INTERIM_SAMPLES)]
    return Progress(
        stage=stage,
        runs=runs,
        elapsed_seconds=elapsed,
        fraction=1.0 if over else min(fraction, 1.0),
        median_seconds=stats.median(thinned) / 1e9 if thinned else None,
    )


@contextmanager
def _collector_at_rest() -> Iterator[None]:
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


def involuntary_context_switches() -> Optional[int]:
    """Times the kernel took the processor away from any thread of this process; None where it can't say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


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
