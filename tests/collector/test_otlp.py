"""OTLP: what is sent, to receivers of gRPC and HTTP that are built on OpenTelemetry's own messages."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest
from aiohttp import web
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2
from opentelemetry.semconv._incubating.attributes import (
    device_attributes,
    host_attributes,
    os_attributes,
    service_attributes,
)
from opentelemetry.semconv.attributes import error_attributes, exception_attributes

from boardbench.collector.forward import Pace, Unreachable
from boardbench.collector.otlp import (
    OtlpForwarder,
    Target,
    exporting,
    metrics_of,
    resource_of,
    targets_of,
    trace_id_of,
    trace_of,
    unit_of,
)
from boardbench.collector.samples import result_group
from boardbench.collector.store import Arrival, LatestResult
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.v1 import collector_pb2, collector_pb2_grpc, result_pb2

MakeResult = Callable[..., result_pb2.RunResult]

QUICK = Pace(poll_seconds=0.02, first_retry_seconds=0.01, longest_retry_seconds=0.05)
BEGIN = 1_700_000_000
SECOND = 1_000_000_000


def told(attributes: Any) -> dict[str, Any]:
    """Attributes as a dict; none is there twice."""
    found: dict[str, Any] = {}
    for each in attributes:
        assert each.key not in found, each.key
        value = getattr(each.value, each.value.WhichOneof("value"))
        if each.value.HasField("array_value"):
            value = [item.string_value for item in value.values]
        found[each.key] = value
    return found


def arrival(result: result_pb2.RunResult, received: float | None = None) -> Arrival:
    return Arrival(1, result.board.device_id, received or result.finished_at.seconds + 60.0, result)


def spans_of(result: result_pb2.RunResult, received: float | None = None) -> dict[str, trace_pb2.Span]:
    """The spans of the run's trace by name and process, having looked at what all traces must have."""
    piece = trace_of(arrival(result, received), "1.2.3")
    request = trace_service_pb2.ExportTraceServiceRequest.FromString(piece.content)
    ((scope,),) = (board.scope_spans for board in request.resource_spans)
    assert (scope.scope.name, scope.scope.version) == ("boardbench.collector", "1.2.3")
    spans = {}
    for span in scope.spans:
        process = told(span.attributes).get("boardbench.process")
        name = f"process {process} {span.name}".removesuffix(" process") if process else span.name
        spans[name] = span
    assert len(spans) == len(scope.spans) == piece.samples
    identities = {span.span_id for span in scope.spans}
    assert len(identities) == len(spans) and all(len(each) == 8 for each in identities)
    assert {span.trace_id for span in scope.spans} == {trace_id_of(result.run_id)}
    assert [name for name, span in spans.items() if not span.parent_span_id] == ["run"]
    assert all(span.parent_span_id in identities for name, span in spans.items() if name != "run")
    assert all(span.start_time_unix_nano <= span.end_time_unix_nano for span in spans.values())
    return spans


def seconds_of(span: trace_pb2.Span) -> tuple[float, float]:
    """(begin, duration) of the span, the begin since BEGIN."""
    begin = (span.start_time_unix_nano - BEGIN * SECOND) / 1e9
    return round(begin, 6), round((span.end_time_unix_nano - span.start_time_unix_nano) / 1e9, 6)


@pytest.fixture
def result(make_result: MakeResult) -> result_pb2.RunResult:
    """A run that was accepted at BEGIN, started a second later and ended after twelve."""
    made = make_result("run-1", finished=BEGIN + 12)
    made.warm_up.runs, made.warm_up.seconds, made.warm_up.steady = 40, 0.5, True
    made.environment.wall_seconds = 8.0
    made.environment.boardbench_version = "0.1.0"
    made.validity = result_pb2.VALIDITY_DOUBTFUL
    return made


# Traces.


def test_a_run_is_a_trace_with_a_span_for_each_stage_that_was_timed(result: result_pb2.RunResult) -> None:
    spans = spans_of(result)
    assert {name: seconds_of(span) for name, span in spans.items()} == {
        "run": (0.0, 12.0),
        "wait": (0.0, 1.0),
        "import": (1.0, 0.31),
        "create": (1.31, 0.0042),
        "first_inference": (1.3142, 0.0171),
        "warm_up": (1.3313, 0.5),
        "measure": (1.8313, 8.0),
    }
    # What was not timed (the worker's start, its inputs, its report) is between and behind these.
    left = 11 - 0.31 - 0.0042 - 0.0171 - 0.5 - 8.0
    for name in ("import", "create", "first_inference", "warm_up", "measure"):
        facts = told(spans[name].attributes)
        assert facts["boardbench.time.start"] == "derived: the earliest possible"
        assert facts["boardbench.time.start_uncertainty_seconds"] == pytest.approx(left)
        assert facts["boardbench.time.duration"] == "measured"
        assert spans[name].parent_span_id == spans["run"].span_id
    facts = told(spans["wait"].attributes)
    assert (facts["boardbench.time.start"], facts["boardbench.time.duration"]) == ("measured", "measured")
    assert told(spans["warm_up"].attributes)["boardbench.steady"] is True
    assert told(spans["measure"].attributes)["boardbench.inferences"] == 800


def test_a_run_says_what_ran_and_what_came_of_it(result: result_pb2.RunResult) -> None:
    run = spans_of(result)["run"]
    assert run.status.code == trace_pb2.Status.STATUS_CODE_OK and not run.events
    facts = told(run.attributes)
    assert not any(name.startswith("boardbench.time.") for name in facts), "nothing of it is derived"
    assert facts["boardbench.run.id"] == "run-1" and facts["boardbench.run.status"] == "succeeded"
    assert facts["boardbench.model.name"] == "mobilenet.tflite"
    assert facts["boardbench.threads"] == 4
    assert facts["boardbench.validity"] == "doubtful"
    assert facts["boardbench.placement.verdict"] == "not_accelerated"
    assert facts["boardbench.warnings"] == ["high_load"]
    assert facts["boardbench.latency.p50_seconds"] == 0.0125
    assert facts["boardbench.latency.p99_9_seconds"] == pytest.approx(0.0125 * 1.9)
    assert facts["boardbench.memory.peak_rss_bytes"] == 74 << 20
    assert "boardbench.throughput_hertz" not in facts, "what is not known is not there"
    result.scenario.throughput_hertz = float("nan")
    assert "boardbench.throughput_hertz" not in told(spans_of(result)["run"].attributes), "nor what is none"


def test_a_run_that_failed_is_an_error_with_its_code(make_result: MakeResult) -> None:
    failed = make_result("run-1", finished=BEGIN + 12, status=result_pb2.RUN_STATUS_FAILED)
    failed.error.output_tail = "Segmentation fault"
    spans = spans_of(failed)
    assert set(spans) == {"run"}, "no stage of it was timed"
    run = spans["run"]
    assert run.status.code == trace_pb2.Status.STATUS_CODE_ERROR
    assert run.status.message == "worker_killed: the worker was killed by SIGSEGV"
    facts = told(run.attributes)
    assert facts[error_attributes.ERROR_TYPE] == "worker_killed"
    assert facts["boardbench.error.stage"] == "first_inference"
    assert "boardbench.validity" not in facts
    (event,) = run.events
    assert (event.name, event.time_unix_nano) == ("exception", run.end_time_unix_nano)
    exception = exception_attributes
    assert told(event.attributes) == {
        exception.EXCEPTION_TYPE: "worker_killed",
        exception.EXCEPTION_MESSAGE: "the worker was killed by SIGSEGV",
        exception.EXCEPTION_STACKTRACE: "Segmentation fault",
    }


def test_a_run_that_was_cancelled_is_no_error(make_result: MakeResult) -> None:
    cancelled = make_result("run-1", finished=BEGIN + 12, status=result_pb2.RUN_STATUS_CANCELLED)
    cancelled.ClearField("error")
    run = spans_of(cancelled)["run"]
    assert run.status.code == trace_pb2.Status.STATUS_CODE_UNSET and not run.events
    assert told(run.attributes)["boardbench.run.status"] == "cancelled"


def test_times_that_are_not_known_are_not_made_up(result: result_pb2.RunResult) -> None:
    result.ClearField("started_at")
    assert set(spans_of(result)) == {"run"}
    for name in ("created_at", "finished_at"):
        result.ClearField(name)
    run = spans_of(result, received=BEGIN + 100.0)["run"]
    assert seconds_of(run) == (100.0, 0.0)
    facts = told(run.attributes)
    assert facts["boardbench.time.end"].startswith("derived")
    assert facts["boardbench.time.start"].startswith("derived")


def test_the_marks_of_the_sensors_say_how_long_the_measurement_was(result: result_pb2.RunResult) -> None:
    result.environment.ClearField("wall_seconds")
    assert "measure" not in spans_of(result)
    result.telemetry.marks.add(time_seconds=2.5, label="measurement_begins")
    assert "measure" not in spans_of(result)
    result.telemetry.marks.add(time_seconds=7.0, label="measurement_ends")
    assert seconds_of(spans_of(result)["measure"])[1] == 4.5


def test_a_clock_that_is_ahead_puts_nothing_into_the_future(result: result_pb2.RunResult) -> None:
    spans = spans_of(result, received=BEGIN - 1000.0)
    assert seconds_of(spans["run"]) == (-1012.0, 12.0)
    assert seconds_of(spans["import"]) == (-1011.0, 0.31)
    assert told(spans["run"].attributes)["boardbench.time.clock_shift_seconds"] == -1012.0


def test_a_clock_that_was_set_meanwhile_is_told(result: result_pb2.RunResult) -> None:
    result.finished_at.FromSeconds(BEGIN - 3600)
    spans = spans_of(result)
    assert told(spans["run"].attributes)["boardbench.time.clock_stepped"] is True
    assert seconds_of(spans["run"]) == (-3600.0, 0.0)
    measure = told(spans["measure"].attributes)
    assert measure["boardbench.time.clock_stepped"] is True
    assert measure["boardbench.time.start_uncertainty_seconds"] == 0.0


def test_warnings_with_a_time_are_events(result: result_pb2.RunResult) -> None:
    warning = result.warnings.add(code="throttled", message="by its heat", severity=3)
    warning.time.FromSeconds(BEGIN + 5)
    (event,) = spans_of(result)["run"].events
    assert (event.name, event.time_unix_nano) == ("warning throttled", (BEGIN + 5) * SECOND)
    assert told(event.attributes)["boardbench.warning.severity"] == "invalid"


def test_several_processes_are_spans_from_their_starts_on(result: result_pb2.RunResult) -> None:
    for begin, create in ((1, 0.2), (5, 0.3)):
        process = result.processes.processes.add(
            count=400, median_seconds=0.0125, pooled=True, create_seconds=create, first_inference_seconds=0.1
        )
        process.started_at.FromSeconds(BEGIN + begin)
    spans = spans_of(result)
    assert {name: seconds_of(span) for name, span in spans.items()} == {
        "run": (0.0, 12.0),
        "wait": (0.0, 1.0),
        "process 1": (1.0, 4.0),
        "process 1 create": (1.0, 0.2),
        "process 1 first_inference": (1.2, 0.1),
        "process 2": (5.0, 7.0),
        "process 2 create": (5.0, 0.3),
        "process 2 first_inference": (5.3, 0.1),
    }
    assert spans["process 2 create"].parent_span_id == spans["process 2"].span_id
    facts = told(spans["process 1"].attributes)
    assert facts["boardbench.time.start"] == "measured"
    assert facts["boardbench.time.duration"].startswith("derived")
    left = told(spans["process 1 create"].attributes)["boardbench.time.start_uncertainty_seconds"]
    assert left == pytest.approx(3.7)


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -1.0, 1e300])
def test_what_a_strange_board_says_does_no_harm(result: result_pb2.RunResult, seconds: float) -> None:
    result.import_seconds = result.warm_up.seconds = seconds
    result.finished_at.seconds = result.created_at.seconds = 2**62
    result.started_at.seconds = -(2**62)
    result.board.memory_bytes = -1
    result.board.hostname = "x" * 100_000
    result.run_id = "😀" * 1000
    spans = spans_of(result, received=BEGIN + 60.0)
    assert "import" not in spans and "create" in spans
    assert metrics_of(arrival(result, BEGIN + 60.0), "") is not None
    empty = result_pb2.RunResult(run_id="r", status=result_pb2.RUN_STATUS_SUCCEEDED)
    assert set(spans_of(empty, received=BEGIN)) == {"run"}


def test_the_board_is_named_as_opentelemetry_names_hosts_and_devices(result: result_pb2.RunResult) -> None:
    result.board.cpu_model = "Cortex-A76"
    facts = told(resource_of("pi5", result).attributes)
    assert {name: value for name, value in facts.items() if not name.startswith("boardbench.")} == {
        service_attributes.SERVICE_NAME: "boardbench",
        service_attributes.SERVICE_INSTANCE_ID: "pi5",
        service_attributes.SERVICE_VERSION: "0.1.0",
        device_attributes.DEVICE_ID: "pi5",
        device_attributes.DEVICE_MODEL_NAME: "Raspberry Pi 5 Model B Rev 1.0",
        host_attributes.HOST_NAME: "pi5.lab",
        host_attributes.HOST_ARCH: host_attributes.HostArchValues.ARM64.value,
        host_attributes.HOST_CPU_MODEL_NAME: "Cortex-A76",
        os_attributes.OS_DESCRIPTION: "Debian GNU/Linux 12 (bookworm)",
    }
    assert facts["boardbench.board.label.lab"] == "zurich"
    assert facts["boardbench.board.soc"] == "bcm2712"
    assert "boardbench.board.emulator" not in facts


# Metrics.


def points_of(request: Any) -> dict[str, list[tuple[dict[str, Any], Any]]]:
    """(attributes, data point) of every metric, by its name."""
    found: dict[str, list[tuple[dict[str, Any], Any]]] = {}
    for board in request.resource_metrics:
        for scope in board.scope_metrics:
            for metric in scope.metrics:
                points = getattr(metric, metric.WhichOneof("data")).data_points
                found.setdefault(metric.name, []).extend((told(p.attributes), p) for p in points)
    return found


def test_what_was_measured_is_at_the_time_of_the_run_under_the_names_of_metrics(
    result: result_pb2.RunResult,
) -> None:
    piece = metrics_of(arrival(result), "1.2.3")
    assert piece is not None and piece.milliseconds == (BEGIN + 12) * 1000
    request = metrics_service_pb2.ExportMetricsServiceRequest.FromString(piece.content)
    points = points_of(request)
    assert sum(len(each) for each in points.values()) == piece.samples > 30
    assert all(point.time_unix_nano == (BEGIN + 12) * SECOND for each in points.values() for _, point in each)
    shared = {
        "device": "pi5",
        "model": "mobilenet.tflite",
        "model_sha256": "5ba0" * 3,
        "runtime": "tflite",
        "target": "cpu",
        "threads": "4",
    }
    percentiles = {
        facts.pop("percentile"): (facts, p.as_double) for facts, p in points["boardbench_latency_seconds"]
    }
    assert percentiles["50"] == (shared, 0.0125) and set(percentiles) == {"50", "90", "99", "99.9"}
    ((facts, validity),) = points["boardbench_result_validity_info"]
    assert (facts["validity"], validity.as_double) == ("doubtful", 1)
    ((_, shape),) = points["boardbench_latency_distribution_seconds"]
    assert shape.start_time_unix_nano == (BEGIN + 1) * SECOND
    assert shape.count == sum(shape.bucket_counts) == 100
    assert len(shape.bucket_counts) == len(shape.explicit_bounds) + 1
    assert not shape.HasField("min"), "800 were measured, of which these are 100"
    # All 100 took between 12.5 and 12.6 ms.
    assert shape.bucket_counts[list(shape.explicit_bounds).index(0.02)] == 100


def test_both_ways_of_sending_on_say_the_same(result: result_pb2.RunResult) -> None:
    piece = metrics_of(arrival(result), "")
    assert piece is not None
    points = points_of(metrics_service_pb2.ExportMetricsServiceRequest.FromString(piece.content))
    group = result_group(LatestResult("pi5", 0.0, result), None)
    values = {name: sorted(v for n, _, v in group.samples if n == name) for name, _, _ in group.samples}
    del points["boardbench_latency_distribution_seconds"]
    assert {name: sorted(p.as_double for _, p in each) for name, each in points.items()} == values


def test_failed_runs_measure_nothing(make_result: MakeResult) -> None:
    assert metrics_of(arrival(make_result(status=result_pb2.RUN_STATUS_FAILED)), "") is None


def test_units_are_those_of_the_names() -> None:
    assert unit_of("boardbench_latency_seconds") == "s"
    assert unit_of("boardbench_fallback_share_ratio") == "1"
    assert unit_of("boardbench_memory_rss_bytes") == "By"
    assert unit_of("boardbench_ops") == ""


# Receivers.


class Receiver(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):  # type: ignore[misc]
    """OpenTelemetry's services over real connections; ``judge`` may refuse, by ending the call."""

    def __init__(self) -> None:
        self.requests: list[Any] = []
        self.metadata: list[dict[str, str]] = []
        self.judge: Callable[[Any, Any], Any] = lambda request, context: None
        self.port = 0
        self._server: Any = None

    def start(self) -> None:
        self._server = grpc.server(futures.ThreadPoolExecutor(4), options=(("grpc.so_reuseport", 0),))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{self.port}")
        self._server.start()

    def stop(self) -> None:
        self._server.stop(0).wait()

    def Export(self, request: Any, context: Any) -> Any:
        answer = self.judge(request, context)
        self.metadata.append(dict(context.invocation_metadata()))
        self.requests.append(request)
        if answer is not None:
            return answer
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            return trace_service_pb2.ExportTraceServiceResponse()
        return metrics_service_pb2.ExportMetricsServiceResponse()

    @property
    def url(self) -> str:
        return f"grpc://127.0.0.1:{self.port}"

    def runs(self) -> list[str]:
        """The runs of the traces that were taken."""
        return [
            told(span.attributes)["boardbench.run.id"]
            for request in self.requests
            if isinstance(request, trace_service_pb2.ExportTraceServiceRequest)
            for board in request.resource_spans
            for scope in board.scope_spans
            for span in scope.spans
            if span.name == "run"
        ]

    def medians(self) -> list[tuple[int, float]]:
        """(nanoseconds, value) of every median that was taken."""
        return [
            (point.time_unix_nano, point.as_double)
            for request in self.requests
            if isinstance(request, metrics_service_pb2.ExportMetricsServiceRequest)
            for facts, point in points_of(request).get("boardbench_latency_seconds", ())
            if facts["percentile"] == "50"
        ]


@pytest.fixture
def receiver() -> Any:
    made = Receiver()
    made.start()
    yield made
    made.stop()


class Sending:
    """Forwarders of both signals to a receiver, as the collector has them."""

    def __init__(self, url: str, folder: Path, pace: Pace = QUICK) -> None:
        self.url, self.folder, self.pace = url, folder, pace
        self.store = MemoryResultStore()
        self.sequence = 0

    async def add(self, *results: result_pb2.RunResult) -> None:
        for each in results:
            self.sequence += 1
            await self.store.append(each.board.device_id, "spool", self.sequence, each)

    @contextlib.asynccontextmanager
    async def running(self) -> Any:
        """New forwarders of both signals, at work inside the context."""
        async with contextlib.AsyncExitStack() as stack:
            forwarders = {}
            for target in targets_of(self.url):
                post = await stack.enter_async_context(exporting(target, {"X-Tenant": "lab"}, self.pace))
                forwarders[target.signal] = OtlpForwarder(
                    target, self.store, self.folder, post, version="1", pace=self.pace
                )
            tasks = [asyncio.create_task(each.run()) for each in forwarders.values()]
            try:
                yield forwarders
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def until_done(self) -> Any:
        """Sends all there is and returns how it went."""
        position = (await self.store.news(0)).position
        async with self.running() as forwarders:
            await until(lambda: all(each._position >= position for each in forwarders.values()))
            return {signal: each.view() for signal, each in forwarders.items()}


async def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


async def test_traces_and_metrics_arrive_by_grpc(
    receiver: Receiver, make_result: MakeResult, tmp_path: Path
) -> None:
    sending = Sending(receiver.url.replace("//", "//user:secret@"), tmp_path)
    await sending.add(
        make_result("run-1", finished=BEGIN, p50=0.01),
        make_result("run-2", finished=BEGIN + 60, p50=0.02),
        make_result("run-3", finished=BEGIN + 90, status=result_pb2.RUN_STATUS_FAILED),
    )
    views = await sending.until_done()
    assert receiver.runs() == ["run-1", "run-2", "run-3"]
    assert receiver.medians() == [(BEGIN * SECOND, 0.01), ((BEGIN + 60) * SECOND, 0.02)]
    assert views["traces"].receiver == f"127.0.0.1:{receiver.port} traces"
    assert views["metrics"].receiver == f"127.0.0.1:{receiver.port} metrics"
    assert views["traces"].samples == 2 * 5 + 1
    for view in views.values():
        assert (view.dropped, view.retries, view.up, view.pending) == ({}, 0, True, 0)
    for metadata in receiver.metadata:
        assert metadata["x-tenant"] == "lab"
        assert metadata["authorization"] == "Basic " + base64.b64encode(b"user:secret").decode()


async def test_a_backlog_waits_for_a_receiver_that_comes_back_and_a_restart_repeats_nothing(
    receiver: Receiver, make_result: MakeResult, tmp_path: Path
) -> None:
    sending = Sending(receiver.url, tmp_path)
    await sending.add(make_result("run-0", finished=BEGIN))
    await sending.until_done()
    await asyncio.to_thread(receiver.stop)
    # The board comes online with what it measured, while the receiver is away.
    await sending.add(*(make_result(f"run-{n}", finished=BEGIN + n) for n in range(1, 20)))
    async with sending.running() as forwarders:
        await until(lambda: all(each.view().retries >= 2 for each in forwarders.values()))
        assert all(each.view().up is False for each in forwarders.values())
    # The collector restarts, and finds the receiver back after a while.
    async with sending.running() as forwarders:
        await until(lambda: all(each.view().retries >= 1 for each in forwarders.values()))
        await asyncio.to_thread(receiver.start)
        await until(lambda: len(receiver.runs()) >= 20 and len(receiver.medians()) >= 20)
        await until(lambda: all(each._position >= 20 for each in forwarders.values()))
        assert all(each.view().dropped == {} and each.view().up for each in forwarders.values())
    await sending.until_done()
    assert receiver.runs() == [f"run-{n}" for n in range(20)]
    assert [at for at, _ in receiver.medians()] == [(BEGIN + n) * SECOND for n in range(20)]


async def test_the_signals_do_not_hold_each_other_up(
    receiver: Receiver, make_result: MakeResult, tmp_path: Path
) -> None:
    def judge(request: Any, context: Any) -> None:
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            context.abort(grpc.StatusCode.UNIMPLEMENTED, "no traces here")

    receiver.judge = judge
    sending = Sending(receiver.url, tmp_path)
    await sending.add(make_result("run-1", finished=BEGIN))
    async with sending.running() as forwarders:
        await until(lambda: len(receiver.medians()) == 1 and forwarders["traces"].view().retries > 1)
        assert forwarders["traces"].view().dropped == {} and forwarders["traces"].view().up is False
        await until(lambda: forwarders["metrics"].view().up is True)
        await until(lambda: forwarders["metrics"]._position >= 1)
    # Nor does either take the other's place in the store for its own.
    receiver.judge = lambda request, context: None
    await sending.until_done()
    assert (receiver.runs(), len(receiver.medians())) == (["run-1"], 1)
    # And one that takes only the one is told so by the URL.
    only = Sending(f"{receiver.url}/v1/metrics", tmp_path)
    await only.add(make_result("run-1", finished=BEGIN))
    assert set(await only.until_done()) == {"metrics"}


async def test_one_that_is_refused_does_not_hold_up_the_others(
    receiver: Receiver, make_result: MakeResult, tmp_path: Path
) -> None:
    def judge(request: Any, context: Any) -> None:
        # A trace names its run; of its metrics the gauges have no other time than the end of it.
        bad = f"  time_unix_nano: {(BEGIN + 13) * SECOND}\n"
        if '"run-13"' in str(request) or ("resource_metrics" in str(request) and bad in str(request)):
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "out of bounds")

    receiver.judge = judge
    sending = Sending(receiver.url, tmp_path)
    await sending.add(*(make_result(f"run-{n}", finished=BEGIN + n) for n in range(30)))
    views = await sending.until_done()
    assert receiver.runs() == [f"run-{n}" for n in range(30) if n != 13]
    assert len(receiver.medians()) == 29
    for view in views.values():
        assert set(view.dropped) == {"too_old"} and view.samples == 29 * view.dropped["too_old"]


async def test_what_is_too_large_for_a_receiver_goes_in_parts(
    receiver: Receiver, make_result: MakeResult, tmp_path: Path
) -> None:
    largest = 0

    def judge(request: Any, context: Any) -> None:
        nonlocal largest
        if request.ByteSize() > 60_000:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "Received message larger than max (99999 vs. 60000)"
            )
        largest = max(largest, request.ByteSize())

    receiver.judge = judge
    sending = Sending(receiver.url, tmp_path)
    await sending.add(*(make_result(f"run-{n}", finished=BEGIN + n) for n in range(50)))
    views = await sending.until_done()
    assert receiver.runs() == [f"run-{n}" for n in range(50)] and len(receiver.medians()) == 50
    assert all(view.dropped == {} and view.retries == 0 for view in views.values())
    assert largest > 30_000


async def test_what_a_receiver_takes_only_in_part_is_counted_and_not_sent_again(
    receiver: Receiver, make_result: MakeResult, tmp_path: Path
) -> None:
    def judge(request: Any, context: Any) -> Any:
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            return trace_service_pb2.ExportTraceServiceResponse(
                partial_success={"rejected_spans": 2, "error_message": "the attribute is too long"}
            )
        return metrics_service_pb2.ExportMetricsServiceResponse(
            partial_success={"rejected_data_points": 3, "error_message": "out of order"}
        )

    receiver.judge = judge
    sending = Sending(receiver.url, tmp_path)
    await sending.add(make_result("run-1", finished=BEGIN))
    views = await sending.until_done()
    assert views["traces"].dropped == {"refused": 2} and views["traces"].samples == 5 - 2
    assert views["metrics"].dropped == {"out_of_order": 3}
    assert len(receiver.requests) == 2


async def test_a_receiver_that_wants_time_gets_it(receiver: Receiver) -> None:
    def judge(request: Any, context: Any) -> None:
        details = any_pb2.Any()
        details.Pack(error_details_pb2.RetryInfo(retry_delay=duration_pb2.Duration(seconds=7)))
        status = status_pb2.Status(code=8, message="slow", details=[details])
        context.set_trailing_metadata((("grpc-status-details-bin", status.SerializeToString()),))
        context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "slow")

    receiver.judge = judge
    async with exporting(Target(receiver.url, "traces"), {}) as post:
        answer = await post(b"")
        assert (answer.status, answer.retry_after_seconds, answer.code) == (429, 7.0, "RESOURCE_EXHAUSTED")
        assert str(answer) == "RESOURCE_EXHAUSTED: slow"
        receiver.stop()
        with pytest.raises(Unreachable):
            await post(b"")


async def test_traces_and_metrics_arrive_by_http(make_result: MakeResult, tmp_path: Path) -> None:
    seen: dict[str, list[tuple[dict[str, str], bytes]]] = {}
    answers = {
        "traces": [
            web.Response(status=429, text="slow", headers={"Retry-After": "0"}),
            web.Response(
                status=400,
                body=status_pb2.Status(message="bad data").SerializeToString(),
                content_type="application/x-protobuf",
            ),
        ]
    }

    async def take(request: web.Request) -> web.Response:
        signal = request.path.rpartition("/")[2]
        if answers.get(signal):
            return answers[signal].pop(0)
        # aiohttp has unpacked it by its Content-Encoding.
        seen.setdefault(request.path, []).append((dict(request.headers), await request.read()))
        return web.Response(body=b"", content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/otlp/v1/{signal}", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    sending = Sending(f"http://user:secret@127.0.0.1:{runner.addresses[0][1]}/otlp/", tmp_path)
    await sending.add(make_result("run-1", finished=BEGIN), make_result("run-2", finished=BEGIN + 60))
    views = await sending.until_done()
    await runner.cleanup()
    assert views["traces"].retries == 1 and views["traces"].dropped == {}
    assert set(seen) == {"/otlp/v1/traces", "/otlp/v1/metrics"}
    for headers, _ in seen["/otlp/v1/traces"] + seen["/otlp/v1/metrics"]:
        assert headers["Content-Type"] == "application/x-protobuf" and headers["Content-Encoding"] == "gzip"
        assert headers["X-Tenant"] == "lab" and headers["Authorization"].startswith("Basic ")
    # Refused as one, taken one by one.
    bodies = [body for _, body in seen["/otlp/v1/traces"]]
    requests = [trace_service_pb2.ExportTraceServiceRequest.FromString(body) for body in bodies]
    assert [len(request.resource_spans) for request in requests] == [1, 1]
    ((_, body),) = seen["/otlp/v1/metrics"]
    request = metrics_service_pb2.ExportMetricsServiceRequest.FromString(body)
    assert len(points_of(request)["boardbench_latency_mean_seconds"]) == 2


async def test_what_http_says_of_refusals_is_read() -> None:
    answers = iter(
        (
            web.Response(
                body=status_pb2.Status(message="bad data").SerializeToString(),
                status=400,
                content_type="application/x-protobuf",
            ),
            web.Response(text="ok"),
            web.Response(status=503, headers={"Retry-After": "7"}),
        )
    )

    async def take(request: web.Request) -> web.Response:
        return next(answers)

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    target = Target(f"http://127.0.0.1:{runner.addresses[0][1]}", "traces")
    async with exporting(target, {}) as post:
        assert str(await post(b"")) == "HTTP 400: bad data"
        assert (await post(b"")).taken
        assert (await post(b"")).retry_after_seconds == 7.0
        await runner.cleanup()
        with pytest.raises(Unreachable):
            await post(b"")


def test_where_signals_go() -> None:
    def urls(url: str) -> list[str]:
        return [target.http_url for target in targets_of(url)]

    assert urls("http://otel:4318") == ["http://otel:4318/v1/traces", "http://otel:4318/v1/metrics"]
    assert urls("https://lab/api/v1/otlp/") == [
        "https://lab/api/v1/otlp/v1/traces",
        "https://lab/api/v1/otlp/v1/metrics",
    ]
    assert urls("http://vm:8428/opentelemetry/v1/metrics") == ["http://vm:8428/opentelemetry/v1/metrics"]
    assert [target.signal for target in targets_of("grpc://otel/v1/traces")] == ["traces"]
    assert targets_of("grpc://user:secret@otel:4317")[0].receiver == "otel:4317 traces"


# The collector.


def test_a_collector_sends_runs_on_and_tells_how_it_goes(
    start_collector: Callable[..., Any],
    make_hello: Callable[..., collector_pb2.Hello],
    make_result: MakeResult,
    wait_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    receiver: Receiver,
) -> None:
    monkeypatch.setenv("BOARDBENCH_COLLECTOR_OTLP", receiver.url)
    monkeypatch.setenv("BOARDBENCH_COLLECTOR_OTLP_HEADER", "Authorization=Bearer to ken\nX-Tenant=lab")
    for turn in (1, 2):
        collector = start_collector()
        requests = (
            collector_pb2.ReportRequest(hello=make_hello()),
            collector_pb2.ReportRequest(
                result=collector_pb2.SpooledResult(
                    spool_id="spool-1",
                    sequence=turn,
                    result=make_result(f"run-{turn}", finished=BEGIN + turn),
                )
            ),
        )
        with grpc.insecure_channel(collector.grpc_address) as channel:
            list(collector_pb2_grpc.CollectorServiceStub(channel).Report(iter(requests)))
        wait_until(
            lambda turn=turn: len(receiver.runs()) == turn and len(receiver.medians()) == turn,
            "the run is sent on",
        )
        for signal in ("traces", "metrics"):
            line = f'boardbench_collector_forward_up{{receiver="127.0.0.1:{receiver.port} {signal}"}} 1\n'
            wait_until(lambda get=collector.get, line=line: line in get("/metrics"), "and that is told")
        assert collector.stop() == 0
    assert receiver.runs() == ["run-1", "run-2"]
    assert {(each["authorization"], each["x-tenant"]) for each in receiver.metadata} == {
        ("Bearer to ken", "lab")
    }


def _serve(tmp_path: Path, *arguments: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """A collector that ends by itself: its HTTP address is taken."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        program = (
            f"import sys\n{before}\nfrom boardbench.collector.cli import main\n"
            "try:\n    main(sys.argv[1:])\nfinally:\n"
            "    print('loaded:', [n for n in sys.modules if n.startswith(('opentelemetry', 'google.rpc'))])"
        )
        return subprocess.run(
            [
                *(sys.executable, "-c", program, "serve", "--listen", "127.0.0.1:0"),
                *("--http", f"127.0.0.1:{taken.getsockname()[1]}", "--data-dir", str(tmp_path), *arguments),
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )


def test_nothing_of_it_is_loaded_when_it_is_not_used(tmp_path: Path) -> None:
    answer = _serve(tmp_path)
    assert "can't listen" in answer.stderr
    assert "loaded: []" in answer.stdout


@pytest.mark.parametrize("missing", ["opentelemetry", "google.rpc"])
def test_missing_packages_are_told_with_the_extra_that_brings_them(tmp_path: Path, missing: str) -> None:
    before = (
        "import importlib.abc\n"
        "class Missing(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        f"        if name == {missing!r}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())"
    )
    # The HTTP address must be free here: what is missing is found behind it.
    answer = subprocess.run(
        [
            *(
                sys.executable,
                "-c",
                f"import sys\n{before}\nfrom boardbench.collector.cli import main\nmain()",
            ),
            *("serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data-dir", str(tmp_path)),
            *("--otlp", "grpc://127.0.0.1:1"),
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert answer.returncode == 1
    assert re.search(
        rf"--otlp needs more of boardbench \({re.escape(missing)}\S* is missing\): "
        r"pip install 'boardbench\[otel\]'",
        answer.stderr,
    )


@pytest.mark.parametrize("url", ["otel:4317", "ftp://otel", "http://"])
def test_a_url_that_is_none_is_told(tmp_path: Path, url: str) -> None:
    answer = _serve(tmp_path, "--otlp", url)
    assert answer.returncode == 2 and "grpc://HOST:4317" in answer.stderr
