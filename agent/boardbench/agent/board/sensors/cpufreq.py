"""Frequencies of the processors, the most they may run at, and who decides (the governor).

``/sys/devices/system/cpu/cpu*/cpufreq/scaling_{cur,max}_freq`` and ``cpuinfo_max_freq`` are in kHz.
``scaling_max_freq`` is the limit that is in force, whoever set it: a person, the power mode of a Jetson, or
the thermal framework. Source: Documentation/admin-guide/pm/cpufreq.rst of the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor

_FILES = (
    ("frequency_hertz", "scaling_cur_freq"),
    ("frequency_limit_hertz", "scaling_max_freq"),
    ("frequency_maximum_hertz", "cpuinfo_max_freq"),
)

# What drivers write that can't ask the hardware (drivers/cpufreq/cpufreq.c).
_UNKNOWN = b"<unknown>"
# A terahertz: beyond it is no processor.
_MOST_KILOHERTZ = 10**9


@dataclass(frozen=True)
class ProcessorFrequency:
    """Frequency of one logical processor."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """The frequency now, the limit in force, and the most the hardware can."""
        return sysfs.each(
            lambda quantity=quantity, file=file: self._read(quantity, self.path / file)  # type: ignore[misc]
            for quantity, file in _FILES
        )

    def _read(self, quantity: str, file: Path) -> Iterable[Reading]:
        try:
            content = sysfs.content(file)
        except OSError as error:
            # An idle or offline core answers EBUSY, or has lost its files.
            if sysfs.nothing_now(error):
                return
            raise
        if content.strip() == _UNKNOWN:
            return
        kilohertz = sysfs.parsed(content, file, least=0)
        if kilohertz > _MOST_KILOHERTZ:
            raise sysfs.fault(file, f"{kilohertz} kHz")
        if kilohertz:
            yield Reading(quantity, self.name, kilohertz * 1000.0)


def find(root: Path) -> list[Sensor]:
    """One sensor a logical processor that has a frequency policy."""
    return [ProcessorFrequency(path.parent.name, path) for path in _policies(root)]


def governor(root: Path) -> str:
    """The governor of all processors, "mixed" when they differ, empty when the board has none."""
    found = {sysfs.word(path / "scaling_governor") for path in _policies(root)} - {""}
    return found.pop() if len(found) == 1 else "mixed" if found else ""


def _policies(root: Path) -> list[Path]:
    folder = root / "sys/devices/system/cpu"
    paths = (path / "cpufreq" for path in sysfs.listed(folder, "cpu") if path.name[3:].isdecimal())
    return [path for path in paths if sysfs.exists(path)]
