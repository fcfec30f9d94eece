"""A worker's lines are taken strictly: whatever is no event is refused, and nothing worse happens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.agent import wire
from boardbench.agent.formats import Mark
from boardbench.v1 import agent_pb2, board_pb2, result_pb2

RESULT = {
    "runtime": {"name": "tflite", "version": "ai-edge-litert 2.3.0", "device": "cpu"},
    "create_seconds": 0.5,
    "latency": {"count": 3, "mean_seconds": 2e-6, "samples_nanoseconds": [1000, "2000", 3000]},
    "placement": {"evidence": "EVIDENCE_PARTITION", "cpu_op_types": {"CONV_2D": 2}},
    "warnings": [{"code": "few_samples", "message": "only 3"}],
}


def line(event: object) -> bytes:
    return json.dumps(event).encode()


def test_stage() -> None:
    assert wire.parse_event(b'{"event":"stage","stage":"STAGE_CREATE"}') == agent_pb2.StageEvent(
        stage=result_pb2.STAGE_CREATE
    )


def test_progress() -> None:
    event = {"event": "progress", "progress": {"stage": "STAGE_MEASURE", "runs": 7, "median_seconds": 0.5}}
    assert wire.parse_event(line(event)) == agent_pb2.ProgressEvent(
        stage=result_pb2.STAGE_MEASURE, runs=7, median_seconds=0.5
    )


def test_warning_and_error_are_told_apart_by_type() -> None:
    content = {"code": "few_samples", "message": "only 3"}
    assert wire.parse_event(line({"event": "warning", "warning": content})) == result_pb2.Warning(**content)
    assert wire.parse_event(line({"event": "error", "error": content})) == result_pb2.RunError(**content)


def test_probe() -> None:
    event = {"event": "probe", "runtimes": [{"name": "tflite", "available": True, "devices": ["cpu"]}]}
    assert wire.parse_event(line(event)) == wire.Probed(
        (board_pb2.RuntimeStatus(name="tflite", available=True, devices=["cpu"]),)
    )


def test_probe_with_engines_from_elsewhere() -> None:
    mark = {"format": "hef", "runtime": "hailo", "plugin": "boardbench-hailo 1.2", "magic": "01484546"}
    event = {
        "event": "probe",
        "runtimes": [{"name": "hailo", "plugin": "boardbench-hailo 1.2"}],
        "offers": [{"name": "hailo", "plugin": "boardbench-hailo 1.2"}],
        "marks": [{**mark, "suffixes": [".hef"]}],
        "more_devices": {"hailo": "hailo8 needs /dev/hailo0"},
    }
    found = wire.parse_event(line(event))
    assert isinstance(found, wire.Probed)
    assert found.offers == {"hailo": "boardbench-hailo 1.2"}
    assert found.marks == (Mark("hef", "hailo", "boardbench-hailo 1.2", b"\x01HEF", (".hef",)),)
    assert found.more_devices == {"hailo": "hailo8 needs /dev/hailo0"}


def test_result() -> None:
    result = wire.parse_event(line({"event": "result", "result": RESULT}))
    assert isinstance(result, result_pb2.RunResult)
    assert list(result.latency.samples_nanoseconds) == [1000, 2000, 3000]
    assert result.latency.count == 3
    assert result.placement.cpu_op_types == {"CONV_2D": 2}
    assert result.warnings[0].code == "few_samples"


def test_message_of_any_length_is_cut() -> None:
    event = wire.parse_event(line({"event": "error", "error": {"code": "internal", "message": "x" * 99_999}}))
    assert isinstance(event, result_pb2.RunError)
    assert len(event.message) <= 8192


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"\xff\xfe",
        b'{"event":"stage"}',
        b'{"event":"stage","stage":"STAGE_UNSPECIFIED"}',
        b'{"event":"stage","stage":"STAGE_LUNCH"}',
        b'{"event":"stage","stage":{}}',
        b'{"event":"progress"}',
        b'{"event":"progress","progress":{"runs":-1}}',
        b'{"event":"progress","progress":{"elapsed_seconds":NaN}}',
        b'{"event":"progress","progress":{"elapsed_seconds":"Infinity"}}',
        b'{"event":"progress","progress":{"colour":1}}',
        b'{"event":"warning","warning":{"code":"Not A Code","message":"x"}}',
        b'{"event":"warning","warning":{"message":"x"}}',
        b'{"event":"error","error":{"code":"","message":"x"}}',
        b'{"event":"error","error":{"code":"\\ud800"}}',
        b'{"event":"probe","runtimes":{}}',
        b'{"event":"probe","runtimes":[[]]}',
        b'{"event":"probe","runtimes":[],"offers":{"a":"b"}}',
        b'{"event":"probe","runtimes":[],"offers":[{"name":"a"}]}',
        b'{"event":"probe","runtimes":[],"offers":[{"name":"a","plugin":"\\u001b[2J"}]}',
        b'{"event":"probe","runtimes":[],"marks":[{"format":"../x","runtime":"a","plugin":"b"}]}',
        b'{"event":"probe","runtimes":[],"marks":[{"format":"x","runtime":"a","plugin":"b","magic":"z"}]}',
        b'{"event":"probe","runtimes":[],"marks":[{"format":"x","runtime":"a","plugin":"b","suffixes":"x"}]}',
        b'{"event":"probe","runtimes":[],"more_devices":{"a":1}}',
        b'{"event":"lunch"}',
        b'{"event":["stage"]}',
        b'{"event":"result"}',
        b'{"event":"result","result":[]}',
        b"[" * 100_000,
        b'{"event":' * 10_000,
    ],
)
def test_what_is_no_event_is_refused(text: bytes) -> None:
    with pytest.raises(wire.MalformedEvent):
        wire.parse_event(text)


def test_caches_and_values_of_outputs_are_taken() -> None:
    more = {
        "caches": [{"name": "engine", "warm": True, "size_bytes": 7, "path": "/x"}],
        "output_values": [{"name": "y", "dtype": "int8", "count": 2, "step": 1, "values": [1, -1]}],
    }
    result = wire.parse_event(line({"event": "result", "result": {**RESULT, **more}}))
    assert isinstance(result, result_pb2.RunResult)
    assert result.caches[0].warm
    assert list(result.output_values[0].values) == [1.0, -1.0]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        # The agent says these, not the worker.
        ("run_id", "x"),
        ("status", "RUN_STATUS_SUCCEEDED"),
        ("board", {"device_id": "other"}),
        ("error", {"code": "x"}),
        # Figures that are none.
        ("create_seconds", "NaN"),
        ("create_seconds", "much"),
        ("latency.mean_seconds", "Infinity"),
        ("latency.count", 4),
        ("latency.samples_nanoseconds", [1, 2, -3]),
        ("latency.samples_nanoseconds", [1, 2, 2**64]),
        ("latency.samples_nanoseconds", [1, 2, 1.5]),
        ("latency.samples_nanoseconds", [1, 2, None]),
        ("latency.samples_nanoseconds", [1, 2, "three"]),
        ("latency.samples_nanoseconds", [1, 2, True]),
        ("latency.samples_nanoseconds", "123"),
        ("latency.samples_nanoseconds", []),
        ("latency", []),
        ("warnings", [{"code": "NOT A CODE"}]),
        ("placement.cpu_op_types", {"CONV_2D": "many"}),
        ("output_sha256", {"y": {}}),
        ("output_values", [{"name": "y", "values": [1, "NaN"]}]),
        ("output_values", [{"name": "y", "values": ["Infinity"]}]),
        ("output_values", [{"name": "y", "values": [0.5] * 70_000}] * 2),
        ("caches", [{"name": "x"}] * 65),
        ("caches", [{"name": "x", "size_bytes": "much"}]),
        ("colour", 1),
    ],
)
def test_result_that_does_not_hold_is_refused(path: str, value: object) -> None:
    content = json.loads(json.dumps(RESULT))
    *folders, name = path.split(".")
    inner = content
    for folder in folders:
        inner = inner[folder]
    inner[name] = value
    with pytest.raises(wire.MalformedEvent):
        wire.parse_event(line({"event": "result", "result": content}))


@given(st.binary(max_size=200))
def test_bytes_of_any_kind_do_no_harm(text: bytes) -> None:
    with pytest.raises(wire.MalformedEvent):
        wire.parse_event(text)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=9,
)


@given(
    st.sampled_from(["stage", "progress", "warning", "error", "probe", "result"]),
    st.sampled_from(["stage", "progress", "warning", "error", "runtimes", "result"]),
    _JSON,
)
def test_json_of_any_shape_does_no_harm(kind: str, key: str, content: object) -> None:
    try:
        wire.parse_event(line({"event": kind, key: content}))
    except wire.MalformedEvent:
        pass


def test_event_has_its_place() -> None:
    event = wire.to_event("run", 7, agent_pb2.QueuedEvent(runs_ahead=2))
    assert (event.run_id, event.sequence, event.queued.runs_ahead) == ("run", 7, 2)
    assert event.time.ToNanoseconds() > 0


def test_json_is_one_line_with_the_names_of_the_proto() -> None:
    text = wire.to_json(agent_pb2.RunEvent(run_id="a\nb", queued=agent_pb2.QueuedEvent(runs_ahead=2)))
    assert json.loads(text) == {"run_id": "a\nb", "queued": {"runs_ahead": 2}}
    assert "\n" not in text


def measured(**fields: object) -> result_pb2.RunResult:
    event = wire.parse_event(line({"event": "result", "result": {**RESULT, **fields}}))
    assert isinstance(event, result_pb2.RunResult)
    return event


def test_what_a_measurement_adds_is_taken_with_all_of_its_samples() -> None:
    service = {"count": 2, "mean_seconds": 1e-6, "samples_nanoseconds": [900, "1100"]}
    result = measured(
        warm_up={"runs": 5, "seconds": 0.5, "steady": False, "samples_nanoseconds": [7, 8]},
        stopping={
            "reason": "STOP_REASON_DURATION",
            "targets": [{"percentile": 50, "asked_ratio": 0.01, "reached_ratio": 0.02}],
        },
        scenario={
            "kind": "SCENARIO_KIND_PERIODIC", "deadline_misses": 0, "service": service,
            "windows": [{"begin_seconds": 0, "end_seconds": 1, "count": 3}],
        },
    )  # fmt: skip
    assert list(result.warm_up.samples_nanoseconds) == [7, 8]
    assert result.warm_up.HasField("steady") and not result.warm_up.steady
    assert list(result.scenario.service.samples_nanoseconds) == [900, 1100]
    assert result.scenario.HasField("deadline_misses")
    assert result.stopping.targets[0].reached_ratio == 0.02


def test_what_is_not_told_is_not_there() -> None:
    result = measured()
    for name in ("warm_up", "stopping", "scenario"):
        assert not result.HasField(name)
    assert not measured(scenario={"kind": "SCENARIO_KIND_OFFLINE"}).scenario.HasField("service")


@pytest.mark.parametrize(
    "fields",
    [
        {"warm_up": {"samples_nanoseconds": [-1]}},
        {"warm_up": {"samples_nanoseconds": [1.5]}},
        {"warm_up": {"samples_nanoseconds": 7}},
        {"warm_up": [1]},
        {"scenario": {"service": {"count": 3, "samples_nanoseconds": [1, 2]}}},
        {"scenario": {"service": {"count": 1}}},
        {"scenario": {"service": {"count": 1, "samples_nanoseconds": ["x"]}}},
        {"scenario": {"service": 7}},
        {"scenario": {"kind": "SCENARIO_KIND_LUNCH"}},
        {"scenario": {"throughput_hertz": "Infinity"}},
        {"stopping": {"reason": "STOP_REASON_BORED"}},
        {"warnings": [{"code": "few_samples", "severity": "SEVERITY_AWFUL"}]},
        {"warnings": [{"code": "few_samples", "evidence": {"a_ratio": "NaN"}}]},
        {"warnings": [{"code": "few_samples", "evidence": {"A RATIO": 1}}]},
        {"warnings": [{"code": "few_samples", "evidence": {f"a{at}": 1 for at in range(65)}}]},
    ],
)
def test_a_measurement_that_does_not_hold_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(wire.MalformedEvent):
        measured(**fields)


def test_a_warning_keeps_its_weight_and_its_figures() -> None:
    content = {
        "code": "few_samples", "message": "only 3", "severity": "SEVERITY_INVALID",
        "evidence": {"inferences": 3, "p99.9_asked_ratio": 0.05},
    }  # fmt: skip
    event = wire.parse_event(line({"event": "warning", "warning": content}))
    assert isinstance(event, result_pb2.Warning)
    assert event.severity == result_pb2.SEVERITY_INVALID
    assert event.evidence == {"inferences": 3.0, "p99.9_asked_ratio": 0.05}
    with pytest.raises(wire.MalformedEvent):
        wire.parse_event(b'{"event":"warning","warning":{"code":"x","evidence":{"a":"Infinity"}}}')


def test_a_worker_that_waits_says_so() -> None:
    assert wire.parse_event(b'{"event":"ready"}') == wire.Ready()
    assert wire.parse_event(b'{"event":"counted"}') == wire.Counted()
