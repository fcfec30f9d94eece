"""What the board does while nothing is asked of it: who takes its processors, for a moment.

Sources: proc_stat(5), proc_pid_stat(5), proc_pid_cgroup(5); systemd's units are control groups of their names
(systemd.io/CGROUP_DELEGATION).
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.accounts import Moment, moment
from boardbench.agent.board.check import Program, Work

# The kernel counts in hundredths of a second: a share of one in a hundred can be told.
WATCH_SECONDS = 1.0

_TICKS = os.sysconf("SC_CLK_TCK")
# Those that are worth a name, and how many of them.
_LEAST_PROCESSORS = 0.05
_MOST_PROGRAMS = 3


@dataclass(frozen=True)
class _Count:
    """One process at one moment."""

    name: str
    seconds: float
    # When it began, in ticks since boot: a number that is given anew is another process.
    began: str


def watch(
    root: Path,
    seconds: float = WATCH_SECONDS,
    pause: Callable[[float], None] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> Work | None:
    """What other programs did for so long; None where the kernel does not tell. Blocks."""
    own = os.getpid()
    before, processes = moment(root, [own], clock), _processes(root)
    pause(seconds)
    after = moment(root, [own], clock)
    return _work(root, before, after, processes, own)


def _work(root: Path, before: Moment, after: Moment, processes: dict[int, _Count], own: int) -> Work | None:
    passed = after.seconds - before.seconds
    if before.processors is None or after.processors is None or passed <= 0:
        return None
    busy = after.processors.busy - before.processors.busy
    if before.processes_seconds is not None and after.processes_seconds is not None:
        busy -= after.processes_seconds - before.processes_seconds
    stolen = after.processors.stolen - before.processors.stolen
    swapped = None
    if before.swapped_in_bytes is not None and after.swapped_in_bytes is not None:
        swapped = after.swapped_in_bytes - before.swapped_in_bytes
    return Work(
        seconds=passed,
        busy_processors=max(0.0, busy / passed),
        stolen_share=max(0.0, stolen / passed / _processors(root)),
        swapped_in_bytes=swapped,
        programs=_programs(root, processes, passed, own),
    )


def _processors(root: Path) -> int:
    try:
        lines = sysfs.table(root / "proc/stat").splitlines()
    except OSError:
        return 1
    return max(1, sum(line.startswith("cpu") and line[3:4].isdecimal() for line in lines))


def _programs(root: Path, before: dict[int, _Count], passed: float, own: int) -> tuple[Program, ...]:
    found: list[Program] = []
    for pid, count in _processes(root).items():
        former = before.get(pid)
        start = former.seconds if former is not None and former.began == count.began else 0.0
        processors = (count.seconds - start) / passed
        if pid != own and processors >= _LEAST_PROCESSORS:
            found.append(Program(count.name, pid, processors, _unit(root, pid)))
    found.sort(key=lambda program: program.processors, reverse=True)
    return tuple(found[:_MOST_PROGRAMS])


def _processes(root: Path) -> dict[int, _Count]:
    found: dict[int, _Count] = {}
    for folder in sysfs.listed(root / "proc"):
        if folder.name.isdecimal():
            try:
                head, _, tail = sysfs.content(folder / "stat").decode("utf-8", "replace").rpartition(")")
                fields = tail.split()
                # utime, stime and starttime are the 14th, 15th and 22nd field.
                seconds = (int(fields[11]) + int(fields[12])) / _TICKS
                found[int(folder.name)] = _Count(_printable(head.partition("(")[2]), seconds, fields[19])
            except (OSError, ValueError, IndexError):
                # It has ended in the meantime.
                continue
    return found


def _printable(name: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in name)


def _unit(root: Path, pid: int) -> str:
    """The system's unit that the process belongs to; empty for a person's own."""
    try:
        lines = sysfs.table(root / f"proc/{pid}/cgroup").splitlines()
    except OSError:
        return ""
    for line in lines:
        names = line.rpartition(":")[2].split("/")
        # A service of a service manager of a person's own is below that person's slice.
        if len(names) > 2 and names[1] == "system.slice":
            return next((name for name in names[2:] if name.endswith(".service")), "")
    return ""
