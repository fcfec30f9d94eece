"""A file of the collector comes whole over links that break, stall and damage, and what is hopeless ends."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc
import pytest

from boardbench.agent.errors import CorruptChunk, DataLoss, DigestMismatch, NotFetched
from boardbench.agent.fetch import Fetcher
from boardbench.v1 import agent_pb2, job_pb2, job_pb2_grpc

DATA = bytes(range(256)) * 4
PIECE = 100


class Collector(job_pb2_grpc.JobServiceServicer):
    """Does with each call what the script says: the last line again and again."""

    def __init__(self) -> None:
        self.address = ""
        self.script: list[str] = ["send"]
        self.asked: list[job_pb2.FetchFileRequest] = []
        self.metadata: list[dict[str, str | bytes]] = []

    async def FetchFile(self, request: job_pb2.FetchFileRequest, context: Any) -> Any:
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        act = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if act == "lacks":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such file")
        for number, offset in enumerate(range(request.offset_bytes, len(DATA), PIECE)):
            if number == 2 and act == "break":
                await context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
            if number == 2 and act == "end":
                return
            data = DATA[offset : offset + PIECE]
            damage = int(act == "damage")
            chunk = agent_pb2.PushChunk(offset_bytes=offset, data=data, crc32=zlib.crc32(data) ^ damage)
            yield job_pb2.FetchFileResponse(chunk=chunk)


@dataclass
class Memory:
    """Where the file belongs: an arrival of it, and what it keeps between two."""

    data: bytes = b""
    size_bytes: int = len(DATA)
    # How often the whole is taken for another file.
    spoils: int = 0
    opened: int = 0
    fractions: list[float] = field(default_factory=list)

    @property
    def offset_bytes(self) -> int:
        return len(self.data)

    @property
    def complete(self) -> bool:
        return len(self.data) == self.size_bytes

    async def write(self, *, offset_bytes: int, data: bytes, crc32: int) -> None:
        assert offset_bytes == len(self.data)
        if zlib.crc32(data) != crc32:
            raise CorruptChunk("a piece came damaged")
        self.data += data

    async def finish(self) -> None:
        if self.spoils:
            self.spoils -= 1
            self.data = b""
            raise DigestMismatch("another file")

    @asynccontextmanager
    async def receive(self) -> AsyncIterator[Memory]:
        self.opened += 1
        yield self

    async def fetched_by(self, fetcher: Fetcher, hopeless: type[DataLoss] = DataLoss) -> None:
        await fetcher.fetch(
            "ab" * 32,
            "m.tflite",
            self.receive,
            lambda: len(self.data),
            self.fractions.append,
            hopeless=hopeless,
        )
        assert self.data == DATA


@pytest.fixture
async def collector(listen: Callable[..., Any]) -> Collector:
    made = Collector()
    made.address = await listen(made, job_pb2_grpc.add_JobServiceServicer_to_server)
    return made


@pytest.fixture
def slept() -> list[float]:
    return []


@pytest.fixture
def fetchers(collector: Collector, slept: list[float]) -> Callable[..., Fetcher]:
    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    return lambda **more: Fetcher(collector.address, "pi", jitter=lambda: 1.0, sleep=sleep, **more)


async def test_a_file_comes_whole_and_says_how_far_it_is(
    fetchers: Callable[..., Fetcher], collector: Collector, slept: list[float]
) -> None:
    async def credentials(channel: grpc.aio.Channel) -> tuple[tuple[str, str], ...]:
        return (("x-board", "pi"),)

    place = Memory()
    await place.fetched_by(fetchers(credentials=credentials))
    assert [(request.offset_bytes, request.device_id) for request in collector.asked] == [(0, "pi")]
    assert collector.metadata[0]["x-board"] == "pi"
    assert place.fractions == sorted(place.fractions)
    assert place.fractions[-1] == 1.0
    assert slept == []


async def test_it_goes_on_where_it_was_and_is_patient_only_while_nothing_moves(
    fetchers: Callable[..., Fetcher], collector: Collector, slept: list[float]
) -> None:
    collector.script = ["break", "damage", "damage", "break", "end", "send"]
    place = Memory()
    await place.fetched_by(fetchers())
    assert [request.offset_bytes for request in collector.asked] == [0, 200, 200, 200, 400, 600]
    assert slept == [0.5, 1.0, 2.0, 0.5, 0.5]


async def test_what_is_there_is_not_asked_for(fetchers: Callable[..., Fetcher], collector: Collector) -> None:
    await Memory(data=DATA).fetched_by(fetchers())
    assert collector.asked == []


async def test_a_link_that_says_nothing_is_given_up(
    fetchers: Callable[..., Fetcher], monkeypatch: pytest.MonkeyPatch, slept: list[float]
) -> None:
    monkeypatch.setattr("boardbench.agent.fetch._STALL_SECONDS", 0.0)
    fetcher = fetchers()
    place = Memory()

    def recover() -> int:
        # The next try has all the time that it needs.
        if slept:
            monkeypatch.undo()
        return len(place.data)

    await fetcher.fetch("ab" * 32, "m.tflite", place.receive, recover, place.fractions.append)
    assert place.data == DATA
    assert slept == [0.5]


async def test_a_file_that_comes_damaged_again_and_again_is_given_up(
    fetchers: Callable[..., Fetcher], collector: Collector
) -> None:
    with pytest.raises(NotFetched, match=r"m\.tflite came damaged, 3 times: another file"):
        await Memory(spoils=9).fetched_by(fetchers())
    collector.script = ["damage"]
    with pytest.raises(NotFetched, match="3 times: a piece came damaged"):
        await Memory().fetched_by(fetchers())


async def test_pieces_may_come_damaged_as_often_as_they_like_where_there_is_no_other_way(
    fetchers: Callable[..., Fetcher], collector: Collector
) -> None:
    collector.script = [*["damage"] * 7, "send"]
    await Memory(spoils=2).fetched_by(fetchers(), hopeless=DigestMismatch)


async def test_the_collectors_last_word_is_told(
    fetchers: Callable[..., Fetcher], collector: Collector, slept: list[float]
) -> None:
    collector.script = ["lacks"]
    with pytest.raises(NotFetched, match=r"can't be had of the collector: no such file \(NOT_FOUND\)"):
        await Memory().fetched_by(fetchers())
    assert slept == []
