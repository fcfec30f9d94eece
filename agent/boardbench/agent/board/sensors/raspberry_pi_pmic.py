"""Power of a Raspberry Pi 5's rails, as its power management chip measures them.

``vcgencmd pmic_read_adc`` prints a line a measurement, in amperes or volts::

     VDD_CORE_A current(7)=0.75012000A
     VDD_CORE_V volt(15)=0.72031540V
        EXT5V_V volt(24)=5.09066000V

What the 5 V input feeds past that chip (USB devices, HATs, the fan) has a voltage and no current: it is not
in the sum, nor is what the chip itself loses. It is a process each time, so it is read once a second.
Source: raspberrypi.com/documentation/computers/os.html#pmic_read_adc; only the BCM2712's boards have it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.command import Command
from boardbench.agent.board.sensor import Coverage, Reading, Sensor
from boardbench.agent.board.sensors.raspberry_pi import vcgencmd

TOTAL = "PMIC rails"
"""Source of the sum over all rails."""

_LINE = re.compile(
    r"^\s*(\w{1,32})_([AV]) +(?:current|volt)\(\d+\)=(\d{1,6}(?:\.\d{1,12})?)[AV]\s*$", re.MULTILINE
)
_SECONDS = 1.0
_SUPPLY = "EXT5V"


def parse(text: str) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """Amperes and volts by rail."""
    amperes: dict[str, float] = {}
    volts: dict[str, float] = {}
    for rail, unit, value in _LINE.findall(text):
        (amperes if unit == "A" else volts)[rail] = float(value)
    return amperes, volts


@dataclass(frozen=True)
class PmicRails:
    """All rails."""

    name: str
    command: Command
    period_seconds: float = field(default=_SECONDS)

    @property
    def child_cpu_seconds(self) -> float:
        """That asking took so far."""
        return self.command.cpu_seconds

    def read(self) -> Iterable[Reading]:
        """Watts of every rail and of all together; volts of the supply."""
        said = self.command.run("pmic_read_adc")
        amperes, volts = parse(said)
        watts = {rail: amperes[rail] * volts[rail] for rail in amperes if rail in volts}
        if not watts:
            raise sysfs.fault(self.command.program, "no current of any rail", said.encode())
        found = [Reading("power_watts", rail, value, coverage=Coverage.RAIL) for rail, value in watts.items()]
        found.append(Reading("power_watts", TOTAL, sum(watts.values()), coverage=Coverage.MODULE))
        if _SUPPLY in volts:
            found.append(Reading("voltage_volts", _SUPPLY, volts[_SUPPLY]))
        return found


def find(root: Path, command: Command | None = None) -> list[Sensor]:
    """The rails of a Raspberry Pi 5; ``command`` in the place of the board's vcgencmd."""
    try:
        compatible = sysfs.content(root / "sys/firmware/devicetree/base/compatible").split(b"\0")
    except OSError:
        return []
    if b"brcm,bcm2712" not in compatible:
        return []
    command = command or vcgencmd(root)
    return [PmicRails("PMIC", command)] if command is not None else []
