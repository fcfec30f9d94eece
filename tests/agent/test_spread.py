"""How far processes differ: on simulated boards."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from boardbench.agent.spread import Spread, of_others
from boardbench.agent.spread import spread as spread_of
from boardbench.v1 import latency_pb2

AGREE_RATIO = 0.01


def spread(latencies: Sequence[latency_pb2.Latency], confidence: float) -> Spread:
    return spread_of(latencies, confidence, AGREE_RATIO)


def latency(samples: Sequence[float]) -> latency_pb2.Latency:
    return latency_pb2.Latency(count=len(samples), samples_nanoseconds=[round(each) for each in samples])


def process(draw: random.Random, median: float, count: int = 200, sigma: float = 0.02) -> latency_pb2.Latency:
    return latency([median * draw.lognormvariate(0.0, sigma) for _ in range(count)])


def test_processes_of_one_distribution_agree_nearly_always() -> None:
    """On purpose with so few samples that their medians are more than the ratio apart."""
    draw = random.Random(1)
    disagree = apart = 0
    for _ in range(200):
        found = spread([process(draw, 1e6, count=20, sigma=0.1) for _ in range(5)], 0.95)
        disagree += not found.agree
        apart += found.ratio > AGREE_RATIO
    assert apart > 180
    assert disagree <= 6, "the chance is 1 in 100"


def test_processes_that_differ_are_found() -> None:
    draw = random.Random(2)
    medians = (1.0e6, 1.01e6, 0.99e6, 1.08e6, 1.0e6)
    found = spread([process(draw, median) for median in medians], 0.95)
    assert not found.agree
    assert found.ratio == pytest.approx(0.045, abs=0.006)
    assert sorted(found.medians_seconds)[2] == found.medians_seconds[found.middle] == found.median_seconds
    assert found.bounds_seconds is not None
    low, high = found.bounds_seconds
    assert low < 1.0e-3 < high < 1.08e-3
    assert "in the middle" in found.detail


def test_difference_that_is_sure_and_small_is_no_disagreement() -> None:
    draw = random.Random(3)
    found = spread([process(draw, median, 2000, 0.005) for median in (1e6, 1.006e6)], 0.95)
    assert found.agree
    assert "more than chance" in found.detail
    assert not spread_of([process(draw, median, 2000, 0.005) for median in (1e6, 1.006e6)], 0.95, 0.001).agree


def test_two_processes_have_no_bounds_for_others() -> None:
    draw = random.Random(4)
    assert spread([process(draw, 1e6), process(draw, 1e6)], 0.95).bounds_seconds is None


def test_coarse_clock_and_handfuls_are_no_trouble() -> None:
    same = spread([latency([1000.0] * 50), latency([1000.0] * 50), latency([1000.0] * 50)], 0.95)
    assert (same.agree, same.ratio) == (True, 0.0)
    assert same.bounds_seconds == (pytest.approx(1e-6), pytest.approx(1e-6))
    assert spread([latency([1000.0]), latency([5000.0])], 0.95).agree, "one sample says nothing"
    assert spread([latency([0.0] * 9), latency([0.0] * 9), latency([0.0] * 9)], 0.95).bounds_seconds is None


@pytest.mark.parametrize("processes", [3, 6, 10])
def test_bounds_hold_for_other_processes(processes: int) -> None:
    """Medians that differ from process to process by 3 %: the bounds enclose the middle of all of them."""
    draw = random.Random(5)
    covered = 0
    for _ in range(10_000):
        found = of_others([1e-3 * draw.lognormvariate(0.0, 0.03) for _ in range(processes)], 0.95)
        assert found is not None
        covered += found[0] <= 1e-3 <= found[1]
    assert covered >= 9_400
