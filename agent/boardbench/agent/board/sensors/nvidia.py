"""NVIDIA's graphics cards by NVML: power, energy, heat, clocks, what slows them down, load and memory.

Through the package ``nvidia-ml-py`` (module ``pynvml``), which loads the driver's ``libnvidia-ml.so.1``;
without either there are no such sensors. As read: power in milliwatts, energy in millijoules since the
driver was loaded, clocks in megahertz, utilisation in percent over the driver's last period (a sixth of a
second to one), memory in bytes. What a card does not have it answers with "not supported", which is left out.
Source: docs.nvidia.com/deploy/nvml-api.
"""

from __future__ import annotations

import errno
import importlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Coverage, Reading, Sensor

REASONS = (
    (0x04, "power_capped", "the power limit"),
    (0x08, "hardware_slowdown", "heat or a drop of the supply"),
    (0x20, "thermal_slowdown", "heat"),
    (0x40, "hardware_thermal_slowdown", "heat"),
    (0x80, "power_brake", "the supply's brake"),
)
"""Bits of the clock event reasons that cost speed, the begin of the quantity's name, and words for a person.
The others are idleness, and settings."""

_MOST_PROCESSES = 16


class NvidiaGpu:
    """One card."""

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self._nvml = nvml
        self._handle = handle
        self.name = name

    def read(self) -> Iterable[Reading]:
        """Everything that this card tells."""
        parts: tuple[Callable[[], Iterable[Reading]], ...] = (
            self._power,
            self._energy,
            self._temperature,
            self._clocks,
            self._reasons,
            self._utilisation,
            self._memory,
            self._processes,
        )
        return sysfs.each(lambda part=part: self._mapped(part) for part in parts)  # type: ignore[misc]

    def _mapped(self, part: Callable[[], Iterable[Reading]]) -> Iterable[Reading]:
        """What a part reads; nothing where the card lacks it. Raises OSError."""
        nvml = self._nvml
        try:
            yield from part()
        except nvml.NVMLError as error:
            left_out = (
                nvml.NVML_ERROR_NOT_SUPPORTED,
                nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
                nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
            )
            if error.value not in left_out:
                code = errno.EACCES if error.value == nvml.NVML_ERROR_NO_PERMISSION else errno.EIO
                raise OSError(code, str(error), self.name) from error

    def _power(self) -> Iterable[Reading]:
        watts = self._nvml.nvmlDeviceGetPowerUsage(self._handle) / 1000
        yield Reading("power_watts", self.name, watts, coverage=Coverage.DEVICE)

    def _energy(self) -> Iterable[Reading]:
        joules = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        yield Reading("energy_joules", self.name, joules, cumulative=True, coverage=Coverage.DEVICE)

    def _temperature(self) -> Iterable[Reading]:
        nvml = self._nvml
        celsius = nvml.nvmlDeviceGetTemperature(self._handle, nvml.NVML_TEMPERATURE_GPU)
        yield Reading("temperature_celsius", self.name, float(celsius))

    def _clocks(self) -> Iterable[Reading]:
        nvml = self._nvml
        for source, kind in ((self.name, nvml.NVML_CLOCK_SM), (f"{self.name} memory", nvml.NVML_CLOCK_MEM)):
            yield Reading("frequency_hertz", source, nvml.nvmlDeviceGetClockInfo(self._handle, kind) * 1e6)

    def _reasons(self) -> Iterable[Reading]:
        nvml = self._nvml
        try:
            word = nvml.nvmlDeviceGetCurrentClocksEventReasons(self._handle)
        except (nvml.NVMLError_FunctionNotFound, AttributeError):
            # The name up to driver 535.
            word = nvml.nvmlDeviceGetCurrentClocksThrottleReasons(self._handle)
        for bit, name, _ in REASONS:
            yield Reading(f"{name}_now", self.name, float(bool(word & bit)))

    def _utilisation(self) -> Iterable[Reading]:
        rates = self._nvml.nvmlDeviceGetUtilizationRates(self._handle)
        yield Reading("busy_ratio", self.name, rates.gpu / 100)

    def _memory(self) -> Iterable[Reading]:
        used = self._nvml.nvmlDeviceGetMemoryInfo(self._handle).used
        yield Reading("accelerator_memory_bytes", self.name, float(used))

    def _processes(self) -> Iterable[Reading]:
        processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        known = {each.pid: each.usedGpuMemory for each in processes if each.usedGpuMemory is not None}
        for pid in sorted(known, key=lambda pid: known[pid], reverse=True)[:_MOST_PROCESSES]:
            yield Reading("accelerator_memory_bytes", f"{self.name} pid {pid}", float(known[pid]))


@dataclass(frozen=True)
class NoNvml:
    """A card with a driver, and nothing here to ask it with: the read says what is missing."""

    name: str
    reason: str

    def read(self) -> Iterable[Reading]:
        """Raises OSError, always."""
        raise OSError(errno.ENOPKG, self.reason, self.name)


def find(root: Path, module: str = "pynvml") -> list[Sensor]:
    """The cards of this machine; none for another root, whose driver nobody here can ask."""
    if root != Path("/") or not _has_driver(root):
        return []
    try:
        nvml = importlib.import_module(module)
    except ImportError:
        return []
    return open_all(nvml)


def open_all(nvml: Any) -> list[Sensor]:
    """One sensor a card, by a module with the functions of NVML."""
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        missing = (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)
        return [] if error.value in missing else [NoNvml("nvml", f"NVML does not start: {error}")]
    found: list[Sensor] = []
    try:
        found.extend(
            NvidiaGpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index), f"gpu{index}")
            for index in range(nvml.nvmlDeviceGetCount())
        )
    except nvml.NVMLError as error:
        found.append(NoNvml("nvml", f"NVML does not list its cards: {error}"))
    return found


def _has_driver(root: Path) -> bool:
    # The last is Windows' subsystem for Linux.
    return any(
        sysfs.exists(root / place) for place in ("proc/driver/nvidia/version", "dev/nvidiactl", "dev/dxg")
    )
