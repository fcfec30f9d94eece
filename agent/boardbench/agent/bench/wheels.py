"""Where the packages of engines can be installed from, and the command for it; or why there is none.

What PyPI has, by the tags of the newest wheels, looked up in November 2026: https://pypi.org/project/NAME/#files
"""

from __future__ import annotations

import json
import platform
import struct
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path
from typing import FrozenSet, Mapping, Optional, Tuple

_Version = Tuple[int, int]

_64_BIT = {"linux": ("x86_64", "aarch64"), "darwin": ("arm64",), "win32": ("amd64",)}


@dataclass(frozen=True)
class Wheels:
    """For what there are wheels of a package."""

    package: str
    least_python: _Version
    most_python: Optional[_Version] = None
    machines: Mapping[str, Tuple[str, ...]] = field(default_factory=lambda: _64_BIT)
    """By ``sys.platform``."""
    glibc: Mapping[str, _Version] = field(default_factory=dict)
    """On Linux, by the machine: the oldest C library that they run with, where that is younger than most."""
    beside: str = ""
    """What has to be installed with it, for pip."""

    def lacks(self, here: Here) -> str:
        """Why there is none for this Python on this machine; empty when there is one."""
        taken = self.machines.get(here.system, ())
        if here.machine not in taken:
            known = ", ".join(f"{machine} {name}" for name, each in self.machines.items() for machine in each)
            return f"none for {here.machine} {here.system} ({known})"
        if here.system == "linux" and here.glibc is None:
            return "none for a C library other than GNU's"
        if here.glibc is not None and here.glibc < self.glibc.get(here.machine, (0, 0)):
            return f"none for glibc {_dotted(here.glibc)} ({_dotted(self.glibc[here.machine])} or newer)"
        if here.python < self.least_python or (self.most_python and here.python > self.most_python):
            newest = f" to {_dotted(self.most_python)}" if self.most_python else " or newer"
            return f"none for Python {_dotted(here.python)} ({_dotted(self.least_python)}{newest})"
        return ""


AI_EDGE_LITERT = Wheels("ai-edge-litert", (3, 9))
TFLITE_RUNTIME = Wheels(
    "tflite-runtime",
    (3, 9),
    (3, 11),
    machines={"linux": ("x86_64", "aarch64", "armv7l")},
    glibc={"aarch64": (2, 34), "armv7l": (2, 34)},
    beside="'numpy<2'",
)
ONNXRUNTIME = Wheels("onnxruntime", (3, 9))
OPENVINO = Wheels(
    "openvino", (3, 9), machines={**_64_BIT, "darwin": ("arm64", "x86_64")}, glibc={"aarch64": (2, 31)}
)
TORCH = Wheels("torch", (3, 9), beside="numpy")
EXECUTORCH = Wheels(
    "executorch",
    (3, 10),
    glibc={"x86_64": (2, 28), "aarch64": (2, 28)},
    beside="torch 'numpy>=2'",
)
# For Jetsons' own processors there is none on PyPI: theirs comes with JetPack.
TENSORRT = Wheels("tensorrt", (3, 8), machines={"linux": ("x86_64",), "win32": ("amd64",)})

REINSTALL = "install the agent's package again: sudo apt install --reinstall ./boardbench-agent_….deb"
"""What mends a release that lacks what it was built with."""


@dataclass(frozen=True)
class Here:
    """What decides which wheel fits."""

    python: _Version
    system: str
    machine: str
    glibc: Optional[_Version]
    """None where the C library is another, or there is none to be told."""
    executable: str
    managed: bool
    """Whether the system keeps pip out of this Python (PEP 668)."""
    brought: Optional[FrozenSet[str]] = None
    """What the agent's Debian package has in it, when this is its Python, which has no pip."""


def here() -> Here:
    """The Python that runs, and its machine."""
    name, number = platform.libc_ver()
    parts = number.split(".")
    known = name == "glibc" and len(parts) >= 2 and parts[0].isdigit() and parts[1].isdigit()
    in_venv = sys.prefix != sys.base_prefix
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    brought = _brought(Path(sys.prefix))
    return Here(
        python=sys.version_info[:2],
        system=sys.platform,
        machine=machine(platform.machine(), struct.calcsize("P") * 8),
        glibc=(int(parts[0]), int(parts[1])) if known else None,
        # Another environment is made with the Python below the package's.
        executable=sys.executable if brought is None else getattr(sys, "_base_executable", sys.executable),
        managed=not in_venv and marker.exists(),
        brought=brought,
    )


def _brought(prefix: Path) -> Optional[FrozenSet[str]]:
    """The packages in a release of the agent; None when that is none (``deploy/build_deb.py`` makes them)."""
    try:
        told = json.loads((prefix / "release.json").read_text(encoding="utf-8"))
        return frozenset(map(str, told.get("wheels", ())))
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def machine(kernel: str, bits: int) -> str:
    """The machine as wheels name it: a 32-bit system often has a 64-bit kernel."""
    name = kernel.lower()
    if bits == 32:
        return {"aarch64": "armv7l", "armv8l": "armv7l", "x86_64": "i686"}.get(name, name)
    return name


def how(engine: str, *choices: Wheels, at: Optional[Here] = None) -> str:
    """The command that installs the first of the packages that has a wheel here; else why none has."""
    place = here() if at is None else at
    for choice in choices:
        if not choice.lacks(place):
            return _command(engine, choice, place)
    lacking = "; ".join(f"of {choice.package} {choice.lacks(place)}" for choice in choices)
    return (
        f"there is no wheel, {lacking}: where one exists, install it into another Python, and name that as "
        f"python in [runtimes.{engine}]; for other systems build it from its sources, or use another engine"
    )


def _command(engine: str, wheels: Wheels, place: Here) -> str:
    what = f"{wheels.package} {wheels.beside}".rstrip()
    home = f"/opt/boardbench-{engine}"
    if place.brought is not None:
        if wheels.package in place.brought:
            return f"{wheels.package} is in the agent's package, and does not work there: {REINSTALL}"
        # Not below /home, which the service does not see.
        return (
            f"it is not in the agent's package, and lives in a Python of its own: sudo apt install "
            f"python{_dotted(place.python)}-venv && sudo {place.executable} -m venv {home} && "
            f'sudo {home}/bin/python -m pip install {what}; then python = "{home}/bin/python" below '
            f"[runtimes.{engine}] in /etc/boardbench/agent.toml, and sudo systemctl restart boardbench-agent"
        )
    if not place.managed:
        return f"{place.executable} -m pip install {what}"
    return (
        f"{place.executable} is the system's, which takes no packages from pip: "
        f"{place.executable} -m venv {home} && {home}/bin/python -m pip install {what}, and name "
        f"{home}/bin/python as python in [runtimes.{engine}]"
    )


def _dotted(version: _Version) -> str:
    return ".".join(map(str, version))
