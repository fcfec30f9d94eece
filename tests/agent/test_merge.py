"""What surrounded several processes, as what surrounded one run."""

from __future__ import annotations

from typing import Any

import pytest

from boardbench.agent import merge
from boardbench.v1 import board_pb2, result_pb2, telemetry_pb2


def result(**fields: Any) -> result_pb2.RunResult:
    return result_pb2.RunResult(**fields)


def into(*results: result_pb2.RunResult, offsets: tuple[float, ...] = ()) -> result_pb2.RunResult:
    whole = result_pb2.RunResult()
    whole.CopyFrom(results[-1])
    merge.into(whole, results, offsets or tuple(10.0 * at for at in range(len(results))))
    return whole


def test_environment_is_that_of_all() -> None:
    first = board_pb2.Environment(
        clock_read_seconds=0.25, clock_read_worst_seconds=4e-6, load_average_before=0.1,
        load_average_after=0.9, temperature_before_celsius=40, temperature_after_celsius=50,
        involuntary_context_switches=3, cpu_seconds=1.5, wall_seconds=2, other_cpu_seconds=0.25,
        memory_available_before_bytes=900, memory_available_least_bytes=500, cpu_frequency_hertz=1e9,
        cpu_frequency_least_hertz=0.9e9, cpu_pressure_share=0.125, throttled_before=["under-voltage"],
        throttled_during=["capped"], throttling_readable=True, cpu_affinity=[0, 1],
    )  # fmt: skip
    last = board_pb2.Environment(
        clock_read_seconds=0.75, clock_read_worst_seconds=2e-6, load_average_before=0.9,
        load_average_after=1.1, temperature_before_celsius=50, temperature_after_celsius=60,
        involuntary_context_switches=4, cpu_seconds=2.5, wall_seconds=3, other_cpu_seconds=0.5,
        memory_available_before_bytes=800, memory_available_least_bytes=600, cpu_frequency_hertz=2e9,
        cpu_frequency_least_hertz=0.8e9, cpu_pressure_share=0.375, throttled_before=["capped"],
        throttled_during=["capped", "hot"], throttling_readable=True, cpu_affinity=[0, 1],
    )  # fmt: skip
    whole = into(result(environment=first), result(environment=last)).environment
    assert whole == board_pb2.Environment(
        clock_read_seconds=0.5, clock_read_worst_seconds=4e-6, load_average_before=0.1,
        load_average_after=1.1, temperature_before_celsius=40, temperature_after_celsius=60,
        involuntary_context_switches=7, cpu_seconds=4, wall_seconds=5, other_cpu_seconds=0.75,
        memory_available_before_bytes=900, memory_available_least_bytes=500, cpu_frequency_hertz=1.5e9,
        cpu_frequency_least_hertz=0.8e9, cpu_pressure_share=0.25, throttled_before=["under-voltage"],
        throttled_during=["capped", "hot"], throttling_readable=True, cpu_affinity=[0, 1],
    )  # fmt: skip


def test_what_nobody_told_stays_untold() -> None:
    whole = into(result(), result())
    for name in ("create_seconds", "warm_up", "accelerator", "energy", "telemetry"):
        assert not whole.HasField(name), name
    assert not whole.environment.ListFields()
    assert not whole.memory.ListFields()
    some = into(result(create_seconds=3), result(), result(create_seconds=1))
    assert some.create_seconds == 2


def test_memory_is_the_most_of_any() -> None:
    def memory(steady: int, peak: int, **more: int) -> result_pb2.RunResult:
        phases = [
            result_pb2.PhaseMemory(phase=result_pb2.MEMORY_PHASE_BASELINE, rss_bytes=steady - 5),
            result_pb2.PhaseMemory(
                phase=result_pb2.MEMORY_PHASE_STEADY,
                rss_bytes=steady,
                pss_bytes=steady - 1,
                peak_rss_bytes=peak,
            ),
        ]
        return result(memory=result_pb2.Memory(phases=phases, peak_rss_bytes=peak, **more))

    whole = into(memory(70, 90, peak_swap_bytes=4), memory(80, 85, available_drop_bytes=9)).memory
    assert [(phase.rss_bytes, phase.peak_rss_bytes) for phase in whole.phases] == [(75, 0), (80, 90)]
    assert not whole.phases[0].HasField("peak_rss_bytes")
    assert (whole.peak_rss_bytes, whole.peak_swap_bytes, whole.available_drop_bytes) == (90, 4, 9)
    assert not whole.HasField("accelerator_bytes")


@pytest.mark.parametrize(
    ("each", "all_of_them"),
    [
        ((True, True), True),
        ((True, False), False),
        ((None, False), False),
        ((None, True), None),
        ((None, None), None),
    ],
)
def test_warm_up_is_steady_when_every_one_was(
    each: tuple[bool | None, ...], all_of_them: bool | None
) -> None:
    parts = [
        result_pb2.WarmUp(runs=2, seconds=0.5, steady=steady, samples_nanoseconds=[at, at + 1])
        for at, steady in enumerate(each)
    ]
    whole = into(*(result(warm_up=part) for part in parts)).warm_up
    assert (whole.runs, whole.seconds) == (4, 1.0)
    assert list(whole.samples_nanoseconds) == [0, 1, 1, 2]
    assert (whole.steady if whole.HasField("steady") else None) is all_of_them


def test_warm_up_keeps_no_more_than_one_process_has() -> None:
    long = result(warm_up=result_pb2.WarmUp(runs=800, seconds=1, samples_nanoseconds=range(800)))
    assert len(into(long, long).warm_up.samples_nanoseconds) == 1000


def watts(mean: float, seconds: float, inferences: int, **more: Any) -> result_pb2.RunResult:
    energy = telemetry_pb2.Energy(
        rail="VDD_IN",
        method="m",
        mean_watts=mean,
        energy_joules=mean * seconds,
        inferences=inferences,
        **more,
    )
    return result(energy=energy)


def test_energy_adds_up_and_idle_is_that_of_before() -> None:
    """5 W for 2 s and 6 W for 3 s, of which 2 W are idle, in 100 inferences."""
    whole = into(watts(5, 2, 40, idle_watts=2), watts(6, 3, 60)).energy
    assert (whole.energy_joules, whole.inferences) == (28, 100)
    assert whole.mean_watts == pytest.approx(5.6)
    assert whole.idle_watts == 2
    assert whole.total_energy_per_inference_joules == pytest.approx(0.28)
    assert whole.energy_per_inference_joules == pytest.approx(0.18)
    assert (whole.rail, whole.method) == ("VDD_IN", "m")
    assert not into(watts(5, 2, 40), watts(6, 3, 60)).energy.HasField("energy_per_inference_joules")


def test_energy_of_some_processes_is_none() -> None:
    other = watts(5, 2, 40)
    other.energy.rail = "package-0"
    assert not into(watts(5, 2, 40), other).HasField("energy")
    assert not into(watts(5, 2, 40), result()).HasField("energy")
    assert not into(result(), watts(5, 2, 40)).HasField("energy")


def sampled(*points: tuple[float, float], cpu_seconds: float = 0.1, **series: Any) -> result_pb2.RunResult:
    telemetry = telemetry_pb2.Telemetry(rate_hertz=10, cpu_seconds=cpu_seconds, cpu_share=0.01)
    telemetry.series.add(
        quantity="temperature_celsius",
        source="cpu-thermal",
        times_seconds=[time for time, _ in points],
        values=[value for _, value in points],
        **series,
    )
    telemetry.marks.add(time_seconds=0.5, label="measurement_begins")
    return result(telemetry=telemetry)


def test_telemetry_has_one_time_axis() -> None:
    first, last = sampled((0, 40), (1, 41)), sampled((0, 45), (1, 46), cpu_seconds=0.3)
    last.telemetry.series.add(quantity="power_watts", source="VDD_IN", times_seconds=[0], values=[5])
    last.telemetry.left_out.append("x: too dear")
    first.telemetry.left_out.append("x: too dear")
    whole = into(first, result(), last, offsets=(0.0, 4.0, 7.5)).telemetry
    heat, power = whole.series
    assert list(heat.times_seconds) == [0, 1, 7.5, 8.5]
    assert list(heat.values) == [40, 41, 45, 46]
    assert not heat.least
    assert list(power.times_seconds) == [7.5]
    assert [mark.time_seconds for mark in whole.marks] == [0.5, 8.0]
    assert list(whole.left_out) == ["x: too dear"]
    assert whole.cpu_seconds == pytest.approx(0.4)
    assert whole.cpu_share == pytest.approx(0.01)


def test_thinned_and_whole_series_go_together() -> None:
    thinned = sampled((0, 40), (1, 41), least=[39, 40], greatest=[41, 44])
    for parts in ((sampled((0, 50)), thinned), (thinned, sampled((0, 50)))):
        (heat,) = into(*parts).telemetry.series
        assert len(heat.values) == len(heat.least) == len(heat.greatest) == len(heat.times_seconds) == 3
        assert (min(heat.least), max(heat.greatest)) == (39, 50)


def test_series_does_not_grow_without_bound() -> None:
    parts = [sampled(*((t / 10, float(t)) for t in range(1500))) for _ in range(3)]
    (heat,) = into(*parts, offsets=(0.0, 150.0, 300.0)).telemetry.series
    assert len(heat.values) <= merge.MOST_POINTS
    assert len(heat.values) == len(heat.least) == len(heat.greatest) == len(heat.times_seconds)
    assert (min(heat.least), max(heat.greatest)) == (0, 1499)
    assert list(heat.times_seconds) == sorted(heat.times_seconds)
    assert sum(heat.values) / len(heat.values) == pytest.approx(749.5, rel=1e-3)


def test_beside_others_energy_and_memory_are_from_when_it_was_alone() -> None:
    alone = watts(5, 2, 40, idle_watts=2)
    alone.create_seconds = 1.0
    alone.memory.CopyFrom(result_pb2.Memory(peak_rss_bytes=70, available_drop_bytes=80, peak_swap_bytes=1))
    alone.effective_spec.profile_runs = 7
    alone.started_at.FromSeconds(100)
    whole = watts(9, 2, 30)
    whole.create_seconds = 4.0
    whole.started_at.FromSeconds(200)
    whole.memory.CopyFrom(result_pb2.Memory(peak_rss_bytes=75, available_drop_bytes=190, peak_swap_bytes=6))
    merge.by_itself(whole, [alone])
    assert whole.energy.mean_watts == 5
    assert whole.create_seconds == 1.0
    assert (whole.memory.available_drop_bytes, whole.memory.peak_swap_bytes) == (80, 6)
    assert whole.effective_spec.profile_runs == 7
    assert whole.started_at.seconds == 100
