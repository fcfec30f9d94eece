"""What a disk of this computer is, and what speaks against writing to it (Linux: sysfs(5), proc(5)).

Sources: the kernel's Documentation/ABI/testing/sysfs-block, Documentation/driver-api/mmc/mmc-dev-attrs.rst,
include/uapi/linux/fs.h. The kernel has the last word: a disk is opened for this program alone (O_EXCL), which
fails while anything is mounted from it, swaps on it or is made of it, in whatever namespace.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from boardbench.cli.errors import CliError, WrongUse

SECTOR_BYTES = 512
"""What sysfs counts in, whatever the disk's own sectors are."""

# linux/fs.h: writes back and forgets what is kept in memory of a disk; reads its table of partitions again.
_BLKFLSBUF, _BLKRRPART = 0x1261, 0x125F
_MOUNTINFO_NUMBER, _MOUNTINFO_PLACE = 2, 4


@dataclass(frozen=True)
class Disk:
    """A disk, as a person knows it, and what uses it."""

    device: Path
    name: str
    """Vendor and model: "Generic SD/MMC"."""
    id: str
    """Names this very disk, and stays the same when it is plugged in again."""
    size_bytes: int
    refusal: str
    """Why it must not be written, and what to do; empty when it may be."""

    def __str__(self) -> str:
        """``Generic SD/MMC, 31.9 GB``."""
        return f"{self.name}, {self.size_bytes / 1e9:.1f} GB"


def describe(device: Path, root: Path = Path("/")) -> Disk:
    """The disk that a block device is. Raises WrongUse where the system does not tell."""
    number = device.stat().st_rdev
    place = (root / f"sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if not place.is_dir():
        # macOS, and containers without /sys.
        raise WrongUse(
            f"this system does not tell what {device} is and what uses it: write the image with Raspberry Pi "
            "Imager, and prepare the card with --boot"
        )
    part = (place / "partition").exists()
    disk = place.parent if part else place
    size = int(_text(disk / "size") or 0) * SECTOR_BYTES
    name = _name(disk)
    refusal = ""
    if part:
        refusal = f"it is a partition of /dev/{disk.name}: name the whole disk"
    elif used := _used(disk, root):
        refusal = f"it is in use: {used}; unmount it, or name the right one"
    elif not size:
        refusal = "there is no card in it"
    elif _text(disk / "ro") == "1":
        refusal = "it is write protected: move the card's switch, or take another one"
    elif _is_built_in(disk):
        refusal = "it is built into this computer; cards and disks at USB are written"
    return Disk(device, name, _id(device, name, size, root), size, refusal)


def _name(disk: Path) -> str:
    backing = _text(disk / "loop/backing_file")
    words = (_text(disk / "device/vendor"), _text(disk / "device/model") or _text(disk / "device/name"))
    return " ".join(word for word in words if word) or (f"a disk out of {backing}" if backing else disk.name)


def _id(device: Path, name: str, size: int, root: Path) -> str:
    """The name that udev has for it, else one of model and size."""
    folder = root / "dev/disk/by-id"
    with contextlib.suppress(OSError):
        real = device.resolve()
        # The names by model and serial number rather than those by numbers alone.
        for link in sorted(
            folder.iterdir(), key=lambda link: (link.name.startswith(("wwn-", "nvme-eui")), link)
        ):
            if link.resolve() == real:
                return link.name
    return f"{re.sub(r'[^A-Za-z0-9.]+', '_', name).strip('_')}-{size}"


def _is_built_in(disk: Path) -> bool:
    """Whether nobody would carry it to a board: neither removable, nor a card, nor at USB, nor a file."""
    if _text(disk / "removable") == "1" or "/usb" in str(disk) or (disk / "loop").is_dir():
        return False
    # eMMC, which is soldered, says "MMC".
    return _text(disk / "device/type") != "SD"


def _used(disk: Path, root: Path) -> str:
    """What uses it or a part of it; empty for nothing that can be seen from here."""
    parts = [disk, *(path.parent for path in disk.glob("*/partition"))]
    for line in _text(root / "proc/self/mountinfo").splitlines():
        words = line.split(" ")
        source = words[words.index("-") + 2]
        for part in parts:
            # By its number, since the source can be a link, or a name that is nowhere ("/dev/root"); a file
            # system over several disks has a number of its own (btrfs).
            if words[_MOUNTINFO_NUMBER] == _text(part / "dev") or source == f"/dev/{part.name}":
                place = words[_MOUNTINFO_PLACE].replace("\\040", " ")
                return f"{part.name} is mounted on {place}"
    for line in _text(root / "proc/swaps").splitlines()[1:]:
        source = line.split()[0]
        if Path(source).name in {part.name for part in parts}:
            return f"{source} is swap"
    for part in parts:
        holders = part / "holders"
        for path in sorted(holders.iterdir()) if holders.is_dir() else ():
            what = _text(path.resolve() / "dm/name")
            return f"{what or path.name} (LVM, RAID or encryption) is made of it"
    return ""


@contextlib.contextmanager
def alone(device: Path) -> Iterator[BinaryIO]:
    """A disk or an image to be read and written, a disk by nobody else; on the medium when that ends.

    Raises WrongUse, CliError.
    """
    try:
        # Windows would translate line ends, and knows no O_CLOEXEC.
        more = getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
        descriptor = os.open(device, os.O_RDWR | os.O_EXCL | more)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise WrongUse(
                f"{device} is in use (the kernel says so): unmount what is on it, or name the right one"
            ) from error
        raise WrongUse(f"{device}: can't be written: {error.strerror}") from error
    with open(descriptor, "r+b") as file:
        yield file
        file.flush()
        forget(file.fileno())


def forget(descriptor: int) -> None:
    """Writes what is kept in memory to the medium, and forgets it: what is read next comes from there."""
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    _ask(descriptor, _BLKFLSBUF)


def read_partitions(descriptor: int) -> None:
    """Makes the system see the partitions that were written."""
    _ask(descriptor, _BLKRRPART)


def _ask(descriptor: int, request: int) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    # Files, and disks without partitions, know neither.
    with contextlib.suppress(OSError):
        fcntl.ioctl(descriptor, request)


def checked(device: Path, root: Path = Path("/")) -> Disk:
    """The disk, which may be written as far as can be seen. Raises WrongUse, CliError."""
    if not device.exists():
        raise WrongUse(f"there is no {device}")
    if not device.is_block_device():
        raise WrongUse(f"{device} is no disk: a file with an image is named with --image alone")
    found = describe(device, root)
    if found.refusal:
        raise CliError(f"{device} ({found}) is not written: {found.refusal}")
    return found


def may_be_written(device: Path) -> None:
    """Raises WrongUse where only root may read and write it."""
    if not os.access(device, os.R_OK | os.W_OK):
        raise WrongUse(f'{device} may be written by root only: sudo "$(command -v boardbench)" …')


def still_there(disk: Disk, root: Path = Path("/")) -> None:
    """Raises CliError unless this is the disk that was looked at: names of disks are given anew when one is
    pulled out and another put in, while somebody is asked about the first.
    """
    now = checked(disk.device, root)
    if now != disk:
        raise CliError(
            f"{disk.device} was {disk} (id {disk.id}), and is {now} (id {now.id}) by now: nothing was written"
        )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
