"""The SQLite store, and the small files beside it, as the source and the target of a backup."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from boardbench.collector.errors import StoreError, StoreForeign, StoreUnavailable
from boardbench.collector.stores import enrolments, updates
from boardbench.collector.stores.backup import LEFT_OUT, Table, Told, load
from boardbench.collector.stores.beside import TablesFile, bring_up_to_date
from boardbench.collector.stores.sqlite import connect, told
from boardbench.collector.stores.sqlite_schema import LATEST_VERSION, migrate, version_of

_BESIDE = {"enrolments": enrolments, "updates": updates}
"""Files beside the store, by their names without the ending."""


class _Tables:
    """What there is in the files: each table is in one of the connections."""

    def __init__(self, *connections: sqlite3.Connection) -> None:
        self._connections = connections
        self._places: dict[str, sqlite3.Connection] = {}
        """Where each table is."""

    def tables(self) -> Sequence[Table]:
        """See ``backup.Source.tables``."""
        found = []
        for db in self._connections:
            schemas = [name for _, name, _ in db.execute("PRAGMA database_list")]
            for name in (name for schema in schemas for name in _names(db, schema)):
                self._places[name] = db
                found.append(Table(name, tuple(row[1] for row in db.execute(f"PRAGMA table_info({name})"))))
        return found

    def rows(self, table: Table) -> Iterator[Sequence[Any]]:
        """See ``backup.Source.rows``."""
        order = " ORDER BY arrival" if "arrival" in table.columns else ""
        yield from self._places[table.name].execute(
            f"SELECT {', '.join(table.columns)} FROM {table.name}{order}"
        )

    def insert(self, table: Table, rows: Sequence[Sequence[Any]]) -> None:
        """See ``backup.Target.insert``."""
        marks = ", ".join("?" for _ in table.columns)
        statement = f"INSERT INTO {table.name} ({', '.join(table.columns)}) VALUES ({marks})"
        self._places[table.name].executemany(statement, rows)


def _names(db: sqlite3.Connection, schema: str) -> list[str]:
    tables = db.execute(f"SELECT name FROM {schema}.sqlite_master WHERE type = 'table' ORDER BY name")
    return [name for (name,) in tables if name not in LEFT_OUT and not name.startswith("sqlite_")]


@contextlib.contextmanager
def moment(path: Path) -> Iterator[_Tables]:
    """The file as it is when the context is entered, whatever a collector writes meanwhile.

    A store of an older version stays as it is: what is read is a copy that was brought up to date.
    """
    if not path.is_file():
        raise StoreUnavailable(f"there is no store {path}; name its folder with --data-dir")
    try:
        with contextlib.ExitStack() as stack:
            db = stack.enter_context(_of_this_version(path))
            db.execute("BEGIN")
            # A transaction begins with the first page that it reads.
            db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
            beside = [
                stack.enter_context(contextlib.closing(_copied(_file(path, name), kept.MIGRATIONS)))
                for name, kept in _BESIDE.items()
                if _file(path, name).is_file()
            ]
            yield _Tables(db, *beside)
            db.execute("COMMIT")
    except StoreForeign as error:
        raise StoreForeign(f"can't use {path}: {error}") from error
    except sqlite3.Error as error:
        raise told(error, path) from error


@contextlib.contextmanager
def _of_this_version(path: Path) -> Iterator[sqlite3.Connection]:
    with contextlib.closing(connect(path, "ro")) as db:
        if version_of(db) == LATEST_VERSION:
            yield db
            return
        try:
            folder = Path(tempfile.mkdtemp(prefix=".backup-", dir=path.parent))
        except OSError as error:
            raise StoreUnavailable(
                f"{path} is of an older version, and its folder takes no copy to bring up to date:"
                f" {error.strerror}"
            ) from error
        try:
            with contextlib.closing(sqlite3.connect(folder / path.name, isolation_level=None)) as copy:
                db.backup(copy)
                # Nobody else sees it, and it is gone in a moment.
                copy.execute("PRAGMA journal_mode = OFF")
                copy.execute("PRAGMA synchronous = OFF")
                migrate(copy, now=time.time())
                yield copy
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _copied(path: Path, migrations: Sequence[Callable[[sqlite3.Connection], None]]) -> sqlite3.Connection:
    """Returns what a small file holds, in memory: while it is read itself, nobody can write into it."""
    copy = sqlite3.connect(":memory:", isolation_level=None)
    try:
        with contextlib.closing(connect(path, "rw")) as db:
            db.backup(copy)
        bring_up_to_date(copy, path.name, migrations)
    except BaseException:
        copy.close()
        raise
    return copy


def _file(path: Path, name: str) -> Path:
    return path.with_name(f"{name}.db")


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
    _check_log(path)
    for name in _BESIDE:
        file = _file(path, name)
        if not file.exists():
            _check_log(file)
            continue
        with contextlib.closing(connect(file, "rw")) as db:
            tables = [table for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
            if any(db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() for table in tables):
                raise StoreUnavailable(
                    f"{file} is there already, with something in it; move it away first, or name another"
                    " --data-dir"
                )


def _check_log(path: Path) -> None:
    """Returns when SQLite will not find a log beside the file, and take it for one of the file's own."""
    for end in ("-wal", "-journal"):
        log = path.with_name(path.name + end)
        if log.exists():
            raise StoreUnavailable(
                f"{log} is left of a store that was moved, and may hold its latest entries: move it to where"
                " that one is, or name another --data-dir"
            )


def _fill(fresh: Mapping[str, Path], backup: Path) -> Told:
    for name, module in _BESIDE.items():
        TablesFile(fresh[name], module.MIGRATIONS).close()
    os.close(os.open(fresh["main"], os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
    with contextlib.closing(connect(fresh["main"], "rw")) as db:
        for name in _BESIDE:
            db.execute(f"ATTACH ? AS {name}", (f"{fresh[name].absolute().as_uri()}?mode=rw",))
        # Files that nobody else sees; they are synced as a whole at their end.
        db.execute("PRAGMA journal_mode = OFF")
        db.execute("PRAGMA synchronous = OFF")
        migrate(db, now=time.time())
        db.execute("BEGIN")
        held = load(backup, _Tables(db))
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
