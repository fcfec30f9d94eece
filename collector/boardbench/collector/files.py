"""Files that the collector keeps for boards: models and inputs, each by the SHA-256 of its bytes.

    files/<sha256>              the bytes
    files/<sha256>.json         name, kind, format and size; written first, so bytes with it are whole
    arriving/<sha256>.part      what has come of a file; it goes on there, and is hashed whole at its end

What no open job needs goes, the least recently used first, when there is no room. A board may be connected to
another collector than the one that took its model in: collectors over one database share a shelf in it, from
which each fills its own folder, or they share the folder itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from boardbench.collector.errors import InvalidRequest, NoRoom, NotFound, StoreDamaged, StoreUnavailable
from boardbench.inspect import sniff
from boardbench.inspect.errors import InspectError
from boardbench.v1 import agent_pb2, model_pb2

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

CHUNK_LIMIT_BYTES = 2 * 1024 * 1024
"""The wire's own limit."""

_SEND_BYTES = 512 * 1024
"""A piece on its way to a board: small enough to keep a thousand of them in memory at once."""

_READ_BYTES = 4 * 1024 * 1024

_YOUNG_SECONDS = 900.0
"""A file that was just sent has no job yet; it is not removed before somebody could submit one."""

_LEFT_SECONDS = 7 * 86400.0
"""How long an unfinished file may be taken up again."""

_LOOK_SECONDS = 60.0
"""How long a file that is used again and again is taken to be on the shelf still; well below the youth that
keeps it there."""

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MAX_NAME_LENGTH = 255


@dataclass
class _Entry:
    """A whole file."""

    model: model_pb2.Model
    kind: int
    used_at: float


@dataclass
class _Door:
    """One task at a time goes through."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    users: int = 0


class Shelf(Protocol):
    """Where collectors keep files for each other."""

    async def find(self, sha256: str) -> tuple[model_pb2.Model, int] | None:
        """Returns the file and its kind; None when it is not there whole."""

    async def use(self, sha256: str, at: float) -> bool:
        """Returns whether it is there whole; it is taken as used then."""

    async def put(self, model: model_pb2.Model, kind: int, path: Path, clock: Callable[[], float]) -> None:
        """Returns once every collector can have the file; what is there of it is not sent again."""

    def read(self, sha256: str, offset_bytes: int) -> AsyncIterator[bytes]:
        """Yields the bytes from there on; ends early where it was removed meanwhile."""

    async def remove(self, sha256: str) -> None:
        """Takes the file away; whoever has it puts it there again when it is used."""

    async def make_room(
        self,
        model: model_pb2.Model,
        *,
        limit_bytes: int,
        kept: Collection[str],
        used_before: float,
        at: float,
    ) -> None:
        """Removes what is neither ``kept`` nor young until the file fits; NoRoom when it does not then."""


class Files:
    """The folder of files. Belongs to one event loop; the disk is used in threads."""

    def __init__(
        self,
        root: Path,
        *,
        limit_bytes: int,
        free_bytes: int,
        in_use: Callable[[], Awaitable[frozenset[str]]],
        shelf: Shelf | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Keeps at most ``limit_bytes`` here, as many on the shelf, and leaves ``free_bytes`` of the disk.

        ``in_use`` returns which files open jobs need.
        """
        self._shelf = shelf
        self._shelved: dict[str, float] = {}
        """When a file was last known to be on the shelf."""
        self._files = root / "files"
        self._arriving = root / "arriving"
        self._limit_bytes = limit_bytes
        self._free_bytes = free_bytes
        self._in_use = in_use
        self._clock = clock
        self._entries: dict[str, _Entry] = {}
        self._transfers: dict[str, Transfer] = {}
        self._doors: dict[str, _Door] = {}
        self._making_room = asyncio.Lock()
        self.received_bytes = 0
        """Since the start."""
        self.handed_out_bytes = 0
        """Since the start."""

    async def open(self) -> None:
        """Finds what is there; StoreUnavailable when the folder can't be used."""
        try:
            await asyncio.to_thread(self._open)
        except OSError as error:
            raise StoreUnavailable(
                f"can't use the folder {self._files.parent}: {error.strerror};"
                " choose another with --files-dir"
            ) from error

    def _open(self) -> None:
        for folder in (self._files, self._arriving):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for card in self._files.glob("*.json"):
            entry = self._read_card(card)
            if entry is not None:
                self._entries[card.stem] = entry
        oldest = self._clock() - _LEFT_SECONDS
        for part in self._arriving.iterdir():
            if part.stem in self._entries or part.stat().st_mtime < oldest:
                part.unlink()

    def _read_card(self, card: Path) -> _Entry | None:
        """Returns the file that the card is about; None when there is none that is whole."""
        try:
            told = json.loads(card.read_bytes())
            model = model_pb2.Model(
                sha256=card.stem,
                name=str(told["name"]),
                format=str(told["format"]),
                size_bytes=int(told["size_bytes"]),
            )
            if self._path(card.stem).stat().st_size == model.size_bytes:
                return _Entry(model, int(told["kind"]), card.stat().st_mtime)
            _log.warning("%s: its bytes are not what was stored; it is left alone", card)
        except FileNotFoundError:
            # Another collector over the same folder is about to write it, or has removed it.
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            _log.warning("%s: can't be used: %s", card, error)
        return None

    @property
    def used_bytes(self) -> int:
        """Bytes of whole and of arriving files."""
        return sum(entry.model.size_bytes for entry in self._entries.values()) + sum(
            transfer.offset_bytes for transfer in self._transfers.values()
        )

    async def find(self, sha256: str) -> model_pb2.Model:
        """Returns the file, as it was stored, and takes it as used; NotFound when it is not there."""
        digest = sha256.lower()
        if not _DIGEST.fullmatch(digest):
            raise InvalidRequest(f"{sha256[:80]!r} is no SHA-256: it has 64 hexadecimal digits")
        entry = self._entries.get(digest)
        if entry is None:
            # Another collector may have taken it in.
            entry = await asyncio.to_thread(self._read_card, self._card(digest)) or await self._bring(digest)
            if entry is None:
                raise NotFound(f"no file with SHA-256 {digest[:12]} is on this collector; send it first")
            self._entries[digest] = entry
        await self._use(digest, entry)
        return entry.model

    async def _use(self, sha256: str, entry: _Entry) -> None:
        now = self._clock()
        if now - entry.used_at >= 1.0:
            entry.used_at = now
            with contextlib.suppress(OSError):
                await asyncio.to_thread(os.utime, self._card(sha256), (now, now))
        if self._shelf is None or now - self._shelved.get(sha256, -_LOOK_SECONDS) < _LOOK_SECONDS:
            return
        if await self._shelf.use(sha256, now):
            self._shelved[sha256] = now
        else:
            await self._shelve(entry)

    async def _shelve(self, entry: _Entry) -> None:
        """Returns once every collector can have the file."""
        if self._shelf is None:
            return
        now, model = self._clock(), entry.model
        await self._shelf.make_room(
            model,
            limit_bytes=self._limit_bytes,
            kept=await self._in_use(),
            used_before=now - _YOUNG_SECONDS,
            at=now,
        )
        try:
            await self._shelf.put(model, entry.kind, self._path(model.sha256), self._clock)
        except FileNotFoundError:
            self._entries.pop(model.sha256, None)
            raise NotFound(f"{model.name} is no longer on this collector; send it again") from None
        except OSError as error:
            raise StoreUnavailable(f"{model.name} can't be read: {error}") from error
        self._shelved[model.sha256] = now

    async def _bring(self, sha256: str) -> _Entry | None:
        """Returns the file that another collector has put on the shelf, once it is here as well."""
        found = await self._shelf.find(sha256) if self._shelf is not None else None
        if self._shelf is None or found is None:
            return None
        model, kind = found
        header = agent_pb2.PushHeader(
            sha256=sha256,
            name=model.name,
            size_bytes=model.size_bytes,
            kind=kind,  # type: ignore[arg-type]
        )
        async with self.receive(header) as transfer:
            if transfer.stored is None:
                async for data in self._shelf.read(sha256, transfer.offset_bytes):
                    await transfer.append(data)
                if not transfer.complete:
                    raise StoreUnavailable(f"{model.name} was removed while it was fetched; send it again")
                try:
                    await transfer.finish(brought=True)
                except InvalidRequest as error:
                    await self._shelf.remove(sha256)
                    raise StoreDamaged(
                        f"{model.name} is damaged in the database, and was removed there: send it again"
                    ) from error
        return self._entries.get(sha256)

    async def read(self, sha256: str, offset_bytes: int) -> AsyncGenerator[agent_pb2.PushChunk, None]:
        """Yields the bytes of a file from there on, in order.

        NotFound when it is not there, InvalidRequest when the offset lies outside of it.
        """
        model = await self.find(sha256)
        if not 0 <= offset_bytes <= model.size_bytes:
            raise InvalidRequest(
                f"{model.name} has {model.size_bytes:,} bytes; {offset_bytes:,} lies outside of it"
            )
        try:
            # Once open it can be read to its end, also when it is removed meanwhile.
            file = await asyncio.to_thread(self._path(model.sha256).open, "rb")
        except FileNotFoundError:
            self._entries.pop(model.sha256, None)
            raise NotFound(f"{model.name} is no longer on this collector; send it again") from None
        except OSError as error:
            raise StoreUnavailable(f"{model.name} can't be read: {error}") from error
        try:
            while offset_bytes < model.size_bytes:
                chunk = await asyncio.to_thread(_chunk, file, offset_bytes)
                if chunk is None:
                    raise StoreUnavailable(f"{model.name} can't be read whole; send it again")
                yield chunk
                offset_bytes += len(chunk.data)
                self.handed_out_bytes += len(chunk.data)
        finally:
            file.close()

    async def look_into(self, sha256: str, reader: Callable[[BinaryIO], _T]) -> _T:
        """What the ``reader``, in a thread, makes of a file; NotFound when it is not there."""
        model = await self.find(sha256)

        def look() -> _T:
            with self._path(model.sha256).open("rb") as file:
                return reader(file)

        try:
            return await asyncio.to_thread(look)
        except OSError as error:
            raise StoreUnavailable(f"{model.name} can't be read: {error}") from error

    @contextlib.asynccontextmanager
    async def receive(self, header: agent_pb2.PushHeader) -> AsyncIterator[Transfer]:
        """A file on its way in; whoever sends the same one meanwhile waits for it.

        InvalidRequest when the header can't be one, NoRoom when the file does not fit.
        """
        digest = header.sha256.lower()
        if not _DIGEST.fullmatch(digest):
            raise InvalidRequest(f"{header.sha256[:80]!r} is no SHA-256: it has 64 hexadecimal digits")
        name = header.name
        if not name or len(name) > _MAX_NAME_LENGTH or "/" in name or not name.isprintable():
            raise InvalidRequest(f"{name[:80]!r} is no file name without folders")
        if header.size_bytes < 1:
            raise InvalidRequest(f"{name}: a file has at least one byte, not {header.size_bytes}")
        async with self._alone(digest):
            transfer = Transfer(self, digest, header)
            try:
                await transfer.begin()
                yield transfer
            except OSError as error:
                raise _told(error, name) from error
            finally:
                self._transfers.pop(digest, None)
                transfer.close()

    @contextlib.asynccontextmanager
    async def _alone(self, sha256: str) -> AsyncIterator[None]:
        """One task at a time for one file."""
        door = self._doors.setdefault(sha256, _Door())
        door.users += 1
        try:
            async with door.lock:
                yield
        finally:
            door.users -= 1
            if not door.users:
                del self._doors[sha256]

    # For transfers.

    def known(self, sha256: str) -> model_pb2.Model | None:
        """Returns the file when it is there whole."""
        entry = self._entries.get(sha256)
        return entry.model if entry is not None and self._path(sha256).exists() else None

    def part(self, sha256: str) -> Path:
        """Returns where a file arrives."""
        return self._arriving / f"{sha256}.part"

    async def admit(self, transfer: Transfer) -> None:
        """Returns once there is room for the rest of the file; NoRoom when there will be none."""
        async with self._making_room:
            needed = transfer.size_bytes - transfer.offset_bytes
            if transfer.size_bytes > self._limit_bytes:
                raise NoRoom(
                    f"{transfer.name} has {transfer.size_bytes:,} bytes, and this collector keeps at most"
                    f" {self._limit_bytes:,}; raise --files-limit"
                )
            others = [other for other in self._transfers.values() if other is not transfer]
            coming = sum(other.size_bytes - other.offset_bytes for other in others)
            kept = await self._in_use() | {other.sha256 for other in others}
            youngest = self._clock() - _YOUNG_SECONDS
            removable = sorted(
                (entry.used_at, sha256)
                for sha256, entry in self._entries.items()
                if sha256 not in kept and entry.used_at < youngest
            )
            while True:
                over = self.used_bytes + coming + needed - self._limit_bytes
                free = await asyncio.to_thread(shutil.disk_usage, self._arriving)
                if over <= 0 and free.free - coming - needed >= self._free_bytes:
                    self._transfers[transfer.sha256] = transfer
                    return
                if not removable:
                    raise NoRoom(
                        f"there is no room for {transfer.name} ({needed:,} bytes more): "
                        + self._why_full(over > 0, free.free, coming)
                    )
                await self._remove(removable.pop(0)[1])

    def _why_full(self, over: bool, free_bytes: int, coming_bytes: int) -> str:
        if over:
            why = f"this collector keeps at most {self._limit_bytes:,} bytes"
            remedy = "raise --files-limit"
        else:
            why = f"{free_bytes:,} bytes are free on the disk of {self._arriving.parent}"
            if coming_bytes:
                why += f", {coming_bytes:,} are for files that arrive"
            why += f", and {self._free_bytes:,} stay free"
            remedy = "make room on that disk"
        if self._entries:
            why += "; the files that are there are young or open jobs need them: cancel some, or"
            return f"{why} {remedy}"
        return f"{why}; {remedy}"

    async def _remove(self, sha256: str) -> None:
        entry = self._entries.pop(sha256)
        _log.info("%s (%s): removed to make room", entry.model.name, sha256[:12])
        # The card first: bytes without a card are not taken for a file.
        for path in (self._card(sha256), self._path(sha256)):
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(path.unlink)

    async def settle(self, transfer: Transfer, *, brought: bool) -> model_pb2.Model:
        """Returns the file, named and synced, once its bytes are the right ones, and on the shelf.

        InvalidRequest when they are not; then nothing of them is kept.
        """
        part = self.part(transfer.sha256)
        digest = await asyncio.to_thread(_digest, part)
        if digest != transfer.sha256:
            await asyncio.to_thread(part.unlink)
            raise InvalidRequest(
                f"{transfer.name}: what came has SHA-256 {digest[:12]}…, and the header says"
                f" {transfer.sha256[:12]}…; send it again"
            )
        model = model_pb2.Model(
            sha256=transfer.sha256,
            name=transfer.name,
            format=await asyncio.to_thread(_format, part, transfer.kind),
            size_bytes=transfer.size_bytes,
        )
        entry = _Entry(model, transfer.kind, self._clock())
        await asyncio.to_thread(self._settle, entry)
        self._entries[transfer.sha256] = entry
        self._transfers.pop(transfer.sha256, None)
        _log.info("%s (%s): %d bytes came in", model.name, model.sha256[:12], model.size_bytes)
        if not brought:
            await self._shelve(entry)
        return model

    def _settle(self, entry: _Entry) -> None:
        model = entry.model
        card = {
            "name": model.name,
            "format": model.format,
            "kind": entry.kind,
            "size_bytes": model.size_bytes,
        }
        fresh = self._arriving / f"{model.sha256}.json"
        with fresh.open("wb") as file:
            file.write(json.dumps(card).encode())
            file.flush()
            os.fsync(file.fileno())
        fresh.replace(self._card(model.sha256))
        self.part(model.sha256).replace(self._path(model.sha256))
        folder = os.open(self._files, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _path(self, sha256: str) -> Path:
        return self._files / sha256

    def _card(self, sha256: str) -> Path:
        return self._files / f"{sha256}.json"


class Transfer:
    """One file on its way in. Made by :meth:`Files.receive`; used by one task."""

    def __init__(self, files: Files, sha256: str, header: agent_pb2.PushHeader) -> None:
        self.sha256 = sha256
        self.name = header.name
        self.size_bytes = header.size_bytes
        self.kind = int(header.kind)
        self.offset_bytes = 0
        """First byte that is lacking."""
        self.stored: model_pb2.Model | None = None
        """The file, once it is there; at once when it was there before."""
        self._files = files
        self._file: BinaryIO | None = None

    async def begin(self) -> None:
        """Finds what is there of it, and makes room for the rest."""
        self.stored = self._files.known(self.sha256)
        if self.stored is not None:
            if self.stored.size_bytes != self.size_bytes:
                raise InvalidRequest(
                    f"{self.name}: the file with this SHA-256 has {self.stored.size_bytes:,} bytes,"
                    f" not {self.size_bytes:,}"
                )
            await self._files.find(self.sha256)
            return
        part = self._files.part(self.sha256)
        there = await asyncio.to_thread(lambda: part.stat().st_size if part.exists() else 0)
        self.offset_bytes = there if there <= self.size_bytes else 0
        await self._files.admit(self)
        self._file = await asyncio.to_thread(part.open, "r+b" if there else "wb", 0)
        if there > self.size_bytes:
            self._file.truncate(0)
        self._file.seek(self.offset_bytes)

    @property
    def complete(self) -> bool:
        """Whether every byte has come."""
        return self.offset_bytes == self.size_bytes

    async def write(self, chunk: agent_pb2.PushChunk) -> None:
        """Takes the next piece; InvalidRequest when it can't be that."""
        if self._file is None:
            raise InvalidRequest(f"{self.name} is here already; nothing more is taken")
        if chunk.offset_bytes != self.offset_bytes:
            raise InvalidRequest(
                f"{self.name}: a chunk for byte {chunk.offset_bytes} came where byte {self.offset_bytes}"
                " was due"
            )
        if not 0 < len(chunk.data) <= CHUNK_LIMIT_BYTES:
            raise InvalidRequest(
                f"{self.name}: a chunk of {len(chunk.data)} bytes; a chunk has 1 to {CHUNK_LIMIT_BYTES} bytes"
            )
        if chunk.offset_bytes + len(chunk.data) > self.size_bytes:
            raise InvalidRequest(f"{self.name}: more bytes than the {self.size_bytes} that the header says")
        if zlib.crc32(chunk.data) != chunk.crc32:
            raise InvalidRequest(
                f"{self.name}: the bytes at {chunk.offset_bytes} came damaged; send them again"
            )
        await self.append(chunk.data)
        self._files.received_bytes += len(chunk.data)

    async def append(self, data: bytes) -> None:
        """Takes the next bytes as they are; the file is hashed whole at its end."""
        assert self._file is not None
        await asyncio.to_thread(self._write, self._file, data)
        self.offset_bytes += len(data)

    @staticmethod
    def _write(file: BinaryIO, data: bytes) -> None:
        rest = memoryview(data)
        while rest:
            rest = rest[file.write(rest) :]

    async def finish(self, *, brought: bool = False) -> model_pb2.Model:
        """Returns the file once it is verified and would survive a power cut.

        One that was ``brought`` from the shelf is not put there again.
        """
        assert self._file is not None
        await asyncio.to_thread(os.fsync, self._file.fileno())
        self.close()
        self.stored = await self._files.settle(self, brought=brought)
        return self.stored

    def close(self) -> None:
        """Lets go of the file; what came of it stays. Idempotent."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _chunk(file: BinaryIO, offset_bytes: int) -> agent_pb2.PushChunk | None:
    """Returns the next piece of the file; None when there is none."""
    try:
        data = os.pread(file.fileno(), _SEND_BYTES, offset_bytes)
    except OSError:
        return None
    if not data:
        return None
    return agent_pb2.PushChunk(offset_bytes=offset_bytes, data=data, crc32=zlib.crc32(data))


def _digest(path: Path) -> str:
    """Returns the SHA-256 of the file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while data := file.read(_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def _format(path: Path, kind: int) -> str:
    """Returns what the bytes are; empty when that is not known, which boards with other engines may know."""
    if kind == agent_pb2.FILE_KIND_INPUTS:
        return "npz"
    try:
        return sniff.sniff(path)
    except InspectError as error:
        _log.info("%s: its format is not known: %s", path.stem[:12], error)
        return ""


def _told(error: OSError, name: str) -> StoreUnavailable:
    return StoreUnavailable(f"{name} can't be kept: {error.strerror}; make room on the collector's disk")
