"""``/metrics``: what Prometheus sees, read at the scrape.

Nothing is counted here and nothing is kept between scrapes: a snapshot goes in, metric families come out.
:data:`METRICS` is the one table of names, labels and meanings; families are made from it, so nothing
that it does not list can be exposed, and the documentation is compared with it by a test.

What a board says is a stranger's text. Label values are cut to a bounded length without control
characters, no combination of labels is shown twice, and a board has a bounded number of series.
No series has an explicit timestamp: one without it vanishes from Prometheus with the next scrape after
it vanishes here, one with it would linger for five minutes.
"""

from __future__ import annotations

import hashlib
import math
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from google.protobuf.message import Message
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from boardbench.collector.look import DeviceView, Snapshot
from boardbench.collector.store import LatestResult, series_of
from boardbench.v1 import collector_pb2, placement_pb2, result_pb2

MAX_LABEL_LENGTH = 128
"""Longest label value in characters; what is longer is cut and told apart by a digest."""

MAX_PERCENTILES = 32
"""Percentiles of one result that are shown: the agent reports about ten."""

SHORT_HASH_DIGITS = 12
"""Digits of the model's SHA-256 in labels: 48 bits tell apart all the models that a lab will ever have."""

MIN_SERIES_PER_RESULT = 8
"""Series that every finished measurement has at least; bounds what is read from the store for one board."""

_SERIES_LABELS = ("device", "model", "model_sha256", "runtime", "target", "threads", "variant")


@dataclass(frozen=True)
class Metric:
    """One line of the table of metrics."""

    name: str
    """As it is in the exposition, with ``_total`` or ``_info``."""
    kind: str
    """"gauge", "counter" or "info" (a gauge that is always 1)."""
    labels: tuple[str, ...]
    meaning: str


def _of_series(name: str, meaning: str, *labels: str, kind: str = "gauge") -> Metric:
    return Metric(name, kind, (*_SERIES_LABELS, *labels), meaning)


LABELS: Mapping[str, str] = {
    "device": "device_id of the board.",
    "model": "File name of the model.",
    "model_sha256": f"First {SHORT_HASH_DIGITS} digits of the model's SHA-256; two builds are two series.",
    "runtime": "Name of the runtime: tflite, onnxruntime, ….",
    "target": "Device that was asked of the runtime: cpu, edgetpu, ….",
    "threads": "Number of threads; empty: the engine's own default.",
    "variant": "Engine options, shapes, inputs and scenario that were asked for; empty: none.",
    "percentile": "Percentile, 50 is the median.",
    "phase": "Phase of the worker's life: baseline, loaded, first_inference, steady.",
    "unit": "Where operations run: cpu, cpu_delegate, gpu, tpu, npu, delegate, unknown.",
    "verdict": "What all evidence says: accelerated, partly, not_accelerated, contradicted, unknown.",
    "evidence": "What the per-op list rests on: static, partition, profiled, counters, host_cpu.",
    "standin": "true when a stand-in took the accelerator's place, which says nothing about hardware.",
    "validity": "What the measurement is worth: valid, doubtful, invalid.",
    "moment": "before or after the run.",
    "status": "How runs ended: succeeded, failed, cancelled, unknown.",
    "format": "Model format: tflite, onnx, ….",
    "hostname": "Host name of the board.",
    "board": "The maker's name of the board.",
    "soc": "System on chip.",
    "architecture": "Machine as the kernel names it.",
    "os": "Operating system.",
    "kernel": "Kernel release.",
    "emulator": "Emulator or virtual machine underneath; empty: none was seen.",
    "version": "Version of the agent, the runtime or the collector.",
    "python": "Version of the Python that runs the collector.",
    "reason": "Why the collector refused a record.",
}
"""What each label means."""

METRICS: tuple[Metric, ...] = (
    # The latest succeeded result of each series.
    _of_series("boardbench_latency_seconds", "Latency of one inference at a percentile.", "percentile"),
    _of_series(
        "boardbench_latency_low_seconds",
        "Lower bound of the percentile's 95 % confidence interval.",
        "percentile",
    ),
    _of_series(
        "boardbench_latency_high_seconds",
        "Upper bound of the percentile's 95 % confidence interval.",
        "percentile",
    ),
    _of_series("boardbench_latency_mean_seconds", "Mean latency of one inference."),
    _of_series("boardbench_latency_min_seconds", "Latency of the fastest inference."),
    _of_series("boardbench_latency_max_seconds", "Latency of the slowest inference."),
    _of_series("boardbench_latency_stdev_seconds", "Sample standard deviation of the latency."),
    _of_series("boardbench_latency_samples", "Number of inferences that the latency figures rest on."),
    _of_series("boardbench_import_seconds", "Time to import the engine."),
    _of_series("boardbench_create_seconds", "Time to create the session or interpreter."),
    _of_series("boardbench_first_inference_seconds", "Time of the very first inference."),
    _of_series(
        "boardbench_memory_rss_bytes", "Resident memory of the worker at the end of a phase.", "phase"
    ),
    _of_series(
        "boardbench_memory_pss_bytes", "Proportional memory of the worker at the end of a phase.", "phase"
    ),
    _of_series(
        "boardbench_memory_peak_rss_bytes", "Highest resident memory of the worker within a phase.", "phase"
    ),
    _of_series(
        "boardbench_memory_run_peak_rss_bytes", "Highest resident memory of the worker over all phases."
    ),
    _of_series(
        "boardbench_memory_model_rss_bytes", "Resident memory that the model adds to the engine's own."
    ),
    _of_series(
        "boardbench_placement_known",
        "1 when it is known where the operations ran; 0: unknown, and boardbench_ops is absent.",
    ),
    _of_series("boardbench_ops", "Number of operations by the unit that ran them.", "unit"),
    _of_series(
        "boardbench_placement_info",
        "What is known about the placement, and by what evidence.",
        "verdict",
        "evidence",
        "standin",
        kind="info",
    ),
    _of_series(
        "boardbench_placement_drifts_total",
        "Times that operations were elsewhere than in the board's run before; absent while no placement was "
        "known.",
        kind="counter",
    ),
    _of_series(
        "boardbench_fallback_share_ratio",
        "Share of the time of an inference that operations on the CPU take; absent when not measured.",
    ),
    _of_series(
        "boardbench_fallback_share_low_ratio", "Lower bound of the fallback share's 95 % confidence interval."
    ),
    _of_series(
        "boardbench_fallback_share_high_ratio",
        "Upper bound of the fallback share's 95 % confidence interval.",
    ),
    _of_series("boardbench_fallback_seconds", "Time that operations on the CPU take in one inference."),
    _of_series(
        "boardbench_latency_without_fallback_seconds",
        "Median latency less the time of operations on the CPU: a lower bound of what can be reached.",
    ),
    _of_series("boardbench_crossings", "Times that one inference moves between the accelerator and the CPU."),
    _of_series(
        "boardbench_crossing_bytes", "Bytes that move between the accelerator and the CPU in one inference."
    ),
    _of_series("boardbench_result_timestamp_seconds", "When the run ended, by the board's clock."),
    _of_series(
        "boardbench_result_warnings", "Number of doubts that the result itself carries; notes left out."
    ),
    _of_series(
        "boardbench_result_validity_info",
        "What the measurement is worth; absent when the agent does not judge.",
        "validity",
        kind="info",
    ),
    _of_series(
        "boardbench_energy_per_inference_joules",
        "Energy of one inference, idle subtracted; absent without a power rail.",
    ),
    _of_series("boardbench_energy_per_inference_low_joules", "Lower bound of the energy of one inference."),
    _of_series("boardbench_energy_per_inference_high_joules", "Upper bound of the energy of one inference."),
    _of_series("boardbench_power_watts", "Mean power of the rail while it was measured, idle included."),
    _of_series("boardbench_idle_power_watts", "Mean power of the rail before the run."),
    _of_series(
        "boardbench_throughput_hertz", "Samples computed a second in the scenario; absent in single stream."
    ),
    _of_series("boardbench_throughput_low_hertz", "Lower bound of the throughput."),
    _of_series("boardbench_throughput_high_hertz", "Upper bound of the throughput."),
    _of_series("boardbench_deadline_misses", "Inferences of the run that ended after their deadline."),
    _of_series(
        "boardbench_sustained_slowdown_ratio",
        "Median at the end of a sustained run over the median of its first window.",
    ),
    _of_series(
        "boardbench_interference_ratio", "Median beside other models over the median of the model alone."
    ),
    _of_series(
        "boardbench_process_spread_ratio",
        "Half of the greatest difference between the medians of a run's processes, over their median.",
    ),
    _of_series(
        "boardbench_run_temperature_celsius", "Hottest thermal zone before and after the run.", "moment"
    ),
    _of_series("boardbench_run_cpu_frequency_hertz", "Mean processor frequency at the end of the run."),
    _of_series(
        "boardbench_result_standin",
        "1 when an emulator or stand-in had a part in the run: the figures say nothing about hardware.",
    ),
    _of_series("boardbench_model_size_bytes", "Length of the model file."),
    _of_series("boardbench_model_info", "What the model is.", "format", kind="info"),
    # Boards.
    Metric(
        "boardbench_runs_total",
        "counter",
        ("device", "status"),
        "Runs that were reported, by how they ended.",
    ),
    Metric(
        "boardbench_device_up", "gauge", ("device",), "1 while the board's stream to the collector is open."
    ),
    Metric(
        "boardbench_device_last_seen_timestamp_seconds",
        "gauge",
        ("device",),
        "When the board was last heard of, by the collector's clock.",
    ),
    Metric(
        "boardbench_device_running",
        "gauge",
        ("device",),
        "1 while the board measures, by its last heartbeat.",
    ),
    Metric(
        "boardbench_queued_runs", "gauge", ("device",), "Runs that wait on the board, by its last heartbeat."
    ),
    Metric(
        "boardbench_spool_pending",
        "gauge",
        ("device",),
        "Results on the board that are not acknowledged, by its last heartbeat.",
    ),
    Metric(
        "boardbench_spool_dropped_total",
        "counter",
        ("device",),
        "Results that the board had to drop, by its last heartbeat.",
    ),
    Metric(
        "boardbench_device_info",
        "info",
        ("device", "hostname", "board", "soc", "architecture", "os", "kernel", "emulator"),
        "What the board is.",
    ),
    Metric("boardbench_device_cpus", "gauge", ("device",), "Logical processors of the board."),
    Metric("boardbench_device_memory_bytes", "gauge", ("device",), "Physical memory of the board."),
    Metric("boardbench_agent_info", "info", ("device", "version"), "Version of the board's agent."),
    Metric(
        "boardbench_runtime_available",
        "gauge",
        ("device", "runtime"),
        "1 when the runtime can run a model on the board, 0 when it can't.",
    ),
    Metric(
        "boardbench_runtime_info",
        "info",
        ("device", "runtime", "version"),
        "Version of a runtime that the board has.",
    ),
    Metric(
        "boardbench_device_results_left_out",
        "gauge",
        ("device",),
        "Latest results of the board that are not shown because it has too many series.",
    ),
    # The collector itself.
    Metric("boardbench_collector_build_info", "info", ("version", "python"), "What this collector is."),
    Metric("boardbench_collector_open_streams", "gauge", (), "Boards that are connected."),
    Metric("boardbench_collector_streams_total", "counter", (), "Streams that boards have opened."),
    Metric(
        "boardbench_collector_streams_superseded_total",
        "counter",
        (),
        "Streams that ended because the same board opened another.",
    ),
    Metric(
        "boardbench_collector_streams_silent_total",
        "counter",
        (),
        "Streams that ended because nothing was heard any more.",
    ),
    Metric("boardbench_collector_results_stored_total", "counter", (), "Results that were stored."),
    Metric(
        "boardbench_collector_results_duplicate_total",
        "counter",
        (),
        "Results that came again and were not stored twice.",
    ),
    Metric(
        "boardbench_collector_results_refused_total",
        "counter",
        ("reason",),
        "Results that can never be stored.",
    ),
    Metric(
        "boardbench_collector_store_failures_total",
        "counter",
        (),
        "Results whose commit failed; their boards send them again.",
    ),
    Metric(
        "boardbench_collector_scrape_duration_seconds",
        "gauge",
        (),
        "Time that this scrape took to read the store and make the series.",
    ),
)
"""Every metric of boardbench's own; prometheus_client's process metrics (``process_…``) come with them."""


class FleetCollector(Collector):
    """Makes the families of one snapshot; registered for one scrape."""

    def __init__(
        self,
        snapshot: Snapshot,
        *,
        version: str,
        series_ttl_seconds: float,
        series_per_device: int,
        seconds_before: float = 0.0,
        python: str | None = None,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._snapshot = snapshot
        self._version = version
        self._python = python or platform.python_version()
        self._series_ttl_seconds = series_ttl_seconds
        self._series_per_device = series_per_device
        self._seconds_before = seconds_before
        self._monotonic = monotonic

    def collect(self) -> Iterable[Family]:
        """Returns the families that have series, in the order of :data:`METRICS`."""
        began = self._monotonic()
        page = _Page()
        snapshot = self._snapshot
        present = {
            view.device_id
            for view in snapshot.devices
            if view.up or snapshot.at - view.last_seen_at <= self._series_ttl_seconds
        }
        left_out = {device_id: snapshot.latest.left_out.get(device_id, 0) for device_id in present}
        series: dict[str, int] = {}
        shown: set[tuple[str, ...]] = set()
        for latest in snapshot.latest.results:
            if latest.device_id not in present:
                continue
            base = _base_labels(latest)
            if base in shown:
                continue
            shown.add(base)
            more = tuple(_result_samples(latest, base))
            count = series.get(latest.device_id, 0) + len(more)
            if count > self._series_per_device:
                left_out[latest.device_id] += 1
                continue
            series[latest.device_id] = count
            for name, labels, value in more:
                page.add(name, labels, value)
        for view in snapshot.devices:
            if view.device_id in present:
                for name, labels, value in _device_samples(view):
                    page.add(name, labels, value)
                page.add(
                    "boardbench_device_results_left_out",
                    (_label(view.device_id),),
                    left_out[view.device_id],
                )
        for outcomes in snapshot.outcomes:
            if outcomes.device_id in present:
                page.add(
                    "boardbench_runs_total",
                    (_label(outcomes.device_id), _enum_label(result_pb2.RunStatus, outcomes.status)),
                    outcomes.total,
                )
        for name, labels, value in _collector_samples(snapshot, self._version, self._python):
            page.add(name, labels, value)
        page.add(
            "boardbench_collector_scrape_duration_seconds",
            (),
            self._seconds_before + self._monotonic() - began,
        )
        return page.families()


def render(collectors: Iterable[Collector], accept: str) -> tuple[bytes, str]:
    """Returns (body, content type) in the format that the scraper's Accept header asks for."""
    registry = CollectorRegistry()
    for collector in collectors:
        registry.register(collector)
    encode, content_type = choose_encoder(accept)
    return encode(registry), content_type


def process_collector() -> Collector:
    """Returns the collector of the process's own metrics (``process_…``)."""
    return ProcessCollector(registry=None)


_Sample = tuple[str, tuple[str, ...], float]


class _Page:
    """The series of one scrape; of two with the same labels the first stays, as Prometheus refuses both."""

    def __init__(self) -> None:
        self._series: dict[str, dict[tuple[str, ...], float]] = {}

    def add(self, name: str, labels: tuple[str, ...], value: float) -> None:
        """Adds a series unless its value is no number."""
        if math.isfinite(value):
            self._series.setdefault(name, {}).setdefault(labels, value)

    def families(self) -> Iterator[Family]:
        """Returns the families that have series, in the order of the table."""
        for metric in METRICS:
            series = self._series.get(metric.name)
            if not series:
                continue
            suffix = {"counter": "_total", "info": "_info"}.get(metric.kind, "")
            family = Family(metric.name.removesuffix(suffix), metric.meaning, metric.kind)
            for labels, value in series.items():
                family.add_sample(metric.name, dict(zip(metric.labels, labels, strict=True)), value)
            yield family


def _base_labels(latest: LatestResult) -> tuple[str, ...]:
    """Returns the values of the labels that every series of a result has."""
    series = series_of(latest.result)
    values = (
        latest.device_id,
        series.model_name,
        series.model_sha256[:SHORT_HASH_DIGITS],
        series.runtime,
        series.target,
        series.threads,
        series.variant,
    )
    return tuple(_label(value) for value in values)


def _result_samples(latest: LatestResult, base: tuple[str, ...]) -> Iterator[_Sample]:
    """Returns the series of one finished measurement; what is not known has none."""
    result = latest.result
    if result.HasField("latency") and result.latency.count:
        latency = result.latency
        shown: set[str] = set()
        for percentile in latency.percentiles:
            which = f"{percentile.percentile:.6g}"
            if which in shown or len(shown) == MAX_PERCENTILES:
                continue
            shown.add(which)
            yield "boardbench_latency_seconds", (*base, which), percentile.seconds
            yield "boardbench_latency_low_seconds", (*base, which), percentile.low_seconds
            yield "boardbench_latency_high_seconds", (*base, which), percentile.high_seconds
        yield "boardbench_latency_mean_seconds", base, latency.mean_seconds
        yield "boardbench_latency_min_seconds", base, latency.min_seconds
        yield "boardbench_latency_max_seconds", base, latency.max_seconds
        if latency.HasField("stdev_seconds"):
            yield "boardbench_latency_stdev_seconds", base, latency.stdev_seconds
        yield "boardbench_latency_samples", base, latency.count
    for name in ("import_seconds", "create_seconds", "first_inference_seconds"):
        if result.HasField(name):
            yield f"boardbench_{name}", base, getattr(result, name)
    yield from _memory_samples(result.memory, base)
    yield from _placement_samples(result.placement, base)
    yield from _cost_samples(result.placement, base)
    if latest.drifts is not None:
        yield "boardbench_placement_drifts_total", base, latest.drifts
    if result.HasField("finished_at"):
        time_seconds = result.finished_at.seconds + result.finished_at.nanos / 1e9
        yield "boardbench_result_timestamp_seconds", base, time_seconds
    doubts = [warning for warning in result.warnings if warning.severity != result_pb2.SEVERITY_NOTE]
    yield "boardbench_result_warnings", base, len(doubts)
    yield from _trust_samples(result, base)
    yield "boardbench_result_standin", base, _has_standin(result)
    if result.model.size_bytes > 0:
        yield "boardbench_model_size_bytes", base, result.model.size_bytes
    yield "boardbench_model_info", (*base, _label(result.model.format)), 1


def _trust_samples(result: result_pb2.RunResult, base: tuple[str, ...]) -> Iterator[_Sample]:
    """Returns what the measurement is worth, and what energy, scenario and surroundings add."""
    if result.validity:
        yield (
            "boardbench_result_validity_info",
            (*base, _enum_label(result_pb2.Validity, result.validity)),
            1,
        )
    fields: tuple[tuple[Message, str, str], ...] = (
        (result.energy, "energy_per_inference_joules", "energy_per_inference_joules"),
        (result.energy, "energy_per_inference_low_joules", "energy_per_inference_low_joules"),
        (result.energy, "energy_per_inference_high_joules", "energy_per_inference_high_joules"),
        (result.energy, "mean_watts", "power_watts"),
        (result.energy, "idle_watts", "idle_power_watts"),
        (result.scenario, "throughput_hertz", "throughput_hertz"),
        (result.scenario, "throughput_low_hertz", "throughput_low_hertz"),
        (result.scenario, "throughput_high_hertz", "throughput_high_hertz"),
        (result.scenario, "deadline_misses", "deadline_misses"),
        (result.scenario, "slowdown_ratio", "sustained_slowdown_ratio"),
        (result.interference, "slowdown_ratio", "interference_ratio"),
        (result.processes, "spread_ratio", "process_spread_ratio"),
        (result.environment, "cpu_frequency_hertz", "run_cpu_frequency_hertz"),
    )
    for message, field, name in fields:
        if message.HasField(field):
            yield f"boardbench_{name}", base, getattr(message, field)
    environment: Message = result.environment
    for moment in ("before", "after"):
        field = f"temperature_{moment}_celsius"
        if environment.HasField(field):
            yield "boardbench_run_temperature_celsius", (*base, moment), getattr(environment, field)


def _memory_samples(memory: result_pb2.Memory, base: tuple[str, ...]) -> Iterator[_Sample]:
    shown: set[str] = set()
    for phase in memory.phases:
        which = _enum_label(result_pb2.MemoryPhase, phase.phase)
        if which in shown:
            continue
        shown.add(which)
        for name in ("rss_bytes", "pss_bytes", "peak_rss_bytes"):
            if phase.HasField(name):
                yield f"boardbench_memory_{name}", (*base, which), getattr(phase, name)
    if memory.HasField("peak_rss_bytes"):
        yield "boardbench_memory_run_peak_rss_bytes", base, memory.peak_rss_bytes
    if memory.HasField("model_rss_bytes"):
        yield "boardbench_memory_model_rss_bytes", base, memory.model_rss_bytes


def _placement_samples(placement: placement_pb2.Placement, base: tuple[str, ...]) -> Iterator[_Sample]:
    ops: dict[str, int] = {}
    if placement.evidence != placement_pb2.EVIDENCE_UNSPECIFIED:
        for count in placement.units:
            unit = _enum_label(placement_pb2.Unit, count.unit)
            ops[unit] = ops.get(unit, 0) + count.ops
    known = any(unit != "unknown" for unit in ops)
    yield "boardbench_placement_known", base, known
    if known:
        for unit, total in ops.items():
            yield "boardbench_ops", (*base, unit), total
    if not (placement.evidence or placement.verdict):
        return
    yield (
        "boardbench_placement_info",
        (
            *base,
            _enum_label(placement_pb2.PlacementVerdict, placement.verdict),
            _enum_label(placement_pb2.Evidence, placement.evidence),
            "true" if placement.standin else "false",
        ),
        1,
    )


def _cost_samples(placement: placement_pb2.Placement, base: tuple[str, ...]) -> Iterator[_Sample]:
    if placement.HasField("fallback_cost"):
        cost = placement.fallback_cost
        yield "boardbench_fallback_share_ratio", base, cost.share
        yield "boardbench_fallback_share_low_ratio", base, cost.share_low
        yield "boardbench_fallback_share_high_ratio", base, cost.share_high
        yield "boardbench_fallback_seconds", base, cost.seconds
        yield "boardbench_latency_without_fallback_seconds", base, cost.latency_without_seconds
    if placement.HasField("crossings"):
        yield "boardbench_crossings", base, placement.crossings.count
        if placement.crossings.HasField("bytes"):
            yield "boardbench_crossing_bytes", base, placement.crossings.bytes


def _has_standin(result: result_pb2.RunResult) -> bool:
    return bool(result.standins) or result.placement.standin or result.accelerator.standin


def _device_samples(view: DeviceView) -> Iterator[_Sample]:
    hello: collector_pb2.Hello = view.hello
    board = hello.board
    device = (_label(board.device_id),)
    yield "boardbench_device_up", device, view.up
    yield "boardbench_device_last_seen_timestamp_seconds", device, view.last_seen_at
    if view.heartbeat is not None:
        # A board that is gone neither measures nor queues; what its spool held, it still holds.
        if view.up:
            yield "boardbench_device_running", device, bool(view.heartbeat.running_run_id)
            yield "boardbench_queued_runs", device, view.heartbeat.queued_runs
        yield "boardbench_spool_pending", device, view.heartbeat.spool_pending
        yield "boardbench_spool_dropped_total", device, view.heartbeat.spool_dropped
    facts = (
        board.hostname,
        board.model,
        board.soc,
        board.architecture,
        board.os,
        board.kernel,
        board.emulator,
    )
    yield "boardbench_device_info", (*device, *(_label(fact) for fact in facts)), 1
    if board.cpu_count:
        yield "boardbench_device_cpus", device, board.cpu_count
    if board.memory_bytes > 0:
        yield "boardbench_device_memory_bytes", device, board.memory_bytes
    yield "boardbench_agent_info", (*device, _label(hello.agent_version)), 1
    for runtime in hello.runtimes:
        name = _label(runtime.name)
        yield "boardbench_runtime_available", (*device, name), runtime.available
        if runtime.available:
            yield "boardbench_runtime_info", (*device, name, _label(runtime.version)), 1


def _collector_samples(snapshot: Snapshot, version: str, python: str) -> Iterator[_Sample]:
    tally = snapshot.tally
    yield "boardbench_collector_build_info", (version, python), 1
    yield "boardbench_collector_open_streams", (), snapshot.open_streams
    yield "boardbench_collector_streams_total", (), tally.streams
    yield "boardbench_collector_streams_superseded_total", (), tally.superseded
    yield "boardbench_collector_streams_silent_total", (), tally.silent
    yield "boardbench_collector_results_stored_total", (), tally.stored
    yield "boardbench_collector_results_duplicate_total", (), tally.duplicates
    for reason, count in sorted(tally.refused.items()):
        yield "boardbench_collector_results_refused_total", (reason,), count
    yield "boardbench_collector_store_failures_total", (), tally.store_failures


def _label(text: str) -> str:
    """Returns the text as a label value: printable, bounded, and still unlike every other."""
    if text.isprintable() and len(text) <= MAX_LABEL_LENGTH:
        return text
    clean = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{clean[: MAX_LABEL_LENGTH - 9]}~{digest}"


def _enum_label(enum: object, value: int) -> str:
    """Returns a proto enum's value as a label: "succeeded" for RUN_STATUS_SUCCEEDED, "unknown" if it is."""
    descriptor = enum.DESCRIPTOR  # type: ignore[attr-defined]
    entry = descriptor.values_by_number.get(value)
    if entry is None or not value:
        return "unknown"
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(entry.name.removeprefix(prefix).lower())
