"""A FAT16 or FAT32 file system inside a file: read, written and checked without mounting it or being root.

Source: Microsoft's "FAT: General Overview of On-Disk Format" (fatgen103). Enough of it for the boot partition
of an image: long names are read and written, what is not touched stays as it is.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

_ENTRY_BYTES = 32
_LONG_NAME = 0x0F
_VOLUME_LABEL = 0x08
_DIRECTORY = 0x10
_ARCHIVE = 0x20
_FREE = 0xE5
# Characters of a long name in one entry, as (offset, bytes).
_LONG_PARTS = ((1, 10), (14, 12), (28, 4))
_LONG_CHARACTERS = 13
# 2020-01-01 00:00, as FAT writes it: the clock of whoever flashes says nothing, and the same is written
# twice.
_DATE = (2020 - 1980) << 9 | 1 << 5 | 1
_SHORT_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789!#$%&'()-@^_`{}~")
_FORBIDDEN = frozenset('"*/:<>?\\|')


class FatError(Exception):
    """The file system can't be used, or not for this; the message says why."""


@dataclass(frozen=True)
class _Found:
    """A directory entry and where it is: the slots of its long name come first."""

    name: str
    first_slot: int
    slot: int
    attributes: int
    cluster: int
    size: int

    @property
    def is_folder(self) -> bool:
        return bool(self.attributes & _DIRECTORY)


class FatVolume:
    """The file system that begins at ``offset`` of an open file. Not for two users at once.

    Paths are written with "/" and matched whatever their case, as FAT does. Changes are written at once, the
    data first, then the table, then the name, so that a write that is cut off leaves the old file.
    """

    def __init__(self, file: BinaryIO, offset: int = 0) -> None:
        """Raises FatError when there is none, or a damaged or older one (FAT12)."""
        self._file = file
        self._offset = offset
        sector = self._read(0, 512)
        if len(sector) < 512 or sector[510:512] != b"\x55\xaa":
            raise FatError("there is no FAT file system")
        sector_bytes, self._sectors_per_cluster, reserved, copies, root_entries, total_16 = (
            struct.unpack_from("<HBHBHH", sector, 11)
        )
        (table_16,) = struct.unpack_from("<H", sector, 22)
        total_32, table_32, flags = struct.unpack_from("<IIH", sector, 32)
        total, table = total_16 or total_32, table_16 or table_32
        if (
            sector_bytes not in (512, 1024, 2048, 4096)
            or not self._sectors_per_cluster
            or not reserved
            or copies not in (1, 2)
            or not table
            or not total
        ):
            raise FatError("there is no FAT file system")
        self._sector_bytes = sector_bytes
        self.cluster_bytes = sector_bytes * self._sectors_per_cluster
        root_sectors = (root_entries * _ENTRY_BYTES + sector_bytes - 1) // sector_bytes
        data_sector = reserved + copies * table + root_sectors
        count = (total - data_sector) // self._sectors_per_cluster
        if count < 4085:
            raise FatError("it is FAT12, or smaller than a boot partition can be")
        self._wide: bool = not table_16
        self._width = 4 if self._wide else 2
        self._data = data_sector * sector_bytes
        self._root_at = (reserved + copies * table) * sector_bytes
        self._root_bytes = root_entries * _ENTRY_BYTES
        self._root_cluster = struct.unpack_from("<I", sector, 44)[0] if self._wide else 0
        self._information = struct.unpack_from("<H", sector, 48)[0] * sector_bytes if self._wide else 0
        self._last_cluster = count + 1
        # Without mirroring one copy counts, and only that one is kept up to date.
        single = self._wide and flags & 0x80
        numbers = [flags & 0x0F] if single else range(copies)
        self._tables = [(reserved + number * table) * sector_bytes for number in numbers]
        self._table = bytearray(self._read(self._tables[0], table * sector_bytes))
        if len(self._table) < (count + 2) * self._width:
            raise FatError("its table is cut off: the file is not whole")
        self._changed: set[int] = set()
        self._search_from = 2
        self._free = sum(self._get(cluster) == 0 for cluster in range(2, self._last_cluster + 1))

    # Files.

    def exists(self, path: str) -> bool:
        """Whether there is a file or a folder of this name."""
        return self._find(path) is not None

    def listed(self, path: str = "") -> list[str]:
        """Names in the folder; FileNotFoundError when there is none."""
        return [entry.name for entry in self._entries(self._folder(path)) if entry.name not in (".", "..")]

    def read(self, path: str) -> bytes:
        """What the file holds; FileNotFoundError when there is none."""
        entry = self._find(path)
        if entry is None or entry.is_folder:
            raise FileNotFoundError(path)
        data = b"".join(
            self._read(self._place(cluster), self.cluster_bytes) for cluster in self._chain(entry.cluster)
        )
        if len(data) < entry.size:
            raise FatError(f"{path} is cut off: the file system is damaged")
        return data[: entry.size]

    def write(self, path: str, data: bytes) -> None:
        """The file holds ``data`` from now on; folders on the way are made. FatError when it is full."""
        *folders, name = _parts(path)
        parent = self._root_cluster
        for folder in folders:
            parent = self._subfolder(parent, folder)
        old = self._look(parent, name)
        if old is not None and old.is_folder:
            raise FatError(f"{path} is a folder")
        chain = self._allocate(-(-len(data) // self.cluster_bytes)) if data else []
        for number, cluster in enumerate(chain):
            part = data[number * self.cluster_bytes : (number + 1) * self.cluster_bytes]
            self._write(self._place(cluster), part.ljust(self.cluster_bytes, b"\0"))
        self._flush()
        first = chain[0] if chain else 0
        if old is None:
            self._enter(parent, name, _ARCHIVE, first, len(data))
        else:
            self._point(parent, old, first, len(data))
            self._release(old.cluster)
        self._flush()

    def remove(self, path: str) -> None:
        """There is no such file any more, also if there was none."""
        *folders, name = _parts(path)
        parent = self._find("/".join(folders)) if folders else None
        if folders and (parent is None or not parent.is_folder):
            return
        cluster = parent.cluster if parent is not None else self._root_cluster
        entry = self._look(cluster, name)
        if entry is None:
            return
        if entry.is_folder:
            raise FatError(f"{path} is a folder")
        content = self._folder_bytes(cluster)
        for slot in range(entry.first_slot, entry.slot + 1):
            content[slot * _ENTRY_BYTES] = _FREE
        self._store_folder(cluster, content, entry.first_slot, entry.slot)
        self._release(entry.cluster)
        self._flush()

    @property
    def free_bytes(self) -> int:
        """What can still be written."""
        return self._free * int(self.cluster_bytes)

    # Folders.

    def _find(self, path: str) -> _Found | None:
        cluster, found = self._root_cluster, None
        for number, name in enumerate(_parts(path)):
            if number and (found is None or not found.is_folder):
                return None
            found = self._look(cluster, name)
            if found is None:
                return None
            cluster = found.cluster
        return found

    def _folder(self, path: str) -> int:
        if not path.strip("/"):
            return self._root_cluster
        found = self._find(path)
        if found is None or not found.is_folder:
            raise FileNotFoundError(path)
        return found.cluster

    def _look(self, folder: int, name: str) -> _Found | None:
        wanted = name.casefold()
        return next((entry for entry in self._entries(folder) if entry.name.casefold() == wanted), None)

    def _subfolder(self, parent: int, name: str) -> int:
        found = self._look(parent, name)
        if found is not None:
            if not found.is_folder:
                raise FatError(f"{name} is a file, and must be a folder")
            return found.cluster
        (cluster,) = self._allocate(1)
        dots = _short_entry(b".          ", _DIRECTORY, cluster, 0)
        # The root is written as 0 there, also where it is a cluster.
        up = 0 if parent == self._root_cluster else parent
        dots += _short_entry(b"..         ", _DIRECTORY, up, 0)
        self._write(self._place(cluster), dots.ljust(self.cluster_bytes, b"\0"))
        self._flush()
        self._enter(parent, name, _DIRECTORY, cluster, 0)
        return cluster

    def _entries(self, folder: int) -> Iterator[_Found]:
        content = self._folder_bytes(folder)
        long: list[str] = []
        check, begin = -1, 0
        for slot in range(len(content) // _ENTRY_BYTES):
            entry = content[slot * _ENTRY_BYTES : (slot + 1) * _ENTRY_BYTES]
            if entry[0] == 0:
                return
            attributes = entry[11]
            if entry[0] == _FREE:
                long = []
            elif attributes & 0x3F == _LONG_NAME:
                if entry[0] & 0x40:
                    long, begin = [], slot
                check = entry[13]
                raw = b"".join(entry[at : at + size] for at, size in _LONG_PARTS)
                long.insert(0, raw.decode("utf-16-le", "replace"))
            else:
                if not attributes & _VOLUME_LABEL:
                    short = bytes(entry[:11])
                    whole = bool(long) and check == _checksum(short)
                    name = "".join(long).partition("\0")[0] if whole else _short_name(short, entry[12])
                    high, low, size = struct.unpack_from("<H4xHI", entry, 20)
                    cluster = high << 16 | low if self._wide else low
                    first = begin if whole else slot
                    yield _Found(name, first, slot, attributes, cluster, size)
                long = []

    def _folder_bytes(self, folder: int) -> bytearray:
        if not folder:
            return bytearray(self._read(self._root_at, self._root_bytes))
        return bytearray(b"".join(self._clusters(folder)))

    def _clusters(self, first: int) -> Iterator[bytes]:
        return (self._read(self._place(cluster), self.cluster_bytes) for cluster in self._chain(first))

    def _store_folder(self, folder: int, content: bytearray, first_slot: int, last_slot: int) -> None:
        """Writes the parts of a folder that hold these slots."""
        if not folder:
            at, end = first_slot * _ENTRY_BYTES, (last_slot + 1) * _ENTRY_BYTES
            self._write(self._root_at + at, bytes(content[at:end]))
            return
        size = self.cluster_bytes
        for number, cluster in enumerate(self._chain(folder)):
            if (
                first_slot * _ENTRY_BYTES < (number + 1) * size
                and (last_slot + 1) * _ENTRY_BYTES > number * size
            ):
                self._write(self._place(cluster), bytes(content[number * size : (number + 1) * size]))

    def _enter(self, folder: int, name: str, attributes: int, cluster: int, size: int) -> None:
        """Writes a new name into the folder, which grows for it when it must."""
        taken = {
            bytes(entry[:11])
            for entry in _slots(self._folder_bytes(folder))
            if entry[0] not in (0, _FREE) and entry[11] & 0x3F != _LONG_NAME
        }
        short, exact = _short_for(name, taken)
        entries = ([] if exact else _long_entries(name, short)) + [
            _short_entry(short, attributes, cluster, size)
        ]
        content = self._folder_bytes(folder)
        slot = _gap(content, len(entries))
        while slot is None:
            if not folder:
                raise FatError("its root folder is full")
            chain = self._chain(folder)
            (more,) = self._allocate(1)
            self._write(self._place(more), bytes(self.cluster_bytes))
            self._set(chain[-1], more)
            self._flush()
            content = self._folder_bytes(folder)
            slot = _gap(content, len(entries))
        for number, entry in enumerate(entries):
            at = (slot + number) * _ENTRY_BYTES
            content[at : at + _ENTRY_BYTES] = entry
        self._store_folder(folder, content, slot, slot + len(entries) - 1)

    def _point(self, folder: int, entry: _Found, cluster: int, size: int) -> None:
        """Lets an existing name lead to other data."""
        content = self._folder_bytes(folder)
        at = entry.slot * _ENTRY_BYTES
        struct.pack_into("<H", content, at + 20, cluster >> 16)
        struct.pack_into("<HI", content, at + 26, cluster & 0xFFFF, size)
        self._store_folder(folder, content, entry.slot, entry.slot)

    # The table.

    def _get(self, cluster: int) -> int:
        if self._wide:
            return int(struct.unpack_from("<I", self._table, cluster * 4)[0]) & 0x0FFFFFFF
        return int(struct.unpack_from("<H", self._table, cluster * 2)[0])

    def _set(self, cluster: int, value: int) -> None:
        at = cluster * self._width
        self._free += (self._get(cluster) != 0) - (value != 0)
        if self._wide:
            # The highest four bits are reserved, and stay.
            (old,) = struct.unpack_from("<I", self._table, at)
            struct.pack_into("<I", self._table, at, old & 0xF0000000 | value & 0x0FFFFFFF)
        else:
            struct.pack_into("<H", self._table, at, value & 0xFFFF)
        self._changed.add(at // self._sector_bytes)

    def _chain(self, cluster: int) -> list[int]:
        end = 0x0FFFFFF8 if self._wide else 0xFFF8
        found: list[int] = []
        while 2 <= cluster <= self._last_cluster and cluster < end:
            found.append(cluster)
            if len(found) > self._last_cluster:
                raise FatError("a file runs in a circle: the file system is damaged")
            cluster = self._get(cluster)
        return found

    def _allocate(self, count: int) -> list[int]:
        found: list[int] = []
        for cluster in range(self._search_from, self._last_cluster + 1):
            if len(found) == count:
                break
            if self._get(cluster) == 0:
                found.append(cluster)
        if len(found) < count:
            missing = (count - self._free) * self.cluster_bytes
            raise FatError(f"it is full: {max(missing, self.cluster_bytes):,} bytes are missing")
        for cluster, following in zip(found, [*found[1:], 0x0FFFFFFF], strict=True):
            self._set(cluster, following)
        self._search_from = found[-1] + 1 if found else self._search_from
        return found

    def _release(self, cluster: int) -> None:
        chain = self._chain(cluster)
        for freed in chain:
            self._set(freed, 0)
        self._search_from = min([self._search_from, *chain])

    def _flush(self) -> None:
        if not self._changed:
            return
        size = self._sector_bytes
        for sector in sorted(self._changed):
            for table in self._tables:
                self._write(table + sector * size, bytes(self._table[sector * size : (sector + 1) * size]))
        self._changed.clear()
        if self._information:
            sector_1 = bytearray(self._read(self._information, 512))
            if sector_1[:4] == b"RRaA" and sector_1[484:488] == b"rrAa":
                struct.pack_into("<II", sector_1, 488, self._free, min(self._search_from, self._last_cluster))
                self._write(self._information, bytes(sector_1))

    # Bytes.

    def _place(self, cluster: int) -> int:
        return int(self._data) + (cluster - 2) * int(self.cluster_bytes)

    def _read(self, at: int, size: int) -> bytes:
        self._file.seek(self._offset + at)
        return self._file.read(size)

    def _write(self, at: int, data: bytes) -> None:
        self._file.seek(self._offset + at)
        self._file.write(data)


def _parts(path: str) -> list[str]:
    parts = [part for part in path.split("/") if part]
    for part in parts:
        if part in (".", "..") or len(part) > 255 or _FORBIDDEN & set(part) or not part.isprintable():
            raise FatError(f"{path!r} can't be a name on a FAT file system")
    return parts


def _slots(content: bytearray) -> Iterator[bytearray]:
    for at in range(0, len(content), _ENTRY_BYTES):
        if content[at] == 0:
            return
        yield content[at : at + _ENTRY_BYTES]


def _gap(content: bytearray, count: int) -> int | None:
    """First of ``count`` free slots in a row."""
    run, ended = 0, False
    for slot in range(len(content) // _ENTRY_BYTES):
        first = content[slot * _ENTRY_BYTES]
        ended = ended or first == 0
        run = run + 1 if ended or first == _FREE else 0
        if run == count:
            return slot - count + 1
    return None


def _short_name(raw: bytes, case: int) -> str:
    base, extension = raw[:8].decode("cp437").rstrip(), raw[8:].decode("cp437").rstrip()
    if raw[0] == 0x05:
        base = "\xe5" + base[1:]
    # Windows NT and Linux keep a short name in small letters by these two bits, without a long one.
    base = base.lower() if case & 0x08 else base
    extension = extension.lower() if case & 0x10 else extension
    return f"{base}.{extension}" if extension else base


def _short_for(name: str, taken: set[bytes]) -> tuple[bytes, bool]:
    """The short name that stands for this one, and whether it says all of it."""
    base, dot, extension = name.rpartition(".")
    if not dot or not base:
        base, extension = name, ""
    upper_base, upper_extension = base.upper(), extension.upper()
    fits = (
        len(base) <= 8
        and len(extension) <= 3
        and set(upper_base) <= _SHORT_CHARACTERS
        and set(upper_extension) <= _SHORT_CHARACTERS
    )
    short = f"{upper_base:<8}{upper_extension:<3}".encode("ascii", "replace")
    if fits and short not in taken:
        return short, name == name.upper()
    clean_base = "".join(c for c in upper_base if c in _SHORT_CHARACTERS) or "FILE"
    clean_extension = "".join(c for c in upper_extension if c in _SHORT_CHARACTERS)[:3]
    for number in range(1, 1_000_000):
        tail = f"~{number}"
        short = f"{clean_base[: 8 - len(tail)] + tail:<8}{clean_extension:<3}".encode("ascii")
        if short not in taken:
            return short, False
    raise FatError(f"there are too many names like {name!r}")


def _short_entry(short: bytes, attributes: int, cluster: int, size: int) -> bytes:
    return struct.pack(
        "<11sBBBHHHHHHHI",
        short, attributes, 0, 0, 0, _DATE, _DATE, cluster >> 16, 0, _DATE, cluster & 0xFFFF, size,
    )  # fmt: skip


def _long_entries(name: str, short: bytes) -> list[bytes]:
    raw = name.encode("utf-16-le")
    units = [raw[at : at + 2] for at in range(0, len(raw), 2)]
    if len(units) % _LONG_CHARACTERS:
        units.append(b"\0\0")
    units += [b"\xff\xff"] * (-len(units) % _LONG_CHARACTERS)
    check = _checksum(short)
    entries = []
    for number in range(len(units) // _LONG_CHARACTERS):
        part = b"".join(units[number * _LONG_CHARACTERS : (number + 1) * _LONG_CHARACTERS])
        last = 0x40 if number == len(units) // _LONG_CHARACTERS - 1 else 0
        entry = bytearray(_ENTRY_BYTES)
        entry[0], entry[11], entry[13] = (number + 1) | last, _LONG_NAME, check
        at = 0
        for place, size in _LONG_PARTS:
            entry[place : place + size] = part[at : at + size]
            at += size
        entries.append(bytes(entry))
    return entries[::-1]


def _checksum(short: bytes) -> int:
    total = 0
    for byte in short:
        total = ((total & 1) << 7) + (total >> 1) + byte & 0xFF
    return total
