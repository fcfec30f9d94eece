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
import random
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import grpc
from google.protobuf.message import DecodeError

from boardbench.agent import folder
from boardbench.agent.config import UpdateConfig
from boardbench.agent.errors import AgentError, CorruptChunk, DigestMismatch
from boardbench.agent.fetch import Credentials, Fetcher
from boardbench.agent.part import Part, size_bytes
from boardbench.agent.queue import Runs
from boardbench.agent.stream import open_channel
from boardbench.agent.update import layout as places
from boardbench.agent.update.layout import Entry, Layout, Refused
from boardbench.inspect import release
from boardbench.inspect.errors import InspectError
from boardbench.v1 import collector_pb2, update_pb2

_log = logging.getLogger(__name__)

_REPORT_SECONDS = 0.5
_LOOK_SECONDS = 0.2
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
_ARRIVING = ("*.deb", "*.part", "*.crc")
_P = ParamSpec("_P")
_T = TypeVar("_T")


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
        credentials: Credentials | None = None,
        channel: Callable[[str], grpc.aio.Channel] = open_channel,
        jitter: Callable[[], float] = random.random,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        """``health`` returns why this agent is not what it should be, nothing when it is.

        ``credentials`` is the metadata by which the collector knows the board.
        """
        self._config = config
        self._layout = Layout(config.root, data_dir)
        # It is started by way of `current`, which leads to another release before this agent has ended.
        self._home = Path(sys.prefix).resolve()
        self._runs = runs
        self._health = health
        self._free_floor_bytes = free_floor_bytes
        self._fetcher = Fetcher(collector, device_id, credentials=credentials, channel=channel, jitter=jitter)
        self._monotonic = monotonic
        self._offer: update_pb2.UpdateOffer | None = None
        self._report: update_pb2.UpdateReport | None = None
        self._unsaid = False
        self._said_at = 0.0
        # From when on the update is root's, and can't be given up for another.
        self._asked = False
        self._task: asyncio.Task[None] | None = None
        self._turn = asyncio.Lock()
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
        async with self._turn:
            # Those that it took the place of have let go, too.
            pass

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
        """Instead of what goes on, if anything does."""
        former, self._asked = self._task, False
        if former is not None:
            former.cancel()
        self._task = asyncio.ensure_future(self._in_turn(offer))

    async def _in_turn(self, offer: update_pb2.UpdateOffer) -> None:
        # What it takes the place of lets go of its files, and of the runs, before.
        async with self._turn:
            await self._work(offer)

    async def _work(self, offer: update_pb2.UpdateOffer) -> None:
        try:
            await self._see_through(offer)
        except (Refused, AgentError, InspectError) as error:
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
            await folder.whole(asyncio.to_thread(self._write_down, offer))
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
        await folder.whole(asyncio.to_thread(self._clean))

    async def _end(self, state: update_pb2.UpdateState.ValueType, reason: str) -> None:
        """It has ended before root began: nothing of it is taken up by the next life of the agent."""
        self._say(state, reason)
        await folder.whole(asyncio.to_thread(self._clean, _OFFER))

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
        told = places.read_object(self._home / "release.json")
        if self._home.parent != self._layout.releases.resolve() or not told:
            raise Refused(
                f"this agent, in {self._home}, was not installed by its Debian package: update it as it was "
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
        for path in self._arriving():
            with contextlib.suppress(OSError):
                path.unlink()
        for name in ("request.json", "healthy.json", *more):
            with contextlib.suppress(OSError):
                (self._layout.inbox / name).unlink(missing_ok=True)

    # The package.

    async def _fetch(self, offer: update_pb2.UpdateOffer) -> Path:
        """The package, whole."""
        sha256 = offer.package_sha256
        if not _SHA256.fullmatch(sha256) or offer.package_bytes < 1:
            raise Refused("the offer names no package")
        package, part = (self._layout.inbox / f"{sha256}.{suffix}" for suffix in ("deb", "part"))
        if package.exists():
            return package
        await folder.whole(asyncio.to_thread(self._make_room, offer, part))

        def say(fraction: float) -> None:
            self._say(update_pb2.UPDATE_STATE_FETCHING, fraction=fraction)

        say(size_bytes(part) / offer.package_bytes)
        await self._fetcher.fetch(
            sha256,
            offer.package_name,
            lambda: _arrival(part, package, offer),
            lambda: size_bytes(part),
            say,
            # Pieces only take time: there is no other board that could do it instead.
            hopeless=DigestMismatch,
        )
        return package

    def _make_room(self, offer: update_pb2.UpdateOffer, part: Path) -> None:
        """Raises Refused where the disk would be too full."""
        for path in self._arriving():
            if path.stem != part.stem:
                path.unlink(missing_ok=True)
        lacking = offer.package_bytes - size_bytes(part)
        if folder.free_bytes(self._layout.inbox) < lacking + self._free_floor_bytes:
            raise Refused(
                f"the package has {offer.package_bytes / 1e6:.0f} MB, and {self._layout.inbox} has no room "
                "for it beside what is to stay free (store.free_floor_bytes)"
            )

    def _arriving(self) -> list[Path]:
        return [path for pattern in _ARRIVING for path in self._layout.inbox.glob(pattern)]


class _Arrival:
    """The package on its way into the inbox: a :class:`~boardbench.agent.fetch.Arrival`."""

    def __init__(self, part: Part, package: Path, offer: update_pb2.UpdateOffer) -> None:
        self.size_bytes = offer.package_bytes
        self.stored = self.damaged = False
        self._part = part
        self._package = package
        self._offer = offer

    @property
    def offset_bytes(self) -> int:
        """The first byte that is lacking."""
        return self._part.good_bytes

    @property
    def complete(self) -> bool:
        """Whether no byte is lacking."""
        return self.offset_bytes == self.size_bytes

    async def open(self) -> None:
        """Takes up what is there."""
        await self._do(self._part.open, self.size_bytes)
        while not await self._do(self._part.read_back):
            pass

    async def write(self, *, offset_bytes: int, data: bytes, crc32: int) -> None:
        """Takes a piece. Raises CorruptChunk."""
        if not data or offset_bytes != self.offset_bytes or offset_bytes + len(data) > self.size_bytes:
            raise CorruptChunk(
                f"{self._offer.package_name}: {len(data)} bytes from byte {offset_bytes} on came where "
                f"byte {self.offset_bytes} of {self.size_bytes} was due"
            )
        await self._do(self._part.append, data, crc32)

    async def finish(self) -> None:
        """The package has its name for good. Raises DigestMismatch."""
        if self._part.digest() != self._offer.package_sha256:
            self.damaged = True
            raise DigestMismatch(f"it is not the release {self._offer.version} that was offered")
        await self._do(self._part.sync)
        await self._do(self._settle)

    def _settle(self) -> None:
        self._part.path.replace(self._package)
        self._part.path.with_suffix(".crc").unlink(missing_ok=True)
        folder.sync(self._package.parent)
        self.stored = True

    async def close(self) -> None:
        """Lets go of the files."""
        await self._do(self._part.close, self.stored, self.damaged)

    @staticmethod
    async def _do(work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What the work on the disk returns, which is done to its end even when the caller breaks off."""
        return await folder.whole(asyncio.to_thread(work, *args, **kwargs))


@contextlib.asynccontextmanager
async def _arrival(part: Path, package: Path, offer: update_pb2.UpdateOffer) -> AsyncIterator[_Arrival]:
    arrival = _Arrival(Part(part, offer.package_name), package, offer)
    try:
        await arrival.open()
        yield arrival
    finally:
        await arrival.close()


def _verify(package: Path, keys: tuple[bytes, ...]) -> release.Manifest:
    with package.open("rb") as file:
        return release.verify(file, keys)
