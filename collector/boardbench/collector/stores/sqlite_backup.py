"""The SQLite store as the source and the target of a backup."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from boardbench.collector.errors import StoreError, StoreForeign, StoreUnavailable
from boardbench.collector.stores.backup import LEFT_OUT, Table, Told, load
from boardbench.collector.stores.sqlite import connect, told
from boardbench.collector.stores.sqlite_schema import APPLICATION_ID, LATEST_VERSION, migrate


class _Tables:
    """What there is in a file."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def tables(self) -> Sequence[Table]:
        """See ``backup.Source.tables``."""
        names = [
            name
            for (name,) in self._db.execute(
                "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name"
            )
            if name not in LEFT_OUT and not name.startswith("sqlite_")
        ]
        return [
            Table(name, tuple(row[1] for row in self._db.execute(f"PRAGMA table_info({name})")))
            for name in names
        ]

    def rows(self, table: Table) -> Iterator[Sequence[Any]]:
        """See ``backup.Source.rows``."""
        order = " ORDER BY arrival" if "arrival" in table.columns else ""
        yield from self._db.execute(f"SELECT {', '.join(table.columns)} FROM {table.name}{order}")

    def insert(self, table: Table, rows: Sequence[Sequence[Any]]) -> None:
        """See ``backup.Target.insert``."""
        marks = ", ".join("?" for _ in table.columns)
        statement = f"INSERT INTO {table.name} ({', '.join(table.columns)}) VALUES ({marks})"
        self._db.executemany(statement, rows)


@contextlib.contextmanager
def moment(path: Path) -> Iterator[_Tables]:
    """The file as it is when the context is entered, whatever a collector writes meanwhile."""
    if not path.is_file():
        raise StoreUnavailable(f"there is no store {path}; name its folder with --data-dir")
    try:
        with contextlib.closing(connect(path, "ro")) as db:
            _check_version(db)
            db.execute("BEGIN")
            yield _Tables(db)
            db.execute("COMMIT")
    except StoreForeign as error:
        raise StoreForeign(f"can't use {path}: {error}") from error
    except sqlite3.Error as error:
        raise told(error, path) from error


def _check_version(db: sqlite3.Connection) -> None:
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    if application_id != APPLICATION_ID:
        raise StoreForeign("it is an SQLite file, but no store of boardbench-collector")
    (version,) = db.execute("SELECT MAX(version) FROM schema_version").fetchone()
    if version != LATEST_VERSION:
        raise StoreForeign(
            f"it has version {version}, and this boardbench-collector writes version {LATEST_VERSION};"
            " start the collector of this version once, which brings it up to date"
        )


def restore(path: Path, backup: Path) -> Told:
    """Makes a store in this file from a backup and returns what it holds; it is there whole, or not at all.

    StoreUnavailable when a store is there already, or a collector is about to make one.
    """
    fresh = path.with_name(f".{path.name}.restoring")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(path):
            if path.exists():
                raise StoreUnavailable(
                    f"there is a store {path} already; move it away first, or name another --data-dir"
                )
            for left in (fresh, *(fresh.with_name(fresh.name + end) for end in ("-wal", "-shm", "-journal"))):
                left.unlink(missing_ok=True)
            held = _fill(fresh, backup)
            fresh.replace(path)
            folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
            return held
    except StoreError:
        raise
    except (sqlite3.Error, OSError) as error:
        raise told(error, path) from error
    finally:
        fresh.unlink(missing_ok=True)


def _fill(fresh: Path, backup: Path) -> Told:
    os.close(os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    with contextlib.closing(connect(fresh, "rw")) as db:
        # A file that nobody else sees; it is synced as a whole at its end.
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        migrate(db, now=time.time())
        db.execute("BEGIN")
        held = load(backup, _Tables(db))
        db.execute("COMMIT")
    descriptor = os.open(fresh, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return held


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise StoreUnavailable(
                f"another boardbench-collector has {path} open; stop it, or choose another --data-dir"
            ) from error
        yield
    finally:
        os.close(lock)
