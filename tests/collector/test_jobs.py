"""The contract suite of jobs over every store there is, and what happens to a job step by step."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from boardbench.collector.errors import StoreUnavailable
from boardbench.collector.jobs import (
    Batch,
    Booking,
    JobQuery,
    JobRecord,
    Transition,
    after_result,
    attempt_of,
    cancelled,
    claimable,
    claimed,
    expired,
    new_job_id,
    new_record,
    record_of,
    renewed,
    reported,
    retried,
    row_of,
    run_id_of,
    seconds_of,
)
from boardbench.collector.store import ResultStore
from boardbench.v1 import job_pb2, model_pb2, result_pb2

MakeResult = Callable[..., result_pb2.RunResult]

QUEUED, LEASED, RUNNING = (
    job_pb2.JOB_STATE_QUEUED,
    job_pb2.JOB_STATE_LEASED,
    job_pb2.JOB_STATE_RUNNING,
)
DONE, CANCELLED, DEAD = job_pb2.JOB_STATE_DONE, job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_DEAD
NOW = 1_800_000_000.0


def job_id(number: int) -> str:
    """An identity whose first digits are the number."""
    return f"{number:04d}{'ab' * 8}"


def make_record(
    number: int = 1,
    *,
    device_id: str = "pi5",
    batch_id: str = "batch-1",
    priority: int = 0,
    holder: str = "ann",
    max_attempts: int = 3,
    sha256: str = "5ba0" * 16,
    inputs: str = "",
    deadline: float = NOW + 3600,
) -> JobRecord:
    """A job that waits, as it is submitted."""
    job = job_pb2.Job(
        job_id=job_id(number),
        batch_id=batch_id,
        device_id=device_id,
        priority=priority,
        holder=holder,
        max_attempts=max_attempts,
        model=model_pb2.Model(sha256=sha256, name="mobilenet.tflite", format="tflite", size_bytes=543_216),
        spec=result_pb2.BenchmarkSpec(threads=4),
        tags={"suite": "nightly"},
    )
    named = model_pb2.Model(sha256=inputs, name="in.npz", size_bytes=7) if inputs else None
    return new_record(job, at=NOW, deadline=deadline, inputs=named)


async def submit(store: ResultStore, *records: JobRecord, batch_id: str = "batch-1") -> tuple[JobRecord, ...]:
    """Stores jobs as one batch."""
    return (await store.jobs.submit(Batch(batch_id, "digest", NOW), records)).records


async def claim(
    store: ResultStore, device_id: str = "pi5", *, at: float = NOW, lease: float = 60.0, most: int = 2
) -> tuple[JobRecord, ...]:
    """Has a board take what waits for it."""
    return await store.jobs.claim(device_id, at=at, lease_until=at + lease, most_open=most)


async def change(store: ResultStore, number: int, transition: Transition) -> JobRecord:
    """Applies the transition to a job and returns it."""
    await store.jobs.change({job_id(number): transition})
    return await get(store, number)


async def get(store: ResultStore, number: int) -> JobRecord:
    """The job as it is."""
    (record,) = await store.jobs.find_jobs(job_id(number))
    return record


def report(
    phase: int, *, attempt: int = 1, reason: str = "", at: float = NOW, device_id: str = "pi5"
) -> Transition:
    """What a board says."""
    message = job_pb2.JobReport(attempt=attempt, phase=phase, reason=reason)  # type: ignore[arg-type]
    return lambda record: reported(
        record, device_id, message, at=at, lease_until=at + 60, progress="measuring 40 %"
    )


def failed(make_result: MakeResult, run_id: str, code: str, **more: object) -> result_pb2.RunResult:
    """A run that failed with the code."""
    result = make_result(run_id, status=result_pb2.RUN_STATUS_FAILED, **more)
    result.error.code, result.error.message = code, f"it ended with {code}"
    return result


# Names.


def test_a_run_names_its_job_and_attempt() -> None:
    name = new_job_id(lambda size: bytes(range(size)))
    assert name == "00010203040506070809"
    assert attempt_of(run_id_of(name, 12)) == (name, 12)
    for other in ("", "run-1", name, f"{name}-0", f"{name}-x", f"x{name}-1", f"{name}-1-1", "5ba0-1"):
        assert attempt_of(other) is None


# Submission.


async def test_a_job_comes_back_as_it_went_in(store: ResultStore) -> None:
    record = make_record(inputs="77" * 32)
    (stored,) = await submit(store, record)
    assert stored.arrival > 0
    found = await get(store, 1)
    assert found == stored
    assert (found.job, found.inputs, found.deadline) == (record.job, record.inputs, NOW + 3600)
    assert found.job.state == QUEUED
    assert seconds_of(found.job.created_at) == NOW
    assert seconds_of(found.job.deadline_at) == NOW + 3600


async def test_the_same_batch_again_queues_nothing_twice(store: ResultStore) -> None:
    first = await store.jobs.submit(Batch("batch-1", "digest", NOW), (make_record(1), make_record(2)))
    assert (first.repeated, len(first.records)) == (False, 2)
    await claim(store, most=1)
    again = await store.jobs.submit(Batch("batch-1", "other", NOW + 9), (make_record(3), make_record(4)))
    assert again.repeated
    assert again.digest == "digest"
    assert [record.job_id for record in again.records] == [job_id(1), job_id(2)]
    assert [record.job.state for record in again.records] == [LEASED, QUEUED]
    assert len(await store.jobs.jobs(JobQuery(), limit=10)) == 2


async def test_a_batch_submitted_at_once_from_many_sides_is_stored_once(store: ResultStore) -> None:
    answers = await asyncio.gather(
        *(store.jobs.submit(Batch("batch-1", "digest", NOW), (make_record(n),)) for n in range(1, 9))
    )
    assert sorted(answer.repeated for answer in answers) == [False] + [True] * 7
    assert len({answer.records for answer in map(_names, answers)}) == 1


def _names(answer: object) -> object:
    records: Sequence[JobRecord] = answer.records  # type: ignore[attr-defined]
    return type("Names", (), {"records": tuple(record.job_id for record in records)})


async def test_an_empty_batch_is_remembered(store: ResultStore) -> None:
    assert not (await store.jobs.submit(Batch("empty", "d", NOW), ())).repeated
    again = await store.jobs.submit(Batch("empty", "d", NOW), (make_record(),))
    assert (again.repeated, again.records) == (True, ())


# Claims.


async def test_the_highest_priority_goes_first_and_then_the_oldest(store: ResultStore) -> None:
    await submit(store, *(make_record(n, priority=p) for n, p in ((1, 0), (2, 5), (3, 0), (4, 5), (5, -1))))
    order = []
    for _ in range(5):
        (record,) = await claim(store, most=1)
        order.append(int(record.job_id[:4]))
        await change(store, order[-1], report(job_pb2.JOB_PHASE_REFUSED, reason="no"))
    assert order == [2, 4, 1, 3, 5]


async def test_a_claim_is_a_lease_with_an_attempt(store: ResultStore) -> None:
    await submit(store, make_record())
    (record,) = await claim(store, lease=45.0)
    assert record == await get(store, 1)
    assert record.lease_until == NOW + 45
    job = record.job
    assert (job.state, job.attempts, job.run_id) == (LEASED, 1, f"{job_id(1)}-1")
    assert seconds_of(job.leased_at) == NOW


async def test_a_board_gets_no_more_than_it_may_have(store: ResultStore) -> None:
    await submit(store, *(make_record(n) for n in range(1, 6)))
    assert len(await claim(store)) == 2
    assert await claim(store) == ()
    await change(store, 1, report(job_pb2.JOB_PHASE_RUNNING))
    assert await claim(store) == ()
    assert len(await claim(store, most=3)) == 1
    assert await claim(store, most=1) == ()


async def test_a_board_gets_only_its_own_jobs(store: ResultStore) -> None:
    await submit(store, make_record(1, device_id="pi4"), make_record(2))
    assert [record.job_id for record in await claim(store)] == [job_id(2)]
    assert await claim(store, "nobody") == ()


async def test_what_is_claimed_at_once_goes_to_one(store: ResultStore) -> None:
    await submit(store, *(make_record(n) for n in range(1, 21)))
    answers = await asyncio.gather(*(claim(store, most=20 if n % 2 else 3) for n in range(10)))
    given = [record.job_id for answer in answers for record in answer]
    assert len(given) == len(set(given)) == 20


async def test_what_is_over_or_not_yet_to_be_is_not_handed_out(store: ResultStore) -> None:
    await submit(store, make_record(1, deadline=NOW), make_record(2))
    await claim(store, most=1)
    await change(store, 2, report(job_pb2.JOB_PHASE_RETURNED, reason="the disk is full"))
    assert await claim(store) == ()
    waiting = await get(store, 2)
    assert NOW < waiting.not_before < NOW + 60
    assert await store.jobs.waiting_devices(at=NOW) == frozenset()
    assert await store.jobs.waiting_devices(at=waiting.not_before) == {"pi5"}
    assert [record.job_id for record in await claim(store, at=waiting.not_before)] == [job_id(2)]


# Leases.


async def test_a_lease_goes_on_while_the_board_names_the_job(store: ResultStore) -> None:
    await submit(store, make_record())
    await claim(store)
    seen: list[Sequence[JobRecord]] = []
    store.jobs.listen(seen.append)
    record = await change(store, 1, lambda record: renewed(record, "pi5", NOW + 100))
    assert record.lease_until == NOW + 100
    await change(store, 1, lambda record: renewed(record, "pi4", NOW + 900))
    assert (await get(store, 1)).lease_until == NOW + 100
    assert await store.jobs.due(at=NOW + 99, limit=10) == ()
    # The clock may have been set back.
    await change(store, 1, lambda record: renewed(record, "pi5", NOW + 90))
    assert (await get(store, 1)).lease_until == NOW + 90
    # Nobody who watches would see a difference.
    assert seen == []
    assert await store.jobs.versions((job_id(1), job_id(2))) == {job_id(1): record.version}


async def test_a_lease_that_ran_out_puts_the_job_back(store: ResultStore) -> None:
    await submit(store, make_record())
    await claim(store)
    (late,) = await store.jobs.due(at=NOW + 60, limit=10)
    assert late.job_id == job_id(1)
    record = await change(store, 1, lambda record: expired(record, NOW + 60))
    assert (record.job.state, record.lease_until, record.lapsed) == (QUEUED, None, True)
    assert "lease ran out" in record.job.reason
    (again,) = await claim(store, at=NOW + 61)
    assert (again.job.attempts, again.job.run_id, again.job.reason) == (2, f"{job_id(1)}-2", "")


async def test_a_board_that_comes_back_with_the_job_keeps_its_attempt(store: ResultStore) -> None:
    await submit(store, make_record())
    await claim(store)
    await change(store, 1, lambda record: expired(record, NOW + 60))
    record = await change(store, 1, lambda record: renewed(record, "pi5", NOW + 130))
    assert (record.job.state, record.job.attempts, record.lease_until) == (LEASED, 1, NOW + 130)
    record = await change(store, 1, report(job_pb2.JOB_PHASE_RUNNING, at=NOW + 80))
    assert record.job.state == RUNNING


async def test_a_job_that_was_given_back_is_not_taken_up_by_a_late_heartbeat(store: ResultStore) -> None:
    await submit(store, make_record())
    await claim(store)
    await change(store, 1, report(job_pb2.JOB_PHASE_RETURNED, reason="full"))
    record = await change(store, 1, lambda record: renewed(record, "pi5", NOW + 130))
    assert (record.job.state, record.lease_until) == (QUEUED, None)


async def test_a_change_before_the_lease_is_over_changes_nothing(store: ResultStore) -> None:
    await submit(store, make_record())
    await claim(store)
    assert await store.jobs.change({job_id(1): lambda record: expired(record, NOW + 59)}) == ()
    assert await store.jobs.change({job_id(9): lambda record: expired(record, NOW + 59)}) == ()


async def test_too_many_attempts_end_it_as_dead(store: ResultStore) -> None:
    await submit(store, make_record(max_attempts=2))
    for attempt in (1, 2):
        at = NOW + 100 * attempt
        (record,) = await claim(store, at=at)
        assert record.job.attempts == attempt
        record = await change(store, 1, lambda record, at=at: expired(record, at + 60))
    assert record.job.state == DEAD
    assert record.job.reason.startswith("given up after 2 attempts: its lease ran out")
    assert (record.lease_until, record.ended) == (None, NOW + 260)
    assert seconds_of(record.job.ended_at) == NOW + 260
    assert await claim(store, at=NOW + 300) == ()
    assert await store.jobs.due(at=NOW + 9000, limit=10) == ()


@pytest.mark.parametrize("held", [False, True])
async def test_too_much_time_ends_it_as_dead(store: ResultStore, held: bool) -> None:
    await submit(store, make_record(deadline=NOW + 30))
    if held:
        await claim(store)
    assert [record.job_id for record in await store.jobs.due(at=NOW + 30, limit=10)] == [job_id(1)]
    record = await change(store, 1, lambda record: expired(record, NOW + 30))
    assert (record.job.state, record.job.reason) == (DEAD, "it had not ended 30 s after it was submitted")


# Reports.


async def test_a_board_says_how_far_it_is(store: ResultStore) -> None:
    await submit(store, make_record())
    await claim(store)
    record = await change(store, 1, report(job_pb2.JOB_PHASE_FETCHING, at=NOW + 5))
    assert (record.job.state, record.job.progress) == (LEASED, "measuring 40 %")
    assert record.lease_until == NOW + 65
    record = await change(store, 1, report(job_pb2.JOB_PHASE_RUNNING))
    assert record.job.state == RUNNING
    # A word that was overtaken by a later one does not set it back.
    assert (await change(store, 1, report(job_pb2.JOB_PHASE_WAITING))).job.state == RUNNING


async def test_what_is_said_of_another_attempt_or_by_another_board_is_passed_over(store: ResultStore) -> None:
    await submit(store, make_record())
    await claim(store)
    for word in (
        report(job_pb2.JOB_PHASE_RUNNING, attempt=2),
        report(job_pb2.JOB_PHASE_REFUSED, attempt=2),
        report(job_pb2.JOB_PHASE_REFUSED, device_id="pi4"),
    ):
        assert await store.jobs.change({job_id(1): word}) == ()


async def test_what_a_board_returns_waits_and_does_not_count(store: ResultStore) -> None:
    await submit(store, make_record(max_attempts=1))
    at = NOW
    for attempt in range(1, 7):
        (record,) = await claim(store, at=at)
        assert record.job.attempts == attempt
        record = await change(
            store, 1, report(job_pb2.JOB_PHASE_RETURNED, attempt=attempt, reason="no room", at=at)
        )
        assert (record.job.state, record.job.reason) == (QUEUED, "returned by the board: no room")
        assert record.job.max_attempts == 1 + attempt, "it is one of more than it may have"
        at = record.not_before
    assert at - NOW == 2 + 4 + 8 + 16 + 32 + 64


async def test_what_a_board_refuses_is_dead(store: ResultStore) -> None:
    await submit(store, make_record())
    await claim(store)
    record = await change(store, 1, report(job_pb2.JOB_PHASE_REFUSED, reason="it has no Edge TPU"))
    assert (record.job.state, record.job.reason) == (DEAD, "refused by the board: it has no Edge TPU")


async def test_a_reason_that_is_cut_says_so(store: ResultStore) -> None:
    for number, length in ((1, 500), (2, 501)):
        await submit(store, make_record(number), batch_id=f"batch-{number}")
        await claim(store)
        told = "x" * (length - len("refused by the board: "))
        record = await change(store, number, report(job_pb2.JOB_PHASE_REFUSED, reason=told))
        assert len(record.job.reason) == 500
        assert record.job.reason.endswith("xx" if number == 1 else "x…")


# Results.


async def test_a_result_ends_its_job(store: ResultStore, make_result: MakeResult) -> None:
    await submit(store, make_record())
    (record,) = await claim(store)
    seen: list[JobRecord] = []
    store.jobs.listen(seen.extend)
    assert await store.append("pi5", "spool-1", 1, make_result(record.job.run_id)) is True
    record = await get(store, 1)
    assert (record.job.state, record.job.run_status) == (DONE, result_pb2.RUN_STATUS_SUCCEEDED)
    assert (record.lease_until, record.job.run_id) == (None, f"{job_id(1)}-1")
    assert record.ended is not None
    await store.probe()
    assert [told.job_id for told in seen] == [job_id(1)]
    assert await claim(store, at=NOW + 3000) == ()


async def test_a_result_that_is_not_stored_ends_nothing(store: ResultStore, make_result: MakeResult) -> None:
    await submit(store, make_record())
    (record,) = await claim(store)
    await store.append("pi5", "spool-1", 3, make_result("run-3"))
    waiting = store.append("pi5", "spool-1", 5, make_result(record.job.run_id), after=4)
    with pytest.raises(Exception, match="4 is not stored"):
        await waiting
    assert (await get(store, 1)).job.state == LEASED


async def test_a_finished_job_is_never_offered_again(store: ResultStore, make_result: MakeResult) -> None:
    await submit(store, make_record())
    (record,) = await claim(store)
    await store.append("pi5", "spool-1", 1, make_result(record.job.run_id))
    for transition in (
        lambda record: expired(record, NOW + 9000),
        lambda record: renewed(record, "pi5", NOW + 9000),
        lambda record: cancelled(record, "by ann", NOW),
        lambda record: retried(record, NOW + 9000, NOW),
        report(job_pb2.JOB_PHASE_RUNNING),
        report(job_pb2.JOB_PHASE_RETURNED),
    ):
        assert await store.jobs.change({job_id(1): transition}) == ()
    assert await claim(store, at=NOW + 100) == ()


async def test_a_run_that_failed_is_an_answer(store: ResultStore, make_result: MakeResult) -> None:
    await submit(store, make_record())
    (record,) = await claim(store)
    await store.append("pi5", "spool-1", 1, failed(make_result, record.job.run_id, "model_rejected"))
    record = await get(store, 1)
    assert (record.job.state, record.job.run_status) == (DONE, result_pb2.RUN_STATUS_FAILED)


@pytest.mark.parametrize("code", ["agent_restarted", "agent_stopped", "worker_killed", "model_missing"])
async def test_a_run_that_was_lost_is_made_again(
    store: ResultStore, make_result: MakeResult, code: str
) -> None:
    # Far ahead of the clock by which the store notes that a result came.
    await submit(store, make_record(max_attempts=2, deadline=9e9))
    for attempt in (1, 2):
        (record,) = await claim(store, at=8e9 + attempt * 600, most=1)
        await store.append("pi5", "spool-1", attempt, failed(make_result, record.job.run_id, code))
        record = await get(store, 1)
        assert f"it ended with {code}" in record.job.reason
        assert record.job.state == (QUEUED if attempt == 1 else DEAD)
    assert record.job.run_status == result_pb2.RUN_STATUS_FAILED


async def test_the_result_of_an_earlier_attempt_ends_the_job(
    store: ResultStore, make_result: MakeResult
) -> None:
    await submit(store, make_record())
    await claim(store)
    await change(store, 1, lambda record: expired(record, NOW + 60))
    await claim(store, at=NOW + 70)
    await store.append("pi5", "spool-1", 1, make_result(f"{job_id(1)}-1"))
    record = await get(store, 1)
    assert (record.job.state, record.job.run_id, record.job.attempts) == (DONE, f"{job_id(1)}-1", 2)
    # The other one comes too late, and is a result like any other.
    assert await store.append("pi5", "spool-1", 2, make_result(f"{job_id(1)}-2")) is True
    assert (await get(store, 1)).job == record.job


async def test_an_earlier_attempt_that_was_lost_or_cancelled_changes_nothing(
    store: ResultStore, make_result: MakeResult
) -> None:
    await submit(store, make_record())
    await claim(store)
    await change(store, 1, lambda record: expired(record, NOW + 60))
    (record,) = await claim(store, at=NOW + 70)
    run_id = f"{job_id(1)}-1"
    await store.append("pi5", "spool-1", 1, failed(make_result, run_id, "agent_restarted"))
    assert await get(store, 1) == record


async def test_a_job_that_was_given_up_is_done_by_its_result(
    store: ResultStore, make_result: MakeResult
) -> None:
    await submit(store, make_record(max_attempts=1))
    (record,) = await claim(store)
    assert (await change(store, 1, lambda record: expired(record, NOW + 60))).job.state == DEAD
    await store.append("pi5", "spool-1", 1, make_result(record.job.run_id))
    record = await get(store, 1)
    assert (record.job.state, record.job.reason) == (DONE, "")


async def test_a_result_from_before_the_store_was_set_back_ends_its_job(
    store: ResultStore, make_result: MakeResult
) -> None:
    await submit(store, make_record())
    await store.append("pi5", "spool-1", 1, make_result(f"{job_id(1)}-2"))
    record = await get(store, 1)
    assert (record.job.state, record.job.attempts, record.job.run_id) == (DONE, 2, f"{job_id(1)}-2")


async def test_a_result_of_another_board_ends_nothing(store: ResultStore, make_result: MakeResult) -> None:
    await submit(store, make_record())
    (record,) = await claim(store)
    await store.append("pi4", "spool-1", 1, make_result(record.job.run_id, device_id="pi4"))
    assert await get(store, 1) == record


# Cancelling.


async def test_a_waiting_job_is_cancelled_at_once(store: ResultStore) -> None:
    await submit(store, make_record())
    record = await change(store, 1, lambda record: cancelled(record, "cancelled by ann", NOW + 1))
    assert (record.job.state, record.job.reason) == (CANCELLED, "cancelled by ann")
    assert seconds_of(record.job.ended_at) == NOW + 1
    assert await claim(store, at=NOW + 2) == ()


async def _cancelling(store: ResultStore) -> JobRecord:
    await submit(store, make_record())
    await claim(store)
    record = await change(store, 1, lambda record: cancelled(record, "cancelled by ann", NOW + 1))
    assert (record.job.state, record.cancelling) == (LEASED, True)
    assert [each.job_id for each in await store.jobs.cancelling()] == [job_id(1)]
    return record


async def test_a_board_is_told_first_and_ends_it_with_its_result(
    store: ResultStore, make_result: MakeResult
) -> None:
    record = await _cancelling(store)
    result = make_result(record.job.run_id, status=result_pb2.RUN_STATUS_CANCELLED)
    await store.append("pi5", "spool-1", 1, result)
    record = await get(store, 1)
    assert (record.job.state, record.job.run_status) == (CANCELLED, result_pb2.RUN_STATUS_CANCELLED)
    assert record.job.reason == "cancelled by ann"
    assert await store.jobs.cancelling() == ()


@pytest.mark.parametrize("phase", [job_pb2.JOB_PHASE_RETURNED, job_pb2.JOB_PHASE_REFUSED])
async def test_a_board_that_lets_go_of_it_ends_it(store: ResultStore, phase: int) -> None:
    await _cancelling(store)
    assert (await change(store, 1, report(phase))).job.state == CANCELLED


async def test_a_board_that_does_not_answer_can_not_keep_it(store: ResultStore) -> None:
    record = await _cancelling(store)
    again = await change(store, 1, lambda record: renewed(record, "pi5", NOW + 900))
    assert again.lease_until == record.lease_until
    ended = await change(store, 1, lambda record: expired(record, NOW + 60))
    assert (ended.job.state, ended.job.reason) == (CANCELLED, "cancelled by ann; the board did not answer")


async def test_what_is_finished_before_the_board_hears_of_it_is_done(
    store: ResultStore, make_result: MakeResult
) -> None:
    record = await _cancelling(store)
    await store.append("pi5", "spool-1", 1, make_result(record.job.run_id))
    assert (await get(store, 1)).job.state == DONE


async def test_a_run_that_was_cancelled_on_the_board_is_cancelled(
    store: ResultStore, make_result: MakeResult
) -> None:
    await submit(store, make_record())
    (record,) = await claim(store)
    result = make_result(record.job.run_id, status=result_pb2.RUN_STATUS_CANCELLED)
    await store.append("pi5", "spool-1", 1, result)
    record = await get(store, 1)
    assert (record.job.state, record.job.reason) == (CANCELLED, "the run was cancelled on the board")


# Once more.


async def test_a_dead_job_gets_its_attempts_again(store: ResultStore) -> None:
    await submit(store, make_record(max_attempts=1))
    await claim(store)
    await change(store, 1, lambda record: expired(record, NOW + 60))
    record = await change(store, 1, lambda record: retried(record, NOW + 9000, NOW + 100))
    assert (record.job.state, record.deadline, record.ended) == (QUEUED, NOW + 9000, None)
    assert not record.job.HasField("ended_at")
    assert record.job.reason.startswith("queued again; before that: given up after 1 attempt: its lease")
    (record,) = await claim(store, at=NOW + 100)
    assert (record.job.attempts, record.job.max_attempts) == (2, 2)
    # A name that was given out is not given out again.
    assert record.job.run_id == f"{job_id(1)}-2"
    record = await change(store, 1, lambda record: expired(record, NOW + 160))
    assert (record.job.state, record.job.reason[:24]) == (DEAD, "given up after 1 attempt")


# Looking.


async def test_jobs_come_latest_first_and_page_by_page(store: ResultStore) -> None:
    await submit(store, *(make_record(n) for n in range(1, 6)))
    first = await store.jobs.jobs(JobQuery(), limit=2)
    await submit(store, make_record(6, batch_id="batch-2"), batch_id="batch-2")
    second = await store.jobs.jobs(JobQuery(), limit=3, before=first[-1].arrival)
    assert [int(record.job_id[:4]) for record in (*first, *second)] == [5, 4, 3, 2, 1]


async def test_every_filter_must_hold(store: ResultStore) -> None:
    await submit(store, make_record(1), make_record(2, device_id="pi4"), make_record(3))
    await submit(store, make_record(4, batch_id="batch-2"), batch_id="batch-2")
    await claim(store, most=1)

    async def found(query: JobQuery) -> list[int]:
        return [int(record.job_id[:4]) for record in await store.jobs.jobs(query, limit=10)]

    assert await found(JobQuery()) == [4, 3, 2, 1]
    assert await found(JobQuery(device_id="pi5")) == [4, 3, 1]
    assert await found(JobQuery(batch_id="batch-1", device_id="pi5")) == [3, 1]
    assert await found(JobQuery(states=(LEASED, RUNNING))) == [1]
    assert await found(JobQuery(states=(QUEUED,), job_ids=(job_id(1), job_id(2)))) == [2]
    assert await found(JobQuery(job_ids=(job_id(7),))) == []


async def test_a_job_is_found_by_its_first_digits(store: ResultStore) -> None:
    await submit(store, *(make_record(n) for n in (1, 12, 13)))
    assert [record.job_id for record in await store.jobs.find_jobs("0012")] == [job_id(12)]
    assert len(await store.jobs.find_jobs("001")) == 2
    assert [record.job_id for record in await store.jobs.find_jobs(job_id(1))] == [job_id(1)]
    assert await store.jobs.find_jobs("9") == ()


async def test_many_jobs_are_asked_for_at_once(store: ResultStore) -> None:
    records = await submit(store, *(make_record(n) for n in range(1, 1301)))
    names = [record.job_id for record in records]
    assert len(await store.jobs.versions(names)) == 1300
    changed = await store.jobs.change({name: lambda record: cancelled(record, "all", NOW) for name in names})
    assert len(changed) == 1300
    assert await store.jobs.queue_lengths() == {}


async def test_the_queue_is_counted(store: ResultStore) -> None:
    empty = await store.jobs.queue_counts()
    assert (dict(empty.by_state), empty.oldest_waiting) == ({}, None)
    await submit(store, make_record(1), make_record(2, device_id="pi4"), make_record(3))
    await claim(store, most=1)
    counts = await store.jobs.queue_counts()
    assert (dict(counts.by_state), counts.oldest_waiting) == ({QUEUED: 2, LEASED: 1}, NOW)
    assert await store.jobs.queue_lengths() == {"pi5": 2, "pi4": 1}
    assert await store.jobs.waiting_devices(at=NOW) == {"pi5", "pi4"}


async def test_files_are_in_use_while_a_job_is_open(store: ResultStore) -> None:
    await submit(store, make_record(1, sha256="aa" * 32, inputs="bb" * 32), make_record(2, sha256="cc" * 32))
    assert await store.jobs.files_in_use() == {"aa" * 32, "bb" * 32, "cc" * 32}
    await change(store, 1, lambda record: cancelled(record, "no", NOW))
    assert await store.jobs.files_in_use() == {"cc" * 32}


async def test_old_jobs_are_forgotten_with_their_batches(store: ResultStore) -> None:
    await submit(store, make_record(1), make_record(2))
    await submit(store, make_record(3, batch_id="batch-2"), batch_id="batch-2")
    for number in (1, 3):
        await change(store, number, lambda record, n=number: cancelled(record, "no", NOW + n))
    assert await store.jobs.forget_jobs(ended_before=NOW + 1, limit=10) == 0
    assert await store.jobs.forget_jobs(ended_before=NOW + 9, limit=1) == 1
    assert [int(record.job_id[:4]) for record in await store.jobs.jobs(JobQuery(), limit=9)] == [3, 2]
    assert await store.jobs.forget_jobs(ended_before=NOW + 9, limit=10) == 1
    # A batch that still has a job is remembered, the other is not.
    assert (await store.jobs.submit(Batch("batch-1", "d", NOW), ())).repeated
    assert not (await store.jobs.submit(Batch("batch-2", "d", NOW), ())).repeated


async def test_a_listener_is_told_of_every_change(store: ResultStore) -> None:
    seen: list[tuple[int, int, int]] = []
    store.jobs.listen(
        lambda records: seen.extend(
            (int(record.job_id[:4]), int(record.job.state), record.version) for record in records
        )
    )
    await submit(store, make_record(1), make_record(2))
    await claim(store, most=1)
    await change(store, 2, lambda record: cancelled(record, "no", NOW))
    await store.probe()
    assert seen == [(1, QUEUED, 1), (2, QUEUED, 1), (1, LEASED, 2), (2, CANCELLED, 2)]


# Reservations.


def booking(device_id: str, holder: str = "ann", ends: float = NOW + 60) -> Booking:
    """A reservation."""
    return Booking(device_id, holder, "power measurements", ends)


async def test_a_reserved_board_takes_only_its_holders_jobs(store: ResultStore) -> None:
    await submit(store, make_record(1, holder="bob"), make_record(2, holder="ann"))
    assert await store.jobs.reserve((booking("pi5"),), at=NOW) == ()
    assert await store.jobs.bookings(at=NOW) == (booking("pi5"),)
    assert [record.job_id for record in await claim(store)] == [job_id(2)]
    assert await store.jobs.waiting_devices(at=NOW + 59) == frozenset()
    # It ends by itself.
    assert await store.jobs.waiting_devices(at=NOW + 60) == {"pi5"}
    assert await store.jobs.bookings(at=NOW + 60) == ()
    assert [record.job_id for record in await claim(store, at=NOW + 60)] == [job_id(1)]


async def test_boards_are_taken_all_or_none(store: ResultStore) -> None:
    await store.jobs.reserve((booking("pi4", "bob"),), at=NOW)
    assert await store.jobs.reserve((booking("pi4"), booking("pi5")), at=NOW) == (booking("pi4", "bob"),)
    assert await store.jobs.bookings(at=NOW) == (booking("pi4", "bob"),)
    # What is over is in nobody's way, and who has one may have it longer.
    later = (booking("pi4", ends=NOW + 90), booking("pi5", ends=NOW + 90))
    assert await store.jobs.reserve(later, at=NOW + 60) == ()
    longer = (booking("pi4", ends=NOW + 200),)
    assert await store.jobs.reserve(longer, at=NOW + 61) == ()
    assert await store.jobs.bookings(at=NOW + 61) == (*longer, later[1])


async def test_boards_are_given_back(store: ResultStore) -> None:
    for device_id, holder in (("pi3", "ann"), ("pi4", "ann"), ("pi5", "bob")):
        await store.jobs.reserve((booking(device_id, holder),), at=NOW)
    assert await store.jobs.release(("pi4", "pi5"), holder="ann", at=NOW) == (booking("pi4"),)
    assert await store.jobs.release(None, holder="ann", at=NOW) == (booking("pi3"),)
    assert await store.jobs.release(("pi5",), holder=None, at=NOW) == (booking("pi5", "bob"),)
    assert await store.jobs.bookings(at=NOW) == ()
    assert await store.jobs.release(None, holder=None, at=NOW) == ()


# Labels.


async def test_labels_are_set_and_removed(store: ResultStore) -> None:
    await store.jobs.set_labels(("pi4", "pi5"), {"rack": "3", "lab": "zürich"})
    await store.jobs.set_labels(("pi5",), {"rack": "", "shelf": "top", "never": ""})
    assert await store.jobs.labels() == {
        "pi4": {"rack": "3", "lab": "zürich"},
        "pi5": {"lab": "zürich", "shelf": "top"},
    }
    await store.jobs.set_labels(("pi4",), {"rack": "", "lab": ""})
    assert "pi4" not in await store.jobs.labels()


async def test_a_closed_store_says_so(store: ResultStore) -> None:
    await store.close()
    for call in (submit(store, make_record()), store.jobs.labels(), claim(store)):
        with pytest.raises(StoreUnavailable):
            await call


# Whatever happens, in whatever order.


class AnyLife(RuleBasedStateMachine):
    """One job, a board that does and says anything, a clock that rises, and whoever cancels or retries."""

    def __init__(self) -> None:
        super().__init__()
        self.now = NOW
        self.record = make_record(max_attempts=2, deadline=NOW + 5000)
        self.offered: set[str] = set()
        self.ended: list[int] = []

    def step(self, after: JobRecord) -> None:
        """Takes the next record over, and looks at what must hold of every two that follow each other."""
        before, self.record = self.record, after
        assert after.job_id == before.job_id
        assert after.job.attempts >= before.job.attempts
        if after.job != before.job or after.cancelling != before.cancelling:
            assert after.version > before.version, "a watcher would miss it"
        if before.job.state in (DONE, CANCELLED):
            assert after is before, "the end is the end"
        if before.job.state == DEAD and after.job.state != DEAD:
            assert after.job.state in (QUEUED, DONE)

    @rule(seconds=st.sampled_from([0.5, 3.0, 70.0, 400.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.step(expired(self.record, self.now))

    @rule()
    def it_is_handed_out(self) -> None:
        if claimable(self.record, self.now):
            self.step(claimed(self.record, self.now + 60, self.now))
            assert self.record.job.run_id not in self.offered, "a run would be started twice"
            self.offered.add(self.record.job.run_id)

    @rule(board=st.sampled_from(["pi5", "pi4"]))
    def it_is_named(self, board: str) -> None:
        self.step(renewed(self.record, board, self.now + 60))

    @rule(phase=st.sampled_from(job_pb2.JobPhase.values()), attempt=st.integers(0, 4))
    def a_board_reports(self, phase: int, attempt: int) -> None:
        self.step(report(phase, attempt=attempt, at=self.now)(self.record))

    @rule()
    def somebody_cancels(self) -> None:
        self.step(cancelled(self.record, "by ann", self.now))

    @rule()
    def somebody_retries(self) -> None:
        self.step(retried(self.record, self.now + 5000, self.now))

    @rule(
        attempt=st.integers(1, 4),
        status=st.sampled_from([1, 2, 3]),
        code=st.sampled_from(["agent_restarted", "model_rejected", "worker_killed"]),
    )
    def a_result_is_stored(self, attempt: int, status: int, code: str) -> None:
        result = result_pb2.RunResult(status=status)  # type: ignore[arg-type]
        if status == result_pb2.RUN_STATUS_FAILED:
            result.error.code = code
        before = self.record
        self.step(after_result(self.record, "pi5", attempt, result, self.now))
        if status == result_pb2.RUN_STATUS_SUCCEEDED and before.job.state != CANCELLED:
            assert self.record.job.state == DONE
            assert self.record.job.run_status
        self.step(after_result(self.record, "pi4", attempt, result, self.now))

    @invariant()
    def it_is_whole(self) -> None:
        record = self.record
        assert record.is_held == (record.lease_until is not None)
        assert record.is_open == (record.ended is None)
        assert record.is_open == (not record.job.HasField("ended_at"))
        assert not record.cancelling or record.is_held
        assert not record.lapsed or record.job.state == QUEUED
        assert (
            record.job.state in (DEAD, CANCELLED, DONE, QUEUED) or not record.job.reason or record.cancelling
        )
        assert record.job.state != DEAD or record.job.reason
        assert record_of((7, *row_of(record))) == replace(record, arrival=7)


TestAnyLife = AnyLife.TestCase
TestAnyLife.settings = settings(max_examples=150, stateful_step_count=30, deadline=None)
