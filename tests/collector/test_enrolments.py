"""Tokens are good for one board and a time; keys are checked; neither is kept in clear, wherever they are."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import sqlite3
import stat
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from click.testing import CliRunner

from boardbench.collector.cli import main
from boardbench.collector.config import CollectorConfig
from boardbench.collector.errors import InvalidRequest, NotAllowed, StoreForeign, StoreUnavailable
from boardbench.collector.serve import running
from boardbench.collector.stores.beside import FleetTables, TablesFile
from boardbench.collector.stores.enrolments import MIGRATIONS, Enrolments
from boardbench.collector.stores.memory import MemoryResultStore
from boardbench.collector.stores.opening import open_beside, open_store
from boardbench.collector.stores.postgres import PostgresResultStore
from boardbench.v1 import board_pb2, collector_pb2, collector_pb2_grpc


class Clock:
    """A clock that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def in_file(path: Path | None) -> TablesFile:
    """The tables in a file; None: in memory."""
    return TablesFile(path, MIGRATIONS)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
async def pair(
    request: pytest.FixtureRequest, tmp_path: Path, clock: Clock
) -> AsyncIterator[tuple[Enrolments, Enrolments]]:
    """The same tokens and keys as two collectors see them; where only one can have them, twice the same."""
    async with contextlib.AsyncExitStack() as stack:
        if request.param == "postgres":
            url = request.getfixturevalue("postgres_url")
            stores = [await PostgresResultStore.open(url) for _ in range(2)]
            for store in stores:
                stack.push_async_callback(store.close)
            yield Enrolments(FleetTables(stores[0]), clock), Enrolments(FleetTables(stores[1]), clock)
            return
        path = None if request.param == "memory" else tmp_path / "kept" / "enrolments.db"
        one = Enrolments(stack.enter_context(contextlib.closing(in_file(path))), clock)
        # A command beside the collector has a connection of its own.
        other = Enrolments(stack.enter_context(contextlib.closing(in_file(path))), clock) if path else one
        yield one, other


@pytest.fixture
def enrolments(pair: tuple[Enrolments, Enrolments]) -> Enrolments:
    return pair[0]


async def test_a_token_makes_one_board_known(enrolments: Enrolments) -> None:
    token = await enrolments.create(labels={"lab": "zurich"})
    key, labels = await enrolments.enroll(token, "pi5", "instance-1")
    assert labels == {"lab": "zurich"}
    await enrolments.check("pi5", key, required=True)
    with pytest.raises(NotAllowed, match="used by board pi5"):
        await enrolments.enroll(token, "pi6", "instance-2")
    with pytest.raises(NotAllowed, match="used by board pi5"):
        await enrolments.enroll(token, "pi5", "instance-2")
    await enrolments.check("pi5", key, required=True)


async def test_the_same_agent_may_ask_again_when_the_answer_was_lost(
    enrolments: Enrolments, clock: Clock
) -> None:
    token = await enrolments.create(hours=1)
    first, _ = await enrolments.enroll(token, "pi5", "instance-1")
    clock.now += 3000
    second, _ = await enrolments.enroll(token, "pi5", "instance-1")
    assert first != second
    await enrolments.check("pi5", second, required=True)
    with pytest.raises(NotAllowed, match="not its own"):
        await enrolments.check("pi5", first, required=True)
    clock.now += 3000
    with pytest.raises(NotAllowed, match="expired"):
        await enrolments.enroll(token, "pi5", "instance-1")


async def test_without_an_instance_a_token_is_used_up_at_once(enrolments: Enrolments) -> None:
    token = await enrolments.create()
    await enrolments.enroll(token, "pi5", "")
    # None is never told from None in the data: whoever says nothing about itself is taken for the same.
    await enrolments.enroll(token, "pi5", "")
    with pytest.raises(NotAllowed):
        await enrolments.enroll(token, "pi5", "instance-1")


@pytest.mark.parametrize("token", ["", "bbt_guess", "bbt_" + "A" * 1000])
async def test_what_is_no_token_is_refused(enrolments: Enrolments, token: str) -> None:
    await enrolments.create()
    with pytest.raises(NotAllowed, match="no such token"):
        await enrolments.enroll(token, "pi5", "instance-1")


@pytest.mark.parametrize("hours", [0, -1, 24.1, float("nan"), float("inf")])
async def test_a_token_is_good_for_a_day_at_most(enrolments: Enrolments, hours: float) -> None:
    with pytest.raises(InvalidRequest, match="24 hours"):
        await enrolments.create(hours)


async def test_an_expired_or_revoked_token_is_worth_nothing(enrolments: Enrolments, clock: Clock) -> None:
    short, revoked, used = (
        await enrolments.create(hours=0.5),
        await enrolments.create(),
        await enrolments.create(),
    )
    assert await enrolments.revoke(revoked)
    assert not await enrolments.revoke(revoked)
    with pytest.raises(NotAllowed, match="no such token"):
        await enrolments.enroll(revoked, "pi5", "i")
    await enrolments.enroll(used, "pi6", "i")
    assert not await enrolments.revoke(used)
    clock.now += 1801
    with pytest.raises(NotAllowed, match="expired"):
        await enrolments.enroll(short, "pi5", "i")
    assert [(token.name, token.device_id) for token in await enrolments.tokens() if token.used] == [
        (used[:10], "pi6")
    ]


async def test_what_is_required_and_what_is_not(enrolments: Enrolments) -> None:
    key, _ = await enrolments.enroll(await enrolments.create(), "pi5", "i")
    await enrolments.check("stranger", "", required=False)
    await enrolments.check("pi5", "", required=False)
    with pytest.raises(NotAllowed, match="is not enrolled here: make a token"):
        await enrolments.check("stranger", "", required=True)
    with pytest.raises(NotAllowed, match="shows no key"):
        await enrolments.check("pi5", "", required=True)
    for required in (False, True):
        with pytest.raises(NotAllowed, match="not its own"):
            await enrolments.check("stranger", key, required=required)
    assert await enrolments.forget("pi5")
    assert not await enrolments.forget("pi5")
    with pytest.raises(NotAllowed, match="no longer"):
        await enrolments.check("pi5", key, required=False)


async def test_one_token_enrols_one_of_many_that_come_at_once(pair: tuple[Enrolments, Enrolments]) -> None:
    token = await pair[0].create()

    async def enroll(number: int) -> str:
        try:
            await pair[number % 2].enroll(token, f"pi{number}", f"i{number}")
        except NotAllowed as refused:
            assert "the token was used by board pi" in str(refused)
            return ""
        return f"pi{number}"

    enrolled = [name for name in await asyncio.gather(*map(enroll, range(32))) if name]
    assert len(enrolled) == 1
    for each in pair:
        assert [token.device_id for token in await each.tokens()] == enrolled


async def test_what_one_collector_does_counts_at_the_other(pair: tuple[Enrolments, Enrolments]) -> None:
    one, other = pair
    token = await one.create(labels={"lab": "zurich"})
    key, labels = await other.enroll(token, "pi5", "i")
    assert labels == {"lab": "zurich"}
    await one.check("pi5", key, required=True)
    with pytest.raises(NotAllowed, match="used by board pi5"):
        await one.enroll(token, "pi6", "j")
    assert await one.forget("pi5")
    with pytest.raises(NotAllowed, match="no longer"):
        await other.check("pi5", key, required=True)
    revoked = await other.create()
    assert await one.revoke(revoked)
    with pytest.raises(NotAllowed, match="no such token"):
        await other.enroll(revoked, "pi6", "j")


async def test_the_file_of_an_older_collector_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "enrolments.db"
    with contextlib.closing(sqlite3.connect(path)) as old:
        # As version 0.1 made it.
        old.execute(
            "CREATE TABLE tokens (token_sha256 TEXT NOT NULL PRIMARY KEY, name TEXT NOT NULL, created REAL"
            " NOT NULL, expires REAL NOT NULL, labels TEXT NOT NULL, used REAL, device_id TEXT,"
            " instance_id TEXT)"
        )
        old.execute(
            "CREATE TABLE devices (device_id TEXT NOT NULL PRIMARY KEY, key_sha256 TEXT NOT NULL,"
            " enrolled REAL NOT NULL)"
        )
        digest = hashlib.sha256(b"key").hexdigest()
        old.execute("INSERT INTO devices VALUES ('pi5', ?, 1.0)", (digest,))
        digest = hashlib.sha256(b"bbt_token").hexdigest()
        old.execute("INSERT INTO tokens VALUES (?, 'bbt_token', 1.0, 4e9, '{}', NULL, NULL, NULL)", (digest,))
        old.commit()
    for _ in range(2):
        with contextlib.closing(in_file(path)) as tables:
            await Enrolments(tables).check("pi5", "key", required=True)
    with contextlib.closing(in_file(path)) as tables:
        await Enrolments(tables).enroll("bbt_token", "pi6", "i")


def test_the_file_of_a_newer_collector_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "enrolments.db"
    in_file(path).close()
    with contextlib.closing(sqlite3.connect(path)) as newer:
        newer.execute("PRAGMA user_version = 99")
    with pytest.raises(StoreForeign, match=r"enrolments\.db has version 99, .* install a newer one"):
        in_file(path)


async def test_what_each_collector_had_is_in_their_database(
    tmp_path: Path, postgres_url: str, local_config: CollectorConfig
) -> None:
    keys = {}
    for name, enrolled in (("a", 1000.0), ("b", 2000.0)):
        with contextlib.closing(in_file(tmp_path / name / "enrolments.db")) as tables:
            mine = Enrolments(tables, lambda enrolled=enrolled: enrolled)  # type: ignore[misc]
            keys[name], _ = await mine.enroll(await mine.create(), f"board-{name}", "i")
            # One that has moved: the key that it got last is the one that it has.
            keys[f"moved-{name}"], _ = await mine.enroll(await mine.create(), "moved", "i")
            await mine.create()
    for name in ("b", "a", "a"):
        config = replace(local_config, data_dir=tmp_path / name, store=postgres_url)
        store = await open_store(config)
        async with open_beside(config, store) as beside:
            found = beside.enrolments
            if name == "a":
                for board in ("a", "b"):
                    await found.check(f"board-{board}", keys[board], required=True)
                await found.check("moved", keys["moved-b"], required=True)
                assert len(await found.tokens()) == 6
        await store.close()
        assert [path.name for path in (tmp_path / name).glob("enrolments*")] == ["enrolments.db.moved"]


async def test_neither_token_nor_key_is_in_the_file_and_nobody_else_reads_it(tmp_path: Path) -> None:
    path = tmp_path / "enrolments.db"
    with contextlib.closing(in_file(path)) as tables:
        token = await Enrolments(tables).create()
        key, _ = await Enrolments(tables).enroll(token, "pi5", "i")
    content = path.read_bytes()
    assert token.encode() not in content
    assert key.encode() not in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_it_is_all_there_after_a_start(tmp_path: Path) -> None:
    path = tmp_path / "enrolments.db"
    with contextlib.closing(in_file(path)) as tables:
        token = await Enrolments(tables).create()
        key, _ = await Enrolments(tables).enroll(await Enrolments(tables).create(), "pi5", "i")
    with contextlib.closing(in_file(path)) as tables:
        await Enrolments(tables).check("pi5", key, required=True)
        await Enrolments(tables).enroll(token, "pi6", "i")


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    path = tmp_path / "enrolments.db"
    path.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreUnavailable, match=r"enrolments\.db"):
        in_file(path)


async def test_a_file_that_another_holds_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("boardbench.collector.stores.beside._BUSY_SECONDS", 0.05)
    path = tmp_path / "enrolments.db"
    with (
        contextlib.closing(in_file(path)) as tables,
        contextlib.closing(sqlite3.connect(path)) as other,
    ):
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreUnavailable, match="locked"):
            await Enrolments(tables).create()


def test_the_commands(tmp_path: Path) -> None:
    def say(*arguments: str, code: int = 0) -> str:
        answer = CliRunner().invoke(main, [*arguments, "--data-dir", str(tmp_path)])
        assert answer.exit_code == code, answer.output
        return answer.output

    token = say("token", "create", "--hours", "2", "--label", "lab=zurich", "--label", "rack=1").strip()
    assert token.startswith("bbt_")
    listed = say("token", "list")
    assert listed == f"{token[:10]}…  good for 2.0 h  lab=zurich rack=1\n"
    with contextlib.closing(in_file(tmp_path / "enrolments.db")) as tables:
        asyncio.run(Enrolments(tables).enroll(token, "pi5", "i"))
    assert say("token", "list") == f"{token[:10]}…  used by pi5  lab=zurich rack=1\n"
    assert "no token" in say("token", "revoke", token[:10], code=1)
    say("forget", "pi5")
    assert "no board 'pi5'" in say("forget", "pi5", code=1)
    other = say("token", "create").strip()
    say("token", "revoke", other[:10])
    assert "NAME=VALUE" in say("token", "create", "--label", "nothing", code=2)
    assert "24" in say("token", "create", "--hours", "25", code=2)


async def test_over_the_wire(local_config: CollectorConfig, tmp_path: Path) -> None:
    config = replace(local_config, require_enrolment=True)
    with contextlib.closing(in_file(tmp_path / "enrolments.db")) as tables:
        enrolments = Enrolments(tables)
        token = await enrolments.create(labels={"lab": "zurich"})
        async with (
            running(config, MemoryResultStore(), enrolments) as listening,
            grpc.aio.insecure_channel(str(listening.grpc)) as channel,
        ):
            stub = collector_pb2_grpc.CollectorServiceStub(channel)

            async def report(*metadata: tuple[str, str]) -> str:
                call = stub.Report(metadata=metadata)
                hello = collector_pb2.Hello(board=board_pb2.Board(device_id="pi5"), spool_id="spool-1")
                await call.write(collector_pb2.ReportRequest(hello=hello))
                try:
                    response = await call.read()
                finally:
                    call.cancel()
                return str(response.WhichOneof("response"))

            with pytest.raises(grpc.aio.AioRpcError, match="not enrolled here") as refused:
                await report()
            assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
            board = board_pb2.Board(device_id="pi5")
            with pytest.raises(grpc.aio.AioRpcError, match="no such token"):
                await stub.Enroll(collector_pb2.EnrollRequest(token="x", board=board, instance_id="i"))
            with pytest.raises(grpc.aio.AioRpcError, match="device_id") as refused:
                await stub.Enroll(collector_pb2.EnrollRequest(token=token, instance_id="i"))
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
            answer = await stub.Enroll(collector_pb2.EnrollRequest(token=token, board=board, instance_id="i"))
            assert dict(answer.labels) == {"lab": "zurich"}
            assert await report(("boardbench-device-key", answer.device_key)) == "welcome"
            with pytest.raises(grpc.aio.AioRpcError, match="not its own"):
                await report(("boardbench-device-key", "wrong"))


async def test_a_collector_without_them_says_so(local_config: CollectorConfig) -> None:
    async with (
        running(local_config, MemoryResultStore()) as listening,
        grpc.aio.insecure_channel(str(listening.grpc)) as channel,
    ):
        stub = collector_pb2_grpc.CollectorServiceStub(channel)
        with pytest.raises(grpc.aio.AioRpcError, match="enrols no boards"):
            await stub.Enroll(collector_pb2.EnrollRequest(token="t", board=board_pb2.Board(device_id="pi5")))
