"""Jobs that are forgotten when the process ends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from boardbench.collector.jobs import (
    Batch,
    Booking,
    JobQuery,
    JobRecord,
    QueueCounts,
    Submission,
    Transition,
    after_result,
    claimable,
    claimed,
    seconds_of,
)
from boardbench.v1 import job_pb2, result_pb2


class MemoryJobStore:
    """A ``JobStore`` in memory; everything it does is done when the call returns."""

    def __init__(self, check_open: Callable[[], None]) -> None:
        self._check_open = check_open
        self._listeners: list[Callable[[Sequence[JobRecord]], None]] = []
        self._batches: dict[str, Batch] = {}
        self._jobs: dict[str, JobRecord] = {}
        self._arrivals = 0
        self._bookings: dict[str, Booking] = {}
        self._labels: dict[str, dict[str, str]] = {}

    def listen(self, listener: Callable[[Sequence[JobRecord]], None]) -> None:
        """See ``JobStore.listen``."""
        self._listeners.append(listener)

    def end_by_result(
        self, device_id: str, job_id: str, attempt: int, result: result_pb2.RunResult, at: float
    ) -> None:
        """Does to the job what its result does."""
        self._apply({job_id: lambda record: after_result(record, device_id, attempt, result, at)})

    async def submit(self, batch: Batch, records: Sequence[JobRecord]) -> Submission:
        """See ``JobStore.submit``."""
        self._check_open()
        known = self._batches.get(batch.batch_id)
        if known is not None:
            there = sorted(self._of(JobQuery(batch_id=batch.batch_id)), key=lambda record: record.arrival)
            return Submission(known.digest, tuple(there), repeated=True)
        self._batches[batch.batch_id] = batch
        stored = []
        for record in records:
            self._arrivals += 1
            stored.append(replace(record, arrival=self._arrivals))
        self._keep(stored)
        return Submission(batch.digest, tuple(stored), repeated=False)

    async def claim(
        self, device_id: str, *, at: float, lease_until: float, most_open: int
    ) -> tuple[JobRecord, ...]:
        """See ``JobStore.claim``."""
        self._check_open()
        mine = self._of(JobQuery(device_id=device_id))
        waiting = [record for record in mine if self._claimable(record, at)]
        waiting.sort(key=lambda record: (-record.job.priority, record.arrival))
        room = max(0, most_open - sum(record.is_held for record in mine))
        given = tuple(claimed(record, lease_until, at) for record in waiting[:room])
        self._keep(given)
        return given

    def _claimable(self, record: JobRecord, at: float) -> bool:
        booking = self._bookings.get(record.device_id)
        reserved = booking is not None and booking.ends > at and booking.holder != record.job.holder
        return claimable(record, at) and not reserved

    async def change(self, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        """See ``JobStore.change``."""
        self._check_open()
        return self._apply(transitions)

    def _apply(self, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        changed = []
        for job_id, transition in transitions.items():
            record = self._jobs.get(job_id)
            after = transition(record) if record is not None else None
            if after is not None and after is not record:
                changed.append(after)
        self._keep(changed)
        return tuple(changed)

    def _keep(self, records: Sequence[JobRecord]) -> None:
        risen = [
            record
            for record in records
            if record.job_id not in self._jobs or self._jobs[record.job_id].version < record.version
        ]
        self._jobs.update((record.job_id, record) for record in records)
        if risen:
            for listener in self._listeners:
                listener(risen)

    async def due(self, *, at: float, limit: int) -> tuple[JobRecord, ...]:
        """See ``JobStore.due``."""
        self._check_open()
        return tuple(
            record
            for record in self._jobs.values()
            if record.is_open
            and (record.deadline <= at or (record.lease_until is not None and record.lease_until <= at))
        )[:limit]

    async def jobs(self, query: JobQuery, *, limit: int, before: int | None = None) -> tuple[JobRecord, ...]:
        """See ``JobStore.jobs``."""
        self._check_open()
        found = [record for record in self._of(query) if before is None or record.arrival < before]
        return tuple(sorted(found, key=lambda record: -record.arrival)[:limit])

    def _of(self, query: JobQuery) -> list[JobRecord]:
        return [
            record
            for record in self._jobs.values()
            if (not query.job_ids or record.job_id in query.job_ids)
            and (not query.batch_id or record.job.batch_id == query.batch_id)
            and (not query.device_id or record.device_id == query.device_id)
            and (not query.states or record.job.state in query.states)
        ]

    async def find_jobs(self, first_digits: str) -> tuple[JobRecord, ...]:
        """See ``JobStore.find_jobs``."""
        self._check_open()
        if first_digits in self._jobs:
            return (self._jobs[first_digits],)
        names = sorted(name for name in self._jobs if name.startswith(first_digits))
        return tuple(self._jobs[name] for name in names[:2])

    async def versions(self, job_ids: Sequence[str]) -> Mapping[str, int]:
        """See ``JobStore.versions``."""
        self._check_open()
        return {job_id: self._jobs[job_id].version for job_id in job_ids if job_id in self._jobs}

    async def cancelling(self) -> tuple[JobRecord, ...]:
        """See ``JobStore.cancelling``."""
        self._check_open()
        return tuple(record for record in self._jobs.values() if record.cancelling)

    async def waiting_devices(self, *, at: float) -> frozenset[str]:
        """See ``JobStore.waiting_devices``."""
        self._check_open()
        return frozenset(record.device_id for record in self._jobs.values() if self._claimable(record, at))

    async def queue_lengths(self) -> Mapping[str, int]:
        """See ``JobStore.queue_lengths``."""
        self._check_open()
        return Counter(record.device_id for record in self._open())

    async def queue_counts(self) -> QueueCounts:
        """See ``JobStore.queue_counts``."""
        self._check_open()
        waiting = [
            seconds_of(record.job.created_at)
            for record in self._jobs.values()
            if record.job.state == job_pb2.JOB_STATE_QUEUED
        ]
        by_state = Counter(int(record.job.state) for record in self._jobs.values())
        return QueueCounts(by_state, min(waiting, default=None))

    async def files_in_use(self) -> frozenset[str]:
        """See ``JobStore.files_in_use``."""
        self._check_open()
        models = {record.job.model.sha256 for record in self._open()}
        return frozenset(
            models | {record.inputs.sha256 for record in self._open() if record.inputs is not None}
        )

    def _open(self) -> Iterable[JobRecord]:
        return (record for record in self._jobs.values() if record.is_open)

    async def forget_jobs(self, *, ended_before: float, limit: int) -> int:
        """See ``JobStore.forget_jobs``."""
        self._check_open()
        old = [
            record
            for record in self._jobs.values()
            if record.ended is not None and record.ended < ended_before
        ]
        old.sort(key=lambda record: record.ended or 0.0)
        for record in old[:limit]:
            del self._jobs[record.job_id]
        kept = {record.job.batch_id for record in self._jobs.values()}
        for record in old[:limit]:
            if record.job.batch_id not in kept:
                self._batches.pop(record.job.batch_id, None)
        return len(old[:limit])

    async def reserve(self, bookings: Sequence[Booking], *, at: float) -> tuple[Booking, ...]:
        """See ``JobStore.reserve``."""
        there = {booking.device_id: booking for booking in await self.bookings(at=at)}
        taken = tuple(
            there[booking.device_id]
            for booking in bookings
            if booking.device_id in there and there[booking.device_id].holder != booking.holder
        )
        if not taken:
            self._bookings.update((booking.device_id, booking) for booking in bookings)
        return taken

    async def release(
        self, device_ids: Sequence[str] | None, *, holder: str | None, at: float
    ) -> tuple[Booking, ...]:
        """See ``JobStore.release``."""
        freed = tuple(
            booking
            for booking in await self.bookings(at=at)
            if (device_ids is None or booking.device_id in device_ids) and holder in (None, booking.holder)
        )
        for booking in freed:
            del self._bookings[booking.device_id]
        return freed

    async def bookings(self, *, at: float) -> tuple[Booking, ...]:
        """See ``JobStore.bookings``."""
        self._check_open()
        return tuple(
            self._bookings[name] for name in sorted(self._bookings) if self._bookings[name].ends > at
        )

    async def set_labels(self, device_ids: Sequence[str], labels: Mapping[str, str]) -> None:
        """See ``JobStore.set_labels``."""
        self._check_open()
        for device_id in device_ids:
            mine = self._labels.setdefault(device_id, {})
            mine.update(labels)
            for name in [name for name, value in mine.items() if not value]:
                del mine[name]
            if not mine:
                del self._labels[device_id]

    async def labels(self) -> Mapping[str, Mapping[str, str]]:
        """See ``JobStore.labels``."""
        self._check_open()
        return {device_id: dict(labels) for device_id, labels in self._labels.items()}
