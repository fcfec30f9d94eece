"""Which boardbench this is."""

from __future__ import annotations

import sys
from pathlib import Path


def version() -> str:
    """Version of the installed distribution; empty when it runs without having been installed.

    Read from the name of its folder (PEP 376): importlib.metadata takes 2 MB, and the agent shares its
    board with what it measures.
    """
    for entry in sys.path:
        for found in Path(entry or ".").glob("boardbench-*.dist-info"):
            return found.name.removeprefix("boardbench-").removesuffix(".dist-info")
    return ""
