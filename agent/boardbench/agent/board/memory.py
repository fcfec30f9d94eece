"""Memory of the board and of the worker, to be sampled beside the board's sensors.

``/proc/meminfo`` (``MemAvailable``: what can be had without swapping) and ``VmRSS`` and ``VmSwap`` of
``/proc/PID/status``, all in kB. Source: proc_meminfo(5), proc_pid_status(5).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.accounts import swap_used
from boardbench.agent.board.identify import memory_bytes
from boardbench.agent.board.sensor import Reading
from boardbench.agent.board.timeline import Timeline

BOARD, WORKER = "board", "worker"
AVAILABLE, SWAP_USED = "memory_available_bytes", "swap_used_bytes"
RESIDENT, SWAPPED = "resident_bytes", "swapped_bytes"

_LINE = re.compile(rb"^Vm(RSS|Swap):\s*(\d{1,15}) kB$", re.MULTILINE)
_QUANTITIES = {b"RSS": RESIDENT, b"Swap": SWAPPED}

_MIB = 1024 * 1024
# Less than this share of what was available is no fall.
_FALL = 0.1
# Share of the way down that is behind when it is said to have begun: memory is never quite still before.
_BEGUN = 0.05


@dataclass(frozen=True)
class BoardMemory:
    """What the board has left."""

    root: Path
    name: str = "memory"

    def read(self) -> Iterable[Reading]:
        """Available memory, and swap in use."""
        memory = memory_bytes(self.root)
        if "MemAvailable" in memory:
            yield Reading(AVAILABLE, BOARD, float(memory["MemAvailable"]))
        used = swap_used(memory)
        if used is not None:
            yield Reading(SWAP_USED, BOARD, float(used))


class WorkerMemory:
    """What the worker holds, from when it is there to when it is gone."""

    name = "worker memory"

    def __init__(self, root: Path) -> None:
        self._root = root
        self.pid: int | None = None

    def read(self) -> Iterable[Reading]:
        """Resident and swapped-out memory."""
        if self.pid is None:
            return
        try:
            content = sysfs.content(self._root / f"proc/{self.pid}/status")
        except (FileNotFoundError, ProcessLookupError):
            return
        for kind, kilobytes in _LINE.findall(content):
            yield Reading(_QUANTITIES[kind], WORKER, int(kilobytes) * 1024.0)


def last_words(timeline: Timeline) -> str:
    """How memory went in the end, as a sentence; empty when it was not sampled."""
    points = timeline.within(AVAILABLE, BOARD, 0.0, float("inf"))
    if not points:
        return ""
    held = timeline.within(RESIDENT, WORKER, 0.0, float("inf"))
    worker = f"; the worker held {max(point.greatest for point in held) / _MIB:.0f} MiB" if held else ""
    low = min(points, key=lambda point: point.least)
    before = [point for point in points if point.seconds <= low.seconds]
    high = max(point.greatest for point in before)
    if high - low.least < _FALL * high:
        return f"{low.least / _MIB:.0f} MiB were available at all times{worker}"
    # The latest moment at which it was still nearly as much.
    enough = high - _BEGUN * (high - low.least)
    begin = max(point.seconds for point in before if point.greatest >= enough)
    return (
        f"available fell from {high / _MIB:.0f} to {low.least / _MIB:.0f} MiB in {low.seconds - begin:.1f} s"
        f"{worker}"
    )
