"""Jobs: runs that wait for their boards; what happens to one when, and the contract of where they live.

A job is for one board. It is leased to the board with an attempt, whose run has an identity made from both,
so that an offer that is sent twice starts nothing twice; the lease goes on as long as the board names the job
in its heartbeats. Whatever happens to a job is a pure function here, from a record to the next one; a store
only reads, applies it and writes, in one transaction. Implementations are in ``stores/``; every one passes
the same suite (``tests/collector/test_jobs.py``).

    QUEUED ──claim──▶ LEASED ──report──▶ RUNNING ──result──▶ DONE
      ▲  lease over, returned, board restarted │
      └────────────────────────────────────────┴──▶ DEAD (too often, too late, refused) · CANCELLED
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from boardbench.v1 import job_pb2, model_pb2, result_pb2

OPEN_STATES = (job_pb2.JOB_STATE_QUEUED, job_pb2.JOB_STATE_LEASED, job_pb2.JOB_STATE_RUNNING)
"""A job in one of these has not ended."""

HELD_STATES = (job_pb2.JOB_STATE_LEASED, job_pb2.JOB_STATE_RUNNING)
"""A board has it."""

RUN_LOST = frozenset(
    (
        "agent_restarted",
        "agent_stopped",
        "model_missing",
        "not_started",
        "worker_killed",
        "worker_not_started",
    )
)
"""Error codes of runs that say more about the moment than about the model: another attempt is worth it."""

_JOB_ID_BYTES = 10
"""80 random bits: among a thousand million jobs two alike are less likely than one in a million."""

_RUN_ID = re.compile(rf"([0-9a-f]{{{2 * _JOB_ID_BYTES}}})-([1-9][0-9]{{0,8}})")

_FIRST_PAUSE_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 300.0
"""A board that restarts, or whose disk is full, is not asked again at once: 2 s, 4 s, … 5 min."""

_MAX_REASON_LENGTH = 500


@dataclass(frozen=True)
class JobRecord:
    """A job as it is stored. Its messages are never changed in place."""

    job: job_pb2.Job
    deadline: float
    """Unix seconds, as all times here, by the collector's clock: given up when not ended by then."""
    inputs: model_pb2.Model | None = None
    """The file of inputs; None when the spec names none."""
    arrival: int = 0
    """Its place in the order of submission, given by the store; 0 before."""
    version: int = 1
    """Rises whenever something changed that a watcher would see."""
    lease_until: float | None = None
    """None while no board has it."""
    not_before: float = 0.0
    """It is not handed out before."""
    ended: float | None = None
    cancelling: bool = False
    """It is to end; its board has yet to say so."""
    lapsed: bool = False
    """It waits because its lease ran out: when the board turns up and still has it, that attempt goes on."""
    returns: int = 0
    """Attempts that don't count against it: the board gave them back without a run, or it was queued again
    since. As many more may follow, which ``job.max_attempts`` has been raised by."""

    @property
    def job_id(self) -> str:
        """Identity of the job."""
        return self.job.job_id

    @property
    def device_id(self) -> str:
        """The board."""
        return self.job.device_id

    @property
    def is_open(self) -> bool:
        """Whether it has not ended."""
        return self.job.state in OPEN_STATES

    @property
    def is_held(self) -> bool:
        """Whether a board has it."""
        return self.job.state in HELD_STATES


Transition = Callable[[JobRecord], JobRecord]
"""What happens to a job: returns the record itself when nothing does. Pure, as a store may apply it again."""


@dataclass(frozen=True)
class Batch:
    """Jobs that were submitted together."""

    batch_id: str
    digest: str
    """Of the request, so that another request under the same identity is noticed."""
    created: float


@dataclass(frozen=True)
class Submission:
    """What became of a request to submit."""

    digest: str
    """Of the request that was stored first under the batch's identity."""
    records: tuple[JobRecord, ...]
    """Its jobs as they are now."""
    repeated: bool
    """The batch was there before, and nothing was stored."""


@dataclass(frozen=True)
class JobQuery:
    """Which jobs are wanted; every field that is set must hold, an empty one takes any."""

    job_ids: tuple[str, ...] = ()
    batch_id: str = ""
    device_id: str = ""
    states: tuple[int, ...] = ()


@dataclass(frozen=True)
class QueueCounts:
    """How full the queue is."""

    by_state: Mapping[int, int]
    """Number of jobs by ``JobState``; a state without any is not in it."""
    oldest_waiting: float | None
    """When the QUEUED job that waits longest was submitted; None when none waits."""


@dataclass(frozen=True)
class Booking:
    """A board that is taken for one holder alone."""

    device_id: str
    holder: str
    reason: str
    ends: float


class JobStore(Protocol):
    """Jobs, reservations and the operator's labels.

    Belongs to the loop that opened it. Every call is one transaction and is done once it would survive a
    power cut; StoreError when it could not be. What a result does to its job happens where results are
    appended, in their transaction (:func:`after_result`).
    """

    def listen(self, listener: Callable[[Sequence[JobRecord]], None]) -> None:
        """Has the listener told, in the loop and after the commit, of every job whose version rose here.

        Jobs that end by a result are among them. What another process changed is not told.
        """

    async def submit(self, batch: Batch, records: Sequence[JobRecord]) -> Submission:
        """Stores the batch with its jobs in their order, or finds that its identity is known."""

    async def claim(
        self, device_id: str, *, at: float, lease_until: float, most_open: int
    ) -> tuple[JobRecord, ...]:
        """Leases waiting jobs to the board, until it has ``most_open``, and returns them.

        The highest priority goes first, then the oldest. Left out are jobs that are :func:`claimable` only
        later, and those of others while somebody has reserved the board. However many ask at once, in
        however many processes, a job goes to one.
        """

    async def change(self, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        """Applies each transition to the job of that identity; returns the records that it changed.

        Jobs that are not there are passed over.
        """

    async def due(self, *, at: float, limit: int) -> tuple[JobRecord, ...]:
        """Returns open jobs whose lease or time is over by then."""

    async def jobs(self, query: JobQuery, *, limit: int, before: int | None = None) -> tuple[JobRecord, ...]:
        """Returns at most so many jobs, the latest arrival first; with ``before``, of those before it."""

    async def find_jobs(self, first_digits: str) -> tuple[JobRecord, ...]:
        """Returns the job of this identity, or else up to two whose identity begins so."""

    async def versions(self, job_ids: Sequence[str]) -> Mapping[str, int]:
        """Returns the version of each of these jobs that is there."""

    async def cancelling(self) -> tuple[JobRecord, ...]:
        """Returns held jobs that are to end."""

    async def waiting_devices(self, *, at: float) -> frozenset[str]:
        """Returns the boards that have jobs which could be handed out then."""

    async def queue_lengths(self) -> Mapping[str, int]:
        """Returns how many open jobs each board has; boards without any are not in it."""

    async def queue_counts(self) -> QueueCounts:
        """Returns how full the queue is."""

    async def files_in_use(self) -> frozenset[str]:
        """Returns the SHA-256 of every file that an open job needs."""

    async def forget_jobs(self, *, ended_before: float, limit: int) -> int:
        """Removes at most so many jobs that ended before, the first to end first; returns how many it were.

        A batch goes with its last job.
        """

    async def reserve(self, bookings: Sequence[Booking], *, at: float) -> tuple[Booking, ...]:
        """Takes all these boards, or none; returns those of others that are in the way.

        What the same holder has is replaced.
        """

    async def release(
        self, device_ids: Sequence[str] | None, *, holder: str | None, at: float
    ) -> tuple[Booking, ...]:
        """Gives boards back and returns what was; None for all boards, and for whoever has them."""

    async def bookings(self, *, at: float) -> tuple[Booking, ...]:
        """Returns the reservations that hold then, by board."""

    async def set_labels(self, device_ids: Sequence[str], labels: Mapping[str, str]) -> None:
        """Sets labels of boards; an empty value removes the label."""

    async def labels(self) -> Mapping[str, Mapping[str, str]]:
        """Returns the operator's labels by board; boards without any are not in it."""


# Names.


def new_job_id(random: Callable[[int], bytes]) -> str:
    """Returns an identity for a job; ``random`` returns so many random bytes."""
    return random(_JOB_ID_BYTES).hex()


def run_id_of(job_id: str, attempt: int) -> str:
    """Returns the identity of the run that an attempt is."""
    return f"{job_id}-{attempt}"


def attempt_of(run_id: str) -> tuple[str, int] | None:
    """Returns the job and the attempt that the run is; None when it is of no job."""
    match = _RUN_ID.fullmatch(run_id)
    return (match[1], int(match[2])) if match else None


# What happens to a job.


def new_record(job: job_pb2.Job, *, at: float, deadline: float, inputs: model_pb2.Model | None) -> JobRecord:
    """Returns a job that waits; the message gets its state and its times."""
    queued = job_pb2.Job()
    queued.CopyFrom(job)
    queued.state = job_pb2.JOB_STATE_QUEUED
    set_time(queued.created_at, at)
    set_time(queued.deadline_at, deadline)
    return JobRecord(queued, deadline, inputs)


def claimable(record: JobRecord, at: float) -> bool:
    """Whether a board could be given it now, reservations apart."""
    return record.job.state == job_pb2.JOB_STATE_QUEUED and record.not_before <= at and record.deadline > at


def claimed(record: JobRecord, lease_until: float, at: float) -> JobRecord:
    """A board is given it."""
    attempt = record.job.attempts + 1
    changed = _changed(
        record,
        state=job_pb2.JOB_STATE_LEASED,
        attempts=attempt,
        run_id=run_id_of(record.job_id, attempt),
        reason="",
        progress="",
    )
    set_time(changed.job.leased_at, at)
    return replace(changed, lease_until=lease_until, lapsed=False)


def renewed(record: JobRecord, device_id: str, lease_until: float, progress: str | None = None) -> JobRecord:
    """The board names it among those that it has; the lease goes on, or again when it had run out."""
    if record.device_id != device_id or record.cancelling:
        return record
    if record.is_held:
        if progress is not None and progress != record.job.progress:
            record = _changed(record, progress=progress)
        # Also to an earlier time: the clock may have been set back.
        return replace(record, lease_until=lease_until)
    if record.job.state == job_pb2.JOB_STATE_QUEUED and record.lapsed:
        adopted = _changed(
            record, state=job_pb2.JOB_STATE_LEASED, reason="", progress=progress or record.job.progress
        )
        return replace(adopted, lease_until=lease_until, lapsed=False)
    return record


def reported(
    record: JobRecord,
    device_id: str,
    report: job_pb2.JobReport,
    *,
    at: float,
    lease_until: float,
    progress: str,
) -> JobRecord:
    """The board says what it does with it; what it says of an attempt that is over changes nothing."""
    if record.device_id != device_id or report.attempt != record.job.attempts or not record.is_open:
        return record
    gives_back = report.phase in (job_pb2.JOB_PHASE_RETURNED, job_pb2.JOB_PHASE_REFUSED)
    if gives_back and (record.is_held or record.lapsed):
        if record.cancelling:
            return _ended(record, job_pb2.JOB_STATE_CANCELLED, record.job.reason, at)
        if report.phase == job_pb2.JOB_PHASE_REFUSED:
            reason = f"refused by the board: {report.reason or 'it did not say why'}"
            return _ended(record, job_pb2.JOB_STATE_DEAD, reason, at)
        reason = f"returned by the board: {report.reason or 'it did not say why'}"
        return _again(_uncounted(record, 1), reason, at)
    if gives_back:
        return record
    record = renewed(record, device_id, lease_until, progress)
    if report.phase == job_pb2.JOB_PHASE_RUNNING and record.job.state == job_pb2.JOB_STATE_LEASED:
        return _changed(record, state=job_pb2.JOB_STATE_RUNNING)
    return record


def expired(record: JobRecord, at: float) -> JobRecord:
    """Its lease, or all its time, may be over: then it waits again, or has ended."""
    if not record.is_open:
        return record
    lease_over = record.is_held and record.lease_until is not None and record.lease_until <= at
    if record.cancelling and lease_over:
        reason = f"{record.job.reason}; the board did not answer"
        return _ended(record, job_pb2.JOB_STATE_CANCELLED, reason, at)
    if record.deadline <= at:
        last = f"; before that: {record.job.reason}" if record.job.reason else ""
        taken = record.deadline - seconds_of(record.job.created_at)
        return _ended(
            record, job_pb2.JOB_STATE_DEAD, f"it had not ended {taken:.0f} s after it was submitted{last}", at
        )
    if lease_over:
        again = _again(record, "its lease ran out: the board did not name it any more", at)
        # The board may still have it: it is asked for nothing else before it was heard of.
        return replace(again, lapsed=again.is_open, not_before=at)
    return record


def cancelled(record: JobRecord, reason: str, at: float) -> JobRecord:
    """Somebody wants it ended; a board that has it is to be told first."""
    if not record.is_open or record.cancelling:
        return record
    if record.is_held:
        return replace(_changed(record, reason=reason), cancelling=True)
    return _ended(record, job_pb2.JOB_STATE_CANCELLED, reason, at)


def retried(record: JobRecord, deadline: float, at: float) -> JobRecord:
    """A dead one gets as many attempts again as it had."""
    if record.job.state != job_pb2.JOB_STATE_DEAD:
        return record
    # It waits now, and must not look as if it were given up still.
    reason = f"queued again; before that: {record.job.reason}"
    again = _uncounted(record, record.job.attempts - record.returns)
    changed = _changed(again, state=job_pb2.JOB_STATE_QUEUED, reason=reason, progress="", run_status=0)
    changed.job.ClearField("ended_at")
    set_time(changed.job.deadline_at, deadline)
    return replace(changed, deadline=deadline, ended=None, lease_until=None, not_before=at, lapsed=False)


def _uncounted(record: JobRecord, attempts: int) -> JobRecord:
    """So many of its attempts don't count: as many more may follow."""
    raised = _changed(record, max_attempts=record.job.max_attempts + attempts)
    return replace(raised, returns=record.returns + attempts)


def after_result(
    record: JobRecord, device_id: str, attempt: int, result: result_pb2.RunResult, at: float
) -> JobRecord:
    """The result of an attempt was stored; the first that counts ends the job, whichever attempt it is.

    One that was given up is done by it, too; one that is done or was cancelled stays so.
    """
    if record.device_id != device_id or record.job.state in (
        job_pb2.JOB_STATE_DONE,
        job_pb2.JOB_STATE_CANCELLED,
    ):
        return record
    latest = attempt >= record.job.attempts
    if attempt > record.job.attempts:
        # The store was set back to a time before the attempt.
        record = _changed(record, attempts=attempt)
    if result.status == result_pb2.RUN_STATUS_CANCELLED:
        if record.cancelling:
            return _ended(record, job_pb2.JOB_STATE_CANCELLED, record.job.reason, at, result, attempt)
        if not latest or not record.is_open:
            # A board was told to let go of this attempt.
            return record
        reason = "the run was cancelled on the board"
        return _ended(record, job_pb2.JOB_STATE_CANCELLED, reason, at, result, attempt)
    if result.status == result_pb2.RUN_STATUS_FAILED and result.error.code in RUN_LOST:
        if not latest or not record.is_open:
            return record
        if record.cancelling:
            return _ended(record, job_pb2.JOB_STATE_CANCELLED, record.job.reason, at, result, attempt)
        return _again(record, f"{result.error.code}: {result.error.message}", at, result)
    return _ended(record, job_pb2.JOB_STATE_DONE, "", at, result, attempt)


def _again(
    record: JobRecord, reason: str, at: float, result: result_pb2.RunResult | None = None
) -> JobRecord:
    """It waits for another attempt, or has had enough of them."""
    tries = record.job.attempts - record.returns
    if record.cancelling:
        return _ended(record, job_pb2.JOB_STATE_CANCELLED, record.job.reason, at)
    if record.job.attempts >= record.job.max_attempts:
        return _ended(
            record,
            job_pb2.JOB_STATE_DEAD,
            f"given up after {tries} {'attempt' if tries == 1 else 'attempts'}: {reason}",
            at,
            result,
            record.job.attempts,
        )
    pause = _FIRST_PAUSE_SECONDS * 2 ** min(record.job.attempts - 1, 20)
    changed = _changed(record, state=job_pb2.JOB_STATE_QUEUED, reason=reason, progress="")
    return replace(
        changed, lease_until=None, lapsed=False, not_before=at + min(pause, _LONGEST_PAUSE_SECONDS)
    )


def _ended(
    record: JobRecord,
    state: job_pb2.JobState.ValueType,
    reason: str,
    at: float,
    result: result_pb2.RunResult | None = None,
    attempt: int = 0,
) -> JobRecord:
    changed = _changed(record, state=state, reason=reason, progress="")
    if result is not None:
        changed.job.run_status = result.status
        changed.job.run_id = run_id_of(record.job_id, attempt)
    set_time(changed.job.ended_at, at)
    return replace(changed, ended=at, lease_until=None, lapsed=False, cancelling=False)


def _changed(record: JobRecord, **fields: Any) -> JobRecord:
    """Returns the record with a copy of its job in which these are set, as a newer version."""
    job = job_pb2.Job()
    job.CopyFrom(record.job)
    for name, value in fields.items():
        setattr(job, name, _cut(value) if isinstance(value, str) else value)
    return replace(record, job=job, version=record.version + 1)


def _cut(text: str) -> str:
    """Returns the text, or its beginning, which then says that there was more."""
    return text if len(text) <= _MAX_REASON_LENGTH else text[: _MAX_REASON_LENGTH - 1] + "…"


# What a table holds.

COLUMNS = (
    "job_id",
    "batch_id",
    "device_id",
    "state",
    "priority",
    "holder",
    "model_sha256",
    "inputs_sha256",
    "version",
    "deadline",
    "lease_until",
    "not_before",
    "ended",
    "cancelling",
    "lapsed",
    "returns",
    "job",
    "inputs",
)
"""The columns of a table of jobs beside ``arrival``: text, integers, seconds as doubles, and two messages."""


def row_of(record: JobRecord) -> tuple[Any, ...]:
    """Returns what :data:`COLUMNS` hold."""
    job = record.job
    return (
        job.job_id,
        job.batch_id,
        job.device_id,
        int(job.state),
        job.priority,
        job.holder,
        job.model.sha256,
        record.inputs.sha256 if record.inputs is not None else "",
        record.version,
        record.deadline,
        record.lease_until,
        record.not_before,
        record.ended,
        int(record.cancelling),
        int(record.lapsed),
        record.returns,
        job.SerializeToString(deterministic=True),
        record.inputs.SerializeToString(deterministic=True) if record.inputs is not None else None,
    )


def record_of(row: Sequence[Any]) -> JobRecord:
    """Returns the record of (arrival, :data:`COLUMNS`)."""
    values = dict(zip(("arrival", *COLUMNS), row, strict=True))
    return JobRecord(
        job=job_pb2.Job.FromString(bytes(values["job"])),
        deadline=float(values["deadline"]),
        inputs=None if values["inputs"] is None else model_pb2.Model.FromString(bytes(values["inputs"])),
        arrival=int(values["arrival"]),
        version=int(values["version"]),
        lease_until=values["lease_until"],
        not_before=float(values["not_before"]),
        ended=values["ended"],
        cancelling=bool(values["cancelling"]),
        lapsed=bool(values["lapsed"]),
        returns=int(values["returns"]),
    )


def set_time(timestamp: Any, at: float) -> None:
    """Sets a Timestamp to Unix seconds, exact to the microsecond."""
    timestamp.FromMicroseconds(round(at * 1_000_000))


def seconds_of(timestamp: Any) -> float:
    """Returns the Unix seconds of a Timestamp."""
    return float(timestamp.seconds) + float(timestamp.nanos) / 1e9
