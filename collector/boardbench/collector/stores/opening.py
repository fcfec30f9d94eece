"""Which store a configuration names."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import StartError
from boardbench.collector.store import ResultStore
from boardbench.collector.stores.backup import Source, Told

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
        from boardbench.collector.stores.postgres import place

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
