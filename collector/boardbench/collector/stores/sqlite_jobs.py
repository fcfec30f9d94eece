"""Jobs in the SQLite store's file: the same connection writes them, in the same gathered commits."""

from __future__ import annotations

import sqlite3
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from boardbench.collector.jobs import (
    COLUMNS,
    HELD_STATES,
    OPEN_STATES,
    Batch,
    Booking,
    JobQuery,
    JobRecord,
    QueueCounts,
    Submission,
    Transition,
    after_result,
    claimed,
    record_of,
    row_of,
)
from boardbench.v1 import job_pb2, result_pb2

_T = TypeVar("_T")

_VARIABLES = 500
"""Identities in one statement: SQLite of old takes 999 variables (https://www.sqlite.org/limits.html)."""

_SELECT = f"SELECT arrival, {', '.join(COLUMNS)} FROM jobs"  # names of ours

_INSERT = f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' for _ in COLUMNS)})"

_UPDATE = f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in COLUMNS)} WHERE job_id = ?"

_OPEN = f"({', '.join(str(int(state)) for state in OPEN_STATES)})"
_HELD = f"({', '.join(str(int(state)) for state in HELD_STATES)})"
_QUEUED = int(job_pb2.JOB_STATE_QUEUED)

_CLAIMABLE = (
    f"state = {_QUEUED} AND not_before <= :at AND deadline > :at AND NOT EXISTS ("
    "SELECT 1 FROM reservations r"
    " WHERE r.device_id = jobs.device_id AND r.ends > :at AND r.holder <> jobs.holder)"
)


class Access(Protocol):
    """The store's way to its file."""

    def write(self, function: Callable[[sqlite3.Connection], _T]) -> Awaitable[_T]:
        """Has the function called in a transaction; done once that is committed."""

    def read(self, function: Callable[[sqlite3.Connection], _T]) -> Awaitable[_T]:
        """Has the function called with a connection that only reads."""


class SqliteJobStore:
    """A ``JobStore`` in the file of a ``SqliteResultStore``."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._listeners: list[Callable[[Sequence[JobRecord]], None]] = []
        self._touched: list[JobRecord] = []

    def listen(self, listener: Callable[[Sequence[JobRecord]], None]) -> None:
        """See ``JobStore.listen``."""
        self._listeners.append(listener)

    # For the store: in the writer's thread, and then in the loop.

    def end_by_result(
        self,
        db: sqlite3.Connection,
        device_id: str,
        job_id: str,
        attempt: int,
        result: result_pb2.RunResult,
        at: float,
    ) -> None:
        """Does to the job what its result does, in the transaction that stores the result."""
        self._apply(db, {job_id: lambda record: after_result(record, device_id, attempt, result, at)})

    def take_touched(self) -> list[JobRecord]:
        """Returns the jobs that the last transaction changed."""
        touched, self._touched = self._touched, []
        return touched

    def tell(self, touched: Sequence[JobRecord]) -> None:
        """Tells the listeners; runs in the loop."""
        if touched:
            for listener in self._listeners:
                listener(touched)

    # The contract.

    async def submit(self, batch: Batch, records: Sequence[JobRecord]) -> Submission:
        """See ``JobStore.submit``."""

        def write(db: sqlite3.Connection) -> Submission:
            inserted = db.execute(
                "INSERT INTO batches (batch_id, digest, created) VALUES (?,?,?)"
                " ON CONFLICT (batch_id) DO NOTHING",
                (batch.batch_id, batch.digest, batch.created),
            )
            if inserted.rowcount == 0:
                (digest,) = db.execute(
                    "SELECT digest FROM batches WHERE batch_id = ?", (batch.batch_id,)
                ).fetchone()
                rows = db.execute(f"{_SELECT} WHERE batch_id = ? ORDER BY arrival", (batch.batch_id,))
                return Submission(digest, tuple(map(record_of, rows)), repeated=True)
            stored = []
            for record in records:
                arrival = db.execute(_INSERT, row_of(record)).lastrowid
                assert arrival is not None
                stored.append(replace(record, arrival=arrival))
            self._touched += stored
            return Submission(batch.digest, tuple(stored), repeated=False)

        return await self._access.write(write)

    async def claim(
        self, device_id: str, *, at: float, lease_until: float, most_open: int
    ) -> tuple[JobRecord, ...]:
        """See ``JobStore.claim``."""

        def write(db: sqlite3.Connection) -> tuple[JobRecord, ...]:
            (held,) = db.execute(
                f"SELECT COUNT(*) FROM jobs WHERE device_id = ? AND state IN {_HELD}",
                (device_id,),
            ).fetchone()
            rows = db.execute(
                f"{_SELECT} WHERE device_id = :device AND {_CLAIMABLE}"
                " ORDER BY priority DESC, arrival LIMIT :room",
                {"device": device_id, "at": at, "room": max(0, most_open - held)},
            ).fetchall()
            given = tuple(claimed(record_of(row), lease_until, at) for row in rows)
            self._update(db, given)
            return given

        return await self._access.write(write)

    async def change(self, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        """See ``JobStore.change``."""
        return await self._access.write(lambda db: self._apply(db, transitions))

    def _apply(self, db: sqlite3.Connection, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        changed = []
        for some in _chunks(list(transitions)):
            rows = db.execute(f"{_SELECT} WHERE job_id IN ({_marks(some)})", some).fetchall()
            for record in map(record_of, rows):
                after = transitions[record.job_id](record)
                if after is not record:
                    changed.append(after)
                    self._update(db, (after,), quiet=after.version == record.version)
        return tuple(changed)

    def _update(self, db: sqlite3.Connection, records: Sequence[JobRecord], *, quiet: bool = False) -> None:
        db.executemany(_UPDATE, [(*row_of(record), record.job_id) for record in records])
        if not quiet:
            self._touched += records

    async def due(self, *, at: float, limit: int) -> tuple[JobRecord, ...]:
        """See ``JobStore.due``."""
        query = (
            f"{_SELECT} WHERE job_id IN ("
            f"SELECT job_id FROM jobs WHERE state IN {_OPEN} AND deadline <= ?"
            f" UNION SELECT job_id FROM jobs WHERE state IN {_HELD} AND lease_until <= ?"
            ") ORDER BY arrival LIMIT ?"
        )
        return await self._records(query, (at, at, limit))

    async def jobs(self, query: JobQuery, *, limit: int, before: int | None = None) -> tuple[JobRecord, ...]:
        """See ``JobStore.jobs``."""
        conditions: list[str] = []
        values: list[Any] = []
        for names, column in ((query.job_ids, "job_id"), (query.states, "state")):
            if names:
                conditions.append(f"{column} IN ({_marks(names)})")
                values.extend(names)
        for name, column in ((query.batch_id, "batch_id"), (query.device_id, "device_id")):
            if name:
                conditions.append(f"{column} = ?")
                values.append(name)
        if before is not None:
            conditions.append("arrival < ?")
            values.append(before)
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        return await self._records(f"{_SELECT}{where} ORDER BY arrival DESC LIMIT ?", (*values, limit))

    async def find_jobs(self, first_digits: str) -> tuple[JobRecord, ...]:
        """See ``JobStore.find_jobs``."""
        whole = await self._records(f"{_SELECT} WHERE job_id = ?", (first_digits,))
        if whole:
            return whole
        return await self._records(
            f"{_SELECT} WHERE job_id >= ? AND job_id < ? ORDER BY job_id LIMIT 2",
            (first_digits, first_digits + "\U0010ffff"),
        )

    async def versions(self, job_ids: Sequence[str]) -> Mapping[str, int]:
        """See ``JobStore.versions``."""

        def read(db: sqlite3.Connection) -> dict[str, int]:
            found: dict[str, int] = {}
            for some in _chunks(job_ids):
                found.update(
                    db.execute(f"SELECT job_id, version FROM jobs WHERE job_id IN ({_marks(some)})", some)
                )
            return found

        return await self._access.read(read)

    async def cancelling(self) -> tuple[JobRecord, ...]:
        """See ``JobStore.cancelling``."""
        return await self._records(f"{_SELECT} WHERE state IN {_HELD} AND cancelling = 1", ())

    async def waiting_devices(self, *, at: float) -> frozenset[str]:
        """See ``JobStore.waiting_devices``."""

        def read(db: sqlite3.Connection) -> frozenset[str]:
            query = f"SELECT DISTINCT device_id FROM jobs WHERE {_CLAIMABLE}"
            return frozenset(device_id for (device_id,) in db.execute(query, {"at": at}))

        return await self._access.read(read)

    async def queue_lengths(self) -> Mapping[str, int]:
        """See ``JobStore.queue_lengths``."""

        def read(db: sqlite3.Connection) -> dict[str, int]:
            query = f"SELECT device_id, COUNT(*) FROM jobs WHERE state IN {_OPEN} GROUP BY device_id"
            return dict(db.execute(query))

        return await self._access.read(read)

    async def queue_counts(self) -> QueueCounts:
        """See ``JobStore.queue_counts``."""

        def read(db: sqlite3.Connection) -> QueueCounts:
            by_state = dict(db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state"))
            oldest = db.execute(f"{_SELECT} WHERE state = {_QUEUED} ORDER BY arrival LIMIT 1").fetchone()
            waiting = None if oldest is None else record_of(oldest).job.created_at.ToMicroseconds() / 1e6
            return QueueCounts(by_state, waiting)

        return await self._access.read(read)

    async def files_in_use(self) -> frozenset[str]:
        """See ``JobStore.files_in_use``."""

        def read(db: sqlite3.Connection) -> frozenset[str]:
            query = f"SELECT DISTINCT model_sha256, inputs_sha256 FROM jobs WHERE state IN {_OPEN}"
            return frozenset(name for row in db.execute(query) for name in row if name)

        return await self._access.read(read)

    async def forget_jobs(self, *, ended_before: float, limit: int) -> int:
        """See ``JobStore.forget_jobs``."""

        def write(db: sqlite3.Connection) -> int:
            rows = db.execute(
                "SELECT job_id, batch_id FROM jobs WHERE ended < ? ORDER BY ended LIMIT ?",
                (ended_before, limit),
            ).fetchall()
            db.executemany("DELETE FROM jobs WHERE job_id = ?", [(job_id,) for job_id, _ in rows])
            db.executemany(
                "DELETE FROM batches WHERE batch_id = ?"
                " AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.batch_id = batches.batch_id)",
                [(batch_id,) for batch_id in {batch_id for _, batch_id in rows}],
            )
            return len(rows)

        return await self._access.write(write)

    async def reserve(self, bookings: Sequence[Booking], *, at: float) -> tuple[Booking, ...]:
        """See ``JobStore.reserve``."""

        def write(db: sqlite3.Connection) -> tuple[Booking, ...]:
            there = {booking.device_id: booking for booking in _bookings(db, at)}
            taken = tuple(
                there[booking.device_id]
                for booking in bookings
                if booking.device_id in there and there[booking.device_id].holder != booking.holder
            )
            if not taken:
                db.executemany(
                    "INSERT INTO reservations (device_id, holder, reason, ends) VALUES (?,?,?,?)"
                    " ON CONFLICT (device_id) DO UPDATE"
                    " SET holder = excluded.holder, reason = excluded.reason, ends = excluded.ends",
                    [(each.device_id, each.holder, each.reason, each.ends) for each in bookings],
                )
            return taken

        return await self._access.write(write)

    async def release(
        self, device_ids: Sequence[str] | None, *, holder: str | None, at: float
    ) -> tuple[Booking, ...]:
        """See ``JobStore.release``."""

        def write(db: sqlite3.Connection) -> tuple[Booking, ...]:
            db.execute("DELETE FROM reservations WHERE ends <= ?", (at,))
            freed = tuple(
                booking
                for booking in _bookings(db, at)
                if (device_ids is None or booking.device_id in device_ids)
                and holder in (None, booking.holder)
            )
            db.executemany(
                "DELETE FROM reservations WHERE device_id = ?", [(booking.device_id,) for booking in freed]
            )
            return freed

        return await self._access.write(write)

    async def bookings(self, *, at: float) -> tuple[Booking, ...]:
        """See ``JobStore.bookings``."""
        return await self._access.read(lambda db: tuple(_bookings(db, at)))

    async def set_labels(self, device_ids: Sequence[str], labels: Mapping[str, str]) -> None:
        """See ``JobStore.set_labels``."""
        rows = [(device_id, name, value) for device_id in device_ids for name, value in labels.items()]

        def write(db: sqlite3.Connection) -> None:
            db.executemany(
                "DELETE FROM labels WHERE device_id = ? AND name = ?",
                [(device_id, name) for device_id, name, _ in rows],
            )
            db.executemany(
                "INSERT INTO labels (device_id, name, value) VALUES (?,?,?)", [row for row in rows if row[2]]
            )

        await self._access.write(write)

    async def labels(self) -> Mapping[str, Mapping[str, str]]:
        """See ``JobStore.labels``."""

        def read(db: sqlite3.Connection) -> dict[str, dict[str, str]]:
            found: dict[str, dict[str, str]] = {}
            for device_id, name, value in db.execute(
                "SELECT device_id, name, value FROM labels ORDER BY device_id, name"
            ):
                found.setdefault(device_id, {})[name] = value
            return found

        return await self._access.read(read)

    async def _records(self, query: str, values: Sequence[Any]) -> tuple[JobRecord, ...]:
        return await self._access.read(lambda db: tuple(map(record_of, db.execute(query, values))))


def _bookings(db: sqlite3.Connection, at: float) -> Iterator[Booking]:
    rows = db.execute(
        "SELECT device_id, holder, reason, ends FROM reservations WHERE ends > ? ORDER BY device_id", (at,)
    )
    return (Booking(*row) for row in rows.fetchall())


def _marks(values: Sequence[object]) -> str:
    return ", ".join("?" for _ in values)


def _chunks(values: Sequence[str]) -> Iterable[Sequence[str]]:
    return (values[at : at + _VARIABLES] for at in range(0, len(values), _VARIABLES))
