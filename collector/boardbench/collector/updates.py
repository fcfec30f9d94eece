"""Brings releases of the agent onto boards: a few first, then the others, and none after one has failed.

A board hears of a release on the stream that it holds open, and says on it how far it is. One task takes that
in and hands releases on; everything is written down before it is told. Where several collectors share a
database, each speaks with the boards that are connected to it, and what is written down decides for all.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterable, Sequence
from typing import BinaryIO

from boardbench.collector.errors import (
    CollectorError,
    InvalidRequest,
    NoRoom,
    NotFound,
    Occupied,
    StoreError,
)
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

_OFFER_SECONDS = 60.0
"""How long a board that was asked to begin counts as one that does: it answers at once, or it went away."""

_LOOK_SECONDS = 1.0
"""How often a collector looks for what others have written down: one small query."""

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
        """As they were when they were last read; fractions are finer."""
        self._versions: dict[str, int] = {}
        self._desks: dict[str, UpdateDesk] = {}
        self._reports: dict[tuple[str, str], update_pb2.UpdateReport] = {}
        self._strange: dict[str, update_pb2.UpdateReport] = {}
        """By board the last report of an update that is not known here: it may be another collector's."""
        self._poke = asyncio.Event()
        self._turn = asyncio.Lock()
        self._watchers: set[asyncio.Event] = set()

    async def load(self) -> None:
        """Takes up what is written down. Raises StoreError."""
        async with self._turn:
            await self._look_again()

    async def refresh(self) -> None:
        """Returns when what other collectors wrote down before is known here, too. Raises StoreError."""
        if self._store.shared:
            await self.load()

    async def _look_again(self) -> None:
        versions = await self._store.versions()
        for gone in self._updates.keys() - versions.keys():
            del self._updates[gone]
        news = [name for name, version in versions.items() if self._versions.get(name) != version]
        self._versions = {name: version for name, version in self._versions.items() if name in versions}
        for version, update in await self._store.get(news):
            self._learn(version, update)

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
        elif self._store.shared:
            self._strange[device_id] = report
        self._poke.set()

    async def run(self) -> None:
        """Does the work until cancelled; survives whatever the store does."""
        self._poke.set()
        failing = False
        while True:
            # What others write down pokes nobody here; nor does a board that was asked and went away.
            pause = _LOOK_SECONDS if self._store.shared else _OFFER_SECONDS / 4
            alarm = asyncio.get_running_loop().call_later(pause, self._poke.set)
            try:
                await self._poke.wait()
            finally:
                alarm.cancel()
            await asyncio.sleep(_GATHER_SECONDS)
            self._poke.clear()
            try:
                async with self._turn:
                    if self._store.shared:
                        await self._look_again()
                    await self._take_in()
                    await self._hand_out()
                failing = False
            except (StoreError, NoRoom) as error:
                if not failing:
                    _log.warning("updates have to wait: %s", error)
                failing = True
                await asyncio.sleep(_RETRY_SECONDS)
                self._poke.set()
            except Exception:
                _log.exception("updates failed; they go on")
                await asyncio.sleep(_RETRY_SECONDS)

    async def _take_in(self) -> None:
        for device_id, report in self._strange.items():
            self._reports[(device_id, report.update_id)] = report
        self._strange.clear()
        while self._reports:
            key, report = next(iter(self._reports.items()))
            await self._hear(*key, report)
            # Only then: what could not be written down is taken in again.
            if self._reports.get(key) is report:
                del self._reports[key]

    async def _hear(self, device_id: str, update_id: str, report: update_pb2.UpdateReport) -> None:
        before = self._updates.get(update_id)
        at = self._clock()

        def take(update: update_pb2.Update) -> bool:
            board = next((each for each in update.boards if each.device_id == device_id), None)
            if board is None or not _heard(board, report, at):
                return False
            _judge(update, at)
            return True

        if before is None:
            return
        after = _copied(before)
        if not take(after):
            return
        if _lasting(before) != _lasting(after):
            await self._change(update_id, take)
            # How far a board is exactly is written down by nobody.
            after = _copied(self._updates.get(update_id, after))
            _say_fraction(after, device_id, report)
        self._tell(after)

    async def _hand_out(self) -> None:
        trouble: CollectorError | None = None
        for update in self._open():
            here = {
                device_id for device_id, desk in self._desks.items() if update.update_id not in desk.offered
            }
            if not _next(update, here, self._clock()):
                continue
            try:
                offer = await self._offer(update)
            except (StoreError, NoRoom) as error:
                # The package is another collector's, and can't be had now; those of others may.
                trouble = error
                continue
            if offer is None:
                continue
            chosen: list[str] = []

            def ask(
                kept: update_pb2.Update, here: Collection[str] = here, chosen: list[str] = chosen
            ) -> bool:
                at = self._clock()
                boards = _next(kept, here, at)
                chosen[:] = [board.device_id for board in boards]
                for board in boards:
                    board.offered_at.FromNanoseconds(int(at * 1e9))
                return bool(boards)

            await self._change(update.update_id, ask)
            for device_id in chosen:
                desk = self._desks.get(device_id)
                if desk is not None:
                    desk.offer(offer)
        if trouble is not None:
            raise trouble

    async def _offer(self, update: update_pb2.Update) -> update_pb2.UpdateOffer | None:
        try:
            file = await self._files.find(update.package_sha256)
        except NotFound:
            why = f"{update.package_name} is no longer on this collector: start the update again"
            await self._halt(update.update_id, why)
            return None
        return update_pb2.UpdateOffer(
            update_id=update.update_id,
            version=update.version,
            package_sha256=update.package_sha256,
            package_bytes=file.size_bytes,
            package_name=update.package_name,
        )

    async def _change(self, update_id: str, change: Callable[[update_pb2.Update], bool]) -> None:
        """Changes what is written down, and takes over what that is then."""

        def lasting(update: update_pb2.Update) -> bool:
            before = _lasting(update)
            if not change(update):
                return False
            update.ParseFromString(_lasting(update))
            return update.SerializeToString(deterministic=True) != before

        changed = await self._store.change(update_id, lasting)
        if changed is not None:
            self._learn(*changed)

    async def _halt(self, update_id: str, why: str) -> None:
        """Boards that have not begun are left as they are."""

        def halt(update: update_pb2.Update) -> bool:
            if not update.halted and any(board.state not in ENDED for board in update.boards):
                update.halted = why
            _stop(update, update.halted, self._clock())
            return True

        await self._change(update_id, halt)

    def _learn(self, version: int, update: update_pb2.Update) -> None:
        """Takes over what is written down, and keeps the finer fractions that are the same there."""
        known = self._updates.get(update.update_id)
        if known is not None:
            fractions = {board.device_id: board for board in known.boards if board.HasField("fraction")}
            for board in (each for each in update.boards if each.HasField("fraction")):
                finer = fractions.get(board.device_id)
                if finer is not None and _coarse(finer.fraction) == board.fraction:
                    board.fraction = finer.fraction
        self._versions[update.update_id] = version
        self._tell(update)

    def _tell(self, update: update_pb2.Update) -> None:
        self._updates[update.update_id] = update
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
            await self._look_again()
            there = self._updates.get(request.request_id)
            if there is not None:
                return there
            devices = list(await self._look.devices(request.on))
            if not devices:
                raise InvalidRequest(f"no board meets {', '.join(request.on)}")
            _check_architecture(devices, manifest)
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
            names = {device.board.device_id for device in devices}
            version, update = await self._store.add(update, lambda kept: _check_free(kept, names))
            self._learn(version, update)
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
                update = self._updates.get(update_id)
                if update is None:
                    return
                shown = _shown(update)
                if shown != told:
                    told = shown
                    yield update
                if all(board.state in ENDED for board in update.boards):
                    return
                await came.wait()
        finally:
            self._watchers.discard(came)

    async def stop(self, update_id: str) -> update_pb2.Update:
        """Boards that have not begun are left as they are. NotFound."""
        async with self._turn:
            update_id = self.find(update_id).update_id
            await self._halt(update_id, "it was stopped")
            return self.find(update_id)


def _check_architecture(devices: Iterable[collector_pb2.Device], manifest: release.Manifest) -> None:
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


def _check_free(kept: Sequence[update_pb2.Update], device_ids: Collection[str]) -> None:
    """Returns when none of these boards is in an update already."""
    for update in kept:
        for board in update.boards:
            if board.state not in ENDED and board.device_id in device_ids:
                raise Occupied(
                    f"{board.device_id} is in update {update.update_id[:12]} to {update.version}: "
                    "wait for its end, or stop it"
                )


def _next(update: update_pb2.Update, here: Collection[str], at: float) -> list[update_pb2.BoardUpdate]:
    """Returns which of the boards that are ``here`` are to be told of the update now."""
    room = _AT_ONCE - sum(1 for board in update.boards if _is_going(board, at))
    first = [board for board in update.boards if board.canary and board.state != _DONE]
    chosen = []
    for board in first or update.boards:
        if board.state in ENDED or board.device_id not in here:
            continue
        if board.state == _WAITING and not _is_going(board, at):
            if update.halted or room <= 0:
                continue
            room -= 1
        chosen.append(board)
    return chosen


def _is_going(board: update_pb2.BoardUpdate, at: float) -> bool:
    if board.state != _WAITING:
        return board.state not in ENDED
    return board.HasField("offered_at") and at - board.offered_at.ToNanoseconds() / 1e9 < _OFFER_SECONDS


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


def _copied(update: update_pb2.Update) -> update_pb2.Update:
    copy = update_pb2.Update()
    copy.CopyFrom(update)
    return copy


def _shown(update: update_pb2.Update) -> bytes:
    """What of it somebody who follows it sees: when a board was asked is between collectors."""
    copy = _copied(update)
    for board in copy.boards:
        board.ClearField("offered_at")
    return copy.SerializeToString(deterministic=True)


def _coarse(fraction: float) -> float:
    return int(fraction * 10) / 10


def _lasting(update: update_pb2.Update) -> bytes:
    """What of it is written down: of how much of a package has come only the tenths, which is for eyes."""
    copy = _copied(update)
    for board in copy.boards:
        if board.HasField("fraction"):
            board.fraction = _coarse(board.fraction)
    return copy.SerializeToString(deterministic=True)


def _say_fraction(update: update_pb2.Update, device_id: str, report: update_pb2.UpdateReport) -> None:
    for board in update.boards:
        if board.device_id == device_id and board.state == report.state and report.HasField("fraction"):
            board.fraction = min(1.0, max(0.0, report.fraction))
