"""How busy a Jetson's integrated GPU is, its clock and the clock's limits.

``load`` in the GPU's folder is in thousandths, averaged by the driver over its last period: ``/sys/devices/
platform/gpu.0`` and ``/sys/devices/gpu.0`` lead there, as does the ``device`` of its devfreq entry, whatever
the chip calls it (``17000000.gpu``, ``.ga10b``, ``.gv11b``, ``.gp10b``, ``57000000.gpu``). devfreq's
``cur_freq`` and ``max_freq`` are in hertz (Documentation/ABI/testing/sysfs-class-devfreq of the Linux
kernel). Source: NVIDIA's nvgpu driver (drivers/gpu/nvgpu/os/linux/scale.c, sysfs.c); rbonghi/jetson_stats
reads the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor

GPUS = (".gpu", ".ga10b", ".gv11b", ".gp10b", ".gb10b")
"""How the names of such devices end."""

_THOUSAND = 1000
_MOST_HERTZ = 10**11
_CLOCKS = (
    ("frequency_hertz", "cur_freq"),
    ("frequency_limit_hertz", "max_freq"),
)


@dataclass(frozen=True)
class TegraGpu:
    """The integrated GPU."""

    name: str
    load: Path | None
    clock: Path | None

    def read(self) -> Iterable[Reading]:
        """The share of time in which it was busy, and its clock."""
        parts: list[Callable[[], Iterable[Reading]]] = []
        if self.load is not None:
            parts.append(lambda path=self.load: _busy(self.name, path))  # type: ignore[misc]
        if self.clock is not None:
            parts += [
                lambda quantity=quantity, path=self.clock / file: _hertz(self.name, quantity, path)  # type: ignore[misc]
                for quantity, file in _CLOCKS
            ]
        return sysfs.each(parts)


def _busy(source: str, path: Path) -> Iterable[Reading]:
    load = sysfs.number_if_any(path, least=0)
    if load is None:
        return
    if load > _THOUSAND:
        raise sysfs.fault(path, f"{load}, above {_THOUSAND}")
    yield Reading("busy_ratio", source, load / _THOUSAND)


def _hertz(source: str, quantity: str, path: Path) -> Iterable[Reading]:
    hertz = sysfs.number_if_any(path, least=0)
    if hertz is None:
        return
    if hertz > _MOST_HERTZ:
        raise sysfs.fault(path, f"{hertz} Hz")
    yield Reading(quantity, source, float(hertz))


def find(root: Path) -> list[Sensor]:
    """The GPU of the module."""
    devfreq = root / "sys/class/devfreq"
    clocks = [path for path in sysfs.listed(devfreq) if path.suffix in GPUS and _is_tegra(path, root)]
    devices = root / "sys/devices"
    folders = [devices / "platform/gpu.0", devices / "gpu.0", *(clock / "device" for clock in clocks)]
    folders += [path for path in sysfs.listed(devices / "platform") if path.suffix in GPUS]
    loads = [path / "load" for path in folders if sysfs.exists(path / "load")]
    if not clocks and not loads:
        return []
    return [TegraGpu("gpu", loads[0] if loads else None, clocks[0] if clocks else None)]


def _is_tegra(clock: Path, root: Path) -> bool:
    """Other makers call their GPUs so, too: Mali on Rockchip is fb000000.gpu."""
    if clock.suffix != ".gpu":
        return True
    return compatible_with_tegra(root)


def compatible_with_tegra(root: Path) -> bool:
    """Whether the board's device tree says that it is one of NVIDIA's."""
    try:
        return b"nvidia,tegra" in sysfs.content(root / "sys/firmware/devicetree/base/compatible")
    except OSError:
        return False
