"""Calls timed one after the other, and how long each had to wait for a processor.

A processor that does other work, too, makes a call longer by the time in which the calling thread is ready to
run and has none. Linux counts that time for every thread: the second of the three numbers in its schedstat
(Documentation/scheduler/sched-stats.rst), in nanoseconds. What is left of a duration is the call's own, on a
busy board as on an idle one.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Iterable, List, Optional, Sequence, Tuple

SCHEDSTAT = Path("/proc/thread-self/schedstat")


@dataclass(frozen=True)
class Lap:
    """Seconds that a call took, those of them in which its thread had no processor, and those on processors.

    The last are those of all threads of the process.
    """

    seconds: float
    queued_seconds: float = 0.0
    cpu_seconds: float = 0.0

    @property
    def own_seconds(self) -> float:
        """What it would have taken with a processor to itself."""
        return self.seconds - self.queued_seconds

    def less(self, seconds: float) -> Lap:
        """The lap without something that belongs to no call and takes so long of its own."""
        return replace(self, seconds=max(self.seconds - seconds, self.queued_seconds, 0.0))

    def __add__(self, other: Lap) -> Lap:
        """Both, one after the other."""
        return Lap(
            self.seconds + other.seconds,
            self.queued_seconds + other.queued_seconds,
            self.cpu_seconds + other.cpu_seconds,
        )


class Track:
    """Times the calls of one thread; ``with`` closes it."""

    def __init__(self, schedstat: Path = SCHEDSTAT) -> None:
        """Opens what the kernel tells of the thread that makes it, where it tells anything."""
        self._file: Optional[int] = None
        try:
            # Kept open: opening it anew between two calls takes longer than many a call.
            self._file = os.open(schedstat, os.O_RDONLY)
            if self._queued_nanoseconds() is None:
                self.close()
        except OSError:
            pass

    def __enter__(self) -> Track:
        """Itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes it."""
        self.close()

    def close(self) -> None:
        """Lets go of the kernel's file. Idempotent."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def knows_queue(self) -> bool:
        """Whether the kernel tells how long the thread waits for a processor."""
        return self._file is not None

    def laps(self, calls: Sequence[Callable[[], object]], turns: Iterable[object]) -> List[Tuple[Lap, ...]]:
        """A lap for each call, for every turn in which all are called one after the other."""
        clock, cpu_clock, all_cpu_clock = time.perf_counter_ns, time.thread_time_ns, time.process_time_ns
        found = []
        for _ in turns:
            taken = []
            for call in calls:
                queued, all_cpu, cpu = self._queued_nanoseconds(), all_cpu_clock(), cpu_clock()
                start = clock()
                call()
                nanoseconds = clock() - start
                cpu, all_cpu = cpu_clock() - cpu, all_cpu_clock() - all_cpu
                if queued is not None:
                    # While the readings themselves were made the thread may have waited, too; it can't have
                    # waited while it ran.
                    queued = min((self._queued_nanoseconds() or queued) - queued, max(nanoseconds - cpu, 0))
                taken.append(Lap(nanoseconds / 1e9, (queued or 0) / 1e9, all_cpu / 1e9))
            found.append(tuple(taken))
        return found

    def _queued_nanoseconds(self) -> Optional[int]:
        if self._file is None:
            return None
        numbers = os.pread(self._file, 128, 0).split()
        return int(numbers[1]) if len(numbers) == 3 and numbers[1].isdigit() else None
