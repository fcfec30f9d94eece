"""Frequencies of the processors, the most they may run at, and who decides (the governor).

``/sys/devices/system/cpu/cpu*/cpufreq/scaling_{cur,max}_freq`` and ``cpuinfo_max_freq`` are in kHz.
Source: Documentation/admin-guide/pm/cpufreq.rst of the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board.sensor import Reading, Sensor

_FILES = (
    ("frequency_hertz", "scaling_cur_freq"),
    ("frequency_limit_hertz", "scaling_max_freq"),
    ("frequency_maximum_hertz", "cpuinfo_max_freq"),
)


@dataclass(frozen=True)
class ProcessorFrequency:
    """Frequency of one logical processor."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """The frequency now, the limit in force, and the most the hardware can."""
        for quantity, file in _FILES:
            try:
                kilohertz = int((self.path / file).read_text())
            except (OSError, ValueError):
                # An idle or offline core answers EBUSY, and drivers write "<unknown>".
                continue
            if kilohertz > 0:
                yield Reading(quantity, self.name, kilohertz * 1000.0)


def find(root: Path) -> list[Sensor]:
    """One sensor a logical processor that has a frequency policy."""
    return [ProcessorFrequency(path.parent.name, path) for path in _policies(root)]


def governor(root: Path) -> str:
    """The governor of all processors, "mixed" when they differ, empty when the board has none."""
    found = {_text(path / "scaling_governor") for path in _policies(root)} - {""}
    return found.pop() if len(found) == 1 else "mixed" if found else ""


def _policies(root: Path) -> list[Path]:
    paths = (root / "sys/devices/system/cpu").glob("cpu[0-9]*/cpufreq")
    return sorted(paths, key=lambda path: int(path.parent.name[3:]))


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
