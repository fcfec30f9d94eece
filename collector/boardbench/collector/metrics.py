"""The one table of metrics: names, kinds, labels and meanings.

Everything under ``/metrics`` is made from it, so nothing that it does not list can be exposed; the
documentation is generated from it, and a test compares it with reality.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

SHORT_HASH_DIGITS = 12
"""Digits of the model's SHA-256 in labels: 48 bits tell apart all the models that a lab will ever have."""

SERIES_LABELS = ("device", "model", "model_sha256", "runtime", "target", "threads", "variant")
"""What tells the figures of one model on one board from all others."""


@dataclass(frozen=True)
class Metric:
    """One line of the table of metrics."""

    name: str
    """As it is in the exposition, with ``_total`` or ``_info``."""
    kind: str
    """"gauge", "counter", "info" (a gauge that is always 1) or "histogram" (with ``_bucket`` and so on)."""
    labels: tuple[str, ...]
    """Without the ``le`` of a histogram's buckets."""
    meaning: str

    @property
    def samples(self) -> tuple[str, ...]:
        """Names that its samples have."""
        if self.kind == "histogram":
            return tuple(self.name + suffix for suffix in ("_bucket", "_sum", "_count"))
        return (self.name,)

    @property
    def base_name(self) -> str:
        """The name without what its kind appends, as OpenMetrics names the family."""
        return self.name.removesuffix({"counter": "_total", "info": "_info"}.get(self.kind, ""))


def _of_series(name: str, meaning: str, *labels: str, kind: str = "gauge") -> Metric:
    return Metric(name, kind, (*SERIES_LABELS, *labels), meaning)


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
    "validity": "What the measurement is worth: valid, doubtful, invalid; unknown: the agent does not judge.",
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
    "reason": "Why something was refused or left out.",
    "source": "What a sensor reads: a thermal zone, a processor, a rail, ….",
    "cause": "What throttles: throttled, undervoltage, frequency_capped, power_capped, ….",
    "state": "Where a job is: queued, leased, running, done, cancelled, dead.",
    "receiver": "Host and port that results are sent on to; by OTLP, and whether traces or metrics.",
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
    _of_series(
        "boardbench_latency_distribution_seconds",
        "Latencies of the counted inferences of the latest run alone: use it without rate(). A native"
        " histogram of schema 5 where Prometheus asks for one.",
        kind="histogram",
    ),
    _of_series("boardbench_import_seconds", "Time to import the engine."),
    _of_series("boardbench_create_seconds", "Time to create the session or interpreter."),
    _of_series("boardbench_first_inference_seconds", "Time of the very first inference."),
    _of_series(
        "boardbench_create_from_cache_seconds",
        "Time to create the session or interpreter, in the place of boardbench_create_seconds, where the "
        "engine found what an earlier load had left.",
    ),
    _of_series(
        "boardbench_first_inference_from_cache_seconds",
        "Time of the very first inference after such a load.",
    ),
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
        "What the measurement is worth.",
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
        "boardbench_run_cpu_frequency_least_hertz", "Least mean processor frequency while it was measured."
    ),
    _of_series(
        "boardbench_run_throttled",
        "1 when something throttled the board while it was measured; absent where the board can't tell.",
    ),
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
        "boardbench_device_clock_offset_seconds",
        "gauge",
        ("device",),
        "The board's clock less the collector's, the way of the message included; absent while it is gone.",
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
        "boardbench_spool_bytes", "gauge", ("device",), "Bytes of the board's spool, by its last heartbeat."
    ),
    Metric(
        "boardbench_device_temperature_celsius",
        "gauge",
        ("device", "source"),
        "Temperature now, at rest or while it measures; absent while the board is gone.",
    ),
    Metric("boardbench_device_frequency_hertz", "gauge", ("device", "source"), "Clock now."),
    Metric(
        "boardbench_device_frequency_limit_hertz",
        "gauge",
        ("device", "source"),
        "Limit of the clock that is in force.",
    ),
    Metric("boardbench_device_power_watts", "gauge", ("device", "source"), "Power of a rail now."),
    Metric(
        "boardbench_device_busy_ratio",
        "gauge",
        ("device", "source"),
        "Share of the time that a part is busy.",
    ),
    Metric(
        "boardbench_device_throttled",
        "gauge",
        ("device", "source", "cause"),
        "1 while the cause throttles the board, 0 while it does not; absent where the board can't tell.",
    ),
    Metric(
        "boardbench_device_throttle_events_total",
        "counter",
        ("device", "source"),
        "Times that the board was throttled since it booted; absent where it does not count.",
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
    Metric(
        "boardbench_device_series_left_out",
        "gauge",
        ("device", "reason"),
        "Series of the board that are not shown: duplicate (another has its labels), limit (beyond a bound).",
    ),
    Metric(
        "boardbench_device_labels_cut",
        "gauge",
        ("device",),
        "Texts of the board that were too long or not printable, and are shown cut with a digest.",
    ),
    # Jobs, where the collector hands them out.
    Metric("boardbench_jobs", "gauge", ("state",), "Jobs that the collector knows, by their state."),
    Metric(
        "boardbench_job_oldest_waiting_seconds",
        "gauge",
        (),
        "How long the oldest job that no board has yet has been waiting; 0: none waits.",
    ),
    Metric(
        "boardbench_job_leases_expired_total",
        "counter",
        (),
        "Times that a board did not end a job within its lease.",
    ),
    Metric("boardbench_jobs_dead_total", "counter", (), "Jobs that were given up."),
    Metric("boardbench_collector_files_bytes", "gauge", (), "Bytes of the files that are kept for jobs."),
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
    Metric(
        "boardbench_collector_identity_conflicts_total",
        "counter",
        (),
        "Streams of a second agent with the identity of one that is connected.",
    ),
    Metric(
        "boardbench_collector_spool_renewals_total",
        "counter",
        (),
        "Times that an agent was asked for a new identity of its spool, which another one had used.",
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
        "boardbench_collector_acknowledge_seconds",
        "histogram",
        (),
        "Time from a result's arrival to its acknowledgement, which follows its commit.",
    ),
    Metric("boardbench_collector_series", "gauge", (), "Series of boards in this scrape."),
    Metric(
        "boardbench_collector_scrapes_total", "counter", (), "Scrapes that were answered before this one."
    ),
    Metric(
        "boardbench_collector_scrape_store_seconds",
        "gauge",
        (),
        "Time that this scrape waited for the store.",
    ),
    Metric(
        "boardbench_collector_results_thinned_total",
        "counter",
        (),
        "Results whose single samples were dropped for their age since the collector started.",
    ),
    Metric(
        "boardbench_collector_results_removed_total",
        "counter",
        (),
        "Results that were removed for their age or number since the collector started.",
    ),
    Metric(
        "boardbench_collector_samples_dropped_total",
        "counter",
        (),
        "Single samples that were dropped since the collector started.",
    ),
    Metric(
        "boardbench_collector_removed_bytes_total",
        "counter",
        (),
        "Bytes of records that were removed or made smaller since the collector started.",
    ),
    Metric(
        "boardbench_collector_certificate_expiry_timestamp_seconds",
        "gauge",
        (),
        "When the collector's certificate ends, or the first of its chain, in Unix time; absent without TLS.",
    ),
    Metric(
        "boardbench_collector_forwarded_samples_total",
        "counter",
        ("receiver",),
        "Samples, or by OTLP spans and data points, that a receiver took.",
    ),
    Metric(
        "boardbench_collector_forward_dropped_samples_total",
        "counter",
        ("receiver", "reason"),
        "Samples, or by OTLP spans and data points, that a receiver refused for good.",
    ),
    Metric(
        "boardbench_collector_forward_retries_total",
        "counter",
        ("receiver",),
        "Posts that failed and were tried again.",
    ),
    Metric(
        "boardbench_collector_forward_up",
        "gauge",
        ("receiver",),
        "1 when the last post was answered, 0 when it failed; absent before the first.",
    ),
    Metric(
        "boardbench_collector_forward_pending_results",
        "gauge",
        ("receiver",),
        "Results that are not sent on yet, as far as the order of arrival tells.",
    ),
    Metric(
        "boardbench_collector_scrape_duration_seconds",
        "gauge",
        (),
        "Time that this scrape took to read the store and make the series.",
    ),
)
"""Every metric of boardbench's own; prometheus_client's process metrics (``process_…``) come with them."""
