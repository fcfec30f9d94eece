"""Jobs in the PostgreSQL store: any number of collectors hand them out, each job to one board once.

A claim takes rows ``FOR UPDATE SKIP LOCKED``: what another collector is about to hand out is passed over
instead of waited for. Everything else that changes a job locks its row first, in the order of identities.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

from boardbench.collector.jobs import (
    COLUMNS,
    Batch,
    Booking,
    JobRecord,
    Submission,
    Transition,
    claimed,
    row_of,
)
from boardbench.collector.stores.postgres_schema import storable
from boardbench.collector.stores.reading import Asking
from boardbench.collector.stores.sql_jobs import CLAIMABLE, HELD, SELECT, SqlJobStore

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

Access: TypeAlias = Asking["Connection"]
"""The store's way to its database."""

_INSERT = f"INSERT INTO jobs (arrival, {', '.join(COLUMNS)}) VALUES (%s, {', '.join('%b' for _ in COLUMNS)})"

_UPDATE = f"UPDATE jobs SET {', '.join(f'{name} = %b' for name in COLUMNS)} WHERE job_id = %s"

_RESERVE = (
    "INSERT INTO reservations (device_id, holder, reason, ends)"
    " SELECT * FROM unnest(%(devices)s::text[], %(holders)s::text[], %(reasons)s::text[], %(ends)s::float8[])"
    " ON CONFLICT (device_id) DO UPDATE"
    " SET holder = excluded.holder, reason = excluded.reason, ends = excluded.ends"
    " WHERE reservations.holder = excluded.holder OR reservations.ends <= %(at)s RETURNING device_id"
)


class PostgresJobStore(SqlJobStore["Connection"]):
    """A ``JobStore`` in the database of a ``PostgresResultStore``."""

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
                there = self._records(db, f"{SELECT} WHERE batch_id = ? ORDER BY arrival", (batch.batch_id,))
                return Submission(found[0] if found else "", there, repeated=True)
            first = take_places(db, "jobs", len(records))
            stored = [replace(record, arrival=first + place) for place, record in enumerate(records)]
            db.cursor().executemany(_INSERT, [(record.arrival, *_row(record)) for record in stored])
            self._touched += stored
            return Submission(batch.digest, tuple(stored), repeated=False)

        return await self._store.write(write)

    async def claim(
        self, device_id: str, *, at: float, lease_until: float, most_open: int
    ) -> tuple[JobRecord, ...]:
        """See ``JobStore.claim``."""

        def write(db: Connection) -> tuple[JobRecord, ...]:
            # Whoever else claims for this board waits here, and then counts what it was given.
            db.execute("SELECT 1 FROM devices WHERE device_id = %s FOR UPDATE", (device_id,))
            held = db.execute(
                f"SELECT COUNT(*) FROM jobs WHERE device_id = %s AND state IN {HELD}", (device_id,)
            ).fetchone()
            room = max(0, most_open - (held[0] if held else 0))
            if not room:
                return ()
            waiting = self._records(
                db,
                f"{SELECT} WHERE device_id = ? AND {CLAIMABLE}"
                " ORDER BY priority DESC, arrival LIMIT ? FOR UPDATE SKIP LOCKED",
                (device_id, at, at, at, room),
            )
            given = tuple(claimed(record, lease_until, at) for record in waiting)
            self._update(db, given)
            return given

        return await self._store.write(write)

    def _apply(self, db: Connection, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        if not transitions:
            return ()
        condition, value = self._store.among("job_id", transitions)
        records = self._records(db, f"{SELECT} WHERE {condition} ORDER BY job_id FOR UPDATE", (value,))
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

        return await self._store.write(write)

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
                for booking in self._bookings(db, at)
                if booking.device_id in wanted and booking.holder != wanted[booking.device_id].holder
            )

        return await self._store.write(write)

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

        return await self._store.write(write)

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

        await self._store.write(write)


def take_places(db: Connection, name: str, count: int) -> int:
    """Returns the first of so many new places in an order, which nobody else gets.

    Until the transaction ends everybody else waits, so that what becomes readable later has a later place.
    """
    row = db.execute(
        "UPDATE counters SET value = value + %s WHERE name = %s RETURNING value", (count, name)
    ).fetchone()
    assert row is not None, f"the store has no counter {name}"
    return int(row[0]) - count + 1


def _row(record: JobRecord) -> tuple[Any, ...]:
    return tuple(storable(value, None) if isinstance(value, str) else value for value in row_of(record))
