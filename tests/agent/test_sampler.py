"""Sampling on one axis: what is kept, what is left out, what it costs, and that nothing ends it."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from boardbench.agent.board.sampler import MOST_HERTZ, MOST_SERIES, Sampler, Series
from boardbench.agent.board.sensor import Coverage, Reading
from boardbench.agent.board.sensors import find_all

BOARDS = Path(__file__).resolve().parent.parent / "boards"


class Time:
    """A clock that only moves when it is told, for both wall and CPU."""

    def __init__(self) -> None:
        self.wall = 1000.0
        self.cpu = 0.0

    def read_wall(self) -> float:
        return self.wall

    def read_cpu(self) -> float:
        return self.cpu


class Told:
    """A sensor that says what it is told, and takes as long as it is told."""

    def __init__(self, name: str, value: Callable[[], float], clock: Time | None = None) -> None:
        self.name = name
        self.value = value
        self.clock = clock
        self.cpu = 0.0
        self.wall = 0.0
        self.reads = 0
        self.cumulative = False

    def read(self) -> Iterable[Reading]:
        self.reads += 1
        if self.clock is not None:
            self.clock.wall += self.wall
            self.clock.cpu += self.cpu
        coverage = None if self.cumulative else Coverage.BOARD
        yield Reading("power_watts", self.name, self.value(), self.cumulative, coverage)


class Failing:
    """A sensor that gives one value, and then fails."""

    def __init__(self, error: Exception) -> None:
        self.name = "failing"
        self.error = error
        self.reads = 0

    def read(self) -> Iterable[Reading]:
        self.reads += 1
        yield Reading("voltage_volts", self.name, 5.0)
        raise self.error


def sampler(clock: Time, *sensors: object, hertz: float = 10.0, **options: object) -> Sampler:
    made = Sampler(
        sensors,  # type: ignore[arg-type]
        hertz=hertz, clock=clock.read_wall, cpu_clock=clock.read_cpu, **options,  # type: ignore[arg-type]
    )  # fmt: skip
    made.begin()
    return made


def run(made: Sampler, clock: Time, seconds: float, step: float = 0.1) -> None:
    """Ticks without a thread."""
    end = clock.wall + seconds
    while clock.wall < end - step / 2:
        made.sample()
        clock.wall = round(clock.wall + step, 6)


def power(made: Sampler, source: str = "supply") -> Series:
    return made.series()["power_watts", source]


# --- what is kept


def test_readings_stand_at_the_middle_of_their_read() -> None:
    clock = Time()
    sensor = Told("supply", lambda: 7.0, clock)
    sensor.wall = 0.02
    made = sampler(clock, sensor)
    made.sample()
    clock.wall = 1000.1
    made.sample()
    found = power(made)
    assert list(found.times) == pytest.approx([0.01, 0.11])
    assert list(found.values) == [7.0, 7.0]
    assert (found.coverage, found.cumulative, found.least) == (Coverage.BOARD, False, None)


def test_a_sensor_is_read_when_it_is_due() -> None:
    clock = Time()
    fast, slow = Told("fast", lambda: 1.0), Told("slow", lambda: 2.0)
    slow.period_seconds = 1.0  # type: ignore[attr-defined]
    run(made := sampler(clock, fast, slow), clock, 3.0)
    assert (fast.reads, slow.reads) == (30, 3)
    assert made.latest("power_watts") == {"fast": 1.0, "slow": 2.0}


def test_marks_are_on_the_same_axis() -> None:
    clock = Time()
    made = sampler(clock, Told("supply", lambda: 1.0))
    clock.wall += 0.25
    assert made.mark("measurement_begins") == 0.25
    clock.wall += 1
    made.mark("measurement_ends")
    assert [(mark.seconds, mark.label) for mark in made.marks] == [
        (0.25, "measurement_begins"), (1.25, "measurement_ends"),
    ]  # fmt: skip


def test_values_that_are_no_numbers_are_left_out() -> None:
    clock = Time()
    values = iter([float("nan"), float("inf"), 3.0])
    made = sampler(clock, Told("supply", lambda: next(values)))
    run(made, clock, 0.3)
    assert list(power(made).values) == [3.0]


def test_a_source_too_many_is_left_out() -> None:
    clock = Time()

    class Many:
        name = "many"

        def read(self) -> Iterable[Reading]:
            return (Reading("memory_bytes", f"pid {pid}", 1.0) for pid in range(MOST_SERIES + 50))

    made = sampler(clock, Many())
    made.sample()
    assert len(made.series()) == MOST_SERIES


# --- thinning


def test_a_thinned_series_is_even_and_keeps_means_and_extremes() -> None:
    clock = Time()
    values = iter(range(100_000))
    made = sampler(clock, Told("supply", lambda: float(next(values) % 7)), points=64)
    run(made, clock, 500.0)
    found = power(made)
    assert len(found.times) <= 65
    assert found.least is not None
    assert found.greatest is not None
    gaps = [after - before for before, after in zip(found.times, found.times[1:], strict=False)]
    # A point is of as many samples at the begin as at the end; the last is not full yet.
    assert max(gaps[:-1]) == pytest.approx(min(gaps[:-1]), rel=1e-6)
    assert sum(found.values[:-1]) / len(found.values[:-1]) == pytest.approx(3.0, abs=0.1)
    assert (min(found.least), max(found.greatest)) == (0.0, 6.0)
    for low, value, high in zip(found.least, found.values, found.greatest, strict=True):
        assert low <= value <= high


def test_nothing_is_merged_across_a_mark() -> None:
    clock = Time()
    level = 1.0
    made = sampler(clock, Told("supply", lambda: level), points=64)
    for label, watts in (("idle_begins", 1.0), ("measurement_begins", 9.0), ("measurement_ends", 1.0)):
        made.mark(label)
        level = watts
        run(made, clock, 200.0)
    found = power(made)
    assert len(found.times) < 130
    assert set(found.values) == {1.0, 9.0}, "a mean across a mark would be in between"
    begins, ends = made.marks[1].seconds, made.marks[2].seconds
    for seconds, value in zip(found.times, found.values, strict=True):
        assert value == (9.0 if begins <= seconds < ends else 1.0)


def test_a_counter_is_thinned_by_leaving_out() -> None:
    clock = Time()
    sensor = Told("counter", lambda: (clock.wall - 1000.0) ** 2)
    sensor.cumulative = True
    made = sampler(clock, sensor, points=64)
    run(made, clock, 300.0)
    made.mark("measurement_begins")
    run(made, clock, 300.0)
    found = power(made, "counter")
    assert len(found.times) <= 130
    assert found.least is None
    # Every point that is left is a sample as it was.
    assert list(found.values) == pytest.approx([seconds**2 for seconds in found.times])
    begins = made.marks[0].seconds
    # Those next to the mark stay, on both sides.
    assert any(seconds == pytest.approx(begins - 0.1, abs=1e-6) for seconds in found.times)
    assert any(seconds == pytest.approx(begins, abs=1e-6) for seconds in found.times)
    assert found.times[-1] == pytest.approx(599.9), "the newest is there, though no point is full"


def test_an_hour_of_all_sensors_stays_small() -> None:
    clock = Time()
    made = sampler(clock, *find_all(BOARDS / "jetson_orin_nano", ["thermal", "ina3221"]), cost_share=0)
    run(made, clock, 3600.0, step=1.0)
    points = [series.times for series in made.series().values()]
    assert len(points) > 5
    size = sum(len(times) * 32 for times in points)
    assert size < 1.5e6
    assert all(len(times) >= 1000 for times in points)


# --- failures


def test_what_comes_before_a_failure_is_kept_and_the_rest_goes_on() -> None:
    clock = Time()
    failing = Failing(OSError(errno.EIO, "bus is stuck"))
    working = Told("supply", lambda: 1.0)
    made = sampler(clock, failing, working)
    run(made, clock, 10.0)
    assert working.reads == 100
    assert ("voltage_volts", "failing") in made.series()
    cost = made.cost
    assert cost.sensors[0].failures == failing.reads
    assert 1 < failing.reads < 20, "one that fails is tried more and more seldom"
    assert "bus is stuck" in cost.sensors[0].last_failure
    assert cost.left_out == (f"failing: failed {failing.reads} times, last: [Errno 5] bus is stuck",)


def test_a_sensor_that_works_again_is_read_as_before() -> None:
    clock = Time()
    broken = True

    def value() -> float:
        if broken:
            raise OSError(errno.ETIMEDOUT, "no answer")
        return 4.0

    sensor = Told("supply", value)
    made = sampler(clock, sensor)
    run(made, clock, 2.0)
    broken = False
    run(made, clock, 5.0)
    before = sensor.reads
    run(made, clock, 1.0)
    assert sensor.reads - before == 10


@pytest.mark.parametrize("code", [errno.EACCES, errno.EPERM])
def test_what_may_not_be_read_is_left_out_at_once(code: int) -> None:
    clock = Time()
    failing = Failing(OSError(code, "not for you", "/sys/energy_uj"))
    made = sampler(clock, failing)
    run(made, clock, 1.0)
    assert failing.reads == 1
    [told] = made.cost.left_out
    assert told.startswith("failing: may not be read")
    assert "/sys/energy_uj" in told


def test_a_fault_of_ours_leaves_the_sensor_out_and_the_sampling_alive() -> None:
    clock = Time()
    working = Told("supply", lambda: 1.0)
    made = sampler(clock, Failing(KeyError("oops")), working)
    run(made, clock, 1.0)
    assert working.reads == 10
    assert "a fault of boardbench: KeyError" in made.cost.left_out[0]


# --- cost


def test_cost_is_counted_by_sensor() -> None:
    clock = Time()
    cheap, dear = Told("cheap", lambda: 1.0, clock), Told("dear", lambda: 1.0, clock)
    cheap.cpu, dear.cpu = 0.0001, 0.0002
    made = sampler(clock, cheap, dear)
    run(made, clock, 10.0)
    cost = made.cost
    assert [sensor.cpu_seconds for sensor in cost.sensors] == pytest.approx([0.01, 0.02])
    assert cost.cpu_seconds == pytest.approx(0.03)
    assert cost.cpu_share == pytest.approx(0.003)
    assert (cost.ticks, cost.left_out) == (100, ())


def test_programs_of_a_sensor_count_too() -> None:
    clock = Time()
    sensor = Told("asking", lambda: 1.0)
    sensor.child_cpu_seconds = 0.0  # type: ignore[attr-defined]

    def value() -> float:
        sensor.child_cpu_seconds += 0.004  # type: ignore[attr-defined]
        return 1.0

    sensor.value = value
    made = sampler(clock, sensor, cost_share=0)
    run(made, clock, 1.0)
    assert made.cost.cpu_seconds == pytest.approx(0.04)
    assert made.cost.sensors[0].cpu_seconds == pytest.approx(0.04)


def test_the_dearest_is_read_less_often_until_it_fits() -> None:
    clock = Time()
    cheap, dear = Told("cheap", lambda: 1.0, clock), Told("dear", lambda: 1.0, clock)
    cheap.cpu, dear.cpu = 0.00005, 0.002
    made = sampler(clock, cheap, dear, cost_share=0.01)
    run(made, clock, 30.0)
    first, second = made.cost.sensors
    assert (first.interval_seconds, first.left_out) == (0.1, "")
    assert second.interval_seconds == pytest.approx(0.4)
    assert second.left_out == ""
    late = dear.reads
    run(made, clock, 10.0)
    assert dear.reads - late == 25


def test_the_power_of_the_board_is_read_less_often_after_others() -> None:
    clock = Time()
    power_meter, other = Told("supply", lambda: 1.0, clock), Told("other", lambda: 1.0, clock)
    other.cumulative = True
    power_meter.cpu, other.cpu = 0.0012, 0.001
    made = sampler(clock, power_meter, other, cost_share=0.02)
    run(made, clock, 30.0)
    assert [sensor.interval_seconds for sensor in made.cost.sensors] == pytest.approx([0.1, 0.2])


def test_one_that_is_still_too_dear_is_left_out_and_named() -> None:
    clock = Time()
    cheap, dear = Told("cheap", lambda: 1.0, clock), Told("dear", lambda: 1.0, clock)
    cheap.cpu, dear.cpu = 0.00005, 0.05
    made = sampler(clock, cheap, dear, cost_share=0.01)
    run(made, clock, 30.0)
    before = dear.reads
    run(made, clock, 10.0)
    assert dear.reads == before
    [told] = made.cost.left_out
    assert told.startswith("dear: costs too much: all sensors together take")
    assert made.cost.sensors[0].left_out == ""


def test_one_that_blocks_is_read_less_often_though_it_costs_no_cpu() -> None:
    clock = Time()
    stuck, working = Told("stuck", lambda: 1.0, clock), Told("working", lambda: 1.0)
    stuck.wall = 0.3
    made = sampler(clock, stuck, working)
    run(made, clock, 60.0)
    assert made.cost.sensors[0].interval_seconds == pytest.approx(0.8)
    stuck.wall = 3.0
    run(made, clock, 120.0)
    assert made.cost.left_out[0].startswith("stuck: costs too much: a read takes ")
    assert working.reads > 1000


def test_without_a_limit_nothing_is_left_out() -> None:
    clock = Time()
    dear = Told("dear", lambda: 1.0, clock)
    dear.cpu = 0.05
    made = sampler(clock, dear, cost_share=0)
    run(made, clock, 10.0)
    assert made.cost.left_out == ()
    assert dear.reads == 100


def test_the_rate_is_cut_to_what_makes_sense() -> None:
    assert Sampler([], hertz=1e9).hertz == MOST_HERTZ
    with pytest.raises(ValueError, match="above 0"):
        Sampler([], hertz=0)


# --- with its thread


def until(check: Callable[[], bool], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_the_thread_samples_and_ends() -> None:
    sensor = Told("supply", lambda: 2.0)
    made = Sampler([sensor], hertz=50)
    before = threading.active_count()
    made.start()
    until(lambda: sensor.reads >= 10)
    made.stop()
    reads = sensor.reads
    assert threading.active_count() == before
    found = power(made)
    assert len(found.times) == reads
    assert list(found.times) == sorted(found.times)
    assert made.cost.cpu_seconds > 0
    wall = made.cost.wall_seconds
    made.stop()
    assert made.cost.wall_seconds == wall
    with pytest.raises(RuntimeError):
        made.start()


def test_a_mark_is_sampled_at_once() -> None:
    sensor = Told("supply", lambda: 2.0)
    made = Sampler([sensor], hertz=0.01)
    made.start()
    until(lambda: sensor.reads == 1)
    at = made.mark("measurement_begins")
    until(lambda: sensor.reads == 2)
    made.stop()
    assert power(made).times[-1] >= at


def test_ticks_that_come_too_late_are_skipped() -> None:
    gate = threading.Event()
    reads: list[float] = []

    def value() -> float:
        reads.append(time.monotonic())
        if len(reads) == 2:
            gate.wait(30)
        return 1.0

    made = Sampler([Told("supply", value)], hertz=100, cost_share=0)
    made.start()
    until(lambda: len(reads) == 2)
    held = made.now
    until(lambda: made.now > held + 0.2)
    gate.set()
    until(lambda: len(reads) >= 4)
    made.stop()
    assert made.cost.skipped_ticks >= 15
    # What was missed is not made up for.
    assert made.cost.ticks <= made.now * 100 + 2 - made.cost.skipped_ticks + 2


def test_a_read_that_hangs_does_not_hold_up_the_end() -> None:
    gate = threading.Event()
    made = Sampler([Told("stuck", lambda: float(gate.wait(60)))], hertz=10)
    made.start()
    until(lambda: made._watched[0].sensor.reads == 1)  # type: ignore[attr-defined]
    made.stop(timeout_seconds=0.05)
    assert made.cost.wall_seconds > 0
    gate.set()


def test_a_real_board_at_a_hundred_a_second() -> None:
    made = Sampler(find_all(BOARDS / "raspberry_pi_4_throttled"), hertz=100, cost_share=0)
    made.start()
    until(lambda: made.cost.ticks >= 20)
    made.stop()
    found = made.series()
    assert set(found["throttled_now", "firmware"].values) == {1.0}
    assert ("temperature_celsius", "cpu-thermal") in found
    assert made.cost.left_out == ()
