"""What only the PostgreSQL store can get wrong: collectors beside it, a server that dies, odd texts."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import logging
import threading
import warnings
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import psycopg
import pytest

from boardbench.collector.errors import (
    OutOfOrder,
    ResultRefused,
    StartError,
    StoreDamaged,
    StoreForeign,
    StoreUnavailable,
)
from boardbench.collector.jobs import Batch, Booking, new_record, run_id_of
from boardbench.collector.store import ResultFilter, ResultStore, Sighting
from boardbench.collector.stores import postgres_connection, postgres_schema
from boardbench.collector.stores.postgres import PostgresResultStore
from boardbench.collector.stores.postgres_connection import place
from boardbench.v1 import collector_pb2, job_pb2, result_pb2

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]


@pytest.fixture
async def collectors(postgres_url: str) -> AsyncIterator[list[PostgresResultStore]]:
    """Four collectors on one database, each with connections of its own."""
    async with AsyncExitStack() as stack:
        opened = await asyncio.gather(*(PostgresResultStore.open(postgres_url) for _ in range(4)))
        for store in opened:
            stack.push_async_callback(store.close)
        yield list(opened)


def ask(url: str, query: str, *values: Any) -> list[tuple[Any, ...]]:
    with psycopg.connect(url, autocommit=True) as db:
        cursor = db.execute(query, values)  # type: ignore[arg-type]
        return cursor.fetchall() if cursor.description else []


# Several collectors


async def test_all_that_start_at_once_find_one_store(postgres_url: str) -> None:
    opened = await asyncio.gather(*(PostgresResultStore.open(postgres_url) for _ in range(6)))
    versions = [
        version for (version,) in ask(postgres_url, "SELECT version FROM boardbench_schema ORDER BY 1")
    ]
    assert versions == list(range(1, postgres_schema.LATEST_VERSION + 1))
    await asyncio.gather(*(store.close() for store in opened))


async def test_a_stream_moves_from_one_collector_to_another(
    collectors: list[PostgresResultStore], make_result: MakeResult
) -> None:
    for n in range(1, 41):
        store = collectors[n % 4]
        assert await store.acknowledged("pi5", "spool") == n - 1
        assert await store.append("pi5", "spool", n, make_result(f"run-{n}"), after=n - 1) is True
    with pytest.raises(OutOfOrder):
        await collectors[0].append("pi5", "spool", 42, make_result("run-42"), after=41)
    assert await collectors[1].append("pi5", "spool", 3, make_result("run-3")) is False
    assert len((await collectors[2].results(ResultFilter(), limit=100)).results) == 40
    assert [outcome.total for outcome in await collectors[3].outcomes()] == [40]


async def test_the_same_backlog_sent_to_all_of_them_is_stored_once(
    collectors: list[PostgresResultStore], make_result: MakeResult
) -> None:
    count = 60
    futures = [
        store.append("pi5", "spool", n, make_result(f"run-{n}"), after=n - 1)
        for store in collectors
        for n in range(1, count + 1)
    ]
    answers = await asyncio.gather(*futures, return_exceptions=True)
    assert sum(answer is True for answer in answers) == count
    # What was handed over behind something that was not stored yet waits for it, and never leaves a gap.
    assert all(answer in (True, False) or isinstance(answer, OutOfOrder) for answer in answers)
    arrivals = await collectors[0].arrivals(0, limit=1000, max_bytes=10**9)
    assert [arrival.result.run_id for arrival in arrivals] == [f"run-{n}" for n in range(1, count + 1)]
    assert [outcome.total for outcome in await collectors[0].outcomes()] == [count]
    await collectors[0].check()


async def test_one_run_sent_to_all_of_them_at_once_is_stored_once(
    collectors: list[PostgresResultStore], make_result: MakeResult
) -> None:
    futures = [
        store.append(
            "pi5", f"spool-{store_number}", n, make_result(f"run-{n if store_number % 2 else 51 - n}")
        )
        for n in range(1, 51)
        for store_number, store in enumerate(collectors)
    ]
    answers = await asyncio.gather(*futures)
    assert sum(answers) == 50
    assert len((await collectors[0].results(ResultFilter(), limit=1000)).results) == 50


async def test_what_becomes_readable_later_has_a_later_place(
    collectors: list[PostgresResultStore], make_result: MakeResult
) -> None:
    done = asyncio.Event()

    async def write(number: int, store: ResultStore) -> None:
        for n in range(1, 31):
            await store.append(f"board-{number}", "spool", n, make_result(f"run-{number}-{n}", samples=0))

    async def follow() -> list[str]:
        seen: list[str] = []
        position = 0
        while True:
            last = done.is_set()
            for arrival in await collectors[3].arrivals(position, limit=7, max_bytes=10**9):
                position = arrival.position
                seen.append(arrival.result.run_id)
            if last and position == (await collectors[3].news(position)).position:
                return seen

    following = asyncio.create_task(follow())
    await asyncio.gather(*(write(number, store) for number, store in enumerate(collectors)))
    done.set()
    seen = await asyncio.wait_for(following, 60)
    assert len(seen) == len(set(seen)) == 120, "whoever follows misses nothing"


async def test_no_job_is_claimed_twice_by_many_who_ask_at_once(
    collectors: list[PostgresResultStore], make_hello: MakeHello
) -> None:
    boards = [f"board-{n}" for n in range(3)]
    records = []
    for n in range(90):
        job = job_pb2.Job(
            job_id=f"{n:04d}{'ab' * 8}",
            batch_id="batch",
            device_id=boards[n % 3],
            state=1,
            max_attempts=3,  # type: ignore[arg-type]
        )
        records.append(new_record(job, at=1.0, deadline=9e9, inputs=None))
    await collectors[0].jobs.submit(Batch("batch", "digest", 1.0), records)
    for board in boards:
        await collectors[0].greet(make_hello(board), 1.0)

    async def take(store: PostgresResultStore, board: str) -> list[str]:
        taken: list[str] = []
        while True:
            # Each asks for two more than are out, whoever has them.
            given = await store.jobs.claim(board, at=2.0, lease_until=99.0, most_open=1000)
            if not given:
                return taken
            taken += [record.job_id for record in given[:2]]
            back = {
                record.job_id: lambda found: dataclasses.replace(found, job=_queued(found.job))
                for record in given[2:]
            }
            await store.jobs.change(back)

    rounds = await asyncio.gather(*(take(store, board) for store in collectors for board in boards))
    claimed = [job_id for taken in rounds for job_id in taken]
    assert sorted(claimed) == sorted(record.job_id for record in records)


def _queued(job: job_pb2.Job) -> job_pb2.Job:
    again = job_pb2.Job()
    again.CopyFrom(job)
    again.state = job_pb2.JOB_STATE_QUEUED
    return again


async def test_a_board_gets_no_more_than_it_may_have_however_many_ask(
    collectors: list[PostgresResultStore], make_hello: MakeHello
) -> None:
    records = [
        new_record(
            job_pb2.Job(job_id=f"{n:04d}{'ab' * 8}", batch_id="b", device_id="pi5", state=1, max_attempts=3),  # type: ignore[arg-type]
            at=1.0, deadline=9e9, inputs=None,
        )
        for n in range(20)
    ]  # fmt: skip
    await collectors[0].greet(make_hello("pi5"), 1.0)
    await collectors[0].jobs.submit(Batch("b", "digest", 1.0), records)
    claims = (store.jobs.claim("pi5", at=2.0, lease_until=99.0, most_open=2) for store in collectors * 3)
    given = [record.job_id for some in await asyncio.gather(*claims) for record in some]
    assert len(given) == len(set(given)) == 2


async def test_of_those_who_reserve_a_board_at_once_one_has_it(collectors: list[PostgresResultStore]) -> None:
    wanted = [
        store.jobs.reserve(
            [
                Booking(board, f"holder-{number}", "", 99.0)
                for board in ("a", "b", "c")[:: 1 - 2 * (number % 2)]
            ],
            at=1.0,
        )
        for number, store in enumerate(collectors)
    ]
    in_the_way = await asyncio.gather(*wanted)
    assert [not taken for taken in in_the_way].count(True) == 1
    holders = {booking.holder for booking in await collectors[0].jobs.bookings(at=1.0)}
    assert len(holders) == 1 and len(await collectors[0].jobs.bookings(at=1.0)) == 3


async def test_a_result_ends_its_job_whichever_collector_takes_it(
    collectors: list[PostgresResultStore], make_result: MakeResult, make_hello: MakeHello
) -> None:
    job_id = "ab" * 10
    job = job_pb2.Job(job_id=job_id, batch_id="b", device_id="pi5", state=1, max_attempts=3)  # type: ignore[arg-type]
    await collectors[0].jobs.submit(
        Batch("b", "d", 1.0), [new_record(job, at=1.0, deadline=9e9, inputs=None)]
    )
    await collectors[1].jobs.claim("pi5", at=2.0, lease_until=99.0, most_open=2)
    told: list[Any] = []
    collectors[2].jobs.listen(told.extend)
    run_id = run_id_of(job_id, 1)
    await asyncio.gather(*(store.append("pi5", "spool", 1, make_result(run_id)) for store in collectors[2:3]))
    (record,) = await collectors[3].jobs.find_jobs(job_id)
    assert record.job.state == job_pb2.JOB_STATE_DONE
    assert [each.job_id for each in told] == [job_id]


async def test_a_board_is_up_whichever_collector_has_its_stream(
    collectors: list[PostgresResultStore], make_hello: MakeHello
) -> None:
    here, there = collectors[:2]
    await there.greet(make_hello("pi5"), 100.0)
    assert [(await store.devices())[0].elsewhere_at for store in (here, there)] == [100.0, None]
    await there.saw([Sighting("pi5", 130.0)])
    assert (await here.devices())[0].elsewhere_at == 130.0
    # The stream moves; that it has ended there is told later.
    await here.greet(make_hello("pi5"), 140.0)
    await there.saw([Sighting("pi5", 131.0, streaming=False)])
    assert [(await store.devices())[0].elsewhere_at for store in (here, there)] == [None, 140.0]
    await here.saw([Sighting("pi5", 150.0, streaming=False)])
    assert [(await store.devices())[0].elsewhere_at for store in (here, there)] == [None, None]


async def test_old_results_are_made_smaller_once(
    collectors: list[PostgresResultStore], make_result: MakeResult
) -> None:
    for n in range(1, 21):
        await collectors[0].append("pi5", "spool", n, make_result(f"run-{n}"))
    rounds = [
        await asyncio.gather(*(store.thin(received_before=9e9, limit=5) for store in collectors))
        for _ in range(9)
    ]
    assert sum(removed.results for some in rounds for removed in some) == 20
    assert sum(removed.samples for some in rounds for removed in some) == 2000


# The server


async def test_what_was_acknowledged_survives_the_servers_death(
    own_postgres_server: Any, make_result: MakeResult
) -> None:
    server = own_postgres_server
    store = await PostgresResultStore.open(server.new_database())
    stored, sequence = [], 0
    for _ in range(2):
        futures = {}
        for _ in range(200):
            sequence += 1
            futures[sequence] = store.append("pi5", f"spool-{sequence}", 1, make_result(f"run-{sequence}"))
        await futures[sequence - 150]
        server.kill()
        answers = await asyncio.gather(*futures.values(), return_exceptions=True)
        stored += [n for n, answer in zip(futures, answers, strict=True) if answer is True]
        assert all(answer is True or isinstance(answer, StoreUnavailable) for answer in answers)
        with pytest.raises(StoreUnavailable):
            await store.probe()
        with pytest.raises(StoreUnavailable):
            await store.devices()
        server.start()
        await store.probe()
    assert len(stored) >= 2 * 50
    for n in stored:
        assert await store.append("pi5", f"spool-{n}", 1, make_result(f"run-{n}")) is False
    # What was in doubt comes again, and is stored once.
    for n in range(1, sequence + 1):
        await store.append("pi5", f"spool-{n}", 1, make_result(f"run-{n}"))
    assert [outcome.total for outcome in await store.outcomes()] == [sequence]
    await store.check()
    await store.close()


async def test_a_connection_that_was_cut_is_made_anew(postgres_url: str, make_result: MakeResult) -> None:
    store = await PostgresResultStore.open(postgres_url)
    assert await store.append("pi5", "spool", 1, make_result("run-1"))
    await store.devices()
    ask(
        postgres_url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'boardbench-collector' AND pid <> pg_backend_pid()",
    )
    assert len(await store.find("run-1")) == 1, "who reads does not notice"
    with pytest.raises(StoreUnavailable):
        await store.append("pi5", "spool", 2, make_result("run-2"), after=1)
    assert await store.append("pi5", "spool", 2, make_result("run-2"), after=1) is True
    await store.close()


async def test_connections_that_lay_idle_and_were_cut_are_none_the_wiser(postgres_url: str) -> None:
    """As after a restart of the server: who reads first does not find one dead connection after the other."""
    store = await PostgresResultStore.open(postgres_url)
    together = threading.Barrier(3)
    await asyncio.gather(*(store.read(lambda _: together.wait(30)) for _ in range(3)))
    ask(
        postgres_url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'boardbench-collector' AND pid <> pg_backend_pid()",
    )
    assert await store.devices() == ()
    assert await store.read(lambda db: db.execute("SELECT 1").fetchone()) == (1,)
    await store.close()


async def test_what_took_too_long_is_not_asked_again(postgres_url: str) -> None:
    store = await PostgresResultStore.open(postgres_url)
    asked = []

    def slowly(db: Any) -> None:
        asked.append(db)
        db.execute("SET statement_timeout = 50")
        db.execute("SELECT pg_sleep(60)")

    with pytest.raises(StoreUnavailable, match="statement timeout"):
        await store.read(slowly)
    assert len(asked) == 1
    await store.close()


async def test_a_server_that_would_lose_commits_is_told_not_to(
    postgres_server: Any, postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    ask(postgres_url, "ALTER ROLE tester SET synchronous_commit = off")
    try:
        store = await PostgresResultStore.open(postgres_url)
        (setting,) = await store.write(lambda db: db.execute("SHOW synchronous_commit").fetchone())
        assert setting == "on"
        # Each connection of the writer is told, the next one too.
        ask(
            postgres_url,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'boardbench-collector' AND pid <> pg_backend_pid()",
        )
        with pytest.raises(StoreUnavailable):
            await store.probe()
        (setting,) = await store.write(lambda db: db.execute("SHOW synchronous_commit").fetchone())
        assert setting == "on"
        await store.close()
    finally:
        ask(postgres_url, "ALTER ROLE tester RESET synchronous_commit")
    with caplog.at_level(logging.WARNING), psycopg.connect(postgres_url, autocommit=True) as db:
        postgres_connection._keep_promises(_Says(db, "off"), "there")  # type: ignore[arg-type]
    assert "there runs with fsync = off" in caplog.text


class _Says:
    """A connection to a server that has a setting otherwise: fsync can't be changed while one runs."""

    def __init__(self, db: Any, fsync: str) -> None:
        self._db, self._fsync = db, fsync

    def execute(self, query: str) -> Any:
        return self._db.execute(f"SELECT '{self._fsync}'" if query == "SHOW fsync" else query)


async def test_who_may_not_write_is_told_so(postgres_server: Any, postgres_url: str) -> None:
    await (await PostgresResultStore.open(postgres_url)).close()
    store = await PostgresResultStore.open(postgres_url + "%20-cdefault_transaction_read_only%3Don")
    with pytest.raises(StoreUnavailable, match=r"can't be written.*name the primary"):
        await store.probe()
    await store.close()


# Records


async def test_texts_that_postgresql_lacks_are_kept_in_the_record(
    postgres_url: str, make_result: MakeResult
) -> None:
    store = await PostgresResultStore.open(postgres_url)
    odd = make_result("odd", model="a\0b" + "ü" * 3000, sha256="\0" * 700, runtime="r" * 5000)
    odd.spec.options["x"] = "\0" + "y" * 9000
    fine = [make_result(f"fine-{n}") for n in range(3)]
    answers = await asyncio.gather(
        *(store.append("pi5", "spool", n, result) for n, result in enumerate([fine[0], odd, *fine[1:]], 1))
    )
    assert answers == [True] * 4
    assert await store.find("odd") == (odd,)
    found = await store.results(ResultFilter(model="a\0b" + "ü" * 3000), limit=9)
    assert [result.run_id for result in found.results] == ["odd"]
    assert (
        await store.results(ResultFilter(model="\0", runtime="\0", device_id="\0"), limit=9)
    ).results == ()
    assert await store.find("\0") == ()
    await store.check()
    await store.close()


async def test_a_record_that_the_server_refuses_does_not_hold_up_the_others(
    postgres_url: str, make_result: MakeResult
) -> None:
    store = await PostgresResultStore.open(postgres_url, commit_window_seconds=0.05)
    ask(postgres_url, "ALTER TABLE results ADD CONSTRAINT no_seven CHECK (run_id <> 'run-7')")
    futures = [store.append("pi5", "spool", n, make_result(f"run-{n}"), after=n - 1) for n in range(1, 11)]
    called = asyncio.create_task(store.probe())
    answers = await asyncio.gather(*futures, return_exceptions=True)
    assert answers[:6] == [True] * 6 and answers[7:] == [True] * 3
    assert isinstance(answers[6], ResultRefused) and answers[6].code == "unfit"
    await called
    assert await store.acknowledged("pi5", "spool") == 10
    assert [outcome.total for outcome in await store.outcomes()] == [9]
    await store.close()


async def test_a_record_that_was_changed_is_found(postgres_url: str, make_result: MakeResult) -> None:
    store = await PostgresResultStore.open(postgres_url)
    await store.append("pi5", "spool-1", 1, make_result("run-1"))
    ask(postgres_url, "UPDATE results SET summary = %b", make_result("run-2").SerializeToString())
    with pytest.raises(StoreDamaged, match=r"run-1 .* says 'run-2'"):
        await store.check()
    ask(postgres_url, r"UPDATE results SET summary = '\xff'::bytea")
    with pytest.raises(StoreDamaged, match=r"run-1 .* is unreadable"):
        await store.check()
    await store.close()


async def test_one_commit_takes_what_came_meanwhile(postgres_url: str, make_result: MakeResult) -> None:
    store = await PostgresResultStore.open(postgres_url)
    with psycopg.connect(postgres_url) as db:
        # Whoever writes waits for this, and all the others behind it.
        db.execute("SELECT * FROM counters FOR UPDATE")
        futures = [store.append(f"pi{n}", "spool", 1, make_result(f"run-{n}")) for n in range(100)]
        db.rollback()
    assert await asyncio.gather(*futures) == [True] * 100
    (commits,) = ask(postgres_url, "SELECT COUNT(DISTINCT xmin::text) FROM results")[0]
    assert commits <= 2  # those that had begun, and those that came while they waited
    await store.close()


# Opening


class LikeCockroach:
    """A PostgreSQL that says it is a CockroachDB, and refuses what that one refuses."""

    def __init__(self, db: Any) -> None:
        self._db = db

    def execute(self, query: str, values: Any = None) -> Any:
        assert "COLLATE" not in query
        if query == "SELECT version()":
            return self._db.execute("SELECT 'CockroachDB CCL v25.1.0 (x86_64-pc-linux-gnu)'")
        return self._db.execute(query, values)

    def transaction(self) -> Any:
        return self._db.transaction()


async def test_a_database_that_compares_by_bytes_anyway_is_not_told_to(
    postgres_url: str, make_result: MakeResult
) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as db:
        assert postgres_schema.migrate(LikeCockroach(db), now=5.0) == 0  # type: ignore[arg-type]
    assert ask(
        postgres_url,
        "SELECT DISTINCT collation_name FROM information_schema.columns"
        " WHERE table_schema = current_schema() AND data_type = 'text'",
    ) == [(None,)]
    store = await PostgresResultStore.open(postgres_url)
    assert await store.append("pi5", "spool", 1, make_result("run-1"))
    await store.close()


async def test_who_stops_waiting_for_a_store_leaves_no_connection(postgres_url: str) -> None:
    await (await PostgresResultStore.open(postgres_url)).close()
    there = "SELECT COUNT(*) FROM pg_stat_activity WHERE application_name = 'boardbench-collector'"
    with psycopg.connect(postgres_url) as db, warnings.catch_warnings(record=True) as left:
        warnings.simplefilter("always")
        # Whoever opens the store comes as far as this, and then waits.
        db.execute("LOCK TABLE boardbench_schema")
        for _ in range(3):
            opening = asyncio.create_task(PostgresResultStore.open(postgres_url))
            await until(lambda: ask(postgres_url, there) == [(1,)], "it connects")
            opening.cancel()
            with pytest.raises(asyncio.CancelledError):
                await opening
            db.rollback()
            await until(lambda: ask(postgres_url, there) == [(0,)], "the connection is closed")
            gc.collect()
            db.execute("LOCK TABLE boardbench_schema")
    assert not [str(each.message) for each in left if "deleted while still open" in str(each.message)]


async def until(condition: Callable[[], bool], what: str) -> None:
    """Returns when the condition holds; fails when it never does."""
    deadline = asyncio.get_running_loop().time() + 20
    while not await asyncio.to_thread(condition):
        assert asyncio.get_running_loop().time() < deadline, what
        await asyncio.sleep(0.01)


async def test_a_store_of_a_newer_program_is_left_alone(postgres_url: str) -> None:
    await (await PostgresResultStore.open(postgres_url)).close()
    ask(postgres_url, "INSERT INTO boardbench_schema VALUES (99, 0)")
    with pytest.raises(StoreForeign, match=r"can't use postgresql://.*version 99.*install a newer one"):
        await PostgresResultStore.open(postgres_url)


async def test_a_database_that_knows_only_bytes_is_refused(postgres_server: Any) -> None:
    made = postgres_server.run(
        *("createdb", "-h", str(postgres_server.folder), "-U", "tester", "-T", "template0"),
        *("-E", "SQL_ASCII", "--locale", "C", "bytes"),
    )
    assert made.returncode == 0, made.stdout
    with pytest.raises(StoreForeign, match=r"SQL_ASCII.*--encoding UTF8"):
        await PostgresResultStore.open(postgres_server.url("bytes"))


async def test_another_programs_database_is_left_alone(postgres_url: str) -> None:
    ask(postgres_url, "CREATE TABLE results (score INT)")
    with pytest.raises(StoreForeign, match=r"tables of another program \(results\)"):
        await PostgresResultStore.open(postgres_url)
    assert ask(postgres_url, "SELECT to_regclass('boardbench_schema')") == [(None,)]


async def test_a_migration_that_breaks_leaves_the_old_version(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await (await PostgresResultStore.open(postgres_url)).close()
    latest = postgres_schema.LATEST_VERSION

    def adds(db: Any) -> None:
        db.execute("ALTER TABLE results ADD COLUMN colour TEXT")

    def breaks(db: Any) -> None:
        adds(db)
        db.execute("SELECT 1 / 0")

    def migrate(step: Callable[[Any], None]) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(postgres_schema, "MIGRATIONS", (*postgres_schema.MIGRATIONS, step))
            with psycopg.connect(postgres_url, autocommit=True) as db:
                postgres_schema.migrate(db, now=1.0, to_version=latest + 1)

    columns = (
        "SELECT column_name FROM information_schema.columns WHERE table_name = 'results'"
        " AND column_name = 'colour' AND table_schema = current_schema()"
    )
    with pytest.raises(psycopg.errors.DivisionByZero):
        migrate(breaks)
    assert ask(postgres_url, columns) == []
    await (await PostgresResultStore.open(postgres_url)).close()
    migrate(adds)
    assert ask(postgres_url, columns) == [("colour",)]
    with pytest.raises(StoreForeign, match=f"version {latest + 1}"):
        await PostgresResultStore.open(postgres_url)


async def test_a_server_that_is_not_there_is_named_without_the_password(tmp_path: Any) -> None:
    url = f"postgresql://ann:secret@/lab?host={tmp_path}"
    with pytest.raises(StoreUnavailable, match=r"can't be reached") as refused:
        await PostgresResultStore.open(url)
    assert "secret" not in str(refused.value) and f"postgresql://{tmp_path}/lab" in str(refused.value)
    with pytest.raises(StartError, match="is no address"):
        await PostgresResultStore.open("postgresql://ann:secret@host/x?nonsense=1")


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("postgresql://ann:secret@db.lab:5433/bench?sslmode=require", "postgresql://db.lab:5433/bench"),
        ("postgresql:///bench", "postgresql://localhost/bench"),
        ("postgres://a,b/bench", "postgresql://a,b/bench"),
    ],
)
def test_a_place_has_no_password(url: str, named: str) -> None:
    assert place(url) == named
