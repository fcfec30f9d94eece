"""Jobs in the SQLite store's file: the same connection writes them, in the same gathered commits."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from dataclasses import replace

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
from boardbench.collector.stores.sql_jobs import CLAIMABLE, HELD, SELECT, SqlJobStore

_INSERT = f"INSERT INTO jobs ({', '.join(COLUMNS)}) VALUES ({', '.join('?' for _ in COLUMNS)})"

_UPDATE = f"UPDATE jobs SET {', '.join(f'{name} = ?' for name in COLUMNS)} WHERE job_id = ?"


class SqliteJobStore(SqlJobStore[sqlite3.Connection]):
    """A ``JobStore`` in the file of a ``SqliteResultStore``."""

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
                there = self._records(db, f"{SELECT} WHERE batch_id = ? ORDER BY arrival", (batch.batch_id,))
                return Submission(digest, there, repeated=True)
            stored = []
            for record in records:
                arrival = db.execute(_INSERT, row_of(record)).lastrowid
                assert arrival is not None
                stored.append(replace(record, arrival=arrival))
            self._touched += stored
            return Submission(batch.digest, tuple(stored), repeated=False)

        return await self._store.write(write)

    async def claim(
        self, device_id: str, *, at: float, lease_until: float, most_open: int
    ) -> tuple[JobRecord, ...]:
        """See ``JobStore.claim``."""

        def write(db: sqlite3.Connection) -> tuple[JobRecord, ...]:
            (held,) = db.execute(
                f"SELECT COUNT(*) FROM jobs WHERE device_id = ? AND state IN {HELD}", (device_id,)
            ).fetchone()
            waiting = self._records(
                db,
                f"{SELECT} WHERE device_id = ? AND {CLAIMABLE} ORDER BY priority DESC, arrival LIMIT ?",
                (device_id, at, at, at, max(0, most_open - held)),
            )
            given = tuple(claimed(record, lease_until, at) for record in waiting)
            self._update(db, given)
            return given

        return await self._store.write(write)

    def _apply(self, db: sqlite3.Connection, transitions: Mapping[str, Transition]) -> tuple[JobRecord, ...]:
        changed = []
        condition, value = self._store.among("job_id", transitions)
        for record in self._records(db, f"{SELECT} WHERE {condition}", (value,)):
            after = transitions[record.job_id](record)
            if after is not record:
                changed.append(after)
                self._update(db, (after,), quiet=after.version == record.version)
        return tuple(changed)

    def _update(self, db: sqlite3.Connection, records: Sequence[JobRecord], *, quiet: bool = False) -> None:
        db.executemany(_UPDATE, [(*row_of(record), record.job_id) for record in records])
        if not quiet:
            self._touched += records

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

        return await self._store.write(write)

    async def reserve(self, bookings: Sequence[Booking], *, at: float) -> tuple[Booking, ...]:
        """See ``JobStore.reserve``."""

        def write(db: sqlite3.Connection) -> tuple[Booking, ...]:
            there = {booking.device_id: booking for booking in self._bookings(db, at)}
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

        return await self._store.write(write)

    async def release(
        self, device_ids: Sequence[str] | None, *, holder: str | None, at: float
    ) -> tuple[Booking, ...]:
        """See ``JobStore.release``."""

        def write(db: sqlite3.Connection) -> tuple[Booking, ...]:
            db.execute("DELETE FROM reservations WHERE ends <= ?", (at,))
            freed = tuple(
                booking
                for booking in self._bookings(db, at)
                if (device_ids is None or booking.device_id in device_ids)
                and holder in (None, booking.holder)
            )
            db.executemany(
                "DELETE FROM reservations WHERE device_id = ?", [(booking.device_id,) for booking in freed]
            )
            return freed

        return await self._store.write(write)

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

        await self._store.write(write)
