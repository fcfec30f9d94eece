"""Shared libraries that options name: which are not loaded, and why the system's loader refuses one."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Mapping

from boardbench.agent.bench.options import NATIVE_MODELS
from boardbench.agent.bench.runtime import OptionRejected

_HEAD_BYTES = 20
_MAGIC = b"\x7fELF"
# As the agent keeps what is pushed to it: by its SHA-256.
_PUSHED = re.compile(r"[0-9a-f]{64}\.[a-z0-9]+")


def refuse_pushed(options: Mapping[str, str]) -> None:
    """Raises OptionRejected where an option names a library that came to the board as a model.

    Whoever may push models may not run programs by that, unless the agent lets programs be models.
    """
    if os.environ.get(NATIVE_MODELS) == "1":
        return
    for name, value in options.items():
        for part in {value, *value.split(";")}:
            path = Path(os.path.realpath(part)) if "/" in part and "\0" not in part else None
            if path is not None and _PUSHED.fullmatch(path.name) and _is_library(path):
                raise OptionRejected(
                    f"option {name}: {part} is a library that was pushed as a model, and a program that "
                    f"may do what the agent may: install it on the board, or set {NATIVE_MODELS}=1 in the "
                    "agent's environment"
                )


def _is_library(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


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
