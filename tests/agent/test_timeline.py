"""What was sampled is found again by stretches of time, thinned or not."""

from __future__ import annotations

import pytest

from boardbench.agent.board import memory
from boardbench.agent.board.sampler import Cost, Mark, SensorCost, Series
from boardbench.agent.board.timeline import Timeline, fastest, mean_of_all, to_message


def series(quantity: str, source: str, points: dict[float, float], **more: object) -> Series:
    more.setdefault("cumulative", False)
    more.setdefault("coverage", None)
    return Series(quantity, source, times=list(points), values=list(points.values()), **more)  # type: ignore[arg-type]


def timeline(*found: Series) -> Timeline:
    return Timeline({(each.quantity, each.source): each for each in found})


HEAT = series("temperature_celsius", "cpu", {0.0: 50.0, 1.0: 60.0, 2.0: 70.0, 3.0: 80.0})


def test_stretch_has_both_of_its_ends() -> None:
    found = timeline(HEAT)
    assert [point.value for point in found.within("temperature_celsius", "cpu", 1.0, 2.0)] == [60.0, 70.0]
    assert [point.value for point in found.within("temperature_celsius", "cpu", 1.1, 1.9)] == []
    assert found.within("temperature_celsius", "gpu", 0.0, 9.0) == []


def test_sample_after_a_mark_belongs_to_what_it_ends() -> None:
    found = timeline(HEAT)
    assert [point.seconds for point in found.around("temperature_celsius", "cpu", 0.5, 1.5)] == [1.0, 2.0]
    # One that stands on the end is it.
    assert [point.seconds for point in found.around("temperature_celsius", "cpu", 0.5, 2.0)] == [1.0, 2.0]
    assert [point.seconds for point in found.around("temperature_celsius", "cpu", 0.5, 9.0)] == [
        1.0,
        2.0,
        3.0,
    ]


def test_first_and_last() -> None:
    found = timeline(HEAT)
    first, last = (
        found.first("temperature_celsius", "cpu", 0.5),
        found.last("temperature_celsius", "cpu", 2.5),
    )
    assert first is not None and last is not None
    assert (first.value, last.value) == (60.0, 70.0)
    assert found.first("temperature_celsius", "cpu", 3.5) is None
    assert found.last("temperature_celsius", "cpu", -1.0) is None
    assert found.last("nothing", "cpu") is None


def test_mean_is_over_time_and_not_over_samples() -> None:
    """Three samples at the begin count for the tenth of a second that they are about."""
    found = timeline(series("power_watts", "in", {0.0: 9.0, 0.05: 9.0, 0.1: 9.0, 1.1: 1.0, 2.1: 1.0}))
    assert found.mean("power_watts", "in", 0.0, 2.1) == pytest.approx((0.1 * 9 + 1.0 * 5 + 1.0 * 1) / 2.1)
    assert found.mean("power_watts", "in", 1.0, 1.2) == 1.0
    assert found.mean("power_watts", "in", 1.2, 1.3) is None


@pytest.mark.parametrize(
    ("begin", "end", "rise"),
    # From the sample before to the sample after: what a counter missed at the edges is not left out.
    [(1.0, 2.0, 2.0), (0.5, 1.5, 5.0), (-1.0, 0.5, 3.0), (2.5, 9.0, 0.0), (2.0, 3.0, 0.0)],
)
def test_rise_of_a_counter(begin: float, end: float, rise: float) -> None:
    found = timeline(series("events", "x", {0.0: 7.0, 1.0: 10.0, 2.0: 12.0, 3.0: 12.0}, cumulative=True))
    assert found.rise("events", "x", begin, end) == rise
    assert found.rise("events", "y", begin, end) == 0.0


def test_thinned_series_keeps_its_extremes() -> None:
    thinned = series("temperature_celsius", "cpu", {1.0: 60.0}, least=[55.0], greatest=[90.0])
    (point,) = timeline(thinned).within("temperature_celsius", "cpu", 0.0, 2.0)
    assert (point.least, point.value, point.greatest) == (55.0, 60.0, 90.0)


def test_clocks_of_several_processors_are_set_beside_each_other() -> None:
    """One was read less often, and a moment later."""
    often = series("frequency_hertz", "cpu0", {0.0: 1.0, 1.0: 2.0, 2.0: 3.0})
    seldom = series("frequency_hertz", "cpu1", {0.01: 4.0, 2.01: 0.0})
    found = timeline(often, seldom)
    names = ["cpu0", "cpu1", "cpu9"]
    # Of two samples that are equally far, the later one counts: so at 1.0.
    assert fastest(found, names, 0.0, 3.0) == [(0.0, 4.0), (1.0, 4.0), (2.0, 3.0)]
    assert mean_of_all(found, names, 0.0, 3.0) == [(0.0, 2.5), (1.0, 3.0), (2.0, 1.5)]
    assert fastest(found, ["cpu9"], 0.0, 3.0) == []


def test_message_says_all_of_it() -> None:
    thinned = series("power_watts", "in", {1.0: 2.0}, least=[1.0], greatest=[3.0])
    costly = SensorCost("slow", 9, 0, 0.1, 0.1, 0.1, 2.0, left_out="costs too much")
    cost = Cost(0.05, 10.0, 100, 0, (costly,))
    message = to_message(
        {("temperature_celsius", "cpu"): HEAT, ("power_watts", "in"): thinned},
        [Mark(0.5, "idle_begins")],
        cost,
        10.0,
    )
    heat, power = message.series
    assert (heat.quantity, heat.source, heat.cumulative) == ("temperature_celsius", "cpu", False)
    assert list(heat.times_seconds) == [0.0, 1.0, 2.0, 3.0]
    assert list(heat.values) == [50.0, 60.0, 70.0, 80.0]
    assert (list(heat.least), list(power.least), list(power.greatest)) == ([], [1.0], [3.0])
    assert (message.rate_hertz, message.cpu_seconds, message.cpu_share) == (10.0, 0.05, 0.005)
    assert list(message.left_out) == ["slow: costs too much"]
    (mark,) = message.marks
    assert (mark.label, mark.time_seconds) == ("idle_begins", 0.5)


MIB = 1024.0 * 1024.0


def available(points: dict[float, float]) -> Series:
    scaled = {seconds: value * MIB for seconds, value in points.items()}
    return series(memory.AVAILABLE, memory.BOARD, scaled)


def test_how_memory_went_is_told_from_where_it_began_to_fall() -> None:
    held = series(memory.RESIDENT, memory.WORKER, {1.0: 10 * MIB, 24.0: 398 * MIB, 25.0: 12 * MIB})
    # Noise long before is no begin of the fall.
    fell = available({0.0: 412.0, 10.0: 408.0, 20.0: 411.0, 21.0: 405.0, 22.0: 200.0, 23.1: 9.0, 24.0: 300.0})
    assert memory.last_words(timeline(fell, held)) == (
        "available fell from 412 to 9 MiB in 2.1 s; the worker held 398 MiB"
    )
    assert memory.last_words(timeline(fell)) == "available fell from 412 to 9 MiB in 2.1 s"


def test_memory_that_did_not_fall_is_told_as_that() -> None:
    assert memory.last_words(timeline(available({0.0: 412.0, 1.0: 400.0}))) == (
        "400 MiB were available at all times"
    )
    assert memory.last_words(timeline()) == ""


def test_thinned_memory_is_told_by_its_least() -> None:
    thinned = series(
        memory.AVAILABLE,
        memory.BOARD,
        {0.0: 100 * MIB, 1.0: 50 * MIB},
        least=[100 * MIB, 5 * MIB],
        greatest=[100 * MIB, 95 * MIB],
    )
    assert memory.last_words(timeline(thinned)).startswith("available fell from 100 to 5 MiB")
