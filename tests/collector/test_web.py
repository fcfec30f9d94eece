"""HTTP over a real socket: JSON and its errors, negotiation, headers, the page."""

from __future__ import annotations

import gzip
from collections.abc import AsyncIterator, Callable
from html.parser import HTMLParser
from typing import Any

import aiohttp
import pytest
from google.protobuf import json_format

from boardbench.collector.errors import StoreUnavailable
from boardbench.collector.jobs import Batch, Booking, cancelled, new_record
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.v1 import job_pb2, placement_pb2, result_pb2, scenario_pb2

MakeResult = Callable[..., result_pb2.RunResult]


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(auto_decompress=False) as session:
        yield session


@pytest.fixture
async def filled(collector: Any, make_result: MakeResult) -> AsyncIterator[Any]:
    """A collector with one connected board and five results."""
    board = collector.board()
    await board.join()
    onnx = {"model": "net.onnx", "sha256": "feed" * 16, "runtime": "onnxruntime"}
    await board.send(1, make_result("run-1", finished=1e9 + 1))
    await board.send(2, make_result("run-2", finished=1e9 + 2))
    await board.send(3, make_result("run-3", finished=1e9 + 3, **onnx))
    await board.send(4, make_result("run-4", finished=1e9 + 4, status=result_pb2.RUN_STATUS_FAILED, **onnx))
    await board.send(5, make_result("odd/run 5", finished=1e9 + 5, status=result_pb2.RUN_STATUS_CANCELLED))
    await board.acknowledged(5)
    yield collector
    await board.leave()


async def test_devices(filled: Any, http: aiohttp.ClientSession) -> None:
    async with http.get(filled.url + "/api/v1/devices") as answer:
        assert answer.status == 200
        assert answer.content_type == "application/json"
        (device,) = (await answer.json())["devices"]
    assert device["board"]["device_id"] == "pi5"
    assert device["up"] is True
    assert device["results"] == "5"
    assert device["runtimes"][1]["reason"].startswith("not installed")


async def test_a_result_is_protobufs_json_with_the_protos_names(
    filled: Any, http: aiohttp.ClientSession, make_result: MakeResult
) -> None:
    async with http.get(filled.url + "/api/v1/results/run-1") as answer:
        assert answer.status == 200
        text = await answer.text()
    assert json_format.Parse(text, result_pb2.RunResult()) == make_result("run-1", finished=1e9 + 1)
    assert '"create_seconds"' in text
    assert '"samples_nanoseconds"' in text


async def test_a_run_is_named_by_its_first_digits_and_may_need_quoting(
    filled: Any, http: aiohttp.ClientSession
) -> None:
    for path, run_id in (("odd", "odd/run 5"), ("odd%2Frun%205", "odd/run 5"), ("run-3", "run-3")):
        async with http.get(f"{filled.url}/api/v1/results/{path}") as answer:
            assert answer.status == 200
            assert (await answer.json())["run_id"] == run_id


@pytest.mark.parametrize(
    ("query", "runs"),
    [
        ("", "5 4 3 2 1"),
        ("device=pi5", "5 4 3 2 1"),
        ("device=pi4", ""),
        ("model=net.onnx", "4 3"),
        ("model=feed", "4 3"),
        ("runtime=tflite", "5 2 1"),
        ("status=succeeded", "3 2 1"),
        ("status=RUN_STATUS_FAILED", "4"),
        ("status=cancelled&runtime=tflite", "5"),
        ("since=2001-09-09T01:46:43Z", "5 4 3"),
        ("since=2001-09-09T03:46:43.5%2B02:00", "5 4"),
        ("page_size=2", "5 4"),
        ("page_size=1000&summary=true", "5 4 3 2 1"),
    ],
)
async def test_filters(filled: Any, http: aiohttp.ClientSession, query: str, runs: str) -> None:
    async with http.get(f"{filled.url}/api/v1/results?{query}") as answer:
        assert answer.status == 200
        listing = await answer.json()
    found = [result["run_id"][-1] for result in listing.get("results", [])]
    assert " ".join(found) == runs


async def test_pages(filled: Any, http: aiohttp.ClientSession) -> None:
    seen: list[str] = []
    token = ""
    for _ in range(5):
        parameters = {"page_size": "2", "summary": "1", "page_token": token}
        async with http.get(filled.url + "/api/v1/results", params=parameters) as answer:
            listing = await answer.json()
        seen += [result["run_id"] for result in listing["results"]]
        assert "samples_nanoseconds" not in str(listing)
        token = listing.get("next_page_token", "")
        if not token:
            break
    assert seen == ["odd/run 5", "run-4", "run-3", "run-2", "run-1"]


@pytest.mark.parametrize(
    ("path", "status", "code", "word"),
    [
        ("/api/v1/results?modle=x", 400, "invalid_request", "no parameter 'modle'; it takes device, model"),
        ("/api/v1/results?model=x&model=y", 400, "invalid_request", "more than once"),
        ("/api/v1/results?status=fine", 400, "invalid_request", "succeeded, failed or cancelled"),
        ("/api/v1/results?status=unspecified", 400, "invalid_request", "succeeded, failed or cancelled"),
        ("/api/v1/results?since=yesterday", 400, "invalid_request", "2026-01-31T12:00:00Z"),
        ("/api/v1/results?page_size=0", 400, "invalid_request", "1 to 1000"),
        ("/api/v1/results?page_size=1001", 400, "invalid_request", "1 to 1000"),
        ("/api/v1/results?page_size=-1", 400, "invalid_request", "1 to 1000"),
        ("/api/v1/results?page_size=%D9%A3", 400, "invalid_request", "1 to 1000"),
        ("/api/v1/results?summary=maybe", 400, "invalid_request", "true or false"),
        ("/api/v1/results?page_token=zzz", 400, "invalid_request", "page_token"),
        ("/api/v1/results/nope", 404, "not_found", "no run is named 'nope'"),
        ("/api/v1/results/run", 400, "ambiguous", "several runs begin with 'run'"),
        ("/api/v1/results/run-1?x=1", 400, "invalid_request", "it takes none"),
        ("/api/v1/devices?x=1", 400, "invalid_request", "it takes on"),
        ("/api/v1/devices?on=pi5", 400, "invalid_request", "'pi5' is no term"),
        ("/api/v1/jobs?state=fine", 400, "invalid_request", "queued, leased, running, done, cancelled"),
        ("/api/v1/jobs?state=unspecified", 400, "invalid_request", "write queued"),
        ("/api/v1/jobs?page_size=0", 400, "invalid_request", "1 to 1000"),
        ("/api/v1/jobs?page_token=zzz", 400, "invalid_request", "page_token"),
        ("/api/v1/jobs/nope", 404, "not_found", "no job is named 'nope'"),
        ("/api/v2/devices", 404, "not_found", "nothing at /api/v2/devices"),
        ("/etc/passwd", 404, "not_found", "nothing at"),
    ],
)
async def test_errors_are_json_with_a_fitting_status(
    filled: Any, http: aiohttp.ClientSession, path: str, status: int, code: str, word: str
) -> None:
    async with http.get(filled.url + path) as answer:
        error = (await answer.json())["error"]
        assert (answer.status, error["code"]) == (status, code)
        assert word in error["message"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_only_reading_is_answered(collector: Any, http: aiohttp.ClientSession) -> None:
    async with http.post(collector.url + "/api/v1/devices", data=b"x") as answer:
        assert answer.status == 405
        assert answer.headers["Allow"] == "GET, HEAD"
        assert (await answer.json())["error"]["code"] == "method_not_allowed"
    async with http.head(collector.url + "/metrics") as answer:
        assert answer.status == 200


async def test_metrics_are_negotiated(filled: Any, http: aiohttp.ClientSession) -> None:
    async def get(**headers: str) -> tuple[bytes, Any]:
        async with http.get(filled.url + "/metrics", headers=headers) as answer:
            assert answer.status == 200
            return await answer.read(), answer.headers

    plain, headers = await get(**{"Accept-Encoding": "identity"})
    assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
    assert "Content-Encoding" not in headers
    assert b'boardbench_latency_seconds{device="pi5",model="mobilenet.tflite"' in plain
    assert b'boardbench_runs_total{device="pi5",status="failed"} 1\n' in plain
    assert b'boardbench_device_up{device="pi5"} 1\n' in plain
    assert b"boardbench_collector_results_stored_total 5\n" in plain
    assert b"process_resident_memory_bytes " in plain
    assert b"run-" not in plain, "no run's identity is a label"

    zipped, headers = await get(**{"Accept-Encoding": "br;q=1.0, gzip;q=0.5"})
    assert headers["Content-Encoding"] == "gzip"
    assert "Accept-Encoding" in headers["Vary"]
    assert len(zipped) < len(plain) / 4
    assert gzip.decompress(zipped).splitlines()[0] == plain.splitlines()[0]

    refused, headers = await get(**{"Accept-Encoding": "gzip;q=0"})
    assert "Content-Encoding" not in headers
    assert refused.startswith(b"# HELP")

    _, headers = await get(Accept="application/openmetrics-text;version=1.0.0,*/*;q=0.1")
    assert headers["Content-Type"].startswith("application/openmetrics-text")


async def test_health(collector: Any, http: aiohttp.ClientSession) -> None:
    async with http.get(collector.url + "/healthz") as answer:
        assert answer.status == 200
        assert (await answer.json())["status"] == "ok"


async def test_a_store_that_takes_no_write_is_not_healthy(
    collector_over: Any, http: aiohttp.ClientSession
) -> None:
    class FullStore(MemoryResultStore):
        async def probe(self) -> None:
            raise StoreUnavailable("no space left for results.db")

    async with collector_over(FullStore()) as collector, http.get(collector.url + "/healthz") as answer:
        assert answer.status == 503
        assert (await answer.json())["error"] == {
            "code": "store_unavailable",
            "message": "no space left for results.db",
        }


async def test_what_breaks_inside_is_not_shown_outside(
    collector_over: Any, http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenStore(MemoryResultStore):
        async def devices(self) -> Any:
            raise RuntimeError("secret path /home/alice")

    async with (
        collector_over(BrokenStore()) as collector,
        http.get(collector.url + "/api/v1/devices") as answer,
    ):
        assert answer.status == 500
        assert "secret" not in await answer.text()
    assert "secret path" in caplog.text


async def test_every_answer_has_the_headers_that_protect_a_browser(
    collector: Any, http: aiohttp.ClientSession
) -> None:
    for path in ("/", "/style.css", "/metrics", "/healthz", "/api/v1/devices", "/nope"):
        async with http.get(collector.url + path) as answer:
            assert answer.headers["X-Content-Type-Options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
            assert answer.headers["X-Frame-Options"] == "DENY"
            assert "aiohttp" not in answer.headers["Server"]


class _Page(HTMLParser):
    """Collects what a page loads, what it shows, and complains about tags that don't close."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name == "href" and value]
        if tag not in {"meta", "link"}:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def finish(self) -> None:
        self.close()
        assert not self._open


async def _page(http: aiohttp.ClientSession, url: str) -> _Page:
    async with http.get(url + "/") as answer:
        assert answer.status == 200
        assert answer.content_type == "text/html"
        page = _Page()
        page.feed(await answer.text())
        page.finish()
        return page


async def test_the_page_of_an_empty_collector_says_what_to_do(
    collector: Any, http: aiohttp.ClientSession
) -> None:
    page = await _page(http, collector.url)
    assert "boardbench-agent serve" in page.text
    assert "boardbench push" in page.text


async def test_the_page_shows_boards_and_results(filled: Any, http: aiohttp.ClientSession) -> None:
    page = await _page(http, filled.url)
    for word in (
        "Raspberry Pi 5 Model B Rev 1.0",
        "connected",
        "mobilenet.tflite",
        "12.500 ms",
        "30 cpu delegate, 1 cpu",
        "succeeded, 1 doubt",
        "high_load",
        "worker_killed",
        "cancelled",
    ):
        assert word in page.text
    for link in page.links:
        async with http.get(filled.url + link) as answer:
            assert answer.status == 200, link


async def test_long_texts_dont_push_the_figures_off_the_page(
    collector: Any, http: aiohttp.ClientSession, make_result: MakeResult
) -> None:
    board = collector.board()
    await board.join()
    name = f"{'mobilenet_' * 20}.tflite"
    result = make_result("run-1", model=name)
    result.warnings.add(code="preempted")
    await board.send(1, result)
    await board.acknowledged(1)
    async with http.get(collector.url) as answer:
        text = await answer.text()
    assert f'<td class="long">{name}</td>' in text
    _, _, row = text.partition(f"{name}</td>")
    assert row.index("12.500 ms") < row.index("preempted"), "the figures come before what may be long"
    async with http.get(collector.url + "/style.css") as answer:
        assert "td.long { min-width: 8rem; overflow-wrap: anywhere; }" in await answer.text()
    await board.leave()


async def test_a_board_stays_on_one_line_unless_it_is_long(
    collector: Any, http: aiohttp.ClientSession, make_result: MakeResult
) -> None:
    names = ("rack-7-pi-03", "rack-7-" * 10 + "pi-03")
    for name in names:
        board = collector.board(device_id=name)
        await board.join()
        await board.send(1, make_result(f"run-{name}", device_id=name))
        await board.acknowledged(1)
        await board.leave()
    async with http.get(collector.url) as answer:
        text = await answer.text()
    for kind, name in zip((' class="whole"', ""), names, strict=True):
        assert text.count(f"<td><code{kind}>{name}</code></td>") == 2, "with the boards and with the results"
    async with http.get(collector.url + "/style.css") as answer:
        assert ".whole { white-space: nowrap; }" in await answer.text()


async def test_what_strangers_say_is_shown_as_text(
    collector: Any, http: aiohttp.ClientSession, make_result: MakeResult
) -> None:
    evil = "<script>alert(1)</script>\"'&"
    board = collector.board(device_id=evil)
    board.hello.board.model = evil
    board.hello.runtimes[0].name = evil
    await board.join()
    result = make_result('"><script>', device_id=evil, model=evil, runtime=evil)
    result.warnings.add(code=evil)
    result.standins.append(evil)
    await board.send(1, result)
    failed = make_result("run-2", status=result_pb2.RUN_STATUS_FAILED)
    failed.error.code = evil
    await board.send(2, failed)
    await board.acknowledged(2)
    page = await _page(http, collector.url)
    assert "script" not in page.tags
    assert page.text.count(evil) >= 6
    async with http.get(collector.url + "/api/v1/devices") as answer:
        assert (await answer.json())["devices"][0]["board"]["device_id"] == evil
    await board.leave()


async def test_an_odd_result_does_not_break_the_page(collector: Any, http: aiohttp.ClientSession) -> None:
    board = collector.board()
    await board.join()
    odd = result_pb2.RunResult(run_id="odd", status=77)  # type: ignore[arg-type]
    odd.placement.evidence = 2
    odd.placement.units.add(unit=99, ops=4)  # type: ignore[arg-type]
    odd.finished_at.seconds = -62135596800
    await board.send(1, odd)
    await board.acknowledged(1)
    page = await _page(http, collector.url)
    assert "not known" in page.text
    assert "4 unknown" in page.text
    await board.leave()


async def test_another_scenario_is_told_beside_the_engine(
    collector: Any, http: aiohttp.ClientSession, make_result: MakeResult
) -> None:
    result = make_result("run-1")
    result.spec.scenario.kind = scenario_pb2.SCENARIO_KIND_PERIODIC
    result.spec.scenario.rate_hertz = 30
    result.validity = result_pb2.VALIDITY_DOUBTFUL
    board = collector.board()
    await board.join()
    await board.send(1, result)
    await board.acknowledged(1)
    page = await _page(http, collector.url)
    assert "scenario=periodic, rate_hertz=30" in page.text
    assert "doubtful: 1 doubt" in page.text
    await board.leave()


async def test_what_had_the_part_of_hardware_is_named(
    collector: Any, http: aiohttp.ClientSession, make_result: MakeResult
) -> None:
    emulated = make_result("run-1")
    emulated.validity = result_pb2.VALIDITY_INVALID
    emulated.standins[:] = ["qemu", "<b>"]
    board = collector.board()
    await board.join()
    await board.send(1, emulated)
    await board.acknowledged(1)
    page = await _page(http, collector.url)
    assert "succeeded, INVALID: not hardware but qemu, <b>" in page.text
    recorded = make_result("run-2")
    recorded.validity = result_pb2.VALIDITY_INVALID
    recorded.standins[:] = ["recorded-sensors"]
    await board.send(2, recorded)
    await board.acknowledged(2)
    page = await _page(http, collector.url)
    assert "succeeded, INVALID, sensors of a folder" in page.text
    await board.leave()


async def test_the_page_tells_where_it_ran_and_what_that_cost(
    collector: Any, http: aiohttp.ClientSession, make_result: MakeResult
) -> None:
    board = collector.board()
    await board.join()
    verdicts = placement_pb2.PlacementVerdict
    for number, verdict in enumerate(("ACCELERATED", "PARTLY", "NOT_ACCELERATED", "CONTRADICTED"), 1):
        result = make_result(f"run-{number}")
        result.spec.device = "edgetpu"
        result.placement.verdict = verdicts.Value(f"PLACEMENT_VERDICT_{verdict}")
        await board.send(number, result)
    standin = make_result("run-5")
    standin.spec.device, standin.placement.standin = "edgetpu", True
    standin.placement.verdict = placement_pb2.PLACEMENT_VERDICT_PARTLY
    cost = standin.placement.fallback_cost
    cost.share, cost.share_low, cost.share_high = 0.34, 0.31, 0.37
    await board.send(5, standin)
    await board.send(6, make_result("run-6"))
    await board.acknowledged(6)
    page = await _page(http, collector.url)
    cells = " ".join(page.text.split())
    for words in ("yes", "partly", "contradicted", "stand-in: partly", "34% (31%–37%)", "not asked for"):
        assert words in cells, words
    await board.leave()


async def _queue(collector: Any, *job_ids: str, **job: Any) -> None:
    """Queues jobs for pi5 that nobody hands out."""
    records = [
        new_record(
            job_pb2.Job(job_id=job_id, batch_id="b1", device_id="pi5", max_attempts=3, **job),
            at=1.7e9,
            deadline=4e9,
            inputs=None,
        )
        for job_id in job_ids
    ]
    await collector.store.jobs.submit(Batch("b1", "digest", 1.7e9), records)


async def test_jobs(collector: Any, http: aiohttp.ClientSession) -> None:
    names = [f"{number:02d}" * 10 for number in (1, 2, 3)]
    await _queue(collector, *names, holder="ann")
    await collector.store.jobs.change({names[1]: lambda record: cancelled(record, "no need", 1.7e9)})

    async def get(query: str) -> Any:
        async with http.get(f"{collector.url}/api/v1/jobs{query}") as answer:
            assert answer.status == 200
            return await answer.json()

    listing = await get("")
    assert [job["job_id"] for job in listing["jobs"]] == names[::-1]
    assert listing["jobs"][0]["state"] == "JOB_STATE_QUEUED"
    assert [job["job_id"] for job in (await get("?state=cancelled"))["jobs"]] == [names[1]]
    both = await get("?state=cancelled&state=queued&device=pi5&batch=b1&page_size=2")
    assert [job["job_id"] for job in both["jobs"]] == [names[2], names[1]]
    rest = await get(f"?page_token={both['next_page_token']}")
    assert [job["job_id"] for job in rest["jobs"]] == [names[0]]
    assert "jobs" not in await get("?device=pi4")
    assert (await get("/0202"))["reason"] == "no need"


async def test_jobs_are_in_the_metrics(collector: Any, http: aiohttp.ClientSession) -> None:
    await _queue(collector, "01" * 10, "02" * 10)
    async with http.get(collector.url + "/metrics", headers={"Accept-Encoding": "identity"}) as answer:
        text = (await answer.read()).decode()
    assert 'boardbench_jobs{state="queued"} 2\n' in text
    assert 'boardbench_jobs{state="dead"} 0\n' in text
    (waited,) = [
        line for line in text.splitlines() if line.startswith("boardbench_job_oldest_waiting_seconds")
    ]
    assert float(waited.split()[1]) > 9e7


async def test_terms_choose_the_boards(filled: Any, http: aiohttp.ClientSession) -> None:
    for query, count in (("?on=board%3Dpi5&on=lab%3Dzurich", 1), ("?on=board%3Dpi4", 0)):
        async with http.get(filled.url + "/api/v1/devices" + query) as answer:
            assert len((await answer.json()).get("devices", [])) == count


async def test_the_page_shows_jobs(filled: Any, http: aiohttp.ClientSession) -> None:
    evil = "<script>alert(1)</script>"
    await _queue(filled, "01" * 10, holder=evil, progress=evil)
    await filled.store.jobs.reserve((Booking("pi5", evil, "", 4e9),), at=1.7e9)
    page = await _page(http, filled.url)
    assert "script" not in page.tags
    assert page.text.count(evil) == 3
    assert "waits" in page.text
    assert "0 of 3" in page.text
    for link in page.links:
        async with http.get(filled.url + link) as answer:
            assert answer.status == 200, link


async def test_boards_that_serve_their_own_metrics_are_targets(
    collector: Any, http: aiohttp.ClientSession
) -> None:
    async with http.get(collector.url + "/sd/targets") as answer:
        assert (answer.status, answer.content_type, await answer.json()) == (200, "application/json", [])
    open_board = collector.board("open")
    open_board.hello.metrics_address = "open.lab:7344"
    open_board.hello.board.labels["rack.no"] = "2"
    quiet = collector.board("quiet")
    await open_board.join()
    await quiet.join()
    async with http.get(collector.url + "/sd/targets") as answer:
        (group,) = await answer.json()
    assert group["targets"] == ["open.lab:7344"]
    labels = group["labels"]
    assert labels["__meta_boardbench_device"] == "open"
    assert labels["__meta_boardbench_soc"] == "bcm2712"
    assert labels["__meta_boardbench_label_rack_no"] == "2"
    assert labels["__meta_boardbench_up"] == "1"
    await open_board.leave()
    async with http.get(collector.url + "/sd/targets") as answer:
        assert (await answer.json())[0]["labels"]["__meta_boardbench_up"] == "0"
    await quiet.leave()
