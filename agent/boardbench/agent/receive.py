"""Chunks in, a verified file out: the agent's models and inputs, each by the SHA-256 of its bytes.

    files/<sha256>.<format>     the bytes
    files/<sha256>.json         name, kind and size; written before the bytes get their name, so bytes
                                without it, or of another size, were never finished
    arriving/<sha256>.part      what has come of a file
    arriving/<sha256>.crc       length and CRC-32 of each block of it: after a power cut the blocks that
                                still match are kept, and the rest is asked for again

The event loop's thread owns everything but the work on the disk: writing, hashing and syncing run in one
worker thread, so that the loop stays free and jobs stay in their order.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import json
import logging
import os
import re
import struct
import time
import unicodedata
import zlib
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

from boardbench.agent import folder
from boardbench.agent.bench import runtimes
from boardbench.agent.errors import (
    AgentError,
    CorruptChunk,
    DamagedFile,
    DigestMismatch,
    DiskFull,
    InvalidRequest,
    InvalidTransfer,
    MislabelledFile,
    ModelInUse,
    ModelNotFound,
    NoRoom,
    OverQuota,
    StorageError,
    Superseded,
    Unavailable,
    UnknownFormat,
)
from boardbench.agent.formats import HEAD_BYTES, Mark, claimed, marked
from boardbench.inspect import sniff
from boardbench.inspect.errors import InspectError

_log = logging.getLogger(__name__)

# The wire's own limit of a chunk.
CHUNK_LIMIT_BYTES = 2 * 1024 * 1024
# Two of the largest chunks: one in the worker, one waiting for it. More does not make it faster. Shared by
# all transfers, as the worker is.
_QUEUE_LIMIT_BYTES = 2 * CHUNK_LIMIT_BYTES
# A block of the journal: what a killed agent loses at most of an unfinished transfer.
_BLOCK_BYTES = 1024 * 1024
# The chunk that fills a block closes it.
_BLOCK_LIMIT_BYTES = _BLOCK_BYTES + CHUNK_LIMIT_BYTES
_BLOCK = struct.Struct("<II")
# Read back in one job when a transfer resumes, so that other transfers get their turn.
_VERIFY_STEP_BYTES = 8 * 1024 * 1024
# How often a transfer looks at the free space, which others use up too.
_ROOM_CHECK_BYTES = 16 * 1024 * 1024
_NAME_LIMIT = 128
_SUFFIX_LIMIT = 16
_DIGEST = re.compile(r"[0-9a-f]{64}")
_FORMAT = re.compile(r"[a-z][a-z0-9_]{0,31}")
# File name endings that promise a format. ".pt", ".xml" and ".zip" promise nothing.
_CLAIMS = {
    ".tflite": "tflite",
    ".lite": "tflite",
    ".onnx": "onnx",
    ".pte": "executorch",
    ".ptl": "torchscript",
    ".torchscript": "torchscript",
    ".mlmodel": "coreml",
    ".mlpackage": "coreml",
    ".engine": "tensorrt",
    ".plan": "tensorrt",
    ".trt": "tensorrt",
    ".npz": "npz",
}
_P = ParamSpec("_P")
_T = TypeVar("_T")


class FileKind(str, enum.Enum):
    """What a file is for. See ``boardbench.v1.FileKind``."""

    MODEL = "FILE_KIND_MODEL"
    INPUTS = "FILE_KIND_INPUTS"


@dataclass(frozen=True)
class StoredFile:
    """A verified file. ``used_at`` is Unix time; ``path`` is there for as long as the file is leased."""

    sha256: str
    name: str
    format: str
    size_bytes: int
    kind: FileKind
    path: Path
    used_at: float
    in_use: bool


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
            raise StorageError(f"{entry.name} ({entry.sha256[:12]}) can't be removed: {error}") from error

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
        part = _Part(self._arriving / f"{sha256}.part", name, self._write)
        transfer = Transfer(self, sha256, name, size_bytes, kind, part)
        leftover = self._leftovers.pop(sha256, None)
        if leftover is not None:
            transfer.arrived_bytes = min(leftover.size_bytes, size_bytes)
        self._transfers[sha256] = transfer
        try:
            await self._drop_old_leftovers()
            await self.make_room(transfer)
            await transfer.open()
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
        _check_label(name, kind, entry.format)
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
        for victim in victims:
            self._forget(victim)
            await self.in_worker(self._remove, victim)

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
                f"which {_size(self._free_floor_bytes)} stay free for the system; removing unused models "
                f"would free {_size(removable_bytes)}; make room on the board"
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
            found = self._statvfs(self._root)
        except OSError as error:
            raise StorageError(f"{self._root}: can't be looked at: {error}; check the disk") from error
        return found.f_bavail * found.f_frsize

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
        self._write_card(entry)
        (self._arriving / f"{entry.sha256}.part").rename(self._path(entry))
        folder.sync(self._files)
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


class Transfer:
    """One file on its way in. Made by :meth:`ModelStore.receive`; used by one task.

    ``offset_bytes`` is the first byte that is lacking. ``stored`` is set once the file is there: at once
    when it was there before, and then ``already_present`` is true.
    """

    def __init__(
        self, store: ModelStore, sha256: str, name: str, size_bytes: int, kind: FileKind, part: _Part | None
    ) -> None:
        self.sha256 = sha256
        self.name = name
        self.size_bytes = size_bytes
        self.kind = kind
        self.offset_bytes = 0
        self.stored: StoredFile | None = None
        self.already_present = False
        # For the store: bytes that the disk has, and the end.
        self.arrived_bytes = 0
        self.over = asyncio.Event()
        self._store = store
        self._part = part
        self._verdict: AgentError | None = None
        self._discard = False
        self._jobs: deque[tuple[int, asyncio.Future[int]]] = deque()
        self._queued_bytes = 0
        self._room_checked_bytes = 0
        # Waiting for the client since then; None while the disk has the word.
        self._waiting_since: float | None = None
        self._finishing: asyncio.Future[StoredFile] | None = None
        self._ending: asyncio.Future[None] | None = None

    @property
    def complete(self) -> bool:
        """Whether every byte has come; ``finish()`` then says whether they are the right ones."""
        return self.offset_bytes == self.size_bytes

    async def write(self, *, offset_bytes: int, data: bytes, crc32: int) -> None:
        """Takes a chunk; returns when there is room for the next, which may be before it is on the disk.

        So an error may be that of an earlier chunk. Raises InvalidTransfer, CorruptChunk, NoRoom,
        StorageError, Superseded, Unavailable. What came before the error is kept, unless the disk is full.
        """
        self._check()
        if self._part is None or self.stored is not None:
            raise InvalidTransfer(f"{self.name} is here already; nothing more is taken")
        if offset_bytes != self.offset_bytes:
            raise InvalidTransfer(
                f"{self.name}: a chunk for byte {offset_bytes} came where byte {self.offset_bytes} was due"
            )
        if not 0 < len(data) <= CHUNK_LIMIT_BYTES:
            raise InvalidTransfer(
                f"{self.name}: a chunk of {len(data)} bytes; a chunk has 1 to {CHUNK_LIMIT_BYTES} bytes"
            )
        if offset_bytes + len(data) > self.size_bytes:
            raise InvalidTransfer(f"{self.name}: more bytes than the {self.size_bytes} that the header says")
        self._waiting_since = None
        self.offset_bytes += len(data)
        self._queued_bytes += len(data)
        self._jobs.append((len(data), self._store.submit(self._part.append, data, crc32)))
        limit_bytes = self._store.queue_limit_bytes()
        while self._jobs and (self._jobs[0][1].done() or self._queued_bytes > limit_bytes):
            await self._settle_one()
        if self.offset_bytes - self._room_checked_bytes >= _ROOM_CHECK_BYTES:
            self._room_checked_bytes = self.offset_bytes
            try:
                await self._store.make_room(self)
            except NoRoom as error:
                raise self._fail(error) from None
        self._waiting_since = self._store.now()

    async def finish(self) -> StoredFile:
        """The file, verified and safe from a power cut. Idempotent.

        Raises what :meth:`write` raises, and DigestMismatch, MislabelledFile, DamagedFile, InvalidRequest:
        after these four nothing is kept.
        """
        if self.stored is not None:
            return self.stored
        self._check()
        if self._finishing is None:
            assert self._part is not None
            self._waiting_since = None
            self._finishing = asyncio.ensure_future(self._finish(self._part))
        return await asyncio.shield(self._finishing)

    async def _finish(self, part: _Part) -> StoredFile:
        while self._jobs:
            await self._settle_one()
        if not self.complete:
            raise InvalidTransfer(
                f"{self.name}: only {self.offset_bytes} of {self.size_bytes} bytes came; "
                "push again, it goes on there"
            )
        try:
            digest = await self._store.in_worker(part.digest)
            if digest != self.sha256:
                raise DigestMismatch(
                    f"{self.name}: the bytes have sha256 {digest} and not {self.sha256} as the header says; "
                    "what came is removed; push again"
                )
            try:
                format = await self._store.in_worker(identify, part.path, self.name, self.kind)
            except UnknownFormat:
                # It may be of an engine from elsewhere; those are asked only now: it can take a while.
                marks = await self._store.marks()
                format = await self._store.in_worker(identify, part.path, self.name, self.kind, marks)
            await self._store.in_worker(part.sync)
            self.stored = await self._store.admit(self, format)
        except OSError as error:
            # After a failed sync the pages in memory look right and those on the disk may not be.
            raise self._fail(self._store.disk_error(error, self.name, 0), discard=True) from error
        except (DigestMismatch, InvalidRequest) as error:
            raise self._fail(error, discard=True) from None
        return self.stored

    async def _settle_one(self) -> None:
        size_bytes, job = self._jobs[0]
        # wait() leaves the job alone when this is cancelled: a chunk that is left out would be a gap.
        await asyncio.wait([job])
        if self._jobs and self._jobs[0][1] is job:
            self._jobs.popleft()
            self._queued_bytes -= size_bytes
        try:
            self.arrived_bytes = job.result()
        except OSError as error:
            needed_bytes = self.size_bytes - self.arrived_bytes
            raise self._fail(self._store.disk_error(error, self.name, needed_bytes)) from error
        except CorruptChunk as error:
            raise self._fail(error) from None

    def _check(self) -> None:
        if self._verdict is not None:
            raise self._verdict

    def _fail(self, error: AgentError, *, discard: bool = False) -> AgentError:
        self._verdict = error
        # On a full disk the board needs the room more than the client needs its head start.
        self._discard = discard or isinstance(error, NoRoom)
        return error

    # For the store.

    async def open(self) -> None:
        """Reads back what is there of the file and gets ready for the rest."""
        assert self._part is not None
        try:
            self._check()
            await self._store.in_worker(self._part.open, self.size_bytes)
            done = False
            while not done:
                self._check()
                done = await self._store.in_worker(self._part.read_back)
        except OSError as error:
            raise self._fail(self._store.disk_error(error, self.name, self.size_bytes)) from error
        self.offset_bytes = self.arrived_bytes = self._room_checked_bytes = self._part.good_bytes
        self._waiting_since = self._store.now()

    def idle_seconds(self) -> float | None:
        """For how long it has waited for its client; None while it does not."""
        return None if self._waiting_since is None else self._store.now() - self._waiting_since

    async def end(self, verdict: AgentError | None = None) -> None:
        """Lets go of the files; who uses the transfer afterwards gets the verdict. Idempotent."""
        if self._verdict is None:
            self._verdict = verdict
        if self._part is None:
            return
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end(self._part))
        await asyncio.shield(self._ending)

    async def _end(self, part: _Part) -> None:
        running: list[asyncio.Future[int] | asyncio.Future[StoredFile]] = [job for _, job in self._jobs]
        if self._finishing is not None:
            running.append(self._finishing)
        await asyncio.gather(*running, return_exceptions=True)
        left_bytes = 0
        try:
            left_bytes = await self._store.in_worker(part.close, self.stored is not None, self._discard)
        except OSError as error:
            _log.warning("%s: %s", self.name, error)
        finally:
            self._store.ended(self, left_bytes)
            self.over.set()


class _Part:
    """What has come of a file, and its journal. Every method runs in the worker."""

    def __init__(self, path: Path, name: str, write: Callable[[int, memoryview], int]) -> None:
        self.path = path
        self.good_bytes = 0
        self._journal_path = path.with_suffix(".crc")
        self._name = name
        self._write = write
        self._data = self._journal = -1
        self._size_bytes = 0
        # With OpenSSL it takes 3.5 MB, which an agent that is only waiting need not have.
        import hashlib

        self._hash = hashlib.sha256()
        self._blocks = 0
        self._block_bytes = 0
        self._block_crc = 0
        self._failure: CorruptChunk | OSError | None = None

    def open(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
        self._data = os.open(self.path, flags, 0o600)
        self._journal = os.open(self._journal_path, flags, 0o600)

    def read_back(self) -> bool:
        """Takes up some of what is there; whether that is done."""
        stop = self.good_bytes + _VERIFY_STEP_BYTES
        while self._read_back_block():
            if self.good_bytes >= stop:
                return False
        os.ftruncate(self._data, self.good_bytes)
        os.ftruncate(self._journal, self._blocks * _BLOCK.size)
        os.lseek(self._data, 0, os.SEEK_END)
        os.lseek(self._journal, 0, os.SEEK_END)
        return True

    def _read_back_block(self) -> bool:
        told = os.pread(self._journal, _BLOCK.size, self._blocks * _BLOCK.size)
        if len(told) < _BLOCK.size:
            return False
        length, crc = _BLOCK.unpack(told)
        if not 0 < length <= min(_BLOCK_LIMIT_BYTES, self._size_bytes - self.good_bytes):
            return False
        data = os.pread(self._data, length, self.good_bytes)
        if len(data) != length or zlib.crc32(data) != crc:
            return False
        self._hash.update(data)
        self.good_bytes += length
        self._blocks += 1
        return True

    def append(self, data: bytes, crc32: int) -> int:
        """Bytes that are there with these."""
        if self._failure is not None:
            raise self._failure
        found = zlib.crc32(data)
        if found != crc32:
            self._failure = CorruptChunk(
                f"{self._name}: the chunk for byte {self.good_bytes} came damaged (its CRC-32 is {found:08x} "
                f"and not {crc32:08x}); push again, it goes on there"
            )
            raise self._failure
        try:
            self._write_all(self._data, data)
            self._hash.update(data)
            self.good_bytes += len(data)
            self._block_crc = zlib.crc32(data, self._block_crc) if self._block_bytes else found
            self._block_bytes += len(data)
            if self._block_bytes >= _BLOCK_BYTES:
                self._close_block()
        except OSError as error:
            self._failure = error
            raise
        return self.good_bytes

    def _close_block(self) -> None:
        self._write_all(self._journal, _BLOCK.pack(self._block_bytes, self._block_crc))
        self._block_bytes = self._block_crc = 0

    def _write_all(self, descriptor: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[self._write(descriptor, view) :]

    def digest(self) -> str:
        return self._hash.hexdigest()

    def sync(self) -> None:
        os.fsync(self._data)

    def close(self, stored: bool, discard: bool) -> int:
        """Bytes that are left for a later transfer."""
        left_bytes = 0
        try:
            if not stored and not discard and self._data >= 0:
                if self._block_bytes and self._journal >= 0:
                    self._close_block()
                left_bytes = self.good_bytes
        except OSError as error:
            # The block that was not closed is asked for again.
            left_bytes = self.good_bytes
            _log.debug("%s: %s", self._journal_path, error)
        finally:
            for descriptor in (self._data, self._journal):
                if descriptor >= 0:
                    os.close(descriptor)
            self._data = self._journal = -1
        if not stored and not left_bytes:
            self.path.unlink(missing_ok=True)
            self._journal_path.unlink(missing_ok=True)
        return left_bytes


def clean_name(name: str) -> str:
    """The name without folders and without anything that moves a terminal's cursor, at most 128 characters.

    Empty when nothing is left. For people only: files on the disk are named by their digest.
    """
    leaf = re.split(r"[/\\]", name)[-1]
    shown = "".join(" " if character.isspace() else character for character in leaf)
    # C*: control, format (right-to-left marks), surrogate, private and unassigned characters.
    shown = "".join(character for character in shown if unicodedata.category(character)[0] != "C").strip()
    if shown in (".", ".."):
        return ""
    if len(shown) > _NAME_LIMIT:
        suffix = Path(shown).suffix
        suffix = suffix if len(suffix) <= _SUFFIX_LIMIT else ""
        shown = shown[: _NAME_LIMIT - len(suffix)] + suffix
    return shown


def identify(path: Path, name: str, kind: FileKind, marks: Sequence[Mark] = ()) -> str:
    """Format of a file that has come whole, told from its bytes; by ``marks`` where those alone don't tell.

    Raises MislabelledFile, UnknownFormat, DamagedFile, InvalidRequest, StorageError.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD_BYTES)
        own_format = runtimes.own_format(head)
        format = own_format or sniff.sniff(path)
        if not format and kind is FileKind.MODEL and Path(name).suffix.lower() not in _CLAIMS:
            format = own_format = _marked_format(head, name, marks)
        _check_label(name, kind, format)
        damage = None if own_format else sniff.check(path, format)
    except (InspectError, OSError) as error:
        raise StorageError(f"{name}: {error}") from error
    if damage:
        raise DamagedFile(f"{name}: {damage}")
    return format


def _marked_format(head: bytes, name: str, marks: Sequence[Mark]) -> str:
    """The format by what engines from elsewhere say; empty when none does. Raises MislabelledFile."""
    mark = marked(head, name, marks)
    if mark is not None:
        return mark.format
    promised = claimed(name, marks)
    if promised is not None:
        raise MislabelledFile(
            f"{name}: the name says {promised.format}, a format of {promised.plugin}, and the bytes begin "
            f"with {head[: len(promised.magic)].hex(' ')} and not with {promised.magic.hex(' ')}; check the "
            "file, or rename it"
        )
    if marks:
        more = ", ".join(f"{mark.format} by {mark.plugin}" for mark in marks)
        raise UnknownFormat(
            f"{name}: the bytes are of no format known here ({', '.join(sniff.FORMATS)}; {more})"
        )
    return ""


def _check_label(name: str, kind: FileKind, format: str) -> None:
    claim = _CLAIMS.get(Path(name).suffix.lower())
    if claim and claim != format:
        found = f"{format} format" if format else "no format known here; it may be truncated"
        raise MislabelledFile(
            f"{name}: the name says {claim} and the bytes are of {found}; check the file, or rename it"
        )
    if not format:
        raise UnknownFormat(f"{name}: the bytes are of no format known here ({', '.join(sniff.FORMATS)})")
    if kind is FileKind.INPUTS and format != "npz":
        raise InvalidRequest(f"{name}: inputs come as .npz (numpy.savez), and the bytes are {format}")
    if kind is FileKind.MODEL and format == "npz":
        raise InvalidRequest(f"{name}: an .npz holds inputs and is no model; push it as inputs")


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
