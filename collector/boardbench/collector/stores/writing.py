"""What becomes of results that come in, decided alike for every store in SQL.

Everything here happens in one transaction of the writer's thread: the results, the marks of the spools that
they came from, and what follows from them. Whoever waits is told after its commit.
"""

from __future__ import annotations

import abc
import asyncio
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from boardbench.collector.errors import CollectorError, OutOfOrder, PlaceTaken, ResultRefused, StoreError
from boardbench.collector.store import Places, Removed, check_result, has_drifted
from boardbench.collector.stores.gather import Append, Call, Gatherer, Row, new_append
from boardbench.collector.stores.reading import Connection, SqlReading
from boardbench.collector.stores.removing import removable
from boardbench.collector.stores.sql_jobs import SqlJobStore
from boardbench.collector.thinning import is_same
from boardbench.v1 import result_pb2

_T = TypeVar("_T")

Spool = tuple[str, str]
"""A board and one of its spools."""

SeriesKey = tuple[str, str]
"""A board and one of its series, as text."""


@dataclass
class Track:
    """What a batch adds to one series."""

    arrival: int
    places: bytes | None
    """The last that are known (``Places.packed``), those of before the batch included."""
    drifts: int = 0

    def move(self, places: Places) -> None:
        """Notes where the ops were in the next run of the series."""
        packed = places.packed()
        if packed == self.places:
            return
        before = None if self.places is None else Places.unpacked(self.places)
        if before is not None:
            self.drifts += has_drifted(before, places)
            packed = places.after(before).packed()
        self.places = packed


@dataclass
class _Batch:
    """What the results of one transaction add up to."""

    marks: dict[Spool, int] = field(default_factory=dict)
    """Of the spools whose mark has moved."""
    stored: list[tuple[Append, int]] = field(default_factory=list)
    """Those that are stored now, each with its arrival, in their order."""


class SqlWriting(SqlReading[Connection]):
    """The half of a ``ResultStore`` in SQL that writes, as far as it is the same everywhere."""

    jobs: SqlJobStore[Connection]
    _writer: Gatherer[Connection]
    _loop: asyncio.AbstractEventLoop
    _clock: Callable[[], float]
    _max_result_bytes: int

    def append(
        self,
        device_id: str,
        spool_id: str,
        sequence: int,
        result: result_pb2.RunResult,
        *,
        after: int = 0,
        content: bytes | None = None,
    ) -> asyncio.Future[bool]:
        """See ``ResultStore.append``."""
        check_result(result, self._max_result_bytes, content)
        future: asyncio.Future[bool] = self._loop.create_future()
        self._writer.put(
            new_append(
                future,
                device_id,
                spool_id,
                sequence,
                result,
                after=after,
                content=content,
                received=self._clock(),
                fits=self.fits,
            )
        )
        return future

    @property
    def is_crowded(self) -> bool:
        """See ``ResultStore.is_crowded``."""
        return self._writer.is_crowded

    async def room(self) -> None:
        """See ``ResultStore.room``."""
        await self._writer.room()

    async def write(self, function: Callable[[Connection], _T]) -> _T:
        """See ``Asking.write``."""
        return await self._writer.call(function)

    # What each database has its own way for; all of it in the writer's thread.

    @abc.abstractmethod
    def _nested(self, db: Connection) -> AbstractContextManager[object]:
        """A part of the transaction, undone alone when an error leaves it."""

    @abc.abstractmethod
    def _unfit(self) -> tuple[type[BaseException], ...]:
        """Errors of a database that works and was given something that does not fit."""

    @abc.abstractmethod
    def _marks(self, db: Connection, spools: set[Spool]) -> Mapping[Spool, int]:
        """Returns the marks of the spools, which nobody else moves before the transaction ends."""

    @abc.abstractmethod
    def _set_marks(self, db: Connection, marks: Mapping[Spool, int]) -> None:
        """Writes marks, in the order given."""

    @abc.abstractmethod
    def _insert(
        self, db: Connection, rows: Sequence[Row]
    ) -> tuple[Mapping[str, int], Mapping[str, BaseException]]:
        """Returns the arrivals of the runs that are stored now, and why some can't be.

        Those in neither were stored before.
        """

    @abc.abstractmethod
    def _add_outcomes(self, db: Connection, counts: Iterable[tuple[str, int, int]]) -> None:
        """Counts runs: (board, status, number)."""

    @abc.abstractmethod
    def _places(self, db: Connection, keys: Sequence[SeriesKey]) -> Mapping[SeriesKey, bytes | None]:
        """Returns where the ops of the series were last, as far as that is known."""

    @abc.abstractmethod
    def _set_tracks(self, db: Connection, tracks: Mapping[SeriesKey, Track]) -> None:
        """Writes what was added to series."""

    @abc.abstractmethod
    def _remove(self, db: Connection, arrivals: Sequence[int]) -> list[int]:
        """Removes results, but for those that stay for ever; returns how many bytes each of them had."""

    # The same everywhere.

    async def remove(self, *, received_before: float | None, per_series: int | None, limit: int) -> Removed:
        """See ``ResultStore.remove``."""
        chosen = await self.read(
            lambda db: removable(
                functools.partial(self.rows, db),
                received_before=received_before,
                per_series=per_series,
                limit=limit,
            )
        )
        if not chosen:
            return Removed()
        # Not while they were chosen, so that others wrote meanwhile: what has become the latest stays.
        sizes = await self.write(lambda db: self._remove(db, chosen))
        return Removed(len(sizes), 0, sum(sizes), more=len(chosen) == limit)

    def _batch(self, db: Connection, entries: Sequence[Append | Call[Connection]]) -> list[Any]:
        """Returns what to tell each entry when the transaction is committed."""
        outcomes: list[Any] = []
        appends: list[Append] = []
        for entry in entries:
            if isinstance(entry, Append):
                appends.append(entry)
                continue
            if appends:
                outcomes += self._append_all(db, appends)
                appends = []
            outcomes.append(self._call(db, entry.function))
        if appends:
            outcomes += self._append_all(db, appends)
        return outcomes

    def _tell_touched(self) -> None:
        """Tells of the jobs that the transaction has changed, now that it is committed."""
        touched = self.jobs.take_touched()
        if touched:
            self._writer.tell(self.jobs.tell, touched)

    def _call(self, db: Connection, function: Callable[[Connection], Any]) -> Any:
        """Returns what the function returns, or the error that it met, its own writes undone then."""
        touched = self.jobs.touched
        try:
            with self._nested(db):
                return function(db)
        except CollectorError as error:
            outcome = error
        except self._unfit() as error:
            outcome = StoreError(f"the store refused it: {error}")
        self.jobs.take_touched(touched)
        return outcome

    def _append_all(self, db: Connection, entries: Sequence[Append]) -> list[bool | CollectorError]:
        """Returns what to tell about each result; one that does not fit does not touch the others."""
        batch = _Batch()
        known: list[int] = []
        marks = dict(self._marks(db, {entry.spool for entry in entries}))
        outcomes: list[bool | CollectorError | None] = []
        fresh: dict[str, int] = {}
        rows: list[Row] = []
        for index, entry in enumerate(entries):
            spool, row = entry.spool, entry.row
            sequence, mark = row.sequence, marks[spool]
            if sequence <= mark:
                known.append(index)
                outcomes.append(False)
                continue
            if entry.after > mark:
                outcomes.append(
                    OutOfOrder(
                        f"device {row.device_id}, spool {row.spool_id}: {entry.after} is not stored,"
                        f" so {sequence} can't be; send {entry.after} again"
                    )
                )
                continue
            marks[spool] = batch.marks[spool] = sequence
            outcomes.append(None)
            if fresh.setdefault(row.run_id, index) == index:
                rows.append(row)
        arrivals, unfit = self._insert(db, rows)
        for run_id, index in fresh.items():
            arrival = arrivals.get(run_id)
            if arrival is not None:
                outcomes[index] = True
                batch.stored.append((entries[index], arrival))
            elif run_id in unfit:
                outcomes[index] = ResultRefused(
                    "unfit", f"run {run_id}: the record does not fit the store: {unfit[run_id]}"
                )
        self._compare(db, entries, outcomes)
        self._finish(db, batch)
        for index in self._displaced(db, entries, known):
            outcomes[index] = PlaceTaken(*entries[index].row[1:4])
        # By now every one of them is known.
        return cast("list[bool | CollectorError]", outcomes)

    def _compare(
        self, db: Connection, entries: Sequence[Append], outcomes: list[bool | CollectorError | None]
    ) -> None:
        """Tells those whose run is stored already whether it is the very same."""
        stored: dict[str, tuple[str, bytes, bytes]] = {}
        open_ = [index for index, outcome in enumerate(outcomes) if outcome is None]
        if open_:
            condition, runs = self.among("run_id", {entries[index].row.run_id for index in open_})
            query = f"SELECT run_id, device_id, summary, detail FROM results WHERE {condition}"
            stored = {run_id: (device, *record) for run_id, device, *record in self.rows(db, query, (runs,))}
        for index in open_:
            row = entries[index].row
            known = stored.get(row.run_id)
            if known is None:
                outcomes[index] = ResultRefused(
                    "unfit", f"run {row.run_id}: the record does not fit the store"
                )
            elif known[0] == row.device_id and is_same(known[1:], (row.summary, row.detail)):
                outcomes[index] = False
            else:
                outcomes[index] = ResultRefused(
                    "conflict",
                    f"run {row.run_id} is stored already, from device {known[0]}, with other contents",
                )

    def _displaced(self, db: Connection, entries: Sequence[Append], known: Sequence[int]) -> list[int]:
        """Returns those in whose place in the spool another run was stored."""
        if not known:
            return []
        # Not by the whole contents: of what is stored, samples may have been dropped with age.
        condition, runs = self.among("run_id", {entries[index].row.run_id for index in known})
        query = f"SELECT run_id, device_id, status, finished FROM results WHERE {condition}"
        stored = {run_id: rest for run_id, *rest in self.rows(db, query, (runs,))}
        displaced = []
        for index in known:
            entry, row = entries[index], entries[index].row
            device_id, status, finished = stored.get(row.run_id, (None, None, None))
            if (device_id, status) != (row.device_id, row.status) or (
                finished != row.finished and entry.says_its_end
            ):
                displaced.append(index)
        return displaced

    def _finish(self, db: Connection, batch: _Batch) -> None:
        """Writes what follows from the results that are stored now."""
        if batch.marks:
            self._set_marks(db, dict(sorted(batch.marks.items())))
        counts: Counter[tuple[str, int]] = Counter()
        endings: list[tuple[str, str, int, result_pb2.RunResult]] = []
        measured: list[tuple[SeriesKey, Places | None, int]] = []
        for entry, arrival in batch.stored:
            device_id = entry.spool[0]
            counts[(device_id, entry.row.status)] += 1
            if entry.job is not None and entry.ending is not None:
                endings.append((device_id, *entry.job, entry.ending))
            if entry.series is not None:
                measured.append(((device_id, entry.series), entry.places, arrival))
        if counts:
            self._add_outcomes(db, [(*key, counts[key]) for key in sorted(counts)])
        if endings:
            self.jobs.end_by_results(db, endings, self._clock())
        if measured:
            self._track(db, measured)

    def _track(self, db: Connection, measured: Sequence[tuple[SeriesKey, Places | None, int]]) -> None:
        """Notes the latest result of each series, and whether its ops were elsewhere than just before."""
        before = self._places(db, sorted({key for key, _, _ in measured}))
        tracks: dict[SeriesKey, Track] = {}
        for key, places, arrival in measured:
            track = tracks.get(key)
            if track is None:
                track = tracks[key] = Track(arrival, before.get(key))
            track.arrival = arrival
            if places is not None:
                track.move(places)
        self._set_tracks(db, tracks)
