"""``/metrics`` of the board itself, for Prometheus in a small fleet; loaded only where it is switched on.

Names and labels are those of the collector, which knows more of them. Text of the results is kept, so that a
scrape while a model is measured costs a write to a socket.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from boardbench.agent.board.sensor import Reading
from boardbench.v1 import agent_pb2, board_pb2, collector_pb2, placement_pb2, result_pb2, scenario_pb2

_log = logging.getLogger(__name__)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_REQUEST_SECONDS = 5.0
"""A client that takes longer to say what it wants is gone."""

_REQUEST_BYTES = 16 * 1024
_MOST_LABEL = 128
"""Longest label value in characters, as in the collector."""

_PERCENTILES = 32

_FIGURES = (
    ("boardbench_latency_mean_seconds", "latency.mean_seconds"),
    ("boardbench_latency_min_seconds", "latency.min_seconds"),
    ("boardbench_latency_max_seconds", "latency.max_seconds"),
    ("boardbench_latency_stdev_seconds", "latency.stdev_seconds"),
    ("boardbench_latency_samples", "latency.count"),
    ("boardbench_import_seconds", "import_seconds"),
    ("boardbench_create_seconds", "create_seconds"),
    ("boardbench_first_inference_seconds", "first_inference_seconds"),
    ("boardbench_memory_run_peak_rss_bytes", "memory.peak_rss_bytes"),
    ("boardbench_memory_model_rss_bytes", "memory.model_rss_bytes"),
    ("boardbench_fallback_share_ratio", "placement.fallback_cost.share"),
    ("boardbench_fallback_share_low_ratio", "placement.fallback_cost.share_low"),
    ("boardbench_fallback_share_high_ratio", "placement.fallback_cost.share_high"),
    ("boardbench_energy_per_inference_joules", "energy.energy_per_inference_joules"),
    ("boardbench_power_watts", "energy.mean_watts"),
    ("boardbench_throughput_hertz", "scenario.throughput_hertz"),
    ("boardbench_run_cpu_frequency_hertz", "environment.cpu_frequency_hertz"),
)
"""Metric, and where in the result its value is; without a value it has no series."""

_READINGS = {
    "temperature_celsius": "boardbench_device_temperature_celsius",
    "frequency_hertz": "boardbench_device_frequency_hertz",
    "frequency_limit_hertz": "boardbench_device_frequency_limit_hertz",
    "power_watts": "boardbench_device_power_watts",
    "busy_ratio": "boardbench_device_busy_ratio",
}

_Labels = tuple[tuple[str, str], ...]
_Sample = tuple[str, _Labels, float]


class MetricsServer:
    """Answers ``GET /metrics``; used from one event loop."""

    def __init__(
        self,
        *,
        hello: Callable[[], collector_pb2.Hello],
        heartbeat: Callable[[], collector_pb2.Heartbeat],
        readings: Callable[[], Sequence[Reading]],
        refresh: Callable[[], None],
        ended: Callable[[], Iterable[agent_pb2.RunSummary]],
        result: Callable[[str], result_pb2.RunResult | None],
    ) -> None:
        """Says what these say now. ``result`` blocks on the disk; ``ended`` are the latest first."""
        self._hello = hello
        self._heartbeat = heartbeat
        self._readings = readings
        self._refresh = refresh
        self._ended = ended
        self._result = result
        self._known: dict[str, tuple[_Labels, list[_Sample]]] = {}
        self._server: asyncio.Server | None = None

    async def listen(self, host: str, port: int) -> int:
        """Begins to answer; returns the port. OSError when the address can't be had."""
        self._server = await asyncio.start_server(self._answer, host.strip("[]"), port, limit=_REQUEST_BYTES)
        bound: int = self._server.sockets[0].getsockname()[1]
        return bound

    async def close(self) -> None:
        """Ends it. Idempotent."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _REQUEST_SECONDS)
            method, path = (*head.split(b"\r\n", 1)[0].split(b" "), b"")[:2]
            if path.partition(b"?")[0] != b"/metrics":
                status, body = "404 Not Found", b"there is /metrics here\n"
            elif method not in {b"GET", b"HEAD"}:
                status, body = "405 Method Not Allowed", b"GET it\n"
            else:
                status, body = "200 OK", (await self.text()).encode()
            writer.write(
                f"HTTP/1.1 {status}\r\nContent-Type: {CONTENT_TYPE}\r\nContent-Length: {len(body)}\r\n"
                "Connection: close\r\n\r\n".encode()
            )
            if method != b"HEAD":
                writer.write(body)
            await asyncio.wait_for(writer.drain(), _REQUEST_SECONDS)
        except (OSError, asyncio.TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        except Exception:
            _log.exception("/metrics failed")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def text(self) -> str:
        """Returns everything in Prometheus's text format."""
        heartbeat = self._heartbeat()
        if not heartbeat.running_run_id:
            # While a model is measured its own sampler reads the sensors.
            self._refresh()
        families: dict[str, dict[_Labels, float]] = {}
        hello = self._hello()
        device = (("device", _label(hello.board.device_id)),)
        for name, labels, value in _board_samples(hello, heartbeat, self._readings()):
            families.setdefault(name, {}).setdefault(device + labels, value)
        for base, samples in await self._results():
            for name, labels, value in samples:
                if math.isfinite(value):
                    families.setdefault(name, {}).setdefault(device + base + labels, value)
        return "".join(_family(name, series) for name, series in families.items())

    async def _results(self) -> list[tuple[_Labels, list[_Sample]]]:
        """Returns the latest measurement of each model, of those that are kept."""
        known: dict[str, tuple[_Labels, list[_Sample]]] = {}
        for summary in self._ended():
            run_id = summary.run_id
            if summary.status != result_pb2.RUN_STATUS_SUCCEEDED:
                continue
            if run_id in self._known:
                known[run_id] = self._known[run_id]
            elif (result := await asyncio.to_thread(self._result, run_id)) is not None:
                known[run_id] = (_base_labels(result), list(_result_samples(result)))
        self._known = known
        return list({base: (base, samples) for base, samples in reversed(known.values())}.values())


def _family(name: str, series: dict[_Labels, float]) -> str:
    kind = "counter" if name.endswith("_total") else "gauge"
    lines = [f"# HELP {name} See boardbench's table of metrics.\n# TYPE {name} {kind}\n"]
    for labels, value in series.items():
        pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels)
        lines.append(f"{name}{{{pairs}}} {value!r}\n")
    return "".join(lines)


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"")


def _label(text: str) -> str:
    """Returns the text as a label value, as the collector shows it: printable and bounded."""
    if text.isprintable() and len(text) <= _MOST_LABEL:
        return text
    import hashlib

    clean = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return f"{clean[: _MOST_LABEL - 9]}~{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _enum(enum: Any, value: int) -> str:
    entry = enum.DESCRIPTOR.values_by_number.get(value)
    if entry is None or not value:
        return "unknown"
    prefix = enum.DESCRIPTOR.values_by_number[0].name.removesuffix("UNSPECIFIED")
    return str(entry.name.removeprefix(prefix).lower())


def _board_samples(
    hello: collector_pb2.Hello, heartbeat: collector_pb2.Heartbeat, readings: Sequence[Reading]
) -> Iterator[_Sample]:
    board: board_pb2.Board = hello.board
    facts = (
        ("hostname", board.hostname),
        ("board", board.model),
        ("soc", board.soc),
        ("architecture", board.architecture),
        ("os", board.os),
        ("kernel", board.kernel),
        ("emulator", board.emulator),
    )
    yield "boardbench_device_info", tuple((name, _label(fact)) for name, fact in facts), 1
    if board.cpu_count:
        yield "boardbench_device_cpus", (), board.cpu_count
    if board.memory_bytes > 0:
        yield "boardbench_device_memory_bytes", (), board.memory_bytes
    yield "boardbench_agent_info", (("version", _label(hello.agent_version)),), 1
    for runtime in hello.runtimes:
        name = ("runtime", _label(runtime.name))
        yield "boardbench_runtime_available", (name,), int(runtime.available)
        if runtime.available:
            yield "boardbench_runtime_info", (name, ("version", _label(runtime.version))), 1
    yield "boardbench_device_running", (), int(bool(heartbeat.running_run_id))
    yield "boardbench_queued_runs", (), heartbeat.queued_runs
    yield "boardbench_spool_pending", (), heartbeat.spool_pending
    yield "boardbench_spool_dropped_total", (), heartbeat.spool_dropped
    for reading in readings:
        source = ("source", _label(reading.source))
        metric = _READINGS.get(reading.quantity)
        if metric is not None:
            yield metric, (source,), reading.value
        elif reading.quantity.endswith("_now"):
            cause = ("cause", _label(reading.quantity.removesuffix("_now")))
            yield "boardbench_device_throttled", (source, cause), int(reading.value != 0)


def _result_samples(result: result_pb2.RunResult) -> Iterator[_Sample]:
    if result.latency.count:
        shown: set[str] = set()
        for percentile in result.latency.percentiles:
            which = f"{percentile.percentile:.6g}"
            if which in shown or len(shown) == _PERCENTILES:
                continue
            shown.add(which)
            labels = (("percentile", which),)
            yield "boardbench_latency_seconds", labels, percentile.seconds
            yield "boardbench_latency_low_seconds", labels, percentile.low_seconds
            yield "boardbench_latency_high_seconds", labels, percentile.high_seconds
    for name, path in _FIGURES:
        value = _value_at(result, path)
        if value is not None:
            yield name, (), value
    for phase in result.memory.phases:
        if phase.HasField("rss_bytes"):
            labels = (("phase", _enum(result_pb2.MemoryPhase, phase.phase)),)
            yield "boardbench_memory_rss_bytes", labels, phase.rss_bytes
    yield from _placement_samples(result.placement)
    for moment in ("before", "after"):
        celsius = _value_at(result, f"environment.temperature_{moment}_celsius")
        if celsius is not None:
            yield "boardbench_run_temperature_celsius", (("moment", moment),), celsius
    environment = result.environment
    if environment.throttled_during or environment.throttling_readable:
        yield "boardbench_run_throttled", (), int(bool(environment.throttled_during))
    if result.HasField("finished_at"):
        seconds = result.finished_at.seconds + result.finished_at.nanos / 1e9
        yield "boardbench_result_timestamp_seconds", (), seconds
    doubts = sum(warning.severity != result_pb2.SEVERITY_NOTE for warning in result.warnings)
    yield "boardbench_result_warnings", (), doubts
    validity = (("validity", _enum(result_pb2.Validity, result.validity)),)
    yield "boardbench_result_validity_info", validity, 1
    standin = bool(result.standins) or result.placement.standin or result.accelerator.standin
    yield "boardbench_result_standin", (), int(standin)


def _placement_samples(placement: placement_pb2.Placement) -> Iterator[_Sample]:
    ops: dict[str, int] = {}
    if placement.evidence != placement_pb2.EVIDENCE_UNSPECIFIED:
        for count in placement.units:
            unit = _enum(placement_pb2.Unit, count.unit)
            ops[unit] = ops.get(unit, 0) + count.ops
    known = any(unit != "unknown" for unit in ops)
    yield "boardbench_placement_known", (), int(known)
    if known:
        for unit, total in ops.items():
            yield "boardbench_ops", (("unit", unit),), total
    if placement.evidence or placement.verdict:
        facts = (
            ("verdict", _enum(placement_pb2.PlacementVerdict, placement.verdict)),
            ("evidence", _enum(placement_pb2.Evidence, placement.evidence)),
            ("standin", "true" if placement.standin else "false"),
        )
        yield "boardbench_placement_info", facts, 1


def _value_at(result: result_pb2.RunResult, path: str) -> float | None:
    """Returns the number at the path; None where it, or a message on the way, is absent."""
    *way, last = path.split(".")
    found: Any = result
    for name in way:
        if not found.HasField(name):
            return None
        found = getattr(found, name)
    field = found.DESCRIPTOR.fields_by_name[last]
    if field.has_presence and not found.HasField(last):
        return None
    if path.startswith("latency.") and not result.latency.count:
        return None
    value: float = getattr(found, last)
    return value


def _base_labels(result: result_pb2.RunResult) -> _Labels:
    """Returns what tells the figures of one model from all others, as the collector tells them."""
    spec, effective = result.spec, result.effective_spec
    threads = ""
    if effective.HasField("threads"):
        threads = str(effective.threads)
    elif spec.HasField("threads"):
        threads = str(spec.threads)
    parts = [f"{name}={value}" for name, value in sorted(spec.options.items())]
    parts += [
        f"{name}={'x'.join(str(size) for size in shape.dimensions)}"
        for name, shape in sorted(spec.shapes.items())
    ]
    settings = (
        ("compute_precision", spec.compute_precision),
        ("cpu_affinity", "+".join(str(number) for number in spec.cpu_affinity)),
        ("power_mode", spec.power_mode),
    )
    parts += [f"{name}={value}" for name, value in settings if value]
    if spec.inputs_sha256:
        parts.append(f"inputs={spec.inputs_sha256[:12]}")
    scenario = spec.scenario
    plain = (scenario_pb2.SCENARIO_KIND_UNSPECIFIED, scenario_pb2.SCENARIO_KIND_SINGLE_STREAM)
    if scenario.kind not in plain:
        parts.append(f"scenario={_enum(scenario_pb2.ScenarioKind, scenario.kind)}")
        told = {field.name: value for field, value in scenario.ListFields()}
        parts += [f"{name}={told[name]:g}" for name in ("rate_hertz", "streams", "batch") if name in told]
    if spec.group.mode == result_pb2.GROUP_MODE_CONCURRENT:
        parts.append(f"concurrent={spec.group.size}")
    values = (
        ("model", result.model.name),
        ("model_sha256", result.model.sha256[:12]),
        ("runtime", result.runtime.name or effective.runtime or spec.runtime),
        ("target", result.runtime.device or effective.device or spec.device),
        ("threads", threads),
        ("variant", ",".join(parts)),
    )
    return tuple((name, _label(value)) for name, value in values)
