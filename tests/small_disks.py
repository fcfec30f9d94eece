"""File systems with little room, to fill up: ext4 on a file where this user may mount one, else in memory.

An ext4 keeps room for its own tables, has a journal, and runs out of blocks in the middle of a file, as a
card does; a tmpfs does none of this.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

_JOURNAL_MIB = 4
"""The smallest journal of blocks of 4 KiB."""

_TABLES_MIB = 1
"""What the file system's own tables take, and some more: without it a small one would get no journal."""


class NoSmallDisk(Exception):
    """This user may mount none; the message says why."""


class SmallDisks:
    """Makes small file systems in a folder of its own; :meth:`close` takes them away."""

    def __init__(self) -> None:
        self.kinds: dict[Path, str] = {}
        """The kind of each that is mounted."""
        self._folder = Path(tempfile.mkdtemp(prefix="boardbench-disks-"))
        # A program that runs as another user gets there, too.
        self._folder.chmod(0o755)

    def make(self, size_bytes: int) -> Path:
        """Returns the root of a new file system of so many bytes. Raises NoSmallDisk."""
        mount = shutil.which("mount")
        if mount is None or not sys.platform.startswith("linux"):
            raise NoSmallDisk("no mount command for a small file system")
        root = self._folder / f"disk{len(self.kinds)}"
        root.mkdir()
        image = root.with_suffix(".img")
        ways = {
            "ext4": ["-o", "loop", str(image)] if _make_ext4(image, size_bytes) else None,
            "tmpfs": ["-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs"],
        }
        said = ""
        for kind, how in ways.items():
            if how is None:
                continue
            done = subprocess.run([mount, *how, str(root)], capture_output=True, text=True)
            if done.returncode == 0:
                self.kinds[root] = kind
                return root
            said = done.stderr.strip()
        raise NoSmallDisk(f"mounting one was refused ({said})")

    def close(self) -> None:
        """Unmounts all of them."""
        for root in self.kinds:
            # Lazy: a program that is being ended may still have a file open.
            subprocess.run(["umount", "-l", str(root)], check=True)
        shutil.rmtree(self._folder)


def _make_ext4(image: Path, size_bytes: int) -> bool:
    """Whether there is an ext4 in the file now, whose files may take so many bytes."""
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    mkfs = shutil.which("mkfs.ext4", path=path)
    if mkfs is None:
        return False
    with image.open("wb") as file:
        file.truncate(size_bytes + (_JOURNAL_MIB + _TABLES_MIB << 20))
    # Nothing for root alone, which the tests may be; and nothing that is made ready later, in the background.
    options = ["-m", "0", "-b", "4096", "-N", "2048", "-J", f"size={_JOURNAL_MIB}"]
    more = ["-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard"]
    done = subprocess.run([mkfs, "-q", "-F", *options, *more, str(image)], capture_output=True)
    return done.returncode == 0


def fill(path: Path) -> None:
    """Takes all that is left of the file system for this file."""
    with path.open("wb", buffering=0) as file:
        for block in (1 << 20, 4096, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(block)):
                    pass
