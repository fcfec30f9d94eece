"""How a collector bears a growing fleet: 10, 100, 1,000 and 10,000 boards, simulated with the agent's client.

Each board is the agent's link to its collector over a connection of its own, with a spool in memory instead
of one on a card, and no engine: it beats every five seconds and reports a result every thirty. What a board
costs must not grow with their number. Then the collector is killed with all of them connected, and started
again: how long until all are back, how many came in one second, and whether every result is there once.
"""

from __future__ import annotations

import argparse
import asyncio
import bisect
import contextlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import programs
from report import Check, Report, note, run

BEAT_SECONDS = 5.0
RESULT_SECONDS = 30.0
# More in one process, and its own event loop would be what is measured.
BOARDS_A_PROCESS = 2500
SETTLE_SECONDS = 5.0
CONNECT_SECONDS = 300.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("fleet")
    group.add_argument(
        "--boards", type=int, nargs="+", default=[10, 100, 1000, 10_000], help="sizes of the fleet"
    )
    group.add_argument("--fleet-seconds", type=float, default=30.0, help="measured at each (default 30)")


def measure(arguments: argparse.Namespace) -> Report:
    most = max(arguments.boards)
    _allow_files(most + 2000)
    rows: list[list[object]] = []
    checks: list[Check] = []
    costs: dict[int, float] = {}
    with programs.folder() as root:
        for boards in arguments.boards:
            note(f"fleet: {boards} boards")
            (root / str(boards)).mkdir()
            found = _one_size(root / str(boards), boards, arguments.fleet_seconds)
            costs[boards] = found["cpu_us"]
            rows.append(
                [
                    boards,
                    found["connect_seconds"],
                    found["cpu_percent"],
                    found["cpu_us"],
                    found["memory_kib"],
                    found["ack_p50_ms"],
                    found["ack_p99_ms"],
                    found["back_seconds"],
                    found["drained_seconds"],
                    found["most_a_second"],
                    f"{found['stored']} of {found['sent']}",
                ]
            )
            checks.append(
                Check(
                    f"{boards} boards: results lost or stored twice", found["stored"] - found["sent"], 0, ""
                )
            )
    few = min((boards for boards in costs if boards >= 100), default=min(costs))
    checks += [
        Check(
            f"cost of a board among {most}, against one among {few}, more",
            (costs[most] / costs[few] - 1) * 100,
            20,
            "%",
        ),
        Check(f"memory of a connection, {most} boards", float(str(rows[-1][4])), 60, "KiB"),
    ]
    return Report(
        "a growing fleet",
        f"each board beats every {BEAT_SECONDS:g} s and reports a result every {RESULT_SECONDS:g} s; CPU of "
        "the collector without what it takes with no board; memory: resident, by connection; ack: from a "
        "result's end to the acknowledgement; then kill -9 and a new start: until all are back, until all "
        "results are acknowledged, most that came back within one second",
        (
            *("boards", "connect s", "CPU %", "CPU µs/board·s", "KiB each", "ack p50 ms", "ack p99 ms"),
            *("back s", "drained s", "most in 1 s", "stored"),
        ),
        rows,
        checks,
        {},
    )


def _one_size(root: Path, boards: int, seconds: float) -> dict[str, Any]:
    collector = _Collector(root)
    children: list[_Child] = []
    try:
        idle = _share(collector.pid, SETTLE_SECONDS)
        empty = _resident(collector.pid)
        began = time.monotonic()
        for first in range(0, boards, BOARDS_A_PROCESS):
            count = min(BOARDS_A_PROCESS, boards - first)
            children.append(_Child(collector.address, first, count))
        _until(children, lambda told: told["connected"], boards, CONNECT_SECONDS)
        connect_seconds = time.monotonic() - began
        # All of them have beaten once.
        time.sleep(BEAT_SECONDS + SETTLE_SECONDS)
        for child in children:
            child.ask("forget")
        share = _share(collector.pid, seconds)
        latencies = sorted(each for child in children for each in child.ask("latencies")["milliseconds"])
        memory = (_resident(collector.pid) - empty) / boards
        collector.kill()
        died = time.monotonic()
        time.sleep(2.0)
        collector.start()
        _until(children, lambda told: told["connected"], boards, CONNECT_SECONDS)
        back = time.monotonic() - died
        for child in children:
            child.ask("stop results")
        _until(children, lambda told: told["drained"], boards, CONNECT_SECONDS)
        drained = time.monotonic() - died
        ended = [child.ask("report") for child in children]
        moments = [moment for told in ended for moment in told["connected_at"] if moment > died]
        return {
            "connect_seconds": connect_seconds,
            "cpu_percent": 100 * share,
            "cpu_us": 1e6 * (share - idle) / boards,
            "memory_kib": memory / 1024,
            "ack_p50_ms": _percentile(latencies, 50),
            "ack_p99_ms": _percentile(latencies, 99),
            "back_seconds": back,
            "drained_seconds": drained,
            "most_a_second": _most_within(moments, 1.0),
            "sent": sum(told["sent"] for told in ended),
            "stored": collector.stored(),
        }
    finally:
        for child in children:
            child.close()
        collector.close()


def _percentile(ordered: list[float], percent: float) -> float | str:
    if len(ordered) * (100 - percent) / 100 < 3:
        return ""
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _most_within(moments: list[float], seconds: float) -> int:
    ordered = sorted(moments)
    return max((bisect.bisect(ordered, each + seconds) - at for at, each in enumerate(ordered)), default=0)


def _until(
    children: list[_Child], which: Callable[[dict[str, Any]], int], wanted: int, seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while (found := sum(which(child.ask("status")) for child in children)) < wanted:
        if time.monotonic() > deadline:
            raise SystemExit(f"fleet: after {seconds:g} s {found} of {wanted} boards are there")
        time.sleep(0.2)


def _share(pid: int, seconds: float) -> float:
    """Share of one processor that the process takes for so long."""
    before, began = _cpu_seconds(pid), time.monotonic()
    time.sleep(seconds)
    return (_cpu_seconds(pid) - before) / (time.monotonic() - began)


def _cpu_seconds(pid: int) -> float:
    # To the nanosecond; what stat tells comes in ticks of 10 ms.
    total = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _resident(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"process {pid} tells no memory")


def _allow_files(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise SystemExit(
            f"{count} connections need as many open files; this shell may have {hard} (ulimit -Hn)"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, count), hard))


class _Collector:
    """A collector that can be killed, and started again where it was."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._listen = ("127.0.0.1:0", "127.0.0.1:0")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        ports = self._root / "ports"
        ports.unlink(missing_ok=True)
        command = [
            *(*programs.program("boardbench-collector"), "serve", "--data-dir", str(self._root / "data")),
            *("--listen", self._listen[0], "--http", self._listen[1], "--port-file", str(ports)),
            *("--heartbeat", str(BEAT_SECONDS / 0.8)),
        ]
        with (self._root / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        deadline = time.monotonic() + 60
        while not ports.exists():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the collector did not start:\n{(self._root / 'log').read_text()}")
            time.sleep(0.02)
        found = json.loads(ports.read_text())
        self.address = f"127.0.0.1:{found['grpc']}"
        self._web = f"http://127.0.0.1:{found['http']}"
        self._listen = (self.address, f"127.0.0.1:{found['http']}")

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def stored(self) -> int:
        """Results that it has, of all boards."""
        with urllib.request.urlopen(f"{self._web}/api/v1/devices", timeout=120) as answer:
            devices = json.load(answer)["devices"]
        return sum(int(device.get("results", 0)) for device in devices)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


class _Child:
    """A process with some of the boards."""

    def __init__(self, address: str, first: int, count: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__, "--child", address, str(first), str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, what: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(what + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise SystemExit("fleet: a process with boards has ended")
        return dict(json.loads(answer))

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


# In the child


class MemorySpool:
    """A spool without a disk: what the agent's link asks of one, and when each result was acknowledged."""

    def __init__(self, name: str) -> None:
        self.spool_id = f"spool-{name}"
        self.sent = 0
        self.latencies: list[float] = []
        self._waiting: dict[int, tuple[bytes, str, float]] = {}
        self._wake: Callable[[], None] = lambda: None

    def append(self, run_id: str, payload: bytes) -> None:
        self.sent += 1
        self._waiting[self.sent] = payload, run_id, time.monotonic()
        self._wake()

    # As boardbench.agent.spool.Spool.

    def subscribe(self, listener: Callable[[], None]) -> Callable[[], None]:
        self._wake = listener
        return lambda: None

    def status(self) -> Any:
        from boardbench.agent.spool import SpoolStatus

        return SpoolStatus(self.spool_id, len(self._waiting), 0, 0, 0, "")

    def outgoing_id(self) -> str:
        return self.spool_id

    def next_after(self, sequence: int, spool_id: str) -> Any:
        from boardbench.agent.spool import Record

        for place, (payload, run_id, _) in self._waiting.items():
            if place > sequence:
                return Record(spool_id, place, run_id, payload)
        return None

    def reconcile(self, spool_id: str, acknowledged: int) -> None:
        self.acknowledge(spool_id, acknowledged)

    def acknowledge(self, _spool_id: str, sequence: int) -> None:
        now = time.monotonic()
        for place in [place for place in self._waiting if place <= sequence]:
            self.latencies.append((now - self._waiting.pop(place)[2]) * 1e3)

    def reject(self, _spool_id: str, sequence: int, reason: str) -> None:
        raise SystemExit(f"the collector refused result {sequence}: {reason}")

    def settle(self) -> None:
        """Nothing was put off."""


class _Board:
    def __init__(self, number: int, address: str) -> None:
        from boardbench.agent.stream import CollectorLink
        from boardbench.v1 import board_pb2, collector_pb2

        self.name = f"board-{number:05d}"
        self.spool = MemorySpool(self.name)
        self.connected_at: list[float] = []
        self.reports = True
        board = board_pb2.Board(
            device_id=self.name, hostname=self.name, model="simulated", architecture="aarch64", cpu_count=4
        )

        def hello() -> collector_pb2.Hello:
            return collector_pb2.Hello(board=board, agent_version="simulated", instance_id=self.name)

        self.link = CollectorLink(
            address,
            self.spool,  # type: ignore[arg-type]  # all that the link asks of it
            hello=hello,
            heartbeat=collector_pb2.Heartbeat,
        )

    async def watch(self) -> None:
        """Notes when it comes to be connected."""
        was = False
        while True:
            is_ = self.link.status().connected
            if is_ and not was:
                self.connected_at.append(time.monotonic())
            was = is_
            await asyncio.sleep(0.25)

    async def report(self, order: random.Random) -> None:
        """Reports a result every so often, each at its own time."""
        await asyncio.sleep(order.random() * RESULT_SECONDS)
        while self.reports:
            self.spool.append(run_id := f"{self.name}-{self.spool.sent + 1}", _result(self.name, run_id))
            await asyncio.sleep(RESULT_SECONDS)


def _result(device_id: str, run_id: str) -> bytes:
    from boardbench.v1 import board_pb2, latency_pb2, model_pb2, result_pb2

    now = time.time_ns()
    result = result_pb2.RunResult(
        run_id=run_id,
        status=result_pb2.RUN_STATUS_SUCCEEDED,
        model=model_pb2.Model(sha256="0" * 64, name="simulated.tflite", format="tflite", size_bytes=1),
        runtime=result_pb2.Runtime(name="tflite", device="cpu"),
        board=board_pb2.Board(device_id=device_id),
        latency=latency_pb2.Latency(
            count=100,
            mean_seconds=0.01,
            percentiles=[
                latency_pb2.Percentile(percentile=each, seconds=0.01, low_seconds=0.009, high_seconds=0.011)
                for each in (50, 90, 95)
            ],
        ),
    )
    result.finished_at.FromNanoseconds(now)
    return result.SerializeToString()


async def _be_boards(address: str, first: int, count: int) -> None:
    boards = [_Board(first + number, address) for number in range(count)]
    order = random.Random(first)
    tasks = []
    for board in boards:
        tasks += [asyncio.create_task(board.link.run()), asyncio.create_task(board.watch())]
        tasks.append(asyncio.create_task(board.report(order)))
        # A fleet is not switched on in one moment either.
        if len(tasks) % 150 == 0:
            await asyncio.sleep(0.05)
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        line = sys.stdin.readline()
        if not line:
            os._exit(0)
        lines.put_nowait(line.strip())

    loop.add_reader(sys.stdin.fileno(), read)
    while True:
        answer = _answered(await lines.get(), boards)
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def _answered(what: str, boards: list[_Board]) -> dict[str, Any]:
    if what == "status":
        return {
            "connected": sum(board.link.status().connected for board in boards),
            "drained": sum(not board.spool.status().pending for board in boards),
        }
    if what == "forget":
        for board in boards:
            board.spool.latencies.clear()
        return {}
    if what == "latencies":
        return {"milliseconds": [each for board in boards for each in board.spool.latencies]}
    if what == "stop results":
        for board in boards:
            board.reports = False
        return {}
    return {
        "sent": sum(board.spool.sent for board in boards),
        "connected_at": [moment for board in boards for moment in board.connected_at],
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        # That a collector which was killed does not answer is what is wanted.
        logging.disable()
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        asyncio.run(_be_boards(sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
    sys.exit(run([(measure, add_arguments)], __doc__, section="fleet"))
