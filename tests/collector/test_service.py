"""CollectorService over real sockets: order, acknowledgement after the commit, refusals, takeovers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import aiohttp
import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from boardbench.collector import service
from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import StoreUnavailable
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.v1 import collector_pb2, result_pb2

MakeResult = Callable[..., result_pb2.RunResult]


class HeldStore(MemoryResultStore):
    """Commits when it is told to, as a slow disk would; fails when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[int] = []
        self._held: list[tuple[asyncio.Future[bool], asyncio.Future[bool]]] = []
        self.failing = False

    def append(
        self,
        device_id: str,
        spool_id: str,
        sequence: int,
        result: result_pb2.RunResult,
        *,
        after: int = 0,
        content: bytes | None = None,
    ) -> asyncio.Future[bool]:
        self.asked.append(sequence)
        shown: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        if self.failing:
            shown.set_exception(StoreUnavailable("no space left for results.db"))
            return shown
        outcome = super().append(device_id, spool_id, sequence, result, after=after, content=content)
        self._held.append((shown, outcome))
        return shown

    def commit(self, count: int | None = None) -> None:
        """Completes what waits, or the first few of it."""
        count = len(self._held) if count is None else count
        for shown, outcome in self._held[:count]:
            if not shown.done():
                shown.set_result(outcome.result())
        del self._held[:count]


@pytest.fixture
async def wire_call(collector) -> AsyncIterator[Callable[[], Any]]:
    """Opens streams on which bytes are sent as they are."""
    address = str(collector.listening.grpc)
    async with grpc.aio.insecure_channel(address) as channel:
        report = channel.stream_stream(
            "/boardbench.v1.CollectorService/Report",
            response_deserializer=collector_pb2.ReportResponse.FromString,
        )
        yield report


async def until(condition: Callable[[], bool], what: str) -> None:
    """Returns when the condition holds; fails when it never does."""
    deadline = asyncio.get_running_loop().time() + 20
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.01)


async def test_results_are_acknowledged_in_order_and_stored(collector, make_result: MakeResult) -> None:
    board = collector.board()
    welcome = await board.join()
    assert welcome.acknowledged_sequence == 0
    assert welcome.heartbeat_seconds == 10
    assert welcome.collector_version
    for n in range(1, 201):
        await board.send(n, make_result(f"run-{n}"))
    await board.acknowledged(200)
    await board.leave()
    listing = await collector.stub.ListResults(collector_pb2.ListResultsRequest(page_size=1000))
    assert len(listing.results) == 200
    got = await collector.stub.GetResult(collector_pb2.GetResultRequest(run_id="run-123"))
    assert got.result == make_result("run-123")


async def test_no_acknowledgement_before_the_commit(collector_over, make_result: MakeResult) -> None:
    store = HeldStore()
    async with collector_over(store) as collector:
        board = collector.board()
        await board.join()
        for n in (1, 2, 3):
            await board.send(n, make_result(f"run-{n}"))
        await until(lambda: store.asked == [1, 2, 3], "all three were handed to the store")
        answer = asyncio.ensure_future(board.read())
        await asyncio.wait((answer,), timeout=0.2)
        assert not answer.done()
        store.commit(2)
        assert (await answer).acknowledgement.sequence in (1, 2)
        if answer.result().acknowledgement.sequence == 1:
            await board.acknowledged(2)
        store.commit()
        await board.acknowledged(3)
        await board.leave()


async def test_a_repeat_is_acknowledged_and_not_stored_twice(collector, make_result: MakeResult) -> None:
    board = collector.board()
    await board.join()
    await board.send(1, make_result("run-1"))
    await board.send(2, make_result("run-2"))
    await board.acknowledged(2)
    await board.leave()
    again = collector.board()
    assert (await again.join()).acknowledged_sequence == 2
    for n in (1, 2, 3):
        await again.send(n, make_result(f"run-{n}"))
    await again.acknowledged(3)
    await again.leave()
    listing = await collector.stub.ListResults(collector_pb2.ListResultsRequest())
    assert sorted(result.run_id for result in listing.results) == ["run-1", "run-2", "run-3"]


async def test_a_new_spool_begins_anew(collector, make_result: MakeResult) -> None:
    board = collector.board()
    await board.join()
    await board.send(5, make_result("run-1"))
    await board.acknowledged(5)
    await board.leave()
    fresh = collector.board(spool_id="spool-2")
    assert (await fresh.join()).acknowledged_sequence == 0
    # What an older spool still held comes first, under its own name.
    await fresh.send(6, make_result("run-2"), spool_id="spool-1")
    await fresh.acknowledged(6, spool_id="spool-1")
    await fresh.send(1, make_result("run-3"))
    await fresh.acknowledged(1)
    await fresh.leave()


async def test_a_poisoned_record_is_rejected_and_the_rest_goes_on(collector, make_result: MakeResult) -> None:
    board = collector.board()
    await board.join()
    await board.send(1, make_result("run-1"))
    await board.send(2, make_result(""))
    await board.send(3, make_result("run-3", samples=50_000))
    await board.send(4, make_result("run-1", p50=9.0))
    await board.send(0, make_result("run-0"))
    await board.send(5, make_result("run-5"), spool_id="")
    await board.send(6, make_result("run-6"))
    answers = []
    while not (answers and answers[-1].acknowledgement.sequence == 6):
        answers.append(await board.read())
    rejected = [answer.rejection for answer in answers if answer.WhichOneof("response") == "rejection"]
    assert [(refusal.sequence, refusal.spool_id) for refusal in rejected] == [
        (2, "spool-1"),
        (3, "spool-1"),
        (4, "spool-1"),
        (0, "spool-1"),
        (5, ""),
    ]
    reasons = " | ".join(refusal.reason for refusal in rejected)
    for word in (
        "run_id is missing",
        "at most 100,000",
        "other contents",
        "count from 1",
        "spool_id is missing",
    ):
        assert word in reasons
    # In order: what came before a refusal was acknowledged before it.
    assert answers[0].acknowledgement.sequence == 1
    await board.leave()
    listing = await collector.stub.ListResults(collector_pb2.ListResultsRequest())
    assert sorted(result.run_id for result in listing.results) == ["run-1", "run-6"]


async def test_a_record_that_is_none_is_rejected_not_the_stream(
    collector, make_result: MakeResult, make_hello: Callable[[], Any], wire_call: Callable[[], Any]
) -> None:
    call = wire_call()
    await call.write(collector_pb2.ReportRequest(hello=make_hello()).SerializeToString())
    assert (await call.read()).WhichOneof("response") == "welcome"
    spooled = collector_pb2.SpooledResult(spool_id="spool-1", sequence=1, result=make_result("run-1"))
    good = collector_pb2.ReportRequest(result=spooled).SerializeToString()
    # Field 6 of RunResult is a message: a length beyond the end makes it none.
    bad = b"\x0a\x07spool-1\x10\x02\x1a\x03\x32\x7f\x00"
    await call.write(good)
    await call.write(b"\x12" + bytes((len(bad),)) + bad)
    spooled.sequence, spooled.result.run_id = 3, "run-3"
    await call.write(collector_pb2.ReportRequest(result=spooled).SerializeToString())
    answers = [await call.read() for _ in range(3)]
    assert [answer.WhichOneof("response") for answer in answers] == [
        "acknowledgement",
        "rejection",
        "acknowledgement",
    ]
    assert answers[1].rejection.sequence == 2 and "it is no RunResult" in answers[1].rejection.reason
    assert answers[2].acknowledgement.sequence == 3
    await call.done_writing()


async def test_fields_in_any_order_are_the_same_result(
    collector, make_result: MakeResult, make_hello: Callable[[], Any], wire_call: Callable[[], Any]
) -> None:
    call = wire_call()
    await call.write(collector_pb2.ReportRequest(hello=make_hello()).SerializeToString())
    await call.read()
    result = make_result("run-1", samples=300)
    content = result.SerializeToString()
    size = bytes((0x80 | len(content) & 0x7F, len(content) >> 7))
    assert 128 <= len(content) < 1 << 14
    # Once the result comes before its place, and once the message is cut in two, which parsers put together.
    shuffled = b"\x1a" + size + content + b"\x10\x01" + b"\x0a\x07spool-1"
    size = bytes((0x80 | len(shuffled) & 0x7F, len(shuffled) >> 7))
    await call.write(b"\x12" + size + shuffled)
    assert (await call.read()).acknowledgement.sequence == 1
    latency, rest = result_pb2.RunResult(), make_result("run-2", samples=300)
    latency.latency.CopyFrom(rest.latency)
    rest.ClearField("latency")
    for part in (rest, latency):
        part = collector_pb2.SpooledResult(spool_id="spool-1", sequence=2, result=part)
        content = collector_pb2.ReportRequest(result=part).SerializeToString()
        if part.result.run_id:
            first = content
    await call.write(first + content)
    assert (await call.read()).acknowledgement.sequence == 2
    await call.done_writing()
    for run_id in ("run-1", "run-2"):
        got = await collector.stub.GetResult(collector_pb2.GetResultRequest(run_id=run_id))
        assert got.result == make_result(run_id, samples=300)


async def test_one_acknowledgement_is_for_what_was_committed_meanwhile(
    collector_over, make_result: MakeResult
) -> None:
    store = HeldStore()
    async with collector_over(store) as collector:
        board = collector.board()
        await board.join()
        await _send_all(board, [make_result(f"run-{n}", samples=0) for n in range(1, 21)])
        await until(lambda: len(store.asked) == 20, "all were handed to the store")
        # Not each is answered alone while others are on their way, and none is kept back for long.
        for _ in range(7):
            store.commit(1)
            await asyncio.sleep(0)
        first = (await board.read()).acknowledgement.sequence
        assert first <= 7
        if first < 7:
            await board.acknowledged(7)
        store.commit()
        assert (await board.read()).acknowledgement.sequence == 20
        await board.leave()


async def test_the_time_to_an_acknowledgement_is_until_it_is_sent(
    collector_over, make_result: MakeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_TOGETHER_SECONDS", 3600.0)
    store = HeldStore()

    async with collector_over(store) as collector, aiohttp.ClientSession() as http:

        async def figures() -> tuple[str, str]:
            async with http.get(f"{collector.url}/metrics") as answer:
                told = dict(line.rsplit(" ", 1) for line in (await answer.text()).splitlines() if line)
            return (
                told["boardbench_collector_results_stored_total"],
                told["boardbench_collector_acknowledge_seconds_count"],
            )

        board = collector.board()
        await board.join()
        await _send_all(board, [make_result(f"run-{n}", samples=0) for n in range(1, 10)])
        await until(lambda: len(store.asked) == 9, "all were handed to the store")
        store.commit(7)
        deadline = time.monotonic() + 20
        while (found := await figures())[0] != "7":
            assert time.monotonic() < deadline, found
        assert found[1] == "0", "committed, and kept back for the next one"
        store.commit()
        await board.acknowledged(9)
        assert (await figures())[1] == "9"
        await board.leave()


async def test_boards_that_come_all_at_once_wait_for_each_other(
    collector_over, make_result: MakeResult, local_config: CollectorConfig
) -> None:
    """What many streams send before it is committed is bounded for all of them; nobody counts as silent."""

    class CrowdedStore(HeldStore):
        def __init__(self) -> None:
            super().__init__()
            self.emptied = asyncio.Event()

        @property
        def is_crowded(self) -> bool:  # type: ignore[override]
            return len(self._held) >= 2

        async def room(self) -> None:
            self.emptied.clear()
            await self.emptied.wait()

        def commit(self, count: int | None = None) -> None:
            super().commit(count)
            self.emptied.set()

    store = CrowdedStore()
    config = replace(local_config, heartbeat_seconds=0.3)
    async with collector_over(store, config) as collector:
        boards = [collector.board(f"pi{number}") for number in range(4)]
        for number, board in enumerate(boards):
            await board.join()
            await _send_all(board, [make_result(f"run-{number}-{n}", samples=0) for n in range(1, 4)])
        await until(lambda: len(store.asked) == 2, "as many were handed over as it takes")
        # Longer than the silence after which a stream ends; each of them has more to say.
        await asyncio.sleep(2 * config.silence_seconds)
        assert len(store.asked) == 2

        async def finish(board: Any) -> None:
            await board.acknowledged(3)
            await board.leave()

        finishing = [asyncio.create_task(finish(board)) for board in boards]
        while not all(task.done() for task in finishing):
            store.commit()
            await asyncio.sleep(0.01)
        await asyncio.gather(*finishing)
        assert len(store.asked) == 12


async def test_a_record_beyond_every_limit_is_rejected_not_the_stream(
    collector, make_result: MakeResult
) -> None:
    # Four times the limit of a gRPC message unless told otherwise, and well beyond the store's.
    board = collector.board()
    await board.join()
    monster = make_result("monster")
    monster.error.output_tail = "x" * 17_000_000
    await board.send(1, monster)
    await board.send(2, make_result("run-2"))
    assert (await board.read()).rejection.sequence == 1
    await board.acknowledged(2)
    await board.leave()


@pytest.mark.parametrize("first", ["result", "heartbeat", "nothing"])
async def test_hello_comes_first(collector, make_result: MakeResult, first: str) -> None:
    board = collector.board()
    if first == "result":
        await board.send(1, make_result())
    elif first == "heartbeat":
        await board.beat()
    else:
        await board.call.done_writing()
    code, message = await board.end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "hello" in message


async def test_one_hello_is_enough(collector) -> None:
    board = collector.board()
    await board.join()
    await board.call.write(collector_pb2.ReportRequest(hello=board.hello))
    assert (await board.end())[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_heartbeat_is_small(collector) -> None:
    board = collector.board()
    await board.join()
    await board.beat(running_run_id="x" * 5000)
    code, message = await board.end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 4,096" in message


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        (lambda hello: hello.board.ClearField("device_id"), "device_id is missing"),
        (lambda hello: hello.ClearField("spool_id"), "spool_id is missing"),
        (lambda hello: setattr(hello.board, "device_id", "a\nb"), "can't be printed"),
        (lambda hello: setattr(hello.board, "device_id", "x" * 129), "at most 128"),
        (lambda hello: hello.board.labels.update({"x": "y" * 300_000}), "at most 262,144"),
    ],
)
async def test_a_hello_must_say_who_speaks(
    collector, spoil: Callable[[collector_pb2.Hello], None], word: str
) -> None:
    board = collector.board()
    spoil(board.hello)
    await board.call.write(collector_pb2.ReportRequest(hello=board.hello))
    code, message = await board.end()
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert word in message
    assert not (await collector.stub.ListDevices(collector_pb2.ListDevicesRequest())).devices


async def test_what_is_in_flight_is_bounded(
    collector_over, local_config: CollectorConfig, make_result: MakeResult
) -> None:
    store = HeldStore()
    async with collector_over(store) as collector:
        board = collector.board()
        await board.join()
        sender = asyncio.ensure_future(
            _send_all(board, [make_result(f"run-{n}", samples=0) for n in range(1, 301)])
        )
        await until(lambda: len(store.asked) >= local_config.in_flight_results, "the window is filled")
        await asyncio.sleep(0.1)
        assert len(store.asked) == local_config.in_flight_results == 64
        while len(store.asked) < 300:
            store.commit()
            await asyncio.sleep(0)
        store.commit()
        await sender
        await board.acknowledged(300)
        assert store.asked == list(range(1, 301))
        await board.leave()


async def test_what_is_in_flight_is_bounded_in_bytes(
    collector_over, local_config: CollectorConfig, make_result: MakeResult
) -> None:
    store = HeldStore()
    size = make_result("run-1", samples=1000).ByteSize()
    async with collector_over(store, replace(local_config, in_flight_bytes=3 * size + 500)) as collector:
        board = collector.board()
        await board.join()
        sender = asyncio.ensure_future(
            _send_all(board, [make_result(f"run-{n}", samples=1000) for n in range(1, 11)])
        )
        await until(lambda: len(store.asked) >= 3, "the window is filled")
        await asyncio.sleep(0.1)
        assert len(store.asked) == 3
        while len(store.asked) < 10:
            store.commit()
            await asyncio.sleep(0)
        store.commit()
        await sender
        await board.acknowledged(10)
        await board.leave()


async def _send_all(board, results: list[result_pb2.RunResult]) -> None:
    for n, result in enumerate(results, 1):
        await board.send(n, result)


async def test_a_failing_store_ends_the_stream_and_nothing_is_acknowledged(
    collector_over, make_result: MakeResult
) -> None:
    store = HeldStore()
    async with collector_over(store) as collector:
        board = collector.board()
        await board.join()
        await board.send(1, make_result("run-1"))
        await until(lambda: store.asked == [1], "the store was asked")
        store.commit()
        await board.acknowledged(1)
        store.failing = True
        await board.send(2, make_result("run-2"))
        code, message = await board.end()
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "no space left" in message
        store.failing = False
        again = collector.board()
        assert (await again.join()).acknowledged_sequence == 1
        await again.send(2, make_result("run-2"))
        await until(lambda: store.asked == [1, 2, 2], "the store was asked again")
        store.commit()
        await again.acknowledged(2)
        await again.leave()


async def test_the_newer_stream_of_a_board_takes_over(collector, make_result: MakeResult) -> None:
    older, newer = collector.board(), collector.board(spool_id="spool-2")
    await older.join()
    await older.send(1, make_result("run-1"))
    await older.acknowledged(1)
    await newer.join()
    code, message = await older.end()
    assert code is grpc.StatusCode.ABORTED
    assert "pi5 opened a newer stream" in message
    await newer.send(1, make_result("run-2"))
    await newer.acknowledged(1)
    (device,) = (await collector.stub.ListDevices(collector_pb2.ListDevicesRequest())).devices
    assert device.up
    await newer.leave()
    (device,) = (await collector.stub.ListDevices(collector_pb2.ListDevicesRequest())).devices
    assert not device.up


async def test_what_was_handed_over_is_acknowledged_when_a_newer_stream_takes_over(
    collector_over, make_result: MakeResult
) -> None:
    store = HeldStore()
    async with collector_over(store) as collector:
        older, newer = collector.board(), collector.board()
        await older.join()
        await older.send(1, make_result("run-1"))
        await until(lambda: store.asked == [1], "the store was asked")
        await newer.join()
        store.commit()
        await older.acknowledged(1)
        assert (await older.end())[0] is grpc.StatusCode.ABORTED
        await newer.leave()


async def test_a_silent_stream_is_ended_and_a_beating_one_is_not(
    collector_over, local_config: CollectorConfig
) -> None:
    config = replace(local_config, heartbeat_seconds=0.6)
    async with collector_over(MemoryResultStore(), config) as collector:
        silent, beating = collector.board("silent"), collector.board("beating")
        assert (await silent.join()).heartbeat_seconds == 0.6
        await beating.join()

        async def beat() -> None:
            while True:
                await beating.beat()
                await asyncio.sleep(0.1)

        heart = asyncio.ensure_future(beat())
        code, message = await silent.end()
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "nothing was heard from device silent" in message
        devices = (await collector.stub.ListDevices(collector_pb2.ListDevicesRequest())).devices
        assert {device.board.device_id: device.up for device in devices} == {
            "silent": False,
            "beating": True,
        }
        heart.cancel()
        await asyncio.gather(heart, return_exceptions=True)
        await beating.leave()


async def test_a_stream_without_a_hello_is_ended(collector_over, local_config: CollectorConfig) -> None:
    config = replace(local_config, heartbeat_seconds=0.05)
    async with collector_over(MemoryResultStore(), config) as collector:
        code, message = await collector.board().end()
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no hello" in message


async def test_a_stream_that_waits_for_the_store_is_not_silent(
    collector_over, local_config: CollectorConfig, make_result: MakeResult
) -> None:
    config = replace(local_config, heartbeat_seconds=0.4, in_flight_results=1)
    store = HeldStore()
    async with collector_over(store, config) as collector:
        board = collector.board()
        await board.join()
        for n in (1, 2, 3):
            await board.send(n, make_result(f"run-{n}"))
        await asyncio.sleep(1.8)  # half as long again as silence is borne
        assert store.asked == [1]
        for n in (1, 2, 3):
            await until(lambda n=n: len(store.asked) == n, "the next one was handed over")  # type: ignore[misc]
            store.commit()
        await board.acknowledged(3)
        await board.leave()


async def test_a_board_is_known_by_its_hello_and_heartbeats(collector, make_result: MakeResult) -> None:
    board = collector.board()
    await board.join()
    await board.send(1, make_result())
    await board.beat(spool_pending=3, spool_dropped=2, running_run_id="run-9", queued_runs=1)
    await board.acknowledged(1)

    async def device() -> collector_pb2.Device:
        (only,) = (await collector.stub.ListDevices(collector_pb2.ListDevicesRequest())).devices
        return only

    # A stream is in order: when what came after the heartbeat is answered, the heartbeat was taken.
    await board.send(2, make_result("run-2"))
    await board.acknowledged(2)
    found = await device()
    assert found.board == board.hello.board
    assert found.agent_version == "0.1.0"
    assert found.runtimes == board.hello.runtimes
    assert found.address == "pi5.lab:7341"
    assert found.up
    assert found.results == 2
    assert (found.heartbeat.spool_pending, found.heartbeat.running_run_id) == (3, "run-9")
    assert found.first_seen_at.ToNanoseconds() <= found.last_seen_at.ToNanoseconds()
    await board.leave()


async def test_what_a_newer_agent_says_is_not_understood_but_heard(collector) -> None:
    board = collector.board()
    await board.join()
    await board.call.write(collector_pb2.ReportRequest.FromString(b"\xca\x3e\x05later"))
    await board.beat()
    await board.leave()


async def test_listing_pages_through_filters_and_rejects_foreign_tokens(
    collector, make_result: MakeResult
) -> None:
    board = collector.board()
    await board.join()
    for n in range(1, 6):
        await board.send(n, make_result(f"run-{n}", finished=1e9 + n))
    await board.acknowledged(5)
    await board.leave()
    question = collector_pb2.ListResultsRequest(model="mobilenet.tflite", page_size=2, summary=True)
    seen: list[str] = []
    while True:
        answer = await collector.stub.ListResults(question)
        seen += [result.run_id for result in answer.results]
        assert not any(result.latency.samples_nanoseconds for result in answer.results)
        if not answer.next_page_token:
            break
        question.page_token = answer.next_page_token
    assert seen == ["run-5", "run-4", "run-3", "run-2", "run-1"]

    async def refused(call: Awaitable[object]) -> str:
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        return str(error.value.details())

    token = question.page_token
    for wrong in ("x", "!!", "AAAA", token + "A", "é", "W10", "eyJhIjoxfQ"):
        question.page_token = wrong
        assert "page_token" in await refused(collector.stub.ListResults(question))
    question.page_token, question.model = token, "5ba0"
    assert "other filters" in await refused(collector.stub.ListResults(question))


async def test_a_page_of_large_results_fits_a_plain_client(collector_over, make_result: MakeResult) -> None:
    async with collector_over(MemoryResultStore()) as collector:
        board = collector.board()
        await board.join()
        for n in range(1, 6):
            await board.send(n, make_result(f"run-{n}", samples=250_000))
        await board.acknowledged(5)
        await board.leave()
        question = collector_pb2.ListResultsRequest()
        pages = [await collector.stub.ListResults(question)]
        while pages[-1].next_page_token:
            question.page_token = pages[-1].next_page_token
            pages.append(await collector.stub.ListResults(question))
        assert len(pages) > 1
        assert sum(len(page.results) for page in pages) == 5


async def test_a_run_that_is_not_there_and_one_that_is_twice(collector, make_result: MakeResult) -> None:
    board = collector.board()
    await board.join()
    await board.send(1, make_result("abc1"))
    await board.send(2, make_result("abc2"))
    await board.acknowledged(2)
    await board.leave()
    for run_id, code, word in (
        ("nope", grpc.StatusCode.NOT_FOUND, "no run is named 'nope'"),
        ("abc", grpc.StatusCode.INVALID_ARGUMENT, "abc1 and abc2"),
        ("", grpc.StatusCode.INVALID_ARGUMENT, "missing"),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await collector.stub.GetResult(collector_pb2.GetResultRequest(run_id=run_id))
        assert error.value.code() is code
        assert word in str(error.value.details())


async def test_stopping_answers_what_was_handed_over_and_says_goodbye(
    collector_over, make_result: MakeResult
) -> None:
    store = HeldStore()
    collector = collector_over(store)
    await collector.__aenter__()
    board, idle = collector.board("pi5"), collector.board("pi4")
    await board.join()
    await idle.join()
    await board.send(1, make_result("run-1"))
    await until(lambda: store.asked == [1], "the store was asked")
    ends = asyncio.gather(board.acknowledged(1), idle.end())
    leaving = asyncio.ensure_future(collector.stop_serving())
    await until(lambda: idle.call.done(), "the idle stream has ended")
    store.commit()
    await ends
    code, message = ends.result()[1]
    assert code is grpc.StatusCode.UNAVAILABLE
    assert "stopping" in message
    assert (await board.end())[0] is grpc.StatusCode.UNAVAILABLE
    await leaving
    (last_seen,) = [device for device in await store.devices() if device.device_id == "pi4"]
    assert last_seen.last_seen_at > 0
    await collector.__aexit__(None, None, None)


async def test_a_stranger_finds_the_way(collector) -> None:
    health = health_pb2_grpc.HealthStub(collector.channel)
    for name in ("", "boardbench.v1.CollectorService"):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    stub = reflection_pb2_grpc.ServerReflectionStub(collector.channel)
    call = stub.ServerReflectionInfo(
        iter(
            [
                reflection_pb2.ServerReflectionRequest(list_services=""),
                reflection_pb2.ServerReflectionRequest(
                    file_containing_symbol="boardbench.v1.CollectorService"
                ),
            ]
        )
    )
    services, files = [answer async for answer in call]
    names = {service.name for service in services.list_services_response.service}
    assert {"boardbench.v1.CollectorService", "grpc.health.v1.Health"} <= names
    assert files.file_descriptor_response.file_descriptor_proto
    for name in (each for each in names if each.startswith("boardbench.")):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING, name
