"""Files of the collector, fetched to where they belong: over broken links, for as long as it takes.

Where that is says how much of a file is there already, takes the pieces and looks at the whole
(:class:`Arrival`): the model store for jobs, the inbox for a release.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import grpc

from boardbench.agent.errors import DataLoss, NotFetched, Superseded
from boardbench.agent.stream import open_channel
from boardbench.v1 import agent_pb2, job_pb2, job_pb2_grpc

_log = logging.getLogger(__name__)

# Between tries, with full jitter: boards that were offered one file all come at once.
_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 30.0
# In which a file on its way must move: a commit of the collector's disk takes less.
_STALL_SECONDS = 60.0
# A file that comes damaged this often is damaged where it is.
_DAMAGED_TRIES = 3
# Asking again can help; every other answer is the collector's last word.
_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)

Credentials = Callable[[grpc.aio.Channel], Awaitable[tuple[tuple[str, str], ...]]]
"""Metadata by which the collector knows the board."""


class Arrival(Protocol):
    """A file on its way in. What was written is kept for the next arrival, unless it was damaged."""

    @property
    def offset_bytes(self) -> int:
        """The first byte that is lacking."""

    @property
    def size_bytes(self) -> int:
        """Of the whole file."""

    @property
    def complete(self) -> bool:
        """Whether no byte is lacking."""

    async def write(self, *, offset_bytes: int, data: bytes, crc32: int) -> None:
        """Takes a piece. Raises DataLoss when it is damaged."""

    async def finish(self) -> object:
        """The whole file is what was asked for, and lasts. Raises DataLoss when it is not."""


class Fetcher:
    """Fetches files of one collector for one board."""

    def __init__(
        self,
        collector: str,
        device_id: str,
        *,
        credentials: Credentials | None = None,
        channel: Callable[[str], grpc.aio.Channel] = open_channel,
        jitter: Callable[[], float] = random.random,
        sleep: Callable[[float], Coroutine[object, object, None]] = asyncio.sleep,
    ) -> None:
        """Files come from the ``collector`` at ``HOST:PORT``."""
        self._collector = collector
        self._device_id = device_id
        self._credentials = credentials
        self._channel = channel
        self._jitter = jitter
        self._sleep = sleep

    async def fetch(
        self,
        sha256: str,
        name: str,
        receive: Callable[[], AbstractAsyncContextManager[Arrival]],
        arrived_bytes: Callable[[], int],
        moved: Callable[[float], None],
        *,
        hopeless: type[DataLoss] = DataLoss,
    ) -> None:
        """The file is where it belongs.

        ``receive`` goes on from what is there of it, which ``arrived_bytes`` says; ``moved`` is called with
        the fraction of it that has come. Raises NotFetched when the collector does not hand it out, or when
        it was ``hopeless`` several times; and what ``receive`` raises.
        """
        failures = damaged = 0
        while True:
            had = arrived_bytes()
            try:
                async with receive() as arrival:
                    if not arrival.complete:
                        await self._take(sha256, name, arrival, moved)
                    await arrival.finish()
                return
            except grpc.aio.AioRpcError as error:
                reason = f"{error.details() or 'no reason given'} ({error.code().name})"
                if error.code() not in _PASSING:
                    raise NotFetched(f"{name} can't be had of the collector: {reason}") from None
            except (Superseded, TimeoutError) as error:
                reason = str(error)
            except DataLoss as error:
                damaged += isinstance(error, hopeless)
                reason = str(error)
                if damaged >= _DAMAGED_TRIES:
                    raise NotFetched(f"{name} came damaged, {damaged} times: {reason}") from None
            if arrived_bytes() > had:
                failures = 0
            bound = min(_LONGEST_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2 ** min(failures, 16))
            failures += 1
            _log.info("fetching %s: %s; trying again", name, reason)
            await self._sleep(bound * self._jitter())

    async def _take(self, sha256: str, name: str, arrival: Arrival, moved: Callable[[float], None]) -> None:
        async with self._channel(self._collector) as channel:
            metadata = await self._credentials(channel) if self._credentials is not None else ()
            call = job_pb2_grpc.JobServiceStub(channel).FetchFile(
                job_pb2.FetchFileRequest(
                    sha256=sha256, offset_bytes=arrival.offset_bytes, device_id=self._device_id
                ),
                metadata=metadata,
            )
            try:
                while not arrival.complete:
                    chunk = await _next_chunk(call.read(), name)
                    await arrival.write(offset_bytes=chunk.offset_bytes, data=chunk.data, crc32=chunk.crc32)
                    moved(arrival.offset_bytes / arrival.size_bytes)
            finally:
                call.cancel()


async def _next_chunk(read: Awaitable[object], name: str) -> agent_pb2.PushChunk:
    """What comes next of a file. Raises TimeoutError when nothing does."""
    task = asyncio.ensure_future(read)
    try:
        await asyncio.wait([task], timeout=_STALL_SECONDS)
        if not task.done():
            raise TimeoutError(f"nothing of {name} came within {_STALL_SECONDS:g} s")
        response = task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if response is grpc.aio.EOF:
        raise TimeoutError(f"the collector ended before {name} was whole")
    assert isinstance(response, job_pb2.FetchFileResponse)
    return response.chunk
