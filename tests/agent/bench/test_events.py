from __future__ import annotations

import dataclasses
import json
import os
import re
from typing import Any, get_args, get_origin, get_type_hints

import pytest
from google.protobuf import json_format

from boardbench.agent import domain
from boardbench.agent.bench.events import EventWriter, to_json
from boardbench.v1 import (
    agent_pb2,
    board_pb2,
    latency_pb2,
    model_pb2,
    placement_pb2,
    result_pb2,
    scenario_pb2,
    telemetry_pb2,
)

# Nouns whose name differs on the wire, most of them a part of their message: the rest is the agent's.
ALIASES = {
    domain.RuntimeUsed: result_pb2.Runtime,
    domain.Progress: agent_pb2.ProgressEvent,
    domain.WorkerEnvironment: board_pb2.Environment,
    domain.Measurement: result_pb2.RunResult,
}
MODULES = (
    model_pb2,
    placement_pb2,
    latency_pb2,
    scenario_pb2,
    telemetry_pb2,
    result_pb2,
    board_pb2,
    agent_pb2,
)


def message_of(noun: type) -> Any:
    """The message that a noun of the domain is on the wire."""
    found = [getattr(module, noun.__name__) for module in MODULES if hasattr(module, noun.__name__)]
    return ALIASES[noun] if noun in ALIASES else found[0]


# What a probe tells the agent, and nobody else: it goes over no wire.
OF_THE_PROBE = (domain.FormatMark, domain.PluginOffer, domain.Probed)
NOUNS = [
    value for value in vars(domain).values() if dataclasses.is_dataclass(value) and value not in OF_THE_PROBE
]

ENUMS = {
    domain.Unit: placement_pb2.Unit,
    domain.Evidence: placement_pb2.Evidence,
    domain.Verdict: placement_pb2.PlacementVerdict,
    domain.Stage: result_pb2.Stage,
    domain.MemoryPhase: result_pb2.MemoryPhase,
    domain.Severity: result_pb2.Severity,
    domain.StopReason: result_pb2.StopReason,
    domain.ScenarioKind: scenario_pb2.ScenarioKind,
}


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: noun.__name__)
def test_the_fields_of_a_noun_are_those_of_its_message(noun: Any) -> None:
    wire = {field.name for field in message_of(noun).DESCRIPTOR.fields}
    assert {field.name for field in dataclasses.fields(noun)} <= wire


@pytest.mark.parametrize("noun", ENUMS, ids=lambda noun: noun.__name__)
def test_an_enumeration_has_the_values_of_the_wire(noun: Any) -> None:
    wire = list(ENUMS[noun].keys())
    ours = [member.value for member in noun]
    assert set(wire) - set(ours) <= {wire[0]}  # "not known" is never said where it can't be
    assert ours == [value for value in wire if value in ours]


def example(hint: Any) -> Any:
    """A value of a type, with nothing left out."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is tuple:
        return (example(arguments[0]), example(arguments[0]))
    if origin is not None and arguments[-1] is type(None):  # Optional
        return example(arguments[0])
    if origin is not None:  # Mapping
        return {"a": example(arguments[1]), "b/c:0": example(arguments[1])}
    if dataclasses.is_dataclass(hint):
        hints = get_type_hints(hint)
        return hint(**{field.name: example(hints[field.name]) for field in dataclasses.fields(hint)})
    if issubclass(hint, domain.enum.Enum):
        return list(hint)[-1]
    return {int: 3, float: 0.25, str: "tëxt \ud83d\ude00", bool: True}[hint]


@pytest.mark.parametrize("noun", NOUNS, ids=lambda noun: noun.__name__)
def test_the_json_is_the_message(noun: Any) -> None:
    text = json.dumps(to_json(example(noun)))
    message = json_format.Parse(text, message_of(noun)())
    back = json_format.MessageToDict(message, preserving_proto_field_name=True)
    # 64-bit integers are text in proto3 JSON, and parsed from either.
    assert re.sub(r'"(\d+)"', r"\1", json.dumps(back, sort_keys=True)) == re.sub(
        r'"(\d+)"', r"\1", json.dumps(json.loads(text), sort_keys=True)
    )


def test_none_is_left_out() -> None:
    assert to_json(domain.PhaseMemory(domain.MemoryPhase.STEADY, pss_bytes=0)) == {
        "phase": "MEMORY_PHASE_STEADY",
        "pss_bytes": 0,
    }


def test_events_are_lines_and_arrive_whole() -> None:
    reading, writing = os.pipe()
    events = EventWriter(writing)
    events.stage(domain.Stage.IMPORT)
    events.warning(domain.Warning("code", "two\nlines and a lone surrogate \udc80"))
    events.ready()
    events.counted()
    events.error("internal", "why")
    os.close(writing)
    with open(reading, "rb") as stream:
        stage, warning, ready, counted, error = (json.loads(line) for line in stream)
    assert (ready, counted) == ({"event": "ready"}, {"event": "counted"})
    assert stage == {"event": "stage", "stage": "STAGE_IMPORT"}
    assert warning["warning"]["message"] == "two\nlines and a lone surrogate \udc80"
    assert error == {"event": "error", "error": {"code": "internal", "message": "why"}}


def test_a_number_that_is_no_json_is_an_error_and_not_half_an_event() -> None:
    reading, writing = os.pipe()
    with pytest.raises(ValueError, match="JSON"):
        EventWriter(writing).progress(domain.Progress(domain.Stage.MEASURE, 1, float("nan")))
    os.close(writing)
    with open(reading, "rb") as stream:
        assert stream.read() == b""
