"""The default store: one SQLite file, nothing to install.

One thread writes. It gathers what arrives within a short window into one transaction, because a
commit costs an fsync however much is in it: on an SD card that is the whole price. WAL lets scrapes
and queries read meanwhile, each on a read-only connection of its own; ``synchronous=FULL`` makes a
commit survive a power cut, not only a crash (https://www.sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import queue
import re
import sqlite3
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import (
    StoreDamaged,
    StoreError,
    StoreForeign,
    StoreUnavailable,
)
from boardbench.collector.store import (
    Arrival,
    DeviceRecord,
    Position,
    Removed,
    ResultFilter,
    ResultPage,
    Sighting,
    check_limit,
)
from boardbench.collector.stores.gather import Append, Call, Gatherer, Row
from boardbench.collector.stores.removing import KEPT, Thinning
from boardbench.collector.stores.sqlite_jobs import SqliteJobStore
from boardbench.collector.stores.sqlite_schema import ADD_OUTCOMES, TRACK_SERIES, migrate
from boardbench.collector.stores.writing import SeriesKey, Spool, SqlWriting, Track
from boardbench.v1 import collector_pb2, result_pb2

_T = TypeVar("_T")

_READERS = 4
"""Connections for reading: a scrape, a page and two queries at once; the rest wait their turn."""

_BUSY_SECONDS = 10.0
"""How long a write waits for another process (a backup, a shell) that holds the file."""

_CACHE_KIB = 16 * 1024
"""Memory for pages of the writer: where runs' identities go in an index is anywhere, and 2 MB hold little."""

_CHECKPOINT_PAGES = 4000
"""Pages of 4 KiB in the log before they are moved into the file: a page that changes often is moved once."""

_REMEMBERED_SPOOLS = 100_000
"""Marks that the writer keeps in mind, of which it is the only one to move any: 20 MB."""

_REMEMBERED_BYTES = 16 * 1024 * 1024
"""Places of series that the writer keeps in mind for the same reason, with their names."""

_UNFIT = (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, OverflowError)
"""What SQLite says of values that it can't take."""


class _Rows:
    """A statement over rows, many in one call.

    Each call lets go of the interpreter's lock, for which another thread stands in line: with a call a row
    that was more work than the rows. SQLite of old takes 999 values in a statement
    (https://www.sqlite.org/limits.html).
    """

    def __init__(self, statement: str) -> None:
        """The statement is for one row: its values are ``VALUES (?,?,…)``."""
        before, row, behind = re.split(r"(?<=VALUES )(\([?,]+\))", statement)
        self._by_size = {size: before + ",".join([row] * size) + behind for size in (32, 8, 1)}

    def pieces(self, rows: Sequence[_T]) -> Iterator[Sequence[_T]]:
        """Returns the rows, in pieces that :meth:`execute` takes."""
        at = 0
        for size in self._by_size:
            while len(rows) - at >= size:
                yield rows[at : at + size]
                at += size

    def execute(self, db: sqlite3.Connection, piece: Sequence[Sequence[Any]]) -> int:
        """Returns how many rows it made or changed."""
        return db.execute(self._by_size[len(piece)], tuple(chain.from_iterable(piece))).rowcount

    def run(self, db: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> None:
        """Executes it over all of them."""
        for piece in self.pieces(rows):
            self.execute(db, piece)


_COLUMNS = ("arrival", *Row._fields)

# OR FAIL: without it the pages that a statement changes are copied first, to undo a part of it.
_INSERT = _Rows(
    f"INSERT OR FAIL INTO results ({', '.join(_COLUMNS)}) VALUES ({','.join('?' for _ in _COLUMNS)})"
    " ON CONFLICT (run_id) DO NOTHING"
)

_SET_MARKS = _Rows(
    "INSERT INTO spools (device_id, spool_id, sequence) VALUES (?,?,?)"
    " ON CONFLICT (device_id, spool_id) DO UPDATE SET sequence = excluded.sequence"
)

_ADD_OUTCOMES = _Rows(ADD_OUTCOMES)

_TRACK_SERIES = _Rows(TRACK_SERIES)


class SqliteResultStore(SqlWriting[sqlite3.Connection]):
    """A ``ResultStore`` in one SQLite file. Made by :meth:`open`; belongs to the loop that opened it."""

    def __init__(
        self,
        path: Path,
        lock: int,
        writer: sqlite3.Connection,
        *,
        max_result_bytes: int,
        commit_window_seconds: float,
        clock: Callable[[], float],
    ) -> None:
        self._path = path
        self._name = str(path)
        self._lock = lock
        self._db = writer
        self._max_result_bytes = max_result_bytes
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._released = False
        # As they are committed; only the writer's thread, which alone moves them, looks at them.
        self._known_marks: dict[Spool, int] = {}
        self._known_places: dict[SeriesKey, bytes | None] = {}
        self._known_bytes = 0
        self._idle_readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self.jobs = SqliteJobStore(self)
        self._writer = Gatherer(
            self._commit,
            lambda error: told(error, path),
            name=self._name,
            window_seconds=commit_window_seconds,
        )

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        max_result_bytes: int = CollectorConfig.max_result_bytes,
        commit_window_seconds: float = CollectorConfig.commit_window_seconds,
        clock: Callable[[], float] = time.time,
    ) -> SqliteResultStore:
        """Returns the store in this file, made or migrated when need be.

        StoreForeign when the file is something else; StoreUnavailable when the folder can't be written or
        another collector has the store open.
        """
        lock, writer = await asyncio.to_thread(_open_writer, path, clock)
        return cls(
            path,
            lock,
            writer,
            max_result_bytes=max_result_bytes,
            commit_window_seconds=commit_window_seconds,
            clock=clock,
        )

    # Writing.

    async def greet(self, hello: collector_pb2.Hello, at: float) -> None:
        """See ``ResultStore.greet``."""
        values = (hello.board.device_id, hello.SerializeToString(deterministic=True), at, at)

        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO devices (device_id, hello, first_seen, last_seen) VALUES (?,?,?,?)"
                " ON CONFLICT (device_id) DO UPDATE"
                " SET hello = excluded.hello, last_seen = MAX(last_seen, excluded.last_seen)",
                values,
            )

        await self.write(write)

    async def held_elsewhere(self, device_id: str, *, since: float) -> collector_pb2.Hello | None:  # noqa: ARG002
        """See ``ResultStore.held_elsewhere``."""
        # The file is one collector's alone.
        return None

    async def saw(self, sightings: Sequence[Sighting]) -> None:
        """See ``ResultStore.saw``."""
        rows = [
            (
                sighting.at,
                sighting.heartbeat.SerializeToString(deterministic=True) if sighting.heartbeat else None,
                sighting.device_id,
            )
            for sighting in sightings
        ]

        def write(db: sqlite3.Connection) -> None:
            db.executemany(
                "UPDATE devices SET last_seen = MAX(last_seen, ?), heartbeat = COALESCE(?, heartbeat)"
                " WHERE device_id = ?",
                rows,
            )

        await self.write(write)

    async def probe(self) -> None:
        """See ``ResultStore.probe``."""
        now = self._clock()

        def write(db: sqlite3.Connection) -> None:
            db.execute(
                "INSERT INTO probe (id, written) VALUES (1, ?)"
                " ON CONFLICT (id) DO UPDATE SET written = excluded.written",
                (now,),
            )

        await self.write(write)

    def _commit(self, batch: Sequence[Append | Call[sqlite3.Connection]]) -> list[Any]:
        """Returns what to tell each entry, once the batch is committed; raises when nothing was."""
        db = self._db
        self.jobs.take_touched()
        db.execute("BEGIN IMMEDIATE")
        try:
            outcomes = self._batch(db, batch)
            db.execute("COMMIT")
        except BaseException:
            self._forget()
            # SQLite has rolled back by itself after some errors, a full disk among them.
            if db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            raise
        self._tell_touched()
        return outcomes

    def _forget(self) -> None:
        """What is kept in mind is not what is stored."""
        self._known_marks.clear()
        self._known_places.clear()
        self._known_bytes = 0

    def _nested(self, db: sqlite3.Connection) -> AbstractContextManager[object]:
        return _savepoint(db)

    def _unfit(self) -> tuple[type[BaseException], ...]:
        return _UNFIT

    def _marks(self, db: sqlite3.Connection, spools: set[Spool]) -> Mapping[Spool, int]:
        if len(self._known_marks) > _REMEMBERED_SPOOLS:
            self._known_marks.clear()
        known = self._known_marks
        for spool in spools:
            if spool not in known:
                found = db.execute(
                    "SELECT sequence FROM spools WHERE device_id = ? AND spool_id = ?", spool
                ).fetchone()
                known[spool] = found[0] if found else 0
        return {spool: known[spool] for spool in spools}

    def _set_marks(self, db: sqlite3.Connection, marks: Mapping[Spool, int]) -> None:
        _SET_MARKS.run(db, [(*spool, sequence) for spool, sequence in marks.items()])
        self._known_marks.update(marks)

    def _insert(
        self, db: sqlite3.Connection, rows: Sequence[Row]
    ) -> tuple[Mapping[str, int], Mapping[str, BaseException]]:
        # Numbered here, so that it need not be asked which number each has got.
        (last,) = db.execute("SELECT COALESCE(MAX(arrival), 0) FROM results").fetchone()
        arrivals: dict[str, int] = {}
        unfit: dict[str, BaseException] = {}
        for piece in _INSERT.pieces([(arrival, *row) for arrival, row in enumerate(rows, last + 1)]):
            try:
                _insert(db, piece, arrivals)
            except _UNFIT:
                # One is the reason; those before it are stored, and found again.
                for row in piece:
                    try:
                        _insert(db, [row], arrivals)
                    except _UNFIT as error:
                        unfit[row[1]] = error
        return arrivals, unfit

    def _add_outcomes(self, db: sqlite3.Connection, counts: Iterable[tuple[str, int, int]]) -> None:
        _ADD_OUTCOMES.run(db, list(counts))

    def _places(self, db: sqlite3.Connection, keys: Sequence[SeriesKey]) -> Mapping[SeriesKey, bytes | None]:
        known = self._known_places
        if self._known_bytes > _REMEMBERED_BYTES:
            known.clear()
            self._known_bytes = 0
        for key in keys:
            if key not in known:
                found = db.execute(
                    "SELECT places FROM series WHERE device_id = ? AND series = ?", key
                ).fetchone()
                self._remember(key, found[0] if found else None)
        return {key: known[key] for key in keys}

    def _remember(self, key: SeriesKey, places: bytes | None) -> None:
        before = self._known_places.get(key)
        self._known_bytes += len(places or b"") - len(before or b"")
        if key not in self._known_places:
            self._known_bytes += 300 + len(key[0]) + len(key[1])
        self._known_places[key] = places

    def _set_tracks(self, db: sqlite3.Connection, tracks: Mapping[SeriesKey, Track]) -> None:
        _TRACK_SERIES.run(
            db, [(*key, track.arrival, track.places, track.drifts) for key, track in tracks.items()]
        )
        for key, track in tracks.items():
            self._remember(key, track.places)

    # Reading.

    def rows(self, db: sqlite3.Connection, query: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """See ``Asking.rows``."""
        return db.execute(query, values).fetchall()

    def among(self, column: str, values: Collection[Any], kind: str = "text") -> tuple[str, Any]:  # noqa: ARG002
        """See ``Asking.among``."""
        # As JSON: the number of values is bounded, the length of one is not.
        return f"{column} IN (SELECT value FROM json_each(?))", json.dumps(list(values))

    async def devices(self) -> tuple[DeviceRecord, ...]:
        """See ``ResultStore.devices``."""

        def read(db: sqlite3.Connection) -> tuple[DeviceRecord, ...]:
            return tuple(
                DeviceRecord(
                    collector_pb2.Hello.FromString(hello),
                    first_seen,
                    last_seen,
                    None if heartbeat is None else collector_pb2.Heartbeat.FromString(heartbeat),
                )
                for hello, first_seen, last_seen, heartbeat in db.execute(
                    "SELECT hello, first_seen, last_seen, heartbeat FROM devices ORDER BY device_id"
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
        where, values = self.conditions(wanted, after)
        record = "summary, x''" if summary else "summary, detail"
        query = (
            f"SELECT finished, arrival, {record} FROM results{where}"
            " ORDER BY finished DESC, arrival DESC LIMIT ?"
        )

        def read(db: sqlite3.Connection) -> ResultPage:
            page: list[result_pb2.RunResult] = []
            size, last = 0, None
            with contextlib.closing(db.execute(query, (*values, limit + 1))) as cursor:
                for finished, arrival, head, tail in cursor:
                    size += len(head) + len(tail)
                    if len(page) == limit or (page and max_bytes is not None and size > max_bytes):
                        return ResultPage(tuple(page), last)
                    page.append(result_pb2.RunResult.FromString(head + tail))
                    last = Position(finished, arrival)
            return ResultPage(tuple(page), None)

        return await self.read(read)

    async def arrivals(self, after: int, *, limit: int, max_bytes: int) -> tuple[Arrival, ...]:
        """See ``ResultStore.arrivals``."""
        check_limit(limit)

        def read(db: sqlite3.Connection) -> tuple[Arrival, ...]:
            found: list[Arrival] = []
            size = 0
            rows = db.execute(
                "SELECT arrival, device_id, received, summary, detail FROM results WHERE arrival > ?"
                " ORDER BY arrival LIMIT ?",
                (after, limit),
            )
            with contextlib.closing(rows):
                for arrival, device_id, received, summary, detail in rows:
                    size += len(summary) + len(detail)
                    if found and size > max_bytes:
                        break
                    result = result_pb2.RunResult.FromString(summary + detail)
                    found.append(Arrival(arrival, device_id, received, result))
            return tuple(found)

        return await self.read(read)

    async def check(self) -> None:
        """See ``ResultStore.check``."""

        def read(db: sqlite3.Connection) -> None:
            complaints = [text for (text,) in db.execute("PRAGMA integrity_check(10)")]
            if complaints != ["ok"]:
                raise StoreDamaged(f"{self._path}: " + "; ".join(complaints))
            for run_id, device_id, status, summary, detail in db.execute(
                "SELECT run_id, device_id, status, summary, detail FROM results"
            ):
                self.check_record(run_id, device_id, status, summary + detail)

        await self.read(read)

    async def read(self, function: Callable[[sqlite3.Connection], _T]) -> _T:
        """Returns what the function returns, called with a connection that only reads."""

        def work() -> _T:
            with self._reader() as db:
                return function(db)

        if self._writer.closed:
            raise StoreUnavailable(f"the store {self._path} is closed")
        return await self._loop.run_in_executor(self._readers, work)

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        try:
            try:
                db = self._idle_readers.get_nowait()
            except queue.Empty:
                db = connect(self._path, "ro")
            try:
                yield db
            finally:
                self._idle_readers.put(db)
        except (sqlite3.Error, OSError) as error:
            raise told(error, self._path) from error

    # Removing.

    async def thin(self, *, received_before: float, limit: int) -> Removed:
        """See ``ResultStore.thin``."""

        def read(db: sqlite3.Connection) -> Thinning:
            found = db.execute("SELECT arrival FROM progress WHERE name = 'thin'").fetchone()
            thinning = Thinning(found[0] if found else 0, received_before)
            rows = db.execute(
                "SELECT arrival, received, summary, detail FROM results WHERE arrival > ?"
                " ORDER BY arrival LIMIT ?",
                (thinning.begin, limit),
            )
            with contextlib.closing(rows):
                for row in rows:
                    if not thinning.take(*row):
                        break
            return thinning

        thinning = await self.read(read)

        def write(db: sqlite3.Connection) -> None:
            db.executemany("UPDATE results SET summary = ?, detail = ? WHERE arrival = ?", thinning.changes)
            db.execute(
                "INSERT INTO progress (name, arrival) VALUES ('thin', ?)"
                " ON CONFLICT (name) DO UPDATE SET arrival = excluded.arrival",
                (thinning.end,),
            )

        if thinning.end > thinning.begin:
            await self.write(write)
        return thinning.removed(limit)

    def _remove(self, db: sqlite3.Connection, arrivals: Sequence[int]) -> list[int]:
        sizes = []
        for arrival in arrivals:
            found = db.execute(
                f"SELECT length(summary) + length(detail) FROM results WHERE arrival = ? AND NOT {KEPT}",
                (arrival,),
            ).fetchone()
            if found is not None:
                db.execute("DELETE FROM results WHERE arrival = ?", (arrival,))
                sizes.append(found[0])
        return sizes

    async def compact(self) -> None:
        """See ``ResultStore.compact``."""

        def work() -> None:
            try:
                with contextlib.closing(connect(self._path, "rw")) as db:
                    db.execute("VACUUM")
            except sqlite3.Error as error:
                raise told(error, self._path) from error

        if self._writer.closed:
            raise StoreUnavailable(f"the store {self._path} is closed")
        await self._loop.run_in_executor(self._readers, work)

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
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        os.close(self._lock)


def _insert(db: sqlite3.Connection, piece: Sequence[tuple[Any, ...]], arrivals: dict[str, int]) -> None:
    """Stores results, and notes the arrivals of those that have the ones they were given."""
    if _INSERT.execute(db, piece) == len(piece):
        arrivals.update((row[1], row[0]) for row in piece)
    else:
        arrivals.update(
            db.execute(
                "SELECT run_id, arrival FROM results WHERE arrival BETWEEN ? AND ?",
                (piece[0][0], piece[-1][0]),
            )
        )


@contextlib.contextmanager
def _savepoint(db: sqlite3.Connection) -> Iterator[None]:
    db.execute("SAVEPOINT call")
    try:
        yield
    except BaseException:
        # After some errors SQLite has rolled everything back by itself.
        if db.in_transaction:
            db.execute("ROLLBACK TO call")
            db.execute("RELEASE call")
        raise
    db.execute("RELEASE call")


def connect(path: Path, mode: str) -> sqlite3.Connection:
    """Returns a connection in autocommit mode, for one thread at a time."""
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=_BUSY_SECONDS,
    )


def _open_writer(path: Path, clock: Callable[[], float]) -> tuple[int, sqlite3.Connection]:
    """Returns the lock that keeps other collectors out, and the one connection that writes."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreUnavailable(
            f"can't use the folder {path.parent}: {error.strerror}; choose another with --data-dir"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreUnavailable(
                f"another boardbench-collector has {path} open; stop it, or choose another --data-dir"
            ) from error
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            db = connect(path, "rw")
            try:
                db.execute("PRAGMA journal_mode = WAL")
                db.execute("PRAGMA synchronous = FULL")
                db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
                # What a statement over many rows might have to undo, else in a file that is written and gone.
                db.execute("PRAGMA temp_store = MEMORY")
                db.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
                migrate(db, now=clock())
            except BaseException:
                db.close()
                raise
        except StoreForeign as error:
            raise StoreForeign(f"can't use {path}: {error}") from error
        except (sqlite3.Error, OSError) as error:
            raise told(error, path) from error
    except BaseException:
        os.close(lock)
        raise
    return lock, db


def told(error: BaseException, path: Path) -> StoreError:
    """Returns the error in the collector's words."""
    if isinstance(error, StoreError):
        return error
    text = str(error)
    if "file is not a database" in text:
        return StoreForeign(f"{path} is not an SQLite file")
    if "malformed" in text or "corrupt" in text:
        return StoreDamaged(
            f"{path} is damaged ({text}); stop the collector, keep a copy, and restore a backup"
            " or start with a new folder"
        )
    if "disk is full" in text:
        return StoreUnavailable(f"no space left for {path}; free some, agents keep their results meanwhile")
    return StoreUnavailable(f"{path}: {text}")
