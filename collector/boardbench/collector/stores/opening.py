"""Which store a configuration names."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import sqlite3
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import StartError
from boardbench.collector.store import ResultStore
from boardbench.collector.stores import enrolments, updates
from boardbench.collector.stores.backup import Source, Told
from boardbench.collector.stores.beside import FleetTables, Session, Tables, TablesFile

if TYPE_CHECKING:
    from boardbench.collector.stores.postgres_files import PostgresFiles

_log = logging.getLogger(__name__)

POSTGRES_SCHEMES = ("postgresql", "postgres")


def is_postgres(config: CollectorConfig) -> bool:
    """Whether results are in PostgreSQL; StartError when the configuration names something unknown."""
    if not config.store:
        return False
    scheme = config.store.partition("://")[0]
    if scheme not in POSTGRES_SCHEMES:
        raise StartError(
            f"--store {scheme}: is nothing that is known; name a database as postgresql://HOST/DATABASE,"
            " or leave it out for SQLite"
        )
    return True


def name_of(config: CollectorConfig) -> str:
    """Returns where the results are, without a password."""
    if is_postgres(config):
        from boardbench.collector.stores.postgres_connection import place

        return place(config.store)
    return str(config.store_path)


async def open_store(config: CollectorConfig) -> ResultStore:
    """Returns the store, made or migrated when need be; StartError or StoreError when that can't be."""
    if is_postgres(config):
        from boardbench.collector.stores.postgres import PostgresResultStore

        return await PostgresResultStore.open(
            config.store,
            max_result_bytes=config.max_result_bytes,
            commit_window_seconds=config.commit_window_seconds,
        )
    from boardbench.collector.stores.sqlite import SqliteResultStore

    return await SqliteResultStore.open(
        config.store_path,
        max_result_bytes=config.max_result_bytes,
        commit_window_seconds=config.commit_window_seconds,
    )


@dataclass(frozen=True)
class Beside:
    """What a collector keeps beside its results."""

    enrolments: enrolments.Enrolments
    updates: updates.UpdateStore
    files: PostgresFiles | None = None
    """Where files that wait for boards are for every collector; None: in a folder alone."""


@contextlib.asynccontextmanager
async def open_beside(config: CollectorConfig, store: ResultStore) -> AsyncIterator[Beside]:
    """What is kept beside the results of this store, open within the context. Raises StoreError.

    In a database that collectors share, it takes over what this one had in files of its own.
    """
    if not is_postgres(config):
        with (
            contextlib.closing(TablesFile(config.enrolments_path, enrolments.MIGRATIONS)) as tokens,
            contextlib.closing(TablesFile(config.updates_path, updates.MIGRATIONS)) as campaigns,
        ):
            yield Beside(enrolments.Enrolments(tokens), updates.UpdateStore(campaigns))
        return
    from boardbench.collector.stores.postgres import PostgresResultStore
    from boardbench.collector.stores.postgres_files import PostgresFiles

    assert isinstance(store, PostgresResultStore)
    tables = FleetTables(store)
    await _take_over(config.enrolments_path, enrolments, tables)
    await _take_over(config.updates_path, updates, tables)
    files = PostgresFiles(store) if config.files_dir is None else None
    yield Beside(enrolments.Enrolments(tables), updates.UpdateStore(tables), files)


@contextlib.asynccontextmanager
async def open_enrolments(config: CollectorConfig) -> AsyncIterator[enrolments.Enrolments]:
    """The tokens and keys alone, while collectors run or not. Raises StartError, StoreError."""
    if not is_postgres(config):
        with contextlib.closing(TablesFile(config.enrolments_path, enrolments.MIGRATIONS)) as tables:
            yield enrolments.Enrolments(tables)
        return
    from boardbench.collector.stores.postgres import PostgresResultStore

    store = await PostgresResultStore.open(config.store)
    try:
        yield enrolments.Enrolments(FleetTables(store))
    finally:
        await store.close()


class _Kept(Protocol):
    """A module of tables that are kept beside results."""

    @property
    def MIGRATIONS(self) -> Sequence[Callable[[sqlite3.Connection], None]]: ...

    @property
    def TABLES(self) -> Mapping[str, str]: ...


async def _take_over(path: Path, kept: _Kept, tables: Tables) -> None:
    """Moves the rows of a file into the tables, once; the file stays under another name."""
    if not await asyncio.to_thread(path.is_file):
        return
    with contextlib.closing(TablesFile(path, kept.MIGRATIONS)) as file:
        for name, conflict in kept.TABLES.items():

            def read(db: Session, name: str = name) -> tuple[list[str], list[tuple[object, ...]]]:
                cursor = db.execute(f"SELECT * FROM {name}")
                return [column[0] for column in cursor.description], cursor.fetchall()

            columns, rows = await file.read(read)
            marks = ", ".join("?" for _ in columns)
            statement = f"INSERT INTO {name} ({', '.join(columns)}) VALUES ({marks}) {conflict}"
            await tables.write(functools.partial(_insert, statement, rows))
    moved = path.with_name(f"{path.name}.moved")
    await asyncio.to_thread(path.replace, moved)
    _log.info("what %s held is in the database now; the file is kept as %s", path, moved.name)


def _insert(statement: str, rows: Sequence[Sequence[object]], db: Session) -> None:
    for row in rows:
        db.execute(statement, row)


def moment(config: CollectorConfig) -> AbstractContextManager[Source]:
    """Returns the store as it is when the context is entered, for a backup."""
    if is_postgres(config):
        from boardbench.collector.stores import postgres_backup

        return postgres_backup.moment(config.store)
    from boardbench.collector.stores import sqlite_backup

    return sqlite_backup.moment(config.store_path)


def restore(config: CollectorConfig, file: Path) -> Told:
    """Makes the store from a backup and returns what it held; StoreError when one is there already."""
    if is_postgres(config):
        from boardbench.collector.stores import postgres_backup

        return postgres_backup.restore(config.store, file)
    from boardbench.collector.stores import sqlite_backup

    return sqlite_backup.restore(config.store_path, file)
