"""Backups: one file for every kind of store, made while results come in, and restored into any store.

A backup is one moment of the store: it is read in one transaction, which neither waits for writers nor
holds them up. Tables are copied row by row with whatever columns they have, so that a table that a later
version adds is in its backups by itself.
"""

from __future__ import annotations

import contextlib
import gzip
import os
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from boardbench.collector.errors import BackupUnfit, StoreUnavailable
from boardbench.v1 import backup_pb2

MAGIC = b"boardbench-backup-1\n"
"""What the file begins with, before it is compressed."""

LEFT_OUT = frozenset(
    (
        *("schema_version", "boardbench_schema", "probe", "counters", "streams", "sqlite_sequence"),
        *("files", "file_chunks"),
    )
)
"""Tables that belong to one store, and not to what it keeps; and files that wait for boards, which whoever
queues a job sends again."""

_FRAME = struct.Struct("<II")
_MAX_RECORD_BYTES = 256 * 1024 * 1024
_COMPRESSION = 2
"""gzip's level: a backup is made beside a collector that works."""
_BATCH_ROWS = 500
_BATCH_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Table:
    """A table and its columns."""

    name: str
    columns: tuple[str, ...]


class _File(Protocol):
    def read(self, size: int, /) -> bytes: ...

    def write(self, data: bytes, /) -> int: ...


class Source(Protocol):
    """A store at one moment."""

    def tables(self) -> Sequence[Table]:
        """Returns what there is, those left out apart."""

    def rows(self, table: Table) -> Iterator[Sequence[Any]]:
        """Returns the values of each row: text, bytes, int, float or None."""


class Target(Protocol):
    """A store that nothing was ever written into."""

    def tables(self) -> Sequence[Table]:
        """Returns what there is, those left out apart."""

    def insert(self, table: Table, rows: Sequence[Sequence[Any]]) -> None:
        """Adds rows; seen by nobody before all of them are there."""


@dataclass(frozen=True)
class Told:
    """What a backup holds."""

    rows: dict[str, int]
    """By table."""
    collector_version: str
    created: float
    """Unix seconds."""


def save(
    path: Path,
    source: AbstractContextManager[Source],
    *,
    version: str,
    clock: Callable[[], float] = time.time,
) -> Told:
    """Writes a backup into the file and returns what it holds; the file is there whole, or not at all."""
    fresh = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with source as opened, _created(fresh) as raw:
            with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=_COMPRESSION, mtime=0) as file:
                told = _write(file, opened, version, clock())
            raw.flush()
            os.fsync(raw.fileno())
        fresh.replace(path)
        _sync_folder(path.parent)
    except OSError as error:
        raise StoreUnavailable(f"can't write {path}: {error.strerror or error}") from error
    finally:
        fresh.unlink(missing_ok=True)
    return told


def load(path: Path, target: Target | None) -> Told:
    """Reads a backup into the store and returns what it held; BackupUnfit when it is damaged or not whole.

    Without a store it is only looked at.
    """
    try:
        with path.open("rb") as raw, gzip.GzipFile(fileobj=raw, mode="rb") as file:
            return _read(path, file, target)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise BackupUnfit(f"{path} is no backup, or a damaged one: {error}") from error
    except OSError as error:
        raise BackupUnfit(f"can't read {path}: {error.strerror or error}") from error


def look(path: Path) -> Told:
    """Reads a whole backup and returns what it holds; BackupUnfit when it is damaged or not whole."""
    return load(path, None)


def _write(file: _File, source: Source, version: str, now: float) -> Told:
    tables = [table for table in source.tables() if table.name not in LEFT_OUT]
    header = backup_pb2.BackupHeader(collector_version=version)
    header.created_at.FromMicroseconds(round(now * 1e6))
    for table in tables:
        header.tables.add(name=table.name, columns=table.columns)
    file.write(MAGIC)
    _put(file, backup_pb2.BackupRecord(header=header))
    counts = []
    for place, table in enumerate(tables):
        count = 0
        for values in source.rows(table):
            record = backup_pb2.BackupRecord()
            record.row.table = place
            for value in values:
                _set(record.row.values.add(), value)
            _put(file, record)
            count += 1
        counts.append(count)
    _put(file, backup_pb2.BackupRecord(end=backup_pb2.BackupEnd(rows=counts)))
    return Told({table.name: count for table, count in zip(tables, counts, strict=True)}, version, now)


def _read(path: Path, file: _File, target: Target | None) -> Told:
    if file.read(len(MAGIC)) != MAGIC:
        raise BackupUnfit(f"{path} is no backup of boardbench-collector, or one of a newer version")
    records = _records(path, file)
    first = next(records, None)
    if first is None or first.WhichOneof("record") != "header":
        raise BackupUnfit(f"{path} has no header")
    tables = [Table(each.name, tuple(each.columns)) for each in first.header.tables]
    if target is not None:
        _check_tables(path, tables, target.tables(), first.header.collector_version)
    counts = [0] * len(tables)
    waiting: list[Sequence[Any]] = []
    place, size, end = 0, 0, None
    for record in records:
        if end is not None:
            raise BackupUnfit(f"{path} goes on behind its end")
        if record.WhichOneof("record") == "end":
            end = record.end
            continue
        row = record.row
        if row.table >= len(tables) or len(row.values) != len(tables[row.table].columns):
            raise BackupUnfit(f"{path}: a row fits no table")
        if waiting and (row.table != place or len(waiting) == _BATCH_ROWS or size > _BATCH_BYTES):
            if target is not None:
                target.insert(tables[place], waiting)
            waiting, size = [], 0
        place = row.table
        counts[place] += 1
        waiting.append([_get(value) for value in row.values])
        size += record.ByteSize()
    if waiting and target is not None:
        target.insert(tables[place], waiting)
    if end is None:
        raise BackupUnfit(f"{path} is not whole: its end is missing")
    if list(end.rows) != counts:
        raise BackupUnfit(f"{path} is damaged: it says {list(end.rows)} rows and has {counts}")
    created = first.header.created_at.ToMicroseconds() / 1e6
    names = (table.name for table in tables)
    return Told(dict(zip(names, counts, strict=True)), first.header.collector_version, created)


def _check_tables(path: Path, tables: Sequence[Table], there: Sequence[Table], version: str) -> None:
    """Returns when every row has its place; what the backup lacks is left as a new store has it."""
    known = {table.name: set(table.columns) for table in there}
    for table in tables:
        unknown = set(table.columns) - known.get(table.name, set())
        if unknown:
            raise BackupUnfit(
                f"{path} was made by boardbench-collector {version} and has what this one does not know"
                f" ({table.name}: {', '.join(sorted(unknown))}); install that version or a newer one"
            )


def _put(file: _File, record: backup_pb2.BackupRecord) -> None:
    content = record.SerializeToString()
    file.write(_FRAME.pack(len(content), zlib.crc32(content)))
    file.write(content)


def _records(path: Path, file: _File) -> Iterator[backup_pb2.BackupRecord]:
    while head := file.read(_FRAME.size):
        if len(head) < _FRAME.size:
            raise BackupUnfit(f"{path} is not whole: it ends within a record")
        length, crc = _FRAME.unpack(head)
        content = file.read(length) if length <= _MAX_RECORD_BYTES else b""
        if len(content) != length or zlib.crc32(content) != crc:
            raise BackupUnfit(f"{path} is damaged: the CRC of a record is another")
        yield backup_pb2.BackupRecord.FromString(content)


def _set(value: backup_pb2.BackupValue, content: object) -> None:
    if isinstance(content, str):
        value.text = content
    elif isinstance(content, (bytes, memoryview)):
        value.content = bytes(content)
    elif isinstance(content, int):
        value.integer = content
    elif isinstance(content, float):
        value.number = content


def _get(value: backup_pb2.BackupValue) -> Any:
    kind = value.WhichOneof("value")
    return None if kind is None else getattr(value, kind)


@contextlib.contextmanager
def _created(path: Path) -> Iterator[IO[bytes]]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        yield file


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
