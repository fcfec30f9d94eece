"""The agent's models and inputs, each by the SHA-256 of its bytes; bounded.

    files/<sha256>.<format>     the bytes
    files/<sha256>.json         name, kind and size; written before the bytes get their name, so bytes
                                without it, or of another size, were never finished
    arriving/                   what has come of files that are not whole (:mod:`boardbench.agent.part`)

The event loop's thread owns everything but the work on the disk, which runs in one worker thread.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from boardbench.agent import folder
from boardbench.agent.errors import (
    AgentError,
    DiskFull,
    InvalidTransfer,
    ModelInUse,
    ModelNotFound,
    NoRoom,
    OverQuota,
    StorageError,
    Superseded,
    Unavailable,
)
from boardbench.agent.formats import Mark
from boardbench.agent.part import CHUNK_LIMIT_BYTES, Part
from boardbench.agent.receive import StoredFile, Transfer
from boardbench.agent.recognise import FileKind, check_label, clean_name

_log = logging.getLogger(__name__)

# Two of the largest chunks: one in the worker, one waiting for it. More does not make it faster. Shared by
# all transfers, as the worker is.
_QUEUE_LIMIT_BYTES = 2 * CHUNK_LIMIT_BYTES
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FORMAT = re.compile(r"[a-z][a-z0-9_]{0,31}")
_P = ParamSpec("_P")
_T = TypeVar("_T")


@dataclass(frozen=True)
class StoreStatus:
    """How full the store is; what has come of unfinished files counts as used."""

    used_bytes: int
    limit_bytes: int
    free_floor_bytes: int
    free_bytes: int
    files: int


@dataclass
class _Kept:
    """Something that may have to go; the lowest ``turn`` goes first, whatever the clock does."""

    sha256: str
    size_bytes: int
    used_at: float
    turn: int = 0


@dataclass
class _Leftover(_Kept):
    """An unfinished file that nobody is sending."""


@dataclass
class _Entry(_Kept):
    """A verified file."""

    name: str = ""
    format: str = ""
    kind: FileKind = FileKind.MODEL
    leases: int = 0


class ModelStore:
    """Files by their SHA-256, bounded; the least recently used goes first and never one in use.

    Opening it reads the folder: what is not whole is dropped with a log line. Used from one event loop;
    ``close()`` it. Raises ConfigurationError when the folder can't be owned, StorageError when the disk
    fails.
    """

    def __init__(
        self,
        root: Path,
        limit_bytes: int,
        free_floor_bytes: int,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        statvfs: Callable[[Path], os.statvfs_result] = os.statvfs,
        write: Callable[[int, memoryview], int] = os.write,
        # A client that comes back after its connection broke must not wait until the dead one is noticed.
        stall_seconds: float = 5.0,
        leftover_seconds: float = 7 * 86400.0,
        # What engines from elsewhere say of their formats; asked for files that are of no format known here.
        marks: Callable[[], Awaitable[Sequence[Mark]]] | None = None,
    ) -> None:
        self._root = root
        self._marks = marks
        self._limit_bytes = limit_bytes
        self._free_floor_bytes = free_floor_bytes
        self._clock = clock
        self._monotonic = monotonic
        self._statvfs = statvfs
        self._write = write
        self._stall_seconds = stall_seconds
        self._leftover_seconds = leftover_seconds
        self._files = root / "files"
        self._arriving = root / "arriving"
        self._entries: dict[str, _Entry] = {}
        self._leftovers: dict[str, _Leftover] = {}
        self._transfers: dict[str, Transfer] = {}
        self._transfers_ended = 0
        self._turns = 0
        self._admission = asyncio.Lock()
        self._closed = self._worker_ended = False
        try:
            self._claim = folder.claim(root)
        except OSError as error:
            raise StorageError(f"{root}: can't be made: {error.strerror}; check the disk") from error
        try:
            self._files.mkdir(exist_ok=True)
            self._arriving.mkdir(exist_ok=True)
            self._read_files()
            self._read_leftovers()
            self._trim()
        except OSError as error:
            os.close(self._claim)
            raise StorageError(f"{root}: can't be read: {error}; check the disk") from error
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-store")

    # What is there.

    def status(self) -> StoreStatus:
        """How full the store and its file system are."""
        return StoreStatus(
            used_bytes=self._used_bytes(),
            limit_bytes=self._limit_bytes,
            free_floor_bytes=self._free_floor_bytes,
            free_bytes=self._free_bytes(),
            files=len(self._entries),
        )

    @property
    def transfers(self) -> tuple[int, int]:
        """How many go on, and how many have ended since the store was opened."""
        return len(self._transfers), self._transfers_ended

    def files(self) -> tuple[StoredFile, ...]:
        """Every file, the one used last first."""
        entries = sorted(self._entries.values(), key=lambda entry: entry.turn, reverse=True)
        return tuple(self._stored(entry) for entry in entries)

    def get(self, sha256: str) -> StoredFile:
        """The file. Raises ModelNotFound."""
        return self._stored(self._find(sha256))

    def arrived_bytes(self, sha256: str) -> int:
        """What has come of a file that is not whole."""
        arriving: Transfer | _Leftover | None = self._transfers.get(sha256) or self._leftovers.get(sha256)
        if arriving is None:
            return 0
        return arriving.arrived_bytes if isinstance(arriving, Transfer) else arriving.size_bytes

    @contextmanager
    def lease(self, sha256: str) -> Iterator[StoredFile]:
        """The file, which stays until the lease ends; leases nest. Raises ModelNotFound."""
        entry = self._find(sha256)
        entry.leases += 1
        self._touch(entry)
        try:
            yield self._stored(entry)
        finally:
            entry.leases -= 1
            self._touch(entry)

    async def delete(self, sha256: str) -> None:
        """Removes the file for good. Raises ModelNotFound, ModelInUse, StorageError, Unavailable."""
        self._check_open()
        entry = self._find(sha256)
        if entry.leases:
            raise ModelInUse(
                f"{entry.name} ({entry.sha256[:12]}) is used by a waiting or running job; "
                "cancel that or wait for its end"
            )
        del self._entries[entry.sha256]
        try:
            await self.in_worker(self._unlink, entry)
        except OSError as error:
            if self._path(entry).exists():
                # It still takes its room, and can be asked to go again.
                self._entries.setdefault(entry.sha256, entry)
            raise StorageError(
                f"{entry.name} ({entry.sha256[:12]}) can't be removed: {error}; check the disk"
            ) from error

    async def close(self) -> None:
        """Ends every transfer, keeping what has come, and gives the folder back. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for transfer in tuple(self._transfers.values()):
            await transfer.end(_stopping())
        self._worker_ended = True
        await asyncio.get_running_loop().run_in_executor(None, self._worker.shutdown)
        os.close(self._claim)

    # What comes.

    @asynccontextmanager
    async def receive(
        self, *, sha256: str, name: str, size_bytes: int, kind: FileKind = FileKind.MODEL
    ) -> AsyncIterator[Transfer]:
        """A transfer of the file with this digest that takes bytes from its ``offset_bytes`` on.

        When its ``stored`` is set there is nothing to send. While another client sends the same file this
        waits, and goes on from its bytes when it ends or stalls. Leaving the context without ``finish()``
        keeps what has come. Raises InvalidTransfer, MislabelledFile, NoRoom, StorageError, Unavailable.
        """
        digest = sha256.lower()
        if not _DIGEST.fullmatch(digest):
            raise InvalidTransfer(f"the sha256 in the header, {sha256[:80]!r}, is not 64 hexadecimal digits")
        name = clean_name(name) or digest[:12]
        if size_bytes < 1:
            raise InvalidTransfer(f"{name} is empty ({size_bytes} bytes); check the file")
        transfer = await self._begin(digest, name, size_bytes, kind)
        try:
            yield transfer
        finally:
            await transfer.end()

    async def _begin(self, sha256: str, name: str, size_bytes: int, kind: FileKind) -> Transfer:
        while True:
            self._check_open()
            entry = self._entries.get(sha256)
            if entry is not None:
                return await self._again(entry, name, size_bytes, kind)
            rival = self._transfers.get(sha256)
            if rival is None:
                break
            await self._outlast(rival)
        part = Part(self._arriving / f"{sha256}.part", name, self._write)
        transfer = Transfer(self, sha256, name, size_bytes, kind, part)
        leftover = self._leftovers.pop(sha256, None)
        if leftover is not None:
            transfer.arrived_bytes = min(leftover.size_bytes, size_bytes)
        self._transfers[sha256] = transfer
        try:
            await self._drop_old_leftovers()
            await self.make_room(transfer)
            await transfer.open()
        except NoRoom as error:
            await transfer.end(error)
            raise
        except BaseException:
            await transfer.end()
            raise
        return transfer

    async def _again(self, entry: _Entry, name: str, size_bytes: int, kind: FileKind) -> Transfer:
        """A transfer of a file that is here: nothing to send, but its name and its use are news."""
        if entry.size_bytes != size_bytes:
            raise InvalidTransfer(
                f"{name}: the file with sha256 {entry.sha256} has {entry.size_bytes} bytes "
                f"and not {size_bytes} as the header says"
            )
        check_label(name, kind, entry.format)
        self._touch(entry)
        transfer = Transfer(self, entry.sha256, name, size_bytes, kind, None)
        transfer.offset_bytes = size_bytes
        if entry.name != name:
            entry.name = name
            try:
                await self.in_worker(self._write_card, entry)
            except OSError as error:
                _log.warning("%s: the new name can't be kept: %s", name, error)
        transfer.stored, transfer.already_present = self._stored(entry), True
        return transfer

    async def _outlast(self, rival: Transfer) -> None:
        """Returns when the other transfer has ended or may have moved; ends it when it makes no progress."""
        idle = rival.idle_seconds()
        if idle is not None and idle >= self._stall_seconds:
            await rival.end(
                Superseded(f"{rival.name}: no bytes came, so another client took the push over; push again")
            )
            return
        # Not asyncio.wait_for: before Python 3.12 that one can swallow a cancellation (python/cpython#86296).
        over = asyncio.ensure_future(rival.over.wait())
        try:
            await asyncio.wait([over], timeout=self._stall_seconds - (idle or 0.0))
        finally:
            over.cancel()

    # Room.

    async def make_room(self, transfer: Transfer) -> None:
        """Room for the rest of the transfer, removing what is used least. Raises OverQuota, DiskFull."""
        async with self._admission:
            await self._drop(self._victims(transfer))

    async def _drop_old_leftovers(self) -> None:
        oldest = self._clock() - self._leftover_seconds
        await self._drop([leftover for leftover in self._leftovers.values() if leftover.used_at < oldest])

    async def _drop(self, victims: Sequence[_Kept]) -> None:
        jobs = []
        # All at once: while the disk works on one, another could be leased, taken up or deleted.
        for victim in victims:
            self._forget(victim)
            jobs.append(self.submit(self._remove, victim))
        if jobs:
            # wait() leaves them alone when this is cancelled.
            await asyncio.wait(jobs)

    def _victims(self, transfer: Transfer) -> list[_Kept]:
        """What has to go so that the transfer fits, least recently used first."""
        name, size = transfer.name, transfer.size_bytes
        if size > self._limit_bytes:
            raise OverQuota(
                f"{name} has {_size(size)} and the model store may hold {_size(self._limit_bytes)}; "
                "raise store.limit_bytes in the agent's configuration"
            )
        others = [other for other in self._transfers.values() if other is not transfer]
        kept_bytes = sum(kept.size_bytes for kept in (*self._entries.values(), *self._leftovers.values()))
        taken = kept_bytes + sum(other.size_bytes for other in others)
        # What the others still have to write is as good as gone.
        free = self._free_bytes() - sum(other.size_bytes - other.arrived_bytes for other in others)
        rest = size - transfer.arrived_bytes
        over_quota = taken + size - self._limit_bytes
        over_floor = rest + self._free_floor_bytes - free
        removable: list[_Kept] = [entry for entry in self._entries.values() if not entry.leases]
        removable += self._leftovers.values()
        removable_bytes = sum(kept.size_bytes for kept in removable)
        if over_quota > removable_bytes:
            raise OverQuota(
                f"{name} needs {_size(size)} and the model store can make room for "
                f"{_size(size - over_quota + removable_bytes)}: it may hold {_size(self._limit_bytes)}, and "
                f"{_size(taken - removable_bytes)} are in use by jobs or arriving; wait for those, or raise "
                "store.limit_bytes in the agent's configuration"
            )
        if rest > 0 and over_floor > removable_bytes:
            raise DiskFull(
                f"{name} needs {_size(rest)} and the file system of {self._root} has {_size(free)} free, of "
                f"which {_size(self._free_floor_bytes)} stay free for the system (store.free_floor_bytes in "
                f"the agent's configuration); removing unused models would free {_size(removable_bytes)}; "
                "make room on the board"
            )
        needed = max(over_quota, over_floor if rest > 0 else 0)
        victims: list[_Kept] = []
        for kept in sorted(removable, key=lambda kept: kept.turn):
            if needed <= 0:
                break
            needed -= kept.size_bytes
            victims.append(kept)
        return victims

    def _forget(self, kept: _Kept) -> None:
        if isinstance(kept, _Entry):
            del self._entries[kept.sha256]
            _log.info("%s (%s): removed to make room", kept.name, kept.sha256[:12])
        else:
            del self._leftovers[kept.sha256]
            _log.info("unfinished upload of %s: removed", kept.sha256[:12])

    def _used_bytes(self) -> int:
        kept_bytes = sum(kept.size_bytes for kept in (*self._entries.values(), *self._leftovers.values()))
        return kept_bytes + sum(transfer.arrived_bytes for transfer in self._transfers.values())

    def _free_bytes(self) -> int:
        try:
            return folder.free_bytes(self._root, self._statvfs)
        except OSError as error:
            raise StorageError(f"{self._root}: can't be looked at: {error}; check the disk") from error

    # For the transfers of this store.

    def submit(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> asyncio.Future[_T]:
        """Queues work on the disk. Raises Unavailable."""
        assert not kwargs
        if self._worker_ended:
            raise _stopping()
        return asyncio.get_running_loop().run_in_executor(self._worker, work, *args)

    async def in_worker(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What the work on the disk returns; once queued it is done, even when the caller is cancelled."""
        return await asyncio.shield(self.submit(work, *args, **kwargs))

    async def admit(self, transfer: Transfer, format: str) -> StoredFile:
        """The transferred file as one of the store's, named and synced."""
        entry = _Entry(
            sha256=transfer.sha256,
            size_bytes=transfer.size_bytes,
            used_at=self._clock(),
            name=transfer.name,
            format=format,
            kind=transfer.kind,
        )
        await self.in_worker(self._settle, entry)
        self._take_turn(entry)
        self._entries[entry.sha256] = entry
        return self._stored(entry)

    def ended(self, transfer: Transfer, left_bytes: int) -> None:
        """The transfer has let go of its files; another one can take up what it left."""
        del self._transfers[transfer.sha256]
        self._transfers_ended += 1
        if left_bytes:
            leftover = _Leftover(transfer.sha256, left_bytes, self._clock())
            self._take_turn(leftover)
            self._leftovers[leftover.sha256] = leftover

    def now(self) -> float:
        """Seconds on a clock that never jumps."""
        return self._monotonic()

    async def marks(self) -> Sequence[Mark]:
        """How files of formats are known that engines from elsewhere bring."""
        return await self._marks() if self._marks is not None else ()

    def queue_limit_bytes(self) -> int:
        """How much one transfer may have in memory."""
        return _QUEUE_LIMIT_BYTES // max(1, len(self._transfers))

    def disk_error(self, error: OSError, name: str, needed_bytes: int) -> AgentError:
        """What an error of the disk means to the person who pushes."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(
                f"{name}: the disk filled up: {_size(needed_bytes)} are still needed and the file system of "
                f"{self._root} has {_size(self._free_bytes())} free; make room on the board and push again"
            )
        if error.errno == errno.EFBIG:
            return DiskFull(f"{name}: {_size(needed_bytes)} more are too much for a file on {self._root}")
        return StorageError(f"{name}: the board can't keep it: {error}; check the disk of {self._root}")

    # Entries.

    def _check_open(self) -> None:
        if self._closed:
            raise _stopping()

    def _find(self, sha256: str) -> _Entry:
        entry = self._entries.get(sha256.lower())
        if entry is None:
            raise ModelNotFound(f"no file with sha256 {sha256[:80]!r} is on this board; push it first")
        return entry

    def _stored(self, entry: _Entry) -> StoredFile:
        return StoredFile(
            sha256=entry.sha256,
            name=entry.name,
            format=entry.format,
            size_bytes=entry.size_bytes,
            kind=entry.kind,
            path=self._path(entry),
            used_at=entry.used_at,
            in_use=entry.leases > 0,
        )

    def _path(self, entry: _Entry) -> Path:
        return self._files / f"{entry.sha256}.{entry.format}"

    def _card(self, sha256: str) -> Path:
        return self._files / f"{sha256}.json"

    def _take_turn(self, kept: _Kept) -> None:
        self._turns += 1
        kept.turn = self._turns

    def _touch(self, entry: _Entry) -> None:
        entry.used_at = self._clock()
        self._take_turn(entry)
        try:
            os.utime(self._card(entry.sha256), (entry.used_at, entry.used_at))
        except OSError as error:
            _log.debug("%s: the time of use can't be kept: %s", entry.name, error)

    # On the disk: in the worker, or before there is one.

    def _settle(self, entry: _Entry) -> None:
        try:
            self._write_card(entry)
            (self._arriving / f"{entry.sha256}.part").rename(self._path(entry))
            folder.sync(self._files)
        except OSError:
            # The push fails: nothing of it may be there, uncounted, and be taken for whole at the next start.
            for path in (self._path(entry), self._card(entry.sha256)):
                with suppress(OSError):
                    path.unlink()
            raise
        (self._arriving / f"{entry.sha256}.crc").unlink(missing_ok=True)

    def _write_card(self, entry: _Entry) -> None:
        card = {
            "name": entry.name,
            "format": entry.format,
            "kind": entry.kind.value,
            "size_bytes": entry.size_bytes,
        }
        path = self._card(entry.sha256)
        folder.replace(path, json.dumps(card).encode())
        os.utime(path, (entry.used_at, entry.used_at))

    def _remove(self, kept: _Kept) -> None:
        try:
            self._unlink(kept)
        except OSError as error:
            _log.warning("%s: can't be removed: %s", kept.sha256, error)

    def _unlink(self, kept: _Kept) -> None:
        if isinstance(kept, _Entry):
            # The bytes first: a card without bytes takes no room and is dropped at the next start.
            self._path(kept).unlink(missing_ok=True)
            self._card(kept.sha256).unlink(missing_ok=True)
            folder.sync(self._files)
        else:
            for suffix in (".part", ".crc"):
                (self._arriving / f"{kept.sha256}{suffix}").unlink(missing_ok=True)

    def _read_files(self) -> None:
        read = [self._read_entry(card) for card in self._files.glob("*.json")]
        found = [entry for entry in read if entry is not None]
        for entry in sorted(found, key=lambda entry: entry.used_at):
            self._take_turn(entry)
            self._entries[entry.sha256] = entry
        wanted = {path.name for entry in found for path in (self._card(entry.sha256), self._path(entry))}
        for path in self._files.iterdir():
            if path.name not in wanted:
                _log.warning("%s: no whole file of the model store; removed", path)
                path.unlink()

    def _read_entry(self, card: Path) -> _Entry | None:
        try:
            told = json.loads(card.read_bytes())
            entry = _Entry(
                sha256=card.stem,
                size_bytes=int(told["size_bytes"]),
                used_at=card.stat().st_mtime,
                name=str(told["name"]),
                format=str(told["format"]),
                kind=FileKind(told["kind"]),
            )
            # Which formats engines from elsewhere bring is not known yet: any name of one will do.
            if not _DIGEST.fullmatch(entry.sha256) or not _FORMAT.fullmatch(entry.format):
                raise ValueError("neither digest nor format can be")
            size_bytes = self._path(entry).stat().st_size
            if size_bytes != entry.size_bytes:
                raise ValueError(f"{size_bytes} bytes are there and {entry.size_bytes} were stored")
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s: can't be used: %s", card, error)
            return None
        return entry

    def _read_leftovers(self) -> None:
        found: list[_Leftover] = []
        for path in self._arriving.glob("*.part"):
            if _DIGEST.fullmatch(path.stem) and path.stem not in self._entries:
                about = path.stat()
                found.append(_Leftover(path.stem, about.st_size, about.st_mtime))
        oldest = self._clock() - self._leftover_seconds
        for leftover in sorted(found, key=lambda leftover: leftover.used_at):
            if leftover.used_at >= oldest:
                self._take_turn(leftover)
                self._leftovers[leftover.sha256] = leftover
        for path in self._arriving.iterdir():
            if path.stem not in self._leftovers:
                _log.info("%s: left of an old upload; removed", path)
                path.unlink()

    def _trim(self) -> None:
        """Down to the limit, which may be lower than it was."""
        for kept in sorted((*self._entries.values(), *self._leftovers.values()), key=lambda kept: kept.turn):
            if self._used_bytes() <= self._limit_bytes:
                break
            self._forget(kept)
            self._unlink(kept)


def _stopping() -> Unavailable:
    return Unavailable("the agent is stopping; push again when it is back")


def _size(count: int) -> str:
    """A number of bytes for people: "1.5 MB"."""
    amount = float(max(0, count))
    for unit in ("bytes", "kB", "MB"):
        if amount < 1000:
            return f"{amount:.0f} {unit}" if unit == "bytes" else f"{amount:.1f} {unit}"
        amount /= 1000
    return f"{amount:.1f} GB"
