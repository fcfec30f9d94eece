"""The boot partition of a card: a folder where it is mounted, or the FAT file system in an image.

Sources: the master boot record's table of partitions, and the UEFI specification (GUID partition table, 5.3).
"""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import BinaryIO, Protocol
from uuid import UUID

from boardbench.cli import disk
from boardbench.cli.errors import CliError, WrongUse
from boardbench.cli.fat import FatError, FatVolume

_FAT_TYPES = frozenset((0x01, 0x04, 0x06, 0x0B, 0x0C, 0x0E, 0xEF))
_PROTECTIVE = 0xEE
# Basic data, and EFI system.
_FAT_GUIDS = frozenset(
    UUID(text).bytes_le
    for text in ("EBD0A0A2-B9E5-4433-87C0-68B6B72699C7", "C12A7328-F81F-11D2-BA4B-00A0C93EC93B")
)
_COMPRESSED = {
    b"\xfd7zXZ\x00": "xz -dk",
    b"\x1f\x8b": "gunzip -k",
    b"\x28\xb5\x2f\xfd": "zstd -d",
    b"PK\x03\x04": "unzip",
}
# What the Raspberry Pi's boot partition has in every system (raspberrypi.com, "The config.txt file").
MARKS = ("cmdline.txt", "config.txt")


class BootPartition(Protocol):
    """Files on a boot partition; paths are relative, with "/"."""

    def exists(self, path: str) -> bool:
        """Whether there is such a file or folder."""
        ...

    def read(self, path: str) -> bytes:
        """What the file holds; FileNotFoundError when there is none."""
        ...

    def write(self, path: str, data: bytes) -> None:
        """The file holds ``data``; folders on the way are made."""
        ...

    def remove(self, path: str) -> None:
        """There is no such file."""
        ...

    @property
    def free_bytes(self) -> int:
        """What can still be written."""
        ...


class BootFolder:
    """The partition where the system of this computer has mounted it."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def exists(self, path: str) -> bool:
        """See :class:`BootPartition`."""
        return (self._folder / path).exists()

    def read(self, path: str) -> bytes:
        """See :class:`BootPartition`."""
        return (self._folder / path).read_bytes()

    def write(self, path: str, data: bytes) -> None:
        """See :class:`BootPartition`; the file is there whole or not at all, and on the card at once."""
        place = self._folder / path
        place.parent.mkdir(parents=True, exist_ok=True)
        fresh = place.with_name(f"{place.name}.new")
        # Bytes: what runs on the board must have its line ends, whatever this computer's are.
        with fresh.open("wb") as file:
            file.write(data)
            file.flush()
            # What is read back comes from the card, where the system can forget what it wrote.
            disk.forget(file.fileno())
        fresh.replace(place)

    def remove(self, path: str) -> None:
        """See :class:`BootPartition`."""
        (self._folder / path).unlink(missing_ok=True)

    @property
    def free_bytes(self) -> int:
        """See :class:`BootPartition`."""
        import shutil

        return shutil.disk_usage(self._folder).free


@contextlib.contextmanager
def opened(image: Path, *, writable: bool) -> Iterator[FatVolume]:
    """The boot partition in an image or on a disk, on disk when the context is left. Raises CliError."""
    if image.is_block_device():
        disk.may_be_written(image)
    try:
        with disk.alone(image) if writable else image.open("rb") as file, inside(file, image) as volume:
            yield volume
    except OSError as error:
        raise WrongUse(f"{image}: can't be {'written' if writable else 'read'}: {error.strerror}") from error


@contextlib.contextmanager
def inside(file: BinaryIO, image: Path) -> Iterator[FatVolume]:
    """The boot partition in what is open already; ``image`` is its name. Raises CliError."""
    try:
        yield _boot_volume(file, image)
    except FatError as error:
        raise CliError(f"{image}: {error}") from error


def folder_of(given: PurePath) -> PurePath:
    """The folder that is meant: on Windows "E:" alone is where somebody was last on that drive."""
    if given.drive and not given.root and given == type(given)(given.drive):
        return type(given)(f"{given.drive}\\")
    return given


def _boot_volume(file: BinaryIO, image: Path) -> FatVolume:
    file.seek(0)
    head = file.read(512)
    for magic, command in _COMPRESSED.items():
        if head.startswith(magic):
            raise WrongUse(f"{image} is compressed: unpack it first, with `{command} {image.name}`")
    offsets = list(fat_offsets(file))
    for offset in offsets:
        try:
            volume = FatVolume(file, offset)
        except FatError:
            continue
        if all(volume.exists(name) for name in MARKS):
            return volume
    tried = f"{len(offsets)} FAT partitions were looked at" if offsets else "it has no FAT partition"
    raise WrongUse(
        f"{image} is no image of a Raspberry Pi's system: no FAT partition in it holds "
        f"{' and '.join(MARKS)} ({tried})"
    )


def fat_offsets(file: BinaryIO) -> Iterator[int]:
    """Where, in bytes, partitions begin that may be FAT; 0 for a file that is one file system."""
    file.seek(0)
    sector = file.read(512)
    if len(sector) < 512 or sector[510:] != b"\x55\xaa":
        return
    if sector[54:57] == b"FAT" or sector[82:85] == b"FAT":
        yield 0
        return
    for number in range(4):
        entry = sector[446 + 16 * number : 462 + 16 * number]
        kind = entry[4]
        (first,) = struct.unpack_from("<I", entry, 8)
        if kind == _PROTECTIVE:
            yield from _guid_offsets(file)
            return
        if kind in _FAT_TYPES and first:
            yield first * 512


def _guid_offsets(file: BinaryIO) -> Iterator[int]:
    for sector_bytes in (512, 4096):
        file.seek(sector_bytes)
        header = file.read(92)
        if header[:8] != b"EFI PART":
            continue
        (table,) = struct.unpack_from("<Q", header, 72)
        count, size = struct.unpack_from("<II", header, 80)
        if size < 128 or count > 1024:
            return
        file.seek(table * sector_bytes)
        entries = file.read(count * size)
        for at in range(0, len(entries) - size + 1, size):
            if entries[at : at + 16] in _FAT_GUIDS:
                (first,) = struct.unpack_from("<Q", entries, at + 32)
                yield first * sector_bytes
        return
