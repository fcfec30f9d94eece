"""How often and for how long an x86 processor slowed itself down against heat, behind the kernel's back.

``/sys/devices/system/cpu/cpu*/thermal_throttle/{core,package}_throttle_count`` count since boot,
``…_throttle_total_time_ms`` is in milliseconds (Linux 5.6 and later).
Source: arch/x86/kernel/cpu/mce/therm_throt.c (drivers/thermal/intel since 5.14) of the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor


@dataclass(frozen=True)
class ThrottleCounters:
    """The counters of one package, and of its cores together.

    All logical processors of a core show the core's counters, and of a package the package's: each is
    read once.
    """

    name: str
    package: Path
    cores: tuple[Path, ...] = field(repr=False)

    def read(self) -> Iterable[Reading]:
        """Counts and seconds since boot."""
        parts: list[Callable[[], Iterable[Reading]]] = [
            lambda: self._sum(self.name, "package", (self.package,)),
            lambda: self._sum(f"{self.name} cores", "core", self.cores),
        ]
        return sysfs.each(parts)

    @staticmethod
    def _sum(source: str, kind: str, folders: tuple[Path, ...]) -> Iterable[Reading]:
        for quantity, file, unit in (
            ("throttle_events", f"{kind}_throttle_count", 1.0),
            ("throttled_seconds", f"{kind}_throttle_total_time_ms", 1000.0),
        ):
            counts = [sysfs.number_if_any(folder / file, least=0) for folder in folders]
            known = [count for count in counts if count is not None]
            if known:
                yield Reading(quantity, source, sum(known) / unit, cumulative=True)


def find(root: Path) -> list[Sensor]:
    """One sensor a package."""
    packages: dict[str, dict[str, Path]] = {}
    for path in sysfs.listed(root / "sys/devices/system/cpu", "cpu"):
        folder = path / "thermal_throttle"
        if path.name[3:].isdecimal() and sysfs.exists(folder):
            package = sysfs.word(path / "topology/physical_package_id") or "0"
            core = sysfs.word(path / "topology/core_id") or path.name
            packages.setdefault(package, {}).setdefault(core, folder)
    return [
        ThrottleCounters(f"package-{package}", next(iter(cores.values())), tuple(cores.values()))
        for package, cores in packages.items()
    ]
