"""The store of a fleet: one PostgreSQL database, any number of collectors.

As with SQLite, one thread writes and gathers what arrives within a short window into one transaction. A
batch is written with a handful of statements over arrays, whatever its size. The row of a spool is locked
before its mark is looked at, so that a board's stream may move from one collector to another at any time:
sequences hold across processes, because the database decides and no process remembers.

What is used of SQL is little on purpose: ``INSERT … SELECT unnest … ON CONFLICT``, ``SELECT … FOR UPDATE``,
window functions; no LISTEN, no advisory locks, no extensions, no triggers. Transactions that the server
asks to run again (40001, 40P01) are run again.
"""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import StoreError, StoreUnavailable
from boardbench.collector.store import Removed, Sighting
from boardbench.collector.stores.gather import Append, Call, Gatherer, Row
from boardbench.collector.stores.postgres_connection import connect_writer, opened
from boardbench.collector.stores.postgres_jobs import PostgresJobStore, take_places
from boardbench.collector.stores.postgres_reading import PostgresReading
from boardbench.collector.stores.postgres_schema import series_key
from boardbench.collector.stores.removing import KEPT, Thinning
from boardbench.collector.stores.writing import SeriesKey, Spool, SqlWriting, Track
from boardbench.v1 import collector_pb2

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

_ATTEMPTS = 8
"""How often a transaction is run that the server asks to run again; each waits longer than the one before."""

_LOCK_MARKS = (
    "SELECT s.device_id, s.spool_id, s.sequence FROM spools s"
    " JOIN unnest(%s::text[], %s::text[]) AS w (device_id, spool_id)"
    " ON s.device_id = w.device_id AND s.spool_id = w.spool_id"
    " ORDER BY s.device_id, s.spool_id FOR UPDATE OF s"
)

_MAKE_MARKS = (
    "INSERT INTO spools (device_id, spool_id, sequence)"
    " SELECT device_id, spool_id, 0 FROM unnest(%s::text[], %s::text[]) AS w (device_id, spool_id)"
    " ON CONFLICT (device_id, spool_id) DO NOTHING"
)

_SET_MARKS = (
    "UPDATE spools SET sequence = w.sequence"
    " FROM unnest(%s::text[], %s::text[], %s::bigint[]) AS w (device_id, spool_id, sequence)"
    " WHERE spools.device_id = w.device_id AND spools.spool_id = w.spool_id"
)

_TYPES = {
    "arrival": "bigint",
    "run_id": "text",
    "device_id": "text",
    "spool_id": "text",
    "sequence": "bigint",
    "status": "int",
    "runtime": "text",
    "model_name": "text",
    "model_sha256": "text",
    "finished": "bigint",
    "received": "float8",
    "summary": "bytea",
    "detail": "bytea",
    "series_id": "bigint",
}
"""The arrival and the columns of a :class:`Row`, in its order, with their types."""

_INSERT = (
    f"INSERT INTO results ({', '.join(_TYPES)}) SELECT * FROM unnest("
    + ", ".join(f"%b::{kind}[]" for kind in _TYPES.values())
    + ") ON CONFLICT (run_id) DO NOTHING RETURNING run_id, arrival"
)

_HOLD_STREAMS = (
    "INSERT INTO streams (device_id, collector, heard)"
    " SELECT w.* FROM unnest(%s::text[], %s::text[], %s::float8[]) AS w (device_id, collector, heard)"
    " JOIN devices ON devices.device_id = w.device_id"
    " ON CONFLICT (device_id) DO UPDATE SET collector = excluded.collector, heard = excluded.heard"
)

_ADD_OUTCOMES = (
    "INSERT INTO outcomes (device_id, status, total)"
    " SELECT * FROM unnest(%s::text[], %s::int[], %s::bigint[])"
    " ON CONFLICT (device_id, status) DO UPDATE SET total = outcomes.total + excluded.total"
)

_LOCK_SERIES = (
    "SELECT s.device_id, s.series_key, s.places FROM series s"
    " JOIN unnest(%s::text[], %s::text[]) AS w (device_id, series_key)"
    " ON s.device_id = w.device_id AND s.series_key = w.series_key"
    " ORDER BY s.device_id, s.series_key FOR UPDATE OF s"
)

_TRACK_SERIES = (
    "INSERT INTO series (device_id, series_key, series, arrival, places, drifts)"
    " SELECT * FROM unnest(%b::text[], %b::text[], %b::text[], %b::bigint[], %b::bytea[], %b::bigint[])"
    " ON CONFLICT (device_id, series_key) DO UPDATE SET arrival = excluded.arrival,"
    " places = COALESCE(excluded.places, series.places), drifts = series.drifts + excluded.drifts"
)


class PostgresResultStore(PostgresReading, SqlWriting["Connection"]):
    """A ``ResultStore`` in PostgreSQL. Made by :meth:`open`; belongs to the loop that opened it."""

    def __init__(
        self,
        url: str,
        writer: Connection,
        *,
        max_result_bytes: int,
        commit_window_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        super().__init__(url)
        self._db: Connection | None = writer
        self._max_result_bytes = max_result_bytes
        self._clock = clock
        self._careful = False
        """Whether each result is stored by itself, since one of the batch does not fit."""
        self._released = False
        self.jobs = PostgresJobStore(self)
        self._writer = Gatherer(
            self._commit, self._told, name=self._name, window_seconds=commit_window_seconds
        )

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        max_result_bytes: int = CollectorConfig.max_result_bytes,
        commit_window_seconds: float = CollectorConfig.commit_window_seconds,
        clock: Callable[[], float] = time.time,
    ) -> PostgresResultStore:
        """Returns the store in this database (``postgresql://…``), made or migrated when need be.

        StoreForeign when it holds something else; StoreUnavailable when it can't be reached or written;
        StartError when the address is none or psycopg is not installed.
        """
        opening = _Opening(url, clock)
        try:
            writer = await asyncio.to_thread(opening.work)
        except asyncio.CancelledError:
            opening.abandon()
            raise
        return cls(
            url,
            writer,
            max_result_bytes=max_result_bytes,
            commit_window_seconds=commit_window_seconds,
            clock=clock,
        )

    # Writing.

    async def greet(self, hello: collector_pb2.Hello, at: float) -> None:
        """See ``ResultStore.greet``."""
        values = (hello.board.device_id, hello.SerializeToString(deterministic=True), at, at)

        def write(db: Connection) -> None:
            db.execute(
                "INSERT INTO devices (device_id, hello, first_seen, last_seen) VALUES (%s, %b, %s, %s)"
                " ON CONFLICT (device_id) DO UPDATE SET hello = excluded.hello,"
                " last_seen = GREATEST(devices.last_seen, excluded.last_seen)",
                values,
            )
            db.execute(_HOLD_STREAMS, ([values[0]], [self._identity], [at]))

        await self.write(write)

    async def saw(self, sightings: Sequence[Sighting]) -> None:
        """See ``ResultStore.saw``."""
        # One row a board, in one order everywhere: collectors that write the same ones wait, not deadlock.
        latest: dict[str, Sighting] = {}
        for sighting in sightings:
            before = latest.get(sighting.device_id)
            if before is not None:
                sighting = Sighting(
                    sighting.device_id,
                    max(before.at, sighting.at),
                    sighting.heartbeat or before.heartbeat,
                    sighting.streaming,
                )
            latest[sighting.device_id] = sighting
        rows = [latest[name] for name in sorted(latest)]
        held = [row for row in rows if row.streaming]
        columns = (
            [row.device_id for row in rows],
            [row.at for row in rows],
            [row.heartbeat.SerializeToString(deterministic=True) if row.heartbeat else None for row in rows],
        )

        def write(db: Connection) -> None:
            db.execute(
                "UPDATE devices SET last_seen = GREATEST(devices.last_seen, w.at),"
                " heartbeat = COALESCE(w.heartbeat, devices.heartbeat)"
                " FROM unnest(%b::text[], %b::float8[], %b::bytea[]) AS w (device_id, at, heartbeat)"
                " WHERE devices.device_id = w.device_id",
                columns,
            )
            if held:
                db.execute(
                    _HOLD_STREAMS,
                    (
                        [row.device_id for row in held],
                        [self._identity] * len(held),
                        [row.at for row in held],
                    ),
                )
            db.execute(
                "DELETE FROM streams WHERE device_id = ANY(%s) AND collector = %s",
                ([row.device_id for row in rows if not row.streaming], self._identity),
            )

        if rows:
            await self.write(write)
        elif self._writer.closed:
            raise StoreUnavailable(f"the store {self._name} is closed")

    async def probe(self) -> None:
        """See ``ResultStore.probe``."""
        now = self._clock()

        def write(db: Connection) -> None:
            db.execute(
                "INSERT INTO probe (id, written) VALUES (1, %s)"
                " ON CONFLICT (id) DO UPDATE SET written = excluded.written",
                (now,),
            )

        await self.write(write)

    # In the writer's thread.

    def _commit(self, batch: Sequence[Append | Call[Connection]]) -> list[Any]:
        """Returns what to tell each entry, once the batch is committed; raises when nothing was."""
        from psycopg import Error, errors

        self._careful = False
        for attempt in range(_ATTEMPTS):
            self.jobs.take_touched()
            db = self._connected()
            try:
                with db.transaction():
                    outcomes = self._batch(db, batch)
                self._tell_touched()
                return outcomes
            except (errors.SerializationFailure, errors.DeadlockDetected):
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0, 0.005 * 2**attempt))
            except self._unfit():
                # Something in it does not fit. The transaction is lost with it: again, one by one.
                if self._careful:
                    raise
                self._careful = True
            except Error:
                if db.closed or db.broken:
                    self._disconnect()
                raise
        raise AssertionError("every attempt returns or raises")

    def _connected(self) -> Connection:
        if self._db is None:
            self._db = connect_writer(self._url, self._name)
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _nested(self, db: Connection) -> AbstractContextManager[object]:
        return db.transaction()

    def _unfit(self) -> tuple[type[BaseException], ...]:
        from psycopg import errors

        return (errors.DataError, errors.IntegrityError, errors.ProgramLimitExceeded)

    def _marks(self, db: Connection, spools: set[Spool]) -> Mapping[Spool, int]:
        # In one order everywhere, so that collectors wait for each other and never in a circle.
        wanted = sorted(spools)
        marks: dict[Spool, int] = {}
        # Somebody else may take a row away between its making and its locking, but not for ever.
        for _ in range(_ATTEMPTS):
            for device_id, spool_id, sequence in db.execute(_LOCK_MARKS, _columns(wanted)):
                marks[(device_id, spool_id)] = sequence
            wanted = [spool for spool in wanted if spool not in marks]
            if not wanted:
                return marks
            db.execute(_MAKE_MARKS, _columns(wanted))
        raise StoreError(f"{self._name}: the marks of {len(wanted)} spools were made and are not there")

    def _set_marks(self, db: Connection, marks: Mapping[Spool, int]) -> None:
        db.execute(_SET_MARKS, (*_columns(list(marks)), list(marks.values())))

    def _insert(
        self, db: Connection, rows: Sequence[Row]
    ) -> tuple[Mapping[str, int], Mapping[str, BaseException]]:
        if not self._careful:
            return _insert(db, rows), {}
        arrivals: dict[str, int] = {}
        unfit: dict[str, BaseException] = {}
        for row in rows:
            try:
                with db.transaction():
                    arrivals |= _insert(db, [row])
            except self._unfit() as error:
                unfit[row.run_id] = error
        return arrivals, unfit

    def _add_outcomes(self, db: Connection, counts: Iterable[tuple[str, int, int]]) -> None:
        db.execute(_ADD_OUTCOMES, _columns(counts))

    def _places(self, db: Connection, keys: Sequence[SeriesKey]) -> Mapping[SeriesKey, bytes | None]:
        texts = {(device_id, series_key(series)): series for device_id, series in keys}
        return {
            (device_id, texts[(device_id, key)]): packed
            for device_id, key, packed in db.execute(_LOCK_SERIES, _columns(sorted(texts)), binary=True)
        }

    def _set_tracks(self, db: Connection, tracks: Mapping[SeriesKey, Track]) -> None:
        rows = sorted(
            (device_id, series_key(series), series, track.arrival, track.places, track.drifts)
            for (device_id, series), track in tracks.items()
        )
        db.execute(_TRACK_SERIES, _columns(rows))

    # Removing.

    async def thin(self, *, received_before: float, limit: int) -> Removed:
        """See ``ResultStore.thin``."""

        def read(db: Connection) -> Thinning:
            thinning = Thinning(_progress(db, ""), received_before)
            last, looked = thinning.begin, 0
            # One at a time: a record may have as many bytes as a transaction should rewrite.
            while looked < limit:
                row = db.execute(
                    "SELECT arrival, received, summary, detail FROM results WHERE arrival > %s"
                    " ORDER BY arrival LIMIT 1",
                    (last,),
                    binary=True,
                ).fetchone()
                if row is None or not thinning.take(*row):
                    break
                last, looked = row[0], looked + 1
            return thinning

        thinning = await self.read(read)

        def write(db: Connection) -> bool:
            db.execute(
                "INSERT INTO progress (name, arrival) VALUES ('thin', 0) ON CONFLICT (name) DO NOTHING"
            )
            if _progress(db, " FOR UPDATE") != thinning.begin:
                return False  # another collector has done it meanwhile
            if thinning.changes:
                db.cursor().executemany(
                    "UPDATE results SET summary = %b, detail = %b WHERE arrival = %s", thinning.changes
                )
            db.execute("UPDATE progress SET arrival = %s WHERE name = 'thin'", (thinning.end,))
            return True

        if thinning.end > thinning.begin and not await self.write(write):
            return Removed(more=True)
        return thinning.removed(limit)

    def _remove(self, db: Connection, arrivals: Sequence[int]) -> list[int]:
        found = db.execute(
            f"DELETE FROM results WHERE arrival = ANY(%s::bigint[]) AND NOT {KEPT}"
            " RETURNING octet_length(summary) + octet_length(detail)",
            (arrivals,),
        )
        return [size_bytes for (size_bytes,) in found]

    async def compact(self) -> None:
        """See ``ResultStore.compact``; PostgreSQL does by itself (autovacuum)."""
        await self.read(lambda _: None)

    async def close(self) -> None:
        """See ``ResultStore.close``."""
        if self._released:
            return
        self._released = True
        self._writer.close()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.join()
        self._close_readers()
        self._disconnect()


class _Opening:
    """A connection in the making, whose thread goes on when nobody waits for it any more."""

    def __init__(self, url: str, clock: Callable[[], float]) -> None:
        self._url = url
        self._clock = clock
        self._turn = threading.Lock()
        self._made: Connection | None = None
        self._abandoned = False

    def work(self) -> Connection:
        """Returns the connection; it is closed when nobody wants it."""
        db = opened(self._url, self._clock)
        with self._turn:
            self._made = db
            if self._abandoned:
                db.close()
        return db

    def abandon(self) -> None:
        """Nobody will close the connection but this."""
        with self._turn:
            self._abandoned = True
            if self._made is not None:
                self._made.close()


def _columns(rows: Iterable[Sequence[Any]]) -> list[list[Any]]:
    """Returns the rows as the arrays that ``unnest`` makes rows of again; there is at least one."""
    return [list(column) for column in zip(*rows, strict=True)]


def _insert(db: Connection, rows: Sequence[Row]) -> dict[str, int]:
    """Returns the arrivals of the runs that were not stored before, by their identity."""
    if not rows:
        return {}
    first = take_places(db, "results", len(rows))
    columns = [list(range(first, first + len(rows))), *_columns(rows)]
    return {str(run_id): int(arrival) for run_id, arrival in db.execute(_INSERT, columns)}


def _progress(db: Connection, lock: str) -> int:
    row = db.execute(f"SELECT arrival FROM progress WHERE name = 'thin'{lock}").fetchone()
    return int(row[0]) if row else 0
