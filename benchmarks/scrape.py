"""What a scrape costs, beside prometheus_client and the Pushgateway, and how fast results are sent on."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.server
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import programs
import tools
from report import Check, Report, note, run

from boardbench.collector.expose import PROTOBUF, TEXT, Exposition, zipped_of
from boardbench.collector.fleet import Tally
from boardbench.collector.forward import Forwarder, Pace, posting, write_request
from boardbench.collector.look import DeviceView, Snapshot
from boardbench.collector.metrics import METRICS
from boardbench.collector.store import LatestResult, LatestResults
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.v1 import collector_pb2, collector_pb2_grpc, placement_pb2, result_pb2

_MODELS = 5
"""Models on each board."""

_INTERVAL_SECONDS = 5.0

_PATIENCE_SECONDS = 30.0
"""Between two scrapes of the others with many series, which may take longer than five: how long they take
stays the same."""

_MANY = 100_000
"""Series from which the others are given that time."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scrape")
    group.add_argument(
        "--series", type=int, nargs="*", default=[30_000, 300_000], help="sizes (default 30000 300000)"
    )
    group.add_argument("--scrapes", type=int, default=8, help="scrapes by Prometheus of each (default 8)")
    group.add_argument("--turns", type=int, default=8, help="runs with and without scrapes (default 8)")
    group.add_argument("--forwarded", type=int, default=4000, help="results that are sent on (default 4000)")


def build_result(board: str, model: int, turn: int) -> result_pb2.RunResult:
    """A result as agents send it: a model on the CPU, four percentiles, 200 samples."""
    p50 = 0.01 + model * 1e-3 + (hash((board, turn)) % 9973) * 1e-7
    result = result_pb2.RunResult(run_id=f"{board}-{model}-{turn}", status=result_pb2.RUN_STATUS_SUCCEEDED)
    result.board.device_id = board
    result.model.name, result.model.sha256 = f"mobilenet_v2_{model}_quant.tflite", f"{model:02x}ab" * 16
    result.model.format, result.model.size_bytes = "tflite", 3_543_216
    result.effective_spec.threads = 4
    result.runtime.name, result.runtime.device = "tflite", "cpu"
    result.import_seconds, result.create_seconds, result.first_inference_seconds = 0.31, p50 / 3, p50 * 1.4
    latency = result.latency
    latency.count, latency.mean_seconds, latency.stdev_seconds = 200, p50 * 1.01, p50 * 0.05
    latency.min_seconds, latency.max_seconds = p50 * 0.9, p50 * 2
    for percentile, factor in ((50, 1.0), (90, 1.1), (99, 1.5), (99.9, 1.9)):
        latency.percentiles.add(
            percentile=percentile,
            seconds=p50 * factor,
            low_seconds=p50 * factor * 0.99,
            high_seconds=p50 * factor * 1.02,
        )
    latency.samples_nanoseconds.extend(int(p50 * 1e9) + 1000 * n for n in range(200))
    for phase in (1, 2, 3, 4):
        result.memory.phases.add(
            phase=phase,  # type: ignore[arg-type]
            rss_bytes=(60 << 20) + turn * 4096,
            pss_bytes=(50 << 20) + turn * 4096,
            peak_rss_bytes=(64 << 20) + turn * 4096,
        )
    result.memory.peak_rss_bytes, result.memory.model_rss_bytes = 74 << 20, 11 << 20
    result.placement.evidence = placement_pb2.EVIDENCE_PARTITION
    result.placement.verdict = placement_pb2.PLACEMENT_VERDICT_NOT_ACCELERATED
    result.placement.units.add(unit=placement_pb2.UNIT_CPU_DELEGATE, ops=64)
    result.placement.units.add(unit=placement_pb2.UNIT_CPU, ops=1)
    result.environment.temperature_after_celsius = 61 + turn / 7
    result.validity = result_pb2.VALIDITY_VALID
    result.finished_at.FromMilliseconds(int(time.time() * 1000))
    return result


def build_hello(board: str) -> collector_pb2.Hello:
    hello = collector_pb2.Hello(agent_version="0.1.0", spool_id="spool")
    hello.board.device_id, hello.board.hostname = board, f"{board}.lab"
    hello.board.model, hello.board.soc = "Raspberry Pi 5 Model B Rev 1.0", "bcm2712"
    hello.board.cpu_count, hello.board.memory_bytes = 4, 8 << 30
    hello.runtimes.add(name="tflite", available=True, version="ai-edge-litert 2.3.0")
    return hello


class Fleet:
    """As many boards as the series need, and the exposition of them."""

    def __init__(self, series: int) -> None:
        self.exposition = self._new()
        self._turn = 0
        boards = self._boards(1)
        self._take(self.exposition, boards)
        each = self.exposition.settle()
        self.boards = self._boards(max(1, round(series / each)))
        self.exposition = self._new()
        self.change()
        self.series = self.exposition.settle()

    @staticmethod
    def _new() -> Exposition:
        return Exposition(
            version="0", series_ttl_seconds=1e9, result_ttl_seconds=1e9, series_per_device=100_000
        )

    @staticmethod
    def _boards(count: int) -> list[str]:
        return [f"board-{number:05}" for number in range(count)]

    def _take(self, exposition: Exposition, boards: Sequence[str]) -> None:
        self._turn += 1
        now = time.time()
        views = tuple(
            DeviceView(build_hello(board), True, now, 0.0, collector_pb2.Heartbeat(spool_pending=self._turn))
            for board in boards
        )
        results = tuple(
            LatestResult(board, now, build_result(board, model, self._turn), 0)
            for board in boards
            for model in range(_MODELS)
        )
        exposition.shapes(
            {entry.result.run_id: entry.result.latency.samples_nanoseconds for entry in results}
        )
        exposition.take(Snapshot(now, views, LatestResults(results, {}), (), Tally(), len(boards)))

    def change(self) -> None:
        """Every board has new results."""
        self._take(self.exposition, self.boards)

    def text(self) -> list[bytes]:
        """In the pieces that the collector gives to gzip one by one."""
        self.exposition.settle()
        return self.exposition.pieces(TEXT)


class Client:
    """The same series in prometheus_client's gauges; a histogram's buckets are gauges, too."""

    def __init__(self, fleet: Fleet) -> None:
        from prometheus_client import CollectorRegistry, Gauge

        self.registry = CollectorRegistry()
        labels = {name: metric.labels for metric in METRICS for name in metric.samples}
        gauges: dict[str, Gauge] = {}
        self.children = []
        for name, values, value in fleet.exposition.series():
            if name not in gauges:
                names = (*labels[name], "le") if name.endswith("_bucket") else labels[name]
                gauges[name] = Gauge(name.removesuffix("_info"), "help", names, registry=self.registry)
            child = gauges[name].labels(**values)
            child.set(value)
            self.children.append((child, value))

    def change(self) -> None:
        for child, value in self.children:
            child.set(value * 1.0001)

    def text(self) -> list[bytes]:
        from prometheus_client import generate_latest

        return [generate_latest(self.registry)]


def cpu_seconds(work: Callable[[], Any]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(arguments: argparse.Namespace) -> Report:
    rows: list[list[object]] = []
    checks: list[Check] = []
    details: dict[str, Any] = {}
    with programs.folder() as root:
        for size in arguments.series:
            rows += _of_size(root / str(size), size, arguments, checks, details)
        rows += _forwarded(root / "forward", arguments.forwarded, details)
        rows += _beside_a_run(root / "run", arguments.turns, checks, details)
    return Report(
        "scrape and remote write",
        f"{_MODELS} models a board, each with four percentiles with bounds, memory by phase, placement and "
        "a histogram. Written: CPU time to make the text, of all series changed and of none (boardbench's is "
        "in the pieces that gzip is given one by one, and it takes a result in when it comes; "
        "prometheus_client's gauges are set before). Scraped: by Prometheus "
        f"every {_INTERVAL_SECONDS:.0f} s, gzip, all changed in between (the others less often; "
        "of the Pushgateway none), median of scrape_duration_seconds. Remote write: "
        "results in a store in memory to a receiver on this machine; alone: the receiver given bodies that "
        "were made before. A run: median latency on a board that is scraped five times a second while it "
        "measures, over that of one that is not, in turns",
        (
            "",
            "series",
            "MB",
            "all changed CPU ms",
            "unchanged CPU ms",
            "gzip CPU ms",
            "scraped s",
            "samples/s",
        ),
        rows,
        checks,
        details,
    )


def _of_size(
    root: Path, size: int, arguments: argparse.Namespace, checks: list[Check], details: dict[str, Any]
) -> list[list[object]]:
    root.mkdir()
    rows: list[list[object]] = []
    fleet = Fleet(size)
    note(f"scrape: {fleet.series:,} series of {len(fleet.boards):,} boards")
    client = Client(fleet)
    for name, kind in (("boardbench", fleet), ("prometheus_client", client)):
        changed, unchanged = [], []
        for _ in range(5):
            kind.change()
            changed.append(cpu_seconds(kind.text))
            unchanged.append(cpu_seconds(kind.text))
        pieces = kind.text()
        zipped = cpu_seconds(lambda pieces=pieces: zipped_of(pieces))
        scraped = _scraped(
            root / name,
            name,
            kind,
            arguments.scrapes,
            _interval(fleet) if kind is client else _INTERVAL_SECONDS,
        )
        rows.append(
            [
                name,
                fleet.series,
                sum(map(len, pieces)) / 1e6,
                statistics.median(changed) * 1e3,
                statistics.median(unchanged) * 1e3,
                zipped * 1e3,
                statistics.median(scraped),
                "",
            ]
        )
        details[f"{name} {size}"] = {"changed": changed, "unchanged": unchanged, "scraped": scraped}
        note(f"scrape: {name}: {rows[-1]}")
        if name == "boardbench":
            took_in = [cpu_seconds(fleet.change) for _ in range(3)]
            fleet.exposition.settle()
            encoded = cpu_seconds(lambda: fleet.exposition.page(PROTOBUF))
            details[f"boardbench {size} more"] = {"take in": took_in, "protobuf": encoded}
            if size >= 300_000:
                per = 300_000 / fleet.series
                checks.append(
                    Check(
                        "text of 300,000 series, all changed",
                        statistics.median(changed) * 1e3 * per,
                        150,
                        "ms",
                    )
                )
                checks.append(
                    Check(
                        "scrape of 300,000 series by Prometheus, median", statistics.median(scraped), 1.0, "s"
                    )
                )
    row = _whole_collector(root / "whole", fleet, arguments.scrapes)
    rows.append(row)
    gateway = shutil.which("prometheus-pushgateway")
    if gateway is None:
        note("scrape: prometheus-pushgateway is not installed, so it does not stand beside it")
    else:
        rows.append(_pushgateway(root / "gateway", gateway, fleet, arguments.scrapes))
    return rows


# Scrapes by a real Prometheus.


@contextlib.contextmanager
def _prometheus(
    root: Path, target: str, *options: str, window: str = "0s", seconds: float = _INTERVAL_SECONDS
) -> Iterator[str]:
    binary = shutil.which("prometheus")
    if binary is None:
        raise SystemExit("prometheus is not installed: make bench does that")
    root.mkdir(parents=True, exist_ok=True)
    configuration = root / "prometheus.yml"
    scrapes = [{"job_name": "b", "static_configs": [{"targets": [target]}]}] if target else []
    configuration.write_text(
        json.dumps(
            {
                "global": {
                    "scrape_interval": f"{seconds:.0f}s",
                    "scrape_timeout": f"{seconds:.0f}s",
                },
                "scrape_configs": scrapes,
                "storage": {"tsdb": {"out_of_order_time_window": window}},
            }
        )
    )
    port = _free_port()
    command = [
        binary, f"--config.file={configuration}", f"--storage.tsdb.path={root / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}", *options,
    ]  # fmt: skip
    with programs.running(command, root / "prometheus.log"):
        _until(f"http://127.0.0.1:{port}/-/ready")
        yield f"http://127.0.0.1:{port}"


def _durations(url: str, scrapes: int, seconds: float = _INTERVAL_SECONDS) -> list[float]:
    """Durations of the scrapes after the first two, which make every series."""
    deadline = time.monotonic() + (scrapes + 6) * seconds + 60
    while time.monotonic() < deadline:
        time.sleep(1)
        found = _query(url, "scrape_duration_seconds{job='b'}[30m]")
        good = _query(url, "up{job='b'}[30m]")
        if found and good:
            up = [value for value, ok in zip(found, good, strict=False) if ok == 1]
            if len(up) >= scrapes + 2:
                return up[2:]
    raise SystemExit(f"{url}: no {scrapes} scrapes succeeded")


def _query(url: str, promql: str) -> list[float]:
    question = urllib.parse.urlencode({"query": promql})
    with urllib.request.urlopen(f"{url}/api/v1/query?{question}", timeout=60) as answer:
        found = json.load(answer)["data"]["result"]
    return [float(value) for _, value in found[0]["values"]] if found else []


def _interval(fleet: Fleet) -> float:
    """Between two scrapes of the others."""
    return _PATIENCE_SECONDS if fleet.series >= _MANY else 2 * _INTERVAL_SECONDS


def _scraped(
    root: Path, name: str, kind: Fleet | Client, scrapes: int, seconds: float = _INTERVAL_SECONDS
) -> list[float]:
    """Scrapes of a server that changes everything after each."""
    turn = threading.Lock()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with turn:
                body = zipped_of(kind.text())
            self.send_response(200)
            self.send_header("Content-Type", TEXT)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            # A scraper that lost patience is seen in its own figures.
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)
            threading.Timer(0.5, self._change).start()

        def _change(self) -> None:
            with turn:
                kind.change()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        with _prometheus(root, f"127.0.0.1:{server.server_address[1]}", seconds=seconds) as url:
            durations = _durations(url, scrapes, seconds)
            with turn:
                return durations
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        note(f"scrape: {name} was scraped")


def _whole_collector(root: Path, fleet: Fleet, scrapes: int) -> list[object]:
    """A collector as it is installed, with these results in its store and as many boards connected."""
    root.mkdir()
    with programs.collector(root, "--series-per-device", "100000") as (pid, ports):
        boards = fleet.boards
        with grpc.insecure_channel(f"127.0.0.1:{ports['grpc']}") as channel:
            stub = collector_pb2_grpc.CollectorServiceStub(channel)
            for board in boards:
                requests = [collector_pb2.ReportRequest(hello=build_hello(board))]
                requests += [
                    collector_pb2.ReportRequest(
                        result=collector_pb2.SpooledResult(
                            spool_id="spool", sequence=model + 1, result=build_result(board, model, 1)
                        )
                    )
                    for model in range(_MODELS)
                ]
                for _ in stub.Report(iter(requests)):
                    pass
        note("scrape: the collector has its results")
        with _prometheus(root, f"127.0.0.1:{ports['http']}") as url:
            before = programs.cpu_seconds(pid)
            begin = time.monotonic()
            durations = _durations(url, scrapes)
            share = (programs.cpu_seconds(pid) - before) / (time.monotonic() - begin)
        with urllib.request.urlopen(f"http://127.0.0.1:{ports['http']}/metrics", timeout=60) as answer:
            size = len(answer.read())
        unchanged = share * _INTERVAL_SECONDS * 1e3
        rss = programs.memory_bytes(pid)["rss"] / (1 << 20)
    return [
        f"boardbench-collector, whole, {rss:.0f} MiB",
        fleet.series,
        size / 1e6,
        "",
        unchanged,
        "",
        statistics.median(durations),
        "",
    ]


def _pushgateway(root: Path, binary: str, fleet: Fleet, scrapes: int) -> list[object]:
    """The Pushgateway with a group a board."""
    root.mkdir()
    port = _free_port()
    url = f"http://127.0.0.1:{port}"
    groups: dict[str, dict[str, list[str]]] = {}
    for name, labels, value in fleet.exposition.series():
        if "device" in labels:
            pairs = ",".join(f'{key}="{text}"' for key, text in labels.items() if key != "device")
            groups.setdefault(labels["device"], {}).setdefault(name, []).append(
                f"{name}{{{pairs}}} {value!r}\n"
            )
    # Its check reads everything that it has at every push: without it, filling it takes minutes, not hours.
    command = [binary, f"--web.listen-address=127.0.0.1:{port}", "--push.disable-consistency-check"]
    with programs.running(command, root / "gateway.log") as process:
        _until(url + "/-/ready")
        for board, names in groups.items():
            body = "".join("".join(lines) for lines in names.values()).encode()
            request = urllib.request.Request(f"{url}/metrics/job/b/device/{board}", data=body, method="PUT")
            with urllib.request.urlopen(request, timeout=60):
                pass
        before = programs.cpu_seconds(process.pid)
        request = urllib.request.Request(url + "/metrics")
        with urllib.request.urlopen(request, timeout=120) as answer:
            size = len(answer.read())
        cpu = programs.cpu_seconds(process.pid) - before
        seconds = _interval(fleet)
        with _prometheus(root, f"127.0.0.1:{port}", seconds=seconds) as prometheus:
            durations = _durations(prometheus, scrapes, seconds)
    return ["Pushgateway", fleet.series, size / 1e6, "", cpu * 1e3, "", statistics.median(durations), ""]


# Remote write.


def _forwarded(root: Path, results: int, details: dict[str, Any]) -> list[list[object]]:
    root.mkdir()
    rows: list[list[object]] = []
    store = MemoryResultStore()

    async def fill() -> None:
        begin = time.time() - results
        for number in range(results):
            result = build_result(f"board-{number % 500:05}", number % _MODELS, number)
            result.finished_at.FromMilliseconds(int((begin + number) * 1000))
            await store.append(result.board.device_id, f"spool-{number}", 1, result)

    async def send(url: str, folder: Path) -> tuple[float, int]:
        async with posting(url, {}) as post:
            forwarder = Forwarder(url, store, folder, post)
            begin = time.perf_counter()
            task = asyncio.create_task(forwarder.run())
            while forwarder._position < results:
                await asyncio.sleep(0.01)
                if task.done():
                    task.result()
            seconds = time.perf_counter() - begin
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            view = forwarder.view()
            if view.dropped or view.retries:
                note(f"remote write: {view}")
            return seconds, view.samples

    async def alone(url: str, folder: Path) -> tuple[float, int]:
        arrivals = await store.arrivals(0, limit=results, max_bytes=1 << 40)
        async with posting(url, {}) as post:
            forwarder = Forwarder(url, store, folder, post)
            measured = [one for one in forwarder._prepare(arrivals) if one is not None]
        step = max(1, Pace().batch_samples // measured[0].samples)
        bodies = [
            write_request(measured[begin : begin + step], None) for begin in range(0, len(measured), step)
        ]
        async with posting(url, {}) as post:
            begin = time.perf_counter()
            for body in bodies:
                answer = await post(body)
                assert answer.status < 300, answer
            return time.perf_counter() - begin, sum(one.samples for one in measured)

    asyncio.run(fill())
    for name, receiver in (("Prometheus", _prometheus_receiver), ("VictoriaMetrics", _victoria_receiver)):
        for how in ("boardbench", "alone"):
            folder = root / f"{name}-{how}"
            with receiver(folder) as url:
                if url is None:
                    note(f"remote write: {name} is not installed, so it does not stand here")
                    break
                work = send(url, folder) if how == "boardbench" else alone(url, folder)
                seconds, samples = asyncio.run(work)
            who = f"remote write to {name}" + (" alone" if how == "alone" else "")
            rows.append([who, samples, "", "", "", "", "", samples / seconds])
            details[who] = samples / seconds
            note(f"remote write: {who}: {samples / seconds:,.0f} samples/s")
    return rows


@contextlib.contextmanager
def _prometheus_receiver(root: Path) -> Iterator[str]:
    with _prometheus(root, "", "--web.enable-remote-write-receiver", window="7d") as url:
        yield url + "/api/v1/write"


@contextlib.contextmanager
def _victoria_receiver(root: Path) -> Iterator[str | None]:
    binary = shutil.which("victoria-metrics")
    if binary is None:
        yield None
        return
    root.mkdir(parents=True)
    port = _free_port()
    command = [binary, f"-storageDataPath={root / 'data'}", f"-httpListenAddr=127.0.0.1:{port}"]
    with programs.running(command, root / "victoria.log"):
        _until(f"http://127.0.0.1:{port}/health")
        yield f"http://127.0.0.1:{port}/api/v1/write"


# What a scrape does to a run.


def _beside_a_run(root: Path, turns: int, checks: list[Check], details: dict[str, Any]) -> list[list[object]]:
    root.mkdir()
    model = tools.convolutions(root, 32, 64)
    port = _free_port()
    os.environ["BOARDBENCH_AGENT_METRICS_LISTEN"] = f"127.0.0.1:{port}"
    found: dict[bool, list[float]] = {True: [], False: []}
    with (
        programs.collector(root) as (_, ports),
        programs.agent(root, "--collector", f"127.0.0.1:{ports['grpc']}") as (_, agent),
    ):
        urls = (f"http://127.0.0.1:{port}/metrics", f"http://127.0.0.1:{ports['http']}/metrics")
        for turn in range(2 * turns):
            scraped = turn % 4 in {1, 2}
            with _scraping(urls if scraped else ()):
                found[scraped].append(_median_seconds(model, agent["grpc"]))
    del os.environ["BOARDBENCH_AGENT_METRICS_LISTEN"]
    ratio = statistics.median(found[True]) / statistics.median(found[False])
    details["medians with and without scrapes"] = [found[True], found[False]]
    checks.append(Check("median of a run while it is scraped, over that of one that is not", ratio, 1.02, ""))
    note(f"scrape: a run beside scrapes: {ratio:.4f}")
    return [[f"a run beside scrapes: {ratio:.4f} of one without", *[""] * 7]]


@contextlib.contextmanager
def _scraping(urls: Sequence[str]) -> Iterator[None]:
    """Five scrapes a second of each, and nothing where there are none."""
    stop = threading.Event()

    def scrape() -> None:
        while not stop.wait(0.2):
            for url in urls:
                with urllib.request.urlopen(url, timeout=30) as answer:
                    answer.read()

    thread = threading.Thread(target=scrape)
    if urls:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        if urls:
            thread.join()


def _median_seconds(model: Path, port: int) -> float:
    command = [
        *programs.program("boardbench"), "push", str(model), "--to", f"127.0.0.1:{port}", "--threads", "1",
        "--duration", "2", "--format", "json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    result = json.loads(done.stdout)
    return float(
        next(each["seconds"] for each in result["latency"]["percentiles"] if each["percentile"] == 50)
    )


def _until(url: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.1)
    raise SystemExit(f"{url} does not answer")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__, section="scrape"))
