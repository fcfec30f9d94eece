"""Disks that are full: the real collector on a small file system, and on a PostgreSQL that has one."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest

from boardbench.v1 import collector_pb2, collector_pb2_grpc, result_pb2

from .conftest import DEADLINE_SECONDS, PostgresServer, _postgres_programs, run

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]

SAMPLES = 60_000
"""Of a result: some 250 kB, so that a disk is soon full."""


class Sender:
    """A board that keeps its results until they are acknowledged, as agents do."""

    def __init__(self, make_result: MakeResult, hello: collector_pb2.Hello) -> None:
        self.hello = hello
        self.acknowledged = 0
        """Of the results ``run-1``, ``run-2``, …, which are at these places in the spool."""
        self._make_result = make_result

    async def send(
        self, address: str, until: int, *, before: Mapping[int, Callable[[], object]] | None = None
    ) -> grpc.aio.AioRpcError | None:
        """Sends results up to this one; returns how the stream ended when it did before.

        What stands under a number in ``before`` is done just before that one is sent.
        """
        options = (("grpc.max_send_message_length", -1),)
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            call = collector_pb2_grpc.CollectorServiceStub(channel).Report()
            try:
                await call.write(collector_pb2.ReportRequest(hello=self.hello))
                welcome = await asyncio.wait_for(call.read(), DEADLINE_SECONDS)
                assert welcome is not grpc.aio.EOF
                assert welcome.welcome.acknowledged_sequence >= self.acknowledged, "something is lost"
                while self.acknowledged < until:
                    sequence = self.acknowledged + 1
                    (before or {}).get(sequence, lambda: None)()
                    result = self._make_result(f"run-{sequence}", samples=SAMPLES)
                    spooled = collector_pb2.SpooledResult(
                        spool_id=self.hello.spool_id, sequence=sequence, result=result
                    )
                    await call.write(collector_pb2.ReportRequest(result=spooled))
                    answer = await asyncio.wait_for(call.read(), DEADLINE_SECONDS)
                    assert answer.WhichOneof("response") == "acknowledgement", answer
                    self.acknowledged = answer.acknowledgement.sequence
            except grpc.aio.AioRpcError as error:
                return error
            call.cancel()
            return None


def run_ids(address: str) -> list[str]:
    """What the collector has, samples left out."""
    with grpc.insecure_channel(address) as channel:
        stub = collector_pb2_grpc.CollectorServiceStub(channel)
        request = collector_pb2.ListResultsRequest(page_size=1000, summary=True)
        return sorted(
            (each.run_id for each in stub.ListResults(request).results), key=lambda name: int(name[4:])
        )


def names(until: int) -> list[str]:
    return [f"run-{number}" for number in range(1, until + 1)]


async def test_what_was_acknowledged_is_kept_and_the_rest_comes_with_room(
    start_collector: Callable[..., Any],
    small_disk: Callable[[int], Path],
    small_disks: ModuleType,
    make_result: MakeResult,
    make_hello: MakeHello,
    tmp_path: Path,
) -> None:
    disk = small_disk(16_000_000)
    (disk / "data").mkdir()
    # What it writes for us is elsewhere.
    folder = tmp_path / "lab"
    folder.mkdir()
    (folder / "data").symlink_to(disk / "data")
    collector = start_collector("--heartbeat", "1", folder=folder)
    sender = Sender(make_result, make_hello())
    filling = {5: lambda: small_disks.fill(disk / "filler")}
    error = await sender.send(collector.grpc_address, 200, before=filling)
    assert error is not None and error.code() is grpc.StatusCode.UNAVAILABLE
    assert "no space left for" in (error.details() or "") and "results.db" in (error.details() or "")
    assert 4 <= sender.acknowledged < 40
    kept = sender.acknowledged
    # It still shows what it has, and says what is wrong.
    assert run_ids(collector.grpc_address) == names(kept)
    assert re.search(r"(?m)^boardbench_collector_store_failures_total [1-9]", collector.get("/metrics"))
    assert collector.log().count("what comes in can't be stored: no space left for") == 1
    # A power cut does not make it worse: what was told is there again on the disk that is full.
    collector.kill()
    collector = start_collector("--heartbeat", "1", folder=folder)
    assert run_ids(collector.grpc_address)[:kept] == names(kept)
    small_disks.fill(disk / "more")
    assert (await sender.send(collector.grpc_address, 200)) is not None
    assert collector.process.poll() is None

    for name in ("filler", "more"):
        (disk / name).unlink()
    assert await sender.send(collector.grpc_address, kept + 10) is None
    assert run_ids(collector.grpc_address) == names(kept + 10)
    assert collector.log().count("what comes in is stored again") == 1
    assert collector.stop() == 0
    answer = await asyncio.to_thread(run, "check", "--data-dir", str(disk / "data"))
    assert answer.stdout.strip().endswith("results.db: sound"), answer


async def test_a_database_whose_disk_is_full(
    start_collector: Callable[..., Any],
    small_disk: Callable[[int], Path],
    small_disks: ModuleType,
    make_result: MakeResult,
    make_hello: MakeHello,
    wait_until: Callable[..., None],
) -> None:
    """PostgreSQL refuses to grow a table, or ends where its log can't; both pass by with room."""
    programs = _postgres_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server here; `make test` unpacks Debian's")
    disk = small_disk(110_000_000)
    server = PostgresServer(*programs, folder=disk / "postgres")
    try:
        collector = start_collector("--store", server.url("postgres"), "--heartbeat", "1")
        sender = Sender(make_result, make_hello())
        filling = {5: lambda: small_disks.fill(disk / "filler")}
        error = await sender.send(collector.grpc_address, 400, before=filling)
        assert error is not None and error.code() is grpc.StatusCode.UNAVAILABLE
        assert "postgresql://" in (error.details() or ""), error.details()
        assert "what comes in can't be stored: postgresql://" in collector.log()
        assert collector.process.poll() is None

        (disk / "filler").unlink()
        server.kill()
        server.start()
        until = sender.acknowledged + 5
        wait_until(lambda: '"ok"' in collector.get("/healthz"), "the collector writes again")
        assert await sender.send(collector.grpc_address, until) is None
        assert run_ids(collector.grpc_address) == names(until)
        assert collector.stop() == 0
    finally:
        server.stop()
