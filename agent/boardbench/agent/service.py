"""The gRPC face of the agent: wire in, call, wire out."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc

from boardbench.agent import wire
from boardbench.agent.errors import (
    AgentError,
    ConfigurationError,
    Conflict,
    DataLoss,
    EnrolmentRefused,
    InvalidRequest,
    InvalidTransfer,
    NoRoom,
    NotFetched,
    NotFound,
    RunExists,
    StorageError,
    Superseded,
    Unavailable,
)
from boardbench.agent.examine import Examiner
from boardbench.agent.probe import Engines
from boardbench.agent.queue import Runs
from boardbench.agent.spool import Spool
from boardbench.agent.store import ModelStore
from boardbench.agent.version import version
from boardbench.v1 import agent_pb2, agent_pb2_grpc, board_pb2

if TYPE_CHECKING:
    from google.protobuf.timestamp_pb2 import Timestamp

    from boardbench.agent.stream import LinkStatus

    _Context = grpc.aio.ServicerContext[Any, Any]

_log = logging.getLogger(__name__)

SERVICE_NAME = agent_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name

_DIGEST = re.compile(r"[0-9a-f]{64}")

# The first that matches counts. ABORTED, DATA_LOSS and UNAVAILABLE mean that asking again helps.
_STATUS: tuple[tuple[type[AgentError], grpc.StatusCode], ...] = (
    (InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (NotFound, grpc.StatusCode.NOT_FOUND),
    (RunExists, grpc.StatusCode.ALREADY_EXISTS),
    (Conflict, grpc.StatusCode.FAILED_PRECONDITION),
    (NoRoom, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DataLoss, grpc.StatusCode.DATA_LOSS),
    (Superseded, grpc.StatusCode.ABORTED),
    (NotFetched, grpc.StatusCode.UNAVAILABLE),
    (Unavailable, grpc.StatusCode.UNAVAILABLE),
    (StorageError, grpc.StatusCode.INTERNAL),
    (ConfigurationError, grpc.StatusCode.INTERNAL),
    (EnrolmentRefused, grpc.StatusCode.INTERNAL),
)


@contextlib.asynccontextmanager
async def _answering(context: _Context) -> AsyncIterator[None]:
    """Turns the agent's errors into a status; the one place where that is done."""
    try:
        yield
    except AgentError as error:
        code = next((code for kind, code in _STATUS if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
        await context.abort(code, str(error))
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception as error:
        _log.exception("a call from %s failed", context.peer())
        await context.abort(
            grpc.StatusCode.INTERNAL,
            f"the agent failed ({type(error).__name__}); its log says how: please report this",
        )


class AgentService(agent_pb2_grpc.AgentServiceServicer):
    """``boardbench.v1.AgentService``."""

    def __init__(
        self,
        *,
        store: ModelStore,
        spool: Spool,
        runs: Runs,
        engines: Engines,
        examiner: Examiner,
        identify: Callable[[], board_pb2.Board],
        link: Callable[[], LinkStatus | None],
        started_at: Timestamp,
    ) -> None:
        """``identify`` says what the board is now, ``link`` how its collector is, if it has one."""
        self._store = store
        self._spool = spool
        self._runs = runs
        self._engines = engines
        self._examiner = examiner
        self._identify = identify
        self._link = link
        self._started_at = started_at

    async def Describe(
        self, _request: agent_pb2.DescribeRequest, context: _Context
    ) -> agent_pb2.DescribeResponse:
        """What the board is and what it can run."""
        async with _answering(context):
            spool = self._spool.status()
            link = self._link()
            return agent_pb2.DescribeResponse(
                board=self._identify(),
                runtimes=await self._engines.statuses(),
                agent_version=version(),
                started_at=self._started_at,
                running_run_id=self._runs.running_run_id,
                queued_runs=self._runs.waiting,
                model_store=wire.to_store_status(self._store.status()),
                spool=agent_pb2.SpoolStatus(
                    spool_id=spool.spool_id,
                    pending=spool.pending,
                    used_bytes=spool.used_bytes,
                    limit_bytes=spool.limit_bytes,
                    dropped=spool.dropped,
                ),
                collector=agent_pb2.CollectorLinkStatus(
                    address=link.address, connected=link.connected, error=link.error
                )
                if link is not None
                else None,
            )
        raise AssertionError("abort() raises")

    # grpc.aio also takes a coroutine that reads and writes through the context; the stub does not know.
    async def PushModel(self, _requests: object, context: _Context) -> None:  # type: ignore[override]
        """Takes a file; see agent.proto."""
        async with _answering(context):
            first = await context.read()
            if first is grpc.aio.EOF or first.WhichOneof("request") != "header":
                raise InvalidTransfer("a push begins with its header")
            header: agent_pb2.PushHeader = first.header
            try:
                kind = wire.from_file_kind(header.kind)
            except ValueError:
                raise InvalidTransfer(f"there is no file kind {header.kind}") from None
            async with self._store.receive(
                sha256=header.sha256, name=header.name, size_bytes=header.size_bytes, kind=kind
            ) as transfer:
                if transfer.stored is None:
                    resume = agent_pb2.PushResume(offset_bytes=transfer.offset_bytes)
                    await context.write(agent_pb2.PushModelResponse(resume=resume))
                while transfer.stored is None and not transfer.complete:
                    request = await context.read()
                    if request is grpc.aio.EOF:
                        break
                    if request.WhichOneof("request") != "chunk":
                        raise InvalidTransfer("after its header a push has chunks only")
                    chunk = request.chunk
                    await transfer.write(offset_bytes=chunk.offset_bytes, data=chunk.data, crc32=chunk.crc32)
                stored = await transfer.finish()
                done = agent_pb2.PushDone(
                    model=wire.to_model(stored), already_present=transfer.already_present
                )
                await context.write(agent_pb2.PushModelResponse(done=done))

    async def ListModels(
        self, _request: agent_pb2.ListModelsRequest, context: _Context
    ) -> agent_pb2.ListModelsResponse:
        """The stored files, the one used last first."""
        async with _answering(context):
            return agent_pb2.ListModelsResponse(
                models=[wire.to_stored_model(file) for file in self._store.files()]
            )
        raise AssertionError("abort() raises")

    async def DeleteModel(
        self, request: agent_pb2.DeleteModelRequest, context: _Context
    ) -> agent_pb2.DeleteModelResponse:
        """Removes a file that no run uses."""
        async with _answering(context):
            await self._store.delete(_digest("sha256", request.sha256))
        return agent_pb2.DeleteModelResponse()

    async def RunBenchmark(  # type: ignore[override]
        self, request: agent_pb2.RunBenchmarkRequest, context: _Context
    ) -> None:
        """Queues a run and follows it to its result."""
        async with _answering(context):
            sha256 = _digest("model_sha256", request.model_sha256)
            run_id = await self._runs.submit(sha256, request.spec, request.run_id)
            async for event in self._runs.watch(run_id):
                await context.write(agent_pb2.RunBenchmarkResponse(event=event))

    async def WatchRun(  # type: ignore[override]
        self, request: agent_pb2.WatchRunRequest, context: _Context
    ) -> None:
        """Follows a run from any event on."""
        async with _answering(context):
            async for event in self._runs.watch(request.run_id, request.after_sequence):
                await context.write(agent_pb2.WatchRunResponse(event=event))

    async def ListRuns(
        self, _request: agent_pb2.ListRunsRequest, context: _Context
    ) -> agent_pb2.ListRunsResponse:
        """Runs that run, wait, or have lately ended."""
        async with _answering(context):
            return agent_pb2.ListRunsResponse(runs=self._runs.summaries())
        raise AssertionError("abort() raises")

    async def CancelRun(
        self, request: agent_pb2.CancelRunRequest, context: _Context
    ) -> agent_pb2.CancelRunResponse:
        """Ends a run."""
        async with _answering(context):
            return agent_pb2.CancelRunResponse(cancelled=await self._runs.cancel(request.run_id))
        raise AssertionError("abort() raises")

    async def Examine(
        self,
        request: agent_pb2.ExamineRequest,
        context: _Context,
    ) -> agent_pb2.ExamineResponse:
        """Looks whether the board is fit to measure on, after setting or putting back what is asked for."""
        async with _answering(context):
            return await self._examiner.answer(request)
        raise AssertionError("abort() raises")


def _digest(field: str, text: str) -> str:
    if not _DIGEST.fullmatch(text.lower()):
        raise InvalidRequest(
            f"{field} is {text[:80]!r}; it must be the file's SHA-256, 64 hexadecimal digits"
        )
    return text.lower()
