"""Files that wait for boards, in the PostgreSQL store: what one collector took in, every other can hand out.

A file is cut into rows, which go in one at a time, so that results are not held up behind a large model. Its
card is written first and says at last that it is whole. Each collector keeps a copy in its own folder once it
has needed one, and hands out that.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from boardbench.collector.errors import NoRoom, StoreUnavailable
from boardbench.collector.stores.postgres_jobs import Access
from boardbench.collector.stores.postgres_schema import storable
from boardbench.v1 import model_pb2

if TYPE_CHECKING:
    import psycopg

    Connection = psycopg.Connection[Any]

_CHUNK_BYTES = 1024 * 1024
"""Of a row: a model of 100 MB is 100 statements, and none holds the writer up for longer than a commit."""

_LEFT_SECONDS = 86400.0
"""A file whose sender has gone away half-way is somebody's rest after that."""


class PostgresFiles:
    """The shelf that collectors on one database share."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def find(self, sha256: str) -> tuple[model_pb2.Model, int] | None:
        """Returns the file and its kind; None when it is not there whole."""

        def read(db: Connection) -> tuple[model_pb2.Model, int] | None:
            row = db.execute(
                "SELECT name, format, size_bytes, kind FROM files WHERE sha256 = %s AND whole = 1", (sha256,)
            ).fetchone()
            if row is None:
                return None
            model = model_pb2.Model(sha256=sha256, name=row[0], format=row[1], size_bytes=row[2])
            return model, int(row[3])

        return await self._access.read(read)

    async def use(self, sha256: str, at: float) -> bool:
        """Returns whether it is there whole; it is taken as used then."""

        def write(db: Connection) -> bool:
            done = db.execute(
                "UPDATE files SET used = GREATEST(used, %s) WHERE sha256 = %s AND whole = 1", (at, sha256)
            )
            return done.rowcount > 0

        return await self._access.write(write)

    async def put(self, model: model_pb2.Model, kind: int, path: Path, clock: Callable[[], float]) -> None:
        """Returns once every collector can have the file; what is there of it is not sent again."""
        at = clock()

        def begin(db: Connection) -> int:
            db.execute(
                "INSERT INTO files (sha256, name, format, kind, size_bytes, whole, used)"
                " VALUES (%s, %s, %s, %s, %s, 0, %s)"
                " ON CONFLICT (sha256) DO UPDATE SET used = GREATEST(files.used, excluded.used)",
                (
                    model.sha256,
                    storable(model.name, None),
                    storable(model.format, None),
                    kind,
                    model.size_bytes,
                    at,
                ),
            )
            row = db.execute("SELECT COUNT(*) FROM file_chunks WHERE sha256 = %s", (model.sha256,)).fetchone()
            return int(row[0]) if row else 0

        # Rows come in their order, so that their number is the place where it goes on.
        place = await self._access.write(begin)
        count = -(-model.size_bytes // _CHUNK_BYTES)
        with path.open("rb") as file:
            while place < count:
                data = await asyncio.to_thread(_piece, file.fileno(), place * _CHUNK_BYTES)
                await self._access.write(_inserting(model, place, data, clock()))
                place += 1

        def end(db: Connection) -> bool:
            row = db.execute(
                "SELECT COALESCE(SUM(octet_length(content)), 0) FROM file_chunks WHERE sha256 = %s",
                (model.sha256,),
            ).fetchone()
            if row is None or int(row[0]) != model.size_bytes:
                # Nobody could complete it: what is there is not sent again.
                _delete(db, [model.sha256])
                return False
            db.execute("UPDATE files SET whole = 1 WHERE sha256 = %s", (model.sha256,))
            return True

        if not await self._access.write(end):
            raise StoreUnavailable(f"{model.name} did not come whole into the database; send it again")

    async def read(self, sha256: str, offset_bytes: int) -> AsyncIterator[bytes]:
        """Yields the bytes from there on; ends early where it was removed meanwhile."""
        place, skip = divmod(offset_bytes, _CHUNK_BYTES)
        while True:

            def read(db: Connection, place: int = place) -> bytes | None:
                row = db.execute(
                    "SELECT content FROM file_chunks WHERE sha256 = %s AND place = %s",
                    (sha256, place),
                    binary=True,
                ).fetchone()
                return None if row is None else bytes(row[0])

            data = await self._access.read(read)
            if data is None:
                return
            if skip < len(data):
                yield data[skip:]
            place, skip = place + 1, 0

    async def remove(self, sha256: str) -> None:
        """Takes the file away; whoever has it puts it there again when it is used."""
        await self._access.write(lambda db: _delete(db, [sha256]))

    async def make_room(
        self,
        model: model_pb2.Model,
        *,
        limit_bytes: int,
        kept: Collection[str],
        used_before: float,
        at: float,
    ) -> None:
        """Removes what is neither ``kept`` nor young until the file fits, the least recently used first.

        NoRoom when it does not fit then.
        """

        def write(db: Connection) -> bool:
            rows = db.execute(
                "SELECT sha256, size_bytes, used, whole FROM files WHERE sha256 <> %s"
                " ORDER BY used FOR UPDATE",
                (model.sha256,),
            ).fetchall()
            over = sum(int(row[1]) for row in rows) + model.size_bytes - limit_bytes
            gone = []
            for sha256, size_bytes, used, whole in rows:
                left = not whole and used < at - _LEFT_SECONDS
                if left or (over > 0 and sha256 not in kept and used < used_before):
                    gone.append(sha256)
                    over -= size_bytes
            _delete(db, gone)
            return over <= 0

        if not await self._access.write(write):
            raise NoRoom(
                f"there is no room for {model.name} ({model.size_bytes:,} bytes) in the database: collectors"
                f" keep at most {limit_bytes:,} bytes there, and the files that are there are young or open"
                " jobs need them; cancel some, or raise --files-limit"
            )


def _delete(db: Connection, sha256s: list[str]) -> None:
    for table in ("file_chunks", "files"):
        db.execute(f"DELETE FROM {table} WHERE sha256 = ANY(%s)", (sha256s,))


def _piece(descriptor: int, offset_bytes: int) -> bytes:
    """Returns one row's bytes, fewer only at the end of the file."""
    data = b""
    while len(data) < _CHUNK_BYTES:
        more = os.pread(descriptor, _CHUNK_BYTES - len(data), offset_bytes + len(data))
        if not more:
            break
        data += more
    return data


def _inserting(model: model_pb2.Model, place: int, data: bytes, at: float) -> Callable[[Any], None]:
    sha256 = model.sha256

    def write(db: Connection) -> None:
        # However long it takes, it is in use meanwhile; and rows without a card would be nobody's.
        held = db.execute("UPDATE files SET used = GREATEST(used, %s) WHERE sha256 = %s", (at, sha256))
        if not held.rowcount:
            raise StoreUnavailable(f"{model.name} was removed while it came into the database; send it again")
        db.execute(
            "INSERT INTO file_chunks (sha256, place, content) VALUES (%s, %s, %b)"
            " ON CONFLICT (sha256, place) DO NOTHING",
            (sha256, place, data),
        )

    return write
