"""Jobs in the PostgreSQL store: any number of collectors hand them out, each job to one board once.

A claim takes rows ``FOR UPDATE SKIP LOCKED``: what another collector is about to hand out is passed over
instead of waited for. Everything else that changes a job locks its row first, in the order of identities.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

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
from boardbench.collector.stores.postgres_schema import storable
from boardbench.v1 import job_pb2, result_pb2

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

_T = TypeVar("_T")

_SELECT = f"SELECT arrival, {', '.join(COLUMNS)} FROM jobs"

_INSERT = f"INSERT INTO jobs (arrival, {', '.join(COLUMNS)}) VALUES (%s, {', '.join('%b' for _ in COLUMNS)})"

_UPDATE = f"UPDATE jobs SET {', '.join(f'{name} = %b' for name in COLUMNS)} WHERE job_id = %s"

_OPEN = f"({', '.join(str(int(state)) for state in OPEN_STATES)})"
_HELD = f"({', '.join(str(int(state)) for state in HELD_STATES)})"
_QUEUED = int(job_pb2.JOB_STATE_QUEUED)

_CLAIMABLE = (
    f"state = {_QUEUED} AND not_before <= %(at)s AND deadline > %(at)s AND NOT EXISTS ("
    "SELECT 1 FROM reservations r"
    " WHERE r.device_id = jobs.device_id AND r.ends > %(at)s AND r.holder <> jobs.holder)"
)

_RESERVE = (
    "INSERT INTO reservations (device_id, holder, reason, ends)"
    " SELECT * FROM unnest(%(devices)s::text[], %(holders)s::text[], %(reasons)s::text[], %(ends)s::float8[])"
    " ON CONFLICT (device_id) DO UPDATE"
    " SET holder = excluded.holder, reason = excluded.reason, ends = excluded.ends"
    " WHERE reservations.holder = excluded.holder OR reservations.ends <= %(at)s RETURNING device_id"
)

_SELECT_BOOKINGS = (
    "SELECT device_id, holder, reason, ends FROM reservations WHERE ends > %s ORDER BY device_id"
)


class Access(Protocol):
    """The store's way to its database."""

    def write(self, function: Callable[[Connection], _T]) -> Awaitable[_T]:
        """Has the function called in a transaction; done once that is committed. It may be called again."""

    def read(self, function: Callable[[Connection], _T]) -> Awaitable[_T]:
        """Has the function called with a connection that only reads."""


class PostgresJobStore:
    """A ``JobStore`` in the database of a ``PostgresResultStore``."""

    def __init__(self, access: Access) -> None:
        self._access = access
        self._listeners: list[Callable[[Sequence[JobRecord]], None]] = []
        self._touched: list[JobRecord] = []

    def listen(self, listener: Callable[[Sequence[JobRecord]], None]) -> None:
        """See ``JobStore.listen``."""
        self._listeners.append(listener)

    # For the store: in the writer's thread, and then in the loop.

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
        if touched:
            for listener in self._listeners:
                listener(touched)

    # The contract.

    async def submit(self, batch: Batch, records: Sequence[JobRecord]) -> Submission:
        """See ``JobStore.submit``."""

        def write(db: Connection) -> Submission:
            inserted = db.execute(
                "INSERT INTO batches (batch_id, digest, created) VALUES (%s, %s, %s)"
                " ON CONFLICT (batch_id) DO NOTHING",
                (batch.batch_id, batch.digest, batch.created),
            )
            if inserted.rowcount == 0:
                found = db.execute(
                    "SELECT digest FROM batches WHERE batch_id = %s", (batch.batch_id,)
                ).fetchone()
                rows = _records(db, f"{_SELECT} WHERE batch_id = %s ORDER BY arrival", (batch.batch_id,))
                return Submission(found[0] if found else "", rows, repeated=True)
            first = take_places(db, "jobs", len(records))
            stored = [replace(record, arrival=first + place) for place, record in enumerate(records)]
            db.cursor().executemany(_INSERT, [(record.arrival, *_row(record)) for record in stored])
            self._touched += stored
            return Submission(batch.digest, tuple(stored), repeated=False)

        return await self._access.write(write)

    async def claim(
        self, device_id: str, *, at: float, lease_until: float, most_open: int
    ) -> tuple[JobRecord, ...]:
        """See ``JobStore.claim``."""

        def write(db: Connection) -> tuple[JobRecord, ...]:
            # Whoever else claims for this board waits here, and then counts what it was given.
            db.execute("SELECT 1 FROM devices WHERE device_id = %s FOR UPDATE", (device_id,))
            held = db.execute(
                f"SELECT COUNT(*) FROM jobs WHERE device_id = %s AND state IN {_HELD}", (device_id,)
            ).fetchone()
            room = max(0, most_open - (held[0] if held else 0))
            if not room:
                return ()
            records = _records(
                db,
                f"{_SELECT} WHERE device_id = %(device)s AND {_CLAIMABLE}"
                " ORDER BY priority DESC, arrival LIMIT %(room)s FOR UPDATE SKIP LOCKED",
                {"device": device_id, "at": at, "room": room},
            )
            given = tuple(claimed(record, lease_until, at) for record in records)
            self._update(db, given)
            return given

        return await self._access.write(write)

    async def change(self, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        """See ``JobStore.change``."""
        return await self._access.write(lambda db: self._apply(db, transitions))

    def _apply(self, db: Connection, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        if not transitions:
            return ()
        records = _records(
            db, f"{_SELECT} WHERE job_id = ANY(%s) ORDER BY job_id FOR UPDATE", (list(transitions),)
        )
        pairs = [(record, transitions[record.job_id](record)) for record in records]
        changed = [(before, after) for before, after in pairs if after is not before]
        self._update(db, [after for before, after in changed if after.version != before.version])
        self._update(db, [after for before, after in changed if after.version == before.version], quiet=True)
        return tuple(after for _, after in changed)

    def _update(self, db: Connection, records: Sequence[JobRecord], *, quiet: bool = False) -> None:
        if records:
            db.cursor().executemany(_UPDATE, [(*_row(record), record.job_id) for record in records])
        if not quiet:
            self._touched += records

    async def due(self, *, at: float, limit: int) -> tuple[JobRecord, ...]:
        """See ``JobStore.due``."""
        query = (
            f"{_SELECT} WHERE job_id IN ("
            f"SELECT job_id FROM jobs WHERE state IN {_OPEN} AND deadline <= %s"
            f" UNION SELECT job_id FROM jobs WHERE state IN {_HELD} AND lease_until <= %s"
            ") ORDER BY arrival LIMIT %s"
        )
        return await self._read(query, (at, at, limit))

    async def jobs(self, query: JobQuery, *, limit: int, before: int | None = None) -> tuple[JobRecord, ...]:
        """See ``JobStore.jobs``."""
        conditions: list[str] = []
        values: list[Any] = []
        for names, column, kind in ((query.job_ids, "job_id", "text"), (query.states, "state", "int")):
            if names:
                conditions.append(f"{column} = ANY(%s::{kind}[])")
                values.append(list(names))
        for name, column in ((query.batch_id, "batch_id"), (query.device_id, "device_id")):
            if name:
                conditions.append(f"{column} = %s")
                values.append(storable(name, None))
        if before is not None:
            conditions.append("arrival < %s")
            values.append(before)
        where = f" WHERE {' AND '.join(conditions)}" if conditions else ""
        return await self._read(f"{_SELECT}{where} ORDER BY arrival DESC LIMIT %s", (*values, limit))

    async def find_jobs(self, first_digits: str) -> tuple[JobRecord, ...]:
        """See ``JobStore.find_jobs``."""
        begin = storable(first_digits, None)
        whole = await self._read(f"{_SELECT} WHERE job_id = %s", (begin,))
        if whole:
            return whole
        return await self._read(
            f"{_SELECT} WHERE job_id >= %s AND job_id < %s ORDER BY job_id LIMIT 2",
            (begin, begin + "\U0010ffff"),
        )

    async def versions(self, job_ids: Sequence[str]) -> Mapping[str, int]:
        """See ``JobStore.versions``."""

        def read(db: Connection) -> dict[str, int]:
            rows = db.execute("SELECT job_id, version FROM jobs WHERE job_id = ANY(%s)", (list(job_ids),))
            return {str(job_id): int(version) for job_id, version in rows}

        return await self._access.read(read)

    async def cancelling(self) -> tuple[JobRecord, ...]:
        """See ``JobStore.cancelling``."""
        return await self._read(f"{_SELECT} WHERE state IN {_HELD} AND cancelling = 1 ORDER BY arrival", ())

    async def waiting_devices(self, *, at: float) -> frozenset[str]:
        """See ``JobStore.waiting_devices``."""

        def read(db: Connection) -> frozenset[str]:
            rows = db.execute(f"SELECT DISTINCT device_id FROM jobs WHERE {_CLAIMABLE}", {"at": at})
            return frozenset(str(device_id) for (device_id,) in rows)

        return await self._access.read(read)

    async def queue_lengths(self) -> Mapping[str, int]:
        """See ``JobStore.queue_lengths``."""

        def read(db: Connection) -> dict[str, int]:
            query = f"SELECT device_id, COUNT(*) FROM jobs WHERE state IN {_OPEN} GROUP BY device_id"
            return {str(device_id): int(count) for device_id, count in db.execute(query)}

        return await self._access.read(read)

    async def queue_counts(self) -> QueueCounts:
        """See ``JobStore.queue_counts``."""

        def read(db: Connection) -> QueueCounts:
            rows = db.execute("SELECT state, COUNT(*) FROM jobs GROUP BY state")
            by_state = {int(state): int(count) for state, count in rows}
            oldest = _records(db, f"{_SELECT} WHERE state = {_QUEUED} ORDER BY arrival LIMIT 1", ())
            waiting = oldest[0].job.created_at.ToMicroseconds() / 1e6 if oldest else None
            return QueueCounts(by_state, waiting)

        return await self._access.read(read)

    async def files_in_use(self) -> frozenset[str]:
        """See ``JobStore.files_in_use``."""

        def read(db: Connection) -> frozenset[str]:
            query = f"SELECT DISTINCT model_sha256, inputs_sha256 FROM jobs WHERE state IN {_OPEN}"
            return frozenset(str(name) for row in db.execute(query) for name in row if name)

        return await self._access.read(read)

    async def forget_jobs(self, *, ended_before: float, limit: int) -> int:
        """See ``JobStore.forget_jobs``."""

        def write(db: Connection) -> int:
            rows = db.execute(
                "SELECT job_id, batch_id FROM jobs WHERE ended < %s ORDER BY ended LIMIT %s FOR UPDATE",
                (ended_before, limit),
            ).fetchall()
            db.execute("DELETE FROM jobs WHERE job_id = ANY(%s)", ([job_id for job_id, _ in rows],))
            db.execute(
                "DELETE FROM batches WHERE batch_id = ANY(%s)"
                " AND NOT EXISTS (SELECT 1 FROM jobs WHERE jobs.batch_id = batches.batch_id)",
                (sorted({batch_id for _, batch_id in rows}),),
            )
            return len(rows)

        return await self._access.write(write)

    async def reserve(self, bookings: Sequence[Booking], *, at: float) -> tuple[Booking, ...]:
        """See ``JobStore.reserve``."""
        wanted = {booking.device_id: booking for booking in bookings}
        ordered = [wanted[name] for name in sorted(wanted)]

        def write(db: Connection) -> tuple[Booking, ...]:
            from psycopg import Rollback

            got: set[str] = set()
            with db.transaction() as attempt:
                # The row decides, and not what was read before: two may ask in the same moment.
                for (device_id,) in db.execute(
                    _RESERVE,
                    {
                        "devices": [booking.device_id for booking in ordered],
                        "holders": [booking.holder for booking in ordered],
                        "reasons": [storable(booking.reason, None) for booking in ordered],
                        "ends": [booking.ends for booking in ordered],
                        "at": at,
                    },
                ):
                    got.add(str(device_id))
                if len(got) < len(ordered):
                    raise Rollback(attempt)
            if len(got) == len(ordered):
                return ()
            return tuple(
                booking
                for booking in _bookings(db, at)
                if booking.device_id in wanted and booking.holder != wanted[booking.device_id].holder
            )

        return await self._access.write(write)

    async def release(
        self, device_ids: Sequence[str] | None, *, holder: str | None, at: float
    ) -> tuple[Booking, ...]:
        """See ``JobStore.release``."""

        def write(db: Connection) -> tuple[Booking, ...]:
            db.execute("DELETE FROM reservations WHERE ends <= %s", (at,))
            rows = db.execute(
                "DELETE FROM reservations"
                " WHERE (%(all)s OR device_id = ANY(%(devices)s::text[]))"
                " AND (%(any)s OR holder = %(holder)s) RETURNING device_id, holder, reason, ends",
                {
                    "all": device_ids is None,
                    "devices": list(device_ids or ()),
                    "any": holder is None,
                    "holder": holder or "",
                },
            ).fetchall()
            return tuple(Booking(*row) for row in sorted(rows))

        return await self._access.write(write)

    async def bookings(self, *, at: float) -> tuple[Booking, ...]:
        """See ``JobStore.bookings``."""
        return await self._access.read(lambda db: tuple(_bookings(db, at)))

    async def set_labels(self, device_ids: Sequence[str], labels: Mapping[str, str]) -> None:
        """See ``JobStore.set_labels``."""
        rows = sorted(
            {(device, name): value for device in device_ids for name, value in labels.items()}.items()
        )

        def write(db: Connection) -> None:
            gone = [key for key, value in rows if not value]
            kept = [(*key, storable(value, None)) for key, value in rows if value]
            cursor = db.cursor()
            if gone:
                cursor.executemany("DELETE FROM labels WHERE device_id = %s AND name = %s", gone)
            if kept:
                cursor.executemany(
                    "INSERT INTO labels (device_id, name, value) VALUES (%s, %s, %s)"
                    " ON CONFLICT (device_id, name) DO UPDATE SET value = excluded.value",
                    kept,
                )

        await self._access.write(write)

    async def labels(self) -> Mapping[str, Mapping[str, str]]:
        """See ``JobStore.labels``."""

        def read(db: Connection) -> dict[str, dict[str, str]]:
            found: dict[str, dict[str, str]] = {}
            for device_id, name, value in db.execute(
                "SELECT device_id, name, value FROM labels ORDER BY device_id, name"
            ):
                found.setdefault(device_id, {})[name] = value
            return found

        return await self._access.read(read)

    async def _read(self, query: str, values: Sequence[Any]) -> tuple[JobRecord, ...]:
        return await self._access.read(lambda db: _records(db, query, values))


def take_places(db: Connection, name: str, count: int) -> int:
    """Returns the first of so many new places in an order, which nobody else gets.

    Until the transaction ends everybody else waits, so that what becomes readable later has a later place.
    """
    row = db.execute(
        "UPDATE counters SET value = value + %s WHERE name = %s RETURNING value", (count, name)
    ).fetchone()
    assert row is not None, f"the store has no counter {name}"
    return int(row[0]) - count + 1


def _then(
    before: Transition | None, device_id: str, attempt: int, result: result_pb2.RunResult, at: float
) -> Transition:
    def transition(record: JobRecord) -> JobRecord:
        return after_result(record if before is None else before(record), device_id, attempt, result, at)

    return transition


def _row(record: JobRecord) -> tuple[Any, ...]:
    return tuple(storable(value, None) if isinstance(value, str) else value for value in row_of(record))


def _records(db: Connection, query: str, values: Sequence[Any] | Mapping[str, Any]) -> tuple[JobRecord, ...]:
    return tuple(map(record_of, db.execute(query, values, binary=True)))


def _bookings(db: Connection, at: float) -> Iterable[Booking]:
    return [Booking(*row) for row in db.execute(_SELECT_BOOKINGS, (at,))]
