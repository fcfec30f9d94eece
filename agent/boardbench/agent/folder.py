"""A folder that one process owns, and names in it that survive a power cut.

POSIX says nothing about the order in which a file's bytes, its length and its name reach the disk. What
holds on the file systems of boards (ext4, f2fs, btrfs, xfs): bytes last after fsync of the file, a name
after fsync of its folder, and rename() is atomic.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

from boardbench.agent.errors import ConfigurationError

_LOCK_NAME = "lock"
_SCRATCH_SUFFIX = ".tmp"
_T = TypeVar("_T")


def claim(folder: Path) -> int:
    """Makes the folder and takes it for this process; the descriptor that holds it until it is closed.

    Raises ConfigurationError when another process has it or it may not be written, and OSError when the
    disk can't.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(folder / _LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise ConfigurationError(
            f"{folder}: can't be used: {error.strerror}; make it a folder that this user may write"
        ) from error
    try:
        # Goes with the process, however it ends; a child does not inherit the descriptor.
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        raise ConfigurationError(
            f"{folder}: another agent is using it; stop that one or give this one a folder of its own"
        ) from error
    return descriptor


def sync(folder: Path) -> None:
    """Names made, changed or removed in the folder before this call last from now on."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # vfat and some network file systems don't sync folders and say so.
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def replace(path: Path, data: bytes, owner: tuple[int, int] | None = None) -> None:
    """The file holds ``data``, or after a crash what it held before, and never anything between.

    It belongs to ``owner``, a user and a group, from the first moment; to who calls where there is none.
    """
    scratch = path.with_name(path.name + _SCRATCH_SUFFIX)
    descriptor = os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        try:
            if owner is not None:
                os.fchown(descriptor, *owner)
            write_all(descriptor, data)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        scratch.replace(path)
    except OSError:
        # On a disk that is full it would take the last of the room.
        with contextlib.suppress(OSError):
            scratch.unlink()
        raise
    sync(path.parent)


def remove_scratch(folder: Path) -> None:
    """Removes what a kill or a power cut left of :func:`replace`, where names don't come again."""
    for scratch in folder.glob("*" + _SCRATCH_SUFFIX):
        with contextlib.suppress(OSError):
            scratch.unlink()


async def whole(work: Awaitable[_T]) -> _T:
    """What the work returns; also for a caller that is cancelled it is over before that one goes on.

    For work in threads, which goes on when nobody waits for it any more, and would do so on files that
    somebody else has taken up by then.
    """
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait([task])
    except asyncio.CancelledError:
        await asyncio.wait([task])
        if not task.cancelled():
            # Nobody is left to be told.
            task.exception()
        raise
    return task.result()


def free_bytes(path: Path, statvfs: Callable[[Path], os.statvfs_result] = os.statvfs) -> int:
    """Bytes that may still be written to the file system of the path."""
    found = statvfs(path)
    return found.f_bavail * found.f_frsize


def write_all(descriptor: int, data: bytes | memoryview) -> None:
    """Writes every byte; one write() may take fewer when the disk fills up."""
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def remove_tree(folder: Path) -> None:
    """Removes the folder and all that is in it, as far as that can be.

    Not by shutil, which would stay in the memory of an agent that shares its board with what it measures.
    """
    for path, folders, files in os.walk(folder, topdown=False):
        inside = Path(path)
        for name in (*files, *folders):
            entry = inside / name
            with contextlib.suppress(OSError):
                entry.rmdir() if name in folders and not entry.is_symlink() else entry.unlink()
    with contextlib.suppress(OSError):
        folder.rmdir()
