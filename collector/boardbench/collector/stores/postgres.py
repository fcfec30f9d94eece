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
import contextlib
import logging
import queue
import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import parse_qs, urlsplit

from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import (
    CollectorError,
    OutOfOrder,
    PlaceTaken,
    ResultRefused,
    StartError,
    StoreDamaged,
    StoreError,
    StoreForeign,
    StoreUnavailable,
)
from boardbench.collector.jobs import attempt_of
from boardbench.collector.store import (
    Arrival,
    DeviceRecord,
    LatestResult,
    LatestResults,
    News,
    Outcomes,
    Places,
    Position,
    Removed,
    ResultFilter,
    ResultPage,
    Sighting,
    check_limit,
    check_result,
    ending_of,
    finished_microseconds,
    has_drifted,
    places_of,
    series_id,
    series_of,
    split,
)
from boardbench.collector.stores.gather import Append, Call, Gatherer, Track
from boardbench.collector.stores.postgres_jobs import PostgresJobStore, take_places
from boardbench.collector.stores.postgres_schema import migrate, series_key, storable
from boardbench.collector.stores.removing import Thinning
from boardbench.collector.stores.sqlite_schema import series_text
from boardbench.collector.thinning import is_same
from boardbench.v1 import collector_pb2, result_pb2

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]
    Entry = Append | Call[Connection]

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

_READERS = 4
"""Connections for reading: a scrape, a page and two queries at once; the rest wait their turn."""

_CONNECT_SECONDS = 10
"""How long a server may take to answer before it counts as gone."""

_STATEMENT_SECONDS = 60
"""How long one statement may take, so that a lock that somebody holds by hand does not stop a collector."""

_ATTEMPTS = 8
"""How often a transaction is run that the server asks to run again; each waits longer than the one before."""

_BEYOND = "\U0010ffff"
"""Sorts behind every text that begins alike: the highest code point, and texts are compared as bytes."""

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

_RESULT_COLUMNS = {
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
"""The arrival and the columns of a row of :class:`Append`, in its order, with their types."""

_INSERT = (
    f"INSERT INTO results ({', '.join(_RESULT_COLUMNS)}) SELECT * FROM unnest("
    + ", ".join(f"%b::{kind}[]" for kind in _RESULT_COLUMNS.values())
    + ") ON CONFLICT (run_id) DO NOTHING RETURNING run_id, arrival"
)

_HOLD_STREAMS = (
    "INSERT INTO streams (device_id, collector, heard)"
    " SELECT w.* FROM unnest(%s::text[], %s::text[], %s::float8[]) AS w (device_id, collector, heard)"
    " JOIN devices ON devices.device_id = w.device_id"
    " ON CONFLICT (device_id) DO UPDATE SET collector = excluded.collector, heard = excluded.heard"
)

_KEPT = (
    "(results.arrival = (SELECT MAX(arrival) FROM results) OR EXISTS (SELECT 1 FROM series"
    " WHERE series.device_id = results.device_id AND series.arrival = results.arrival))"
)
"""What is never removed: where the order of arrival ends, and the latest measurement of each series."""

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


@dataclass
class _Batch:
    """What the results of one transaction add up to."""

    marks: dict[tuple[str, str], int] = field(default_factory=dict)
    moved: set[tuple[str, str]] = field(default_factory=set)
    counts: Counter[tuple[str, int]] = field(default_factory=Counter)
    stored: list[tuple[Append, int]] = field(default_factory=list)
    """Those that are stored now, each with its arrival, in their order."""


class PostgresResultStore:
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
        self._url = url
        self._name = place(url)
        self._db: Connection | None = writer
        self._max_result_bytes = max_result_bytes
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._idle_readers: queue.LifoQueue[Connection] = queue.LifoQueue()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self._released = False
        self._identity = secrets.token_hex(8)
        self.jobs = PostgresJobStore(self)
        self._writer: Gatherer[Connection] = Gatherer(
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
        writer = await asyncio.to_thread(opened, url, clock)
        return cls(
            url,
            writer,
            max_result_bytes=max_result_bytes,
            commit_window_seconds=commit_window_seconds,
            clock=clock,
        )

    # Writing.

    def append(
        self, device_id: str, spool_id: str, sequence: int, result: result_pb2.RunResult, *, after: int = 0
    ) -> asyncio.Future[bool]:
        """See ``ResultStore.append``."""
        check_result(result, self._max_result_bytes)
        received = self._clock()
        series = series_of(result)
        summary, detail = split(result)
        row = (
            result.run_id,
            device_id,
            spool_id,
            sequence,
            result.status,
            storable(series.runtime),
            storable(series.model_name),
            storable(series.model_sha256),
            finished_microseconds(result, received),
            received,
            summary,
            detail,
            series_id(device_id, series),
        )
        measured = result.status == result_pb2.RUN_STATUS_SUCCEEDED
        job = attempt_of(result.run_id)
        future: asyncio.Future[bool] = self._loop.create_future()
        self._writer.put(
            Append(
                future,
                device_id,
                spool_id,
                sequence,
                after,
                row,
                storable(series_text(series), None) if measured else None,
                places_of(result),
                result.HasField("finished_at"),
                job,
                ending_of(result) if job is not None else None,
                len(summary) + len(detail),
            )
        )
        return future

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

    async def held_elsewhere(self, device_id: str, *, since: float) -> collector_pb2.Hello | None:
        """See ``ResultStore.held_elsewhere``."""

        def read(db: Connection) -> collector_pb2.Hello | None:
            found = db.execute(
                "SELECT d.hello FROM streams s JOIN devices d ON d.device_id = s.device_id"
                " WHERE s.device_id = %s AND s.collector <> %s AND s.heard >= %s LIMIT 1",
                (device_id, self._identity, since),
            ).fetchone()
            return None if found is None else collector_pb2.Hello.FromString(bytes(found[0]))

        return await self.read(read)

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

    async def write(self, function: Callable[[Connection], _T]) -> _T:
        """Returns what the function returns, once its transaction is committed. It may be called again."""
        return await self._writer.call(function)

    # In the writer's thread.

    def _commit(self, batch: Sequence[Entry]) -> list[Any]:
        """Returns what to tell each entry, once the batch is committed; raises when nothing was."""
        from psycopg import Error, errors

        careful = False
        for attempt in range(_ATTEMPTS):
            self.jobs.take_touched()
            db = self._connected()
            try:
                with db.transaction():
                    outcomes = self._batch(db, batch, careful)
                touched = self.jobs.take_touched()
                if touched:
                    # The loop may be gone when the process is ending: then nobody listens.
                    with contextlib.suppress(RuntimeError):
                        self._loop.call_soon_threadsafe(self.jobs.tell, touched)
                return outcomes
            except (errors.SerializationFailure, errors.DeadlockDetected):
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(random.uniform(0, 0.005 * 2**attempt))
            except (errors.DataError, errors.IntegrityError, errors.ProgramLimitExceeded):
                # Something in it does not fit. The transaction is lost with it: again, one by one.
                if careful:
                    raise
                careful = True
            except Error:
                if db.closed or db.broken:
                    self._disconnect()
                raise
        raise AssertionError("every attempt returns or raises")

    def _connected(self) -> Connection:
        if self._db is None:
            self._db = _connect_writer(self._url, self._name)
        return self._db

    def _disconnect(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def _batch(self, db: Connection, entries: Sequence[Entry], careful: bool) -> list[Any]:
        outcomes: list[Any] = []
        appends: list[Append] = []
        for entry in entries:
            if isinstance(entry, Append):
                appends.append(entry)
                continue
            if appends:
                outcomes += self._append_all(db, appends, careful)
                appends = []
            outcomes.append(self._call(db, entry.function))
        if appends:
            outcomes += self._append_all(db, appends, careful)
        return outcomes

    def _call(self, db: Connection, function: Callable[[Connection], Any]) -> Any:
        """Returns what the function returns, or the error that it met, its own writes undone then."""
        from psycopg import errors

        touched = self.jobs.touched
        try:
            with db.transaction():
                return function(db)
        except (errors.DataError, errors.IntegrityError, errors.ProgramLimitExceeded) as error:
            self.jobs.take_touched(touched)
            return StoreError(f"the store refused it: {error}")
        except CollectorError as error:
            self.jobs.take_touched(touched)
            return error

    def _append_all(
        self, db: Connection, entries: Sequence[Append], careful: bool
    ) -> list[bool | CollectorError]:
        """Returns what to tell about each result; ``careful`` refuses one that does not fit alone."""
        batch = _Batch()
        known: list[int] = []
        self._lock_marks(db, batch, {(entry.device_id, entry.spool_id) for entry in entries})
        outcomes: list[bool | CollectorError | None] = []
        fresh: dict[str, int] = {}
        for index, entry in enumerate(entries):
            spool = (entry.device_id, entry.spool_id)
            mark = batch.marks[spool]
            if entry.sequence <= mark:
                known.append(index)
                outcomes.append(False)
                continue
            if entry.after > mark:
                outcomes.append(
                    OutOfOrder(
                        f"device {entry.device_id}, spool {entry.spool_id}: {entry.after} is not stored,"
                        f" so {entry.sequence} can't be; send {entry.after} again"
                    )
                )
                continue
            batch.marks[spool] = entry.sequence
            batch.moved.add(spool)
            outcomes.append(None)
            fresh.setdefault(entry.row[0], index)
        rows = [entries[index].row for index in fresh.values()]
        arrivals, unfit = _insert_each(db, rows) if careful else (_insert(db, rows), {})
        for index, entry in enumerate(entries):
            run_id = entry.row[0]
            if outcomes[index] is None and fresh[run_id] == index:
                if run_id in arrivals:
                    outcomes[index] = True
                    batch.stored.append((entry, arrivals[run_id]))
                    batch.counts[(entry.device_id, entry.row[4])] += 1
                elif run_id in unfit:
                    outcomes[index] = ResultRefused(
                        "unfit", f"run {run_id}: the record does not fit the store: {unfit[run_id]}"
                    )
        self._compare(db, entries, outcomes)
        self._finish(db, batch)
        for index in self._displaced(db, entries, known):
            entry = entries[index]
            outcomes[index] = PlaceTaken(entry.device_id, entry.spool_id, entry.sequence)
        return [_decided(outcome) for outcome in outcomes]

    def _lock_marks(self, db: Connection, batch: _Batch, spools: set[tuple[str, str]]) -> None:
        """Locks the spools' rows, in one order everywhere, and notes their marks."""
        wanted = sorted(spools)
        # Somebody else may take a row away between its making and its locking, but not for ever.
        for _ in range(_ATTEMPTS):
            columns = ([device for device, _ in wanted], [spool for _, spool in wanted])
            for device_id, spool_id, sequence in db.execute(_LOCK_MARKS, columns):
                batch.marks[(device_id, spool_id)] = sequence
            wanted = [spool for spool in wanted if spool not in batch.marks]
            if not wanted:
                return
            columns = ([device for device, _ in wanted], [spool for _, spool in wanted])
            db.execute(_MAKE_MARKS, columns)
        raise StoreError(f"{self._name}: the marks of {len(wanted)} spools were made and are not there")

    def _compare(
        self,
        db: Connection,
        entries: Sequence[Append],
        outcomes: list[bool | CollectorError | None],
    ) -> None:
        """Tells those whose run is stored already whether it is the very same."""
        open_ = [index for index, outcome in enumerate(outcomes) if outcome is None]
        if not open_:
            return
        stored = {
            run_id: (device_id, summary, detail)
            for run_id, device_id, summary, detail in db.execute(
                "SELECT run_id, device_id, summary, detail FROM results WHERE run_id = ANY(%s)",
                ([entries[index].row[0] for index in open_],),
                binary=True,
            )
        }
        for index in open_:
            entry = entries[index]
            run_id = entry.row[0]
            known = stored.get(run_id)
            if known is None:
                outcomes[index] = ResultRefused("unfit", f"run {run_id}: the record does not fit the store")
            elif known[0] == entry.device_id and is_same(known[1:], (entry.row[10], entry.row[11])):
                outcomes[index] = False
            else:
                outcomes[index] = ResultRefused(
                    "conflict", f"run {run_id} is stored already, from device {known[0]}, with other contents"
                )

    def _displaced(self, db: Connection, entries: Sequence[Append], known: Sequence[int]) -> list[int]:
        """Returns those in whose place in the spool another run was stored."""
        if not known:
            return []
        # Not by the whole contents: of what is stored, samples may have been dropped with age.
        stored = {
            run_id: (device_id, status, finished)
            for run_id, device_id, status, finished in db.execute(
                "SELECT run_id, device_id, status, finished FROM results WHERE run_id = ANY(%s)",
                ([entries[index].row[0] for index in known],),
            )
        }
        displaced = []
        for index in known:
            entry = entries[index]
            found = stored.get(entry.row[0])
            if (
                found is None
                or found[:2] != (entry.device_id, entry.row[4])
                or (found[2] != entry.row[8] and entry.says_its_end)
            ):
                displaced.append(index)
        return displaced

    def _finish(self, db: Connection, batch: _Batch) -> None:
        """Writes what follows from the results that are stored now."""
        if batch.moved:
            moved = sorted(batch.moved)
            db.execute(
                _SET_MARKS,
                (
                    [device for device, _ in moved],
                    [spool for _, spool in moved],
                    [batch.marks[spool] for spool in moved],
                ),
            )
        if batch.counts:
            keys = sorted(batch.counts)
            db.execute(
                _ADD_OUTCOMES,
                (
                    [device for device, _ in keys],
                    [status for _, status in keys],
                    [batch.counts[key] for key in keys],
                ),
            )
        endings = [
            (entry.device_id, *entry.job, entry.ending)
            for entry, _ in batch.stored
            if entry.job is not None and entry.ending is not None
        ]
        if endings:
            self.jobs.end_by_results(db, endings, self._clock())
        self._track(db, [(entry, arrival) for entry, arrival in batch.stored if entry.series is not None])

    def _track(self, db: Connection, stored: Sequence[tuple[Append, int]]) -> None:
        """Notes the latest result of each series, and whether its ops were elsewhere than just before."""
        if not stored:
            return
        texts = {(entry.device_id, series_key(entry.series or "")): entry.series or "" for entry, _ in stored}
        keys = sorted(texts)
        columns = ([device for device, _ in keys], [key for _, key in keys])
        before = {
            (device_id, key): None if packed is None else Places.unpacked(packed)
            for device_id, key, packed in db.execute(_LOCK_SERIES, columns, binary=True)
        }
        tracks: dict[tuple[str, str], Track] = {}
        for entry, arrival in stored:
            key = (entry.device_id, series_key(entry.series or ""))
            track = tracks.setdefault(key, Track(arrival, before.get(key), 0))
            track.arrival = arrival
            if entry.places is not None:
                known = track.places
                track.drifts += known is not None and has_drifted(known, entry.places)
                track.places = entry.places if known is None else entry.places.after(known)
        db.execute(
            _TRACK_SERIES,
            (
                *columns,
                [texts[key] for key in keys],
                [tracks[key].arrival for key in keys],
                [None if (places := tracks[key].places) is None else places.packed() for key in keys],
                [tracks[key].drifts for key in keys],
            ),
        )

    # Reading.

    async def acknowledged(self, device_id: str, spool_id: str) -> int:
        """See ``ResultStore.acknowledged``."""

        def read(db: Connection) -> int:
            found = db.execute(
                "SELECT sequence FROM spools WHERE device_id = %s AND spool_id = %s", (device_id, spool_id)
            ).fetchone()
            return int(found[0]) if found else 0

        return await self.read(read)

    async def devices(self) -> tuple[DeviceRecord, ...]:
        """See ``ResultStore.devices``."""

        def read(db: Connection) -> tuple[DeviceRecord, ...]:
            return tuple(
                DeviceRecord(
                    collector_pb2.Hello.FromString(hello),
                    first_seen,
                    last_seen,
                    None if heartbeat is None else collector_pb2.Heartbeat.FromString(heartbeat),
                    elsewhere,
                )
                for hello, first_seen, last_seen, heartbeat, elsewhere in db.execute(
                    "SELECT d.hello, d.first_seen, d.last_seen, d.heartbeat, s.heard FROM devices d"
                    " LEFT JOIN streams s ON s.device_id = d.device_id AND s.collector <> %s"
                    " ORDER BY d.device_id",
                    (self._identity,),
                    binary=True,
                )
            )

        return await self.read(read)

    async def outcomes(self) -> tuple[Outcomes, ...]:
        """See ``ResultStore.outcomes``."""

        def read(db: Connection) -> tuple[Outcomes, ...]:
            return tuple(
                Outcomes(*row)
                for row in db.execute(
                    "SELECT device_id, status, total FROM outcomes ORDER BY device_id, status"
                )
            )

        return await self.read(read)

    async def results(
        self,
        wanted: ResultFilter,
        *,
        limit: int,
        after: Position | None = None,
        summary: bool = False,
        max_bytes: int | None = None,
    ) -> ResultPage:
        """See ``ResultStore.results``."""
        check_limit(limit)
        conditions: list[str] = []
        values: list[Any] = []

        def add(condition: str, *more: Any) -> None:
            conditions.append(condition)
            values.extend(more)

        if wanted.device_id:
            add("device_id = %s", storable(wanted.device_id, None))
        if wanted.model:
            digits = storable(wanted.model.lower())
            add(
                "(model_name = %s OR (model_sha256 >= %s AND model_sha256 < %s))",
                storable(wanted.model),
                digits,
                digits + _BEYOND,
            )
        if wanted.runtime:
            add("runtime = %s", storable(wanted.runtime))
        if wanted.status:
            add("status = %s", wanted.status)
        if wanted.since_microseconds is not None:
            add("finished >= %s", wanted.since_microseconds)
        if after is not None:
            add("(finished, arrival) < (%s::bigint, %s::bigint)", after.finished_microseconds, after.arrival)
        size = "octet_length(summary)" + ("" if summary else " + octet_length(detail)")
        query = (
            f"SELECT finished, arrival, {size} FROM results"
            + (" WHERE " + " AND ".join(conditions) if conditions else "")
            + " ORDER BY finished DESC, arrival DESC LIMIT %s"
        )
        record = "summary, ''::bytea" if summary else "summary, detail"

        def read(db: Connection) -> ResultPage:
            # Sizes first: what does not fit on the page is not fetched.
            chosen: list[int] = []
            total, last, more = 0, None, False
            for finished, arrival, size_bytes in db.execute(query, (*values, limit + 1)).fetchall():
                total += size_bytes
                if len(chosen) == limit or (chosen and max_bytes is not None and total > max_bytes):
                    more = True
                    break
                chosen.append(arrival)
                last = Position(finished, arrival)
            found = {
                arrival: head + tail
                for arrival, head, tail in db.execute(
                    f"SELECT arrival, {record} FROM results WHERE arrival = ANY(%s::bigint[])",
                    (chosen,),
                    binary=True,
                )
            }
            page = (found.get(arrival) for arrival in chosen)
            return ResultPage(
                tuple(result_pb2.RunResult.FromString(content) for content in page if content is not None),
                last if more else None,
            )

        return await self.read(read)

    async def find(self, run_id: str) -> tuple[result_pb2.RunResult, ...]:
        """See ``ResultStore.find``."""
        begin = storable(run_id, None)

        def read(db: Connection) -> tuple[result_pb2.RunResult, ...]:
            select = "SELECT summary, detail FROM results WHERE "
            rows = db.execute(select + "run_id = %s", (begin,), binary=True).fetchall()
            if not rows:
                rows = db.execute(
                    select + "run_id >= %s AND run_id < %s ORDER BY run_id LIMIT 2",
                    (begin, begin + _BEYOND),
                    binary=True,
                ).fetchall()
            return tuple(result_pb2.RunResult.FromString(head + tail) for head, tail in rows)

        return await self.read(read)

    async def news(self, after: int) -> News:
        """See ``ResultStore.news``."""

        def read(db: Connection) -> News:
            # The position first: no board may be missing whose result it counts.
            row = db.execute("SELECT COALESCE(MAX(arrival), 0) FROM results").fetchone()
            found = db.execute("SELECT DISTINCT device_id FROM results WHERE arrival > %s", (after,))
            return News(int(row[0]) if row else 0, frozenset(str(device_id) for (device_id,) in found))

        return await self.read(read)

    async def arrivals(self, after: int, *, limit: int, max_bytes: int) -> tuple[Arrival, ...]:
        """See ``ResultStore.arrivals``."""
        check_limit(limit)

        def read(db: Connection) -> tuple[Arrival, ...]:
            chosen: list[int] = []
            total = 0
            for arrival, size_bytes in db.execute(
                "SELECT arrival, octet_length(summary) + octet_length(detail) FROM results"
                " WHERE arrival > %s ORDER BY arrival LIMIT %s",
                (after, limit),
            ).fetchall():
                total += size_bytes
                if chosen and total > max_bytes:
                    break
                chosen.append(arrival)
            rows = db.execute(
                "SELECT arrival, device_id, received, summary, detail FROM results"
                " WHERE arrival = ANY(%s::bigint[]) ORDER BY arrival",
                (chosen,),
                binary=True,
            )
            return tuple(
                Arrival(arrival, device_id, received, result_pb2.RunResult.FromString(summary + detail))
                for arrival, device_id, received, summary, detail in rows
            )

        return await self.read(read)

    async def latest(
        self, *, received_since: float, per_device: int, devices: Collection[str] | None = None
    ) -> LatestResults:
        """See ``ResultStore.latest``."""
        chosen = "" if devices is None else " AND n.device_id = ANY(%s::text[])"
        only = () if devices is None else (list(devices),)

        def read(db: Connection) -> LatestResults:
            kept: list[LatestResult] = []
            left_out: dict[str, int] = {}
            for device_id, received, summary, rank, count, drifts in db.execute(
                "SELECT s.device_id, r.received, r.summary, s.place, s.count, s.drifts FROM ("
                " SELECT n.device_id, n.arrival,"
                " CASE WHEN n.places IS NULL THEN NULL ELSE n.drifts END AS drifts,"
                " ROW_NUMBER() OVER (PARTITION BY n.device_id ORDER BY n.arrival DESC) AS place,"
                " COUNT(*) OVER (PARTITION BY n.device_id) AS count"
                f" FROM series n JOIN results o ON o.arrival = n.arrival WHERE o.received >= %s{chosen}"
                ") s JOIN results r ON r.arrival = s.arrival WHERE s.place <= %s"
                " ORDER BY s.device_id, s.place",
                (received_since, *only, per_device),
                binary=True,
            ):
                if rank == 1 and count > per_device:
                    left_out[device_id] = count - per_device
                kept.append(
                    LatestResult(device_id, received, result_pb2.RunResult.FromString(summary), drifts)
                )
            return LatestResults(tuple(kept), left_out)

        return await self.read(read)

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

    async def remove(self, *, received_before: float | None, per_series: int | None, limit: int) -> Removed:
        """See ``ResultStore.remove``."""

        def read(db: Connection) -> list[int]:
            chosen: list[int] = []
            last = 0
            while received_before is not None and len(chosen) < limit:
                # By arrival, because there is no order by age; what stays for ever is as long as the series.
                rows = db.execute(
                    f"SELECT arrival, received, {_KEPT} FROM results WHERE arrival > %s"
                    " ORDER BY arrival LIMIT 500",
                    (last,),
                ).fetchall()
                chosen += [
                    arrival for arrival, received, kept in rows if received < received_before and not kept
                ]
                if not rows or rows[-1][1] >= received_before:
                    break
                last = rows[-1][0]
            if per_series is not None and len(chosen) < limit:
                for (series,) in db.execute(
                    "SELECT series_id FROM results GROUP BY series_id HAVING COUNT(*) > %s", (per_series,)
                ).fetchall():
                    chosen += [
                        arrival
                        for arrival, kept in db.execute(
                            f"SELECT arrival, {_KEPT} FROM results WHERE series_id = %s"
                            " ORDER BY arrival DESC LIMIT %s OFFSET %s",
                            (series, limit, per_series),
                        )
                        if not kept
                    ]
                    if len(chosen) >= limit:
                        break
            return sorted(set(chosen))[:limit]

        chosen = await self.read(read)

        def write(db: Connection) -> Removed:
            found = db.execute(
                f"DELETE FROM results WHERE arrival = ANY(%s::bigint[]) AND NOT {_KEPT}"
                " RETURNING octet_length(summary) + octet_length(detail)",
                (chosen,),
            ).fetchall()
            return Removed(len(found), 0, sum(row[0] for row in found), more=len(chosen) == limit)

        return await self.write(write) if chosen else Removed()

    async def compact(self) -> None:
        """See ``ResultStore.compact``; PostgreSQL does by itself (autovacuum)."""
        await self.read(lambda _: None)

    async def check(self) -> None:
        """See ``ResultStore.check``."""

        def read(db: Connection) -> None:
            last = -1
            while rows := db.execute(
                "SELECT arrival, run_id, device_id, status, summary, detail FROM results"
                " WHERE arrival > %s ORDER BY arrival LIMIT 100",
                (last,),
                binary=True,
            ).fetchall():
                for arrival, run_id, device_id, status, summary, detail in rows:
                    last = arrival
                    try:
                        result = result_pb2.RunResult.FromString(summary + detail)
                    except Exception as error:
                        raise StoreDamaged(
                            f"{self._name}: the record of run {run_id} ({device_id}) is unreadable: {error}"
                        ) from error
                    if (result.run_id, result.status) != (run_id, status):
                        raise StoreDamaged(
                            f"{self._name}: the record of run {run_id} ({device_id}) says {result.run_id!r}"
                        )

        await self.read(read)

    async def read(self, function: Callable[[Connection], _T]) -> _T:
        """Returns what the function returns, called with a connection that only reads; maybe called twice."""

        def work() -> _T:
            from psycopg import Error

            for attempt in (1, 2):
                try:
                    with self._reader() as db:
                        return function(db)
                except Error as error:
                    # A connection that lay idle may have been cut long ago; reading twice harms nobody.
                    lost = isinstance(error, _lost_errors())
                    if attempt == 2 or not lost:
                        raise self._told(error) from error
            raise AssertionError("the second attempt returns or raises")

        if self._writer.closed:
            raise StoreUnavailable(f"the store {self._name} is closed")
        return await self._loop.run_in_executor(self._readers, work)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Connection]:
        try:
            db = self._idle_readers.get_nowait()
        except queue.Empty:
            db = _connect(self._url)
        try:
            yield db
        finally:
            if db.closed or db.broken:
                db.close()
            else:
                self._idle_readers.put(db)

    def _told(self, error: BaseException) -> CollectorError:
        return told(error, self._name)

    async def close(self) -> None:
        """See ``ResultStore.close``."""
        if self._released:
            return
        self._released = True
        self._writer.close()
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._writer.join()
        self._readers.shutdown()
        while not self._idle_readers.empty():
            self._idle_readers.get_nowait().close()
        self._disconnect()


def _decided(outcome: bool | CollectorError | None) -> bool | CollectorError:
    assert outcome is not None
    return outcome


def _insert(db: Connection, rows: Sequence[tuple[Any, ...]]) -> dict[str, int]:
    """Returns the arrivals of the runs that were not stored before, by their identity."""
    if not rows:
        return {}
    first = take_places(db, "results", len(rows))
    columns = [range(first, first + len(rows)), *zip(*rows, strict=True)]
    columns = [list(column) for column in columns]
    return {str(run_id): int(arrival) for run_id, arrival in db.execute(_INSERT, columns)}


def _insert_each(
    db: Connection, rows: Sequence[tuple[Any, ...]]
) -> tuple[dict[str, int], dict[str, BaseException]]:
    """Returns the same, and why the server refused others; those don't touch the rest."""
    from psycopg import errors

    arrivals: dict[str, int] = {}
    unfit: dict[str, BaseException] = {}
    for row in rows:
        try:
            with db.transaction():
                arrivals |= _insert(db, [row])
        except (errors.DataError, errors.IntegrityError, errors.ProgramLimitExceeded) as error:
            unfit[row[0]] = error
    return arrivals, unfit


def _progress(db: Connection, lock: str) -> int:
    row = db.execute(f"SELECT arrival FROM progress WHERE name = 'thin'{lock}").fetchone()
    return int(row[0]) if row else 0


def place(url: str) -> str:
    """Returns where the database is, without user and password: as in ``postgresql://host:5432/boardbench``."""
    parts = urlsplit(url)
    hosts = parts.netloc.rpartition("@")[2] or parse_qs(parts.query).get("host", ["localhost"])[0]
    return f"postgresql://{hosts}{parts.path if parts.path.startswith('/') else '/'}"


def _connect(url: str) -> Connection:
    """Returns a connection in autocommit mode, for one thread at a time."""
    import psycopg

    parts = psycopg.conninfo.conninfo_to_dict(url)
    more: dict[str, Any] = {"application_name": "boardbench-collector"} | {
        # A server that is gone without a word is noticed in half a minute, and not in two hours.
        "connect_timeout": _CONNECT_SECONDS,
        "keepalives_idle": 10,
        "keepalives_interval": 5,
        "keepalives_count": 3,
    }
    db: Connection = psycopg.connect(
        url, autocommit=True, **{name: value for name, value in more.items() if name not in parts}
    )
    try:
        db.execute(f"SET statement_timeout = {_STATEMENT_SECONDS * 1000}")
    except BaseException:
        db.close()
        raise
    return db


def opened(url: str, clock: Callable[[], float]) -> Connection:
    """Returns the connection that writes, its tables up to date."""
    try:
        import psycopg
    except ImportError as error:
        raise StartError("a store in PostgreSQL needs psycopg: pip install 'boardbench[postgres]'") from error
    name = place(url)
    try:
        psycopg.conninfo.conninfo_to_dict(url)
    except psycopg.Error as error:
        raise StartError(f"--store {name} is no address: {' '.join(str(error).split())}") from error
    try:
        db = _connect_writer(url, name)
        try:
            migrate(db, now=clock())
        except BaseException:
            db.close()
            raise
    except StoreForeign as error:
        raise StoreForeign(f"can't use {name}: {error}") from error
    except psycopg.Error as error:
        raise told(error, name) from error
    return db


def _connect_writer(url: str, name: str) -> Connection:
    db = _connect(url)
    try:
        _check_encoding(db, name)
        _keep_promises(db, name)
    except BaseException:
        db.close()
        raise
    return db


def _check_encoding(db: Connection, name: str) -> None:
    """Returns when text comes back as it was stored; StoreForeign when the database knows only bytes."""
    encoding = db.info.parameter_status("server_encoding")
    if encoding not in {"UTF8", None}:
        raise StoreForeign(
            f"{name} keeps text as {encoding}, which can't hold every name of a model or board: create it"
            " with createdb --encoding UTF8 --template template0"
        )


def _keep_promises(db: Connection, name: str) -> None:
    """Makes a commit mean what the collector tells boards: that a power cut does not undo it."""
    import psycopg

    try:
        row = db.execute("SHOW synchronous_commit").fetchone()
        if row is not None and row[0] == "off":
            db.execute("SET synchronous_commit = on")
        row = db.execute("SHOW fsync").fetchone()
    except psycopg.errors.UndefinedObject:
        return  # a server that has no such setting has no way to be told to lose commits
    if row is not None and row[0] == "off":
        _log.warning(
            "%s runs with fsync = off: a power cut there loses results that boards were told are kept", name
        )


def _lost_errors() -> tuple[type[BaseException], ...]:
    from psycopg import InterfaceError, OperationalError

    return (InterfaceError, OperationalError)


def told(error: BaseException, name: str) -> CollectorError:
    """Returns the error in the collector's words."""
    if isinstance(error, CollectorError):
        return error
    import psycopg

    text = " ".join(str(error).split())
    code = error.sqlstate if isinstance(error, psycopg.Error) else None
    if code in ("53100", "53200"):
        return StoreUnavailable(f"{name} has no space left ({text}); agents keep their results meanwhile")
    if code in ("XX001", "XX002"):
        return StoreDamaged(f"{name} is damaged ({text}); restore a backup")
    if code in ("25006", "42501"):
        return StoreUnavailable(f"{name} can't be written ({text}); name the primary, and a user that may")
    if isinstance(error, psycopg.OperationalError) and code is None:
        return StoreUnavailable(f"{name} can't be reached: {text}")
    return StoreUnavailable(f"{name}: {text}")
