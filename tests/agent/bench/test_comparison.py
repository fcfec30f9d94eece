from __future__ import annotations

import itertools
import math
import random

import pytest

from boardbench.agent.bench import comparison


def test_a_ratio_is_told_with_bounds() -> None:
    ours = [1.10, 1.12, 1.09, 1.11, 1.10, 1.13]
    theirs = [1.00, 1.01, 1.00, 1.00, 0.99, 1.02]
    found = comparison.by_turns(ours, theirs, 0.95)
    assert found is not None
    ratios = [one / other for one, other in zip(ours, theirs, strict=True)]
    # Of six turns the bounds are the extremes, at 1 - 2 / 2^6 = 96.9 %.
    assert (found.low, found.high) == (pytest.approx(min(ratios)), pytest.approx(max(ratios)))
    assert found.low < found.ratio < found.high
    assert found.differs and found.unit == "process"


def test_turns_that_contradict_each_other_are_noise() -> None:
    found = comparison.by_turns([1.0, 1.1, 0.9, 1.0, 1.05, 0.96, 1.01], [1.0] * 7, 0.95)
    assert found is not None
    assert not found.differs


@pytest.mark.parametrize(("confidence", "turns"), [(0.9, 5), (0.95, 6), (0.99, 8)])
def test_the_fewest_turns(confidence: float, turns: int) -> None:
    """n signs are all alike by chance in 2 of 2^n cases."""
    assert 2 / 2**turns <= 1 - confidence < 2 / 2 ** (turns - 1)
    assert comparison.least_turns(confidence) == turns
    assert comparison.by_turns([1.1] * turns, [1.0] * turns, confidence) is not None
    assert comparison.by_turns([1.1] * (turns - 1), [1.0] * (turns - 1), confidence) is None


@pytest.mark.parametrize("turns", [6, 9, 12])
def test_bounds_are_those_of_the_test_with_all_signs(turns: int) -> None:
    """A shift is within the bounds exactly when Wilcoxon's test, counting all signs, does not reject it."""
    draw = random.Random(turns)
    ratios = [draw.lognormvariate(0.1, 0.05) for _ in range(turns)]
    found = comparison.by_turns(ratios, [1.0] * turns, 0.95)
    assert found is not None

    def rejected(shift: float) -> bool:
        distances = [math.log(ratio) - math.log(shift) for ratio in ratios]
        ranked = sorted(range(turns), key=lambda place: abs(distances[place]))
        positive = sum(rank for rank, place in enumerate(ranked, 1) if distances[place] > 0)
        sums = [
            sum(rank for rank, sign in enumerate(signs, 1) if sign)
            for signs in itertools.product((False, True), repeat=turns)
        ]
        chance = min(sum(each <= positive for each in sums), sum(each >= positive for each in sums)) / len(
            sums
        )
        return 2 * chance <= 0.05

    assert rejected(found.low * 0.99999) and not rejected(found.low * 1.00001)
    assert rejected(found.high * 1.00001) and not rejected(found.high * 0.99999)


@pytest.mark.parametrize("disturbed", [0.0, 0.1])
def test_bounds_hold_whatever_the_board_does_from_turn_to_turn(disturbed: float) -> None:
    draw = random.Random(5)
    covered = 0
    for _ in range(400):
        ours, theirs = [], []
        for turn in range(8):
            heat = 1 + 0.05 * turn
            for medians, factor in ((ours, 1.03), (theirs, 1.0)):
                noise = 1.5 if draw.random() < disturbed else 1.0
                medians.append(heat * factor * noise * draw.lognormvariate(0.0, 0.01))
        found = comparison.by_turns(ours, theirs, 0.95)
        assert found is not None
        covered += found.low <= 1.03 <= found.high
    assert covered >= 0.93 * 400


def test_turns_of_nothing_do_not_count() -> None:
    ours, theirs = [1.1] * 7, [1.0] * 6 + [0.0]
    assert comparison.by_turns(ours, theirs, 0.95) == comparison.by_turns(ours[:6], theirs[:6], 0.95)
    assert comparison.by_turns(ours, theirs[:5], 0.95) is None


def test_samples_stand_in_where_processes_are_few() -> None:
    found = comparison.by_samples((0.99, 1.0, 1.01), (0.97, 0.98, 0.99))
    assert found is not None
    assert found.unit == "sample"
    assert found.ratio == pytest.approx(1 / 0.98)
    # Distances of logarithms, added as standard errors are.
    assert math.log(found.high / found.ratio) == pytest.approx(
        math.hypot(math.log(1.01), math.log(0.98 / 0.97))
    )
    assert found.differs
    assert comparison.by_samples((0.0, 1.0, 1.01), (0.97, 0.98, 0.99)) is None
    assert "others may differ" in comparison.SAMPLES_ONLY
