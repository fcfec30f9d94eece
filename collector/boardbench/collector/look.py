"""What people, programs and Prometheus see: the store and the open streams, joined.

The gRPC queries, the HTTP API, the page and ``/metrics`` are all answered from here, so that they can't
say different things, and so that none of them knows a table.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import InvalidRequest
from boardbench.collector.fleet import Fleet, Tally
from boardbench.collector.jobs import set_time
from boardbench.collector.store import (
    LatestResults,
    News,
    Outcomes,
    Position,
    ResultFilter,
    ResultStore,
    the_one,
)
from boardbench.collector.terms import chosen, parse
from boardbench.v1 import collector_pb2, result_pb2

CLOCK_OFF_SECONDS = 5.0
"""A board's clock that is so far from the collector's is wrong: the way of a message takes less."""

DEFAULT_PAGE_SIZE = 100
MAX_PAGE_SIZE = 1000

_PAGE_BYTES = 3 * 1024 * 1024
"""A page ends here even when it is short: gRPC clients take 4 MiB a message unless told otherwise."""


@dataclass(frozen=True)
class DeviceView:
    """A board as it looks now."""

    hello: collector_pb2.Hello
    up: bool
    """Whether its stream is open."""
    last_seen_at: float
    first_seen_at: float
    heartbeat: collector_pb2.Heartbeat | None
    clock_offset_seconds: float | None = None
    """Its clock less the collector's, by its last message; None: not known."""

    @property
    def device_id(self) -> str:
        """Identity of the board."""
        return self.hello.board.device_id


@dataclass(frozen=True)
class QueueView:
    """The jobs as they are now."""

    jobs: Mapping[str, int]
    """How many there are by state: "queued", "leased", …."""
    oldest_waiting_seconds: float
    """Of the job that has waited longest for a board to take it; 0: none waits."""
    leases_expired: int
    """Since the collector started."""
    dead: int
    """Since the collector started."""
    files_bytes: int
    """Of the files that are kept for jobs."""


@dataclass(frozen=True)
class ForwardView:
    """How sending results on to one receiver goes."""

    receiver: str
    """Host and port."""
    samples: int
    dropped: Mapping[str, int]
    """Samples that were refused for good, by reason."""
    retries: int
    up: bool | None
    """Whether the last post was answered; None: there was none."""
    pending: int
    """Results that are not sent on yet."""


@dataclass(frozen=True)
class RetentionView:
    """What was taken out of the store since the collector started, for its age or its number."""

    results_thinned: int
    """Results whose single samples were dropped."""
    results_removed: int
    samples_dropped: int
    bytes_removed: int
    """Of records, as they were stored."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that one scrape shows."""

    at: float
    """Unix seconds."""
    devices: tuple[DeviceView, ...]
    latest: LatestResults
    outcomes: tuple[Outcomes, ...]
    tally: Tally
    open_streams: int
    read: frozenset[str] | None = None
    """Boards that ``latest`` is about; None: all of them."""
    queue: QueueView | None = None
    """None: this collector hands out no jobs."""
    forwarded: tuple[ForwardView, ...] = ()
    retention: RetentionView | None = None
    """None: everything is kept for ever."""
    certificate_ends_at: float | None = None
    """Unix seconds; None: the collector has no certificate."""


class ReadModel:
    """Answers questions about boards and results."""

    def __init__(
        self,
        store: ResultStore,
        fleet: Fleet,
        *,
        result_ttl_seconds: float,
        results_per_device: int,
        queue: Callable[[], Awaitable[QueueView]] | None = None,
        forwarded: Callable[[], tuple[ForwardView, ...]] = tuple,
        retention: Callable[[], RetentionView | None] = lambda: None,
        certificate_ends_at: Callable[[], float | None] = lambda: None,
        silence_seconds: float = CollectorConfig.heartbeat_seconds * CollectorConfig.missed_heartbeats,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """``queue`` tells of the jobs, ``forwarded`` of what is sent on to others."""
        self._store = store
        self._fleet = fleet
        self._queue = queue
        self._retention = retention
        self._certificate_ends_at = certificate_ends_at
        self._silence_seconds = silence_seconds
        self._forwarded = forwarded
        self._result_ttl_seconds = result_ttl_seconds
        self._results_per_device = results_per_device
        self._clock = clock

    async def views(self) -> tuple[DeviceView, ...]:
        """Returns every board that ever said hello, by its identity."""
        views = []
        for record in await self._store.devices():
            sighting = self._fleet.sighting(record.device_id)
            heartbeat, last_seen_at = record.heartbeat, record.last_seen_at
            if sighting is not None:
                heartbeat = sighting.heartbeat or heartbeat
                last_seen_at = max(last_seen_at, sighting.at)
            up = self._fleet.is_up(record.device_id) or (
                record.elsewhere_at is not None
                and self._clock() - record.elsewhere_at <= self._silence_seconds
            )
            offset = self._fleet.clock_offset(record.device_id)
            views.append(DeviceView(record.hello, up, last_seen_at, record.first_seen_at, heartbeat, offset))
        return tuple(views)

    async def devices(self, on: Sequence[str] = ()) -> tuple[collector_pb2.Device, ...]:
        """Returns every board that meets the terms, as the wire has it; InvalidRequest when one is none."""
        terms = parse(on)
        now = self._clock()
        labels, open_jobs = await self._store.jobs.labels(), await self._store.jobs.queue_lengths()
        bookings = {booking.device_id: booking for booking in await self._store.jobs.bookings(at=now)}
        totals: dict[str, int] = {}
        for outcomes in await self._store.outcomes():
            totals[outcomes.device_id] = totals.get(outcomes.device_id, 0) + outcomes.total
        devices = []
        for view in await self.views():
            device = collector_pb2.Device(
                board=view.hello.board,
                agent_version=view.hello.agent_version,
                runtimes=view.hello.runtimes,
                address=view.hello.address,
                up=view.up,
                heartbeat=view.heartbeat,
                results=totals.get(view.device_id, 0),
                labels=labels.get(view.device_id),
                open_jobs=open_jobs.get(view.device_id, 0),
                sensors=view.hello.sensors,
                clock_offset_seconds=self._fleet.clock_offset(view.device_id),
                problems=problems(
                    view,
                    now,
                    conflict=self._fleet.conflict(view.device_id),
                    clock_offset_seconds=self._fleet.clock_offset(view.device_id),
                ),
            )
            booking = bookings.get(view.device_id)
            if booking is not None:
                taken = device.reservation
                taken.device_id, taken.holder = booking.device_id, booking.holder
                taken.reason = booking.reason
                set_time(taken.ends_at, booking.ends)
            device.last_seen_at.FromNanoseconds(int(view.last_seen_at * 1_000_000) * 1000)
            device.first_seen_at.FromNanoseconds(int(view.first_seen_at * 1_000_000) * 1000)
            devices.append(device)
        return chosen(devices, terms)

    async def results(self, request: collector_pb2.ListResultsRequest) -> collector_pb2.ListResultsResponse:
        """Returns a page of results, the latest end first; InvalidRequest when the question is wrong."""
        since = None
        if request.HasField("since"):
            since = request.since.seconds * 1_000_000 + request.since.nanos // 1000
            if abs(since) >= 2**63:
                raise InvalidRequest(f"since is no time: {request.since.seconds} s")
        wanted = ResultFilter(
            device_id=request.device_id,
            model=request.model,
            runtime=request.runtime,
            status=request.status,
            since_microseconds=since,
        )
        page = await self._store.results(
            wanted,
            limit=min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE),
            after=_read_token(request.page_token, wanted) if request.page_token else None,
            summary=request.summary,
            max_bytes=_PAGE_BYTES,
        )
        return collector_pb2.ListResultsResponse(
            results=page.results, next_page_token=_write_token(page.next, wanted) if page.next else ""
        )

    async def result(self, run_id: str) -> result_pb2.RunResult:
        """Returns one result, by its run's identity or the first digits of it.

        NotFound when no run has it, Ambiguous when several begin so.
        """
        if not run_id:
            raise InvalidRequest("run_id is missing")
        found = await self._store.find(run_id)
        the_one("run", run_id, [result.run_id for result in found])
        return found[0]

    def now(self) -> float:
        """Returns Unix seconds, by the collector's clock."""
        return self._clock()

    async def news(self, after: int) -> News:
        """Returns which boards have new results behind the position; see ``ResultStore.news``."""
        return await self._store.news(after)

    async def samples(self, run_id: str) -> Sequence[int]:
        """Returns the latencies of a run in nanoseconds; none when they, or the run, are gone."""
        found = await self._store.find(run_id)
        return found[0].latency.samples_nanoseconds if found and found[0].run_id == run_id else ()

    async def snapshot(
        self, *, views: tuple[DeviceView, ...] | None = None, devices: frozenset[str] | None = None
    ) -> Snapshot:
        """Returns what a scrape shows now, with the results of these boards only; None: of all."""
        now = self._clock()
        latest = LatestResults((), {})
        if devices is None or devices:
            latest = await self._store.latest(
                received_since=now - self._result_ttl_seconds,
                per_device=self._results_per_device,
                devices=devices,
            )
        tally = self._fleet.tally
        return Snapshot(
            at=now,
            devices=await self.views() if views is None else views,
            latest=latest,
            outcomes=await self._store.outcomes(),
            tally=replace(tally, refused=tally.refused.copy(), acknowledge=tally.acknowledge.copy()),
            open_streams=len(self._fleet),
            read=devices,
            queue=None if self._queue is None else await self._queue(),
            forwarded=self._forwarded(),
            retention=self._retention(),
            certificate_ends_at=self._certificate_ends_at(),
        )

    async def probe(self) -> None:
        """Returns once the store has taken a write; StoreError when it can't."""
        await self._store.probe()


def problems(view: DeviceView, now: float, *, conflict: str, clock_offset_seconds: float | None) -> list[str]:
    """Returns what is wrong with a board, each in a sentence."""
    found = [conflict] if conflict else []
    if not view.up:
        found.append(f"it is not connected, and was last heard of {_ago(now - view.last_seen_at)} ago")
    if clock_offset_seconds is not None and abs(clock_offset_seconds) > CLOCK_OFF_SECONDS:
        off = f"{_ago(abs(clock_offset_seconds))} {'ahead' if clock_offset_seconds > 0 else 'behind'}"
        found.append(f"its clock is {off}: set it (timedatectl set-ntp true), or the times of runs are wrong")
    heartbeat = view.heartbeat
    if heartbeat is not None and heartbeat.spool_dropped:
        found.append(
            f"its spool had no room and dropped {heartbeat.spool_dropped} results for good: give it more"
            " (spool.limit_bytes), or a better link"
        )
    if view.up and not any(runtime.available for runtime in view.hello.runtimes):
        found.append("no runtime can run on it; boardbench-agent probe says why")
    return found


def _ago(seconds: float) -> str:
    """Returns a span of time in the unit that suits it."""
    for size, unit in ((86400.0, "d"), (3600.0, "h"), (60.0, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"


def _fingerprint(wanted: ResultFilter) -> str:
    text = json.dumps(
        [wanted.device_id, wanted.model, wanted.runtime, wanted.status, wanted.since_microseconds]
    )
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _write_token(position: Position, wanted: ResultFilter) -> str:
    text = json.dumps([position.finished_microseconds, position.arrival, _fingerprint(wanted)])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _read_token(token: str, wanted: ResultFilter) -> Position:
    complaint = "page_token is none that this collector gave out; ask again without it"
    try:
        text = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        finished, arrival, fingerprint = json.loads(text)
    except (binascii.Error, UnicodeError, ValueError, TypeError) as error:
        raise InvalidRequest(complaint) from error
    if not all(isinstance(number, int) and abs(number) < 2**63 for number in (finished, arrival)):
        raise InvalidRequest(complaint)
    if fingerprint != _fingerprint(wanted):
        raise InvalidRequest(
            "page_token belongs to a query with other filters; keep them, or ask again without it"
        )
    return Position(finished, arrival)
