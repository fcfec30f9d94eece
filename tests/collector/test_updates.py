"""Releases go to a few boards first, then to the others, and to none after one has failed."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from boardbench.collector.errors import InvalidRequest, NoRoom, NotFound, Occupied, StoreUnavailable
from boardbench.collector.files import Files
from boardbench.collector.stores.beside import FleetTables, TablesFile
from boardbench.collector.stores.postgres import PostgresResultStore
from boardbench.collector.stores.updates import MIGRATIONS, UpdateStore
from boardbench.collector.updates import UpdateDesk, Updater
from boardbench.v1 import agent_pb2, collector_pb2, update_pb2

WAITING = update_pb2.UPDATE_STATE_WAITING
FETCHING = update_pb2.UPDATE_STATE_FETCHING
SWITCHED = update_pb2.UPDATE_STATE_SWITCHED
DONE = update_pb2.UPDATE_STATE_DONE
ROLLED_BACK = update_pb2.UPDATE_STATE_ROLLED_BACK
FAILED = update_pb2.UPDATE_STATE_FAILED
STOPPED = update_pb2.UPDATE_STATE_STOPPED


class Boards:
    """Boards that are known, without streams and results."""

    def __init__(self) -> None:
        self.known: list[collector_pb2.Device] = []

    async def devices(self, on: Any) -> tuple[collector_pb2.Device, ...]:
        names = {term.partition("=")[2] for term in on}
        return tuple(device for device in self.known if "*" in names or device.board.device_id in names)

    def add(self, *names: str, architecture: str = "aarch64", up: bool = True) -> None:
        for name in names:
            device = collector_pb2.Device(agent_version="0.1.0", up=up)
            device.board.device_id, device.board.architecture = name, architecture
            self.known.append(device)


class Moving:
    """A clock that moves when it is told to."""

    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Stage:
    """An updater with boards whose ends of the streams are here."""

    folder: Path
    files: Files
    boards: Boards
    store: UpdateStore
    updater: Updater
    sha256: str
    heard: dict[str, list[update_pb2.UpdateOffer]] = field(default_factory=dict)
    desks: dict[str, UpdateDesk] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    def connect(self, *names: str) -> None:
        for name in names:

            async def send(response: collector_pb2.ReportResponse, name: str = name) -> None:
                self.heard.setdefault(name, []).append(response.update)

            self.desks[name] = self.updater.attach(name, send)

    async def start(self, *on: str, canary: int = 0, request_id: str = "u1") -> update_pb2.Update:
        request = update_pb2.StartUpdateRequest(
            on=on or ("device_id=*",), canary=canary, package_sha256=self.sha256, request_id=request_id
        )
        return await self.updater.start(request)

    def say(self, name: str, state: int, reason: str = "", update_id: str = "u1") -> None:
        report = update_pb2.UpdateReport(update_id=update_id, state=state, reason=reason)  # type: ignore[arg-type]
        self.desks[name].report(report)

    def states(self, update_id: str = "u1") -> dict[str, int]:
        return {board.device_id: board.state for board in self.updater.find(update_id).boards}

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(1000):
            if condition():
                return
            await asyncio.sleep(0.01)
        pytest.fail(f"not within 10 s: {self.states()}, {self.heard}")

    async def settle(self) -> None:
        """Everything that was said has been taken in, and what follows from it was told."""
        await self.until(lambda: not self.updater._reports)
        self.updater._poke.set()
        await self.until(lambda: not self.updater._poke.is_set())
        async with self.updater._turn:  # a round begins with its poke, and has it until it has ended
            pass

    async def restart(self) -> None:
        """The collector ends and comes back; no stream is there any more."""
        assert self.task is not None
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)
        self.desks.clear()
        self.heard.clear()
        self.updater = Updater(self.store, self.files, self.boards)  # type: ignore[arg-type]
        await self.updater.load()
        self.task = asyncio.create_task(self.updater.run())


@pytest.fixture
async def stage(tmp_path: Path, release_packages: Any) -> AsyncIterator[Stage]:
    async def nothing() -> frozenset[str]:
        return frozenset()

    files = Files(tmp_path, limit_bytes=1 << 30, free_bytes=0, in_use=nothing)
    await files.open()
    package = release_packages.Signer().sign(
        release_packages.build(tmp_path, "0.2.0", {"release.json": "{}"})
    )
    sha256 = await keep(files, package)
    boards, tables = Boards(), TablesFile(tmp_path / "updates.db", MIGRATIONS)
    store = UpdateStore(tables)
    updater = Updater(store, files, boards)  # type: ignore[arg-type]
    made = Stage(tmp_path, files, boards, store, updater, sha256)
    made.task = asyncio.create_task(updater.run())
    yield made
    made.task.cancel()
    await asyncio.gather(made.task, return_exceptions=True)
    tables.close()


async def keep(files: Files, path: Path) -> str:
    import hashlib
    import zlib

    data = await asyncio.to_thread(path.read_bytes)
    header = agent_pb2.PushHeader(
        sha256=hashlib.sha256(data).hexdigest(),
        name=path.name,
        size_bytes=len(data),
        kind=agent_pb2.FILE_KIND_MODEL,
    )
    async with files.receive(header) as transfer:
        await transfer.write(agent_pb2.PushChunk(offset_bytes=0, data=data, crc32=zlib.crc32(data)))
        await transfer.finish()
    return str(header.sha256)


async def test_the_others_begin_when_those_that_go_first_are_done(stage: Stage) -> None:
    stage.boards.add("off", up=False)
    stage.boards.add("a", "b", "c")
    stage.connect("a", "b", "c")
    begun = await stage.start(canary=2)
    # Of a board that is off nothing can be learnt.
    assert [board.device_id for board in begun.boards if board.canary] == ["a", "b"]
    await stage.until(lambda: set(stage.heard) == {"a", "b"})
    offer = stage.heard["a"][0]
    assert (offer.version, offer.package_sha256) == ("0.2.0", stage.sha256)
    assert offer.package_bytes > 0
    stage.say("a", FETCHING)
    stage.say("a", DONE)
    await stage.settle()
    assert set(stage.heard) == {"a", "b"}
    stage.say("b", DONE)
    await stage.until(lambda: set(stage.heard) == {"a", "b", "c"})
    stage.say("c", DONE)
    stage.connect("off")
    await stage.until(lambda: "off" in stage.heard)
    stage.say("off", DONE)
    await stage.until(lambda: set(stage.states().values()) == {DONE})
    assert all(len(offers) == 1 for offers in stage.heard.values())
    assert stage.updater.files_in_use() == frozenset()


@pytest.mark.parametrize(("state", "word"), [(ROLLED_BACK, "was rolled back"), (FAILED, "failed")])
async def test_nobody_begins_after_one_has_failed(stage: Stage, state: int, word: str) -> None:
    stage.boards.add("a", "b", "c")
    stage.connect("a", "b", "c")
    await stage.start("device_id=*", canary=1)
    await stage.until(lambda: "a" in stage.heard)
    stage.say("a", state, "it died")
    await stage.until(lambda: stage.states() == {"a": state, "b": STOPPED, "c": STOPPED})
    await stage.settle()
    assert set(stage.heard) == {"a"}
    assert stage.updater.find("u1").halted == f"a {word}: it died"
    # What it says later changes nothing.
    stage.say("a", DONE)
    await stage.settle()
    assert stage.states()["a"] == state


async def test_boards_that_have_begun_go_on_when_it_is_stopped(stage: Stage) -> None:
    stage.boards.add("a", "b")
    stage.connect("a", "b")
    await stage.start(canary=1)
    await stage.until(lambda: "a" in stage.heard)
    stage.say("a", FETCHING)
    await stage.until(lambda: stage.states()["a"] == FETCHING)
    stopped = await stage.updater.stop("u")
    assert stopped.halted == "it was stopped"
    assert stage.states() == {"a": FETCHING, "b": STOPPED}
    stage.say("a", DONE)
    await stage.until(lambda: stage.states()["a"] == DONE)
    with pytest.raises(NotFound):
        await stage.updater.stop("x")


async def test_it_goes_on_after_the_collector_was_down(stage: Stage) -> None:
    stage.boards.add("a", "b")
    stage.connect("a", "b")
    await stage.start(canary=1)
    await stage.until(lambda: "a" in stage.heard)
    stage.say("a", SWITCHED)
    await stage.until(lambda: stage.states()["a"] == SWITCHED)
    await stage.restart()
    assert stage.states() == {"a": SWITCHED, "b": WAITING}
    assert stage.updater.files_in_use() == {stage.sha256}
    stage.connect("a", "b")
    # A board that does not know of it any more is told again.
    await stage.until(lambda: "a" in stage.heard)
    stage.say("a", DONE)
    await stage.until(lambda: "b" in stage.heard)
    await stage.restart()
    assert stage.states() == {"a": DONE, "b": WAITING}


async def test_a_watcher_sees_it_to_its_end(stage: Stage) -> None:
    stage.boards.add("a")
    stage.connect("a")
    await stage.start()
    seen = []

    async def watch() -> None:
        async for update in stage.updater.watch("u1"):
            seen.append(update.boards[0].state)  # noqa: PERF401 - looked at while it grows

    watching = asyncio.create_task(watch())
    await stage.until(lambda: seen == [WAITING])
    for state in (FETCHING, SWITCHED, DONE):
        stage.say("a", state)
        await stage.until(lambda state=state: seen[-1] == state)
    await asyncio.wait_for(watching, 10)
    assert seen == [WAITING, FETCHING, SWITCHED, DONE]


async def test_what_can_not_be_done_is_not_begun(stage: Stage, release_packages: Any) -> None:
    stage.boards.add("a")
    stage.boards.add("laptop", architecture="x86_64")
    with pytest.raises(
        InvalidRequest, match=r"laptop \(x86_64\); choose the others, with architecture=aarch64"
    ):
        await stage.start()
    with pytest.raises(InvalidRequest, match="no board meets"):
        await stage.start("device_id=b")
    with pytest.raises(InvalidRequest, match="which boards"):
        await stage.updater.start(update_pb2.StartUpdateRequest(package_sha256=stage.sha256))
    with pytest.raises(NotFound):
        await stage.updater.start(update_pb2.StartUpdateRequest(on=["device_id=a"], package_sha256="0" * 64))
    unsigned = await keep(stage.files, release_packages.build(stage.folder, "0.3.0", {"x": ""}))
    with pytest.raises(InvalidRequest, match="not signed"):
        await stage.updater.start(update_pb2.StartUpdateRequest(on=["device_id=a"], package_sha256=unsigned))
    begun = await stage.start("device_id=a")
    # The same request again is the same update; another one has to wait.
    assert await stage.start("device_id=a") == begun
    with pytest.raises(Occupied, match="a is in update u1"):
        await stage.start("device_id=a", request_id="u2")
    assert [update.update_id for update in stage.updater.updates()] == ["u1"]


async def test_a_store_that_fails_loses_nothing(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    stage.boards.add("a")
    stage.connect("a")
    await stage.start()
    await stage.until(lambda: "a" in stage.heard)
    change, failures = stage.store.change, []

    async def failing(update_id: str, make: Any) -> Any:
        if not failures:
            failures.append(update_id)
            raise StoreUnavailable("the disk is full")
        return await change(update_id, make)

    monkeypatch.setattr(stage.store, "change", failing)
    stage.say("a", DONE)
    await stage.until(lambda: stage.states()["a"] == DONE)
    assert failures
    await stage.restart()
    assert stage.states()["a"] == DONE


async def test_a_package_that_can_not_be_had_now_holds_no_other_up(
    stage: Stage, release_packages: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that another collector took in, and for which there is no room here."""
    stage.boards.add("a", "b")
    stage.connect("a", "b")
    find, full = stage.files.find, True
    lacking = stage.sha256

    async def finding(sha256: str) -> Any:
        if full and sha256 == lacking and asyncio.current_task() is stage.task:
            raise NoRoom("there is no room for it")
        return await find(sha256)

    monkeypatch.setattr(stage.files, "find", finding)
    await stage.start("device_id=a")
    await stage.until(lambda: "there is no room for it" in caplog.text)
    package = release_packages.Signer().sign(
        release_packages.build(stage.folder, "0.3.0", {"release.json": "{}"})
    )
    stage.sha256 = await keep(stage.files, package)
    await stage.start("device_id=b", request_id="u2")
    await stage.until(lambda: "b" in stage.heard)
    assert stage.heard["b"][0].version == "0.3.0"
    assert "a" not in stage.heard
    stage.say("b", DONE, update_id="u2")
    await stage.until(lambda: stage.states("u2") == {"b": DONE})
    full = False
    await stage.until(lambda: "a" in stage.heard)
    assert [record.levelname for record in caplog.records if "no room" in record.getMessage()] == ["WARNING"]
    assert "Traceback" not in caplog.text


@contextlib.asynccontextmanager
async def two_stages(stage: Stage, url: str) -> AsyncIterator[tuple[Stage, Stage]]:
    """Two collectors on one database, over the same files and with the same boards known."""
    async with contextlib.AsyncExitStack() as stack:
        made = []
        for _ in range(2):
            results = await PostgresResultStore.open(url)
            stack.push_async_callback(results.close)
            store = UpdateStore(FleetTables(results))
            updater = Updater(store, stage.files, stage.boards)  # type: ignore[arg-type]
            each = Stage(stage.folder, stage.files, stage.boards, store, updater, stage.sha256)
            each.task = asyncio.create_task(updater.run())
            stack.push_async_callback(asyncio.gather, each.task, return_exceptions=True)
            stack.callback(each.task.cancel)
            made.append(each)
        yield made[0], made[1]


async def test_boards_of_another_collector_hear_of_it(stage: Stage, postgres_url: str) -> None:
    stage.boards.add("a", "b", "c", "d")
    async with two_stages(stage, postgres_url) as (one, other):
        one.connect("a", "c")
        other.connect("b", "d")
        begun = await one.start(canary=2)
        assert [board.device_id for board in begun.boards if board.canary] == ["a", "b"]
        await other.until(lambda: set(other.heard) == {"b"})
        await one.until(lambda: set(one.heard) == {"a"})
        seen: list[dict[str, int]] = []

        async def watch() -> None:
            async for update in one.updater.watch("u1"):
                seen.append({board.device_id: board.state for board in update.boards})  # noqa: PERF401

        watching = asyncio.create_task(watch())
        # One of those that go first is done: the others still wait, at both.
        other.say("b", DONE)
        await one.until(lambda: one.states()["b"] == DONE)
        assert set(one.heard) == {"a"}
        assert set(other.heard) == {"b"}
        one.say("a", FETCHING)
        one.say("a", DONE)
        await one.until(lambda: set(one.heard) == {"a", "c"})
        await other.until(lambda: set(other.heard) == {"b", "d"})
        # It is known of only once, wherever somebody asks for it.
        await other.updater.refresh()
        assert other.updater.find("u1").package_sha256 == stage.sha256
        assert await other.start(canary=2) == other.updater.find("u1")
        with pytest.raises(Occupied, match="is in update u1"):
            await other.start(request_id="u2")
        # A board that moves says there how far it is.
        one.connect("d")
        await one.until(lambda: "d" in one.heard)
        one.say("d", DONE)
        one.say("c", DONE)
        await asyncio.wait_for(watching, 10)
        assert set(seen[-1].values()) == {DONE}
        await other.until(lambda: set(other.states().values()) == {DONE})
        assert [len(offers) for offers in (*one.heard.values(), *other.heard.values())] == [1] * 5


async def test_nobody_begins_at_either_after_one_has_failed(stage: Stage, postgres_url: str) -> None:
    stage.boards.add(*(f"a{number}" for number in range(10)), *(f"b{number}" for number in range(10)))
    async with two_stages(stage, postgres_url) as (one, other):
        one.connect(*(f"a{number}" for number in range(10)))
        other.connect(*(f"b{number}" for number in range(10)))
        await one.start()
        await other.until(lambda: len(one.heard) + len(other.heard) == 16)
        await other.settle()
        # Sixteen at once, and not ten at each.
        assert len(one.heard) + len(other.heard) == 16
        name = next(iter(one.heard))
        one.say(name, FAILED, "no room")
        await other.until(lambda: list(other.states().values()).count(STOPPED) == 19)
        heard = len(one.heard) + len(other.heard)
        assert other.updater.find("u1").halted == f"{name} failed: no room"
        stopped = await other.updater.stop("u1")
        assert stopped.halted == f"{name} failed: no room"
        await one.settle()
        assert len(one.heard) + len(other.heard) == heard == 16


async def test_two_that_begin_at_once_share_no_board(stage: Stage, postgres_url: str) -> None:
    stage.boards.add("a", "b", "c")
    async with two_stages(stage, postgres_url) as (one, other):
        outcomes = await asyncio.gather(
            one.start("device_id=a", "device_id=b", request_id="u1"),
            other.start("device_id=b", "device_id=c", request_id="u2"),
            return_exceptions=True,
        )
        assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Occupied", "Update"]


async def test_a_board_that_was_asked_and_went_away_holds_nobody_up(stage: Stage) -> None:
    clock = Moving()
    stage.updater._clock = clock
    stage.boards.add(*(f"a{number}" for number in range(17)))
    stage.connect(*(f"a{number}" for number in range(17)))
    await stage.start()
    await stage.until(lambda: len(stage.heard) == 16)
    await stage.settle()
    assert len(stage.heard) == 16
    clock.now += 61
    stage.updater._poke.set()
    await stage.until(lambda: len(stage.heard) == 17)


async def test_how_far_a_board_is_reaches_those_who_follow_it_elsewhere(
    stage: Stage, postgres_url: str
) -> None:
    stage.boards.add("a")
    async with two_stages(stage, postgres_url) as (one, other):
        one.connect("a")
        await one.start()
        await one.until(lambda: "a" in one.heard)
        for fraction in (0.41, 0.57):
            one.desks["a"].report(update_pb2.UpdateReport(update_id="u1", state=FETCHING, fraction=fraction))
            await one.until(lambda fraction=fraction: one.updater.find("u1").boards[0].fraction == fraction)
        await other.until(
            lambda: other.updater.updates() and other.updater.find("u1").boards[0].fraction == 0.5
        )


async def test_a_board_that_moves_is_heard_before_its_update_is_known(
    stage: Stage, postgres_url: str
) -> None:
    stage.boards.add("a")
    async with two_stages(stage, postgres_url) as (one, other):
        # The board came over the moment after it was asked: this collector has not looked since.
        async with other.updater._turn:
            one.connect("a")
            await one.start()
            await one.until(lambda: "a" in one.heard)
            assert other.updater.updates() == []
            other.connect("a")
            other.say("a", FETCHING)
            other.say("a", FETCHING, update_id="nobody-s")
            other.say("a", DONE)
        await one.until(lambda: one.states() == {"a": DONE})
        assert not other.updater._reports


async def test_the_file_of_an_older_collector_is_taken_over(tmp_path: Path) -> None:
    update = update_pb2.Update(update_id="u1", version="0.2.0")
    with contextlib.closing(sqlite3.connect(tmp_path / "updates.db")) as old:
        # As version 0.1 made it.
        old.execute(
            "CREATE TABLE updates (update_id TEXT NOT NULL PRIMARY KEY, created INTEGER NOT NULL,"
            " content BLOB NOT NULL)"
        )
        old.execute("INSERT INTO updates VALUES ('u1', 5, ?)", (update.SerializeToString(),))
        old.commit()
    for _ in range(2):
        with contextlib.closing(TablesFile(tmp_path / "updates.db", MIGRATIONS)) as tables:
            store = UpdateStore(tables)
            assert await store.versions() == {"u1": 1}
            assert await store.get(["u1"]) == [(1, update)]


async def test_what_two_collectors_write_at_once_is_all_kept(stage: Stage, postgres_url: str) -> None:
    async with two_stages(stage, postgres_url) as (one, other):
        await one.store.add(update_pb2.Update(update_id="u1"), lambda _: None)

        def adding(name: str) -> Callable[[update_pb2.Update], bool]:
            def add(update: update_pb2.Update) -> bool:
                # Longer than a moment between reading and writing.
                time.sleep(0.005)
                update.boards.add(device_id=name)
                return True

            return add

        names = [f"b{number:02}" for number in range(30)]
        await asyncio.gather(
            *((one, other)[number % 2].store.change("u1", adding(name)) for number, name in enumerate(names))
        )
        ((version, update),) = await other.store.get(["u1"])
        assert sorted(board.device_id for board in update.boards) == names
        assert version == 31


async def test_old_updates_make_room(tmp_path: Path) -> None:
    tables = TablesFile(tmp_path / "updates.db", MIGRATIONS)
    with contextlib.closing(tables):
        store = UpdateStore(tables)
        for number in range(130):
            update = update_pb2.Update(update_id=f"u{number}")
            update.created_at.FromNanoseconds(number * 10**9)
            await store.add(update, lambda _: None)
            await store.add(update, lambda _: pytest.fail("it is there already"))
        kept = await store.versions()
    assert kept == {f"u{number}": 1 for number in range(30, 130)}
    assert (tmp_path / "updates.db").stat().st_mode & 0o777 == 0o600
