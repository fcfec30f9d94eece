"""Ways of asking for inferences: on a clock that moves only when something is done, so that all is exact."""

from __future__ import annotations

import itertools
import math
import random
import threading
import time as real_time
from array import array
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from boardbench.agent.bench import measure, scenarios, stats
from boardbench.agent.bench.doubts import Thresholds
from boardbench.agent.bench.runtime import OptionRejected
from boardbench.agent.bench.scenarios import open_loop, sustained
from boardbench.agent.domain import Progress, Scenario, ScenarioKind, Severity, Stage, StopReason, Window

MILLISECOND = 1_000_000
TICK = 100  # nanoseconds that a reading of the clock takes


class Board:
    """A clock that moves by what is done, an engine, and a timer that is late by a settled time."""

    def __init__(self, inference: Callable[[int], int], *, late: int = 0) -> None:
        self.now = 0
        self.runs = 0
        self.inference = inference
        self.late = late
        self.slept: list[float] = []

    def clock(self) -> int:
        self.now += TICK
        return self.now

    def call(self) -> None:
        self.now += self.inference(self.runs)
        self.runs += 1

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += int(seconds * 1e9) + self.late


def terms(board: Board, reports: list[Progress] | None = None, **changes: Any) -> scenarios.Terms:
    bounds = {"seconds": 1.0, "least_runs": 1, "most_runs": 1_000_000}
    bounds.update({name: changes.pop(name) for name in (*bounds, "most_seconds") if name in changes})
    return scenarios.Terms(
        bounds=measure.Bounds(**bounds),  # type: ignore[arg-type]
        report=(lambda _: None) if reports is None else reports.append,
        progress_seconds=changes.pop("progress_seconds", 0.25),
        confidence=0.95,
        clock=board.clock,
        sleep=board.sleep,
        **changes,
    )


def drive(kind: str, board: Board, given: scenarios.Terms, seed: int = 0, **fields: Any) -> scenarios.Drive:
    scenario = scenarios.settle(
        Scenario(kind=ScenarioKind[kind], **fields), duration_seconds=given.bounds.seconds
    )
    return scenarios.create(scenario, [board.call], given, seed=seed)


def run(kind: str, board: Board, given: scenarios.Terms | None = None, **fields: Any) -> scenarios.Run:
    return drive(kind, board, given or terms(board), **fields).measure()


def codes(found: scenarios.Run) -> list[str]:
    return [warning.code for warning in found.warnings]


# -- what can be asked for -------------------------------------------------------------------------------


def test_every_default_is_filled_in() -> None:
    def settled(kind: str, **fields: Any) -> Scenario:
        return scenarios.settle(Scenario(kind=ScenarioKind[kind], **fields), duration_seconds=1800.0)

    assert scenarios.settle(None, duration_seconds=1.0) == Scenario()
    assert settled("PERIODIC", rate_hertz=50.0).deadline_seconds == 0.02
    assert settled("POISSON", rate_hertz=50.0, deadline_seconds=0.1).deadline_seconds == 0.1
    assert settled("MULTI_STREAM").streams == 8
    assert settled("OFFLINE").streams == 1
    assert settled("SUSTAINED").window_seconds == 60.0
    brief = scenarios.settle(Scenario(kind=ScenarioKind.SUSTAINED), duration_seconds=30.0)
    assert brief.window_seconds == 3.0


@pytest.mark.parametrize(
    ("kind", "fields", "said"),
    [
        ("PERIODIC", {}, "periodic needs a rate"),
        ("POISSON", {}, "poisson needs a rate"),
        ("PERIODIC", {"rate_hertz": 0.0}, "above 0"),
        ("PERIODIC", {"rate_hertz": math.inf}, "above 0"),
        ("PERIODIC", {"rate_hertz": 1.0, "streams": 2}, "it is for offline and multi stream"),
        ("SINGLE_STREAM", {"rate_hertz": 1.0}, "it is for periodic and poisson"),
        ("MULTI_STREAM", {"batch": 2}, "it is for offline"),
        ("OFFLINE", {"window_seconds": 2.0}, "it is for sustained"),
        ("OFFLINE", {"streams": 0}, "above 0"),
        ("OFFLINE", {"streams": 4096}, "from 1 to 1024"),
        ("OFFLINE", {"batch": 2.5}, "whole number"),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(kind: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionRejected, match=said):
        scenarios.settle(Scenario(kind=ScenarioKind[kind], **fields), duration_seconds=1.0)


def test_only_offline_wants_several_instances() -> None:
    assert scenarios.instances(Scenario(kind=ScenarioKind.OFFLINE, streams=3)) == 3
    assert scenarios.instances(Scenario(kind=ScenarioKind.MULTI_STREAM, streams=8)) == 1


# -- one after the other -----------------------------------------------------------------------------------


def test_single_stream_is_the_plain_loop() -> None:
    board = Board(lambda _: MILLISECOND)
    found = run("SINGLE_STREAM", board)
    assert set(found.samples) == {MILLISECOND + TICK}
    assert found.inferences == len(found.samples) == board.runs
    assert found.result is None
    assert found.service is None


def test_a_query_of_multi_stream_ends_with_its_last_sample() -> None:
    board = Board(lambda run: MILLISECOND)
    found = run("MULTI_STREAM", board, streams=4)
    assert set(found.samples) == {4 * MILLISECOND + TICK}
    assert found.inferences == board.runs == 4 * len(found.samples)
    assert found.inference_nanoseconds == pytest.approx(MILLISECOND, rel=1e-3)
    assert found.result is not None
    assert found.result.kind is ScenarioKind.MULTI_STREAM
    assert found.result.throughput_hertz == pytest.approx(1000, rel=1e-3)
    assert found.result.throughput_low_hertz is not None and found.result.throughput_high_hertz is not None
    assert found.result.throughput_low_hertz <= found.result.throughput_hertz
    assert found.result.throughput_hertz <= found.result.throughput_high_hertz


# -- intended starts -----------------------------------------------------------------------------------------


def test_periodic_starts_do_not_drift() -> None:
    offsets = list(itertools.islice(open_loop.periodic(30.0), 90_001))
    assert offsets[0] == 0
    assert offsets[1] == 33_333_333
    assert offsets[90_000] == 3_000_000_000_000
    assert max(abs((after - before) - 1e9 / 30) for before, after in itertools.pairwise(offsets)) <= 1


def test_poisson_starts_have_their_rate_and_distribution_and_are_those_of_the_seed() -> None:
    offsets = list(itertools.islice(open_loop.poisson(200.0, 7), 20_000))
    gaps = sorted(after - before for before, after in itertools.pairwise([0, *offsets]))
    assert offsets == sorted(offsets)
    assert offsets == list(itertools.islice(open_loop.poisson(200.0, 7), 20_000))
    assert offsets != list(itertools.islice(open_loop.poisson(200.0, 8), 20_000))
    # Quantiles of the exponential distribution; four standard errors of 20,000.
    for share in (0.25, 0.5, 0.9):
        expected = -math.log(1 - share) / 200.0
        error = 4 * math.sqrt(share * (1 - share) / 20_000) / ((1 - share) * 200.0)
        assert gaps[int(share * 20_000)] / 1e9 == pytest.approx(expected, abs=error)


def test_a_camera_that_is_kept_up_with() -> None:
    board = Board(lambda _: 10 * MILLISECOND)
    found = run("PERIODIC", board, rate_hertz=30.0)
    assert len(found.samples) == 30
    assert found.reason is StopReason.DURATION
    # The intended start is met to some readings of the clock.
    assert max(found.samples) <= 10 * MILLISECOND + 4 * TICK
    assert found.service is not None and set(found.service) == {10 * MILLISECOND + TICK}
    result = found.result
    assert result is not None
    assert (result.deadline_misses, result.most_waiting) == (0, 0)
    assert result.deadline_seconds == pytest.approx(1 / 30)
    assert result.worst_start_delay_seconds is not None
    assert result.worst_start_delay_seconds <= 3 * TICK / 1e9
    assert result.throughput_hertz == pytest.approx(30, rel=1e-6)
    assert codes(found) == []
    # It sleeps, and looks at the clock only at the end.
    assert all(seconds <= 0.0334 for seconds in board.slept)
    assert len(board.slept) == 30


def arrivals_of(kind: str) -> Iterator[int]:
    return open_loop.periodic(100.0) if kind == "PERIODIC" else open_loop.poisson(100.0, 3)


def queued(intended: list[int], services: list[int]) -> list[int]:
    """Latency from the intended start of a single server that serves in order (Lindley's recursion)."""
    free, latencies = 0, []
    for start, service in zip(intended, services, strict=True):
        free = max(free, start) + service
        latencies.append(free - start)
    return latencies


@pytest.mark.parametrize("stall", [50, 200, 800])
@pytest.mark.parametrize("kind", ["PERIODIC", "POISSON"])
def test_a_stall_is_in_the_latency_of_all_that_it_held_up(kind: str, stall: int) -> None:
    """Coordinated omission: who waits for the answer before asking again sees one slow inference."""

    def inference(number: int) -> int:
        return stall * MILLISECOND if number == 40 else 4 * MILLISECOND

    board = Board(inference)
    found = run(kind, board, terms(board, seconds=3.0), rate_hertz=100.0, seed=3)
    intended = list(itertools.takewhile(lambda offset: offset < 3e9, arrivals_of(kind)))
    expected = queued(intended, [inference(number) for number in range(len(intended))])
    assert len(found.samples) == len(expected)
    for percentile in ("50", "90", "95", "99"):
        place = stats.rank(percentile, len(expected)) - 1
        assert sorted(found.samples)[place] == pytest.approx(sorted(expected)[place], rel=0.01)
    assert found.samples.tolist() == pytest.approx(expected, rel=0.01)
    # The engine alone had one slow inference.
    assert found.service is not None
    assert sum(service > 5 * MILLISECOND for service in found.service) == 1
    result = found.result
    assert result is not None
    assert result.deadline_misses == sum(latency > 10 * MILLISECOND for latency in expected)
    following = next(itertools.dropwhile(lambda offset: offset < 3e9, arrivals_of(kind)))
    assert result.throughput_hertz == pytest.approx(len(expected) * 1e9 / following, rel=1e-6)
    ends = [start + latency for start, latency in zip(intended, expected, strict=True)]
    waiting = [sum(start <= end for start in intended) - place for place, end in enumerate(ends, start=1)]
    assert result.most_waiting == pytest.approx(max(waiting), abs=1)
    assert result.most_waiting >= stall // 20


def test_the_plain_loop_would_have_hidden_the_stall() -> None:
    def inference(number: int) -> int:
        return 800 * MILLISECOND if number == 40 else 4 * MILLISECOND

    board = Board(inference)
    closed = run("SINGLE_STREAM", board, terms(board, least_runs=300, seconds=0.0))
    board = Board(inference)
    opened = run("PERIODIC", board, terms(board, seconds=3.0), rate_hertz=100.0)
    p90 = stats.rank("90", 300) - 1
    assert sorted(closed.samples)[p90] < 5 * MILLISECOND
    assert sorted(opened.samples)[p90] > 400 * MILLISECOND


def test_more_than_the_board_can_do_is_said_and_ends() -> None:
    board = Board(lambda _: 100 * MILLISECOND)
    found = run("PERIODIC", board, terms(board, seconds=3.0, least_runs=10), rate_hertz=30.0)
    (warning,) = found.warnings
    assert (warning.code, warning.severity) == ("overloaded", Severity.INVALID)
    assert warning.evidence["utilisation_ratio"] == pytest.approx(3.0, rel=1e-3)
    assert warning.evidence["capacity_hertz"] == pytest.approx(10.0, rel=1e-3)
    assert "the queue grows" in warning.message
    assert list(found.samples) == sorted(found.samples)
    # All that was due in three seconds was done, nine seconds long: none began twice three seconds late.
    assert len(found.samples) == 90
    assert board.now < 9.5e9


def test_a_queue_without_end_is_given_up_after_the_least_number() -> None:
    board = Board(lambda _: 1000 * MILLISECOND)
    found = run("PERIODIC", board, terms(board, seconds=3.0, least_runs=12), rate_hertz=30.0)
    assert len(found.samples) == 12
    assert found.reason is StopReason.DURATION
    (warning,) = found.warnings
    assert warning.evidence["inferences_left"] == 90 - 12
    assert "78 that were due were not begun any more" in warning.message


def test_a_timer_that_is_late_is_told_and_counts() -> None:
    board = Board(lambda _: 4 * MILLISECOND, late=3 * MILLISECOND)
    found = run("PERIODIC", board, rate_hertz=50.0)
    assert found.result is not None
    # It wakes up 1 ms early, and 3 ms late.
    assert found.result.worst_start_delay_seconds == pytest.approx(2e-3, rel=0.01)
    assert stats.median(found.samples) == pytest.approx(6 * MILLISECOND, rel=0.01)
    (warning,) = found.warnings
    assert (warning.code, warning.severity) == ("late_starts", Severity.DOUBTFUL)
    assert warning.evidence["start_delay_seconds"] == pytest.approx(2e-3, rel=0.01)


def test_a_timer_that_is_late_once_in_a_while_is_told_as_the_worst_and_not_doubted() -> None:
    board = Board(lambda _: 4 * MILLISECOND)
    sleep, late = board.sleep, iter([9 * MILLISECOND if number % 25 == 7 else 0 for number in range(100)])

    def sometimes_late(seconds: float) -> None:
        board.late = next(late)
        sleep(seconds)

    board.sleep = sometimes_late  # type: ignore[method-assign]
    asked = drive("PERIODIC", board, terms(board, seconds=2.0), rate_hertz=50.0)
    found = asked.measure()
    assert found.result is not None
    assert found.result.worst_start_delay_seconds == pytest.approx(8e-3, rel=0.01)
    assert codes(found) == []


def test_what_waiting_takes_of_the_processor_is_not_the_engine_s() -> None:
    board = Board(lambda _: 2 * MILLISECOND)
    found = run("PERIODIC", board, rate_hertz=100.0)
    assert found.engine_wall_seconds == pytest.approx(0.2, rel=0.01)
    assert found.usage.wall_seconds == pytest.approx(1.0, rel=0.02)
    assert found.engine_cpu_seconds == 0.0  # 1 ms of every 10 was spent on watching this clock
    assert found.usage.queued_seconds is None


@pytest.mark.parametrize(
    ("bounds", "expected", "reason"),
    [
        ({"seconds": 0.5}, 50, StopReason.DURATION),
        ({"seconds": 0.5, "least_runs": 80}, 80, StopReason.RUNS),
        ({"seconds": 9.0, "most_runs": 30}, 30, StopReason.RUNS),
        ({"seconds": 0.0, "least_runs": 20}, 20, StopReason.RUNS),
    ],
)
def test_intended_starts_lie_in_the_duration_or_are_counted(
    bounds: dict[str, Any], expected: int, reason: StopReason
) -> None:
    board = Board(lambda _: MILLISECOND)
    found = run("PERIODIC", board, terms(board, **bounds), rate_hertz=100.0)
    assert (len(found.samples), found.reason) == (expected, reason)


class Looks:
    """Content after so many looks; each takes a settled time."""

    def __init__(self, board: Board, content_at: int, cost: int) -> None:
        self.board = board
        self.content_at = content_at
        self.cost = cost
        self.next_look = 64
        self.seen: list[int] = []

    def look(self, samples: array[int]) -> bool:
        self.seen.append(len(samples))
        self.next_look = len(samples) + 10
        self.board.now += self.cost
        return len(self.seen) >= self.content_at

    def fraction(self, runs: int) -> float | None:
        return None


def test_looks_are_taken_where_nothing_is_due_soon() -> None:
    board = Board(lambda _: 2 * MILLISECOND)
    looks = Looks(board, content_at=3, cost=MILLISECOND)
    found = run(
        "PERIODIC", board, terms(board, seconds=0.0, most_seconds=60.0, looks=looks), rate_hertz=100.0
    )
    assert found.reason is StopReason.PRECISION
    assert looks.seen == [64, 74, 84]
    assert len(found.samples) == 84
    assert max(found.samples) <= 2 * MILLISECOND + 4 * TICK  # none of them was made late


def test_a_look_for_which_there_is_no_time_is_not_taken() -> None:
    board = Board(lambda _: 9 * MILLISECOND)
    looks = Looks(board, content_at=1, cost=MILLISECOND)
    found = run("PERIODIC", board, terms(board, seconds=0.0, most_seconds=2.0, looks=looks), rate_hertz=100.0)
    assert (looks.seen, found.reason, len(found.samples)) == ([], StopReason.DURATION, 200)


@pytest.mark.parametrize("work", [2, 30])
def test_progress_of_intended_starts_rises_to_one_busy_or_not(work: int) -> None:
    board = Board(lambda _: work * MILLISECOND)
    reports: list[Progress] = []
    run("PERIODIC", board, terms(board, reports, seconds=3.0, progress_seconds=0.1), rate_hertz=100.0)
    fractions = [report.fraction for report in reports]
    assert len(reports) >= 7
    assert fractions == sorted(fractions, key=float)  # type: ignore[arg-type]
    assert fractions[-1] == 1.0
    assert all(report.stage is Stage.MEASURE for report in reports)
    assert reports[-1].runs == board.runs


def test_the_load_goes_on_uncounted_until_told() -> None:
    board = Board(lambda _: 2 * MILLISECOND)
    asked = drive("PERIODIC", board, terms(board), rate_hertz=100.0)
    asked.fill(lambda: board.runs >= 25)
    assert board.runs == 25
    assert board.now == pytest.approx(250 * MILLISECOND, abs=20 * MILLISECOND)  # at its rate, not flat out


# -- sustained -----------------------------------------------------------------------------------------------


def throttling(at: int, before: int, after: int) -> Callable[[int], int]:
    """Inferences of ``before`` ms up to number ``at``, and of ``after`` ms from there on."""
    noise = random.Random(1)
    return lambda run: int((before if run < at else after) * MILLISECOND * noise.uniform(0.99, 1.01))


def test_windows_hold_every_inference_where_it_ended() -> None:
    board = Board(lambda _: 40 * MILLISECOND)
    found = run("SUSTAINED", board, terms(board, seconds=10.0), window_seconds=1.0)
    assert found.result is not None
    windows = found.result.windows
    assert len(windows) == 10
    assert [window.begin_seconds for window in windows] == pytest.approx(list(range(10)))
    assert [window.end_seconds for window in windows[:-1]] == pytest.approx(list(range(1, 10)))
    assert windows[-1].end_seconds == pytest.approx(10.0, abs=0.05)
    # 40.0005 ms each: 24 end in the first second, then 25 in each, and one more at the end.
    assert [window.count for window in windows] == [24, *[25] * 8, 26]
    assert sum(window.count for window in windows) == board.runs == len(found.samples)
    assert all(window.median_seconds == pytest.approx(0.04, rel=1e-3) for window in windows)
    assert found.reason is StopReason.DURATION
    assert codes(found) == []


def test_the_steady_end_after_throttling_is_told_beside_the_beginning() -> None:
    board = Board(throttling(300, 10, 18))
    found = run("SUSTAINED", board, terms(board, seconds=20.0), window_seconds=1.0)
    result = found.result
    assert result is not None
    assert result.steady_median_seconds == pytest.approx(0.018, rel=0.01)
    assert result.slowdown_ratio == pytest.approx(1.8, rel=0.01)
    (warning,) = found.warnings
    assert (warning.code, warning.severity) == ("slowed_down", Severity.NOTE)
    assert warning.evidence["steady_from_seconds"] == pytest.approx(3.0)
    assert "from 3 s on the median is 1.80 times" in warning.message
    assert result.throughput_hertz == pytest.approx(board.runs / 20.0, rel=0.01)


def test_what_changes_to_the_end_has_no_steady_end() -> None:
    board = Board(lambda run: 10 * MILLISECOND + run * MILLISECOND // 50)
    found = run("SUSTAINED", board, terms(board, seconds=20.0), window_seconds=1.0)
    assert found.result is not None
    assert found.result.steady_median_seconds is None
    assert found.result.slowdown_ratio is not None and found.result.slowdown_ratio > 1.5
    assert codes(found) == ["still_changing"]


def test_too_few_windows_have_no_steady_end_either() -> None:
    board = Board(lambda _: 10 * MILLISECOND)
    found = run("SUSTAINED", board, terms(board, seconds=2.0), window_seconds=1.0)
    assert codes(found) == ["still_changing"]


def test_of_many_samples_every_second_is_left_out_as_often_as_it_takes() -> None:
    board = Board(lambda run: MILLISECOND + run)
    found = run("SUSTAINED", board, terms(board, seconds=20.0, most_runs=1500), window_seconds=1.0)
    assert found.result is not None
    counted = sum(window.count for window in found.result.windows)
    assert counted == board.runs == found.inferences > 19_000
    assert 750 <= len(found.samples) <= 1500
    # Each sample tells its number: one of sixteen, from the first one on, over all windows.
    numbers = [sample - MILLISECOND - TICK for sample in found.samples]
    assert numbers == list(range(0, board.runs, 16))
    warning = next(each for each in found.warnings if each.code == "samples_thinned")
    assert warning.severity is Severity.NOTE
    assert warning.evidence == {"inferences": board.runs, "stride": 16}


def test_an_inference_longer_than_windows_leaves_them_empty() -> None:
    board = Board(lambda run: 3500 * MILLISECOND if run == 10 else 100 * MILLISECOND)
    found = run("SUSTAINED", board, terms(board, seconds=10.0), window_seconds=1.0)
    assert found.result is not None
    windows = found.result.windows
    assert [window.count for window in windows[:6]] == [9, 1, 0, 0, 5, 10]
    empty = Window(begin_seconds=2.0, end_seconds=3.0, count=0)
    assert windows[2] == empty


def test_an_inference_longer_than_everything_is_one_window() -> None:
    board = Board(lambda _: 60_000 * MILLISECOND)
    found = run("SUSTAINED", board, terms(board, seconds=10.0), window_seconds=1.0)
    assert found.result is not None
    assert len(found.samples) == 1
    assert sum(window.count for window in found.result.windows) == 1
    assert found.result.windows[-1].end_seconds == pytest.approx(60.0, rel=1e-3)


def test_the_least_number_prolongs_the_last_window() -> None:
    board = Board(lambda _: 100 * MILLISECOND)
    found = run("SUSTAINED", board, terms(board, seconds=1.0, least_runs=35), window_seconds=0.25)
    assert found.result is not None
    assert len(found.samples) == 35
    assert len(found.result.windows) == 4
    assert found.result.windows[-1].end_seconds == pytest.approx(3.5, rel=0.01)


def test_what_is_less_than_half_a_window_belongs_to_the_last() -> None:
    for seconds, expected in ((10.4, 10), (10.6, 11), (0.3, 1)):
        board = Board(lambda _: 10 * MILLISECOND)
        found = run("SUSTAINED", board, terms(board, seconds=seconds), window_seconds=1.0)
        assert found.result is not None
        assert len(found.result.windows) == expected


def test_progress_of_windows_is_that_of_the_run() -> None:
    board = Board(lambda _: 10 * MILLISECOND)
    reports: list[Progress] = []
    run("SUSTAINED", board, terms(board, reports, seconds=10.0, progress_seconds=0.1), window_seconds=1.0)
    fractions = [report.fraction for report in reports]
    assert fractions == sorted(fractions, key=float)  # type: ignore[arg-type]
    assert fractions[len(fractions) // 2] == pytest.approx(0.5, abs=0.02)
    assert fractions[-1] == 1.0
    assert [report.runs for report in reports] == sorted(report.runs for report in reports)
    assert reports[-1].runs == board.runs


def part(median: float, low: float, high: float, count: int = 9) -> sustained.Part:
    window = Window(0.0, 1.0, count, median, low, high)
    return sustained.Part(window, 0, array("Q", [int(median * 1e9)] * count))


def test_a_window_agrees_by_its_bounds_or_by_its_value() -> None:
    def begins(*parts: sustained.Part) -> int | None:
        found = sustained.steady_end(parts, Thresholds())
        return None if found is None else found.first

    end = [part(1.0, 0.99, 1.01)] * 3
    assert begins(part(1.5, 1.4, 1.6), *end) == 1
    assert begins(part(1.019, 1.018, 1.02), *end) == 0  # within 2 %
    assert begins(part(1.2, 0.9, 1.4), *end) == 0  # wide bounds
    assert begins(*end[:2]) is None
    assert begins(*end, part(1.2, 1.19, 1.21)) is None
    assert begins(*[part(2.0, 1.99, 2.01)] * 20, *end) is None  # three of 23 are less than a fifth


# -- side by side --------------------------------------------------------------------------------------------


def offline(calls: list[Callable[[], None]], **bounds: Any) -> tuple[scenarios.Run, list[Progress]]:
    reports: list[Progress] = []
    settled = {"seconds": 0.0, "least_runs": 1, "most_runs": 1_000_000, **bounds}
    given = scenarios.Terms(
        bounds=measure.Bounds(**settled), report=reports.append, progress_seconds=0.05, confidence=0.95
    )
    scenario = Scenario(kind=ScenarioKind.OFFLINE, streams=len(calls), batch=4)
    return scenarios.create(scenario, list(calls), given, seed=0).measure(), reports


def test_instances_work_at_the_same_time() -> None:
    """Each inference waits for one of the other instance: alone, none would ever end."""
    together = threading.Barrier(2, timeout=60)
    found, reports = offline([together.wait, together.wait], least_runs=40, most_runs=40)  # type: ignore[list-item]
    assert len(found.samples) == found.inferences == 40
    assert found.reason is StopReason.RUNS
    assert not found.one_by_one
    assert found.result is not None
    assert found.result.throughput_hertz is not None
    # What is computed in a call is counted, not the call.
    assert found.result.throughput_hertz > 4 * 1e9 / max(found.samples) / 2
    assert reports[-1].fraction == 1.0
    assert reports[-1].runs == 40


def test_each_instance_is_measured_for_the_duration() -> None:
    began = real_time.perf_counter()
    found, _ = offline([lambda: real_time.sleep(0.001), lambda: real_time.sleep(0.004)], seconds=0.3)
    assert real_time.perf_counter() - began >= 0.3
    assert found.reason is StopReason.DURATION
    assert min(found.samples) >= MILLISECOND


def test_an_instance_that_fails_ends_all() -> None:
    def fail() -> None:
        raise ValueError("no kernel")

    with pytest.raises(ValueError, match="no kernel"):
        offline([lambda: real_time.sleep(0.001), fail], seconds=3600.0)


def test_all_instances_go_on_until_told() -> None:
    runs = [0, 0]

    def call(place: int) -> Callable[[], None]:
        def infer() -> None:
            runs[place] += 1
            real_time.sleep(0.001)

        return infer

    given = scenarios.Terms(
        bounds=measure.Bounds(1.0, 1), report=lambda _: None, progress_seconds=0.05, confidence=0.95
    )
    scenario = Scenario(kind=ScenarioKind.OFFLINE, streams=2)
    asked = scenarios.create(scenario, [call(0), call(1)], given, seed=0)
    asked.fill(lambda: min(runs) >= 5)
    assert min(runs) >= 5


def names() -> Iterator[str]:
    yield from (kind.name for kind in ScenarioKind)


def test_every_scenario_has_a_name_for_people() -> None:
    assert [scenarios.name_of(ScenarioKind[name]) for name in names()] == [
        name.lower().replace("_", " ") for name in names()
    ]
