"""Jobs while collector and boards are killed in random order: each ends once, and nothing is lost or twice.

The boards are simulated: they keep on their "disk" what an agent keeps (its spool, the jobs that it holds and
the runs that it has begun), and lose the rest whenever they are killed. Their streams break at
acknowledgements, too, so that what is stored is sent again. The collector is a process of its own that is
killed with SIGKILL, over the default store.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from boardbench.v1 import (
    agent_pb2,
    board_pb2,
    collector_pb2,
    collector_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    result_pb2,
)

MODEL = b"\x1c\x00\x00\x00TFL3" + b"m" * 50_000
ENDED = (job_pb2.JOB_STATE_DONE, job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_DEAD)
OPTIONS = ("--heartbeat", "0.3", "--lease", "1.5", "--log-level", "error")


@dataclass
class Disk:
    """What a board still has after it was killed."""

    spool_id: str = "spool-1"
    spool: list[tuple[int, result_pb2.RunResult]] = field(default_factory=list)
    sequence: int = 0
    acknowledged: int = 0
    offers: dict[str, job_pb2.JobOffer] = field(default_factory=dict)
    begun: set[str] = field(default_factory=set)
    results: dict[str, result_pb2.RunResult] = field(default_factory=dict)


class SimulatedBoard:
    """An agent without an engine. With ``keyed=False`` nothing tells that what it sends again is the same."""

    def __init__(self, name: str, address: Callable[[], str], chance: random.Random, *, keyed: bool) -> None:
        self.name = name
        self.disk = Disk()
        self.successes: Counter[str] = Counter()
        self.refused: list[str] = []
        self._address = address
        self._chance = chance
        self._keyed = keyed
        self._spools = 0
        self._sent: set[int] = set()
        self._life: asyncio.Task[None] | None = None
        self._runs: dict[str, asyncio.Task[None]] = {}
        self._wake = asyncio.Event()

    def start(self) -> None:
        """Begins a life."""
        for run_id in self.disk.begun - self.disk.results.keys():
            self._end(run_id, result_pb2.RUN_STATUS_FAILED, "agent_restarted")
        self._life = asyncio.create_task(self._live())
        for offer in self.disk.offers.values():
            self._begin(offer)

    async def kill(self) -> None:
        """Ends it, as a power cut does."""
        tasks = [task for task in (self._life, *self._runs.values()) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._life, self._runs = None, {}

    async def _live(self) -> None:
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                async with grpc.aio.insecure_channel(
                    self._address(), options=(("grpc.use_local_subchannel_pool", 1),)
                ) as channel:
                    await self._report(collector_pb2_grpc.CollectorServiceStub(channel).Report())
            await asyncio.sleep(self._chance.random() * 0.3)

    async def _report(self, call: Any) -> None:
        if not self._keyed:
            self._spools += 1
            self.disk.spool_id = f"spool-{self._spools}"
        hello = collector_pb2.Hello(
            board=board_pb2.Board(device_id=self.name, model="Raspberry Pi 5 Model B Rev 1.0"),
            spool_id=self.disk.spool_id,
            instance_id=f"instance-{self.name}",
            takes_jobs=True,
        )
        await call.write(collector_pb2.ReportRequest(hello=hello))
        answer = await call.read()
        if answer is grpc.aio.EOF:
            return
        if self._keyed and self._chance.random() < 0.7:
            # Else it sends again what is known to be stored, which must not matter.
            self._acknowledge(answer.welcome.acknowledged_sequence)
        reader = asyncio.create_task(self._read(call))
        try:
            sent = self.disk.acknowledged
            while not reader.done():
                self._wake.clear()
                beat = collector_pb2.Heartbeat(job_ids=list(self.disk.offers))
                await call.write(collector_pb2.ReportRequest(heartbeat=beat))
                for sequence, result in tuple(self.disk.spool):
                    if sequence > sent:
                        await call.write(collector_pb2.ReportRequest(result=self._spooled(sequence, result)))
                        sent = sequence
                waiting = asyncio.ensure_future(self._wake.wait())
                await asyncio.wait((waiting, reader), timeout=0.2, return_when=asyncio.FIRST_COMPLETED)
                waiting.cancel()
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            call.cancel()

    def _spooled(self, sequence: int, result: result_pb2.RunResult) -> collector_pb2.SpooledResult:
        spooled = collector_pb2.SpooledResult(spool_id=self.disk.spool_id, sequence=sequence, result=result)
        if not self._keyed and sequence in self._sent:
            spooled.result.run_id += f"-again-{self._spools}"
        self._sent.add(sequence)
        return spooled

    async def _read(self, call: Any) -> None:
        while (answer := await call.read()) is not grpc.aio.EOF:
            kind = answer.WhichOneof("response")
            if kind == "acknowledgement":
                if self._chance.random() < 0.2:
                    return
                if answer.acknowledgement.spool_id == self.disk.spool_id:
                    self._acknowledge(answer.acknowledgement.sequence)
            elif kind == "rejection":
                self.refused.append(answer.rejection.reason)
            elif kind == "offer":
                await self._offered(call, answer.offer)
            elif kind == "withdrawal":
                self._withdrawn(answer.withdrawal)

    def _acknowledge(self, sequence: int) -> None:
        self.disk.acknowledged = max(self.disk.acknowledged, sequence)
        done = {entry.run_id for number, entry in self.disk.spool if number <= sequence}
        self.disk.spool = [entry for entry in self.disk.spool if entry[0] > sequence]
        for job_id, offer in tuple(self.disk.offers.items()):
            if offer.run_id in done:
                del self.disk.offers[job_id]

    async def _offered(self, call: Any, offer: job_pb2.JobOffer) -> None:
        held = self.disk.offers.get(offer.job_id)
        if held is not None and held.run_id not in self.disk.results:
            return
        if offer.run_id in self.disk.results:
            return
        if self._chance.random() < 0.05:
            report = job_pb2.JobReport(
                job_id=offer.job_id, attempt=offer.attempt, phase=job_pb2.JOB_PHASE_RETURNED, reason="full"
            )
            await call.write(collector_pb2.ReportRequest(job=report))
            return
        self.disk.offers[offer.job_id] = offer
        self._begin(offer)

    def _begin(self, offer: job_pb2.JobOffer) -> None:
        if offer.run_id not in self.disk.results and offer.run_id not in self._runs:
            self._runs[offer.run_id] = asyncio.create_task(self._run(offer))

    async def _run(self, offer: job_pb2.JobOffer) -> None:
        await asyncio.sleep(self._chance.random() * 0.1)
        self.disk.begun.add(offer.run_id)
        await asyncio.sleep(self._chance.random() * 0.3)
        self.successes[offer.job_id] += 1
        self._end(offer.run_id, result_pb2.RUN_STATUS_SUCCEEDED)

    def _withdrawn(self, withdrawal: job_pb2.JobWithdrawal) -> None:
        offer = self.disk.offers.get(withdrawal.job_id)
        if offer is None or offer.attempt > withdrawal.attempt or offer.run_id in self.disk.results:
            return
        run = self._runs.pop(offer.run_id, None)
        if run is not None:
            run.cancel()
        if offer.run_id in self.disk.begun:
            self._end(offer.run_id, result_pb2.RUN_STATUS_CANCELLED)
        else:
            del self.disk.offers[withdrawal.job_id]

    def _end(self, run_id: str, status: int, code: str = "") -> None:
        result = result_pb2.RunResult(run_id=run_id, status=status)  # type: ignore[arg-type]
        result.board.device_id = self.name
        result.finished_at.GetCurrentTime()
        result.error.code = code
        self.disk.sequence += 1
        self.disk.results[run_id] = result
        self.disk.spool.append((self.disk.sequence, result))
        self._wake.set()


class Lab:
    """Boards, a collector that is started again after each death, and somebody who queues jobs."""

    def __init__(self, start: Callable[..., Any], seed: int, boards: int, *, keyed: bool = True) -> None:
        self.chance = random.Random(seed)
        self.kills = 0
        self._start = start
        self.collector = start(*OPTIONS)
        self.boards = [
            SimulatedBoard(
                f"sim-{number}", lambda: str(self.collector.grpc_address), self.chance, keyed=keyed
            )
            for number in range(boards)
        ]

    def _address(self) -> str:
        return str(self.collector.grpc_address)

    @contextlib.asynccontextmanager
    async def people(self) -> AsyncIterator[tuple[Any, Any]]:
        """Stubs of the collector that is there now."""
        async with grpc.aio.insecure_channel(
            self.collector.grpc_address, options=(("grpc.use_local_subchannel_pool", 1),)
        ) as channel:
            yield job_pb2_grpc.JobServiceStub(channel), collector_pb2_grpc.CollectorServiceStub(channel)

    async def settle(self) -> None:
        """Returns when every board has said hello and the model is there."""
        for board in self.boards:
            board.start()
        async with self.people() as (jobs, reports):
            await until(lambda: self._count(reports), len(self.boards), "every board is known")
            call = jobs.SendFile()
            header = agent_pb2.PushHeader(
                sha256=hashlib.sha256(MODEL).hexdigest(), name="m.tflite", size_bytes=len(MODEL)
            )
            chunk = agent_pb2.PushChunk(data=MODEL, crc32=zlib.crc32(MODEL))
            await call.write(job_pb2.SendFileRequest(header=header))
            await call.write(job_pb2.SendFileRequest(chunk=chunk))
            await call.read()
            assert (await call.read()).done.model.size_bytes == len(MODEL)

    async def _count(self, reports: Any) -> int:
        return len((await reports.ListDevices(collector_pb2.ListDevicesRequest())).devices)

    async def submit(self, batch: str) -> None:
        """Queues a job for every board, again and again until that is known to be done."""
        request = job_pb2.SubmitJobsRequest(
            request_id=batch,
            model_sha256=hashlib.sha256(MODEL).hexdigest(),
            max_attempts=50,
            on=["device_id=sim-*"],
        )
        while True:
            try:
                async with self.people() as (jobs, _):
                    await jobs.SubmitJobs(request, timeout=5)
                    return
            except grpc.aio.AioRpcError as error:
                assert error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), error
                await asyncio.sleep(0.05)

    async def harm(self) -> None:
        """Kills something."""
        self.kills += 1
        if self.chance.random() < 0.4:
            self.collector.kill()
            await asyncio.sleep(self.chance.random() * 0.3)
            self.collector = await asyncio.to_thread(self._start, *OPTIONS)
        else:
            board = self.chance.choice(self.boards)
            await board.kill()
            await asyncio.sleep(self.chance.random() * 0.5)
            board.start()

    async def check(self, batches: int) -> list[job_pb2.Job]:
        """Returns the jobs, once all have ended; fails when anything is lost or twice."""
        jobs = await self._ended(batches * len(self.boards))
        async with self.people() as (_, reports):
            stored: Counter[str] = Counter()
            request = collector_pb2.ListResultsRequest(page_size=1000, summary=True)
            while True:
                page = await reports.ListResults(request)
                stored.update(result.run_id for result in page.results)
                if not page.next_page_token:
                    break
                request.page_token = page.next_page_token
        made = {run_id for board in self.boards for run_id in board.disk.results}
        assert set(stored) == made, f"lost: {made - set(stored)}; not made: {set(stored) - made}"
        assert max(stored.values()) == 1
        assert not [reason for board in self.boards for reason in board.refused]
        for job in jobs:
            assert job.state == job_pb2.JOB_STATE_DONE, job
            assert stored[job.run_id] == 1, job
        successes = sum((board.successes for board in self.boards), Counter[str]())
        twice = {job_id: count for job_id, count in successes.items() if count != 1}
        assert not twice, "a finished job was run again"
        assert set(successes) == {job.job_id for job in jobs}
        return jobs

    async def _ended(self, count: int) -> list[job_pb2.Job]:
        jobs: list[job_pb2.Job] = []

        async def open_ones() -> int:
            jobs[:] = []
            async with self.people() as (stub, _):
                request = job_pb2.ListJobsRequest(page_size=1000)
                while True:
                    page = await stub.ListJobs(request)
                    jobs.extend(page.jobs)
                    request.page_token = page.next_page_token
                    if not page.next_page_token:
                        break
            spooled = sum(len(board.disk.spool) for board in self.boards)
            return sum(job.state not in ENDED for job in jobs) + spooled

        await until(open_ones, 0, "every job has ended and every spool is empty")
        assert len(jobs) == len({job.job_id for job in jobs}) == count
        return jobs

    async def close(self) -> None:
        """Ends the boards."""
        for board in self.boards:
            await board.kill()


async def until(look: Callable[[], Any], wanted: int, what: str, seconds: float = 90.0) -> None:
    """Returns when there is as much as wanted; fails when there never is."""
    end = asyncio.get_running_loop().time() + seconds
    while (found := await look()) != wanted:
        assert asyncio.get_running_loop().time() < end, (
            f"{what}: {found}, not {wanted}, after {seconds:.0f} s"
        )
        await asyncio.sleep(0.1)


async def live_through(start: Callable[..., Any], *, seed: int, boards: int, kills: int, keyed: bool) -> Lab:
    """Queues jobs while everything is killed at random, and checks what became of them."""
    lab = Lab(start, seed, boards, keyed=keyed)
    batches = 0
    try:
        await lab.settle()
        while lab.kills < kills:
            await lab.submit(f"batch-{batches}")
            batches += 1
            for _ in range(3):
                await asyncio.sleep(lab.chance.random() * 0.3)
                await lab.harm()
        await lab.check(batches)
        return lab
    finally:
        await lab.close()


async def test_jobs_survive_deaths_of_everything(start_collector: Callable[..., Any]) -> None:
    await live_through(start_collector, seed=1, boards=4, kills=15, keyed=True)


async def test_without_keys_the_same_test_fails(start_collector: Callable[..., Any]) -> None:
    """The negative control: what is sent again under other names is stored twice, and that is noticed."""
    with pytest.raises(AssertionError, match=r"not made: \{'[0-9a-f]{20}-"):
        await live_through(start_collector, seed=1, boards=4, kills=15, keyed=False)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(4))
async def test_jobs_survive_hundreds_of_deaths(start_collector: Callable[..., Any], seed: int) -> None:
    await live_through(start_collector, seed=100 + seed, boards=12, kills=75, keyed=True)
