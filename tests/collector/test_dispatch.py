"""The task that hands jobs out, with clocks moved by hand and a store that fails when it is told to."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from boardbench.collector.dispatch import Desk, Dispatcher, Rules
from boardbench.collector.errors import InvalidRequest, StoreUnavailable
from boardbench.collector.files import Files
from boardbench.collector.fleet import Fleet
from boardbench.collector.jobs import Batch, JobQuery, JobRecord, Transition, new_record
from boardbench.collector.look import ReadModel
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.v1 import board_pb2, collector_pb2, job_pb2

NOW = 1_800_000_000.0
JOB = "ab" * 10


class Clock:
    """A clock that is moved by hand."""

    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


class Lab:
    """A dispatcher whose task runs, and boards that keep what they are told."""

    def __init__(self, folder: Path) -> None:
        self.store = MemoryResultStore()
        self.clock, self.monotonic = Clock(NOW), Clock(0.0)
        fleet = Fleet(self.store, silence_seconds=30)
        look = ReadModel(self.store, fleet, result_ttl_seconds=1.0, results_per_device=1)
        files = Files(folder, limit_bytes=1, free_bytes=0, in_use=self.store.jobs.files_in_use)
        self.dispatcher = Dispatcher(
            self.store.jobs,
            files,
            look,
            Rules(60.0, 2, 3, 3600.0, 86400.0),
            clock=self.clock,
            monotonic=self.monotonic,
            tick_seconds=0.01,
        )
        self.told: list[collector_pb2.ReportResponse] = []

    def attach(self, device_id: str = "pi5", *, held: tuple[str, ...] = ()) -> Desk:
        """A board that has just come, and names what it has."""

        async def send(response: collector_pb2.ReportResponse) -> None:
            self.told.append(response)

        hello = collector_pb2.Hello(board=board_pb2.Board(device_id=device_id), takes_jobs=True)
        desk = self.dispatcher.attach(hello, send)
        desk.heartbeat(collector_pb2.Heartbeat(job_ids=held))
        return desk

    async def submit(self, job_id: str = JOB, device_id: str = "pi5") -> None:
        """Queues a job behind the dispatcher's back, as another process does."""
        job = job_pb2.Job(job_id=job_id, batch_id=job_id, device_id=device_id, max_attempts=3)
        record = new_record(job, at=self.clock(), deadline=self.clock() + 864_000, inputs=None)
        await self.store.jobs.submit(Batch(job_id, "d", NOW), (record,))

    def fill_up(self) -> asyncio.Event:
        """The store writes no change of a job until this is set."""
        change, can_write = self.store.jobs.change, asyncio.Event()

        async def fails(transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
            if not can_write.is_set():
                raise StoreUnavailable("no space left")
            return await change(transitions)

        self.store.jobs.change = fails  # type: ignore[method-assign]
        return can_write

    async def get(self) -> JobRecord:
        """The job."""
        (record,) = await self.store.jobs.jobs(JobQuery(), limit=1)
        return record

    async def until(self, condition: Callable[[], Any], what: str) -> None:
        """Returns when the condition holds; fails when it never does."""
        end = asyncio.get_running_loop().time() + 20
        while True:
            holds = condition()
            if await holds if asyncio.iscoroutine(holds) else holds:
                return
            assert asyncio.get_running_loop().time() < end, what
            self.monotonic.now += 0.02
            await asyncio.sleep(0.005)

    async def turns(self, count: int = 20) -> None:
        """Returns when the task has looked around so often."""
        for _ in range(count):
            self.monotonic.now += 0.02
            await asyncio.sleep(0.012)


@pytest.fixture
async def lab(tmp_path: Path) -> AsyncIterator[Lab]:
    made = Lab(tmp_path)
    task = asyncio.create_task(made.dispatcher.run())
    yield made
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def test_what_another_process_has_queued_is_found(lab: Lab) -> None:
    lab.attach()
    await lab.submit()
    await lab.until(lambda: lab.told, "it is offered")
    assert lab.told[0].offer.job_id == JOB


async def test_whoever_queues_for_a_fleet_may_name_all_its_jobs(lab: Lab) -> None:
    job_ids = [f"{number:020x}" for number in range(1, 1201)]
    for number, job_id in enumerate(job_ids):
        await lab.submit(job_id, f"board-{number}")
    await lab.submit()
    # Whole ones, and one by its first digits.
    named = job_pb2.JobFilter(job_ids=[*job_ids, JOB[:6].upper()])
    ended = await lab.dispatcher.cancel(named)
    assert [job.job_id for job in ended] == [*job_ids, JOB]
    seen = [job.job_id async for job in lab.dispatcher.watch(named)]
    assert seen == [*job_ids, JOB]
    with pytest.raises(InvalidRequest, match="at most 10,000 jobs can be named at once"):
        await lab.dispatcher.cancel(job_pb2.JobFilter(job_ids=[JOB] * 10_001))


async def test_nothing_is_handed_out_before_a_board_has_named_what_it_has(lab: Lab) -> None:
    async def send(response: collector_pb2.ReportResponse) -> None:
        lab.told.append(response)

    hello = collector_pb2.Hello(board=board_pb2.Board(device_id="pi5"), takes_jobs=True)
    desk = lab.dispatcher.attach(hello, send)
    await lab.submit()
    await lab.turns()
    assert not lab.told
    desk.heartbeat(collector_pb2.Heartbeat())
    await lab.until(lambda: lab.told, "it is offered")


@pytest.mark.parametrize("jump", [86400.0, -86400.0], ids=["ahead", "back"])
async def test_a_clock_that_jumps_takes_no_job_from_a_board_that_names_it(lab: Lab, jump: float) -> None:
    desk = lab.attach()
    await lab.submit()
    await lab.until(lambda: lab.told, "it is offered")
    desk.heartbeat(collector_pb2.Heartbeat(job_ids=[JOB]))
    # What it named is taken in by the old time.
    await lab.turns(5)
    lab.clock.now += jump
    await lab.turns()
    desk.heartbeat(collector_pb2.Heartbeat(job_ids=[JOB]))

    async def renewed() -> bool:
        return (await lab.get()).lease_until == NOW + jump + 60

    await lab.until(renewed, "the lease goes by the new time")
    record = await lab.get()
    assert (record.job.state, record.job.attempts) == (job_pb2.JOB_STATE_LEASED, 1)
    assert len(lab.told) == 1


async def test_a_board_that_is_connected_and_has_forgotten_a_job_loses_it(lab: Lab) -> None:
    desk = lab.attach()
    await lab.submit()
    await lab.until(lambda: lab.told, "it is offered")
    desk.heartbeat(collector_pb2.Heartbeat(job_ids=[JOB]))
    await lab.turns(5)
    desk.heartbeat(collector_pb2.Heartbeat())
    lab.clock.now += 61
    lab.monotonic.now += 61
    await lab.until(lambda: len(lab.told) > 1, "it is offered again")
    assert lab.told[1].offer.attempt == 2
    view = await lab.dispatcher.view()
    assert (view.leases_expired, view.dead, view.jobs["leased"]) == (1, 0, 1)


async def test_the_queue_goes_on_when_the_store_can_write_again(lab: Lab) -> None:
    store_can_write = lab.fill_up()
    desk = lab.attach()
    await lab.submit()
    await lab.until(lambda: lab.told, "it is offered")
    report = job_pb2.JobReport(job_id=JOB, attempt=1, phase=job_pb2.JOB_PHASE_REFUSED, reason="no")
    desk.report(report)
    await lab.turns()
    assert (await lab.get()).job.state == job_pb2.JOB_STATE_LEASED
    store_can_write.set()

    async def refused() -> bool:
        return (await lab.get()).job.state == job_pb2.JOB_STATE_DEAD

    await lab.until(refused, "what was said meanwhile is not lost")


async def test_a_board_that_comes_while_the_store_fails_need_not_come_again(lab: Lab) -> None:
    lab.attach()
    await lab.submit()
    await lab.until(lambda: lab.told, "it is offered")
    store_can_write = lab.fill_up()
    desk = lab.attach(held=(JOB,))
    await lab.turns()
    assert not desk.ready
    store_can_write.set()
    await lab.until(lambda: desk.ready, "what it named at its beginning is not lost")


async def test_a_fault_does_not_end_the_queue(lab: Lab, caplog: pytest.LogCaptureFixture) -> None:
    due = lab.store.jobs.due
    faults = 0

    async def fails(*, at: float, limit: int) -> tuple[JobRecord, ...]:
        nonlocal faults
        faults += 1
        if faults < 4:
            raise RuntimeError("a fault of ours")
        return await due(at=at, limit=limit)

    lab.store.jobs.due = fails  # type: ignore[method-assign]
    lab.attach()
    await lab.submit()
    await lab.until(lambda: lab.told, "it is offered after all")
    assert "a fault of ours" in caplog.text


async def test_a_fleet_that_comes_back_is_served(lab: Lab) -> None:
    names = [f"board-{number}" for number in range(200)]
    for number, name in enumerate(names[:50]):
        await lab.submit(f"{number:020d}", name)
    for name in names:
        lab.attach(name)
    await lab.until(lambda: len(lab.told) == 50, "each that has a job gets it")
    await lab.turns()
    assert len({response.offer.job_id for response in lab.told}) == len(lab.told) == 50


async def test_what_can_not_be_told_does_not_hold_up_others(lab: Lab) -> None:
    stuck = asyncio.Event()

    async def never(_: collector_pb2.ReportResponse) -> None:
        await stuck.wait()

    hello = collector_pb2.Hello(board=board_pb2.Board(device_id="pi4"), takes_jobs=True)
    slow = lab.dispatcher.attach(hello, never)
    slow.heartbeat(collector_pb2.Heartbeat())
    await lab.submit("12" * 10, "pi4")
    lab.attach()
    await lab.submit()
    await lab.until(lambda: lab.told, "the other board gets its job")
    await slow.close()
    await slow.close()
