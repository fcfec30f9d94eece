from __future__ import annotations

import random
from array import array

import pytest

from boardbench.agent.bench import looks, measure, stats, stopping
from boardbench.agent.bench.looks import PrecisionLooks
from boardbench.agent.bench.measure import Bounds
from boardbench.agent.domain import Progress, StopReason

from .test_measure import MILLISECOND, Time

TARGETS = (stopping.target(50, 0.01), stopping.target(90, 0.02))


def test_a_loop_ends_when_the_targets_are_reached_and_says_how_near_it_is() -> None:
    noise = random.Random(3)
    time = Time(lambda _: int(MILLISECOND * noise.lognormvariate(0, 0.05)))
    reports: list[Progress] = []
    counted = measure.measure(
        time.call,
        Bounds(seconds=0.0, least_runs=10, most_seconds=600.0),
        reports.append,
        progress_seconds=0.02,
        clock=time.clock,
        looks=PrecisionLooks(TARGETS, confidence=0.95, least_runs=10),
    )
    assert counted.reason is StopReason.PRECISION
    latency = stats.latency(counted.samples)
    found = looks.reached(latency, TARGETS)
    assert [each.percentile for each in found] == [50.0, 90.0]
    assert all(each.reached_ratio is not None and each.reached_ratio <= each.asked_ratio for each in found)
    assert len(counted.samples) < 10_000
    early = next(report for report in reports if report.runs >= len(counted.samples) // 2)
    assert early.fraction is not None and 0.2 < early.fraction < 0.9


def test_before_the_least_number_nobody_looks() -> None:
    assert PrecisionLooks(TARGETS, confidence=0.95, least_runs=500).next_look == 500
    assert PrecisionLooks(TARGETS, confidence=0.95, least_runs=1).next_look == stopping.LEAST_RUNS


def test_how_far_it_is_is_known_from_the_first_look_on() -> None:
    found = PrecisionLooks(TARGETS, confidence=0.95, least_runs=1)
    assert found.fraction(10) is None
    noise = random.Random(3)
    found.look(array("Q", (int(MILLISECOND * noise.lognormvariate(0, 0.3)) for _ in range(64))))
    assert found.fraction(64) == pytest.approx(2 * (found.fraction(32) or 0.0))
    assert 0 < (found.fraction(64) or 0.0) < 0.5


def test_a_percentile_without_bounds_was_not_reached() -> None:
    latency = stats.latency([MILLISECOND] * 20)
    (median, tail) = looks.reached(latency, (stopping.target(50, 0.01), stopping.target(99, 0.05)))
    assert median.reached_ratio == 0.0
    assert tail.reached_ratio is None


def test_bounds_around_zero_have_no_ratio() -> None:
    latency = stats.latency([0] * 60 + [5] * 40)
    (found,) = looks.reached(latency, (stopping.target(59, 0.01),))
    assert found.reached_ratio is None
