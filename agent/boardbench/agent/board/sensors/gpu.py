"""How busy graphics cards are, as the kernel's drivers tell, with their clock, heat and memory.

- amdgpu: ``device/gpu_busy_percent``, ``device/mem_info_vram_used`` (bytes),
  ``device/hwmon/hwmon*/freq1_input`` (Hz) and ``temp1_input`` (thousandths of a degree).
  Documentation/gpu/amdgpu/thermal.rst of the Linux kernel.
- v3d (Raspberry Pi 4 and 5) and panfrost: ``device/gpu_stats``, a line a queue with clock, jobs and work in
  nanoseconds. drivers/gpu/drm/v3d/v3d_sysfs.c.
- i915: ``gt/gt*/rc6_residency_ms`` (``power/rc6_residency_ms`` up to Linux 5.18),
  ``gt/gt0/rps_act_freq_mhz``; xe: ``device/tile*/gt*/gtidle/idle_residency_ms``. They tell when the GPU
  slept: awake is an upper bound of busy.
- devfreq of others (Mali, Adreno): ``/sys/class/devfreq/*/load``, "12@800000000Hz", and ``cur_freq`` (Hz).

All in ``/sys/class/drm/card*``. NVIDIA's are in ``nvidia.py`` and ``tegra_gpu.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

from boardbench.agent.bench import gpu_counters
from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor

_PERCENT = 100
_MOST_HERTZ = 10**11
# Documentation/hwmon: the edge of the chip, the only one that all generations have.
_TEMPERATURE = "temp1_input"


class Shares:
    """Turns counters into the share of the time between two reads."""

    def __init__(self) -> None:
        self._last: dict[str, tuple[float, float]] = {}

    def of(self, source: str, seconds: float, clock_seconds: float) -> float | None:
        """By how much ``seconds`` rose for each second of the clock, 0 to 1; None at the first look."""
        before = self._last.get(source)
        self._last[source] = (seconds, clock_seconds)
        if before is None or clock_seconds <= before[1]:
            return None
        # Both are read at slightly different moments.
        return min(1.0, max(0.0, (seconds - before[0]) / (clock_seconds - before[1])))


@dataclass(frozen=True)
class AmdGpu:
    """A card with the driver amdgpu."""

    name: str
    device: Path
    hwmon: Path | None

    def read(self) -> Iterable[Reading]:
        """Load, memory in use, clock and temperature."""
        parts: list[Callable[[], Iterable[Reading]]] = [self._busy, self._memory]
        if self.hwmon is not None:
            parts.append(lambda folder=self.hwmon: self._chip(folder))  # type: ignore[misc]
        return sysfs.each(parts)

    def _busy(self) -> Iterable[Reading]:
        path = self.device / "gpu_busy_percent"
        percent = sysfs.number_if_any(path, least=0)
        if percent is None:
            return
        if percent > _PERCENT:
            raise sysfs.fault(path, f"{percent} %")
        yield Reading("busy_ratio", self.name, percent / _PERCENT)

    def _memory(self) -> Iterable[Reading]:
        used = sysfs.number_if_any(self.device / "mem_info_vram_used", least=0)
        if used is not None:
            yield Reading("accelerator_memory_bytes", self.name, float(used))

    def _chip(self, folder: Path) -> Iterable[Reading]:
        hertz = sysfs.number_if_any(folder / "freq1_input", least=0)
        if hertz is not None and hertz <= _MOST_HERTZ:
            yield Reading("frequency_hertz", self.name, float(hertz))
        milli = sysfs.number_if_any(folder / _TEMPERATURE)
        if milli is not None and abs(milli) < 1_000_000:
            yield Reading("temperature_celsius", self.name, milli / 1000)


@dataclass(frozen=True)
class Queues:
    """A GPU whose driver counts the work of each queue."""

    name: str
    path: Path
    _shares: Shares = field(default_factory=Shares, compare=False, repr=False)

    def read(self) -> Iterable[Reading]:
        """Seconds of work by queue, and from the second read on its share of the time."""
        content = sysfs.content(self.path)
        queues = list(gpu_counters.queues(content.decode("ascii", "replace")))
        if not queues:
            raise sysfs.fault(self.path, "no queue", content)
        for queue, clock, runtime, _ in queues:
            source = f"{self.name} {queue}"
            seconds = runtime / 1e9
            yield Reading("busy_seconds", source, seconds, cumulative=True)
            share = self._shares.of(source, seconds, clock / 1e9)
            if share is not None:
                yield Reading("busy_ratio", source, share)


@dataclass(frozen=True)
class Sleeper:
    """A part of an Intel GPU of which the driver counts how long it slept."""

    name: str
    path: Path
    clock: Callable[[], float] = monotonic
    frequency: Path | None = None
    _shares: Shares = field(default_factory=Shares, compare=False, repr=False)

    def read(self) -> Iterable[Reading]:
        """Seconds asleep, from the second read on the share of the time awake, and the clock."""
        parts: list[Callable[[], Iterable[Reading]]] = [self._asleep]
        if self.frequency is not None:
            parts.append(lambda path=self.frequency: self._hertz(path))  # type: ignore[misc]
        return sysfs.each(parts)

    def _asleep(self) -> Iterable[Reading]:
        seconds = sysfs.number(self.path, least=0) / 1000
        now = self.clock()
        yield Reading("asleep_seconds", self.name, seconds, cumulative=True)
        share = self._shares.of(self.name, seconds, now)
        if share is not None:
            yield Reading("awake_ratio", self.name, 1.0 - share)

    def _hertz(self, path: Path) -> Iterable[Reading]:
        megahertz = sysfs.number_if_any(path, least=0)
        # 0 while it sleeps: no clock at all.
        if megahertz and megahertz <= _MOST_HERTZ // 10**6:
            yield Reading("frequency_hertz", self.name, megahertz * 1e6)


@dataclass(frozen=True)
class Devfreq:
    """A GPU whose clock devfreq governs by its load."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """Load and clock."""
        parts: list[Callable[[], Iterable[Reading]]] = [self._busy, self._clock]
        return sysfs.each(parts)

    def _busy(self) -> Iterable[Reading]:
        path = self.path / "load"
        content = sysfs.content(path)
        percent = gpu_counters.devfreq_load(content.decode("ascii", "replace"))
        if percent is None:
            raise sysfs.fault(path, "no load", content)
        yield Reading("busy_ratio", self.name, percent / _PERCENT)

    def _clock(self) -> Iterable[Reading]:
        hertz = sysfs.number_if_any(self.path / "cur_freq", least=0)
        if hertz is not None and hertz <= _MOST_HERTZ:
            yield Reading("frequency_hertz", self.name, float(hertz))


def find(root: Path) -> list[Sensor]:
    """The GPUs of the board."""
    found: list[Sensor] = []
    for card, driver in gpu_counters.cards(root):
        device = card / "device"
        if sysfs.exists(device / "gpu_busy_percent"):
            chips = sysfs.listed(device / "hwmon", "hwmon")
            found.append(AmdGpu(f"{driver or 'amdgpu'} {card.name}", device, chips[0] if chips else None))
        if sysfs.exists(device / "gpu_stats"):
            found.append(Queues(driver or "v3d", device / "gpu_stats"))
        for path, kind in gpu_counters.sleepers(card):
            part = path.parent.parent.name if path.parent.name == "gtidle" else path.parent.name
            # Of several tiles each has a gt of its own number.
            name = f"{kind} {card.name}" if part == "power" else f"{kind} {card.name} {part}"
            frequency = path.parent / "rps_act_freq_mhz"
            found.append(Sleeper(name, path, frequency=frequency if sysfs.exists(frequency) else None))
    found += [Devfreq(path.name, path) for path in gpu_counters.devfreqs(root)]
    return found
