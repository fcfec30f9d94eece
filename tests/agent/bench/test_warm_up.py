"""The warm-up: as long as it was asked for, then until it is steady, and not for ever."""

from __future__ import annotations

import random

import pytest

from boardbench.agent.bench import warm_up
from boardbench.agent.domain import Progress, Stage, WarmUp

from .test_measure import MILLISECOND, Time


def warmed(time: Time, seconds: float, runs: int) -> tuple[WarmUp, list[Progress]]:
    reports: list[Progress] = []
    found = warm_up.warm_up(time.call, seconds, runs, reports.append, progress_seconds=0.05, clock=time.clock)
    assert found.runs == time.runs
    assert all(report.stage is Stage.WARM_UP for report in reports)
    assert (reports[-1].fraction if reports else 1.0) == 1.0
    return found, reports


@pytest.mark.parametrize(
    ("seconds", "runs", "expected"), [(0.0, 0, 0), (0.0, 7, 7), (0.1, 0, 100), (0.1, 200, 200), (0.5, 3, 500)]
)
def test_a_steady_one_is_as_long_as_was_asked_for(seconds: float, runs: int, expected: int) -> None:
    found, _ = warmed(Time(), seconds, runs)
    assert found.runs == expected
    assert found.steady is (True if expected >= 18 else None)


def test_without_seconds_it_is_exactly_as_many_inferences_steady_or_not() -> None:
    found, _ = warmed(Time(lambda run: MILLISECOND * (100 - run)), 0.0, 60)
    assert (found.runs, found.steady) == (60, False)


def test_it_goes_on_until_the_slow_beginning_has_left_the_last_half() -> None:
    # 0.4 s of inferences that get faster, from 4 ms to 1 ms, and 1 ms from there on.
    def inference(run: int) -> int:
        return max(MILLISECOND, 4 * MILLISECOND - run * MILLISECOND // 50)

    found, reports = warmed(Time(inference), 0.2, 1)
    assert found.steady is True
    # The medians of its windows are from 257 on: the slow ones are then less than half of the first window.
    assert 257 < found.runs < 400
    beyond = [report.fraction for report in reports if report.elapsed_seconds > 0.2][:-1]
    assert beyond and set(beyond) == {None}  # how long it will take is not known


def test_what_never_gets_steady_ends_at_ten_times_the_time() -> None:
    found, _ = warmed(Time(lambda run: MILLISECOND + run * MILLISECOND // 100), 0.1, 1)
    assert found.steady is False
    assert found.seconds == pytest.approx(1.0, abs=0.02)


def test_a_long_one_goes_on_for_half_a_minute_at_most() -> None:
    found, _ = warmed(Time(lambda run: 50 * MILLISECOND + run * MILLISECOND), 20.0, 1)
    assert found.steady is False
    assert found.seconds == pytest.approx(50.0, abs=1.0)


def test_a_slow_model_is_not_warmed_up_for_an_answer_that_takes_too_long() -> None:
    # 18 inferences are needed to tell. At 20 ms that is within ten times 0.1 s, at 100 ms it is not.
    found, _ = warmed(Time(lambda _: 20 * MILLISECOND), 0.1, 1)
    assert (found.runs, found.steady) == (18, True)
    found, _ = warmed(Time(lambda _: 100 * MILLISECOND), 0.1, 1)
    assert (found.runs, found.steady) == (1, None)


def test_noise_is_steady() -> None:
    noise = random.Random(5)
    found, _ = warmed(Time(lambda _: int(MILLISECOND * noise.lognormvariate(0, 0.2))), 0.5, 1)
    assert found.steady is True


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((1000, 1000, 1000), True),
        ((1009, 1000, 1005), True),  # nobody would tell them apart
        ((1030, 1000, 1000), False),  # sure, as the windows do not vary
        ((1000, 1030, 1000), False),
        ((1000, 1000, 1030), False),
    ],
)
def test_windows_without_noise_agree_within_a_percent(windows: tuple[int, ...], expected: bool) -> None:
    samples = [value for value in windows for _ in range(50)]
    assert warm_up.steady([*([1000] * 150), *samples]) is expected  # only the last half is looked at


def test_bounds_that_overlap_excuse_a_difference_up_to_ten_percent() -> None:
    def window(middle: int) -> list[int]:
        return [middle + spread for spread in (-300, -100, -1, 1, 100, 300)]

    assert warm_up.steady([*window(1000), *window(1080), *window(1000)]) is True
    assert warm_up.steady([*window(1000), *window(1150), *window(1000)]) is False


def test_of_fewer_than_eighteen_nothing_is_known() -> None:
    assert warm_up.steady([5] * 17) is None
    assert warm_up.steady([5] * 18) is True


def test_the_first_thousand_are_kept() -> None:
    found, _ = warmed(Time(lambda run: 1000 + run % 7), 0.01, 1)
    assert found.runs > 1000
    assert len(found.samples_nanoseconds) == 1000
    assert found.samples_nanoseconds[:3] == (1001, 1002, 1003)  # and one reading of the clock
    few, _ = warmed(Time(), 0.0, 3)
    assert few.samples_nanoseconds == (MILLISECOND + 1,) * 3
