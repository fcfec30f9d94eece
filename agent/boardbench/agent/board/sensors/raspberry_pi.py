"""What a Raspberry Pi's firmware does to the processor without the kernel's governor knowing.

The firmware's word has bits for now (0 under-voltage, 1 frequency capped, 2 throttled, 3 soft temperature
limit) and the same since boot (16 to 19). It is read where there is the first of

- ``/sys/devices/platform/soc*/soc*:firmware/get_throttled``: hexadecimal without prefix, as the kernel last
  heard it from the firmware, which the hwmon driver asks every two seconds (drivers/firmware/raspberrypi.c
  and drivers/hwmon/raspberrypi-hwmon.c of raspberrypi/linux);
- ``vcgencmd get_throttled``: "throttled=0x50000". A process each time, so once a second at most.

``hwmon*/in0_lcrit_alarm`` of ``rpi_volt`` is 1 while the supply was too low within the last two seconds.
That driver clears bit 16 whenever it asks, so "since boot" may be shorter for under-voltage.
Sources: raspberrypi.com/documentation/computers/os.html#get_throttled, and those above.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.command import Command
from boardbench.agent.board.sensor import Reading, Sensor

BITS = (
    (0, "undervoltage", "under-voltage"),
    (1, "frequency_capped", "frequency capped"),
    (2, "throttled", "throttled"),
    (3, "soft_temperature_limit", "soft temperature limit"),
)
"""Bit, begin of the quantity's name, and the words for a person."""

_SINCE_BOOT = 16
_WORD = re.compile(r"\s*(?:throttled=)?(?:0x)?([0-9a-fA-F]{1,8})\s*\0?\s*")

# Where Raspberry Pi OS has it now, and had it up to Buster.
_VCGENCMD = ("usr/bin/vcgencmd", "opt/vc/bin/vcgencmd")
# The firmware is asked through a mailbox by a process that starts for it; throttling lasts for seconds.
_VCGENCMD_SECONDS = 1.0


def quantities(word: int) -> Iterator[tuple[str, bool]]:
    """Each bit of the firmware's word by its quantity: ``throttled_now``, ``throttled_since_boot``, …."""
    for bit, name, _ in BITS:
        yield f"{name}_now", bool(word >> bit & 1)
    for bit, name, _ in BITS:
        yield f"{name}_since_boot", bool(word >> bit + _SINCE_BOOT & 1)


def parse(text: str) -> int | None:
    """The firmware's word, as the file or the command has it; None when it is none."""
    found = _WORD.fullmatch(text)
    return int(found.group(1), 16) if found else None


@dataclass(frozen=True)
class FirmwareFile:
    """The firmware's word, as the kernel last heard it."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """0 or 1 for each bit."""
        raw = sysfs.content(self.path)
        word = parse(raw.decode("ascii", "replace"))
        if word is None:
            raise sysfs.fault(self.path, "no hexadecimal number", raw)
        return [Reading(quantity, self.name, float(on)) for quantity, on in quantities(word)]


@dataclass(frozen=True)
class FirmwareCommand:
    """The firmware's word, asked for."""

    name: str
    command: Command
    period_seconds: float = field(default=_VCGENCMD_SECONDS)

    @property
    def child_cpu_seconds(self) -> float:
        """That asking took so far."""
        return self.command.cpu_seconds

    def read(self) -> Iterable[Reading]:
        """0 or 1 for each bit."""
        said = self.command.run("get_throttled")
        word = parse(said)
        if word is None:
            raise sysfs.fault(self.command.program, "not throttled=0x…", said.encode())
        return [Reading(quantity, self.name, float(on)) for quantity, on in quantities(word)]


@dataclass(frozen=True)
class SupplyAlarm:
    """Whether the supply was too low just now."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """1 when it was."""
        return [Reading("undervoltage_now", self.name, float(sysfs.number(self.path, least=0) > 0))]


def find(root: Path, command: Command | None = None) -> list[Sensor]:
    """The firmware's word and the alarm of the supply; ``command`` in the place of the board's vcgencmd."""
    found: list[Sensor] = []
    files = [
        node / "get_throttled"
        for platform in sysfs.listed(root / "sys/devices/platform", "soc")
        for node in sysfs.listed(platform, "soc")
        if node.name.endswith(":firmware") and sysfs.exists(node / "get_throttled")
    ]
    if files:
        found.append(FirmwareFile("firmware", files[0]))
    else:
        command = command or vcgencmd(root)
        if command is not None:
            found.append(FirmwareCommand("firmware", command))
    for folder in sysfs.listed(root / "sys/class/hwmon", "hwmon"):
        alarm = folder / "in0_lcrit_alarm"
        if sysfs.word(folder / "name") == "rpi_volt" and sysfs.exists(alarm):
            found.append(SupplyAlarm("rpi_volt", alarm))
    return found


def vcgencmd(root: Path) -> Command | None:
    """The program that asks the firmware; None where the system has none."""
    for place in _VCGENCMD:
        program = root / place
        if os.access(program, os.X_OK):
            return Command(program)
    return None
