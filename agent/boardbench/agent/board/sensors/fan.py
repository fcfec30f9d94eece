"""Fans: how fast they turn and how hard they are driven, which tells a cooled board from a hot one.

``/sys/class/hwmon/hwmon*/fan*_input`` is in revolutions a minute, ``pwm*`` from 0 to 255
(Documentation/hwmon/ sysfs-interface.rst of the Linux kernel). On Jetsons the tachometer is a hwmon of its
own with the file ``rpm``, and up to JetPack 4 both are in ``/sys/devices/pwm-fan`` (``cur_pwm``,
``rpm_measured``).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor

_MOST_PWM = 255
_SPEED = re.compile(r"fan(\d+)_input|rpm|rpm_measured")
_DRIVE = re.compile(r"pwm(\d+)|cur_pwm")


@dataclass(frozen=True)
class Fans:
    """The fans of one chip."""

    name: str
    speeds: tuple[tuple[str, Path], ...]
    drives: tuple[tuple[str, Path], ...]

    def read(self) -> Iterable[Reading]:
        """Revolutions a second, and the share of the full drive."""
        parts: list[Callable[[], Iterable[Reading]]] = []
        for source, path in self.speeds:
            parts.append(lambda s=source, p=path: _speed(s, p))  # type: ignore[misc]
        for source, path in self.drives:
            parts.append(lambda s=source, p=path: _drive(s, p))  # type: ignore[misc]
        return sysfs.each(parts)


def _speed(source: str, path: Path) -> Iterable[Reading]:
    minute = sysfs.number_if_any(path, least=0)
    if minute is not None:
        yield Reading("fan_rotation_hertz", source, minute / 60)


def _drive(source: str, path: Path) -> Iterable[Reading]:
    drive = sysfs.number_if_any(path, least=0)
    if drive is None:
        return
    if drive > _MOST_PWM:
        raise sysfs.fault(path, f"above {_MOST_PWM}")
    yield Reading("fan_drive_ratio", source, drive / _MOST_PWM)


def find(root: Path) -> list[Sensor]:
    """Every chip with a fan."""
    found: list[Sensor] = []
    taken: set[str] = set()
    folders = [*sysfs.listed(root / "sys/class/hwmon", "hwmon"), root / "sys/devices/pwm-fan"]
    for folder in folders:
        files = sysfs.listed(folder)
        speeds = [(match, file) for file in files if (match := _SPEED.fullmatch(file.name))]
        drives = [(match, file) for file in files if (match := _DRIVE.fullmatch(file.name))]
        if not speeds and not drives:
            continue
        chip = sysfs.distinct(sysfs.word(folder / "name") or folder.name, folder.name, taken)
        many = len(speeds) > 1 or len(drives) > 1

        def named(
            matches: list[tuple[re.Match[str], Path]], chip: str = chip, many: bool = many
        ) -> tuple[tuple[str, Path], ...]:
            return tuple(
                (f"{chip} {match.group(1)}" if many and match.group(1) else chip, file)
                for match, file in matches
            )

        found.append(Fans(chip, named(speeds), named(drives)))
    return found
