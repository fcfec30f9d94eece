"""Brings releases of the agent onto boards: a few first, then the others, and none after one has failed.

A board hears of a release on the stream that it holds open, and says on it how far it is. One task takes that
in and hands releases on; everything is written down before it is told.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from typing import BinaryIO

from boardbench.collector.errors import InvalidRequest, NotFound, Occupied, StoreError
from boardbench.collector.files import Files
from boardbench.collector.look import ReadModel
from boardbench.collector.store import check_identity
from boardbench.collector.stores.updates import UpdateStore
from boardbench.inspect import release
from boardbench.inspect.errors import InspectError
from boardbench.v1 import collector_pb2, model_pb2, update_pb2

_log = logging.getLogger(__name__)

_AT_ONCE = 16
"""Boards that are in an update at one moment: what the rest would fetch is not fetched when one fails."""

_GATHER_SECONDS = 0.02
_RETRY_SECONDS = 1.0
_MAX_REASON = 1000

_WAITING = update_pb2.UPDATE_STATE_WAITING
_DONE = update_pb2.UPDATE_STATE_DONE
_STOPPED = update_pb2.UPDATE_STATE_STOPPED
_BAD = (update_pb2.UPDATE_STATE_ROLLED_BACK, update_pb2.UPDATE_STATE_FAILED)
ENDED = (_DONE, _STOPPED, *_BAD)
"""Where a board stays."""

# A board's own name of its processor, by Debian's. A 32-bit system may run on a 64-bit kernel.
_MACHINES = {
    "arm64": ("aarch64", "arm64"),
    "amd64": ("x86_64", "amd64"),
    "armhf": ("armv7l", "armv6l", "armhf", "aarch64"),
}


class UpdateDesk:
    """One board's side of it, from its hello to the end of its stream."""

    def __init__(
        self,
        updater: Updater,
        device_id: str,
        send: Callable[[collector_pb2.ReportResponse], Awaitable[None]],
    ) -> None:
        self.device_id = device_id
        self.offered: set[str] = set()
        """Updates that the board was told of on this stream."""
        self._updater = updater
        self._send = send
        self._tasks: set[asyncio.Task[None]] = set()

    def report(self, report: update_pb2.UpdateReport) -> None:
        """The board says how far it is."""
        self._updater.reported(self.device_id, report)

    def offer(self, offer: update_pb2.UpdateOffer) -> None:
        """Asks the board to take the release."""
        self.offered.add(offer.update_id)
        task = asyncio.create_task(self._tell(collector_pb2.ReportResponse(update=offer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _tell(self, response: collector_pb2.ReportResponse) -> None:
        try:
            await self._send(response)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # the stream ends; whoever reads it says why
            _log.debug("device %s: an update could not be told: %s", self.device_id, error)

    async def close(self) -> None:
        """The stream has ended."""
        self._updater.left(self)
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


class Updater:
    """Updates as people and boards use them. ``run()`` is its task; ``load()`` comes first."""

    def __init__(
        self,
        store: UpdateStore,
        files: Files,
        look: ReadModel,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._files = files
        self._look = look
        self._clock = clock
        self._updates: dict[str, update_pb2.Update] = {}
        self._sizes: dict[str, int] = {}
        self._desks: dict[str, UpdateDesk] = {}
        self._reports: dict[tuple[str, str], update_pb2.UpdateReport] = {}
        self._poke = asyncio.Event()
        self._turn = asyncio.Lock()
        self._watchers: set[asyncio.Event] = set()

    async def load(self) -> None:
        """Takes up what an earlier collector left. Raises StoreError."""
        for update in reversed(await asyncio.to_thread(self._store.all)):
            self._updates[update.update_id] = update

    def files_in_use(self) -> frozenset[str]:
        """Packages that boards are still to fetch."""
        return frozenset(update.package_sha256 for update in self._open())

    # Boards.

    def attach(
        self,
        device_id: str,
        send: Callable[[collector_pb2.ReportResponse], Awaitable[None]],
    ) -> UpdateDesk:
        """The desk of a stream; ``send`` may be called from other tasks than the stream's."""
        desk = self._desks[device_id] = UpdateDesk(self, device_id, send)
        self._poke.set()
        return desk

    def left(self, desk: UpdateDesk) -> None:
        """The stream has ended; what it said before still counts."""
        if self._desks.get(desk.device_id) is desk:
            del self._desks[desk.device_id]

    def reported(self, device_id: str, report: update_pb2.UpdateReport) -> None:
        """A board says how far it is; the latest word counts."""
        if report.update_id in self._updates:
            self._reports[(device_id, report.update_id)] = report
            self._poke.set()

    async def run(self) -> None:
        """Does the work until cancelled; survives whatever the store does."""
        self._poke.set()
        while True:
            await self._poke.wait()
            await asyncio.sleep(_GATHER_SECONDS)
            self._poke.clear()
            try:
                async with self._turn:
                    await self._take_in()
                    await self._hand_out()
            except StoreError as error:
                _log.warning("updates have to wait: %s", error)
                await asyncio.sleep(_RETRY_SECONDS)
                self._poke.set()
            except Exception:
                _log.exception("updates failed; they go on")
                await asyncio.sleep(_RETRY_SECONDS)

    async def _take_in(self) -> None:
        while self._reports:
            key, report = next(iter(self._reports.items()))
            before = self._updates[key[1]]
            after = update_pb2.Update()
            after.CopyFrom(before)
            board = next((each for each in after.boards if each.device_id == key[0]), None)
            if board is not None and _heard(board, report, self._clock()):
                _judge(after, self._clock())
                await self._keep(before, after)
            # Only then: what could not be written down is taken in again.
            if self._reports.get(key) is report:
                del self._reports[key]

    async def _hand_out(self) -> None:
        for update in self._open():
            going = sum(1 for board in update.boards if self._is_going(update, board))
            first = [board for board in update.boards if board.canary and board.state != _DONE]
            for board in first or update.boards:
                desk = self._desks.get(board.device_id)
                if board.state in ENDED or desk is None or update.update_id in desk.offered:
                    continue
                if board.state == _WAITING:
                    if update.halted or going >= _AT_ONCE:
                        continue
                    going += 1
                offer = await self._offer(update)
                if offer is None:
                    return
                desk.offer(offer)

    def _is_going(self, update: update_pb2.Update, board: update_pb2.BoardUpdate) -> bool:
        if board.state in ENDED:
            return False
        desk = self._desks.get(board.device_id)
        return board.state != _WAITING or (desk is not None and update.update_id in desk.offered)

    async def _offer(self, update: update_pb2.Update) -> update_pb2.UpdateOffer | None:
        try:
            file = await self._files.find(update.package_sha256)
        except NotFound:
            halted = update_pb2.Update()
            halted.CopyFrom(update)
            halted.halted = f"{update.package_name} is no longer on this collector: start the update again"
            _stop(halted, halted.halted, self._clock())
            await self._keep(update, halted)
            return None
        return update_pb2.UpdateOffer(
            update_id=update.update_id,
            version=update.version,
            package_sha256=update.package_sha256,
            package_bytes=file.size_bytes,
            package_name=update.package_name,
        )

    async def _keep(self, before: update_pb2.Update | None, after: update_pb2.Update) -> None:
        if before is None or _lasting(before) != _lasting(after):
            await asyncio.to_thread(self._store.put, after)
        self._updates[after.update_id] = after
        for watcher in self._watchers:
            watcher.set()

    def _open(self) -> list[update_pb2.Update]:
        return [
            update
            for update in self._updates.values()
            if any(board.state not in ENDED for board in update.boards)
        ]

    # People.

    async def start(self, request: update_pb2.StartUpdateRequest) -> update_pb2.Update:
        """Begins; the same request_id again is the same update. InvalidRequest, NotFound, Occupied."""
        if request.request_id:
            try:
                check_identity("request_id", request.request_id)
            except ValueError as error:
                raise InvalidRequest(str(error)) from error
        if not request.on:
            raise InvalidRequest("which boards? Name terms; device_id=* means all")
        package = await self._files.find(request.package_sha256)
        manifest = await self._manifest(package)
        async with self._turn:
            there = self._updates.get(request.request_id)
            if there is not None:
                return there
            devices = list(await self._look.devices(request.on))
            if not devices:
                raise InvalidRequest(f"no board meets {', '.join(request.on)}")
            self._check(devices, manifest)
            # Those that are there go first: of one that is off nothing can be learnt.
            devices.sort(key=lambda device: (not device.up, device.board.device_id))
            update = update_pb2.Update(
                update_id=request.request_id or uuid.uuid4().hex,
                version=manifest.version,
                package_sha256=package.sha256,
                package_name=package.name,
            )
            update.created_at.FromNanoseconds(int(self._clock() * 1e9))
            for place, device in enumerate(devices):
                board = update.boards.add(
                    device_id=device.board.device_id,
                    state=_WAITING,
                    from_version=device.agent_version,
                    canary=place < request.canary,
                )
                board.changed_at.CopyFrom(update.created_at)
            await self._keep(None, update)
        _log.info("update %s: release %s for %d boards", update.update_id, update.version, len(update.boards))
        self._poke.set()
        return update

    async def _manifest(self, package: model_pb2.Model) -> release.Manifest:
        def read(file: BinaryIO) -> release.Manifest:
            return release.read(file)

        try:
            return await self._files.look_into(package.sha256, read)
        except InspectError as error:
            raise InvalidRequest(f"{package.name}: {error}") from error

    def _check(self, devices: Iterable[collector_pb2.Device], manifest: release.Manifest) -> None:
        machines = _MACHINES.get(manifest.architecture, (manifest.architecture,))
        other = [
            f"{device.board.device_id} ({device.board.architecture})"
            for device in devices
            if device.board.architecture and device.board.architecture not in machines
        ]
        if other:
            raise InvalidRequest(
                f"the package is for {manifest.architecture}, and {len(other)} of the boards are not: "
                f"{', '.join(other[:5])}; choose the others, with architecture={machines[0]} say"
            )
        for update in self._open():
            busy = {board.device_id for board in update.boards if board.state not in ENDED}
            for device in devices:
                if device.board.device_id in busy:
                    raise Occupied(
                        f"{device.board.device_id} is in update {update.update_id[:12]} to {update.version}: "
                        "wait for its end, or stop it"
                    )

    def updates(self) -> list[update_pb2.Update]:
        """All that are known, the latest first."""
        return sorted(
            self._updates.values(), key=lambda update: update.created_at.ToNanoseconds(), reverse=True
        )

    def find(self, update_id: str) -> update_pb2.Update:
        """The one whose identity begins so; NotFound when there is none, or more than one."""
        found = [update for name, update in self._updates.items() if update_id and name.startswith(update_id)]
        if len(found) != 1:
            raise NotFound(f"there is no update {update_id[:80]!r}, or more than one that begins so")
        return found[0]

    async def watch(self, update_id: str) -> AsyncGenerator[update_pb2.Update, None]:
        """Yields it as it is now, then after each change, until every board has ended it. NotFound."""
        update_id = self.find(update_id).update_id
        came = asyncio.Event()
        self._watchers.add(came)
        told = None
        try:
            while True:
                came.clear()
                update = self._updates[update_id]
                if update is not told:
                    told = update
                    yield update
                if all(board.state in ENDED for board in update.boards):
                    return
                await came.wait()
        finally:
            self._watchers.discard(came)

    async def stop(self, update_id: str) -> update_pb2.Update:
        """Boards that have not begun are left as they are. NotFound."""
        async with self._turn:
            before = self.find(update_id)
            after = update_pb2.Update()
            after.CopyFrom(before)
            if not after.halted and any(board.state not in ENDED for board in after.boards):
                after.halted = "it was stopped"
            _stop(after, after.halted, self._clock())
            await self._keep(before, after)
        return after


def _heard(board: update_pb2.BoardUpdate, report: update_pb2.UpdateReport, at: float) -> bool:
    """Whether the report is news of the board."""
    known = (*ENDED, *(update_pb2.UPDATE_STATE_FETCHING, update_pb2.UPDATE_STATE_READY))
    if report.state not in (*known, update_pb2.UPDATE_STATE_SWITCHED) or report.state == _STOPPED:
        return False
    # One that was stopped may have begun just before it was told.
    if board.state in ENDED and board.state != _STOPPED:
        return False
    if board.state != report.state:
        board.changed_at.FromNanoseconds(int(at * 1e9))
    board.state, board.reason = report.state, report.reason[:_MAX_REASON]
    board.ClearField("fraction")
    if report.HasField("fraction"):
        board.fraction = min(1.0, max(0.0, report.fraction))
    return True


def _judge(update: update_pb2.Update, at: float) -> None:
    """Ends it for boards that have not begun, when one has ended badly."""
    for board in update.boards:
        if board.state in _BAD and not update.halted:
            what = "was rolled back" if board.state == _BAD[0] else "failed"
            update.halted = f"{board.device_id} {what}: {board.reason}"[:_MAX_REASON]
            _log.warning("update %s: halted: %s", update.update_id, update.halted)
            _stop(update, "another board failed", at)


def _stop(update: update_pb2.Update, reason: str, at: float) -> None:
    for board in update.boards:
        if board.state == _WAITING:
            board.state, board.reason = _STOPPED, reason
            board.changed_at.FromNanoseconds(int(at * 1e9))


def _lasting(update: update_pb2.Update) -> bytes:
    """What of it is written down: how much of a package has come is for eyes."""
    copy = update_pb2.Update()
    copy.CopyFrom(update)
    for board in copy.boards:
        with contextlib.suppress(ValueError):
            board.ClearField("fraction")
    return copy.SerializeToString(deterministic=True)
