"""Memory of this process, phase by phase.

Linux: `/proc/self/smaps_rollup` (Rss and Pss, exact, kB), `/proc/self/status` (VmRSS, VmHWM, VmSwap, kB);
writing 5 to `/proc/self/clear_refs` sets VmHWM back to what is resident now (man 5 proc). Not
`ru_maxrss`: a child starts with the peak of the parent it was forked from.
Elsewhere: the resident set by psutil where it is installed; the peak of the whole life by getrusage.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import List, Mapping, Optional, Tuple

from boardbench.agent.domain import Memory, MemoryPhase, PhaseMemory

_KIB = 1024


class MemoryMeter:
    """Reads the process's own memory at the end of each phase and sets the peak back for the next."""

    def __init__(self, process: Path = Path("/proc/self")) -> None:
        """Takes a look at ``process``, a folder like /proc/self; changes nothing yet."""
        self._process = process
        self._linux = (process / "status").is_file()
        # exec gave this process a fresh peak: that of the first phase is its own.
        self._peak_is_of_phase = self._linux
        self._phases: List[PhaseMemory] = []
        self._peak: Optional[int] = None
        self._swap: Optional[int] = None

    @property
    def resettable(self) -> bool:
        """False when the kernel has refused to set the peak back."""
        return self._peak_is_of_phase or not self._linux

    def end_phase(self, phase: MemoryPhase) -> PhaseMemory:
        """Memory at the end of ``phase``; the next phase begins here."""
        rss, pss, peak, swap = self._read()
        if peak is not None:
            # The kernel adds up per-thread counters late: the exact sum can be a little higher.
            peak = max(peak, rss or 0)
            self._peak = max(self._peak or 0, peak)
        if swap is not None:
            self._swap = max(self._swap or 0, swap)
        memory = PhaseMemory(
            phase=phase,
            rss_bytes=rss,
            pss_bytes=pss,
            peak_rss_bytes=peak if self._peak_is_of_phase else None,
        )
        self._phases.append(memory)
        if self._linux:
            self._peak_is_of_phase = self._reset_peak()
        return memory

    def memory(self, arena_bytes: Optional[int] = None) -> Memory:
        """All phases so far. What was swapped out is the most at the end of any of them."""
        rss = {phase.phase: phase.rss_bytes for phase in self._phases}
        baseline, steady = rss.get(MemoryPhase.BASELINE), rss.get(MemoryPhase.STEADY)
        return Memory(
            phases=tuple(self._phases),
            peak_rss_bytes=self._peak,
            model_rss_bytes=steady - baseline if steady is not None and baseline is not None else None,
            peak_swap_bytes=self._swap,
            arena_bytes=arena_bytes,
        )

    def _reset_peak(self) -> bool:
        try:
            (self._process / "clear_refs").write_text("5", encoding="ascii")
        except OSError:
            return False
        return True

    def _read(self) -> Tuple[Optional[int], ...]:
        """Resident set, proportional set, peak of the resident set, swapped out."""
        if not self._linux:
            return _portable_rss(), None, _portable_peak(), None
        status = _fields(self._process / "status")
        rollup = _fields(self._process / "smaps_rollup")
        rss = rollup.get("Rss", status.get("VmRSS"))
        return rss, rollup.get("Pss"), status.get("VmHWM"), status.get("VmSwap")


def _fields(file: Path) -> Mapping[str, int]:
    """The ``Name:  123 kB`` lines of a file in bytes; empty when it can't be read."""
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return {}
    found = {}
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        words = rest.split()
        if colon and len(words) == 2 and words[1] == "kB" and words[0].isdigit():
            found[name] = int(words[0]) * _KIB
    return found


def _portable_rss() -> Optional[int]:
    try:
        import psutil
    except ImportError:
        return None
    return int(psutil.Process().memory_info().rss)


def _portable_peak() -> Optional[int]:
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak) if sys.platform == "darwin" else int(peak) * _KIB


def available_bytes(
    proc: Path = Path("/proc"), control_groups: Path = Path("/sys/fs/cgroup")
) -> Optional[int]:
    """Memory that this process can still take: the kernel's estimate, and its control group's room.

    None where the system does not say.
    """
    rooms = []
    available = _fields(proc / "meminfo").get("MemAvailable")
    if available is not None:
        rooms.append(available)
    try:
        membership = (proc / "self" / "cgroup").read_text(encoding="ascii", errors="replace")
    except OSError:
        membership = ""
    for line in membership.splitlines():
        number, _, rest = line.partition(":")
        if number == "0":  # version 2
            rooms.extend(_group_rooms(control_groups, rest.partition(":")[2].lstrip("/")))
    return max(0, min(rooms)) if rooms else None


def _group_rooms(control_groups: Path, name: str) -> List[int]:
    """Room left under the limit of the group and of every group above it, in bytes."""
    rooms = []
    group = control_groups / name
    while True:
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            used = int((group / "memory.current").read_text(encoding="ascii"))
            statistics = (group / "memory.stat").read_text(encoding="ascii").split()
            # Clean file pages count as used and are given back on demand.
            used -= int(statistics[statistics.index("inactive_file") + 1])
            if limit != "max":
                rooms.append(int(limit) - used)
        except (OSError, ValueError):
            pass  # the root has no limit, and a group may be hidden from a container
        if group in (control_groups, group.parent):
            return rooms
        group = group.parent
