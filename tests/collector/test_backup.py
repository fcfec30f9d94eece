"""Backups: of every kind of store, into every kind of store, and what is wrong with a damaged one."""

from __future__ import annotations

import contextlib
import gzip
import sqlite3
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import BackupUnfit, NotAllowed, StoreForeign, StoreUnavailable
from boardbench.collector.jobs import Batch, Booking, JobQuery
from boardbench.collector.store import ResultFilter, ResultStore, Sighting
from boardbench.collector.stores import backup, postgres_backup, postgres_schema, sqlite_backup
from boardbench.collector.stores.opening import open_beside, open_enrolments
from boardbench.collector.stores.postgres import PostgresResultStore
from boardbench.collector.stores.sqlite import SqliteResultStore
from boardbench.v1 import backup_pb2, collector_pb2, job_pb2, result_pb2, update_pb2

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]

KINDS = ("sqlite", "postgres")


class Place:
    """Where a store is, or is to be."""

    def __init__(self, kind: str, where: Any) -> None:
        self.kind, self.where = kind, where

    def open(self) -> Awaitable[ResultStore]:
        return (SqliteResultStore if self.kind == "sqlite" else PostgresResultStore).open(self.where)  # type: ignore[attr-defined, no-any-return]

    @property
    def config(self) -> CollectorConfig:
        if self.kind == "sqlite":
            return CollectorConfig(data_dir=self.where.parent)
        return CollectorConfig(store=self.where, data_dir=Path("/nowhere"))

    def moment(self) -> AbstractContextManager[Any]:
        return (sqlite_backup if self.kind == "sqlite" else postgres_backup).moment(self.where)

    def restore(self, file: Path) -> backup.Told:
        return (sqlite_backup if self.kind == "sqlite" else postgres_backup).restore(self.where, file)


@pytest.fixture
def make_place(tmp_path: Path, request: pytest.FixtureRequest) -> Callable[[str, str], Place]:
    def make(kind: str, name: str) -> Place:
        if kind == "sqlite":
            return Place(kind, tmp_path / name / "results.db")
        return Place(kind, request.getfixturevalue("postgres_server").new_database())

    return make


async def fill(store: ResultStore, make_result: MakeResult, make_hello: MakeHello) -> None:
    """Puts something into every table."""
    for device_id in ("pi4", "pi5"):
        await store.greet(make_hello(device_id), 100.0)
    await store.saw([Sighting("pi5", 110.5, collector_pb2.Heartbeat(spool_pending=3))])
    for n in range(1, 8):
        result = make_result(f"run-{n}", finished=1.8e9 + n, model=f"m{n % 2}", p50=0.01 * n)
        await store.append("pi5", "spool-1", n, result)
    long_name = make_result("long", model="x" * 900 + "\0" + "y")
    long_name.spec.options["text"] = "z" * 3000
    await store.append("pi4", "spool-1", 12, long_name)
    await store.append("pi4", "spool-1", 13, make_result("bad", status=result_pb2.RUN_STATUS_FAILED))
    await store.thin(received_before=4e9, limit=2)
    job = job_pb2.Job(job_id="ab" * 10, batch_id="batch", device_id="pi5", state=1, max_attempts=3)  # type: ignore[arg-type]
    from boardbench.collector.jobs import new_record

    await store.jobs.submit(
        Batch("batch", "digest", 5.0), [new_record(job, at=5.0, deadline=9e9, inputs=None)]
    )
    await store.jobs.reserve([Booking("pi5", "ann", "a look", 8e9)], at=5.0)
    await store.jobs.set_labels(["pi5"], {"lab": "zürich"})


async def everything(store: ResultStore) -> list[Any]:
    """What a store says about itself."""
    await store.check()
    results = await store.results(ResultFilter(), limit=1000)
    latest = await store.latest(received_since=0, per_device=100)
    return [
        await store.devices(),
        results.results,
        [(each.position, each.device_id, each.received_at) for each in await _arrivals(store)],
        await store.outcomes(),
        [(each.device_id, each.received_at, each.result, each.drifts) for each in latest.results],
        [await store.acknowledged(device, "spool-1") for device in ("pi4", "pi5")],
        await store.jobs.jobs(JobQuery(), limit=10),
        await store.jobs.bookings(at=6.0),
        await store.jobs.labels(),
    ]


async def _arrivals(store: ResultStore) -> tuple[Any, ...]:
    return await store.arrivals(0, limit=1000, max_bytes=10**9)


@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("target", KINDS)
async def test_a_backup_of_any_store_is_restored_into_any_other(
    source: str,
    target: str,
    make_place: Callable[[str, str], Place],
    make_result: MakeResult,
    make_hello: MakeHello,
    tmp_path: Path,
) -> None:
    old, new = make_place(source, "old"), make_place(target, "new")
    store = await old.open()
    await fill(store, make_result, make_hello)
    update = update_pb2.Update(update_id="u1", version="0.2.0")
    async with open_beside(old.config, store) as beside:
        token = await beside.enrolments.create(labels={"lab": "zürich"})
        used = await beside.enrolments.create()
        key, _ = await beside.enrolments.enroll(used, "pi5", "i")
        await beside.updates.add(update, lambda _: None)
    file = tmp_path / "all.backup"
    # While the store is open, and something is being written.
    told = backup.save(file, old.moment(), version="1.2.3", clock=lambda: 77.0)
    await store.append("pi5", "spool-1", 99, make_result("later"))
    assert told == backup.look(file) == backup.Told(told.rows, "1.2.3", 77.0)
    assert told.rows["results"] == 9 and told.rows["jobs"] == told.rows["labels"] == 1
    assert (told.rows["enrolment_tokens"], told.rows["device_keys"], told.rows["updates"]) == (2, 1, 1)
    content = gzip.decompress(file.read_bytes())
    assert not any(secret.encode() in content for secret in (token, used, key))
    assert new.restore(file) == told
    again = await new.open()
    assert "later" not in [each.run_id for each in (await again.results(ResultFilter(), limit=99)).results]
    # And it goes on: what came later comes again, everything before is known.
    assert (
        await again.append(
            "pi5", "spool-1", 7, make_result("run-7", finished=1.8e9 + 7, model="m1", p50=0.07)
        )
        is False
    )
    assert await again.append("pi5", "spool-1", 99, make_result("later"), after=7) is True
    left, right = await everything(store), await everything(again)
    # When the later one arrived is another time.
    for found in (left, right):
        found[2] = [(device, position) for position, device, _ in found[2]]
        found[4] = [(device, result, drifts) for device, _, result, drifts in found[4]]
    assert right == left
    async with open_beside(new.config, again) as beside:
        await beside.enrolments.check("pi5", key, required=True)
        with pytest.raises(NotAllowed, match="used by board pi5"):
            await beside.enrolments.enroll(used, "pi4", "j")
        assert (await beside.enrolments.enroll(token, "pi4", "j"))[1] == {"lab": "zürich"}
        assert await beside.updates.get(await beside.updates.versions()) == [(1, update)]
    await store.close()
    await again.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_store_that_is_there_is_not_overwritten(
    kind: str, make_place: Callable[[str, str], Place], make_result: MakeResult, tmp_path: Path
) -> None:
    where = make_place(kind, "a")
    store = await where.open()
    await store.append("pi5", "spool-1", 1, make_result())
    file = tmp_path / "backup"
    backup.save(file, where.moment(), version="1")
    await store.append("pi5", "spool-1", 2, make_result("run-2"))
    await store.close()
    with pytest.raises(StoreUnavailable, match=r"there is a store .* already"):
        where.restore(file)
    store = await where.open()
    assert len(await store.find("run-2")) == 1
    await store.close()


async def test_tokens_that_are_there_are_not_overwritten(
    make_place: Callable[[str, str], Place], saved: Path
) -> None:
    where = make_place("sqlite", "fresh")
    async with open_enrolments(where.config) as enrolments:
        pass
    # A file without a row is none.
    where.restore(saved)
    where.where.unlink()
    async with open_enrolments(where.config) as enrolments:
        await enrolments.create()
    with pytest.raises(StoreUnavailable, match=r"enrolments\.db is there already, with something in it"):
        where.restore(saved)
    assert not where.where.exists()


async def test_a_database_with_tokens_is_not_filled(
    make_place: Callable[[str, str], Place], saved: Path
) -> None:
    where = make_place("postgres", "tokens")
    async with open_enrolments(where.config) as enrolments:
        await enrolments.create()
    with pytest.raises(StoreUnavailable, match=r"there is a store .* already"):
        where.restore(saved)


async def test_older_files_beside_the_store_are_in_its_backup(
    make_place: Callable[[str, str], Place], tmp_path: Path
) -> None:
    where = make_place("sqlite", "older")
    await (await where.open()).close()
    beside = where.where.with_name("updates.db")
    update = update_pb2.Update(update_id="u1", version="0.2.0")
    with contextlib.closing(sqlite3.connect(beside)) as older:
        # As version 0.1 made it.
        older.execute(
            "CREATE TABLE updates (update_id TEXT NOT NULL PRIMARY KEY, created INTEGER NOT NULL,"
            " content BLOB NOT NULL)"
        )
        older.execute("INSERT INTO updates VALUES ('u1', 5, ?)", (update.SerializeToString(),))
        older.commit()
    backup.save(tmp_path / "b", where.moment(), version="1")
    with contextlib.closing(sqlite3.connect(beside)) as older:
        assert older.execute("PRAGMA user_version").fetchone() == (0,), "it stays as it was"
    new = make_place("sqlite", "new")
    new.restore(tmp_path / "b")
    store = await new.open()
    async with open_beside(new.config, store) as kept:
        assert await kept.updates.get(["u1"]) == [(1, update)]
    await store.close()
    with contextlib.closing(sqlite3.connect(beside)) as newer:
        newer.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreForeign, match=r"updates\.db has version 99, .*install a newer one"):
        backup.save(tmp_path / "b", where.moment(), version="1")


async def test_nobody_waits_for_a_backup(make_place: Callable[[str, str], Place], tmp_path: Path) -> None:
    """It may take minutes; boards are enrolled meanwhile, and what comes then is not in it."""
    where = make_place("sqlite", "busy")
    store = await where.open()
    async with open_beside(where.config, store) as beside:
        await beside.enrolments.create()
        with where.moment() as source:
            tables = {table.name: table for table in source.tables()}
            assert len(list(source.rows(tables["enrolment_tokens"]))) == 1
            await beside.enrolments.enroll(await beside.enrolments.create(), "pi5", "i")
            await beside.updates.add(update_pb2.Update(update_id="u1"), lambda _: None)
            assert list(source.rows(tables["device_keys"])) == list(source.rows(tables["updates"])) == []
            assert len(list(source.rows(tables["enrolment_tokens"]))) == 1
    await store.close()


async def test_a_running_collectors_folder_is_left_alone(
    make_place: Callable[[str, str], Place], tmp_path: Path
) -> None:
    where = make_place("sqlite", "a")
    store = await where.open()
    backup.save(tmp_path / "backup", where.moment(), version="1")
    with pytest.raises(StoreUnavailable, match="another boardbench-collector has"):
        where.restore(tmp_path / "backup")
    await store.close()


@pytest.fixture
async def saved(
    make_place: Callable[[str, str], Place], make_result: MakeResult, make_hello: MakeHello, tmp_path: Path
) -> Path:
    """A backup."""
    where = make_place("sqlite", "saved")
    store = await where.open()
    await fill(store, make_result, make_hello)
    backup.save(tmp_path / "saved.backup", where.moment(), version="1")
    await store.close()
    return tmp_path / "saved.backup"


def _unpacked(file: Path, change: Callable[[bytearray], bytes | bytearray]) -> None:
    file.write_bytes(gzip.compress(bytes(change(bytearray(gzip.decompress(file.read_bytes()))))))


def _flipped(content: bytearray) -> bytearray:
    content[len(content) // 2] ^= 1
    return content


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda file: file.write_bytes(file.read_bytes()[:-300]), "damaged"),
    "flipped": (
        lambda file: file.write_bytes(bytes(_flipped(bytearray(file.read_bytes())))),
        "damaged|is no backup",
    ),
    "cut inside": (lambda file: _unpacked(file, lambda content: content[:-40]), "damaged|not whole"),
    "flipped inside": (lambda file: _unpacked(file, _flipped), "CRC"),
    "no end": (
        lambda file: _unpacked(file, lambda content: content[: _before_end(content)]),
        "end is missing",
    ),
    "more": (
        lambda file: _unpacked(file, lambda content: content + content[_before_end(content) :] * 2),
        "behind its end",
    ),
    "empty": (lambda file: file.write_bytes(b""), "is no backup"),
    "other": (lambda file: file.write_bytes(b"dear diary"), "is no backup"),
    "other gzip": (lambda file: file.write_bytes(gzip.compress(b"dear diary")), "is no backup"),
}


def _before_end(content: bytes | bytearray) -> int:
    end, at = 0, len(backup.MAGIC)
    while at < len(content):
        length = int.from_bytes(content[at : at + 4], "little")
        end, at = at, at + 8 + length
    return end


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("kind", KINDS)
async def test_a_damaged_backup_restores_nothing(
    damage: str, kind: str, saved: Path, make_place: Callable[[str, str], Place]
) -> None:
    change, words = DAMAGE[damage]
    change(saved)
    with pytest.raises(BackupUnfit, match=words):
        backup.look(saved)
    where = make_place(kind, "new")
    with pytest.raises(BackupUnfit, match=words):
        where.restore(saved)
    store = await where.open()
    assert (await store.results(ResultFilter(), limit=1)).results == ()
    assert await store.devices() == ()
    await store.close()


async def test_a_backup_of_a_newer_program_is_refused_by_name(
    make_place: Callable[[str, str], Place], tmp_path: Path
) -> None:
    class Newer:
        def __enter__(self) -> Newer:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def tables(self) -> list[backup.Table]:
            return [backup.Table("results", ("run_id", "colour"))]

        def rows(self, _: backup.Table) -> Any:
            return iter([("run-1", "red")])

    backup.save(tmp_path / "newer", Newer(), version="9.0")
    with pytest.raises(BackupUnfit, match=r"9\.0 .*results: colour.*newer"):
        make_place("sqlite", "a").restore(tmp_path / "newer")


def test_no_backup_is_half_written(tmp_path: Path) -> None:
    class Breaks:
        def __enter__(self) -> Breaks:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def tables(self) -> list[backup.Table]:
            raise StoreUnavailable("gone")

        def rows(self, _: backup.Table) -> Any:
            raise AssertionError

    file = tmp_path / "backup"
    file.write_bytes(b"the one of yesterday")
    with pytest.raises(StoreUnavailable, match="gone"):
        backup.save(file, Breaks(), version="1")
    assert file.read_bytes() == b"the one of yesterday"
    assert [each.name for each in tmp_path.iterdir()] == ["backup"]
    with pytest.raises(StoreUnavailable, match=r"can't write .*/nowhere/backup"):
        backup.save(tmp_path / "nowhere" / "backup", Breaks(), version="1")


def test_no_store_and_another_programs_file(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match="there is no store"):
        backup.save(tmp_path / "b", sqlite_backup.moment(tmp_path / "no.db"), version="1")
    db = sqlite3.connect(tmp_path / "other.db")
    db.execute("CREATE TABLE bookmarks (url TEXT)")
    db.commit()
    db.close()
    with pytest.raises(StoreForeign, match="no store of boardbench-collector"):
        backup.save(tmp_path / "b", sqlite_backup.moment(tmp_path / "other.db"), version="1")


async def test_a_backup_of_an_older_store_leaves_it_as_it_is(
    make_place: Callable[[str, str], Place], tmp_path: Path
) -> None:
    """Whoever is about to bring it up to date wants a backup of before."""
    where = make_place("sqlite", "older")
    where.where.parent.mkdir()
    with contextlib.closing(sqlite3.connect(where.where)) as db:
        db.executescript((Path(__file__).parent / "data" / "store-1.sql").read_text())
    before = where.where.read_bytes()
    told = backup.save(tmp_path / "b", where.moment(), version="1")
    assert told.rows["results"] == 4 and told.rows["devices"] == 2
    assert where.where.read_bytes() == before
    assert [path.name for path in where.where.parent.iterdir()] == ["results.db"]
    new = make_place("sqlite", "new")
    new.restore(tmp_path / "b")
    stores = [await each.open() for each in (where, new)]
    old, restored = [await everything(store) for store in stores]
    assert restored == old
    for store in stores:
        await store.close()
    with contextlib.closing(sqlite3.connect(where.where)) as db:
        db.execute("INSERT INTO schema_version VALUES (99, 0)")
        db.commit()
    with pytest.raises(StoreForeign, match=r"version 99, .*install a newer one"):
        backup.save(tmp_path / "b", where.moment(), version="1")


@pytest.mark.parametrize("name", ["results.db-wal", "enrolments.db-journal"])
async def test_a_log_of_another_store_is_not_taken_for_the_new_ones(
    name: str, make_place: Callable[[str, str], Place], saved: Path
) -> None:
    """Of a collector that was killed the log is a file beside its store, and may be left when that moves."""
    where = make_place("sqlite", "moved")
    where.where.parent.mkdir()
    log = where.where.with_name(name)
    log.write_bytes(b"what was committed last")
    with pytest.raises(StoreUnavailable, match=rf"{name} is left of a store that was moved.*--data-dir"):
        where.restore(saved)
    assert not where.where.exists()
    log.unlink()
    where.restore(saved)


async def test_both_kinds_of_store_have_the_same_tables(make_place: Callable[[str, str], Place]) -> None:
    found = {}
    for kind in KINDS:
        where = make_place(kind, "a")
        store = await where.open()
        async with open_beside(where.config, store):
            pass
        await store.close()
        with where.moment() as source:
            found[kind] = {table.name: set(table.columns) for table in source.tables()}
    assert found["sqlite"] == found["postgres"]
    assert set(found["sqlite"]) >= {"results", "series", "jobs", "labels", "progress"}
    assert set(found["sqlite"]) >= {"enrolment_tokens", "device_keys", "updates"}
    assert set(postgres_schema.DERIVED) <= set(found["sqlite"])


def test_every_kind_of_value_comes_back() -> None:
    for value in ("", "zürich\0", b"", b"\xff\0", 0, -(2**63), 2**63 - 1, 0.0, -1.5e300, None):
        kept = backup_pb2.BackupValue()
        backup._set(kept, value)
        found = backup._get(backup_pb2.BackupValue.FromString(kept.SerializeToString()))
        assert (found, type(found)) == (value, type(value))
