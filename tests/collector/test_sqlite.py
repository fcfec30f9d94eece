"""What only the SQLite store can get wrong: files, versions, full disks, other processes."""

from __future__ import annotations

import asyncio
import sqlite3
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from boardbench.collector.errors import (
    OutOfOrder,
    ResultRefused,
    StoreDamaged,
    StoreError,
    StoreForeign,
    StoreUnavailable,
)
from boardbench.collector.store import ResultFilter
from boardbench.collector.stores import gather, sqlite_schema
from boardbench.collector.stores.sqlite import SqliteResultStore
from boardbench.v1 import collector_pb2, placement_pb2, result_pb2

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]

VERSION_1 = Path(__file__).parent / "data" / "store-1.sql"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "results.db"


@pytest.fixture
def old_store(path: Path) -> Path:
    """A store that version 1 left behind."""
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.executescript(VERSION_1.read_text())
    db.close()
    return path


def _schema(path: Path) -> list[tuple[str, ...]]:
    db = sqlite3.connect(path)
    rows = db.execute("SELECT type, name, tbl_name, sql FROM sqlite_master ORDER BY type, name").fetchall()
    db.close()
    return rows


async def test_what_was_stored_is_there_after_a_restart(
    path: Path, make_result: MakeResult, make_hello: MakeHello
) -> None:
    store = await SqliteResultStore.open(path)
    await store.greet(make_hello(), 100.0)
    await store.append("pi5", "spool-1", 3, make_result())
    await store.close()
    store = await SqliteResultStore.open(path)
    assert await store.find("run-1") == (make_result(),)
    assert await store.acknowledged("pi5", "spool-1") == 3
    assert [device.hello for device in await store.devices()] == [make_hello()]
    assert await store.append("pi5", "spool-1", 3, make_result()) is False
    await store.close()


async def test_only_the_owner_can_read_it(path: Path) -> None:
    store = await SqliteResultStore.open(path)
    await store.probe()
    for file in (path, path.with_name("results.db-wal"), path.with_suffix(".lock")):
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    await store.close()


async def test_a_commit_survives_a_power_cut_by_its_settings(path: Path) -> None:
    store = await SqliteResultStore.open(path)

    def settings(db: sqlite3.Connection) -> tuple[str, int]:
        (mode,) = db.execute("PRAGMA journal_mode").fetchone()
        (synchronous,) = db.execute("PRAGMA synchronous").fetchone()
        return mode, synchronous

    assert await store.write(settings) == ("wal", 2)  # 2 is FULL
    await store.close()


async def test_version_1_is_brought_up_to_date(old_store: Path, make_result: MakeResult) -> None:
    store = await SqliteResultStore.open(old_store)
    await store.check()
    assert [device.device_id for device in await store.devices()] == ["pi4", "pi5"]
    heartbeat = (await store.devices())[1].heartbeat
    assert heartbeat == collector_pb2.Heartbeat(spool_pending=1, spool_dropped=2)
    page = await store.results(ResultFilter(), limit=10)
    assert [result.run_id for result in page.results] == ["run-3", "run-2", "run-1", "run-4"]
    (second,) = await store.find("run-2")
    expected = make_result("run-2", samples=5, finished=1.8e9 + 20, p50=0.02)
    # The file was written when an index of zero was not told apart from none.
    for op in expected.placement.ops[:1]:
        op.ClearField("index")
    assert second == expected
    latest = await store.latest(received_since=0, per_device=10)
    assert [(entry.device_id, entry.result.run_id) for entry in latest.results] == [
        ("pi4", "run-4"),
        ("pi5", "run-2"),
    ]
    totals = [(outcome.device_id, outcome.status, outcome.total) for outcome in await store.outcomes()]
    assert totals == [("pi4", 1, 1), ("pi5", 1, 2), ("pi5", 2, 1)]
    assert await store.acknowledged("pi4", "spool-9") == 12
    # And it goes on.
    (third,) = await store.find("run-3")
    assert await store.append("pi5", "spool-1", 3, third) is False
    assert await store.append("pi5", "spool-1", 4, make_result("run-5")) is True
    await store.close()


async def test_version_5_knows_the_series_of_old_results(old_store: Path) -> None:
    store = await SqliteResultStore.open(old_store)
    removed = await store.remove(received_before=None, per_series=1, limit=100)
    left = {result.run_id for result in (await store.results(ResultFilter(), limit=10)).results}
    # On pi5 the third failed; the second is the last that succeeded.
    assert (removed.results, left) == (1, {"run-2", "run-3", "run-4"})
    await store.check()
    await store.close()


async def test_version_3_knows_where_ops_were_before(old_store: Path, make_result: MakeResult) -> None:
    store = await SqliteResultStore.open(old_store)
    assert [entry.drifts for entry in (await store.latest(received_since=0, per_device=9)).results] == [0, 0]
    moved = make_result("run-9")
    moved.placement.ops[3].unit = placement_pb2.UNIT_CPU
    assert await store.append("pi5", "spool-1", 9, moved) is True
    drifts = {
        entry.device_id: entry.drifts
        for entry in (await store.latest(received_since=0, per_device=9)).results
    }
    assert drifts == {"pi4": 0, "pi5": 1}
    await store.close()
    store = await SqliteResultStore.open(old_store)
    latest = await store.latest(received_since=0, per_device=9)
    assert [entry.drifts for entry in latest.results] == [0, 1], "it outlives the process"
    await store.close()


async def test_places_that_are_damaged_are_forgotten(path: Path, make_result: MakeResult) -> None:
    store = await SqliteResultStore.open(path)
    await store.append("pi5", "spool-1", 1, make_result("run-1"))
    for sequence, damage in enumerate(
        (b"", b"\x01", b"\x01\x00\x09", b"\x09\x00\x00", b"\x01\x00\x00abc"), 2
    ):
        await store.write(
            lambda db, damage=damage: db.execute("UPDATE series SET places = ?", (damage,)).rowcount
        )
        # The writer remembers what it wrote: only another one reads it.
        await store.close()
        store = await SqliteResultStore.open(path)
        moved = make_result(f"run-{sequence}")
        moved.placement.ops[sequence].unit = placement_pb2.UNIT_GPU
        assert await store.append("pi5", "spool-1", sequence, moved)
    assert (await store.latest(received_since=0, per_device=9)).results[0].drifts == 0
    await store.close()


async def test_an_upgraded_store_is_like_a_new_one(old_store: Path, tmp_path: Path) -> None:
    fresh = tmp_path / "fresh" / "results.db"
    for path in (old_store, fresh):
        await (await SqliteResultStore.open(path)).close()
    assert _schema(old_store) == _schema(fresh)


async def test_a_migration_that_breaks_leaves_the_old_version(
    old_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = _schema(old_store)

    def breaks(db: sqlite3.Connection) -> None:
        sqlite_schema._version_2(db)
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(sqlite_schema, "MIGRATIONS", (sqlite_schema._version_1, breaks))
        with pytest.raises(StoreUnavailable, match="no space left"):
            await SqliteResultStore.open(old_store)
    assert _schema(old_store) == before
    store = await SqliteResultStore.open(old_store)
    await store.check()
    await store.close()


async def test_a_store_of_a_newer_program_is_left_alone(path: Path) -> None:
    await (await SqliteResultStore.open(path)).close()
    db = sqlite3.connect(path)
    db.execute("INSERT INTO schema_version (version, migrated) VALUES (99, 0)")
    db.commit()
    db.close()
    with pytest.raises(StoreForeign, match=r"results\.db.*version 99.*install a newer one"):
        await SqliteResultStore.open(path)


async def test_another_programs_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    db = sqlite3.connect(path)
    db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.commit()
    db.close()
    with pytest.raises(StoreForeign, match="no store of boardbench-collector"):
        await SqliteResultStore.open(path)


def test_a_file_that_is_no_database_is_left_alone(path: Path) -> None:
    path.parent.mkdir()
    path.write_bytes(b"dear diary, " * 400)
    with pytest.raises(StoreForeign, match=r"results\.db is not an SQLite file"):
        asyncio.run(SqliteResultStore.open(path))
    assert path.read_bytes() == b"dear diary, " * 400


async def test_two_collectors_dont_share_a_store(path: Path) -> None:
    store = await SqliteResultStore.open(path)
    with pytest.raises(StoreUnavailable, match="another boardbench-collector has"):
        await SqliteResultStore.open(path)
    await store.close()
    await (await SqliteResultStore.open(path)).close()


async def test_a_folder_that_cant_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreUnavailable, match=r"can't use the folder .*file/data.*--data-dir"):
        await SqliteResultStore.open(tmp_path / "file" / "data" / "results.db")


def _spoil(path: Path) -> None:
    """Overwrites pages in the middle of the file."""
    middle = path.stat().st_size // 4096 // 2
    with path.open("r+b") as file:
        for page in range(middle, middle + 12):
            file.seek(page * 4096)
            file.write(b"\xff" * 4096)


async def test_damage_is_found(path: Path, make_result: MakeResult) -> None:
    store = await SqliteResultStore.open(path)
    for n in range(1, 40):
        await store.append("pi5", "spool-1", n, make_result(f"run-{n}", samples=500))
    await store.check()
    await store.close()
    _spoil(path)
    store = await SqliteResultStore.open(path)
    with pytest.raises(StoreDamaged, match=r"results\.db"):
        await store.check()
    await store.close()


async def test_a_record_that_was_changed_is_found(path: Path, make_result: MakeResult) -> None:
    store = await SqliteResultStore.open(path)
    await store.append("pi5", "spool-1", 1, make_result("run-1"))
    await store.write(
        lambda db: (
            db.execute("UPDATE results SET summary = ?", (make_result("run-2").SerializeToString(),)).rowcount
        )
    )
    with pytest.raises(StoreDamaged, match=r"run-1 .* says 'run-2'"):
        await store.check()
    await store.write(lambda db: db.execute("UPDATE results SET summary = x'ff'").rowcount)
    with pytest.raises(StoreDamaged, match=r"run-1 .* is unreadable"):
        await store.check()
    await store.close()


async def test_a_full_disk_loses_no_acknowledged_result_and_leaves_no_gap(
    path: Path, make_result: MakeResult
) -> None:
    store = await SqliteResultStore.open(path, commit_window_seconds=0)
    await store.append("pi5", "spool-1", 1, make_result("run-1"))

    def limit_pages(pages: int) -> Callable[[sqlite3.Connection], None]:
        return lambda db: db.execute(f"PRAGMA max_page_count = {pages}").close()

    # SQLite meets this limit with the same SQLITE_FULL as a full file system.
    await store.write(limit_pages(30))
    with pytest.raises(StoreUnavailable, match=r"no space left for .*results\.db"):
        await store.append("pi5", "spool-1", 2, make_result("run-2", samples=40_000), after=1)
    # A small one behind it would fit, and would hide for ever that the one before is missing.
    with pytest.raises(OutOfOrder):
        await store.append("pi5", "spool-1", 3, make_result("run-3", samples=0), after=2)
    assert await store.acknowledged("pi5", "spool-1") == 1
    assert await store.find("run-1") == (make_result("run-1"),)
    await store.write(limit_pages(2**30))
    assert await store.append("pi5", "spool-1", 2, make_result("run-2", samples=40_000), after=1) is True
    assert await store.append("pi5", "spool-1", 3, make_result("run-3"), after=2) is True
    await store.check()
    await store.close()


async def test_reading_goes_on_while_something_else_holds_the_write_lock(
    path: Path, make_result: MakeResult
) -> None:
    store = await SqliteResultStore.open(path)
    await store.append("pi5", "spool-1", 1, make_result("run-1"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = store.append("pi5", "spool-1", 2, make_result("run-2"))
    assert len((await store.results(ResultFilter(), limit=10)).results) == 1
    assert len((await store.latest(received_since=0, per_device=10)).results) == 1
    assert not waiting.done()
    other.execute("ROLLBACK")
    assert await waiting is True
    other.close()
    await store.close()


async def test_who_has_more_waits_while_too_much_waits_for_its_commit(
    path: Path, make_result: MakeResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gather, "CROWDED_BYTES", 200_000)
    store = await SqliteResultStore.open(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = []
    while not store.is_crowded:
        number = len(waiting) + 1
        waiting.append(store.append("pi5", "spool-1", number, make_result(f"run-{number}", samples=10_000)))
    assert 4 < len(waiting) < 50
    both = [asyncio.create_task(store.room()) for _ in range(2)]
    gone = asyncio.create_task(store.room())
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.gather(gone, return_exceptions=True)
    assert not any(task.done() for task in both)
    other.execute("ROLLBACK")
    await asyncio.gather(*both)
    assert not store.is_crowded
    assert await asyncio.gather(*waiting) == [True] * len(waiting)
    other.close()
    await store.close()


async def test_writing_goes_on_while_something_reads(path: Path, make_result: MakeResult) -> None:
    store = await SqliteResultStore.open(path)
    await store.append("pi5", "spool-1", 1, make_result("run-1"))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN")
    assert other.execute("SELECT COUNT(*) FROM results").fetchone() == (1,)
    assert await store.append("pi5", "spool-1", 2, make_result("run-2")) is True
    assert other.execute("SELECT COUNT(*) FROM results").fetchone() == (1,)
    other.close()
    await store.close()


async def test_one_commit_takes_what_came_within_the_window(path: Path, make_result: MakeResult) -> None:
    store = await SqliteResultStore.open(path, commit_window_seconds=0.05)
    commits: list[str] = []
    store._db.set_trace_callback(lambda text: commits.append(text) if text == "COMMIT" else None)
    await asyncio.gather(*(store.append("pi5", "spool-1", n, make_result(f"run-{n}")) for n in range(1, 101)))
    assert len(commits) <= 2  # one, or two when the writer woke between the first append and the others
    await store.close()


async def test_a_batch_is_stored_in_pieces_and_each_result_told_its_own(
    path: Path, make_result: MakeResult
) -> None:
    store = await SqliteResultStore.open(path, commit_window_seconds=0.05)
    known = [store.append("pi5", "old", n, make_result(f"run-{n}")) for n in (3, 40, 77)]
    assert await asyncio.gather(*known) == [True] * 3
    refuses = (
        "CREATE TRIGGER seven BEFORE INSERT ON results WHEN new.run_id LIKE 'run-%7' BEGIN SELECT {}; END"
    )
    await store.write(lambda db: db.execute(refuses.format("RAISE(ABORT, 'no seven')")).rowcount)
    answers = await asyncio.gather(
        *(
            store.append("pi5", "spool", n, make_result(f"run-{n}", p50=0.5 if n == 40 else 0.0125))
            for n in range(1, 81)
        ),
        return_exceptions=True,
    )
    for n, answer in enumerate(answers, 1):
        if n == 40:
            assert isinstance(answer, ResultRefused) and answer.code == "conflict"
        elif n % 10 == 7:
            # The one that is there already meets the trigger first.
            assert isinstance(answer, ResultRefused) and answer.code == "unfit", n
        else:
            assert answer is (n != 3), n
    assert await store.acknowledged("pi5", "spool") == 80
    assert [outcome.total for outcome in await store.outcomes()] == [73]
    arrived = await store.arrivals(0, limit=1000, max_bytes=10**9)
    assert [arrival.result.run_id for arrival in arrived[3:]] == [
        f"run-{n}" for n in range(1, 81) if n not in (3, 40) and n % 10 != 7
    ]
    await store.check()
    await store.close()


async def test_whoever_writes_something_that_does_not_fit_disturbs_nobody(
    path: Path, make_result: MakeResult
) -> None:
    store = await SqliteResultStore.open(path, commit_window_seconds=0.05)

    def spoils(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO labels (device_id, name, value) VALUES ('pi5', 'a', 'b')")
        db.execute("INSERT INTO labels (device_id, name, value) VALUES ('pi5', 'a', NULL)")

    def refuses(db: sqlite3.Connection) -> None:
        db.execute("INSERT INTO labels (device_id, name, value) VALUES ('pi5', 'c', 'd')")
        raise StoreForeign("not this one")

    answers = await asyncio.gather(
        store.append("pi5", "spool-1", 1, make_result("run-1")),
        store.write(spoils),
        store.write(refuses),
        store.append("pi5", "spool-1", 2, make_result("run-2"), after=1),
        return_exceptions=True,
    )
    assert (answers[0], answers[3]) == (True, True)
    assert isinstance(answers[1], StoreError) and "NOT NULL" in str(answers[1])
    assert isinstance(answers[2], StoreForeign)
    assert await store.jobs.labels() == {}
    await store.close()


async def test_closing_commits_what_was_begun(path: Path, make_result: MakeResult) -> None:
    store = await SqliteResultStore.open(path)
    waiting = [store.append("pi5", "spool-1", n, make_result(f"run-{n}")) for n in range(1, 21)]
    await store.close()
    assert await asyncio.gather(*waiting) == [True] * 20
    assert not path.with_name("results.db-wal").exists()


async def test_whoever_goes_away_before_the_commit_disturbs_nobody(
    path: Path, make_result: MakeResult
) -> None:
    store = await SqliteResultStore.open(path)
    gone = store.append("pi5", "spool-1", 1, make_result("run-1"))
    stays = store.append("pi5", "spool-1", 2, make_result("run-2"))
    gone.cancel()
    assert await stays is True
    assert await store.acknowledged("pi5", "spool-1") == 2
    assert len(await store.find("run-1")) == 1
    await store.close()
