"""How often a Jetson Orin or Thor was throttled because it drew too much, or its supply gave too little.

``/sys/class/hwmon/hwmon*`` called ``soctherm_oc`` has ``oc{1,2,3}_event_cnt``, counted since boot, and
``oc{N}_throt_en``, 1 where such an event throttles. On Orin 1 is under-voltage, 2 the average and 3 the
instantaneous current. Source: NVIDIA's Jetson Linux Developer Guide, "Platform Power and Performance",
over-current.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor

MEANINGS = {"oc1": "under-voltage", "oc2": "average over-current", "oc3": "instantaneous over-current"}
"""For a person."""


@dataclass(frozen=True)
class OverCurrent:
    """The counters of one module."""

    name: str
    counters: tuple[tuple[str, Path], ...]

    def read(self) -> Iterable[Reading]:
        """Events since boot."""
        parts: list[Callable[[], Iterable[Reading]]] = [
            lambda source=source, path=path: _count(source, path)  # type: ignore[misc]
            for source, path in self.counters
        ]
        return sysfs.each(parts)


def _count(source: str, path: Path) -> Iterable[Reading]:
    count = sysfs.number_if_any(path, least=0)
    if count is not None:
        yield Reading("over_current_events", source, float(count), cumulative=True)


def find(root: Path) -> list[Sensor]:
    """The counters of the module."""
    for folder in sysfs.listed(root / "sys/class/hwmon", "hwmon"):
        if sysfs.word(folder / "name") == "soctherm_oc":
            counters = tuple(
                (file.name.partition("_")[0], file)
                for file in sysfs.listed(folder, "oc")
                if file.name.endswith("_event_cnt")
            )
            return [OverCurrent("soctherm_oc", counters)] if counters else []
    return []
