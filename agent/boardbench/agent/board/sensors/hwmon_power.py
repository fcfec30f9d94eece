"""Power, energy and current by whatever meter has a driver in hwmon.

``/sys/class/hwmon/hwmon*``: ``power*_input`` or ``power*_average`` in microwatts, ``energy*_input`` in
microjoules since the driver started, ``curr*_input`` in milliamperes, ``*_label`` their names
(Documentation/hwmon/sysfs-interface.rst of the Linux kernel). What a meter's chip is soldered to the kernel
does not know: unless its driver says it, that is one rail.

- ``power_meter`` (ACPI): the whole machine (Documentation/hwmon/acpi_power_meter.rst).
- ``powerz`` (ChargerLAB POWER-Z, between supply and board): ``in0_input`` (mV) × ``curr1_input`` (mA),
  whose sign is the direction (Documentation/hwmon/powerz.rst).
- ``amdgpu``, ``i915``, ``xe``, ``nouveau``: the graphics card, or with amdgpu on a chip with a GPU inside,
  the chip.
- ``fam15h_power``: the processor.

The INA3221 of Jetsons is in ``ina3221.py``, batteries are in ``battery.py``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Coverage, Reading, Sensor

_COVERAGES = {
    "power_meter": Coverage.BOARD,
    "powerz": Coverage.BOARD,
    "amdgpu": Coverage.DEVICE,
    "i915": Coverage.DEVICE,
    "xe": Coverage.DEVICE,
    "nouveau": Coverage.DEVICE,
    "fam15h_power": Coverage.CHIP,
}
_POWERZ = "powerz"
# Read elsewhere, or no measurement: what a USB-C port has agreed on with its partner.
_LEFT_OUT = re.compile(r"ina3221|BAT\w*|ucsi_source_psy_.*|tcpm_source_psy_.*|hidpp_battery_\d+|ADP\w*|AC\w*")

_MICRO = 1e6
# A megawatt is no board, nor is a million amperes.
_MOST = 1e6
_FILE = re.compile(r"(power|energy|curr)(\d{1,3})_(input|average)")
# What a kind of file is, and how many of its units are one of ours.
_KINDS = {
    "power": ("power_watts", _MICRO),
    "energy": ("energy_joules", _MICRO),
    "curr": ("current_amperes", 1000.0),
}


@dataclass(frozen=True)
class Channel:
    """One file, and what it is of."""

    quantity: str
    source: str
    path: Path
    # How many of what is read are one of the quantity's unit.
    unit: float
    coverage: Coverage | None


@dataclass(frozen=True)
class Meter:
    """One chip."""

    name: str
    channels: tuple[Channel, ...]

    def read(self) -> Iterable[Reading]:
        """Watts, amperes, and joules since the driver started."""
        parts: list[Callable[[], Iterable[Reading]]] = [
            lambda channel=channel: _read(channel)  # type: ignore[misc]
            for channel in self.channels
        ]
        return sysfs.each(parts)


def _read(channel: Channel) -> Iterable[Reading]:
    cumulative = channel.quantity == "energy_joules"
    # A current may flow back, so watts may be below zero; a counter may not.
    number = sysfs.number_if_any(channel.path, least=0 if cumulative else None)
    if number is None:
        return
    value = number / channel.unit
    if not cumulative and abs(value) > _MOST:
        raise sysfs.fault(channel.path, f"{value:g}")
    yield Reading(channel.quantity, channel.source, value, cumulative=cumulative, coverage=channel.coverage)


@dataclass(frozen=True)
class UsbMeter:
    """A POWER-Z: volts and amperes, and no power of its own."""

    name: str
    folder: Path

    def read(self) -> Iterable[Reading]:
        """Watts, volts and amperes, positive whichever way it was plugged in."""
        volts = abs(sysfs.number(self.folder / "in0_input")) / 1000
        amperes = abs(sysfs.number(self.folder / "curr1_input")) / 1000
        if volts * amperes > _MOST:
            raise sysfs.fault(self.folder, f"{volts:g} V × {amperes:g} A")
        yield Reading("power_watts", self.name, volts * amperes, coverage=Coverage.BOARD)
        yield Reading("voltage_volts", self.name, volts)
        yield Reading("current_amperes", self.name, amperes)


def find(root: Path) -> list[Sensor]:
    """One sensor a chip."""
    found: list[Sensor] = []
    taken: set[str] = set()
    for folder in sysfs.listed(root / "sys/class/hwmon", "hwmon"):
        chip = sysfs.word(folder / "name")
        if not chip or _LEFT_OUT.fullmatch(chip):
            continue
        if chip == _POWERZ:
            if sysfs.exists(folder / "in0_input") and sysfs.exists(folder / "curr1_input"):
                found.append(UsbMeter(sysfs.distinct(chip, folder.name, taken), folder))
            continue
        channels = tuple(_channels(folder, chip, taken))
        if channels:
            found.append(Meter(chip, channels))
    return found


def _channels(folder: Path, chip: str, taken: set[str]) -> Iterable[Channel]:
    files = {file.name: file for file in sysfs.listed(folder)}
    matches = [(match, file) for name, file in files.items() if (match := _FILE.fullmatch(name))]
    for match, file in matches:
        kind, number, how = match.groups()
        # Where a chip has both, the one of the moment.
        if how == "average" and f"{kind}{number}_input" in files:
            continue
        many = sum(other.group(1) == kind and other.group(2) != number for other, _ in matches) > 0
        label = sysfs.word(folder / f"{kind}{number}_label") or (number if many else "")
        quantity, unit = _KINDS[kind]
        name = f"{chip} {label}".strip()
        source = name if (key := f"{quantity} {name}") not in taken else f"{name} ({folder.name})"
        taken.add(key)
        # Only the first channel is the whole: what comes after it are parts.
        coverage = _COVERAGES.get(chip, Coverage.RAIL) if number == "1" else Coverage.RAIL
        yield Channel(quantity, source, file, unit, None if kind == "curr" else coverage)
