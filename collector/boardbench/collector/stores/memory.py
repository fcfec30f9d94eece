"""A store that forgets when the process ends: for tests, and for a look without leaving traces."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace

from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import OutOfOrder, PlaceTaken, ResultRefused, StoreUnavailable
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
    Series,
    Sighting,
    check_limit,
    check_result,
    ending_of,
    finished_microseconds,
    has_drifted,
    places_of,
    series_of,
    split,
)
from boardbench.collector.stores.memory_jobs import MemoryJobStore
from boardbench.collector.stores.removing import Thinning
from boardbench.collector.thinning import is_same
from boardbench.v1 import collector_pb2, result_pb2


@dataclass(frozen=True)
class _Stored:
    position: Position
    device_id: str
    received_at: float
    runtime: str
    summary: bytes
    detail: bytes

    def is_of(self, device_id: str, result: result_pb2.RunResult) -> bool:
        """Whether it is this run, by its status and its end: contents may be dropped with age."""
        end = finished_microseconds(result, 0.0)
        return (self.device_id, self.read(summary=True).status) == (device_id, result.status) and (
            end == self.position.finished_microseconds or not result.HasField("finished_at")
        )

    def read(self, *, summary: bool = False) -> result_pb2.RunResult:
        return result_pb2.RunResult.FromString(self.summary if summary else self.summary + self.detail)


class MemoryResultStore:
    """A ``ResultStore`` in memory; everything it does is done when the call returns."""

    is_crowded = False

    def __init__(
        self,
        *,
        max_result_bytes: int = CollectorConfig.max_result_bytes,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._max_result_bytes = max_result_bytes
        self._clock = clock
        self._closed = False
        self.jobs = MemoryJobStore(self._check_open)
        self._devices: dict[str, DeviceRecord] = {}
        self._marks: dict[tuple[str, str], int] = {}
        self._results: dict[str, _Stored] = {}
        self._outcomes: Counter[tuple[str, int]] = Counter()
        self._latest: dict[tuple[str, Series], _Stored] = {}
        self._places: dict[tuple[str, Series], Places] = {}
        self._drifts: Counter[tuple[str, Series]] = Counter()
        self._arrivals = 0
        self._thin_until = 0

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
        future: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        try:
            future.set_result(self._append(device_id, spool_id, sequence, result, after, content))
        except (ResultRefused, OutOfOrder, PlaceTaken, StoreUnavailable) as error:
            future.set_exception(error)
        return future

    async def room(self) -> None:
        """See ``ResultStore.room``."""

    def _append(
        self,
        device_id: str,
        spool_id: str,
        sequence: int,
        result: result_pb2.RunResult,
        after: int,
        content: bytes | None,
    ) -> bool:
        self._check_open()
        mark = self._marks.get((device_id, spool_id), 0)
        if sequence <= mark:
            stored = self._results.get(result.run_id)
            if stored is None or not stored.is_of(device_id, result):
                raise PlaceTaken(device_id, spool_id, sequence)
            return False
        if after > mark:
            raise OutOfOrder(
                f"device {device_id}, spool {spool_id}: {after} is not stored, so {sequence} can't be;"
                f" send {after} again"
            )
        self._marks[(device_id, spool_id)] = sequence
        summary, detail = split(result, content)
        known = self._results.get(result.run_id)
        if known is not None:
            if known.device_id == device_id and is_same((known.summary, known.detail), (summary, detail)):
                return False
            raise ResultRefused(
                "conflict",
                f"run {result.run_id} is stored already, from device {known.device_id}, with other contents",
            )
        now = self._clock()
        self._arrivals += 1
        position = Position(finished_microseconds(result, now), self._arrivals)
        series = series_of(result)
        stored = _Stored(position, device_id, now, series.runtime, summary, detail)
        self._results[result.run_id] = stored
        self._outcomes[(device_id, result.status)] += 1
        job = attempt_of(result.run_id)
        if job is not None:
            self.jobs.end_by_result(device_id, *job, ending_of(result), now)
        if result.status == result_pb2.RUN_STATUS_SUCCEEDED:
            self._latest[(device_id, series)] = stored
            self._track((device_id, series), places_of(result))
        return True

    def _track(self, key: tuple[str, Series], places: Places | None) -> None:
        before = self._places.get(key)
        if places is not None:
            self._drifts[key] += before is not None and has_drifted(before, places)
            self._places[key] = places if before is None else places.after(before)

    async def greet(self, hello: collector_pb2.Hello, at: float) -> None:
        """See ``ResultStore.greet``."""
        self._check_open()
        copy = collector_pb2.Hello()
        copy.CopyFrom(hello)
        known = self._devices.get(hello.board.device_id)
        self._devices[hello.board.device_id] = (
            DeviceRecord(copy, at, at, None)
            if known is None
            else replace(known, hello=copy, last_seen_at=max(at, known.last_seen_at))
        )

    async def held_elsewhere(self, device_id: str, *, since: float) -> collector_pb2.Hello | None:  # noqa: ARG002
        """See ``ResultStore.held_elsewhere``."""
        self._check_open()
        return None

    async def saw(self, sightings: Sequence[Sighting]) -> None:
        """See ``ResultStore.saw``."""
        self._check_open()
        for sighting in sightings:
            known = self._devices.get(sighting.device_id)
            if known is not None:
                self._devices[sighting.device_id] = replace(
                    known,
                    last_seen_at=max(sighting.at, known.last_seen_at),
                    heartbeat=sighting.heartbeat or known.heartbeat,
                )

    async def acknowledged(self, device_id: str, spool_id: str) -> int:
        """See ``ResultStore.acknowledged``."""
        self._check_open()
        return self._marks.get((device_id, spool_id), 0)

    async def devices(self) -> tuple[DeviceRecord, ...]:
        """See ``ResultStore.devices``."""
        self._check_open()
        return tuple(self._devices[name] for name in sorted(self._devices))

    async def outcomes(self) -> tuple[Outcomes, ...]:
        """See ``ResultStore.outcomes``."""
        self._check_open()
        return tuple(Outcomes(*key, total) for key, total in sorted(self._outcomes.items()))

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
        self._check_open()
        check_limit(limit)
        ordered = sorted(
            self._results.values(),
            key=lambda stored: (stored.position.finished_microseconds, stored.position.arrival),
            reverse=True,
        )
        page: list[result_pb2.RunResult] = []
        size, last = 0, None
        for stored in ordered:
            if after is not None and (stored.position.finished_microseconds, stored.position.arrival) >= (
                after.finished_microseconds,
                after.arrival,
            ):
                continue
            if not _matches(stored, wanted):
                continue
            size += len(stored.summary) + (0 if summary else len(stored.detail))
            if len(page) == limit or (page and max_bytes is not None and size > max_bytes):
                return ResultPage(tuple(page), last)
            page.append(stored.read(summary=summary))
            last = stored.position
        return ResultPage(tuple(page), None)

    async def find(self, run_id: str) -> tuple[result_pb2.RunResult, ...]:
        """See ``ResultStore.find``."""
        self._check_open()
        whole = self._results.get(run_id)
        if whole is not None:
            return (whole.read(),)
        names = sorted(name for name in self._results if name.startswith(run_id))
        return tuple(self._results[name].read() for name in names[:2])

    async def news(self, after: int) -> News:
        """See ``ResultStore.news``."""
        self._check_open()
        behind = [stored for stored in self._results.values() if stored.position.arrival > after]
        return News(self._arrivals, frozenset(stored.device_id for stored in behind))

    async def arrivals(self, after: int, *, limit: int, max_bytes: int) -> tuple[Arrival, ...]:
        """See ``ResultStore.arrivals``."""
        self._check_open()
        check_limit(limit)
        found: list[Arrival] = []
        size = 0
        for stored in self._results.values():
            if stored.position.arrival <= after:
                continue
            size += len(stored.summary) + len(stored.detail)
            if len(found) == limit or (found and size > max_bytes):
                break
            found.append(
                Arrival(stored.position.arrival, stored.device_id, stored.received_at, stored.read())
            )
        return tuple(found)

    async def latest(
        self, *, received_since: float, per_device: int, devices: Collection[str] | None = None
    ) -> LatestResults:
        """See ``ResultStore.latest``."""
        self._check_open()
        kept: list[LatestResult] = []
        counts: Counter[str] = Counter()
        for key, stored in sorted(
            self._latest.items(), key=lambda item: (item[0][0], -item[1].position.arrival)
        ):
            device_id = key[0]
            if stored.received_at < received_since or (devices is not None and device_id not in devices):
                continue
            counts[device_id] += 1
            if counts[device_id] <= per_device:
                drifts = self._drifts[key] if key in self._places else None
                kept.append(LatestResult(device_id, stored.received_at, stored.read(summary=True), drifts))
        return LatestResults(
            tuple(kept), {name: count - per_device for name, count in counts.items() if count > per_device}
        )

    async def thin(self, *, received_before: float, limit: int) -> Removed:
        """See ``ResultStore.thin``."""
        self._check_open()
        thinning = Thinning(self._thin_until, received_before)
        behind = [stored for stored in self._results.values() if stored.position.arrival > thinning.begin]
        for stored in behind[:limit]:
            if not thinning.take(stored.position.arrival, stored.received_at, stored.summary, stored.detail):
                break
        by_arrival = {stored.position.arrival: (run_id, stored) for run_id, stored in self._results.items()}
        for summary, detail, arrival in thinning.changes:
            run_id, stored = by_arrival[arrival]
            thin = replace(stored, summary=summary, detail=detail)
            self._results[run_id] = thin
            for key, latest in self._latest.items():
                if latest is stored:
                    self._latest[key] = thin
        self._thin_until = thinning.end
        return thinning.removed(limit)

    async def remove(self, *, received_before: float | None, per_series: int | None, limit: int) -> Removed:
        """See ``ResultStore.remove``."""
        self._check_open()
        latest = {id(stored) for stored in self._latest.values()}
        later: Counter[tuple[str, Series]] = Counter()
        chosen: list[str] = []
        for run_id, stored in reversed(self._results.items()):
            series = (stored.device_id, series_of(stored.read(summary=True)))
            old = received_before is not None and stored.received_at < received_before
            beyond = per_series is not None and later[series] >= per_series
            later[series] += 1
            if (old or beyond) and id(stored) not in latest and stored.position.arrival != self._arrivals:
                chosen.append(run_id)
        chosen = chosen[::-1][:limit]
        gone = [self._results.pop(run_id) for run_id in chosen]
        size = sum(len(stored.summary) + len(stored.detail) for stored in gone)
        return Removed(len(gone), 0, size, more=len(gone) == limit)

    async def compact(self) -> None:
        """See ``ResultStore.compact``."""
        self._check_open()

    async def probe(self) -> None:
        """See ``ResultStore.probe``."""
        self._check_open()

    async def check(self) -> None:
        """See ``ResultStore.check``."""
        self._check_open()

    async def close(self) -> None:
        """See ``ResultStore.close``."""
        self._closed = True

    def _check_open(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed")


def _matches(stored: _Stored, wanted: ResultFilter) -> bool:
    result = stored.read(summary=True)
    model = wanted.model
    return (
        (not wanted.device_id or stored.device_id == wanted.device_id)
        and (not model or result.model.name == model or result.model.sha256.startswith(model.lower()))
        and (not wanted.runtime or stored.runtime == wanted.runtime)
        and (not wanted.status or result.status == wanted.status)
        and (
            wanted.since_microseconds is None
            or stored.position.finished_microseconds >= wanted.since_microseconds
        )
    )
