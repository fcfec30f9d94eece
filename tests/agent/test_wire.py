"""A worker's lines are taken strictly: whatever is no event is refused, and nothing worse happens."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from boardbench.agent import wire
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
    assert wire.parse_event(line(event)) == (
        board_pb2.RuntimeStatus(name="tflite", available=True, devices=["cpu"]),
    )


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
