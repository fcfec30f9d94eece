"""A copy of the files in which this board tells what it is and how it is, for tests that run anywhere.

Only what ``board/identify.py`` and the sensors read is copied, by patterns. What names this one board or its
owner is left out or replaced: serial numbers, MAC addresses, UUIDs, the machine id, the host's name.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

from boardbench.agent.errors import ConfigurationError
from boardbench.v1 import agent_pb2

NOTE = "RECORDED.json"
MACHINE_ID = "0" * 31 + "1"
"""Stands in the place of the real one; as long, so that what reads it goes its usual way."""

# Two levels of a class are enough: a sensor is a folder of files.
_PATTERNS = (
    "proc/cpuinfo",
    "proc/meminfo",
    "proc/loadavg",
    "proc/stat",
    "proc/vmstat",
    "proc/pressure/*",
    "proc/swaps",
    "proc/sys/kernel/osrelease",
    "proc/sys/kernel/hostname",
    "proc/driver/nvidia/gpus/*/information",
    "etc/os-release",
    "etc/machine-id",
    "etc/nv_tegra_release",
    "etc/nvpmodel.conf",
    "etc/nvpmodel/*.conf",
    "var/lib/nvpmodel/status",
    "sys/firmware/devicetree/base/model",
    "sys/firmware/devicetree/base/compatible",
    "sys/class/dmi/id/sys_vendor",
    "sys/class/dmi/id/product_name",
    "sys/class/dmi/id/product_version",
    "sys/class/thermal/*/*",
    "sys/class/hwmon/*/*",
    "sys/class/hwmon/*/device/*",
    "sys/class/power_supply/*/*",
    "sys/class/powercap/*/*",
    "sys/class/devfreq/*/*",
    "sys/class/apex/*/*",
    "sys/class/accel/accel*/*",
    "sys/class/accel/accel*/device/*",
    "sys/class/drm/card[0-9]*/device/*",
    "sys/class/drm/card[0-9]*/device/hwmon/hwmon*/*",
    "sys/class/drm/card[0-9]*/device/tile*/gt*/*",
    "sys/class/drm/card[0-9]*/device/tile*/gt*/*/*",
    "sys/class/drm/card[0-9]*/gt/gt*/*",
    "sys/devices/system/cpu/online",
    "sys/devices/system/cpu/intel_pstate/*",
    "sys/devices/system/cpu/cpufreq/*",
    "sys/devices/system/cpu/cpu[0-9]*/cpu_capacity",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/*",
    "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/*",
    "sys/devices/system/cpu/cpu[0-9]*/topology/*",
    "sys/devices/system/clocksource/clocksource0/*",
    "sys/devices/cpu_core/cpus",
    "sys/devices/cpu_atom/cpus",
    "sys/devices/platform/soc*/*firmware/get_throttled",
    "sys/devices/platform/*/load",
    "sys/devices/platform/*/devfreq/*/*",
    "sys/bus/i2c/devices/*/name",
    "sys/bus/i2c/devices/*/hwmon/hwmon*/*",
    "sys/bus/i2c/drivers/ina3221*/*/hwmon/hwmon*/*",
    "sys/bus/i2c/drivers/ina3221*/*/iio:device*/*",
    "sys/bus/usb/devices/*/idVendor",
    "sys/bus/usb/devices/*/idProduct",
    "sys/bus/usb/devices/*/speed",
    "sys/bus/usb/devices/*/busnum",
    "sys/bus/usb/devices/*/devnum",
    "sys/bus/usb/devices/*/power/control",
    "sys/bus/usb/devices/*/bConfigurationValue",
    "sys/bus/usb/devices/*/bcdDevice",
    "sys/bus/usb/devices/*/bInterfaceClass",
    "sys/bus/usb/devices/*/bInterfaceNumber",
    "sys/bus/usb/devices/*/urbnum",
    "sys/bus/usb/devices/*/version",
    "sys/bus/pci/devices/*/vendor",
    "sys/bus/pci/devices/*/device",
    "sys/bus/pci/devices/*/class",
    "sys/kernel/debug/nvmap/iovmm/clients",
    "sys/kernel/debug/rknpu/load",
)
# Files that only have a name, and say enough by it.
_NAMES = ("sys/bus/platform/devices/*",)
_NOT_COPIED = re.compile(
    r"serial|uuid|asset|address|mac$|wwid|unique_id|vpd|^rom$|^resource|^config$|^remove$"
)
_MOST_BYTES = 64 * 1024

_SCRUBBED = (
    # "Serial : 10000000abcdef01" of a 32-bit kernel's cpuinfo, POWER_SUPPLY_SERIAL_NUMBER=… of an uevent.
    (re.compile(rb"(?im)^([^\n]*serial[^\n:=]*[:=][ \t]*)\S[^\n]*"), rb"\1removed"),
    (re.compile(rb"(?i)\b[0-9a-f]{2}(?::[0-9a-f]{2}){5}\b"), b"00:00:00:00:00:00"),
    (
        re.compile(rb"(?i)\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"),
        b"00000000-0000-0000-0000-000000000000",
    ),
)


def record(root: Path, folder: Path, described: agent_pb2.DescribeResponse) -> list[str]:
    """Copies the board's files into ``folder``, which must not be there yet; what was copied, by path.

    Raises ConfigurationError where the folder can't be made.
    """
    try:
        folder.mkdir(parents=True)
    except OSError as error:
        raise ConfigurationError(
            f"--record {folder}: {error.strerror}; name a folder that is not there yet"
        ) from error
    copied: list[str] = []
    host = _read(root / "proc/sys/kernel/hostname").strip()
    for path in _files(root):
        name = path.relative_to(root).as_posix()
        data = _read(path)
        if name == "etc/machine-id":
            data = f"{MACHINE_ID}\n".encode()
        elif name == "proc/sys/kernel/hostname":
            data = b"board\n"
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(scrubbed(data, host))
        copied.append(name)
    for pattern in _NAMES:
        for path in sorted(root.glob(pattern)):
            (folder / path.relative_to(root)).mkdir(parents=True, exist_ok=True)
    board = described.board
    note = {
        "board": board.model,
        "system": board.os,
        "kernel": board.kernel,
        "emulator": board.emulator,
        "agent_version": described.agent_version,
        "recorded": time.strftime("%Y-%m-%d", time.gmtime()),
        "by": "boardbench-agent probe --record",
        "user": "root" if os.geteuid() == 0 else "not root",
    }
    (folder / NOTE).write_text(json.dumps(note, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return copied


def scrubbed(data: bytes, host: bytes = b"") -> bytes:
    """The content without what names one board or its owner."""
    for pattern, instead in _SCRUBBED:
        data = pattern.sub(instead, data)
    # A short name would be found within words.
    return data.replace(host, b"board") if len(host) > 3 and host != b"localhost" else data


def _files(root: Path) -> Iterator[Path]:
    seen: set[Path] = set()
    for pattern in _PATTERNS:
        for path in sorted(root.glob(pattern)):
            if path not in seen and path.is_file() and not _NOT_COPIED.search(path.name):
                seen.add(path)
                yield path


def _read(path: Path) -> bytes:
    """What it holds, or nothing: a driver may refuse, and the file is there all the same."""
    try:
        # A file of sysfs may wait for something; none of these does for long.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return b""
    try:
        return os.read(descriptor, _MOST_BYTES)
    except OSError:
        return b""
    finally:
        os.close(descriptor)
