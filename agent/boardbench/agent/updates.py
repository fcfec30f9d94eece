"""A new release of the agent: offered by the collector, fetched, verified, and left for root to switch.

The agent itself can't write where releases are. It leaves a request in its own folder once no run is
measured, and begins none until the journal of boardbench-update says how it ended (:mod:`.update.switch`). By
then it may be another release: the new one says that it works when it is one of its collector's again.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import random
import re
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import DecodeError

from boardbench.agent import folder
from boardbench.agent.config import UpdateConfig
from boardbench.agent.queue import Runs
from boardbench.agent.stream import open_channel
from boardbench.agent.update import layout as places
from boardbench.agent.update.layout import Entry, Layout, Refused
from boardbench.inspect import release
from boardbench.inspect.errors import InspectError
from boardbench.v1 import collector_pb2, job_pb2, job_pb2_grpc, update_pb2

_log = logging.getLogger(__name__)

_REPORT_SECONDS = 0.5
_LOOK_SECONDS = 0.2
# Between tries to fetch, with full jitter: boards that were offered one release all come at once.
_FIRST_RETRY_SECONDS = 0.5
_LONGEST_RETRY_SECONDS = 30.0
_STALL_SECONDS = 60.0
_DAMAGED_TRIES = 3
# systemd may have missed that the request came, when it was just ending the last one.
_ASK_AGAIN_SECONDS = 20.0
# Nothing but a system without the unit, or with it masked, takes longer to start it.
_TAKEN_UP_SECONDS = 120.0
# Twice what the switch may take: without a word for longer, nobody does it any more, and runs go on.
_GIVE_UP_SECONDS = 1800.0
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OFFER = "offer"
# Of what the collector takes as a report, a quarter: characters may have four bytes.
_MAX_REASON = 900

_FINAL = {
    places.DONE: update_pb2.UPDATE_STATE_DONE,
    places.ROLLED_BACK: update_pb2.UPDATE_STATE_ROLLED_BACK,
    places.FAILED: update_pb2.UPDATE_STATE_FAILED,
}
_PASSING = (
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
)
_Metadata = tuple[tuple[str, str], ...]


class Updates:
    """The update that the board is in: a party of the stream. Used from one event loop; ``close()`` it."""

    def __init__(
        self,
        config: UpdateConfig,
        data_dir: Path,
        *,
        collector: str,
        device_id: str,
        runs: Runs,
        health: Callable[[], Awaitable[str]],
        free_floor_bytes: int = 0,
        credentials: Callable[[grpc.aio.Channel], Awaitable[_Metadata]] | None = None,
        channel: Callable[[str], grpc.aio.Channel] = open_channel,
        jitter: Callable[[], float] = random.random,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``health`` returns why this agent is not what it should be, nothing when it is.

        ``credentials`` is the metadata by which the collector knows the board.
        """
        self._config = config
        self._layout = Layout(config.root, data_dir)
        self._collector = collector
        self._device_id = device_id
        self._runs = runs
        self._health = health
        self._free_floor_bytes = free_floor_bytes
        self._credentials = credentials
        self._channel = channel
        self._jitter = jitter
        self._monotonic = monotonic
        self._offer: update_pb2.UpdateOffer | None = None
        self._report: update_pb2.UpdateReport | None = None
        self._unsaid = False
        self._said_at = 0.0
        # From when on the update is root's, and can't be given up for another.
        self._asked = False
        self._task: asyncio.Task[None] | None = None
        self.speak: Callable[[], None] = lambda: None
        """Called when there is something to say."""

    async def recover(self) -> None:
        """Takes up what a former life, or release, left. Called once, before a run can begin."""
        with contextlib.suppress(OSError, DecodeError):
            offer = update_pb2.UpdateOffer.FromString((self._layout.inbox / _OFFER).read_bytes())
            self._offer = offer if offer.update_id else None
        entry = places.read_entry(self._layout)
        if entry is not None and not entry.is_final:
            # A run that began now would be ended by a switch back.
            await self._runs.hold()
            if self._offer is None or self._offer.update_id != entry.update_id:
                self._offer = update_pb2.UpdateOffer(update_id=entry.update_id, package_sha256=entry.sha256)
        if self._offer is not None:
            self._begin(self._offer)

    async def close(self) -> None:
        """Ends what goes on here; what was fetched and asked for stays. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    # A party of the stream.

    def connected(self) -> None:
        """Says again how far it is."""
        self._unsaid = self._report is not None
        self.speak()

    def beat(self, heartbeat: collector_pb2.Heartbeat) -> None:
        """Adds nothing."""

    def hear(self, response: collector_pb2.ReportResponse) -> None:
        """Takes offers."""
        if response.WhichOneof("response") != "update":
            return
        offer = response.update
        busy = self._task is not None and not self._task.done()
        if self._offer is not None and self._offer.update_id == offer.update_id:
            self._unsaid = self._report is not None
            self.speak()
        elif busy and self._asked:
            self._say(
                update_pb2.UPDATE_STATE_FAILED, "another update is under way", update_id=offer.update_id
            )
        else:
            if self._task is not None:
                self._task.cancel()
            _log.info("update %s: release %s is offered", offer.update_id[:12], offer.version)
            self._offer = offer
            self._begin(offer)

    def say(self) -> list[collector_pb2.ReportRequest]:
        """How far it is."""
        if not self._unsaid or self._report is None:
            return []
        self._unsaid, self._said_at = False, self._monotonic()
        return [collector_pb2.ReportRequest(update=self._report)]

    def _say(
        self,
        state: update_pb2.UpdateState.ValueType,
        reason: str = "",
        fraction: float | None = None,
        *,
        update_id: str = "",
    ) -> None:
        if not update_id and self._offer is not None:
            update_id = self._offer.update_id
        before = self._report
        report = update_pb2.UpdateReport(
            update_id=update_id, state=state, reason=reason[:_MAX_REASON], fraction=fraction
        )
        if report == before:
            return
        self._report, self._unsaid = report, True
        if before is None or before.state != state or fraction is None:
            _log.info(
                "update %s: %s%s",
                update_id[:12],
                update_pb2.UpdateState.Name(state).removeprefix("UPDATE_STATE_").lower(),
                f": {reason}" if reason else "",
            )
        elif self._monotonic() - self._said_at < _REPORT_SECONDS:
            return
        self.speak()

    # An update.

    def _begin(self, offer: update_pb2.UpdateOffer) -> None:
        self._asked = False
        self._task = asyncio.ensure_future(self._work(offer))

    async def _work(self, offer: update_pb2.UpdateOffer) -> None:
        try:
            await self._see_through(offer)
        except (Refused, InspectError) as error:
            await self._end(update_pb2.UPDATE_STATE_FAILED, str(error))
        except OSError as error:
            reason = f"{self._layout.inbox}: {error.strerror or error}"
            await self._end(update_pb2.UPDATE_STATE_FAILED, reason)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a fault here must not end the agent, nor hold its runs
            _log.exception("update %s", offer.update_id)
            reason = f"the agent failed ({type(error).__name__}: {error}): please report this"
            await self._end(update_pb2.UPDATE_STATE_FAILED, reason)
        finally:
            self._asked = False
            self._runs.let_go()

    async def _see_through(self, offer: update_pb2.UpdateOffer) -> None:
        entry = places.read_entry(self._layout)
        if entry is None or entry.update_id != offer.update_id:
            await asyncio.to_thread(self._write_down, offer)
            running = self._running()
            if not self._config.take:
                raise Refused("the board takes no updates (update.take = false)")
            keys = places.trusted_keys(self._layout)
            package = await self._fetch(offer)
            manifest = await asyncio.to_thread(_verify, package, keys)
            places.check(manifest, running)
            if manifest.release == running.get("release"):
                await self._end(update_pb2.UPDATE_STATE_DONE, f"release {manifest.release} runs already")
                return
            self._say(update_pb2.UPDATE_STATE_READY, "it waits until no run is measured")
            await self._runs.hold()
            self._say(update_pb2.UPDATE_STATE_READY, "it waits for boardbench-update.service")
            self._asked = True
            await asyncio.to_thread(self._ask, offer)
        self._asked = True
        entry = await self._follow(offer)
        self._say(_FINAL[entry.state], entry.reason)
        await asyncio.to_thread(self._clean)

    async def _end(self, state: update_pb2.UpdateState.ValueType, reason: str) -> None:
        """It has ended before root began: nothing of it is taken up by the next life of the agent."""
        self._say(state, reason)
        await asyncio.to_thread(self._clean, _OFFER)

    async def _follow(self, offer: update_pb2.UpdateOffer) -> Entry:
        """How it ended. Raises Refused when nobody does it."""
        began = asked_at = moved_at = self._monotonic()
        last: Entry | None = None
        while True:
            entry = places.read_entry(self._layout)
            ours = entry is not None and entry.update_id == offer.update_id
            now = self._monotonic()
            if entry is not None and ours:
                if entry.is_final:
                    return entry
                if entry != last:
                    last, moved_at = entry, now
                if now - moved_at > _GIVE_UP_SECONDS:
                    raise Refused(
                        "boardbench-update.service has left it unfinished: journalctl -u boardbench-update"
                    )
                moved = entry.state in (places.SWITCHED, places.GOING_BACK)
                self._say(
                    update_pb2.UPDATE_STATE_SWITCHED if moved else update_pb2.UPDATE_STATE_READY,
                    entry.reason or ("" if moved else "it is being unpacked"),
                )
                if entry.state == places.SWITCHED and entry.token:
                    await self._tell_health(entry)
            elif now - began > _TAKEN_UP_SECONDS:
                await asyncio.to_thread((self._layout.inbox / "request.json").unlink, missing_ok=True)
                raise Refused(
                    "boardbench-update.service did not take it up: look at systemctl status "
                    "boardbench-update.path, which the agent's Debian package brings"
                )
            elif now - asked_at > _ASK_AGAIN_SECONDS:
                asked_at = now
                await asyncio.to_thread(self._ask, offer)
            await asyncio.sleep(_LOOK_SECONDS)

    async def _tell_health(self, entry: Entry) -> None:
        """The release that is looked at says whether it works; another one has nothing to say."""
        try:
            own = str(self._running().get("release", ""))
        except Refused:
            return
        if own != entry.to_release:
            return
        problem = await self._health()
        word = {"token": entry.token, "release": own, "healthy": not problem, "reason": problem}
        path = self._layout.inbox / "healthy.json"
        if places.read_object(path) != word:
            await asyncio.to_thread(folder.replace, path, json.dumps(word).encode())

    def _running(self) -> dict[str, Any]:
        """The release that this agent is of, by its release.json."""
        home = Path(sys.prefix).resolve()
        told = places.read_object(home / "release.json")
        if home.parent != self._layout.releases.resolve() or not told:
            raise Refused(
                f"this agent, in {home}, was not installed by its Debian package: update it as it was "
                "installed"
            )
        return told

    # What outlives this agent.

    def _write_down(self, offer: update_pb2.UpdateOffer) -> None:
        self._layout.inbox.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.replace(self._layout.inbox / _OFFER, offer.SerializeToString())

    def _ask(self, offer: update_pb2.UpdateOffer) -> None:
        request = {"update_id": offer.update_id, "sha256": offer.package_sha256}
        folder.replace(self._layout.inbox / "request.json", json.dumps(request).encode())

    def _clean(self, *more: str) -> None:
        for path in (*self._layout.inbox.glob("*.deb"), *self._layout.inbox.glob("*.part")):
            with contextlib.suppress(OSError):
                path.unlink()
        for name in ("request.json", "healthy.json", *more):
            with contextlib.suppress(OSError):
                (self._layout.inbox / name).unlink(missing_ok=True)

    # The package.

    async def _fetch(self, offer: update_pb2.UpdateOffer) -> Path:
        """The package, whole. Goes on after broken links for as long as it takes."""
        sha256 = offer.package_sha256
        if not _SHA256.fullmatch(sha256) or offer.package_bytes < 1:
            raise Refused("the offer names no package")
        package, part = (self._layout.inbox / f"{sha256}.{suffix}" for suffix in ("deb", "part"))
        if package.exists():
            return package
        await asyncio.to_thread(self._make_room, offer, part)
        failures = damaged = 0
        while True:
            had = await asyncio.to_thread(_size, part)
            self._say(update_pb2.UPDATE_STATE_FETCHING, fraction=had / offer.package_bytes)
            if had < offer.package_bytes:
                reason = await self._fetch_more(offer, part, had)
            else:
                if await asyncio.to_thread(_settle, part, package, offer):
                    return package
                damaged += 1
                reason = f"{offer.package_name} came damaged"
                if damaged >= _DAMAGED_TRIES:
                    raise Refused(f"{reason}, {damaged} times")
            if not reason or await asyncio.to_thread(_size, part) > had:
                failures = 0
            if reason:
                bound = min(_LONGEST_RETRY_SECONDS, _FIRST_RETRY_SECONDS * 2 ** min(failures, 16))
                failures += 1
                _log.info("update %s: %s; trying again", offer.update_id[:12], reason)
                await asyncio.sleep(bound * self._jitter())

    def _make_room(self, offer: update_pb2.UpdateOffer, part: Path) -> None:
        """Raises Refused where the disk would be too full."""
        for path in (*self._layout.inbox.glob("*.deb"), *self._layout.inbox.glob("*.part")):
            if path != part:
                path.unlink(missing_ok=True)
        status = os.statvfs(self._layout.inbox)
        lacking = offer.package_bytes - _size(part)
        if status.f_bavail * status.f_frsize < lacking + self._free_floor_bytes:
            raise Refused(
                f"the package has {offer.package_bytes / 1e6:.0f} MB, and {self._layout.inbox} has no room "
                "for it beside what is to stay free (store.free_floor_bytes)"
            )

    async def _fetch_more(self, offer: update_pb2.UpdateOffer, part: Path, had: int) -> str:
        """Why it ended before the package was whole; nothing when it is."""
        try:
            async with self._channel(self._collector) as channel:
                metadata = await self._credentials(channel) if self._credentials is not None else ()
                call = job_pb2_grpc.JobServiceStub(channel).FetchFile(
                    job_pb2.FetchFileRequest(
                        sha256=offer.package_sha256, offset_bytes=had, device_id=self._device_id
                    ),
                    metadata=metadata,
                )
                try:
                    while had < offer.package_bytes:
                        response = await _soon(call.read())
                        if response is None:
                            return "the collector ended before the package was whole"
                        chunk = response.chunk
                        if chunk.offset_bytes != had or zlib.crc32(chunk.data) != chunk.crc32:
                            return "a piece of it came damaged"
                        if not chunk.data or had + len(chunk.data) > offer.package_bytes:
                            return "more came than the package has"
                        await asyncio.to_thread(_append, part, chunk.data)
                        had += len(chunk.data)
                        self._say(update_pb2.UPDATE_STATE_FETCHING, fraction=had / offer.package_bytes)
                finally:
                    call.cancel()
        except grpc.aio.AioRpcError as error:
            reason = f"{error.details() or 'no reason given'} ({error.code().name})"
            if error.code() not in _PASSING:
                raise Refused(f"{offer.package_name} can't be had of the collector: {reason}") from None
            return reason
        except TimeoutError as error:
            return str(error)
        return ""


def _verify(package: Path, keys: tuple[bytes, ...]) -> release.Manifest:
    with package.open("rb") as file:
        return release.verify(file, keys)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _append(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        folder.write_all(descriptor, data)
    finally:
        os.close(descriptor)


def _settle(part: Path, package: Path, offer: update_pb2.UpdateOffer) -> bool:
    """Whether it is the package, which then has its name for good; else it is gone."""
    # Only then: a board that waits has no use for it.
    import hashlib

    digest = hashlib.sha256()
    with part.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
        os.fsync(file.fileno())
    if digest.hexdigest() != offer.package_sha256:
        part.unlink()
        return False
    part.replace(package)
    folder.sync(package.parent)
    return True


async def _soon(read: Coroutine[Any, Any, Any]) -> job_pb2.FetchFileResponse | None:
    """What comes next; None at the end. Raises TimeoutError when nothing does."""
    task = asyncio.ensure_future(read)
    try:
        await asyncio.wait([task], timeout=_STALL_SECONDS)
        if not task.done():
            raise TimeoutError(f"nothing of the package came within {_STALL_SECONDS:g} s")
        response = task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if response is grpc.aio.EOF:
        return None
    assert isinstance(response, job_pb2.FetchFileResponse)
    return response
