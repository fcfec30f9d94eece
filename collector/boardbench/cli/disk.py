"""What a disk of this computer is, and whether something uses it (Linux: sysfs(5), proc(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Disk:
    """``name`` is for a person; ``used`` says what uses it, and is empty when nothing does."""

    name: str
    used: str


def describe(device: Path, root: Path = Path("/")) -> Disk:
    """The disk behind a block device."""
    number = device.stat().st_rdev
    place = (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if not place.is_dir():
        # macOS and others don't tell: only an image is written there.
        return Disk(
            str(device), "this system does not tell what uses it; write the image with Raspberry Pi Imager"
        )
    # A partition lies in the folder of its disk.
    disk = place.parent if (place / "partition").exists() else place
    size = int(_text(disk / "size") or 0) * 512
    words = (_text(disk / "device/vendor"), _text(disk / "device/model") or _text(disk / "device/name"))
    name = " ".join(word for word in words if word) or disk.name
    return Disk(f"{name}, {size / 1e9:.1f} GB", _used(disk, root))


def _used(disk: Path, root: Path) -> str:
    names = {disk.name, *(path.parent.name for path in disk.glob("*/partition"))}
    for line in _text(root / "proc/self/mounts").splitlines():
        source, place = line.split(" ")[:2]
        if Path(source).name in names and source.startswith("/dev/"):
            return f"{source} is mounted on {place}"
    for line in _text(root / "proc/swaps").splitlines()[1:]:
        source = line.split()[0]
        if Path(source).name in names:
            return f"{source} is swap"
    for folder in (disk, *disk.glob("*/partition")):
        holders = (folder if folder is disk else folder.parent) / "holders"
        found = sorted(path.name for path in holders.iterdir()) if holders.is_dir() else []
        if found:
            return f"{found[0]} is made of it"
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
