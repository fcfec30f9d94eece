"""The wait for a board that was flashed, at a collector that the tests speak for."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path
from types import ModuleType
from typing import Any

import grpc
import pytest
from click.testing import CliRunner

from boardbench.cli.address import Address
from boardbench.cli.arrival import Arrival
from boardbench.cli.errors import CliError, ExitCode, Unreachable
from boardbench.cli.flash import flash
from boardbench.v1 import collector_pb2, collector_pb2_grpc


class Collector(collector_pb2_grpc.CollectorServiceServicer):
    """Knows the boards that it was told of; ``then`` are those that come once it was asked."""

    def __init__(self) -> None:
        self.devices: list[collector_pb2.Device] = []
        self.then: list[list[collector_pb2.Device]] = []
        self.away = 0
        """So many times it does not answer, once it was asked."""
        self.asked = threading.Event()

    def ListDevices(self, request: Any, context: Any) -> collector_pb2.ListDevicesResponse:
        if self.asked.is_set() and self.away:
            self.away -= 1
            context.abort(grpc.StatusCode.UNAVAILABLE, "it is started anew")
        answer = collector_pb2.ListDevicesResponse(devices=self.devices)
        if self.then:
            self.devices = self.then.pop(0)
        self.asked.set()
        return answer


def board(name: str, *, up: bool = True, seen: int = 1) -> collector_pb2.Device:
    device = collector_pb2.Device(up=up)
    device.board.device_id, device.board.hostname = f"id-{name}", name
    device.board.model, device.board.os = "Raspberry Pi 5", "Debian 13"
    device.last_seen_at.seconds = seen
    return device


@pytest.fixture
def collector() -> Iterator[tuple[Collector, Address]]:
    server = grpc.server(futures.ThreadPoolExecutor(2))
    speaks = Collector()
    collector_pb2_grpc.add_CollectorServiceServicer_to_server(speaks, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield speaks, Address("127.0.0.1", port)
    server.stop(None).wait()


def arrival(address: Address, seconds: float = 30) -> Arrival:
    return Arrival(address, seconds=seconds, look_seconds=0.01)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], [board("new")]),
        ([board("other")], [board("other"), board("new")]),
        # It was there once, with its former card.
        ([board("new", up=False)], [board("new")]),
    ],
)
def test_the_board_that_comes_is_the_one(
    collector: tuple[Collector, Address],
    before: list[collector_pb2.Device],
    after: list[collector_pb2.Device],
    capsys: pytest.CaptureFixture[str],
) -> None:
    speaks, address = collector
    speaks.devices = before
    waits = arrival(address)
    # It is not there at once.
    speaks.then = [before, after]
    assert waits.wait() is ExitCode.DONE
    said = capsys.readouterr()
    assert said.out == "id-new reports: Raspberry Pi 5, Debian 13\n"
    assert f"waiting for the board to report to {address}" in said.err


@pytest.mark.parametrize(
    ("before", "after", "hostname"),
    [
        ([board("other", seen=1)], [board("other", seen=2)], ""),
        ([], [board("new", up=False)], ""),
        ([], [board("other")], "pi-01"),
    ],
)
def test_another_board_is_not(
    collector: tuple[Collector, Address],
    before: list[collector_pb2.Device],
    after: list[collector_pb2.Device],
    hostname: str,
) -> None:
    speaks, address = collector
    speaks.devices = before
    waits = arrival(address, 0.3)
    speaks.devices = after
    with pytest.raises(
        CliError, match=r"(?s)no board has reported .*power.*install\.log.*token was not used"
    ):
        waits.wait(hostname)


def test_a_board_that_is_up_all_the_time_counts_when_it_is_heard_of_again(
    collector: tuple[Collector, Address],
) -> None:
    """Over SSH: the agent is started anew, and a collector may never have missed it."""
    speaks, address = collector
    speaks.devices = [board("jetson", seen=1), board("other", seen=1)]
    waits = arrival(address, 0.3)
    speaks.devices = [board("jetson", seen=1), board("other", seen=2)]
    with pytest.raises(CliError, match="no board has reported"):
        waits.wait("jetson", known=True)
    speaks.devices = [board("jetson", seen=2)]
    assert waits.wait("jetson", known=True) is ExitCode.DONE


def test_a_collector_that_is_started_anew_meanwhile_ends_no_wait(
    collector: tuple[Collector, Address], capsys: pytest.CaptureFixture[str]
) -> None:
    speaks, address = collector
    waits, waits_briefly = arrival(address), arrival(address, 0.3)
    speaks.devices, speaks.away = [board("new")], 3
    assert waits.wait() is ExitCode.DONE
    said = capsys.readouterr()
    assert said.out.startswith("id-new reports")
    assert said.err.count("still waiting") == 1
    speaks.away = 1_000_000
    with pytest.raises(Unreachable, match="it is started anew"):
        waits_briefly.wait()


def test_who_asks_for_the_wait_is_told_before_anything_is_written(
    tmp_path: Path, release_packages: ModuleType, collector: tuple[Collector, Address]
) -> None:
    card = tmp_path / "bootfs"
    card.mkdir()
    (card / "cmdline.txt").write_bytes(b"root=/dev/x\n")
    (card / "config.txt").touch()
    package = release_packages.build(tmp_path, "0.1.0", {})

    def run(address: object, *more: str) -> Any:
        given = [
            "pi",
            "--boot",
            card,
            "--os",
            "bookworm",
            "--package",
            package,
            "--collector",
            address,
            *more,
        ]
        return CliRunner().invoke(flash, [str(word) for word in given])

    answer = run("127.0.0.1:1", "--wait")
    assert isinstance(answer.exception, Unreachable)
    assert not (card / "boardbench").exists()
    # Nobody looks on: nothing is asked of the collector.
    assert run(collector[1]).exit_code == 0
    assert not collector[0].asked.is_set()
    collector[0].then = [[board("pi-01")]]
    answer = run(collector[1], "--hostname", "pi-01", "--wait")
    assert answer.exit_code == 0, answer.output
    assert "id-pi-01 reports" in answer.output
