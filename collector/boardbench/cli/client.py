"""Boards and the collector, as calls: the one place where channels are made and gRPC's errors end.

Every method raises only :class:`~boardbench.cli.errors.CliError` and its kinds. A client may be used
by several threads; ``stop`` from any of them ends what is waiting with ``Interrupted``.
"""

from __future__ import annotations

import contextlib
import datetime
import queue
import random
import threading
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from types import TracebackType
from typing import Any, NoReturn, Protocol, TypeVar

import grpc

from boardbench.cli.address import AGENT_PORT, COLLECTOR_PORT, Address
from boardbench.cli.errors import CliError, Interrupted, Refused, RunLost, Unreachable
from boardbench.cli.source import Source
from boardbench.inspect import tls
from boardbench.v1 import (
    agent_pb2,
    agent_pb2_grpc,
    collector_pb2,
    collector_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    result_pb2,
    update_pb2,
    update_pb2_grpc,
)

CONNECT_SECONDS = 10  # a board on a busy Wi-Fi answers in 1 or 2 s; gRPC's own 20 s look like a hang
CALL_SECONDS = 30.0  # a question that moves no files; a Pi Zero under load needs several seconds
EXAMINE_SECONDS = 300.0  # a Jetson's own programs set its clocks, and engines may be asked for the first time
STALL_SECONDS = 120.0  # the fsync of a 1 GB model on a slow SD card (10 MB/s) takes 100 s
RETRY_SECONDS = 60.0  # long enough for a board to restart its agent, or to come back to its Wi-Fi
CORRUPT_TRIES = 3  # a chunk that arrives broken more often than this is no accident of the network
_FIRST_WAIT_SECONDS = 0.1
_LONGEST_WAIT_SECONDS = 5.0
_BUSY_WAIT_SECONDS = 1.0
_jitter = random.SystemRandom()

_CHANNEL_OPTIONS: tuple[tuple[str, Any], ...] = (
    # Boards are in the local network, where a proxy from the environment doesn't lead.
    ("grpc.enable_http_proxy", 0),
    # A connection attempt may take this long (the name is misleading; see gRPC's connection-backoff.md).
    ("grpc.min_reconnect_backoff_ms", CONNECT_SECONDS * 1000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
    # A board that lost its power sends no FIN: without pings a run on it would be awaited for ever.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.http2.max_pings_without_data", 0),
    # A result holds every sample: a million inferences are 5 MB.
    ("grpc.max_receive_message_length", 256 << 20),
)

_T = TypeVar("_T")
_Request = TypeVar("_Request", contravariant=True)
_Response = TypeVar("_Response", covariant=True)


class _Unary(Protocol[_Request, _Response]):
    def __call__(self, request: _Request, timeout: float | None = None) -> _Response: ...


def open_channel(address: Address) -> grpc.Channel:
    """A channel to a board or collector; it connects with its first call."""
    if not address.tls:
        return grpc.insecure_channel(address.target, options=_CHANNEL_OPTIONS)
    try:
        trusted = tls.read_authorities(address.ca) if address.ca else tls.system_authorities()
    except ValueError as error:
        raise CliError(str(error)) from error
    credentials = grpc.ssl_channel_credentials(trusted)
    return grpc.secure_channel(address.target, credentials, options=_CHANNEL_OPTIONS)


class Client:
    """What a client of a board and one of the collector have in common."""

    program = "boardbench-agent"
    flag = "--listen"
    noun = "agent"
    port = AGENT_PORT

    def __init__(self, address: Address) -> None:
        """Connects nothing yet."""
        self.address = address
        self._channel = open_channel(address)

    def close(self) -> None:
        """Ends every call and the connection. Idempotent."""
        self._channel.close()

    def __enter__(self: _T) -> _T:
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def _ask(
        self, method: _Unary[_Request, _Response], request: _Request, seconds: float | None = None
    ) -> _Response:
        try:
            return method(request, timeout=CALL_SECONDS if seconds is None else seconds)
        except grpc.RpcError as error:
            raise self._told(error, seconds) from error

    def _told(self, error: grpc.RpcError, seconds: float | None = None) -> CliError:
        """What a person should know about ``error``."""
        code, details = _code(error), _details(error)
        if code == grpc.StatusCode.UNAVAILABLE:
            return Unreachable(self._unavailable(details))
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return Unreachable(
                f"{self.address} took the connection and gave no answer within "
                f"{CALL_SECONDS if seconds is None else seconds:.0f} s: "
                f"is it overloaded, or is something else than {self.program} listening there?"
            )
        if code == grpc.StatusCode.UNIMPLEMENTED or _is_other_protocol(details):
            return Unreachable(
                f"{self.address} answers, but not as a {self.program}: {self.noun}s listen on port "
                f"{self.port} by default; look at the address, and at the versions on both sides"
                + (f" ({details})" if details else "")
            )
        if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
            return Refused(
                f"{self.address} failed on it: {details or code.name}; the log of {self.program} says more"
            )
        if code == grpc.StatusCode.CANCELLED:
            return Unreachable(f"{self.address} ended the call: {details or 'it is being stopped'}")
        return Refused(f"{self.address}: {details or code.name.lower().replace('_', ' ')}")

    def _unavailable(self, details: str) -> str:
        low = details.lower()
        advice = tls.advice(details, tls=self.address.tls, option="--ca FILE")
        if advice and self.address.tls:
            return f"the connection to {self.address} failed: {advice} ({details})"
        if "resolv" in low or "lookup" in low or "dns" in low:
            return (
                f"the name {self.address.host!r} is not known: look at its spelling, or give the IP address"
                + (
                    " (a .local name needs mDNS: avahi or systemd-resolved on this machine)"
                    if self.address.host.endswith(".local")
                    else ""
                )
            )
        if "refused" in low:
            where = (
                f"start it with `{self.program} serve`"
                if self.address.is_loopback
                else f"is {self.program} running there, and started with "
                f"`{self.flag} 0.0.0.0:{self.address.port}`? By default only its own machine may connect"
            )
            return f"no {self.noun} listens on {self.address} (connection refused): {where}"
        if _is_other_protocol(low):
            return (
                f"{self.address} answers, but does not speak gRPC: "
                f"{self.noun}s listen on port {self.port} by default"
            )
        if any(word in low for word in ("timed out", "timeout", "deadline", "unreachable", "no route")):
            return (
                f"{self.address} does not answer: is it on, is this its address, "
                f"and does no firewall block port {self.address.port}? ({details})"
            )
        # Boards themselves have no certificates.
        hint = f"; {advice}" if advice and self.port == COLLECTOR_PORT else ""
        return f"the connection to {self.address} failed: {details or 'unavailable'}{hint}"


class LongClient(Client):
    """A client whose calls last, and are taken up again when the connection breaks."""

    def __init__(
        self,
        address: Address,
        *,
        retry_seconds: float = RETRY_SECONDS,
        notice: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Connects nothing yet.

        ``notice`` is told, once an outage, that the connection is lost; a call gives up when it has
        had no success for ``retry_seconds``.
        """
        super().__init__(address)
        self._retry_seconds = retry_seconds
        self._notice = notice
        self._stopped = threading.Event()
        self._calls: set[grpc.Call] = set()
        self._calls_lock = threading.Lock()
        self._answered = False

    def stop(self) -> None:
        """Ends what any thread waits for here with ``Interrupted``. Runs go on."""
        self._stopped.set()
        with self._calls_lock:
            calls = list(self._calls)
        for call in calls:
            call.cancel()

    def _send(
        self,
        method: Callable[[Iterator[Any]], Any],
        message: type[agent_pb2.PushModelRequest] | type[job_pb2.SendFileRequest],
        source: Source,
        kind: agent_pb2.FileKind.ValueType,
        on_sent: Callable[[int], None],
    ) -> agent_pb2.PushDone:
        retry = _Retry(self, f"sending {source.name}")
        corrupt = 0
        while True:
            push = _Push(message, source, kind, on_sent, self.noun)
            try:
                with self._started(method(push.requests())) as call, push.watched(call):
                    return push.answered(call, self._heard, retry.progressed)
            except grpc.RpcError as error:
                if push.failure:
                    raise push.failure from error
                if push.stalled:
                    raise Unreachable(
                        f"{self.address} took nothing of {source.name} for {STALL_SECONDS:.0f} s: is it "
                        "overloaded, or its storage broken? Push it again: it goes on where it stopped"
                    ) from error
                told = self._broken_or_raise(error, source)
                corrupt += _code(error) == grpc.StatusCode.DATA_LOSS
                if corrupt >= CORRUPT_TRIES:
                    raise Refused(
                        f"{told}; that was try {corrupt}: is the network or its driver broken?"
                    ) from error
                # Another client sends the same file now: let it finish, instead of taking it over in turn.
                busy = _code(error) == grpc.StatusCode.ABORTED
                retry.after(told, least_seconds=_BUSY_WAIT_SECONDS if busy else 0.0)
            except _EndedEarly:
                retry.after(Unreachable(f"{self.address} ended the call before it had the whole file"))
            finally:
                push.close()

    def _broken_or_raise(self, error: grpc.RpcError, source: Source | None = None) -> CliError:
        """What happened, when another try can help; else raises it."""
        told = self._told(error)
        if self._stopped.is_set():
            raise Interrupted("interrupted") from error
        if source is not None and _code(error) in _BAD_CONTENT and source.changed():
            raise CliError(
                f"{source.path} was changed while it was sent: push it again when it is complete"
            ) from error
        if _code(error) in (grpc.StatusCode.DATA_LOSS, grpc.StatusCode.ABORTED):
            self._answered = True  # these are the agent's own words
        elif not (self._answered and _is_broken_connection(error)):
            raise told from error
        return told

    def _heard(self) -> None:
        self._answered = True

    @contextlib.contextmanager
    def _started(self, call: Any) -> Iterator[Any]:
        """Ends ``call`` in any case, and lets ``stop`` reach it."""
        with self._calls_lock:
            self._calls.add(call)
        try:
            if self._stopped.is_set():
                raise Interrupted("interrupted")
            yield call
        finally:
            with self._calls_lock:
                self._calls.discard(call)
            call.cancel()

    def wait(self, seconds: float) -> None:
        """Returns after this time; ``stop`` makes it raise ``Interrupted``."""
        if self._stopped.wait(seconds):
            raise Interrupted("interrupted")

    def tell_outage(self, doing: str, error: CliError) -> None:
        """Passes on that ``doing`` was broken off and is being tried again."""
        self._notice(f"{doing}: {error}. Trying again")

    def give_up_after_seconds(self) -> float:
        """Time without success after which a repeat gives up; zero before the board has ever answered."""
        return self._retry_seconds if self._answered else 0.0


class AgentClient(LongClient):
    """A board."""

    def __init__(
        self,
        address: Address,
        *,
        retry_seconds: float = RETRY_SECONDS,
        notice: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Connects nothing yet; see :class:`LongClient`."""
        super().__init__(address, retry_seconds=retry_seconds, notice=notice)
        self._stub: agent_pb2_grpc.AgentServiceStub = agent_pb2_grpc.AgentServiceStub(self._channel)

    def describe(self) -> agent_pb2.DescribeResponse:
        """What the board is and what it can run."""
        return self._ask(self._stub.Describe, agent_pb2.DescribeRequest())

    def examine(self, request: agent_pb2.ExamineRequest) -> agent_pb2.ExamineResponse:
        """Whether the board is fit to measure on, after setting or putting back what is asked for."""
        return self._ask(self._stub.Examine, request, EXAMINE_SECONDS)

    def list_models(self) -> list[agent_pb2.StoredModel]:
        """The files that the board keeps, the one used last first."""
        return list(self._ask(self._stub.ListModels, agent_pb2.ListModelsRequest()).models)

    def delete_model(self, sha256: str) -> None:
        """Removes a file from the board."""
        self._ask(self._stub.DeleteModel, agent_pb2.DeleteModelRequest(sha256=sha256))

    def list_runs(self) -> list[agent_pb2.RunSummary]:
        """Running first, then waiting, then ended."""
        return list(self._ask(self._stub.ListRuns, agent_pb2.ListRunsRequest()).runs)

    def cancel(self, run_id: str) -> bool:
        """Ends a run; False when it had ended before."""
        return self._ask(self._stub.CancelRun, agent_pb2.CancelRunRequest(run_id=run_id)).cancelled

    def push(
        self,
        source: Source,
        kind: agent_pb2.FileKind.ValueType = agent_pb2.FILE_KIND_MODEL,
        on_sent: Callable[[int], None] = lambda _bytes: None,
    ) -> agent_pb2.PushDone:
        """The file as the board has it now. Bytes that it had are not sent; a broken connection is resumed.

        ``on_sent`` is told, from another thread, how many bytes of the file have been sent.
        """
        return self._send(self._stub.PushModel, agent_pb2.PushModelRequest, source, kind, on_sent)

    def run(self, request: agent_pb2.RunBenchmarkRequest) -> Generator[agent_pb2.RunEvent, None, None]:
        """The events of a new run, each once; the last one holds the result. Needs ``request.run_id``.

        A broken connection is taken up again: the run goes on meanwhile.
        """
        assert request.run_id, "without an id a repeat would start a second run"
        return self._follow(request.run_id, 0, lambda: self._stub.RunBenchmark(request))

    def watch(self, run_id: str, after_sequence: int = 0) -> Generator[agent_pb2.RunEvent, None, None]:
        """The events of a run that exists, each once; the last one holds the result."""
        return self._follow(run_id, after_sequence, None)

    def _follow(
        self, run_id: str, sequence: int, start: Callable[[], Any] | None
    ) -> Generator[agent_pb2.RunEvent, None, None]:
        retry = _Retry(self, f"following run {run_id}")
        while True:
            try:
                if start is not None:
                    call = start()
                else:
                    request = agent_pb2.WatchRunRequest(run_id=run_id, after_sequence=sequence)
                    call = self._stub.WatchRun(request)
                with self._started(call):
                    for response in call:
                        self._heard()
                        start = None
                        event: agent_pb2.RunEvent = response.event
                        if event.sequence <= sequence:
                            continue
                        sequence = event.sequence
                        retry.progressed()
                        yield event
                        if event.HasField("result"):
                            return
                told: CliError = Unreachable(f"{self.address} ended the call before the run ended")
            except grpc.RpcError as error:
                if _code(error) == grpc.StatusCode.NOT_FOUND and sequence > 0:
                    raise RunLost(
                        f"{self.address} no longer knows run {run_id}: its agent was restarted "
                        "in the middle of it. Run it again"
                    ) from error
                told = self._broken_or_raise(error)
            retry.after(told)


class JobsClient(LongClient):
    """The collector's queue of jobs, its files and its reservations."""

    program = "boardbench-collector"
    noun = "collector"
    port = COLLECTOR_PORT

    def __init__(
        self,
        address: Address,
        *,
        retry_seconds: float = RETRY_SECONDS,
        notice: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Connects nothing yet; see :class:`LongClient`."""
        super().__init__(address, retry_seconds=retry_seconds, notice=notice)
        self._stub: job_pb2_grpc.JobServiceStub = job_pb2_grpc.JobServiceStub(self._channel)

    def push(
        self,
        source: Source,
        kind: agent_pb2.FileKind.ValueType = agent_pb2.FILE_KIND_MODEL,
        on_sent: Callable[[int], None] = lambda _bytes: None,
    ) -> agent_pb2.PushDone:
        """The file as the collector has it now; as :meth:`AgentClient.push`."""
        return self._send(self._stub.SendFile, job_pb2.SendFileRequest, source, kind, on_sent)

    def submit(self, request: job_pb2.SubmitJobsRequest) -> list[job_pb2.Job]:
        """The jobs of the request, one a board. Needs ``request.request_id``, and asks again with it."""
        assert request.request_id, "without an id a repeat would queue the jobs twice"
        return list(self._again("queueing the jobs", lambda: self._ask(self._stub.SubmitJobs, request)).jobs)

    def jobs(self, wanted: job_pb2.JobFilter, limit: int = 1 << 30) -> Iterator[job_pb2.Job]:
        """At most ``limit`` jobs, the latest first, fetched page by page."""
        request = job_pb2.ListJobsRequest(filter=wanted)
        while limit > 0:
            request.page_size = min(500, limit)
            response = self._ask(self._stub.ListJobs, request)
            yield from response.jobs[:limit]
            limit -= len(response.jobs)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def watch(self, wanted: job_pb2.JobFilter) -> Generator[job_pb2.Job, None, None]:
        """Every job as it is now, then each change, until all of them have ended."""
        retry = _Retry(self, "following the jobs")
        request = job_pb2.WatchJobsRequest(filter=wanted)
        ended: dict[str, bool] = {}
        while True:
            try:
                with self._started(self._stub.WatchJobs(request)) as call:
                    for response in call:
                        self._heard()
                        retry.progressed()
                        ended[response.job.job_id] = response.job.state in ENDED_STATES
                        yield response.job
                if all(ended.values()):
                    return
                told: CliError = Unreachable(f"{self.address} ended the call before the jobs had ended")
            except grpc.RpcError as error:
                told = self._broken_or_raise(error)
            retry.after(told)

    def cancel(self, wanted: job_pb2.JobFilter) -> list[job_pb2.Job]:
        """Ends jobs, waiting or running; those that had not ended before."""
        return list(self._ask(self._stub.CancelJobs, job_pb2.CancelJobsRequest(filter=wanted)).jobs)

    def retry(self, wanted: job_pb2.JobFilter) -> list[job_pb2.Job]:
        """Queues dead jobs again; those that were dead."""
        return list(self._ask(self._stub.RetryJobs, job_pb2.RetryJobsRequest(filter=wanted)).jobs)

    def reserve(self, request: job_pb2.ReserveRequest) -> list[job_pb2.Reservation]:
        """Takes boards for one holder alone."""
        return list(self._ask(self._stub.Reserve, request).reservations)

    def release(self, request: job_pb2.ReleaseRequest) -> list[job_pb2.Reservation]:
        """Gives them back; what was given back."""
        return list(self._ask(self._stub.Release, request).reservations)

    def label(self, terms: Iterable[str], labels: dict[str, str]) -> list[str]:
        """Sets the operator's labels of boards, an empty value removes one; identities of the boards."""
        request = job_pb2.SetLabelsRequest(on=terms, labels=labels)
        return list(self._ask(self._stub.SetLabels, request).device_ids)

    def _again(self, doing: str, ask: Callable[[], _T]) -> _T:
        """What ``ask`` returns, tried again while the connection is broken; only for what may be repeated."""
        retry = _Retry(self, doing)
        while True:
            try:
                return ask()
            except Unreachable as error:
                retry.after(error)


class UpdatesClient(JobsClient):
    """The collector's updates of agents, and its files."""

    def __init__(
        self,
        address: Address,
        *,
        retry_seconds: float = RETRY_SECONDS,
        notice: Callable[[str], None] = lambda _text: None,
    ) -> None:
        """Connects nothing yet; see :class:`LongClient`."""
        super().__init__(address, retry_seconds=retry_seconds, notice=notice)
        self._updates: update_pb2_grpc.UpdateServiceStub = update_pb2_grpc.UpdateServiceStub(self._channel)

    def start(self, request: update_pb2.StartUpdateRequest) -> update_pb2.Update:
        """Begins one. Needs ``request.request_id``, and asks again with it."""
        assert request.request_id, "without an id a repeat would begin it twice"
        ask = self._updates.StartUpdate
        return self._again("beginning the update", lambda: self._ask(ask, request)).update

    def updates(self) -> list[update_pb2.Update]:
        """The latest first."""
        return list(self._ask(self._updates.ListUpdates, update_pb2.ListUpdatesRequest()).updates)

    def stop_update(self, update_id: str) -> update_pb2.Update:
        """Boards that have not begun are left as they are."""
        request = update_pb2.StopUpdateRequest(update_id=update_id)
        return self._ask(self._updates.StopUpdate, request).update

    def watch_update(self, update_id: str) -> Generator[update_pb2.Update, None, None]:
        """The update as it is now, then each change, until every board has ended it."""
        retry = _Retry(self, "following the update")
        request = update_pb2.WatchUpdateRequest(update_id=update_id)
        open_boards = True
        while True:
            try:
                with self._started(self._updates.WatchUpdate(request)) as call:
                    for response in call:
                        self._heard()
                        retry.progressed()
                        open_boards = any(
                            board.state < update_pb2.UPDATE_STATE_DONE for board in response.update.boards
                        )
                        yield response.update
                if not open_boards:
                    return
                told: CliError = Unreachable(f"{self.address} ended the call before the update had ended")
            except grpc.RpcError as error:
                told = self._broken_or_raise(error)
            retry.after(told)


ENDED_STATES = (job_pb2.JOB_STATE_DONE, job_pb2.JOB_STATE_CANCELLED, job_pb2.JOB_STATE_DEAD)
"""A job in one of these changes no more, unless a dead one is queued again."""


class CollectorClient(Client):
    """The collector."""

    program = "boardbench-collector"
    flag = "--listen"
    noun = "collector"
    port = COLLECTOR_PORT

    def __init__(self, address: Address) -> None:
        """Connects nothing yet."""
        super().__init__(address)
        self._stub: collector_pb2_grpc.CollectorServiceStub = collector_pb2_grpc.CollectorServiceStub(
            self._channel
        )

    def devices(self, terms: Iterable[str] = ()) -> list[collector_pb2.Device]:
        """Boards that have reported and meet all the terms, by their identity."""
        return list(self._ask(self._stub.ListDevices, collector_pb2.ListDevicesRequest(on=terms)).devices)

    def results(
        self,
        *,
        limit: int,
        device_id: str = "",
        model: str = "",
        runtime: str = "",
        status: result_pb2.RunStatus.ValueType = result_pb2.RUN_STATUS_UNSPECIFIED,
        since: datetime.datetime | None = None,
        summary: bool = False,
    ) -> Iterator[result_pb2.RunResult]:
        """At most ``limit`` results, the latest first, fetched page by page."""
        request = collector_pb2.ListResultsRequest(
            device_id=device_id, model=model, runtime=runtime, status=status, summary=summary
        )
        if since is not None:
            request.since.FromDatetime(since.astimezone(datetime.timezone.utc))
        # Whole results can be megabytes each, so few of them make a page.
        page = 500 if summary else 20
        while limit > 0:
            request.page_size = min(page, limit)
            response = self._ask(self._stub.ListResults, request)
            yield from response.results[:limit]
            limit -= len(response.results)
            if not response.next_page_token:
                return
            request.page_token = response.next_page_token

    def result(self, run_id: str) -> result_pb2.RunResult:
        """One result, by its id or the first digits of it."""
        return self._ask(self._stub.GetResult, collector_pb2.GetResultRequest(run_id=run_id)).result


class _EndedEarly(Exception):
    """The agent ended an upload without an error and without the last answer."""


class _Push:
    """One try at sending a file."""

    def __init__(
        self,
        message: type[agent_pb2.PushModelRequest] | type[job_pb2.SendFileRequest],
        source: Source,
        kind: agent_pb2.FileKind.ValueType,
        on_sent: Callable[[int], None],
        noun: str,
    ) -> None:
        self._message = message
        self._noun = noun
        self._source = source
        self._kind = kind
        self._on_sent = on_sent
        self._from: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._moved_at = time.monotonic()
        self._over = threading.Event()
        self._call: Any = None
        self.failure: CliError | None = None
        self.stalled = False

    def requests(self) -> Iterator[agent_pb2.PushModelRequest | job_pb2.SendFileRequest]:
        """Header, then, when told where to go on, the chunks; gRPC takes them in a thread of its own."""
        source = self._source
        yield self._message(
            header=agent_pb2.PushHeader(
                sha256=source.sha256, name=source.name, size_bytes=source.size_bytes, kind=self._kind
            )
        )
        offset = self._from.get()
        if offset is None:
            return
        try:
            for at, data in source.chunks(offset):
                yield self._message(
                    chunk=agent_pb2.PushChunk(offset_bytes=at, data=data, crc32=zlib.crc32(data))
                )
                self._moved_at = time.monotonic()
                self._on_sent(at + len(data))
        except CliError as error:
            self.failure = error
            self._call.cancel()

    def answered(
        self,
        call: Iterable[agent_pb2.PushModelResponse | job_pb2.SendFileResponse],
        heard: Callable[[], None],
        progressed: Callable[[int], None],
    ) -> agent_pb2.PushDone:
        """The agent's last answer. Raises grpc.RpcError, _EndedEarly."""
        begun = False
        for response in call:
            heard()
            self._moved_at = time.monotonic()
            if response.HasField("done"):
                if begun:
                    # The answer can be here before the sending thread has come to say so of the last chunk.
                    self._on_sent(self._source.size_bytes)
                return response.done
            offset = response.resume.offset_bytes
            if not 0 <= offset <= self._source.size_bytes:
                raise Refused(
                    f"the {self._noun} asks for byte {offset} of {self._source.name}, which has "
                    f"{self._source.size_bytes}: a defect of the {self._noun}; look at its version"
                )
            progressed(offset)
            self._on_sent(offset)
            begun = True
            self._from.put(offset)
        raise _EndedEarly

    @contextlib.contextmanager
    def watched(self, call: Any) -> Iterator[None]:
        """Ends ``call`` when nothing has moved for long."""
        self._call = call

        def watch() -> None:
            while not self._over.wait(1.0):
                if time.monotonic() - self._moved_at > STALL_SECONDS:
                    self.stalled = True
                    call.cancel()
                    return

        threading.Thread(target=watch, name="push-stall", daemon=True).start()
        yield

    def close(self) -> None:
        """Lets the threads of this try end."""
        self._over.set()
        self._from.put(None)


class _Retry:
    """When to try again, and when to give up: after a time without progress, not after a count."""

    def __init__(self, client: LongClient, doing: str) -> None:
        self._client = client
        self._doing = doing
        self._furthest = -1
        self._failures = 0
        self._since: float | None = None

    def progressed(self, offset: int | None = None) -> None:
        """Forgets past failures; with ``offset`` only when it is further than ever before."""
        if offset is not None:
            if offset <= self._furthest:
                return
            self._furthest = offset
        self._failures = 0
        self._since = None

    def after(self, error: CliError, *, least_seconds: float = 0.0) -> None:
        """Waits before the next try: exponential, full jitter, on top of ``least_seconds``.

        Raises ``error`` when it is time to give up.
        """
        now = time.monotonic()
        if self._since is None:
            self._since = now
        limit = self._client.give_up_after_seconds()
        if now - self._since >= limit:
            _raise_given_up(error, limit)
        if self._failures == 0:
            self._client.tell_outage(self._doing, error)
        longest = min(_LONGEST_WAIT_SECONDS, _FIRST_WAIT_SECONDS * 2**self._failures)
        self._failures += 1
        self._client.wait(least_seconds + _jitter.uniform(0, longest))


def _raise_given_up(error: CliError, seconds: float) -> NoReturn:
    if seconds:
        raise type(error)(f"{error}; gave up after {seconds:g} s of trying") from error
    raise error


_BAD_CONTENT = (
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.FAILED_PRECONDITION,
    grpc.StatusCode.ABORTED,
)


def _is_broken_connection(error: grpc.RpcError) -> bool:
    """Whether the connection, or the agent itself, went away."""
    code, details = _code(error), _details(error)
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return True
    # A connection that breaks in the middle of a message is told in these words.
    return code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN) and (
        "RST_STREAM" in details or "Stream removed" in details
    )


def _is_other_protocol(details: str) -> bool:
    low = details.lower()
    if "failed parsing http/2" in low or "expected settings frame as the first" in low:
        return True
    return (
        "http2 header with status" in low or "trying to connect an http1.x server" in low or "http/1" in low
    )


# The errors that grpc raises are calls too, though RpcError itself promises neither of the two.
def _code(error: grpc.RpcError) -> grpc.StatusCode:
    code = getattr(error, "code", lambda: None)()
    return code if isinstance(code, grpc.StatusCode) else grpc.StatusCode.UNKNOWN


def _details(error: grpc.RpcError) -> str:
    return str(getattr(error, "details", lambda: error)() or "")
