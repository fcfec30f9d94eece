"""How far processes of one model differ, and how one model compares with another over processes of both.

A median of ten thousand inferences has narrow bounds, and they hold for the process that measured it: another
one has other addresses and other luck. What holds for the model is said by the spread of the medians of
several processes: of their logarithms, since latencies differ by factors, with Student's t, from three
processes on.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from boardbench.agent.bench import stats
from boardbench.v1 import latency_pb2

# Chance that processes of one distribution are taken to differ.
_CHANCE = 0.01
# Fewest whose spread says something about others: Student's t is 4.3 with three of them, and 12.7 with two.
_LEAST = 3


@dataclass(frozen=True)
class Spread:
    """What the medians of several processes say about each other."""

    medians_seconds: tuple[float, ...]
    agree: bool
    # Half of the greatest difference over the median of all.
    ratio: float
    # Position of the process whose median is in the middle.
    middle: int
    median_seconds: float
    # Of the median of other processes; None where these are too few.
    bounds_seconds: tuple[float, float] | None
    detail: str


def spread(latencies: Sequence[latency_pb2.Latency], confidence: float, agree_ratio: float) -> Spread:
    """How far processes differ, of which there are at least two.

    Those whose medians are no farther apart than ``agree_ratio`` agree, however sure their difference is.
    """
    medians = [stats.median(each.samples_nanoseconds) / 1e9 for each in latencies]
    ordered = sorted(medians)
    center = statistics.median(medians)
    ratio = (ordered[-1] - ordered[0]) / 2 / center if center > 0 else 0.0
    differ = _differ(latencies)
    agree = ratio <= agree_ratio or not differ
    limits = of_others(medians, confidence)
    if agree and not differ:
        how = "their medians differ no more than by chance"
    elif agree:
        how = f"their medians differ by more than chance, and by less than ±{agree_ratio * 100:.2g} %"
    else:
        how = "their medians differ by more than chance: the latency is that of the process in the middle"
    if limits is not None:
        how += f"; bounds for other processes are Student's t over {len(medians)} medians"
    return Spread(
        medians_seconds=tuple(medians),
        agree=agree,
        ratio=ratio,
        middle=medians.index(ordered[(len(ordered) - 1) // 2]),
        median_seconds=center,
        bounds_seconds=limits,
        detail=how,
    )


def _differ(latencies: Sequence[latency_pb2.Latency]) -> bool:
    """Whether medians differ by more than chance: Mood's test, which asks nothing of the distributions.

    Of one distribution, half of each process's samples lie above the median of all, but for chance. Where
    neighbours resemble each other, the samples are as many as independent ones that say as much.
    """
    center = stats.median([sample for latency in latencies for sample in latency.samples_nanoseconds])
    total = 0.0
    for latency in latencies:
        samples = list(latency.samples_nanoseconds)
        above = sum(1.0 if sample > center else 0.5 for sample in samples if sample >= center)
        effective = stats.latency(samples, percentiles=("50",)).effective_count or len(samples)
        total += (above / len(samples) - 0.5) ** 2 * 4 * min(effective, len(samples))
    return total > _chi_square(len(latencies) - 1)


def _chi_square(freedom: int) -> float:
    """The value that chi-square exceeds by chance only so often (Wilson & Hilferty, right to a percent)."""
    z = statistics.NormalDist().inv_cdf(1 - _CHANCE)
    ninth = 2 / (9 * freedom)
    return float(freedom * (1 - ninth + z * math.sqrt(ninth)) ** 3)


def of_others(values: Sequence[float], confidence: float) -> tuple[float, float] | None:
    """Bounds of the middle of all such values, of which these are a few; None for too few, or for zeros."""
    if len(values) < _LEAST or min(values) <= 0:
        return None
    logarithms = [math.log(value) for value in values]
    mean = statistics.fmean(logarithms)
    half = stats.student(confidence, len(values) - 1) * statistics.stdev(logarithms) / math.sqrt(len(values))
    return math.exp(mean - half), math.exp(mean + half)
