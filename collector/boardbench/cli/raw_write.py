"""An image written over a whole disk, and read back."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from boardbench.cli import disk
from boardbench.cli.errors import CliError, WrongUse

_BLOCK_BYTES = 4 << 20  # what a card erases at once is 4 MiB with most (SD Association, AU size)

Progress = Callable[[int], None]
"""Is told how many bytes more are done."""


def image_bytes(image: Path, target: disk.Disk) -> int:
    """Size of the image. Raises WrongUse when it is none, or too large for the disk."""
    size = image.stat().st_size
    if not size or size % disk.SECTOR_BYTES:
        raise WrongUse(f"{image} has {size:,} bytes, which is no image of a disk: is it whole?")
    if size > target.size_bytes:
        raise WrongUse(
            f"{image} has {size / 1e9:.2f} GB, and {target.device} only {target.size_bytes / 1e9:.2f} GB: "
            "take a larger card"
        )
    return size


def write(image: BinaryIO, target: BinaryIO, progressed: Progress) -> None:
    """Everything of the image, its beginning last: what was cut off holds nothing that could start.

    Raises CliError.
    """
    try:
        first = image.read(_BLOCK_BYTES)
        target.seek(0)
        target.write(bytes(len(first)))
        while block := image.read(_BLOCK_BYTES):
            target.write(block)
            progressed(len(block))
        target.flush()
        # So that nothing of the beginning is there before the rest is.
        os.fsync(target.fileno())
        target.seek(0)
        target.write(first)
        progressed(len(first))
        target.flush()
        disk.forget(target.fileno())
    except OSError as error:
        raise CliError(f"writing failed: {error.strerror}; is the card gone, or broken?") from error


def verify(image: BinaryIO, target: BinaryIO, progressed: Progress) -> None:
    """Raises CliError when the disk holds something else than the image."""
    at = 0
    image.seek(0)
    target.seek(0)
    try:
        while block := image.read(_BLOCK_BYTES):
            if target.read(len(block)) != block:
                raise CliError(
                    f"what was written reads back as something else (between byte {at:,} and "
                    f"{at + len(block):,}): the card is broken, or smaller than it says; take another one"
                )
            at += len(block)
            progressed(len(block))
    except OSError as error:
        raise CliError(f"reading back failed at byte {at:,}: {error.strerror}; the card is broken") from error
