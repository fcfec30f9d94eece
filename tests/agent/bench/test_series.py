from __future__ import annotations

import json
import lzma
import math
import random
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from boardbench.agent.bench import series

TRACES = Path(__file__).resolve().parents[3] / "benchmarks" / "traces"

DISTRIBUTIONS: dict[str, Callable[[random.Random], float]] = {
    "normal": lambda draw: draw.gauss(1.0, 0.03),
    "lognormal": lambda draw: draw.lognormvariate(0.0, 0.3),
    "bimodal": lambda draw: draw.gauss(1.3 if draw.random() < 0.3 else 1.0, 0.02),
    "uniform": lambda draw: draw.uniform(1.0, 1.3),
    "coarse": lambda draw: round(20 * draw.gauss(1.0, 0.1)) / 20,
}


def trace(name: str) -> list[int]:
    """A recording of a real model; the file says of which, and how it was taken."""
    with lzma.open(TRACES / f"{name}.json.xz", "rt") as file:
        return list(json.load(file)["samples_nanoseconds"])


def samples(draw: random.Random, count: int, kind: str = "normal") -> list[int]:
    return [round(1e6 * DISTRIBUTIONS[kind](draw)) for _ in range(count)]


# Silence


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("count", [30, 100, 1000])
def test_independent_samples_have_nothing_to_tell(kind: str, count: int) -> None:
    draw = random.Random(f"{kind} {count}")
    traces = 200 if count < 1000 else 50
    told = {"drift": 0, "modes": 0, "outliers": 0, "period": 0, "dependence": 0}
    for _ in range(traces):
        found = series.describe(samples(draw, count, kind))
        told["drift"] += found.drift is not None
        told["modes"] += found.modes is not None
        told["outliers"] += found.outliers is not None
        told["period"] += found.period is not None
        told["dependence"] += found.dependence.found
    if kind == "bimodal":
        del told["modes"]
    # Three where one in a hundred is what is allowed at most, and less is meant.
    assert all(times <= max(2, 0.015 * traces) for times in told.values()), told


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_a_hundred_thousand_have_nothing_to_tell_either(kind: str) -> None:
    found = series.describe(samples(random.Random(kind), 100_000, kind))
    assert found.drift is None and found.outliers is None and found.period is None
    assert (found.modes is not None) == (kind == "bimodal")


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300))
@settings(deadline=None, max_examples=200)
def test_any_samples_can_be_described(values: list[int]) -> None:
    found = series.describe(values)
    assert all(sentence and "nan" not in sentence for sentence in found.sentences())
    assert found == series.describe(array("Q", values))


@pytest.mark.parametrize("value", [0, 1, 10**9])
@pytest.mark.parametrize("count", [1, 2, 3, 16, 40, 100, 9000])
def test_samples_that_are_all_the_same_have_nothing_to_tell(value: int, count: int) -> None:
    assert list(series.describe([value] * count).sentences()) == []


# Drift


@pytest.mark.parametrize(
    ("count", "position", "ratio"),
    [
        (600, 420, 1.12),
        (100, 50, 1.1),
        (60, 30, 1.15),
        (1000, 950, 1.1),
        (1000, 30, 0.8),
        (20_000, 15_000, 1.04),
    ],
)
def test_a_step_is_found_where_it_is(count: int, position: int, ratio: float) -> None:
    draw = random.Random(count)
    for _ in range(5):
        values = samples(draw, count)
        values[position:] = [round(value * ratio) for value in values[position:]]
        found = series.drift(values, sorted(values))
        assert found is not None and found.kind == "step"
        assert found.position == pytest.approx(position, abs=max(4, count // 1000))
        assert found.ratio == pytest.approx(ratio, abs=0.03)
        assert found.percentile == 50.0


@pytest.mark.parametrize(("count", "ratio"), [(100, 1.15), (600, 1.1), (5000, 1.05), (600, 0.9)])
def test_a_trend_is_told_from_its_begin_to_its_end(count: int, ratio: float) -> None:
    draw = random.Random(count)
    for _ in range(5):
        values = [
            round(value * (1 + (ratio - 1) * place / count))
            for place, value in enumerate(samples(draw, count))
        ]
        found = series.drift(values, sorted(values))
        assert found is not None and found.kind == "trend"
        assert found.ratio == pytest.approx(ratio, abs=0.03)
        assert found.after_nanoseconds / found.before_nanoseconds == pytest.approx(found.ratio)


def test_drift_is_said_in_words() -> None:
    def said(values: list[int]) -> str:
        found = series.drift(values, sorted(values))
        assert found is not None
        return found.sentence

    draw = random.Random(1)
    noise = [round(1e6 * draw.gauss(1.0, 0.003)) for _ in range(1000)]
    assert said([*noise[:420], *(value * 112 // 100 for value in noise[420:])]) == (
        "from inference 421 on the inferences were 12% slower than before"
    )
    assert said([*(value * 3 for value in noise[:50]), *noise[50:]]) == (
        "the first 50 inferences were 3.0× slower than the rest"
    )
    assert said([value * (10_000 - place) // 10_000 for place, value in enumerate(noise)]) == (
        "the inferences got 10% faster from the first to the last, little by little"
    )


def test_slow_inferences_that_become_more_are_a_drift_of_the_slow() -> None:
    draw = random.Random(2)
    values = [
        round(1e6 * draw.gauss(1.5 if draw.random() < (0.05 if place < 1200 else 0.25) else 1.0, 0.02))
        for place in range(2000)
    ]
    found = series.drift(values, sorted(values))
    assert found is not None
    assert (found.kind, found.percentile) == ("step", 90.0)
    assert found.sentence.startswith("from inference ")
    assert found.sentence.endswith(" on the slowest 10 % of the inferences were 45% slower than before")
    assert 1150 < found.position < 1250


def test_a_change_that_does_not_matter_is_not_told() -> None:
    values = samples(random.Random(3), 20_000)
    values[10_000:] = [value * 1015 // 1000 for value in values[10_000:]]
    assert series.drift(values, sorted(values)) is None
    found = series.drift(values, sorted(values), least=0.01)
    assert found is not None
    assert found.ratio == pytest.approx(1.015, abs=0.002)


def test_waves_are_not_taken_for_drift() -> None:
    draw = random.Random(4)
    told = 0
    for _ in range(40):
        level, values = 0.0, []
        for _ in range(1000):
            level = 0.9 * level + draw.gauss(0.0, 0.44)
            values.append(round(1e6 * math.exp(0.05 * level)))
        told += series.drift(values, sorted(values)) is not None
    assert told <= 3


def test_a_neighbour_that_starts_is_found_in_a_recording() -> None:
    values = trace("neighbour_from_1201")
    found = series.drift(values, sorted(values))
    assert found is not None and found.kind == "step"
    assert 1195 <= found.position <= 1260
    assert 1.04 < found.ratio < 1.12


# Modes


@pytest.mark.parametrize(
    ("count", "share", "distance", "sigma"),
    [(100, 0.5, 1.4, 0.03), (1000, 0.1, 1.3, 0.03), (1000, 0.5, 1.1, 0.02), (20_000, 0.06, 1.5, 0.05)],
)
def test_two_modes_are_told_with_their_places_and_shares(
    count: int, share: float, distance: float, sigma: float
) -> None:
    draw = random.Random(count)
    values = [
        round(1e6 * draw.gauss(distance if draw.random() < share else 1.0, sigma)) for _ in range(count)
    ]
    found = series.modes(values, sorted(values))
    assert found is not None
    first, second = found.modes
    assert first.share + second.share == pytest.approx(1.0)
    assert second.share == pytest.approx(share, abs=0.06)
    assert second.nanoseconds / first.nanoseconds == pytest.approx(distance, rel=0.02)
    assert found.stretch is None


def test_three_modes_and_how_long_each_lasts() -> None:
    draw = random.Random(5)
    values = [round(1e6 * draw.gauss(1.0 + 0.4 * (place // 50 % 3), 0.02)) for place in range(3000)]
    found = series.modes(values, sorted(values))
    assert found is not None
    assert len(found.modes) == 3
    assert found.stretch == pytest.approx(50.0)
    assert found.sentence.startswith("the latencies gather around 3 values: ")
    assert found.sentence.endswith(" (33%) and 1.8 ms (33%), in stretches of about 50 inferences")


def test_modes_that_are_not_well_apart_are_not_told() -> None:
    draw = random.Random(6)
    for distance in (1.0, 1.03, 1.06):
        values = [
            round(1e6 * draw.gauss(distance if draw.random() < 0.5 else 1.0, 0.02)) for _ in range(2000)
        ]
        assert series.modes(values, sorted(values)) is None


def test_the_steps_of_a_coarse_clock_are_no_modes() -> None:
    draw = random.Random(7)
    values = [max(1, round(draw.gauss(12, 2))) * 1000 for _ in range(5000)]
    assert series.modes(values, sorted(values)) is None


# Outliers


def test_outliers_are_counted_and_the_worst_is_named() -> None:
    values = samples(random.Random(8), 1000)
    values[100], values[700], values[300] = 3_000_000, 48_500_000, 200_000
    found = series.outliers(values, sorted(values))
    assert found is not None
    assert (found.slow, found.fast) == (2, 1)
    assert (found.worst_nanoseconds, found.worst_position) == (48_500_000, 700)
    assert found.worst_ratio == pytest.approx(48.5, rel=0.01)
    assert found.time_share == pytest.approx((2 + 47.5) / (1000 + 49.5), rel=0.02)
    assert found.sentence == (
        "2 of 1000 inferences are outliers, up to 48.6× the median (48.5 ms, inference 701); "
        "they add 5% to the whole time; one is far faster than the rest"
    )


def test_more_than_a_twentieth_are_no_outliers() -> None:
    values = samples(random.Random(9), 1000)
    slow = [value * 3 for value in values[:60]]
    assert series.outliers([*slow, *values[60:]], sorted([*slow, *values[60:]])) is None
    fewer = [*slow[:40], *values[40:]]
    found = series.outliers(fewer, sorted(fewer))
    assert found is not None and found.slow == 40


def test_a_steady_model_has_no_outlier_a_little_off() -> None:
    values = [1_000_000 + place % 3 for place in range(200)]
    values[50] = 1_050_000
    assert series.outliers(values, sorted(values)) is None
    values[50] = 1_200_000
    found = series.outliers(values, sorted(values))
    assert found is not None and found.slow == 1


# Period


@pytest.mark.parametrize(
    ("count", "every", "ratio", "misses", "noise"),
    [
        (1000, 64, 3.0, 0.0, 0.0),
        (1000, 64, 3.0, 0.2, 0.0),
        (520, 64, 3.0, 0.0, 0.0),
        (1000, 2, 1.2, 0.0, 0.0),
        (200, 2, 1.2, 0.0, 0.0),
        (1000, 3, 1.3, 0.1, 0.0),
        (1000, 5, 1.15, 0.0, 0.0),
        (20_000, 64, 1.5, 0.2, 0.05),
        (20_000, 100, 1.2, 0.1, 0.02),
        (100, 10, 2.0, 0.0, 0.0),
        (60, 7, 2.0, 0.0, 0.0),
    ],
)
def test_a_period_is_found_with_its_phase(
    count: int, every: int, ratio: float, misses: float, noise: float
) -> None:
    draw = random.Random(count + every)
    for _ in range(5):
        values = samples(draw, count)
        phase = draw.randrange(every)
        for place in range(phase, count, every):
            if draw.random() >= misses:
                values[place] = round(values[place] * ratio)
        for place in range(count):
            if draw.random() < noise:
                values[place] = round(values[place] * ratio * draw.uniform(1.0, 1.3))
        found = series.period(values)
        assert found is not None
        assert (found.every, found.phase) == (every, phase)
        assert found.ratio == pytest.approx(ratio, rel=0.06)
        assert found.hits <= found.slots


def test_a_period_is_said_in_words() -> None:
    values = samples(random.Random(10), 640)
    for place in range(12, 640, 64):
        values[place] *= 3
    found = series.period(values)
    assert found is not None
    assert found.sentence == "every 64th inference is 3.0× slower (the first: inference 13)"
    values[12 + 64] //= 3
    again = series.period(values)
    assert again is not None
    assert "3.0× slower, 9 of 10 times (the first: inference 13)" in again.sentence
    values = [value * (6 + (place % 2)) // 6 for place, value in enumerate(samples(random.Random(11), 400))]
    alternating = series.period(values)
    assert alternating is not None
    assert alternating.sentence.startswith("every 2nd inference is 1")


def test_a_period_shows_through_a_machine_that_wanders() -> None:
    """Cold caches at every 64th inference of a real model, whose neighbours take a third more at times."""
    values = trace("cold_every_64th")
    found = series.period(values)
    assert found is not None
    assert (found.every, found.phase) == (64, 12)
    assert 1.1 < found.ratio < 1.3


@pytest.mark.parametrize(
    "name", ["mobilenet_v1_0.25_128", "keras_lstm_mnist", "tf2_mobilenet_v2_1.0_224", "deeplabv3_mnv2_dm05"]
)
def test_recordings_without_a_period_have_none(name: str) -> None:
    assert series.period(trace(name)) is None


def test_a_period_needs_eight_places() -> None:
    values = [1_000_000] * 56
    for place in range(3, 56, 8):
        values[place] = 2_000_000
    assert series.period(values) is None, "seven places"
    values += values[:8]
    found = series.period(values)
    assert found is not None and (found.every, found.slots) == (8, 8)
