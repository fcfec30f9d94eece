"""Frequencies of the processors, the most they may run at, and who decides (the governor).

``/sys/devices/system/cpu/cpu*/cpufreq/scaling_{cur,max}_freq`` and ``cpuinfo_max_freq`` are in kHz.
``scaling_max_freq`` is the limit that is in force, whoever set it: a person, the power mode of a Jetson, or
the thermal framework. Source: Documentation/admin-guide/pm/cpufreq.rst of the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor

# What drivers write that can't ask the hardware (drivers/cpufreq/cpufreq.c).
_UNKNOWN = b"<unknown>"
# A terahertz: beyond it is no processor.
_MOST_KILOHERTZ = 10**9


class ProcessorFrequency:
    """Frequency of one logical processor."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self._files = (
            ("frequency_hertz", path / "scaling_cur_freq"),
            ("frequency_limit_hertz", path / "scaling_max_freq"),
        )
        self._most = path / "cpuinfo_max_freq"
        # The hardware's own, once read: it does not change.
        self._maximum: Reading | None = None

    def read(self) -> Iterable[Reading]:
        """The frequency now, the limit in force, and the most the hardware can."""
        return sysfs.each((self._now, self._limit, self._hardware))

    def _now(self) -> Iterable[Reading]:
        return self._read(*self._files[0])

    def _limit(self) -> Iterable[Reading]:
        return self._read(*self._files[1])

    def _hardware(self) -> Iterable[Reading]:
        if self._maximum is None:
            for reading in self._read("frequency_maximum_hertz", self._most):
                self._maximum = reading
        return () if self._maximum is None else (self._maximum,)

    def _read(self, quantity: str, file: Path) -> Iterable[Reading]:
        try:
            content = sysfs.content(file)
        except OSError as error:
            # An idle or offline core answers EBUSY, or has lost its files.
            if sysfs.nothing_now(error):
                return ()
            raise
        if content.strip() == _UNKNOWN:
            return ()
        kilohertz = sysfs.parsed(content, file, least=0)
        if kilohertz > _MOST_KILOHERTZ:
            raise sysfs.fault(file, f"{kilohertz} kHz")
        return (Reading(quantity, self.name, kilohertz * 1000.0),) if kilohertz else ()


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
