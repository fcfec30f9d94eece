"""The contract of a sensor. One file a kind of sensor in ``sensors/``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Reading:
    """One value: what it is, unit last, in SI ("temperature_celsius"), and of which part ("cpu-thermal")."""

    quantity: str
    source: str
    value: float


class Sensor(Protocol):
    """Something on the board that can be read again and again.

    Each file in ``sensors/`` has ``find(root: Path) -> list[Sensor]``, where ``root`` holds ``sys`` and
    ``proc``; an empty list says that the board has none of that kind.
    """

    @property
    def name(self) -> str:
        """What the system calls it; names may repeat."""
        ...

    def read(self) -> Iterable[Reading]:
        """What it says now. A value that is absent is left out; a read that fails raises OSError."""
        ...
