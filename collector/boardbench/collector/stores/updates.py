"""Updates as they are: in one small SQLite file, or in the database that collectors share.

Every change is made to what is kept, and not to what a collector remembers: of two collectors that hear of
boards in one update at once, one waits for the other.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Sequence

from google.protobuf.message import DecodeError

from boardbench.collector.errors import StoreDamaged
from boardbench.collector.stores.beside import Session, Tables
from boardbench.v1 import update_pb2

_KEPT = 100
"""Updates that are remembered: years of them."""


def _version_1(db: sqlite3.Connection) -> None:
    """How often each was changed."""
    if db.execute("SELECT 1 FROM sqlite_master WHERE name = 'updates'").fetchone():
        db.execute("ALTER TABLE updates ADD COLUMN version INTEGER NOT NULL DEFAULT 1")
        return
    db.execute(
        """CREATE TABLE updates (
            update_id TEXT NOT NULL PRIMARY KEY,
            created INTEGER NOT NULL,        -- Unix nanoseconds
            content BLOB NOT NULL,           -- boardbench.v1.Update
            version INTEGER NOT NULL DEFAULT 1
        )"""
    )


MIGRATIONS = (_version_1,)
"""Of the SQLite file: the step to version n is at n - 1. PostgreSQL's are in ``postgres_schema.py``."""

TABLES = {"updates": "ON CONFLICT DO NOTHING"}
"""What becomes of a row that is taken over from another collector's file and is there already."""


class UpdateStore:
    """Updates, of one collector or of all that share a database."""

    def __init__(self, tables: Tables) -> None:
        self._tables = tables

    @property
    def shared(self) -> bool:
        """Whether other collectors change them, too."""
        return self._tables.shared

    async def versions(self) -> dict[str, int]:
        """How often each was changed, by its identity: what differs from before is news."""

        def read(db: Session) -> dict[str, int]:
            return dict(db.execute("SELECT update_id, version FROM updates").fetchall())

        return await self._tables.read(read)

    async def get(self, update_ids: Collection[str]) -> list[tuple[int, update_pb2.Update]]:
        """Those that are there, each with its version. Raises StoreDamaged."""

        def read(db: Session) -> list[tuple[int, update_pb2.Update]]:
            marks = ", ".join("?" for _ in update_ids)
            rows = db.execute(
                f"SELECT version, content FROM updates WHERE update_id IN ({marks})", tuple(update_ids)
            ).fetchall()
            return [(int(version), _read(content)) for version, content in rows]

        return await self._tables.read(read) if update_ids else []

    async def add(
        self, update: update_pb2.Update, check: Callable[[Sequence[update_pb2.Update]], None]
    ) -> tuple[int, update_pb2.Update]:
        """Keeps a new one and returns it with its version; the one of this identity where there is one.

        ``check`` gets all that are kept, and raises when the new one can't be begun beside them: nobody adds
        another one meanwhile. Of old ones the oldest go.
        """
        row = (update.update_id, update.created_at.ToNanoseconds(), update.SerializeToString())

        def write(db: Session) -> tuple[int, update_pb2.Update]:
            db.take_turn("updates")
            kept = {
                str(update_id): (int(version), _read(content))
                for update_id, version, content in db.execute(
                    "SELECT update_id, version, content FROM updates"
                ).fetchall()
            }
            if update.update_id in kept:
                return kept[update.update_id]
            check([each for _, each in kept.values()])
            db.execute(
                "INSERT INTO updates (update_id, created, content, version) VALUES (?,?,?,1)",
                row,
            )
            db.execute(
                "DELETE FROM updates WHERE update_id NOT IN"
                " (SELECT update_id FROM updates ORDER BY created DESC LIMIT ?)",
                (_KEPT,),
            )
            return 1, update

        return await self._tables.write(write)

    async def change(
        self, update_id: str, change: Callable[[update_pb2.Update], bool]
    ) -> tuple[int, update_pb2.Update] | None:
        """Changes what is kept, and returns that with its version; None where it is not kept any more.

        ``change`` changes the update that it gets, and says whether it did. It may be called again, with
        another one.
        """

        def write(db: Session) -> tuple[int, update_pb2.Update] | None:
            row = db.execute(
                f"SELECT version, content FROM updates WHERE update_id = ?{db.locking}", (update_id,)
            ).fetchone()
            if row is None:
                return None
            version, update = int(row[0]), _read(row[1])
            if change(update):
                version += 1
                db.execute(
                    "UPDATE updates SET content = ?, version = ? WHERE update_id = ?",
                    (update.SerializeToString(), version, update_id),
                )
            return version, update

        return await self._tables.write(write)


def _read(content: bytes) -> update_pb2.Update:
    try:
        return update_pb2.Update.FromString(bytes(content))
    except DecodeError as error:
        raise StoreDamaged(
            "an update that is kept is damaged: remove updates.db, or in PostgreSQL the rows of the table"
            " updates; what boards do goes on"
        ) from error
