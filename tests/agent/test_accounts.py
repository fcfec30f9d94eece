"""The kernel's accounts are read at a moment; what it does not tell stays untold."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from boardbench.agent.board.accounts import Moment, ProcessorTime, moment, swap_used
from boardbench.agent.board.memory import BoardMemory, WorkerMemory
from boardbench.agent.board.sensor import Reading

TICKS = os.sysconf("SC_CLK_TCK")
PAGE = os.sysconf("SC_PAGE_SIZE")


def write(root: Path, name: str, text: str) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_everything_that_is_told(tmp_path: Path) -> None:
    write(tmp_path, "proc/stat", "cpu  100 10 20 5000 30 1 2 40 7 7\ncpu0 0 0\nbtime 1\n")
    for pid, used in (7, 300), (8, 500):
        write(tmp_path, f"proc/{pid}/stat", f"{pid} (a) b) S 1 7 7 0 -1 0 0 0 0 0 {used} 5 0 0\n")
    write(
        tmp_path, "proc/pressure/cpu", "some avg10=1.00 avg60=1.00 avg300=1.00 total=2500000\nfull total=9\n"
    )
    write(tmp_path, "proc/pressure/memory", "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    write(tmp_path, "proc/vmstat", "pgpgin 1\npswpin 3\npswpout 9\n")
    found = moment(tmp_path, [7, 8], lambda: 12.0)
    assert found == Moment(
        seconds=12.0,
        processors=ProcessorTime(busy=pytest.approx(133 / TICKS), stolen=pytest.approx(40 / TICKS)),
        processes_seconds=pytest.approx(810 / TICKS),
        waited_seconds={"cpu": 2.5, "memory": 0.0},
        swapped_in_bytes=3 * PAGE,
    )


def test_system_that_tells_nothing(tmp_path: Path) -> None:
    assert moment(tmp_path, [7], lambda: 1.0) == Moment(1.0, None, None)
    assert moment(tmp_path, [], lambda: 1.0).processes_seconds == 0.0, "nobody was asked about"


@pytest.mark.parametrize("text", ["", "cpu  1 2\n", "cpu  a b c d e f g h\n"])
def test_what_is_no_account_is_none(tmp_path: Path, text: str) -> None:
    write(tmp_path, "proc/stat", text)
    write(tmp_path, "proc/7/stat", text)
    write(tmp_path, "proc/pressure/cpu", text)
    write(tmp_path, "proc/vmstat", text)
    assert moment(tmp_path, [7], lambda: 1.0) == Moment(1.0, None, None)


def test_this_machine_tells_its_own() -> None:
    found = moment(Path("/"), [os.getpid()])
    assert found.processors is not None and found.processors.busy > 0
    assert found.processes_seconds is not None and found.processes_seconds > 0


@pytest.mark.parametrize(
    ("memory", "used"),
    [
        ({"SwapTotal": 100, "SwapFree": 30}, 70),
        ({"SwapTotal": 0, "SwapFree": 0}, 0),
        ({"SwapTotal": 10, "SwapFree": 30}, 0),
        ({"SwapTotal": 10}, None),
    ],
)
def test_swap_in_use(memory: dict[str, int], used: int | None) -> None:
    assert swap_used(memory) == used


def test_memory_is_sampled(tmp_path: Path) -> None:
    write(tmp_path, "proc/meminfo", "MemTotal: 9 kB\nMemAvailable: 5 kB\nSwapTotal: 4 kB\nSwapFree: 1 kB\n")
    assert list(BoardMemory(tmp_path).read()) == [
        Reading("memory_available_bytes", "board", 5 * 1024.0),
        Reading("swap_used_bytes", "board", 3 * 1024.0),
    ]
    assert list(BoardMemory(tmp_path / "nowhere").read()) == []
    worker = WorkerMemory(tmp_path)
    assert list(worker.read()) == [], "it is not there yet"
    worker.pid = 7
    assert list(worker.read()) == [], "it is gone"
    write(tmp_path, "proc/7/status", "Name:\tVmRSS: 1 kB\nVmPeak:\t 99 kB\nVmRSS:\t 12 kB\nVmSwap:\t 3 kB\n")
    assert list(worker.read()) == [
        Reading("resident_bytes", "worker", 12 * 1024.0),
        Reading("swapped_bytes", "worker", 3 * 1024.0),
    ]
