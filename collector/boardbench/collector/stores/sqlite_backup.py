"""The SQLite store, and the small files beside it, as the source and the target of a backup."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from boardbench.collector.errors import StoreError, StoreForeign, StoreUnavailable
from boardbench.collector.stores import enrolments, updates
from boardbench.collector.stores.backup import LEFT_OUT, Table, Told, load
from boardbench.collector.stores.beside import TablesFile
from boardbench.collector.stores.sqlite import connect, told
from boardbench.collector.stores.sqlite_schema import APPLICATION_ID, LATEST_VERSION, migrate

_BESIDE = {"enrolments": enrolments, "updates": updates}
"""Files beside the store, by their names without the ending."""


class _Tables:
    """What there is in the files."""

    def __init__(self, db: sqlite3.Connection, beside: Sequence[str]) -> None:
        self._db = db
        self._schemas = ("main", *beside)

    def tables(self) -> Sequence[Table]:
        """See ``backup.Source.tables``."""
        names = [
            name
            for schema in self._schemas
            for (name,) in self._db.execute(
                f"SELECT name FROM {schema}.sqlite_master WHERE type = 'table' ORDER BY name"
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
            there = [name for name in _BESIDE if _file(path, name).is_file()]
            for name in there:
                _attach(db, name, _file(path, name), "ro")
                _check_beside(db, name)
            db.execute("BEGIN")
            yield _Tables(db, there)
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
        raise _older(f"it has version {version}", LATEST_VERSION)


def _check_beside(db: sqlite3.Connection, name: str) -> None:
    (version,) = db.execute(f"PRAGMA {name}.user_version").fetchone()
    latest = len(_BESIDE[name].MIGRATIONS)
    if version != latest:
        raise _older(f"{name}.db beside it has version {version}", latest)


def _older(what: str, latest: int) -> StoreForeign:
    return StoreForeign(
        f"{what}, and this boardbench-collector writes version {latest};"
        " start the collector of this version once, which brings it up to date"
    )


def _file(path: Path, name: str) -> Path:
    return path.with_name(f"{name}.db")


def _attach(db: sqlite3.Connection, name: str, path: Path, mode: str) -> None:
    db.execute(f"ATTACH ? AS {name}", (f"{path.absolute().as_uri()}?mode={mode}",))


def restore(path: Path, backup: Path) -> Told:
    """Makes a store in this file from a backup and returns what it holds; it is there whole, or not at all.

    StoreUnavailable when a store is there already, or a collector is about to make one.
    """
    # The store itself last: while it is not there, nothing was restored.
    files = {**{name: _file(path, name) for name in _BESIDE}, "main": path}
    fresh = {name: file.with_name(f".{file.name}.restoring") for name, file in files.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _locked(path):
            _check_free(path)
            for file in fresh.values():
                for end in ("", "-wal", "-shm", "-journal"):
                    file.with_name(file.name + end).unlink(missing_ok=True)
            held = _fill(fresh, backup)
            for name, file in files.items():
                fresh[name].replace(file)
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
        for file in fresh.values():
            file.unlink(missing_ok=True)


def _check_free(path: Path) -> None:
    """Returns when nothing would be lost; a file without a row is none."""
    if path.exists():
        raise StoreUnavailable(
            f"there is a store {path} already; move it away first, or name another --data-dir"
        )
    for name in _BESIDE:
        file = _file(path, name)
        if not file.exists():
            continue
        with contextlib.closing(connect(file, "ro")) as db:
            tables = [table for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            if any(db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in tables):
                raise StoreUnavailable(
                    f"{file} is there already, with something in it; move it away first, or name another"
                    " --data-dir"
                )


def _fill(fresh: Mapping[str, Path], backup: Path) -> Told:
    for name, module in _BESIDE.items():
        TablesFile(fresh[name], module.MIGRATIONS).close()
    os.close(os.open(fresh["main"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    with contextlib.closing(connect(fresh["main"], "rw")) as db:
        for name in _BESIDE:
            _attach(db, name, fresh[name], "rw")
        # Files that nobody else sees; they are synced as a whole at their end.
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        migrate(db, now=time.time())
        db.execute("BEGIN")
        held = load(backup, _Tables(db, tuple(_BESIDE)))
        db.execute("COMMIT")
    for file in fresh.values():
        descriptor = os.open(file, os.O_RDWR)
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
