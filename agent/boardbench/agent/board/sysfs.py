"""Files in which the kernel tells something: one number, one line, a small table.

They are opened and read without Python's file objects, since a sampler reads dozens of them many times a
second. Whatever is in them, a fault is an OSError that names the file.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from boardbench.agent.board.sensor import Reading

# A file of sysfs is a page at most (Documentation/filesystems/sysfs.rst); of larger pages 4 kB are enough.
_PAGE_BYTES = 4096
_TABLE_BYTES = 1 << 18

_NUMBER = re.compile(rb"\s*(-?\d{1,20})\s*\0?\s*")
_DIGITS = re.compile(r"(\d+)")

# What drivers answer while there is nothing to tell: the unit sleeps, or the chip lacks it.
_NOTHING_NOW = (errno.ENOENT, errno.ENODATA, errno.EAGAIN, errno.EBUSY, errno.EOPNOTSUPP, errno.ENXIO)


def content(path: Path) -> bytes:
    """The first page of the file. Raises OSError."""
    # A pipe in the place of a file must not hang the reader.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        return os.read(descriptor, _PAGE_BYTES)
    finally:
        os.close(descriptor)


def number(path: Path, *, least: int | None = None) -> int:
    """The whole number that the file holds. Raises OSError, also for what is none, or below ``least``."""
    return parsed(content(path), path, least=least)


def parsed(raw: bytes, path: Path, *, least: int | None = None) -> int:
    """The whole number in the content of a file. Raises OSError."""
    found = _NUMBER.fullmatch(raw)
    if found is None:
        raise fault(path, "no number", raw)
    value = int(found.group(1))
    if least is not None and value < least:
        raise fault(path, f"below {least}", raw)
    return value


def number_if_any(path: Path, *, least: int | None = None) -> int | None:
    """The number; None when there is no such file, or its driver has nothing to tell now. Raises OSError."""
    try:
        return number(path, least=least)
    except OSError as error:
        if nothing_now(error):
            return None
        raise


def nothing_now(error: OSError) -> bool:
    """Whether the error only says that there is no such value, or none at the moment."""
    return error.errno in _NOTHING_NOW


def fault(path: Path, what: str, raw: bytes = b"") -> OSError:
    """The error about a file that holds what it should not."""
    held = f": {raw[:40]!r}" if raw else ""
    return OSError(errno.EBADMSG, f"{what}{held}", str(path))


def word(path: Path) -> str:
    """The line that the file holds, made printable; empty when there is none to be read."""
    try:
        text = content(path).decode("utf-8", "replace").strip("\0 \t\r\n")
    except OSError:
        return ""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:128])


def table(path: Path) -> str:
    """A longer file, up to a quarter of a megabyte. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    parts: list[bytes] = []
    size = 0
    try:
        # Such files give a page at a time.
        while size < _TABLE_BYTES and (part := os.read(descriptor, _TABLE_BYTES - size)):
            parts.append(part)
            size += len(part)
    finally:
        os.close(descriptor)
    return b"".join(parts).decode("utf-8", "replace")


def listed(folder: Path, prefix: str = "") -> list[Path]:
    """What is in the folder and begins like that, by name and number; nothing where it can't be listed."""
    try:
        found = [path for path in folder.iterdir() if path.name.startswith(prefix)]
    except OSError:
        return []
    return sorted(found, key=lambda path: natural(path.name))


def natural(name: str) -> list[tuple[int, str]]:
    """Key of an order in which hwmon10 comes behind hwmon9."""
    # A few digits are enough; the text behind decides between longer ones.
    parts = _DIGITS.split(name)
    return [(int(part[:18]) if part.isascii() and part.isdigit() else -1, part) for part in parts]


def exists(path: Path) -> bool:
    """Whether the file is there and may be seen."""
    try:
        path.stat()
    except OSError:
        # Unlike Path.exists, which raises where a folder on the way keeps others out.
        return False
    return True


def hidden(path: Path) -> bool:
    """Whether a folder on the way to the file keeps others out, so that nobody can say if it is there."""
    try:
        path.stat()
    except PermissionError:
        return True
    except OSError:
        return False
    return False


def distinct(name: str, place: str, taken: set[str]) -> str:
    """The name, with its place where another one is called so already; then it is taken."""
    found, number = name, 1
    while found in taken:
        found = f"{name} ({place})" if number == 1 else f"{name} ({place}, {number})"
        number += 1
    taken.add(found)
    return found


def each(parts: Iterable[Callable[[], Iterable[Reading]]]) -> Iterator[Reading]:
    """What every part reads. The first failure is raised after all: one broken channel hides no other."""
    failed: OSError | None = None
    for part in parts:
        try:
            yield from part()
        except OSError as error:
            failed = failed or error
    if failed is not None:
        raise failed
