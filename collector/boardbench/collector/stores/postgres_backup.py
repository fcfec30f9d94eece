"""The PostgreSQL store as the source and the target of a backup."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from boardbench.collector.errors import StoreUnavailable
from boardbench.collector.stores.backup import LEFT_OUT, Table, Told, load
from boardbench.collector.stores.postgres_connection import opened, place, told
from boardbench.collector.stores.postgres_schema import DERIVED, MAX_INDEXED, series_key, storable

if TYPE_CHECKING:
    from pathlib import Path

    import psycopg

    Connection = psycopg.Connection[Any]

_INDEXED = {("results", name) for name in ("runtime", "model_name", "model_sha256")}
"""Texts of any length that a table keeps only the beginning of."""


class _Tables:
    """What there is in a database."""

    def __init__(self, db: Connection) -> None:
        self._db = db

    def tables(self) -> Sequence[Table]:
        """See ``backup.Source.tables``."""
        columns: dict[str, list[str]] = {}
        for name, column in self._db.execute(
            "SELECT table_name, column_name FROM information_schema.columns"
            " WHERE table_schema = current_schema() ORDER BY table_name, ordinal_position"
        ):
            if name not in LEFT_OUT and column not in DERIVED.get(name, ()):
                columns.setdefault(name, []).append(column)
        return [Table(name, tuple(found)) for name, found in columns.items()]

    def rows(self, table: Table) -> Iterator[Sequence[Any]]:
        """See ``backup.Source.rows``."""
        order = " ORDER BY arrival" if "arrival" in table.columns else ""
        # A cursor on the server's side: here there is never more than a few hundred rows.
        with self._db.cursor(name=f"backup_{table.name}", binary=True) as cursor:
            cursor.itersize = 200
            cursor.execute(f"SELECT {', '.join(table.columns)} FROM {table.name}{order}")
            yield from cursor

    def insert(self, table: Table, rows: Sequence[Sequence[Any]]) -> None:
        """See ``backup.Target.insert``."""
        keep = [_keeper(table.name, column) for column in table.columns]
        columns = table.columns
        values = [[keep_(value) for keep_, value in zip(keep, row, strict=True)] for row in rows]
        if table.name == "series":
            columns = (*columns, *DERIVED["series"])
            text = table.columns.index("series")
            values = [[*row, series_key(row[text])] for row in values]
        marks = ", ".join("%b" for _ in columns)
        statement = f"INSERT INTO {table.name} ({', '.join(columns)}) VALUES ({marks})"
        self._db.cursor().executemany(statement, values)


def _keeper(table: str, column: str) -> Callable[[Any], Any]:
    limit = MAX_INDEXED if (table, column) in _INDEXED else None
    return lambda value: storable(value, limit) if isinstance(value, str) else value


@contextlib.contextmanager
def moment(url: str) -> Iterator[_Tables]:
    """The database as it is when the context is entered, whatever collectors write meanwhile."""
    with _database(url) as db:
        db.execute("BEGIN TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        yield _Tables(db)
        db.execute("COMMIT")


def restore(url: str, backup: Path) -> Told:
    """Fills an empty store in this database from a backup; it is there whole, or not at all.

    StoreUnavailable when something is in it already.
    """
    with _database(url) as db, db.transaction():
        # Collectors that run take places here first, and wait.
        db.execute("SELECT value FROM counters ORDER BY name FOR UPDATE")
        for table in ("results", "devices", "jobs", "enrolment_tokens", "device_keys", "updates"):
            if db.execute(f"SELECT 1 FROM {table} LIMIT 1").fetchone() is not None:
                raise StoreUnavailable(
                    f"there is a store in {place(url)} already; name an empty database with --store"
                )
        held = load(backup, _Tables(db))
        for name in ("results", "jobs"):
            db.execute(
                f"UPDATE counters SET value = (SELECT COALESCE(MAX(arrival), 0) FROM {name}) WHERE name = %s",
                (name,),
            )
        return held


@contextlib.contextmanager
def _database(url: str) -> Iterator[Connection]:
    db = opened(url, time.time)
    # Only now: that it is not installed is told there.
    import psycopg

    try:
        # What it reads may take as long as there are results.
        db.execute("SET statement_timeout = 0")
        yield db
    except psycopg.Error as error:
        raise told(error, place(url)) from error
    finally:
        db.close()
