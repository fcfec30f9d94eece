"""What the kernel counts for the whole board, read at one moment; two moments tell what happened in between.

Sources: proc_stat(5), proc_pid_stat(5), proc_meminfo(5), proc_vmstat(5), Documentation/accounting/psi.rst of
the Linux kernel (``/proc/pressure/*``: ``some`` is the time in which at least one task waited, ``total`` in
microseconds since boot).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from boardbench.agent.board import sysfs

RESOURCES = ("cpu", "io", "memory")
"""What tasks wait for, as the kernel names it."""

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class ProcessorTime:
    """Processor seconds since boot, over all processors."""

    busy: float
    # Taken away by the host of a virtual machine.
    stolen: float


@dataclass(frozen=True)
class Moment:
    """The accounts at one moment; what the system does not tell is None or left out."""

    seconds: float
    processors: ProcessorTime | None
    # Of the processes asked for, all their threads together; None when one of them can't be read.
    processes_seconds: float | None
    # Seconds since boot in which some task waited, by resource.
    waited_seconds: Mapping[str, float] = field(default_factory=dict)
    # Since boot.
    swapped_in_bytes: int | None = None


def moment(root: Path, pids: Iterable[int] = (), clock: Callable[[], float] = monotonic) -> Moment:
    """The accounts now."""
    processors, used = processor_time(root), _used(root, pids)
    waited = {}
    for resource in RESOURCES:
        seconds = _waited(root, resource)
        if seconds is not None:
            waited[resource] = seconds
    return Moment(clock(), processors, used, waited, _swapped_in(root))


def processor_time(root: Path) -> ProcessorTime | None:
    """Processor seconds since boot; None where the system does not tell."""
    try:
        fields = sysfs.table(root / "proc/stat").split("\n", 1)[0].split()
        user, nice, system, _, _, irq, softirq, steal = (int(ticks) / _TICKS for ticks in fields[1:9])
    except (OSError, ValueError):
        return None
    return ProcessorTime(user + nice + system + irq + softirq, steal)


def swap_used(memory: Mapping[str, int]) -> int | None:
    """Bytes of swap in use by /proc/meminfo; None where it does not tell."""
    if "SwapTotal" not in memory or "SwapFree" not in memory:
        return None
    return max(0, memory["SwapTotal"] - memory["SwapFree"])


def _used(root: Path, pids: Iterable[int]) -> float | None:
    total = 0.0
    for pid in pids:
        try:
            fields = sysfs.table(root / f"proc/{pid}/stat").rpartition(")")[2].split()
            # utime and stime are the 14th and 15th field; the name before them may hold spaces.
            total += (int(fields[11]) + int(fields[12])) / _TICKS
        except (OSError, ValueError, IndexError):
            return None
    return total


def _waited(root: Path, resource: str) -> float | None:
    try:
        text = sysfs.table(root / "proc/pressure" / resource)
    except OSError:
        # No such file before Linux 4.20; "not supported" where it was not switched on.
        return None
    for line in text.splitlines():
        kind, *entries = line.split()
        values = dict(entry.partition("=")[::2] for entry in entries)
        if kind == "some" and values.get("total", "").isdigit():
            return int(values["total"]) / 1e6
    return None


def _swapped_in(root: Path) -> int | None:
    try:
        lines = sysfs.table(root / "proc/vmstat").splitlines()
    except OSError:
        return None
    for line in lines:
        name, _, count = line.partition(" ")
        if name == "pswpin" and count.isdigit():
            return int(count) * _PAGE_BYTES
    return None
