"""Power rails of a Jetson, as its INA3221 monitors measure them.

JetPack 5 and later: ``/sys/class/hwmon/hwmon*`` called ``ina3221`` with ``in{N}_label``, ``in{N}_input``
(mV at the bus) and ``curr{N}_input`` (mA); channels without use are called "NC", and ``in7`` is the sum of
the shunts' voltages (Documentation/hwmon/ina3221.rst of the Linux kernel). JetPack 4: an IIO device
``ina3221x`` with ``rail_name_{N}``, ``in_power{N}_input`` (mW), ``in_voltage{N}_input`` (mV),
``in_current{N}_input`` (mA).

Which rails hold which others (NVIDIA's Jetson Linux Developer Guide, "Software-Based Power Consumption
Modeling" and the tables of power monitors): ``VDD_IN`` (Xavier NX, Orin NX and Nano, TX2) and ``POM_5V_IN``
(Nano) are the module's input, everything else is in them. An AGX Orin has no such channel: ``VIN_SYS_5V0``
feeds its I/O and memory (``VDDQ_VDD2_1V8AO`` is in it), while ``VDD_GPU_SOC`` and ``VDD_CPU_CV`` come from
another supply, so these three add up to the module; so do the six of an AGX Xavier. What the carrier board
takes is in none of them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Coverage, Reading, Sensor

INPUTS = ("VDD_IN", "POM_5V_IN")
"""Rails that hold all others."""

SYSTEM_INPUT = "VIN_SYS_5V0"
"""Holds all others only where none of :data:`BESIDE_SYSTEM_INPUT` is measured."""

BESIDE_SYSTEM_INPUT = ("VDD_GPU_SOC", "VDD_CPU_CV", "VDD_GPU", "VDD_CPU_SOC_MSS")
"""Rails of the AGX Orin and of Thor that don't come out of :data:`SYSTEM_INPUT`."""

XAVIER_RAILS = ("GPU", "CPU", "SOC", "CV", "VDDRQ", "SYS5V")
"""Those of an AGX Xavier: they don't hold each other."""

_UNUSED = "NC"
_SUM_OF_SHUNTS = 7
# No Jetson takes more: above it, a file holds something else.
_MOST_MILLIVOLTS = 100_000
_MOST_MILLIAMPERES = 100_000
_MOST_MILLIWATTS = 1_000_000


@dataclass(frozen=True)
class Channel:
    """The files of one rail; JetPack 4 also has the power itself."""

    label: str
    millivolts: Path
    milliamperes: Path
    milliwatts: Path | None = None


@dataclass(frozen=True)
class Rails:
    """All rails of the module, and their total where there is one."""

    name: str
    channels: tuple[Channel, ...]

    def read(self) -> Iterable[Reading]:
        """Watts, volts and amperes of every rail; watts of the total, once."""
        watts: dict[str, float] = {}
        total = total_of([channel.label for channel in self.channels])
        parts: list[Callable[[], Iterable[Reading]]] = [
            lambda channel=channel: _channel(channel, watts, total)  # type: ignore[misc]
            for channel in self.channels
        ]
        yield from sysfs.each([*parts, lambda: _sum(watts, total)])


def total_of(labels: Iterable[str]) -> tuple[str, ...]:
    """The rails whose sum is the module's power: one that holds all, several, or none."""
    known = tuple(labels)
    for label in INPUTS:
        if label in known:
            return (label,)
    if SYSTEM_INPUT in known:
        return (*(label for label in known if label in BESIDE_SYSTEM_INPUT), SYSTEM_INPUT)
    return XAVIER_RAILS if set(XAVIER_RAILS) <= set(known) else ()


def _channel(channel: Channel, watts: dict[str, float], total: tuple[str, ...]) -> Iterable[Reading]:
    volts = _milli(channel.millivolts, _MOST_MILLIVOLTS)
    amperes = _milli(channel.milliamperes, _MOST_MILLIAMPERES)
    power = None if channel.milliwatts is None else _milli(channel.milliwatts, _MOST_MILLIWATTS)
    if power is None and volts is not None and amperes is not None:
        power = volts * amperes
    if power is not None:
        watts[channel.label] = power
        coverage = Coverage.MODULE if total == (channel.label,) else Coverage.RAIL
        yield Reading("power_watts", channel.label, power, coverage=coverage)
    if volts is not None:
        yield Reading("voltage_volts", channel.label, volts)
    if amperes is not None:
        yield Reading("current_amperes", channel.label, amperes)


def _sum(watts: Mapping[str, float], total: tuple[str, ...]) -> Iterable[Reading]:
    # A sum that lacks a part is no total.
    if len(total) > 1 and all(label in watts for label in total):
        together = sum(watts[label] for label in total)
        yield Reading("power_watts", " + ".join(total), together, coverage=Coverage.MODULE)


def _milli(path: Path, most: int) -> float | None:
    """Thousandths as units; None while the channel is switched off. Raises OSError."""
    # Currents of an idle rail are a little below zero at times: the offset of the converter.
    value = sysfs.number_if_any(path)
    if value is not None and abs(value) > most:
        raise OSError(errno.EBADMSG, f"{value}, more than {most}", str(path))
    return None if value is None else value / 1000


def find(root: Path) -> list[Sensor]:
    """One sensor for all monitors of the board."""
    channels: list[Channel] = []
    taken: set[str] = set()
    for folder in sysfs.listed(root / "sys/class/hwmon", "hwmon"):
        if sysfs.word(folder / "name") == "ina3221":
            channels += _hwmon(folder, taken)
    if not channels:
        for folder in _iio_devices(root):
            channels += _iio(folder, taken)
    return [Rails("ina3221", tuple(channels))] if channels else []


def _hwmon(folder: Path, taken: set[str]) -> Iterable[Channel]:
    for number in range(1, _SUM_OF_SHUNTS):
        label = sysfs.word(folder / f"in{number}_label")
        voltage, current = folder / f"in{number}_input", folder / f"curr{number}_input"
        if not label or label == _UNUSED or not sysfs.exists(voltage) or not sysfs.exists(current):
            continue
        yield Channel(sysfs.distinct(label, folder.name, taken), voltage, current)


def _iio_devices(root: Path) -> list[Path]:
    """Folders of the monitors: each is found on its bus, and again as an IIO device."""
    bus = root / "sys/bus/i2c/drivers/ina3221x"
    found = [device for chip in sysfs.listed(bus) for device in sysfs.listed(chip, "iio:device")]
    if not found:
        devices = sysfs.listed(root / "sys/bus/iio/devices", "iio:device")
        found = [device for device in devices if sysfs.word(device / "name") == "ina3221x"]
    return found


def _iio(folder: Path, taken: set[str]) -> Iterable[Channel]:
    for file in sysfs.listed(folder, "rail_name_"):
        number = file.name.rpartition("_")[2]
        label = sysfs.word(file)
        power = folder / f"in_power{number}_input"
        if label and label != _UNUSED and number.isdecimal() and sysfs.exists(power):
            yield Channel(
                sysfs.distinct(label, folder.name, taken),
                folder / f"in_voltage{number}_input",
                folder / f"in_current{number}_input",
                power,
            )
