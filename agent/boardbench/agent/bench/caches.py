"""Where an engine keeps what makes its next load faster, and whether it was there.

One folder for each model, version of the engine and way of loading, so that nothing is ever shared by two
that may differ: ``<engine>/<SHA-256 of the model>-<version>-<digest of the settings>``. The agent bounds all
of them together, and removes those that were used longest ago.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Mapping, Optional, Tuple

from boardbench.agent.bench.runtime import OptionRejected
from boardbench.agent.domain import Cache

_MODEL_DIGITS = 32
_DIGEST_DIGITS = 16


def folder(
    root: Path, engine: str, *, model_sha256: str, version: str, settings: Mapping[str, object]
) -> Path:
    """The folder for one model in one version of an engine, loaded with these settings."""
    about = json.dumps(settings, sort_keys=True, default=str).encode()
    digest = hashlib.sha256(about).hexdigest()[:_DIGEST_DIGITS]
    named = re.sub(r"[^A-Za-z0-9.]+", "_", version)
    return root / re.sub(r"[^A-Za-z0-9_-]+", "_", engine) / f"{model_sha256[:_MODEL_DIGITS]}-{named}-{digest}"


def prepare(path: Path, *, renew: bool) -> None:
    """Makes the folder, and with ``renew`` removes what it held. Raises OptionRejected."""
    try:
        if renew and path.exists():
            shutil.rmtree(path)
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.utime(path)  # its age is that of its last use
    except OSError as error:
        raise OptionRejected(
            f"cache: {path} can't be used: {error.strerror}; leave the cache out, or mend that"
        ) from error


class Watched:
    """A folder that an engine keeps its files in by itself, looked at before and after the load."""

    def __init__(self, path: Path, name: str) -> None:
        """``name`` says what is in it; made before the engine loads."""
        self._path = path
        self._name = name
        self._before = _files(path)
        self._warm: Optional[bool] = None

    def loaded(self, warm: Optional[bool] = None) -> None:
        """After the load; ``warm`` is what the engine itself says, None where it says nothing.

        Without its word: something was there and the load added nothing to it.
        """
        self._warm = (bool(self._before) and _files(self._path) == self._before) if warm is None else warm

    def caches(self) -> Tuple[Cache, ...]:
        """What is in the folder now; nothing when the engine has left nothing there."""
        if not (found := _files(self._path)):
            return ()
        size_bytes = sum(size for size, _ in found.values())
        return (Cache(self._name, self._warm, size_bytes, str(self._path)),)


def _files(path: Path) -> Mapping[str, Tuple[int, int]]:
    """Size and time of change of every file below a folder, by name."""
    found = {}
    for file in path.rglob("*") if path.is_dir() else ():
        with contextlib.suppress(OSError):
            about = file.stat()
            if file.is_file():
                found[str(file.relative_to(path))] = about.st_size, about.st_mtime_ns
    return found
