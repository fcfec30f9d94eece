"""Samples the board's sensors on one time axis, from outside the worker, and says what that cost.

One thread reads each sensor some times a second. The axis is seconds since the start, by the monotonic
clock; a reading stands at the middle of the read that brought it. A tick that comes too late is skipped,
never made up for. Nothing that a sensor does ends the sampling: a failure is counted, and the sensor tried
again more seldom; one that may not be read is left out.

Sampling must not disturb what it watches: its CPU time is counted, by sensor, and when it exceeds the share
of one processor that it may take, the dearest sensor is read half as often, down to once in two seconds, and
then left out. Which, and why, is told.

Memory is bounded: a series that reaches its limit is thinned to half, and from then on a point is made of
twice as many samples, so that all are alike. Values are merged in pairs into their mean, with the least and
the greatest kept; of a counter every second one is dropped, since each says all that went before. Nothing
is merged across a mark, so what happened between two marks stays apart.
"""

from __future__ import annotations

import errno
import math
import threading
import time
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from boardbench.agent.board.sensor import Coverage, Reading, Sensor, child_cpu_seconds, period_seconds

HERTZ = 10.0
"""Enough to see a power supply sag and a clock drop; what it costs is bounded by :data:`COST_SHARE`."""

MOST_HERTZ = 100.0
"""Beyond it sensors say the same again: power monitors average over some milliseconds."""

COST_SHARE = 0.02
"""Of one processor. A board with two loses a hundredth at most, and the kernel puts the sampler where the
worker is not; two dozen sensors take 0.8 % of a server's processor, and some times that of a small one's."""

POINTS = 4096
"""That a series has at most: an hour at ten a second becomes a point each 1.6 seconds. One takes 16 bytes, a
merged one 32."""

MOST_SERIES = 512
"""A board has some dozens; by process, a GPU may have many."""

_SLOWEST_SECONDS = 2.0
_COST_EACH_SECONDS = 1.0
# Reads at whose cost is looked: the first opens files for the first time.
_LEAST_READS = 4
# A sensor that fails is tried again after this many times its interval, doubling.
_MOST_PATIENCE = 32
# Weight of the newest read in the mean cost of a sensor.
_NEWEST = 0.25
_MOST_MARKS = 256


@dataclass(frozen=True)
class Mark:
    """A moment on the axis: "idle_begins", "measurement_ends"."""

    seconds: float
    label: str


@dataclass(frozen=True)
class Series:
    """Values of one quantity and source over time."""

    quantity: str
    source: str
    cumulative: bool
    coverage: Coverage | None
    times: Sequence[float]
    """Seconds since the start, rising; of merged samples the mean."""

    values: Sequence[float]
    """Of merged samples the mean."""

    least: Sequence[float] | None = None
    """Of each point; None where nothing was merged."""

    greatest: Sequence[float] | None = None
    """Of each point; None where nothing was merged."""


@dataclass(frozen=True)
class SensorCost:
    """What reading one sensor took."""

    name: str
    reads: int
    failures: int
    cpu_seconds: float
    """Of the sampler's thread, and of programs that the sensor started."""

    wall_seconds: float
    slowest_seconds: float
    """The longest read."""

    interval_seconds: float
    """Between reads at the end; longer than the sampler's where it cost too much, or failed."""

    left_out: str = ""
    """Why it was read no more; empty when it was read to the end."""

    last_failure: str = ""


@dataclass(frozen=True)
class Cost:
    """What sampling took."""

    cpu_seconds: float
    wall_seconds: float
    ticks: int
    skipped_ticks: int
    """That were due while the one before was still going on, or the thread got no processor."""

    sensors: tuple[SensorCost, ...]

    @property
    def cpu_share(self) -> float | None:
        """Of one processor; None before anything was sampled."""
        return self.cpu_seconds / self.wall_seconds if self.wall_seconds > 0 else None

    @property
    def left_out(self) -> tuple[str, ...]:
        """Sensors that were left out, failed or were read less often, each with the reason."""
        found = []
        for sensor in self.sensors:
            if sensor.left_out:
                found.append(f"{sensor.name}: {sensor.left_out}")
            elif sensor.failures:
                found.append(f"{sensor.name}: failed {sensor.failures} times, last: {sensor.last_failure}")
        return tuple(found)


class _Points:
    """A series that grows, every point of as many samples as any other.

    What came since the last point waits until it is as much as a point, or a mark is passed.
    """

    def __init__(self, limit: int, first: Reading) -> None:
        self._limit = limit
        self._cumulative = first.cumulative
        self._coverage = first.coverage
        self._times: array[float] = array("d")
        self._values: array[float] = array("d")
        self._least: array[float] | None = None
        self._greatest: array[float] | None = None
        self._samples_each = 1
        self._waiting = _Waiting()
        self._next_mark = 0
        self.last_seconds = -math.inf
        self.last_value = first.value

    def add(self, seconds: float, value: float, marks: Sequence[Mark]) -> None:
        """``marks`` are all so far."""
        if seconds <= self.last_seconds:
            return
        begins = not self._times and not self._waiting.count
        while self._next_mark < len(marks) and marks[self._next_mark].seconds <= seconds:
            self._next_mark += 1
            begins = True
            self._settle()
        self.last_seconds, self.last_value = seconds, value
        if self._samples_each == 1:
            # Most runs are over before anything is thinned.
            self._times.append(seconds)
            self._values.append(value)
        else:
            self._waiting.add(seconds, value)
            # The first of a counter stays by itself: what it rose by begins there.
            if self._waiting.count >= self._samples_each or (begins and self._cumulative):
                self._settle()
        if len(self._times) >= self._limit:
            self._thin([mark.seconds for mark in marks])

    def series(self, quantity: str, source: str) -> Series:
        times, values = self._times[:], self._values[:]
        least = None if self._least is None else self._least[:]
        greatest = None if self._greatest is None else self._greatest[:]
        if self._waiting.count:
            seconds, value, low, high = self._waiting.point(self._cumulative)
            times.append(seconds)
            values.append(value)
            if least is not None and greatest is not None:
                least.append(low)
                greatest.append(high)
        return Series(quantity, source, self._cumulative, self._coverage, times, values, least, greatest)

    def _settle(self) -> None:
        """Makes a point of what waits."""
        if not self._waiting.count:
            return
        seconds, value, low, high = self._waiting.point(self._cumulative)
        self._times.append(seconds)
        self._values.append(value)
        if self._least is not None and self._greatest is not None:
            self._least.append(low)
            self._greatest.append(high)
        self._waiting = _Waiting()

    def _thin(self, marks: Sequence[float]) -> None:
        """Halves the number of points; stretches between marks are thinned each by itself."""
        count = len(self._times)
        least = self._values if self._least is None else self._least
        greatest = self._values if self._greatest is None else self._greatest
        times, values, lows, highs = array("d"), array("d"), array("d"), array("d")
        for begin, end in _stretches(self._times, marks):
            at = begin
            while at < end:
                # The first and the last of a counter between marks stay: their difference is asked for.
                alone = at + 1 >= end or (self._cumulative and at in (begin, end - 2))
                pair = slice(at, at + 1 if alone else at + 2)
                at = pair.stop
                if self._cumulative:
                    # The later one: a counter says all that went before.
                    times.append(self._times[at - 1])
                    values.append(self._values[at - 1])
                else:
                    times.append(_mean(self._times[pair]))
                    values.append(_mean(self._values[pair]))
                    lows.append(min(least[pair]))
                    highs.append(max(greatest[pair]))
        self._times, self._values = times, values
        if not self._cumulative:
            self._least, self._greatest = lows, highs
        self._samples_each *= 2
        if len(times) > count * 3 // 4:
            # Marks close to each other leave little to merge.
            self._limit *= 2


@dataclass
class _Waiting:
    """Samples that are not yet a point."""

    count: int = 0
    seconds: float = 0.0
    total: float = 0.0
    least: float = math.inf
    greatest: float = -math.inf
    last_seconds: float = 0.0
    last: float = 0.0

    def add(self, seconds: float, value: float) -> None:
        self.count += 1
        self.seconds += seconds
        self.total += value
        self.least = min(self.least, value)
        self.greatest = max(self.greatest, value)
        self.last_seconds, self.last = seconds, value

    def point(self, cumulative: bool) -> tuple[float, float, float, float]:
        """Time, value, least, greatest."""
        if cumulative:
            return self.last_seconds, self.last, self.least, self.greatest
        return self.seconds / self.count, self.total / self.count, self.least, self.greatest


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _stretches(times: array[float], marks: Sequence[float]) -> Iterable[tuple[int, int]]:
    """Ranges of indices between the marks."""
    begin = 0
    for mark in marks:
        end = begin
        while end < len(times) and times[end] < mark:
            end += 1
        if end > begin:
            yield begin, end
        begin = end
    if begin < len(times):
        yield begin, len(times)


class _Watched:
    """A sensor with what is known of it."""

    def __init__(self, sensor: Sensor, interval_seconds: float) -> None:
        self.sensor = sensor
        self.name = sensor.name
        self.interval_seconds = max(interval_seconds, period_seconds(sensor))
        self.due_seconds = 0.0
        self.reads = 0
        self.failures = 0
        self.failed_in_a_row = 0
        self.cpu_seconds = 0.0
        self.wall_seconds = 0.0
        self.slowest_seconds = 0.0
        self.mean_cpu_seconds = 0.0
        self.mean_wall_seconds = 0.0
        self.left_out = ""
        self.last_failure = ""
        # Whether it tells the power of more than a part: energy hangs on it.
        self.tells_total = False

    @property
    def patient_seconds(self) -> float:
        """Until the next read, longer after failures."""
        return self.interval_seconds * min(1 << min(self.failed_in_a_row, 16), _MOST_PATIENCE)

    def took(self, cpu_seconds: float, wall_seconds: float) -> None:
        self.reads += 1
        self.cpu_seconds += cpu_seconds
        self.wall_seconds += wall_seconds
        self.slowest_seconds = max(self.slowest_seconds, wall_seconds)
        # The first read is dearer than all others.
        weight = 1.0 if self.reads <= 2 else _NEWEST
        self.mean_cpu_seconds += weight * (cpu_seconds - self.mean_cpu_seconds)
        self.mean_wall_seconds += weight * (wall_seconds - self.mean_wall_seconds)

    def cost(self) -> SensorCost:
        return SensorCost(
            self.name,
            self.reads,
            self.failures,
            self.cpu_seconds,
            self.wall_seconds,
            self.slowest_seconds,
            self.interval_seconds,
            self.left_out,
            self.last_failure,
        )


class Sampler:
    """Samples sensors from :meth:`start` to :meth:`stop`. Its methods may be called from any thread."""

    def __init__(
        self,
        sensors: Iterable[Sensor],
        *,
        hertz: float = HERTZ,
        cost_share: float = COST_SHARE,
        points: int = POINTS,
        clock: Callable[[], float] = time.monotonic,
        cpu_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        """``cost_share``: of one processor; 0: whatever it costs. ``hertz`` is cut to what makes sense."""
        if not hertz > 0:
            raise ValueError(f"hertz is above 0, not {hertz}")
        self.hertz = min(hertz, MOST_HERTZ)
        self._interval_seconds = 1 / self.hertz
        self._cost_share = cost_share
        self._points = max(16, points)
        self._clock = clock
        self._cpu_clock = cpu_clock
        self._watched = [_Watched(sensor, self._interval_seconds) for sensor in sensors]
        self._series: dict[tuple[str, str], _Points] = {}
        self._marks: list[Mark] = []
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._thread: threading.Thread | None = None
        self._began: float | None = None
        self._ended: float | None = None
        self._cpu_seconds = 0.0
        self._own_cpu_seconds = 0.0
        self._ticks = 0
        self._skipped = 0
        self._judged_seconds = 0.0

    @property
    def now(self) -> float:
        """Seconds since the start; 0 before it."""
        return 0.0 if self._began is None else self._clock() - self._began

    def start(self) -> None:
        """Begins to sample, in a thread of its own. Called once."""
        if self._thread is not None:
            raise RuntimeError("a sampler is started once")
        self.begin()
        self._thread = threading.Thread(target=self._run, name="boardbench-sampler", daemon=True)
        self._thread.start()

    def begin(self) -> None:
        """Begins the time axis, without a thread: for whoever calls :meth:`sample` by himself."""
        if self._began is None:
            self._began = self._clock()

    def stop(self, timeout_seconds: float = 10.0) -> None:
        """Ends the sampling; what was sampled stays. Idempotent. Waits no longer for a read that hangs."""
        self._stopping = True
        self._wake.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout_seconds)
        with self._lock:
            if self._ended is None and self._began is not None:
                self._ended = self.now

    def mark(self, label: str) -> float:
        """Notes what happens now, and samples at once, so that there is a reading near it; its time."""
        with self._lock:
            seconds = self.now
            if len(self._marks) < _MOST_MARKS:
                self._marks.append(Mark(seconds, label))
        self._wake.set()
        return seconds

    @property
    def marks(self) -> tuple[Mark, ...]:
        """All marks so far, in their order."""
        with self._lock:
            return tuple(self._marks)

    def series(self) -> Mapping[tuple[str, str], Series]:
        """What was sampled so far, by quantity and source; a copy."""
        with self._lock:
            return {key: points.series(*key) for key, points in self._series.items()}

    def latest(self, quantity: str) -> dict[str, float]:
        """The newest value of each source of a quantity."""
        with self._lock:
            return {
                source: points.last_value
                for (name, source), points in self._series.items()
                if name == quantity
            }

    @property
    def cost(self) -> Cost:
        """What it took so far."""
        with self._lock:
            return Cost(
                cpu_seconds=self._cpu_seconds,
                wall_seconds=self.now if self._ended is None else self._ended,
                ticks=self._ticks,
                skipped_ticks=self._skipped,
                sensors=tuple(watched.cost() for watched in self._watched),
            )

    # --- in the thread

    def _run(self) -> None:
        number = 0
        while not self._stopping:
            self._wake.clear()
            self.sample()
            # Ticks have their places from the start on: a late one does not move those after it.
            due = math.floor(self.now / self._interval_seconds) + 1
            if due > number + 1:
                with self._lock:
                    self._skipped += due - number - 1
            number = due
            while not self._stopping:
                wait = number * self._interval_seconds - self.now
                if wait <= 0:
                    break
                if self._wake.wait(wait):
                    self._wake.clear()
                    if not self._stopping:
                        # Somebody set a mark: what is read now stands beside it.
                        self.sample(all_of_them=True)

    def sample(self, *, all_of_them: bool = False) -> None:
        """Reads every sensor that is due; with ``all_of_them`` also others, but those that are slow."""
        begun = self._cpu_clock()
        now = self.now
        # A tick comes a little early or late; an interval is not missed for that.
        slack = self._interval_seconds / 4
        for watched in self._watched:
            if self._stopping:
                break
            if watched.left_out:
                continue
            early = all_of_them and watched.interval_seconds <= self._interval_seconds
            if watched.due_seconds <= now + slack or (early and not watched.failed_in_a_row):
                self._read(watched)
                watched.due_seconds = now + watched.patient_seconds
        programs = sum(child_cpu_seconds(watched.sensor) for watched in self._watched)
        with self._lock:
            self._ticks += 1
            self._own_cpu_seconds += self._cpu_clock() - begun
            self._cpu_seconds = self._own_cpu_seconds + programs
        if self._cost_share > 0 and now - self._judged_seconds >= _COST_EACH_SECONDS:
            self._judged_seconds = now
            self._economise()

    def _read(self, watched: _Watched) -> None:
        cpu, wall = self._cpu_clock(), self._clock()
        programs = child_cpu_seconds(watched.sensor)
        readings: list[Reading] = []
        failure = ""
        try:
            for reading in watched.sensor.read():
                readings.append(reading)  # noqa: PERF402 - what comes before a failure is kept
        except OSError as error:
            failure = str(error) or type(error).__name__
            if error.errno in (errno.EACCES, errno.EPERM):
                watched.left_out = f"may not be read: {failure}"
        except Exception as error:  # a fault of ours must not end the sampling
            failure = f"{type(error).__name__}: {error}"
            watched.left_out = f"a fault of boardbench: {failure}"
        ended = self._clock()
        took = self._cpu_clock() - cpu + child_cpu_seconds(watched.sensor) - programs
        seconds = (wall + ended) / 2 - (self._began or 0.0)
        with self._lock:
            watched.took(took, ended - wall)
            if failure:
                watched.failures += 1
                watched.failed_in_a_row += 1
                watched.last_failure = failure
            else:
                watched.failed_in_a_row = 0
            for reading in readings:
                watched.tells_total |= reading.coverage is not None and reading.coverage > Coverage.RAIL
                self._keep(seconds, reading)

    def _keep(self, seconds: float, reading: Reading) -> None:
        if not math.isfinite(reading.value):
            return
        key = (reading.quantity, reading.source)
        points = self._series.get(key)
        if points is None:
            if len(self._series) >= MOST_SERIES:
                return
            points = self._series[key] = _Points(self._points, reading)
        points.add(seconds, reading.value, self._marks)

    # --- what it costs

    def _economise(self) -> None:
        """Reads the dearest sensor less often while all together cost too much."""
        with self._lock:
            judged = [w for w in self._watched if not w.left_out and w.reads >= _LEAST_READS]
            for watched in judged:
                # One that takes as long as an interval keeps all others from their ticks.
                while watched.mean_wall_seconds > watched.interval_seconds / 2:
                    if not self._slow_down(watched, f"a read takes {watched.mean_wall_seconds * 1e3:.0f} ms"):
                        break
            judged = [watched for watched in judged if not watched.left_out]
            while judged:
                shares = {id(w): w.mean_cpu_seconds / w.interval_seconds for w in judged}
                together = sum(shares.values())
                if together <= self._cost_share:
                    return
                dearest = max(judged, key=lambda w: shares[id(w)] * (0.5 if w.tells_total else 1.0))
                why = (
                    f"all sensors together take {together:.1%} of a processor, more than "
                    f"{self._cost_share:.1%}, and this one {shares[id(dearest)]:.1%}"
                )
                if not self._slow_down(dearest, why):
                    judged.remove(dearest)

    @staticmethod
    def _slow_down(watched: _Watched, why: str) -> bool:
        """Reads it half as often; leaves it out, and returns False, when it is as seldom as can be."""
        if watched.interval_seconds < _SLOWEST_SECONDS:
            watched.interval_seconds = min(_SLOWEST_SECONDS, watched.interval_seconds * 2)
            return True
        watched.left_out = f"costs too much: {why}"
        return False
