"""Sends results on by OpenTelemetry's protocol (OTLP): runs as traces, what they measured as metrics.

Each of the two is a follower of the store with a cursor of its own, so that a receiver that is away, or takes
only one of them, holds up nothing else. The identities of traces and spans are made from the run's: what is
sent twice is the same trace. Needs ``boardbench[otel]``; this module is imported only where it is used.

https://opentelemetry.io/docs/specs/otlp/
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import hashlib
import itertools
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import SplitResult, unquote, urlsplit

import aiohttp
import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.metrics.v1 import metrics_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from boardbench.collector.forward import (
    LONGEST_WAIT_SECONDS,
    Answer,
    Follower,
    Pace,
    Post,
    Unreachable,
    digest_of,
    measured_microseconds,
    receiver_of,
    retry_after,
)
from boardbench.collector.histogram import BOUNDS_SECONDS, Distribution, distribution_of
from boardbench.collector.metrics import METRICS, SERIES_LABELS
from boardbench.collector.samples import enum_label, result_group
from boardbench.collector.store import Arrival, LatestResult, ResultStore, series_of
from boardbench.v1 import latency_pb2, placement_pb2, result_pb2

Signal = Literal["traces", "metrics"]
SIGNALS: tuple[Signal, ...] = ("traces", "metrics")

SERVICE_NAME = "boardbench"
"""``service.name`` of everything that is sent; the board is its instance."""

GRPC_PORT = 4317
"""Where receivers take OTLP by gRPC, unless the URL says otherwise."""

_DISTRIBUTION = "boardbench_latency_distribution_seconds"
_LABELS = {name: metric.labels[len(SERIES_LABELS) :] for metric in METRICS for name in metric.samples}
_MEANINGS = {name: metric.meaning for metric in METRICS for name in metric.samples}
_UNITS = {
    # https://ucum.org, as OpenTelemetry has units.
    "seconds": "s",
    "bytes": "By",
    "hertz": "Hz",
    "celsius": "Cel",
    "joules": "J",
    "watts": "W",
    "ratio": "1",
}
_ARCHITECTURES = {
    # What OpenTelemetry calls what the kernel calls so.
    "aarch64": "arm64",
    "armv6l": "arm32",
    "armv7l": "arm32",
    "armv8l": "arm32",
    "i386": "x86",
    "i686": "x86",
    "x86_64": "amd64",
}
_MAX_TEXT = 4096
"""Longest text in an attribute: what a board says is a stranger's."""
_ANSWER_BYTES = 64 * 1024
_RPCS = {
    "traces": "/opentelemetry.proto.collector.trace.v1.TraceService/Export",
    "metrics": "/opentelemetry.proto.collector.metrics.v1.MetricsService/Export",
}
_Response = trace_service_pb2.ExportTraceServiceResponse | metrics_service_pb2.ExportMetricsServiceResponse
_Value = str | bool | int | float | Sequence[str]


@dataclass(frozen=True)
class Target:
    """Where one kind of signal goes."""

    url: str
    """As it was given, credentials included."""
    signal: Signal

    @property
    def receiver(self) -> str:
        """Host and port, and what is sent there, for people."""
        return f"{receiver_of(self.url)} {self.signal}"

    @property
    def is_grpc(self) -> bool:
        """Whether it is asked by gRPC."""
        return urlsplit(self.url).scheme in {"grpc", "grpcs"}

    @property
    def http_url(self) -> str:
        """The URL that is posted to."""
        parts = urlsplit(self.url)
        if _signal_in(parts) is not None:
            return self.url
        return parts._replace(path=f"{parts.path.rstrip('/')}/v1/{self.signal}").geturl()


def targets_of(url: str) -> tuple[Target, ...]:
    """Returns what goes to the URL: both, unless its path ends in ``/v1/traces`` or ``/v1/metrics``."""
    only = _signal_in(urlsplit(url))
    return tuple(Target(url, signal) for signal in SIGNALS if only in {None, signal})


def _signal_in(parts: SplitResult) -> Signal | None:
    return next((signal for signal in SIGNALS if parts.path.rstrip("/").endswith(f"/v1/{signal}")), None)


@dataclass(frozen=True)
class Piece:
    """One result as a request of its own; several, one behind the other, are one request."""

    milliseconds: int
    samples: int
    """Spans, or data points."""
    content: bytes


class OtlpForwarder(Follower[Piece]):
    """Keeps one receiver up to date with one kind of signal."""

    def __init__(
        self,
        target: Target,
        store: ResultStore,
        folder: Path,
        post: Post,
        *,
        version: str,
        pace: Pace | None = None,
        **more: Any,
    ) -> None:
        """Keeps its cursor in ``folder``, which must be there."""
        cursor = folder / f"otlp-{target.signal}-{digest_of(target.url)}.json"
        super().__init__(target.receiver, store, cursor, post, pace=pace, **more)
        self._version = version
        self._make = trace_of if target.signal == "traces" else metrics_of

    def _prepare(self, arrivals: Sequence[Arrival]) -> list[Piece | None]:
        return [self._make(arrival, self._version) for arrival in arrivals]

    async def _send(self, batch: Sequence[Piece]) -> None:
        if not batch:
            return
        answer = await self._exchange(b"".join(piece.content for piece in batch))
        if answer.taken:
            self._taken += sum(piece.samples for piece in batch) - answer.rejected
            if answer.rejected:
                # By the protocol it must not be sent again.
                self._count_dropped(answer.rejected, answer)
        elif len(batch) == 1:
            self._drop(batch, answer)
        else:
            half = len(batch) // 2
            await self._send(batch[:half])
            await self._send(batch[half:])


# What both have.


def _value(value: _Value) -> common_pb2.AnyValue:
    if isinstance(value, bool):
        return common_pb2.AnyValue(bool_value=value)
    if isinstance(value, str):
        return common_pb2.AnyValue(string_value=value[:_MAX_TEXT])
    if isinstance(value, int):
        return common_pb2.AnyValue(int_value=value)
    if isinstance(value, float):
        return common_pb2.AnyValue(double_value=value)
    return common_pb2.AnyValue(
        array_value=common_pb2.ArrayValue(values=[_value(each) for each in value[:_MAX_TEXT]])
    )


def _attributes(told: Mapping[str, _Value | None]) -> list[common_pb2.KeyValue]:
    """Returns those that are known: no empty text, no figure that is none."""
    return [
        common_pb2.KeyValue(key=key[:_MAX_TEXT], value=_value(value))
        for key, value in told.items()
        if value is not None
        and value != ""
        and value != ()
        and not (isinstance(value, float) and not math.isfinite(value))
        and not (isinstance(value, int) and not -(2**63) <= value < 2**63)
    ]


def _field(message: Message, name: str) -> Any:
    """Returns the field; None when it is absent."""
    return getattr(message, name) if message.HasField(name) else None


def resource_of(device_id: str, result: result_pb2.RunResult) -> resource_pb2.Resource:
    """Returns the board, by OpenTelemetry's semantic conventions as far as they have it."""
    board = result.board
    told: dict[str, _Value | None] = {
        "service.name": SERVICE_NAME,
        "service.instance.id": device_id,
        "service.version": result.environment.boardbench_version,
        "device.id": device_id,
        "device.model.name": board.model,
        "host.name": board.hostname,
        "host.arch": _ARCHITECTURES.get(board.architecture, board.architecture),
        "host.cpu.model.name": board.cpu_model,
        "os.description": board.os,
        "boardbench.board.soc": board.soc,
        "boardbench.board.kernel": board.kernel,
        "boardbench.board.cpus": board.cpu_count or None,
        "boardbench.board.memory_bytes": board.memory_bytes or None,
        "boardbench.board.emulator": board.emulator,
    }
    for name, label in sorted(board.labels.items()):
        told[f"boardbench.board.label.{name}"] = label
    return resource_pb2.Resource(attributes=_attributes(told))


def _scope(version: str) -> common_pb2.InstrumentationScope:
    return common_pb2.InstrumentationScope(name="boardbench.collector", version=version)


# Traces.


def trace_id_of(run_id: str) -> bytes:
    """Returns the trace of the run: the same whenever it is sent."""
    return hashlib.sha256(run_id.encode()).digest()[:16]


def _span_id_of(run_id: str, name: str) -> bytes:
    return hashlib.sha256(f"{run_id}\0{name}".encode()).digest()[:8]


@dataclass(frozen=True)
class _Stage:
    """A part of a run of which the duration is known, or its begin."""

    name: str
    key: str
    """What tells it from all others of the run."""
    begin: int
    """Nanoseconds since 1970."""
    seconds: float
    attributes: Mapping[str, _Value | None]
    parent: str = ""
    """Key of the span that it is in; empty: the run's."""


def trace_of(arrival: Arrival, version: str) -> Piece:
    """Returns the run as a trace: from its acceptance to its end, and in it what is known of its stages."""
    result = arrival.result
    times = _Times(arrival)
    spans = [_root(arrival, times)]
    spans += [
        trace_pb2.Span(
            trace_id=spans[0].trace_id,
            span_id=_span_id_of(result.run_id, stage.key),
            parent_span_id=_span_id_of(result.run_id, stage.parent),
            name=stage.name,
            kind=trace_pb2.Span.SPAN_KIND_INTERNAL,
            start_time_unix_nano=_unsigned(stage.begin),
            end_time_unix_nano=_unsigned(stage.begin + round(stage.seconds * 1e9)),
            attributes=_attributes(stage.attributes),
        )
        for stage in _stages(result, times)
    ]
    request = trace_service_pb2.ExportTraceServiceRequest()
    of_board = request.resource_spans.add(resource=resource_of(arrival.device_id, result))
    of_board.scope_spans.add(scope=_scope(version), spans=spans)
    return Piece(times.finished // 1_000_000, len(spans), request.SerializeToString())


def _nanoseconds(time: Timestamp) -> int:
    """Returns nanoseconds since 1970, also of what protobuf itself finds no time."""
    return time.seconds * 1_000_000_000 + time.nanos


def _unsigned(nanoseconds: int) -> int:
    """Returns a time as OTLP can have it: not before 1970, and within 64 bits."""
    return min(max(0, nanoseconds), 2**64 - 1)


class _Times:
    """When a run was accepted, started and ended, in nanoseconds since 1970; all of it by the board's clock.

    Where that was ahead of the collector's, all three are put back by as much, as in what is sent on by
    remote write.
    """

    def __init__(self, arrival: Arrival) -> None:
        result = arrival.result
        received = int(arrival.received_at * 1e6) * 1000
        told = _nanoseconds(result.finished_at) if result.HasField("finished_at") else received
        self.shift = min(0, received - told)
        self.finished = told + self.shift
        self.finished_known = result.HasField("finished_at")
        self.created = self._of(result, "created_at")
        self.started = self._of(result, "started_at")
        known = [time for time in (self.created, self.started) if time is not None]
        self.begin = min([*known, self.finished])
        # A clock that was set while the run went on.
        self.stepped = sorted([*known, self.finished]) != [*known, self.finished]

    def _of(self, result: result_pb2.RunResult, name: Literal["created_at", "started_at"]) -> int | None:
        if not result.HasField(name):
            return None
        return _nanoseconds(getattr(result, name)) + self.shift


def _root(arrival: Arrival, times: _Times) -> trace_pb2.Span:
    result = arrival.result
    attributes = {
        **_facts(result),
        "boardbench.time.clock_shift_seconds": times.shift / 1e9 if times.shift else None,
        "boardbench.time.clock_stepped": times.stepped or None,
        "boardbench.time.end": None if times.finished_known else "derived: when the result arrived",
        "boardbench.time.start": (
            None if times.created is not None else "derived: when the run was accepted is not known"
        ),
    }
    span = trace_pb2.Span(
        trace_id=trace_id_of(result.run_id),
        span_id=_span_id_of(result.run_id, ""),
        name="run",
        kind=trace_pb2.Span.SPAN_KIND_INTERNAL,
        start_time_unix_nano=_unsigned(times.begin),
        end_time_unix_nano=_unsigned(times.finished),
        attributes=_attributes(attributes),
    )
    for warning in result.warnings:
        if warning.HasField("time"):
            told: dict[str, _Value | None] = {
                "boardbench.warning.message": warning.message,
                "boardbench.warning.severity": enum_label(result_pb2.Severity, warning.severity),
            }
            span.events.add(
                time_unix_nano=_unsigned(_nanoseconds(warning.time) + times.shift),
                name=f"warning {warning.code}"[:_MAX_TEXT],
                attributes=_attributes(told),
            )
    if result.status == result_pb2.RUN_STATUS_SUCCEEDED:
        span.status.code = trace_pb2.Status.STATUS_CODE_OK
    elif result.status == result_pb2.RUN_STATUS_FAILED:
        span.status.code = trace_pb2.Status.STATUS_CODE_ERROR
        span.status.message = f"{result.error.code}: {result.error.message}"[:_MAX_TEXT]
        told = {
            "exception.type": result.error.code,
            "exception.message": result.error.message,
            "exception.stacktrace": result.error.output_tail,
        }
        span.events.add(
            time_unix_nano=span.end_time_unix_nano, name="exception", attributes=_attributes(told)
        )
    return span


def _facts(result: result_pb2.RunResult) -> dict[str, _Value | None]:
    """Returns what was run and what came of it."""
    series = series_of(result)
    told: dict[str, _Value | None] = {
        "boardbench.run.id": result.run_id,
        "boardbench.run.status": enum_label(result_pb2.RunStatus, result.status),
        "boardbench.model.name": series.model_name,
        "boardbench.model.sha256": series.model_sha256,
        "boardbench.model.format": result.model.format,
        "boardbench.model.size_bytes": result.model.size_bytes or None,
        "boardbench.runtime.name": series.runtime,
        "boardbench.runtime.version": result.runtime.version,
        "boardbench.target": series.target,
        "boardbench.threads": int(series.threads) if series.threads else None,
        "boardbench.variant": series.variant,
        "boardbench.standins": tuple(result.standins),
        "boardbench.warnings": tuple(warning.code for warning in result.warnings),
    }
    if result.HasField("error"):
        told["error.type"] = result.error.code
        told["boardbench.error.stage"] = _unless_unknown(result_pb2.Stage, result.error.stage)
        told["boardbench.error.signal"] = result.error.signal
        told["boardbench.error.exit_code"] = _field(result.error, "exit_code")
    if result.validity or result.status == result_pb2.RUN_STATUS_SUCCEEDED:
        told["boardbench.validity"] = enum_label(result_pb2.Validity, result.validity)
    if result.HasField("latency") and result.latency.count:
        told |= _latency_facts(result.latency)
    placement = result.placement
    if placement.verdict or placement.evidence:
        told["boardbench.placement.verdict"] = enum_label(placement_pb2.PlacementVerdict, placement.verdict)
        told["boardbench.placement.evidence"] = enum_label(placement_pb2.Evidence, placement.evidence)
        told["boardbench.placement.standin"] = placement.standin
    if placement.HasField("fallback_cost"):
        told["boardbench.placement.fallback_share_ratio"] = placement.fallback_cost.share
    told["boardbench.throughput_hertz"] = _field(result.scenario, "throughput_hertz")
    told["boardbench.memory.peak_rss_bytes"] = _field(result.memory, "peak_rss_bytes")
    told["boardbench.energy_per_inference_joules"] = _field(result.energy, "energy_per_inference_joules")
    told["boardbench.temperature_before_celsius"] = _field(result.environment, "temperature_before_celsius")
    told["boardbench.temperature_after_celsius"] = _field(result.environment, "temperature_after_celsius")
    told["boardbench.throttled"] = tuple(result.environment.throttled_during)
    return told


def _latency_facts(latency: latency_pb2.Latency) -> dict[str, _Value | None]:
    told: dict[str, _Value | None] = {
        "boardbench.latency.count": latency.count,
        "boardbench.latency.mean_seconds": latency.mean_seconds,
        "boardbench.latency.min_seconds": latency.min_seconds,
        "boardbench.latency.max_seconds": latency.max_seconds,
    }
    for percentile in latency.percentiles:
        # "p99_9": a point would make it a part of its own.
        which = f"{percentile.percentile:.6g}".replace(".", "_")
        told[f"boardbench.latency.p{which}_seconds"] = percentile.seconds
    return told


def _unless_unknown(enum: object, value: int) -> str:
    return enum_label(enum, value) if value else ""


def _stages(result: result_pb2.RunResult, times: _Times) -> Iterator[_Stage]:
    """Returns the stages whose durations are known; of none a time is made up."""
    if times.created is not None and times.started is not None and times.created <= times.started:
        yield _Stage(
            "wait",
            "wait",
            times.created,
            (times.started - times.created) / 1e9,
            {"boardbench.stage": "in the queue, cooling down and idling included", **_measured()},
        )
    if times.started is None:
        return
    if len(result.processes.processes) > 1:
        yield from _processes(result, times)
        return
    known = list(_durations(result))
    yield from _laid(known, times.started, times.finished)


def _measured() -> dict[str, _Value | None]:
    return {"boardbench.time.start": "measured", "boardbench.time.duration": "measured"}


def _durations(result: result_pb2.RunResult) -> Iterator[tuple[str, float, dict[str, _Value | None]]]:
    """Returns (stage, seconds, what there is to say of it) in their order."""
    cached = any(cache.warm for cache in result.caches) or None
    if result.HasField("import_seconds"):
        yield "import", result.import_seconds, {}
    if result.HasField("create_seconds"):
        yield "create", result.create_seconds, {"boardbench.from_cache": cached}
    if result.HasField("first_inference_seconds"):
        yield "first_inference", result.first_inference_seconds, {"boardbench.from_cache": cached}
    if result.HasField("warm_up"):
        warm_up = result.warm_up
        told = {"boardbench.inferences": warm_up.runs, "boardbench.steady": _field(warm_up, "steady")}
        yield "warm_up", warm_up.seconds, told
    seconds = _field(result.environment, "wall_seconds")
    if seconds is None:
        moments = {mark.label: mark.time_seconds for mark in result.telemetry.marks}
        if {"measurement_begins", "measurement_ends"} <= moments.keys():
            seconds = moments["measurement_ends"] - moments["measurement_begins"]
    if seconds is not None:
        yield "measure", seconds, {"boardbench.inferences": result.latency.count or None}


def _laid(
    known: Sequence[tuple[str, float, dict[str, _Value | None]]], begin: int, end: int, process: int = 0
) -> Iterator[_Stage]:
    """Returns the stages one behind the other, from the begin on: the earliest that each can have begun.

    What lies between them (the start of the worker, making the inputs) was not timed, so each may have begun
    later by up to what is left of the whole; that is said with it.
    """
    known = [each for each in known if math.isfinite(each[1]) and 0 <= each[1] < 1e9]
    slack = (end - begin) / 1e9 - sum(seconds for _, seconds, _ in known)
    parent = f"process {process}" if process else ""
    for name, seconds, told in known:
        yield _Stage(
            name,
            f"{parent} {name}".lstrip(),
            begin,
            seconds,
            {
                "boardbench.time.start": "derived: the earliest possible",
                "boardbench.time.start_uncertainty_seconds": max(0.0, slack),
                "boardbench.time.clock_stepped": slack < 0 or None,
                "boardbench.time.duration": "measured",
                "boardbench.process": process or None,
                **told,
            },
            parent,
        )
        begin += round(seconds * 1e9)


def _processes(result: result_pb2.RunResult, times: _Times) -> Iterator[_Stage]:
    """Returns each process from its start, and in it what was timed."""
    processes = result.processes.processes
    for position, process in enumerate(processes, 1):
        if not process.HasField("started_at"):
            continue
        begin = _nanoseconds(process.started_at) + times.shift
        following = processes[position] if position < len(processes) else None
        end = times.finished
        if following is not None and following.HasField("started_at"):
            end = _nanoseconds(following.started_at) + times.shift
        yield _Stage(
            "process",
            f"process {position}",
            begin,
            max(0, end - begin) / 1e9,
            {
                "boardbench.time.start": "measured",
                "boardbench.time.duration": "derived: until the next began, or the run ended",
                "boardbench.time.clock_stepped": end < begin or None,
                "boardbench.process": position,
                "boardbench.inferences": process.count,
                "boardbench.latency.p50_seconds": process.median_seconds,
                "boardbench.pooled": process.pooled,
            },
        )
        known: list[tuple[str, float, dict[str, _Value | None]]] = [
            (stage, getattr(process, f"{stage}_seconds"), {})
            for stage in ("create", "first_inference")
            if _field(process, f"{stage}_seconds") is not None
        ]
        yield from _laid(known, begin, end, position)


# Metrics.


def metrics_of(arrival: Arrival, version: str) -> Piece | None:
    """Returns what the run measured, at the time it ended, under the names of ``/metrics``; None: nothing.

    A latency's distribution is that of this run alone: cumulative from the start of the run on.
    """
    result = arrival.result
    if result.status != result_pb2.RUN_STATUS_SUCCEEDED:
        return None
    microseconds = measured_microseconds(arrival)
    nanoseconds = _unsigned(microseconds * 1000)
    shape = distribution_of(result.latency)
    group = result_group(LatestResult(arrival.device_id, arrival.received_at, result), shape)
    shared = [
        common_pb2.KeyValue(key=name, value=common_pb2.AnyValue(string_value=value))
        for name, value in zip(SERIES_LABELS, group.labels, strict=True)
        if value
    ]
    metrics: dict[str, metrics_pb2.Metric] = {}
    samples = 0
    for name, extra, value in group.samples:
        if name.startswith(_DISTRIBUTION):
            continue
        metric = metrics.get(name)
        if metric is None:
            metric = metrics[name] = metrics_pb2.Metric(
                name=name, unit=unit_of(name), description=_MEANINGS[name]
            )
        more = [
            common_pb2.KeyValue(key=label, value=common_pb2.AnyValue(string_value=text))
            for label, text in zip(_LABELS[name], extra, strict=True)
            if text
        ]
        metric.gauge.data_points.add(time_unix_nano=nanoseconds, as_double=value, attributes=[*shared, *more])
        samples += 1
    if shape is not None:
        started = _Times(arrival).started
        metrics[_DISTRIBUTION] = _histogram(shape, result.latency, shared, nanoseconds, started)
        samples += 1
    request = metrics_service_pb2.ExportMetricsServiceRequest()
    of_board = request.resource_metrics.add(resource=resource_of(arrival.device_id, result))
    of_board.scope_metrics.add(scope=_scope(version), metrics=metrics.values())
    return Piece((microseconds + 500) // 1000, samples, request.SerializeToString())


def unit_of(name: str) -> str:
    """Returns the unit that a metric's name ends in, as UCUM writes it; empty: a number of things."""
    return _UNITS.get(name.rpartition("_")[2], "")


def _histogram(
    shape: Distribution,
    latency: latency_pb2.Latency,
    attributes: Sequence[common_pb2.KeyValue],
    nanoseconds: int,
    started: int | None,
) -> metrics_pb2.Metric:
    below = (0, *shape.cumulative, shape.count)
    point = metrics_pb2.HistogramDataPoint(
        attributes=attributes,
        # 0: not known. No other run is in it, so each begins anew.
        start_time_unix_nano=_unsigned(started or 0) if (started or 0) < nanoseconds else 0,
        time_unix_nano=nanoseconds,
        count=shape.count,
        sum=shape.sum_seconds,
        explicit_bounds=BOUNDS_SECONDS,
        bucket_counts=[after - before for before, after in itertools.pairwise(below)],
    )
    if shape.count == latency.count:
        point.min, point.max = latency.min_seconds, latency.max_seconds
    return metrics_pb2.Metric(
        name=_DISTRIBUTION,
        unit=unit_of(_DISTRIBUTION),
        description=_MEANINGS[f"{_DISTRIBUTION}_bucket"],
        histogram=metrics_pb2.Histogram(
            data_points=[point],
            aggregation_temporality=metrics_pb2.AGGREGATION_TEMPORALITY_CUMULATIVE,
        ),
    )


# On the wire.


@contextlib.asynccontextmanager
async def exporting(
    target: Target, headers: Mapping[str, str], pace: Pace | None = None
) -> AsyncIterator[Post]:
    """Returns what sends to the target, for the context; a user and password in its URL are shown to it."""
    seconds = (pace or Pace()).post_seconds
    make = _by_grpc if target.is_grpc else _by_http
    async with make(target, headers, seconds) as post:
        yield post


def _read_response(signal: Signal, body: bytes) -> tuple[int, str]:
    """Returns how many things were not taken, and why."""
    response: _Response
    try:
        if signal == "traces":
            response = trace_service_pb2.ExportTraceServiceResponse.FromString(body)
            rejected = response.partial_success.rejected_spans
        else:
            response = metrics_service_pb2.ExportMetricsServiceResponse.FromString(body)
            rejected = response.partial_success.rejected_data_points
    except DecodeError:
        # Some say "ok" in words.
        return 0, ""
    return max(0, rejected), response.partial_success.error_message


@contextlib.asynccontextmanager
async def _by_http(target: Target, headers: Mapping[str, str], seconds: float) -> AsyncIterator[Post]:
    more = {
        "Content-Encoding": "gzip",
        "Content-Type": "application/x-protobuf",
        "User-Agent": "boardbench-collector",
        **headers,
    }
    timeout = aiohttp.ClientTimeout(total=seconds)
    async with aiohttp.ClientSession(timeout=timeout, headers=more) as session:

        async def post(body: bytes) -> Answer:
            packed = await asyncio.to_thread(gzip.compress, body, 6)
            try:
                async with session.post(target.http_url, data=packed, allow_redirects=False) as answer:
                    said = await answer.content.read(_ANSWER_BYTES)
                    wait = retry_after(answer.headers.get("Retry-After", ""))
                    if 200 <= answer.status < 300:
                        rejected, why = _read_response(target.signal, said)
                        return Answer(answer.status, why, rejected=rejected)
                    return Answer(answer.status, _problem(said, answer.content_type), wait)
            except asyncio.TimeoutError as error:
                raise Unreachable(f"no answer within {seconds:.0f} s") from error
            except (aiohttp.ClientError, OSError) as error:
                raise Unreachable(str(error) or type(error).__name__) from error

        yield post


def _problem(body: bytes, content_type: str) -> str:
    """Returns what an answer that refuses says: in words, or as google.rpc.Status."""
    if content_type == "application/x-protobuf":
        with contextlib.suppress(DecodeError):
            return str(status_pb2.Status.FromString(body).message)
    return body.decode("utf-8", "replace")


@contextlib.asynccontextmanager
async def _by_grpc(target: Target, headers: Mapping[str, str], seconds: float) -> AsyncIterator[Post]:
    parts = urlsplit(target.url)
    address = receiver_of(target.url)
    if parts.port is None:
        address += f":{GRPC_PORT}"
    metadata = [(name.lower(), value) for name, value in headers.items()]
    if parts.username is not None:
        shown = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        metadata.append(("authorization", "Basic " + base64.b64encode(shown.encode()).decode()))
    # Without this, a receiver that comes back may be found only after two minutes.
    options = (("grpc.max_reconnect_backoff_ms", 10_000), ("grpc.primary_user_agent", "boardbench-collector"))
    compression = grpc.Compression.Gzip
    if parts.scheme == "grpcs":
        secure = grpc.ssl_channel_credentials()
        channel = grpc.aio.secure_channel(address, secure, options=options, compression=compression)
    else:
        channel = grpc.aio.insecure_channel(address, options=options, compression=compression)
    async with channel:
        export: Callable[..., Awaitable[bytes]] = channel.unary_unary(_RPCS[target.signal])

        async def post(body: bytes) -> Answer:
            try:
                rejected, why = _read_response(
                    target.signal, await export(body, timeout=seconds, metadata=metadata)
                )
            except grpc.aio.AioRpcError as error:
                return _answer_of(error)
            return Answer(200, why, rejected=rejected)

        yield post


_STATUSES = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.UNIMPLEMENTED: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
}


def _answer_of(error: grpc.aio.AioRpcError) -> Answer:
    """Returns the answer as HTTP would have it; Unreachable when it is none."""
    code, said = error.code(), error.details() or ""
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        raise Unreachable("no answer in time") from error
    wait = _wait_in(error)
    if code == grpc.StatusCode.UNAVAILABLE and wait is None:
        raise Unreachable(said) from error
    status = _STATUSES.get(code, 503)
    if status == 429 and "larger than max" in said.lower():
        # What gRPC itself says of a message that is too large; it would be so again.
        status = 413
    return Answer(status, said, wait, code=code.name)


def _wait_in(error: grpc.aio.AioRpcError) -> float | None:
    """Returns the seconds that a RetryInfo among the details asks to wait, at most an hour."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin" and isinstance(value, bytes):
            with contextlib.suppress(DecodeError):
                for detail in status_pb2.Status.FromString(value).details:
                    info = error_details_pb2.RetryInfo()
                    if detail.Unpack(info):
                        seconds: float = info.retry_delay.ToTimedelta().total_seconds()
                        return min(max(0.0, seconds), LONGEST_WAIT_SECONDS)
    return None
