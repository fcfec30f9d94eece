"""What a run is to do: what is refused, what defaults give way to, what the worker is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.config import SpecConfig
from boardbench.agent.errors import InvalidRequest, NotRunnable
from boardbench.agent.plan import check_spec, job_line, plan
from boardbench.v1 import board_pb2, model_pb2, result_pb2

FAKE = board_pb2.RuntimeStatus(
    name="fake", available=True, version="boardbench-fake 1", formats=["fake"], devices=["cpu", "faketpu"]
)
TFLITE = board_pb2.RuntimeStatus(
    name="tflite", available=True, version="ai-edge-litert 2.3.0", formats=["tflite"], devices=["cpu"]
)
ONNX = board_pb2.RuntimeStatus(
    name="onnxruntime", available=True, version="onnxruntime 1.32.0", formats=["onnx"], devices=["cpu"]
)
NO_ONNX = board_pb2.RuntimeStatus(name="onnxruntime", reason="pip install onnxruntime", formats=["onnx"])
MODEL = model_pb2.Model(sha256="0" * 64, name="m.fake", format="fake", size_bytes=1)


def spec(**fields: Any) -> result_pb2.BenchmarkSpec:
    return result_pb2.BenchmarkSpec(**fields)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (spec(duration_seconds=-1), ["duration_seconds", "-1"]),
        (spec(duration_seconds=float("nan")), ["duration_seconds", "nan"]),
        (spec(duration_seconds=1e9), ["duration_seconds", "86400"]),
        (spec(warm_up_seconds=float("inf")), ["warm_up_seconds", "inf"]),
        (spec(timeout_seconds=0), ["timeout_seconds"]),
        (spec(timeout_seconds=1, duration_seconds=2), ["timeout_seconds", "duration_seconds"]),
        (spec(min_runs=0), ["min_runs"]),
        (spec(max_runs=0), ["max_runs"]),
        (spec(min_runs=4_000_000_000), ["min_runs", "1000000"]),
        (spec(min_runs=9, max_runs=8), ["min_runs", "max_runs", "9", "8"]),
        (spec(threads=0), ["threads"]),
        (spec(threads=5000), ["threads", "1024"]),
        (spec(shapes={"x": model_pb2.Shape(dimensions=[1, 0])}), ["'x'", "[1, 0]"]),
        (spec(shapes={"x": model_pb2.Shape(dimensions=[1, -1])}), ["'x'", "-1"]),
        (spec(shapes={"x": model_pb2.Shape(dimensions=[1] * 99)}), ["'x'", "16 dimensions"]),
        (spec(inputs_sha256="abc"), ["inputs_sha256", "'abc'"]),
        (spec(options={"a": "x" * 40_000}), ["options", "too long"]),
        (spec(strict=True, allow_fallback=True), ["strict", "allow_fallback"]),
        (spec(profile_runs=100_000), ["profile_runs", "10000"]),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(asked: result_pb2.BenchmarkSpec, words: list[str]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        plan(MODEL, asked, (FAKE,), SpecConfig())
    for word in words:
        assert word in str(raised.value)


def test_nothing_asked_is_fine() -> None:
    check_spec(spec())
    settled = plan(MODEL, spec(), (FAKE,), SpecConfig()).spec
    assert (settled.runtime, settled.device, settled.seed) == ("fake", "cpu", 0)
    assert settled.min_runs == SpecConfig().min_runs
    assert not settled.HasField("threads"), "the engine's own default"


def test_default_gives_way_to_what_was_asked() -> None:
    defaults = SpecConfig(min_runs=50, max_runs=1000)
    assert plan(MODEL, spec(max_runs=10), (FAKE,), defaults).spec.min_runs == 10
    assert plan(MODEL, spec(min_runs=5000), (FAKE,), defaults).spec.max_runs == 5000
    long = plan(MODEL, spec(duration_seconds=7200), (FAKE,), defaults).spec
    assert long.timeout_seconds > 7200


def named(format: str) -> model_pb2.Model:
    return model_pb2.Model(name=f"m.{format}", format=format)


@pytest.mark.parametrize(
    ("model", "asked", "words"),
    [
        (
            named("tflite"),
            spec(runtime="tensorflow"),
            ["'tensorflow'", "tflite (ai-edge-litert 2.3.0)", "onnx"],
        ),
        (named("onnx"), spec(runtime="onnxruntime"), ["pip install onnxruntime", "tflite"]),
        (named("onnx"), spec(runtime="tflite"), ["tflite takes tflite models", "m.onnx is onnx"]),
        (named("tflite"), spec(runtime="fake"), ["fake takes fake", "use tflite"]),
        (named("onnx"), spec(), ["m.onnx", "onnxruntime: pip install onnxruntime"]),
        (named("coreml"), spec(), ["m.coreml", "no runtime", "tflite"]),
        (named("tflite"), spec(device="edgetpu"), ["'edgetpu'", "it has cpu", "libedgetpu1-std"]),
        (named("onnx"), spec(device="cuda"), ["'cuda'", "it has cpu", "onnxruntime-gpu"]),
    ],
)
def test_what_the_board_can_not_run_is_told_with_what_it_can(
    model: model_pb2.Model, asked: result_pb2.BenchmarkSpec, words: list[str]
) -> None:
    with pytest.raises(NotRunnable) as raised:
        onnx = ONNX if asked.device else NO_ONNX
        plan(model, asked, (TFLITE, onnx, FAKE), SpecConfig())
    for word in words:
        assert word in str(raised.value)


def test_device_that_only_the_worker_can_judge_is_left_to_it() -> None:
    for asked in (
        spec(device="edgetpu", allow_fallback=True),
        spec(device="edgetpu", options={"delegate": "/x"}),
    ):
        assert plan(named("tflite"), asked, (TFLITE,), SpecConfig()).spec.device == "edgetpu"


def test_what_was_asked_about_the_placement_is_in_the_job() -> None:
    def job(**fields: Any) -> dict[str, Any]:
        settled = plan(MODEL, spec(**fields), (FAKE,), SpecConfig())
        found: dict[str, Any] = json.loads(job_line(settled, "fake", Path("/m"), None))
        return found

    assert job(strict=True)["strict"] is True
    assert job(allow_fallback=True)["allow_fallback"] is True
    assert job(profile_runs=0)["profile_runs"] == 0
    assert not {"strict", "allow_fallback", "profile_runs"} & set(job()), "the worker's own defaults"
