from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest

from boardbench.agent.bench import doubts, series, stats
from boardbench.agent.bench.dependence import Dependence
from boardbench.agent.bench.doubts import Thresholds
from boardbench.agent.bench.runtime import OptionRejected
from boardbench.agent.domain import PrecisionReached, Severity, Stopping, StopReason, WarmUp, Warning


def codes(samples: list[int], *, clock_read_seconds: float = 1e-9, **around: float) -> list[str]:
    warnings = doubts.of_latency(
        stats.latency(samples),
        clock_read_seconds=clock_read_seconds,
        **around,  # type: ignore[arg-type]
    )
    return [warning.code for warning in weighed(warnings)]


def weighed(warnings: Iterable[Warning]) -> list[Warning]:
    """The warnings, each of which says what it means and holds figures that can be sent."""
    found = list(warnings)
    for warning in found:
        assert warning.severity is not Severity.UNSPECIFIED
        assert warning.evidence
        assert all(math.isfinite(value) and type(value) is float for value in warning.evidence.values())
    return found


def steady(count: int, base: int = 1_000_000) -> list[int]:
    """Latencies that differ by a percent, in no order that grows or falls."""
    return [base + step for step in itertools.islice(itertools.cycle([0, 9000, 3000, 6000, 1000]), count)]


def test_a_steady_run_raises_none() -> None:
    assert codes(steady(500), wall_seconds=1.0, involuntary_context_switches=3) == []


@pytest.mark.parametrize(
    ("count", "expected"), [(1, Severity.INVALID), (9, Severity.INVALID), (10, Severity.DOUBTFUL),
                            (35, Severity.DOUBTFUL), (36, None), (1000, None)],
)  # fmt: skip
def test_few_inferences_are_invalid_and_then_doubtful(count: int, expected: Severity | None) -> None:
    found = weighed(doubts.of_count(count))
    assert [warning.severity for warning in found] == ([] if expected is None else [expected])
    assert [warning.evidence["inferences"] for warning in found] == [count] * len(found)


def test_thirty_six_are_the_fewest_whose_p90_has_bounds() -> None:
    assert stats.least_count("90") == doubts.Thresholds().samples_doubtful


def test_a_wide_spread_is_told_with_its_size() -> None:
    samples = [1_000_000, 1_300_000] * 100
    (warning,) = doubts.of_latency(stats.latency(samples), clock_read_seconds=1e-9)
    assert warning.code == "high_variation"
    assert "13%" in warning.message
    assert warning.evidence["variation_ratio"] == pytest.approx(0.1307, abs=1e-3)
    assert warning.evidence["limit_ratio"] == 0.1


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
        assert doubt.severity is not Severity.UNSPECIFIED
        assert doubts.warn(doubt.code, "seen").message == f"seen: {doubt.remedy}"
    with pytest.raises(KeyError):
        doubts.warn("no_such_code", "seen")


def test_where_doubts_begin_can_be_set() -> None:
    thresholds = Thresholds.of({"variation_ratio": 0.2, "samples_invalid": 3, "samples_doubtful": 5})
    assert list(doubts.of_count(5, thresholds)) == []
    assert codes([1_000_000, 1_300_000] * 100, thresholds=thresholds) == []  # type: ignore[arg-type]
    assert Thresholds.of({}) == Thresholds()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"colour": 1}, "no threshold 'colour'; there are samples_invalid, "),
        ({"variation_ratio": "much"}, "variation_ratio is a number"),
        ({"variation_ratio": True}, "variation_ratio is a number"),
        ({"variation_ratio": math.nan}, "variation_ratio is a number"),
        ({"variation_ratio": -0.1}, "from 0 on"),
    ],
)
def test_a_threshold_that_is_none_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionRejected, match=said):
        Thresholds.of(given)


def test_every_threshold_says_what_it_is_of() -> None:
    names = {doubt.code for doubt in doubts.DOUBTS}
    for name, default, meaning in doubts.thresholds():
        assert getattr(Thresholds(), name) == default
        assert any(code in meaning for code in names)


@pytest.mark.parametrize(("steady_", "expected"), [(True, []), (None, []), (False, ["warm_up_not_steady"])])
def test_a_warm_up_that_is_not_steady_is_doubted(steady_: bool | None, expected: list[str]) -> None:
    found = weighed(doubts.of_warm_up(WarmUp(runs=40, seconds=5.0, steady=steady_)))
    assert [warning.code for warning in found] == expected


def test_a_precision_that_was_not_reached_is_told_with_what_was() -> None:
    targets = (
        PrecisionReached(50.0, 0.01, 0.008),
        PrecisionReached(99.0, 0.05, 0.12),
        PrecisionReached(99.9, 0.05, None),
    )
    (warning,) = weighed(doubts.of_stopping(Stopping(StopReason.DURATION, targets)))
    assert warning.code == "precision_not_reached"
    assert (
        "its time ended the measurement when p99 is known to ±12 % where ±5 % was asked for, "
        "p99.9 has no bounds where ±5 % was asked for" in warning.message
    )
    assert warning.evidence == {
        "p99_asked_ratio": 0.05, "p99_reached_ratio": 0.12, "p99.9_asked_ratio": 0.05,
    }  # fmt: skip
    assert list(doubts.of_stopping(Stopping(StopReason.PRECISION, targets))) == []
    assert list(doubts.of_stopping(Stopping(StopReason.RUNS, targets[:1]))) == []
    assert list(doubts.of_stopping(Stopping(StopReason.RUNS))) == []
    exact = (PrecisionReached(50.0, 0.01, 0.0),)
    assert list(doubts.of_stopping(Stopping(StopReason.DURATION, exact))) == []


def of_series(samples: list[int], thresholds: Thresholds | None = None) -> dict[str, Warning]:
    found = series.describe(samples)
    warnings = doubts.of_series(
        drift=found.drift,
        modes=found.modes,
        outliers=found.outliers,
        period=found.period,
        dependence=found.dependence,
        thresholds=thresholds or Thresholds(),
    )
    return {warning.code: warning for warning in weighed(warnings)}


def noisy(count: int, level: Any = lambda place: 1_000_000, seed: int = 1) -> list[int]:
    noise = random.Random(seed)
    return [int(level(place) * noise.lognormvariate(0, 0.01)) for place in range(count)]


def test_independent_samples_raise_no_doubt() -> None:
    assert of_series(noisy(2000)) == {}


def test_every_64th_inference_that_is_slow_is_said_so() -> None:
    found = of_series(noisy(2000, lambda place: 3_000_000 if place % 64 == 63 else 1_000_000))
    warning = found["periodically_slow"]
    assert warning.message.startswith("every 64th inference is 3.0× slower")
    assert warning.severity is Severity.NOTE
    assert warning.evidence["every_inferences"] == 64
    assert warning.evidence["slow_ratio"] == pytest.approx(3, rel=0.05)


@pytest.mark.parametrize(("after", "severity"), [(1_035_000, Severity.NOTE), (1_200_000, Severity.DOUBTFUL)])
def test_a_drift_is_doubtful_when_it_is_large(after: int, severity: Severity) -> None:
    found = of_series(noisy(2000, lambda place: after if place >= 900 else 1_000_000))
    assert found["drifting"].severity is severity
    assert found["drifting"].evidence["drift_ratio"] == pytest.approx(after / 1e6, rel=0.01)


@pytest.mark.parametrize(("share", "severity"), [(0.1, Severity.NOTE), (0.4, Severity.DOUBTFUL)])
def test_modes_are_doubtful_where_many_are_outside_of_the_greatest(share: float, severity: Severity) -> None:
    choice = random.Random(2)
    found = of_series(noisy(2000, lambda place: 1_500_000 if choice.random() < share else 1_000_000))
    warning = found["several_modes"]
    assert warning.severity is severity
    assert warning.evidence["elsewhere_ratio"] == pytest.approx(share, abs=0.05)
    assert warning.evidence["mode_2_seconds"] == pytest.approx(0.0015, rel=0.01)


def test_outliers_are_a_note() -> None:
    samples = noisy(2000)
    samples[700] = 20_000_000
    found = of_series(samples)
    assert list(found) == ["outliers"]
    assert found["outliers"].severity is Severity.NOTE
    assert found["outliers"].evidence["worst_ratio"] == pytest.approx(20, rel=0.05)


@pytest.mark.parametrize(("settled", "severity"), [(True, Severity.NOTE), (False, Severity.DOUBTFUL)])
def test_samples_that_resemble_their_neighbours_are_told_with_what_they_are_worth(
    settled: bool, severity: Severity
) -> None:
    found = Dependence(
        count=5000, found=True, settled=settled, neighbours=0.8, factors={"50": 9.0}, sentence="they wander"
    )
    nothing: dict[str, None] = dict.fromkeys(("drift", "modes", "outliers", "period"))
    (warning,) = weighed(doubts.of_series(**nothing, dependence=found))
    assert (warning.code, warning.severity) == ("dependent_samples", severity)
    assert warning.message.startswith("they wander: ")
    assert warning.evidence["effective_inferences"] == pytest.approx(5000 / 9)
    assert list(doubts.of_series(**nothing, dependence=replace(found, found=False))) == []


def test_samples_that_wander_are_found() -> None:
    state, noise, samples = 0.0, random.Random(6), []
    for _ in range(2000):
        state += noise.gauss(0, 1)
        samples.append(int(1_000_000 * (1 + 0.001 * state)))
    assert "dependent_samples" in of_series(samples)
