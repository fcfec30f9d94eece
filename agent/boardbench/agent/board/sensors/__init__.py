"""Every kind of sensor that boardbench knows. A new one is a file here and a line in the table."""

from __future__ import annotations

from pathlib import Path

from boardbench.agent.board.sensor import Sensor
from boardbench.agent.board.sensors import cpufreq, thermal

_KINDS = (thermal, cpufreq)


def find_all(root: Path) -> list[Sensor]:
    """Every sensor of the board whose ``proc`` and ``sys`` are under ``root``."""
    return [sensor for kind in _KINDS for sensor in kind.find(root)]
