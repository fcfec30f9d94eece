"""Memory that a Jetson's GPU holds: it is the board's own, and in no process's resident set.

``NvMapMemUsed`` in ``/proc/meminfo`` (kB) is all of it, for everybody to read.
``/sys/kernel/debug/nvmap/iovmm/ clients`` has it by process, for root only::

    CLIENT                        PROCESS      PID        SIZE
    user                             python3    5120    1843200K
    total                                               1901736K

Sources: CUDA for Tegra, "Estimating Total Allocatable Device Memory"; drivers/video/tegra/nvmap/nvmap_dev.c
of NVIDIA's kernel.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from boardbench.agent.board import sysfs
from boardbench.agent.board.sensor import Reading, Sensor
from boardbench.agent.board.sensors.tegra_gpu import compatible_with_tegra

_MEMINFO = re.compile(r"^NvMapMemUsed:\s+(\d{1,15}) kB$", re.MULTILINE)
_CLIENT = re.compile(r"^user\s+(\S+)\s+(\d{1,9})\s+(\d{1,15})K$", re.MULTILINE)
_TOTAL = re.compile(r"^total\s+(\d{1,15})K$", re.MULTILINE)
_KILO = 1024.0
# Of many clients the largest matter; a sampler keeps a series for each.
_MOST_CLIENTS = 16


@dataclass(frozen=True)
class MemoryTotal:
    """All that the GPU holds, as the kernel tells everybody."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """Bytes in use."""
        found = _MEMINFO.search(sysfs.table(self.path))
        if found is None:
            return []
        return [Reading("accelerator_memory_bytes", self.name, int(found.group(1)) * _KILO)]


@dataclass(frozen=True)
class MemoryClients:
    """What each process holds."""

    name: str
    path: Path

    def read(self) -> Iterable[Reading]:
        """Bytes by process ("nvmap pid 5120"), and of all."""
        text = sysfs.table(self.path)
        used: dict[int, float] = {}
        for _, pid, size in _CLIENT.findall(text):
            used[int(pid)] = used.get(int(pid), 0.0) + int(size) * _KILO
        total = _TOTAL.search(text)
        if total is None:
            raise sysfs.fault(self.path, "no line of the total", text.encode())
        largest = sorted(used, key=lambda pid: used[pid], reverse=True)[:_MOST_CLIENTS]
        yield Reading("accelerator_memory_bytes", self.name, int(total.group(1)) * _KILO)
        for pid in largest:
            yield Reading("accelerator_memory_bytes", f"{self.name} pid {pid}", used[pid])


def find(root: Path) -> list[Sensor]:
    """Both, where they are; the clients also where only root may look, to be told so by the read."""
    found: list[Sensor] = []
    meminfo = root / "proc/meminfo"
    try:
        if _MEMINFO.search(sysfs.table(meminfo)):
            found.append(MemoryTotal("NvMapMemUsed", meminfo))
    except OSError:
        pass
    clients = root / "sys/kernel/debug/nvmap/iovmm/clients"
    if sysfs.exists(clients) or (sysfs.hidden(clients) and compatible_with_tegra(root)):
        found.append(MemoryClients("nvmap", clients))
    return found
