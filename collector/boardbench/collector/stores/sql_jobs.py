"""Jobs in SQL, as far as it is the same for every database: all that reads, and what a result does to one."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic

from boardbench.collector.jobs import (
    COLUMNS,
    HELD_STATES,
    OPEN_STATES,
    Booking,
    JobQuery,
    JobRecord,
    JobStore,
    QueueCounts,
    Transition,
    after_result,
    record_of,
)
from boardbench.collector.stores.reading import BEYOND, Asking, Connection
from boardbench.v1 import job_pb2, result_pb2

SELECT = f"SELECT arrival, {', '.join(COLUMNS)} FROM jobs"

_OPEN = f"({', '.join(str(int(state)) for state in OPEN_STATES)})"
HELD = f"({', '.join(str(int(state)) for state in HELD_STATES)})"
_QUEUED = int(job_pb2.JOB_STATE_QUEUED)

CLAIMABLE = (
    f"state = {_QUEUED} AND not_before <= ? AND deadline > ? AND NOT EXISTS ("
    "SELECT 1 FROM reservations r"
    " WHERE r.device_id = jobs.device_id AND r.ends > ? AND r.holder <> jobs.holder)"
)
"""A job that may be handed out at a time, which is given three times."""


class SqlJobStore(JobStore, Generic[Connection]):
    """What every ``JobStore`` in SQL has alike."""

    def __init__(self, store: Asking[Connection]) -> None:
        self._store = store
        self._listeners: list[Callable[[Sequence[JobRecord]], None]] = []
        self._touched: list[JobRecord] = []

    def listen(self, listener: Callable[[Sequence[JobRecord]], None]) -> None:
        """See ``JobStore.listen``."""
        self._listeners.append(listener)

    # For the store: in the writer's thread, and then in the loop.

    @abc.abstractmethod
    def _apply(self, db: Connection, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        """Returns the jobs that changed, by what happens to them."""

    def end_by_results(
        self,
        db: Connection,
        endings: Sequence[tuple[str, str, int, result_pb2.RunResult]],
        at: float,
    ) -> None:
        """Does to jobs what their results do, in the transaction that stores them.

        Each ending is the board, the job, the attempt, and how the run ended.
        """
        transitions: dict[str, Transition] = {}
        for device_id, job_id, attempt, result in endings:
            transitions[job_id] = _then(transitions.get(job_id), device_id, attempt, result, at)
        self._apply(db, transitions)

    @property
    def touched(self) -> int:
        """How many jobs the transaction has changed so far; for :meth:`take_touched` to go back to."""
        return len(self._touched)

    def take_touched(self, first: int = 0) -> list[JobRecord]:
        """Returns the jobs that the transaction changed from there on, and forgets them."""
        taken = self._touched[first:]
        del self._touched[first:]
        return taken

    def tell(self, touched: Sequence[JobRecord]) -> None:
        """Tells the listeners; runs in the loop."""
        for listener in self._listeners:
            listener(touched)

    # The contract.

    async def change(self, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        """See ``JobStore.change``."""
        return await self._store.write(lambda db: self._apply(db, transitions))

    async def due(self, *, at: float, limit: int) -> tuple[JobRecord, ...]:
        """See ``JobStore.due``."""
        query = (
            f"{SELECT} WHERE job_id IN ("
            f"SELECT job_id FROM jobs WHERE state IN {_OPEN} AND deadline <= ?"
            f" UNION SELECT job_id FROM jobs WHERE state IN {HELD} AND lease_until <= ?"
            ") ORDER BY arrival LIMIT ?"
        )
        return await self._read_records(query, (at, at, limit))

    async def jobs(self, query: JobQuery, *, limit: int, before: int | None = None) -> tuple[JobRecord, ...]:
        """See ``JobStore.jobs``."""
        conditions: list[str] = []
        values: list[Any] = []
        for names, column, kind in ((query.job_ids, "job_id", "text"), (query.states, "state", "int")):
            if names:
                condition, value = self._store.among(column, names, kind)
                conditions.append(condition)
                values.append(value)
        for name, column in ((query.batch_id, "batch_id"), (query.device_id, "device_id")):
            if name:
                conditions.append(f"{column} = ?")
                values.append(self._store.whole(name))
        if before is not None:
            conditions.append("arrival < ?")
            values.append(before)
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        return await self._read_records(f"{SELECT}{where} ORDER BY arrival DESC LIMIT ?", (*values, limit))

    async def find_jobs(self, first_digits: str) -> tuple[JobRecord, ...]:
        """See ``JobStore.find_jobs``."""
        begin = self._store.whole(first_digits)
        whole = await self._read_records(f"{SELECT} WHERE job_id = ?", (begin,))
        if whole:
            return whole
        return await self._read_records(
            f"{SELECT} WHERE job_id >= ? AND job_id < ? ORDER BY job_id LIMIT 2", (begin, begin + BEYOND)
        )

    async def versions(self, job_ids: Sequence[str]) -> Mapping[str, int]:
        """See ``JobStore.versions``."""
        condition, value = self._store.among("job_id", job_ids)
        return dict(await self._read(f"SELECT job_id, version FROM jobs WHERE {condition}", (value,)))

    async def cancelling(self) -> tuple[JobRecord, ...]:
        """See ``JobStore.cancelling``."""
        return await self._read_records(
            f"{SELECT} WHERE state IN {HELD} AND cancelling = 1 ORDER BY arrival", ()
        )

    async def waiting_devices(self, *, at: float) -> frozenset[str]:
        """See ``JobStore.waiting_devices``."""
        rows = await self._read(f"SELECT DISTINCT device_id FROM jobs WHERE {CLAIMABLE}", (at, at, at))
        return frozenset(device_id for (device_id,) in rows)

    async def queue_lengths(self) -> Mapping[str, int]:
        """See ``JobStore.queue_lengths``."""
        query = f"SELECT device_id, COUNT(*) FROM jobs WHERE state IN {_OPEN} GROUP BY device_id"
        return dict(await self._read(query))

    async def queue_counts(self) -> QueueCounts:
        """See ``JobStore.queue_counts``."""

        def read(db: Connection) -> QueueCounts:
            by_state = dict(self._store.rows(db, "SELECT state, COUNT(*) FROM jobs GROUP BY state"))
            oldest = self._records(db, f"{SELECT} WHERE state = {_QUEUED} ORDER BY arrival LIMIT 1", ())
            waiting = oldest[0].job.created_at.ToMicroseconds() / 1e6 if oldest else None
            return QueueCounts(by_state, waiting)

        return await self._store.read(read)

    async def files_in_use(self) -> frozenset[str]:
        """See ``JobStore.files_in_use``."""
        query = f"SELECT DISTINCT model_sha256, inputs_sha256 FROM jobs WHERE state IN {_OPEN}"
        return frozenset(name for row in await self._read(query) for name in row if name)

    async def bookings(self, *, at: float) -> tuple[Booking, ...]:
        """See ``JobStore.bookings``."""
        return await self._store.read(lambda db: self._bookings(db, at))

    async def labels(self) -> Mapping[str, Mapping[str, str]]:
        """See ``JobStore.labels``."""
        found: dict[str, dict[str, str]] = {}
        for device_id, name, value in await self._read(
            "SELECT device_id, name, value FROM labels ORDER BY device_id, name"
        ):
            found.setdefault(device_id, {})[name] = value
        return found

    def _bookings(self, db: Connection, at: float) -> tuple[Booking, ...]:
        query = "SELECT device_id, holder, reason, ends FROM reservations WHERE ends > ? ORDER BY device_id"
        return tuple(Booking(*row) for row in self._store.rows(db, query, (at,)))

    def _records(self, db: Connection, query: str, values: Sequence[Any]) -> tuple[JobRecord, ...]:
        return tuple(map(record_of, self._store.rows(db, query, values)))

    async def _read(self, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        return await self._store.read(lambda db: self._store.rows(db, query, values))

    async def _read_records(self, query: str, values: Sequence[Any]) -> tuple[JobRecord, ...]:
        return await self._store.read(lambda db: self._records(db, query, values))


def _then(
    before: Transition | None, device_id: str, attempt: int, result: result_pb2.RunResult, at: float
) -> Transition:
    def transition(record: JobRecord) -> JobRecord:
        return after_result(record if before is None else before(record), device_id, attempt, result, at)

    return transition
