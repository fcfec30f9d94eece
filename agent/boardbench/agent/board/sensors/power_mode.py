"""The power mode of a Jetson, and whether its clocks are held at their maximum.

``nvpmodel`` keeps the mode that it set in ``/var/lib/nvpmodel/status``: "pmode:0002", on some "pmode:0002
fmode:quiet" (the fan's profile). Its modes are in ``/etc/nvpmodel.conf``: "< POWER_MODEL ID=2 NAME=MAXN >",
and "< PM_CONFIG DEFAULT=2 >". ``jetson_clocks --show``, for root only, prints a line a clock::

    cpu0: Online=1 Governor=schedutil MinFreq=729600 MaxFreq=1728000 CurrentFreq=1113600 IdleStates: WFI=1
    c7=1 GPU MinFreq=306000000 MaxFreq=624750000 CurrentFreq=306000000
    EMC MinFreq=204000000 MaxFreq=2133000000 CurrentFreq=2133000000 FreqOverride=0
    FAN Dynamic Speed control=active hwmon1_pwm=88
    NV Power Mode: 15W

Processors are in kHz there, the others in hertz. Source: NVIDIA's Jetson Linux Developer Guide, "Power Mode
Controls" and "Maximizing Jetson Performance".
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.command import Command
from boardbench.agent.board.sensor import Reading, Sensor

_STATUS = re.compile(r"pmode:(\d{1,6})(?:\s+fmode:(\w{1,32}))?")
_MODEL = re.compile(r"^\s*<\s*POWER_MODEL\s+ID=(\d{1,6})\s+NAME=(\S{1,64})\s*>", re.MULTILINE)
_DEFAULT = re.compile(r"^\s*<\s*PM_CONFIG\s+DEFAULT=(\d{1,6})\s*>", re.MULTILINE)
_CLOCK = re.compile(
    r"^(cpu\d{1,4}|GPU|EMC)\b.*?\bMinFreq=(\d{1,15})\s+MaxFreq=(\d{1,15})\s+CurrentFreq=(\d{1,15})",
    re.MULTILINE,
)
_ONLINE = re.compile(r"^(cpu\d{1,4}):\s*Online=1\b.*?\bGovernor=(\w{1,32})", re.MULTILINE)
_NAME = re.compile(r"^NV Power Mode:\s*(\S{1,64})", re.MULTILINE)
_PROGRAM = "usr/bin/jetson_clocks"
# It is a shell script that asks for dozens of clocks.
_CLOCKS_TIMEOUT_SECONDS = 10.0
# A mode is set by hand, or by a daemon against heat: a look a second is enough.
_SECONDS = 1.0


@dataclass(frozen=True)
class PowerMode:
    """The mode that nvpmodel has set."""

    index: int
    name: str
    """ "MAXN", "15W"; empty when its configuration does not tell."""

    default: int | None
    """The mode after flashing."""

    fan: str
    """The fan's profile; empty when it is not told."""


@dataclass(frozen=True)
class Clock:
    """A clock and the bounds within which the governor may move it."""

    minimum_hertz: float
    maximum_hertz: float
    now_hertz: float

    @property
    def held(self) -> bool:
        """Whether it can't move."""
        return self.minimum_hertz == self.maximum_hertz > 0


@dataclass(frozen=True)
class JetsonClocks:
    """What ``jetson_clocks --show`` says."""

    clocks: dict[str, Clock] = field(default_factory=dict)
    """By its own names: "cpu0", "GPU", "EMC"."""

    governors: dict[str, str] = field(default_factory=dict)
    """Of the processors that are online."""

    mode: str = ""

    @property
    def held(self) -> bool:
        """Whether the GPU and every processor that is online stand still at their maximum."""
        names = [name for name in self.clocks if name in self.governors or name == "GPU"]
        return bool(names) and all(self.clocks[name].held for name in names)


def power_mode(root: Path) -> PowerMode | None:
    """The mode in force; None where there is no nvpmodel, or it has set none. Raises OSError."""
    status = root / "var/lib/nvpmodel/status"
    try:
        raw = sysfs.content(status)
    except FileNotFoundError:
        return None
    found = _STATUS.match(raw.decode("ascii", "replace").strip())
    if found is None:
        raise sysfs.fault(status, "not pmode:NUMBER", raw)
    try:
        configuration = sysfs.table(root / "etc/nvpmodel.conf")
    except OSError:
        configuration = ""
    index = int(found.group(1))
    default = _DEFAULT.search(configuration)
    return PowerMode(
        index=index,
        name=modes(root).get(index, ""),
        default=int(default.group(1)) if default else None,
        fan=found.group(2) or "",
    )


def modes(root: Path) -> dict[int, str]:
    """The names of all modes by their numbers; empty where there is no nvpmodel."""
    try:
        configuration = sysfs.table(root / "etc/nvpmodel.conf")
    except OSError:
        return {}
    return {int(number): name for number, name in _MODEL.findall(configuration)}


def jetson_clocks(root: Path, command: Command | None = None) -> JetsonClocks | None:
    """The clocks as NVIDIA's program shows them; None where there is none. Raises OSError.

    ``command`` in the place of the board's own, which wants to be run as root.
    """
    if command is None:
        program = root / _PROGRAM
        if not sysfs.exists(program):
            return None
        command = Command(program, timeout_seconds=_CLOCKS_TIMEOUT_SECONDS)
    return parse_clocks(command.run("--show"))


def parse_clocks(text: str) -> JetsonClocks:
    """What the program printed."""
    clocks = {}
    for name, *hertz in _CLOCK.findall(text):
        unit = 1000.0 if name.startswith("cpu") else 1.0
        clocks[name] = Clock(*(int(value) * unit for value in hertz))
    mode = _NAME.search(text)
    return JetsonClocks(clocks, dict(_ONLINE.findall(text)), mode.group(1) if mode else "")


@dataclass(frozen=True)
class PowerModeSensor:
    """The number of the mode: what changes it during a run changes the clocks."""

    name: str
    root: Path
    period_seconds: float = field(default=_SECONDS)

    def read(self) -> Iterable[Reading]:
        """The number that nvpmodel gives it."""
        mode = power_mode(self.root)
        return [] if mode is None else [Reading("power_mode_index", self.name, float(mode.index))]


def find(root: Path) -> list[Sensor]:
    """The mode, where nvpmodel has set one."""
    status = root / "var/lib/nvpmodel/status"
    return [PowerModeSensor("nvpmodel", root)] if sysfs.exists(status) else []
