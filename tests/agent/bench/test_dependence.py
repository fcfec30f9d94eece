from __future__ import annotations

import math
import random
from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boardbench.agent.bench import dependence, stats

PERCENTILES = ("50", "90", "99")


def look(samples: list[int], doubt: float = 1.0) -> dependence.Dependence:
    return stats.depends(samples, sorted(samples), PERCENTILES, doubt=doubt)


def independent(draw: random.Random, count: int, kind: int) -> list[int]:
    if kind == 0:
        return [round(1e6 * draw.gauss(1.0, 0.05)) for _ in range(count)]
    if kind == 1:
        return [round(1e6 * draw.lognormvariate(0.0, 0.3)) for _ in range(count)]
    if kind == 2:
        return [round(1e6 * draw.gauss(1.4 if draw.random() < 0.3 else 1.0, 0.02)) for _ in range(count)]
    # A coarse clock: a dozen values in all.
    return [round(20 * draw.gauss(1.0, 0.1)) * 1000 for _ in range(count)]


def autoregression(draw: random.Random, count: int, factor: float) -> list[int]:
    level = draw.gauss(0.0, 1.0)
    samples = []
    for _ in range(count):
        samples.append(round(1e6 * math.exp(0.1 * level)))
        level = factor * level + draw.gauss(0.0, math.sqrt(1 - factor * factor))
    return samples


@pytest.mark.parametrize("count", [32, 100, 400, 9000])
def test_independent_samples_are_nearly_never_taken_for_dependent(count: int) -> None:
    draw = random.Random(count)
    traces = 400 if count < 1000 else 40
    found = sum(look(independent(draw, count, trace % 4)).found for trace in range(traces))
    assert found <= 0.015 * traces, "0.5 % is what is meant"


@pytest.mark.parametrize(("factor", "count"), [(0.3, 1000), (0.5, 300), (0.9, 100), (0.9, 9000)])
def test_an_autoregression_is_found(factor: float, count: int) -> None:
    draw = random.Random(5)
    traces = [autoregression(draw, count, factor) for _ in range(20)]
    assert all(look(trace).found for trace in traces)


@pytest.mark.parametrize("factor", [0.3, 0.6, 0.9])
def test_the_factor_is_the_autocorrelation_time_of_the_rank(factor: float) -> None:
    """Of the sign of a Gaussian autoregression: 1 + 2 Σ (2/π) arcsin(φ^k) (Sheppard's formula)."""
    truth = 1 + 2 * math.fsum(2 / math.pi * math.asin(factor**k) for k in range(1, 400))
    draw = random.Random(7)
    found = sorted(look(autoregression(draw, 6000, factor)).factors["50"] for _ in range(15))[7]
    # The greatest of several estimates is meant to be on the cautious side.
    assert 0.9 * truth < found < 1.5 * truth


def test_a_tail_with_few_samples_is_taken_to_be_as_the_percentile_before_it() -> None:
    found = look(autoregression(random.Random(1), 400, 0.95))
    assert found.factors["99"] > 0.8 * found.factors["90"] > 1.0


def test_what_wanders_over_the_whole_run_is_not_settled() -> None:
    draw = random.Random(2)
    level, samples = 0.0, []
    for _ in range(3000):
        level += draw.gauss(0.0, 0.002)
        samples.append(round(1e6 * math.exp(level + draw.gauss(0.0, 0.02))))
    found = look(samples)
    assert found.found and not found.settled
    assert "other runs may differ by more" in found.sentence
    calm = look(autoregression(draw, 9000, 0.3))
    assert calm.found and calm.settled
    assert "resemble each other" in calm.sentence and "other runs" not in calm.sentence


def test_the_order_of_any_kind_of_sequence_will_do() -> None:
    samples = autoregression(random.Random(4), 9000, 0.5)
    assert look(samples) == stats.depends(array("Q", samples), sorted(samples), PERCENTILES)


def test_samples_that_take_turns_are_not_dependent_in_the_sense_that_counts() -> None:
    """Slow, fast, slow, fast: their count above the median varies less than by chance, not more."""
    draw = random.Random(6)
    samples = [round(1e6 * draw.gauss(1.0 + 0.1 * (place % 2), 0.01)) for place in range(500)]
    found = look(samples)
    assert found.neighbours < -0.5
    assert not found.found
    assert found.effective_count("50") == 500


@pytest.mark.parametrize("value", [1, 10**9])
@pytest.mark.parametrize("count", [1, 31, 32, 9000])
def test_samples_that_are_all_the_same_say_nothing(value: int, count: int) -> None:
    found = look([value] * count)
    assert not found.found
    assert set(found.factors.values()) == {1.0}


def test_a_doubt_asks_for_less() -> None:
    draw = random.Random(8)
    traces = [autoregression(draw, 100, 0.25) for _ in range(60)]
    sure = sum(look(trace).found for trace in traces)
    doubted = sum(look(trace, doubt=0.65).found for trace in traces)
    assert sure + 5 < doubted


@given(st.lists(st.integers(1, 50), min_size=1, max_size=300))
@settings(deadline=None)
def test_no_factor_is_below_one_and_no_count_above_the_samples(samples: list[int]) -> None:
    found = look(samples)
    assert all(1.0 <= factor < math.inf for factor in found.factors.values())
    assert 0 < found.effective_count("90") <= len(samples)
