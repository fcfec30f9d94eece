"""Lets go of the memory that starting and running took, and waiting does not need.

Starting executes megabytes of code once: imports, gRPC's set-up, the first probe. Its pages stay mapped for
as long as nothing else wants them, on a board whose memory is to be measured. Once dropped, those that are
used again come back from the file, mostly from the system's cache of it.
Sources: madvise(2), proc_pid_smaps(5).
"""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

_MADV_DONTNEED = 4


def let_go(smaps: Path = Path("/proc/self/smaps")) -> int:
    """Drops the code that lies in memory, gives free memory back; bytes of code that were mapped.

    Does nothing but collect garbage where the system has no such calls.
    """
    gc.collect()
    if sys.platform != "linux":
        return 0
    # Only here: the agent has no other use for it.
    import ctypes

    dropped = 0
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        with smaps.open(encoding="utf-8", errors="replace") as lines:
            ranges = list(_clean_libraries(lines))
        for start, end in ranges:
            if libc.madvise(start, end - start, _MADV_DONTNEED) == 0:
                dropped += end - start
        # glibc's own; musl has none, and keeps little.
        libc.malloc_trim(0)
    return dropped


def _clean_libraries(smaps: Iterable[str]) -> Iterator[tuple[int, int]]:
    """Address ranges of what libraries hold of code and constants, of which no page differs from the file.

    They are loaded for good and can't be written, so they stay as they are found.
    """
    found: tuple[int, int] | None = None
    for line in smaps:
        name, *fields = line.split(maxsplit=5)
        if "-" in name:
            start, _, end = name.partition("-")
            # Permissions, offset, device, inode, path.
            constant = len(fields) == 5 and fields[0] in ("r-xp", "r--p") and ".so" in fields[4]
            found = (int(start, 16), int(end, 16)) if constant else None
        elif name in ("Anonymous:", "Swap:") and fields[0] != "0":
            found = None
        elif name == "VmFlags:" and found is not None:
            yield found
            found = None
