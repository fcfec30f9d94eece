"""Updates as they are, in one small SQLite file of their own, whatever the results are in.

The SQL is the plain kind that every database has.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from google.protobuf.message import DecodeError

from boardbench.collector.errors import StoreDamaged, StoreUnavailable
from boardbench.v1 import update_pb2

_KEPT = 100
"""Updates that are remembered: years of them."""

_BUSY_SECONDS = 10.0
_TABLE = """CREATE TABLE IF NOT EXISTS updates (
    update_id TEXT NOT NULL PRIMARY KEY,
    created INTEGER NOT NULL,
    content BLOB NOT NULL
)"""


class UpdateStore:
    """Updates in one file. Calls are quick and may come from any thread."""

    def __init__(self, path: Path) -> None:
        """Makes the file where there is none. Raises StoreUnavailable."""
        self._path = path
        self._turn = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            self._db = sqlite3.connect(
                path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            self._db.execute(_TABLE)
        except (OSError, sqlite3.Error) as error:
            raise StoreUnavailable(f"{path}: can't be used: {error}") from error

    def close(self) -> None:
        """Lets the file go."""
        with self._turn:
            self._db.close()

    def put(self, update: update_pb2.Update) -> None:
        """The update is kept as it is now; of old ones the oldest go."""
        row = (update.update_id, update.created_at.ToNanoseconds(), update.SerializeToString())
        with self._doing() as db:
            db.execute("BEGIN IMMEDIATE")
            try:
                db.execute("DELETE FROM updates WHERE update_id = ?", row[:1])
                db.execute("INSERT INTO updates (update_id, created, content) VALUES (?,?,?)", row)
                db.execute(
                    "DELETE FROM updates WHERE update_id NOT IN "
                    "(SELECT update_id FROM updates ORDER BY created DESC LIMIT ?)",
                    (_KEPT,),
                )
                db.execute("COMMIT")
            except BaseException:
                if db.in_transaction:
                    db.execute("ROLLBACK")
                raise

    def all(self) -> list[update_pb2.Update]:
        """All that are kept, the latest first. Raises StoreDamaged, StoreUnavailable."""
        with self._doing() as db:
            rows = db.execute("SELECT content FROM updates ORDER BY created DESC").fetchall()
        try:
            return [update_pb2.Update.FromString(content) for (content,) in rows]
        except DecodeError as error:
            raise StoreDamaged(f"{self._path} is damaged: remove it; what boards do goes on") from error

    @contextmanager
    def _doing(self) -> Iterator[sqlite3.Connection]:
        with self._turn:
            try:
                yield self._db
            except sqlite3.Error as error:
                raise StoreUnavailable(f"{self._path}: {error}") from error
