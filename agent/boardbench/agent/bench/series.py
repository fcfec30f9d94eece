"""What the latencies say beyond their percentiles, in figures and in words.

- Drift: the latency at the end of the run is not what it was at the beginning, by a trend or by a step.
- Modes: the latencies gather around several values, well apart.
- Outliers: single inferences far from all others.
- Period: every k-th inference is slow.
- Dependence: neighbours resemble each other (:mod:`boardbench.agent.bench.dependence`).

Each is silent on at least 99 of 100 traces of independent samples, whatever their distribution: drift,
period and dependence look at ranks and at the order only, modes and outliers at shapes that chance does not
make. Each of them wants a size as well: what is sure and does not matter is not told.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from typing import Iterator, List, Optional, Sequence, Tuple

from boardbench.agent.bench import dependence, stats
from boardbench.agent.bench.dependence import Dependence

# Drift.

DRIFT = 0.02
"""Least change that is told: below it are changes that a board's clock makes by itself from run to run."""

DRIFT_SAMPLES = 40
"""Fewest samples: eight before a step, eight after it, and some between to know the noise by."""

DRIFT_PERCENTILES = ("50", "90")
"""Whose change is told: the median's, or else that of the slow ones, where more or slower ones came to be."""

_CELLS = 4096  # parts of the run that are looked at as wholes: finer tells no more and costs more
_STEP_CELLS = 8  # fewest on either side of a step: fewer are outliers, or a warm-up of one inference
_STRETCHES = 32  # whose percentiles a trend's size is taken from
_TREND_DEVIATES = 3.3  # 0.1 % of independent runs, two-sided
_STEP_DEVIATES = 4.1  # the greatest over all places: 0.2 % of independent runs, by simulation

# Modes.

MODE_SHARE = 0.05
"""Least share of the samples in a mode: fewer are outliers."""

MODE_DISTANCE = 0.03
"""Least distance of two modes as a share of the faster one's latency."""

MODE_SAMPLES = 60
"""Fewest samples: four windows of fifteen, two in each mode."""

_VALLEY = 3.0  # times that the density falls between modes: two normal ones then are 4 deviations apart
_VALLEY_DEVIATES = 4.5  # of the density's own error, where that is greater

# Outliers.

OUTLIER_SCORE = 14.826
"""Distance from the median in median absolute deviations: ten standard deviations of a normal distribution.

The limit of hyperfine (src/outlier_detection.rs, after Iglewicz & Hoaglin, 1993).
"""

OUTLIER_LOG_SCORE = 9.64
"""The same on logarithms, 6.5 deviations: a skewed distribution has a long tail and no outliers in it."""

OUTLIER_RATIO = 1.1
"""Least ratio to the median, or to its inverse: a steady model's outlier of 1 % is of no consequence."""

OUTLIER_SAMPLES = 20
"""Fewest samples: of fewer the median absolute deviation is not worth much."""

# Period.

PERIOD_RATIO = 1.05
"""Least ratio of the slow inferences to the others."""

PERIOD_SLOTS = 8
"""Fewest places in the run where the slow inference is due."""

PERIOD_SAMPLES = 131_072
"""From the first on that are looked at: periods up to 16,384 in a second of a board's time."""

_PERIOD_HITS = 0.5  # share of these places at which it must be slow
_PERIOD_CHANCE = 1e-3  # of one false alarm, all periods and phases that were tried taken together
_PERIOD_REACH = (6, 64)  # later slow inferences, at least and at most, to which each one's distance is taken
_PERIOD_PAIRS = 100_000  # of slow inferences whose distances are taken: some 10 ms on a laptop
_PERIOD_CANDIDATES = 24  # distances that are looked at closer, for each share of slow inferences


@dataclass(frozen=True)
class Drift:
    """A change of the latency over the run.

    ``kind`` is "step" or "trend"; a step happens before the sample at ``position`` (from 0), a trend goes
    from the first to the last. ``ratio`` is the percentile after over that before.
    """

    kind: str
    position: int
    percentile: float
    ratio: float
    before_nanoseconds: int
    after_nanoseconds: int
    sentence: str


@dataclass(frozen=True)
class Mode:
    """One value around which latencies gather, and the share of them that do."""

    nanoseconds: int
    share: float


@dataclass(frozen=True)
class Modes:
    """At least two modes, in rising order.

    ``stretch`` is the mean number of inferences in one mode before the next; None where chance does that.
    """

    modes: Tuple[Mode, ...]
    stretch: Optional[float]
    sentence: str


@dataclass(frozen=True)
class Outliers:
    """Inferences far from all others."""

    slow: int
    fast: int
    worst_nanoseconds: int
    worst_position: int
    worst_ratio: float
    time_share: float
    """Part of the whole time that the slow ones took beyond the median."""
    sentence: str


@dataclass(frozen=True)
class Period:
    """Every ``every``-th inference is slow, the first at ``phase`` (from 0): ``hits`` of ``slots`` were."""

    every: int
    phase: int
    hits: int
    slots: int
    ratio: float
    sentence: str


@dataclass(frozen=True)
class Series:
    """All that was found; None is nothing to tell."""

    dependence: Dependence
    drift: Optional[Drift]
    modes: Optional[Modes]
    outliers: Optional[Outliers]
    period: Optional[Period]

    def sentences(self) -> Iterator[str]:
        """Each finding in words."""
        for finding in (self.drift, self.period, self.modes, self.outliers):
            if finding is not None:
                yield finding.sentence
        if self.dependence.sentence:
            yield self.dependence.sentence


def describe(samples: Sequence[int]) -> Series:
    """All findings about samples in the order they ran; at least one."""
    ordered = sorted(samples)
    return Series(
        dependence=stats.depends(samples, ordered),
        drift=drift(samples, ordered),
        modes=modes(samples, ordered),
        outliers=outliers(samples, ordered),
        period=period(samples),
    )


# Drift


def drift(samples: Sequence[int], ordered: Sequence[int], least: float = DRIFT) -> Optional[Drift]:
    """The change over the run where it is sure and at least ``least``; None else.

    Every sample counts as its rank. A step is looked for at every place: the greatest standardised difference
    between what comes before and after. A trend is the regression on time. What is left after both are taken
    away gives the standard error, as long as its likeness from one stretch to the next demands.
    """
    count = len(samples)
    if count < DRIFT_SAMPLES:
        return None
    size = -(-count // _CELLS)
    cells = _cells(samples, ordered, size)
    split = _split(cells)
    residuals = _residuals(cells, split)
    error = math.sqrt(_long_variance(residuals))
    if error <= 0:
        return None
    step = _difference(cells, split) / error
    trend = _slope(cells) / error
    if abs(step) < _STEP_DEVIATES and abs(trend) < _TREND_DEVIATES:
        return None
    # Regressions explain the more, the greater their deviate is.
    kind = "step" if abs(step) >= abs(trend) else "trend"
    for percentile in DRIFT_PERCENTILES:
        found = _drift(samples, kind, split * size, size, percentile)
        if found is not None and max(found.ratio, 1.0 / found.ratio) >= 1.0 + least:
            return found
    return None


def _drift(samples: Sequence[int], kind: str, position: int, reach: int, percentile: str) -> Optional[Drift]:
    """How far a drift has moved one percentile; None where it can't be said."""
    count = len(samples)
    if kind == "step":
        position = _refine(samples, position, reach)
        before = _percentile(samples[:position], percentile)
        after = _percentile(samples[position:], percentile)
    else:
        position = 0
        edges = [place * count // _STRETCHES for place in range(_STRETCHES + 1)]
        parts = [samples[part] for part in map(slice, edges, edges[1:])]
        # Through the stretches' percentiles: the median of all slopes, after Theil and Sen.
        values = [_percentile(part, percentile) for part in parts]
        slope = _middle([
            (values[second] - values[first]) / (second - first)
            for first in range(len(values))
            for second in range(first + 1, len(values))
        ])  # fmt: skip
        height = _middle([value - slope * place for place, value in enumerate(values)])
        # From the first sample to the last: half a stretch more on either side.
        before, after = round(height - slope / 2), round(height + slope * (len(values) - 0.5))
    if before <= 0 or after <= 0 or not _apart(samples, position or count // 2, percentile):
        return None
    ratio = after / before
    words = _drift_words(kind, position, count, ratio, percentile)
    return Drift(kind, position, float(percentile), ratio, before, after, words)


def _apart(samples: Sequence[int], position: int, percentile: str) -> bool:
    """Whether the percentile's bounds before and after do not overlap: the ranks may have moved elsewhere."""
    sides = []
    for side in (samples[:position], samples[position:]):
        ends = stats.bounds(percentile, len(side))
        if ends is None:
            return percentile == "50"
        ordered = sorted(side)
        sides.append((ordered[ends[0] - 1], ordered[ends[1] - 1]))
    (low, high), (other_low, other_high) = sides
    return high < other_low or other_high < low


def _drift_words(kind: str, position: int, count: int, ratio: float, percentile: str) -> str:
    slowest = "" if percentile == "50" else f"the slowest {100 - int(percentile)} % of "
    if kind == "trend":
        return f"{slowest}the inferences got {_change(ratio)} from the first to the last, little by little"
    if position <= count // 4:
        return f"{slowest}the first {position} inferences were {_change(1.0 / ratio)} than the rest"
    return f"from inference {position + 1} on {slowest}the inferences were {_change(ratio)} than before"


def _change(ratio: float) -> str:
    if ratio >= 1.95:
        return f"{ratio:.1f}× slower"
    return f"{ratio - 1.0:.0%} slower" if ratio > 1.0 else f"{1.0 - ratio:.0%} faster"


def _percentile(samples: Sequence[int], percentile: str) -> int:
    return sorted(samples)[stats.rank(percentile, len(samples)) - 1]


def _middle(values: Sequence[float]) -> float:
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2.0


def _cells(samples: Sequence[int], ordered: Sequence[int], size: int) -> List[float]:
    """Sums of the samples' ranks over cells of so many samples, less their mean; a last part is left out."""
    cuts = dependence.cuts(ordered)
    scores = [bisect_left(cuts, sample) for sample in samples]
    sums = [sum(scores[begin : begin + size]) for begin in range(0, len(scores) - size + 1, size)]
    mean = sum(sums) / len(sums)
    return [each - mean for each in sums]


def _split(cells: Sequence[float]) -> int:
    """The place before which and after which the cells differ most, by the standard error there."""
    count = len(cells)
    margin = max(_STEP_CELLS, count // 100)
    return max(
        (abs(whole) / math.sqrt(split * (count - split)), split)
        for split, whole in enumerate(accumulate(cells), 1)
        if margin <= split <= count - margin
    )[1]


def _difference(cells: Sequence[float], split: int) -> float:
    """Difference of the means after and before, in units of one cell's deviation over its own."""
    count = len(cells)
    return -math.fsum(cells[:split]) * math.sqrt(count / (split * (count - split)))


def _slope(cells: Sequence[float]) -> float:
    """Regression on time, in the same units."""
    count = len(cells)
    products = math.fsum(cell * (place - (count - 1) / 2.0) for place, cell in enumerate(cells))
    return products / math.sqrt(count * (count * count - 1.0) / 12.0)


def _residuals(cells: Sequence[float], split: int) -> List[float]:
    """What neither a trend nor a step at the split explains: least squares with both at once."""
    count = len(cells)
    height = split / count
    times = [place - (count - 1) / 2.0 for place in range(count)]
    steps = [(1.0 if place >= split else 0.0) - (1.0 - height) for place in range(count)]
    tt, ss, ts = (
        count * (count * count - 1.0) / 12.0,
        count * height * (1.0 - height),
        math.fsum(map(mul, times, steps)),
    )
    yt, ys = math.fsum(map(mul, cells, times)), math.fsum(map(mul, cells, steps))
    determinant = tt * ss - ts * ts
    slope = (yt * ss - ys * ts) / determinant
    jump = (ys * tt - yt * ts) / determinant
    return [cell - slope * time - jump * step for cell, time, step in zip(cells, times, steps)]


def _long_variance(residuals: Sequence[float]) -> float:
    """Variance of a sum of residuals for each of them: the greatest over stretches of every length.

    As for the dependence: batch means, sixteen stretches at least, Student's t for the normal.
    """
    sums = list(residuals)
    greatest = 0.0
    length = 1
    while len(sums) >= dependence.LEAST_STRETCHES:
        power = math.fsum(map(mul, sums, sums)) / (length * (len(sums) - 1))
        greatest = max(greatest, power * (1.0 + 2.42 / (len(sums) - 1)))
        sums = [first + second for first, second in zip(sums[::2], sums[1::2])]
        length *= 2
    return greatest


def _refine(samples: Sequence[int], position: int, reach: int) -> int:
    """The place near a step's cell where most samples go over from one level to the other."""
    left, right = stats.median(samples[:position]), stats.median(samples[position:])
    limit = (left + right) / 2.0
    begin, end = max(1, position - 2 * reach), min(len(samples) - 1, position + 2 * reach)
    best, best_score, score = begin, 0, 0
    for place in range(begin, end):
        # Before the step the samples are on the left level's side.
        score += 1 if (samples[place] > limit) == (left > limit) else -1
        if score > best_score:
            best, best_score = place + 1, score
    return best


# Modes


def modes(samples: Sequence[int], ordered: Sequence[int]) -> Optional[Modes]:
    """The values around which the samples gather where there are several well apart; None else.

    The density is that of windows of as many samples each (the nearest neighbours' estimate); between two
    modes it must fall to a third of the lower one's, or further where so few samples make it uncertain.
    """
    count = len(ordered)
    if count < MODE_SAMPLES:
        return None
    window = max(15, count // 40)
    tick = _tick(ordered)
    fall = max(_VALLEY, math.exp(_VALLEY_DEVIATES * math.sqrt(2.0 / window)))
    begins = range(0, count - window, max(1, window // 4))
    densities = [window / max(tick, ordered[begin + window] - ordered[begin]) for begin in begins]
    borders = [0]
    high, low, low_place = densities[0], densities[0], 0
    rising = True  # until the density has fallen far enough from a peak
    for place, density in enumerate(densities):
        if rising:
            if density > high:
                high = density
            if density * fall < high:
                rising, low, low_place = False, density, place
        else:
            if density < low:
                low, low_place = density, place
            if density > low * fall:
                borders.append(_widest(ordered, begins[low_place], window))
                rising, high = True, density
    borders.append(count)
    parts = [ordered[part] for part in map(slice, borders, borders[1:])]
    merged: List[Sequence[int]] = []
    for part in parts:
        if merged and (
            min(len(merged[-1]), len(part)) < MODE_SHARE * count
            or stats.median(part) < (1.0 + MODE_DISTANCE) * stats.median(merged[-1])
        ):
            # The ends of a mode, or one that is not told apart, belong to the one before it.
            merged[-1] = [*merged[-1], *part]
        else:
            merged.append(part)
    if len(merged) < 2:
        return None
    found = tuple(Mode(stats.median(part), len(part) / count) for part in merged)
    stretch = _stretch(samples, [part[0] for part in merged[1:]], [mode.share for mode in found])
    where = " and ".join(f"{_time(mode.nanoseconds)} ({mode.share:.0%})" for mode in found)
    together = "" if stretch is None else f", in stretches of about {stretch:.0f} inferences"
    return Modes(found, stretch, f"the latencies gather around {len(found)} values: {where}{together}")


def _stretch(samples: Sequence[int], borders: Sequence[int], shares: Sequence[float]) -> Optional[float]:
    """Mean number of samples in a row in one mode where that is at least twice what chance makes of it."""
    places = [bisect_right(borders, sample) for sample in samples]
    changes = sum(map(int.__ne__, places, places[1:]))
    by_chance = (len(samples) - 1) * (1.0 - math.fsum(share * share for share in shares))
    # The number of changes by chance is uncertain by less than its root.
    if 2 * changes + 3.0 * math.sqrt(by_chance) >= by_chance:
        return None
    return len(samples) / (changes + 1)


def _tick(ordered: Sequence[int]) -> int:
    """The least difference between two samples: the step of a coarse clock."""
    return min((step for step in map(int.__sub__, ordered[1:], ordered) if step > 0), default=1)


def _widest(ordered: Sequence[int], begin: int, window: int) -> int:
    """The place within a window where the distance to the sample before is greatest."""
    return max(range(begin + 1, begin + window + 1), key=lambda place: ordered[place] - ordered[place - 1])


# Outliers


def outliers(samples: Sequence[int], ordered: Sequence[int]) -> Optional[Outliers]:
    """The inferences far from all others; None where there are none.

    Those that are more than a twentieth of all are a mode and no outliers.
    """
    count = len(samples)
    if count < OUTLIER_SAMPLES:
        return None
    middle = stats.rank("50", count) - 1
    median = ordered[middle]
    if median <= 0:
        return None
    near = max(_deviation(ordered, median), 1.0)
    near_log = max(_log_deviation(ordered, median), math.log1p(1.0 / median))
    score = max(OUTLIER_SCORE * near, (OUTLIER_RATIO - 1.0) * median)
    ratio = max(math.exp(min(700.0, OUTLIER_LOG_SCORE * near_log)), OUTLIER_RATIO)
    # Beyond a mode on that side, too: as far again, twice, as the slowest and the fastest twentieth are.
    upper = ordered[stats.rank("95", count) - 1]
    lower = ordered[count - stats.rank("95", count)]
    above = max(median + score, median * ratio, upper + 2 * (upper - median))
    below = min(median - score, median / ratio, lower - 2 * (median - lower))
    slow = count - bisect_right(ordered, above)
    fast = bisect_left(ordered, below)
    if not slow and not fast:
        return None
    worst = ordered[-1] if slow else ordered[0]
    position = next(place for place, sample in enumerate(samples) if sample == worst)
    beyond = sum(ordered[count - slow :]) - slow * median
    share = beyond / sum(ordered)
    return Outliers(
        slow, fast, worst, position, worst / median, share,
        _outlier_words(slow, fast, count, worst, position, worst / median, share),
    )  # fmt: skip


def _outlier_words(
    slow: int, fast: int, count: int, worst: int, position: int, ratio: float, share: float
) -> str:
    parts = []
    if slow:
        are = "is an outlier" if slow == 1 else "are outliers"
        parts.append(
            f"{slow} of {count} inferences {are}, up to {ratio:.1f}× the median "
            f"({_time(worst)}, inference {position + 1})"
        )
        if share >= 0.01:
            parts.append(f"they add {share:.0%} to the whole time" if slow > 1 else f"it adds {share:.0%}")
    if fast:
        which = "one is" if fast == 1 else f"{fast} are"
        parts.append(f"{which} far faster than the rest" + ("" if slow else f" ({_time(worst)})"))
    return "; ".join(parts)


def _deviation(ordered: Sequence[int], median: int) -> float:
    """Median absolute deviation of sorted samples, without sorting the deviations."""
    need = stats.rank("50", len(ordered))
    low, high = 0, max(ordered[-1] - median, median - ordered[0])
    while low < high:
        reach = (low + high) // 2
        if bisect_right(ordered, median + reach) - bisect_left(ordered, median - reach) >= need:
            high = reach
        else:
            low = reach + 1
    return float(low)


def _log_deviation(ordered: Sequence[int], median: int) -> float:
    """The same of the samples' logarithms."""
    need = stats.rank("50", len(ordered))
    low, high = 0.0, math.log(max(ordered[-1], 1) / max(1, ordered[0])) + 1e-9
    for _ in range(50):
        reach = (low + high) / 2.0
        factor = math.exp(reach)
        if bisect_right(ordered, median * factor) - bisect_left(ordered, median / factor) >= need:
            high = reach
        else:
            low = reach
    return high


# Period


def period(samples: Sequence[int]) -> Optional[Period]:
    """The period with which slow inferences come; None where they come without one.

    Slow is what takes longer than the two before it and the two after it: bursts and waves, in which all of
    them are, do not hide it. The half, the quarter, the eighth, … of the samples that stick out most are
    taken in turn: a period of k shows in the smallest share that holds one in k. Distances among them that
    occur most give the candidates; of each the phase that is slow most often is held against chance.
    """
    samples = samples[:PERIOD_SAMPLES]
    count = len(samples)
    if count < 2 * PERIOD_SLOTS:
        return None
    heights = _heights(samples)
    ordered = sorted(heights)
    best: Optional[Tuple[float, int, int, int, int]] = None
    share = 0.5
    levels = max(1, int(math.log2(count / PERIOD_SLOTS)))
    while count * share >= PERIOD_SLOTS * 0.75:
        threshold = ordered[count - math.ceil(count * share)]
        events = [place for place, height in enumerate(heights) if height >= threshold]
        if len(events) > 1.5 * share * count:  # ties: a coarse clock
            events = [place for place, height in enumerate(heights) if height > threshold]
        share /= 2.0
        if len(events) < PERIOD_SLOTS * 0.75:
            continue
        rate = len(events) / count
        for every in _candidates(events, count // PERIOD_SLOTS):
            phase, hits = Counter(place % every for place in events).most_common(1)[0]
            slots = (count - 1 - phase) // every + 1
            others = (len(events) - hits) / (count - slots)
            if hits < _PERIOD_HITS * slots or others > hits / slots / 2.0:
                continue
            # Chernoff's bound on the chance of so many hits, over all that was tried.
            surprise = slots * _divergence(hits / slots, rate) - math.log(every)
            if surprise < math.log(levels * count / PERIOD_SLOTS / _PERIOD_CHANCE):
                continue
            if best is None or surprise > best[0]:
                best = (surprise, every, phase, hits, slots)
    if best is None:
        return None
    _, every, phase, hits, slots = best
    due = sorted(samples[phase::every])
    # Half of the places at least are hits: the median of the slower ones is that of hits.
    slow = stats.median(due[len(due) - hits :])
    rest = list(samples)
    del rest[phase::every]
    usual = stats.median(rest)
    if usual <= 0 or slow / usual < PERIOD_RATIO:
        return None
    ratio = slow / usual
    return Period(every, phase, hits, slots, ratio, _period_words(every, phase, hits, slots, ratio))


def _heights(samples: Sequence[int]) -> List[int]:
    """Twice what each sample is above the middle of its four neighbours."""
    padded = [samples[2], samples[1], *samples, samples[-2], samples[-3]]
    return [
        2 * sample - sum(sorted(four)[1:3])
        for sample, *four in zip(samples, padded, padded[1:], padded[3:], padded[4:])
    ]


def _period_words(every: int, phase: int, hits: int, slots: int, ratio: float) -> str:
    factor = f"{ratio:.1f}× slower" if ratio >= 1.95 else f"{ratio - 1.0:.0%} slower"
    misses = "" if hits == slots else f", {hits} of {slots} times"
    return f"every {_ordinal(every)} inference is {factor}{misses} (the first: inference {phase + 1})"


def _ordinal(number: int) -> str:
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def _candidates(events: Sequence[int], most: int) -> List[int]:
    """Distances between events that occur most often; 2 at least, ``most`` at most."""
    distances: Counter[int] = Counter()
    # The more events, the nearer the next one of the period.
    reach = max(_PERIOD_REACH[0], min(_PERIOD_REACH[1], _PERIOD_PAIRS // len(events)))
    for step in range(1, min(reach, len(events) - 1) + 1):
        distances.update(map(int.__sub__, events[step:], events))
    usual = [(times, every) for every, times in distances.items() if 2 <= every <= most and times >= 3]
    return [every for _, every in sorted(usual, key=lambda each: (-each[0], each[1]))[:_PERIOD_CANDIDATES]]


def _divergence(share: float, rate: float) -> float:
    """Kullback & Leibler's of two coins; 0 where the first is no better than the second."""
    if share <= rate:
        return 0.0
    found = share * math.log(share / rate)
    return found + ((1.0 - share) * math.log((1.0 - share) / (1.0 - rate)) if share < 1.0 else 0.0)


def _time(nanoseconds: float) -> str:
    for unit, size in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= size:
            return f"{nanoseconds / size:.3g} {unit}"
    return f"{nanoseconds:.0f} ns"
