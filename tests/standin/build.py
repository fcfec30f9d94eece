"""Builds the stand-in for the Edge TPU: a library that real TFLite interpreters load as a delegate."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
FLAGS = ("-std=c11", "-O2", "-g", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")


class NoCompiler(Exception):
    """There is no C compiler; the message says what was looked for and what to install."""


def compiler() -> str:
    """Path of the C compiler: $CC, else cc, gcc or clang. Raises NoCompiler."""
    for name in (os.environ.get("CC", ""), "cc", "gcc", "clang"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise NoCompiler("no C compiler (looked for $CC, cc, gcc, clang): install gcc to build the TPU stand-in")


def build(cache: Path, *, throttled: bool = False, extra_flags: tuple[str, ...] = ()) -> Path:
    """The library, compiled into ``cache`` unless the same sources and flags already were. Raises NoCompiler.

    ``throttled``: marked as the "std" build of libedgetpu is, which holds USB devices at half clock.
    """
    flags = (*FLAGS, *(("-DSTANDIN_THROTTLED",) if throttled else ()), *extra_flags)
    digest = hashlib.sha256(" ".join(flags).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    library = cache / f"libedgetpu_standin_{digest.hexdigest()[:16]}.so"
    if not library.exists():
        cache.mkdir(parents=True, exist_ok=True)
        fresh = library.with_suffix(f".{os.getpid()}")
        command = [compiler(), *flags, "-o", os.fspath(fresh), os.fspath(SOURCES / "edgetpu_standin.c")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"the TPU stand-in does not compile: {' '.join(command)}\n{done.stderr}")
        fresh.replace(library)
    return library
