"""A ZIP archive, read without trusting it.

The format: PKWARE's APPNOTE.TXT (https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT).
The standard library's ``zipfile`` is not used because its memory grows with what the archive claims,
and because the places of the bytes are needed here, to account for every one of them.
"""

from __future__ import annotations

import struct
import zlib
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

from boardbench.inspect.budget import Budget
from boardbench.inspect.errors import Malformed

Readable = Union[bytes, memoryview]

_LOCAL = b"PK\x03\x04"
_CENTRAL = b"PK\x01\x02"
_END = b"PK\x05\x06"
_END64 = b"PK\x06\x06"
_LOCATOR64 = b"PK\x06\x07"
_END_SIZE = 22
_LONGEST_COMMENT = 0xFFFF
# More than any model has; keeps the memory for the listing below a few tens of megabytes.
MOST_ENTRIES = 50_000
_WHAT = "the ZIP archive"
_STEPS_PER_ENTRY = 16

_STORED, _DEFLATED = 0, 8


class Entry(NamedTuple):
    """One file in the archive and where its bytes are."""

    name: str
    method: int
    compressed_bytes: int
    size_bytes: int
    header_start: int
    data_start: int


class Archive(NamedTuple):
    """The listing of an archive; ``directory_start`` is where the entries end."""

    entries: Tuple[Entry, ...]
    directory_start: int

    def names(self) -> Tuple[str, ...]:
        """Names of the files, in the order of the directory."""
        return tuple(entry.name for entry in self.entries)


def is_archive(head: bytes) -> bool:
    """Whether the bytes begin like a ZIP archive."""
    return head[:4] in (_LOCAL, _END)


def read_archive(data: Readable, budget: Optional[Budget] = None) -> Archive:
    """The listing; raises Malformed when the archive is truncated or contradicts itself."""
    size = len(data)
    budget = Budget(size) if budget is None else budget
    tail_start = max(0, size - _END_SIZE - _LONGEST_COMMENT - 76)
    tail = bytes(data[tail_start:])
    found = tail.rfind(_END)
    if found < 0 or found + _END_SIZE > len(tail):
        raise Malformed("ZIP archive without an end record: the file is truncated; copy it again")
    end = tail_start + found
    count, directory_bytes, directory_start = struct.unpack_from("<HII", tail, found + 10)
    if found >= 20 and tail[found - 20 : found - 16] == _LOCATOR64:
        (end64,) = struct.unpack_from("<Q", tail, found - 12)
        if end64 + 56 > size or bytes(data[end64 : end64 + 4]) != _END64:
            raise Malformed("ZIP archive whose 64-bit end record is not where it says; copy the file again")
        count, directory_bytes, directory_start = struct.unpack_from("<QQQ", data, end64 + 32)
    if directory_start + directory_bytes > end:
        raise Malformed("ZIP archive whose directory lies outside the file: truncated; copy the file again")
    if count > MOST_ENTRIES:
        raise Malformed(f"ZIP archive that claims {count} files; a model has at most {MOST_ENTRIES}")
    entries = _entries(data, directory_start, directory_start + directory_bytes, count, budget)
    return Archive(tuple(entries), directory_start)


def _entries(data: Readable, start: int, stop: int, count: int, budget: Budget) -> List[Entry]:
    entries: List[Entry] = []
    seen: Dict[str, int] = {}
    at = start
    for _ in range(count):
        if at + 46 > stop or bytes(data[at : at + 4]) != _CENTRAL:
            raise Malformed(f"ZIP archive with a broken directory at byte {at}; copy the file again")
        budget.spend(_STEPS_PER_ENTRY, _WHAT)
        (flags, method) = struct.unpack_from("<HH", data, at + 8)
        compressed, size, name_bytes, extra_bytes, comment_bytes = struct.unpack_from("<IIHHH", data, at + 20)
        (header,) = struct.unpack_from("<I", data, at + 42)
        after = at + 46 + name_bytes + extra_bytes + comment_bytes
        if after > stop:
            raise Malformed(f"ZIP archive with a broken directory at byte {at}; copy the file again")
        raw_name = bytes(data[at + 46 : at + 46 + name_bytes])
        name = raw_name.decode("utf-8" if flags & 0x800 else "cp437", "replace")
        if extra_bytes:
            budget.spend(extra_bytes // 4, _WHAT)
            size, compressed, header = _sizes64(
                bytes(data[at + 46 + name_bytes : at + 46 + name_bytes + extra_bytes]),
                size,
                compressed,
                header,
            )
        if header + 30 > start or bytes(data[header : header + 4]) != _LOCAL:
            raise Malformed(f"ZIP archive: {name!r} is not where the directory says; copy the file again")
        local_name_bytes, local_extra_bytes = struct.unpack_from("<HH", data, header + 26)
        data_start = header + 30 + local_name_bytes + local_extra_bytes
        if data_start + compressed > start:
            raise Malformed(f"ZIP archive: {name!r} ends outside the file: truncated; copy the file again")
        if name in seen:
            raise Malformed(f"ZIP archive with two files named {name!r}: which one is meant can't be told")
        seen[name] = at
        entries.append(Entry(name, method, compressed, size, header, data_start))
        at = after
    return entries


def _sizes64(extra: bytes, size: int, compressed: int, header: int) -> Tuple[int, int, int]:
    """The three 64-bit values of extra field 1, each there only where the 32-bit one is all ones."""
    values = [size, compressed, header]
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<HH", extra, at)
        if tag == 1:
            field, field_stop = at + 4, min(len(extra), at + 4 + length)
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF and field + 8 <= field_stop:
                    (values[index],) = struct.unpack_from("<Q", extra, field)
                    field += 8
            break
        at += 4 + length
    return values[0], values[1], values[2]


def read_entry(data: Readable, entry: Entry, limit_bytes: int, budget: Optional[Budget] = None) -> bytes:
    """The content of one file; raises Malformed when it is more than ``limit_bytes``, or than it says."""
    if entry.size_bytes > limit_bytes:
        raise Malformed(
            f"ZIP archive: {entry.name!r} is {entry.size_bytes} bytes; at most {limit_bytes} are read"
        )
    if budget is not None:
        # Entries may lie upon each other, so that a small file holds many large ones.
        budget.unpack(entry.size_bytes + entry.compressed_bytes, _WHAT)
    packed = bytes(data[entry.data_start : entry.data_start + entry.compressed_bytes])
    if entry.method == _STORED:
        if len(packed) != entry.size_bytes:
            raise Malformed(
                f"ZIP archive: {entry.name!r} has two sizes, and is not packed; copy the file again"
            )
        return packed
    if entry.method != _DEFLATED:
        raise Malformed(f"ZIP archive: {entry.name!r} is packed by method {entry.method}; 0 and 8 are read")
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        unpacked = unpacker.decompress(packed, entry.size_bytes + 1)
    except zlib.error as error:
        raise Malformed(f"ZIP archive: {entry.name!r} does not unpack: {error}") from error
    if len(unpacked) != entry.size_bytes or not unpacker.eof:
        raise Malformed(f"ZIP archive: {entry.name!r} does not unpack to its {entry.size_bytes} bytes")
    return unpacked


def read_head(data: Readable, entry: Entry, size_bytes: int) -> bytes:
    """The first bytes of one file's content; fewer where it is shorter or does not unpack."""
    packed = bytes(data[entry.data_start : entry.data_start + min(entry.compressed_bytes, 4 * size_bytes)])
    if entry.method == _STORED:
        return packed[:size_bytes]
    if entry.method != _DEFLATED:
        return b""
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, size_bytes)
    except zlib.error:
        return b""
