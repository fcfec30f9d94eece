"""A real Prometheus scrapes a real collector, and PromQL returns what the board measured."""

from __future__ import annotations

import json
import queue
import subprocess
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import grpc
import pytest

from boardbench.v1 import collector_pb2, collector_pb2_grpc, result_pb2

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]

CONFIGURATION = Path(__file__).parents[2] / "deploy" / "prometheus" / "prometheus.yml"


class Prometheus:
    """A Prometheus server with one target."""

    def __init__(self, program: str, folder: Path, port: int, target: str, *arguments: str) -> None:
        self.url = f"http://127.0.0.1:{port}"
        configuration = CONFIGURATION.read_text().replace("127.0.0.1:7343", target)
        configuration = configuration.replace("rules/*.yml", f"{CONFIGURATION.parent}/rules/*.yml")
        assert target in configuration
        for interval in ("15s", "10s"):
            configuration = configuration.replace(interval, "200ms")
        file = folder / "prometheus.yml"
        file.write_text(configuration)
        self._log = (folder / "prometheus.log").open("wb")
        self.process = subprocess.Popen(
            [
                program,
                f"--config.file={file}",
                f"--storage.tsdb.path={folder / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
                *arguments,
            ],
            stdout=self._log,
            stderr=self._log,
        )

    def query(self, promql: str) -> list[tuple[dict[str, str], float]]:
        """Returns (labels, value) of every series that the query gives now; nothing while it can't answer."""
        url = f"{self.url}/api/v1/query?{urllib.parse.urlencode({'query': promql})}"
        try:
            with urllib.request.urlopen(url, timeout=10) as answer:
                found = json.load(answer)
        except OSError:
            return []
        assert found["status"] == "success"
        return [(entry["metric"], float(entry["value"][1])) for entry in found["data"]["result"]]

    def stop(self) -> None:
        """Ends it."""
        self.process.terminate()
        self.process.wait(30)
        self._log.close()


@pytest.fixture
def scraped(
    start_collector: Callable[..., Any],
    find_program: Callable[[str], str],
    tmp_path: Path,
    free_port: int,
) -> Iterator[tuple[Any, Prometheus]]:
    program = find_program("prometheus")
    collector = start_collector("--series-ttl", "4", "--heartbeat", "3600")
    prometheus = Prometheus(program, tmp_path, free_port, collector.url.removeprefix("http://"))
    yield collector, prometheus
    prometheus.stop()


def test_promql_returns_what_the_board_measured_and_forgets_boards_that_are_gone(
    scraped: tuple[Any, Prometheus],
    make_result: MakeResult,
    make_hello: MakeHello,
    wait_until: Callable[..., None],
) -> None:
    collector, prometheus = scraped
    messages = [
        collector_pb2.ReportRequest(hello=make_hello()),
        collector_pb2.ReportRequest(
            result=collector_pb2.SpooledResult(
                spool_id="spool-1", sequence=1, result=make_result("run-1", p50=0.0034567891234)
            )
        ),
        collector_pb2.ReportRequest(
            result=collector_pb2.SpooledResult(
                spool_id="spool-1",
                sequence=2,
                result=make_result("run-2", status=result_pb2.RUN_STATUS_FAILED),
            )
        ),
    ]
    with grpc.insecure_channel(collector.grpc_address) as channel:
        stub = collector_pb2_grpc.CollectorServiceStub(channel)
        requests: queue.SimpleQueue[collector_pb2.ReportRequest | None] = queue.SimpleQueue()
        for message in messages:
            requests.put(message)
        answers = stub.Report(iter(requests.get, None))
        sequences = [next(answers).welcome.acknowledged_sequence]
        while sequences[-1] < 2:
            sequences.append(next(answers).acknowledgement.sequence)

        wait_until(lambda: prometheus.query("boardbench_device_up == 1"), "Prometheus has seen the board")
        wait_until(lambda: prometheus.query("boardbench_runs_total{status='failed'}"), "and its runs")
        ((labels, p50),) = prometheus.query(
            "boardbench_latency_seconds{device='pi5', model='mobilenet.tflite', percentile='50'}"
        )
        assert p50 == 0.0034567891234
        assert labels["job"] == "boardbench"
        assert (labels["runtime"], labels["target"], labels["threads"]) == ("tflite", "cpu", "4")
        assert "run_id" not in labels
        runs = prometheus.query("sum by (status) (boardbench_runs_total)")
        assert {labels["status"]: value for labels, value in runs} == {"succeeded": 1, "failed": 1}
        ((_, share),) = prometheus.query(
            "sum without (unit) (boardbench_ops{unit='cpu'}) / sum without (unit) (boardbench_ops)"
        )
        assert share == pytest.approx(1 / 31)
        assert prometheus.query("up{job='boardbench'}")[0][1] == 1
        heartbeat = collector_pb2.Heartbeat(spool_pending=9)
        requests.put(collector_pb2.ReportRequest(heartbeat=heartbeat))
        wait_until(lambda: prometheus.query("boardbench_spool_pending == 9"), "the heartbeat is seen")
        answers.cancel()
        requests.put(None)

    # The stream is gone: first the board is down, then, after its time to live, it is not there at all.
    down = "min_over_time(boardbench_device_up[1m]) == 0"
    wait_until(lambda: prometheus.query(down), "the board is down")
    wait_until(lambda: not prometheus.query("boardbench_device_up"), "the board is gone")
    assert not prometheus.query("boardbench_latency_seconds")
    assert prometheus.query("boardbench_collector_open_streams")[0][1] == 0
    assert prometheus.query("up{job='boardbench'}")[0][1] == 1


def test_native_histograms_are_scraped_and_right(
    start_collector: Callable[..., Any],
    find_program: Callable[[str], str],
    make_result: MakeResult,
    make_hello: MakeHello,
    wait_until: Callable[..., None],
    tmp_path: Path,
    free_port: int,
) -> None:
    result = make_result()
    random = Random(11)
    samples = [int(1e7 * random.lognormvariate(0, 0.3)) for _ in range(20_000)]
    del result.latency.samples_nanoseconds[:]
    result.latency.samples_nanoseconds.extend(samples)
    collector = start_collector()
    with grpc.insecure_channel(collector.grpc_address) as channel:
        stub = collector_pb2_grpc.CollectorServiceStub(channel)
        messages = (
            collector_pb2.ReportRequest(hello=make_hello()),
            collector_pb2.ReportRequest(
                result=collector_pb2.SpooledResult(spool_id="spool-1", sequence=1, result=result)
            ),
        )
        assert [answer.WhichOneof("response") for answer in stub.Report(iter(messages))][
            -1
        ] == "acknowledgement"
    prometheus = Prometheus(
        find_program("prometheus"),
        tmp_path,
        free_port,
        collector.url.removeprefix("http://"),
        "--enable-feature=native-histograms",
    )
    try:
        name = "boardbench_latency_distribution_seconds"
        wait_until(lambda: prometheus.query(f"histogram_count({name})"), "the histogram is scraped")
        ((labels, count),) = prometheus.query(f"histogram_count({name})")
        assert (labels["model"], count) == ("mobilenet.tflite", len(samples))
        ((_, total),) = prometheus.query(f"histogram_sum({name})")
        assert total == pytest.approx(sum(samples) / 1e9)
        for share in (0.01, 0.5, 0.9, 0.99, 0.999):
            ((_, seconds),) = prometheus.query(f"histogram_quantile({share}, {name})")
            exact = sorted(samples)[int(share * len(samples))] / 1e9
            assert seconds == pytest.approx(exact, rel=2 ** (1 / 32) - 1), share
        # What has no exponential buckets comes with its classic ones, and everything else as ever.
        acknowledged = "boardbench_collector_acknowledge_seconds"
        assert prometheus.query(f"{acknowledged}_count")[0][1] == 1
        assert prometheus.query(f'{acknowledged}_bucket{{le="+Inf"}}')[0][1] == 1
        assert prometheus.query("boardbench_runs_total")[0][1] == 1
        assert prometheus.query("boardbench_device_info")[0][0]["soc"] == "bcm2712"
        assert prometheus.query("process_resident_memory_bytes{job='boardbench'}")[0][1] > 1e6
    finally:
        prometheus.stop()


def test_the_configuration_that_we_ship_is_valid(find_program: Callable[[str], str]) -> None:
    check = subprocess.run(
        [find_program("promtool"), "check", "config", str(CONFIGURATION)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr
