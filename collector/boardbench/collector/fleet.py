"""Which boards are connected right now, what they last said, and what came in since the start.

Only the event loop touches it. What must survive a restart goes on to the store, gathered: a heartbeat
of every board each few seconds is no reason for a commit of its own.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import itertools
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from boardbench.collector.errors import (
    ShuttingDown,
    SilentAgent,
    StoreError,
    StreamEnded,
    Superseded,
)
from boardbench.collector.store import ResultStore, Sighting
from boardbench.v1 import collector_pb2

_log = logging.getLogger(__name__)


class Durations:
    """How often something took how long."""

    bounds = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
    """Upper bounds in seconds: a commit takes two milliseconds on an SSD and a second on a worn card."""

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self._counts = [0] * (len(self.bounds) + 1)

    def add(self, seconds: float) -> None:
        """It took so long."""
        self.count += 1
        self.total += seconds
        self._counts[bisect.bisect_left(self.bounds, seconds)] += 1

    def cumulative(self) -> tuple[int, ...]:
        """Returns how often it took at most each of the bounds."""
        return tuple(itertools.accumulate(self._counts[:-1]))

    def copy(self) -> Durations:
        """Returns the same, which stays as it is."""
        other = Durations()
        other.count, other.total, other._counts = self.count, self.total, self._counts.copy()
        return other


@dataclass
class Tally:
    """What came in since the collector started; counters of its ``/metrics``."""

    stored: int = 0
    duplicates: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By the code of ``ResultRefused``."""
    store_failures: int = 0
    """Results whose commit failed; their agents send them again."""
    streams: int = 0
    superseded: int = 0
    silent: int = 0
    acknowledge: Durations = field(default_factory=Durations)
    """From a result's arrival to its commit."""


class Session:
    """One board's stream, from its hello to its end."""

    def __init__(self, device_id: str, peer: str, now: float, monotonic: float) -> None:
        self.device_id = device_id
        self.peer = peer
        self.opened_at = now
        self.last_seen_at = now
        self.last_heard_monotonic = monotonic
        self.heartbeat: collector_pb2.Heartbeat | None = None
        self.held_up = False
        """True while the collector itself keeps the stream waiting for the store."""
        self.dirty = True
        """Whether the store has yet to be told when it was last seen."""
        self.ended: asyncio.Future[StreamEnded] = asyncio.get_running_loop().create_future()
        """Done when the collector wants the stream to end, with what to tell the agent."""

    def sighting(self) -> Sighting:
        """Returns when the board was last heard of, and its last heartbeat."""
        return Sighting(self.device_id, self.last_seen_at, self.heartbeat)

    def end(self, reason: StreamEnded) -> None:
        """Asks the stream to end; the first reason stays."""
        if not self.ended.done():
            self.ended.set_result(reason)


class Fleet:
    """The open streams, at most one a board."""

    def __init__(
        self,
        store: ResultStore,
        *,
        silence_seconds: float,
        flush_seconds: float = 5.0,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.tally = Tally()
        self._store = store
        self._silence_seconds = silence_seconds
        self._flush_seconds = flush_seconds
        self._clock = clock
        self._monotonic = monotonic
        self._sessions: dict[str, Session] = {}
        self._departed: dict[str, Sighting] = {}
        self._closing = False
        self._empty = asyncio.Event()
        self._empty.set()

    def join(self, device_id: str, peer: str) -> Session:
        """Returns the session of a new stream; an older one of the same board is asked to end.

        ShuttingDown when the collector stops.
        """
        if self._closing:
            raise ShuttingDown("the collector is stopping; connect again later")
        session = Session(device_id, peer, self._clock(), self._monotonic())
        older = self._sessions.get(device_id)
        if older is not None:
            self.tally.superseded += 1
            _log.warning("device %s: the stream from %s takes over from %s", device_id, peer, older.peer)
            older.end(
                Superseded(
                    f"device {device_id} opened a newer stream from {peer}; if that is not this board,"
                    " two have the same identity: give one of them another device_id"
                )
            )
        self._sessions[device_id] = session
        self._empty.clear()
        self.tally.streams += 1
        _log.info("device %s: connected from %s", device_id, peer)
        return session

    def leave(self, session: Session) -> None:
        """The stream has ended."""
        _log.info("device %s: the stream from %s has ended", session.device_id, session.peer)
        if self._sessions.get(session.device_id) is session:
            del self._sessions[session.device_id]
        if not self._sessions:
            self._empty.set()
        self._departed[session.device_id] = session.sighting()

    def heard(self, session: Session, heartbeat: collector_pb2.Heartbeat | None = None) -> None:
        """A message came in."""
        session.last_seen_at = self._clock()
        session.last_heard_monotonic = self._monotonic()
        session.dirty = True
        if heartbeat is not None:
            session.heartbeat = heartbeat

    def is_up(self, device_id: str) -> bool:
        """Whether the board's stream is open."""
        return device_id in self._sessions

    def sighting(self, device_id: str) -> Sighting | None:
        """Returns when the board was last heard of, as far as the store may not know it yet; else None."""
        session = self._sessions.get(device_id)
        return session.sighting() if session is not None else self._departed.get(device_id)

    def __len__(self) -> int:
        return len(self._sessions)

    def __iter__(self) -> Iterator[Session]:
        return iter(tuple(self._sessions.values()))

    def end_silent(self) -> None:
        """Asks every stream to end on which nothing was heard for too long: its board or network is gone."""
        now = self._monotonic()
        for session in self:
            silence = now - session.last_heard_monotonic
            if silence > self._silence_seconds and not session.held_up and not session.ended.done():
                self.tally.silent += 1
                session.end(
                    SilentAgent(
                        f"nothing was heard from device {session.device_id} for {silence:.0f} s;"
                        f" a stream ends after {self._silence_seconds:.0f} s of silence"
                    )
                )

    async def flush(self) -> None:
        """Returns once the store knows when every board was last seen; what it can't take now is kept."""
        departed = dict(self._departed)
        dirty = [session for session in self if session.dirty]
        for session in dirty:
            session.dirty = False
        sightings = departed | {session.device_id: session.sighting() for session in dirty}
        if not sightings:
            return
        try:
            await self._store.saw(tuple(sightings.values()))
        except StoreError:
            for session in dirty:
                session.dirty = True
            raise
        for device_id, sighting in departed.items():
            if self._departed.get(device_id) is sighting:
                del self._departed[device_id]

    async def watch(self) -> None:
        """Ends silent streams and flushes, until cancelled."""
        while True:
            await asyncio.sleep(min(self._flush_seconds, self._silence_seconds / 3))
            self.end_silent()
            try:
                await self.flush()
            except StoreError as error:
                _log.warning("when boards were last seen could not be stored, trying again: %s", error)

    async def close(self, timeout_seconds: float) -> None:
        """Takes no more streams, asks the open ones to end, and returns when they have or the time is up."""
        self._closing = True
        for session in self:
            session.end(ShuttingDown("the collector is stopping; connect again later"))
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_seconds)
