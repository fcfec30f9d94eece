from __future__ import annotations

import itertools

import pytest

from boardbench.agent.bench import doubts, stats


def codes(samples: list[int], *, clock_read_seconds: float = 1e-9, **around: float) -> list[str]:
    warnings = doubts.of_latency(
        stats.latency(samples),
        clock_read_seconds=clock_read_seconds,
        **around,  # type: ignore[arg-type]
    )
    return [warning.code for warning in warnings]


def steady(count: int, base: int = 1_000_000) -> list[int]:
    """Latencies that differ by a percent, in no order that grows or falls."""
    return [base + step for step in itertools.islice(itertools.cycle([0, 9000, 3000, 6000, 1000]), count)]


def test_a_steady_run_raises_none() -> None:
    assert codes(steady(500), wall_seconds=1.0, involuntary_context_switches=3) == []


@pytest.mark.parametrize(("count", "expected"), [(9, ["few_samples"]), (10, [])])
def test_fewer_than_ten_are_few(count: int, expected: list[str]) -> None:
    assert codes(steady(count)) == expected


def test_a_wide_spread_is_told_with_its_size() -> None:
    samples = [1_000_000, 1_300_000] * 100
    (warning,) = doubts.of_latency(stats.latency(samples), clock_read_seconds=1e-9)
    assert warning.code == "high_variation"
    assert "13%" in warning.message


def test_a_slow_beginning_is_a_warm_up_too_short() -> None:
    samples = [1_090_000 + step for step in range(30)] + steady(270)
    assert codes(samples) == ["slow_first_runs"]


def test_a_slow_end_is_a_board_that_slows_down() -> None:
    samples = steady(270) + [1_090_000 + step for step in range(30)]
    assert codes(samples) == ["slowing_down"]


def test_noise_is_no_drift() -> None:
    # The last tenth has a higher median, but its bounds reach into the rest.
    noisy = [1_000_000 + 60_000 * (position % 7) for position in range(60)]
    assert not {"slow_first_runs", "slowing_down"} & set(codes(noisy))


def test_short_runs_are_not_asked_for_drift() -> None:
    assert "slowing_down" not in codes(steady(53) + [1_090_000] * 6)


@pytest.mark.parametrize(("clock", "expected"), [(0.9e-8, []), (1.1e-8, ["timer_resolution"])])
def test_an_inference_of_few_clock_readings_is_doubted(clock: float, expected: list[str]) -> None:
    assert codes(steady(100, base=1_000_000), clock_read_seconds=clock * 1000) == expected


@pytest.mark.parametrize(("switches", "expected"), [(100, []), (101, ["preempted"])])
def test_a_busy_board_is_told(switches: int, expected: list[str]) -> None:
    assert codes(steady(100), wall_seconds=2.0, involuntary_context_switches=switches) == expected


def test_every_warning_is_in_the_table_once_with_reason_and_remedy() -> None:
    table = [doubt.code for doubt in doubts.DOUBTS]
    assert len(set(table)) == len(table)
    for doubt in doubts.DOUBTS:
        assert doubt.condition and doubt.reason and doubt.remedy
        assert doubts.warn(doubt.code, "seen").message == f"seen: {doubt.remedy}"
    with pytest.raises(KeyError):
        doubts.warn("no_such_code", "seen")
