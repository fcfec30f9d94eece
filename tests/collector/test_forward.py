"""Remote write: to a scripted receiver, and to a real Prometheus and a real VictoriaMetrics."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import http.server
import json
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cramjam
import grpc
import pytest
from aiohttp import web
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from hypothesis import given
from hypothesis import strategies as st

from boardbench.collector.forward import (
    Answer,
    Forwarder,
    Pace,
    Unreachable,
    posting,
    receiver_of,
    snappy,
    snappy_literal,
)
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.v1 import collector_pb2, collector_pb2_grpc, result_pb2

MakeResult = Callable[..., result_pb2.RunResult]

QUICK = Pace(poll_seconds=0.05, first_retry_seconds=0.01, longest_retry_seconds=0.02)


def _write_request() -> Any:
    """Prometheus's WriteRequest, by its public field numbers (prompb/remote.proto, prompb/types.proto)."""
    file = descriptor_pb2.FileDescriptorProto(name="test_prompb.proto", package="testprom", syntax="proto3")
    kinds = {"double": 1, "int64": 3, "uint64": 4, "string": 9, "uint32": 13, "sint32": 17, "sint64": 18}

    def message(name: str, *fields: tuple[str, int, str, bool]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind, repeated in fields:
            more = {"type": kinds[kind]} if kind in kinds else {"type": 11, "type_name": f".testprom.{kind}"}
            made.field.add(name=field, number=number, label=3 if repeated else 1, **more)

    message("Label", ("name", 1, "string", False), ("value", 2, "string", False))
    message("Sample", ("value", 1, "double", False), ("timestamp", 2, "int64", False))
    message("BucketSpan", ("offset", 1, "sint32", False), ("length", 2, "uint32", False))
    message(
        "Histogram",
        ("count_int", 1, "uint64", False),
        ("sum", 3, "double", False),
        ("schema", 4, "sint32", False),
        ("zero_threshold", 5, "double", False),
        ("zero_count_int", 6, "uint64", False),
        ("positive_spans", 11, "BucketSpan", True),
        ("positive_deltas", 12, "sint64", True),
        ("reset_hint", 14, "int64", False),
        ("timestamp", 15, "int64", False),
    )
    message(
        "TimeSeries",
        ("labels", 1, "Label", True),
        ("samples", 2, "Sample", True),
        ("histograms", 4, "Histogram", True),
    )
    message("WriteRequest", ("timeseries", 1, "TimeSeries", True))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("testprom.WriteRequest"))


WriteRequest = _write_request()


class Receiver:
    """Takes what is posted to it and answers as it was told; at the end of the script with 204."""

    def __init__(self) -> None:
        self.script: list[Answer | Unreachable] = []
        self.posts: list[Any] = []
        self.judge: Callable[[Any], Answer] | None = None

    async def __call__(self, body: bytes) -> Answer:
        request = WriteRequest.FromString(bytes(cramjam.snappy.decompress_raw(body)))
        if self.script:
            said = self.script.pop(0)
            if isinstance(said, Unreachable):
                raise said
        else:
            said = self.judge(request) if self.judge is not None else Answer(204)
        if 200 <= said.status < 300:
            self.posts.append(request)
        return said

    def found(self, name: str, **labels: str) -> list[tuple[int, float]]:
        """(milliseconds, value) of every sample of the series that was taken."""
        wanted = {"__name__": name, **labels}
        return [
            (sample.timestamp, sample.value)
            for request in self.posts
            for series in request.timeseries
            if wanted.items() <= {label.name: label.value for label in series.labels}.items()
            for sample in series.samples
        ]


def stamps(request: Any) -> list[int]:
    return [sample.timestamp for series in request.timeseries for sample in series.samples]


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


async def until(forwarder: Forwarder, done: Callable[[], bool]) -> None:
    """Runs it until the condition holds."""
    task = asyncio.create_task(forwarder.run())
    deadline = time.monotonic() + 60
    try:
        while not done():
            assert time.monotonic() < deadline and not task.done(), forwarder.view()
            await asyncio.sleep(0.005)
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Following:
    """A forwarder over a store in memory, and the seconds that it wanted to sleep."""

    def __init__(self, receiver: Receiver, folder: Path, **more: Any) -> None:
        self.store = MemoryResultStore()
        self.slept: list[float] = []
        self.sequence = 0

        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)
            await asyncio.sleep(0.001)

        self.make = lambda: Forwarder(
            "http://user:secret@victoria:8428/api/v1/write",
            self.store,
            folder,
            receiver,
            pace=more.get("pace", QUICK),
            sleep=sleep,
            jitter=lambda: 0.5,
        )
        self.forwarder = self.make()

    async def add(self, *results: result_pb2.RunResult) -> None:
        for result in results:
            self.sequence += 1
            await self.store.append(result.board.device_id, "spool", self.sequence, result)

    async def until_done(self) -> None:
        """Runs until everything was dealt with."""
        position = (await self.store.news(0)).position
        await until(self.forwarder, lambda: self.forwarder._position >= position)


@pytest.fixture
def following(receiver: Receiver, tmp_path: Path) -> Following:
    return Following(receiver, tmp_path)


async def test_a_result_arrives_at_the_time_it_was_measured(
    following: Following, receiver: Receiver, make_result: MakeResult
) -> None:
    await following.add(
        make_result("run-1", finished=1_700_000_000.5, p50=0.01),
        make_result("run-2", finished=1_700_000_060.25, p50=0.02),
        make_result("run-3", status=result_pb2.RUN_STATUS_FAILED),
    )
    await following.until_done()
    (request,) = receiver.posts
    assert receiver.found("boardbench_latency_seconds", percentile="50") == [
        (1_700_000_000_500, 0.01),
        (1_700_000_060_250, 0.02),
    ]
    assert set(stamps(request)) == {1_700_000_000_500, 1_700_000_060_250}, (
        "the one that failed measured nothing"
    )
    for series in request.timeseries:
        names = [label.name for label in series.labels]
        assert names == sorted(names) and len(names) == len(set(names))
        assert all(label.value for label in series.labels)
        labels = {label.name: label.value for label in series.labels}
        assert labels["job"] == "boardbench_results" and labels["device"] == "pi5"
        times = [sample.timestamp for sample in series.samples]
        assert times == sorted(times)
    histograms = [histogram for series in request.timeseries for histogram in series.histograms]
    assert [histogram.timestamp for histogram in histograms] == [1_700_000_000_500, 1_700_000_060_250]
    assert {(histogram.schema, histogram.count_int, histogram.reset_hint) for histogram in histograms} == {
        (5, 100, 3)
    }
    view = following.forwarder.view()
    assert view.receiver == "victoria:8428"
    assert (view.samples, view.pending, view.up) == (len(stamps(request)), 0, True)


async def test_a_clock_that_is_ahead_does_not_write_into_the_future(
    following: Following, receiver: Receiver, make_result: MakeResult
) -> None:
    before = time.time()
    await following.add(make_result("run-1", finished=before + 1e8))
    await following.until_done()
    ((stamp, _),) = receiver.found("boardbench_latency_mean_seconds")
    assert before * 1000 - 1 <= stamp <= time.time() * 1000


async def test_a_restart_neither_leaves_out_nor_repeats(
    following: Following, receiver: Receiver, make_result: MakeResult
) -> None:
    await following.add(make_result("run-1", finished=1_700_000_000))
    await following.until_done()
    following.forwarder = following.make()
    await following.add(make_result("run-2", finished=1_700_000_060))
    await following.until_done()
    following.forwarder = following.make()
    await following.until_done()
    assert [stamp for stamp, _ in receiver.found("boardbench_latency_mean_seconds")] == [
        1_700_000_000_000,
        1_700_000_060_000,
    ]
    assert len(receiver.posts) == 2


async def test_one_that_ends_while_the_receiver_is_away_leaves_nothing_out(
    following: Following, receiver: Receiver, make_result: MakeResult
) -> None:
    await following.add(make_result("run-1"))
    receiver.script = [Unreachable("connection refused")] * 1000
    await until(following.forwarder, lambda: following.forwarder.view().retries > 2)
    receiver.script = []
    following.forwarder = following.make()
    await following.until_done()
    assert len(receiver.found("boardbench_latency_mean_seconds")) == 1


async def test_a_cursor_that_is_broken_or_beyond_the_store_begins_anew(
    following: Following, receiver: Receiver, make_result: MakeResult, tmp_path: Path
) -> None:
    await following.add(make_result("run-1", finished=1_700_000_000))
    await following.until_done()
    for content in ("{", '{"position": 99}'):
        following.forwarder._cursor.write_text(content)
        following.forwarder = following.make()
        count = len(receiver.posts)
        await until(following.forwarder, lambda count=count: len(receiver.posts) > count)
    assert len(receiver.found("boardbench_latency_mean_seconds")) == 3


async def test_a_receiver_that_is_busy_or_away_gets_everything_later(
    following: Following, receiver: Receiver, make_result: MakeResult
) -> None:
    receiver.script = [
        Answer(429, "slow down", 3.0),
        Answer(503, "", None),
        Unreachable("connection refused"),
        Answer(401, "no credentials"),
        Answer(500, "disk full"),
    ]
    await following.add(make_result("run-1"))
    await following.until_done()
    waits = [seconds for seconds in following.slept if seconds != QUICK.poll_seconds]
    assert waits == [3.005, 0.01, 0.01, 0.01, 0.01], "half of each pause, and all of what was asked for"
    view = following.forwarder.view()
    assert (view.retries, view.dropped, view.up) == (5, {}, True)
    assert len(receiver.found("boardbench_latency_mean_seconds")) == 1


async def test_what_nobody_expected_is_told_and_tried_again(
    following: Following, receiver: Receiver, make_result: MakeResult, caplog: pytest.LogCaptureFixture
) -> None:
    def judge(_request: Any) -> Answer:
        receiver.judge = None
        raise RuntimeError("a receiver of another world")

    receiver.judge = judge
    await following.add(make_result("run-1"))
    await following.until_done()
    assert len(receiver.found("boardbench_latency_mean_seconds")) == 1
    assert following.forwarder.view().retries == 1
    assert "a receiver of another world" in caplog.text


def _of(limit: int) -> Callable[[Any], Answer]:
    """A receiver that takes nothing older than the limit, and says so as Prometheus does."""

    def judge(request: Any) -> Answer:
        return Answer(500, "too old sample") if min(stamps(request)) < limit else Answer(204)

    return judge


@pytest.mark.parametrize("old", [0, 1, 2, 31, 63, 64])
async def test_what_is_too_old_is_dropped_and_counted_and_the_rest_is_taken(
    following: Following, receiver: Receiver, make_result: MakeResult, old: int
) -> None:
    begin = 1_700_000_000
    order = [(n * 37) % 64 for n in range(64)]
    await following.add(*(make_result(f"run-{n}", finished=begin + n) for n in order))
    receiver.judge = _of((begin + old) * 1000)
    await following.until_done()
    taken = sorted(stamp for stamp, _ in receiver.found("boardbench_latency_mean_seconds"))
    assert taken == [(begin + n) * 1000 for n in range(old, 64)]
    view = following.forwarder.view()
    each = view.samples // (64 - old) if old < 64 else view.dropped["too_old"] // 64
    assert view.dropped == ({"too_old": each * old} if old else {})
    assert view.samples == each * (64 - old)
    assert view.retries == 0


async def test_one_that_conflicts_does_not_hold_up_the_others(
    following: Following, receiver: Receiver, make_result: MakeResult
) -> None:
    def judge(request: Any) -> Answer:
        bad = 1_700_000_013_000 in stamps(request)
        return Answer(400, "duplicate sample for timestamp") if bad else Answer(200)

    receiver.judge = judge
    await following.add(*(make_result(f"run-{n}", finished=1_700_000_000 + n) for n in range(30)))
    await following.until_done()
    assert len(receiver.found("boardbench_latency_mean_seconds")) == 29
    view = following.forwarder.view()
    assert set(view.dropped) == {"conflict"} and view.samples == 29 * view.dropped["conflict"]


async def test_a_body_that_is_too_large_goes_in_parts(
    following: Following, receiver: Receiver, make_result: MakeResult
) -> None:
    def judge(request: Any) -> Answer:
        return Answer(413, "request body too large") if len(set(stamps(request))) > 3 else Answer(204)

    receiver.judge = judge
    await following.add(*(make_result(f"run-{n}", finished=1_700_000_000 + n) for n in range(10)))
    await following.until_done()
    assert len(receiver.found("boardbench_latency_mean_seconds")) == 10
    view = following.forwarder.view()
    assert (view.dropped, view.retries, view.up) == ({}, 0, True)


async def test_a_receiver_without_native_histograms_gets_the_rest(
    following: Following, receiver: Receiver, make_result: MakeResult
) -> None:
    asked: list[bool] = []

    def judge(request: Any) -> Answer:
        native = any(series.histograms for series in request.timeseries)
        asked.append(native)
        return Answer(500, "native histograms are disabled") if native else Answer(204)

    receiver.judge = judge
    await following.add(make_result("run-1", finished=1_700_000_000))
    await following.until_done()
    await following.add(make_result("run-2", finished=1_700_000_060))
    await following.until_done()
    assert asked == [True, False, False]
    assert following.forwarder.view().dropped == {}
    assert len(receiver.found("boardbench_latency_distribution_seconds_count")) == 2


async def test_the_next_is_made_ready_while_a_receiver_works_on_what_it_has(
    receiver: Receiver, make_result: MakeResult, tmp_path: Path
) -> None:
    following = Following(receiver, tmp_path, pace=dataclasses.replace(QUICK, batch_results=1))
    await following.add(*(make_result(f"run-{turn}") for turn in range(3)))
    asked: list[int] = []
    arrivals = following.store.arrivals

    async def noted(after: int, **more: Any) -> Any:
        asked.append(after)
        return await arrivals(after, **more)

    following.store.arrivals = noted  # type: ignore[method-assign]
    goes_on = asyncio.Event()

    class Slow(Receiver):
        async def __call__(self, body: bytes) -> Answer:
            await goes_on.wait()
            return await super().__call__(body)

    slow = Slow()
    following.forwarder._post = slow
    await until(following.forwarder, lambda: len(asked) == 2)
    assert slow.posts == [] and following.forwarder._position == 0, "it is still waiting for the first"
    goes_on.set()
    await following.until_done()
    assert len(slow.posts) == 3, "each once, in posts of their own"


async def test_a_store_that_is_set_back_while_it_runs_is_sent_again(
    receiver: Receiver, make_result: MakeResult, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    following = Following(receiver, tmp_path)
    await following.add(*(make_result(f"run-{turn}") for turn in range(3)))
    await following.until_done()
    following.store = following.forwarder._store = MemoryResultStore()
    slept = len(following.slept)
    await until(following.forwarder, lambda: len(following.slept) > slept + 5)
    assert following.forwarder._position == 0
    assert caplog.text.count("the store was set back") == 1, "told once, not at every look"
    receiver.posts.clear()
    following.forwarder = following.make()
    await following.add(*(make_result(f"run-{turn}") for turn in range(4)))
    await following.until_done()
    assert len(receiver.found("boardbench_latency_mean_seconds")) == 4, (
        "also after a restart, of more than it had"
    )
    assert following.forwarder.view().pending == 0


async def test_posts_are_of_the_size_that_receivers_like(
    receiver: Receiver, make_result: MakeResult, tmp_path: Path
) -> None:
    following = Following(receiver, tmp_path, pace=Pace(batch_samples=300, poll_seconds=0.01))
    await following.add(*(make_result(f"run-{n}", finished=1_700_000_000 + n) for n in range(20)))
    await following.until_done()
    sizes = [len(stamps(request)) for request in receiver.posts]
    assert len(receiver.found("boardbench_latency_mean_seconds")) == 20
    assert all(300 <= size < 500 for size in sizes[:-1])


@given(st.binary(max_size=200_000))
def test_snappy_without_a_library_is_read_by_one(content: bytes) -> None:
    assert bytes(cramjam.snappy.decompress_raw(snappy_literal(content))) == content
    assert bytes(cramjam.snappy.decompress_raw(snappy(content))) == content


def test_credentials_are_never_shown() -> None:
    assert receiver_of("https://user:secret@mimir.lab:9009/api/v1/push") == "mimir.lab:9009"


async def test_posting_over_http() -> None:
    seen: list[tuple[dict[str, str], bytes]] = []
    answers = iter(
        (
            web.Response(status=204),
            web.Response(status=429, text="slow", headers={"Retry-After": "7"}),
            web.Response(status=503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
            web.Response(status=503, headers={"Retry-After": "soon"}),
            web.Response(status=302, headers={"Location": "http://elsewhere/"}),
        )
    )

    async def take(request: web.Request) -> web.Response:
        seen.append((dict(request.headers), await request.read()))
        return next(answers)

    app = web.Application()
    app.router.add_post("/api/v1/write", take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    url = f"http://user:secret@127.0.0.1:{port}/api/v1/write"
    async with posting(url, {"X-Scope-OrgID": "lab"}) as post:
        assert await post(b"body") == Answer(204, "", None)
        assert await post(b"") == Answer(429, "slow", 7.0)
        assert (await post(b"")).retry_after_seconds == 0.0
        assert (await post(b"")).retry_after_seconds is None
        assert (await post(b"")).status == 302
        await runner.cleanup()
        with pytest.raises(Unreachable):
            await post(b"")
    headers, body = seen[0]
    assert body == b"body"
    assert headers["Content-Encoding"] == "snappy"
    assert headers["X-Prometheus-Remote-Write-Version"] == "0.1.0"
    assert headers["X-Scope-OrgID"] == "lab"
    assert headers["Authorization"] == "Basic " + base64.b64encode(b"user:secret").decode()


def test_a_collector_sends_on_what_boards_report(
    start_collector: Callable[..., Any],
    make_hello: Callable[..., collector_pb2.Hello],
    make_result: MakeResult,
    wait_until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[dict[str, str], Any]] = []

    class Take(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            seen.append(
                (dict(self.headers), WriteRequest.FromString(bytes(cramjam.snappy.decompress_raw(body))))
            )
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Take)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    receiver = f"127.0.0.1:{server.server_address[1]}"
    monkeypatch.setenv("BOARDBENCH_COLLECTOR_REMOTE_WRITE", f"http://{receiver}/write")
    monkeypatch.setenv(
        "BOARDBENCH_COLLECTOR_REMOTE_WRITE_HEADER", "Authorization=Bearer to ken\nX-Tenant=lab"
    )
    try:
        for turn in (1, 2):
            collector = start_collector()
            result = make_result(f"run-{turn}", finished=1_700_000_000 + turn)
            requests = (
                collector_pb2.ReportRequest(hello=make_hello()),
                collector_pb2.ReportRequest(
                    result=collector_pb2.SpooledResult(spool_id="spool-1", sequence=turn, result=result)
                ),
            )
            with grpc.insecure_channel(collector.grpc_address) as channel:
                stub = collector_pb2_grpc.CollectorServiceStub(channel)
                list(stub.Report(iter(requests)))
            wait_until(lambda turn=turn: len(seen) == turn, "the result is sent on")
            shown = f'boardbench_collector_forward_up{{receiver="{receiver}"}} 1\n'
            wait_until(lambda get=collector.get, shown=shown: shown in get("/metrics"), "and that is told")
            assert collector.stop() == 0
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    for turn, (headers, request) in enumerate(seen, 1):
        assert headers["Authorization"] == "Bearer to ken" and headers["X-Tenant"] == "lab"
        assert set(stamps(request)) == {(1_700_000_000 + turn) * 1000}


# Real receivers.


class Database:
    """A program that takes remote write and answers PromQL."""

    def __init__(self, arguments: list[str], url: str, log: Path) -> None:
        self.url = url
        self._log = log.open("wb")
        self.process = subprocess.Popen(arguments, stdout=self._log, stderr=self._log)

    def query(self, promql: str, at: float) -> list[tuple[dict[str, str], float]]:
        """(labels, value) of what the query gives at a time; nothing while it can't answer."""
        question = urllib.parse.urlencode({"query": promql, "time": f"{at:.3f}", "nocache": 1})
        try:
            with urllib.request.urlopen(f"{self.url}/api/v1/query?{question}", timeout=10) as answer:
                found = json.load(answer)
        except (OSError, urllib.error.URLError):
            return []
        return [(entry["metric"], float(entry["value"][1])) for entry in found["data"]["result"]]

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(30)
        self._log.close()


def _port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _ready(url: str, path: str) -> bool:
    try:
        with urllib.request.urlopen(url + path, timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.fixture
def start_prometheus(
    find_program: Callable[[str], str], tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Callable[..., Database]]:
    started: list[Database] = []

    def start(*arguments: str, window: str = "1h") -> Database:
        port = _port()
        configuration = tmp_path / "prometheus.yml"
        configuration.write_text(
            json.dumps({"storage": {"tsdb": {"out_of_order_time_window": window}}}) + "\n"
        )
        database = Database(
            [
                find_program("prometheus"),
                f"--config.file={configuration}",
                f"--storage.tsdb.path={tmp_path / 'tsdb'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--web.enable-remote-write-receiver",
                *arguments,
            ],
            f"http://127.0.0.1:{port}",
            tmp_path / "prometheus.log",
        )
        started.append(database)
        wait_until(lambda: _ready(database.url, "/-/ready"), "Prometheus is ready")
        return database

    yield start
    for database in started:
        database.stop()


@pytest.fixture
def victoria(
    find_program: Callable[[str], str], tmp_path: Path, wait_until: Callable[..., None]
) -> Iterator[Database]:
    port = _port()
    database = Database(
        [
            find_program("victoria-metrics"),
            f"-storageDataPath={tmp_path / 'victoria'}",
            f"-httpListenAddr=127.0.0.1:{port}",
            "-retentionPeriod=1",
            "-search.latencyOffset=0s",
        ],
        f"http://127.0.0.1:{port}",
        tmp_path / "victoria.log",
    )
    wait_until(lambda: _ready(database.url, "/health"), "VictoriaMetrics is ready")
    yield database
    database.stop()


class Sending:
    """A forwarder to a real receiver."""

    def __init__(self, url: str, folder: Path) -> None:
        self.url = url
        self.folder = folder
        self.store = MemoryResultStore()
        self.sequence = 0

    async def __call__(self, *results: result_pb2.RunResult) -> Any:
        """Sends these and returns how it went."""
        for result in results:
            self.sequence += 1
            await self.store.append(result.board.device_id, "spool", self.sequence, result)
        position = (await self.store.news(0)).position
        async with posting(self.url, {}) as post:
            forwarder = Forwarder(self.url, self.store, self.folder, post, pace=QUICK)
            await until(forwarder, lambda: forwarder._position >= position)
            return forwarder.view()


async def test_prometheus_has_results_where_they_were_measured(
    start_prometheus: Callable[..., Database], make_result: MakeResult, tmp_path: Path
) -> None:
    prometheus = await asyncio.to_thread(start_prometheus, "--enable-feature=native-histograms")
    send = Sending(prometheus.url + "/api/v1/write", tmp_path)
    now = int(time.time())
    ages = (1800, 1200, 600)
    view = await send(*(make_result(f"run-{age}", finished=now - age, p50=age / 1e5) for age in ages))
    assert view.dropped == {} and view.samples == 3 * 63
    query = 'boardbench_latency_seconds{percentile="50",job="boardbench_results"}'
    for age in ages:
        ((labels, p50),) = await asyncio.to_thread(prometheus.query, query, now - age + 1)
        assert p50 == age / 1e5
        assert (labels["device"], labels["model"]) == ("pi5", "mobilenet.tflite")
        native = "histogram_quantile(0.5, boardbench_latency_distribution_seconds)"
        ((_, median),) = await asyncio.to_thread(prometheus.query, native, now - age + 1)
        assert median == pytest.approx(age / 1e5, rel=0.023)
        classic = 'boardbench_latency_distribution_seconds_bucket{le="+Inf"}'
        ((_, count),) = await asyncio.to_thread(prometheus.query, classic, now - age + 1)
        assert count == 100
    assert not await asyncio.to_thread(prometheus.query, query, now - 2400)
    # Another board comes online with older ones: some within the window for what is out of order, some not.
    late = [
        make_result(f"late-{age}", device_id="pi4", finished=now - age, p50=age / 1e5)
        for age in (20_000, 15_000, 9_000, 3_000, 2_000)
    ]
    view = await send(*late)
    each = view.samples // 2
    assert view.samples == 2 * each and view.dropped == {"too_old": 3 * each}
    board = query.replace("{", '{device="pi4",')
    for age in (3_000, 2_000):
        ((_, p50),) = await asyncio.to_thread(prometheus.query, board, now - age + 1)
        assert p50 == age / 1e5
    # Nothing is sent a second time after a restart; and were it, Prometheus would not mind.
    assert (await send()).samples == 0


async def test_prometheus_without_native_histograms_and_without_a_window(
    start_prometheus: Callable[..., Database], make_result: MakeResult, tmp_path: Path
) -> None:
    prometheus = await asyncio.to_thread(start_prometheus, window="0s")
    send = Sending(prometheus.url + "/api/v1/write", tmp_path)
    now = int(time.time())
    view = await send(make_result("run-1", finished=now - 60))
    assert view.dropped == {} and view.samples > 60
    view = await send(
        make_result("run-2", finished=now - 120), make_result("run-3", finished=now - 30, p50=0.5)
    )
    assert set(view.dropped) == {"out_of_order"}
    query = 'boardbench_latency_seconds{percentile="50"}'
    ((_, p50),) = await asyncio.to_thread(prometheus.query, query, now - 29)
    assert p50 == 0.5
    assert not await asyncio.to_thread(prometheus.query, query, now - 100)


async def test_victoria_metrics_has_results_where_they_were_measured(
    victoria: Database, make_result: MakeResult, tmp_path: Path
) -> None:
    send = Sending(victoria.url + "/api/v1/write", tmp_path)
    now = int(time.time())
    ages = (7200, 1800, 600)
    view = await send(*(make_result(f"run-{age}", finished=now - age, p50=age / 1e6) for age in ages))
    assert view.dropped == {}

    def flushed() -> bool:
        with urllib.request.urlopen(victoria.url + "/internal/force_flush", timeout=10):
            return True

    await asyncio.to_thread(flushed)
    for age in ages:
        query = 'boardbench_latency_seconds{percentile="50"}'
        ((_, p50),) = await asyncio.to_thread(victoria.query, query, now - age + 1)
        assert p50 == pytest.approx(age / 1e6)
        count = "boardbench_latency_distribution_seconds_count"
        ((_, samples),) = await asyncio.to_thread(victoria.query, count, now - age + 1)
        assert samples == 100
