"""Spool to collector: results in their order over one long-lived stream, each until it is acknowledged.

A stream begins with a hello; the collector's welcome says what it has of the spool, and what lies behind
that is sent, a bounded number ahead of the acknowledgements. When the stream breaks, the next one goes on
behind the last acknowledgement: what was in flight is sent again, and the collector knows it by its key.

Results of an earlier identity of the spool go out over a stream of their own, before the rest, because a
hello names one spool.

The stream carries more than results: whoever else has something to say or to hear on it is a
:class:`Party`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

import grpc
from google.protobuf.message import DecodeError

from boardbench.agent.errors import StorageError
from boardbench.agent.spool import Spool
from boardbench.inspect import tls
from boardbench.v1 import collector_pb2, collector_pb2_grpc, result_pb2

if TYPE_CHECKING:
    _Call = grpc.aio.StreamStreamCall[collector_pb2.ReportRequest, collector_pb2.ReportResponse]

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# How often a result that breaks the stream all by itself is tried before it is dropped.
_TRIES_ALONE = 3


@dataclass(frozen=True)
class LinkStatus:
    """How the link to the collector is; ``error`` is empty while it is connected."""

    address: str
    connected: bool
    error: str


class Party(Protocol):
    """What speaks on the stream beside the spool. Called from the event loop; returns at once."""

    def connected(self) -> None:
        """A stream is up: what was said on an earlier one may never have come."""

    def beat(self, heartbeat: collector_pb2.Heartbeat) -> None:
        """Adds to a heartbeat what belongs in it."""

    def hear(self, response: collector_pb2.ReportResponse) -> None:
        """Takes a message that is for it, and leaves every other alone."""

    def say(self) -> Iterable[collector_pb2.ReportRequest]:
        """What is to be sent now, each once."""


@dataclass(frozen=True)
class Pace:
    """How long the link waits and how much it sends ahead."""

    # Full jitter: each wait is random between nothing and a bound that doubles from the first to the
    # longest, so that a fleet does not come back in one moment after its collector was down.
    first_retry_seconds: float = 1.0
    longest_retry_seconds: float = 30.0
    # After the collector has said that another agent has this one's identity: a person has to mend that, or
    # the collector to notice that the other one is gone.
    rival_seconds: float = 60.0
    # To connect, with name resolution and a handshake over a bad link, and be welcomed.
    welcome_seconds: float = 20.0
    # For an acknowledgement: a collector commits within milliseconds, or it hangs.
    answer_seconds: float = 60.0
    # When the collector names no interval.
    heartbeat_seconds: float = 10.0
    # For the collector to end a stream that has nothing more to carry.
    farewell_seconds: float = 5.0
    in_flight_results: int = 16
    # Results with 100,000 samples have 0.4 MB.
    in_flight_bytes: int = 4 * 1024 * 1024


def open_channel(
    address: str,
    *,
    ca: bytes = b"",
    # Collectors allow a ping every 30 s.
    keepalive_seconds: float = 60.0,
    keepalive_timeout_seconds: float = 20.0,
) -> grpc.aio.Channel:
    """A channel to the collector at ``HOST:PORT``; the one place where the agent makes channels.

    It is encrypted where the address says so (``tls://HOST:PORT``), or ``ca`` names the authority that the
    collector's certificate must be of (PEM); else it may be of any that this system trusts.
    """
    secure, target = tls.split(address)
    options = (
        # Notices a peer that is gone without a word: by a ping, and sooner by a heartbeat that nobody
        # takes, as gRPC sets Linux's TCP_USER_TIMEOUT to the same timeout.
        ("grpc.keepalive_time_ms", int(keepalive_seconds * 1000)),
        ("grpc.keepalive_timeout_ms", int(keepalive_timeout_seconds * 1000)),
        # A keepalive ping waits for a ping that is on its way (one that measures bandwidth, say), whose
        # own timeout is a minute.
        ("grpc.http2.ping_timeout_ms", int(keepalive_timeout_seconds * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
        # A channel of its own: with the shared pool a new one inherits the old one's connection.
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.max_send_message_length", -1),
    )
    if not (secure or ca):
        return grpc.aio.insecure_channel(target, options=options)
    trusted = grpc.ssl_channel_credentials(ca or tls.system_authorities())
    return grpc.aio.secure_channel(target, trusted, options=options)


def refusal(error: grpc.aio.AioRpcError, address: str, ca: bytes) -> str:
    """What a call's failure says, and what to do where it is one of TLS."""
    details = error.details() or "no reason given"
    secure = bool(ca) or tls.split(address)[0]
    advice = tls.advice(details, tls=secure, option="collector_ca (--collector-ca FILE)")
    if error.code() != grpc.StatusCode.UNAVAILABLE or not advice:
        return details
    return f"{details}: {advice}"


class CollectorLink:
    """Keeps the collector informed. ``run()`` is the whole life of it; used from one event loop."""

    def __init__(
        self,
        address: str,
        spool: Spool,
        *,
        hello: Callable[[], collector_pb2.Hello],
        heartbeat: Callable[[], collector_pb2.Heartbeat],
        parties: Sequence[Party] = (),
        credentials: Callable[[grpc.aio.Channel], Awaitable[tuple[tuple[str, str], ...]]] | None = None,
        channel: Callable[[str], grpc.aio.Channel] = open_channel,
        pace: Pace | None = None,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Coroutine[object, object, None]] = asyncio.sleep,
        monotonic: Callable[[], float] = time.monotonic,
        ca: bytes = b"",
    ) -> None:
        """Calls ``hello`` at every connection and ``heartbeat`` at every beat; adds what the spool knows."""
        self._address = address
        self._ca = ca
        self._spool = spool
        self._hello = hello
        self._heartbeat = heartbeat
        self._parties = parties
        self._credentials = credentials
        self._channel = channel
        self._pace = pace or Pace()
        self._jitter = jitter
        self._sleep = sleep
        self._monotonic = monotonic
        self._wake = asyncio.Event()
        self._connected = False
        self._error = "not connected yet"
        # A result that may break the stream is sent alone, to be sure that it is the one.
        self._alone = False
        self._tries_alone = 0

    def status(self) -> LinkStatus:
        """How the link is now."""
        return LinkStatus(self._address, self._connected, "" if self._connected else self._error)

    async def run(self) -> None:
        """Reports until cancelled; survives whatever the network and the collector do."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            try:
                loop.call_soon_threadsafe(self._wake.set)
            except RuntimeError:
                # The loop was closed while a last result was appended: it waits for the next start.
                pass

        unsubscribe = self._spool.subscribe(wake)
        try:
            failures = 0
            while True:
                began = self._monotonic()
                # A board may be offline for weeks: what is only in memory should not wait for the collector.
                if self._spool.status().trouble:
                    await asyncio.to_thread(self._spool.settle)
                session = _Session(self, self._spool, self._pace)
                problem = await self._attempt(session)
                if problem is None:
                    # Only to greet under another identity.
                    failures = 0
                    continue
                self._log_problem(problem)
                # A welcome alone proves nothing: one that breaks down on the first result welcomes too.
                if session.progressed or self._monotonic() - began >= self._pace.longest_retry_seconds:
                    failures = 0
                bound = min(self._pace.longest_retry_seconds, self._pace.first_retry_seconds * 2**failures)
                # 2^64 is enough to reach any bound.
                failures = min(failures + 1, 64)
                wait = bound * self._jitter()
                if session.rivalled:
                    wait = self._pace.rival_seconds * (1 + self._jitter()) / 2
                await self._sleep(wait)
        finally:
            unsubscribe()
            self._connected, self._error = False, "the agent is stopping"

    async def _attempt(self, session: _Session) -> str | None:
        """Why the stream ended; None when there is more to send under another identity."""
        try:
            async with self._channel(self._address) as channel:
                await session.run(channel)
            return None
        except grpc.aio.AioRpcError as error:
            await self._suspect(session, error)
            if error.code() == grpc.StatusCode.ALREADY_EXISTS:
                session.rivalled = True
                # The collector says what to do about it.
                return (
                    f"another agent reports as this board: {error.details()}; results stay in the spool "
                    "meanwhile"
                )
            return f"{refusal(error, self._address, self._ca)} ({error.code().name})"
        except _Broken as error:
            return str(error)
        except StorageError as error:
            return f"nothing is sent: {error}"
        finally:
            self._connected = False

    async def _suspect(self, session: _Session, error: grpc.aio.AioRpcError) -> None:
        """Drops a result that is larger than the collector can receive, once that is certain."""
        if session.progressed or not session.in_flight or error.code() != grpc.StatusCode.RESOURCE_EXHAUSTED:
            return
        if not self._alone:
            self._alone, self._tries_alone = True, 0
            return
        self._tries_alone += 1
        if self._tries_alone >= _TRIES_ALONE:
            reason = f"{error.details()} ({error.code().name})"
            await asyncio.to_thread(
                self._spool.reject, session.spool_id, next(iter(session.in_flight)), reason
            )
            self._alone, self._tries_alone = False, 0

    def _log_problem(self, problem: str) -> None:
        level = logging.DEBUG if problem == self._error else logging.WARNING
        _log.log(level, "collector %s: %s", self._address, problem)
        self._error = problem

    # For the session.

    def hello(self, spool_id: str) -> collector_pb2.ReportRequest:
        """The first message of a stream."""
        request = collector_pb2.ReportRequest(hello=self._hello())
        request.hello.spool_id = spool_id
        request.hello.sent_at.GetCurrentTime()
        return request

    def beat(self) -> collector_pb2.ReportRequest:
        """A heartbeat with the spool as it is now."""
        request = collector_pb2.ReportRequest(heartbeat=self._heartbeat())
        status = self._spool.status()
        request.heartbeat.spool_pending = status.pending
        request.heartbeat.spool_dropped = status.dropped
        request.heartbeat.spool_bytes = status.used_bytes
        for party in self._parties:
            party.beat(request.heartbeat)
        request.heartbeat.sent_at.GetCurrentTime()
        return request

    def news(self) -> Iterable[collector_pb2.ReportRequest]:
        """What the parties have to say."""
        for party in self._parties:
            yield from party.say()

    def heard(self, response: collector_pb2.ReportResponse) -> None:
        """The collector said something that is not about the spool."""
        for party in self._parties:
            party.hear(response)

    async def credentials(self, channel: grpc.aio.Channel) -> tuple[tuple[str, str], ...]:
        """What the report is to begin with, as metadata."""
        return await self._credentials(channel) if self._credentials is not None else ()

    def speak(self) -> None:
        """A party has something to say."""
        self._wake.set()

    def welcomed(self, version: str) -> None:
        """The stream is up."""
        _log.info("collector %s (version %s): connected", self._address, version or "unknown")
        self._connected, self._error = True, ""
        for party in self._parties:
            party.connected()

    def answered(self) -> None:
        """A result was taken: none of them breaks the stream."""
        self._alone, self._tries_alone = False, 0

    @property
    def in_flight_results(self) -> int:
        """Number of results that may be sent ahead of their acknowledgements."""
        return 1 if self._alone else self._pace.in_flight_results

    @property
    def wake(self) -> asyncio.Event:
        """Set when there may be something to send."""
        return self._wake

    def now(self) -> float:
        """Seconds on a clock that never jumps."""
        return self._monotonic()


class _Session:
    """One stream, from its hello to its end."""

    def __init__(self, link: CollectorLink, spool: Spool, pace: Pace) -> None:
        self.spool_id = ""
        self.progressed = False
        # The collector said that another agent has this one's identity.
        self.rivalled = False
        # Sequence → size and when it was sent, in the order of sending.
        self.in_flight: dict[int, tuple[int, float]] = {}
        self._in_flight_bytes = 0
        self._sent_through = 0
        self._answered_at = 0.0
        self._link = link
        self._spool = spool
        self._pace = pace

    async def run(self, channel: grpc.aio.Channel) -> None:
        """Returns when another identity has to be greeted with; raises AioRpcError, _Broken, StorageError."""
        self.spool_id = await asyncio.to_thread(self._spool.outgoing_id)
        metadata = await self._link.credentials(channel)
        call: _Call = collector_pb2_grpc.CollectorServiceStub(channel).Report(metadata=metadata)
        tasks: list[asyncio.Task[None]] = []
        try:
            heartbeat_seconds = await self._greet(call)
            tasks = [
                asyncio.create_task(self._read(call)),
                asyncio.create_task(self._send(call, heartbeat_seconds)),
            ]
            reader, sender = tasks
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            if sender.done() and sender.exception() is None:
                with contextlib.suppress(asyncio.InvalidStateError):
                    await call.done_writing()
                await asyncio.wait([reader], timeout=self._pace.farewell_seconds)
                return
            if not reader.done() and call.done():
                # Writing fails without a reason; the reader gets it.
                await asyncio.wait([reader])
            await (reader if reader.done() else sender)
            raise _Broken("the collector ended the stream")
        finally:
            call.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _greet(self, call: _Call) -> float:
        """Says hello, takes the welcome in; seconds between heartbeats."""
        response = await _within(self._exchange(call), self._pace.welcome_seconds)
        if response is None:
            raise _Broken(f"no welcome came within {self._pace.welcome_seconds:g} s")
        if response.WhichOneof("response") != "welcome":
            raise _Broken("it answers the hello with something else: it is no collector, or a newer one")
        welcome = response.welcome
        await asyncio.to_thread(self._spool.reconcile, self.spool_id, welcome.acknowledged_sequence)
        self._link.welcomed(welcome.collector_version)
        self._answered_at = self._link.now()
        # Expected at least this often, so a little more often.
        asked_seconds = welcome.heartbeat_seconds * 0.8
        return asked_seconds if asked_seconds > 0 else self._pace.heartbeat_seconds

    async def _exchange(self, call: _Call) -> collector_pb2.ReportResponse:
        await _write(call, self._link.hello(self.spool_id))
        return await _response(call)

    async def _read(self, call: _Call) -> None:
        while True:
            response = await _response(call)
            kind = response.WhichOneof("response")
            if kind == "acknowledgement":
                await self._acknowledged(response.acknowledgement)
            elif kind == "rejection":
                rejection = response.rejection
                self._landed([rejection.sequence] if rejection.spool_id == self.spool_id else [])
                await asyncio.to_thread(
                    self._spool.reject, rejection.spool_id, rejection.sequence, rejection.reason
                )
            elif kind == "renewal":
                renewal = response.renewal
                await asyncio.to_thread(self._spool.renew, renewal.spool_id, renewal.sequence)
                raise _Broken(
                    "the collector has results of another board under this spool's identity, so the spool "
                    "took a new one"
                )
            else:
                self._link.heard(response)

    async def _acknowledged(self, acknowledgement: collector_pb2.Acknowledgement) -> None:
        if acknowledgement.spool_id != self.spool_id:
            _log.warning("an acknowledgement for spool %r, which is not this one", acknowledgement.spool_id)
            return
        # What was not sent can't be stored, whatever the collector says.
        sequence = min(acknowledgement.sequence, self._sent_through)
        self._landed([sent for sent in self.in_flight if sent <= sequence])
        await asyncio.to_thread(self._spool.acknowledge, self.spool_id, sequence)

    def _landed(self, sequences: list[int]) -> None:
        for sequence in sequences:
            size_bytes, _ = self.in_flight.pop(sequence, (0, 0.0))
            self._in_flight_bytes -= size_bytes
        if sequences:
            self.progressed = True
            self._answered_at = self._link.now()
            self._link.answered()
            self._link.wake.set()

    async def _send(self, call: _Call, heartbeat_seconds: float) -> None:
        """Returns when nothing is left to do under this identity and there is under another."""
        beat_at = self._link.now()
        while True:
            self._link.wake.clear()
            if self._link.now() >= beat_at:
                await _write(call, self._link.beat())
                beat_at = self._link.now() + heartbeat_seconds
                if self._spool.status().trouble:
                    await asyncio.to_thread(self._spool.settle)
            for request in self._link.news():
                await _write(call, request)
            await self._send_results(call)
            done = not self.in_flight and self._spool.status().pending
            if done and await asyncio.to_thread(self._spool.outgoing_id) != self.spool_id:
                return
            until = beat_at
            if self.in_flight:
                waiting_since = max(self._answered_at, next(iter(self.in_flight.values()))[1])
                until = min(until, waiting_since + self._pace.answer_seconds)
                if self._link.now() >= waiting_since + self._pace.answer_seconds:
                    raise _Broken(f"no acknowledgement came within {self._pace.answer_seconds:g} s")
            await _within(self._link.wake.wait(), until - self._link.now())

    async def _send_results(self, call: _Call) -> None:
        """Sends results as far as there are any and the window is open."""
        while self._spool.status().pending and (
            not self.in_flight
            or (
                len(self.in_flight) < self._link.in_flight_results
                and self._in_flight_bytes < self._pace.in_flight_bytes
            )
        ):
            request = await asyncio.to_thread(self._next_request)
            if request is None:
                return
            sequence, size_bytes = request.result.sequence, request.ByteSize()
            self._sent_through = sequence
            self.in_flight[sequence] = (size_bytes, self._link.now())
            self._in_flight_bytes += size_bytes
            await _write(call, request)

    def _next_request(self) -> collector_pb2.ReportRequest | None:
        """The next result to send, read from the disk."""
        while (record := self._spool.next_after(self._sent_through, self.spool_id)) is not None:
            try:
                result = result_pb2.RunResult.FromString(record.payload)
            except DecodeError as error:
                self._spool.reject(record.spool_id, record.sequence, f"it is no RunResult: {error}")
                continue
            return collector_pb2.ReportRequest(
                result=collector_pb2.SpooledResult(
                    spool_id=record.spool_id, sequence=record.sequence, result=result
                )
            )
        return None


class _Broken(Exception):
    """The stream is of no more use; the message says why."""


async def _within(work: Coroutine[object, object, _T], seconds: float) -> _T | None:
    """What the work returns; None when it took too long.

    Not asyncio.wait_for: before Python 3.12 that one can swallow a cancellation (python/cpython#86296).
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task], timeout=max(0.0, seconds))
        return task.result() if task.done() else None
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _write(call: _Call, request: collector_pb2.ReportRequest) -> None:
    try:
        await call.write(request)
    except asyncio.InvalidStateError as error:
        raise _Broken("the collector ended the stream") from error


async def _response(call: _Call) -> collector_pb2.ReportResponse:
    response = await call.read()
    if response is grpc.aio.EOF:
        raise _Broken("the collector ended the stream")
    assert isinstance(response, collector_pb2.ReportResponse)
    return response
