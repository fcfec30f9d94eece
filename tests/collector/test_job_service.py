"""JobService and the jobs of a report over real sockets: a board that is a test, people who are stubs."""

from __future__ import annotations

import asyncio
import hashlib
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from boardbench.collector.config import CollectorConfig
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.collector.stores.postgres import PostgresResultStore
from boardbench.v1 import agent_pb2, collector_pb2, job_pb2, job_pb2_grpc, result_pb2

MakeResult = Callable[..., result_pb2.RunResult]

MODEL = b"\x1c\x00\x00\x00TFL3" + bytes(range(256)) * 4000
SHA256 = hashlib.sha256(MODEL).hexdigest()
QUEUED, LEASED, RUNNING = (
    job_pb2.JOB_STATE_QUEUED,
    job_pb2.JOB_STATE_LEASED,
    job_pb2.JOB_STATE_RUNNING,
)
DONE, CANCELLED, DEAD = job_pb2.JOB_STATE_DONE, job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_DEAD
DEADLINE_SECONDS = 30.0


class Desk:
    """A person or a program at the collector."""

    def __init__(self, collector: Any) -> None:
        self.stub = job_pb2_grpc.JobServiceStub(collector.channel)
        self.results = collector.stub

    async def send(
        self,
        content: bytes = MODEL,
        *,
        name: str = "m.tflite",
        upto: int | None = None,
        **header: Any,
    ) -> job_pb2.SendFileResponse:
        """Sends a file, or the beginning of it; returns the last answer."""
        try:
            return await self._send(content, name, upto, header)
        except grpc.aio.AioRpcError as error:
            raise Refused(error.code(), error.details() or "") from error

    async def _send(
        self, content: bytes, name: str, upto: int | None, header: dict[str, Any]
    ) -> job_pb2.SendFileResponse:
        call = self.stub.SendFile()
        sha256 = header.pop("sha256", hashlib.sha256(content).hexdigest())
        first = agent_pb2.PushHeader(sha256=sha256, name=name, size_bytes=len(content), **header)
        await call.write(job_pb2.SendFileRequest(header=first))
        answer = await call.read()
        if answer.WhichOneof("response") == "done":
            return answer
        self.resumed_at = answer.resume.offset_bytes
        for at in range(answer.resume.offset_bytes, len(content) if upto is None else upto, 100_000):
            data = content[at : min(at + 100_000, len(content) if upto is None else upto)]
            chunk = agent_pb2.PushChunk(offset_bytes=at, data=data, crc32=zlib.crc32(data))
            await call.write(job_pb2.SendFileRequest(chunk=chunk))
        await call.done_writing()
        return await call.read()

    async def fetch(self, sha256: str = SHA256, offset: int = 0) -> bytes:
        """The bytes of a file."""
        request = job_pb2.FetchFileRequest(sha256=sha256, offset_bytes=offset, device_id="pi5")
        found = b""
        async for response in self.stub.FetchFile(request):
            assert response.chunk.offset_bytes == offset + len(found)
            assert zlib.crc32(response.chunk.data) == response.chunk.crc32
            found += response.chunk.data
        return found

    async def submit(self, *on: str, **more: Any) -> list[job_pb2.Job]:
        """Queues jobs."""
        request = job_pb2.SubmitJobsRequest(on=on, model_sha256=more.pop("model_sha256", SHA256), **more)
        return list((await self.stub.SubmitJobs(request)).jobs)

    async def list(self, **filter: Any) -> list[job_pb2.Job]:
        """Jobs, the latest first."""
        request = job_pb2.ListJobsRequest(filter=job_pb2.JobFilter(**filter))
        return list((await self.stub.ListJobs(request)).jobs)

    async def get(self, job_id: str) -> job_pb2.Job:
        """One job."""
        (job,) = await self.list(job_ids=[job_id])
        return job

    async def until(self, job_id: str, state: int, what: str = "") -> job_pb2.Job:
        """Returns the job once it is in the state; fails when it never is."""
        deadline = asyncio.get_running_loop().time() + DEADLINE_SECONDS
        while (job := await self.get(job_id)).state != state:
            assert asyncio.get_running_loop().time() < deadline, f"{what or state}: {job}"
            await asyncio.sleep(0.02)
        return job

    async def cancel(self, *job_ids: str, **filter: Any) -> list[job_pb2.Job]:
        """Ends jobs."""
        request = job_pb2.CancelJobsRequest(filter=job_pb2.JobFilter(job_ids=job_ids, **filter))
        return list((await self.stub.CancelJobs(request)).jobs)

    async def device(self, device_id: str = "pi5") -> collector_pb2.Device:
        """A board as the collector knows it."""
        request = collector_pb2.ListDevicesRequest(on=[f"device_id={device_id}"])
        (device,) = (await self.results.ListDevices(request)).devices
        return device


class Refused(Exception):
    """The stream ended with a status."""

    def __init__(self, code: grpc.StatusCode, details: str) -> None:
        super().__init__(f"{code.name}: {details}")
        self.code = code


async def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    """Status and message of a call that is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call
    return refused.value.code(), refused.value.details() or ""


async def join(collector: Any, device_id: str = "pi5", *, spool_id: str = "spool-1", **hello: Any) -> Any:
    """Returns a board that takes jobs and has said so."""
    board = collector.board(device_id, spool_id)
    board.hello.takes_jobs = hello.pop("takes_jobs", True)
    for name, value in hello.items():
        setattr(board.hello, name, value)
    await board.join()
    await board.beat()
    return board


async def offer(board: Any) -> job_pb2.JobOffer:
    """The next thing that the board is told, which is an offer."""
    answer = await board.read()
    assert answer.WhichOneof("response") == "offer", answer
    return answer.offer


async def withdrawal(board: Any) -> job_pb2.JobWithdrawal:
    """The next thing that the board is told, which is a withdrawal."""
    answer = await board.read()
    assert answer.WhichOneof("response") == "withdrawal", answer
    return answer.withdrawal


async def say(board: Any, job: job_pb2.JobOffer, phase: int, **more: Any) -> None:
    """The board says what it does with a job."""
    report = job_pb2.JobReport(job_id=job.job_id, attempt=job.attempt, phase=phase, **more)  # type: ignore[arg-type]
    await board.call.write(collector_pb2.ReportRequest(job=report))


@pytest.fixture
def quick(local_config: CollectorConfig) -> CollectorConfig:
    """Leases that are over soon; everything else as it is."""
    return replace(local_config, lease_seconds=0.5)


@pytest.fixture
async def desk(collector: Any) -> AsyncIterator[Desk]:
    """A person at a collector that has the model."""
    made = Desk(collector)
    await made.send()
    yield made


# Files.


async def test_a_file_goes_through_unchanged(collector: Any) -> None:
    desk = Desk(collector)
    answer = await desk.send()
    assert answer.done.already_present is False
    model = answer.done.model
    assert (model.sha256, model.name, model.format, model.size_bytes) == (
        SHA256,
        "m.tflite",
        "tflite",
        len(MODEL),
    )
    assert await desk.fetch() == MODEL
    assert await desk.fetch(offset=len(MODEL) - 5) == MODEL[-5:]
    assert await desk.fetch(offset=len(MODEL)) == b""
    again = await desk.send()
    assert (again.done.already_present, again.done.model) == (True, model)


async def test_a_file_goes_on_where_it_stopped(collector: Any) -> None:
    desk = Desk(collector)
    with pytest.raises(Refused, match=r"ended at byte 300,000 of 1,024,008; send it again"):
        await desk.send(upto=300_000)
    await desk.send()
    assert desk.resumed_at == 300_000
    assert await desk.fetch() == MODEL


@pytest.mark.parametrize(
    ("header", "word"),
    [
        ({"sha256": "5ba0"}, "is no SHA-256"),
        ({"name": "a/b"}, "is no file name"),
        ({"name": ""}, "is no file name"),
        ({"content": b""}, "at least one byte"),
    ],
)
async def test_a_header_must_be_one(collector: Any, header: dict[str, Any], word: str) -> None:
    with pytest.raises(Refused, match=f"INVALID_ARGUMENT.*{word}"):
        await Desk(collector).send(**header)


async def test_what_is_not_what_it_says_is_not_kept(collector: Any) -> None:
    desk = Desk(collector)
    with pytest.raises(Refused, match="what came has SHA-256"):
        await desk.send(sha256="ab" * 32)
    code, message = await refusal(_first(desk.stub.FetchFile(job_pb2.FetchFileRequest(sha256="ab" * 32))))
    assert (code, "send it first" in message) == (grpc.StatusCode.NOT_FOUND, True)


async def _first(call: Any) -> Any:
    async for response in call:
        return response
    return None


async def test_damaged_bytes_are_noticed_and_the_rest_is_kept(collector: Any) -> None:
    desk = Desk(collector)
    call = desk.stub.SendFile()
    header = agent_pb2.PushHeader(sha256=SHA256, name="m.tflite", size_bytes=len(MODEL))
    await call.write(job_pb2.SendFileRequest(header=header))
    await call.read()
    good = agent_pb2.PushChunk(offset_bytes=0, data=MODEL[:1000], crc32=zlib.crc32(MODEL[:1000]))
    bad = agent_pb2.PushChunk(offset_bytes=1000, data=b"x" * 10, crc32=zlib.crc32(MODEL[1000:1010]))
    await call.write(job_pb2.SendFileRequest(chunk=good))
    await call.write(job_pb2.SendFileRequest(chunk=bad))
    assert await call.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "came damaged" in await call.details()
    await desk.send()
    assert desk.resumed_at == 1000


async def test_the_same_file_from_two_sides_is_taken_once(collector: Any) -> None:
    desks = [Desk(collector) for _ in range(4)]
    answers = await asyncio.gather(*(desk.send() for desk in desks))
    assert sorted(answer.done.already_present for answer in answers) == [False, True, True, True]


async def test_what_no_open_job_needs_makes_room(
    collector_over: Any, local_config: CollectorConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("boardbench.collector.files._YOUNG_SECONDS", -1.0)
    contents = [bytes([n]) * 1000 for n in range(5)]
    names = [hashlib.sha256(content).hexdigest() for content in contents]
    config = replace(local_config, files_limit_bytes=3000, files_free_bytes=0)
    async with collector_over(MemoryResultStore(), config) as collector:
        desk = Desk(collector)
        board = await join(collector, takes_jobs=False)
        for content in contents[:3]:
            await desk.send(content)
        await desk.submit("up=true", model_sha256=names[0])
        await desk.send(contents[3])
        assert await desk.fetch(names[0]) == contents[0]
        code, _ = await refusal(_first(desk.stub.FetchFile(job_pb2.FetchFileRequest(sha256=names[1]))))
        assert code is grpc.StatusCode.NOT_FOUND
        for name in names[2:4]:
            await desk.submit("up=true", model_sha256=name)
        with pytest.raises(Refused, match=r"RESOURCE_EXHAUSTED.*there is no room"):
            await desk.send(contents[4])
        with pytest.raises(Refused, match=r"RESOURCE_EXHAUSTED.*keeps at most 3,000"):
            await desk.send(b"x" * 3001)
        await board.leave()


async def test_a_young_file_is_not_removed_before_it_has_a_job(
    collector_over: Any, local_config: CollectorConfig
) -> None:
    config = replace(local_config, files_limit_bytes=1000, files_free_bytes=0)
    async with collector_over(MemoryResultStore(), config) as collector:
        await Desk(collector).send(b"a" * 900)
        with pytest.raises(Refused, match="RESOURCE_EXHAUSTED"):
            await Desk(collector).send(b"b" * 900)


@pytest.mark.parametrize(
    ("limit", "free", "has", "lacks"),
    [
        (1000, 0, "keeps at most 1,000 bytes", "stay free"),
        (1 << 30, 1 << 60, f"and {1 << 60:,} stay free", "--files-limit"),
    ],
)
async def test_it_is_told_which_limit_is_reached(
    collector_over: Any, local_config: CollectorConfig, limit: int, free: int, has: str, lacks: str
) -> None:
    config = replace(local_config, files_limit_bytes=1000, files_free_bytes=0)
    async with collector_over(MemoryResultStore(), config) as collector:
        await Desk(collector).send(b"a" * 900)
    config = replace(local_config, files_limit_bytes=limit, files_free_bytes=free)
    async with collector_over(MemoryResultStore(), config) as collector:
        with pytest.raises(Refused) as refused:
            await Desk(collector).send(b"b" * 900)
    message = str(refused.value)
    assert has in message
    assert lacks not in message
    assert "young or open jobs need them" in message


async def test_files_outlive_the_collector(collector_over: Any) -> None:
    async with collector_over(MemoryResultStore()) as collector:
        await Desk(collector).send()
        with pytest.raises(Refused):
            await Desk(collector).send(b"z" * 500_000, upto=200_000)
    async with collector_over(MemoryResultStore()) as collector:
        desk = Desk(collector)
        assert (await desk.send()).done.already_present is True
        await desk.send(b"z" * 500_000)
        assert desk.resumed_at == 200_000


# A job's way.


async def test_a_job_goes_to_its_board_and_comes_back_as_a_result(
    collector: Any, desk: Desk, make_result: MakeResult
) -> None:
    board = await join(collector)
    (job,) = await desk.submit("board=pi5", "lab=zurich", holder="ann", tags={"suite": "nightly"})
    assert (job.device_id, job.state, job.holder) == ("pi5", QUEUED, "ann")
    assert (job.max_attempts, dict(job.tags)) == (3, {"suite": "nightly"})
    given = await offer(board)
    assert (given.job_id, given.attempt, given.run_id) == (job.job_id, 1, f"{job.job_id}-1")
    assert given.model.sha256 == SHA256
    assert given.lease_seconds == 60
    assert not given.HasField("inputs")
    assert (await desk.get(job.job_id)).state == LEASED
    await say(board, given, job_pb2.JOB_PHASE_FETCHING, fraction=0.31)
    await say(board, given, job_pb2.JOB_PHASE_RUNNING, stage=result_pb2.STAGE_MEASURE, fraction=0.4)
    job = await desk.until(job.job_id, RUNNING)
    assert job.progress == "measuring 40 %"
    assert (await desk.device()).open_jobs == 1
    await board.send(1, make_result(given.run_id))
    await board.acknowledged(1)
    job = await desk.get(job.job_id)
    assert (job.state, job.run_status, job.run_id) == (DONE, result_pb2.RUN_STATUS_SUCCEEDED, given.run_id)
    assert (await desk.device()).open_jobs == 0
    await board.leave()


async def test_a_job_waits_for_its_board(collector: Any, desk: Desk) -> None:
    await (await join(collector)).leave()
    (job,) = await desk.submit("board=pi5")
    board = await join(collector)
    assert (await offer(board)).job_id == job.job_id
    await board.leave()


async def test_inputs_go_along(collector: Any, desk: Desk) -> None:
    inputs = b"PK\x03\x04 inputs"
    sent = await desk.send(inputs, name="in.npz", kind=agent_pb2.FILE_KIND_INPUTS)
    board = await join(collector)
    await desk.submit("up=true", spec=result_pb2.BenchmarkSpec(inputs_sha256=sent.done.model.sha256))
    given = await offer(board)
    assert (given.inputs.name, given.inputs.format) == ("in.npz", "npz")
    assert await desk.fetch(given.inputs.sha256) == inputs
    await board.leave()


async def test_a_board_that_takes_no_jobs_gets_none(collector: Any, desk: Desk) -> None:
    board = await join(collector, takes_jobs=False)
    (job,) = await desk.submit("board=pi5")
    assert "takes no jobs" in job.reason
    request = job_pb2.SubmitJobsRequest(model_sha256=SHA256, count=1)
    code, message = await refusal(desk.stub.SubmitJobs(request))
    assert (code, "1 of them takes no jobs" in message) == (grpc.StatusCode.NOT_FOUND, True)
    other = await join(collector, "pi4")
    (second,) = await desk.submit("device_id=pi4")
    assert (await offer(other)).job_id == second.job_id
    assert (await desk.get(job.job_id)).state == QUEUED
    for each in (board, other):
        await each.leave()


async def test_a_board_has_no_more_jobs_than_it_may(
    collector: Any, desk: Desk, make_result: MakeResult
) -> None:
    board = await join(collector)
    jobs = [(await desk.submit("board=pi5", priority=n))[0] for n in (0, 1, 2, 3)]
    # What was there when the first was claimed is not known; the board has two at any time.
    first, second = await offer(board), await offer(board)
    open_now = [job.state for job in await desk.list(states=[LEASED, RUNNING])]
    assert len(open_now) == 2
    for sequence, given in enumerate((first, second), 1):
        await board.send(sequence, make_result(given.run_id))
    seen = {first.job_id, second.job_id}
    while len(seen) < 4:
        answer = await board.read()
        if answer.WhichOneof("response") == "offer":
            seen.add(answer.offer.job_id)
    assert seen == {job.job_id for job in jobs}
    await board.leave()


async def test_what_a_board_returns_is_offered_again_later(collector: Any, desk: Desk) -> None:
    board = await join(collector)
    (job,) = await desk.submit("board=pi5")
    given = await offer(board)
    await say(board, given, job_pb2.JOB_PHASE_RETURNED, reason="the disk is full")
    waiting = await desk.until(job.job_id, QUEUED)
    assert waiting.reason == "returned by the board: the disk is full"
    again = await offer(board)
    assert (again.job_id, again.attempt) == (job.job_id, 2)
    await board.leave()


async def test_what_a_board_refuses_is_dead_and_can_be_tried_again(collector: Any, desk: Desk) -> None:
    board = await join(collector)
    (job,) = await desk.submit("board=pi5")
    await say(board, await offer(board), job_pb2.JOB_PHASE_REFUSED, reason="no Edge TPU")
    job = await desk.until(job.job_id, DEAD)
    assert job.reason == "refused by the board: no Edge TPU"
    retry = job_pb2.RetryJobsRequest(filter=job_pb2.JobFilter(batch_id=job.batch_id))
    (again,) = (await desk.stub.RetryJobs(retry)).jobs
    assert again.state == QUEUED
    assert (await offer(board)).attempt == 2
    assert not (await desk.stub.RetryJobs(retry)).jobs
    await board.leave()


async def test_a_board_that_is_gone_loses_its_lease(
    collector_over: Any, quick: CollectorConfig, make_result: MakeResult
) -> None:
    store = MemoryResultStore()
    async with collector_over(store, quick) as collector:
        desk = Desk(collector)
        await desk.send()
        board = await join(collector)
        (job,) = await desk.submit("board=pi5")
        first = await offer(board)
        await board.leave()
        waiting = await desk.until(job.job_id, QUEUED)
        assert "its lease ran out" in waiting.reason
        # It comes back with another life and nothing.
        board = await join(collector)
        second = await offer(board)
        assert (second.job_id, second.attempt) == (first.job_id, 2)
        # And finds the first attempt's result after all.
        await board.send(1, make_result(first.run_id))
        seen = [await board.read(), await board.read()]
        kinds = sorted(answer.WhichOneof("response") for answer in seen)
        assert kinds == ["acknowledgement", "withdrawal"]
        (word,) = [a.withdrawal for a in seen if a.WhichOneof("response") == "withdrawal"]
        assert (word.job_id, word.attempt) == (job.job_id, 2)
        job = await desk.get(job.job_id)
        assert (job.state, job.run_id) == (DONE, first.run_id)
        await board.leave()


async def test_a_board_that_names_its_job_keeps_it(collector_over: Any, quick: CollectorConfig) -> None:
    async with collector_over(MemoryResultStore(), replace(quick, lease_seconds=1.5)) as collector:
        desk = Desk(collector)
        await desk.send()
        board = await join(collector)
        (job,) = await desk.submit("board=pi5")
        given = await offer(board)
        loop = asyncio.get_running_loop()
        end = loop.time() + 4.0
        while loop.time() < end:
            await board.beat(job_ids=[given.job_id])
            await asyncio.sleep(0.1)
        job = await desk.get(job.job_id)
        assert (job.state, job.attempts) == (LEASED, 1)
        await board.leave()


async def test_a_board_that_comes_back_with_its_job_goes_on(
    collector_over: Any, quick: CollectorConfig, make_result: MakeResult
) -> None:
    async with collector_over(MemoryResultStore(), quick) as collector:
        desk = Desk(collector)
        await desk.send()
        board = await join(collector)
        (job,) = await desk.submit("board=pi5")
        given = await offer(board)
        await board.leave()
        await desk.until(job.job_id, QUEUED)
        board = collector.board()
        board.hello.takes_jobs = True
        await board.join()
        await board.beat(job_ids=[given.job_id])
        await desk.until(job.job_id, LEASED)
        await say(board, given, job_pb2.JOB_PHASE_RUNNING)
        job = await desk.until(job.job_id, RUNNING)
        assert job.attempts == 1
        await board.send(1, make_result(given.run_id))
        await board.acknowledged(1)
        assert (await desk.get(job.job_id)).state == DONE
        await board.leave()


async def test_what_a_board_was_given_and_does_not_name_is_offered_again(collector: Any, desk: Desk) -> None:
    board = await join(collector)
    (job,) = await desk.submit("board=pi5")
    first = await offer(board)
    await board.leave()
    board = await join(collector)
    # The same attempt: whoever has its run starts nothing twice.
    assert await offer(board) == first
    assert (await desk.get(job.job_id)).attempts == 1
    await board.leave()


async def test_a_board_is_told_of_jobs_that_it_should_not_have(collector: Any, desk: Desk) -> None:
    board = await join(collector)
    stranger = job_pb2.JobOffer(job_id="00" * 10, attempt=1)
    await board.beat(job_ids=[stranger.job_id])
    assert (await withdrawal(board)).job_id == stranger.job_id
    (job,) = await desk.submit("board=pi5")
    await offer(board)
    other = await join(collector, "pi4")
    await say(other, job_pb2.JobOffer(job_id=job.job_id, attempt=1), job_pb2.JOB_PHASE_RUNNING)
    assert (await withdrawal(other)).job_id == job.job_id
    assert (await desk.get(job.job_id)).state == LEASED
    for each in (board, other):
        await each.leave()


async def test_a_large_word_about_a_job_ends_the_stream(collector: Any) -> None:
    board = await join(collector)
    await say(board, job_pb2.JobOffer(job_id="x"), job_pb2.JOB_PHASE_RUNNING, reason="y" * 5000)
    code, message = await board.end()
    assert (code, "at most 4,096" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_offers_do_not_hold_up_results(collector: Any, desk: Desk, make_result: MakeResult) -> None:
    board = await join(collector)
    for n in range(1, 101):
        await board.send(n, make_result(f"run-{n}"))
        if n == 50:
            await desk.submit("board=pi5")
    seen: set[str] = set()
    acknowledged = 0
    while acknowledged < 100 or "offer" not in seen:
        answer = await board.read()
        seen.add(str(answer.WhichOneof("response")))
        acknowledged = max(acknowledged, answer.acknowledgement.sequence)
    await board.leave()


# Choosing boards.


async def test_a_request_is_taken_once(collector: Any, desk: Desk) -> None:
    for name in ("pi4", "pi5"):
        await (await join(collector, name)).leave()
    first = await desk.submit("board=pi5", request_id="nightly-1")
    assert [job.device_id for job in first] == ["pi4", "pi5"]
    assert {job.batch_id for job in first} == {"nightly-1"}
    # A board that came later is not in it.
    await (await join(collector, "pi6")).leave()
    # Whoever asks: a CI job that is repeated runs in another container.
    for holder in ("", "root@9f2c", "root@77ab"):
        assert await desk.submit("board=pi5", request_id="nightly-1", holder=holder) == first
    assert len(await desk.list()) == 2
    request = job_pb2.SubmitJobsRequest(
        on=["board=pi5"], model_sha256=SHA256, request_id="nightly-1", priority=3
    )
    code, message = await refusal(desk.stub.SubmitJobs(request))
    assert (code, "another request" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_some_of_the_boards_are_the_free_ones(collector: Any, desk: Desk) -> None:
    for name in ("a", "b", "c", "d"):
        await (await join(collector, name)).leave()
    up = [await join(collector, name) for name in ("c", "d")]
    await desk.submit("device_id=c")
    await offer(up[0])
    assert [job.device_id for job in await desk.submit(count=1)] == ["d"]
    assert sorted(job.device_id for job in await desk.submit(count=2)) == ["c", "d"]
    await desk.stub.Reserve(job_pb2.ReserveRequest(on=["device_id=d"], holder="bob"))
    assert sorted(job.device_id for job in await desk.submit(count=3, holder="ann")) == ["a", "b", "c"]
    assert [job.device_id for job in await desk.submit("device_id=d", count=1, holder="bob")] == ["d"]
    request = job_pb2.SubmitJobsRequest(model_sha256=SHA256, count=4, holder="ann")
    code, message = await refusal(desk.stub.SubmitJobs(request))
    assert code is grpc.StatusCode.NOT_FOUND
    assert message == "--count 4: only 3 can be had; 4 meet the terms, others have reserved 1"
    for board in up:
        await board.leave()


@pytest.mark.parametrize(
    ("request_of", "code", "word"),
    [
        ({"on": ["board"]}, "INVALID_ARGUMENT", "is no term"),
        ({"on": ["board=pi3"]}, "NOT_FOUND", "none of 1 boards meets board=pi3"),
        ({"on": ["baord=pi5"]}, "NOT_FOUND", "no board has a label 'baord'"),
        ({"model_sha256": "12" * 32}, "NOT_FOUND", "send it first"),
        ({"model_sha256": "12"}, "INVALID_ARGUMENT", "is no SHA-256"),
        ({"spec": {"inputs_sha256": "12" * 32}}, "NOT_FOUND", "send it first"),
        ({"timeout_seconds": 0.0}, "INVALID_ARGUMENT", "timeout_seconds"),
        ({"timeout_seconds": float("nan")}, "INVALID_ARGUMENT", "timeout_seconds"),
        ({"max_attempts": 101}, "INVALID_ARGUMENT", "at most 100"),
        ({"holder": "x" * 129}, "INVALID_ARGUMENT", "at most 128"),
        ({"request_id": "a\nb"}, "INVALID_ARGUMENT", "can't be printed"),
        ({"tags": {"a": "b" * 300}}, "INVALID_ARGUMENT", "tags"),
    ],
)
async def test_a_request_that_can_not_be_met(
    collector: Any, desk: Desk, request_of: dict[str, Any], code: str, word: str
) -> None:
    await (await join(collector)).leave()
    if "spec" in request_of:
        request_of = {**request_of, "spec": result_pb2.BenchmarkSpec(**request_of["spec"])}
    request = job_pb2.SubmitJobsRequest(**{"model_sha256": SHA256, **request_of})
    got, message = await refusal(desk.stub.SubmitJobs(request))
    assert got.name == code
    assert word in message
    assert await desk.list() == []


# Looking, following and ending.


async def test_jobs_come_page_by_page(collector: Any, desk: Desk) -> None:
    for name in "abcde":
        await (await join(collector, name)).leave()
    await desk.submit()
    seen: list[str] = []
    token = ""
    while True:
        request = job_pb2.ListJobsRequest(page_size=2, page_token=token)
        page = await desk.stub.ListJobs(request)
        seen += [job.device_id for job in page.jobs]
        token = page.next_page_token
        if not token:
            break
    assert seen == list("edcba")
    code, _ = await refusal(desk.stub.ListJobs(job_pb2.ListJobsRequest(page_token="nonsense")))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


async def test_jobs_are_named_by_their_first_digits(collector: Any, desk: Desk) -> None:
    await (await join(collector)).leave()
    jobs = [(await desk.submit("board=pi5"))[0] for _ in range(20)]
    assert [job.job_id for job in await desk.list(job_ids=[jobs[3].job_id[:12].upper()])] == [jobs[3].job_id]
    by_digit: dict[str, int] = {}
    for job in jobs:
        by_digit[job.job_id[0]] = by_digit.get(job.job_id[0], 0) + 1
    common = max(by_digit, key=lambda digit: by_digit[digit])
    for digits, code in ((common, "INVALID_ARGUMENT"), ("zz", "NOT_FOUND")):
        request = job_pb2.ListJobsRequest(filter=job_pb2.JobFilter(job_ids=[digits]))
        assert (await refusal(desk.stub.ListJobs(request)))[0].name == code


async def test_jobs_are_followed_to_their_end(collector: Any, desk: Desk, make_result: MakeResult) -> None:
    boards = [await join(collector, name) for name in ("pi4", "pi5")]
    jobs = await desk.submit("up=true", request_id="batch")
    call = desk.stub.WatchJobs(job_pb2.WatchJobsRequest(filter=job_pb2.JobFilter(batch_id="batch")))
    states: dict[str, list[int]] = {job.job_id: [] for job in jobs}

    async def follow() -> None:
        async for response in call:
            states[response.job.job_id].append(response.job.state)

    following = asyncio.ensure_future(follow())
    for board in boards:
        given = await offer(board)
        await desk.until(given.job_id, LEASED)
        await say(board, given, job_pb2.JOB_PHASE_RUNNING)
        await desk.until(given.job_id, RUNNING)
        await board.send(1, make_result(given.run_id, device_id=board.hello.board.device_id))
    await asyncio.wait_for(following, DEADLINE_SECONDS)
    for seen in states.values():
        assert seen[-1] == DONE
        assert seen == sorted(seen)
    for board in boards:
        await board.acknowledged(1)
        await board.leave()


async def test_what_has_ended_is_told_once_and_that_is_all(collector: Any, desk: Desk) -> None:
    await (await join(collector)).leave()
    (job,) = await desk.submit("board=pi5")
    await desk.cancel(job.job_id)
    request = job_pb2.WatchJobsRequest(filter=job_pb2.JobFilter(job_ids=[job.job_id]))
    seen = [response.job.state async for response in desk.stub.WatchJobs(request)]
    assert seen == [CANCELLED]


async def test_followers_do_not_keep_the_collector_from_stopping(collector_over: Any) -> None:
    async with collector_over(MemoryResultStore()) as collector:
        desk = Desk(collector)
        await desk.send()
        await (await join(collector)).leave()
        await desk.submit("board=pi5")
        call = desk.stub.WatchJobs(job_pb2.WatchJobsRequest())
        await call.read()
        await asyncio.wait_for(collector.stop_serving(), DEADLINE_SECONDS)
        assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_waiting_jobs_are_cancelled_at_once(collector: Any, desk: Desk) -> None:
    for name in ("pi4", "pi5"):
        await (await join(collector, name)).leave()
    await desk.submit(request_id="batch")
    assert [job.state for job in await desk.cancel(batch_id="batch")] == [CANCELLED, CANCELLED]
    assert await desk.cancel(batch_id="batch") == []
    code, message = await refusal(desk.stub.CancelJobs(job_pb2.CancelJobsRequest()))
    assert (code, "an empty filter" in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)
    board = await join(collector)
    (job,) = await desk.submit("device_id=pi5")
    assert (await offer(board)).job_id == job.job_id
    await board.leave()


async def test_a_board_is_told_when_its_job_is_cancelled(
    collector: Any, desk: Desk, make_result: MakeResult
) -> None:
    board = await join(collector)
    (job,) = await desk.submit("board=pi5")
    given = await offer(board)
    (cancelling,) = await desk.cancel(job.job_id)
    assert (cancelling.state, cancelling.reason) == (LEASED, "it was cancelled")
    word = await withdrawal(board)
    assert (word.job_id, word.attempt, word.reason) == (job.job_id, 1, "it was cancelled")
    await board.send(1, make_result(given.run_id, status=result_pb2.RUN_STATUS_CANCELLED))
    await board.acknowledged(1)
    job = await desk.get(job.job_id)
    assert (job.state, job.run_status) == (CANCELLED, result_pb2.RUN_STATUS_CANCELLED)
    await board.leave()


async def test_a_board_that_comes_back_is_told_what_was_cancelled(collector: Any, desk: Desk) -> None:
    board = await join(collector)
    (job,) = await desk.submit("board=pi5")
    given = await offer(board)
    await board.leave()
    await desk.cancel(job.job_id)
    board = await join(collector)
    assert (await withdrawal(board)).job_id == job.job_id
    await say(board, given, job_pb2.JOB_PHASE_RETURNED, reason="withdrawn")
    await desk.until(job.job_id, CANCELLED)
    await board.leave()


async def test_time_ends_a_job_and_the_board_is_told(collector: Any, desk: Desk) -> None:
    board = await join(collector)
    (job,) = await desk.submit("board=pi5", timeout_seconds=0.5)
    await offer(board)
    word = await withdrawal(board)
    assert word.job_id == job.job_id
    assert "had not ended" in (await desk.until(job.job_id, DEAD)).reason
    await board.leave()


# Reservations and labels.


async def test_a_reserved_board_waits_for_its_holder(collector: Any, desk: Desk) -> None:
    board = await join(collector)
    request = job_pb2.ReserveRequest(on=["board=pi5"], holder="ann", reason="power", seconds=60)
    (taken,) = (await desk.stub.Reserve(request)).reservations
    assert (taken.device_id, taken.holder, taken.reason) == ("pi5", "ann", "power")
    assert (await desk.device()).reservation == taken
    (others,) = await desk.submit("board=pi5", holder="bob")
    (hers,) = await desk.submit("board=pi5", holder="ann")
    assert (await offer(board)).job_id == hers.job_id
    assert (await desk.get(others.job_id)).state == QUEUED
    request = job_pb2.ReserveRequest(on=["board=pi5"], holder="bob")
    code, message = await refusal(desk.stub.Reserve(request))
    assert code is grpc.StatusCode.FAILED_PRECONDITION
    assert "pi5 is reserved by ann (power)" in message
    assert not (await desk.stub.Release(job_pb2.ReleaseRequest(holder="bob"))).reservations
    (freed,) = (await desk.stub.Release(job_pb2.ReleaseRequest(holder="ann"))).reservations
    assert freed.device_id == "pi5"
    assert (await offer(board)).job_id == others.job_id
    assert not (await desk.device()).HasField("reservation")
    await board.leave()


async def test_a_board_can_be_taken_away(collector: Any, desk: Desk) -> None:
    await (await join(collector)).leave()
    await desk.stub.Reserve(job_pb2.ReserveRequest(on=["board=pi5"], holder="ann"))
    request = job_pb2.ReleaseRequest(on=["board=pi5"], holder="bob")
    assert not (await desk.stub.Release(request)).reservations
    request.force = True
    assert len((await desk.stub.Release(request)).reservations) == 1


@pytest.mark.parametrize(
    ("request_of", "word"),
    [
        ({"on": ["up=false"]}, "holder is missing"),
        ({"holder": "ann"}, "say which boards"),
        ({"holder": "ann", "on": ["up=false"], "seconds": 0.0}, "seconds"),
    ],
)
async def test_a_reservation_must_say_who_and_what(
    collector: Any, desk: Desk, request_of: dict[str, Any], word: str
) -> None:
    await (await join(collector)).leave()
    code, message = await refusal(desk.stub.Reserve(job_pb2.ReserveRequest(**request_of)))
    assert (code, word in message) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_operators_label_boards(collector: Any, desk: Desk) -> None:
    for name in ("pi4", "pi5"):
        await (await join(collector, name)).leave()
    request = job_pb2.SetLabelsRequest(on=["device_id=pi5"], labels={"rack": "3", "lab": "bern"})
    assert list((await desk.stub.SetLabels(request)).device_ids) == ["pi5"]
    device = await desk.device()
    assert dict(device.labels) == {"rack": "3", "lab": "bern"}
    assert dict(device.board.labels) == {"lab": "zurich"}
    found = await collector.stub.ListDevices(collector_pb2.ListDevicesRequest(on=["lab=zurich"]))
    assert [each.board.device_id for each in found.devices] == ["pi4"]
    assert [job.device_id for job in await desk.submit("rack=3")] == ["pi5"]
    request = job_pb2.SetLabelsRequest(on=["rack=3"], labels={"rack": ""})
    await desk.stub.SetLabels(request)
    assert dict((await desk.device()).labels) == {"lab": "bern"}
    for labels in ({}, {"Board": "pi5"}, {"memory": "x"}, {"a b": "c"}, {"": "x"}):
        bad = job_pb2.SetLabelsRequest(on=["up=false"], labels=labels)
        assert (await refusal(desk.stub.SetLabels(bad)))[0] is grpc.StatusCode.INVALID_ARGUMENT
    # One that former versions took can be removed.
    await desk.stub.SetLabels(job_pb2.SetLabelsRequest(on=["up=false"], labels={"board": "", "up": ""}))


async def test_a_label_can_not_hide_what_the_board_says_of_itself(collector: Any, desk: Desk) -> None:
    await (await join(collector)).leave()
    request = job_pb2.SetLabelsRequest(on=["up=false"], labels={"board": "pi5"})
    _, message = await refusal(desk.stub.SetLabels(request))
    assert "terms about board are about what the board itself says; choose another name" in message


# Who a board is, and how it is.


async def test_a_second_agent_with_an_identity_is_refused(collector: Any, desk: Desk) -> None:
    board = await join(collector, instance_id="one", life_id="1")
    thief = collector.board()
    thief.hello.instance_id = "two"
    await thief.call.write(collector_pb2.ReportRequest(hello=thief.hello))
    code, message = await thief.end()
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert "two agents have the identity pi5" in message
    device = await desk.device()
    assert device.up
    (problem,) = device.problems
    assert "give one of them another device_id" in problem
    # The first one goes on.
    await board.beat()
    await desk.submit("board=pi5")
    await offer(board)
    await board.leave()
    # When it is gone, the other may come: a board whose card was written anew is no thief.
    other = await join(collector, instance_id="two", life_id="2")
    await other.leave()


async def test_a_newer_stream_of_the_same_agent_takes_over(collector: Any, desk: Desk) -> None:
    older = await join(collector, instance_id="one", life_id="1")
    newer = await join(collector, instance_id="one", life_id="2")
    assert (await older.end())[0] is grpc.StatusCode.ABORTED
    await desk.submit("board=pi5")
    await offer(newer)
    assert not (await desk.device()).problems
    # The life that was replaced is still alive: there are two of it.
    third = await join(collector, instance_id="one", life_id="1")
    assert (await newer.end())[0] is grpc.StatusCode.ABORTED
    (problem,) = (await desk.device()).problems
    assert "copies of one data folder" in problem
    await third.leave()


async def test_a_copied_spool_is_asked_for_a_new_identity(
    collector: Any, desk: Desk, make_result: MakeResult
) -> None:
    board = await join(collector)
    for n in (1, 2, 3):
        await board.send(n, make_result(f"run-{n}"))
    await board.acknowledged(3)
    await board.leave()
    copy = collector.board()
    assert (await copy.join()).acknowledged_sequence == 3
    await copy.send(2, make_result("run-2"))
    await copy.acknowledged(2)
    for n in (3, 4, 5):
        await copy.send(n, make_result(f"other-{n}"))
    answer = await copy.read()
    assert answer.WhichOneof("response") == "renewal", answer
    assert (answer.renewal.spool_id, answer.renewal.sequence) == ("spool-1", 3)
    # What follows is not acknowledged under the old name: that would be said of the third, too.
    for n in (1, 2, 3):
        await copy.send(n, make_result(f"other-{n + 2}"), spool_id="spool-2")
    await copy.acknowledged(3, spool_id="spool-2")
    await copy.leave()
    listing = await collector.stub.ListResults(collector_pb2.ListResultsRequest())
    names = sorted(result.run_id for result in listing.results)
    assert names == ["other-3", "other-4", "other-5", "run-1", "run-2", "run-3"]


async def test_the_inventory_of_a_board(collector: Any, desk: Desk, wait_until: Callable[..., None]) -> None:
    board = collector.board()
    board.hello.sensors.extend(["thermal", "hwmon"])
    board.hello.sent_at.GetCurrentTime()
    board.hello.sent_at.seconds += 3600
    await board.join()
    device = await desk.device()
    assert list(device.sensors) == ["thermal", "hwmon"]
    assert 3590 < device.clock_offset_seconds < 3610
    assert "its clock is 60 min ahead" in device.problems[0]
    heartbeat = collector_pb2.Heartbeat(spool_dropped=7, spool_bytes=123)
    heartbeat.sent_at.GetCurrentTime()
    heartbeat.readings.add(quantity="temperature_celsius", source="cpu-thermal", value=51.0)
    await board.call.write(collector_pb2.ReportRequest(heartbeat=heartbeat))
    deadline = asyncio.get_running_loop().time() + DEADLINE_SECONDS
    while not (device := await desk.device()).heartbeat.readings:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)
    assert abs(device.clock_offset_seconds) < 5
    (problem,) = device.problems
    assert "dropped 7 results" in problem
    assert device.heartbeat.readings[0].value == 51.0
    await board.leave()
    assert any("is not connected" in problem for problem in (await desk.device()).problems)
    assert not (await desk.device()).HasField("clock_offset_seconds")


async def test_terms_choose_the_devices(collector: Any) -> None:
    for name in ("pi4", "pi5"):
        await (await join(collector, name)).leave()

    async def found(*on: str) -> list[str]:
        answer = await collector.stub.ListDevices(collector_pb2.ListDevicesRequest(on=on))
        return [device.board.device_id for device in answer.devices]

    assert await found() == ["pi4", "pi5"]
    assert await found("device_id!=pi4") == ["pi5"]
    assert await found("up=true") == []
    assert await found("board=pi5", "runtime=tflite") == ["pi4", "pi5"]
    code, _ = await refusal(collector.stub.ListDevices(collector_pb2.ListDevicesRequest(on=["x"])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT


# Several collectors over one database.


async def test_what_is_asked_of_one_collector_reaches_a_board_of_another(
    collector_over: Any,
    local_config: CollectorConfig,
    postgres_url: str,
    tmp_path: Path,
    make_result: MakeResult,
) -> None:
    configs = [
        replace(local_config, data_dir=tmp_path / name, files_dir=tmp_path / "files") for name in ("a", "b")
    ]
    stores = [await PostgresResultStore.open(postgres_url) for _ in configs]
    try:
        async with (
            collector_over(stores[0], configs[0]) as near,
            collector_over(stores[1], configs[1]) as far,
        ):
            desk, board = Desk(far), await join(near)
            await desk.send()
            (job,) = await desk.submit("device_id=pi5")
            first = await offer(board)
            assert first.job_id == job.job_id
            assert await Desk(near).fetch() == MODEL
            call = desk.stub.WatchJobs(
                job_pb2.WatchJobsRequest(filter=job_pb2.JobFilter(job_ids=[job.job_id]))
            )
            await board.send(1, make_result(first.run_id))
            await board.acknowledged(1)
            seen = [response.job.state async for response in call]
            assert seen[-1] == DONE
            (job,) = await desk.submit("device_id=pi5")
            second = await offer(board)
            await desk.until(job.job_id, LEASED)
            await desk.cancel(job.job_id)
            assert (await withdrawal(board)).job_id == job.job_id
            await say(board, second, job_pb2.JOB_PHASE_RETURNED, reason="withdrawn")
            await desk.until(job.job_id, CANCELLED)
            await board.leave()
    finally:
        for store in stores:
            await store.close()


async def test_a_second_agent_is_refused_whichever_collector_it_asks(
    collector_over: Any, local_config: CollectorConfig, postgres_url: str, tmp_path: Path
) -> None:
    configs = [replace(local_config, data_dir=tmp_path / name) for name in ("a", "b")]
    stores = [await PostgresResultStore.open(postgres_url) for _ in configs]
    try:
        async with (
            collector_over(stores[0], configs[0]) as near,
            collector_over(stores[1], configs[1]) as far,
        ):
            board = await join(near, instance_id="one")
            thief = far.board()
            thief.hello.instance_id = "two"
            await thief.call.write(collector_pb2.ReportRequest(hello=thief.hello))
            code, message = await thief.end()
            assert (code, "two agents have" in message) == (grpc.StatusCode.ALREADY_EXISTS, True)
            assert any("two agents have" in problem for problem in (await Desk(far).device()).problems)
            # The same agent may come by another way.
            moved = await join(far, instance_id="one")
            for each in (board, moved):
                await each.leave()
    finally:
        for store in stores:
            await store.close()
