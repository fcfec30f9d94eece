"""What engines keep from one load to the next, bounded: what was used longest ago goes first.

caches/<engine>/<model>-<version>-<settings>/     see boardbench.agent.bench.caches
"""

from __future__ import annotations

import contextlib
import logging
from pathlib import Path

_log = logging.getLogger(__name__)


def root(data_dir: Path) -> Path:
    """The folder of all of them."""
    return data_dir / "caches"


def bound(folder: Path, limit_bytes: int) -> list[Path]:
    """Removes caches until all of them together are within the limit; those that are gone."""
    found = []
    for path in folder.glob("*/*"):
        with contextlib.suppress(OSError):
            found.append((path.stat().st_mtime_ns, path, _size_bytes(path)))
    found.sort(reverse=True)
    used_bytes, gone = 0, []
    for _, path, size_bytes in found:
        used_bytes += size_bytes
        if used_bytes <= limit_bytes:
            continue
        # Only here: it is a megabyte of memory with what it imports, and few agents remove anything.
        import shutil

        try:
            shutil.rmtree(path)
        except OSError as error:
            _log.warning("%s: this cache can't be removed: %s", path, error.strerror)
            continue
        used_bytes -= size_bytes
        gone.append(path)
    return gone


def _size_bytes(folder: Path) -> int:
    size_bytes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            size_bytes += path.lstat().st_size if not path.is_dir() else 0
    return size_bytes
