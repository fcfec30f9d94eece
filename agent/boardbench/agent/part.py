"""What has come of a file, on the disk: after a kill or a power cut the good part of it is still good.

The bytes are in ``<sha256>.part``. Beside them ``<sha256>.crc`` has the length and CRC-32 of each block: the
blocks that still match are kept, and the rest is asked for again.
"""

from __future__ import annotations

import logging
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

from boardbench.agent.errors import CorruptChunk

_log = logging.getLogger(__name__)

# The wire's own limit of a chunk.
CHUNK_LIMIT_BYTES = 2 * 1024 * 1024
# A block of the journal: what a killed agent loses at most of an unfinished transfer.
_BLOCK_BYTES = 1024 * 1024
# The chunk that fills a block closes it.
_BLOCK_LIMIT_BYTES = _BLOCK_BYTES + CHUNK_LIMIT_BYTES
_BLOCK = struct.Struct("<II")
# Read back in one step, so that others who wait for the disk get their turn.
_VERIFY_STEP_BYTES = 8 * 1024 * 1024


class Part:
    """What has come of a file, and its journal. Every method blocks on the disk, one at a time."""

    def __init__(self, path: Path, name: str, write: Callable[[int, memoryview], int] = os.write) -> None:
        """``path`` ends in ``.part``; ``name`` is the file's own, for people."""
        self.path = path
        self.good_bytes = 0
        self._journal_path = path.with_suffix(".crc")
        self._name = name
        self._write = write
        self._data = self._journal = -1
        self._is_read_back = False
        self._size_bytes = 0
        # With OpenSSL it takes 3.5 MB, which an agent that is only waiting need not have.
        import hashlib

        self._hash = hashlib.sha256()
        self._blocks = 0
        self._block_bytes = 0
        self._block_crc = 0
        self._failure: CorruptChunk | OSError | None = None

    def open(self, size_bytes: int) -> None:
        """Takes the files, which are made when they are not there, of a file that has so many bytes."""
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
        self._is_read_back = True
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
        """SHA-256 of the bytes that are there."""
        return self._hash.hexdigest()

    def sync(self) -> None:
        """The bytes last from now on."""
        os.fsync(self._data)

    def close(self, stored: bool, discard: bool) -> int:
        """Bytes that are left for a later transfer."""
        left_bytes = 0
        try:
            if not stored and not discard:
                # What was not read back is there nevertheless, and takes its room.
                left_bytes = self.good_bytes if self._is_read_back else size_bytes(self.path)
                if self._block_bytes:
                    self._close_block()
        except OSError as error:
            # The block that was not closed is asked for again.
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


def size_bytes(path: Path) -> int:
    """Of the file; 0 when it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
