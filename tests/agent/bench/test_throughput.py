from __future__ import annotations

import random

import pytest

from boardbench.agent.bench import throughput
from boardbench.agent.bench.throughput import of_streams, one_after_the_other

MILLISECOND = 1_000_000


def stream(begin: int, durations: list[int]) -> tuple[list[int], list[int]]:
    begins, ends = [], []
    for duration in durations:
        begins.append(begin)
        begin += duration
        ends.append(begin)
    return begins, ends


def test_streams_add_up_and_a_batch_counts_whole() -> None:
    streams = [stream(0, [10 * MILLISECOND] * 100), stream(0, [20 * MILLISECOND] * 50)]
    found = of_streams(streams, 8, 0.95)
    assert found is not None
    assert found.hertz == pytest.approx(8 * (100 + 50))


def test_only_the_time_in_which_all_worked_counts() -> None:
    # The second one begins later and ends earlier; what the first did by itself is left out.
    streams = [stream(0, [10 * MILLISECOND] * 100), stream(205 * MILLISECOND, [10 * MILLISECOND] * 50)]
    found = of_streams(streams, 1, 0.95)
    assert found is not None
    assert found.hertz == pytest.approx(200)
    assert of_streams([stream(0, [5]), stream(6, [5])], 1, 0.95) is None


def test_constant_work_has_bounds_on_itself_wherever_it_is_cut() -> None:
    found = one_after_the_other([7 * MILLISECOND] * 131, 1, 0.95)
    assert found.low_hertz is not None and found.high_hertz is not None
    assert found.low_hertz == pytest.approx(1000 / 7)
    assert found.high_hertz == pytest.approx(1000 / 7)


def test_of_few_inferences_there_are_no_bounds() -> None:
    few = throughput.LEAST_STRETCHES * throughput.LEAST_IN_STRETCH - 1
    found = one_after_the_other([MILLISECOND] * few, 1, 0.95)
    assert (found.hertz, found.low_hertz) == (pytest.approx(1000), None)
    assert one_after_the_other([MILLISECOND] * (few + 1), 1, 0.95).low_hertz is not None


@pytest.mark.parametrize("alike", [0.0, 0.7])
def test_bounds_enclose_the_truth_as_often_as_is_said(alike: float) -> None:
    noise = random.Random(11)
    truth, hits, rounds = 1000.0, 0, 400
    for _ in range(rounds):
        durations, state = [], 0.0
        for _ in range(900):
            state = alike * state + noise.gauss(0, 0.1 * (1 - alike**2) ** 0.5)
            durations.append(max(1, int(MILLISECOND * (1 + state))))
        found = one_after_the_other(durations, 1, 0.95)
        assert found.low_hertz is not None and found.high_hertz is not None
        hits += found.low_hertz <= truth <= found.high_hertz
    # 95 % of 400 is 380 with a standard deviation of 4.4; stretches of 30 are not quite independent.
    assert hits >= (366 if alike == 0 else 350)
