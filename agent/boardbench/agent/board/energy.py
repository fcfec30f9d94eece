"""Energy of a stretch of time, and of one inference in it, from what the sampler saw.

From power: integrated over time by trapezoids, the power at the edges of the stretch interpolated between the
samples on either side. From an energy counter: its difference, interpolated likewise.

The bounds are about sampling and nothing else: the error of the meter itself is not in them. Power between
samples is not known, so the mean of the samples has the bounds of a mean (Student's, 95 %, fewer samples
where neighbours resemble each other), and at each edge the power may have been that of either neighbour. A
counter leaves nothing out: its bounds are its values next to the edges, and certain.

Idle is what the board took before the run, by the same rail: what remains is what the inferences added.
Bounds of a difference add up, so they are wide rather than narrow.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median, stdev

from boardbench.agent.board.sampler import Mark, Series
from boardbench.agent.board.sensor import Coverage

# Student's t for 95 % on both sides, by degrees of freedom from 1 on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145,
      2.131, 2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048,
      2.045, 2.042)  # fmt: skip
# Samples below which a mean says too little.
_LEAST_SAMPLES = 2
# An edge that is so many usual gaps away from the next sample was not watched.
_MOST_GAPS = 3.0
# Sums over a run that are as close as this are the same: no sensor tells them apart, and doubles hardly do.
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Rail:
    """A place where power or energy is measured."""

    name: str
    coverage: Coverage
    series: Series

    @property
    def counts(self) -> bool:
        """Whether it is an energy counter; otherwise power is sampled."""
        return self.series.cumulative


@dataclass(frozen=True)
class Energy:
    """Energy of a stretch of time at one rail."""

    rail: Rail
    joules: float
    low_joules: float
    high_joules: float
    seconds: float
    samples: int
    """In the stretch; each may be the mean of several."""

    unchanged: bool = False
    """Whether they are all the same: the meter may be slower than the stretch, and no bounds show it."""

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds

    @property
    def low_watts(self) -> float:
        """Lower bound of the mean power."""
        return self.low_joules / self.seconds

    @property
    def high_watts(self) -> float:
        """Upper bound of the mean power."""
        return self.high_joules / self.seconds

    @property
    def method(self) -> str:
        """What the rail feeds and how energy was got from it."""
        how = "difference of its energy counter" if self.rail.counts else "its power integrated over time"
        alike = ", all the same" if self.unchanged else ""
        return f"{self.rail.coverage.words}, {how}, {self.samples} samples{alike}"


@dataclass(frozen=True)
class PerInference:
    """Energy of the counted inferences, and of one."""

    run: Energy
    idle: Energy | None
    inferences: int
    joules: float | None
    """Of one, idle subtracted; None where idle was not measured."""

    low_joules: float | None
    high_joules: float | None

    @property
    def total_joules(self) -> float:
        """Of one, idle included."""
        return self.run.joules / self.inferences

    @property
    def method(self) -> str:
        """What the rail feeds, how energy was got from it, and what became of idle."""
        if self.idle is None:
            return f"{self.run.method}; idle not measured"
        before = f"idle before the run subtracted ({self.idle.watts:.3g} W over {self.idle.seconds:.3g} s)"
        return f"{self.run.method}; {before}"


def rails(series: Mapping[tuple[str, str], Series], *, on_accelerator: bool = False) -> tuple[Rail, ...]:
    """Every rail that was sampled, the widest first, and of equals the one with a counter.

    ``on_accelerator``: a graphics card with a supply of its own comes before the processor's package.
    """
    found = [
        Rail(each.source, each.coverage, each)
        for each in series.values()
        if each.coverage is not None and each.quantity in ("power_watts", "energy_joules")
    ]

    def rank(rail: Rail) -> tuple[int, bool, str]:
        width = int(rail.coverage)
        if on_accelerator and rail.coverage in (Coverage.DEVICE, Coverage.CHIP):
            width = Coverage.DEVICE + Coverage.CHIP - width
        return -width, not rail.counts, rail.name

    return tuple(sorted(found, key=rank))


def choose(found: Sequence[Rail], wanted: str = "") -> Rail | None:
    """The rail to count on: the one that is called so, else the widest; see :func:`why_none`.

    Of parts only, none is the board: one that is alone is taken, of several none.
    """
    if wanted:
        return next((rail for rail in found if rail.name == wanted), None)
    if found and found[0].coverage > Coverage.RAIL:
        return found[0]
    return found[0] if len({rail.name for rail in found}) == 1 else None


def why_none(found: Sequence[Rail], wanted: str = "") -> str:
    """Why :func:`choose` found none, and what to do."""
    names = ", ".join(dict.fromkeys(rail.name for rail in found))
    if wanted:
        return f"there is no rail {wanted!r} here; there are {names or 'none'}"
    if not found:
        return "nothing on this board tells power or energy"
    return f"none of the rails here holds the others, name the one that counts: {names}"


def window(marks: Iterable[Mark], what: str) -> tuple[float, float] | None:
    """Begin and end of the last stretch between the marks ``…_begins`` and ``…_ends``; None without them."""
    begin: float | None = None
    found: tuple[float, float] | None = None
    for mark in marks:
        if mark.label == f"{what}_begins":
            begin = mark.seconds
        elif mark.label == f"{what}_ends" and begin is not None:
            found = (begin, mark.seconds)
            begin = None
    return found


def over(rail: Rail, begin: float, end: float) -> Energy | None:
    """Energy between two moments of the sampler's axis; None where too few samples tell."""
    if not end > begin:
        return None
    times, values = rail.series.times, rail.series.values
    first, last = bisect_left(times, begin), bisect_right(times, end)
    # Of the samples on the edges' far side, those that are near enough to say something.
    reach = _MOST_GAPS * _usual_gap(times, first, last)
    before = first - 1 if first > 0 and begin - times[first - 1] <= reach else None
    after = last if last < len(times) and times[last] - end <= reach else None
    if last - first < _LEAST_SAMPLES or times[first] - begin > reach or end - times[last - 1] > reach:
        return None
    head = _Edge(begin, times, values, first, before)
    tail = _Edge(end, times, values, last - 1, after)
    return _counted(rail, head, tail) if rail.counts else _integrated(rail, head, tail)


def per_inference(
    series: Mapping[tuple[str, str], Series],
    marks: Sequence[Mark],
    inferences: int,
    *,
    wanted: str = "",
    on_accelerator: bool = False,
) -> PerInference | None:
    """Energy of the inferences between the marks of the measurement; None where there is no rail that tells.

    Idle is what lies between the marks of "idle", where they are.
    """
    rail = choose(rails(series, on_accelerator=on_accelerator), wanted)
    measured = window(marks, "measurement")
    run = over(rail, *measured) if rail is not None and measured is not None else None
    if rail is None or run is None or inferences < 1:
        return None
    before = window(marks, "idle")
    idle = over(rail, *before) if before is not None else None
    if idle is None:
        return PerInference(run, None, inferences, None, None, None)
    seconds = run.seconds
    return PerInference(
        run,
        idle,
        inferences,
        _beyond(run.joules, idle.watts * seconds) / inferences,
        _beyond(run.low_joules, idle.high_watts * seconds) / inferences,
        _beyond(run.high_joules, idle.low_watts * seconds) / inferences,
    )


def _beyond(joules: float, idle: float) -> float:
    """What is left of ``joules``; a rail that stood still leaves nothing, and not what rounding leaves."""
    return 0.0 if math.isclose(joules, idle, rel_tol=_ROUNDING) else joules - idle


@dataclass(frozen=True)
class _Edge:
    """An edge of the stretch, with the sample inside and, where there is one, the sample outside."""

    at: float
    times: Sequence[float]
    values: Sequence[float]
    inside: int
    outside: int | None

    @property
    def gap(self) -> float:
        """Seconds between the edge and the sample inside."""
        return abs(self.times[self.inside] - self.at)

    @property
    def value(self) -> float:
        """At the edge: on the line between the two, or as inside where there is nothing outside."""
        inner = self.values[self.inside]
        if self.outside is None:
            return inner
        span = self.times[self.outside] - self.times[self.inside]
        return inner + (self.values[self.outside] - inner) * (self.at - self.times[self.inside]) / span


def _usual_gap(times: Sequence[float], first: int, last: int) -> float:
    around = times[max(0, first - 1) : last + 1]
    gaps = [after - before for before, after in pairwise(around)]
    return median(gaps) if gaps else 0.0


def _integrated(rail: Rail, head: _Edge, tail: _Edge) -> Energy:
    inner = range(head.inside, tail.inside + 1)
    times = [head.at, *(head.times[at] for at in inner), tail.at]
    # A merged point is the mean of a stretch that ends where the marks are: it holds up to there.
    merged = rail.series.least is not None
    ends = [edge.values[edge.inside] if merged else edge.value for edge in (head, tail)]
    watts = [ends[0], *(head.values[at] for at in inner), ends[1]]
    joules = sum(
        (times[at + 1] - times[at]) * (watts[at + 1] + watts[at]) / 2 for at in range(len(times) - 1)
    )
    seconds = tail.at - head.at
    around = _half_width(watts[1:-1]) * seconds
    for edge in (head, tail):
        # Where the power changed between the two samples is not known.
        step = 0.0 if edge.outside is None else abs(edge.values[edge.outside] - edge.values[edge.inside])
        around += edge.gap * step
    unchanged = min(watts[1:-1]) == max(watts[1:-1])
    return Energy(rail, joules, joules - around, joules + around, seconds, len(inner), unchanged)


def _counted(rail: Rail, head: _Edge, tail: _Edge) -> Energy:
    values, times = head.values, head.times
    inside = values[tail.inside] - values[head.inside]
    rate = inside / (times[tail.inside] - times[head.inside])
    joules, low, high = inside, inside, inside
    for edge in (head, tail):
        if edge.outside is None:
            # Nobody looked there: as fast as inside, or not at all, or twice as fast.
            joules += rate * edge.gap
            high += 2 * rate * edge.gap
        elif edge.gap:
            joules += abs(edge.value - values[edge.inside])
            high += abs(values[edge.outside] - values[edge.inside])
    return Energy(rail, joules, low, high, tail.at - head.at, tail.inside - head.inside + 1)


def _half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean."""
    count = len(values)
    spread = stdev(values)
    if spread == 0.0:
        return 0.0
    effective = max(2.0, count * _independence(values))
    degrees = int(effective) - 1
    factor = _T[degrees - 1] if degrees <= len(_T) else 1.96 + 2.372 / degrees
    return factor * spread / math.sqrt(effective)


def _independence(values: Sequence[float]) -> float:
    """How much one sample is worth, 0 to 1, by how much neighbours resemble each other (AR(1))."""
    mean = fmean(values)
    all_of_it = sum((value - mean) ** 2 for value in values)
    shared = sum((a - mean) * (b - mean) for a, b in pairwise(values))
    # The estimate is too low by about this much (Marriott and Pope, 1954), the more the fewer there are.
    likeness = shared / all_of_it
    likeness = min(0.99, likeness + (1 + 4 * likeness) / len(values))
    return 1.0 if likeness <= 0 else (1 - likeness) / (1 + likeness)
