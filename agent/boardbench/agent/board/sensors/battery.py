"""What a battery gives while the machine runs on it: then it is all that the machine draws.

``/sys/class/power_supply/*`` with ``type`` "Battery": ``status``, ``power_now`` in microwatts, or
``current_now`` in microamperes and ``voltage_now`` in microvolts; by driver the current is below zero while
it discharges. Peripherals' batteries have the ``scope`` "Device". While the supply is plugged in, nothing
is told. The chip in a battery measures every second or slower, some every fifteen.
Source: Documentation/ABI/testing/sysfs-class-power of the Linux kernel.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Coverage, Reading, Sensor

_MICRO = 1e6
# No battery of a board gives a kilowatt.
_MOST_WATTS = 10_000.0


@dataclass(frozen=True)
class Batteries:
    """All batteries of the machine: they may take turns, or give together."""

    name: str
    folders: tuple[Path, ...]

    def read(self) -> Iterable[Reading]:
        """Watts of each that discharges, and of all where there are several."""
        watts: dict[str, float] = {}
        several = len(self.folders) > 1
        parts: list[Callable[[], Iterable[Reading]]] = [
            lambda folder=folder: _discharge(folder, watts, several)  # type: ignore[misc]
            for folder in self.folders
        ]
        yield from sysfs.each(parts)
        if several and watts:
            name = " + ".join(folder.name for folder in self.folders)
            yield Reading("power_watts", name, sum(watts.values()), coverage=Coverage.BOARD)


def _discharge(folder: Path, watts: dict[str, float], several: bool) -> Iterable[Reading]:
    status = sysfs.content(folder / "status").strip()
    if status != b"Discharging":
        return
    power = sysfs.number_if_any(folder / "power_now")
    if power is not None:
        value = abs(power) / _MICRO
    else:
        current = sysfs.number_if_any(folder / "current_now")
        voltage = sysfs.number_if_any(folder / "voltage_now", least=0)
        if current is None or voltage is None:
            return
        value = abs(current) / _MICRO * (voltage / _MICRO)
    if value > _MOST_WATTS:
        raise OSError(errno.EBADMSG, f"{value:g} W", str(folder))
    watts[folder.name] = value
    yield Reading("power_watts", folder.name, value, coverage=Coverage.RAIL if several else Coverage.BOARD)


def find(root: Path) -> list[Sensor]:
    """The batteries that the machine can run on."""
    folders = tuple(
        folder
        for folder in sysfs.listed(root / "sys/class/power_supply")
        if sysfs.word(folder / "type") == "Battery"
        and sysfs.word(folder / "scope") != "Device"
        and sysfs.exists(folder / "status")
        and (sysfs.exists(folder / "power_now") or sysfs.exists(folder / "current_now"))
    )
    return [Batteries("battery", folders)] if folders else []
