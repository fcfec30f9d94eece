from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest

from boardbench.agent.bench import measure
from boardbench.agent.bench.measure import Bounds
from boardbench.agent.domain import Progress, Stage, StopReason

MILLISECOND = 1_000_000


class Time:
    """A clock that moves only when something is done: 1 ns a reading, and each inference's own time."""

    def __init__(self, inference: Callable[[int], int] = lambda _: MILLISECOND) -> None:
        self.now = 0
        self.runs = 0
        self.inference = inference

    def clock(self) -> int:
        self.now += 1
        return self.now

    def call(self) -> None:
        self.now += self.inference(self.runs)
        self.runs += 1


def measured(
    time: Time, bounds: Bounds, progress_seconds: float = 0.25, looks: measure.Looks | None = None
) -> tuple[list[int], list[Progress]]:
    samples, reports, _ = ended(time, bounds, progress_seconds, looks)
    return samples, reports


def ended(
    time: Time, bounds: Bounds, progress_seconds: float = 0.25, looks: measure.Looks | None = None
) -> tuple[list[int], list[Progress], StopReason]:
    reports: list[Progress] = []
    counted = measure.measure(
        time.call, bounds, reports.append, progress_seconds=progress_seconds, clock=time.clock, looks=looks
    )
    assert len(counted.samples) == time.runs  # every inference is counted, none is lost between batches
    return counted.samples.tolist(), reports, counted.reason


def test_samples_are_the_inferences_themselves_in_their_order() -> None:
    time = Time(lambda run: 1000 * (run + 1))
    samples, _ = measured(time, Bounds(seconds=0, least_runs=5))
    assert samples == [1001, 2001, 3001, 4001, 5001]  # and one reading of the clock


def test_it_ends_at_the_first_inference_past_the_duration() -> None:
    samples, _ = measured(Time(), Bounds(seconds=1.0, least_runs=10))
    assert len(samples) == 1000


def test_it_goes_on_to_the_least_runs_and_not_further() -> None:
    samples, _ = measured(Time(), Bounds(seconds=0.05, least_runs=700))
    assert len(samples) == 700


def test_most_runs_end_it_before_the_duration() -> None:
    samples, _ = measured(Time(), Bounds(seconds=10.0, least_runs=1, most_runs=333))
    assert len(samples) == 333


def test_one_inference_longer_than_everything_is_one_sample() -> None:
    samples, reports = measured(Time(lambda _: 10_000 * MILLISECOND), Bounds(seconds=1.0, least_runs=1))
    assert len(samples) == 1
    assert len(reports) == 1


def test_progress_is_told_four_times_a_second_and_rises_to_one() -> None:
    _, reports = measured(Time(), Bounds(seconds=10.0, least_runs=10))
    assert 38 <= len(reports) <= 43
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions, key=float)  # type: ignore[arg-type]
    assert fractions[-1] == 1.0
    assert all(report.stage is Stage.MEASURE for report in reports)
    assert [report.runs for report in reports] == sorted({report.runs for report in reports})
    assert reports[-1].runs == 10_000
    assert reports[-1].median_seconds == pytest.approx(0.001, rel=1e-5)
    assert reports[-1].elapsed_seconds == pytest.approx(10.0, rel=1e-3)


def test_the_fraction_is_that_of_the_bound_that_is_further_away() -> None:
    _, reports = measured(Time(), Bounds(seconds=0.1, least_runs=4000))
    assert reports[0].fraction == pytest.approx(reports[0].runs / 4000)
    _, reports = measured(Time(), Bounds(seconds=100.0, least_runs=1, most_runs=1000))
    assert reports[1].fraction == pytest.approx(reports[1].runs / 1000)


def test_telling_progress_is_not_in_the_samples() -> None:
    time = Time()
    bounds = Bounds(seconds=2.0, least_runs=1)

    def slow_report(_: Progress) -> None:
        time.now += 50 * MILLISECOND

    counted = measure.measure(time.call, bounds, slow_report, progress_seconds=0.25, clock=time.clock)
    assert set(counted.samples) == {MILLISECOND + 1}


def test_an_interim_median_looks_at_a_bounded_number_of_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []
    monkeypatch.setattr(measure.stats, "median", lambda samples: looked_at.append(len(samples)) or 1)
    measured(Time(lambda _: 1000), Bounds(seconds=0.1, least_runs=1), progress_seconds=0.01)
    assert looked_at and max(looked_at) < 2 * measure.INTERIM_SAMPLES


# -- what ends it ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        (Bounds(seconds=1.0, least_runs=10), StopReason.DURATION),
        (Bounds(seconds=1.0, least_runs=10, most_runs=2000), StopReason.DURATION),
        (Bounds(seconds=1.0, least_runs=10, most_runs=999), StopReason.RUNS),
        (Bounds(seconds=0.0, least_runs=10), StopReason.RUNS),
        (Bounds(seconds=0.1, least_runs=200), StopReason.RUNS),
        (Bounds(seconds=0.1, least_runs=200, most_runs=200), StopReason.RUNS),
    ],
)
def test_it_says_whether_time_or_number_ended_it(bounds: Bounds, reason: StopReason) -> None:
    assert ended(Time(), bounds)[2] is reason


class Looks:
    """Is content at its n-th look; looks at every hundredth inference, and takes its time."""

    def __init__(self, time: Time, content_at: int, least: int = 100) -> None:
        self.time = time
        self.content_at = content_at
        self.next_look = least
        self.seen: list[int] = []

    def look(self, samples: Any) -> bool:
        self.seen.append(len(samples))
        self.next_look = len(samples) + 100
        self.time.now += 7 * MILLISECOND
        return len(self.seen) >= self.content_at

    def fraction(self, runs: int) -> float | None:
        return runs / (100 * self.content_at) if self.seen else None


def test_a_precision_ends_it_at_the_first_look_that_is_content() -> None:
    time = Time()
    looks = Looks(time, content_at=4)
    bounds = Bounds(seconds=0.0, least_runs=1, most_seconds=60.0)
    samples, reports, reason = ended(time, bounds, looks=looks)
    assert looks.seen == [100, 200, 300, 400]
    assert (len(samples), reason) == (400, StopReason.PRECISION)
    assert set(samples) == {MILLISECOND + 1}  # no look is in a sample
    assert reports[-1].fraction == 1.0


def test_nobody_looks_before_the_least_time_and_number() -> None:
    time = Time()
    looks = Looks(time, content_at=1)
    samples, _, reason = ended(time, Bounds(seconds=0.35, least_runs=1, most_seconds=60.0), looks=looks)
    assert looks.seen == [350]
    assert reason is StopReason.PRECISION
    time = Time()
    looks = Looks(time, content_at=1)
    samples, _, _ = ended(time, Bounds(seconds=0.0, least_runs=777, most_seconds=60.0), looks=looks)
    assert looks.seen == [777] == [len(samples)]


def test_a_precision_that_is_not_reached_ends_with_the_time_or_the_number() -> None:
    time = Time()
    bounds = Bounds(seconds=0.1, least_runs=10, most_seconds=1.0)
    samples, _, reason = ended(time, bounds, looks=Looks(time, content_at=99))
    # Looks take time, too.
    assert reason is StopReason.DURATION
    assert 900 < len(samples) < 1000
    time = Time()
    bounds = Bounds(seconds=0.1, least_runs=10, most_runs=450, most_seconds=1.0)
    samples, _, reason = ended(time, bounds, looks=Looks(time, content_at=99))
    assert (reason, len(samples)) == (StopReason.RUNS, 450)


def test_the_most_seconds_bound_nothing_but_a_precision() -> None:
    samples, _ = measured(Time(), Bounds(seconds=1.0, least_runs=10, most_seconds=9.0))
    assert len(samples) == 1000


def test_the_fraction_follows_the_precision() -> None:
    time = Time()
    looks = Looks(time, content_at=20)
    bounds = Bounds(seconds=0.0, least_runs=1, most_seconds=600.0)
    _, reports = measured(time, bounds, progress_seconds=0.2, looks=looks)
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions, key=float)  # type: ignore[arg-type]
    middle = reports[len(reports) // 2]
    assert middle.fraction == pytest.approx(middle.runs / 2000, abs=0.01)


def test_a_loop_goes_on_until_it_is_told_and_keeps_nothing() -> None:
    time = Time()
    samples = measure.loop(
        Stage.MEASURE,
        time.call,
        measure.UntilTold(lambda: time.runs >= 250),
        lambda progress: None,
        progress_seconds=0.01,
        clock=time.clock,
    )
    assert time.runs == 250
    assert len(samples) == 0


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("failing", [True, False])
def test_the_collector_rests_while_it_is_timed_and_is_as_before_after(enabled: bool, failing: bool) -> None:
    seen: list[bool] = []

    def call() -> None:
        seen.append(gc.isenabled())
        if failing:
            raise ValueError("the engine fails")

    was_enabled = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        frozen = gc.get_freeze_count()
        try:
            with measure.collector_at_rest():
                measure.measure(call, Bounds(seconds=0, least_runs=3), lambda _: None, progress_seconds=1)
        except ValueError:
            assert failing
        assert gc.isenabled() is enabled
        assert gc.get_freeze_count() == frozen
    finally:
        gc.enable() if was_enabled else gc.disable()
    assert seen == [False] * (1 if failing else 3)


def test_the_window_is_that_of_the_measurement() -> None:
    time = Time()
    usage = measure.measure(
        time.call, Bounds(seconds=1.0, least_runs=1), lambda _: None, progress_seconds=1.0, clock=time.clock
    ).usage
    assert usage.wall_seconds == pytest.approx(1.0, rel=1e-3)
    assert usage.cpu_seconds >= 0
    if sys.platform == "linux":
        assert usage.involuntary_context_switches is not None
        assert usage.involuntary_context_switches >= 0


@pytest.mark.skipif(sys.platform != "linux", reason="counts what Linux counts")
def test_giving_up_the_processor_is_counted_apart_from_losing_it() -> None:
    _, usage = measure.observed(lambda: [threading.Event().wait(0.001) for _ in range(20)])
    assert usage.voluntary_context_switches is not None
    assert usage.voluntary_context_switches >= 20


def test_the_cost_of_the_clock_is_its_median_step() -> None:
    steps = iter([5, 100, 5, 5] * measure.CALIBRATION_READS)
    now = 0

    def clock() -> int:
        nonlocal now
        now += next(steps)
        return now

    cost = measure.clock_cost(clock)
    assert cost.median_seconds == pytest.approx(5e-9)
    assert cost.worst_seconds == pytest.approx(100e-9)


def test_a_clock_that_stands_costs_its_resolution(monkeypatch: pytest.MonkeyPatch) -> None:
    class Info:
        resolution = 1e-7

    monkeypatch.setattr(measure.time, "get_clock_info", lambda name: Info())
    assert measure.clock_cost(lambda: 1) == measure.ClockCost(1e-7, 1e-7)


def test_the_real_clock_can_be_read() -> None:
    cost = measure.clock_cost()
    assert 0 < cost.median_seconds <= cost.worst_seconds


def test_processors_are_those_of_this_process() -> None:
    found: Any = measure.processors()
    assert list(found) == sorted(set(found))
    assert found or sys.platform != "linux"
