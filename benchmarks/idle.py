"""What an agent costs a board while nothing runs: connected to a collector, one heartbeat a second."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import statistics
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import programs
from report import Check, Report, note, run

_MIB = 1 << 20
# The probe of the engines is over by then, and the allocator has given back what it took.
_SETTLE_SECONDS = 15.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("idle")
    group.add_argument("--idle-seconds", type=float, default=60.0, help="how long to watch (default 60)")


def measure(arguments: argparse.Namespace) -> Report:
    rows: list[list[object]] = []
    with programs.folder() as root, contextlib.ExitStack() as stack:
        # Once in vain, so that its bytecode is cached as after an installation.
        with programs.agent(root):
            pass
        collector_pid, ports = stack.enter_context(programs.collector(root, "--heartbeat", "1"))
        agent_pid, _ = stack.enter_context(
            programs.agent(root, "--collector", f"127.0.0.1:{ports['grpc']}", "--device-id", "idle-board")
        )
        exporter = stack.enter_context(node_exporter(root))
        wait_until_connected(ports["http"])
        note(f"idle: settling for {_SETTLE_SECONDS:.0f} s, then watching for {arguments.idle_seconds:.0f} s")
        time.sleep(_SETTLE_SECONDS)
        watched = {"boardbench agent": agent_pid, "boardbench collector (not on the board)": collector_pid}
        if exporter:
            watched["node_exporter, a scrape a second"] = exporter[0]
        found = watch(watched, arguments.idle_seconds, exporter[1] if exporter else None)
        assert_connected(ports["http"])
    for name, figures in found.items():
        rows.append([name, figures["pss"], figures["rss"], figures["cpu"]])
    ours = found["boardbench agent"]
    return Report(
        "idle agent",
        f"{arguments.idle_seconds:.0f} s, connected, a heartbeat a second; memory: median; CPU: of "
        "one processor"
        + ("" if exporter else "; node_exporter is not installed, so nothing stands beside it"),
        ("", "PSS MiB", "RSS MiB", "CPU %"),
        rows,
        [
            Check("PSS of the agent", ours["pss"], 24, "MiB"),
            Check("RSS of the agent", ours["rss"], 40, "MiB"),
            Check("CPU of the agent", ours["cpu"], 0.5, "%"),
        ],
        {"processes": found},
    )


def watch(pids: dict[str, int], seconds: float, scrape_port: int | None) -> dict[str, dict[str, float]]:
    """Memory and CPU of the processes over this time; the exporter is asked as often as the agent speaks."""
    samples: dict[str, list[dict[str, int]]] = {name: [] for name in pids}
    before = {name: programs.cpu_seconds(pid) for name, pid in pids.items()}
    begin = time.monotonic()
    number = 0
    while (elapsed := time.monotonic() - begin) < seconds:
        # Reading smaps_rollup stops the process that is read for a moment: every tenth second is enough.
        if number % 10 == 0:
            for name, pid in pids.items():
                samples[name].append(programs.memory_bytes(pid))
        if scrape_port:
            urllib.request.urlopen(f"http://127.0.0.1:{scrape_port}/metrics", timeout=5).read()
        number += 1
        time.sleep(max(0.0, number - (time.monotonic() - begin)))
    return {
        name: {
            "pss": statistics.median(each["pss"] for each in samples[name]) / _MIB,
            "rss": statistics.median(each["rss"] for each in samples[name]) / _MIB,
            "cpu": (programs.cpu_seconds(pid) - before[name]) / elapsed * 100,
        }
        for name, pid in pids.items()
    }


@contextlib.contextmanager
def node_exporter(root: Path) -> Iterator[tuple[int, int] | None]:
    """Process id and port of a node_exporter; None where it is not installed."""
    path = shutil.which("prometheus-node-exporter") or shutil.which("node_exporter")
    if path is None:
        yield None
        return
    import socket

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(listener.getsockname()[1])
    with programs.running([path, f"--web.listen-address=127.0.0.1:{port}"], root / "exporter.log") as process:
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read()
                yield process.pid, port
                return
            time.sleep(0.05)
        raise SystemExit(f"node_exporter did not start:\n{(root / 'exporter.log').read_text()}")


def wait_until_connected(http_port: int) -> None:
    """Returns when the collector says that the board is up."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if _up(http_port):
            return
        time.sleep(0.1)
    raise SystemExit("the agent did not connect to the collector within 30 s")


def assert_connected(http_port: int) -> None:
    """Fails when the board was lost meanwhile: an agent that isn't connected idles more cheaply."""
    if not _up(http_port):
        raise SystemExit("the agent lost its collector while it was watched")


def _up(http_port: int) -> bool:
    text = urllib.request.urlopen(f"http://127.0.0.1:{http_port}/metrics", timeout=5).read().decode()
    return any(
        line.startswith("boardbench_device_up{")
        and 'device="idle-board"' in line
        and float(line.rsplit(" ", 1)[1]) == 1
        for line in text.splitlines()
    )


if __name__ == "__main__":
    sys.exit(run([(measure, add_arguments)], __doc__, section="idle"))
