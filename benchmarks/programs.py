"""A collector and an agent as processes on free loopback ports, and what the kernel says of them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_START_SECONDS = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")


def program(name: str) -> list[str]:
    """The command that the installation of boardbench made."""
    path = Path(sysconfig.get_path("scripts")) / name
    if not path.exists():
        raise SystemExit(f"{path} is not there: run `make bench`, or pip install -e '.[demo]'")
    return [sys.executable, str(path)]


@contextlib.contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder, on the disk and not in memory where that can be had."""
    with tempfile.TemporaryDirectory(prefix="boardbench-") as path:
        yield Path(path)


@contextlib.contextmanager
def running(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that is ended with the context; its output goes to ``log``."""
    # Installed programs find their bytecode cached; compiling at every start would cost time and memory.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
        )
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextlib.contextmanager
def collector(root: Path, *options: str) -> Iterator[tuple[int, dict[str, int]]]:
    """Process id and ports ("grpc", "http") of a collector that is ready."""
    command = [
        *program("boardbench-collector"), "serve", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0",
        "--data-dir", str(root / "collector"), "--port-file", str(root / "collector.ports"), *options,
    ]  # fmt: skip
    with running(command, root / "collector.log") as process:
        yield process.pid, _ports(process, root / "collector.ports", root / "collector.log")


@contextlib.contextmanager
def agent(root: Path, *options: str) -> Iterator[tuple[int, dict[str, int]]]:
    """Process id and ports ("grpc") of an agent that is ready."""
    command = [
        *program("boardbench-agent"), "serve", "--listen", "127.0.0.1:0",
        "--data-dir", str(root / "agent"), "--port-file", str(root / "agent.ports"), *options,
    ]  # fmt: skip
    with running(command, root / "agent.log") as process:
        yield process.pid, _ports(process, root / "agent.ports", root / "agent.log")


def _ports(process: subprocess.Popen[bytes], port_file: Path, log: Path) -> dict[str, int]:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            break
        with contextlib.suppress(FileNotFoundError, json.JSONDecodeError):
            return dict(json.loads(port_file.read_text()))
        time.sleep(0.02)
    raise SystemExit(f"{log.stem} did not start:\n{log.read_text(errors='replace')}")


def memory_bytes(pid: int) -> dict[str, int]:
    """``rss`` and ``pss`` of a process now, in bytes."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    found = {line.split()[0].rstrip(":").lower(): int(line.split()[1]) * 1024 for line in lines[1:]}
    return {name: found[name] for name in ("rss", "pss")}


def reset_peak(pid: int) -> None:
    """Makes :func:`peak_rss_bytes` begin anew."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_rss_bytes(pid: int) -> int:
    """Highest resident set of a process since :func:`reset_peak`, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))


def cpu_seconds(pid: int) -> float:
    """CPU time of a process and its children that have ended, in seconds (steps of 10 ms)."""
    # The name in parentheses may hold anything; utime, stime, cutime and cstime are fields 14 to 17.
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(int(field) for field in fields[11:15]) / _TICKS
