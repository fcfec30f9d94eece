"""The link: every spooled result reaches the collector once and in order, whatever happens to either."""

from __future__ import annotations

import asyncio
import functools
import os
import random
import signal
import sys
import textwrap
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from boardbench.agent.spool import Spool
from boardbench.agent.stream import CollectorLink, Pace, open_channel
from boardbench.v1 import board_pb2, collector_pb2, collector_pb2_grpc, job_pb2, result_pb2

from .spools import SimulatedDisk

QUICK = Pace(first_retry_seconds=0.01, longest_retry_seconds=0.05, heartbeat_seconds=0.05)
Context = grpc.aio.ServicerContext


class Collector(collector_pb2_grpc.CollectorServiceServicer):
    """Stores in memory; behaves as collector.proto says until a test tells it otherwise."""

    def __init__(self) -> None:
        self.hellos: list[collector_pb2.Hello] = []
        self.heartbeats: list[collector_pb2.Heartbeat] = []
        self.others: list[collector_pb2.ReportRequest] = []
        # Said after the welcome.
        self.greetings: list[collector_pb2.ReportResponse] = []
        self.on_hello: Callable[[Context], Awaitable[None]] | None = None
        # Identity and sequence of places that another board's result has.
        self.renews: set[tuple[str, int]] = set()
        # Everything that came, and what of it was new.
        self.received: list[tuple[str, int, str]] = []
        self.stored: list[str] = []
        self.marks: dict[str, int] = {}
        self.streams = 0
        self.heartbeat_seconds = 0.05
        self.welcomes = True
        # Takes results and does not acknowledge them.
        self.silent = False
        # Run id → reason.
        self.refusals: dict[str, str] = {}
        # Called with each result before it is stored; may abort.
        self.on_result: Callable[[collector_pb2.SpooledResult, Context], Awaitable[None]] | None = None
        # Instead of the true acknowledgement.
        self.acknowledges: Callable[[collector_pb2.SpooledResult], tuple[str, int]] | None = None

    async def Report(self, requests: AsyncIterator[collector_pb2.ReportRequest], context: Context):
        first = await anext(requests)
        assert first.WhichOneof("request") == "hello"
        self.hellos.append(first.hello)
        if self.on_hello is not None:
            await self.on_hello(context)
        if not self.welcomes:
            await context.read()
            return
        self.streams += 1
        try:
            yield collector_pb2.ReportResponse(
                welcome=collector_pb2.Welcome(
                    collector_version="1.2",
                    acknowledged_sequence=self.marks.get(first.hello.spool_id, 0),
                    heartbeat_seconds=self.heartbeat_seconds,
                )
            )
            for greeting in self.greetings:
                yield greeting
            async for request in requests:
                if request.WhichOneof("request") not in ("heartbeat", "result"):
                    self.others.append(request)
                    continue
                if request.WhichOneof("request") == "heartbeat":
                    self.heartbeats.append(request.heartbeat)
                    continue
                assert request.WhichOneof("request") == "result"
                async for response in self._take(request.result, context):
                    yield response
        finally:
            self.streams -= 1

    async def _take(
        self, spooled: collector_pb2.SpooledResult, context: Context
    ) -> AsyncIterator[collector_pb2.ReportResponse]:
        run_id = spooled.result.run_id
        self.received.append((spooled.spool_id, spooled.sequence, run_id))
        if self.on_result is not None:
            await self.on_result(spooled, context)
        if run_id in self.refusals:
            yield collector_pb2.ReportResponse(
                rejection=collector_pb2.Rejection(
                    spool_id=spooled.spool_id, sequence=spooled.sequence, reason=self.refusals[run_id]
                )
            )
            return
        if any(spool_id == spooled.spool_id and spooled.sequence >= at for spool_id, at in self.renews):
            # What is behind it on its way is not stored either: it comes again under the new identity.
            renewal = collector_pb2.Renewal(spool_id=spooled.spool_id, sequence=spooled.sequence)
            yield collector_pb2.ReportResponse(renewal=renewal)
            return
        if spooled.sequence > self.marks.get(spooled.spool_id, 0):
            self.marks[spooled.spool_id] = spooled.sequence
            self.stored.append(run_id)
        if self.silent:
            return
        spool_id, sequence = spooled.spool_id, spooled.sequence
        if self.acknowledges is not None:
            spool_id, sequence = self.acknowledges(spooled)
        yield collector_pb2.ReportResponse(
            acknowledgement=collector_pb2.Acknowledgement(spool_id=spool_id, sequence=sequence)
        )


@asynccontextmanager
async def serving(
    collector: collector_pb2_grpc.CollectorServiceServicer, port: int = 0, **options: int
) -> AsyncIterator[int]:
    server = grpc.aio.server(options=[("grpc." + name, value) for name, value in options.items()])
    collector_pb2_grpc.add_CollectorServiceServicer_to_server(collector, server)
    bound = server.add_insecure_port(f"127.0.0.1:{port}")
    assert bound
    await server.start()
    try:
        yield bound
    finally:
        await server.stop(None)


@asynccontextmanager
async def linking(spool: Spool, port: int, **options) -> AsyncIterator[CollectorLink]:
    def hello() -> collector_pb2.Hello:
        return collector_pb2.Hello(
            board=board_pb2.Board(device_id="board-1"), agent_version="0.1", address="10.0.0.7:7341"
        )

    def heartbeat() -> collector_pb2.Heartbeat:
        return collector_pb2.Heartbeat(running_run_id="run-now", queued_runs=3)

    options = {"pace": QUICK, "hello": hello, "heartbeat": heartbeat} | options
    link = CollectorLink(f"127.0.0.1:{port}", spool, **options)
    task = asyncio.create_task(link.run())
    try:
        yield link
        assert not task.done(), task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns as soon as the condition holds; fails when that takes too long."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not condition():
        assert asyncio.get_running_loop().time() < deadline, "it did not happen in time"
        await asyncio.sleep(0.002)


@pytest.fixture
def spool(tmp_path: Path):
    spool = Spool(tmp_path / "spool", 1 << 24, 1.0)
    yield spool
    spool.close()


@pytest.fixture
async def collector() -> Collector:
    return Collector()


def fill(spool: Spool, count: int, first: int = 0, samples: int = 10) -> list[str]:
    run_ids = [f"run-{number}" for number in range(first, first + count)]
    for run_id in run_ids:
        result = result_pb2.RunResult(run_id=run_id, status=result_pb2.RUN_STATUS_SUCCEEDED)
        result.latency.samples_nanoseconds.extend([123456789] * samples)
        spool.append(run_id, result.SerializeToString())
    return run_ids


def pending(spool: Spool) -> int:
    return spool.status().pending


# What it is for.


async def test_results_arrive_in_order_and_leave_the_spool_when_they_are_acknowledged(spool, collector):
    run_ids = fill(spool, 40)
    async with serving(collector) as port, linking(spool, port) as link:
        await until(lambda: pending(spool) == 0)
        assert collector.stored == run_ids
        assert [run_id for _, _, run_id in collector.received] == run_ids
        status = link.status()
        assert (status.address, status.connected, status.error) == (f"127.0.0.1:{port}", True, "")
        (hello,) = collector.hellos
        assert hello.spool_id == spool.status().spool_id
        assert (hello.board.device_id, hello.agent_version) == ("board-1", "0.1")
        assert hello.address == "10.0.0.7:7341"


async def test_a_result_is_sent_when_it_comes_and_not_with_the_next_heartbeat(spool, collector):
    collector.heartbeat_seconds = 100_000
    async with serving(collector) as port, linking(spool, port) as link:
        await until(lambda: collector.heartbeats)
        assert link.status().connected
        for number in range(5):
            await asyncio.to_thread(fill, spool, 1, number)
            await until(lambda: pending(spool) == 0)
        assert collector.stored == [f"run-{number}" for number in range(5)]
        assert len(collector.heartbeats) == 1


async def test_heartbeats_come_and_say_how_things_are(spool, collector):
    fill(spool, 2)
    collector.silent = True
    async with serving(collector) as port, linking(spool, port):
        await until(lambda: len(collector.heartbeats) > 2)
        beat = collector.heartbeats[-1]
        assert (beat.spool_pending, beat.spool_dropped) == (2, 0)
        assert (beat.running_run_id, beat.queued_runs) == ("run-now", 3)


async def test_a_spool_whose_place_is_taken_goes_on_under_a_new_identity(spool, collector):
    run_ids = fill(spool, 4)
    old_id = spool.status().spool_id
    collector.renews = {(old_id, 3)}
    async with serving(collector) as port, linking(spool, port):
        await until(lambda: pending(spool) == 0)
        assert spool.status().spool_id != old_id
        assert collector.stored == run_ids
        assert [hello.spool_id for hello in collector.hellos] == [old_id, spool.status().spool_id]


async def test_a_second_agent_of_one_identity_waits_long_and_says_why(spool, collector, caplog):
    async def refuse(context: Context) -> None:
        await context.abort(
            grpc.StatusCode.ALREADY_EXISTS,
            "board-1 is connected from 10.0.0.8; give one of them another device_id",
        )

    collector.on_hello = refuse
    waits: list[float] = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 2:
            collector.on_hello = None
        await asyncio.sleep(0.01)

    fill(spool, 1)
    async with serving(collector) as port, linking(spool, port, sleep=sleep, jitter=lambda: 0.5) as link:
        await until(lambda: waits)
        assert (
            "another agent reports as this board: board-1 is connected from 10.0.0.8" in link.status().error
        )
        await until(lambda: collector.stored)
        assert waits == [QUICK.rival_seconds * 0.75] * 2
        assert "give one of them another device_id; results stay in the spool meanwhile" in caplog.text


async def test_others_speak_and_hear_on_the_stream(spool, collector):
    class Party:
        def __init__(self) -> None:
            self.heard: list[collector_pb2.ReportResponse] = []
            self.connections = 0
            self.words: list[collector_pb2.ReportRequest] = []

        def connected(self) -> None:
            self.connections += 1

        def beat(self, heartbeat: collector_pb2.Heartbeat) -> None:
            heartbeat.job_ids.append("job-7")

        def hear(self, response: collector_pb2.ReportResponse) -> None:
            self.heard.append(response)

        def say(self) -> list[collector_pb2.ReportRequest]:
            said, self.words = self.words, []
            return said

    party = Party()
    collector.heartbeat_seconds = 100_000
    offer = collector_pb2.ReportResponse(offer=job_pb2.JobOffer(job_id="job-8"))
    collector.greetings = [offer]
    async with serving(collector) as port, linking(spool, port, parties=[party]) as link:
        await until(lambda: collector.heartbeats)
        assert list(collector.heartbeats[0].job_ids) == ["job-7"]
        assert collector.heartbeats[0].HasField("sent_at")
        assert collector.hellos[0].HasField("sent_at")
        await until(lambda: party.heard)
        assert party.heard == [offer]
        assert party.connections == 1
        party.words.append(collector_pb2.ReportRequest(job=job_pb2.JobReport(job_id="job-8")))
        link.speak()
        await until(lambda: collector.others)
        assert collector.others[0].job.job_id == "job-8"
        assert len(collector.heartbeats) == 1


async def test_the_number_in_flight_is_bounded(spool, collector):
    fill(spool, 20)
    collector.silent = True
    pace = Pace(in_flight_results=3, first_retry_seconds=0.01)
    async with serving(collector) as port, linking(spool, port, pace=pace):
        await until(lambda: len(collector.heartbeats) > 5)
        assert collector.stored == ["run-0", "run-1", "run-2"]
        assert pending(spool) == 20


async def test_the_bytes_in_flight_are_bounded(spool, collector):
    fill(spool, 4, samples=20_000)
    collector.silent = True
    pace = Pace(in_flight_bytes=100_000, first_retry_seconds=0.01)
    async with serving(collector) as port, linking(spool, port, pace=pace):
        await until(lambda: len(collector.heartbeats) > 5)
        # One was below the bound, the second went over it.
        assert collector.stored == ["run-0", "run-1"]


# The collector goes, comes, forgets, refuses.


async def test_results_wait_while_the_collector_is_down_and_arrive_once(spool, collector):
    async with serving(collector) as port:
        pass
    run_ids = fill(spool, 3)
    async with linking(spool, port) as link:
        await until(lambda: link.status().error not in ("", "not connected yet"))
        assert not link.status().connected
        assert "refused" in link.status().error
        run_ids += fill(spool, 2, first=3)
        for _ in range(2):
            async with serving(collector, port):
                await until(lambda: pending(spool) == 0)
                assert link.status().connected
            await until(lambda: not link.status().connected)
            run_ids += fill(spool, 2, first=len(run_ids))
        async with serving(collector, port):
            await until(lambda: pending(spool) == 0)
    assert collector.stored == run_ids


async def test_results_in_memory_go_to_the_disk_though_no_collector_is_there(tmp_path: Path):
    disk = SimulatedDisk(tmp_path / "spool")
    spool = Spool(tmp_path / "spool", 1 << 24, 1.0, disk=disk)
    disk.broken = True
    fill(spool, 3)
    async with linking(spool, 1) as link:
        await until(lambda: link.status().error not in ("", "not connected yet"))
        assert spool.status().trouble
        disk.broken = False
        await until(lambda: not spool.status().trouble)
        assert not link.status().connected
    spool.close()
    again = Spool(tmp_path / "spool", 1 << 24, 1.0)
    assert pending(again) == 3
    again.close()


async def test_a_stream_that_breaks_before_the_acknowledgement_is_taken_up_again(spool, collector):
    run_ids = fill(spool, 30)
    breaks = iter([0, 3, 1, 7])
    countdown = next(breaks)

    async def break_now_and_then(spooled: collector_pb2.SpooledResult, context: Context) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            countdown = next(breaks, 1000)
            # Stored, and nobody hears of it.
            if spooled.sequence > collector.marks.get(spooled.spool_id, 0):
                collector.marks[spooled.spool_id] = spooled.sequence
                collector.stored.append(spooled.result.run_id)
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the collector is stopping")

    countdown = 5
    collector.on_result = break_now_and_then
    async with serving(collector) as port, linking(spool, port):
        await until(lambda: pending(spool) == 0)
    assert collector.stored == run_ids
    assert len(collector.hellos) >= 4


async def test_a_collector_that_was_restored_from_an_old_backup_gets_again_what_is_here(spool, collector):
    run_ids = fill(spool, 6)
    async with linking(spool, 1):
        pass
    async with serving(collector) as port, linking(spool, port):
        await until(lambda: pending(spool) == 0)
        restored = Collector()
        restored.marks[spool.status().spool_id] = 2
    async with serving(restored, port), linking(spool, port):
        await until(lambda: len(restored.stored) == 4)
        await until(lambda: pending(spool) == 0)
    assert collector.stored == run_ids
    assert restored.stored == run_ids[2:]


async def test_a_result_that_is_refused_is_dropped_and_the_rest_goes_on(spool, collector, caplog):
    run_ids = fill(spool, 5)
    collector.refusals = {"run-2": "finished_at is no time"}
    async with serving(collector) as port, linking(spool, port):
        await until(lambda: pending(spool) == 0)
        await until(lambda: collector.heartbeats[-1].spool_dropped == 1)
    assert collector.stored == [run_id for run_id in run_ids if run_id != "run-2"]
    assert "run-2 for good: finished_at is no time" in caplog.text
    assert [run_id for _, _, run_id in collector.received].count("run-2") == 1


async def test_a_result_that_can_not_be_read_is_dropped_and_the_rest_goes_on(spool, collector, caplog):
    fill(spool, 1)
    spool.append("garbage", b"\xff\xff\xff")
    fill(spool, 1, first=1)
    async with serving(collector) as port, linking(spool, port):
        await until(lambda: pending(spool) == 0)
    assert collector.stored == ["run-0", "run-1"]
    assert spool.status().dropped == 1
    assert "garbage" in caplog.text


async def test_a_result_larger_than_the_collector_receives_does_not_hold_up_the_rest(
    spool, collector, caplog
):
    fill(spool, 3)
    fill(spool, 1, first=3, samples=50_000)
    fill(spool, 3, first=4)
    async with (
        serving(collector, max_receive_message_length=100_000) as port,
        linking(spool, port),
    ):
        await until(lambda: pending(spool) == 0)
    assert collector.stored == ["run-0", "run-1", "run-2", "run-4", "run-5", "run-6"]
    assert spool.status().dropped == 1
    assert "run-3" in caplog.text


@pytest.mark.parametrize(
    "lie", [lambda spooled: (spooled.spool_id, 1 << 40), lambda spooled: ("f" * 32, spooled.sequence)]
)
async def test_an_acknowledgement_of_what_was_not_sent_drops_nothing(spool, collector, lie):
    fill(spool, 10)
    collector.acknowledges = lie
    pace = Pace(in_flight_results=1, first_retry_seconds=0.01)
    async with serving(collector) as port, linking(spool, port, pace=pace):
        await until(lambda: len(collector.heartbeats) > 3)
        assert len(collector.stored) + pending(spool) >= 10
        assert len(collector.stored) in (1, 10)


async def test_another_identity_has_a_stream_of_its_own(tmp_path: Path, collector):
    first = Spool(tmp_path / "spool", 1 << 24, 1.0)
    fill(first, 3)
    old_id = first.status().spool_id
    first.close()
    (tmp_path / "spool" / "state").unlink()
    spool = Spool(tmp_path / "spool", 1 << 24, 1.0)
    new_id = spool.status().spool_id
    fill(spool, 2, first=3)
    async with serving(collector) as port, linking(spool, port):
        await until(lambda: pending(spool) == 0)
        fill(spool, 1, first=5)
        await until(lambda: pending(spool) == 0)
    assert [hello.spool_id for hello in collector.hellos] == [old_id, new_id]
    assert collector.stored == [f"run-{number}" for number in range(6)]
    assert [spool_id for spool_id, _, _ in collector.received] == [old_id] * 3 + [new_id] * 3
    spool.close()


# Peers that hang, or are something else.


async def test_a_collector_that_welcomes_nobody_is_left_and_tried_again(spool, collector):
    run_ids = fill(spool, 1)
    collector.welcomes = False
    pace = Pace(first_retry_seconds=0.01, welcome_seconds=0.1)
    async with serving(collector) as port, linking(spool, port, pace=pace) as link:
        await until(lambda: len(collector.hellos) > 1)
        assert "no welcome came within 0.1 s" in link.status().error
        collector.welcomes = True
        await until(lambda: pending(spool) == 0)
    assert collector.stored == run_ids


async def test_a_collector_that_takes_and_never_answers_is_left_and_tried_again(spool, collector):
    run_ids = fill(spool, 1)
    collector.silent = True
    pace = Pace(first_retry_seconds=0.01, answer_seconds=0.1)
    async with serving(collector) as port, linking(spool, port, pace=pace) as link:
        await until(lambda: "no acknowledgement came within 0.1 s" in link.status().error)
        collector.silent = False
        await until(lambda: pending(spool) == 0)
    assert collector.stored == run_ids


async def test_something_else_on_the_port_is_told(spool):
    class NoCollector(collector_pb2_grpc.CollectorServiceServicer):
        pass

    async with serving(NoCollector()) as port, linking(spool, port) as link:
        await until(lambda: "UNIMPLEMENTED" in link.status().error)
        assert not link.status().connected


class Wire:
    """Between the link and the collector; can be cut without anybody being told."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._flows = asyncio.Event()
        self._flows.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut(self) -> None:
        self._flows.clear()

    def mend(self) -> None:
        self._flows.set()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._port)
        for source, target in ((reader, far_writer), (far_reader, writer)):
            task = asyncio.create_task(self._carry(source, target))
            self._tasks.add(task)

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while data := await source.read(65536):
                await self._flows.wait()
                target.write(data)
                await target.drain()
        except ConnectionError:
            pass
        finally:
            target.close()


async def test_a_peer_that_is_gone_without_a_word_is_noticed(spool, collector):
    quick = functools.partial(open_channel, keepalive_seconds=0.2, keepalive_timeout_seconds=0.3)
    async with (
        serving(collector, **{"http2.min_ping_interval_without_data_ms": 10}) as port,
        Wire(port) as wire,
        linking(spool, wire.port, channel=quick) as link,
    ):
        run_ids = fill(spool, 1)
        await until(lambda: pending(spool) == 0)
        wire.cut()
        run_ids += fill(spool, 1, first=1)
        await until(lambda: not link.status().connected)
        wire.mend()
        await until(lambda: pending(spool) == 0)
        assert collector.stored == run_ids


# Pace, start and end.


async def test_retries_wait_longer_and_longer_with_full_jitter(spool):
    waits: list[float] = []
    enough = asyncio.Event()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        if len(waits) == 9:
            enough.set()
        await asyncio.sleep(0 if len(waits) < 9 else 3600)

    jitters = iter([1.0, 0.5, 0.0, 1.0, 1.0, 1.0, 1.0, 0.1, 1.0])
    async with linking(spool, 1, pace=Pace(), sleep=sleep, jitter=lambda: next(jitters)):
        await enough.wait()
    assert waits == [1.0, 1.0, 0.0, 8.0, 16.0, 30.0, 30.0, 3.0, 30.0]


async def test_only_progress_resets_the_waits(spool, collector):
    waits: list[float] = []
    fill(spool, 2)
    fails = True

    async def refuse(spooled: collector_pb2.SpooledResult, context: Context) -> None:
        if fails or spooled.sequence == 2:
            await context.abort(grpc.StatusCode.INTERNAL, "the collector failed")

    async def sleep(seconds: float) -> None:
        nonlocal fails
        waits.append(seconds)
        fails = len(waits) < 4
        await asyncio.sleep(0 if len(waits) < 6 else 3600)

    collector.on_result = refuse
    async with (
        serving(collector) as port,
        linking(spool, port, pace=Pace(in_flight_results=1), sleep=sleep, jitter=lambda: 1.0),
    ):
        await until(lambda: len(waits) == 6)
    assert waits == [1.0, 2.0, 4.0, 8.0, 1.0, 2.0]


async def test_cancelling_ends_the_stream(spool, collector):
    async with serving(collector) as port:
        async with linking(spool, port) as link:
            await until(lambda: collector.streams == 1)
        assert not link.status().connected
        assert link.status().error == "the agent is stopping"
        await until(lambda: collector.streams == 0)
        # Nobody listens any more.
        fill(spool, 1)


AGENT = """
    import asyncio, os, pathlib, sys
    from boardbench.agent.spool import Spool
    from boardbench.agent.stream import CollectorLink, Pace
    from boardbench.v1 import board_pb2, collector_pb2, result_pb2

    async def main(root, port, life):
        spool = Spool(root, 1 << 28, 1.0, segment_bytes=5000)
        link = CollectorLink(
            f"127.0.0.1:{port}", spool,
            hello=lambda: collector_pb2.Hello(board=board_pb2.Board(device_id="b")),
            heartbeat=collector_pb2.Heartbeat, pace=Pace(first_retry_seconds=0.01),
        )
        task = asyncio.create_task(link.run())
        number = 0
        while life != "last":
            run_id = f"run-{life}-{number}"
            result = result_pb2.RunResult(run_id=run_id)
            await asyncio.to_thread(spool.append, run_id, result.SerializeToString())
            os.write(1, f"{run_id}\\n".encode())
            number += 1
        while spool.status().pending:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        spool.close()

    asyncio.run(main(pathlib.Path(sys.argv[1]), sys.argv[2], sys.argv[3]))
"""


async def test_an_agent_that_is_killed_at_random_and_a_collector_that_comes_and_goes(
    tmp_path: Path, collector
):
    rng = random.Random(5)
    told: list[str] = []
    async with serving(collector) as port:
        pass

    async def start(life: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-c", textwrap.dedent(AGENT), str(tmp_path / "spool"), str(port), life, stdout=-1
        )

    for life in range(6):
        agent = await start(str(life))
        assert agent.stdout is not None
        async with serving(collector, port):
            for _ in range(rng.randrange(5, 60)):
                told += (await agent.stdout.readline()).decode().split()
            if life % 2:
                agent.send_signal(signal.SIGKILL)
                rest = await agent.stdout.read()
        if not life % 2:
            for _ in range(rng.randrange(5, 30)):
                told += (await agent.stdout.readline()).decode().split()
            agent.send_signal(signal.SIGKILL)
            rest = await agent.stdout.read()
        told += rest.decode().split()
        await agent.wait()
    async with serving(collector, port):
        agent = await start("last")
        assert await asyncio.wait_for(agent.wait(), 60) == os.EX_OK
    assert set(told) <= set(collector.stored)
    assert len(collector.stored) == len(set(collector.stored))
    keys = [(spool_id, sequence) for spool_id, sequence, _ in collector.received]
    assert len(dict.fromkeys(keys)) == len(collector.stored)
    for life in range(6):
        numbers = [
            int(run_id.split("-")[2]) for run_id in collector.stored if run_id.startswith(f"run-{life}-")
        ]
        assert numbers == list(range(len(numbers)))
