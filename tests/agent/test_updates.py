"""A release that is offered is fetched whole, verified, and left for root; runs wait meanwhile."""

from __future__ import annotations

import asyncio
import hashlib
import json
import sys
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest

from boardbench.agent.config import UpdateConfig
from boardbench.agent.errors import StorageError
from boardbench.agent.part import Part
from boardbench.agent.update import layout as places
from boardbench.agent.update.layout import Entry, Layout
from boardbench.agent.updates import Updates
from boardbench.v1 import agent_pb2, collector_pb2, job_pb2, job_pb2_grpc, update_pb2

CARD = {"version": "0.1.0", "release": "0.1.0+cp311", "architecture": "arm64", "python": "3.11"}
FETCHING = update_pb2.UPDATE_STATE_FETCHING
READY = update_pb2.UPDATE_STATE_READY
SWITCHED = update_pb2.UPDATE_STATE_SWITCHED
DONE = update_pb2.UPDATE_STATE_DONE
ROLLED_BACK = update_pb2.UPDATE_STATE_ROLLED_BACK
FAILED = update_pb2.UPDATE_STATE_FAILED


class Queue:
    """Runs, as far as an update needs them."""

    def __init__(self) -> None:
        self.idle = asyncio.Event()
        self.idle.set()
        self.held = False

    async def hold(self) -> None:
        self.held = True
        await self.idle.wait()

    def let_go(self) -> None:
        self.held = False


class Collector(job_pb2_grpc.JobServiceServicer):
    """Hands out one file, and does so badly when it is told to."""

    def __init__(self) -> None:
        self.data = b""
        self.asked: list[int] = []
        self.break_after = 0
        self.spoil = 0
        self.refuse = False

    async def FetchFile(self, request: job_pb2.FetchFileRequest, context: Any) -> Any:
        self.asked.append(request.offset_bytes)
        if self.refuse:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
        for place in range(request.offset_bytes, len(self.data), 300):
            data = self.data[place : place + 300]
            checksum = zlib.crc32(data)
            if self.spoil:
                self.spoil -= 1
                checksum ^= 1
            yield job_pb2.FetchFileResponse(
                chunk=agent_pb2.PushChunk(offset_bytes=place, data=data, crc32=checksum)
            )
            if self.break_after and place - request.offset_bytes >= self.break_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")


@dataclass
class Stage:
    """A board with a release, an agent's part in updates, and a collector."""

    layout: Layout
    signer: Any
    packages: Any
    collector: Collector
    address: str
    queue: Queue
    patch: pytest.MonkeyPatch
    problem: str = ""
    credentials: Any = None
    made: list[Updates] = field(default_factory=list)
    reports: list[update_pb2.UpdateReport] = field(default_factory=list)

    def agent(self, **config: Any) -> Updates:
        async def health() -> str:
            return self.problem

        updates = Updates(
            UpdateConfig(root=self.layout.root, **config),
            self.layout.data_dir,
            collector=self.address,
            device_id="pi",
            runs=self.queue,  # type: ignore[arg-type]
            health=health,
            credentials=self.credentials,
            jitter=lambda: 0.0,
        )
        updates.speak = lambda: self.reports.extend(request.update for request in updates.say())
        self.made.append(updates)
        return updates

    def package(self, version: str = "0.2.0", **how: Any) -> bytes:
        built = self.packages.build(
            self.layout.root / "made", version, {"release.json": "{}", "x": "y" * 999}, **how
        )
        return bytes(self.signer.sign(built).read_bytes())

    def offer(self, updates: Updates, data: bytes, update_id: str = "u1", **changed: Any) -> None:
        self.collector.data = data
        offer = update_pb2.UpdateOffer(
            update_id=update_id,
            version="0.2.0",
            package_name="p.deb",
            package_sha256=changed.get("sha256", hashlib.sha256(data).hexdigest()),
            package_bytes=len(data),
        )
        updates.hear(collector_pb2.ReportResponse(update=offer))

    def runs_as(self, release: str) -> None:
        home = self.layout.releases / release
        home.mkdir(parents=True, exist_ok=True)
        (home / "release.json").write_text(json.dumps(CARD | {"release": release}))
        self.leads_to(release)
        self.patch.setattr(sys, "prefix", str(self.layout.current))

    def leads_to(self, release: str) -> None:
        """As root's program does it."""
        fresh = self.layout.prefix / "fresh"
        fresh.symlink_to(f"releases/{release}")
        fresh.replace(self.layout.current)

    @property
    def last(self) -> update_pb2.UpdateReport:
        return self.reports[-1] if self.reports else update_pb2.UpdateReport()

    @property
    def request(self) -> dict[str, Any]:
        return places.read_object(self.layout.inbox / "request.json")

    def journal(self, entry: Entry) -> None:
        self.layout.work.mkdir(parents=True, exist_ok=True)
        places.write_entry(self.layout, entry)


async def until(condition: Callable[[], object]) -> None:
    for _ in range(1500):
        if condition():
            return
        await asyncio.sleep(0.01)
    pytest.fail("not within 15 s")


@pytest.fixture
async def stage(
    tmp_path: Path, release_packages: Any, monkeypatch: pytest.MonkeyPatch, listen: Callable[..., Any]
) -> AsyncIterator[Stage]:
    collector = Collector()
    address = await listen(collector, job_pb2_grpc.add_JobServiceServicer_to_server)
    signer = release_packages.Signer()
    layout = Layout(tmp_path, tmp_path / "data")
    layout.keys.parent.mkdir(parents=True)
    layout.keys.write_text(signer.public_line)
    made = Stage(layout, signer, release_packages, collector, address, Queue(), monkeypatch)
    made.runs_as("0.1.0+cp311")
    yield made
    for updates in made.made:
        await updates.close()


async def test_it_is_fetched_and_asked_for_when_no_run_is_measured(stage: Stage) -> None:
    updates = stage.agent()
    await updates.recover()
    stage.queue.idle.clear()
    data = stage.package()
    stage.offer(updates, data)
    await until(lambda: stage.last.state == READY)
    assert "no run" in stage.last.reason
    assert not stage.request
    fractions = [report.fraction for report in stage.reports if report.state == FETCHING]
    assert fractions[0] == 0 and fractions == sorted(fractions)
    stage.queue.idle.set()
    await until(lambda: stage.request)
    assert stage.request == {"update_id": "u1", "sha256": hashlib.sha256(data).hexdigest()}
    assert stage.queue.held
    package = stage.layout.inbox / f"{stage.request['sha256']}.deb"
    assert package.read_bytes() == data
    # What was not taken up yet is said again on another stream.
    said = len(stage.reports)
    updates.connected()
    assert stage.reports[said:] == [stage.last]
    # Another one has to wait for its end.
    stage.offer(updates, data, "u2")
    assert (stage.last.update_id, stage.last.state) == ("u2", FAILED)
    stage.journal(Entry("u1", state=places.ROLLED_BACK, reason="it died"))
    await until(lambda: stage.last.update_id == "u1" and stage.last.state == ROLLED_BACK)
    await until(lambda: not stage.queue.held and not package.exists() and not stage.request)
    assert stage.last.reason == "it died"


async def test_broken_links_and_damaged_pieces_only_take_time(stage: Stage) -> None:
    updates = stage.agent()
    stage.collector.break_after, stage.collector.spoil = 600, 2
    stage.offer(updates, stage.package())
    await until(lambda: stage.request)
    # From the beginning when nothing good came, then where it was.
    assert stage.collector.asked[:2] == [0, 0]
    assert len(set(stage.collector.asked)) > 1
    assert stage.collector.asked == sorted(stage.collector.asked)


async def test_what_is_not_what_was_promised_is_given_up(stage: Stage) -> None:
    updates = stage.agent()
    stage.offer(updates, stage.package(), sha256="0" * 64)
    await until(lambda: stage.last.state == FAILED)
    assert "came damaged, 3 times" in stage.last.reason
    await until(lambda: not list(stage.layout.inbox.iterdir()))
    stage.collector.refuse = True
    stage.offer(updates, stage.package(), "u2")
    await until(lambda: stage.last.update_id == "u2" and stage.last.state == FAILED)
    assert "no such file (NOT_FOUND)" in stage.last.reason


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("stranger", "signed by nobody whose key is here"),
        ("armhf", "is for armhf"),
        ("older", "older than 0.1.0"),
        ("keyless", "trusts no signature"),
        ("pip", "was not installed by its Debian package"),
        ("off", "takes no updates"),
    ],
)
async def test_what_the_board_does_not_take_it_refuses(
    stage: Stage, release_packages: Any, case: str, why: str
) -> None:
    data = stage.package(
        "0.0.9" if case == "older" else "0.2.0", architecture="armhf" if case == "armhf" else "arm64"
    )
    if case == "stranger":
        stage.signer = release_packages.Signer()
        data = stage.package("0.2.0")
    if case == "keyless":
        stage.layout.keys.unlink()
    if case == "pip":
        stage.patch.undo()
    updates = stage.agent(take=case != "off")
    stage.offer(updates, data)
    await until(lambda: stage.last.state == FAILED)
    assert why in stage.last.reason
    assert not stage.request
    await until(lambda: not list(stage.layout.inbox.iterdir()))
    assert not stage.queue.held


async def test_the_release_that_runs_is_not_asked_for(stage: Stage) -> None:
    updates = stage.agent()
    stage.offer(updates, stage.package("0.1.0"))
    await until(lambda: stage.last.state == DONE)
    # The next life of the agent has nothing to do with it.
    await until(lambda: not list(stage.layout.inbox.iterdir()))


async def test_a_new_release_says_that_it_works_and_begins_no_run_before_it_is_kept(stage: Stage) -> None:
    stage.runs_as("0.2.0+cp311")
    stage.layout.inbox.mkdir(parents=True)
    entry = Entry(
        "u1", state=places.SWITCHED, from_release="0.1.0+cp311", to_release="0.2.0+cp311", token="t"
    )
    stage.journal(entry)
    stage.problem = "its collector is not reached"
    updates = stage.agent()
    await updates.recover()
    # At once: a run that waited must not begin before.
    assert stage.queue.held
    healthy = stage.layout.inbox / "healthy.json"
    word = {"token": "t", "release": "0.2.0+cp311"}
    await until(lambda: places.read_object(healthy) == word | {"healthy": False, "reason": stage.problem})
    stage.problem = ""
    await until(lambda: places.read_object(healthy) == word | {"healthy": True, "reason": ""})
    assert (stage.last.update_id, stage.last.state) == ("u1", SWITCHED)
    stage.journal(entry.at(places.DONE))
    await until(lambda: stage.last.state == DONE)
    await until(lambda: not stage.queue.held)


@pytest.mark.parametrize("switched", [False, True])
async def test_an_old_release_says_nothing_in_the_place_of_the_new_one(stage: Stage, switched: bool) -> None:
    stage.layout.inbox.mkdir(parents=True)
    stage.journal(Entry("u1", state=places.SWITCHED, to_release="0.2.0+cp311", token="t"))
    updates = stage.agent()
    if switched:
        # It is still there when `current`, by way of which it was started, leads to the new one.
        stage.runs_as("0.2.0+cp311")
    looks, read = [0], places.read_entry

    def look(layout: Layout) -> Entry | None:
        looks[0] += 1
        return read(layout)

    stage.patch.setattr(places, "read_entry", look)
    await updates.recover()
    await until(lambda: stage.last.state == SWITCHED)
    await until(lambda: looks[0] >= 5)
    assert not (stage.layout.inbox / "healthy.json").exists()


async def test_a_fetch_goes_on_in_the_next_life_of_the_agent(stage: Stage) -> None:
    first = stage.agent()
    stage.collector.spoil = 1 << 30
    stage.offer(first, stage.package())
    await until(lambda: len(stage.collector.asked) > 1)
    await first.close()
    stage.collector.spoil = 0
    second = stage.agent()
    await second.recover()
    await until(lambda: stage.request)


async def test_another_offer_waits_until_the_files_of_the_former_are_let_go(stage: Stage) -> None:
    """Both are of one package: two that write one file would spoil it."""
    steps: list[str] = []
    begun, may_go = threading.Event(), threading.Event()

    def noted(name: str) -> None:
        method = getattr(Part, name)

        def step(self: Part, *arguments: Any) -> Any:
            steps.append(name)
            if name == "append" and not begun.is_set():
                begun.set()
                assert may_go.wait(30)
            return method(self, *arguments)

        stage.patch.setattr(Part, name, step)

    for name in ("open", "append", "close"):
        noted(name)
    updates = stage.agent()
    data = stage.package()
    stage.offer(updates, data)
    await until(begun.is_set)
    stage.offer(updates, data, "u2")
    # One that does not wait has opened it long before.
    asyncio.get_running_loop().call_later(0.3, may_go.set)
    await until(lambda: stage.request)
    assert stage.request["update_id"] == "u2"
    assert stage.queue.held
    assert steps[:4] == ["open", "append", "close", "open"]


async def test_what_keeps_the_board_from_saying_who_it_is_is_told(stage: Stage) -> None:
    async def damaged(channel: grpc.aio.Channel) -> Any:
        raise StorageError("enrolment.json is damaged: remove it")

    stage.credentials = damaged
    updates = stage.agent()
    stage.offer(updates, stage.package())
    await until(lambda: stage.last.state == FAILED)
    assert stage.last.reason == "enrolment.json is damaged: remove it"
