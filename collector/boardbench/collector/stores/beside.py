"""Small tables that a collector keeps beside its results: in a file of their own, or in the fleet's database.

A file of their own, because commands write into it while the collector runs, which has the results to itself.
Statements are written once, in the plain SQL that both kinds have, with ``?`` where a value goes.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from boardbench.collector.errors import StoreForeign, StoreUnavailable
from boardbench.collector.stores.postgres_jobs import Access

_T = TypeVar("_T")

_BUSY_SECONDS = 10.0


class Session:
    """A transaction; how a statement marks values and locks rows is the database's own affair."""

    def __init__(self, db: Any, *, mark: str, locking: str, turn: str) -> None:
        self._db = db
        self._mark = mark
        self._turn = turn
        self.locking = locking
        """What a SELECT ends with that keeps its rows from others until the transaction ends."""

    def execute(self, statement: str, values: Sequence[Any] = ()) -> Any:
        """Returns the cursor of the statement; its values stand for its question marks."""
        return self._db.execute(statement.replace("?", self._mark), values)

    def take_turn(self, name: str) -> None:
        """Returns when no other transaction has the turn of this name; it is kept until this one ends."""
        if self._turn:
            self.execute(self._turn, (name,)).fetchall()


class Tables(Protocol):
    """Tables of the same columns, wherever they are."""

    @property
    def shared(self) -> bool:
        """Whether other collectors change them, too."""

    def write(self, function: Callable[[Session], _T]) -> Awaitable[_T]:
        """Returns what the function returned, once its transaction is committed. It may be called again.

        What it raises undoes what it wrote. Raises StoreError.
        """

    def read(self, function: Callable[[Session], _T]) -> Awaitable[_T]:
        """Returns what the function makes of the tables. Raises StoreError."""


class TablesFile:
    """``Tables`` in one SQLite file, or in memory alone. Calls may come from any loop; ``close()`` it."""

    shared = False

    def __init__(self, path: Path | None, migrations: Sequence[Callable[[sqlite3.Connection], None]]) -> None:
        """Makes the file where there is none, and brings it up to date. Raises StoreError."""
        self._name = str(path) if path is not None else "the tables in memory"
        self._turn = threading.Lock()
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(
                path or ":memory:", timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
        except (OSError, sqlite3.Error) as error:
            raise StoreUnavailable(f"{self._name}: can't be used: {error}") from error
        try:
            with self._transaction() as db:
                bring_up_to_date(db, self._name, migrations)
        except BaseException:
            self._db.close()
            raise

    def close(self) -> None:
        """Lets the file go. Idempotent."""
        with self._turn:
            self._db.close()

    async def write(self, function: Callable[[Session], _T]) -> _T:
        """See ``Tables.write``."""

        def work() -> _T:
            with self._transaction() as db:
                return function(_session(db))

        return await asyncio.to_thread(work)

    async def read(self, function: Callable[[Session], _T]) -> _T:
        """See ``Tables.read``."""

        def work() -> _T:
            with self._turn, self._failing():
                return function(_session(self._db))

        return await asyncio.to_thread(work)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with self._turn, self._failing():
            # Nobody else writes from here on: there is no row to lock, and no turn to wait for.
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise StoreUnavailable(f"{self._name}: can't be used: {error}") from error


def bring_up_to_date(
    db: sqlite3.Connection, name: str, migrations: Sequence[Callable[[sqlite3.Connection], None]]
) -> None:
    """Brings the tables of a file of this name to the version that this program has, within a transaction.

    StoreForeign when they are newer.
    """
    (found,) = db.execute("PRAGMA user_version").fetchone()
    if found > len(migrations):
        raise StoreForeign(
            f"{name} has version {found}, and this boardbench-collector knows versions up to"
            f" {len(migrations)}; install a newer one"
        )
    if found < len(migrations):
        for migration in migrations[found:]:
            migration(db)
        db.execute(f"PRAGMA user_version = {len(migrations)}")


def _session(db: sqlite3.Connection) -> Session:
    return Session(db, mark="?", locking="", turn="")


class FleetTables:
    """``Tables`` in the database of a ``PostgresResultStore``, which brings them up to date."""

    shared = True

    def __init__(self, access: Access) -> None:
        self._access = access

    async def write(self, function: Callable[[Session], _T]) -> _T:
        """See ``Tables.write``."""
        return await self._access.write(lambda db: function(_fleet_session(db)))

    async def read(self, function: Callable[[Session], _T]) -> _T:
        """See ``Tables.read``."""
        return await self._access.read(lambda db: function(_fleet_session(db)))


def _fleet_session(db: Any) -> Session:
    # A row that everybody locks: advisory locks are not in every database that speaks PostgreSQL's language.
    turn = "SELECT value FROM counters WHERE name = ? FOR UPDATE"
    return Session(db, mark="%s", locking=" FOR UPDATE", turn=turn)
