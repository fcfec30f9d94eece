"""What a run is to do: what is refused, what defaults give way to, what the worker is told."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from boardbench.agent.config import SpecConfig
from boardbench.agent.errors import InvalidRequest, NotRunnable
from boardbench.agent.plan import Plan, check_spec, counted_seconds, job_line, plan
from boardbench.agent.probe import mark_defaults
from boardbench.v1 import board_pb2, model_pb2, result_pb2, scenario_pb2

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


def target(percentile: float, ratio: float) -> result_pb2.Precision:
    return result_pb2.Precision(percentile=percentile, ratio=ratio)


def scenario(kind: str, **fields: Any) -> scenario_pb2.Scenario:
    return scenario_pb2.Scenario(kind=scenario_pb2.ScenarioKind.Value(f"SCENARIO_KIND_{kind}"), **fields)


def group(**fields: Any) -> result_pb2.RunGroup:
    return result_pb2.RunGroup(**({"id": "g", "size": 2, "mode": result_pb2.GROUP_MODE_INTERLEAVED} | fields))


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
        (spec(cpu_affinity=[1, 1]), ["cpu_affinity", "twice"]),
        (spec(cpu_affinity=[9999]), ["cpu_affinity", "9999"]),
        (spec(compute_precision="fp16"), ["compute_precision", "'fp16'", "float16"]),
        (spec(power_mode="x" * 65), ["power_mode"]),
        (spec(power_mode="MAXN\n"), ["power_mode"]),
        (spec(cache=9), ["use of caches 9"]),
        (spec(output_values=65537), ["output_values", "65536"]),
        (spec(precision=[target(0, 0.01)]), ["precision", "above 0"]),
        (spec(precision=[target(100, 0.01)]), ["precision", "below 100"]),
        (spec(precision=[target(float("nan"), 0.01)]), ["precision", "nan"]),
        (spec(precision=[target(50, 0)]), ["p50", "0.0001"]),
        (spec(precision=[target(50, 1)]), ["p50", "below 1"]),
        (spec(precision=[target(50, float("nan"))]), ["p50", "nan"]),
        (spec(precision=[target(50, 0.01), target(50, 0.02)]), ["twice"]),
        (spec(precision=[target(1 + n, 0.01) for n in range(17)]), ["16"]),
        (spec(precision_seconds=5), ["precision_seconds", "leave it out"]),
        (spec(precision=[target(50, 0.01)], precision_seconds=0), ["precision_seconds is 0"]),
        (
            spec(precision=[target(50, 0.01)], precision_seconds=5, duration_seconds=6),
            ["duration_seconds is 6", "precision_seconds 5"],
        ),
        (
            spec(precision=[target(50, 0.01)], timeout_seconds=10),
            ["timeout_seconds is 10", "60 s"],
        ),
        (spec(confidence=0.4), ["confidence", "0.5 to 0.999"]),
        (spec(confidence=1), ["confidence", "0.5 to 0.999"]),
        (spec(confidence=float("nan")), ["confidence", "nan"]),
        (spec(processes=0), ["processes is 0", "100"]),
        (spec(processes=101), ["processes is 101"]),
        (spec(processes=5, max_runs=4), ["max_runs is 4", "processes 5"]),
        (spec(scenario=scenario("PERIODIC")), ["periodic", "rate_hertz"]),
        (spec(scenario=scenario("POISSON")), ["poisson", "rate_hertz"]),
        (spec(scenario=scenario("PERIODIC", rate_hertz=0)), ["rate_hertz", "0.001"]),
        (spec(scenario=scenario("PERIODIC", rate_hertz=float("nan"))), ["rate_hertz", "nan"]),
        (spec(scenario=scenario("PERIODIC", rate_hertz=30, deadline_seconds=0)), ["deadline_seconds"]),
        (spec(scenario=scenario("PERIODIC", rate_hertz=30, streams=2)), ["streams", "periodic", "offline"]),
        (spec(scenario=scenario("UNSPECIFIED", rate_hertz=30)), ["rate_hertz", "single stream"]),
        (spec(scenario=scenario("OFFLINE", batch=0)), ["batch", "65536"]),
        (spec(scenario=scenario("OFFLINE", streams=2000)), ["streams", "1024"]),
        (spec(scenario=scenario("MULTI_STREAM", batch=2)), ["batch", "multi stream", "offline"]),
        (spec(scenario=scenario("SUSTAINED", window_seconds=0)), ["window_seconds"]),
        (
            spec(scenario=scenario("SUSTAINED", window_seconds=20), duration_seconds=10),
            ["window_seconds is 20", "10 s"],
        ),
        (spec(scenario=scenario("SUSTAINED"), processes=2), ["sustained", "one process"]),
        (spec(scenario=scenario("SUSTAINED"), precision=[target(50, 0.01)]), ["sustained", "precision"]),
        (spec(scenario=scenario("OFFLINE"), precision=[target(50, 0.01)]), ["offline", "precision"]),
        (spec(scenario=scenario_pb2.Scenario(kind=77)), ["no scenario 77"]),
        (spec(cool_down_celsius=200), ["cool_down_celsius", "150"]),
        (spec(cool_down_celsius=float("nan")), ["cool_down_celsius", "nan"]),
        (spec(cool_down_seconds=10), ["cool_down_celsius"]),
        (spec(cool_down_celsius=40, cool_down_seconds=9999), ["cool_down_seconds", "3600"]),
        (spec(idle_seconds=1e4), ["idle_seconds", "600"]),
        (spec(sample_hertz=1000), ["sample_hertz", "100"]),
        (spec(sample_hertz=float("nan")), ["sample_hertz", "nan"]),
        (spec(group=group(id="")), ["group.id", "''"]),
        (spec(group=group(id="../x")), ["group.id", "'../x'"]),
        (spec(group=group(size=1)), ["group.size is 1", "2 to 32"]),
        (spec(group=group(size=33)), ["group.size is 33"]),
        (spec(group=group(mode=0)), ["group.mode", "GROUP_MODE_INTERLEAVED"]),
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


SETTLED = board_pb2.RuntimeStatus(
    name="onnxruntime",
    available=True,
    formats=["onnx"],
    devices=["cpu"],
    settings=["threads", "cpu_affinity"],
)
ABLE = board_pb2.RuntimeStatus(
    name="openvino",
    available=True,
    formats=["onnx"],
    devices=["cpu"],
    settings=["threads", "cpu_affinity", "compute_precision", "cache"],
)


def test_a_setting_that_the_engine_does_not_take_is_refused_with_those_that_do() -> None:
    model = named("onnx")
    with pytest.raises(NotRunnable) as raised:
        plan(model, spec(compute_precision="float16"), (SETTLED, ABLE), SpecConfig())
    assert "onnxruntime takes no compute_precision (float16 was asked for)" in str(raised.value)
    assert "leave it out, or choose openvino, which can run onnx here, too" in str(raised.value)
    with pytest.raises(NotRunnable, match=r"takes no cache \(renew was .*leave it out$"):
        plan(model, spec(cache=result_pb2.CACHE_USE_RENEW), (SETTLED,), SpecConfig())
    asked = spec(runtime="openvino", compute_precision="float16", threads=1, cache=result_pb2.CACHE_USE_KEEP)
    assert plan(model, asked, (SETTLED, ABLE), SpecConfig()).spec.compute_precision == "float16"
    # It keeps nothing, and is asked to.
    plan(model, spec(cache=result_pb2.CACHE_USE_NONE), (SETTLED,), SpecConfig())


def test_settings_of_an_engine_that_says_nothing_are_left_to_the_worker() -> None:
    assert plan(named("onnx"), spec(compute_precision="float16"), (ONNX,), SpecConfig())


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="no processes are bound here")
def test_processors_are_those_of_the_agent() -> None:
    here = sorted(os.sched_getaffinity(0))
    found = plan(MODEL, spec(cpu_affinity=here), (FAKE,), SpecConfig())
    assert json.loads(job_line(found, "fake", Path("/m"), None))["cpu_affinity"] == here
    with pytest.raises(NotRunnable, match=rf"processor 4095, and the agent may use {here[0]}"):
        plan(MODEL, spec(cpu_affinity=[here[0], 4095]), (FAKE,), SpecConfig())


def test_the_use_of_caches_is_that_of_the_configuration_where_nobody_says_one() -> None:
    def use(asked: result_pb2.BenchmarkSpec, status: board_pb2.RuntimeStatus, configured: str) -> Any:
        found = plan(named("onnx"), asked, (status,), SpecConfig(cache=configured))
        line = job_line(found, "onnx", Path("/m"), None, model_sha256="ab", cache_root=Path("/caches"))
        return found.spec.cache, json.loads(line)

    none, keep = result_pb2.CACHE_USE_NONE, result_pb2.CACHE_USE_KEEP
    told, job = use(spec(), ABLE, "none")
    assert (told, "cache" in job) == (none, False)
    told, job = use(spec(), ABLE, "keep")
    assert told == keep
    assert (job["cache"], job["cache_root"], job["model_sha256"]) == ("CACHE_USE_KEEP", "/caches", "ab")
    assert job["cache_by_default"] is True
    assert "cache_by_default" not in use(spec(cache=keep), ABLE, "none")[1]
    assert use(spec(), SETTLED, "keep")[0] == none, "it can't, and nobody asked"
    assert use(spec(cache=none), ABLE, "keep")[0] == none


def test_the_default_of_a_format_is_the_first_that_can_run_it() -> None:
    statuses = tuple(
        board_pb2.RuntimeStatus(name=name, available=available, formats=formats)
        for name, available, formats in (
            ("a", False, ["onnx"]),
            ("b", True, ["onnx", "tflite"]),
            ("c", True, ["tflite", "openvino"]),
        )
    )
    mark_defaults(statuses)
    mark_defaults(statuses)
    assert [list(status.default_formats) for status in statuses] == [[], ["onnx", "tflite"], ["openvino"]]


def test_an_engine_that_runs_nothing_on_the_processor_has_a_default_of_its_own() -> None:
    tensorrt = board_pb2.RuntimeStatus(
        name="tensorrt", available=True, version="tensorrt 10", formats=["onnx"], devices=["gpu", "dla"]
    )
    assert plan(named("onnx"), spec(), (tensorrt,), SpecConfig()).spec.device == "gpu"
    with pytest.raises(NotRunnable, match=r"'cpu'.*it has gpu, dla"):
        plan(named("onnx"), spec(device="cpu"), (tensorrt,), SpecConfig())


def test_device_that_only_the_worker_can_judge_is_left_to_it() -> None:
    for asked in (
        spec(device="edgetpu", allow_fallback=True),
        spec(device="edgetpu", options={"delegate": "/x"}),
        spec(device="edgetpu", options={"provider_library": "/x"}),
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


def settled(**fields: Any) -> Plan:
    return plan(MODEL, spec(**fields), (FAKE,), SpecConfig())


def test_what_nobody_asked_for_is_not_in_the_job() -> None:
    job = json.loads(job_line(settled(), "fake", Path("/m"), None))
    asked_only = {
        "precision",
        "precision_seconds",
        "confidence",
        "scenario",
        "thresholds",
        "hold",
        "until_told",
    }
    assert not asked_only & set(job)


def test_what_was_asked_about_the_measurement_is_in_the_job() -> None:
    found = plan(
        MODEL,
        spec(
            precision=[target(50, 0.01), target(99.9, 0.05)],
            confidence=0.99,
            scenario=scenario("PERIODIC", rate_hertz=30),
        ),
        (FAKE,),
        SpecConfig(precision_seconds=20.0, precision_least_seconds=0.5),
        {"variation_ratio": 0.2},
    )
    job = json.loads(job_line(found, "fake", Path("/m"), None))
    assert job["precision"] == [{"percentile": 50, "ratio": 0.01}, {"percentile": 99.9, "ratio": 0.05}]
    assert (job["confidence"], job["precision_seconds"], job["duration_seconds"]) == (0.99, 20, 0.5)
    assert job["scenario"] == {
        "kind": "SCENARIO_KIND_PERIODIC", "rate_hertz": 30, "deadline_seconds": pytest.approx(1 / 30)
    }  # fmt: skip
    assert job["thresholds"] == {"variation_ratio": 0.2}
    held = json.loads(job_line(found.together(), "fake", Path("/m"), None))
    assert (held["hold"], held["until_told"]) == (True, True)


def test_defaults_of_what_takes_longer() -> None:
    defaults = SpecConfig()
    precise = settled(precision=[target(50, 0.01)]).spec
    assert precise.duration_seconds == defaults.precision_least_seconds
    assert precise.precision_seconds == defaults.precision_seconds
    long = settled(precision=[target(50, 0.01)], duration_seconds=100).spec
    assert long.precision_seconds == 100, "the duration is never cut by a default"
    brief = settled(precision=[target(50, 0.01)], precision_seconds=0.2).spec
    assert brief.duration_seconds == 0.2
    sustained = settled(scenario=scenario("SUSTAINED")).spec
    assert (sustained.duration_seconds, sustained.scenario.window_seconds) == (defaults.sustained_seconds, 60)
    assert sustained.timeout_seconds > sustained.duration_seconds
    short = settled(scenario=scenario("SUSTAINED"), duration_seconds=20).spec
    assert short.scenario.window_seconds == 2
    assert settled(scenario=scenario("MULTI_STREAM")).spec.scenario.streams == 8
    assert settled(scenario=scenario("OFFLINE")).spec.scenario.streams == 1
    assert settled(group=group()).spec.processes == defaults.interleaved_processes
    assert settled(group=group(mode=result_pb2.GROUP_MODE_CONCURRENT)).spec.processes == 1
    assert settled(group=group(), processes=2).spec.processes == 2
    assert settled(group=group(), max_runs=4).spec.processes == 4
    assert settled(group=group(), scenario=scenario("SUSTAINED")).spec.processes == 1
    assert settled().spec.processes == 1


def test_time_for_cooling_and_slow_rates_is_in_the_timeout() -> None:
    plain = settled().spec.timeout_seconds
    cooled = settled(cool_down_celsius=50, cool_down_seconds=100, processes=3).spec.timeout_seconds
    assert cooled >= plain + 300
    slow = settled(scenario=scenario("PERIODIC", rate_hertz=0.1), min_runs=50).spec
    assert counted_seconds(slow) == 500
    assert slow.timeout_seconds > plain + 400


@pytest.mark.parametrize("processes", [1, 2, 3, 7, 100])
@pytest.mark.parametrize(("least", "most"), [(50, 100_000), (1, 100), (101, 101), (100, 250)])
def test_processes_share_what_one_would_do(processes: int, least: int, most: int) -> None:
    whole = settled(processes=processes, min_runs=least, max_runs=most, duration_seconds=6)
    parts = [whole.of_process(position).spec for position in range(processes)]
    assert sum(part.max_runs for part in parts) == most
    assert least <= sum(part.min_runs for part in parts) <= max(least, processes)
    assert all(1 <= part.min_runs <= part.max_runs for part in parts)
    assert sum(part.duration_seconds for part in parts) == pytest.approx(6)
    assert {part.warm_up_seconds for part in parts} == {whole.spec.warm_up_seconds}, "each from the beginning"
    assert whole.spec.max_runs == most, "what is planned stays as it is"


def test_one_process_does_what_is_done_once() -> None:
    whole = settled(processes=3, idle_seconds=2, profile_runs=5)
    parts = [whole.of_process(position).spec for position in range(3)]
    assert [part.idle_seconds for part in parts] == [2, 0, 0], "before anything is warm"
    assert [part.profile_runs for part in parts] == [0, 0, 5], "after everything is measured"
    default = settled(processes=3)
    first, _, last = (default.of_process(position).spec for position in range(3))
    assert not first.HasField("idle_seconds"), "the board's default"
    assert not last.HasField("profile_runs"), "the engine's default"


def test_processes_share_a_precision() -> None:
    whole = settled(processes=4, precision=[target(50, 0.01), target(99, 0.9)], precision_seconds=8)
    part = whole.of_process(0).spec
    assert part.precision_seconds == 2
    # Four times the samples have bounds half as wide, but four processes wider ones by Student's t at three
    # degrees of freedom: 3.182 over 1.960 at 95 %.
    assert part.precision[0].ratio == pytest.approx(0.01 * 2 / (3.182 / 1.960) * 0.75, rel=1e-3)
    assert part.precision[1].ratio < 1
    few, many = (settled(processes=n, precision=[target(50, 0.01)]).of_process(0).spec for n in (2, 100))
    assert few.precision[0].ratio < 0.002
    assert 0.07 < many.precision[0].ratio < 0.08


def test_alone_and_together() -> None:
    concurrent = group(mode=result_pb2.GROUP_MODE_CONCURRENT)
    whole = settled(group=concurrent, duration_seconds=6, min_runs=50, idle_seconds=3, profile_runs=7)
    alone, together = whole.alone(), whole.together()
    assert alone.spec.duration_seconds == pytest.approx(2)
    assert (alone.spec.min_runs, alone.held) == (17, False)
    assert (alone.spec.idle_seconds, alone.spec.profile_runs) == (3, 7), (
        "what wants a quiet board is done here"
    )
    assert (together.spec.duration_seconds, together.spec.min_runs, together.held) == (6, 50, True)
    assert (together.spec.idle_seconds, together.spec.profile_runs) == (0, 0)
    long = settled(group=concurrent, scenario=scenario("SUSTAINED"))
    assert not long.alone().spec.HasField("scenario")
    assert long.alone().spec.duration_seconds == 10
    assert long.together().spec.scenario.kind == scenario_pb2.SCENARIO_KIND_SUSTAINED
