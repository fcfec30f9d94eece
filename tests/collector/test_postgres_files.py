"""Files on the shelf that collectors share: what one takes in, the other has, until nobody needs it."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest

from boardbench.collector.errors import NoRoom, NotFound, StoreDamaged, StoreUnavailable
from boardbench.collector.files import Files
from boardbench.collector.stores import postgres_files
from boardbench.collector.stores.postgres import PostgresResultStore
from boardbench.collector.stores.postgres_files import PostgresFiles
from boardbench.v1 import agent_pb2, model_pb2

LARGE = bytes(range(256)) * 10_000
"""Three rows, the last one not full."""

CHUNK_BYTES = 500_000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Clock:
    """A clock that moves when it is told to."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Side:
    """A collector's files, and its way to the shelf."""

    files: Files
    store: PostgresResultStore
    shelf: PostgresFiles
    folder: Path
    needed: set[str]

    async def send(self, content: bytes, name: str = "m.tflite") -> model_pb2.Model:
        header = agent_pb2.PushHeader(
            sha256=sha256(content),
            name=name,
            size_bytes=len(content),
            kind=agent_pb2.FILE_KIND_MODEL,
        )
        async with self.files.receive(header) as transfer:
            if transfer.stored is not None:
                return transfer.stored
            while not transfer.complete:
                at = transfer.offset_bytes
                data = content[at : at + CHUNK_BYTES]
                await transfer.write(agent_pb2.PushChunk(offset_bytes=at, data=data, crc32=zlib.crc32(data)))
            return await transfer.finish()

    async def fetch(self, content: bytes, offset: int = 0) -> bytes:
        return b"".join([chunk.data async for chunk in self.files.read(sha256(content), offset)])


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def sides(postgres_url: str, tmp_path: Path, clock: Clock) -> AsyncIterator[tuple[Side, Side]]:
    made = []
    needed: set[str] = set()

    async def in_use() -> frozenset[str]:
        return frozenset(needed)

    for name in ("a", "b"):
        store = await PostgresResultStore.open(postgres_url)
        shelf = PostgresFiles(store)
        files = Files(
            tmp_path / name, limit_bytes=6_000_000, free_bytes=0, in_use=in_use, shelf=shelf, clock=clock
        )
        await files.open()
        made.append(Side(files, store, shelf, tmp_path / name, needed))
    yield made[0], made[1]
    for side in made:
        await side.store.close()


def rows(url: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(url) as db:
        return db.execute(
            "SELECT f.name, f.whole, count(c.place), coalesce(sum(octet_length(c.content)), 0) FROM files f"
            " LEFT JOIN file_chunks c ON c.sha256 = f.sha256 GROUP BY f.name, f.whole ORDER BY f.name"
        ).fetchall()


async def test_what_one_took_in_the_other_hands_out(sides: tuple[Side, Side], postgres_url: str) -> None:
    one, other = sides
    model = await one.send(LARGE)
    assert rows(postgres_url) == [("m.tflite", 1, 3, len(LARGE))]
    assert await other.files.find(model.sha256) == model
    assert await other.fetch(LARGE) == LARGE
    assert await other.fetch(LARGE, 1_500_000) == LARGE[1_500_000:]
    # Nobody sent it there, and it is there once.
    assert other.files.received_bytes == 0
    assert other.files.used_bytes == len(LARGE)
    assert [path.name for path in sorted((other.folder / "files").iterdir())] == [
        model.sha256,
        f"{model.sha256}.json",
    ]
    # Sent to the other one as well, nothing comes twice.
    assert await other.send(LARGE) == model
    assert rows(postgres_url) == [("m.tflite", 1, 3, len(LARGE))]
    with pytest.raises(NotFound):
        await other.files.find("0" * 64)


async def test_a_file_of_exactly_so_many_rows(sides: tuple[Side, Side], postgres_url: str) -> None:
    content = b"x" * postgres_files._CHUNK_BYTES * 2
    await sides[0].send(content)
    assert await sides[1].fetch(content) == content
    assert rows(postgres_url) == [("m.tflite", 1, 2, len(content))]


async def test_what_is_not_whole_is_nobody_s(
    sides: tuple[Side, Side], postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = sides
    write, left = one.store.write, [3]

    async def failing(function: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise StoreUnavailable("the database is gone")
        return await write(function)

    monkeypatch.setattr(one.store, "write", failing)
    with pytest.raises(StoreUnavailable):
        await one.send(LARGE)
    assert rows(postgres_url) == [("m.tflite", 0, 1, postgres_files._CHUNK_BYTES)]
    with pytest.raises(NotFound):
        await other.files.find(sha256(LARGE))
    # Whoever sends it again, as clients do, brings the rest; this one has it whole already.
    left[0] = 1000
    await one.send(LARGE)
    assert 1000 - left[0] == 6, "looked for it, made room, began, two rows, the end"
    assert rows(postgres_url) == [("m.tflite", 1, 3, len(LARGE))]
    assert await other.fetch(LARGE) == LARGE


async def test_what_nobody_needs_makes_room(
    sides: tuple[Side, Side], clock: Clock, postgres_url: str
) -> None:
    one, other = sides
    contents = [bytes([number]) * 2_000_000 for number in range(4)]
    for number, content in enumerate(contents[:2]):
        await one.send(content, f"{number}")
        clock.now += 10
    # All are young.
    with pytest.raises(NoRoom, match=r"no room for .*--files-limit"):
        await one.send(b"z" * 2_500_000, "z")
    clock.now += 1000
    one.needed.add(sha256(contents[0]))
    await other.send(contents[2], "2")
    # The folder of this one has room, and the shelf has none: the second goes, which no job needs.
    await other.send(contents[3], "3")
    assert [row[0] for row in rows(postgres_url)] == ["0", "2", "3"]
    with pytest.raises(NotFound):
        await other.files.find(sha256(contents[1]))
    assert await other.fetch(contents[0]) == contents[0]
    # One who has it still, and is asked for a job with it, puts it there again.
    clock.now += 2000
    one.needed.clear()
    await one.files.find(sha256(contents[1]))
    assert "1" in [row[0] for row in rows(postgres_url)]
    assert await other.fetch(contents[1]) == contents[1]


async def test_the_rest_of_a_sender_that_went_away_goes(
    sides: tuple[Side, Side], clock: Clock, postgres_url: str
) -> None:
    with psycopg.connect(postgres_url) as db:
        db.execute(
            "INSERT INTO files (sha256, name, format, kind, size_bytes, whole, used)"
            " VALUES ('ab', 'left', '', 1, 100, 0, %s)",
            (clock.now - 90_000,),
        )
    await sides[0].send(b"y" * 1000, "small")
    assert [row[0] for row in rows(postgres_url)] == ["small"]


async def test_a_damaged_row_is_noticed(sides: tuple[Side, Side], clock: Clock, postgres_url: str) -> None:
    one, other = sides
    await one.send(LARGE)
    with psycopg.connect(postgres_url) as db:
        db.execute("UPDATE file_chunks SET content = overlay(content placing '\\x00' from 5) WHERE place = 1")
    with pytest.raises(StoreDamaged, match=r"m\.tflite is damaged in the database.*send it again"):
        await other.fetch(LARGE)
    assert not list((other.folder / "files").iterdir())
    # It is not there any more, and comes back from one who has it.
    assert rows(postgres_url) == []
    clock.now += 61
    await one.send(LARGE)
    assert await other.fetch(LARGE) == LARGE


async def test_a_young_file_stays_for_the_job_that_it_is_for(
    sides: tuple[Side, Side], clock: Clock, postgres_url: str
) -> None:
    one, other = sides
    # Each folder has room for its own two, and the shelf for three of them.
    for number, side in enumerate((one, other)):
        await side.send(bytes([number]) * 2_500_000, f"{number}")
    with pytest.raises(NoRoom, match="in the database: collectors keep at most 6,000,000 bytes there"):
        await other.send(b"z" * 2_500_000, "z")
    assert [row[0] for row in rows(postgres_url)] == ["0", "1"]
    clock.now += 901
    await other.send(b"z" * 2_500_000, "z")
    assert [row[0] for row in rows(postgres_url)] == ["1", "z"]


class Steps:
    """What happens between one write of a collector and the next."""

    def __init__(self, store: PostgresResultStore, monkeypatch: pytest.MonkeyPatch) -> None:
        self.before: dict[int, Callable[[], Awaitable[object]]] = {}
        """By the number of the write, from 1."""
        self._write, self._count = store.write, 0
        monkeypatch.setattr(store, "write", self._counted)

    async def _counted(self, function: Any) -> Any:
        self._count += 1
        step = self.before.pop(self._count, None)
        if step is not None:
            await step()
        return await self._write(function)


async def test_a_file_that_comes_slowly_stays_young(
    sides: tuple[Side, Side], clock: Clock, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = sides

    async def later() -> None:
        clock.now += 400

    async def another() -> None:
        await later()
        # There would be room for it without the one that is coming.
        with pytest.raises(NoRoom):
            await other.send(b"z" * 5_000_000, "z")

    # It makes room and begins; then come the rows.
    Steps(one.store, monkeypatch).before.update({3: later, 4: later, 5: another})
    await one.send(LARGE)
    assert rows(postgres_url) == [("m.tflite", 1, 3, len(LARGE))]


async def test_nothing_is_left_of_a_file_that_was_removed_while_it_came(
    sides: tuple[Side, Side], postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = sides
    Steps(one.store, monkeypatch).before[5] = lambda: other.shelf.remove(sha256(LARGE))
    with pytest.raises(StoreUnavailable, match=r"m\.tflite was removed while it came .*send it again"):
        await one.send(LARGE)
    assert rows(postgres_url) == []
    with psycopg.connect(postgres_url) as db:
        assert db.execute("SELECT COUNT(*) FROM file_chunks").fetchone() == (0,)
    await one.send(LARGE)
    assert await other.fetch(LARGE) == LARGE


async def test_what_can_not_become_whole_is_not_kept(
    sides: tuple[Side, Side], postgres_url: str, clock: Clock
) -> None:
    one, other = sides
    await one.send(LARGE)
    await one.shelf.remove(sha256(LARGE))
    file = one.folder / "files" / sha256(LARGE)
    file.write_bytes(LARGE[:2_000_000])
    clock.now += 61
    with pytest.raises(StoreUnavailable, match="did not come whole"):
        await one.files.find(sha256(LARGE))
    assert rows(postgres_url) == []
    # Another one's is whole, and is not mixed with it.
    await other.send(LARGE)
    assert rows(postgres_url) == [("m.tflite", 1, 3, len(LARGE))]
    # One whose copy was removed fetches it anew.
    file.unlink()
    await one.shelf.remove(sha256(LARGE))
    clock.now += 61
    with pytest.raises(NotFound, match="no longer on this collector; send it again"):
        await one.files.find(sha256(LARGE))
    await other.files.find(sha256(LARGE))
    assert await one.fetch(LARGE) == LARGE
