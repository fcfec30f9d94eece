"""Every kind of sensor that boardbench knows. A new one is a file here and a line in the table."""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path

from boardbench.agent.board.sensor import Sensor

KINDS = (
    "thermal",
    "cpufreq",
    "x86_throttle",
    "raspberry_pi",
    "raspberry_pi_pmic",
    "fan",
    "ina3221",
    "over_current",
    "tegra_gpu",
    "nvmap",
    "power_mode",
    "gpu",
    "npu",
    "coral",
    "rapl",
    "hwmon_power",
    "battery",
    "nvidia",
)


def find_all(root: Path, kinds: Iterable[str] = KINDS) -> list[Sensor]:
    """Every sensor of these kinds on the board whose ``proc`` and ``sys`` are under ``root``.

    A kind is loaded when it is looked for: the agent waits for runs without them.
    """
    found: list[Sensor] = []
    for kind in kinds:
        found.extend(importlib.import_module(f"{__name__}.{kind}").find(root))
    return found
