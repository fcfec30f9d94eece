"""Which agent this is: an identity that belongs to the data folder and to the board under it."""

from __future__ import annotations

import os
import zlib
from pathlib import Path

from boardbench.agent import folder
from boardbench.agent.errors import StorageError

_FILE = "instance"
# What a maker wrote into the hardware, as far as it may be read; the second for root only.
_SERIALS = ("proc/device-tree/serial-number", "sys/class/dmi/id/product_uuid")


def instance_id(data_dir: Path, root: Path = Path("/")) -> str:
    """Identity of the data folder on this board, made at the first call; raises StorageError.

    A card that was copied into a second board, or moved to one, has another there: so the collector can tell
    two agents that both say that they are the same board from one that was started again.
    """
    path = data_dir / _FILE
    mark = _mark(root)
    try:
        found = path.read_text().split()
    except (OSError, UnicodeDecodeError):
        found = []
    if len(found) == 2 and found[1] == mark and len(found[0]) == 32:
        return found[0]
    made = os.urandom(16).hex()
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.replace(path, f"{made} {mark}\n".encode())
    except OSError as error:
        raise StorageError(f"{path}: can't be written: {error.strerror}; check the disk") from error
    return made


def _mark(root: Path) -> str:
    """Tells boards apart; the serial number itself stays where it is."""
    for name in _SERIALS:
        try:
            serial = (root / name).read_bytes().strip(b"\0 \n")
        except OSError:
            continue
        if serial:
            return f"{zlib.crc32(serial):08x}"
    return "-"
