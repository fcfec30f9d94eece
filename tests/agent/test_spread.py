"""How far processes differ, and how models compare over them: against tables and simulated boards."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from boardbench.agent.spread import AGREE_RATIO, of_others, ratio, spread, student
from boardbench.v1 import latency_pb2

# NIST/SEMATECH e-Handbook of Statistical Methods, section 1.3.6.7.2: two-sided 95 % and 99 %.
TABLE = {
    1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 5: (2.571, 4.032),
    9: (2.262, 3.250), 10: (2.228, 3.169), 30: (2.042, 2.750), 99: (1.984, 2.626),
}  # fmt: skip


@pytest.mark.parametrize("freedom", TABLE)
def test_student_is_the_table_s(freedom: int) -> None:
    for confidence, expected in zip((0.95, 0.99), TABLE[freedom], strict=True):
        assert student(confidence, freedom) == pytest.approx(expected, abs=6e-4)


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


def test_ratio_of_turns_does_not_see_what_changes_for_both() -> None:
    """A board that slows down by half while two models take turns, one of them 5 % slower."""
    draw = random.Random(6)
    ours, theirs = [], []
    for turn in range(6):
        board = 1.0 + 0.1 * turn
        theirs.append(1e-3 * board * draw.lognormvariate(0.0, 0.003))
        ours.append(1.05e-3 * board * draw.lognormvariate(0.0, 0.003))
    factor, limits = ratio(ours, theirs, 0.95)
    assert factor == pytest.approx(1.05, abs=0.006)
    assert limits is not None
    assert 1.04 < limits[0] < factor < limits[1] < 1.06
    back, turned = ratio(theirs, ours, 0.95)
    assert back == pytest.approx(1 / factor)
    assert turned is not None
    assert turned == (pytest.approx(1 / limits[1]), pytest.approx(1 / limits[0]))


def test_equal_models_differ_as_seldom_as_stated() -> None:
    draw = random.Random(7)
    differ = 0
    for _ in range(1000):
        turns = [[1e-3 * draw.lognormvariate(0.0, 0.03) for _ in range(6)] for _ in range(2)]
        _, limits = ratio(turns[0], turns[1], 0.95)
        assert limits is not None
        differ += not limits[0] <= 1 <= limits[1]
    assert differ <= 70


def test_few_turns_have_no_bounds_and_zeros_no_ratio() -> None:
    factor, limits = ratio([2e-3, 4e-3], [1e-3, 2e-3], 0.95)
    assert factor == pytest.approx(2.0)
    assert limits is None
    assert ratio([1e-3], [0.0], 0.95) == (None, None)
    assert ratio([2e-3, 4e-3, 6e-3], [1e-3, 2e-3], 0.95)[0] == pytest.approx(2.0), "turns that both had"
