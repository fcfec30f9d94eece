"""How busy an NPU is, where the kernel's driver tells.

- Intel (``intel_vpu``): ``/sys/class/accel/accel*/device/npu_busy_time_us``, microseconds with work since
  the driver started (drivers/accel/ivpu/ivpu_sysfs.c: not more than once a second, since each look wakes
  the NPU), and ``npu_current_frequency_mhz``.
- Rockchip (``rknpu``): ``/sys/kernel/debug/rknpu/load``, for root only: "NPU load:  Core0: 12%, Core1:  0%,
  Core2: 0%," on the RK3588, "NPU load:  12%" on those with one core (drivers/rknpu/rknpu_debugger.c of
  Rockchip's kernel).
  Its devfreq entry has a load that is always 0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from boardbench.agent.bench import gpu_counters
from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor
from boardbench.agent.board.sensors.gpu import Shares

_INTEL_SECONDS = 1.0
_PERCENT = 100
_ROCKCHIP = b"rockchip,"


@dataclass(frozen=True)
class IntelNpu:
    """The NPU of a Core Ultra."""

    name: str
    device: Path
    clock: Callable[[], float] = monotonic
    period_seconds: float = field(default=_INTEL_SECONDS)
    _shares: Shares = field(default_factory=Shares, compare=False, repr=False)

    def read(self) -> Iterable[Reading]:
        """Seconds of work, from the second read on its share of the time, and the clock."""
        return sysfs.each([self._busy, self._hertz])

    def _busy(self) -> Iterable[Reading]:
        seconds = sysfs.number(self.device / "npu_busy_time_us", least=0) / 1e6
        now = self.clock()
        yield Reading("busy_seconds", self.name, seconds, cumulative=True)
        share = self._shares.of(self.name, seconds, now)
        if share is not None:
            yield Reading("busy_ratio", self.name, share)

    def _hertz(self) -> Iterable[Reading]:
        megahertz = sysfs.number_if_any(self.device / "npu_current_frequency_mhz", least=0)
        # 0 while it sleeps: no clock at all.
        if megahertz and megahertz < 10**5:
            yield Reading("frequency_hertz", self.name, megahertz * 1e6)


@dataclass(frozen=True)
class RockchipNpu:
    """The NPU of a Rockchip."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """The share of time at work by core, averaged by the driver."""
        content = sysfs.table(self.path)
        loads = gpu_counters.rockchip_loads(content)
        if not loads:
            raise sysfs.fault(self.path, "no load", content.encode())
        return [
            Reading("busy_ratio", f"{self.name} {core}".rstrip(), percent / _PERCENT)
            for core, percent in loads.items()
        ]


def find(root: Path) -> list[Sensor]:
    """The NPUs of the board."""
    found: list[Sensor] = [
        IntelNpu(f"npu {path.name}", path / "device")
        for path in sysfs.listed(root / "sys/class/accel", "accel")
        if sysfs.exists(path / "device/npu_busy_time_us")
    ]
    load = root / "sys/kernel/debug/rknpu/load"
    # Where only root may look, the read tells so.
    if sysfs.exists(load) or (sysfs.hidden(load) and _has_rockchip_npu(root)):
        found.append(RockchipNpu("rknpu", load))
    return found


def _has_rockchip_npu(root: Path) -> bool:
    try:
        compatible = sysfs.content(root / "sys/firmware/devicetree/base/compatible")
    except OSError:
        return False
    devices = sysfs.listed(root / "sys/bus/platform/devices")
    return _ROCKCHIP in compatible and any(path.suffix == ".npu" for path in devices)
