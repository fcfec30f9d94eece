"""Energy that an x86 processor says it took (RAPL: running average power limit).

``/sys/class/powercap/intel-rapl:*/energy_uj`` counts microjoules up to ``max_energy_range_uj`` and begins
anew; ``name`` says of what: "package-0", within it "core", "uncore" (the GPU), "dram"; "psys" is the
platform, the widest that there is. AMD's are in the same place. Since Linux 5.10 only root may read it
(CVE-2020-8694): a read then raises PermissionError. ``intel-rapl-mmio`` shows the same packages again, by
another way. Source: Documentation/power/powercap/powercap.rst and drivers/powercap/intel_rapl_common.c of
the Linux kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Coverage, Reading, Sensor

_MICRO = 1e6


@dataclass
class Zone:
    """One counter, made to go on where it begins anew."""

    source: str
    path: Path
    coverage: Coverage
    # 0: it does not say where it begins anew.
    range_microjoules: int
    _last: int | None = field(default=None, repr=False)
    _passed: int = field(default=0, repr=False)

    def joules(self) -> float:
        """Since an arbitrary moment before the first call; never less than before. Raises OSError."""
        now = sysfs.number(self.path / "energy_uj", least=0)
        if self._last is not None and now < self._last:
            # One turn: it is read many times in the minute that the fastest turn takes.
            self._passed += max(self.range_microjoules, self._last)
        self._last = now
        return (self._passed + now) / _MICRO


@dataclass(frozen=True)
class Rapl:
    """All counters of the processors."""

    name: str
    zones: tuple[Zone, ...]

    def read(self) -> Iterable[Reading]:
        """Joules of each zone, and of all packages together where there are several."""
        joules: dict[str, float] = {}
        packages = [zone.source for zone in self.zones if _is_package(zone.source)]
        parts: list[Callable[[], Iterable[Reading]]] = [
            lambda zone=zone: _energy(zone, joules)  # type: ignore[misc]
            for zone in self.zones
        ]
        return sysfs.each([*parts, lambda: _sum(packages, joules)])


def _energy(zone: Zone, joules: dict[str, float]) -> Iterable[Reading]:
    joules[zone.source] = zone.joules()
    yield Reading("energy_joules", zone.source, joules[zone.source], cumulative=True, coverage=zone.coverage)


def _sum(packages: list[str], joules: dict[str, float]) -> Iterable[Reading]:
    if len(packages) > 1 and all(package in joules for package in packages):
        together = sum(joules[package] for package in packages)
        name = " + ".join(packages)
        yield Reading("energy_joules", name, together, cumulative=True, coverage=Coverage.CHIP)


def _is_package(source: str) -> bool:
    return source.startswith("package-") and " " not in source


def find(root: Path) -> list[Sensor]:
    """The counters of all packages, in one sensor."""
    folders = sysfs.listed(root / "sys/class/powercap", "intel-rapl:")
    if not folders:
        folders = sysfs.listed(root / "sys/class/powercap", "intel-rapl-mmio:")
    found: list[tuple[Path, str]] = []
    taken: set[str] = set()
    packages: dict[str, str] = {}
    for folder in folders:
        name = sysfs.word(folder / "name")
        number = folder.name.split(":")[1]
        if folder.name.count(":") == 1:
            packages[number] = name
        else:
            # "core" of "package-0" and of "package-1" are two.
            name = f"{packages.get(number, number)} {name}"
        if not name.strip() or not sysfs.exists(folder / "energy_uj"):
            continue
        found.append((folder, sysfs.distinct(name, folder.name, taken)))
    several = sum(_is_package(source) for _, source in found) > 1
    zones = tuple(
        Zone(source, folder, _coverage(source, several), _range(folder)) for folder, source in found
    )
    return [Rapl("rapl", zones)] if zones else []


def _coverage(source: str, several: bool) -> Coverage:
    if source == "psys":
        return Coverage.BOARD
    return Coverage.CHIP if _is_package(source) and not several else Coverage.RAIL


def _range(folder: Path) -> int:
    try:
        return sysfs.number(folder / "max_energy_range_uj", least=0)
    except OSError:
        return 0
