"""What GPUs and NPUs say of how long they worked: counters, read before and after the counted inferences.

By driver, the best first:

- ``/proc/PID/fdinfo/N``: ``drm-engine-<name>: <ns> ns`` of this process alone; xe counts
  ``drm-cycles-<name>`` of ``drm-total-cycles-<name>`` (Documentation/gpu/drm-usage-stats.rst of the Linux
  kernel).
- ``/sys/class/drm/card*/device/gpu_stats`` of v3d and panfrost: a line a queue with the time, the jobs and
  the nanoseconds of work (drivers/gpu/drm/v3d/v3d_sysfs.c).
- ``/sys/class/accel/accel*/device/npu_busy_time_us`` of intel_vpu (drivers/accel/ivpu/ivpu_sysfs.c).
- NVML: the driver keeps the utilisation of the last seconds, sample by sample (nvmlDeviceGetSamples).
- Loads of the moment, which say little by themselves: ``gpu_busy_percent`` of amdgpu (percent), ``load`` of
  Tegra (thousandths) and of devfreq ("12@800000000Hz", percent).
- Time asleep, which says only that a GPU did not work: ``rc6_residency_ms`` of i915, ``idle_residency_ms``
  of xe.

A file that is not there, or holds something else, is left out: this is evidence, and no evidence is none.
"""

from __future__ import annotations

import ctypes
import enum
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

NVML_LIBRARY = "libnvidia-ml.so.1"

_WHOLE_STREAM = ("i915", "xe", "v3d", "panfrost", "panthor", "msm", "etnaviv")
"""Drivers through which all work goes: what their fdinfo does not count did not run. With amdgpu and
others, compute goes past the kernel (user queues)."""

_ENGINE = re.compile(
    r"^drm-(engine|cycles|total-cycles)-([\w-]{1,32}):\s*(\d{1,20})(?: ns)?\s*$", re.MULTILINE
)
_DRIVER = re.compile(r"^drm-driver:\s*(\S{1,32})\s*$", re.MULTILINE)
_CLIENT = re.compile(r"^drm-client-id:\s*(\d{1,20})\s*$", re.MULTILINE)
_DEVICE = re.compile(r"^drm-pdev:\s*(\S{1,64})\s*$", re.MULTILINE)
_QUEUE = re.compile(r"^(\w[\w-]{0,31})[ \t]+(\d{1,20})[ \t]+(\d{1,20})[ \t]+(\d{1,20})[ \t]*$", re.MULTILINE)
_DEVFREQ_LOAD = re.compile(r"(\d{1,3})(?:@\d{1,12}(?:Hz)?)?")
_WHOLE = re.compile(r"\d{1,18}")

_TEGRA_GPUS = (".gpu", ".ga10b", ".gv11b", ".gp10b", ".gb10b")


class Meaning(enum.Enum):
    """What a reading says."""

    WORK = "work"
    """Rises while the accelerator works."""

    SLEEP = "sleep"
    """Rises while it saves power; awake is not yet at work."""

    LOAD = "load"
    """The share of time at work just now, in thousandths."""


@dataclass(frozen=True)
class Busy:
    """One reading."""

    name: str
    """Where it was read, and its unit."""

    family: str
    """The driver: "i915", "nvidia", "tegra", …."""

    kind: str
    """ "gpu" or "npu"."""

    meaning: Meaning
    value: int
    seconds: float = 0.0
    """That one count stands for; 0 where it counts cycles, or is a load."""

    of: Optional[int] = None
    """The clock that belongs to it, in the same unit: all cycles, or the time up to which was counted."""

    own: bool = False
    """Whether it counts the work of this process alone."""

    complete: bool = False
    """With ``own``: whether no work of the process is left out."""

    place: str = ""
    """The device, where that can be told: "/sys/class/drm/card0", "0000:00:02.0", "NVML GPU 0"."""


def busy(root: Path, nvml: Optional[Nvml] = None) -> Tuple[Busy, ...]:
    """Everything that the board below ``root`` says now of how busy its accelerators are; never raises."""
    found: List[Busy] = []
    for read in (_own_engines, _queues, _npus, _rockchip_npu, _amdgpu, _tegra, _devfreq, _asleep):
        try:
            found.extend(read(root))
        except OSError:
            continue
    if nvml is not None:
        found.extend(nvml.busy())
    names = set()
    distinct = []
    for reading in found:
        if reading.name not in names:
            names.add(reading.name)
            distinct.append(reading)
    return tuple(distinct)


# Files


def text(path: Path) -> str:
    """The content of a file; empty when it can't be read."""
    try:
        descriptor = os.open(str(path), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            return os.read(descriptor, 4096).decode("utf-8", "replace").strip("\0 \r\n\t")
        finally:
            os.close(descriptor)
    except OSError:
        return ""


def listed(folder: Path, begin: str = "") -> List[Path]:
    """What is in the folder and begins like that; nothing where it can't be listed."""
    try:
        return sorted(path for path in folder.iterdir() if path.name.startswith(begin))
    except OSError:
        return []


def _number(path: Path) -> Optional[int]:
    found = text(path)
    return int(found) if _WHOLE.fullmatch(found) else None


def _told(path: Path, root: Path) -> str:
    """The path as it is on the board."""
    try:
        return f"/{path.relative_to(root)}"
    except ValueError:
        return str(path)


def cards(root: Path) -> Iterator[Tuple[Path, str]]:
    """Every graphics card with the name of its driver ("" where it does not say): card0, not its outputs."""
    for path in listed(root / "sys/class/drm", "card"):
        if path.name[4:].isdigit():
            yield path, driver_of(path / "device")


def driver_of(device: Path) -> str:
    """The driver of a device, by its link or its uevent; empty when it has none."""
    try:
        return (device / "driver").readlink().name
    except OSError:
        found = re.search(r"^DRIVER=(\S{1,64})$", text(device / "uevent"), re.MULTILINE)
        return found.group(1) if found else ""


# Readings


def _own_engines(root: Path) -> Iterator[Busy]:
    """Engine time of this process, once for each of its clients: several descriptors may be one."""
    seen = set()
    sums: Dict[Tuple[str, str, str, str], int] = {}
    for path in listed(root / "proc/self/fdinfo"):
        content = text(path)
        driver = _DRIVER.search(content)
        if driver is None:
            continue
        device, client = _DEVICE.search(content), _CLIENT.search(content)
        place = device.group(1) if device else ""
        identity = (driver.group(1), place, client.group(1) if client else path.name)
        if identity in seen:
            continue
        seen.add(identity)
        for what, engine, value in _ENGINE.findall(content):
            key = (driver.group(1), place, what, engine)
            # All clients see the same clock.
            sums[key] = (
                max(sums.get(key, 0), int(value)) if what == "total-cycles" else sums.get(key, 0) + int(value)
            )
    for (driver_name, place, what, engine), value in sums.items():
        if what == "total-cycles" or engine.startswith("capacity"):
            continue
        unit = "ns" if what == "engine" else "cycles"
        where = f" {place}" if place else ""
        yield Busy(
            name=f"/proc/self/fdinfo {driver_name}{where} {engine} ({unit})",
            family=driver_name,
            kind="npu" if driver_name in ("intel_vpu", "rknpu", "rocket") else "gpu",
            meaning=Meaning.WORK,
            value=value,
            seconds=1e-9 if what == "engine" else 0.0,
            of=sums.get((driver_name, place, "total-cycles", engine)) if what == "cycles" else None,
            own=True,
            complete=driver_name in _WHOLE_STREAM,
            place=place,
        )


def queues(content: str) -> Iterator[Tuple[str, int, int, int]]:
    """Name, clock and work in nanoseconds, and jobs of each queue in a ``gpu_stats``."""
    for name, clock, jobs, runtime in _QUEUE.findall(content):
        yield name, int(clock), int(runtime), int(jobs)


def _queues(root: Path) -> Iterator[Busy]:
    for path, driver in cards(root):
        file = path / "device/gpu_stats"
        for name, clock, runtime, _ in queues(text(file)):
            yield Busy(
                name=f"{_told(file, root)} {name} (ns)",
                family=driver or "v3d",
                kind="gpu",
                meaning=Meaning.WORK,
                value=runtime,
                seconds=1e-9,
                of=clock,
                place=_told(path, root),
            )


def _npus(root: Path) -> Iterator[Busy]:
    for path in listed(root / "sys/class/accel", "accel"):
        file = path / "device/npu_busy_time_us"
        value = _number(file)
        if value is not None:
            yield Busy(
                _told(file, root),
                "intel_vpu",
                "npu",
                Meaning.WORK,
                value,
                seconds=1e-6,
                place=_told(path, root),
            )


def rockchip_loads(content: str) -> Dict[str, int]:
    """Percent by core ("" where there is one) in ``NPU load:  Core0: 12%, Core1:  0%,``."""
    if not content.startswith("NPU load:"):
        return {}
    cores = {name: int(value) for name, value in re.findall(r"(Core\d{1,2}):\s*(\d{1,3})%", content)}
    single = re.fullmatch(r"NPU load:\s*(\d{1,3})%,?", content.strip())
    found = {"": int(single.group(1))} if single else cores
    return {name: value for name, value in found.items() if value <= 100}


def _rockchip_npu(root: Path) -> Iterator[Busy]:
    file = root / "sys/kernel/debug/rknpu/load"
    for core, percent in rockchip_loads(text(file)).items():
        yield Busy(f"{_told(file, root)} {core}".rstrip(), "rknpu", "npu", Meaning.LOAD, percent * 10)


def _amdgpu(root: Path) -> Iterator[Busy]:
    for path, driver in cards(root):
        file = path / "device/gpu_busy_percent"
        value = _number(file)
        if value is not None and value <= 100:
            name, place = _told(file, root), _told(path, root)
            yield Busy(name, driver or "amdgpu", "gpu", Meaning.LOAD, value * 10, place=place)


def _tegra(root: Path) -> Iterator[Busy]:
    devices = root / "sys/devices"
    folders = [devices / "platform/gpu.0", devices / "gpu.0"]
    for folder in (devices / "platform", root / "sys/class/devfreq"):
        within = "device" if folder.name == "devfreq" else ""
        folders += [path / within for path in listed(folder) if path.suffix in _TEGRA_GPUS]
    for path in folders:
        value = _number(path / "load")
        if value is not None and value <= 1000:
            name, place = _told(path / "load", root), _told(path, root)
            yield Busy(name, "tegra", "gpu", Meaning.LOAD, value, place=place)
            return


def devfreq_load(content: str) -> Optional[int]:
    """Percent in "12@800000000Hz" or "12"; None when it is neither."""
    found = _DEVFREQ_LOAD.fullmatch(content.strip())
    value = int(found.group(1)) if found else 101
    return value if value <= 100 else None


def devfreqs(root: Path) -> Iterator[Path]:
    """Clocks of GPUs with a load."""
    # Memory controllers have one, too, and Rockchip's NPU one that is always 0.
    for path in listed(root / "sys/class/devfreq"):
        named = re.search(r"gpu|mali|v3d|kgsl", path.name.lower())
        if named and devfreq_load(text(path / "load")) is not None:
            yield path


def _devfreq(root: Path) -> Iterator[Busy]:
    for path in devfreqs(root):
        value = devfreq_load(text(path / "load"))
        if value is not None:
            name, place = _told(path / "load", root), _told(path, root)
            yield Busy(name, "devfreq", "gpu", Meaning.LOAD, value * 10, place=place)


def sleepers(card: Path) -> Iterator[Tuple[Path, str]]:
    """Files with the milliseconds that parts of a card slept, and the driver that writes them."""
    parts = listed(card / "gt", "gt")
    files = [part / "rc6_residency_ms" for part in parts] or [card / "power/rc6_residency_ms"]
    for file in files:
        if _number(file) is not None:
            yield file, "i915"
    for tile in listed(card / "device", "tile"):
        for part in listed(tile, "gt"):
            file = part / "gtidle/idle_residency_ms"
            if _number(file) is not None:
                yield file, "xe"


def _asleep(root: Path) -> Iterator[Busy]:
    for path, _ in cards(root):
        for file, driver in sleepers(path):
            value = _number(file)
            if value is not None:
                name, place = _told(file, root), _told(path, root)
                yield Busy(name, driver, "gpu", Meaning.SLEEP, value, seconds=1e-3, place=place)


# NVML


class _Sample(ctypes.Structure):
    # The value is a union; for utilisation it is an unsigned int in its first four bytes.
    _fields_ = (("micros", ctypes.c_ulonglong), ("value", ctypes.c_uint), ("rest", ctypes.c_uint))


_GPU_UTILIZATION = 1  # NVML_GPU_UTILIZATION_SAMPLES
_UNSIGNED_INT = 1  # NVML_VALUE_TYPE_UNSIGNED_INT
_MOST_SAMPLES = 4096
# The driver takes a sample each sixth of a second at least; a longer gap is none of its making.
_LONGEST_GAP_MICROS = 2_000_000


class Nvml:
    """NVIDIA's library, as far as it keeps the utilisation of the last seconds.

    By ctypes and not by its Python package: the interpreter that runs the engine may lack it.
    """

    def __init__(self, library: ctypes.CDLL, devices: List[Tuple[str, ctypes.c_void_p]]) -> None:
        """See :meth:`open`."""
        self._library = library
        self._devices = devices
        self._last: Dict[str, int] = {}
        self._busy_micros: Dict[str, float] = {}
        self._covered_micros: Dict[str, int] = {}

    @classmethod
    def open(cls, library: str = NVML_LIBRARY) -> Optional[Nvml]:
        """The library with its devices; None where it is not there, or finds none."""
        try:
            loaded = ctypes.CDLL(library)
            loaded.nvmlDeviceGetHandleByIndex_v2.argtypes = [ctypes.c_uint, ctypes.POINTER(ctypes.c_void_p)]
            loaded.nvmlDeviceGetSamples.argtypes = [
                ctypes.c_void_p,
                ctypes.c_int,
                ctypes.c_ulonglong,
                ctypes.POINTER(ctypes.c_int),
                ctypes.POINTER(ctypes.c_uint),
                ctypes.POINTER(_Sample),
            ]
            if loaded.nvmlInit_v2() != 0:
                return None
            count = ctypes.c_uint(0)
            if loaded.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
                count.value = 0
        except (OSError, AttributeError):
            return None
        devices = []
        for index in range(min(count.value, 64)):
            handle = ctypes.c_void_p()
            if loaded.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle)) == 0:
                devices.append((f"NVML GPU {index}", handle))
        if not devices:
            loaded.nvmlShutdown()
            return None
        return cls(loaded, devices)

    def busy(self) -> Iterator[Busy]:
        """Microseconds at work of each GPU since the first call, of those that its samples cover."""
        for name, handle in self._devices:
            samples = self._samples(handle, self._last.get(name, 0))
            if samples is None:
                continue
            self._take(name, samples)
            yield Busy(
                name=f"{name} utilisation samples (us)",
                family="nvidia",
                kind="gpu",
                meaning=Meaning.WORK,
                value=round(self._busy_micros.get(name, 0.0)),
                seconds=1e-6,
                of=self._covered_micros.get(name, 0),
                place=name,
            )

    def close(self) -> None:
        """Lets go of the library. Idempotent."""
        if self._devices:
            self._devices = []
            self._library.nvmlShutdown()

    def _take(self, name: str, samples: List[Tuple[int, int]]) -> None:
        """Adds what came since the last call; the first call only says where to begin."""
        begun = name in self._last
        last = self._last.get(name, 0)
        for micros, percent in samples:
            gap = micros - last
            if begun and 0 < gap <= _LONGEST_GAP_MICROS:
                self._busy_micros[name] = self._busy_micros.get(name, 0.0) + gap * percent / 100
                self._covered_micros[name] = self._covered_micros.get(name, 0) + gap
            last = max(last, micros)
        if samples or not begun:
            self._last[name] = last

    def _samples(self, handle: ctypes.c_void_p, since: int) -> Optional[List[Tuple[int, int]]]:
        """Microseconds and percent of each sample since then; None where the device tells none."""
        kind, count = ctypes.c_int(0), ctypes.c_uint(0)
        ask = self._library.nvmlDeviceGetSamples
        arguments = (handle, _GPU_UTILIZATION, ctypes.c_ulonglong(since), ctypes.byref(kind))
        if ask(*arguments, ctypes.byref(count), None) != 0:
            # NOT_FOUND says that there is nothing new.
            return [] if since else None
        count.value = min(count.value, _MOST_SAMPLES)
        buffer = (_Sample * max(1, count.value))()
        if ask(*arguments, ctypes.byref(count), buffer) != 0 or kind.value != _UNSIGNED_INT:
            return [] if since else None
        found = [
            (int(buffer[at].micros), int(buffer[at].value)) for at in range(min(count.value, len(buffer)))
        ]
        return sorted((micros, percent) for micros, percent in found if micros > since and percent <= 100)
