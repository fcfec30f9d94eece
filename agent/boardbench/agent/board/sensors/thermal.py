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

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor

# Below this no silicon works: Tegra's drivers say -256000 for a zone whose unit is switched off.
_LEAST_CELSIUS = -100.0
# Above this none does either: what says so is broken.
_MOST_CELSIUS = 1000.0

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
            celsius = sysfs.number(self.path) / 1000
        except OSError as error:
            if error.errno in _SWITCHED_OFF:
                return []
            raise
        if celsius < _LEAST_CELSIUS:
            return []
        if celsius > _MOST_CELSIUS:
            raise sysfs.fault(self.path, f"{celsius:g} °C")
        return [Reading("temperature_celsius", self.name, celsius)]


@dataclass(frozen=True)
class ProcessorCooling:
    """How many steps the kernel slows a processor down against heat."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """The step; 0: not at all."""
        step = sysfs.number(self.path, least=0)
        return [Reading("cooling_steps", self.name, float(step))]


def find(root: Path) -> list[Sensor]:
    """Every thermal zone, and every cooling device that slows a processor."""
    folder = root / "sys/class/thermal"
    zones = [path for path in sysfs.listed(folder, "thermal_zone") if sysfs.exists(path / "temp")]
    coolings = [path for path in sysfs.listed(folder, "cooling_device") if _slows_a_processor(path)]
    zone_names: set[str] = set()
    cooling_names: set[str] = set()
    return [
        *(ThermalZone(sysfs.distinct(_type(path), path.name, zone_names), path / "temp") for path in zones),
        *(
            ProcessorCooling(sysfs.distinct(_type(path), path.name, cooling_names), path / "cur_state")
            for path in coolings
        ),
    ]


def _slows_a_processor(path: Path) -> bool:
    return _type(path).startswith(_PROCESSOR_COOLING) and sysfs.exists(path / "cur_state")


def _type(path: Path) -> str:
    return sysfs.word(path / "type") or path.name
