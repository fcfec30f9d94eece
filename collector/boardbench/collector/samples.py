"""What boards, results and the collector itself say, as samples of the metrics in the table.

What a board says is a stranger's text: label values are cut to a bounded length without control characters,
no combination of labels is shown twice, and a board has a bounded number of series. What is cut, refused and
left out is counted.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from google.protobuf.message import Message

from boardbench.collector.fleet import Durations
from boardbench.collector.histogram import BOUNDS_SECONDS, Distribution
from boardbench.collector.look import DeviceView, Snapshot
from boardbench.collector.metrics import SHORT_HASH_DIGITS
from boardbench.collector.store import LatestResult, Series, series_of
from boardbench.v1 import collector_pb2, placement_pb2, result_pb2, telemetry_pb2

MAX_LABEL_LENGTH = 128
"""Longest label value in characters; what is longer is cut and told apart by a digest."""

MAX_PERCENTILES = 32
"""Percentiles of one result that are shown: the agent reports about ten."""

MAX_READINGS = 128
"""Readings of one board that are shown: the largest boards have some sixty sensors."""

Sample = tuple[str, tuple[str, ...], float]
"""Name, values of the labels behind those that all samples of the group share, value."""


@dataclass
class Group:
    """Samples that share their first labels."""

    labels: tuple[str, ...]
    """Values of the shared labels."""
    samples: list[Sample] = field(default_factory=list)
    distribution: Distribution | None = None
    duplicates: int = 0
    """Samples that have the labels of another and were not taken."""
    left_out: int = 0
    """Samples that were too many and were not taken."""
    cut: int = 0
    """Texts that were cut."""


class _Texts:
    """Makes label values and counts what it had to cut."""

    def __init__(self) -> None:
        self.cut = 0

    def __call__(self, text: str) -> str:
        shown = label(text)
        self.cut += shown != text
        return shown


def label(text: str) -> str:
    """Returns the text as a label value: printable, bounded, and still unlike every other."""
    if text.isprintable() and len(text) <= MAX_LABEL_LENGTH:
        return text
    clean = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{clean[: MAX_LABEL_LENGTH - 9]}~{digest}"


def enum_label(enum: object, value: int) -> str:
    """Returns a proto enum's value as a label: "succeeded" for RUN_STATUS_SUCCEEDED, "unknown" if it is."""
    descriptor = enum.DESCRIPTOR  # type: ignore[attr-defined]
    entry = descriptor.values_by_number.get(value)
    if entry is None or not value:
        return "unknown"
    prefix = descriptor.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(entry.name.removeprefix(prefix).lower())


def _collect(group: Group, samples: Iterable[Sample], texts: _Texts) -> Group:
    """Fills the group: of two samples with the same labels the first stays, as Prometheus refuses both."""
    shown: set[tuple[str, tuple[str, ...]]] = set()
    for sample in samples:
        key = sample[:2]
        if key in shown:
            group.duplicates += 1
        elif math.isfinite(sample[2]):
            shown.add(key)
            group.samples.append(sample)
    group.cut += texts.cut
    return group


# Results.


def result_labels(device_id: str, series: Series) -> tuple[tuple[str, ...], int]:
    """Returns the values of the labels that every sample of a result has, and how many had to be cut."""
    texts = _Texts()
    values = (
        device_id,
        series.model_name,
        series.model_sha256[:SHORT_HASH_DIGITS],
        series.runtime,
        series.target,
        series.threads,
        series.variant,
    )
    return tuple(texts(value) for value in values), texts.cut


def result_group(latest: LatestResult, distribution: Distribution | None) -> Group:
    """Returns the samples of one finished measurement; what is not known has none."""
    labels, cut = result_labels(latest.device_id, series_of(latest.result))
    group = Group(labels, distribution=distribution, cut=cut)
    texts = _Texts()
    return _collect(group, _result_samples(latest, distribution, texts), texts)


def _result_samples(latest: LatestResult, shape: Distribution | None, texts: _Texts) -> Iterator[Sample]:
    result = latest.result
    if result.HasField("latency") and result.latency.count:
        latency = result.latency
        shown: set[str] = set()
        for percentile in latency.percentiles:
            which = f"{percentile.percentile:.6g}"
            if which in shown or len(shown) == MAX_PERCENTILES:
                continue
            shown.add(which)
            yield "boardbench_latency_seconds", (which,), percentile.seconds
            yield "boardbench_latency_low_seconds", (which,), percentile.low_seconds
            yield "boardbench_latency_high_seconds", (which,), percentile.high_seconds
        yield "boardbench_latency_mean_seconds", (), latency.mean_seconds
        yield "boardbench_latency_min_seconds", (), latency.min_seconds
        yield "boardbench_latency_max_seconds", (), latency.max_seconds
        if latency.HasField("stdev_seconds"):
            yield "boardbench_latency_stdev_seconds", (), latency.stdev_seconds
        yield "boardbench_latency_samples", (), latency.count
    if shape is not None:
        yield from _distribution_samples(
            "boardbench_latency_distribution_seconds", shape.cumulative, shape.count, shape.sum_seconds
        )
    # What an earlier load left makes this one another quantity, and the inference that ends it.
    cached = "_from_cache" if any(cache.warm for cache in result.caches) else ""
    for name, suffix in (("import", ""), ("create", cached), ("first_inference", cached)):
        if result.HasField(f"{name}_seconds"):  # type: ignore[arg-type]
            yield f"boardbench_{name}{suffix}_seconds", (), getattr(result, f"{name}_seconds")
    yield from _memory_samples(result.memory)
    yield from _placement_samples(result.placement)
    yield from _cost_samples(result.placement)
    if latest.drifts is not None:
        yield "boardbench_placement_drifts_total", (), latest.drifts
    if result.HasField("finished_at"):
        time_seconds = result.finished_at.seconds + result.finished_at.nanos / 1e9
        yield "boardbench_result_timestamp_seconds", (), time_seconds
    doubts = sum(warning.severity != result_pb2.SEVERITY_NOTE for warning in result.warnings)
    yield "boardbench_result_warnings", (), doubts
    yield "boardbench_result_validity_info", (enum_label(result_pb2.Validity, result.validity),), 1
    yield from _surroundings_samples(result)
    yield "boardbench_result_standin", (), int(_has_standin(result))
    if result.model.size_bytes > 0:
        yield "boardbench_model_size_bytes", (), result.model.size_bytes
    yield "boardbench_model_info", (texts(result.model.format),), 1


_LE = tuple(f"{bound:g}" if bound != int(bound) else f"{bound:.1f}" for bound in BOUNDS_SECONDS)


def _distribution_samples(
    name: str, cumulative: Iterable[int], count: int, total: float, les: Iterable[str] = _LE
) -> Iterator[Sample]:
    """Returns the classic buckets, in their order, with sum and count."""
    for le, below in zip(les, cumulative, strict=True):
        yield f"{name}_bucket", (le,), below
    yield f"{name}_bucket", ("+Inf",), count
    yield f"{name}_sum", (), total
    yield f"{name}_count", (), count


def _surroundings_samples(result: result_pb2.RunResult) -> Iterator[Sample]:
    """Returns what energy, scenario and surroundings add."""
    fields: tuple[tuple[Message, str, str], ...] = (
        (result.energy, "energy_per_inference_joules", "boardbench_energy_per_inference_joules"),
        (result.energy, "energy_per_inference_low_joules", "boardbench_energy_per_inference_low_joules"),
        (result.energy, "energy_per_inference_high_joules", "boardbench_energy_per_inference_high_joules"),
        (result.energy, "mean_watts", "boardbench_power_watts"),
        (result.energy, "idle_watts", "boardbench_idle_power_watts"),
        (result.scenario, "throughput_hertz", "boardbench_throughput_hertz"),
        (result.scenario, "throughput_low_hertz", "boardbench_throughput_low_hertz"),
        (result.scenario, "throughput_high_hertz", "boardbench_throughput_high_hertz"),
        (result.scenario, "deadline_misses", "boardbench_deadline_misses"),
        (result.scenario, "slowdown_ratio", "boardbench_sustained_slowdown_ratio"),
        (result.interference, "slowdown_ratio", "boardbench_interference_ratio"),
        (result.processes, "spread_ratio", "boardbench_process_spread_ratio"),
        (result.environment, "cpu_frequency_hertz", "boardbench_run_cpu_frequency_hertz"),
        (result.environment, "cpu_frequency_least_hertz", "boardbench_run_cpu_frequency_least_hertz"),
    )
    for message, name, metric in fields:
        if message.HasField(name):
            yield metric, (), getattr(message, name)
    environment = result.environment
    for moment in ("before", "after"):
        name = f"temperature_{moment}_celsius"
        if environment.HasField(name):  # type: ignore[arg-type]
            yield "boardbench_run_temperature_celsius", (moment,), getattr(environment, name)
    if environment.throttled_during or environment.throttling_readable:
        yield "boardbench_run_throttled", (), int(bool(environment.throttled_during))


def _memory_samples(memory: result_pb2.Memory) -> Iterator[Sample]:
    shown: set[str] = set()
    for phase in memory.phases:
        which = enum_label(result_pb2.MemoryPhase, phase.phase)
        if which in shown:
            continue
        shown.add(which)
        for name in ("rss_bytes", "pss_bytes", "peak_rss_bytes"):
            if phase.HasField(name):
                yield f"boardbench_memory_{name}", (which,), getattr(phase, name)
    if memory.HasField("peak_rss_bytes"):
        yield "boardbench_memory_run_peak_rss_bytes", (), memory.peak_rss_bytes
    if memory.HasField("model_rss_bytes"):
        yield "boardbench_memory_model_rss_bytes", (), memory.model_rss_bytes


def _placement_samples(placement: placement_pb2.Placement) -> Iterator[Sample]:
    ops: dict[str, int] = {}
    if placement.evidence != placement_pb2.EVIDENCE_UNSPECIFIED:
        for count in placement.units:
            unit = enum_label(placement_pb2.Unit, count.unit)
            ops[unit] = ops.get(unit, 0) + count.ops
    known = any(unit != "unknown" for unit in ops)
    yield "boardbench_placement_known", (), int(known)
    if known:
        for unit, total in ops.items():
            yield "boardbench_ops", (unit,), total
    if placement.evidence or placement.verdict:
        facts = (
            enum_label(placement_pb2.PlacementVerdict, placement.verdict),
            enum_label(placement_pb2.Evidence, placement.evidence),
            "true" if placement.standin else "false",
        )
        yield "boardbench_placement_info", facts, 1


def _cost_samples(placement: placement_pb2.Placement) -> Iterator[Sample]:
    if placement.HasField("fallback_cost"):
        cost = placement.fallback_cost
        yield "boardbench_fallback_share_ratio", (), cost.share
        yield "boardbench_fallback_share_low_ratio", (), cost.share_low
        yield "boardbench_fallback_share_high_ratio", (), cost.share_high
        yield "boardbench_fallback_seconds", (), cost.seconds
        yield "boardbench_latency_without_fallback_seconds", (), cost.latency_without_seconds
    if placement.HasField("crossings"):
        yield "boardbench_crossings", (), placement.crossings.count
        if placement.crossings.HasField("bytes"):
            yield "boardbench_crossing_bytes", (), placement.crossings.bytes


def _has_standin(result: result_pb2.RunResult) -> bool:
    return bool(result.standins) or result.placement.standin or result.accelerator.standin


# Boards.


def board_group(hello: collector_pb2.Hello) -> Group:
    """Returns what a board says about itself once."""
    texts = _Texts()
    board = hello.board
    group = Group((label(board.device_id),))

    def samples() -> Iterator[Sample]:
        facts = (
            board.hostname,
            board.model,
            board.soc,
            board.architecture,
            board.os,
            board.kernel,
            board.emulator,
        )
        yield "boardbench_device_info", tuple(texts(fact) for fact in facts), 1
        if board.cpu_count:
            yield "boardbench_device_cpus", (), board.cpu_count
        if board.memory_bytes > 0:
            yield "boardbench_device_memory_bytes", (), board.memory_bytes
        yield "boardbench_agent_info", (texts(hello.agent_version),), 1
        for runtime in hello.runtimes:
            name = texts(runtime.name)
            yield "boardbench_runtime_available", (name,), int(runtime.available)
            if runtime.available:
                yield "boardbench_runtime_info", (name, texts(runtime.version)), 1

    return _collect(group, samples(), texts)


@dataclass(frozen=True)
class LeftOut:
    """What of a board is not shown."""

    results: int = 0
    duplicates: int = 0
    series: int = 0
    cut: int = 0


def state_group(view: DeviceView, runs: Iterable[tuple[int, int]], left_out: LeftOut) -> Group:
    """Returns what changes on a board while nothing is measured; ``runs`` are (status, total)."""
    texts = _Texts()
    group = Group((label(view.device_id),))
    refused = {"duplicate": left_out.duplicates, "limit": left_out.series}

    def samples() -> Iterator[Sample]:
        yield "boardbench_device_up", (), int(view.up)
        yield "boardbench_device_last_seen_timestamp_seconds", (), view.last_seen_at
        if view.clock_offset_seconds is not None:
            yield "boardbench_device_clock_offset_seconds", (), view.clock_offset_seconds
        for status, total in runs:
            yield "boardbench_runs_total", (enum_label(result_pb2.RunStatus, status),), total
        if view.heartbeat is not None:
            # A board that is gone neither measures nor queues, nor is it warm; its spool holds what it held.
            if view.up:
                yield "boardbench_device_running", (), int(bool(view.heartbeat.running_run_id))
                yield "boardbench_queued_runs", (), view.heartbeat.queued_runs
                readings = view.heartbeat.readings[:MAX_READINGS]
                refused["limit"] += len(view.heartbeat.readings) - len(readings)
                yield from reading_samples(readings, texts)
            yield "boardbench_spool_pending", (), view.heartbeat.spool_pending
            yield "boardbench_spool_dropped_total", (), view.heartbeat.spool_dropped
            if view.heartbeat.HasField("spool_bytes"):
                yield "boardbench_spool_bytes", (), view.heartbeat.spool_bytes
        yield "boardbench_device_results_left_out", (), left_out.results

    _collect(group, samples(), texts)
    refused["duplicate"] += group.duplicates
    group.samples += [
        ("boardbench_device_series_left_out", (reason,), count) for reason, count in refused.items()
    ]
    group.samples.append(("boardbench_device_labels_cut", (), left_out.cut + texts.cut))
    return group


_READINGS = {
    "temperature_celsius": "boardbench_device_temperature_celsius",
    "frequency_hertz": "boardbench_device_frequency_hertz",
    "frequency_limit_hertz": "boardbench_device_frequency_limit_hertz",
    "power_watts": "boardbench_device_power_watts",
    "busy_ratio": "boardbench_device_busy_ratio",
    "throttle_events": "boardbench_device_throttle_events_total",
    "over_current_events": "boardbench_device_throttle_events_total",
}
"""What is shown of what sensors say, by the quantity."""

_CAUSE = "_now"
"""Ends the quantities that are 1 while something throttles the board: ``undervoltage_now``."""


def reading_samples(
    readings: Iterable[telemetry_pb2.Reading], texts: _Texts | None = None
) -> Iterator[Sample]:
    """Returns what sensors say now."""
    texts = texts or _Texts()
    for reading in readings:
        metric = _READINGS.get(reading.quantity)
        if metric is not None:
            yield metric, (texts(reading.source),), reading.value
        elif reading.quantity.endswith(_CAUSE):
            cause = reading.quantity.removesuffix(_CAUSE)
            yield (
                "boardbench_device_throttled",
                (texts(reading.source), texts(cause)),
                int(reading.value != 0),
            )


# The collector itself.


def collector_group(snapshot: Snapshot, version: str, python: str) -> Group:
    """Returns what the collector says about itself."""
    texts = _Texts()

    def samples() -> Iterator[Sample]:
        tally = snapshot.tally
        yield "boardbench_collector_build_info", (version, python), 1
        yield "boardbench_collector_open_streams", (), snapshot.open_streams
        yield "boardbench_collector_streams_total", (), tally.streams
        yield "boardbench_collector_streams_superseded_total", (), tally.superseded
        yield "boardbench_collector_streams_silent_total", (), tally.silent
        yield "boardbench_collector_identity_conflicts_total", (), tally.identity_conflicts
        yield "boardbench_collector_spool_renewals_total", (), tally.renewals
        yield "boardbench_collector_results_stored_total", (), tally.stored
        yield "boardbench_collector_results_duplicate_total", (), tally.duplicates
        for reason, count in sorted(tally.refused.items()):
            yield "boardbench_collector_results_refused_total", (reason,), count
        yield "boardbench_collector_store_failures_total", (), tally.store_failures
        yield from _durations("boardbench_collector_acknowledge_seconds", tally.acknowledge)
        if snapshot.queue is not None:
            queue = snapshot.queue
            for state, count in queue.jobs.items():
                yield "boardbench_jobs", (state,), count
            yield "boardbench_job_oldest_waiting_seconds", (), queue.oldest_waiting_seconds
            yield "boardbench_job_leases_expired_total", (), queue.leases_expired
            yield "boardbench_jobs_dead_total", (), queue.dead
            yield "boardbench_collector_files_bytes", (), queue.files_bytes
        if snapshot.retention is not None:
            kept = snapshot.retention
            yield "boardbench_collector_results_thinned_total", (), kept.results_thinned
            yield "boardbench_collector_results_removed_total", (), kept.results_removed
            yield "boardbench_collector_samples_dropped_total", (), kept.samples_dropped
            yield "boardbench_collector_removed_bytes_total", (), kept.bytes_removed
        if snapshot.certificate_ends_at is not None:
            yield (
                "boardbench_collector_certificate_expiry_timestamp_seconds",
                (),
                snapshot.certificate_ends_at,
            )
        for forwarded in snapshot.forwarded:
            receiver = texts(forwarded.receiver)
            yield "boardbench_collector_forwarded_samples_total", (receiver,), forwarded.samples
            for reason, count in sorted(forwarded.dropped.items()):
                yield "boardbench_collector_forward_dropped_samples_total", (receiver, reason), count
            yield "boardbench_collector_forward_retries_total", (receiver,), forwarded.retries
            yield "boardbench_collector_forward_pending_results", (receiver,), forwarded.pending
            if forwarded.up is not None:
                yield "boardbench_collector_forward_up", (receiver,), int(forwarded.up)

    return _collect(Group(()), samples(), texts)


def _durations(name: str, durations: Durations) -> Iterator[Sample]:
    les = tuple(f"{bound:g}" if bound != int(bound) else f"{bound:.1f}" for bound in durations.bounds)
    return _distribution_samples(name, durations.cumulative(), durations.count, durations.total, les)
