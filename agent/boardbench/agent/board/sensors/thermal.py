"""Temperatures of the kernel's thermal zones, and how hard the kernel holds the processors back.

``/sys/class/thermal/thermal_zone*/temp`` is in thousandths of a degree Celsius, ``type`` its name;
``cooling_device*/cur_state`` counts steps from 0 (free) to ``max_state``.
Source: Documentation/driver-api/thermal/sysfs-api.rst of the Linux kernel.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board.sensor import Reading, Sensor

# Below this no silicon works: Tegra's drivers say -256000 for a zone whose unit is switched off.
_LEAST_CELSIUS = -100.0

# What a zone answers while its unit is switched off, by driver.
_SWITCHED_OFF = (errno.EAGAIN, errno.ENODATA, errno.EINVAL)

# What a processor's cooling device calls itself: drivers/thermal/cpufreq_cooling.c ("thermal-cpufreq-0",
# since 5.12 "cpufreq-cpu0"), devfreq_cooling.c, drivers/acpi/processor_thermal.c. Fans are no throttling.
_PROCESSOR_COOLING = ("thermal-cpufreq", "cpufreq", "thermal-devfreq", "devfreq", "Processor")


@dataclass(frozen=True)
class ThermalZone:
    """One temperature."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """The temperature; nothing while the unit that the zone watches is switched off."""
        try:
            celsius = int((self.path / "temp").read_text()) / 1000
        except ValueError as error:
            raise OSError(f"{self.path / 'temp'}: not a number") from error
        except OSError as error:
            if error.errno in _SWITCHED_OFF:
                return []
            raise
        if celsius < _LEAST_CELSIUS:
            return []
        return [Reading("temperature_celsius", self.name, celsius)]


@dataclass(frozen=True)
class ProcessorCooling:
    """How many steps the kernel slows a processor down against heat."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """The step; 0: not at all."""
        try:
            return [Reading("cooling_steps", self.name, float((self.path / "cur_state").read_text()))]
        except ValueError as error:
            raise OSError(f"{self.path / 'cur_state'}: not a number") from error


def find(root: Path) -> list[Sensor]:
    """Every thermal zone, and every cooling device that slows a processor."""
    folder = root / "sys/class/thermal"
    zones = sorted(folder.glob("thermal_zone*"), key=_number)
    coolings = sorted(folder.glob("cooling_device*"), key=_number)
    return [
        *(ThermalZone(_type(path), path) for path in zones if (path / "temp").exists()),
        *(ProcessorCooling(_type(path), path) for path in coolings if _slows_a_processor(path)),
    ]


def _slows_a_processor(path: Path) -> bool:
    return _type(path).startswith(_PROCESSOR_COOLING) and (path / "cur_state").exists()


def _number(path: Path) -> int:
    digits = path.name.lstrip("abcdefghijklmnopqrstuvwxyz_")
    return int(digits) if digits.isdigit() else 0


def _type(path: Path) -> str:
    try:
        return (path / "type").read_text().strip() or path.name
    except OSError:
        return path.name
