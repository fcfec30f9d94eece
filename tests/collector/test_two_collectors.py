"""Two collectors as programs on one PostgreSQL: what is begun at one goes on at the other."""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
import sys
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from boardbench.v1 import (
    agent_pb2,
    board_pb2,
    collector_pb2,
    collector_pb2_grpc,
    job_pb2,
    job_pb2_grpc,
    update_pb2,
    update_pb2_grpc,
)

DEADLINE_SECONDS = 30.0


@dataclass
class Side:
    """A collector and somebody who talks with it."""

    process: Any
    channel: grpc.aio.Channel

    def report(self, device_id: str, key: str = "") -> Any:
        metadata = (("boardbench-device-key", key),) if key else ()
        return collector_pb2_grpc.CollectorServiceStub(self.channel).Report(metadata=metadata)

    async def join(self, device_id: str, key: str = "") -> Any:
        """The stream of a board that takes jobs, once it was welcomed."""
        call = self.report(device_id, key)
        board = board_pb2.Board(device_id=device_id, architecture="aarch64")
        hello = collector_pb2.Hello(board=board, spool_id=f"spool-{device_id}", takes_jobs=True)
        hello.runtimes.add(name="tflite", available=True, formats=["tflite"], devices=["cpu"])
        await call.write(collector_pb2.ReportRequest(hello=hello))
        answer = await self.read(call)
        assert answer.WhichOneof("response") == "welcome"
        await call.write(collector_pb2.ReportRequest(heartbeat=collector_pb2.Heartbeat()))
        return call

    async def read(self, call: Any) -> collector_pb2.ReportResponse:
        answer = await asyncio.wait_for(call.read(), DEADLINE_SECONDS)
        assert answer is not grpc.aio.EOF, self.process.log()
        return answer  # type: ignore[no-any-return]

    async def send(self, path: Path) -> str:
        """Sends a file; its SHA-256."""
        content = await asyncio.to_thread(path.read_bytes)
        sha256 = hashlib.sha256(content).hexdigest()
        call = job_pb2_grpc.JobServiceStub(self.channel).SendFile()
        header = agent_pb2.PushHeader(sha256=sha256, name=path.name, size_bytes=len(content))
        await call.write(job_pb2.SendFileRequest(header=header))
        await call.read()
        for at in range(0, len(content), 1_000_000):
            data = content[at : at + 1_000_000]
            chunk = agent_pb2.PushChunk(offset_bytes=at, data=data, crc32=zlib.crc32(data))
            await call.write(job_pb2.SendFileRequest(chunk=chunk))
        await call.done_writing()
        answer = await call.read()
        assert answer.WhichOneof("response") == "done"
        return sha256

    async def fetch(self, sha256: str, device_id: str, key: str) -> bytes:
        request = job_pb2.FetchFileRequest(sha256=sha256, device_id=device_id)
        stub = job_pb2_grpc.JobServiceStub(self.channel)
        metadata = (("boardbench-device-key", key),)
        return b"".join([answer.chunk.data async for answer in stub.FetchFile(request, metadata=metadata)])

    async def enroll(self, token: str, device_id: str) -> str:
        board = board_pb2.Board(device_id=device_id)
        request = collector_pb2.EnrollRequest(token=token, board=board, instance_id=f"i-{device_id}")
        stub = collector_pb2_grpc.CollectorServiceStub(self.channel)
        return str((await stub.Enroll(request)).device_key)

    @property
    def updates(self) -> Any:
        return update_pb2_grpc.UpdateServiceStub(self.channel)


@pytest.fixture
async def start(
    start_collector: Callable[..., Any], postgres_url: str, tmp_path: Path
) -> AsyncIterator[Callable[[str], Any]]:
    async with AsyncExitStack() as stack:

        async def begin(name: str) -> Side:
            process = await asyncio.to_thread(
                start_collector,
                *("--store", postgres_url, "--require-enrolment", "--heartbeat", "1"),
                folder=tmp_path / name,
            )
            channel = await stack.enter_async_context(
                grpc.aio.insecure_channel(
                    process.grpc_address, options=(("grpc.use_local_subchannel_pool", 1),)
                )
            )
            return Side(process, channel)

        yield begin


def command(url: str, folder: Path, *arguments: str) -> str:
    """What a command of the collector says; the address of the store is in the environment."""
    done = subprocess.run(
        [sys.executable, "-m", "boardbench.collector", *arguments, "--data-dir", str(folder)],
        env=os.environ | {"BOARDBENCH_COLLECTOR_STORE": url},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


async def test_a_token_that_was_made_anywhere_is_good_once(
    start: Callable[[str], Any], postgres_url: str, tmp_path: Path
) -> None:
    one, other = await start("a"), await start("b")
    token = await asyncio.to_thread(command, postgres_url, tmp_path / "c", "token", "create")
    outcomes = await asyncio.gather(
        *((one, other)[number % 2].enroll(token, f"pi{number}") for number in range(12)),
        return_exceptions=True,
    )
    keys = {f"pi{number}": key for number, key in enumerate(outcomes) if isinstance(key, str)}
    assert len(keys) == 1
    for refused in outcomes:
        if not isinstance(refused, str):
            assert isinstance(refused, grpc.aio.AioRpcError)
            assert refused.code() is grpc.StatusCode.PERMISSION_DENIED
    ((name, key),) = keys.items()
    listed = await asyncio.to_thread(command, postgres_url, tmp_path / "c", "token", "list")
    assert f"used by {name}" in listed
    for side in (one, other):
        (await side.join(name, key)).cancel()
    await asyncio.to_thread(command, postgres_url, tmp_path / "c", "forget", name)
    for side in (one, other):
        call = side.report(name, key)
        hello = collector_pb2.Hello(board=board_pb2.Board(device_id=name), spool_id="s")
        await call.write(collector_pb2.ReportRequest(hello=hello))
        with pytest.raises(grpc.aio.AioRpcError, match="no longer"):
            await asyncio.wait_for(call.read(), DEADLINE_SECONDS)
    # Nothing of it is in a file of either.
    assert not await asyncio.to_thread(lambda: list(tmp_path.glob("*/data/enrolments*")))


async def test_jobs_and_updates_outlive_the_collector_that_took_them(
    start: Callable[[str], Any], postgres_url: str, tmp_path: Path, release_packages: Any
) -> None:
    one, other = await start("a"), await start("b")
    token = await asyncio.to_thread(command, postgres_url, tmp_path / "c", "token", "create")
    key = await one.enroll(token, "pi5")
    board = await other.join("pi5", key)
    model = tmp_path / "m.tflite"
    model.write_bytes(b"\x1c\x00\x00\x00TFL3" + os.urandom(2_500_000))
    sha256 = await one.send(model)
    jobs = job_pb2_grpc.JobServiceStub(one.channel)
    await jobs.SubmitJobs(job_pb2.SubmitJobsRequest(on=["device_id=pi5"], model_sha256=sha256))
    built = release_packages.build(tmp_path, "0.2.0", {"release.json": "{}"})
    package = release_packages.Signer().sign(built)
    release = await one.send(package)
    started = await one.updates.StartUpdate(
        update_pb2.StartUpdateRequest(on=["device_id=pi5"], package_sha256=release, canary=1, request_id="u1")
    )
    assert started.update.update_id == "u1"
    # What it had is in the database, and nowhere else.
    one.process.kill()
    told: dict[str, Any] = {}
    while set(told) != {"offer", "update"}:
        answer = await other.read(board)
        told[str(answer.WhichOneof("response"))] = answer
    assert told["offer"].offer.model.sha256 == sha256
    assert told["update"].update.package_sha256 == release
    assert await other.fetch(sha256, "pi5", key) == model.read_bytes()
    assert await other.fetch(release, "pi5", key) == package.read_bytes()
    report = update_pb2.UpdateReport(update_id="u1", state=update_pb2.UPDATE_STATE_DONE)
    await board.write(collector_pb2.ReportRequest(update=report))
    third = await start("d")
    watched = third.updates.WatchUpdate(update_pb2.WatchUpdateRequest(update_id="u1"))
    last = None
    async for response in watched:
        last = response.update
    assert last is not None
    assert [(each.device_id, each.state, each.canary) for each in last.boards] == [
        ("pi5", update_pb2.UPDATE_STATE_DONE, True)
    ]
    board.cancel()
