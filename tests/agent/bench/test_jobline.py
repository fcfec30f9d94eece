"""The job line is read strictly; every field that it may leave out has its default."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.bench.doubts import Thresholds
from boardbench.agent.bench.jobline import PRECISION_SECONDS, Job, JobRejected
from boardbench.agent.bench.runtime import OptionRejected
from boardbench.agent.domain import Precision, Scenario, ScenarioKind

LEAST = {"runtime": "tflite", "model_path": "/m", "format": "tflite"}
TWO = [{"percentile": 50, "ratio": 0.01}, {"percentile": 99.9, "ratio": 0.05}]


def parse(**changes: Any) -> Job:
    return Job.parse(json.loads(json.dumps({"kind": "run", **LEAST, **changes})))


def test_what_is_left_out_is_as_before() -> None:
    job = parse()
    assert job == Job(runtime="tflite", model_path=Path("/m"), format="tflite")
    assert job.precision == ()
    assert job.targets() == ()
    assert job.confidence == 0.95
    assert job.scenario == Scenario()
    assert job.thresholds == Thresholds()
    assert (job.hold, job.until_told) == (False, False)
    assert job.duration_seconds == 5.0


def test_null_is_as_left_out() -> None:
    names = ("precision", "precision_seconds", "confidence", "scenario", "thresholds", "duration_seconds")
    assert parse(**dict.fromkeys(names)) == parse()


def test_with_a_precision_the_duration_is_the_least_only_where_it_is_given() -> None:
    job = parse(precision=TWO)
    assert job.precision == (Precision(50.0, 0.01), Precision(99.9, 0.05))
    assert [str(target) for target in job.targets()] == ["p50=1%", "p99.9=5%"]
    assert (job.duration_seconds, job.precision_seconds) == (0.0, PRECISION_SECONDS)
    job = parse(precision=TWO, duration_seconds=3, precision_seconds=9)
    assert (job.duration_seconds, job.precision_seconds) == (3, 9)


def test_a_scenario_is_settled() -> None:
    job = parse(scenario={"kind": "SCENARIO_KIND_PERIODIC", "rate_hertz": 25})
    assert job.scenario == Scenario(kind=ScenarioKind.PERIODIC, rate_hertz=25, deadline_seconds=0.04)
    assert parse(scenario={}).scenario == Scenario()
    job = parse(scenario={"kind": "SCENARIO_KIND_SUSTAINED"}, duration_seconds=20)
    assert job.scenario.window_seconds == 2.0


def test_the_batch_is_the_shape_of_every_input_and_its_own_process_knows_it() -> None:
    job = parse(scenario={"kind": "SCENARIO_KIND_OFFLINE", "batch": 8}, shapes={"x": [8, 3]})
    assert job.loaded_shapes() == {"x": (8, 3), "*": (8,)}
    assert job.shapes == {"x": (8, 3)}
    again = Job.parse(json.loads(json.dumps({"kind": "profile", **job.line()})))
    assert again.loaded_shapes() == job.loaded_shapes()


def test_a_job_line_says_what_an_inference_is_and_no_more() -> None:
    job = parse(precision=TWO, hold=True, until_told=True, thresholds={"clock_reads": 5}, seed=7, strict=True)
    again = Job.parse(json.loads(json.dumps(job.line())))
    assert (again.seed, again.strict) == (7, True)
    assert (again.precision, again.hold, again.thresholds) == ((), False, Thresholds())


def test_thresholds_are_taken_by_name() -> None:
    assert parse(thresholds={"clock_reads": 5}).thresholds.clock_reads == 5.0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"precision": [{"percentile": 100, "ratio": 0.01}]}, "p100 is no percentile"),
        ({"precision": [{"percentile": 50, "ratio": 0}]}, "can't be"),
        ({"precision": TWO + TWO}, "asked for twice"),
        ({"precision": TWO, "precision_seconds": 0}, "precision_seconds is above 0"),
        ({"precision": TWO, "precision_seconds": -1}, "precision_seconds is a number of seconds"),
        ({"precision": TWO, "scenario": {"kind": "SCENARIO_KIND_SUSTAINED"}}, "sustained lasts its duration"),
        ({"precision": TWO, "scenario": {"kind": "SCENARIO_KIND_OFFLINE"}}, "offline lasts its duration"),
        ({"confidence": 0.2}, "confidence is from 0.5"),
        ({"confidence": 1}, "confidence is from 0.5"),
        ({"scenario": {"kind": "SCENARIO_KIND_POISSON"}}, "needs a rate"),
        ({"thresholds": {"colour": 1}}, "no threshold 'colour'"),
    ],
)
def test_what_makes_no_sense_is_an_option_that_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionRejected, match=said):
        parse(**changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"precision": [{"percentile": 50}]},
        {"precision": 5},
        {"precision": [{"percentile": "x", "ratio": 1}]},
        {"scenario": {"kind": "SCENARIO_KIND_LUNCH"}},
        {"scenario": {"kind": "SCENARIO_KIND_OFFLINE", "colour": 1}},
        {"scenario": "periodic"},
        {"scenario": {"kind": "SCENARIO_KIND_PERIODIC", "rate_hertz": "fast"}},
        {"thresholds": 7},
        {"until_told": True},
        {"colour": 1},
    ],
)
def test_what_can_not_be_read_is_the_caller_s_fault(changes: dict[str, Any]) -> None:
    with pytest.raises(JobRejected):
        parse(**changes)
