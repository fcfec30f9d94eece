"""The program as its users meet it: processes, signals, exit codes, what is printed."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from boardbench.v1 import collector_pb2, collector_pb2_grpc, result_pb2

from .conftest import run

MakeResult = Callable[..., result_pb2.RunResult]
MakeHello = Callable[..., collector_pb2.Hello]


def test_help_names_every_option_with_its_environment_variable() -> None:
    answer = run("serve", "--help")
    assert answer.returncode == 0
    options = set(re.findall(r"^  (--[a-z-]+)", answer.stdout, re.MULTILINE))
    assert {"--listen", "--http", "--data-dir", "--port-file", "--series-ttl"} <= options
    text = " ".join(answer.stdout.split())
    for option in options:
        variable = "BOARDBENCH_COLLECTOR_" + option[2:].replace("-", "_").upper()
        assert variable in text, option
    assert run("--version").stdout.startswith("boardbench-collector, version ")


def test_looking_at_the_help_loads_nothing_heavy() -> None:
    program = (
        "import sys, boardbench.collector.cli\n"
        "heavy = {'grpc', 'aiohttp', 'prometheus_client', 'google.protobuf', 'sqlite3', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_missing_part_of_the_installation_is_told_with_the_command_that_mends_it(tmp_path: Path) -> None:
    program = (
        "import sys; sys.modules['aiohttp'] = None; from boardbench.collector.cli import main; "
        f"main(['serve', '--data-dir', {str(tmp_path)!r}])"
    )
    answer = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert answer.returncode == 1
    assert "pip install 'boardbench[collector]'" in answer.stderr
    assert "aiohttp" in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("serve", "--listen", "nowhere:x"), "'x' is no port"),
        (("serve", "--listen", "::1"), "in brackets"),
        (("serve", "--series-ttl", "-1"), "--series-ttl"),
        (("serve", "--nonsense"), "--nonsense"),
        (("serve", "--remote-write", "mimir:9009"), "http://HOST:PORT/api/v1/write"),
        (("serve", "--remote-write-header", "tenant"), "write NAME=VALUE"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...], word: str) -> None:
    answer = run(*arguments)
    assert answer.returncode == 2
    assert word in answer.stderr


def test_the_environment_sets_what_the_command_line_does_not() -> None:
    answer = run("serve", BOARDBENCH_COLLECTOR_LISTEN="nowhere:x")
    assert answer.returncode == 2
    assert "'x' is no port" in answer.stderr


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        data = ("--data-dir", str(tmp_path / "data"))
        answer = run("serve", "--listen", address, "--http", "127.0.0.1:0", *data)
        assert answer.returncode == 1
        assert f"can't listen on {address}" in answer.stderr
        assert "--listen" in answer.stderr
        answer = run("serve", "--listen", "127.0.0.1:0", "--http", address, *data)
        assert answer.returncode == 1
        assert f"can't listen on {address}" in answer.stderr
        assert "--http" in answer.stderr
        assert "Traceback" not in answer.stderr


def test_it_says_where_it_listens_and_cleans_up(
    start_collector: Callable[..., Any], wait_until: Callable[..., None]
) -> None:
    collector = start_collector()
    log = collector.log()
    assert f"gRPC: {collector.grpc_address}\n" in log
    assert f"HTTP: {collector.url}/\n" in log
    assert json.loads(collector.get("/healthz"))["status"] == "ok"
    assert collector.port_file.stat().st_size
    assert collector.stop() == 0
    assert not collector.port_file.exists()
    assert not (collector.folder / "data" / "results.db-wal").exists()
    assert "Traceback" not in collector.log()


def test_two_collectors_dont_share_a_folder(start_collector: Callable[..., Any], tmp_path: Path) -> None:
    start_collector()
    answer = run(
        "serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data-dir", str(tmp_path / "data")
    )
    assert answer.returncode == 1
    assert "another boardbench-collector has" in answer.stderr


def test_a_network_address_is_taken_with_a_warning(start_collector: Callable[..., Any]) -> None:
    collector = start_collector("--http", "0.0.0.0:0")
    assert "0.0.0.0:0 is open to the network" in collector.log()
    assert json.loads(collector.get("/healthz"))["status"] == "ok"
    assert collector.stop() == 0


def test_check_reads_the_whole_store(
    start_collector: Callable[..., Any], make_result: MakeResult, make_hello: MakeHello, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    answer = run("check", "--data-dir", str(data))
    assert answer.returncode == 1
    assert "there is no store" in answer.stderr
    assert not data.exists()
    collector = start_collector()
    results = [make_result(f"run-{n}", samples=2000) for n in range(1, 30)]
    assert asyncio.run(_report(collector.grpc_address, make_hello(), results)) == 29
    assert collector.stop() == 0
    answer = run("check", "--data-dir", str(data))
    assert (answer.returncode, answer.stdout) == (0, f"{data / 'results.db'}: sound\n")
    with (data / "results.db").open("r+b") as file:
        for page in range(10, 20):
            file.seek(page * 4096)
            file.write(b"\x00" * 4096)
    answer = run("check", "--data-dir", str(data))
    assert answer.returncode == 1
    assert "results.db" in answer.stderr
    assert "Traceback" not in answer.stderr


async def _report(
    address: str,
    hello: collector_pb2.Hello,
    results: list[result_pb2.RunResult],
    on_acknowledged: Callable[[int], None] = lambda _: None,
) -> int:
    """Reports results and returns the highest sequence that was acknowledged, also when it breaks down."""
    acknowledged = 0
    async with grpc.aio.insecure_channel(address) as channel:
        call = collector_pb2_grpc.CollectorServiceStub(channel).Report()

        async def send() -> None:
            for sequence, result in enumerate(results, 1):
                spooled = collector_pb2.SpooledResult(
                    spool_id=hello.spool_id, sequence=sequence, result=result
                )
                await call.write(collector_pb2.ReportRequest(result=spooled))
            await call.done_writing()

        try:
            await call.write(collector_pb2.ReportRequest(hello=hello))
            welcome = (await call.read()).welcome
            assert welcome.heartbeat_seconds
            sender = asyncio.ensure_future(send())
            while (answer := await call.read()) is not grpc.aio.EOF:
                assert answer.WhichOneof("response") == "acknowledgement"
                acknowledged = answer.acknowledgement.sequence
                on_acknowledged(acknowledged)
            await sender
        except grpc.aio.AioRpcError:
            sender.cancel()
            await asyncio.gather(sender, return_exceptions=True)
    return acknowledged


async def test_nothing_acknowledged_is_lost_when_it_is_killed(
    start_collector: Callable[..., Any], make_result: MakeResult, make_hello: MakeHello
) -> None:
    devices = [f"board-{n}" for n in range(5)]
    results = {
        device: [make_result(f"{device}-{n}", device_id=device, samples=20) for n in range(1, 401)]
        for device in devices
    }
    kills = 0
    acknowledged = dict.fromkeys(devices, 0)
    while min(acknowledged.values()) < 400:
        collector = start_collector()
        now = dict.fromkeys(devices, 0)

        def count(device: str, sequence: int) -> None:
            now[device] = sequence  # noqa: B023
            # In the midst of it, and later each time.
            if sum(now.values()) >= 300 * (kills + 1) and kills < 4 and not collector.killed:  # noqa: B023
                collector.kill()  # noqa: B023

        # Everything is sent again every time, as by agents that lost their cursors.
        answers = await asyncio.gather(
            *(
                _report(collector.grpc_address, make_hello(name), results[name], partial(count, name))
                for name in devices
            )
        )
        if not collector.killed:
            assert answers == [400] * 5
            acknowledged.update(zip(devices, answers, strict=True))
            break
        kills += 1
        for device, answer in zip(devices, answers, strict=True):
            acknowledged[device] = max(acknowledged[device], answer)
        # What was acknowledged is there at the very next start.
        collector = start_collector()
        async with grpc.aio.insecure_channel(collector.grpc_address) as channel:
            stub = collector_pb2_grpc.CollectorServiceStub(channel)
            for device in devices:
                for n in range(1, acknowledged[device] + 1):
                    got = await stub.GetResult(collector_pb2.GetResultRequest(run_id=f"{device}-{n}"))
                    assert got.result == results[device][n - 1]
        collector.kill()
    assert kills == 4
    listing = json.loads(collector.get("/api/v1/devices"))["devices"]
    assert {device["board"]["device_id"]: device["results"] for device in listing} == dict.fromkeys(
        devices, "400"
    )
    assert collector.stop() == 0
    check = run("check", "--data-dir", str(collector.folder / "data"))
    assert check.returncode == 0, check.stderr


async def test_sigterm_lets_streams_end_and_keeps_what_came(
    start_collector: Callable[..., Any], make_result: MakeResult, make_hello: MakeHello
) -> None:
    collector = start_collector()
    async with grpc.aio.insecure_channel(collector.grpc_address) as channel:
        call = collector_pb2_grpc.CollectorServiceStub(channel).Report()
        await call.write(collector_pb2.ReportRequest(hello=make_hello()))
        await call.read()
        heartbeat = collector_pb2.Heartbeat(spool_pending=7)
        await call.write(collector_pb2.ReportRequest(heartbeat=heartbeat))
        spooled = collector_pb2.SpooledResult(spool_id="spool-1", sequence=1, result=make_result())
        await call.write(collector_pb2.ReportRequest(result=spooled))
        assert (await call.read()).acknowledgement.sequence == 1
        stopped = asyncio.ensure_future(asyncio.to_thread(collector.stop))
        assert await asyncio.wait_for(call.code(), 30) is grpc.StatusCode.UNAVAILABLE
        assert "stopping" in await call.details()
        assert await stopped == 0
    collector = start_collector()
    (device,) = json.loads(collector.get("/api/v1/devices"))["devices"]
    assert not device.get("up")
    assert device["heartbeat"] == {"spool_pending": 7}, "the last heartbeat outlives the collector"
    assert device["results"] == "1"
    assert collector.stop() == 0
