"""Why the system's loader refuses a shared library, told from the file."""

from __future__ import annotations

import platform
import re
from pathlib import Path

_HEAD_BYTES = 20
_MAGIC = b"\x7fELF"


def why_not(library: str, said: str) -> str:
    """What to do about a library of this path; empty for a name that is no file here.

    ``said`` are the loader's words.
    """
    path = Path(library)
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
    except OSError:
        return "there is no such file on this board" if "/" in library and not path.exists() else ""
    if head[:4] != _MAGIC or len(head) < _HEAD_BYTES:
        return "it is no shared library of Linux, or not whole"
    own = _own_head()
    # Class and byte order, and the machine (e_ident and e_machine in elf.h).
    if own and (head[4:6], head[18:20]) != (own[4:6], own[18:20]):
        return f"it is built for another kind of processor; this Python is one for {platform.machine()}"
    needed = re.search(r"(\S+): cannot open shared object file", said)
    if needed and needed.group(1) != library:
        return f"it needs {needed.group(1)}, which is not here: install that"
    return "was it built for this system?"


def _own_head() -> bytes:
    try:
        with open("/proc/self/exe", "rb") as file:
            return file.read(_HEAD_BYTES)
    except OSError:  # no Linux
        return b""
