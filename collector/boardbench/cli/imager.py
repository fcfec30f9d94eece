"""What Raspberry Pi Imager is told of an image that was prepared: its list of systems, and its command.

Sources: raspberrypi/rpi-imager, doc/schema-notes.md, doc/json-schema/os-list-schema.json,
doc/os_customisation_formats.md, doc/local_json/create_local_json.py; of 2.0 src/cli.cpp and
src/hwlistmodel.cpp.
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Iterator
from pathlib import Path

_BLOCK_BYTES = 1 << 20
_DEVICES = {
    "arm64": ("pi5-64bit", "pi4-64bit", "pi3-64bit"),
    "armhf": ("pi5-32bit", "pi4-32bit", "pi3-32bit", "pi2-32bit", "pi1-32bit"),
}
_MACHINES = {"arm64": "armv8", "armhf": "armhf"}


def sha256(image: Path) -> str:
    """Of the whole file; Imager stops a write whose sum is another."""
    digest = hashlib.sha256()
    with image.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def os_list(image: Path, digest: str, *, suite: str, architecture: str, released: str, title: str) -> str:
    """The list with this one image, for Imager's ``--repo``. ``released`` is a day: 2025-05-13."""
    size = image.stat().st_size
    entry = {
        "name": title,
        "description": f"Raspberry Pi OS {suite.capitalize()} with the agent of boardbench",
        "icon": "",
        # With its scheme: a bare path is not found (raspberrypi/rpi-imager, src/imagewriter.cpp).
        "url": image.resolve().as_uri(),
        "extract_size": size,
        "extract_sha256": digest,
        "image_download_size": size,
        "image_download_sha256": digest,
        "release_date": released,
        # It has its first boot already, over which Imager's own would be written.
        "init_format": "none",
        "devices": list(_DEVICES[architecture]),
        "architecture": _MACHINES[architecture],
        "capabilities": [],
    }
    # Without a list of devices Imager has nothing to offer in its first step.
    anything = {
        "name": "Any Raspberry Pi",
        "description": "Shows every image of this list",
        "icon": "",
        "tags": list(_DEVICES[architecture]),
        "default": True,
        "matching_type": "inclusive",
        "capabilities": [],
    }
    whole = {"imager": {"devices": [anything]}, "os_list": [entry]}
    return json.dumps(whole, indent=2, ensure_ascii=False) + "\n"


def commands(image: Path, digest: str, os_list_file: Path | None, system: str) -> Iterator[str]:
    """Lines that say how to write the image with Imager; ``system`` is ``sys.platform``."""
    program = {
        "darwin": "/Applications/Raspberry Pi Imager.app/Contents/MacOS/rpi-imager",
        # Beside the program with windows, for which a terminal does not wait.
        "win32": r"C:\Program Files\Raspberry Pi\Imager\rpi-imager-cli.cmd",
    }.get(system, "rpi-imager")
    disk = {"darwin": "/dev/diskN", "win32": r"\\.\PhysicalDriveN"}.get(system, "/dev/sdX")
    words = [] if system == "win32" else ["sudo"]
    words += [program, *([] if system == "win32" else ["--cli"])]
    words += [*(["--sha256", digest] if digest else []), str(image), disk]
    yield _line(words, system)
    if os_list_file is not None:
        yield _line(["rpi-imager" if system == "win32" else program, "--repo", str(os_list_file)], system)


def _line(words: list[str], system: str) -> str:
    if system == "win32":
        return " ".join(f'"{word}"' if " " in word else word for word in words)
    return shlex.join(words)
