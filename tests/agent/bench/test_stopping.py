from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boardbench.agent.bench import stats, stopping
from boardbench.agent.bench.stopping import Target


def test_targets_are_parsed() -> None:
    assert stopping.parse("p50=1%,p99=5%") == (Target("50", 0.01), Target("99", 0.05))
    assert stopping.parse(" P99.9 = ±2.5 % , 50=0.01 ") == (Target("50", 0.01), Target("99.9", 0.025))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "'' is no precision"),
        ("p50", "'p50' is no precision"),
        ("p50=1%,", "'' is no precision"),
        ("p50=1%;p99=5%", "is no precision"),
        ("p50=-1%", "is no precision"),
        ("p0=1%", "p0 is no percentile"),
        ("p100=1%", "p100 is no percentile"),
        ("p50=0%", "at least and below 100%"),
        ("p50=100%", "at least and below 100%"),
        ("p50=3", "at least and below 100%"),
        ("p50=1%,p50.0=2%", "p50 is asked for twice"),
    ],
)
def test_what_makes_no_sense_is_said(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        stopping.parse(text)


@given(st.floats(0.001, 99.999), st.floats(0.0002, 0.99))
@settings(deadline=None)
def test_a_target_reads_as_it_is_written(percentile: float, ratio: float) -> None:
    target = stopping.target(percentile, ratio)
    (again,) = stopping.parse(str(target))
    assert float(again.percentile) == pytest.approx(percentile, rel=1e-9)
    assert again.ratio == pytest.approx(ratio, rel=1e-5)


def measure(
    draw: random.Random, targets: str, sigma: float, most: int = 100_000
) -> tuple[int, list[stopping.Look]]:
    sequential = stopping.Sequential(stopping.parse(targets))
    samples: list[int] = []
    looks = []
    while sequential.next_look <= most:
        due = sequential.next_look
        samples += [round(1e6 * draw.lognormvariate(0.0, sigma)) for _ in range(due - len(samples))]
        looks.append(sequential.look(samples))
        if looks[-1].over:
            return due, looks
    return most, looks


def test_it_ends_when_every_target_holds_and_half_as_many_inferences_again_confirm_it() -> None:
    count, looks = measure(random.Random(1), "p50=1%,p99=5%", 0.1)
    *_, before, last = looks
    assert last.over and all(each.holds for each in last.reached)
    assert all(each.holds for each in before.reached) and not before.over
    assert count == last.count == -(-before.count * 3 // 2)
    assert not any(look.over for look in looks[:-1])
    assert not all(each.holds for each in looks[0].reached)


def test_it_does_not_end_where_the_confirmation_fails() -> None:
    sequential = stopping.Sequential([Target("50", 0.01)])
    calm = random.Random(2).sample(range(1_000_000, 1_000_064), 64)
    assert not sequential.look(calm).over
    assert sequential.next_look == 96
    # A third of them so slow that the median's upper bound is among them.
    wild = [*calm, *(1_500_000 + place for place in range(32))]
    seen = sequential.look(random.Random(1).sample([*wild, *wild[64:]], 128))
    assert not seen.over and not seen.reached[0].holds
    assert sequential.next_look >= 160
    assert seen.runs_needed >= sequential.next_look


def test_a_steady_model_needs_fewer_than_a_hundred() -> None:
    count, looks = measure(random.Random(2), "p50=1%", 0.01)
    assert count == 96
    assert len(looks) == 2


def test_dependent_samples_are_confirmed_with_more() -> None:
    draw = random.Random(7)
    level, samples = 0.0, []
    for _ in range(200):
        level = 0.9 * level + draw.gauss(0.0, 0.3)
        samples.append(round(1e6 * (1 + 0.001 * level)))
    sequential = stopping.Sequential([Target("50", 0.05)])
    assert sequential.look(samples[:64]).reached[0].holds
    assert sequential.next_look == 160
    assert sequential.look(samples[:160]).over


def test_looks_are_few_and_begin_where_the_percentiles_are_supported() -> None:
    assert stopping.Sequential([Target("50", 0.01)]).next_look == stopping.LEAST_RUNS
    assert stopping.Sequential([Target("99", 0.05)]).next_look == stats.least_count("99") == 368
    wide = stopping.Sequential([Target("99", 0.05)], confidence=0.99)
    assert wide.next_look == stats.least_count("99", 0.99) > 500
    assert stopping.Sequential([Target("50", 0.01)], least_runs=1000).next_look == 1000
    count, looks = measure(random.Random(3), "p50=0.3%", 0.2)
    assert count > 20_000
    assert len(looks) < 25
    counts = [look.count for look in looks]
    assert all(after >= 1.25 * before for before, after in itertools.pairwise(counts))


def test_what_is_needed_is_foreseen() -> None:
    count, looks = measure(random.Random(4), "p50=1%", 0.3)
    # From a sixteenth of it on the projection is right to a factor of two.
    foreseen = [look.runs_needed for look in looks if look.count > count / 16]
    assert len(foreseen) > 3
    assert all(count / 2 < needed < count * 2 for needed in foreseen)
    assert looks[-1].runs_needed == count


def test_what_can_not_be_reached_is_known_before_the_end() -> None:
    sequential = stopping.Sequential([Target("50", 0.001)])
    draw = random.Random(5)
    look = sequential.look([round(1e6 * draw.lognormvariate(0.0, 0.3)) for _ in range(64)])
    assert look.runs_needed > 100_000
    assert not look.fits(most_runs=10_000, seconds_left=None, seconds_a_run=0.001)
    assert not look.fits(most_runs=None, seconds_left=10.0, seconds_a_run=0.001)
    assert look.fits(most_runs=None, seconds_left=None, seconds_a_run=0.001)
    assert look.fits(most_runs=100_000_000, seconds_left=1e6, seconds_a_run=0.001)


def test_dependent_samples_are_measured_longer() -> None:
    draw = random.Random(6)
    level, wandering = 0.0, []
    for _ in range(20_000):
        level = 0.95 * level + draw.gauss(0.0, 0.3)
        wandering.append(round(1e6 * (1 + 0.05 * level)))
    shuffled = draw.sample(wandering, len(wandering))

    def ends(samples: list[int]) -> int:
        sequential = stopping.Sequential([Target("50", 0.01)])
        while not sequential.look(samples[: sequential.next_look]).over:
            assert sequential.next_look <= len(samples)
        return sequential.next_look

    assert ends(wandering) > 5 * ends(shuffled)


def test_a_percentile_that_dependence_takes_the_bounds_from_is_not_reached() -> None:
    samples = [1000 + place // 40 for place in range(400)]
    look = stopping.Sequential([Target("99", 0.5)]).look(samples)
    assert look.reached[0].ratio is None
    assert not look.reached[0].holds and not look.over
    assert look.runs_needed > 400


def test_looking_early_decides_nothing() -> None:
    sequential = stopping.Sequential([Target("50", 0.5)])
    look = sequential.look([1000, 1001, 1002, 1003, 1004, 1005, 1006])
    assert look.reached[0].holds and not look.over
    assert sequential.next_look == stopping.LEAST_RUNS


def test_final_figures_are_held_against_the_targets() -> None:
    samples = [1_000_000 + place * 100 for place in range(100)]
    random.Random(1).shuffle(samples)
    latency = stats.latency(samples, percentiles=("50",))
    (median,) = latency.percentiles
    within, missing = stopping.reached(latency, (Target("50", 0.01), Target("99", 0.05)))
    assert within.ratio == pytest.approx(
        max(median.high_seconds / median.seconds - 1, 1 - median.low_seconds / median.seconds)
    )
    assert within.holds
    assert missing.ratio is None and not missing.holds


def test_samples_of_nothing_are_as_precise_as_can_be() -> None:
    sequential = stopping.Sequential([Target("50", 0.01)])
    assert sequential.look([0] * 64).reached[0].holds
    assert sequential.look([0] * 96).over


def test_a_median_of_zero_between_others_is_never_precise() -> None:
    samples = random.Random(1).sample([0] * 40 + [1000] * 24, 64)
    look = stopping.Sequential([Target("50", 0.01)]).look(samples)
    assert look.reached[0].ratio == math.inf and not look.reached[0].holds
    assert look.runs_needed > 10**11


def test_nothing_to_reach_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one target"):
        stopping.Sequential([])
