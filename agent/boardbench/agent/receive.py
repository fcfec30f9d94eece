"""Chunks in, a verified file out: one file on its way into the model store.

The event loop's thread owns everything but the work on the disk: writing, hashing and syncing run in the one
worker thread of the store, so that the loop stays free and jobs stay in their order.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, Protocol, TypeVar

from boardbench.agent.errors import (
    AgentError,
    CorruptChunk,
    DigestMismatch,
    InvalidRequest,
    InvalidTransfer,
    NoRoom,
    UnknownFormat,
)
from boardbench.agent.formats import Mark
from boardbench.agent.part import CHUNK_LIMIT_BYTES, Part
from boardbench.agent.recognise import FileKind, identify

_log = logging.getLogger(__name__)

# How often a transfer looks at the free space, which others use up too.
_ROOM_CHECK_BYTES = 16 * 1024 * 1024
_P = ParamSpec("_P")
_T = TypeVar("_T")


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


class Keeper(Protocol):
    """What a transfer asks of the store that it goes to."""

    def submit(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> asyncio.Future[_T]:
        """Queues work on the disk. Raises Unavailable."""

    async def in_worker(self, work: Callable[_P, _T], *args: _P.args, **kwargs: _P.kwargs) -> _T:
        """What the work on the disk returns; once queued it is done, even when the caller is cancelled."""

    async def make_room(self, transfer: Transfer) -> None:
        """Room for the rest of the transfer. Raises NoRoom."""

    async def admit(self, transfer: Transfer, format: str) -> StoredFile:
        """The transferred file as one of the store's, named and synced."""

    def ended(self, transfer: Transfer, left_bytes: int) -> None:
        """The transfer has let go of its files; another one can take up what it left."""

    async def marks(self) -> Sequence[Mark]:
        """How files of formats are known that engines from elsewhere bring."""

    def queue_limit_bytes(self) -> int:
        """How much one transfer may have in memory."""

    def disk_error(self, error: OSError, name: str, needed_bytes: int) -> AgentError:
        """What an error of the disk means to the person who pushes."""

    def now(self) -> float:
        """Seconds on a clock that never jumps."""


class Transfer:
    """One file on its way in. Made by :meth:`~boardbench.agent.store.ModelStore.receive`; used by one task.

    ``offset_bytes`` is the first byte that is lacking. ``stored`` is set once the file is there: at once
    when it was there before, and then ``already_present`` is true.
    """

    def __init__(
        self, store: Keeper, sha256: str, name: str, size_bytes: int, kind: FileKind, part: Part | None
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

    async def _finish(self, part: Part) -> StoredFile:
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
            # What can't be read would be in the way of every further push.
            unreadable = error.errno == errno.EIO
            told = self._store.disk_error(error, self.name, self.size_bytes)
            raise self._fail(told, discard=unreadable) from error
        self.offset_bytes = self.arrived_bytes = self._room_checked_bytes = self._part.good_bytes
        self._waiting_since = self._store.now()

    def idle_seconds(self) -> float | None:
        """For how long it has waited for its client; None while it does not."""
        return None if self._waiting_since is None else self._store.now() - self._waiting_since

    async def end(self, verdict: AgentError | None = None) -> None:
        """Lets go of the files; who uses the transfer afterwards gets the verdict. Idempotent."""
        if self._verdict is None and verdict is not None:
            self._fail(verdict)
        if self._part is None:
            return
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._end(self._part))
        await asyncio.shield(self._ending)

    async def _end(self, part: Part) -> None:
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
