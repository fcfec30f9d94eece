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
from dataclasses import dataclass, field, replace

from boardbench.collector.errors import (
    IdentityTaken,
    ShuttingDown,
    SilentAgent,
    StoreError,
    StreamEnded,
    Superseded,
)
from boardbench.collector.jobs import seconds_of
from boardbench.collector.store import ResultStore, Sighting
from boardbench.v1 import collector_pb2

_log = logging.getLogger(__name__)

CONFLICT_SECONDS = 900.0
"""How long it is told that two agents had one identity: longer than either waits to try again."""


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
    identity_conflicts: int = 0
    """Streams of a second agent with the identity of one that is connected."""
    renewals: int = 0
    """Times that an agent was asked to give its spool a new identity."""
    acknowledge: Durations = field(default_factory=Durations)
    """From a result's arrival to its acknowledgement; those that were refused have none."""


class Session:
    """One board's stream, from its hello to its end."""

    __slots__ = (
        "clock_offset",
        "device_id",
        "dirty",
        "ended",
        "heartbeat",
        "held_up",
        "instance_id",
        "last_heard_monotonic",
        "last_seen_at",
        "life_id",
        "opened_at",
        "peer",
    )

    def __init__(
        self,
        device_id: str,
        peer: str,
        now: float,
        monotonic: float,
        *,
        instance_id: str = "",
        life_id: str = "",
    ) -> None:
        self.device_id = device_id
        self.peer = peer
        self.instance_id = instance_id
        """Identity of the agent's data folder; empty from agents that know none."""
        self.life_id = life_id
        self.clock_offset: float | None = None
        """The board's clock less the collector's in seconds, the way of the message included."""
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


@dataclass(frozen=True)
class Conflict:
    """Two agents had one identity."""

    at: float
    """Unix seconds, the last time it was seen."""
    reason: str


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
        self._conflicts: dict[str, Conflict] = {}
        self._superseded_lives: dict[str, str] = {}
        self._closing = False
        self._empty = asyncio.Event()
        self._empty.set()

    async def check_elsewhere(self, peer: str, hello: collector_pb2.Hello) -> None:
        """Returns when no other agent with this identity has a stream to another collector of the store.

        IdentityTaken when one has: agents are told apart as by :meth:`join`.
        """
        device_id = hello.board.device_id
        if not hello.instance_id or device_id in self._sessions:
            return
        there = await self._store.held_elsewhere(device_id, since=self._clock() - self._silence_seconds)
        if there is not None and there.instance_id not in ("", hello.instance_id):
            raise self._taken(device_id, f"one at {there.address or 'another collector'}", peer)

    def join(self, device_id: str, peer: str, hello: collector_pb2.Hello | None = None) -> Session:
        """Returns the session of a new stream; an older one of the same agent is asked to end.

        ShuttingDown when the collector stops. IdentityTaken when another agent with this identity has a
        stream: an agent is known by its data folder, as far as it tells.
        """
        if self._closing:
            raise ShuttingDown("the collector is stopping; connect again later")
        hello = hello or collector_pb2.Hello()
        session = Session(
            device_id,
            peer,
            self._clock(),
            self._monotonic(),
            instance_id=hello.instance_id,
            life_id=hello.life_id,
        )
        _set_clock(session, hello)
        older = self._sessions.get(device_id)
        if older is not None:
            self._check_identity(session, older)
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

    def _check_identity(self, session: Session, older: Session) -> None:
        device_id = session.device_id
        mend = "give one of them another device_id"
        if (
            older.instance_id
            and session.instance_id not in ("", older.instance_id)
            and not older.ended.done()
        ):
            raise self._taken(device_id, f"one at {older.peer}", session.peer)
        if session.life_id and session.life_id == self._superseded_lives.get(device_id):
            # Whoever was replaced by another life is alive itself, so they are two.
            self.tally.identity_conflicts += 1
            self._conflicts[device_id] = Conflict(
                self._clock(),
                f"two agents with copies of one data folder take turns as {device_id}, at {older.peer} and"
                f" {session.peer}; remove the folder of one of them, and {mend}",
            )
        if older.life_id != session.life_id:
            self._superseded_lives[device_id] = older.life_id

    def _taken(self, device_id: str, connected: str, peer: str) -> IdentityTaken:
        self.tally.identity_conflicts += 1
        reason = (
            f"two agents have the identity {device_id}: {connected} is connected, another at {peer} was"
            " refused; give one of them another device_id"
        )
        if device_id not in self._conflicts:
            _log.warning("%s", reason)
        self._conflicts[device_id] = Conflict(self._clock(), reason)
        return IdentityTaken(reason)

    def conflict(self, device_id: str) -> str:
        """Returns how two agents have lately had this identity; empty when they have not."""
        conflict = self._conflicts.get(device_id)
        if conflict is None:
            return ""
        if self._clock() - conflict.at > CONFLICT_SECONDS:
            del self._conflicts[device_id]
            return ""
        return conflict.reason

    def clock_offset(self, device_id: str) -> float | None:
        """Returns the board's clock less the collector's in seconds; None when it is not known."""
        session = self._sessions.get(device_id)
        return session.clock_offset if session is not None else None

    def leave(self, session: Session) -> None:
        """The stream has ended."""
        _log.info("device %s: the stream from %s has ended", session.device_id, session.peer)
        if self._sessions.get(session.device_id) is session:
            del self._sessions[session.device_id]
        if not self._sessions:
            self._empty.set()
        still = session.device_id in self._sessions
        self._departed[session.device_id] = replace(session.sighting(), streaming=still)

    def heard(self, session: Session, heartbeat: collector_pb2.Heartbeat | None = None) -> None:
        """A message came in."""
        session.last_seen_at = self._clock()
        session.last_heard_monotonic = self._monotonic()
        session.dirty = True
        if heartbeat is not None:
            session.heartbeat = heartbeat
            _set_clock(session, heartbeat)

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


def _set_clock(session: Session, message: collector_pb2.Hello | collector_pb2.Heartbeat) -> None:
    """Notes how far the board's clock is from ours, when the message says when it was sent."""
    if message.HasField("sent_at"):
        session.clock_offset = seconds_of(message.sent_at) - session.last_seen_at
