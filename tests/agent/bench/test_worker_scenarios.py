"""Scenarios, precision and being held, in the real worker: what it asks for, tells and reports."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from boardbench.agent import wire
from boardbench.testkit.child import BRIEF
from boardbench.v1 import result_pb2

from . import models
from .conftest import Child

Make = Callable[..., dict[str, Any]]


def scenario(kind: str, **fields: Any) -> dict[str, Any]:
    return {"kind": f"SCENARIO_KIND_{kind}", **fields}


def warnings(outcome: Any) -> dict[str, dict[str, Any]]:
    return {event["warning"]["code"]: event["warning"] for event in outcome.of("warning")}


def message(outcome: Any) -> result_pb2.RunResult:
    """The result as the agent takes it."""
    event = wire.parse_event(json.dumps({"event": "result", "result": outcome.result}).encode())
    assert isinstance(event, result_pb2.RunResult)
    return event


def samples(result: dict[str, Any]) -> list[int]:
    return [int(each) for each in result["latency"]["samples_nanoseconds"]]


# -- single stream -----------------------------------------------------------------------------------------


def test_the_warm_up_is_told_apart(worker: Any, fake_job: Make) -> None:
    result = worker.run(fake_job(job={"warm_up_runs": 40})).result
    assert result["warm_up"]["runs"] == 40
    assert len(result["warm_up"]["samples_nanoseconds"]) == 40
    assert result["warm_up"]["seconds"] > 0
    assert "steady" in result["warm_up"]
    none = worker.run(fake_job(job={"warm_up_runs": 0})).result
    assert none["warm_up"] == {"runs": 0, "seconds": 0.0, "samples_nanoseconds": []}


def test_a_warm_up_that_does_not_settle_is_a_warning(worker: Any, fake_job: Make) -> None:
    # Each inference waits 2 ms longer than the one before it.
    slower = [{"sleep_seconds": 0.002, "from": number} for number in range(24)]
    outcome = worker.run(fake_job(inference=slower, job={"warm_up_runs": 24, "min_runs": 1, "max_runs": 1}))
    assert outcome.result["warm_up"]["steady"] is False
    warning = warnings(outcome)["warm_up_not_steady"]
    assert warning["severity"] == "SEVERITY_DOUBTFUL"
    assert warning["evidence"]["inferences"] == 24


def test_a_measurement_ends_when_it_is_precise(worker: Any, fake_job: Make) -> None:
    # A sleep is never shorter than asked for and hardly longer: half its length is precise at once.
    targets = [{"percentile": 50, "ratio": 0.9}, {"percentile": 80.5, "ratio": 0.9}]
    job = fake_job(
        inference=[{"sleep_seconds": 0.002}],
        job={"precision": targets, "precision_seconds": 60, "confidence": 0.9, "duration_seconds": None},
    )
    outcome = worker.run(job)
    result = outcome.result
    assert result["stopping"]["reason"] == "STOP_REASON_PRECISION"
    assert [target["percentile"] for target in result["stopping"]["targets"]] == [50.0, 80.5]
    for target in result["stopping"]["targets"]:
        assert target["reached_ratio"] <= target["asked_ratio"] == 0.9
    assert result["latency"]["count"] >= 64
    assert 80.5 in [each["percentile"] for each in result["latency"]["percentiles"]]
    assert result["latency"]["confidence"] == 0.9
    spec = result["effective_spec"]
    assert spec["precision"] == targets
    assert (spec["precision_seconds"], spec["confidence"], spec["duration_seconds"]) == (60.0, 0.9, 0.0)
    assert "precision_not_reached" not in warnings(outcome)
    assert message(outcome).stopping.targets[1].percentile == 80.5


def test_a_precision_that_is_not_reached_in_time_is_a_warning(worker: Any, fake_job: Make) -> None:
    job = fake_job(job={"precision": [{"percentile": 99.9, "ratio": 0.01}], "max_runs": 100})
    outcome = worker.run(job)
    assert outcome.result["stopping"]["reason"] == "STOP_REASON_RUNS"
    assert "reached_ratio" not in outcome.result["stopping"]["targets"][0]
    warning = warnings(outcome)["precision_not_reached"]
    assert warning["evidence"] == {"p99.9_asked_ratio": 0.01}
    assert "p99.9 has no bounds" in warning["message"]


def test_a_regularly_slow_inference_is_said(worker: Any, fake_job: Make) -> None:
    job = fake_job(
        first_inference=[],
        inference=[{"sleep_seconds": 0.0005}, {"sleep_seconds": 0.02, "every": 16}],
        job={"min_runs": 320, "warm_up_runs": 0},
    )
    warning = warnings(worker.run(job))["periodically_slow"]
    assert "every 16th inference" in warning["message"]
    assert warning["severity"] == "SEVERITY_NOTE"


def test_thresholds_are_the_agent_s_to_set(worker: Any, fake_job: Make) -> None:
    assert "few_samples" in warnings(worker.run(fake_job()))  # 20
    quiet = {"samples_invalid": 3, "samples_doubtful": 15}
    assert "few_samples" not in warnings(worker.run(fake_job(job={"thresholds": quiet})))
    error = worker.run(fake_job(job={"thresholds": {"colour": 1}})).error
    assert (error["code"], "no threshold 'colour'" in error["message"]) == ("option_rejected", True)


def test_the_surroundings_have_both_kinds_of_switches_and_the_worst_clock(
    worker: Any, fake_job: Make
) -> None:
    environment = worker.run(fake_job(inference=[{"sleep_seconds": 0.001}])).result["environment"]
    assert environment["clock_read_worst_seconds"] >= environment["clock_read_seconds"]
    assert environment["voluntary_context_switches"] >= 20  # each sleep is one


# -- scenarios ---------------------------------------------------------------------------------------------


def test_a_stall_counts_for_all_that_it_held_up(worker: Any, fake_job: Make) -> None:
    """No upper limits: a busy machine is only ever later."""
    job = fake_job(
        first_inference=[],
        inference=[{"sleep_seconds": 0.0005}, {"sleep_seconds": 0.5, "at": 20}],
        job={
            "scenario": scenario("PERIODIC", rate_hertz=100, deadline_seconds=0.05),
            "duration_seconds": 1.0, "warm_up_runs": 0,
        },
    )  # fmt: skip
    outcome = worker.run(job)
    result = outcome.result
    latencies = samples(result)
    assert len(latencies) == 100
    # Number 19 stalls (the first inference is not counted); number k is due (k - 19) periods after it.
    for number in range(19, 60):
        assert latencies[number] >= 0.5e9 - (number - 19) * 0.01e9
    found = result["scenario"]
    assert found["deadline_seconds"] == 0.05
    assert found["deadline_misses"] == sum(latency > 0.05e9 for latency in latencies) >= 45
    assert found["most_waiting"] >= 48
    service = [int(each) for each in found["service"]["samples_nanoseconds"]]
    assert len(service) == 100
    assert service[19] >= 0.5e9
    assert sorted(service)[50] < sorted(latencies)[50]
    assert message(outcome).scenario.service.count == 100
    assert result["effective_spec"]["scenario"]["rate_hertz"] == 100


def test_random_arrivals_are_those_of_the_seed(worker: Any, fake_job: Make) -> None:
    poisson = {"scenario": scenario("POISSON", rate_hertz=200), "min_runs": 30, "seed": 5}
    result = worker.run(fake_job(job=poisson)).result
    assert result["latency"]["count"] == 30
    assert result["scenario"]["kind"] == "SCENARIO_KIND_POISSON"
    assert result["scenario"]["deadline_seconds"] == 0.005


def test_a_rate_that_can_not_be_kept_is_invalid(worker: Any, fake_job: Make) -> None:
    job = fake_job(
        inference=[{"sleep_seconds": 0.02}],
        job={"scenario": scenario("PERIODIC", rate_hertz=200), "duration_seconds": 0.3},
    )
    outcome = worker.run(job)
    warning = warnings(outcome)["overloaded"]
    assert warning["severity"] == "SEVERITY_INVALID"
    assert warning["evidence"]["utilisation_ratio"] >= 4.0
    assert outcome.result["scenario"]["most_waiting"] > 10


def test_queries_of_several_samples(worker: Any, fake_job: Make) -> None:
    job = fake_job(
        inference=[{"sleep_seconds": 0.001}], job={"scenario": scenario("MULTI_STREAM", streams=3)}
    )
    result = worker.run(job).result
    assert result["latency"]["count"] == 20
    assert min(samples(result)) >= 3_000_000
    assert 0 < result["scenario"]["throughput_hertz"] <= 1000
    spec = worker.run(fake_job(job={"scenario": scenario("MULTI_STREAM")})).result["effective_spec"]
    assert spec["scenario"]["streams"] == 8


def test_a_sustained_run_is_told_window_by_window(worker: Any, fake_job: Make) -> None:
    job = fake_job(
        first_inference=[],
        inference=[{"sleep_seconds": 0.002}, {"sleep_seconds": 0.02, "from": 60}],
        job={
            "scenario": scenario("SUSTAINED", window_seconds=0.2), "duration_seconds": 2.0, "warm_up_runs": 0,
        },
    )  # fmt: skip
    result = worker.run(job).result
    found = result["scenario"]
    assert len(found["windows"]) == 10
    assert sum(window["count"] for window in found["windows"]) == result["latency"]["count"]
    assert found["slowdown_ratio"] > 1.2
    assert result["stopping"]["reason"] == "STOP_REASON_DURATION"


ENGINES = (("tflite", models.tflite_affine, ".tflite"), ("onnxruntime", models.onnx_affine, ".onnx"))


@pytest.mark.parametrize(("engine", "make", "suffix"), ENGINES, ids=[engine for engine, _, _ in ENGINES])
def test_instances_and_batches_of_real_engines(
    worker: Any, tmp_path: Path, engine: str, make: Any, suffix: str
) -> None:
    model = tmp_path / f"model{suffix}"
    model.write_bytes(make(batch=-1 if engine == "tflite" else "N"))
    job = {
        "kind": "run", "runtime": engine, "format": suffix[1:], "model_path": str(model), **BRIEF,
        "threads": 1, "scenario": scenario("OFFLINE", streams=2, batch=16), "duration_seconds": 0.5,
    }  # fmt: skip
    outcome = worker.run(job)
    result = outcome.result
    assert result["inputs"][0]["shape"] == [16, 4]
    assert result["latency"]["count"] >= 100
    assert result["scenario"]["throughput_hertz"] > 0
    assert result["scenario"]["throughput_low_hertz"] <= result["scenario"]["throughput_high_hertz"]
    assert result["effective_spec"]["scenario"] == scenario("OFFLINE", streams=2, batch=16)
    json_format.ParseDict(result, result_pb2.RunResult())


def test_a_batch_that_the_model_has_not_is_refused(worker: Any, fake_job: Make) -> None:
    error = worker.run(fake_job(job={"scenario": scenario("OFFLINE", batch=8)})).error
    assert error["code"] == "inputs_rejected"
    assert "export the model with an open one" in error["message"]


def test_an_engine_that_takes_one_instance_only_says_so(worker: Any, fake_job: Make, tmp_path: Path) -> None:
    lock = tmp_path / "device"
    job = fake_job(create=[{"exclusive": str(lock)}], job={"scenario": scenario("OFFLINE", streams=2)})
    error = worker.run(job).error
    assert error["code"] == "model_rejected"
    assert "fake loads 1 of the 2 instances" in error["message"]
    assert "--streams" in error["message"]
    assert worker.run({**job, "scenario": scenario("OFFLINE")}).result["latency"]["count"] == 20


def test_threads_of_all_instances_count(worker: Any, fake_job: Make) -> None:
    job = fake_job(job={"scenario": scenario("OFFLINE", streams=64), "threads": 64, "min_runs": 64})
    warning = warnings(worker.run(job))["threads_exceed_processors"]
    assert warning["evidence"]["threads"] == 4096


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"scenario": scenario("PERIODIC")}, "needs a rate"),
        (
            {"scenario": scenario("OFFLINE"), "precision": [{"percentile": 50, "ratio": 0.1}]},
            "lasts its duration",
        ),
        ({"precision": [{"percentile": 0, "ratio": 0.1}]}, "no percentile"),
        ({"confidence": 2}, "confidence"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anything_runs(
    worker: Any, fake_job: Make, asked: dict[str, Any], said: str
) -> None:
    outcome = worker.run(fake_job(job=asked))
    assert outcome.error["code"] == "option_rejected"
    assert said in outcome.error["message"]
    assert outcome.stages == []


# -- held --------------------------------------------------------------------------------------------------


def tell(child: Child, order: bytes) -> None:
    assert child.process.stdin is not None
    child.process.stdin.write(order + b"\n")
    child.process.stdin.flush()


def told(kind: str, count: int = 1) -> Callable[[list[dict[str, Any]]], bool]:
    return lambda events: sum(event["event"] == kind for event in events) >= count


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"scenario": scenario("PERIODIC", rate_hertz=500)},
        {"scenario": scenario("MULTI_STREAM", streams=2)},
        {"scenario": scenario("SUSTAINED"), "duration_seconds": 0.1},
        {"scenario": scenario("OFFLINE", streams=2)},
    ],
    ids=["single", "periodic", "multi", "sustained", "offline"],
)
def test_a_worker_that_is_held_waits_to_go_and_goes_on_until_told(
    worker: Any, fake_job: Make, asked: dict[str, Any]
) -> None:
    job = fake_job(
        inference=[{"sleep_seconds": 0.001}],
        job={"hold": True, "until_told": True, "warm_up_seconds": 0.01, **asked},
    )
    child = worker.start(job)
    child.wait_for(told("ready"))
    assert [event.get("stage") for event in child.events if event["event"] == "stage"][-1] == "STAGE_WARM_UP"
    tell(child, b"go")
    child.wait_for(told("counted"))
    assert not told("result")(child.events)
    assert child.process.poll() is None
    tell(child, b"stop")
    outcome = child.outcome()
    assert outcome.exit_code == 0
    order = [event.get("stage", event["event"]) for event in outcome.events]
    order = [each for each in order if each not in ("progress", "warning")]
    assert order[-6:] == ["STAGE_WARM_UP", "ready", "STAGE_MEASURE", "counted", "STAGE_REPORT", "result"]
    assert outcome.result["latency"]["count"] >= 20
    last = [event["progress"] for event in outcome.of("progress")][-1]
    assert (last["fraction"], last["runs"]) == (1.0, outcome.result["latency"]["count"])


def test_orders_that_come_early_are_kept(worker: Any, fake_job: Make) -> None:
    job = fake_job(job={"hold": True, "until_told": True})
    outcome = worker.start(json.dumps(job).encode() + b"\ngo\nstop\n").outcome()
    assert outcome.exit_code == 0
    assert outcome.result["latency"]["count"] == 20


def test_one_that_is_only_held_reports_by_itself(worker: Any, fake_job: Make) -> None:
    child = worker.start(fake_job(job={"hold": True}))
    child.wait_for(told("ready"))
    tell(child, b"go")
    outcome = child.outcome()
    assert outcome.result["latency"]["count"] == 20
    assert outcome.of("counted") == []


@pytest.mark.parametrize("go", [False, True])
def test_a_held_worker_ends_with_whoever_holds_it(worker: Any, fake_job: Make, go: bool) -> None:
    child = worker.start(fake_job(job={"hold": True, "until_told": True}))
    child.wait_for(told("ready"))
    if go:
        tell(child, b"go")
        child.wait_for(told("counted"))
    child.process.stdin.close()
    assert child.process.wait(60) == 1
    assert child.outcome().of("result") == []
