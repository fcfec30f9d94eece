"""The gRPC face of the queue: wire in, call, wire out."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from boardbench.collector.config import CollectorConfig
from boardbench.collector.dispatch import Dispatcher
from boardbench.collector.errors import InvalidRequest, ShuttingDown, SilentAgent
from boardbench.collector.files import Files
from boardbench.collector.service import answering
from boardbench.v1 import agent_pb2, job_pb2, job_pb2_grpc

JOB_SERVICE_NAME = job_pb2.DESCRIPTOR.services_by_name["JobService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]

_STALL_SECONDS = 60.0
"""A file that does not move for so long holds up whoever sends the same one."""


class JobService(job_pb2_grpc.JobServiceServicer):
    """``boardbench.v1.JobService``."""

    def __init__(
        self,
        config: CollectorConfig,
        dispatcher: Dispatcher,
        files: Files,
        *,
        admit: Callable[[str, Any], Awaitable[None]],
    ) -> None:
        """``admit`` is called with a board's identity and its call, and raises when it may not ask."""
        self._config = config
        self._dispatcher = dispatcher
        self._files = files
        self._admit = admit
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Ends what would go on for ever."""
        self._closing.set()

    # grpc.aio also takes a coroutine that reads and writes through the context; the stub does not know.
    async def SendFile(  # type: ignore[override]
        self, _requests: object, context: _Context
    ) -> None:
        """Takes a file and keeps it for boards."""
        async with answering(context):
            first = await self._next(context)
            if first is None or first.WhichOneof("request") != "header":
                raise InvalidRequest("the first message must be the header of the file")
            async with self._files.receive(first.header) as transfer:
                present = transfer.stored is not None
                if not present:
                    resume = agent_pb2.PushResume(offset_bytes=transfer.offset_bytes)
                    await context.write(job_pb2.SendFileResponse(resume=resume))
                    while not transfer.complete:
                        request = await self._next(context)
                        if request is None:
                            raise InvalidRequest(
                                f"{transfer.name}: the stream ended at byte {transfer.offset_bytes:,} of"
                                f" {transfer.size_bytes:,}; send it again, it goes on there"
                            )
                        if request.WhichOneof("request") != "chunk":
                            raise InvalidRequest("after the header come chunks, and nothing else")
                        await transfer.write(request.chunk)
                    await transfer.finish()
                done = agent_pb2.PushDone(model=transfer.stored, already_present=present)
                await context.write(job_pb2.SendFileResponse(done=done))

    async def _next(self, context: _Context) -> job_pb2.SendFileRequest | None:
        coming: asyncio.Task[Any] = asyncio.ensure_future(context.read())
        try:
            await asyncio.wait((coming,), timeout=_STALL_SECONDS)
            if not coming.done():
                raise SilentAgent(f"nothing came for {_STALL_SECONDS:.0f} s; send it again")
            request = coming.result()
        finally:
            coming.cancel()
        return None if request is grpc.aio.EOF else request

    async def FetchFile(  # type: ignore[override]
        self, request: job_pb2.FetchFileRequest, context: _Context
    ) -> None:
        """Hands the bytes of a file to a board."""
        async with answering(context):
            await self._admit(request.device_id, context)
            async with contextlib.aclosing(self._files.read(request.sha256, request.offset_bytes)) as chunks:
                async for chunk in chunks:
                    await context.write(job_pb2.FetchFileResponse(chunk=chunk))

    async def SubmitJobs(
        self, request: job_pb2.SubmitJobsRequest, context: _Context
    ) -> job_pb2.SubmitJobsResponse:
        """Queues a job for every board that is chosen."""
        async with answering(context):
            records = await self._dispatcher.submit(request)
            return job_pb2.SubmitJobsResponse(jobs=[record.job for record in records])

    async def ListJobs(self, request: job_pb2.ListJobsRequest, context: _Context) -> job_pb2.ListJobsResponse:
        """Jobs, the latest first."""
        async with answering(context):
            return await self._dispatcher.page(request)

    async def WatchJobs(  # type: ignore[override]
        self, request: job_pb2.WatchJobsRequest, context: _Context
    ) -> None:
        """Every job as it is now, then each change, until all have ended."""
        async with (
            answering(context),
            contextlib.aclosing(self._dispatcher.watch(request.filter)) as jobs,
        ):
            while (job := await self._unless_closing(jobs)) is not None:
                await context.write(job_pb2.WatchJobsResponse(job=job))

    async def _unless_closing(self, jobs: AsyncIterator[job_pb2.Job]) -> job_pb2.Job | None:
        """Returns the next job, None at the end; ShuttingDown when the collector stops meanwhile."""
        coming = asyncio.ensure_future(anext(jobs, None))
        closing = asyncio.ensure_future(self._closing.wait())
        try:
            await asyncio.wait((coming, closing), return_when=asyncio.FIRST_COMPLETED)
            if not coming.done():
                raise ShuttingDown("the collector is stopping; connect again later")
            return coming.result()
        finally:
            for task in (coming, closing):
                task.cancel()
            await asyncio.gather(coming, closing, return_exceptions=True)

    async def CancelJobs(
        self, request: job_pb2.CancelJobsRequest, context: _Context
    ) -> job_pb2.CancelJobsResponse:
        """Ends jobs, waiting or running."""
        async with answering(context):
            return job_pb2.CancelJobsResponse(jobs=await self._dispatcher.cancel(request.filter))

    async def RetryJobs(
        self, request: job_pb2.RetryJobsRequest, context: _Context
    ) -> job_pb2.RetryJobsResponse:
        """Queues dead jobs again."""
        async with answering(context):
            return job_pb2.RetryJobsResponse(jobs=await self._dispatcher.retry(request.filter))

    async def Reserve(self, request: job_pb2.ReserveRequest, context: _Context) -> job_pb2.ReserveResponse:
        """Takes boards for one holder alone."""
        async with answering(context):
            return job_pb2.ReserveResponse(reservations=await self._dispatcher.reserve(request))

    async def Release(self, request: job_pb2.ReleaseRequest, context: _Context) -> job_pb2.ReleaseResponse:
        """Gives them back."""
        async with answering(context):
            return job_pb2.ReleaseResponse(reservations=await self._dispatcher.release(request))

    async def SetLabels(
        self, request: job_pb2.SetLabelsRequest, context: _Context
    ) -> job_pb2.SetLabelsResponse:
        """Sets and removes the operator's labels of boards."""
        async with answering(context):
            return job_pb2.SetLabelsResponse(device_ids=await self._dispatcher.set_labels(request))
