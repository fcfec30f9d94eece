"""The agent's nouns and the worker's JSON, to and from ``boardbench.v1``."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from boardbench.agent.formats import HEAD_BYTES, Mark
from boardbench.agent.receive import StoredFile
from boardbench.agent.recognise import FileKind
from boardbench.agent.store import StoreStatus
from boardbench.v1 import agent_pb2, board_pb2, latency_pb2, model_pb2, placement_pb2, result_pb2


@dataclass(frozen=True)
class Profiling:
    """After its result, the worker begins its profiling pass."""


@dataclass(frozen=True)
class Ready:
    """Warmed up, the worker waits until it is told to measure."""


@dataclass(frozen=True)
class Counted:
    """All that counts is measured; the worker goes on, uncounted, until it is told to stop."""


@dataclass(frozen=True)
class Probed:
    """What a probe found under one interpreter."""

    statuses: tuple[board_pb2.RuntimeStatus, ...]
    # Engines that distributions offer there, by name: the distribution and its version.
    offers: Mapping[str, str] = field(default_factory=dict)
    # Of those that were asked.
    marks: tuple[Mark, ...] = ()
    more_devices: Mapping[str, str] = field(default_factory=dict)


WorkerEvent = (
    Profiling
    | Ready
    | Counted
    | placement_pb2.Placement
    | agent_pb2.StageEvent
    | agent_pb2.ProgressEvent
    | result_pb2.Warning
    | result_pb2.RunResult
    | result_pb2.RunError
    | Probed
)

# What a worker makes happen in a run before its result, and all that can happen in one.
WorkerNews = agent_pb2.StageEvent | agent_pb2.ProgressEvent | result_pb2.Warning
RunNews = agent_pb2.QueuedEvent | WorkerNews | result_pb2.RunResult

_Message = TypeVar("_Message", bound=Message)

# What a worker may say about its run. The rest of a RunResult is the agent's to fill in.
_WORKER_FIELDS = frozenset(
    (
        "runtime",
        "effective_spec",
        "create_seconds",
        "first_inference_seconds",
        "import_seconds",
        "latency",
        "memory",
        "placement",
        "environment",
        "inputs",
        "outputs",
        "input_data",
        "output_sha256",
        "accelerator",
        "warnings",
        "warm_up",
        "stopping",
        "scenario",
        "caches",
        "output_values",
        "transfers",
    )
)
_CODE = re.compile(r"[a-z][a-z0-9_]{0,63}")
_FORMAT = re.compile(r"[a-z][a-z0-9_]{0,31}")
# Name and version of two distributions.
_LONGEST_NAME = 300
# "p99.9_reached_ratio" is one.
_FIGURE = re.compile(r"[a-z][a-z0-9_.]{0,63}")
# Elements of outputs that a result may be asked to hold.
MOST_OUTPUT_VALUES = 65536
# Of one engine for one model.
_MOST_CACHES = 64
# More than any warning has; each is kept, sent and stored.
_MOST_EVIDENCE = 64
# Longer than any sentence; an engine's own error can be a page.
_MESSAGE_LIMIT = 8 * 1024


class MalformedEvent(Exception):
    """A line from the worker that is no event; the message says what about it."""


def parse_event(line: bytes) -> WorkerEvent:
    """The event in one line from a worker, which is not trusted. Raises MalformedEvent."""
    try:
        content = json.loads(line, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedEvent(f"not JSON: {error}") from error
    if not isinstance(content, dict):
        raise MalformedEvent("not a JSON object")
    kind = content.get("event")
    if kind == "probe":
        return _parse_probe(content)
    if kind == "stage":
        stage = _parse({"stage": content.get("stage")}, agent_pb2.StageEvent(), "a stage")
        if stage.stage == result_pb2.STAGE_UNSPECIFIED:
            raise MalformedEvent("a stage without a name")
        return stage
    if kind == "progress":
        return _parse(content.get("progress"), agent_pb2.ProgressEvent(), "progress")
    if kind == "warning":
        return _checked_warning(_parse(content.get("warning"), result_pb2.Warning(), "a warning"))
    if kind == "error":
        error_event = _parse(content.get("error"), result_pb2.RunError(), "an error")
        if not _CODE.fullmatch(error_event.code):
            raise MalformedEvent(f"an error with the code {error_event.code[:80]!r}")
        return result_pb2.RunError(code=error_event.code, message=_clipped(error_event.message))
    if kind == "result":
        return _parse_result(content.get("result"))
    if kind == "profiling":
        return Profiling()
    if kind == "ready":
        return Ready()
    if kind == "counted":
        return Counted()
    if kind == "profile":
        return _parse(content.get("placement"), placement_pb2.Placement(), "a profile")
    raise MalformedEvent(f"an event {str(kind)[:80]!r}")


def to_json(message: Message) -> str:
    """The JSON form of a message on one line, with the proto's field names."""
    return json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None)


def to_event(run_id: str, sequence: int, event: RunNews) -> agent_pb2.RunEvent:
    """Something that happened in a run, now."""
    found = agent_pb2.RunEvent(run_id=run_id, sequence=sequence, time=timestamp(time.time_ns()))
    if isinstance(event, agent_pb2.QueuedEvent):
        found.queued.CopyFrom(event)
    elif isinstance(event, agent_pb2.StageEvent):
        found.stage.CopyFrom(event)
    elif isinstance(event, agent_pb2.ProgressEvent):
        found.progress.CopyFrom(event)
    elif isinstance(event, result_pb2.Warning):
        found.warning.CopyFrom(event)
    else:
        found.result.CopyFrom(event)
    return found


def timestamp(nanoseconds: int) -> Timestamp:
    """Unix time in nanoseconds as a message."""
    return Timestamp(seconds=nanoseconds // 1_000_000_000, nanos=nanoseconds % 1_000_000_000)


def from_seconds(seconds: float) -> Timestamp:
    """Unix time in seconds as a message."""
    return timestamp(int(seconds * 1e9))


def to_model(file: StoredFile) -> model_pb2.Model:
    """A stored file as a model of the wire."""
    return model_pb2.Model(sha256=file.sha256, name=file.name, format=file.format, size_bytes=file.size_bytes)


def to_stored_model(file: StoredFile) -> agent_pb2.StoredModel:
    """A stored file with its place in the store."""
    return agent_pb2.StoredModel(
        model=to_model(file),
        kind=agent_pb2.FileKind.Value(file.kind.value),
        used_at=from_seconds(file.used_at),
        in_use=file.in_use,
    )


def from_file_kind(kind: agent_pb2.FileKind.ValueType) -> FileKind:
    """What a pushed file is for; unspecified counts as a model. Raises ValueError for a number not known."""
    if kind == agent_pb2.FILE_KIND_UNSPECIFIED:
        return FileKind.MODEL
    return FileKind(agent_pb2.FileKind.Name(kind))


def to_store_status(status: StoreStatus) -> agent_pb2.ModelStoreStatus:
    """How full the model store is."""
    return agent_pb2.ModelStoreStatus(
        used_bytes=status.used_bytes,
        limit_bytes=status.limit_bytes,
        free_floor_bytes=status.free_floor_bytes,
        free_bytes=status.free_bytes,
        files=status.files,
    )


def _parse_probe(content: Mapping[str, Any]) -> Probed:
    runtimes = content.get("runtimes")
    if not isinstance(runtimes, list):
        raise MalformedEvent("a probe without a list of runtimes")
    more = content.get("more_devices", {})
    if not isinstance(more, dict) or not all(isinstance(text, str) for text in more.values()):
        raise MalformedEvent("a probe with more_devices that are no text")
    try:
        return Probed(
            tuple(_parse(entry, board_pb2.RuntimeStatus(), "a runtime") for entry in runtimes),
            {_text(offer["name"]): _text(offer["plugin"]) for offer in content.get("offers", [])},
            tuple(_parse_mark(entry) for entry in content.get("marks", [])),
            {_text(name): _clipped(text) for name, text in more.items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise MalformedEvent(f"a probe that can't be read: {error!r}"[:500]) from error


def _parse_mark(entry: Mapping[str, Any]) -> Mark:
    suffixes = entry.get("suffixes", [])
    if not isinstance(suffixes, list) or not _FORMAT.fullmatch(entry["format"]):
        raise ValueError("a mark of no format")
    return Mark(
        format=entry["format"],
        runtime=_text(entry["runtime"]),
        plugin=_text(entry["plugin"]),
        magic=bytes.fromhex(entry.get("magic", ""))[:HEAD_BYTES],
        suffixes=tuple(_text(suffix) for suffix in suffixes),
    )


def _text(value: object) -> str:
    """A short text that can be shown."""
    if not isinstance(value, str) or not value.isprintable() or not 0 < len(value) <= _LONGEST_NAME:
        raise ValueError(f"{str(value)[:80]!r} is no short text")
    return value


def _parse_result(content: object) -> result_pb2.RunResult:
    if not isinstance(content, dict):
        raise MalformedEvent("a result that is no object")
    foreign = sorted(set(content) - _WORKER_FIELDS)
    if foreign:
        raise MalformedEvent(f"a result with {', '.join(foreign)[:200]}")
    result = result_pb2.RunResult()
    latency = _take_samples(content, "latency")
    service = _take_samples(content, "scenario", "service")
    warm_up = _take_samples(content, "warm_up")
    if not latency:
        raise MalformedEvent("a result without samples")
    _parse(content, result, "a result")
    _give_samples(result.latency, latency)
    # Reading a message that is not there would not make one.
    if service:
        _give_samples(result.scenario.service, service)
    if warm_up:
        _give_samples(result.warm_up, warm_up)
    if result.latency.count != len(latency):
        raise MalformedEvent(f"{len(latency)} samples where {result.latency.count} were counted")
    if result.scenario.service.count != len(service):
        raise MalformedEvent(f"{len(service)} samples where {result.scenario.service.count} were served")
    for warning in result.warnings:
        warning.CopyFrom(_checked_warning(warning))
    _check_kept(result)
    return result


def _check_kept(result: result_pb2.RunResult) -> None:
    """Raises MalformedEvent for more caches or values of outputs than any worker tells, or no numbers."""
    if len(result.caches) > _MOST_CACHES:
        raise MalformedEvent(f"a result with {len(result.caches)} caches")
    # As evenly as outputs are thinned, a few more than were asked for may come.
    kept = sum(len(entry.values) for entry in result.output_values)
    if kept > 2 * MOST_OUTPUT_VALUES:
        raise MalformedEvent(f"a result with {kept} values of outputs")
    if not all(math.isfinite(value) for entry in result.output_values for value in entry.values):
        raise MalformedEvent("a value of an output that is not a finite number")


def _take_samples(content: dict[str, Any], *path: str) -> list[int]:
    """The samples, out of the object at the path: json_format takes a microsecond for each of many."""
    inner: Any = content
    for name in path:
        inner = inner.get(name) if isinstance(inner, dict) else None
    samples = inner.pop("samples_nanoseconds", None) if isinstance(inner, dict) else None
    if samples is None:
        return []
    if not isinstance(samples, list):
        raise MalformedEvent("samples that are no list")
    if not all(type(sample) in (int, str) for sample in samples):
        raise MalformedEvent("samples that are no numbers")
    try:
        return [int(sample) for sample in samples]
    except ValueError as error:
        raise MalformedEvent("a sample that is no number") from error


def _give_samples(message: latency_pb2.Latency | result_pb2.WarmUp, samples: list[int]) -> None:
    try:
        message.samples_nanoseconds.extend(samples)
    except (ValueError, TypeError) as error:
        raise MalformedEvent(f"a sample that is no count of nanoseconds: {error}") from error


def _parse(content: object, message: _Message, noun: str) -> _Message:
    if not isinstance(content, dict):
        raise MalformedEvent(f"{noun} that is no object")
    try:
        json_format.ParseDict(content, message)
    except (json_format.ParseError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise MalformedEvent(f"{noun} that can't be read: {error}"[:500]) from error
    if (path := _first_not_finite(message)) is not None:
        raise MalformedEvent(f"{noun} with {path}, which is not a finite number")
    return message


def _first_not_finite(message: Message) -> str | None:
    """Name of a field that is NaN or infinite: such a figure is never a measurement."""
    for entry_field, value in message.ListFields():
        if entry_field.message_type is not None and entry_field.message_type.GetOptions().map_entry:
            entries = list(value.values())
            if any(isinstance(entry, float) and not math.isfinite(entry) for entry in entries):
                return str(entry_field.name)
            inner = [entry for entry in entries if isinstance(entry, Message)]
        elif entry_field.message_type is not None:
            inner = [value] if isinstance(value, Message) else list(value)
        else:
            if isinstance(value, float) and not math.isfinite(value):
                return str(entry_field.name)
            continue
        for entry in inner:
            if (found := _first_not_finite(entry)) is not None:
                return f"{entry_field.name}.{found}"
    return None


def _checked_warning(warning: result_pb2.Warning) -> result_pb2.Warning:
    if not _CODE.fullmatch(warning.code):
        raise MalformedEvent(f"a warning with the code {warning.code[:80]!r}")
    checked = result_pb2.Warning(
        code=warning.code, message=_clipped(warning.message), severity=warning.severity
    )
    if len(warning.evidence) > _MOST_EVIDENCE:
        raise MalformedEvent(f"a warning with {len(warning.evidence)} figures")
    for name, value in warning.evidence.items():
        if not _FIGURE.fullmatch(name):
            raise MalformedEvent(f"a warning with a figure {name[:80]!r}")
        checked.evidence[name] = value
    return checked


def _clipped(text: str) -> str:
    return text if len(text) <= _MESSAGE_LIMIT else text[: _MESSAGE_LIMIT - 1] + "…"


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
