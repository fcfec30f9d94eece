"""What was sampled, asked for by stretches of time; and the same as a message of the wire."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from boardbench.agent.board.sampler import Cost, Mark, Series
from boardbench.v1 import telemetry_pb2


@dataclass(frozen=True)
class Point:
    """A value at a time; of a thinned series the mean of a stretch, with its extremes."""

    seconds: float
    value: float
    least: float
    greatest: float


class Timeline:
    """Series by quantity and source, on the sampler's axis."""

    def __init__(self, series: Mapping[tuple[str, str], Series]) -> None:
        self._series = series

    def sources(self, quantity: str) -> list[str]:
        """Of which parts there is such a quantity."""
        return [source for name, source in self._series if name == quantity]

    def within(self, quantity: str, source: str, begin: float, end: float) -> list[Point]:
        """What was sampled from ``begin`` to ``end``, both included."""
        series = self._series.get((quantity, source))
        if series is None:
            return []
        first, last = bisect_left(series.times, begin), bisect_right(series.times, end)
        return [_point(series, at) for at in range(first, last)]

    def last(self, quantity: str, source: str, end: float = float("inf")) -> Point | None:
        """The latest sample up to ``end``."""
        series = self._series.get((quantity, source))
        at = -1 if series is None else bisect_right(series.times, end) - 1
        return _point(series, at) if series is not None and at >= 0 else None

    def first(self, quantity: str, source: str, begin: float = 0.0) -> Point | None:
        """The earliest sample from ``begin`` on."""
        series = self._series.get((quantity, source))
        at = 0 if series is None else bisect_left(series.times, begin)
        return _point(series, at) if series is not None and at < len(series.times) else None

    def around(self, quantity: str, source: str, begin: float, end: float) -> list[Point]:
        """As :meth:`within`, and the first sample after it: a mark is sampled just after it was set."""
        found = self.within(quantity, source, begin, end)
        after = self.first(quantity, source, end)
        if after is not None and (not found or after.seconds > found[-1].seconds):
            found.append(after)
        return found

    def mean(self, quantity: str, source: str, begin: float, end: float) -> float | None:
        """Mean over the time from ``begin`` to ``end``; None without a sample there."""
        points = self.within(quantity, source, begin, end)
        if not points:
            return None
        if len(points) == 1:
            return points[0].value
        # Trapezes: samples that are close to each other, as at a mark, count for less time.
        area = sum(
            (after.seconds - before.seconds) * (after.value + before.value) / 2
            for before, after in pairwise(points)
        )
        return area / (points[-1].seconds - points[0].seconds)

    def rise(self, quantity: str, source: str, begin: float, end: float) -> float:
        """By how much a counter rose, from the last sample before ``begin`` to the first after ``end``."""
        before = self.last(quantity, source, begin) or self.first(quantity, source)
        after = self.first(quantity, source, end) or self.last(quantity, source)
        return after.value - before.value if before is not None and after is not None else 0.0


def _point(series: Series, at: int) -> Point:
    value = series.values[at]
    least = value if series.least is None else series.least[at]
    greatest = value if series.greatest is None else series.greatest[at]
    return Point(series.times[at], value, least, greatest)


def fastest(
    timeline: Timeline, sources: Sequence[str], begin: float, end: float
) -> list[tuple[float, float]]:
    """Seconds and frequency of whichever of these processors was clocked highest, at every sample."""
    return [(seconds, max(values)) for seconds, values in _together(timeline, sources, begin, end)]


def mean_of_all(
    timeline: Timeline, sources: Sequence[str], begin: float, end: float
) -> list[tuple[float, float]]:
    """Seconds and mean frequency of these processors, at every sample."""
    return [
        (seconds, sum(values) / len(values)) for seconds, values in _together(timeline, sources, begin, end)
    ]


def _together(
    timeline: Timeline, sources: Sequence[str], begin: float, end: float
) -> Iterator[tuple[float, list[float]]]:
    """What all of them had at the times of the one that was sampled most often."""
    series = [
        points for source in sources if (points := timeline.within("frequency_hertz", source, begin, end))
    ]
    if not series:
        return
    positions = [0] * len(series)
    for point in max(series, key=len):
        values = []
        for which, points in enumerate(series):
            # The nearest: one tick reads them one after the other.
            at = positions[which]
            while at + 1 < len(points) and abs(points[at + 1].seconds - point.seconds) <= abs(
                points[at].seconds - point.seconds
            ):
                at += 1
            positions[which] = at
            values.append(points[at].value)
        yield point.seconds, values


def to_message(
    series: Mapping[tuple[str, str], Series], marks: Sequence[Mark], cost: Cost, hertz: float
) -> telemetry_pb2.Telemetry:
    """All of it as it goes into a result."""
    message = telemetry_pb2.Telemetry(rate_hertz=hertz, cpu_seconds=cost.cpu_seconds, left_out=cost.left_out)
    if cost.cpu_share is not None:
        message.cpu_share = cost.cpu_share
    for each in series.values():
        message.series.add(
            quantity=each.quantity,
            source=each.source,
            cumulative=each.cumulative,
            times_seconds=each.times,
            values=each.values,
            least=each.least or (),
            greatest=each.greatest or (),
        )
    for mark in marks:
        message.marks.add(time_seconds=mark.seconds, label=mark.label)
    return message
