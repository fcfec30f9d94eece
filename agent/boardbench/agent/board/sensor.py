"""The contract of a sensor. One file a kind of sensor in ``sensors/``."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


class Coverage(enum.IntEnum):
    """How much of the board a reading of power or energy covers; the widest is the greatest."""

    RAIL = 1
    """A part of one of those below, or what the system does not tell."""

    DEVICE = 2
    """An accelerator with a supply of its own: a graphics card."""

    CHIP = 3
    """The processor's package with all that is in it."""

    MODULE = 4
    """All behind the board's own regulators, or a module without the carrier that it sits on."""

    BOARD = 5
    """Everything that the board draws."""

    @property
    def words(self) -> str:
        """For a person: "the whole board"."""
        return _WORDS[self]


_WORDS = {
    Coverage.RAIL: "one rail",
    Coverage.DEVICE: "the accelerator alone",
    Coverage.CHIP: "the processor's package",
    Coverage.MODULE: "the module without its carrier board",
    Coverage.BOARD: "the whole board",
}


@dataclass(frozen=True)
class Reading:
    """One value: what it is, unit last, in SI ("temperature_celsius"), and of which part ("cpu-thermal")."""

    quantity: str
    source: str
    value: float
    cumulative: bool = False
    """A counter that only rises: what happened in between is the difference of two readings."""

    coverage: Coverage | None = None
    """Of power and energy only. Parts are never added up: a sum that makes sense is a reading of its own."""


class Sensor(Protocol):
    """Something on the board that can be read again and again, by one thread at a time.

    Each file in ``sensors/`` has ``find(root: Path) -> list[Sensor]``, where ``root`` holds ``sys`` and
    ``proc``; an empty list says that the board has none of that kind. No two sensors of a board give readings
    of the same quantity and source.

    A sensor that is slow by nature has ``period_seconds``, and one that starts programs has
    ``child_cpu_seconds``, see :func:`period_seconds` and :func:`child_cpu_seconds`.
    """

    @property
    def name(self) -> str:
        """What the system calls it; names may repeat."""
        ...

    def read(self) -> Iterable[Reading]:
        """What it says now. A value that is absent is left out; a read that fails raises OSError.

        Of several values, those that can be read come before the error.
        """
        ...


def period_seconds(sensor: Sensor) -> float:
    """The least time between two reads that makes sense; 0: it can be read as often as one likes."""
    return float(getattr(sensor, "period_seconds", 0.0))


def child_cpu_seconds(sensor: Sensor) -> float:
    """CPU seconds that programs took which it started, all reads together."""
    return float(getattr(sensor, "child_cpu_seconds", 0.0))
