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
import sqlite3
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import (
    CollectorError,
    OutOfOrder,
    PlaceTaken,
    ResultRefused,
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
from boardbench.collector.stores.removing import Thinning
from boardbench.collector.stores.sqlite_jobs import SqliteJobStore
from boardbench.collector.stores.sqlite_schema import ADD_OUTCOMES, TRACK_SERIES, migrate, series_text
from boardbench.collector.thinning import is_same
from boardbench.v1 import collector_pb2, result_pb2

_T = TypeVar("_T")

_READERS = 4
"""Connections for reading: a scrape, a page and two queries at once; the rest wait their turn."""

_BATCH_ENTRIES = 4096
"""A commit takes no more than this, so that the first record in it is not kept waiting by the last."""

_BUSY_SECONDS = 10.0
"""How long a write waits for another process (a backup, a shell) that holds the file."""

_CACHE_KIB = 16 * 1024
"""Memory for pages of the writer: where runs' identities go in an index is anywhere, and 2 MB hold little."""

_CHECKPOINT_PAGES = 4000
"""Pages of 4 KiB in the log before they are moved into the file: a page that changes often is moved once."""

_REMEMBERED_SPOOLS = 100_000
"""Marks that the writer keeps in mind, of which it is the only one to move any: 20 MB."""

_BEYOND = "\U0010ffff"
"""Sorts behind every text that begins alike: the highest code point, and SQLite compares UTF-8 bytes."""

_INSERT = (
    "INSERT INTO results (run_id, device_id, spool_id, sequence, status, runtime, model_name, model_sha256,"
    " finished, received, summary, detail, series_id) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)"
    " ON CONFLICT (run_id) DO NOTHING"
)


_KEPT = (
    "(arrival = (SELECT MAX(arrival) FROM results) OR EXISTS (SELECT 1 FROM series"
    " WHERE series.device_id = results.device_id AND series.arrival = results.arrival))"
)
"""What is never removed: where the order of arrival ends, and the latest measurement of each series."""


@dataclass(frozen=True)
class _Append:
    """A result on its way to the writer."""

    future: asyncio.Future[bool]
    device_id: str
    spool_id: str
    sequence: int
    after: int
    row: tuple[Any, ...]
    series: str | None
    """None: not a measurement that a graph could show."""
    places: Places | None
    says_its_end: bool
    """Whether it says when it ended; else the end in the row is its arrival."""
    job: tuple[str, int] | None
    """The job and the attempt that the run is; None: of no job."""
    ending: result_pb2.RunResult | None
    """How the run ended, and nothing else of the result; None: of no job."""


@dataclass
class _Track:
    """What a batch adds to one series."""

    arrival: int
    places: Places | None
    """The last that are known, those of before the batch included."""
    drifts: int


@dataclass(frozen=True)
class _Call:
    """Anything else that writes."""

    future: asyncio.Future[Any]
    function: Callable[[sqlite3.Connection], Any]


_Entry = _Append | _Call


class SqliteResultStore:
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
        self._lock = lock
        self._db = writer
        self._max_result_bytes = max_result_bytes
        self._window_seconds = commit_window_seconds
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._entries: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._closed = False
        self._marks: dict[tuple[str, str], int] = {}
        """Of spools, as they are committed; only the writer's thread looks at them."""
        self._idle_readers: queue.LifoQueue[sqlite3.Connection] = queue.LifoQueue()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self.jobs = SqliteJobStore(self)
        self._thread = threading.Thread(target=self._write_forever, name="store-write", daemon=True)
        self._thread.start()

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

    def append(
        self, device_id: str, spool_id: str, sequence: int, result: result_pb2.RunResult, *, after: int = 0
    ) -> asyncio.Future[bool]:
        """See ``ResultStore.append``."""
        check_result(result, self._max_result_bytes)
        received = self._clock()
        series = series_of(result)
        row = (
            result.run_id,
            device_id,
            spool_id,
            sequence,
            result.status,
            series.runtime,
            series.model_name,
            series.model_sha256,
            finished_microseconds(result, received),
            received,
            *split(result),
            series_id(device_id, series),
        )
        measured = result.status == result_pb2.RUN_STATUS_SUCCEEDED
        job = attempt_of(result.run_id)
        future: asyncio.Future[bool] = self._loop.create_future()
        self._put(
            _Append(
                future,
                device_id,
                spool_id,
                sequence,
                after,
                row,
                series_text(series) if measured else None,
                places_of(result),
                result.HasField("finished_at"),
                job,
                ending_of(result) if job is not None else None,
            )
        )
        return future

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

    async def write(self, function: Callable[[sqlite3.Connection], _T]) -> _T:
        """Returns what the function returns, once the transaction that it wrote in is committed."""
        future: asyncio.Future[_T] = self._loop.create_future()
        self._put(_Call(future, function))
        return await future

    def _put(self, entry: _Entry) -> None:
        if self._closed:
            entry.future.set_exception(StoreUnavailable(f"the store {self._path} is closed"))
        else:
            self._entries.put(entry)

    def _write_forever(self) -> None:
        """The writer's thread: takes a batch, commits it, tells the loop; ends at the None in the queue."""
        while True:
            batch, last = self._gather()
            if batch:
                outcomes: list[Any]
                try:
                    outcomes = self._commit(batch)
                    touched = self.jobs.take_touched()
                except BaseException as error:
                    outcomes = [told(error, self._path)] * len(batch)
                    self.jobs.take_touched()
                    touched = []
                # The loop may be gone when the process is ending: then nobody waits for the answer.
                with contextlib.suppress(RuntimeError):
                    self._loop.call_soon_threadsafe(_tell, batch, outcomes)
                    if touched:
                        self._loop.call_soon_threadsafe(self.jobs.tell, touched)
            if last:
                return

    def _gather(self) -> tuple[list[_Entry], bool]:
        """Returns the next batch in the order of arrival, and whether it is the last one."""
        first = self._entries.get()
        if first is None:
            return [], True
        batch = [first]
        if self._window_seconds > 0:
            time.sleep(self._window_seconds)
        while len(batch) < _BATCH_ENTRIES:
            try:
                entry = self._entries.get_nowait()
            except queue.Empty:
                break
            if entry is None:
                return batch, True
            batch.append(entry)
        return batch, False

    def _commit(self, batch: list[_Entry]) -> list[Any]:
        """Returns what to tell each entry, once the batch is committed; raises when nothing was."""
        db = self._db
        outcomes: list[Any] = []
        marks = self._marks
        if len(marks) > _REMEMBERED_SPOOLS:
            marks.clear()
        moved: set[tuple[str, str]] = set()
        counts: Counter[tuple[str, int]] = Counter()
        latest: dict[tuple[str, str], _Track] = {}
        db.execute("BEGIN IMMEDIATE")
        try:
            for entry in batch:
                if isinstance(entry, _Append):
                    outcomes.append(self._insert(entry, marks, moved, counts, latest))
                else:
                    outcomes.append(_call(db, entry.function))
            if moved:
                db.executemany(
                    "INSERT INTO spools (device_id, spool_id, sequence) VALUES (?,?,?)"
                    " ON CONFLICT (device_id, spool_id) DO UPDATE SET sequence = excluded.sequence",
                    [(*key, marks[key]) for key in moved],
                )
            if counts:
                db.executemany(ADD_OUTCOMES, [(*key, total) for key, total in counts.items()])
            if latest:
                db.executemany(TRACK_SERIES, [_track_row(key, track) for key, track in latest.items()])
            db.execute("COMMIT")
        except BaseException:
            marks.clear()
            # SQLite has rolled back by itself after some errors, a full disk among them.
            if db.in_transaction:
                with contextlib.suppress(sqlite3.Error):
                    db.execute("ROLLBACK")
            raise
        return outcomes

    def _insert(
        self,
        entry: _Append,
        marks: dict[tuple[str, str], int],
        moved: set[tuple[str, str]],
        counts: Counter[tuple[str, int]],
        latest: dict[tuple[str, str], _Track],
    ) -> bool | CollectorError:
        """Returns what to tell about one result; a record that SQLite refuses does not touch the others."""
        db = self._db
        spool = (entry.device_id, entry.spool_id)
        mark = marks.get(spool)
        if mark is None:
            found = db.execute(
                "SELECT sequence FROM spools WHERE device_id = ? AND spool_id = ?", spool
            ).fetchone()
            mark = marks[spool] = found[0] if found else 0
        if entry.sequence <= mark:
            return self._known(entry)
        if entry.after > mark:
            return OutOfOrder(
                f"device {entry.device_id}, spool {entry.spool_id}: {entry.after} is not stored,"
                f" so {entry.sequence} can't be; send {entry.after} again"
            )
        run_id, status = entry.row[0], entry.row[4]
        try:
            cursor = db.execute(_INSERT, entry.row)
        except (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, OverflowError) as error:
            marks[spool] = entry.sequence
            moved.add(spool)
            return ResultRefused("unfit", f"run {run_id}: the record does not fit the store: {error}")
        marks[spool] = entry.sequence
        moved.add(spool)
        if cursor.rowcount == 0:
            device_id, summary, detail = db.execute(
                "SELECT device_id, summary, detail FROM results WHERE run_id = ?", (run_id,)
            ).fetchone()
            if device_id == entry.device_id and is_same((summary, detail), (entry.row[10], entry.row[11])):
                return False
            return ResultRefused(
                "conflict", f"run {run_id} is stored already, from device {device_id}, with other contents"
            )
        counts[(entry.device_id, status)] += 1
        if entry.job is not None and entry.ending is not None:
            self.jobs.end_by_result(db, entry.device_id, *entry.job, entry.ending, self._clock())
        if entry.series is not None:
            assert cursor.lastrowid is not None
            self._track((entry.device_id, entry.series), cursor.lastrowid, entry.places, latest)
        return True

    def _known(self, entry: _Append) -> bool | CollectorError:
        """Returns False when this very run is stored; else another one has had its place in the spool."""
        # Not by the whole contents: of what is stored, samples may have been dropped with age.
        run_id, status, finished = entry.row[0], entry.row[4], entry.row[8]
        found = self._db.execute(
            "SELECT device_id, status, finished FROM results WHERE run_id = ?", (run_id,)
        ).fetchone()
        there = found is not None and found[:2] == (entry.device_id, status)
        if there and (found[2] == finished or not entry.says_its_end):
            return False
        return PlaceTaken(entry.device_id, entry.spool_id, entry.sequence)

    def _track(
        self,
        key: tuple[str, str],
        arrival: int,
        places: Places | None,
        latest: dict[tuple[str, str], _Track],
    ) -> None:
        """Notes the latest result of a series, and whether its ops were elsewhere than just before."""
        track = latest.get(key)
        if track is None:
            found = self._db.execute(
                "SELECT places FROM series WHERE device_id = ? AND series = ?", key
            ).fetchone()
            before = Places.unpacked(found[0]) if found and found[0] is not None else None
            track = latest[key] = _Track(arrival, before, 0)
        track.arrival = arrival
        if places is not None:
            before = track.places
            track.drifts += before is not None and has_drifted(before, places)
            track.places = places if before is None else places.after(before)

    # Reading.

    async def acknowledged(self, device_id: str, spool_id: str) -> int:
        """See ``ResultStore.acknowledged``."""

        def read(db: sqlite3.Connection) -> int:
            found = db.execute(
                "SELECT sequence FROM spools WHERE device_id = ? AND spool_id = ?", (device_id, spool_id)
            ).fetchone()
            return int(found[0]) if found else 0

        return await self.read(read)

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

    async def outcomes(self) -> tuple[Outcomes, ...]:
        """See ``ResultStore.outcomes``."""

        def read(db: sqlite3.Connection) -> tuple[Outcomes, ...]:
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
            add("device_id = ?", wanted.device_id)
        if wanted.model:
            digits = wanted.model.lower()
            add(
                "(model_name = ? OR (model_sha256 >= ? AND model_sha256 < ?))",
                wanted.model,
                digits,
                digits + _BEYOND,
            )
        if wanted.runtime:
            add("runtime = ?", wanted.runtime)
        if wanted.status:
            add("status = ?", wanted.status)
        if wanted.since_microseconds is not None:
            add("finished >= ?", wanted.since_microseconds)
        if after is not None:
            add("(finished, arrival) < (?, ?)", after.finished_microseconds, after.arrival)
        record = "summary, x''" if summary else "summary, detail"
        query = (
            f"SELECT finished, arrival, {record} FROM results"
            + (" WHERE " + " AND ".join(conditions) if conditions else "")
            + " ORDER BY finished DESC, arrival DESC LIMIT ?"
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

    async def find(self, run_id: str) -> tuple[result_pb2.RunResult, ...]:
        """See ``ResultStore.find``."""

        def read(db: sqlite3.Connection) -> tuple[result_pb2.RunResult, ...]:
            select = "SELECT summary, detail FROM results WHERE "
            rows = db.execute(select + "run_id = ?", (run_id,)).fetchall()
            if not rows:
                rows = db.execute(
                    select + "run_id >= ? AND run_id < ? ORDER BY run_id LIMIT 2", (run_id, run_id + _BEYOND)
                ).fetchall()
            return tuple(result_pb2.RunResult.FromString(head + tail) for head, tail in rows)

        return await self.read(read)

    async def news(self, after: int) -> News:
        """See ``ResultStore.news``."""

        def read(db: sqlite3.Connection) -> News:
            # In one transaction, so that no board is missing whose result the position counts.
            db.execute("BEGIN")
            try:
                (position,) = db.execute("SELECT COALESCE(MAX(arrival), 0) FROM results").fetchone()
                found = db.execute("SELECT DISTINCT device_id FROM results WHERE arrival > ?", (after,))
                return News(position, frozenset(device_id for (device_id,) in found))
            finally:
                db.execute("COMMIT")

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

    async def latest(
        self, *, received_since: float, per_device: int, devices: Collection[str] | None = None
    ) -> LatestResults:
        """See ``ResultStore.latest``."""
        # As JSON: the number of parameters is bounded, the length of one is not.
        only = None if devices is None else json.dumps(list(devices))

        def read(db: sqlite3.Connection) -> LatestResults:
            kept: list[LatestResult] = []
            left_out: dict[str, int] = {}
            chosen = " AND n.device_id IN (SELECT value FROM json_each(?))" if only is not None else ""
            for device_id, received, summary, place, count, drifts in db.execute(
                "SELECT s.device_id, r.received, r.summary, s.place, s.count, s.drifts FROM ("
                " SELECT n.device_id, n.arrival,"
                " CASE WHEN n.places IS NULL THEN NULL ELSE n.drifts END AS drifts,"
                " ROW_NUMBER() OVER (PARTITION BY n.device_id ORDER BY n.arrival DESC) AS place,"
                " COUNT(*) OVER (PARTITION BY n.device_id) AS count"
                f" FROM series n JOIN results o ON o.arrival = n.arrival WHERE o.received >= ?{chosen}"
                ") s JOIN results r ON r.arrival = s.arrival WHERE s.place <= ?"
                " ORDER BY s.device_id, s.place",
                (received_since, *(() if only is None else (only,)), per_device),
            ):
                if place == 1 and count > per_device:
                    left_out[device_id] = count - per_device
                kept.append(
                    LatestResult(device_id, received, result_pb2.RunResult.FromString(summary), drifts)
                )
            return LatestResults(tuple(kept), left_out)

        return await self.read(read)

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

    async def remove(self, *, received_before: float | None, per_series: int | None, limit: int) -> Removed:
        """See ``ResultStore.remove``."""

        def read(db: sqlite3.Connection) -> list[int]:
            chosen: list[int] = []
            last = 0
            while received_before is not None and len(chosen) < limit:
                # By arrival, because there is no order by age; what stays for ever is as long as the series.
                rows = db.execute(
                    f"SELECT arrival, received, {_KEPT} FROM results WHERE arrival > ?"
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
                    "SELECT series_id FROM results GROUP BY series_id HAVING COUNT(*) > ?", (per_series,)
                ).fetchall():
                    chosen += [
                        arrival
                        for arrival, kept in db.execute(
                            f"SELECT arrival, {_KEPT} FROM results WHERE series_id = ?"
                            " ORDER BY arrival DESC LIMIT ? OFFSET ?",
                            (series, limit, per_series),
                        )
                        if not kept
                    ]
                    if len(chosen) >= limit:
                        break
            return sorted(set(chosen))[:limit]

        chosen = await self.read(read)

        def write(db: sqlite3.Connection) -> Removed:
            count, size = 0, 0
            for arrival in chosen:
                found = db.execute(
                    f"SELECT length(summary) + length(detail) FROM results WHERE arrival = ? AND NOT {_KEPT}",
                    (arrival,),
                ).fetchone()
                if found is not None:
                    db.execute("DELETE FROM results WHERE arrival = ?", (arrival,))
                    count, size = count + 1, size + found[0]
            return Removed(count, 0, size, more=len(chosen) == limit)

        return await self.write(write) if chosen else Removed()

    async def compact(self) -> None:
        """See ``ResultStore.compact``."""

        def work() -> None:
            try:
                with contextlib.closing(connect(self._path, "rw")) as db:
                    db.execute("VACUUM")
            except sqlite3.Error as error:
                raise told(error, self._path) from error

        if self._closed:
            raise StoreUnavailable(f"the store {self._path} is closed")
        await self._loop.run_in_executor(self._readers, work)

    async def check(self) -> None:
        """See ``ResultStore.check``."""

        def read(db: sqlite3.Connection) -> None:
            complaints = [text for (text,) in db.execute("PRAGMA integrity_check(10)")]
            if complaints != ["ok"]:
                raise StoreDamaged(f"{self._path}: " + "; ".join(complaints))
            for run_id, device_id, status, summary, detail in db.execute(
                "SELECT run_id, device_id, status, summary, detail FROM results"
            ):
                try:
                    result = result_pb2.RunResult.FromString(summary + detail)
                except Exception as error:
                    raise StoreDamaged(
                        f"{self._path}: the record of run {run_id} ({device_id}) is unreadable: {error}"
                    ) from error
                if (result.run_id, result.status) != (run_id, status):
                    raise StoreDamaged(
                        f"{self._path}: the record of run {run_id} ({device_id}) says {result.run_id!r}"
                    )

        await self.read(read)

    async def read(self, function: Callable[[sqlite3.Connection], _T]) -> _T:
        """Returns what the function returns, called with a connection that only reads."""

        def work() -> _T:
            with self._reader() as db:
                return function(db)

        if self._closed:
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

    async def close(self) -> None:
        """See ``ResultStore.close``."""
        if self._closed:
            return
        self._closed = True
        self._entries.put(None)
        await asyncio.to_thread(self._close)

    def _close(self) -> None:
        self._thread.join()
        self._readers.shutdown()
        while not self._idle_readers.empty():
            self._idle_readers.get_nowait().close()
        with contextlib.suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        os.close(self._lock)


def _track_row(key: tuple[str, str], track: _Track) -> tuple[Any, ...]:
    return (*key, track.arrival, None if track.places is None else track.places.packed(), track.drifts)


def _tell(batch: list[_Entry], outcomes: list[Any]) -> None:
    """Completes the futures of a batch; runs in the loop. Whoever has gone away is not told."""
    for entry, outcome in zip(batch, outcomes, strict=True):
        if entry.future.done():
            continue
        if isinstance(outcome, BaseException):
            entry.future.set_exception(outcome)
        else:
            entry.future.set_result(outcome)


def _call(db: sqlite3.Connection, function: Callable[[sqlite3.Connection], Any]) -> Any:
    """Returns what the function returns, or the error that it met, its own writes undone then."""
    db.execute("SAVEPOINT call")
    try:
        outcome = function(db)
    except (sqlite3.DataError, sqlite3.IntegrityError, sqlite3.InterfaceError, OverflowError) as error:
        db.execute("ROLLBACK TO call")
        outcome = StoreError(f"the store refused it: {error}")
    db.execute("RELEASE call")
    return outcome


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
