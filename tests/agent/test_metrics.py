"""The board's own /metrics: the same names, labels and values as the collector's, and nothing when off."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from boardbench.agent.board.sensor import Reading
from boardbench.agent.metrics import MetricsServer
from boardbench.collector.expose import TEXT, Exposition
from boardbench.collector.fleet import Tally
from boardbench.collector.look import DeviceView, Snapshot
from boardbench.collector.store import LatestResult, LatestResults
from boardbench.v1 import (
    agent_pb2,
    board_pb2,
    collector_pb2,
    placement_pb2,
    result_pb2,
    scenario_pb2,
    telemetry_pb2,
)

Series = dict[tuple[str, frozenset[tuple[str, str]]], float]

READINGS = (
    Reading("temperature_celsius", "cpu-thermal", 61.5),
    Reading("frequency_hertz", "policy0", 2.4e9),
    Reading("power_watts", 'VDD "IN"', 6.25),
    Reading("undervoltage_now", "soc:firmware", 1.0),
    Reading("fan_drive_ratio", "fan", 1.0),
)


def build_hello() -> collector_pb2.Hello:
    hello = collector_pb2.Hello(
        board=board_pb2.Board(
            device_id="pi5", hostname="pi5.lab", model="Raspberry Pi 5", cpu_count=4, memory_bytes=8 << 30
        ),
        agent_version="0.1.0",
    )
    hello.runtimes.add(name="tflite", available=True, version="ai-edge-litert 2.3.0")
    hello.runtimes.add(name="onnxruntime", available=False, reason="not installed")
    return hello


def build_results() -> dict[str, result_pb2.RunResult]:
    """Results of every kind that has its own labels, the latest first."""
    results = {}
    for n in range(6):
        result = result_pb2.RunResult(run_id=f"run-{n}", status=result_pb2.RUN_STATUS_SUCCEEDED)
        result.board.device_id = "pi5"
        result.model.name, result.model.sha256 = "m\n1.tflite", "5ba0" * 16
        result.runtime.name, result.runtime.device = "tflite", "cpu"
        result.latency.count, result.latency.mean_seconds = 100, 0.01 + n
        result.latency.min_seconds, result.latency.max_seconds = 0.009, 0.02
        result.latency.percentiles.add(percentile=99.9, seconds=0.0125, low_seconds=0.012, high_seconds=0.013)
        result.memory.phases.add(phase=result_pb2.MEMORY_PHASE_STEADY, rss_bytes=71 << 20)
        result.placement.evidence = placement_pb2.EVIDENCE_PARTITION
        result.placement.verdict = placement_pb2.PLACEMENT_VERDICT_PARTLY
        result.placement.units.add(unit=placement_pb2.UNIT_TPU, ops=64)
        result.placement.units.add(unit=placement_pb2.UNIT_CPU, ops=8)
        result.placement.fallback_cost.share = 0.25
        result.environment.temperature_after_celsius = 61
        result.environment.throttling_readable = True
        result.energy.energy_per_inference_joules = 0.0056
        result.finished_at.FromSeconds(1_800_000_000 - n)
        result.validity = result_pb2.VALIDITY_DOUBTFUL
        result.warnings.add(code="high_load", severity=result_pb2.SEVERITY_DOUBTFUL)
        results[result.run_id] = result
    results["run-1"].spec.threads = 2
    results["run-2"].spec.options["xnnpack"] = "false"
    results["run-2"].spec.shapes["x"].dimensions.extend((1, 3))
    results["run-2"].spec.compute_precision = "float16"
    results["run-2"].spec.cpu_affinity.extend((2, 3))
    results["run-2"].spec.power_mode = "MAXN"
    results["run-2"].spec.inputs_sha256 = "feed" * 16
    results["run-3"].spec.scenario.kind = scenario_pb2.SCENARIO_KIND_PERIODIC
    results["run-3"].spec.scenario.rate_hertz = 30
    results["run-3"].spec.group.mode = result_pb2.GROUP_MODE_CONCURRENT
    results["run-3"].spec.group.size = 2
    results["run-4"].status = result_pb2.RUN_STATUS_FAILED
    return results


def parsed(text: str) -> Series:
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = (sample.name, frozenset(sample.labels.items()))
            assert key not in found
            found[key] = sample.value
    return found


class Board:
    """What the server asks."""

    def __init__(self) -> None:
        self.results = build_results()
        self.heartbeat = collector_pb2.Heartbeat(spool_pending=3, spool_dropped=1, queued_runs=2)
        self.refreshed = 0
        self.read: list[str] = []
        self.server = MetricsServer(
            hello=build_hello,
            heartbeat=lambda: self.heartbeat,
            readings=lambda: READINGS,
            refresh=self._refresh,
            ended=lambda: [
                agent_pb2.RunSummary(run_id=result.run_id, status=result.status)
                for result in self.results.values()
            ],
            result=self._result,
        )

    def _refresh(self) -> None:
        self.refreshed += 1

    def _result(self, run_id: str) -> result_pb2.RunResult | None:
        self.read.append(run_id)
        return self.results[run_id]


@pytest.fixture
async def board() -> AsyncIterator[Board]:
    made = Board()
    yield made
    await made.server.close()


async def test_what_it_says_is_what_the_collector_would_say(board: Board) -> None:
    mine = parsed(await board.server.text())
    heartbeat = collector_pb2.Heartbeat()
    heartbeat.CopyFrom(board.heartbeat)
    heartbeat.readings.extend(
        telemetry_pb2.Reading(quantity=reading.quantity, source=reading.source, value=reading.value)
        for reading in READINGS
    )
    # The store keeps the latest of each series: run-5 continues the series of run-0.
    latest = [board.results[f"run-{n}"] for n in (0, 1, 2, 3)]
    fleet = Exposition(version="1", series_ttl_seconds=60, result_ttl_seconds=1e9, series_per_device=5000)
    fleet.take(
        Snapshot(
            at=1_800_000_000,
            devices=(DeviceView(build_hello(), True, 1_800_000_000, 0, heartbeat),),
            latest=LatestResults(tuple(LatestResult("pi5", 1_800_000_000, one) for one in latest), {}),
            outcomes=(),
            tally=Tally(),
            open_streams=1,
        )
    )
    fleet.settle()
    theirs = parsed(fleet.page(TEXT).decode())
    assert len(mine) > 90
    assert {key: theirs.get(key) for key in mine} == mine
    # What the board leaves out is known, and nothing else is left out.
    only_there = {name for name, _ in theirs.keys() - mine.keys()}
    assert only_there == {
        "boardbench_device_up",
        "boardbench_device_last_seen_timestamp_seconds",
        "boardbench_device_results_left_out",
        "boardbench_device_series_left_out",
        "boardbench_device_labels_cut",
        "boardbench_model_info",
        "boardbench_fallback_share_low_ratio",
        "boardbench_fallback_share_high_ratio",
        "boardbench_fallback_seconds",
        "boardbench_latency_without_fallback_seconds",
    }


async def test_results_are_read_once(board: Board) -> None:
    first = await board.server.text()
    assert sorted(board.read) == ["run-0", "run-1", "run-2", "run-3", "run-5"]
    assert await board.server.text() == first
    assert len(board.read) == 5


async def test_while_a_model_is_measured_no_sensor_is_read(board: Board) -> None:
    await board.server.text()
    assert board.refreshed == 1
    board.heartbeat.running_run_id = "run-9"
    shown = parsed(await board.server.text())
    assert board.refreshed == 1
    assert shown[("boardbench_device_running", frozenset({("device", "pi5")}))] == 1


async def test_http(board: Board) -> None:
    port = await board.server.listen("127.0.0.1", 0)

    async def ask(request: bytes) -> tuple[bytes, bytes]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request)
        answer = await asyncio.wait_for(reader.read(), 30)
        writer.close()
        head, _, body = answer.partition(b"\r\n\r\n")
        return head, body

    head, body = await ask(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\n") and b"text/plain; version=0.0.4" in head
    assert body.decode() == await board.server.text()
    head, body = await ask(b"HEAD /metrics?x=1 HTTP/1.0\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200") and body == b""
    assert (await ask(b"GET / HTTP/1.1\r\n\r\n"))[0].startswith(b"HTTP/1.1 404")
    assert (await ask(b"POST /metrics HTTP/1.1\r\n\r\n"))[0].startswith(b"HTTP/1.1 405")
    assert await ask(b"x" * 100_000) == (b"", b"")
    assert (await ask(b"\r\n\r\n"))[0].startswith(b"HTTP/1.1 404")
    assert (await ask(b"GET /metrics HTTP/1.1\r\n\r\n"))[0].startswith(b"HTTP/1.1 200")


def _serve(folder: Path, **environment: str) -> tuple[subprocess.Popen[bytes], Path]:
    port_file = folder / "port"
    process = subprocess.Popen(
        [
            sys.executable, "-m", "boardbench.agent", "serve", "--listen", "127.0.0.1:0",
            "--data-dir", str(folder / "data"), "--device-id", "it", "--port-file", str(port_file),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"BOARDBENCH_FAKE_RUNTIME": "1"} | environment,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not port_file.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    json.loads(port_file.read_text())
    return process, port_file


def _sockets(process: subprocess.Popen[bytes]) -> int:
    """Number of sockets on which the process listens."""
    inodes = set()
    for entry in Path(f"/proc/{process.pid}/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if target.startswith("socket:["):
            inodes.add(target[8:-1])
    listening = 0
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{process.pid}/net/{table}").read_text().splitlines()[1:]:
            parts = line.split()
            listening += parts[3] == "0A" and parts[9] in inodes
    return listening


@pytest.mark.parametrize("on", [False, True])
def test_it_is_there_when_it_is_switched_on_and_costs_nothing_otherwise(tmp_path: Path, on: bool) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"BOARDBENCH_AGENT_METRICS_LISTEN": f"127.0.0.1:{port}"} if on else {}
    process, _ = _serve(tmp_path, **settings)
    try:
        assert _sockets(process) == (2 if on else 1)
        if on:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                shown = parsed(answer.read().decode())
            assert shown[("boardbench_device_running", frozenset({("device", "it")}))] == 0
        else:
            with pytest.raises(urllib.error.URLError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30)
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def test_an_agent_does_not_load_what_it_does_not_need() -> None:
    code = "import boardbench.agent.serve, sys; sys.exit('boardbench.agent.metrics' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
