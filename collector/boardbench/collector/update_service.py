"""The gRPC face of updates: wire in, call, wire out."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import grpc

from boardbench.collector.errors import ShuttingDown
from boardbench.collector.service import answering
from boardbench.collector.updates import Updater
from boardbench.v1 import update_pb2, update_pb2_grpc

UPDATE_SERVICE_NAME = update_pb2.DESCRIPTOR.services_by_name["UpdateService"].full_name

_Context = grpc.aio.ServicerContext[Any, Any]


class UpdateService(update_pb2_grpc.UpdateServiceServicer):
    """``boardbench.v1.UpdateService``."""

    def __init__(self, updater: Updater) -> None:
        self._updater = updater
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Ends what would go on for ever."""
        self._closing.set()

    async def StartUpdate(
        self, request: update_pb2.StartUpdateRequest, context: _Context
    ) -> update_pb2.StartUpdateResponse:
        """Begins to bring a release onto boards."""
        async with answering(context):
            return update_pb2.StartUpdateResponse(update=await self._updater.start(request))

    async def ListUpdates(
        self, request: update_pb2.ListUpdatesRequest, context: _Context
    ) -> update_pb2.ListUpdatesResponse:
        """Updates, the latest first."""
        del request
        async with answering(context):
            await self._updater.refresh()
            return update_pb2.ListUpdatesResponse(updates=self._updater.updates())

    # grpc.aio also takes a coroutine that writes through the context; the stub does not know.
    async def WatchUpdate(  # type: ignore[override]
        self, request: update_pb2.WatchUpdateRequest, context: _Context
    ) -> None:
        """The update as it is now, then each change, until every board has ended it."""
        async with answering(context):
            await self._updater.refresh()
            await self._watch(request.update_id, context)

    async def _watch(self, update_id: str, context: _Context) -> None:
        async with contextlib.aclosing(self._updater.watch(update_id)) as updates:
            while True:
                coming = asyncio.ensure_future(anext(updates, None))
                closing = asyncio.ensure_future(self._closing.wait())
                try:
                    await asyncio.wait((coming, closing), return_when=asyncio.FIRST_COMPLETED)
                    if not coming.done():
                        raise ShuttingDown("the collector is stopping; connect again later")
                    update = coming.result()
                finally:
                    for task in (coming, closing):
                        task.cancel()
                    await asyncio.gather(coming, closing, return_exceptions=True)
                if update is None:
                    return
                await context.write(update_pb2.WatchUpdateResponse(update=update))

    async def StopUpdate(
        self, request: update_pb2.StopUpdateRequest, context: _Context
    ) -> update_pb2.StopUpdateResponse:
        """Boards that have not begun are left as they are."""
        async with answering(context):
            await self._updater.refresh()
            return update_pb2.StopUpdateResponse(update=await self._updater.stop(request.update_id))
