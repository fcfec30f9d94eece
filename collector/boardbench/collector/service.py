"""The gRPC face of the collector: wire in, call, wire out.

A result is acknowledged only after the store has committed it. Results of a stream are handed to the
store in their order and acknowledged in their order, a bounded number at a time, so that a fast sender
waits in its own memory and not in ours.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable
from typing import Any, NamedTuple

import grpc
from google.protobuf.message import DecodeError, Message
from google.protobuf.message_factory import GetMessageClass

from boardbench.collector.config import CollectorConfig
from boardbench.collector.dispatch import Desk, Dispatcher
from boardbench.collector.errors import (
    Ambiguous,
    CollectorError,
    IdentityTaken,
    InvalidRequest,
    NoRoom,
    NotAllowed,
    NotFound,
    Occupied,
    OutOfOrder,
    PlaceTaken,
    ResultRefused,
    ShuttingDown,
    SilentAgent,
    StoreDamaged,
    StoreError,
    Superseded,
)
from boardbench.collector.fleet import Fleet, Session
from boardbench.collector.look import ReadModel
from boardbench.collector.protowire import read_varint
from boardbench.collector.store import MAX_SEQUENCE, ResultStore, check_identity
from boardbench.collector.stores.enrolments import Enrolments
from boardbench.collector.updates import UpdateDesk, Updater
from boardbench.v1 import collector_pb2, collector_pb2_grpc, result_pb2

_log = logging.getLogger(__name__)

SERVICE_NAME = collector_pb2.DESCRIPTOR.services_by_name["CollectorService"].full_name

KEY_METADATA = "boardbench-device-key"
"""Where a board shows the key that it was enrolled with."""

_MAX_HELLO_BYTES = 256 * 1024
"""A hello is kept for every board and read at every scrape: real ones have 2 KiB."""

_MAX_HEARTBEAT_BYTES = 4096
"""The last one of every board is kept in memory: real ones have some hundred bytes."""

_MAX_REPORT_BYTES = 4096
"""What a board says of a job: real ones have 60 bytes, and a reason at times."""

_TOGETHER = 8
"""One acknowledgement is for so many results, where more are on their way: half of what agents send ahead."""

_TOGETHER_SECONDS = 0.05
"""How long a committed result may wait for those: a message costs as much as the result."""

_STATUS: tuple[tuple[type[CollectorError], grpc.StatusCode], ...] = (
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (NotAllowed, grpc.StatusCode.PERMISSION_DENIED),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (Ambiguous, grpc.StatusCode.INVALID_ARGUMENT),
    (Occupied, grpc.StatusCode.FAILED_PRECONDITION),
    (NoRoom, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (IdentityTaken, grpc.StatusCode.ALREADY_EXISTS),
    (Superseded, grpc.StatusCode.ABORTED),
    (SilentAgent, grpc.StatusCode.DEADLINE_EXCEEDED),
    (ShuttingDown, grpc.StatusCode.UNAVAILABLE),
    (OutOfOrder, grpc.StatusCode.ABORTED),
    (StoreDamaged, grpc.StatusCode.DATA_LOSS),
    (StoreError, grpc.StatusCode.UNAVAILABLE),
)
"""What a caller is told, the first match counts. UNAVAILABLE and ABORTED mean: connect again and go on."""


_GONE = "ExecuteBatchError"
"""What gRPC raises, and exports no class for, when the connection broke while a message was written."""


@contextlib.asynccontextmanager
async def answering(context: Any) -> AsyncIterator[None]:
    """Turns the collector's errors into a status; the one place where that is done."""
    try:
        yield
    except CollectorError as error:
        code = next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
        await context.abort(code, str(error))
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception as error:
        if type(error).__name__ == _GONE:
            return
        _log.exception("a call from %s failed", context.peer())
        await context.abort(grpc.StatusCode.INTERNAL, "the collector failed; its log says how")


def add_service(service: CollectorService, server: grpc.aio.Server) -> None:
    """Has the server answer with the service."""
    handlers = {}
    for method in collector_pb2.DESCRIPTOR.services_by_name["CollectorService"].methods:
        # What the generated code does, but for reports: it would parse each result for its message, and a
        # bad one would end the stream.
        streams = method.client_streaming and method.server_streaming
        make = grpc.stream_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
        handlers[method.name] = make(
            getattr(service, method.name),
            request_deserializer=_request if streams else GetMessageClass(method.input_type).FromString,
            response_serializer=GetMessageClass(method.output_type).SerializeToString,
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE_NAME, handlers),))


class CollectorService(collector_pb2_grpc.CollectorServiceServicer):
    """``boardbench.v1.CollectorService``."""

    def __init__(
        self,
        config: CollectorConfig,
        store: ResultStore,
        fleet: Fleet,
        look: ReadModel,
        *,
        version: str,
        dispatcher: Dispatcher,
        enrolments: Enrolments | None = None,
        updater: Updater | None = None,
    ) -> None:
        """Without ``enrolments`` no board can be enrolled, and every board may report."""
        self._updater = updater
        self._enrolments = enrolments
        self._dispatcher = dispatcher
        self._config = config
        self._store = store
        self._fleet = fleet
        self._look = look
        self._version = version

    # grpc.aio also takes a coroutine that reads and writes through the context; the stub does not know.
    async def Report(  # type: ignore[override]
        self, _requests: object, context: _Context
    ) -> None:
        """Takes a board's results; see collector.proto."""
        async with answering(context):
            hello = await self._hello(context)
            await self.admit(hello.board.device_id, context)
            await self._fleet.check_elsewhere(context.peer(), hello)
            session = self._fleet.join(hello.board.device_id, context.peer(), hello)
            wire = _Wire(context)
            desk = None
            updates = None
            try:
                await self._store.greet(hello, session.last_seen_at)
                welcome = collector_pb2.Welcome(
                    collector_version=self._version,
                    acknowledged_sequence=await self._store.acknowledged(
                        hello.board.device_id, hello.spool_id
                    ),
                    heartbeat_seconds=self._config.heartbeat_seconds,
                )
                await wire.send(collector_pb2.ReportResponse(welcome=welcome))
                desk = self._dispatcher.attach(hello, wire.send)
                if self._updater is not None:
                    updates = self._updater.attach(session.device_id, wire.send)
                conversation = _Conversation(
                    self._config, self._store, self._fleet, session, context, wire, desk, updates
                )
                # Kilobytes that nobody needs while the stream is open.
                del hello, welcome
                await conversation.run()
            finally:
                if updates is not None:
                    await updates.close()
                if desk is not None:
                    await desk.close()
                self._fleet.leave(session)

    async def Enroll(
        self, request: collector_pb2.EnrollRequest, context: _Context
    ) -> collector_pb2.EnrollResponse:
        """Takes a token and gives a key."""
        async with answering(context):
            if self._enrolments is None:
                raise InvalidRequest("this collector enrols no boards")
            try:
                check_identity("board.device_id", request.board.device_id)
                if request.instance_id:
                    check_identity("instance_id", request.instance_id)
            except ValueError as error:
                raise InvalidRequest(str(error)) from error
            key, labels = await self._enrolments.enroll(
                request.token, request.board.device_id, request.instance_id
            )
            _log.info("board %s was enrolled from %s", request.board.device_id, context.peer())
            return collector_pb2.EnrollResponse(device_key=key, labels=labels)

    async def admit(self, device_id: str, context: Any) -> None:
        """Returns when the board may report; NotAllowed when not."""
        if self._enrolments is None:
            return
        shown = dict(context.invocation_metadata() or ())
        key = shown.get(KEY_METADATA, "")
        await self._enrolments.check(device_id, str(key), required=self._config.require_enrolment)

    async def ListDevices(
        self, request: collector_pb2.ListDevicesRequest, context: _Context
    ) -> collector_pb2.ListDevicesResponse:
        """Boards that have reported."""
        async with answering(context):
            return collector_pb2.ListDevicesResponse(devices=await self._look.devices(request.on))

    async def ListResults(
        self, request: collector_pb2.ListResultsRequest, context: _Context
    ) -> collector_pb2.ListResultsResponse:
        """Results, the latest first."""
        async with answering(context):
            return await self._look.results(request)

    async def GetResult(
        self, request: collector_pb2.GetResultRequest, context: _Context
    ) -> collector_pb2.GetResultResponse:
        """One result, whole."""
        async with answering(context):
            return collector_pb2.GetResultResponse(result=await self._look.result(request.run_id))

    async def _hello(self, context: _Context) -> collector_pb2.Hello:
        """Returns the hello that the stream begins with; InvalidRequest when it does not."""
        try:
            request = await asyncio.wait_for(_receive(context), self._config.silence_seconds)
        except asyncio.TimeoutError:
            raise SilentAgent(f"no hello came within {self._config.silence_seconds:.0f} s") from None
        if not isinstance(request, collector_pb2.ReportRequest) or request.WhichOneof("request") != "hello":
            raise InvalidRequest("the first message of a report must be a hello")
        hello = request.hello
        try:
            check_identity("the hello's board.device_id", hello.board.device_id)
            check_identity("the hello's spool_id", hello.spool_id)
        except ValueError as error:
            raise InvalidRequest(str(error)) from error
        _check_size(f"the hello of device {hello.board.device_id}", hello, _MAX_HELLO_BYTES)
        return hello


class _Spooled(NamedTuple):
    """A result on its way in, as the bytes that it came in."""

    spool_id: str
    sequence: int
    content: bytes


class _Waiting(NamedTuple):
    """A result that was handed over and is not answered yet."""

    spool_id: str
    sequence: int
    size_bytes: int
    outcome: asyncio.Future[bool]
    came_at: float
    """Monotonic seconds."""


class _Wire:
    """The way to the agent, for several tasks: gRPC takes one message at a time."""

    __slots__ = ("_context", "_lock")

    def __init__(self, context: _Context) -> None:
        self._context = context
        self._lock = asyncio.Lock()

    async def send(self, response: collector_pb2.ReportResponse) -> None:
        """Returns once the message was handed to the connection."""
        async with self._lock:
            await self._context.write(response)


class _Conversation:
    """A stream after its hello: one task reads, one answers, both bounded by the same window.

    There are as many as boards, and most have nothing to say: what is needed only then is made only then.
    """

    __slots__ = (
        "_came",
        "_committed",
        "_config",
        "_context",
        "_copied",
        "_desk",
        "_due",
        "_fleet",
        "_handed_over",
        "_loop",
        "_no_more",
        "_session",
        "_store",
        "_timer",
        "_unanswered",
        "_updates",
        "_waiting",
        "_waiting_bytes",
        "_watched",
        "_went",
        "_wire",
    )

    def __init__(
        self,
        config: CollectorConfig,
        store: ResultStore,
        fleet: Fleet,
        session: Session,
        context: _Context,
        wire: _Wire,
        desk: Desk,
        updates: UpdateDesk | None,
    ) -> None:
        self._updates = updates
        self._wire = wire
        self._desk = desk
        self._copied: frozenset[str] = frozenset()
        self._config = config
        self._store = store
        self._fleet = fleet
        self._session = session
        self._context = context
        self._loop = asyncio.get_running_loop()
        # Not a deque: one without anything in it has 700 bytes.
        self._waiting: list[_Waiting] = []
        self._waiting_bytes = 0
        self._watched: asyncio.Future[bool] | None = None
        """What wakes the answering when it is done."""
        self._came: asyncio.Future[None] | None = None
        self._went: asyncio.Future[None] | None = None
        self._no_more = False
        self._handed_over: dict[str, int] = {}
        self._committed: _Waiting | None = None
        """The last that was committed and is not acknowledged yet."""
        self._unanswered: tuple[float, ...] = ()
        """When each of those came; the acknowledgement of the last is one for all of them."""
        self._due = False
        """Whether they have waited long enough for others."""
        self._timer: asyncio.TimerHandle | None = None

    async def run(self) -> None:
        """Returns when the agent has ended the stream and has every answer; raises why it ended otherwise."""
        reader = asyncio.create_task(self._read())
        answerer = asyncio.create_task(self._answer())
        ended = self._session.ended
        try:
            await asyncio.wait((reader, answerer, ended), return_when=asyncio.FIRST_COMPLETED)
            # What was handed over will be committed: the agent should know, as far as it still listens.
            reader.cancel()
            self._no_more = True
            self._wake()
            await asyncio.wait((answerer, ended), return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                await asyncio.wait((answerer,), timeout=self._config.drain_seconds)
            if answerer.done():
                answerer.result()
            if ended.done():
                raise ended.result()
            await reader
        finally:
            for task in (reader, answerer):
                task.cancel()
            await asyncio.gather(reader, answerer, return_exceptions=True)
            if self._timer is not None:
                self._timer.cancel()
            for entry in self._waiting:
                entry.outcome.add_done_callback(self._count)

    async def _read(self) -> None:
        """Hands results to the store in their order, until the agent ends the stream."""
        while (request := await _receive(self._context)) is not None:
            if isinstance(request, _Spooled):
                self._fleet.heard(self._session)
                await self._take(request)
            else:
                self._listen(request)
            # While the next one is waited for, nobody needs it.
            del request

    def _listen(self, request: collector_pb2.ReportRequest) -> None:
        """Takes what is no result."""
        kind = request.WhichOneof("request")
        if kind == "heartbeat":
            _check_size("a heartbeat", request.heartbeat, _MAX_HEARTBEAT_BYTES)
            self._fleet.heard(self._session, request.heartbeat)
            self._desk.heartbeat(request.heartbeat)
        elif kind == "job":
            _check_size("what a board says of a job", request.job, _MAX_REPORT_BYTES)
            self._fleet.heard(self._session)
            self._desk.report(request.job)
        elif kind == "update":
            _check_size("what a board says of an update", request.update, _MAX_REPORT_BYTES)
            self._fleet.heard(self._session)
            if self._updates is not None:
                self._updates.report(request.update)
        elif kind == "hello":
            raise InvalidRequest("a report has one hello, at its beginning")
        # Anything else is from a newer agent: what it means can't be known, that it lives can.
        else:
            self._fleet.heard(self._session)

    async def _take(self, spooled: _Spooled) -> None:
        spool_id, sequence, content = spooled
        if spool_id in self._copied:
            # The agent was asked for a new identity of this spool, and sends it again under that.
            return
        size = len(content)
        came_at = time.monotonic()
        while len(self._waiting) >= self._config.in_flight_results or (
            self._waiting and self._waiting_bytes + size > self._config.in_flight_bytes
        ):
            self._went = self._loop.create_future()
            await self._held_up(self._went)
        while self._store.is_crowded:
            await self._held_up(self._store.room())
        try:
            _check_place(spool_id, sequence)
            outcome = self._store.append(
                self._session.device_id,
                spool_id,
                sequence,
                _parsed(content),
                after=self._handed_over.get(spool_id, 0),
                content=content,
            )
            self._handed_over[spool_id] = sequence
        except ResultRefused as refusal:
            outcome = self._loop.create_future()
            outcome.set_exception(refusal)
        if not self._waiting:
            self._watch(outcome)
        self._waiting.append(_Waiting(spool_id, sequence, size, outcome, came_at))
        self._waiting_bytes += size

    async def _held_up(self, until: Awaitable[None]) -> None:
        """Waits; meanwhile nothing is read, which is not the board's silence."""
        self._session.held_up = True
        await until
        self._session.held_up = False
        self._fleet.heard(self._session)

    def _watch(self, outcome: asyncio.Future[bool]) -> None:
        """Has the answering woken when this one is done: what is behind it has to wait for it anyway."""
        if outcome is not self._watched:
            self._watched = outcome
            outcome.add_done_callback(self._wake)

    def _wake(self, _outcome: object = None) -> None:
        if self._came is not None and not self._came.done():
            self._came.set_result(None)

    def _ring(self) -> None:
        """What is held back has waited long enough."""
        self._timer = None
        self._due = True
        self._wake()

    async def _answer(self) -> None:
        """Acknowledges in order what was committed; one message may answer for many results."""
        while True:
            while self._waiting and self._waiting[0].outcome.done():
                await self._settle(self._waiting[0])
            if self._committed is not None:
                if not self._waiting or len(self._unanswered) >= _TOGETHER or self._due:
                    await self._acknowledge()
                    continue
                if self._timer is None:
                    self._timer = self._loop.call_later(_TOGETHER_SECONDS, self._ring)
            if self._waiting:
                self._watch(self._waiting[0].outcome)
            elif self._no_more:
                return
            self._came = self._loop.create_future()
            await self._came

    async def _settle(self, entry: _Waiting) -> None:
        """Deals with the first of those that wait, whose outcome is known."""
        error = entry.outcome.exception()
        if self._committed is not None and (error is not None or self._committed.spool_id != entry.spool_id):
            await self._acknowledge()
        if error is None:
            # What came behind a place that was taken is stored, and the place is not: it is sent
            # again under another name, and known by its run.
            if entry.spool_id not in self._copied:
                self._committed = entry
                self._unanswered += (entry.came_at,)
        elif isinstance(error, ResultRefused):
            await self._refuse(entry, error)
        elif isinstance(error, PlaceTaken):
            await self._renew(entry, error)
        else:
            raise error
        del self._waiting[0]
        self._waiting_bytes -= entry.size_bytes
        self._count(entry.outcome)
        if self._went is not None and not self._went.done():
            self._went.set_result(None)

    def _count(self, outcome: asyncio.Future[bool]) -> None:
        """Counts what became of a result, told to its agent or not."""
        tally, error = self._fleet.tally, outcome.exception()
        if error is None:
            if outcome.result():
                tally.stored += 1
            else:
                tally.duplicates += 1
        elif isinstance(error, ResultRefused):
            tally.refused[error.code] += 1
        elif isinstance(error, PlaceTaken):
            pass
        else:
            tally.store_failures += 1

    async def _acknowledge(self) -> None:
        """Tells of all that is committed."""
        entry, came, self._committed, self._unanswered = self._committed, self._unanswered, None, ()
        self._due = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if entry is not None:
            acknowledgement = collector_pb2.Acknowledgement(spool_id=entry.spool_id, sequence=entry.sequence)
            await self._wire.send(collector_pb2.ReportResponse(acknowledgement=acknowledgement))
            now = time.monotonic()
            for came_at in came:
                self._fleet.tally.acknowledge.add(now - came_at)

    async def _renew(self, entry: _Waiting, error: PlaceTaken) -> None:
        """Asks for a new identity of the spool, once: what follows under the old one is not taken."""
        if entry.spool_id in self._copied:
            return
        self._copied |= {entry.spool_id}
        self._fleet.tally.renewals += 1
        _log.warning("%s", error)
        renewal = collector_pb2.Renewal(spool_id=entry.spool_id, sequence=entry.sequence)
        await self._wire.send(collector_pb2.ReportResponse(renewal=renewal))

    async def _refuse(self, entry: _Waiting, refusal: ResultRefused) -> None:
        _log.warning(
            "device %s, spool %s, sequence %d: refused: %s",
            self._session.device_id,
            entry.spool_id,
            entry.sequence,
            refusal,
        )
        rejection = collector_pb2.Rejection(
            spool_id=entry.spool_id, sequence=entry.sequence, reason=str(refusal)
        )
        await self._wire.send(collector_pb2.ReportResponse(rejection=rejection))


async def _receive(context: _Context) -> collector_pb2.ReportRequest | _Spooled | None:
    """Returns the agent's next message, None at the end of the stream."""
    request: Any = await context.read()
    return None if request is grpc.aio.EOF else request


def _parsed(content: bytes) -> result_pb2.RunResult:
    try:
        return result_pb2.RunResult.FromString(content)
    except DecodeError as error:
        raise ResultRefused("unreadable", f"it is no RunResult: {error}") from error


def _check_size(what: str, message: Message, most: int) -> None:
    size = message.ByteSize()
    if size > most:
        raise InvalidRequest(f"{what} has {size:,} bytes; at most {most:,} are taken")


def _check_place(spool_id: str, sequence: int) -> None:
    try:
        check_identity("spool_id", spool_id)
    except ValueError as error:
        raise ResultRefused("place", str(error)) from error
    if not 1 <= sequence <= MAX_SEQUENCE:
        raise ResultRefused("place", f"{sequence} is no place in a spool; they count from 1")


def _request(message: bytes) -> collector_pb2.ReportRequest | _Spooled:
    """Returns what the message of an agent says; a result as its bytes, which are kept as they are.

    One that can't be parsed is no reason to end the stream, on which it would come again for ever.
    """
    try:
        spooled = _spooled(message)
    except (IndexError, UnicodeDecodeError):
        spooled = None
    if spooled is not None:
        return spooled
    request = collector_pb2.ReportRequest.FromString(message)
    if request.WhichOneof("request") != "result":
        return request
    result = request.result
    return _Spooled(result.spool_id, result.sequence, result.result.SerializeToString())


_RESULT_TAG = collector_pb2.ReportRequest.RESULT_FIELD_NUMBER << 3 | 2
_SPOOL_ID_TAG = collector_pb2.SpooledResult.SPOOL_ID_FIELD_NUMBER << 3 | 2
_SEQUENCE_TAG = collector_pb2.SpooledResult.SEQUENCE_FIELD_NUMBER << 3
_CONTENT_TAG = collector_pb2.SpooledResult.RESULT_FIELD_NUMBER << 3 | 2


def _spooled(message: bytes) -> _Spooled | None:
    """Returns the result of a message that is written as every protobuf library writes one; None: it is not.

    Fields in their order, each once, as https://protobuf.dev/programming-guides/encoding/ has them.
    """
    if message[0] != _RESULT_TAG:
        return None
    size, at = read_varint(message, 1)
    if at + size != len(message) or message[at] != _SPOOL_ID_TAG:
        return None
    size, at = read_varint(message, at + 1)
    begin, at = at, at + size
    spool_id = message[begin:at].decode()
    if message[at] != _SEQUENCE_TAG:
        return None
    sequence, at = read_varint(message, at + 1)
    if message[at] != _CONTENT_TAG:
        return None
    size, at = read_varint(message, at + 1)
    return _Spooled(spool_id, sequence, message[at:]) if at + size == len(message) else None


_Context = grpc.aio.ServicerContext[collector_pb2.ReportRequest, collector_pb2.ReportResponse]
