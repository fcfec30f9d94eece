from __future__ import annotations

import json
import lzma
import math
import random
from pathlib import Path

import pytest

from boardbench.agent.bench import processes, stats

TRACES = Path(__file__).resolve().parents[3] / "benchmarks" / "traces"


def process(draw: random.Random, between: float, count: int) -> list[int]:
    level = draw.gauss(0.0, between)
    return [round(1e6 * math.exp(level + draw.gauss(0.0, 0.02))) for _ in range(count)]


def covers(between: float, number: int, *, pooled: bool, experiments: int = 120) -> float:
    """Share of experiments in which the median's bounds enclose the median over all processes."""
    draw = random.Random(number)
    covered = 0
    for _ in range(experiments):
        parts = [process(draw, between, 150) for _ in range(number)]
        latency = (
            processes.latency(parts, percentiles=("50",))
            if pooled
            else stats.latency([sample for part in parts for sample in part], percentiles=("50",))
        )
        (median,) = latency.percentiles
        covered += median.low_seconds <= 1e-3 <= median.high_seconds
    return covered / experiments


@pytest.mark.parametrize("between", [0.0, 0.005, 0.05])
@pytest.mark.parametrize("number", [6, 10])
def test_bounds_hold_for_processes_not_yet_started(between: float, number: int) -> None:
    assert covers(between, number, pooled=True) >= 0.93


def test_bounds_of_the_samples_alone_do_not() -> None:
    assert covers(0.05, 6, pooled=False) < 0.85


def test_processes_that_are_alike_cost_little_width() -> None:
    draw = random.Random(1)
    ratios = []
    for _ in range(30):
        parts = [process(draw, 0.0, 300) for _ in range(10)]
        found = processes.effective_counts(parts, ("50",))["50"]
        assert 10 <= found <= 3000
        ratios.append(3000 / found)
    assert sorted(ratios)[15] < 1.6


def test_nothing_varies_more_than_whole_processes() -> None:
    parts = [[1_000_000 + 100_000 * number] * 500 for number in range(8)]
    assert processes.effective_counts(parts, ("50", "90")) == {"50": 8.0, "90": 8.0}
    (median,) = processes.latency(parts, percentiles=("50", "90")).percentiles
    # Eight values, of which the least and the greatest enclose the median with 99.2 %.
    assert (median.low_seconds, median.high_seconds) == (1e-3, 1.7e-3)


def test_dependence_within_processes_counts_and_their_borders_do_not() -> None:
    draw = random.Random(2)
    parts = []
    for _ in range(8):
        level, part = 0.0, []
        for _ in range(400):
            level = 0.9 * level + draw.gauss(0.0, 0.44)
            part.append(round(1e6 * math.exp(0.02 * level)))
        parts.append(part)
    assert processes.effective_counts(parts, ("50",))["50"] < 3200 / 6


def test_one_process_is_its_own_latency_and_empty_ones_do_not_count() -> None:
    part = process(random.Random(3), 0.0, 100)
    assert processes.latency([part]) == processes.latency([[], part, []]) == stats.latency(part)
    with pytest.raises(ValueError, match="at least one sample"):
        processes.latency([[], []])


def test_samples_stay_process_after_process_and_percentiles_are_those_of_the_pool() -> None:
    draw = random.Random(4)
    parts = [process(draw, 0.01, count) for count in (100, 50, 200)]
    whole = [sample for part in parts for sample in part]
    found = processes.latency(parts, percentiles=("50",))
    assert found.samples_nanoseconds == tuple(whole)
    assert found.percentiles[0].seconds == stats.median(whole) / 1e9


def test_processes_of_one_value_have_no_width() -> None:
    found = processes.latency([[1000] * 50, [1000] * 50], percentiles=("50",))
    (median,) = found.percentiles
    assert median.low_seconds == median.high_seconds == 1e-6


def test_twelve_recorded_processes_are_less_sure_than_their_samples() -> None:
    with lzma.open(TRACES / "twelve_processes.json.xz", "rt") as file:
        content = json.load(file)
    samples, each = content["samples_nanoseconds"], content["inferences_a_process"]
    parts = [samples[begin : begin + each] for begin in range(0, len(samples), each)]
    assert len(parts) == 12
    median = next(p for p in processes.latency(parts).percentiles if p.percentile == 50)
    low, high = stats.bounds("50", len(samples)) or (0, 0)
    ordered = sorted(samples)
    exact = (ordered[high - 1] - ordered[low - 1]) / 1e9
    assert median.high_seconds - median.low_seconds > 3 * exact
    # Half of the processes' own medians are on either side: the bounds are between the extremes.
    medians = sorted(stats.median(part) for part in parts)
    assert medians[0] / 1e9 < median.low_seconds < median.high_seconds < medians[-1] / 1e9
